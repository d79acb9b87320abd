import functools

import chex
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


def early_learning(logits, labels, *, target, **kwargs):
    """One target for all of the logits."""
    target = np.broadcast_to(target, np.shape(logits))
    return losses.early_learning(logits, labels, target, **kwargs)


# Loss and its arguments; numpy_losses has the same function under the same name. Without counts
# ARB-Loss has those of the batch.
CASES = {
    "balanced_softmax": (losses.balanced_softmax, {"class_counts": COUNTS}),
    "logit_adjustment": (losses.balanced_softmax, {"class_counts": COUNTS, "tau": 1.5}),
    "arb": (losses.arb, {"class_counts": COUNTS}),
    "batch_arb": (losses.arb, {}),
    "ldam": (losses.ldam, {"class_counts": COUNTS}),
    "ldam_other": (losses.ldam, {"class_counts": COUNTS, "max_margin": 0.2, "scale": 5.0}),
    "focal": (losses.focal, {}),
    "focal_alpha": (losses.focal, {"gamma": 0.5, "alpha": ALPHA}),
    "sce": (losses.symmetric_cross_entropy, {}),
    "sce_other": (losses.symmetric_cross_entropy, {"alpha": 6.0, "beta": 0.1, "log_zero": -6.0}),
    "gce": (losses.generalized_cross_entropy, {}),
    "gce_truncated": (losses.generalized_cross_entropy, {"q": 0.3, "truncation": 0.3}),
    "elr": (early_learning, {"target": [0.4, 0.3, 0.2, 0.1]}),
    "elr_other": (early_learning, {"target": [0.0, 0.6, 0.1, 0.0], "coefficient": 0.5}),
}
PARTIALS = {name: functools.partial(loss, **kwargs) for name, (loss, kwargs) in CASES.items()}
ONE_OF_EACH = {
    name: PARTIALS[name]
    for name in ("logit_adjustment", "arb", "ldam", "focal_alpha", "sce", "gce", "elr")
}
ALL = ONE_OF_EACH | {"batch_arb": losses.arb}
SOFT = {name: loss for name, loss in ALL.items() if name != "ldam"}

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 4))
LABELS = np.array([0, 1, 2, 3, 0, 1])
MIXED = RNG.dirichlet(np.ones(4), size=6)
IMPOSSIBLE = LOGITS + np.array([0, 0, 0, -np.inf])
PROBABLE = np.pad(RNG.dirichlet(np.ones(3), size=6), [(0, 0), (0, 1)])


def value_and_grad(loss, logits, labels, **kwargs):
    """Losses, and the gradient of their sum; of one function, or as one program of several."""

    def of(loss, logits):
        def total(logits):
            values = loss(logits, labels, **kwargs)
            return values.sum(), values

        (_, values), grads = jax.value_and_grad(total, has_aux=True)(logits)
        return values, grads

    return jax.jit(lambda z: jax.tree.map(lambda f: of(f, z), loss))(jnp.asarray(logits))


def each(function, cases, *args):
    """The function of every loss, as one program."""
    return jax.jit(lambda *args: {k: function(loss, *args) for k, loss in cases.items()})(*args)


def transcribed(name, logits, labels):
    loss, kwargs = CASES[name]
    reference = getattr(numpy_losses, loss.__name__)
    rest = {"n" if k == "class_counts" else k: v for k, v in kwargs.items()}
    if name == "batch_arb":
        rest["n"] = np.bincount(labels, minlength=4)
    return np.array([reference(z, y, **rest) for z, y in zip(logits, labels, strict=True)])


def check_papers(logits, labels, rtol):
    """Values, and gradients by the logits that are finite."""
    step, finite = 1e-6, np.isfinite(logits[0])
    for name, (values, grads) in value_and_grad(PARTIALS, logits, labels).items():
        expected = transcribed(name, logits, labels)
        np.testing.assert_allclose(values, expected, rtol, 1e-15, err_msg=name)
        np.testing.assert_array_equal(grads[:, ~finite], 0, name)
        for k in np.flatnonzero(finite):
            shift = step * np.eye(4)[k]
            difference = transcribed(name, logits + shift, labels)
            difference -= transcribed(name, logits - shift, labels)
            np.testing.assert_allclose(
                grads[:, k], difference / (2 * step), rtol=1e-6, atol=1e-7, err_msg=name
            )


