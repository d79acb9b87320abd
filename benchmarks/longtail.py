"""Losses for imbalanced classes on long-tailed digits, each with SGD and with ABSGD.

    python -m benchmarks.longtail

Trains a small network on scikit-learn's handwritten digits, made long-tailed; which digits are the
rare ones is drawn anew for every seed. Learning rate, temperature and stages are those with the
best accuracy on a validation split; what is reported is the final epoch on a test split. Both
splits are balanced. All temperatures, rates and seeds of a loss are one compiled program, vmapped.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

from absgd_jax import absgd, get_temperature, losses, robust_loss
from absgd_jax.data import class_counts, long_tailed_indices
from benchmarks import report

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = 10
HELD_OUT = 40  # images a class in the validation split, and in the test split
RARE = 3  # the classes with the fewest images, whose accuracy is reported beside that of all
SECOND_STAGE = 0.5  # share of the epochs before it

cross_entropy = optax.softmax_cross_entropy_with_integer_labels

# Losses of logits z, labels y and class counts n. What the second stage of training brings: w, the
# class-balanced weights, and k, the threshold of truncation.
LOSSES: dict[str, Callable[..., jax.Array]] = {
    "cross_entropy": lambda z, y, n, w, k: cross_entropy(z, y),
    "cb_drw": lambda z, y, n, w, k: w[y] * cross_entropy(z, y),
    "focal": lambda z, y, n, w, k: losses.focal(z, y),
    "ldam_drw": lambda z, y, n, w, k: w[y] * losses.ldam(z, y, class_counts=n),
    "balanced_softmax": lambda z, y, n, w, k: losses.balanced_softmax(z, y, class_counts=n),
    "arb": lambda z, y, n, w, k: losses.arb(z, y),
    "sce": lambda z, y, n, w, k: losses.symmetric_cross_entropy(z, y),
    "gce": lambda z, y, n, w, k: losses.generalized_cross_entropy(z, y),
    "truncated_gce": lambda z, y, n, w, k: losses.generalized_cross_entropy(z, y, truncation=k),
}


class Split(NamedTuple):
    images: Any  # [N, 64]
    labels: Any  # [N]


class Run(NamedTuple):
    """What one training run is made of, beside its loss and its data."""

    temperature: Any
    start: Any  # the step from which the temperature is on
    learning_rate: Any


class MLP(nnx.Module):
    """One hidden layer; the logits are cosines if ``normalized``."""

    def __init__(self, rngs: nnx.Rngs, normalized: bool):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, CLASSES, use_bias=not normalized, rngs=rngs)
        self.normalized = normalized

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.hidden(x))
        return (
            losses.normalized_logits(x, self.head.kernel[...]) if self.normalized else self.head(x)
        )


def long_tailed_digits(seed: int, imbalance: float) -> dict[str, Split]:
    """Splits whose labels are the classes' ranks: 0 has the most images in "train"."""
    rng = np.random.default_rng(seed)
    images, digits = load_digits(return_X_y=True)
    shuffled = rng.permutation(len(images))
    images = (images[shuffled] / 16).astype(np.float32)
    labels = rng.permutation(CLASSES)[digits[shuffled]]
    by_class = [np.flatnonzero(labels == c) for c in range(CLASSES)]
    rest = np.concatenate([members[2 * HELD_OUT :] for members in by_class])
    indices = {
        "train": rest[long_tailed_indices(labels[rest], imbalance, seed=rng)],
        "validation": np.concatenate([members[:HELD_OUT] for members in by_class]),
        "test": np.concatenate([members[HELD_OUT : 2 * HELD_OUT] for members in by_class]),
    }
    return {name: Split(images[i], labels[i]) for name, i in indices.items()}


