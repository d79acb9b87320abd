"""Temperatures: given ones, two-stage ones, and automatic ones.

An optimiser asks each of them two questions: what λ is at first, and what it is next. Automatic
ones bring D, a divergence of the batch's weights from equal ones, to its target D*:

    |λ| ← |λ| (D / D*)^rate

because D is proportional to 1 / λ² while |λ| is large.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from absgd_jax._checks import check_number, is_concrete, POSITIVE, whole_number
from absgd_jax._state import (
    AttentionState,
    check_temperature,
    is_infinite,
    SMALLEST,
    unit,
)
from absgd_jax._tilt import Divergences

_MAX_STEP = float(np.log(2))  # of log |λ| in one update
_SETTLED = 1e-3


class Temperature(NamedTuple):
    """A temperature: what λ is at first, and what it is next.

    For a rule of your own, pass a pair of functions in place of a number. λ is the leaf
    ``temperature`` of the state. ``update`` gets the state that the batch was weighted with, and
    returns the next λ.

    Attributes:
      init: ``init() -> λ`` of the first step.
      update: ``update(state, divergences) -> λ`` of the next step. ``state`` is the
        :class:`AttentionState` of this step; its λ is a float in the dtype of V, and
        ``state.count`` is the number of the step. ``divergences.chi2``, which is 1 / ESS - 1 with
        the effective sample size ESS, and ``divergences.kl`` are those of this batch's weights at
        its λ. While λ is ±∞ they are those at ``abs(state.baseline) + 1``, and proportional to
        1 / λ² from there. They are 0 if the batch doesn't determine them, and inf if all of it is
        out of the range of λ.
      automatic: Whether it adapts to the batches. If so, ``debias``, ``damping`` and ``max_jump``
        have other defaults.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import absgd, get_temperature, Temperature
      >>> halved = Temperature(lambda: 4.0, lambda state, divergences: state.temperature / 2)
      >>> print(get_temperature(absgd(0.1, halved).init(jnp.zeros(3))))
      4.0
    """

    init: Callable[[], ArrayLike]
    update: Callable[[AttentionState, Divergences], ArrayLike]
    automatic: bool = False


def as_temperature(temperature: optax.ScalarOrSchedule | Temperature) -> Temperature:
    """A number, array or schedule as a :class:`Temperature`, too."""
    if isinstance(temperature, Temperature):
        return temperature
    if not callable(temperature):
        check_temperature(temperature)

    def update(state: AttentionState, divergences: Divergences) -> ArrayLike:
        if is_concrete(temperature) and not callable(temperature):
            return state.temperature
        # What falls to 0 stops short of it, on the side where it was.
        before = jnp.asarray(state.temperature)
        lam = jnp.asarray(value_at("temperature", temperature, state.count + 1), before.dtype)
        return jnp.where(lam == 0, jnp.copysign(SMALLEST, before), lam)

    return Temperature(lambda: value_at("temperature", temperature, 0), update)


def value_at(name: str, value: optax.ScalarOrSchedule, count: ArrayLike) -> ArrayLike:
    """A number, or what the schedule of that name is after so many updates."""
    if not callable(value):
        return value
    scalar = value(count)
    if jnp.shape(scalar) != ():
        raise ValueError(
            f"{name} must be a schedule of scalars, got shape {jnp.shape(scalar)}; index it, or "
            "run several under jax.vmap."
        )
    return scalar


def two_stage(
    temperature: optax.ScalarOrSchedule | Temperature, begin: int | jax.Array
) -> Temperature:
    r"""Two-stage training: plain SGD at first, then a temperature.

    .. math::
      \lambda_t = \infty \quad (t < \text{begin}), \qquad
      \lambda_t = \text{temperature}_{t - \text{begin}} \quad (t \geq \text{begin})

    Args:
      temperature: λ of the second stage: a number, a 0-d array, a schedule, whose steps count from
        the start of this stage, or automatic.
      begin: Number of updates in the first stage, the plain one. In the second, a number or an
        automatic temperature starts whenever it finds an infinite λ: in a state from a longer first
        stage, or one in which λ was set to ``jnp.inf``.

    Returns:
      A temperature, for :func:`absgd`, :func:`abadam` or :func:`scale_by_attention`.

    Raises:
      TypeError: ``temperature`` or ``begin`` is not a number.
      ValueError: ``begin`` is not a whole number from 0 on, or ``temperature`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import absgd, get_temperature, two_stage, zero_sums
      >>> tx = absgd(0.1, two_stage(5.0, begin=2))
      >>> params = jnp.zeros(3)
      >>> opt_state = tx.init(params)
      >>> for _ in range(4):
      ...   print(get_temperature(opt_state))
      ...   _, opt_state = tx.update(params, opt_state, sums=zero_sums())
      inf
      inf
      5.0
      5.0

    References:
      Qi et al., `ABSGD <https://arxiv.org/abs/2012.06951>`_, TMLR 2023
    """
    check_number("begin", begin, whole_number(0), "it is a number of updates")
    second = as_temperature(temperature)

    def start() -> jax.Array:
        return jnp.asarray(second.init(), float)

    def init() -> ArrayLike:
        return jnp.where(jnp.greater(begin, 0), jnp.copysign(jnp.inf, start()), start())

    def update(state: AttentionState, divergences: Divergences) -> ArrayLike:
        before = jnp.asarray(state.temperature)
        first = start().astype(before.dtype)
        count = jnp.asarray(state.count) - begin
        # It starts at its first λ; but if that is infinite this batch may tune it already.
        starts = ((count == -1) | is_infinite(before)) & ~is_infinite(first)
        lam = second.update(
            state._replace(count=count, temperature=jnp.where(starts, first, before)),
            Divergences(*(jnp.where(starts, 0, d) for d in divergences)),
        )
        lam = jnp.asarray(lam, before.dtype)
        return jnp.where(count < -1, jnp.copysign(jnp.inf, first), lam)

    return Temperature(init, update, second.automatic)


def target_ess(
    fraction: float | jax.Array = 0.9,
    *,
    init_value: float | jax.Array = jnp.inf,
    rate: float | jax.Array = 0.1,
) -> Temperature:
    r"""Temperature that holds the effective sample size of the batch on target.

    .. math::
      \mathrm{ESS} = \frac{1}{n \sum_i w_i^2},
      \qquad
      |\lambda| \leftarrow |\lambda|
        \left(\frac{1 / \mathrm{ESS} - 1}{1 / \text{fraction} - 1}\right)^{\text{rate}}

    with weights :math:`w_i \propto \exp(l_i / \lambda)` of the n examples, whose sum is 1. From an
    infinite λ it moves to the λ at which normally distributed losses would be on target.

    Pass it as the ``temperature`` of :func:`absgd`, :func:`abadam`, :func:`scale_by_attention` or
    :func:`two_stage`.

    A batch moves λ by a factor of 2 at most. It leaves λ as it is if its weights say nothing: if
    all losses are equal, there is one example, all are masked, or a loss is not finite. Over
    batches, the mean of log(1 / ESS - 1) is on target. A target may be out of reach, as with two
    examples, or with ties in most of a batch: once a part of it has all the weight, in equal
    shares, a smaller λ changes nothing. There log(1 / ESS) and KL agree. So λ stops falling where
    they agree to a thousandth.

    The target bounds what a class can gain: the weight of a share f of the batch grows at most by
    the factor

    .. math::
      1 + \sqrt{\left(\frac{1}{\text{fraction}} - 1\right) \frac{1 - f}{f}}

    which at 0.9 is 3.1 for f = 2.5 % and 1.6 for f = 25 %. So the rarer a class, the more it can
    gain. A loss that knows the class sizes favours rare classes already: there begin with a
    fraction near 1, and validate. At :math:`\lambda < 0` hard examples lose weight, whether their
    labels are wrong or right. With two classes one may lose all its weight. To prevent that, tilt
    within classes: subtract from each loss the :func:`robust_loss` of its class at λ, under
    ``stop_gradient``.

    Args:
      fraction: Target of ESS, in (0, 1), as a share of the batch: near 1 the examples have almost
        equal weights. At :math:`\lambda < 0`, about the share of labels that are right.
      init_value: λ to start from. Its sign is kept: positive favours hard examples, negative easy
        ones.
      rate: Gain of the update, in (0, 0.5]. With the default λ settles within 50 steps from 100
        times too small or too large.

    Returns:
      An automatic temperature.

    Raises:
      ValueError: An argument is out of range.
      TypeError: ``init_value`` is not a number.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import absgd, diagnostics, Sums, target_ess, tilt
      >>> x = jax.random.normal(jax.random.key(0), (100,))
      >>> y = 3 * x + jax.random.normal(jax.random.key(1), (100,))
      >>> tx = absgd(0.02, target_ess(0.5))
      >>> w = jnp.float32(0.0)
      >>> opt_state = tx.init(w)
      >>> def loss_fn(w, sums, opt_state):
      ...   losses = (x * w - y) ** 2
      ...   return tilt(losses, opt_state, sums).mean(), losses
      >>> @jax.jit
      ... def step(w, opt_state):
      ...   grad_fn = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)
      ...   (grads, sums), losses = grad_fn(w, Sums(), opt_state)
      ...   updates, opt_state = tx.update(grads, opt_state, w, sums=sums)
      ...   return optax.apply_updates(w, updates), opt_state, losses
      >>> for _ in range(60):
      ...   w, opt_state, losses = step(w, opt_state)
      >>> print(f"{diagnostics.summary(losses, opt_state)['effective_sample_size']:.1f}")
      0.5
    """
    inside = lambda x: 0 < x < 1, "lie in (0, 1)"
    check_number("fraction", fraction, inside, "it is the effective share of the batch")
    return _automatic("chi2", 1 / fraction - 1, init_value, rate)


def target_kl(
    radius: float | jax.Array,
    *,
    init_value: float | jax.Array = jnp.inf,
    rate: float | jax.Array = 0.1,
) -> Temperature:
    r"""Temperature that holds the KL divergence of the weights from equal ones on target.

    .. math::
      \mathrm{KL} = \sum_i w_i \log(n w_i) = -\frac{\partial F_\lambda}{\partial \lambda},
      \qquad
      |\lambda| \leftarrow |\lambda|
        \left(\frac{\mathrm{KL}}{\text{radius}}\right)^{\text{rate}}

    When KL is on target, λ is the dual variable of the constrained problem, with a ball of that
    radius:

    .. math::
      \min_{\lambda > 0} F_\lambda + \lambda \cdot \text{radius}
        = \max_{p:\, \mathrm{KL}(p \| 1/n) \leq \text{radius}} \sum_i p_i l_i

    In all else it is like :func:`target_ess`.

    Args:
      radius: Target of KL, positive, in nats: near 0 the examples have almost equal weights.
      init_value, rate: As in :func:`target_ess`.

    Returns:
      An automatic temperature.

    Raises:
      ValueError: An argument is out of range.
      TypeError: ``init_value`` is not a number.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from absgd_jax import diagnostics, scale_by_attention, Sums, target_kl, tilt
      >>> losses = jnp.array([0.1, 0.2, 3.0, 1.0])
      >>> tx = scale_by_attention(target_kl(0.1))
      >>> state = tx.init(None)
      >>> for _ in range(60):
      ...   sums = jax.grad(lambda sums: tilt(losses, state, sums).mean())(Sums())
      ...   _, state = tx.update(None, state, sums=sums)
      >>> print(f"{diagnostics.summary(losses, state)['kl_divergence']:.3f}")
      0.100

    References:
      Qi et al., `Stochastic Constrained DRO with a Complexity Independent of Sample Size
      <https://arxiv.org/abs/2210.05740>`_, TMLR 2023
    """
    check_number("radius", radius, POSITIVE, "near 0 the weights are almost equal")
    return _automatic("kl", radius, init_value, rate)


def _automatic(
    measure: Literal["chi2", "kl"],
    target: float | jax.Array,
    init_value: float | jax.Array,
    rate: float | jax.Array,
) -> Temperature:
    check_temperature(init_value, name="init_value")
    slow = lambda x: 0 < x <= 0.5, "lie in (0, 0.5]"
    check_number("rate", rate, slow, "a larger one overshoots")

    def update(state: AttentionState, divergences: Divergences) -> ArrayLike:
        reached: jax.Array = getattr(divergences, measure)
        dtype = reached.dtype
        lam = jnp.asarray(state.temperature)
        ratio = reached / jnp.asarray(target, dtype)
        # The more of the weights' spread is that of a part and the rest of the batch, the less does
        # λ change it.
        size = jnp.log1p(divergences.chi2)
        of_parts = divergences.kl > (1 - _SETTLED) * size
        settled = (ratio < 1) & ~is_infinite(lam) & of_parts
        # Below the smallest normal number the compiler may take it for 0, whose logarithm is -inf.
        moves = (ratio >= float(np.finfo(dtype).tiny)) & ~settled
        excess = jnp.log(jnp.where(moves, ratio, 1))
        step = jnp.clip(jnp.asarray(rate, dtype) * excess, -_MAX_STEP, _MAX_STEP)
        step = jnp.where(is_infinite(lam), excess / 2, step)
        start = unit(lam, jnp.asarray(state.baseline).astype(dtype))
        return jnp.where(moves, start * jnp.exp(step), lam)

    return Temperature(lambda: init_value, update, automatic=True)
