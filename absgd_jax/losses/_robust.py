"""Cross-entropies that wrong labels can't dominate."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from absgd_jax._checks import (
    as_floats,
    as_given,
    check_number,
    Condition,
    DECAY,
    NOT_NEGATIVE,
    SHARE,
)
from absgd_jax.losses._labels import (
    canonicalize,
    check_range,
    distribution,
    expected,
    zero_of_none,
)


def symmetric_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float | jax.Array = 0.1,
    beta: float | jax.Array = 1.0,
    log_zero: float | jax.Array = -4.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Symmetric cross-entropy: cross-entropy plus its reverse, which is bounded.

    .. math::
      l = -\alpha \sum_k q_k \log p_k - \beta \sum_k p_k \max(\log q_k, A),
      \qquad p = \mathrm{softmax}(z)

    For a label :math:`y` the reverse term is :math:`-A (1 - p_y)`.

    Args:
      alpha: α, the weight of the cross-entropy.
      beta: β, the weight of the reverse cross-entropy. These defaults are the authors' for
        CIFAR-10; for CIFAR-100 they have α = 6 and β = 0.1.
      log_zero: A, what stands for the logarithm of 0; negative. Their code has ``log(1e-4)``.
      logits, labels, where: z, q and a mask, as in :func:`balanced_softmax`.

    Returns:
      Losses, as :func:`balanced_softmax`.

    Raises:
      TypeError, ValueError: As :func:`balanced_softmax`.

    Examples:
      >>> from absgd_jax.losses import symmetric_cross_entropy
      >>> logits, labels = [[9.0, 0.0], [9.0, 0.0]], [0, 1]
      >>> print(symmetric_cross_entropy(logits, labels).round(2))
      [0.  4.9]

    References:
      Wang et al., `Symmetric Cross Entropy for Robust Learning with Noisy Labels
      <https://arxiv.org/abs/1908.06112>`_, ICCV 2019
    """
    logits, labels, where = canonicalize(logits, labels, where)
    check_number("alpha", alpha, NOT_NEGATIVE)
    check_number("beta", beta, NOT_NEGATIVE)
    negative: Condition = (lambda x: -np.inf < x < 0, "be negative and finite")
    check_number("log_zero", log_zero, negative, "it stands for the logarithm of 0")
    log_p, q = jax.nn.log_softmax(logits), distribution(labels, logits)
    forward = expected(jnp.negative, labels, log_p)
    log_q = jnp.log(jnp.where(q > 0, q, 1))  # a logarithm of 0 would be NaN in the labels' gradient
    log_q = jnp.where(q > 0, jnp.maximum(log_q, log_zero), log_zero)
    reverse = -jnp.sum(jnp.exp(log_p) * log_q, axis=-1)
    return jnp.where(where, alpha * zero_of_none(alpha, forward) + beta * reverse, 0)


