"""How pictures of the benchmarks look, and how they are saved."""

import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.engine import report

plt.rcParams |= {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.labelsize": "medium",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 110,
}


def save(figure: Figure, path: pathlib.Path) -> None:
    with report.replacing(path) as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def dots(panels: dict[str, dict[tuple[str, str], np.ndarray]], path: pathlib.Path) -> None:
    """A dot a seed, and a line at their mean: a row for each first name, a colour for each second.

    A panel has the figures of the seeds by both names.
    """
    figures = next(iter(panels.values()))
    names, forms = (list(dict.fromkeys(column)) for column in zip(*figures, strict=True))
    size = 1.5 + 3.5 * len(panels), 1.2 + 0.2 * len(names) * max(2, len(forms) - 1)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for part, (title, figures) in zip(axes[0], panels.items(), strict=True):
        for (name, form), x in figures.items():
            i = forms.index(form)
            y = names.index(name) + (i - (len(forms) - 1) / 2) * 0.8 / len(forms)
            part.scatter(x, np.full(len(x), y), 9, f"C{i}", linewidths=0, alpha=0.6)
            part.scatter(x.mean(), y, 90, f"C{i}", marker="|")
        part.set_xlabel(title)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    handles = [Line2D([], [], color=f"C{i}", marker="o", lw=0) for i in range(len(forms))]
    figure.legend(handles, forms, loc="outside upper center", ncols=3)
    save(figure, path)


def by_panel(
    panels: dict[str, list[Any]],
    curve: Callable[[Any], np.ndarray],
    path: pathlib.Path,
    *,
    y: str,
    scale: str = "linear",
) -> None:
    """Over the epochs, one panel a loss: SGD in dashes, ABSGD in full, its automatic λ with dots.

    A panel has results, whose ``optimizer`` is one of these.
    """
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    size, shared = (2.2 + 2.6 * columns, 0.8 + 2.2 * rows), dict(sharex=True, sharey=True)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, **shared)
    styles = {
        "SGD": {"ls": "--", "lw": 1.0},
        "ABSGD": {"ls": "-", "lw": 1.8},
        "ABSGD, automatic": {"ls": "-", "lw": 0.7, "marker": ".", "ms": 3},
    }
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid.flat[len(panels) - columns : len(panels)]:  # nothing is below these
        axes.tick_params(labelbottom=True)
    for axes, (title, results) in zip(grid.flat, panels.items(), strict=False):
        for result in results:
            values, style = curve(result), styles[result.optimizer]
            axes.plot(np.arange(1, 1 + len(values)), values, "C0", label=result.optimizer, **style)
        axes.set_title(title)
        axes.set_yscale(scale)
        axes.xaxis.get_major_locator().set_params(integer=True)
    drawn = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    figure.legend(drawn.values(), drawn, loc="outside right upper")
    figure.supxlabel("epoch")
    figure.supylabel(y)
    save(figure, path)
