"""What a step of ABSGD costs: beside SGD, the authors' PyTorch package, and learnt weights.

    python -m benchmarks.speed

Of its parts,

    sgd       has every form of ABSGD beside SGD in that form, as in benchmarks.engine.steps;
    torch     trains by the authors' PyTorch package, eager and compiled, and by ABSGD here: the
              same network, parameters, examples, order and threads. The package, extra `reference`,
              may be in an environment of its own, whose interpreter is --torch-python;
    meta      has the algorithms of benchmarks.engine.meta, which learn the weights, beside ABSGD;
    growth    has softmax of n losses, and value and gradient of their tilted mean, beside a copy
              of them, and the update of n parameters beside the same traffic of memory.

The first line of a comparison has what the others are beside. In these, numbers with a sign are
differences and those without are ratios. What is compared is timed in turn, there and back; a ratio
of times is the median over the turns, with its quartiles.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from absgd_jax import scale_by_attention, Sums, tilt, zero_sums
from benchmarks.engine import hlo, meta, models, plots, report, steps
from benchmarks.engine.config import Config as BaseConfig
from benchmarks.engine.config import fail, FROM_1, OR_NONE, POSITIVE, read
from benchmarks.engine.steps import Batch, FORMS, State, Work

PARTS = {
    "sgd": "Beside SGD",
    "torch": "Beside the authors' PyTorch package",
    "meta": "Beside learnt weights",
    "growth": "As it grows",
}
EXAMPLES = 10_000  # of the data set that an epoch draws from
SPREAD = "{1:.3f} ({0:.3f} to {2:.3f})"
# Titles, and formats of a figure alone, and of its quartiles and difference beside another.
COLUMNS = {
    "flops": ("FLOPs", "{:.4e}", "{1:.6f}"),
    "bytes_accessed": ("bytes accessed", "{:.4e}", "{1:.6f}"),
    "memory": ("memory, bytes", "{:,.0f}", "{3:+,}"),
    "state": ("state, bytes", "{:,.0f}", "{3:+,}"),
    "launches": ("launches", "{:,.0f}", "{3:+,}"),
    "lowering": ("lowering", "{:.3g} s", SPREAD),
    "compilation": ("compilation", "{:.3g} s", SPREAD),
    "images": ("images a second", "{:,.0f}", ""),
    "seconds": ("time", "{:.3g} s", SPREAD),
    "loss": ("loss after an epoch", "{:.5f}", ""),
    "missing": ("not measured", "{}", ""),
}

PHASES = "lowering", "compilation"

Job = tuple[Any, ...]  # a function, and its arguments, of which it returns the next first one
Timer = Callable[[int], float]  # of a number of calls: the seconds of one
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """What to measure, and how often."""

    out: pathlib.Path = pathlib.Path("out/speed")  # folder to write to
    parts: tuple[Literal[*PARTS], ...] = tuple(PARTS)  # to run
    models: tuple[Literal[*steps.MODELS], ...] = steps.MODELS  # to train
    forms: tuple[Literal[*FORMS], ...] = tuple(FORMS)  # of ABSGD, beside SGD
    batch_size: Annotated[int, FROM_1] = 128  # examples a step and device
    repeats: Annotated[int, FROM_1] = 20  # times that everything is timed
    seconds: Annotated[float, POSITIVE] = 0.5  # that one timing takes, about
    compilations: Annotated[int, FROM_1] = 5  # times that every form is compiled
    # numbers of losses, of growth
    losses: Annotated[tuple[int, ...], FROM_1, OR_NONE] = tuple(2**k for k in range(10, 26, 3))
    # numbers of parameters, of growth
    parameters: Annotated[tuple[int, ...], FROM_1, OR_NONE] = tuple(10**k for k in (5, 6, 7, 8))
    torch_python: str = "python3"  # interpreter with PyTorch


def timer(function: Callable[..., Any], state: Any, *inputs: Any) -> Timer:
    def run(calls):
        nonlocal state
        start = time.perf_counter()
        for _ in range(calls):
            state = function(state, *inputs)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / calls

    return run


def in_turn(names: Iterable[str], times: int) -> list[str]:
    """There and back."""
    return [name for i in range(times) for name in list(names)[:: -1 if i % 2 else 1]]


def compare(
    config: Config, work: str, found: dict[str, Record], timers: dict[str, Timer]
) -> list[Record]:
    """What was found, with the seconds of a call of what has a timer, beside the first."""
    for run in timers.values():
        run(1)
    first = next(iter(timers))
    calls = max(1, round(config.seconds / timers[first](1)))
    for name in in_turn(timers, config.repeats):
        found[name].setdefault("seconds", []).append(timers[name](calls))
    return [{"work": work, "step": name, "beside": first} | r for name, r in found.items()]


def prepare(work: Work, name: str, devices: int = 1) -> Job:
    """The jitted step of that name, and what to call it with."""
    mesh = steps.make_mesh(jax.devices()[:devices])
    learnt = name in meta.ALGORITHMS
    made = meta.make_step(work, name) if learnt else steps.make_step(work, name, mesh)
    return steps.place(mesh, *made)


def figures(compiled: Any, state: State, *batches: Batch) -> Record:
    """The compiler's, of one step on one device, and the bytes of the optimiser's state."""
    cost = compiled.cost_analysis()
    return {
        "flops": round(cost["flops"]),
        "bytes_accessed": round(cost["bytes accessed"]),
        "memory": compiled.memory_analysis().temp_size_in_bytes,
        "launches": hlo.launches(compiled.as_text()),
        "state": sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
    }


def run_steps(config: Config, model: str, names: list[str]) -> list[Record]:
    work = steps.make_work(model, config.batch_size)
    found: dict[str, Record] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    timers = {}
    for name in in_turn(names, 1 + config.compilations):
        step, *inputs = prepare(work, name)
        start = time.perf_counter()
        lowered = step.lower(*inputs)
        between = time.perf_counter()
        compiled = lowered.compile()
        times[name].append((between - start, time.perf_counter() - between))
        # The first time JAX traces much that it then knows.
        seconds = zip(*times[name][1:], strict=True)
        found[name] = figures(compiled, *inputs) | dict(zip(PHASES, seconds, strict=False))
        timers[name] = timer(compiled, *inputs)
    return compare(config, model, found, timers)


def run_torch(config: Config, model: str) -> list[Record]:
    once = timer(*prepare(steps.make_work(model, config.batch_size), "absgd"))
    once(1)
    shape = max(1, round(config.seconds / once(1))), config.batch_size
    order = np.random.default_rng(1).integers(EXAMPLES, size=shape, dtype=np.int32)
    work = steps.make_work(model, EXAMPLES)
    step, state, examples = prepare(work, "absgd")

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state, index, examples):
        return step(state, jax.tree.map(lambda x: x[index], examples))

    @functools.partial(jax.jit, donate_argnums=0)
    def scanned(state, order, examples):
        return jax.lax.scan(lambda s, index: (train(s, index, examples), None), state, order)[0]

    def looped(state, order, examples):
        return functools.reduce(lambda s, index: train(s, index, examples), order, state)

    ours, epoch = "absgd_jax, an epoch a call", scanned
    if models.is_slow_in_a_loop(model):
        ours, epoch = "absgd_jax, a step a call", looped
    state = epoch(state, order, examples)
    first = jax.tree.map(lambda x: x[order[0]], work.examples)
    losses, _ = jax.jit(work.losses)(state.params, state.other, first)
    found = {ours: {"images": order.size, "loss": losses.mean()}}
    timers = {ours: timer(epoch, state, order, examples)}
    with contextlib.ExitStack() as stack:
        file = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "work.npz"
        inputs, labels, _ = work.examples
        np.savez(file, inputs=inputs, labels=labels, order=order, **torch_parameters(work.params))
        for name, compiled in (("absgd, eager", False), ("absgd, compiled", True)):
            told = model, steps.TEMPERATURE, steps.RATE, report.cpus(), compiled
            found[name], run = stack.enter_context(torch_worker(config, file, told))
            if run:
                found[name]["images"], timers[name] = order.size, run
        return compare(config, model, found, timers)


@contextlib.contextmanager
def torch_worker(
    config: Config, file: pathlib.Path, told: tuple[Any, ...]
) -> Iterator[tuple[Record, Timer | None]]:
    """What benchmarks.torch_speed says of itself, and its timer; or why there is none."""
    command = [config.torch_python, "-m", "benchmarks.torch_speed", file, json.dumps(told)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            cwd=pathlib.Path(__file__).parents[1],
            stdin=subprocess.PIPE,  # at whose end it ends
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):

        def run(calls):
            seconds = []
            for _ in range(calls):
                print(file=process.stdin, flush=True)
                seconds.append(float(process.stdout.readline()))
            return np.mean(seconds)

        if said := process.stdout.readline():
            yield json.loads(said), run
        else:
            errors.seek(0)
            yield {"missing": errors.read().strip().split("\n")[-1]}, None


def torch_parameters(params: Any) -> dict[str, np.ndarray]:
    """Under the names that benchmarks.torch_speed has for them, and in PyTorch's layouts."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    arrays = {}
    for path, p in nnx.to_flat_state(params):
        name = ".".join(str(key) for key in path if key != "layers")
        name = name.replace("kernel", "weight").replace("scale", "weight")
        arrays[name] = np.transpose(p[...], axes[p[...].ndim])
    return arrays


