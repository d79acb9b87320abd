"""The label-distribution-aware margin loss, and the classifier head that it is made for."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from absgd_jax._checks import (
    as_array,
    at_least_float32,
    check_number,
    NOT_NEGATIVE,
    POSITIVE,
)
from absgd_jax.losses._labels import canonicalize, distribution, expected
from absgd_jax.losses._priors import positive_counts


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
        ``[C]``. A class with none has the margin of the rarest class that has some.
      max_margin: Δmax, the margin of the rarest class.
      scale: s, the inverse temperature of the softmax.
      where: Boolean array of shape ``[...]``: the entries that are not masked out.

    Returns:
      Losses of shape ``[...]``, in float32 or in the dtype of ``logits`` if that is wider.

    Raises:
      TypeError, ValueError: As :func:`balanced_softmax`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax.losses import ldam, normalized_logits
      >>> features, kernel = jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.eye(2)
      >>> logits = normalized_logits(features, kernel)
      >>> print(ldam(logits, jnp.array([1, 1]), class_counts=[1600, 100]).round(2))
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

    The cosine with a zero vector is 0, and its gradient that of an unnormalised product: finite, so
    that a kernel that starts at zero can leave it.

    Args:
      features: x, floating point, of shape ``[..., D]``.
      kernel: w, floating point, of shape ``[D, C]``; there is no bias.

    Returns:
      Logits of shape ``[..., C]`` in [-1, 1], in float32 or wider.

    Raises:
      TypeError: An argument is not floating point.
      ValueError: An argument has another shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax.losses import normalized_logits
      >>> print(normalized_logits(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.eye(2)))
      [[0.6 0.8]
       [0.  0. ]]
    """
    features, kernel = as_array("features", features), as_array("kernel", kernel)
    for name, x in (("features", features), ("kernel", kernel)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {x.dtype}; cast them.")
    if features.ndim == 0 or kernel.ndim != 2 or features.shape[-1] != kernel.shape[0]:
        raise ValueError(
            "features must have shape [..., D] and kernel [D, C], got "
            f"{features.shape} and {kernel.shape}."
        )
    return _normalize(features, axis=-1) @ _normalize(kernel, axis=0)


def _normalize(x: jax.Array, axis: int) -> jax.Array:
    x = x.astype(at_least_float32(x.dtype))
    squares = jnp.sum(x * x, axis=axis, keepdims=True)
    # The root has an infinite derivative at 0, so it must not see a 0.
    return x / jnp.sqrt(jnp.where(squares > 0, squares, 1))
