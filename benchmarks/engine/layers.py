"""Dense layers as pure functions, and a loop that trains them: for many small runs as one program.

They are pairs of a kernel and a bias, with a ReLU between.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def batches(rng: np.random.Generator, rows: np.ndarray, steps: int, size: int) -> np.ndarray:
    """Rows at random, [steps, size]: all of them come once before one comes again."""
    orders = [rng.permutation(rows) for _ in range(-(-steps * size // len(rows)))]
    return np.int32(np.concatenate(orders)[: steps * size].reshape(steps, size))


def train_in_parts(
    train: Callable[[Any], tuple[jax.Array, jax.Array]], runs: Sequence[Any], size: int
) -> Iterator[tuple[np.ndarray, bool]]:
    """What ``train`` makes of each run, from so many of them stacked.

    The last ones are filled up, so that one compilation serves all.
    """
    for at in range(0, len(runs), size):
        part = runs[at : at + size]
        filled = (part[i % len(part)] for i in range(size))
        outputs, finite = jax.device_get(train(jax.tree.map(lambda *x: np.stack(x), *filled)))
        yield from zip(outputs[: len(part)], finite[: len(part)].tolist(), strict=True)


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
