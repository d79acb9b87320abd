import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from absgd_jax import losses
from tests.support import numpy_losses

COUNTS = [60, 25, 9, 2]
ALPHA = [0.5, 1.0, 2.0, 3.0]

# Loss and its arguments; numpy_losses has the same function under the same name.
CASES = {
    "balanced_softmax": (losses.balanced_softmax, {"class_counts": COUNTS}),
    "logit_adjustment": (losses.balanced_softmax, {"class_counts": COUNTS, "tau": 1.5}),
    "arb": (losses.arb, {"class_counts": COUNTS}),
    "ldam": (losses.ldam, {"class_counts": COUNTS}),
    "ldam_other": (losses.ldam, {"class_counts": COUNTS, "max_margin": 0.2, "scale": 5.0}),
    "focal": (losses.focal, {}),
    "focal_alpha": (losses.focal, {"gamma": 0.5, "alpha": ALPHA}),
    "sce": (losses.symmetric_cross_entropy, {}),
    "sce_other": (losses.symmetric_cross_entropy, {"alpha": 6.0, "beta": 0.1, "log_zero": -6.0}),
    "gce": (losses.generalized_cross_entropy, {}),
    "gce_truncated": (losses.generalized_cross_entropy, {"q": 0.3, "truncation": 0.3}),
}
PARTIALS = {name: functools.partial(loss, **kwargs) for name, (loss, kwargs) in CASES.items()}
ONE_OF_EACH = {
    name: PARTIALS[name]
    for name in ("logit_adjustment", "arb", "ldam", "focal_alpha", "sce", "gce")
}
BATCH_ARB = {"batch_arb": losses.arb}
SOFT = {name: loss for name, loss in ONE_OF_EACH.items() if name != "ldam"}

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 4))
LABELS = np.array([0, 1, 2, 3, 0, 1])
MIXED = RNG.dirichlet(np.ones(4), size=6)


def each(cases):
    return pytest.mark.parametrize("loss", cases.values(), ids=cases.keys())


def value_and_grad(loss, logits, labels, **kwargs):
    """Losses, and the gradient of their sum."""

    def total(logits):
        values = loss(logits, labels, **kwargs)
        return values.sum(), values

    (_, values), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(logits))
    return values, grads


def transcribed(name, logits, labels):
    loss, kwargs = CASES[name]
    reference = getattr(numpy_losses, loss.__name__)
    n = {"n": kwargs["class_counts"]} if "class_counts" in kwargs else {}
    rest = {k: v for k, v in kwargs.items() if k != "class_counts"}
    return np.array([reference(z, y, **n, **rest) for z, y in zip(logits, labels, strict=True)])


