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
    subclass weights  the inverse of the subclass's size: told what is hidden from the others
    group DRO         weights of subclasses by exponentiated gradient, told the same
                      (Sagawa et al. 2020, arXiv 1911.08731)
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from absgd_jax import absgd, target_ess, tilt, two_stage
from benchmarks import comparison, config, datasets, models, report
from benchmarks.config import ABOVE_0, BELOW_1, FROM_1, FROM_2, INSIDE, Must, POSITIVE, readable
from benchmarks.longtail import cvar_terms
from benchmarks.training import EVALUATED_AT_ONCE, Examples, Images

matplotlib.use("Agg")
import matplotlib.pyplot as plt

AT_ONCE = 10  # runs of a program; the last ones are filled up, so that one compilation serves all
# What is chosen from: a number, in front of which may stand the share of the epochs from which on
# it holds; for JTT and early weights, those that the first model is trained for.
GRIDS = {
    "SGD": ("inf",),
    "ABSGD": ("0.5", "2", "5", "0.5:0.5", "0.5:2"),  # λ
    "ABSGD, automatic": ("0.5", "0.9", "0.5:0.5", "0.5:0.9"),  # effective sample size
    "CVaR": ("0.1", "0.3", "0.6"),  # share
    "JTT": ("0.05:5", "0.05:20", "0.25:5", "0.25:20"),  # k
    "early weights": ("0.05:0.5", "0.25:0.5"),  # effective sample size
    "subclass weights": ("0",),  # the rate of group DRO, which starts from these weights
    "group DRO": ("0.01", "0.1"),
}
TOLD = ("subclass weights", "group DRO")
# The order in which they are evaluated: that of a dict is lost in JAX, which sorts its keys.
SPLITS = ("validation", "test", "train")
RULES = ("accuracy", "mean over subclasses")  # of the validation split


@readable
def is_regime(text: str) -> bool:
    model, _, decay = text.partition(":")
    return model in ("linear", "mlp") and 0 <= float(decay) < np.inf


REGIME = Must("be linear or mlp and a weight decay, such as mlp:2e-4", is_regime)


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """Hidden subclasses."""

    out: pathlib.Path = pathlib.Path("out/subgroups")  # folder to write to
    dataset: Literal[*datasets.NAMES] = "digits"  # what to train on
    data_dir: pathlib.Path | None = None  # folder with the files of the data set
    rare: Annotated[float, ABOVE_0] = 0.05  # images of a rare subclass / of the other
    examples: Annotated[int | None, FROM_1] = None  # images of the other; all, if not given
    validation: Annotated[float, INSIDE] = 0.2  # share of each subclass that is held out
    regimes: Annotated[tuple[str, ...], REGIME] = ("mlp:2e-4",)  # model and weight decay
    hidden: Annotated[tuple[int, ...], FROM_1] = (64,)  # widths of the hidden layers of the MLP
    epochs: Annotated[int, FROM_1] = 60  # passes over the data
    batch_size: Annotated[int, FROM_1] = 32  # examples a step
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (0.03, 0.1, 0.3)  # to choose from
    momentum: Annotated[float, BELOW_1] = 0.9  # of SGD
    seeds: Annotated[int, FROM_2] = 5  # number of seeds that are reported
    search_seeds: Annotated[int, FROM_1] = 2  # seeds of every setting of the search


class Setting(NamedTuple):
    """What a search chooses from."""

    method: str
    text: str  # of GRIDS
    learning_rate: float


class Run(NamedTuple):
    """What the runs of a program differ in: every leaf has a leading axis over runs."""

    seed: Any  # int32
    learning_rate: Any  # float32
    weight_decay: Any  # float32
    number: Any  # float32: of the setting
    start: Any  # int32: the epoch from which on it holds
    weight: Any  # [n], float32: of the training examples
    splits: dict[str, Examples]  # by name, with the subclass as group


class Trained(NamedTuple):
    """By epoch; what became of several runs has a leading axis over seeds."""

    mean_loss: Any
    losses: Any  # [epochs, N]: of the examples of SPLITS; without those of "train" if not of SGD
    wrong: Any  # [epochs, N]: whether they are classified wrongly


Draw = Callable[[int], dict[str, Examples]]


