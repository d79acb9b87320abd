"""Loops as they are in the wild, in miniature, with ABSGD.

Each is held to the published algorithm at a λ of either sign, and to SGD at λ = ∞. NumPy replays
both in float64, with derivatives by complex steps.
"""

import functools
import itertools
import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import dynamic_scale, train_state
from flax.traverse_util import flatten_dict
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import optax_to_numpyro

from absgd_jax import absgd, AttentionState, scale_by_attention, Sums, tilt, zero_sums
from tests.support import reference

RATE, MOMENTUM, GAMMA, DECAY = 1 / 16, reference.MOMENTUM, 0.7, 0.125
LAMS = (np.inf, 2.0, -1.0)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(4, 16, 3)), RNG.normal(size=(4, 16))
BATCHES = list(zip(X, Y, strict=True))
PARAMS = {"w": RNG.normal(size=3), "b": RNG.normal(size=1)}
KERNEL, BIAS = PARAMS["w"][:, None], PARAMS["b"]  # as layers have them
sgd, tx = optax.sgd(RATE, MOMENTUM), absgd(RATE, np.inf, gamma=GAMMA)
head = scale_by_attention(np.inf, gamma=GAMMA)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels

pytestmark = pytest.mark.usefixtures("users_promotion", "x64")


def replay(model, params, batches, lam, begin=0, follows=True):
    """Parameters and the V of each head after ABSGD in NumPy, with SGD before step ``begin``.

    ``model(params, *batch)`` has the losses of each head with their weights in the whole, and what
    else is added to it. ``follows`` says whether losses are tilted with the state before the step,
    or always with the first, where V is 0.
    """
    baselines, update, anchors = None, reference.sgd(RATE, 0.0), {}
    for i, batch in enumerate(batches):
        terms, added = model(params, *batch)
        baselines = baselines or [None] * len(terms)
        slopes, scale, now = [], 1.0, lam if i >= begin else np.inf
        for k, (each, c) in enumerate(terms):
            weights, after = reference.weigh(each, baselines[k], now, GAMMA, shares=c / c.sum())
            slopes.append(c.sum() * weights)
            # What is added has its gradient times the scale of the others'.
            if added and np.isfinite(now):
                scale = slopes[-1].sum() / np.sum(c * np.exp((each - anchors.get(k, 0)) / now))
            baselines[k] = after
            if follows:
                anchors[k] = np.average(each, weights=c) if after is None else after
        grads = by_complex_steps(functools.partial(total, model, batch, slopes, scale), params)
        params = update(params, grads)
    return params, baselines


def total(model, batch, slopes, scale, params):
    """What the published algorithm differentiates: the weights of the examples are constants."""
    terms, added = model(params, *batch)
    return sum(np.sum(s * each) for s, (each, _) in zip(slopes, terms, strict=True)) + scale * added


def by_complex_steps(f, params):
    grads = {k: np.zeros(np.shape(p)) for k, p in params.items()}
    for k, p in params.items():
        for i in np.ndindex(np.shape(p)):
            stepped = np.array(p, complex)
            stepped[i] += 1e-30j
            grads[k][i] = np.imag(f({**params, k: stepped})) / 1e-30
    return grads


def is_head(node):
    return isinstance(node, AttentionState)


def set_temperature(carry, lam):
    """In all heads, of whatever shape."""

    def set_in(node):
        if not is_head(node):
            return node
        shape, dtype = np.shape(node.temperature), node.temperature.dtype
        return node._replace(temperature=np.full(shape, lam, dtype))

    return jax.tree.map(set_in, carry, is_leaf=is_head)