class TestAll:
    @pytest.mark.parametrize("name", CASES)
    def test_values_and_gradients_are_the_papers(self, name, x64):
        values, grads = value_and_grad(PARTIALS[name], LOGITS, LABELS)
        np.testing.assert_allclose(values, transcribed(name, LOGITS, LABELS), 1e-12, 1e-15)
        step = 1e-6
        for k in range(LOGITS.shape[1]):
            shift = step * np.eye(LOGITS.shape[1])[k]
            difference = transcribed(name, LOGITS + shift, LABELS)
            difference -= transcribed(name, LOGITS - shift, LABELS)
            np.testing.assert_allclose(grads[:, k], difference / (2 * step), rtol=1e-6, atol=1e-7)

    @each(ONE_OF_EACH | BATCH_ARB)
    def test_derivatives_in_both_modes(self, loss, x64):
        check_grads(lambda z: loss(z, LABELS), (jnp.asarray(LOGITS),), order=1)

    @each(ONE_OF_EACH)
    def test_any_leading_dimensions(self, loss):
        logits, labels = LOGITS.astype(np.float32), LABELS
        expected = loss(logits, labels)
        for shape in [(2, 3), (1, 3, 2)]:
            values = loss(logits.reshape(*shape, 4), labels.reshape(shape))
            np.testing.assert_allclose(values, expected.reshape(shape), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(loss(logits[0], labels[0]), expected[0], rtol=1e-6, atol=1e-7)
        assert loss(logits[:0], labels[:0]).shape == (0,)

    @each(ONE_OF_EACH)
    def test_vmap(self, loss):
        logits, labels = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)
        expected = jax.jit(loss)(logits, labels)
        np.testing.assert_allclose(jax.vmap(loss)(logits, labels), expected, rtol=1e-6, atol=1e-7)

    @each(SOFT | BATCH_ARB)
    def test_one_hot_labels_are_integer_labels(self, loss, x64):
        one_hot = value_and_grad(loss, LOGITS, np.eye(4)[LABELS])
        for a, b in zip(one_hot, value_and_grad(loss, LOGITS, LABELS), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)

    @each({name: loss for name, loss in SOFT.items() if name != "sce"})
    def test_distributions_give_the_mean_over_their_classes(self, loss, x64):
        of_class = np.stack([loss(LOGITS, np.full(6, k)) for k in range(4)], axis=-1)
        np.testing.assert_allclose(loss(LOGITS, MIXED), (MIXED * of_class).sum(-1), rtol=1e-12)

    @each(ONE_OF_EACH | BATCH_ARB)
    @pytest.mark.parametrize("traced", [False, True])
    def test_masked_entries_are_as_if_absent(self, loss, traced, x64):
        logits = np.concatenate([np.full((2, 4), np.nan), LOGITS, np.full((1, 4), -np.inf)])
        labels = np.concatenate([[-100, 4], LABELS, [2**31 - 1]])
        where = np.array([False] * 2 + [True] * 6 + [False])
        convert = jnp.asarray if traced else np.asarray
        values, grads = value_and_grad(loss, logits, convert(labels), where=convert(where))
        kept_values, kept_grads = value_and_grad(loss, LOGITS, LABELS)
        np.testing.assert_array_equal(values[~where], 0)
        np.testing.assert_array_equal(grads[~where], 0)
        np.testing.assert_allclose(values[where], kept_values, rtol=1e-12)
        np.testing.assert_allclose(grads[where], kept_grads, rtol=1e-12, atol=1e-15)

    @each(SOFT | BATCH_ARB)
    def test_masked_distributions(self, loss, x64):
        labels = np.where(np.arange(6)[:, None] < 4, MIXED, np.nan)
        where = np.arange(6) < 4
        values, grads = value_and_grad(loss, LOGITS, labels, where=where)
        kept_values, kept_grads = value_and_grad(loss, LOGITS[:4], MIXED[:4])
        np.testing.assert_allclose(values, np.pad(kept_values, (0, 2)), rtol=1e-12)
        np.testing.assert_allclose(grads, np.pad(kept_grads, ((0, 2), (0, 0))), rtol=1e-12)

    @each(ONE_OF_EACH | BATCH_ARB)
    def test_all_masked(self, loss):
        with jax.debug_nans(True):
            values, grads = value_and_grad(loss, LOGITS, LABELS, where=np.zeros(6, bool))
        np.testing.assert_array_equal(values, 0)
        np.testing.assert_array_equal(grads, 0)

    @each(ONE_OF_EACH | BATCH_ARB)
    @pytest.mark.parametrize("size", [30.0, 1e4])
    def test_extreme_logits(self, loss, size):
        logits = np.float32(size) * np.array([[1, -1, 0, 0], [-1, 1, 0, 0], [1, 1, 1, 1]])
        with jax.debug_nans(True):
            values, grads = value_and_grad(loss, logits.astype(np.float32), np.array([0, 0, 3]))
        assert np.all(np.isfinite(values))
        assert np.all(np.isfinite(grads))
        np.testing.assert_allclose(values[0], 0, atol=1e-6)
        assert values[1] > 0.5

    @each(ONE_OF_EACH)
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_low_precision_is_computed_in_float32(self, loss, dtype):
        logits = jnp.asarray(LOGITS, dtype)
        values, grads = value_and_grad(loss, logits, LABELS)
        assert values.dtype == jnp.float32
        assert grads.dtype == dtype
        wide_values, wide_grads = value_and_grad(loss, logits.astype(jnp.float32), LABELS)
        np.testing.assert_array_equal(values, wide_values)
        np.testing.assert_array_equal(grads, wide_grads.astype(dtype))

    @each(ONE_OF_EACH)
    def test_float64(self, loss, x64):
        assert loss(LOGITS, LABELS).dtype == jnp.float64
        assert loss(LOGITS.astype(np.float32), LABELS).dtype == jnp.float32

    @each(ONE_OF_EACH | BATCH_ARB)
    @pytest.mark.parametrize("label", [-1, 4])
    def test_traced_labels_out_of_range_give_nan(self, loss, label):
        labels = jnp.array([0, label])
        values = jax.jit(loss)(jnp.zeros([2, 4]), labels)
        assert np.isfinite(values[0])
        assert np.isnan(values[1])

    @each(ONE_OF_EACH | BATCH_ARB)
    def test_sharded_batch(self, loss):
        mesh = jax.make_mesh(
            (2,), ("batch",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2]
        )
        where = np.arange(6) != 2
        expected = value_and_grad(loss, LOGITS, LABELS, where=where)
        with jax.set_mesh(mesh):
            logits, labels, where = jax.device_put(
                (LOGITS.astype(np.float32), LABELS, where), NamedSharding(mesh, P("batch"))
            )
            values, grads = value_and_grad(loss, logits, labels, where=where)
        assert jax.typeof(values).sharding.spec == P("batch")
        np.testing.assert_allclose(values, expected[0], rtol=1e-6)
        np.testing.assert_allclose(grads, expected[1], rtol=1e-5, atol=1e-7)

    @each(SOFT | BATCH_ARB)
    def test_gradients_in_labels(self, loss):
        labels = jnp.eye(4)[LABELS].at[0].set(jnp.nan)

        def total(labels):
            return loss(LOGITS.astype(np.float32), labels, where=np.arange(6) > 0).sum()

        grads = jax.grad(total)(labels)
        np.testing.assert_array_equal(grads[0], 0)
        assert np.all(np.isfinite(grads))

    @each(ONE_OF_EACH | BATCH_ARB)
    def test_what_is_masked_out_passes_through_no_nan(self, loss):
        labels = jnp.array([0, 1, -100, 7])
        with jax.debug_nans(True):  # which sees every operation outside jit
            for where in (np.array([True, True, False, False]), np.zeros(4, bool)):
                loss(jnp.asarray(LOGITS[:4], jnp.float32), labels, where=where)


