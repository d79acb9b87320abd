"""A wrong argument of anything public is named, with its value and with what it must be instead."""

import functools
import inspect
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import absgd_jax
from absgd_jax import data, diagnostics, losses

NAN, INF = float("nan"), float("inf")
# What is handed to JAX and optax as it is, and theirs to check.
THEIRS = {"axis_name", "nesterov", "accumulator_dtype", "mu_dtype", "grads"}


class Function(NamedTuple):
    call: Any
    valid: dict[str, Any]
    wrong: dict[str, list[tuple[Any, str]]]  # values, and what the error says after "must"


def number(must, *values, none=False):
    """What is wrong for an argument that is one number."""
    rows = [("1", "be a number, got '1'"), ([0.5], "be a scalar, got shape (1,)")]
    rows += [(value, f"{must}, got {value}") for value in values]
    return rows if none else [*rows, (None, "be a number, got None")]


def whole_number(least):
    return number(f"be a whole number from {least} on", least - 1, least + 0.5, NAN)


SHARE = number("lie in (0, 1]", 0, -0.5, 1.5, NAN)
DECAY = number("lie in [0, 1)", -0.5, 1, NAN)
POSITIVE = number("be positive and finite", 0, -1.0, INF, NAN)
NOT_NEGATIVE = number("be 0 or more and finite", -1.0, INF, NAN)
LAMBDA = number("be neither 0 nor NaN", 0, -0.0, NAN)
SCHEDULE = (optax.constant_schedule(1.0), "be a number here, got a schedule; pass what")
ARRAY = [("many", "be an array of numbers, got 'many'"), (None, "be an array of numbers, got None")]
PER_EXAMPLE = [
    *ARRAY,
    (1.0, "hold one entry an example, got a scalar; pass the per-example"),
    (np.ones(3, int), "be floating point, got int32; cast them first"),
    (np.ones(3, bool), "be floating point, got bool; cast them first"),
]


def mask(of="losses", shape=(3,)):
    return [
        (np.ones(shape, np.float32), "be boolean, got float32; a mask of numbers needs `mask > 0`"),
        ([[True]], f"have the shape of {of}, {shape}, got (1, 1); broadcast it"),
        ("many", "be an array of numbers, got 'many'"),
    ]


SCALAR = [(np.ones(4), "be a scalar, got shape (4,); pass robust_loss(losses, temperature)")]
SCALAR += [("much", "be an array of numbers, got 'much'")]
HEAD = {
    "temperature": LAMBDA,
    "gamma": SHARE,
    "alpha": POSITIVE,
    "max_jump": number("be positive", 0.0, -1, NAN, none=True),
}
TUNED = {
    "init_value": [*LAMBDA, SCHEDULE],
    "transition_begin": NOT_NEGATIVE,
    "rate": number("lie in (0, 0.5]", 0.0, 0.6, NAN),
    "damping": NOT_NEGATIVE,
}
OPTIMIZER = {"learning_rate": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, **HEAD}

PARAMS, LOSSES = jnp.ones(3), np.ones(3, np.float32)
FIXED, TUNING = absgd_jax.absgd(0.1, 5.0), absgd_jax.absgd(0.1, absgd_jax.target_ess())
ATTEND = absgd_jax.attention(5.0)
HEAD_ALONE = absgd_jax.scale_by_attention(5.0)
MICRO = absgd_jax.accumulate(FIXED, 2)
UPDATE = {"updates": PARAMS, "params": PARAMS, "value": 1.0}

Z, Y = np.zeros([2, 3], np.float32), np.array([0, 1])
DISTRIBUTIONS = (
    "be integers of shape (2,) or floats of shape (2, 3), distributions over the classes"
)


def per_class(shape):
    return [
        (5, f"hold one number a class, shape {shape}, got shape ()"),
        (np.ones([1, 3]), f"hold one number a class, shape {shape}, got shape (1, 3)"),
        (None, f"hold one number a class, shape {shape}, got shape ()"),
        *(
            (x, f"be finite, not negative and not all zero, got {x}")
            for x in ([1, -1, 1], [0, 0, 0], [1, NAN, 1], [1, INF, 1], ["1", "2", "3"])
        ),
    ]


