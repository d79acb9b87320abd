"""Cross-entropies for unequal classes: by class counts, or by how hard the examples are."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from absgd_jax._checks import as_floats, check_number, NOT_NEGATIVE, POSITIVE
from absgd_jax.losses._labels import (
    canonicalize,
    counted,
    distribution,
    expected,
    zero_of_none,
)
from absgd_jax.losses._priors import check_per_class, positive_counts


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

    After training with it, the ``logits`` predict as if the classes were equally frequent.

    Args:
      logits: z, floating point, of shape ``[..., C]``.
      labels: Integers of shape ``[...]``, or distributions of shape ``[..., C]``.
      class_counts: n, the counts or frequencies of the classes in the training set, of shape
        ``[C]``. A class without examples is left out of the sum. If a label names it all the same,
        it counts as the rarest class that has some.
      tau: τ, the strength of the adjustment: 1 is balanced softmax, 0 is cross-entropy.
      where: Boolean array of shape ``[...]``: the entries that are not masked out.

    Returns:
      Losses of shape ``[...]``, in float32 or in the dtype of ``logits`` if that is wider.

    Raises:
      TypeError: ``logits`` is not floating point or ``where`` is not boolean.
      ValueError: An argument has another shape or, not being traced, is out of range.

    Examples:
      >>> from absgd_jax.losses import balanced_softmax
      >>> logits, labels = [[2.0, 1.0], [2.0, 1.0]], [0, 1]
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
    in_sum = jnp.broadcast_to(met, logits.shape) | (distribution(labels, logits) > 0)
    # Shifted first: the sum of a large logit and a small prior would lose digits of the prior.
    largest = jnp.max(logits, axis=-1, where=in_sum, initial=-jnp.inf, keepdims=True)
    logits -= lax.stop_gradient(largest)
    logits += jnp.broadcast_to(tau * jnp.log(counts), logits.shape)
    log_probs = jax.nn.log_softmax(logits, where=in_sum)
    return jnp.where(where, expected(jnp.negative, labels, log_probs), 0)


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

    This is :func:`balanced_softmax` with the class counts :math:`n` of the batch. At equal logits
    the examples of a class then attract its classifier weight just as much as the others repel it.
    In a batch of one class, losses and gradients are 0. So nothing is learnt from batches of one
    example: pass :func:`running_counts` as ``class_counts`` there.

    Args:
      logits: As in :func:`balanced_softmax`, the leading dimensions being the batch.
      labels: As in :func:`balanced_softmax`; distributions count by their probabilities.
      class_counts: n, of shape ``[C]``, in place of the counts in the batch.
      where: As in :func:`balanced_softmax`; masked entries are not counted.
      axis_name: Name, or tuple of names, of the mapped axes (``pmap``, ``shard_map``, ``vmap``)
        over which the batch is spread. Not needed under ``jit``, where arrays are global.

    Returns:
      Losses, as :func:`balanced_softmax`.

    Raises:
      TypeError, ValueError: As :func:`balanced_softmax`.
      ValueError: ``logits`` is one example, with neither ``class_counts`` nor ``axis_name``.

    Examples:
      >>> from absgd_jax.losses import arb
      >>> logits, labels = 4 * [[0.0, 0.0, 0.0]], [0, 0, 0, 1]
      >>> print(arb(logits, labels).round(2))
      [0.29 0.29 0.29 1.39]
      >>> print(arb(logits, labels, class_counts=[1, 1, 2]).round(2))
      [1.39 1.39 1.39 1.39]

    References:
      Xie et al., `Neural Collapse Inspired Attraction-Repulsion-Balanced Loss for Imbalanced
      Learning <https://arxiv.org/abs/2204.08735>`_, Neurocomputing 2023
    """
    if class_counts is None:
        z, y, kept = canonicalize(logits, labels, where)
        if z.ndim == 1 and axis_name is None:
            raise ValueError(
                f"logits must hold a batch to count the classes in, got shape {z.shape}; "
                "pass class_counts or, under vmap, axis_name."
            )
        class_counts = counted(z, y, kept, axis_name)
    return balanced_softmax(logits, labels, class_counts=class_counts, where=where)


