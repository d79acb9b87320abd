"""The tour says what it measured, in numbers and in words."""

import re

import numpy as np
import pytest

from benchmarks import __main__ as tour
from tests.support.commands import mean_std, rows


@pytest.mark.slow
@pytest.mark.usefixtures("users_promotion")
def test_tour(tmp_path, monkeypatch, start):
    small = {"model": "linear", "epochs": 2, "search_seeds": 1, "learning_rates": (0.1,)}
    for name, value in small.items():
        monkeypatch.setitem(tour.DIGITS, name, value)
    monkeypatch.setitem(tour.CURVE, "epochs", 2)
    results, table, printed = start(tour, "--seeds 2")
    assert table in printed
    assert f"{tmp_path}/tour.png" in printed
    assert re.search(r"python -m benchmarks\.noise +Losses for noisy labels", printed)
    assert [", ".join(row[:3]) for row in rows(table)] == list(results)
    wrong, high, rare = (
        [r for name, r in results.items() if name.startswith(data)]
        for data in ("wrong labels", "targets too high", "rare classes")
    )
    labels = [r["setting"]["temperature"] for r in wrong + rare]
    assert labels == ["inf", "inf", "0.2:ess-0.6", "inf", "inf", "0.5:ess0.9"]
    assert [r["setting"]["automatic"] for r in high] == [False, False, False, True]

    of_labels = [np.array(r["class_accuracy"]) for r in wrong + rare]
    every, few = ([x[:, part].mean(axis=1) for x in of_labels] for part in (EVERY, FEW))
    ends = [f"{mean_std(x)} %" for x in every]
    rarest = (f", 3 rarest {mean_std(x)} %" for x in few[3:])
    ends[3:] = [end + more for end, more in zip(ends[3:], rarest, strict=True)]
    ends[3:3] = [f"RMSE {mean_std(r['rmse'], 3)}" for r in high]
    assert [row[4] for row in rows(table)] == ends

    # A difference, of either sign or of none, stands in the words.
    said = table.split("\n\n")[-1].replace("(-", "(")
    pairs = (every, 2, 0), (every, 2, 1), (few, 4, 3), (few, 5, 4), (every, 4, 3), (every, 5, 4)
    differences = [x[a] - x[b] for x, a, b in pairs]
    assert re.findall(r"\d+\.\d ± \d+\.\d", said) == [
        f"{abs(d.mean()):.1f} ± {np.ptp(d) / 2:.1f}" for d in differences
    ]
    for r in high:
        assert f" of {np.mean(r['rmse']):.2f}" in said


EVERY, FEW = slice(None), slice(-3, None)


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
