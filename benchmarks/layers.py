"""Dense layers as pure functions, and a loop that trains them: for many small runs as one program.

They are pairs of a kernel and a bias, with a ReLU between.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

Layers = list[tuple[jax.Array, jax.Array]]


def init(key: jax.Array, widths: Sequence[int]) -> Layers:
    shapes = list(itertools.pairwise(widths))
    kernels = map(jax.nn.initializers.he_normal(), jax.random.split(key, len(shapes)), shapes)
    return [(kernel, jnp.zeros(kernel.shape[1])) for kernel in kernels]


def predict(layers: Layers, x: jax.Array) -> jax.Array:
    """Logits."""
    *hidden, (kernel, bias) = layers
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ kernel + bias


def learn(
    tx: optax.GradientTransformationExtraArgs,
    loss_fn: Callable[[Layers, Any, Any], tuple[jax.Array, tuple[jax.Array, Any]]],
    layers: Layers,
    batches: Any,
) -> tuple[Layers, Any]:
    """The layers after a step on each batch, and the records.

    ``loss_fn(layers, opt_state, batch)`` returns the value, the losses, and what is recorded.
    """

    def step(carry, batch):
        layers, opt_state = carry
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (value, (losses, record)), grads = gradient(layers, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, layers, value=value, losses=losses)
        return (optax.apply_updates(layers, updates), opt_state), record

    (layers, _), records = jax.lax.scan(step, (layers, tx.init(layers)), batches)
    return layers, records
