"""Finite in, finite out; and what must not matter does not.

Hypothesis draws a few numbers a case, which a failure shrinks, and NumPy makes a batch of them. By
default it is 10,400 cases, always the same; ``--hypothesis-profile=long`` has 20 times as many, and
others each time.

Tolerances are bounds on rounding: ε is the distance from 1 to the next number, n the number of
losses and M the largest |l_i|. A sum of terms of one sign is within n ε / 2 of itself; exp, log,
expm1 and log1p are within c = 4 ε, but XLA's log1p in float64, near -0.4, is within c = 128 ε. The
gaps l_i - max l, and so z_i = gap / λ, are within ε of themselves where losses are whole numbers
times a unit, and otherwise within ε M. Then

    F     is within (4 n + 8 + 2 c) ε M. The error is that of |λ| mean |expm1(z)|, at most 2 M,
          which log1p no more than doubles; or, where that is not used, of |λ| <= 4 M. XLA flushes
          to 0 what is below the smallest normal number, which costs |λ| times that in z.
    w_i   is within (n + 8 + |z_i|) ε of itself, then rounded to the dtype of the losses. It is
          flushed where it is too small, also times λ, by which the backward pass multiplies it.
    V     moves by λ log1p(x) from V or F, x = share expm1(-|V - F| / |λ|): x is within 8 ε of
          itself, and the logarithm within ε (8 |x| / (1 + x) + c |log1p(x)|).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from absgd_jax import (
    attention,
    AttentionState,
    robust_loss,
    scale_by_attention,
    target_ess,
    target_kl,
)

# Each is one more compilation. Beside them, the shape of as many twice, where that is one, too.
SHAPES = {(1,): (2,), (2,): None, (24,): (4, 12), (4, 12): None, (1000,): None}


class Batch(NamedTuple):
    """A batch of losses, and how it is weighted."""

    seed: int
    shape: tuple[int, ...]
    kind: str
    magnitude: float  # of the losses: from -1, the smallest that their dtype is given, to 1
    temperature: float
    gamma: float
    alpha: float
    masked: float | None  # the share that is masked out


def powers_of_ten(low, high):
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def batches(shapes=tuple(SHAPES)):
    size = powers_of_ten(-6, 30) | st.just(np.inf)
    return st.builds(
        Batch,
        seed=st.integers(0, 2**32 - 1),
        shape=st.sampled_from(shapes),
        kind=st.sampled_from(["spread", "constant", "ties", "outlier"]),
        magnitude=st.floats(-1, 1),
        temperature=st.builds(np.copysign, size, st.sampled_from([1, -1])),
        # The weights, of up to 1 / (γ α), are to fit into float16.
        gamma=powers_of_ten(-2, 0),
        alpha=powers_of_ten(-2, 2),
        masked=st.none() | st.floats(0, 1),
    )


POISONED = st.sampled_from([None, None, None, np.nan, np.inf, -np.inf])


class Precision(NamedTuple):
    """The dtype of the losses, and that of what is computed of them."""

    dtype: np.dtype
    wide: type[np.floating]
    span: int  # losses are of 10^-span to 10^span

    @property
    def eps(self):
        return float(np.finfo(self.wide).eps)

    @property
    def tiny(self):
        return float(np.finfo(self.wide).tiny)

    @property
    def log1p(self):
        return 128 if self.wide == np.float64 else 4

    def losses(self, batch):
        """The losses, rounded to the dtype, in float64; and the mask."""
        rng = np.random.default_rng(batch.seed)
        if batch.kind == "ties":
            losses = rng.choice(rng.uniform(-1, 1, 2), batch.shape)
        else:
            losses = rng.uniform(-1, 1, 1 if batch.kind == "constant" else batch.shape)
        losses = losses * np.ones(batch.shape) * 10.0 ** (batch.magnitude * self.span)
        if batch.kind == "outlier":
            losses.flat[rng.integers(losses.size)] = rng.choice([-1, 1]) * 10.0**self.span
        where = None if batch.masked is None else rng.random(batch.shape) >= batch.masked
        return losses.astype(self.dtype).astype(np.float64), where

    def whole_numbers(self, batch):
        """Losses that are whole numbers up to 64 times a unit, a mask of at least one; the unit."""
        losses, where = self.losses(batch)
        losses = np.round(64 * losses / max(np.abs(losses).max(), self.tiny))
        low, high = (-8, 4) if self.dtype == np.float16 else (-100, 90)
        unit = 2.0 ** round(low + (high - low) * (batch.magnitude + 1) / 2)
        if where is not None:
            where.flat[0] = True
        return losses * unit, where, unit

    def tolerance_of_loss(self, losses, temperature=0.0):
        largest = np.abs(losses).max(initial=0)
        flushed = 0 if is_flat(temperature) else abs(temperature) * self.tiny
        return (4 * losses.size + 8 + 2 * self.log1p) * self.eps * largest + flushed + self.tiny

    def tolerances_of_weights(self, n, temperature):
        """Relative, and absolute."""
        info = jnp.finfo(self.dtype)
        flushed = self.tiny / min(1, abs(temperature))
        largest_z = -np.log(self.tiny)
        return float(info.eps) + (n + 8 + largest_z) * self.eps, max(float(info.tiny), flushed)


PRECISIONS = {
    "float16": Precision(jnp.dtype("float16"), np.float32, 4),
    "bfloat16": Precision(jnp.dtype("bfloat16"), np.float32, 30),
    "float32": Precision(jnp.dtype("float32"), np.float32, 30),
    "float64": Precision(jnp.dtype("float64"), np.float64, 30),
}
in_every_precision = pytest.mark.parametrize(
    ("precision", "x64"),
    [(precision, precision.wide == np.float64) for precision in PRECISIONS.values()],
    ids=PRECISIONS,
    indirect=["x64"],
)


def is_flat(temperature):
    return abs(temperature) >= 1e30


class Step(NamedTuple):
    loss: jax.Array
    weights: jax.Array  # of the robust loss
    attended: jax.Array  # the helper's
    scale: jax.Array  # the chain's
    updates: jax.Array  # the chain's, for the weights as a gradient
    state: AttentionState  # the helper's
    chained: AttentionState  # the chain's
    log_normalizer: jax.Array


@jax.jit
def compiled(losses, where, temperature, gamma, alpha, state):
    state = state._replace(temperature=temperature)
    loss, weights = jax.value_and_grad(robust_loss)(losses, temperature, where=where)
    attend = attention(1.0, gamma=gamma, alpha=alpha)
    attended, after = attend.update(losses, state, where=where)
    tx = scale_by_attention(1.0, gamma=gamma, alpha=alpha)
    gradients = jnp.ones_like(state.baseline), weights
    (scale, updates), chained = tx.update(gradients, state, value=loss, where=where)
    return Step(loss, weights, attended, scale, updates, after, chained, after.log_normalizer)


def fresh(precision, temperature=1.0):
    return AttentionState(np.int32(0), precision.wide(temperature), precision.wide(-np.inf))


def run(precision, batch, losses, where, state=None):
    """The step, in NumPy's float64, and the state as it is."""
    hyperparameters = map(precision.wide, (batch.temperature, batch.gamma, batch.alpha))
    state = fresh(precision) if state is None else state
    step = compiled(losses.astype(precision.dtype), where, *hyperparameters, state)
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), step), step.state


