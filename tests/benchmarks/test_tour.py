"""The tour says what it measured, in numbers and in words."""

import re
import sys

import matplotlib.image
import numpy as np
import pytest

from benchmarks import __main__ as tour
from tests.support.commands import load, SMALL


@pytest.mark.slow
@pytest.mark.usefixtures("users_promotion")
def test_tour(tmp_path, monkeypatch, capsys):
    options = f"{SMALL} --epochs 2 --learning-rates 0.1 --devices 1 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", [tour.__file__, *options.split()])
    tour.main()
    printed, table = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    assert table in printed
    assert f"{tmp_path}/tour.png" in printed
    assert re.search(r"python -m benchmarks\.noise +Losses for noisy labels", printed)
    assert matplotlib.image.imread(tmp_path / "tour.png").std() > 0.05

    results = load(tmp_path)
    rows = [row.split("|")[1:-1] for row in table.splitlines() if "±" in row and row[0] == "|"]
    assert [", ".join(map(str.strip, row[:3])) for row in rows] == list(results)
    assert [r["setting"]["temperature"] for r in results.values()] == [
        *("inf", "inf", "0.2:ess-0.6"),
        *("inf", "inf", "0.5:ess0.9"),
    ]
    every, few = (
        np.array([np.array(r["class_accuracy"])[:, part].mean(axis=1) for r in results.values()])
        for part in (slice(None), slice(-3, None))
    )
    for i, row in enumerate(rows):
        shown = [every[i], few[i]] if i >= 3 else [every[i]]
        cells = [f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" for x in shown]
        assert [cell.strip() for cell in row[4:] if cell.strip()] == cells

    # A difference, of either sign or of none, stands in the words.
    said = re.findall(r"\d+\.\d ± \d+\.\d", table.replace("(-", "(").split("With 40 %")[1])
    pairs = (every, 2, 0), (every, 2, 1), (few, 4, 3), (few, 5, 4), (every, 4, 3), (every, 5, 4)
    differences = [x[a] - x[b] for x, a, b in pairs]
    assert said == [f"{abs(d.mean()):.1f} ± {np.ptp(d) / 2:.1f}" for d in differences]


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ([92.0, 94.0, 93.0], "3.0 ± 0.6 points ahead of SGD"),
        ([88.0, 86.0, 87.0], "3.0 ± 0.6 points behind SGD"),
        ([89.0, 91.0, 92.0], "level with SGD (0.7 ± 0.9)"),
        ([91.0, 89.0, 88.0], "level with SGD (-0.7 ± 0.9)"),
        ([90.0, 90.0, 90.0], "level with SGD (0.0 ± 0.0)"),
    ],
    ids=["gain", "loss", "none", "none_below", "same"],
)
def test_in_words(accuracies, words):
    assert tour.in_words(np.array(accuracies), np.full(3, 90.0), "SGD") == words


def test_differences_are_paired():
    """What the seeds have in common is no error."""
    seeds = np.array([70.0, 80.0, 90.0])
    words = "1.0 ± 0.1 points ahead of it"
    assert tour.in_words(seeds + np.array([0.9, 1.0, 1.1]), seeds, "it") == words
