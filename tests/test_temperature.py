import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.schedules import StatefulSchedule

from absgd_jax import (
    abadam,
    absgd,
    accumulate,
    attention,
    diagnostics,
    get_temperature,
    robust_loss,
    scale_by_attention,
    target_ess,
    target_kl,
    TemperatureState,
)

ESS, KL = functools.partial(target_ess, 0.5), functools.partial(target_kl, 0.3)
BATCHES = np.random.default_rng(0).exponential(size=(600, 128)).astype(np.float32)
LEANS = {"hard": 1.0, "easy": -1.0}


def numpy_divergences(losses, lam):
    """1 / ESS - 1 and KL, in float64."""
    z = np.float64(losses) / lam
    w = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    return w.size * np.sum(w**2) - 1, np.sum(w * np.log(w.size * w))


def follow(temperature, batches=BATCHES, first=None, **extra_args):
    """λ before each batch, and after the last one."""
    attend = attention(temperature)
    state = attend.init()
    if first is not None:
        state = state._replace(temperature=jnp.asarray(first, float))

    def step(state, batch):
        _, new = attend.update(batch, state, **extra_args)
        return new, state.temperature

    state, before = jax.lax.scan(step, state, jnp.asarray(batches))
    return jnp.append(before, state.temperature)


class TestTarget:
    @pytest.mark.parametrize("sign", LEANS.values(), ids=LEANS)
    @pytest.mark.parametrize(("make", "index"), [(ESS, 0), (KL, 1)], ids=["ess", "kl"])
    def test_is_held(self, make, index, sign):
        """In the mean of the logarithm over batches that it has not seen before."""
        lams = follow(make(init_value=sign * jnp.inf))
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
        settled = follow(temperature, BATCHES[:, :n])[100:]
        level, spread = np.log(np.abs(settled)).mean(), np.log(np.abs(settled)).std()
        lams = follow(temperature, BATCHES[:60, :n], first=factor * sign * np.exp(level))
        # From there on it strays from its level no further than it always does, or a little.
        assert np.abs(np.log(np.abs(lams[50:])) - level).max() < max(4 * spread, 0.15)

    @pytest.mark.parametrize("make", [ESS, KL], ids=["ess", "kl"])
    def test_starts_where_a_normal_distribution_would_be_on_target(self, make):
        (first, second) = follow(make(), BATCHES[:1])
        assert first == np.inf
        variance = {ESS: 1.0, KL: 2 * 0.3}[make]
        np.testing.assert_allclose(second, np.sqrt(BATCHES[0].var() / variance), rtol=1e-5)

    @pytest.mark.parametrize("sign", LEANS.values(), ids=LEANS)
    def test_kl_is_the_dual_variable(self, sign, x64):
        """λ of the radius solves the dual problem, and its weights the primal one."""
        losses, radius = np.float64(BATCHES[0]), 0.3
        lam = follow(KL(init_value=sign * jnp.inf), np.stack([losses] * 400))[-1]
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
        expected = follow(ESS(), BATCHES[:100])
        actual = follow(ESS(), scale * (BATCHES[:100] + np.float32(shift)))
        np.testing.assert_allclose(actual[1:] / scale, expected[1:], rtol=1e-3)

    def test_flips_with_the_losses(self):
        np.testing.assert_allclose(
            follow(ESS(init_value=-jnp.inf), -BATCHES), -follow(ESS()), rtol=1e-5
        )

    def test_of_many_at_once(self):
        fractions = np.float32([0.3, 0.5, 0.9])
        lams = jax.vmap(lambda f: follow(target_ess(f)))(fractions)
        expected = [follow(target_ess(fraction)) for fraction in fractions]
        np.testing.assert_allclose(lams, expected, rtol=1e-4)


