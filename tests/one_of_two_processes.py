"""One of the two processes that test_distributed.py starts: ``python ... PORT PROCESS OUT``.

Each holds half of every batch, on two of the four devices, and writes what it ends with to OUT.
Then the second dies, and the first goes on alone.
"""

import functools
import os
import sys

import jax
import layouts
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

TEMPERATURE = (-0.3, 0.2)  # automatic

port, process, out = sys.argv[1:]
process = int(process)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_x64", True)
jax.distributed.initialize(f"localhost:{port}", 2, process, heartbeat_timeout_seconds=10)
assert jax.device_count() == 4

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
params, batches = layouts.problem()
half = slice(16 * process, 16 * (process + 1))
batches = tuple(
    jax.make_array_from_process_local_data(NamedSharding(mesh, P(None, "data")), a[:, half])
    for a in batches
)
params = jax.device_put(params, NamedSharding(mesh, P()))

train = {
    "jit": jax.jit(layouts.train),
    "shard_map": jax.jit(
        jax.shard_map(
            functools.partial(layouts.train, value_and_grad=layouts.merged, axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P(None, "data"), P()),
            out_specs=P(),
        )
    ),
}
arrays = {}
for name, f in train.items():
    params_after, state, losses = f(params, batches, TEMPERATURE)
    results = params_after | {
        "temperature": state.temperature,
        "log_normalizer": state.log_normalizer,
        "losses": losses,
    }
    arrays |= {f"{name}/{k}": np.asarray(a) for k, a in results.items()}
np.savez(out, **arrays)

if process == 1:
    os._exit(1)
jax.block_until_ready(train["jit"](params, batches, TEMPERATURE))
