"""T5X checkpoints: every tensor where it belongs, whatever the layout; what tensors do not say."""

import json
import re
import shutil

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import references
from t5x_checkpoints import (
    STATISTICS,
    by_name,
    ours_of,
    read_all,
    statistics_of,
    whole,
    write_legacy,
    write_zarr,
)

from t5x_lite.interop.t5x_read import open_t5x
from t5x_lite.interop.tensors import Tensor
from t5x_lite.models import t5
from t5x_lite.optimizers import OptimizerConfig, make_optimizer

FIXTURES = (
    "t5x_legacy_unscanned_v10",
    "t5x_legacy_unscanned_v11",
    "t5x_orbax_unscanned_v11",
    "t5x_legacy_scanned_v11",
    "t5x_orbax_scanned_v11",
)


@pytest.fixture
def fixtures(shared_data):
    return shared_data / "checkpoints" / "t5x"


# ---- every tensor --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXTURES)
def test_configuration_and_parameters_equal_those_of_an_independent_reader(fixtures, name):
    source = open_t5x(fixtures / name / "checkpoint_5")
    config, params = references.load_t5x(fixtures / name)
    assert source.model == config
    params = by_name(params)
    assert source.params.keys() == params.keys()
    for path, expected in params.items():
        np.testing.assert_array_equal(whole(source.params[path]), expected, path)
    assert source.step == 5
    assert json.loads(json.dumps(source.origin)) == {
        "format": "t5x",
        "layout": "orbax" if "orbax" in name else "legacy",
        "scanned": "_scanned" in name,
        "path": str(fixtures / name / "checkpoint_5"),
        "step": 5,
        "dtype": "float32",
        "optimizer": "adafactor",
    }


@pytest.mark.parametrize("name", FIXTURES)
def test_every_tensor_of_the_state_equals_its_entry_in_the_tree(fixtures, name):
    """Number of values, sum and absolute sum, as T5X's own process had them."""
    source = open_t5x(fixtures / name / "checkpoint_5")
    tree = json.loads((fixtures / name / "tree.json").read_text())
    statistics = statistics_of(source)
    assert tree.pop("state/step")["sum"] == whole(statistics.pop("count")) == source.step == 5
    num_used = 0

    def check(key, entry, array):
        values = np.asarray(array, np.float64)
        assert values.size == np.prod(entry["shape"]), key
        if "_scanned" not in name:
            assert values.shape == tuple(entry["shape"]), key
        # The figures have 17 digits; the order of the additions is not theirs.
        tolerance = 1e-12 * entry["abs_sum"]
        assert abs(values.sum() - entry["sum"]) <= tolerance, key
        assert abs(np.abs(values).sum() - entry["abs_sum"]) <= tolerance, key

    for key, entry in tree.items():
        if key.startswith("target/"):
            path, layer = ours_of(key.removeprefix("target/"))
            array = whole(source.params[path])
            check(key, entry, array if layer is None else array[layer])
            continue
        parameter, slot = key.removeprefix(f"{STATISTICS}/").rsplit("/", 1)
        path, layer = ours_of(parameter)
        if entry["shape"] == [1]:  # T5X's slot that is not in use
            assert entry["abs_sum"] == 0
            if slot != "m":
                assert whole(statistics[f"{slot}/{path}"]) == 0
                assert statistics[f"{slot}/{path}"].shape == ()
            continue
        num_used += 1
        # Our factors go by place: no two sides of a matrix here are of one length.
        slots = ("v",) if slot == "v" else ("v_row", "v_col")
        arrays = [whole(statistics[f"{field}/{path}"]) for field in slots]
        if layer is not None:
            arrays = [array[layer] for array in arrays]
        (array,) = (array for array in arrays if array.size == np.prod(entry["shape"]))
        check(key, entry, array)
    assert num_used > 20


@pytest.mark.parametrize("name", FIXTURES)
def test_optimizer_state_is_that_of_its_configuration(fixtures, name):
    source = open_t5x(fixtures / name / "checkpoint_5")
    rule = "t5x_scanned" if "_scanned" in name else "both_sides"
    assert source.optimizer.config == OptimizerConfig(factoring=rule)
    optimizer = make_optimizer(source.optimizer.config, t5.logical_axes(source.model))
    params = jax.eval_shape(lambda: t5.init(source.model, jax.random.key(0)))
    abstract = jax.eval_shape(optimizer.init, params)
    is_tensor = lambda x: isinstance(x, Tensor)
    found = jax.tree.map(lambda t: (t.shape, t.dtype), source.optimizer.state, is_leaf=is_tensor)
    assert found == jax.tree.map(lambda s: (s.shape, s.dtype), abstract)


