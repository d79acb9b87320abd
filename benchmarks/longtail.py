"""SGD and ABSGD on long-tailed digits.

    python -m benchmarks.longtail

Trains a small network on scikit-learn's handwritten digits, made long-tailed: class c of C keeps
n_max ρ^(c/(C-1)) images, which digit is which class being drawn anew for every seed. The learning
rate of each method is the one with the best accuracy on a validation split; what is reported is
the final epoch on a test split. Both splits are balanced. All methods, rates and seeds are one
compiled program, vmapped.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

from absgd_jax import absgd, get_temperature, robust_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = 10
HELD_OUT = 40  # images a class in the validation split, and in the test split
RARE = 3  # the classes with the fewest images, whose accuracy is reported beside that of all


class Split(NamedTuple):
    images: Any  # [N, 64]
    labels: Any  # [N]


class Run(NamedTuple):
    """What one training run is made of, beside its data."""

    temperature: Any
    start: Any  # the step from which the temperature is on
    learning_rate: Any


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.hidden(x)))


def long_tailed_digits(seed: int, imbalance: float) -> dict[str, Split]:
    """Splits whose labels are the classes' ranks: 0 has the most images in "train"."""
    images, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(digits == d)) for d in rng.permutation(CLASSES)]
    largest = min(map(len, members)) - 2 * HELD_OUT
    parts = {
        "train": [
            m[2 * HELD_OUT :][: int(largest * imbalance ** (c / (CLASSES - 1)))]
            for c, m in enumerate(members)
        ],
        "validation": [m[HELD_OUT : 2 * HELD_OUT] for m in members],
        "test": [m[:HELD_OUT] for m in members],
    }
    return {
        name: Split(
            images=(images[np.concatenate(part)] / 16).astype(np.float32),
            labels=np.repeat(np.arange(CLASSES), list(map(len, part))),
        )
        for name, part in parts.items()
    }


def make_training(args: argparse.Namespace, steps: int):
    """Functions ``init(run, key) -> state`` and ``epoch(state, run, data, key)``, for one run."""
    graphdef, _ = nnx.split(MLP(nnx.Rngs(0)))

    def optimizer(run: Run) -> optax.GradientTransformationExtraArgs:
        stages = [optax.constant_schedule(jnp.inf), optax.constant_schedule(run.temperature)]
        return absgd(
            optax.cosine_decay_schedule(run.learning_rate, steps * args.epochs),
            optax.join_schedules(stages, [run.start]),
            weight_decay=args.weight_decay,
        )

    def init(run, key):
        params = nnx.state(MLP(nnx.Rngs(key)), nnx.Param)
        return params, optimizer(run).init(params)

    def epoch(state, run, data, key):
        """One pass over the data; its mean cross-entropy, and every class's accuracy after it."""
        tx = optimizer(run)

        def step(state, batch):
            params, opt_state = state

            def loss_fn(params):
                logits = nnx.merge(graphdef, params)(batch.images)
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
                return robust_loss(losses, get_temperature(opt_state)), losses.mean()

            (loss, mean), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params, value=loss)
            return (optax.apply_updates(params, updates), opt_state), mean

        shuffled = jax.random.permutation(key, len(data["train"].labels))
        batches = jax.tree.map(
            lambda a: a[shuffled[: steps * args.batch_size]].reshape(steps, -1, *a.shape[1:]),
            data["train"],
        )
        state, means = jax.lax.scan(step, state, batches)

        model = nnx.merge(graphdef, state[0])
        accuracy = {
            name: (model(data[name].images).argmax(axis=1) == data[name].labels)
            .reshape(CLASSES, HELD_OUT)
            .mean(axis=1)
            for name in ("validation", "test")
        }
        return state, means.mean(), accuracy

    return init, epoch


def train(args: argparse.Namespace, methods: dict[str, tuple[float, float]]):
    """Cross-entropy [method, rate, seed, epoch] and accuracy [..., class] of both splits."""
    seeds = jnp.arange(args.seeds)
    data = jax.tree.map(
        lambda *splits: jnp.stack(splits),
        *(long_tailed_digits(seed, args.imbalance) for seed in range(args.seeds)),
    )
    steps = data["train"].labels.shape[1] // args.batch_size

    temperatures, starts = map(jnp.array, zip(*methods.values(), strict=True))
    grid = [len(methods), len(args.learning_rates), args.seeds]
    runs = Run(
        temperature=jnp.broadcast_to(temperatures[:, None, None], grid),
        start=jnp.broadcast_to((starts * args.epochs).astype(int)[:, None, None] * steps, grid),
        learning_rate=jnp.broadcast_to(jnp.array(args.learning_rates)[None, :, None], grid),
    )
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), args.epochs + 1))(seeds)

    def over_grid(f, in_axes):
        """Vmap f over methods, rates and seeds; data and keys differ by seed only."""
        by_run = [None if axes == "seed" else 0 for axes in in_axes]
        return jax.vmap(jax.vmap(jax.vmap(f), by_run), by_run)

    init, epoch = make_training(args, steps)
    run_epoch = jax.jit(over_grid(epoch, ("run", "run", "seed", "seed")), donate_argnums=0)
    state = over_grid(init, ("run", "seed"))(runs, keys[:, 0])
    history = []
    for e in tqdm(range(args.epochs), unit="epoch"):
        state, loss, accuracy = run_epoch(state, runs, data, keys[:, 1 + e])
        history.append((loss, accuracy))
    return jax.tree.map(lambda *epochs: np.stack(epochs, axis=3), *history)


