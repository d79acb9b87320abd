import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from absgd_jax import absgd, diagnostics, robust_loss, scale_by_attention, tilt
from absgd_jax.diagnostics import (
    class_mass,
    effective_sample_size,
    kl_divergence,
    largest_weight,
    summary,
)

RNG = np.random.default_rng(0)
LOSSES = RNG.exponential(size=(16, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, size=(16, 4))
WHERE = RNG.random((16, 4)) > 0.4
WHERE[:2] = False  # a device's part
BASELINE = 0.7


def expected(losses, labels, lam):
    """In float64, of the entries that aren't masked out."""
    losses = np.float64(losses)
    p = np.exp(losses / lam) / np.exp(losses / lam).sum()
    loss = losses.mean() if np.isinf(lam) else lam * np.log(np.exp(losses / lam).mean())
    finite = np.isfinite(lam)
    return {
        "mean_loss": losses.mean(),
        "robust_loss": loss,
        "temperature": lam,
        "effective_sample_size": 1 / (p.size * np.sum(p**2)),
        "largest_weight": p.max(),
        "kl_divergence": np.sum(p * np.log(p.size * p)),
        "log_normalizer": BASELINE / lam if finite else 0.0,
        "log_normalizer_drift": (loss - BASELINE) / lam if finite else 0.0,
    } | {f"class_mass/{c}": p[labels == c].sum() for c in range(3)}


def check(actual, lam, where=None):
    kept = slice(None) if where is None else where
    wanted = expected(LOSSES[kept], LABELS[kept], lam)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert actual[name].shape == ()
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def summarize(losses, lam, **kwargs):
    state = scale_by_attention(lam).init(None)
    state = state._replace(baseline=jnp.float32(BASELINE), averaged=jnp.int32(1))
    return summary(losses, state, num_classes=3, **kwargs)


summarize_jit = jax.jit(summarize, static_argnums=1)


@pytest.mark.parametrize("lam", [0.3, 2.0, -0.3, np.inf])
class TestSummary:
    def test_values(self, lam):
        check(summarize_jit(LOSSES, lam, labels=LABELS), lam)

    def test_mask(self, lam):
        poisoned = np.where(WHERE, LOSSES, np.nan)
        labels = np.where(WHERE, LABELS, 255)
        check(summarize_jit(poisoned, lam, labels=labels, where=WHERE), lam, WHERE)

    @pytest.mark.parametrize("axis_type", list(AxisType)[:2])
    def test_sharded_arrays(self, lam, axis_type):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            spread = [
                jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (LOSSES, LABELS, WHERE)
            ]
            losses, labels, where = spread
            check(summarize_jit(losses, lam, labels=labels, where=where), lam, WHERE)

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_shard_map(self, lam, check_vma):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

        @jax.jit
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma
        )
        def spread(losses, labels, where):
            return summarize(losses, lam, labels=labels, where=where, axis_name="data")

        check(spread(LOSSES, LABELS, WHERE), lam, WHERE)


class TestWeights:
    def test_of_any_scale(self):
        weights = jax.grad(robust_loss)(LOSSES, 0.5)
        for f in (effective_sample_size, largest_weight, kl_divergence):
            np.testing.assert_allclose(f(1e-6 * weights), f(weights), rtol=1e-5)
            np.testing.assert_allclose(f(1e6 * weights), f(weights), rtol=1e-5)

    def test_of_attention(self):
        """Slopes of the tilted losses are weights on some scale."""
        state = scale_by_attention(0.5).init(None)
        weights = jax.grad(lambda losses: tilt(losses, state).mean())(LOSSES)
        wanted = expected(LOSSES, LABELS, 0.5)
        assert effective_sample_size(weights) == pytest.approx(
            wanted["effective_sample_size"], rel=1e-5
        )
        np.testing.assert_allclose(
            class_mass(weights, LABELS, 3), [wanted[f"class_mass/{c}"] for c in range(3)], rtol=1e-5
        )

    @pytest.mark.parametrize("n", [1, 2, 1000])
    def test_extremes(self, n):
        one = np.zeros(n, np.float32)
        one[0] = 7.0
        same = np.full(n, 7.0, np.float32)
        assert effective_sample_size(one) == pytest.approx(1 / n)
        assert effective_sample_size(same) == pytest.approx(1.0)
        assert largest_weight(one) == 1.0
        assert largest_weight(same) == pytest.approx(1 / n)
        assert kl_divergence(one) == pytest.approx(np.log(n), rel=5e-7, abs=1e-6)
        assert 0 <= kl_divergence(same) < 1e-6

    @pytest.mark.parametrize("lam", [0.5, np.inf])
    def test_no_nan_on_the_way(self, lam):
        with jax.debug_nans(True):  # which sees every operation outside jit
            check(summarize(LOSSES, lam, labels=LABELS, where=WHERE), lam, WHERE)
            scalars = summarize(LOSSES, lam, labels=LABELS, where=np.zeros_like(WHERE))
        normalizer = {"log_normalizer", "log_normalizer_drift"} if np.isfinite(lam) else set()
        assert {k for k, x in scalars.items() if x != 0} == {"temperature"} | normalizer

    def test_masked_whole_whatever_the_losses(self):
        masked = {"labels": LABELS, "where": np.zeros_like(WHERE)}
        scalars = summarize(np.full_like(LOSSES, np.nan), 0.5, **masked)
        assert scalars == summarize(LOSSES, 0.5, **masked)

    def test_labels_of_no_class(self):
        mass = class_mass(jnp.ones(4), jnp.array([0, -1, 3, 2]), 3)
        np.testing.assert_array_equal(mass, [0.25, 0, 0.25])

    def test_more_classes_than_the_dtype_of_the_labels_has(self):
        mass = class_mass(jnp.ones(4), jnp.array([0, 1, 44, 255], jnp.uint8), 300)
        np.testing.assert_array_equal(np.flatnonzero(mass), [0, 1, 44, 255])
        assert mass.sum() == 1

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_dtypes(self, dtype):
        scalars = summarize(LOSSES.astype(dtype), 0.5, labels=LABELS)
        assert {x.dtype for x in scalars.values()} == {jnp.dtype("float32")}


def test_inside_a_step():
    """Beside the update, of the state that it is about to change."""
    tx = absgd(0.1, 0.5)

    @jax.jit
    def step(opt_state, losses):
        scalars = diagnostics.summary(losses, opt_state)
        value = tilt(losses, opt_state).mean()
        _, opt_state = tx.update(jnp.ones(3), opt_state, value=value)
        return opt_state, scalars

    opt_state = tx.init(jnp.ones(3))
    opt_state, scalars = step(opt_state, LOSSES)
    assert scalars["log_normalizer"] == scalars["log_normalizer_drift"] == 0  # none so far
    _, scalars = step(opt_state, LOSSES)  # u is 0.9 of the batch's mean, which has not changed
    np.testing.assert_allclose(scalars["log_normalizer_drift"], -np.log(0.9), rtol=1e-5)
    log_mean = 2 * scalars["robust_loss"]
    np.testing.assert_allclose(scalars["log_normalizer"], log_mean + np.log(0.9), rtol=1e-5)
    assert "class_mass/0" not in scalars
