"""Hugging Face checkpoints, compared with another reader's tensors and transformers' logits."""

import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import references
import safetensors.numpy

from t5x_lite.errors import UsageError
from t5x_lite.interop.hf_read import open_hf
from t5x_lite.interop.stored import read_safetensors
from t5x_lite.models import t5

FIXTURES = ["t5_v10", "t5_v11", "t5_v11_sharded", "mt5", "umt5"]


@pytest.fixture
def fixtures(shared_data) -> pathlib.Path:
    return shared_data / "checkpoints" / "hf"


def flatten(tree: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def values_of(name: str, fixtures: pathlib.Path) -> dict:
    return json.loads((fixtures / name / "config.json").read_text())


def load(directory: pathlib.Path) -> dict[str, np.ndarray]:
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def save(directory: pathlib.Path, values: dict, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def assert_same(source, expected: dict[str, np.ndarray]) -> None:
    assert source.params.keys() == expected.keys()
    for path, value in expected.items():
        tensor = source.params[path]
        assert tensor.shape == value.shape, path
        whole = tensor.read(0, len(value))
        assert whole.dtype == np.float32
        np.testing.assert_array_equal(whole, value, err_msg=path)
        start, stop = len(value) // 3, len(value) // 3 + 1
        np.testing.assert_array_equal(tensor.read(start, stop), value[start:stop], err_msg=path)


# Reading.


@pytest.mark.parametrize("name", FIXTURES)
def test_parameters_are_those_of_another_reader(fixtures, name):
    config, params = references.load_hf(fixtures / name)
    source = open_hf(fixtures / name)
    assert_same(source, flatten(params))
    unlike = {"dropout_rate", "scale_decoder_output"}  # the reference does not read these
    ours, theirs = source.model.to_dict(), config.to_dict()
    assert {k: ours[k] for k in ours if k not in unlike} == {
        k: theirs[k] for k in theirs if k not in unlike
    }
    assert source.model.dropout_rate == 0.1
    assert source.origin["format"] == "hf" and source.origin["dtype"] == "float32"
    assert (source.step, source.optimizer) == (0, None)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_comes_exactly(fixtures, tmp_path, dtype):
    tensors = {k: v.astype(dtype) for k, v in load(fixtures / "t5_v11").items()}
    directory = save(tmp_path / "half", values_of("t5_v11", fixtures), tensors)
    source = open_hf(directory)
    assert source.origin["dtype"] == np.dtype(dtype).name
    _, params = references.load_hf(fixtures / "t5_v11")
    expected = {k: v.astype(dtype).astype(np.float32) for k, v in flatten(params).items()}
    assert_same(source, expected)


def test_every_bfloat16_and_float16_comes_exactly(tmp_path):
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        tensor = bits.view(dtype)
        safetensors.numpy.save_file({"x": tensor}, tmp_path / "x.safetensors")
        (stored,) = read_safetensors(_epath(tmp_path / "x.safetensors")).values()
        got = np.concatenate([block for _, block in stored.blocks(0, 256)])
        np.testing.assert_array_equal(got, tensor.astype(np.float32))  # NaN equals NaN here


def test_dtypes_may_differ_between_tensors(fixtures, tmp_path):
    tensors = load(fixtures / "t5_v10")
    tensors["shared.weight"] = tensors["shared.weight"].astype(np.float16)
    source = open_hf(save(tmp_path / "mixed", values_of("t5_v10", fixtures), tensors))
    assert source.origin["dtype"] == "mixed"


def test_tensors_larger_than_a_block(tmp_path):
    x = np.random.default_rng(0).normal(size=(3000, 900)).astype(np.float32)  # 10.8 MB
    safetensors.numpy.save_file({"x": x, "y": x + (x == x[2500, 3])}, tmp_path / "x.safetensors")
    stored = read_safetensors(_epath(tmp_path / "x.safetensors"))
    blocks = list(stored["x"].blocks(100, 2900))
    assert len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), x[100:2900])
    assert [first for first, _ in blocks] == list(
        100 + np.cumsum([0] + [len(block) for _, block in blocks[:-1]])
    )
    assert stored["x"].is_equal(dataclasses.replace(stored["x"], strides=(900, 1)))
    assert not stored["x"].is_equal(stored["y"])


