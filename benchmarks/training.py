"""The trainer: many runs as one compiled program, restartable after any epoch."""

import argparse
import functools
import logging
import pathlib
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from absgd_jax import absgd, diagnostics, target_ess, tilt, two_stage
from benchmarks import models, report

log = logging.getLogger("benchmarks")
# Of an error orbax logs the tracebacks of several threads; what it raises is enough.
logging.getLogger("absl").setLevel(logging.CRITICAL)
stop = threading.Event()  # once set, training saves and ends after the epoch
EVALUATED_AT_ONCE = 500

# Per-example losses [B] of logits z [B, C] and labels y; `late` says whether the second stage of
# training has begun.
Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# What is recorded of every epoch of every run, [epochs, runs, ...]: "accuracy" of each class of the
# evaluation split; and, as means over the batches, "mass", the share of the weights that each group
# has, and the scalars of diagnostics.summary.
History = dict[str, Any]


class Images(NamedTuple):
    """On the device, and common to all runs."""

    pixels: Any  # [N, H, W, channels], uint8
    mean: Any  # of a channel, [channels], float32
    std: Any

    def __getitem__(self, index: jax.Array) -> jax.Array:
        return (self.pixels[index] - self.mean) / self.std


class Examples(NamedTuple):
    """Rows of the images, under the labels that a run gives them."""

    index: Any  # [n], int32
    label: Any  # [n], int32
    group: Any  # [n], int32: whose share of the weights is followed


class Run(NamedTuple):
    """What the runs of one program differ in: every leaf has a leading axis over runs."""

    seed: Any  # int32
    learning_rate: Any  # float32
    gamma: Any  # float32
    temperatures: Any  # [stages], float32: the values that λ, infinite before, takes ...
    starts: Any  # [stages], int32: ... from these epochs on
    ess: Any  # float32: effective sample size that λ is tuned to from the last start on; or None
    train: Examples
    evaluation: Examples


class Task(NamedTuple):
    """What is trained on, and how: common to all runs of a program."""

    images: Images
    loss: Loss
    classes: int
    groups: int
    normalized: bool  # whether the logits are cosines


class State(NamedTuple):
    params: Any
    other: Any  # what the model keeps beside: the statistics of batch normalisation
    opt_state: Any
    step: Any


def schedule(args: argparse.Namespace, steps: int) -> optax.Schedule:
    """The learning rate as a share of its peak: a warm-up, then steps, a cosine or nothing."""
    warm_up = round(args.warm_up * steps)
    body = {
        "constant": optax.constant_schedule(1.0),
        "cosine": optax.cosine_decay_schedule(1.0, steps - warm_up),
        "step": optax.piecewise_constant_schedule(
            1.0, {round(m * steps) - warm_up: args.decay for m in args.milestones}
        ),
    }[args.schedule]
    if not warm_up:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warm_up), body], [warm_up])


def augment(images: jax.Array, key: jax.Array) -> jax.Array:
    """Random crops after a padding of 4 pixels, and random flips, of [B, H, W, channels]."""
    corner_key, flip_key = jax.random.split(key)
    corners = jax.random.randint(corner_key, (len(images), 2), 0, 9)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    cropped = jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
    )(padded, corners)
    flip = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(flip, cropped[:, :, ::-1], cropped)


def sharding(args: argparse.Namespace, *axes: str) -> NamedSharding:
    """Over ``args.devices`` devices, of all processes: the leading axis "batch", or nothing."""
    mesh = jax.make_mesh(
        (args.devices,),
        ("batch",),
        devices=jax.devices()[: args.devices],
        axis_types=(AxisType.Auto,),
    )
    return NamedSharding(mesh, PartitionSpec(*axes))


class Program(NamedTuple):
    """Pure functions of one run."""

    init: Callable[[Run], State]
    epoch: Callable[[State, Run, Images, int], tuple[State, History]]
    evaluate: Callable[[State, Run, Images], jax.Array]


