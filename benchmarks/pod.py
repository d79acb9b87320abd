"""What a step of ABSGD adds to one of SGD on a TPU pod, compiled ahead of time: no TPU is needed.

    pip install ".[bench,pod]" && python -m benchmarks.pod

The batch is spread over all devices, and the parameters are on every one. The steps are those of
benchmarks.engine.steps: each form of ABSGD stands below SGD in that form. `absgd` and `sgd` are
jitted on global arrays; what the batch normalisation of a ResNet averages over is then the global
batch, too.

The figures are the compiler's, for one device and one step. A collective is "awaited" if a matrix
product or a convolution of the step depends on it: one between the forward and the backward pass.
"""

import collections
import dataclasses
import itertools
import math
import os
import pathlib
import re
from typing import Annotated, Any, Literal, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, Sharding
from tqdm import tqdm

from benchmarks.engine import report, steps
from benchmarks.engine.config import Config as BaseConfig
from benchmarks.engine.config import fail, FROM_1, read
from benchmarks.engine.steps import FORMS, Work

COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
PRODUCTS = {"dot", "convolution"}
HEAD = (
    *("model", "topology", "devices", "step", "collectives", "bytes in them", "awaited"),
    *("memory, bytes", "FLOPs", "bytes accessed"),
)


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """What to compile, and for what."""

    out: pathlib.Path = pathlib.Path("out/pod")  # folder to write to
    models: tuple[Literal[*steps.MODELS], ...] = ("mlp", "resnet32")  # to compile
    # as XLA names them
    topologies: tuple[str, ...] = ("v5e:4x4", "v5e:16x16", "tpu7x:16x24x24")
    # of ABSGD, beside SGD
    forms: tuple[Literal[*FORMS], ...] = ("shard_map", "shard_map_automatic", "absgd")
    batch_size: Annotated[int, FROM_1] = 128  # examples a device


class Collective(NamedTuple):
    kind: str
    bytes: int  # of its results
    awaited: bool  # whether a matrix product or a convolution depends on it


def collectives(hlo: str) -> list[Collective]:
    """Those of a compiled module, from its text, where whatever is used stands before its use."""
    found: list[Collective] = []
    awaited: set[int] = set()
    depends: dict[str, set[int]] = {}  # on which collectives an instruction does
    held: dict[str, set[int]] = {}  # the collectives of a computation
    multiplying: set[str] = set()  # the computations with a product
    computation = ""
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line):
            computation = head[1]
            held[computation] = set()
        elif parsed := re.match(r" +(?:ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\((.*)", line):
            name, shape, opcode, rest = parsed.groups()
            operands, _, attributes = rest.partition("), ")
            called = held.keys() & set(re.findall(r"%([\w.-]+)", attributes))
            before = set().union(*(depends.get(o, ()) for o in re.findall(r"%([\w.-]+)", operands)))
            if opcode in PRODUCTS or called & multiplying:
                awaited |= before
                multiplying.add(computation)
            here = set().union(*(held[c] for c in called))
            if (kind := opcode.removesuffix("-start")) in COLLECTIVES:
                here.add(len(found))
                found.append(Collective(kind, size(shape), False))
            held[computation] |= here
            depends[name] = before | here
    return [c._replace(awaited=i in awaited) for i, c in enumerate(found)]


def size(shape: str) -> int:
    """Bytes of an HLO shape, a tuple or an array: ``(f32[8,4]{1,0:T(8,128)}, s32[])`` has 132."""
    arrays = re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape)
    return sum(
        (int(bits or 8) + 7) // 8 * math.prod(int(n) for n in dims.split(",") if n)
        for _, bits, dims in arrays
    )


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
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "collectives": [c._asdict() for c in collectives(compiled.as_text())],
        "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
    }


def as_row(result: dict[str, Any], sgd: dict[str, Any]) -> tuple[str, ...]:
    """What SGD has, and how much more another step."""
    found = result["collectives"]
    kinds = collections.Counter(c["kind"] for c in found)
    if result is sgd:
        figures = f"{sgd['memory']:,}", f"{sgd['flops']:.4e}", f"{sgd['bytes_accessed']:.4e}"
    else:
        ratios = (result[k] / sgd[k] - 1 for k in ("flops", "bytes_accessed"))
        more = result["memory"] - sgd["memory"]
        figures = f"{more:+,}", *(f"{100 * ratio:+.4f} %" for ratio in ratios)
    return (
        *(str(result[k]) for k in ("model", "topology", "devices", "step")),
        ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        f"{sum(c['bytes'] for c in found):,}",
        str(sum(c["awaited"] for c in found)),
        *figures,
    )


def make_mesh(topology: str) -> Mesh:
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of what kind depends on the version of libtpu
        fail(f"--topologies must be known to the TPU's compiler, got {topology}: {error}")
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
