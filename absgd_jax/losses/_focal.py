"""The focal loss over a softmax; optax has the one over sigmoids."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from absgd_jax._checks import check_number, NOT_NEGATIVE
from absgd_jax.losses._labels import canonicalize, expected
from absgd_jax.losses._priors import check_per_class


def focal(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: float | jax.Array = 2.0,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Focal loss over a softmax: cross-entropy that cares little for what is already right.

    .. math::
      l = -\alpha_y (1 - p_y)^\gamma \log p_y, \qquad p = \mathrm{softmax}(z)

    Args:
      logits: z, floating point, of shape ``[..., C]``.
      labels: Integers of shape ``[...]``, or distributions of shape ``[..., C]``.
      gamma: γ, not negative; 0 is cross-entropy.
      alpha: α, the weights of the classes, of shape ``[C]``; ones if ``None``.
      where: Boolean array of shape ``[...]``: the entries that are not masked out.

    Returns:
      Losses of shape ``[...]``, in float32 or in the dtype of ``logits`` if that is wider.

    Raises:
      TypeError, ValueError: As :func:`balanced_softmax`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax.losses import focal
      >>> logits, labels = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1])
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
        # At p = 1 and gamma < 1 the power has an infinite derivative, so it must not see a 0.
        certain = log_p >= 0
        log_p = jnp.where(certain, -1, log_p)
        return jnp.where(certain, 0, alpha * (-jnp.expm1(log_p)) ** gamma * -log_p)

    alpha = jnp.broadcast_to(jnp.asarray(alpha, logits.dtype), logits.shape)
    losses = expected(loss, labels, jax.nn.log_softmax(logits), alpha)
    return jnp.where(where, losses, 0)
