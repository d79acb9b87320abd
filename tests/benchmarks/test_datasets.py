import gzip
import os
import struct
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from benchmarks.engine import datasets

os.environ["KERAS_BACKEND"] = "jax"

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 4, 3), np.uint8)
LABELS = np.array([0, 1, 1, 0, 1], np.uint8)
IMAGE = np.zeros((3, 4, 4, 1), np.uint8)


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_idx(folder, prefix=""):
    for part, n in (("train", 5), ("t10k", 2)):
        images, labels = idx(IMAGES[:n]), gzip.compress(idx(LABELS[:n]))
        (folder / f"{prefix}{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{prefix}{part}-labels-idx1-ubyte.gz").write_bytes(labels)


def test_digits():
    train, test = datasets.load("digits")
    assert (train.images.shape, test.images.shape) == ((1397, 8, 8, 1), (400, 8, 8, 1))
    assert (train.images.dtype, train.images.max()) == (np.uint8, 16)
    # The images are all different, but for their order those of scikit-learn.
    every = np.concatenate([train.images, test.images]).reshape(1797, 64)
    reference, digits = load_digits(return_X_y=True)
    known = dict(zip(map(np.ndarray.tobytes, reference.astype(np.uint8)), digits, strict=True))
    labels = np.concatenate([train.labels, test.labels])
    assert [known[image.tobytes()] for image in every] == labels.tolist()
    assert len(np.unique(every, axis=0)) == len(np.unique(reference, axis=0))


@pytest.mark.parametrize("prefix", ["", "emnist-mnist-"])
def test_idx(tmp_path, prefix):
    write_idx(tmp_path, prefix)
    train, test = datasets.load("idx", tmp_path)
    expected = IMAGES[..., None], LABELS, IMAGES[:2, ..., None], LABELS[:2]
    for found, wanted in zip((*train, *test), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert train.labels.dtype == np.int32


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-10],  # cut off
        lambda content: content + b"\0",
        lambda content: b"\1" + content[1:],
        lambda content: content[:3],
        lambda content: idx(IMAGES[:4]),  # another number of images than of labels
        lambda content: b"",
    ],
)
def test_damaged_idx(tmp_path, damage):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name} is damaged .* get it anew"):
        datasets.load("idx", tmp_path)


def test_damaged_gzip(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    flipped = bytes([*whole[:15], whole[15] ^ 0xFF, *whole[16:]])
    for content in (whole[:-5], whole[:12], b"plain", flipped):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.gz is damaged"):
            datasets.load("idx", tmp_path)


class TestKeras:
    @pytest.mark.parametrize("name", ["cifar10", "cifar100"])
    def test_arrays(self, name, monkeypatch):
        """As Keras documents them: bytes, and labels in a column."""
        images = RNG.integers(0, 256, (5, 32, 32, 3), np.uint8)
        parts = (images, LABELS[:, None]), (images[:2], LABELS[:2, None])
        monkeypatch.setattr(f"keras.datasets.{name}.load_data", lambda: parts)
        for split, (x, y) in zip(datasets.load(name), parts, strict=True):
            np.testing.assert_array_equal(split.images, x)
            np.testing.assert_array_equal(split.labels, y[:, 0])
            assert split.labels.dtype == np.int32

    def test_no_network(self, monkeypatch):
        def load_data():
            raise Exception("URL fetch failure on https://data.org: None -- unreachable")

        monkeypatch.setattr("keras.datasets.cifar10.load_data", load_data)
        with pytest.raises(OSError, match=r"cifar10 can't be fetched \(URL fetch failure on .*"):
            datasets.load("cifar10")

    def test_no_keras(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "keras", None)
        with pytest.raises(FileNotFoundError, match=r'installed: pip install "\.\[cifar\]"'):
            datasets.load("cifar10")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion-mnist", "train-images-idx3-ubyte.*apt-get install dataset-fashion-mnist"),
        ("idx", "train-images-idx3-ubyte.*--data-dir"),
    ],
)
def test_missing(tmp_path, name, message):
    with pytest.raises(FileNotFoundError, match=message) as error:
        datasets.load(name, tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("images", "train", "test", "message"),
    [
        (IMAGE[:, :3], [0, 1, 1], [0, 1, 1], r"one size, got \(4, 4, 1\) and \(3, 4, 1\)"),
        (IMAGE, [0, 1, 1], [0, 1, 2], r"got \[0, 1\] and \[0, 1, 2\]"),
        (IMAGE, [0, 1, 2], [0, 1, 1], r"got \[0, 1, 2\] and \[0, 1\]"),
        (IMAGE, [0, 2, 2], [0, 2, 2], r"got \[0, 2\] and \[0, 2\]"),
        (IMAGE, [0, 0, 0], [0, 0, 0], r"two at least, got \[0\] and \[0\]"),
        (IMAGE[:0], [], [], r"two at least, got \[\] and \[\]"),
    ],
)
def test_splits_that_do_not_belong_together(images, train, test, message):
    train, test = (np.array(labels, np.int32) for labels in (train, test))
    with pytest.raises(ValueError, match=message):
        datasets.check(datasets.Split(IMAGE[: len(train)], train), datasets.Split(images, test))
