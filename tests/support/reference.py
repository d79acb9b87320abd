"""The published algorithm in NumPy float64, and the runs on which everything is compared.

A small tanh network on real digits (4x4 means of scikit-learn's 8x8 images), 250 batches of 32,
trained by the algorithm of Qi et al. (TMLR 2023) as its authors' package computes it: weights are
constants to the gradient, which is written out by hand.
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


def weigh(losses, baseline, temperature, gamma, alpha=1.0, shares=None):
    """Weights p of a batch, and the new V = λ log(u / α).

    By logarithms, so that nothing overflows. ``baseline`` is V, ``None`` before the first weighted
    batch; ``shares`` are the weights of a plain mean, all equal unless they are given.
    """
    if shares is None:
        shares = np.full(losses.shape, 1 / losses.size)
    if np.isinf(temperature) or not losses.size:
        return shares, baseline
    z = np.float64(losses) / temperature
    log_mean = z.max() + np.log(np.sum(shares * np.exp(z - z.max())))
    log_u = -np.inf if baseline is None else baseline / temperature
    with np.errstate(divide="ignore"):  # γ = 1
        log_u = np.logaddexp(np.log1p(-gamma) + log_u, np.log(gamma) + log_mean)
    return shares * np.exp(z - log_u) / alpha, temperature * log_u


def published(batches, temperatures, gamma, alpha=1.0):
    """The weights of every batch, and V after it; λ, γ are those of each or of all."""
    baseline, history = None, []
    rows = np.broadcast_arrays(temperatures, gamma, np.arange(len(batches)))
    for temperature, newest, i in zip(*rows, strict=True):
        weights, baseline = weigh(batches[i], baseline, temperature, newest, alpha)
        history.append((weights, baseline))
    weights, baselines = zip(*history, strict=True)
    return np.stack(weights), baselines


def debiased(gamma, count):
    """γ of the count-th weighted batch, from 1 on, as in Adam."""
    return np.minimum(gamma / (1 - (1 - gamma) ** np.maximum(count, 1)), 1)


def divergences(weights, shares=None):
    """1 / ESS - 1 and KL of weights on any scale, from those of a plain mean."""
    shares = np.full(np.shape(weights), 1 / np.size(weights)) if shares is None else shares
    ratio = weights / shares
    ratio = ratio / np.sum(shares * ratio)
    logs = np.log(ratio, where=ratio > 0, out=np.zeros_like(ratio))
    return np.sum(shares * ratio**2) - 1, np.sum(shares * ratio * logs)


def tune(losses, temperature, *, ess=None, kl=None, shares=None):
    """The λ after a batch that is to hold one of both, and what divides the batch's gradients."""
    shares = np.full(losses.shape, 1 / losses.size) if shares is None else shares
    target = kl if ess is None else 1 / ess - 1
    if np.isinf(temperature):  # where a normal distribution of the losses would be on target
        variance = target if kl is None else 2 * target
        spread = np.sum(shares * (losses - np.sum(shares * losses)) ** 2)
        return np.copysign(np.sqrt(spread / variance), temperature), 1.0
    z = np.float64(losses) / temperature
    chi2, reached = divergences(shares * np.exp(z - z.max()), shares)
    excess = (chi2 if kl is None else reached) / target
    damping = 1 + 2 * np.sqrt(chi2) if temperature > 0 else 1.0
    return temperature * np.clip(excess**0.1, 0.5, 2), damping


def sgd(rate, weight_decay):
    momentum = {}

    def update(params, grads):
        for k, g in grads.items():
            momentum[k] = MOMENTUM * momentum.get(k, 0) + g + weight_decay * params[k]
        return {k: p - rate * momentum[k] for k, p in params.items()}

    return update


def adam(rate, weight_decay):
    m, v, steps = {}, {}, itertools.count(1)

    def update(params, grads):
        t = next(steps)
        for k, g in grads.items():
            g = g + weight_decay * params[k]
            m[k] = 0.9 * m.get(k, 0) + 0.1 * g
            v[k] = 0.999 * v.get(k, 0) + 0.001 * g**2
        return {
            k: p - rate * m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
            for k, p in params.items()
        }

    return update


def train_all(optimizer, cases):
    """Parameters after every step, each [C, STEPS, ...], and the weighted losses [C, STEPS]."""
    first, xs, ys = problem()
    make, rate = {"sgd": (sgd, SGD_RATE), "adam": (adam, ADAM_RATE)}[optimizer]

    def run(case):
        params, baseline, update = first, None, make(rate, case.weight_decay)
        for step, batch in enumerate(zip(xs, ys, strict=True)):
            losses, gradient = cross_entropy(params, *batch)
            temperature = case.temperature if step >= case.switch else np.inf
            weights, baseline = weigh(losses, baseline, temperature, case.gamma, case.alpha)
            params = update(params, gradient(weights))
            yield params, np.sum(weights * losses)

    runs = [list(run(case)) for case in cases]
    values = np.array([[value for _, value in run] for run in runs])
    return {k: np.array([[p[k] for p, _ in run] for run in runs]) for k in first}, values


def relative(params, expected):
    """Every array over the largest entry of what is expected, case by case and step by step."""
    scale = {
        k: np.abs(e).max(axis=tuple(range(2, e.ndim)), keepdims=True) for k, e in expected.items()
    }
    return {k: np.asarray(params[k]) / scale[k] for k in expected}
