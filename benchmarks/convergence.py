"""Where ABSGD ends: its distance to the exact stationary point, with and without the average.

    python -m benchmarks.convergence

Logistic regression on all of scikit-learn's digits. Newton's method solves the objective over the
whole data set to the last digit,

    f(w) = λ log mean_i exp(l_i(w) / λ) + μ/2 |w|²

and ABSGD, which sees batches of n, is run for more and more steps. With γ = 1 there is no average:
u is the batch's own mean of exp(l / λ), the weights of a batch always sum to 1, and the iterate
ends at another point, the further away the smaller the batch.
"""

import argparse
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

from absgd_jax import absgd, robust_loss, tilt
from benchmarks import report

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = 10


def per_example(w: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(images @ w, labels)


def stationary_point(objective, shape: tuple[int, int]) -> jax.Array:
    """Newton's method, from where gradient descent has come."""
    grad = jax.jit(jax.grad(lambda w: objective(w.reshape(shape))))
    hessian = jax.jit(jax.hessian(lambda w: objective(w.reshape(shape))))
    w = jax.lax.fori_loop(0, 2000, lambda _, w: w - 0.5 * grad(w), jnp.zeros(np.prod(shape)))
    for _ in range(5):
        w -= jnp.linalg.solve(hessian(w), grad(w))
    if not jnp.abs(grad(w)).max() < 1e-12:
        raise RuntimeError(f"Newton's method stopped at a gradient of {jnp.abs(grad(w)).max()}")
    return w.reshape(shape)


def make_training(args: argparse.Namespace, images, labels, temperature: float, n: int, steps: int):
    """Function ``train(gamma, key) -> w``: the last iterate of ABSGD on random batches of n."""

    def train(gamma, key):
        tx = absgd(
            optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, steps // 10, steps),
            temperature,
            weight_decay=args.weight_decay,
            gamma=gamma,
            debias=True,
        )

        def step(carry, key):
            w, opt_state = carry
            batch = jax.random.randint(key, (n,), 0, len(labels))

            def loss_fn(w):
                return tilt(per_example(w, images[batch], labels[batch]), opt_state).mean()

            loss, grads = jax.value_and_grad(loss_fn)(w)
            updates, opt_state = tx.update(grads, opt_state, w, value=loss)
            return (optax.apply_updates(w, updates), opt_state), None

        w = jnp.zeros((images.shape[1], CLASSES))
        (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), jax.random.split(key, steps))
        return w

    return train


def run(
    args: argparse.Namespace, images, labels, temperature: float, bar: tqdm
) -> list[dict[str, Any]]:
    """A record for every batch size, number of steps and γ."""

    def objective(w):
        losses = per_example(w, images, labels)
        return robust_loss(losses, temperature) + args.weight_decay / 2 * jnp.sum(w**2)

    solution = stationary_point(objective, (images.shape[1], CLASSES))
    gammas, keys = (1.0, args.gamma), jax.random.split(jax.random.key(0), args.seeds)
    records = []
    for n, steps in itertools.product(args.batch_sizes, args.steps):
        train = jax.vmap(make_training(args, images, labels, temperature, n, steps), (None, 0))
        ends = jax.jit(jax.vmap(train, (0, None)))(jnp.array(gammas), keys)
        for gamma, w in zip(gammas, ends, strict=True):
            gap = jnp.abs(jax.vmap(objective)(w) / objective(solution) - 1)
            distance = jnp.linalg.norm(w - solution, axis=(1, 2)) / jnp.linalg.norm(solution)
            setting = {"temperature": temperature, "n": n, "steps": steps, "gamma": gamma}
            records.append(setting | {"gap": gap, "distance": distance})
        bar.update()
    return records


def plot(args: argparse.Namespace, records: list[dict[str, Any]], path: pathlib.Path) -> None:
    figure, panels = plt.subplots(
        1, len(args.temperatures), figsize=(11, 4.5), sharey=True, layout="constrained"
    )
    for axes, temperature in zip(np.atleast_1d(panels), args.temperatures, strict=True):
        for (i, n), gamma in itertools.product(enumerate(args.batch_sizes), (1.0, args.gamma)):
            line = [
                (r["steps"], r["gap"].mean())
                for r in records
                if (r["temperature"], r["n"], r["gamma"]) == (temperature, n, gamma)
            ]
            style = {"ls": "--", "mfc": "white"} if gamma == 1 else {"ls": "-"}
            label = f"n = {n}, " + ("no average" if gamma == 1 else f"γ = {gamma:g}")
            axes.plot(*zip(*line, strict=True), marker="o", color=f"C{i}", label=label, **style)
        axes.set(xscale="log", yscale="log", xlabel="steps", title=f"λ = {temperature:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    np.atleast_1d(panels)[0].set_ylabel("|f(w) - f(w*)| / |f(w*)|")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = report.make_parser(__doc__, seeds=5, out="out/convergence")
    add = parser.add_argument
    add(
        "--temperatures",
        type=report.number(float, lambda x: 0 < abs(x) < np.inf, "be a finite λ other than 0"),
        nargs="+",
        default=[0.5, -1.5],
        help="λ",
    )
    size = report.whole_number(1)
    add("--batch-sizes", type=size, nargs="+", default=[8, 32], help="n")
    add("--steps", type=size, nargs="+", default=[1_000, 10_000, 100_000], help="lengths of runs")
    add("--gamma", type=report.above_zero, default=0.1, help="beside which 1, no average, is run")
    add(
        "--learning-rate",
        type=report.positive,
        default=0.05,
        help="peak, after a warm-up; then a cosine",
    )
    add("--weight-decay", type=report.positive, default=1e-2, help="μ")
    args = parser.parse_args()
    report.make_folder(parser, args.out)
    jax.config.update("jax_enable_x64", True)

    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(np.pad(images / 16, ((0, 0), (0, 1)), constant_values=1))  # and a bias
    labels = jnp.asarray(labels)
    total = len(args.temperatures) * len(args.batch_sizes) * len(args.steps)
    with tqdm(total=total, unit="setting") as bar:
        records = [r for t in args.temperatures for r in run(args, images, labels, t, bar)]

    rows = [("λ", "n", "steps", "γ", "gap of f", "distance of w")]
    for r in records:
        setting = (f"{r[k]:g}" for k in ("temperature", "n", "steps", "gamma"))
        rows.append((*setting, *(report.mean_std(r[k], ".1e") for k in ("gap", "distance"))))
    report.save(args.out / "config.json", report.describe(args))
    report.write(args, {f"setting {i}": r for i, r in enumerate(records)}, rows)
    plot(args, records, args.out / "convergence.png")
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
