"""One batch is one batch, however a loss is made of it: one run, held to NumPy's after 50 steps."""

import functools
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

from tests.support import layouts

DEVICES = 8
TEMPERATURES = (0.5, -1.0, (1.0, 0.1), (-np.inf, 0.2))  # the latter two: automatic ones
EXPECTED = {temperature: layouts.expected(temperature) for temperature in TEMPERATURES}
ROWS = P(None, "batch")
SPECS = (*[ROWS] * 3, P(), P())  # of a batch


TOLERANCES = {"float64": 1e-12, "float32": 1e-5}
in_both_precisions = pytest.mark.parametrize("dtype", TOLERANCES)


def check(
    train,
    place=lambda params, batches: (params, batches),
    *,
    dtype="float64",
    tolerance=None,
    temperatures=None,
    expected=EXPECTED,
):
    """Holds ``train(params, batches, temperature)`` to NumPy's run, at each temperature."""
    tolerance = tolerance or TOLERANCES[dtype]
    # In float32, where rounding is tested, automatic ones alone: they do all that fixed ones do.
    for temperature in temperatures or TEMPERATURES[2 if dtype == "float32" else 0 :]:
        with jax.enable_x64(dtype == "float64"):
            placed = place(*layouts.problem(dtype))
            params, state = train(*placed, jax.tree.map(np.dtype(dtype).type, temperature))
        expected_params, lam, baseline = expected[temperature]
        for k, e in expected_params.items():
            np.testing.assert_allclose(
                params[k], e, rtol=0, atol=tolerance * np.abs(e).max(), err_msg=k
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


def of(loss):
    """Training by another loss."""
    return functools.partial(
        layouts.train, gradients=functools.partial(layouts.gradients, loss=loss)
    )


LOSSES = {
    "weighted_mean": layouts.train,
    "times_mask_over_garbage": of(layouts.times_mask_over_garbage),
    "where_over_nan": of(layouts.where_over_nan),
    "remat": functools.partial(layouts.train, gradients=jax.checkpoint(layouts.gradients)),
    "closure": functools.partial(layouts.train, closure=True),
    "micro_batches_by_hand": functools.partial(
        layouts.train, gradients=functools.partial(layouts.by_hand, k=8)
    ),
    "beside": layouts.beside(layouts.train),
    # As noise on all parameters leaves them; their value is of no consequence.
    "beside_at_7": layouts.beside(layouts.train, value=7.0),
    "beside_behind_a_clip": layouts.beside(
        functools.partial(layouts.train, before=lambda: optax.clip_by_global_norm(1e3))
    ),
}
# The oldest optax that is tested has no microbatch.
if hasattr(optax, "microbatch"):
    LOSSES["microbatch"] = functools.partial(
        layouts.train, gradients=functools.partial(layouts.by_optax, k=8)
    )


@pytest.mark.parametrize("form", LOSSES)
def test_one_device(form):
    # What was tuned after the closure was made is unknown to it.
    temperatures = TEMPERATURES[:2] if form == "closure" else None
    check(jax.jit(LOSSES[form]), temperatures=temperatures)


@pytest.mark.parametrize("form", ["weighted_mean", "micro_batches_by_hand", "beside"])
def test_one_device_in_float32(form):
    check(jax.jit(LOSSES[form]), dtype="float32")


@pytest.mark.parametrize(("leaves", "anchor"), [("net", 0), ("all", 1)])
def test_a_penalty_has_its_gradient_times_the_scale(leaves, anchor):
    """Also one on the sums beside the parameters, where its gradient isn't 0."""

    def penalty(params):
        net = params["net"] if leaves == "net" else params
        squares = (jnp.sum((p - anchor) ** 2) for p in jax.tree.leaves(net))
        return layouts.PENALTY / 2 * sum(squares)

    gradient = lambda p: layouts.PENALTY * (p - anchor)  # noqa: E731
    expected = {t: layouts.expected(t, gradient) for t in TEMPERATURES}
    gradients = functools.partial(layouts.gradients, penalty=penalty)
    train = layouts.beside(functools.partial(layouts.train, gradients=gradients))
    check(jax.jit(train), tolerance=1e-11, expected=expected)


@pytest.mark.parametrize(
    ("model", "axis_type"),
    [(None, AxisType.Explicit), ("model", AxisType.Auto), ("model", AxisType.Explicit)],
)
@in_both_precisions
def test_jit(model, axis_type, dtype):
    shape, names = ((8,), ("batch",)) if model is None else ((4, 2), ("batch", model))
    mesh = jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))
    # A contraction over a sharded axis leaves it to the caller where its result goes.
    out_sharding = P("batch") if axis_type is AxisType.Explicit else None
    gradients = functools.partial(layouts.gradients, out_sharding=out_sharding)
    with jax.set_mesh(mesh):
        train = jax.jit(functools.partial(layouts.train, gradients=gradients))
        check(train, functools.partial(put, mesh, model), dtype=dtype)


