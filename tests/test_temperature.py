import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from absgd_jax import (
    abadam,
    absgd,
    accumulate,
    diagnostics,
    get_temperature,
    robust_loss,
    scale_by_attention,
    target_ess,
    target_kl,
    tilt,
    two_stage,
)
from tests.support.attended import attend, follow

ESS, KL = functools.partial(target_ess, 0.5), functools.partial(target_kl, 0.3)
BATCHES = np.random.default_rng(0).exponential(size=(600, 128)).astype(np.float32)
LEANS = {"hard": 1.0, "easy": -1.0}


def numpy_divergences(losses, lam):
    """1 / ESS - 1 and KL, in float64."""
    z = np.float64(losses) / lam
    w = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    return w.size * np.sum(w**2) - 1, np.sum(w * np.log(w.size * w))


def tuned(temperature, batches=BATCHES, first=None, where=None):
    """λ before each batch, and after the last one."""
    tx = scale_by_attention(temperature)
    state = tx.init(None)
    if first is not None:
        state = state._replace(temperature=jnp.asarray(first, float))
    mean = functools.partial(jnp.mean, where=where)

    def step(state, batch):
        _, new = attend(tx, batch, state, mean, losses=batch, where=where)
        return new, state.temperature

    state, before = jax.lax.scan(step, state, jnp.asarray(batches))
    return jnp.append(before, state.temperature)


def scheduled(temperature, steps):
    """λ of every step, whatever the losses."""
    tx = scale_by_attention(temperature)

    def step(state, _):
        return tx.update(None, state, value=1.0)[1], get_temperature(state)

    return jax.lax.scan(step, tx.init(None), length=steps)[1]


@pytest.mark.usefixtures("users_promotion")  # optax's schedules need it
class TestGiven:
    """Numbers, arrays and schedules."""

    def test_schedule(self):
        schedule = optax.linear_schedule(1.0, 4.0, 3)
        np.testing.assert_allclose(scheduled(schedule, 5), [1, 2, 3, 4, 4])

    def test_loss_and_update_share_it(self):
        """Of one constant loss V is that loss at every temperature."""
        batches = np.full((10, 4), 4.0, np.float32)
        weights, _ = follow(scale_by_attention(optax.linear_schedule(1.0, 9.0, 8)), batches)
        np.testing.assert_allclose(weights[-1], 1 / 4, rtol=1e-4)

    @pytest.mark.parametrize(
        "given",
        [5.0, np.float32(5.0), jnp.float32(5.0), lambda count: 5.0, two_stage(5.0, 0)],
        ids=["number", "numpy", "array", "schedule", "two_stage"],
    )
    def test_what_is_set_is_used_and_stays(self, given):
        """By the next loss, its update and those after, without a recompile."""
        tx = scale_by_attention(given)
        chex.clear_trace_counter()  # it goes by name
        jitted = jax.jit(chex.assert_max_traces(lambda losses, s: attend(tx, losses, s), n=1))
        losses = jnp.asarray(BATCHES[0])
        _, state = jitted(losses, tx.init(None))
        state = optax.tree.set(state, temperature=jnp.float32(-2.0))
        for _ in range(3):
            assert get_temperature(state) == -2.0
            weights, state = jitted(losses, state)
        weights, _ = jitted(losses, optax.tree.set(tx.init(None), temperature=jnp.float32(-2.0)))
        start = scale_by_attention(-2.0).init(None)
        expected, _ = attend(scale_by_attention(-2.0), losses, start)
        np.testing.assert_array_equal(weights, expected)

    def test_a_schedule_that_moves_replaces_what_is_set(self):
        tx = scale_by_attention(optax.piecewise_constant_schedule(8.0, {2: 0.5}))
        state = optax.tree.set(tx.init(None), temperature=jnp.float32(3.0))
        found = []
        for _ in range(4):
            found.append(float(get_temperature(state)))
            _, state = tx.update(None, state, value=1.0)
        assert found == [3.0, 3.0, 4.0, 4.0]

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize(
        "decay",
        [optax.linear_schedule(5.0, 0.0, 8), optax.cosine_decay_schedule(5.0, 8)],
        ids=["linear", "cosine"],
    )
    def test_decay_to_0_stops_short_of_it(self, decay, sign):
        tx = scale_by_attention(lambda count: sign * decay(count))
        weights, states = follow(tx, BATCHES[:20])
        assert np.all(np.isfinite(weights))
        assert np.all(weights[9:].sum(axis=1) > 0)
        last = jax.tree.map(lambda x: x[-1], states)
        assert get_temperature(last) == sign * np.float32(1e-6)

    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_an_array_of_0_is_the_smallest_of_its_sign(self, zero):
        tx = scale_by_attention(jnp.float32(zero))
        weights, state = attend(tx, jnp.asarray(BATCHES[0]), tx.init(None))
        assert np.all(np.isfinite(weights))
        assert get_temperature(state) == np.copysign(np.float32(1e-6), zero)