def test_copies_of_the_embedding_and_the_unused_table_are_left_out(fixtures, tmp_path):
    tensors = load(fixtures / "t5_v10")
    expected = flatten(references.load_hf(fixtures / "t5_v10")[1])
    embedding = tensors["shared.weight"]
    copies = {name: embedding.copy() for name in ("encoder.embed_tokens.weight", "lm_head.weight")}
    copies["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros(
        (32, 4), np.float32
    )
    source = open_hf(save(tmp_path / "a", values_of("t5_v10", fixtures), tensors | copies))
    assert source.model.tie_embeddings and source.model.scales_decoder_output
    assert_same(source, expected)
    # The embedding under another name alone.
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    assert_same(open_hf(save(tmp_path / "b", values_of("t5_v10", fixtures), tensors)), expected)


def test_an_output_matrix_of_its_own_is_used_whatever_the_configuration_says(fixtures, tmp_path):
    tensors = load(fixtures / "t5_v10")
    tensors["lm_head.weight"] = tensors["shared.weight"] + np.float32(1)
    source = open_hf(save(tmp_path / "a", values_of("t5_v10", fixtures), tensors))
    assert not source.model.tie_embeddings
    head = source.params["decoder/logits_dense/kernel"]
    np.testing.assert_array_equal(head.read(0, head.shape[0]), tensors["lm_head.weight"].T)


# Logits: which configuration means which network.


@pytest.mark.parametrize(
    ("name", "config_file", "golden"),
    [
        ("t5_v10", "config.json", "golden.npz"),
        ("t5_v11", "config.json", "golden.npz"),
        ("t5_v11_sharded", "config_released_style.json", "golden.npz"),
        ("mt5", "config.json", "golden.npz"),
        ("mt5", "config_released_style.json", "golden.npz"),
        ("umt5", "config.json", "golden.npz"),
        ("umt5", "config_released_style.json", "golden_unscaled.npz"),
    ],
)
def test_logits_equal_transformers(fixtures, tmp_path, name, config_file, golden):
    directory = tmp_path / name
    shutil.copytree(fixtures / name, directory, copy_function=shutil.copyfile)
    directory.chmod(0o755)
    (directory / "config.json").unlink()
    shutil.copyfile(fixtures / name / config_file, directory / "config.json")
    source = open_hf(directory)
    flat = {path: tensor.read(0, tensor.shape[0]) for path, tensor in source.params.items()}
    expected = np.load(fixtures / name / golden)
    tokens = np.load(fixtures / name / "golden.npz")
    batch = {
        "encoder_input_tokens": tokens["input_ids"],
        "decoder_input_tokens": tokens["decoder_input_ids"],
    }
    logits = jax.jit(t5.apply, static_argnums=0)(source.model, references.nest(flat), batch)
    facts = json.loads((fixtures / name / "golden.json").read_text())
    tolerance = 3 * facts["float32_vs_float64_logits_max_abs"]
    if golden == "golden_unscaled.npz":
        tolerance *= source.model.d_model**0.5  # the figure is that of logits so much smaller
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=tolerance)


# Errors.


