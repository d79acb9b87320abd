import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from absgd_jax import (
    abadam,
    absgd,
    AttentionState,
    get_temperature,
    robust_loss,
    scale_by_attention,
)

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=16), jnp.float32)
PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.float32(0.3)}


def loss_fn(params, temperature):
    predictions = jnp.sum(X * params["w"][None], axis=1) + params["b"]
    return robust_loss(jnp.square(predictions - Y), temperature)


def step(tx, params, opt_state, **extra_args):
    loss, grads = jax.value_and_grad(loss_fn)(params, get_temperature(opt_state))
    updates, opt_state = tx.update(grads, opt_state, params, value=loss, **extra_args)
    return optax.apply_updates(params, updates), opt_state


def train(tx, steps, params=PARAMS, opt_state=None):
    def body(carry, _):
        return step(tx, *carry), carry[0]

    opt_state = tx.init(params) if opt_state is None else opt_state
    carry, history = jax.jit(lambda c: jax.lax.scan(body, c, length=steps))((params, opt_state))
    return *carry, history


class TestChain:
    def test_is_plain_sgd_at_an_infinite_temperature(self):
        params, _, _ = train(absgd(0.05, jnp.inf, nesterov=True, weight_decay=1e-2), 20)
        tx = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.05, 0.9, nesterov=True))
        expected, opt_state = PARAMS, tx.init(PARAMS)
        for _ in range(20):
            grads = jax.grad(loss_fn)(expected, jnp.inf)
            updates, opt_state = tx.update(grads, opt_state, expected)
            expected = optax.apply_updates(expected, updates)
        chex.assert_trees_all_close(params, expected, rtol=1e-5)

    def test_two_stages(self):
        schedule = optax.join_schedules(
            [optax.constant_schedule(jnp.inf), optax.constant_schedule(2.0)], [10]
        )
        _, opt_state, two_stage = train(absgd(0.05, schedule), 20)
        _, _, plain = train(absgd(0.05, jnp.inf), 20)
        # history[t] stands before step t, the first attentional step being the eleventh.
        first = jax.tree.map(lambda a: a[:11], (two_stage, plain))
        chex.assert_trees_all_close(*first, rtol=1e-6)
        assert not jnp.allclose(two_stage["w"][11], plain["w"][11], rtol=1e-3)
        assert jnp.isfinite(opt_state[0].baseline)

    def test_a_schedule_of_the_temperature_equals_its_constant(self):
        scheduled = train(absgd(0.05, optax.constant_schedule(2.0)), 10)[0]
        chex.assert_trees_all_close(scheduled, train(absgd(0.05, 2.0), 10)[0], rtol=1e-6)

    def test_loss_and_update_share_the_scheduled_temperature(self):
        tx = scale_by_attention(optax.linear_schedule(1.0, 4.0, 3))
        state = tx.init(PARAMS)
        for t in range(3):
            assert get_temperature(state) == 1.0 + t
            _, state = tx.update(PARAMS, state, value=4.0)
        # With one constant loss V nears it at every temperature.
        assert abs(state.baseline - 4.0) < 1e-1

    def test_temperature_is_a_leaf_to_be_set_without_a_recompile(self):
        tx = absgd(0.05, 5.0)
        jitted = jax.jit(chex.assert_max_traces(lambda p, s: step(tx, p, s), n=1))
        params, opt_state = jitted(PARAMS, tx.init(PARAMS))
        baseline = opt_state[0].baseline
        opt_state = optax.tree.set(opt_state, temperature=jnp.float32(-1.0))
        assert opt_state[0].baseline == baseline
        params, opt_state = jitted(params, opt_state)
        assert get_temperature(opt_state) == -1.0

    def test_vmap_over_temperatures(self):
        temperatures = jnp.array([0.5, 5.0, -1.0, jnp.inf])
        swept = jax.vmap(lambda t: train(absgd(0.02, t), 10)[0])(temperatures)
        for i, t in enumerate(temperatures.tolist()):
            chex.assert_trees_all_close(
                jax.tree.map(lambda p, i=i: p[i], swept), train(absgd(0.02, t), 10)[0], rtol=1e-5
            )

    @pytest.mark.parametrize("make", [absgd, abadam])
    def test_gradient_of_whole_steps(self, make, x64):
        # Two steps, so that the second's normaliser depends on the first's parameters.
        def after(learning_rate, temperature, gamma, scale):
            params = jax.tree.map(lambda p: scale * p.astype(jnp.float64), PARAMS)
            tx = make(learning_rate, temperature, gamma=gamma)
            opt_state = tx.init(params)
            for _ in range(2):
                params, opt_state = step(tx, params, opt_state)
            return sum(jnp.sum(p) for p in jax.tree.leaves(params))

        args = tuple(jnp.float64(a) for a in (0.01, 2.0, 0.7, 1.1))
        with jax.numpy_dtype_promotion("standard"):
            jax.test_util.check_grads(after, args, order=1, modes=["rev"], rtol=1e-4)

    def test_remat(self):
        tx = absgd(0.05, 2.0)
        expected = step(tx, PARAMS, tx.init(PARAMS))
        actual = jax.checkpoint(lambda p: step(tx, p, tx.init(p)))(PARAMS)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)

    def test_weight_decay_of_zero_needs_no_params(self):
        tx = absgd(0.1, 1.0)
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), value=1.0)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)


