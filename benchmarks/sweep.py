"""Temperatures side by side, with every γ, learning rate and seed, in one compiled program.

    python -m benchmarks.sweep

λ is a leaf of the optimiser's state, so that one compilation serves all values, and one call trains
them; those that tune themselves are another program. The accuracy is that on a validation split,
for this is what λ may be chosen by.
"""

import argparse
import itertools
import time
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import comparison, longtail, noise, options, report, training
from benchmarks.comparison import Setting
from benchmarks.training import Run, Task, Trained

TIMES = 3  # of one epoch, at once and one after another in turn


Swept = dict[Setting, Trained]  # of one loss; runs are seeds


def final_accuracy(trained: Trained) -> np.ndarray:
    """In percent, [seeds]."""
    return 100 * trained.history["accuracy"][-1].mean(axis=-1)


def make_settings(args: argparse.Namespace) -> list[Setting]:
    """Plain SGD at every rate, and every temperature with every rate and γ."""
    sgd = [Setting((), rate, args.gammas[0]) for rate in args.learning_rates]
    return sgd + [
        Setting(*each)
        for each in itertools.product(args.temperatures, args.learning_rates, args.gammas)
    ]


def columns(args: argparse.Namespace) -> list[tuple[float, float]]:
    return list(itertools.product(args.learning_rates, args.gammas))


def name_of(args: argparse.Namespace, column: tuple[float, float]) -> str:
    rate, gamma = column
    return f"rate {rate:g}" + (f", γ {gamma:g}" if len(args.gammas) > 1 else "")


def table(args: argparse.Namespace, results: dict[str, Swept]) -> list[tuple[str, ...]]:
    """A row for each loss and λ, and in it each rate and γ."""
    rows = [("loss", "λ", *(name_of(args, column) for column in columns(args)), "diverged")]
    for loss, swept in results.items():
        for stages in [(), *args.temperatures]:
            found = [swept.get(Setting(stages, *column)) for column in columns(args)]
            cells = [report.mean_std(final_accuracy(t), ".1f") if t else "" for t in found]
            runs = [t for t in found if t]
            diverged = sum(map(comparison.diverged, runs))
            name = str(Setting(stages, 0.0))
            rows.append((loss, name, *cells, f"{diverged} of {len(runs) * args.seeds}"))
    return rows


