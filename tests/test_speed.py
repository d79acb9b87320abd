"""What a step of ABSGD costs by the compiler's count; what it is compared with is sound."""

import commands
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from benchmarks import meta, speed, steps
from benchmarks.steps import Batch, FORMS, State, Work


@pytest.mark.usefixtures("users_promotion")
class TestSteps:
    @pytest.mark.parametrize(
        ("model", "form", "flops", "bytes_accessed"),
        [
            ("mlp", "absgd", 1.002, 1.002),
            ("mlp", "attention", 1.0001, 1.002),
            ("mlp", "automatic", 1.002, 1.002),
            ("mlp", "masked", 1.002, 1.002),
            ("mlp", "axis_name", 1.002, 1.002),
            # Gradients whole before they are scaled, lest the backward pass waits for a collective.
            ("mlp", "pmerge", 1.006, 1.2),
            # It scales micro-batches as it adds them, and their sum once more.
            ("mlp", "accumulate", 1.015, 1.002),
            ("resnet32", "absgd", 1.0001, 1.0001),
        ],
    )
    def test_cost(self, model, form, flops, bytes_accessed):
        work, sizes, found = steps.make_work(model, 128), [], []
        for name in (FORMS[form], form):
            step, state, batch = speed.prepare(work, name)
            found.append(speed.figures(step.lower(state, batch).compile()))
            sizes.append(sum(x.nbytes for x in jax.tree.leaves(state.opt_state)))
        sgd, absgd = found
        assert absgd["flops"] <= flops * sgd["flops"]
        assert absgd["bytes_accessed"] <= bytes_accessed * sgd["bytes_accessed"]
        # Micro-batches bring the number of their examples, their loss and its divergence.
        assert sizes[1] - sizes[0] == 4 * (7 if form == "accumulate" else 3)

    def test_forms_train_alike(self):
        work = steps.make_work("mlp", 16)

        def train(form, calls):
            step, state, batch = speed.prepare(work, form)
            for _ in range(calls):
                state = step(state, batch)
            leaves = jax.tree.leaves(state.params)
            return np.concatenate([np.ravel(p - q) for p, q in zip(leaves, start, strict=True)])

        start = jax.tree.leaves(work.params)
        for form, calls, others in (
            ("sgd", 2, {"sgd_pmean": 2, "sgd_multi_steps": 2 * steps.EVERY_K}),
            ("absgd", 2, {"attention": 2, "axis_name": 2, "pmerge": 2, "accumulate": 8}),
        ):
            expected = train(form, calls)
            for other, as_many in others.items():
                np.testing.assert_allclose(train(other, as_many), expected, rtol=1e-3, atol=1e-7)
        largest = np.abs(expected).max()
        for form in ("sgd", "automatic", "masked"):
            assert 1e-3 * largest < np.abs(train(form, 2) - expected).max() < largest

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
def test_cost_of_learnt_weights():
    work = steps.make_work("mlp", 128)
    step, *inputs = speed.prepare(work, "absgd")
    absgd = speed.figures(step.lower(*inputs).compile())
    for name, least in (("l2rw", 3), ("l2rw_forward", 2.5), ("meta_weight_net", 3)):
        step, *inputs = speed.prepare_meta(work, name)
        learnt = speed.figures(step.lower(*inputs).compile())
        assert least < learnt["flops"] / absgd["flops"] < least + 0.5


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


def run(out, *options, path=""):
    small = "--repeats 2 --seconds 1e-3 --compilations 1 --batch-size 8"
    options = *small.split(), *options, "--out", out
    done = commands.run("benchmarks.speed", *options, PYTHONPATH=str(path), JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr_text
    table = (out / "table.md").read_text()
    assert table in done.stdout_text
    assert "python -m benchmarks.speed" in table.splitlines()[0]
    assert f"jax {jax.__version__}" in table
    assert "n = 2 times" in table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return commands.load(out), [row for row in rows if row]


def test_speed(tmp_path):
    """Where PyTorch is not, the table says so."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch')")
    forms = "--forms absgd --models mlp --losses 1024 --parameters 1e4 --devices 2"
    results, rows = run(tmp_path / "out", *forms.split(), path=tmp_path)
    growing = ("1,024 losses", "10,000 parameters", "2 devices")
    assert list(results) == [
        *(f"sgd, mlp, {form}" for form in ("sgd", "absgd")),
        "torch, mlp, absgd_jax, an epoch a call",
        *(f"torch, mlp, absgd, {name}" for name in ("eager", "compiled")),
        *(f"meta, mlp, {name}" for name in ("absgd", *meta.ALGORITHMS)),
        *(f"growth, {growing[0]}, {name}" for name in ("copy", "softmax", "weights")),
        *(f"growth, {growing[1]}, {name}" for name in ("traffic", "sgd", "absgd")),
        *(f"growth, {growing[2]}, {name}" for name in speed.ON_DEVICES),
    ]
    (row,) = (row for row in rows if row[:3] == ["mlp", "absgd", "sgd"])
    sgd, absgd = (results[f"sgd, mlp, {form}"] for form in ("sgd", "absgd"))
    assert row[3:5] == [f"{absgd[k] / sgd[k]:.6f}" for k in ("flops", "bytes_accessed")]
    assert row[6] == "+12"
    for name in ("eager", "compiled"):
        assert "seconds" not in results[f"torch, mlp, absgd, {name}"]
        (row,) = (row for row in rows if row[1] == f"absgd, {name}")
        assert "No module named torch" in row[-1]
    assert all(
        len(r["seconds"]) == 2 and min(r["seconds"]) > 0 for r in results.values() if "seconds" in r
    )
    assert sum(row[:2] == ["on a GPU", "none here"] for row in rows) == 4
    for name in ("sgd", "meta", "growth"):
        assert matplotlib.image.imread(tmp_path / "out" / f"{name}.png").std() > 0.05
    assert commands.load(tmp_path / "out", "config")["machine"]["devices"] == ["cpu"]


def test_beside_torch(tmp_path):
    """An interpreter that answers as one with PyTorch does."""
    file = tmp_path / "python"
    answer = '{"torch": "2", "device": "cpu", "loss": 2.5}'
    file.write_text(f"#!/bin/sh\necho '{answer}'\nwhile read line; do echo 123.0; done\n")
    file.chmod(0o755)
    options = "--parts torch --models mlp transformer --torch-python"
    results, rows = run(tmp_path / "out", *options.split(), str(file))
    ours, *theirs = results.values()
    assert [r["step"] for r in theirs] == ["absgd, eager", "absgd, compiled"]
    for r in theirs:
        assert r["seconds"] == [123, 123]
        assert r["images"] == ours["images"]
        (row,) = (row for row in rows if row[1] == r["step"])
        assert row[2:4] == [ours["step"], f"{r['images'] / 123:,.0f}"]
        expected = np.median(np.divide(123, ours["seconds"]))  # whose digits are cut in the file
        np.testing.assert_allclose(float(row[4].split()[0]), expected, rtol=1e-4)
    # One loss an image: there is no network of tokens in the authors' package.
    assert not any("transformer" in name for name in results)
    assert matplotlib.image.imread(tmp_path / "out" / "torch.png").std() > 0.05
