"""Fifty steps of ABSGD on ARB-Loss: in NumPy, and in JAX for any layout of the batch.

Every batch is masked unevenly: of its eighths one is masked whole, and so is one batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from jax import lax

from absgd_jax import (
    absgd,
    accumulate,
    attention,
    get_temperature,
    losses,
    pmerge,
    robust_loss,
    target_kl,
)

STEPS, RATE, WEIGHT_DECAY, GAMMA = 50, 0.1, 1e-3, 0.7


def problem(dtype=np.float64):
    """Initial parameters, and batches ``(images, labels, where)``, steps leading."""
    params, xs, ys = reference.problem()
    where = np.random.default_rng(1).random((STEPS, reference.BATCH)) > 0.3
    eighths = where.reshape(STEPS, 8, -1)
    eighths[np.arange(STEPS), np.arange(STEPS) % 8] = False
    where[20] = False
    params = {k: p.astype(dtype) for k, p in params.items()}
    return params, (xs[:STEPS].astype(dtype), ys[:STEPS], where)


def expected(temperature):
    """Parameters, λ, log_normalizer and the losses of the steps, of the rows that aren't masked.

    ``temperature`` is λ, or of an automatic one the first λ and the target of KL.
    """
    params, batches = problem()
    lam, radius = temperature if isinstance(temperature, tuple) else (temperature, None)
    momentum, u, values = {k: np.zeros_like(p) for k, p in params.items()}, 0.0, []
    for x, y, where in zip(*batches, strict=True):
        x, y = x[where], y[where]
        with np.errstate(divide="ignore"):
            log_prior = np.log(np.bincount(y, minlength=reference.CLASSES))
        grads, value = dict.fromkeys(params, 0.0), 0.0
        if len(y):
            each, gradient = reference.cross_entropy(params, x, y, log_prior)
            case = reference.Case(lam, GAMMA, 1.0, WEIGHT_DECAY, switch=0)
            weights, u = reference.weigh(each, u, case, step=0)
            grads = gradient(weights)
            value = lam * np.log(np.exp(each / lam).mean())
            if radius is not None:
                shares = weights / weights.sum()
                if lam > 0:
                    damping = 1 + 2 * np.sqrt(len(y) * np.sum(shares**2) - 1)
                    grads = {k: g / damping for k, g in grads.items()}
                kl = np.sum(shares * np.log(len(y) * shares))
                before, lam = lam, lam * (kl / radius) ** 0.1
                u **= before / lam  # λ log u is what stays
        for k, p in params.items():
            momentum[k] = reference.MOMENTUM * momentum[k] + grads[k] + WEIGHT_DECAY * p
            params[k] = p - RATE * momentum[k]
        values.append(value)
    return params, lam, np.log(u), np.array(values)


def per_example(params, x, y, where, class_counts=None, *, axis_name=None, out_sharding=None):
    h = jnp.tanh(x @ params["w1"] + params["b1"][None])
    logits = jnp.matmul(h, params["w2"], out_sharding=out_sharding) + params["b2"][None]
    return losses.arb(logits, y, where=where, axis_name=axis_name, class_counts=class_counts)


def plain(params, temperature, batch, axis_name, **kwargs):
    """Loss, losses and gradient as for SGD, whose loss is a mean over the axis."""

    def loss_fn(params):
        each = per_example(params, *batch, axis_name=axis_name, **kwargs)
        return robust_loss(each, temperature, where=batch[2], axis_name=axis_name), each

    (loss, each), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, each, grads if axis_name is None else lax.pmean(grads, axis_name)


def merged(params, temperature, batch, axis_name):
    """Loss and gradient of every device's part, merged, and the losses of the part."""

    def loss_fn(params):
        each = per_example(params, *batch, axis_name=axis_name)
        return robust_loss(each, temperature, where=batch[2]), each

    varying = lax.pcast(params, axis_name, to="varying")
    (loss, each), grads = jax.value_and_grad(loss_fn, has_aux=True)(varying)
    loss, grads = pmerge(loss, grads, temperature, where=batch[2], axis_name=axis_name)
    return loss, each, grads


def as_temperature(temperature):
    if isinstance(temperature, tuple):
        init_value, radius = temperature
        return target_kl(radius, init_value=init_value)
    return temperature


def train(
    params, batches, temperature, *, value_and_grad=plain, axis_name=None, every_k=None, **kwargs
):
    """Parameters, state of the attention, and the losses of the calls."""
    tx = absgd(RATE, as_temperature(temperature), weight_decay=WEIGHT_DECAY, gamma=GAMMA)
    if every_k is not None:
        tx = accumulate(tx, every_k)

    def step(carry, batch):
        params, opt_state = carry
        temperature = get_temperature(opt_state)
        loss, each, grads = value_and_grad(params, temperature, batch, axis_name, **kwargs)
        extra_args = {"where": batch[2], "losses": each, "axis_name": axis_name}
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, **extra_args)
        return (optax.apply_updates(params, updates), opt_state), loss

    (params, opt_state), values = lax.scan(step, (params, tx.init(params)), batches)
    (state, *_) = opt_state if every_k is None else opt_state.inner_opt_state
    return params, state, values


def train_by_weights(params, batches, temperature, *, axis_name=None):
    """As ``train``, by the functional helper."""
    attend = attention(as_temperature(temperature), gamma=GAMMA)
    tx = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(RATE, reference.MOMENTUM))

    def step(carry, batch):
        params, opt_state, state = carry

        def loss_fn(params):
            each = per_example(params, *batch, axis_name=axis_name)
            weights, new = attend.update(each, state, where=batch[2], axis_name=axis_name)
            loss = (weights * each).sum()
            return loss if axis_name is None else lax.psum(loss, axis_name), new

        (_, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        grads = grads if axis_name is None else lax.pmean(grads, axis_name)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), None

    (params, _, state), _ = lax.scan(step, (params, tx.init(params), attend.init()), batches)
    return params, state, None
