"""Inside optax's wrappers, before its optimisers, and in Flax NNX.

Everywhere the same few steps, as by plain optax on gradients that the head alone has scaled. The
sums are passed to the update, or beside the parameters. In float64, what is not the same is told
from rounding.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from absgd_jax import absgd, get_temperature, scale_by_attention, Sums, tilt, zero_sums

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 8)) / 2, RNG.normal(size=16) / 2
PARAMS = {"w": np.linspace(-0.5, 1.0, 8).reshape(4, 2), "b": np.full(1, 0.3)}
RATE, GAMMA, LAM = 0.05, 0.7, 2.0
LAMS = [LAM] * 4 + [-1.0] * 2  # of the steps
HEAD = scale_by_attention(LAM, gamma=GAMMA)

# Several of the libraries need implicit promotion.
pytestmark = pytest.mark.usefixtures("users_promotion", "x64")


def alone(net, sums):
    """A tree for the parameters, and one for them and for the sums beside them."""
    return net


def beside(net, sums):
    return {"net": net, "sums": sums}


FORMS = {"argument": alone, "beside": beside}


def loss_fn(params, opt_state, sums=None):
    """The sums are beside the parameters, if they are not given."""
    net = params.get("net", params)
    losses = jnp.square(jnp.sum(X * net["w"].reshape(-1), axis=1) + net["b"] - Y)
    return tilt(losses, opt_state, sums or params).mean()


def value_and_grad(params, opt_state):
    """The loss, gradients, and what goes with them to the update."""
    if "sums" in params:
        return *jax.value_and_grad(loss_fn)(params, opt_state), {}
    both = jax.value_and_grad(loss_fn, argnums=(0, 2))
    loss, (grads, sums) = both(params, opt_state, Sums())
    return loss, grads, {"sums": sums}


@jax.jit
def by_head(params, state):
    """The loss, its gradients, the scale that is to be theirs, and the next state."""
    loss, grads, sums = value_and_grad(params, state)
    scale, state = HEAD.update(jnp.ones_like(loss), state, **sums)
    return loss, grads, scale, state


def net_of(params):
    """Without the sums."""
    if isinstance(params, optax.LookaheadParams):
        return optax.LookaheadParams(*map(net_of, params))
    return params.get("net", params)


def expected(wrap, params=PARAMS, every=1):
    """Parameters by plain optax: ``wrap`` around nothing but a factor.

    The average moves on in the first of every so many steps.
    """
    opt_state, state = wrap(optax.scale(1.0)).init(params), HEAD.init(None)
    for step, lam in enumerate(LAMS):
        state = state._replace(temperature=jnp.float64(lam))
        loss, grads, scale, after = by_head(getattr(params, "fast", params), state)
        tx = optax.with_extra_args_support(wrap(optax.scale(scale)))
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        if step % every == 0:
            state = after
    return params


class Wrapper(NamedTuple):
    """What is wrapped around a head, by ``wrap(head, tree)``, and how its parameters start.

    ``tree`` makes a mask of one for the parameters and one for the sums. The head sees the first
    of every so many steps.
    """

    wrap: Callable[..., optax.GradientTransformation]
    forms: tuple[str, ...] = ("argument", "beside")
    every: int = 1
    start: Callable = lambda params: params


def before(make, **kwargs):
    """Nothing but a head before an optimiser."""
    return Wrapper(lambda head, tree: optax.chain(head, make(RATE, **kwargs)))


SGD = optax.sgd(RATE, 0.9)
CLIP = optax.clip_by_global_norm(0.5)
W, B = {"w": True, "b": False}, {"w": False, "b": True}
LABELS = {"w": "w", "b": "b"}
UPHILL = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
IN_SYNC = optax.LookaheadParams.init_synced


def without_arguments(tx):
    """Of one that refuses those that it doesn't know."""
    return optax.GradientTransformation(tx.init, tx.update)


