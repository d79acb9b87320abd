"""The trainer: many runs as one compiled program, restartable after any epoch.

    Config    how to train
    Task      what to train on: images, classes, a loss
    Run       what the runs of a program differ in: seed, learning rate, λ, examples
    Program   the functions of one run
    Trained   what became of the runs

Runs of one program are stacked, and trained side by side.
"""

import collections
import dataclasses
import datetime
import functools
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from absgd_jax import diagnostics, get_temperature, scale_by_attention, target_ess, tilt, two_stage
from benchmarks.engine import models, report
from benchmarks.engine.config import (
    ABOVE_0,
    BELOW_1,
    FROM_0,
    FROM_1,
    NOT_NEGATIVE,
    OR_NONE,
    POSITIVE,
    SHARE,
)
from benchmarks.engine.config import Config as BaseConfig
from benchmarks.engine.methods import Batch, Method, Parts

stop = threading.Event()  # once set, training saves and ends after the epoch
EVALUATED_AT_ONCE = 500

# What is recorded of every epoch of every run, [epochs, runs, ...]: "accuracy" of each group of the
# evaluation split; and, as means over the batches, "mass", the share of the weights that each group
# of the training examples has, and the scalars of diagnostics.summary.
History = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """How models are trained."""

    resume: bool = False  # go on with what --out holds
    model: Literal[*models.NAMES] = "mlp"  # what to train
    # widths of the hidden layers of the MLP
    hidden: Annotated[tuple[int, ...], FROM_1, OR_NONE] = (64,)
    dtype: Literal["float32", "bfloat16"] = "float32"  # to compute in
    epochs: Annotated[int, FROM_1] = 60  # passes over the data
    batch_size: Annotated[int, FROM_1] = 32  # examples a step
    augment: bool = False  # random crops and flips
    # share of the epochs before class weights, truncation and fine-tuning set in
    second_stage: Annotated[float, SHARE] = 0.8
    # in the second stage, train this block and those above it alone
    fine_tune_from: Annotated[int, FROM_0] = 0
    schedule: Literal["step", "cosine", "constant"] = "step"  # of the learning rate
    # shares of the epochs after which the rate falls
    milestones: Annotated[tuple[float, ...], SHARE, OR_NONE] = (0.8, 0.9)
    decay: Annotated[float, NOT_NEGATIVE] = 0.01  # what the rate is multiplied by then
    warm_up: Annotated[float, BELOW_1] = 0.025  # share of the epochs
    momentum: Annotated[float, BELOW_1] = 0.9  # of SGD
    weight_decay: Annotated[float, NOT_NEGATIVE] = 2e-4  # L2 coefficient
    gamma: Annotated[float, ABOVE_0] = 0.9  # weight of the newest batch in ABSGD's average
    # of λ > 0; if not given that of the temperature, 0 or 2
    damping: Annotated[float | None, NOT_NEGATIVE] = None
    clip: Annotated[float | None, POSITIVE] = None  # largest norm of the weighted gradients, if any
    # runs in one compiled program; if not given 1000, or 1 where there are convolutions, which are
    # slow side by side
    at_once: Annotated[int | None, FROM_1] = None
    checkpoint_every: Annotated[float, NOT_NEGATIVE] = 30.0  # seconds between checkpoints

    @property
    def runs_at_once(self) -> int:
        return self.at_once or (1 if self.model in models.CONVOLUTIONAL else 1000)

    @property
    def first_epoch_of_second_stage(self) -> int:
        return round(self.second_stage * self.epochs)

    def frozen(self, epoch: int) -> int:
        """Blocks that are not trained in this epoch."""
        return self.fine_tune_from * (epoch >= self.first_epoch_of_second_stage)


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
    group: Any  # [n], int32: whose share of the weights, or whose accuracy, is followed


class Task(NamedTuple):
    """What is trained on: common to all runs of a program."""

    images: Images
    classes: int
    groups: int  # of the training examples
    evaluated: int  # groups of the others
    method: Method
    features: bool = False  # whether what the head sees of the evaluation split is kept


class Run(NamedTuple):
    """What the runs of a program differ in: every leaf has a leading axis over runs."""

    seed: Any  # int32
    learning_rate: Any  # float32
    gamma: Any  # float32
    temperatures: Any  # [stages], float32: the values that λ, infinite before, takes ...
    starts: Any  # [stages], int32: ... from these epochs on
    ess: Any  # float32: effective sample size that λ is tuned to from the last start on; or None
    train: Examples
    evaluation: Examples
    class_counts: Any  # [classes], int32: of the training examples
    clean: Examples  # as many of every class, for learnt weights
    weight: Any = None  # [n], float32: of the training examples, beside ABSGD's; 1, if not given


