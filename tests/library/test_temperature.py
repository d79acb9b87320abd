import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from absgd_jax import (
    get_temperature,
    robust_loss,
    scale_by_attention,
    target_ess,
    target_kl,
    two_stage,
)
from tests.support.attended import attend, follow, slopes_and_sums
from tests.support.reference import divergences, tune

ESS, KL = functools.partial(target_ess, 0.5), functools.partial(target_kl, 0.3)
TARGETS = {"ess": (ESS, {"ess": 0.5}), "kl": (KL, {"kl": 0.3})}
BATCHES = np.random.default_rng(0).exponential(size=(600, 128)).astype(np.float32)
LEANS = {"hard": 1.0, "easy": -1.0}
in_both_ways = pytest.mark.parametrize("make", [ESS, KL], ids=["ess", "kl"])
either_sign = pytest.mark.parametrize("sign", LEANS.values(), ids=LEANS)


def staged(**kwargs):
    return two_stage(ESS(**kwargs), 20)


def reached(losses, lam):
    """1 / ESS - 1 and KL, in float64."""
    z = np.float64(losses) / lam
    return divergences(np.exp(z - z.max()))


@functools.partial(jax.jit, static_argnums=0)
def tune_jit(make, init_value, batches, first):
    tx = scale_by_attention(make(init_value=init_value))
    state = tx.init(None)
    if first is not None:
        state = state._replace(temperature=jnp.asarray(first, state.baseline.dtype))
    return follow(tx, batches, state)[1].temperature


def tuned(make, batches=BATCHES, *, init_value=np.inf, first=None):
    """λ before each batch, and after the last one. Of fewer batches it is the beginning."""
    return np.asarray(tune_jit(make, init_value, batches, first))


@pytest.mark.usefixtures("users_promotion")  # optax's schedules need it
class TestGiven:
    """Numbers, arrays and schedules."""

    def test_loss_and_update_share_it(self):
        """Of one constant loss V is that loss at every temperature."""
        batches = np.full((10, 4), 4.0, np.float32)
        weights, _ = follow(scale_by_attention(optax.linear_schedule(1.0, 9.0, 8)), batches)
        np.testing.assert_allclose(weights[-1], 1 / 4, rtol=1e-4)

    @pytest.mark.parametrize(
        "decay",
        [optax.linear_schedule(5.0, 0.0, 8), optax.cosine_decay_schedule(5.0, 8)],
        ids=["linear", "cosine"],
    )
    def test_decay_to_0_stops_short_of_it(self, decay):
        @jax.jit
        def run(sign):
            return follow(scale_by_attention(lambda count: sign * decay(count)), BATCHES[:20])

        for sign in (1, -1):
            weights, states = run(sign)
            assert np.all(np.isfinite(weights))
            assert np.mean(weights[9:].sum(axis=1) > 0.1) > 0.8
            assert states.temperature[-1] == sign * np.float32(1e-6)

    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_a_traced_0_is_the_smallest_of_its_sign(self, zero):
        @jax.jit
        def step(zero):
            tx = scale_by_attention(zero)
            return attend(tx, jnp.asarray(BATCHES[0]), tx.init(None))

        weights, state = step(zero)
        assert np.all(np.isfinite(weights))
        assert get_temperature(state) == np.copysign(np.float32(1e-6), zero)


class TestTwoStage:
    @either_sign
    def test_automatic(self, sign):
        """The last plain batch puts λ in its place."""
        lams = tuned(staged, init_value=sign * np.inf)
        np.testing.assert_array_equal(lams[:20], np.full(20, sign * np.inf))
        np.testing.assert_allclose(lams[20], sign * BATCHES[19].std(), rtol=1e-5)
        assert 0.3 < lams[39] / lams[20] < 3  # near where it belongs

    def test_automatic_from_a_number(self):
        lams = tuned(staged, init_value=-3.0)
        np.testing.assert_array_equal(lams[:21], [-np.inf] * 20 + [-3.0])
        expected = tuned(ESS, np.roll(BATCHES, -20, axis=0), init_value=-3.0)
        np.testing.assert_allclose(lams[20:60], expected[:40], rtol=1e-5)


