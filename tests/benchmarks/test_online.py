"""The stream drifts as is said, and no prediction has seen the label that it is compared to."""

import math

import jax
import numpy as np
import optax
import pytest

from absgd_jax.losses import arb
from benchmarks import online
from benchmarks.engine import layers
from tests.support.commands import difference, mean_std, rows

pytestmark = pytest.mark.usefixtures("users_promotion")

LABELS = np.repeat(np.arange(10), 30)
CONFIG = online.Config(examples=320, batch_sizes=(16,))
ONE = online.Setting("cross_entropy", "SGD", 0.1, math.inf, None)


def stack(*streams):
    return online.Stream(*map(np.stack, zip(*streams, strict=True)))


class TestStream:
    def test_prior(self):
        """Every class goes from ρ times the most frequent one's share to the largest, and back."""
        prior = online.make_prior(1000, np.arange(10), 0.02)
        np.testing.assert_allclose(prior.sum(axis=1), 1)
        np.testing.assert_allclose(prior[::100].argmax(axis=1), np.arange(10))
        np.testing.assert_allclose(prior[::100].argmin(axis=1), (np.arange(10) + 5) % 10)
        np.testing.assert_allclose(prior[::100].min(axis=1) / prior[::100].max(axis=1), 0.02)
        assert np.abs(np.diff(prior, axis=0)).max() < 0.002  # smoothly

    def test_draw(self):
        """The labels are those of the images, and as frequent as the prior says."""
        config = online.Config(examples=25600)
        stream = online.draw(config, LABELS, seed=3)
        np.testing.assert_array_equal(LABELS[stream.index], stream.labels)
        for part in np.split(np.arange(25600), 10):
            expected = stream.prior[part].sum(axis=0)
            seen = np.bincount(stream.labels[part], minlength=10)
            assert np.all(np.abs(seen - expected) < 4.5 * np.sqrt(expected))

    def test_no_repetition(self):
        """While images of the class are left."""
        stream = online.draw(CONFIG, np.repeat(np.arange(10), 100), seed=0)
        assert len(np.unique(stream.index)) == 320
        few = online.draw(CONFIG, np.arange(20) % 10, seed=0)
        assert len(np.unique(few.index)) == 20

    def test_rare(self):
        prior = np.float32([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
        stream = online.Stream(np.arange(3), np.array([0, 0, 1]), prior)
        np.testing.assert_array_equal(online.is_rare(stream), [True, False, False])


class TestClassCounts:
    @pytest.fixture
    def streams(self):
        return stack(*(online.draw(CONFIG, LABELS, seed) for seed in (0, 1)))

    def counts(self, streams, loss, memory=None):
        setting = ONE._replace(loss=loss, memory=memory)
        return np.asarray(online.class_counts(setting, streams, 16))

    def test_arb(self, streams):
        logits = jax.random.normal(jax.random.key(0), (16, 10))
        labels = streams.labels[1].reshape(-1, 16)[3]
        counts = self.counts(streams, "arb")[1, 3]
        by_counts = online.losses.balanced_softmax(logits, labels, class_counts=counts)
        np.testing.assert_allclose(by_counts, arb(logits, labels), rtol=1e-6)

    def test_running(self, streams):
        """A memory of 16 / log 2 examples halves the counts with every batch of 16."""
        first, second = (np.bincount(x, minlength=10) for x in np.split(streams.labels[0][:32], 2))
        counts = self.counts(streams, "running", 16 / math.log(2))[0]
        np.testing.assert_allclose(counts[1], first / 2 + second, rtol=1e-6)

    def test_priors(self, streams):
        prior = streams.prior[1].reshape(-1, 16, 10).mean(axis=1)
        np.testing.assert_allclose(self.counts(streams, "true prior")[1], prior, rtol=1e-6)
        stale = self.counts(streams, "stale prior")[1]
        np.testing.assert_allclose(stale, np.tile(streams.prior[1, :32].mean(axis=0), (20, 1)))


class TestPrequential:
    """Images that tell nothing of each other come twice, in batches of two."""

    images = np.tile(3 * np.eye(16, dtype=np.float32), (2, 1))
    labels = np.tile(np.random.default_rng(0).permutation(16), 2)

    @pytest.fixture
    def correct(self):
        batches = np.arange(32).reshape(1, 16, 2), self.labels.reshape(1, 16, 2)
        counts = np.ones((1, 1, 16, 16), np.float32)
        keys = jax.vmap(jax.random.key)(np.zeros(1, np.uint32))
        correct, finite = online.train(
            *(self.images, batches, counts, np.float32([0.1]), np.float32([np.inf]), keys),
            hidden=64,
            automatic=False,
        )
        assert finite.all()
        return np.asarray(correct).ravel()

    def test_first_time_is_a_guess(self, correct):
        assert correct[:16].mean() < 0.2 < 0.9 < correct[16:].mean()

    def test_replay(self, correct):
        """By optax alone, predicting before each update."""
        params, tx = layers.init(jax.random.key(0), (16, 64, 16)), optax.sgd(0.1, momentum=0.9)

        @jax.jit
        def step(params, opt_state, x, y):
            def loss_fn(params):
                logits = layers.predict(params, x)
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
                return losses.mean(), logits.argmax(axis=1) == y

            grads, correct = jax.grad(loss_fn, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state)
            return correct, optax.apply_updates(params, updates), opt_state

        opt_state, expected = tx.init(params), []
        for i in range(0, 32, 2):
            batch = self.images[i : i + 2], self.labels[i : i + 2]
            right, params, opt_state = step(params, opt_state, *batch)
            expected += right.tolist()
        np.testing.assert_array_equal(correct, expected)


def test_measure():
    """Tenths count alike, and the classes in them, however many examples they have."""
    labels = np.array([0, 0, 0, 1] + [0] * 36)
    correct = labels == 0
    prior = np.where(np.arange(40)[:, None] < 4, [[0.9, 0.1]], [[0.1, 0.9]])
    found = online.measure(correct, True, online.Stream(labels, labels, prior))
    assert found["course"] == [50] + [100] * 9
    assert found["balanced"] == 95
    assert found["whole_stream"] == 50
    assert found["rare"] == pytest.approx(100 * 36 / 37)
    assert not found["diverged"]
    assert online.measure(correct, False, online.Stream(labels, labels, prior))["diverged"]
    assert online.measure(labels == 1, True, online.Stream(labels, labels, prior))["diverged"]


SMALL = "--examples 64 --batch-sizes 16 --seeds 2 --search-seeds 2 --temperatures 5 --memories 16"


@pytest.fixture
def run(start):
    return lambda options: start(online, f"{SMALL} {options}")


def test_table(run, monkeypatch):
    """Its figures are those of the results, in the settings that other streams chose."""
    seeds, draw = [], online.draw

    def train(images, batches, counts, rates, *_, **__):
        """Right at the rate's share of the examples."""
        shape = *counts.shape[:2], batches[0][0].size
        correct = np.random.default_rng(0).random(shape) < rates[:, None, None]
        return correct, np.full(shape[:2], True)

    monkeypatch.setattr(online, "draw", lambda *args: seeds.append(args[2]) or draw(*args))
    monkeypatch.setattr(online, "train", train)
    results, table, printed = run("--learning-rates 0.1 0.7 0.3")
    assert seeds == [1000, 1001, 0, 1]
    assert printed.strip() in table
    assert len(results) == 15
    plain = results["16 cross_entropy SGD"]
    for row, record in zip(rows(table), results.values(), strict=True):
        assert row[3] == "0.7"
        assert [c["learning_rate"] for c in record["validation"]] == [0.1, 0.7, 0.3]
        names = "balanced", "rare", "whole_stream"
        assert row[4::3] == [mean_std(record[name]) for name in names]
        assert row[5::3][:2] == [difference(record[name], plain[name]) for name in names[:2]]
        assert row[11] == f"{sum(record['diverged'])} of 2"


def test_bad_input(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--examples 65")
    assert "--examples must be a multiple of 16, got 65" in capsys.readouterr().err