class TestAll:
    def test_values_and_gradients_are_the_papers(self, x64):
        check_papers(LOGITS, LABELS, rtol=1e-12)

    def test_any_leading_dimensions(self, x64):
        """Over all of which the classes of a batch are counted."""
        shapes = [(6,), (2, 3), (1, 3, 2)]

        def shaped(loss, logits):
            return [loss(logits.reshape(*s, 4), LABELS.reshape(s)) for s in shapes]

        def of_one_and_of_none(loss, logits):
            return loss(logits[0], LABELS[0]), loss(logits[:0], LABELS[:0])

        found = each(shaped, ALL, LOGITS)
        for values in found.values():
            for x, shape in zip(values, shapes, strict=True):
                np.testing.assert_allclose(x, values[0].reshape(shape), rtol=1e-12, atol=1e-15)
        for name, (one, none) in each(of_one_and_of_none, ONE_OF_EACH, LOGITS).items():
            np.testing.assert_allclose(one, found[name][0][0], rtol=1e-12, atol=1e-15)
            assert none.shape == (0,)

    def test_one_hot_labels_are_integer_labels(self, x64):
        one_hot = value_and_grad(SOFT, LOGITS, np.eye(4)[LABELS])
        expected = value_and_grad(SOFT, LOGITS, LABELS)
        chex.assert_trees_all_close(one_hot, expected, rtol=1e-12, atol=1e-15)

    @pytest.mark.parametrize(("logits", "labels"), [(LOGITS, MIXED), (IMPOSSIBLE, PROBABLE)])
    def test_distributions_give_the_mean_over_their_classes(self, logits, labels, x64):
        """Also where they leave out a class, which may be impossible."""
        linear = {name: SOFT[name] for name in SOFT.keys() - {"sce"}}
        linear["batch_arb"] = functools.partial(losses.arb, class_counts=labels.sum(axis=0))
        with jax.debug_nans(True):
            found = value_and_grad(SOFT, logits, labels)
        possible = np.flatnonzero(np.isfinite(logits[0]))
        of_class = [value_and_grad(linear, logits, np.full(6, k)) for k in possible]
        for name in linear:
            pairs = zip(found[name], zip(*(x[name] for x in of_class), strict=True), strict=True)
            for actual, each_class in pairs:
                shares = labels[:, possible].reshape(6, -1, *[1] * (actual.ndim - 1))
                expected = (shares * np.stack(each_class, axis=1)).sum(axis=1)
                np.testing.assert_allclose(actual, expected, 1e-12, 1e-15, err_msg=name)

    @pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["concrete", "traced"])
    def test_masked_entries_are_as_if_absent(self, convert, x64):
        logits = np.concatenate([np.full((2, 4), np.nan), LOGITS, np.full((1, 4), -np.inf)])
        labels = np.concatenate([[-100, 4], LABELS, [2**31 - 1]])
        where = np.array([False] * 2 + [True] * 6 + [False])
        found = value_and_grad(ALL, logits, convert(labels), where=convert(where))
        kept = value_and_grad(ALL, LOGITS, LABELS)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x: x[where], found), kept, rtol=1e-12, atol=1e-13
        )
        for x in jax.tree.leaves(found):
            np.testing.assert_array_equal(x[~where], 0)

    def test_all_masked(self):
        with jax.debug_nans(True):
            found = value_and_grad(ALL, LOGITS, LABELS, where=np.zeros(6, bool))
        for x in jax.tree.leaves(found):
            np.testing.assert_array_equal(x, 0)

    def test_impossible_class(self, x64):
        """0 log 0 is 0, in the gradient, too."""
        check_papers(IMPOSSIBLE, np.array([0, 1, 2, 2, 0, 1]), rtol=1e-10)

    @pytest.mark.parametrize("loss", [losses.balanced_softmax, losses.ldam])
    def test_label_without_examples_counts_as_the_rarest_class(self, loss, x64):
        both = [functools.partial(loss, class_counts=[60, 25, 9, n]) for n in (0, 9)]
        with jax.debug_nans(True):
            found, expected = value_and_grad(both, LOGITS, np.full(6, 3))
        chex.assert_trees_all_close(found, expected, rtol=1e-12)

    def test_extreme_logits(self):
        logits = np.float32([[1, -1, 0, 0], [-1, 1, 0, 0], [1, 1, 1, 1]])
        logits = np.concatenate([np.float32(30.0) * logits, np.float32(1e4) * logits])
        with jax.debug_nans(True):
            found = value_and_grad(ALL, logits, np.array([0, 0, 3, 0, 0, 3]))
        chex.assert_tree_all_finite(found)
        for name, (values, _) in found.items():
            least = 3 * np.log(0.6) if name == "elr" else 0
            # The digits of the largest logit, which ldam multiplies by 30.
            assert np.all(np.abs(values[::3] - least) < 30 * 1e-7 * logits[::3].max(1)), name
            assert np.all(values[1::3] > 0.5), name

    def test_low_precision_is_computed_in_float32(self):
        logits = jnp.asarray(LOGITS, jnp.bfloat16)
        found = value_and_grad(ONE_OF_EACH, logits, LABELS)
        wide = value_and_grad(ONE_OF_EACH, logits.astype(jnp.float32), LABELS)
        for name, (values, grads) in found.items():
            assert values.dtype == jnp.float32
            assert grads.dtype == jnp.bfloat16
            np.testing.assert_allclose(values, wide[name][0], 1e-6, err_msg=name)
            # To a last digit, or to float32's of the largest logit, which ldam multiplies by 30.
            rtol, pair = float(jnp.finfo(grads.dtype).eps), np.float32([grads, wide[name][1]])
            np.testing.assert_allclose(*pair, rtol, atol=1e-5, err_msg=name)

    def test_traced_labels_out_of_range_give_nan(self):
        def with_label(loss, label):
            return loss(jnp.zeros([2, 4]), jnp.stack([0, label]))

        for label in (-1, 4):
            for name, values in each(with_label, ALL, label).items():
                np.testing.assert_array_equal(np.isnan(values), [False, True], name)

    def test_sharded_batch(self):
        mesh = jax.make_mesh(
            (2,), ("batch",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2]
        )
        where = np.arange(6) != 2
        expected = value_and_grad(ALL, LOGITS, LABELS, where=where)
        with jax.set_mesh(mesh):
            logits, labels, where = jax.device_put(
                (np.float32(LOGITS), LABELS, where), NamedSharding(mesh, P("batch"))
            )
            found = value_and_grad(ALL, logits, labels, where=where)
        for name, (values, grads) in found.items():
            assert jax.typeof(values).sharding.spec == P("batch")
            np.testing.assert_allclose(values, expected[name][0], rtol=1e-6, err_msg=name)
            np.testing.assert_allclose(grads, expected[name][1], 1e-5, 1e-7, err_msg=name)

    @pytest.mark.parametrize(
        ("logits", "labels"), [(LOGITS, np.eye(4)[LABELS]), (IMPOSSIBLE, PROBABLE)]
    )
    def test_gradients_in_labels(self, logits, labels):
        def gradient(loss, labels):
            where = np.arange(6) > 0
            return jax.grad(lambda y: loss(np.float32(logits), y, where=where).sum())(labels)

        labels = np.float32(np.where(np.arange(6)[:, None] > 0, labels, np.nan))
        found = each(gradient, SOFT, labels)
        chex.assert_tree_all_finite(found)
        for grads in found.values():
            np.testing.assert_array_equal(grads[0], 0)

    @pytest.mark.parametrize("name", ALL)
    def test_what_is_masked_out_passes_through_no_nan(self, name):
        labels = jnp.array([0, 1, -100, 7])
        with jax.debug_nans(True):  # which sees every operation outside jit
            for where in (np.array([True, True, False, False]), np.zeros(4, bool)):
                ALL[name](jnp.asarray(LOGITS[:4], jnp.float32), labels, where=where)


