"""Temperatures: those that are given, plain at first, and those that tune themselves.

An optimiser asks each of them two questions: what λ is at first, and what it is next. Those that
tune themselves bring D, a divergence of the batch's weights from the plain mean, to its target D*:

    |λ| ← |λ| (D / D*)^rate

for while |λ| is large D goes as 1 / λ².
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from absgd_jax._checks import check_number, NOT_NEGATIVE, POSITIVE, whole_number
from absgd_jax._state import AttentionState, check_temperature, is_flat, SMALLEST, sound
from absgd_jax._tilt import divergence, far, Moments

_MAX_STEP = float(np.log(2))  # of log |λ| in one update


class Temperature(NamedTuple):
    """What an optimiser asks of a temperature.

    Attributes:
      init: ``init() -> λ`` of the first step.
      update: ``update(state, moments) -> (state, factor)`` with the λ of the next step, and what
        the gradients of this one are multiplied by. ``state.count`` is the number of this step.
      automatic: Whether it needs the moments, and so the losses.
    """

    init: Callable[[], ArrayLike]
    update: Callable[[AttentionState, Moments | None], tuple[AttentionState, ArrayLike]]
    automatic: bool = False


def as_temperature(temperature: optax.ScalarOrSchedule | Temperature) -> Temperature:
    """A number, array or schedule as a :class:`Temperature`, too."""
    if isinstance(temperature, Temperature):
        return temperature
    if not callable(temperature):
        check_temperature(temperature)

    def update(state: AttentionState, sums: Moments | None) -> tuple[AttentionState, ArrayLike]:
        before = jnp.asarray(state.temperature)
        # A copy and not the caller's, as the state may be donated.
        given = jnp.array(at(temperature, state.count + 1), before.dtype)
        # What falls to 0 stops short of it, on the side where it was.
        lam = jnp.where(given == 0, jnp.sign(before) * SMALLEST, given)
        lam = jnp.where(given == state.given, before, lam)
        return state._replace(temperature=lam, given=given), 1

    return Temperature(lambda: at(temperature, 0), update)


def at(value: optax.ScalarOrSchedule, count: ArrayLike) -> ArrayLike:
    """A number, or what a schedule is after so many updates."""
    return value(count) if callable(value) else value


def two_stage(
    temperature: optax.ScalarOrSchedule | Temperature, begin: int | jax.Array
) -> Temperature:
    r"""Two-stage training: plain averages at first, then a temperature.

    .. math::
      \lambda_t = \infty \quad (t < \text{begin}), \qquad
      \lambda_t = \text{temperature}_{t - \text{begin}} \quad (t \geq \text{begin})

    Args:
      temperature: λ of the second stage: a number, a 0-d array, a schedule, whose steps count from
        its start, or automatic.
      begin: Number of updates in the first stage.

    Returns:
      A temperature, for :func:`absgd`, :func:`abadam` or :func:`scale_by_attention`.

    Raises:
      TypeError: ``temperature`` or ``begin`` is not a number.
      ValueError: ``begin`` is not a whole number from 0 on, or ``temperature`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import absgd, get_temperature, two_stage
      >>> tx = absgd(0.1, two_stage(5.0, begin=2))
      >>> params = jnp.zeros(3)
      >>> opt_state = tx.init(params)
      >>> for _ in range(4):
      ...   print(get_temperature(opt_state))
      ...   _, opt_state = tx.update(params, opt_state, value=1.0)
      inf
      inf
      5.0
      5.0

    References:
      Qi et al., `ABSGD <https://arxiv.org/abs/2012.06951>`_, TMLR 2023
    """
    check_number("begin", begin, whole_number(0), "it is a number of updates")
    second = as_temperature(temperature)

    def plain(first: ArrayLike) -> jax.Array:
        return jnp.copysign(jnp.inf, jnp.asarray(first, float))

    def init() -> ArrayLike:
        first = second.init()
        return jnp.where(jnp.greater(begin, 0), plain(first), first)

    def update(state: AttentionState, sums: Moments | None) -> tuple[AttentionState, ArrayLike]:
        count = jnp.asarray(state.count) - begin
        first = jnp.asarray(second.init(), jnp.result_type(state.temperature))
        new, factor = second.update(state._replace(count=count), sums)
        # It starts at its first λ; but if that is infinite this batch may tune it already.
        lam = jnp.where((count == -1) & ~is_flat(first), first, new.temperature)
        lam = jnp.where(count < -1, plain(first), lam)
        return new._replace(count=state.count, temperature=lam), factor

    return Temperature(init, update, second.automatic)


def target_ess(
    fraction: float | jax.Array = 0.9,
    *,
    init_value: float | jax.Array = jnp.inf,
    rate: float | jax.Array = 0.1,
    damping: float | jax.Array = 2.0,
) -> Temperature:
    r"""Temperature that holds the effective sample size of the batch on target.

    .. math::
      \mathrm{ESS} = \frac{1}{n \sum_i w_i^2},
      \qquad
      |\lambda| \leftarrow |\lambda|
        \left(\frac{1 / \mathrm{ESS} - 1}{1 / \text{fraction} - 1}\right)^{\text{rate}}

    for the self-normalised weights :math:`w_i \propto \exp(l_i / \lambda)` of the n examples. From
    an infinite λ it goes where a normal distribution of the losses would have the target.

    Pass it as the ``temperature`` of :func:`absgd`, :func:`abadam` or :func:`scale_by_attention`,
    or of :func:`two_stage`. The losses that it needs are one more argument of the update,
    ``tx.update(grads, state, params, value=loss, losses=losses)``: as they are, not tilted.

    A batch moves λ by a factor of 2 at most. It leaves λ as it is where the weights say nothing:
    all losses equal, one example, all masked, or a loss that is not finite. Over batches the mean
    of log(1 / ESS - 1) is on target. A target below 2 / (n + 1), which a batch of n may be too
    small for, is replaced by it, and λ stays 1e-6 away from 0.

    The target bounds what a class can gain: the weight of a share f of the batch grows at most by

    .. math::
      1 + \sqrt{\left(\frac{1}{\text{fraction}} - 1\right) \frac{1 - f}{f}}

    which at 0.9 is 3.1 for f = 2.5 % and 1.6 for f = 25 %. So the rarer a class, the more a given
    fraction can add to what a loss that knows the class sizes does for it: there begin near 1, and
    validate. At :math:`\lambda < 0` it is the hard examples that lose weight, whether their labels
    are wrong or not; of two classes one may be lost whole, unless each loss is taken less the
    :func:`robust_loss` of its class at λ, under ``stop_gradient``.

    Args:
      fraction: Target of ESS, in (0, 1), as a share of the batch: near 1 the examples have almost
        equal weights. At :math:`\lambda < 0`, about the share of labels that are right.
      init_value: λ to start from. Its sign is kept: positive leans on hard examples, negative on
        easy ones.
      rate: Gain of the update, in (0, 0.5]. With the default λ settles within 50 steps from 100
        times too small or too large.
      damping: At :math:`\lambda > 0` the gradients are divided by :math:`1 + \text{damping}
        \sqrt{1 / \mathrm{ESS} - 1}`. Weight on hard examples makes them longer, most of all in a
        batch with larger losses than those before it. 0 for no damping.

    Returns:
      An automatic temperature.

    Raises:
      ValueError: An argument is out of range.
      TypeError: ``init_value`` is not a number.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import absgd, diagnostics, target_ess, tilt
      >>> x = jax.random.normal(jax.random.key(0), (100,))
      >>> y = 3 * x + jax.random.normal(jax.random.key(1), (100,))
      >>> tx = absgd(0.02, target_ess(0.5))
      >>> w = jnp.float32(0.0)
      >>> opt_state = tx.init(w)
      >>> def loss_fn(w, opt_state):
      ...   losses = (x * w - y) ** 2
      ...   return tilt(losses, opt_state).mean(), losses
      >>> @jax.jit
      ... def step(w, opt_state):
      ...   (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(w, opt_state)
      ...   updates, opt_state = tx.update(grads, opt_state, w, value=loss, losses=losses)
      ...   return optax.apply_updates(w, updates), opt_state, losses
      >>> for _ in range(60):
      ...   w, opt_state, losses = step(w, opt_state)
      >>> print(f"{diagnostics.summary(losses, opt_state)['effective_sample_size']:.1f}")
      0.5
    """
    inside = lambda x: 0 < x < 1, "lie in (0, 1)"
    check_number("fraction", fraction, inside, "it is the effective share of the batch")
    return _automatic("chi2", 1 / fraction - 1, init_value, rate, damping)


def target_kl(
    radius: float | jax.Array,
    *,
    init_value: float | jax.Array = jnp.inf,
    rate: float | jax.Array = 0.1,
    damping: float | jax.Array = 2.0,
) -> Temperature:
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

    In everything else it is as :func:`target_ess`: how it is passed and given the losses, and which
    batches leave λ as it is. A target above log(n) / 2, which a batch of n may be too small for, is
    replaced by it.

    Args:
      radius: Target of KL, positive, in nats: near 0 the examples have almost equal weights.
      init_value, rate, damping: As in :func:`target_ess`.

    Returns:
      An automatic temperature.

    Raises:
      ValueError: An argument is out of range.
      TypeError: ``init_value`` is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import diagnostics, scale_by_attention, target_kl, tilt
      >>> losses = jnp.array([0.1, 0.2, 3.0, 1.0])
      >>> tx = scale_by_attention(target_kl(0.1))
      >>> state = tx.init(None)
      >>> for _ in range(60):
      ...   _, state = tx.update(None, state, value=tilt(losses, state).mean(), losses=losses)
      >>> print(f"{diagnostics.summary(losses, state)['kl_divergence']:.3f}")
      0.100

    References:
      Qi et al., `Stochastic Constrained DRO with a Complexity Independent of Sample Size
      <https://arxiv.org/abs/2210.05740>`_, TMLR 2023
    """
    check_number("radius", radius, POSITIVE, "near 0 the weights are almost equal")
    return _automatic("kl", radius, init_value, rate, damping)


def _automatic(
    measure: Literal["chi2", "kl"],
    target: float | jax.Array,
    init_value: float | jax.Array,
    rate: float | jax.Array,
    damping: float | jax.Array,
) -> Temperature:
    check_temperature(init_value, name="init_value")
    slow = lambda x: 0 < x <= 0.5, "lie in (0, 0.5]"
    check_number("rate", rate, slow, "a larger one overshoots")
    check_number("damping", damping, NOT_NEGATIVE)

    def update(state: AttentionState, sums: Moments | None) -> tuple[AttentionState, ArrayLike]:
        assert sums is not None  # as it is automatic
        chi2, kl = divergence(sums)
        n, lam = sums.n, sound(state.temperature).astype(chi2.dtype)
        reached, reachable = (chi2, (n - 1) / 2) if measure == "chi2" else (kl, jnp.log(n) / 2)
        aim = jnp.minimum(jnp.asarray(target, lam.dtype), jnp.maximum(reachable, SMALLEST))
        ratio = reached / aim
        # Below the smallest normal number the compiler may take it for 0, whose logarithm is -inf.
        moves = ratio >= float(np.finfo(lam.dtype).tiny)
        excess = jnp.log(jnp.where(moves, ratio, 1))
        flat = is_flat(lam)
        step = jnp.clip(jnp.asarray(rate, lam.dtype) * excess, -_MAX_STEP, _MAX_STEP)
        tuned = far(lam) * jnp.exp(jnp.where(flat, excess / 2, step))
        # Of weights that are not in use, or lean on easy examples, nothing needs damping.
        damped = moves & (lam > 0) & ~flat
        spread = jnp.sqrt(jnp.where(damped, chi2, 0))
        factor = 1 / (1 + jnp.asarray(damping, lam.dtype) * spread)
        return state._replace(temperature=jnp.where(moves, tuned, lam)), factor

    return Temperature(lambda: init_value, update, automatic=True)
