"""Fifty steps of ABSGD on ARB-Loss: in NumPy, and in JAX for any way to make a loss of a batch.

Every example has a sample weight, and many have none: of the eighths of a batch one is masked
whole, and so is one batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from absgd_jax import losses, scale_by_attention, Sums, target_kl, tilt, zero_sums
from tests.support import reference

STEPS, RATE, WEIGHT_DECAY, GAMMA, PENALTY = 50, 0.1, 1e-3, 0.7, 0.01


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


def expected(temperature, penalty_gradient=None):
    """Parameters, λ and V in float64, from the rows that have a weight.

    ``temperature`` is λ, or of an automatic one the first λ and the target of KL. The gradient of a
    penalty has the scale of the others'.
    """
    params, (xs, ys, weights, counts, totals) = problem()
    lam, radius = temperature if isinstance(temperature, tuple) else (temperature, None)
    baseline, averaged, update = None, 0, reference.sgd(RATE, WEIGHT_DECAY)
    with np.errstate(divide="ignore"):
        log_counts = np.log(counts)
    for x, y, weight, prior, total in zip(xs, ys, weights, log_counts, totals, strict=True):
        kept = weight > 0
        shares = weight[kept] / total
        each, gradient = reference.cross_entropy(params, x[kept], y[kept], prior)
        if not each.size:
            params = update(params, {k: np.zeros_like(p) for k, p in params.items()})
            continue
        averaged += np.isfinite(lam)
        gamma = GAMMA if radius is None else reference.debiased(GAMMA, averaged)
        slope = 1 if np.isinf(lam) else np.exp((each - (baseline or 0.0)) / lam)
        before = baseline
        attended, baseline = reference.weigh(each, before, lam, gamma, shares=shares)
        if radius is not None:
            if np.isinf(lam):
                mean = np.sum(shares * each)
                baseline = mean if before is None else before + gamma * (mean - before)
            lam, damping = reference.tune(each, lam, kl=radius, shares=shares)
            attended = attended / damping
        grads = gradient(attended)
        if penalty_gradient is not None:
            scale = np.sum(attended) / np.sum(shares * slope)
            grads = {k: g + scale * penalty_gradient(params[k]) for k, g in grads.items()}
        params = update(params, grads)
    return params, lam, baseline


def per_example(params, x, y, where, class_counts, out_sharding=None):
    h = jnp.tanh(x @ params["w1"] + params["b1"][None])
    logits = jnp.matmul(h, params["w2"], out_sharding=out_sharding) + params["b2"][None]
    return losses.arb(logits, y, where=where, class_counts=class_counts)


# What a loop makes of the losses, given how to tilt them.


def weighted_mean(each, tilted, weight, total):
    return jnp.sum(weight * tilted(each)) / total


def times_mask_over_garbage(each, tilted, weight, total):
    garbage = jnp.where(weight > 0, each, 1e4)
    return weighted_mean(garbage, tilted, weight, total)


def where_over_nan(each, tilted, weight, total):
    nan = jnp.where(weight > 0, each, jnp.nan)
    return jnp.sum(jnp.where(weight > 0, weight * tilted(nan), 0)) / total


def gradients(params, opt_state, batch, sums=None, *, loss=weighted_mean, penalty=None, **kwargs):
    """By the parameters and by the sums; or by the parameters, if the sums are among them."""
    x, y, weight, counts, total = batch

    def loss_fn(params, sums):
        net = params.get("net", params)
        each = per_example(net, x, y, weight > 0, counts, **kwargs)
        value = loss(each, lambda x: tilt(x, opt_state, sums or params), weight, total)
        return value if penalty is None else value + penalty(params)

    if "net" in params:
        return jax.grad(lambda params: loss_fn(params, None))(params), None
    return jax.grad(loss_fn, argnums=(0, 1))(params, Sums())


def on_devices(params, opt_state, batch, *, axis_name, rows, varying, **kwargs):
    """Of every device its part of the rows, which are spread over some of the axes."""
    total = batch[-1] / lax.psum(1, rows)
    if varying:
        params = lax.pcast(params, axis_name, to="varying")
    found = gradients(params, opt_state, (*batch[:-1], total), **kwargs)
    return lax.pmean(found, axis_name)


def by_hand(params, opt_state, batch, *, k):
    """Of k micro-batches, one after another."""

    def add(carry, micro_batch):
        found = gradients(params, opt_state, (*micro_batch, *batch[3:]))
        return jax.tree.map(jnp.add, carry, found), None

    micro_batches = jax.tree.map(lambda a: a.reshape(k, -1, *a.shape[1:]), batch[:3])
    zeros = jax.tree.map(jnp.zeros_like, params), zero_sums()
    return lax.scan(add, zeros, micro_batches)[0]


def by_optax(params, opt_state, batch, *, k):
    """Of k micro-batches, by optax.microbatch and its mean."""

    def of_micro_batch(*micro_batch):
        return gradients(params, opt_state, (*micro_batch, batch[3], batch[4] / k))

    mean = optax.microbatch(
        of_micro_batch,
        argnums=(0, 1, 2),
        microbatch_size=len(batch[1]) // k,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    with jax.numpy_dtype_promotion("standard"):  # optax itself needs it
        return mean(*batch[:3])


def train(
    params,
    batches,
    temperature,
    *,
    gradients=gradients,
    wrap=lambda tx: tx,
    before=optax.identity,
    closure=False,
):
    """Parameters, and the state of the attention."""
    if isinstance(temperature, tuple):
        init_value, radius = temperature
        temperature = target_kl(radius, init_value=init_value)
    tx = wrap(
        optax.chain(
            before(),
            scale_by_attention(temperature, gamma=GAMMA),
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.sgd(RATE, 0.9),
        )
    )
    first = tx.init(params)

    def step(carry, batch):
        params, opt_state = carry
        grads, sums = gradients(params, first if closure else opt_state, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps itself needs it
            updates, opt_state = tx.update(grads, opt_state, params, sums=sums)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, opt_state), _ = lax.scan(step, (params, first), batches)
    _, state, *_ = getattr(opt_state, "inner_opt_state", opt_state)
    return params, state


def beside(train, value=0.0):
    """The same with the sums beside the parameters."""

    def train_both(params, batches, temperature):
        sums = jax.tree.map(lambda q: q + value, zero_sums())
        params, state = train({"net": params, "sums": sums}, batches, temperature)
        return params["net"], state

    return train_both


def spread(axis_name, rows=None, *, varying=True):
    """``train`` under shard_map, or if they don't vary by type under pmap or vmap."""
    rows = rows or axis_name
    on_axis = functools.partial(on_devices, axis_name=axis_name, rows=rows, varying=varying)
    return functools.partial(train, gradients=on_axis)


def split_steps(k, params, batches):
    """Every batch as k of its parts, of which each has its share of the total."""
    *rows, counts, totals = batches
    rows = (a.reshape(len(a) * k, -1, *a.shape[2:]) for a in rows)
    return params, (*rows, np.repeat(counts, k, axis=0), np.repeat(totals / k, k))