def ldam(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    class_counts: ArrayLike,
    max_margin: float | jax.Array = 0.5,
    scale: float | jax.Array = 30.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Label-distribution-aware margin loss: LDAM.

    .. math::
      l = -\log \frac{e^{s (z_y - \Delta_y)}}{e^{s (z_y - \Delta_y)} + \sum_{k \ne y} e^{s z_k}},
      \qquad
      \Delta_c = \Delta_{\max} \left( \frac{\min_k n_k}{n_c} \right)^{1/4}

    The margins are a fraction of the cosines that :func:`normalized_logits` gives. On unbounded
    logits they mean little, and the scale multiplies the gradients.

    Args:
      logits: z, cosines, floating point, of shape ``[..., C]``.
      labels: Integers of shape ``[...]``; a distribution has no margin.
      class_counts: n, the counts or frequencies of the classes in the training set, of shape
        ``[C]``. A class without examples has the margin of the rarest class that has some.
      max_margin: Δmax, the margin of the rarest class.
      scale: s, the inverse temperature of the softmax.
      where: As in :func:`balanced_softmax`.

    Returns:
      Losses, as :func:`balanced_softmax`.

    Raises:
      TypeError, ValueError: As :func:`balanced_softmax`.

    Examples:
      >>> from absgd_jax.losses import ldam, normalized_logits
      >>> logits = normalized_logits([[3.0, 4.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
      >>> print(ldam(logits, [1, 1], class_counts=[1600, 100]).round(2))
      [9. 0.]

    References:
      Cao et al., `Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss
      <https://arxiv.org/abs/1906.07413>`_, NeurIPS 2019
    """
    logits, labels, where = canonicalize(logits, labels, where, distributions=False)
    check_number("max_margin", max_margin, NOT_NEGATIVE)
    check_number("scale", scale, POSITIVE)
    counts, _ = positive_counts(class_counts, logits)
    margins = max_margin * (jnp.min(counts) / counts) ** 0.25
    logits -= distribution(labels, logits) * jnp.broadcast_to(margins, logits.shape)
    log_probs = jax.nn.log_softmax(scale * logits)
    return jnp.where(where, expected(jnp.negative, labels, log_probs), 0)


def normalized_logits(features: ArrayLike, kernel: ArrayLike) -> jax.Array:
    r"""Classifier head whose logits are the cosines between features and class weights.

    .. math::
      z_c = \frac{x \cdot w_c}{\lVert x \rVert \, \lVert w_c \rVert}

    The cosine with a zero vector is 0. Its gradient is that of the product without normalisation,
    which is finite, so that a kernel can start at zero.

    Args:
      features: x, floating point, of shape ``[..., D]``.
      kernel: w, floating point, of shape ``[D, C]``; there is no bias.

    Returns:
      Logits of shape ``[..., C]`` in [-1, 1], in float32 or wider.

    Raises:
      TypeError: An argument is not floating point.
      ValueError: An argument has another shape.

    Examples:
      >>> from absgd_jax.losses import normalized_logits
      >>> print(normalized_logits([[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]))
      [[0.6 0.8]
       [0.  0. ]]
    """
    features, kernel = as_floats("features", features), as_floats("kernel", kernel)
    if features.ndim == 0 or kernel.ndim != 2 or features.shape[-1] != kernel.shape[0]:
        got = f"{features.shape} and {kernel.shape}"
        raise ValueError(f"features must have shape [..., D] and kernel [D, C], got {got}.")
    return _normalize(features, axis=-1) @ _normalize(kernel, axis=0)


def _normalize(x: jax.Array, axis: int) -> jax.Array:
    # By about the largest first, which has no part in the result: squares leave the range of
    # floats. A product, as XLA makes one division of two, by what leaves that range, too; of at
    # most a quarter of 1 / tiny, as the inverse has to be a normal number.
    tiny = float(np.finfo(x.dtype).tiny)
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, initial=0, keepdims=True))
    x = x * (1 / jnp.where(largest > 0, jnp.clip(largest, tiny, 0.25 / tiny), 1))
    squares = jnp.sum(x * x, axis=axis, keepdims=True)
    # The root has an infinite derivative at 0, so it must not see a 0.
    return x / jnp.sqrt(jnp.where(squares > 0, squares, 1))


def focal(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: float | jax.Array = 2.0,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Focal loss over a softmax: cross-entropy with little weight on well-classified examples.

    .. math::
      l = -\alpha_y (1 - p_y)^\gamma \log p_y, \qquad p = \mathrm{softmax}(z)

    The focal loss over sigmoids is ``optax.losses.sigmoid_focal_loss``.

    Args:
      gamma: γ, not negative; 0 is cross-entropy.
      alpha: α, the weights of the classes, of shape ``[C]``; ones if ``None``.
      logits, labels, where: As in :func:`balanced_softmax`.

    Returns:
      Losses, as :func:`balanced_softmax`.

    Raises:
      TypeError, ValueError: As :func:`balanced_softmax`.

    Examples:
      >>> from absgd_jax.losses import focal
      >>> logits, labels = [[1.0, 0.0], [1.0, 0.0]], [0, 1]
      >>> print(focal(logits, labels, gamma=0.0).round(2))
      [0.31 1.31]
      >>> print(focal(logits, labels).round(2))
      [0.02 0.7 ]

    References:
      Lin et al., `Focal Loss for Dense Object Detection
      <https://arxiv.org/abs/1708.02002>`_, ICCV 2017
    """
    logits, labels, where = canonicalize(logits, labels, where)
    check_number("gamma", gamma, NOT_NEGATIVE, "0 is cross-entropy")
    if alpha is None:
        alpha = jnp.ones(logits.shape[-1:], logits.dtype)
    check_per_class("alpha", alpha, logits)

    def loss(log_p: jax.Array, alpha: jax.Array) -> jax.Array:
        log_p = zero_of_none(alpha, log_p)
        # The power must not see p = 1, where its derivative is infinite if gamma < 1, nor p = 0,
        # where its part in the gradient is p log p.
        inside = (log_p < 0) & (log_p > -jnp.inf)
        power = (-jnp.expm1(jnp.where(inside, log_p, -1))) ** gamma
        return alpha * jnp.where(inside, power, jnp.where(log_p < 0, 1, 0)) * -log_p

    alpha = jnp.broadcast_to(jnp.asarray(alpha, logits.dtype), logits.shape)
    losses = expected(loss, labels, jax.nn.log_softmax(logits), alpha)
    return jnp.where(where, losses, 0)
