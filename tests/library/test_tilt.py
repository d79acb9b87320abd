import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from absgd_jax import AttentionState, scale_by_attention, Sums, target_ess, tilt, zero_sums
from tests.support.attended import attend, follow, slopes_and_sums
from tests.support.reference import weigh

BATCHES = np.random.default_rng(2).gamma(2.0, size=(60, 16)).astype(np.float32)


NOT_LINEAR = {
    **{"clip": optax.clip(1e-7), "sign": optax.scale_by_sign(), "adam": optax.scale_by_adam()},
    "noise": optax.add_noise(0.1, 0.0, 0),
}


def state_at(temperature, baseline=0.0, averaged=1, dtype=jnp.float32):
    lam, baseline = (jnp.asarray(x, dtype) for x in (temperature, baseline))
    return AttentionState(jnp.int32(1), lam, baseline, jnp.int32(averaged))


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
    def total(losses):
        tilted = tilt(losses, state, Sums())
        return tilted.sum(), tilted

    slope, tilted = jax.grad(total, has_aux=True)(losses)
    return tilted, slope


class TestTilt:
    @pytest.mark.parametrize(
        ("temperature", "shape"), [(0.5, (1,)), (2.0, (16,)), (-1.0, (2, 2, 4))]
    )
    def test_value_and_slope(self, temperature, shape):
        losses = np.resize(BATCHES[0], shape)
        tilted, slope = value_and_slope(losses, state_at(temperature, 1.5))
        np.testing.assert_array_equal(tilted, losses)
        expected = np.exp((np.float64(losses) - 1.5) / temperature)
        np.testing.assert_allclose(slope, expected, rtol=1e-5)

    @pytest.mark.parametrize("temperature", [np.inf, -1e30])
    def test_is_the_identity_at_an_infinite_temperature(self, temperature):
        tilted, slope = value_and_slope(BATCHES, state_at(temperature, 1.5))
        np.testing.assert_array_equal(tilted, BATCHES)
        np.testing.assert_array_equal(slope, np.ones_like(BATCHES))

    @pytest.mark.parametrize("temperature", [1.0, -1.0, np.inf])
    @pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
    def test_a_loss_that_is_not_finite_has_the_slope_1(self, loss, temperature):
        tilted, slope = value_and_slope(np.float32([loss]), state_at(temperature))
        np.testing.assert_array_equal(tilted, loss)
        assert slope == 1

    @pytest.mark.parametrize("temperature", [0.7, -0.7])
    def test_sums(self, temperature):
        """By the weights that the loop gives the examples, in units of 2^-20."""
        weights = np.random.default_rng(5).uniform(size=16)
        _, sums = slopes_and_sums(
            jnp.asarray(BATCHES[0]),
            state_at(temperature, 1.5),
            lambda x: jnp.sum(jnp.float32(weights) * x),
        )
        z = (np.float64(BATCHES[0]) - 1.5) / temperature
        terms = np.exp(z), np.expm1(z), np.expm1(z) ** 2, z * np.exp(z) - np.expm1(z), z, 0, 1
        total = np.sum(weights)
        expected = [*(np.sum(weights * f) for f in terms), 1.5 * total, total / temperature, 0]
        np.testing.assert_allclose(2**20 * sums.values, expected, rtol=1e-5)

    @pytest.mark.parametrize("temperature", [1e-6, -1e-6, 1.0, -1.0, 1e10, 1e29, np.inf])
    @pytest.mark.parametrize("loss", [3e38, 1e30, -1e30, -3e38])
    def test_is_finite_and_pulls_for_any_finite_loss(self, temperature, loss):
        """And neither the slopes nor the sums overflow in a norm over 2^20 gradients."""
        slope, sums = slopes_and_sums(jnp.float32([loss]), state_at(temperature, 1.5))
        assert 0 < slope < 2.0**54
        assert jnp.all(abs(sums.values) < 2.0**80)

    @pytest.mark.parametrize("temperature", [0.5, -0.5, np.inf])
    def test_further_derivatives(self, temperature, x64):
        """Of slopes and sums, by losses and by the state."""
        losses = jnp.float64(BATCHES[0])

        def first_derivatives(losses, lam, baseline):
            state = state_at(lam, baseline, dtype=jnp.float64)
            return slopes_and_sums(losses, state)

        args = (losses,) if np.isinf(temperature) else (losses, temperature, 1.5)
        rest = (temperature, 1.5)[len(args) - 1 :]
        check_grads(jax.jit(lambda *x: first_derivatives(*x, *rest)), args, order=1)