def test_factors_of_scanned_layers_are_of_the_sides_they_are_named_for(fixtures):
    """T5X's v_row is of d_model; layers and heads where T5X has them, by hand."""
    directory = fixtures / "t5x_legacy_scanned_v11" / "checkpoint_5"
    stored, statistics = read_all(directory), statistics_of(open_t5x(directory))

    def theirs(path):
        stack, _, rest = path.partition("/layers/")
        return [
            stored[f"{STATISTICS}/{stack}/{stack}/{rest}/{slot}"] for slot in ("v_row", "v_col")
        ]

    def ours(path):
        return [whole(statistics[f"{slot}/{path}"]) for slot in ("v_row", "v_col")]

    path = "decoder/layers/self_attention/query/kernel"  # [embed, layers, heads, kv]
    embed_by_layers, layers_by_heads_by_kv = theirs(path)
    row, column = ours(path)
    np.testing.assert_array_equal(row, embed_by_layers.T)
    np.testing.assert_array_equal(column, [np.concatenate(x) for x in layers_by_heads_by_kv])

    path = "decoder/layers/self_attention/out/kernel"  # [heads, layers, kv, embed]
    layers_by_embed, heads_by_layers_by_kv = theirs(path)
    row, column = ours(path)
    for layer in range(3):
        np.testing.assert_array_equal(row[layer], np.concatenate(heads_by_layers_by_kv[:, layer]))
    np.testing.assert_array_equal(column, layers_by_embed)

    path = "decoder/layers/mlp/wi_1/kernel"  # [embed, layers, mlp]
    embed_by_layers, layers_by_mlp = theirs(path)
    row, column = ours(path)
    np.testing.assert_array_equal(row, embed_by_layers.T)
    np.testing.assert_array_equal(column, layers_by_mlp)

    path = "decoder/layers/mlp/wo/kernel"  # [mlp, layers, embed]
    layers_by_embed, mlp_by_layers = theirs(path)
    row, column = ours(path)
    np.testing.assert_array_equal(row, mlp_by_layers.T)
    np.testing.assert_array_equal(column, layers_by_embed)

    path = "decoder/layers/relpos_bias/rel_embedding"  # [heads, layers, buckets], not factored
    v = stored[f"{STATISTICS}/decoder/decoder/relpos_bias/rel_embedding/v"]
    np.testing.assert_array_equal(whole(statistics[f"v/{path}"]), np.swapaxes(v, 0, 1))


def test_of_equal_sides_the_first_is_the_row(fixtures, tmp_path):
    """As T5X's `argsort` of a square shape has it; here d_ff = d_model = 128."""
    arrays = read_all(fixtures / "t5x_legacy_unscanned_v11" / "checkpoint_5")
    rng = np.random.default_rng(0)
    for name in [n for n in arrays if "/mlp/" in n and arrays[n].shape != (1,)]:
        shape = tuple(min(n, 128) for n in arrays[name].shape)
        arrays[name] = rng.random(shape, dtype=np.float32)
    statistics = statistics_of(open_t5x(write_legacy(tmp_path / "checkpoint_5", arrays)))
    for kernel in ("wi_0", "wo"):
        for slot in ("v_row", "v_col"):
            expected = arrays[f"{STATISTICS}/decoder/layers_1/mlp/{kernel}/kernel/{slot}"]
            found = whole(statistics[f"{slot}/decoder/layers/mlp/{kernel}/kernel"])[1]
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["t5x_legacy_unscanned_v11", "t5x_orbax_scanned_v11"])
def test_rows_are_those_of_the_whole(fixtures, name):
    source = open_t5x(fixtures / name / "checkpoint_5")
    for path, tensor in {**source.params, **statistics_of(source)}.items():
        if not tensor.shape:
            continue
        array, middle = whole(tensor), tensor.shape[0] // 2
        for start, stop in ((0, middle), (middle, tensor.shape[0]), (middle, middle + 1)):
            part = tensor.read(start, stop)
            np.testing.assert_array_equal(part, array[start:stop], path)
            assert part.shape == (stop - start, *tensor.shape[1:])


