"""The contract that optax holds its own contributed optimisers to."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from absgd_jax import abadam, absgd, accumulate, get_temperature, scale_by_attention, target_ess

OPTIMIZERS = {
    "scale_by_attention": lambda rate: scale_by_attention(2.0),
    "absgd": lambda rate: absgd(rate, 2.0, weight_decay=1e-3),
    "abadam": lambda rate: abadam(rate, 2.0, weight_decay=1e-3),
    "accumulate": lambda rate: accumulate(absgd(rate, 2.0), 2),
    "automatic": lambda rate: absgd(rate, target_ess(0.9)),
}
RATE = 0.05
PARAMS = {"w": jnp.linspace(-1.0, 2.0, 8), "b": jnp.float32(0.3)}
LOSSES = np.random.default_rng(0).gamma(2.0, size=(4, 16)).astype(np.float32)

pytestmark = pytest.mark.usefixtures("users_promotion")  # optax.adam needs it


def stepper(tx, **extra_args):
    """A step, which may be traced once; the parameters are their own gradients."""
    chex.clear_trace_counter()  # it goes by name

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, opt_state, losses):
        updates, opt_state = tx.update(
            params, opt_state, params, value=losses.max(), losses=losses, **extra_args
        )
        return optax.apply_updates(params, updates), opt_state

    return step


def run(tx, **extra_args):
    step, carry = stepper(tx, **extra_args), (PARAMS, tx.init(PARAMS))
    for losses in LOSSES:
        carry = step(*carry, losses)
    return carry


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestEveryOptimizer:
    def test_ignores_unknown_extra_arguments_and_compiles_once(self, name):
        tx = OPTIMIZERS[name](RATE)
        chex.assert_trees_all_equal(run(tx, unknown=jnp.float32(1.0), fn=len), run(tx))

    def test_tells_the_parameters_in_its_state_from_the_rest(self, name):
        tx = OPTIMIZERS[name](RATE)
        marks = optax.tree.map_params(
            tx,
            lambda _, mark: mark,
            tx.init(PARAMS),
            {"w": "w", "b": "b"},
            transform_non_params=lambda _: "other",
        )
        copies, others = {"scale_by_attention": (0, 3), "abadam": (2, 4), "accumulate": (2, 9)}.get(
            name, (1, 3)
        )
        assert sorted(jax.tree.leaves(marks)) == copies * ["b"] + others * ["other"] + copies * [
            "w"
        ]

    def test_init_needs_shapes_only(self, name):
        init, shapes = OPTIMIZERS[name](RATE).init, jax.eval_shape(lambda: PARAMS)
        chex.assert_trees_all_equal(init(shapes), init(PARAMS))
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(init, shapes), init(PARAMS))

    @pytest.mark.parametrize(
        ("dtype", "x64"),
        [("float16", False), ("bfloat16", False), ("float32", False), ("float64", True)],
        indirect=["x64"],
    )
    def test_keeps_shapes_dtypes_and_shardings(self, name, dtype, x64):
        """Of state and updates: otherwise `cond` and `scan` refuse them."""
        tx = OPTIMIZERS[name](RATE)
        mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
        params = {"w": PARAMS["w"].astype(dtype), "b": PARAMS["b"].astype("float32")}
        shardings = {"w": NamedSharding(mesh, P("model")), "b": NamedSharding(mesh, P())}
        params = jax.device_put(params, shardings)
        losses = jnp.asarray(LOSSES, "bfloat16" if dtype == "float16" else "float16")

        def step(carry, losses):
            def update(updates, opt_state):
                value = losses.max()
                return tx.update(updates, opt_state, params, value=value, losses=losses)

            return jax.lax.cond(losses[0] < 2, update, lambda *carry: carry, *carry), None

        with jax.set_mesh(mesh):
            before = params, jax.jit(tx.init)(params)
            after, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, losses))(before)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, before)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "scale_by_attention"])
def test_a_schedule_of_the_rate_equals_its_constant(name):
    make = OPTIMIZERS[name]
    scheduled, _ = run(make(optax.constant_schedule(RATE)))
    chex.assert_trees_all_close(scheduled, run(make(RATE))[0], rtol=1e-6)


@pytest.mark.parametrize("make", [absgd, abadam])
def test_injected_hyperparameters_are_as_given_and_can_be_set(make):
    """λ and the learning rate, without a recompile."""
    tx = optax.inject_hyperparams(make)(RATE, 2.0, weight_decay=1e-3)
    step = stepper(tx)
    params, opt_state = step(PARAMS, tx.init(PARAMS), LOSSES[0])
    opt_state.hyperparams["temperature"] = jnp.float32(-1.0)
    opt_state.hyperparams["learning_rate"] = jnp.float32(0.01)
    assert get_temperature(opt_state) == -1.0
    params, opt_state = step(params, opt_state, LOSSES[1])

    tx = make(RATE, 2.0, weight_decay=1e-3)
    expected, state = stepper(tx)(PARAMS, tx.init(PARAMS), LOSSES[0])
    state = optax.tree.set(state, temperature=jnp.float32(-1.0))
    expected, state = stepper(make(0.01, -1.0, weight_decay=1e-3))(expected, state, LOSSES[1])
    # An injected b2 is rounded before it is taken from 1.
    chex.assert_trees_all_close((params, opt_state.inner_state), (expected, state), rtol=1e-4)
