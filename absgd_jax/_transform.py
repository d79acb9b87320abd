"""ABSGD as optax transformations: ``scale_by_attention``, and SGD and Adam behind it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from absgd_jax._checks import (
    ABOVE_ZERO,
    at_least_float32,
    check_number,
    check_state,
    DECAY,
    is_concrete,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
)
from absgd_jax._state import AttentionState, clamped, eps, is_infinite
from absgd_jax._sums import Sums, taken
from absgd_jax._temperature import as_temperature, Temperature, value_at
from absgd_jax._tilt import attend


def scale_by_attention(
    temperature: optax.ScalarOrSchedule | Temperature,
    *,
    gamma: optax.ScalarOrSchedule = 0.9,
    alpha: float | jax.Array = 1.0,
    debias: bool = False,
    damping: float | jax.Array | None = None,
    max_jump: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient of the tilted losses to that of ABSGD.

    .. math::
      E = \frac{\sum_i c_i\, e^{(l_i - V) / \lambda}}{\sum_i c_i},
      \qquad
      g \leftarrow \frac{g}{\alpha (1 - \gamma + \gamma E)},
      \qquad
      V \leftarrow V + \lambda \log(1 - \gamma + \gamma E)

    Here :math:`g` is the gradient of a loss in which ``tilt(losses, opt_state, sums)`` have the
    weights :math:`c_i`; the two sums are in its gradient by ``sums``. λ is the temperature and
    :math:`V` the baseline; :math:`\gamma` and :math:`\alpha` are arguments. With
    :math:`c_i = 1 / n` and :math:`u = \alpha e^{V / \lambda}` this is the published algorithm:

    .. math::
      u \leftarrow (1 - \gamma)\, u + \gamma \alpha \frac{1}{n} \sum_i e^{l_i / \lambda},
      \qquad
      g \leftarrow \sum_i p_i \nabla l_i,
      \quad
      p_i = \frac{e^{l_i / \lambda}}{n\, u}

    While :math:`\lambda = \pm\infty` the gradients pass unchanged, and :math:`V` follows the mean
    loss. Put it first in the chain, before anything that is not linear in the gradients, such as
    clipping. If the loss has another term, the gradient of that term is multiplied by the scale,
    too. After a plain stage, as of :func:`two_stage`, the scale is near 1. In a first weighted
    batch without a plain stage it is :math:`1 / (\alpha \gamma E)`, which may be anything.

    Args:
      temperature: λ: a number, an optax schedule of the number of updates, a ``jax.Array``,
        :func:`two_stage`, or automatic: :func:`target_ess`, :func:`target_kl`. It is the leaf
        ``temperature`` of the state. If it is a number, λ starts there, and a value that you set in
        the leaf stays. A schedule or an array overwrites the leaf at every update. An automatic
        temperature goes on from what it finds. A λ that reaches 0 stays at ±1e-6, with its sign.
      gamma: γ, the weight of the newest batch in the moving average, in (0, 1]: one minus what
        optax calls the decay. A number, or a schedule of the number of updates.
      alpha: Scale of the moving average, positive; the gradients are divided by it.
      debias: Whether γ is divided by :math:`1 - (1 - \gamma)^t` in the t-th weighted batch, as in
        Adam. The published average starts from 0, so that the first weights are 1/γ times too
        large. Always on with an automatic temperature.
      damping: At a finite :math:`\lambda > 0` the gradients are divided by :math:`1 +
        \text{damping} \sqrt{1 / \mathrm{ESS} - 1}`, where ESS is the effective sample size of the
        batch's weights. The reason is that weight on hard examples makes gradients longer, most of
        all in a batch with larger losses than those before it. ``None`` is 0, as published, and 2
        for an automatic temperature. With a fixed λ > 0, 2 or a clip behind this transformation
        keeps training from diverging at learning rates that SGD bears.
      max_jump: How far, as a logarithm, the newest batch may stand above the moving average; what
        is beyond is cut off. Without a bound, a loss far above the others silences the batches
        after it until the average has forgotten it. ``None`` is ``jnp.inf``, as published, because
        at a small λ ordinary batches differ by more than any fixed bound. For an automatic
        temperature, which avoids such λ, it is 3.

    Returns:
      A transformation whose update is ``update(updates, state, params=None, *, sums=None)``.
      ``sums`` is the gradient by the :class:`Sums` that the losses were tilted with. If it is part
      of ``updates``, leave out the argument; it comes back as zeros. Other extra arguments are
      ignored. A fully masked batch leaves :math:`V` as it is, and has the scale 0. A
      batch with a loss that is not finite leaves :math:`V` as it is, too. Sums that don't fit this
      state, as with another λ or after something non-linear in front, make the updates NaN.

    Raises:
      ValueError: An argument is out of range, or ``sums`` are given twice or have another shape.
      TypeError: ``temperature`` is not a number, an array or a schedule; ``sums`` are missing, are
        not a gradient, or have less than 32 bits; or ``updates`` can't be scaled.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import scale_by_attention, Sums, tilt
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> def loss_fn(w, sums, opt_state):
      ...   return tilt((x @ w - y) ** 2, opt_state, sums).mean()
      >>> tx = optax.chain(scale_by_attention(1.0), optax.adamw(0.1))
      >>> @jax.jit
      ... def step(w, opt_state):
      ...   grads, sums = jax.grad(loss_fn, argnums=(0, 1))(w, Sums(), opt_state)
      ...   updates, opt_state = tx.update(grads, opt_state, w, sums=sums)
      ...   return optax.apply_updates(w, updates), opt_state
      >>> w = jnp.zeros(1)
      >>> opt_state = tx.init(w)
      >>> for _ in range(100):
      ...   w, opt_state = step(w, opt_state)
      >>> print(w.round(1))
      [2.7]

    References:
      Qi et al., `ABSGD <https://arxiv.org/abs/2012.06951>`_, TMLR 2023
    """
    tuned = as_temperature(temperature)
    if not callable(gamma):
        check_number("gamma", gamma, SHARE, "it is one minus the decay of the moving average")
    check_number("alpha", alpha, POSITIVE, "the gradients are divided by it")
    if damping is None:
        damping = 2.0 if tuned.automatic else 0.0
    check_number("damping", damping, NOT_NEGATIVE, "None is the default of the temperature")
    if max_jump is not None:
        check_number("max_jump", max_jump, ABOVE_ZERO, "None leaves the average unbounded")
    elif tuned.automatic:
        max_jump = 3.0

    def init_fn(params: optax.Params) -> AttentionState:
        del params
        return AttentionState(
            count=jnp.zeros([], jnp.int32),
            # A copy, as the state may be donated.
            temperature=jnp.array(clamped(jnp.asarray(tuned.init(), float))),
            baseline=jnp.zeros([], float),
            averaged=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        sums: Sums | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AttentionState]:
        del params
        check_state(state, AttentionState)
        updates, sums = taken(updates, sums, extra_args)
        dtype = at_least_float32(jnp.result_type(state.baseline))
        like = state._replace(temperature=state.baseline)  # whatever kind of number was set there
        given = state.temperature
        lam = clamped(given).astype(dtype)
        state = state._replace(temperature=lam)
        weight = jnp.asarray(value_at("gamma", gamma, state.count), dtype)
        following = value_at("gamma", gamma, state.count + 1)
        if debias or tuned.automatic:
            # 1 - (1-γ)^t, with its digits where γ is small.
            t = jnp.abs(jnp.asarray(state.averaged, dtype)) + 1
            weight = jnp.minimum(-weight / jnp.expm1(t * jnp.log1p(-weight)), 1)
        scale, new, divergences = attend(state, sums, weight, max_jump)
        divisor = jnp.asarray(alpha, dtype)
        if not (is_concrete(damping) and damping == 0):
            damped = (lam > 0) & (divergences.chi2 > 0)
            # Of an infinite χ², too.
            chi2 = jnp.where(damped, jnp.minimum(divergences.chi2, 1 / eps(dtype)), 1)
            spread = jnp.where(damped, jnp.sqrt(chi2), 0)
            divisor = divisor * (1 + jnp.asarray(damping, dtype) * spread)
        scale = jnp.where(is_infinite(lam), scale, scale / divisor)
        # Where null isn't finite, the gradients of the parameters are not those of the loss.
        scale = jnp.where(jnp.isfinite(jnp.asarray(sums.null)), scale, jnp.nan)
        following_lam = tuned.update(state, divergences)
        new = new._replace(
            count=optax.safe_increment(jnp.asarray(state.count)),
            # What is left alone passes through, and costs no kernel.
            temperature=jnp.asarray(given if following_lam is lam else following_lam),
            # To a batch with the weight 1, what was before is but a point of reference.
            averaged=jnp.where(jnp.less(following, 1), new.averaged, 0),
        )
        new = jax.tree.map(lambda x, like: x.astype(jnp.result_type(like)), new, like)
        return jax.tree.map(lambda g: _multiply(g, scale), updates), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _multiply(g: ArrayLike, scale: jax.Array) -> jax.Array:
    """The product, rounded once to the dtype of g."""
    if not jnp.issubdtype(jnp.result_type(g), jnp.inexact):
        raise TypeError(
            f"updates must be floating point or complex, got {jnp.result_type(g)}; differentiate "
            "by such parameters alone, as with optax.partition or eqx.filter_grad."
        )
    g = jnp.asarray(g)
    dtype = at_least_float32(g.dtype)
    return (scale.astype(dtype) * g.astype(dtype)).astype(g.dtype)


