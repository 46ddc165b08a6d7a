"""The mesh, the table of axes, and the shardings that follow for parameters and optimizer state."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from t5x_lite import optimizers, partitioning, step
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.partitioning import Partitioning, make_partitioning

CONFIG = T5Config(
    vocab_size=64,
    d_model=16,
    d_ff=32,
    d_kv=4,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=3,
)


def abstract_mesh(data=1, fsdp=1, model=1):
    """Devices that need not be there."""
    sizes = (data, fsdp, model)
    return AbstractMesh(sizes, partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


TWO_D = Partitioning(abstract_mesh(2, 4, 2))


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """As much of a device as a mesh looks at."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "cpu"
    device_kind: str = "fake"


def fake_mesh(shape, devices_per_process):
    """(data, fsdp, model) over processes of so many devices each, in order."""
    devices = [FakeDevice(i, i // devices_per_process) for i in range(np.prod(shape))]
    grid = np.array(devices, dtype=object).reshape(shape)
    return Partitioning(Mesh(grid, partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * 3))


def abstract_state(optimizer_config, config=CONFIG):
    """Shapes and logical axes of the whole state."""
    axes = t5.logical_axes(config)
    optimizer = optimizers.make_optimizer(optimizer_config, axes)
    shapes = jax.eval_shape(lambda: step.init_state(config, optimizer, jax.random.key(0)))
    opt_axes = optimizers.optimizer_state_axes(shapes.opt_state, axes)
    return shapes, shapes._replace(step=(), params=axes, opt_state=opt_axes)


def is_axes(x):
    return type(x) is tuple and all(isinstance(name, str) for name in x)


def by_name(tree, is_leaf=None) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


# ---- the mesh and the table ----------------------------------------------------------------------


def test_mesh_of_all_devices():
    found = make_partitioning()
    assert dict(found.mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "model": 1}
    assert set(found.mesh.axis_types) == {AxisType.Auto}
    assert found.num_batch_shards == jax.device_count()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"shape": {"data": 4, "model": 2}},
            "MESH = {'data': 4, 'model': 2} is 8 devices, but there are 1: let the product",
        ),
        ({"shape": {"models": 1}}, "MESH has no axis 'models'; did you mean 'model'"),
        ({"over_slices": {"fsdp": 2}}, "DCN_MESH = {'fsdp': 2} is 2 slices, but there are 1: "),
        ({"over_slices": {"fsdb": 1}}, "DCN_MESH has no axis 'fsdb'; did you mean 'fsdp'"),
        ({"rules": {"embedd": None}}, "SHARDING_RULES has no axis 'embedd'; did you mean 'embed'"),
        (
            {"rules": {"embed": "modle"}},
            r"SHARDING_RULES\['embed'\] = 'modle': MESH has no axis 'modle'; did you mean 'model'",
        ),
        ({"rules": {"batch": ("data", "x")}}, "MESH has no axis 'x'"),
    ],
)
def test_what_no_mesh_can_be_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_partitioning(devices=jax.devices()[:1], **arguments)


def test_rules_change_the_table():
    found = make_partitioning(
        {"data": 1},
        rules={"embed": None, "length": "model", "batch": ["data"]},
        devices=jax.devices()[:1],
    )
    assert found.spec(("embed", "mlp")) == PartitionSpec(None, "model")
    assert found.spec(("batch", "length")) == PartitionSpec("data", "model")
    assert hash(found) == hash(dataclasses.replace(found))


def test_two_axes_of_one_array_on_one_mesh_axis_raise():
    with pytest.raises(UsageError, match=r"\('vocab', 'mlp'\) .* mesh axis 'model'"):
        TWO_D.spec(("vocab", "mlp"))
    with pytest.raises(UsageError, match=r"\('batch', 'embed'\) .* mesh axis 'fsdp'"):
        TWO_D.spec(("batch", "embed"))
    # Axes that are not split do not collide.
    assert TWO_D.spec(("layers", "layers")) == PartitionSpec(None, None)


def test_unknown_logical_axis_names_the_nearest():
    with pytest.raises(UsageError, match="'embedding'; did you mean 'embed'"):
        TWO_D.spec(("vocab", "embedding"))


def test_table_names_only_axes_of_the_mesh():
    found = {axis for name, _ in TWO_D.rules for axis in TWO_D.mesh_axes(name)}
    assert found == set(partitioning.MESH_AXES)


# ---- slices --------------------------------------------------------------------------------------


def sliced(num_slices, per_slice):
    return [
        FakeDevice(s * per_slice + i, s, slice_index=s)
        for s in range(num_slices)
        for i in range(per_slice)
    ]


