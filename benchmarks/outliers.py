"""Regression with gross errors in the targets: robust losses, and λ < 0 on squared errors.

    python -m benchmarks.outliers

A share of the training targets is wrong. In standard deviations of the right ones, with U uniform
from --smallest to --largest,

    symmetric  y is off by U or -U
    one_sided  y is off by U
    clustered  y is the mean of U ± 0.1, whatever x is
    leverage   y is off by U, and x is three times as far from its mean

The data are Friedman's function #1 with noise (1991; scikit-learn's make_friedman1), scikit-learn's
diabetes, and plotnine's diamonds, whose price is predicted. What is reported is the RMSE on test
data without gross errors (of the function without noise), in those standard deviations.

A network sees targets less their median over their MAD, which is scaled as for a normal
distribution. A loss that has a scale gets it from the same grid: the standard deviation of the
noise that it supposes, by the constant that is 95 % efficient if it is right. Learning rate, scale
and shape, and an effective sample size, are those with the best MAE, median absolute residual or
RMSE on data of other seeds, which have as many gross errors as those for training. The methods are

    Huber, Tukey  by δ = 1.345 and c = 4.685 times the scale
    Barron        the general loss (CVPR 2019) by the shapes 1, 0 and -2
    TERM          t < 0 by the batch's own weights (Li et al., ICLR 2021)
    fixed λ       ABSGD, λ = -c², where c, 2.985 times the scale, is that of the Welsch loss
    ESS           target_ess(f, init_value=-jnp.inf)
    later         after a part of the steps of least squares, --begin
"""

import csv
import dataclasses
import functools
import importlib.util
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from sklearn.datasets import load_diabetes, make_friedman1
from tqdm import tqdm

from absgd_jax import abadam, target_ess, tilt, two_stage
from benchmarks.engine import config, datasets, layers, plots, report
from benchmarks.engine.config import BELOW_1, FROM_1, INSIDE, NOT_NEGATIVE, OR_NONE, POSITIVE
from benchmarks.engine.search import Found, search, SEEDS, seeds_of

AT_ONCE = 16  # runs of a program
TESTED = 1 / 4  # share of a data set; of the rest the search holds out as much
NORMAL = 1.4826  # standard deviation / MAD
FAR = 3.0  # an RMSE, in standard deviations
CRITERIA = "mae", "median", "rmse"  # of the residuals on validation data
MARKERS = {"symmetric": "o", "one_sided": "s", "clustered": "D", "leverage": "^"}
KINDS = tuple(MARKERS)
# What is drawn, and how.
STYLES = {
    "least squares": ("#777777", "--"),
    "MAE": ("#CC79A7", "--"),
    "Huber": ("#009E73", "--"),
    "Tukey": ("#0072B2", "--"),
    "Barron": ("#56B4E9", "--"),
    "TERM": ("#E69F00", "--"),
    "fixed λ, later": ("black", "-"),
    "ESS, later": ("#D55E00", "-"),
}
MANY = config.whole_from(16)


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """The errors, and what to choose from."""

    out: pathlib.Path = pathlib.Path("out/outliers")  # folder to write to
    # what to predict; diamonds need the extra "outliers"
    datasets: tuple[Literal["function", "diabetes", "diamonds"], ...] = ("function", "diabetes")
    kinds: tuple[Literal[*KINDS], ...] = KINDS  # of errors
    shares: Annotated[tuple[float, ...], INSIDE] = (0.2, 0.4)  # of wrong targets, beside none
    smallest: Annotated[float, NOT_NEGATIVE] = 0.0  # error, in standard deviations
    largest: Annotated[float, NOT_NEGATIVE] = 6.0  # error, likewise
    examples: Annotated[int, MANY] = 2500  # of a data set at most, a quarter of them to test on
    epochs: Annotated[int, FROM_1] = 30  # passes over what is not to test on
    batch_size: Annotated[int, FROM_1] = 64  # examples a step
    hidden: Annotated[tuple[int, ...], FROM_1, OR_NONE] = (32, 32)  # widths of the hidden layers
    seeds: Annotated[int, SEEDS] = 5  # draws of the errors that are reported
    search_seeds: Annotated[int, FROM_1] = 1  # draws for every setting of the search
    begin: Annotated[float, BELOW_1] = 0.1  # share of the steps before λ < 0, where it is later
    # to choose from
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (0.003, 0.01)
    # of the noise that a loss supposes, in MADs
    scales: Annotated[tuple[float, ...], POSITIVE] = (0.1, 0.2, 0.4)
    ess: Annotated[tuple[float, ...], INSIDE] = (0.6, 0.8)  # of the automatic λ


