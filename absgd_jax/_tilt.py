r"""The maths of attentional weights.

For losses l_1, ..., l_n and a temperature λ, the robust loss F is the minimum of a mean over V, or
the maximum for λ < 0:

    F = λ log mean_i exp(l_i / λ) = min_V mean_i [V + λ expm1((l_i - V) / λ)]

A term of that mean has the slope exp(z), z = (l - V) / λ. The state holds V, the baseline of the
losses, before the step. So each loss gets its slope by itself, whatever the weights c_i that the
loop gives the examples. Sums over these weights come with the gradient (``_sums.py``). With
E = Σ c exp(z) / Σ c, the published normaliser u = α exp(V / λ) and the weights
p_i = exp(l_i / λ) / (n u) follow:

    u ← (1 - γ) u + γ α mean exp(l / λ)        V ← V + λ log(1 - γ + γ E)
    Σ p_i ∇l_i                               = Σ c_i exp(z_i) ∇l_i / (α (1 - γ + γ E))

In the first weighted batch u is 0, and V only a point of reference: there γ E replaces 1 - γ + γ E.
V is a loss: it can't overflow as u does, and means the same whatever λ comes next.
"""

import warnings
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from absgd_jax._checks import as_batch, as_floats, as_mask
from absgd_jax._reduce import psum
from absgd_jax._state import (
    attention_of,
    AttentionState,
    check_temperature,
    clamped,
    eps,
    inverse,
    is_infinite,
    unit,
)
from absgd_jax._sums import bound, divergences, means, ride, Sums, zeros_in


def tilt(losses: ArrayLike, opt_state: optax.OptState, sums: Any) -> jax.Array:
    r"""Leaves the losses as they are, and gives them the slopes of ABSGD.

    .. math::
      \mathrm{tilt}(l) = l,
      \qquad
      \frac{\partial\, \mathrm{tilt}(l)}{\partial l} = e^{(l - V) / \lambda}

    :math:`\lambda` is the temperature and :math:`V` the baseline in the state of the optimiser; at
    :math:`\lambda = \pm\infty` the slope is 1. It is elementwise: tilt each loss, before the mean,
    the sample weights or the mask, then go on as with the losses themselves. Whatever reads the
    loss, such as a log or a schedule, reads the same value as without ``tilt``.

    The update needs the gradient by ``sums``, which are zero. This gradient knows the weight of
    each example in the loss. So a sum in place of a mean, a constant or another term beside the
    losses, micro-batches, devices and loss scaling change only the length of the gradient, as they
    do for SGD.

    Exponents are bounded, in float32 to between -78 and 35: further off, the slope is that at the
    bound. A loss that is not finite has the slope 1.

    Args:
      losses: Floating point, of any shape: ``[B]``, ``[B, T]``, ...
      opt_state: The state that is passed to the next update, of a transformation that holds one
        :func:`scale_by_attention`, alone or inside any chain or wrapper.
      sums: ``Sums()``, if the loss is differentiated by them, too; or the parameters, if
        :func:`zero_sums` are among them.

    Returns:
      The losses, in float32 or in their dtype if that is wider.

    Raises:
      TypeError: ``losses`` are not floating point, or ``sums`` have less than 32 bits.
      ValueError: ``opt_state`` doesn't hold exactly one :class:`AttentionState`, or is that of
        several models; ``sums`` don't hold exactly one :class:`Sums`, or have another shape.

    Warns:
      UserWarning: ``losses`` are a scalar, which most often is a mean; or ``opt_state`` is a
        constant in a traced function. A jitted step has to take it as an argument: with a constant
        one, any other term of the loss has its gradient times about :math:`e^{-V / \lambda}`, and a
        λ that changes makes the updates NaN. An eager ``lax.scan``, ``lax.cond`` or
        ``jax.checkpoint`` that closes over the state warns, too, but computes the right thing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import absgd, Sums, tilt
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> tx = absgd(0.02, temperature=1.0)
      >>> w = jnp.zeros(1)
      >>> opt_state = tx.init(w)
      >>> @jax.jit
      ... def step(w, opt_state):
      ...   def loss_fn(w, sums):
      ...     losses = (x @ w - y) ** 2
      ...     return tilt(losses, opt_state, sums).mean()
      ...   grads, sums = jax.grad(loss_fn, argnums=(0, 1))(w, Sums())
      ...   updates, opt_state_ = tx.update(grads, opt_state, w, sums=sums)
      ...   return optax.apply_updates(w, updates), opt_state_
      >>> for _ in range(100):
      ...   w, opt_state = step(w, opt_state)
      >>> print(w.round(1))  # the least squares have 3
      [2.7]

    References:
      Qi et al., `ABSGD <https://arxiv.org/abs/2012.06951>`_, TMLR 2023

      Ben-Tal & Teboulle, `An Old-New Concept of Convex Risk Measures: The Optimized Certainty
      Equivalent <https://doi.org/10.1111/j.1467-9965.2007.00311.x>`_, 2007, for the dual form
    """
    state = attention_of(opt_state)
    losses = as_floats("losses", losses)
    zeros = zeros_in(sums)
    if losses.ndim == 0:
        warnings.warn(
            "tilt weights each loss by itself, and was given a scalar: if it is a mean, tilt the "
            "losses before it. If it is the loss of one example, tilt loss[None].",
            stacklevel=2,
        )
    if _is_constant(state.baseline):
        warnings.warn(
            "The optimiser's state that tilt was given is a constant here. If this function is "
            "jitted, pass the state as an argument: a constant one is right for a fixed λ alone, "
            "without other terms in the loss, and makes the updates NaN as soon as λ changes.",
            stacklevel=2,
        )
    lam, baseline = temperature_and_baseline(state, losses.dtype)
    return ride(losses, zeros, lam, baseline)


