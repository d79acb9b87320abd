"""Where ABSGD ends: its distance to the exact stationary point, with and without the average.

    python -m benchmarks.convergence

Logistic regression on all of scikit-learn's digits. Newton's method solves the objective over the
whole data set to the last digit,

    f(w) = λ log mean_i exp(l_i(w) / λ) + μ/2 |w|²

and ABSGD, which sees batches of n, is run for more and more steps. With γ = 1 there is no average:
u is the batch's own mean of exp(l / λ), the weights of a batch always sum to 1, and the iterate
ends at another point, the further away the smaller the batch. With
--proximal there is SCENT's average, too, whose γ is a u / (1 + a u).
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.optimize
from sklearn.datasets import load_digits
from tqdm import tqdm

from absgd_jax import absgd, robust_loss, Sums, tilt
from benchmarks.engine import config, plots, report

CLASSES = 10
DIVERGED = 10  # so many times as far from the solution as where it began is a run that did

Data = tuple[jax.Array, jax.Array]  # images [N, 65], whose last pixel is 1 for a bias; labels [N]


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """What to run, and for how long."""

    out: pathlib.Path = pathlib.Path("out/convergence")  # folder to write to
    seeds: Annotated[int, config.FROM_2] = 5  # number of seeds, 2 or more
    temperatures: Annotated[tuple[float, ...], config.FINITE_TEMPERATURE] = (0.5, -1.5)  # λ
    batch_sizes: Annotated[tuple[int, ...], config.FROM_1] = (8, 32)  # examples a step, n
    steps: Annotated[tuple[int, ...], config.FROM_1] = (1_000, 10_000, 100_000)  # lengths of runs
    gamma: Annotated[float, config.ABOVE_0] = 0.1  # beside which 1, no average, is run
    # step sizes of SCENT's average
    proximal: Annotated[tuple[float, ...], config.POSITIVE, config.OR_NONE] = ()
    learning_rate: Annotated[float, config.POSITIVE] = 0.05  # peak, after a warm-up; then a cosine
    weight_decay: Annotated[float, config.POSITIVE] = 1e-2  # L2 coefficient, μ


def losses(w: jax.Array, data: Data) -> jax.Array:
    images, labels = data
    logits = images @ w.reshape(-1, CLASSES)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@jax.jit
def objective(w: jax.Array, temperature: float, weight_decay: float, data: Data) -> jax.Array:
    return robust_loss(losses(w, data), temperature) + weight_decay / 2 * jnp.sum(w**2)


gradient, hessian = jax.jit(jax.grad(objective)), jax.jit(jax.hessian(objective))


@jax.jit
def hessian_product(w: jax.Array, vector: jax.Array, *args: Any) -> jax.Array:
    return jax.jvp(lambda w: gradient(w, *args), (w,), (vector,))[1]


def stationary_point(temperature: float, weight_decay: float, data: Data) -> jax.Array:
    """By Newton's method: in a region of trust, then in whole steps."""
    w, args = np.zeros(data[0].shape[1] * CLASSES), (temperature, weight_decay, data)
    w = scipy.optimize.minimize(
        *(objective, w, args, "trust-krylov", gradient),
        hessp=hessian_product,
        options={"maxiter": 1000},
    ).x
    for _ in range(5):
        if jnp.abs(gradient(w, *args)).max() < 1e-12:
            return jnp.asarray(w)
        w -= jnp.linalg.solve(hessian(w, *args), gradient(w, *args))
    config.fail(
        f"--temperatures {temperature:g} can't be solved to the last digit at --weight-decay "
        f"{weight_decay:g}: name a λ further from 0, or more weight decay"
    )


@functools.partial(jax.jit, static_argnames=("c", "n", "steps"))
def train(
    c: Config, n: int, steps: int, data: Data, temperature: float, rule: Any, key: jax.Array
) -> jax.Array:
    """The last iterate of ABSGD on random batches of n; the rule is γ, or -a of SCENT's."""
    rate = optax.warmup_cosine_decay_schedule(0.0, c.learning_rate, steps // 10, steps)

    def optimizer(gamma):
        return absgd(rate, temperature, weight_decay=c.weight_decay, gamma=gamma, debias=True)

    def step(carry, key):
        w, opt_state = carry
        log_u = optax.tree.get(opt_state, "baseline") / temperature
        proximal = jax.nn.sigmoid(jnp.log(jnp.abs(rule)) + log_u)
        tx = optimizer(jnp.where(rule < 0, proximal, rule))
        chosen = jax.random.randint(key, (n,), 0, len(data[1]))
        batch = jax.tree.map(lambda x: x[chosen], data)

        def loss_fn(w, sums):
            return tilt(losses(w, batch), opt_state, sums).mean()

        grads, sums = jax.grad(loss_fn, argnums=(0, 1))(w, Sums())
        updates, opt_state = tx.update(grads, opt_state, w, sums=sums)
        return (optax.apply_updates(w, updates), opt_state), None

    w = jnp.zeros(data[0].shape[1] * CLASSES)
    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (w, optimizer(c.gamma).init(w)), keys)[0][0]