class TestHead:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_scales_in_float32_and_rounds_once(self, dtype):
        tx = scale_by_attention(1.0)
        narrow = jnp.asarray(0.7, dtype)
        grads = {"a": jnp.full(3, narrow), "b": narrow.astype(jnp.float32), "c": None}
        updates, _ = tx.update(grads, tx.init(grads), value=1.0)
        chex.assert_trees_all_equal(updates["a"], jnp.full(3, updates["b"]).astype(dtype))

    @pytest.mark.parametrize("temperature", [2.0, -2.0])
    def test_scale_is_the_batch_over_its_average(self, temperature):
        tx = scale_by_attention(temperature, gamma=0.5, alpha=2.0)
        state, u = tx.init(PARAMS), 0.0
        for value in (1.0, 3.0, -2.0, 0.0):
            g = np.exp(value / temperature)
            u = 0.5 * u + 0.5 * 2.0 * g
            updates, state = tx.update(1.0, state, value=value)
            np.testing.assert_allclose(updates, g / u, rtol=1e-6)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_a_value_that_is_not_finite_leaves_the_average(self, value):
        tx = scale_by_attention(2.0)
        _, state = tx.update(PARAMS, tx.init(PARAMS), value=1.0)
        updates, after = tx.update(PARAMS, state, value=value)
        chex.assert_trees_all_equal(updates, PARAMS)
        chex.assert_trees_all_equal(after._replace(count=state.count), state)

    def test_an_empty_batch_leaves_the_average(self):
        tx = scale_by_attention(2.0)
        _, state = tx.update(PARAMS, tx.init(PARAMS), value=1.0, where=jnp.array([True, False]))
        _, after = tx.update(PARAMS, state, value=0.0, where=jnp.array([False, False]))
        chex.assert_trees_all_equal(after._replace(count=state.count), state)

    @pytest.mark.parametrize("temperature", [1e-6, -1e-6, 1.0, 1e20])
    @pytest.mark.parametrize("values", [(1e30, -1e30, 1e30), (-3e38, 3e38, -3e38)])
    def test_enormous_values(self, temperature, values):
        tx = scale_by_attention(temperature)
        state = tx.init(1.0)
        for value in values:
            scale, state = tx.update(1.0, state, value=value)
            assert 0 <= scale <= 1 / 0.9 + 1e-6
            assert jnp.isfinite(state.baseline)

    def test_gradient_of_updates_that_leave_the_average(self, x64):
        # Off, then on, then a value that is not finite, then off again.
        temperatures, poison = jnp.array([jnp.inf, 2, 2, jnp.inf]), jnp.array([0, 0, jnp.inf, 0])

        def run(value):
            state, scales = AttentionState(jnp.int32(0), 0.0, jnp.float64(-jnp.inf)), []
            for temperature, added in zip(temperatures, poison, strict=True):
                tx = scale_by_attention(temperature, gamma=0.5)
                scale, state = tx.update(jnp.float64(1.0), state, value=value + added)
                scales.append(scale * value)
            return jnp.stack(scales), state.baseline

        jax.test_util.check_grads(run, (jnp.float64(1.5),), order=1, modes=["rev"])


class TestInjectHyperparams:
    def test_schedule_goes_past_it(self):
        schedule = optax.linear_schedule(2.0, 1.0, 10)
        tx = optax.inject_hyperparams(absgd, static_args=("temperature",))(0.05, schedule)
        params = train(tx, 10)[0]
        chex.assert_trees_all_close(params, train(absgd(0.05, schedule), 10)[0], atol=1e-6)

    def test_schedule_through_it_is_an_error(self):
        tx = optax.inject_hyperparams(absgd)(0.05, optax.linear_schedule(2.0, 1.0, 10))
        with pytest.raises(ValueError, match=r"static_args=\('temperature',\)"):
            get_temperature(tx.init(PARAMS))


class TestGetTemperature:
    @pytest.mark.parametrize(
        ("tx", "found"),
        [(optax.adam(0.1), 0), (optax.chain(absgd(0.1, 1.0), scale_by_attention(2.0)), 2)],
    )
    def test_none_or_several(self, tx, found):
        with pytest.raises(ValueError, match=f"must hold one AttentionState, got {found}"):
            get_temperature(tx.init(PARAMS))


class TestBadInput:
    def test_traced_hyperparameters_are_not_checked(self):
        def run(temperature, gamma):
            tx = scale_by_attention(temperature, gamma=gamma)
            return tx.update(1.0, tx.init(1.0), value=1.0)[0]

        assert jax.vmap(run)(jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0])).shape == (2,)
