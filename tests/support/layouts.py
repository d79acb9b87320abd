"""Fifty steps of ABSGD on ARB-Loss: in NumPy, and in JAX for any way to take the batch's mean.

Every example has a sample weight, and many have none: of the eighths of a batch one is masked
whole, and so is one batch. The loops are those of an SGD user, but for ``tilt`` and ``value``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from absgd_jax import absgd, accumulate, losses, target_kl, tilt
from tests.support import reference

STEPS, RATE, WEIGHT_DECAY, GAMMA = 50, 0.1, 1e-3, 0.7


def problem(dtype=np.float64):
    """Initial parameters, and batches: images, labels, weights, class counts, total weights."""
    params, xs, ys = reference.problem()
    rng = np.random.default_rng(1)
    weights = np.where(rng.random(ys[:STEPS].shape) > 0.3, rng.uniform(0.5, 2, ys[:STEPS].shape), 0)
    weights.reshape(STEPS, 8, -1)[np.arange(STEPS), np.arange(STEPS) % 8] = 0
    weights[20] = 0
    counts = [
        np.bincount(y[w > 0], minlength=reference.CLASSES)
        for y, w in zip(ys, weights, strict=False)
    ]
    totals = np.maximum(weights.sum(axis=1), 1e-3)
    floats = xs[:STEPS], weights, np.stack(counts), totals
    x, weights, counts, totals = (a.astype(dtype) for a in floats)
    params = {k: p.astype(dtype) for k, p in params.items()}
    return params, (x, ys[:STEPS], weights, counts, totals)


def expected(temperature):
    """Parameters, λ and V in float64, from the rows that have a weight.

    ``temperature`` is λ, or of an automatic one the first λ and the target of KL.
    """
    params, (xs, ys, weights, counts, totals) = problem()
    lam, radius = temperature if isinstance(temperature, tuple) else (temperature, None)
    with np.errstate(divide="ignore"):
        rows = zip(xs, ys, weights > 0, np.log(counts), strict=True)
    batches = [(x[kept], y[kept], log_counts) for x, y, kept, log_counts in rows]

    def attend(step, losses, state):
        lam, baseline, averaged = state
        shares = weights[step][weights[step] > 0] / totals[step]
        if not losses.size:
            return shares, state
        averaged += np.isfinite(lam)
        gamma = GAMMA if radius is None else reference.debiased(GAMMA, averaged)
        attended, baseline = reference.weigh(losses, baseline, lam, gamma, shares=shares)
        if radius is not None:
            lam, damping = reference.tune(losses, lam, kl=radius)
            attended = attended / damping
        return attended, (lam, baseline, averaged)

    update = reference.sgd(RATE, WEIGHT_DECAY)
    *_, last = reference.train(params, batches, attend, update, (lam, None, 0))
    return last[0], *last[1][:2]


def per_example(params, x, y, where, class_counts, out_sharding=None):
    h = jnp.tanh(x @ params["w1"] + params["b1"][None])
    logits = jnp.matmul(h, params["w2"], out_sharding=out_sharding) + params["b2"][None]
    return losses.arb(logits, y, where=where, class_counts=class_counts)


def value_and_grad(params, opt_state, batch, **kwargs):
    """The weighted mean, or of a part of the batch its share of it; its gradient; the losses."""
    x, y, weight, counts, total = batch

    def loss_fn(params):
        each = per_example(params, x, y, weight > 0, counts, **kwargs)
        return jnp.sum(weight * tilt(each, opt_state)) / total, each

    (loss, each), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, grads, each


def on_devices(params, opt_state, batch, *, axis_name):
    """Of every device its part."""
    params = lax.pcast(params, axis_name, to="varying")
    loss, grads, each = value_and_grad(params, opt_state, batch)
    return *lax.psum((loss, grads), axis_name), each


def by_hand(params, opt_state, batch, *, k):
    """Of k micro-batches, one after another."""

    def add(carry, micro_batch):
        *found, each = value_and_grad(params, opt_state, (*micro_batch, *batch[3:]))
        return jax.tree.map(jnp.add, carry, tuple(found)), each

    micro_batches = jax.tree.map(lambda a: a.reshape(k, -1, *a.shape[1:]), batch[:3])
    zeros = jnp.zeros_like(batch[4]), jax.tree.map(jnp.zeros_like, params)
    (loss, grads), each = lax.scan(add, zeros, micro_batches)
    return loss, grads, each.reshape(-1)


def by_optax(params, opt_state, batch, *, k):
    """Of k micro-batches, by optax.microbatch and its mean."""

    def of_micro_batch(*micro_batch):
        loss, grads, _ = value_and_grad(params, opt_state, (*micro_batch, batch[3], batch[4] / k))
        return loss, grads

    rows = len(batch[1])
    mean = optax.microbatch(
        of_micro_batch,
        argnums=(0, 1, 2),
        microbatch_size=rows // k,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    with jax.numpy_dtype_promotion("standard"):  # optax itself needs it
        return *mean(*batch[:3]), None


def train(
    params, batches, temperature, *, value_and_grad=value_and_grad, axis_name=None, every_k=None
):
    """Parameters, and the state of the attention."""
    if isinstance(temperature, tuple):
        init_value, radius = temperature
        temperature = target_kl(radius, init_value=init_value)
    tx = absgd(RATE, temperature, weight_decay=WEIGHT_DECAY, gamma=GAMMA)
    if every_k is not None:
        tx = accumulate(tx, every_k)

    def step(carry, batch):
        params, opt_state = carry
        loss, grads, each = value_and_grad(params, opt_state, batch)
        # For an automatic temperature.
        extra_args = {"losses": each, "where": batch[2] > 0, "axis_name": axis_name}
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, **extra_args)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, opt_state), _ = lax.scan(step, (params, tx.init(params)), batches)
    (state, *_) = opt_state if every_k is None else opt_state.inner_opt_state
    return params, state


def spread(axis_name, **kwargs):
    """``train`` under pmap or shard_map."""
    on_axis = functools.partial(on_devices, axis_name=axis_name)
    return functools.partial(train, value_and_grad=on_axis, axis_name=axis_name, **kwargs)


def split_steps(k, params, batches):
    """Every batch as k of its parts, of which each has its share of the total."""
    *rows, counts, totals = batches
    rows = (a.reshape(len(a) * k, -1, *a.shape[2:]) for a in rows)
    return params, (*rows, np.repeat(counts, k, axis=0), np.repeat(totals / k, k))
