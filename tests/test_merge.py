import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from absgd_jax import (
    abadam,
    absgd,
    accumulate,
    get_temperature,
    pmerge,
    robust_loss,
    scale_by_attention,
)

K, STEPS = 3, 4
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(STEPS, 12, 3)), RNG.normal(size=(STEPS, 12))
WHERE = RNG.random((STEPS, 12)) > 0.4
WHERE[:, 4:8] = False  # the second of three micro-batches
WHERE[2] = False
PARAMS = {"w": np.array([0.5, -1.0, 2.0]), "b": np.array(0.3)}
TEMPERATURES = np.array([0.05, 2.0, -0.3, 1e8, np.inf])


def cast(tree, dtype):
    return jax.tree.map(lambda a: a if a.dtype == bool else jnp.asarray(a, dtype), tree)


def micro(batches):
    return tuple(a.reshape(len(a) * K, -1, *a.shape[2:]) for a in batches)


def loss_fn(params, temperature, x, y, where=None):
    predictions = jnp.sum(x * params["w"][None], axis=1) + params["b"]
    return robust_loss(jnp.square(predictions - y), temperature, where=where)


def train(opt, batches, dtype=np.float32):
    """The last parameters and state, and those before every batch."""
    params = cast(PARAMS, dtype)

    def step(carry, batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, get_temperature(opt_state), *batch)
        where = dict(zip(["where"], batch[2:], strict=False))
        updates, opt_state = opt.update(grads, opt_state, params, value=loss, **where)
        return (optax.apply_updates(params, updates), opt_state), carry

    carry = params, opt.init(params)
    carry, history = jax.jit(functools.partial(lax.scan, step))(carry, cast(batches, dtype))
    return *carry, history


def of_batches(opt):
    return opt


def of_micro_batches(opt):
    return accumulate(opt, K)


class TestAccumulate:
    @pytest.mark.parametrize(
        ("x64", "tolerance"), [(True, 1e-12), (False, 1e-5)], indirect=["x64"], ids=["64", "32"]
    )
    @pytest.mark.parametrize("batches", [(X, Y), (X, Y, WHERE)], ids=["equal", "masked"])
    def test_micro_batches_are_their_batch(self, batches, tolerance, x64):
        dtype = jnp.float64 if tolerance < 1e-6 else jnp.float32

        def run(wrap, batches, temperature):
            opt = wrap(absgd(0.01, temperature, weight_decay=1e-2, gamma=0.7))
            params, opt_state, _ = train(opt, batches, dtype)
            return params, optax.tree.get(opt_state, "baseline")

        temperatures = jnp.asarray(TEMPERATURES, dtype)
        expected = jax.vmap(lambda t: run(of_batches, batches, t))(temperatures)
        actual = jax.vmap(lambda t: run(of_micro_batches, micro(batches), t))(temperatures)
        chex.assert_trees_all_close(actual, expected, rtol=tolerance)

    @pytest.mark.parametrize(
        "build",
        [
            lambda wrap: wrap(abadam(0.01, 2.0)),
            lambda wrap: optax.chain(wrap(scale_by_attention(2.0)), optax.scale(-0.01)),
            lambda wrap: wrap(
                optax.named_chain(
                    ("clip", optax.clip_by_global_norm(1.0)), ("opt", absgd(0.01, 2.0))
                )
            ),
            lambda wrap: wrap(optax.inject_hyperparams(absgd)(0.01, 2.0)),
            lambda wrap: wrap(optax.apply_if_finite(absgd(0.01, 2.0), 3)),
            lambda wrap: wrap(absgd(0.01, optax.linear_schedule(3.0, 1.0, STEPS))),
        ],
        ids=["abadam", "inside_chain", "around_chain", "inject", "apply_if_finite", "schedule"],
    )
    def test_composes(self, build):
        with jax.numpy_dtype_promotion("standard"):  # optax itself needs it
            expected, _, _ = train(build(of_batches), (X, Y))
            params, _, _ = train(build(of_micro_batches), micro((X, Y)))
        chex.assert_trees_all_close(params, expected, rtol=1e-5)

    def test_between_the_batches_nothing_moves(self):
        opt = accumulate(absgd(0.01, optax.linear_schedule(3.0, 1.0, STEPS)), K)
        _, opt_state, (params, states) = train(opt, micro((X, Y)))
        moving = params, states.inner_opt_state
        held = jax.tree.map(lambda a: a[::K], moving)
        chex.assert_trees_all_equal(moving, jax.tree.map(lambda a: jnp.repeat(a, K, axis=0), held))
        # λ is the schedule of the batches, not of the micro-batches.
        np.testing.assert_allclose(
            jax.vmap(get_temperature)(states), np.repeat([3.0, 2.5, 2.0, 1.5], K)
        )
        assert get_temperature(opt_state) == 1.0
        np.testing.assert_array_equal(states.mini_step, np.tile(np.arange(K), STEPS))

    def test_state_tells_the_loss_so_far(self):
        opt = accumulate(absgd(0.01, 0.5), K)
        _, _, (_, states) = train(opt, micro((X[:1], Y[:1], WHERE[:1])))
        expected = [
            loss_fn(PARAMS, 0.5, X[0, :n], Y[0, :n], WHERE[0, :n]) if n else 0 for n in (0, 4, 8)
        ]
        np.testing.assert_allclose(states.value, expected, rtol=1e-5)
        np.testing.assert_array_equal(states.count, [WHERE[0, :n].sum() for n in (0, 4, 8)])

    def test_number_of_examples_stands_for_the_mask(self):
        opt = accumulate(absgd(0.01, 0.5), 2)
        opt_state = opt.init(jnp.zeros(3))
        for value, where in ((1.0, np.ones(5, bool)), (2.0, np.arange(9) < 4)):
            by_mask = opt.update(jnp.ones(3), opt_state, value=value, where=where)
            by_number = opt.update(jnp.ones(3), opt_state, value=value, where=where.sum())
            chex.assert_trees_all_equal(by_number, by_mask)
            _, opt_state = by_mask

    def test_memory_is_that_of_multi_steps(self):
        params = {"w": jnp.zeros((300, 100)), "b": jnp.zeros(100)}

        def memory(opt):
            def update(params, opt_state, grads, value):
                updates, opt_state = opt.update(grads, opt_state, params, value=value)
                return optax.apply_updates(params, updates), opt_state

            args = params, opt.init(params), params, jnp.float32(1.0)
            with jax.numpy_dtype_promotion("standard"):
                compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*args).compile()
            sizes = compiled.memory_analysis()
            return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes

        opt = absgd(0.1, 1.0)
        assert memory(accumulate(opt, 4)) < memory(optax.MultiSteps(opt, 4)) + 4096

    def test_accumulates_in_float32(self):
        opt_state = accumulate(absgd(0.01, 0.5), 2).init(jnp.ones(3, jnp.bfloat16))
        assert opt_state.acc_grads.dtype == jnp.float32

    def test_a_poisoned_micro_batch_leaves_no_trace_after_its_batch(self):
        opt = accumulate(optax.apply_if_finite(absgd(0.01, 0.5), 3), K)
        x, y = X.copy(), Y.copy()
        y[1, 5] = np.nan
        with jax.numpy_dtype_promotion("standard"):
            params, opt_state, _ = train(opt, micro((x, y)))
            expected, expected_state, _ = train(opt, micro((x[[0, 2, 3]], y[[0, 2, 3]])))
        chex.assert_trees_all_equal(params, expected)
        assert optax.tree.get(opt_state, "total_notfinite") == 1
        chex.assert_trees_all_equal(
            *(optax.tree.get(s, "baseline") for s in (opt_state, expected_state))
        )

    def test_one_micro_batch(self):
        opt = absgd(0.01, 0.5)
        chex.assert_trees_all_close(
            train(accumulate(opt, 1), (X, Y))[0], train(opt, (X, Y))[0], rtol=1e-6
        )


