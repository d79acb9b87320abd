"""Labels of either kind, integers or distributions: checks, and the loss at a label."""

from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from absgd_jax._checks import as_floats, as_given, as_mask, is_concrete
from absgd_jax._reduce import psum


def canonicalize(
    logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None, *, distributions: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checked logits in float32 or wider, labels, and mask; what is masked out is set to zero."""
    logits = as_floats("logits", logits)
    if logits.ndim == 0:
        raise ValueError("logits must have shape [..., C], got a scalar.")
    shape, num_classes = logits.shape[:-1], logits.shape[-1]
    mask = jnp.ones(shape, bool) if where is None else as_mask(where, shape)

    labels = as_given("labels", labels)
    integer = is_integer(labels)
    soft = distributions and jnp.issubdtype(labels.dtype, jnp.floating)
    if not ((integer and labels.shape == shape) or (soft and labels.shape == logits.shape)):
        kinds = f"integers of shape {shape}"
        if distributions:
            kinds += f" or floats of shape {logits.shape}, distributions over the classes"
        raise ValueError(f"labels must be {kinds}, got {labels.dtype} {labels.shape}.")
    check_range("labels", labels, where, num_classes - 1 if integer else 1)

    # Zeros in place of what is masked out: 0 * NaN would be NaN in the gradient.
    logits = jnp.where(mask[..., None], logits, 0)
    if integer:
        labels = jnp.asarray(labels).astype(jnp.int32)
        labels = jnp.where(labels < 0, num_classes, labels)  # out of range, not the last class
        return logits, jnp.where(mask, labels, 0), mask
    return logits, jnp.where(mask[..., None], jnp.asarray(labels, logits.dtype), 0), mask


def check_range(name: str, x: jax.Array | np.ndarray, where: ArrayLike | None, high: int) -> None:
    """Raises where ``x``, the argument of that name, is concrete and not in [0, high]."""
    if isinstance(x, np.ndarray) and is_concrete(where):
        kept = x if where is None else x[np.asarray(where)]
        wrong = kept[~((kept >= 0) & (kept <= high))]
        if wrong.size:
            raise ValueError(
                f"{name} must lie in [0, {high}], got {wrong[0]}; mask out examples that have "
                "none with `where`."
            )


def is_integer(labels: jax.Array | np.ndarray) -> bool:
    return jnp.issubdtype(labels.dtype, jnp.integer)


def distribution(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Labels as distributions, of the shape and dtype of the logits."""
    if is_integer(labels):
        return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return labels


def counted(
    logits: jax.Array, labels: jax.Array, mask: jax.Array, axis_name: Hashable | None
) -> jax.Array:
    """Counts of the classes, of shape [C], over all devices."""
    of_class = jnp.where(mask[..., None], distribution(labels, logits), 0)
    return psum(jnp.sum(of_class, axis=tuple(range(mask.ndim))), axis_name)


def expected(loss: Callable[..., jax.Array], labels: jax.Array, *per_class: jax.Array) -> jax.Array:
    """Mean of ``loss(*per_class)`` over the classes that the labels give, [..., C] -> [...]."""
    if is_integer(labels):
        label = labels[..., None]
        return loss(*(jnp.take_along_axis(x, label, axis=-1) for x in per_class))[..., 0]
    return jnp.sum(labels * loss(*(zero_of_none(labels, x) for x in per_class)), axis=-1)


def zero_of_none(share: ArrayLike, x: jax.Array) -> jax.Array:
    """``x``, but 0 where it is infinite and its share is 0: there share * x would be NaN."""
    return jnp.where(jnp.equal(share, 0) & jnp.isinf(x), 0, x)
