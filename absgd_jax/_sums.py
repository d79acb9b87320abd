r"""What the update needs to know of a batch: sums that ride on its gradient.

Nobody but the loop knows which weight c_i an example has in its loss: 1/n in a mean, 1 in a sum, 0
behind a mask, times a loss scale. The gradient knows. With zeros q_k, the tangent of a loss is

    d tilt(l_i) = exp(z_i) dl_i + Σ_k f_k(z_i) dq_k / 2^20,    z_i = (l_i - V) / λ

so that the gradient by q_k is Σ_i c_i f_k(z_i) / 2^20, in every layout in which the gradient by the
parameters is right. Means are ratios of two such sums, and no scale matters to them. The factor
hides the sums from a norm over all gradients; a power of 2 costs no digits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from absgd_jax._state import all_of, eps, inverse, is_infinite, the_one, unit

_FACTOR = 2.0**-20
_SHAPE = (10,)
_LARGEST, _LARGE = 1e30, 1e9  # of levels, and of those whose squares are summed
_REPLACED = ("value", "loss", "losses")  # by the sums
_PASSED = (
    "`loss, (grads, sums) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, Sums())`, with "
    "`tilt(losses, opt_state, sums)` in loss_fn, and `tx.update(grads, opt_state, params, "
    "sums=sums)`"
)
_BESIDE = (
    "where nothing can be passed on, as by flax's TrainState or optax.MultiSteps, "
    '`params = {"net": params, "sums": zero_sums()}`, with `tilt(losses, opt_state, params)` in '
    "loss_fn"
)


class _Values(NamedTuple):
    values: Any  # shape=(10,), dtype=jnp.float32, or jnp.float64 under jax_enable_x64


class Sums(_Values):
    r"""What the update needs to know of a batch: ``Sums()`` are zeros, and their gradient the sums.

    Let :math:`c_i` be the weight of an example in the loss and :math:`z_i = (l_i - V) / \lambda`.
    Each entry is a sum over the batch, times :math:`2^{-20}`, and only their ratios are used. At an
    infinite :math:`\lambda` its place is taken by :math:`|V| + 1`, and the sums are of leading
    order.

    All are one array, and so one buffer in the all-reduce of the gradients.

    Attributes:
      values: All of the following, in this order.
      exp: :math:`\sum c_i e^{z_i}`.
      excess: :math:`\sum c_i (e^{z_i} - 1)`, which keeps its digits if λ is large.
      square: :math:`\sum c_i (e^{z_i} - 1)^2`, for :math:`\chi^2`.
      entropy: :math:`\sum c_i (z_i e^{z_i} - e^{z_i} + 1)`, for the KL divergence.
      level: :math:`\sum c_i z_i`, with unbounded :math:`z_i`.
      bad: :math:`\sum c_i` over the losses that are not finite.
      weight: :math:`\sum c_i`.
      baseline: :math:`\sum c_i V`.
      inverse: :math:`\sum c_i / \lambda`.
      null: 0. Any other value was added by something else to every leaf of the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from absgd_jax import absgd, Sums, tilt
      >>> opt_state = absgd(0.1, temperature=1.0).init(jnp.zeros(3))
      >>> def loss_fn(losses, sums):
      ...   return tilt(losses, opt_state, sums).mean()
      >>> _, sums = jax.grad(loss_fn, argnums=(0, 1))(jnp.array([0.0, 1.0]), Sums())
      >>> print(f"{sums.exp / sums.weight:.3f}")  # (1 + e) / 2
      1.859
    """

    __slots__ = ()

    def __new__(cls, values: Any = ...) -> "Sums":
        # An array of its own each time, as JAX keeps the dtype that it gave one of NumPy's. It has
        # no stride, by which the update tells it from a gradient.
        return super().__new__(cls, np.broadcast_to(0.0, _SHAPE) if values is ... else values)

    exp = property(lambda self: self.values[0])
    excess = property(lambda self: self.values[1])
    square = property(lambda self: self.values[2])
    entropy = property(lambda self: self.values[3])
    level = property(lambda self: self.values[4])
    bad = property(lambda self: self.values[5])
    weight = property(lambda self: self.values[6])
    baseline = property(lambda self: self.values[7])
    inverse = property(lambda self: self.values[8])
    null = property(lambda self: self.values[9])


def zero_sums() -> Sums:
    """``Sums()`` as arrays, to stand beside the parameters.

    Some loops pass only gradients to the update, as those of flax's ``TrainState`` and
    ``optax.MultiSteps`` do. There let the sums be another leaf of what is differentiated and
    updated. They stay zero. Whatever is meant for the network's parameters, such as counting,
    casting, sharding or a penalty, goes to ``params["net"]``.

    Returns:
      A :class:`Sums` of zeros, in the default float dtype.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import absgd, tilt, zero_sums
      >>> x, y = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([0.0, 1.0, 7.0])
      >>> tx = absgd(0.02, temperature=1.0)
      >>> params = {"net": jnp.zeros(1), "sums": zero_sums()}
      >>> opt_state = tx.init(params)
      >>> @jax.jit
      ... def step(params, opt_state):
      ...   def loss_fn(params):
      ...     losses = (x @ params["net"] - y) ** 2
      ...     return tilt(losses, opt_state, params).mean()
      ...   grads = jax.grad(loss_fn)(params)
      ...   updates, opt_state = tx.update(grads, opt_state, params)
      ...   return optax.apply_updates(params, updates), opt_state
      >>> for _ in range(100):
      ...   params, opt_state = step(params, opt_state)
      >>> print(params["net"].round(1))  # the least squares have 3
      [2.7]
    """
    return Sums(jnp.zeros(_SHAPE, float))


def zeros_in(tree: Any) -> Sums:
    """The one ``Sums`` in what :func:`tilt` is given, as an array."""
    zeros = checked(the_one(Sums, "sums", tree, f"{_PASSED}; or {_BESIDE}."))
    return Sums(jnp.asarray(zeros.values))


def taken(updates: Any, sums: Any, extra_args: dict[str, Any]) -> tuple[Any, Sums]:
    """The updates, in which there are zeros for the sums; and these, from there or as given."""
    inside = all_of(Sums, updates)
    if len(inside) + (sums is not None) > 1:
        where = "" if sums is None else " and one more as an argument"
        raise ValueError(
            f"sums must be given once, got {len(inside)} among the updates{where}; {_PASSED}; or "
            f"{_BESIDE}."
        )
    if inside:
        updates = jax.tree.map(
            lambda x: jax.tree.map(jnp.zeros_like, x) if isinstance(x, Sums) else x,
            updates,
            is_leaf=lambda x: isinstance(x, Sums),
        )
        sums = inside[0]
    if sums is None:
        why = [f" `{name}` is not needed." for name in _REPLACED if name in extra_args]
        if all_of(optax.MaskedNode, updates):
            why.append(" Let the mask or the partition pass on the sums, too.")
        raise TypeError(f"sums is missing; {_PASSED}; or {_BESIDE}.{''.join(why)}")
    if not isinstance(sums, Sums) or getattr(sums.values, "strides", None) == (0,):
        raise TypeError(f"sums must be the gradient by Sums(), got {sums!r}; {_PASSED}.")
    return updates, checked(sums)


def checked(sums: Sums) -> Sums:
    x = sums.values
    if x is None or isinstance(x, optax.MaskedNode):
        raise TypeError(
            f"sums must be an array, got {x!r}; let the mask or the partition pass on the sums, "
            "too, and take zero_sums() where only arrays are differentiated."
        )
    dtype = jnp.result_type(x)
    if jnp.shape(x) != _SHAPE:
        raise ValueError(
            f"sums must have shape {_SHAPE}, got {jnp.shape(x)}; reduce the gradients of "
            "examples or devices first, and train several models under jax.vmap."
        )
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 4:
        raise TypeError(
            f"sums must be float32 or wider, got {dtype}; cast params['net'], not the sums."
        )
    return sums


def bound(dtype: Any) -> float:
    """Of z: neither slopes nor their squares in a norm over gradients overflow. 35 in float32."""
    return 35 * float(np.log(np.finfo(dtype).max) / np.log(np.finfo(np.float32).max))


@jax.custom_jvp
def ride(losses: jax.Array, sums: Sums, lam: jax.Array, baseline: jax.Array) -> jax.Array:
    """The losses, in whose tangents there are weights and sums."""
    # In shard_map a tangent must vary over the devices as the value does. This costs nothing.
    return jnp.where(sums.weight == 0, losses, losses)


@ride.defjvp
def _ride_jvp(
    primals: tuple[jax.Array, Sums, jax.Array, jax.Array],
    tangents: tuple[jax.Array, Sums, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    losses, _, lam, baseline = primals
    plain, finite, most = is_infinite(lam), jnp.isfinite(losses), bound(losses.dtype)
    level = jnp.where(finite, losses - baseline, 0) / unit(lam, baseline)
    level = jnp.clip(level, -_LARGEST, _LARGEST)
    z, half = (jnp.clip(level, -b, b) for b in (most, most / 2))
    linear = jnp.clip(level, -_LARGE, _LARGE)  # at λ = ±∞ all to leading order
    exp = jnp.where(plain, 1, jnp.exp(z))
    excess = jnp.where(plain, linear, jnp.expm1(z))
    square, entropy = divergences(half, jnp.expm1(half))
    square = jnp.where(plain, linear**2, square)
    entropy = jnp.where(plain, linear**2 / 2, entropy)
    # Stacked they are one reduction to the compiler; the ones are for the weight.
    terms = exp, excess, square, entropy, level, jnp.where(finite, 0, 1), 1
    stack = jnp.stack([jnp.zeros_like(losses) + f for f in terms])
    # V and λ are multiples of the weight, so that they are told without a sum's rounding.
    told = jnp.stack([jnp.ones_like(lam), baseline, inverse(lam), jnp.zeros_like(lam)])
    q = tangents[1].values.astype(losses.dtype)
    q = jnp.append(q[:6], jnp.sum(told.astype(q.dtype) * q[6:]))
    riding = jnp.sum(stack * q.reshape(-1, *[1] * losses.ndim), axis=0)
    # To a loss that is far off a slope of exp(-35) may be too much. A sum would lose a smaller one.
    slope = jnp.where(plain, 1, jnp.exp(jnp.clip(level, -2.25 * most, most)))
    return ride(*primals), jnp.where(finite, slope, 1) * tangents[0] + _FACTOR * riding


def divergences(z: jax.Array, excess: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What, at z_i = log(n w_i), the means are χ² = n Σ w_i² - 1 and KL = Σ w_i log(n w_i) of.

    Each vanishes at z = 0 together with its slope, so no digits are lost however small z is. The
    effective sample size is 1 / (1 + χ²). ``excess`` is expm1(z).
    """
    # Near 0 the series, where the closed form is a difference of what is almost the same.
    small = jnp.abs(z) < eps(z.dtype) ** 0.25
    series = z**2 * (1 / 2 + z * (1 / 3 + z / 8))
    return excess**2, jnp.where(small, series, z * (excess + 1) - excess)


def means(sums: Sums, dtype: jnp.dtype) -> tuple[Sums, jax.Array, jax.Array]:
    """Of a batch; whether anything counts in it; and whether they tell of what does."""
    values = jnp.asarray(sums.values).astype(dtype)
    values -= values[-1]  # null
    weight = Sums(values).weight
    counted = jnp.any(values != 0)  # weights of both signs may sum to 0
    ratios = values / jnp.where(weight == 0, 1, jnp.abs(weight))  # the weight's has its sign
    tell = counted & jnp.isfinite(jnp.sum(ratios))
    neutral = jnp.zeros_like(ratios).at[0].set(1)  # exp is 1
    return Sums(jnp.where(tell, ratios, neutral)), counted, tell
