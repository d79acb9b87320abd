"""What λ does shows in the picture, and the table says the same."""

import re
import sys

import matplotlib.image
import numpy as np
import pytest

from benchmarks import toy
from tests.support.commands import load


@pytest.mark.usefixtures("users_promotion")
def test_toy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy", "--seed", "5", "--out", str(tmp_path)])
    toy.main()
    results = load(tmp_path).values()
    assert [r["temperature"] for r in results] == [None, 1, 0.2, None, -1, -0.5]
    table = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.strip() in table
    percent = np.array(re.findall(r"(\d+) % +\| (\d+) % +\| (\d+) % +\|", table), int)
    np.testing.assert_allclose(percent, [[*r["recall"], r["weight"]] for r in results], atol=0.51)

    sgd, *absgd = percent[:3]  # where the inner ring is rare
    assert sgd[1] < 20 < absgd[0][1] < 70 < absgd[1][1]
    assert sgd[2] < absgd[0][2] < absgd[1][2]
    assert percent[:3, 0].min() > 95  # the outer ring does not pay for it

    sgd, *absgd = percent[3:]  # where labels are wrong
    assert sgd[2] == 30
    for outer, inner, wrong in absgd:
        assert min(outer, inner) > sgd[:2].max()
        assert wrong < 10
    assert matplotlib.image.imread(tmp_path / "toy.png").std() > 0.05
