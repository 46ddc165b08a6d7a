"""T5X checkpoints that are refused, each in one line, and optimizers that have no counterpart."""

import re
import shutil

import flax.serialization
import numpy as np
import orbax.checkpoint as ocp
import pytest
from t5x_checkpoints import STATISTICS, read_all, whole, write_legacy

from t5x_lite.errors import UsageError
from t5x_lite.interop.t5x_read import open_t5x


@pytest.fixture
def fixtures(shared_data):
    return shared_data / "checkpoints" / "t5x"


# ---- optimizers that do not map ------------------------------------------------------------------


def change_momentum(arrays):
    name = f"{STATISTICS}/decoder/layers_0/mlp/wi_0/kernel/m"
    arrays[name] = np.ones((40, 88), np.float32)


def change_to_adam(arrays):
    for name in [n for n in arrays if n.startswith(STATISTICS)]:
        del arrays[name]
    arrays[f"{STATISTICS}/0/mu/token_embedder/embedding"] = np.ones((384, 40), np.float32)


def change_rule(arrays):
    name = f"{STATISTICS}/decoder/layers_0/mlp/wi_0/kernel"
    arrays[f"{name}/v"] = np.zeros(1, np.float32)
    arrays[f"{name}/v_row"] = np.ones(40, np.float32)
    arrays[f"{name}/v_col"] = np.ones(96, np.float32)


def change_to_half(arrays):
    name = f"{STATISTICS}/token_embedder/embedding/v"
    arrays[name] = arrays[name].astype(np.float16)


def drop_optimizer(arrays):
    for name in [n for n in arrays if n.startswith("state/")]:
        del arrays[name]


@pytest.mark.parametrize(
    ("change", "step", "reason"),
    [
        (change_momentum, 5, r"wi_0/kernel/m has the shape \[40, 88\]: momentum"),
        (change_to_adam, 5, "has 0/mu/token_embedder/embedding: not T5X's Adafactor"),
        (change_rule, 5, r"has the shape \[40\]: factored by another rule"),
        (change_to_half, 5, "token_embedder/embedding/v is float16"),
        (drop_optimizer, 0, "the checkpoint has no state/param_states"),
    ],
)
def test_optimizer_without_a_counterpart(fixtures, tmp_path, change, step, reason):
    """The parameters are converted all the same, and the origin says what was left."""
    arrays = read_all(fixtures / "t5x_legacy_unscanned_v10" / "checkpoint_5")
    if change in (change_momentum, change_rule):  # these name a gated layer
        arrays = {name.replace("/wi/", "/wi_0/"): x for name, x in arrays.items()}
        for name in [n for n in arrays if "/wi_0/" in n]:
            arrays[name.replace("/wi_0/", "/wi_1/")] = arrays[name]
    change(arrays)
    source = open_t5x(write_legacy(tmp_path / "checkpoint_5", arrays))
    assert source.optimizer is None
    assert re.search(reason, source.origin["optimizer"])
    assert source.step == step
    assert whole(source.params["token_embedder/embedding"]).shape == (384, 40)


# ---- bad input -----------------------------------------------------------------------------------


def refused(path, message):
    """`open_t5x` says in one line what is wrong and where."""
    with pytest.raises(UsageError, match=message) as caught:
        open_t5x(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "no such directory")
    refused(tmp_path, "no T5X checkpoint here; looked for a file 'checkpoint' .* '_METADATA'")


def test_checkpoints_that_are_all_incomplete(tmp_path):
    (tmp_path / "checkpoint_5").mkdir()
    (tmp_path / "checkpoint_10" / "state").mkdir(parents=True)
    with pytest.raises(UsageError) as caught:
        open_t5x(tmp_path)
    step = tmp_path / "checkpoint_10"
    assert str(caught.value) == (
        f"{step} is incomplete, and so is any other checkpoint in {tmp_path}"
    )
    with pytest.raises(UsageError, match="no T5X checkpoint here; looked for") as caught:
        open_t5x(step)
    assert "--from=t5x" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 100, 10_000])
def test_truncated_index(fixtures, tmp_path, size):
    data = (fixtures / "t5x_legacy_unscanned_v11" / "checkpoint_5" / "checkpoint").read_bytes()
    (tmp_path / "checkpoint").write_bytes(data[:size])
    refused(tmp_path, "truncated or not the msgpack index")


def test_index_of_another_program(tmp_path):
    """TensorFlow has a text file of this name, and flax its own msgpack."""
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-10"\n')
    refused(tmp_path, "not the msgpack index")
    (tmp_path / "checkpoint").write_bytes(flax.serialization.to_bytes({"params": {"w": 1}}))
    refused(tmp_path, "no 'optimizer' with a 'target'")