def check(
    step,
    model,
    *,
    start=None,
    mesh=None,
    params=PARAMS,
    params_of=lambda carry: carry[0],
    batches=BATCHES,
    replayed=None,
    begin=0,
    skipped=0,
    tolerance=1e-12,
):
    """``replayed`` are the batches as ``model`` takes them, of which the loop skips the first."""
    replayed = (batches if replayed is None else replayed)[skipped:]
    found = {}
    for lam in LAMS:
        carry = (params, tx.init(params)) if start is None else start()
        if mesh is not None:
            carry = jax.device_put(carry, NamedSharding(mesh, P()))
        for i, batch in enumerate(batches):
            carry = step(set_temperature(carry, lam if i >= begin else np.inf), *batch)
        found[lam] = params_of(carry)
        expected, baselines = replay(model, params, replayed, lam, begin - skipped)
        assert_close(found[lam], expected, tolerance)
        if np.isinf(lam):
            continue
        with pytest.raises(AssertionError):  # λ makes a difference.
            assert_close(found[lam], found[np.inf], 4 * tolerance + 1e-3)
        heads = filter(is_head, jax.tree.leaves(carry, is_leaf=is_head))
        levels = np.concatenate([np.ravel(each.baseline) for each in heads])
        wanted = np.resize(baselines, levels.shape)  # all devices have the same
        np.testing.assert_allclose(levels, wanted, rtol=tolerance)


def assert_close(found, expected, tolerance):
    for k, e in expected.items():
        error = np.abs(np.reshape(np.asarray(found[k]), np.shape(e)) - e).max()
        assert error <= tolerance * np.abs(e).max(), (k, error)


def mean(each, added=0.0):
    """What a model gives where the loss is a mean."""
    return [(each, np.full(each.shape, 1 / each.size))], added


def squares(params, x, y):
    return (x @ params["w"] + params["b"] - y) ** 2


def mean_square(params, x, y):
    return mean(squares(params, x, y))


def numpy_cross_entropy(logits, y):
    picked = np.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
    return np.log(np.exp(logits).sum(axis=-1)) - picked


def test_equinox():
    """The optimiser is an argument, and the number of the step: a penalty grows with it."""

    @eqx.filter_jit
    def make_step(model, opt_state, tx, x, y, step):
        def loss_fn(both):
            model, sums = both
            losses = tilt((jax.vmap(model)(x)[:, 0] - y) ** 2, opt_state, sums)
            return losses.mean() + step * DECAY / 2 * jnp.sum(model.weight**2)

        grads, sums = eqx.filter_grad(loss_fn)((model, zero_sums()))
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params, sums=sums)
        return eqx.apply_updates(model, updates), opt_state

    def penalised(params, x, y, step):
        return mean(squares(params, x, y), step * DECAY / 2 * np.sum(params["w"] ** 2))

    model = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: (m.weight, m.bias), model, (jnp.array(KERNEL.T), jnp.array(BIAS)))
    check(
        lambda carry, x, y, i: make_step(*carry, tx, x, y, i),
        penalised,
        start=lambda: (model, tx.init(eqx.filter(model, eqx.is_inexact_array))),
        params_of=lambda carry: {"w": carry[0].weight, "b": carry[0].bias},
        batches=[(*batch, np.float64(i)) for i, batch in enumerate(BATCHES)],
        begin=1,
    )


def test_keras():
    """Its model, and behind the head its optimiser."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras  # Here, as no other test needs it.

    @jax.jit
    def step(carry, x, y):
        trainable, variables, rest, attention = carry

        def loss_fn(trainable, sums):
            out, new = model.stateless_call(trainable, rest, x, training=True)
            return tilt((out[:, 0] - y) ** 2, attention, sums).mean(), new

        grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (_, new), (grads, sums) = grad_fn(trainable, Sums())
        grads, attention = head.update(grads, attention, sums=sums)
        trainable, variables = optimizer.stateless_apply(variables, grads, trainable)
        return trainable, variables, new, attention

    model = keras.Sequential([keras.layers.Dense(1, dtype="float64")])
    model.build([16, 3])
    optimizer = keras.optimizers.SGD(RATE, momentum=MOMENTUM)
    optimizer.build(model.trainable_variables)
    first, variables = [KERNEL, BIAS], [jnp.array(v) for v in optimizer.variables]
    check(
        step,
        mean_square,
        start=lambda: (first, variables, [], head.init(first)),
        params_of=lambda carry: dict(zip("wb", carry[0], strict=True)),
    )


class Net(nn.Module):
    """In half precision, with a batch norm of what a layer has learnt."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False, dtype=jnp.float16)(x)
        x = nn.BatchNorm(use_running_average=False, dtype=jnp.float16)(x)
        return nn.Dense(2, dtype=jnp.float16)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any
    dynamic_scale: dynamic_scale.DynamicScale


