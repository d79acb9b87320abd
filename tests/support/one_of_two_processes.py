"""One of the two processes that test_distributed.py starts: ``python -m ... PORT PROCESS OUT``.

Each holds half of every batch, on two of the four devices, and writes what it ends with to OUT.
"""

import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.support import layouts

TEMPERATURE = (-np.inf, 0.2)  # automatic

port, process, out = sys.argv[1:]
process = int(process)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_x64", True)
jax.distributed.initialize(f"localhost:{port}", 2, process)
assert jax.device_count() == 4

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
params, (*rows, counts, totals) = layouts.problem()
half = slice(16 * process, 16 * (process + 1))
rows = (
    jax.make_array_from_process_local_data(NamedSharding(mesh, P(None, "data")), a[:, half])
    for a in rows
)
whole = NamedSharding(mesh, P())
batches = (*rows, *jax.device_put((counts, totals), whole))
params = jax.device_put(params, whole)

specs = (*[P(None, "data")] * 3, P(), P())
train = {
    "jit": jax.jit(layouts.train),
    "shard_map": jax.jit(
        jax.shard_map(layouts.spread("data"), mesh=mesh, in_specs=(P(), specs, P()), out_specs=P())
    ),
}
arrays = {}
for name, f in train.items():
    params_after, state = f(params, batches, TEMPERATURE)
    results = params_after | {"temperature": state.temperature, "baseline": state.baseline}
    arrays |= {f"{name}/{k}": np.asarray(a) for k, a in results.items()}
np.savez(out, **arrays)
