"""Scenes are as is said, measures and weights are NumPy's, and the table is the results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks import segmentation
from benchmarks.engine.datasets import Split
from benchmarks.segmentation import Config, Setting
from tests.support.commands import difference, mean_std, rows

pytestmark = pytest.mark.usefixtures("users_promotion")

RNG = np.random.default_rng(0)
LABELS = RNG.integers(-1, 3, (2, 8, 8)).astype(np.int8)
LOGITS = np.float32(RNG.normal(size=(2, 8, 8, 3)))
LOG_P = LOGITS - np.log(np.exp(LOGITS).sum(axis=-1, keepdims=True))
CROSS_ENTROPY = -np.take_along_axis(LOG_P, np.maximum(LABELS, 0)[..., None], axis=-1)[..., 0]


class TestScenes:
    """Of white squares."""

    labels = np.repeat(np.arange(3), 40).astype(np.int32)
    data = Split(np.full((120, 8, 8, 1), 255, np.uint8), labels)

    def test_object(self):
        rng = np.random.default_rng(1)
        scene = segmentation.make_scene(rng, self.data.images[:1], np.array([7]))
        rows, columns = np.nonzero(scene.labels == 7)
        top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
        assert 13 <= bottom - top + 1 == right - left + 1 <= 18
        assert len(rows) == (bottom - top + 1) ** 2
        around = np.full((66, 66), False)
        around[top : bottom + 3, left + 1 : right + 2] = True
        around[top + 1 : bottom + 2, left : right + 3] = True
        np.testing.assert_array_equal(scene.labels != 0, around[1:-1, 1:-1])
        brightness = scene.pixels[rows, columns]
        assert 0.6 <= brightness.min() == brightness.max() <= 1

    def test_counts(self):
        counts = segmentation.object_counts(1000, 10, 0.01)
        assert counts.sum() == 1000
        assert counts[0] / counts[-1] == pytest.approx(100, rel=0.05)
        np.testing.assert_allclose(counts[:6] / counts[1:7], 100 ** (1 / 9), rtol=0.05)
        np.testing.assert_array_equal(segmentation.object_counts(1000, 10, 1), 100)
        with pytest.raises(ValueError, match="must hold 10 objects, got 4"):
            segmentation.object_counts(4, 10, 1)

    def test_draw(self, monkeypatch):
        """No image serves both purposes, and a search sees nothing of the test split."""
        images, labels = np.arange(120, dtype=np.uint8).reshape(-1, 1, 1, 1), np.arange(120) % 3
        train, test = Split(images[:90], labels[:90]), Split(images[90:], labels[90:])
        scenes = segmentation.Scenes
        monkeypatch.setattr(segmentation, "make_scene", lambda rng, *scene: scenes(*scene))
        config, rare = Config(scenes=8, evaluated=3, objects=5), set()
        for seed in (0, 1, 2, 3, 1000):
            drawn = segmentation.draw(config, train, test, seed)
            assert (drawn.train.labels.shape, drawn.evaluation.labels.shape) == ((8, 5), (3, 5))
            (seen, ranks), (held_out, equal) = (map(np.ravel, s) for s in drawn[:2])
            np.testing.assert_array_equal(np.bincount(ranks), [0, *drawn.counts])
            np.testing.assert_array_equal(np.bincount(equal), [0, 5, 5, 5])
            assert not np.intersect1d(seen, held_out).size
            assert (max(*seen, *held_out) < 90) == (seed >= 1000)
            # A class has one rank in both.
            pairs = {*zip(seen % 3, ranks, strict=True), *zip(held_out % 3, equal, strict=True)}
            assert len(pairs) == 3
            rare |= {k for k, rank in pairs if rank == 3}
        assert len(rare) > 1


def test_losses():
    """They are those of the library but for two."""
    prior = segmentation.make_prior(LABELS, 3)
    there, frequency = LABELS >= 0, []
    for k, count in enumerate(prior.counts):
        scenes = np.array([scene for scene in LABELS if k in scene])
        frequency.append((scenes == k).sum() / (scenes >= 0).sum())
        assert count == (scenes == k).sum()
    weights = np.median(frequency) / frequency
    np.testing.assert_allclose(prior.weights, weights, rtol=1e-6)
    p, one_hot = np.exp(LOG_P), np.eye(3)[LABELS]
    overlap = []
    for i, scene in enumerate(there):
        a, b = p[i][scene], one_hot[i][scene]
        overlap.append(np.mean((2 * (a * b).sum(axis=0) + 1) / ((a + b).sum(axis=0) + 1)))
    expected = {
        "median_frequency": weights[LABELS] * CROSS_ENTROPY,
        "dice": CROSS_ENTROPY + (1 - np.array(overlap))[:, None, None],
    }
    y = np.maximum(LABELS, 0).astype(np.int32)
    for name, losses in expected.items():
        found = segmentation.LOSSES[name](jnp.asarray(LOGITS), jnp.asarray(y), there, prior)
        np.testing.assert_allclose(found[there], losses[there], rtol=1e-5)


def test_class_that_is_covered_whole():
    prior = segmentation.make_prior(np.int8([[[0, 0, 2, -1]]]), 3)
    assert np.isfinite(prior.weights).all()
    np.testing.assert_array_equal(prior.counts, [2, 0, 1])


def test_to_space():
    x = np.arange(2 * 8 * 4 * 3).reshape(2, 8, 4, 3)
    np.testing.assert_array_equal(segmentation.to_space(segmentation.to_depth(x)), x)
    np.testing.assert_array_equal(segmentation.to_depth(x)[0, 1, 0], x[0, 2:4, :2].ravel())


@pytest.fixture(scope="module")
def net():
    return nnx.split(segmentation.UNet(3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("unit", segmentation.UNITS)
def test_first_step(net, unit):
    """Adam's first moment is a tenth of the weighted gradient."""
    graph, params = net
    x = np.float32(np.random.default_rng(1).normal(size=(2, 8, 8, 1)))
    program = segmentation.Program(graph, "cross_entropy", unit, False, 10)
    numbers = np.float32(0.01), np.float32(0.7), np.int32(0)
    run = segmentation.Run(*numbers, segmentation.make_prior(LABELS, 3))
    there, y = LABELS >= 0, np.maximum(LABELS, 0).astype(np.int32)

    @jax.jit
    def losses(params):
        logits = nnx.merge(graph, params)(x)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return each[there] if unit == "pixel" else jnp.mean(each, axis=(1, 2), where=there)

    each, pullback = jax.vjp(losses, params)
    exp = np.exp(each / 0.7)
    [expected] = pullback(jnp.asarray(exp / (0.9 * exp.mean() * each.size)))
    opt_state = segmentation.make_optimizer(program, run).init(params)
    copy = jax.tree.map(jnp.copy, params)  # as it is donated
    _, opt_state, mean = segmentation.train_step(program, run, copy, opt_state, x, LABELS)
    np.testing.assert_allclose(mean, each.mean(), rtol=1e-5)
    mu = optax.tree_utils.tree_get(opt_state, "mu")
    for a, b in zip(jax.tree.leaves(mu), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, 0.1 * b, rtol=1e-3, atol=1e-6)