class TestOutOfSight:
    """Batches that are all far from V: it starts again from their mean."""

    @pytest.mark.parametrize("temperature", [1.0, -0.3])
    @pytest.mark.parametrize("at", [0, 20])
    @pytest.mark.parametrize("jump", [50.0, -50.0, 1000.0, -1000.0])
    def test_weights_are_right_from_the_second_or_third_batch_on(self, jump, at, temperature):
        """In the midst of training one such batch may be an accident; the second one isn't."""
        batches = BATCHES.copy()
        batches[at:] += np.float32(jump)
        at = at and at + 1
        weights, states = run(batches, np.full(60, temperature, np.float32), 0.1)
        # As of the published algorithm where u, too, starts from the mean at that batch.
        baseline, expected = batches[at].mean(dtype=np.float64), []
        for losses in batches[at + 1 :]:
            p, baseline = weigh(losses, baseline, temperature, 0.1)
            expected.append(p)
        expected = np.stack(expected)
        np.testing.assert_allclose(weights[at + 1 :], expected, atol=2e-3 * expected.max())
        np.testing.assert_allclose(states.baseline[-1], baseline, rtol=1e-3)

    @pytest.mark.parametrize("temperature", [1.0, -1.0])
    @pytest.mark.parametrize("jump", [100.0, -100.0, 1e30, -1e30])
    def test_one_alone_leaves_no_trace(self, jump, temperature):
        tx, batches = scale_by_attention(temperature), BATCHES.copy()
        batches[20] += np.float32(jump)
        weights, states = follow(tx, batches)
        expected, without = follow(tx, np.delete(batches, 20, axis=0))
        np.testing.assert_array_equal(states.baseline[21:22], without.baseline[20:21])
        np.testing.assert_allclose(weights[22:], expected[21:], rtol=0.1, atol=1e-3)


