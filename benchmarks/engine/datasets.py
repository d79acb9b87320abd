"""The data sets: scikit-learn's digits, folders of IDX files, and the CIFAR archives."""

import gzip
import pathlib
import pickle
import struct
import tarfile
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
    "cifar10": "get it from https://www.cs.toronto.edu/~kriz/cifar.html and pass its folder as "
    "--data-dir",
}
SOURCES["cifar100"] = SOURCES["cifar10"]


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

    if data_dir is None:
        data_dir = DEBIAN if name == "fashion-mnist" else pathlib.Path()
    read = _read_idx_split if name in ("fashion-mnist", "idx") else _read_cifar_split
    try:
        splits = read(name, data_dir, train=True), read(name, data_dir, train=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {SOURCES[name]}.") from None
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


def _find(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    if len(files) != 1:
        found = "several: " + ", ".join(f.name for f in files) if files else "none"
        raise FileNotFoundError(
            f"looked for one file {pattern} in {folder.absolute()}, found {found}"
        )
    return files[0]


def _damaged(path: pathlib.Path, why: object) -> ValueError:
    return ValueError(f"{path} is damaged ({why}); delete it and get it anew.")


def _read_idx_split(name: str, folder: pathlib.Path, *, train: bool) -> Split:
    del name
    part = "train" if train else "t10k"
    paths = [_find(folder, f"*{part}-{kind}-ubyte*") for kind in ("images-idx3", "labels-idx1")]
    images, labels = map(read_idx, paths)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise _damaged(paths[0], f"images {images.shape}, labels {labels.shape}")
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
        raise _damaged(path, error) from None


def _read_cifar_split(name: str, folder: pathlib.Path, *, train: bool) -> Split:
    if name == "cifar10":
        path = _find(folder, "cifar-10-python.tar.gz")
        batches = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
        members, key = [f"cifar-10-batches-py/{b}" for b in batches], b"labels"
    else:
        path = _find(folder, "cifar-100-python.tar.gz")
        members, key = ["cifar-100-python/" + ("train" if train else "test")], b"fine_labels"
    try:
        with tarfile.open(path, "r:gz") as archive:
            batches = [
                ArrayUnpickler(archive.extractfile(m), encoding="bytes").load() for m in members
            ]
        images = np.concatenate([b[b"data"].reshape(-1, 3, 32, 32) for b in batches])
        labels = np.concatenate([np.asarray(b[key], np.int32) for b in batches])
        if images.dtype != np.uint8 or len(images) != len(labels):
            raise ValueError(f"images {images.dtype} {images.shape}, labels {labels.shape}")
    # What a damaged stream raises depends on where it is hit.
    except (
        tarfile.TarError, OSError, EOFError, zlib.error, KeyError, ValueError, TypeError,
        AttributeError, IndexError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise _damaged(path, error) from None
    return Split(images.transpose(0, 2, 3, 1), labels)


class ArrayUnpickler(pickle.Unpickler):
    """Loads arrays, numbers, strings and containers of these; any other name is an error."""

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = np.empty(0).__reduce__()[0]
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not an array")
        return allowed[module, name]