def losses(config: Config, n: int) -> dict[str, Job]:
    each = jax.random.exponential(jax.random.key(0), (n,))
    opt_state = scale_by_attention(steps.TEMPERATURE).init(None)

    def mean(losses, sums, opt_state):
        return tilt(losses, opt_state, sums).mean()

    functions = {
        "copy": lambda losses, sums, opt_state: jnp.copy(losses),
        "softmax": lambda losses, sums, opt_state: jax.nn.softmax(losses),
        "value_and_grad": jax.value_and_grad(mean, argnums=(0, 1)),
    }
    inputs = each, zero_sums(), opt_state

    def job(function):
        # Into memory that is there already, as in training.
        out = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *inputs))
        return lambda out, *args: function(*args), out, *inputs

    return {name: job(function) for name, function in functions.items()}


def parameters(config: Config, n: int) -> dict[str, Job]:
    grads, sums = jnp.ones(n), Sums(jnp.zeros(10).at[::6].set(1.0))  # exp and weight of losses of V

    def traffic(state, grads, sums):
        return tuple(x + grads for x in state)

    def job(form):
        tx = steps.make_optimizer(form)

        def update(state, grads, sums):
            params, opt_state = state
            updates, opt_state = tx.update(grads, opt_state, params, sums=sums)
            return optax.apply_updates(params, updates), opt_state

        return update, (jnp.zeros(n), tx.init(grads)), grads, sums

    state = jnp.zeros(n), jnp.zeros(n)
    return {"traffic": (traffic, state, grads, sums), "sgd": job("sgd"), "absgd": job("absgd")}


