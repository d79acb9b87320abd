"""Ways to train, beside NumPy's gradients of a linear classifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from absgd_jax import scale_by_attention, tilt
from benchmarks.engine import meta, methods
from benchmarks.engine.methods import Batch, Parts

RNG = np.random.default_rng(0)
X, CLEAN_X = RNG.normal(size=(8, 3)), RNG.normal(size=(5, 3))
Y, CLEAN_Y = RNG.integers(0, 4, 8), RNG.integers(0, 4, 5)
PARAMS = RNG.normal(size=(3, 4))
INDEX = np.array([3, 9, 4, 1, 7, 2, 0, 5])
GROUP, WEIGHT = np.array([0, 0, 1, 0, 1, 0, 0, 2]), RNG.uniform(0.5, 2, 8)
TEMPERATURE = -0.7
EYE = np.eye(4)


def softmax(z):
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def losses(params, x=X, targets=EYE[Y]):
    return -np.sum(targets * np.log(softmax(x @ params)), axis=-1)


def gradients(params, x=X, targets=EYE[Y]):
    """Of each example, [B, D, C]."""
    return x[:, :, None] * (softmax(x @ params) - targets)[:, None]


@pytest.fixture
def step(x64):
    arrays = map(jnp.asarray, (INDEX, X, Y, GROUP, WEIGHT))
    clean = jnp.asarray(CLEAN_X), jnp.asarray(CLEAN_Y)
    batch = Batch(*arrays, clean, jax.random.key(3), rate=0.5, progress=0.0)

    def step(way, memory=(), progress=0.0, params=PARAMS):
        """What it returns, and the loss, the batch being the above."""

        def run(params, memory, opt_state, progress):
            parts = Parts(
                lambda params, x: (x @ params, "statistics"),
                optax.softmax_cross_entropy_with_integer_labels,
                lambda losses, sums: tilt(losses, opt_state, sums),
                jnp.mean,
                jnp.asarray(TEMPERATURE),
            )
            (grads, sums), (each, other, memory) = way.step(
                parts, params, memory, batch._replace(progress=progress)
            )
            assert other == "statistics"
            return 2**20 * sums.level, each, memory, grads  # V being 0

        opt_state = scale_by_attention(jnp.inf).init(None)
        return jax.jit(run)(jnp.asarray(params), memory, opt_state, progress)

    return step


def test_plain(step):
    value, each, _, grads = step(methods.WAYS[""]())
    np.testing.assert_allclose(each, losses(PARAMS))
    np.testing.assert_allclose(value, each.mean())
    np.testing.assert_allclose(grads, gradients(PARAMS).mean(axis=0))


def test_mixup(step):
    value, each, _, grads = step(methods.mixup(0.7))
    share_key, order_key = jax.random.split(jax.random.key(3))
    order = np.array(jax.random.permutation(order_key, 8))
    share = float(jax.random.beta(share_key, 0.7, 0.7))
    assert 0 < share < 1
    x, targets = (share * a + (1 - share) * a[order] for a in (X, EYE[Y]))
    np.testing.assert_allclose(each, losses(PARAMS, x, targets))
    np.testing.assert_allclose(value, each.mean())
    np.testing.assert_allclose(grads, gradients(PARAMS, x, targets).mean(axis=0))


def test_sam(step):
    value, _, _, grads = step(methods.sam(0.3))
    g = gradients(PARAMS).mean(axis=0)
    uphill = PARAMS + 0.3 * g / np.linalg.norm(g)
    np.testing.assert_allclose(value, losses(uphill).mean())
    np.testing.assert_allclose(grads, gradients(uphill).mean(axis=0))


def check_slopes(grads, loss, params=PARAMS):
    """Beside differences of the mean loss."""
    for i in np.ndindex(params.shape):
        ends = [params.copy(), params.copy()]
        ends[0][i] -= 1e-6
        ends[1][i] += 1e-6
        low, high = (loss(end).mean() for end in ends)
        np.testing.assert_allclose(grads[i], (high - low) / 2e-6, rtol=1e-6, atol=1e-9)


def regularised(params, targets, coefficient):
    agreement = np.sum(targets * softmax(X @ params), axis=-1)
    return losses(params) + coefficient * np.log(1 - agreement)


def test_elr(step):
    memory = RNG.dirichlet(np.ones(4), 10)
    value, each, new, grads = step(methods.elr(2.0), jnp.asarray(memory))
    targets = 0.7 * memory[INDEX] + 0.3 * softmax(X @ PARAMS)
    np.testing.assert_allclose(new[INDEX], targets)
    np.testing.assert_array_equal(new[jnp.array([6, 8])], memory[[6, 8]])

    np.testing.assert_allclose(each, regularised(PARAMS, targets, 2))
    np.testing.assert_allclose(value, each.mean())
    check_slopes(grads, lambda params: regularised(params, targets, 2))


@pytest.mark.usefixtures("users_promotion")
def test_elr_teacher(step):
    """Before a fifth of the steps it is plain, while the teacher follows all along."""
    way = methods.elr_teacher(1.5)
    memory, seen = way.init(jnp.asarray(PARAMS), 10, 4, 2), []
    for progress, coefficient in ((0.0, 0), (0.19, 0), (0.2, 1.5), (0.9, 1.5)):
        params = RNG.normal(size=PARAMS.shape)
        seen.append(params)
        value, each, memory, grads = step(way, memory, progress, params)
        teacher = np.average(seen, axis=0, weights=0.997 ** np.arange(len(seen))[::-1])
        targets = softmax(X @ teacher)
        np.testing.assert_allclose(each, regularised(params, targets, coefficient))
        np.testing.assert_allclose(value, each.mean())
        check_slopes(grads, lambda p, t=targets, c=coefficient: regularised(p, t, c), params)


@pytest.mark.usefixtures("users_promotion")
def test_teacher_score(step):
    """What is weighted by are the losses of the teacher; at λ = ∞ the step is the plain one."""
    way = methods.teacher_score()
    memory, seen = way.init(jnp.asarray(PARAMS), 10, 4, 2), []
    for _ in range(3):
        params = RNG.normal(size=PARAMS.shape)
        seen.append(params)
        value, each, memory, grads = step(way, memory, params=params)
        teacher = np.average(seen, axis=0, weights=0.997 ** np.arange(len(seen))[::-1])
        np.testing.assert_allclose(value, losses(teacher).mean())
        np.testing.assert_allclose(each, losses(params))
        np.testing.assert_allclose(grads, gradients(params).mean(axis=0))


def test_learning_to_reweight(step):
    value, each, _, grads = step(methods.WAYS["l2rw"]())
    of_clean = gradients(PARAMS, CLEAN_X, EYE[CLEAN_Y]).mean(axis=0)
    weights = np.maximum(np.sum(gradients(PARAMS) * of_clean, axis=(1, 2)), 0)
    assert 0 < np.sum(weights > 0) < 8
    np.testing.assert_allclose(each, losses(PARAMS))
    np.testing.assert_allclose(value, np.average(each, weights=weights))
    np.testing.assert_allclose(
        grads, np.einsum("i,ijk", weights / weights.sum(), gradients(PARAMS))
    )


def test_within(step):
    _, each, _, grads = step(methods.WAYS["within"]())
    of_class = [k == Y for k in np.unique(Y)]
    level = np.zeros(8)
    for members in of_class:
        mean = np.mean(np.exp(losses(PARAMS)[members] / TEMPERATURE))
        level[members] = TEMPERATURE * np.log(mean)
    np.testing.assert_allclose(each, losses(PARAMS) - level)
    np.testing.assert_allclose(grads, gradients(PARAMS).mean(axis=0))
    # Of the weights each class has the share of its size.
    weights = np.exp(each / TEMPERATURE)
    shares = [weights[members].sum() / weights.sum() for members in of_class]
    np.testing.assert_allclose(shares, np.mean(of_class, axis=1))


@pytest.mark.usefixtures("users_promotion")
def test_meta_weight_net(step):
    memory = meta.init_weight_net(jax.random.key(0))
    _, each, new, grads = step(methods.meta_weight_net(0.2), memory)

    def clean_loss(theta):
        weights = meta.weight_net(theta, jnp.asarray(losses(PARAMS))) / 8
        ahead = PARAMS - 0.5 * jnp.einsum("i,ijk", weights, gradients(PARAMS))
        return optax.softmax_cross_entropy(CLEAN_X @ ahead, EYE[CLEAN_Y]).mean()

    slope = jax.grad(clean_loss)(memory)
    expected = jax.tree.map(lambda t, g: t - 0.2 * g, memory, slope)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-12), new, expected
    )
    weights = np.array(meta.weight_net(new, each)) / 8
    np.testing.assert_allclose(grads, np.einsum("i,ijk", weights, gradients(PARAMS)))


def test_losses():
    z, n = jnp.asarray(X @ PARAMS, jnp.float32), jnp.asarray([9, 5, 3, 2])
    each = losses(PARAMS)

    def found(text):
        return methods.parse(text).loss(z, jnp.asarray(Y), n, jnp.bool_(False))

    largest = np.sort(each)[::-1]
    np.testing.assert_allclose(found("cvar:0.25").mean(), largest[:2].mean(), rtol=1e-6)
    value = (largest[:2].sum() + 0.4 * largest[2]) / 2.4
    np.testing.assert_allclose(found("cvar:0.3").mean(), value, rtol=1e-6)
    smooth = losses(PARAMS, targets=0.8 * EYE[Y] + 0.2 / 4)
    np.testing.assert_allclose(found("label_smoothing:0.2"), smooth, rtol=1e-5)
    prior = np.array([9, 5, 3, 2]) ** 1.5
    adjusted = -np.log((prior * np.exp(X @ PARAMS))[np.arange(8), Y] / (np.exp(X @ PARAMS) @ prior))
    np.testing.assert_allclose(found("balanced_softmax:1.5"), adjusted, rtol=1e-5)
