"""The table of axes, and the shardings that follow for parameters and optimizer state."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from t5x_lite import optimizers, partitioning, step
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config

CONFIG = T5Config(
    vocab_size=64,
    d_model=16,
    d_ff=32,
    d_kv=4,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=3,
)
# 4 x 2 devices that need not be there.
MESH = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def abstract_state(optimizer_config, config=CONFIG):
    """Shapes and logical axes of the whole state."""
    axes = t5.logical_axes(config)
    optimizer = optimizers.make_optimizer(optimizer_config, axes)
    shapes = jax.eval_shape(lambda: step.init_state(config, optimizer, jax.random.key(0)))
    opt_axes = optimizers.optimizer_state_axes(shapes.opt_state, axes)
    return shapes, shapes._replace(step=(), params=axes, opt_state=opt_axes)


def by_name(tree, is_leaf=None) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


# ---- the mesh and the table ----------------------------------------------------------------------


def test_mesh_of_all_devices():
    mesh = partitioning.make_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count(), "model": 1}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_axis_left_out_has_one_device():
    mesh = partitioning.make_mesh({"model": 1}, jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "model": 1}


def test_mesh_must_have_as_many_devices_as_there_are():
    with pytest.raises(UsageError, match="MESH = data 4 x model 2 is 8 devices, but there are 1"):
        partitioning.make_mesh({"data": 4, "model": 2}, jax.devices()[:1])


def test_unknown_mesh_axis_names_the_nearest():
    with pytest.raises(UsageError, match="MESH has no axis 'models'; did you mean 'model'"):
        partitioning.make_mesh({"models": 1}, jax.devices()[:1])


def test_two_axes_of_one_array_on_one_mesh_axis_raise():
    with pytest.raises(UsageError, match=r"\('vocab', 'mlp'\) .* mesh axis 'model'"):
        partitioning.partition_spec(("vocab", "mlp"))
    # Axes that are not split do not collide.
    assert partitioning.partition_spec(("embed", "embed")) == PartitionSpec(None, None)


def test_unknown_logical_axis_names_the_nearest():
    with pytest.raises(UsageError, match="'embedding'; did you mean 'embed'"):
        partitioning.partition_spec(("vocab", "embedding"))


def test_table_names_only_axes_of_the_mesh():
    assert set(partitioning.LOGICAL_TO_MESH.values()) == {*partitioning.MESH_AXES, None}


# ---- what follows for the state ------------------------------------------------------------------

EXPECTED = {
    "token_embedder/embedding": ("model", None),
    "decoder/logits_dense/kernel": (None, "model"),
    "encoder/layers/attention/query/kernel": (None, None, "model"),
    "encoder/layers/attention/out/kernel": (None, "model", None),
    "encoder/layers/mlp/wi_0/kernel": (None, None, "model"),
    "encoder/layers/mlp/wo/kernel": (None, "model", None),
    "encoder/layers/pre_mlp_layer_norm/scale": (None, None),
    "decoder/relpos_bias/rel_embedding": ("model", None),
}


def test_shardings_of_parameters():
    """Matrices are split along heads, mlp or vocabulary, norms not at all."""
    specs = by_name(partitioning.shardings(MESH, t5.logical_axes(CONFIG)))
    for name, expected in EXPECTED.items():
        assert specs[name].spec == PartitionSpec(*expected), name
        assert specs[name].mesh == MESH


def test_moments_lie_as_their_parameters():
    shapes, axes = abstract_state(optimizers.OptimizerConfig(name="adamw"))
    specs = by_name(partitioning.shardings(MESH, axes))
    params = by_name(shapes.params)
    for moment in ("mu", "nu"):
        found = {
            name.partition(f"{moment}/")[2]: s.spec
            for name, s in specs.items()
            if f"{moment}/" in name
        }
        assert found == {name: specs[f"params/{name}"].spec for name in params}


def test_factored_statistics_lie_as_what_is_left_of_their_parameters():
    """A mean over one axis lies as the other axes do; their sizes tell which it is."""
    optimizer = optimizers.OptimizerConfig(name="adafactor", min_dim_size_to_factor=8)
    shapes, axes = abstract_state(optimizer)
    specs, sizes = by_name(partitioning.shardings(MESH, axes)), by_name(shapes)
    kernel = "encoder/layers/mlp/wi_0/kernel"  # [layers 2, embed 16, mlp 32]
    slots = {name: s for name, s in sizes.items() if name.endswith(f"/{kernel}") and "opt" in name}
    expected = {(2, 16): PartitionSpec(None, None), (2, 32): PartitionSpec(None, "model")}
    assert {s.shape for s in slots.values() if s.size > 1} == set(expected)
    for name, slot in slots.items():
        if slot.size > 1:
            assert specs[name].spec == expected[slot.shape], name
    for name, shape in sizes.items():
        assert len(specs[name].spec) == shape.ndim, name


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_bytes_on_a_device(name):
    """The table's total is what the arrays' shards add up to, `model` halving what it splits."""
    optimizer = optimizers.OptimizerConfig(name=name, min_dim_size_to_factor=8)
    shapes, axes = abstract_state(optimizer)
    shardings = partitioning.shardings(MESH, axes)
    with_shardings = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    lines = partitioning.describe(with_shardings, axes)
    rows = {line.split()[0]: line for line in lines}
    assert len(lines) == len(rows) == len(jax.tree.leaves(shapes)) + 2  # a heading and the sum

    is_split = {n: "model" in s.spec for n, s in by_name(shardings).items()}
    sizes = {n: s.size * s.dtype.itemsize // (1 + is_split[n]) for n, s in by_name(shapes).items()}
    for array, num_bytes in sizes.items():
        assert rows[array].endswith(f" {num_bytes:,}")
    assert rows["all"].endswith(f" {sum(sizes.values()):,}")
    embedding = rows["params/token_embedder/embedding"].split()
    assert embedding[1:] == ["64x16", "vocab", "embed", "model", "-", f"{64 * 16 * 4 // 2:,}"]
    assert rows["step"].split()[1] == "scalar"


def test_axis_that_does_not_divide_is_named():
    config = T5Config(**CONFIG.to_dict() | {"vocab_size": 63})
    shapes, axes = abstract_state(optimizers.OptimizerConfig(), config)
    with pytest.raises(UsageError) as e:
        partitioning.check_divisible(shapes, axes, MESH)
    message = str(e.value)
    assert "'vocab' of size 63 does not divide over 2 devices" in message
    assert "\n" not in message
    shapes, axes = abstract_state(optimizers.OptimizerConfig())
    partitioning.check_divisible(shapes, axes, MESH)


def test_batch_goes_to_the_devices_as_it_is():
    mesh = partitioning.make_mesh({"data": 1}, jax.devices()[:1])
    batch = {"encoder_input_tokens": np.arange(12, dtype=np.int32).reshape(4, 3)}
    found = partitioning.shard_batch(batch, mesh)["encoder_input_tokens"]
    assert found.sharding.spec == PartitionSpec("data", None)
    np.testing.assert_array_equal(found, batch["encoder_input_tokens"])
    assert partitioning.replicated(mesh).is_fully_replicated
