"""One batch is one batch, whatever its layout: the same parameters and one state after 50 steps."""

import functools
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from absgd_jax import absgd, pmerge, robust_loss

DEVICES = 8
TEMPERATURES = (0.5, -1.0, (1.0, 0.1), (-0.3, 0.2))  # the latter two: automatic ones
EXPECTED = {temperature: layouts.expected(temperature) for temperature in TEMPERATURES}
TRAIN = {
    "loss": layouts.train,
    "merge": functools.partial(layouts.train, value_and_grad=layouts.merged),
    "weights": layouts.train_by_weights,
}


@pytest.fixture(params=[(np.float64, 1e-12), (np.float32, 1e-5)], ids=["float64", "float32"])
def precision(request):
    """A dtype and the tolerance in it."""
    dtype, _ = request.param
    jax.config.update("jax_enable_x64", dtype == np.float64)
    yield request.param
    jax.config.update("jax_enable_x64", False)


def check(train, precision, place=lambda params, batches: (params, batches)):
    """Holds ``train(params, batches, temperature)`` to NumPy's run, at each temperature."""
    dtype, tolerance = precision
    for temperature in TEMPERATURES:
        placed = place(*layouts.problem(dtype))
        params, state, losses = train(*placed, jax.tree.map(dtype, temperature))
        expected_params, lam, log_normalizer, expected_losses = EXPECTED[temperature]
        for k, expected in expected_params.items():
            np.testing.assert_allclose(
                params[k], expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=k
            )
        np.testing.assert_allclose(state.temperature, lam, rtol=tolerance)
        np.testing.assert_allclose(state.log_normalizer, log_normalizer, rtol=tolerance)
        if losses is not None:
            np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
        # Replicas have the same bits on every device.
        for leaf in (*params.values(), *state):
            replicas = {}
            for shard in leaf.addressable_shards:
                replica = replicas.setdefault(str(shard.index), shard.data)
                np.testing.assert_array_equal(shard.data, replica)


def put(mesh, model, params, batches):
    """Batches spread over "data", the hidden units over the mesh axis ``model``."""
    specs = {"w1": P(None, model), "b1": P(model), "w2": P(model, None), "b2": P()}
    params = {k: jax.device_put(p, NamedSharding(mesh, specs[k])) for k, p in params.items()}
    return params, jax.device_put(batches, NamedSharding(mesh, P(None, "data")))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("model", [None, "model"], ids=["data", "data_and_model"])
def test_jit(model, axis_type, precision):
    shape, names = ((8,), ("data",)) if model is None else ((4, 2), ("data", model))
    mesh = jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))
    # A contraction over a sharded axis leaves it to the caller where its result goes.
    out_sharding = P("data") if axis_type is AxisType.Explicit else None
    with jax.set_mesh(mesh):
        train = jax.jit(functools.partial(layouts.train, out_sharding=out_sharding))
        check(train, precision, functools.partial(put, mesh, model))