class TestTwoStage:
    def test_number(self):
        np.testing.assert_array_equal(scheduled(two_stage(-5.0, 3), 5), [-np.inf] * 3 + [-5] * 2)

    def test_schedule_counts_from_its_start(self):
        schedule = optax.linear_schedule(1.0, 3.0, 2)
        found = scheduled(two_stage(schedule, 2), 6)
        np.testing.assert_allclose(found, [np.inf, np.inf, 1, 2, 3, 3])

    def test_of_stages(self):
        found = scheduled(two_stage(two_stage(2.0, 2), 1), 5)
        np.testing.assert_array_equal(found, [np.inf] * 3 + [2, 2])

    @pytest.mark.parametrize("sign", LEANS.values(), ids=LEANS)
    def test_automatic(self, sign):
        """The last plain batch puts λ in its place."""
        lams = tuned(two_stage(ESS(init_value=sign * jnp.inf), 20), BATCHES[:40])
        np.testing.assert_array_equal(lams[:20], np.full(20, sign * np.inf))
        np.testing.assert_allclose(lams[20], sign * BATCHES[19].std(), rtol=1e-5)
        assert 0.3 < lams[39] / lams[20] < 3  # near where it belongs

    def test_automatic_from_a_number(self):
        lams = tuned(two_stage(ESS(init_value=-3.0), 5), BATCHES[:40])
        np.testing.assert_array_equal(lams[:6], [-np.inf] * 5 + [-3.0])
        expected = tuned(ESS(init_value=-3.0), BATCHES[5:40])
        np.testing.assert_allclose(lams[5:], expected, rtol=1e-5)

    @pytest.mark.parametrize("begin", [0, 4])
    def test_traced(self, begin):
        found = jax.jit(lambda t, b: scheduled(two_stage(t, b), 8))(2.0, begin)
        np.testing.assert_array_equal(found, np.where(np.arange(8) < begin, np.inf, 2.0))