class TestTarget:
    @either_sign
    @pytest.mark.parametrize(("make", "index", "target"), [(ESS, 0, 1.0), (KL, 1, 0.3)])
    def test_is_held(self, make, index, target, sign):
        """In the mean of the logarithm over batches that it has not seen before."""
        lams = tuned(make, init_value=sign * np.inf)
        assert np.all(np.sign(lams) == sign)
        pairs = zip(BATCHES[100:], lams[100:], strict=False)
        found = [reached(batch, lam)[index] for batch, lam in pairs]
        assert np.exp(np.mean(np.log(found))) == pytest.approx(target, rel=0.03)

    @either_sign
    @in_both_ways
    @pytest.mark.parametrize("factor", [0.01, 100.0])
    def test_settles_within_50_steps(self, make, factor, sign):
        batches = BATCHES[:, :16]
        settled = np.log(np.abs(tuned(make, batches, first=sign * np.inf)[100:]))
        level, spread = settled.mean(), settled.std()
        lams = tuned(make, batches, first=factor * sign * np.exp(level))[:61]
        # From there on it strays from its level no further than it always does, or a little.
        assert np.abs(np.log(np.abs(lams[50:])) - level).max() < max(4 * spread, 0.15)

    @either_sign
    def test_kl_is_the_dual_variable(self, sign, x64):
        """λ of the radius solves the dual problem, and its weights the primal one."""
        losses, radius = np.float64(BATCHES[0]), 0.3
        lam = tuned(KL, np.stack([losses] * 400), init_value=sign * np.inf)[-1]
        grid = lam * np.exp(np.linspace(-1, 1, 20001))
        dual = jax.jit(jax.vmap(lambda t: robust_loss(losses, t) + t * radius))(grid)
        best = np.argmin(sign * dual)
        np.testing.assert_allclose(grid[best], lam, rtol=1e-3)
        weights = np.array(jax.jit(jax.grad(robust_loss))(losses, lam))
        np.testing.assert_allclose(divergences(weights)[1], radius, rtol=1e-9)
        np.testing.assert_allclose(np.sum(weights * losses), dual[best], rtol=1e-6)

    @pytest.mark.parametrize("scale", [1e-3, 1e3])
    def test_follows_the_scale_of_the_losses_and_not_their_shift(self, scale):
        moved = np.float32(scale) * (BATCHES + np.float32(5))
        actual, expected = tuned(ESS, moved)[1:101], tuned(ESS)[1:101]
        np.testing.assert_allclose(actual / scale, expected, rtol=1e-3)


@pytest.mark.parametrize(("make", "target"), TARGETS.values(), ids=TARGETS)
def test_one_update_is_that_of_the_formula(make, target):
    """In float64, wherever V stands."""
    where = np.random.default_rng(1).random(128) > 0.4
    losses, tx = jnp.where(where, BATCHES[0], jnp.nan), scale_by_attention(make())

    @jax.jit
    def one_step(lam, baseline):
        state = tx.init(None)._replace(temperature=lam, baseline=baseline)
        return attend(tx, losses, state, lambda x: jnp.mean(x, where=where))[1].temperature

    for lam in (0.4, 3.0, 1e3, 1e5, np.inf, -0.4, -3.0, -1e5, -np.inf):
        expected, _ = tune(BATCHES[0][where], lam, **target)
        for baseline in (0.0, 1.0):
            np.testing.assert_allclose(one_step(lam, baseline), expected, rtol=1e-4)


