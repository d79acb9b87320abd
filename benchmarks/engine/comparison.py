"""Losses side by side, each with SGD and with ABSGD, as chosen on a validation split.

    Config    what every comparison is told
    Setting   what the search chooses from: λ, learning rate, γ
    Result    a loss in the setting that was chosen, and what became of its runs

A λ is written as it is on the command line; see ``stages``.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from absgd_jax.data import class_counts
from benchmarks.engine import config as configuration
from benchmarks.engine import datasets, plots, report, training
from benchmarks.engine.config import fail, FROM_1, INSIDE, Must, OR_NONE, POSITIVE, refusing
from benchmarks.engine.datasets import Split
from benchmarks.engine.search import search, SEARCH_SEED, SEEDS, seeds_of
from benchmarks.engine.training import Examples, Images, pick, Run, Task, Trained

SGD = "inf"
CLEAN = slice(10)  # of the examples of a class, for methods that have to be told
RARE = 0.3  # share of the classes that are "few", and "many"
# The papers' protocol, in place of what suits a set of small images on a small machine.
PAPERS = {
    "model": "resnet32",
    "epochs": 200,
    "batch_size": 128,
    "hidden": (256, 128),
    "augment": True,
}

# Of (seed, search): what a run trains on, what it is evaluated on, and a few examples of every
# class under their right labels, for methods that have to be told.
Draw = Callable[[int, bool], tuple[Examples, Examples, Examples]]
Train = Callable[[training.Config, str, Task, list[Run]], Trained]


def is_automatic(temperature: str) -> bool:
    return "ess" in temperature


def split(temperature: str) -> list[tuple[str, str]]:
    """Pairs of what stands before the colon, if anything, and behind it."""
    return [stage.rpartition(":")[::2] for stage in temperature.split(",")]


def in_words(temperature: str) -> str:
    """As tables have it."""
    if temperature == SGD:
        return "∞"
    return ", ".join(f"{lam} from {start}" if start else lam for start, lam in split(temperature))


def stages(temperature: str) -> list[tuple[float, float]]:
    """Pairs of a share of the epochs, and λ, or the effective sample size, from there on.

    ``"5"`` is λ = 5 from the start, ``"0.8:5"`` plain SGD before 0.8 of the epochs, and
    ``"0.5:10,0.8:5"`` has two steps. ``"ess0.5"`` and ``"0.5:ess-0.7"`` tune λ > 0 and λ < 0.
    """
    return [
        (float(start or 0), float(lam.removeprefix("ess"))) for start, lam in split(temperature)
    ]


@configuration.readable
def is_temperature(text: str) -> bool:
    starts, values = zip(*stages(text), strict=True)
    sizes = [abs(value) for value in values]
    most = 1 if is_automatic(text) else math.inf
    sound = all(0 < size < most for size in sizes) and len(sizes) <= most
    return sound and list(starts) == sorted(starts) and starts[0] >= 0 and starts[-1] < 1


TEMPERATURE = Must(
    "be a finite λ other than 0, from a share of the epochs on, such as 5, 0.8:5 or 0.5:10,0.8:5, "
    "or one effective sample size, such as ess0.5 or 0.5:ess-0.7",
    is_temperature,
)


def check_stages(flag: str, temperatures: Sequence[str], epochs: int) -> None:
    """Raises an error where λ would begin after the last epoch."""
    for text in temperatures:
        if round(stages(text)[-1][0] * epochs) >= epochs:
            raise ValueError(f"{flag} must leave λ one of the {epochs} epochs, got {text}")


@dataclasses.dataclass(frozen=True)
class Config(training.Config):
    """What every comparison is told."""

    dataset: Literal[*datasets.NAMES] = "digits"  # what to train on
    data_dir: pathlib.Path | None = None  # folder with the files of the data set
    tested: Annotated[int | None, FROM_1] = None  # test images of a class; all, if not given
    seeds: Annotated[int, SEEDS] = 5  # number of seeds that are reported
    search_seeds: Annotated[int, FROM_1] = 5  # seeds of every setting of the search
    # share of the smallest class that the search holds out of every class
    validation: Annotated[float, INSIDE] = 0.2
    # peaks to choose from
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (0.01, 0.03, 0.1, 0.3)
    # to choose from: 5 for λ = 5 from the start; 0.8:5 for plain SGD before 0.8 of the epochs;
    # 0.5:10,0.8:5 for several steps; ess0.5 for λ > 0 with an effective sample size of half the
    # batch, and ess-0.5 for λ < 0
    temperatures: Annotated[tuple[str, ...], TEMPERATURE, OR_NONE] = (
        *("0.5", "2", "5"),
        *("0.5:0.5", "0.5:2", "0.5:5"),
    )
    each: bool = False  # report every λ, at the rate chosen for it, and not the best of them alone

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages("--temperatures", self.temperatures, self.epochs)


AnyConfig = TypeVar("AnyConfig", bound=Config)


def read(cls: type[AnyConfig], doc: str | None) -> AnyConfig:
    """The command line, in front of the papers' protocol where the data are not the digits."""
    config = configuration.read(cls, doc)
    if config.dataset != "digits":
        config = configuration.read(cls, doc, default=dataclasses.replace(cls(), **PAPERS))
    return config


