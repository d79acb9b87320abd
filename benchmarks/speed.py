"""What a step of ABSGD costs: beside SGD, the authors' PyTorch package, and learnt weights.

    python -m benchmarks.speed

Of its parts,

    sgd       has every form of ABSGD beside SGD in that form, as benchmarks.steps lists them;
    torch     trains by the authors' PyTorch package, eager and compiled, and by ABSGD here: the
              same network, parameters, examples, order and threads. The package, extra `reference`,
              may be in an environment of its own, whose interpreter is --torch-python;
    meta      has the algorithms of benchmarks.meta, which learn the weights, beside ABSGD;
    growth    has softmax and tilt of n losses, and the value and gradient of the tilted mean,
              beside a copy of them, the update of n parameters beside the same traffic of memory,
              and the step on n devices beside SGD's.

The first line of a comparison has what the others are beside. In these, numbers with a sign are
differences and those without are ratios. What is compared is timed in turn, there and back; a ratio
of times is the median over the turns, with its quartiles.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from absgd_jax import scale_by_attention, tilt
from benchmarks import meta, report, steps
from benchmarks.steps import AXIS, Batch, FORMS, State, Work

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARTS = {
    "sgd": "Beside SGD",
    "torch": "Beside the authors' PyTorch package",
    "meta": "Beside learnt weights",
    "growth": "As it grows",
}
RATIOS = {
    "sgd": "ratio to SGD in the same form",
    "torch": "ratio to absgd_jax",
    "meta": "ratio to ABSGD",
}
COLUMNS = {
    "flops": "FLOPs",
    "bytes_accessed": "bytes accessed",
    "memory": "memory, bytes",
    "state": "state, bytes",
    "compilation": "compilation",
    "images": "images a second",
    "seconds": "time",
    "loss": "loss after an epoch",
    "missing": "not measured",
}
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 110,
}
ON_DEVICES = ("sgd_shard_map", "shard_map", "shard_map_automatic")
EXAMPLES = 10_000  # of the data set that an epoch draws from

Timer = Callable[[int], float]  # of a number of calls: the seconds of one
Record = dict[str, Any]


def timer(function: Callable[..., Any], state: Any, *inputs: Any) -> Timer:
    """Of a function whose first argument is what the call before has returned."""

    def run(calls):
        nonlocal state
        start = time.perf_counter()
        for _ in range(calls):
            state = function(state, *inputs)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / calls

    return run


def interleave(args: argparse.Namespace, timers: dict[str, Timer]) -> dict[str, list[float]]:
    """Seconds of a call, ``args.repeats`` times, each over as many as fill ``args.seconds``."""
    for run in timers.values():
        run(1)
    calls = max(1, round(args.seconds / next(iter(timers.values()))(1)))
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(args.repeats):
        for name in list(timers)[:: -1 if i % 2 else 1]:
            seconds[name].append(timers[name](calls))
    return seconds


def place(work: Work, state: State, devices: int) -> tuple[State, Batch]:
    """The state on all devices, a copy that may be donated, and the examples spread over them."""
    mesh = steps.make_mesh(devices)
    return (
        jax.device_put(jax.tree.map(jnp.copy, state), NamedSharding(mesh, P())),
        jax.device_put(work.examples, NamedSharding(mesh, P(AXIS))),
    )


def prepare(work: Work, form: str, devices: int = 1) -> tuple[Any, State, Batch]:
    """The jitted step, and what to call it with."""
    state, step = steps.make_step(work, form, steps.make_mesh(devices))
    return jax.jit(step, donate_argnums=0), *place(work, state, devices)


def figures(compiled: Any) -> Record:
    """The compiler's, of one step on one device."""
    cost = compiled.cost_analysis()
    return {
        "flops": round(cost["flops"]),
        "bytes_accessed": round(cost["bytes accessed"]),
        "transcendentals": round(cost["transcendentals"]),
        "memory": compiled.memory_analysis().temp_size_in_bytes,
    }


