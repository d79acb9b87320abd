"""A wrong argument of anything public is named, with its value and with what to do instead."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import absgd_jax
from absgd_jax import (
    abadam,
    absgd,
    accumulate,
    data,
    diagnostics,
    get_temperature,
    losses,
    robust_loss,
    scale_by_attention,
    target_ess,
    target_kl,
    tilt,
    two_stage,
)

NAN, INF = float("nan"), float("inf")
# What is handed to JAX and optax as it is, and theirs to check.
THEIRS = {"axis_name", "nesterov", "debias", "accumulator_dtype", "mu_dtype"}


def bad(*values, says=""):
    """Values that are refused by a message that says this, too."""
    return [(value, says) for value in values]


OPTIONAL = bad("1", says="a number") + bad([0.5], np.ones(2), says="a scalar")
NUMBER = bad(None, says="a number") + OPTIONAL
SHARE = NUMBER + bad(0, -0.5, 1.5, NAN, says="(0, 1]")
DECAY = NUMBER + bad(-0.5, 1, NAN, says="[0, 1)")
POSITIVE = NUMBER + bad(0, -1.0, INF, NAN, says="positive and finite")
NOT_NEGATIVE = NUMBER + bad(-1.0, INF, NAN, says="0 or more and finite")
LAMBDA = NUMBER + bad(0, -0.0, 1e-7, -1e-7, NAN, says="inf is the plain mean")
FIXED_LAMBDA = LAMBDA + bad(optax.constant_schedule(1.0), says="get_temperature(opt_state)")

ARRAY = bad("many", None, says="an array of numbers")
FLOATS = ARRAY + bad(np.ones(3, np.int32), np.ones(3, bool), says="cast them first")
PER_EXAMPLE = FLOATS + bad(1.0, says="before any mean or sum")
VALUE = bad("much", says="an array of numbers") + bad(np.ones(4), says="tilt(losses, opt_state)")


def from_on(n):
    return NUMBER + bad(n - 1, n + 0.5, NAN, says=f"a whole number from {n} on")


def mask(n):
    return [
        *bad("many", says="an array of numbers"),
        *bad(np.ones(n, np.float32), says="mask > 0"),
        *bad([[True]], says="broadcast_to"),
    ]


def per_class(shape):
    shapes = bad(5, np.ones([1, 3]), says=shape)
    numbers = [1, -1, 1], [0, 0, 0], [1, NAN, 1], [1, INF, 1], ["1", "2", "3"]
    return shapes + bad(*numbers, says="finite, not negative and not all zero")


PARAMS, LOSSES = jnp.ones(3), np.ones(3, np.float32)
FIXED, HEAD, TUNING = absgd(0.1, 5.0), scale_by_attention(5.0), absgd(0.1, target_ess())
STAGED, MICRO = absgd(0.1, two_stage(target_ess(), 3)), accumulate(FIXED, 2)
ATTENTION = HEAD.init(PARAMS)
SEVERAL = jax.vmap(lambda lam: scale_by_attention(lam).init(PARAMS))(jnp.array([1.0, 2.0]))
OPT_STATE = [
    *bad(None, optax.adam(0.1).init(PARAMS), says="pass the state of absgd"),
    *bad((ATTENTION, ATTENTION), says="in front of optax.partition"),
    *bad(5.0, np.float32(5.0), jnp.float32(5.0), says="pass the state of absgd"),  # λ itself
]

Z, Y = np.zeros([2, 3], np.float32), np.array([0, 1])
COUNTS = per_class("(3,)") + bad(jnp.ones(4), says="(3,)")
OUTSIDE = bad(np.array([0, 3]), np.array([-1, 0]), says="`where`")
NEITHER = [0.0, 1.0], np.zeros([2, 3], int), np.ones(2, bool), "cat"
GROUPS = [
    *bad("many", says="an array of numbers"),
    *bad(np.ones(3, np.float32), says="integers"),
    *bad(np.zeros(2, int), says="the shape of weights, (3,)"),
]
CLASSES = bad([0.0, 1.0], says="integers") + bad([0, 1, 3], [-1, 0], says="[0, 3)")
TRANSITION = [
    *bad("uniform", None, says="a transition matrix"),
    *bad(np.eye(2), says="(3, 3)"),
    *bad(2 * np.eye(3), 2 * np.eye(3) - 1 / 3, np.eye(3) * (1 + 1e-4), says="sum to 1"),
]

# What is refused for an argument of that name, but where a function says otherwise.
REFUSED = {
    **dict.fromkeys(["learning_rate", "weight_decay", "damping", "eps", "tau"], NOT_NEGATIVE),
    **dict.fromkeys(["max_margin", "many"], NOT_NEGATIVE),
    **dict.fromkeys(["alpha", "radius", "scale"], POSITIVE),
    **dict.fromkeys(["gamma", "imbalance_factor", "q"], SHARE),
    **dict.fromkeys(["b1", "b2", "decay", "truncation"], DECAY),
    **dict.fromkeys(["rate", "beta"], NUMBER + bad(-0.5, 1.5, NAN, says="[0, 1]")),
    "momentum": [row for row in DECAY if row[0] is not None],
    "temperature": LAMBDA,
    "init_value": FIXED_LAMBDA,
    "max_jump": OPTIONAL + bad(0.0, -1, NAN, says="None leaves the average unbounded"),
    "fraction": NUMBER + bad(0.0, 1, NAN, says="(0, 1)"),
    "opt": bad(0.1, says="pass absgd, abadam"),
    "opt_state": OPT_STATE,
    "losses": PER_EXAMPLE,
    "weights": PER_EXAMPLE,
    "where": mask(3),
    "logits": ARRAY + bad(np.zeros([2, 3], np.int32), says="cast") + bad(1.0, says="[..., C]"),
    "class_counts": COUNTS + bad(None, says="(3,)"),
    **dict.fromkeys(["begin", "start"], from_on(0)),
    **dict.fromkeys(["every_k", "num_classes", "max_count"], from_on(1)),
    "labels": CLASSES,
    "kind": bad("linear", None, says="'exp' or 'step'"),
    "seed": bad(-1, 0.5, "1", None, says="a NumPy generator"),
}
LOSS = {
    "labels": OUTSIDE + bad(Z - 1, Z * NAN, says="[0, 1]") + bad(*NEITHER, says="(2, 3)"),
    "where": mask(2),
}
HARD = LOSS | {"labels": OUTSIDE + bad(Z, *NEITHER, says="integers of shape (2,)")}
TUNED = {"rate": NUMBER + bad(0.0, 0.6, NAN, says="overshoots")}
PRIOR = per_class("[C]") + bad(None, says="[C]")

# Sound arguments of every function, and what it refuses beside or in place of the above.
RATED = {"learning_rate": 0.1, "temperature": 1.0}
ATTENDED = {"losses": LOSSES, "opt_state": ATTENTION}
GROUPED = {"labels": np.zeros(3, int), "num_classes": 2}
BATCH = {"logits": Z, "labels": Y}
COUNTED = BATCH | {"class_counts": [3, 2, 1]}
FUNCTIONS = [
    (scale_by_attention, {"temperature": 1.0}, {}),
    (absgd, RATED, {}),
    (abadam, RATED, {}),
    (tilt, ATTENDED, {"losses": FLOATS, "opt_state": OPT_STATE + bad(SEVERAL, says="jax.vmap")}),
    (robust_loss, {"losses": LOSSES, "temperature": 1.0}, {"temperature": FIXED_LAMBDA}),
    (get_temperature, {}, {}),
    (two_stage, {"temperature": 1.0, "begin": 2}, {}),
    (target_ess, {}, TUNED),
    (target_kl, {"radius": 0.1}, TUNED),
    (accumulate, {"opt": FIXED, "every_k": 2}, {}),
    (losses.balanced_softmax, COUNTED, LOSS),
    (losses.arb, COUNTED, LOSS | {"class_counts": COUNTS}),
    (losses.ldam, COUNTED, HARD),
    (
        losses.normalized_logits,
        {"features": Z, "kernel": np.ones([3, 5], np.float32)},
        {"features": FLOATS + bad(np.ones([2, 4]), 1.0, says="[..., D]"), "kernel": FLOATS},
    ),
    (losses.focal, BATCH, LOSS | {"gamma": NOT_NEGATIVE, "alpha": COUNTS}),
    (
        losses.symmetric_cross_entropy,
        BATCH,
        LOSS
        | {"alpha": NOT_NEGATIVE, "beta": NOT_NEGATIVE}
        | {"log_zero": NUMBER + bad(0, 1e-4, -INF, NAN, says="negative")},
    ),
    (losses.generalized_cross_entropy, BATCH, LOSS),
    (losses.class_balanced_weights, {"class_counts": [3, 2, 1]}, {"class_counts": PRIOR}),
    (losses.deferred_weights, {"weights": [3, 2, 1], "start": 1}, {"weights": PRIOR}),
    (
        losses.running_counts,
        {"counts": np.zeros(3, np.float32), "labels": Y},
        LOSS
        | {"counts": FLOATS + bad(Z, 1.0, says="[C]")}
        | {"labels": OUTSIDE + bad([0.0, 1.0], np.ones(2, bool), "cat", says="floats of shape")},
    ),
    (data.class_counts, {"labels": [0, 1, 2], "num_classes": 3}, {}),
    (
        data.long_tailed_counts,
        {"max_count": 50, "num_classes": 3, "imbalance_factor": 0.1},
        {
            "max_count": from_on(1) + bad(5, says="an imbalance_factor of 0.1"),
            "num_classes": from_on(2),
        },
    ),
    (
        data.long_tailed_indices,
        {"labels": [0, 0, 1, 1], "imbalance_factor": 0.5, "seed": 0},
        {
            "labels": [
                *bad([0.0, 1.0], says="integers"),
                *bad([0, 0, 2, 2], says="[0, 2)"),
                *bad([[0, 1]], [], [0, 0], says="[N]"),
            ],
            "max_count": from_on(1)[1:] + bad(3, says="class 0 has 2 and needs 3"),
            "class_order": bad([0, 2], "rare", says="a permutation of 0, ..., 1"),
        },
    ),
    (
        data.split_by_count,
        {"counts": [1, 2]},
        {
            "counts": bad(5, [1, -2], ["1"], says="one number a class"),
            "few": NOT_NEGATIVE + bad(101, says="not exceed many, got 101 and 100"),
        },
    ),
    (
        data.flip_labels,
        {"labels": [0, 1, 2], "rate": 0.5, "num_classes": 3, "seed": 0},
        {
            "labels": CLASSES + bad([[0, 1]], says="[N]"),
            "kind": TRANSITION,
            "num_classes": from_on(2),
        },
    ),
    (
        diagnostics.class_mass,
        {"weights": LOSSES, **GROUPED},
        {"labels": GROUPS + bad(None, says="an array of numbers")},
    ),
    (
        diagnostics.summary,
        ATTENDED | GROUPED,
        {"labels": GROUPS, "num_classes": from_on(1)[1:]},
    ),
    (diagnostics.effective_sample_size, {"weights": LOSSES}, {}),
    (diagnostics.largest_weight, {"weights": LOSSES}, {}),
    (diagnostics.kl_divergence, {"weights": LOSSES}, {}),
]
UPDATE = {"updates": PARAMS, "params": PARAMS, "value": 1.0, "losses": LOSSES}
OF_TUNED = {"value": VALUE, "losses": [row for row in PER_EXAMPLE if row[0] is not None]}
OF_TUNED |= {"where": mask(3)}
STATE = {"state": bad((), says="start from what init gives")}
UPDATES = [
    (HEAD.update, UPDATE | {"state": ATTENTION}, STATE | {"value": VALUE}),
    (TUNING.update, UPDATE | {"state": TUNING.init(PARAMS)}, OF_TUNED),
    (STAGED.update, UPDATE | {"state": STAGED.init(PARAMS)}, OF_TUNED),
    (MICRO.update, UPDATE | {"state": MICRO.init(PARAMS)}, STATE | OF_TUNED),
]


def shown(value):
    """What of a value a message may show: all of it, its shape or dtype, or the entry at fault."""
    if callable(value):
        return {"a schedule"}
    if isinstance(value, tuple):
        return {"0 AttentionState", "2 AttentionState", "tuple", "a baseline of shape (2,)"}
    array = np.asarray(value)
    whole = {str(x) for x in (value, repr(value), array, array.shape, array.dtype)}
    if value is None:
        whole.add("0 AttentionState")
    if not array.shape:
        whole.add("a scalar")
    return whole | {str(x) for x in array.ravel()}


def check(function, valid, refused):
    for argument, values in refused.items():
        for value, says in values:
            with pytest.raises((TypeError, ValueError)) as error:
                function(**valid | {argument: value})
            message = str(error.value)
            must, _, got = message.partition(", got ")
            assert must.startswith(f"{argument} must "), message
            assert says in message, (says, message)
            assert any(x in got for x in shown(value)), message


@pytest.mark.parametrize(("function", "valid", "own"), FUNCTIONS)
def test_every_argument(function, valid, own):
    arguments = inspect.signature(function).parameters.keys() - THEIRS
    check(function, valid, {name: own.get(name) or REFUSED[name] for name in arguments})


@pytest.mark.parametrize(("update", "valid", "refused"), UPDATES)
def test_update(update, valid, refused):
    check(update, valid, refused)


def test_every_function_is_tested():
    modules = absgd_jax, losses, data, diagnostics
    public = [f for module in modules for f in vars(module).values() if inspect.isfunction(f)]
    assert {function for function, _, _ in FUNCTIONS} == set(public)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FIXED.update(PARAMS, FIXED.init(PARAMS)), "value is missing.*value=loss"),
        (lambda: MICRO.update(PARAMS, MICRO.init(PARAMS)), "value is missing.*value=loss"),
        (
            lambda: TUNING.update(PARAMS, TUNING.init(PARAMS), value=1.0),
            "losses is missing.*losses=losses",
        ),
        (
            lambda: STAGED.update(PARAMS, STAGED.init(PARAMS), value=1.0),
            "losses is missing.*losses=losses",
        ),
        (
            lambda: diagnostics.summary(LOSSES, ATTENTION, labels=np.zeros(3, int)),
            "num_classes is missing; labels alone do not tell",
        ),
        (lambda: losses.arb(Z[0], 1), "logits must hold a batch.*pass class_counts"),
    ],
)
def test_missing(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
