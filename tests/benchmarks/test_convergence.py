"""The gap to the exact optimum closes, and what has none is said."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from benchmarks import convergence
from tests.support.commands import rows


def some_digits(return_X_y):
    """So many that they are learnt, and so few that their Hessian costs little."""
    images, labels = load_digits(return_X_y=return_X_y)
    return images[:200, 3::4], labels[:200]


@pytest.fixture
def run(start, monkeypatch, x64, users_promotion):
    monkeypatch.setattr(convergence, "load_digits", some_digits)

    def run(options):
        results, table, printed = start(convergence, f"--batch-sizes 32 --seeds 2 {options}")
        assert printed.strip() in table
        return list(results.values()), rows(table)

    return run


def test_gap_closes(run):
    results, table = run("--temperatures -1.5 --steps 100 1000")
    setting = [(r["steps"], r["gamma"]) for r in results]
    assert setting == [(100, 1), (100, 0.1), (1000, 1), (1000, 0.1)]
    gaps = [np.mean(r["gap"]) for r in results]
    assert max(gaps[2:]) < 3e-3 < 1e-2 < min(gaps[:2])
    assert [row[-1] for row in table] == 4 * ["0 of 2"]


def test_proximal_average(run):
    """With a large step there is no average; and a smaller one is another."""
    results, table = run("--temperatures 0.5 --steps 100 --proximal 1e9 0.1")
    assert [row[3] for row in table] == ["1", "0.1", "a = 1e+09", "a = 0.1"]
    gaps = [r["gap"] for r in results]
    np.testing.assert_allclose(gaps[2], gaps[0], rtol=1e-5)
    assert not np.allclose(gaps[3], gaps[1], rtol=0.1)


def test_diverged(run, monkeypatch):
    """Far away is, as is NaN, of which the plot has nothing to draw; the start is not."""
    ends = {10: 0.0, 20: 1e70, 30: np.nan}

    def train(config, n, steps, data, temperature, gamma, key):
        return jnp.full(data[0].shape[1] * convergence.CLASSES, ends[steps])

    monkeypatch.setattr(convergence, "train", train)
    results, table = run("--temperatures 1 --steps 10 20 30")
    assert [r["diverged"] for r in results] == [0, 0, 2, 2, 2, 2]
    assert [row[-1] for row in table[-2:]] == 2 * ["2 of 2"]
    results, _ = run("--temperatures 1 --steps 30")
    assert [r["gap"] for r in results] == 2 * [[None, None]]


@pytest.mark.usefixtures("users_promotion", "x64")
class TestStationaryPoint:
    @pytest.fixture
    def data(self, x64):
        images, labels = some_digits(return_X_y=True)
        return jnp.asarray(images / 16), jnp.asarray(labels)

    @pytest.mark.parametrize("temperature", [0.5, -1.5, 0.01, -0.01])
    def test_found(self, data, temperature):
        """No direction leads down from it."""
        w = convergence.stationary_point(temperature, 1e-2, data)
        assert np.abs(w).max() > 0.1
        curvature = np.linalg.eigvalsh(convergence.hessian(w, temperature, 1e-2, data))
        assert np.abs(convergence.gradient(w, temperature, 1e-2, data)).max() < 1e-12
        assert curvature.min() > 1e-3

    def test_not_found(self, data, capsys):
        with pytest.raises(SystemExit, match="2"):
            convergence.stationary_point(0.01, 1e-300, data)
        error = capsys.readouterr().err
        assert "--temperatures 0.01 can't be solved" in error
        assert "--weight-decay 1e-300: name a λ further from 0" in error

    def test_no_solution_writes_nothing(self, start, tmp_path, monkeypatch):
        monkeypatch.setattr(convergence, "stationary_point", lambda *_: sys.exit(2))
        with pytest.raises(SystemExit, match="2"):
            start(convergence, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
