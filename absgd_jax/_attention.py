"""Attentional bias: the robust loss, the weights behind it and their moving baseline.

For losses l_1, ..., l_n and a temperature λ:

    F   = λ log mean_i exp(l_i / λ)                     robust loss of the batch
    w_i = ∂F/∂l_i = exp((l_i - F) / λ) / n              its weights: they sum to 1
    V   ← λ log((1-γ) exp(V / λ) + γ exp(F / λ))        baseline: F, averaged over the batches
    p_i = exp((l_i - V) / λ) / (α n) = w_i exp((F - V) / λ) / α       attentional weights

The published normaliser is u = α exp(V / λ), so that p_i = exp(l_i / λ) / (n u). The state keeps V
and not u: V is a loss, so it can't overflow and means the same whatever λ comes next.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from absgd_jax._checks import (
    as_array,
    as_losses,
    as_mask,
    check_number,
    check_state,
    POSITIVE,
    SHARE,
)
from absgd_jax._reduce import psum
from absgd_jax._temperature import (
    AutomaticTemperature,
    batch_divergence,
    check_temperature,
    Divergence,
    is_flat,
    Temperature,
)


class AttentionState(NamedTuple):
    """State of :func:`attention` and :func:`scale_by_attention`: three scalars.

    Attributes:
      count: Number of updates so far.
      temperature: λ of the next loss and of its update.
      baseline: V, the loss whose weight is ``1 / (alpha * n)``; -inf before any weighted batch.
    """

    count: ArrayLike  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
    temperature: ArrayLike  # shape=(), dtype=jnp.float32, or jnp.float64 under jax_enable_x64
    baseline: ArrayLike  # shape=(), dtype as temperature

    @property
    def log_normalizer(self) -> jax.Array:
        """log(u / α) at the present temperature, u being the paper's moving average."""
        baseline = jnp.asarray(self.baseline)
        return jnp.where(jnp.isfinite(baseline), baseline / self.temperature, -jnp.inf)


class Attention(NamedTuple):
    """A pair of pure functions: see :func:`attention`."""

    init: Callable[[], AttentionState]
    update: Callable[..., tuple[jax.Array, AttentionState]]


