"""What a step of ABSGD adds to one of SGD on a TPU pod, compiled ahead of time: no TPU is needed.

    pip install ".[bench,pod]" && python -m benchmarks.pod

The batch is spread over all devices, and the parameters are on every one. Of the steps,

    sgd         has the mean loss, and lax.pmean(grads);
    axis_name   has robust_loss(losses, λ, axis_name=...), whose gradients arrive summed;
    pmerge      has robust_loss(losses, λ) of the device's own part, and pmerge(loss, grads, ...);
    automatic   has these, and a λ that tunes itself;
    jit         has robust_loss(losses, λ) of global arrays, and no shard_map: what the batch
                normalisation of a ResNet averages over is then the global batch, too.

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
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from absgd_jax import absgd, get_temperature, pmerge, robust_loss, target_ess
from benchmarks import models, report

IMAGE_SHAPES = {"mlp": (28, 28, 1), "resnet32": (32, 32, 3)}
STEPS = ("sgd", "axis_name", "pmerge", "automatic", "jit")
AXIS, CLASSES, TEMPERATURE = "device", 10, 5.0
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


def make_step(model: str, form: str, mesh: Mesh, rows: int) -> tuple[Any, tuple[Any, ...]]:
    """A jitted training step of that form, and the shapes of its arguments."""
    shape = IMAGE_SHAPES[model]
    graphdef, params, other = nnx.split(
        nnx.eval_shape(lambda: models.make_model(model, shape, CLASSES, rngs=nnx.Rngs(0))),
        nnx.Param,
        ...,
    )
    if form == "sgd":
        tx = optax.sgd(0.1, 0.9)
    else:
        tx = absgd(0.1, target_ess(0.5) if form == "automatic" else TEMPERATURE)
    merges = form in ("pmerge", "automatic")

    def step(params, other, opt_state, images, labels):
        temperature = None if form == "sgd" else get_temperature(opt_state)

        def loss_fn(params):
            model = nnx.merge(graphdef, params, other, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
            _, _, new = nnx.split(model, nnx.Param, ...)
            if form == "sgd":
                return losses.mean(), (losses, new)
            axis_name = AXIS if form == "axis_name" else None
            return robust_loss(losses, temperature, axis_name=axis_name), (losses, new)

        # The parts' own gradients, which a collective then brings together.
        local = lax.pcast(params, AXIS, to="varying") if form == "sgd" or merges else params
        (loss, (losses, other)), grads = jax.value_and_grad(loss_fn, has_aux=True)(local)
        if form == "sgd":
            grads = lax.pmean(grads, AXIS)
        elif merges:
            loss, grads = pmerge(loss, grads, temperature, axis_name=AXIS)
        if form != "jit":
            other = lax.pmean(other, AXIS)
        extra_args = {} if form == "sgd" else {"value": loss}
        if form == "automatic":
            extra_args |= {"losses": losses, "axis_name": AXIS}
        updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
        return optax.apply_updates(params, updates), other, opt_state

    one, spread = P(), P(AXIS)
    if form != "jit":
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(one, one, one, spread, spread), out_specs=one
        )

    def place(tree, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    state = params, other, jax.eval_shape(tx.init, params)
    batch = (
        jax.ShapeDtypeStruct((rows * mesh.size, *shape), jnp.float32),
        jax.ShapeDtypeStruct((rows * mesh.size,), jnp.int32),
    )
    return jax.jit(step, donate_argnums=(0, 1, 2)), (*place(state, one), *place(batch, spread))


def measure(model: str, form: str, mesh: Mesh, rows: int) -> dict[str, Any]:
    step, args = make_step(model, form, mesh, rows)
    compiled = step.lower(*args).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "model": model,
        "devices": mesh.size,
        "step": form,
        "collectives": [c._asdict() for c in collectives(compiled.as_text())],
        "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
    }


def as_row(result: dict[str, Any], sgd: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table: what SGD has, and how much more another step."""
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
    add("--models", nargs="+", choices=IMAGE_SHAPES, default=list(IMAGE_SHAPES), help="to compile")
    default = ["v5e:4x4", "v5e:16x16", "tpu7x:16x24x24"]
    add("--topologies", nargs="+", default=default, metavar="NAME", help="as XLA names them")
    default = ["axis_name", "pmerge"]
    add("--steps", nargs="+", choices=STEPS[1:], default=default, help="to compare with sgd")
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

    results, rows = [], [HEAD]
    for model, topology in tqdm(list(itertools.product(args.models, args.topologies))):
        compared = [
            measure(model, form, meshes[topology], args.batch_size) | {"topology": topology}
            for form in ("sgd", *args.steps)
        ]
        results += compared
        rows += [as_row(result, sgd=compared[0]) for result in compared]
    report.save(args.out / "config.json", report.describe(args))
    report.write(args, {f"program {i}": r for i, r in enumerate(results)}, rows)
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