def make_training(
    args: argparse.Namespace, method: str, counts: np.ndarray, steps: int, second_stage: int
):
    """Functions ``init(run, key) -> state`` and ``epoch(state, run, data, key)``, for one run."""
    normalized = method == "ldam_drw"
    graphdef, _ = nnx.split(MLP(nnx.Rngs(0), normalized))
    weights = losses.deferred_weights(losses.class_balanced_weights(counts), second_stage)

    def optimizer(run: Run) -> optax.GradientTransformationExtraArgs:
        stages = [optax.constant_schedule(jnp.inf), optax.constant_schedule(run.temperature)]
        return absgd(
            optax.cosine_decay_schedule(run.learning_rate, steps * args.epochs),
            optax.join_schedules(stages, [run.start]),
            weight_decay=args.weight_decay,
        )

    def init(run, key):
        params = nnx.state(MLP(nnx.Rngs(key), normalized), nnx.Param)
        return params, optimizer(run).init(params), jnp.int32(0)

    def epoch(state, run, data, key):
        """One pass over the data; its mean loss, and every class's accuracy after it."""
        tx = optimizer(run)

        def step(state, batch):
            params, opt_state, count = state

            def loss_fn(params):
                logits = nnx.merge(graphdef, params)(batch.images)
                late = weights(count), jnp.where(count < second_stage, 0.0, 0.5)
                each = LOSSES[method](logits, batch.labels, counts, *late)
                return robust_loss(each, get_temperature(opt_state)), each.mean()

            (loss, mean), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params, value=loss)
            return (optax.apply_updates(params, updates), opt_state, count + 1), mean

        shuffled = jax.random.permutation(key, len(data["train"].labels))
        batches = jax.tree.map(
            lambda a: a[shuffled[: steps * args.batch_size]].reshape(steps, -1, *a.shape[1:]),
            data["train"],
        )
        state, means = jax.lax.scan(step, state, batches)

        model = nnx.merge(graphdef, state[0])
        accuracy = {
            name: (model(data[name].images).argmax(axis=1) == data[name].labels)
            .reshape(CLASSES, HELD_OUT)
            .mean(axis=1)
            for name in ("validation", "test")
        }
        return state, means.mean(), accuracy

    return init, epoch


def train(args: argparse.Namespace, method: str, attentions: list[tuple[float, bool]]):
    """Loss [attention, rate, seed, epoch] and accuracy [..., class] of both splits."""
    seeds = range(args.seeds)
    splits = [long_tailed_digits(seed, args.imbalance) for seed in seeds]
    counts = class_counts(splits[0]["train"].labels, CLASSES)
    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *splits)
    steps = int(counts.sum()) // args.batch_size

    second_stage = int(SECOND_STAGE * args.epochs) * steps
    grid = [len(attentions), len(args.learning_rates), args.seeds]
    temperatures, starts = zip(
        *((t, second_stage * two_stage) for t, two_stage in attentions), strict=True
    )
    runs = Run(
        temperature=jnp.broadcast_to(jnp.array(temperatures)[:, None, None], grid),
        start=jnp.broadcast_to(jnp.array(starts)[:, None, None], grid),
        learning_rate=jnp.broadcast_to(jnp.array(args.learning_rates)[None, :, None], grid),
    )
    keys = jnp.stack([jax.random.split(jax.random.key(s), args.epochs + 1) for s in seeds])

    def over_grid(f, in_axes):
        """Vmap f over attentions, rates and seeds; data and keys differ by seed only."""
        by_run = [None if axes == "seed" else 0 for axes in in_axes]
        return jax.vmap(jax.vmap(jax.vmap(f), by_run), by_run)

    init, epoch = make_training(args, method, counts, steps, second_stage)
    run_epoch = jax.jit(over_grid(epoch, ("run", "run", "seed", "seed")), donate_argnums=0)
    state = over_grid(init, ("run", "seed"))(runs, keys[:, 0])
    history = []
    for e in tqdm(range(args.epochs), desc=method, unit="epoch"):
        state, loss, accuracy = run_epoch(state, runs, data, keys[:, 1 + e])
        history.append((loss, accuracy))
    return jax.tree.map(lambda *epochs: np.stack(epochs, axis=3), *history)


class Result(NamedTuple):
    """A loss, with or without attention, in the setting that the validation split chose."""

    loss: str
    temperature: float
    two_stage: bool
    learning_rate: float
    diverged: int  # runs whose loss is not finite, or whose accuracy is below twice a guess's
    overall: np.ndarray  # test accuracy in percent, [seed, epoch]
    rare: np.ndarray  # the same of the rarest classes
    rare_by_rate: np.ndarray  # the same of the last epoch at every learning rate, [rate, seed]


def choose(args: argparse.Namespace, method: str, attentions, loss, accuracy) -> Result:
    finite = np.isfinite(loss).all(axis=3)
    validation = accuracy["validation"][:, :, :, -1].mean(axis=(2, 3))
    a, r = np.unravel_index(validation.argmax(), validation.shape)
    test = 100 * accuracy["test"][a]
    return Result(
        method,
        *attentions[a],
        learning_rate=args.learning_rates[r],
        diverged=int(np.sum(~finite[a, r] | (test[r, :, -1].mean(axis=1) < 200 / CLASSES))),
        overall=test[r].mean(axis=2),
        rare=test[r, :, :, -RARE:].mean(axis=2),
        rare_by_rate=test[:, :, -1, -RARE:].mean(axis=2),
    )


