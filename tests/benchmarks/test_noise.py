"""Losses and labels of the noise benchmark, beside NumPy; test_comparison runs the whole of it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from benchmarks import noise
from benchmarks.engine import comparison
from benchmarks.engine.datasets import Split
from benchmarks.engine.losses import LOSSES
from benchmarks.engine.methods import METHOD
from tests.support.commands import load, mean_std, rows

RNG = np.random.default_rng(0)


def bi_tempered(z, y, t1, t2):
    """The definition for one example, its normalisation by bisection."""

    def p(shift):
        return (1 + (1 - t2) * (z - shift)) ** (1 / (1 - t2))

    ends = z.max(), z.max() + len(z) ** (t2 - 1) / (t2 - 1)
    p = p(scipy.optimize.brentq(lambda shift: p(shift).sum() - 1, *ends, xtol=1e-14))

    def log(x):
        return (x ** (1 - t1) - 1) / (1 - t1)

    target = np.eye(len(z))[y]
    divergence = target * (log(np.maximum(target, 1e-300)) - log(p))
    return np.sum(divergence - (target ** (2 - t1) - p ** (2 - t1)) / (2 - t1))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("t1", "t2"), [(0.8, 1.2), (0.0, 1.2), (0.5, 4.0)])
def test_bi_tempered(t1, t2):
    z, y = np.concatenate([s * RNG.normal(size=(4, 5)) for s in (0, 1, 5)]), RNG.integers(0, 5, 12)
    loss = jax.jit(LOSSES["bi_tempered"](t1, t2))

    def found(z):
        return loss(z, jnp.asarray(y), None, None)

    expected = [bi_tempered(*pair, t1, t2) for pair in zip(z, y, strict=True)]
    np.testing.assert_allclose(found(jnp.asarray(z)), expected, rtol=1e-9, atol=1e-12)
    grads = jax.grad(lambda z: found(z).sum())(jnp.asarray(z))
    for c, step in enumerate(1e-6 * np.eye(5)):
        low, high = found(jnp.asarray(z - step)), found(jnp.asarray(z + step))
        np.testing.assert_allclose(grads[:, c], (high - low) / 2e-6, rtol=1e-5, atol=1e-8)


def test_bi_tempered_of_large_logits():
    """Bounded, as a wrong label may be far away, and without NaN in its gradient."""
    loss = LOSSES["bi_tempered"]()
    z, y = jnp.array([[0.0, 1e6, 0.0]]), jnp.array([0])
    value, grads = jax.jit(jax.value_and_grad(lambda z: loss(z, y, None, None)[0]))(z)
    assert 0 < value < 1 / (1 - 0.8)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize("text", ["bi_tempered:1", "bi_tempered:0.8:1", "bi_tempered:nan"])
def test_bad_knobs(text):
    assert not METHOD.holds(text)
    assert METHOD.holds("bi_tempered:0.5:2+mixup")


@pytest.mark.parametrize("rate", [0.05, 0.4, 0.95])
def test_share_of_wrong_labels(rate):
    images, labels = RNG.integers(0, 255, (20_000, 2, 2, 1), np.uint8), RNG.integers(0, 4, 20_000)
    noisy, wrong = noise.instance_labels(images, labels, rate, 4, np.random.default_rng(1))
    np.testing.assert_array_equal(wrong, noisy != labels)
    assert set(noisy) == {0, 1, 2, 3}
    assert abs(wrong.mean() - rate) < 0.01


def test_wrong_labels_depend_on_the_image():
    """Two images, many times: how often each is taken for which class."""
    n = 20_000
    images = np.repeat(np.array([[0, 30, 20], [60, 0, 40]], np.uint8), n, axis=0)
    labels = np.ones(2 * n, np.int32)
    noisy, _ = noise.instance_labels(images, labels, 0.4, 3, np.random.default_rng(3))
    found = np.array([np.bincount(part, minlength=3) / n for part in (noisy[:n], noisy[n:])])
    np.testing.assert_allclose(found[:, 1], 0.6, atol=0.015)
    assert found.min() > 0  # by a softmax, and not by its maximum
    assert abs(found[0, 0] - found[1, 0]) > 0.3


def test_draw():
    images, labels = RNG.integers(0, 255, (600, 2, 2, 1), np.uint8), np.arange(600) % 3
    splits = Split(images, labels), Split(images[:9], labels[:9])
    draw = noise.make_draw(*splits, "instance:0.4", 500, 0.2)
    (train, held_out, told), again = draw(7, True), draw(7, True)
    assert (len(train.label), len(held_out.label), len(told.label)) == (400, 100, 30)
    for part in (train, held_out):
        assert 0.3 < np.mean(part.label != labels[part.index]) < 0.5
    np.testing.assert_array_equal(train.group, train.label != labels[train.index])
    np.testing.assert_array_equal(held_out.group, held_out.label)
    np.testing.assert_array_equal(train.label, again[0].label)
    np.testing.assert_array_equal(told.label, labels[told.index])
    test = draw(7, False)[1]
    np.testing.assert_array_equal(test.label, labels[:9])
    np.testing.assert_array_equal(test.group, labels[:9])


def test_draw_of_rare_classes():
    """Labels are flipped after classes were thinned; the others are followed by rank."""
    images, labels = np.zeros((3000, 2, 2, 1), np.uint8), np.arange(3000) % 3
    splits = Split(images, labels), Split(images[:9], labels[:9])
    draw, drawn = noise.make_draw(*splits, "symmetric:0.4", 600, 0.2, imbalance=0.25), set()
    for seed in range(5):
        train, test, _ = draw(seed, False)
        sizes = np.bincount(labels[train.index])
        assert sorted(sizes) == [50, 100, 200]
        assert train.group.sum() == np.sum(train.label != labels[train.index]) == 0.4 * 350
        np.testing.assert_array_equal(test.label, labels[:9])
        np.testing.assert_array_equal(test.group, np.argsort(np.argsort(-sizes))[labels[:9]])
        drawn.add(tuple(sizes))
    assert len(drawn) > 1
    searched, held_out, _ = draw(0, True)
    assert (len(searched.label), len(held_out.label)) == (280, 70)
    # Every class has as many under their right labels, also one of five images.
    told = noise.make_draw(*splits, "symmetric:0.4", 60, 0.2, imbalance=0.25)(0, True)[2]
    assert np.bincount(labels[told.index]).tolist() == [10] * 3
    np.testing.assert_array_equal(told.label, labels[told.index])


def test_precision():
    wrong = np.array([0, 1, 1, 0, 1, 0])
    assert noise.precision(wrong, np.array([0.1, 5, 3, 4, 0.2, 0.3])) == pytest.approx(2 / 3)
    assert noise.precision(wrong, wrong + 0.0) == 1


def test_table(tmp_path):
    """Of made-up results: what was found, and the columns."""
    groups = [np.array([1, 0, 0, 1]), np.array([0, 1, 0, 0])]
    losses = np.array([[4.0, 3.0, 0.1, 0.2], [0.1, np.nan, np.nan, np.nan]])

    def draw(seed, search):
        assert not search
        return (types.SimpleNamespace(group=groups[seed]),)

    history = {
        "accuracy": np.array([[[0.5, 0.7], [0.9, 0.7]], [[0.6, 0.4], [0.9, 0.9]]]),
        "mass": np.full((2, 2, 2), 0.5),
        "mean_loss": np.ones((2, 2)),
        "effective_sample_size": np.full((2, 2), 0.25),
        "temperature": np.full((2, 2), -1.0),
    }
    setting = comparison.Setting("-1", 0.1, 0.9)
    result = comparison.Result("gce", setting, {}, comparison.Trained(history, losses, None))
    found = noise.find(result, draw)
    np.testing.assert_allclose(found.auroc, [75, 100 / 3])
    np.testing.assert_allclose(found.precision, [50, 0])

    config = noise.Config(out=tmp_path)
    noise.write(config, {("instance 0.4", "gce"): [(result, found)]})
    record = load(tmp_path)["instance 0.4 gce ABSGD"]
    assert record["precision"] == [50, 0]
    curves = np.array(record["accuracy"])
    columns = [curves[:, -1], curves.max(axis=1), record["auroc"], record["precision"], [50, 50]]
    cells = list(map(mean_std, columns))
    [row] = rows((tmp_path / "table.md").read_text())
    assert row == ["instance 0.4", "gce", "-1", "0.1", *cells, "0.25", "1 of 2"]
    assert cells[:2] == ["70.0 ± 28.3", "75.0 ± 21.2"]

    config = noise.Config(out=tmp_path, imbalance=0.5)
    noise.write(config, {("instance 0.4", "gce"): [(result, found)]})
    [row] = rows((tmp_path / "table.md").read_text())
    assert row[4:6] == ["70.0 ± 28.3", mean_std([40, 90])]  # the second class is the rare one
