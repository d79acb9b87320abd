import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tqdm import tqdm

from absgd_jax import scale_by_attention, Sums, target_ess, tilt, two_stage
from benchmarks.engine import comparison, datasets, methods, models, training

pytestmark = pytest.mark.usefixtures("users_promotion")

CONFIG = training.Config(
    out=pathlib.Path("unused"),
    model="linear",
    hidden=(8,),
    epochs=3,
    second_stage=0.7,
    schedule="constant",
    warm_up=0.0,
    weight_decay=1e-3,
    gamma=0.5,
    checkpoint_every=1e9,
)
EXAMPLES = 200


def cross_entropy(logits, labels, class_counts, late):
    """Doubled in the second stage."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(late, 2 * losses, losses)


METHOD = methods.Method(cross_entropy, methods.WAYS[""](), normalized=False)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def make_task(config, digits, **options):
    return training.Task(comparison.on_device(config, *digits), 10, 2, 10, METHOD, **options)


def fit(tmp_path, digits, runs, features=False, **options):
    """What the trainer makes of runs on 200 digits, evaluated on 100."""
    tmp_path.mkdir(exist_ok=True)
    config = dataclasses.replace(CONFIG, out=tmp_path, **options)
    with tqdm(disable=True) as bar:
        task = make_task(config, digits, features=features)
        return training.train(config, "fit", task, runs, bar=bar, started="now")


def make_run(digits, seed=0, learning_rate=0.1, temperatures=(np.inf,), starts=(0,), ess=None):
    train, test = digits
    labels, tested = train.labels[:EXAMPLES], test.labels[:100]
    return training.Run(
        np.int32(seed),
        np.float32(learning_rate),
        np.float32(CONFIG.gamma),
        np.float32(temperatures),
        np.int32(starts),
        None if ess is None else np.float32(ess),
        training.Examples(np.arange(EXAMPLES, dtype=np.int32), labels, labels % 2),
        training.Examples(np.arange(100, dtype=np.int32) + len(train.labels), tested, tested),
        np.bincount(labels, minlength=10),
        training.Examples(*(np.arange(20, dtype=np.int32),) * 3),
    )


def loop(digits, run, damping=None, clip=np.inf):
    """The losses of the training examples after the same run in a plain loop."""
    images, labels = digits[0].images[:EXAMPLES].reshape(-1, 64), run.train.label
    images = np.float32((images - digits[0].images.mean()) / digits[0].images.std())
    model = models.make_model("linear", (8, 8, 1), 10, rngs=nnx.Rngs(jax.random.key(run.seed)))
    params = model.head.kernel[...], model.head.bias[...]
    steps = EXAMPLES // CONFIG.batch_size
    temperature = 1.0  # set before every epoch
    if run.ess is not None:
        tuned = target_ess(run.ess, init_value=run.temperatures[-1])
        temperature = two_stage(tuned, run.starts[-1] * steps)
    tx = optax.chain(
        scale_by_attention(temperature, gamma=CONFIG.gamma, damping=damping),
        optax.clip_by_global_norm(clip),
        optax.add_decayed_weights(CONFIG.weight_decay),
        optax.sgd(run.learning_rate, CONFIG.momentum),
    )

    def losses(params, index):
        logits = jnp.asarray(images)[index] @ params[0] + params[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)[index])

    @jax.jit
    def step(params, opt_state, index, factor):
        def loss_fn(params, sums):
            return tilt(factor * losses(params, index), opt_state, sums).mean()

        grads, sums = jax.grad(loss_fn, argnums=(0, 1))(params, Sums())
        updates, opt_state = tx.update(grads, opt_state, params, sums=sums)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for epoch in range(CONFIG.epochs):
        key = jax.random.fold_in(jax.random.key(run.seed), epoch)
        order = jax.random.permutation(jax.random.split(key)[0], EXAMPLES)
        factor = 2.0 if epoch >= round(CONFIG.second_stage * CONFIG.epochs) else 1.0
        if run.ess is None:
            lam = np.float32([np.inf, *run.temperatures])[np.sum(epoch >= run.starts)]
            opt_state = optax.tree.set(opt_state, temperature=lam)
        for i in range(steps):
            index = order[i * CONFIG.batch_size : (i + 1) * CONFIG.batch_size]
            params, opt_state = step(params, opt_state, index, factor)
    return factor * losses(params, jnp.arange(EXAMPLES))


@pytest.mark.parametrize(
    ("settings", "guards"),
    [
        # An infinite λ from the start changes nothing: all runs have as many stages.
        (
            [
                {"temperatures": (np.inf, np.inf), "starts": (0, 0), "learning_rate": 0.1},
                {"temperatures": (8.0, 3.0), "starts": (1, 2), "learning_rate": 0.02},
                {"temperatures": (np.inf, -4.0), "starts": (0, 1)},
            ],
            {},
        ),
        ([{"ess": 0.6}, {"ess": 0.8, "temperatures": (-np.inf,), "starts": (1,)}], {}),
        ([{"temperatures": (3.0,)}], {"damping": 2.0, "clip": 0.5}),
    ],
    ids=["fixed", "automatic", "guarded"],
)
def test_trains_as_a_plain_loop(tmp_path, digits, settings, guards):
    """Stages, the loss of the second one, and guards, in runs side by side."""
    runs = [make_run(digits, i, **{"learning_rate": 0.05} | s) for i, s in enumerate(settings)]
    trained = fit(tmp_path, digits, runs, **guards)
    expected = [loop(digits, run, **guards) for run in runs]
    np.testing.assert_allclose(trained.losses, expected, rtol=1e-3, atol=1e-4)
    assert np.all(trained.history["mean_loss"][0] > 1.2 * trained.history["mean_loss"][1])
    np.testing.assert_allclose(trained.history["mass"].sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.slow
def test_in_parts(tmp_path, digits):
    runs = [make_run(digits, seed, 0.05, temperatures=(5.0,)) for seed in range(3)]
    at_once = fit(tmp_path / "a", digits, runs)
    in_parts = fit(tmp_path / "b", digits, runs, at_once=2)
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(in_parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_schedule():
    steps = np.array([0, 5, 10, 49, 50, 89, 90, 99])
    warm_up = np.minimum(steps / 10, 1)
    expected = {
        "step": 0.1 ** np.array([0, 0, 0, 0, 1, 1, 2, 2]),
        "cosine": (1 + np.cos(np.pi * (np.maximum(steps, 10) - 10) / 90)) / 2,
        "constant": 1,
    }
    for schedule, rates in expected.items():
        options = {"schedule": schedule, "warm_up": 0.1, "milestones": (0.5, 0.9), "decay": 0.1}
        rate = training.schedule(dataclasses.replace(CONFIG, **options), 100)
        np.testing.assert_allclose([rate(step) for step in steps], warm_up * rates, atol=1e-6)
    to_the_end = dataclasses.replace(CONFIG, schedule="cosine", warm_up=0.999)
    np.testing.assert_allclose([training.schedule(to_the_end, 10)(i) for i in (0, 9)], [0, 0.9])


def test_augment():
    """Every image is a shift of the original by at most 4 pixels, mirrored or not."""
    image = np.random.default_rng(0).uniform(1, 2, (12, 12, 2)).astype(np.float32)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    possible = {}
    for i, j in np.ndindex(9, 9):
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
    model, coarse = make(), make(dtype=jnp.bfloat16)
    params, logits = jax.tree.leaves(nnx.state(model, nnx.Param)), model(images)
    assert (logits.shape, logits.dtype) == ((4, 10), "float32")
    sizes = {"linear": 30_730, "mlp": 820_874, "cnn": 545_098, "resnet8": 75_290}
    assert sum(x.size for x in params) == (sizes | {"resnet32": 464_154})[name]

    params = jax.tree.leaves(nnx.state(coarse, nnx.Param))
    assert {x.dtype for x in (*params, coarse(images))} == {jnp.dtype("float32")}
    error = jnp.abs(coarse(images) - logits).max() / jnp.abs(logits).max()
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


@pytest.mark.slow
def test_fine_tuning(tmp_path, digits):
    """From the second stage on, the lower blocks are as they were; before, nothing is frozen."""
    options = {"model": "mlp", "hidden": (8, 8), "fine_tune_from": 1}
    config = dataclasses.replace(CONFIG, **options)
    task = make_task(config, digits)
    stacked = make_run(digits, 0, temperatures=(5.0,), starts=(2,))
    run = jax.tree.map(jnp.asarray, stacked)
    first, second = (training.make_program(config, task, EXAMPLES, frozen=k) for k in (0, 1))
    state = first.init(run)
    states = [state]
    for epoch in range(3):
        if epoch == 2:
            state = state._replace(opt_state=second.init(run).opt_state)
        program = second if epoch == 2 else first
        of_program = functools.partial(training.run_epoch, program)
        state, _ = jax.jit(of_program)(state, run, task.images, epoch)
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
    trained = fit(tmp_path, digits, [stacked], **options)
    losses = jax.jit(second.outcome)(state, run, task.images)["losses"]
    np.testing.assert_allclose(trained.losses[0], losses, rtol=1e-3, atol=1e-5)
    # Its optimiser is a new one, but λ goes by the epochs of them all.
    np.testing.assert_array_equal(trained.history["temperature"][:, 0], [np.inf, np.inf, 5])


def test_fine_tuning_from_the_start(tmp_path, digits):
    options = {"model": "mlp", "fine_tune_from": 1, "second_stage": 0.0, "epochs": 1}
    trained = fit(tmp_path, digits, [make_run(digits)], **options)
    assert np.all(np.isfinite(trained.losses))


def test_features(tmp_path, digits):
    """With the head they make the predictions of the evaluation split, also in several parts."""
    runs = [make_run(digits, seed) for seed in range(2)]
    trained = fit(tmp_path, digits, runs, features=True, model="mlp", epochs=1, at_once=1)
    assert trained.features.shape == (2, 100, 9)
    guess = (trained.features @ trained.head).argmax(axis=-1)
    labels = runs[0].evaluation.label
    accuracy = [(guess[:, labels == k] == k).mean(axis=1) for k in range(10)]
    np.testing.assert_allclose(trained.history["accuracy"][-1].T, accuracy, rtol=1e-6)
    assert len(training.pick(trained, slice(1)).features) == 1


@pytest.mark.slow
def test_frozen_blocks_keep_their_statistics(digits):
    """In a step of a ResNet, augmented."""
    config = dataclasses.replace(CONFIG, model="resnet32", augment=True, batch_size=2)
    task = make_task(config, digits)
    assert task.images.pixels.shape[1:] == (32, 32, 1)
    program = training.make_program(config, task, 2, frozen=2)
    run = jax.tree.map(jnp.asarray, make_run(digits))
    before = program.init(run)
    batch = jnp.arange(2), jax.random.key(0)
    after, _ = jax.jit(program.step)(before, run, task.images, batch)
    for i in range(4):
        pairs = zip(*(jax.tree.leaves(s.other["blocks"][i]) for s in (before, after)), strict=True)
        assert {bool(jnp.any(a != b)) for a, b in pairs} == {i >= 2}


def test_convolutions_train_a_step_a_call(digits, monkeypatch):
    """On CPUs, and there alone; to the same end as in a loop."""
    slow = [name for name in models.NAMES if models.is_slow_in_a_loop(name)]
    assert slow == ["cnn", "resnet8", "resnet32"]
    monkeypatch.setattr(models, "CONVOLUTIONAL", ("linear",))  # which is quick to compile
    task, runs = make_task(CONFIG, digits), jax.tree.map(lambda x: x[None], make_run(digits))
    program, results = training.make_program(CONFIG, task, EXAMPLES), []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        compiled = training.compile_program(CONFIG, program)
        assert hasattr(compiled.epoch, "lower") == (backend == "gpu")  # as one jitted function
        results.append(compiled.epoch(compiled.init(runs), runs, task.images, 0))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