class Result(NamedTuple):
    """A method at the learning rate that the validation split chose."""

    learning_rate: float
    diverged: int  # runs whose last cross-entropy is no better than a guess among the classes
    overall: np.ndarray  # test accuracy in percent, [seed, epoch]
    rare: np.ndarray  # the same of the rarest classes


def choose(
    learning_rates: list[float], loss: np.ndarray, accuracy: dict[str, np.ndarray]
) -> Result:
    """Result of one method from its arrays [rate, seed, epoch] and [rate, seed, epoch, class]."""
    best = int(accuracy["validation"][:, :, -1].mean(axis=(1, 2)).argmax())
    test = 100 * accuracy["test"][best]
    return Result(
        learning_rate=learning_rates[best],
        diverged=int(np.sum(~(loss[best, :, -1] < np.log(CLASSES)))),
        overall=test.mean(axis=2),
        rare=test[:, :, -RARE:].mean(axis=2),
    )


def table(results: dict[str, Result]) -> str:
    def cell(accuracy: np.ndarray) -> str:
        return f"{accuracy[:, -1].mean():.1f} ± {accuracy[:, -1].std(ddof=1):.1f}"

    rows = [
        f"| {name:<26} | {r.learning_rate:<4g} | {cell(r.overall)} | {cell(r.rare):<10} "
        f"| {r.diverged} of {len(r.rare)} |"
        for name, r in results.items()
    ]
    head = f"| {'method':<26} | rate | accuracy   | {RARE} rarest   | diverged |"
    return "\n".join([head, "|---" * 5 + "|", *rows])


def plot(
    results: dict[str, Result], rates: list[float], accuracy: np.ndarray, path: pathlib.Path
) -> None:
    """Curves of the rarest classes: over epochs, and of the final epoch over learning rates."""
    figure, (over_epochs, over_rates) = plt.subplots(
        1, 2, figsize=(11, 4.5), sharey=True, layout="constrained"
    )
    final = 100 * accuracy[:, :, :, -1, -RARE:].mean(axis=3)  # [method, rate, seed]
    colors = ["black", *plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(results) // 2))]
    for i, (name, result) in enumerate(results.items()):
        two_stage = name.endswith("two-stage")
        color = colors[i - len(results) // 2 if two_stage else i]
        style = {"color": color, "linestyle": "--" if two_stage else "-", "label": name}
        for axes, x, y in (
            (over_epochs, np.arange(1, result.rare.shape[1] + 1), result.rare.T),
            (over_rates, rates, final[i]),
        ):
            mean, std = y.mean(axis=1), y.std(axis=1, ddof=1)
            axes.plot(x, mean, **style)
            axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.08, linewidth=0)
    over_epochs.set(xlabel="epoch, at the chosen learning rate", ylim=(0, 100))
    over_epochs.set_ylabel(f"test accuracy of the {RARE} rarest classes, %")
    over_rates.set(xscale="log", xlabel="learning rate, final epoch", xticks=rates)
    over_rates.set_xticks(rates, [f"{r:g}" for r in rates])
    over_rates.minorticks_off()
    over_rates.legend(loc="lower left", fontsize="small", frameon=False)
    for axes in (over_epochs, over_rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=10, help="number of seeds, 2 or more")
    add("--epochs", type=int, default=60, help="number of epochs")
    add("--batch-size", type=int, default=32, help="examples a step")
    rates = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    add("--learning-rates", type=float, nargs="+", default=rates, help="to choose from")
    add("--temperatures", type=float, nargs="+", default=[0.5, 2.0, 5.0], help="of ABSGD")
    add("--weight-decay", type=float, default=2e-4, help="L2 coefficient")
    add("--imbalance", type=float, default=0.05, help="images of the smallest class / largest")
    add("--out", type=pathlib.Path, default="out/longtail", help="folder to write to")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be 2 or more for a spread, got {args.seeds}")
    args.out.mkdir(parents=True, exist_ok=True)

    # A method is a temperature and the share of the epochs after which it is on.
    methods = {"SGD": (jnp.inf, 0.0)}
    methods |= {f"ABSGD, λ = {t:g}": (t, 0.0) for t in args.temperatures}
    methods |= {f"ABSGD, λ = {t:g}, two-stage": (t, 0.5) for t in args.temperatures}
    loss, accuracy = train(args, methods)
    results = {
        name: choose(args.learning_rates, loss[i], {k: a[i] for k, a in accuracy.items()})
        for i, name in enumerate(methods)
    }

    print(table(results))
    plot(results, args.learning_rates, accuracy["test"], args.out / "longtail.png")
    report = {
        "config": {k: str(v) if k == "out" else v for k, v in vars(args).items()},
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in ("jax", "optax", "flax", "scikit-learn")},
        },
        "results": {
            name: {
                k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in r._asdict().items()
            }
            for name, r in results.items()
        },
    }
    (args.out / "results.json").write_text(json.dumps(report, indent=1))
    print(f"\nwrote results.json and longtail.png to {args.out}")


if __name__ == "__main__":
    main()