@in_both_precisions
def test_padding(dtype):
    """Rows without weight fill a batch up to a multiple of the devices, whatever is in them."""
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))

    def pad(params, batches):
        *rows, counts, totals = batches
        rows = (
            np.concatenate([a, np.full((len(a), 8, *a.shape[2:]), fill, a.dtype)], axis=1)
            for a, fill in zip(rows, (9, 255, 0), strict=True)
        )
        return put(mesh, None, params, (*rows, counts, totals))

    check(jax.jit(layouts.train), pad, dtype=dtype)


def split(params, batches):
    """For pmap and vmap."""
    *rows, counts, totals = batches
    rows = (a.reshape(len(a), DEVICES, -1, *a.shape[2:]) for a in rows)
    return params, (*rows, counts, totals)


def one_state(train):
    """What all devices end with, which must be the same."""

    def train_one_state(*args):
        results = jax.tree.map(np.asarray, train(*args))
        jax.tree.map(lambda r: np.testing.assert_array_equal(r, r[[0] * DEVICES]), results)
        return jax.tree.map(lambda r: jnp.asarray(r[0]), results)

    return train_one_state


MAPPED = {"in_axes": (None, (1, 1, 1, None, None), None), "axis_name": "batch"}


@pytest.mark.parametrize("form", ["argument", "beside"])
def test_pmap(form):
    train = layouts.spread("batch", varying=False)
    train = jax.pmap(layouts.beside(train) if form == "beside" else train, **MAPPED)
    check(one_state(train), split)


@pytest.mark.parametrize("form", ["argument", "beside"])
@pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "no_check_vma"])
def test_shard_map(check_vma, form):
    axes = ("host", "chip")
    mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto,) * 2)
    train = layouts.spread(axes)
    train = jax.shard_map(
        layouts.beside(train) if form == "beside" else train,
        mesh=mesh,
        in_specs=(P(), (*[P(None, axes)] * 3, P(), P()), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    check(jax.jit(train))


@pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "no_check_vma"])
def test_losses_repeated_over_an_axis(check_vma):
    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
    train = jax.shard_map(
        layouts.spread(("batch", "model"), rows="batch"),
        mesh=mesh,
        in_specs=(P(), SPECS, P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    check(jax.jit(train))


def test_multi_steps():
    """To the float32 in which it divides."""
    wrap = functools.partial(optax.MultiSteps, every_k_schedule=8)
    train = layouts.beside(functools.partial(layouts.train, wrap=wrap))
    check(jax.jit(train), functools.partial(layouts.split_steps, 8), tolerance=1e-5)


def test_two_processes_are_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    outs = [tmp_path / f"{i}.npz" for i in range(2)]
    command = [sys.executable, "-m", "tests.support.one_of_two_processes", str(port)]
    processes = [
        subprocess.Popen([*command, str(i), out], stderr=subprocess.PIPE, text=True)
        for i, out in enumerate(outs)
    ]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    assert [code for _, code in ends] == [0, 0], ends
    first, second = (np.load(out) for out in outs)
    params, lam, baseline = EXPECTED[TEMPERATURES[-1]]
    for k, e in (params | {"temperature": lam, "baseline": baseline}).items():
        for found in (f"jit/{k}", f"shard_map/{k}"):
            np.testing.assert_array_equal(first[found], second[found])
            atol = 1e-12 * np.abs(e).max()
            np.testing.assert_allclose(first[found], e, rtol=0, atol=atol, err_msg=found)