class TestWhatOptaxDoes:
    """It takes the mean of the parts' gradients: the batch's at an infinite temperature only."""

    PARAMS = cast(PARAMS, jnp.float32)
    BATCH = cast((X[0], Y[0]), jnp.float32)
    PARTS = tuple(zip(*cast(micro((X[:1], Y[:1])), jnp.float32), strict=True))

    def last_update(self, opt, temperature):
        opt_state = opt.init(self.PARAMS)
        for part in self.PARTS:
            loss, grads = jax.value_and_grad(loss_fn)(self.PARAMS, temperature, *part)
            with jax.numpy_dtype_promotion("standard"):
                updates, opt_state = opt.update(grads, opt_state, self.PARAMS, value=loss)
        return updates, opt_state

    def mean_gradient(self, temperature):
        grads = [jax.grad(loss_fn)(self.PARAMS, temperature, *part) for part in self.PARTS]
        return jax.tree.map(lambda *g: sum(g) / K, *grads)

    @pytest.mark.parametrize(("temperature", "exact"), [(2.0, False), (jnp.inf, True)])
    def test_multi_steps(self, temperature, exact):
        opt = absgd(0.01, temperature)
        updates, _ = self.last_update(optax.MultiSteps(opt, K), temperature)
        last = loss_fn(self.PARAMS, temperature, *self.PARTS[-1])
        mean = self.mean_gradient(temperature)
        expected, _ = opt.update(mean, opt.init(self.PARAMS), self.PARAMS, value=last)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)
        merged, _ = self.last_update(accumulate(opt, K), temperature)
        assert np.allclose(updates["w"], merged["w"], rtol=1e-5) == exact

    def test_multi_steps_behind_attention_averages_over_micro_batches(self):
        behind = optax.MultiSteps(optax.sgd(0.01), K).gradient_transformation()
        _, opt_state = self.last_update(optax.chain(scale_by_attention(2.0), behind), 2.0)
        assert opt_state[0].count == K

    @pytest.mark.parametrize(("temperature", "exact"), [(2.0, False), (jnp.inf, True)])
    def test_microbatch(self, temperature, exact):
        mean = self.mean_gradient(temperature)
        whole = jax.grad(loss_fn)(self.PARAMS, temperature, *self.BATCH)
        assert np.allclose(mean["w"], whole["w"], rtol=1e-5) == exact
        if hasattr(optax, "microbatch"):  # the oldest version that is tested has none
            interleaved = jax.tree.map(lambda *a: jnp.stack(a, 1).reshape(12, -1), *self.PARTS)
            grad = optax.microbatch(
                lambda p, x, y: jax.grad(loss_fn)(p, temperature, x, y[:, 0]),
                argnums=(1, 2),
                microbatch_size=4,
                accumulator=optax.microbatching.AccumulationType.MEAN,
            )
            with jax.numpy_dtype_promotion("standard"):
                chex.assert_trees_all_close(grad(self.PARAMS, *interleaved), mean, rtol=1e-5)