@pytest.mark.parametrize("x64", [False], indirect=True)
def test_linen_in_float16(x64):
    """A batch norm, a penalty and a loss scale that overflows in the first step, under pmap."""

    @functools.partial(jax.pmap, axis_name="batch")
    def step(state, x, y):
        def loss_fn(params):
            variables = {"params": params["net"], "batch_stats": state.batch_stats}
            logits, new = state.apply_fn(variables, x, mutable=["batch_stats"])
            l2 = sum(jnp.sum(p**2) for p in jax.tree.leaves(params) if p.ndim > 1)
            losses = tilt(cross_entropy(logits, y), state.opt_state, params)
            return losses.mean() + DECAY / 2 * l2, new["batch_stats"]

        grad_fn = state.dynamic_scale.value_and_grad(loss_fn, has_aux=True, axis_name="batch")
        scale, finite, (_, batch_stats), grads = grad_fn(state.params)
        new = state.apply_gradients(grads=grads, batch_stats=batch_stats, dynamic_scale=scale)
        keep = functools.partial(jax.tree.map, functools.partial(jnp.where, finite))
        params, opt_state = keep((new.params, new.opt_state), (state.params, state.opt_state))
        return new.replace(params=params, opt_state=opt_state)

    def start():
        params = {"net": variables["params"], "sums": zero_sums()}
        scale = dynamic_scale.DynamicScale(scale=jnp.float32(2.0**22), backoff_factor=2.0**-10)
        of_model = dict(apply_fn=net.apply, batch_stats=variables["batch_stats"])
        state = TrainState.create(params=params, tx=tx, dynamic_scale=scale, **of_model)
        return jax.tree.map(lambda x: np.stack([x, x]), state)  # on two devices

    def params_of(state):
        assert state.dynamic_scale.scale[0] == 2.0**12  # after one overflow
        return flat(jax.tree.map(lambda x: x[0], state.params["net"]))

    def flat(params):
        return {"/".join(k): np.float64(p) for k, p in flatten_dict(params).items()}

    def model(params, x, y):
        h = x @ params["Dense_0/kernel"]
        h = h - h.mean(axis=1, keepdims=True)  # of each device
        h = h / np.sqrt((h**2).mean(axis=1, keepdims=True) + 1e-5)
        h = h * params["BatchNorm_0/scale"] + params["BatchNorm_0/bias"]
        each = numpy_cross_entropy(h @ params["Dense_1/kernel"] + params["Dense_1/bias"], y)
        return mean(each, DECAY / 2 * sum(np.sum(p**2) for p in params.values() if p.ndim > 1))

    net = Net()
    variables = jax.jit(net.init)(jax.random.key(0), np.float32(X[0]))
    batches = [(np.float32(x).reshape(2, 8, 3), np.int32(y > 0).reshape(2, 8)) for x, y in BATCHES]
    check(
        step,
        model,
        start=start,
        params=flat(variables["params"]),
        params_of=params_of,
        batches=batches,
        begin=2,
        skipped=1,
        tolerance=5e-3,
    )


def mesh_of(name, size=2):
    """Whose axis is explicit, as has become the default of JAX."""
    types = (AxisType.Explicit,)
    return jax.make_mesh((size,), (name,), devices=jax.devices()[:size], axis_types=types)


