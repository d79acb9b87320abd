"""Temperatures: which are sound, and those that tune themselves.

With z_i = (l_i - F) / λ the weights of a batch are w_i = exp(z_i) / n, and mean exp(z) = 1. How far
they stray from 1 / n is

    χ² = mean (e^z - 1)²          = n Σ w_i² - 1     = 1 / (effective sample size) - 1
    KL = mean (z e^z - e^z + 1)   = Σ w_i log(n w_i) = -∂F/∂λ

Each is the mean of what vanishes at z = 0 together with its slope: no digits are lost however large
λ is, and it takes one reduction. While |λ| is large they go as 1 / λ². An automatic temperature
brings D, one of them, to its target D* by

    |λ| ← |λ| (D / D*)^rate
"""

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from absgd_jax._checks import as_losses, as_mask, as_scalar, check_number, NOT_NEGATIVE, POSITIVE
from absgd_jax._reduce import psum

# From here on |λ| is inf: l / λ and 1 / λ would be denormal, which XLA flushes to zero.
_INF_TEMPERATURE = 1e30


class TemperatureState(NamedTuple):
    """State of an automatic temperature by itself, as ``optax.inject_hyperparams`` keeps it.

    Attributes:
      count: Number of updates so far.
      temperature: λ of the next loss and of its update.
    """

    count: ArrayLike  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
    temperature: ArrayLike  # shape=(), dtype=jnp.float32, or jnp.float64 under jax_enable_x64


def target_ess(
    fraction: float | jax.Array = 0.9,
    *,
    init_value: float | jax.Array = jnp.inf,
    transition_begin: int = 0,
    rate: float | jax.Array = 0.1,
    damping: float | jax.Array = 2.0,
) -> "AutomaticTemperature":
    r"""Temperature that holds the effective sample size of the batch on target.

    .. math::
      \mathrm{ESS} = \frac{1}{n \sum_i w_i^2},
      \qquad
      |\lambda| \leftarrow |\lambda|
        \left(\frac{1 / \mathrm{ESS} - 1}{1 / \text{fraction} - 1}\right)^{\text{rate}}

    for the self-normalised weights :math:`w_i \propto \exp(l_i / \lambda)` of the n examples. From
    an infinite λ it goes where a normal distribution of the losses would have the target.

    Pass it as the ``temperature`` of :func:`absgd`, :func:`abadam`, :func:`scale_by_attention` or
    :func:`attention`. It is an ``optax.schedules.StatefulSchedule`` without state of its own: λ is
    that of :class:`AttentionState`, which may be set. The losses that it needs are one more
    argument of the update, ``tx.update(grads, state, params, value=loss, losses=losses)``.

    A batch moves λ by a factor of 2 at most, and not at all where there is nothing to learn from:
    all losses equal, one example, all masked, or a loss that is not finite. Over batches it is the
    logarithm of 1 / ESS - 1 that is on target in the mean. What a small batch can't reach is
    replaced by 2 / (n + 1), and |λ| stays above 1e-6.

    Args:
      fraction: Target of ESS, in (0, 1), as a share of the batch: near 1 all examples count alike.
        At :math:`\lambda < 0` about the share of labels that are right.
      init_value: λ to start from. Its sign is kept: positive leans on hard examples, negative on
        easy ones.
      transition_begin: Number of updates for which λ stays at ``init_value``: two-stage training.
      rate: Gain of the update, in (0, 0.5]. With the default λ settles within 50 steps from 100
        times too small or too large.
      damping: At :math:`\lambda > 0` the gradients are divided by :math:`1 + \text{damping}
        \sqrt{1 / \mathrm{ESS} - 1}`. What leans on hard examples makes them longer, most of all in
        a batch that is worse than those before. 0 for none.

    Returns:
      An automatic temperature.

    Raises:
      ValueError: An argument is out of range.
      TypeError: ``init_value`` is not a number.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import absgd_jax
      >>> x = jax.random.normal(jax.random.key(0), (100,))
      >>> y = 3 * x + jax.random.normal(jax.random.key(1), (100,))
      >>> tx = absgd_jax.absgd(0.02, absgd_jax.target_ess(0.5))
      >>> w = jnp.float32(0.0)
      >>> opt_state = tx.init(w)
      >>> for _ in range(60):
      ...   temperature = absgd_jax.get_temperature(opt_state)
      ...   def loss_fn(w):
      ...     losses = (x * w - y) ** 2
      ...     return absgd_jax.robust_loss(losses, temperature), losses
      ...   (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(w)
      ...   updates, opt_state = tx.update(grads, opt_state, w, value=loss, losses=losses)
      ...   w = optax.apply_updates(w, updates)
      >>> weights = jax.grad(absgd_jax.robust_loss)(losses, temperature)
      >>> print(f"{1 / (100 * jnp.sum(weights**2)):.1f}")
      0.5
    """
    check_number(
        "fraction",
        fraction,
        (lambda x: 0 < x < 1, "lie in (0, 1)"),
        "it is the effective share of the batch",
    )
    return AutomaticTemperature(
        "chi2", 1 / fraction - 1, init_value, transition_begin, rate, damping
    )


