"""Losses for imbalanced classes on long-tailed data, each with SGD and with ABSGD.

    python -m benchmarks.longtail

Which classes are rare is drawn anew for every seed. Learning rate, temperature and stages of each
loss are those with the best accuracy on a validation split, held out of the training data of other
seeds; what is reported is the final epoch on the test split. Accuracies are means over classes.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes

from absgd_jax import losses
from absgd_jax.data import class_counts, long_tailed_indices
from benchmarks import comparison, report
from benchmarks.comparison import Draw, Result, Setting
from benchmarks.config import ABOVE_0, FROM_2, NOT_NEGATIVE
from benchmarks.training import Examples, Task

RARE = 0.3  # share of the classes that are "few", and "many"

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def deferred(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The loss, with class-balanced weights in the second stage."""

    def weighted(z, y, n, late):
        return jnp.where(late, losses.class_balanced_weights(n), 1.0)[y] * loss(z, y, n, late)

    return weighted


def adjusted(tau: float) -> Callable[..., jax.Array]:
    return lambda z, y, n, late: losses.balanced_softmax(z, y, class_counts=n, tau=tau)


# Logit adjustment by more than the class sizes says how much of a gain any shift to the rare has.
TAUS = {"balanced_softmax": 1.0} | {f"logit_adjustment_{tau}": tau for tau in (1.25, 1.5, 2.0)}
# Of logits z, labels y, class counts n and whether the second stage has begun.
LOSSES = {
    "cross_entropy": lambda z, y, n, late: cross_entropy(z, y),
    "cb_drw": deferred(lambda z, y, n, late: cross_entropy(z, y)),
    "focal": lambda z, y, n, late: losses.focal(z, y),
    "ldam_drw": deferred(lambda z, y, n, late: losses.ldam(z, y, class_counts=n)),
    **{name: adjusted(tau) for name, tau in TAUS.items()},
    "arb": lambda z, y, n, late: losses.arb(z, y),
    "arb_global": lambda z, y, n, late: losses.arb(z, y, class_counts=n),
}


@dataclasses.dataclass(frozen=True)
class Config(comparison.Config):
    """Long-tailed data."""

    out: pathlib.Path = pathlib.Path("out/longtail")  # folder to write to
    methods: tuple[Literal[*LOSSES], ...] = ("cross_entropy", "balanced_softmax")  # losses
    seeds: Annotated[int, FROM_2] = 10  # number of seeds that are reported
    imbalance: Annotated[float, ABOVE_0] = 0.05  # images of the smallest class / largest
    # points of validation accuracy that a choice may cost, for more on the rare classes
    give: Annotated[float, NOT_NEGATIVE] = 0.0


def make_draw(train: np.ndarray, test: np.ndarray, imbalance: float, validation: float) -> Draw:
    """Long-tailed splits of the labels; a label is its class's rank, 0 having the most images."""
    classes = train.max() + 1

    def draw(seed: int, search: bool) -> tuple[Examples, Examples]:
        rng = np.random.default_rng(seed)
        labels = rng.permutation(classes)[np.concatenate([train, test])].astype(np.int32)
        pool, held_out = np.split(np.arange(len(labels)), [len(train)])
        if search:
            pool = rng.permutation(pool)
            size = int(validation * class_counts(labels[pool], classes).min())
            by_class = [pool[labels[pool] == c] for c in range(classes)]
            held_out = np.concatenate([members[:size] for members in by_class])
            pool = np.concatenate([members[size:] for members in by_class])
        kept = pool[long_tailed_indices(labels[pool], imbalance, seed=rng)]
        return tuple(Examples(np.int32(i), labels[i], labels[i]) for i in (kept, held_out))

    return draw


def groups(classes: int) -> dict[str, slice]:
    """Classes by rank; of two none is in the middle."""
    few = round(RARE * classes)
    parts = {"many": slice(0, few), "medium": slice(few, classes - few)}
    return {k: s for k, s in parts.items() if s.start < s.stop} | {"few": slice(-few, None)}


def choose(grid: dict[Setting, np.ndarray], give: float) -> Setting:
    """Of the settings within ``give`` points of the best accuracy, the best on the rare classes."""
    best = max(scores.mean() for scores in grid.values())
    sound = {s: scores for s, scores in grid.items() if scores.mean() >= best - give / 100}
    return max(sound, key=lambda s: sound[s][groups(len(sound[s]))["few"]].mean())


def table(results: list[Result]) -> list[tuple[str, ...]]:
    parts = groups(results[0].accuracy.shape[2])
    rows = [("loss", "λ", "rate", "accuracy", *parts, "worst class", "ESS", "diverged")]
    for r in results:
        final = r.accuracy[-1]
        means = [final[:, part].mean(axis=1) for part in (slice(None), *parts.values())]
        rows.append((r.loss, *comparison.row(r, [*means, final.min(axis=1)])))
    return rows


def draw_curves(axes: Axes, result: Result, style: dict[str, Any]) -> None:
    epochs = np.arange(1, len(result.accuracy) + 1)
    few = groups(result.accuracy.shape[2])["few"]
    for part, color in ((slice(None), "C0"), (few, "C1")):
        mean = result.accuracy[:, :, part].mean(axis=(1, 2))
        axes.plot(epochs, mean, color=color, **style)


def draw_mass(axes: Axes, result: Result, style: dict[str, Any]) -> None:
    mass = result.trained.history["mass"].mean(axis=1)
    for color, part in enumerate(groups(mass.shape[1]).values()):
        share = mass[:, part].sum(axis=1)
        axes.plot(np.arange(1, len(mass) + 1), 100 * share, color=f"C{color}", **style)


def draw_classes(axes: Axes, result: Result, style: dict[str, Any]) -> None:
    axes.plot(result.accuracy[-1].mean(axis=0), color="C0", **{"marker": ".", **style})


def write(config: Config, results: list[Result]) -> None:
    records = {f"{r.loss} {r.optimizer}": comparison.record(r) for r in results}
    report.write(config.out, records, report.markdown(table(results)))

    panels = {r.loss: [q for q in results if q.loss == r.loss] for r in results}
    ranks, accuracy = "class, from the most images to the fewest", "test accuracy, %"
    parts = {name: f"C{i}" for i, name in enumerate(groups(results[0].accuracy.shape[2]))}
    for name, draw, x, y, colors in (
        ("curves", draw_curves, "epoch", accuracy, {"all classes": "C0", "few": "C1"}),
        ("classes", draw_classes, ranks, accuracy, {}),
        ("mass", draw_mass, "epoch", "weight, %", parts),
    ):
        comparison.plot(panels, draw, config.out / f"{name}.png", x=x, y=y, colors=colors)
    comparison.plot_temperature(panels, config.out)


def main() -> None:
    config = comparison.read(Config, __doc__)
    train, test = comparison.load(config)
    classes = int(train.labels.max()) + 1
    images = comparison.on_device(config, train, test)
    draw = make_draw(train.labels, test.labels, config.imbalance, config.validation)
    chosen = functools.partial(choose, give=config.give)
    results = []
    sizes = comparison.sizes(config)
    with comparison.session(config, draw, len(config.methods), sizes) as trainer:
        for name in config.methods:
            task = Task(images, classes, classes, LOSSES[name], normalized=name == "ldam_drw")
            results += comparison.compare(config, name, task, draw, trainer, choose=chosen)
            if jax.process_index() == 0:
                write(config, results)


if __name__ == "__main__":
    main()
