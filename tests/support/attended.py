"""The weights of examples, as gradients by their losses."""

import functools

import jax
import jax.numpy as jnp

from absgd_jax import tilt


def attend(tx, batch, state, mean=jnp.mean, /, **extra_args):
    """The weights of a batch, and the new state: a step whose parameters are the losses."""

    def loss_fn(losses):
        return mean(tilt(losses, state))

    value, grads = jax.value_and_grad(loss_fn)(batch)
    return tx.update(grads, state, value=value, **extra_args)


@functools.partial(jax.jit, static_argnums=0)
def follow(tx, batches, state=None, **extra_args):
    """The weights of every batch, and the state before each and after the last."""

    def step(state, losses):
        weights, new = attend(tx, losses, state, **extra_args)
        return new, (weights, state)

    state = tx.init(None) if state is None else state
    last, (weights, before) = jax.lax.scan(step, state, jnp.asarray(batches))
    return weights, jax.tree.map(lambda b, x: jnp.append(b, x), before, last)
