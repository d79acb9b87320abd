"""Long-tailed subsets of a data set, and the counts that describe them."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from absgd_jax._checks import are_numbers, as_given, check_number, NOT_NEGATIVE, SHARE, whole_number


def class_counts(labels: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Number of examples of each class.

    Args:
      labels: Integers in [0, ``num_classes``), of any shape.
      num_classes: C.

    Returns:
      Counts of shape ``[C]``.

    Raises:
      ValueError: ``labels`` are not integers, or one is out of range.

    Examples:
      >>> from absgd_jax.data import class_counts
      >>> print(class_counts([0, 2, 2, 0, 2], num_classes=4))
      [2 0 3 0]
    """
    labels = check_labels(labels, num_classes)
    return np.bincount(labels.ravel(), minlength=num_classes).astype(np.int64)


def long_tailed_counts(
    max_count: int,
    num_classes: int,
    imbalance_factor: float,
    *,
    kind: Literal["exp", "step"] = "exp",
) -> NDArray[np.int64]:
    r"""Class sizes of a long-tailed data set, from the most frequent class to the rarest.

    .. math::
      n_c = \lfloor n_{\max} \rho^{c / (C - 1)} \rfloor, \qquad c = 0, \dots, C - 1

    Args:
      max_count: Size of the most frequent class.
      num_classes: C, at least 2.
      imbalance_factor: ρ in (0, 1], the size of the rarest class by that of the most frequent.
      kind: ``"exp"``, the formula above; or ``"step"``: the first C // 2 classes have ``max_count``
        examples, and the others ρ times as many.

    Returns:
      Counts of shape ``[C]``.

    Raises:
      ValueError: An argument is out of range, or the rarest class would be empty.

    Examples:
      >>> from absgd_jax.data import long_tailed_counts
      >>> print(long_tailed_counts(5000, 10, 0.01))
      [5000 2997 1796 1077  645  387  232  139   83   50]
      >>> print(long_tailed_counts(5000, 10, 0.01, kind="step"))
      [5000 5000 5000 5000 5000   50   50   50   50   50]

    References:
      Cao et al., `Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss
      <https://arxiv.org/abs/1906.07413>`_, NeurIPS 2019, whose code has this recipe
    """
    check_number("imbalance_factor", imbalance_factor, SHARE, "1 leaves the classes equal")
    check_number("num_classes", num_classes, whole_number(2))
    check_number("max_count", max_count, whole_number(1))
    if not isinstance(kind, str) or kind not in ("exp", "step"):
        raise ValueError(f"kind must be 'exp' or 'step', got {kind!r}.")

    def exponent(c: int) -> float:
        return c / (num_classes - 1) if kind == "exp" else float(c >= num_classes // 2)

    # Python's own arithmetic: published data sets hang on the last bit before the truncation.
    counts = [int(max_count * imbalance_factor ** exponent(c)) for c in range(num_classes)]
    if counts[-1] < 1:
        got = f"{max_count} with an imbalance_factor of {imbalance_factor}"
        raise ValueError(f"max_count must leave the rarest class an example, got {got}.")
    return np.array(counts, np.int64)


def long_tailed_indices(
    labels: ArrayLike,
    imbalance_factor: float,
    *,
    kind: Literal["exp", "step"] = "exp",
    max_count: int | None = None,
    class_order: ArrayLike | None = None,
    seed: int | np.random.Generator,
) -> NDArray[np.int64]:
    """Indices of a random long-tailed subset of a data set.

    Args:
      labels: Integers of shape ``[N]``, in which each of the C classes 0, 1, ... occurs.
      imbalance_factor: ρ in (0, 1], the size of the rarest class by that of the most frequent.
      kind: As in :func:`long_tailed_counts`, which gives the class sizes.
      max_count: Size of the most frequent class. By default that of the smallest class in
        ``labels``, the largest size that fits every class order.
      class_order: Permutation of the classes, the most frequent first, such as
        ``rng.permutation(C)``; 0, 1, ... if ``None``. Results depend on which classes are rare as
        much as on how rare they are.
      seed: An integer or a NumPy generator.

    Returns:
      Sorted indices into ``labels``.

    Raises:
      ValueError: An argument is out of range, or a class has too few examples.

    Examples:
      >>> import numpy as np
      >>> from absgd_jax.data import class_counts, long_tailed_indices
      >>> labels = np.repeat([0, 1, 2], 100)
      >>> indices = long_tailed_indices(labels, 0.01, class_order=[2, 0, 1], seed=0)
      >>> print(class_counts(labels[indices], num_classes=3))
      [ 10   1 100]
    """
    labels = np.asarray(as_given("labels", labels))
    num_classes = np.unique(labels).size if np.issubdtype(labels.dtype, np.integer) else 0
    if labels.ndim != 1 or num_classes < 2:
        wanted = "integers of shape [N], of two classes or more"
        raise ValueError(f"labels must be {wanted}, got {labels}.")
    available = class_counts(labels, num_classes)
    if max_count is None:
        max_count = int(available.min())
    counts = long_tailed_counts(max_count, num_classes, imbalance_factor, kind=kind)
    classes = np.arange(num_classes)
    order = np.asarray(as_given("class_order", classes if class_order is None else class_order))
    whole = order.ndim == 1 and np.issubdtype(order.dtype, np.integer)
    if not whole or not np.array_equal(np.sort(order), classes):
        raise ValueError(
            f"class_order must be a permutation of 0, ..., {num_classes - 1}, got {order}; give "
            f"integers, such as rng.permutation({num_classes})."
        )
    rng = generator(seed)
    chosen = []
    for c, count in zip(order, counts, strict=True):
        if available[c] < count:
            got = f"{max_count}: class {c} has {available[c]} and needs {count}"
            raise ValueError(f"max_count must leave enough examples, got {got}.")
        chosen.append(rng.choice(np.flatnonzero(labels == c), count, replace=False))
    return np.sort(np.concatenate(chosen))


def split_by_count(
    counts: ArrayLike, *, many: int = 100, few: int = 20
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Classes with many, a medium number of, and few training examples.

    Args:
      counts: Number of training examples of each class, of shape ``[C]``.
      many: Classes with more examples than this have many.
      few: Classes with fewer examples than this have few.

    Returns:
      The classes of the three groups, in that order.

    Raises:
      ValueError: ``few`` is larger than ``many``, or a number is negative.
      TypeError: ``many`` or ``few`` is not a number.

    Examples:
      >>> from absgd_jax.data import split_by_count
      >>> many, medium, few = split_by_count([500, 101, 100, 20, 19])
      >>> print(many, medium, few)
      [0 1] [2 3] [4]

    References:
      Liu et al., `Large-Scale Long-Tailed Recognition in an Open World
      <https://arxiv.org/abs/1904.05160>`_, CVPR 2019
    """
    check_number("many", many, NOT_NEGATIVE)
    check_number("few", few, NOT_NEGATIVE)
    if few > many:
        raise ValueError(f"few must not exceed many, got {few} and {many}.")
    counts = np.asarray(as_given("counts", counts))
    if counts.ndim != 1 or not are_numbers(counts) or not np.all(counts >= 0):
        raise ValueError(f"counts must hold one number a class, not negative, got {counts}.")
    high, low = counts > many, counts < few
    return np.flatnonzero(high), np.flatnonzero(~(high | low)), np.flatnonzero(low)


def check_labels(labels: ArrayLike, num_classes: int) -> NDArray[np.integer]:
    labels = np.asarray(as_given("labels", labels))
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}.")
    check_number("num_classes", num_classes, whole_number(1))
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
        raise ValueError(f"labels must lie in [0, {num_classes}), got {wrong[0]}.")
    return labels


def generator(seed: int | np.random.Generator) -> np.random.Generator:
    try:
        if seed is not None:  # which NumPy would take, for numbers that no one has again
            return np.random.default_rng(seed)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"seed must be a whole number from 0 on or a NumPy generator, got {seed!r}.")
