"""Hugging Face checkpoints as we write them, beside those that transformers has written."""

import dataclasses
import errno
import itertools
import json
import pathlib
import re
import shutil
import struct
import weakref

import jax
import numpy as np
import pytest
import references
import safetensors
import safetensors.numpy

from t5x_lite.errors import Failure, UsageError
from t5x_lite.interop import hf, hf_write
from t5x_lite.interop.hf_write import write_hf
from t5x_lite.interop.model_card import ModelCard
from t5x_lite.interop.tensors import Tensor
from t5x_lite.models.config import T5Config

CLASS_OF = {"t5_v10": "t5", "t5_v11": "t5", "mt5": "mt5", "umt5": "umt5", "t5_v11_sharded": "t5"}
CARD = ModelCard("small", step=5, num_parameters=1)
# What the sharded fixture was saved with.
SHARD_BYTES = 200_000


@pytest.fixture
def fixtures(shared_data):
    return shared_data / "checkpoints" / "hf"


def load(directory: pathlib.Path) -> tuple[T5Config, dict[str, np.ndarray]]:
    """A fixture as the tests' own reader sees it: configuration, and arrays by path."""
    config, params = references.load_hf(directory)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    flat = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
    # Transformers 5 scales here, whatever the file says; what its tensors mean is scaled.
    scale = True if directory.name == "umt5" else None
    return dataclasses.replace(config, dropout_rate=0.1, scale_decoder_output=scale), flat


def as_tensors(arrays):
    return {path: Tensor(x.shape, lambda a, b, x=x: x[a:b]) for path, x in arrays.items()}


def export(directory, config, arrays, **changes):
    options = {
        "model_class": "umt5" if config.relative_bias_per_layer else "t5",
        "dtype": "float32",
        "max_shard_bytes": 5 * 10**9,
        "tokenizer_files": {},
        "card": CARD,
    } | changes
    write_hf(directory, config, as_tensors(arrays), **options)
    return directory


