"""Rare subclasses: the split is what is said, weights are NumPy's, and the table is the results."""

import shlex

import jax.numpy as jnp
import numpy as np
import pytest

from absgd_jax import scale_by_attention, tilt
from benchmarks import subgroups
from benchmarks.engine.methods import Batch, Parts
from benchmarks.engine.training import Examples, Trained
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


class TestAFR:
    def test_held_out(self):
        """A fifth of the training examples comes to those that are evaluated, and stands first."""
        draw = subgroups.make_draw(np.arange(1000) % 10, np.arange(200) % 10, 0.1, 80, 0.25)
        (train, evaluation, _), (kept, longer, _) = draw(3, True), subgroups.hold_out(draw)(3, True)
        for before, rest, after, tested in zip(train, kept, longer, evaluation, strict=True):
            assert len(rest) == 264
            np.testing.assert_array_equal(after[66:], tested)
            np.testing.assert_array_equal(np.sort(np.append(rest, after[:66])), np.sort(before))
        assert not np.intersect1d(kept.index, longer.index).size

    @pytest.mark.usefixtures("users_promotion")
    @pytest.mark.parametrize(("gamma", "pull"), [(0.0, 0.0), (4.0, 0.2)])
    def test_second_heads(self, gamma, pull):
        rng = np.random.default_rng(0)
        x, y = np.float32(rng.normal(size=(12, 3))), np.array([0] * 7 + [1] * 3 + [2] * 2)
        first = head = np.float32(rng.normal(size=(3, 3)))
        heads, losses = subgroups.second_heads(x, y, first, gamma, pull)

        def probabilities(head):
            p = np.exp(x @ head)
            return p / p.sum(axis=1, keepdims=True)

        weights = np.exp(-gamma * probabilities(first)[range(12), y]) / np.bincount(y)[y]
        weights /= weights.sum()
        for found, loss in zip(heads[:20], losses, strict=False):
            p = probabilities(head)
            assert loss == pytest.approx(-np.log(p[range(12), y]).mean(), rel=1e-5)
            gradient = x.T @ (weights[:, None] * (p - np.eye(3)[y])) + 2 * pull * (head - first)
            head = head - subgroups.AFR_RATE * gradient
            np.testing.assert_allclose(found, head, rtol=1e-4, atol=1e-6)

    @pytest.mark.usefixtures("users_promotion")
    def test_accuracy(self):
        """Of every subclass and seed, at as many of the 500 steps as there are epochs."""
        rng = np.random.default_rng(0)
        x, first = (np.float32(rng.normal(size=shape)) for shape in ((2, 52, 3), (2, 3, 2)))
        group = rng.permuted(np.tile(np.arange(52) % 4, (2, 1)), axis=1)
        evaluation = [Examples(None, g // 2, g) for g in group]
        trained = Trained({"accuracy": np.zeros((3, 2, 4))}, None, None, x, first)
        found = subgroups.afr(trained, evaluation, 12, "4/0.2").history
        for seed, y in enumerate(group // 2):
            heads, losses = subgroups.second_heads(x[seed, :12], y[:12], first[seed], 4.0, 0.2)
            for epoch, step in enumerate((166, 332, 499)):
                assert found["mean_loss"][epoch, seed] == losses[step]
                right = (x[seed, 12:] @ heads[step]).argmax(axis=1) == y[12:]
                expected = [right[group[seed, 12:] == g].mean() for g in range(4)]
                np.testing.assert_allclose(found["accuracy"][epoch, seed], expected)


@pytest.mark.slow
@pytest.mark.usefixtures("users_promotion")
def test_benchmark(monkeypatch, start):
    grids = {"CVaR": ("0.5",), "JTT": ("0.5:1", "0.5:5"), "early weights": ("0.5:0.5",)}
    grids |= {"AFR": ("4/0.2",), "subclass weights": ("",), "group DRO": ("0",)}
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
    options += f" --methods {shlex.join(grids)}"
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
    assert len(results) == 14
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