def run_sgd(args: argparse.Namespace, model: str) -> Iterator[Record]:
    work = steps.make_work(model, args.batch_size)
    forms = list(dict.fromkeys(f for form in args.forms for f in (FORMS[form], form)))
    compilation: dict[str, list[float]] = {form: [] for form in forms}
    ready, found = {}, {}
    for i in range(-1, args.compilations):  # the first time JAX traces much that it then knows
        for form in forms[:: -1 if i % 2 else 1]:
            step, state, batch = prepare(work, form)
            start = time.perf_counter()
            compiled = step.lower(state, batch).compile()
            if i >= 0:
                compilation[form].append(time.perf_counter() - start)
            ready[form] = compiled, state, batch
            size = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
            found[form] = figures(compiled) | {"state": size}
    seconds = interleave(args, {form: timer(*each) for form, each in ready.items()})
    for form in forms:
        times = {"compilation": compilation[form], "seconds": seconds[form]}
        yield {"work": model, "step": form, "beside": FORMS.get(form, form)} | found[form] | times


def prepare_meta(work: Work, name: str) -> tuple[Any, State, Batch, Batch]:
    """As ``prepare``; the clean batch is one of its own, though its examples are the same."""
    state, step = meta.make_step(work, name)
    state, batch = place(work, state, 1)
    return jax.jit(step, donate_argnums=0), state, batch, batch


def run_meta(args: argparse.Namespace, model: str) -> Iterator[Record]:
    work = steps.make_work(model, args.batch_size)
    ready, found = {}, {}
    for name in ("absgd", *meta.ALGORITHMS):
        step, *inputs = prepare(work, name) if name == "absgd" else prepare_meta(work, name)
        compiled = step.lower(*inputs).compile()
        ready[name], found[name] = (compiled, *inputs), figures(compiled)
    seconds = interleave(args, {name: timer(*each) for name, each in ready.items()})
    for name in ready:
        found[name]["seconds"] = seconds[name]
        yield {"work": model, "step": name, "beside": "absgd"} | found[name]


def run_torch(args: argparse.Namespace, model: str) -> Iterator[Record]:
    once = timer(*prepare(steps.make_work(model, args.batch_size), "absgd"))
    once(1)
    work, length = steps.make_work(model, EXAMPLES), max(1, round(args.seconds / once(1)))
    shape = length, args.batch_size
    order = np.random.default_rng(1).integers(EXAMPLES, size=shape, dtype=np.int32)
    state, step = steps.make_step(work, "absgd")
    state, examples = place(work, state, 1)

    def gather(state, index, examples):
        return step(state, jax.tree.map(lambda x: x[index], examples))

    def scanned(state, order, examples):
        return jax.lax.scan(lambda s, index: (gather(s, index, examples), None), state, order)[0]

    jitted = jax.jit(gather, donate_argnums=0)

    def looped(state, order, examples):
        for index in order:
            state = jitted(state, index, examples)
        return state

    ours, epoch = "absgd_jax, an epoch a call", jax.jit(scanned, donate_argnums=0)
    if jax.default_backend() == "cpu" and model != "mlp":
        # In a loop XLA has no fast kernel for the convolutions of a backward pass on CPUs.
        ours, epoch = "absgd_jax, a step a call", looped
    state = epoch(state, order, examples)
    first = jax.tree.map(lambda x: x[order[0]], work.examples)
    losses, _ = jax.jit(work.losses)(state.params, state.other, first)
    found: dict[str, Record] = {ours: {"loss": losses.mean()}}
    timers = {ours: timer(epoch, state, order, examples)}
    with contextlib.ExitStack() as stack:
        for name, options in (("absgd, eager", []), ("absgd, compiled", ["--compile"])):
            worker = torch_worker(args, model, work, order, options)
            found[name], run = stack.enter_context(worker)
            if run:
                timers[name] = run
        seconds = interleave(args, timers)
    for name, record in found.items():
        if name in seconds:
            record |= {"images": order.size, "seconds": seconds[name]}
        yield {"work": model, "step": name, "beside": ours} | record