def target_kl(
    radius: float | jax.Array,
    *,
    init_value: float | jax.Array = jnp.inf,
    transition_begin: int = 0,
    rate: float | jax.Array = 0.1,
    damping: float | jax.Array = 2.0,
) -> "AutomaticTemperature":
    r"""Temperature that holds the weights' divergence from the plain mean on target.

    .. math::
      \mathrm{KL} = \sum_i w_i \log(n w_i) = -\frac{\partial F_\lambda}{\partial \lambda},
      \qquad
      |\lambda| \leftarrow |\lambda|
        \left(\frac{\mathrm{KL}}{\text{radius}}\right)^{\text{rate}}

    Where KL is on target λ is the dual variable of the constrained problem, whose ball has that
    radius:

    .. math::
      \min_{\lambda > 0} F_\lambda + \lambda \cdot \text{radius}
        = \max_{p:\, \mathrm{KL}(p \| 1/n) \leq \text{radius}} \sum_i p_i l_i

    In all else it is as :func:`target_ess`: how it is passed and given the losses, what batches
    leave λ unchanged. What a small batch can't reach is replaced by log(n) / 2.

    Args:
      radius: Target of KL, positive, in nats: near 0 all examples count alike.
      init_value: As in :func:`target_ess`.
      transition_begin: As in :func:`target_ess`.
      rate: As in :func:`target_ess`.
      damping: As in :func:`target_ess`.

    Returns:
      An automatic temperature.

    Raises:
      ValueError: An argument is out of range.
      TypeError: ``init_value`` is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import attention, target_kl
      >>> losses = jnp.array([0.1, 0.2, 3.0, 1.0])
      >>> attend = attention(target_kl(0.1))
      >>> state = attend.init()
      >>> for _ in range(60):
      ...   weights, state = attend.update(losses, state)
      >>> weights /= weights.sum()
      >>> print(f"{jnp.sum(weights * jnp.log(4 * weights)):.3f}")
      0.100

    References:
      Qi et al., `Stochastic Constrained DRO with a Complexity Independent of Sample Size
      <https://arxiv.org/abs/2210.05740>`_, TMLR 2023
    """
    check_number("radius", radius, POSITIVE, "near 0 all examples count alike")
    return AutomaticTemperature("kl", radius, init_value, transition_begin, rate, damping)


class Divergence(NamedTuple):
    """How far the weights of a batch stray from 1 / n.

    At an infinite λ, where they do not, it is what the divergences are times λ² as λ nears that.
    """

    chi2: jax.Array
    kl: jax.Array
    n: jax.Array  # number of examples


@dataclasses.dataclass(frozen=True)
class AutomaticTemperature:
    """A λ that holds a divergence on target; what :func:`target_ess` and :func:`target_kl` make.

    An ``optax.schedules.StatefulSchedule``: its state is any NamedTuple with the fields ``count``
    and ``temperature``.
    """

    measure: str  # of Divergence
    target: float | jax.Array
    init_value: float | jax.Array
    transition_begin: int
    rate: float | jax.Array
    damping: float | jax.Array

    def __post_init__(self) -> None:
        if self.measure not in ("chi2", "kl"):
            raise ValueError(f"measure must be 'chi2' or 'kl', got {self.measure!r}.")
        check_number("target", self.target, POSITIVE)
        check_temperature(self.init_value, name="init_value")
        check_number("transition_begin", self.transition_begin, NOT_NEGATIVE)
        check_number(
            "rate",
            self.rate,
            (lambda x: 0 < x <= 0.5, "lie in (0, 0.5]"),
            "a larger one overshoots",
        )
        check_number("damping", self.damping, NOT_NEGATIVE)

    def init(self) -> TemperatureState:
        return TemperatureState(jnp.zeros([], jnp.int32), jnp.asarray(self.init_value, float))

    def __call__(self, state: Any, **extra_args: Any) -> ArrayLike:
        return state.temperature  # type: ignore[no-any-return]

    def update(
        self,
        state: Any,
        *,
        value: ArrayLike | None = None,
        losses: ArrayLike | None = None,
        where: ArrayLike | None = None,
        axis_name: Hashable | None = None,
        divergence: Divergence | None = None,
        **extra_args: Any,
    ) -> Any:
        """The state with the next λ, by the batch's losses or the divergence that they have."""
        if divergence is None:
            divergence = batch_divergence(value, losses, state.temperature, where, axis_name)
        lam = jnp.asarray(state.temperature)
        n = divergence.n.astype(lam.dtype)
        reachable = {"chi2": (n - 1) / 2, "kl": jnp.log(n) / 2}[self.measure]
        target = jnp.minimum(jnp.asarray(self.target, lam.dtype), reachable)
        reached = getattr(divergence, self.measure).astype(lam.dtype)
        excess = jnp.log(reached) - jnp.log(target)

        flat = is_flat(lam)
        step = jnp.where(
            flat,
            excess / 2,
            jnp.clip(jnp.asarray(self.rate, lam.dtype) * excess, -_MAX_STEP, _MAX_STEP),
        )
        size = jnp.where(flat, 1, jnp.abs(lam)) * jnp.exp(step)
        count = optax.safe_increment(state.count)
        moves = jnp.isfinite(excess) & jnp.greater_equal(count, self.transition_begin)
        next_lam = jnp.where(moves, jnp.copysign(jnp.maximum(size, _MIN_TEMPERATURE), lam), lam)
        return state._replace(count=count, temperature=next_lam)

    def scale(self, temperature: jax.Array, divergence: Divergence) -> jax.Array:
        """What the gradients of a batch are multiplied by."""
        chi2 = divergence.chi2.astype(temperature.dtype)
        leans_on_hard = (temperature > 0) & jnp.isfinite(chi2)
        damping = jnp.asarray(self.damping, temperature.dtype)
        return 1 / (1 + damping * jnp.sqrt(jnp.where(leans_on_hard, chi2, 0)))


