"""What a batch is trained on: the losses of its examples, each a function of its knobs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from absgd_jax import losses

# Per-example losses [B] of logits z [B, C], labels y, the class counts n [C] of the training
# examples, and whether the second stage of training has begun.
Loss = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def deferred(loss: Loss, beta: float = 0.9999) -> Loss:
    """The loss, with class-balanced weights in the second stage."""

    def weighted(z, y, n, late):
        weights = losses.class_balanced_weights(n, beta=beta)
        return jnp.where(late, weights, 1.0)[y] * loss(z, y, n, late)

    return weighted


def cvar_terms(each: jax.Array, share: ArrayLike) -> jax.Array:
    """Losses whose mean is that of the largest ones, a share of the batch."""
    count = share * each.size
    rank = jnp.argsort(jnp.argsort(-each)).astype(each.dtype)
    return each * jnp.clip(count - rank, 0, 1) * each.size / count


def smoothed(z: jax.Array, y: jax.Array, share: float) -> jax.Array:
    return optax.softmax_cross_entropy(
        z, optax.smooth_labels(jax.nn.one_hot(y, z.shape[-1]), share)
    )


def tempered_softmax(z: jax.Array, t: float) -> jax.Array:
    """``p = [1 - (t - 1) (z - shift)]^(-1 / (t - 1))``, normalised by the shift, for t > 1."""
    z = z - jax.lax.stop_gradient(z.max(axis=-1, keepdims=True))

    def p(shift):
        return (1 - (t - 1) * (z - shift)) ** (-1 / (t - 1))

    def newton(shift):
        """For sum(p)^(1 - t) = 1, which is linear in the shift where all logits are equal."""
        total, slope = (x.sum(axis=-1, keepdims=True) for x in (p(shift), p(shift) ** t))
        return shift + (total**t - total) / ((t - 1) * slope)

    shift = jnp.zeros_like(z[..., :1])
    for _ in range(4):
        shift = newton(shift)
    # The gradient of a step from the solution is that of the implicit function.
    return p(newton(jax.lax.stop_gradient(shift)))


def bi_tempered(t1: float = 0.8, t2: float = 1.2) -> Loss:
    """Bi-tempered logistic loss, Amid et al., NeurIPS 2019, arXiv 1906.03361."""
    if not 0 <= t1 < 1 < t2:
        raise ValueError(f"bi_tempered needs 0 <= t1 < 1 < t2, got {t1} and {t2}")

    def loss(z, y, n, late):
        p = tempered_softmax(z, t2)
        right = jnp.take_along_axis(p, y[:, None], axis=-1)[:, 0]
        log_t1 = (right ** (1 - t1) - 1) / (1 - t1)
        return -log_t1 - (1 - jnp.sum(p ** (2 - t1), axis=-1)) / (2 - t1)

    return loss


LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": lambda: lambda z, y, n, late: cross_entropy(z, y),
    "label_smoothing": lambda share=0.1: lambda z, y, n, late: smoothed(z, y, share),
    "cvar": lambda share=0.5: lambda z, y, n, late: cvar_terms(cross_entropy(z, y), share),
    "cb_drw": lambda beta=0.9999: deferred(lambda z, y, n, late: cross_entropy(z, y), beta),
    "focal": lambda gamma=2.0: lambda z, y, n, late: losses.focal(z, y, gamma=gamma),
    "ldam_drw": lambda: deferred(lambda z, y, n, late: losses.ldam(z, y, class_counts=n)),
    # The knob is the τ of logit adjustment.
    "balanced_softmax": lambda tau=1.0: (
        lambda z, y, n, late: losses.balanced_softmax(z, y, class_counts=n, tau=tau)
    ),
    "arb": lambda: lambda z, y, n, late: losses.arb(z, y),
    "arb_global": lambda: lambda z, y, n, late: losses.arb(z, y, class_counts=n),
    "balanced_sce": lambda: (
        lambda z, y, n, late: losses.symmetric_cross_entropy(z + jnp.log(n / n.sum()), y)
    ),
    "sce": lambda: lambda z, y, n, late: losses.symmetric_cross_entropy(z, y),
    "gce": lambda: lambda z, y, n, late: losses.generalized_cross_entropy(z, y),
    "truncated_gce": lambda: (
        lambda z, y, n, late: losses.generalized_cross_entropy(
            z, y, truncation=jnp.where(late, 0.5, 0.0)
        )
    ),
    "bi_tempered": bi_tempered,
}
