"""Finite in, finite out; and what must not matter does not.

Hypothesis draws a few numbers a case, which a failure shrinks, and NumPy makes a batch of them. By
default it is 2,040 cases, with ``--hypothesis-profile=ci`` 7,800, always the same;
``--hypothesis-profile=long`` has 20 times as many as ``ci``, and others each time.

Tolerances are bounds on rounding: ε is the distance from 1 to the next number, n the number of
losses and M the largest |l_i|. A sum of terms of one sign is within n ε / 2 of itself; exp, log,
expm1 and log1p are within c = 4 ε, but XLA's log1p in float64, near -0.4, is within c = 128 ε. Gaps
of losses, and so z_i = gap / λ, are within 2 ε of themselves. Then

    F     is within (4 n + 8 + 2 c) ε M. The error is that of |λ| mean |expm1(z)|, at most 2 M,
          which log1p no more than doubles; or, where that is not used, of |λ| <= 4 M. XLA flushes
          to 0 what is below the smallest normal number, which costs |λ| times that in z.
    w_i   is within (n + 8 + |z_i|) ε of itself, then rounded to the dtype of the losses. It is
          flushed where it is too small, also times λ, by which the backward pass multiplies it.
    E, A  are ratios of two sums, each within (n + 8 + 2 |z|) ε of its terms' absolute values.
    p_i   is within (n + 8 + 2 |z_i|) ε and the error of 1 + γ A of itself.
    V     moves by λ log(1 + γ A).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from absgd_jax import (
    AttentionState,
    get_temperature,
    robust_loss,
    scale_by_attention,
    target_ess,
    target_kl,
)
from tests.support.attended import slopes_and_sums

SHAPES = (1,), (2,), (24,), (4, 12), (1000,)  # each is one more compilation
UNMASKED = {(24,)}  # the others always have a mask, if one that lets all pass


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


def batches(shapes=SHAPES):
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
        unmasked = batch.masked is None and batch.shape in UNMASKED
        where = None if unmasked else rng.random(batch.shape) >= (batch.masked or 0)
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
    attended: jax.Array  # of ABSGD
    state: AttentionState


def update(tx, losses, where, state):
    """A step on the mean of what is included, or on 0."""

    def mean(losses):
        n = losses.size if where is None else jnp.maximum(where.sum(), 1)
        return jnp.sum(losses, where=where) / jnp.asarray(n, losses.dtype)

    # In the first weighted batch a backward pass in float16 may overflow.
    narrow = losses.dtype == jnp.float16
    losses = losses.astype(jnp.float32) if narrow else losses
    slopes, sums = slopes_and_sums(losses, state, mean)
    return tx.update(slopes, state, sums=sums)


@jax.jit
def compiled(losses, where, temperature, gamma, alpha, state):
    loss, weights = jax.value_and_grad(robust_loss)(losses, temperature, where=where)
    tx = scale_by_attention(1.0, gamma=gamma, alpha=alpha)
    attended, after = update(tx, losses, where, state._replace(temperature=temperature))
    return Step(loss, weights, attended, after)


def fresh(precision, temperature=1.0, baseline=0.0, averaged=0):
    lam, baseline = precision.wide(temperature), precision.wide(baseline)
    return AttentionState(np.int32(0), lam, baseline, np.int32(averaged))


def run(precision, batch, losses, where, state=None):
    """The step, in NumPy's float64, and the state as it is; with junk where the mask is."""
    if where is not None:
        junk = np.resize([np.nan, np.inf, -np.inf, jnp.finfo(precision.dtype).max], losses.shape)
        losses = np.where(where, losses, junk)
    hyperparameters = map(precision.wide, (batch.temperature, batch.gamma, batch.alpha))
    state = fresh(precision) if state is None else state
    step = compiled(losses.astype(precision.dtype), where, *hyperparameters, state)
    state, step = step.state, jax.tree.map(lambda x: np.asarray(x).astype(np.float64), step)
    if where is not None:
        np.testing.assert_array_equal((step.weights[~where], step.attended[~where]), 0)
    return step, state


def included(losses, where):
    return losses.ravel() if where is None else losses[where]


def check_weights(weights):
    assert np.all(np.isfinite(weights))
    assert np.all(weights >= 0)


def close(actual, expected, rtol, atol, what):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=what)


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
    n = kept.size
    error = precision.tolerance_of_loss(kept, lam)
    rtol, atol = precision.tolerances_of_weights(n, lam)

    def look(losses, temperature=lam):
        step, _ = run(precision, batch._replace(temperature=temperature), losses, where)
        return step.loss, step.weights

    loss, weights = look(losses)
    expected, expected_weights = formula(kept, lam)
    close(loss, float(expected), 0, error, "the formula's loss")
    close(
        included(weights, where), np.float64(expected_weights), rtol, atol, "the formula's weights"
    )

    # The gaps are the same, so the weights are to the bit.
    shift = unit * np.random.default_rng(batch.seed).integers(-128, 129)
    found, same = look(losses + shift)
    close(
        found,
        loss + shift,
        0,
        precision.eps * (np.abs(kept).max() + abs(shift)),
        "the loss of a shift",
    )
    np.testing.assert_array_equal(same, weights, "the weights of a shift")

    # By powers of 2, which round nothing either; within the range of λ, but for an infinite one.
    scale = 2.0 ** (3 if precision.dtype == np.float16 else 19)
    scale = 1 / scale if abs(lam) >= 1 else scale
    scaled = lam if is_flat(lam) else scale * lam
    found, same = look(scale * losses, scaled)
    close(found, scale * loss, 0, 2 * precision.tiny, "the loss at another scale")
    _, flushed = precision.tolerances_of_weights(n, min(abs(lam), abs(scaled)))
    close(same, weights, 0, flushed, "the weights at another scale")

    found, same = look(-losses, -lam)
    np.testing.assert_array_equal(-found, loss, "the loss of both signs turned")
    np.testing.assert_array_equal(same, weights, "the weights of both signs turned")