def plot(args: argparse.Namespace, results: dict[str, Swept]) -> None:
    """A panel for each loss, rate and γ: λ to the right, seeds downwards, accuracy as colour."""
    shape = len(results), len(columns(args))
    names = [str(Setting(stages, 0.0)) for stages in [(), *args.temperatures]]
    figure, grid = plt.subplots(
        *shape,
        figsize=(
            1.5 + (0.8 + 0.24 * len(names)) * shape[1],
            1 + (0.5 + 0.16 * args.seeds) * shape[0],
        ),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for (loss, swept), panels in zip(results.items(), grid, strict=True):
        for column, axes in zip(columns(args), panels, strict=True):
            # SGD has no γ, and stands beside all.
            sgd = Setting((), column[0], args.gammas[0])
            found = [sgd, *(Setting(stages, *column) for stages in args.temperatures)]
            accuracy = np.stack([final_accuracy(swept[setting]) for setting in found], axis=1)
            image = axes.imshow(accuracy, aspect="auto", vmin=np.nanmax(accuracy) - 10)
            axes.set_title(f"{loss}, {name_of(args, column)}", fontsize="small")
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
            axes.set_yticks([])
            figure.colorbar(image, ax=axes, extend="min")
    figure.supxlabel("λ", fontsize="medium")
    figure.supylabel("seed", fontsize="medium")
    figure.suptitle(
        "validation accuracy, %; colours end 10 points below the best", fontsize="small"
    )
    figure.savefig(args.out / "heatmap.png", dpi=110)
    plt.close(figure)


def compare_times(args: argparse.Namespace, task: Task, runs: list[Run]) -> dict[str, Any]:
    """Seconds of an epoch of all runs at once, and of the same runs one after another."""
    examples = len(runs[0].train.label)
    program = training.make_program(args, task, examples)
    stacked = {
        "at_once": [jax.tree.map(lambda *leaves: np.stack(leaves), *runs)],
        "one_after_another": [jax.tree.map(lambda x: x[None], run) for run in runs],
    }
    seconds: dict[str, list[float]] = {name: [] for name in stacked}
    compilation, prepared = {}, {}
    for name, groups in stacked.items():
        groups = [jax.device_put(group, training.sharding(args)) for group in groups]
        states = [jax.jit(jax.vmap(program.init))(group) for group in groups]
        epoch = jax.jit(jax.vmap(program.epoch, (0, 0, None, None)))
        start = time.perf_counter()
        compiled = epoch.lower(states[0], groups[0], task.images, 0).compile()
        compilation[name] = time.perf_counter() - start
        prepared[name] = compiled, list(zip(states, groups, strict=True))
    for _ in range(TIMES):
        for name, (compiled, pairs) in prepared.items():
            start = time.perf_counter()
            for state, group in pairs:
                jax.block_until_ready(compiled(state, group, task.images, 0))
            seconds[name].append(time.perf_counter() - start)
    return {"runs": len(runs), "seconds": seconds, "compilation": compilation}


def describe_times(times: dict[str, Any]) -> str:
    at_once, apart = (np.median(times["seconds"][k]) for k in ("at_once", "one_after_another"))
    one, each = (times["compilation"][k] for k in ("at_once", "one_after_another"))
    k = times["runs"]
    return (
        f"An epoch of {k} runs at once takes {at_once / apart:.2f} times that of the {k} one after "
        f"another (median of {TIMES}), and {at_once / apart * k:.1f} times that of one; the one "
        f"compilation takes {one / each:.2f} times that of a single run, which {k} would need."
    )


def main() -> None:
    parser = options.make_parser(__doc__, longtail.LOSSES | noise.LOSSES, seeds=2, out="out/sweep")
    grid = ("0.5", "1", "1.5", "2", "3", "5", "10", "20", "ess0.9", "0.5:ess0.9")
    parser.set_defaults(
        methods=["cross_entropy", "balanced_softmax"],
        learning_rates=[0.1],
        temperatures=[options.parse_stages(text) for text in grid],
    )
    add = parser.add_argument
    add(
        "--gammas",
        type=report.above_zero,
        nargs="+",
        default=[0.9],
        metavar="GAMMA",
        help="in (0, 1]",
    )
    add(
        "--imbalance",
        type=report.above_zero,
        default=0.05,
        help="images of the smallest class / largest",
    )
    add(
        "--noise",
        type=noise.parse_noise,
        metavar="KIND:RATE",
        help="wrong labels, in place of rare classes: symmetric or asymmetric, and their share",
    )
    add(
        "--examples",
        type=report.whole_number(1),
        help="training examples of a run with wrong labels; all, if not given",
    )
    add(
        "--timed",
        type=report.whole_number(0),
        default=16,
        help="runs whose time is compared; 0 for none",
    )
    args, train, test = options.parse(parser)
    labels = train.labels, test.labels
    classes = int(train.labels.max()) + 1
    if args.noise:
        size = min(args.examples or len(train.labels), len(train.labels))
        examples = noise.make_examples(*labels, args.noise, size, args.validation)
        losses, groups = noise.LOSSES, 2
    else:
        examples = longtail.make_examples(*labels, args.imbalance, args.validation)
        losses, groups = longtail.LOSSES, classes
    if unknown := set(args.methods) - set(losses):
        parser.error(f"--methods must be of {', '.join(losses)} here, got {', '.join(unknown)}")
    images = comparison.on_device(args, train, test)
    source = comparison.Source(images, classes, groups, examples)
    comparison.begin(parser, args, source)

    settings = make_settings(args)
    programs = list(comparison.programs(settings).values())
    seeds = range(comparison.SEARCH_SEED, comparison.SEARCH_SEED + args.seeds)
    results, times = {}, None
    sizes = [len(group) * args.seeds for group in programs]
    with comparison.progress(args, len(args.methods), sizes) as bar:
        for name in args.methods:
            kind = {"loss": losses[name], "source": source, "normalized": name == "ldam_drw"}
            if args.timed and times is None:
                task, runs = comparison.prepare(args, programs[0], seeds, search=True, **kind)
                times = compare_times(args, task, runs[: args.timed])
            results[name] = comparison.train(
                args, name, settings, seeds, bar=bar, search=True, **kind
            )
            if jax.process_index() == 0:
                write(args, results, times)


def write(
    args: argparse.Namespace, results: dict[str, Swept], times: dict[str, Any] | None
) -> None:
    records: dict[str, Any] = {
        f"{loss} {setting}, rate {setting.learning_rate:g}, γ {setting.gamma:g}": {
            "accuracy": final_accuracy(trained),
            "diverged": comparison.diverged(trained),
            "temperature": trained.history["temperature"].T,
        }
        for loss, swept in results.items()
        for setting, trained in swept.items()
    }
    note = ""
    if times:
        records["times"] = times
        note = describe_times(times)
    report.write(args, records, table(args, results), note)
    plot(args, results)


if __name__ == "__main__":
    main()
