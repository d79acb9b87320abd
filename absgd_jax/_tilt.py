r"""The maths of attentional weights.

For losses l_1, ..., l_n and a temperature λ, the robust loss is the extremum over V of a mean:

    F = λ log mean_i exp(l_i / λ) = min_V mean_i [V + λ expm1((l_i - V) / λ)]    (max for λ < 0)

The state holds V, the losses' baseline, so every loss passes through one function of its own,

    tilt(l) = V + λ expm1(z),    z = (l - V) / λ,    whose slope is exp(z)

and the mean, however it is taken, brings A = (value - V) / λ = mean expm1(z) to the update. Of the
published normaliser u = α exp(V / λ) and weights p_i = exp(l_i / λ) / (n u) it makes

    u ← (1 - γ) u + γ α mean exp(l / λ)        V ← V + λ log(1 + γ A)
    Σ p_i ∇l_i                               = ∇value / (α (1 + γ A))

In the first weighted batch u is 0 and V a mere point of reference: there 1 + γ A is γ E, where E =
mean exp(z) = 1 + A. E may be 1e-20, so that tilt is λ exp(z) then, and value / λ is E to its last
digit. V is a loss: it can't overflow as u does, and means the same whatever λ comes next.
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from absgd_jax._checks import as_batch, as_floats, as_mask, at_least_float32
from absgd_jax._reduce import psum
from absgd_jax._state import AttentionState, check_temperature, eps, find, is_flat, sound


def tilt(losses: ArrayLike, opt_state: optax.OptState) -> jax.Array:
    r"""The losses, bent so that their plain mean trains as ABSGD does.

    .. math::
      \mathrm{tilt}(l) = V + \lambda \left(e^{(l - V) / \lambda} - 1\right),
      \qquad
      \mathrm{tilt}'(l) = e^{(l - V) / \lambda}

    with the temperature :math:`\lambda` and the baseline :math:`V` of the optimiser's state. It is
    elementwise, so that whatever mean of the losses trains SGD trains ABSGD, if it is a mean of
    the tilted losses: with sample weights or a mask, over micro-batches or devices. Its value is
    the ``value`` of the update.

    At :math:`\lambda = \pm\infty` the losses are returned as they are. In the first weighted batch,
    where :math:`V` is no average yet, it is :math:`\lambda e^{(l - V) / \lambda}`, whose mean is
    not on the scale of the losses. Exponents are bounded, to about ±80 in float32: beyond, the
    slope stays what it is at the bound.

    Args:
      losses: Floating point, of any shape: ``[B]``, ``[B, T]``, a scalar, ...
      opt_state: The state that the update is about to be given, of a transformation that holds one
        :func:`scale_by_attention`, alone or inside any chain or wrapper.

    Returns:
      An array of the shape of ``losses``, in float32 or in their dtype if that is wider. It is
      twice differentiable.

    Raises:
      TypeError: ``losses`` are not floating point.
      ValueError: ``opt_state`` holds no attention, or several, or is that of several models.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import absgd, tilt
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> tx = absgd(0.02, temperature=1.0)
      >>> w = jnp.zeros(1)
      >>> opt_state = tx.init(w)
      >>> def loss_fn(w, opt_state):
      ...   losses = (x @ w - y) ** 2
      ...   return tilt(losses, opt_state).mean()
      >>> @jax.jit
      ... def step(w, opt_state):
      ...   loss, grads = jax.value_and_grad(loss_fn)(w, opt_state)
      ...   updates, opt_state = tx.update(grads, opt_state, w, value=loss)
      ...   return optax.apply_updates(w, updates), opt_state
      >>> for _ in range(100):
      ...   w, opt_state = step(w, opt_state)
      >>> print(w.round(1))  # the least squares have 3
      [2.7]

    References:
      Qi et al., `ABSGD <https://arxiv.org/abs/2012.06951>`_, TMLR 2023

      Ben-Tal & Teboulle, `An Old-New Concept of Convex Risk Measures: The Optimized Certainty
      Equivalent <https://doi.org/10.1111/j.1467-9965.2007.00311.x>`_, 2007, for the dual form
    """
    state = find(opt_state)
    losses = as_floats("losses", losses)
    lam, baseline = temperature_and_baseline(state, losses.dtype)
    flat = is_flat(lam)
    lam = jnp.where(flat, 1, lam)  # what the last where discards must be finite
    first = jnp.equal(state.averaged, 0)
    curve = _bounded_exp((losses - baseline) / lam, bound(lam), first)
    return jnp.where(flat, losses, jnp.where(first, 0, baseline) + lam * curve)


@jax.custom_jvp
def _bounded_exp(z: jax.Array, bound: jax.Array, whole: jax.Array) -> jax.Array:
    """exp(z), or if not whole exp(z) - 1, of bounded z. The slope is exp, also beyond the bound."""
    z = jnp.clip(z, -bound, bound)
    return jnp.where(whole, jnp.exp(z), jnp.expm1(z))


@_bounded_exp.defjvp
def _bounded_exp_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    # That of jnp.expm1, expm1(z) + 1, has no digits left where z is small. Of NaN it is 1, as a
    # mean's is, so that a mask over the mean of tilted losses does what it does for SGD.
    z, bound, _ = primals
    slope = jnp.where(jnp.isnan(z), 1, jnp.exp(jnp.clip(z, -bound, bound)))
    return _bounded_exp(*primals), slope * tangents[0]


def temperature_and_baseline(
    state: AttentionState, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    lam, baseline = sound(state.temperature), jnp.asarray(state.baseline)
    if baseline.shape != ():
        raise ValueError(
            f"opt_state must be that of one model, got a baseline of shape {baseline.shape}; take "
            "the step under jax.vmap."
        )
    return lam.astype(dtype), baseline.astype(dtype)


def bound(lam: jax.Array) -> jax.Array:
    """Of |exponents|: neither λ exp(z) nor the sum of 2^20 of these leaves the range of floats."""
    largest = float(np.log(np.finfo(lam.dtype).max))
    room = largest - 20 * float(np.log(2)) - jnp.abs(jnp.log(jnp.abs(lam)))
    return jnp.minimum(0.9 * largest, room)


def average(
    state: AttentionState,
    value: jax.Array,
    newest: jax.Array,
    max_jump: ArrayLike | None,
    factor: ArrayLike,
) -> tuple[jax.Array, AttentionState]:
    """Takes the mean of the tilted losses into V, with the weight ``newest``, γ.

    Returns the scale of its gradient, times the factor, and the state. A value that is not finite,
    or is exactly 0, as the usual mean over nothing is, leaves V as it was, with a scale of 1.
    """
    dtype = newest.dtype
    lam, baseline = temperature_and_baseline(state, dtype)
    flat, first = is_flat(lam), jnp.equal(state.averaged, 0)
    lam = jnp.where(flat, 1, lam)
    lowest = jnp.exp(-bound(lam.astype(at_least_float32(value.dtype)))).astype(dtype)
    value = value.astype(dtype)
    there = jnp.isfinite(value) & (value != 0)
    value = jnp.where(there, value, 1)
    # 1 + γ A, or in a first batch γ E.
    one = jnp.where(first, 0.0, 1.0).astype(dtype)
    excess = (value - one * baseline) / lam
    shrink: ArrayLike = 1
    if max_jump is not None:
        mean_exp = jnp.maximum(one + excess, eps(dtype))
        most = jnp.where(first, jnp.inf, jnp.expm1(jnp.asarray(max_jump, dtype)))
        excess = jnp.minimum(excess, most)
        shrink = jnp.maximum(one + excess, eps(dtype)) / mean_exp
    rise = newest * excess
    # E is not negative, but what rounding leaves of it may be.
    growth = jnp.maximum(one + rise, one * (1 - newest))
    weighted = there & ~flat & (growth > 0)
    growth = jnp.where(weighted, growth, 1)
    # A large λ multiplies the logarithm's error: near 1 log1p has the digits.
    near = ~first & (jnp.abs(rise) < 0.5)
    log = jnp.where(near, jnp.log1p(jnp.where(near, rise, 0)), jnp.log(growth))
    moved = jnp.where(weighted, baseline + lam * log, baseline)
    # Where a first batch lies below the bound as a whole, V is still on its way to the losses.
    counts = weighted & (growth > 1.001 * newest * lowest)
    state = state._replace(
        baseline=jnp.where(there & flat & first, value, moved),
        averaged=jnp.where(counts, optax.safe_increment(state.averaged), state.averaged),
    )
    return jnp.where(weighted, factor * shrink / growth, 1), state


def robust_loss(
    losses: ArrayLike, temperature: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    r"""Robust loss of a batch: its losses' soft maximum or soft minimum.

    .. math::
      F_\lambda(l) = \lambda \log \frac{1}{n} \sum_{i=1}^n \exp(l_i / \lambda),
      \qquad
      \frac{\partial F_\lambda}{\partial l_i}
        = \frac{\exp(l_i / \lambda)}{\sum_j \exp(l_j / \lambda)}

    It is the objective, to evaluate and report; what trains is the mean of :func:`tilt`. With
    :math:`\lambda > 0` it is :math:`\max_p \sum_i p_i l_i - \lambda \mathrm{KL}(p \| 1/n)`, with
    :math:`\lambda < 0` the minimum over :math:`p` of the same, and with :math:`\pm\infty` the mean.

    Args:
      losses: Per-example losses, floating point, of any shape but ``()``: ``[B]``, ``[B, T]``, ...
      temperature: λ, a scalar, traced or not. Positive leans on hard examples, negative on easy
        ones; from 1e30 on it counts as infinite. The optimiser's is ``get_temperature(opt_state)``.
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
    """
    check_temperature(temperature)
    losses = as_batch("losses", losses)
    if where is not None:
        where = as_mask(where, losses.shape)
    return tilted_means(losses, sound(temperature).astype(losses.dtype), where).robust


class Tilted(NamedTuple):
    """What the weights of a batch are made of."""

    mean: jax.Array  # of the losses
    robust: jax.Array  # F
    z: jax.Array  # log(n w_i) at far(λ), of the shape of the losses
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
    flat, lam = is_flat(lam), far(lam)
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
    robust = jnp.where(flat, mean, jnp.where(n > 0, shift + lam * log, 0))
    return Tilted(mean, robust, z - log, shift, log, n)


def divergences(z: jax.Array, expm1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What, at z_i = log(n w_i), the means are χ² = n Σ w_i² - 1 and KL = Σ w_i log(n w_i) of.

    Each vanishes at z = 0 together with its slope, so no digits are lost however small z is. The
    effective sample size is 1 / (1 + χ²).
    """
    # Near 0 the series, where the closed form is a difference of what is almost the same.
    small = jnp.abs(z) < eps(z.dtype) ** 0.25
    series = z**2 * (1 / 2 + z * (1 / 3 + z / 8))
    return expm1**2, jnp.where(small, series, z * (expm1 + 1) - expm1)


