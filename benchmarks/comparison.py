"""Losses side by side, each with SGD and with ABSGD, as chosen on a validation split."""

import argparse
import contextlib
import json
import math
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from tqdm import tqdm

from absgd_jax.data import class_counts
from benchmarks import options, report, training
from benchmarks.datasets import Split
from benchmarks.options import Stages
from benchmarks.training import Examples, Images, Run, Task, Trained

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from jax.experimental.multihost_utils import sync_global_devices
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

SEARCH_SEED = 1000  # the first seed of the search; those that are reported start from 0


class Setting(NamedTuple):
    """What a search chooses from; no stages, or an infinite λ, is plain SGD."""

    stages: Stages
    learning_rate: float
    gamma: float = 0.9

    def __str__(self) -> str:
        return ", ".join(map(str, self.stages)) or "∞"


class Result(NamedTuple):
    """A loss in the setting that the validation split chose, trained with every seed."""

    loss: str
    setting: Setting
    validation: dict[Setting, np.ndarray]  # class accuracies of what it was chosen from
    trained: Trained  # runs are seeds

    @property
    def optimizer(self) -> str:
        if not self.setting.stages:
            return "SGD"
        return "ABSGD, automatic" if options.is_automatic(self.setting.stages) else "ABSGD"

    @property
    def accuracy(self) -> np.ndarray:
        """In percent, [epochs, seeds, classes]."""
        return 100 * self.trained.history["accuracy"]


def diverged(trained: Trained) -> int:
    """Number of runs whose loss is not finite, or whose accuracy is below twice a guess's."""
    finite = np.isfinite(trained.history["mean_loss"]).all(axis=0)
    accuracy = trained.history["accuracy"][-1]
    return int(np.sum(~finite | (accuracy.mean(axis=-1) < 2 / accuracy.shape[-1])))


class Source(NamedTuple):
    """Where the runs get their data from."""

    images: Images
    classes: int
    groups: int
    # Of (seed, search): what a run trains on and is evaluated on. Every seed has as many examples
    # of each class.
    examples: Callable[[int, bool], tuple[Examples, Examples]]


def begin(parser: argparse.ArgumentParser, args: argparse.Namespace, source: Source) -> None:
    """Checks the arguments against the data, and makes ``args.out`` ready."""
    try:
        examples = len(source.examples(SEARCH_SEED, True)[0].label)
    except ValueError as error:
        parser.error(str(error))
    if args.batch_size > examples:
        parser.error(
            f"--batch-size must not exceed the {examples} training examples of the search, "
            f"got {args.batch_size}"
        )
    if jax.process_index() == 0:
        try:
            options.open_folder(parser, args)
        except OSError as error:
            parser.error(report.cannot_write(args.out, error))
    sync_global_devices("the folder is ready")


def most_accurate(grid: dict[Setting, np.ndarray]) -> Setting:
    return max(grid, key=lambda setting: grid[setting].mean())


def compare(
    args: argparse.Namespace,
    name: str,
    loss: Callable[..., jax.Array],
    source: Source,
    bar: tqdm,
    *,
    normalized: bool = False,
    choose: Callable[[dict[Setting, np.ndarray]], Setting] = most_accurate,
) -> list[Result]:
    """The loss with SGD, ABSGD, and ABSGD's automatic λ, each as the validation split chose.

    ``loss`` is a function of logits, labels, class counts and whether the second stage has begun;
    ``choose`` takes the class accuracies of every setting.
    """
    common = {"bar": bar, "loss": loss, "source": source, "normalized": normalized}
    grids, scores = search_grids(args), {}
    if any(len(grid) > 1 for grid in grids):
        settings = [setting for grid in grids for setting in grid]
        seeds = range(SEARCH_SEED, SEARCH_SEED + args.search_seeds)
        searched = train(args, f"{name}-search", settings, seeds, search=True, **common)
        scores = {s: t.history["accuracy"][-1].mean(axis=0) for s, t in searched.items()}
    unknown = np.full(source.classes, np.nan)
    validation = [{s: scores.get(s, unknown) for s in grid} for grid in grids]
    chosen = [choose(grid) if len(grid) > 1 else next(iter(grid)) for grid in validation]
    final = train(args, f"{name}-final", chosen, range(args.seeds), search=False, **common)
    return [Result(name, s, grid, final[s]) for s, grid in zip(chosen, validation, strict=True)]


