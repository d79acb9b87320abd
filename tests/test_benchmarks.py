"""The benchmarks run, as a user runs them, and write what they say."""

import json
import pathlib
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
    options = "--seeds 2 --epochs 6 --learning-rates 0.1 1e-6 --temperatures 1 --out"
    done = run("benchmarks.longtail", *options.split(), out)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout

    report = json.loads((out / "results.json").read_text())
    assert list(report["results"]) == ["SGD", "ABSGD, λ = 1", "ABSGD, λ = 1, two-stage"]
    assert report["config"]["seeds"] == 2
    for name, result in report["results"].items():
        assert f"| {name} " in done.stdout
        assert np.shape(result["overall"]) == np.shape(result["rare"]) == (2, 6)
        assert result["learning_rate"] == 0.1
        assert np.mean(result["overall"], axis=0)[-1] > 50
    # The first half of two-stage training is plain SGD.
    sgd, _, two_stage = (np.array(r["overall"]) for r in report["results"].values())
    np.testing.assert_allclose(two_stage[:, :3], sgd[:, :3], atol=0.5)
    assert not np.allclose(two_stage[:, 3:], sgd[:, 3:], atol=0.5)
    assert matplotlib.image.imread(out / "longtail.png").std() > 0.05


@pytest.mark.parametrize(
    ("options", "message"), [(["--seeds", "1"], "--seeds must be 2 or more for a spread, got 1")]
)
def test_bad_flags(options, message):
    done = run("benchmarks.longtail", *options)
    assert done.returncode == 2
    assert message in done.stderr
