"""Training steps to measure: those of SGD, and of ABSGD in each of its forms, on the same work.

Of ABSGD,

    absgd       has robust_loss, and the chain of that name;
    attention   has the functional helper, and optax.sgd;
    masked      has a mask;
    automatic   has a λ that tunes itself;
    axis_name   has robust_loss across the devices of a shard_map, whose gradients arrive summed;
    pmerge      has the parts' own gradients there, merged;
    accumulate  has micro-batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from absgd_jax import absgd, accumulate, attention, get_temperature, pmerge, robust_loss, target_ess
from benchmarks import models

IMAGE_SHAPES = {"mlp": (28, 28, 1), "cnn": (28, 28, 1), "resnet32": (32, 32, 3)}
MODELS = (*IMAGE_SHAPES, "transformer")
CLASSES = 10
VOCABULARY, LENGTH, FEATURES = 256, 64, 128  # of the transformer
AXIS, TEMPERATURE, RATE, MOMENTUM, EVERY_K = "device", 5.0, 1e-3, 0.9, 4
# The forms of ABSGD, and what SGD is in that form.
FORMS = {
    "absgd": "sgd",
    "attention": "sgd",
    "automatic": "sgd",
    "masked": "sgd_masked",
    "axis_name": "sgd_pmean",
    "pmerge": "sgd_pmean",
    "accumulate": "sgd_multi_steps",
}


class Batch(NamedTuple):
    inputs: Any  # images [B, H, W, channels], or tokens [B, T]
    labels: Any  # [B] or [B, T]
    where: Any  # bool, as labels: for the forms with a mask


class State(NamedTuple):
    params: Any
    other: Any  # what the model keeps beside: the statistics of batch normalisation
    opt_state: Any
    loss: Any  # of the last batch, which every loop looks at


class Work(NamedTuple):
    """A network, and examples to train it on."""

    losses: Callable[[Any, Any, Batch], tuple[jax.Array, Any]]  # of params and other; other
    params: Any
    other: Any
    examples: Batch  # of any number


def make_work(model: str, examples: int) -> Work:
    """The network of that name, and random examples."""
    rng = np.random.default_rng(0)
    if model == "transformer":
        tokens = rng.integers(VOCABULARY, size=(examples, LENGTH + 1), dtype=np.int32)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        network = models.LanguageModel(VOCABULARY, LENGTH, FEATURES, rngs=nnx.Rngs(0))
    else:
        shape = IMAGE_SHAPES[model]
        inputs = rng.standard_normal((examples, *shape), dtype=np.float32)
        labels = rng.integers(CLASSES, size=examples, dtype=np.int32)
        network = models.make_model(model, shape, CLASSES, rngs=nnx.Rngs(0))
    graphdef, params, other = nnx.split(network, nnx.Param, ...)

    def losses(params, other, batch):
        network = nnx.merge(graphdef, params, other, copy=True)
        each = optax.softmax_cross_entropy_with_integer_labels(network(batch.inputs), batch.labels)
        return each, nnx.split(network, nnx.Param, ...)[2]

    return Work(losses, params, other, Batch(inputs, labels, rng.random(labels.shape) < 0.9))


def make_mesh(devices: int) -> Mesh:
    return jax.make_mesh(
        (devices,), (AXIS,), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
    )


def make_optimizer(form: str) -> optax.GradientTransformation:
    match form:
        case "sgd_multi_steps":
            return optax.MultiSteps(optax.sgd(RATE, MOMENTUM), EVERY_K).gradient_transformation()
        case "attention" | "sgd" | "sgd_masked" | "sgd_pmean":
            return optax.sgd(RATE, MOMENTUM)
        case "accumulate":
            return accumulate(absgd(RATE, TEMPERATURE, momentum=MOMENTUM), EVERY_K)
        case "automatic":
            return absgd(RATE, target_ess(0.5), momentum=MOMENTUM)
    return absgd(RATE, TEMPERATURE, momentum=MOMENTUM)


def make_step(
    work: Work, form: str, mesh: Mesh | None = None
) -> tuple[State, Callable[[State, Batch], State]]:
    """The initial state, and the step; a mesh is for the forms that are in a shard_map."""
    tx, attend = make_optimizer(form), attention(TEMPERATURE)
    sgd, mapped = form.startswith("sgd"), FORMS.get(form, form) == "sgd_pmean"
    opt_state = tx.init(work.params)
    if form == "attention":
        opt_state = attend.init(), opt_state

    def step(state, batch):
        params, other, opt_state, _ = state
        where = batch.where if form in ("masked", "sgd_masked") else None

        def loss_fn(params):
            losses, new = work.losses(params, other, batch)
            if sgd:
                return jnp.mean(losses, where=where), (losses, new, None)
            if form == "attention":
                weights, attention_state = attend.update(losses, opt_state[0])
                return jnp.sum(weights * losses), (losses, new, attention_state)
            axis_name = AXIS if form == "axis_name" else None
            lam = get_temperature(opt_state)
            return robust_loss(losses, lam, where=where, axis_name=axis_name), (losses, new, None)

        apart = mapped and form != "axis_name"
        local = lax.pcast(params, AXIS, to="varying") if apart else params
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (losses, other, attention_state)), grads = value_and_grad(local)
        if form == "sgd_pmean":
            loss, grads = lax.pmean((loss, grads), AXIS)
        elif form == "pmerge":
            loss, grads = pmerge(loss, grads, get_temperature(opt_state), axis_name=AXIS)
        if mapped:
            other = lax.pmean(other, AXIS)

        if form == "attention":
            updates, inner = tx.update(grads, opt_state[1], params)
            opt_state = attention_state, inner
        elif sgd:
            updates, opt_state = tx.update(grads, opt_state, params)
        else:
            extra_args = {"losses": losses} if form == "automatic" else {}
            updates, opt_state = tx.update(
                grads, opt_state, params, value=loss, where=where, **extra_args
            )
        return State(optax.apply_updates(params, updates), other, opt_state, loss)

    if mapped:
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P())
    return State(work.params, work.other, opt_state, jnp.zeros([])), step