class TestTarget:
    @pytest.mark.parametrize("sign", LEANS.values(), ids=LEANS)
    @pytest.mark.parametrize(("make", "index"), [(ESS, 0), (KL, 1)], ids=["ess", "kl"])
    def test_is_held(self, make, index, sign):
        """In the mean of the logarithm over batches that it has not seen before."""
        lams = tuned(make(init_value=sign * jnp.inf))
        assert np.all(np.sign(lams) == sign)
        reached = [
            numpy_divergences(batch, lam)[index]
            for batch, lam in zip(BATCHES[100:], lams[100:], strict=False)
        ]
        target = (1.0, 0.3)[index]
        assert np.exp(np.mean(np.log(reached))) == pytest.approx(target, rel=0.03)

    @pytest.mark.parametrize("sign", LEANS.values(), ids=LEANS)
    @pytest.mark.parametrize("make", [ESS, KL], ids=["ess", "kl"])
    @pytest.mark.parametrize("factor", [0.01, 100.0])
    @pytest.mark.parametrize("n", [16, 128])
    def test_settles_within_50_steps(self, make, factor, sign, n):
        temperature = make(init_value=sign * jnp.inf)
        settled = tuned(temperature, BATCHES[:, :n])[100:]
        level, spread = np.log(np.abs(settled)).mean(), np.log(np.abs(settled)).std()
        lams = tuned(temperature, BATCHES[:60, :n], first=factor * sign * np.exp(level))
        # From there on it strays from its level no further than it always does, or a little.
        assert np.abs(np.log(np.abs(lams[50:])) - level).max() < max(4 * spread, 0.15)

    @pytest.mark.parametrize("make", [ESS, KL], ids=["ess", "kl"])
    def test_starts_where_a_normal_distribution_would_be_on_target(self, make):
        (first, second) = tuned(make(), BATCHES[:1])
        assert first == np.inf
        variance = {ESS: 1.0, KL: 2 * 0.3}[make]
        np.testing.assert_allclose(second, np.sqrt(BATCHES[0].var() / variance), rtol=1e-5)

    @pytest.mark.parametrize("sign", LEANS.values(), ids=LEANS)
    def test_kl_is_the_dual_variable(self, sign, x64):
        """λ of the radius solves the dual problem, and its weights the primal one."""
        losses, radius = np.float64(BATCHES[0]), 0.3
        lam = tuned(KL(init_value=sign * jnp.inf), np.stack([losses] * 400))[-1]
        grid = lam * np.exp(np.linspace(-1, 1, 20001))
        dual = jax.vmap(lambda t: robust_loss(losses, t) + t * radius)(grid)
        best = np.argmin(sign * dual)
        np.testing.assert_allclose(grid[best], lam, rtol=1e-3)
        weights = jax.grad(robust_loss)(losses, lam)
        np.testing.assert_allclose(diagnostics.kl_divergence(weights), radius, rtol=1e-9)
        np.testing.assert_allclose(np.sum(weights * losses), dual[best], rtol=1e-6)

    @pytest.mark.parametrize("scale", [1e-3, 1e3])
    @pytest.mark.parametrize("shift", [0.0, 5.0])
    def test_follows_the_scale_of_the_losses_and_not_their_shift(self, scale, shift):
        expected = tuned(ESS(), BATCHES[:100])
        actual = tuned(ESS(), scale * (BATCHES[:100] + np.float32(shift)))
        np.testing.assert_allclose(actual[1:] / scale, expected[1:], rtol=1e-3)

    def test_flips_with_the_losses(self):
        np.testing.assert_allclose(
            tuned(ESS(init_value=-jnp.inf), -BATCHES), -tuned(ESS(damping=0.0)), rtol=1e-5
        )

    def test_of_many_at_once(self):
        fractions = np.float32([0.3, 0.5, 0.9])
        lams = jax.vmap(lambda f: tuned(target_ess(f)))(fractions)
        expected = [tuned(target_ess(fraction)) for fraction in fractions]
        np.testing.assert_allclose(lams, expected, rtol=1e-4)


@pytest.mark.parametrize("lam", [0.05, 3.0, 1e3, 1e5, -0.05, -3.0, -1e5])
@pytest.mark.parametrize(("make", "index"), [(ESS, 0), (KL, 1)], ids=["ess", "kl"])
class TestStep:
    """One update from λ is that of the formula, in float64, wherever V stands."""

    def check(self, make, index, lam, where=None):
        losses = BATCHES[0] if where is None else BATCHES[0][where]
        target = (1.0, 0.3)[index]
        excess = np.log(numpy_divergences(losses, lam)[index] / target)
        expected = lam * np.exp(np.clip(0.1 * excess, -np.log(2), np.log(2)))
        poisoned = BATCHES[0] if where is None else np.where(where, BATCHES[0], np.nan)
        tx = scale_by_attention(make())
        for baseline in (0.0, 1.0):
            state = tx.init(None)._replace(
                temperature=jnp.float32(lam), baseline=jnp.float32(baseline)
            )
            _, state = tx.update(None, state, value=1.0, losses=np.float32(poisoned), where=where)
            np.testing.assert_allclose(state.temperature, expected, rtol=1e-4)

    def test_value(self, make, index, lam):
        self.check(make, index, lam)

    def test_mask(self, make, index, lam):
        self.check(make, index, lam, np.random.default_rng(1).random(128) > 0.4)