class TestBalancedSoftmax:
    def test_tau_0_is_cross_entropy(self, x64):
        expected = optax.softmax_cross_entropy(LOGITS, np.eye(4)[LABELS])
        values = losses.balanced_softmax(LOGITS, LABELS, class_counts=COUNTS, tau=0)
        np.testing.assert_allclose(values, expected, rtol=1e-12)

    def test_frequencies_do_as_well_as_counts(self, x64):
        counts = np.array([60, 25, 9, 0])
        values = losses.balanced_softmax(LOGITS, LABELS, class_counts=counts)
        frequencies = losses.balanced_softmax(LOGITS, LABELS, class_counts=counts / counts.sum())
        np.testing.assert_allclose(frequencies, values, rtol=1e-12)

    @pytest.mark.parametrize("traced", [False, True])
    def test_class_without_examples_leaves_the_sum(self, traced, x64):
        counts = jnp.array([60, 25, 9, 0]) if traced else [60, 25, 9, 0]
        loss = functools.partial(losses.balanced_softmax, class_counts=counts)
        logits, labels = LOGITS + np.array([0, 0, 0, 1e8]), np.array([0, 1, 2, 0, 1, 2])
        with jax.debug_nans(True):
            values, grads = value_and_grad(loss, logits, labels)
        expected = [
            numpy_losses.balanced_softmax(z[:3], y, COUNTS)
            for z, y in zip(LOGITS, labels, strict=True)
        ]
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        np.testing.assert_array_equal(grads[:, 3], 0)

    def test_label_without_examples_counts_as_the_rarest_class(self, x64):
        labels = np.full(6, 3)
        with jax.debug_nans(True):
            values, grads = value_and_grad(
                functools.partial(losses.balanced_softmax, class_counts=[60, 25, 9, 0]),
                LOGITS,
                labels,
            )
        expected = value_and_grad(
            functools.partial(losses.balanced_softmax, class_counts=[60, 25, 9, 9]), LOGITS, labels
        )
        np.testing.assert_allclose(values, expected[0], rtol=1e-12)
        np.testing.assert_allclose(grads, expected[1], rtol=1e-12)

    def test_distribution_over_a_class_without_examples(self):
        loss = functools.partial(losses.balanced_softmax, class_counts=[60, 25, 9, 0])
        with jax.debug_nans(True):
            values, grads = value_and_grad(
                loss, LOGITS, np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]] * 3)
            )
        assert np.all(np.isfinite(values))
        np.testing.assert_array_equal(grads[::2, 3], 0)
        assert np.all(grads[1::2, 3] != 0)

    def test_tau_may_be_traced(self):
        taus = jnp.array([0.5, 2.0])
        values = jax.vmap(
            lambda tau: losses.balanced_softmax(
                jnp.asarray(LOGITS), LABELS, class_counts=COUNTS, tau=tau
            )
        )(taus)
        for tau, value in zip((0.5, 2.0), values, strict=True):
            expected = losses.balanced_softmax(LOGITS, LABELS, class_counts=COUNTS, tau=tau)
            np.testing.assert_allclose(value, expected, rtol=1e-6)