@contextlib.contextmanager
def torch_worker(
    args: argparse.Namespace, model: str, work: Work, order: np.ndarray, options: list[str]
) -> Iterator[tuple[Record, Timer | None]]:
    """What benchmarks.torch_speed says of itself, and its timer; or why there is none."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        file = pathlib.Path(folder) / "work.npz"
        inputs, labels, _ = work.examples
        np.savez(file, inputs=inputs, labels=labels, order=order, **torch_parameters(work.params))
        command = [args.torch_python, "-m", "benchmarks.torch_speed", str(file), "--model", model]
        command += ["--temperature", str(steps.TEMPERATURE), "--learning-rate", str(steps.RATE)]
        command += ["--threads", str(len(os.sched_getaffinity(0))), *options]
        process = subprocess.Popen(
            command,
            cwd=pathlib.Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

        def run(calls):
            seconds = []
            for _ in range(calls):
                print(file=process.stdin, flush=True)
                seconds.append(float(process.stdout.readline()))
            return np.mean(seconds)

        try:
            if first := process.stdout.readline():
                yield json.loads(first), run
            else:
                errors.seek(0)
                yield {"missing": errors.read().strip().split("\n")[-1]}, None
        finally:
            process.kill()
            process.communicate()


def torch_parameters(params: Any) -> dict[str, np.ndarray]:
    """Under the names that benchmarks.torch_speed has for them, and in PyTorch's layouts."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    arrays = {}
    for path, p in nnx.to_flat_state(params):
        name = ".".join(str(key) for key in path if key != "layers")
        name = name.replace("kernel", "weight").replace("scale", "weight")
        arrays[name] = np.transpose(p[...], axes[p[...].ndim])
    return arrays


def run_losses(args: argparse.Namespace, n: int) -> Iterator[Record]:
    losses = jax.random.exponential(jax.random.key(0), (n,))
    opt_state = scale_by_attention(steps.TEMPERATURE).init(None)
    functions = {
        "copy": lambda out, losses, opt_state: jnp.copy(losses),
        "softmax": lambda out, losses, opt_state: jax.nn.softmax(losses),
        "tilt": lambda out, losses, opt_state: tilt(losses, opt_state),
        "value_and_grad": lambda out, *args: jax.value_and_grad(lambda *a: tilt(*a).mean())(*args),
    }
    timers = {}
    for name, function in functions.items():
        # Into memory that is there already, as in training.
        out = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, None, losses, opt_state))
        jitted = jax.jit(function, donate_argnums=0, keep_unused=True)
        timers[name] = timer(jitted, out, losses, opt_state)
    yield from growing("losses", n, interleave(args, timers))


def run_parameters(args: argparse.Namespace, n: int) -> Iterator[Record]:
    params, grads, value = jnp.zeros(n), jnp.ones(n), jnp.float32(1)

    def traffic(state, grads, value):
        return tuple(x + grads for x in state)

    def make_update(form):
        tx = steps.make_optimizer(form)

        def update(state, grads, value):
            params, opt_state = state
            updates, opt_state = tx.update(grads, opt_state, params, value=value)
            return optax.apply_updates(params, updates), opt_state

        return update, tx.init(params)

    functions = {
        "traffic": (traffic, jnp.zeros(n)),
        "sgd": make_update("sgd"),
        "absgd": make_update("absgd"),
    }
    timers = {
        name: timer(jax.jit(function, donate_argnums=0), (jnp.copy(params), other), grads, value)
        for name, (function, other) in functions.items()
    }
    yield from growing("parameters", n, interleave(args, timers))


def run_devices(args: argparse.Namespace, n: int) -> Iterator[Record]:
    work = steps.make_work("mlp", n * args.batch_size)
    timers = {form: timer(*prepare(work, form, devices=n)) for form in ON_DEVICES}
    yield from growing("devices", n, interleave(args, timers))


def growing(what: str, n: int, seconds: dict[str, list[float]]) -> Iterator[Record]:
    beside = next(iter(seconds))
    for name, each in seconds.items():
        found = {"growing": what, "n": n, "step": name, "beside": beside, "seconds": each}
        yield {"work": f"{n:,} {what.removesuffix('s') if n == 1 else what}"} | found