def absgd(
    learning_rate: optax.ScalarOrSchedule,
    temperature: optax.ScalarOrSchedule | Temperature,
    *,
    momentum: float | jax.Array | None = 0.9,
    nesterov: bool = False,
    weight_decay: float | jax.Array = 0.0,
    gamma: optax.ScalarOrSchedule = 0.9,
    alpha: float | jax.Array = 1.0,
    debias: bool = False,
    damping: float | jax.Array | None = None,
    max_jump: float | jax.Array | None = None,
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Attentional-biased stochastic gradient descent: ABSGD.

    SGD with momentum on per-example losses :math:`l_i`, which are weighted by :math:`p_i`:

    .. math::
      u &\leftarrow (1 - \gamma)\, u + \gamma \alpha \frac{1}{n} \sum_i e^{l_i / \lambda} \\
      g &\leftarrow \sum_i p_i \nabla l_i + \text{weight decay} \cdot \theta,
        \qquad p_i = \frac{e^{l_i / \lambda}}{n\, u} \\
      m &\leftarrow \text{momentum} \cdot m + g \\
      \theta &\leftarrow \theta - \eta\, m

    Args:
      learning_rate: η, a number or a schedule.
      temperature: λ, as in :func:`scale_by_attention`. Positive favours hard examples, for rare
        classes; negative favours easy ones, for wrong labels; ``jnp.inf`` is plain SGD.
      momentum: Decay of the momentum, or ``None`` for none.
      nesterov: Whether the momentum is Nesterov's.
      weight_decay: L2 coefficient, added to the gradient before the momentum as in
        ``torch.optim.SGD``.
      gamma, alpha, debias, damping, max_jump: As in :func:`scale_by_attention`.
      accumulator_dtype: Dtype of the momentum, that of the parameters if ``None``.

    Returns:
      A transformation to be updated with ``sums``, the gradient by the :class:`Sums` that the
      losses were tilted with, or with gradients that hold them: see :func:`scale_by_attention`.

    Raises:
      ValueError, TypeError: As :func:`scale_by_attention`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import absgd, Sums, tilt
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> def loss_fn(w, sums, opt_state):
      ...   losses = (x @ w - y) ** 2
      ...   return tilt(losses, opt_state, sums).mean()
      >>> def fit(temperature):
      ...   tx = absgd(0.02, temperature)
      ...   @jax.jit
      ...   def step(w, opt_state):
      ...     grads, sums = jax.grad(loss_fn, argnums=(0, 1))(w, Sums(), opt_state)
      ...     updates, opt_state = tx.update(grads, opt_state, w, sums=sums)
      ...     return optax.apply_updates(w, updates), opt_state
      ...   w = jnp.zeros(1)
      ...   opt_state = tx.init(w)
      ...   for _ in range(100):
      ...     w, opt_state = step(w, opt_state)
      ...   return w.round(1)
      >>> for temperature in (jnp.inf, 1.0, -1.0):  # the mean, the hard examples, the easy ones
      ...   print(fit(temperature))
      [3.]
      [2.7]
      [1.]

    References:
      Qi et al., `ABSGD <https://arxiv.org/abs/2012.06951>`_, TMLR 2023
    """
    _check_optimizer(learning_rate, weight_decay)
    head: Any = dict(gamma=gamma, alpha=alpha, debias=debias, damping=damping, max_jump=max_jump)
    if momentum is not None:
        check_number("momentum", momentum, DECAY, "None is plain SGD")
    return optax.chain(
        scale_by_attention(temperature, **head),
        _add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype),
    )


def abadam(
    learning_rate: optax.ScalarOrSchedule,
    temperature: optax.ScalarOrSchedule | Temperature,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    gamma: optax.ScalarOrSchedule = 0.9,
    alpha: float | jax.Array = 1.0,
    debias: bool = False,
    damping: float | jax.Array | None = None,
    max_jump: float | jax.Array | None = None,
    mu_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on losses with the weights of ABSGD: ABAdam.

    .. math::
      g \leftarrow \sum_i p_i \nabla l_i + \text{weight decay} \cdot \theta,
      \qquad
      \theta \leftarrow \theta - \mathrm{Adam}(g)

    with the weights :math:`p_i` of :func:`absgd`. For decoupled weight decay, chain
    :func:`scale_by_attention` with ``optax.adamw``.

    Args:
      learning_rate: η, a number or a schedule.
      temperature: λ, as in :func:`absgd`.
      b1, b2, eps, mu_dtype: As in ``optax.adam``.
      weight_decay: L2 coefficient, added to the gradient before the moments as in
        ``torch.optim.Adam``.
      gamma, alpha, debias, damping, max_jump: As in :func:`scale_by_attention`.

    Returns:
      A transformation to be updated with ``sums``, as :func:`absgd`.

    Raises:
      ValueError, TypeError: As :func:`scale_by_attention`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import abadam, Sums, tilt
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> def loss_fn(w, sums, opt_state):
      ...   return tilt((x @ w - y) ** 2, opt_state, sums).mean()
      >>> tx = abadam(0.1, temperature=1.0)
      >>> @jax.jit
      ... def step(w, opt_state):
      ...   grads, sums = jax.grad(loss_fn, argnums=(0, 1))(w, Sums(), opt_state)
      ...   updates, opt_state = tx.update(grads, opt_state, w, sums=sums)
      ...   return optax.apply_updates(w, updates), opt_state
      >>> w = jnp.zeros(1)
      >>> opt_state = tx.init(w)
      >>> for _ in range(100):
      ...   w, opt_state = step(w, opt_state)
      >>> print(w.round(1))
      [2.7]

    References:
      Qi et al., `ABSGD <https://arxiv.org/abs/2012.06951>`_, TMLR 2023
    """
    _check_optimizer(learning_rate, weight_decay)
    head: Any = dict(gamma=gamma, alpha=alpha, debias=debias, damping=damping, max_jump=max_jump)
    check_number("b1", b1, DECAY)
    check_number("b2", b2, DECAY)
    check_number("eps", eps, NOT_NEGATIVE)
    return optax.chain(
        scale_by_attention(temperature, **head),
        _add_decayed_weights(weight_decay),
        optax.adam(learning_rate, b1, b2, eps, mu_dtype=mu_dtype),
    )


def _check_optimizer(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float | jax.Array
) -> None:
    """Arguments that optax itself doesn't check."""
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, NOT_NEGATIVE)
    check_number("weight_decay", weight_decay, NOT_NEGATIVE)


def _add_decayed_weights(weight_decay: float | jax.Array) -> optax.GradientTransformation:
    # Without decay the parameters are not read, and need not be passed to update.
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay)
