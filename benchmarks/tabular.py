"""Small tables with rare classes or wrong labels: losses, each with SGD and with ABSGD.

    python -m benchmarks.tabular

Cross-validation, in which every fold has a setting of its own: the one with the best balanced
accuracy on a part of the fold's training data that was held out. A table is one of scikit-learn's,
or a file NAME.dat of the KEEL repository (Alcalá-Fdez et al. 2011) in a folder, and is written

    breast_cancer       as it is
    breast_cancer:0.03  with 3 % as many training examples of the rarest class as of the largest
    digits-8            class 8 against the rest

The methods, beside SGD and a fixed λ, are automatic temperatures:

    ESS 0.9             target_ess(0.9)
    ESS 0.9, later      the same after half of the steps
    ESS 0.9, lift 1.25  a target from 0.9 on that lets the rarest class gain 1.25 times its weight
                        at most; see ``lifted``
    ESS 0.6, within     of losses less the level of their class, so that no class gains or loses
                        weight; see ``levels``

and, with --methods, RGD, whose weights are not normalised: exp(min(l, τ) / (τ + 1)) of the loss l,
or exp(l / (τ + 1)) unclipped (Kumar et al. 2024, arXiv 2306.09222).
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from tqdm import tqdm

from absgd_jax import abadam, absgd, get_temperature, losses, target_ess, tilt, two_stage
from absgd_jax.data import class_counts, flip_labels, long_tailed_indices
from benchmarks.engine import config, datasets, layers, plots, report
from benchmarks.engine.comparison import diverged
from benchmarks.engine.config import BELOW_1, FROM_1, INSIDE, NOT_NEGATIVE, OR_NONE, POSITIVE
from benchmarks.engine.methods import levels
from benchmarks.engine.search import search, SEARCH_SEED

AT_ONCE = 256  # runs of a program
SCORES = "balanced", "precision"  # that the search sees
SKLEARN = ("breast_cancer", "digits", "iris", "wine")


class Rule(NamedTuple):
    """What λ is, or the τ of RGD."""

    number: float  # λ; the effective sample size of an automatic one, with the sign of λ; or τ
    begin: float = 0.0  # share of the steps before it
    automatic: bool = False
    lift: float = math.inf  # of the rarest class, at most
    within: bool = False  # classes
    rgd: bool = False  # whether the number is a τ
    clipped: bool = True  # the losses of RGD, at τ


class Setting(NamedTuple):
    """What a search chooses from."""

    loss: str
    method: str
    rule: Rule
    learning_rate: float
    weight_decay: float


ESS = functools.partial(Rule, automatic=True)
OPTIMIZERS = {"SGD": absgd, "Adam": abadam}  # at an infinite λ they are what they are called
RGD = functools.partial(Rule, rgd=True)
RARE = {
    "fixed λ": (Rule(1.0), Rule(5.0), Rule(20.0)),
    "ESS 0.5": (ESS(0.5),),
    "ESS 0.9": (ESS(0.9),),
    "ESS 0.9, later": (ESS(0.9, 0.5),),
    "ESS 0.99": (ESS(0.99),),
    "ESS 0.9, lift 1.25": (ESS(0.9, lift=1.25),),
    "RGD": (RGD(1.0), RGD(3.0), RGD(9.0)),
    "RGD, unclipped": (RGD(1.0, clipped=False), RGD(3.0, clipped=False), RGD(9.0, clipped=False)),
}
WRONG = {
    "fixed λ": (Rule(-0.5), Rule(-1.0), Rule(-2.0), Rule(-1.0, 0.2)),
    "ESS 0.8": (ESS(-0.8, 0.2),),
    "ESS 0.6": (ESS(-0.6, 0.2),),
    "ESS 0.8, within": (ESS(-0.8, 0.2, within=True),),
    "ESS 0.6, within": (ESS(-0.6, 0.2, within=True),),
}
LOSSES = {
    "cross_entropy": lambda z, y, fold: optax.softmax_cross_entropy_with_integer_labels(z, y),
    "class_balanced": lambda z, y, fold: fold.weight[y] * LOSSES["cross_entropy"](z, y, fold),
    "balanced_softmax": lambda z, y, fold: losses.balanced_softmax(z, y, class_counts=fold.counts),
    "focal": lambda z, y, fold: losses.focal(z, y),
    "arb": lambda z, y, fold: losses.arb(z, y),
    "gce": lambda z, y, fold: losses.generalized_cross_entropy(z, y),
}
OF_RARE = tuple(LOSSES)[:5]
OF_WRONG = ("cross_entropy", "balanced_softmax", "gce")


@config.readable
def is_table(text: str) -> bool:
    name, *share = text.split(":")
    return name != "" and len(share) < 2 and all(0 < float(x) <= 1 for x in share)


FLAGS = "--tables and --flipped-tables"
TABLE = config.Must("be a name, or one and a share in (0, 1], such as wine or wine:0.2", is_table)


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """Tables, and what to choose from."""

    out: pathlib.Path = pathlib.Path("out/tabular")  # folder to write to
    data_dir: pathlib.Path | None = None  # folder with files of KEEL, at any depth
    # tables with rare classes; two at least
    tables: Annotated[tuple[str, ...], TABLE] = (
        *("breast_cancer:0.1", "wine:0.2", "iris:0.2", "digits-8"),
    )
    # tables some of whose training labels are flipped; two at least
    flipped_tables: Annotated[tuple[str, ...], TABLE] = ("breast_cancer", "wine")
    flips: Annotated[tuple[float, ...], BELOW_1, OR_NONE] = (0.4,)  # shares of each class
    folds: Annotated[int, config.FROM_2] = 5  # of a cross-validation
    shuffles: Annotated[int, FROM_1] = 1  # number of cross-validations
    validation: Annotated[float, INSIDE] = 0.25  # share of a fold held out, for the search
    # on tables with rare classes, losses and methods beside the optimiser alone
    losses: tuple[Literal[*OF_RARE], ...] = OF_RARE
    methods: tuple[Literal[*RARE], ...] = tuple(m for m in RARE if not RARE[m][0].rgd)
    optimizer: Literal[*OPTIMIZERS] = "SGD"  # behind the weights
    steps: Annotated[int, FROM_1] = 300  # of a run
    batch_size: Annotated[int, FROM_1] = 32  # examples a step
    hidden: Annotated[tuple[int, ...], FROM_1, OR_NONE] = (32, 32)  # widths of the hidden layers
    # to choose from
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (0.003, 0.01, 0.03, 0.1, 0.3)
    weight_decays: Annotated[tuple[float, ...], NOT_NEGATIVE] = (1e-4, 1e-2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds * self.shuffles > SEARCH_SEED:
            raise ValueError(
                f"--folds times --shuffles must not exceed {SEARCH_SEED}, the first seed of the "
                f"search, got {self.folds} times {self.shuffles}; lower one"
            )


class Table(NamedTuple):
    x: np.ndarray  # [N, D], float32
    y: np.ndarray  # [N], int32: 0 is the most frequent class


class Fold(NamedTuple):
    """What a run is trained and evaluated on; several have a leading axis."""

    batches: Any  # [steps, n], int32: rows of the table
    labels: Any  # [N], int32: of the table, some of them flipped
    evaluation: Any  # [E], int32: rows; the last ones are filled up with the first
    size: Any  # of the evaluation without those
    mean: Any  # [D]: of the training examples
    std: Any  # [D]
    counts: Any  # [C]: of the training examples
    weight: Any  # [C]: of a class, with mean 1 over the training examples


class Run(NamedTuple):
    """What the runs of a program differ in: every leaf has a leading axis over runs."""

    fold: Any
    loss: Any
    learning_rate: Any
    weight_decay: Any
    number: Any
    begin: Any
    within: Any
    tau: Any  # of RGD; infinite, if it is another method
    cap: Any  # of RGD's losses


def load(text: str, data_dir: pathlib.Path | None) -> Table:
    """The table of that name, unthinned."""
    name = text.partition(":")[0]
    ours, _, one = name.partition("-")
    if ours in SKLEARN and (one.isdecimal() or not one):
        x, y = getattr(sklearn.datasets, f"load_{ours}")(return_X_y=True)
        y = y == int(one) if one else y
    else:
        found = sorted(data_dir.rglob(f"{name}.dat")) if data_dir else []
        if not found:
            raise FileNotFoundError(
                f"{FLAGS} must be of {', '.join(SKLEARN)}, or files of KEEL in --data-dir, "
                f"got {name}, and {data_dir or 'no folder'} has no {name}.dat"
            )
        x, y = read_keel(found[0])
    _, inverse, sizes = np.unique(y, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ValueError(f"{FLAGS} must have two classes, got {name}, which has one; name another")
    rank = np.argsort(np.argsort(-sizes, stable=True))
    return Table(np.float32(x), np.int32(rank[inverse]))


def read_keel(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Features and classes of a file of KEEL; a class is its last column.

    A nominal feature becomes one of 0 and 1 a value. Rows that lack a value are left out.
    """
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    kinds = [line for line in lines if line.lower().startswith("@attribute")]
    rows = [[cell.strip() for cell in x.split(",")] for x in lines if x[0] not in "@%"]
    rows = [row for row in rows if not {"?", "<null>", ""} & {*row}]
    try:
        *columns, y = zip(*rows, strict=True)
        nominal = ("{" in kind for kind in kinds[:-1])
        return datasets.features(zip(columns, nominal, strict=True)), np.array(y)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or not a table of KEEL ({error})") from None


