"""Cross-entropies that are balanced by the class counts, of the training set or of the batch."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from absgd_jax._checks import check_number, NOT_NEGATIVE
from absgd_jax._reduce import psum
from absgd_jax.losses._labels import canonicalize, distribution, expected
from absgd_jax.losses._priors import positive_counts


def balanced_softmax(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_counts: ArrayLike,
    tau: float | jax.Array = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Balanced softmax, or logit adjustment: cross-entropy of logits shifted by the class prior.

    .. math::
      l = -\log \frac{n_y^\tau e^{z_y}}{\sum_k n_k^\tau e^{z_k}}

    Trained with it, ``logits`` themselves predict as if the classes were equally frequent.

    Args:
      logits: z, floating point, of shape ``[..., C]``.
      labels: Integers of shape ``[...]``, or distributions of shape ``[..., C]``.
      class_counts: n, the counts or frequencies of the classes in the training set, of shape
        ``[C]``. A class with none leaves the sum; but where the label names it, it counts as the
        rarest class that has some.
      tau: τ, the strength of the adjustment: 1 is balanced softmax, 0 is cross-entropy.
      where: Boolean array of shape ``[...]``: the entries that are not masked out.

    Returns:
      Losses of shape ``[...]``, in float32 or in the dtype of ``logits`` if that is wider.

    Raises:
      TypeError: ``logits`` is not floating point or ``where`` is not boolean.
      ValueError: An argument has another shape or, not being traced, is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax.losses import balanced_softmax
      >>> logits, labels = jnp.array([[2.0, 1.0], [2.0, 1.0]]), jnp.array([0, 1])
      >>> print(balanced_softmax(logits, labels, class_counts=[90, 10]).round(2))
      [0.04 3.24]

    References:
      Ren et al., `Balanced Meta-Softmax for Long-Tailed Visual Recognition
      <https://arxiv.org/abs/2007.10740>`_, NeurIPS 2020

      Menon et al., `Long-tail learning via logit adjustment
      <https://arxiv.org/abs/2007.07314>`_, ICLR 2021
    """
    logits, labels, where = canonicalize(logits, labels, where)
    check_number("tau", tau, NOT_NEGATIVE, "1 is balanced softmax")
    counts, met = positive_counts(class_counts, logits)
    return _balanced(logits, labels, where, tau * jnp.log(counts), met)


def arb(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_counts: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    r"""Attraction-repulsion-balanced loss: ARB-Loss.

    .. math::
      l = -\log \frac{e^{z_y}}{\sum_k \frac{n_k}{n_y} e^{z_k}}

    where :math:`n_k` is the count of class :math:`k` in the batch. At equal logits the examples of
    a class then attract its classifier weight just as much as the other examples repel it. It is
    :func:`balanced_softmax` with the batch's counts for those of the training set.

    Args:
      logits: z, floating point, of shape ``[..., C]``, the leading dimensions being the batch.
      labels: Integers of shape ``[...]``, or distributions of shape ``[..., C]``, which count by
        their probabilities.
      class_counts: n, of shape ``[C]``, in place of the counts in the batch.
      where: Boolean array of shape ``[...]``: the entries that are not masked out. The others do
        not count.
      axis_name: Name, or tuple of names, of the mapped axes (``pmap``, ``shard_map``, ``vmap``)
        over which the batch is spread. Not needed under ``jit``, where arrays are global.

    Returns:
      Losses of shape ``[...]``, in float32 or in the dtype of ``logits`` if that is wider.

    Raises:
      TypeError, ValueError: As :func:`balanced_softmax`.
      ValueError: ``logits`` is one example, with neither ``class_counts`` nor ``axis_name``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax.losses import arb
      >>> logits, labels = jnp.zeros([4, 3]), jnp.array([0, 0, 0, 1])
      >>> print(arb(logits, labels).round(2))
      [0.29 0.29 0.29 1.39]
      >>> print(arb(logits, labels, class_counts=[1, 1, 2]).round(2))
      [1.39 1.39 1.39 1.39]

    References:
      Xie et al., `Neural Collapse Inspired Attraction-Repulsion-Balanced Loss for Imbalanced
      Learning <https://arxiv.org/abs/2204.08735>`_, Neurocomputing 2023
    """
    logits, labels, where = canonicalize(logits, labels, where)
    if class_counts is None:
        if logits.ndim == 1 and axis_name is None:
            raise ValueError(
                f"logits must hold a batch to count the classes in, got shape {logits.shape}; "
                "pass class_counts or, under vmap, axis_name."
            )
        weights = jnp.where(where[..., None], distribution(labels, logits), 0)
        class_counts = psum(jnp.sum(weights, axis=tuple(range(where.ndim))), axis_name)
    counts, met = positive_counts(class_counts, logits)
    return _balanced(logits, labels, where, jnp.log(counts), met)


def _balanced(
    logits: jax.Array, labels: jax.Array, where: jax.Array, log_prior: jax.Array, met: jax.Array
) -> jax.Array:
    in_sum = jnp.broadcast_to(met, logits.shape) | (distribution(labels, logits) > 0)
    # Shifted first: the sum of a large logit and a small prior would lose digits of the prior.
    logits -= lax.stop_gradient(
        jnp.max(logits, axis=-1, where=in_sum, initial=-jnp.inf, keepdims=True)
    )
    logits += jnp.broadcast_to(log_prior, logits.shape)
    log_probs = jax.nn.log_softmax(logits, where=in_sum)
    log_probs = jnp.where(in_sum, log_probs, 0)  # -inf times its probability, 0, would be NaN
    return jnp.where(where, expected(jnp.negative, labels, log_probs), 0)
