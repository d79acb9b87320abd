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
    data,
    diagnostics,
    get_temperature,
    losses,
    robust_loss,
    scale_by_attention,
    Sums,
    target_ess,
    target_kl,
    tilt,
    two_stage,
    zero_sums,
)
from tests.support.attended import slopes_and_sums

NAN, INF = float("nan"), float("inf")
# What is handed to JAX and optax as it is, and theirs to check.
THEIRS = {"axis_name", "nesterov", "debias", "accumulator_dtype", "mu_dtype"}


def bad(*values, says="", got=None):
    """Values that are refused by a message that says this, too, and that it got this."""
    return [(value, says, got) for value in values]


OPTIONAL = bad("1", says="a number") + bad([0.5], np.ones(2), says="a scalar")
NUMBER = bad(None, says="a number") + OPTIONAL
SHARE = NUMBER + bad(0, -0.5, 1.5, NAN, says="(0, 1]")
DECAY = NUMBER + bad(-0.5, 1, NAN, says="[0, 1)")
POSITIVE = NUMBER + bad(0, -1.0, INF, NAN, says="positive and finite")
NOT_NEGATIVE = NUMBER + bad(-1.0, INF, NAN, says="0 or more and finite")
LAMBDA = NUMBER + bad(
    *(0, -0.0, 1e-7, -1e-7, NAN, jnp.zeros([]), jnp.bfloat16(NAN)), says="inf is the plain mean"
)
FIXED_LAMBDA = LAMBDA + bad(
    optax.constant_schedule(1.0), target_ess(), says="get_temperature(opt_state)", got="a schedule"
)

ARRAY = bad("many", None, says="an array of numbers")
FLOATS = ARRAY + bad(np.ones(3, np.int32), np.ones(3, bool), says="cast them first")
PER_EXAMPLE = FLOATS + bad(1.0, says="before any mean or sum")


def from_on(n):
    return NUMBER + bad(n - 1, n + 0.5, NAN, says=f"a whole number from {n} on")


def mask(n):
    return [
        *bad("many", says="an array of numbers"),
        *bad(np.ones(n, np.float32), says="mask > 0"),
        *bad([[True]], says="broadcast_to"),
    ]


RAGGED = bad([[0], [1, 2]], says="give its rows one length", got="[[0], [1, 2]]")


def per_class(shape):
    shapes = RAGGED + bad(5, np.ones([1, 3]), says=shape)
    numbers = [1, -1, 1], [0, 0, 0], [1, NAN, 1], [1, INF, 1], ["1", "2", "3"]
    return shapes + bad(*numbers, says="finite, not negative and not all zero")


PARAMS, LOSSES = {"w": jnp.ones(3), "b": jnp.ones(())}, np.ones(3, np.float32)
HEAD = scale_by_attention(5.0)
ATTENTION = HEAD.init(PARAMS)
SEVERAL = jax.vmap(lambda lam: scale_by_attention(lam).init(PARAMS))(jnp.array([1.0, 2.0]))
OPT_STATE = [
    *bad(None, (), PARAMS, optax.adam(0.1).init(PARAMS), says="of absgd", got="0 AttentionState"),
    *bad((ATTENTION, ATTENTION), says="in front of optax.partition", got="2 AttentionState"),
    *bad(5.0, np.float32(5.0), jnp.float32(5.0), says="pass the state of absgd"),  # λ itself
]
STATE = [
    *bad(5.0, says="pass on the state that update returns", got="float"),
    *bad(PARAMS, says="start from what init gives", got="dict"),
    *bad((), (ATTENTION,), says="start from what init gives", got="tuple"),
]
# The sums of three examples, and what is refused in their place by tilt and by the update.
SOUND = slopes_and_sums(LOSSES, ATTENTION)[1]
PASSED = "jax.value_and_grad(loss_fn, argnums=(0, 1))(params, Sums())"
SUMS = [
    *bad(jax.tree.map(lambda q: jnp.stack([q, q]), SOUND), says="under jax.vmap", got="(2, 10)"),
    *bad(optax.tree.cast(SOUND, jnp.bfloat16), says="cast params['net']", got="bfloat16"),
    *bad(optax.tree.cast(SOUND, jnp.float16), says="not the sums", got="float16"),
    *bad(Sums(optax.MaskedNode()), says="pass on the sums", got="MaskedNode()"),
    *bad(Sums(None), says="zero_sums() where only arrays", got="None"),  # of Equinox
]
ZEROS = [
    *bad(None, {}, PARAMS, says=PASSED, got="0 Sums"),
    *bad((Sums(), zero_sums()), {"net": Sums(), "sums": Sums()}, says=PASSED, got="2 Sums"),
    *bad(5.0, says=PASSED),
]
GRADIENT = bad(Sums(), {"weight": 1.0}, {"sums": SOUND}, 5.0, np.ones(9), says=PASSED)

