"""Attentional bias as optax transformations: the head alone, and on momentum SGD and Adam."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from absgd_jax._attention import AttentionState, moving_baseline
from absgd_jax._checks import (
    as_array,
    as_scalar,
    at_least_float32,
    check_number,
    check_state,
    DECAY,
    NOT_NEGATIVE,
)
from absgd_jax._reduce import psum
from absgd_jax._temperature import (
    AutomaticTemperature,
    batch_divergence,
    Divergence,
    Temperature,
    TemperatureState,
)


def scale_by_attention(
    temperature: Temperature,
    *,
    gamma: float | jax.Array = 0.9,
    alpha: float | jax.Array = 1.0,
    max_jump: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradients of :func:`robust_loss` to those of ABSGD.

    .. math::
      u \leftarrow (1 - \gamma)\, u + \gamma \alpha\, e^{F / \lambda},
      \qquad
      g \leftarrow \frac{e^{F / \lambda}}{u}\, g
        = \sum_i \frac{e^{l_i / \lambda}}{n\, u} \nabla l_i

    While :math:`\lambda = \pm\infty` the gradients pass unchanged and :math:`u` waits. The state
    is three scalars. Put it first in the chain, where the gradients are still those of the loss.

    Args:
      temperature: λ, as in :func:`attention`. Compute the loss with
        ``get_temperature(opt_state)``, so that loss and update always agree on it.
      gamma: Weight of the newest batch in the moving average, in (0, 1]: one minus its decay.
      alpha: Scale of the moving average, positive; the gradients are divided by it.
      max_jump: Bound on one batch's rise above the moving average, as in :func:`attention`.

    Returns:
      A transformation whose update is ``update(updates, state, params=None, *, value,
      where=None, losses=None, axis_name=None)``. ``value`` is the scalar that ``updates`` is the
      gradient of. ``where``, the mask or the number of entries that it includes, is needed by
      batches that may be masked whole: if there are none, :math:`u` is left alone. So it is by a
      ``value`` that is not finite, the gradients then passing as they are. ``losses``, the
      per-example losses that ``value`` is of, are needed by an automatic temperature, and with them
      ``where`` is the mask. ``axis_name`` is needed where ``pmap`` or ``shard_map`` spreads
      ``where`` or ``losses``.

    Raises:
      ValueError: An argument is out of range, or ``value`` is not a scalar.
      TypeError: ``temperature`` is no number, array or schedule, or ``value`` is missing, or the
        ``losses`` that an automatic temperature needs.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import absgd_jax
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> def loss_fn(w, temperature):
      ...   return absgd_jax.robust_loss((x @ w - y) ** 2, temperature)
      >>> tx = optax.chain(absgd_jax.scale_by_attention(1.0), optax.adamw(0.1))
      >>> w = jnp.zeros(1)
      >>> opt_state = tx.init(w)
      >>> for _ in range(60):
      ...   temperature = absgd_jax.get_temperature(opt_state)
      ...   loss, grads = jax.value_and_grad(loss_fn)(w, temperature)
      ...   updates, opt_state = tx.update(grads, opt_state, w, value=loss)
      ...   w = optax.apply_updates(w, updates)
      >>> print(w.round(1))
      [2.7]

    References:
      Qi et al., `Attentional-Biased Stochastic Gradient Descent
      <https://arxiv.org/abs/2012.06951>`_, TMLR 2023
    """
    init, advance = moving_baseline(temperature, gamma, alpha, max_jump)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        where: ArrayLike | None = None,
        losses: ArrayLike | None = None,
        axis_name: Hashable | None = None,
        divergence: Divergence | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AttentionState]:
        del params, extra_args
        check_state(state, AttentionState)
        value = as_value(value)
        if isinstance(temperature, AutomaticTemperature) and divergence is None:
            divergence = batch_divergence(value, losses, state.temperature, where, axis_name)
            where, axis_name = divergence.n, None
        if where is not None:
            included = psum(jnp.sum(as_array("where", where)), axis_name)
            value = jnp.where(included > 0, value, jnp.inf)
        scale, state = advance(value, state, divergence)
        return rescale(updates, scale), state

    return optax.GradientTransformationExtraArgs(lambda params: init(), update_fn)


def rescale(updates: optax.Updates, scale: jax.Array) -> optax.Updates:
    """The updates times a scalar, each in its dtype."""

    def multiply(g: ArrayLike) -> jax.Array:
        g = jnp.asarray(g)
        dtype = at_least_float32(g.dtype)
        return (scale.astype(dtype) * g.astype(dtype)).astype(g.dtype)

    rescaled: optax.Updates = jax.tree.map(multiply, updates)
    return rescaled


