"""What a step of ABSGD costs by the compiler's count; what it is compared with is sound."""

import argparse
import functools

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from benchmarks import meta, speed, steps
from benchmarks.steps import Batch, FORMS, State, Work
from tests.support import commands


@functools.cache
def figures(model, form):
    """The compiler's, and the bytes of the optimiser's state."""
    step, state, batch = speed.prepare(steps.make_work(model, 128), form)
    size = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
    return speed.figures(step.lower(state, batch).compile()) | {"state": size}


@pytest.mark.usefixtures("users_promotion")
class TestSteps:
    @pytest.mark.parametrize(
        ("model", "form", "flops", "bytes_accessed"),
        [
            # A product for each parameter, beside the two products for each example.
            *(("mlp", form, 1.002, 1.002) for form in FORMS if form != "accumulate"),
            ("mlp", "accumulate", 1.01, 1.01),  # MultiSteps multiplies, too; the oldest, less
            ("resnet32", "absgd", 1.0001, 1.0001),
        ],
    )
    def test_cost(self, model, form, flops, bytes_accessed):
        sgd, absgd = figures(model, FORMS[form]), figures(model, form)
        assert absgd["flops"] <= flops * sgd["flops"]
        assert absgd["bytes_accessed"] <= bytes_accessed * sgd["bytes_accessed"]
        # Micro-batches bring their value and what their losses sum up to; see AccumulateState.
        more = 4 * 6 if form == "accumulate" else 0
        assert absgd["state"] - sgd["state"] == 4 * 5 + more

    def test_forms_train_alike(self):
        work = steps.make_work("mlp", 16)
        start = jax.tree.leaves(work.params)

        @functools.cache
        def train(form):
            step, state, batch = speed.prepare(work, form, devices=2)
            for _ in range(2 * (steps.EVERY_K if form in ("sgd_multi_steps", "accumulate") else 1)):
                state = step(state, batch)
            leaves = jax.tree.leaves(state.params)
            return np.concatenate([np.ravel(p - q) for p, q in zip(leaves, start, strict=True)])

        for form, others in (
            ("sgd", ("sgd_shard_map", "sgd_multi_steps")),
            ("absgd", ("shard_map", "accumulate")),
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

    def clean_loss_ahead(self, weights):
        """By NumPy: after a step of SGD on the weighted losses."""
        x, y, _ = self.train
        grads = 2 * (weights * (x @ self.params - y)) @ x
        return np.mean(self.losses(self.params - steps.RATE * grads, self.clean))

    @pytest.mark.parametrize("algorithm", [meta.l2rw, meta.l2rw_forward])
    def test_l2rw(self, x64, algorithm):
        slopes = np.array(
            [
                self.clean_loss_ahead(eps) - self.clean_loss_ahead(-eps)
                for eps in 1e-3 * np.identity(8)
            ]
        )
        expected = np.maximum(-slopes, 0)
        assert 0 < np.sum(expected > 0) < 8
        weights, theta = algorithm(self.losses, self.params, None, self.train, self.clean)
        assert theta is None
        np.testing.assert_allclose(weights(None), expected / expected.sum(), rtol=1e-6)

    @pytest.mark.parametrize("algorithm", [meta.l2rw, meta.l2rw_forward])
    def test_nothing_helps(self, x64, algorithm):
        """At the minimum of the clean loss all weights are 0, and not NaN."""
        clean = self.clean._replace(labels=self.clean.inputs @ self.params)
        weights, _ = algorithm(self.losses, self.params, None, self.train, clean)
        np.testing.assert_array_equal(weights(None), np.zeros(8))

    def test_meta_weight_net(self, x64):
        theta = meta.init_weight_net(jax.random.key(0))
        losses = self.losses(self.params, self.train)

        def clean_loss(theta):
            hidden = np.maximum(losses[:, None] * theta["w1"] + theta["b1"], 0)
            weights = 1 / (1 + np.exp(-(hidden @ theta["w2"] + theta["b2"])[:, 0]))
            return self.clean_loss_ahead(weights / 8), weights / 8

        weights, new = meta.meta_weight_net(self.losses, self.params, theta, self.train, self.clean)
        for name, index in (("w1", (0, 3)), ("b1", 5), ("w2", (7, 0)), ("b2", 0)):
            ends = []
            for sign in (1, -1):
                moved = dict(theta)
                moved[name] = moved[name].at[index].add(sign * 1e-3)
                ends.append(clean_loss(moved)[0])
            slope = (ends[0] - ends[1]) / 2e-3
            step = (new[name] - theta[name])[index]
            np.testing.assert_allclose(step, -meta.META_RATE * slope, rtol=1e-5, atol=1e-14)
        np.testing.assert_allclose(weights(jnp.asarray(losses)), clean_loss(new)[1], rtol=1e-10)

    @pytest.mark.parametrize("name", meta.ALGORITHMS)
    def test_step(self, x64, name):
        """SGD on the losses in their weights."""
        work = Work(lambda p, other, batch: (self.losses(p, batch), other), self.params, None, None)
        state, step = meta.make_step(work, name)
        theta = state.opt_state[0]
        weights, new = meta.ALGORITHMS[name](
            self.losses, self.params, theta, self.train, self.clean
        )
        after = step(state, self.train, self.clean)
        x, y, _ = self.train
        residual = x @ self.params - y
        grads = 2 * (weights(jnp.asarray(residual**2)) * residual) @ x
        np.testing.assert_allclose(after.params, self.params - steps.RATE * grads, rtol=1e-10)
        assert isinstance(after, State)
        jax.tree.map(np.testing.assert_array_equal, after.opt_state[0], new)


@pytest.mark.usefixtures("users_promotion")
@pytest.mark.parametrize(
    ("name", "least"), [("l2rw", 3), ("l2rw_forward", 2.5), ("meta_weight_net", 3)]
)
def test_cost_of_learnt_weights(name, least):
    step, *inputs = speed.prepare_meta(steps.make_work("mlp", 128), name)
    learnt = speed.figures(step.lower(*inputs).compile())
    assert least < learnt["flops"] / figures("mlp", "absgd")["flops"] < least + 0.5


def test_parameters_for_torch():
    """PyTorch has outputs first, images with channels first, and other names."""
    work = steps.make_work("resnet32", 1)
    arrays = speed.torch_parameters(work.params)
    assert len(arrays) == 1 + 2 + 15 * 2 * 3 + 2
    assert arrays["blocks.0.0.conv.weight"].shape == (16, 3, 3, 3)
    assert arrays["blocks.2.4.second.norm.bias"].shape == (32,)
    assert arrays["head.weight"].shape == (10, 64)
    kernel = work.params["blocks"][2]["layers"][0]["first"]["conv"]["kernel"][...]
    np.testing.assert_array_equal(
        arrays["blocks.2.0.first.conv.weight"][5, 3, 2, 1], kernel[2, 1, 3, 5]
    )


def test_no_tokens_beside_torch():
    """One loss an image: there is no network of tokens in the authors' package."""
    args = argparse.Namespace(
        parts=["torch"], models=list(steps.MODELS), losses=[1], parameters=[1], devices=[1]
    )
    assert [size for _, _, size in speed.make_jobs(args)] == ["mlp", "cnn", "resnet32"]


def test_speed(tmp_path):
    """Beside an interpreter that answers as one with PyTorch does, but can't compile."""
    torch, out = tmp_path / "python", tmp_path / "out"
    torch.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--compile*) echo "No module named torch" >&2; exit 1;; esac\n'
        """echo '{"torch": "2", "device": "cpu", "loss": 2.5}'\n"""
        "while read line; do echo 123.0; done\n"
    )
    torch.chmod(0o755)
    options = "--forms absgd --models mlp --losses 1024 --parameters 1e4 --devices 2 --repeats 2"
    options += " --seconds 1e-3 --compilations 1 --batch-size 8"
    done = commands.run(
        *("benchmarks.speed", *options.split(), "--torch-python", torch, "--out", out),
        JAX_PLATFORMS="cpu",
    )
    assert done.returncode == 0, done.stderr_text
    table = (out / "table.md").read_text()
    assert table in done.stdout_text
    assert "python -m benchmarks.speed" in table.splitlines()[0]
    assert f"jax {jax.__version__}" in table
    assert "n = 2 times" in table
    assert commands.load(out, "config")["machine"]["devices"] == ["cpu"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    row = {(r[0], r[1]): r[2:] for r in rows if r}

    results = commands.load(out)
    ours = "absgd_jax, an epoch a call"
    growing = ("1,024 losses", "10,000 parameters", "2 devices")
    assert list(results) == [
        *(f"sgd, mlp, {form}" for form in ("sgd", "absgd")),
        *(f"torch, mlp, {name}" for name in (ours, "absgd, eager", "absgd, compiled")),
        *(f"meta, mlp, {name}" for name in ("absgd", *meta.ALGORITHMS)),
        *(f"growth, {growing[0]}, {x}" for x in ("copy", "softmax", "tilt", "value_and_grad")),
        *(f"growth, {growing[1]}, {name}" for name in ("traffic", "sgd", "absgd")),
        *(f"growth, {growing[2]}, {name}" for name in speed.ON_DEVICES),
    ]
    sgd, absgd = (results[f"sgd, mlp, {form}"] for form in ("sgd", "absgd"))
    assert next(r for r in rows if r[:3] == ["mlp", "absgd", "sgd"])[3:7] == [
        *(f"{absgd[k] / sgd[k]:.6f}" for k in ("flops", "bytes_accessed")),
        f"{absgd['memory'] - sgd['memory']:+,}",
        "+20",
    ]
    here, eager, compiled = (
        results[f"torch, mlp, {x}"] for x in (ours, "absgd, eager", "absgd, compiled")
    )
    assert eager["seconds"] == [123, 123]
    assert eager["images"] == here["images"]
    beside, images, time, loss, _ = row["mlp", "absgd, eager"]
    assert (beside, images, loss) == (ours, f"{eager['images'] / 123:,.0f}", "2.50000")
    expected = np.median(np.divide(123, here["seconds"]))  # whose digits are cut in the file
    np.testing.assert_allclose(float(time.split()[0]), expected, rtol=1e-4)
    assert "seconds" not in compiled
    assert row["mlp", "absgd, compiled"][-1] == "No module named torch"
    assert all(
        len(r["seconds"]) == 2 and min(r["seconds"]) > 0 for r in results.values() if "seconds" in r
    )
    for name in speed.PARTS:
        assert matplotlib.image.imread(out / f"{name}.png").std() > 0.05
