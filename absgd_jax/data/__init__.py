"""Long-tailed subsets and noisy labels, as NumPy arrays of indices and labels."""

from absgd_jax.data._label_noise import flip_labels as flip_labels
from absgd_jax.data._long_tail import class_counts as class_counts
from absgd_jax.data._long_tail import long_tailed_counts as long_tailed_counts
from absgd_jax.data._long_tail import long_tailed_indices as long_tailed_indices
from absgd_jax.data._long_tail import split_by_count as split_by_count