def test_transformers_step():
    """Masked token losses over the weights of all devices, and a term of the router beside them.

    Micro-batches have unequal token counts, and their auxiliary outputs are added by position. The
    loss function keeps its signature: the sums are beside the parameters, and the state of the
    optimiser comes with the data.
    """

    def loss_fn(forward, data, rng, params, is_train=True):
        logits, balance = forward(params["net"], data["inputs"])
        xent = tilt(cross_entropy(logits, data["targets"]), data["opt_state"], params)
        loss, weights = lax.psum(((xent * data["mask"]).sum(), data["mask"].sum()), "data")
        moe = lax.pmean(balance, "data")
        return loss / weights + moe, (loss, moe * weights, weights)

    mesh = mesh_of("data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=P())
    def step(carry, data):
        params, opt_state = carry
        grad_fn = jax.grad(loss_fn, argnums=3, has_aux=True)

        def accumulate(total, data):
            grads, aux = grad_fn(forward, data | {"opt_state": opt_state}, None, params)
            grads = jax.tree.map(lambda a, g: a + aux[2] * g, total[0], grads)
            return (grads, *(a + x for a, x in zip(total[1:], aux, strict=True))), None

        zeros = jax.tree.map(jnp.zeros_like, params), *[jnp.zeros([])] * 3
        (grads, _, _, weights), _ = lax.scan(accumulate, zeros, data)
        grads = jax.tree.map(lambda g: g / weights, grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def forward(params, inputs):
        h = params["embed"][inputs]
        routed = jax.nn.softmax(h @ params["router"], axis=-1).mean(axis=(0, 1))
        return h @ params["out"], jnp.sum(routed**2)

    def model(params, data):
        each, c, balance, total = [], [], 0.0, data["mask"].sum()
        for k, half in itertools.product(range(2), (slice(0, 2), slice(2, 4))):
            h = params["embed"][data["inputs"][k, half]]
            each.append(numpy_cross_entropy(h @ params["out"], data["targets"][k, half]))
            c.append(data["mask"][k, half] / total)
            routed = np.exp(h @ params["router"])
            routed = (routed / routed.sum(axis=-1, keepdims=True)).mean(axis=(0, 1))
            balance += data["mask"][k].sum() / total * np.sum(routed**2) / 2
        return [(np.stack(each), np.stack(c))], balance

    rng = np.random.default_rng(1)
    shapes = {"embed": (5, 2), "router": (2, 2), "out": (2, 5)}
    net = {k: rng.normal(size=shape) for k, shape in shapes.items()}
    first = {"net": net, "sums": zero_sums()}
    batches = []
    for _ in range(4):
        tokens = rng.integers(5, size=(2, 4, 7))
        mask = np.float64(np.arange(6) < rng.integers(0, 7, size=(2, 4, 1)))
        data = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:], "mask": mask}
        batches.append((jax.device_put(data, NamedSharding(mesh, P(None, "data"))),))
    check(
        step,
        model,
        start=lambda: (first, tx.init(first)),
        mesh=mesh,
        params=net,
        params_of=lambda carry: carry[0]["net"],
        batches=batches,
        replayed=jax.tree.map(np.asarray, batches),
        begin=1,
    )


def test_pinn():
    """A weighted sum of several means, each with a head of its own."""

    def solution(params, t):
        return jnp.sum(params["a"] * jnp.tanh(params["w"] * t + params["b"]))

    def squared(params, t):
        value, slope = jax.vmap(jax.value_and_grad(solution, 1), in_axes=(None, 0))(params, t)
        return (slope + value) ** 2, (value[:2] - 1) ** 2  # u' = -u, and u = 1 at two points

    @jax.jit
    def step(carry, t):
        params, opt_state, heads = carry

        def means(params, sums):
            return jnp.stack([x.mean() for x in map(tilt, squared(params, t), heads, sums)])

        rows, sums = jax.jacrev(means, argnums=(0, 1))(params, [zero_sums(), zero_sums()])
        grads = jax.tree.map(jnp.zeros_like, params)
        for i, factor in enumerate((1, 5)):
            row, own = jax.tree.map(lambda x: x[i], (rows, sums[i]))  # noqa: B023
            row, heads[i] = head.update(row, heads[i], sums=own)
            grads = optax.tree.add(grads, optax.tree.scale(factor, row))
        updates, opt_state = sgd.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, heads

    def model(params, t):
        tanh = np.tanh(params["w"] * t[:, None] + params["b"])
        value = np.sum(params["a"] * tanh, axis=1)
        slope = np.sum(params["a"] * params["w"] * (1 - tanh**2), axis=1)
        both = ((slope + value) ** 2, 1), ((value[:2] - 1) ** 2, 5)
        return [(each, np.full(each.shape, factor / each.size)) for each, factor in both], 0.0

    first = dict(zip("awb", X[0], strict=False))

    def start():
        return first, sgd.init(first), [head.init(first), head.init(first)]

    check(step, model, start=start, params=first, batches=[(y,) for y in Y])