class Moments(NamedTuple):
    """Of a batch's losses, for how far its weights diverge: sums, so those of its parts add up.

    Of a part y = (F - V) / λ is the level, and it counts as n examples there that diverge inside.
    """

    n: jax.Array
    level: jax.Array  # expm1(y)
    inside: tuple[jax.Array, jax.Array]  # exp(2 y) χ² and exp(y) KL of the part
    outside: tuple[jax.Array, jax.Array]  # the two divergences at y


def moments(
    losses: jax.Array, state: AttentionState, where: jax.Array | None, axis_name: Hashable | None
) -> Moments:
    """Those of a batch, which ``axis_name`` spreads over devices; NaN if a loss is not finite."""
    dtype = at_least_float32(jnp.result_type(state.baseline))
    lam, baseline = temperature_and_baseline(state, dtype)
    # XLA would take them into kernels of the backward pass, which would wait for their maximum.
    losses = lax.optimization_barrier(lax.stop_gradient(losses).astype(dtype))
    part, lam = tilted_means(losses, lam, where), far(lam)
    # All that the parts have in common is V. Below the one bound a sum of expm1 has no digits left,
    # and above the other there is no room for squares.
    lowest, highest = np.log(eps(dtype)) / 2, np.log(np.finfo(dtype).max) / 4
    level = jnp.clip((part.shift - baseline) / lam + part.log, float(lowest), float(highest))
    expm1 = jnp.expm1(level)
    n = jnp.where(jnp.all(jnp.isfinite(losses), where=where), part.n, jnp.nan)
    rounding = jnp.square(8 * eps(dtype) * part.shift / lam)  # of the losses

    def inside(x: jax.Array, power: int) -> jax.Array:
        found = jnp.sum(x, where=where) / jnp.maximum(part.n, 1)
        return jnp.where(found > rounding, (1 + expm1) ** power * found, 0)

    chi2, kl = map(inside, divergences(part.z, jnp.expm1(part.z)), (2, 1))
    sums = Moments(jnp.ones_like(level), expm1, (chi2, kl), divergences(level, expm1))
    of_batch: Moments = psum(jax.tree.map(lambda x: n * x, sums), axis_name)
    return of_batch


def far(lam: jax.Array) -> jax.Array:
    """λ, or in the place of ∞ a λ so large that the divergences go as 1 / λ² to the last digit."""
    largest = 8 / eps(lam.dtype)
    return jnp.where(is_flat(lam), jnp.where(lam < 0, -largest, largest), lam)


def divergence(sums: Moments) -> tuple[jax.Array, jax.Array]:
    """χ² and KL of the whole batch's weights, at :func:`far` (λ)."""
    some = jnp.maximum(sums.n, 1)
    expm1 = sums.level / some

    def whole(inside: jax.Array, outside: jax.Array, about: jax.Array, power: int) -> jax.Array:
        between = outside / some - about  # the parts; where they are level, what rounding leaves
        between = jnp.where(between > 16 * eps(some.dtype) * about, between, 0)
        return (inside / some + between) / (1 + expm1) ** power

    about = divergences(jnp.log1p(expm1), expm1)
    chi2, kl = map(whole, sums.inside, sums.outside, about, (2, 1))
    return chi2, kl
