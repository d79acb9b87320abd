"""What a benchmark can't be told is an error that says so, and writes nothing."""

import dataclasses
import io
import json
import os
import pathlib
import re
import sys
import typing
from unittest import mock

import pytest

from benchmarks import __main__ as tour
from benchmarks import (
    convergence,
    longtail,
    noise,
    online,
    outliers,
    pod,
    segmentation,
    speed,
    subgroups,
    sweep,
    tabular,
)
from benchmarks.engine import comparison, config, methods, report, search
from tests.support.commands import load

# For every constraint, values that break it.
BAD = {
    config.FROM_0: [-1],
    config.FROM_1: [0, -1],
    config.FROM_2: [1, -1],
    config.POSITIVE: [0.0, -1.0, float("nan"), float("inf")],
    config.NOT_NEGATIVE: [-1.0, float("nan"), float("inf")],
    config.FINITE_TEMPERATURE: [0.0, -0.0, float("nan"), float("inf")],
    config.SHARE: [-0.1, 1.1, float("nan")],
    config.BELOW_1: [-0.1, 1.0, float("nan")],
    config.ABOVE_0: [0.0, 1.1, float("nan")],
    config.INSIDE: [0.0, 1.0, float("nan")],
    comparison.TEMPERATURE: [
        *("0", "nan", "hot", "", "0.8:5,0.5:2", "1:5", "-0.1:5", "nan:5", "inf"),
        *("ess1.5", "ess0", "1:ess0.5", "5,0.8:ess0.5"),
    ],
    config.OR_NONE: [],
    search.SEEDS: [1, -1, 1001],
    methods.KNOBS: [
        *(f"cross_entropy+{way}" for way in ("sam:-1", "elr:nan", "meta_weight_net:inf")),
        *("cross_entropy+mixup:0", "cross_entropy+mixup:inf", "cvar:0", "cvar:1.1", "cvar:-1+sam"),
        *("balanced_softmax:-1", "focal:nan", "label_smoothing:2", "cb_drw:1.1"),
    ],
    online.EVERY_TENTH: [9, -1],
    outliers.MANY: [15, -1],
    segmentation.ONE: ["0.5:10,0.8:5"],
    **{
        method: ["", "mixup", "cross_entropy:1", "cross_entropy+sam:x", "cross_entropy+warp"]
        for method in (longtail.METHOD, noise.METHOD, sweep.METHOD)
    },
    noise.NOISE: ["symmetric:2", "none", "symmetric", "asymmetric:nan"],
    tabular.TABLE: ["", ":0.1", "wine:", "wine:0", "wine:1.1", "wine:nan", "wine:0.1:0.2"],
}
BENCHMARKS = [
    *(tour, convergence, longtail, noise, online, outliers),
    *(pod, segmentation, speed, subgroups, sweep, tabular),
]


def name(benchmark):
    return benchmark.__name__.removeprefix("benchmarks.")


def unframed(text):
    """What tyro prints, without the frame and the breaks of the lines."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=name)
def test_values(benchmark):
    hints = typing.get_type_hints(benchmark.Config)
    for field, musts in config.constraints(benchmark.Config).items():
        for must in musts:
            for value in BAD[must]:
                told = f"{config.flag(field)} must {must.text}, got {value}"
                given = (value,) if typing.get_origin(hints[field]) is tuple else value
                with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
                    benchmark.Config(**{field: given})


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=name)
def test_every_number_has_a_constraint(benchmark):
    constraints = config.constraints(benchmark.Config)
    for field, hint in typing.get_type_hints(benchmark.Config).items():
        if {int, float} & {hint, *typing.get_args(hint)}:
            assert constraints[field], field


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=name)
def test_help(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name(benchmark)}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        benchmark.main()
    text = unframed(capsys.readouterr().out)
    assert f"usage: python -m {benchmark.__name__.removesuffix('.__main__')} [-h] " in text
    assert "folder to write to (default: out/" in text  # the comment behind a field


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Of a benchmark with these flags: what it says as it refuses them."""

    def refusal(benchmark, options):
        out = tmp_path / "out"
        command = [f"{name(benchmark)}.py", "--out", str(out), *options.split()]
        monkeypatch.setattr(sys, "argv", command)
        with mock.patch.dict(os.environ), pytest.raises(SystemExit, match="2"):
            benchmark.main()
        assert not out.exists()
        return unframed(capsys.readouterr().err)

    return refusal


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=name)
def test_no_values(benchmark, refusal):
    """Of a flag that takes several: an error, where there is nothing to do without."""
    hints = typing.get_type_hints(benchmark.Config)
    for field, musts in config.constraints(benchmark.Config).items():
        flag, kinds = config.flag(field), (hints[field], *typing.get_args(hints[field]))
        if tuple not in map(typing.get_origin, kinds):
            continue
        if config.OR_NONE in musts:
            assert getattr(benchmark.Config(**{field: ()}), field) == ()
        else:
            told = f"{flag} must have a value, got none; name one"
            assert told in refusal(benchmark, flag)