def table(results: list[Result]) -> str:
    rows = [("loss", "λ", "rate", "accuracy", f"{RARE} rarest", "diverged")]
    for r in results:
        temperature = "∞" if np.isinf(r.temperature) else f"{r.temperature:g}"
        temperature += ", two-stage" * r.two_stage
        rate, diverged = f"{r.learning_rate:g}", f"{r.diverged} of {len(r.rare)}"
        accuracies = (report.mean_std(a[:, -1], ".1f") for a in (r.overall, r.rare))
        rows.append((r.loss, temperature, rate, *accuracies, diverged))
    return report.markdown(rows)


def plot(results: list[Result], rates: list[float], path: pathlib.Path) -> None:
    """All classes against the rarest, without and with attention; the rarest by learning rate."""
    figure, (trade, by_rate) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    colors = {r.loss: plt.get_cmap("tab10")(i // 2) for i, r in enumerate(results)}
    points = {}
    for r in results:
        attention = not np.isinf(r.temperature)
        label = r.loss + " + ABSGD" * attention
        color = colors[r.loss]
        x, y = r.overall[:, -1], r.rare[:, -1]
        if attention:
            arrow = {"arrowstyle": "->", "color": color, "shrinkA": 5, "shrinkB": 5}
            trade.annotate("", (x.mean(), y.mean()), points[r.loss], arrowprops=arrow)
        points[r.loss] = (x.mean(), y.mean())
        sem = [a.std(ddof=1) / np.sqrt(len(a)) for a in (x, y)]
        face = color if attention else "white"
        trade.errorbar(*points[r.loss], *sem[::-1], fmt="o", color=color, mfc=face, lw=0.8)
        mean, style = r.rare_by_rate.mean(axis=1), "o-" if attention else "o--"
        by_rate.plot(rates, mean, style, color=color, mfc=face, label=label)
    trade.set(xlabel="test accuracy, %", ylabel=f"test accuracy of the {RARE} rarest classes, %")
    trade.set_title("As chosen; bars are standard errors", fontsize="medium")
    by_rate.set(xscale="log", xlabel="learning rate", ylim=(0, 100))
    by_rate.set_title(f"The {RARE} rarest, by learning rate", fontsize="medium")
    by_rate.set_xticks(rates, [f"{rate:g}" for rate in rates])
    by_rate.minorticks_off()
    figure.legend(*by_rate.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    for axes in (trade, by_rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = report.make_parser(__doc__, seeds=10, out="out/longtail")
    add = parser.add_argument
    default = ["cross_entropy", "balanced_softmax"]
    add(
        "--methods",
        nargs="+",
        choices=LOSSES,
        default=default,
        metavar="LOSS",
        help=f"of {', '.join(LOSSES)}",
    )
    add("--epochs", type=int, default=60, help="number of epochs")
    add("--batch-size", type=int, default=32, help="examples a step")
    rates = [0.01, 0.03, 0.1, 0.3, 1.0]
    add("--learning-rates", type=float, nargs="+", default=rates, help="to choose from")
    add("--temperatures", type=float, nargs="+", default=[0.5, 2.0, 5.0], help="to choose from")
    add("--weight-decay", type=float, default=2e-4, help="L2 coefficient")
    add("--imbalance", type=float, default=0.05, help="images of the smallest class / largest")
    args = report.parse(parser)

    # SGD is the infinite temperature.
    attentions = [(jnp.inf, False)]
    attentions += [(t, two_stage) for two_stage in (False, True) for t in args.temperatures]
    results = []
    for method in args.methods:
        loss, accuracy = train(args, method, attentions)
        for part in (slice(0, 1), slice(1, None)):
            chosen_from = attentions[part], loss[part], {k: a[part] for k, a in accuracy.items()}
            results.append(choose(args, method, *chosen_from))

    print(table(results))
    plot(results, args.learning_rates, args.out / "longtail.png")
    # JSON has no infinity.
    records = [
        r._asdict() | ({"temperature": None} if np.isinf(r.temperature) else {}) for r in results
    ]
    report.save(args.out / "results.json", args, records)
    print(f"\nwrote results.json and longtail.png to {args.out}")


if __name__ == "__main__":
    main()
