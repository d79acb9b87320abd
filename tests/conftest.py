import pathlib

import jax
import optax
import pytest

import absgd_jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the suite's time is compilation.
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_report_header():
    return f"jax {jax.__version__}, optax {optax.__version__}, {absgd_jax.__file__}"


@pytest.fixture
def x64(request):
    """Enables float64; parametrized indirectly, where it is asked to."""
    jax.config.update("jax_enable_x64", getattr(request, "param", True))
    yield
    jax.config.update("jax_enable_x64", False)