@pytest.mark.parametrize("lam", [0.05, 3.0, 1e3, 1e5, -0.05, -3.0, -1e5])
@pytest.mark.parametrize(("make", "index"), [(ESS, 0), (KL, 1)], ids=["ess", "kl"])
class TestStep:
    """One update from λ is that of the formula, in float64."""

    def test_value(self, make, index, lam):
        target = (1.0, 0.3)[index]
        excess = np.log(numpy_divergences(BATCHES[0], lam)[index] / target)
        expected = lam * np.exp(np.clip(0.1 * excess, -np.log(2), np.log(2)))
        np.testing.assert_allclose(follow(make(), BATCHES[:1], first=lam)[1], expected, rtol=1e-4)

    def test_mask(self, make, index, lam):
        where = np.random.default_rng(1).random(128) > 0.4
        poisoned = np.where(where, BATCHES[0], np.nan).astype(np.float32)
        actual = follow(make(), poisoned[None], first=lam, where=where)[1]
        expected = follow(make(), BATCHES[0][where][None], first=lam)[1]
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


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
        assert follow(make(), losses[None], first=lam)[1] == np.float32(lam)

    @pytest.mark.parametrize("lam", [1.5, -1.5, np.inf])
    def test_masked_whole(self, lam):
        after = follow(ESS(), BATCHES[:1], first=lam, where=np.zeros(128, bool))[1]
        assert after == np.float32(lam)

    @pytest.mark.parametrize("sign", LEANS.values(), ids=LEANS)
    @pytest.mark.parametrize("make", [ESS, KL], ids=["ess", "kl"])
    @pytest.mark.parametrize("n", [2, 3])
    def test_targets_out_of_reach_of_a_small_batch(self, n, make, sign):
        """Half of two examples is one: λ would fall to 0."""
        lams = follow(make(init_value=sign * jnp.inf), BATCHES[:, :n])
        assert np.all(np.abs(lams[50:]) > 0.05)

    @pytest.mark.parametrize("make", [ESS, KL], ids=["ess", "kl"])
    def test_comes_back_from_where_ties_have_sent_it(self, make):
        ties = np.repeat(np.float32([[0.0, 3.0]]), 2000, axis=0).repeat((120, 8), axis=1)
        lams = follow(make(init_value=-jnp.inf), np.concatenate([ties, BATCHES[:150]]))
        assert np.all(np.isfinite(lams[1:]))
        assert np.all(lams[1:] < 0)
        assert lams[2000] == np.float32(-1e-6)
        settled = np.log(-follow(make(init_value=-jnp.inf))[100:])
        assert abs(np.log(-lams[-1]) - settled.mean()) < 4 * settled.std()

    @pytest.mark.parametrize("gamma", [0.9, 0.1])
    @pytest.mark.parametrize("largest", [1e3, 1e30])
    def test_one_enormous_loss(self, largest, gamma):
        """It doubles λ at most, and is over in ten steps, whatever its size."""
        batches = BATCHES[:100].copy()
        batches[50, 0] = largest
        lams, expected = follow(ESS(), batches), follow(ESS(), BATCHES[:100])
        assert lams[51] / lams[50] <= 2.001
        np.testing.assert_allclose(lams[100], expected[100], rtol=0.02)

        def sums(temperature, max_jump=None):
            attend = attention(temperature, gamma=gamma, max_jump=max_jump)

            def step(state, batch):
                weights, state = attend.update(batch, state)
                return state, weights.sum()

            return np.array(jax.lax.scan(step, attend.init(), jnp.asarray(batches))[1])

        recovered = sums(ESS(damping=0.0))
        assert np.all(recovered[60:] > 0.5)
        assert np.all(recovered[60:] < 2)
        # Without the bound it is not.
        assert np.all(sums(ESS(damping=0.0), max_jump=jnp.inf)[60:] < 0.01)


X = jnp.asarray(np.random.default_rng(0).normal(size=(128, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=128), jnp.float32)
PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.float32(0.3)}


