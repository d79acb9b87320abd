"""Attentional bias as optax transformations: the head alone, and on momentum SGD and Adam."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from absgd_jax._checks import (
    ABOVE_ZERO,
    as_batch,
    as_mask,
    as_value,
    at_least_float32,
    check_number,
    check_state,
    DECAY,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    whole_number,
)
from absgd_jax._state import AttentionState, find, SMALLEST
from absgd_jax._temperature import as_temperature, at, Temperature
from absgd_jax._tilt import average, Moments, moments


def scale_by_attention(
    temperature: optax.ScalarOrSchedule | Temperature,
    *,
    gamma: optax.ScalarOrSchedule = 0.9,
    alpha: float | jax.Array = 1.0,
    debias: bool = False,
    max_jump: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient of a mean of tilted losses to that of ABSGD.

    .. math::
      A = \frac{\text{value} - V}{\lambda}
        = \frac{1}{n} \sum_i \left(e^{(l_i - V) / \lambda} - 1\right),
      \qquad
      g \leftarrow \frac{g}{\alpha (1 + \gamma A)},
      \qquad
      V \leftarrow V + \lambda \log(1 + \gamma A)

    for the ``value`` and gradient :math:`g` of a mean of ``tilt(losses, opt_state)``. With
    :math:`u = \alpha e^{V / \lambda}` that is the published algorithm:

    .. math::
      u \leftarrow (1 - \gamma)\, u + \gamma \alpha \frac{1}{n} \sum_i e^{l_i / \lambda},
      \qquad
      g \leftarrow \sum_i p_i \nabla l_i,
      \quad
      p_i = \frac{e^{l_i / \lambda}}{n\, u}

    While :math:`\lambda = \pm\infty` the gradients pass unchanged and :math:`u` is not updated. The
    state is five scalars. Put it first in the chain, where the gradients are still those of the
    loss.

    Args:
      temperature: λ: a number, a 0-d array, an optax schedule of the number of updates,
        :func:`two_stage`, or automatic: :func:`target_ess`, :func:`target_kl`. It is the leaf
        ``temperature`` of the state, and what is set there is what the next loss and its update
        use. One that reaches 0 stays at ±1e-6, with the sign that it had.
      gamma: γ, the weight of the newest batch in the moving average, in (0, 1]: one minus what
        optax calls the decay. A number, or a schedule of the number of updates.
      alpha: Scale of the moving average, positive; the gradients are divided by it.
      debias: Whether γ is divided by :math:`1 - (1 - \gamma)^t` in the t-th weighted batch, as in
        Adam. The published average starts from 0, so that the first weights are 1/γ times too
        large. Always on with an automatic temperature.
      max_jump: How far, as a logarithm, the newest batch may stand above the moving average; the
        rest of it is cut. A loss far above the others otherwise silences the batches after it until
        the average has forgotten it. Off by default, as in the published algorithm: at a small λ
        ordinary batches differ by more than any fixed bound. An automatic temperature knows no such
        λ, and has 3 by default; ``jnp.inf`` turns that off.

    Returns:
      A transformation whose update is ``update(updates, state, params=None, *, value, losses=None,
      where=None, axis_name=None)``. ``value`` is the scalar that ``updates`` is the gradient of.
      One that is not finite, or exactly 0, as a mean over nothing is, leaves :math:`V` and the
      gradients alone. ``losses``, the per-example losses themselves, are needed by an automatic
      temperature. ``where``, their mask, and ``axis_name``, the mapped axes that ``pmap`` or
      ``shard_map`` spreads them over, concern them alone.

    Raises:
      ValueError: An argument is out of range, or ``value`` is not a scalar.
      TypeError: ``temperature`` is no number, array or schedule, or ``value`` is missing, or the
        ``losses`` that an automatic temperature needs.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import scale_by_attention, tilt
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> def loss_fn(w, opt_state):
      ...   return tilt((x @ w - y) ** 2, opt_state).mean()
      >>> tx = optax.chain(scale_by_attention(1.0), optax.adamw(0.1))
      >>> @jax.jit
      ... def step(w, opt_state):
      ...   loss, grads = jax.value_and_grad(loss_fn)(w, opt_state)
      ...   updates, opt_state = tx.update(grads, opt_state, w, value=loss)
      ...   return optax.apply_updates(w, updates), opt_state
      >>> w = jnp.zeros(1)
      >>> opt_state = tx.init(w)
      >>> for _ in range(60):
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
    if max_jump is not None:
        check_number("max_jump", max_jump, ABOVE_ZERO, "None leaves the average unbounded")
    elif tuned.automatic:
        max_jump = 3.0

    def init_fn(params: optax.Params) -> AttentionState:
        del params
        lam = jnp.asarray(tuned.init(), float)
        lam = jnp.copysign(jnp.maximum(jnp.abs(lam), SMALLEST), lam)
        return AttentionState(
            count=jnp.zeros([], jnp.int32),
            temperature=jnp.array(lam),  # a copy, as the state may be donated
            baseline=jnp.zeros([], float),
            averaged=jnp.zeros([], jnp.int32),
            given=jnp.array(lam),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        losses: ArrayLike | None = None,
        where: ArrayLike | None = None,
        axis_name: Hashable | None = None,
        sums: Moments | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AttentionState]:
        del params, extra_args
        check_state(state, AttentionState)
        value = as_value(value)
        if tuned.automatic and sums is None:
            sums = _moments(state, losses, where, axis_name)
        dtype = at_least_float32(jnp.result_type(state.baseline))
        newest, following = (
            jnp.asarray(at(gamma, count), dtype) for count in (state.count, state.count + 1)
        )
        if debias or tuned.automatic:
            # 1 - (1-γ)^t, with its digits where γ is small.
            t = jnp.asarray(state.averaged, dtype) + 1
            newest = -newest / jnp.expm1(t * jnp.log1p(-newest))
        retuned, factor = tuned.update(state, sums)
        scale, averaged = average(
            state, value, newest, max_jump, factor / jnp.asarray(alpha, dtype)
        )
        new = averaged._replace(
            count=optax.safe_increment(state.count),
            temperature=retuned.temperature,
            given=retuned.given,
            # To a batch with the weight 1, what was before is but a point of reference.
            averaged=jnp.where(following < 1, averaged.averaged, 0),
        )
        new = optax.tree.cast_like(new, state)
        return jax.tree.map(lambda g: _multiply(g, scale), updates), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _multiply(g: ArrayLike, scale: jax.Array) -> jax.Array:
    """The product, rounded once to the dtype of g."""
    g = jnp.asarray(g)
    dtype = at_least_float32(g.dtype)
    return (scale.astype(dtype) * g.astype(dtype)).astype(g.dtype)


def _moments(
    state: AttentionState,
    losses: ArrayLike | None,
    where: ArrayLike | None,
    axis_name: Hashable | None,
) -> Moments:
    if losses is None:
        raise TypeError(
            "losses is missing; an automatic temperature is tuned by the losses themselves: "
            "tx.update(grads, state, params, value=loss, losses=losses)."
        )
    losses = as_batch("losses", losses)
    return moments(
        losses, state, None if where is None else as_mask(where, losses.shape), axis_name
    )


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
      temperature: λ, as in :func:`scale_by_attention`. Positive leans on hard examples (class
        imbalance), negative on easy ones (label noise); ``jnp.inf`` is plain SGD.
      momentum: Decay of the momentum, or ``None`` for none.
      nesterov: Whether the momentum is Nesterov's.
      weight_decay: L2 coefficient, added to the gradient before the momentum as in
        ``torch.optim.SGD``.
      gamma, alpha, debias, max_jump: As in :func:`scale_by_attention`.
      accumulator_dtype: Dtype of the momentum, that of the parameters if ``None``.

    Returns:
      A transformation to be updated with ``value=loss``, the mean of ``tilt(losses, opt_state)``
      that the gradient is of: see :func:`scale_by_attention`.

    Raises:
      ValueError, TypeError: As :func:`scale_by_attention`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import absgd, tilt
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> def loss_fn(w, opt_state):
      ...   losses = (x @ w - y) ** 2
      ...   return tilt(losses, opt_state).mean()
      >>> def fit(temperature):
      ...   tx = absgd(0.02, temperature)
      ...   @jax.jit
      ...   def step(w, opt_state):
      ...     loss, grads = jax.value_and_grad(loss_fn)(w, opt_state)
      ...     updates, opt_state = tx.update(grads, opt_state, w, value=loss)
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
    if momentum is not None:
        check_number("momentum", momentum, DECAY, "None is plain SGD")
    return optax.chain(
        scale_by_attention(temperature, gamma=gamma, alpha=alpha, debias=debias, max_jump=max_jump),
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
    max_jump: float | jax.Array | None = None,
    mu_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on attentionally weighted losses: ABAdam.

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
      gamma, alpha, debias, max_jump: As in :func:`scale_by_attention`.

    Returns:
      A transformation to be updated with ``value=loss``, as :func:`absgd`.

    Raises:
      ValueError, TypeError: As :func:`scale_by_attention`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import abadam, tilt
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> def loss_fn(w, opt_state):
      ...   return tilt((x @ w - y) ** 2, opt_state).mean()
      >>> tx = abadam(0.1, temperature=1.0)
      >>> @jax.jit
      ... def step(w, opt_state):
      ...   loss, grads = jax.value_and_grad(loss_fn)(w, opt_state)
      ...   updates, opt_state = tx.update(grads, opt_state, w, value=loss)
      ...   return optax.apply_updates(w, updates), opt_state
      >>> w = jnp.zeros(1)
      >>> opt_state = tx.init(w)
      >>> for _ in range(60):
      ...   w, opt_state = step(w, opt_state)
      >>> print(w.round(1))
      [2.7]

    References:
      Qi et al., `ABSGD <https://arxiv.org/abs/2012.06951>`_, TMLR 2023
    """
    _check_optimizer(learning_rate, weight_decay)
    check_number("b1", b1, DECAY)
    check_number("b2", b2, DECAY)
    check_number("eps", eps, NOT_NEGATIVE)
    return optax.chain(
        scale_by_attention(temperature, gamma=gamma, alpha=alpha, debias=debias, max_jump=max_jump),
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


class AccumulateState(NamedTuple):
    """State of :func:`accumulate`.

    Attributes:
      mini_step: Number of micro-batches so far; 0 when the optimiser has just been updated.
      value: Their sum of the values, divided by k.
      sums: Of their losses, where these are given.
      acc_grads: Their sum of the gradients, divided by k, in float32 or in the dtype of the
        parameters if that is wider.
      inner_opt_state: State of the optimiser.
    """

    mini_step: ArrayLike  # shape=(), dtype=jnp.int32
    value: ArrayLike  # shape=(), dtype=jnp.float32, or jnp.float64 under jax_enable_x64
    sums: Moments  # six scalars, dtype as value
    acc_grads: optax.Updates
    inner_opt_state: optax.OptState


def accumulate(
    opt: optax.GradientTransformationExtraArgs, every_k: int
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates micro-batches into a batch: ``optax.MultiSteps`` that averages values, too.

    .. math::
      g = \frac{1}{k} \sum_{m=1}^k g_m,
      \qquad
      \text{value} = \frac{1}{k} \sum_{m=1}^k \text{value}_m

    is what the optimiser is updated with in every k-th call; in the calls between, the updates are
    zero and the optimiser's state, the temperature included, stays as it is. ``optax.MultiSteps``
    shows the optimiser the value of the last micro-batch only. ``optax.microbatch`` of
    ``jax.value_and_grad``, with the mean as its accumulator, needs no such help.

    Args:
      opt: The optimiser: :func:`absgd`, :func:`abadam`, or whatever chain holds one
        :func:`scale_by_attention`. ``optax.inject_hyperparams`` goes inside, around the optimiser.
      every_k: k, the number of micro-batches in a batch.

    Returns:
      A transformation whose update has the arguments of :func:`scale_by_attention`. For an
      automatic temperature ``losses`` are those of the micro-batch. The optimiser gets the other
      extra arguments of the last micro-batch.

    Raises:
      ValueError: ``every_k`` is less than 1; ``opt`` holds no attention, or several; ``value`` is
        not a scalar.
      TypeError: ``value`` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import absgd, accumulate, tilt
      >>> x, y = jnp.array([0.0, 1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 7.0, 3.0])
      >>> def loss_fn(w, opt_state, i):
      ...   return tilt((x[i] * w - y[i]) ** 2, opt_state).mean()
      >>> def train(tx, batches):
      ...   @jax.jit
      ...   def step(w, opt_state, i):
      ...     loss, grads = jax.value_and_grad(loss_fn)(w, opt_state, i)
      ...     updates, opt_state = tx.update(grads, opt_state, w, value=loss)
      ...     return optax.apply_updates(w, updates), opt_state
      ...   w = jnp.float32(0.0)
      ...   opt_state = tx.init(w)
      ...   for i in batches:
      ...     w, opt_state = step(w, opt_state, i)
      ...   return w
      >>> tx = absgd(0.01, temperature=20.0)
      >>> whole, micro = jnp.array([0, 1, 2, 3]), [jnp.array([0, 1]), jnp.array([2, 3])]
      >>> print(f"{train(tx, 50 * [whole]):.4f}")
      1.7547
      >>> print(f"{train(accumulate(tx, 2), 50 * micro):.4f}")
      1.7547
    """
    if not (hasattr(opt, "init") and hasattr(opt, "update")):
        raise TypeError(
            f"opt must be an optimiser, got {opt!r}; pass absgd, abadam, or what holds one "
            "scale_by_attention."
        )
    check_number("every_k", every_k, whole_number(1), "it is how many micro-batches make a batch")

    def zero() -> jax.Array:
        return jnp.zeros([], float)

    def init_fn(params: optax.Params) -> AccumulateState:
        return AccumulateState(
            mini_step=jnp.zeros([], jnp.int32),
            value=zero(),
            sums=Moments(zero(), zero(), (zero(), zero()), (zero(), zero())),
            acc_grads=jax.tree.map(
                lambda p: jnp.zeros_like(p, at_least_float32(jnp.result_type(p))), params
            ),
            inner_opt_state=opt.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        losses: ArrayLike | None = None,
        where: ArrayLike | None = None,
        axis_name: Hashable | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        check_state(state, AccumulateState)
        attention = find(state.inner_opt_state)
        sums = state.sums
        if losses is not None:
            new = _moments(attention, losses, where, axis_name)
            sums = jax.tree.map(lambda a, x: a + x.astype(a.dtype), sums, new)
            extra_args["sums"] = sums
        value, acc_grads = jax.tree.map(
            lambda a, x: a + jnp.asarray(x, a.dtype) / every_k,
            (state.value, state.acc_grads),
            (as_value(value), updates),
        )
        # As in optax.MultiSteps the optimiser runs in every call, and in every k-th it counts.
        updates, inner_opt_state = opt.update(
            optax.tree.cast_like(acc_grads, updates),
            state.inner_opt_state,
            params,
            value=value,
            **extra_args,
        )
        emit = state.mini_step == every_k - 1
        mini_step, value, sums, acc_grads = jax.tree.map(
            lambda x: jnp.where(emit, 0, x), (state.mini_step + 1, value, sums, acc_grads)
        )
        inner_opt_state = jax.tree.map(
            lambda new, old: jnp.where(emit, new, old), inner_opt_state, state.inner_opt_state
        )
        updates = jax.tree.map(lambda u: jnp.where(emit, u, 0), updates)
        return updates, AccumulateState(mini_step, value, sums, acc_grads, inner_opt_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