def train(
    args: argparse.Namespace,
    name: str,
    settings: list[Setting],
    seeds: range,
    *,
    bar: tqdm,
    **kind: Any,
) -> dict[Setting, Trained]:
    """Trains each setting with each seed; ``kind`` are the other arguments of ``prepare``."""
    found = {}
    for ending, group in programs(settings).items():
        task, runs = prepare(args, group, seeds, **kind)
        history, losses = training.train(args, name + ending, task, runs, bar)
        for i, setting in enumerate(group):
            rows = slice(i * len(seeds), (i + 1) * len(seeds))
            of_setting = jax.tree.map(lambda x, rows=rows: x[:, rows], history)
            found[setting] = Trained(of_setting, losses[rows])
    return found


def programs(settings: list[Setting]) -> dict[str, list[Setting]]:
    """The settings that are one program each, by what its name ends in."""
    groups = {
        ending: [s for s in settings if options.is_automatic(s.stages) == automatic]
        for ending, automatic in (("", False), ("-automatic", True))
    }
    return {ending: group for ending, group in groups.items() if group}


def prepare(
    args: argparse.Namespace,
    settings: list[Setting],
    seeds: range,
    *,
    search: bool,
    loss: Callable[..., jax.Array],
    source: Source,
    normalized: bool,
) -> tuple[Task, list[Run]]:
    """The task, and its runs: each setting with each seed."""
    examples = [source.examples(seed, search) for seed in seeds]
    counts = class_counts(examples[0][0].label, source.classes)
    task = Task(
        source.images,
        lambda logits, labels, late: loss(logits, labels, counts, late),
        source.classes,
        source.groups,
        normalized,
    )
    runs = [
        make_run(args, setting, seed, *pair)
        for setting in settings
        for seed, pair in zip(seeds, examples, strict=True)
    ]
    return task, runs


