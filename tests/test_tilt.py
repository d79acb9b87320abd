import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from absgd_jax import AttentionState, scale_by_attention, tilt
from tests.support.attended import attend, follow
from tests.support.reference import published

BATCHES = np.random.default_rng(2).gamma(2.0, size=(60, 16)).astype(np.float32)
PLAIN_FIRST = 3  # batches


def state_at(temperature, baseline=0.0, averaged=1, dtype=jnp.float32):
    lam, baseline = (jnp.asarray(x, dtype) for x in (temperature, baseline))
    return AttentionState(jnp.int32(1), lam, baseline, jnp.int32(averaged), lam)


@jax.jit
def run(batches, temperatures, gamma=0.9):
    """Weights and states, with a λ for every batch."""
    tx = scale_by_attention(1.0, gamma=gamma)

    def step(state, each):
        losses, lam = each
        state = state._replace(temperature=lam)
        weights, new = attend(tx, losses, state)
        return new, (weights, new)

    return jax.lax.scan(step, tx.init(None), (batches, temperatures))[1]


@jax.jit
def value_and_slope(losses, state):
    return tilt(losses, state), jax.grad(lambda x: tilt(x, state).sum())(losses)


def stages(temperature, plain=0, n=60):
    return jnp.where(jnp.arange(n) < plain, jnp.inf, jnp.float32(temperature))


class TestTilt:
    @pytest.mark.parametrize("temperature", [0.5, 2.0, -0.5, -2.0])
    @pytest.mark.parametrize("shape", [(), (16,), (4, 4), (2, 2, 4)])
    def test_value_and_slope(self, temperature, shape):
        losses = np.resize(BATCHES[0], shape)
        z = (np.float64(losses) - 1.5) / temperature
        tilted, slope = value_and_slope(losses, state_at(temperature, 1.5))
        np.testing.assert_allclose(tilted, 1.5 + temperature * np.expm1(z), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(slope, np.exp(z), rtol=1e-5)

    def test_first_weighted_batch(self):
        losses = BATCHES[0]
        tilted, _ = value_and_slope(losses, state_at(-0.1, 1.5, averaged=0))
        np.testing.assert_allclose(tilted, -0.1 * np.exp((losses - 1.5) / -0.1), rtol=1e-4)

    @pytest.mark.parametrize("temperature", [np.inf, -np.inf, 1e30, -1e30])
    @pytest.mark.parametrize("averaged", [0, 1])
    def test_is_the_losses_at_an_infinite_temperature(self, temperature, averaged):
        tilted, slope = value_and_slope(BATCHES, state_at(temperature, 1.5, averaged))
        np.testing.assert_array_equal(tilted, BATCHES)
        np.testing.assert_array_equal(slope, np.ones_like(BATCHES))

    @pytest.mark.parametrize("temperature", [1e8, -1e8])
    def test_meets_the_mean(self, temperature):
        tilted, _ = value_and_slope(BATCHES[0], state_at(temperature, 1.5))
        np.testing.assert_allclose(tilted, BATCHES[0], rtol=1e-6, atol=2e-7)

    @pytest.mark.parametrize("temperature", [0.5, -0.5, np.inf])
    def test_twice_differentiable(self, temperature, x64):
        state = state_at(temperature, 1.5, dtype=jnp.float64)
        check_grads(jax.jit(lambda x: tilt(x, state)), (jnp.float64(BATCHES[0]),), order=2)

    @pytest.mark.parametrize("temperature", [1e-6, -1e-6, 1.0, -1.0, 1e10, 1e29])
    @pytest.mark.parametrize("loss", [3e38, 1e30, -1e30, -3e38])
    def test_is_finite_and_pulls_for_any_finite_loss(self, temperature, loss):
        """A batch of 2^20 of them, too."""
        value, slope = value_and_slope(loss, state_at(temperature, 1.5))
        assert abs(value) < 1.001 * 2.0**108  # float32 ends at 2^128
        assert 0 < slope < np.inf

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_dtypes(self, dtype, x64):
        losses = jnp.asarray(BATCHES, dtype)
        state = state_at(0.5, 1.5, dtype=jnp.float64)
        tilted, slope = jax.eval_shape(value_and_slope, losses, state)
        assert tilted.dtype == ("float64" if dtype == "float64" else "float32")
        assert slope.dtype == dtype

    def test_finds_the_state_anywhere(self):
        tx = optax.chain(optax.clip(1.0), optax.apply_if_finite(scale_by_attention(0.5), 3))
        expected = tilt(BATCHES, scale_by_attention(0.5).init(None))
        np.testing.assert_array_equal(tilt(BATCHES, tx.init(jnp.ones(3))), expected)

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    def test_keeps_the_sharding(self, axis_type):
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))
        losses = jax.device_put(BATCHES[0], NamedSharding(mesh, P("batch")))
        with jax.set_mesh(mesh):
            assert jax.jit(tilt)(losses, state_at(0.5)).sharding.spec == P("batch")


