"""Losses side by side, each with SGD and with ABSGD, as chosen on a validation split."""

import argparse
import contextlib
import json
import logging
import math
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from tqdm import tqdm

from absgd_jax.data import class_counts
from benchmarks import datasets, models, report, training
from benchmarks.datasets import Split
from benchmarks.training import Examples, History, Images, Run, Task, Trained

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from jax.experimental.multihost_utils import sync_global_devices
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

SEARCH_SEED = 1000  # the first seed of the search; those that are reported start from 0

# The papers' protocol, and what suits a set of small images on a small machine.
PAPERS = {
    "model": "resnet32",
    "epochs": 200,
    "batch_size": 128,
    "hidden": [256, 128],
    "augment": True,
    "at_once": 1,
}
DIGITS = {
    "model": "mlp",
    "epochs": 60,
    "batch_size": 32,
    "hidden": [64],
    "augment": False,
    "at_once": 1000,
}

Stages = tuple[tuple[float, float], ...]


def parse_stages(text: str) -> Stages:
    """``"5"``, or ``"0.8:5"``, or ``"0.5:10,0.8:5"``: (share of the epochs, λ from there on)."""
    try:
        parts = [part.rpartition(":") for part in text.split(",")]
        stages = tuple((float(start or 0), float(temperature)) for start, _, temperature in parts)
        starts = [start for start, _ in stages]
        if starts != sorted(starts) or not 0 <= starts[0] <= starts[-1] < 1:
            raise ValueError
        if any(temperature == 0 or math.isnan(temperature) for _, temperature in stages):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a λ other than 0, from a share of the epochs on, such as 5, 0.8:5 or "
            f"0.5:10,0.8:5, got {text}"
        ) from None
    return stages


class Setting(NamedTuple):
    """What a search chooses; no stages, or an infinite λ, is plain SGD."""

    stages: Stages
    learning_rate: float

    def __str__(self) -> str:
        shown = ", ".join(f"{t:g} from {s:g}" if s else f"{t:g}" for s, t in self.stages)
        return shown or "∞"


class Result(NamedTuple):
    """A loss in the setting that the validation split chose, trained with every seed."""

    loss: str
    setting: Setting
    validation: dict[Setting, np.ndarray]  # class accuracies of what it was chosen from
    trained: Trained  # runs are seeds

    @property
    def optimizer(self) -> str:
        return "ABSGD" if self.setting.stages else "SGD"

    @property
    def accuracy(self) -> np.ndarray:
        """In percent, [epochs, seeds, classes]."""
        return 100 * self.trained.history.accuracy

    @property
    def diverged(self) -> int:
        """Runs whose loss is not finite, or whose accuracy is below twice a guess's."""
        accuracy = self.trained.history.accuracy
        finite = np.isfinite(self.trained.history.loss).all(axis=0)
        return int(np.sum(~finite | (accuracy[-1].mean(axis=-1) < 2 / accuracy.shape[-1])))


class Source(NamedTuple):
    """Where the runs get their data from."""

    images: Images
    classes: int
    groups: int
    # Of (seed, search): what a run trains on and is evaluated on. Every seed has as many examples
    # of each class.
    examples: Callable[[int, bool], tuple[Examples, Examples]]


