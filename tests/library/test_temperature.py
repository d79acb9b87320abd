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
    get_temperature,
    robust_loss,
    scale_by_attention,
    Sums,
    target_ess,
    target_kl,
    tilt,
    two_stage,
    zero_sums,
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


def masked_mean(where):
    return lambda x: jnp.sum(x, where=where) / jnp.maximum(jnp.sum(where, dtype=x.dtype), 1)


def tune_all(temperature, batches, first=None, where=None):
    """λ before each batch, and after the last one."""
    tx = scale_by_attention(temperature)
    state = tx.init(None)
    if first is not None:
        state = state._replace(temperature=jnp.asarray(first, float))
    mean = jnp.mean if where is None else masked_mean(where)

    def step(state, batch):
        _, new = attend(tx, batch, state, mean)
        return new, state.temperature

    state, before = jax.lax.scan(step, state, jnp.asarray(batches))
    return jnp.append(before, state.temperature)


@functools.partial(jax.jit, static_argnums=0)
def tune_jit(make, init_value, batches, first, where):
    return tune_all(make(init_value=init_value), batches, first, where)


def tuned(make, batches=BATCHES, *, init_value=np.inf, first=None, where=None):
    """As ``tune_all``. Of fewer batches it is the beginning."""
    return np.asarray(tune_jit(make, init_value, batches, first, where))


def scheduled(temperature, steps):
    """λ of every step, whatever the losses."""
    tx = scale_by_attention(temperature)

    def step(state, _):
        return tx.update(None, state, sums=zero_sums())[1], get_temperature(state)

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
        ("given", "stays"),
        [
            (5.0, True),
            (np.float32(5.0), True),
            (np.array(5.0), True),
            (two_stage(5.0, 0), True),
            (jnp.float32(5.0), False),
            (lambda count: 5.0, False),
            (two_stage(lambda count: 5.0, 0), False),
        ],
        ids=["python", "numpy", "array", "stage", "jax", "schedule", "stage_of_schedule"],
    )
    def test_what_is_set_is_used_and_a_number_stays(self, given, stays):
        """By the next loss and its update, without a recompile."""
        tx = scale_by_attention(given)
        chex.clear_trace_counter()  # it goes by name
        jitted = jax.jit(chex.assert_max_traces(lambda losses, s: attend(tx, losses, s), n=1))
        losses = jnp.asarray(BATCHES[0])
        _, state = jitted(losses, tx.init(None))
        state = optax.tree.set(state, temperature=jnp.float32(-2.0))
        assert get_temperature(state) == -2.0
        for _ in range(3):
            _, state = jitted(losses, state)
            assert get_temperature(state) == (-2.0 if stays else 5.0)
        weights, _ = jitted(losses, optax.tree.set(tx.init(None), temperature=jnp.float32(-2.0)))
        start = scale_by_attention(-2.0).init(None)
        expected, _ = attend(scale_by_attention(-2.0), losses, start)
        np.testing.assert_array_equal(weights, expected)

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

    @pytest.mark.parametrize("begin", [0, 4])
    def test_traced(self, begin):
        found = jax.jit(lambda t, b: scheduled(two_stage(t, b), 8))(2.0, begin)
        np.testing.assert_array_equal(found, np.where(np.arange(8) < begin, np.inf, 2.0))


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
    @pytest.mark.parametrize("n", [16, 128])
    def test_settles_within_50_steps(self, make, factor, sign, n):
        batches = BATCHES[:, :n]
        settled = np.log(np.abs(tuned(make, batches, first=sign * np.inf)[100:]))
        level, spread = settled.mean(), settled.std()
        lams = tuned(make, batches, first=factor * sign * np.exp(level))[:61]
        # From there on it strays from its level no further than it always does, or a little.
        assert np.abs(np.log(np.abs(lams[50:])) - level).max() < max(4 * spread, 0.15)

    @in_both_ways
    def test_starts_where_a_normal_distribution_would_be_on_target(self, make):
        first, second = tuned(make)[:2]
        assert first == np.inf
        variance = {ESS: 1.0, KL: 2 * 0.3}[make]
        np.testing.assert_allclose(second, np.sqrt(BATCHES[0].var() / variance), rtol=1e-5)

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
    @pytest.mark.parametrize("shift", [0.0, 5.0])
    def test_follows_the_scale_of_the_losses_and_not_their_shift(self, scale, shift):
        moved = np.float32(scale) * (BATCHES + np.float32(shift))
        actual, expected = tuned(ESS, moved)[1:101], tuned(ESS)[1:101]
        np.testing.assert_allclose(actual / scale, expected, rtol=1e-3)

    def test_flips_with_the_losses(self):
        found = tuned(ESS, -BATCHES, init_value=-np.inf)
        np.testing.assert_allclose(found, -tuned(ESS), rtol=1e-5)

    def test_of_many_at_once(self):
        def run(fraction):
            return tune_all(target_ess(fraction), BATCHES)

        fractions, alone = np.float32([0.3, 0.5, 0.9]), jax.jit(run)
        lams = jax.jit(jax.vmap(run))(fractions)
        np.testing.assert_allclose(lams, [alone(f) for f in fractions], rtol=1e-4)