class TrainState(NamedTuple):
    params: Any
    other: Any  # what the model keeps beside: the statistics of batch normalisation
    opt_state: Any
    step: Any
    memory: Any  # what the method keeps


class Program(NamedTuple):
    """Pure functions of one run."""

    init: Callable[[Run], TrainState]
    shuffle: Callable[[Run, int], Any]  # the batches of an epoch, by its number: [steps, ...]
    step: Callable[[TrainState, Run, Images, Any], tuple[TrainState, History]]  # of a batch
    accuracy: Callable[[TrainState, Run, Images], jax.Array]  # of each group that is evaluated
    # "losses" of the training examples, and whether they are classified "wrong"; if the task asks
    # for them, "features" of the evaluation split, and the "head".
    outcome: Callable[[TrainState, Run, Images], dict[str, jax.Array]]


class Trained(NamedTuple):
    """What became of the runs."""

    history: History
    # Of every training example at the end, [runs, examples].
    losses: Any
    wrong: Any  # whether it is classified wrongly
    # If the task asks for them; their product is the logits of the evaluation split.
    features: Any = None  # what the head sees, and a 1: [runs, examples, features]
    head: Any = None  # the kernel, and below it the bias: [runs, features, classes]


def pick(trained: Trained, rows: slice) -> Trained:
    """Some of the runs."""
    history = {k: x[:, rows] for k, x in trained.history.items()}
    return Trained(history, *jax.tree.map(lambda x: x[rows], trained[1:]))


def schedule(config: Config, steps: int) -> optax.Schedule:
    """The learning rate as a share of its peak: a warm-up, then steps, a cosine or nothing."""
    warm_up = round(config.warm_up * steps)
    falls = collections.Counter(round(m * steps) - warm_up for m in config.milestones)
    body = {
        "constant": optax.constant_schedule(1.0),
        "cosine": optax.cosine_decay_schedule(1.0, max(steps - warm_up, 1)),
        "step": optax.piecewise_constant_schedule(
            1.0, {step: config.decay**n for step, n in falls.items()}
        ),
    }[config.schedule]
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


