"""Losses for noisy labels, each with SGD and with ABSGD at λ < 0.

    python -m benchmarks.noise

A share of the training labels is wrong. Learning rate, temperature and stages of each loss are
those with the best accuracy on a validation split, which is as noisy and held out of the training
data of other seeds; what is reported is the final epoch on the clean test split. AUROC says how
well the final weights of the training examples find the wrong labels.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from sklearn.metrics import roc_auc_score

from absgd_jax import losses
from absgd_jax.data import flip_labels
from benchmarks import comparison, options, report
from benchmarks.comparison import Result
from benchmarks.training import Examples

# Of logits z, labels y, class counts n and whether the second stage has begun.
LOSSES = {
    "cross_entropy": lambda z, y, n, late: optax.softmax_cross_entropy_with_integer_labels(z, y),
    "sce": lambda z, y, n, late: losses.symmetric_cross_entropy(z, y),
    "gce": lambda z, y, n, late: losses.generalized_cross_entropy(z, y),
    "truncated_gce": lambda z, y, n, late: losses.generalized_cross_entropy(
        z, y, truncation=jnp.where(late, 0.5, 0.0)
    ),
}


def parse_noise(text: str) -> tuple[str, float]:
    kind, _, rate = text.partition(":")
    try:
        if kind not in ("symmetric", "asymmetric") or not 0 < float(rate) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be symmetric or asymmetric and a share in (0, 1), such as symmetric:0.4, "
            f"got {text}"
        ) from None
    return kind, float(rate)


def make_examples(
    train: np.ndarray, test: np.ndarray, noise: tuple[str, float], size: int, validation: float
) -> Callable[[int, bool], tuple[Examples, Examples]]:
    """Splits of the labels, in two groups: those that are right, and those that are not."""
    kind, rate = noise
    classes = train.max() + 1

    def examples(seed: int, search: bool) -> tuple[Examples, Examples]:
        rng = np.random.default_rng(seed)
        index = rng.permutation(len(train))[:size].astype(np.int32)
        labels, wrong = flip_labels(train[index], rate, kind=kind, num_classes=classes, seed=rng)
        noisy = Examples(index, labels, wrong.astype(np.int32))
        if search:
            held_out = round(validation * size)
            return Examples(*(x[held_out:] for x in noisy)), Examples(
                *(x[:held_out] for x in noisy)
            )
        clean = np.arange(len(train), len(train) + len(test), dtype=np.int32)
        return noisy, Examples(clean, test, np.zeros_like(test))

    return examples


def auroc(result: Result, examples: Callable[[int, bool], tuple[Examples, Examples]]) -> np.ndarray:
    """Of finding the wrong labels, in percent, [seeds]."""
    # With λ < 0 the weights fall as the losses rise. A run that diverged finds nothing.
    scores = np.nan_to_num(result.trained.losses, nan=0.0)
    wrong = [examples(seed, False)[0].group for seed in range(len(scores))]
    return 100 * np.array([roc_auc_score(w, s) for w, s in zip(wrong, scores, strict=True)])


def draw_curves(axes: Axes, result: Result, style: dict[str, Any]) -> None:
    epochs = np.arange(1, len(result.accuracy) + 1)
    axes.plot(epochs, result.accuracy.mean(axis=(1, 2)), color="C0", **style)


def draw_mass(axes: Axes, result: Result, style: dict[str, Any]) -> None:
    mass = 100 * result.trained.history["mass"][:, :, 1].mean(axis=1)
    axes.plot(np.arange(1, len(mass) + 1), mass, color="C0", **style)


def write(args: argparse.Namespace, results: dict[tuple[str, str], list[Any]]) -> None:
    """``results`` are pairs of a result and its AUROC, by noise and loss."""
    rows = [
        (
            "noise",
            "loss",
            "λ",
            "rate",
            "accuracy",
            "worst class",
            "AUROC",
            "weight on wrong labels, %",
            "ESS",
            "diverged",
        )
    ]
    records = {}
    for key, pairs in results.items():
        for r, found in pairs:
            final = r.accuracy[-1]
            wrong = 100 * r.trained.history["mass"][-1, :, 1]
            columns = [final.mean(axis=1), final.min(axis=1), found, wrong]
            rows.append((*key, *comparison.row(r, columns)))
            records[" ".join((*key, r.optimizer))] = comparison.record(r) | {"auroc": found}
    report.write(args, records, rows)
    panels = {"\n".join(key): [r for r, _ in pairs] for key, pairs in results.items()}
    for name, draw, y in (
        ("curves", draw_curves, "test accuracy, %"),
        ("mass", draw_mass, "weight on wrong labels, %"),
    ):
        comparison.plot(panels, draw, args.out / f"{name}.png", x="epoch", y=y, colors={})
    comparison.plot_temperature(panels, args.out)


def main() -> None:
    parser = options.make_parser(__doc__, LOSSES, seeds=5, out="out/noise")
    parser.set_defaults(
        learning_rates=[0.03, 0.1, 0.3, 1.0],
        temperatures=[options.parse_stages(t) for t in ("-5", "-2", "-1", "0.2:-1", "0.2:-0.5")],
    )
    add = parser.add_argument
    add(
        "--noise",
        type=parse_noise,
        nargs="+",
        default=[("symmetric", r) for r in (0.2, 0.4, 0.6)] + [("asymmetric", 0.4)],
        metavar="KIND:RATE",
        help="symmetric or asymmetric, and the share of wrong labels",
    )
    add(
        "--examples",
        type=report.whole_number(1),
        help="training examples of a run; all, if not given",
    )
    args, train, test = options.parse(parser)
    images = comparison.on_device(args, train, test)
    classes = int(train.labels.max()) + 1
    size = min(args.examples or len(train.labels), len(train.labels))

    sources = {}
    for noise in args.noise:
        examples = make_examples(train.labels, test.labels, noise, size, args.validation)
        sources[noise] = comparison.Source(images, classes, 2, examples)
    comparison.begin(parser, args, sources[args.noise[0]])
    results = {}
    tasks = len(args.noise) * len(args.methods)
    with comparison.progress(args, tasks, comparison.sizes(args)) as bar:
        for (kind, rate), source in sources.items():
            for name in args.methods:
                label = f"{kind}-{rate:g}-{name}"
                compared = comparison.compare(args, label, LOSSES[name], source, bar)
                pairs = [(r, auroc(r, source.examples)) for r in compared]
                results[f"{kind} {rate:g}", name] = pairs
                if jax.process_index() == 0:
                    write(args, results)


if __name__ == "__main__":
    main()