def run(
    c: Config, data: Data, temperature: float, solution: jax.Array, n: int, steps: int
) -> Iterator[dict[str, Any]]:
    """A record for each rule of the average."""
    runs = jax.vmap(functools.partial(train, c, n, steps, data, temperature), (None, 0))
    rules = {1.0: 1.0, c.gamma: c.gamma} | {f"a = {a:g}": -a for a in c.proximal}
    keys = jax.random.split(jax.random.key(0), c.seeds)
    ends = jax.vmap(runs, (0, None))(jnp.array([*rules.values()]), keys)
    for gamma, w in zip(rules, ends, strict=True):
        value = [objective(x, temperature, c.weight_decay, data) for x in (solution, *w)]
        gap = np.abs(np.divide(value[1:], value[0]) - 1)
        distance = np.linalg.norm(w - solution, axis=1) / np.linalg.norm(solution)
        setting = {"temperature": temperature, "n": n, "steps": steps, "gamma": gamma}
        diverged = np.sum(~(distance < DIVERGED))
        yield setting | {"gap": gap, "distance": distance, "diverged": diverged}


def table(records: list[dict[str, Any]]) -> str:
    rows = [("λ", "n", "steps", "γ", "gap of f", "distance of w", "diverged")]
    for r in records:
        setting = (f"{r[k]:g}" for k in ("temperature", "n", "steps"))
        rule = r["gamma"] if isinstance(r["gamma"], str) else f"{r['gamma']:g}"
        figures = (report.mean_std(r[k], ".1e") for k in ("gap", "distance"))
        rows.append((*setting, rule, *figures, f"{r['diverged']} of {len(r['gap'])}"))
    return report.markdown(rows)


def plot(c: Config, records: list[dict[str, Any]], path: pathlib.Path) -> None:
    columns = len(c.temperatures)
    figure, panels = plt.subplots(1, columns, figsize=(11, 4.5), sharey=True, squeeze=False)
    for axes, temperature in zip(panels[0], c.temperatures, strict=True):
        for (i, n), gamma in itertools.product(enumerate(c.batch_sizes), (1.0, c.gamma)):
            line = [
                (r["steps"], r["gap"].mean())
                for r in records
                if (r["temperature"], r["n"], r["gamma"]) == (temperature, n, gamma)
            ]
            style = {"ls": "--", "mfc": "white"} if gamma == 1 else {"ls": "-"}
            label = f"n = {n}, " + ("no average" if gamma == 1 else f"γ = {gamma:g}")
            axes.loglog(*zip(*line, strict=True), marker="o", color=f"C{i}", label=label, **style)
        axes.set(xlabel="steps", title=f"λ = {temperature:g}")
        axes.legend()
    panels[0, 0].set_ylabel("|f(w) - f(w*)| / |f(w*)|")
    plots.save(figure, path)


def main() -> None:
    c = config.read(Config, __doc__)
    jax.config.update("jax_enable_x64", True)
    images, labels = load_digits(return_X_y=True)
    images = np.pad(images / 16, ((0, 0), (0, 1)), constant_values=1)
    data = jnp.asarray(images), jnp.asarray(labels)
    solutions = {t: stationary_point(t, c.weight_decay, data) for t in c.temperatures}
    settings = list(itertools.product(solutions.items(), c.batch_sizes, c.steps))
    with report.folder(c):
        records = [
            r
            for (temperature, solution), n, steps in tqdm(settings, unit="setting")
            for r in run(c, data, temperature, solution, n, steps)
        ]
        text = table(records)
        report.write(c.out, {f"setting {i}": r for i, r in enumerate(records)}, text)
        plot(c, records, c.out / "convergence.png")
    print(text)


if __name__ == "__main__":
    main()
