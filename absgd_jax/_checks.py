"""What several parts of the library ask of their arguments."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def is_concrete(x: object) -> bool:
    """Whether x is a Python or NumPy value, which can be checked without touching a device."""
    return not isinstance(x, jax.Array)


def as_losses(losses: ArrayLike, name: str = "losses") -> jax.Array:
    """``losses``, the argument of that name, in float32 at least: one entry an example."""
    losses = jnp.asarray(losses)
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {losses.dtype}; cast them first.")
    if losses.ndim == 0:
        raise ValueError(
            f"{name} must hold one entry an example, got a scalar; pass the per-example {name}, "
            "before any mean or sum."
        )
    return losses.astype(at_least_float32(losses.dtype))


def as_mask(where: ArrayLike, shape: tuple[int, ...], of: str = "losses") -> jax.Array:
    """``where`` as a boolean array of the shape of the losses."""
    where = jnp.asarray(where)
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


def as_scalar(name: str, loss: ArrayLike) -> jax.Array:
    """``loss``, the argument of that name, as an array of no dimensions."""
    loss = jnp.asarray(loss)
    if loss.shape != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {loss.shape}; pass robust_loss(losses, "
            "temperature), not the losses."
        )
    return loss
