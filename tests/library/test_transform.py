import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from absgd_jax import abadam, absgd, scale_by_attention, Sums, tilt, two_stage, zero_sums
from tests.support.attended import attend, follow, slopes_and_sums
from tests.support.reference import debiased, divergences, published

RNG = np.random.default_rng(0)
X, Y = np.float32(RNG.normal(size=(16, 3))), np.float32(RNG.normal(size=16))
PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.float32(0.3)}
LOSSES = RNG.exponential(size=128).astype(np.float32)


def loss_fn(params, sums, opt_state, x=X, y=Y):
    predictions = jnp.sum(x * params["w"][None], axis=1) + params["b"]
    return tilt(jnp.square(predictions - y), opt_state, sums).mean()


def step(tx, params, opt_state, *batch):
    grads, sums = jax.grad(loss_fn, argnums=(0, 1))(params, Sums(), opt_state, *batch)
    updates, opt_state = tx.update(grads, opt_state, params, sums=sums)
    return optax.apply_updates(params, updates), opt_state


class TestChain:
    def test_is_plain_sgd_at_an_infinite_temperature(self):
        tx = absgd(0.05, jnp.inf, nesterov=True, weight_decay=1e-2)
        plain = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.05, 0.9, nesterov=True))
        state = tx.init(PARAMS)
        ours, theirs = state, plain.init(PARAMS)
        for _ in range(2):
            updates, ours = tx.update(PARAMS, ours, PARAMS, sums=slopes_and_sums(Y, state)[1])
            expected, theirs = plain.update(PARAMS, theirs, PARAMS)
            chex.assert_trees_all_close(updates, expected, rtol=1e-6)

    def test_gradient_of_whole_steps(self, x64):
        # Two steps, so that the second's V depends on the first's parameters.
        @jax.jit
        def after(learning_rate, temperature, gamma, scale):
            params = jax.tree.map(lambda p: scale * p.astype(jnp.float64), PARAMS)
            tx = absgd(learning_rate, temperature, gamma=gamma)
            opt_state = tx.init(params)
            for _ in range(2):
                params, opt_state = step(tx, params, opt_state, jnp.float64(X), jnp.float64(Y))
            return sum(jnp.sum(p) for p in jax.tree.leaves(params))

        args = tuple(jnp.float64(a) for a in (0.01, 2.0, 0.7, 1.1))
        jax.test_util.check_grads(after, args, order=1, modes=["rev"], rtol=1e-4)

    @pytest.mark.parametrize("make", [absgd, abadam])
    @pytest.mark.usefixtures("users_promotion")  # optax.adam needs it
    def test_weight_decay_of_zero_needs_no_params(self, make):
        tx = make(0.1, 1.0)
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), sums=zero_sums())
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)


class TestHead:
    def test_scales_in_float32_and_rounds_once(self):
        tx, narrow = scale_by_attention(1.0), jnp.bfloat16(0.7)
        grads = {"a": jnp.full(3, narrow), "b": narrow.astype(jnp.float32), "c": None}
        state = tx.init(grads)
        updates, _ = tx.update(grads, state, sums=slopes_and_sums(jnp.float32([0.3]), state)[1])
        chex.assert_trees_all_equal(updates["a"], jnp.full(3, updates["b"]).astype(jnp.bfloat16))

    @pytest.mark.parametrize("cast", [np.float64, np.float32, np.asarray])
    def test_sums_may_have_been_reduced_on_the_host(self, cast):
        tx = scale_by_attention(1.0)
        slopes, sums = slopes_and_sums(jnp.asarray(Y), tx.init(None))
        found = tx.update(slopes, tx.init(None), sums=jax.tree.map(cast, sums))
        chex.assert_trees_all_close(found, tx.update(slopes, tx.init(None), sums=sums), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, -1.0, np.inf])
@pytest.mark.parametrize("damping", [1, jnp.float32(3.0)])
def test_damping_divides_the_gradients_where_weight_is_on_hard_examples(damping, temperature):
    def weights(**kwargs):
        tx = scale_by_attention(temperature, **kwargs)
        return attend(tx, jnp.asarray(LOSSES), tx.init(None))[0]

    expected = 1.0
    if temperature == 1:
        chi2, _ = divergences(np.exp(np.float64(LOSSES)))
        expected += float(damping) * np.sqrt(chi2)
    np.testing.assert_allclose(weights() / weights(damping=damping), expected, rtol=1e-5)


class TestGamma:
    BATCHES = RNG.gamma(2.0, size=(60, 16)).astype(np.float32)

    def test_schedule_that_reaches_1_and_leaves_it(self):
        def gamma(count):
            return jnp.where((count >= 5) & (count < 9), 1.0, 0.5)

        weights, states = follow(scale_by_attention(-0.7, gamma=gamma), self.BATCHES)
        steps = np.arange(60)
        newest = np.where((steps >= 5) & (steps < 9), 1.0, 0.5)
        expected, baselines = published(self.BATCHES, -0.7, newest)
        np.testing.assert_allclose(weights, expected, rtol=1e-4)
        np.testing.assert_allclose(states.baseline[1:], baselines, rtol=1e-5)

    @pytest.mark.parametrize("gamma", [0.01, 0.9, 1.0])
    @pytest.mark.parametrize("plain", [0, 5])
    def test_debias(self, gamma, plain):
        """As Adam's: γ / (1 - (1 - γ)^t) in the t-th weighted batch, the first weighing its own."""
        weights = np.array(two_stage_weights(self.BATCHES, plain, gamma, True))
        newest = debiased(gamma, np.arange(1, 61 - plain))
        expected, _ = published(self.BATCHES[plain:], 2.0, newest)
        np.testing.assert_allclose(weights[plain:], expected, rtol=2e-5)
        np.testing.assert_allclose(weights[plain].sum(), 1, rtol=1e-5)
        as_published = two_stage_weights(self.BATCHES, plain, gamma, False)
        np.testing.assert_allclose(as_published[plain].sum(), 1 / gamma, rtol=1e-5)


@functools.partial(jax.jit, static_argnames="debias")
def two_stage_weights(batches, plain, gamma, debias):
    tx = scale_by_attention(two_stage(2.0, plain), gamma=gamma, debias=debias)
    return follow(tx, batches)[0]