class TestBalancedSoftmax:
    def test_frequencies_do_as_well_as_counts(self, x64):
        loss, counts = functools.partial(losses.balanced_softmax, LOGITS, LABELS), [*COUNTS[:3], 0]
        frequencies = np.array(counts) / sum(counts)
        expected = loss(class_counts=counts)
        np.testing.assert_allclose(loss(class_counts=frequencies), expected, rtol=1e-12)

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

    def test_distribution_over_a_class_without_examples(self):
        loss = functools.partial(losses.balanced_softmax, class_counts=[60, 25, 9, 0])
        with jax.debug_nans(True):
            values, grads = value_and_grad(
                loss, LOGITS, np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]] * 3)
            )
        assert np.all(np.isfinite(values))
        np.testing.assert_array_equal(grads[::2, 3], 0)
        assert np.all(grads[1::2, 3] != 0)


class TestArb:
    def test_agrees_with_the_authors_inside_their_clamp(self):
        logits = np.random.default_rng(1).uniform(-30, 30, (2000, 4)).astype(np.float32)
        labels = np.random.default_rng(2).choice(4, 2000, p=[0.7, 0.2, 0.09, 0.01])
        counts = np.bincount(labels, minlength=4)
        logits64 = logits.astype(np.float64)
        expected = [numpy_losses.arb(z, y, counts) for z, y in zip(logits64, labels, strict=True)]
        errors = np.abs(jax.jit(losses.arb)(logits, labels) - np.array(expected))
        assert np.all(errors < 1e-6 * np.maximum(expected, 1))

    @pytest.mark.parametrize("counts", [[9, 2, 1], [7, 5, 0]])
    def test_attraction_equals_repulsion_at_equal_logits(self, counts, x64):
        """On each class weight: what its own examples and what the others pull on its logit."""
        labels = np.repeat([0, 1, 2], counts)
        _, grads = value_and_grad(losses.arb, np.full((labels.size, 3), 0.3), labels)
        own = labels[:, None] == np.arange(3)
        attraction, repulsion = np.sum(-grads, 0, where=own), np.sum(grads, 0, where=~own)
        np.testing.assert_allclose(attraction, repulsion, rtol=1e-12, atol=1e-14)

    def test_axis_name(self):
        where = jnp.array([True, True, False, True, True, False])
        mesh = jax.make_mesh(
            (2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
        )
        spread = jax.shard_map(
            lambda z, y, where: losses.arb(z, y, where=where, axis_name="batch"),
            mesh=mesh,
            in_specs=P("batch"),
            out_specs=P("batch"),
        )
        both = [lambda z, y: spread(z, y, where), lambda z, y: losses.arb(z, y, where=where)]
        found, expected = value_and_grad(both, LOGITS, jnp.asarray(LABELS))
        chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-7)