class TestPublished:
    """Weights and V are those of the published algorithm, which float32 alone can't compute."""

    @pytest.mark.parametrize("gamma", [0.1, 0.9, 1.0])
    @pytest.mark.parametrize("plain", [0, PLAIN_FIRST])
    @pytest.mark.parametrize(
        ("scale", "shift", "temperatures", "tolerance"),
        [
            (1, 0, (0.5, 5.0, -0.5, -5.0, 100.0, -100.0), 1e-5),
            (0.1, 0, (0.02, -0.02), 2e-3),
            (30, 0, (30.0, -5.0), 2e-5),
            (1, -50, (2.0, -2.0, 0.7), 2e-4),
        ],
        ids=["plain", "small_temperature", "times_30", "minus_50"],
    )
    def test_weights_and_baseline(self, scale, shift, temperatures, tolerance, plain, gamma):
        batches = (scale * BATCHES + shift).astype(np.float32)
        for temperature in temperatures:
            lams = stages(temperature, plain)
            weights, states = run(batches, lams, gamma)
            expected, baselines = published(batches, lams, gamma)
            sums = expected.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(weights / sums, expected / sums, atol=tolerance)
            np.testing.assert_allclose(
                states.baseline[plain:], baselines[plain:], rtol=5e-5, atol=1e-5
            )

    @pytest.mark.parametrize("temperature", [5.0, -5.0, 1.0, -1.0])
    def test_losses_far_from_0(self, temperature):
        """Plain batches bring V to them, or the first weighted ones do in a few steps."""
        batches = BATCHES + np.float32(1000)
        expected, _ = published(batches, stages(temperature, PLAIN_FIRST), 0.9)
        weights, _ = run(batches, stages(temperature, PLAIN_FIRST))
        np.testing.assert_allclose(weights, expected, atol=1e-4 * expected.max())
        weights, _ = run(batches, stages(temperature))
        np.testing.assert_allclose(weights[50:], expected[50:], atol=2e-4 * expected.max())
        assert np.all(np.isfinite(weights))
        assert np.all(weights.sum(axis=1) > 1e-3)

    @pytest.mark.parametrize("temperature", [0.02, -0.02])
    def test_exponents_out_of_float32(self, temperature):
        """Where the published code has overflowed some example pulls in every batch."""
        for plain in (0, PLAIN_FIRST):
            weights, states = run(BATCHES, stages(temperature, plain), 1.0)
            np.testing.assert_allclose(weights[plain + 5 :].sum(axis=1), 1, rtol=1e-4)
            assert np.all(np.isfinite(states.baseline))

    @pytest.mark.parametrize("temperature", [1e8, -1e8])
    def test_a_large_temperature_averages_the_means(self, temperature):
        tx = scale_by_attention(temperature, gamma=0.1)
        weights, states = follow(tx, BATCHES, state_at(temperature, 2.0))
        np.testing.assert_allclose(weights, 1 / 16, rtol=1e-6)
        expected = 2.0
        for losses in BATCHES:
            expected = 0.9 * expected + 0.1 * losses.mean()
        np.testing.assert_allclose(states.baseline[-1], expected, rtol=1e-5)

    @pytest.mark.parametrize("temperature", [1e-6, -1e-6, 1.0, -1.0, 1e20, np.inf])
    @pytest.mark.parametrize("gamma", [0.01, 0.9, 1.0])
    def test_enormous_losses(self, temperature, gamma):
        """Of both signs, in turn: weights and V are finite, and no weight is lost for good."""
        batches = np.resize(np.float32([1e30, -1e30, 3e38, 0.0, -3e38]), (12, 16))
        weights, states = run(np.concatenate([batches, BATCHES]), stages(temperature, 0, 72), gamma)
        assert np.all(np.isfinite(weights))
        assert np.all(weights >= 0)
        assert np.all(np.isfinite(states.baseline))


