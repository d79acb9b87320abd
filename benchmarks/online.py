"""Online learning under a drifting class prior: each batch is predicted, then learnt, once.

    python -m benchmarks.online

At time t in [0, 1) of a stream the share of class c is

    p_c(t) ∝ ρ^((1 - cos 2π(t - r_c / C)) / 2)

where the ranks r_c are drawn anew for every seed: each class goes from most frequent to rarest and
back, each at its own time. The losses are balanced softmax, and differ in the class counts alone:

    cross_entropy  equal ones
    stale prior    the mean of p over the first tenth of the stream
    running        losses.running_counts
    arb            the counts of the batch
    true prior     p, which is not known in practice

Balanced accuracy is the mean recall of the classes within a tenth of the stream, averaged over the
tenths. The stream as a whole would judge a class by the time when it is frequent, and a bet on the
frequent classes would pay. Learning rate, λ and the memory of the running counts are those with the
best balanced accuracy on streams of other seeds; all are drawn from the training split.
"""

import dataclasses
import functools
import math
import pathlib
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from tqdm import tqdm

from absgd_jax import absgd, losses, target_ess, tilt
from benchmarks.engine import datasets, layers, plots, report
from benchmarks.engine.comparison import diverged
from benchmarks.engine.config import ABOVE_0, FROM_1, INSIDE, POSITIVE, read, refusing, whole_from
from benchmarks.engine.config import Config as BaseConfig
from benchmarks.engine.search import search, SEEDS, seeds_of

LOSSES = ("cross_entropy", "stale prior", "running", "arb", "true prior")
OPTIMIZERS = ("SGD", "ABSGD", "ABSGD, automatic")
RARE = 0.3  # share of the classes that are rare at a time
TENTHS = 10
EVERY_TENTH = whole_from(TENTHS)


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """The streams, and what to choose from."""

    out: pathlib.Path = pathlib.Path("out/online")  # folder to write to
    dataset: Literal[*datasets.NAMES] = "digits"  # what the streams are drawn from
    data_dir: pathlib.Path | None = None  # folder with the files of the data set
    examples: Annotated[int, EVERY_TENTH] = 1280  # of a stream; a multiple of every batch size
    batch_sizes: Annotated[tuple[int, ...], FROM_1] = (4, 16, 64)  # each is a part of the results
    imbalance: Annotated[float, ABOVE_0] = 0.02  # share of the rarest class / most frequent, ρ
    hidden: Annotated[int, FROM_1] = 64  # width of the network's one hidden layer
    seeds: Annotated[int, SEEDS] = 10  # streams that are reported
    search_seeds: Annotated[int, FROM_1] = 2  # streams of every setting of the search
    # to choose from
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (0.01, 0.03, 0.1, 0.3, 1.0)
    temperatures: Annotated[tuple[float, ...], POSITIVE] = (1.0, 5.0, 20.0)  # λ
    memories: Annotated[tuple[float, ...], POSITIVE] = (16, 64)  # of running counts, in examples
    ess: Annotated[float, INSIDE] = 0.9  # effective sample size of the automatic λ

    def __post_init__(self) -> None:
        super().__post_init__()
        for n in self.batch_sizes:
            if self.examples % n:
                raise ValueError(f"--examples must be a multiple of {n}, got {self.examples}")


class Stream(NamedTuple):
    index: np.ndarray  # [N], of the images
    labels: np.ndarray  # [N]
    prior: np.ndarray  # [N, C], what each example was drawn by


class Setting(NamedTuple):
    """What a search chooses from."""

    loss: str
    optimizer: str
    learning_rate: float
    temperature: float  # or the target of the automatic one
    memory: float | None  # of the running counts


Measures = dict[Setting, dict[str, np.ndarray]]  # whose first axis is that of the seeds


def make_prior(examples: int, ranks: np.ndarray, imbalance: float) -> np.ndarray:
    time = np.arange(examples)[:, None] / examples
    shares = imbalance ** ((1 - np.cos(2 * np.pi * (time - ranks / len(ranks)))) / 2)
    return shares / shares.sum(axis=1, keepdims=True)


def draw(config: Config, labels: np.ndarray, seed: int) -> Stream:
    """A stream in which an image comes again only when all of its class have come."""
    rng, classes = np.random.default_rng(seed), int(labels.max()) + 1
    prior = make_prior(config.examples, rng.permutation(classes), config.imbalance)
    drawn = (rng.random((config.examples, 1)) > prior.cumsum(axis=1)[:, :-1]).sum(axis=1)
    index = np.empty(config.examples, np.int32)
    for c in range(classes):
        index[drawn == c] = np.resize(rng.permutation(np.flatnonzero(labels == c)), sum(drawn == c))
    return Stream(index, drawn.astype(np.int32), prior.astype(np.float32))


