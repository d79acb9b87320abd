"""A tour: labels that mislead, targets that are too high, rare classes, and what helps.

    python -m benchmarks

Each is met by a plain loss, by losses that are made for it, and by ABSGD with a λ that tunes itself
to a target set beforehand. Learning rates, and the scales of Huber's and Tukey's losses, are those
with the best accuracy, or mean absolute error, on a validation split of other seeds, which is as
wrong as the training data; what is reported is the end of training, on right test data.
"""

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from tqdm import tqdm

from benchmarks import longtail, noise, outliers
from benchmarks.engine import comparison, config, plots, report, training
from benchmarks.engine.comparison import Draw, Result, Train
from benchmarks.engine.datasets import Split
from benchmarks.engine.methods import parse
from benchmarks.engine.search import SEEDS
from benchmarks.engine.training import Images, Task

EVERY = slice(None)
# In words, what the other benchmarks call by the name of a flag.
WORDS = {
    "cross_entropy": "cross-entropy",
    "gce": "generalized cross-entropy",
    "balanced_softmax": "balanced softmax",
}
# Which the colour-blind can tell apart.
GREY, BLUE, LIGHT_BLUE, RED = "#777777", "#0072B2", "#56B4E9", "#D55E00"
# The arguments of the comparison on digits: a low rate may do to learn what is right alone. It is
# over before there is much to save.
DIGITS: dict[str, Any] = {
    "search_seeds": 2,
    "learning_rates": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    "checkpoint_every": 1e6,
}
CURVE: dict[str, Any] = {
    "search_seeds": 2,
    "learning_rates": (0.003, 0.01, 0.03),
    "ess": (0.6,),
    "epochs": 60,
}
TOO_HIGH = 0.4  # share of the targets
# What they are met by: a loss and an optimizer, and the colour.
REGRESSION = {
    "least squares": ("least squares", "Adam", GREY),
    "Huber": ("Huber", "Adam", BLUE),
    "Tukey": ("Tukey", "Adam", LIGHT_BLUE),
    "ESS, later": ("least squares", "ABAdam, automatic", RED),
}


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """A tour."""

    out: pathlib.Path = pathlib.Path("out/tour")  # folder to write to
    seeds: Annotated[int, SEEDS] = 5  # number of seeds that are reported


class Part(NamedTuple):
    """What is wrong with labels, and what is done about it."""

    name: str
    draw: Draw
    groups: int
    temperatures: dict[str, tuple[str, ...]]  # of ABSGD, by loss


def make_parts(c: comparison.Config, train: Split, test: Split) -> tuple[Part, Part]:
    labels, classes = (train.labels, test.labels), int(train.labels.max()) + 1
    return (
        Part(
            "wrong labels",
            noise.make_draw(train, test, "instance:0.4", None, c.validation),
            2,
            {"cross_entropy": ("0.2:ess-0.6",), "gce": ()},
        ),
        Part(
            "rare classes",
            longtail.make_draw(*labels, longtail.Config.imbalance, c.validation),
            classes,
            {"cross_entropy": (), "balanced_softmax": ("0.5:ess0.9",)},
        ),
    )


def classify(
    c: comparison.Config, part: Part, images: Images, classes: int, train: Train
) -> list[Result]:
    """Both losses with SGD, and one of them with ABSGD, in this order."""
    results = []
    for loss, temperatures in part.temperatures.items():
        told = dataclasses.replace(c, temperatures=temperatures)
        task = Task(images, classes, part.groups, classes, parse(loss))
        name = f"{part.name}-{loss}".replace(" ", "-")
        compared = comparison.compare(told, name, task, part.draw, train)
        results += [result._replace(loss=WORDS[loss]) for result in compared]
    return sorted(results, key=lambda result: result.optimizer != "SGD")


