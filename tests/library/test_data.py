import numpy as np
import pytest

from absgd_jax.data import (
    class_counts,
    flip_labels,
    long_tailed_counts,
    long_tailed_indices,
    split_by_count,
)

CIFAR10 = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000))
CIFAR100 = np.repeat(np.arange(100, dtype=np.uint8), 500)


def test_class_counts():
    counts = class_counts(np.array([[2, 0], [2, 2]]), num_classes=4)
    np.testing.assert_array_equal(counts, [1, 0, 3, 0])


class TestLongTail:
    @pytest.mark.parametrize(("labels", "total"), [(CIFAR10, 12_406), (CIFAR100, 10_847)])
    def test_cifar(self, labels, total):
        num_classes = len(np.unique(labels))
        counts = long_tailed_counts(50_000 // num_classes, num_classes, 0.01)
        assert counts.sum() == total
        indices = long_tailed_indices(labels, 0.01, seed=0)
        np.testing.assert_array_equal(class_counts(labels[indices], num_classes), counts)
        assert len(np.unique(indices)) == total

    def test_step(self):
        np.testing.assert_array_equal(
            long_tailed_counts(50, 5, 0.1, kind="step"), [50, 50, 5, 5, 5]
        )

    def test_seed(self):
        first = long_tailed_indices(CIFAR10, 0.01, seed=3)
        np.testing.assert_array_equal(first, long_tailed_indices(CIFAR10, 0.01, seed=3))
        rng = np.random.default_rng(3)
        np.testing.assert_array_equal(first, long_tailed_indices(CIFAR10, 0.01, seed=rng))
        assert not np.array_equal(first, long_tailed_indices(CIFAR10, 0.01, seed=rng))
        assert not np.array_equal(first, long_tailed_indices(CIFAR10, 0.01, seed=4))

    def test_unequal_classes(self):
        labels = np.repeat([0, 1, 2], [40, 30, 50])
        indices = long_tailed_indices(labels, 0.1, class_order=[1, 2, 0], seed=0)
        np.testing.assert_array_equal(class_counts(labels[indices], 3), [3, 30, 9])
        indices = long_tailed_indices(labels, 0.1, max_count=40, seed=0)
        np.testing.assert_array_equal(class_counts(labels[indices], 3), [40, 12, 4])

    def test_indices_are_drawn_without_a_bias(self):
        labels = np.repeat([0, 1], 20)
        drawn = [long_tailed_indices(labels, 0.1, seed=seed) for seed in range(2000)]
        times = np.bincount(np.concatenate(drawn), minlength=40)
        np.testing.assert_array_equal(times[:20], 2000)
        np.testing.assert_allclose(times[20:], 200, atol=70)  # 5 standard deviations


@pytest.mark.parametrize(
    ("counts", "thresholds"),
    [([101, 100, 20, 19], {}), ([81, 80, 30, 29], {"many": 80, "few": 30})],
)
def test_split_by_count(counts, thresholds):
    groups = split_by_count(counts, **thresholds)
    assert [list(group) for group in groups] == [[0], [1, 2], [3]]


class TestFlipLabels:
    @pytest.mark.parametrize("rate", [0.0, 0.2, 1.0])
    def test_symmetric(self, rate):
        noisy, flipped = flip_labels(CIFAR10, rate, num_classes=10, seed=0)
        np.testing.assert_array_equal(flipped, noisy != CIFAR10)
        np.testing.assert_array_equal(class_counts(CIFAR10[flipped], 10), round(5000 * rate))
        landed = np.zeros([10, 10], int)
        np.add.at(landed, (CIFAR10[flipped], noisy[flipped]), 1)
        each = 5000 * rate / 9
        expected = each * (1 - np.eye(10))
        np.testing.assert_allclose(landed, expected, atol=6 * np.sqrt(each))

    def test_rate_is_rounded_and_not_truncated(self):
        _, flipped = flip_labels(np.repeat([0, 1], 100), 0.29, num_classes=2, seed=0)
        assert flipped.sum() == 58  # 0.29 * 100 is 28.999999999999996

    def test_symmetric_inclusive(self):
        noisy, flipped = flip_labels(
            CIFAR10, 0.5, kind="symmetric_inclusive", num_classes=10, seed=0
        )
        np.testing.assert_array_equal(flipped, noisy != CIFAR10)
        np.testing.assert_allclose(flipped.mean(), 0.5 * 9 / 10, atol=5e-3)

    def test_asymmetric(self):
        noisy, flipped = flip_labels(CIFAR10, 0.3, kind="asymmetric", num_classes=10, seed=0)
        np.testing.assert_array_equal(class_counts(CIFAR10[flipped], 10), 1500)
        np.testing.assert_array_equal(noisy[flipped], (CIFAR10[flipped] + 1) % 10)

    @pytest.mark.parametrize("rate", [0.4, 1.0])
    def test_transition_matrix(self, rate):
        transition = np.array([[0.5, 0.5, 0], [0, 1, 0], [0.2, 0.3, 0.5]])
        labels = np.repeat([0, 1, 2], 10_000)
        noisy, flipped = flip_labels(labels, rate, kind=transition, num_classes=3, seed=0)
        np.testing.assert_array_equal(flipped, noisy != labels)
        measured = np.stack([class_counts(noisy[labels == c], 3) / 10_000 for c in range(3)])
        expected = (1 - rate) * np.eye(3) + rate * transition
        np.testing.assert_allclose(measured, expected, atol=0.02)
        np.testing.assert_array_equal(measured[expected == 0], 0)

    def test_rows_that_sum_to_1_in_float32_only(self):
        transition = np.full((3, 3), 1 / 3, np.float32)
        transition[:, 0] += 1e-6
        _, flipped = flip_labels(CIFAR10 % 3, 1.0, kind=transition, num_classes=3, seed=0)
        np.testing.assert_allclose(flipped.mean(), 2 / 3, atol=0.01)

    def test_seed(self):
        def flip(seed):
            return flip_labels(CIFAR10, 0.3, num_classes=10, seed=seed)[0]

        np.testing.assert_array_equal(flip(3), flip(3))
        np.testing.assert_array_equal(flip(3), flip(np.random.default_rng(3)))
        assert not np.array_equal(flip(3), flip(4))

    def test_input_is_left_alone(self):
        labels, transition = np.array([0, 1] * 10), np.array([[0, 1 + 1e-7], [1, 0]])
        copies = labels.copy(), transition.copy()
        noisy, _ = flip_labels(labels, 1.0, kind=transition, num_classes=2, seed=0)
        np.testing.assert_array_equal(noisy, [1, 0] * 10)
        np.testing.assert_array_equal(labels, copies[0])
        np.testing.assert_array_equal(transition, copies[1])

    @pytest.mark.parametrize(
        ("given", "num_classes", "returned"),
        [
            ("int8", 128, "int8"),
            ("uint8", 257, "int64"),
            ("uint64", 300, "uint64"),
        ],
    )
    def test_dtype_holds_all_classes(self, given, num_classes, returned):
        labels, kind = np.zeros(1000, given), np.eye(num_classes)
        kind[0] = kind[-1]  # all become the last class
        noisy, flipped = flip_labels(labels, 1.0, kind=kind, num_classes=num_classes, seed=0)
        assert noisy.dtype == returned
        np.testing.assert_array_equal(noisy, num_classes - 1)
        assert np.all(flipped)

    def test_absent_class(self):
        _, flipped = flip_labels([0, 0, 2, 2], 0.5, num_classes=3, seed=0)
        assert flipped.sum() == 2
