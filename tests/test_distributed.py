"""One batch is one batch, however its mean is taken: one run, held to NumPy's after 50 steps."""

import functools
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from absgd_jax import absgd, target_ess
from tests.support import layouts

DEVICES = 8
TEMPERATURES = (0.5, -1.0, (1.0, 0.1), (-np.inf, 0.2))  # the latter two: automatic ones
EXPECTED = {temperature: layouts.expected(temperature) for temperature in TEMPERATURES}
ROWS = P(None, "batch")
SPECS = (*[ROWS] * 3, P(), P())  # of a batch


@pytest.fixture(params=[(np.float64, 1e-12), (np.float32, 1e-5)], ids=["float64", "float32"])
def precision(request):
    """A dtype and the tolerance in it."""
    dtype, _ = request.param
    jax.config.update("jax_enable_x64", dtype == np.float64)
    yield request.param
    jax.config.update("jax_enable_x64", False)


def check(train, precision, place=lambda params, batches: (params, batches), temperatures=None):
    """Holds ``train(params, batches, temperature)`` to NumPy's run, at each temperature."""
    dtype, tolerance = precision
    # In float32, where rounding is tested, automatic ones alone: they do all that fixed ones do.
    for temperature in temperatures or TEMPERATURES[2 if dtype == np.float32 else 0 :]:
        placed = place(*layouts.problem(dtype))
        params, state = train(*placed, jax.tree.map(dtype, temperature))
        expected_params, lam, baseline = EXPECTED[temperature]
        for k, expected in expected_params.items():
            np.testing.assert_allclose(
                params[k], expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=k
            )
        np.testing.assert_allclose(state.temperature, lam, rtol=tolerance)
        np.testing.assert_allclose(state.baseline, baseline, rtol=tolerance)
        # Replicas have the same bits on every device.
        for leaf in (*params.values(), *state):
            replicas = {}
            for shard in leaf.addressable_shards:
                replica = replicas.setdefault(str(shard.index), shard.data)
                np.testing.assert_array_equal(shard.data, replica)


def put(mesh, model, params, batches):
    """Batches spread over "batch", the hidden units over the mesh axis ``model``."""
    specs = {"w1": P(None, model), "b1": P(model), "w2": P(model, None), "b2": P()}
    params = {k: jax.device_put(p, NamedSharding(mesh, specs[k])) for k, p in params.items()}
    *rows, counts, totals = batches
    rows = jax.device_put(rows, NamedSharding(mesh, ROWS))
    return params, (*rows, *jax.device_put((counts, totals), NamedSharding(mesh, P())))


def test_one_device(precision):
    check(jax.jit(layouts.train), precision)


@pytest.mark.parametrize(
    ("model", "axis_type"),
    [(None, AxisType.Explicit), ("model", AxisType.Auto), ("model", AxisType.Explicit)],
)
def test_jit(model, axis_type, precision):
    shape, names = ((8,), ("batch",)) if model is None else ((4, 2), ("batch", model))
    mesh = jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))
    # A contraction over a sharded axis leaves it to the caller where its result goes.
    out_sharding = P("batch") if axis_type is AxisType.Explicit else None
    loss_and_grad = functools.partial(layouts.value_and_grad, out_sharding=out_sharding)
    with jax.set_mesh(mesh):
        train = jax.jit(functools.partial(layouts.train, value_and_grad=loss_and_grad))
        check(train, precision, functools.partial(put, mesh, model))


def test_padding(precision):
    """Rows without weight fill a batch up to a multiple of the devices, whatever is in them."""
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))

    def pad(params, batches):
        *rows, counts, totals = batches
        rows = (
            np.concatenate([a, np.full((len(a), 8, *a.shape[2:]), fill, a.dtype)], axis=1)
            for a, fill in zip(rows, (9, 255, 0), strict=True)
        )
        return put(mesh, None, params, (*rows, counts, totals))

    check(jax.jit(layouts.train), precision, pad)