def included(losses, where):
    return losses.ravel() if where is None else losses[where]


def check_weights(weights):
    assert np.all(np.isfinite(weights))
    assert np.all(weights >= 0)


def close(actual, expected, rtol, atol, what):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=what)


@in_every_precision
@given(batch=batches())
def test_finite_out_of_finite_in(batch, precision, x64):
    """With anything at all where the mask is."""
    losses, where = precision.losses(batch)
    kept = included(losses, where)
    if where is not None:
        junk = np.resize([np.nan, np.inf, -np.inf, jnp.finfo(precision.dtype).max], losses.shape)
        losses = np.where(where, losses, junk)
    step, _ = run(precision, batch, losses, where)
    for weights in (step.weights, step.attended, step.updates):
        check_weights(weights)
        if where is not None:
            np.testing.assert_array_equal(weights[~where], 0)

    lam, gamma, alpha = (float(precision.wide(x)) for x in batch[4:7])
    weighted = kept.size > 0 and not is_flat(lam)
    rtol, atol = precision.tolerances_of_weights(kept.size, lam)
    error = precision.tolerance_of_loss(kept)
    if kept.size:
        assert kept.min() - error <= step.loss <= kept.max() + error
        assert abs(step.weights.sum() - 1) <= rtol + kept.size * atol
    else:
        assert step.loss == 0

    # The first batch of all: u is γ α times its mean of exp(l / λ).
    scale = 1 / (gamma * alpha) if weighted else 1
    close(step.scale, scale, 16 * precision.eps, 0, "scale of the gradients")
    for weights in (step.attended, step.updates):
        close(weights, scale * step.weights, rtol, max(scale, 1) * atol, "attentional weights")
    baseline = step.loss + lam * np.log(gamma) if weighted else -np.inf
    error += 16 * precision.eps * abs(lam * np.log(gamma)) if weighted else 0
    for state in (step.state, step.chained):
        close(state.baseline, baseline, 0, error, "baseline")
    assert np.isfinite(step.log_normalizer) == weighted