DEGENERATE = {
    "all_equal": np.full(8, 2.5),
    "one_example": np.array([2.5]),
    "nan": np.array([1.0, np.nan, 2.0]),
    "inf": np.array([1.0, np.inf, 2.0]),
}


class TestDegenerate:
    @pytest.mark.parametrize("lam", [1.5, -1.5, np.inf, -np.inf])
    @pytest.mark.parametrize("make", [ESS, KL], ids=["ess", "kl"])
    @pytest.mark.parametrize("name", DEGENERATE)
    def test_batch_leaves_it(self, name, make, lam):
        losses = DEGENERATE[name].astype(np.float32)
        assert tuned(make(), losses[None], first=lam)[1] == np.float32(lam)

    @pytest.mark.parametrize("lam", [1.5, -1.5, np.inf])
    def test_masked_whole(self, lam):
        after = tuned(ESS(), BATCHES[:1], first=lam, where=np.zeros(128, bool))[1]
        assert after == np.float32(lam)

    @pytest.mark.parametrize("make", [ESS, KL], ids=["ess", "kl"])
    @pytest.mark.parametrize("k", [1, 3], ids=["whole", "micro_batches"])
    def test_equal_losses_leave_it_whatever_their_sums_round_to(self, make, k):
        """As with any head that starts at zero: all losses are log C."""
        tx = scale_by_attention(make())
        tx = tx if k == 1 else accumulate(tx, k)

        @functools.partial(jax.jit, static_argnums=1)
        def after(losses, n):
            state = tx.init(None)
            for part in jnp.split(jnp.full(n, losses), k):
                value = tilt(part, state).mean()
                _, state = tx.update(None, state, value=value, losses=part)
            return get_temperature(state)

        levels = np.log(np.float32([2, 3, 7, 10, 37, 100, 1000]))
        for n in (3, 48, 96, 129, 1536, 3000):
            np.testing.assert_array_equal([after(x, n) for x in levels], np.inf)

    @pytest.mark.parametrize("sign", LEANS.values(), ids=LEANS)
    @pytest.mark.parametrize("make", [ESS, KL], ids=["ess", "kl"])
    @pytest.mark.parametrize("n", [2, 3])
    def test_targets_out_of_reach_of_a_small_batch(self, n, make, sign):
        """Half of two examples is one: λ would fall to 0."""
        lams = tuned(make(init_value=sign * jnp.inf), BATCHES[:, :n])
        assert np.all(np.abs(lams[50:]) > 0.05)

    def test_losses_that_hardly_differ(self):
        """Their χ² at an infinite λ, over its target, is below the smallest normal number."""
        tx = scale_by_attention(target_ess(0.1, init_value=-jnp.inf))
        update = jax.jit(lambda x: tx.update(None, tx.init(None), value=x.mean(), losses=x)[1])
        for size in 10.0 ** np.linspace(-12, -9, 200):
            state = update(np.float32(size * np.linspace(-1, 1, 24)))
            assert get_temperature(state) < 0
        assert np.isfinite(get_temperature(state))

    @pytest.mark.parametrize("make", [ESS, KL], ids=["ess", "kl"])
    def test_comes_back_from_where_ties_have_sent_it(self, make):
        ties = np.repeat(np.float32([[0.0, 3.0]]), 2000, axis=0).repeat((120, 8), axis=1)
        lams = tuned(make(init_value=-jnp.inf), np.concatenate([ties, BATCHES[:150]]))
        assert np.all(np.isfinite(lams[1:]))
        assert np.all(lams[1:] < 0)
        assert lams[2000] > -0.05
        settled = np.log(-tuned(make(init_value=-jnp.inf))[100:])
        assert abs(np.log(-lams[-1]) - settled.mean()) < 4 * settled.std()

    @pytest.mark.parametrize("gamma", [0.9, 0.1])
    @pytest.mark.parametrize("largest", [1e3, 1e30])
    def test_one_enormous_loss(self, largest, gamma):
        """It doubles λ at most, and is over in ten steps, whatever its size."""
        batches = BATCHES[:100].copy()
        batches[50, 0] = largest
        lams, expected = tuned(ESS(), batches), tuned(ESS(), BATCHES[:100])
        assert lams[51] / lams[50] <= 2.001
        np.testing.assert_allclose(lams[100], expected[100], rtol=0.02)

        def sums(max_jump=None):
            tx = scale_by_attention(ESS(damping=0.0), gamma=gamma, max_jump=max_jump)

            def step(state, batch):
                weights, state = attend(tx, batch, state, losses=batch)
                return state, weights.sum()

            return np.array(jax.lax.scan(step, tx.init(None), jnp.asarray(batches))[1])

        recovered = sums()
        assert np.all(recovered[60:] > 0.5)
        assert np.all(recovered[60:] < 2)
        # Without the bound it is not.
        assert sums(max_jump=jnp.inf)[60] < 0.01