class Table(NamedTuple):
    """A quarter, its first rows, is to test on."""

    x: np.ndarray  # [N, D], standardised
    y: np.ndarray  # [N], standardised
    truth: np.ndarray  # [N]: y, without noise if that is known


class Sample(NamedTuple):
    """What a run is trained and evaluated on; all have a leading axis."""

    x: Any  # [N, D]: of the table, some of them wrong
    y: Any  # [N]: less their center, over their spread
    center: Any
    spread: Any
    batches: Any  # [steps, n], int32: rows
    evaluation: Any  # [E], int32: rows
    truth: Any  # [E]


class Setting(NamedTuple):
    """What a search chooses from; several have a leading axis."""

    loss: Any = 0  # of LOSSES
    shape: Any = 1.0
    scale: Any = 1.0  # of a residual
    temperature: Any = math.inf  # or the target of an automatic one
    automatic: Any = False
    gamma: Any = 0.9
    begin: Any = 0.0  # share of the steps before it
    learning_rate: Any = 0.0


def tukey(r: jax.Array, _: jax.Array, c: jax.Array) -> jax.Array:
    return c**2 / 6 * (1 - jnp.maximum(1 - (r / c) ** 2, 0) ** 3)


def barron(r: jax.Array, shape: jax.Array, c: jax.Array) -> jax.Array:
    """For shapes below 2; times c², so that small residuals are half their squares."""
    z, b = (r / c) ** 2, 2 - shape
    a = jnp.where(shape == 0, 1, shape)
    return c**2 * jnp.where(shape == 0, jnp.log1p(z / 2), b / a * ((z / b + 1) ** (a / 2) - 1))


# By residual, shape and scale.
LOSSES: dict[str, Callable[..., jax.Array]] = {
    "least squares": lambda r, *_: r**2,
    "MAE": lambda r, *_: jnp.abs(r),
    "Huber": lambda r, _, delta: optax.huber_loss(r, delta=delta),
    "Tukey": tukey,
    "Barron": barron,
}
# By shape, the scales at which they are 95 % as efficient as least squares on normal noise.
EFFICIENT = {
    "Huber": {1.0: 1.345},
    "Tukey": {1.0: 4.685},
    "Barron": {1.0: 1.287, 0.0: 1.686, -2.0: 1.894},
}
WELSCH = 2.985


def knobs_of(c: Config) -> dict[str, tuple[float, ...]]:
    """Of the methods that are reported by each of them, too."""
    return {"ESS, later": c.ess, "Tukey": c.scales, "fixed λ, later": c.scales}


def grids(c: Config) -> dict[tuple[str, str], list[Setting]]:
    """What there is to choose from, by method and criterion."""
    methods = {"least squares": [Setting()], "MAE": [Setting(loss=1)]}
    for name, constants in EFFICIENT.items():
        loss, pairs = list(LOSSES).index(name), itertools.product(constants.items(), c.scales)
        methods[name] = [Setting(loss, shape, k * s) for (shape, k), s in pairs]
    fixed = [Setting(temperature=-((WELSCH * s) ** 2)) for s in c.scales]
    automatic = [Setting(temperature=f, automatic=True) for f in c.ess]
    methods["TERM"] = [s._replace(gamma=1.0) for s in fixed]
    for name, settings in (("fixed λ", fixed), ("ESS", automatic)):
        later = [s._replace(begin=c.begin) for s in settings]
        methods |= {name: settings, f"{name}, later": later}
    found = {(name, by): settings for name, settings in methods.items() for by in CRITERIA}
    for name, knobs in knobs_of(c).items():
        found |= {(f"{name} {k:g}", "mae"): [s] for k, s in zip(knobs, methods[name], strict=True)}
    return {
        key: [s._replace(learning_rate=rate) for s in settings for rate in c.learning_rates]
        for key, settings in found.items()
    }