COUNTS = [*per_class("(3,)"), (jnp.ones(4), "hold one number a class, shape (3,), got shape (4,)")]
LOSS = {
    "logits": [
        *ARRAY,
        (np.zeros([2, 3], int), "be floating point, got int32; cast them"),
        (1.0, "have shape [..., C], got a scalar"),
    ],
    "labels": [
        (np.array([0, 3]), "lie in [0, 2], got 3; mask out"),
        (np.array([-1, 0]), "lie in [0, 2], got -1; mask out"),
        (Z - 1, "lie in [0, 1], got -1.0; mask out"),
        (Z * NAN, "lie in [0, 1], got nan; mask out"),
        ([0.0, 1.0], f"{DISTRIBUTIONS}, got float64 (2,)"),
        (np.zeros([2, 3], int), f"{DISTRIBUTIONS}, got int64 (2, 3)"),
        (np.ones(2, bool), f"{DISTRIBUTIONS}, got bool (2,)"),
        ("cat", f"{DISTRIBUTIONS}, got <U3 ()"),
    ],
    "where": mask(shape=(2,)),
}
BATCH = {"logits": Z, "labels": Y}
COUNTED = BATCH | {"class_counts": [3, 2, 1]}
WEIGHTS = {"weights": PER_EXAMPLE, "where": mask("weights")}
LABELS = [
    ([0.0, 1.0], "be integers, got float64"),
    ([0, 1, 3], "lie in [0, 3), got 3"),
    ([-1, 0], "lie in [0, 3), got -1"),
]
SEEDS = [
    (seed, f"be a whole number from 0 on or a NumPy generator, got {seed!r}")
    for seed in (-1, 0.5, "1", None)
]
KIND = "be 'symmetric', 'symmetric_inclusive', 'asymmetric' or a transition matrix, got "