def test_measure():
    """The pixels of each class, repeated as often as it is frequent."""
    labels = np.repeat([0, 1, 2, -1], [12, 4, 4, 3]).reshape(1, 1, -1)
    predicted = np.array([0] * 10 + [1, 2] + [1, 1, 1, 2] + [2, 2, 0, 1] + [2] * 3)
    confusion = segmentation.count(labels, predicted.reshape(labels.shape), 3)
    np.testing.assert_array_equal(confusion, [[10, 1, 1], [0, 3, 1], [1, 1, 2]])
    trained = {"mean_loss": np.ones(3), "confusion": confusion, "predicted": predicted}
    found = segmentation.measure(trained, np.array([3, 1]))

    def ious(times):
        """By pairs that are counted so often each, by their label."""
        pairs = zip(labels.ravel()[:20], predicted[:20], strict=True)
        y, p = np.array([pair for pair in pairs for _ in range(times[pair[0]])]).T
        return [100 * np.mean((y == p)[(y == k) | (p == k)]) for k in range(3)]

    # The frequent class has 1.5 times, the rare one half as many objects as the scenes have.
    np.testing.assert_allclose(found["iou"], ious([2, 3, 1]))
    assert found["mean"] == pytest.approx(np.mean(ious([2, 3, 1])))
    assert found["balanced"] == pytest.approx(np.mean(ious([1, 1, 1])))
    assert (found["background"], found["rare"]) == (found["iou"][0], found["iou"][2])
    assert found["pixels"] == 75
    assert not found["diverged"]
    assert segmentation.measure(trained | {"mean_loss": np.array([np.nan])}, np.ones(2))["diverged"]
    guess = {**trained, "confusion": np.outer([12, 4, 4], [1, 0, 0])}
    assert segmentation.measure(guess, np.array([3, 1]))["diverged"]


