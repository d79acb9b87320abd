"""Labels that mislead, in Flax Linen: TrainState and AdamW, without and with λ < 0.

    python examples/linen_trainstate.py

``TrainState.apply_gradients`` has no place for ``value``, so ``scale_by_attention`` stands in front
of it, as a pair of pure functions with a state of its own. A small network on scikit-learn's
digits; of each class 40 % of the training labels name the next one. After a fifth of the steps as
plain AdamW, λ is -1. Test accuracy, mean ± standard deviation over 5 seeds: AdamW 60.4 ± 2.5 %,
with attention 82.7 ± 4.0 %. Of four learning rates this one is the best for both on held-out
training images, with clean labels.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from sklearn.datasets import load_digits

from absgd_jax import AttentionState, scale_by_attention, tilt, two_stage
from absgd_jax.data import flip_labels

TRAIN, BATCH = 1300, 64
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
net = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
adamw = optax.adamw(3e-4)


class TrainState(train_state.TrainState):
    attention: AttentionState


@functools.partial(jax.jit, static_argnames="attend")
def train_step(attend, state, images, labels):
    def loss_fn(params):
        losses = cross_entropy(state.apply_fn(params, images), labels)
        return tilt(losses, state.attention).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    grads, attention = attend.update(grads, state.attention, value=loss)
    return state.apply_gradients(grads=grads, attention=attention)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()

    images, truth = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, jnp.float32)
    temperatures = {
        "AdamW": jnp.inf,
        "AdamW with attention": two_stage(-1.0, begin=args.steps // 5),
    }
    for name, temperature in temperatures.items():
        attend = scale_by_attention(temperature)
        accuracies = []
        for seed in range(args.seeds):
            labels, _ = flip_labels(
                truth[:TRAIN], 0.4, kind="asymmetric", num_classes=10, seed=seed
            )
            params = net.init(jax.random.key(seed), images[:1])
            state = TrainState.create(
                apply_fn=net.apply, params=params, tx=adamw, attention=attend.init(params)
            )
            for batch in np.random.default_rng(seed).integers(TRAIN, size=(args.steps, BATCH)):
                state = train_step(attend, state, images[batch], labels[batch])
            logits = net.apply(state.params, images[TRAIN:])
            accuracies.append(100 * np.mean(logits.argmax(axis=-1) == truth[TRAIN:]))
        print(
            f"{name}: test accuracy {np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f} %"
        )


if __name__ == "__main__":
    main()
