"""What a step of ABSGD costs by the compiler's count; what it is compared with is sound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from absgd_jax import Sums
from benchmarks import speed
from benchmarks.engine import meta, models, steps
from benchmarks.engine.steps import Batch, FORMS, State, Work
from tests.support import commands

QUICKLY = {"xla_backend_optimization_level": 0}  # which the compiler's figures don't depend on


@functools.cache
def prepare(model, name):
    """On two devices the compiled step, its figures, and what to call it with, once."""
    step, *inputs = speed.prepare(steps.make_work(model, 256), name, devices=2)
    compiled = step.lower(*inputs).compile(QUICKLY)
    return compiled, speed.figures(compiled, *inputs), inputs


@pytest.mark.usefixtures("users_promotion")
class TestSteps:
    @pytest.mark.parametrize(
        ("model", "form", "flops", "bytes_accessed"),
        [
            # A product for each parameter, beside the two products for each example.
            *(("mlp", form, 1.002, 1.003) for form in FORMS if form != "multi_steps"),
            ("mlp", "multi_steps", 1.01, 1.01),  # MultiSteps multiplies, too; the oldest, less
            pytest.param("resnet32", "absgd", 1.0001, 1.0001, marks=pytest.mark.slow),
        ],
    )
    def test_cost(self, model, form, flops, bytes_accessed):
        _, sgd, _ = prepare(model, FORMS[form])
        _, absgd, _ = prepare(model, form)
        assert absgd["flops"] <= flops * sgd["flops"]
        assert absgd["bytes_accessed"] <= bytes_accessed * sgd["bytes_accessed"]
        # Beside the parameters the sums are accumulated, and have a momentum.
        more = 2 * Sums().values.size if form == "multi_steps" else 0
        assert absgd["state"] - sgd["state"] == 4 * (4 + more)

    def test_forms_train_alike(self):
        start = jax.tree.leaves(steps.make_work("mlp", 1).params)

        @functools.cache
        def train(form):
            step, _, (state, batch) = prepare("mlp", form)
            state = jax.tree.map(jnp.copy, state)
            for _ in range(2 * (steps.EVERY_K if "multi_steps" in form else 1)):
                state = step(state, batch)
            leaves = jax.tree.leaves(state.params["net"] if form == "multi_steps" else state.params)
            return np.concatenate([np.ravel(p - q) for p, q in zip(leaves, start, strict=True)])

        for form, others in (
            ("sgd", ("sgd_shard_map", "sgd_multi_steps")),
            ("absgd", ("shard_map", "multi_steps")),
            ("automatic", ("shard_map_automatic",)),
            ("sgd_masked", ()),
            ("masked", ()),
        ):
            for other in others:
                np.testing.assert_allclose(train(other), train(form), rtol=1e-3, atol=1e-7)
            if form != "sgd":
                largest = np.abs(train("sgd")).max()
                assert 1e-3 * largest < np.abs(train(form) - train("sgd")).max() < largest

    def test_transformer(self):
        """It looks back, and not ahead."""
        work = steps.make_work("transformer", 2)
        find = jax.jit(work.losses)
        losses, _ = find(work.params, work.other, work.examples)
        assert losses.shape == (2, steps.LENGTH)
        changed = work.examples.inputs.copy()
        changed[:, 40] ^= 1
        after, _ = find(work.params, work.other, work.examples._replace(inputs=changed))
        difference = np.abs(after - losses)
        assert np.all(difference[:, :40] == 0)
        assert np.all(difference[:, 40:] > 0)


@pytest.mark.usefixtures("users_promotion")
class TestMeta:
    """Least squares, where all is known."""

    params = np.array([0.5, -1.0, 2.0])
    train, clean = (
        Batch(rng.normal(size=(n, 3)), rng.normal(size=n), None)
        for n, rng in ((8, np.random.default_rng(0)), (5, np.random.default_rng(1)))
    )

    @staticmethod
    def losses(params, batch):
        return (batch.inputs @ params - batch.labels) ** 2

    def run(self, algorithm, theta, clean=clean):
        """The weights, and the new Θ."""

        @jax.jit
        def run(params, theta):
            weights, theta = algorithm(
                lambda params: self.losses(params, self.train),
                lambda params: self.losses(params, clean).mean(),
                params,
                theta,
            )
            return weights(self.losses(params, self.train)), theta

        return run(self.params, theta)

    def test_l2rw(self, x64):
        """Backwards through the step as in forward mode, which test_methods has in NumPy."""
        (weights, _), (expected, _) = (self.run(f, None) for f in (meta.l2rw, meta.l2rw_forward))
        assert 0 < np.sum(expected > 0) < 8
        np.testing.assert_allclose(weights, expected, rtol=1e-10)

    @pytest.mark.parametrize("algorithm", [meta.l2rw, meta.l2rw_forward])
    def test_nothing_helps(self, x64, algorithm):
        """At the minimum of the clean loss all weights are 0, and not NaN."""
        clean = self.clean._replace(labels=self.clean.inputs @ self.params)
        weights, _ = self.run(algorithm, None, clean)
        np.testing.assert_array_equal(weights, np.zeros(8))

    @pytest.mark.parametrize("name", meta.ALGORITHMS)
    def test_step(self, x64, name):
        """SGD on the losses in their weights."""
        work = Work(lambda p, other, batch: (self.losses(p, batch), other), self.params, None, None)
        step, state, *_ = meta.make_step(work, name)
        theta = state.opt_state[0]
        weights, new = self.run(meta.ALGORITHMS[name], theta)
        after = jax.jit(step)(state, self.train, self.clean)
        x, y, _ = self.train
        residual = x @ self.params - y
        grads = 2 * (weights * residual) @ x
        np.testing.assert_allclose(after.params, self.params - steps.RATE * grads, rtol=1e-10)
        assert isinstance(after, State)
        jax.tree.map(np.testing.assert_array_equal, after.opt_state[0], new)


@pytest.mark.usefixtures("users_promotion")
@pytest.mark.parametrize(
    ("name", "least"), [("l2rw", 3), ("l2rw_forward", 2.5), ("meta_weight_net", 3)]
)
def test_cost_of_learnt_weights(name, least):
    (_, learnt, _), (_, absgd, _) = prepare("mlp", name), prepare("mlp", "absgd")
    assert least < learnt["flops"] / absgd["flops"] < least + 0.5


def test_parameters_for_torch():
    """PyTorch has outputs first, images with channels first, and other names."""
    make = functools.partial(models.make_model, "resnet32", (32, 32, 3), 10)
    network = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    params = nnx.state(network, nnx.Param)
    params = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape), params)
    arrays = speed.torch_parameters(params)
    assert len(arrays) == 1 + 2 + 15 * 2 * 3 + 2
    assert arrays["blocks.0.0.conv.weight"].shape == (16, 3, 3, 3)
    assert arrays["blocks.2.4.second.norm.bias"].shape == (32,)
    assert arrays["head.weight"].shape == (10, 64)
    kernel = params["blocks"][2]["layers"][0]["first"]["conv"]["kernel"][...]
    assert arrays["blocks.2.0.first.conv.weight"][5, 3, 2, 1] == kernel[2, 1, 3, 5]


def test_jobs():
    found = speed.make_jobs(speed.Config(forms=("masked", "automatic", "absgd")))
    jobs = [(part, *args) for part, _, *args in found]
    assert jobs[:2] == [
        ("sgd", "mlp", ["sgd", "absgd", "automatic"]),
        ("sgd", "mlp", ["sgd_masked", "masked"]),
    ]
    # One loss an image: there is no network of tokens in the authors' package.
    images = ("mlp", "cnn", "resnet32")
    assert [job for job in jobs if job[0] == "torch"] == [("torch", model) for model in images]
    learnt = ["absgd", "l2rw", "l2rw_forward", "meta_weight_net"]
    assert ("meta", "transformer", learnt) in jobs
    assert jobs[-2:] == [("growth", "parameters", 10**7), ("growth", "parameters", 10**8)]


@pytest.fixture
def torch(tmp_path):
    """An interpreter that answers as one with PyTorch does, but can't compile."""
    path = tmp_path / "python"
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in *true*) echo "No module named torch" >&2; exit 1;; esac\n'
        """echo '{"torch": "2", "device": "cpu", "loss": 2.5}'\n"""
        "while read line; do echo 123.0; done\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.usefixtures("users_promotion")