def as_value(value: ArrayLike | None) -> jax.Array:
    """``value`` as an array, checked."""
    if value is None:
        raise TypeError(
            "value is missing; attention depends on the loss whose gradients it scales: "
            "tx.update(grads, state, params, value=loss). Where an optax wrapper drops it, chain "
            "absgd_jax.scale_by_attention in front of that wrapper, or use absgd_jax.accumulate in "
            "place of optax.MultiSteps. A loop that can't pass it on, such as flax's TrainState, "
            "can weight its losses with absgd_jax.attention instead."
        )
    return as_scalar("value", value)


def absgd(
    learning_rate: optax.ScalarOrSchedule,
    temperature: Temperature,
    *,
    momentum: float | jax.Array | None = 0.9,
    nesterov: bool = False,
    weight_decay: float | jax.Array = 0.0,
    gamma: float | jax.Array = 0.9,
    alpha: float | jax.Array = 1.0,
    max_jump: float | jax.Array | None = None,
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Attentional-biased stochastic gradient descent: ABSGD.

    Momentum SGD on per-example losses :math:`l_i` weighted by :math:`p_i`:

    .. math::
      u &\leftarrow (1 - \gamma)\, u + \gamma \alpha \frac{1}{n} \sum_i e^{l_i / \lambda} \\
      g &\leftarrow \sum_i p_i \nabla l_i + \text{weight decay} \cdot \theta,
        \qquad p_i = \frac{e^{l_i / \lambda}}{n\, u} \\
      m &\leftarrow \text{momentum} \cdot m + g \\
      \theta &\leftarrow \theta - \eta\, m

    Args:
      learning_rate: η, a number or a schedule.
      temperature: λ: a number, a 0-d array, a schedule or automatic, as in :func:`attention`.
        Positive leans on hard examples (class imbalance), negative on easy ones (label noise);
        ``jnp.inf`` is plain SGD. Two-stage training is a schedule, ``optax.join_schedules([lambda
        _: jnp.inf, lambda _: 5.0], [steps])``, or automatic from some step on,
        ``target_ess(transition_begin=steps)``.
      momentum: Decay of the momentum, or ``None`` for none.
      nesterov: Whether the momentum is Nesterov's.
      weight_decay: L2 coefficient, added to the gradient before the momentum as in
        ``torch.optim.SGD``.
      gamma: Weight of the newest batch in the moving average, in (0, 1]: one minus its decay.
      alpha: Scale of the moving average, positive; the gradients are divided by it.
      max_jump: Bound on one batch's rise above the moving average, as in :func:`attention`.
      accumulator_dtype: Dtype of the momentum, that of the parameters if ``None``.

    Returns:
      A transformation to be updated with ``value=loss``: see :func:`scale_by_attention`.

    Raises:
      ValueError, TypeError: As :func:`scale_by_attention`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import absgd_jax
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> def loss_fn(w, temperature):
      ...   return absgd_jax.robust_loss((x @ w - y) ** 2, temperature)
      >>> def fit(temperature):
      ...   tx = absgd_jax.absgd(0.02, temperature)
      ...   w = jnp.zeros(1)
      ...   opt_state = tx.init(w)
      ...   for _ in range(100):
      ...     temperature = absgd_jax.get_temperature(opt_state)
      ...     loss, grads = jax.value_and_grad(loss_fn)(w, temperature)
      ...     updates, opt_state = tx.update(grads, opt_state, w, value=loss)
      ...     w = optax.apply_updates(w, updates)
      ...   return w.round(1)
      >>> for temperature in (jnp.inf, 1.0, -1.0):  # the mean, the hard examples, the easy ones
      ...   print(fit(temperature))
      [3.]
      [2.7]
      [1.]

    References:
      Qi et al., `Attentional-Biased Stochastic Gradient Descent
      <https://arxiv.org/abs/2012.06951>`_, TMLR 2023
    """
    _check_optimizer(learning_rate, weight_decay)
    if momentum is not None:
        check_number("momentum", momentum, DECAY, "None is plain SGD")
    return optax.chain(
        scale_by_attention(temperature, gamma=gamma, alpha=alpha, max_jump=max_jump),
        _add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype),
    )


def abadam(
    learning_rate: optax.ScalarOrSchedule,
    temperature: Temperature,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    gamma: float | jax.Array = 0.9,
    alpha: float | jax.Array = 1.0,
    max_jump: float | jax.Array | None = None,
    mu_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on attentionally weighted losses: ABAdam.

    .. math::
      g \leftarrow \sum_i p_i \nabla l_i + \text{weight decay} \cdot \theta,
      \qquad
      p_i = \frac{e^{l_i / \lambda}}{n\, u},
      \qquad
      \theta \leftarrow \theta - \mathrm{Adam}(g)

    with :math:`u` as in :func:`absgd`. For decoupled weight decay, chain
    :func:`scale_by_attention` with ``optax.adamw``.

    Args:
      learning_rate: η, a number or a schedule.
      temperature: λ: a number, a 0-d array, a schedule or automatic, as in :func:`absgd`.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: L2 coefficient, added to the gradient before the moments as in
        ``torch.optim.Adam``.
      gamma: Weight of the newest batch in the moving average, in (0, 1]: one minus its decay.
      alpha: Scale of the moving average, positive; the gradients are divided by it.
      max_jump: Bound on one batch's rise above the moving average, as in :func:`attention`.
      mu_dtype: Dtype of the first moment, that of the parameters if ``None``.

    Returns:
      A transformation to be updated with ``value=loss``: see :func:`scale_by_attention`.

    Raises:
      ValueError, TypeError: As :func:`scale_by_attention`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import absgd_jax
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> def loss_fn(w, temperature):
      ...   return absgd_jax.robust_loss((x @ w - y) ** 2, temperature)
      >>> tx = absgd_jax.abadam(0.1, temperature=1.0)
      >>> w = jnp.zeros(1)
      >>> opt_state = tx.init(w)
      >>> for _ in range(60):
      ...   temperature = absgd_jax.get_temperature(opt_state)
      ...   loss, grads = jax.value_and_grad(loss_fn)(w, temperature)
      ...   updates, opt_state = tx.update(grads, opt_state, w, value=loss)
      ...   w = optax.apply_updates(w, updates)
      >>> print(w.round(1))
      [2.7]

    References:
      Qi et al., `Attentional-Biased Stochastic Gradient Descent
      <https://arxiv.org/abs/2012.06951>`_, TMLR 2023
    """
    _check_optimizer(learning_rate, weight_decay)
    check_number("b1", b1, DECAY)
    check_number("b2", b2, DECAY)
    check_number("eps", eps, NOT_NEGATIVE)
    return optax.chain(
        scale_by_attention(temperature, gamma=gamma, alpha=alpha, max_jump=max_jump),
        _add_decayed_weights(weight_decay),
        optax.adam(learning_rate, b1, b2, eps, mu_dtype=mu_dtype),
    )


def _check_optimizer(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float | jax.Array
) -> None:
    """Of what optax takes as it is."""
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, NOT_NEGATIVE)
    check_number("weight_decay", weight_decay, NOT_NEGATIVE)


