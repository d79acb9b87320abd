"""The contract that optax holds its own contributed optimisers to, and what users do to a state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from absgd_jax import (
    abadam,
    absgd,
    get_temperature,
    scale_by_attention,
    Sums,
    target_ess,
    target_kl,
    tilt,
    two_stage,
)
from tests.support.attended import attend, follow, slopes_and_sums

RATE = 0.05
OPTIMIZERS = {
    "absgd": absgd(RATE, 2.0, weight_decay=1e-3),
    "abadam": abadam(optax.constant_schedule(RATE), 2.0, weight_decay=1e-3),
    "automatic": absgd(RATE, target_ess(0.9)),
}
PARAMS = {"w": jnp.linspace(-1.0, 2.0, 8), "b": jnp.float32(0.3)}
LOSSES = np.random.default_rng(0).gamma(2.0, size=(4, 16)).astype(np.float32)
# Further than the bound on a jump, and not out of V's sight.
JUMP = LOSSES * np.float32([[1], [1], [1], [3]])

pytestmark = pytest.mark.usefixtures("users_promotion")  # optax.adam needs it


def update(tx, params, opt_state, losses, **extra_args):
    """One step; the parameters are their own gradients."""
    _, sums = slopes_and_sums(losses, opt_state)
    updates, opt_state = tx.update(params, opt_state, params, sums=sums, **extra_args)
    return optax.apply_updates(params, updates), opt_state


def stepper(tx, **extra_args):
    """The step, which may be traced once."""
    chex.clear_trace_counter()  # it goes by name

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, opt_state, losses):
        return update(tx, params, opt_state, losses, **extra_args)

    return step


def run(tx, batches=LOSSES, **extra_args):
    step, carry = stepper(tx, **extra_args), (PARAMS, tx.init(PARAMS))
    for losses in batches:
        carry = step(*carry, losses)
    return carry


@functools.cache
def plain_run(name):
    return run(OPTIMIZERS[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestEveryOptimizer:
    def test_ignores_other_extra_arguments_and_compiles_once(self, name):
        tx, number = OPTIMIZERS[name], jnp.float32(jnp.nan)
        extra_args = {"unknown": number, "fn": len, "value": number, "loss": number, "grad": None}
        chex.assert_trees_all_equal(run(tx, **extra_args), plain_run(name))

    @pytest.mark.parametrize(
        ("dtype", "x64"), [("bfloat16", False), ("float64", True)], indirect=["x64"]
    )
    def test_keeps_shapes_dtypes_and_shardings(self, name, dtype, x64):
        """Of state and updates: otherwise `cond` and `scan` refuse them."""
        tx = OPTIMIZERS[name]
        mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
        params = {"w": PARAMS["w"].astype(dtype), "b": PARAMS["b"].astype("float32")}
        shardings = {"w": NamedSharding(mesh, P("model")), "b": NamedSharding(mesh, P())}
        params = jax.device_put(params, shardings)
        losses = jnp.asarray(LOSSES, "float16")

        def step(carry, losses):
            def update(updates, opt_state):
                _, sums = slopes_and_sums(losses, opt_state)
                return tx.update(updates, opt_state, params, sums=sums)

            return jax.lax.cond(losses[0] < 2, update, lambda *carry: carry, *carry), None

        def before_and_after(params):
            carry = params, tx.init(params)
            return carry, jax.lax.scan(step, carry, losses)[0]

        with jax.set_mesh(mesh):
            types = jax.make_jaxpr(before_and_after)(params).out_avals
        assert types[: len(types) // 2] == types[len(types) // 2 :]
        found = [t.sharding.spec for t in types if t.shape]
        assert found
        assert set(found) == {P("model")}

    def test_everything_in_bfloat16_stays_so(self, name):
        tx = OPTIMIZERS[name]
        before = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            (PARAMS, tx.init(PARAMS)),
        )
        assert tilt(LOSSES[0], before[1], Sums()).dtype == jnp.float32
        after, step = before, stepper(tx)
        for losses in LOSSES:
            after = step(*after, losses)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
        params = optax.tree.cast(after[0], jnp.float32)
        chex.assert_trees_all_close(params, plain_run(name)[0], rtol=0.05, atol=0.01)


class TestInjectedHyperparameters:
    def test_are_as_given_and_can_be_set(self):
        """λ and the learning rate, without a recompile; λ from the next update on."""
        tx = optax.inject_hyperparams(absgd)(RATE, 2.0, weight_decay=1e-3)
        step = stepper(tx)
        params, opt_state = step(PARAMS, tx.init(PARAMS), LOSSES[0])
        opt_state.hyperparams["temperature"] = jnp.float32(-1.0)
        opt_state.hyperparams["learning_rate"] = jnp.float32(0.01)
        assert get_temperature(opt_state) == 2.0  # of the loss, and of the update that follows it
        params, opt_state = step(params, opt_state, LOSSES[1])
        assert get_temperature(opt_state) == -1.0
        params, opt_state = step(params, opt_state, LOSSES[2])
        assert get_temperature(opt_state) == -1.0

        tx = absgd(RATE, 2.0, weight_decay=1e-3)
        expected, state = stepper(tx)(PARAMS, tx.init(PARAMS), LOSSES[0])
        step = stepper(absgd(0.01, 2.0, weight_decay=1e-3))
        expected, state = step(expected, state, LOSSES[1])
        state = optax.tree.set(state, temperature=jnp.float32(-1.0))
        expected, state = step(expected, state, LOSSES[2])
        chex.assert_trees_all_close((params, opt_state.inner_state), (expected, state), rtol=1e-6)

    @pytest.mark.parametrize(
        "temperature", [target_ess(0.5), two_stage(target_kl(0.1), 2), two_stage(2.0, 2)]
    )
    def test_a_temperature_that_is_no_number_is_as_without_them(self, temperature):
        """With the damping and the bound on a jump that it has by default."""
        injected = optax.inject_hyperparams(absgd)(RATE, temperature=temperature)
        params, opt_state = run(injected, JUMP)
        expected = run(absgd(RATE, temperature), JUMP)
        chex.assert_trees_all_close((params, opt_state.inner_state), expected, rtol=1e-6)

    def test_a_schedule_of_the_temperature_is_one_step_late(self):
        """What inject_hyperparams evaluates is written by the update, for the step after."""
        schedule = optax.linear_schedule(5.0, 1.0, 4)
        tx = optax.inject_hyperparams(absgd)(RATE, schedule)
        step, carry, lams = stepper(tx), (PARAMS, tx.init(PARAMS)), []
        for losses in LOSSES:
            lams.append(float(get_temperature(carry[1])))
            carry = step(*carry, losses)
        assert lams == [5.0, 5.0, 4.0, 3.0]


def temperatures_of(tx, state, steps=3):
    """λ after each of so many updates."""
    lams = []
    for losses in LOSSES[:steps]:
        _, state = attend(tx, losses, state)
        lams.append(float(state.temperature))
    return lams


def with_temperature(tx, lam):
    """The first state, but for its λ."""
    return optax.tree.set(tx.init(None), temperature=lam)


# Numbers that someone may set.
SET = 2, jnp.int32(2), np.float16(2.5)
RULES = {
    "number": 5.0,
    "schedule": optax.linear_schedule(5.0, 1.0, 4),
    "automatic_stage": two_stage(target_kl(0.1), begin=1),
}
# A second stage, and λ of the 51st update on, where it should have begun with the 20th.
SECOND = {
    "number": (5.0, [5, 5, 5]),
    "automatic": (target_ess(0.5, init_value=5.0), [5]),
    "schedule": (lambda count: 10.0 + count, [41, 42, 43]),
    "array": (jnp.float32(5), [5, 5, 5]),
}


class TestTheLeafIsLambda:
    """What stands there is the λ of the next loss and of its update, whoever has put it there."""

    @pytest.mark.parametrize("x64", [False, True], indirect=True)
    @pytest.mark.parametrize("rule", RULES)
    def test_any_kind_of_number_can_be_set(self, rule, x64):
        tx = scale_by_attention(RULES[rule])
        step = functools.partial(jax.jit(attend, static_argnums=0), tx, LOSSES[0])
        expected = {lam: step(with_temperature(tx, jnp.float32(lam))) for lam in (2, 2.5)}
        for lam in SET:
            state = with_temperature(tx, lam)
            assert get_temperature(state) == float(lam)
            weights, state = step(state)
            chex.assert_trees_all_close((weights, state), expected[float(lam)], rtol=1e-6)
            assert jax.typeof(state.temperature) == jax.typeof(state.baseline)
            assert state.temperature.dtype == jnp.result_type(float)

    @pytest.mark.parametrize("lam", [2, jnp.float32(2)], ids=["int", "float32"])
    def test_what_follows_has_all_its_digits_under_x64(self, lam, x64):
        for temperature in (
            jnp.asarray(0.7),
            lambda count: jnp.asarray(0.7),
            two_stage(0.7, begin=1),
            two_stage(target_ess(0.5, init_value=0.7), begin=1),
        ):
            tx = scale_by_attention(temperature)
            assert temperatures_of(tx, with_temperature(tx, lam), steps=1) == [0.7]

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (5.0, [-3, -3, -3]),
            (np.array(5.0), [-3, -3, -3]),
            (two_stage(5.0, 0), [-3, -3, -3]),
            (optax.linear_schedule(5.0, 1.0, 4), [4, 3, 2]),
            (jnp.float32(5), [5, 5, 5]),
            (two_stage(lambda count: 5.0, 0), [5, 5, 5]),
        ],
    )
    def test_what_is_set_stays_but_under_a_schedule_or_an_array(self, given, expected):
        tx = scale_by_attention(given)
        state = with_temperature(tx, -3.0)
        assert temperatures_of(tx, state) == expected
        # In the next step it is used.
        weights, _ = attend(tx, LOSSES[0], state)
        chex.assert_trees_all_equal(weights, attend(scale_by_attention(-3.0), LOSSES[0], state)[0])

    @pytest.mark.parametrize("stage", [lambda t: t, lambda t: two_stage(t, 0)])
    def test_an_automatic_one_goes_on_from_it(self, stage):
        tx = scale_by_attention(stage(target_ess(0.5)))
        other = scale_by_attention(stage(target_ess(0.5, init_value=-3.0)))
        lams = temperatures_of(tx, with_temperature(tx, -3.0))
        assert lams == temperatures_of(other, other.init(None))
        assert lams[0] < 0
        assert lams[0] != -3

    @pytest.mark.parametrize("second", SECOND)
    def test_a_second_stage_begins_after_a_restore_with_an_earlier_one(self, second):
        temperature, expected = SECOND[second]
        tx = scale_by_attention(two_stage(temperature, begin=100))
        _, states = follow(tx, np.resize(LOSSES, (50, 16)))
        state = jax.tree.map(lambda x: x[-1], states)
        assert get_temperature(state) == jnp.inf
        tx = scale_by_attention(two_stage(temperature, begin=20))
        assert temperatures_of(tx, state, steps=len(expected)) == expected

    def test_a_first_stage_goes_on_after_a_restore_with_a_later_one(self):
        tx = scale_by_attention(two_stage(5.0, begin=1))
        _, state = attend(tx, LOSSES[0], tx.init(None))
        assert get_temperature(state) == 5
        tx = scale_by_attention(two_stage(-3.0, begin=3))
        assert temperatures_of(tx, state) == [-np.inf, -3, -3]

    @pytest.mark.parametrize("lam", [np.inf, 1e30])
    @pytest.mark.parametrize("second", [5.0, target_ess(0.5, init_value=5.0)])
    def test_inf_restarts_a_second_stage(self, second, lam):
        tx = scale_by_attention(two_stage(second, begin=1))
        state = tx.init(None)
        for losses in LOSSES:
            _, state = attend(tx, losses, state)
        state = optax.tree.set(state, temperature=jnp.float32(lam))
        assert temperatures_of(tx, state, steps=1) == [5]

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (5.0, [5, 5, 5]),
            (jnp.inf, [np.inf, np.inf, np.inf]),
            (lambda count: jnp.float32(-jnp.inf), [-np.inf, -np.inf, -np.inf]),
            (two_stage(5.0, begin=2), [np.inf, np.inf, 5]),
            (two_stage(-5.0, begin=2), [-np.inf, -np.inf, -5]),
            (two_stage(target_ess(0.5, init_value=-5.0), begin=2), [-np.inf, -np.inf, -5]),
            (two_stage(np.inf, begin=1), [np.inf, np.inf, np.inf]),
            (two_stage(optax.linear_schedule(1.0, 3.0, 2), 2), [np.inf, np.inf, 1, 2, 3]),
            (two_stage(two_stage(2.0, 2), 1), [np.inf, np.inf, np.inf, 2, 2]),
        ],
    )
    def test_of_the_first_steps(self, given, expected):
        tx = scale_by_attention(given)
        state = tx.init(None)
        lams = temperatures_of(tx, state, len(expected) - 1)
        assert [float(state.temperature), *lams] == expected


# Of an array of the caller's.
GIVEN = {
    "as_it_is": lambda lam: absgd(RATE, lam),
    "schedule": lambda lam: absgd(RATE, lambda count: lam),
    "hyperparameter": lambda lam: optax.inject_hyperparams(absgd)(RATE, temperature=5.0),
}


@pytest.mark.parametrize("given", GIVEN)
def test_the_state_can_be_donated(given):
    lam = jnp.float32(5.0)
    tx = GIVEN[given](lam)
    step = jax.jit(lambda *args: update(tx, *args), donate_argnums=(0, 1))
    for _ in range(2):
        params = jax.tree.map(jnp.array, PARAMS)
        carry = step(params, tx.init(params), LOSSES[0])
        carry = update(tx, *carry, LOSSES[0])  # outside jit, too, the state shares nothing
        step(*carry, LOSSES[0])
        assert params["w"].is_deleted()
        assert lam == 5.0  # still there


@pytest.mark.parametrize("lam", [1.0, -1.0, jnp.inf])
@pytest.mark.parametrize("automatic", [False, True])
def test_no_nan_on_the_way(lam, automatic):
    """Of batches, of a batch of one, of one that is masked whole, and of two that are far off."""
    tx = absgd(RATE, target_ess(0.5, init_value=lam) if automatic else lam, debias=True)
    params, opt_state = PARAMS, tx.init(PARAMS)
    with jax.debug_nans(True):  # which sees every operation outside jit
        for losses, kept in (
            *((LOSSES[0], 16), (LOSSES[1], 0), (LOSSES[2, :1], 1)),
            *((LOSSES[3] + 1e3, 16), (LOSSES[3] - 1e3, 16)),
        ):
            where = np.arange(len(losses)) < kept

            def mean(tilted, where=where):
                return jnp.sum(tilted, where=where) / max(np.sum(where), 1)

            _, sums = slopes_and_sums(losses, opt_state, mean)
            updates, opt_state = tx.update(params, opt_state, params, sums=sums)
            params = optax.apply_updates(params, updates)
    chex.assert_tree_all_finite(params)
