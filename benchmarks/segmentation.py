"""Semantic segmentation of synthetic scenes whose object classes are unequally frequent.

    python -m benchmarks.segmentation

A scene has images of a data set as objects, which vary in size and brightness and may overlap, on a
texture of noise. Which classes are rare is drawn anew for every seed. The pixels just around an
object have no label. A small U-Net is trained with these losses of a pixel:

    cross_entropy     with equal weights
    median_frequency  cross-entropy times a weight of the class, the median of f over its f, which
                      is its share of the pixels of the scenes that it is in (Eigen & Fergus 2015,
                      arXiv 1411.4734)
    focal             losses.focal
    dice              cross-entropy, plus the soft Dice loss of the scene
    balanced_softmax  by the class counts of all pixels to train on
    arb               ARB-Loss: by those of the batch's pixels

each with λ = ∞, a λ, and one that tunes itself, which weight single pixels or, by the mean over its
pixels, whole scenes. The optimizer is Adam, whose steps don't depend on the scale of a loss.

All object classes are equally frequent in the scenes to evaluate on, so that IoU, intersection over
union, is as exact for the rare ones. The pixels of a class then count in it by the frequency of the
class in training, as they would in scenes that are drawn alike; in what is called balanced they
count as they are. On scenes of other seeds, made from the training split alone, the mean IoU at
λ = ∞ chooses the learning rate of a loss, and then the mean IoU at this rate λ.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.colors import BoundaryNorm, ListedColormap
from scipy import ndimage
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from absgd_jax import abadam, losses, Sums, target_ess, tilt, two_stage
from benchmarks.engine import comparison, datasets, plots, report
from benchmarks.engine.comparison import diverged, SGD, TEMPERATURE
from benchmarks.engine.config import ABOVE_0, FROM_1, Must, OR_NONE, POSITIVE, read, refusing
from benchmarks.engine.config import Config as BaseConfig
from benchmarks.engine.datasets import Split
from benchmarks.engine.search import search, SEARCH_SEED, SEEDS, seeds_of

SIZE = 64  # of a scene
OBJECT = 13, 18  # the smallest and the largest
EVALUATED_AT_ONCE = 50
SHOWN = 5  # scenes in the picture
RARE = 0.3  # share of the object classes
UNITS = "pixel", "scene"

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Prior(NamedTuple):
    """What losses are told of the scenes to train on."""

    counts: Any  # [C], float32: pixels of each class
    weights: Any  # [C], float32: by median frequency


def dice(logits: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
    """One minus the Dice coefficient of each scene, a mean over all classes."""
    p, q = jax.nn.softmax(logits), jax.nn.one_hot(labels, logits.shape[-1])
    both, either = (jnp.sum(x, axis=(1, 2), where=where[..., None]) for x in (p * q, p + q))
    # Ones, so that a class that is neither there nor predicted has no loss.
    return 1 - jnp.mean((2 * both + 1) / (either + 1), axis=-1)


# Of logits z [B, H, W, C], labels y [B, H, W], their mask m and a prior n.
Loss = Callable[[jax.Array, jax.Array, jax.Array, Prior], jax.Array]
LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda z, y, m, n: cross_entropy(z, y),
    "median_frequency": lambda z, y, m, n: n.weights[y] * cross_entropy(z, y),
    "focal": lambda z, y, m, n: losses.focal(z, y, where=m),
    # So that it can be weighted as the others are: the mean over pixels is the sum of the two.
    "dice": lambda z, y, m, n: cross_entropy(z, y) + dice(z, y, m)[:, None, None],
    "balanced_softmax": lambda z, y, m, n: losses.balanced_softmax(
        z, y, class_counts=n.counts, where=m
    ),
    "arb": lambda z, y, m, n: losses.arb(z, y, where=m),
}

ONE = Must("have one λ, such as 5 or 0.8:5", lambda temperature: "," not in temperature)


@dataclasses.dataclass(frozen=True)
class Config(BaseConfig):
    """The scenes, how to train on them, and what to choose from."""

    out: pathlib.Path = pathlib.Path("out/segmentation")  # folder to write to
    resume: bool = False  # go on with what --out holds
    dataset: Literal["digits", "fashion-mnist", "idx"] = "digits"  # whose images are the objects
    data_dir: pathlib.Path | None = None  # folder with the files of the data set
    scenes: Annotated[int, FROM_1] = 128  # to train on
    evaluated: Annotated[int, FROM_1] = 100  # scenes to evaluate on
    objects: Annotated[int, FROM_1] = 10  # in a scene
    imbalance: Annotated[float, ABOVE_0] = 0.01  # objects of the rarest class / most frequent
    methods: tuple[Literal[*LOSSES], ...] = ("cross_entropy", "arb")  # losses
    epochs: Annotated[int, FROM_1] = 12  # passes over the scenes
    batch_size: Annotated[int, FROM_1] = 4  # scenes a step
    seeds: Annotated[int, SEEDS] = 5  # number of seeds that are reported
    search_seeds: Annotated[int, FROM_1] = 1  # seeds of every setting of the search
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (0.003, 0.01)  # to choose from
    # of pixels, to choose from, as in benchmarks.longtail: 5 for λ = 5, ess0.9 for one that tunes
    # itself
    pixel_temperatures: Annotated[tuple[str, ...], TEMPERATURE, ONE, OR_NONE] = ("ess0.9",)
    scene_temperatures: Annotated[tuple[str, ...], TEMPERATURE, ONE, OR_NONE] = ("2",)  # of scenes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size > self.scenes:
            raise ValueError(
                f"--batch-size must not exceed the {self.scenes} scenes, got {self.batch_size}"
            )
        for unit in UNITS:
            given = getattr(self, f"{unit}_temperatures")
            comparison.check_stages(f"--{unit}-temperatures", given, self.epochs)


class Scenes(NamedTuple):
    pixels: np.ndarray  # [N, SIZE, SIZE, 1], float32
    labels: np.ndarray  # [N, SIZE, SIZE], int8: 0 is the background, and -1 no label


class Drawn(NamedTuple):
    """What a seed trains and is evaluated on."""

    train: Scenes
    evaluation: Scenes
    counts: np.ndarray  # objects to train on of each class, from the most frequent


class Setting(NamedTuple):
    """What a search chooses from."""

    loss: str
    unit: str  # that is weighted
    temperature: str
    learning_rate: float

    def __str__(self) -> str:
        if self.temperature == SGD:
            return "∞"
        return f"{comparison.in_words(self.temperature)}, per {self.unit}".replace("ess", "ESS ")

    @property
    def optimizer(self) -> str:
        if self.temperature == SGD:
            return "λ = ∞"
        automatic = ", automatic" * comparison.is_automatic(self.temperature)
        return f"λ per {self.unit}{automatic}"


Measures = dict[str, np.ndarray]  # whose first axis is that of the seeds


def make_scene(rng: np.random.Generator, images: np.ndarray, labels: np.ndarray) -> Scenes:
    """One scene of images [n, H, W, 1]; the later ones cover the earlier."""
    noise = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), rng.uniform(0.5, 3), mode="wrap")
    pixels = rng.uniform(0.1, 0.3) + 0.06 * noise / noise.std()
    seen = np.zeros((SIZE, SIZE), np.int8)
    for image, label in zip(images, labels, strict=True):
        size = rng.integers(OBJECT[0], OBJECT[1] + 1)
        grey = image[..., 0] / image.max()
        grey = ndimage.zoom(grey, size / np.array(grey.shape), order=1)
        top, left = rng.integers(0, SIZE - size + 1, 2)
        there = np.zeros(seen.shape, bool)
        there[top : top + size, left : left + size] = grey > 0.2
        seen[ndimage.binary_dilation(there)] = -1
        seen[there] = label
        pixels[there] = rng.uniform(0.6, 1) * grey[grey > 0.2]
    return Scenes(np.float32(pixels[..., None]), seen)


def make_scenes(rng: np.random.Generator, data: Split, counts: np.ndarray, objects: int) -> Scenes:
    """With so many objects of each class, from label 1 on, spread at random over the scenes."""
    pools = [rng.permutation(np.flatnonzero(data.labels == k + 1)) for k in range(len(counts))]
    index = np.concatenate([np.resize(*x) for x in zip(pools, counts, strict=True)])
    made = [
        make_scene(rng, data.images[part], data.labels[part])
        for part in rng.permutation(index).reshape(-1, objects)
    ]
    return Scenes(*map(np.stack, zip(*made, strict=True)))


def object_counts(total: int, classes: int, imbalance: float) -> np.ndarray:
    """In about a geometric row, one at least, with that sum."""
    share = imbalance ** (np.arange(classes) / (classes - 1))
    counts = np.maximum(1, np.round(total * share / share.sum())).astype(int)
    counts[0] += total - counts.sum()
    if counts[0] < 1:
        raise ValueError(f"--scenes and --evaluated must hold {classes} objects, got {total}")
    return counts


def draw(c: Config, train: Split, test: Split, seed: int) -> Drawn:
    """Scenes that share no image. A class is its rank by frequency, and the background is 0."""
    rng, classes = np.random.default_rng(seed), int(train.labels.max()) + 1
    if seed >= SEARCH_SEED:
        halves = train_test_split(*train, test_size=0.5, stratify=train.labels, random_state=seed)
        train, test = Split(*halves[::2]), Split(*halves[1::2])
    label = 1 + rng.permutation(classes)
    counts = object_counts(c.scenes * c.objects, classes, c.imbalance)
    equal = object_counts(c.evaluated * c.objects, classes, 1)
    train, test = (Split(s.images, label[s.labels]) for s in (train, test))
    made = make_scenes(rng, train, counts, c.objects), make_scenes(rng, test, equal, c.objects)
    return Drawn(*made, counts)


def make_prior(labels: np.ndarray, classes: int) -> Prior:
    pixels = np.stack([np.sum(labels == k, axis=(1, 2)) for k in range(classes)])  # [C, N]
    total = pixels.sum(axis=1)
    area = np.sum((pixels > 0) * pixels.sum(axis=0), axis=1)
    frequency = np.where(total > 0, total / np.maximum(area, 1), 1)  # 1 of what others cover whole
    return Prior(np.float32(total), np.float32(np.median(frequency) / frequency))


def to_depth(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H / 2, W / 2, 4 C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // 2, w // 2, 4 * c)


def to_space(x: jax.Array) -> jax.Array:
    """The inverse."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, 2 * h, 2 * w, c // 4)


