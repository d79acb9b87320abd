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

from benchmarks.engine.steps import Batch, make_state, MOMENTUM, RATE, State, Step, Work

META_RATE, HIDDEN = 1e-3, 100  # of V

Losses = Callable[[Any], jax.Array]  # of the training batch at some parameters
Loss = Callable[[Any], jax.Array]  # the mean of the clean batch
Weights = Callable[[jax.Array], jax.Array]  # of losses


def weighted(losses: jax.Array, weights: Weights) -> jax.Array:
    return jnp.sum(weights(jax.lax.stop_gradient(losses)) * losses)


def look_ahead(train: Losses, params: Any, weights: Weights, rate: float) -> Any:
    """The parameters after a step of plain SGD."""
    grads = jax.grad(lambda params: weighted(train(params), weights))(params)
    return jax.tree.map(lambda p, g: p - rate * g, params, grads)


def l2rw(
    train: Losses, clean: Loss, params: Any, theta: Any, *, rate: float = RATE
) -> tuple[Weights, Any]:
    """Learning to reweight as published: backwards through the step."""
    eps = jnp.zeros_like(jax.eval_shape(train, params))
    slope = jax.grad(lambda eps: clean(look_ahead(train, params, lambda _: eps, rate)))(eps)
    return normalized(-slope), theta


def l2rw_forward(
    train: Losses, clean: Loss, params: Any, theta: Any, *, rate: float = RATE
) -> tuple[Weights, Any]:
    """The same weights at the least cost: at ε = 0 it is α ∇l_i · ∇L, a derivative in forward mode.

    Nobody has published this, that we know of; it is here so that the comparison is with the best.
    """
    return normalized(jax.jvp(train, (params,), (jax.grad(clean)(params),))[1]), theta


def normalized(gain: jax.Array) -> Weights:
    positive = jnp.maximum(gain, 0)
    total = jnp.sum(positive)
    return lambda _: positive / jnp.where(total > 0, total, 1)


def meta_weight_net(
    train: Losses,
    clean: Loss,
    params: Any,
    theta: Any,
    *,
    rate: float = RATE,
    meta_rate: float = META_RATE,
) -> tuple[Weights, Any]:
    def weights(theta):
        return lambda losses: weight_net(theta, losses) / losses.size

    slope = jax.grad(lambda theta: clean(look_ahead(train, params, weights(theta), rate)))(theta)
    theta = jax.tree.map(lambda t, g: t - meta_rate * g, theta, slope)
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


# What each returns are the weights, and the new Θ.
ALGORITHMS = {"l2rw": l2rw, "l2rw_forward": l2rw_forward, "meta_weight_net": meta_weight_net}


def make_step(work: Work, name: str) -> tuple[Step, State, Batch, Batch]:
    """As steps.make_step; the clean batch is one of its own, though its examples are the same."""
    tx = optax.sgd(RATE, MOMENTUM)
    theta = init_weight_net(jax.random.key(0)) if name == "meta_weight_net" else None

    def step(state, train, clean):
        params, other, (theta, opt_state), _ = state
        weights, theta = ALGORITHMS[name](
            lambda params: work.losses(params, other, train)[0],
            lambda params: work.losses(params, other, clean)[0].mean(),
            params,
            theta,
        )

        def loss_fn(params):
            losses, new = work.losses(params, other, train)
            return weighted(losses, weights), new

        (loss, other), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return State(optax.apply_updates(params, updates), other, (theta, opt_state), loss)

    state = make_state(work, (theta, tx.init(work.params)))
    return step, state, work.examples, work.examples
