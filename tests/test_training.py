import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tqdm import tqdm

from benchmarks import comparison, datasets, models, training

pytestmark = pytest.mark.usefixtures("users_promotion")

DEFAULTS = {
    "model": "linear",
    "hidden": [8],
    "dtype": "float32",
    "epochs": 3,
    "batch_size": 32,
    "augment": False,
    "second_stage": 0.7,
    "fine_tune_from": 0,
    "schedule": "constant",
    "milestones": [0.5],
    "decay": 0.1,
    "warm_up": 0.0,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "gamma": 0.5,
    "at_once": 10,
    "checkpoint_every": 1e9,
    "tensorboard": False,
    "devices": 1,
}


def cross_entropy(logits, labels, late):
    """Doubled in the second stage."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(late, 2 * losses, losses)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def fit(tmp_path, digits, runs, **options):
    """What the trainer makes of runs on 200 digits, evaluated on 100."""
    args = argparse.Namespace(**DEFAULTS | options, out=tmp_path)
    task = training.Task(comparison.on_device(args, *digits), cross_entropy, 10, 2, False)
    (tmp_path / "checkpoints").mkdir(parents=True, exist_ok=True)
    with tqdm(disable=True) as bar:
        return training.train(args, "fit", task, runs, bar)


def make_run(digits, seed=0, learning_rate=0.1, temperatures=(np.inf,), starts=(0,), ess=None):
    train, test = digits
    index = np.arange(200, dtype=np.int32)
    evaluated = np.arange(100, dtype=np.int32)
    labels = train.labels[:200]
    return training.Run(
        np.int32(seed),
        np.float32(learning_rate),
        np.float32(DEFAULTS["gamma"]),
        np.float32(temperatures),
        np.int32(starts),
        None if ess is None else np.float32(ess),
        training.Examples(index, labels, labels % 2),
        training.Examples(evaluated + len(train.labels), test.labels[:100], test.labels[:100]),
    )


def numpy_run(digits, run, args):
    """A linear classifier trained by the published algorithm, in plain NumPy and float64."""
    train, test = digits
    mean, std = train.images.mean(), train.images.std()
    pixels, tested = (((s.images - mean) / std).reshape(-1, 64) for s in (train, test))
    model = models.make_model("linear", (8, 8, 1), 10, rngs=nnx.Rngs(jax.random.key(run.seed)))
    w = np.float64(model.head.kernel[...]), np.float64(model.head.bias[...])
    m, baseline, averaged = [0.0, 0.0], 0.0, 0
    steps, size, gamma = 200 // args["batch_size"], args["batch_size"], args["gamma"]
    begin = run.starts[-1] * steps
    lam = tuned = run.temperatures[-1]
    history, count = [], 0
    for epoch in range(args["epochs"]):
        key = jax.random.fold_in(jax.random.key(run.seed), epoch)
        order = np.array(jax.random.permutation(jax.random.split(key)[0], 200))
        record = []
        for i in range(steps):
            batch = order[i * size : (i + 1) * size]
            x, y = pixels[batch], run.train.label[batch]
            z = x @ w[0] + w[1]
            z -= z.max(axis=1, keepdims=True)
            p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
            factor = 2 if count >= round(args["second_stage"] * args["epochs"]) * steps else 1
            losses = -factor * np.log(p[np.arange(size), y])
            if run.ess is None:
                stage = np.sum(count >= run.starts * steps)
                lam = np.float64([np.inf, *run.temperatures][stage])
            else:
                lam = tuned
            log_normalizer = baseline / lam if averaged else 0.0
            damping = 1.0
            if np.isinf(lam):
                weights = shares = np.full(size, 1 / size)
            else:
                # When λ changes, λ log u is what stays.
                u = np.exp(baseline / lam) if averaged else 0.0
                averaged += 1
                # As in Adam, where λ is automatic; as published, where it is not.
                newest = gamma if run.ess is None else gamma / (1 - (1 - gamma) ** averaged)
                u = (1 - newest) * u + newest * np.exp(losses / lam).mean()
                baseline = lam * np.log(u)
                weights = np.exp(losses / lam) / (size * u)
                shares = weights / weights.sum()
                chi2 = size * np.sum(shares**2) - 1
                if run.ess is not None and lam > 0:
                    damping = 1 + 2 * np.sqrt(chi2)
            if run.ess is not None and count + 1 >= begin:
                target = 1 / np.float64(run.ess) - 1
                if np.isinf(lam):
                    # Where a normal distribution of the losses would be on target.
                    size_of_lam = np.sqrt(losses.var() / target)
                else:
                    size_of_lam = abs(lam) * (chi2 / target) ** 0.1
                tuned = np.copysign(size_of_lam, run.temperatures[-1])
            grad_z = factor / damping * weights[:, None] * (p - np.eye(10)[y])
            grads = x.T @ grad_z, grad_z.sum(axis=0)
            m = [
                args["momentum"] * mi + g + args["weight_decay"] * wi
                for mi, g, wi in zip(m, grads, w, strict=True)
            ]
            w = [wi - run.learning_rate * mi for wi, mi in zip(w, m, strict=True)]
            odd = run.train.group[batch] == 1
            mass = shares[~odd].sum(), shares[odd].sum()
            scalars = losses.mean(), 1 / (size * np.sum(shares**2)), lam, log_normalizer
            record.append((*scalars, *mass))
            count += 1
        hits = (tested[:100] @ w[0] + w[1]).argmax(axis=1) == test.labels[:100]
        accuracy = [hits[test.labels[:100] == c].mean() for c in range(10)]
        history.append((*np.mean(record, axis=0), *accuracy))
    z = pixels[:200] @ w[0] + w[1]
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return np.array(history), -2 * log_p[np.arange(200), run.train.label]


SCALARS = "mean_loss", "effective_sample_size", "temperature", "log_normalizer"


@pytest.mark.parametrize(
    "settings",
    [
        # An infinite λ from the start changes nothing: all runs have as many stages.
        [
            {"temperatures": (np.inf, np.inf), "starts": (0, 0), "learning_rate": 0.1},
            {"temperatures": (np.inf, 5.0), "starts": (0, 0)},
            {"temperatures": (8.0, 3.0), "starts": (1, 2), "learning_rate": 0.02},
            {"temperatures": (np.inf, -4.0), "starts": (0, 1)},
        ],
        [{"ess": 0.6}, {"ess": 0.8, "temperatures": (-np.inf,), "starts": (1,)}],
    ],
    ids=["fixed", "automatic"],
)
def test_training_is_the_published_algorithm(tmp_path, digits, settings):
    """Losses, weights, accuracies; stages, their steps, and the loss of the second stage."""
    runs = [
        make_run(digits, i, **{"learning_rate": 0.05, **setting})
        for i, setting in enumerate(settings)
    ]
    trained = fit(tmp_path, digits, runs)
    for i, run in enumerate(runs):
        history, losses = numpy_run(digits, run, DEFAULTS)
        found = jax.tree.map(lambda x, i=i: x[:, i], trained.history)
        for name, column in zip(SCALARS, history.T, strict=False):
            np.testing.assert_allclose(found[name], column, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(found["mass"], history[:, 4:6], rtol=1e-4)
        np.testing.assert_allclose(found["accuracy"], history[:, 6:], atol=1e-6)
        np.testing.assert_allclose(trained.losses[i], losses, rtol=1e-3, atol=1e-4)


def test_in_parts_and_on_several_devices(tmp_path, digits):
    runs = [make_run(digits, seed, 0.05, temperatures=(5.0,)) for seed in range(3)]
    at_once = fit(tmp_path / "a", digits, runs)
    in_parts = fit(tmp_path / "b", digits, runs, at_once=2, devices=4)
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(in_parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_schedule(schedule):
    args = argparse.Namespace(
        **DEFAULTS | {"schedule": schedule, "warm_up": 0.1, "milestones": [0.5, 0.9]}
    )
    rate = training.schedule(args, 100)
    found = [float(rate(step)) for step in (0, 5, 10, 49, 50, 89, 90, 99)]
    cosine = [(1 + np.cos(np.pi * (step - 10) / 90)) / 2 for step in (49, 50, 89, 90, 99)]
    wanted = {
        "step": [1, 0.1, 0.1, 0.01, 0.01],
        "cosine": cosine,
        "constant": [1, 1, 1, 1, 1],
    }[schedule]
    np.testing.assert_allclose(found, [0, 0.5, 1, *wanted], atol=1e-6)


def test_augment():
    """Every image is a shift of the original by at most 4 pixels, mirrored or not."""
    image = np.random.default_rng(0).uniform(1, 2, (12, 12, 2)).astype(np.float32)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    possible = {}
    for i in range(9):
        for j in range(9):
            crop = padded[i : i + 12, j : j + 12]
            possible[crop.tobytes()] = i, j, False
            possible[crop[:, ::-1].tobytes()] = i, j, True
    images = jnp.broadcast_to(image, (500, 12, 12, 2))
    augmented = np.array(jax.jit(training.augment)(images, jax.random.key(0)))
    met = [possible[a.tobytes()] for a in augmented]
    assert len(set(met)) > 140  # of 162
    assert 200 < sum(flipped for _, _, flipped in met) < 300


@pytest.mark.parametrize("name", models.NAMES)
def test_models(name):
    def make(**options):
        return models.make_model(name, (32, 32, 3), 10, rngs=nnx.Rngs(0), **options)

    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    model = make()
    assert model(images).shape == (4, 10)
    assert model(images).dtype == jnp.float32
    params = nnx.state(model, nnx.Param)
    sizes = {"linear": 30_730, "mlp": 820_874, "cnn": 545_098, "resnet32": 464_154}
    assert sum(x.size for x in jax.tree.leaves(params)) == sizes[name]

    coarse = make(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(coarse, nnx.Param))} == {
        jnp.dtype("float32")
    }
    assert coarse(images).dtype == jnp.float32
    error = jnp.abs(coarse(images) - model(images)).max() / jnp.abs(model(images)).max()
    assert 0 < error < 0.1 or (name == "linear" and error < 0.1)

    cosines = make(normalized=True)(images)
    assert jnp.abs(cosines).max() <= 1 + 1e-6


def test_resnet_layers():
    """Three stages of five blocks, of 32, 16 and 8 pixels a side; shortcuts without parameters."""
    blocks = models.resnet_blocks(3, depth=32, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 32, 32, 3))
    shapes = []
    for block in blocks[:-1]:
        x = block(x)
        shapes.append(x.shape)
    assert shapes == [(2, 32, 32, 16), (2, 32, 32, 16), (2, 16, 16, 32)]
    assert [len(block.layers) for block in blocks] == [2, 5, 5, 6]

    block = models.Residual(16, 32, 2, rngs=nnx.Rngs(0))
    block.second.norm.scale[...] = jnp.zeros(32)  # nothing but the shortcut is left
    x = jax.random.uniform(jax.random.key(0), (1, 8, 8, 16))
    wanted = np.zeros((1, 4, 4, 32), np.float32)
    wanted[..., 8:24] = x[:, ::2, ::2]
    np.testing.assert_array_equal(block(x), wanted)


def test_fine_tuning(tmp_path, digits):
    """From the second stage on, the lower blocks are as they were; before, nothing is frozen."""
    args = argparse.Namespace(**DEFAULTS | {"model": "mlp", "hidden": [8, 8]}, out=tmp_path)
    args.fine_tune_from = 1
    task = training.Task(comparison.on_device(args, *digits), cross_entropy, 10, 2, False)
    run = jax.tree.map(jnp.asarray, make_run(digits, 0, temperatures=(5.0,), starts=(2,)))
    first, second = (training.make_program(args, task, 200, frozen=k) for k in (0, 1))
    state = first.init(run)
    states = [state]
    for epoch in range(3):
        if epoch == 2:
            state = state._replace(opt_state=second.init(run).opt_state)
        program = second if epoch == 2 else first
        state, _ = jax.jit(program.epoch)(state, run, task.images, epoch)
        states.append(state)

    def changed(before, after):
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        return [bool(jnp.any(a != b)) for a, b in pairs]

    for i in range(3):
        before, after = states[i].params, states[i + 1].params
        assert all(changed(before["head"], after["head"]))
        assert all(changed(before["blocks"][1], after["blocks"][1]))
        assert all(changed(before["blocks"][0], after["blocks"][0])) == (i < 2)
        assert any(changed(before["blocks"][0], after["blocks"][0])) == (i < 2)
    # The momentum of what is frozen is not kept.
    assert len(jax.tree.leaves(state.opt_state)) < len(jax.tree.leaves(states[0].opt_state))

    # The trainer does the same.
    stacked = fit(
        tmp_path,
        digits,
        [make_run(digits, 0, temperatures=(5.0,), starts=(2,))],
        model="mlp",
        hidden=[8, 8],
        fine_tune_from=1,
    )
    losses = jax.jit(second.evaluate)(state, run, task.images)
    np.testing.assert_allclose(stacked.losses[0], losses, rtol=1e-3, atol=1e-5)
    # Its optimiser is a new one, but λ goes by the epochs of them all.
    np.testing.assert_array_equal(stacked.history["temperature"][:, 0], [np.inf, np.inf, 5])


def test_frozen_blocks_keep_their_statistics(tmp_path, digits):
    args = argparse.Namespace(**DEFAULTS | {"model": "resnet32", "augment": True}, out=tmp_path)
    task = training.Task(comparison.on_device(args, *digits), cross_entropy, 10, 2, False)
    assert task.images.pixels.shape[1:] == (32, 32, 1)
    program = training.make_program(args, task, 32, frozen=2)
    run = jax.tree.map(jnp.asarray, make_run(digits))
    run = run._replace(train=jax.tree.map(lambda x: x[:32], run.train))
    before = program.init(run)
    after, _ = jax.jit(program.epoch)(before, run, task.images, 0)
    for i in range(4):
        pairs = zip(*(jax.tree.leaves(s.other["blocks"][i]) for s in (before, after)), strict=True)
        assert {bool(jnp.any(a != b)) for a, b in pairs} == {i >= 2}