class TestOneLossFarAbove:
    @pytest.mark.parametrize("temperature", [0.5, 2.0, -0.5])
    @pytest.mark.parametrize("at", [0, 10, 25])
    @pytest.mark.parametrize("largest", [1e3, 1e30])
    def test_is_over_within_60_steps(self, largest, at, temperature):
        batches = np.concatenate([BATCHES, BATCHES])
        lams = stages(temperature, 0 if at < 20 else 20, len(batches))
        expected, _ = run(batches, lams)
        batches[at, 0] = largest
        weights, _ = run(batches, lams)
        after = slice(at + 60, None)
        np.testing.assert_allclose(weights[after], expected[after], atol=0.02 * expected.max())

    def test_is_over_at_once_where_jumps_are_bounded(self):
        batches = np.random.default_rng(3).uniform(0, 2, size=(600, 32)).astype(np.float32)
        batches[200, 0] = 20.0
        expected, _ = published(batches, 0.5, 0.1)

        def steps_to_recover(weights):
            return int(np.argmax(weights.sum(axis=1)[201:] > 0.5)) + 1

        assert steps_to_recover(expected) > 250
        unbounded, _ = follow(scale_by_attention(0.5, gamma=0.1), batches)
        np.testing.assert_allclose(unbounded, expected, rtol=1e-3)
        bounded, _ = follow(scale_by_attention(0.5, gamma=0.1, max_jump=3.0), batches)
        assert steps_to_recover(bounded) < 10
        # The bound is not felt by batches within it.
        np.testing.assert_allclose(bounded[:200], expected[:200], rtol=1e-3)

    def test_the_bound_on_jumps_is_one_of_falls_where_easy_examples_lead(self):
        tx = scale_by_attention(-0.5, gamma=0.1, max_jump=1.0)
        _, states = follow(tx, np.full((50, 8), 10.0, np.float32))
        state = jax.tree.map(lambda x: x[-1], states)
        weights, after = attend(tx, jnp.zeros(8), state)
        rise = np.log(0.9 + 0.1 * np.e)
        np.testing.assert_allclose((after.baseline - state.baseline) / -0.5, rise, rtol=1e-4)
        np.testing.assert_allclose(weights.sum(), np.exp(1 - rise), rtol=1e-4)


class TestChangeOfTemperature:
    @pytest.mark.parametrize(
        ("before", "after", "published_steps"), [(5.0, 0.5, 6), (0.5, 5.0, 51), (-1.0, 2.0, 6)]
    )
    def test_baseline_outlives_it(self, before, after, published_steps):
        # Of constant losses V is the loss itself, whatever λ: no weight may stray from 1 / n.
        losses = np.full((200, 8), 3.0, np.float32)
        lams = jnp.where(jnp.arange(200) < 150, before, jnp.float32(after))
        weights, _ = run(losses, lams, 0.1)
        np.testing.assert_allclose(weights[150:], 1 / 8, rtol=1e-4)

        # The published average is carried as it is. How long until the weights' sum is within a
        # factor of 2 of 1?
        u, sums = np.exp(3.0 / before), []
        for batch in np.float64(losses):
            tilted = np.exp(batch / after)
            u = 0.9 * u + 0.1 * tilted.mean()
            sums.append(tilted.mean() / u)
        assert np.argmax(np.abs(np.log(sums)) < np.log(2)) == published_steps

    def test_through_infinity(self):
        """U is not updated meanwhile, and V, a loss, is what λ finds again."""
        lams = jnp.float32([2.0] * 20 + [np.inf] * 10 + [-np.inf] * 10 + [-1.0] * 20)
        weights, states = run(BATCHES, lams)
        expected, _ = published(BATCHES, lams, 0.9)
        np.testing.assert_allclose(weights, expected, rtol=1e-4)
        np.testing.assert_array_equal(states.baseline[20:40], states.baseline[19])
        np.testing.assert_array_equal(states.averaged, np.cumsum(np.isfinite(lams)))


class TestPoison:
    @pytest.mark.parametrize("poison", [0.0, np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("temperature", [0.5, 2.0, -0.5, -2.0, np.inf])
    def test_leaves_no_trace(self, poison, temperature):
        """A value of exactly 0, as the usual mean over nothing is, or one that is not finite."""
        tx = scale_by_attention(temperature)
        for state in (tx.init(None), state_at(temperature, 1.5)):
            value = jnp.float32(poison)
            updates, after = tx.update({"w": jnp.ones(3)}, state, value=value)
            chex.assert_trees_all_equal(updates, {"w": jnp.ones(3)})
            chex.assert_trees_all_equal(after, state._replace(count=state.count + 1))

    @pytest.mark.parametrize("temperature", [0.5, -0.5, np.inf])
    @pytest.mark.parametrize("averaged", [0, 1])
    def test_a_mean_over_nothing_leaves_no_trace(self, temperature, averaged):
        tx, where = scale_by_attention(temperature), jnp.zeros(16, bool)
        state = state_at(temperature, 1.5, averaged)

        def mean(x):
            return jnp.sum(x, where=where) / jnp.maximum(where.sum(dtype=jnp.float32), 1)

        weights, after = attend(tx, jnp.asarray(BATCHES[0]), state, mean)
        np.testing.assert_array_equal(weights, 0)
        chex.assert_trees_all_equal(after._replace(count=state.count), state)

    def test_its_value_may_be_the_baseline_too(self):
        tx, state = scale_by_attention(0.5), state_at(0.5, 1.5)
        _, after = tx.update(None, state, value=1.5)
        assert after.baseline == state.baseline
