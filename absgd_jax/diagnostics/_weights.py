"""Functions of a batch's weights."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from absgd_jax._attention import tilt
from absgd_jax._checks import as_array, as_losses, as_mask, check_number, whole_number
from absgd_jax._reduce import psum
from absgd_jax._temperature import check_temperature, is_flat


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
      >>> import jax.numpy as jnp
      >>> from absgd_jax.diagnostics import effective_sample_size
      >>> print(effective_sample_size(jnp.array([0.5, 0.5, 0.0, 0.0])))
      0.5
    """
    shares, n = _shares(weights, where, axis_name)
    squares = psum(jnp.sum(jnp.square(shares)), axis_name)
    return jnp.where(squares > 0, 1 / (n * jnp.where(squares > 0, squares, 1)), 0)


def largest_weight(
    weights: ArrayLike, *, where: ArrayLike | None = None, axis_name: Hashable | None = None
) -> jax.Array:
    """The largest weight of a batch, as a share of them all.

    Args:
      weights: As in :func:`effective_sample_size`.
      where: As in :func:`effective_sample_size`.
      axis_name: As in :func:`effective_sample_size`.

    Returns:
      A scalar, in float32 or in the dtype of ``weights`` if that is wider.

    Raises:
      TypeError, ValueError: As :func:`effective_sample_size`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax.diagnostics import largest_weight
      >>> print(largest_weight(jnp.array([1.0, 3.0])))
      0.75
    """
    shares, _ = _shares(weights, where, axis_name)
    largest = jnp.max(shares, initial=0)
    return largest if axis_name is None else lax.pmax(largest, axis_name)