class TestArb:
    def test_batch_counts_are_the_papers(self, x64):
        counts = np.bincount(LABELS, minlength=4)
        expected = [numpy_losses.arb(z, y, counts) for z, y in zip(LOGITS, LABELS, strict=True)]
        np.testing.assert_allclose(losses.arb(LOGITS, LABELS), expected, rtol=1e-12)

    def test_counts_are_taken_over_all_leading_dimensions(self, x64):
        values = losses.arb(LOGITS.reshape(1, 2, 3, 4), LABELS.reshape(1, 2, 3))
        np.testing.assert_allclose(values.ravel(), losses.arb(LOGITS, LABELS), rtol=1e-12)

    @pytest.mark.parametrize("labels", [LABELS, MIXED], ids=["integers", "distributions"])
    def test_with_class_counts_is_balanced_softmax_exactly(self, labels):
        values, grads = value_and_grad(
            functools.partial(losses.arb, class_counts=COUNTS), LOGITS, labels
        )
        expected = value_and_grad(
            functools.partial(losses.balanced_softmax, class_counts=COUNTS), LOGITS, labels
        )
        np.testing.assert_array_equal(values, expected[0])
        np.testing.assert_array_equal(grads, expected[1])

    @pytest.mark.parametrize("size", [1.0, 10.0, 30.0])
    def test_agrees_with_the_authors_inside_their_clamp(self, size):
        logits = np.random.default_rng(1).uniform(-size, size, (2000, 4)).astype(np.float32)
        labels = np.random.default_rng(2).choice(4, 2000, p=[0.7, 0.2, 0.09, 0.01])
        counts = np.bincount(labels, minlength=4)
        logits64 = logits.astype(np.float64)
        expected = [numpy_losses.arb(z, y, counts) for z, y in zip(logits64, labels, strict=True)]
        errors = np.abs(losses.arb(logits, labels) - np.array(expected))
        assert np.all(errors < 1e-6 * np.maximum(expected, 1))

    @pytest.mark.parametrize("counts", [[3, 3, 3], [9, 2, 1], [50, 1, 1], [7, 5, 0]])
    def test_attraction_equals_repulsion_at_equal_logits(self, counts, x64):
        labels = np.repeat([0, 1, 2], counts)
        logits = np.full((labels.size, 3), 0.3)

        def attraction_and_repulsion(loss):
            """On each class weight: what its own examples and what the others pull on its logit."""
            _, grads = value_and_grad(loss, logits, labels)
            own = labels[:, None] == np.arange(3)
            return np.sum(-grads, 0, where=own), np.sum(grads, 0, where=~own)

        attraction, repulsion = attraction_and_repulsion(losses.arb)
        np.testing.assert_allclose(attraction, repulsion, rtol=1e-12, atol=1e-14)
        attraction, repulsion = attraction_and_repulsion(
            optax.softmax_cross_entropy_with_integer_labels
        )
        balanced = len(set(counts)) == 1
        assert np.allclose(attraction, repulsion) == balanced

    def test_a_batch_of_one_class_needs_class_counts(self):
        values, grads = value_and_grad(losses.arb, LOGITS, np.full(6, 2))
        np.testing.assert_array_equal(values, 0)
        np.testing.assert_array_equal(grads, 0)
        running = functools.partial(losses.arb, class_counts=COUNTS)
        _, grads = value_and_grad(running, LOGITS, np.full(6, 2))
        assert np.all(grads != 0)

    def test_absent_classes_leave_the_sum(self):
        _, grads = value_and_grad(losses.arb, LOGITS, np.array([0, 1, 0, 1, 0, 1]))
        np.testing.assert_array_equal(grads[:, 2:], 0)

    @pytest.mark.parametrize("labels", [LABELS, MIXED], ids=["integers", "distributions"])
    def test_axis_name(self, labels, x64):
        where = np.array([True, True, False, True, True, False])
        expected = value_and_grad(losses.arb, LOGITS, labels, where=where)
        split = [jnp.asarray(x).reshape(3, 2, *x.shape[1:]) for x in (LOGITS, labels, where)]

        def spread(logits, labels, where):
            return value_and_grad(
                functools.partial(losses.arb, axis_name="batch"), logits, labels, where=where
            )

        results = jax.vmap(spread, axis_name="batch")(*split)
        for a, b in zip(results, expected, strict=True):
            np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-12, atol=1e-15)

    def test_shard_map(self):
        mesh = jax.make_mesh(
            (2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
        )
        spread = jax.shard_map(
            functools.partial(losses.arb, axis_name="batch"),
            mesh=mesh,
            in_specs=P("batch"),
            out_specs=P("batch"),
        )
        for a, b in zip(
            value_and_grad(spread, LOGITS, jnp.asarray(LABELS)),
            value_and_grad(losses.arb, LOGITS, LABELS),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


class TestLdam:
    def test_without_margin_is_scaled_cross_entropy(self, x64):
        values = losses.ldam(LOGITS, LABELS, class_counts=COUNTS, max_margin=0.0, scale=3.0)
        expected = optax.softmax_cross_entropy(3 * LOGITS, np.eye(4)[LABELS])
        np.testing.assert_allclose(values, expected, rtol=1e-12)

    def test_class_without_examples_has_the_margin_of_the_rarest(self, x64):
        values, grads = value_and_grad(
            functools.partial(losses.ldam, class_counts=[60, 25, 9, 0]), LOGITS, LABELS
        )
        expected = losses.ldam(LOGITS, LABELS, class_counts=[60, 25, 9, 9])
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        assert np.all(np.isfinite(grads))


class TestNormalizedLogits:
    def test_cosines(self, x64):
        kernel = np.random.default_rng(1).normal(size=(4, 3))
        logits = losses.normalized_logits(LOGITS.reshape(2, 3, 4), kernel)
        expected = [
            [x @ w / np.linalg.norm(x) / np.linalg.norm(w) for w in kernel.T] for x in LOGITS
        ]
        np.testing.assert_allclose(logits, np.reshape(expected, (2, 3, 3)), rtol=1e-12)
        check_grads(losses.normalized_logits, (jnp.asarray(LOGITS), jnp.asarray(kernel)), order=1)

    def test_zero_vectors(self):
        kernel = jnp.zeros([4, 3]).at[0, 0].set(2.0)
        features = jnp.zeros([2, 4]).at[0, 0].set(5.0)

        def total(features, kernel):
            logits = losses.normalized_logits(features, kernel)
            return losses.ldam(logits, np.array([1, 1]), class_counts=[5, 3, 1]).sum(), logits

        with jax.debug_nans(True):
            grads, logits = jax.grad(total, argnums=(0, 1), has_aux=True)(features, kernel)
        np.testing.assert_array_equal(logits, [[1, 0, 0], [0, 0, 0]])
        assert np.all(np.isfinite(grads[0]))
        assert np.any(grads[1][:, 1] != 0)  # a kernel of zeros can be trained

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_low_precision_is_computed_in_float32(self, dtype):
        features = jnp.array([[3e4, 4e4]], dtype)  # whose squares overflow float16
        logits = losses.normalized_logits(features, jnp.eye(2, dtype=dtype))
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, [[0.6, 0.8]], rtol=1e-2)


class TestFocal:
    def test_gamma_0_is_cross_entropy(self, x64):
        expected = optax.softmax_cross_entropy(LOGITS, MIXED)
        np.testing.assert_allclose(losses.focal(LOGITS, MIXED, gamma=0), expected, rtol=1e-12)

    def test_certainty_with_a_small_gamma(self):
        logits = np.array([[200.0, 0, 0, 0]], np.float32)
        with jax.debug_nans(True):
            values, grads = value_and_grad(functools.partial(losses.focal, gamma=0.5), logits, [0])
        np.testing.assert_array_equal(values, 0)
        np.testing.assert_array_equal(grads, 0)


class TestSymmetricCrossEntropy:
    def test_distributions(self, x64):
        labels = np.array([[0.7, 0.3 - 1e-3, 1e-3, 0]] * 6)
        values = losses.symmetric_cross_entropy(LOGITS, labels, alpha=0.5, beta=2.0, log_zero=-4.0)
        p = np.stack([numpy_losses.softmax(z) for z in LOGITS])
        log_q = np.array([np.log(0.7), np.log(0.299), -4, -4])
        expected = -0.5 * (labels * np.log(p)).sum(-1) - 2 * (p * log_q).sum(-1)
        np.testing.assert_allclose(values, expected, rtol=1e-12)

    def test_reverse_term_is_bounded(self):
        logits = np.array([[-1e4, 1e4, 0, 0]], np.float32)
        value = losses.symmetric_cross_entropy(logits, np.array([0]), alpha=0.0, log_zero=-7.0)
        np.testing.assert_allclose(value, 7.0)


class TestGeneralizedCrossEntropy:
    def test_meets_cross_entropy_and_absolute_error(self):
        logits, one_hot = LOGITS.astype(np.float32), np.eye(4, dtype=np.float32)[LABELS]
        cross_entropy = optax.softmax_cross_entropy(logits, one_hot)
        values = losses.generalized_cross_entropy(logits, LABELS, q=1e-8)
        np.testing.assert_allclose(values, cross_entropy, rtol=1e-6)
        half_absolute_error = jnp.abs(jax.nn.softmax(logits) - one_hot).sum(-1) / 2
        values = losses.generalized_cross_entropy(logits, LABELS, q=1.0)
        np.testing.assert_allclose(values, half_absolute_error, rtol=1e-5)

    def test_truncated_is_constant_below_and_never_negative(self):
        probabilities = np.array([0.01, 0.2, 0.49, 0.51, 0.8, 0.99], np.float32)
        logits = np.log(np.stack([probabilities, 1 - probabilities], axis=-1))
        labels = np.zeros(6, int)
        values, grads = value_and_grad(
            functools.partial(losses.generalized_cross_entropy, truncation=0.5), logits, labels
        )
        plain_values, plain_grads = value_and_grad(losses.generalized_cross_entropy, logits, labels)
        np.testing.assert_allclose(values[:3], (1 - 0.5**0.7) / 0.7, rtol=1e-6)
        np.testing.assert_array_equal(grads[:3], 0)
        np.testing.assert_array_equal(values[3:], plain_values[3:])
        np.testing.assert_array_equal(grads[3:], plain_grads[3:])
        assert np.all(values >= 0)


class TestWeights:
    @pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 0.999999])
    def test_class_balanced(self, beta):
        counts = np.array([5000, 300, 20, 1])
        expected = (1 - beta) / (1 - beta**counts)
        expected *= 4 / expected.sum()
        weights = losses.class_balanced_weights(counts, beta=beta)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)

    @pytest.mark.parametrize("beta", [1 - 1e-15, 1])
    def test_class_balanced_nears_inverse_frequencies(self, beta):
        counts = np.array([10**11, 10**10, 10**9])  # beyond int32
        weights = losses.class_balanced_weights(counts, beta=beta)
        expected = (1 / counts) * 3 / (1 / counts).sum()
        np.testing.assert_allclose(weights, expected, rtol=1e-6 if beta == 1 else 1e-3)

    def test_mean_weight_of_the_examples_is_as_documented(self):
        labels = np.repeat([0, 1], [40, 1])
        weights = losses.class_balanced_weights(np.bincount(labels), beta=1)
        assert weights[labels].mean() == pytest.approx(0.1, abs=0.01)

    @pytest.mark.parametrize("beta", [0.9999, 1])
    def test_class_without_examples_has_the_weight_of_the_rarest(self, beta):
        weigh = functools.partial(losses.class_balanced_weights, beta=beta)
        np.testing.assert_array_equal(weigh([60, 25, 9, 0]), weigh([60, 25, 9, 9]))
        traced = jax.jit(weigh)
        np.testing.assert_allclose(traced(jnp.array([60, 0, 9])), weigh([60, 9, 9]), rtol=1e-6)
        np.testing.assert_allclose(traced(jnp.zeros(3)), np.ones(3), rtol=1e-6)

    def test_deferred(self):
        weights = losses.class_balanced_weights(COUNTS)
        schedule = losses.deferred_weights(weights, start=3)
        steps = jnp.arange(6)
        expected = np.where(np.arange(6)[:, None] < 3, 1, np.asarray(weights))
        np.testing.assert_array_equal(jax.jit(jax.vmap(schedule))(steps), expected)
        np.testing.assert_array_equal(schedule(2), np.ones(4))
