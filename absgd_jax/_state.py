"""The state of ``scale_by_attention``, anywhere in an optimiser's state, and the λ in it."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from absgd_jax._checks import at_least_float32, check_number, Condition

# From here on |λ| is inf: l / λ and 1 / λ would be denormal, which XLA flushes to zero.
INFINITE = 1e30
# Below it |λ| is this: at losses of about 1 their exponents would have no digits left in float32.
SMALLEST = 1e-6

TEMPERATURE: Condition = (
    lambda x: abs(x) >= SMALLEST,
    f"be {SMALLEST:g} or more, or -{SMALLEST:g} or less",
)

_Kind = TypeVar("_Kind")


class AttentionState(NamedTuple):
    """State of :func:`scale_by_attention`: four scalars.

    Attributes:
      count: Number of updates so far.
      temperature: λ of the next loss and of its update.
      baseline: V, the loss whose slope under :func:`tilt` is 1. Before the first weighted batch it
        is the last mean loss, or 0.
      averaged: Number of weighted batches in the average V; 0 at γ = 1, where nothing is averaged;
        less than 0 right after a batch whose losses were all out of sight of V.
    """

    count: ArrayLike  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
    temperature: ArrayLike  # shape=(), dtype=jnp.float32, or jnp.float64 under jax_enable_x64
    baseline: ArrayLike  # shape=(), dtype as temperature
    averaged: ArrayLike  # shape=(), dtype=jnp.int32


def get_temperature(opt_state: optax.OptState) -> jax.Array:
    """Temperature for the next loss, from any optimiser's state that holds it.

    To set it, call ``optax.tree.set(opt_state, temperature=...)`` between an update and the next
    loss. If the optimiser was given a number, the new value stays; any other temperature goes on
    from it, or overwrites it after one step. An array of the leaf's dtype, such as
    ``jnp.float32(2.0)``, avoids another compilation. ``optax.inject_hyperparams`` keeps a leaf of
    that name, too, so that ``optax.tree.get`` finds two; there set
    ``opt_state.hyperparams["temperature"]``, which is used from the next update on.

    Args:
      opt_state: State of a transformation that holds one :func:`scale_by_attention`, alone or
        inside any chain or wrapper.

    Returns:
      λ, a float scalar.

    Raises:
      ValueError: The state doesn't hold exactly one :class:`AttentionState`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from absgd_jax import absgd, get_temperature
      >>> opt_state = absgd(0.1, temperature=5.0).init(jnp.zeros(3))
      >>> print(get_temperature(opt_state))
      5.0
      >>> opt_state = optax.tree.set(opt_state, temperature=jnp.float32(2.0))
      >>> print(get_temperature(opt_state))
      2.0
    """
    return clamped(attention_of(opt_state).temperature)


def attention_of(opt_state: optax.OptState) -> AttentionState:
    """The attention's state inside the optimiser's."""
    return the_one(
        AttentionState,
        "opt_state",
        opt_state,
        "pass the state of absgd, abadam or scale_by_attention, or of what wraps it, restored into "
        "the structure that init gives. To train parts of a model apart, put one "
        "scale_by_attention in front of optax.partition.",
    )


def all_of(kind: type[_Kind], tree: Any) -> list[_Kind]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def the_one(kind: type[_Kind], name: str, tree: Any, remedy: str) -> _Kind:
    """The one node of that kind in the argument of that name."""
    found = all_of(kind, tree)
    if len(found) != 1:
        got = f"{len(found)} {kind.__name__}"
        if not found and [id(leaf) for leaf in jax.tree.leaves(tree)] == [id(tree)]:
            got = repr(tree)
        raise ValueError(f"{name} must hold one {kind.__name__}, got {got}; {remedy}")
    return found[0]


def clamped(lam: ArrayLike) -> jax.Array:
    """λ as it is used: floating point, and not between -1e-6 and 1e-6."""
    lam = jnp.asarray(lam)
    lam = lam.astype(at_least_float32(lam.dtype))
    return jnp.copysign(jnp.maximum(jnp.abs(lam), SMALLEST), lam)


def is_infinite(lam: jax.Array) -> jax.Array:
    return jnp.abs(lam) >= INFINITE


def inverse(lam: jax.Array) -> jax.Array:
    return jnp.where(is_infinite(lam), 0, 1 / lam)


def unit(lam: jax.Array, baseline: jax.Array) -> jax.Array:
    """λ; or in the place of ∞, for the divergences that fall as 1 / λ² there, the losses' size."""
    return jnp.where(is_infinite(lam), jnp.copysign(jnp.abs(baseline) + 1, lam), lam)


def check_temperature(temperature: ArrayLike, name: str = "temperature") -> None:
    if callable(temperature) or isinstance(temperature, tuple):
        raise TypeError(
            f"{name} must be a number here, got a schedule; pass what the schedule gives for "
            "this step, which is get_temperature(opt_state)."
        )
    remedy = "positive favours hard examples, negative easy ones, inf is the plain mean"
    check_number(name, temperature, TEMPERATURE, f"{remedy}; jax.vmap runs several")


def eps(dtype: Any) -> float:
    return float(np.finfo(dtype).eps)
