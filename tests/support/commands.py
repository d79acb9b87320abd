"""The benchmarks, started as a user starts them."""

import json
import os
import pathlib
import subprocess
import sys

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
