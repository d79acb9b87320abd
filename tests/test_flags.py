"""Every flag of every benchmark: what it can't be is an error that says so, and writes nothing."""

import os
import re
import sys
from unittest import mock

import pytest

from benchmarks import convergence, longtail, noise, pod, speed, sweep, toy

# What a number must do, and some that don't.
BAD = {
    "be a whole number from 0 on": ["-1", "0.5", "nan", "inf", "many"],
    "be a whole number from 1 on": ["0", "2.5", "nan", "inf", "many"],
    "be a whole number from 2 on": ["1", "2.5", "nan", "inf", "many"],
    "be positive and finite": ["0", "-1", "nan", "inf", "much"],
    "be 0 or more and finite": ["-1", "nan", "inf", "much"],
    "be a finite λ other than 0": ["0", "-0.0", "nan", "inf", "hot"],
    "lie in [0, 1]": ["-0.1", "1.1", "nan", "half"],
    "lie in [0, 1)": ["-0.1", "1", "nan", "half"],
    "lie in (0, 1]": ["0", "1.1", "nan", "half"],
    "lie in (0, 1)": ["0", "1", "nan", "half"],
}
SEEDS = {"--seeds": "be a whole number from 2 on"}
FROM_1 = "be a whole number from 1 on"
COMPARISON = SEEDS | {
    "--hidden": FROM_1,
    "--epochs": FROM_1,
    "--batch-size": FROM_1,
    "--learning-rates": "be positive and finite",
    "--second-stage": "lie in [0, 1]",
    "--fine-tune-from": "be a whole number from 0 on",
    "--milestones": "lie in [0, 1]",
    "--decay": "be 0 or more and finite",
    "--warm-up": "lie in [0, 1)",
    "--momentum": "lie in [0, 1)",
    "--weight-decay": "be 0 or more and finite",
    "--gamma": "lie in (0, 1]",
    "--search-seeds": FROM_1,
    "--validation": "lie in (0, 1)",
    "--at-once": FROM_1,
    "--checkpoint-every": "be 0 or more and finite",
    "--devices": FROM_1,
    "--num-processes": FROM_1,
    "--process-id": "be a whole number from 0 on",
}
NUMBERS = {
    longtail: COMPARISON | {"--imbalance": "lie in (0, 1]", "--give": "be 0 or more and finite"},
    noise: COMPARISON | {"--examples": FROM_1},
    sweep: COMPARISON
    | {
        "--gammas": "lie in (0, 1]",
        "--imbalance": "lie in (0, 1]",
        "--examples": FROM_1,
        "--timed": "be a whole number from 0 on",
    },
    convergence: SEEDS
    | {
        "--temperatures": "be a finite λ other than 0",
        "--batch-sizes": FROM_1,
        "--steps": FROM_1,
        "--gamma": "lie in (0, 1]",
        "--learning-rate": "be positive and finite",
        "--weight-decay": "be positive and finite",
    },
    toy: {"--seed": "be a whole number from 0 on"},
    pod: {"--batch-size": FROM_1},
    speed: dict.fromkeys(
        (
            *("--batch-size", "--repeats", "--compilations"),
            *("--losses", "--parameters", "--devices"),
        ),
        FROM_1,
    )
    | {"--seconds": "be positive and finite"},
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Of a benchmark with these flags: what it says as it refuses them."""

    def run(benchmark, *flags):
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(out), *flags])
        with pytest.raises(SystemExit, match="2"):
            benchmark.main()
        assert not out.exists()
        return capsys.readouterr().err

    with mock.patch.dict(os.environ):
        yield run


def name(benchmark):
    return benchmark.__name__.removeprefix("benchmarks.")


@pytest.mark.parametrize("benchmark", NUMBERS, ids=name)
def test_numbers(benchmark, run):
    for flag, must in NUMBERS[benchmark].items():
        for value in BAD[must]:
            assert f"argument {flag}: must {must}, got {value}" in run(benchmark, flag, value)


@pytest.mark.parametrize("benchmark", NUMBERS, ids=name)
def test_all_numbers_are_tested(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit, match="0"):
        benchmark.main()
    flags = set(re.findall(r"^  (--[\w-]+) [A-Z\[]", capsys.readouterr().out, re.MULTILINE))
    others = {"--out", "--methods", "--data-dir", "--noise", "--coordinator"}
    others |= {"--topologies", "--torch-python"}
    if benchmark is not convergence:
        others |= {"--temperatures"}
    assert flags - others == NUMBERS[benchmark].keys()


@pytest.mark.parametrize(
    ("benchmark", "options", "message"),
    [
        (longtail, "--methods mse", "invalid choice: 'mse'"),
        (longtail, "--temperatures 0", "--temperatures: must be a λ other than 0"),
        (longtail, "--temperatures 0.8:5,0.5:2", "such as 5, 0.8:5 or 0.5:10,0.8:5, or one"),
        (longtail, "--temperatures ess1.5", "such as ess0.5 or 0.5:ess-0.7, got ess1.5"),
        (longtail, "--temperatures ess0", "such as ess0.5 or 0.5:ess-0.7, got ess0"),
        (longtail, "--temperatures 1:ess0.5", "such as ess0.5 or 0.5:ess-0.7, got 1:ess0.5"),
        (longtail, "--temperatures 5,0.8:ess0.5", "or one effective sample size, such as ess0.5"),
        (longtail, "--temperatures nan", "got nan"),
        (longtail, "--temperatures hot", "got hot"),
        (longtail, "--batch-size 4000", "--batch-size must not exceed the 363 training"),
        (longtail, "--batch-size 33", "--batch-size must be a multiple of --devices, got 33"),
        (longtail, "--devices 9", "--devices must lie in [1, 8], got 9"),
        (longtail, "--dataset cifar10 --data-dir nowhere", "cifar-10-python.tar.gz in "),
        (longtail, "--fine-tune-from 9", "--fine-tune-from must lie in [0, 1], got 9"),
        (longtail, "--coordinator here", "--coordinator must be HOST:PORT or auto, got here"),
        (longtail, "--coordinator localhost:1", "needs --num-processes and --process-id"),
        (
            longtail,
            "--coordinator localhost:1 --num-processes 2 --process-id 2",
            "--process-id must be less than --num-processes, got 2",
        ),
        (noise, "--noise symmetric:2", "such as symmetric:0.4, got symmetric:2"),
        (noise, "--noise none", "such as symmetric:0.4, got none"),
        (sweep, "--methods gce", "--methods must be of cross_entropy, cb_drw"),
        (sweep, "--methods focal --noise symmetric:0.4", "sce, gce, truncated_gce here, got"),
        (pod, "--models vgg", "invalid choice: 'vgg'"),
        (pod, "--topologies nowhere", "--topologies must be known to the TPU's compiler, got no"),
        (speed, "--parts jax", "invalid choice: 'jax'"),
        (speed, "--models vgg", "invalid choice: 'vgg'"),
        (speed, "--forms sgd", "invalid choice: 'sgd'"),
        (speed, "--torch-python nowhere/python", "--torch-python must be an interpreter, got no"),
    ],
)
def test_others(benchmark, options, message, run):
    assert message in run(benchmark, *options.split())


@pytest.mark.parametrize("benchmark", [longtail, toy], ids=name)
def test_out_is_a_file(benchmark, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out"
    path.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(path)])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert f"--out {path} can't be written to" in capsys.readouterr().err
    assert path.read_text() == "mine"