def _epath(path: pathlib.Path):
    from etils import epath

    return epath.Path(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bart"}, r"unknown architecture 'bart'.*known: t5, mt5, umt5"),
        ({"model_type": None}, "unknown architecture None"),
        ({"architectures": ["T5EncoderModel"]}, "'T5EncoderModel' .an encoder without a decoder"),
        ({"architectures": ["T5ForTokenClassification"]}, "'T5ForTokenClassification'"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder = false"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "'gelu'.*error function"),
        ({"dense_act_fn": "mish"}, "unknown activation 'mish'"),
        ({"dense_act_fn": "rellu"}, "unknown activation 'rellu'; did you mean 'relu'"),
        ({"feed_forward_proj": "glu-relu"}, "feed_forward_proj = 'glu-relu'"),
        ({"feed_forward_proj": 3}, "feed_forward_proj = 3"),
        ({"decoder_start_token_id": 2}, "decoder_start_token_id = 2: must be 0"),
        ({"pad_token_id": 1}, "pad_token_id = 1: must be 0"),
        ({"d_model": "40"}, "d_model = '40': must be an integer"),
        ({"num_layers": 0}, "num_layers = 0: must be an integer of at least 1"),
        ({"dropout_rate": "no"}, "dropout_rate = 'no': must be a number"),
        ({"dropout_rate": 2}, "config.json: .*dropout_rate"),
        ({"relative_attention_num_buckets": 30}, "config.json: .*multiple of 4"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = false.*'lm_head.weight'"),
        ({"num_layers": 1}, r"unexpected tensor 'encoder.block.1.*num_layers = 1"),
        ({"eos_token_id": 2}, "eos_token_id = 2: must be 1"),
        ({"num_layers": 10**18}, r"those of 2 layers of the encoder.*num_layers = 1000"),
        ({"num_decoder_layers": 4}, r"those of 3 layers of the decoder.*num_decoder_layers = 4"),
        ({"is_gated_act": True}, r"unexpected tensor '.*wi.weight'.*did you mean.*wi_"),
        ({"vocab_size": 250}, r"'shared.weight' has shape \[256, 40\]; by .* \[250, 40\] .vocab_s"),
        ({"num_heads": 5}, r"q.weight' has shape \[48, 40\].*\[60, 40\] .num_heads \* d_kv = 60"),
        ({"d_ff": 95}, r"wi.weight' has shape \[96, 40\].*d_ff = 95"),
    ],
)
def test_a_configuration_that_is_not_the_models(fixtures, tmp_path, change, message):
    values = values_of("t5_v10", fixtures) | change
    with pytest.raises(UsageError, match=message) as error:
        open_hf(save(tmp_path / "model", values, load(fixtures / "t5_v10")))
    assert "\n" not in str(error.value)


def _rename(tensors):
    tensors["encoder.block.0.layer.0.SelfAttention.query.weight"] = tensors.pop(
        "encoder.block.0.layer.0.SelfAttention.q.weight"
    )


def _remove(tensors):
    del tensors["decoder.final_layer_norm.weight"]


def _double(tensors):
    tensors["shared.weight"] = tensors["shared.weight"].astype(np.float64)


def _integer(tensors):
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    tensors[name] = tensors[name].astype(np.int8)


def _other_embedding(tensors):
    tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"] * np.float32(2)


def _short_embedding(tensors):
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"][:250].copy()


def _scalars(tensors):
    tensors["encoder.embed_tokens.weight"] = np.zeros((), np.float32)
    tensors["shared.weight"] = np.zeros((), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, r"unexpected tensor '.*SelfAttention.query.weight'.*did you mean '.*q.weight'"),
        (_remove, "'decoder.final_layer_norm.weight' is missing"),
        (_double, "'shared.weight' has dtype F64, which float32 cannot represent.*bfloat16"),
        (_integer, "wo.weight' has dtype I8"),
        (_other_embedding, "'decoder.embed_tokens.weight'.*'shared.weight'.*differ"),
        (_short_embedding, r"'encoder.embed_tokens.weight' \[250, 40\] and .* \[256, 40\] differ"),
        (_scalars, "'shared.weight'"),
    ],
)
def test_tensors_that_are_not_the_models(fixtures, tmp_path, change, message):
    tensors = load(fixtures / "t5_v10")
    change(tensors)
    with pytest.raises(UsageError, match=message):
        open_hf(save(tmp_path / "model", values_of("t5_v10", fixtures), tensors))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("name", "path", "row"),
    [
        ("shared.weight", "token_embedder/embedding", 200),
        ("lm_head.weight", "decoder/logits_dense/kernel", 3),
        ("decoder.block.1.layer.2.DenseReluDense.wo.weight", "decoder/layers/mlp/wo/kernel", 1),
    ],
)
def test_values_that_are_not_finite(fixtures, tmp_path, name, path, row, dtype, value):
    tensors = {k: v.astype(dtype) for k, v in load(fixtures / "t5_v11").items()}
    place = (200, 2) if name == "shared.weight" else (7, 3)
    tensors[name][place] = value
    source = open_hf(save(tmp_path / "model", values_of("t5_v11", fixtures), tensors))
    for other, tensor in source.params.items():
        if other != path:
            tensor.read(0, tensor.shape[0])
    with pytest.raises(UsageError, match=f"model.safetensors: .*'{name}' holds a value that is no"):
        source.params[path].read(row, row + 1)
    # Other rows are what they are.
    assert np.isfinite(source.params[path].read(0, 1)).all()


def test_large_finite_values_are_read(fixtures, tmp_path):
    """Their sum is infinite in float32."""
    tensors = load(fixtures / "t5_v11")
    tensors["shared.weight"][:] = np.finfo(np.float32).max
    source = open_hf(save(tmp_path / "model", values_of("t5_v11", fixtures), tensors))
    found = source.params["token_embedder/embedding"].read(0, 256)
    np.testing.assert_array_equal(found, tensors["shared.weight"])


