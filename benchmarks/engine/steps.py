"""Training steps to measure: those of SGD, and of ABSGD in each of its forms, on the same work.

Of ABSGD,

    absgd                has the mean of the tilted losses, on one device or many;
    automatic            has a λ that tunes itself, too;
    masked               has a mask;
    shard_map            has the mean of each device's part, and lax.pmean;
    shard_map_automatic  has these, and a λ that tunes itself;
    multi_steps          has optax.MultiSteps around it, and the sums beside the parameters.

What SGD has in each form is the same loop but for `tilt` and its sums. Every step reports its loss,
or the compiler would leave it out.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from absgd_jax import absgd, target_ess, tilt, zero_sums
from benchmarks.engine import models

IMAGE_SHAPES = {"mlp": (28, 28, 1), "cnn": (28, 28, 1), "resnet32": (32, 32, 3)}
MODELS = (*IMAGE_SHAPES, "transformer")
CLASSES = 10
VOCABULARY, LENGTH, FEATURES = 256, 64, 128  # of the transformer
AXIS, TEMPERATURE, RATE, MOMENTUM, EVERY_K = "device", 5.0, 1e-3, 0.9, 4
# The forms of ABSGD, and what SGD is in that form.
FORMS = {
    "absgd": "sgd",
    "automatic": "sgd",
    "masked": "sgd_masked",
    "shard_map": "sgd_shard_map",
    "shard_map_automatic": "sgd_shard_map",
    "multi_steps": "sgd_multi_steps",
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


Step = Callable[..., State]  # of the state and a batch, or two


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


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def make_optimizer(form: str) -> optax.GradientTransformationExtraArgs | optax.MultiSteps:
    if form in FORMS.values():
        tx = optax.with_extra_args_support(optax.sgd(RATE, MOMENTUM))
    else:
        temperature = target_ess(0.5) if "automatic" in form else TEMPERATURE
        tx = absgd(RATE, temperature, momentum=MOMENTUM)
    return optax.MultiSteps(tx, EVERY_K) if "multi_steps" in form else tx


def make_step(work: Work, form: str, mesh: Mesh) -> tuple[Step, State, Batch]:
    """The step, and what to call it with."""
    tx = make_optimizer(form)
    sgd, mapped, beside = form in FORMS.values(), "shard_map" in form, form == "multi_steps"
    if beside:
        work = with_sums(work)

    def step(state, batch):
        params, other, opt_state, _ = state

        def loss_fn(params, sums):
            losses, new = work.losses(params, other, batch)
            each = losses if sgd else tilt(losses, opt_state, (params, sums))
            where = batch.where if "masked" in form else None
            return jnp.mean(each, where=where), new

        local = params, None if sgd or beside else zero_sums()
        if mapped:
            local = lax.pcast(local, AXIS, to="varying")
        gradient = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, other), (grads, sums) = gradient(*local)
        if mapped:
            loss, grads, sums, other = lax.pmean((loss, grads, sums, other), AXIS)
        updates, opt_state = tx.update(grads, opt_state, params, sums=sums)
        return State(optax.apply_updates(params, updates), other, opt_state, loss)

    if mapped:
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P())
    return step, make_state(work, tx.init(work.params)), work.examples


def with_sums(work: Work) -> Work:
    """For what passes on gradients alone: the sums stand beside the parameters."""
    return work._replace(
        losses=lambda params, *args: work.losses(params["net"], *args),
        params={"net": work.params, "sums": zero_sums()},
    )


def make_state(work: Work, opt_state: Any) -> State:
    """The first; of its own, as it may be donated."""
    params, other = jax.tree.map(jnp.copy, (work.params, work.other))
    return State(params, other, opt_state, jnp.zeros([]))


def place(
    mesh: Mesh, step: Step, state: State, *batches: Batch, put: Any = jax.device_put
) -> tuple[Any, ...]:
    """The step jitted, and what to call it with: the state on every device, the batches spread."""
    everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    return jax.jit(step, donate_argnums=0), put(state, everywhere), *put(batches, spread)