SMALL = "--methods cross_entropy arb --scenes 4 --evaluated 1 --seeds 2 --search-seeds 2"
GRIDS = "--learning-rates 0.1 0.7 0.3 --pixel-temperatures 5 9 0.5:ess0.9 --scene-temperatures 3 2"


@pytest.fixture
def run(start, monkeypatch):
    """The benchmark, whose runs are right at the share of the pixels that their setting says."""
    trained = []

    def train(config, setting, seed, drawn):
        trained.append((setting, seed))
        if len(trained) == 30:
            raise KeyboardInterrupt
        right = setting.learning_rate if setting.temperature == "inf" else 0.8
        right -= 0.1 * (setting.temperature in ("9", "3")) + 0.01 * seed % 0.05
        pixels = 1000 * (right * np.eye(11) + (1 - right) / 10 * (1 - np.eye(11)))
        noise = np.random.default_rng(len(setting.loss) + seed).integers(0, 20, (11, 11))
        predicted = np.zeros((1, 64, 64), np.int8)
        return {"mean_loss": np.ones(2), "confusion": pixels + noise, "predicted": predicted}

    monkeypatch.setattr(segmentation, "train", train)
    return lambda options: start(segmentation, f"{SMALL} {GRIDS} {options}"), trained


def test_table(run):
    """Cut off and resumed, its figures are those of the results, in the settings chosen."""
    run, trained = run
    with pytest.raises(KeyboardInterrupt):
        run("")
    results, table, printed = run("--resume")
    assert len(trained) == len(set(trained)) + 1
    settings = {s for s, seed in trained if seed < 1000}
    assert {seed for s, seed in trained} == {0, 1, 1000, 1001}
    assert {(s.unit, s.temperature, s.learning_rate) for s in settings} == {
        *(("pixel", "inf", 0.7), ("pixel", "5", 0.7), ("pixel", "0.5:ess0.9", 0.7)),
        ("scene", "2", 0.7),
    }
    assert printed.strip() in table
    assert all(r["mean"] for r in results.pop("validation"))
    assert len(results) == 8
    first = next(iter(results.values()))
    for (loss, _, rate, *cells), record in zip(rows(table), results.values(), strict=True):
        setting = Setting(**record["setting"])
        assert (loss, float(rate)) == (setting.loss, setting.learning_rate)
        expected, plain = [], results[f"{loss}, λ = ∞"]
        for name in ("mean", "rare"):
            expected.append(mean_std(record[name]))
            expected += [difference(record[name], other[name]) for other in (first, plain)]
        expected += [mean_std(record[name]) for name in ("background", "balanced", "pixels")]
        assert cells == [*expected, "0 of 2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch-size 9", "--batch-size must not exceed the 4 scenes, got 9"),
        ("--evaluated 1 --objects 9", "--scenes and --evaluated must hold 10 objects, got 9"),
    ],
)
def test_bad_input(run, options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run[0](options)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_training():
    """Learns, and at λ = 1e9 as without one."""
    config = Config(scenes=32, evaluated=10, epochs=4, imbalance=1.0)
    splits = segmentation.datasets.load("digits")
    drawn = segmentation.draw(config, *splits, seed=0)

    def train(lam, epochs):
        setting = Setting("cross_entropy", "pixel", lam, 0.01)
        return segmentation.train(dataclasses.replace(config, epochs=epochs), setting, 0, drawn)

    plain, flat = train("inf", 4), train("1e9", 4)
    # Not closer, as the first weights of a moving average are too large, as published.
    np.testing.assert_allclose(plain["mean_loss"], flat["mean_loss"], rtol=5e-3)
    # Of the pixels 74 % are of the background.
    assert segmentation.measure(train("inf", 64), drawn.counts)["background"] > 88
