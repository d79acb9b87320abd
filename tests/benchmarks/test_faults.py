"""Whatever happens to a run, it goes on to the results of the run that nothing happened to."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.support.commands import environment, load, ROOT, SMALL

pytestmark = pytest.mark.slow

# SGD and ABSGD in programs of two runs, one each for the search and two for the seeds.
OPTIONS = f"{SMALL} --epochs 4 --learning-rates 0.1 0.03 --temperatures 0.5:ess0.5 --seeds 4"
OPTIONS += " --at-once 2 --methods balanced_softmax --checkpoint-every 0"
EPOCHS = 4 * 2 * 3
SEED = 0
KILLS = 12


class Trainer:
    """The runs, each in a process of its own, one after the other."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked"],
            cwd=ROOT,
            env=environment(OPENBLAS_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def start(self, out, *more, resume=True, limit=None):
        more = [*more, *["--resume"] * resume]
        line = json.dumps([limit, *OPTIONS.split(), *more, "--out", str(out)])
        self.server.stdin.write(line.encode() + b"\n")
        self.pid = int(self.server.stdout.readline())

    def ends_within(self, seconds):
        """Waits no longer than that; for as long as it takes, if ``None``."""
        return bool(select.select([self.server.stdout], [], [], seconds)[0])

    def end(self):
        """Exit code, and what was printed."""
        return json.loads(self.server.stdout.readline())

    def run(self, *args, **kwargs):
        self.start(*args, **kwargs)
        return self.end()


@pytest.fixture(scope="module")
def trainer():
    trainer = Trainer()
    with trainer.server:
        yield trainer
        trainer.server.stdin.close()


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """The folder of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole")
    code, error = trainer.run(out)
    assert code == 0, error
    return out


def log(out):
    path = out / "log.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(" ", 2)[2] for line in lines]  # after date and time


@pytest.fixture
def stopped(trainer, tmp_path):
    """The folder of a run that was interrupted in its first part."""
    trainer.start(tmp_path)
    while len(log(tmp_path)) < 2:
        assert not trainer.ends_within(0.01)
    os.kill(trainer.pid, signal.SIGINT)
    assert trainer.end()[0] == 130
    return tmp_path


def checkpoint(out):
    """The one of the part that was cut off, and what it holds."""
    (path,) = out.glob("runs/*.checkpoint")
    return path, path.read_bytes()


def check(out, whole, cuts, told=None):
    """What a run wrote that was cut off so many times."""
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes(), told
    assert load(out, "config")["finished"]
    assert not [*out.rglob("*.checkpoint"), *out.rglob("*.part")]
    # Nothing was trained twice but for the epochs that were cut off, and these to the same end.
    assert len(log(whole)) == EPOCHS
    assert sorted(set(log(out))) == sorted(log(whole))
    assert len(log(out)) <= EPOCHS + cuts


def test_killed(trainer, whole, tmp_path):
    """At random moments of a run's life, from its first breath to the last file it writes."""
    start = time.monotonic()
    assert trainer.run(tmp_path / "timed")[0] == 0
    life = time.monotonic() - start

    rng, kills, out = np.random.default_rng(SEED), [], tmp_path / "0"
    cuts = 0  # of the run in this folder
    while len(kills) < KILLS or cuts:
        trainer.start(out)
        moment = rng.uniform(0, life) if len(kills) < KILLS else None
        if not trainer.ends_within(moment):
            with contextlib.suppress(ProcessLookupError):  # it may end this very moment
                os.kill(trainer.pid, signal.SIGKILL)
            kills.append((out.name, round(moment, 3)))
            cuts += 1
        code, error = trainer.end()
        told = f"seed {SEED}, folder and second of the kills: {kills}\n{error}"
        assert code in (0, -signal.SIGKILL), told
        if code == 0:
            check(out, whole, cuts, told)
            out, cuts = tmp_path / str(len(kills)), 0


def test_interrupted(trainer, whole, tmp_path):
    out = tmp_path / "new" / "folder"
    trainer.start(out)
    while len(log(out)) < 9:
        assert not trainer.ends_within(0.01)
    os.kill(trainer.pid, signal.SIGINT)
    code, error = trainer.end()
    assert code == 130
    assert f"{out} has the results so far, and --resume goes on" in error
    assert "Traceback" not in error
    assert not load(out, "config")["finished"]

    code, error = trainer.run(out, resume=False)
    assert code == 2
    assert "add --resume" in error

    # It goes on in another place, and with another time between checkpoints.
    moved = out.rename(tmp_path / "moved")
    assert trainer.run(moved, "--checkpoint-every", "30")[0] == 0
    check(moved, whole, 0)


def test_damaged(trainer, whole, stopped):
    path, content = checkpoint(stopped)
    saved = int(np.load(path)["epochs"])
    path.write_bytes(content[: len(content) // 2])
    code, error = trainer.run(stopped)
    assert code == 1
    assert f"{path} is damaged" in error
    assert "delete it, and --resume does again what it held" in error
    assert "Traceback" not in error
    path.unlink()
    assert trainer.run(stopped)[0] == 0
    check(stopped, whole, saved)


def test_full_disk(trainer, whole, stopped):
    """However far the room goes: to nothing, half a checkpoint, or all but the pictures."""
    before = checkpoint(stopped)
    for limit, code in ((100, 2), (3_000, 1), (3_000, 1), (22_500, 1)):
        found, error = trainer.run(stopped, limit=limit)
        assert found == code, error
        assert f"--out {stopped} can't be written to (" in error
        assert "File too large" in error
        assert "make room there" in error
        assert ("--resume goes on from the last checkpoint" in error) == (code == 1)
        if limit <= 3_000:
            assert checkpoint(stopped) == before
    assert trainer.run(stopped)[0] == 0
    check(stopped, whole, 2)
