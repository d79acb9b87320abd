"""Inside optax's wrappers, and in the loops of other libraries.

Everywhere the same few steps, by plain optax on gradients that are scaled in NumPy. The loops are
those of an SGD user, but for ``tilt`` and ``value``.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from absgd_jax import (
    absgd,
    accumulate,
    AttentionState,
    get_temperature,
    scale_by_attention,
    target_ess,
    tilt,
)
from tests.support.reference import weigh

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 8)).astype(np.float32) / 2
Y = RNG.normal(size=16).astype(np.float32) / 2
PARAMS = {"w": jnp.linspace(-0.5, 1.0, 8), "b": jnp.float32(0.3)}
RATE, GAMMA, LAM = 0.05, 0.7, 2.0
LAMS = [LAM] * 4 + [-1.0] * 2  # of the steps

pytestmark = pytest.mark.usefixtures("users_promotion")  # several of the libraries need it


def loss_fn(params, opt_state):
    predictions = jnp.sum(X * params["w"], axis=1) + params["b"]
    return tilt(jnp.square(predictions - Y), opt_state).mean()


def always(step):
    return True


def by_scale(updates, state, params=None, *, scale, **extra_args):
    return jax.tree.map(lambda g: scale * g, updates), state


def expected(
    wrap=lambda head: optax.chain(head, SGD), params=PARAMS, lams=6 * [LAM], attends=always
):
    """Parameters by plain optax: ``wrap`` around nothing but a factor, which NumPy knows.

    ``attends`` says in which steps the average moves on.
    """
    tx = wrap(optax.GradientTransformationExtraArgs(optax.identity().init, by_scale))
    opt_state, baseline = tx.init(params), None
    for step, lam in enumerate(lams):
        at = getattr(params, "fast", params)
        residuals = X @ np.float64(at["w"]) + np.float64(at["b"]) - Y
        weights, after = weigh(residuals**2, baseline, lam, GAMMA)
        slopes = np.exp((residuals**2 - (baseline or 0.0)) / lam) / len(Y)  # of the tilted mean
        grads = {"w": 2 * (slopes * residuals) @ X, "b": 2 * slopes @ residuals}
        grads = jax.tree.map(jnp.float32, grads)
        scale = jnp.float32(weights.sum() / slopes.sum())
        updates, opt_state = tx.update(grads, opt_state, params, scale=scale)
        params = optax.apply_updates(params, updates)
        if attends(step):
            baseline = after
    return params


class Wrapper(NamedTuple):
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    attends: Callable[[int], bool] = always


SGD = optax.sgd(RATE, 0.9)
CLIP = optax.clip_by_global_norm(0.5)
W, B = {"w": True, "b": False}, {"w": False, "b": True}
LABELS = {"w": "w", "b": "b"}
UPHILL = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))

WRAPPERS = {
    "named_chain": Wrapper(lambda head: optax.named_chain(("head", head), ("sgd", SGD))),
    "clip_behind": Wrapper(lambda head: optax.chain(head, CLIP, SGD)),
    "clip_in_front": Wrapper(lambda head: optax.chain(CLIP, head, SGD)),
    "masked": Wrapper(lambda head: optax.chain(optax.masked(head, W), SGD)),
    "freeze": Wrapper(lambda head: optax.chain(head, SGD, optax.transforms.freeze(B))),
    "selective_transform": Wrapper(
        lambda head: optax.transforms.selective_transform(optax.chain(head, SGD), freeze_mask=B)
    ),
    "partition": Wrapper(
        lambda head: optax.partition(
            {"w": optax.chain(head, SGD), "b": optax.set_to_zero()}, LABELS
        )
    ),
    "partition_behind": Wrapper(
        lambda head: optax.chain(head, optax.partition({"w": SGD, "b": optax.adam(RATE)}, LABELS))
    ),
    "apply_if_finite": Wrapper(lambda head: optax.apply_if_finite(optax.chain(head, SGD), 3)),
    "conditionally_mask": Wrapper(
        lambda head: optax.conditionally_mask(optax.chain(head, SGD), lambda step: step % 2 == 0),
        attends=lambda step: step % 2 == 0,
    ),
    "conditionally_transform": Wrapper(
        lambda head: optax.chain(optax.conditionally_transform(head, lambda step: step >= 2), SGD),
        attends=lambda step: step >= 2,
    ),
    "flatten": Wrapper(lambda head: optax.flatten(optax.chain(head, SGD))),
    "inject_hyperparams": Wrapper(
        lambda head: optax.inject_hyperparams(
            lambda learning_rate: optax.chain(head, optax.sgd(learning_rate, 0.9))
        )(RATE)
    ),
    "schedule_free": Wrapper(
        lambda head: optax.contrib.schedule_free(optax.chain(head, optax.sgd(RATE)), RATE)
    ),
    "mechanize": Wrapper(lambda head: optax.contrib.mechanize(optax.chain(head, SGD))),
    "lookahead_behind": Wrapper(lambda head: optax.chain(head, optax.lookahead(SGD, 2, 0.5))),
    "sam_behind": Wrapper(
        lambda head: optax.chain(
            head, optax.GradientTransformation(*optax.contrib.sam(SGD, UPHILL))
        )
    ),
}
# These call the optimiser inside without the loss.
DROP_THE_LOSS = {
    "lookahead": lambda tx: optax.lookahead(tx, 2, 0.5),
    "sam": lambda tx: optax.GradientTransformation(*optax.contrib.sam(tx, UPHILL)),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


class TestWrappers:
    @pytest.mark.parametrize("name", WRAPPERS)
    def test_trains_and_its_temperature_can_be_read_and_set(self, name):
        wrap, attends = WRAPPERS[name]
        tx = wrap(scale_by_attention(LAM, gamma=GAMMA))
        first = PARAMS
        if name == "lookahead_behind":
            first = optax.LookaheadParams.init_synced(PARAMS)
        chex.clear_trace_counter()  # it goes by name

        @jax.jit
        @chex.assert_max_traces(n=1)
        def step(params, opt_state):
            at = getattr(params, "fast", params)
            loss, grads = jax.value_and_grad(loss_fn)(at, opt_state)
            updates, opt_state = tx.update(grads, opt_state, params, value=loss)
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = first, tx.init(first)
        for lam in LAMS:
            if optax.tree.get(opt_state, "temperature") != lam:
                opt_state = optax.tree.set(opt_state, temperature=jnp.float32(lam))
            assert get_temperature(opt_state) == lam
            params, opt_state = step(params, opt_state)
        chex.assert_trees_all_close(params, expected(wrap, first, LAMS, attends), rtol=1e-4)

    @pytest.mark.parametrize("name", DROP_THE_LOSS)
    def test_says_what_to_do_where_the_loss_is_dropped(self, name):
        tx = optax.chain(DROP_THE_LOSS[name](absgd(RATE, LAM)))
        params = optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS
        opt_state = tx.init(params)
        assert get_temperature(opt_state) == LAM
        message = "value is missing.*wrapper drops it.*scale_by_attention in front.*accumulate"
        with pytest.raises(TypeError, match=message):
            tx.update(PARAMS, opt_state, params, value=1.0)

    def test_sam_refuses_the_loss_unless_made_to_drop_it(self):
        tx = optax.contrib.sam(SGD, UPHILL)
        with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)

    @pytest.mark.parametrize(("wrap", "value"), [(accumulate, 4.0), (optax.MultiSteps, 5.0)])
    def test_micro_batches_have_the_mean_value_or_the_last(self, wrap, value):
        """And a temperature that is read and set through either."""
        tx = absgd(RATE, LAM)
        micro = wrap(tx, 2)
        opt_state = micro.init(PARAMS)
        assert get_temperature(opt_state) == LAM
        opt_state = optax.tree.set(opt_state, temperature=jnp.float32(50.0))
        assert get_temperature(opt_state) == 50.0
        for each in (3.0, 5.0):
            updates, opt_state = micro.update(PARAMS, opt_state, PARAMS, value=each)
        whole = optax.tree.set(tx.init(PARAMS), temperature=jnp.float32(50.0))
        expected = tx.update(PARAMS, whole, PARAMS, value=value)
        chex.assert_trees_all_close((updates, opt_state.inner_opt_state), expected, rtol=1e-6)


def linear_loss(model, opt_state):
    """Of what maps [16, 8] to [16, 1]."""
    return tilt(jnp.square(model(X)[:, 0] - Y), opt_state).mean()


def assert_trained(kernel, bias, lams=6 * [LAM]):
    params = {"w": jnp.reshape(kernel, -1), "b": jnp.reshape(bias, ())}
    chex.assert_trees_all_close(params, expected(lams=lams), rtol=1e-4)


def nnx_model(temperature):
    model = nnx.Linear(8, 1, rngs=nnx.Rngs(0))
    model.kernel[...], model.bias[...] = PARAMS["w"][:, None], PARAMS["b"][None]
    optimizer = nnx.Optimizer(model, absgd(RATE, LAM, gamma=GAMMA), wrt=nnx.Param)
    optimizer.opt_state[0].temperature[...] = jnp.asarray(temperature)
    return model, optimizer


@nnx.jit
def nnx_step(model, optimizer):
    loss, grads = nnx.value_and_grad(linear_loss)(model, optimizer.opt_state)
    optimizer.update(model, grads, value=loss)


class TestNNX:
    def test_temperature_is_a_variable_to_be_set(self):
        model, optimizer = nnx_model(LAM)
        for lam in LAMS:
            optimizer.opt_state[0].temperature[...] = jnp.float32(lam)
            nnx_step(model, optimizer)
        assert_trained(model.kernel[...], model.bias[...], LAMS)

    def test_vmap_over_temperatures_and_scan_over_steps(self):
        lams = (LAM, -1.0, 0.5)
        model, optimizer = nnx.vmap(nnx_model)(jnp.array(lams))

        @nnx.scan(length=6, in_axes=nnx.Carry, out_axes=nnx.Carry)
        def train(carry):
            nnx_step(*carry)
            return carry

        nnx.jit(nnx.vmap(lambda *both: train(both)))(model, optimizer)
        for i, lam in enumerate(lams):
            assert_trained(model.kernel[i], model.bias[i], 6 * [lam])


class WithAttention(train_state.TrainState):
    attention: AttentionState


class ForwardsValue(train_state.TrainState):
    def apply_gradients(self, *, grads, value, **kwargs):
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, value=value)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)


class TestLinen:
    def run(self, make, step):
        variables = {"params": {"kernel": PARAMS["w"][:, None], "bias": PARAMS["b"][None]}}
        state, step = make(apply_fn=nn.Dense(1).apply, params=variables), jax.jit(step)
        for _ in range(6):
            state = step(state)
        assert state.step == 6
        assert_trained(state.params["params"]["kernel"], state.params["params"]["bias"])

    def test_train_state_as_it_is(self):
        attend = scale_by_attention(LAM, gamma=GAMMA)

        def step(state):
            def loss_fn(params):
                return linear_loss(lambda x: state.apply_fn(params, x), state.attention)

            loss, grads = jax.value_and_grad(loss_fn)(state.params)
            grads, attention = attend.update(grads, state.attention, value=loss)
            return state.apply_gradients(grads=grads, attention=attention)

        make = functools.partial(WithAttention.create, tx=SGD, attention=attend.init(PARAMS))
        self.run(make, step)

    def test_train_state_that_forwards_the_loss(self):
        def step(state):
            def loss_fn(params):
                return linear_loss(lambda x: state.apply_fn(params, x), state.opt_state)

            loss, grads = jax.value_and_grad(loss_fn)(state.params)
            return state.apply_gradients(grads=grads, value=loss)

        self.run(functools.partial(ForwardsValue.create, tx=absgd(RATE, LAM, gamma=GAMMA)), step)


def test_equinox():
    model = eqx.nn.Linear(8, 1, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: (m.weight, m.bias), model, (PARAMS["w"][None], PARAMS["b"][None]))
    tx = absgd(RATE, LAM, gamma=GAMMA)

    @eqx.filter_jit
    def step(model, opt_state):
        loss, grads = eqx.filter_value_and_grad(
            lambda model: linear_loss(jax.vmap(model), opt_state)
        )(model)
        updates, opt_state = tx.update(
            grads, opt_state, eqx.filter(model, eqx.is_array), value=loss
        )
        return eqx.apply_updates(model, updates), opt_state

    opt_state = tx.init(eqx.filter(model, eqx.is_array))
    for _ in range(6):
        model, opt_state = step(model, opt_state)
    assert_trained(model.weight, model.bias)


class TestOrbax:
    """The whole state is saved, restored on any number of devices, and gone on from."""

    TX = accumulate(absgd(RATE, target_ess(0.9), gamma=GAMMA), 2)

    def shardings(self, devices):
        mesh = jax.make_mesh(
            (devices,),
            ("model",),
            devices=jax.devices()[:devices],
            axis_types=(AxisType.Auto,),
        )
        whole = NamedSharding(mesh, P())
        params = {"w": NamedSharding(mesh, P("model")), "b": whole}
        opt_state = optax.tree.map_params(
            self.TX,
            lambda _, sharding: sharding,
            jax.eval_shape(self.TX.init, PARAMS),
            params,
            transform_non_params=lambda _: whole,
        )
        return params, opt_state

    def stepper(self, devices):
        def step(carry):
            params, opt_state = carry

            def loss_fn(params):
                losses = jnp.square(jnp.sum(X * params["w"], axis=1) + params["b"] - Y)
                return tilt(losses, opt_state).mean(), losses

            (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates, opt_state = self.TX.update(grads, opt_state, params, value=loss, losses=losses)
            return optax.apply_updates(params, updates), opt_state

        return jax.jit(step, out_shardings=self.shardings(devices))

    @pytest.mark.parametrize("devices", [8, 4, 1])
    def test_onto_devices(self, devices, tmp_path):
        before, after = self.stepper(8), self.stepper(devices)
        carry = jax.device_put((PARAMS, self.TX.init(PARAMS)), self.shardings(8))
        for _ in range(3):  # one batch of two, and half of the next
            carry = before(carry)
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            carry,
            self.shardings(devices),
        )
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", carry)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", like)
        chex.assert_trees_all_equal(restored, carry)
        assert len(restored[0]["w"].sharding.device_set) == devices

        for _ in range(3):
            carry, restored = before(carry), after(restored)
        if devices == 8:
            chex.assert_trees_all_equal(restored, carry)
        chex.assert_trees_all_close(restored, carry, rtol=1e-5)

    def test_nnx(self, tmp_path):
        both = nnx_model(LAM)
        nnx_step(*both)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", nnx.state(both))
            checkpointer.wait_until_finished()
            fresh = nnx_model(-1.0)
            nnx.update(fresh, checkpointer.restore(tmp_path / "state", nnx.state(fresh)))
        for _ in range(5):
            nnx_step(*fresh)
        model, optimizer = fresh
        assert_trained(model.kernel[...], model.bias[...])
        assert optimizer.step[...] == 6
