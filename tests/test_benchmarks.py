"""The benchmarks run, as a user runs them, and write what they say."""

import json
import pathlib
import re
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )


def test_longtail(tmp_path):
    out = tmp_path / "new" / "folder"
    # At the second rate nothing is learnt: the validation split must choose the first.
    options = (
        "--seeds 2 --epochs 6 --learning-rates 0.1 1e-6 --temperatures 20 --methods arb ldam_drw"
    )
    done = run("benchmarks.longtail", *options.split(), "--out", out)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout

    report = json.loads((out / "results.json").read_text())
    assert report["config"]["seeds"] == 2
    assert [(r["loss"], r["temperature"]) for r in report["results"]] == [
        ("arb", None),
        ("arb", 20),
        ("ldam_drw", None),
        ("ldam_drw", 20),
    ]
    for result in report["results"]:
        assert result["learning_rate"] == 0.1
        assert result["diverged"] == 0
        overall, rare = np.array(result["overall"]), np.array(result["rare"])
        assert overall.shape == rare.shape == (2, 6)
        assert overall[:, -1].mean() > 30
        np.testing.assert_allclose(result["rare_by_rate"][0], rare[:, -1])
        row = rf"{result['loss']} .*{overall[:, -1].mean():.1f} ± {overall[:, -1].std(ddof=1):.1f}"
        assert re.search(row, done.stdout)
    assert matplotlib.image.imread(out / "longtail.png").std() > 0.05


def test_convergence(tmp_path):
    options = "--temperatures -1.5 --batch-sizes 32 --steps 100 1000 --seeds 2"
    done = run("benchmarks.convergence", *options.split(), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(r["steps"], r["gamma"]) for r in results] == [
        (100, 1),
        (100, 0.1),
        (1000, 1),
        (1000, 0.1),
    ]
    gaps = [np.mean(r["gap"]) for r in results]
    assert max(gaps[2:]) < 3e-3 < 1e-2 < min(gaps[:2])
    assert matplotlib.image.imread(tmp_path / "convergence.png").std() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1"], "--seeds must be 2 or more for a spread, got 1"),
        (["--methods", "mse"], "invalid choice: 'mse'"),
    ],
)
def test_bad_flags(options, message):
    done = run("benchmarks.longtail", *options)
    assert done.returncode == 2
    assert message in done.stderr
