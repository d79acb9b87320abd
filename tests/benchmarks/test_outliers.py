"""The losses are those of the literature, and the errors those that the benchmark names."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from absgd_jax import robust_loss
from benchmarks import outliers
from benchmarks.engine import layers
from tests.support.commands import mean_std, rows

pytestmark = pytest.mark.usefixtures("users_promotion")

R = np.float32([-7.0, -1.5, -0.2, 0.0, 0.3, 2.0, 40.0])
CONFIG = outliers.Config(examples=400, epochs=1, batch_size=100)


def z(c):
    return (R / c) ** 2


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("least squares", 1, lambda c: R**2),
        ("MAE", 1, lambda c: np.abs(R)),
        ("Huber", 1, lambda c: np.where(np.abs(R) < c, R**2 / 2, c * (np.abs(R) - c / 2))),
        ("Tukey", 1, lambda c: c**2 / 6 * np.where(z(c) < 1, 1 - (1 - z(c)) ** 3, 1)),
        ("Barron", 1, lambda c: c**2 * (np.sqrt(z(c) + 1) - 1)),
        ("Barron", 0, lambda c: c**2 * np.log(z(c) / 2 + 1)),
        ("Barron", -2, lambda c: c**2 * 2 * z(c) / (z(c) + 4)),
    ],
)
def test_losses(name, shape, expected):
    """As Huber (1964), Beaton and Tukey (1974) and Barron (2019) have them; no slope is NaN."""
    slope = jax.vmap(jax.value_and_grad(outliers.LOSSES[name]), (0, None, None))
    for c in (0.5, 1.7):
        found, slopes = slope(R, np.float32(shape), np.float32(c))
        np.testing.assert_allclose(found, expected(c), rtol=2e-5, atol=1e-7)
        assert np.isfinite(slopes).all()


def welsch(r, _, c):
    return c**2 / 2 * (1 - jnp.exp(-((r / c) ** 2)))


def test_scales_are_efficient():
    """By the asymptotic variance of an M-estimator of location: 95 % of that of the mean."""
    r = np.linspace(-9, 9, 20001, dtype=np.float32)
    p = np.exp(-(r**2) / 2) / np.exp(-(r**2) / 2).sum()
    cases = [
        (outliers.LOSSES[k], a, c) for k, of in outliers.EFFICIENT.items() for a, c in of.items()
    ]
    for loss, shape, c in [*cases, (welsch, 1.0, outliers.WELSCH)]:
        psi = jax.vmap(jax.grad(lambda r, loss=loss, shape=shape, c=c: loss(r, shape, c)))(r)
        # The mean slope of ψ is that of r ψ, as the noise is normal.
        assert np.sum(p * r * psi) ** 2 / np.sum(p * psi**2) == pytest.approx(0.95, abs=3e-4)


@pytest.mark.parametrize("c", [0.5, 2.0])
def test_welsch(c):
    """A λ of -c² on squared errors has its minima, and its gradients but for a factor."""
    objective = robust_loss(R**2, -(c**2))
    of_mean = -(c**2) * jnp.log(1 - 2 / c**2 * welsch(R, 1, c).mean())
    np.testing.assert_allclose(objective, of_mean, rtol=1e-5)
    ours = jax.grad(lambda r: robust_loss(r**2, -(c**2)))(R)
    theirs = jax.grad(lambda r: welsch(r, 1, c).mean())(R)
    np.testing.assert_allclose(ours, theirs * 2 / np.exp(-z(c)).mean(), rtol=2e-5, atol=1e-12)


@pytest.fixture
def table():
    return outliers.load(CONFIG, "function")


def test_function(table):
    """Without noise that is known to be a fifth of a standard deviation."""
    assert table.x.shape == (400, 10)
    assert np.std(table.y - table.truth) == pytest.approx(0.2, abs=0.03)
    for v in (table.x[:, 3], table.y):
        assert (v.mean(), v.std()) == pytest.approx((0, 1), abs=0.02)


@pytest.mark.parametrize("kind", outliers.KINDS)
@pytest.mark.parametrize("share", [0.2, 0.4])
def test_spoil(kind, share, table):
    c = outliers.Config(smallest=1.0, largest=5.0)
    x, y = outliers.spoil(c, np.random.default_rng(3), kind, share, table.x, table.y)
    error = y - table.y
    wrong = error != 0
    assert wrong.sum() == round(share * 400)
    if kind == "clustered":
        np.testing.assert_allclose(y[wrong], 3, atol=0.5)
    else:
        assert np.abs(error[wrong]).min() >= 1
        assert 4.5 < np.abs(error).max() <= 5
        positive = np.mean(error[wrong] > 0)
        assert 0.3 < positive < 0.7 if kind == "symmetric" else positive == 1
    moved = wrong if kind == "leverage" else np.zeros(400, bool)
    np.testing.assert_array_equal(x, np.where(moved[:, None], 3 * table.x, table.x))


class TestDraw:
    def draw(self, table, searching):
        return outliers.draw(CONFIG, table, "one_sided", 0.4, 7, searching)

    def test_reported(self, table):
        """A network is tested on right targets, and learns from the others."""
        found = self.draw(table, False)
        np.testing.assert_array_equal(found.evaluation, np.arange(100))
        np.testing.assert_array_equal(found.truth, table.truth[:100])
        assert sorted(found.batches.ravel()) == list(range(100, 400))
        targets = found.y * found.spread + found.center
        np.testing.assert_allclose(targets[:100], table.y[:100], atol=1e-5)
        assert np.sum(np.abs(targets - table.y) > 1e-4) == 120
        assert np.median(found.y[100:]) == pytest.approx(0, abs=1e-6)
        assert 1.4826 * np.median(np.abs(found.y[100:])) == pytest.approx(1, rel=1e-5)

    def test_searched(self, table):
        """What is held out has as many errors as what is learnt from, and is none of the test."""
        found = self.draw(table, True)
        rows = [*found.evaluation, *np.unique(found.batches)]
        assert sorted(rows) == list(range(100, 400))
        assert 0.25 < np.mean(found.truth - table.y[found.evaluation] > 0) < 0.55
        assert found.batches.shape == self.draw(table, False).batches.shape


def test_term_is_the_objective_of_the_batch(table):
    """By optax alone; and a share of its steps may come before it."""
    sample = outliers.draw(CONFIG, table, "one_sided", 0.4, 7, False)
    setting = outliers.Setting(temperature=-0.5, gamma=1.0, begin=1 / 3, learning_rate=0.01)
    stacked = outliers.Sample(*(np.asarray(leaf)[None] for leaf in sample))
    found = outliers.evaluate(CONFIG, stacked, [(setting, 0)])[setting, 0]

    params = layers.init(jax.random.key(0), (10, 32, 32, 1))
    tx = optax.adam(optax.cosine_decay_schedule(0.01, 3))
    opt_state = tx.init(params)

    def predict(params, index):
        return layers.predict(params, sample.x[index])[:, 0]

    for index, temperature in zip(sample.batches, (jnp.inf, -0.5, -0.5), strict=True):

        def loss(params, index=index, temperature=temperature):
            return robust_loss((predict(params, index) - sample.y[index]) ** 2, temperature)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        params = optax.apply_updates(params, updates)
    predicted = predict(params, sample.evaluation) * sample.spread + sample.center
    rmse = np.sqrt(np.mean((predicted - sample.truth) ** 2))
    assert found["rmse"] == pytest.approx(rmse, rel=1e-4)
    assert not found["diverged"]


def test_measure():
    truth = np.arange(4.0)
    right = {"mae": 1.0, "median": 0.5, "rmse": np.sqrt(2.5), "diverged": 0}
    found = outliers.measure(np.float32([0, 0, 2, 6]), truth, True)
    assert {k: found[k] for k in right} == pytest.approx(right)
    assert outliers.measure(truth, truth, False)["diverged"]
    for astray in (np.zeros(4), -truth, truth * np.nan, truth + 4):
        found = outliers.measure(astray, truth, True)
        assert found["diverged"]
        assert np.isfinite(found["rmse"])


class TestDiamonds:
    def test_read(self, tmp_path, monkeypatch):
        """Without importing what holds them."""
        path = tmp_path / "plotnine" / "data" / "diamonds.csv"
        path.parent.mkdir(parents=True)
        (tmp_path / "plotnine" / "__init__.py").write_text("raise ImportError")
        path.write_text('"carat","cut","price"\n0.2,"Ideal",326\n0.3,"Fair",335\n')
        monkeypatch.delitem(sys.modules, "plotnine", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        x, y = outliers.diamonds()
        np.testing.assert_array_equal(x, [[0.2, 0, 1], [0.3, 1, 0]])
        np.testing.assert_array_equal(y, [326, 335])

    def test_without(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(outliers.importlib.util, "find_spec", lambda _: None)
        argv = ["outliers", "--datasets", "diamonds", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit, match="2"):
            outliers.main()
        assert 'pip install ".[outliers]"' in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_table(monkeypatch, start):
    """Its figures are those of the results, in the settings that other seeds chose."""
    small = "--datasets function --kinds one_sided --shares 0.4 --examples 64 --epochs 2 --seeds 2"
    few = "--batch-size 16 --hidden 8 --learning-rates 0.01 0.1 --scales 0.2 --ess 0.6"
    seeds, draw = [], outliers.draw
    monkeypatch.setattr(outliers, "draw", lambda *args: seeds.append(args[4:]) or draw(*args))
    results, table, printed = start(outliers, f"{small} {few}")
    assert seeds == [(1000, True), (0, False), (1, False)] * 2
    assert printed.strip() in table
    assert [" ".join(row[:3]) for row in rows(printed)] == list(results)
    for row, record in zip(rows(printed), results.values(), strict=True):
        for (method, by), cell in zip(record["methods"].items(), row[3:], strict=False):
            astray = sum(by["mae"]["diverged"])
            figures = "–" if astray else mean_std(by["mae"]["rmse"], 3)
            assert cell == figures + f", {astray} diverged" * bool(astray)
            for i, criterion in enumerate(outliers.CRITERIA, start=-3):
                grid = [s for s in record["validation"] if s[:-4] == by["mae"]["setting"][:-1]]
                best = min(grid, key=lambda s, i=i: s[i])
                if method in ("least squares", "MAE", "ESS"):
                    assert by[criterion]["setting"] == best[:-3]