def test_truncated_metadata(fixtures, tmp_path):
    directory = tmp_path / "checkpoint_5"
    shutil.copytree(fixtures / "t5x_orbax_unscanned_v11" / "checkpoint_5", directory)
    metadata = directory / "state" / "_METADATA"
    metadata.write_text(metadata.read_text()[:1000])
    refused(directory, "truncated or not Orbax's metadata")


def test_orbax_checkpoint_of_another_program(tmp_path):
    handler = ocp.PyTreeCheckpointHandler()
    ocp.Checkpointer(handler).save(tmp_path / "state", {"params": {"w": np.ones(3)}})
    refused(tmp_path, "not the state of a T5X checkpoint: it has no 'target'")


def test_missing_array(fixtures, tmp_path):
    directory = tmp_path / "checkpoint_5"
    shutil.copytree(fixtures / "t5x_legacy_scanned_v11" / "checkpoint_5", directory)
    shutil.rmtree(directory / "target.encoder.encoder.mlp.wo.kernel")
    refused(directory, r"checkpoint names target.encoder.encoder.mlp.wo.kernel, but .* is not")


def test_damaged_database(fixtures, tmp_path):
    directory = tmp_path / "checkpoint_5"
    shutil.copytree(fixtures / "t5x_orbax_unscanned_v11" / "checkpoint_5", directory)
    (directory / "state" / "manifest.ocdbt").write_bytes(b"no manifest")
    refused(directory, "is missing or damaged")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_piece_of_a_parameter(fixtures, tmp_path, damage):
    """A missing piece would be zeros to zarr."""
    directory = tmp_path / "checkpoint_5"
    shutil.copytree(fixtures / "t5x_legacy_scanned_v11" / "checkpoint_5", directory)
    piece = directory / "target.encoder.encoder.mlp.wo.kernel" / "0.0.0"
    if damage == "missing":
        piece.unlink()
    else:
        piece.write_bytes(piece.read_bytes()[:100])
    tensor = open_t5x(directory).params["encoder/layers/mlp/wo/kernel"]
    message = "target.encoder.encoder.mlp.wo.kernel is missing or damaged"
    with pytest.raises(UsageError, match=message) as caught:
        tensor.read(0, 1)
    assert "\n" not in str(caught.value)


def rename_to_decoder_only(arrays):
    for name in [n for n in arrays if n.startswith(("target/encoder", "state/"))]:
        del arrays[name]


def add_adapter(arrays):
    arrays["target/encoder/layers_0/adapter/kernel"] = np.ones((40, 8), np.float32)


def drop_norm(arrays):
    del arrays["target/decoder/layers_1/pre_mlp_layer_norm/scale"]


def narrow_kernel(arrays):
    arrays["target/decoder/layers_1/mlp/wo/kernel"] = np.ones((96, 39), np.float32)


def odd_heads(arrays):
    for stack in ("encoder", "decoder"):
        arrays[f"target/{stack}/relpos_bias/rel_embedding"] = np.ones((5, 32), np.float32)


def half_precision(arrays):
    name = "target/token_embedder/embedding"
    arrays[name] = arrays[name].astype(np.float16)


def odd_step(arrays):
    arrays["state/step"] = np.float32(np.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            rename_to_decoder_only,
            r"not a T5 .*: there is no encoder/layers_0/pre_mlp_layer_norm/scale; .* [0-9]+ more$",
        ),
        (add_adapter, "not a T5 that is known here: it has encoder/layers_0/adapter/kernel$"),
        (drop_norm, "the checkpoint has no decoder/layers_1/pre_mlp_layer_norm/scale$"),
        (
            narrow_kernel,
            r"decoder/layers_1/mlp/wo/kernel has the shape \[96, 39\], .* it is \[96, 40\]$",
        ),
        (odd_heads, r"query/kernel \[40, 42\] does not divide among the 5 heads"),
        (half_precision, "token_embedder/embedding is float16; only float32 and bfloat16"),
        (odd_step, "state/step is .*nan.*; it must be an integer"),
    ],
)
def test_tensors_of_no_t5(fixtures, tmp_path, change, message):
    arrays = read_all(fixtures / "t5x_legacy_unscanned_v10" / "checkpoint_5")
    change(arrays)
    refused(write_legacy(tmp_path / "checkpoint_5", arrays), message)