def test_padding(precision):
    """Masked rows fill the batch up to a multiple of the devices; what is in them is ignored."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    def pad(params, batches):
        x, y, where = (
            np.concatenate([a, np.full((len(a), 8, *a.shape[2:]), fill, a.dtype)], axis=1)
            for a, fill in zip(batches, (9, 255, False), strict=True)
        )
        return put(mesh, None, params, (x, y, where))

    check(jax.jit(layouts.train), precision, pad)


@pytest.mark.parametrize("form", TRAIN)
def test_pmap(form, precision):
    train = jax.pmap(
        functools.partial(TRAIN[form], axis_name="batch"),
        axis_name="batch",
        in_axes=(None, 1, None),
    )

    def split(params, batches):
        return params, jax.tree.map(lambda a: a.reshape(len(a), DEVICES, -1, *a.shape[2:]), batches)

    def train_one_state(*args):
        results = jax.tree.map(np.asarray, train(*args))
        jax.tree.map(lambda r: np.testing.assert_array_equal(r, r[[0] * DEVICES]), results)
        return jax.tree.map(lambda r: jnp.asarray(r[0]), results)

    check(train_one_state, precision, split)


@pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "no_check_vma"])
@pytest.mark.parametrize("form", TRAIN)
def test_shard_map(form, check_vma, precision):
    axes = ("host", "chip")
    mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto,) * 2)
    train = jax.shard_map(
        functools.partial(TRAIN[form], axis_name=axes),
        mesh=mesh,
        in_specs=(P(), P(None, axes), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    check(jax.jit(train), precision)


def split_steps(every_k, params, batches):
    """Every batch as k micro-batches, which share its class counts."""
    x, y, where = batches
    counts = np.stack(
        [np.bincount(y[w], minlength=reference.CLASSES) for y, w in zip(y, where, strict=True)]
    ).astype(x.dtype)
    x, y, where = (a.reshape(len(a) * every_k, -1, *a.shape[2:]) for a in batches)
    return params, (x, y, where, np.repeat(counts, every_k, axis=0))


def test_micro_batches(precision):
    """Of eight in a batch one is masked whole."""

    def train(*args):
        params, state, _ = layouts.train(*args, every_k=8)
        return params, state, None

    check(jax.jit(train), precision, functools.partial(split_steps, 8))


def test_micro_batches_on_devices(precision):
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    spread = P(None, "batch")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), (spread, spread, spread, P()), P()),
        out_specs=P(),
    )
    def train(*args):
        params, state, _ = TRAIN["merge"](*args, axis_name="batch", every_k=2)
        return params, state, None

    check(train, precision, functools.partial(split_steps, 2))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What one_of_two_processes.py wrote, and how each process ended: its code and its messages."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    outs = [tmp_path_factory.mktemp("process") / "results.npz" for _ in range(2)]
    script = pathlib.Path(__file__).with_name("one_of_two_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(i), out], stderr=subprocess.PIPE, text=True
        )
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
        names = ("temperature", "log_normalizer", "losses")
        params, *others = EXPECTED[TEMPERATURES[-1]]
        expected = params | dict(zip(names, others, strict=True))
        for k, e in expected.items():
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

    def test_unbound_axis_name(self):
        with pytest.raises(NameError, match="batch"):
            robust_loss(np.ones(8, np.float32), 1.0, axis_name="batch")
        with pytest.raises(NameError, match="batch"):
            pmerge(1.0, {}, 1.0, axis_name="batch")

    def test_gradients_that_are_summed_already(self):
        def loss_and_grad(x):
            loss, grads = jax.value_and_grad(lambda w: robust_loss(w * x, 1.0))(1.0)
            return pmerge(loss, grads, 1.0, axis_name="batch")

        with pytest.raises(ValueError, match=r"their sum over batch; .*jax.lax.pcast"):
            jax.eval_shape(self.spread(loss_and_grad), jnp.ones(8))

    def test_mask_of_another_shape(self):
        def loss(x, where):
            return robust_loss(x, 1.0, where=where, axis_name="batch")

        with pytest.raises(ValueError, match=r"shape of losses, \(2,\), got \(1,\)"):
            jax.eval_shape(self.spread(loss), jnp.ones(16), jnp.ones(8, bool))

    def test_mask_of_one_device_only(self):
        """An update that a device would leave out by itself."""
        tx = absgd(0.1, 1.0)

        def update(where):
            _, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)), value=1.0, where=where)
            return state

        with pytest.raises(ValueError, match="out_specs"):
            jax.eval_shape(self.spread(update), jnp.ones(8, bool))

    def test_batch_that_the_devices_do_not_divide(self):
        with pytest.raises(ValueError, match=r"\b8\b.*\b12\b"):
            jax.device_put(jnp.ones(12), NamedSharding(self.MESH, P("batch")))