def read_raw(path: pathlib.Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of each tensor of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    assert header.pop("__metadata__") == {"format": "pt"}
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def assert_same_tensors(directory: pathlib.Path, fixture: pathlib.Path) -> None:
    """Each file of tensors, and the index, is byte for byte what transformers has written."""
    names = {path.name for path in fixture.glob("model*")}
    assert {path.name for path in directory.glob("model*")} == names
    for name in names:
        assert (directory / name).read_bytes() == (fixture / name).read_bytes(), name


@pytest.mark.parametrize("name", CLASS_OF)
def test_files_are_those_of_transformers(fixtures, tmp_path, name):
    config, arrays = load(fixtures / name)
    shard_bytes = SHARD_BYTES if name == "t5_v11_sharded" else 5 * 10**9
    out = export(
        tmp_path / "out",
        config,
        arrays,
        model_class=CLASS_OF[name],
        max_shard_bytes=shard_bytes,
        tokenizer_files={"spiece.model": b"pieces"},
    )
    assert_same_tensors(out, fixtures / name)
    assert (out / "spiece.model").read_bytes() == b"pieces"
    ours = json.loads((out / "config.json").read_text())
    theirs = json.loads((fixtures / name / "config.json").read_text())
    # Transformers 5 writes `true` for whatever it has; published files tell the truth.
    del theirs["transformers_version"], theirs["tie_word_embeddings"]
    theirs.pop("bos_token_id", None)
    assert {key: ours[key] for key in theirs} == theirs
    generation = json.loads((out / "generation_config.json").read_text())
    theirs = json.loads((fixtures / name / "generation_config.json").read_text())
    assert generation.items() <= theirs.items()


@pytest.mark.parametrize("limit", [1, 5_000, 30_000, None])
def test_parts_of_tensors_make_the_same_files(fixtures, tmp_path, monkeypatch, limit):
    """Tensors are read in ascending rows, one by one, as many rows at a time as may be: each read
    of a run's own checkpoint decodes all of the stacked tensor."""
    name = "t5_v11_sharded"
    config, arrays = load(fixtures / name)
    if limit is not None:
        monkeypatch.setattr(hf_write, "_READ_BYTES", limit)
    monkeypatch.setattr(hf_write, "_WRITE_BYTES", 700)
    reads: list[tuple[str, int, int]] = []
    given: list[weakref.ref] = []

    def watched(path, x):
        def read(start, stop):
            assert not any(array() is not None for array in given), "read, and not let go of"
            rows = x[start:stop].copy()
            reads.append((path, start, stop))
            given.append(weakref.ref(rows))
            return rows

        return Tensor(x.shape, read)

    write_hf(
        tmp_path / "out",
        config,
        {path: watched(path, x) for path, x in arrays.items()},
        model_class="t5",
        dtype="float32",
        max_shard_bytes=SHARD_BYTES,
        tokenizer_files={},
        card=CARD,
    )
    assert_same_tensors(tmp_path / "out", fixtures / name)
    order = list(dict.fromkeys(path for path, _, _ in reads))
    expected = []
    for path in order:
        rows = len(arrays[path])
        most = rows // 2 if "/layers/" in path else rows
        step = most if limit is None else max(1, min(most, limit // arrays[path][0].nbytes))
        expected += [(path, a, min(a + step, rows)) for a in range(0, rows, step)]
    assert reads == expected and set(order) == set(arrays)


def test_shards_hold_what_fits(fixtures, tmp_path):
    """A tensor larger than the limit is alone; no two neighbours would have fitted in one file."""
    config, arrays = load(fixtures / "t5_v11")
    limit = 30_000  # less than the embedding and the output matrix
    out = export(tmp_path / "out", config, arrays, max_shard_bytes=limit)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    sizes = []
    for number, file in enumerate(files, start=1):
        assert file == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safetensors.safe_open(out / file, "np") as f:
            names = list(f.keys())
            assert all(index["weight_map"][name] == file for name in names)
            sizes.append(sum(f.get_tensor(name).nbytes for name in names))
        assert sizes[-1] <= limit or names in (["shared.weight"], ["lm_head.weight"])
    small = [size for size in sizes if size <= limit]
    assert all(a + b > limit for a, b in itertools.pairwise(small))
    assert index["metadata"]["total_size"] == sum(sizes) == sum(x.nbytes for x in arrays.values())
    assert index["metadata"]["total_parameters"] == sum(x.size for x in arrays.values())


def test_bfloat16_is_rounded_to_nearest_even(fixtures, tmp_path):
    config, arrays = load(fixtures / "t5_v11")
    arrays["encoder/encoder_norm/scale"][:4] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.0]
    out = export(tmp_path / "out", config, arrays, dtype="bfloat16")
    whole = read_raw(export(tmp_path / "f32", config, arrays) / "model.safetensors")
    rounded = read_raw(out / "model.safetensors")
    assert rounded.keys() == whole.keys()
    for name, (_, shape, data) in whole.items():
        bits = np.frombuffer(data, np.uint32).astype(np.uint64)
        expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        assert rounded[name] == ("BF16", shape, expected.tobytes()), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_float16_is_rounded_to_nearest_even(fixtures, tmp_path):
    config, arrays = load(fixtures / "umt5")
    out = export(tmp_path / "out", config, arrays, dtype="float16")
    whole = read_raw(export(tmp_path / "f32", config, arrays) / "model.safetensors")
    for name, (dtype, shape, data) in read_raw(out / "model.safetensors").items():
        values = np.frombuffer(whole[name][2], np.float32)
        assert (dtype, shape) == ("F16", whole[name][1])
        assert data == struct.pack(f"<{len(values)}e", *values), name


@pytest.mark.parametrize(("dtype", "value"), [("float16", -70_000.0), ("bfloat16", 3.4e38)])
def test_a_value_beyond_the_dtype_is_refused(fixtures, tmp_path, dtype, value):
    config, arrays = load(fixtures / "t5_v11")
    arrays["decoder/layers/mlp/wo/kernel"][1, 2, 3] = value
    name = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    message = re.escape(f"--dtype={dtype}: {name} holds {value:g}, beyond")
    with pytest.raises(UsageError, match=message):
        export(tmp_path / "out", config, arrays, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_infinity_stays_infinity(fixtures, tmp_path):
    config, arrays = load(fixtures / "t5_v10")
    arrays["decoder/decoder_norm/scale"][0] = np.inf
    out = export(tmp_path / "out", config, arrays, dtype="float16")
    data = safetensors.numpy.load_file(out / "model.safetensors")
    assert data["decoder.final_layer_norm.weight"][0] == np.inf


@pytest.mark.parametrize(
    ("name", "scaled", "model_class", "factor"),
    [("umt5", False, "umt5", 6.0), ("mt5", True, "mt5", 1 / 6), ("mt5", True, "t5", 1.0)],
)
def test_output_matrix_makes_up_for_the_class(
    fixtures, tmp_path, name, scaled, model_class, factor
):
    """d_model is 36: transformers' UMT5 divides by 6 what T5X's network does not."""
    config, arrays = load(fixtures / name)
    config = dataclasses.replace(config, scale_decoder_output=scaled)
    out = export(tmp_path / "out", config, arrays, model_class=model_class)
    found = safetensors.numpy.load_file(out / "model.safetensors")
    original = safetensors.numpy.load_file(fixtures / name / "model.safetensors")
    expected = (original.pop("lm_head.weight").astype(np.float64) * factor).astype(np.float32)
    np.testing.assert_array_equal(found.pop("lm_head.weight"), expected)
    for key, value in original.items():
        np.testing.assert_array_equal(found[key], value)
    readme = (out / "README.md").read_text()
    assert ("d_model^-0.5" in readme) == (factor != 1)
    assert ("It needs transformers 5." in readme) == (model_class == "umt5")


def test_what_a_class_cannot_express_is_refused(fixtures, tmp_path):
    config, arrays = load(fixtures / "umt5")
    with pytest.raises(UsageError, match="'umt5' has a bias table in every layer"):
        export(tmp_path / "out", config, arrays, model_class="t5")
    tied = dataclasses.replace(config, tie_embeddings=True, scale_decoder_output=False)
    del arrays["decoder/logits_dense/kernel"]
    with pytest.raises(UsageError, match="UMT5ForConditionalGeneration always scales"):
        export(tmp_path / "out", tied, arrays)
    config, arrays = load(fixtures / "t5_v10")
    with pytest.raises(UsageError, match="MT5ForConditionalGeneration never scales"):
        export(tmp_path / "out", config, arrays, model_class="mt5")
    with pytest.raises(UsageError, match=r"'float8'.*'float16'"):
        export(tmp_path / "out", config, arrays, dtype="float8")
    with pytest.raises(UsageError, match=r"'t6'.*'t5'"):
        export(tmp_path / "out", config, arrays, model_class="t6")
    del arrays["decoder/decoder_norm/scale"]
    with pytest.raises(ValueError, match="parameters are not those"):
        export(tmp_path / "out", config, arrays)
    assert not list(tmp_path.iterdir())


def test_directory_that_is_there(fixtures, tmp_path):
    config, arrays = load(fixtures / "t5_v10")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(UsageError, match=f"{name}' is there already"):
            export(tmp_path / name, config, arrays)
    with pytest.raises(UsageError, match="not on a local disk"):
        export("gs://bucket/out", config, arrays)
    export(tmp_path / "empty", config, arrays)
    export(tmp_path / "new" / "deep", config, arrays)
    assert (tmp_path / "empty" / "config.json").exists()
    assert (tmp_path / "new" / "deep" / "README.md").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"full", "file", "empty", "new"}
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes"]


def test_directory_that_is_a_link(fixtures, tmp_path):
    config, arrays = load(fixtures / "t5_v10")
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "new"):  # the second points to nothing yet
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        export(tmp_path / name, config, arrays)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "disk" / name / "config.json").exists()
    assert {p.name for p in (tmp_path / "disk").iterdir()} == {"empty", "new"}
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((UsageError, Failure), match="loop"):
        export(tmp_path / "loop", config, arrays)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Failure),
        (UsageError("damaged"), UsageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failure_leaves_nothing(fixtures, tmp_path, error, expected):
    config, arrays = load(fixtures / "t5_v11_sharded")
    tensors = as_tensors(arrays)

    def fail(start, stop):
        raise error

    path = "token_embedder/embedding"
    tensors[path] = dataclasses.replace(tensors[path], read=fail)
    with pytest.raises(expected) as caught:
        write_hf(
            tmp_path / "new" / "out",
            config,
            tensors,
            model_class="t5",
            dtype="float32",
            max_shard_bytes=SHARD_BYTES,
            tokenizer_files={},
            card=CARD,
        )
    assert "\n" not in str(caught.value)
    if expected is Failure:
        assert "out' was not written: " in str(caught.value)
        assert "No space left" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_seen_at_once(fixtures, tmp_path, monkeypatch):
    config, arrays = load(fixtures / "t5_v10")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(UsageError, match=r"only 0\.00 GB are free"):
        export(tmp_path / "out", config, arrays)
    assert not list(tmp_path.iterdir())


# With transformers itself, where it is installed.


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def forward(model, golden):
    import torch

    names = ("input_ids", "attention_mask", "decoder_input_ids")
    with torch.no_grad():
        inputs = {name: torch.tensor(golden[name]) for name in names}
        logits = model(**inputs).logits.numpy()
        del inputs["decoder_input_ids"]
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=False)
    return logits, ids.numpy()


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 60_000])
@pytest.mark.parametrize("name", CLASS_OF)
def test_transformers_gives_the_golden_logits(transformers, fixtures, tmp_path, name, shard_bytes):
    config, arrays = load(fixtures / name)
    options = {"model_class": CLASS_OF[name], "max_shard_bytes": shard_bytes}
    out = export(tmp_path / "out", config, arrays, **options)
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == hf.MODEL_CLASSES[CLASS_OF[name]]
    assert not any(info.values()), info
    golden = np.load(fixtures / name / "golden.npz")
    logits, ids = forward(model.eval(), golden)
    bound = json.loads((fixtures / name / "golden.json").read_text())
    assert np.abs(logits - golden["logits"]).max() < 3 * logits_bound(bound)
    np.testing.assert_array_equal(ids, golden["greedy_ids"])


def logits_bound(golden: dict) -> float:
    return golden["float32_vs_float64_logits_max_abs"]


def test_transformers_gives_unscaled_logits_for_umt5(transformers, fixtures, tmp_path):
    config, arrays = load(fixtures / "umt5")
    config = dataclasses.replace(config, scale_decoder_output=False)
    out = export(tmp_path / "out", config, arrays)
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    golden = dict(np.load(fixtures / "umt5" / "golden.npz"))
    golden |= np.load(fixtures / "umt5" / "golden_unscaled.npz")
    logits, ids = forward(model.eval(), golden)
    # Unscaled logits are 6 = sqrt(d_model) times as large, and so is their rounding.
    bound = 6 * logits_bound(json.loads((fixtures / "umt5" / "golden.json").read_text()))
    assert np.abs(logits - golden["logits"]).max() < 3 * bound
    np.testing.assert_array_equal(ids, golden["greedy_ids"])
