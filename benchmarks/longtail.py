"""Losses for imbalanced classes on long-tailed data, each with SGD and with ABSGD.

    python -m benchmarks.longtail

Which classes are rare is drawn anew for every seed. Learning rate, temperature and stages of each
loss are those with the best accuracy on a validation split, held out of the training data of other
seeds; what is reported is the final epoch on the test split. Accuracies are means over classes.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes

from absgd_jax import losses
from absgd_jax.data import class_counts, long_tailed_indices
from benchmarks import comparison, options, report
from benchmarks.comparison import Result, Setting
from benchmarks.training import Examples

RARE = 0.3  # share of the classes that are "few", and "many"

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def deferred(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The loss, with class-balanced weights in the second stage."""

    def weighted(z, y, n, late):
        return jnp.where(late, losses.class_balanced_weights(n), 1.0)[y] * loss(z, y, n, late)

    return weighted


# Of logits z, labels y, class counts n and whether the second stage has begun.
LOSSES = {
    "cross_entropy": lambda z, y, n, late: cross_entropy(z, y),
    "cb_drw": deferred(lambda z, y, n, late: cross_entropy(z, y)),
    "focal": lambda z, y, n, late: losses.focal(z, y),
    "ldam_drw": deferred(lambda z, y, n, late: losses.ldam(z, y, class_counts=n)),
    "balanced_softmax": lambda z, y, n, late: losses.balanced_softmax(z, y, class_counts=n),
    "arb": lambda z, y, n, late: losses.arb(z, y),
    "arb_global": lambda z, y, n, late: losses.arb(z, y, class_counts=n),
}


def make_examples(
    train: np.ndarray, test: np.ndarray, imbalance: float, validation: float
) -> Callable[[int, bool], tuple[Examples, Examples]]:
    """Long-tailed splits of the labels; a label is its class's rank, 0 having the most images."""
    classes = train.max() + 1

    def examples(seed: int, search: bool) -> tuple[Examples, Examples]:
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

    return examples


def groups(classes: int) -> dict[str, slice]:
    """Classes by rank."""
    few = round(RARE * classes)
    return {"many": slice(0, few), "medium": slice(few, -few), "few": slice(-few, None)}


def choose(grid: dict[Setting, np.ndarray], give: float) -> Setting:
    """Of the settings within ``give`` points of the best accuracy, the best on the rare classes."""
    best = max(scores.mean() for scores in grid.values())
    sound = {s: scores for s, scores in grid.items() if scores.mean() >= best - give / 100}
    return max(sound, key=lambda s: sound[s][groups(len(sound[s]))["few"]].mean())


def table(results: list[Result]) -> list[tuple[str, ...]]:
    parts = ("many", "medium", "few")
    rows = [("loss", "λ", "rate", "accuracy", *parts, "worst class", "ESS", "diverged")]
    for r in results:
        final = r.accuracy[-1]
        columns = [final, *(final[:, part] for part in groups(final.shape[1]).values())]
        means = [column.mean(axis=1) for column in columns]
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


def write(args: argparse.Namespace, results: list[Result]) -> None:
    records = {f"{r.loss} {r.optimizer}": comparison.record(r) for r in results}
    report.write(args, records, table(results))

    panels = {r.loss: [q for q in results if q.loss == r.loss] for r in results}
    ranks, accuracy = "class, from the most images to the fewest", "test accuracy, %"
    parts = {name: f"C{color}" for color, name in enumerate(groups(10))}
    for name, draw, x, y, colors in (
        ("curves", draw_curves, "epoch", accuracy, {"all classes": "C0", "few": "C1"}),
        ("classes", draw_classes, ranks, accuracy, {}),
        ("mass", draw_mass, "epoch", "weight, %", parts),
    ):
        comparison.plot(panels, draw, args.out / f"{name}.png", x=x, y=y, colors=colors)
    comparison.plot_temperature(panels, args.out)


def main() -> None:
    parser = options.make_parser(__doc__, LOSSES, seeds=10, out="out/longtail")
    parser.set_defaults(methods=["cross_entropy", "balanced_softmax"])
    add = parser.add_argument
    add(
        "--imbalance",
        type=report.above_zero,
        default=0.05,
        help="images of the smallest class / largest",
    )
    add(
        "--give",
        type=report.not_negative,
        default=0.0,
        metavar="POINTS",
        help="of validation accuracy that a choice may cost, for more on the rare classes",
    )
    args, train, test = options.parse(parser)
    classes = int(train.labels.max()) + 1
    source = comparison.Source(
        comparison.on_device(args, train, test),
        classes,
        classes,
        make_examples(train.labels, test.labels, args.imbalance, args.validation),
    )
    comparison.begin(parser, args, source)
    results = []
    with comparison.progress(args, len(args.methods), comparison.sizes(args)) as bar:
        for name in args.methods:
            results += comparison.compare(
                args,
                name,
                LOSSES[name],
                source,
                bar,
                normalized=name == "ldam_drw",
                choose=functools.partial(choose, give=args.give),
            )
            if jax.process_index() == 0:
                write(args, results)


if __name__ == "__main__":
    main()