def cell(key: str, record: Record, beside: Record) -> str:
    """That of a column: figures of what the comparison is beside, else differences and ratios."""
    first = record is beside
    match key, record.get(key):
        case _, None:
            return ""
        case "flops" | "bytes_accessed", x:
            return f"{x:.4e}" if first else f"{x / beside[key]:.6f}"
        case "memory" | "state", x:
            return f"{x:,}" if first else f"{x - beside[key]:+,}"
        case "seconds" | "compilation", x:
            if first:
                return f"{np.median(x):.3g} s"
            low, median, high = quartiles(record, beside, key)
            return f"{median:.3f} ({low:.3f} to {high:.3f})"
        case "images", x:
            return f"{x / np.median(record['seconds']):,.0f}"
        case "loss", x:
            return f"{x:.5f}"
        case _, x:
            return x


def quartiles(record: Record, beside: Record, key: str = "seconds") -> np.ndarray:
    return np.quantile(np.divide(record[key], beside[key]), [0.25, 0.5, 0.75])


def pairs(records: list[Record]) -> list[tuple[Record, Record]]:
    """Each with what it is beside."""
    found = {(r["work"], r["step"]): r for r in records}
    return [(r, found[r["work"], r["beside"]]) for r in records]


def table(records: list[Record]) -> list[tuple[str, ...]]:
    keys = [key for key in COLUMNS if any(key in r for r in records)]
    rows = [("work", "step", "beside", *(COLUMNS[key] for key in keys))]
    for record, beside in pairs(records):
        name = "" if record is beside else record["beside"]
        cells = (cell(key, record, beside) for key in keys)
        rows.append((record["work"], record["step"], name, *cells))
    return rows


def plot(records: list[Record], path: pathlib.Path, x: str) -> None:
    """A panel for every model, and in it the ratios of each step."""
    compared = [(r, o) for r, o in pairs(records) if r is not o and "missing" not in r]
    if not compared:
        return
    models = list(dict.fromkeys(r["work"] for r, _ in compared))
    names = list(dict.fromkeys(r["step"] for r, _ in compared))
    size = 2.5 + 2.4 * len(models), 1.6 + 0.3 * len(names)
    figure, grid = plt.subplots(1, len(models), figsize=size, sharey=True, squeeze=False)
    for record, beside in compared:
        axes, y = grid[0, models.index(record["work"])], names.index(record["step"])
        low, median, high = quartiles(record, beside)
        spread = [[median - low], [high - median]]
        axes.errorbar(median, y, xerr=spread, fmt="o", color="C0", label="time")
        for key, marker, color in (("flops", "|", "C1"), ("bytes_accessed", "x", "C2")):
            if key in record:
                ratio = record[key] / beside[key]
                axes.plot(ratio, y, marker, color=color, ms=9, label=COLUMNS[key])
    for axes, model in zip(grid[0], models, strict=True):
        axes.axvline(1, color="black", lw=0.8)
        axes.set_title(model, fontsize="medium")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    labels = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(labels.values(), labels, loc="outside right upper")
    figure.supxlabel(x, fontsize="medium")
    figure.savefig(path)
    plt.close(figure)


def plot_growth(records: list[Record], path: pathlib.Path) -> None:
    kinds = {r["growing"]: r["beside"] for r in records}
    figure, grid = plt.subplots(1, len(kinds), figsize=(1 + 3.3 * len(kinds), 3.2), squeeze=False)
    for axes, (kind, beside) in zip(grid[0], kinds.items(), strict=True):
        lines: dict[str, list[tuple[float, ...]]] = {}
        for r, other in pairs(records):
            if r["growing"] == kind and r is not other:
                lines.setdefault(r["step"], []).append((r["n"], *quartiles(r, other)))
        for name, points in lines.items():
            n, low, median, high = np.transpose(points)
            axes.plot(n, median, marker="o", label=name)
            axes.fill_between(n, low, high, alpha=0.2)
        axes.set_xscale("log", base=10 if kind == "parameters" else 2)
        axes.set_ylim(bottom=0)
        axes.set(xlabel=kind, ylabel=f"time / {beside}")
        axes.legend()
    figure.savefig(path)
    plt.close(figure)


