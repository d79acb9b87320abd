import os
import pathlib

import jax
import optax
import pytest
from hypothesis import HealthCheck, settings

import absgd_jax

ROOT = pathlib.Path(__file__).parents[1]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of the suite's time. What XLA's optimisations make of the code is for a part of
# .ci/run; without them it compiles three times as fast, also in programs that tests start.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    jax.config.update("jax_disable_most_optimizations", True)
    # The older code generator, which takes less than half the time.
    os.environ["XLA_FLAGS"] = f"{os.getenv('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
# What one process of `pytest -n auto` has compiled, the others need not.
if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# By default the cases of a test are the same every time, so that what fails is what was changed;
# new ones are what the long profile is for.
shared = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("default", max_examples=170, derandomize=True, **shared)
settings.register_profile("ci", max_examples=650, derandomize=True, **shared)
settings.register_profile("long", max_examples=13_000, print_blob=True, **shared)
settings.load_profile("default")


def pytest_report_header():
    return f"jax {jax.__version__}, optax {optax.__version__}, {absgd_jax.__file__}"


@pytest.fixture
def x64(request):
    """Enables float64; parametrized indirectly, where it is asked to."""
    jax.config.update("jax_enable_x64", getattr(request, "param", True))
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def users_promotion():
    """Implicit promotion, as users have it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
