"""Losses for imbalanced classes on long-tailed data, each with SGD and with ABSGD.

    python -m benchmarks.longtail

Which classes are rare is drawn anew for every seed. Learning rate, temperature and stages of each
loss are those with the best accuracy on a validation split, held out of the training data of other
seeds; what is reported is the final epoch on the test split. Accuracies are means over classes.
"""

import dataclasses
import functools
import pathlib
import re
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np

from absgd_jax.data import class_counts, long_tailed_indices
from benchmarks.engine import comparison, plots, report
from benchmarks.engine.comparison import CLEAN, Draw, groups, of_each, Result, Setting
from benchmarks.engine.config import ABOVE_0, FROM_1, NOT_NEGATIVE, OR_NONE
from benchmarks.engine.methods import KNOBS, METHOD, parse
from benchmarks.engine.search import SEEDS
from benchmarks.engine.training import Examples, Task


@dataclasses.dataclass(frozen=True)
class Config(comparison.Config):
    """Long-tailed data."""

    out: pathlib.Path = pathlib.Path("out/longtail")  # folder to write to
    # such as cross_entropy, balanced_softmax:1.25 or cross_entropy+mixup
    methods: Annotated[tuple[str, ...], METHOD, KNOBS] = ("cross_entropy", "balanced_softmax")
    baselines: Annotated[tuple[str, ...], METHOD, KNOBS, OR_NONE] = ()  # the same, with SGD alone
    seeds: Annotated[int, SEEDS] = 10  # number of seeds that are reported
    imbalance: Annotated[float, ABOVE_0] = 0.05  # images of the smallest class / largest
    largest: Annotated[int | None, FROM_1] = None  # training images of it; all, if not given
    # points of validation accuracy that a choice may cost, for more on the rare classes
    give: Annotated[float, NOT_NEGATIVE] = 0.0


def make_draw(
    train: np.ndarray,
    test: np.ndarray,
    imbalance: float,
    validation: float,
    largest: int | None = None,
) -> Draw:
    """Long-tailed splits of the labels; a label is its class's rank, 0 having the most images."""
    classes = train.max() + 1

    def draw(seed: int, search: bool) -> tuple[Examples, ...]:
        rng = np.random.default_rng(seed)
        labels = rng.permutation(classes)[np.concatenate([train, test])].astype(np.int32)
        pool, held_out = np.split(np.arange(len(labels)), [len(train)])
        if search:
            pool = rng.permutation(pool)
            size = int(validation * class_counts(labels[pool], classes).min())
            parts = slice(size), slice(size, None)
            held_out, pool = (of_each(pool, labels[pool], part) for part in parts)
        least = class_counts(labels[pool], classes).min()
        if largest and largest > least:
            raise ValueError(
                f"--largest must not exceed the {least} training images of the smallest class, got "
                f"{largest}; lower it, or --validation"
            )
        if int((largest or least) * imbalance) < 1:
            remedy = "--largest" if largest else "lower --validation"
            raise ValueError(
                f"--imbalance must leave the rarest class an image, got {imbalance} of the "
                f"{largest or least} of the largest; raise it, or {remedy}"
            )
        kept = pool[long_tailed_indices(labels[pool], imbalance, max_count=largest, seed=rng)]
        order = np.concatenate([np.setdiff1d(pool, kept), kept])  # those that are left first
        clean = of_each(order, labels[order], CLEAN)
        return tuple(Examples(np.int32(i), labels[i], labels[i]) for i in (kept, held_out, clean))

    return draw


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


def plot_tradeoff(results: list[Result], path: pathlib.Path) -> None:
    """All classes over the rare ones: a curve for each method over its knob, and over its λ.

    A setting of which a run diverged has no point.
    """
    curves: dict[str, list[tuple[str, Result]]] = {}
    for r in results:
        if r.optimizer == "SGD":
            sgd, name = r, re.sub(r":[\d.]+", "", r.loss)
            curves.setdefault(name, []).append((", ".join(re.findall(r":([\d.]+)", r.loss)), r))
        else:
            _, lam = comparison.stages(r.setting.temperature)[-1]
            curves.setdefault(f"{r.loss}, {r.optimizer}", [("", sgd)]).append((f"{lam:g}", r))
    figure, axes = plt.subplots(figsize=(10, 5.5))
    for i, (name, points) in enumerate(curves.items()):
        sound = [
            (text, r.accuracy[-1]) for text, r in points if not comparison.divergences(r.trained)
        ]
        means = [(a[:, groups(a.shape[1])["few"]].mean(), a.mean(), text) for text, a in sound]
        few, every, texts = zip(*sorted(means), strict=True) if means else ((), (), ())
        style = {"marker": "osD^vXP"[i // 10], "ls": "-" if "ABSGD" in name else "--", "ms": 4}
        axes.plot(few, every, label=name, color=f"C{i % 10}", lw=1, **style)
        for x, y, text in zip(few, every, texts, strict=True):
            axes.annotate(text, (x, y), (2, 3), textcoords="offset points", fontsize="x-small")
    axes.set_xlabel("test accuracy of the rare classes, %")
    axes.set_ylabel("of all classes, %")
    figure.legend(loc="outside right upper", fontsize="small")
    plots.save(figure, path)


def write(config: Config, results: list[Result]) -> None:
    records = {comparison.name_of(config, r): comparison.record(r) for r in results}
    report.write(config.out, records, report.markdown(table(results)))

    panels = {r.loss: [q for q in results if q.loss == r.loss] for r in results}
    comparison.plot_temperature(panels, config.out)
    plot_tradeoff(results, config.out / "tradeoff.png")


def main() -> None:
    config = comparison.read(Config, __doc__)
    train, test = comparison.load(config)
    classes = int(train.labels.max()) + 1
    images = comparison.on_device(config, train, test)
    draw = make_draw(train.labels, test.labels, config.imbalance, config.validation, config.largest)
    chosen = functools.partial(choose, give=config.give)
    results = []
    plain = dataclasses.replace(config, temperatures=())
    told = dict.fromkeys(config.methods, config)
    told |= {name: plain for name in config.baselines if name not in told}
    sizes = [size for each in told.values() for size in comparison.sizes(each)]
    with comparison.session(config, draw, sizes) as trainer:
        for name, each in told.items():
            task = Task(images, classes, classes, classes, parse(name))
            results += comparison.compare(each, name, task, draw, trainer, choose=chosen)
            write(config, results)


if __name__ == "__main__":
    main()