def test_pmap(precision):
    train = jax.pmap(
        layouts.spread("batch"), axis_name="batch", in_axes=(None, (1, 1, 1, None, None), None)
    )

    def split(params, batches):
        *rows, counts, totals = batches
        rows = (a.reshape(len(a), DEVICES, -1, *a.shape[2:]) for a in rows)
        return params, (*rows, counts, totals)

    def train_one_state(*args):
        results = jax.tree.map(np.asarray, train(*args))
        jax.tree.map(lambda r: np.testing.assert_array_equal(r, r[[0] * DEVICES]), results)
        return jax.tree.map(lambda r: jnp.asarray(r[0]), results)

    check(train_one_state, precision, split)


@pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "no_check_vma"])
def test_shard_map(check_vma, precision):
    axes = ("host", "chip")
    mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto,) * 2)
    train = jax.shard_map(
        layouts.spread(axes),
        mesh=mesh,
        in_specs=(P(), (*[P(None, axes)] * 3, P(), P()), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    check(jax.jit(train), precision)


# The oldest optax that is tested has no microbatch. It leaves no losses to tune a λ by.
BY_HAND = {"by_hand": (layouts.by_hand, None)}
if hasattr(optax, "microbatch"):
    BY_HAND["by_optax"] = layouts.by_optax, TEMPERATURES[:2]


@pytest.mark.parametrize("form", BY_HAND)
def test_micro_batches_before_the_update(form, precision):
    """Of eight in a batch one is masked whole."""
    loss_and_grad, temperatures = BY_HAND[form]
    of_eight = functools.partial(loss_and_grad, k=8)
    train = jax.jit(functools.partial(layouts.train, value_and_grad=of_eight))
    check(train, precision, temperatures=temperatures)


def test_accumulate(precision):
    train = jax.jit(functools.partial(layouts.train, every_k=8))
    check(train, precision, functools.partial(layouts.split_steps, 8))


def test_accumulate_on_devices(precision):
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    train = jax.shard_map(
        layouts.spread("batch", every_k=2), mesh=mesh, in_specs=(P(), SPECS, P()), out_specs=P()
    )
    check(jax.jit(train), precision, functools.partial(layouts.split_steps, 2))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What one_of_two_processes wrote, and how each process ended: its code and its messages."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    outs = [tmp_path_factory.mktemp("process") / "results.npz" for _ in range(2)]
    command = [sys.executable, "-m", "tests.support.one_of_two_processes", str(port)]
    processes = [
        subprocess.Popen([*command, str(i), out], stderr=subprocess.PIPE, text=True)
        for i, out in enumerate(outs)
    ]
    messages = [process.communicate(timeout=300)[1] for process in processes]
    ends = [(p.returncode, message) for p, message in zip(processes, messages, strict=True)]
    assert all(out.exists() for out in outs), ends
    return [np.load(out) for out in outs], ends


class TestTwoProcesses:
    @pytest.mark.parametrize("form", ["jit", "shard_map"])
    def test_are_one(self, form, two_processes):
        results, _ = two_processes
        params, lam, baseline = EXPECTED[TEMPERATURES[-1]]
        for k, e in (params | {"temperature": lam, "baseline": baseline}).items():
            first, second = (result[f"{form}/{k}"] for result in results)
            np.testing.assert_array_equal(first, second)
            np.testing.assert_allclose(first, e, rtol=0, atol=1e-12 * np.abs(e).max(), err_msg=k)

    def test_death_of_one_ends_the_other(self, two_processes):
        _, ((code, message), (dead, _)) = two_processes
        assert dead == 1
        assert code != 0
        assert re.search(r"another task died|[Cc]onnection", message), message


class TestBadInput:
    MESH = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))

    def spread(self, f, **kwargs):
        return jax.shard_map(f, mesh=self.MESH, in_specs=P("batch"), out_specs=P(), **kwargs)

    def test_losses_of_one_device_only(self):
        """An update that tunes λ by what a device sees for itself."""
        tx = absgd(0.1, target_ess(0.9))

        def update(losses):
            _, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)), value=1.0, losses=losses)
            return state

        with pytest.raises(ValueError, match="out_specs"):
            jax.eval_shape(self.spread(update), jnp.ones(16))

    def test_value_of_one_device_only(self):
        tx = absgd(0.1, 1.0)

        def update(losses):
            _, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)), value=losses.mean())
            return state

        with pytest.raises(ValueError, match="out_specs"):
            jax.eval_shape(self.spread(update), jnp.ones(16))
