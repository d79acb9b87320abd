import gzip
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from sklearn.datasets import load_digits

from benchmarks.engine import datasets

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


def official_pickle(obj):
    """Pickled as by Python 2, which wrote the archives: every string is one of bytes."""

    def save_string(pickler, text):
        data = text.encode("latin1") if isinstance(text, str) else text
        pickler.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        pickler.memoize(text)

    file = io.BytesIO()
    pickler = pickle._Pickler(file, protocol=2)
    pickler.dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}
    pickler.dump(obj)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def write_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_cifar(folder, name, n=3):
    """Returns images [N, 32, 32, 3] and labels of the training split, then of the test split."""
    if name == "cifar10":
        path, root, key = "cifar-10-python.tar.gz", "cifar-10-batches-py/", "labels"
        parts = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    else:
        path, root, key = "cifar-100-python.tar.gz", "cifar-100-python/", "fine_labels"
        parts = ["train", "test"]
    images = RNG.integers(0, 256, (len(parts), n, 32, 32, 3), np.uint8)
    labels = RNG.permuted(np.tile(np.arange(n), (len(parts), 1)), axis=1)
    members = {}
    for part, x, y in zip(parts, images, labels, strict=True):
        rows = x.transpose(0, 3, 1, 2).reshape(n, 3072)
        batch = {"batch_label": part, key: y.tolist(), "data": rows, "filenames": ["a.png"] * n}
        members[root + part] = official_pickle(batch)
    write_archive(folder / path, members)
    train = images[:-1].reshape(-1, 32, 32, 3), labels[:-1].ravel()
    return *train, images[-1], labels[-1]


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


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, name):
    expected = write_cifar(tmp_path, name)
    train, test = datasets.load(name, tmp_path)
    for found, wanted in zip((*train, *test), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32


def test_unpickler_takes_arrays_alone(tmp_path):
    class Command:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        evil = pickle.dumps({b"data": Command(), b"fine_labels": [0]}, protocol)
        members = {"cifar-100-python/train": evil, "cifar-100-python/test": evil}
        write_archive(tmp_path / "cifar-100-python.tar.gz", members)
        with pytest.raises(ValueError, match=r"damaged \(.* is not an array\)"):
            datasets.load("cifar100", tmp_path)
    assert not (tmp_path / "made").exists()


def test_damaged_cifar(tmp_path):
    write_cifar(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-python.tar.gz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    hole = whole[:middle] + whole[middle + 9 :]
    for content in (whole[:middle], whole[:20], b"", b"no archive", hole):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz is damaged .* get it anew"):
            datasets.load("cifar10", tmp_path)
    of_train = [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)]
    narrow = {"data": np.zeros((2, 3000), np.uint8), "labels": [0, 1]}
    for batch in (narrow, [1, 2]):
        write_archive(path, dict.fromkeys(of_train, official_pickle(batch)))
        with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz is damaged"):
            datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion-mnist", "train-images-idx3-ubyte.*apt-get install dataset-fashion-mnist"),
        ("idx", "train-images-idx3-ubyte.*--data-dir"),
        ("cifar10", "cifar-10-python.tar.gz.*--data-dir"),
        ("cifar100", "cifar-100-python.tar.gz.*--data-dir"),
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