class Block(nnx.Module):
    """3x3 convolutions, normalised."""

    def __init__(self, *channels: int, rngs: nnx.Rngs):
        pairs = list(itertools.pairwise(channels))
        convs = [nnx.Conv(*pair, (3, 3), use_bias=False, rngs=rngs) for pair in pairs]
        self.convs = nnx.List(convs)
        self.norms = nnx.List([nnx.GroupNorm(pair[1], 4, rngs=rngs) for pair in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return x


class UNet(nnx.Module):
    """Of three levels, the finest of which has a pixel for four of the scene."""

    def __init__(self, classes: int, *, rngs: nnx.Rngs):
        self.down = nnx.List([Block(*n, rngs=rngs) for n in ((4, 16), (16, 32, 32), (32, 32, 32))])
        self.skip = nnx.List([nnx.Linear(*n, rngs=rngs) for n in ((32, 32), (32, 16))])
        self.up = nnx.List([Block(n, n, rngs=rngs) for n in (32, 16)])
        self.head = nnx.Linear(16, 4 * classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [B, H, W, classes] of scenes [B, H, W, 1]."""
        fine, middle, coarse = self.down
        x = fine(to_depth(x))
        kept = [x]
        x = middle(nnx.max_pool(x, (2, 2), strides=(2, 2)))
        kept.append(x)
        x = coarse(nnx.max_pool(x, (2, 2), strides=(2, 2)))
        for linear, block in zip(self.skip, self.up, strict=True):
            x = linear(x).repeat(2, axis=1).repeat(2, axis=2)
            x = block(x + kept.pop())
        return to_space(self.head(x))


class Program(NamedTuple):
    """What is compiled in, and common to many runs."""

    graph: nnx.GraphDef
    loss: str
    unit: str
    automatic: bool
    steps: int


class Run(NamedTuple):
    """What the runs of a program differ in."""

    learning_rate: Any
    temperature: Any  # λ, or the target of the automatic one, ...
    start: Any  # ... from this step on
    prior: Prior


def make_optimizer(program: Program, run: Run) -> optax.GradientTransformationExtraArgs:
    temperature = target_ess(run.temperature) if program.automatic else run.temperature
    rate = optax.cosine_decay_schedule(run.learning_rate, program.steps)
    return abadam(rate, two_stage(temperature, run.start))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def train_step(program: Program, run: Run, params, opt_state, x, y):
    """Parameters and state after a batch, and the mean of its losses."""
    where = y >= 0
    y = jnp.where(where, y, 0).astype(jnp.int32)

    def loss_fn(params, sums):
        z = nnx.merge(program.graph, params)(x)
        each, mask = LOSSES[program.loss](z, y, where, run.prior), where
        if program.unit == "scene":
            each, mask = jnp.mean(each, axis=(1, 2), where=mask), jnp.any(mask, axis=(1, 2))
        return jnp.mean(tilt(each, opt_state, sums), where=mask)

    loss, (grads, sums) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, Sums())
    updates, opt_state = make_optimizer(program, run).update(grads, opt_state, params, sums=sums)
    return optax.apply_updates(params, updates), opt_state, loss


@functools.partial(jax.jit, static_argnums=0)
def predict(graph: nnx.GraphDef, params: Any, x: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(x).argmax(axis=-1).astype(jnp.int8)


def count(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """The pixels that have a label, by it and by what is predicted, [C, C]."""
    there = labels >= 0
    pairs = labels[there].astype(int) * classes + predicted[there]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def train(c: Config, setting: Setting, seed: int, drawn: Drawn) -> dict[str, np.ndarray]:
    """What becomes of one run: in a loop that is compiled, convolutions are slow on CPUs."""
    classes, steps = len(drawn.counts) + 1, c.scenes // c.batch_size
    graph, params = nnx.split(UNet(classes, rngs=nnx.Rngs(seed)))
    automatic = comparison.is_automatic(setting.temperature)
    program = Program(graph, setting.loss, setting.unit, automatic, c.epochs * steps)
    [(share, temperature)] = comparison.stages(setting.temperature)
    numbers = np.float32(setting.learning_rate), np.float32(temperature)
    start = np.int32(round(share * c.epochs) * steps)
    run = jax.device_put(Run(*numbers, start, make_prior(drawn.train.labels, classes)))
    opt_state = make_optimizer(program, run).init(params)
    rng, means = np.random.default_rng([seed, 1]), []
    for _ in range(c.epochs):
        for batch in rng.permutation(c.scenes)[: steps * c.batch_size].reshape(steps, -1):
            scenes = (x[batch] for x in drawn.train)
            params, opt_state, mean = train_step(program, run, params, opt_state, *scenes)
            means.append(mean)
    x, y = drawn.evaluation
    parts = [x[i : i + EVALUATED_AT_ONCE] for i in range(0, len(x), EVALUATED_AT_ONCE)]
    predicted = np.concatenate([predict(graph, params, part) for part in parts])
    return {
        "mean_loss": np.reshape(means, (c.epochs, steps)).mean(axis=1),
        "confusion": count(y, predicted, classes),
        "predicted": predicted[:SHOWN],
    }


def ious(confusion: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of the classes, in percent, where the pixels of a class have its weight."""
    weighted = confusion * weights[:, None]
    both = weighted.diagonal()
    union = weighted.sum(axis=0) + weighted.sum(axis=1) - both
    return 100 * both / np.maximum(union, 1e-9)


def measure(trained: dict[str, np.ndarray], counts: np.ndarray) -> dict[str, Any]:
    """What one run did; ``counts`` are those of the objects that it was trained on."""
    confusion, classes = trained["confusion"], len(counts) + 1
    iou = ious(confusion, np.array([1, *counts / counts.mean()]))
    recall = np.mean(confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1))
    return {
        "mean": iou.mean(),
        "rare": iou[-round(RARE * len(counts)) :].mean(),
        "background": iou[0],
        "balanced": ious(confusion, np.ones(classes)).mean(),
        "pixels": 100 * confusion.trace() / confusion.sum(),
        "diverged": diverged(np.isfinite(trained["mean_loss"]).all(), recall, classes),
        "iou": iou,
        "predicted": trained["predicted"],
    }


def run(
    c: Config, draw: Any, started: str, bar: tqdm, settings: list[Setting], searching: bool
) -> dict[Setting, Measures]:
    """What becomes of every setting. Runs in ``c.out`` since ``started`` are not repeated."""
    measures = {}
    for setting in settings:
        runs = []
        for seed in seeds_of(c, searching):
            name = "-".join(map(str, (*setting, seed))).replace(":", "+")
            path, drawn = c.out / "runs" / f"{name}.npz", draw(seed)
            found = report.load_part(path, started)
            if not found:
                found = train(c, setting, seed, drawn)
                report.save_part(path, started, found)
            runs.append(measure(found, drawn.counts))
            bar.update()
        measures[setting] = report.stack(runs)
    return measures


def temperatures(c: Config) -> list[tuple[str, list[str]]]:
    """What to choose λ from, as often as one is chosen: with its unit."""
    grids, given = [("pixel", [SGD])], (c.pixel_temperatures, c.scene_temperatures)
    for (unit, lams), automatic in product(zip(UNITS, given, strict=True), (False, True)):
        grids.append((unit, [t for t in lams if comparison.is_automatic(t) == automatic]))
    return [grid for grid in grids if grid[1]]


def compare(
    c: Config, loss: str, run: Callable[[list[Setting], bool], dict[Setting, Measures]]
) -> tuple[dict[Setting, Measures], dict[Setting, np.ndarray]]:
    """What a loss does in the settings that were chosen for it, and what chose them."""

    def best(_: str, grid: Mapping[Setting, Measures]) -> Setting:
        return max(grid, key=lambda s: grid[s]["mean"].mean())

    final, seen, rates = {}, {}, c.learning_rates
    for unit, lams in temperatures(c):  # the first is λ = ∞, which chooses the rate for all
        found = search({unit: [Setting(loss, unit, *x) for x in product(lams, rates)]}, run, best)
        rates = (found.chosen[unit].learning_rate,)
        final |= found.final
        seen |= {s: measures["mean"] for s, measures in found.seen.items()}
    return final, seen


def table(results: dict[Setting, Measures]) -> str:
    """Gains are paired by seed, ± their standard error."""
    first = next(iter(results))
    plain = {s.loss: s for s in results if s.temperature == SGD}
    gains = f"over {first.loss}", "over λ = ∞"
    rows = [("loss", "λ", "rate", "mean IoU", *gains, "rare", *gains)]
    rows[0] += "background", "balanced", "pixels", "diverged"
    for s, measures in results.items():
        row = [s.loss, str(s), f"{s.learning_rate:g}"]
        for name in ("mean", "rare"):
            others = (results[other][name] for other in (first, plain[s.loss]))
            row += report.against(measures[name], *others)
        row += [report.mean_std(measures[k], ".1f") for k in ("background", "balanced", "pixels")]
        rows.append((*row, report.share(measures["diverged"])))
    return report.markdown(rows)


def plot_scenes(results: dict[Setting, Measures], scenes: Scenes, path: pathlib.Path) -> None:
    """The first ones of the first seed, and what each loss makes of them at λ = ∞."""
    columns = {"scene": scenes.pixels[..., 0], "truth": scenes.labels}
    columns |= {
        s.loss: measures["predicted"][0] for s, measures in results.items() if s.temperature == SGD
    }
    shown = len(next(reversed(columns.values())))
    colors = ["white", "#333333", *plt.colormaps["tab20"].colors]
    labels = ListedColormap(colors), BoundaryNorm(np.arange(-1.5, len(colors) - 1), len(colors))
    size = 1.25 * len(columns), 0.3 + 1.25 * shown
    figure, axes = plt.subplots(shown, len(columns), figsize=size, squeeze=False)
    for part, (name, images) in zip(axes.T, columns.items(), strict=True):
        part[0].set_title(name, fontsize="small")
        for i, ax in enumerate(part):
            cmap, norm = ("gray", None) if name == "scene" else labels
            ax.imshow(images[i], cmap=cmap, norm=norm, interpolation="nearest")
            ax.set_axis_off()
    plots.save(figure, path)


def write(
    c: Config, results: dict[Setting, Measures], seen: dict[Setting, np.ndarray], scenes: Scenes
) -> None:
    records = {}
    for s, measures in results.items():
        numbers = {k: x for k, x in measures.items() if k != "predicted"}
        records[f"{s.loss}, {s.optimizer}"] = {"setting": s._asdict(), **numbers}
    searched = [{**s._asdict(), "mean": scores} for s, scores in seen.items()]
    report.write(c.out, records | {"validation": searched}, table(results))
    panels = {"mean": "mean IoU, %", "rare": "IoU of the rare classes, %"}
    ious = {
        title: {(s.loss, s.optimizer): measures[key] for s, measures in results.items()}
        for key, title in panels.items()
    }
    plots.dots(ious, c.out / "iou.png")
    plot_scenes(results, scenes, c.out / "scenes.png")


def main() -> None:
    c = read(Config, __doc__)
    with refusing():
        splits = datasets.load(c.dataset, c.data_dir)
        of_seed = functools.cache(functools.partial(draw, c, *splits))
        of_seed(SEARCH_SEED)
    results, seen = {}, {}
    with report.folder(c) as description, tqdm(unit="run") as bar:
        for loss in c.methods:
            bar.set_description(loss)
            of_run = functools.partial(run, c, of_seed, description["started"], bar)
            chosen, searched = compare(c, loss, of_run)
            results |= chosen
            seen |= searched
            write(c, results, seen, of_seed(0).evaluation)
    print((c.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
