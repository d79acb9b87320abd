"""The weights of examples, as gradients by their losses."""

import functools

import jax
import jax.numpy as jnp

from absgd_jax import Sums, tilt


def slopes_and_sums(losses, state, mean=jnp.mean):
    """The gradient of a mean of tilted losses, by these and by the sums."""

    def loss_fn(losses, sums):
        return mean(tilt(losses, state, sums))

    return jax.grad(loss_fn, argnums=(0, 1))(losses, Sums())


def attend(tx, losses, state, mean=jnp.mean):
    """The weights of a batch, and the new state: a step whose parameters are the losses."""
    slopes, sums = slopes_and_sums(losses, state, mean)
    return tx.update(slopes, state, sums=sums)


@functools.partial(jax.jit, static_argnums=0)
def follow(tx, batches, state=None):
    """The weights of every batch, and the state before each and after the last."""

    def step(state, losses):
        weights, new = attend(tx, losses, state)
        return new, (weights, state)

    state = tx.init(None) if state is None else state
    last, (weights, before) = jax.lax.scan(step, state, jnp.asarray(batches))
    return weights, jax.tree.map(lambda b, x: jnp.append(b, x), before, last)
