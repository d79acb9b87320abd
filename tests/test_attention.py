import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from reference import Case, weigh

from absgd_jax import attention, robust_loss

TEMPERATURES = (0.1, 1.0, 7.5, -0.1, -1.0, -7.5)
LOSSES = np.random.default_rng(0).gamma(2.0, size=24).astype(np.float32)

value_and_grad = jax.jit(jax.value_and_grad(robust_loss))


def masked_value_and_grad(losses, temperature, where):
    return jax.jit(jax.value_and_grad(functools.partial(robust_loss, where=where)))(
        losses, temperature
    )


def expected_loss(losses, temperature):
    losses = np.asarray(losses, np.float64)
    return temperature * scipy.special.logsumexp(losses / temperature, b=1 / losses.size)


def expected_weights(losses, temperature):
    return scipy.special.softmax(np.asarray(losses, np.float64) / temperature)


class TestRobustLoss:
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    @pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4)])
    def test_value_and_gradient(self, temperature, shape):
        losses = LOSSES.reshape(shape)
        loss, grads = value_and_grad(losses, temperature)
        np.testing.assert_allclose(loss, expected_loss(losses, temperature), rtol=1e-6)
        np.testing.assert_allclose(grads, expected_weights(losses, temperature), rtol=1e-5)

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_higher_derivatives_in_losses_and_temperature(self, temperature, x64):
        losses = jnp.asarray(LOSSES[:5], jnp.float64)
        check_grads(robust_loss, (losses, jnp.float64(temperature)), order=2)

    @pytest.mark.parametrize("temperature", [np.inf, -np.inf, 1e8, -1e8, 1e30, -3e38])
    def test_meets_the_mean(self, temperature):
        loss, grads = value_and_grad(LOSSES, temperature)
        np.testing.assert_allclose(loss, LOSSES.mean(dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(grads, 1 / LOSSES.size, rtol=1e-6)

    def test_gradient_in_an_infinite_temperature_is_zero(self):
        with jax.debug_nans(True):
            assert jax.grad(robust_loss, argnums=1)(LOSSES, jnp.inf) == 0

    @pytest.mark.parametrize("temperature", [1.0, -1.0])
    def test_one_example_among_many(self, temperature):
        # Where log1p(mean expm1) has lost its digits: the mean of exp is 1 / n.
        losses = np.full(100_003, -40 * temperature, np.float32)
        losses[7] = 0.0
        loss, _ = value_and_grad(losses, temperature)
        np.testing.assert_allclose(loss, -temperature * np.log(losses.size), rtol=1e-6)

    @pytest.mark.parametrize("temperature", [1e-6, -1e-6, 1e-3, 1.0, -1.0, np.inf])
    @pytest.mark.parametrize("largest", [1e4, 1e30])
    def test_enormous_losses(self, temperature, largest):
        losses = np.array([-largest, 0.0, 0.5 * largest, largest], np.float32)
        loss, grads = value_and_grad(losses, temperature)
        assert losses.min() <= loss <= losses.max()
        np.testing.assert_allclose(grads.sum(), 1, rtol=1e-6)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_losses_fused_into_it(self, sign):
        """Their last product is then not rounded as it is where the largest is looked for."""
        temperatures = sign * jnp.array([1e-6, 1e-3])
        scales = jnp.linspace(1e4, 1e6, 64)
        loss, grads = jax.jit(
            jax.vmap(lambda t: jax.vmap(lambda s: value_and_grad(s * LOSSES, t))(scales))
        )(temperatures)
        largest = (LOSSES.max() if sign > 0 else LOSSES.min()) * scales
        np.testing.assert_allclose(loss, jnp.stack([largest] * 2), rtol=1e-5)
        np.testing.assert_allclose(grads.sum(axis=-1), 1, rtol=1e-5)

    @pytest.mark.parametrize("temperature", [0.5, -0.5, np.inf])
    def test_mask(self, temperature):
        where = np.arange(24) % 3 != 0
        losses = np.where(where, LOSSES, np.resize([np.nan, np.inf, -np.inf, 1e38], 24))
        loss, grads = masked_value_and_grad(losses, temperature, where)
        kept_loss, kept_grads = value_and_grad(LOSSES[where], temperature)
        np.testing.assert_allclose(loss, kept_loss, rtol=1e-6)
        np.testing.assert_allclose(grads[where], kept_grads, rtol=1e-6)
        np.testing.assert_array_equal(grads[~where], 0)

    @pytest.mark.parametrize("temperature", [0.5, -0.5, np.inf])
    def test_nothing_left(self, temperature):
        losses = np.array([np.nan, np.inf, 1.0], np.float32)
        loss, grads = masked_value_and_grad(losses, temperature, np.zeros(3, bool))
        assert loss == 0
        np.testing.assert_array_equal(grads, 0)
        assert robust_loss(np.zeros((0,), np.float32), temperature) == 0

    @pytest.mark.parametrize(
        ("dtype", "rtol"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 1e-6)]
    )
    def test_dtypes(self, dtype, rtol):
        losses = jnp.asarray(LOSSES, dtype)
        loss, grads = value_and_grad(losses, 0.5)
        assert loss.dtype == jnp.float32
        assert grads.dtype == losses.dtype
        # Float32 inside: the loss is exact for the losses as they were rounded.
        np.testing.assert_allclose(loss, expected_loss(losses, 0.5), rtol=1e-6)
        np.testing.assert_allclose(
            grads.astype(jnp.float32), expected_weights(losses, 0.5), rtol=rtol, atol=1e-6
        )

    def test_float64(self, x64):
        losses = LOSSES.astype(np.float64)
        loss, grads = value_and_grad(losses, 0.5)
        assert loss.dtype == grads.dtype == jnp.float64
        np.testing.assert_allclose(loss, expected_loss(losses, 0.5), rtol=1e-15)
        loss, _ = value_and_grad(losses, -1e14)
        np.testing.assert_allclose(loss, losses.mean(), rtol=1e-14)

    def test_an_infinite_loss(self):
        losses = jnp.array([1.0, jnp.inf])
        assert robust_loss(losses, 1.0) == jnp.inf
        # A soft minimum does not see it, but for the count.
        np.testing.assert_allclose(robust_loss(losses, -1.0), 1 + np.log(2), rtol=1e-6)

    def test_temperature_is_traced_and_mapped(self):
        losses = jnp.asarray(LOSSES)
        loss = jax.jit(chex.assert_max_traces(lambda t: robust_loss(losses, t), n=1))
        temperatures = jnp.array((*TEMPERATURES, np.inf))
        each = jnp.stack([loss(t) for t in temperatures])
        chex.assert_trees_all_close(
            jax.vmap(lambda t: robust_loss(losses, t))(temperatures), each, rtol=1e-6
        )

    def test_traced_values_are_not_checked(self):
        assert jnp.isnan(jax.jit(robust_loss)(LOSSES, jnp.nan))

    def test_remat(self):
        expected = value_and_grad(LOSSES, 0.5)
        actual = jax.value_and_grad(jax.checkpoint(lambda x: robust_loss(x, 0.5)))(LOSSES)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, -0.5, np.inf])