def formula(losses, lam):
    """F and the weights, in long double."""
    losses, lam = np.longdouble(losses), np.longdouble(lam)
    shift = losses.max() if lam > 0 else losses.min()
    z = np.zeros_like(losses) if is_flat(lam) else (losses - shift) / lam
    weights = np.exp(z) / np.exp(z).sum()
    if is_flat(lam):
        return losses.mean(), weights
    return shift + lam * np.log1p(np.expm1(z).mean()), weights


@in_every_precision
@given(batch=batches())
def test_invariants(batch, precision, x64):
    losses, where, unit = precision.whole_numbers(batch)
    kept, lam = included(losses, where), float(precision.wide(batch.temperature))
    n, largest = kept.size, np.abs(kept).max()
    error = precision.tolerance_of_loss(np.append(kept, kept), lam)
    rtol, atol = precision.tolerances_of_weights(2 * n, lam)
    rng = np.random.default_rng(batch.seed)

    def look(losses, where, temperature=lam):
        step, _ = run(precision, batch._replace(temperature=temperature), losses, where)
        return step.loss, step.weights

    loss, weights = look(losses, where)
    expected, expected_weights = formula(kept, lam)
    close(loss, float(expected), 0, error, "the formula's loss")
    close(
        included(weights, where), np.float64(expected_weights), rtol, atol, "the formula's weights"
    )

    def reordered(x, order, shape):
        return None if x is None else x.ravel()[order].reshape(shape)

    order = rng.permutation(losses.size)
    found, moved = look(*(reordered(x, order, losses.shape) for x in (losses, where)))
    close(found, loss, 0, error, "the loss of a permuted batch")
    close(moved, reordered(weights, order, losses.shape), rtol, atol, "its weights")

    if twice := SHAPES[batch.shape]:
        order = np.tile(np.arange(losses.size), 2)
        found, halved = look(*(reordered(x, order, twice) for x in (losses, where)))
        close(found, loss, 0, error, "the loss of a batch that is there twice")
        close(2 * halved, reordered(weights, order, twice), rtol, 2 * atol, "its weights")

    # The gaps are the same, so the weights are to the bit.
    shift = unit * rng.integers(-128, 129)
    found, same = look(losses + shift, where)
    close(found, loss + shift, 0, precision.eps * (largest + abs(shift)), "the loss of a shift")
    np.testing.assert_array_equal(same, weights, "the weights of a shift")

    # By powers of 2, which round nothing either; within the range of λ, but for an infinite one.
    scale = 2.0 ** (3 if precision.dtype == np.float16 else 20)
    scale = 1 / scale if abs(lam) >= 1 else scale
    scaled = lam if is_flat(lam) else scale * lam
    found, same = look(scale * losses, where, scaled)
    close(found, scale * loss, 0, 2 * precision.tiny, "the loss at another scale")
    _, flushed = precision.tolerances_of_weights(n, min(abs(lam), abs(scaled)))
    close(same, weights, 0, flushed, "the weights at another scale")

    found, same = look(-losses, where, -lam)
    np.testing.assert_array_equal(-found, loss, "the loss of both signs turned")
    np.testing.assert_array_equal(same, weights, "the weights of both signs turned")


def averaged(baseline, loss, lam, gamma):
    """The next V and log u over that of the batch, in long double; |x| / (1 + x), |log1p(x)|."""
    baseline, loss, lam, gamma = map(np.longdouble, (baseline, loss, lam, gamma))
    if not np.isfinite(loss) or is_flat(lam):
        return baseline, np.longdouble(0), 0, 0
    if not np.isfinite(baseline) or gamma == 1:
        growth = np.log(gamma)
        return loss + lam * growth, growth, 0, abs(growth)
    lag = (baseline - loss) / lam
    start, share = (baseline, gamma) if lag > 0 else (loss, 1 - gamma)
    x = share * np.expm1(-abs(lag))
    rise = np.log1p(x)
    return start + lam * rise, max(lag, 0) + rise, abs(x) / (1 + x), abs(rise)


