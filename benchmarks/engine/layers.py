"""Dense layers as pure functions, and a loop that trains them: for many small runs as one program.

They are pairs of a kernel and a bias, with a ReLU between.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from absgd_jax import Sums

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
    loss_fn: Callable[[Layers, Sums, Any, Any], tuple[jax.Array, Any]],
    layers: Layers,
    batches: Any,
) -> tuple[Layers, Any]:
    """The layers after a step on each batch, and the records.

    ``loss_fn(layers, sums, opt_state, batch)`` returns the loss, and what is recorded.
    """

    def step(carry, batch):
        layers, opt_state = carry
        gradient = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)
        (grads, sums), record = gradient(layers, Sums(), opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, layers, sums=sums)
        return (optax.apply_updates(layers, updates), opt_state), record

    (layers, _), records = jax.lax.scan(step, (layers, tx.init(layers)), batches)
    return layers, records
