"""Rare subclasses that nobody labelled: what weights by the loss do for them, beside other methods.

    python -m benchmarks.subgroups

Each label stands for two classes of the data, one of which is rare; the pairs are drawn anew for
every seed. The model is told the label alone, so that no class weight can help. Every setting is
chosen on a validation split of other seeds, which is drawn as the training data are: by its
accuracy, which asks nothing of the subclasses, and by its mean over subclasses, which has to know
them. Accuracies on the test split are means over subclasses.

    CVaR              the mean of the largest losses of a batch, a share of it
    JTT               a second model, with k times the weight on what a first, of SGD, got wrong
                      (Liu et al. 2021, arXiv 2107.09044)
    early weights     a second model, with the weights exp(l / λ) of the losses l of the first
    AFR               the last layer of a first model, trained again on a fifth of the training
                      examples, which that model has not seen: the weights are exp(-γ p) of the
                      probability p of the right label, over the size of the class, and the layer
                      is pulled to where it was (Qiu et al. 2023, arXiv 2306.11074); with --methods
    subclass weights  the inverse of the subclass's size: told what is hidden from the others
    group DRO         weights of subclasses by exponentiated gradient, told the same
                      (Sagawa et al. 2020, arXiv 1911.08731)
"""

import collections
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from absgd_jax import Sums
from benchmarks.engine import comparison, config, methods, plots, report
from benchmarks.engine.comparison import CLEAN, Draw, of_each, SGD, TEMPERATURE, Train
from benchmarks.engine.config import ABOVE_0, BELOW_1, FROM_1, INSIDE, OR_NONE, POSITIVE
from benchmarks.engine.methods import Batch, parse, Parts, Step, Way
from benchmarks.engine.search import search, SEARCH_SEED, seeds_of
from benchmarks.engine.training import Examples, Images, Task, Trained

# What is chosen from, beside λ; for JTT and early weights a number behind the share of the epochs
# that the first model is trained for.
GRIDS = {
    "CVaR": ("0.1", "0.3", "0.6"),  # share
    "JTT": ("0.05:5", "0.05:20", "0.25:5", "0.25:20"),  # k
    "early weights": ("0.05:0.5", "0.25:0.5"),  # effective sample size
    "AFR": (  # γ and the pull
        *("0.5/0", "0.5/0.2", "1/0", "1/0.2", "2/0", "2/0.2", "4/0", "4/0.2", "14/0.2"),
    ),
    "subclass weights": ("",),
    "group DRO": ("0.01", "0.1"),  # rate
}
# Of AFR, as its authors have them on Waterbirds; a step takes all that was held out.
AFR_SHARE = 0.2  # of the training examples
AFR_RATE = 0.02
AFR_STEPS = 500
RULES = ("accuracy", "mean over subclasses")  # of the validation split


@dataclasses.dataclass(frozen=True)
class Config(comparison.Config):
    """Hidden subclasses."""

    out: pathlib.Path = pathlib.Path("out/subgroups")  # folder to write to
    rare: Annotated[float, ABOVE_0] = 0.05  # images of a rare subclass / of the other
    examples: Annotated[int | None, FROM_1] = None  # images of the other; all, if not given
    validation: Annotated[float, INSIDE] = 0.2  # share of each subclass that is held out
    search_seeds: Annotated[int, FROM_1] = 2  # seeds of every setting of the search
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (0.03, 0.1, 0.3)  # to choose from
    # as in benchmarks.longtail
    temperatures: Annotated[tuple[str, ...], TEMPERATURE, OR_NONE] = (
        *("0.5", "2", "5", "0.5:0.5", "0.5:2"),
        *("ess0.5", "ess0.9", "0.5:ess0.5", "0.5:ess0.9"),
    )
    # beside SGD and ABSGD
    methods: Annotated[tuple[Literal[*GRIDS], ...], OR_NONE] = tuple(m for m in GRIDS if m != "AFR")
    schedule: Literal["step", "cosine", "constant"] = "cosine"  # of the learning rate
    warm_up: Annotated[float, BELOW_1] = 0.0  # share of the epochs

    @property
    def grids(self) -> dict[str, tuple[str, ...]]:
        """What there is to choose from, by method."""
        automatic = tuple(filter(comparison.is_automatic, self.temperatures))
        fixed = tuple(itertools.filterfalse(comparison.is_automatic, self.temperatures))
        grids = {"SGD": (SGD,), "ABSGD": fixed, "ABSGD, automatic": automatic}
        grids |= {method: grid for method, grid in GRIDS.items() if method in self.methods}
        return {method: grid for method, grid in grids.items() if grid}