X = jnp.asarray(np.random.default_rng(0).normal(size=(128, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=128), jnp.float32)
PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.float32(0.3)}


def step(tx, params, opt_state, **extra_args):
    def loss_fn(params):
        predictions = jnp.sum(X * params["w"][None], axis=1) + params["b"]
        losses = jnp.square(predictions - Y)
        return tilt(losses, opt_state).mean(), losses

    (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(
        grads, opt_state, params, value=loss, losses=losses, **extra_args
    )
    return optax.apply_updates(params, updates), opt_state


def train(tx, steps, params=PARAMS):
    """The last parameters and state, and every λ."""

    def body(carry, _):
        return step(tx, *carry), get_temperature(carry[1])

    (params, opt_state), lams = jax.jit(lambda c: jax.lax.scan(body, c, length=steps))(
        (params, tx.init(params))
    )
    return params, opt_state, lams


class TestInTheOptimizer:
    @pytest.mark.parametrize("make", [absgd, abadam])
    @pytest.mark.usefixtures("users_promotion")  # optax.adam needs it
    def test_trains_at_the_target(self, make):
        tx = make(0.02, target_ess(0.7, init_value=-jnp.inf))
        params, opt_state, lams = train(tx, 200)
        assert np.all(lams < 0)
        losses = jnp.square(jnp.sum(X * params["w"][None], axis=1) + params["b"] - Y)
        weights = jax.grad(robust_loss)(losses, get_temperature(opt_state))
        assert diagnostics.effective_sample_size(weights) == pytest.approx(0.7, abs=0.02)

    def test_the_plain_stage_is_plain_sgd(self):
        params, _, _ = train(absgd(0.02, two_stage(ESS(), 20)), 20)
        chex.assert_trees_all_close(params, train(absgd(0.02, jnp.inf), 20)[0], rtol=1e-6)

    def test_debiases(self):
        """The first weighted batch has its own weights, which sum to 1."""
        for temperature in (ESS(damping=0.0, init_value=1.0), two_stage(ESS(damping=0.0), 3)):
            tx = scale_by_attention(temperature, gamma=0.1)
            state = tx.init(None)
            for losses in BATCHES[:10]:
                weights, state = attend(tx, jnp.asarray(losses), state, losses=losses)
                if state.averaged == 1:
                    assert weights.sum() == pytest.approx(1, rel=1e-5)

    def test_damping(self):
        """Divides the gradients of what leans on hard examples, and no others."""
        for sign, lean in ((1.0, "hard"), (-1.0, "easy")):
            scales = []
            for damping in (0.0, 3.0):
                tx = scale_by_attention(ESS(init_value=sign, damping=damping))
                weights, _ = attend(tx, jnp.asarray(BATCHES[0]), tx.init(None), losses=BATCHES[0])
                scales.append(weights.sum())
            chi2, _ = numpy_divergences(BATCHES[0], sign)
            expected = 1 + 3.0 * np.sqrt(chi2) if lean == "hard" else 1.0
            assert scales[0] / scales[1] == pytest.approx(expected, rel=1e-4)

    def test_can_be_set_and_goes_on_from_there_without_a_recompile(self):
        tx = absgd(0.02, ESS())
        jitted = jax.jit(chex.assert_max_traces(lambda p, s: step(tx, p, s), n=1))
        params, opt_state = jitted(PARAMS, tx.init(PARAMS))
        params, opt_state = jitted(params, opt_state)
        opt_state = optax.tree.set(opt_state, temperature=jnp.float32(-40.0))
        params, opt_state = jitted(params, opt_state)
        assert -40.0 < get_temperature(opt_state) <= -20.0

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_dtypes(self, dtype):
        tx = absgd(0.02, KL())
        params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)

        def body(opt_state, losses):
            value = tilt(losses, opt_state).mean()
            updates, opt_state = tx.update(params, opt_state, value=value, losses=losses)
            chex.assert_trees_all_equal_dtypes(updates, params)
            return opt_state, None

        opt_state, _ = jax.lax.scan(body, tx.init(params), jnp.asarray(BATCHES[:20], dtype))
        assert get_temperature(opt_state).dtype == jnp.float32
        expected = tuned(KL(), BATCHES[:20])[-1]
        np.testing.assert_allclose(get_temperature(opt_state), expected, rtol=0.02)

    def test_accumulates(self):
        """Micro-batches of unlike sizes, a mask on each."""
        mask = np.random.default_rng(2).random(128) > 0.3
        tx = scale_by_attention(KL())
        for lam in (jnp.inf, 0.8):
            state = optax.tree.set(tx.init(0.0), temperature=jnp.asarray(lam, float))
            _, expected = tx.update(1.0, state, value=1.0, losses=BATCHES[0], where=mask)
            micro = accumulate(tx, 4)
            state = optax.tree.set(micro.init(0.0), temperature=jnp.asarray(lam, float))
            for losses, where in zip(
                np.split(BATCHES[0], [5, 40, 41]), np.split(mask, [5, 40, 41]), strict=True
            ):
                _, state = micro.update(1.0, state, value=1.0, losses=losses, where=where)
            chex.assert_trees_all_close(state.inner_opt_state, expected, rtol=1e-5, atol=1e-6)

    def test_passes_no_gradient(self, x64):
        """From λ to the losses that tuned it."""

        def after(losses):
            tx = scale_by_attention(ESS(init_value=0.7))
            return tx.update(None, tx.init(None), value=1.0, losses=losses)[1].temperature

        np.testing.assert_array_equal(jax.grad(after)(jnp.float64(BATCHES[0])), 0)

    @pytest.mark.parametrize("static_args", [(), ("temperature",)], ids=["injected", "static"])
    def test_inject_hyperparams(self, static_args):
        """It keeps what an automatic temperature has: damping, and the bound on jumps."""
        tx = optax.inject_hyperparams(absgd, static_args=static_args)(0.02, KL())
        params, _, lams = train(tx, 30)
        expected, _, expected_lams = train(absgd(0.02, KL()), 30)
        np.testing.assert_allclose(lams, expected_lams, rtol=1e-5)
        chex.assert_trees_all_close(params, expected, rtol=1e-5)
        undamped, _, _ = train(absgd(0.02, KL(damping=0.0)), 30)
        assert not np.allclose(undamped["w"], expected["w"], rtol=1e-3)


class TestBadInput:
    @pytest.mark.parametrize(
        ("extra_args", "error", "message"),
        [
            ({}, TypeError, "losses is missing; an automatic temperature"),
            ({"losses": jnp.float32(1.0)}, ValueError, "losses must hold one entry an example"),
            ({"losses": jnp.ones(3, int)}, TypeError, "losses must be floating point"),
            (
                {"losses": jnp.ones(3), "where": jnp.ones(2, bool)},
                ValueError,
                "where must have the shape of losses",
            ),
            ({"losses": jnp.ones(3), "where": jnp.float32(3)}, TypeError, "where must be boolean"),
        ],
    )
    @pytest.mark.parametrize("wrap", [lambda t: t, lambda t: two_stage(t, 3)])
    def test_update(self, wrap, extra_args, error, message):
        tx = absgd(0.1, wrap(ESS()))
        with pytest.raises(error, match=message):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0, **extra_args)

    def test_traced_arguments_are_not_checked(self):
        jax.vmap(lambda f: target_ess(f).init())(jnp.array([2.0, 0.5]))
