"""A wrong argument of anything public is named, with its value and with what to do instead."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import absgd_jax
from absgd_jax import data, diagnostics, losses

NAN, INF = float("nan"), float("inf")
# What is handed to JAX and optax as it is, and theirs to check.
THEIRS = {"axis_name", "nesterov", "debias", "accumulator_dtype", "mu_dtype"}


class Wrong(NamedTuple):
    """A value that is refused, and words that the message has, too."""

    value: Any
    words: tuple[str, ...]


class Function(NamedTuple):
    call: Callable[..., Any]
    valid: dict[str, Any]
    wrong: dict[str, list[Any]]  # values, or Wrong


def or_none(rows):
    return [row for row in rows if row is not None]


NUMBER = ["1", [0.5], np.ones(2), None]
SHARE = [*NUMBER, 0, -0.5, 1.5, NAN]
CLOSED_SHARE = [*NUMBER, -0.5, 1.5, NAN]
DECAY = [*NUMBER, -0.5, 1, NAN]
POSITIVE = [*NUMBER, 0, -1.0, INF, NAN]
NOT_NEGATIVE = [*NUMBER, -1.0, INF, NAN]
LAMBDA = [*NUMBER, 0, -0.0, 1e-7, -1e-7, NAN]
FROM_0, FROM_1, FROM_2 = ([*NUMBER, least - 1, least + 0.5, NAN] for least in range(3))
A_SCHEDULE = Wrong(optax.constant_schedule(1.0), ("a schedule", "get_temperature(opt_state)"))

ARRAY = ["many", None]
FLOATS = [
    *ARRAY,
    Wrong(np.ones(3, np.int32), ("floating point", "cast them first")),
    Wrong(np.ones(3, bool), ("floating point", "cast them first")),
]
PER_EXAMPLE = [*FLOATS, Wrong(1.0, ("a scalar", "before any mean or sum"))]


def mask(shape=(3,)):
    return [
        "many",
        Wrong(np.ones(shape, np.float32), ("boolean", "mask > 0")),
        Wrong([[True]], (str(shape), "broadcast_to")),
    ]


VALUE = ["much", Wrong(np.ones(4), ("a scalar", "the mean of tilt(losses, opt_state)"))]
HEAD = {
    "temperature": LAMBDA,
    "gamma": SHARE,
    "alpha": POSITIVE,
    "max_jump": [*or_none(NUMBER), 0.0, -1, NAN],
}
TUNED = {
    "init_value": [*LAMBDA, A_SCHEDULE],
    "rate": [*NUMBER, 0.0, 0.6, NAN],
    "damping": NOT_NEGATIVE,
}
OPTIMIZER = {"learning_rate": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, **HEAD}

PARAMS, LOSSES = jnp.ones(3), np.ones(3, np.float32)
FIXED, TUNING = absgd_jax.absgd(0.1, 5.0), absgd_jax.absgd(0.1, absgd_jax.target_ess())
HEAD_ALONE, MICRO = absgd_jax.scale_by_attention(5.0), absgd_jax.accumulate(FIXED, 2)
UPDATE = {"updates": PARAMS, "params": PARAMS, "value": 1.0}
ATTENTION = HEAD_ALONE.init(PARAMS)
SEVERAL = jax.vmap(lambda lam: absgd_jax.absgd(0.1, lam).init(PARAMS))(jnp.array([1.0, 2.0]))

OPT_STATE = [
    Wrong(None, ("0 AttentionState", "pass the state of absgd")),
    Wrong(optax.adam(0.1).init(PARAMS), ("0 AttentionState", "pass the state of absgd")),
    Wrong((ATTENTION, ATTENTION), ("2 AttentionState", "in front of optax.partition")),
    # λ, from the time when it was what a loss was given.
    *(Wrong(lam, ("pass the state of absgd",)) for lam in (5.0, np.float32(5.0), jnp.float32(5.0))),
]

Z, Y = np.zeros([2, 3], np.float32), np.array([0, 1])


def per_class(shape):
    rows = [5, np.ones([1, 3]), [1, -1, 1], [0, 0, 0], [1, NAN, 1], [1, INF, 1], ["1", "2", "3"]]
    return [None, *(Wrong(row, (shape,)) for row in rows[:2]), *rows[2:]]


COUNTS = [*per_class("(3,)"), Wrong(jnp.ones(4), ("(3,)",))]
LOSS = {
    "logits": [
        *ARRAY,
        Wrong(np.zeros([2, 3], np.int32), ("cast them",)),
        Wrong(1.0, ("a scalar", "[..., C]")),
    ],
    "labels": [
        *(Wrong(np.array(labels), ("[0, 2]", "`where`")) for labels in ([0, 3], [-1, 0])),
        *(Wrong(labels, ("[0, 1]", "`where`")) for labels in (Z - 1, Z * NAN)),
        *(
            Wrong(labels, ("integers of shape (2,)", "floats of shape (2, 3)"))
            for labels in ([0.0, 1.0], np.zeros([2, 3], int), np.ones(2, bool), "cat")
        ),
    ],
    "where": mask(shape=(2,)),
}
BATCH = {"logits": Z, "labels": Y}
COUNTED = BATCH | {"class_counts": [3, 2, 1]}
WEIGHTS = {"weights": PER_EXAMPLE, "where": mask()}
LABELS = [[0.0, 1.0], Wrong([0, 1, 3], ("[0, 3)",)), Wrong([-1, 0], ("[0, 3)",))]
GROUPS = [
    "many",
    Wrong(np.ones(3, np.float32), ("integers",)),
    Wrong(np.zeros(2, int), ("the shape of weights, (3,)",)),
]
SEEDS = [-1, 0.5, "1", None]

FUNCTIONS = {
    "scale_by_attention": Function(absgd_jax.scale_by_attention, {"temperature": 1.0}, HEAD),
    "absgd": Function(
        absgd_jax.absgd,
        {"learning_rate": 0.1, "temperature": 1.0},
        OPTIMIZER | {"momentum": or_none(DECAY)},
    ),
    "abadam": Function(
        absgd_jax.abadam,
        {"learning_rate": 0.1, "temperature": 1.0},
        OPTIMIZER | {"b1": DECAY, "b2": DECAY, "eps": NOT_NEGATIVE},
    ),
    "tilt": Function(
        absgd_jax.tilt,
        {"losses": LOSSES, "opt_state": FIXED.init(PARAMS)},
        {"losses": FLOATS, "opt_state": [*OPT_STATE, Wrong(SEVERAL, ("(2,)", "jax.vmap"))]},
    ),
    "robust_loss": Function(
        absgd_jax.robust_loss,
        {"losses": LOSSES, "temperature": 1.0},
        {"losses": PER_EXAMPLE, "temperature": [*LAMBDA, A_SCHEDULE], "where": mask()},
    ),
    "get_temperature": Function(absgd_jax.get_temperature, {}, {"opt_state": OPT_STATE}),
    "two_stage": Function(
        absgd_jax.two_stage,
        {"temperature": 1.0, "begin": 2},
        {"temperature": LAMBDA, "begin": FROM_0},
    ),
    "target_ess": Function(absgd_jax.target_ess, {}, {"fraction": [*NUMBER, 0.0, 1, NAN], **TUNED}),
    "target_kl": Function(absgd_jax.target_kl, {"radius": 0.1}, {"radius": POSITIVE, **TUNED}),
    "accumulate": Function(
        absgd_jax.accumulate,
        {"opt": FIXED, "every_k": 2},
        {"opt": [Wrong(0.1, ("pass absgd, abadam",))], "every_k": FROM_1},
    ),
    "losses.balanced_softmax": Function(
        losses.balanced_softmax, COUNTED, LOSS | {"class_counts": COUNTS, "tau": NOT_NEGATIVE}
    ),
    "losses.arb": Function(losses.arb, COUNTED, LOSS | {"class_counts": or_none(COUNTS)}),
    "losses.ldam": Function(
        losses.ldam,
        COUNTED,
        LOSS
        | {
            "labels": [*LOSS["labels"][:2], Wrong(Z, ("integers of shape (2,)",))],
            "class_counts": COUNTS,
            "max_margin": NOT_NEGATIVE,
            "scale": POSITIVE,
        },
    ),
    "losses.normalized_logits": Function(
        losses.normalized_logits,
        {"features": Z, "kernel": np.ones([3, 5], np.float32)},
        {
            "features": [*FLOATS, Wrong(np.ones([2, 4]), ("(3, 5)",)), 1.0],
            "kernel": FLOATS,
        },
    ),
    "losses.focal": Function(
        losses.focal, BATCH, LOSS | {"gamma": NOT_NEGATIVE, "alpha": or_none(COUNTS)}
    ),
    "losses.symmetric_cross_entropy": Function(
        losses.symmetric_cross_entropy,
        BATCH,
        LOSS
        | {
            "alpha": NOT_NEGATIVE,
            "beta": NOT_NEGATIVE,
            "log_zero": [*NUMBER, 0, 1e-4, -INF, NAN],
        },
    ),
    "losses.generalized_cross_entropy": Function(
        losses.generalized_cross_entropy, BATCH, LOSS | {"q": SHARE, "truncation": DECAY}
    ),
    "losses.class_balanced_weights": Function(
        losses.class_balanced_weights,
        {"class_counts": [3, 2, 1]},
        {"class_counts": per_class("[C]"), "beta": CLOSED_SHARE},
    ),
    "losses.deferred_weights": Function(
        losses.deferred_weights,
        {"weights": [3, 2, 1], "start": 1},
        {"weights": per_class("[C]"), "start": FROM_0},
    ),
    "data.class_counts": Function(
        data.class_counts,
        {"labels": [0, 1, 2], "num_classes": 3},
        {"labels": LABELS, "num_classes": FROM_1},
    ),
    "data.long_tailed_counts": Function(
        data.long_tailed_counts,
        {"max_count": 50, "num_classes": 3, "imbalance_factor": 0.1},
        {
            "max_count": [*FROM_1, Wrong(5, ("an imbalance_factor of 0.1",))],
            "num_classes": FROM_2,
            "imbalance_factor": SHARE,
            "kind": [Wrong("linear", ("'exp' or 'step'",)), None],
        },
    ),
    "data.long_tailed_indices": Function(
        data.long_tailed_indices,
        {"labels": [0, 0, 1, 1], "imbalance_factor": 0.5, "seed": 0},
        {
            "labels": [[0.0, 1.0], [0, 0, 2, 2], [[0, 1]], [], [0, 0]],
            "imbalance_factor": SHARE,
            "kind": ["linear"],
            "max_count": [*or_none(FROM_1), Wrong(3, ("class 0 has 2 and needs 3",))],
            "class_order": [[0, 2], "rare"],
            "seed": SEEDS,
        },
    ),
    "data.split_by_count": Function(
        data.split_by_count,
        {"counts": [1, 2]},
        {
            "counts": [5, [1, -2], ["1"]],
            "many": NOT_NEGATIVE,
            "few": [*NOT_NEGATIVE, Wrong(101, ("not exceed many", "100"))],
        },
    ),
    "data.flip_labels": Function(
        data.flip_labels,
        {"labels": [0, 1, 2], "rate": 0.5, "num_classes": 3, "seed": 0},
        {
            "labels": [*LABELS, Wrong([[0, 1]], ("[N]",))],
            "rate": CLOSED_SHARE,
            "kind": [
                Wrong("uniform", ("'symmetric_inclusive'", "a transition matrix")),
                None,
                Wrong(np.eye(2), ("(3, 3)",)),
                *(Wrong(rows, ("sum to 1",)) for rows in (2 * np.eye(3), 2 * np.eye(3) - 1 / 3)),
                Wrong(np.eye(3) * (1 + 1e-4), ("sum to 1",)),
            ],
            "num_classes": FROM_2,
            "seed": SEEDS,
        },
    ),
    "diagnostics.class_mass": Function(
        diagnostics.class_mass,
        {"weights": LOSSES, "labels": np.zeros(3, int), "num_classes": 2},
        WEIGHTS | {"labels": [*GROUPS, None], "num_classes": FROM_1},
    ),
    "diagnostics.summary": Function(
        diagnostics.summary,
        {"losses": LOSSES, "opt_state": ATTENTION, "labels": np.zeros(3, int), "num_classes": 2},
        {
            "losses": PER_EXAMPLE,
            "opt_state": OPT_STATE,
            "labels": GROUPS,
            "num_classes": or_none(FROM_1),
            "where": mask(),
        },
    ),
} | {
    f"diagnostics.{name}": Function(getattr(diagnostics, name), {"weights": LOSSES}, WEIGHTS)
    for name in ("effective_sample_size", "largest_weight", "kl_divergence")
}
STATE = Wrong((), ("tuple", "start from what init gives"))
AUTOMATIC = {"value": VALUE, "losses": or_none(PER_EXAMPLE), "where": mask()}
UPDATES = {
    "scale_by_attention": Function(
        HEAD_ALONE.update, UPDATE | {"state": ATTENTION}, {"state": [STATE], "value": VALUE}
    ),
    "automatic": Function(
        TUNING.update, UPDATE | {"state": TUNING.init(PARAMS), "losses": LOSSES}, AUTOMATIC
    ),
    "accumulate": Function(
        MICRO.update,
        UPDATE | {"state": MICRO.init(PARAMS), "losses": LOSSES},
        AUTOMATIC | {"state": [STATE]},
    ),
}


def shown(value):
    """What of a value a message may show: all of it, its shape or dtype, or the entry at fault."""
    array = np.asarray(value)
    whole = {str(value), repr(value), str(array)}
    return whole | {str(array.shape), str(array.dtype)} | {str(x) for x in array.ravel()}


def check(function):
    for argument, rows in function.wrong.items():
        for row in rows:
            value, words = row if isinstance(row, Wrong) else (row, ())
            with pytest.raises((TypeError, ValueError)) as error:
                function.call(**function.valid | {argument: value})
            message = str(error.value)
            must, _, got = message.partition(", got ")
            assert must.startswith(f"{argument} must "), message
            assert all(word in message for word in words), message
            assert any(x in got for x in words) or any(x in got for x in shown(value)), message


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name):
    check(FUNCTIONS[name])


@pytest.mark.parametrize("name", UPDATES)
def test_update(name):
    check(UPDATES[name])


def test_every_argument_of_every_function_is_tested():
    modules = {"": absgd_jax, "losses.": losses, "data.": data, "diagnostics.": diagnostics}
    for prefix, module in modules.items():
        for name, function in vars(module).items():
            if inspect.isfunction(function):
                tested = FUNCTIONS[prefix + name].wrong.keys()
                assert tested == inspect.signature(function).parameters.keys() - THEIRS, name


@pytest.mark.parametrize(
    ("call", "argument", "remedy"),
    [
        (lambda: FIXED.update(PARAMS, FIXED.init(PARAMS)), "value", "value=loss"),
        (lambda: MICRO.update(PARAMS, MICRO.init(PARAMS)), "value", "value=loss"),
        (
            lambda: TUNING.update(PARAMS, TUNING.init(PARAMS), value=1.0),
            "losses",
            "value=loss, losses=losses",
        ),
        (
            lambda: diagnostics.summary(LOSSES, ATTENTION, labels=np.zeros(3, int)),
            "num_classes",
            "labels alone do not tell",
        ),
        (lambda: losses.arb(Z[0], 1), "logits", "pass class_counts"),
    ],
)
def test_missing(call, argument, remedy):
    with pytest.raises(
        (TypeError, ValueError), match=f"{argument} (is missing|must hold)"
    ) as error:
        call()
    assert remedy in str(error.value)


def test_an_optimiser_without_attention_cannot_be_accumulated():
    tx = absgd_jax.accumulate(optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match="must hold one AttentionState"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)
