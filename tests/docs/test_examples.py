"""The examples run, and reach at a small size what they say of a large one."""

import re
import sys

import matplotlib.image
import pytest

from examples import data_parallel, language_model, linen_trainstate, long_tail, noisy_labels

pytestmark = pytest.mark.usefixtures("users_promotion")


@pytest.fixture
def run(monkeypatch, capsys):
    """The numbers that an example prints, of each line."""

    def run(example, flags):
        monkeypatch.setattr(sys, "argv", ["example", *flags.split()])
        example.main()
        lines = capsys.readouterr().out.splitlines()
        return [[float(x) for x in re.findall(r"\d+\.?\d*(?:e-?\d+)?", line)] for line in lines]

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


def test_data_parallel(run):
    devices, accuracy, difference = run(data_parallel, "--steps 20")
    assert devices == [8]
    assert accuracy[0] > 70
    assert 0 < difference[0] < 1e-5  # other sums, but for rounding the same
