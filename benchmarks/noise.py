"""Losses for noisy labels, each with SGD and with ABSGD at λ < 0.

    python -m benchmarks.noise

A share of the training labels is wrong. Learning rate, temperature and stages of each loss are
those with the best accuracy on a validation split, which is as noisy and held out of the training
data of other seeds; what is reported is the final epoch on the clean test split. Beside it stands
the best epoch on that split, as papers report it, which nobody can choose without clean labels.

AUROC says how well the final losses of the training examples find the wrong labels, and so do
ABSGD's weights, which fall as the losses rise. The precision is the share of wrong labels among the
largest losses, of which as many are taken as labels are wrong.

With --imbalance some classes are rare, too. Which ones is drawn anew for every seed. Accuracies are
means over classes in any case.
"""

import dataclasses
import pathlib
from typing import Annotated, Any, NamedTuple

import numpy as np
from scipy.stats import truncnorm
from sklearn.metrics import roc_auc_score

from absgd_jax.data import flip_labels, long_tailed_indices
from benchmarks.engine import comparison, plots, report
from benchmarks.engine.comparison import CLEAN, Draw, of_each, Result, TEMPERATURE
from benchmarks.engine.config import ABOVE_0, FROM_1, Must, OR_NONE, POSITIVE, readable
from benchmarks.engine.datasets import Split
from benchmarks.engine.methods import KNOBS, METHOD, parse
from benchmarks.engine.training import Examples, Task

KINDS = ("symmetric", "asymmetric", "instance")
SPREAD = 0.1  # of the rates of instance-dependent noise


@readable
def is_noise(text: str) -> bool:
    kind, _, rate = text.partition(":")
    return kind in KINDS and 0 < float(rate) < 1


NOISE = Must(
    "be symmetric, asymmetric or instance, and a share in (0, 1), such as symmetric:0.4", is_noise
)


@dataclasses.dataclass(frozen=True)
class Config(comparison.Config):
    """Noisy labels."""

    out: pathlib.Path = pathlib.Path("out/noise")  # folder to write to
    # such as cross_entropy, gce or cross_entropy+mixup
    methods: Annotated[tuple[str, ...], METHOD, KNOBS] = (
        *("cross_entropy", "sce", "gce", "truncated_gce"),
    )
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (0.03, 0.1, 0.3, 1.0)  # to choose from
    # as in benchmarks.longtail
    temperatures: Annotated[tuple[str, ...], TEMPERATURE, OR_NONE] = (
        *("-5", "-2", "-1"),
        *("0.2:-1", "0.2:-0.5"),
    )
    # symmetric, asymmetric or instance, and the share of wrong labels
    noise: Annotated[tuple[str, ...], NOISE] = ("symmetric:0.4", "asymmetric:0.4")
    # training examples of a run, before classes are thinned; all, if not given
    examples: Annotated[int | None, FROM_1] = None
    imbalance: Annotated[float, ABOVE_0] = 1.0  # images of the smallest class / largest