@functools.partial(jax.jit, static_argnums=0)
def one_step(make, lam, baseline, losses, where):
    tx = scale_by_attention(make())
    state = tx.init(None)._replace(temperature=lam, baseline=baseline)
    mean = jnp.mean if where is None else masked_mean(where)
    return attend(tx, losses, state, mean)[1].temperature


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("make", "target"), TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("lam", [0.4, 3.0, 1e3, 1e5, -0.4, -3.0, -1e5])
def test_one_update_is_that_of_the_formula(make, target, lam, masked):
    """In float64, wherever V stands."""
    where = np.random.default_rng(1).random(128) > 0.4 if masked else None
    losses = np.where(where, BATCHES[0], np.nan) if masked else BATCHES[0]
    expected, _ = tune(BATCHES[0][where] if masked else losses, lam, **target)
    for baseline in (0.0, 1.0):
        found = one_step(make, jnp.float32(lam), jnp.float32(baseline), losses, where)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


DEGENERATE = {
    "all_equal": np.full(8, 2.5),
    "one_example": np.array([2.5]),
    "nan": np.array([1.0, np.nan, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
    "inf": np.array([1.0, np.inf, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
}


class TestDegenerate:
    @pytest.mark.parametrize("lam", [1.5, -1.5, np.inf, -np.inf])
    @in_both_ways
    @pytest.mark.parametrize("name", DEGENERATE)
    def test_batch_leaves_it(self, name, make, lam):
        losses = DEGENERATE[name].astype(np.float32)
        assert tuned(make, losses[None], first=lam)[1] == np.float32(lam)

    @pytest.mark.parametrize("lam", [1.5, -1.5, np.inf])
    def test_masked_whole(self, lam):
        after = tuned(ESS, BATCHES[:1], first=lam, where=np.zeros(128, bool))[1]
        assert after == np.float32(lam)

    @pytest.mark.parametrize("k", [1, 3], ids=["whole", "micro_batches"])
    @pytest.mark.parametrize("n", [3, 48, 96, 129, 1536, 3000])
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
    @pytest.mark.parametrize("n", [2, 3])
    def test_targets_out_of_reach_of_a_small_batch(self, n, make, sign):
        """Half of two examples is one: λ would fall to 0."""
        lams = tuned(make, BATCHES[:, :n], init_value=sign * np.inf)
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
    @pytest.mark.parametrize("target", [0.6, 0.7])
    def test_stops_falling_where_ties_make_the_target_unreachable(self, target, others):
        """And the losses that come after the ties have their weights back within a few steps."""
        ties = np.zeros((400, 128), np.float32)
        far = np.random.default_rng(4).exponential(size=(400, 32))
        ties[:, 96:] = 3 if others == "equal" else far
        tx = scale_by_attention(target_ess(target, init_value=-jnp.inf))
        weights, states = follow(tx, np.concatenate([ties, BATCHES[:150]]))
        lams = states.temperature
        assert lams[400] < (-0.2 if others == "equal" else -1e-4)
        if others == "equal":
            assert lams[400] == lams[100]
        sums = weights.sum(axis=1)
        assert np.all((sums[405:] > 0.3) & (sums[405:] < 2))
        settled = np.log(-tuned(lambda **kw: target_ess(target, **kw), init_value=-np.inf)[100:])
        assert abs(np.log(-lams[-1]) - settled.mean()) < 4 * settled.std()

    @pytest.mark.parametrize("target", [0.3, 0.5])
    def test_does_not_stop_where_outliers_hide_that_it_can_be_reached(self, target):
        """40 % gross errors: the weights of the others are all but equal over a decade of λ."""
        rng = np.random.default_rng(5)
        losses = (0.1 * rng.normal(size=(600, 128))) ** 2
        losses[:, :51] += rng.uniform(1, 3, (600, 51)) ** 2
        lams = tuned(lambda **kw: target_ess(target, **kw), np.float32(losses), init_value=-np.inf)
        found = [reached(x, lam)[0] for x, lam in zip(losses[300:], lams[300:], strict=False)]
        assert 1 / (1 + np.median(found)) == pytest.approx(target, abs=0.02)

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


X = jnp.asarray(np.random.default_rng(0).normal(size=(128, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=128), jnp.float32)
PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.float32(0.3)}


def step(tx, params, opt_state):
    def loss_fn(params, sums):
        predictions = jnp.sum(X * params["w"][None], axis=1) + params["b"]
        return tilt(jnp.square(predictions - Y), opt_state, sums).mean()

    grads, sums = jax.grad(loss_fn, argnums=(0, 1))(params, Sums())
    updates, opt_state = tx.update(grads, opt_state, params, sums=sums)
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
        params, _, lams = train(tx, 200)
        assert np.all(lams < 0)
        losses = np.square(np.asarray(X) @ params["w"] + params["b"] - Y)
        chi2, _ = reached(losses, float(lams[-1]))
        assert 1 / (1 + chi2) == pytest.approx(0.7, abs=0.02)

    def test_the_plain_stage_is_plain_sgd(self):
        params, _, _ = train(absgd(0.02, two_stage(ESS(), 20)), 20)
        chex.assert_trees_all_close(params, train(absgd(0.02, jnp.inf), 20)[0], rtol=1e-6)

    def test_debiases(self):
        """The first weighted batch has its own weights, which sum to 1."""
        for temperature in (ESS(init_value=1.0), two_stage(ESS(), 3)):
            tx = scale_by_attention(temperature, gamma=0.1, damping=0.0)
            weights, states = follow(tx, BATCHES[:10])
            first = int(np.argmax(states.averaged[1:] == 1))
            assert weights[first].sum() == pytest.approx(1, rel=1e-5)

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
            _, sums = slopes_and_sums(losses, opt_state)
            updates, opt_state = tx.update(params, opt_state, sums=sums)
            chex.assert_trees_all_equal_dtypes(updates, params)
            return opt_state, None

        scan = jax.jit(functools.partial(jax.lax.scan, body))
        opt_state, _ = scan(tx.init(params), jnp.asarray(BATCHES[:20], dtype))
        assert get_temperature(opt_state).dtype == jnp.float32
        expected = tuned(KL)[20]
        np.testing.assert_allclose(get_temperature(opt_state), expected, rtol=0.02)

    @pytest.mark.parametrize("static_args", [(), ("temperature",)], ids=["injected", "static"])
    def test_inject_hyperparams(self, static_args):
        """It keeps what an automatic temperature has: damping, and the bound on jumps."""
        tx = optax.inject_hyperparams(absgd, static_args=static_args)(0.02, KL())
        params, _, lams = train(tx, 30)
        expected, _, expected_lams = with_damping(2.0)
        np.testing.assert_allclose(lams, expected_lams, rtol=1e-5)
        chex.assert_trees_all_close(params, expected, rtol=1e-5)
        undamped, _, _ = with_damping(0.0)
        assert not np.allclose(undamped["w"], expected["w"], rtol=1e-3)


@jax.jit
def with_damping(damping):
    return train(absgd(0.02, KL(), damping=damping), 30)


def test_traced_arguments_are_not_checked():
    jax.vmap(lambda f: target_ess(f).init())(jnp.array([2.0, 0.5]))