def load(config: Config) -> tuple[Split, Split]:
    """Both splits."""
    blocks = {"linear": 0, "mlp": len(config.hidden), "cnn": 3}.get(config.model, 4)
    if config.fine_tune_from > blocks:
        fail(f"--fine-tune-from must lie in [0, {blocks}], got {config.fine_tune_from}")
    with refusing():
        train, test = datasets.load(config.dataset, config.data_dir)
    kept = np.sort(of_each(np.arange(len(test.labels)), test.labels, slice(config.tested)))
    return train, Split(test.images[kept], test.labels[kept])


def of_each(index: np.ndarray, labels: np.ndarray, part: slice) -> np.ndarray:
    """That part of the indices of every class."""
    return np.concatenate([index[labels == c][part] for c in np.unique(labels)])


def groups(classes: int) -> dict[str, slice]:
    """Classes by rank; of two none is in the middle."""
    few = round(RARE * classes)
    parts = {"many": slice(0, few), "medium": slice(few, classes - few)}
    return {k: s for k, s in parts.items() if s.start < s.stop} | {"few": slice(-few, None)}


def on_device(config: Config, train: Split, test: Split) -> Images:
    """The images of both splits, those of the training split first."""
    pixels = np.concatenate([train.images, test.images])
    if config.model == "resnet32":
        missing = [max(32 - size, 0) for size in pixels.shape[1:3]]
        margins = [(n // 2, n - n // 2) for n in missing]
        pixels = np.pad(pixels, [(0, 0), *margins, (0, 0)])
    mean, std = (np.float32(f(train.images, axis=(0, 1, 2))) for f in (np.mean, np.std))
    return jax.device_put(Images(pixels, mean, std))


class Setting(NamedTuple):
    """What a search chooses from; an infinite λ is plain SGD."""

    temperature: str
    learning_rate: float
    gamma: float

    def __str__(self) -> str:
        return in_words(self.temperature)


class Result(NamedTuple):
    """A loss in the setting that the validation split chose, trained with every seed."""

    loss: str
    setting: Setting
    validation: dict[Setting, np.ndarray]  # class accuracies of what it was chosen from
    trained: Trained  # runs are seeds

    @property
    def optimizer(self) -> str:
        if self.setting.temperature == SGD:
            return "SGD"
        return "ABSGD, automatic" if is_automatic(self.setting.temperature) else "ABSGD"

    @property
    def accuracy(self) -> np.ndarray:
        """In percent, [epochs, seeds, classes]."""
        return 100 * self.trained.history["accuracy"]


def diverged(finite: np.ndarray | bool, accuracy: np.ndarray | float, classes: int) -> np.ndarray:
    """Whether losses weren't finite, or the accuracy is next to a guess.

    That is below twice a guess's own, and less than ten points above it.
    """
    return ~np.asarray(finite) | (accuracy < 1 / classes + min(1 / classes, 0.1))


def divergences(trained: Trained) -> int:
    """Number of runs that diverged."""
    finite = np.isfinite(trained.history["mean_loss"]).all(axis=0)
    accuracy = trained.history["accuracy"][-1]
    return int(diverged(finite, accuracy.mean(axis=-1), accuracy.shape[-1]).sum())


def epochs_of(config: Config, sizes: list[int]) -> int:
    """How many epochs a bar has, by how many runs each program has."""
    return config.epochs * sum(math.ceil(n / config.runs_at_once) for n in sizes)


@contextlib.contextmanager
def session(config: Config, draw: Draw, sizes: list[int] | None = None) -> Iterator[Train]:
    """Holds ``config.out``, shows a bar over all epochs, and gives the function that trains.

    ``sizes`` are how many runs each program has, if that is known. The table is printed at the end.
    """
    with refusing():
        train, evaluation, _ = draw(SEARCH_SEED, True)
    if config.batch_size > len(train.label):
        fail(
            f"--batch-size must not exceed the {len(train.label)} training examples of the search, "
            f"got {config.batch_size}"
        )
    if len(missing := np.setdiff1d(train.label, evaluation.label)):
        fail(
            f"--validation must hold out an example of every class, got {config.validation}, which "
            f"leaves none of the classes {missing.tolist()}"
        )

    def interrupt(*_: Any) -> None:
        print("\nstopping after this epoch; again, at once", file=sys.stderr)
        training.stop.set()
        signal.signal(signal.SIGINT, before)

    with contextlib.ExitStack() as stack:
        started = stack.enter_context(report.folder(config))["started"]
        bar = stack.enter_context(tqdm(total=epochs_of(config, sizes or []) or None, unit="epoch"))
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield functools.partial(training.train, bar=bar, started=started)
        except KeyboardInterrupt:
            message = f"stopped; {config.out} has the results so far, and --resume goes on"
            print(f"\n{message}", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            signal.signal(signal.SIGINT, before)
    print((config.out / "table.md").read_text(encoding="utf-8"))


def most_accurate(grid: dict[Setting, np.ndarray]) -> Setting:
    return max(grid, key=lambda setting: grid[setting].mean())


def class_accuracy(trained: Trained) -> np.ndarray:
    """At the end, a mean over seeds."""
    return trained.history["accuracy"][-1].mean(axis=0)


def compare(
    config: Config,
    name: str,
    task: Task,
    draw: Draw,
    train: Train,
    *,
    choose: Callable[[dict[Setting, np.ndarray]], Setting] = most_accurate,
) -> list[Result]:
    """A loss with SGD, ABSGD, and ABSGD's automatic λ, each as the validation split chose.

    ``choose`` takes the class accuracies of every setting.
    """

    def run(settings: list[Setting], searching: bool) -> dict[Setting, Trained]:
        phase, seeds = "search" if searching else "final", seeds_of(config, searching)
        return train_each(config, f"{name}-{phase}", task, settings, seeds, draw, train)

    def best(_: int, grid: Mapping[Setting, Trained]) -> Setting:
        return choose({s: class_accuracy(trained) for s, trained in grid.items()})

    grids = search_grids(config)
    found = search(dict(enumerate(grids)), run, best)
    unknown = np.full(task.classes, np.nan)
    seen = {s: class_accuracy(trained) for s, trained in found.seen.items()}
    return [
        Result(name, s, {s: seen.get(s, unknown) for s in grid}, found.final[s])
        for s, grid in zip(found.chosen.values(), grids, strict=True)
    ]


def search_grids(config: Config) -> list[list[Setting]]:
    """The settings of SGD, those of ABSGD, and those of its automatic λ; or of each λ."""
    by_lambda = [
        [Setting(lam, rate, config.gamma) for rate in config.learning_rates]
        for lam in (SGD, *config.temperatures)
    ]
    if config.each:
        return by_lambda
    return by_lambda[:1] + list(programs([s for grid in by_lambda[1:] for s in grid]).values())


def sizes(config: Config) -> list[int]:
    """How many runs each program of a comparison has."""
    grids = search_grids(config)
    searched = [setting for grid in grids for setting in grid] if max(map(len, grids)) > 1 else []
    phases = (searched, config.search_seeds), ([grid[0] for grid in grids], config.seeds)
    return [len(group) * k for settings, k in phases for group in programs(settings).values()]


def programs(settings: list[Setting]) -> dict[str, list[Setting]]:
    """The settings that are one program each, by what its name ends in."""
    groups = {
        ending: [s for s in settings if is_automatic(s.temperature) == automatic]
        for ending, automatic in (("", False), ("-automatic", True))
    }
    return {ending: group for ending, group in groups.items() if group}


def train_each(
    config: Config, name: str, task: Task, settings: Any, seeds: range, draw: Draw, train: Train
) -> dict[Setting, Trained]:
    """Trains each setting with each seed; those from SEARCH_SEED on are of the search."""
    found = {}
    for ending, group in programs(settings).items():
        runs = make_runs(config, task, group, seeds, draw)
        found |= by_setting(group, train(config, name + ending, task, runs))
    return found


def by_setting(settings: list[Any], trained: Trained) -> dict[Any, Trained]:
    """Of runs that are each setting with each seed."""
    seeds = len(trained.losses) // len(settings)
    return {s: pick(trained, slice(i * seeds, (i + 1) * seeds)) for i, s in enumerate(settings)}


def make_runs(
    config: Config, task: Task, settings: list[Setting], seeds: range, draw: Draw
) -> list[Run]:
    """Each setting with each seed."""
    drawn = {seed: draw(seed, seed >= SEARCH_SEED) for seed in seeds}
    # All runs of a program have as many stages: an infinite λ from the start changes nothing.
    most = max(len(stages(setting.temperature)) for setting in settings)
    runs = []
    for setting in settings:
        automatic = is_automatic(setting.temperature)
        pairs = stages(setting.temperature)
        starts, values = zip(*[(0.0, math.inf)] * (most - len(pairs)), *pairs, strict=True)
        runs += [
            Run(
                seed=np.int32(seed),
                learning_rate=np.float32(setting.learning_rate),
                gamma=np.float32(setting.gamma),
                temperatures=np.float32(np.copysign(np.inf, values) if automatic else values),
                starts=np.int32([round(start * config.epochs) for start in starts]),
                ess=np.float32(abs(values[-1])) if automatic else None,
                train=train,
                evaluation=evaluation,
                class_counts=class_counts(train.label, task.classes),
                clean=clean,
            )
            for seed, (train, evaluation, clean) in drawn.items()
        ]
    return runs


def row(result: Result, columns: list[np.ndarray]) -> tuple[str, ...]:
    """The setting, the columns as mean ± standard deviation, effective size and divergences."""
    size = result.trained.history["effective_sample_size"][-1].mean()
    cells = (report.mean_std(column, ".1f") for column in columns)
    failed = f"{divergences(result.trained)} of {result.accuracy.shape[1]}"
    return str(result.setting), f"{result.setting.learning_rate:g}", *cells, f"{size:.2f}", failed


def name_of(config: Config, result: Result) -> str:
    """Of its record."""
    name = f"{result.loss} {result.optimizer}"
    return f"{name} {result.setting.temperature}" if config.each else name


def record(result: Result) -> dict[str, Any]:
    """What is written of a result: what is needed to draw and to compare it again."""
    history = result.trained.history
    return {
        "setting": result.setting._asdict(),
        "validation": [
            {**setting._asdict(), "class_accuracy": 100 * scores}
            for setting, scores in result.validation.items()
        ],
        "diverged": divergences(result.trained),
        "class_accuracy": result.accuracy[-1],  # [seeds, classes]
        "accuracy": result.accuracy.mean(axis=2).T,  # [seeds, epochs]
        "mass": history["mass"].mean(axis=1),  # [epochs, groups]
    } | {name: x.T for name, x in history.items() if x.ndim == 2}  # scalars


def plot_temperature(panels: dict[str, list[Result]], out: pathlib.Path) -> None:
    """|λ| of every seed over the epochs."""

    def curve(result: Result) -> np.ndarray:
        lam = np.abs(result.trained.history["temperature"])
        return np.where(np.isfinite(lam), lam, np.nan)

    plots.by_panel(panels, curve, out / "temperature.png", y="|λ|", scale="log")