GROWING = {"losses": losses, "parameters": parameters}


def run_growth(config: Config, what: str, n: int) -> list[Record]:
    jobs = GROWING[what](config, n)
    timers = {
        name: timer(jax.jit(function, donate_argnums=0, keep_unused=True), *inputs)
        for name, (function, *inputs) in jobs.items()
    }
    return compare(config, f"{n:,} {what}", {name: {} for name in jobs}, timers)


def make_jobs(config: Config) -> list[tuple[Any, ...]]:
    """Parts, what runs them, and its arguments."""
    forms = [form for form in FORMS if form in config.forms]
    beside = {sgd: [sgd, *(f for f in forms if FORMS[f] == sgd)] for sgd in map(FORMS.get, forms)}
    images = [m for m in config.models if m in steps.IMAGE_SHAPES]
    jobs = [
        *(("sgd", run_steps, m, names) for m in config.models for names in beside.values()),
        *(("torch", run_torch, m) for m in images),  # it has one loss an image, and no tokens
        *(("meta", run_steps, m, ["absgd", *meta.ALGORITHMS]) for m in config.models),
        *(("growth", run_growth, what, n) for what in GROWING for n in getattr(config, what)),
    ]
    return [job for job in jobs if job[0] in config.parts]


def pairs(records: list[Record]) -> list[tuple[Record, Record]]:
    """Each with what it is beside."""
    found = {(r["work"], r["step"]): r for r in records}
    return [(r, found[r["work"], r["beside"]]) for r in records]


