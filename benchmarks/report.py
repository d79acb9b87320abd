"""What the benchmarks share: flags, a table in Markdown, a JSON with what it was made from."""

import argparse
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import numpy as np


def make_parser(doc: str, *, seeds: int, out: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark; ``doc`` is the module's docstring."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds, 2 or more")
    parser.add_argument("--out", type=pathlib.Path, default=out, help="folder to write to")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The checked arguments; the output folder exists."""
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be 2 or more for a spread, got {args.seeds}")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_std(x: np.ndarray, digits: str) -> str:
    return f"{x.mean():{digits}} ± {x.std(ddof=1):{digits}}"


def save(path: pathlib.Path, args: argparse.Namespace, results: Any) -> None:
    versions = {p: importlib.metadata.version(p) for p in ("jax", "optax", "flax", "scikit-learn")}
    report = {
        "config": vars(args),
        "versions": {"python": platform.python_version(), **versions},
        "results": results,
    }

    def encode(x: Any) -> Any:
        return x.tolist() if hasattr(x, "tolist") else str(x)

    path.write_text(json.dumps(report, indent=1, default=encode))