def make_program(config: Config, task: Task, examples: int, *, frozen: int = 0) -> Program:
    """The functions of a run of so many examples.

    With ``frozen`` blocks it is the program of fine-tuning, whose optimiser counts from the second
    stage on.
    """
    steps = examples // config.batch_size
    second_stage = config.first_epoch_of_second_stage * steps
    first = second_stage if frozen else 0
    rate = schedule(config, steps * config.epochs)

    def make_model(seed):
        return models.make_model(
            config.model,
            task.images.pixels.shape[1:],
            task.classes,
            rngs=nnx.Rngs(jax.random.key(seed)),
            hidden=config.hidden,
            normalized=task.method.normalized,
            dtype=config.dtype,
        )

    model = nnx.eval_shape(make_model, 0)
    model.eval()
    evaluated = nnx.graphdef(model)
    model.train()
    for block in model.blocks[:frozen]:
        block.eval()
    trained = nnx.graphdef(model)

    def temperature(run):
        starts = run.starts * steps - first
        if run.ess is None:
            stages = map(optax.constant_schedule, [jnp.inf, *run.temperatures])
            return optax.join_schedules(list(stages), list(starts))
        return two_stage(target_ess(run.ess, init_value=run.temperatures[-1]), starts[-1])

    def optimizer(run):
        tx = optax.chain(
            scale_by_attention(temperature(run), gamma=run.gamma, damping=config.damping),
            optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(lambda count: run.learning_rate * rate(first + count), config.momentum),
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
        memory = task.method.way.init(params, examples, task.classes, task.groups)
        return TrainState(params, other, optimizer(run).init(params), jnp.int32(0), memory)

    def shuffle(run, number):
        order_key, augment_key = jax.random.split(
            jax.random.fold_in(jax.random.key(run.seed), number)
        )
        order = jax.random.permutation(order_key, examples)[: steps * config.batch_size]
        return order.reshape(steps, config.batch_size), jax.random.split(augment_key, steps)

    def step(state, run, images, batch):
        index, key = batch
        x, y = images[run.train.index[index]], run.train.label[index]
        if config.augment:
            x = augment(x, key)

        def forward(params, x):
            model = nnx.merge(trained, params, state.other, copy=True)
            return model(x), nnx.split(model, nnx.Param, ...)[2]

        weight = jnp.ones(len(index)) if run.weight is None else run.weight[index]
        parts = Parts(
            forward,
            lambda z, y: task.method.loss(z, y, run.class_counts, state.step >= second_stage),
            lambda losses, sums: tilt(losses, state.opt_state, sums),
            lambda losses: (weight * losses).mean(),
            get_temperature(state.opt_state),
        )
        batch = Batch(
            *(index, x, y, run.train.group[index], weight),
            clean=(images[run.clean.index], run.clean.label),
            key=jax.random.fold_in(key, 0),  # the key itself has drawn the augmentation
            rate=run.learning_rate * rate(state.step),
            progress=state.step / (steps * config.epochs),
        )
        (grads, sums), (losses, other, memory) = task.method.way.step(
            parts, state.params, state.memory, batch
        )
        updates, opt_state = optimizer(run).update(grads, state.opt_state, state.params, sums=sums)
        params = optax.apply_updates(state.params, updates)
        scalars = diagnostics.summary(
            losses, state.opt_state, labels=run.train.group[index], num_classes=task.groups
        )
        mass = jnp.stack([scalars.pop(f"class_mass/{i}") for i in range(task.groups)])
        state = TrainState(params, other, opt_state, state.step + 1, memory)
        return state, {"mass": mass, **scalars}

    def of_each(function, images, index):
        """Of any number of examples, a part of them at a time."""
        parts = jnp.pad(index, (0, -len(index) % EVALUATED_AT_ONCE)).reshape(-1, EVALUATED_AT_ONCE)
        each = jax.lax.map(lambda part: function(images[part]), parts)
        return each.reshape(-1, each.shape[-1])[: len(index)]

    def logits(state, images, index):
        return of_each(nnx.merge(evaluated, state.params, state.other), images, index)

    def accuracy(state, run, images):
        index, label, group = run.evaluation
        hits = logits(state, images, index).argmax(axis=-1) == label
        sums = [jnp.zeros(task.evaluated).at[group].add(x) for x in (hits, jnp.ones(len(group)))]
        return sums[0] / sums[1]

    def outcome(state, run, images):
        z, y = logits(state, images, run.train.index), run.train.label
        losses = task.method.loss(z, y, run.class_counts, state.step >= second_stage)
        found = {"losses": losses, "wrong": z.argmax(axis=-1) != y}
        if task.features:
            model = nnx.merge(evaluated, state.params, state.other)
            features = of_each(model.features, images, run.evaluation.index)
            found["features"] = jnp.pad(features, ((0, 0), (0, 1)), constant_values=1)
            found["head"] = jnp.vstack([model.head.kernel[...], model.head.bias[...]])
        return found

    return Program(init, shuffle, step, accuracy, outcome)


def run_epoch(
    program: Program, state: TrainState, run: Run, images: Images, number: int
) -> tuple[TrainState, History]:
    """Passes over the data once."""

    def step(state, batch):
        return program.step(state, run, images, batch)

    state, records = jax.lax.scan(step, state, program.shuffle(run, number))
    means = jax.tree.map(lambda r: r.mean(axis=0), records)
    return state, {"accuracy": program.accuracy(state, run, images), **means}


class Compiled(NamedTuple):
    """A program for runs that are stacked."""

    init: Callable[[Run], TrainState]
    epoch: Callable[[TrainState, Run, Images, int], tuple[TrainState, History]]
    outcome: Callable[[TrainState, Run, Images], dict[str, jax.Array]]


def compile_program(config: Config, program: Program) -> Compiled:
    def of_runs(function, in_axes, **kwargs):
        return jax.jit(jax.vmap(function, in_axes), **kwargs)

    shuffle = of_runs(program.shuffle, (0, None))
    accuracy = of_runs(program.accuracy, (0, 0, None))

    def step(state, run, images, batches, i):
        return program.step(state, run, images, jax.tree.map(lambda x: x[i], batches))

    step = of_runs(step, (0, 0, None, 0, None), donate_argnums=0)

    def stepwise(state, runs, images, number):
        batches, records = shuffle(runs, number), []
        for i in range(batches[0].shape[1]):
            state, record = step(state, runs, images, batches, i)
            records.append(record)
        means = {k: x.mean(axis=0) for k, x in report.stack(jax.device_get(records)).items()}
        return state, {"accuracy": accuracy(state, runs, images), **means}

    epoch = of_runs(functools.partial(run_epoch, program), (0, 0, None, None), donate_argnums=0)
    if models.is_slow_in_a_loop(config.model):
        epoch = stepwise
    return Compiled(of_runs(program.init, 0), epoch, of_runs(program.outcome, (0, 0, None)))


def train(
    config: Config, name: str, task: Task, runs: list[Run], *, bar: tqdm, started: str
) -> Trained:
    """Trains the runs, some of them as one program.

    What is finished stands in ``config.out`` and is not done again; what isn't is saved there every
    ``config.checkpoint_every`` seconds, and goes on from there. ``started`` tells what this run
    has made from what an earlier one left.
    """

    @functools.cache
    def program(frozen: int) -> Compiled:
        examples = len(runs[0].train.label)
        return compile_program(config, make_program(config, task, examples, frozen=frozen))

    parts, name = [], name.replace(":", "-")  # which names files
    for i in range(0, len(runs), config.runs_at_once):
        done = config.out / "runs" / f"{name}-{i}.npz"
        checkpoint = done.with_suffix(".checkpoint")
        bar.set_description(done.stem)
        if found := report.load_part(done, started):
            bar.update(config.epochs)
        else:
            part = jax.tree.map(lambda *x: np.stack(x), *runs[i : i + config.runs_at_once])
            part = jax.device_put(part)
            found = train_part(config, program, part, task.images, bar, checkpoint, started)
            report.save_part(done, started, found)
        checkpoint.unlink(missing_ok=True)
        outcomes = (found.pop(name, None) for name in Trained._fields[1:])
        parts.append(Trained(found, *outcomes))
    history = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *(p.history for p in parts))
    return Trained(history, *jax.tree.map(lambda *x: np.concatenate(x), *(p[1:] for p in parts)))