FUNCTIONS = {
    "scale_by_attention": Function(absgd_jax.scale_by_attention, {"temperature": 1.0}, HEAD),
    "attention": Function(absgd_jax.attention, {"temperature": 1.0}, HEAD),
    "absgd": Function(
        absgd_jax.absgd,
        {"learning_rate": 0.1, "temperature": 1.0},
        OPTIMIZER | {"momentum": [row for row in DECAY if row[0] is not None]},
    ),
    "abadam": Function(
        absgd_jax.abadam,
        {"learning_rate": 0.1, "temperature": 1.0},
        OPTIMIZER | {"b1": DECAY, "b2": DECAY, "eps": NOT_NEGATIVE},
    ),
    "robust_loss": Function(
        absgd_jax.robust_loss,
        {"losses": LOSSES, "temperature": 1.0},
        {"losses": PER_EXAMPLE, "temperature": [*LAMBDA, SCHEDULE], "where": mask()},
    ),
    "get_temperature": Function(
        absgd_jax.get_temperature,
        {},
        {
            "opt_state": [
                (None, "hold one AttentionState, got 0; pass the state of absgd"),
                (optax.adam(0.1).init(PARAMS), "hold one AttentionState, got 0; pass"),
                ((ATTEND.init(), ATTEND.init()), "hold one AttentionState, got 2; pass"),
            ]
        },
    ),
    "target_ess": Function(
        absgd_jax.target_ess, {}, {"fraction": number("lie in (0, 1)", 0.0, 1, NAN), **TUNED}
    ),
    "target_kl": Function(absgd_jax.target_kl, {"radius": 0.1}, {"radius": POSITIVE, **TUNED}),
    "AutomaticTemperature": Function(
        absgd_jax.AutomaticTemperature,
        {
            **{"measure": "kl", "target": 0.1, "init_value": INF},
            **{"transition_begin": 0, "rate": 0.1, "damping": 0.0},
        },
        {"measure": [("ess", "be 'chi2' or 'kl', got 'ess'")], "target": POSITIVE, **TUNED},
    ),
    "accumulate": Function(
        absgd_jax.accumulate,
        {"opt": FIXED, "every_k": 2},
        {
            "opt": [(0.1, "be an optimiser, got 0.1; pass absgd, abadam, or what holds one")],
            "every_k": whole_number(1),
        },
    ),
    "pmerge": Function(
        functools.partial(absgd_jax.pmerge, axis_name="device"),
        {"loss": 1.0, "grads": PARAMS, "temperature": 1.0},
        {
            "loss": SCALAR,
            "temperature": [*LAMBDA, SCHEDULE],
            "where": [("many", "be an array of numbers, got 'many'")],
        },
    ),
    "losses.balanced_softmax": Function(
        losses.balanced_softmax, COUNTED, LOSS | {"class_counts": COUNTS, "tau": NOT_NEGATIVE}
    ),
    "losses.arb": Function(
        losses.arb,
        COUNTED,
        LOSS | {"class_counts": [row for row in COUNTS if row[0] is not None]},
    ),
    "losses.ldam": Function(
        losses.ldam,
        COUNTED,
        LOSS
        | {
            "labels": [*LOSS["labels"][:2], (Z, "be integers of shape (2,), got float32 (2, 3)")],
            "class_counts": COUNTS,
            "max_margin": NOT_NEGATIVE,
            "scale": POSITIVE,
        },
    ),
    "losses.normalized_logits": Function(
        losses.normalized_logits,
        {"features": Z, "kernel": np.ones([3, 5], np.float32)},
        {
            "features": [
                *ARRAY,
                (np.ones([2, 3], int), "be floating point, got int32; cast them"),
                (np.ones([2, 4]), "have shape [..., D] and kernel [D, C], got (2, 4) and (3, 5)"),
                (1.0, "have shape [..., D] and kernel [D, C], got () and (3, 5)"),
            ],
            "kernel": [*ARRAY, (np.ones([3, 5], int), "be floating point, got int32; cast them")],
        },
    ),
    "losses.focal": Function(
        losses.focal,
        BATCH,
        LOSS
        | {
            "gamma": NOT_NEGATIVE,
            "alpha": [row for row in COUNTS if row[0] is not None],
        },
    ),
    "losses.symmetric_cross_entropy": Function(
        losses.symmetric_cross_entropy,
        BATCH,
        LOSS
        | {
            "alpha": NOT_NEGATIVE,
            "beta": NOT_NEGATIVE,
            "log_zero": number("be negative and finite", 0, 1e-4, -INF, NAN),
        },
    ),
    "losses.generalized_cross_entropy": Function(
        losses.generalized_cross_entropy, BATCH, LOSS | {"q": SHARE, "truncation": DECAY}
    ),
    "losses.class_balanced_weights": Function(
        losses.class_balanced_weights,
        {"class_counts": [3, 2, 1]},
        {"class_counts": per_class("[C]"), "beta": DECAY},
    ),
    "losses.inverse_frequency_weights": Function(
        losses.inverse_frequency_weights, {}, {"class_counts": per_class("[C]")}
    ),
    "losses.deferred_weights": Function(
        losses.deferred_weights,
        {"weights": [3, 2, 1], "start": 1},
        {"weights": per_class("[C]"), "start": NOT_NEGATIVE},
    ),
    "data.class_counts": Function(
        data.class_counts,
        {"labels": [0, 1, 2], "num_classes": 3},
        {"labels": LABELS, "num_classes": whole_number(1)},
    ),
    "data.long_tailed_counts": Function(
        data.long_tailed_counts,
        {"max_count": 50, "num_classes": 3, "imbalance_factor": 0.1},
        {
            "max_count": [
                *whole_number(1),
                (5, "leave the rarest class an example, got 5 with an imbalance_factor of 0.1"),
            ],
            "num_classes": whole_number(2),
            "imbalance_factor": SHARE,
            "kind": [("linear", "be 'exp' or 'step', got 'linear'"), (None, "be 'exp' or 'step'")],
        },
    ),
    "data.long_tailed_indices": Function(
        data.long_tailed_indices,
        {"labels": [0, 0, 1, 1], "imbalance_factor": 0.5, "seed": 0},
        {
            "labels": [
                ([0.0, 1.0], "be integers, got float64"),
                ([0, 0, 2, 2], "lie in [0, 2), got 2"),
                ([[0, 1]], "have shape [N] and be of two classes or more, got (1, 2) of 2"),
                ([], "have shape [N] and be of two classes or more, got (0,) of 0"),
                ([0, 0], "have shape [N] and be of two classes or more, got (2,) of 1"),
            ],
            "imbalance_factor": SHARE,
            "kind": [("linear", "be 'exp' or 'step', got 'linear'")],
            "max_count": [
                *(row for row in whole_number(1) if row[0] is not None),
                (3, "leave enough examples, got 3: class 0 has 2 and needs 3"),
            ],
            "class_order": [
                ([0, 2], "be a permutation of 0, ..., 1, got [0 2]"),
                ("rare", "be a permutation of 0, ..., 1, got rare"),
            ],
            "seed": SEEDS,
        },
    ),
    "data.split_by_count": Function(
        data.split_by_count,
        {"counts": [1, 2]},
        {
            "counts": [
                (5, "hold one number a class, not negative, got 5"),
                ([1, -2], "hold one number a class, not negative, got [ 1 -2]"),
                (["1"], "hold one number a class, not negative, got ['1']"),
            ],
            "many": NOT_NEGATIVE,
            "few": [*NOT_NEGATIVE, (101, "not exceed many, got 101 and 100")],
        },
    ),
    "data.flip_labels": Function(
        data.flip_labels,
        {"labels": [0, 1, 2], "rate": 0.5, "num_classes": 3, "seed": 0},
        {
            "labels": [*LABELS, ([[0, 1]], "have shape [N], got (1, 2)")],
            "rate": number("lie in [0, 1]", -0.1, 1.1, NAN),
            "kind": [
                ("uniform", f"{KIND}'uniform'"),
                (None, f"{KIND}None"),
                (np.eye(2), "have shape (3, 3), got (2, 2)"),
                (2 * np.eye(3), "hold distributions, rows that are not negative and sum to 1"),
                (2 * np.eye(3) - 1 / 3, "hold distributions, rows that are not negative and sum"),
            ],
            "num_classes": whole_number(2),
            "seed": SEEDS,
        },
    ),
    "diagnostics.class_mass": Function(
        diagnostics.class_mass,
        {"weights": LOSSES, "labels": np.zeros(3, int), "num_classes": 2},
        WEIGHTS
        | {
            "labels": [
                *ARRAY,
                (np.ones(3, np.float32), "be integers, got float32"),
                (np.zeros(2, int), "have the shape of weights, (3,), got (2,)"),
            ],
            "num_classes": whole_number(1),
        },
    ),
    "diagnostics.summary": Function(
        diagnostics.summary,
        {"losses": LOSSES, "temperature": 1.0, "labels": np.zeros(3, int), "num_classes": 2},
        {
            "losses": PER_EXAMPLE,
            "temperature": [*LAMBDA, SCHEDULE],
            "baseline": [
                ("much", "be an array of numbers, got 'much'"),
                (np.ones(2), "be a scalar, got shape (2,)"),
            ],
            "labels": [
                ("many", "be an array of numbers, got 'many'"),
                (np.ones(3, np.float32), "be integers, got float32"),
                (np.zeros(2, int), "have the shape of weights, (3,), got (2,)"),
            ],
            "num_classes": [row for row in whole_number(1) if row[0] is not None],
            "where": mask(),
        },
    ),
} | {
    f"diagnostics.{name}": Function(getattr(diagnostics, name), {"weights": LOSSES}, WEIGHTS)
    for name in ("effective_sample_size", "largest_weight", "kl_divergence")
}
NOT_A_STATE = "be an AttentionState, got tuple; start from what init gives"
UPDATES = {
    "attention": Function(
        ATTEND.update,
        {"losses": LOSSES, "state": ATTEND.init()},
        {"losses": PER_EXAMPLE, "state": [((), NOT_A_STATE)], "where": mask()},
    ),
    "scale_by_attention": Function(
        HEAD_ALONE.update,
        UPDATE | {"state": HEAD_ALONE.init(PARAMS)},
        {
            "state": [((), NOT_A_STATE)],
            "value": SCALAR,
            "where": [("many", "be an array of numbers, got 'many'")],
        },
    ),
    "automatic": Function(
        TUNING.update,
        UPDATE | {"state": TUNING.init(PARAMS), "losses": LOSSES},
        {
            "value": SCALAR,
            "losses": [row for row in PER_EXAMPLE if row[0] is not None],
            "where": mask(),
        },
    ),
    "accumulate": Function(
        MICRO.update,
        UPDATE | {"state": MICRO.init(PARAMS), "losses": LOSSES},
        {
            "state": [((), "be an AccumulateState, got tuple; start from what init gives")],
            "value": SCALAR,
            "losses": [row for row in PER_EXAMPLE if row[0] is not None],
            "where": mask(),
        },
    ),
}


