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
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from sklearn.datasets import load_diabetes, make_friedman1
from tqdm import tqdm

from absgd_jax import abadam, target_ess, tilt, two_stage
from benchmarks.engine import config, layers, plots, report
from benchmarks.engine.config import BELOW_1, FROM_1, INSIDE, NOT_NEGATIVE, OR_NONE, POSITIVE
from benchmarks.engine.search import search, SEEDS, seeds_of

AT_ONCE = 32  # runs of a program; the last ones are filled up, so that one compilation serves all
TESTED = 1 / 4  # share of a data set, at most MOST_TESTED; of the rest the search holds out as much
MOST_TESTED = 4000
NORMAL = 1.4826  # standard deviation / MAD
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


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """The errors, and what to choose from."""

    out: pathlib.Path = pathlib.Path("out/outliers")  # folder to write to
    # what to predict; diamonds need pip install ".[outliers]"
    datasets: tuple[Literal["function", "diabetes", "diamonds"], ...] = ("function", "diabetes")
    kinds: tuple[Literal[*KINDS], ...] = KINDS  # of gross errors
    shares: Annotated[tuple[float, ...], INSIDE] = (0.2, 0.4)  # of wrong targets, beside none
    smallest: Annotated[float, NOT_NEGATIVE] = 0.0  # error, in standard deviations
    largest: Annotated[float, POSITIVE] = 6.0
    examples: Annotated[int, FROM_1] = 2000  # at most, to train on and to hold out from
    epochs: Annotated[int, FROM_1] = 30  # passes over them
    batch_size: Annotated[int, FROM_1] = 64  # examples a step
    hidden: Annotated[tuple[int, ...], FROM_1, OR_NONE] = (32, 32)  # widths of the hidden layers
    seeds: Annotated[int, SEEDS] = 5  # draws of the errors that are reported
    search_seeds: Annotated[int, FROM_1] = 1  # draws for every setting of the search
    begin: Annotated[float, BELOW_1] = 0.1  # share of the steps before λ < 0, where it is later
    # to choose from
    learning_rates: Annotated[tuple[float, ...], POSITIVE] = (0.003, 0.01)
    scales: Annotated[tuple[float, ...], POSITIVE] = (0.1, 0.2, 0.4)  # of the noise
    ess: Annotated[tuple[float, ...], INSIDE] = (0.6, 0.8)  # of the automatic λ

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smallest > self.largest:
            raise ValueError(
                f"--smallest must not exceed --largest, got {self.smallest} and {self.largest}"
            )


class Table(NamedTuple):
    """Its first rows are those to test on."""

    x: np.ndarray  # [N, D], standardised
    y: np.ndarray  # [N], standardised
    truth: np.ndarray  # [N]: y, without noise if that is known
    tested: int


class Sample(NamedTuple):
    """What a run is trained and evaluated on; all have a leading axis."""

    x: Any  # [N, D]: of the table, some of them wrong
    y: Any  # [N]
    batches: Any  # [steps, n], int32: rows
    evaluation: Any  # [E], int32: rows; the last ones are filled up with the first
    size: Any  # of the evaluation without those
    truth: Any  # [E]
    center: Any  # of the training targets
    spread: Any


class Setting(NamedTuple):
    """What a search chooses from."""

    loss: str = "squared"
    shape: float = 1.0
    scale: float = 1.0  # of a residual
    temperature: float = math.inf  # or the target of an automatic one
    automatic: bool = False
    gamma: float = 0.9
    begin: float = 0.0  # share of the steps before it
    learning_rate: float = 0.0


class Run(NamedTuple):
    """What the runs of a program differ in: every leaf has a leading axis over runs."""

    sample: Any
    loss: Any
    shape: Any
    scale: Any
    temperature: Any
    gamma: Any
    begin: Any
    learning_rate: Any


def huber(r: jax.Array, _: jax.Array, delta: jax.Array) -> jax.Array:
    return optax.huber_loss(r, delta=delta)


def tukey(r: jax.Array, _: jax.Array, c: jax.Array) -> jax.Array:
    return c**2 / 6 * (1 - jnp.maximum(1 - (r / c) ** 2, 0) ** 3)


def barron(r: jax.Array, shape: jax.Array, c: jax.Array) -> jax.Array:
    """For shapes below 2; times c², so that small residuals are half their squares."""
    z, b = (r / c) ** 2, 2 - shape
    a = jnp.where(shape == 0, 1, shape)
    return c**2 * jnp.where(shape == 0, jnp.log1p(z / 2), b / a * ((z / b + 1) ** (a / 2) - 1))