def test_gnn():
    """Padded graphs, on devices whose gradients are weighted by the number of their valid nodes."""
    mesh = mesh_of("device")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), *[P("device")] * 5), out_specs=P())
    def step(carry, x, senders, receivers, y, valid):
        params, opt_state = carry

        def loss_fn(params, sums):
            received = jax.ops.segment_sum(x[senders], receivers, len(x))
            losses = (received @ params["w"] + params["b"] - y) ** 2
            return jnp.mean(tilt(losses, opt_state, sums), where=valid)

        local = lax.pcast((params, Sums()), "device", to="varying")
        grads = jax.grad(loss_fn, argnums=(0, 1))(*local)
        n = valid.sum()
        grads, total = lax.psum((jax.tree.map(lambda g: n * g, grads), n), "device")
        grads, sums = jax.tree.map(lambda g: g / total, grads)
        updates, opt_state = tx.update(grads, opt_state, params, sums=sums)
        return optax.apply_updates(params, updates), opt_state

    batches, replayed = [], []
    rng = np.random.default_rng(2)
    for x, y in zip(X / 4, Y, strict=True):
        # Of each eight nodes the last are padding, where the padding edges lead.
        senders, receivers = rng.integers(3, size=(2, 2, 10))
        receivers[:, 8:] = 7
        valid = np.arange(8) < np.array([[3], [6]])
        batch = x, senders.ravel(), receivers.ravel(), y, valid.ravel()
        batches.append(jax.device_put(batch, NamedSharding(mesh, P("device"))))
        received = np.zeros((2, 8, 3))
        for i in range(2):
            np.add.at(received[i], receivers[i], x.reshape(2, 8, 3)[i, senders[i]])
        replayed.append((received[valid], y.reshape(2, 8)[valid]))
    check(step, mean_square, mesh=mesh, batches=batches, replayed=replayed)