def check(function):
    for argument, rows in function.wrong.items():
        for value, must in rows:
            with pytest.raises((TypeError, ValueError)) as error:
                function.call(**function.valid | {argument: value})
            assert str(error.value).startswith(f"{argument} must {must}"), (argument, value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    check(FUNCTIONS[name])


@pytest.mark.parametrize("name", UPDATES)
def test_update(name):
    check(UPDATES[name])


def test_every_argument_of_every_function_is_tested():
    for prefix, module in (
        ("", absgd_jax),
        ("losses.", losses),
        ("data.", data),
        ("diagnostics.", diagnostics),
    ):
        for name, function in vars(module).items():
            if inspect.isfunction(function):
                tested = FUNCTIONS[prefix + name].wrong.keys()
                assert tested == inspect.signature(function).parameters.keys() - THEIRS, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FIXED.update(PARAMS, FIXED.init(PARAMS)), "value is missing; attention depends"),
        (lambda: MICRO.update(PARAMS, MICRO.init(PARAMS)), "value is missing; attention depends"),
        (
            lambda: TUNING.update(PARAMS, TUNING.init(PARAMS), value=1.0),
            "losses is missing; an automatic temperature is tuned by both",
        ),
        (
            lambda: diagnostics.summary(LOSSES, 1.0, labels=np.zeros(3, int)),
            "num_classes is missing; labels alone do not tell how many there are",
        ),
        (lambda: losses.arb(Z[0], 1), "logits must hold a batch to count the classes in, got"),
    ],
)
def test_missing(call, message):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value).startswith(message)