# By residual, shape and scale.
LOSSES: dict[str, Callable[..., jax.Array]] = {
    "squared": lambda r, *_: r**2,
    "absolute": lambda r, *_: jnp.abs(r),
    "huber": huber,
    "tukey": tukey,
    "barron": barron,
}
# Scales at which a loss is 95 % as efficient as least squares on normal noise, by its shape.
EFFICIENT = {
    "huber": {1.0: 1.345},
    "tukey": {1.0: 4.685},
    "barron": {1.0: 1.287, 0.0: 1.686, -2.0: 1.894},
}
WELSCH = 2.985


def grids(c: Config) -> dict[tuple[str, str], list[Setting]]:
    """What there is to choose from, by method and criterion."""
    methods = {"least squares": [Setting()], "MAE": [Setting("absolute")]}
    for loss, constants in EFFICIENT.items():
        methods[loss.title()] = [
            Setting(loss, shape, k * s) for shape, k in constants.items() for s in c.scales
        ]
    fixed = [Setting(temperature=-((WELSCH * s) ** 2)) for s in c.scales]
    automatic = [Setting(temperature=f, automatic=True) for f in c.ess]
    methods["TERM"] = [s._replace(gamma=1.0) for s in fixed]
    for name, settings in (("fixed λ", fixed), ("ESS", automatic)):
        methods[name] = settings
        methods[f"{name}, later"] = [s._replace(begin=c.begin) for s in settings]
    for name, base, knobs in (
        ("ESS", "ESS, later", c.ess),
        ("Tukey", "Tukey", c.scales),
        ("fixed λ", "fixed λ, later", c.scales),
    ):
        methods |= {f"{name} {k:g}": [s] for k, s in zip(knobs, methods[base], strict=True)}
    return {
        (name, criterion): [s._replace(learning_rate=r) for s in settings for r in c.learning_rates]
        for name, settings in methods.items()
        for criterion in CRITERIA
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
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    price = columns.pop("price").astype(float)
    nominal = {"cut", "color", "clarity"}
    features = [
        x[:, None] == np.unique(x) if name in nominal else x.astype(float)[:, None]
        for name, x in columns.items()
    ]
    return np.concatenate(features, axis=1, dtype=float), price


def load(c: Config, name: str) -> Table:
    if name == "function":
        x, truth = make_friedman1(2 * c.examples, noise=0.0, random_state=0)
        y = truth + np.random.default_rng(0).normal(size=len(truth))
    else:
        x, y = load_diabetes(return_X_y=True) if name == "diabetes" else diamonds()
        truth = y
    tested = min(round(TESTED * len(y)), MOST_TESTED)
    if tested == 0 or c.batch_size > (1 - TESTED) * min(c.examples, len(y) - tested) - 1:
        raise ValueError(
            f"--batch-size must not exceed what --examples leaves to train on, got {c.batch_size} "
            f"and {c.examples}; lower it, or raise --examples"
        )
    rows = np.random.default_rng(0).permutation(len(y))[: tested + c.examples]
    x, (y, truth) = x[rows], ((v[rows] - y.mean()) / y.std() for v in (y, truth))
    return Table((x - x.mean(axis=0)) / x.std(axis=0), y, truth, tested)


def spoil(
    rng: np.random.Generator, kind: str, share: float, size: Any, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both, a share of them wrong; the size of an error is between two numbers."""
    x, y = x.copy(), y.copy()
    wrong = rng.permutation(len(y))[: round(share * len(y))]
    error = rng.uniform(*size, len(wrong))
    if kind == "clustered":
        y[wrong] = rng.normal(np.mean(size), 0.1, len(wrong))
    else:
        y[wrong] += error * (rng.choice([-1, 1], len(wrong)) if kind == "symmetric" else 1)
    x[wrong] *= 3 if kind == "leverage" else 1
    return x, y


def draw(c: Config, table: Table, kind: str, share: float, seed: int, searching: bool) -> Sample:
    """The errors of a seed; the search is evaluated on a part of them."""
    rng, (x, y, truth, tested) = np.random.default_rng(seed), table
    wrong = spoil(rng, kind, share, (c.smallest, c.largest), x[tested:], y[tested:])
    x, y = (np.concatenate([v[:tested], w]) for v, w in zip((x, y), wrong, strict=True))
    train, held_out = tested + rng.permutation(len(y) - tested), np.arange(tested)
    if searching:
        held_out, train = np.split(train, [round(TESTED * len(train))])
        truth = y
    center = np.median(y[train])
    spread = NORMAL * np.median(np.abs(y[train] - center))
    std = x[train].std(axis=0)
    steps = max(1, c.epochs * (len(y) - tested) // c.batch_size)
    needed = steps * c.batch_size
    orders = [rng.permutation(train) for _ in range(-(-needed // len(train)))]
    rows = np.resize(held_out, max(tested, round(TESTED * (len(y) - tested))))
    return Sample(
        np.float32((x - x[train].mean(axis=0)) / np.where(std > 0, std, 1)),
        np.float32((y - center) / spread),
        np.int32(np.concatenate(orders)[:needed].reshape(steps, c.batch_size)),
        np.int32(rows),
        np.int32(len(held_out)),
        truth[rows],
        center,
        spread,
    )


def train_one(c: Config, automatic: bool, samples: Sample, run: Run) -> tuple[jax.Array, jax.Array]:
    """What is predicted of the evaluation, and whether all losses were finite."""
    tuned = target_ess(run.temperature, init_value=-jnp.inf) if automatic else run.temperature
    rate = optax.cosine_decay_schedule(run.learning_rate, samples.batches.shape[1])
    tx = abadam(rate, two_stage(tuned, run.begin), gamma=run.gamma)
    params = layers.init(jax.random.key(run.sample), (samples.x.shape[-1], *c.hidden, 1))

    def predict(params, rows):
        return layers.predict(params, samples.x[run.sample, rows])[:, 0]

    def loss_fn(params, sums, opt_state, rows):
        r = predict(params, rows) - samples.y[run.sample, rows]
        each = jnp.stack([loss(r, run.shape, run.scale) for loss in LOSSES.values()])[run.loss]
        return tilt(each, opt_state, sums).mean(), jnp.isfinite(each).all()

    params, finite = layers.learn(tx, loss_fn, params, samples.batches[run.sample])
    return predict(params, samples.evaluation[run.sample]), finite.all()


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(c: Config, automatic: bool, samples: Sample, runs: Run) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(functools.partial(train_one, c, automatic, samples))(runs)


def measure(predicted: np.ndarray, truth: np.ndarray, finite: bool) -> dict[str, Any]:
    """What one run did; it diverged, too, if its predictions don't follow the truth."""
    predicted = np.nan_to_num(predicted.astype(float), posinf=0, neginf=0)
    residuals = np.abs(predicted - truth)
    moves = predicted.std() > 0
    follows = moves and np.corrcoef(predicted, truth)[0, 1] > 0.1
    return {
        "mae": residuals.mean(),
        "median": np.median(residuals),
        "rmse": np.sqrt(np.mean(residuals**2)),
        "diverged": int(not (finite and follows)),
    }


def evaluate(c: Config, samples: Sample, jobs: list[tuple[Setting, int]]) -> list[dict[str, Any]]:
    """What becomes of each pair of a setting and a sample."""
    found: dict[int, dict[str, Any]] = {}
    for automatic in (False, True):
        numbers = [i for i, (s, _) in enumerate(jobs) if s.automatic == automatic]
        for at in range(0, len(numbers), AT_ONCE):
            part = numbers[at : at + AT_ONCE]
            settings, of = zip(*(jobs[i] for i in np.resize(part, AT_ONCE)), strict=True)
            numeric = ("shape", "scale", "temperature", "gamma", "begin", "learning_rate")
            knobs = {k: np.float32([getattr(s, k) for s in settings]) for k in numeric}
            knobs["begin"] = np.int32(np.round(knobs["begin"] * samples.batches.shape[1]))
            loss = np.int32([tuple(LOSSES).index(s.loss) for s in settings])
            runs = Run(sample=np.int32(of), loss=loss, **knobs)
            predictions, finite = map(np.asarray, train(c, automatic, samples, runs))
            for i, z, ok in zip(part, predictions, finite, strict=False):
                k = jobs[i][1]
                n = samples.size[k]
                z = z[:n] * samples.spread[k] + samples.center[k]
                found[i] = measure(z, samples.truth[k][:n], bool(ok))
    return [found[i] for i in range(len(jobs))]


def compare(
    c: Config, name: str, table: Table, kind: str, share: float
) -> dict[str, dict[str, Any]]:
    """What becomes of each method, by each criterion."""
    seeds = [(s, searching) for searching in (True, False) for s in seeds_of(c, searching)]
    drawn = [draw(c, table, kind, share, *s) for s in seeds]
    samples = Sample(*map(np.stack, zip(*drawn, strict=True)))

    def run(settings: list[Setting], searching: bool) -> dict[Setting, dict[str, np.ndarray]]:
        chosen = [i for i, (_, searched) in enumerate(seeds) if searched == searching]
        found = iter(evaluate(c, samples, [(s, i) for s in settings for i in chosen]))
        runs = {s: [next(found) for _ in chosen] for s in settings}
        return {s: {k: np.array([r[k] for r in rs]) for k in rs[0]} for s, rs in runs.items()}

    def best(key: tuple[str, str], grid: Mapping[Setting, dict[str, np.ndarray]]) -> Setting:
        return min(grid, key=lambda s: grid[s][key[1]].mean())

    found = search(grids(c), run, best)
    methods: dict[str, dict[str, Any]] = {}
    for (method, criterion), setting in found.chosen.items():
        record = {"setting": list(setting), **found.final[setting]}
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
        for record in results:
            cells = [cell(record["methods"], method) for method in columns]
            rows.append((record["data"], record["kind"], f"{record['share']:g}", *cells))
        return f"{title}\n\n{report.markdown(rows)}"

    def score(criterion: str) -> Callable[[dict[str, Any], str], str]:
        return lambda of, method: report.mean_std(of[method][criterion]["rmse"], ".3f")

    def gain(of: dict[str, Any], method: str) -> str:
        x, y = (of[name]["mae"]["rmse"] for name in (method, "Huber"))
        return "" if method == "Huber" else report.difference(x, y, ".3f")

    def diverged(of: dict[str, Any], method: str) -> str:
        return f"{of[method]['mae']['diverged'].sum()} of {c.seeds}"

    def chosen(of: dict[str, Any], method: str) -> str:
        s = Setting(*of[method]["mae"]["setting"])
        knobs = {
            "shape ": s.shape if s.loss == "barron" else None,
            "scale ": s.scale if s.loss in EFFICIENT else None,
            "f = " if s.automatic else "λ = ": s.temperature if s.temperature != math.inf else None,
            "rate ": s.learning_rate,
        }
        return ", ".join(f"{k}{x:.3g}" for k, x in knobs.items() if x is not None)

    return [
        table("RMSE on right targets, where validation MAE chooses:", methods, score("mae")),
        table("The same less Huber's, paired by seed, ± standard error:", methods, gain),
        table("Where the median absolute residual chooses:", methods, score("median")),
        table("Where validation RMSE chooses:", methods, score("rmse")),
        table("By f, and by the scale; ESS and fixed λ are later:", each, score("mae")),
        table("Runs that diverged, where MAE chooses:", methods + each, diverged),
        table("What MAE chooses:", methods, chosen),
    ]


def plot(c: Config, results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """RMSE over the share of errors, a row a data set and a panel a kind; then over f and scale."""
    shape = len(c.datasets), len(c.kinds) + 2
    size = 2.3 * shape[1] + 1.8, 2.4 * shape[0] + 0.6
    figure, grid = plt.subplots(*shape, figsize=size, sharey="row", squeeze=False)

    def mean(record: dict[str, Any], method: str) -> float:
        return record["methods"][method]["mae"]["rmse"].mean()

    for row, name in zip(grid, c.datasets, strict=True):
        records = [r for r in results if r["data"] == name]
        for axes, kind in zip(row, c.kinds, strict=False):
            of = [r for r in records if r["kind"] in (kind, "none")]
            for method, (color, ls) in STYLES.items():
                style = {"color": color, "ls": ls, "lw": 2 if ls == "-" else 1.2}
                axes.plot([r["share"] for r in of], [mean(r, method) for r in of], **style)
            axes.set_title(f"{name}, {kind.replace('_', '-')}")
        for method, axes, knobs in (
            ("ESS, later", row[-2], c.ess),
            ("Tukey", row[-1], c.scales),
            ("fixed λ, later", row[-1], c.scales),
        ):
            for of in (r for r in records if r["share"] == c.shares[-1]):
                style = {"color": STYLES[method][0], "marker": MARKERS[of["kind"]]}
                y = [mean(of, f"{method.removesuffix(', later')} {k:g}") for k in knobs]
                axes.plot(knobs, y, lw=1, ms=4, **style)
            axes.set_title(f"{name}, share {c.shares[-1]:g}")
        row[-1].set_xscale("log")
        row[-1].set_xticks(c.scales, [f"{s:g}" for s in c.scales], minor=False)
        row[-1].xaxis.set_minor_locator(NullLocator())
        row[0].set_yscale("log")
        row[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        row[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        row[0].yaxis.set_minor_locator(NullLocator())
    labels = ["share of wrong targets"] * len(c.kinds) + ["f of ESS", "scale"]
    for axes, label in zip(grid[-1], labels, strict=True):
        axes.set_xlabel(label)
    lines = [Line2D([], [], color=x, ls=ls, label=name) for name, (x, ls) in STYLES.items()]
    lines += [
        Line2D([], [], marker=MARKERS[kind], color="grey", lw=0, label=kind.replace("_", "-"))
        for kind in c.kinds
    ]
    figure.legend(handles=lines, loc="outside right upper")
    figure.supylabel("RMSE on right targets")
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