@pytest.mark.parametrize(
    ("shape", "over_slices", "axis"),
    [
        ({"data": 2, "fsdp": 2, "model": 2}, None, 0),
        ({"fsdp": 4, "model": 2}, None, 1),
        ({"data": 2, "fsdp": 4}, {"fsdp": 2}, 1),
        ({"data": 2, "model": 4}, {"model": 2}, 2),
    ],
)
def test_slices_lie_along_one_axis(shape, over_slices, axis):
    """Whoever differs only in the other coordinates is in the same slice, four devices each."""
    found = make_partitioning(shape, over_slices=over_slices, devices=sliced(2, 4))
    slices = np.vectorize(lambda d: d.slice_index)(found.mesh.devices)
    halves = np.split(slices, 2, axis=axis)
    assert (halves[0] == 0).all()
    assert (halves[1] == 1).all()
    assert sorted(d.id for d in found.mesh.devices.flat) == list(range(8))


def test_slices_that_do_not_divide_are_refused():
    with pytest.raises(
        UsageError, match=r"MESH = {'model': 9} does not divide over 3 slices: let data"
    ):
        make_partitioning({"model": 9}, devices=sliced(3, 3))
    with pytest.raises(UsageError, match="data 4 of MESH does not divide over 3 slices"):
        make_partitioning({"data": 4, "fsdp": 3}, over_slices={"data": 3}, devices=sliced(3, 4))