def make_program(
    args: argparse.Namespace, task: Task, examples: int, *, frozen: int = 0
) -> Program:
    """The functions of a run of so many examples.

    ``init(run)`` makes the state, ``epoch(state, run, images, number)`` passes over the data once
    and ``evaluate(state, run, images)`` gives the loss of every training example. With ``frozen``
    blocks it is the program of fine-tuning, whose optimiser counts from the second stage on.
    """
    steps = examples // args.batch_size
    second_stage = round(args.second_stage * args.epochs) * steps
    first = second_stage if frozen else 0
    rate = schedule(args, steps * args.epochs)

    def make_model(seed):
        return models.make_model(
            args.model,
            task.images.pixels.shape[1:],
            task.classes,
            rngs=nnx.Rngs(jax.random.key(seed)),
            hidden=args.hidden,
            normalized=task.normalized,
            dtype=args.dtype,
        )

    model = nnx.eval_shape(make_model, 0)
    model.eval()
    evaluated = nnx.graphdef(model)
    model.train()
    for block in model.blocks[:frozen]:
        block.eval()
    trained = nnx.graphdef(model)

    def logits(state, images, index):
        """Of any number of examples, a part of them at a time."""
        model = nnx.merge(evaluated, state.params, state.other)
        parts = jnp.pad(index, (0, -len(index) % EVALUATED_AT_ONCE)).reshape(-1, EVALUATED_AT_ONCE)
        each = jax.lax.map(lambda part: model(images[part]), parts)
        return each.reshape(-1, task.classes)[: len(index)]

    def temperature(run):
        starts = run.starts * steps - first
        if run.ess is None:
            stages = map(optax.constant_schedule, [jnp.inf, *run.temperatures])
            return optax.join_schedules(list(stages), list(starts))
        return two_stage(target_ess(run.ess, init_value=run.temperatures[-1]), starts[-1])

    def optimizer(run):
        tx = absgd(
            lambda count: run.learning_rate * rate(first + count),
            temperature(run),
            momentum=args.momentum,
            weight_decay=args.weight_decay,
            gamma=run.gamma,
        )
        if not frozen:
            return tx

        def label(path, _):
            below = path[0].key == "blocks" and path[1].key < frozen
            return "frozen" if below else "tuned"

        return optax.partition(
            {"tuned": tx, "frozen": optax.set_to_zero()},
            lambda params: jax.tree_util.tree_map_with_path(label, params),
        )

    def init(run):
        _, params, other = nnx.split(make_model(run.seed), nnx.Param, ...)
        return State(params, other, optimizer(run).init(params), jnp.int32(0))

    def epoch(state, run, images, number):
        def step(state, batch):
            index, key = batch
            index = jax.lax.with_sharding_constraint(index, sharding(args, "batch"))
            x, y = images[run.train.index[index]], run.train.label[index]
            if args.augment:
                x = augment(x, key)

            def loss_fn(params):
                model = nnx.merge(trained, params, state.other, copy=True)
                losses = task.loss(model(x), y, state.step >= second_stage)
                _, _, other = nnx.split(model, nnx.Param, ...)
                return tilt(losses, state.opt_state).mean(), (losses, other)

            (value, (losses, other)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params
            )
            updates, opt_state = optimizer(run).update(
                grads, state.opt_state, state.params, value=value, losses=losses
            )
            params = optax.apply_updates(state.params, updates)
            scalars = diagnostics.summary(
                losses, state.opt_state, labels=run.train.group[index], num_classes=task.groups
            )
            mass = jnp.stack([scalars.pop(f"class_mass/{i}") for i in range(task.groups)])
            return State(params, other, opt_state, state.step + 1), {"mass": mass, **scalars}

        order_key, augment_key = jax.random.split(
            jax.random.fold_in(jax.random.key(run.seed), number)
        )
        order = jax.random.permutation(order_key, examples)[: steps * args.batch_size]
        batches = order.reshape(steps, args.batch_size), jax.random.split(augment_key, steps)
        state, records = jax.lax.scan(step, state, batches)
        means = jax.tree.map(lambda r: r.mean(axis=0), records)

        label = run.evaluation.label
        hits = logits(state, images, run.evaluation.index).argmax(axis=-1) == label
        sums = [jnp.zeros(task.classes).at[label].add(x) for x in (hits, jnp.ones(len(label)))]
        return state, {"accuracy": sums[0] / sums[1], **means}

    def evaluate(state, run, images):
        each = logits(state, images, run.train.index)
        return task.loss(each, run.train.label, state.step >= second_stage)

    return Program(init, epoch, evaluate)


class Trained(NamedTuple):
    history: History
    losses: Any  # of every training example at the end, [runs, examples]