class TestSumsThatDoNotFit:
    """They make the updates NaN, so that training doesn't go on by the wrong weights."""

    @pytest.mark.parametrize("tilted", [0.5, 5.0, -0.5, np.inf])
    @pytest.mark.parametrize("averaged", [0, 1])
    def test_tilted_with_another_temperature(self, tilted, averaged):
        tx, state = scale_by_attention(1.0), state_at(tilted, 1.5, averaged)
        slopes, sums = slopes_and_sums(jnp.asarray(BATCHES[0]), state)
        for lam in (1.0, -1.0, np.inf):
            other = state._replace(temperature=jnp.float32(lam))
            weights, after = tx.update(slopes, other, sums=sums)
            assert np.all(np.isfinite(weights) if lam == tilted else np.isnan(weights))
            assert lam == tilted or after.baseline == state.baseline

    @pytest.mark.parametrize("temperature", [1.0, -1.0, np.inf])
    def test_tilted_log_likelihoods(self, temperature):
        """Their mean, negated, has the weights of -λ."""
        tx, state = scale_by_attention(temperature), state_at(temperature, 1.5)
        slopes, sums = slopes_and_sums(-jnp.asarray(BATCHES[0]), state, lambda x: -x.mean())
        weights, after = tx.update(slopes, state, sums=sums)
        assert np.all(np.isnan(weights))
        assert after.baseline == state.baseline

    @pytest.mark.parametrize("front", NOT_LINEAR)
    @pytest.mark.usefixtures("users_promotion")
    def test_behind_something_that_is_not_linear(self, front):
        front = NOT_LINEAR[front]
        params = {"net": jnp.ones(16), "sums": zero_sums()}
        tx = optax.chain(front, scale_by_attention(0.7))
        opt_state = tx.init(params)

        def loss_fn(params):
            return tilt(params["net"] * BATCHES[0], opt_state, params).mean()

        updates, _ = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        assert np.isnan(updates["net"]).all()

    @pytest.mark.parametrize("total", [0.0, 1e-6, -1e-6, 0.1])
    def test_of_weights_of_both_signs(self, total):
        """As of advantages. At an infinite λ the step is SGD's, and V stays."""
        weights = np.random.default_rng(7).normal(size=16)
        weights += total / 16 - weights.mean()
        for lam in (1.0, -1.0, np.inf):
            tx, state = scale_by_attention(lam), state_at(lam, 1.5)
            slopes, sums = slopes_and_sums(
                jnp.asarray(BATCHES[0]), state, lambda x: jnp.sum(jnp.float32(weights) * x)
            )
            updates, after = tx.update(slopes, state, sums=sums)
            assert after.baseline == state.baseline
            if np.isinf(lam):
                np.testing.assert_array_equal(updates, slopes)
            else:
                assert np.isnan(updates).all()

    @pytest.mark.parametrize("factor", [0.5, 2.0])
    def test_of_which_one_was_scaled(self, factor):
        tx, state = scale_by_attention(1.0), state_at(1.0, 1.5)
        slopes, sums = slopes_and_sums(jnp.asarray(BATCHES[0]), state)
        sums = Sums(sums.values.at[0].multiply(factor))  # that of exp(z)
        assert np.isnan(tx.update(slopes, state, sums=sums)[0]).all()

    @pytest.mark.parametrize("temperature", [1.0, np.inf])
    def test_beside_a_penalty_that_is_not_finite(self, temperature):
        """Of every leaf, as their norms are, whose gradient is NaN where a leaf is 0."""
        tx, state = scale_by_attention(temperature), state_at(temperature, 1.5)
        slopes, sums = slopes_and_sums(jnp.asarray(BATCHES[0]), state)
        weights, after = tx.update(slopes, state, sums=Sums(sums.values + np.nan))
        assert np.isnan(weights).all()
        assert after.baseline == state.baseline


class TestOneLossFarAbove:
    @pytest.mark.parametrize("temperature", [0.1, 2.0, 50.0, -2.0])
    @pytest.mark.parametrize(("at", "largest"), [(0, 1e30), (1, 1e30), (20, 1e30), (20, 1e3)])
    def test_is_over_within_60_steps(self, at, largest, temperature):
        batches = np.concatenate([BATCHES, BATCHES])
        lams = np.full(120, temperature, np.float32)
        expected, without = run(batches, lams)
        batches[at, 0] = largest
        weights, states = run(batches, lams)
        assert np.all(np.isfinite(weights))
        after = slice(at + 60, None)
        atol = 1e-6 * abs(temperature)
        np.testing.assert_allclose(states.baseline[after], without.baseline[after], atol=atol)
        np.testing.assert_allclose(weights[after], expected[after], rtol=1e-5)

    def test_is_over_at_once_where_jumps_are_bounded(self):
        batches = np.random.default_rng(3).uniform(0, 2, size=(600, 32)).astype(np.float32)
        batches[200, 0] = 10.0
        unbounded, _ = follow(scale_by_attention(0.5, gamma=0.1), batches)
        bounded, _ = follow(scale_by_attention(0.5, gamma=0.1, max_jump=3.0), batches)
        assert np.all(unbounded[201:300].sum(axis=1) < 0.5)
        assert np.all(bounded[210:].sum(axis=1) > 0.4)
        # The bound is not felt by batches within it.
        np.testing.assert_allclose(bounded[:200], unbounded[:200], rtol=1e-3)

    def test_the_bound_on_jumps_is_one_of_falls_where_easy_examples_lead(self):
        tx = scale_by_attention(-0.5, gamma=0.1, max_jump=1.0)
        _, states = follow(tx, np.full((50, 8), 8.0, np.float32))
        state = jax.tree.map(lambda x: x[-1], states)
        weights, after = attend(tx, jnp.zeros(8), state)
        rise = np.log(0.9 + 0.1 * np.e)
        np.testing.assert_allclose((after.baseline - state.baseline) / -0.5, rise, rtol=1e-4)
        np.testing.assert_allclose(weights.sum(), np.exp(1 - rise), rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, target_ess(0.9, init_value=1.0)])