class TestNormalizedLogits:
    def test_cosines(self, x64):
        kernel = np.random.default_rng(1).normal(size=(4, 3))
        normalized_logits = jax.jit(losses.normalized_logits)
        logits = normalized_logits(LOGITS.reshape(2, 3, 4), kernel)
        expected = [
            [x @ w / np.linalg.norm(x) / np.linalg.norm(w) for w in kernel.T] for x in LOGITS
        ]
        np.testing.assert_allclose(logits, np.reshape(expected, (2, 3, 3)), rtol=1e-12)
        check_grads(normalized_logits, (jnp.asarray(LOGITS), jnp.asarray(kernel)), order=1)

    @pytest.mark.parametrize("scale", [1e-37, 1e15, 3e38])
    def test_of_any_scale(self, scale):
        """Gradients have the inverse scale."""
        rng = np.random.default_rng(2)
        both = rng.uniform(-1, 1, (3, 4)).astype(np.float32), rng.uniform(-1, 1, (4, 2))
        scales = np.float32(scale), np.float32(1 / min(scale, 1e36))

        @jax.jit
        def total(x, kernel):
            logits = losses.normalized_logits(x, kernel)
            return (logits * jnp.arange(1.0, 7).reshape(3, 2)).sum(), logits

        gradients = jax.value_and_grad(total, (0, 1), has_aux=True)
        (_, expected), of_1 = gradients(*map(np.float32, both))
        with jax.debug_nans(True):
            scaled = (np.float32(x) * s for x, s in zip(both, scales, strict=True))
            (_, logits), grads = gradients(*scaled)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
        for found, at_1, s in zip(grads, of_1, scales, strict=True):
            atol = 1e-37 + 1e-6 / s  # XLA takes denormal numbers for 0
            np.testing.assert_allclose(found, np.float64(at_1) / s, rtol=1e-4, atol=atol)

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

    def test_low_precision_is_computed_in_float32(self):
        features = np.float16([[3e4, 4e4]])  # whose squares overflow
        logits = jax.jit(losses.normalized_logits)(features, np.eye(2, dtype="float16"))
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, [[0.6, 0.8]], rtol=1e-2)