def train(args: argparse.Namespace, name: str, task: Task, runs: list[Run], bar: tqdm) -> Trained:
    """Trains the runs, ``args.at_once`` of them as one program.

    What is finished stands in ``args.out`` and is not done again; what isn't is saved there every
    ``args.checkpoint_every`` seconds, and goes on from there.
    """

    @functools.cache
    def program(frozen: int) -> Program:
        examples = len(runs[0].train.label)
        init, epoch, evaluate = make_program(args, task, examples, frozen=frozen)
        whole = {"out_shardings": sharding(args)}
        return Program(
            jax.jit(jax.vmap(init), **whole),
            jax.jit(jax.vmap(epoch, (0, 0, None, None)), donate_argnums=0, **whole),
            jax.jit(jax.vmap(evaluate, (0, 0, None)), **whole),
        )

    parts = []
    for i in range(0, len(runs), args.at_once):
        done = args.out / "runs" / f"{name}-{i}.npz"
        folder = args.out / "checkpoints" / done.stem
        bar.set_description(done.stem)
        if done.exists():
            bar.update(args.epochs)
            history = report.load_arrays(done)
            losses = history.pop("losses")
        else:
            part = jax.tree.map(lambda *leaves: np.stack(leaves), *runs[i : i + args.at_once])
            part = jax.device_put(part, sharding(args))
            with checkpoint_manager(folder) as checkpoints:
                history, losses = train_part(
                    args, done.stem, program, part, task.images, bar, checkpoints
                )
            if jax.process_index() == 0:
                done.parent.mkdir(exist_ok=True)
                with report.replacing(done) as file:
                    np.savez(file, losses=losses, **history)
        parts.append(Trained(history, losses))
        if jax.process_index() == 0 and folder.exists():
            shutil.rmtree(folder)
    histories, losses = zip(*parts, strict=True)
    history = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *histories)
    return Trained(history, np.concatenate(losses))


def checkpoint_manager(folder: pathlib.Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, tree: Any) -> None:
    try:
        checkpoints.save(step, args=ocp.args.StandardSave(jax.tree.leaves(tree)))
    except ValueError as error:  # orbax's, of a disk that is full
        raise OSError(str(error)) from error


def restore(checkpoints: ocp.CheckpointManager, step: int) -> list[Any]:
    try:
        return checkpoints.restore(step, args=ocp.args.StandardRestore())
    except Exception as error:  # of any kind, by the file that is not whole
        raise SystemExit(
            f"{checkpoints.directory / str(step)} is damaged ({error}); delete it, and --resume "
            "does again what it held"
        ) from None


def train_part(
    args: argparse.Namespace,
    name: str,
    program: Callable[[int], Program],
    runs: Run,
    images: Images,
    bar: tqdm,
    checkpoints: ocp.CheckpointManager,
) -> Trained:
    """Trains runs that are stacked."""

    def frozen(epoch):
        return args.fine_tune_from * (epoch >= round(args.second_stage * args.epochs))

    history = []
    start = checkpoints.latest_step() or 0
    if start:
        leaves = restore(checkpoints, start)
        before = program(frozen(start - 1))
        like = jax.eval_shape(before.epoch, jax.eval_shape(before.init, runs), runs, images, 0)
        state, records = jax.tree.unflatten(jax.tree.structure(like), leaves)
        state = jax.device_put(state, sharding(args))
        history = [jax.tree.map(lambda x, i=i: x[i], records) for i in range(start)]
        bar.update(start)
    else:
        state = program(0).init(runs)
    writers = []
    if args.tensorboard and jax.process_index() == 0:
        from benchmarks.events import EventFile  # which needs what nothing else does

        folders = [args.out / "tensorboard" / f"{name}.{i}" for i in range(len(runs.seed))]
        writers = [EventFile(folder, start) for folder in folders]
    saved = time.monotonic()
    for epoch in range(start, args.epochs):
        if epoch and frozen(epoch) != frozen(epoch - 1):
            state = state._replace(opt_state=program(frozen(epoch)).init(runs).opt_state)
        state, record = program(frozen(epoch)).epoch(state, runs, images, epoch)
        record = jax.device_get(record)
        history.append(record)
        bar.update()
        log.info(
            "%s, epoch %d of %d, accuracies of the runs: lowest %.4f, mean %.4f, highest %.4f",
            *(name, epoch + 1, args.epochs),
            *(f(record["accuracy"].mean(axis=1)) for f in (np.min, np.mean, np.max)),
        )
        for i, writer in enumerate(writers):
            scalars = {tag: of_runs[i] for tag, of_runs in record.items()}
            for field in ("accuracy", "mass"):
                each = enumerate(scalars.pop(field))
                scalars |= {f"{field}/{group}": value for group, value in each}
            writer.add(epoch, scalars)
        # The first process decides for all.
        due = stop.is_set() or time.monotonic() - saved >= args.checkpoint_every
        stopping, due = broadcast_one_to_all((stop.is_set(), due))
        if due:
            for writer in writers:
                writer.flush()  # what is before the checkpoint is not trained again
            save(checkpoints, epoch + 1, (state, stack(history)))
            saved = time.monotonic()
        if stopping:
            raise KeyboardInterrupt
    for writer in writers:
        writer.close()
    last = program(frozen(args.epochs - 1))
    losses = jax.device_get(last.evaluate(state, runs, images))
    return Trained(stack(history), losses)


def stack(epochs: list[History]) -> History:
    return jax.tree.map(lambda *x: np.stack(x), *epochs)
