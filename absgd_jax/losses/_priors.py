"""How often the classes occur: counts, class weights, and when to apply them."""

from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from absgd_jax._checks import (
    are_numbers,
    as_floats,
    as_given,
    check_number,
    Condition,
    DECAY,
    is_concrete,
    whole_number,
)
from absgd_jax.losses._labels import canonicalize, counted, is_integer


def class_balanced_weights(class_counts: ArrayLike, *, beta: float = 0.9999) -> jax.Array:
    r"""Class weights by the effective number of examples.

    .. math::
      w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \qquad \sum_{c=1}^C w_c = C

    They range from equal weights, :math:`\beta = 0`, to inverse frequencies, :math:`\beta = 1`.

    Frequent classes have small weights. So the mean weight of the examples is below 1, such as 0.1
    with two classes of 40 to 1 and :math:`\beta = 1`, and the gradients are small. To keep their
    scale, divide by the mean weight, ``weights[labels].mean()`` over the training set.

    Args:
      class_counts: Number of examples of each class, of shape ``[C]``. A class without any gets the
        weight of the rarest class that has some.
      beta: β, in [0, 1].

    Returns:
      Weights of shape ``[C]`` that sum to C. Those of the examples are ``weights[labels]``.

    Raises:
      ValueError: ``class_counts`` has another shape, a negative or no positive entry; or ``beta``
        is out of range.

    Examples:
      >>> from absgd_jax.losses import class_balanced_weights
      >>> print(class_balanced_weights([5000, 500, 50], beta=0.999).round(2))
      [0.13 0.32 2.56]
      >>> print(class_balanced_weights([40, 40, 20], beta=1.0))
      [0.75 0.75 1.5 ]

    References:
      Cui et al., `Class-Balanced Loss Based on Effective Number of Samples
      <https://arxiv.org/abs/1901.05555>`_, CVPR 2019
    """
    condition: Condition = (lambda x: 0 <= x <= 1, "lie in [0, 1]")
    check_number("beta", beta, condition, "0 is equal weights, 1 inverse frequencies")
    counts, _ = positive_counts(class_counts)
    # 1 - beta before any rounding to float32, which has 3 digits of it left at 0.9999; and not 0,
    # near which the weights are the inverse frequencies to the last digit.
    rest = jnp.maximum(jnp.asarray(1 - beta, counts.dtype), 1e-37)
    log_beta = jnp.log1p(-rest)
    exponents = counts * log_beta
    # Near 0, where they may underflow, the effective numbers are linear in the counts.
    linear = counts * (log_beta / rest)
    numbers = jnp.where(exponents < -1e-20, jnp.expm1(exponents) / rest, linear)
    weights = jnp.max(numbers) / numbers  # both negative: of the rarest class it is 1
    return weights * (weights.size / jnp.sum(weights))


def deferred_weights(weights: ArrayLike, start: int) -> Callable[[int | jax.Array], jax.Array]:
    """Schedule of deferred re-weighting (DRW): equal class weights first, then ``weights``.

    Args:
      weights: Class weights of shape ``[C]``, such as :func:`class_balanced_weights`.
      start: The first step with these weights, a whole number.

    Returns:
      A schedule, step -> weights of shape ``[C]``; the step may be traced.

    Raises:
      ValueError: ``weights`` has another shape, a negative or no positive entry; or ``start`` is
        not a whole number from 0 on.

    Examples:
      >>> from absgd_jax.losses import deferred_weights
      >>> schedule = deferred_weights([0.75, 0.75, 1.5], start=100)
      >>> print(schedule(99), schedule(100))
      [1. 1. 1.] [0.75 0.75 1.5 ]

    References:
      Cao et al., `Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss
      <https://arxiv.org/abs/1906.07413>`_, NeurIPS 2019
    """
    check_per_class("weights", weights)
    check_number("start", start, whole_number(0), "it is the first step that has the weights")
    weights = jnp.asarray(weights)
    return lambda step: jnp.where(step < start, jnp.ones_like(weights), weights)


def running_counts(
    counts: ArrayLike,
    labels: ArrayLike,
    *,
    decay: float | jax.Array = 0.99,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    r"""Class counts of a stream, in which old batches are gradually forgotten.

    .. math::
      n_c \leftarrow \text{decay} \cdot n_c + \sum_i [y_i = c]

    They follow a class prior that is unknown or drifts, over about 1 / (1 - decay) batches, for
    :func:`balanced_softmax` and :func:`arb`. Count a batch before its loss. For a memory of about m
    examples, the decay of batches of n is exp(-n / m).

    Args:
      counts: n, floating point, of shape ``[C]``, the only state; zeros at first.
      labels: As in :func:`balanced_softmax`, of any shape.
      decay: Share of the old counts that is kept, in [0, 1); at 0 they are those of the batch.
      where: Boolean array, with one entry for each label; masked ones are not counted.
      axis_name: As in :func:`arb`.

    Returns:
      The new counts, of shape ``[C]``, in float32 or in the dtype of ``counts`` if that is wider.

    Raises:
      TypeError: ``counts`` are not floating point or ``where`` is not boolean.
      ValueError: An argument has another shape, or ``labels`` or ``decay`` are out of range, where
        they are not traced.

    Examples:
      >>> import jax.numpy as jnp
      >>> from absgd_jax.losses import running_counts
      >>> counts = jnp.zeros(3)
      >>> for labels in ([0, 0, 1], [0, 2, 2]):
      ...   counts = running_counts(counts, labels, decay=0.5)
      >>> print(counts)
      [2.  0.5 2. ]
    """
    counts = as_floats("counts", counts)
    if counts.ndim != 1:
        raise ValueError(f"counts must have shape [C], got {counts.shape}.")
    check_number("decay", decay, DECAY, "0 forgets all batches but the newest")
    labels = as_given("labels", labels)
    shape = labels.shape if is_integer(labels) else labels.shape[:-1]
    like_logits = jnp.broadcast_to(counts, (*shape, counts.size))
    of_batch = counted(*canonicalize(like_logits, labels, where), axis_name)
    return jnp.asarray(decay, counts.dtype) * counts + of_batch


def positive_counts(
    class_counts: ArrayLike, logits: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Counts, zeros replaced by the smallest that is not; and which of them were not zero.

    The logarithm or the inverse of a zero would be infinite. A class that the counts say is never
    met counts as the rarest of the others instead, which leaves the counts' unit open: fractions
    will do.
    """
    check_per_class("class_counts", class_counts, logits)
    counts = jnp.asarray(class_counts, float if logits is None else logits.dtype)
    met = counts > 0
    # 1 if all are zero, which traced ones may be: the batch counts of a batch that is masked whole.
    rarest = jnp.min(counts, where=met, initial=jnp.maximum(jnp.max(counts), 1))
    return jnp.where(met, counts, rarest), met


def check_per_class(name: str, x: ArrayLike, logits: jax.Array | None = None) -> None:
    """Raises unless ``x`` holds a number a class: finite, not negative and not all zero."""
    wanted, shape = None if logits is None else logits.shape[-1:], as_given(name, x).shape
    if len(shape) != 1 or wanted not in (None, shape):
        raise ValueError(
            f"{name} must hold one number a class, shape {wanted or '[C]'}, got shape {shape}."
        )
    if is_concrete(x):
        numbers = np.asarray(x)
        sound = are_numbers(numbers) and np.all((numbers >= 0) & (numbers < np.inf))
        if not (sound and np.any(numbers > 0)):
            raise ValueError(f"{name} must be finite, not negative and not all zero, got {x}.")
