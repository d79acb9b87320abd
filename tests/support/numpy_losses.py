"""The papers' formulas as they stand there: float64, one example at a time, no stabilisation.

Each function takes the logits of one example and its label, an integer.
"""

import numpy as np


def softmax(z):
    return np.exp(z) / sum(np.exp(z_k) for z_k in z)


def balanced_softmax(z, y, n, tau=1.0):
    """Ren et al. 2020; with tau, Menon et al. 2021."""
    return -np.log(
        n[y] ** tau * np.exp(z[y]) / sum(n[k] ** tau * np.exp(z[k]) for k in range(len(z)))
    )


def arb(z, y, n):
    """Xie et al. 2023, with the clamp of its authors' code."""
    z = np.clip(z, -30, 30)
    return -np.log(np.exp(z[y]) / sum(n[k] / n[y] * np.exp(z[k]) for k in range(len(z))))


def ldam(z, y, n, max_margin=0.5, scale=30.0):
    """Cao et al. 2019, the margins scaled as its authors' code does."""
    margins = [n_k ** (-1 / 4) for n_k in n]
    margin = margins[y] * max_margin / max(margins)
    true = np.exp(scale * (z[y] - margin))
    return -np.log(true / (true + sum(np.exp(scale * z[k]) for k in range(len(z)) if k != y)))


def focal(z, y, gamma=2.0, alpha=None):
    """Lin et al. 2017, with the softmax for the sigmoid."""
    p = softmax(z)[y]
    return -(1.0 if alpha is None else alpha[y]) * (1 - p) ** gamma * np.log(p)


def symmetric_cross_entropy(z, y, alpha=0.1, beta=1.0, log_zero=-4.0):
    """Wang et al. 2019."""
    p = softmax(z)
    q = np.eye(len(z))[y]
    reverse = -sum(p[k] * (np.log(q[k]) if q[k] > 0 else log_zero) for k in range(len(z)))
    return -alpha * np.log(p[y]) + beta * reverse


def early_learning(z, y, target, coefficient=3.0):
    """Liu et al. 2020."""
    p = softmax(z)
    agreement = sum(target[k] * p[k] for k in range(len(z)))
    return -np.log(p[y]) + coefficient * np.log(1 - agreement)


def generalized_cross_entropy(z, y, q=0.7, truncation=0.0):
    """Zhang & Sabuncu 2018, with its truncated form."""
    p = softmax(z)[y]
    if p <= truncation:
        return (1 - truncation**q) / q
    return (1 - p**q) / q