class TestDegenerate:
    @in_both_ways
    @pytest.mark.parametrize("losses", [[2.5, 2.5], [2.5], [1.0, np.nan], [1.0, np.inf]])
    def test_batch_leaves_it(self, losses, make):
        for lam in (1.5, -1.5, np.inf, -np.inf):
            assert tuned(make, np.float32([losses]), first=lam)[1] == np.float32(lam)

    @pytest.mark.parametrize(("n", "k"), [(3, 1), (129, 3), (1536, 3), (3000, 1)])
    def test_equal_losses_leave_it_whatever_their_sums_round_to(self, n, k):
        """As with any head that starts at zero: all losses are log C."""

        def after(make, loss):
            tx = scale_by_attention(make())
            state = tx.init(None)
            for _ in range(2):  # the first from a V of 0
                parts = jnp.split(jnp.full(n, loss), k)
                sums = [slopes_and_sums(part, state)[1] for part in parts]
                sums = jax.tree.map(lambda *x: sum(x), *sums)
                _, state = tx.update(None, state, sums=sums)
            return get_temperature(state)

        run = jax.jit(lambda loss: [after(make, loss) for make in (ESS, KL)])
        levels = np.log(np.float32([2, 3, 7, 10, 37, 100, 1000]))
        np.testing.assert_array_equal([run(x) for x in levels], np.inf)

    @either_sign
    @in_both_ways
    def test_targets_out_of_reach_of_a_small_batch(self, make, sign):
        """Half of two examples is one: λ would fall to 0."""
        lams = tuned(make, BATCHES[:, :2], init_value=sign * np.inf)
        assert np.all(np.abs(lams[50:]) > 0.02)

    def test_losses_that_hardly_differ(self):
        """Their χ² over its target is below the smallest normal number."""
        tx = scale_by_attention(target_ess(0.1, init_value=-jnp.inf))
        update = jax.jit(lambda x: attend(tx, x, tx.init(None))[1])
        for size in 10.0 ** np.linspace(-22, -15, 200):
            state = update(jnp.float32(size * np.linspace(-1, 1, 24)))
            assert get_temperature(state) < 0
        assert np.isfinite(get_temperature(state))

    @pytest.mark.parametrize("others", ["equal", "spread"])
    def test_stops_falling_where_ties_make_the_target_unreachable(self, others):
        """And the losses that come after the ties have their weights back within a few steps."""
        ties = np.zeros((400, 128), np.float32)
        far = np.random.default_rng(4).exponential(size=(400, 32))
        ties[:, 96:] = 3 if others == "equal" else far
        tx = scale_by_attention(target_ess(0.6, init_value=-jnp.inf))
        weights, states = follow(tx, np.concatenate([ties, BATCHES[:150]]))
        lams = states.temperature
        assert lams[400] < (-0.2 if others == "equal" else -1e-4)
        if others == "equal":
            assert lams[400] == lams[100]
        sums = weights.sum(axis=1)
        assert np.all((sums[405:] > 0.3) & (sums[405:] < 2))
        settled = np.log(-tuned(lambda **kw: target_ess(0.6, **kw), init_value=-np.inf)[100:])
        assert abs(np.log(-lams[-1]) - settled.mean()) < 4 * settled.std()

    def test_does_not_stop_where_outliers_hide_that_it_can_be_reached(self):
        """40 % gross errors: the weights of the others are all but equal over a decade of λ."""
        rng = np.random.default_rng(5)
        losses = (0.1 * rng.normal(size=(600, 128))) ** 2
        losses[:, :51] += rng.uniform(1, 3, (600, 51)) ** 2
        lams = tuned(ESS, np.float32(losses), init_value=-np.inf)
        found = [reached(x, lam)[0] for x, lam in zip(losses[300:], lams[300:], strict=False)]
        assert 1 / (1 + np.median(found)) == pytest.approx(0.5, abs=0.02)

    @pytest.mark.parametrize("gamma", [0.9, 0.1])
    @pytest.mark.parametrize("largest", [1e3, 1e30])
    def test_one_enormous_loss(self, largest, gamma):
        """It doubles λ at most, and is over in ten steps, whatever its size."""
        batches = BATCHES.copy()
        batches[50, 0] = largest
        lams, expected = tuned(ESS, batches), tuned(ESS)
        assert lams[51] / lams[50] <= 2.001
        np.testing.assert_allclose(lams[100], expected[100], rtol=0.02)
        recovered = np.array(sums_of_weights(batches[:100], gamma))
        assert np.all(recovered[60:] > 0.5)
        assert np.all(recovered[60:] < 2)


@jax.jit
def sums_of_weights(batches, gamma):
    tx = scale_by_attention(ESS(), damping=0.0, gamma=gamma)
    return follow(tx, batches)[0].sum(axis=1)
