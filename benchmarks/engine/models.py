"""Small image classifiers: a linear one, an MLP, a CNN and the ResNets of the CIFAR papers.

Each is a list of blocks and a head, so that training can keep the lower blocks as they are. Beside
them, for what is measured of losses per token, a language model of one block.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from absgd_jax.losses import normalized_logits

NAMES = ("linear", "mlp", "cnn", "resnet8", "resnet32")
CONVOLUTIONAL = NAMES[2:]


def is_slow_in_a_loop(name: str) -> bool:
    """Whether XLA has no fast kernel for its gradient there: that of a convolution, on CPUs."""
    return name in CONVOLUTIONAL and jax.default_backend() == "cpu"


class Classifier(nnx.Module):
    """Blocks, and a linear head whose logits are float32."""

    def __init__(
        self, blocks: list, features: int, classes: int, *, normalized: bool, rngs: nnx.Rngs
    ):
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(features, classes, use_bias=not normalized, rngs=rngs)
        self.normalized = normalized

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [B, classes] of images [B, H, W, channels]; cosines if ``normalized``."""
        x = self.features(x)
        return normalized_logits(x, self.head.kernel[...]) if self.normalized else self.head(x)

    def features(self, x: jax.Array) -> jax.Array:
        """What the head sees of images."""
        for block in self.blocks:
            x = block(x)
        return x.reshape(len(x), -1).astype(jnp.float32)


class Dense(nnx.Module):
    def __init__(self, inputs: int, outputs: int, **kwargs):
        self.linear = nnx.Linear(inputs, outputs, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.linear(x.reshape(len(x), -1)))


class Convolution(nnx.Module):
    def __init__(self, inputs: int, outputs: int, **kwargs):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), strides=(2, 2))


class NormalizedConvolution(nnx.Module):
    """3x3 convolution and batch normalisation, as the ResNets have them."""

    def __init__(self, inputs: int, outputs: int, strides: int = 1, **kwargs):
        conv = {"use_bias": False, "kernel_init": nnx.initializers.he_normal(), **kwargs}
        self.conv = nnx.Conv(inputs, outputs, (3, 3), strides, **conv)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Residual(nnx.Module):
    """Two convolutions beside a shortcut without parameters: strided, padded with channels of 0."""

    def __init__(self, inputs: int, outputs: int, strides: int, **kwargs):
        self.first = NormalizedConvolution(inputs, outputs, strides, **kwargs)
        self.second = NormalizedConvolution(outputs, outputs, **kwargs)
        self.strides, self.padding = strides, (outputs - inputs) // 2

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.second(nnx.relu(self.first(x)))
        shortcut = x[:, :: self.strides, :: self.strides]
        return nnx.relu(y + jnp.pad(shortcut, [(0, 0)] * 3 + [(self.padding, self.padding)]))


def resnet_blocks(channels: int, *, depth: int, **kwargs) -> list[nnx.Module]:
    """The stem and three stages of a CIFAR ResNet of 6 n + 2 layers, the last one pooled."""
    stem = nnx.Sequential(NormalizedConvolution(channels, 16, **kwargs), nnx.relu)
    stages = []
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        first = Residual(inputs, outputs, outputs // inputs, **kwargs)
        rest = [Residual(outputs, outputs, 1, **kwargs) for _ in range((depth - 2) // 6 - 1)]
        stages.append([first, *rest])
    stages[-1].append(lambda x: x.mean(axis=(1, 2)))
    return [stem, *(nnx.Sequential(*stage) for stage in stages)]


def make_model(
    name: str,
    image_shape: tuple[int, int, int],
    classes: int,
    *,
    rngs: nnx.Rngs,
    hidden: Sequence[int] = (256, 128),
    normalized: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> Classifier:
    """The model of that name; its parameters are float32, ``dtype`` is what it computes in."""
    height, width, channels = image_shape
    kwargs = {"dtype": dtype, "rngs": rngs}
    if name == "linear":
        blocks, features = [], height * width * channels
    elif name == "mlp":
        widths = [height * width * channels, *hidden]
        blocks = [Dense(*pair, **kwargs) for pair in itertools.pairwise(widths)]
        features = widths[-1]
    elif name == "cnn":
        pooled, features = (height // 4) * (width // 4) * 64, 128
        blocks = [Convolution(channels, 32, **kwargs), Convolution(32, 64, **kwargs)]
        blocks.append(Dense(pooled, features, **kwargs))
    else:
        depth = int(name.removeprefix("resnet"))
        blocks, features = resnet_blocks(channels, depth=depth, **kwargs), 64
    return Classifier(blocks, features, classes, normalized=normalized, rngs=rngs)


class LanguageModel(nnx.Module):
    """A transformer block between an embedding and a head."""

    def __init__(
        self, vocabulary: int, length: int, features: int, *, heads: int = 4, rngs: nnx.Rngs
    ):
        self.embedding = nnx.Embed(vocabulary, features, rngs=rngs)
        self.position = nnx.Embed(length, features, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(features, rngs=rngs) for _ in range(3)])
        self.attention = nnx.MultiHeadAttention(heads, features, decode=False, rngs=rngs)
        self.expand = nnx.Linear(features, 4 * features, rngs=rngs)
        self.contract = nnx.Linear(4 * features, features, rngs=rngs)
        self.head = nnx.Linear(features, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits [B, T, vocabulary] of the tokens that follow tokens [B, T]."""
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))[None]
        x += self.attention(self.norms[0](x), mask=nnx.make_causal_mask(tokens))
        x += self.contract(nnx.gelu(self.expand(self.norms[1](x))))
        return self.head(self.norms[2](x))
