"""The flags of the comparisons, their checks, and the folder that a run writes to."""

import argparse
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Collection
from typing import NamedTuple

import jax

from benchmarks import datasets, models, report, training
from benchmarks.datasets import Split

# The papers' protocol, and what suits a set of small images on a small machine.
PAPERS = {
    "model": "resnet32",
    "epochs": 200,
    "batch_size": 128,
    "hidden": [256, 128],
    "augment": True,
}
DIGITS = {"model": "mlp", "epochs": 60, "batch_size": 32, "hidden": [64], "augment": False}


class Stage(NamedTuple):
    """λ from a share of the epochs on; if it is infinite, that of an effective sample size."""

    start: float
    temperature: float
    ess: float = 1.0  # share of the batch

    def __str__(self) -> str:
        lam = f"{self.temperature:g}"
        if self.ess < 1:
            lam = f"ess{math.copysign(self.ess, self.temperature):g}"
        return f"{lam} from {self.start:g}" if self.start else lam


Stages = tuple[Stage, ...]


def is_automatic(stages: Stages) -> bool:
    return any(stage.ess < 1 for stage in stages)


def parse_stage(text: str) -> Stage:
    start, _, temperature = text.rpartition(":")
    if temperature.startswith("ess"):
        ess = float(temperature.removeprefix("ess"))
        stage = Stage(float(start or 0), math.copysign(math.inf, ess), abs(ess))
    else:
        stage = Stage(float(start or 0), float(temperature))
    if not (0 <= stage.start < 1 and abs(stage.temperature) > 0 and 0 < stage.ess <= 1):
        raise ValueError
    return stage


def parse_stages(text: str) -> Stages:
    """``"5"``, ``"0.8:5"``, ``"0.5:10,0.8:5"``, ``"ess-0.7"``: λ from a share of the epochs on."""
    try:
        stages = tuple(map(parse_stage, text.split(",")))
        starts = [stage.start for stage in stages]
        if starts != sorted(starts) or (len(stages) > 1 and is_automatic(stages)):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a λ other than 0, from a share of the epochs on, such as 5, 0.8:5 or "
            f"0.5:10,0.8:5, or one effective sample size, such as ess0.5 or 0.5:ess-0.7, got {text}"
        ) from None
    return stages


