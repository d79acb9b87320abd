"""A tour of a minute or two on scikit-learn's digits: wrong labels, rare classes, and what helps.

    python -m benchmarks

Each is met by SGD, by SGD on a loss that is made for it, and by ABSGD with a λ that tunes itself to
a target set beforehand. Learning rates are those with the best accuracy on a validation split, held
out of the training data of other seeds; what is reported is the final epoch on the test split.
"""

import ast
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks import longtail, noise
from benchmarks.engine import comparison, plots, report
from benchmarks.engine.comparison import Draw, Result, TEMPERATURE, Train
from benchmarks.engine.config import FROM_1, OR_NONE, POSITIVE
from benchmarks.engine.datasets import Split
from benchmarks.engine.methods import parse
from benchmarks.engine.training import Images, Task

EVERY = slice(None)
# In words, what the other benchmarks call by the name of a flag.
WORDS = {
    "cross_entropy": "cross-entropy",
    "gce": "generalized cross-entropy",
    "balanced_softmax": "balanced softmax",
}
COLORS = ("#777777", "#0072B2", "#D55E00")  # which the colour-blind can tell apart


@dataclasses.dataclass(frozen=True)
class Config(comparison.Config):
    """A tour."""

    out: pathlib.Path = pathlib.Path("out/tour")  # folder to write to
    search_seeds: Annotated[int, FROM_1] = 2  # seeds of every setting of the search
    # peaks to choose from; SGD needs a low one, or it memorises the wrong labels
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (
        *(0.0003, 0.001, 0.003),
        *(0.01, 0.03, 0.1, 0.3),
    )
    # of ABSGD on wrong labels, and on rare classes; as in benchmarks.longtail
    temperatures: Annotated[tuple[str, str], TEMPERATURE, OR_NONE] = ("0.2:ess-0.6", "0.5:ess0.9")


class Part(NamedTuple):
    """What is wrong with the data, and what is done about it."""

    name: str
    draw: Draw
    groups: int
    temperatures: dict[str, tuple[str, ...]]  # of ABSGD, by loss


def make_parts(config: Config, train: Split, test: Split) -> tuple[Part, Part]:
    negative, positive = ((lam,) for lam in config.temperatures)
    labels, classes = (train.labels, test.labels), int(train.labels.max()) + 1
    return (
        Part(
            "wrong labels",
            noise.make_draw(train, test, "symmetric:0.4", None, config.validation),
            2,
            {"cross_entropy": negative, "gce": ()},
        ),
        Part(
            "rare classes",
            longtail.make_draw(*labels, longtail.Config.imbalance, config.validation),
            classes,
            {"cross_entropy": (), "balanced_softmax": positive},
        ),
    )


def run(config: Config, part: Part, images: Images, classes: int, train: Train) -> list[Result]:
    """Both losses with SGD, and one of them with ABSGD, in this order."""
    results = []
    for loss, temperatures in part.temperatures.items():
        told = dataclasses.replace(config, temperatures=temperatures)
        task = Task(images, classes, part.groups, classes, parse(loss))
        name = f"{part.name}-{loss}".replace(" ", "-")
        compared = comparison.compare(told, name, task, part.draw, train)
        results += [result._replace(loss=WORDS[loss]) for result in compared]
    return sorted(results, key=lambda result: result.optimizer != "SGD")


def accuracy(result: Result, classes: slice) -> np.ndarray:
    """Mean over the classes, [epochs, seeds]."""
    return result.accuracy[:, :, classes].mean(axis=2)


def in_words(x: np.ndarray, y: np.ndarray, other: str) -> str:
    """How accuracies [seeds] compare with another's: by the mean difference ± standard error."""
    mean, error = (x - y).mean(), (x - y).std(ddof=1) / len(x) ** 0.5
    if abs(mean) <= 2 * error:
        return f"level with {other} ({mean:z.1f} ± {error:.1f})"
    return f"{abs(mean):.1f} ± {error:.1f} points {'ahead of' if mean > 0 else 'behind'} {other}"


def sentences(wrong: list[Result], rare: list[Result], few: slice) -> Iterator[str]:
    """What the final epochs say."""
    sgd, robust, absgd = (accuracy(r, EVERY)[-1] for r in wrong)
    versus = f"{in_words(absgd, sgd, 'SGD')}, and {in_words(absgd, robust, wrong[1].loss)}"
    yield f"With 40 % of the labels wrong ABSGD is {versus}."
    for where, classes in (f"the {-few.start} rarest", few), ("all", EVERY):
        sgd, balanced, absgd = (accuracy(r, classes)[-1] for r in rare)
        gain, more = in_words(balanced, sgd, rare[0].loss), in_words(absgd, balanced, "SGD")
        yield f"On {where} classes {rare[1].loss} is {gain}; with it, ABSGD is {more}."


