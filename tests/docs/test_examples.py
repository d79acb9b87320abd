"""The examples run, and reach at a small size what they say of a large one."""

import re
import socket
import sys

import matplotlib.image
import pytest

from examples import data_parallel, language_model, linen_trainstate, long_tail, noisy_labels
from tests.support import commands

pytestmark = pytest.mark.usefixtures("users_promotion")


def numbers(printed):
    """Those of each line."""
    pattern = r"\d+\.?\d*(?:e-?\d+)?"
    return [[float(x) for x in re.findall(pattern, line)] for line in printed.splitlines()]


def start(*args):
    """data_parallel, as a process of two devices."""
    cpus = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    return commands.start("examples.data_parallel", *args, **cpus)


@pytest.fixture
def run(monkeypatch, capsys):
    """The numbers that an example prints, of each line."""

    def run(example, flags):
        monkeypatch.setattr(sys, "argv", ["example", *flags.split()])
        example.main()
        return numbers(capsys.readouterr().out)

    return run


@pytest.mark.slow
def test_noisy_labels(run, tmp_path):
    sgd, absgd, weights = run(
        noisy_labels, f"--steps 300 --seeds 2 --rate 0.1 --out {tmp_path / 'out' / 'picture.png'}"
    )
    assert absgd[0] > sgd[0] + 5
    right, wrong = weights
    assert right > 1.3
    assert wrong < 0.3
    assert matplotlib.image.imread(tmp_path / "out" / "picture.png").std() > 0.05


def test_long_tail(run):
    cross_entropy, sgd, absgd = run(long_tail, "--steps 100 --seeds 2")
    assert sgd[2] > cross_entropy[2] + 3  # the three rarest classes
    assert absgd[0] == pytest.approx(sgd[0], abs=3)
    assert absgd != sgd


def test_linen_trainstate(run):
    adamw, absgd = run(linen_trainstate, "--steps 600 --seeds 2")
    assert absgd[0] > adamw[0]


@pytest.mark.slow
def test_language_model(run, monkeypatch):
    monkeypatch.setattr(language_model, "WIDTH", 64)
    text = language_model.load()[::10]
    monkeypatch.setattr(language_model, "load", lambda: text)
    adam, attentive, intact, weights, areas = run(language_model, "--steps 80")
    assert max(*adam, *attentive, *intact) < 3.5  # of log 128 = 4.9 at first
    assert attentive != adam
    assert weights[1] < 1 < weights[0]  # of garbled and intact lines
    assert min(areas) > 0.55  # by chance 0.5


class TestDataParallel:
    @pytest.mark.slow
    def test_several_processes_are_one(self, run):
        """Two, of two devices each, print what one of eight devices does."""
        (devices, processes), *one = run(data_parallel, "--steps 20")
        assert (devices, processes) == (8, 1)
        (loss, lam), (accuracy,), (difference,) = one
        assert accuracy > 70
        assert 0 < difference < 1e-5  # other sums, but for rounding the same

        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        flags = f"--steps 20 --coordinator {address} --num-processes 2 --process-id"
        both = [start(*flags.split(), i) for i in range(2)]
        (first, _), (second, _) = ends = [process.communicate(timeout=300) for process in both]
        assert [process.returncode for process in both] == [0, 0], ends
        # JAX's collectives print, too, before it, from threads that mix up their lines.
        _, title, own = first.partition("devices")
        (devices, processes), *two = numbers(title + own)
        assert (devices, processes) == (4, 2)
        (loss_of_two, lam_of_two), (accuracy_of_two,), (difference_of_two,) = two
        assert loss_of_two == pytest.approx(loss, rel=1e-5)
        assert lam_of_two == pytest.approx(lam, rel=1e-5)
        assert accuracy_of_two == accuracy
        assert 0 < difference_of_two < 1e-5
        assert not re.search("devices|loss|λ|accuracy|difference", second)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--coordinator here:1", "here:1 needs --num-processes and --process-id: give all"),
            ("--coordinator here:1 --num-processes 2", "here:1 needs --process-id: give all three"),
            ("--process-id 1", "--process-id 1 needs --coordinator HOST:PORT, got None: give that"),
            ("--coordinator auto --num-processes 2", "needs --coordinator HOST:PORT, got auto"),
            ("--coordinator here --num-processes 2 --process-id 0", "of process 0, or auto, got"),
            ("--coordinator here:1 --num-processes 2 --process-id 2", "--process-id 2: count from"),
            ("--batch-size 100", "--batch-size must be a multiple of the 8 devices, got 100"),
            ("--steps 0", "--steps must be at least 1, got 0"),
        ],
    )
    def test_refuses(self, flags, message, run, capsys):
        with pytest.raises(SystemExit, match="2"):
            run(data_parallel, flags)
        assert message in capsys.readouterr().err

    def test_finds_no_cluster(self):
        _, error = start("--coordinator", "auto").communicate(timeout=300)
        assert "--coordinator auto finds no cluster: give HOST:PORT" in error