def make_parser(doc: str, *, seeds: int, out: str) -> argparse.ArgumentParser:
    parser = report.make_parser(doc, seeds=seeds, out=out)
    add = parser.add_argument
    add("--resume", action="store_true", help="go on with what --out holds")
    add("--dataset", choices=datasets.NAMES, default="digits", help="what to train on")
    add("--data-dir", type=pathlib.Path, help="folder with the files of the data set")
    add("--model", choices=models.NAMES, help="what to train")
    add("--hidden", type=int, nargs="+", metavar="WIDTH", help="hidden layers of the MLP")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="to compute in")
    add("--epochs", type=int, help="passes over the data")
    add("--batch-size", type=int, help="examples a step")
    add("--augment", action=argparse.BooleanOptionalAction, help="random crops and flips")
    add(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[0.01, 0.03, 0.1, 0.3],
        metavar="RATE",
        help="peaks to choose from",
    )
    add(
        "--temperatures",
        type=parse_stages,
        nargs="+",
        metavar="LAMBDA",
        default=[parse_stages(text) for text in ("0.5", "2", "5", "0.5:0.5", "0.5:2", "0.5:5")],
        help="to choose from: 5 for λ = 5 from the start; 0.8:5 for plain SGD before 0.8 of the "
        "epochs; 0.5:10,0.8:5 for several steps",
    )
    add(
        "--second-stage",
        type=float,
        default=0.8,
        help="share of the epochs before class weights, truncation and fine-tuning set in",
    )
    add(
        "--fine-tune-from",
        type=int,
        default=0,
        metavar="BLOCK",
        help="in the second stage, train this block and those above it alone",
    )
    add("--schedule", choices=["step", "cosine", "constant"], default="step", help="of the rate")
    add(
        "--milestones",
        type=float,
        nargs="*",
        default=[0.8, 0.9],
        metavar="SHARE",
        help="of the epochs, after which the rate falls",
    )
    add("--decay", type=float, default=0.01, help="what it is multiplied by then")
    add("--warm-up", type=float, default=0.025, help="share of the epochs")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=2e-4, help="L2 coefficient")
    add("--gamma", type=float, default=0.9, help="weight of the newest batch in ABSGD's average")
    add("--search-seeds", type=int, default=5, help="seeds of every setting of the search")
    add(
        "--validation",
        type=float,
        default=0.2,
        help="share of the smallest class that the search holds out of every class",
    )
    add("--at-once", type=int, help="runs in one compiled program")
    add(
        "--checkpoint-every",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="between checkpoints",
    )
    add("--devices", type=int, help="to spread a batch over; all, if not given")
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, where several processes share the work and --out; or auto, "
        "where JAX knows the cluster",
    )
    add("--num-processes", type=int, help="number of processes, if not auto")
    add("--process-id", type=int, help="number of this one, from 0, if not auto")
    add("--tensorboard", action="store_true", help="write event files, too")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Split, Split]:
    """The checked arguments, and the two splits."""
    parser.set_defaults(**DIGITS)
    if parser.parse_known_args()[0].dataset != "digits":
        parser.set_defaults(**PAPERS)
    args = report.parse(parser)
    if args.coordinator == "auto":
        jax.distributed.initialize()
    elif args.coordinator:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    args.devices = args.devices or jax.device_count()
    blocks = {"linear": 0, "mlp": len(args.hidden), "cnn": 3, "resnet32": 4}[args.model]
    for flag, sound, remedy in (
        ("epochs", args.epochs >= 1, "be positive"),
        ("batch_size", args.batch_size >= 1, "be positive"),
        ("search_seeds", args.search_seeds >= 1, "be positive"),
        ("at_once", args.at_once >= 1, "be positive"),
        ("devices", 1 <= args.devices <= jax.device_count(), f"lie in [1, {jax.device_count()}]"),
        ("batch_size", args.batch_size % args.devices == 0, "be a multiple of --devices"),
        ("learning_rates", min(args.learning_rates) > 0, "be positive"),
        ("gamma", 0 < args.gamma <= 1, "lie in (0, 1]"),
        ("validation", 0 < args.validation < 1, "lie in (0, 1)"),
        ("second_stage", 0 <= args.second_stage <= 1, "lie in [0, 1]"),
        ("warm_up", 0 <= args.warm_up < 1, "lie in [0, 1)"),
        ("fine_tune_from", 0 <= args.fine_tune_from <= blocks, f"lie in [0, {blocks}]"),
    ):
        if not sound:
            value = getattr(args, flag)
            parser.error(f"--{flag.replace('_', '-')} must {remedy}, got {value}")
    try:
        train, test = datasets.load(args.dataset, args.data_dir)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    return args, train, test


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
        open_folder(parser, args)
    sync_global_devices("the folder is ready")


