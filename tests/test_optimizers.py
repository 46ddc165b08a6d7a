"""Optimizers against Optax, T5X's golden files, and closed forms in float64."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite import optimizers
from t5x_lite.errors import UsageError
from t5x_lite.optimizers import OptimizerConfig, make_optimizer, make_schedule

NUM_STEPS = 20


def random_tree(shapes, key, scale=1.0):
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [scale * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    )


def gradients_of_step(shapes, step):
    """Gradients whose size changes from step to step, so that clipping sets in and lets go."""
    return random_tree(shapes, jax.random.key(1000 + step), scale=10.0 ** (step % 5 - 2))


def run(tx, params, shapes, num_steps=NUM_STEPS):
    """Parameters and state after some steps of `tx` on gradients that depend on the step alone."""

    @jax.jit
    def step_fn(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for step in range(num_steps):
        params, state = step_fn(params, state, gradients_of_step(shapes, step))
    return params, state


def relative_l2(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# Sizes on both sides of the factoring threshold; a parameter that starts at zero, whose scale is
# the floor; a vector and a scalar.
SHAPES = {
    "square": (128, 128),
    "wide": (130, 257),
    "tall": (257, 130),
    "narrow": (127, 256),
    "small": (3, 5),
    "vector": (129,),
    "scalar": (),
    "zero": (128, 130),
}
AXES = {
    "square": ("embed", "joined_kv"),
    "wide": ("embed", "mlp"),
    "tall": ("mlp", "embed"),
    "narrow": ("embed", "mlp"),
    "small": ("heads", "relpos_buckets"),
    "vector": ("embed",),
    "scalar": (),
    "zero": ("embed", "mlp"),
}


def initial_params(shapes):
    params = random_tree(shapes, jax.random.key(0), scale=0.3)
    return params | {"zero": jnp.zeros(shapes["zero"])} if "zero" in shapes else params


class TestAdafactor:
    @pytest.mark.parametrize("weight_decay", [0.0, 1e-3])
    def test_equals_optax_on_single_layers(self, weight_decay):
        schedule = make_schedule(OptimizerConfig(learning_rate=0.03, warmup_steps=10))
        ours = optimizers.adafactor(schedule, layer_axes=AXES, weight_decay=weight_decay)
        theirs = optax.adafactor(schedule, weight_decay_rate=weight_decay or None)
        params = initial_params(SHAPES)
        actual, state = run(ours, params, SHAPES)
        expected, expected_state = run(theirs, params, SHAPES)
        for name in SHAPES:
            assert relative_l2(actual[name], expected[name]) < 1e-6, name
            assert not np.allclose(actual[name], params[name]), f"{name} did not move"
        assert int(state.count) == NUM_STEPS
        for name in ("small", "narrow", "vector"):
            assert relative_l2(state.v[name], expected_state[0].v[name]) < 1e-6

    def test_equals_float64_closed_form(self):
        """Algorithm 4 of Shazeer and Stern 2018, written out in numpy for one factored matrix."""
        shapes, axes = {"w": (128, 200)}, {"w": ("embed", "mlp")}
        rate = 0.02
        tx = optimizers.adafactor(lambda _: jnp.float32(rate), layer_axes=axes)
        params = random_tree(shapes, jax.random.key(0), scale=0.3)
        actual, _ = run(tx, params, shapes)
        x = np.asarray(params["w"], np.float64)
        row, column = np.zeros(128), np.zeros(200)
        for step in range(NUM_STEPS):
            grad = np.asarray(gradients_of_step(shapes, step)["w"], np.float64)
            beta = 1 - (step + 1) ** -0.8
            squared = grad**2 + 1e-30
            row = beta * row + (1 - beta) * squared.sum(1)
            column = beta * column + (1 - beta) * squared.sum(0)
            u = grad / np.sqrt(np.outer(row, column) / row.sum())
            u /= max(1.0, math.sqrt((u**2).mean()))
            x = x - rate * max(1e-3, math.sqrt((x**2).mean())) * u
        assert relative_l2(actual["w"], x) < 1e-6

    def test_each_layer_of_a_stack_is_a_parameter_of_its_own(self):
        num_layers = 3
        stacked_shapes = {k: (num_layers, *v) for k, v in SHAPES.items()}
        stacked_axes = {k: ("layers", *v) for k, v in AXES.items()}
        # Layers differ in size by powers of ten: statistics shared between them would show.
        size = 10.0 ** jnp.arange(num_layers)
        params = jax.tree.map(
            lambda x: jnp.einsum("l...,l->l...", x, size), initial_params(stacked_shapes)
        )
        schedule = optax.constant_schedule(0.05)
        tx = optimizers.adafactor(schedule, layer_axes=stacked_axes)
        actual, _ = run(tx, params, stacked_shapes)
        for layer in range(num_layers):
            alone = optax.adafactor(schedule)
            expected = jax.tree.map(lambda x, layer=layer: x[layer], params)
            state = alone.init(expected)
            for step in range(NUM_STEPS):
                grads = gradients_of_step(stacked_shapes, step)
                grads = jax.tree.map(lambda x, layer=layer: x[layer], grads)
                updates, state = jax.jit(alone.update)(grads, state, expected)
                expected = optax.apply_updates(expected, updates)
            for name in SHAPES:
                assert relative_l2(actual[name][layer], expected[name]) < 1e-6, (layer, name)

    def test_arithmetic_is_float32_for_bfloat16_parameters(self):
        shapes = {"w": (128, 128), "b": (200,)}
        axes = {"w": ("embed", "mlp"), "b": ("mlp",)}
        tx = optimizers.adafactor(optax.constant_schedule(0.1), layer_axes=axes, weight_decay=0.1)
        low = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16),
            (random_tree(shapes, jax.random.key(0)), gradients_of_step(shapes, 0)),
        )
        high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
        results = [jax.jit(tx.update)(g, tx.init(p), p) for p, g in (low, high)]
        for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
            assert actual.dtype == expected.dtype
            np.testing.assert_allclose(actual, expected, rtol=1e-6)

    def test_stacked_vectors_are_not_a_matrix(self):
        shape = (128, 256)
        tx = optimizers.adafactor(
            optax.constant_schedule(1.0),
            layer_axes={"a": ("layers", "embed"), "b": ("mlp", "embed")},
        )
        state = tx.init({"a": jnp.zeros(shape), "b": jnp.zeros(shape)})
        assert (state.v["a"].shape, state.v_row["a"].shape) == (shape, ())
        assert (state.v["b"].shape, state.v_row["b"].shape) == ((), (128,))

    def test_zero_gradients_leave_parameters_alone(self):
        axes = {"w": ("layers", "embed", "mlp")}
        params = {"w": jnp.ones((2, 128, 128))}
        tx = optimizers.adafactor(optax.constant_schedule(1.0), layer_axes=axes)
        updates, _ = tx.update({"w": jnp.zeros((2, 128, 128))}, tx.init(params), params)
        np.testing.assert_array_equal(updates["w"], 0.0)

    def test_rank_must_equal_number_of_axis_names(self):
        tx = optimizers.adafactor(
            optax.constant_schedule(1.0), layer_axes={"mlp": {"kernel": ("embed",)}}
        )
        with pytest.raises(ValueError, match=r"mlp/kernel has shape \(2, 3\)"):
            tx.init({"mlp": {"kernel": jnp.zeros((2, 3))}})

    @pytest.mark.parametrize(
        "tree",
        [
            "t5x_training_trajectory/final_opt_summary_packed_base0.03_warmup10.json",
            "t5x_training_trajectory/final_opt_summary_unpacked_base0.03_warmup10.json",
            "t5x_legacy_unscanned_v11/tree.json",
            "t5x_legacy_unscanned_v10/tree.json",
        ],
    )
    def test_factors_what_t5x_factors(self, shared_data, tree):
        saved = json.loads((shared_data / "checkpoints" / "t5x" / tree).read_text())
        prefix = "state/param_states/"
        slots: dict[str, dict[str, tuple[int, ...]]] = {}
        for path, entry in saved.items():
            if path.startswith(prefix):
                name, slot = path.removeprefix(prefix).rsplit("/", 1)
                slots.setdefault(name, {})[slot] = tuple(entry["shape"])
        shapes = {}
        for name, slot in slots.items():
            if slot["v"] != (1,):
                shapes[name] = slot["v"]
            else:  # T5X puts the shorter side first, whichever axis it is
                shapes[name] = (*slot["v_row"], *slot["v_col"])
        axes = {name: ("a", "b")[: len(shape)] for name, shape in shapes.items()}
        tx = optimizers.adafactor(optax.constant_schedule(1.0), layer_axes=axes)
        params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
        state = jax.eval_shape(tx.init, params)
        assert len(shapes) > 20
        for name, slot in slots.items():
            for field in ("v_row", "v_col", "v"):
                ours = getattr(state, field)[name].shape
                assert (ours or (1,)) == slot[field], (name, field)


class TestSchedules:
    @pytest.mark.parametrize(
        "schedule", ["base1_warmup10", "base1_warmup10000", "base0.03_warmup10"]
    )
    def test_inverse_sqrt_equals_t5x(self, shared_data, schedule):
        path = shared_data / "checkpoints" / "t5x" / "t5x_training_trajectory" / "trajectory.json"
        trajectory = json.loads(path.read_text())
        settings = trajectory["hyperparameters"]["schedule"]["runs"][schedule]
        rate = make_schedule(
            OptimizerConfig(
                learning_rate=settings["base_learning_rate"], warmup_steps=settings["warmup_steps"]
            )
        )
        expected = trajectory["runs"][f"unpacked_{schedule}"]["learning_rate"]
        actual = [float(rate(step)) for step in range(len(expected))]
        np.testing.assert_allclose(actual, expected, rtol=1e-7)

    def test_defaults_are_t5_pretraining(self):
        rate = make_schedule(OptimizerConfig())
        for step, expected in ((0, 0.01), (10_000, 0.01), (40_000, 0.005), (1_000_000, 0.001)):
            assert float(rate(step)) == pytest.approx(expected, rel=1e-6)

    def test_constant_has_no_warmup_unless_asked(self):
        rate = make_schedule(OptimizerConfig(schedule="constant", learning_rate=0.001))
        assert [float(rate(step)) for step in (0, 1, 10**6)] == pytest.approx([0.001] * 3)
        rate = make_schedule(
            OptimizerConfig(schedule="constant", learning_rate=0.5, warmup_steps=4)
        )
        expected = [0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
        assert [float(rate(step)) for step in range(7)] == pytest.approx(expected)

    @pytest.mark.parametrize("warmup_steps", [0, 1, 7])
    @pytest.mark.parametrize("schedule", ["linear", "cosine"])
    def test_decay_equals_optax(self, schedule, warmup_steps):
        peak, final, total_steps = 0.3, 0.02, 50
        config = OptimizerConfig(
            schedule=schedule,
            learning_rate=peak,
            final_learning_rate=final,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
        )
        decay_steps = total_steps - warmup_steps
        decay = (
            optax.linear_schedule(peak, final, decay_steps)
            if schedule == "linear"
            else optax.cosine_decay_schedule(peak, decay_steps, alpha=final / peak)
        )
        warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
        expected = optax.join_schedules([warmup, decay], [warmup_steps])
        actual = make_schedule(config)
        for step in range(60):
            assert float(actual(step)) == pytest.approx(float(expected(step)), rel=1e-5), step
        assert float(actual(10**6)) == pytest.approx(final)

    def test_first_update_uses_step_zero(self):
        """T5X: the schedule sees the number of updates made before this one."""
        config = OptimizerConfig(schedule="constant", learning_rate=0.1, warmup_steps=2)
        params = {"w": jnp.ones((4,))}
        grads = {"w": jnp.ones((4,))}
        tx = make_optimizer(config, {"w": ("embed",)})
        state = tx.init(params)
        updates, state = tx.update(grads, state, params)
        np.testing.assert_array_equal(updates["w"], 0.0)
        updates, state = tx.update(grads, state, params)
        np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)


class TestAdamW:
    SHAPES = {
        "mlp": {"wi": {"kernel": (2, 3, 5)}},
        "norm": {"scale": (2, 3)},
        "embedding": (7, 3),
    }
    AXES = {
        "mlp": {"wi": {"kernel": ("layers", "embed", "mlp")}},
        "norm": {"scale": ("layers", "embed")},
        "embedding": ("vocab", "embed"),
    }

    def test_equals_closed_form_and_decays_matrices_only(self):
        config = OptimizerConfig(
            name="adamw",
            schedule="linear",
            learning_rate=0.01,
            warmup_steps=3,
            total_steps=30,
            b1=0.8,
            b2=0.95,
            eps=1e-6,
            weight_decay=0.1,
        )
        params = random_tree(self.SHAPES, jax.random.key(0))
        actual, _ = run(make_optimizer(config, self.AXES), params, self.SHAPES)
        structure = jax.tree.structure(params)
        decays = jax.tree.leaves(
            {"mlp": {"wi": {"kernel": 0.1}}, "norm": {"scale": 0.0}, "embedding": 0.0}
        )
        expected = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
        mu = [np.zeros_like(x) for x in expected]
        nu = [np.zeros_like(x) for x in expected]
        for step in range(NUM_STEPS):
            rate = 0.01 * (step / 3 if step < 3 else (30 - step) / 27)
            grads = structure.flatten_up_to(gradients_of_step(self.SHAPES, step))
            for i, grad in enumerate(np.asarray(g, np.float64) for g in grads):
                mu[i] = 0.8 * mu[i] + 0.2 * grad
                nu[i] = 0.95 * nu[i] + 0.05 * grad**2
                unit = mu[i] / (1 - 0.8 ** (step + 1))
                unit /= np.sqrt(nu[i] / (1 - 0.95 ** (step + 1))) + 1e-6
                expected[i] = expected[i] - rate * (unit + decays[i] * expected[i])
        for a, b in zip(jax.tree.leaves(actual), expected, strict=True):
            assert relative_l2(a, b) < 1e-6


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_clipping_scales_all_gradients_to_the_global_norm(name):
    """With clipping at c, gradients g and g * c / |g| lead to the same parameters."""
    shapes, axes = TestAdamW.SHAPES, TestAdamW.AXES
    config = {"name": name, "schedule": "constant", "learning_rate": 0.1, "eps": 1.0}
    clipped = make_optimizer(OptimizerConfig(clip_global_norm=0.5, **config), axes)
    plain = make_optimizer(OptimizerConfig(**config), axes)
    actual = expected = random_tree(shapes, jax.random.key(0))
    clipped_state, plain_state = clipped.init(actual), plain.init(expected)
    num_clipped = 0
    for step in range(NUM_STEPS):
        grads = gradients_of_step(shapes, step)
        norm = math.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in jax.tree.leaves(grads)))
        num_clipped += norm > 0.5
        factor = min(1.0, 0.5 / norm)
        by_hand = jax.tree.map(lambda g, factor=factor: g * factor, grads)
        updates, clipped_state = clipped.update(grads, clipped_state, actual)
        actual = optax.apply_updates(actual, updates)
        updates, plain_state = plain.update(by_hand, plain_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert 0 < num_clipped < NUM_STEPS
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_l2(a, b) < 1e-5


class TestStateAxes:
    SHAPES = {
        "encoder": {"wi": {"kernel": (4, 128, 256)}, "norm": {"scale": (4, 128)}},
        "v": {"embedding": (512, 128)},  # named like a field of the state
        "one": {"scale": (1,)},
    }
    AXES = {
        "encoder": {
            "wi": {"kernel": ("layers", "embed", "mlp")},
            "norm": {"scale": ("layers", "embed")},
        },
        "v": {"embedding": ("vocab", "embed")},
        "one": {"scale": ("embed",)},
    }

    def axes_by_path(self, config, divisor=1):
        params = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct([max(1, n // divisor) for n in s], jnp.float32),
            self.SHAPES,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        state = jax.eval_shape(make_optimizer(config, self.AXES).init, params)
        axes = optimizers.optimizer_state_axes(state, self.AXES)
        by_path = {}
        shapes = jax.tree_util.tree_leaves_with_path(state)
        # The tree of axes has the tree of the state, with a tuple for every array.
        for (path, leaf), names in zip(
            shapes, jax.tree.structure(state).flatten_up_to(axes), strict=True
        ):
            assert len(names) == leaf.ndim, path
            by_path[jax.tree_util.keystr(path, simple=True, separator="/")] = names
        return by_path

    @pytest.mark.parametrize("clip_global_norm", [None, 1.0])
    def test_adafactor(self, clip_global_norm):
        by_path = self.axes_by_path(OptimizerConfig(clip_global_norm=clip_global_norm))
        prefix = "" if clip_global_norm is None else "1/"
        expected = {
            "count": (),
            "v_row/encoder/norm/scale": (),
            "v_row/encoder/wi/kernel": ("layers", "embed"),
            "v_row/one/scale": (),
            "v_row/v/embedding": ("vocab",),
            "v_col/encoder/norm/scale": (),
            "v_col/encoder/wi/kernel": ("layers", "mlp"),
            "v_col/one/scale": (),
            "v_col/v/embedding": ("embed",),
            "v/encoder/norm/scale": ("layers", "embed"),
            "v/encoder/wi/kernel": (),
            "v/one/scale": ("embed",),
            "v/v/embedding": (),
        }
        assert by_path == {prefix + k: v for k, v in expected.items()}

    def test_adafactor_with_the_scanned_rule(self):
        """Matrices of a stack are factored though they are small, and what is outside is not."""
        by_path = self.axes_by_path(OptimizerConfig(factoring="t5x_scanned"), divisor=4)
        in_use = {path: names for path, names in by_path.items() if names}
        assert in_use == {
            "v/encoder/norm/scale": ("layers", "embed"),
            "v_row/encoder/wi/kernel": ("layers", "embed"),
            "v_col/encoder/wi/kernel": ("layers", "mlp"),
            "v/one/scale": ("embed",),
            "v/v/embedding": ("vocab", "embed"),
        }

    @pytest.mark.parametrize("clip_global_norm", [None, 1.0])
    def test_adamw(self, clip_global_norm):
        config = OptimizerConfig(name="adamw", weight_decay=0.1, clip_global_norm=clip_global_norm)
        by_path = self.axes_by_path(config)
        for field in ("mu", "nu"):
            of_field = {
                k.split(f"{field}/", 1)[1]: v for k, v in by_path.items() if f"/{field}/" in k
            }
            assert of_field == {
                "encoder/norm/scale": ("layers", "embed"),
                "encoder/wi/kernel": ("layers", "embed", "mlp"),
                "one/scale": ("embed",),
                "v/embedding": ("vocab", "embed"),
            }
        counts = {k: v for k, v in by_path.items() if k.endswith("count")}
        assert counts and set(counts.values()) == {()}
        assert len(by_path) == 8 + len(counts)

    def test_array_of_no_parameter_raises(self):
        state = optax.TraceState(trace={"encoder": jnp.zeros((2, 2))})
        with pytest.raises(ValueError, match="no logical axes for optimizer state"):
            optimizers.optimizer_state_axes(state, {"encoder": ("a", "b")})


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"name": "adafacter"}, "OptimizerConfig.name = 'adafacter' .*'adafactor'"),
            ({"factoring": "t5x"}, "OptimizerConfig.factoring = 't5x' .*'t5x_scanned'"),
            ({"schedule": "cosin"}, "OptimizerConfig.schedule = 'cosin' .*'cosine'"),
            ({"learning_rate": 0.0}, "learning_rate = 0.0 must be greater than 0"),
            ({"learning_rate": float("nan")}, "learning_rate = nan must be a finite number"),
            ({"learning_rate": "0.1"}, "learning_rate = '0.1' must be a finite number"),
            ({"learning_rate": None}, "learning_rate = None must be a finite number"),
            ({"warmup_steps": 0}, "warmup_steps = 0 must be 1 or more with .*'inverse_sqrt'"),
            ({"schedule": "constant", "warmup_steps": -1}, "warmup_steps = -1 must be 0 or more"),
            ({"schedule": "linear"}, r"total_steps = None must be more than warmup_steps \(0\)"),
            (
                {"schedule": "cosine", "warmup_steps": 10, "total_steps": 10},
                r"total_steps = 10 must be more than warmup_steps \(10\)",
            ),
            ({"clip_global_norm": 0.0}, "clip_global_norm = 0.0 must be None or greater than 0"),
            ({"weight_decay": -0.1}, "weight_decay = -0.1 must be from 0 to below 1"),
            ({"b2": 1.0}, "b2 = 1.0 must be from 0 to below 1"),
        ],
    )
    def test_bad_settings_are_one_line(self, settings, message):
        with pytest.raises(UsageError, match=message) as caught:
            OptimizerConfig(**settings)
        assert not re.search("\n", str(caught.value))