def step(tx, params, opt_state, **extra_args):
    temperature = get_temperature(opt_state)

    def loss_fn(params):
        predictions = jnp.sum(X * params["w"][None], axis=1) + params["b"]
        losses = jnp.square(predictions - Y)
        return robust_loss(losses, temperature), losses

    (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(
        grads, opt_state, params, value=loss, losses=losses, **extra_args
    )
    return optax.apply_updates(params, updates), opt_state


def train(tx, steps, params=PARAMS, opt_state=None):
    """The last parameters and state, and every λ."""

    def body(carry, _):
        return step(tx, *carry), get_temperature(carry[1])

    opt_state = tx.init(params) if opt_state is None else opt_state
    (params, opt_state), lams = jax.jit(lambda c: jax.lax.scan(body, c, length=steps))(
        (params, opt_state)
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

    def test_is_the_helper_scaled(self):
        """Both keep one λ, and give one gradient."""
        losses = jnp.asarray(BATCHES[:20])
        attend, tx = attention(ESS(), gamma=0.3), scale_by_attention(ESS(), gamma=0.3)
        state, tx_state = attend.init(), tx.init(0.0)
        for batch in losses:
            lam = get_temperature(tx_state)
            loss, gradient = jax.value_and_grad(robust_loss)(batch, lam)
            actual, tx_state = tx.update(gradient, tx_state, value=loss, losses=batch)
            expected, state = attend.update(batch, state)
            chex.assert_trees_all_close((actual, tx_state), (expected, state), rtol=1e-5)

    def test_two_stages(self):
        tx = absgd(0.02, target_ess(0.5, transition_begin=20))
        _, _, lams = train(tx, 40)
        assert np.all(lams[:20] == np.inf)
        assert np.all(np.isfinite(lams[20:]))
        np.testing.assert_allclose(lams[20], lams[39], rtol=0.5)  # at once near where it belongs
        params, _, _ = train(tx, 20)
        chex.assert_trees_all_close(params, train(absgd(0.02, jnp.inf), 20)[0], rtol=1e-6)

    def test_damping(self):
        """Divides the gradients of what leans on hard examples, and no others."""
        for sign, lean in ((1.0, "hard"), (-1.0, "easy")):
            scales = []
            for damping in (0.0, 3.0):
                tx = scale_by_attention(ESS(init_value=sign, damping=damping))
                loss = robust_loss(BATCHES[0], sign)
                scaled, _ = tx.update(1.0, tx.init(0.0), value=loss, losses=BATCHES[0])
                scales.append(scaled)
            chi2, _ = numpy_divergences(BATCHES[0], sign)
            expected = 1 + 3.0 * np.sqrt(chi2) if lean == "hard" else 1.0
            assert scales[0] / scales[1] == pytest.approx(expected, rel=1e-5)

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
            value = robust_loss(losses, get_temperature(opt_state))
            updates, opt_state = tx.update(params, opt_state, value=value, losses=losses)
            chex.assert_trees_all_equal_dtypes(updates, params)
            return opt_state, None

        opt_state, _ = jax.lax.scan(body, tx.init(params), jnp.asarray(BATCHES[:20], dtype))
        assert get_temperature(opt_state).dtype == jnp.float32
        expected = follow(KL(), BATCHES[:20])[-1]
        np.testing.assert_allclose(get_temperature(opt_state), expected, rtol=0.02)

    def test_passes_no_gradient(self, x64):
        """Of a step's loss to λ before it, but for λ itself."""

        def after(lam):
            attend = attention(ESS())
            state = attend.init()._replace(temperature=lam)
            _, state = attend.update(jnp.float64(BATCHES[0]), state)
            return state.temperature

        value, gradient = jax.value_and_grad(after)(0.7)
        assert gradient == pytest.approx(value / 0.7)

    def test_accumulates(self):
        """Micro-batches in an order of their own, and of unlike sizes."""
        mask = np.random.default_rng(2).random(128) > 0.3
        tx = scale_by_attention(KL())
        for lam in (jnp.inf, 0.8):
            state = optax.tree.set(tx.init(0.0), temperature=jnp.asarray(lam, float))
            loss = robust_loss(BATCHES[0], lam, where=mask)
            expected = tx.update(1.0, state, value=loss, losses=BATCHES[0], where=mask)
            micro = accumulate(tx, 4)
            state = optax.tree.set(micro.init(0.0), temperature=jnp.asarray(lam, float))
            for losses, where in zip(
                np.split(BATCHES[0], [5, 40, 41]), np.split(mask, [5, 40, 41]), strict=True
            ):
                loss = robust_loss(losses, lam, where=where)
                updates, state = micro.update(1.0, state, value=loss, losses=losses, where=where)
            chex.assert_trees_all_close(
                (updates, state.inner_opt_state), expected, rtol=1e-5, atol=1e-6
            )


class TestStatefulSchedule:
    def test_is_one(self):
        assert isinstance(ESS(), StatefulSchedule)
        assert isinstance(ESS().init(), TemperatureState)

    @pytest.mark.parametrize("static_args", [(), ("temperature",)], ids=["injected", "static"])
    def test_inject_hyperparams(self, static_args):
        tx = optax.inject_hyperparams(absgd, static_args=static_args)(0.02, KL(damping=0.0))
        params, opt_state, lams = train(tx, 30)
        expected, state, expected_lams = train(absgd(0.02, KL(damping=0.0)), 30)
        np.testing.assert_allclose(lams, expected_lams, rtol=1e-5)
        chex.assert_trees_all_close(params, expected, rtol=1e-5)
        assert get_temperature(opt_state) == pytest.approx(float(get_temperature(state)), rel=1e-5)


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
    @pytest.mark.parametrize("inject", [False, True])
    def test_update(self, inject, extra_args, error, message):
        make = optax.inject_hyperparams(absgd) if inject else absgd
        tx = make(0.1, ESS())
        with pytest.raises(error, match=message):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0, **extra_args)

    def test_traced_arguments_are_not_checked(self):
        jax.vmap(lambda f: target_ess(f).target)(jnp.array([2.0, 0.5]))