def make_curve() -> outliers.Table:
    """A sine, with noise of a tenth of its standard deviation."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, size=2000)
    truth = np.sin(x)
    truth = (truth - truth.mean()) / truth.std()
    y = truth + 0.1 * rng.normal(size=len(x))
    return outliers.Table((x / x.std())[:, None], y, truth)


def regress(c: outliers.Config, table: outliers.Table) -> dict[str, dict[str, Any]]:
    """What becomes of every method, and its setting."""
    grids = {
        key: grid
        for key, grid in outliers.grids(c).items()
        if key[0] in REGRESSION and key[1] == "mae"
    }
    found = outliers.find(c, table, "one_sided", TOO_HIGH, grids)
    return {
        method: {"setting": setting, **found.final[setting]}
        for (method, _), setting in found.chosen.items()
    }


def accuracy(result: Result, classes: slice) -> np.ndarray:
    """Mean over the classes, [epochs, seeds]."""
    return result.accuracy[:, :, classes].mean(axis=2)


def in_words(x: np.ndarray, y: np.ndarray, other: str) -> str:
    """How accuracies [seeds] compare with another's: by the mean difference ± standard error."""
    mean, error = (x - y).mean(), (x - y).std(ddof=1) / len(x) ** 0.5
    if abs(mean) <= 2 * error:
        return f"level with {other} ({mean:z.1f} ± {error:.1f})"
    return f"{abs(mean):.1f} ± {error:.1f} points {'ahead of' if mean > 0 else 'behind'} {other}"


def sentences(
    wrong: list[Result], high: dict[str, dict[str, Any]], rare: list[Result], few: slice
) -> Iterator[str]:
    """What the ends of training say."""
    sgd, robust, absgd = (accuracy(r, EVERY)[-1] for r in wrong)
    versus = f"{in_words(absgd, sgd, 'SGD')}, and {in_words(absgd, robust, wrong[1].loss)}"
    yield f"With 40 % of the labels wrong, by what is in the image, ABSGD is {versus}."
    least_squares, huber, tukey, absgd = (f"{of['rmse'].mean():.2f}" for of in high.values())
    yield (
        f"With 40 % of the targets too high, least squares have an RMSE of {least_squares}, "
        f"Huber's loss of {huber}, Tukey's of {tukey}, and ABSGD on squares of {absgd}."
    )
    for where, classes in (f"the {-few.start} rarest", few), ("all", EVERY):
        sgd, balanced, absgd = (accuracy(r, classes)[-1] for r in rare)
        gain, more = in_words(balanced, sgd, rare[0].loss), in_words(absgd, balanced, "SGD")
        yield f"On {where} classes {rare[1].loss} is {gain}; with it, ABSGD is {more}."


