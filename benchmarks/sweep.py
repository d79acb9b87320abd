"""Temperatures side by side, with every learning rate and seed, in one compiled program.

    python -m benchmarks.sweep

λ is a leaf of the optimiser's state, so that one compilation serves all values, and one call trains
them; those that tune themselves are another program. The accuracy is that on a validation split,
for this is what λ may be chosen by.
"""

import dataclasses
import pathlib
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import longtail, noise
from benchmarks.engine import comparison, plots, report
from benchmarks.engine.comparison import Setting, SGD, TEMPERATURE
from benchmarks.engine.config import ABOVE_0, FROM_1, FROM_2, OR_NONE, POSITIVE
from benchmarks.engine.methods import KNOBS, METHOD, parse
from benchmarks.engine.search import SEARCH_SEED
from benchmarks.engine.training import Task, Trained
from benchmarks.noise import NOISE

Swept = dict[Setting, Trained]  # of one loss; runs are seeds


@dataclasses.dataclass(frozen=True)
class Config(comparison.Config):
    """Every temperature, learning rate and seed."""

    out: pathlib.Path = pathlib.Path("out/sweep")  # folder to write to
    # as in benchmarks.longtail, and with --noise as in benchmarks.noise
    methods: Annotated[tuple[str, ...], METHOD, KNOBS] = ("cross_entropy", "balanced_softmax")
    seeds: Annotated[int, FROM_2] = 2  # number of seeds, which are those of the search
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (0.1,)  # peaks
    # as in benchmarks.longtail
    temperatures: Annotated[tuple[str, ...], TEMPERATURE, OR_NONE] = (
        *("0.5", "1", "1.5", "2", "3", "5", "10", "20"),
        *("ess0.9", "0.5:ess0.9"),
    )
    imbalance: Annotated[float, ABOVE_0] = 0.05  # images of the smallest class / largest
    # wrong labels, in place of rare classes: symmetric, asymmetric or instance, and their share
    noise: Annotated[str | None, NOISE] = None
    # training examples of a run with wrong labels; all, if not given
    examples: Annotated[int | None, FROM_1] = None

    @property
    def rows(self) -> dict[str, list[Setting]]:
        """By λ, the settings of every rate."""
        rates = self.learning_rates
        return {x: [Setting(x, r, self.gamma) for r in rates] for x in (SGD, *self.temperatures)}


def final_accuracy(trained: Trained) -> np.ndarray:
    """In percent, [seeds]."""
    return 100 * trained.history["accuracy"][-1].mean(axis=-1)


def table(config: Config, results: dict[str, Swept]) -> list[tuple[str, ...]]:
    """A row for each loss and λ, and in it each rate."""
    rows = [("loss", "λ", *(f"rate {rate:g}" for rate in config.learning_rates), "diverged")]
    for loss, swept in results.items():
        for lam, settings in config.rows.items():
            found = [swept[setting] for setting in settings]
            cells = (report.mean_std(final_accuracy(trained), ".1f") for trained in found)
            diverged = sum(map(comparison.divergences, found))
            total = len(found) * config.seeds
            rows.append((loss, comparison.in_words(lam), *cells, f"{diverged} of {total}"))
    return rows


def plot(config: Config, results: dict[str, Swept]) -> None:
    """A panel for each loss and rate: λ to the right, seeds downwards, accuracy as colour."""
    shape = len(results), len(config.learning_rates)
    names = list(map(comparison.in_words, config.rows))
    width, height = 0.8 + 0.24 * len(names), 0.5 + 0.16 * config.seeds
    size, shared = (1.5 + width * shape[1], 1 + height * shape[0]), dict(sharex=True, sharey=True)
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, **shared)
    for (loss, swept), panels in zip(results.items(), grid, strict=True):
        for axes, settings in zip(panels, zip(*config.rows.values(), strict=True), strict=True):
            accuracy = np.stack([final_accuracy(swept[setting]) for setting in settings], axis=1)
            image = axes.imshow(accuracy, aspect="auto", vmin=np.nanmax(accuracy) - 10)
            axes.grid(visible=False)
            axes.set_title(f"{loss}, rate {settings[0].learning_rate:g}", fontsize="small")
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
            axes.set_yticks([])
            figure.colorbar(image, ax=axes, extend="min")
    figure.supxlabel("λ")
    figure.supylabel("seed")
    title = "validation accuracy, %; colours end 10 points below the best"
    figure.suptitle(title, fontsize="small")
    plots.save(figure, config.out / "heatmap.png")


def main() -> None:
    config = comparison.read(Config, __doc__)
    train, test = comparison.load(config)
    classes = int(train.labels.max()) + 1
    if config.noise:
        draw = noise.make_draw(train, test, config.noise, config.examples, config.validation)
        groups = 2
    else:
        draw = longtail.make_draw(train.labels, test.labels, config.imbalance, config.validation)
        groups = classes
    images = comparison.on_device(config, train, test)

    settings = [setting for row in config.rows.values() for setting in row]
    programs = list(comparison.programs(settings).values())
    seeds = range(SEARCH_SEED, SEARCH_SEED + config.seeds)
    results: dict[str, Swept] = {}
    sizes = len(config.methods) * [len(group) * config.seeds for group in programs]
    with comparison.session(config, draw, sizes) as trainer:
        for name in config.methods:
            task = Task(images, classes, groups, classes, parse(name))
            results[name] = comparison.train_each(
                config, name, task, settings, seeds, draw, trainer
            )
            write(config, results)


def write(config: Config, results: dict[str, Swept]) -> None:
    records = {
        f"{loss} {setting}, rate {setting.learning_rate:g}, γ {setting.gamma:g}": {
            "accuracy": final_accuracy(trained),
            "diverged": comparison.divergences(trained),
            "temperature": trained.history["temperature"].T,
        }
        for loss, swept in results.items()
        for setting, trained in swept.items()
    }
    report.write(config.out, records, report.markdown(table(config, results)))
    plot(config, results)


if __name__ == "__main__":
    main()