def robust_loss(
    losses: ArrayLike,
    temperature: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    r"""Robust loss of a batch: its losses' soft maximum or soft minimum.

    .. math::
      F_\lambda(l) = \lambda \log \frac{1}{n} \sum_{i=1}^n \exp(l_i / \lambda),
      \qquad
      \frac{\partial F_\lambda}{\partial l_i}
        = \frac{\exp(l_i / \lambda)}{\sum_j \exp(l_j / \lambda)}

    With :math:`\lambda > 0` this is :math:`\max_p \sum_i p_i l_i - \lambda \mathrm{KL}(p \| 1/n)`,
    and with :math:`\lambda < 0` the minimum over :math:`p` of the same. :math:`\lambda = \pm\infty`
    gives the mean.

    Args:
      losses: Per-example losses, floating point, of any shape but ``()``: ``[B]``, ``[B, T]``, ...
      temperature: λ, a scalar, traced or not. Positive leans on hard examples, negative on easy
        ones; from 1e30 on it counts as infinite. With a schedule in the optimiser, pass
        ``get_temperature(opt_state)``.
      where: Boolean array of the shape of ``losses``: the entries to include. All, if ``None``.
        With none included the loss is zero.
      axis_name: Name, or tuple of names, of the mapped axes (``pmap``, ``shard_map``, ``vmap``)
        over which the batch is spread. Not needed under ``jit``, where arrays are global.

    Returns:
      A scalar, in float32 or in the dtype of ``losses`` if that is wider.

    Raises:
      TypeError: ``losses`` is not floating point, ``where`` is not boolean, or ``temperature`` is
        not a number.
      ValueError: ``losses`` is a scalar, ``where`` has another shape, or ``temperature`` is 0, NaN
        or not a scalar.

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
      Qi et al., `Attentional-Biased Stochastic Gradient Descent
      <https://arxiv.org/abs/2012.06951>`_, TMLR 2023
    """
    check_temperature(temperature)
    loss, _, _ = tilt(losses, temperature, where, axis_name)
    return loss


def attention(
    temperature: Temperature,
    *,
    gamma: float | jax.Array = 0.9,
    alpha: float | jax.Array = 1.0,
    max_jump: float | jax.Array | None = None,
) -> Attention:
    r"""Attentional weights of a batch's losses, for loops that can't pass a loss to the optimiser.

    .. math::
      u \leftarrow (1 - \gamma)\, u + \gamma \alpha \frac{1}{n} \sum_j \exp(l_j / \lambda),
      \qquad
      p_i = \frac{\exp(l_i / \lambda)}{n\, u}

    The gradient of ``(weights * losses).sum()``, given to any optimiser, is that of ABSGD. While
    :math:`\lambda = \pm\infty` the weights are :math:`1 / n` and :math:`u` waits.

    Args:
      temperature: λ: a number, a 0-d array, an optax schedule of the number of updates, or
        automatic: :func:`target_ess`, :func:`target_kl`. A number is where ``state.temperature``
        starts and may be replaced in the state, as an automatic one may; a schedule, or a
        :class:`jax.Array` (such as ``optax.inject_hyperparams`` passes), is what every update
        follows.
      gamma: Weight of the newest batch in the moving average, in (0, 1]: one minus its decay.
      alpha: Scale of the moving average, positive; the weights are divided by it.
      max_jump: How far, as a logarithm, the newest batch may stand above the moving average; the
        rest of it is cut. One enormous loss otherwise silences the batches after it until the
        average has forgotten it: hundreds of steps at ``gamma=0.1``, under ten with ``max_jump=3``.
        Off by default, as in the published algorithm: at a small λ ordinary batches differ by
        more than any fixed bound. An automatic temperature knows no such λ, and has 3 by default;
        ``jnp.inf`` turns that off. It should exceed ``-log(gamma)``, where training starts.

    Returns:
      An :class:`Attention` pair ``(init, update)``: ``init() -> state`` and
      ``update(losses, state, *, where=None, axis_name=None) -> (weights, state)``, whose arguments
      are those of :func:`robust_loss`. The weights have the shape and dtype of ``losses`` and pass
      no gradient. With ``axis_name``, differentiate ``lax.psum((weights * losses).sum(),
      axis_name)``.

    Raises:
      TypeError: As :func:`robust_loss`; ``state`` is not an :class:`AttentionState`.
      ValueError: As :func:`robust_loss`; ``gamma``, ``alpha`` or ``max_jump`` is out of range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import absgd_jax
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> attend, tx = absgd_jax.attention(1.0), optax.sgd(0.02, momentum=0.9)
      >>> def loss_fn(w, state):
      ...   losses = (x @ w - y) ** 2
      ...   weights, state = attend.update(losses, state)
      ...   return (weights * losses).sum(), state
      >>> w = jnp.zeros(1)
      >>> state, opt_state = attend.init(), tx.init(w)
      >>> for _ in range(60):
      ...   grads, state = jax.grad(loss_fn, has_aux=True)(w, state)
      ...   updates, opt_state = tx.update(grads, opt_state)
      ...   w = optax.apply_updates(w, updates)
      >>> print(w.round(1))
      [2.7]

    References:
      Qi et al., `Attentional-Biased Stochastic Gradient Descent
      <https://arxiv.org/abs/2012.06951>`_, TMLR 2023
    """
    init, advance = moving_baseline(temperature, gamma, alpha, max_jump)

    def update(
        losses: ArrayLike,
        state: AttentionState,
        *,
        where: ArrayLike | None = None,
        axis_name: Hashable | None = None,
    ) -> tuple[jax.Array, AttentionState]:
        check_state(state, AttentionState)
        losses = as_array("losses", losses)
        lam = _current(temperature, state)
        loss, weights, n = tilt(losses, lam, where, axis_name)
        divergence = None
        if isinstance(temperature, AutomaticTemperature):
            divergence = batch_divergence(loss, losses, lam, where, axis_name)
        scale, state = advance(jnp.where(n > 0, loss, jnp.inf), state, divergence)
        weights = lax.stop_gradient(weights * scale.astype(weights.dtype))
        return weights.astype(losses.dtype), state

    return Attention(init, update)


def moving_baseline(
    temperature: Temperature,
    gamma: float | jax.Array,
    alpha: float | jax.Array,
    max_jump: float | jax.Array | None,
) -> tuple[
    Callable[[], AttentionState],
    Callable[..., tuple[jax.Array, AttentionState]],
]:
    """Returns ``init() -> state`` and ``advance(loss, state, divergence) -> (scale, state)``.

    ``advance`` takes a batch's robust loss F into the baseline V; its scale, exp((F - V) / λ) / α
    with the new V, turns the weights w, or the gradient of F, into those of ABSGD. Where F or λ is
    not finite V stays as it was and the scale is 1. An automatic temperature needs the divergence.
    """
    if not callable(temperature):
        check_temperature(temperature)
    check_number(
        "gamma",
        gamma,
        SHARE,
        "it is the weight of the newest batch in the moving average, one minus its decay",
    )
    check_number("alpha", alpha, POSITIVE, "the gradients are divided by it")
    if max_jump is None and isinstance(temperature, AutomaticTemperature):
        max_jump = 3.0
    if max_jump is not None:
        check_number(
            "max_jump",
            max_jump,
            (lambda x: x > 0, "be positive"),
            "None leaves the average unbounded",
        )

    def init() -> AttentionState:
        count = jnp.zeros([], jnp.int32)
        first: ArrayLike
        if isinstance(temperature, AutomaticTemperature):
            first = temperature.init_value
        else:
            first = temperature(count) if callable(temperature) else temperature
        return AttentionState(
            count=count,
            temperature=jnp.asarray(first, float),
            baseline=jnp.asarray(-jnp.inf, float),
        )

    def advance(
        loss: ArrayLike, state: AttentionState, divergence: Divergence | None = None
    ) -> tuple[jax.Array, AttentionState]:
        dtype = jnp.result_type(state.baseline)
        loss, baseline, lam, newest = (
            jnp.asarray(x, dtype)
            for x in (loss, state.baseline, _current(temperature, state), gamma)
        )
        started = jnp.isfinite(baseline)
        flat = is_flat(lam)
        active = jnp.isfinite(loss) & ~flat
        # What the wheres below discard must be finite as well, or its gradient is NaN.
        safe_lam = jnp.where(flat, 1, lam)
        safe_baseline = jnp.where(started, baseline, loss)

        # With a = exp(V/λ) and b = exp(F/λ): lag = log(a/b) and growth = log(((1-γ) a + γ b) / b).
        lag = jnp.nan_to_num((safe_baseline - loss) / safe_lam)
        if max_jump is not None:
            bound = jnp.asarray(max_jump, dtype)
            loss = jnp.where(lag < -bound, safe_baseline + safe_lam * bound, loss)
            lag = jnp.maximum(lag, -bound)
        # By hand, as jax.nn.logsumexp takes three times as many kernels for two numbers; and by
        # log1p of expm1, as a large λ, where the two are near, multiplies what digits are left.
        share = jnp.where(started, 1 - newest, 0)
        lag = jnp.where(share > 0, lag, 0)  # with γ = 1, too, what was before must not count
        falls = lag > 0  # V stands above F
        smaller = jnp.where(falls, newest, share)
        gap = jnp.where(falls, -lag, lag)
        rise = jnp.where(started, jnp.log1p(smaller * jnp.expm1(gap)), jnp.log(newest))
        growth = jnp.where(falls, lag, 0) + rise
        averaged = jnp.where(falls, safe_baseline, loss) + safe_lam * rise
        scale = jnp.exp(-growth) / jnp.asarray(alpha, dtype)
        count = optax.safe_increment(state.count)
        next_lam: ArrayLike
        if isinstance(temperature, AutomaticTemperature) and divergence is not None:
            scale *= temperature.scale(lam, divergence)
            next_lam = temperature.update(state, divergence=divergence).temperature
        else:
            next_lam = temperature(count) if callable(temperature) else lam
        return jnp.where(active, scale, 1), AttentionState(
            count=count,
            temperature=jnp.asarray(next_lam, dtype),
            baseline=jnp.where(active, averaged, baseline),
        )

    return init, advance


def _current(temperature: Temperature, state: AttentionState) -> ArrayLike:
    """λ of this step: the state's, unless an array was injected for this very call."""
    return temperature if isinstance(temperature, jax.Array) else state.temperature


def tilt(
    losses: ArrayLike,
    temperature: ArrayLike,
    where: ArrayLike | None,
    axis_name: Hashable | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Robust loss (differentiable), weights, and the number of examples, after checks."""
    losses = as_losses(losses)
    lam = jnp.asarray(temperature, losses.dtype)
    counts = None if where is None else as_mask(where, losses.shape).astype(losses.dtype)
    shift, exp_z, sums = tilted_sums(losses, lam, counts, axis_name)
    sums = psum(sums, axis_name)
    return soft_extremum(shift, lam, sums), exp_z / sums.divisor, sums.n


class TiltedSums(NamedTuple):
    """What the robust loss of a batch is made of: the parts of a batch add up, entry by entry."""

    exp: jax.Array  # of exp((l - shift) / λ)
    expm1: jax.Array  # of exp((l - shift) / λ) - 1
    losses: jax.Array
    n: jax.Array

    @property
    def divisor(self) -> jax.Array:
        """What makes weights of the exponentials; 1 for an empty batch."""
        return jnp.where(self.n > 0, self.exp, 1)


def tilted_sums(
    losses: jax.Array,
    lam: jax.Array,
    counts: jax.Array | None,
    axis_name: Hashable | None = None,
) -> tuple[jax.Array, jax.Array, TiltedSums]:
    """The shift, exp((l - shift) / λ) times the counts, and the sums of this part of the batch.

    ``counts`` says how many examples each loss stands for: 1 if ``None``, 0 for what is masked. The
    shift is that of the whole batch, which is spread over ``axis_name``; the sums are not reduced.
    """
    # exp(l / λ) is largest at `shift`; relative to it no exponent is positive.
    sign = jnp.where(lam < 0, -1, 1).astype(lam.dtype)
    where = None if counts is None else counts > 0
    extreme = jnp.max(sign * lax.stop_gradient(losses), where=where, initial=-jnp.inf)
    if axis_name is not None:
        extreme = lax.pmax(extreme, axis_name)
    shift = jnp.where(jnp.isfinite(extreme), sign * extreme, 0)
    if where is not None:
        losses = jnp.where(where, losses, shift)  # 0 * NaN would be NaN in their gradients

    gap = losses - shift
    # Where XLA fuses the product that the losses are into this difference, it isn't rounded as it
    # was for the maximum; what is left of the largest would, over a small λ, be an exponent.
    rounding = float(np.finfo(lam.dtype).eps) * jnp.abs(shift)
    gap -= lax.stop_gradient(jnp.where(jnp.abs(gap) <= rounding, gap, 0))

    flat = is_flat(lam)
    z = jnp.where(flat, 0, gap / jnp.where(flat, 1, lam))
    exp_z, expm1_z = jnp.exp(z), lax.stop_gradient(jnp.expm1(z))
    n = jnp.asarray(losses.size, lam.dtype)
    if counts is not None:
        exp_z, expm1_z, losses = counts * exp_z, counts * expm1_z, counts * losses
        n = jnp.sum(counts)
    # Sums of products and not dot products: these work over a sharded axis.
    return shift, exp_z, TiltedSums(jnp.sum(exp_z), jnp.sum(expm1_z), jnp.sum(losses), n)


def soft_extremum(shift: jax.Array, lam: jax.Array, sums: TiltedSums) -> jax.Array:
    """The robust loss of a batch, from the sums of all its parts."""
    n = jnp.where(sums.n > 0, sums.n, 1)
    log_mean_exp = jnp.log(sums.divisor / n)
    # As λ grows the mean nears 1 and its logarithm loses the digits that λ then multiplies, which
    # log1p keeps; far from 1 it is log1p that loses them. The two have one derivative.
    mean_expm1 = sums.expm1 / n
    log_mean_exp += jnp.where(
        jnp.abs(mean_expm1) < 0.5, jnp.log1p(mean_expm1) - lax.stop_gradient(log_mean_exp), 0
    )
    flat = is_flat(lam)
    safe_lam = jnp.where(flat, 1, lam)  # inf * 0 would trip jax_debug_nans
    return jnp.where(flat, sums.losses / n, shift + safe_lam * log_mean_exp)
