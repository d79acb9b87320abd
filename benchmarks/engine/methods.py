"""Ways to train: what a step differentiates, where it isn't the mean of the losses of a batch.

A method is written as ``LOSS[:KNOB][+WAY[:KNOB]]``: ``balanced_softmax:1.25`` is logit adjustment
by τ = 1.25, ``cross_entropy+mixup`` trains on mixed images, ``focal+sam:0.1`` is sharpness-aware.

    mixup            Zhang et al., ICLR 2018, arXiv 1710.09412; the knob is α
    sam              Foret et al., ICLR 2021, arXiv 2010.01412; the knob is ρ
    elr              early-learning regularisation, Liu et al., NeurIPS 2020, arXiv 2007.00151; the
                     knob is the coefficient of the regulariser
    elr_teacher      the same, held to what a moving average of the parameters predicts
    teacher_score    weights by the loss that this teacher has, in place of the network's own
    l2rw             learning to reweight; see ``benchmarks.engine.meta``
    meta_weight_net  Meta-Weight-Net, likewise; the knob is the learning rate of its network
    within           losses less the level of their class; see ``levels``
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from absgd_jax import robust_loss, Sums
from absgd_jax.losses import early_learning
from benchmarks.engine import meta
from benchmarks.engine.config import ABOVE_0, Must, NOT_NEGATIVE, POSITIVE, readable, SHARE
from benchmarks.engine.losses import Loss, LOSSES

TARGET_DECAY = 0.7  # of the moving average that elr keeps of an example's predictions
TEACHER = optax.ema(0.997)  # the moving average that elr_teacher keeps of the parameters
TEACHER_BEGIN = 0.2  # share of the steps that elr_teacher takes before it regularises


class Parts(NamedTuple):
    """What a step is put together from."""

    # Of parameters and images; beside them statistics.
    logits: Callable[[Any, jax.Array], tuple[jax.Array, Any]]
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # of each example, by logits and labels
    tilt: Callable[[jax.Array, Sums], jax.Array]  # the losses, with the slopes of ABSGD
    mean: Callable[[jax.Array], jax.Array]  # of such losses
    temperature: jax.Array  # λ


class Batch(NamedTuple):
    index: jax.Array  # [B], of the training examples
    x: jax.Array
    y: jax.Array
    group: jax.Array  # [B]
    weight: jax.Array  # [B]
    clean: tuple[jax.Array, jax.Array]  # images and right labels, as many of every class
    key: jax.Array
    rate: jax.Array  # the learning rate
    progress: jax.Array  # share of the steps that were taken before


# The gradients and their sums; and the losses, statistics, and memory.
Step = tuple[tuple[Any, Sums], tuple[jax.Array, Any, Any]]


class Way(NamedTuple):
    step: Callable[[Parts, Any, Any, Batch], Step]  # of parameters, memory and batch
    # The memory, of parameters and numbers of training examples, classes and groups.
    init: Callable[[Any, int, int, int], Any] = lambda *_: ()


class Method(NamedTuple):
    loss: Loss
    way: Way
    normalized: bool  # whether the logits are cosines


def plain(parts: Parts, params: Any, memory: Any, batch: Batch) -> Step:
    def loss_fn(params, sums):
        logits, other = parts.logits(params, batch.x)
        losses = parts.loss(logits, batch.y)
        return parts.mean(parts.tilt(losses, sums)), (losses, other, memory)

    return jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(params, Sums())


def mixup(alpha: float = 1.0) -> Way:
    def step(parts, params, memory, batch):
        share_key, order_key = jax.random.split(batch.key)
        share = jax.random.beta(share_key, alpha, alpha)
        order = jax.random.permutation(order_key, len(batch.y))

        def mix(a, b):
            return share * a + (1 - share) * b

        def loss(z, y):
            return mix(parts.loss(z, y), parts.loss(z, y[order]))

        mixed = batch._replace(x=mix(batch.x, batch.x[order]))
        return plain(parts._replace(loss=loss), params, memory, mixed)

    return Way(step)


def sam(rho: float = 0.05) -> Way:
    def step(parts, params, memory, batch):
        (grads, _), _ = plain(parts, params, memory, batch)
        scale = rho / (optax.tree.norm(grads) + 1e-12)
        uphill = jax.tree.map(lambda p, g: p + scale * g, params, grads)
        return plain(parts, uphill, memory, batch)

    return Way(step)


def regulariser(logits: jax.Array, targets: jax.Array, coefficient: ArrayLike) -> jax.Array:
    """What early learning adds to any loss: labels without a class have no cross-entropy."""
    return early_learning(logits, jnp.zeros_like(logits), targets, coefficient=coefficient)


def elr(coefficient: float = 3.0) -> Way:
    """The memory is the moving average of what was predicted of every training example."""

    def step(parts, params, memory, batch):
        def loss_fn(params, sums):
            logits, other = parts.logits(params, batch.x)
            new = jax.lax.stop_gradient(jax.nn.softmax(logits))
            targets = TARGET_DECAY * memory[batch.index] + (1 - TARGET_DECAY) * new
            losses = parts.loss(logits, batch.y) + regulariser(logits, targets, coefficient)
            mean = parts.mean(parts.tilt(losses, sums))
            return mean, (losses, other, memory.at[batch.index].set(targets))

        return jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(params, Sums())

    return Way(step, lambda params, examples, classes, groups: jnp.zeros((examples, classes)))


def init_teacher(params: Any, examples: int, classes: int, groups: int) -> Any:
    return TEACHER.init(params)


def elr_teacher(coefficient: float = 3.0) -> Way:
    """The memory is that of the teacher, the moving average of the parameters."""

    def step(parts, params, memory, batch):
        teacher, memory = TEACHER.update(params, memory)
        targets = jax.nn.softmax(parts.logits(teacher, batch.x)[0])
        pull = jnp.where(batch.progress < TEACHER_BEGIN, 0.0, coefficient)

        def loss_fn(params, sums):
            logits, other = parts.logits(params, batch.x)
            losses = parts.loss(logits, batch.y) + regulariser(logits, targets, pull)
            return parts.mean(parts.tilt(losses, sums)), (losses, other, memory)

        return jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(params, Sums())

    return Way(step, init_teacher)


def teacher_score() -> Way:
    """The memory is that of the teacher of ``elr_teacher``."""

    def step(parts, params, memory, batch):
        teacher, memory = TEACHER.update(params, memory)
        score = parts.loss(parts.logits(teacher, batch.x)[0], batch.y)

        def tilt(losses, sums):
            return parts.tilt(losses + jax.lax.stop_gradient(score - losses), sums)

        return plain(parts._replace(tilt=tilt), params, memory, batch)

    return Way(step, init_teacher)


def levels(losses: jax.Array, y: jax.Array, classes: int, temperature: jax.Array) -> jax.Array:
    """Of each class λ log mean exp(l / λ): less it, a class has the weight of its size."""
    return jnp.stack([robust_loss(losses, temperature, where=y == k) for k in range(classes)])


def within(parts: Parts, params: Any, memory: Any, batch: Batch) -> Step:
    def loss(z, y):
        losses = parts.loss(z, y)
        level = levels(jax.lax.stop_gradient(losses), y, z.shape[-1], parts.temperature)
        return losses - level[y]

    return plain(parts._replace(loss=loss), params, memory, batch)


def reweighted(algorithm: Callable[..., Any]) -> Callable[[Parts, Any, Any, Batch], Step]:
    def step(parts, params, memory, batch):
        def losses(x, y):
            return lambda params: parts.loss(parts.logits(params, x)[0], y)

        clean = losses(*batch.clean)
        weights, memory = algorithm(
            losses(batch.x, batch.y),
            lambda params: clean(params).mean(),
            *(params, memory),
            rate=batch.rate,
        )
        weighted = parts._replace(mean=lambda losses: meta.weighted(losses, weights))
        return plain(weighted, params, memory, batch)

    return step


def meta_weight_net(meta_rate: float = 0.1) -> Way:
    algorithm = functools.partial(meta.meta_weight_net, meta_rate=meta_rate)
    return Way(reweighted(algorithm), lambda *_: meta.init_weight_net(jax.random.key(0)))


# Of their knobs.
WAYS: dict[str, Callable[..., Way]] = {
    "": lambda: Way(plain),
    "mixup": mixup,
    "sam": sam,
    "elr": elr,
    "elr_teacher": elr_teacher,
    "teacher_score": teacher_score,
    "l2rw": lambda: Way(reweighted(meta.l2rw_forward)),
    "meta_weight_net": meta_weight_net,
    "within": lambda: Way(within),
}


def parse(text: str, ways: Mapping[str, Callable[..., Way]] = WAYS) -> Method:
    (loss, *knob), (way, *way_knob) = (part.split(":") for part in text.partition("+")[::2])
    return Method(
        LOSSES[loss](*map(float, knob)),
        ways[way](*map(float, way_knob)),
        normalized=loss == "ldam_drw",
    )


METHOD = Must(
    f"be LOSS[:KNOB][+WAY[:KNOB]] of {', '.join(LOSSES)}; and of {', '.join(filter(None, WAYS))}",
    readable(lambda text: bool(parse(text))),
)

# Of knobs; those of the others must be 0 or more and finite.
RANGES = {"mixup": POSITIVE, "cvar": ABOVE_0, "label_smoothing": SHARE, "cb_drw": SHARE}


@readable
def knobs_hold(text: str) -> bool:
    parts = (part.split(":") for part in text.split("+"))
    return all(
        RANGES.get(name, NOT_NEGATIVE).holds(float(knob))
        for name, *knobs in parts
        for knob in knobs
    )


KNOBS = Must(
    "have a finite knob, in (0, 1] for cvar, in [0, 1] for label_smoothing and cb_drw, above 0 for "
    "mixup, and 0 or more for the others",
    knobs_hold,
)
