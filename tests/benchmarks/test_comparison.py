"""The comparisons run as a user runs them, and write what they say."""

import numpy as np
import pytest

from benchmarks import longtail, noise, sweep
from benchmarks.engine import comparison, report, training
from tests.support.commands import load, mean_std, rows, SMALL


def pictures(out):
    return {path.stem for path in out.glob("*.png")}


@pytest.fixture
def compare(start, tmp_path, users_promotion):
    """Runs a comparison; its results, and its table."""

    def compare(benchmark, options, out=tmp_path):
        results, table, printed = start(benchmark, options, out)
        assert table in printed
        return results, table

    return compare


def test_longtail(tmp_path, compare):
    out = tmp_path / "new" / "folder"
    # At the second rate nothing is learnt: the validation split must choose the first.
    options = f"{SMALL} --epochs 6 --learning-rates 0.1 1e-6 --temperatures 20"
    results, table = compare(longtail, f"{options} --methods ldam_drw", out)
    config = load(out, "config")
    assert config["arguments"]["seeds"] == 2
    assert config["finished"]
    assert config["command"].startswith("python -m benchmarks.longtail --model linear")
    assert config["arguments"]["temperatures"] == ["20"]
    assert list(results) == ["ldam_drw SGD", "ldam_drw ABSGD"]
    assert [r["setting"]["temperature"] for r in results.values()] == ["inf", "20"]
    for row, (name, r) in zip(rows(table), results.items(), strict=True):
        assert r["setting"]["learning_rate"] == 0.1
        assert [v["learning_rate"] for v in r["validation"]] == [0.1, 1e-6]
        first, second = (np.mean(v["class_accuracy"]) for v in r["validation"])
        assert first > 50 > second
        assert r["diverged"] == 0
        final, curve = np.array(r["class_accuracy"]), np.array(r["accuracy"])
        assert final.shape == (2, 10)
        assert curve.shape == np.shape(r["effective_sample_size"]) == (2, 6)
        np.testing.assert_allclose(final.mean(axis=1), curve[:, -1], rtol=1e-5)
        parts = (final, final[:, :3], final[:, 3:7], final[:, 7:])
        cells = [mean_std(part.mean(axis=1)) for part in parts] + [mean_std(final.min(axis=1))]
        λ = "20" if "ABSGD" in name else "∞"
        size = f"{np.mean(r['effective_sample_size'], axis=0)[-1]:.2f}"
        assert row == [name.split()[0], λ, "0.1", *cells, size, "0 of 2"]
        np.testing.assert_allclose(np.sum(r["mass"], axis=1), 1, rtol=1e-4)
    # The classes are in the order of their sizes, which the weights of SGD show; those of ABSGD
    # are on the rare classes, too.
    sgd, absgd = (np.mean(r["mass"], axis=0) for r in results.values())
    assert np.all(np.diff(sgd) < 0)
    assert np.all(absgd[-3:] > sgd[-3:])
    assert pictures(out) == {"temperature", "tradeoff"}
    assert "ldam_drw-final-0, epoch 6 of 6" in (out / "log.txt").read_text()


@pytest.mark.slow
def test_automatic_temperature(compare):
    """It has results of its own, beside those of the best λ that was given."""
    options = f"{SMALL} --epochs 4 --learning-rates 0.1 --temperatures 1e6 0.5:ess0.5 --methods arb"
    results, table = compare(longtail, options)
    assert list(results) == ["arb SGD", "arb ABSGD", "arb ABSGD, automatic"]
    sgd, absgd, automatic = results.values()
    np.testing.assert_allclose(absgd["class_accuracy"], sgd["class_accuracy"], atol=3)
    # Plain SGD until half the epochs are over.
    assert automatic["setting"]["temperature"] == "0.5:ess0.5"
    lam, ess = (np.array(automatic[k], float) for k in ("temperature", "effective_sample_size"))
    assert np.all(np.isnan(lam[:, :2]))
    assert np.all(lam[:, 2:] > 0)
    np.testing.assert_allclose(ess[:, :2], 1, rtol=1e-5)
    np.testing.assert_allclose(ess[:, 2:].mean(), 0.5, atol=0.1)
    assert rows(table)[2][1] == "ess0.5 from 0.5"


