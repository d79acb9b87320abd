"""Merging the parts of a batch: over devices, and over micro-batches.

Part m, of n_m examples, brings the robust loss F_m of its own and the gradient G_m of that. Of the
whole batch, with n = Σ n_m,

    F   = λ log Σ_m (n_m / n) exp(F_m / λ)
    G   = Σ_m s_m G_m,    s_m = (n_m / n) exp((F_m - F) / λ)

Parts merge as losses do, each counting n_m times: F is their robust loss, and s are its weights.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from absgd_jax._attention import soft_extremum, tilted_sums
from absgd_jax._checks import (
    as_array,
    as_scalar,
    at_least_float32,
    check_number,
    check_state,
    whole_number,
)
from absgd_jax._reduce import psum
from absgd_jax._temperature import (
    batch_divergence,
    check_temperature,
    Divergence,
    divergence_of,
)
from absgd_jax._transform import as_value, get_temperature, rescale


class AccumulateState(NamedTuple):
    """State of :func:`accumulate`.

    Attributes:
      mini_step: Number of micro-batches so far; 0 when the optimiser has just been updated.
      count: Number of examples in them.
      value: Their robust loss.
      divergence: Where ``losses`` are given: how far their weights stray from the plain mean.
      acc_grads: Its gradient, in float32 or in the dtype of the parameters if that is wider.
      inner_opt_state: State of the optimiser.
    """

    mini_step: ArrayLike  # shape=(), dtype=jnp.int32
    count: ArrayLike  # type: ignore[assignment]  # shape=(), dtype as value
    value: ArrayLike  # shape=(), dtype=jnp.float32, or jnp.float64 under jax_enable_x64
    divergence: Divergence  # three scalars, dtype as value
    acc_grads: optax.Updates
    inner_opt_state: optax.OptState


def accumulate(
    opt: optax.GradientTransformationExtraArgs, every_k: int
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates the gradients of micro-batches into exactly that of the batch they make up.

    With :math:`F_m` and :math:`G_m`, the robust loss of micro-batch m and its gradient, and
    :math:`n_m` examples in it, the optimiser is updated with

    .. math::
      F = \lambda \log \sum_m \frac{n_m}{n} e^{F_m / \lambda},
      \qquad
      G = \sum_m \frac{n_m}{n} e^{(F_m - F) / \lambda}\, G_m,
      \qquad
      n = \sum_m n_m

    in every k-th call; in the calls between, the updates are zero and the optimiser's state, the
    temperature included, stays as it is. ``optax.MultiSteps`` and ``optax.microbatch`` take the
    plain mean of :math:`G_m`, which is another gradient at every finite λ, and the former shows the
    optimiser the last micro-batch's loss. The memory is that of ``optax.MultiSteps``: one gradient,
    and a few scalars.

    Args:
      opt: The optimiser: :func:`absgd`, :func:`abadam`, or whatever chain holds one
        :func:`scale_by_attention`. ``optax.inject_hyperparams`` goes inside, around the optimiser.
      every_k: k, the number of micro-batches in a batch.

    Returns:
      A transformation whose update is ``update(updates, state, params=None, *, value, where=None,
      losses=None, axis_name=None, **extra_args)``. ``value`` is the robust loss of the micro-batch,
      and ``updates`` its gradient. ``where`` is the mask of the micro-batch or the number of
      entries that it includes, for micro-batches that differ in it: all k have one, or none has.
      ``losses`` and ``axis_name`` are as in :func:`scale_by_attention`. The optimiser gets as
      ``where`` whether any of the k includes an entry, and the other extra arguments of the last
      micro-batch.

    Raises:
      ValueError: ``every_k`` is less than 1; ``opt`` holds no attention, or several; ``value`` is
        not a scalar.
      TypeError: ``value`` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import absgd_jax
      >>> x, y = jnp.array([0.0, 1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 7.0, 3.0])
      >>> def train(opt, batches):
      ...   w = jnp.float32(0.0)
      ...   opt_state = opt.init(w)
      ...   for i in batches:
      ...     temperature = absgd_jax.get_temperature(opt_state)
      ...     def loss_fn(w):
      ...       return absgd_jax.robust_loss((x[i] * w - y[i]) ** 2, temperature)
      ...     loss, grads = jax.value_and_grad(loss_fn)(w)
      ...     updates, opt_state = opt.update(grads, opt_state, w, value=loss)
      ...     w = optax.apply_updates(w, updates)
      ...   return w
      >>> opt = absgd_jax.absgd(0.01, temperature=20.0)
      >>> whole, micro = jnp.array([0, 1, 2, 3]), [jnp.array([0, 1]), jnp.array([2, 3])]
      >>> print(f"{train(opt, 50 * [whole]):.4f}")
      1.7547
      >>> print(f"{train(absgd_jax.accumulate(opt, 2), 50 * micro):.4f}")
      1.7547
    """
    if not (hasattr(opt, "init") and hasattr(opt, "update")):
        raise TypeError(
            f"opt must be an optimiser, got {opt!r}; pass absgd, abadam, or what holds one "
            "scale_by_attention."
        )
    check_number("every_k", every_k, whole_number(1), "it is how many micro-batches make a batch")

    def init_fn(params: optax.Params) -> AccumulateState:
        return AccumulateState(
            mini_step=jnp.zeros([], jnp.int32),
            count=jnp.zeros([], float),
            value=jnp.zeros([], float),
            divergence=Divergence(*(jnp.zeros([], float) for _ in Divergence._fields)),
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
        where: ArrayLike | None = None,
        losses: ArrayLike | None = None,
        axis_name: Hashable | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        check_state(state, AccumulateState)
        dtype = state.value.dtype
        lam = get_temperature(state.inner_opt_state).astype(dtype)
        count = jnp.ones([], dtype)
        if where is not None:
            count = jnp.sum(as_array("where", where)).astype(dtype)
        count = psum(count, axis_name)
        counts = jnp.stack([state.count, count])
        parts = jnp.stack([state.value, as_value(value).astype(dtype)])
        shift, exp_z, sums = tilted_sums(parts, lam, counts)
        loss, shares = soft_extremum(shift, lam, sums), exp_z / sums.divisor
        divergence = state.divergence
        if losses is not None:
            new = batch_divergence(value, losses, lam, where, axis_name)
            within = jax.tree.map(lambda *x: jnp.stack(x).astype(dtype), divergence, new)
            divergence = divergence_of(parts, loss, lam, within.n, within)
            extra_args["divergence"] = divergence

        def add(acc: jax.Array, g: ArrayLike) -> jax.Array:
            old, new = shares[0].astype(acc.dtype), shares[1].astype(acc.dtype)
            return old * acc + new * jnp.asarray(g, acc.dtype)

        acc_grads = jax.tree.map(add, state.acc_grads, updates)
        # As in optax.MultiSteps the optimiser runs in every call, and in every k-th it counts.
        updates, inner_opt_state = opt.update(
            optax.tree.cast_like(acc_grads, updates),
            state.inner_opt_state,
            params,
            value=loss,
            where=sums.n > 0,
            **extra_args,
        )
        emit = state.mini_step == every_k - 1
        mini_step, count, loss, divergence, acc_grads = jax.tree.map(
            lambda x: jnp.where(emit, 0, x),
            (state.mini_step + 1, sums.n, loss, divergence, acc_grads),
        )
        inner_opt_state = jax.tree.map(
            lambda new, old: jnp.where(emit, new, old), inner_opt_state, state.inner_opt_state
        )
        updates = jax.tree.map(lambda u: jnp.where(emit, u, 0), updates)
        return updates, AccumulateState(
            mini_step, count, loss, divergence, acc_grads, inner_opt_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def pmerge(
    loss: ArrayLike,
    grads: optax.Updates,
    temperature: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: Hashable,
) -> tuple[jax.Array, optax.Updates]:
    r"""Robust loss and gradient of a batch from those of its parts on the devices.

    In place of ``lax.pmean(grads, axis_name)``: with :math:`F_d` and :math:`G_d`, the robust loss
    of device d's part and its gradient, and :math:`n_d` examples in it,

    .. math::
      F = \lambda \log \sum_d \frac{n_d}{n} e^{F_d / \lambda},
      \qquad
      G = \frac{\sum_d n_d\, e^{F_d / \lambda}\, G_d}{\sum_d n_d\, e^{F_d / \lambda}},
      \qquad
      n = \sum_d n_d

    Beside the collective of the gradients it takes one of a scalar, after the backward pass. With
    :func:`robust_loss` across ``axis_name`` instead, the backward pass waits for two.

    Args:
      loss: The robust loss of this device's part: no ``axis_name`` in :func:`robust_loss`.
      grads: Its gradient. In ``jax.shard_map``, whose gradients of replicated parameters arrive
        already summed, differentiate with respect to ``jax.lax.pcast(params, axis_name,
        to="varying")``, unless ``check_vma=False``.
      temperature: λ, as in :func:`robust_loss`.
      where: The mask of this device's part, for parts that differ in how many entries it includes.
      axis_name: Name, or tuple of names, of the mapped axes (``pmap``, ``shard_map``, ``vmap``)
        over which the batch is spread.

    Returns:
      The loss and its gradient, the same on all devices.

    Raises:
      ValueError: ``loss`` is not a scalar, ``grads`` are summed already, or ``temperature`` is 0,
        NaN or not a scalar.
      TypeError: ``temperature`` is not a number.
      NameError: ``axis_name`` is not the name of a mapped axis.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from absgd_jax import pmerge, robust_loss
      >>> x, y = jnp.array([0.0, 1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 7.0, 3.0])
      >>> def loss_fn(w, x, y):
      ...   return robust_loss((x * w - y) ** 2, 20.0)
      >>> def spread(x, y):
      ...   loss, grads = jax.value_and_grad(loss_fn)(2.0, x, y)
      ...   return pmerge(loss, grads, 20.0, axis_name="batch")
      >>> whole = jax.value_and_grad(loss_fn)(2.0, x, y)
      >>> print("%.5f %.5f" % whole)
      5.20068 2.21909
      >>> loss, grads = jax.vmap(spread, axis_name="batch")(x.reshape(2, 2), y.reshape(2, 2))
      >>> print(loss, grads)
      [5.2006755 5.2006755] [2.2190917 2.2190917]
    """
    check_temperature(temperature)
    part = as_scalar("loss", loss)
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    for g in jax.tree.leaves(grads):
        if summed := (_varying(part) - _varying(g)).intersection(names):
            raise ValueError(
                "grads must be those of this device's part, got their sum over "
                f"{', '.join(map(str, summed))}; differentiate with respect to "
                "jax.lax.pcast(params, axis_name, to='varying')."
            )

    # XLA would scale in the very kernels of the backward pass, which then wait for the maximum.
    part, grads = lax.optimization_barrier((part, grads))
    dtype = at_least_float32(part.dtype)
    lam = jnp.asarray(temperature, dtype)
    # Their share and not their number, by which a gradient in float16 could overflow.
    count = jnp.ones([], dtype)
    if where is not None:
        count = jnp.mean(as_array("where", where), dtype=dtype)
    shift, exp_z, sums = tilted_sums(part.astype(dtype)[None], lam, count[None], axis_name)
    # One reduction: XLA combines what does not wait for one another.
    sums, grads = lax.psum((sums, rescale(grads, exp_z[0])), axis_name)
    return soft_extremum(shift, lam, sums), rescale(grads, 1 / sums.divisor)


def _varying(x: ArrayLike) -> frozenset[Hashable]:
    """Axes of a shard_map over which x may differ; none is known of without check_vma."""
    aval = jax.typeof(x)
    # The attribute that JAX had before 0.10.
    varying: frozenset[Hashable]
    varying = aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying
    return varying
