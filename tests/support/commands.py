"""The benchmarks, started as a user starts them."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
CACHE = {
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
SMALL = "--model linear --seeds 2 --search-seeds 1 --batch-size 64"


def environment(**env):
    """That of a benchmark, in which a cache that the caller names goes first."""
    return CACHE | os.environ | env


def start(*args, **env):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, args)],
        cwd=ROOT,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args, **env):
    process = start(*args, **env)
    process.stdout_text, process.stderr_text = process.communicate()
    return process


def load(out, name="results"):
    return json.loads((out / f"{name}.json").read_text())


def rows(text):
    """The cells of its tables in Markdown, without their heads."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    rules = {i for i, row in enumerate(cells) if set(row[0]) == {"-"}}
    return [row for i, row in enumerate(cells) if not {i, i + 1} & rules]


def mean_std(x, digits=1):
    return f"{np.mean(x):.{digits}f} ± {np.std(x, ddof=1):.{digits}f}"


def difference(x, y):
    """Of pairs, with its standard error; nothing of what is compared with itself."""
    gain = np.subtract(x, y)
    error = gain.std(ddof=1) / len(gain) ** 0.5
    return "" if x is y else f"{gain.mean():+.1f} ± {error:.1f}"