def test_rows_cross_the_pieces_of_storage(fixtures, tmp_path):
    """A scanned kernel in zarr pieces that divide every axis, the last ones not full."""
    directory = tmp_path / "checkpoint_5"
    shutil.copytree(fixtures / "t5x_legacy_scanned_v11" / "checkpoint_5", directory)
    place = directory / "target.decoder.decoder.mlp.wi_0.kernel"  # [40, 3, 88]
    kernel = references.read_zarr(place)
    write_zarr(place, kernel, chunks=(16, 2, 50))
    tensor = open_t5x(directory).params["decoder/layers/mlp/wi_0/kernel"]
    np.testing.assert_array_equal(whole(tensor), np.swapaxes(kernel, 0, 1))
    np.testing.assert_array_equal(tensor.read(1, 3), np.swapaxes(kernel, 0, 1)[1:])


def test_reading_rows_touches_nothing_else(fixtures, tmp_path):
    directory = tmp_path / "checkpoint_5"
    shutil.copytree(fixtures / "t5x_legacy_unscanned_v11" / "checkpoint_5", directory)
    tensor = open_t5x(directory).params["decoder/layers/mlp/wo/kernel"]
    expected = tensor.read(1, 2)
    for place in directory.iterdir():
        if place.name != "target.decoder.layers_1.mlp.wo.kernel":
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    np.testing.assert_array_equal(tensor.read(1, 2), expected)


# ---- layouts -------------------------------------------------------------------------------------


def test_newest_step_by_number(fixtures, tmp_path):
    step_dir = fixtures / "t5x_legacy_unscanned_v10" / "checkpoint_5"
    shutil.copytree(step_dir, tmp_path / "checkpoint_5")
    write_legacy(tmp_path / "checkpoint_10", read_all(step_dir) | {"state/step": np.int32(10)})
    (tmp_path / "checkpoint_20.tmp-123").mkdir()
    (tmp_path / "checkpoint_30").mkdir()  # incomplete
    (tmp_path / "checkpoint_40" / "state").mkdir(parents=True)
    source = open_t5x(tmp_path)
    assert source.step == 10
    assert source.origin["path"] == str(tmp_path / "checkpoint_10")


def test_state_without_the_directory_around_it(fixtures):
    source = open_t5x(fixtures / "t5x_orbax_scanned_v11" / "checkpoint_5" / "state")
    _, params = references.load_t5x(fixtures / "t5x_orbax_scanned_v11")
    expected = params["token_embedder"]["embedding"]
    np.testing.assert_array_equal(whole(source.params["token_embedder/embedding"]), expected)


@pytest.mark.parametrize(
    "layout", [{"use_ocdbt": False}, {"use_ocdbt": False, "use_zarr3": True}, {"use_zarr3": True}]
)
def test_other_layouts_of_orbax(fixtures, tmp_path, layout):
    """Without a database and with zarr 3, by Orbax; a step in float32, a place with nothing."""
    arrays = read_all(fixtures / "t5x_legacy_unscanned_v11" / "checkpoint_5")
    tree = flax.traverse_util.unflatten_dict(arrays, sep="/")
    tree["state"]["step"] = np.float32(1234)
    tree["flax_mutables"] = {}
    handler = ocp.PyTreeCheckpointHandler(**layout)
    ocp.Checkpointer(handler).save(tmp_path / "checkpoint_1234" / "state", tree)
    source = open_t5x(tmp_path)
    assert (source.step, source.origin["layout"]) == (1234, "orbax")
    expected = arrays["target/decoder/layers_1/mlp/wo/kernel"]
    found = source.params["decoder/layers/mlp/wo/kernel"].read(1, 2)[0]
    np.testing.assert_array_equal(found, expected)
    assert whole(statistics_of(source)["count"]) == 1234


def test_kernels_with_heads_apart_and_layers_apart(fixtures, tmp_path):
    """The scanned network with scanning switched off: 3-D kernels, a bias table a layer."""
    arrays = {"state/step": np.int32(7)}
    for name, array in read_all(fixtures / "t5x_legacy_scanned_v11" / "checkpoint_5").items():
        if match := re.fullmatch(r"target/(\w+)/\1/(.*)", name):
            for layer in range(array.shape[1]):
                arrays[f"target/{match[1]}/layers_{layer}/{match[2]}"] = array[:, layer].copy()
        elif name.startswith("target/"):
            arrays[name] = array
    source = open_t5x(write_legacy(tmp_path / "checkpoint_7", arrays))
    config, params = references.load_t5x(fixtures / "t5x_legacy_scanned_v11")
    assert source.model == config
    for path, expected in by_name(params).items():
        np.testing.assert_array_equal(whole(source.params[path]), expected, path)