class Trainer(nnx.Module):
    """Not to be changed: the loss function that it is given never sees the optimiser."""

    def __init__(self, model, tx, loss_fn, every=2):
        self.model, self.optimizer = model, nnx.Optimizer(model, tx, wrt=nnx.Param)
        self.total = nnx.data(jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
        self.loss_fn, self.every, self.count = loss_fn, every, nnx.Variable(jnp.int32(0))

    @nnx.jit
    def step(self, x, y):
        grads = nnx.grad(self.loss_fn)(self.model, x, y)
        self.count[...] += 1
        nnx.update(self.total, jax.tree.map(lambda a, g: a + g / self.every, self.total, grads))
        nnx.cond(self.count[...] % self.every == 0, Trainer.apply, lambda self: None, self)

    def apply(self):
        self.optimizer.update(self.model, self.total)
        nnx.update(self.total, jax.tree.map(jnp.zeros_like, self.total))


def test_trainer_whose_loss_never_sees_the_optimizer():
    """The losses are tilted with the first state: right while λ is fixed, and there is a warning.

    But a penalty has the scale that the first state asks for. What NNX keeps for a variable that
    holds a tree is no such tree from the second step on, so that the sums are masked from momentum.
    """

    class Model(nnx.Module):
        def __init__(self):
            self.w, self.b = (nnx.Param(jnp.array(PARAMS[k])) for k in "wb")
            self.sums = nnx.Param(zero_sums())

    def is_sums(node):
        return isinstance(node, Sums)

    def not_sums(tree):
        return jax.tree.map(lambda x: not is_sums(x), tree, is_leaf=is_sums)

    def model(params, x, y):
        return mean(squares(params, x, y), DECAY / 2 * np.sum(params["w"] ** 2))

    pairs = list(zip(X.reshape(2, 32, 3), Y.reshape(2, 32), strict=True))
    for lam in LAMS:
        fixed = scale_by_attention(lam, gamma=GAMMA)
        first = fixed.init(None)

        def loss_fn(model, x, y, first=first):
            losses = tilt((x @ model.w + model.b - y) ** 2, first, model)
            return losses.mean() + DECAY / 2 * jnp.sum(model.w[...] ** 2)

        trainer = Trainer(Model(), optax.chain(fixed, optax.masked(sgd, not_sums)), loss_fn)
        with pytest.warns(UserWarning, match="is a constant here"):
            trainer.step(*BATCHES[0])
        for batch in BATCHES[1:]:
            trainer.step(*batch)
        expected, _ = replay(model, PARAMS, pairs, lam, follows=False)
        assert_close(vars(trainer.model), expected, 1e-12)


def test_numpyro_svi():
    """It drives the optimiser itself: the sums are a parameter, and the state is an argument."""

    def model(x, y, state):
        w = numpyro.sample("w", dist.Normal(0, 2).expand([3]).to_event(1))
        b = numpyro.sample("b", dist.Normal(0, 2).expand([1]).to_event(1))
        losses = -dist.Normal(x @ w + b, 5).log_prob(y)
        numpyro.factor("y", -tilt(losses, state, numpyro.param("sums", zero_sums())))

    def guide(*args):
        for k in PARAMS:
            at = numpyro.param(f"{k}_at", PARAMS[k])
            numpyro.sample(k, dist.Delta(at, event_dim=1))

    svi = SVI(model, guide, optax_to_numpyro(tx), Trace_ELBO())
    first = svi.init(jax.random.key(0), *BATCHES[0], tx.init(None))

    def posterior(params, x, y):
        each = squares(params, x, y) / 50 + np.log(5 * np.sqrt(2 * np.pi))
        return [(each, np.ones(16))], sum(np.sum(p**2) for p in params.values()) / 8

    check(
        jax.jit(lambda state, x, y: svi.update(state, x, y, state.optim_state)[0]),
        posterior,
        start=lambda: first,
        params_of=lambda state: {k: state.optim_state[1][0][f"{k}_at"] for k in PARAMS},
        begin=1,
    )


def step_by(loss_fn, carry, *batch):
    """The step of a loop that has none of its own."""
    params, opt_state = carry
    grads, sums = jax.grad(loss_fn, argnums=(0, 1))(params, Sums(), opt_state, *batch)
    updates, opt_state = tx.update(grads, opt_state, params, sums=sums)
    return optax.apply_updates(params, updates), opt_state


def spread(name, loss_fn, first, specs):
    """How a carry starts on two devices, and its step there; ``specs`` go by shape."""
    step = functools.partial(step_by, loss_fn)
    mesh, carry = mesh_of(name), (first, tx.init(first))
    spec = jax.tree.map(lambda x: specs.get(np.shape(x), P()), carry)
    step = jax.shard_map(step, mesh=mesh, in_specs=(spec, P(), P()), out_specs=spec)
    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), carry, spec)
    return lambda: placed, jax.jit(step)


def test_split_vocabulary():
    """Tensor parallelism: of the logits each device has a part, and of the losses all."""

    def loss_fn(params, sums, opt_state, x, y):
        logits = (x * params["scale"]) @ params["out"]  # of the device's two tokens
        own = 2 * lax.axis_index("vocabulary") + jnp.arange(2)
        picked = jnp.sum(jnp.where(own == y[:, None], logits, 0), axis=1)
        top = lax.pmax(lax.stop_gradient(logits.max(axis=1)), "vocabulary")
        total = lax.psum(jnp.exp(logits - top[:, None]).sum(axis=1), "vocabulary")
        losses = jnp.log(total) + top - lax.psum(picked, "vocabulary")
        return tilt(losses, opt_state, sums).mean()

    def model(params, x, y):
        return mean(numpy_cross_entropy((x * params["scale"]) @ params["out"], y))

    first = {"scale": X[0, 0], "out": X[1, :4].T}
    start, step = spread("vocabulary", loss_fn, first, {(3, 4): P(None, "vocabulary")})
    batches = [(x, np.int32(y > 0) + 2 * np.int32(x[:, 0] > 0)) for x, y in BATCHES]
    check(step, model, start=start, params=first, batches=batches)


