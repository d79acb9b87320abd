"""What the benchmarks share: flags, tables in Markdown, and files that say what made them."""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import jax
import numpy as np


def make_parser(doc: str, *, seeds: int, out: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark; ``doc`` is the module's docstring."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=whole_number(2), default=seeds, help="number of seeds, 2 or more"
    )
    parser.add_argument("--out", type=pathlib.Path, default=out, help="folder to write to")
    return parser


def number(
    kind: Callable[[float], Any], sound: Callable[[float], bool], must: str
) -> Callable[[str], Any]:
    """The type of a flag whose number has to be sound; 1e6 is a whole number, too."""

    def parse(text: str) -> Any:
        try:
            x = float(text)
            if not sound(x):
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f"must {must}, got {text}") from None
        return kind(x)

    return parse


def whole_number(least: int) -> Callable[[str], int]:
    return number(int, lambda x: x >= least and x % 1 == 0, f"be a whole number from {least} on")


positive = number(float, lambda x: 0 < x < math.inf, "be positive and finite")
not_negative = number(float, lambda x: 0 <= x < math.inf, "be 0 or more and finite")
share = number(float, lambda x: 0 <= x <= 1, "lie in [0, 1]")
below_one = number(float, lambda x: 0 <= x < 1, "lie in [0, 1)")
above_zero = number(float, lambda x: 0 < x <= 1, "lie in (0, 1]")


def make_folder(parser: argparse.ArgumentParser, path: pathlib.Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(cannot_write(path, error))


def cannot_write(out: pathlib.Path, error: OSError) -> str:
    return (
        f"--out {out} can't be written to ({error}): make room there, see to its permissions, or "
        "name another folder"
    )


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_std(x: np.ndarray, digits: str) -> str:
    return f"{x.mean():{digits}} ± {x.std(ddof=1):{digits}}"


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The command, its arguments, and the machine and versions that it runs on."""
    packages = ("jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")
    return {
        "command": " ".join(["python", *(a for a in sys.orig_argv[1:] if a != "--resume")]),
        "arguments": jsonable(vars(args)),
        "machine": {
            "devices": [d.device_kind for d in jax.devices()],
            "cpus": len(os.sched_getaffinity(0)),
            "processor": platform.processor() or platform.machine(),
        },
        "versions": {"python": platform.python_version()}
        | {p: importlib.metadata.version(p) for p in packages},
    }


def jsonable(x: Any) -> Any:
    """Arrays become lists of rounded figures, and what JSON lacks becomes text or null."""
    if isinstance(x, dict):
        return {k: jsonable(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [jsonable(v) for v in x]
    if hasattr(x, "tolist"):
        return jsonable(x.tolist())
    if isinstance(x, float):
        return float(f"{x:.6g}") if np.isfinite(x) else None
    return x if isinstance(x, int | bool | str | None) else str(x)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when it is whole and on the disk, and not before."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave the new name to an empty file
    part.replace(path)


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """What was saved, if every byte of it is there."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return dict(arrays)  # which compares the checksums
    except (EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise SystemExit(
            f"{path} is damaged ({error}); delete it, and --resume does again what it held"
        ) from None


def save(path: pathlib.Path, content: dict[str, Any]) -> None:
    """JSON with an entry a line."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in jsonable(content).items()]
    with replacing(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def write(
    args: argparse.Namespace, results: dict[str, Any], rows: list[tuple[str, ...]], note: str = ""
) -> None:
    """Writes results.json, and table.md with the command that made it and a note below."""
    save(args.out / "results.json", results)
    write_table(args, markdown(rows), *([note] if note else []))


def write_table(args: argparse.Namespace, *parts: str) -> None:
    """Writes table.md: the command that made it, and below it the parts."""
    with replacing(args.out / "table.md") as file:
        file.write(("\n\n".join([f"`{describe(args)['command']}`", *parts]) + "\n").encode())