@pytest.mark.slow
def test_each_temperature(tmp_path, compare):
    """It has a row of its own, and baselines have none."""
    options = f"{SMALL} --epochs 2 --learning-rates 0.1 --methods focal --baselines focal cvar+sam"
    results, _ = compare(longtail, f"{options} --each --temperatures 20 1e6")
    assert list(results) == [
        *("focal SGD inf", "focal ABSGD 20", "focal ABSGD 1e6"),
        "cvar+sam SGD inf",
    ]
    assert (tmp_path / "runs" / "cvar+sam-final-0.npz").exists()


def test_no_values(compare):
    """Flags that may have none: SGD on a linear model, at a rate that doesn't fall."""
    none = "--model mlp --hidden --temperatures --baselines --milestones"
    results, _ = compare(longtail, f"{SMALL} {none} --epochs 2 --learning-rates 0.1 --methods arb")
    assert list(results) == ["arb SGD"]


def test_tested():
    """As many test images of every class, in their order."""
    (_, whole), (_, test) = map(comparison.load, (noise.Config(), noise.Config(tested=7)))
    assert np.bincount(test.labels).tolist() == [7] * 10
    first = np.flatnonzero(whole.labels == test.labels[-1])[6]
    np.testing.assert_array_equal(test.images[-1], whole.images[first])


def test_draw():
    """Class sizes are those that were asked for, and no image is met twice."""
    train, test = np.arange(2000) % 4, np.arange(400) % 4
    draw = longtail.make_draw(train, test, 0.125, 0.1, largest=80)
    kept, tested, _ = draw(0, False)
    assert np.bincount(kept.label).tolist() == [80, 40, 20, 10]
    assert np.bincount(tested.label).tolist() == [100] * 4
    searched, held_out, clean = draw(0, True)
    assert np.bincount(searched.label).tolist() == [80, 40, 20, 10]
    assert np.bincount(held_out.label).tolist() == [50] * 4
    assert np.bincount(clean.label).tolist() == [10] * 4
    for parts in ((kept, tested), (searched, held_out, clean)):
        index = np.concatenate([part.index for part in parts])
        assert len(np.unique(index)) == len(index)
    whole = longtail.make_draw(train, test, 0.125, 0.1)(0, False)
    assert [np.bincount(part.label)[0] for part in whole[:2]] == [500, 100]


@pytest.mark.parametrize(
    ("options", "losses"),
    [
        pytest.param("--temperatures 5 ess0.5", ["arb", "ldam_drw"], marks=pytest.mark.slow),
        ("--temperatures -1 ess-0.6 --noise symmetric:0.4", ["gce"]),
    ],
    ids=["long_tail", "noise"],
)
def test_sweep(tmp_path, compare, options, losses):
    """Every λ, rate and seed of a loss is trained at once, but for λ that tune themselves."""
    small = "--model linear --epochs 3 --seeds 2 --batch-size 64 --learning-rates 0.1 1e6"
    results, table = compare(sweep, f"{small} {options} --methods {' '.join(losses)}")
    assert len(results) == len(losses) * 2 * 3
    found = {(loss, setting): cells for loss, setting, *cells, _ in rows(table)}
    assert len(found) == len(losses) * 3
    for name, r in results.items():
        assert r["diverged"] == sum(np.array(r["accuracy"]) < 20)
        loss, setting = name.split(", rate ")[0].split(" ", 1)
        assert found[loss, setting]["rate 1e+06" in name] == mean_std(r["accuracy"])
    programs = {path.name for path in (tmp_path / "runs").iterdir()}
    assert programs == {f"{loss}{end}-0.npz" for loss in losses for end in ("", "-automatic")}


