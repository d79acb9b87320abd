"""The published algorithm in NumPy float64, and the runs on which everything is compared.

A small tanh network on real digits (4x4 means of scikit-learn's 8x8 images), 250 batches of 32,
trained by the algorithm of Qi et al. (TMLR 2023) as its authors' package computes it: u is formed
as it stands, weights are constants to the gradient, the gradient is written out by hand.
"""

import itertools
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

STEPS, BATCH, HIDDEN, CLASSES = 250, 32, 4, 10
SGD_RATE, ADAM_RATE, MOMENTUM = 0.02, 0.005, 0.9
SNAPSHOTS = slice(49, None, 50)  # the steps whose parameters are recorded


class Case(NamedTuple):
    temperature: float
    gamma: float
    alpha: float
    weight_decay: float
    switch: int  # the first step with the temperature on: two-stage training, unless 0


TEMPERATURES = (0.5, 5.0, -1.0, -5.0)
SGD_CASES = [
    Case(*case)
    for case in itertools.product(TEMPERATURES, (0.1, 0.9, 1.0), (0.5, 1.0), (0.0, 5e-4), (0, 100))
]
ADAM_CASES = [
    Case(*case) for case in itertools.product(TEMPERATURES, (0.9,), (1.0,), (0.0, 5e-4), (0, 100))
]


def problem() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Initial parameters, images [STEPS, BATCH, 16] and labels [STEPS, BATCH]."""
    digits = load_digits()
    images = digits.images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16) / 16
    rng = np.random.default_rng(0)
    params = {
        "w1": rng.normal(size=(16, HIDDEN)) / 4,
        "b1": np.zeros(HIDDEN),
        "w2": rng.normal(size=(HIDDEN, CLASSES)) / 2,
        "b2": np.zeros(CLASSES),
    }
    batches = rng.integers(len(images), size=(STEPS, BATCH))
    return params, images[batches], digits.target[batches]


def cross_entropy(params, x, y, log_prior=0.0):
    """Per-example losses and a function from their weights to the gradient of the weighted sum."""
    h = np.tanh(x @ params["w1"] + params["b1"])
    logits = h @ params["w2"] + params["b2"] + log_prior
    logits = logits - logits.max(axis=1, keepdims=True)
    log_z = np.log(np.exp(logits).sum(axis=1))
    rows = np.arange(len(y))

    def gradient(weights):
        d_logits = np.exp(logits - log_z[:, None])
        d_logits[rows, y] -= 1
        d_logits *= weights[:, None]
        d_h = d_logits @ params["w2"].T * (1 - h**2)
        return {
            "w1": x.T @ d_h,
            "b1": d_h.sum(axis=0),
            "w2": h.T @ d_logits,
            "b2": d_logits.sum(axis=0),
        }

    return log_z - logits[rows, y], gradient


def weigh(losses, u, case, step):
    """Weights p of one batch, and the new u."""
    if step < case.switch:
        return np.full(len(losses), 1 / len(losses)), u
    tilted = np.exp(losses / case.temperature)
    u = (1 - case.gamma) * u + case.gamma * case.alpha * tilted.mean()
    return tilted / (len(losses) * u), u


def train(optimizer, case):
    """Parameters after every step, each [STEPS, ...], and the weighted losses [STEPS]."""
    params, xs, ys = problem()
    m = {k: np.zeros_like(p) for k, p in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    u, trajectory, values = 0.0, [], []
    for step, (x, y) in enumerate(zip(xs, ys, strict=True)):
        losses, gradient = cross_entropy(params, x, y)
        weights, u = weigh(losses, u, case, step)
        values.append((weights * losses).sum())
        for k, g in gradient(weights).items():
            g = g + case.weight_decay * params[k]
            if optimizer == "sgd":
                m[k] = MOMENTUM * m[k] + g
                params[k] = params[k] - SGD_RATE * m[k]
            else:
                m[k] = 0.9 * m[k] + 0.1 * g
                v[k] = 0.999 * v[k] + 0.001 * g**2
                m_hat = m[k] / (1 - 0.9 ** (step + 1))
                v_hat = v[k] / (1 - 0.999 ** (step + 1))
                params[k] = params[k] - ADAM_RATE * m_hat / (np.sqrt(v_hat) + 1e-8)
        trajectory.append(dict(params))
    return {k: np.stack([p[k] for p in trajectory]) for k in params}, np.array(values)


def train_all(optimizer, cases):
    """As ``train``, with a leading axis of cases."""
    trajectories, values = zip(*(train(optimizer, case) for case in cases), strict=True)
    return {k: np.stack([t[k] for t in trajectories]) for k in trajectories[0]}, np.stack(values)


def relative(params, expected):
    """Every array over the largest entry of what is expected, case by case and step by step."""
    scale = {
        k: np.abs(e).max(axis=tuple(range(2, e.ndim)), keepdims=True) for k, e in expected.items()
    }
    return {k: np.asarray(params[k]) / scale[k] for k in expected}