def open_folder(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Empties ``args.out`` for a new run, or checks that it holds the one to go on with."""
    path = args.out / "config.json"
    config = report.describe(args) | {"finished": False}
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if not args.resume:
        if not earlier.get("finished", True):
            parser.error(
                f"--out {args.out} holds a run that was not finished: add --resume to go on with "
                "it, or name another folder"
            )
        for folder in ("runs", "checkpoints", "tensorboard"):
            shutil.rmtree(args.out / folder, ignore_errors=True)
        (args.out / "log.txt").unlink(missing_ok=True)
    elif earlier:
        before, now = earlier["arguments"], config["arguments"]
        free = {"resume", "coordinator"}
        changed = [k for k in now if k not in free and before.get(k) != now[k]]
        if changed:
            listed = ", ".join(f"{k} {before.get(k)}, now {now[k]}" for k in changed)
            parser.error(f"--resume needs the arguments of the run in {args.out}, got {listed}")
    report.save(path, config)
    handler = logging.FileHandler(args.out / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    training.log.addHandler(handler)
    training.log.setLevel(logging.INFO)
    training.log.propagate = False


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
    """The loss with SGD and with ABSGD, each as the validation split chose.

    ``loss`` is a function of logits, labels, class counts and whether the second stage has begun;
    ``choose`` takes the class accuracies of every setting.
    """

    def fit(phase: str, settings: list[Setting], seeds: range) -> list[Trained]:
        examples = [source.examples(seed, phase == "search") for seed in seeds]
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
        trained = training.train(args, f"{name}-{phase}", task, runs, bar)
        rows = [slice(i * len(seeds), (i + 1) * len(seeds)) for i in range(len(settings))]
        return [
            Trained(History(*(x[:, r] for x in trained.history)), trained.losses[r]) for r in rows
        ]

    grids = search_grids(args)
    if any(len(grid) > 1 for grid in grids):
        seeds = range(SEARCH_SEED, SEARCH_SEED + args.search_seeds)
        searched = fit("search", [setting for grid in grids for setting in grid], seeds)
        scores = iter([t.history.accuracy[-1].mean(axis=0) for t in searched])
        grids = [{setting: next(scores) for setting in grid} for grid in grids]
    else:
        grids = [dict.fromkeys(grid, np.full(source.classes, np.nan)) for grid in grids]
    chosen = [choose(grid) if len(grid) > 1 else next(iter(grid)) for grid in grids]
    final = fit("final", chosen, range(args.seeds))
    return [Result(name, *parts) for parts in zip(chosen, grids, final, strict=True)]


def on_device(args: argparse.Namespace, train: Split, test: Split) -> Images:
    """The images of both splits, those of the training split first."""
    pixels = np.concatenate([train.images, test.images])
    if args.model == "resnet32":
        missing = [max(32 - size, 0) for size in pixels.shape[1:3]]
        margins = [(n // 2, n - n // 2) for n in missing]
        pixels = np.pad(pixels, [(0, 0), *margins, (0, 0)])
    mean, std = (np.float32(f(train.images, axis=(0, 1, 2))) for f in (np.mean, np.std))
    return jax.tree.map(jnp.asarray, Images(pixels, mean, std))


@contextlib.contextmanager
def progress(args: argparse.Namespace, comparisons: int) -> Iterator[tqdm]:
    """A bar over the epochs of all comparisons; afterwards the run is marked as finished."""
    sgd, absgd = map(len, search_grids(args))
    sizes = [2 * args.seeds]
    if max(sgd, absgd) > 1:
        sizes.append((sgd + absgd) * args.search_seeds)
    epochs = args.epochs * sum(math.ceil(size / args.at_once) for size in sizes)
    try:
        total, hidden = comparisons * epochs, jax.process_index() > 0
        with tqdm(total=total, unit="epoch", disable=hidden) as bar:
            yield bar
    except KeyboardInterrupt:
        print(
            f"\nstopped; {args.out} has the results so far, and --resume goes on", file=sys.stderr
        )
        raise SystemExit(130) from None
    if jax.process_index() == 0:
        path = args.out / "config.json"
        report.save(path, json.loads(path.read_text()) | {"finished": True})
        print((args.out / "table.md").read_text())


def search_grids(args: argparse.Namespace) -> list[list[Setting]]:
    """The settings of SGD, and those of ABSGD."""
    return [
        [Setting(stages, rate) for stages in grid for rate in args.learning_rates]
        for grid in ([()], args.temperatures)
    ]


def make_run(
    args: argparse.Namespace, setting: Setting, seed: int, train: Examples, evaluation: Examples
) -> Run:
    # All runs of a program have as many stages: an infinite λ from the start changes nothing.
    padding = max(map(len, args.temperatures)) - len(setting.stages)
    starts, temperatures = zip(*[(0.0, np.inf)] * padding, *setting.stages, strict=True)
    return Run(
        seed=np.int32(seed),
        learning_rate=np.float32(setting.learning_rate),
        temperatures=np.float32(temperatures),
        starts=np.int32([round(s * args.epochs) for s in starts]),
        train=train,
        evaluation=evaluation,
    )


def row(result: Result, columns: list[np.ndarray]) -> tuple[str, ...]:
    """The setting, the columns as mean ± standard deviation, effective size and divergences."""
    return (
        str(result.setting),
        f"{result.setting.learning_rate:g}",
        *(report.mean_std(column, ".1f") for column in columns),
        f"{result.trained.history.effective_size[-1].mean():.2f}",
        f"{result.diverged} of {result.accuracy.shape[1]}",
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
        "diverged": result.diverged,
        "class_accuracy": result.accuracy[-1],  # [seeds, classes]
        "accuracy": result.accuracy.mean(axis=2).T,  # [seeds, epochs]
        "training_loss": history.loss.T,
        "effective_size": history.effective_size.T,
        "mass": history.mass.mean(axis=1),  # [epochs, groups]
    }


def plot(
    panels: dict[str, list[Result]],
    draw: Callable[[Axes, Result, dict[str, Any]], None],
    path: pathlib.Path,
    *,
    x: str,
    y: str,
    colors: dict[str, str],
) -> None:
    """One panel a loss, in which ``draw`` draws SGD in dashes and ABSGD in full."""
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
    styles = {"SGD": {"ls": "--", "lw": 1.0}, "ABSGD": {"ls": "-", "lw": 1.8}}
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, results) in zip(grid.flat, panels.items(), strict=False):
        for result in results:
            draw(axes, result, styles[result.optimizer])
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    lines = [Line2D([], [], color="black", label=name, **style) for name, style in styles.items()]
    lines += [Line2D([], [], color=color, lw=4, label=name) for name, color in colors.items()]
    figure.legend(handles=lines, loc="outside right upper", frameon=False)
    figure.supxlabel(x, fontsize="medium")
    figure.supylabel(y, fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)
