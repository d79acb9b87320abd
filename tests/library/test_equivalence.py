"""The chain does what the published algorithm, and its authors' package, do."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from absgd_jax import abadam, absgd, Sums, tilt, two_stage
from tests.support.reference import (
    ADAM_CASES,
    ADAM_RATE,
    Case,
    MOMENTUM,
    problem,
    relative,
    SGD_CASES,
    SGD_RATE,
    SNAPSHOTS,
    train_all,
)

TORCH_FILE = pathlib.Path(__file__).parents[1] / "support" / "torch_trajectories.npz"
CASES = {"sgd": SGD_CASES, "adam": ADAM_CASES}


def per_example_losses(params, x, y):
    h = jnp.tanh(x @ params["w1"] + params["b1"][None])
    logits = h @ params["w2"] + params["b2"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def make_step(optimizer, case):
    temperature = two_stage(case.temperature, begin=case.switch)
    kwargs = dict(gamma=case.gamma, alpha=case.alpha, weight_decay=case.weight_decay)
    if optimizer == "sgd":
        tx = absgd(SGD_RATE, temperature, momentum=MOMENTUM, **kwargs)
    else:
        tx = abadam(ADAM_RATE, temperature, **kwargs)

    def step(carry, batch):
        params, opt_state = carry

        def loss_fn(params, sums):
            return tilt(per_example_losses(params, *batch), opt_state, sums).mean()

        grads, sums = jax.grad(loss_fn, argnums=(0, 1))(params, Sums())
        updates, opt_state = tx.update(grads, opt_state, params, sums=sums)
        return (optax.apply_updates(params, updates), opt_state), params

    return tx.init, step


@functools.cache
def reference(optimizer):
    return train_all(optimizer, CASES[optimizer])


def jax_runs(optimizer, dtype):
    """Parameters after every step, [C, T, ...]: all cases as one compiled, vmapped program."""
    params, xs, ys = problem()
    params, xs = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, xs))

    def run(case):
        init, step = make_step(optimizer, case)
        (last, _), before = jax.lax.scan(step, (params, init(params)), (xs, ys))
        return jax.tree.map(lambda b, p: jnp.concatenate([b[1:], p[None]]), before, last)

    *floats, switch = (np.array(column) for column in zip(*CASES[optimizer], strict=True))
    cases = Case(*(jnp.asarray(f, dtype) for f in floats), jnp.asarray(switch, jnp.int32))
    # optax.adam itself raises a float to the power of an integer.
    promotion = "strict" if optimizer == "sgd" else "standard"
    with jax.numpy_dtype_promotion(promotion):
        return jax.jit(jax.vmap(run))(cases)


def recorded(optimizer):
    with np.load(TORCH_FILE) as file:
        return {k.removeprefix(f"{optimizer}/"): file[k] for k in file if k.startswith(optimizer)}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
class TestEquivalence:
    def test_transcription_has_the_packages_loss_at_every_step(self, optimizer):
        _, losses = reference(optimizer)
        np.testing.assert_allclose(losses, recorded(optimizer)["losses"], rtol=1e-12)

    def test_every_parameter_at_every_step_in_float64(self, optimizer, x64):
        actual, (expected, _) = jax_runs(optimizer, jnp.float64), reference(optimizer)
        chex.assert_trees_all_close(
            relative(actual, expected), relative(expected, expected), rtol=0, atol=1e-12
        )
        actual = {k: a[:, SNAPSHOTS] for k, a in actual.items()}
        expected = {k: recorded(optimizer)[k] for k in actual}
        chex.assert_trees_all_close(
            relative(actual, expected), relative(expected, expected), rtol=0, atol=1e-12
        )

    def test_last_step_in_float32(self, optimizer):
        runs = jax_runs(optimizer, jnp.float32), reference(optimizer)[0]
        # All parameters of a case as one vector, over its largest entry.
        actual, expected = (
            np.concatenate(
                [np.reshape(run[k][:, -1], (len(run[k]), -1)) for k in sorted(run)], axis=1
            )
            for run in runs
        )
        scale = np.abs(expected).max(axis=1, keepdims=True)
        chex.assert_trees_all_close(actual / scale, expected / scale, rtol=0, atol=1e-5)