class Setting(NamedTuple):
    """What a search chooses from."""

    method: str
    text: str
    learning_rate: float


def make_draw(
    train: np.ndarray, test: np.ndarray, rare: float, most: int | None, validation: float
) -> Draw:
    """Splits of the labels. Label k stands for two subclasses: 2 k, and 2 k + 1, which is rare.

    The groups are the subclasses; of what is evaluated, those of the validation split, and behind
    them those of the test split, which the search has not.
    """
    classes = int(train.max()) + 1
    most = min(most or len(train), np.bincount(train).min())
    sizes = [round(most * rare ** (group % 2)) for group in range(classes // 2 * 2)]
    cuts = [max(1, round(validation * size)) for size in sizes]
    if any(cut >= size for cut, size in zip(cuts, sizes, strict=True)):
        raise ValueError(
            "--rare must leave each subclass images to train on and to hold out, got "
            f"{rare}, and with it {sizes}; raise it or --examples, or lower --validation"
        )

    def draw(seed: int, search: bool) -> tuple[Examples, ...]:
        rng = np.random.default_rng(seed)
        group = rng.permutation(classes)[np.concatenate([train, test])].astype(np.int32)
        pool = rng.permutation(len(train))
        members = [pool[group[pool] == g][:size] for g, size in enumerate(sizes)]
        parts = [np.split(m, [cut]) for m, cut in zip(members, cuts, strict=True)]
        held_out, trained = map(np.concatenate, zip(*parts, strict=True))
        tested = len(train) + np.flatnonzero(group[len(train) :] < len(sizes))
        if search:
            tested = tested[:0]
        clean = of_each(held_out, group[held_out] // 2, CLEAN)
        evaluated = np.concatenate([held_out, tested])
        offset = np.int32(len(sizes)) * (evaluated >= len(train))
        return (
            Examples(np.int32(trained), group[trained] // 2, group[trained]),
            Examples(np.int32(evaluated), group[evaluated] // 2, group[evaluated] + offset),
            Examples(np.int32(clean), group[clean] // 2, group[clean]),
        )

    return draw


def group_dro(rate: float) -> Way:
    """Σ q_g L_g, and the next log q, which is the memory.

    The weight of an example has to be the inverse of its group's size, with the mean 1: then L_g,
    the group's mean loss, is estimated without bias, however few of it are in a batch.
    """

    def step(parts: Parts, params: Any, log_q: jax.Array, batch: Batch) -> Step:
        def loss_fn(params, sums):
            logits, other = parts.logits(params, batch.x)
            losses = parts.loss(logits, batch.y)
            each = batch.weight * parts.tilt(losses, sums) * len(log_q)
            means = jnp.zeros_like(log_q).at[batch.group].add(each) / len(losses)
            new = jax.nn.log_softmax(log_q + rate * jax.lax.stop_gradient(means))
            return jnp.exp(new) @ means, (losses, other, new)

        return jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(params, Sums())

    return Way(step, lambda params, examples, classes, groups: jnp.full(groups, -np.log(groups)))


WAYS = {"": methods.WAYS[""], "group_dro": group_dro}


def inverse_sizes(group: np.ndarray) -> np.ndarray:
    """Weights of examples, with the mean 1."""
    sizes = np.bincount(group)
    return len(group) / (len(sizes) * sizes[group])


def jtt_weights(losses: np.ndarray, wrong: np.ndarray, k: float) -> np.ndarray:
    """With the mean 1, and k times as large where wrong."""
    weights = np.where(wrong, k, 1.0)
    return weights / weights.mean()


def early_weights(losses: np.ndarray, wrong: np.ndarray, ess: float) -> np.ndarray:
    """exp(l / λ), with the mean 1, at the λ > 0 that gives the effective sample size."""

    def weights(log_lam: float) -> np.ndarray:
        w = np.exp((losses.astype(float) - losses.max()) / np.exp(log_lam))
        return w / w.mean()

    low, high = np.log([1e-6, 1e6])
    for _ in range(60):
        middle = (low + high) / 2
        enough = 1 / np.mean(weights(middle) ** 2) > ess
        low, high = (low, middle) if enough else (middle, high)
    return weights(high)


WEIGHTS = {"JTT": jtt_weights, "early weights": early_weights}  # of a second model


def hold_out(draw: Draw) -> Draw:
    """The same splits, but with AFR's share of the training examples in front of the evaluation."""

    def drawn(seed: int, search: bool) -> tuple[Examples, ...]:
        train, evaluation, clean = draw(seed, search)
        order = np.random.default_rng(seed).permutation(len(train.label))
        held_out, kept = np.split(order, [round(AFR_SHARE * len(order))])
        pairs = zip(train, evaluation, strict=True)
        evaluation = Examples(*(np.concatenate([t[held_out], e]) for t, e in pairs))
        return Examples(*(leaf[kept] for leaf in train)), evaluation, clean

    return drawn


@jax.jit
def second_heads(
    x: ArrayLike, y: ArrayLike, head: jax.Array, gamma: float, pull: float
) -> tuple[jax.Array, jax.Array]:
    """The heads after every step of AFR, and their mean losses, from features and a first head."""

    def losses(head):
        return optax.softmax_cross_entropy_with_integer_labels(x @ head, y)

    right = jnp.exp(-losses(head))  # probabilities
    weights = jnp.exp(-gamma * right) / jnp.bincount(y, length=head.shape[1])[y]
    weights /= weights.sum()

    def step(new, _):
        def objective(new):
            each = losses(new)
            return weights @ each + pull * jnp.sum((new - head) ** 2), each.mean()

        grads, mean = jax.grad(objective, has_aux=True)(new)
        new -= AFR_RATE * grads
        return new, (new, mean)

    return jax.lax.scan(step, head, length=AFR_STEPS)[1]


def afr(first: Trained, evaluation: Sequence[Examples], held_out: int, text: str) -> Trained:
    """What AFR makes of first models, whose ``evaluation`` begins with what was held out.

    It is recorded as often as they were.
    """
    epochs, _, groups = first.history["accuracy"].shape
    shown = np.linspace(AFR_STEPS / epochs, AFR_STEPS, epochs).round().astype(int) - 1
    accuracy, losses = [], []
    for x, head, (_, y, group) in zip(first.features, first.head, evaluation, strict=True):
        heads, means = second_heads(x[:held_out], y[:held_out], head, *map(float, text.split("/")))
        right = (x[held_out:] @ np.asarray(heads)[shown]).argmax(axis=-1) == y[held_out:]
        of_group = (right[:, group[held_out:] == g].mean(axis=1) for g in range(groups))
        accuracy.append(np.stack(list(of_group), axis=1))
        losses.append(np.asarray(means)[shown])
    history = {"accuracy": np.stack(accuracy, axis=1), "mean_loss": np.stack(losses, axis=1)}
    return Trained(history, None, None)


def train_each(
    c: Config, images: Images, draw: Draw, train: Train, settings: list[Setting], searching: bool
) -> dict[Setting, Trained]:
    """Trains each setting with each seed of the phase, and the first models that settings need."""
    phase, seeds = "search" if searching else "final", seeds_of(c, searching)
    group = [draw(seed, searching)[0].group for seed in seeds]
    groups = int(group[0].max()) + 1
    evaluated = groups if searching else 2 * groups
    told = [inverse_sizes(g) for g in group]

    def fit(
        c: Config,
        name: str,
        method: str,
        settings: list[Setting],
        weights: Any = None,
        *,
        draw: Draw = draw,
        features: bool = False,
    ) -> dict[Setting, Trained]:
        """Trains settings that are one program; ``weights`` are those of its runs."""
        if not settings:
            return {}
        task = Task(images, groups // 2, groups, evaluated, parse(method, WAYS), features)
        lams = (s.text if s.method.startswith("ABSGD") else SGD for s in settings)
        pairs = zip(lams, settings, strict=True)
        tuned = [comparison.Setting(lam, s.learning_rate, c.gamma) for lam, s in pairs]
        runs = comparison.make_runs(c, task, tuned, seeds, draw)
        if weights is not None:
            runs = [run._replace(weight=w) for run, w in zip(runs, weights, strict=True)]
        return comparison.by_setting(settings, train(c, f"{name}-{phase}", task, runs))

    of = collections.defaultdict(list)
    for setting in settings:
        of[setting.method].append(setting)
    found = fit(c, "plain", "cross_entropy", of["SGD"] + of["ABSGD"])
    found |= fit(c, "automatic", "cross_entropy", of["ABSGD, automatic"])
    for method, those in by_text("cvar", of["CVaR"]).items():
        found |= fit(c, method, method, those)
    if firsts := {s: s._replace(method="SGD", text=SGD) for s in of["AFR"]}:
        part = hold_out(draw)
        those = list(dict.fromkeys(firsts.values()))
        first = fit(c, "first-afr", "cross_entropy", those, draw=part, features=True)
        kept, evaluation, _ = zip(*(part(seed, searching) for seed in seeds), strict=True)
        size = len(group[0]) - len(kept[0].label)
        found |= {s: afr(first[firsts[s]], evaluation, size, s.text) for s in firsts}
    weights = dict.fromkeys(of["subclass weights"], told)
    # The share of the epochs that the first model is trained for, and a number.
    seconds = {s: comparison.stages(s.text)[0] for s in of["JTT"] + of["early weights"]}
    for share in sorted({share for share, _ in seconds.values()}):
        those = [s for s in seconds if seconds[s][0] == share]
        firsts = list(dict.fromkeys(s._replace(method="SGD", text=SGD) for s in those))
        epochs = max(1, round(share * c.epochs))
        shortened = dataclasses.replace(c, epochs=epochs, temperatures=())
        first = fit(shortened, f"first-{share}", "cross_entropy", firsts)
        for s in those:
            trained = first[s._replace(method="SGD", text=SGD)]
            pairs = zip(trained.losses, trained.wrong, strict=True)
            weights[s] = [WEIGHTS[s.method](*pair, seconds[s][1]) for pair in pairs]
    found |= fit(c, "weighted", "cross_entropy", list(weights), itertools.chain(*weights.values()))
    for method, those in by_text("cross_entropy+group_dro", of["group DRO"]).items():
        found |= fit(c, method, method, those, told * len(those))
    return found


def by_text(name: str, settings: list[Setting]) -> dict[str, list[Setting]]:
    """The settings of each method, which is of that name."""
    methods = dict.fromkeys(s.text for s in settings)
    return {f"{name}:{text}": [s for s in settings if s.text == text] for text in methods}


def scores(accuracy: np.ndarray, sizes: np.ndarray, rule: str) -> np.ndarray:
    """What the rule sees of accuracies [..., subclasses] of the validation split."""
    return np.average(accuracy, axis=-1, weights=sizes if rule == "accuracy" else None)


class Result(NamedTuple):
    """A method in the setting that a rule chose, trained with every seed."""

    rule: str
    setting: Setting
    accuracy: np.ndarray  # of the subclasses at the end, in percent, [seeds, subclasses]
    stopped: np.ndarray  # the same at the epoch that the rule, on its own validation split, chose
    diverged: int


def compare(
    c: Config, images: Images, draw: Draw, train: Train
) -> tuple[list[Result], dict[str, Any]]:
    """Every method as each rule chose it, and what the rules saw."""
    sizes = np.bincount(draw(SEARCH_SEED, True)[1].group)

    def score(trained: Trained, rule: str) -> float:
        return 100 * scores(trained.history["accuracy"][-1], sizes, rule).mean()

    grids = {
        (rule, method): [Setting(method, *x) for x in itertools.product(grid, c.learning_rates)]
        for rule, (method, grid) in itertools.product(RULES, c.grids.items())
    }
    run = functools.partial(train_each, c, images, draw, train)
    found = search(grids, run, lambda key, grid: max(grid, key=lambda s: score(grid[s], key[0])))
    results = []
    for (rule, _), setting in found.chosen.items():
        trained = found.final[setting]
        accuracy = 100 * trained.history["accuracy"]  # [epochs, seeds, subclasses]
        held_out, tested = np.split(accuracy, 2, axis=-1)
        by_epoch = scores(held_out, sizes, rule)
        best = c.epochs - 1 - by_epoch[::-1].argmax(axis=0)  # the last of equals
        finite = np.isfinite(trained.history["mean_loss"]).all(axis=0)
        mean = tested[-1].mean(axis=-1) / 100
        diverged = int(comparison.diverged(finite, mean, len(sizes) // 2).sum())
        stopped = tested[best, np.arange(c.seeds)]
        results.append(Result(rule, setting, tested[-1], stopped, diverged))
    return results, {
        f"{' '.join(map(str, s))}, {rule}": score(trained, rule)
        for s, trained in found.seen.items()
        for rule in RULES
    }


def rare(accuracy: np.ndarray) -> np.ndarray:
    return accuracy[:, 1::2].mean(axis=1)


def table(results: list[Result]) -> str:
    """± is the standard deviation over seeds; in a gain over SGD, paired by seed, the error."""
    columns = "accuracy", "gain", "rare", "gain", "rare, stopped early", "diverged"
    rows = [("method", "setting", "rate", *columns)]
    sgd = results[0]
    for r in results:
        method, text, rate = r.setting
        row = [method, comparison.in_words(text), f"{rate:g}"]
        for f in (lambda accuracy: accuracy.mean(axis=1), rare):
            x = f(r.accuracy)
            row += report.against(x, x if r is sgd else f(sgd.accuracy))
        ends = report.mean_std(rare(r.stopped), ".1f"), f"{r.diverged} of {len(r.accuracy)}"
        rows.append((*row, *ends))
    return report.markdown(rows)


def write(c: Config, results: list[Result], seen: dict[str, Any]) -> None:
    records = {
        f"{r.setting.method}, by {r.rule}": r._asdict() | {"setting": r.setting._asdict()}
        for r in results
    }
    parts = (
        f"Chosen by {rule}:\n\n{table([r for r in results if r.rule == rule])}" for rule in RULES
    )
    report.write(c.out, records | {"validation": seen}, *parts)
    dots = {(r.setting.method, f"chosen by {r.rule}"): rare(r.accuracy) for r in results}
    plots.dots({"test accuracy of the rare subclasses, %": dots}, c.out / "rare.png")


def main() -> None:
    c = config.read(Config, __doc__)
    train, test = comparison.load(c)
    images = comparison.on_device(c, train, test)
    with config.refusing():
        draw = functools.cache(
            make_draw(train.labels, test.labels, c.rare, c.examples, c.validation)
        )
    with comparison.session(c, draw) as trainer:
        results, seen = compare(c, images, draw, trainer)
        write(c, results, seen)


if __name__ == "__main__":
    main()
