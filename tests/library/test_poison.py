"""One batch in a hundred is poisoned, over 2,000 steps on real digits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from absgd_jax import scale_by_attention, Sums, target_ess, tilt

pytestmark = pytest.mark.usefixtures("users_promotion")  # that optax's schedules need

STEPS, BATCH, HELD_OUT = 2000, 32, 1100


class Poison(NamedTuple):
    """What is done to the examples of the batches, [STEPS, BATCH]."""

    pixels: np.ndarray  # added to them
    factor: np.ndarray  # of the loss
    loss: np.ndarray  # added to it
    included: np.ndarray  # or masked


def make_poisons():
    rng = np.random.default_rng(0)
    # Not the first: an average has to start from something.
    batches = np.sort(rng.choice(np.arange(5, STEPS), STEPS // 100, replace=False))
    one_each = batches, rng.integers(BATCH, size=len(batches))

    def make(field, where, value):
        poison = Poison(*(np.full((STEPS, BATCH), x, np.float32) for x in (0, 1, 0, 1)))
        getattr(poison, field)[where] = value
        return poison._replace(included=poison.included > 0)

    values = {"NaN": np.nan, "inf": np.inf, "1e30": 1e30}
    return {
        "none": make("loss", batches, 0),
        "masked": make("included", batches, 0),
        **{f"loss + {name}": make("loss", batches, x) for name, x in values.items()},
        **{f"loss * {name}": make("factor", batches, x) for name, x in values.items()},
        **{f"one example {name}": make("pixels", one_each, x) for name, x in values.items()},
    }


POISONS = make_poisons()

# What a careful user does without apply_if_finite, and with it.
ALONE = ("sound data", "mask", "max_jump", "clip")
WRAPPED = ("apply_if_finite", "max_jump", "clip")


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(1).permutation(len(labels))
    return np.float32(images[order] / 16 - 0.3), np.int32(labels[order])


def train_one(lam, poison, automatic, guards):
    """Accuracy on what was held out, and the baseline after every step."""
    images, labels = digits()
    order = np.random.default_rng(2).integers(HELD_OUT, len(labels), (STEPS, BATCH))
    tx = optax.chain(
        scale_by_attention(
            target_ess(0.9, init_value=lam) if automatic else lam,
            max_jump=3.0 if "max_jump" in guards else jnp.inf,
        ),
        optax.clip_by_global_norm(1.0) if "clip" in guards else optax.identity(),
        optax.add_decayed_weights(1e-3),
        optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9),
    )
    if "apply_if_finite" in guards:
        tx = optax.apply_if_finite(tx, max_consecutive_errors=10)

    def step(carry, batch):
        (w, opt_state), (index, (pixels, factor, added, included)) = carry, batch
        x = jnp.asarray(images)[index] + pixels[:, None]
        if "sound data" in guards:
            sound = jnp.isfinite(x).all(axis=1) & jnp.isfinite(factor)
            included &= sound
            x, factor = jnp.where(sound[:, None], x, 0), jnp.where(sound, factor, 0)

        def loss_fn(w, sums):
            logits, y = x @ w[1:] + w[:1], jnp.asarray(labels)[index]
            each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            each = factor * each + added
            where = included & jnp.isfinite(each) if "mask" in guards else included
            tilted = tilt(each, opt_state, sums)
            return jnp.sum(tilted, where=where) / jnp.maximum(where.sum(), 1)

        grads, sums = jax.grad(loss_fn, argnums=(0, 1))(w, Sums())
        updates, opt_state = tx.update(grads, opt_state, w, sums=sums)
        return (w + updates, opt_state), optax.tree.get(opt_state, "baseline")

    w = jnp.zeros((65, 10))
    (w, _), baselines = jax.lax.scan(step, (w, tx.init(w)), (order, poison))
    hits = jnp.argmax(images[:HELD_OUT] @ w[1:] + w[:1], axis=1) == labels[:HELD_OUT]
    return hits.mean(), baselines


@functools.partial(jax.jit, static_argnums=(2, 3))
def train_all(temperatures, poisons, automatic, guards):
    def one(lam, poison):
        return train_one(lam, poison, automatic, guards)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(temperatures, poisons)


@pytest.mark.parametrize("guards", [ALONE, WRAPPED])
@pytest.mark.parametrize(
    ("temperatures", "automatic"), [((np.inf, 2, -2), False), ((np.inf, -np.inf), True)]
)
def test_guarded(temperatures, automatic, guards):
    """Training ends where the clean run of the same program does."""
    poisons = jax.tree.map(lambda *x: np.stack(x), *POISONS.values())
    accuracies, baselines = train_all(np.float32(temperatures), poisons, automatic, guards)
    assert np.all(np.isfinite(baselines))
    for lam, each in zip(temperatures, np.array(accuracies), strict=True):
        accuracy = dict(zip(POISONS, each, strict=True))
        assert accuracy["none"] > 0.9
        harmful = {name for name, x in accuracy.items() if abs(x - accuracy["none"]) > 0.005}
        # A gradient of 1e30 times a slope of up to exp(80): only apply_if_finite sees that.
        overflows = lam > 0 and (automatic or lam < np.inf) and guards is ALONE
        assert harmful == ({"loss * 1e30", "one example 1e30"} if overflows else set()), lam