def spread(losses, temperature, where):
    """Loss and gradient of each device's losses, [devices, rows], merged."""

    def part(n, where):
        def loss_fn(losses):  # a gradient in all losses, as if they were parameters
            return robust_loss(losses[n], temperature, where=where)

        return pmerge(
            *jax.value_and_grad(loss_fn)(losses), temperature, where=where, axis_name="device"
        )

    in_axes = 0, None if where is None else 0
    return jax.vmap(part, in_axes, axis_name="device")(jnp.arange(len(losses)), where)


class TestPmerge:
    LOSSES = np.random.default_rng(1).gamma(2.0, size=(6, 8)).astype(np.float32)
    WHERE = RNG.random((6, 8)) > 0.5
    WHERE[3] = False

    @pytest.mark.parametrize("where", [None, WHERE, WHERE & False], ids=["all", "some", "none"])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_is_the_whole_batch(self, sign, where):
        losses, temperatures, sizes = (
            self.LOSSES,
            *np.meshgrid(
                sign * np.float32([1e-6, 0.1, 1.0, 1e4, 1e8, 1e29, 1e30, np.inf]),
                np.float32([1e-3, 1.0, 1e4, 1e30]),
            ),
        )

        @functools.partial(jax.jit, static_argnums=0)
        def run(f, temperatures, sizes):
            return jax.vmap(lambda t, s: f(s * losses, t, where))(temperatures, sizes)

        args = temperatures.ravel(), sizes.ravel()
        whole = run(lambda x, t, w: jax.value_and_grad(robust_loss)(x, t, where=w), *args)
        merged = run(spread, *args)
        for device in range(len(losses)):
            actual = merged[0][:, device], merged[1][:, device]
            chex.assert_trees_all_close(actual, whole, rtol=1e-5, atol=1e-30)

    def test_keeps_the_digits_of_large_temperatures(self):
        # λ log mean exp(F / λ) as it stands would keep none.
        loss, _ = jax.jit(spread)(self.LOSSES, jnp.float32(1e8), None)
        np.testing.assert_allclose(loss, self.LOSSES.mean(), rtol=1e-6)

    def test_parts_of_parts(self):
        """The merge of merged parts is that of all of them."""
        losses, where = self.LOSSES.reshape(2, 3, 8), self.WHERE.reshape(2, 3, 8)

        def part(losses, where):
            loss, grad = jax.value_and_grad(robust_loss)(losses, 0.5, where=where)
            row = lax.axis_index("host"), lax.axis_index("chip")
            grads = jnp.zeros([2, 3, 8]).at[row].set(grad)
            merge = functools.partial(pmerge, temperature=0.5)
            loss, grads = merge(loss, grads, where=where, axis_name="chip")
            number = lax.psum(where.sum(), "chip")
            return merge(loss, grads, where=number, axis_name="host")

        spread = jax.vmap(jax.vmap(part, axis_name="chip"), axis_name="host")
        loss, grads = jax.jit(spread)(losses, where)
        expected_loss, expected_grads = jax.value_and_grad(robust_loss)(losses, 0.5, where=where)
        np.testing.assert_allclose(loss, np.full((2, 3), expected_loss), rtol=1e-6)
        np.testing.assert_allclose(grads[1, 2], expected_grads, rtol=1e-5)

    def test_gradients_in_float16_do_not_overflow(self):
        grads = jnp.full([2, 3], 2e4, jnp.float16)
        _, merged = jax.vmap(
            lambda g, w: pmerge(1.0, g, 1.0, where=w, axis_name="device"), axis_name="device"
        )(grads, np.ones([2, 512], bool))
        assert merged.dtype == jnp.float16
        np.testing.assert_allclose(merged, grads, rtol=1e-3)


class TestBadInput:
    def test_no_attention(self):
        opt = accumulate(optax.with_extra_args_support(optax.sgd(0.1)), 2)
        with pytest.raises(ValueError, match="must hold one AttentionState, got 0"):
            opt.update(jnp.ones(3), opt.init(jnp.ones(3)), value=1.0)