def make_folds(c: Config, text: str, table: Table, flip: float) -> Fold:
    """Those of the search, and behind them as many that are reported."""
    classes, share = int(table.y.max()) + 1, float(text.partition(":")[2] or 0)
    if min(class_counts(table.y, classes)) < c.folds:
        raise ValueError(f"{text} must have {c.folds} examples of every class: lower --folds")
    searched, reported = [], []
    for shuffle in range(c.shuffles):
        kfold = StratifiedKFold(c.folds, shuffle=True, random_state=shuffle)
        for k, (train, test) in enumerate(kfold.split(table.x, table.y)):
            seed, labels = shuffle * c.folds + k, table.y.copy()
            if share:
                sizes = class_counts(table.y[train], classes)
                thin = dict(imbalance_factor=share, max_count=max(sizes), seed=seed)
                try:
                    train = train[long_tailed_indices(table.y[train], **thin)]
                except ValueError:
                    raise ValueError(
                        f"{FLAGS} must have a share that leaves every class one example, and none "
                        f"more than it has, got {text} of {sizes.tolist()}; name another share"
                    ) from None
            labels[train], _ = flip_labels(table.y[train], flip, num_classes=classes, seed=seed)
            part, held_out = hold_out(c, text, labels, train)
            searched.append(make_fold(c, table, labels, part, held_out, SEARCH_SEED))
            reported.append(make_fold(c, table, labels, train, test, seed))
    folds = searched + reported
    longest = max(fold.size for fold in folds)
    folds = [f._replace(evaluation=np.resize(f.evaluation, longest)) for f in folds]
    return Fold(*map(np.stack, zip(*folds, strict=True)))


