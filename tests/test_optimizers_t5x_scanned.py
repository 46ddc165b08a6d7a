"""Adafactor's second moments as T5X's scanned layers have them."""

import json
import math

import jax
import optax
import pytest
import references
from test_optimizers import NUM_STEPS, gradients_of_step, random_tree, relative_l2, run

from t5x_lite import optimizers
from t5x_lite.models import t5
from t5x_lite.optimizers import OptimizerConfig, make_optimizer


def test_scanned_rule_factors_matrices_of_any_size_within_a_layer():
    """With the rule of T5X's scanned layers each of them is as Optax has it without a limit."""
    num_layers = 3
    shapes = {"wide": (num_layers, 5, 7), "tall": (num_layers, 7, 5), "b": (num_layers, 6)}
    axes = {
        "wide": ("layers", "embed", "mlp"),
        "tall": ("layers", "heads", "embed"),
        "b": ("layers", "embed"),
    }
    schedule = optax.constant_schedule(0.05)
    tx = optimizers.adafactor(schedule, layer_axes=axes, factoring="t5x_scanned")
    params = random_tree(shapes, jax.random.key(0))
    actual, state = run(tx, params, shapes)
    assert state.v_row["wide"].shape == (num_layers, 5)
    assert state.v_col["wide"].shape == (num_layers, 7)
    alone = optax.adafactor(schedule, min_dim_size_to_factor=1)
    for layer in range(num_layers):
        expected = jax.tree.map(lambda x, layer=layer: x[layer], params)
        alone_state = alone.init(expected)
        for step in range(NUM_STEPS):
            grads = gradients_of_step(shapes, step)
            grads = jax.tree.map(lambda x, layer=layer: x[layer], grads)
            updates, alone_state = jax.jit(alone.update)(grads, alone_state, expected)
            expected = optax.apply_updates(expected, updates)
        for name in shapes:
            assert relative_l2(actual[name][layer], expected[name]) < 1e-6, (layer, name)


@pytest.mark.parametrize("name", ["t5x_legacy_scanned_v11", "t5x_orbax_scanned_v11"])
def test_scanned_rule_factors_what_t5x_factors(shared_data, name):
    """Every slot of T5X's scanned state is in use here too, and no other, of the same size."""
    directory = shared_data / "checkpoints" / "t5x" / name
    config = references.config_from_json(directory / "config.json")
    tx = make_optimizer(OptimizerConfig(factoring="t5x_scanned"), t5.logical_axes(config))
    params = jax.eval_shape(lambda: t5.init(config, jax.random.key(0)))
    state = jax.eval_shape(tx.init, params)
    ours = {
        field: {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(state, field))
        }
        for field in ("v_row", "v_col", "v")
    }
    tree = json.loads((directory / "tree.json").read_text())
    for path in ours["v"]:
        stack, _, rest = path.partition("/layers/")
        theirs = (
            f"state/param_states/{stack}/{stack}/{rest}" if rest else (f"state/param_states/{path}")
        )
        sizes = {s: math.prod(tree[f"{theirs}/{s}"]["shape"]) for s in ("v_row", "v_col", "v")}
        assert ours["v"][path] == sizes["v"], path
        # T5X's v_row is of d_model, ours of the second last axis.
        factors = sorted((sizes["v_row"], sizes["v_col"]))
        assert sorted((ours["v_row"][path], ours["v_col"][path])) == factors, path