def bound(precision):
    largest = np.log(np.finfo(precision.wide).max)
    return 35 * float(largest / np.log(np.finfo(np.float32).max))


@in_every_precision
@given(steps=st.lists(st.tuples(batches(), POISONED), min_size=1, max_size=5))
def test_published(steps, precision, x64):
    """Over batches of any size, with λ, γ and α of their own; some poisoned, some masked whole."""
    state, tiny, eps = fresh(precision), precision.tiny, precision.eps
    most = bound(precision)
    for batch, poison in steps:
        lam, gamma, alpha = (float(precision.wide(x)) for x in batch[4:7])
        losses, where = precision.losses(batch)
        if poison is not None:
            losses.flat[0 if where is None else np.argmax(where)] = poison
        before, first = state, int(state.averaged) == 0
        baseline = float(before.baseline)
        step, state = run(precision, batch, losses, where, before)
        kept, n = included(losses, where), max(included(losses, where).size, 1)
        assert np.isfinite(step.state.baseline)
        if poison is None:
            check_weights(step.attended)
            check_weights(step.weights)
            rtol, atol = precision.tolerances_of_weights(n, lam)
            assert abs(step.weights.sum() - (kept.size > 0)) <= rtol + n * atol
            error, ends = precision.tolerance_of_loss(kept), kept if kept.size else np.zeros(1)
            assert ends.min() - error <= step.loss <= ends.max() + error
        if kept.size == 0 or not np.isfinite(kept).all():
            assert state.baseline == before.baseline
            assert state.averaged == (0 if gamma == 1 else before.averaged)
            continue
        largest = max(np.abs(kept).max(), abs(baseline))
        if is_flat(lam):
            mean = kept.mean()
            expected = mean if first else baseline + gamma * (mean - baseline)
            if largest < 1e25:  # where levels aren't bounded
                flushed = n * 2**20 * tiny  # of what rides in a sum
                atol = (n + 8) * eps * largest + flushed * (1 + abs(baseline))
                close(step.state.baseline, expected, 0, atol, "mean of losses")
            rtol = float(jnp.finfo(precision.dtype).eps)
            close(included(step.attended, where), 1 / n, rtol, 0, "equal weights")
            continue
        # In long double.
        z = (np.longdouble(kept) - np.longdouble(baseline)) / np.longdouble(lam)
        with np.errstate(over="ignore"):
            mean_exp = np.exp(np.clip(z, -most, most)).mean()
        if abs(float(np.log(mean_exp))) > most / 2 - 1:  # out of sight, or nearly
            if abs(float(np.log(mean_exp))) > most / 2 + 1 and before.averaged > 0:
                assert state.baseline == before.baseline
                assert state.averaged == (0 if gamma == 1 else -before.averaged)
            continue
        growth = gamma * mean_exp if first else (1 - gamma) + gamma * mean_exp
        error = (n + 16 + 2 * most + precision.log1p) * eps
        if not first:
            error += gamma * error * (1 + float(mean_exp)) / float(growth)
        error += 2 * eps * largest / abs(lam) * (1 + float(mean_exp)) / float(growth)
        if error > 0.1:
            continue  # no digits are left
        moved = baseline + lam * float(np.log(growth))
        atol = 4 * eps * (abs(baseline) + abs(moved)) + abs(lam) * 2 * error
        close(step.state.baseline, moved, 0, atol, "baseline")
        assert state.averaged == (0 if gamma == 1 else abs(before.averaged) + 1)
        expected = np.exp(np.clip(z, -2.25 * most, most)) / (n * alpha * growth)
        info = jnp.finfo(precision.dtype)
        flushed = max(float(info.tiny), tiny * max(1, float(1 / (alpha * growth))))
        rtol = float(info.eps) + 2 * error
        if expected.max() < float(info.max):
            close(included(step.attended, where), np.float64(expected), rtol, flushed, "weights")


@jax.jit
def tuned(losses, where, states, gamma, alpha, target, rate, damping):
    results = []
    for make, state in zip((target_ess, target_kl), states, strict=True):
        automatic = make(target, rate=rate)
        tx = scale_by_attention(automatic, gamma=gamma, alpha=alpha, damping=damping)
        results.append(update(tx, losses, where, state))
    return results


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
            old, new = (float(get_temperature(s)) for s in (before, state))
            assert np.sign(new) == np.sign(old)
            assert np.isfinite(state.baseline)
            if not kept.size or poison is not None:
                assert new == old
            else:
                check_weights(np.asarray(weights).astype(np.float64))
            if not is_flat(old):
                assert 0.5 - precision.eps < new / old < 2 + 4 * precision.eps
            assert abs(new) > 0.999e-6
            # Of a spread that float16, too, can tell from none, and that V is not too far from.
            spread = np.ptp(kept) if kept.size and poison is None else 0
            far = np.abs(np.append(kept, kept - float(before.baseline))).max(initial=0)
            if is_flat(old) and 0.1 * far < spread < 1e5 and spread > 1e-5:
                assert not is_flat(new)
        states = [state for _, state in results]