WRAPPERS = {
    "named_chain": Wrapper(lambda head, tree: optax.named_chain(("head", head), ("sgd", SGD))),
    "clip_behind": Wrapper(lambda head, tree: optax.chain(head, CLIP, SGD)),
    "clip_in_front": Wrapper(lambda head, tree: optax.chain(CLIP, head, SGD)),
    "masked": Wrapper(lambda head, tree: optax.chain(optax.masked(head, tree(W, True)), SGD)),
    "freeze": Wrapper(
        lambda head, tree: optax.chain(head, SGD, optax.transforms.freeze(tree(B, False)))
    ),
    "selective_transform": Wrapper(
        lambda head, tree: optax.transforms.selective_transform(
            optax.chain(head, SGD), freeze_mask=tree(B, False)
        )
    ),
    "partition": Wrapper(
        lambda head, tree: optax.partition(
            {"w": optax.chain(head, SGD), "b": optax.set_to_zero()}, tree(LABELS, "w")
        )
    ),
    "partition_behind": Wrapper(
        lambda head, tree: optax.chain(
            head, optax.partition({"w": SGD, "b": optax.adam(RATE)}, tree(LABELS, "b"))
        )
    ),
    "apply_if_finite": Wrapper(lambda head, tree: optax.apply_if_finite(optax.chain(head, SGD), 3)),
    "conditionally_mask": Wrapper(
        lambda head, tree: optax.conditionally_mask(
            optax.chain(head, SGD), lambda step: step % 2 == 0
        ),
        every=2,
    ),
    # In a vector of all gradients nobody finds the sums.
    "flatten": Wrapper(
        lambda head, tree: optax.flatten(optax.chain(head, SGD)), forms=("argument",)
    ),
    "inject_hyperparams": Wrapper(
        lambda head, tree: optax.inject_hyperparams(
            lambda learning_rate: optax.chain(head, optax.sgd(learning_rate, 0.9))
        )(RATE)
    ),
    "schedule_free": Wrapper(
        lambda head, tree: optax.contrib.schedule_free(optax.chain(head, optax.sgd(RATE)), RATE)
    ),
    "sam_behind": Wrapper(
        lambda head, tree: optax.chain(head, without_arguments(optax.contrib.sam(SGD, UPHILL)))
    ),
    # These pass no arguments on.
    "lookahead": Wrapper(
        lambda head, tree: optax.lookahead(optax.chain(head, SGD), 2, 0.5),
        start=IN_SYNC,
        forms=("beside",),
    ),
    "split_real_and_imaginary": Wrapper(
        lambda head, tree: optax.contrib.split_real_and_imaginary(optax.chain(head, SGD)),
        forms=("beside",),
    ),
    # Of each kind of optimiser one: by leaves, by their norms, by the loss, by matrices, by a
    # history of gradients, and one that finds the rate itself.
    "adamw": before(optax.adamw),
    "lamb": before(optax.lamb),
    "polyak_sgd": before(optax.polyak_sgd),
    "muon": before(optax.contrib.muon),
    "lbfgs": before(optax.lbfgs, linesearch=None),
    "mechanize": Wrapper(
        lambda head, tree: optax.chain(head, optax.contrib.mechanize(optax.sgd(RATE), s_init=0.1))
    ),
}


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name in WRAPPERS for form in WRAPPERS[name].forms]
)
def test_trains_and_its_temperature_can_be_read_and_set(name, form):
    wrap, _, every, start = WRAPPERS[name]
    tree = FORMS[form]
    tx = optax.with_extra_args_support(wrap(HEAD, tree))
    chex.clear_trace_counter()  # it goes by name

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, opt_state):
        at = getattr(params, "fast", params)
        loss, grads, sums = value_and_grad(at, opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, **sums)
        return optax.apply_updates(params, updates), opt_state

    first = jax.tree.map(jnp.asarray, PARAMS)
    params = start(tree(first, zero_sums()))
    opt_state = tx.init(params)
    for lam in LAMS:
        if optax.tree.get(opt_state, "temperature") != lam:
            opt_state = optax.tree.set(opt_state, temperature=jnp.float64(lam))
        assert get_temperature(opt_state) == lam
        params, opt_state = step(params, opt_state)
    plain = expected(functools.partial(wrap, tree=alone), start(first), every)
    chex.assert_trees_all_close(net_of(params), plain, rtol=0, atol=1e-12)
    assert np.abs(getattr(plain, "fast", plain)["w"] - PARAMS["w"]).max() > 1e-4


def test_in_nnx_the_temperature_is_a_variable_to_be_set():
    model = nnx.Linear(8, 1, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    model.kernel[...], model.bias[...] = PARAMS["w"].reshape(8, 1), PARAMS["b"]
    optimizer = nnx.Optimizer(model, absgd(RATE, LAM, gamma=GAMMA), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model, sums):
            losses = jnp.square(model(X)[:, 0] - Y)
            return tilt(losses, optimizer.opt_state, sums).mean()

        _, (grads, sums) = nnx.value_and_grad(loss_fn, argnums=(0, 1))(model, Sums())
        optimizer.update(model, grads, sums=sums)

    for lam in LAMS:
        optimizer.opt_state[0].temperature[...] = jnp.float64(lam)
        step(model, optimizer)
    params = {"w": model.kernel[...].reshape(4, 2), "b": model.bias[...]}
    plain = expected(lambda head: optax.chain(head, SGD))
    chex.assert_trees_all_close(params, plain, rtol=0, atol=1e-12)