def is_rare(stream: Stream) -> np.ndarray:
    """The examples whose class was one of the rarest when they came."""
    share = np.take_along_axis(stream.prior, stream.labels[..., None], axis=-1)
    return np.sum(stream.prior < share, axis=-1) < round(RARE * stream.prior.shape[-1])


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, None))
def running(batches: jax.Array, zeros: jax.Array, decay: float) -> jax.Array:
    """The counts after each batch of labels [seeds, steps, n]."""

    def step(counts, labels):
        counts = losses.running_counts(counts, labels, decay=decay)
        return counts, counts

    return jax.lax.scan(step, zeros, batches)[1]


def class_counts(setting: Setting, streams: Stream, n: int) -> jax.Array:
    """What each batch of n is learnt by, [seeds, steps, C]."""
    seeds, examples, classes = streams.prior.shape
    prior = streams.prior.reshape(seeds, -1, n, classes).mean(axis=2)
    if setting.loss == "cross_entropy":
        return np.ones_like(prior)
    if setting.loss == "true prior":
        return prior
    if setting.loss == "stale prior":
        stale = streams.prior[:, : -(-examples // TENTHS)].mean(axis=1, keepdims=True)
        return np.broadcast_to(stale, prior.shape)
    decay = 0.0 if setting.loss == "arb" else math.exp(-n / setting.memory)
    return running(streams.labels.reshape(seeds, -1, n), np.zeros(classes, np.float32), decay)


@functools.partial(jax.jit, static_argnames=("hidden", "automatic"))
def train(images, batches, counts, rates, temperatures, keys, *, hidden, automatic):
    """Which predictions were right [settings, seeds, N], and which runs stayed finite.

    ``batches`` are indices and labels [seeds, steps, n], ``counts`` is [settings, seeds, steps, C].
    """

    def run(batches, counts, rate, temperature, key):
        tx = absgd(rate, target_ess(temperature) if automatic else temperature)

        def loss_fn(params, sums, opt_state, batch):
            index, labels, counts = batch
            logits = layers.predict(params, images[index])
            each = losses.balanced_softmax(logits, labels, class_counts=counts)
            # By parameters that have not yet learnt from these labels.
            correct = jnp.argmax(logits, axis=-1) == labels
            return tilt(each, opt_state, sums).mean(), (correct, jnp.isfinite(each).all())

        params = layers.init(key, (images.shape[1], hidden, counts.shape[1]))
        _, (correct, finite) = layers.learn(tx, loss_fn, params, (*batches, counts))
        return correct.ravel(), finite.all()

    seeds = jax.vmap(run, (0, 0, None, None, 0))
    return jax.vmap(seeds, (None, 0, 0, 0, None))(batches, counts, rates, temperatures, keys)


def mean_recall(correct: np.ndarray, labels: np.ndarray) -> float:
    """Of the classes that came, in percent."""
    return 100 * np.mean([correct[labels == c].mean() for c in np.unique(labels)])


def measure(correct: np.ndarray, finite: bool, stream: Stream) -> dict[str, Any]:
    """What one run did on its stream."""
    pairs = (np.array_split(x, TENTHS) for x in (correct, stream.labels))
    course = [mean_recall(*pair) for pair in zip(*pairs, strict=True)]
    return {
        "balanced": np.mean(course),
        "whole_stream": mean_recall(correct, stream.labels),
        "rare": 100 * correct[is_rare(stream)].mean(),
        "diverged": diverged(finite, course[-1] / 100, stream.prior.shape[1]),
        "course": course,
    }


def run(
    config: Config, images: jax.Array, labels: Any, n: int, grid: list[Setting], searching: bool
) -> Measures:
    """What becomes of every setting."""
    seeds = seeds_of(config, searching)
    drawn = [draw(config, labels, seed) for seed in seeds]
    streams = Stream(*map(np.stack, zip(*drawn, strict=True)))
    batches = [x.reshape(len(seeds), -1, n) for x in (streams.index, streams.labels)]
    keys = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    found = {}
    for automatic in (False, True):
        group = [s for s in grid if (s.optimizer == OPTIMIZERS[2]) == automatic]
        counts = np.stack([class_counts(s, streams, n) for s in group])
        rates, temperatures = np.float32([(s.learning_rate, s.temperature) for s in group]).T
        args = images, batches, counts, rates, temperatures, keys
        results = train(*args, hidden=config.hidden, automatic=automatic)
        for setting, correct, finite in zip(group, *map(np.asarray, results), strict=True):
            runs = [measure(*r) for r in zip(correct, finite, drawn, strict=True)]
            found[setting] = report.stack(runs)
    return {setting: found[setting] for setting in grid}


def grids(config: Config) -> dict[tuple[str, str], list[Setting]]:
    """What there is to choose from, for every loss with SGD, ABSGD and its automatic λ."""
    found = {}
    temperatures = (math.inf,), config.temperatures, (config.ess,)
    for loss, (optimizer, lams) in product(LOSSES, zip(OPTIMIZERS, temperatures, strict=True)):
        memories = config.memories if loss == "running" else (None,)
        choices = product(config.learning_rates, lams, memories)
        found[loss, optimizer] = [Setting(loss, optimizer, *choice) for choice in choices]
    return found


def most_accurate(_: tuple[str, str], grid: Measures) -> Setting:
    return max(grid, key=lambda setting: grid[setting]["balanced"].mean())


def table(results: dict[int, Measures]) -> str:
    versus = "over cross-entropy", "over λ = ∞"
    figures = "balanced", *versus, "rare", *versus, "whole stream", "diverged"
    rows = [("batch", "loss", "λ", "rate", *figures)]
    for n, found in results.items():
        plain = {s.loss: measures for s, measures in found.items() if s.optimizer == "SGD"}
        for s, measures in found.items():
            loss = f"{s.loss}, {s.memory:g}" if s.memory else s.loss
            lam = "ESS " * (s.optimizer == OPTIMIZERS[2]) + f"{s.temperature:g}"
            row = [str(n), loss, lam.replace("inf", "∞"), f"{s.learning_rate:g}"]
            for name in ("balanced", "rare"):
                others = plain[LOSSES[0]][name], plain[s.loss][name]
                row += report.against(measures[name], *others)
            row.append(report.mean_std(measures["whole_stream"], ".1f"))
            rows.append((*row, report.share(measures["diverged"])))
    return report.markdown(rows)


def plot(results: dict[int, Measures], path: pathlib.Path) -> None:
    """Balanced accuracy by tenths, a panel for each batch size."""
    size = 2.5 + 3 * len(results), 3.5
    figure, panels = plt.subplots(*(1, len(results)), figsize=size, sharey=True, squeeze=False)
    styles = dict(zip(OPTIMIZERS, ("-", ":"), strict=False))  # automatic λ would be too much
    time = (np.arange(TENTHS) + 0.5) / TENTHS
    for (n, found), axes in zip(results.items(), panels[0], strict=True):
        for s, measures in found.items():
            if s.optimizer in styles:
                style = {"color": f"C{LOSSES.index(s.loss)}", "ls": styles[s.optimizer]}
                axes.plot(time, measures["course"].mean(axis=0), **style)
        axes.set_title(f"batches of {n}")
    lines = [Line2D([], [], color="black", ls=ls, label=name) for name, ls in styles.items()]
    lines += [Line2D([], [], color=f"C{i}", lw=4, label=name) for i, name in enumerate(LOSSES)]
    figure.legend(handles=lines, loc="outside right upper")
    figure.supxlabel("share of the stream")
    figure.supylabel("balanced accuracy, %")
    plots.save(figure, path)


def main() -> None:
    config = read(Config, __doc__)
    with refusing():
        data, _ = datasets.load(config.dataset, config.data_dir)
    images = data.images.reshape(len(data.images), -1).astype(np.float32)
    images = jnp.asarray(images / images.max())
    results, records = {}, {}
    with report.folder(config):
        for n in tqdm(config.batch_sizes, unit="batch size"):
            trained = functools.partial(run, config, images, data.labels, n)
            found = search(grids(config), trained, most_accurate)
            results[n] = found.final
            for key, grid in grids(config).items():
                setting = found.chosen[key]
                seen = [(s, found.seen[s]["balanced"]) for s in grid if s in found.seen]
                seen = [{**s._asdict(), "balanced": x} for s, x in seen]
                record = {"setting": setting._asdict(), "validation": seen, **found.final[setting]}
                records[" ".join((str(n), *key))] = record
        text = table(results)
        report.write(config.out, records, text)
        plot(results, config.out / "online.png")
    print(text)


if __name__ == "__main__":
    main()