def test_pipeline():
    """The last stage alone has losses; of the other there is 0 times what it has instead."""

    def loss_fn(params, sums, opt_state, x, y):
        stage = lax.axis_index("stage")
        first = jnp.tanh(x @ params["w"][0])
        received = lax.ppermute(first, "stage", [(0, 1)])
        out = jnp.where(stage == 0, first, jnp.tanh(received @ params["w"][0]))
        losses = tilt((out.sum(axis=1) - y) ** 2, opt_state, sums)
        return lax.psum(losses.mean() * (stage == 1), "stage")

    def model(params, x, y):
        return mean((np.tanh(np.tanh(x @ params["w"][0]) @ params["w"][1]).sum(axis=1) - y) ** 2)

    first = {"w": X[2, :6].reshape(2, 3, 3)}
    start, step = spread("stage", loss_fn, first, {(2, 3, 3): P("stage")})
    check(step, model, start=start, params=first)


def test_from_sgds_checkpoint_onto_another_mesh(tmp_path):
    """Two steps of SGD; from its checkpoint two of ABSGD, on four devices; and two on two.

    The optimiser is spread by specs of ``jax.eval_shape``, and donated.
    """

    def spread(tree, devices):
        mesh = mesh_of("model", devices)
        shardings = (
            NamedSharding(mesh, P("model") if x.ndim else P()) for x in jax.tree.leaves(tree)
        )
        return mesh, jax.tree.unflatten(jax.tree.structure(tree), shardings)

    def through_orbax(carry, devices):
        shapes = jax.eval_shape(lambda: carry)
        mesh, shardings = spread(shapes, devices)
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", carry, force=True)
            checkpointer.wait_until_finished()
            return mesh, checkpointer.restore(tmp_path / "state", like)

    def loss_fn(params, sums, opt_state, x, y):
        losses = (jnp.matmul(x, params["w"], out_sharding=P()) - y) ** 2
        return tilt(losses, opt_state, sums).mean()

    step = jax.jit(functools.partial(step_by, loss_fn), donate_argnums=0)

    def model(params, x, y):
        return mean((x @ params["w"] - y) ** 2)

    first = {"w": X[3, :8, 0]}
    batches = list(zip(X.reshape(-1, 4, 8), Y.reshape(-1, 4), strict=False))[:6]
    of_sgd, of_sgds_state = first, sgd.init(first)
    for batch in batches[:2]:
        grads = by_complex_steps(lambda p: np.sum(model(p, *batch)[0][0][0]) / 4, of_sgd)  # noqa: B023
        updates, of_sgds_state = sgd.update(grads, of_sgds_state)
        of_sgd = optax.apply_updates(of_sgd, updates)
    for lam in LAMS:
        mesh, (params, state) = through_orbax((of_sgd, of_sgds_state), 4)
        _, shardings = spread(jax.eval_shape(tx.init, params), 4)
        carry = params, (*jax.jit(tx.init, out_shardings=shardings)(params)[:-1], state)
        for start, devices in ((2, 4), (4, 2)):
            for batch in batches[start : start + 2]:
                with jax.set_mesh(mesh):
                    carry = step(set_temperature(carry, lam), *batch)
            assert len(carry[1][-1][0].trace["w"].sharding.device_set) == devices
            mesh, carry = through_orbax(carry, 2)
        assert_close(carry[0], replay(model, first, batches, lam, begin=2)[0], 1e-12)