class TestSpreadBatch:
    """One batch is one batch, wherever its parts are."""

    WHERE = np.arange(24) > 4  # with 8 devices: none of the first, one of the second

    def expected(self, temperature):
        loss, grads = masked_value_and_grad(LOSSES, temperature, self.WHERE)
        return loss, grads

    def test_vmap_axis(self, temperature):
        loss, grads = jax.vmap(
            jax.value_and_grad(
                lambda x, m: robust_loss(x, temperature, where=m, axis_name="batch")
            ),
            axis_name="batch",
        )(LOSSES.reshape(8, 3), self.WHERE.reshape(8, 3))
        expected_loss, expected_grads = self.expected(temperature)
        np.testing.assert_allclose(loss, np.full(8, expected_loss), rtol=1e-6)
        # The gradient of a sum over devices of one and the same loss: pmean it, as for SGD.
        np.testing.assert_allclose(grads.reshape(-1) / 8, expected_grads, rtol=1e-6)

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_shard_map(self, temperature, check_vma):
        mesh = jax.make_mesh((4, 2), ("host", "chip"), axis_types=(AxisType.Auto,) * 2)
        axes = ("host", "chip")
        features = np.random.default_rng(1).normal(size=(24, 5)).astype(np.float32)

        def loss_fn(params, x, where, axis_name=None):
            losses = jnp.square(jnp.sum(x * params[None], axis=1))
            return robust_loss(losses, temperature, where=where, axis_name=axis_name)

        @jax.jit
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P(), P(axes), P(axes)),
            out_specs=P(),
            check_vma=check_vma,
        )
        def spread(params, x, where):
            loss, grads = jax.value_and_grad(loss_fn)(params, x, where, axes)
            return loss, jax.lax.pmean(grads, axes)

        args = jnp.ones(5), features, self.WHERE
        chex.assert_trees_all_close(spread(*args), jax.value_and_grad(loss_fn)(*args), rtol=1e-5)

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    def test_sharded_arrays(self, temperature, axis_type):
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))
        losses, where = jax.device_put((LOSSES, self.WHERE), NamedSharding(mesh, P("batch")))
        with jax.set_mesh(mesh):
            actual = masked_value_and_grad(losses, temperature, where)
            weights, _ = jax.jit(attention(temperature).update)(losses, attention(1.0).init())
        chex.assert_trees_all_close(actual, self.expected(temperature), rtol=1e-6)
        assert weights.sharding.spec == P("batch")


