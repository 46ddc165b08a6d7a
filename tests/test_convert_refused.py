"""What `convert` refuses: one line that a person can act on, and nothing left behind."""

import json
import os
import pathlib
import shutil
import struct
import types

import numpy as np
import pytest
import safetensors.numpy

from t5x_lite.__main__ import main
from t5x_lite.interop import new_directory, step_io


def refused(capfd, *argv: str, code: int = 2) -> str:
    """The one line that the command says."""
    assert main(["convert", *argv]) == code
    captured = capfd.readouterr()
    assert captured.err.startswith("t5x_lite: ") and captured.err.count("\n") == 1, captured.err
    assert not captured.out
    return captured.err


@pytest.fixture
def hf(tmp_path, shared_data) -> pathlib.Path:
    """A copy of a sharded fixture, to be damaged."""
    return shutil.copytree(shared_data / "checkpoints/hf/t5_v11_sharded", tmp_path / "hf")


def edit_json(path: pathlib.Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_shard(path: pathlib.Path, change) -> None:
    """Applies `change` to the first tensor of a file."""
    tensors = safetensors.numpy.load_file(path)
    name = min(tensors)
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    safetensors.numpy.save_file(tensors, path)


def first_shard(hf: pathlib.Path) -> pathlib.Path:
    return min(hf.glob("*.safetensors"))


def point_elsewhere(hf: pathlib.Path) -> None:
    path = hf / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["decoder.no_such.weight"] = first_shard(hf).name
    path.write_text(json.dumps(index))


def truncate_header(path: pathlib.Path) -> None:
    path.write_bytes(struct.pack("<Q", 10**6) + b'{"shared.weight":')


DAMAGE = {
    "missing shard": (lambda d: first_shard(d).unlink(), "model-00001-of-00005.safetensors"),
    "index names what is not there": (point_elsewhere, "decoder.no_such.weight"),
    "architecture": (
        lambda d: edit_json(d / "config.json", model_type="bart", architectures=["BartModel"]),
        "bart",
    ),
    "activation": (
        lambda d: edit_json(d / "config.json", feed_forward_proj="gated-mish", dense_act_fn="mish"),
        "mish",
    ),
    "dtype": (lambda d: edit_shard(first_shard(d), lambda x: x.astype(np.float64)), "F64"),
    "truncated header": (lambda d: truncate_header(first_shard(d)), first_shard),
    "shape": (lambda d: edit_json(d / "config.json", d_ff=100), "d_ff"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config that is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "vocabulary size": (lambda d: edit_json(d / "config.json", vocab_size=500), "vocab_size"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_hugging_face_checkpoint(hf, tmp_path, capfd, damage):
    change, said = DAMAGE[damage]
    name = said(hf).name if callable(said) else said
    change(hf)
    error = refused(capfd, "--from=hf", str(hf), f"--to={tmp_path / 'm'}", "--vocabulary=bytes")
    assert name in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_source_without_a_tokenizer(hf, tmp_path, capfd):
    error = refused(capfd, "--from=hf", str(hf), f"--to={tmp_path / 'm'}")
    assert "has no tokenizer (spiece.model or tokenizer.json): give --vocabulary=FILE" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_vocabulary_of_another_model(hf, tmp_path, capfd, shared_data):
    """32,000 pieces and 100 sentinels for 384 rows."""
    file = shared_data / "vocabs" / "t5_sentencepiece_32000.model"
    error = refused(capfd, "--from=hf", str(hf), f"--to={tmp_path / 'm'}", f"--vocabulary={file}")
    assert all(number in error.replace(",", "") for number in ("32000", "100", "384"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: shutil.rmtree(d / "target.token_embedder.embedding"), "token_embedder"),
        (lambda d: (d / "checkpoint").write_bytes((d / "checkpoint").read_bytes()[:100]), "check"),
        (lambda d: shutil.rmtree(d), "checkpoint_5"),
    ],
    ids=["missing array", "truncated index", "missing"],
)
def test_a_damaged_t5x_checkpoint(tmp_path, capfd, shared_data, damage, said):
    fixture = shared_data / "checkpoints/t5x/t5x_legacy_unscanned_v11/checkpoint_5"
    source = shutil.copytree(fixture, tmp_path / "checkpoint_5")
    damage(source)
    error = refused(
        capfd, "--from=t5x", str(source), f"--to={tmp_path / 'm'}", "--vocabulary=bytes"
    )
    assert said in error
    assert not (tmp_path / "m").exists()


def test_what_is_there_is_not_touched(hf, tmp_path, capfd):
    place = tmp_path / "m"
    place.mkdir()
    (place / "precious").write_text("x")
    error = refused(capfd, "--from=hf", str(hf), f"--to={place}", "--vocabulary=bytes")
    assert "is there already" in error
    assert [path.name for path in place.iterdir()] == ["precious"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_that_ends_early(hf, tmp_path, capfd, monkeypatch, error):
    """Half of the tensors are written: nothing has the name of a MODEL_DIR, nothing is left."""
    write, calls = step_io.ocp.partial.save, []

    def save(*args, **kwargs):
        write(*args, **kwargs)
        calls.append(args)
        raise error

    monkeypatch.setattr(step_io.ocp.partial, "save", save)
    argv = ["convert", "--from=hf", str(hf), f"--to={tmp_path / 'm'}", "--vocabulary=bytes"]
    assert main(argv) == (1 if isinstance(error, OSError) else 130)
    assert calls
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["x", "--to=m"], "give --from=hf or --from=t5x, what 'x' is"),
        (["--from=pytorch", "x", "--to=m"], "--from=pytorch: give --from=hf or --from=t5x"),
        (["--from=hf", "x"], "--to"),
        (["--from=hf", "x", "y", "--to=m"], "give convert --from=hf PATH --to=MODEL_DIR"),
        (["m", "--to=hf"], "give convert MODEL_DIR --to=hf DIRECTORY"),
        (["--from=t5x", "m", "--to=hf", "out"], "convert to a MODEL_DIR first"),
        (["--from=hf", "x", "--to=m", "--dtype=bfloat16"], "--dtype belongs to --to=hf"),
        (["m", "--to=hf", "out", "--max_shard_size=big"], "give a size like 5GB"),
        (
            ["--from=hf", "google/t5-small", "--to=m"],
            "`hf download google/t5-small --local-dir DIR`",
        ),
        (["--from=hf", "https://huggingface.co/google/byt5-base", "--to=m"], "google/byt5-base"),
        (["--from=hf", "https://example.org/x.zip", "--to=m"], "it is an address"),
        (["nowhere", "--to=hf", "out"], "nowhere"),
        (["--from=hf", "nowhere", "--to=m"], "nowhere"),
    ],
)
def test_arguments_that_are_wrong(tmp_path, capfd, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capfd, *argv)
    assert not os.listdir(tmp_path)


def test_what_is_something_else(hf, tmp_path, capfd, shared_data, monkeypatch):
    """The next command is in the message."""
    monkeypatch.chdir(tmp_path)
    t5x = shared_data / "checkpoints/t5x/t5x_orbax_unscanned_v11"
    assert main(["convert", "--from=hf", str(hf), "--to=m", "--vocabulary=bytes"]) == 0
    capfd.readouterr()
    shutil.copytree(hf, tmp_path / "adapter", ignore=lambda *_: ["config.json"])
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "flax").mkdir()
    shutil.copy(hf / "config.json", tmp_path / "flax")
    (tmp_path / "flax" / "flax_model.msgpack").write_bytes(b"x")
    for argv, said in (
        (["--from=hf", str(t5x)], "checkpoint of T5X: `python -m t5x_lite convert --from=t5x"),
        (["--from=t5x", str(hf)], "of Hugging Face: `python -m t5x_lite convert --from=hf"),
        (["--from=t5x", str(t5x.parent)], f"did you mean '{t5x.parent}/t5x_"),
        (["--from=t5x", "m"], "it is a MODEL_DIR already"),
        (["--from=hf", str(hf / "config.json")], f"a file: give the directory it is in, '{hf}'"),
        (["--from=hf", "hff"], "did you mean 'hf'"),
        (["--from=hf", "adapter"], "adapter_config.json is an adapter"),
        (["--from=hf", "flax"], "flax_model.msgpack is transformers' Flax format"),
    ):
        assert said in refused(capfd, *argv, "--to=other", "--vocabulary=bytes")
    assert "is T5X's, which keeps no vocabulary" in refused(
        capfd, "--from=t5x", str(t5x), "--to=other"
    )
    for argv, said in (
        ([str(hf)], "of Hugging Face: `python -m t5x_lite convert --from=hf"),
        (["m/checkpoints/0"], "give 'm', and 0 as the checkpoint"),
        (["m", "--checkpoint=all"], "give one: latest, best or a step"),
    ):
        assert said in refused(capfd, *argv[:1], "--to=hf", "other", *argv[1:])
    assert not (tmp_path / "other").exists()


