import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from absgd_jax import robust_loss

TEMPERATURES = (0.1, 1.0, 7.5, -0.1, -1.0, -7.5)
LOSSES = np.random.default_rng(0).gamma(2.0, size=24).astype(np.float32)

value_and_grad = jax.jit(jax.value_and_grad(robust_loss))


@jax.jit
def masked_value_and_grad(losses, temperature, where):
    return jax.value_and_grad(robust_loss)(losses, temperature, where=where)


def expected_loss(losses, temperature):
    losses = np.asarray(losses, np.float64)
    return temperature * scipy.special.logsumexp(losses / temperature, b=1 / losses.size)


def expected_weights(losses, temperature):
    return scipy.special.softmax(np.asarray(losses, np.float64) / temperature)


class TestRobustLoss:
    @pytest.mark.parametrize("temperature", TEMPERATURES)
    @pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4)])
    def test_value_and_gradient(self, temperature, shape):
        losses = LOSSES.reshape(shape)
        loss, grads = value_and_grad(losses, temperature)
        np.testing.assert_allclose(loss, expected_loss(losses, temperature), rtol=1e-6)
        np.testing.assert_allclose(grads, expected_weights(losses, temperature), rtol=1e-5)

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_higher_derivatives_in_losses_and_temperature(self, temperature, x64):
        losses = jnp.asarray(LOSSES[:5], jnp.float64)
        check_grads(jax.jit(robust_loss), (losses, jnp.float64(temperature)), order=2)

    @pytest.mark.parametrize("temperature", [np.inf, -np.inf, 1e8, -1e8, 1e30, -3e38])
    def test_meets_the_mean(self, temperature):
        loss, grads = value_and_grad(LOSSES, temperature)
        np.testing.assert_allclose(loss, LOSSES.mean(dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(grads, 1 / LOSSES.size, rtol=1e-6)

    def test_gradient_in_an_infinite_temperature_is_zero(self):
        with jax.debug_nans(True):
            assert jax.jit(jax.grad(robust_loss, argnums=1))(LOSSES, jnp.inf) == 0

    @pytest.mark.parametrize("temperature", [1.0, -1.0])
    def test_one_example_among_many(self, temperature):
        # Where log1p(mean expm1) has lost its digits: the mean of exp is 1 / n.
        losses = np.full(100_003, -40 * temperature, np.float32)
        losses[7] = 0.0
        loss, _ = value_and_grad(losses, temperature)
        np.testing.assert_allclose(loss, -temperature * np.log(losses.size), rtol=1e-6)

    @pytest.mark.parametrize("temperature", [1e-6, -1e-6, 1e-3, 1.0, -1.0, np.inf])
    @pytest.mark.parametrize("largest", [1e4, 1e30])
    def test_enormous_losses(self, temperature, largest):
        losses = np.array([-largest, 0.0, 0.5 * largest, largest], np.float32)
        loss, grads = value_and_grad(losses, temperature)
        assert losses.min() <= loss <= losses.max()
        np.testing.assert_allclose(grads.sum(), 1, rtol=1e-6)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_losses_fused_into_it(self, sign):
        """Their last product is then not rounded as it is where the largest is looked for."""
        temperatures = sign * jnp.array([1e-6, 1e-3])
        scales = jnp.linspace(1e4, 1e6, 64)
        loss, grads = jax.jit(
            jax.vmap(lambda t: jax.vmap(lambda s: value_and_grad(s * LOSSES, t))(scales))
        )(temperatures)
        largest = (LOSSES.max() if sign > 0 else LOSSES.min()) * scales
        np.testing.assert_allclose(loss, jnp.stack([largest] * 2), rtol=1e-5)
        np.testing.assert_allclose(grads.sum(axis=-1), 1, rtol=1e-5)

    @pytest.mark.parametrize("temperature", [0.5, -0.5, np.inf])
    def test_mask(self, temperature):
        where = np.arange(24) % 3 != 0
        losses = np.where(where, LOSSES, np.resize([np.nan, np.inf, -np.inf, 1e38], 24))
        loss, grads = masked_value_and_grad(losses, temperature, where)
        kept_loss, kept_grads = value_and_grad(LOSSES[where], temperature)
        np.testing.assert_allclose(loss, kept_loss, rtol=1e-6)
        np.testing.assert_allclose(grads[where], kept_grads, rtol=1e-6)
        np.testing.assert_array_equal(grads[~where], 0)

    @pytest.mark.parametrize("temperature", [0.5, -0.5, np.inf])
    def test_nothing_left(self, temperature):
        losses = np.array([np.nan, np.inf, 1.0], np.float32)
        loss, grads = masked_value_and_grad(losses, temperature, np.zeros(3, bool))
        assert loss == 0
        np.testing.assert_array_equal(grads, 0)
        assert robust_loss(np.zeros((0,), np.float32), temperature) == 0

    @pytest.mark.parametrize(
        ("dtype", "rtol"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 1e-6)]
    )
    def test_dtypes(self, dtype, rtol):
        losses = jnp.asarray(LOSSES, dtype)
        loss, grads = value_and_grad(losses, 0.5)
        assert loss.dtype == jnp.float32
        assert grads.dtype == losses.dtype
        # Float32 inside: the loss is exact for the losses as they were rounded.
        np.testing.assert_allclose(loss, expected_loss(losses, 0.5), rtol=1e-6)
        np.testing.assert_allclose(
            grads.astype(jnp.float32), expected_weights(losses, 0.5), rtol=rtol, atol=1e-6
        )

    def test_float64(self, x64):
        losses = LOSSES.astype(np.float64)
        loss, grads = value_and_grad(losses, 0.5)
        assert loss.dtype == grads.dtype == jnp.float64
        np.testing.assert_allclose(loss, expected_loss(losses, 0.5), rtol=1e-15)
        loss, _ = value_and_grad(losses, -1e14)
        np.testing.assert_allclose(loss, losses.mean(), rtol=1e-14)

    def test_an_infinite_loss(self):
        losses = jnp.array([1.0, jnp.inf])
        assert robust_loss(losses, 1.0) == jnp.inf
        # A soft minimum does not see it, but for the count.
        np.testing.assert_allclose(robust_loss(losses, -1.0), 1 + np.log(2), rtol=1e-6)

    def test_temperature_is_traced_and_mapped(self):
        losses = jnp.asarray(LOSSES)
        loss = jax.jit(chex.assert_max_traces(lambda t: robust_loss(losses, t), n=1))
        temperatures = jnp.array((*TEMPERATURES, np.inf))
        each = jnp.stack([loss(t) for t in temperatures])
        mapped = jax.jit(jax.vmap(lambda t: robust_loss(losses, t)))(temperatures)
        chex.assert_trees_all_close(mapped, each, rtol=1e-6)

    def test_traced_values_are_not_checked(self):
        assert jnp.isnan(jax.jit(robust_loss)(LOSSES, jnp.nan))

    def test_remat(self):
        expected = value_and_grad(LOSSES, 0.5)
        rematerialized = jax.checkpoint(lambda losses: robust_loss(losses, 0.5))
        actual = jax.jit(jax.value_and_grad(rematerialized))(LOSSES)
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)

    @pytest.mark.parametrize("temperature", [0.5, -0.5, np.inf])
    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    def test_sharded_arrays(self, temperature, axis_type):
        mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))
        where = np.arange(24) > 4  # of the first device none, of the second one
        expected = masked_value_and_grad(LOSSES, temperature, where)
        placed = jax.device_put((LOSSES, where), NamedSharding(mesh, P("batch")))
        with jax.set_mesh(mesh):
            actual = masked_value_and_grad(placed[0], temperature, placed[1])
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)