def test_shapes_of_scanned_layers_that_disagree(fixtures, tmp_path):
    arrays = read_all(fixtures / "t5x_legacy_scanned_v11" / "checkpoint_5")
    name = "target/encoder/encoder/attention/out/kernel"
    arrays[name] = np.swapaxes(arrays[name], 0, 1).copy()  # layers first
    message = r"attention/out/kernel has the shape \[2, 4, 12, 40\], .* it is \[4, 2, 12, 40\]$"
    refused(write_legacy(tmp_path / "checkpoint_5", arrays), message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("T5Config.num_heads = 6", r"config.gin says T5Config.num_heads = 6, .* it is 4$"),
        ("T5Config.logits_via_embedding = True", r"logits_via_embedding = True, .* it is False$"),
        ("T5Config.mlp_activations = ('geglu', 'linear')", "'geglu' is unknown; .*'gelu'"),
        ("T5Config.mlp_activations = ('relu',)", r"\('relu',\), but the tensors are those of 2$"),
        ("T5Config.mlp_activations = 3", "mlp_activations = 3: must be a tuple of names"),
        ("T5Config.mlp_activations = 'relu'", "mlp_activations = 'relu': must be a tuple of names"),
        ("T5Config.mlp_activations = (1, [2])", "1 is unknown; known: 'gelu'"),
        (
            "T5Config.mlp_activations = @pair()",
            r"config.gin: T5Config.mlp_activations = @pair\(\) c",
        ),
        ("T5Config.mlp_activations = %gin.REQUIRED", "= %gin.REQUIRED cannot be read"),
        ("T5Config.mlp_activations = %A\nA = %B\nB = %A", "= %A.* cannot be read"),
        ("T5Config.mlp_activations = %A\nA = @f", "= %A, that is @f, cannot be read"),
        ("T5Config.num_heads = %NUM_HEADS", "T5Config.num_heads = %NUM_HEADS cannot be read"),
        ("T5Config.emb_dim = 6 * 6", r"T5Config.emb_dim = 6\*6 cannot be read"),
        ("T5Config:\n  num_heads = 6", "T5Config.num_heads = 6, .* it is 4$"),
        ("T5Config.dropout_rate = 'much'", "dropout_rate = 'much': must be a number"),
        ("T5Config.dropout_rate = 1.0", "dropout_rate"),
        ("T5Config.emb_dim = (", "config.gin: no gin file: .*"),
        ("x = 1\ninclude 'base.gin'", "config.gin: it includes 'base.gin', which is not read"),
        (
            "T5Config.num_heads = 4\nencoder/network.T5Config.num_heads = 5",
            "has several values, each for its scope .'', 'encoder'.",
        ),
    ],
)
def test_operative_configuration_that_disagrees(fixtures, tmp_path, line, message):
    source_dir = fixtures / "t5x_orbax_unscanned_v11" / "checkpoint_5"
    shutil.copytree(source_dir, tmp_path / "checkpoint_5")
    (tmp_path / "config.gin").write_text(f"network.{line}\n")
    refused(tmp_path, message)


def test_operative_configuration_that_is_no_text(fixtures, tmp_path):
    source_dir = fixtures / "t5x_orbax_unscanned_v11" / "checkpoint_5"
    shutil.copytree(source_dir, tmp_path / "checkpoint_5")
    (tmp_path / "config.gin").write_bytes("# naïve\n".encode("latin-1"))
    refused(tmp_path, "config.gin is no text in UTF-8: byte 4")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["t5x_legacy_unscanned_v11", "t5x_legacy_scanned_v11"])
def test_values_that_are_not_finite(fixtures, tmp_path, name, value):
    """Of arrays in the index (the norm), in files, and of either layout of layers."""
    arrays = read_all(fixtures / name / "checkpoint_5")
    scanned = "_scanned" in name
    layers = "decoder" if scanned else "layers_0"
    places = {
        f"decoder/{layers}/mlp/wo/kernel": "decoder/layers/mlp/wo/kernel",
        "encoder/encoder_norm/scale": "encoder/encoder_norm/scale",
    }
    for theirs, ours in places.items():
        changed = arrays[f"target/{theirs}"].copy()
        changed.flat[0] = value
        directory = tmp_path / ours.replace("/", ".") / "checkpoint_5"
        write_legacy(directory, arrays | {f"target/{theirs}": changed})
        source = open_t5x(directory)
        with pytest.raises(UsageError, match=f"'target/{theirs}' holds a value that") as caught:
            source.params[ours].read(0, 1)
        assert str(directory) in str(caught.value)
        source.params["token_embedder/embedding"].read(0, 1)


def test_layers_that_are_numbered_without_end(fixtures, tmp_path):
    arrays = read_all(fixtures / "t5x_legacy_unscanned_v10" / "checkpoint_5")
    for name in [n for n in arrays if "/decoder/layers_2/" in n]:
        arrays[name.replace("layers_2", "layers_999999999")] = arrays.pop(name)
    message = "it has decoder/layers_999999999/"
    refused(write_legacy(tmp_path / "checkpoint_5", arrays), message)