def hold_out(
    c: Config, text: str, labels: np.ndarray, train: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What is left of the examples, and a share of every class."""
    order = np.random.default_rng(SEARCH_SEED).permutation(train)
    groups = [order[labels[order] == k] for k in range(labels.max() + 1)]
    cuts = [max(1, round(c.validation * len(group))) for group in groups]
    if any(cut >= len(group) for cut, group in zip(cuts, groups, strict=True)):
        got = f"{c.validation}, and {min(map(len, groups))} examples of one"
        raise ValueError(f"--validation must leave some of every class of {text}, got {got}")
    parts = zip(groups, cuts, strict=True)
    left, held = zip(*((group[cut:], group[:cut]) for group, cut in parts), strict=True)
    return np.concatenate(left), np.concatenate(held)


def make_fold(
    c: Config, table: Table, labels: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int
) -> Fold:
    if c.batch_size > len(train):
        raise ValueError(
            f"--batch-size must not exceed the {len(train)} training examples, got {c.batch_size}"
        )
    counts = class_counts(labels[train], int(table.y.max()) + 1)
    weight = np.asarray(losses.class_balanced_weights(counts))
    std = table.x[train].std(axis=0)
    return Fold(
        layers.batches(np.random.default_rng(seed), train, c.steps, c.batch_size),
        labels,
        np.int32(test),
        np.int32(len(test)),
        table.x[train].mean(axis=0),
        np.where(std > 0, std, 1),
        np.float32(counts),
        weight / np.average(weight, weights=counts),
    )


def lifted(rule: Rule, rarest: float) -> float:
    """λ, or the target of an automatic one, by the share of the rarest class.

    An effective sample size F lets a share f gain 1 + √((1 / F - 1) (1 - f) / f) times its weight.
    """
    if not rule.automatic or rule.lift == math.inf:
        return rule.number
    bounded = 1 / (1 + (rule.lift - 1) ** 2 * rarest / (1 - rarest))
    return math.copysign(max(abs(rule.number), bounded), rule.number)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@functools.partial(jax.vmap, in_axes=(*[None] * 5, 0))
def train(
    c: Config, classes: int, automatic: bool, x: jax.Array, folds: Fold, run: Run
) -> tuple[jax.Array, jax.Array]:
    """Logits of the evaluation, and whether all losses were finite."""
    fold = jax.tree.map(lambda leaf: leaf[run.fold], folds)
    init_value = jnp.copysign(jnp.inf, run.number)
    tuned = target_ess(abs(run.number), init_value=init_value) if automatic else run.number
    tx = OPTIMIZERS[c.optimizer](
        optax.cosine_decay_schedule(run.learning_rate, c.steps),
        two_stage(tuned, run.begin),
        weight_decay=run.weight_decay,
    )
    params = layers.init(jax.random.key(run.fold), (x.shape[1], *c.hidden, classes))

    def logits(params, index):
        return layers.predict(params, (x[index] - fold.mean) / fold.std)

    def loss_fn(params, sums, opt_state, index):
        z, y = logits(params, index), fold.labels[index]
        each = jnp.stack([loss(z, y, fold) for loss in LOSSES.values()])[run.loss]
        level = levels(jax.lax.stop_gradient(each), y, classes, get_temperature(opt_state))
        each = each - jnp.where(run.within, level[y], 0)
        each *= jnp.exp(jax.lax.stop_gradient(jnp.minimum(each, run.cap)) / (run.tau + 1))
        return tilt(each, opt_state, sums).mean(), jnp.isfinite(each).all()

    params, finite = layers.learn(tx, loss_fn, params, fold.batches)
    return logits(params, fold.evaluation), finite.all()


def measure(z: np.ndarray, y: np.ndarray, finite: bool) -> dict[str, Any]:
    """What one run did, in percent."""
    z = np.nan_to_num(z.astype(float), posinf=0, neginf=0)
    classes, guess = z.shape[1], z.argmax(axis=1)
    recalls = [(guess[y == k] == k).mean() for k in range(classes)]
    # Of two classes that of the rare one, otherwise the mean over one against the rest.
    precisions = [
        average_precision_score(y == k, z[:, k] - np.logaddexp.reduce(np.delete(z, k, 1), axis=1))
        for k in range(1 if classes == 2 else 0, classes)
    ]
    return {
        "balanced": 100 * np.mean(recalls),
        "precision": 100 * np.mean(precisions),
        "worst": 100 * min(recalls),
        "near_guess": int(diverged(finite, np.mean(recalls), classes)),
        "one_class": int(len(np.unique(guess)) == 1),
    }


def evaluate(
    c: Config, table: Table, folds: Fold, jobs: list[tuple[Setting, int]]
) -> dict[tuple[Setting, int], dict[str, Any]]:
    """What becomes of each pair of a setting and a fold."""
    found = {}
    share = folds.counts.min(axis=1) / folds.counts.sum(axis=1)
    for automatic in (False, True):
        group = [job for job in jobs if job[0].rule.automatic == automatic]
        runs = [
            Run(
                *(fold, tuple(LOSSES).index(s.loss), s.learning_rate, s.weight_decay),
                math.inf if s.rule.rgd else lifted(s.rule, share[fold]),
                *(round(s.rule.begin * c.steps), s.rule.within),
                tau=s.rule.number if s.rule.rgd else math.inf,
                cap=s.rule.number if s.rule.rgd and s.rule.clipped else math.inf,
            )
            for s, fold in group
        ]
        trained = functools.partial(train, c, folds.counts.shape[1], automatic, table.x, folds)
        outcomes = layers.train_in_parts(trained, runs, AT_ONCE)
        for (s, fold), (z, finite) in zip(group, outcomes, strict=True):
            rows = folds.evaluation[fold][: folds.size[fold]]
            found[s, fold] = measure(z[: len(rows)], folds.labels[fold][rows], finite)
    return found


def cross_validate(
    c: Config, text: str, flip: float, table: Table, folds: Fold
) -> dict[str, dict[str, Any]]:
    """What becomes of each loss and method in the setting that was chosen for each fold."""
    reported = c.folds * c.shuffles
    counts = folds.counts[reported:]
    share = np.mean(counts.min(axis=1) / counts.sum(axis=1))
    methods, names = {m: RARE[m] for m in c.methods}, c.losses
    if flip:
        methods, names = WRONG, OF_WRONG
    methods = {c.optimizer: (Rule(math.inf),), **methods}
    grids = {}
    for loss, (method, rules) in product(names, methods.items()):
        choices = product(rules, c.learning_rates, c.weight_decays)
        grids[f"{loss}, {method}"] = [Setting(loss, method, *choice) for choice in choices]

    def run(pairs: list[tuple[Setting, int]], searching: bool) -> dict[Any, dict[str, Any]]:
        first = 0 if searching else reported
        found = evaluate(c, table, folds, [(s, first + k) for s, k in pairs])
        return {(s, k): found[s, first + k] for s, k in pairs}

    def best(_: tuple[str, int], grid: Mapping[Any, dict[str, Any]]) -> tuple[Setting, int]:
        # The average precision decides between equals.
        return max(grid, key=lambda pair: [grid[pair][k] for k in SCORES])

    keys = product(grids, range(reported))
    found = search({(name, k): [(s, k) for s in grids[name]] for name, k in keys}, run, best)
    records = {}
    for name, grid in grids.items():
        chosen = [found.chosen[name, k] for k in range(reported)]
        records[f"{text}, {flip:g}, {name}"] = {
            **{"table": text, "share": share, "flipped": flip},
            **{"loss": grid[0].loss, "method": grid[0].method},
            **report.stack([found.final[pair] for pair in chosen]),
            "chosen": [[*s.rule[:2], s.learning_rate, s.weight_decay] for s, _ in chosen],
        }
    return records


def of_tables(records: list[dict[str, Any]], measure: str) -> np.ndarray:
    """The mean over folds of every table."""
    return np.array([np.mean(record[measure]) for record in records])


def summary(results: list[dict[str, Any]]) -> str:
    """Means over tables, and of the difference from the optimiser alone, ± the standard error."""
    over = f"over {results[0]['method']}"
    figures = "balanced accuracy", over, "average precision", over, "worst", over
    rows = [("flipped", "loss", "method", *figures, "next to a guess", "one class")]
    for (flip, loss, method), found in grouped(results, "flipped", "loss", "method").items():
        if method in OPTIMIZERS:
            plain = found
        row = [f"{flip:g}", loss, method]
        for name in ("balanced", "precision", "worst"):
            x, y = of_tables(found, name), of_tables(plain, name)
            row += [f"{x.mean():.1f}", "" if found is plain else report.difference(x, y)]
        for name in ("near_guess", "one_class"):
            runs = np.concatenate([record[name] for record in found])
            row.append(report.share(runs))
        rows.append(tuple(row))
    return report.markdown(rows)


def by_table(results: list[dict[str, Any]]) -> str:
    """Balanced accuracy of the optimiser alone, and the mean difference of each method from it."""
    parts = []
    for flipped in (False, True):
        chosen = [r for r in results if bool(r["flipped"]) == flipped]
        methods = dict.fromkeys(r["method"] for r in chosen)
        rows = [("table", "flipped", "share", "loss", *methods)]
        for (text, flip, loss), found in grouped(chosen, "table", "flipped", "loss").items():
            plain, *others = (np.array(record["balanced"]) for record in found)
            cells = [f"{np.mean(x - plain):+.1f}" for x in others]
            share = f"{100 * found[0]['share']:.1f} %"
            rows.append((text, f"{flip:g}", share, loss, report.mean_std(plain, ".1f"), *cells))
        parts += [report.markdown(rows)] if len(rows) > 1 else []
    return "\n\n".join(parts)


def grouped(
    results: list[dict[str, Any]], *keys: str
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The records that agree in the keys."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in results:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def plot(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """What each method gains over the optimiser alone: a dot a table with rare classes."""
    gains = {}
    found = grouped([r for r in results if not r["flipped"]], "loss", "method")
    for (loss, method), records in found.items():
        if method in OPTIMIZERS:
            plain = of_tables(records, "balanced")
        else:
            gains[loss, method] = of_tables(records, "balanced") - plain
    plots.dots({f"balanced accuracy over {results[0]['method']}, points": gains}, path)


def main() -> None:
    c = config.read(Config, __doc__)
    for tables in (c.tables, c.flipped_tables):
        if len({*tables}) < 2:
            config.fail(f"{FLAGS} must be two at least, got {', '.join(tables)}; name another")
    parts = [(text, 0.0) for text in c.tables]
    parts += [(text, flip) for text in c.flipped_tables for flip in c.flips if flip]
    jobs = []
    with config.refusing():
        for text, flip in parts:
            table = load(text, c.data_dir)
            jobs.append((text, flip, table, make_folds(c, text, table, flip)))
    results: dict[str, dict[str, Any]] = {}
    with report.folder(c):
        for job in tqdm(jobs, unit="table"):
            results |= cross_validate(c, *job)
        records = list(results.values())
        short = summary(records)
        report.write(c.out, results, short, by_table(records))
        plot(records, c.out / "tabular.png")
    print(short)


if __name__ == "__main__":
    main()