def _is_constant(leaf: ArrayLike) -> bool:
    """Whether operations are staged out, and the leaf is not one of their results."""
    zero = np.float32(0)
    staged = isinstance(lax.add(zero, zero), jax.core.Tracer)
    host = isinstance(leaf, np.ndarray | np.generic)
    return staged and (host or not isinstance(jnp.asarray(leaf), jax.core.Tracer))


def temperature_and_baseline(
    state: AttentionState, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    lam, baseline = clamped(state.temperature), jnp.asarray(state.baseline)
    if baseline.shape != ():
        raise ValueError(
            f"opt_state must be that of one model, got a baseline of shape {baseline.shape}; take "
            "the step under jax.vmap."
        )
    return lam.astype(dtype), baseline.astype(dtype)


class Divergences(NamedTuple):
    r"""How far the weights of a batch are from the plain mean.

    Both are 0 where the batch does not tell, and :math:`\infty` where all of it is out of the range
    of :math:`\lambda`.

    Attributes:
      chi2: :math:`\chi^2 = 1 / \mathrm{ESS} - 1`.
      kl: The KL divergence, in nats.
    """

    chi2: jax.Array
    kl: jax.Array


def attend(
    state: AttentionState, sums: Sums, gamma: jax.Array, max_jump: ArrayLike | None
) -> tuple[jax.Array, AttentionState, Divergences]:
    """Takes a batch into V, with the weight ``gamma``; and the scale of its gradient, but for α."""
    dtype = gamma.dtype
    lam, baseline = temperature_and_baseline(state, dtype)
    plain, first, most = is_infinite(lam), jnp.equal(state.averaged, 0), bound(dtype)
    batch, counted, tell = means(sums, dtype)

    fits, one_sign = (~tell | x for x in _fit(batch, lam))
    usable = tell & (batch.bad == 0) & fits & one_sign

    # Losses that were tilted with another V, as by a closure over an older state.
    change = batch.baseline - baseline
    changed = usable & (jnp.abs(change) > 64 * eps(dtype) * jnp.abs(baseline))
    change = jnp.where(changed, change, 0)
    lam = unit(lam, baseline + change)
    shift = jnp.where(plain, 0, jnp.clip(change / lam, -most, most))
    factor = jnp.exp(shift)
    mean_exp = factor * jnp.where(usable, batch.exp, 1)
    excess = factor * batch.excess + jnp.expm1(shift)
    log_exp = jnp.log(mean_exp)
    if max_jump is not None:
        highest = jnp.expm1(jnp.asarray(max_jump, dtype))
        cut = ~first & (excess > highest)
        factor = jnp.where(cut, factor * (1 + highest) / mean_exp, factor)
        mean_exp, excess = jnp.where(cut, 1 + highest, mean_exp), jnp.where(cut, highest, excess)

    rise = gamma * excess
    growth = jnp.where(first, 0, 1 - gamma) + gamma * mean_exp
    # A large λ multiplies the logarithm's error: near 1 log1p has the digits.
    near = ~first & (jnp.abs(rise) < 0.5)
    log = jnp.where(near, jnp.log1p(jnp.where(near, rise, 0)), jnp.log(growth))

    # A batch that is out of sight of V leaves V alone, once. If the next one is out of sight, too,
    # V starts again from its mean loss, or moves as always where the bound has cut nothing: where
    # the mean of the exponents is not less than the exponent of the mean.
    mean_loss = baseline + change + lam * batch.level
    silent, loud = (usable & ~plain & (x > most / 2) for x in (-log_exp, log_exp))
    beyond = loud & (log_exp > most - 1) & (batch.level > log_exp + 1)
    averaged = jnp.asarray(state.averaged)
    left = (silent | loud) & (averaged > 0)
    lost = (silent | beyond) & ~left
    followed = jnp.where(first, mean_loss, baseline + gamma * (mean_loss - baseline))
    moved = jnp.where(lost, mean_loss, jnp.where(left, baseline, baseline + lam * log))
    counts = optax.safe_increment(jnp.abs(averaged))
    counts = jnp.where(lost, 1, jnp.where(left, -averaged, counts))
    new = state._replace(
        baseline=jnp.where(usable, jnp.where(plain, followed, moved), baseline),
        averaged=jnp.where(usable & ~plain, counts, averaged),
    )

    # Of losses that are not finite the gradients aren't either, and should show.
    unusable = jnp.where(counted & ~first, 1, 0).astype(dtype)
    scale = jnp.where(usable, jnp.where(silent, 0, factor / growth), unusable)

    chi2, kl = _divergences(batch, lam, plain, first)
    tells = usable & (chi2 > 0)
    out_of_range = jnp.where(silent, ~left, usable & ~tells & (log_exp > most / 4))
    divs = (jnp.where(out_of_range, jnp.inf, jnp.where(tells, x, 0)) for x in (chi2, kl))
    # A step in which nothing counts stands still at any λ, so that a forgotten tilt shows.
    scale = jnp.where(plain, counted.astype(dtype), scale)
    return jnp.where(fits, scale, jnp.nan), new, Divergences(*divs)


def _fit(batch: Sums, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether the means are of losses that were tilted with λ, and of weights of one sign.

    Weights that are negative in sum, as of log-likelihoods in the place of losses, would weight by
    -λ; noise, and what is not linear, leave no means that fit together. Sums that were in bfloat16
    are as good as 1 %. Weights of both signs fit an infinite λ alone, which weights nothing.
    """
    ours, theirs, plain = inverse(lam), batch.inverse, is_infinite(lam)
    same = jnp.abs(theirs - ours) <= 0.02 * jnp.maximum(jnp.abs(theirs), jnp.abs(ours))
    error = jnp.abs(batch.exp - batch.excess - 1)  # each exp(z) is 1 + expm1(z)
    linear = (batch.exp > 0) & (error <= 0.02 * (1 + batch.exp))
    # A mean of squares is not below the square of the mean, but for what underflows, and for the
    # bound on squares, which takes nothing that counts where the mean of exp(z) is at most 1.
    square, entropy = batch.weight * batch.square, batch.weight * batch.entropy
    convex = 1.1 * square + eps(lam.dtype) ** 2 >= batch.excess**2
    convex |= ~plain & (batch.exp > 1)
    one_sign = (batch.weight != 0) & convex & (square >= 0) & (entropy >= 0)
    positive = batch.weight > 0
    fit = same & jnp.where(plain, positive | ~one_sign, positive & linear & one_sign)
    return fit, one_sign


def _divergences(
    batch: Sums, lam: jax.Array, plain: jax.Array, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """χ² and KL of the weights, which know no V: relative to it they are differences; 0 if lost."""
    epsilon = eps(lam.dtype)
    z = jnp.log1p(jnp.maximum(batch.excess, epsilon - 1))
    square, entropy = divergences(z, batch.excess)
    chi2 = batch.square - square
    kl = batch.entropy - jnp.where(plain, square / 2, entropy)
    # What rounding leaves of sums, most of all where V is not there yet, and of losses.
    rounding = jnp.where(first, 1024, 64) * epsilon * square
    rounding += (8 * epsilon * batch.baseline / lam) ** 2
    exp = jnp.where(batch.exp > 0, batch.exp, 1)
    return jnp.where(chi2 > rounding, chi2 / exp**2, 0), jnp.maximum(kl, 0) / exp


def robust_loss(
    losses: ArrayLike, temperature: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    r"""Robust loss of a batch: the soft maximum of its losses, or the soft minimum.

    .. math::
      F_\lambda(l) = \lambda \log \frac{1}{n} \sum_{i=1}^n \exp(l_i / \lambda),
      \qquad
      \frac{\partial F_\lambda}{\partial l_i}
        = \frac{\exp(l_i / \lambda)}{\sum_j \exp(l_j / \lambda)}

    This is the objective, to evaluate and report. For training use :func:`tilt`. For
    :math:`\lambda > 0` it is :math:`\max_p \sum_i p_i l_i - \lambda \mathrm{KL}(p \| 1/n)`, for
    :math:`\lambda < 0` the minimum of the same over :math:`p`, and for :math:`\pm\infty` the mean.

    Args:
      losses: Per-example losses, floating point, of any shape but ``()``: ``[B]``, ``[B, T]``, ...
      temperature: λ, a scalar, traced or not. Positive favours hard examples, negative easy ones;
        from 1e30 on it counts as infinite. The optimiser's is ``get_temperature(opt_state)``.
      where: Boolean array of the shape of ``losses``: the entries to include. All, if ``None``.
        With none included the loss is zero.

    Returns:
      A scalar, in float32 or in the dtype of ``losses`` if that is wider.

    Raises:
      TypeError: ``losses`` is not floating point, ``where`` is not boolean, or ``temperature`` is
        not a number.
      ValueError: ``losses`` is a scalar, ``where`` has another shape, or ``temperature`` is not a
        scalar, lies between -1e-6 and 1e-6, or is NaN.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from absgd_jax import robust_loss
      >>> losses = jnp.array([0.1, 0.2, 3.0])
      >>> for temperature in (0.1, 1.0, jnp.inf, -1.0):
      ...   print(f"{robust_loss(losses, temperature):.3f}")
      2.890
      2.011
      1.100
      0.526
      >>> print(jax.grad(robust_loss)(losses, 1.0).round(3))
      [0.049 0.054 0.896]

    References:
      Qi et al., `ABSGD <https://arxiv.org/abs/2012.06951>`_, TMLR 2023

      Li et al., `Tilted Empirical Risk Minimization <https://arxiv.org/abs/2007.01162>`_, ICLR
      2021, whose objective it is, with the tilt :math:`t = 1 / \lambda`
    """
    check_temperature(temperature)
    losses = as_batch("losses", losses)
    if where is not None:
        where = as_mask(where, losses.shape)
    return tilted_means(losses, clamped(temperature).astype(losses.dtype), where).robust


class Tilted(NamedTuple):
    """What the weights of a batch are made of."""

    mean: jax.Array  # of the losses
    robust: jax.Array  # F
    z: jax.Array  # log(n w_i), at ∞ of a large λ, of the shape of the losses
    shift: jax.Array  # (F - shift) / λ = log, whose digits F doesn't hold at a large λ
    log: jax.Array
    n: jax.Array


def tilted_means(
    losses: jax.Array,
    lam: jax.Array,
    where: jax.Array | None,
    axis_name: Hashable | None = None,
) -> Tilted:
    """Of a batch, which ``axis_name`` spreads over devices."""
    plain, largest = is_infinite(lam), 8 / eps(lam.dtype)
    lam = jnp.where(plain, jnp.copysign(largest, lam), lam)
    # exp(l / λ) is largest at `shift`; relative to it no exponent is positive.
    sign = jnp.where(lam < 0, -1.0, 1.0).astype(lam.dtype)
    extreme = jnp.max(sign * lax.stop_gradient(losses), where=where, initial=-jnp.inf)
    if axis_name is not None:
        extreme = lax.pmax(extreme, axis_name)
    shift = jnp.where(jnp.isfinite(extreme), sign * extreme, 0)
    n = jnp.asarray(losses.size, lam.dtype)
    if where is not None:
        losses = jnp.where(where, losses, shift)  # 0 * NaN would be NaN in their gradients
        n = jnp.sum(where, dtype=lam.dtype)
    gap = losses - shift
    # Where XLA fuses the product that the losses are into this difference, it isn't rounded as it
    # was for the maximum; what is left of the largest would, over a small λ, be an exponent.
    rounding = eps(lam.dtype) * jnp.abs(shift)
    z = (gap - lax.stop_gradient(jnp.where(jnp.abs(gap) <= rounding, gap, 0))) / lam

    sums = [jnp.sum(x, where=where) for x in (losses, jnp.exp(z), lax.stop_gradient(jnp.expm1(z)))]
    *sums, n = psum([*sums, n], axis_name)
    mean, exp, expm1 = (x / jnp.maximum(n, 1) for x in sums)
    # As λ grows `exp` nears 1 and its logarithm loses the digits that λ then multiplies, which
    # log1p keeps; far from 1 it is log1p that loses them. The two have one derivative.
    log = jnp.log(jnp.where(n > 0, exp, 1))
    near = jnp.abs(expm1) < 0.5
    log += jnp.where(near, jnp.log1p(jnp.where(near, expm1, 0)) - lax.stop_gradient(log), 0)
    robust = jnp.where(plain, mean, jnp.where(n > 0, shift + lam * log, 0))
    return Tilted(mean, robust, z - log, shift, log, n)
