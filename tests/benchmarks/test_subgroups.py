"""Rare subclasses: the split is what is said, weights are NumPy's, and the table is the results."""

import jax.numpy as jnp
import numpy as np
import pytest

from absgd_jax import scale_by_attention, tilt
from benchmarks import subgroups
from benchmarks.engine.methods import Batch, Parts
from benchmarks.subgroups import Setting
from tests.support.commands import difference, mean_std, rows

LOSSES = np.float32([0.1, 2.0, 0.7, 0.3, 1.1, 0.0, 0.2, 5.0])


def test_split():
    train, test = np.arange(1000) % 10, np.arange(200) % 10
    draw = subgroups.make_draw(train, test, rare=0.1, most=80, validation=0.25)
    trained, evaluated, clean = draw(3, False)
    assert np.bincount(trained.group).tolist() == 5 * [60, 6]
    assert np.bincount(evaluated.group).tolist() == 5 * [20, 2] + 10 * [20]
    classes = np.concatenate([train, test])
    pairs = {*zip(classes[trained.index], trained.group, strict=True)}
    assert len(pairs) == 10  # a subclass is one class, and the same one in every split
    for split in (trained, evaluated, clean):
        np.testing.assert_array_equal(split.label, split.group % 10 // 2)
        assert {*zip(classes[split.index], split.group % 10, strict=True)} <= pairs
    np.testing.assert_array_equal(evaluated.index >= 1000, evaluated.group >= 10)
    index = np.concatenate([trained.index, evaluated.index])
    assert len(np.unique(index)) == len(index)
    for found, again in zip(trained, draw(3, False)[0], strict=True):
        np.testing.assert_array_equal(found, again)
    assert {*zip(classes[draw(4, False)[0].index], draw(4, False)[0].group, strict=True)} != pairs
    # The search sees the same, but for the test split.
    searched = draw(3, True)
    np.testing.assert_array_equal(searched[0].index, trained.index)
    np.testing.assert_array_equal(searched[1].index, evaluated.index[evaluated.index < 1000])
    with pytest.raises(ValueError, match="images to train on"):
        subgroups.make_draw(train, test, rare=0.01, most=80, validation=0.25)


def test_group_dro():
    group, sizes = np.array([0, 0, 1, 0, 1, 0, 0, 2]), np.array([6, 3, 1])
    weight = 10 / (3 * sizes[group])
    means = [LOSSES[group == g].sum() / (8 * sizes[g] / 10) for g in range(3)]
    q = np.exp(0.1 * np.array(means))
    state = scale_by_attention(jnp.inf).init(None)
    # The losses are those of one parameter, 1, whose gradient is the value.
    parts = Parts(
        *(lambda p, x: (p * x, ()), lambda z, y: z, lambda x, sums: tilt(x, state, sums), jnp.mean),
        jnp.inf,
    )
    batch = Batch(None, *map(jnp.asarray, (LOSSES, group, group, weight)), *4 * [None])
    for rate, expected in ((0.0, np.full(3, 1 / 3)), (0.1, q / q.sum())):
        way = subgroups.group_dro(rate)
        (grad, sums), (losses, _, log_q) = way.step(
            parts, jnp.ones([]), way.init(None, 8, 2, 3), batch
        )
        np.testing.assert_allclose(losses, LOSSES)
        np.testing.assert_allclose(np.exp(log_q), expected, rtol=1e-5)
        value = 2**20 * sums.level  # where V is 0
        np.testing.assert_allclose([value, grad], np.average(means, weights=expected), rtol=1e-5)


def test_weights():
    weights = subgroups.inverse_sizes(np.array([0, 1, 0, 0]))
    np.testing.assert_allclose(weights, [2 / 3, 2, 2 / 3, 2 / 3])

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
def test_benchmark(monkeypatch, start):
    grids = {"CVaR": ("0.5",), "JTT": ("0.5:1", "0.5:5"), "early weights": ("0.5:0.5",)}
    grids |= {"subclass weights": ("",), "group DRO": ("0",)}
    monkeypatch.setattr(subgroups, "GRIDS", grids)
    seen, searched = [], []

    def early(losses, wrong, ess):
        seen.append((losses, wrong))
        return subgroups.early_weights(losses, wrong, ess)

    def train_each(*args, original=subgroups.train_each):
        searched.append(original(*args))
        return searched[-1]

    monkeypatch.setitem(subgroups.WEIGHTS, "early weights", early)
    monkeypatch.setattr(subgroups, "train_each", train_each)
    options = "--model linear --temperatures --epochs 4 --learning-rates 0.03 1e-6 --search-seeds 1"
    results, table, printed = start(subgroups, f"--seeds 2 --batch-size 256 {options}")

    found = searched[0]
    settings = ("SGD", "inf"), ("JTT", "0.5:1"), ("JTT", "0.5:5")
    sgd, again, other = (found[Setting(*setting, 0.03)] for setting in settings)
    # A k of 1 is SGD again, and group DRO with a rate of 0 is weights by the subclass.
    np.testing.assert_allclose(again.losses, sgd.losses, rtol=1e-4)
    assert not np.allclose(other.losses, sgd.losses, rtol=0.01)
    told = (found[Setting(*s, 0.03)] for s in (("subclass weights", ""), ("group DRO", "0")))
    np.testing.assert_allclose(*(t.losses for t in told), rtol=1e-3)
    # The first model has hardly moved at the lower rate, and guesses.
    (losses, wrong), (still, guessed) = seen[:2]
    assert losses.mean() < still.mean()
    assert wrong.mean() < guessed.mean()

    assert printed.strip() in table
    validation = results.pop("validation")
    assert len(results) == 12
    for row, record in zip(rows(table), results.values(), strict=True):
        setting, rule = record["setting"], record["rule"]
        of_method = {k: x for k, x in validation.items() if k.startswith(setting["method"])}
        chosen = max((k for k in of_method if k.endswith(f", {rule}")), key=of_method.get)
        assert chosen == f"{' '.join(map(str, setting.values()))}, {rule}"
        accuracy = np.array(record["accuracy"])
        sgd = accuracy if setting["method"] == "SGD" else sgd
        cells = []
        for part in (slice(None), slice(1, None, 2)):
            x, y = (a[:, part].mean(axis=1) for a in (accuracy, sgd))
            cells += [mean_std(x), "" if accuracy is sgd else difference(x, y)]
        cells.append(mean_std(np.array(record["stopped"])[:, 1::2].mean(axis=1)))
        assert [row[0], *row[2:8]] == [setting["method"], f"{setting['learning_rate']:g}", *cells]
        assert row[8] == f"{record['diverged']} of 2"
