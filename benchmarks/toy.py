"""What λ does, in one picture: boundaries and weights of SGD and ABSGD on two rings of points.

    python -m benchmarks.toy

Above, the inner ring is rare, and λ > 0. In these few steps SGD gives it up; the smaller λ, the
more weight is on the points near the boundary, and the sooner that encloses the ring. Sooner is all
there is to it: in ten times the steps SGD gets there, too.

Below, 30 % of the labels are wrong, and λ < 0. SGD learns many of them by heart; with λ < 0 they
have next to no weight, and the boundary mostly stays between the rings. So does that of SGD which
is stopped after a tenth of the steps.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import jax
import matplotlib
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import make_circles

from absgd_jax import absgd, robust_loss, Sums, tilt, two_stage
from absgd_jax.data import flip_labels
from benchmarks.engine import report
from benchmarks.engine.config import Config as BaseConfig
from benchmarks.engine.config import FROM_0, read

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH = 64
FIRST_STAGE = 0.1  # share of the steps, plain SGD: a small λ < 0 keeps to what was fitted first
RINGS = ("outer", "inner")
COLORS = ("#0072B2", "#D55E00")  # which the colour-blind can tell apart
CAPTION = """area of a point: its weight at the end; line: decision boundary
percentages: recall of the two rings on fresh points, balanced and with true labels"""

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """What is drawn, and to where."""

    out: pathlib.Path = pathlib.Path("out/toy")  # folder to write to
    seed: Annotated[int, FROM_0] = 0  # of points, network and batches


class Row(NamedTuple):
    """A row of panels, which differ in λ alone."""

    title: str
    sizes: tuple[int, int]  # points of the outer and of the inner ring
    flipped: float  # share of the labels
    learning_rate: float
    steps: int
    temperatures: tuple[float, ...]


ROWS = (
    Row("rare inner ring, 1 : 20", (600, 30), 0.0, 0.01, 500, (np.inf, 1.0, 0.2)),
    Row("wrong labels, 30 %", (300, 300), 0.3, 0.1, 5_000, (np.inf, -1.0, -0.5)),
)


def rings(sizes: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 2] and labels [N], which are 1 for the inner ring."""
    points, labels = make_circles(sizes, noise=0.1, factor=0.5, random_state=rng.integers(2**31))
    return points.astype(np.float32), labels


@jax.jit
def make_model(key: jax.Array) -> tuple[nnx.Module, jax.Array]:
    """The network, from points to logits, and a key for its batches."""
    rngs = nnx.Rngs(key)
    layers = nnx.Linear(2, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 64, rngs=rngs), nnx.relu
    return nnx.Sequential(*layers, nnx.Linear(64, 2, rngs=rngs)), rngs()


@functools.partial(jax.jit, static_argnames="row")
def train(row: Row, model: nnx.Module, key: jax.Array, points, labels, temperature) -> nnx.Module:
    rate = optax.cosine_decay_schedule(row.learning_rate, row.steps)
    tx = absgd(rate, two_stage(temperature, begin=int(FIRST_STAGE * row.steps)))

    def step(carry, key):
        model, opt_state = carry
        batch = jax.random.randint(key, (BATCH,), 0, len(labels))

        def loss_fn(model, sums):
            losses = cross_entropy(model(points[batch]), labels[batch])
            return tilt(losses, opt_state, sums).mean()

        grads, sums = jax.grad(loss_fn, argnums=(0, 1))(model, Sums())
        updates, opt_state = tx.update(grads, opt_state, model, sums=sums)
        return (optax.apply_updates(model, updates), opt_state), None

    keys = jax.random.split(key, row.steps)
    (model, _), _ = jax.lax.scan(step, (model, tx.init(model)), keys)
    return model


@jax.jit
def predict(model: nnx.Module, points: jax.Array) -> jax.Array:
    return model(points)


@jax.jit
def weigh(model: nnx.Module, points, labels, temperature) -> jax.Array:
    """The weights of the points."""
    return jax.grad(robust_loss)(cross_entropy(model(points), labels), temperature)


def draw(axes, temperature, model, points, labels, weights, recall) -> None:
    x = np.linspace(-1.45, 1.45, 300)
    difference = predict(model, np.stack(np.meshgrid(x, x), axis=-1)) @ np.array([-1, 1])
    axes.contourf(x, x, difference, [-np.inf, 0, np.inf], colors=COLORS, alpha=0.12)
    axes.contour(x, x, difference, [0], colors="black", linewidths=1.2)
    color = np.array(COLORS)[labels]
    axes.scatter(*points.T, 3, color, linewidths=0)  # what is left of a point without weight
    axes.scatter(*points.T, 9000 * weights, color, alpha=0.45, linewidths=0)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}
    for c, (at, side) in enumerate([(0.03, "left"), (0.97, "right")]):
        text = f"{RINGS[c]} {recall[c]:.0f} %"
        axes.text(at, 0.03, text, color=COLORS[c], ha=side, transform=axes.transAxes, bbox=box)
    axes.set_title("SGD" if np.isinf(temperature) else rf"ABSGD, $\lambda = {temperature:g}$")
    axes.set(aspect="equal", xticks=[], yticks=[])


def run(row: Row, seed: int, panels: np.ndarray) -> Iterator[dict[str, Any]]:
    """Trains with every λ and draws its panel; a record of each."""
    rng = np.random.default_rng(seed)
    points, truth = rings(row.sizes, rng)
    labels, wrong = flip_labels(truth, row.flipped, num_classes=2, seed=rng)
    test_points, test_labels = rings((2000, 2000), rng)
    panels[0].set_ylabel(row.title, fontsize="large")
    for axes, t in zip(panels, row.temperatures, strict=True):
        model = train(row, *make_model(jax.random.key(seed)), points, labels, t)
        weights = np.asarray(weigh(model, points, labels, t))
        correct = np.asarray(predict(model, test_points)).argmax(axis=1) == test_labels
        recall = [100 * correct[test_labels == c].mean() for c in (0, 1)]
        draw(axes, t, model, points, labels, weights, recall)
        share = 100 * weights[wrong if row.flipped else labels == 1].sum()
        yield {"data": row.title, "temperature": t, "recall": recall, "weight": share}


def table(records: list[dict[str, Any]]) -> str:
    rows = [("data", "λ", *(f"recall, {ring}" for ring in RINGS), "weight of rare / wrong")]
    for r in records:
        percent = (f"{x:.0f} %" for x in (*r["recall"], r["weight"]))
        rows.append((r["data"], f"{r['temperature']:g}".replace("inf", "∞"), *percent))
    return report.markdown(rows)


def main() -> None:
    config = read(Config, __doc__)
    figure, panels = plt.subplots(2, 3, figsize=(9, 6.9), layout="constrained")
    with report.folder(config):
        records = [
            r for row, line in zip(ROWS, panels, strict=True) for r in run(row, config.seed, line)
        ]
        figure.supxlabel(CAPTION, fontsize="medium")
        figure.savefig(config.out / "toy.png", dpi=100)
        text = table(records)
        report.write(config.out, {f"panel {i}": r for i, r in enumerate(records)}, text)
    print(text)


if __name__ == "__main__":
    main()
