"""Per-example losses for imbalanced and noisy labels, and class priors.

A loss maps ``logits`` of shape ``[..., C]`` and ``labels`` to losses of shape ``[...]``: one for
each example, token or pixel, to be averaged or passed to :func:`absgd_jax.tilt`. Labels are
integers of shape ``[...]`` or, unless a loss says otherwise, distributions over the classes: floats
of shape ``[..., C]``. If the formula has a label y, the loss of a distribution is its mean over the
classes. Entries that ``where`` masks out have zero loss and gradient, whatever their logits and
labels.

Plain cross-entropy is ``optax.losses.softmax_cross_entropy``.
"""

from absgd_jax.losses._imbalance import arb as arb
from absgd_jax.losses._imbalance import balanced_softmax as balanced_softmax
from absgd_jax.losses._imbalance import focal as focal
from absgd_jax.losses._imbalance import ldam as ldam
from absgd_jax.losses._imbalance import normalized_logits as normalized_logits
from absgd_jax.losses._priors import class_balanced_weights as class_balanced_weights
from absgd_jax.losses._priors import deferred_weights as deferred_weights
from absgd_jax.losses._priors import running_counts as running_counts
from absgd_jax.losses._robust import early_learning as early_learning
from absgd_jax.losses._robust import generalized_cross_entropy as generalized_cross_entropy
from absgd_jax.losses._robust import symmetric_cross_entropy as symmetric_cross_entropy