def instance_labels(
    images: np.ndarray, labels: np.ndarray, rate: float, classes: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Labels that depend on the image, and a mask of the wrong ones.

    Each label has a rate of its own, around ``rate``, and is replaced according to a random
    projection of the pixels: algorithm 2 of Xia et al., NeurIPS 2020, arXiv 2006.07836.
    """
    pixels = images.reshape(len(images), -1)
    pixels = (pixels - pixels.mean()) / pixels.std()
    # In the paper they end at 0 and 1; cut off alike on both sides, their mean is ``rate``.
    end = min(rate, 1 - rate) / SPREAD
    rates = truncnorm.rvs(-end, end, rate, SPREAD, size=len(labels), random_state=rng)
    noisy = labels.copy()
    for c in range(classes):
        members = np.flatnonzero(labels == c)
        logits = pixels[members] @ rng.normal(size=(pixels.shape[1], classes))
        logits[:, c] = -np.inf
        others = np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)  # of their softmax
        noisy[members] = np.where(rng.random(len(members)) < rates[members], others, c)
    return noisy, noisy != labels


def make_draw(
    train: Split,
    test: Split,
    noise: str,
    size: int | None,
    validation: float,
    imbalance: float = 1.0,
) -> Draw:
    """Splits of the labels; the training examples in two groups, by whether a label is wrong.

    The others are in groups by the rank of their class, of which the first has the most images.
    """
    kind, _, rate = noise.partition(":")
    classes = train.labels.max() + 1

    def draw(seed: int, search: bool) -> tuple[Examples, ...]:
        rng = np.random.default_rng(seed)
        index = rng.permutation(len(train.labels)).astype(np.int32)
        order = np.arange(classes, dtype=np.int32)
        if imbalance < 1:
            rng.shuffle(order)
            rare = dict(class_order=order, max_count=size and size // classes, seed=rng)
            index = index[long_tailed_indices(train.labels[index], imbalance, **rare)]
        index = index[:size]
        rank = np.argsort(order).astype(np.int32)
        right = train.labels[index]
        if kind == "instance":
            images = train.images[index]
            labels, wrong = instance_labels(images, right, float(rate), classes, rng)
        else:
            labels, wrong = flip_labels(
                right, float(rate), kind=kind, num_classes=classes, seed=rng
            )
        held_out = round(validation * len(index)) if search else 0
        # If there are too few of a class, images that the run doesn't have.
        others = np.setdiff1d(np.arange(len(train.labels), dtype=np.int32), index)
        known = np.concatenate([index[held_out:], others])
        told = of_each(known, train.labels[known], CLEAN)
        told = Examples(told, train.labels[told], np.zeros_like(told))
        noisy = Examples(*(x[held_out:] for x in (index, labels, wrong.astype(np.int32))))
        if search:
            return noisy, Examples(*(x[:held_out] for x in (index, labels, rank[labels]))), told
        tested = np.arange(len(test.labels), dtype=np.int32) + np.int32(len(train.labels))
        return noisy, Examples(tested, test.labels, rank[test.labels]), told

    return draw


class Found(NamedTuple):
    """How well the final losses find the wrong labels, in percent, [seeds]."""

    auroc: np.ndarray
    precision: np.ndarray  # of the largest losses, as many as labels are wrong


def precision(wrong: np.ndarray, scores: np.ndarray) -> float:
    return wrong[np.argsort(-scores, kind="stable")[: wrong.sum()]].mean()


def find(result: Result, draw: Draw) -> Found:
    # A run that diverged finds nothing.
    scores = np.nan_to_num(result.trained.losses, nan=0.0)
    pairs = [(draw(seed, False)[0].group, scores[seed]) for seed in range(len(scores))]
    metrics = roc_auc_score, precision
    return Found(*(100 * np.array([metric(*pair) for pair in pairs]) for metric in metrics))


def write(config: Config, results: dict[tuple[str, str], list[Any]]) -> None:
    """``results`` are pairs of a result and what it found, by noise and loss."""
    figures = ["accuracy", "best epoch, on test", "AUROC", "precision", "weight on wrong labels, %"]
    if config.imbalance < 1:
        figures.insert(1, "few")
    rows = [("noise", "loss", "λ", "rate", *figures, "ESS", "diverged")]
    records = {}
    for key, pairs in results.items():
        for r, found in pairs:
            accuracy, mass = r.accuracy.mean(axis=2), 100 * r.trained.history["mass"][-1, :, 1]
            columns = [accuracy[-1], accuracy.max(axis=0), *found, mass]
            if config.imbalance < 1:
                few = comparison.groups(r.accuracy.shape[2])["few"]
                columns.insert(1, r.accuracy[-1][:, few].mean(axis=1))
            rows.append((*key, *comparison.row(r, columns)))
            name = f"{key[0]} {comparison.name_of(config, r)}"
            records[name] = comparison.record(r) | found._asdict()
    report.write(config.out, records, report.markdown(rows))
    panels = {"\n".join(key): [r for r, _ in pairs] for key, pairs in results.items()}
    path, y = config.out / "curves.png", "test accuracy, %"
    plots.by_panel(panels, lambda r: r.accuracy.mean(axis=(1, 2)), path, y=y)
    comparison.plot_temperature(panels, config.out)


def main() -> None:
    config = comparison.read(Config, __doc__)
    train, test = comparison.load(config)
    classes = int(train.labels.max()) + 1
    images = comparison.on_device(config, train, test)
    draws = {
        noise: make_draw(train, test, noise, config.examples, config.validation, config.imbalance)
        for noise in config.noise
    }
    results = {}
    sizes = len(draws) * len(config.methods) * comparison.sizes(config)
    with comparison.session(config, draws[config.noise[0]], sizes) as trainer:
        for noise, draw in draws.items():
            for name in config.methods:
                task = Task(images, classes, 2, classes, parse(name))
                compared = comparison.compare(config, f"{noise}-{name}", task, draw, trainer)
                pairs = [(r._replace(loss=name), find(r, draw)) for r in compared]
                results[noise.replace(":", " "), name] = pairs
                write(config, results)


if __name__ == "__main__":
    main()