def draw_accuracy(axes: Axes, results: list[Result], classes: slice) -> None:
    """Mean and standard deviation over the seeds, each with its name and its end."""
    for color, r in zip((GREY, BLUE, RED), results, strict=True):
        curve = accuracy(r, classes)
        epochs, mean, std = range(1, len(curve) + 1), curve.mean(axis=1), curve.std(axis=1, ddof=1)
        label = f"{r.optimizer.split(',')[0]}, {r.loss}: {mean[-1]:.0f} %"
        axes.plot(epochs, mean, color=color, label=label)
        axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.1, lw=0)
    late = [accuracy(r, classes)[len(curve) // 2 :].mean(axis=1).min() for r in results]
    low = 10 * np.floor(min(late) / 10) - 20  # all start from a guess
    axes.set(
        xlabel="epoch", ylabel="test accuracy, %", xlim=(1, max(len(curve), 2)), ylim=(low, 100)
    )
    start, lam = comparison.stages(results[-1].setting.temperature)[-1]
    axes.axvline(start * len(curve), color=RED, ls=":", lw=1)
    text = f" λ {'<' if lam < 0 else '>'} 0"
    axes.text(start * len(curve), low, text, color=RED, va="bottom")


def draw_regression(
    axes: Axes, c: outliers.Config, table: outliers.Table, high: dict[str, dict[str, Any]]
) -> None:
    """The training data of the first seed, and what is predicted of its test data."""
    sample = outliers.draw(c, table, "one_sided", TOO_HIGH, seed=0, searching=False)
    x, rows = table.x[:, 0], np.unique(sample.batches)
    y = sample.y * sample.spread + sample.center
    wrong = np.abs(y - table.y) > 1e-3
    for part, marker in ((~wrong, "o"), (wrong, "+")):
        axes.scatter(
            *(x[rows][part[rows]], y[rows][part[rows]], 4, "#bbbbbb"), marker=marker, linewidths=0.5
        )
    tested = x[sample.evaluation]
    order = np.argsort(tested)
    for method, of in high.items():
        loss, optimizer, color = REGRESSION[method]
        label = f"{optimizer.split(',')[0]}, {loss}: RMSE {of['rmse'].mean():.2f}"
        axes.plot(tested[order], of["predicted"][0][order], color=color, label=label)
    axes.plot(tested[order], sample.truth[order], "k:", lw=1, label="truth; crosses are too high")
    axes.set(xlabel="x", ylabel="y", ylim=(-2, 4))


def write(
    c: Config,
    curve: tuple[outliers.Config, outliers.Table],
    wrong: list[Result],
    high: dict[str, dict[str, Any]],
    rare: list[Result],
) -> None:
    few = comparison.groups(rare[0].accuracy.shape[2])["few"]
    rows = [("data", "loss", "optimizer", "rate", "at the end", "diverged")]
    records: dict[str, Any] = {}

    def add(data: str, loss: str, optimizer: str, rate: float, end: str, diverged: int) -> str:
        rows.append((data, loss, optimizer, f"{rate:g}", end, f"{diverged} of {c.seeds}"))
        return f"{data}, {loss}, {optimizer}"

    def add_accuracy(data: str, r: Result, *parts: slice) -> None:
        ends = [report.mean_std(accuracy(r, part)[-1], ".1f") + " %" for part in parts]
        end = f", {-few.start} rarest ".join(ends)
        diverged = comparison.divergences(r.trained)
        name = add(data, r.loss, r.optimizer, r.setting.learning_rate, end, diverged)
        records[name] = comparison.record(r)

    for r in wrong:
        add_accuracy("wrong labels", r, EVERY)
    for method, of in high.items():
        end = f"RMSE {report.mean_std(of['rmse'], '.3f')}"
        diverged = of["diverged"].sum()
        name = add(
            *("targets too high", *REGRESSION[method][:2]),
            *(of["setting"].learning_rate, end, diverged),
        )
        kept = {k: of[k] for k in (*outliers.CRITERIA, "diverged")}
        records[name] = {"setting": of["setting"]._asdict(), **kept}
    for r in rare:
        add_accuracy("rare classes", r, EVERY, few)
    report.write(
        c.out, records, report.markdown(rows), "\n".join(sentences(wrong, high, rare, few))
    )

    figure, grid = plt.subplots(1, 3, figsize=(12, 4))
    titles = (
        "40 % of the labels wrong, by the image",
        "40 % of the targets too high",
        f"Rare classes: the {-few.start} rarest",
    )
    for axes, title in zip(grid, titles, strict=True):
        axes.set_title(title, loc="left")
    draw_accuracy(grid[0], wrong, EVERY)
    draw_regression(grid[1], *curve, high)
    draw_accuracy(grid[2], rare, few)
    for axes in grid:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    plots.save(figure, c.out / "tour.png")


def benchmarks() -> Iterator[str]:
    """The commands of the others, and the first lines of their docstrings."""
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        command = f"python -m benchmarks.{path.stem}"
        if command in doc:
            yield f"{command:34}{doc.splitlines()[0]}"


def main() -> None:
    c = config.read(Config, __doc__)
    digits = comparison.Config(out=c.out, seeds=c.seeds, **DIGITS)
    curve = outliers.Config(out=c.out, seeds=c.seeds, **CURVE)
    table = make_curve()
    train, test = comparison.load(digits)
    images = comparison.on_device(digits, train, test)
    parts = make_parts(digits, train, test)
    sizes = [
        size
        for part in parts
        for temperatures in part.temperatures.values()
        for size in comparison.sizes(dataclasses.replace(digits, temperatures=temperatures))
    ]
    epochs = comparison.epochs_of(digits, sizes)
    with report.folder(c) as described, tqdm(total=epochs, unit="epoch") as bar:
        fit = functools.partial(training.train, bar=bar, started=described["started"])
        wrong, rare = (classify(digits, part, images, parts[1].groups, fit) for part in parts)
        bar.set_description("regression")
        high = regress(curve, table)
        write(c, (curve, table), wrong, high, rare)
    print((c.out / "table.md").read_text(encoding="utf-8"))
    print(f"The picture is {c.out / 'tour.png'}. The other benchmarks:\n")
    print(*benchmarks(), sep="\n")


if __name__ == "__main__":
    main()
