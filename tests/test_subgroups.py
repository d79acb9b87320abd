"""Rare subclasses: the split is what is said, weights are NumPy's, and the table is the results."""

import re
import sys

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from benchmarks import subgroups
from benchmarks.subgroups import Setting
from tests.support.commands import load

LOSSES = np.float32([0.1, 2.0, 0.7, 0.3, 1.1, 0.0, 0.2, 5.0])


def test_split():
    train, test = np.arange(1000) % 10, np.arange(200) % 10
    draw = subgroups.make_draw(train, test, rare=0.1, most=80, validation=0.25)
    splits = draw(3)
    counts = {k: np.bincount(s.group).tolist() for k, s in splits.items()}
    assert counts == {"train": 5 * [60, 6], "validation": 5 * [20, 2], "test": 10 * [20]}
    classes = np.concatenate([train, test])
    for name, s in splits.items():
        np.testing.assert_array_equal(s.label, s.group // 2)
        assert np.all((s.index >= 1000) == (name == "test"))
        # A subclass is one class, and the same one in every split.
        assert len({*zip(classes[s.index], s.group, strict=True)}) == 10
    pairs = {k: {*zip(classes[s.index], s.group, strict=True)} for k, s in splits.items()}
    assert pairs["train"] == pairs["validation"] == pairs["test"]
    index = np.concatenate([s.index for s in splits.values()])
    assert len(np.unique(index)) == len(index)
    np.testing.assert_array_equal(draw(3)["train"].index, splits["train"].index)
    assert {*zip(classes[draw(4)["test"].index], draw(4)["test"].group, strict=True)} != pairs[
        "test"
    ]
    with pytest.raises(ValueError, match="images to train on"):
        subgroups.make_draw(train, test, rare=0.01, most=80, validation=0.25)


def test_objectives():
    group, sizes = np.array([0, 0, 1, 0, 1, 0, 0, 2]), np.float32([6, 3, 1])
    means = [LOSSES[group == g].sum() / (8 * sizes[g] / 10) for g in range(3)]
    arguments = (*map(jnp.asarray, (LOSSES, group, sizes)), jnp.full(3, -np.log(3), jnp.float32))
    value, log_q = subgroups.group_dro(*arguments, jnp.float32(0))
    np.testing.assert_allclose(value, np.mean(LOSSES * 10 / (3 * sizes[group])), rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_q), 1 / 3, rtol=1e-6)
    value, log_q = subgroups.group_dro(*arguments, jnp.float32(0.1))
    q = np.exp(0.1 * np.array(means))
    np.testing.assert_allclose(np.exp(log_q), q / q.sum(), rtol=1e-5)
    np.testing.assert_allclose(value, np.average(means, weights=q), rtol=1e-5)


def test_weights():
    wrong = LOSSES > 1
    weights = subgroups.jtt_weights(LOSSES, wrong, 5)
    np.testing.assert_allclose(weights, np.where(wrong, 5, 1) / (20 / 8))

    weights = subgroups.early_weights(LOSSES, wrong, 0.5)
    np.testing.assert_allclose([weights.mean(), 1 / np.mean(weights**2)], [1, 0.5])
    slopes = np.diff(np.log(weights[np.argsort(LOSSES)])) / np.diff(np.sort(LOSSES))
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-4)  # 1 / λ
    assert slopes[0] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("users_promotion")
def test_benchmark(tmp_path, monkeypatch, capsys):
    grids = {"SGD": ("inf",), "JTT": ("0.5:1", "0.5:5"), "early weights": ("0.5:0.5",)}
    monkeypatch.setattr(subgroups, "GRIDS", grids)
    monkeypatch.setattr(subgroups, "AT_ONCE", 4)
    seen, searched = [], []

    def early(losses, wrong, ess):
        seen.append((losses, wrong))
        return subgroups.early_weights(losses, wrong, ess)

    def train_each(*args, original=subgroups.train_each):
        searched.append(original(*args))
        return searched[-1]

    monkeypatch.setitem(subgroups.WEIGHTS, "early weights", early)
    monkeypatch.setattr(subgroups, "train_each", train_each)
    options = "--regimes linear:1e-3 --epochs 4 --learning-rates 0.03 1e-6 --search-seeds 1"
    command = f"subgroups --seeds 2 --batch-size 256 {options} --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())
    subgroups.main()

    # A k of 1 is SGD again; early weights are of SGD after half of the epochs.
    for rate, (losses, wrong) in zip((0.03, 1e-6), seen[:2], strict=True):
        first = searched[0][Setting("SGD", "inf", rate)]
        again = searched[0][Setting("JTT", "0.5:1", rate)]
        np.testing.assert_allclose(again.mean_loss, first.mean_loss, rtol=1e-5)
        np.testing.assert_array_equal(losses, first.losses[0, 1, -len(losses) :])
        np.testing.assert_array_equal(wrong, first.wrong[0, 1, -len(losses) :])
        # SGD is evaluated on the training examples, too, and in the right places.
        held_out = again.wrong.shape[-1]
        np.testing.assert_array_equal(again.wrong, first.wrong[..., :held_out])
    other = searched[0][Setting("JTT", "0.5:5", 0.03)]
    assert not np.allclose(other.mean_loss, searched[0][Setting("SGD", "inf", 0.03)].mean_loss)

    results, table = load(tmp_path), (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.strip() in table
    validation = results.pop("validation")["linear:1e-3"]
    assert len(results) == 6
    lines = iter([line for line in table.splitlines() if line.startswith("| linear")])
    for record in results.values():
        setting, rule = record["setting"], record["rule"]
        of_method = {k: x for k, x in validation.items() if k.startswith(setting["method"])}
        chosen = max((k for k in of_method if k.endswith(f", {rule}")), key=of_method.get)
        assert chosen == f"{' '.join(map(str, setting.values()))}, {rule}"
        accuracy = np.array(record["accuracy"])
        if setting["method"] == "SGD":
            sgd = accuracy
        cells = []
        for part in (slice(None), slice(1, None, 2)):
            x, gain = (a[:, part].mean(axis=1) for a in (accuracy, accuracy - sgd))
            error = gain.std(ddof=1) / 2**0.5
            cells.append(f"{x.mean():.1f} ± {x.std(ddof=1):.1f}")
            cells.append("" if accuracy is sgd else f"{gain.mean():+.1f} ± {error:.1f}")
        stopped = np.array(record["stopped"])[:, 1::2].mean(axis=1)
        cells.append(f"{stopped.mean():.1f} ± {stopped.std(ddof=1):.1f}")
        row = [setting["method"], f"{setting['learning_rate']:g}", *cells]
        found = re.split(r" *\| ?", next(lines))[2:]
        assert [found[0], *found[2:8]] == row
        assert found[8] == f"{record['diverged']} of 2"
    assert matplotlib.image.imread(tmp_path / "rare.png").std() > 0.05