def run(attend, batches, **kwargs):
    state, history = attend.init(), []
    for losses in batches:
        weights, state = jax.jit(attend.update)(losses, state, **kwargs)
        history.append(weights)
    return history, state


class TestAttention:
    BATCHES = np.random.default_rng(2).gamma(2.0, size=(12, 16)).astype(np.float32)

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    @pytest.mark.parametrize(("gamma", "alpha"), [(0.9, 1.0), (0.1, 0.5), (1.0, 2.0)])
    def test_weights_and_normalizer(self, temperature, gamma, alpha):
        case, u = Case(temperature, gamma, alpha, 0.0, 0), 0.0
        expected = []
        for losses in self.BATCHES.astype(np.float64):
            weights, u = weigh(losses, u, case, 0)
            expected.append(weights)
        actual, state = run(attention(temperature, gamma=gamma, alpha=alpha), self.BATCHES)
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
        np.testing.assert_allclose(state.log_normalizer, np.log(u / alpha), rtol=1e-5, atol=1e-6)
        assert state.count == len(self.BATCHES)

    def test_off_is_the_mean_and_leaves_the_baseline(self):
        _, state = run(attention(2.0), self.BATCHES)
        attend = attention(jnp.inf)
        weights, after = attend.update(self.BATCHES[0], state._replace(temperature=jnp.inf))
        np.testing.assert_array_equal(weights, np.float32(1 / 16))
        assert after.baseline == state.baseline

    def test_weights_pass_no_gradient(self):
        attend = attention(0.5)

        def loss(losses):
            weights, _ = attend.update(losses, attend.init())
            return (weights * losses).sum(), weights

        grads, weights = jax.grad(loss, has_aux=True)(self.BATCHES[0])
        np.testing.assert_array_equal(grads, weights)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_dtypes(self, dtype):
        (weights, *_), state = run(attention(0.5), jnp.asarray(self.BATCHES, dtype))
        assert weights.dtype == dtype
        assert state.temperature.dtype == state.baseline.dtype == jnp.float32

    def test_state_is_three_scalars_of_stable_dtype(self):
        attend = attention(optax.linear_schedule(1.0, 2.0, 10))
        state = attend.init()
        chex.assert_tree_shape_prefix(state, ())
        assert len(jax.tree.leaves(state)) == 3

        def step(state, losses):
            weights, state = attend.update(losses, state)
            return state, weights

        state, _ = jax.lax.scan(step, state, self.BATCHES)  # scan insists on stable types
        assert state.temperature == 2.0

    @pytest.mark.parametrize("temperature", [0.5, -0.5])
    def test_an_empty_batch_leaves_the_baseline(self, temperature):
        attend = attention(temperature)
        _, state = run(attend, self.BATCHES)
        weights, after = attend.update(
            np.full(16, np.nan, np.float32), state, where=np.zeros(16, bool)
        )
        np.testing.assert_array_equal(weights, 0)
        chex.assert_trees_all_equal(after._replace(count=state.count), state)

    @pytest.mark.parametrize("poison", [np.nan, np.inf])
    def test_a_poisoned_batch_leaves_no_trace(self, poison):
        attend = attention(0.5)
        _, state = run(attend, self.BATCHES)
        losses = self.BATCHES[0].copy()
        losses[3] = poison
        _, after = attend.update(losses, state)
        chex.assert_trees_all_equal(after._replace(count=state.count), state)
        # The published average never comes back from it.
        u = 1.0
        with np.errstate(invalid="ignore"):
            for batch in (losses, *self.BATCHES):
                _, u = weigh(batch, u, Case(0.5, 0.9, 1.0, 0.0, 0), 0)
        assert not np.isfinite(u)

    @pytest.mark.parametrize(
        ("before", "after", "published_steps"), [(5.0, 0.5, 6), (0.5, 5.0, 51), (-1.0, 2.0, 6)]
    )
    def test_baseline_outlives_a_change_of_temperature(self, before, after, published_steps):
        # Of constant losses V is the loss itself, whatever λ: no weight may stray from 1 / n.
        losses = np.full((200, 8), 3.0, np.float32)
        _, state = run(attention(before, gamma=0.1), losses)
        state = state._replace(temperature=jnp.float32(after))
        weights, _ = attention(after, gamma=0.1).update(losses[0], state)
        np.testing.assert_allclose(weights, 1 / 8, rtol=1e-5)

        # The published average is carried as it is. How long until the weights' sum is within a
        # factor of 2 of 1?
        u, sums = np.exp(3.0 / before), []
        for batch in losses.astype(np.float64):
            weights, u = weigh(batch, u, Case(after, 0.1, 1.0, 0.0, 0), 0)
            sums.append(weights.sum())
        assert np.argmax(np.abs(np.log(sums)) < np.log(2)) == published_steps

    @pytest.mark.parametrize("temperature", [1e6, 1e10, -1e10])
    def test_baseline_at_a_large_temperature_is_the_average_of_the_means(self, temperature):
        attend, expected = attention(temperature, gamma=0.1), 2.0
        state = attend.init()._replace(baseline=jnp.float32(expected))
        for losses in self.BATCHES:
            _, state = attend.update(losses, state)
            expected = 0.9 * expected + 0.1 * losses.mean()
        np.testing.assert_allclose(state.baseline, expected, rtol=1e-5)

    def test_one_enormous_loss(self):
        rng = np.random.default_rng(3)
        batches = rng.uniform(0, 2, size=(600, 32))
        batches[200, 0] = 20.0

        def steps_to_recover(sums):
            return int(np.argmax(np.asarray(sums)[201:] > 0.5)) + 1

        published, u = [], 0.0
        for losses in batches:
            weights, u = weigh(losses, u, Case(0.5, 0.1, 1.0, 0.0, 0), 0)
            published.append(weights.sum())
        assert steps_to_recover(published) > 250

        def sums(attend):
            def step(state, losses):
                weights, state = attend.update(losses, state)
                return state, weights.sum()

            return jax.lax.scan(step, attend.init(), jnp.asarray(batches, jnp.float32))[1]

        unbounded = sums(attention(0.5, gamma=0.1))
        np.testing.assert_allclose(unbounded, published, rtol=1e-4)
        bounded = sums(attention(0.5, gamma=0.1, max_jump=3.0))
        assert steps_to_recover(bounded) < 10
        # The bound is not felt by batches within it.
        np.testing.assert_allclose(bounded[:200], published[:200], rtol=1e-4)

    def test_max_jump_bounds_the_soft_minimum_too(self):
        attend = attention(-0.5, gamma=0.1, max_jump=1.0)
        _, state = run(attend, np.full((50, 8), 10.0, np.float32))
        _, after = attend.update(np.zeros(8, np.float32), state)
        np.testing.assert_allclose(
            after.log_normalizer - state.log_normalizer, np.log(0.9 + 0.1 * np.e), rtol=1e-4
        )

    def test_spread_batch(self):
        where = np.random.default_rng(4).random((8, 2)) > 0.4
        attend = attention(0.5)
        losses = self.BATCHES[0]
        expected, expected_state = attend.update(losses, attend.init(), where=where.reshape(-1))
        weights, state = jax.pmap(
            lambda x, m: attend.update(x, attend.init(), where=m, axis_name="batch"),
            axis_name="batch",
        )(losses.reshape(8, 2), where)
        np.testing.assert_allclose(weights.reshape(-1), expected, rtol=1e-6)
        for leaf, single in zip(state, expected_state, strict=True):
            np.testing.assert_array_equal(leaf, np.full(8, leaf[0]))
            np.testing.assert_allclose(leaf[0], single, rtol=1e-6)