def generalized_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    q: float | jax.Array = 0.7,
    truncation: float | jax.Array = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Generalized cross-entropy, and its truncated form.

    .. math::
      l = \frac{1 - \max(p_y, k)^q}{q}, \qquad p = \mathrm{softmax}(z)

    It lies between cross-entropy, :math:`q \to 0`, and half the absolute error, :math:`q = 1`. If
    it is truncated, :math:`k > 0`, it has no gradient where the label is less probable than
    :math:`k`. It is never negative, unlike the form from which :math:`l(k)` is subtracted.

    Args:
      q: In (0, 1]; the larger, the more robust and the slower to fit.
      truncation: k, in [0, 1); the paper's truncated loss has 0.5, after a start without it.
      logits, labels, where: As in :func:`balanced_softmax`.

    Returns:
      Losses, as :func:`balanced_softmax`.

    Raises:
      TypeError, ValueError: As :func:`balanced_softmax`.

    Examples:
      >>> from absgd_jax.losses import generalized_cross_entropy
      >>> logits, labels = [[2.0, 0.0], [2.0, 0.0]], [0, 1]
      >>> print(generalized_cross_entropy(logits, labels).round(2))
      [0.12 1.11]
      >>> print(generalized_cross_entropy(logits, labels, truncation=0.5).round(2))
      [0.12 0.55]

    References:
      Zhang & Sabuncu, `Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
      Labels <https://arxiv.org/abs/1805.07836>`_, NeurIPS 2018
    """
    logits, labels, where = canonicalize(logits, labels, where)
    check_number("q", q, SHARE, "its limit at 0 is cross-entropy")
    check_number("truncation", truncation, DECAY, "0 truncates nothing")
    lowest = jnp.log(jnp.asarray(truncation, logits.dtype))
    lowest = jnp.maximum(lowest, float(np.finfo(logits.dtype).min))  # the loss of p = 0 is finite
    log_p = jnp.maximum(jax.nn.log_softmax(logits), lowest)
    losses = expected(lambda log_p: -jnp.expm1(q * log_p) / q, labels, log_p)
    return jnp.where(where, losses, 0)


def early_learning(
    logits: ArrayLike,
    labels: ArrayLike,
    target: ArrayLike,
    *,
    coefficient: float | jax.Array = 3.0,
    floor: float | jax.Array = 1e-4,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Early-learning regularisation: cross-entropy, and a pull towards an earlier prediction.

    .. math::
      l = -\log p_y + c \log \max(1 - \langle t, p \rangle, \epsilon),
      \qquad p = \mathrm{softmax}(z)

    A network fits right labels before it memorises wrong ones. The regulariser keeps it to what it
    predicted then. Such a target :math:`t` is the moving average of the predictions of an example,
    as in the paper, or the prediction of a teacher whose parameters are a moving average. No
    gradient flows through it. Losses can be negative, and are :math:`c \log \epsilon` at least.

    Args:
      target: t, distributions over the classes: floats of the shape of ``logits``. Zeros, for
        examples without an earlier prediction, leave cross-entropy.
      coefficient: c, the weight of the regulariser; 0 is cross-entropy. The authors have 3 for
        CIFAR-10 and 7 for CIFAR-100.
      floor: ε, in (0, 1]. Below it the regulariser has no gradient; without it there would be no
        least loss. The authors clip p to [1e-4, 1 - 1e-4] instead.
      logits, labels, where: As in :func:`balanced_softmax`.

    Returns:
      Losses, as :func:`balanced_softmax`.

    Raises:
      TypeError: ``target`` is not floating point.
      TypeError, ValueError: As :func:`balanced_softmax`.

    Examples:
      >>> from absgd_jax.losses import early_learning
      >>> logits, labels = [[2.0, 0.0], [2.0, 0.0]], [0, 1]
      >>> target = [[0.9, 0.1], [0.9, 0.1]]
      >>> print(early_learning(logits, labels, target).round(2))
      [-4.77 -2.77]

    References:
      Liu et al., `Early-Learning Regularization Prevents Memorization of Noisy Labels
      <https://arxiv.org/abs/2007.00151>`_, NeurIPS 2020
    """
    given, mask = as_given("target", target), where
    logits, labels, where = canonicalize(logits, labels, mask)
    check_number("coefficient", coefficient, NOT_NEGATIVE, "0 is cross-entropy")
    check_number("floor", floor, SHARE, "the logarithm of 0 is infinite")
    target = as_floats("target", given)
    if target.shape != logits.shape:
        raise ValueError(
            f"target must have the shape of logits, {logits.shape}, got {target.shape}; "
            "broadcast it with jnp.broadcast_to if that is meant."
        )
    check_range("target", given, mask, 1)
    target = lax.stop_gradient(jnp.where(where[..., None], target.astype(logits.dtype), 0))
    log_p = jax.nn.log_softmax(logits)
    agreement = jnp.sum(target * jnp.exp(log_p), axis=-1)
    regulariser = jnp.log(jnp.maximum(1 - agreement, floor))
    losses = expected(jnp.negative, labels, log_p) + coefficient * regulariser
    return jnp.where(where, losses, 0)