def train_part(
    config: Config,
    program: Callable[[int], Compiled],
    runs: Run,
    images: Images,
    bar: tqdm,
    checkpoint: pathlib.Path,
    started: str,
) -> dict[str, Any]:
    """The history of runs that are stacked, and their losses."""
    state, history, start = program(config.frozen(0)).init(runs), [], 0
    if saved := report.load_part(checkpoint, started):
        start = int(saved.pop("epochs"))
        like = jax.eval_shape(program(config.frozen(start - 1)).init, runs)
        leaves = [saved.pop(f"leaf {i}") for i in range(len(jax.tree.leaves(like)))]
        state = jax.device_put(jax.tree.unflatten(jax.tree.structure(like), leaves))
        history = [{k: x[i] for k, x in saved.items()} for i in range(start)]
        bar.update(start)
    at = time.monotonic()
    for epoch in range(start, config.epochs):
        frozen = config.frozen(epoch)
        if epoch and frozen != config.frozen(epoch - 1):
            state = state._replace(opt_state=program(frozen).init(runs).opt_state)
        state, record = program(frozen).epoch(state, runs, images, epoch)
        record = jax.device_get(record)
        history.append(record)
        bar.update()
        log(config, f"{checkpoint.stem}, epoch {epoch + 1} of {config.epochs}", record["accuracy"])
        stopping = stop.is_set()
        if stopping or time.monotonic() - at >= config.checkpoint_every:
            leaves = {f"leaf {i}": x for i, x in enumerate(jax.tree.leaves(state))}
            saved = {"epochs": epoch + 1, **leaves, **report.stack(history)}
            report.save_part(checkpoint, started, saved)
            at = time.monotonic()
        if stopping:
            raise KeyboardInterrupt
    outcome = program(config.frozen(config.epochs - 1)).outcome(state, runs, images)
    return jax.device_get(outcome) | report.stack(history)


def log(config: Config, event: str, accuracy: np.ndarray) -> None:
    """Adds a line to log.txt, with the accuracies [runs, classes]."""
    low, mean, high = (f(accuracy.mean(axis=1)) for f in (np.min, np.mean, np.max))
    line = f"lowest {low:.4f}, mean {mean:.4f}, highest {high:.4f}"
    with (config.out / "log.txt").open("a", encoding="utf-8") as file:
        now = datetime.datetime.now()
        print(f"{now:%Y-%m-%d %H:%M:%S} {event}, accuracies of the runs: {line}", file=file)