def _add_decayed_weights(weight_decay: float | jax.Array) -> optax.GradientTransformation:
    # Without decay the parameters are not read, and need not be passed to update.
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay)


def get_temperature(opt_state: optax.OptState) -> jax.Array:
    """Temperature for the next loss, wherever the attention sits in the optimiser's state.

    Args:
      opt_state: State of a transformation that holds one :func:`scale_by_attention`, alone or
        inside any chain or wrapper; or an :class:`AttentionState`.

    Returns:
      λ, a float scalar.

    Raises:
      ValueError: The state holds no attention, or several; or its temperature is a schedule that
        ``optax.inject_hyperparams`` follows, whose state tells the last value only.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from absgd_jax import absgd, get_temperature
      >>> opt_state = absgd(0.1, temperature=5.0).init(jnp.zeros(3))
      >>> print(get_temperature(opt_state))
      5.0
      >>> opt_state = optax.tree.set(opt_state, temperature=jnp.float32(2.0))
      >>> print(get_temperature(opt_state))
      2.0
    """

    def is_source(node: Any) -> bool:
        return isinstance(node, AttentionState) or "temperature" in getattr(node, "hyperparams", ())

    sources = [s for s in jax.tree.leaves(opt_state, is_leaf=is_source) if is_source(s)]
    if len(sources) != 1:
        raise ValueError(
            f"opt_state must hold one AttentionState, got {len(sources)}; pass the state of absgd, "
            "abadam or scale_by_attention, or of what wraps it. To train parts of a model apart, "
            "put one scale_by_attention in front of optax.partition."
        )
    (source,) = sources
    if isinstance(source, AttentionState):
        return jnp.asarray(source.temperature)
    stateful = getattr(source, "hyperparams_states", {}).get("temperature")
    if isinstance(stateful, TemperatureState):
        return jnp.asarray(stateful.temperature)
    if stateful is not None:
        raise ValueError(
            "optax.inject_hyperparams schedules the temperature and its state tells the value of "
            "the last step, not of the next; pass static_args=('temperature',) to it, and "
            "absgd_jax follows the schedule itself."
        )
    return jnp.asarray(source.hyperparams["temperature"])
