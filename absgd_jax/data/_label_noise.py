"""Label noise."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from absgd_jax._checks import are_numbers, as_given, check_number, Condition, whole_number
from absgd_jax.data._long_tail import check_labels, generator


def flip_labels(
    labels: ArrayLike,
    rate: float,
    *,
    kind: Literal["symmetric", "symmetric_inclusive", "asymmetric"] | ArrayLike = "symmetric",
    num_classes: int,
    seed: int | np.random.Generator,
) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
    """Labels with a given rate of noise.

    In each class, the share ``rate`` of the labels, rounded to a whole number, is drawn again. New
    labels come from

    - ``"symmetric"``: the other classes, uniformly, so that every drawn label changes;
    - ``"symmetric_inclusive"``: all classes, uniformly, so that ``rate * (C - 1) / C`` of the
      labels change;
    - ``"asymmetric"``: the next class, and after the last the first;
    - a matrix of shape ``[C, C]``: row c is the distribution of the new labels of class c. With a
      ``rate`` of 1 it is the transition matrix of the noise.

    Args:
      labels: Integers in [0, ``num_classes``), of shape ``[N]``.
      rate: In [0, 1].
      kind: One of these. The default is what the authors of ABSGD mean by symmetric noise.
      num_classes: C.
      seed: An integer or a NumPy generator.

    Returns:
      The noisy labels, in the dtype of ``labels`` or, where that can't hold all classes, in int64;
      and a mask of those that differ from ``labels``.

    Raises:
      ValueError: An argument is out of range, or the rows of the matrix are not distributions.

    Examples:
      >>> import numpy as np
      >>> from absgd_jax.data import flip_labels
      >>> labels = np.repeat([0, 1, 2], 100)
      >>> noisy, flipped = flip_labels(labels, 0.4, num_classes=3, seed=0)
      >>> print(flipped.sum())
      120
      >>> cats_become_dogs = np.array([[0, 1, 0], [0, 1, 0], [0, 0, 1]])
      >>> noisy, _ = flip_labels(labels, 0.4, kind=cats_become_dogs, num_classes=3, seed=0)
      >>> print(np.bincount(noisy))
      [ 60 140 100]

    References:
      Patrini et al., `Making Deep Neural Networks Robust to Label Noise: a Loss Correction Approach
      <https://arxiv.org/abs/1609.03683>`_, CVPR 2017, for the transition matrix

      Kim et al., `NLNL: Negative Learning for Noisy Labels
      <https://arxiv.org/abs/1908.07387>`_, ICCV 2019, for the two kinds of symmetric noise
    """
    check_number("num_classes", num_classes, whole_number(2))
    labels = check_labels(labels, num_classes)
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape [N], got {labels.shape}.")
    share: Condition = (lambda x: 0 <= x <= 1, "lie in [0, 1]")
    check_number("rate", rate, share, "it is the share of labels that are drawn again")
    identity = np.eye(num_classes)
    named = {
        "symmetric": (1 - identity) / (num_classes - 1),
        "symmetric_inclusive": np.full_like(identity, 1 / num_classes),
        "asymmetric": np.roll(identity, 1, axis=1),
    }
    matrix = as_given("kind", named.get(kind) if isinstance(kind, str) else kind)
    if not are_numbers(matrix):
        raise ValueError(
            "kind must be 'symmetric', 'symmetric_inclusive', 'asymmetric' or a transition matrix, "
            f"got {kind!r}."
        )
    transition = np.asarray(matrix, float)
    if transition.shape != identity.shape:
        raise ValueError(f"kind must have shape {identity.shape}, got {transition.shape}.")
    sums = transition.sum(axis=1, keepdims=True)
    if np.any(transition < 0) or not np.allclose(sums, 1):
        rows = "rows that are not negative and sum to 1"
        raise ValueError(f"kind must hold distributions, {rows}, got {transition}.")
    transition = transition / sums  # rng.choice wants 1 to 1e-8, which float32 does not have
    rng = generator(seed)
    fits = num_classes - 1 <= np.iinfo(labels.dtype).max
    noisy = labels.astype(labels.dtype if fits else np.int64)
    for c in range(num_classes):
        members = np.flatnonzero(labels == c)
        drawn = rng.choice(members, round(rate * len(members)), replace=False)
        noisy[drawn] = rng.choice(num_classes, len(drawn), p=transition[c])
    return noisy, noisy != labels
