"""The data sets: scikit-learn's digits, folders of IDX files, and what Keras fetches."""

import gzip
import os
import pathlib
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
NAMES = ("digits", "fashion-mnist", "idx", "cifar10", "cifar100")

# Where the files of a data set come from, for whoever lacks them.
SOURCES = {
    "fashion-mnist": "Debian and Ubuntu: apt-get install dataset-fashion-mnist; elsewhere, the "
    "four files of https://github.com/zalandoresearch/fashion-mnist in the folder --data-dir",
    "idx": "pass the folder of the four files, named as MNIST's, as --data-dir",
}


class Split(NamedTuple):
    images: np.ndarray  # [N, H, W, channels], uint8
    labels: np.ndarray  # [N], int32


def load(name: str, data_dir: pathlib.Path | None = None) -> tuple[Split, Split]:
    """Training and test split of a data set.

    Raises:
      FileNotFoundError: A file is missing; the message says which, where, and how to get it.
      ValueError: A file is damaged, or the splits don't belong together.
    """
    if name == "digits":
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
        parts = train_test_split(
            images, labels.astype(np.int32), test_size=400, stratify=labels, random_state=0
        )
        return Split(*parts[::2]), Split(*parts[1::2])

    if name in SOURCES:
        folder = data_dir or (DEBIAN if name == "fashion-mnist" else pathlib.Path())
        try:
            splits = read_idx_split(folder, "train"), read_idx_split(folder, "t10k")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {SOURCES[name]}.") from None
    else:
        splits = fetch(name)
    check(*splits)
    return splits


def check(train: Split, test: Split) -> None:
    """Raises an error unless the splits have images of one size, and the same classes."""
    sizes = [split.images.shape[1:] for split in (train, test)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"The images must have one size, got {sizes[0]} and {sizes[1]} to test.")
    first, second = (np.unique(split.labels).tolist() for split in (train, test))
    if not first == second == list(range(max(len(first), 2))):
        raise ValueError(
            "The labels of both splits must be 0, 1 and so on, and two at least, got "
            f"{first} and {second} to test."
        )


def features(columns: Iterable[tuple[Sequence[Any], bool]]) -> np.ndarray:
    """Of columns of text, [N, D]: one that is nominal becomes one of 0 and 1 a value."""
    parts = (
        np.array(x)[:, None] == np.unique(x) if nominal else np.array(x, float)[:, None]
        for x, nominal in columns
    )
    return np.concatenate(list(parts), axis=1, dtype=float)


def find(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    if len(files) != 1:
        found = "several: " + ", ".join(f.name for f in files) if files else "none"
        raise FileNotFoundError(
            f"looked for one file {pattern} in {folder.absolute()}, found {found}"
        )
    return files[0]


def damaged(path: pathlib.Path, why: object) -> ValueError:
    return ValueError(f"{path} is damaged ({why}); delete it and get it anew.")


def read_idx_split(folder: pathlib.Path, part: str) -> Split:
    paths = [find(folder, f"*{part}-{kind}-ubyte*") for kind in ("images-idx3", "labels-idx1")]
    images, labels = map(read_idx, paths)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise damaged(paths[0], f"images {images.shape}, labels {labels.shape}")
    return Split(images[..., None], labels.astype(np.int32))


def read_idx(path: pathlib.Path) -> np.ndarray:
    """An IDX file of bytes, gzipped or not: two zeros, type 8, rank, big-endian sizes, data."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        zeros, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
        if (zeros, kind) != (0, 8):
            raise ValueError(f"it starts with {content[:4].hex()}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (ValueError, EOFError, gzip.BadGzipFile, struct.error, zlib.error) as error:
        raise damaged(path, error) from None


def fetch(name: str) -> tuple[Split, Split]:
    """Both splits of a data set of Keras, which downloads it once."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    try:
        import keras  # which is large, and of no other use here
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f'{name} is fetched by Keras, which isn\'t installed: pip install ".[cifar]"'
        ) from None
    try:
        parts = getattr(keras.datasets, name).load_data()
    except Exception as error:  # what Keras raises, if a download fails
        raise OSError(f"{name} can't be fetched ({error}); see to the network.") from None
    first, second = (Split(images, labels[:, 0].astype(np.int32)) for images, labels in parts)
    return first, second