@pytest.mark.slow
def test_speed(tmp_path, start, torch):
    options = "--parts sgd torch growth --forms absgd --models mlp --losses 1024 --parameters 10000"
    options += " --repeats 2 --seconds 1e-3 --compilations 1 --batch-size 8"
    cached = jax.config.jax_enable_compilation_cache
    results, table, printed = start(speed, f"{options} --torch-python {torch}", tmp_path / "out")
    jax.config.update("jax_enable_compilation_cache", cached)
    assert printed.strip() in table
    assert f"jax {jax.__version__}" in table
    assert "n = 2 times" in table
    rows = {tuple(row[:2]): row[2:] for row in commands.rows(table)}
    ours = "absgd_jax, an epoch a call"
    assert list(results) == [
        *(f"sgd, mlp, {form}" for form in ("sgd", "absgd")),
        *(f"torch, mlp, {name}" for name in (ours, "absgd, eager", "absgd, compiled")),
        *(f"growth, 1,024 losses, {x}" for x in ("copy", "softmax", "value_and_grad")),
        *(f"growth, 10,000 parameters, {name}" for name in ("traffic", "sgd", "absgd")),
    ]
    sgd, absgd = (results[f"sgd, mlp, {form}"] for form in ("sgd", "absgd"))
    assert rows["mlp", "absgd"][:5] == [
        *("sgd", *(f"{absgd[k] / sgd[k]:.6f}" for k in ("flops", "bytes_accessed"))),
        f"{absgd['memory'] - sgd['memory']:+,}",
        "+16",
    ]
    here, eager, compiled = (
        results[f"torch, mlp, {x}"] for x in (ours, "absgd, eager", "absgd, compiled")
    )
    assert eager["seconds"] == [123, 123]
    assert eager["images"] == here["images"]
    beside, images, time, loss, _ = rows["mlp", "absgd, eager"]
    assert (beside, images, loss) == (ours, f"{eager['images'] / 123:,.0f}", "2.50000")
    expected = np.median(np.divide(123, here["seconds"]))  # whose digits are cut in the file
    np.testing.assert_allclose(float(time.split()[0]), expected, rtol=1e-4)
    assert "seconds" not in compiled
    assert rows["mlp", "absgd, compiled"][-1] == "No module named torch"
    assert all(len(r["compilation"]) == 1 for r in (sgd, absgd))
    times = [r["seconds"] for r in results.values() if "seconds" in r]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times)
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"sgd", "torch"}