@pytest.mark.parametrize(
    ("benchmark", "options", "message"),
    [
        (longtail, "--methods mse", "l2rw, meta_weight_net, within, got mse"),
        (longtail, "--epochs many", "Error parsing --epochs: invalid literal"),
        (longtail, "--epoch 3", "Perhaps you meant: --epochs"),
        (longtail, "--batch-size 4000", "--batch-size must not exceed the 363 training"),
        (longtail, "--dataset idx --data-dir nowhere", "-images-idx3-ubyte* in "),
        (longtail, "--fine-tune-from 9", "--fine-tune-from must lie in [0, 1], got 9"),
        (longtail, "--validation 0.001", "--validation must hold out an example of every class"),
        (tabular, "--shuffles 201", "the first seed of the search, got 5 times 201"),
        (
            longtail,
            "--epochs 3 --temperatures 0.9:5",
            "must leave λ one of the 3 epochs, got 0.9:5",
        ),
        (segmentation, "--scene-temperatures 0.99:2", "must leave λ one of the 12 epochs, got 0.9"),
        (longtail, "--largest 113", "--largest must not exceed the 1"),
        (longtail, "--imbalance 0.001", "an image, got 0.001 of the 1"),
        (longtail, "--largest 19", "got 0.05 of the 19 of the largest; raise it, or --largest"),
        (subgroups, "--rare 0.001", "--rare must leave each subclass images to train on and to ho"),
        (pod, "--models vgg", "invalid choice 'vgg'"),
        (pod, "--topologies nowhere", "--topologies must be known to the compiler, got nowhere"),
        (speed, "--parts torch --models transformer", "--models must have one of images for --par"),
        (speed, "--torch-python nowhere/python", "--torch-python must be an interpreter, got no"),
    ],
)
def test_refused(benchmark, options, message, refusal):
    assert message in refusal(benchmark, options)


def test_negative_temperatures_are_values(monkeypatch):
    given = ["-5,0.5:-2", "-1e-1", "ess-0.5", "0.2:-1"]
    monkeypatch.setattr(sys, "argv", ["noise.py", "--temperatures", *given, "--epochs", "3"])
    found = comparison.read(noise.Config, noise.__doc__)
    assert found.temperatures == tuple(given)
    assert found.epochs == 3
    assert comparison.stages(given[0]) == [(0.0, -5.0), (0.5, -2.0)]


def test_protocol_of_the_papers(monkeypatch):
    """Where the data are not the digits; what is given goes before it."""
    options = ["--dataset", "fashion-mnist", "--epochs", "7", "--no-augment"]
    monkeypatch.setattr(sys, "argv", ["longtail.py", *options])
    found = comparison.read(longtail.Config, longtail.__doc__)
    assert (found.model, found.epochs, found.batch_size) == ("resnet32", 7, 128)
    assert not found.augment
    assert dataclasses.replace(found).hidden == (256, 128)


@pytest.fixture
def folder_refused(capsys):
    """What is said to a configuration whose folder is refused."""

    def told(config):
        with pytest.raises(SystemExit, match="2"), report.folder(config):
            pass
        return capsys.readouterr().err

    return told