Z, Y = np.zeros([2, 3], np.float32), np.array([0, 1])
COUNTS = per_class("(3,)") + bad(jnp.ones(4), says="(3,)")
OUTSIDE = RAGGED + bad(np.array([0, 3]), np.array([-1, 0]), says="`where`")
NEITHER = [0.0, 1.0], np.zeros([2, 3], int), np.ones(2, bool), "cat"
GROUPS = [
    *bad("many", says="an array of numbers"),
    *bad(np.ones(3, np.float32), says="integers"),
    *bad(np.zeros(2, int), says="the shape of weights, (3,)"),
]
INTEGERS = RAGGED + bad([0.0, 1.0], ["0", "1"], [0, 1, None], says="integers")
CLASSES = INTEGERS + bad([0, 1, 3], [-1, 0], says="[0, 3)")
TRANSITION = [
    *RAGGED,
    *bad("uniform", None, ["cat", "dog"], np.eye(3, dtype=complex), says="a transition matrix"),
    *bad(np.eye(2), says="(3, 3)"),
    *bad(2 * np.eye(3), 2 * np.eye(3) - 1 / 3, np.eye(3) * (1 + 1e-4), says="sum to 1"),
]

# What is refused for an argument of that name, but where a function says otherwise.
REFUSED = {
    **dict.fromkeys(["learning_rate", "weight_decay", "eps", "tau"], NOT_NEGATIVE),
    **dict.fromkeys(["max_margin", "many"], NOT_NEGATIVE),
    **dict.fromkeys(["alpha", "radius", "scale"], POSITIVE),
    **dict.fromkeys(["gamma", "imbalance_factor", "q"], SHARE),
    **dict.fromkeys(["b1", "b2", "decay", "truncation"], DECAY),
    **dict.fromkeys(["rate", "beta"], NUMBER + bad(-0.5, 1.5, NAN, says="[0, 1]")),
    "momentum": [row for row in DECAY if row[0] is not None],
    "damping": [row for row in NOT_NEGATIVE if row[0] is not None],
    "temperature": LAMBDA,
    "init_value": FIXED_LAMBDA,
    "max_jump": OPTIONAL + bad(0.0, -1, NAN, says="None leaves the average unbounded"),
    "fraction": NUMBER + bad(0.0, 1, NAN, says="(0, 1)"),
    "opt_state": OPT_STATE,
    "losses": PER_EXAMPLE,
    "weights": PER_EXAMPLE,
    "where": mask(3),
    "logits": ARRAY + bad(np.zeros([2, 3], np.int32), says="cast") + bad(1.0, says="[..., C]"),
    "class_counts": COUNTS + bad(None, says="(3,)"),
    **dict.fromkeys(["begin", "start"], from_on(0)),
    **dict.fromkeys(["num_classes", "max_count"], from_on(1)),
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
    (
        tilt,
        ATTENDED | {"sums": Sums()},
        {
            "losses": FLOATS,
            "opt_state": OPT_STATE + bad(SEVERAL, says="jax.vmap", got="shape (2,)"),
            "sums": SUMS + ZEROS,
        },
    ),
    (zero_sums, {}, {}),
    (robust_loss, {"losses": LOSSES, "temperature": 1.0}, {"temperature": FIXED_LAMBDA}),
    (get_temperature, {}, {}),
    (two_stage, {"temperature": 1.0, "begin": 2}, {}),
    (target_ess, {}, TUNED),
    (target_kl, {"radius": 0.1}, TUNED),
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
    (
        losses.early_learning,
        BATCH | {"target": Z},
        LOSS
        | {"target": FLOATS + bad(Z - 1, Z * NAN, says="[0, 1]") + bad(Z[0], says="(2, 3)")}
        | {"coefficient": NOT_NEGATIVE, "floor": SHARE},
    ),
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
                *INTEGERS,
                *bad([0, 0, 2, 2], says="[0, 2)"),
                *bad([[0, 1]], [], [0, 0], says="[N]"),
            ],
            "max_count": from_on(1)[1:] + bad(3, says="class 0 has 2 and needs 3"),
            "class_order": RAGGED
            + bad([0, 2], "rare", [1.0, 0.0], [True, False], [[0, 1]], [0, None], says="0, ..., 1"),
        },
    ),
    (
        data.split_by_count,
        {"counts": [1, 2]},
        {
            "counts": RAGGED + bad(5, [1, -2], ["1"], says="one number a class"),
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
    (diagnostics.summary, ATTENDED | GROUPED, {"labels": GROUPS, "num_classes": from_on(1)[1:]}),
    (diagnostics.effective_sample_size, {"weights": LOSSES}, {}),
    (diagnostics.largest_weight, {"weights": LOSSES}, {}),
    (diagnostics.kl_divergence, {"weights": LOSSES}, {}),
]
UPDATE = {"updates": PARAMS, "state": ATTENTION, "params": PARAMS, "sums": SOUND}


def shown(value):
    """What of a value a message may show: all of it, its shape or dtype, or the entry at fault."""
    if callable(value):
        return {"a schedule"}
    if isinstance(value, tuple | dict):
        return {repr(value)}
    array = np.asarray(value)
    whole = {str(x) for x in (value, repr(value), array, array.shape, array.dtype)}
    if not array.shape:
        whole.add("a scalar")
    return whole | {str(x) for x in array.ravel()}


def check(function, valid, refused):
    for argument, values in refused.items():
        for value, says, got in values:
            with pytest.raises((TypeError, ValueError)) as error:
                function(**valid | {argument: value})
            message = str(error.value)
            must, _, rest = message.partition(", got ")
            assert must.startswith(f"{argument} must "), message
            assert says in message, (says, message)
            assert any(x in rest for x in ([got] if got else shown(value))), message


@pytest.mark.parametrize(("function", "valid", "own"), FUNCTIONS)
def test_every_argument(function, valid, own):
    arguments = inspect.signature(function).parameters.keys() - THEIRS
    check(function, valid, {name: own.get(name) or REFUSED[name] for name in arguments})


def test_update():
    check(HEAD.update, UPDATE, {"state": STATE, "sums": SUMS + GRADIENT})


def test_every_function_is_tested():
    modules = absgd_jax, losses, data, diagnostics
    public = [f for module in modules for f in vars(module).values() if inspect.isfunction(f)]
    assert {function for function, _, _ in FUNCTIONS} == set(public)


@pytest.mark.parametrize(
    ("call", "message"),
    [
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


def message_of(tx, updates, **extra_args):
    """The message of an update that needs other updates or arguments."""
    with pytest.raises((TypeError, ValueError)) as error:
        tx.update(updates, tx.init(updates), updates, **extra_args)
    return str(error.value)


BESIDE = {"net": PARAMS, "sums": SOUND}


class TestMissingSums:
    def test_both_ways_to_give_them_are_named(self):
        message = message_of(absgd(0.1, 5.0), PARAMS)
        assert message.startswith("sums is missing; ")
        beside = (
            "MultiSteps",
            '{"net": params, "sums": zero_sums()}',
            "tilt(losses, opt_state, params)",
        )
        for part in (PASSED, "tilt(losses, opt_state, sums)", "sums=sums", "TrainState", *beside):
            assert part in message
        assert "needed" not in message
        assert "mask" not in message

    @pytest.mark.parametrize("name", ["value", "loss", "losses"])
    def test_what_was_passed_before_is_not_needed(self, name):
        message = message_of(absgd(0.1, 5.0), PARAMS, **{name: jnp.float32(1.0)})
        assert message.startswith("sums is missing; ")
        assert PASSED in message
        assert f"`{name}` is not needed" in message

    @pytest.mark.parametrize(
        "tx",
        [
            optax.masked(HEAD, {"net": True, "sums": False}),
            optax.masked(HEAD, lambda tree: jax.tree.map(lambda x: np.ndim(x) > 1, tree)),
            optax.partition(
                {"trained": HEAD, "frozen": optax.set_to_zero()},
                {"net": "trained", "sums": Sums("frozen")},
            ),
        ],
    )
    def test_masked_out(self, tx):
        assert "the mask or the partition pass on the sums, too" in message_of(tx, BESIDE)


@pytest.mark.parametrize(
    ("updates", "sums", "got"), [(BESIDE, SOUND, "1"), (BESIDE | {"more": SOUND}, None, "2")]
)
def test_sums_are_given_once(updates, sums, got):
    message = message_of(absgd(0.1, 5.0), updates, sums=sums)
    assert message.startswith(f"sums must be given once, got {got} ")


class TestUpdates:
    @pytest.mark.parametrize("dtype", [np.int32, jax.dtypes.float0])
    def test_whole_numbers(self, dtype):
        message = message_of(HEAD, {"w": jnp.ones(3), "n": np.zeros(3, dtype)}, sums=SOUND)
        assert message.startswith("updates must be floating point or complex, got ")
        assert str(np.dtype(dtype)) in message
        assert "optax.partition" in message

    def test_complex_ones_are_scaled(self):
        """By the real factor that scales all others."""
        g = jnp.array([1.0 + 0.5j, -2.0 + 3.0j])
        (scaled, real), _ = HEAD.update((g, jnp.ones(2)), HEAD.init(None), sums=SOUND)
        assert scaled.dtype == g.dtype
        np.testing.assert_allclose(scaled, np.asarray(g) * np.asarray(real), rtol=1e-6)
        assert not np.allclose(real, 1)


@pytest.mark.parametrize("argument", ["temperature", "gamma"])
def test_a_schedule_is_of_scalars(argument):
    tx = scale_by_attention(**{"temperature": 5.0, argument: lambda count: jnp.ones(1)})
    message = message_of(tx, PARAMS, sums=SOUND)
    assert message.startswith(f"{argument} must be a schedule of scalars, got shape (1,)")


def mean(state, losses):
    return tilt(jnp.atleast_1d(losses), state, Sums()).mean()


@pytest.mark.parametrize("over", [lambda f: lambda x: f(x.mean()), jax.vmap], ids=["mean", "vmap"])
def test_a_scalar_warns(over):
    tilted = over(lambda loss: tilt(loss, ATTENTION, Sums()))
    with pytest.warns(UserWarning, match="tilt the losses before it") as record:
        tilted(LOSSES)
    assert [warning.filename for warning in record] == [__file__]


# Of functions of a state and of losses.
CONSTANTS = {
    "jit": lambda state, x: jax.jit(lambda x: mean(state, x))(x),
    "numpy": lambda state, x: CONSTANTS["jit"](jax.tree.map(np.asarray, state), x),
    # That these warn, too, is documented.
    "scan": lambda state, x: jax.lax.map(lambda each: mean(state, each), x),
    "checkpoint": lambda state, x: jax.grad(jax.checkpoint(lambda x: mean(state, x)))(x),
}
# Beside those of all other tests, where a warning is an error, too.
FOLLOWED = {
    "eager_vmap": lambda state, x: jax.vmap(lambda x: mean(state, x))(x),
    "argument_of_grad": lambda state, x: jax.jit(
        lambda state, x: jax.grad(jax.checkpoint(lambda x: mean(state, x)))(x)
    )(state, x),
    "numpy_argument": lambda state, x: jax.jit(mean)(jax.tree.map(np.asarray, state), x),
    "made_inside": lambda state, x: jax.jit(lambda x: mean(HEAD.init(None), x))(x),
}


class TestAConstantState:
    @pytest.mark.parametrize("form", CONSTANTS)
    def test_warns(self, form):
        with pytest.warns(UserWarning, match="jitted, pass the state as an argument") as record:
            CONSTANTS[form](ATTENTION, jnp.asarray(LOSSES))
        assert {warning.filename for warning in record} == {__file__}

    @pytest.mark.parametrize("form", FOLLOWED)
    def test_is_none_where_the_state_is_followed(self, form):
        """A warning is an error here."""
        FOLLOWED[form](ATTENTION, jnp.asarray(LOSSES))
