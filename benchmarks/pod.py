"""What a step of ABSGD adds to one of SGD on a pod, compiled ahead of time: no device is needed.

    pip install ".[bench,pod]" && python -m benchmarks.pod
    pip install ".[bench,gpu-aot]" && python -m benchmarks.pod --topologies h100:1x8 h100:32x8

The batch is spread over all devices, and the parameters are on every one. The steps are those of
benchmarks.engine.steps: each form of ABSGD stands below SGD in that form. `absgd` and `sgd` are
jitted on global arrays; what the batch normalisation of a ResNet averages over is then the global
batch, too.

The figures are the compiler's, for one device and one step. A collective is "awaited" if a matrix
product or a convolution of the step depends on it: one between the forward and the backward pass.
A "launch" is an operation of the step: on a GPU a kernel, a copy, a collective or a call of a
library; a TPU is launched once, and works through them. Of FLOPs and bytes accessed the compiler
for GPUs says nothing.
"""

import collections
import dataclasses
import itertools
import os
import pathlib
from typing import Annotated, Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, Sharding
from tqdm import tqdm

from benchmarks.engine import hlo, report, steps
from benchmarks.engine.config import Config as BaseConfig
from benchmarks.engine.config import fail, FROM_1, read
from benchmarks.engine.steps import FORMS, Work

COSTS = "flops", "bytes_accessed"
HEAD = (
    *("model", "topology", "devices", "step", "collectives", "bytes in them", "awaited"),
    *("launches", "memory, bytes", "FLOPs", "bytes accessed"),
)
# GPUs, as XLA's GpuTargetConfigProto. TPUs are known to their compiler by name.
GPUS = {
    "h100": """
        platform_name: "CUDA"  device_description_str: "NVIDIA H100 80GB HBM3"
        dnn_version_info { major: 9 minor: 8 }
        gpu_device_info {
            cuda_compute_capability { major: 9 }  core_count: 132  fpus_per_core: 128
            clock_rate_ghz: 1.98  device_memory_size: 84978434048
            memory_bandwidth: 3352320000000  l2_cache_size: 52428800
            shared_memory_per_core: 233472  shared_memory_per_block: 49152
            shared_memory_per_block_optin: 232448  registers_per_core_limit: 65536
            registers_per_block_limit: 65536  threads_per_core_limit: 2048
            threads_per_block_limit: 1024  threads_per_warp: 32
            block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
        }
    """
}


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """What to compile, and for what."""

    out: pathlib.Path = pathlib.Path("out/pod")  # folder to write to
    models: tuple[Literal[*steps.MODELS], ...] = ("mlp", "resnet32")  # to compile
    # of TPUs as XLA names them, of GPUs as h100:HOSTSxGPUS
    topologies: tuple[str, ...] = ("v5e:4x4", "v5e:16x16", "tpu7x:16x24x24")
    # of ABSGD, beside SGD
    forms: tuple[Literal[*FORMS], ...] = ("shard_map", "shard_map_automatic", "absgd")
    batch_size: Annotated[int, FROM_1] = 128  # examples a device


def shapes(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def prepare(work: Work, form: str, mesh: Mesh, rows: int) -> tuple[Any, ...]:
    """The jitted step, and the shapes that it is called with: so many rows a device."""
    examples = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows * mesh.size, *x.shape[1:]), x.dtype), work.examples
    )
    made = steps.make_step(work._replace(examples=examples), form, mesh)
    return steps.place(mesh, *made, put=shapes)


def measure(work: Work, form: str, mesh: Mesh, rows: int) -> dict[str, Any]:
    step, *inputs = prepare(work, form, mesh, rows)
    compiled = step.lower(*inputs).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}  # of a GPU
    return {
        "collectives": [c._asdict() for c in hlo.collectives(text)],
        "launches": hlo.launches(text),
        "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
    }


def as_row(result: dict[str, Any], sgd: dict[str, Any]) -> tuple[str, ...]:
    """What SGD has, and how much more another step."""
    found = result["collectives"]
    kinds = collections.Counter(c["kind"] for c in found)
    if result is sgd:
        counts = (f"{sgd[k]:,}" for k in ("launches", "memory"))
        costs = (f"{sgd[k]:.4e}" for k in COSTS if sgd[k])
    else:
        counts = (f"{result[k] - sgd[k]:+,}" for k in ("launches", "memory"))
        costs = (f"{100 * (result[k] / sgd[k] - 1):+.4f} %" for k in COSTS if sgd[k])
    return (
        *(str(result[k]) for k in ("model", "topology", "devices", "step")),
        ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        f"{sum(c['bytes'] for c in found):,}",
        str(sum(c["awaited"] for c in found)),
        *counts,
        *(list(costs) or ["-"] * len(COSTS)),
    )


def make_mesh(topology: str) -> Mesh:
    kind, _, shape = topology.partition(":")
    known: dict[str, Any] = {"platform": "tpu", "topology_name": topology}
    if kind in GPUS:
        known = {"platform": "cuda", "topology_name": "", "topology": f"1x{shape}"}
        known["target_config"] = GPUS[kind]
    try:
        devices = topologies.get_topology_desc(**known).devices
    except Exception as error:  # of what kind depends on the version of the compiler
        fail(f"--topologies must be known to the compiler, got {topology}: {error}")
    return steps.make_mesh(devices)


def main() -> None:
    config = read(Config, __doc__)
    # The TPU's compiler asks for these where there is no TPU; it is not the device to run on.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    jax.config.update("jax_platforms", "cpu")
    meshes = {name: make_mesh(name) for name in config.topologies}
    forms = dict.fromkeys(f for form in config.forms for f in (FORMS[form], form))
    results, rows = {}, [HEAD]
    with report.folder(config):
        for model, topology in tqdm(list(itertools.product(config.models, meshes))):
            work, mesh = steps.make_work(model, examples=1), meshes[topology]
            found = {form: measure(work, form, mesh, config.batch_size) for form in forms}
            for form, result in found.items():
                result |= {"model": model, "topology": topology, "devices": mesh.size, "step": form}
                results[f"{model}, {topology}, {form}"] = result
                rows.append(as_row(result, sgd=found[FORMS.get(form, form)]))
            report.write(config.out, results, report.markdown(rows))
    print(report.markdown(rows))


if __name__ == "__main__":
    main()
