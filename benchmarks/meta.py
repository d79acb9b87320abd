"""Weights that are learnt from clean examples: what the cost of ABSGD is compared with.

Both algorithms look at what a step of SGD would do to the loss of a clean batch. With l_i(θ) the
losses of the training batch, L(θ) the mean loss of the clean one and α the learning rate,

    learning to reweight   w_i ∝ max(0, -∂/∂ε_i L(θ - α Σ_j ε_j ∇l_j(θ)))   at ε = 0
    Meta-Weight-Net        w_i = V(l_i; Θ) / n,   Θ ← Θ - β ∇_Θ L(θ - α Σ_j w_j ∇l_j(θ))

where V is a network with one hidden layer. The step that is then made is one on Σ w_i l_i(θ).

Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML 2018, arXiv 1803.09050;
Shu et al., "Meta-Weight-Net", NeurIPS 2019, arXiv 1902.07379.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.steps import Batch, MOMENTUM, RATE, State, Work

META_RATE, HIDDEN = 1e-3, 100  # of V

Losses = Callable[[Any, Batch], jax.Array]  # of the parameters, and a batch
Weights = Callable[[jax.Array], jax.Array]  # of the losses


def look_ahead(losses: Losses, params: Any, batch: Batch, weights: Weights) -> Any:
    """The parameters after a step of plain SGD."""

    def loss_fn(params):
        each = losses(params, batch)
        return jnp.sum(weights(jax.lax.stop_gradient(each)) * each)

    return jax.tree.map(lambda p, g: p - RATE * g, params, jax.grad(loss_fn)(params))


def l2rw(
    losses: Losses, params: Any, theta: None, train: Batch, clean: Batch
) -> tuple[Weights, None]:
    """Learning to reweight as published: backwards through the step."""

    def clean_loss(eps):
        return losses(look_ahead(losses, params, train, lambda _: eps), clean).mean()

    shape = jax.eval_shape(losses, params, train)
    weights = normalized(-jax.grad(clean_loss)(jnp.zeros(shape.shape, shape.dtype)))
    return lambda _: weights, theta


def l2rw_forward(
    losses: Losses, params: Any, theta: None, train: Batch, clean: Batch
) -> tuple[Weights, None]:
    """The same weights at the least cost: at ε = 0 it is α ∇l_i · ∇L, a derivative in forward mode.

    Nobody has published this, that we know of; it is here so that the comparison is with the best.
    """
    slope = jax.grad(lambda params: losses(params, clean).mean())(params)
    _, gain = jax.jvp(lambda params: losses(params, train), (params,), (slope,))
    weights = normalized(gain)
    return lambda _: weights, theta


def normalized(gain: jax.Array) -> jax.Array:
    positive = jnp.maximum(gain, 0)
    total = jnp.sum(positive)
    return positive / jnp.where(total > 0, total, 1)


def meta_weight_net(
    losses: Losses, params: Any, theta: dict[str, jax.Array], train: Batch, clean: Batch
) -> tuple[Weights, dict[str, jax.Array]]:
    def weights(theta):
        return lambda each: weight_net(theta, each) / each.size

    def clean_loss(theta):
        return losses(look_ahead(losses, params, train, weights(theta)), clean).mean()

    theta = jax.tree.map(lambda t, g: t - META_RATE * g, theta, jax.grad(clean_loss)(theta))
    return weights(theta), theta


def init_weight_net(key: jax.Array) -> dict[str, jax.Array]:
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (1, HIDDEN)),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(second, (HIDDEN, 1)) / HIDDEN**0.5,
        "b2": jnp.zeros(1),
    }


def weight_net(theta: dict[str, jax.Array], losses: jax.Array) -> jax.Array:
    """V: a weight in (0, 1) for each loss."""
    hidden = jax.nn.relu(losses[..., None] * theta["w1"][0] + theta["b1"])
    return jax.nn.sigmoid(hidden @ theta["w2"] + theta["b2"])[..., 0]


ALGORITHMS = {"l2rw": l2rw, "l2rw_forward": l2rw_forward, "meta_weight_net": meta_weight_net}


def make_step(work: Work, name: str) -> tuple[State, Callable[[State, Batch, Batch], State]]:
    """The initial state, and the step, which takes a clean batch, too."""
    tx = optax.sgd(RATE, MOMENTUM)
    theta = init_weight_net(jax.random.key(0)) if name == "meta_weight_net" else None

    def step(state, train, clean):
        params, other, (theta, opt_state), _ = state

        def losses(params, batch):
            return work.losses(params, other, batch)[0]

        weights, theta = ALGORITHMS[name](losses, params, theta, train, clean)

        def loss_fn(params):
            each, new = work.losses(params, other, train)
            return jnp.sum(weights(jax.lax.stop_gradient(each)) * each), new

        (loss, other), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return State(optax.apply_updates(params, updates), other, (theta, opt_state), loss)

    opt_state = theta, tx.init(work.params)
    return State(work.params, work.other, opt_state, jnp.zeros([])), step