def on_device(args: argparse.Namespace, train: Split, test: Split) -> Images:
    """The images of both splits, those of the training split first."""
    pixels = np.concatenate([train.images, test.images])
    if args.model == "resnet32":
        missing = [max(32 - size, 0) for size in pixels.shape[1:3]]
        margins = [(n // 2, n - n // 2) for n in missing]
        pixels = np.pad(pixels, [(0, 0), *margins, (0, 0)])
    mean, std = (np.float32(f(train.images, axis=(0, 1, 2))) for f in (np.mean, np.std))
    return jax.device_put(Images(pixels, mean, std), training.sharding(args))


@contextlib.contextmanager
def progress(args: argparse.Namespace, tasks: int, sizes: list[int]) -> Iterator[tqdm]:
    """A bar over all epochs; afterwards the run is marked as finished.

    ``sizes`` are how many runs each program of a task has.
    """
    epochs = args.epochs * sum(math.ceil(size / args.at_once) for size in sizes)

    def interrupt(*_: Any) -> None:
        print("\nstopping after this epoch; again, at once", file=sys.stderr)
        training.stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        hidden = jax.process_index() > 0
        with tqdm(total=tasks * epochs, unit="epoch", disable=hidden) as bar:
            yield bar
        if jax.process_index() == 0:
            path = args.out / "config.json"
            report.save(path, json.loads(path.read_text()) | {"finished": True})
    except KeyboardInterrupt:
        print(
            f"\nstopped; {args.out} has the results so far, and --resume goes on", file=sys.stderr
        )
        raise SystemExit(130) from None
    except OSError as error:
        raise SystemExit(
            f"\n{report.cannot_write(args.out, error)}; --resume goes on from the last checkpoint"
        ) from None
    finally:
        signal.signal(signal.SIGINT, before)
    if jax.process_index() == 0:
        print((args.out / "table.md").read_text())


def sizes(args: argparse.Namespace) -> list[int]:
    """How many runs each program of a comparison has."""
    grids = search_grids(args)
    searched = [setting for grid in grids for setting in grid] if max(map(len, grids)) > 1 else []
    phases = (searched, args.search_seeds), ([grid[0] for grid in grids], args.seeds)
    return [len(group) * k for settings, k in phases for group in programs(settings).values()]


def search_grids(args: argparse.Namespace) -> list[list[Setting]]:
    """The settings of SGD, those of ABSGD, and those of its automatic λ."""
    sgd, absgd = (
        [Setting(stages, rate, args.gamma) for stages in grid for rate in args.learning_rates]
        for grid in ([()], args.temperatures)
    )
    return [sgd, *programs(absgd).values()]


def make_run(
    args: argparse.Namespace, setting: Setting, seed: int, train: Examples, evaluation: Examples
) -> Run:
    # All runs of a program have as many stages: an infinite λ from the start changes nothing.
    padding = max(map(len, args.temperatures)) - len(setting.stages)
    stages = [options.Stage(0.0, np.inf)] * padding + list(setting.stages)
    starts, temperatures, ess = zip(*stages, strict=True)
    return Run(
        seed=np.int32(seed),
        learning_rate=np.float32(setting.learning_rate),
        gamma=np.float32(setting.gamma),
        temperatures=np.float32(temperatures),
        starts=np.int32([round(s * args.epochs) for s in starts]),
        ess=np.float32(ess[-1]) if options.is_automatic(setting.stages) else None,
        train=train,
        evaluation=evaluation,
    )


def row(result: Result, columns: list[np.ndarray]) -> tuple[str, ...]:
    """The setting, the columns as mean ± standard deviation, effective size and divergences."""
    return (
        str(result.setting),
        f"{result.setting.learning_rate:g}",
        *(report.mean_std(column, ".1f") for column in columns),
        f"{result.trained.history['effective_sample_size'][-1].mean():.2f}",
        f"{diverged(result.trained)} of {result.accuracy.shape[1]}",
    )


def record(result: Result) -> dict[str, Any]:
    """What is written of a result: what is needed to draw and to compare it again."""
    history = result.trained.history
    return {
        "stages": result.setting.stages,
        "learning_rate": result.setting.learning_rate,
        "validation": [
            {"stages": s.stages, "learning_rate": s.learning_rate, "class_accuracy": 100 * scores}
            for s, scores in result.validation.items()
        ],
        "diverged": diverged(result.trained),
        "class_accuracy": result.accuracy[-1],  # [seeds, classes]
        "accuracy": result.accuracy.mean(axis=2).T,  # [seeds, epochs]
        "mass": history["mass"].mean(axis=1),  # [epochs, groups]
    } | {name: x.T for name, x in history.items() if x.ndim == 2}  # scalars


def plot(
    panels: dict[str, list[Result]],
    draw: Callable[[Axes, Result, dict[str, Any]], None],
    path: pathlib.Path,
    *,
    x: str,
    y: str,
    colors: dict[str, str],
    scale: str = "linear",
) -> None:
    """One panel a loss: SGD in dashes, ABSGD in full, its automatic λ in a thin line with dots."""
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(2.2 + 2.6 * columns, 0.8 + 2.2 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    styles = {
        "SGD": {"ls": "--", "lw": 1.0},
        "ABSGD": {"ls": "-", "lw": 1.8},
        "ABSGD, automatic": {"ls": "-", "lw": 0.7, "marker": ".", "ms": 3},
    }
    drawn = {result.optimizer for results in panels.values() for result in results}
    styles = {name: style for name, style in styles.items() if name in drawn}
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid.flat[len(panels) - columns : len(panels)]:  # nothing is below these
        axes.tick_params(labelbottom=True)
    for axes, (title, results) in zip(grid.flat, panels.items(), strict=False):
        for result in results:
            draw(axes, result, styles[result.optimizer])
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_yscale(scale)
        axes.xaxis.get_major_locator().set_params(integer=True)
    lines = [Line2D([], [], color="black", label=name, **style) for name, style in styles.items()]
    lines += [Line2D([], [], color=color, lw=4, label=name) for name, color in colors.items()]
    figure.legend(handles=lines, loc="outside right upper", frameon=False)
    figure.supxlabel(x, fontsize="medium")
    figure.supylabel(y, fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_temperature(panels: dict[str, list[Result]], out: pathlib.Path) -> None:
    """|λ| of every seed over the epochs."""

    def draw(axes: Axes, result: Result, style: dict[str, Any]) -> None:
        lam = np.abs(result.trained.history["temperature"])
        epochs = np.arange(1, len(lam) + 1)
        axes.plot(epochs, np.where(np.isfinite(lam), lam, np.nan), color="C0", **style)

    plot(panels, draw, out / "temperature.png", x="epoch", y="|λ|", colors={}, scale="log")
