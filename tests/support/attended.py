"""The weights of examples, as gradients by their losses, and those of the published algorithm."""

import jax
import jax.numpy as jnp
import numpy as np

from absgd_jax import tilt


def attend(tx, batch, state, mean=jnp.mean, /, **extra_args):
    """The weights of a batch, and the new state: a step whose parameters are the losses."""

    def loss_fn(losses):
        return mean(tilt(losses, state))

    value, grads = jax.value_and_grad(loss_fn)(batch)
    return tx.update(grads, state, value=value, **extra_args)


def follow(tx, batches, state=None, **extra_args):
    """The weights of every batch, and the state before each and after the last."""

    def step(state, losses):
        weights, new = attend(tx, losses, state, **extra_args)
        return new, (weights, state)

    state = tx.init(None) if state is None else state
    last, (weights, before) = jax.lax.scan(step, state, jnp.asarray(batches))
    return weights, jax.tree.map(lambda b, x: jnp.append(b, x), before, last)


def published(batches, temperatures, gamma, alpha=1.0):
    """The weights of every batch, and V: in float64, by logarithms, so that nothing overflows."""
    baseline, history = None, []
    for losses, lam in zip(
        np.float64(batches), np.broadcast_to(temperatures, len(batches)), strict=True
    ):
        weights = np.full(losses.shape, 1 / losses.size)
        if np.isfinite(lam):
            largest = (losses / lam).max()
            log_mean = largest + np.log(np.mean(np.exp(losses / lam - largest)))
            log_u = -np.inf if baseline is None else baseline / lam
            with np.errstate(divide="ignore"):
                log_u = np.logaddexp(np.log1p(-gamma) + log_u, np.log(gamma) + log_mean)
            weights = np.exp(losses / lam - log_u) / (losses.size * alpha)
            baseline = lam * log_u
        history.append((weights, baseline))
    weights, baselines = zip(*history, strict=True)
    return np.stack(weights), baselines