def test_a_place_without_a_model(fixtures, tmp_path):
    with pytest.raises(UsageError, match=r"no directory 'google/flan-t5-small'.*hf download"):
        open_hf("google/flan-t5-small")
    with pytest.raises(UsageError, match=r"no config.json"):
        open_hf(tmp_path)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no config.json.*did you mean '.*snapshots/abc'"):
        open_hf(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{'model_type': 't5'}")
    with pytest.raises(UsageError, match=r"config.json is no valid JSON"):
        open_hf(tmp_path)
    config.write_text("[1]")
    with pytest.raises(UsageError, match="must be a JSON object, not a list"):
        open_hf(tmp_path)
    shutil.copyfile(fixtures / "t5_v10" / "config.json", config)
    with pytest.raises(UsageError, match=r"no weights.*model.safetensors.*pytorch_model.bin"):
        open_hf(tmp_path)


@pytest.fixture
def sharded(fixtures, tmp_path) -> pathlib.Path:
    directory = tmp_path / "sharded"
    shutil.copytree(fixtures / "t5_v11_sharded", directory, copy_function=shutil.copyfile)
    directory.chmod(0o755)
    return directory


def test_a_missing_shard(sharded):
    (sharded / "model-00003-of-00005.safetensors").unlink()
    with pytest.raises(UsageError, match=r"shard 'model-00003-of-00005.safetensors'.*is missing"):
        open_hf(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight": "model-00001-of-00005.safetensors"}, "says that 'a.weight' is in .*is not"),
        ({"shared.weight": None}, "'shared.weight' is in None, which is no file name"),
        ({"shared.weight": "../model.safetensors"}, "which is no file name"),
        (
            {"shared.weight": "model-00005-of-00005.safetensors"},
            "'shared.weight'",
        ),
    ],
)
def test_an_index_that_is_wrong(sharded, change, message):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= change
    path.write_text(json.dumps(index))
    with pytest.raises(UsageError, match=message):
        open_hf(sharded)


def test_a_shard_with_more_than_the_index_names(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["encoder.final_layer_norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"tensor 'encoder.final_layer_norm.weight'.*is nowhere"):
        open_hf(sharded)
    del index["weight_map"]["lm_head.weight"]  # all that its shard has
    path.write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"names no tensor of 'model-00005-of-00005.safetensors'"):
        open_hf(sharded)
    path.write_text("{}")
    with pytest.raises(UsageError, match="no 'weight_map'"):
        open_hf(sharded)


def _header(entries: dict, data: bytes = b"") -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


def _entry(first: int, last: int, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short: 0 bytes"),
        (b"\x10\x00", "cut short: 2 bytes"),
        ((1000).to_bytes(8, "little") + b"{}", "cut short: 10 bytes.*1000"),
        ((2**63).to_bytes(8, "little") + b"{}", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        ((3).to_bytes(8, "little") + b'{"\xff', "no JSON object"),
        (_header({"x": _entry(0, 8)}, bytes(7)), "is cut short: .* bytes"),
        (_header({"x": _entry(0, 8)}, bytes(9)), "goes on after its last tensor"),
        (_header({"x": _entry(0, 12)}, bytes(12)), r"'x', F32 \[2\], takes 8 bytes.* gives it 12"),
        (_header({"x": _entry(0, 8), "y": _entry(4, 12)}, bytes(12)), "'y' begins at byte 4"),
        (_header({"x": _entry(0, 8), "y": _entry(12, 20)}, bytes(20)), "'y' begins at byte 12"),
        (_header({"x": _entry(0, 8, (-2,))}, bytes(8)), "entry of 'x'"),
        (_header({"x": _entry(0, 8, (2.0,))}, bytes(8)), "entry of 'x'"),
        (_header({"x": {"dtype": "F32"}}), "entry of 'x'"),
        (_header({"x": 3}), "entry of 'x'"),
    ],
)
def test_a_damaged_safetensors_file(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        read_safetensors(_epath(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load_file(path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_download(fixtures, tmp_path, kept):
    directory = save(tmp_path / "m", values_of("t5_v10", fixtures), load(fixtures / "t5_v10"))
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(UsageError, match="cut short"):
        open_hf(directory)
