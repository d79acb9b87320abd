"""What the weights do: pure functions of a batch, to call inside the step and log.

``weights`` are those of a batch, on any scale, such as ``jax.grad(robust_loss)(losses,
temperature)``. If ``pmap`` or ``shard_map`` spreads the batch, ``axis_name`` names the axes; under
``jit`` arrays are global. For a fully masked batch everything is 0.
"""

from absgd_jax.diagnostics._weights import class_mass as class_mass
from absgd_jax.diagnostics._weights import effective_sample_size as effective_sample_size
from absgd_jax.diagnostics._weights import kl_divergence as kl_divergence
from absgd_jax.diagnostics._weights import largest_weight as largest_weight
from absgd_jax.diagnostics._weights import summary as summary
