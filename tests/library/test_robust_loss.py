import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from absgd_jax import robust_loss

LOSSES = np.random.default_rng(0).gamma(2.0, size=24).astype(np.float32)

value_and_grad = jax.jit(jax.value_and_grad(robust_loss))


class TestRobustLoss:
    def test_higher_derivatives_in_losses_and_temperature(self, x64):
        temperatures = jnp.array([0.1, 7.5, -0.1, -7.5])
        each = jax.jit(jax.vmap(robust_loss, (None, 0)))
        check_grads(each, (jnp.asarray(LOSSES[:5], jnp.float64), temperatures), order=2)

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

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    def test_dtypes(self, dtype, x64):
        """Float32 inside, or wider; the values are those of test_fuzz."""
        loss, grads = jax.eval_shape(value_and_grad, jnp.asarray(LOSSES, dtype), 0.5)
        assert loss.dtype == ("float64" if dtype == "float64" else "float32")
        assert grads.dtype == dtype

    def test_of_none(self):
        assert robust_loss(np.zeros((0,), np.float32), 0.5) == 0

    def test_an_infinite_loss(self):
        losses = jnp.array([1.0, jnp.inf])
        assert robust_loss(losses, 1.0) == jnp.inf
        # A soft minimum does not see it, but for the count.
        np.testing.assert_allclose(robust_loss(losses, -1.0), 1 + np.log(2), rtol=1e-6)
