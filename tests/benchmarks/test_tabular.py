"""Folds are what is said, rules and measures are NumPy's, and the tables are the results."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, recall_score

from benchmarks import tabular
from benchmarks.engine import layers, methods
from benchmarks.tabular import Rule, Setting
from tests.support.commands import difference, rows

pytestmark = pytest.mark.usefixtures("users_promotion")

CONFIG = tabular.Config(folds=4, steps=12, batch_size=8, hidden=(6,))
KEEL = """@relation small
@attribute length real [0.0, 9.0]
@attribute color {red, green, blue}
@attribute Class {positive, negative}
@inputs length, color
@outputs Class
@data
1.5, red, negative
2.5, blue,positive
?, red, positive

3.5, red, negative
"""


class TestTables:
    def test_keel(self, tmp_path):
        """Nominal features are spread, a row that lacks a value is left out; the rarest is last."""
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "small.dat").write_text(KEEL)
        x, y = tabular.load("small", tmp_path)
        np.testing.assert_array_equal(x, [[1.5, 0, 1], [2.5, 1, 0], [3.5, 0, 1]])
        np.testing.assert_array_equal(y, [0, 1, 0])

    @pytest.mark.parametrize(
        "content", ["", KEEL.replace("2.5", "many"), KEEL.replace(" red,", "")]
    )
    def test_damaged(self, tmp_path, content):
        path = tmp_path / "small.dat"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"small\.dat is damaged, or not a table of KEEL"):
            tabular.load("small", tmp_path)

    def test_one_against_the_rest(self):
        whole, one = tabular.load("digits", None), tabular.load("digits-8:0.5", None)
        np.testing.assert_array_equal(whole.x, one.x)
        assert np.bincount(one.y).tolist() == [1623, 174]

    def test_frequent_first(self):
        assert np.bincount(tabular.load("wine", None).y).tolist() == [71, 59, 48]


class TestFolds:
    table = tabular.load("wine", None)

    def folds(self, text, flip):
        folds = tabular.make_folds(CONFIG, text, self.table, flip)
        assert len(folds.batches) == 8
        train = [np.unique(batches) for batches in folds.batches]
        test = [index[:n] for index, n in zip(folds.evaluation, folds.size, strict=True)]
        return folds, train, test

    @pytest.mark.parametrize("text", ["wine", "wine:0.2"])
    def test_parts(self, text):
        """No row is evaluated on that was trained on, nor that of a fold in its search."""
        _, train, test = self.folds(text, 0)
        np.testing.assert_array_equal(np.sort(np.concatenate(test[4:])), np.arange(178))
        for i, (trained, tested) in enumerate(zip(train, test, strict=True)):
            assert not np.intersect1d(trained, tested).size
            if i < 4:
                assert not np.intersect1d(tested, test[4 + i]).size
                assert not np.intersect1d(trained, test[4 + i]).size

    def test_thinned(self):
        folds, _, test = self.folds("wine:0.2", 0)
        for counts in folds.counts[4:]:
            most = counts[0]
            assert counts.tolist() == [most, int(most * 0.2**0.5), int(most * 0.2)]
        tested = np.bincount(self.table.y[np.concatenate(test[4:])])
        assert tested.tolist() == [71, 59, 48]

    def test_flipped(self):
        """Of the labels to train on, and no others."""
        folds, _, test = self.folds("wine", 0.25)
        for labels, tested in zip(folds.labels[4:], test[4:], strict=True):
            wrong = labels != self.table.y
            assert not wrong[tested].any()
            trained = np.delete(np.arange(178), tested)
            sizes = np.bincount(self.table.y[trained])
            assert wrong.sum() == sum(round(0.25 * size) for size in sizes)

    def test_fold(self):
        """Batches, scale and weights are of the training examples alone."""
        train = np.arange(0, 178, 4)
        fold = tabular.make_fold(CONFIG, self.table, self.table.y, train, train + 1, seed=3)
        drawn = fold.batches.ravel()
        assert np.unique(drawn[: len(train)]).tolist() == train.tolist()
        np.testing.assert_allclose(fold.mean, self.table.x[train].mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(fold.std, self.table.x[train].std(axis=0), rtol=1e-6)
        counts = np.bincount(self.table.y[train])
        np.testing.assert_array_equal(fold.counts, counts)
        np.testing.assert_allclose(fold.weight, len(train) / 3 / counts, rtol=2e-2)  # β is below 1
        np.testing.assert_allclose(fold.weight @ counts, len(train), rtol=1e-6)


class TestRules:
    def test_lift(self):
        """The most that a share of 5 % gains by an effective sample size F, found by search."""
        share = 0.05
        target = tabular.lifted(tabular.ESS(0.5, lift=1.5), share)
        lifts = np.linspace(1, 3, 200_001)
        # At a given weight of the class ESS is largest if all that differs is the class.
        ess = 1 / (share * lifts**2 + (1 - share * lifts) ** 2 / (1 - share))
        assert lifts[ess >= target].max() == pytest.approx(1.5, abs=1e-3)
        assert tabular.lifted(tabular.ESS(0.999, lift=1.5), share) == 0.999
        assert tabular.lifted(tabular.ESS(-0.5, lift=1.5), share) == -target
        assert tabular.lifted(Rule(-2.0), share) == -2.0

    @pytest.mark.parametrize("lam", [0.5, -0.5, math.inf])
    def test_levels(self, lam):
        """Less the level of its class the mean weight of a class is 1."""
        each = np.float32(np.random.default_rng(0).gamma(1.0, size=12))
        y = np.arange(12) % 3
        level = np.asarray(methods.levels(jnp.asarray(each), jnp.asarray(y), 3, jnp.float32(lam)))
        weights = np.exp((each - level[y]) / lam)
        means = [(weights if lam < math.inf else each - level[y])[y == k].mean() for k in range(3)]
        np.testing.assert_allclose(means, 1 if lam < math.inf else 0, rtol=1e-5, atol=1e-6)


class TestMeasures:
    @pytest.mark.parametrize("classes", [2, 4])
    def test_scikit_learn(self, classes):
        rng = np.random.default_rng(1)
        z, y = rng.normal(size=(90, classes)), np.arange(90) % classes
        found, guess, p = tabular.measure(z, y, True), z.argmax(axis=1), np.exp(z)
        p /= p.sum(axis=1, keepdims=True)
        each = [average_precision_score(y == k, p[:, k]) for k in range(classes)]
        assert found["precision"] == pytest.approx(100 * np.mean(each[classes == 2 :]))
        assert found["balanced"] == pytest.approx(100 * balanced_accuracy_score(y, guess))
        assert found["worst"] == pytest.approx(100 * min(recall_score(y, guess, average=None)))
        assert not found["one_class"]

    def test_collapsed(self):
        y = np.array([0] * 15 + [1] * 5)
        found = tabular.measure(np.full((20, 2), np.nan), y, False)
        assert found == {
            **{"balanced": 50, "precision": 25, "worst": 0, "near_guess": True, "one_class": True}
        }
        z = np.stack([np.zeros(20), np.where(y, 1.0, -1.0)], axis=1)
        assert not tabular.measure(z, y, True)["near_guess"]
        assert tabular.measure(z, y, False)["near_guess"]


@pytest.mark.parametrize(
    ("optimizer", "plain", "rule", "cap"),
    [
        ("SGD", functools.partial(optax.sgd, momentum=0.9), Rule(math.inf), None),
        ("Adam", optax.adam, Rule(math.inf), None),
        ("Adam", optax.adam, tabular.RGD(0.5), 0.5),
        ("Adam", optax.adam, tabular.RGD(0.5, clipped=False), math.inf),
    ],
)
def test_replay(optimizer, plain, rule, cap):
    """The optimiser by optax alone, and RGD at a τ of 0.5, on the batches of the fold."""
    table = tabular.load("wine", None)
    features = jnp.asarray(table.x)
    c = dataclasses.replace(CONFIG, optimizer=optimizer)
    folds = tabular.make_folds(c, "wine:0.2", table, 0)
    setting = Setting("balanced_softmax", "", rule, 0.05, 0.01)
    found = tabular.evaluate(c, table, folds, [(setting, 5)])[setting, 5]

    params = layers.init(jax.random.key(5), (13, 6, 3))
    rate = optax.cosine_decay_schedule(0.05, 12)
    tx = optax.chain(optax.add_decayed_weights(0.01), plain(rate))
    opt_state = tx.init(params)

    def predict(params, index):
        return layers.predict(params, (features[index] - folds.mean[5]) / folds.std[5])

    @jax.jit
    def step(params, opt_state, index, labels):
        def loss_fn(params):
            z = predict(params, index) + np.log(folds.counts[5])
            each = optax.softmax_cross_entropy_with_integer_labels(z, labels)
            if cap is not None:
                each *= jax.lax.stop_gradient(jnp.exp(jnp.minimum(each, cap) / 1.5))
            return each.mean()

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for index in folds.batches[5]:
        params, opt_state = step(params, opt_state, index, table.y[index])
    tested = folds.evaluation[5][: folds.size[5]]
    expected = tabular.measure(np.asarray(predict(params, tested)), table.y[tested], True)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def run(start):
    small = "--tables wine iris:0.2 --flipped-tables wine iris --batch-size 8 --steps 4"
    return lambda options: start(tabular, f"{small} {options}")


@pytest.mark.slow
def test_table(run, monkeypatch):
    """Its figures are those of the results, in the settings that held-out parts chose."""

    def train(c, classes, automatic, x, folds, runs):
        """Right at some share of the rows, best at a rate of 0.7."""
        seed = round(1000 * float(runs.number[0])) if np.isfinite(runs.number[0]) else 0
        rng = np.random.default_rng(abs(seed))
        index = folds.evaluation[runs.fold]
        right = np.take_along_axis(folds.labels[runs.fold], index, axis=1)
        guess = np.where(rng.random(index.shape) < runs.learning_rate[:, None], right, 0)
        return 2.0 * np.eye(classes)[guess], np.full(len(index), True)

    monkeypatch.setattr(tabular, "train", train)
    results, table, printed = run("--learning-rates 0.1 0.7 0.3")
    assert printed.strip() in table
    assert len(rows(printed)) == 5 * 7 + 3 * (1 + len(tabular.WRONG))
    assert len(results) == 2 * len(rows(printed))
    for flip, loss, method, *cells in rows(printed):
        names = ("wine", "iris") if flip == "0.4" else ("wine", "iris:0.2")
        found, plain = (
            [results[f"{name}, {flip}, {loss}, {m}"] for name in names] for m in (method, "SGD")
        )
        for record in found:
            assert sum(rate == 0.7 for *_, rate, _ in record["chosen"]) >= 3
        for i, key in enumerate(("balanced", "precision", "worst")):
            x, y = ([np.mean(r[key]) for r in records] for records in (found, plain))
            told = "" if method == "SGD" else difference(x, y)
            assert cells[2 * i : 2 * i + 2] == [f"{np.mean(x):.1f}", told]
        for cell, key in zip(cells[6:], ("near_guess", "one_class"), strict=True):
            assert cell == f"{sum(sum(r[key]) for r in found)} of 10"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tables wine", "--tables and --flipped-tables must be two at least"),
        ("--tables wine wine", "must be two at least, got wine, wine; name another"),
        ("--tables wine yeast4", "tables must be of breast_cancer, digits, iris, wine, or files"),
        ("--tables wine digits-10", "tables must have two classes, got digits-10"),
        ("--tables wine iris:0.02", "tables must have a share that leaves every class one example"),
        ("--flipped-tables iris wine:0.9", "more than it has, got wine:0.9 of [57, 47, 38]; name"),
        ("--tables wine iris:0.03", "--validation must leave some of every class of iris:0.03"),
        ("--batch-size 100", "training examples, got 100"),
        ("--folds 49", "wine must have 49 examples of every class: lower --folds"),
    ],
)
def test_bad_input(run, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        run(options)
    assert message in capsys.readouterr().err