def test_a_damaged_checkpoint_is_not_given_out(hf, tmp_path, capfd):
    model_dir = tmp_path / "m"
    argv = ["convert", "--from=hf", str(hf), f"--to={model_dir}", "--vocabulary=bytes"]
    assert main(argv) == 0
    capfd.readouterr()
    params = model_dir / "checkpoints" / "0" / "params"
    path = max((p for p in params.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    out = str(tmp_path / "out")
    error = refused(capfd, str(model_dir), "--to=hf", out, "--checkpoint=0", code=1)
    assert "is damaged" in error and path.name in error
    assert not os.path.exists(out)


def test_an_object_store_gets_its_model_last(hf, tmp_path, monkeypatch):
    """Without `model.json` a directory is no run, so a copy that was cut off is none."""
    copied = []
    for room in (new_directory, step_io):
        monkeypatch.setattr(room, "is_local", lambda path: "bucket" not in str(path))
    path_class = type(new_directory.epath.Path("x"))
    copy = path_class.copy

    def noted(self, target, *args, **kwargs):
        copied.append(pathlib.Path(target).name)
        return copy(self, target, *args, **kwargs)

    monkeypatch.setattr(path_class, "copy", noted)
    place = tmp_path / "bucket" / "m"
    argv = ["convert", "--from=hf", str(hf), f"--to={place}", "--vocabulary=bytes"]
    assert main(argv) == 0
    assert copied[-1] == "model.json" and len(copied) == len(
        [path for path in place.rglob("*") if path.is_file()]
    )


@pytest.mark.parametrize("name", ["p%41", "p#1", "p?x=1", "it's a model"])
def test_a_path_is_not_a_url(hf, tmp_path, capfd, name):
    """ "p%41" beside "pA": the parameters of the one that was asked for."""
    other = shutil.copytree(hf, tmp_path / "other")
    for path in other.glob("*.safetensors"):
        tensors = {k: x + 1 for k, x in safetensors.numpy.load_file(path).items()}
        safetensors.numpy.save_file(tensors, path)
    for source, place in ((other, "pA"), (hf, name)):
        argv = ["--from=hf", str(source), f"--to={tmp_path / place}", "--vocabulary=bytes"]
        assert main(["convert", *argv]) == 0
    assert main(["convert", str(tmp_path / name), "--to=hf", str(tmp_path / "out")]) == 0
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for path in hf.glob("*.safetensors"):
        for key, expected in safetensors.numpy.load_file(path).items():
            assert np.array_equal(found[key], expected)


def test_where_nothing_can_be_put(hf, tmp_path, capfd, monkeypatch):
    argv = ["--from=hf", str(hf), "--vocabulary=bytes"]
    (tmp_path / "file").write_text("x")
    assert "is not a directory" in refused(capfd, *argv, f"--to={tmp_path / 'file' / 'm'}")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "leads back to itself" in refused(capfd, *argv, f"--to={tmp_path / 'loop'}")
    (tmp_path / "loop").unlink()
    monkeypatch.setattr(new_directory.os.path, "ismount", lambda path: path.name == "volume")
    assert "a disk is mounted" in refused(capfd, *argv, f"--to={tmp_path / 'volume'}")
    few = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(new_directory.shutil, "disk_usage", lambda path: few)
    assert "only 0.00 GB are free" in refused(capfd, *argv, f"--to={tmp_path / 'm'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf"]


def test_places_that_are_there_and_empty(hf, tmp_path, monkeypatch):
    """A symbolic link to one, and the current directory."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (str(tmp_path / "link"), "."):
        assert main(["convert", "--from=hf", str(hf), f"--to={place}", "--vocabulary=bytes"]) == 0
    assert (tmp_path / "real" / "model.json").is_file() and (tmp_path / "link").is_symlink()
    assert (tmp_path / "here" / "model.json").is_file()
