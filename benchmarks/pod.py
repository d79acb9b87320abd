"""What a step of ABSGD adds to one of SGD on a TPU pod, compiled ahead of time: no TPU is needed.

    pip install ".[bench,pod]" && python -m benchmarks.pod

The batch is spread over all devices, and the parameters are on every one. The steps are those of
benchmarks.steps: each form of ABSGD stands below SGD in that form. `absgd` and `sgd` are jitted on
global arrays; what the batch normalisation of a ResNet averages over is then the global batch, too.

The figures are the compiler's, for one device and one step. A collective is "awaited" if a matrix
product or a convolution of the step depends on it: one between the forward and the backward pass.
"""

import argparse
import collections
import itertools
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from benchmarks import report, steps
from benchmarks.steps import AXIS, Batch, FORMS, State, Work

COLLECTIVES = {
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("all-reduce-start", "all-gather-start", "collective-permute-start"),
}
PRODUCTS = {"dot", "convolution"}
HEAD = (
    *("model", "topology", "devices", "step", "collectives", "bytes in them", "awaited"),
    *("memory, bytes", "FLOPs", "bytes accessed"),
)


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
            if opcode in COLLECTIVES:
                here.add(len(found))
                found.append(Collective(opcode.removesuffix("-start"), size(shape), False))
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


def prepare(work: Work, form: str, mesh: Mesh, rows: int) -> tuple[Any, State, Batch]:
    """The jitted step, and the shapes that it is called with: so many rows a device."""
    state, step = steps.make_step(work, form, mesh)

    def place(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    state = jax.tree.map(lambda x: place(x.shape, x.dtype, P()), state)
    batch = jax.tree.map(
        lambda x: place((rows * mesh.size, *x.shape[1:]), x.dtype, P(AXIS)), work.examples
    )
    return jax.jit(step, donate_argnums=0), state, batch


def measure(work: Work, form: str, mesh: Mesh, rows: int) -> dict[str, Any]:
    step, state, batch = prepare(work, form, mesh, rows)
    compiled = step.lower(state, batch).compile()
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=steps.MODELS, default=["mlp", "resnet32"], help="to compile")
    default = ["v5e:4x4", "v5e:16x16", "tpu7x:16x24x24"]
    add("--topologies", nargs="+", default=default, metavar="NAME", help="as XLA names them")
    default = ["shard_map", "shard_map_automatic", "absgd"]
    add("--forms", nargs="+", choices=FORMS, default=default, help="of ABSGD, beside SGD")
    add("--batch-size", type=report.whole_number(1), default=128, help="examples a device")
    add("--out", type=pathlib.Path, default="out/pod", help="folder to write to")
    args = parser.parse_args()

    # The TPU's compiler asks for these where there is no TPU; it is not the device to run on.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    jax.config.update("jax_platforms", "cpu")
    meshes = {}
    for name in args.topologies:
        try:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        except Exception as error:  # of what kind depends on the version of libtpu
            parser.error(f"--topologies must be known to the TPU's compiler, got {name}: {error}")
        meshes[name] = Mesh(np.array(topology.devices), (AXIS,), axis_types=(AxisType.Auto,))
    report.make_folder(parser, args.out)

    report.save(args.out / "config.json", report.describe(args))
    forms = dict.fromkeys(f for form in args.forms for f in (FORMS[form], form))
    results, rows = {}, [HEAD]
    for model, topology in tqdm(list(itertools.product(args.models, args.topologies))):
        work, mesh = steps.make_work(model, examples=1), meshes[topology]
        found = {form: measure(work, form, mesh, args.batch_size) for form in forms}
        for form, result in found.items():
            result |= {"model": model, "topology": topology, "devices": mesh.size, "step": form}
            results[f"{model}, {topology}, {form}"] = result
            rows.append(as_row(result, sgd=found[FORMS.get(form, form)]))
        report.write(args, results, rows)
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
