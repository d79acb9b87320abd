"""Functions of a batch's weights."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from absgd_jax._checks import as_array, as_batch, as_mask, check_number, whole_number
from absgd_jax._reduce import psum
from absgd_jax._state import attention_of, is_infinite
from absgd_jax._sums import divergences
from absgd_jax._tilt import temperature_and_baseline, tilted_means


def effective_sample_size(
    weights: ArrayLike, *, where: ArrayLike | None = None, axis_name: Hashable | None = None
) -> jax.Array:
    r"""Effective sample size of a batch, as a share of it.

    .. math::
      \mathrm{ESS} = \frac{(\sum_i w_i)^2}{n \sum_i w_i^2}

    It is 1 where all weights are equal and 1/n where one example has them all.

    Args:
      weights: Non-negative weights, floating point, of any shape but ``()``.
      where: Boolean array of their shape: the entries to include. All, if ``None``.
      axis_name: Name, or tuple of names, of the mapped axes that the batch is spread over.

    Returns:
      A scalar, in float32 or in the dtype of ``weights`` if that is wider.

    Raises:
      TypeError: ``weights`` is not floating point, or ``where`` is not boolean.
      ValueError: ``weights`` is a scalar, or ``where`` has another shape.

    Examples:
      >>> from absgd_jax.diagnostics import effective_sample_size
      >>> print(effective_sample_size([0.5, 0.5, 0.0, 0.0]))
      0.5
    """
    (chi2, _), n = _divergences(weights, where, axis_name)
    return jnp.where(n > 0, 1 / (1 + chi2), 0)


def largest_weight(
    weights: ArrayLike, *, where: ArrayLike | None = None, axis_name: Hashable | None = None
) -> jax.Array:
    """The largest weight of a batch, as a share of them all.

    Args:
      weights, where, axis_name: As in :func:`effective_sample_size`.

    Returns:
      A scalar, in float32 or in the dtype of ``weights`` if that is wider.

    Raises:
      TypeError, ValueError: As :func:`effective_sample_size`.

    Examples:
      >>> from absgd_jax.diagnostics import largest_weight
      >>> print(largest_weight([1.0, 3.0]))
      0.75
    """
    shares, _ = _shares(weights, where, axis_name)
    largest = jnp.max(shares, initial=0)
    return largest if axis_name is None else lax.pmax(largest, axis_name)


def kl_divergence(
    weights: ArrayLike, *, where: ArrayLike | None = None, axis_name: Hashable | None = None
) -> jax.Array:
    r"""KL divergence of a batch's weights from equal ones, in nats.

    .. math::
      \mathrm{KL} = \sum_i w_i \log(n w_i), \qquad \sum_i w_i = 1

    Their entropy is :math:`\log n - \mathrm{KL}`.

    Args:
      weights, where, axis_name: As in :func:`effective_sample_size`.

    Returns:
      A scalar in [0, log n], in float32 or in the dtype of ``weights`` if that is wider.

    Raises:
      TypeError, ValueError: As :func:`effective_sample_size`.

    Examples:
      >>> from absgd_jax.diagnostics import kl_divergence
      >>> print(f"{kl_divergence([0.5, 0.5, 0.0, 0.0]):.4f}")
      0.6931
    """
    (_, kl), _ = _divergences(weights, where, axis_name)
    return kl


def class_mass(
    weights: ArrayLike,
    labels: ArrayLike,
    num_classes: int,
    *,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """The share of a batch's weights that each class has.

    Args:
      labels: Classes in [0, ``num_classes``), integers of the shape of ``weights``; other values
        belong to no class. Any groups will do, such as ``is_noisy.astype(int)`` if the wrong labels
        are known.
      num_classes: Their number.
      weights, where, axis_name: As in :func:`effective_sample_size`.

    Returns:
      Shares of shape ``[num_classes]``, in float32 or in the dtype of ``weights`` if that is wider.

    Raises:
      TypeError: As :func:`effective_sample_size`, or ``labels`` are not integers.
      ValueError: As :func:`effective_sample_size`; ``labels`` have another shape; or
        ``num_classes`` is less than 1.

    Examples:
      >>> from absgd_jax.diagnostics import class_mass
      >>> print(class_mass([1.0, 1.0, 2.0], [0, 0, 1], num_classes=3))
      [0.5 0.5 0. ]
    """
    check_number("num_classes", num_classes, whole_number(1))
    shares, _ = _shares(weights, where, axis_name)
    labels = as_array("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}.")
    if labels.shape != shares.shape:
        wanted = f"the shape of weights, {shares.shape}"
        raise ValueError(f"labels must have {wanted}, got {labels.shape}.")
    # One-hot, since a scatter does not work over a sharded axis; and by int32, as uint8 would bring
    # class 256 back to 0.
    one_hot = jax.nn.one_hot(labels.astype(jnp.int32), num_classes, dtype=shares.dtype)
    mass = jnp.sum(one_hot * shares[..., None], axis=tuple(range(shares.ndim)))
    return psum(mass, axis_name)


def summary(
    losses: ArrayLike,
    opt_state: optax.OptState,
    *,
    labels: ArrayLike | None = None,
    num_classes: int | None = None,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> dict[str, jax.Array]:
    r"""All diagnostics of a batch, as a flat dictionary of scalars for any logger.

    Args:
      losses: Per-example losses before :func:`absgd_jax.tilt`, as in
        :func:`absgd_jax.robust_loss`.
      opt_state: The state that they are tilted with, as in :func:`absgd_jax.tilt`.
      labels, num_classes, where, axis_name: As in :func:`class_mass`.

    Returns:
      ``mean_loss``; ``robust_loss``, F; ``temperature``, λ; ``effective_sample_size``,
      ``largest_weight`` and ``kl_divergence`` of the weights; ``log_normalizer``,
      :math:`\log(u / \alpha) = V / \lambda`; and ``log_normalizer_drift``,
      :math:`(F - V) / \lambda`, which says how far the batch stands above the moving average. The
      last two are 0 while there is no average, or λ is infinite. With ``labels`` also
      ``class_mass/0``, ``class_mass/1``, ...

    Raises:
      TypeError, ValueError: As :func:`absgd_jax.robust_loss`, :func:`absgd_jax.tilt` and
        :func:`class_mass`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import absgd, diagnostics
      >>> opt_state = absgd(0.1, temperature=1.0).init(jnp.zeros(3))
      >>> losses, labels = jnp.array([0.1, 0.2, 3.0]), jnp.array([0, 0, 1])
      >>> scalars = diagnostics.summary(losses, opt_state, labels=labels, num_classes=2)
      >>> for name, scalar in scalars.items():
      ...   print(f"{name} {scalar:.3f}")
      mean_loss 1.100
      robust_loss 2.011
      temperature 1.000
      effective_sample_size 0.412
      largest_weight 0.896
      kl_divergence 0.693
      log_normalizer 0.000
      log_normalizer_drift 0.000
      class_mass/0 0.104
      class_mass/1 0.896
    """
    state = attention_of(opt_state)
    losses = as_batch("losses", losses)
    if where is not None:
        where = as_mask(where, losses.shape)
    lam, baseline = temperature_and_baseline(state, losses.dtype)
    plain = is_infinite(lam)
    batch = tilted_means(losses, lam, where, axis_name)
    weights = jnp.where(plain, 1, jnp.exp(batch.z))
    weighted = (jnp.asarray(state.averaged) != 0) & ~plain
    scalars = {
        "mean_loss": batch.mean,
        "robust_loss": batch.robust,
        "temperature": lam,
        "effective_sample_size": effective_sample_size(weights, where=where, axis_name=axis_name),
        "largest_weight": largest_weight(weights, where=where, axis_name=axis_name),
        "kl_divergence": kl_divergence(weights, where=where, axis_name=axis_name),
        "log_normalizer": jnp.where(weighted, baseline / lam, 0),
        "log_normalizer_drift": jnp.where(weighted, (batch.robust - baseline) / lam, 0),
    }
    if labels is not None:
        if num_classes is None:
            raise TypeError("num_classes is missing; labels alone do not tell how many there are.")
        mass = class_mass(weights, labels, num_classes, where=where, axis_name=axis_name)
        scalars |= {f"class_mass/{i}": share for i, share in enumerate(mass)}
    return scalars


def _divergences(
    weights: ArrayLike, where: ArrayLike | None, axis_name: Hashable | None
) -> tuple[list[jax.Array], jax.Array]:
    """χ² and KL of the weights, and their number."""
    shares, n = _shares(weights, where, axis_name)
    z = jnp.log(jnp.maximum(n * shares, float(np.finfo(shares.dtype).tiny)))
    sums = psum([jnp.sum(x, where=where) for x in divergences(z, jnp.expm1(z))], axis_name)
    return [jnp.where(n > 0, x, 0) / jnp.maximum(n, 1) for x in sums], n


def _shares(
    weights: ArrayLike, where: ArrayLike | None, axis_name: Hashable | None
) -> tuple[jax.Array, jax.Array]:
    """The weights, normalised to a sum of 1, and their number; 0 where masked out.

    The number is 0 if all weights are, which have no sum of 1 then.
    """
    weights = as_batch("weights", weights)
    n = jnp.asarray(weights.size, weights.dtype)
    if where is not None:
        where = as_mask(where, weights.shape, of="weights")
        weights, n = jnp.where(where, weights, 0), jnp.sum(where, dtype=weights.dtype)
    # By about the largest first: their sum may leave the range of floats, and so may the inverse of
    # the largest, by which XLA multiplies.
    info = np.finfo(weights.dtype)
    tiny, eps = float(info.tiny), float(info.eps)
    largest = lax.stop_gradient(jnp.max(weights, initial=0))
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    unit = jnp.clip(largest, tiny, 1 / tiny)
    # XLA may take denormal numbers for 0; they are their bits, as an integer, times eps * tiny.
    bits = lax.bitcast_convert_type(weights, f"int{info.bits}")
    denormal = bits.astype(weights.dtype) * (eps * (tiny / unit))
    weights = jnp.where((bits > 0) & (weights < tiny), denormal, weights / unit)
    total, n = psum((jnp.sum(weights), n), axis_name)
    return weights / jnp.where(total > 0, total, 1), jnp.where(total == 0, 0, n)
