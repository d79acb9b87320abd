"""Losses for noisy labels, each with SGD and with ABSGD at λ < 0.

    python -m benchmarks.noise

A share of the training labels is wrong. Learning rate, temperature and stages of each loss are
those with the best accuracy on a validation split, which is as noisy and held out of the training
data of other seeds; what is reported is the final epoch on the clean test split. AUROC says how
well the final weights of the training examples find the wrong labels.
"""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from sklearn.metrics import roc_auc_score

from absgd_jax import losses
from absgd_jax.data import flip_labels
from benchmarks import comparison, report
from benchmarks.comparison import Draw, Result, TEMPERATURE
from benchmarks.config import FROM_1, Must, POSITIVE
from benchmarks.training import Examples, Task

# Of logits z, labels y, class counts n and whether the second stage has begun.
LOSSES = {
    "cross_entropy": lambda z, y, n, late: optax.softmax_cross_entropy_with_integer_labels(z, y),
    "sce": lambda z, y, n, late: losses.symmetric_cross_entropy(z, y),
    "gce": lambda z, y, n, late: losses.generalized_cross_entropy(z, y),
    "truncated_gce": lambda z, y, n, late: losses.generalized_cross_entropy(
        z, y, truncation=jnp.where(late, 0.5, 0.0)
    ),
}


def is_noise(text: str) -> bool:
    kind, _, rate = text.partition(":")
    try:
        return kind in ("symmetric", "asymmetric") and 0 < float(rate) < 1
    except ValueError:
        return False


NOISE = Must("be symmetric or asymmetric and a share in (0, 1), such as symmetric:0.4", is_noise)


@dataclasses.dataclass(frozen=True)
class Config(comparison.Config):
    """Noisy labels."""

    out: pathlib.Path = pathlib.Path("out/noise")  # folder to write to
    methods: tuple[Literal[*LOSSES], ...] = tuple(LOSSES)  # losses
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (0.03, 0.1, 0.3, 1.0)  # to choose from
    # as in benchmarks.longtail
    temperatures: Annotated[tuple[str, ...], TEMPERATURE] = (
        *("-5", "-2", "-1"),
        *("0.2:-1", "0.2:-0.5"),
    )
    # symmetric or asymmetric, and the share of wrong labels
    noise: Annotated[tuple[str, ...], NOISE] = (
        *("symmetric:0.2", "symmetric:0.4", "symmetric:0.6"),
        "asymmetric:0.4",
    )
    examples: Annotated[int | None, FROM_1] = None  # training examples of a run; all, if not given


def make_draw(
    train: np.ndarray, test: np.ndarray, noise: str, size: int | None, validation: float
) -> Draw:
    """Splits of the labels, in two groups: those that are right, and those that are not."""
    kind, _, rate = noise.partition(":")
    classes = train.max() + 1

    def draw(seed: int, search: bool) -> tuple[Examples, Examples]:
        rng = np.random.default_rng(seed)
        index = rng.permutation(len(train))[:size].astype(np.int32)
        labels, wrong = flip_labels(
            train[index], float(rate), kind=kind, num_classes=classes, seed=rng
        )
        noisy = Examples(index, labels, wrong.astype(np.int32))
        if search:
            held_out = round(validation * len(index))
            return Examples(*(x[held_out:] for x in noisy)), Examples(
                *(x[:held_out] for x in noisy)
            )
        clean = np.arange(len(train), len(train) + len(test), dtype=np.int32)
        return noisy, Examples(clean, test, np.zeros_like(test))

    return draw


def auroc(result: Result, draw: Draw) -> np.ndarray:
    """Of finding the wrong labels, in percent, [seeds]."""
    # With λ < 0 the weights fall as the losses rise. A run that diverged finds nothing.
    scores = np.nan_to_num(result.trained.losses, nan=0.0)
    wrong = [draw(seed, False)[0].group for seed in range(len(scores))]
    return 100 * np.array([roc_auc_score(w, s) for w, s in zip(wrong, scores, strict=True)])


def draw_curves(axes: Axes, result: Result, style: dict[str, Any]) -> None:
    epochs = np.arange(1, len(result.accuracy) + 1)
    axes.plot(epochs, result.accuracy.mean(axis=(1, 2)), color="C0", **style)


def draw_mass(axes: Axes, result: Result, style: dict[str, Any]) -> None:
    mass = 100 * result.trained.history["mass"][:, :, 1].mean(axis=1)
    axes.plot(np.arange(1, len(mass) + 1), mass, color="C0", **style)


def write(config: Config, results: dict[tuple[str, str], list[Any]]) -> None:
    """``results`` are pairs of a result and its AUROC, by noise and loss."""
    figures = "accuracy", "worst class", "AUROC", "weight on wrong labels, %"
    rows = [("noise", "loss", "λ", "rate", *figures, "ESS", "diverged")]
    records = {}
    for key, pairs in results.items():
        for r, found in pairs:
            final = r.accuracy[-1]
            wrong = 100 * r.trained.history["mass"][-1, :, 1]
            columns = [final.mean(axis=1), final.min(axis=1), found, wrong]
            rows.append((*key, *comparison.row(r, columns)))
            records[" ".join((*key, r.optimizer))] = comparison.record(r) | {"auroc": found}
    report.write(config.out, records, report.markdown(rows))
    panels = {"\n".join(key): [r for r, _ in pairs] for key, pairs in results.items()}
    for name, draw, y in (
        ("curves", draw_curves, "test accuracy, %"),
        ("mass", draw_mass, "weight on wrong labels, %"),
    ):
        comparison.plot(panels, draw, config.out / f"{name}.png", x="epoch", y=y, colors={})
    comparison.plot_temperature(panels, config.out)


def main() -> None:
    config = comparison.read(Config, __doc__)
    train, test = comparison.load(config)
    classes = int(train.labels.max()) + 1
    images = comparison.on_device(config, train, test)
    draws = {
        noise: make_draw(train.labels, test.labels, noise, config.examples, config.validation)
        for noise in config.noise
    }
    results = {}
    tasks, sizes = len(draws) * len(config.methods), comparison.sizes(config)
    with comparison.session(config, draws[config.noise[0]], tasks, sizes) as trainer:
        for noise, draw in draws.items():
            for name in config.methods:
                label = f"{noise.replace(':', '-')}-{name}"
                task = Task(images, classes, 2, LOSSES[name])
                compared = comparison.compare(config, label, task, draw, trainer)
                pairs = [(r, auroc(r, draw)) for r in compared]
                results[noise.replace(":", " "), name] = pairs
                if jax.process_index() == 0:
                    write(config, results)


if __name__ == "__main__":
    main()