def make_parser(
    doc: str, losses: Collection[str], *, seeds: int, out: str
) -> argparse.ArgumentParser:
    parser = report.make_parser(doc, seeds=seeds, out=out)
    add = parser.add_argument
    add(
        "--methods",
        nargs="+",
        choices=losses,
        default=list(losses),
        metavar="LOSS",
        help=f"of {', '.join(losses)}",
    )
    add("--resume", action="store_true", help="go on with what --out holds")
    add("--dataset", choices=datasets.NAMES, default="digits", help="what to train on")
    add("--data-dir", type=pathlib.Path, help="folder with the files of the data set")
    add("--model", choices=models.NAMES, help="what to train")
    add(
        "--hidden",
        type=report.whole_number(1),
        nargs="+",
        metavar="WIDTH",
        help="hidden layers of the MLP",
    )
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="to compute in")
    add("--epochs", type=report.whole_number(1), help="passes over the data")
    add("--batch-size", type=report.whole_number(1), help="examples a step")
    add("--augment", action=argparse.BooleanOptionalAction, help="random crops and flips")
    add(
        "--learning-rates",
        type=report.positive,
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
        "epochs; 0.5:10,0.8:5 for several steps; ess0.5 for λ > 0 with an effective sample size of "
        "half the batch, and ess-0.5 for λ < 0",
    )
    add(
        "--second-stage",
        type=report.share,
        default=0.8,
        help="share of the epochs before class weights, truncation and fine-tuning set in",
    )
    add(
        "--fine-tune-from",
        type=report.whole_number(0),
        default=0,
        metavar="BLOCK",
        help="in the second stage, train this block and those above it alone",
    )
    add("--schedule", choices=["step", "cosine", "constant"], default="step", help="of the rate")
    add(
        "--milestones",
        type=report.share,
        nargs="*",
        default=[0.8, 0.9],
        metavar="SHARE",
        help="of the epochs, after which the rate falls",
    )
    add("--decay", type=report.not_negative, default=0.01, help="what it is multiplied by then")
    add("--warm-up", type=report.below_one, default=0.025, help="share of the epochs")
    add("--momentum", type=report.below_one, default=0.9, help="of SGD")
    add("--weight-decay", type=report.not_negative, default=2e-4, help="L2 coefficient")
    add(
        "--gamma",
        type=report.above_zero,
        default=0.9,
        help="weight of the newest batch in ABSGD's average",
    )
    add(
        "--search-seeds",
        type=report.whole_number(1),
        default=5,
        help="seeds of every setting of the search",
    )
    add(
        "--validation",
        type=report.number(float, lambda x: 0 < x < 1, "lie in (0, 1)"),
        default=0.2,
        help="share of the smallest class that the search holds out of every class",
    )
    add(
        "--at-once",
        type=report.whole_number(1),
        help="runs in one compiled program; if not given 1000, or 1 where there are convolutions, "
        "which are slow side by side",
    )
    add(
        "--checkpoint-every",
        type=report.not_negative,
        default=30.0,
        metavar="SECONDS",
        help="between checkpoints",
    )
    add("--devices", type=report.whole_number(1), help="to spread a batch over; all, if not given")
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, where several processes share the work and --out; or auto, "
        "where JAX knows the cluster",
    )
    add("--num-processes", type=report.whole_number(1), help="number of processes, if not auto")
    add("--process-id", type=report.whole_number(0), help="number of this one, from 0, if not auto")
    add("--tensorboard", action="store_true", help="write event files, too")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Split, Split]:
    """The checked arguments, and the two splits."""
    parser.set_defaults(**DIGITS)
    if parser.parse_known_args()[0].dataset != "digits":
        parser.set_defaults(**PAPERS)
    args = parser.parse_args()
    if args.coordinator not in (None, "auto"):
        if ":" not in args.coordinator:
            parser.error(f"--coordinator must be HOST:PORT or auto, got {args.coordinator}")
        if None in (args.num_processes, args.process_id):
            parser.error("--coordinator HOST:PORT needs --num-processes and --process-id")
        if args.process_id >= args.num_processes:
            parser.error(f"--process-id must be less than --num-processes, got {args.process_id}")
    if args.coordinator == "auto":
        jax.distributed.initialize()
    elif args.coordinator:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    if args.at_once is None:
        args.at_once = 1000 if args.model in ("linear", "mlp") else 1
    args.devices = args.devices or jax.device_count()
    blocks = {"linear": 0, "mlp": len(args.hidden), "cnn": 3, "resnet32": 4}[args.model]
    for flag, sound, remedy in (
        ("devices", args.devices <= jax.device_count(), f"lie in [1, {jax.device_count()}]"),
        ("batch_size", args.batch_size % args.devices == 0, "be a multiple of --devices"),
        ("fine_tune_from", args.fine_tune_from <= blocks, f"lie in [0, {blocks}]"),
    ):
        if not sound:
            value = getattr(args, flag)
            parser.error(f"--{flag.replace('_', '-')} must {remedy}, got {value}")
    try:
        train, test = datasets.load(args.dataset, args.data_dir)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    return args, train, test


class LogFile(logging.FileHandler):
    """One that raises what it meets, such as a full disk, where logging would print it."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def open_folder(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Empties ``args.out`` for a new run, or checks that it holds the one to go on with."""
    args.out.mkdir(parents=True, exist_ok=True)
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
            if (args.out / folder).exists():
                shutil.rmtree(args.out / folder)
        (args.out / "log.txt").unlink(missing_ok=True)
    elif earlier:
        before, now = earlier["arguments"], config["arguments"]
        free = {"resume", "coordinator"}
        changed = [k for k in now if k not in free and before.get(k) != now[k]]
        if changed:
            listed = ", ".join(f"{k} {before.get(k)}, now {now[k]}" for k in changed)
            parser.error(f"--resume needs the arguments of the run in {args.out}, got {listed}")
    report.save(path, config)
    handler = LogFile(args.out / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    training.log.addHandler(handler)
    training.log.setLevel(logging.INFO)
    training.log.propagate = False
