"""What the benchmarks write: tables in Markdown, and files that say what made them."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import filelock
import jax
import numpy as np

from benchmarks.engine.config import Config, fail

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")
DESCRIBED = {"command", "arguments", "machine", "versions"}  # by every config.json of ours
# Arguments that the results don't depend on.
FREE = {"out", "resume", "checkpoint_every"}


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_std(x: np.ndarray, digits: str) -> str:
    return f"{x.mean():{digits}} ± {x.std(ddof=1):{digits}}"


def difference(x: np.ndarray, y: np.ndarray, digits: str = ".1f") -> str:
    """Of pairs: the mean ± its standard error."""
    error = np.std(x - y, ddof=1) / len(x) ** 0.5
    return f"{np.mean(x - y):+{digits}} ± {error:{digits}}"


def against(x: np.ndarray, *others: np.ndarray) -> list[str]:
    """Mean and standard deviation, and the difference from each of the others that is not ``x``."""
    return [mean_std(x, ".1f"), *("" if y is x else difference(x, y) for y in others)]


def share(which: np.ndarray) -> str:
    """How many of how many."""
    return f"{which.sum()} of {len(which)}"


def stack(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {k: np.stack([record[k] for record in records]) for k in records[0]}


def cpus() -> int:
    """Those that this process may use; on macOS and Windows those that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command() -> str:
    """The one that started this program, for a shell."""
    return shlex.join(["python", *(a for a in sys.orig_argv[1:] if a != "--resume")])


def describe(config: Config) -> dict[str, Any]:
    """The command, what it was read as, and the machine and versions that it runs on."""
    return {
        "started": datetime.datetime.now().astimezone().isoformat(),
        "command": command(),
        "arguments": jsonable(dataclasses.asdict(config)),
        "machine": {
            "devices": [d.device_kind for d in jax.devices()],
            "cpus": cpus(),
            "processor": platform.processor() or platform.machine(),
        },
        "versions": {"python": platform.python_version()}
        | {p: importlib.metadata.version(p) for p in PACKAGES},
    }


@contextlib.contextmanager
def folder(config: Config) -> Iterator[dict[str, Any]]:
    """Holds ``config.out``, and gives what its config.json says of this run.

    A run may take a folder that is new or empty, or one with a run that has ended; what is in it is
    replaced by name, and nothing else is touched. With --resume it goes on with the run there.
    """
    resume = getattr(config, "resume", None)  # a benchmark that is over soon has no such flag
    path, lock = config.out / "config.json", filelock.FileLock(config.out / ".lock")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        earlier_run(path)  # before anything is written, a lock included
        lock.acquire(blocking=False)
        description = begin(path, describe(config), resume=bool(resume))
        save(path, description)
    except filelock.Timeout:
        fail(f"--out {config.out} is in use by another process: wait for it, or name another")
    except OSError as error:
        fail(cannot_write(config.out, error))
    try:
        yield description
        save(path, description | {"finished": True})
    except OSError as error:
        remedy = "" if resume is None else "; --resume goes on from the last checkpoint"
        raise SystemExit(f"\n{cannot_write(config.out, error)}{remedy}") from None
    finally:
        lock.release()


def begin(path: pathlib.Path, description: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """The description of the run that is to begin or to go on, or an error."""
    out, earlier = path.parent, earlier_run(path)
    if not earlier:
        return description | {"finished": False}
    before = earlier["arguments"]
    if not resume:
        if not earlier.get("finished", True) and "resume" in before:
            fail(
                f"--out {out} holds a run that was not finished: add --resume to go on with it, or "
                "name another folder"
            )
        return description | {"finished": False}
    now = description["arguments"]
    # A data set of a name is the same wherever its files are; idx may be any.
    free = FREE | ({"data_dir"} if now.get("dataset") != "idx" else set())
    if changed := [k for k in now if k not in free and before.get(k) != now[k]]:
        listed = ", ".join(f"{k} {before.get(k)}, now {now[k]}" for k in changed)
        fail(f"--resume needs the arguments of the run in {out}, got {listed}")
    started = earlier.get("started") or description["started"]  # which the first ones don't say
    return description | {"started": started, "finished": False}


def earlier_run(path: pathlib.Path) -> dict[str, Any]:
    """What config.json says of the run in a folder, if there is one; an error if it isn't ours."""
    out = path.parent
    if not path.exists():
        # A start that was cut off leaves the lock, which is empty, and then a part of the other.
        found, lock = {p.name for p in out.iterdir()}, out / ".lock"
        ours = found <= {lock.name, "config.json.part"} and lock.exists()
        if found and not (ours and lock.stat().st_size == 0):
            fail(f"--out {out} holds files and no run of a benchmark: name another folder")
        return {}
    with contextlib.suppress(ValueError):
        earlier = json.loads(path.read_bytes())
        whole = isinstance(earlier, dict) and earlier.keys() >= DESCRIBED
        if whole and isinstance(earlier["arguments"], dict):
            return earlier
    fail(f"{path} is damaged, or not a benchmark's: name another --out")


def cannot_write(out: pathlib.Path, error: OSError) -> str:
    return (
        f"--out {out} can't be written to ({error}): make room there, see to its permissions, or "
        "name another folder"
    )


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
    except OSError:
        raise
    except Exception as error:  # of what kind depends on where the file is hit
        raise SystemExit(
            f"{path} is damaged ({error}); delete it, and --resume does again what it held"
        ) from None


def load_part(path: pathlib.Path, started: str) -> dict[str, np.ndarray]:
    """What ``save_part`` left there, if it was of the run that was started then."""
    found = load_arrays(path) if path.exists() else {}
    return found if str(found.pop("of", "")) == f"{path.name} {started}" else {}


def save_part(path: pathlib.Path, started: str, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        np.savez(file, of=f"{path.name} {started}", **arrays)


def save(path: pathlib.Path, content: dict[str, Any]) -> None:
    """JSON with an entry a line."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in jsonable(content).items()]
    with replacing(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def write(out: pathlib.Path, results: dict[str, Any], *parts: str) -> None:
    """Writes results.json, and table.md: the command that made it, and below it the parts."""
    save(out / "results.json", results)
    with replacing(out / "table.md") as file:
        text = "\n\n".join([f"`{command()}`", *parts]) + "\n"
        file.write(text.encode(errors="backslashreplace"))  # of a folder that isn't UTF-8