def test_weights_after_a_batch_out_of_sight(temperature):
    """A bias-corrected γ is what it was before that batch, and never above 1."""
    tx = scale_by_attention(temperature, gamma=0.1, debias=True)
    level = np.array([50, 50, 50, 25, 34, 34, 50, 50, 50])[:, None]
    weights, states = follow(tx, np.float32(level + np.linspace(-0.1, 0.1, 8)))
    assert np.all(weights >= 0)
    assert np.all(np.isfinite(states.baseline))
    np.testing.assert_array_equal(states.averaged[:5], [0, 1, 2, 3, -3])


@pytest.mark.parametrize("gamma", [0.1, 0.9])
def test_through_an_infinite_temperature(gamma):
    """V follows the mean meanwhile, so that λ finds it where the losses are."""
    lams = jnp.float32([2.0] * 10 + [np.inf] * 20 + [-np.inf] * 20 + [-1.0] * 10)
    batches = BATCHES * np.linspace(3, 0.3, 60, dtype=np.float32)[:, None]
    weights, states = run(batches, lams, gamma)
    expected = states.baseline[9]
    for losses in batches[10:50]:
        expected += gamma * (losses.mean() - expected)
    np.testing.assert_allclose(states.baseline[49], expected, rtol=1e-5)
    np.testing.assert_allclose(weights[10:50], 1 / 16, rtol=1e-6)
    assert np.all(np.abs(np.log(weights[50:53].sum(axis=1))) < np.log(4))


class TestPoison:
    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("temperature", [0.5, 2.0, -0.5, -2.0, np.inf])
    @pytest.mark.parametrize("averaged", [0, 1])
    def test_leaves_no_trace(self, poison, temperature, averaged):
        """In V. The slopes of the others stay, and in a first weighted batch nothing pulls."""
        tx, state = scale_by_attention(temperature, alpha=2.0), state_at(temperature, 1.5, averaged)
        slopes, sums = slopes_and_sums(jnp.asarray(BATCHES[0]).at[3].set(poison), state)
        weights, after = tx.update(slopes, state, sums=sums)
        chex.assert_trees_all_equal(after, state._replace(count=state.count + 1))
        scale = 1 if np.isinf(temperature) else averaged / 2
        np.testing.assert_allclose(weights, scale * slopes, rtol=1e-6)

    @pytest.mark.parametrize("temperature", [0.5, -0.5, np.inf])
    @pytest.mark.parametrize("averaged", [0, 1])
    def test_nothing_that_counts_leaves_no_trace(self, temperature, averaged):
        """A batch that is masked whole; or zeros that were passed back, or a forgotten tilt."""
        tx, state = scale_by_attention(temperature), state_at(temperature, 1.5, averaged)
        for sums in (
            slopes_and_sums(jnp.asarray(BATCHES[0]), state, lambda x: jnp.sum(0 * x))[1],
            zero_sums(),
        ):
            updates, after = tx.update({"w": jnp.ones(3)}, state, sums=sums)
            chex.assert_trees_all_equal(after._replace(count=state.count), state)
            np.testing.assert_array_equal(updates["w"], np.zeros(3))
