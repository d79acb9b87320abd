import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from absgd_jax import absgd, AttentionState, diagnostics
from absgd_jax.diagnostics import class_mass, effective_sample_size, kl_divergence, largest_weight
from tests.support.attended import slopes_and_sums
from tests.support.reference import divergences

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
    chi2, kl = divergences(p)
    loss = losses.mean() if np.isinf(lam) else lam * np.log(np.exp(losses / lam).mean())
    finite = np.isfinite(lam)
    return {
        "mean_loss": losses.mean(),
        "robust_loss": loss,
        "temperature": lam,
        "effective_sample_size": 1 / (1 + chi2),
        "largest_weight": p.max(),
        "kl_divergence": kl,
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
    lam, baseline = jnp.asarray(lam, jnp.float32), jnp.float32(BASELINE)
    state = AttentionState(jnp.int32(1), lam, baseline, jnp.int32(1))
    return diagnostics.summary(losses, state, num_classes=3, **kwargs)


summarize_jit = jax.jit(summarize)


@functools.cache
def on_devices(check_vma):
    def on_each(lam, losses, labels, where):
        return summarize(losses, lam, labels=labels, where=where, axis_name="data")

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), *[P("data")] * 3), "out_specs": P()}
    return jax.jit(jax.shard_map(on_each, mesh=mesh, check_vma=check_vma, **specs))


@jax.jit
def measures(weights):
    return effective_sample_size(weights), largest_weight(weights), kl_divergence(weights)


@pytest.mark.parametrize("lam", [0.03, 0.3, 2.0, -0.3, np.inf])
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
        check(on_devices(check_vma)(jnp.float32(lam), LOSSES, LABELS, WHERE), lam, WHERE)


class TestWeights:
    @pytest.mark.parametrize("scale", [1e-41, 2e-38, 1e30, 3e38])
    def test_whose_sum_leaves_the_range_of_floats(self, scale):
        """Down to denormal numbers, which XLA takes for 0."""
        rng = np.random.default_rng(1)
        weights = np.float32(scale * rng.uniform(0.01, 1, (8, 4)))
        where = rng.random((8, 4)) > 0.3
        labels = rng.integers(0, 3, (8, 4))

        def found(weights, labels, where):
            functions = effective_sample_size, largest_weight, kl_divergence
            scalars = [f(weights, where=where) for f in functions]
            return *scalars, class_mass(weights, labels, 3, where=where)

        p = np.where(where, np.float64(weights), 0)
        p /= p.sum()
        chi2, kl = divergences(p[where])
        ess, largest, found_kl, mass = jax.jit(found)(weights, labels, where)
        np.testing.assert_allclose((ess, largest), (1 / (1 + chi2), p.max()), rtol=1e-5)
        np.testing.assert_allclose(found_kl, kl, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mass, [p[labels == c].sum() for c in range(3)], rtol=1e-5)

    @pytest.mark.parametrize("scale", [1e-20, 1.0, 1e30])
    def test_gradients(self, scale):
        w = np.array([0.5, 1, 2, 4])
        weights = np.float32(scale * w)
        grads = jax.grad(effective_sample_size)(weights)
        expected = (2 * w.sum() - w.sum() ** 2 * 2 * w / (w**2).sum()) / (4 * (w**2).sum())
        np.testing.assert_allclose(scale * np.float64(grads), expected, rtol=1e-5)

    def test_all_0(self):
        with jax.debug_nans(True):
            scalars = *measures(jnp.zeros(4)), *class_mass(jnp.zeros(4), jnp.arange(4), 4)
        np.testing.assert_array_equal(scalars, 0)

    def test_nan_is_passed_on(self):
        assert np.all(np.isnan(measures(jnp.array([1.0, jnp.nan]))))

    @pytest.mark.parametrize("n", [1, 2, 1000])
    def test_extremes(self, n):
        one, same = np.zeros(n, np.float32), np.full(n, 7.0, np.float32)
        one[0] = 7.0
        ess, largest, kl = measures(one)
        np.testing.assert_allclose(ess, 1 / n, rtol=1e-6)
        assert largest == 1
        np.testing.assert_allclose(kl, np.log(n), rtol=5e-7, atol=1e-6)
        ess, largest, kl = measures(same)
        np.testing.assert_allclose((ess, largest), (1, 1 / n), rtol=1e-6)
        assert 0 <= kl < 1e-6

    @pytest.mark.parametrize("lam", [0.5, np.inf])
    def test_no_nan_on_the_way(self, lam):
        with jax.debug_nans(True):  # which sees every operation outside jit
            check(summarize(LOSSES, lam, labels=LABELS, where=WHERE), lam, WHERE)
            scalars = summarize(LOSSES, lam, labels=LABELS, where=np.zeros_like(WHERE))
        normalizer = {"log_normalizer", "log_normalizer_drift"} if np.isfinite(lam) else set()
        assert {k for k, x in scalars.items() if x != 0} == {"temperature"} | normalizer

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
        _, sums = slopes_and_sums(losses, opt_state)
        _, opt_state = tx.update(jnp.ones(3), opt_state, sums=sums)
        return opt_state, scalars

    opt_state = tx.init(jnp.ones(3))
    opt_state, scalars = step(opt_state, LOSSES)
    assert scalars["log_normalizer"] == scalars["log_normalizer_drift"] == 0  # none so far
    _, scalars = step(opt_state, LOSSES)  # u is 0.9 of the batch's mean, which has not changed
    np.testing.assert_allclose(scalars["log_normalizer_drift"], -np.log(0.9), rtol=1e-5)
    log_mean = 2 * scalars["robust_loss"]
    np.testing.assert_allclose(scalars["log_normalizer"], log_mean + np.log(0.9), rtol=1e-5)
    assert "class_mass/0" not in scalars