class TestFolder:
    """A run takes a folder of its own, and deletes nothing of anybody else's."""

    @pytest.fixture
    def tour_config(self, tmp_path):
        return tour.Config(out=tmp_path / "out")

    def test_command_is_one_for_a_shell(self, tour_config, monkeypatch):
        monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "benchmarks", "--out", "a b"])
        with report.folder(tour_config) as description:
            assert description["command"] == "python -m benchmarks --out 'a b'"

    def test_begun_and_cut_off(self, tour_config):
        tour_config.out.mkdir()
        for name in (".lock", "config.json.part"):
            (tour_config.out / name).touch()
        with report.folder(tour_config) as description:
            assert not description["finished"]

    def test_described_as_read(self, tour_config):
        with report.folder(tour_config):
            pass
        found = load(tour_config.out, "config")
        assert found["arguments"] == {"out": str(tour_config.out), "seeds": 5}
        assert found["finished"]

    @pytest.mark.parametrize(
        "of_theirs",
        ["checkpoints/mine/weights", "log.txt", "notes.md", ".lock", "config.json.part"],
    )
    def test_somebody_elses(self, tour_config, of_theirs, folder_refused):
        path = tour_config.out / of_theirs
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        told = "holds files and no run of a benchmark: name another"
        assert told in folder_refused(tour_config)
        assert [p for p in tour_config.out.rglob("*") if p.is_file()] == [path]
        assert path.read_text() == "mine"

    @pytest.mark.parametrize(
        ("content", "resume"),
        [
            *(("", False), ("[]", True), ("\xff", False)),
            ('{"arguments": {"resume": true, "lr": 0.1}, "finished": true}', True),
            ('{"arguments": [], "command": "", "machine": {}, "versions": {}}', False),
        ],
    )
    def test_another_config(self, tmp_path, content, resume, folder_refused):
        path = tmp_path / "config.json"
        path.write_text(content, encoding="latin1")
        theirs = longtail.Config(out=tmp_path, resume=resume)
        assert f"{path} is damaged, or not a benchmark's" in folder_refused(theirs)
        assert path.read_text(encoding="latin1") == content
        assert list(tmp_path.iterdir()) == [path]

    def test_file(self, tour_config, folder_refused):
        tour_config.out.write_text("mine")
        assert f"--out {tour_config.out} can't be written to" in folder_refused(tour_config)
        assert tour_config.out.read_text() == "mine"

    def test_in_use(self, tour_config, folder_refused):
        with report.folder(tour_config):
            assert "is in use by another process" in folder_refused(tour_config)
        with report.folder(tour_config):
            pass


class TestResume:
    """It needs the arguments that the results depend on, and no other."""

    @pytest.fixture
    def cut_off(self, tmp_path):
        """A run that was, and what config.json says of it."""
        begun = longtail.Config(out=tmp_path / "out", data_dir=tmp_path)
        with pytest.raises(KeyboardInterrupt), report.folder(begun):
            raise KeyboardInterrupt
        return dataclasses.replace(begun, resume=True), load(begun.out, "config")

    def test_moved(self, cut_off, tmp_path, monkeypatch):
        begun, before = cut_off
        begun.out.rename(tmp_path / "moved")
        monkeypatch.chdir(tmp_path)
        other = {"checkpoint_every": 7.0, "data_dir": None}
        for out in (tmp_path / "moved", pathlib.Path("moved"), pathlib.Path("moved/../moved")):
            with report.folder(dataclasses.replace(begun, out=out, **other)) as description:
                assert description["started"] == before["started"]
                assert description["arguments"]["out"] == str(out)

    @pytest.mark.parametrize("started", [True, False])
    def test_other_versions(self, cut_off, started):
        """They may have had arguments that are no more, and not have said when they began."""
        begun, found = cut_off
        found["arguments"]["of_old"] = 1
        if not started:
            found.pop("started")
        (begun.out / "config.json").write_text(json.dumps(found))
        with report.folder(begun) as description:
            assert description["started"]
            if started:
                assert description["started"] == found["started"]
        assert "of_old" not in load(begun.out, "config")["arguments"]

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"gamma": 0.5}, "gamma 0.9, now 0.5"),
            ({"at_once": 2}, "at_once None, now 2"),
            ({"dataset": "idx", "data_dir": None}, "dataset digits, now idx"),
        ],
    )
    def test_refused(self, cut_off, change, told, folder_refused):
        begun, found = cut_off
        assert told in folder_refused(dataclasses.replace(begun, **change))
        assert load(begun.out, "config") == found

    def test_other_data(self, tmp_path, folder_refused):
        """Which --dataset idx doesn't name."""
        begun = longtail.Config(out=tmp_path, dataset="idx", data_dir=tmp_path)
        with report.folder(begun):
            pass
        told = folder_refused(dataclasses.replace(begun, data_dir=None, resume=True))
        assert f"got data_dir {tmp_path}, now None" in told


def test_terminal_without_greek(monkeypatch):
    """The help doesn't end in an error."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["longtail.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        longtail.main()
    terminal.flush()
    assert b"--temperatures" in terminal.buffer.getvalue()