def draw_panel(axes: Axes, results: list[Result], classes: slice, low: float) -> None:
    """Mean and standard deviation over the seeds, each with its name at its end."""
    height = np.inf
    colors = dict(zip(COLORS, results, strict=True))
    for color, r in sorted(colors.items(), key=lambda x: -accuracy(x[1], classes)[-1].mean()):
        curve = accuracy(r, classes)
        epochs, mean, std = range(1, len(curve) + 1), curve.mean(axis=1), curve.std(axis=1, ddof=1)
        axes.plot(epochs, mean, color=color)
        axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.1, lw=0)
        height = min(mean[-1], height - 0.15 * (100 - low))  # below the name before
        text = f"{r.optimizer.split(',')[0]}  {mean[-1]:.1f} %\n{r.loss}"
        style = {"textcoords": "offset points", "va": "center", "color": color}
        axes.annotate(text, (len(curve), height), (8, 0), annotation_clip=False, **style)
    start, lam = comparison.stages(results[-1].setting.temperature)[-1]
    axes.axvline(start * len(curve), color=COLORS[-1], ls=":", lw=1)
    axes.text(
        start * len(curve), low, f" λ {'<' if lam < 0 else '>'} 0", color=COLORS[-1], va="bottom"
    )
    axes.set(xlabel="epoch", xlim=(1, max(len(curve), 2)), ylim=(low, 100))


def draw(path: pathlib.Path, wrong: list[Result], rare: list[Result], few: slice) -> None:
    panels = (
        ("40 % of the labels wrong", wrong, EVERY),
        (f"The {-few.start} rarest classes", rare, few),
    )
    curves = [accuracy(r, classes) for _, results, classes in panels for r in results]
    late = np.stack(curves)[:, len(curves[0]) // 2 :]  # all start from a guess
    low = 10 * np.floor((late.mean(axis=2) - late.std(axis=2, ddof=1)).min() / 10)
    figure, grid = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for axes, (title, results, classes) in zip(grid, panels, strict=True):
        axes.set_title(title, loc="left")
        draw_panel(axes, results, classes, low)
    grid[0].set_ylabel("test accuracy, %")
    plots.save(figure, path)


def write(config: Config, wrong: list[Result], rare: list[Result]) -> None:
    few = longtail.groups(wrong[0].accuracy.shape[2])["few"]
    rows = [("data", "loss", "optimizer", "rate", "all classes", f"the {-few.start} rarest")]
    records = {}
    for data, results in ("wrong labels", wrong), ("rare classes", rare):
        for r in results:
            records[f"{data}, {r.loss}, {r.optimizer}"] = comparison.record(r)
            every, rarest = (report.mean_std(accuracy(r, c)[-1], ".1f") for c in (EVERY, few))
            rate = f"{r.setting.learning_rate:g}"
            rows.append((data, r.loss, r.optimizer, rate, every, rarest if results is rare else ""))
    text = "\n".join(sentences(wrong, rare, few))
    report.write(config.out, records, report.markdown(rows), text)
    draw(config.out / "tour.png", wrong, rare, few)


def benchmarks() -> Iterator[str]:
    """The commands of the others, and the first lines of their docstrings."""
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        command = f"python -m benchmarks.{path.stem}"
        if command in doc:
            yield f"{command:34}{doc.splitlines()[0]}"


def main() -> None:
    config = comparison.read(Config, __doc__)
    train, test = comparison.load(config)
    images = comparison.on_device(config, train, test)
    parts = make_parts(config, train, test)
    sizes = [
        size
        for part in parts
        for temperatures in part.temperatures.values()
        for size in comparison.sizes(dataclasses.replace(config, temperatures=temperatures))
    ]
    with comparison.session(config, parts[1].draw, sizes) as trainer:
        results = [run(config, part, images, parts[1].groups, trainer) for part in parts]
        write(config, *results)
    print(f"The picture is {config.out / 'tour.png'}. The other benchmarks:\n")
    print(*benchmarks(), sep="\n")


if __name__ == "__main__":
    main()