# What may be passed as one.
Temperature = optax.ScalarOrSchedule | AutomaticTemperature

_MAX_STEP = float(np.log(2))  # of log |λ| in one update
_MIN_TEMPERATURE = 1e-6


def batch_divergence(
    value: ArrayLike | None,
    losses: ArrayLike | None,
    temperature: ArrayLike,
    where: ArrayLike | None,
    axis_name: Hashable | None,
) -> Divergence:
    """That of a batch's losses, given its robust loss, after checks."""
    if value is None or losses is None:
        raise TypeError(
            f"{'value' if value is None else 'losses'} is missing; an automatic temperature is "
            "tuned by both: tx.update(grads, state, params, value=loss, losses=losses)."
        )
    losses = as_losses(losses)
    counts = None
    if where is not None:
        counts = as_mask(where, losses.shape).astype(losses.dtype)
    return divergence_of(
        losses, as_scalar("value", value), temperature, counts, axis_name=axis_name
    )


def divergence_of(
    losses: jax.Array,
    loss: jax.Array,
    temperature: ArrayLike,
    counts: jax.Array | None = None,
    within: Divergence | None = None,
    axis_name: Hashable | None = None,
) -> Divergence:
    """Divergence of examples whose robust loss is ``loss``, ``counts`` times each; or of parts.

    Of the parts of a batch ``losses`` are the robust losses, ``counts`` the numbers of examples and
    ``within`` the divergences.
    """
    dtype = losses.dtype
    lam = lax.stop_gradient(jnp.asarray(temperature, dtype))
    flat = is_flat(lam)
    gap = lax.stop_gradient(losses - loss.astype(dtype))
    if counts is not None:
        gap = jnp.where(counts > 0, gap, 0)
    # Sound values lie between these bounds, where exp(2 z) is finite.
    z = jnp.where(flat, gap, jnp.clip(gap / jnp.where(flat, 1, lam), -80, 40))
    z = jnp.where(jnp.isfinite(gap), z, jnp.nan)
    square, expm1 = z**2, jnp.expm1(z)
    # Near 0 the series, where the closed form is a difference of what is almost the same.
    small = jnp.abs(z) < float(np.finfo(dtype).eps) ** 0.25
    series = square * (1 / 2 + z * (1 / 3 + z / 8))
    chi2 = jnp.where(flat, square, expm1**2)
    kl = jnp.where(flat, square / 2, jnp.where(small, series, z * (expm1 + 1) - expm1))
    if within is not None:
        exp = jnp.where(flat, 1, expm1 + 1)
        chi2, kl = chi2 + exp**2 * within.chi2, kl + exp * within.kl
    n = jnp.asarray(losses.size, dtype)
    if counts is not None:
        chi2, kl, n = counts * chi2, counts * kl, jnp.sum(counts)
    chi2, kl, n = psum((jnp.sum(chi2), jnp.sum(kl), n), axis_name)
    some = jnp.where(n > 0, n, 1)
    return Divergence(chi2 / some, kl / some, n)


def is_flat(lam: jax.Array) -> jax.Array:
    """Whether λ counts as infinite."""
    return jnp.abs(lam) >= _INF_TEMPERATURE


def check_temperature(temperature: ArrayLike, name: str = "temperature") -> None:
    if callable(temperature):
        raise TypeError(
            f"{name} must be a number here, got a schedule; pass what the schedule gives for "
            "this step, which is get_temperature(opt_state)."
        )
    check_number(
        name,
        temperature,
        (lambda x: x != 0 and not np.isnan(x), "be neither 0 nor NaN"),
        "positive leans on hard examples, negative on easy ones, inf is the plain mean; jax.vmap "
        "runs several",
    )