class TestFocal:
    def test_certainty_with_a_small_gamma(self):
        logits = np.array([[200.0, 0, 0, 0]], np.float32)
        with jax.debug_nans(True):
            values, grads = value_and_grad(functools.partial(losses.focal, gamma=0.5), logits, [0])
        np.testing.assert_array_equal(values, 0)
        np.testing.assert_array_equal(grads, 0)

    def test_label_that_is_impossible(self):
        logits, labels = np.float32([[0, 1, -np.inf]] * 2), np.array([2, 1])
        p = np.array([1, np.e, 0]) / (1 + np.e)
        both = [functools.partial(losses.focal, gamma=0.5, alpha=[1, 1, a]) for a in (3, 0)]
        with jax.debug_nans(True):
            (values, grads), (without, no_grads) = value_and_grad(both, logits, labels)
        assert values[0] == np.inf  # as cross-entropy is, with its gradient
        np.testing.assert_allclose(grads[0], 3 * (p - [0, 0, 1]), rtol=1e-6)
        assert without[0] == 0
        np.testing.assert_array_equal(no_grads[0], 0)
        np.testing.assert_array_equal(values[1], without[1])


class TestSymmetricCrossEntropy:
    @pytest.mark.parametrize("logits", [LOGITS, IMPOSSIBLE], ids=["possible", "impossible"])
    def test_distributions(self, logits, x64):
        """They leave out the last class, which may be impossible."""
        q, log_q = np.array([0.7, 0.299, 1e-3, 0]), np.array([np.log(0.7), np.log(0.299), -4, -4])
        loss = functools.partial(losses.symmetric_cross_entropy, alpha=0.5, beta=2.0)
        with jax.debug_nans(True):
            values, grads = value_and_grad(loss, logits, np.tile(q, (6, 1)))
        p = np.stack([numpy_losses.softmax(z) for z in logits])
        expected = -0.5 * (q[:3] * np.log(p[:, :3])).sum(-1) - 2 * (p * log_q).sum(-1)
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        expected = 0.5 * (p - q) - 2 * p * (log_q - (p * log_q).sum(-1, keepdims=True))
        np.testing.assert_allclose(grads, expected, rtol=1e-10)

    def test_without_cross_entropy_an_impossible_label_is_bounded(self):
        loss = functools.partial(losses.symmetric_cross_entropy, alpha=0.0)
        with jax.debug_nans(True):
            values, grads = value_and_grad(loss, np.float32([[0, 1, -np.inf]]), np.array([2]))
        np.testing.assert_allclose(values, 4, rtol=1e-6)
        np.testing.assert_allclose(grads, 0, atol=1e-6)