def diamonds() -> tuple[np.ndarray, np.ndarray]:
    """Features, a nominal one being one of 0 and 1 a value, and the price."""
    package = importlib.util.find_spec("plotnine")
    if package is None:
        raise FileNotFoundError(
            '--datasets diamonds needs plotnine, which has them: pip install ".[outliers]"'
        )
    path = pathlib.Path(package.origin).parent / "data" / "diamonds.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    price = np.array(columns.pop("price"), float)
    nominal = {"cut", "color", "clarity"}
    return datasets.features((x, name in nominal) for name, x in columns.items()), price


def load(c: Config, name: str) -> Table:
    if name == "function":
        x, truth = make_friedman1(c.examples, noise=0.0, random_state=0)
        y = truth + np.random.default_rng(0).normal(size=len(truth))
    else:
        x, y = load_diabetes(return_X_y=True) if name == "diabetes" else diamonds()
        truth = y
    rows = np.random.default_rng(0).permutation(len(y))[: c.examples]
    x, (y, truth) = x[rows], ((v[rows] - y.mean()) / y.std() for v in (y, truth))
    return Table((x - x.mean(axis=0)) / x.std(axis=0), y, truth)


def spoil(
    c: Config, rng: np.random.Generator, kind: str, share: float, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both, a share of them wrong."""
    x, y = x.copy(), y.copy()
    wrong = rng.permutation(len(y))[: round(share * len(y))]
    error = c.smallest + (c.largest - c.smallest) * rng.random(len(wrong))
    if kind == "clustered":
        y[wrong] = rng.normal((c.smallest + c.largest) / 2, 0.1, len(wrong))
    else:
        y[wrong] += error * (rng.choice([-1, 1], len(wrong)) if kind == "symmetric" else 1)
    x[wrong] *= 3 if kind == "leverage" else 1
    return x, y


def draw(c: Config, table: Table, kind: str, share: float, seed: int, searching: bool) -> Sample:
    """The errors of a seed; the search is evaluated on a part of them."""
    rng, (x, y, truth) = np.random.default_rng(seed), table
    n = round(TESTED * len(y))
    wrong = spoil(c, rng, kind, share, x[n:], y[n:])
    x, y = (np.concatenate([v[:n], w]) for v, w in zip((x, y), wrong, strict=True))
    held_out, train = np.arange(n), rng.permutation(np.arange(n, len(y)))
    steps = max(1, c.epochs * len(train) // c.batch_size)
    if searching:
        held_out, train, truth = train[:n], train[n:], y
    batches = layers.batches(rng, train, steps, c.batch_size)
    center = np.median(y[train])
    spread = NORMAL * np.median(np.abs(y[train] - center))
    std = x[train].std(axis=0)
    x = np.float32((x - x[train].mean(axis=0)) / np.where(std > 0, std, 1))
    y = np.float32((y - center) / spread)
    return Sample(x, y, center, spread, batches, np.int32(held_out), truth[held_out])


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.vmap, in_axes=(None, None, None, 0))
def train(
    c: Config, automatic: bool, samples: Sample, job: tuple[Setting, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """What is predicted of the evaluation of a sample, and whether all losses were finite."""
    s, of = job
    tuned = target_ess(s.temperature, init_value=-jnp.inf) if automatic else s.temperature
    steps = samples.batches.shape[1]
    begin = jnp.round(s.begin * steps).astype(int)
    rate = optax.cosine_decay_schedule(s.learning_rate, steps)
    tx = abadam(rate, two_stage(tuned, begin), gamma=s.gamma)
    params = layers.init(jax.random.key(of), (samples.x.shape[-1], *c.hidden, 1))

    def predict(params, rows):
        return layers.predict(params, samples.x[of, rows])[:, 0]

    def loss_fn(params, sums, opt_state, rows):
        r = predict(params, rows) - samples.y[of, rows]
        each = jnp.stack([loss(r, s.shape, s.scale) for loss in LOSSES.values()])[s.loss]
        return tilt(each, opt_state, sums).mean(), jnp.isfinite(each).all()

    params, finite = layers.learn(tx, loss_fn, params, samples.batches[of])
    return predict(params, samples.evaluation[of]), finite.all()


def measure(predicted: np.ndarray, truth: np.ndarray, finite: bool) -> dict[str, Any]:
    """What one run did.

    It diverged, too, if its predictions don't follow the truth, or are further off than a model of
    the errors alone would be.
    """
    predicted = np.nan_to_num(predicted.astype(float), posinf=0, neginf=0)
    residuals = np.abs(predicted - truth)
    rmse = np.sqrt(np.mean(residuals**2))
    follows = predicted.std() > 0 and np.corrcoef(predicted, truth)[0, 1] > 0.1
    return {
        "mae": residuals.mean(),
        "median": np.median(residuals),
        "rmse": rmse,
        "diverged": int(not (finite and follows and rmse < FAR)),
        "predicted": predicted,
    }


def evaluate(
    c: Config, samples: Sample, jobs: list[tuple[Setting, int]]
) -> dict[tuple[Setting, int], dict[str, Any]]:
    """What becomes of each pair of a setting and a sample."""
    found = {}
    for automatic in (False, True):
        group = [job for job in jobs if job[0].automatic == automatic]
        trained = functools.partial(train, c, automatic, samples)
        runs = layers.train_in_parts(trained, group, AT_ONCE)
        for (s, k), (z, finite) in zip(group, runs, strict=True):
            z = z * samples.spread[k] + samples.center[k]
            found[s, k] = measure(z, samples.truth[k], finite)
    return found


def find(
    c: Config, table: Table, kind: str, share: float, grids: Mapping[tuple[str, str], list[Setting]]
) -> Found:
    """The best setting of each method by each criterion, and what becomes of it."""
    seeds = [(s, searching) for searching in (True, False) for s in seeds_of(c, searching)]
    drawn = [draw(c, table, kind, share, *s) for s in seeds]
    samples = Sample(*map(np.stack, zip(*drawn, strict=True)))

    def run(settings: list[Setting], searching: bool) -> dict[Setting, dict[str, np.ndarray]]:
        chosen = [i for i, (_, searched) in enumerate(seeds) if searched == searching]
        found = evaluate(c, samples, list(itertools.product(settings, chosen)))
        return {s: report.stack([found[s, i] for i in chosen]) for s in settings}

    def best(key: tuple[str, str], grid: Mapping[Setting, dict[str, np.ndarray]]) -> Setting:
        return min(grid, key=lambda s: grid[s][key[1]].mean())

    return search(grids, run, best)


def compare(
    c: Config, name: str, table: Table, kind: str, share: float
) -> dict[str, dict[str, Any]]:
    """What becomes of each method, by each criterion."""
    found = find(c, table, kind, share, grids(c))
    methods: dict[str, dict[str, Any]] = {}
    for (method, criterion), setting in found.chosen.items():
        final = {k: found.final[setting][k] for k in (*CRITERIA, "diverged")}
        record = {"setting": list(setting), **final}
        methods.setdefault(method, {})[criterion] = record
    seen = [[*s, *(of[k].mean() for k in CRITERIA)] for s, of in found.seen.items()]
    return {"data": name, "kind": kind, "share": share, "methods": methods, "validation": seen}


def tables(c: Config, results: list[dict[str, Any]]) -> list[str]:
    """RMSE by each criterion, what it is less than Huber's, and what was chosen."""
    methods = list(results[0]["methods"])
    each = methods[methods.index("ESS, later") + 1 :]
    methods = methods[: -len(each)]

    def table(title: str, columns: list[str], cell: Callable[[dict[str, Any], str], str]) -> str:
        rows = [("data", "errors", "share", *columns)]
        for r in results:
            cells = (cell(r["methods"], method) for method in columns)
            rows.append((r["data"], r["kind"], f"{r['share']:g}", *cells))
        return f"{title}\n\n{report.markdown(rows)}"

    def figures(record: dict[str, Any]) -> str:
        right = record["diverged"] == 0
        text = report.mean_std(record["rmse"][right], ".3f") if right.sum() > 1 else "–"
        return text if right.all() else f"{text}, {sum(~right)} diverged"

    def score(criterion: str) -> Callable[[dict[str, Any], str], str]:
        return lambda of, method: figures(of[method][criterion])

    def gain(of: dict[str, Any], method: str) -> str:
        ours, huber = of[method]["mae"], of["Huber"]["mae"]
        both = ours["diverged"] + huber["diverged"] == 0
        if method == "Huber" or both.sum() < 2:
            return ""
        return report.difference(ours["rmse"][both], huber["rmse"][both], ".3f")

    def chosen(of: dict[str, Any], method: str) -> str:
        knobs = Setting(*of[method]["mae"]["setting"])
        named = zip(("shape", "scale", "λ or f"), knobs[1:4], Setting()[1:4], strict=True)
        text = [f"{name} {x:.3g}" for name, x, usual in named if x != usual]
        return ", ".join([*text, f"rate {knobs.learning_rate:g}"])

    right = "RMSE on right targets, of runs that didn't diverge, where validation MAE chooses:"
    return [
        table(right, methods, score("mae")),
        table("The same less Huber's, paired by seed, ± standard error:", methods, gain),
        table("Where the median absolute residual chooses:", methods, score("median")),
        table("Where validation RMSE chooses:", methods, score("rmse")),
        table("By f, and by the scale:", each, score("mae")),
        table("What MAE chooses:", methods, chosen),
    ]


def plot(c: Config, results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Median RMSE of the runs, a row a data set.

    A panel a kind over the share of errors, and one over f and one over the scale.
    """
    shape = len(c.datasets), len(c.kinds) + 2
    size = 2.3 * shape[1] + 1.8, 2.4 * shape[0] + 0.6
    figure, grid = plt.subplots(*shape, figsize=size, sharey="row", squeeze=False)

    def median(record: dict[str, Any], method: str) -> float:
        return np.median(record["methods"][method]["mae"]["rmse"])

    for row, name in zip(grid, c.datasets, strict=True):
        records = [r for r in results if r["data"] == name]
        for axes, kind in zip(row, c.kinds, strict=False):
            of = [r for r in records if r["kind"] in (kind, "none")]
            for method, (color, ls) in STYLES.items():
                style = {"color": color, "ls": ls, "lw": 2 if ls == "-" else 1.2}
                axes.plot([r["share"] for r in of], [median(r, method) for r in of], **style)
            axes.set_title(f"{name}, {kind.replace('_', '-')}")
        for axes, (method, knobs) in zip(row[[-2, -1, -1]], knobs_of(c).items(), strict=True):
            for of in (r for r in records if r["share"] == c.shares[-1]):
                style = {"color": STYLES[method][0], "marker": MARKERS[of["kind"]]}
                each = [median(of, f"{method} {k:g}") for k in knobs]
                axes.plot(knobs, each, lw=1, ms=4, **style)
            axes.set_title(f"{name}, share {c.shares[-1]:g}")
        row[-1].set_xscale("log")
        row[-1].set_xticks(c.scales, [f"{s:g}" for s in c.scales])
        row[-1].minorticks_off()
        row[0].set_yscale("log")
        row[0].set_ylim(top=min(FAR, row[0].get_ylim()[1]))  # what diverged is above
        row[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        row[0].yaxis.set_major_formatter("{x:g}")
        row[0].minorticks_off()
    labels = ["share of wrong targets"] * len(c.kinds) + ["f of ESS", "scale"]
    for axes, label in zip(grid[-1], labels, strict=True):
        axes.set_xlabel(label)
    lines = [Line2D([], [], color=x, ls=ls, label=name) for name, (x, ls) in STYLES.items()]
    dots = [(kind.replace("_", "-"), MARKERS[kind]) for kind in c.kinds]
    lines += [Line2D([], [], color="grey", lw=0, marker=m, label=name) for name, m in dots]
    figure.legend(handles=lines, loc="outside right upper")
    figure.supylabel("RMSE on right targets, median")
    plots.save(figure, path)


def main() -> None:
    c = config.read(Config, __doc__)
    with config.refusing():
        loaded = {name: load(c, name) for name in c.datasets}
    wrong = [("none", 0.0), *((kind, share) for kind in c.kinds for share in c.shares)]
    jobs = [(name, table, *how) for name, table in loaded.items() for how in wrong]
    with report.folder(c):
        results = [compare(c, *job) for job in tqdm(jobs, unit="data set")]
        text = tables(c, results)
        named = {f"{r['data']} {r['kind']} {r['share']:g}": r for r in results}
        report.write(c.out, named, *text)
        plot(c, results, c.out / "outliers.png")
    print(text[0])


if __name__ == "__main__":
    main()