def cell(key: str, record: Record, beside: Record) -> str:
    _, alone, together = COLUMNS[key]
    if key not in record:
        return ""
    x, other = record[key], beside.get(key)
    if key == "images":
        x /= np.median(record["seconds"])
    if not together:
        return alone.format(x)
    if record is beside:
        return alone.format(np.median(x))
    quartiles = np.quantile(np.divide(x, other), [0.25, 0.5, 0.75])
    return together.format(*quartiles, np.subtract(x, other))


def table(records: list[Record]) -> str:
    keys = [key for key in COLUMNS if any(key in r for r in records)]
    rows = [("work", "step", "beside", *(COLUMNS[key][0] for key in keys))]
    for record, beside in pairs(records):
        name = "" if record is beside else record["beside"]
        cells = (cell(key, record, beside) for key in keys)
        rows.append((record["work"], record["step"], name, *cells))
    return report.markdown(rows)


def plot(records: list[Record], path: pathlib.Path) -> None:
    """Ratios of times, one of every turn."""
    ratios = {
        (record["work"], record["step"]): np.divide(record["seconds"], beside["seconds"])
        for record, beside in pairs(records)
        if record is not beside and "seconds" in record
    }
    if ratios:
        plots.dots({"time / that of what it is beside": ratios}, path)


def write(config: Config, description: Record, found: dict[str, list[Record]]) -> str:
    """The table, which it writes, too."""
    machine = description["machine"]
    devices = ", ".join(sorted(set(machine["devices"])))
    versions = ", ".join(f"{name} {version}" for name, version in description["versions"].items())
    parts = [
        f"{devices}, {machine['cpus']} cores of {machine['processor']}; {versions}. Batches of "
        f"{config.batch_size}; n = {config.repeats} times, each over {config.seconds:g} s of "
        f"calls, and {config.compilations} compilations: median (quartiles)."
    ]
    parts += [f"## {PARTS[part]}\n\n{table(records)}" for part, records in found.items()]
    results = {f"{part}, {r['work']}, {r['step']}": r for part in found for r in found[part]}
    report.write(config.out, results, *parts)
    return "\n\n".join(parts)


def main() -> None:
    config = read(Config, __doc__)
    if shutil.which(config.torch_python) is None:
        fail(f"--torch-python must be an interpreter, got {config.torch_python}")
    jobs = make_jobs(config)
    if not jobs:
        fail(f"--models must have one of images for --parts torch, got {', '.join(config.models)}")
    # What is read from a cache is not compiled.
    jax.config.update("jax_enable_compilation_cache", False)
    found: dict[str, list[Record]] = {}
    with report.folder(config) as description:
        for part, run, *args in tqdm(jobs):
            found.setdefault(part, []).extend(run(config, *args))
            text = write(config, description, found)
        for part in found.keys() - {"growth"}:  # in which nothing is compared
            plot(found[part], config.out / f"{part}.png")
    print(text)


if __name__ == "__main__":
    main()