def test_generalized_cross_entropy_meets_cross_entropy_and_absolute_error():
    logits, one_hot = np.float32(LOGITS), np.eye(4, dtype=np.float32)[LABELS]
    loss = functools.partial(losses.generalized_cross_entropy, logits, LABELS)
    cross_entropy = optax.softmax_cross_entropy(logits, one_hot)
    np.testing.assert_allclose(loss(q=1e-8), cross_entropy, rtol=1e-6)
    softmax = np.array([numpy_losses.softmax(z) for z in LOGITS])
    half_absolute_error = np.abs(softmax - one_hot).sum(axis=-1) / 2
    np.testing.assert_allclose(loss(q=1.0), half_absolute_error, rtol=1e-5)


class TestEarlyLearning:
    def test_agreement_beyond_the_floor_has_no_gradient(self):
        logits = np.float32([[8.0, 0, 0, 0], [200, 0, 0, 0]])  # p of 0.999 and 1
        target = np.float32([[1.0, 0, 0, 0]] * 2)
        loss = functools.partial(losses.early_learning, target=target, coefficient=2.0)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        three = [loss, functools.partial(loss, floor=0.01), cross_entropy]
        with jax.debug_nans(True):
            found = value_and_grad(three, logits, np.array([1, 1]))
        (values, grads), (_, bounded), (entropies, expected) = found
        p = numpy_losses.softmax(np.float64(logits[0]))
        # The pull of an agreement that is all but complete doesn't fade.
        pull = 2 * p[0] * (p - [1, 0, 0, 0]) / (1 - p[0])
        np.testing.assert_allclose(grads[0], expected[0] + pull, rtol=1e-3)
        least = np.log([1 - p[0], 1e-4])
        np.testing.assert_allclose(values, entropies + 2 * least, rtol=1e-4)
        np.testing.assert_array_equal(grads[1], expected[1])
        np.testing.assert_array_equal(bounded, expected)

    def test_no_gradient_flows_through_the_target(self):
        def total(target):
            return losses.early_learning(np.float32(LOGITS), LABELS, target).sum()

        np.testing.assert_array_equal(jax.grad(total)(jnp.float32(MIXED)), 0)

    def test_targets_that_are_masked_out_are_not_seen(self):
        where = np.arange(6) > 0
        target = np.where(where[:, None], MIXED, np.nan)
        masked = functools.partial(losses.early_learning, target=target, where=where)
        kept = functools.partial(losses.early_learning, target=MIXED)
        with jax.debug_nans(True):
            both = value_and_grad([masked, kept], np.float32(LOGITS), LABELS)
        for found, expected in zip(*both, strict=True):
            np.testing.assert_array_equal(found[0], 0)
            np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-6, atol=1e-7)


class TestWeights:
    @pytest.mark.parametrize("beta", [0.0, 0.9, 1 - 1e-9, 1.0])
    @pytest.mark.parametrize(
        "counts",
        [
            [5000, 300, 20, 1],
            [10**11, 10**10, 10**9],  # beyond int32
            *([1e-30, 2e-30, 1e9], [1e25, 1e30], [0, 1e-12, 0.5]),
        ],
    )
    def test_class_balanced(self, counts, beta):
        met = np.array(counts)
        met[met == 0] = met[met > 0].min()
        log_beta = np.log1p(beta - 1) if beta else -np.inf
        numbers = -np.expm1(met * log_beta) / (1 - beta) if beta < 1 else met
        expected = 1 / numbers * len(met) / (1 / numbers).sum()
        with jax.debug_nans(True):
            weights = losses.class_balanced_weights(counts, beta=beta)
        np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-37)

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


@pytest.mark.parametrize("labels", [LABELS, MIXED], ids=["integers", "distributions"])
def test_running_counts(labels, x64):
    where = np.array([True, True, False, True, True, False])
    of_batch = np.eye(4)[labels] if labels.ndim == 1 else labels
    count = jax.jit(functools.partial(losses.running_counts, decay=0.9))
    found = expected = np.zeros(4)
    for mask in (where, ~where, np.zeros_like(where)):
        found = count(found, labels, where=mask)
        expected = 0.9 * expected + of_batch[mask].sum(axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