# ---- who feeds what ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "devices_per_process", "expected"),
    [
        ((4, 1, 1), 2, [(0, (0, 1)), (1, (2, 3))]),
        ((2, 1, 2), 2, [(0, (0,)), (1, (1,))]),
        ((1, 4, 1), 2, [(0, (0, 1)), (1, (2, 3))]),
        ((1, 1, 4), 2, [(0, (0,)), (0, (0,))]),  # model goes across: both have all rows
        ((2, 1, 4), 2, [(0, (0,)), (0, (0,)), (1, (1,)), (1, (1,))]),
        ((2, 2, 1), 1, [(0, (0,)), (1, (1,)), (2, (2,)), (3, (3,))]),
    ],
)
def test_share_of_each_process(shape, devices_per_process, expected):
    found = fake_mesh(shape, devices_per_process)
    shares = [found.input_share(process) for process in range(len(expected))]
    assert [(share.index, share.shards) for share in shares] == expected
    assert {share.count for share in shares} == {len({index for index, _ in expected})}
    rows = [share.rows(8) for share in shares]
    assert sorted({int(r) for part in rows for r in part}) == list(range(8))
    assert {len(part) for part in rows} == {8 // shares[0].count}


def test_shares_of_a_mesh_whose_processes_are_not_in_order():
    """Devices are ordered by the network, not by process."""
    devices = [FakeDevice(i, process) for i, process in enumerate([0, 1, 0, 1])]
    grid = np.array(devices, dtype=object).reshape(4, 1, 1)
    found = Partitioning(Mesh(grid, partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * 3))
    assert found.input_share(0).rows(8).tolist() == [0, 1, 4, 5]
    assert found.input_share(1).rows(8).tolist() == [2, 3, 6, 7]


def test_processes_that_overlap_are_refused():
    with pytest.raises(UsageError, match="2 processes cannot share its 3 parts of a batch evenly"):
        fake_mesh((3, 1, 2), 3).input_share(0)


def test_batch_goes_to_the_devices_as_it_is():
    found = make_partitioning({"data": 1}, devices=jax.devices()[:1])
    batch = {"encoder_input_tokens": np.arange(12, dtype=np.int32).reshape(4, 3)}
    placed = found.shard_batch(batch)["encoder_input_tokens"]
    assert placed.sharding.spec == PartitionSpec(("data", "fsdp"), None)
    np.testing.assert_array_equal(placed, batch["encoder_input_tokens"])
    assert found.replicated.is_fully_replicated


EIGHT_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from t5x_lite.partitioning import make_partitioning

rows = np.arange(48, dtype=np.int32).reshape(16, 3)
for shape in ({"data": 8}, {"data": 2, "fsdp": 2, "model": 2}, {"fsdp": 4, "model": 2}):
    placed = make_partitioning(shape).shard_batch({"x": rows})["x"]
    np.testing.assert_array_equal(placed, rows)
    per_shard = 16 // (shape.get("data", 1) * shape.get("fsdp", 1))
    assert {s.data.shape for s in placed.addressable_shards} == {(per_shard, 3)}
"""


def test_batch_on_eight_devices(repo):
    """Every row arrives once, whatever the mesh; each device holds its part alone."""
    subprocess.run([sys.executable, "-c", EIGHT_DEVICES], cwd=repo, check=True, timeout=120)


# ---- what follows for the state ------------------------------------------------------------------

EXPECTED = {
    "token_embedder/embedding": ("model", "fsdp"),
    "decoder/logits_dense/kernel": ("fsdp", "model"),
    "encoder/layers/attention/query/kernel": (None, "fsdp", "model"),
    "encoder/layers/attention/out/kernel": (None, "model", "fsdp"),
    "encoder/layers/mlp/wi_0/kernel": (None, "fsdp", "model"),
    "encoder/layers/mlp/wo/kernel": (None, "model", "fsdp"),
    "encoder/layers/pre_mlp_layer_norm/scale": (None, "fsdp"),
    "decoder/relpos_bias/rel_embedding": ("model", None),
}


def test_shardings_of_parameters():
    """Matrices are split in two dimensions: d_model, and heads, mlp or vocabulary."""
    specs = by_name(TWO_D.shardings(t5.logical_axes(CONFIG)))
    for name, expected in EXPECTED.items():
        assert specs[name].spec == PartitionSpec(*expected), name
        assert specs[name].mesh == TWO_D.mesh


def test_moments_lie_as_their_parameters():
    shapes, axes = abstract_state(optimizers.OptimizerConfig(name="adamw"))
    specs = by_name(TWO_D.shardings(axes))
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
    specs, sizes = by_name(TWO_D.shardings(axes)), by_name(shapes)
    kernel = "encoder/layers/mlp/wi_0/kernel"  # [layers 2, embed 16, mlp 32]
    slots = {name: s for name, s in sizes.items() if name.endswith(f"/{kernel}") and "opt" in name}
    expected = {(2, 16): PartitionSpec(None, "fsdp"), (2, 32): PartitionSpec(None, "model")}
    assert {s.shape for s in slots.values() if s.size > 1} == set(expected)
    for name, slot in slots.items():
        if slot.size > 1:
            assert specs[name].spec == expected[slot.shape], name
    for name, shape in sizes.items():
        assert len(specs[name].spec) == shape.ndim, name


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
@pytest.mark.parametrize("shape", [(4, 1, 2), (1, 8, 1), (2, 2, 2)])
def test_bytes_on_a_device(name, shape):
    """Each array is as many times smaller as its mesh axes have devices; the sum is all of them."""
    found = Partitioning(abstract_mesh(*shape))
    optimizer = optimizers.OptimizerConfig(name=name, min_dim_size_to_factor=8)
    shapes, axes = abstract_state(optimizer)
    shardings = found.shardings(axes)
    with_shardings = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    lines = partitioning.describe(with_shardings, axes)
    rows = {line.split()[0]: line for line in lines}
    assert len(lines) == len(rows) == len(jax.tree.leaves(shapes)) + 2  # a heading and the sum

    fsdp, model = shape[1:]
    parts = {"embed": fsdp, "vocab": model, "heads": model, "mlp": model}
    names = by_name(axes, is_leaf=is_axes)
    sizes = {
        n: s.size * s.dtype.itemsize // int(np.prod([parts.get(a, 1) for a in names[n]]))
        for n, s in by_name(shapes).items()
    }
    for array, num_bytes in sizes.items():
        assert rows[array].endswith(f" {num_bytes:,}"), array
    assert rows["all"].endswith(f" {sum(sizes.values()):,}")
    embedding = rows["params/token_embedder/embedding"].split()
    num_bytes = 64 * 16 * 4 // fsdp // model
    assert embedding[1:] == ["64x16", "vocab", "embed", "model", "fsdp", f"{num_bytes:,}"]
    assert rows["step"].split()[1] == "scalar"


@pytest.mark.parametrize(
    ("field", "size", "axis", "over", "would", "next_size"),
    [
        ("vocab_size", 63, "vocab", "model 2", "1", 64),
        ("num_heads", 3, "heads", "model 2", "1", 4),
        ("d_ff", 33, "mlp", "model 2", "1", 34),
        ("d_model", 18, "embed", "fsdp 4", "1 or 2 or 3", 20),
    ],
)
def test_axis_that_does_not_divide_is_named(field, size, axis, over, would, next_size):
    config = T5Config(**CONFIG.to_dict() | {field: size})
    with pytest.raises(UsageError) as e:
        TWO_D.check_divisible(*abstract_state(optimizers.OptimizerConfig(), config))
    assert f"{axis!r} of size {size} does not divide over {over} of MESH: " in str(e.value)
    assert f"let that be {would}, or another divisor of {size}, or let T5Config.{field} " in str(
        e.value
    )
    assert str(e.value).endswith(f" make it {next_size}")


def test_layers_that_do_not_divide_are_refused():
    """Only where a rule splits them."""
    state = abstract_state(optimizers.OptimizerConfig())
    TWO_D.check_divisible(*state)
    rules = dict(TWO_D.rules) | {"layers": "data"}
    by_layers = Partitioning(TWO_D.mesh, tuple(rules.items()))
    with pytest.raises(UsageError, match="axis 'layers' of size 3 does not divide over data 2"):
        by_layers.check_divisible(*state)