@in_every_precision
@given(steps=st.lists(st.tuples(batches(), POISONED), min_size=1, max_size=5))
def test_normalizer(steps, precision, x64):
    """Over batches of any size, with λ, γ and α of their own; some poisoned, some masked whole."""
    state = fresh(precision)
    for batch, poison in steps:
        lam, gamma, alpha = (float(precision.wide(x)) for x in batch[4:7])
        losses, where = precision.losses(batch)
        if poison is not None:
            losses.flat[0 if where is None else np.argmax(where)] = poison
        before = float(state.baseline)
        step, state = run(precision, batch, losses, where, state)

        kept = included(losses, where)
        empty = kept.size == 0
        loss = np.inf if empty else step.loss
        expected, growth, by_x, by_log1p = averaged(before, loss, lam, gamma)
        error = 8 * by_x + precision.log1p * by_log1p
        active = np.isfinite(loss) and not is_flat(lam)
        if np.isnan(poison or 0.0) and not empty:
            assert not active
        if active:
            known = [x for x in (before, loss, lam * growth) if np.isfinite(x)]
            atol = precision.eps * (2 * max(map(abs, known)) + abs(lam) * error)
            atol = float(atol + abs(lam) * precision.tiny)
            close(step.chained.baseline, float(expected), 0, atol, "baseline of the chain")
            if poison is None:
                atol += precision.tolerance_of_loss(kept)
                close(step.state.baseline, float(expected), 0, atol, "baseline of the helper")
        else:
            assert step.state.baseline == step.chained.baseline == before
        scale = float(np.exp(-growth)) / (alpha if active else 1)
        rtol = float(min(error + 8 + 2 * abs(growth), 1e3)) * precision.eps
        flushed = precision.tiny * max(1, 1 / alpha)  # before the division, or after it
        close(step.scale, scale, rtol, flushed, "scale of the gradients")
        if np.isfinite(step.loss) and poison is None:
            check_weights(step.attended)
            check_weights(step.updates)
            bound = max(1 / (gamma * alpha), 1)
            rtol, atol = precision.tolerances_of_weights(losses.size, lam)
            assert step.attended.sum() <= bound * (1 + rtol + losses.size * atol)
        assert np.isfinite(state.baseline) == (np.isfinite(before) or active)
        assert np.isfinite(step.log_normalizer) == np.isfinite(state.baseline)


@jax.jit
def tuned(losses, where, states, gamma, alpha, target, rate, damping):
    return [
        attention(make(target, rate=rate, damping=damping), gamma=gamma, alpha=alpha).update(
            losses, state, where=where
        )
        for make, state in zip((target_ess, target_kl), states, strict=True)
    ]


@in_every_precision
@given(
    steps=st.lists(st.tuples(batches([(1,), (24,)]), POISONED), min_size=1, max_size=5),
    target=st.floats(0.01, 0.99),
    rate=st.floats(0.01, 0.5),
    damping=st.floats(0, 10),
)
def test_automatic_temperature(steps, target, rate, damping, precision, x64):
    states = [fresh(precision, steps[0][0].temperature)] * 2
    for batch, poison in steps:
        losses, where = precision.losses(batch)
        kept = included(losses, where)
        if poison is not None:
            losses.flat[0 if where is None else np.argmax(where)] = poison
        numbers = map(precision.wide, (batch.gamma, batch.alpha, target, rate, damping))
        results = tuned(losses.astype(precision.dtype), where, states, *numbers)
        for (weights, state), before in zip(results, states, strict=True):
            old, new = float(before.temperature), float(state.temperature)
            assert np.sign(new) == np.sign(old)
            if not kept.size or poison is not None:
                assert new == old
                # An infinite loss may be one that a soft minimum or maximum does not see.
                assert state.baseline == before.baseline or np.isinf(poison or 0)
            else:
                check_weights(np.asarray(weights).astype(np.float64))
            # At an infinite λ the squares of the gaps neither overflow nor vanish here.
            informative = kept.size and poison is None and 1e-15 < np.ptp(kept) < 1e15
            if not is_flat(old):
                assert 0.5 - precision.eps < new / old < 2 + 4 * precision.eps
            elif informative:
                assert not is_flat(new)
            assert abs(new) > 0.999e-6
            assert not np.isnan(state.baseline)
        states = [state for _, state in results]