def test_choice():
    """The best on the rare classes, where that costs little enough."""
    scores = {0.1: [0.9, 0.9, 0.5], 0.2: [0.9, 0.8, 0.59], 0.3: [0.9, 0.4, 0.95]}
    grid = {comparison.Setting("inf", rate, 0.9): np.array(s) for rate, s in scores.items()}
    chosen = [longtail.choose(grid, give).learning_rate for give in (0, 0.5, 2)]
    assert chosen == [0.1, 0.2, 0.3]


def test_noise(tmp_path, compare):
    options = f"{SMALL} --epochs 30 --learning-rates 0.1 --temperatures -1 --noise symmetric:0.4"
    results, _ = compare(noise, f"{options} --methods cross_entropy")
    sgd, absgd = (results[f"symmetric 0.4 cross_entropy {name}"] for name in ("SGD", "ABSGD"))
    # λ < 0 takes the weight off the wrong labels, and is better for it.
    np.testing.assert_allclose(np.array(sgd["mass"])[:, 1], 0.4, atol=0.02)
    assert np.array(absgd["mass"])[-1, 1] < 0.2
    assert np.mean(absgd["class_accuracy"]) > np.mean(sgd["class_accuracy"]) + 5
    assert min(absgd["auroc"] + sgd["auroc"]) > 90
    assert pictures(tmp_path) == {"curves", "temperature"}


def test_diverged():
    """Not finite, or next to a guess: of two classes that is not all there is."""

    def of(accuracy, loss=1.0):
        history = {"mean_loss": np.full((3, 1), loss), "accuracy": np.array([[accuracy]])}
        return comparison.divergences(training.Trained(history, None, None))

    assert of([1.0] + [0.0] * 9) == of([0.1] * 9 + [0.9]) == 1
    assert of([0.3] * 10) == 0
    assert of([1.0, 0.0]) == 1
    assert of([0.7, 0.8]) == 0
    assert of([0.019] * 100) == 1
    assert of([0.021] * 100) == 0
    assert of([0.7, 0.8], np.nan) == 1


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_groups_are_all_of_the_classes(classes):
    groups = comparison.groups(classes)
    assert list(groups) == ["many", "medium", "few"][:: 2 if classes == 2 else 1]
    parts = [np.arange(classes)[part] for part in groups.values()]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(classes))


def test_parts_are_known_by_their_names(tmp_path):
    """One in the place of another is done anew."""
    path = tmp_path / "runs" / "arb-final-0.npz"
    report.save_part(path, "now", {"losses": np.ones(2)})
    assert list(report.load_part(path, "now")) == ["losses"]
    assert not report.load_part(path, "then")
    assert not report.load_part(path.rename(path.with_suffix(".checkpoint")), "now")


class TestFolderInUse:
    """A new run takes the place of one that has ended, and nothing else."""

    OPTIONS = f"{SMALL} --epochs 1 --learning-rates 0.1 --temperatures 5 --methods arb"

    def test_again(self, tmp_path, compare):
        first = compare(longtail, self.OPTIONS)
        mine = [tmp_path / name for name in ("runs/mine.npz", "checkpoints/mine", "mine.txt")]
        for path in mine:
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
        # It trains anew, though the parts of the first lie there.
        again = compare(longtail, self.OPTIONS)
        assert again == first
        assert (tmp_path / "log.txt").read_text().count("epoch 1 of 1") == 2
        other, _ = compare(longtail, f"{self.OPTIONS} --gamma 0.5")
        assert other["arb SGD"] != other["arb ABSGD"] != first[0]["arb ABSGD"]
        assert {path.read_text() for path in mine} == {"mine"}

    def test_finished(self, tmp_path, compare):
        """What resumes it draws it again, and trains nothing."""
        first = compare(longtail, self.OPTIONS)
        assert compare(longtail, f"{self.OPTIONS} --resume") == first
        assert (tmp_path / "log.txt").read_text().count("epoch 1 of 1") == 1