def test_bfloat16_parameters_are_read_exactly(fixtures, tmp_path):
    directory = tmp_path / "checkpoint_5"
    shutil.copytree(fixtures / "t5x_legacy_unscanned_v10" / "checkpoint_5", directory)
    expected = {}
    for place in directory.glob("target.*"):
        low = references.read_zarr(place).astype(ml_dtypes.bfloat16)
        write_zarr(place, low)
        expected[place.name.removeprefix("target.").replace(".", "/")] = low
    source = open_t5x(directory)
    assert source.origin["dtype"] == "bfloat16"
    for name, low in expected.items():
        path, layer = ours_of(name)
        array = whole(source.params[path])
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array if layer is None else array[layer], low)


# ---- what tensors do not say ---------------------------------------------------------------------

GIN = """
# Parameters for network.T5Config:
# ==============================================================================
network.T5Config.dropout_rate = %DROPOUT_RATE
network.T5Config.emb_dim = 40
network.T5Config.dtype = 'bfloat16'
network.T5Config.logits_via_embedding = False
network.T5Config.mlp_activations = \\
    ('swish', 'linear')
network.T5Config.num_heads = 4
network.T5Config.vocab_size = @vocab_size()

# Macros:
DROPOUT_RATE = %FINETUNING_DROPOUT
FINETUNING_DROPOUT = 0.1
"""


@pytest.mark.parametrize("place", ["checkpoint_5/config.gin", "config.gin"])
def test_operative_configuration_tells_activation_and_dropout(fixtures, tmp_path, place):
    source_dir = fixtures / "t5x_orbax_unscanned_v11" / "checkpoint_5"
    shutil.copytree(source_dir, tmp_path / "checkpoint_5")
    (tmp_path / place).write_text(GIN)
    model = open_t5x(tmp_path).model
    assert model.mlp_activations == ("silu", "linear")
    assert model.dropout_rate == 0.1
    assert model.d_model == 40


WAYS_OF_WRITING = {
    "comment": """
ACT = ('silu', 'linear')
network.T5Config.mlp_activations = %ACT  # gated
""",
    "lines": """
network.T5Config.mlp_activations = (
    'silu',  # gated
  'linear',
)
""",
    "block": """
network.T5Config:  # as in T5X's own files
  emb_dim = 40

  # gated
  mlp_activations = ('swish', 'linear')
X = 3
""",
    "scope": "t5_1_1/x.network.T5Config.mlp_activations = ['silu', 'linear']",
    "macros": """
include 'base.gin'
from x import y
T5Config.mlp_activations = %a/ACT
a/ACT = %B
B = (%C, 'linear')
C = 'silu'
ACT = 3
""",
    "last of two": """
network.T5Config.mlp_activations = ('relu', 'linear')
network.T5Config.mlp_activations = \\
    ('silu', 'linear')
""",
    "left open": """\ufeff
T5Config.mlp_activations = ('silu', 'linear')
T5Config.dropout_rate = %gin.REQUIRED
""",
    "scopes that agree": """
x/T5Config.mlp_activations = ('silu', 'linear')
y/network.T5Config:
  mlp_activations = ('silu', 'linear')
  dtype = @jnp.float32
""",
    "other classes": """
OtherT5Config.mlp_activations = 3
T5Config.x.mlp_activations = 3
T5Config.mlp_activations = ('silu', 'linear')
""",
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("way", WAYS_OF_WRITING)
def test_ways_of_writing_gin(fixtures, tmp_path, way, newline):
    source_dir = fixtures / "t5x_orbax_unscanned_v11" / "checkpoint_5"
    shutil.copytree(source_dir, tmp_path / "checkpoint_5")
    text = WAYS_OF_WRITING[way].replace("\n", newline)
    (tmp_path / "config.gin").write_bytes(text.encode())
    assert open_t5x(tmp_path).model.mlp_activations == ("silu", "linear")