def write(args: argparse.Namespace, config: Record, found: dict[str, list[Record]]) -> None:
    records = {f"{part}, {r['work']}, {r['step']}": r for part in found for r in found[part]}
    report.save(args.out / "results.json", records)
    machine = config["machine"]
    devices = ", ".join(sorted(set(machine["devices"])))
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    parts = [
        f"{devices}, {machine['cpus']} cores of {machine['processor']}; {versions}. Batches of "
        f"{args.batch_size}; n = {args.repeats} times, each over {args.seconds:g} s of calls, and "
        f"{args.compilations} compilations: median (quartiles)."
    ]
    for part, each in found.items():
        parts += [f"## {PARTS[part]}", report.markdown(table(each))]
    report.write_table(args, *parts)


def make_jobs(args: argparse.Namespace) -> list[tuple[str, Callable[..., Iterator[Record]], Any]]:
    """The parts, what runs them, and for which model or size."""
    images = [m for m in args.models if m in steps.IMAGE_SHAPES]
    jobs = [
        *(("sgd", run_sgd, model) for model in args.models),
        *(("torch", run_torch, model) for model in images),  # it has one loss an image, no tokens
        *(("meta", run_meta, model) for model in args.models),
        *(("growth", run_losses, n) for n in args.losses),
        *(("growth", run_parameters, n) for n in args.parameters),
        *(("growth", run_devices, n) for n in args.devices),
    ]
    return [job for job in jobs if job[0] in args.parts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, number = parser.add_argument, report.whole_number(1)
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="to run")
    add("--models", nargs="+", choices=steps.MODELS, default=list(steps.MODELS), help="to train")
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of ABSGD, beside SGD")
    add("--batch-size", type=number, default=128, help="examples a step and device")
    add("--repeats", type=number, default=20, help="times that everything is timed")
    add("--seconds", type=report.positive, default=0.5, help="that one timing takes, about")
    add("--compilations", type=number, default=5, help="times that every form is compiled")
    default = [2**k for k in (10, 13, 16, 19, 22, 25)]
    add("--losses", type=number, nargs="+", default=default, metavar="N", help="of growth")
    default = [10**k for k in (5, 6, 7, 8)]
    add("--parameters", type=number, nargs="+", default=default, metavar="N", help="of growth")
    add(
        "--devices",
        type=number,
        nargs="+",
        metavar="N",
        help="of growth; 1, 2, 4, 8 that there are",
    )
    add("--torch-python", default="python3", metavar="FILE", help="interpreter with PyTorch")
    add("--out", type=pathlib.Path, default="out/speed", help="folder to write to")
    args = parser.parse_args()
    if shutil.which(args.torch_python) is None:
        parser.error(f"--torch-python must be an interpreter, got {args.torch_python}")
    # On a CPU there are as many as one asks for.
    most = jax.device_count() if jax.default_backend() != "cpu" else sys.maxsize
    args.devices = args.devices or [n for n in (1, 2, 4, 8) if n <= most]
    if max(args.devices) > most:
        parser.error(f"--devices must not exceed {most}, got {args.devices}")
    report.make_folder(parser, args.out)

    # What is read from a cache is not compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    config = report.describe(args)
    report.save(args.out / "config.json", config)

    found: dict[str, list[Record]] = {}
    for part, run, size in tqdm(make_jobs(args)):
        if run is run_devices and jax.default_backend() == "cpu":
            # They are counted as the backend starts; what came before had the cores as one.
            jax.extend.backend.clear_backends()
            # There are as many threads; while one waits in a collective, its device needs another.
            jax.config.update("jax_num_cpu_devices", 2 * size)
        found.setdefault(part, []).extend(run(args, size))
        write(args, config, found)
    with plt.rc_context(STYLE):
        for part, records in found.items():
            path = args.out / f"{part}.png"
            if part == "growth":
                plot_growth(records, path)
            else:
                plot(records, path, RATIOS[part])
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
