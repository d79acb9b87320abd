"""What several parts of the library ask of their arguments.

Values are checked where they are concrete, and never those that are traced.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Condition = tuple[Callable[[Any], bool], str]  # and in words: what the number must

POSITIVE: Condition = (lambda x: 0 < x < np.inf, "be positive and finite")
ABOVE_ZERO: Condition = (lambda x: x > 0, "be positive")
NOT_NEGATIVE: Condition = (lambda x: 0 <= x < np.inf, "be 0 or more and finite")
DECAY: Condition = (lambda x: 0 <= x < 1, "lie in [0, 1)")
SHARE: Condition = (lambda x: 0 < x <= 1, "lie in (0, 1]")


def whole_number(least: int) -> Condition:
    return lambda x: hasattr(x, "__index__") and x >= least, f"be a whole number from {least} on"


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if wide else jnp.dtype(jnp.float32)


def is_concrete(x: object) -> bool:
    """Whether x is a Python or NumPy value, which can be checked without touching a device."""
    return not isinstance(x, jax.Array)


def are_numbers(x: object) -> bool:
    """Whether x, which is concrete, is a real number or an array of these."""
    return np.asarray(x).dtype.kind in "biuf"


def check_number(name: str, x: Any, condition: Condition, remedy: str = "") -> None:
    """Raises unless ``x``, the argument of that name, is a scalar and meets the condition."""
    holds, must = condition
    end = f"; {remedy}." if remedy else "."
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_fully_addressable:
        x = np.asarray(x).tolist()
    if np.shape(x) != ():
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(x)}{end}")
    if is_concrete(x):
        if not are_numbers(x):
            raise TypeError(f"{name} must be a number, got {x!r}{end}")
        if not holds(x):
            raise ValueError(f"{name} must {must}, got {x}{end}")


def as_given(name: str, x: Any) -> jax.Array | np.ndarray:
    """``x``, the argument of that name, as an array: JAX's if it is one, else NumPy's."""
    try:
        return x if isinstance(x, jax.Array) else np.asarray(x)
    except ValueError:
        raise ValueError(f"{name} must be an array, got {x!r}; give its rows one length.") from None


def as_array(name: str, x: ArrayLike) -> jax.Array:
    """``x``, the argument of that name, as an array."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of numbers, got {x!r}.") from None


def as_floats(name: str, x: ArrayLike) -> jax.Array:
    """``x``, the argument of that name, in float32 at least."""
    x = as_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {x.dtype}; cast them first.")
    return x.astype(at_least_float32(x.dtype))


def as_batch(name: str, x: ArrayLike) -> jax.Array:
    """As :func:`as_floats`, of one entry an example."""
    x = as_floats(name, x)
    if x.ndim == 0:
        raise ValueError(
            f"{name} must hold one entry an example, got a scalar; pass the per-example {name}, "
            "before any mean or sum."
        )
    return x


def as_mask(where: ArrayLike, shape: tuple[int, ...], of: str = "losses") -> jax.Array:
    """``where`` as a boolean array of the shape of the losses."""
    where = as_array("where", where)
    if where.dtype != bool:
        raise TypeError(
            f"where must be boolean, got {where.dtype}; a mask of numbers needs `mask > 0`."
        )
    if where.shape != shape:
        raise ValueError(
            f"where must have the shape of {of}, {shape}, got {where.shape}; "
            "broadcast it with jnp.broadcast_to if that is meant."
        )
    return where


def check_state(state: object, kind: type) -> None:
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be an {kind.__name__}, got {type(state).__name__}; start from what init "
            "gives, and pass on the state that update returns."
        )