def kl_divergence(
    weights: ArrayLike, *, where: ArrayLike | None = None, axis_name: Hashable | None = None
) -> jax.Array:
    r"""Divergence of a batch's weights from the plain mean, in nats.

    .. math::
      \mathrm{KL} = \sum_i w_i \log(n w_i), \qquad \sum_i w_i = 1

    Their entropy is :math:`\log n - \mathrm{KL}`.

    Args:
      weights: As in :func:`effective_sample_size`.
      where: As in :func:`effective_sample_size`.
      axis_name: As in :func:`effective_sample_size`.

    Returns:
      A scalar in [0, log n], in float32 or in the dtype of ``weights`` if that is wider.

    Raises:
      TypeError, ValueError: As :func:`effective_sample_size`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax.diagnostics import kl_divergence
      >>> print(f"{kl_divergence(jnp.array([0.5, 0.5, 0.0, 0.0])):.4f}")
      0.6931
    """
    shares, n = _shares(weights, where, axis_name)
    # Σ w = 1, and the sum of what is never negative stays so in floating point.
    terms = jax.scipy.special.kl_div(n * shares, jnp.ones_like(shares))
    total = jnp.sum(terms, where=where)
    return psum(total, axis_name) / jnp.maximum(n, 1)


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
      weights: As in :func:`effective_sample_size`.
      labels: Classes in [0, ``num_classes``), integers of the shape of ``weights``; others count
        for none. Or any groups, such as ``is_noisy.astype(int)`` where the wrong labels are known.
      num_classes: Their number.
      where: As in :func:`effective_sample_size`.
      axis_name: As in :func:`effective_sample_size`.

    Returns:
      Shares of shape ``[num_classes]``, in float32 or in the dtype of ``weights`` if that is wider.

    Raises:
      TypeError: As :func:`effective_sample_size`, or ``labels`` are not integers.
      ValueError: As :func:`effective_sample_size`; ``labels`` have another shape; or
        ``num_classes`` is less than 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax.diagnostics import class_mass
      >>> print(class_mass(jnp.array([1.0, 1.0, 2.0]), jnp.array([0, 0, 1]), num_classes=3))
      [0.5 0.5 0. ]
    """
    check_number("num_classes", num_classes, whole_number(1))
    shares, _ = _shares(weights, where, axis_name)
    labels = as_array("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}.")
    if labels.shape != shares.shape:
        raise ValueError(
            f"labels must have the shape of weights, {shares.shape}, got {labels.shape}."
        )
    # One-hot, since a scatter does not work over a sharded axis.
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=shares.dtype)
    mass = jnp.sum(one_hot * shares[..., None], axis=tuple(range(shares.ndim)))
    return psum(mass, axis_name)


def summary(
    losses: ArrayLike,
    temperature: ArrayLike,
    *,
    baseline: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    num_classes: int | None = None,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> dict[str, jax.Array]:
    r"""All of it as a flat dictionary of scalars, for any logger.

    Args:
      losses: Per-example losses, as in :func:`absgd_jax.robust_loss`.
      temperature: λ that they are weighted by, ``get_temperature(opt_state)``.
      baseline: V of the state, ``optax.tree.get(opt_state, "baseline")``.
      labels: As in :func:`class_mass`.
      num_classes: As in :func:`class_mass`.
      where: As in :func:`effective_sample_size`.
      axis_name: As in :func:`effective_sample_size`.

    Returns:
      ``mean_loss``; ``robust_loss``, F; ``temperature``, λ; ``effective_sample_size``,
      ``largest_weight`` and ``kl_divergence`` of the weights. With ``baseline``,
      ``log_normalizer``, :math:`\log(u / \alpha) = V / \lambda`, and ``log_normalizer_drift``,
      :math:`(F - V) / \lambda`: how far the batch stands above the moving average, both 0 while λ
      or V is infinite. With ``labels``, ``class_mass/0``, ``class_mass/1``, ...

    Raises:
      TypeError, ValueError: As :func:`absgd_jax.robust_loss` and :func:`class_mass`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import diagnostics
      >>> losses, labels = jnp.array([0.1, 0.2, 3.0]), jnp.array([0, 0, 1])
      >>> for name, x in diagnostics.summary(losses, 1.0, labels=labels, num_classes=2).items():
      ...   print(f"{name} {x:.3f}")
      mean_loss 1.100
      robust_loss 2.011
      temperature 1.000
      effective_sample_size 0.412
      largest_weight 0.896
      kl_divergence 0.693
      class_mass/0 0.104
      class_mass/1 0.896
    """
    check_temperature(temperature)
    losses = as_losses(losses)
    loss, weights, n = tilt(losses, temperature, where, axis_name)
    if where is not None:
        losses = jnp.where(where, losses, 0)
    lam = jnp.asarray(temperature, losses.dtype)
    scalars = {
        "mean_loss": psum(jnp.sum(losses), axis_name) / jnp.maximum(n, 1),
        "robust_loss": loss,
        "temperature": lam,
        "effective_sample_size": effective_sample_size(weights, where=where, axis_name=axis_name),
        "largest_weight": largest_weight(weights, where=where, axis_name=axis_name),
        "kl_divergence": kl_divergence(weights, where=where, axis_name=axis_name),
    }
    if baseline is not None:
        baseline = as_array("baseline", baseline).astype(losses.dtype)
        if baseline.shape != ():
            raise ValueError(f"baseline must be a scalar, got shape {baseline.shape}.")
        weighted = jnp.isfinite(baseline) & ~is_flat(lam)
        for name, x in (("", baseline), ("_drift", loss - baseline)):
            scalars[f"log_normalizer{name}"] = jnp.where(weighted, x, 0) / jnp.where(
                weighted, lam, 1
            )
    if labels is not None:
        if num_classes is None:
            raise TypeError("num_classes is missing; labels alone do not tell how many there are.")
        mass = class_mass(weights, labels, num_classes, where=where, axis_name=axis_name)
        scalars |= {f"class_mass/{i}": share for i, share in enumerate(mass)}
    return scalars


def _shares(
    weights: ArrayLike, where: ArrayLike | None, axis_name: Hashable | None
) -> tuple[jax.Array, jax.Array]:
    """The weights, normalised to a sum of 1, and their number; 0 where masked out."""
    weights = as_losses(weights, name="weights")
    n = jnp.asarray(weights.size, weights.dtype)
    if where is not None:
        where = as_mask(where, weights.shape, of="weights")
        weights, n = jnp.where(where, weights, 0), jnp.sum(where, dtype=weights.dtype)
    total, n = psum((jnp.sum(weights), n), axis_name)
    return weights / jnp.where(total > 0, total, 1), n
