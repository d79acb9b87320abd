"""What every benchmark writes: a table in Markdown, and a JSON with what it was made from."""

import argparse
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import numpy as np


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