def make_draw(
    train: np.ndarray, test: np.ndarray, rare: float, most: int | None, validation: float
) -> Draw:
    """Splits of the labels, by seed. Label k stands for two subclasses: 2 k, and 2 k + 1, rare."""
    classes = int(train.max()) + 1
    most = min(most or len(train), np.bincount(train).min())
    sizes = [round(most * rare ** (group % 2)) for group in range(classes // 2 * 2)]
    cuts = [max(1, round(validation * size)) for size in sizes]
    if any(cut >= size for cut, size in zip(cuts, sizes, strict=True)):
        raise ValueError(f"Each subclass must have images to train on and to hold out, got {sizes}")

    def draw(seed: int) -> dict[str, Examples]:
        rng = np.random.default_rng(seed)
        group = rng.permutation(classes)[np.concatenate([train, test])].astype(np.int32)
        pool = rng.permutation(len(train))
        members = [pool[group[pool] == g][:size] for g, size in enumerate(sizes)]
        index = {
            "validation": np.concatenate([m[:c] for m, c in zip(members, cuts, strict=True)]),
            "test": len(train) + np.flatnonzero(group[len(train) :] < len(sizes)),
            "train": np.concatenate([m[c:] for m, c in zip(members, cuts, strict=True)]),
        }
        return {k: Examples(np.int32(i), group[i] // 2, group[i]) for k, i in index.items()}

    return draw


def group_dro(
    losses: jax.Array, group: jax.Array, sizes: jax.Array, log_q: jax.Array, rate: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Σ q_g L_g, and the next log q. A batch's L_g is unbiased, however few of g are in it.

    At a rate of 0 the weight of an example is the inverse of its group's size.
    """
    sums = jnp.zeros(log_q.shape).at[group].add(losses)
    means = sums * sizes.sum() / (losses.size * sizes)
    log_q = jax.nn.log_softmax(log_q + rate * jax.lax.stop_gradient(means))
    return jnp.exp(log_q) @ means, log_q


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


def train_one(c: Config, name: str, method: str, groups: int, images: Images, run: Run) -> Trained:
    """What becomes of one run."""
    train = run.splits["train"]
    steps = len(train.label) // c.batch_size
    sizes = jnp.zeros(groups).at[train.group].add(1)
    tunes = method == "ABSGD, automatic"
    temperature = target_ess(run.number) if tunes else run.number
    tx = absgd(
        optax.cosine_decay_schedule(run.learning_rate, steps * c.epochs),
        two_stage(temperature, run.start * steps) if method.startswith("ABSGD") else jnp.inf,
        momentum=c.momentum,
        weight_decay=run.weight_decay,
    )
    rngs, shape = nnx.Rngs(jax.random.key(run.seed)), images.pixels.shape[1:]
    model = models.make_model(name, shape, groups // 2, rngs=rngs, hidden=c.hidden)
    graph, params = nnx.split(model)

    def losses_of(params, examples):
        logits = nnx.merge(graph, params)(images[examples.index])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples.label)
        return losses, logits.argmax(axis=-1) != examples.label

    def step(carry, index):
        params, opt_state, log_q = carry
        batch = jax.tree.map(lambda x: x[index], train)

        def loss_fn(params):
            losses, _ = losses_of(params, batch)
            if method == "CVaR":
                loss, new = cvar_terms(losses, run.number).mean(), log_q
            elif method in TOLD:
                loss, new = group_dro(losses, batch.group, sizes, log_q, run.number)
            else:
                loss, new = (run.weight[index] * tilt(losses, opt_state)).mean(), log_q
            return loss, (losses, new)

        (loss, (losses, log_q)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, losses=losses)
        return (optax.apply_updates(params, updates), opt_state, log_q), losses.mean()

    names = [k for k in SPLITS if k in run.splits and (k != "train" or method == "SGD")]
    evaluated = [run.splits[k] for k in names]
    evaluated = jax.tree.map(lambda *x: jnp.concatenate(x), *evaluated)
    total, padding = len(evaluated.label), -len(evaluated.label) % EVALUATED_AT_ONCE
    parts = jax.tree.map(
        lambda x: jnp.pad(x, (0, padding)).reshape(-1, EVALUATED_AT_ONCE), evaluated
    )

    def epoch(carry, number):
        key = jax.random.fold_in(jax.random.key(run.seed), number)
        order = jax.random.permutation(key, len(train.label))[: steps * c.batch_size]
        carry, losses = jax.lax.scan(step, carry, order.reshape(steps, c.batch_size))
        each = jax.lax.map(lambda part: losses_of(carry[0], part), parts)
        return carry, Trained(losses.mean(), *(x.reshape(-1)[:total] for x in each))

    carry = params, tx.init(params), jnp.full(groups, -np.log(groups))
    return jax.lax.scan(epoch, carry, jnp.arange(c.epochs))[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def train(c: Config, name: str, method: str, groups: int, images: Images, runs: Run) -> Trained:
    """The methods of one program: SGD, ABSGD and weights; ABSGD, automatic; CVaR; those of TOLD."""
    return jax.vmap(functools.partial(train_one, c, name, method, groups, images))(runs)


def train_each(
    c: Config,
    regime: str,
    settings: list[Setting],
    drawn: dict[int, dict[str, Examples]],
    images: Images,
    bar: tqdm,
) -> dict[Setting, Trained]:
    """Trains each setting with each seed, and the first models that settings need."""
    model, _, decay = regime.partition(":")
    groups = 1 + max(int(splits["train"].group.max()) for splits in drawn.values())
    found = {}

    def make_run(setting: Setting, i: int, seed: int) -> Run:
        [(share, number)] = comparison.stages(setting.text)
        start, train = round(share * c.epochs), drawn[seed]["train"]
        weight = np.ones(len(train.label), np.float32)
        if setting.method in WEIGHTS:
            first = found[first_of(setting)]
            of_train = (
                x[i, max(start, 1) - 1, -len(weight) :] for x in (first.losses, first.wrong)
            )
            weight = np.float32(WEIGHTS[setting.method](*of_train, number))
            number = np.inf  # λ
        floats = map(np.float32, (setting.learning_rate, decay, number))
        return Run(np.int32(seed), *floats, np.int32(start), weight, drawn[seed])

    firsts = [first_of(s) for s in settings if s.method in WEIGHTS]
    for method in GRIDS:  # SGD comes first
        group = list(dict.fromkeys(s for s in firsts + settings if s.method == method))
        program = "ABSGD" if method in WEIGHTS else TOLD[0] if method in TOLD else method
        runs, parts = [make_run(s, i, seed) for s in group for i, seed in enumerate(drawn)], []
        for part in (runs[at : at + AT_ONCE] for at in range(0, len(runs), AT_ONCE)):
            filled = part + part[:1] * (AT_ONCE - len(part))
            stacked = jax.tree.map(lambda *x: np.stack(x), *filled)
            parts.append(jax.device_get(train(c, model, program, groups, images, stacked)))
            bar.update(len(part))
        whole = jax.tree.map(lambda *x: np.concatenate(x), *parts) if parts else None
        for i, setting in enumerate(group):
            rows = slice(i * len(drawn), (i + 1) * len(drawn))
            found[setting] = Trained(*(x[rows] for x in whole))
    return found


def first_of(setting: Setting) -> Setting:
    return setting._replace(method="SGD", text=comparison.SGD)


def accuracies(trained: Trained, splits: list[dict[str, Examples]], name: str) -> np.ndarray:
    """Of the subclasses in "validation" or "test", in percent, [seeds, epochs, subclasses]."""

    def of_seed(wrong: np.ndarray, of: dict[str, Examples]) -> np.ndarray:
        start = 0 if name == "validation" else len(of["validation"].label)
        member = np.eye(of[name].group.max() + 1)[of[name].group]
        return 1 - wrong[:, start : start + len(member)] @ member / member.sum(axis=0)

    return 100 * np.stack([of_seed(*pair) for pair in zip(trained.wrong, splits, strict=True)])


def scores(trained: Trained, splits: list[dict[str, Examples]], rule: str) -> np.ndarray:
    """What the rule sees of the validation split, [seeds, epochs]."""
    each = accuracies(trained, splits, "validation")
    sizes = np.bincount(splits[0]["validation"].group)
    return np.average(each, axis=-1, weights=sizes if rule == "accuracy" else None)


class Result(NamedTuple):
    """A method in the setting that a rule chose, trained with every seed."""

    regime: str
    rule: str
    setting: Setting
    accuracy: np.ndarray  # of the subclasses at the end, in percent, [seeds, subclasses]
    stopped: np.ndarray  # the same at the epoch that the rule, on its own validation split, chose
    diverged: int


def compare(
    c: Config, regime: str, draw: Draw, images: Images, bar: tqdm
) -> tuple[list[Result], dict[str, Any]]:
    """Every method as each rule chose it, and what the rules saw."""
    settings = [
        Setting(method, text, rate)
        for method, grid in GRIDS.items()
        for text in grid
        for rate in c.learning_rates
    ]
    seeds = range(comparison.SEARCH_SEED, comparison.SEARCH_SEED + c.search_seeds)
    drawn = {seed: draw(seed) for seed in seeds}
    for splits in drawn.values():
        del splits["test"]
    searched = train_each(c, regime, settings, drawn, images, bar)
    seen = {
        (s, rule): scores(trained, list(drawn.values()), rule)[:, -1].mean()
        for s, trained in searched.items()
        for rule in RULES
    }
    chosen = {
        (rule, method): max(
            (s for s in settings if s.method == method), key=lambda s: seen[s, rule]
        )
        for rule in RULES
        for method in GRIDS
    }
    drawn = {seed: draw(seed) for seed in range(c.seeds)}
    splits = list(drawn.values())
    final = train_each(c, regime, list(chosen.values()), drawn, images, bar)
    results = []
    for (rule, _), setting in chosen.items():
        accuracy = accuracies(final[setting], splits, "test")
        by_epoch = scores(final[setting], splits, rule)
        best = c.epochs - 1 - by_epoch[:, ::-1].argmax(axis=1)  # the last of equals
        stopped = accuracy[np.arange(c.seeds), best]
        labels = accuracy.shape[-1] // 2
        near = accuracy[:, -1].mean(axis=-1) < 100 * comparison.near_guess(labels)
        diverged = int(np.sum(near | ~np.isfinite(final[setting].mean_loss).all(axis=1)))
        results.append(Result(regime, rule, setting, accuracy[:, -1], stopped, diverged))
    return results, {f"{' '.join(map(str, s))}, {rule}": x for (s, rule), x in seen.items()}


def rare(accuracy: np.ndarray) -> np.ndarray:
    return accuracy[:, 1::2].mean(axis=1)


def table(results: list[Result]) -> str:
    """± is the standard deviation over seeds; in a gain over SGD, paired by seed, the error."""
    columns = "accuracy", "gain", "rare", "gain", "rare, stopped early", "diverged"
    rows = [("regime", "method", "setting", "rate", *columns)]
    for r in results:
        if r.setting.method == "SGD":
            sgd = r
        pairs = [(f(r.accuracy), f(sgd.accuracy)) for f in (lambda a: a.mean(axis=1), rare)]
        cells = [
            (report.mean_std(x, ".1f"), "" if r is sgd else report.difference(x, y))
            for x, y in pairs
        ]
        stopped = report.mean_std(rare(r.stopped), ".1f")
        setting = comparison.in_words(r.setting.text), f"{r.setting.learning_rate:g}"
        ends = stopped, f"{r.diverged} of {len(r.accuracy)}"
        rows.append((r.regime, r.setting.method, *setting, *cells[0], *cells[1], *ends))
    return report.markdown(rows)


def plot(results: list[Result], path: pathlib.Path) -> None:
    """The rare subclasses: a dot a seed, and a line at their mean."""
    regimes, names = list(dict.fromkeys(r.regime for r in results)), list(GRIDS)
    size = (2 + 2.6 * len(regimes), 3.4)
    figure, panels = plt.subplots(
        1, len(regimes), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, regime in zip(panels[0], regimes, strict=True):
        for i, (rule, color) in enumerate(zip(RULES, ("#0072B2", "#D55E00"), strict=True)):
            axes.scatter([], [], 20, color, label=f"chosen by {rule}")
            for r in (r for r in results if (r.regime, r.rule) == (regime, rule)):
                x = rare(r.accuracy)
                y = np.full(len(x), names.index(r.setting.method) + (i - 0.5) / 3)
                axes.scatter(x, y, 9, color, linewidths=0, alpha=0.6)
                axes.scatter(x.mean(), y[0], 90, color, marker="|")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(regime, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].invert_yaxis()
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel("test accuracy of the rare subclasses, %", fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(c: Config, results: list[Result], seen: dict[str, Any]) -> None:
    records = {f"{r.regime}, {r.setting.method}, by {r.rule}": r._asdict() for r in results}
    for record in records.values():
        record["setting"] = record["setting"]._asdict()
    parts = [
        part
        for rule in RULES
        for part in (f"Chosen by {rule}:", table([r for r in results if r.rule == rule]))
    ]
    report.write(c.out, records | {"validation": seen}, *parts)
    plot(results, c.out / "rare.png")


def main() -> None:
    c = config.read(Config, __doc__)
    with config.refusing():
        train, test = datasets.load(c.dataset, c.data_dir)
        draw = make_draw(train.labels, test.labels, c.rare, c.examples, c.validation)
    if c.batch_size > (n := len(draw(0)["train"].label)):
        config.fail(f"--batch-size must not exceed the {n} training examples, got {c.batch_size}")
    mean, std = (np.float32(f(train.images, axis=(0, 1, 2))) for f in (np.mean, np.std))
    images = Images(np.concatenate([train.images, test.images]), mean, std)
    results, seen = [], {}
    with report.folder(c), tqdm(unit="run") as bar:
        for regime in c.regimes:
            bar.set_description(regime)
            compared, seen[regime] = compare(c, regime, draw, jax.device_put(images), bar)
            results += compared
            write(c, results, seen)
    print((c.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
