"""`convert` as a user types it, against what Hugging Face and T5X computed on their own files."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import references
import safetensors.numpy
from small_run import SMALL

from t5x_lite import saved_run
from t5x_lite.__main__ import main
from t5x_lite.decoding import DecodeConfig
from t5x_lite.models import t5
from t5x_lite.partitioning import make_partitioning
from t5x_lite.predict import Predictor
from tasks import vocabularies

HF = ["t5_v10", "t5_v11", "t5_v11_sharded", "mt5", "umt5"]
T5X = [
    "t5x_legacy_unscanned_v10",
    "t5x_legacy_unscanned_v11",
    "t5x_legacy_scanned_v11",
    "t5x_orbax_unscanned_v11",
    "t5x_orbax_scanned_v11",
]
APPLY = jax.jit(t5.apply, static_argnums=0)
MESH = make_partitioning({"data": 1}, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> pathlib.Path:
    """A SentencePiece model that, with its 100 sentinels, fits the rows of every fixture."""
    words = [f"{a}{b}" for a in "abcdefghijklmnop" for b in "aeiou"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 12)) for _ in range(400)]
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    path.write_bytes(vocabularies.train_sentencepiece(texts, vocab_size=190))
    return path


@pytest.fixture(scope="module")
def convert(tmp_path_factory, shared_data, vocabulary):
    """name of a fixture -> MODEL_DIR that the command has made of it, made once."""

    @functools.cache
    def converted(name: str, style: str = "config.json") -> pathlib.Path:
        folder = tmp_path_factory.mktemp(name)
        source = shared_data / "checkpoints" / ("hf" if name in HF else "t5x") / name
        if style != "config.json":
            source = shutil.copytree(source, folder / "source")
            shutil.copy(source / style, source / "config.json")
        argv = [f"--from={'hf' if name in HF else 't5x'}", str(source)]
        assert main(["convert", *argv, f"--to={folder / 'm'}", f"--vocabulary={vocabulary}"]) == 0
        return folder / "m"

    return converted


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """MODEL_DIR -> the directory for transformers that the command has made of it."""

    @functools.cache
    def exported(model_dir: pathlib.Path, *flags: str) -> pathlib.Path:
        out = tmp_path_factory.mktemp("out") / "hf"
        assert main(["convert", str(model_dir), "--to=hf", str(out), *flags]) == 0
        return out

    return exported


def load(model_dir: pathlib.Path):
    """The run and its parameters, as `eval` and `infer` read them."""
    run = saved_run.read(model_dir)
    (step,) = saved_run.checkpoint_steps(run, "latest")
    return run, saved_run.load_params(run, step, MESH)


def hf_batch(golden) -> dict[str, np.ndarray]:
    return {
        "encoder_input_tokens": golden["input_ids"],
        "decoder_input_tokens": golden["decoder_input_ids"],
    }


def t5x_batch(golden) -> dict[str, np.ndarray]:
    return {name: golden[name] for name in golden if "tokens" in name}


def hf_facts(shared_data, name: str) -> dict:
    return json.loads((shared_data / "checkpoints/hf" / name / "golden.json").read_text())


# ---- in ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "style", "golden"),
    [
        *((name, "config.json", "golden.npz") for name in HF),
        *(
            (name, "config_released_style.json", "golden.npz")
            for name in HF
            if name not in ("t5_v10", "umt5")
        ),
        # Published UMT5 files say that nothing is tied; T5X, which trained them, does not scale.
        ("umt5", "config_released_style.json", "golden_unscaled.npz"),
    ],
)
def test_logits_of_hugging_face(convert, shared_data, name, style, golden):
    run, params = load(convert(name, style))
    golden = np.load(shared_data / "checkpoints/hf" / name / golden)
    tolerance = 3 * hf_facts(shared_data, name)["float32_vs_float64_logits_max_abs"]
    if "input_ids" not in golden:  # the unscaled ones are of the same inputs
        inputs = np.load(shared_data / "checkpoints/hf" / name / "golden.npz")
        tolerance *= run.model.d_model**0.5
    else:
        inputs = golden
    logits = APPLY(run.model, params, hf_batch(inputs))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", T5X)
def test_logits_of_t5x(convert, shared_data, name):
    run, params = load(convert(name))
    golden = np.load(shared_data / "checkpoints/t5x" / name / "golden.npz")
    logits = APPLY(run.model, params, t5x_batch(golden))
    valid = golden["valid"]  # at padded positions T5X attends to everything
    assert valid.any() and not valid.all()
    np.testing.assert_allclose(logits[valid], golden["logits"][valid], rtol=0, atol=1e-5)


def test_padded_decoder_positions_are_not_t5xs(convert, shared_data):
    """T5X masks by the targets, and there attends evenly to everything; ours are causal."""
    run, params = load(convert("t5x_legacy_unscanned_v11"))
    golden = np.load(shared_data / "checkpoints/t5x/t5x_legacy_unscanned_v11/golden.npz")
    batch, valid = t5x_batch(golden), golden["valid"]
    (padded_row,) = np.flatnonzero(~valid.all(axis=1))
    width = valid[padded_row].sum()
    logits = APPLY(run.model, params, batch)[padded_row]
    assert np.abs(logits - golden["logits"][padded_row])[width:].max() > 1e-2
    # Causal: a decoder that ends after any padded position gives the same there.
    for end in range(width + 1, valid.shape[1]):
        cut = batch | {"decoder_input_tokens": batch["decoder_input_tokens"][:, :end]}
        shorter = APPLY(run.model, params, cut)[padded_row]
        np.testing.assert_allclose(shorter[end - 1], logits[end - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", HF)
def test_generation_of_hugging_face(convert, shared_data, name):
    run, params = load(convert(name))
    golden = np.load(shared_data / "checkpoints/hf" / name / "golden.npz")
    pairs = zip(golden["input_ids"], golden["attention_mask"], strict=True)
    rows = [ids[mask > 0] for ids, mask in pairs]
    length = golden["greedy_ids"].shape[1] - 1  # without the start
    predictor = Predictor(run.model, MESH, batch_size=4, input_length=12, target_length=length)
    greedy = predictor.generate(params, rows)
    np.testing.assert_array_equal([p.ids[0] for p in greedy], golden["greedy_ids"][:, 1:])
    for penalty in (1.0, 0.6):
        decode = DecodeConfig(
            method="beam", num_outputs=4, length_penalty=penalty, beam_rules="huggingface"
        )
        ids = np.array([p.ids for p in predictor.generate(params, rows, decode)])
        expected = golden[f"beam_ids_lp{penalty}"][..., 1:]
        # Theirs are filled up with end marks, ours with padding.
        ends = expected == 1
        expected = np.where(np.cumsum(ends, axis=-1) - ends > 0, 0, expected)
        np.testing.assert_array_equal(ids[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("name", T5X)
def test_scores_of_t5x(convert, shared_data, name):
    run, params = load(convert(name))
    directory = shared_data / "checkpoints/t5x" / name
    golden, decoded = np.load(directory / "golden.npz"), np.load(directory / "golden_decode.npz")
    rows = [row[row > 0] for row in golden["encoder_input_tokens"]]
    targets = [row[row > 0] for row in golden["decoder_target_tokens"]]
    predictor = Predictor(run.model, MESH, batch_size=2, input_length=16, target_length=9)
    scores = predictor.score(params, rows, targets)
    np.testing.assert_allclose(scores, decoded["score_batch"], rtol=1e-5)


@pytest.mark.parametrize("name", [*HF, *T5X])
def test_every_parameter_is_there_bit_for_bit(convert, shared_data, name):
    folder = "hf" if name in HF else "t5x"
    read = references.load_hf if name in HF else references.load_t5x
    _, expected = read(shared_data / "checkpoints" / folder / name)
    _, params = load(convert(name))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, expected)))


# ---- out -----------------------------------------------------------------------------------------


def tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in directory.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    return found


@pytest.mark.parametrize("flags", [(), ("--max_shard_size=40KB",)], ids=["one file", "sharded"])
@pytest.mark.parametrize("name", HF)
def test_round_trip_is_bit_identical(convert, export, shared_data, name, flags):
    out = export(convert(name), *flags)
    expected = tensors(shared_data / "checkpoints/hf" / name)
    found = tensors(out)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].tobytes() == value.tobytes() and found[key].shape == value.shape, key
    model_type = json.loads((out / "config.json").read_text())["model_type"]
    assert model_type == {"mt5": "mt5", "umt5": "umt5"}.get(name, "t5")
    assert len(list(out.glob("*.safetensors"))) == 1 or flags


def test_an_unscaled_umt5_goes_out_with_the_factor_in_its_matrix(convert, export, shared_data):
    """transformers 5 takes d_model^-0.5 of every UMT5's output, whatever config.json says."""
    found = tensors(export(convert("umt5", "config_released_style.json")))
    expected = tensors(shared_data / "checkpoints/hf/umt5")
    matrix = expected.pop("lm_head.weight").astype(np.float64) * 36**0.5
    np.testing.assert_array_equal(found.pop("lm_head.weight"), matrix.astype(np.float32))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", T5X)
def test_from_t5x_to_hugging_face_and_back(convert, export, shared_data, tmp_path, name):
    """What was written for transformers, read as a Hugging Face checkpoint: T5X's logits."""
    out = export(convert(name))
    assert main(["convert", "--from=hf", str(out), f"--to={tmp_path / 'm'}"]) == 0
    run, params = load(tmp_path / "m")
    golden = np.load(shared_data / "checkpoints/t5x" / name / "golden.npz")
    logits = APPLY(run.model, params, t5x_batch(golden))
    valid = golden["valid"]
    np.testing.assert_allclose(logits[valid], golden["logits"][valid], rtol=0, atol=1e-5)
    # The scanned network has a bias table in every layer, which is UMT5's form; transformers 5
    # scales its decoder's output, so the factor is in the matrix.
    values = json.loads((out / "config.json").read_text())
    assert (values["model_type"] == "umt5") == ("_scanned" in name)
    assert run.model.scales_decoder_output == ("_scanned" in name or name.endswith("v10"))


@pytest.mark.parametrize("name", [*HF, *T5X])
def test_transformers_gives_the_same_logits(convert, export, shared_data, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    out = export(convert(name))
    loaded, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    folder = shared_data / "checkpoints" / ("hf" if name in HF else "t5x") / name
    golden = np.load(folder / "golden.npz")
    if name in HF:
        inputs, decoder_inputs = golden["input_ids"], golden["decoder_input_ids"]
        valid = np.ones(decoder_inputs.shape, bool)
        atol = 3 * hf_facts(shared_data, name)["float32_vs_float64_logits_max_abs"]
    else:
        inputs, decoder_inputs = golden["encoder_input_tokens"], golden["decoder_input_tokens"]
        valid, atol = golden["valid"], 1e-5
    with torch.no_grad():
        logits = loaded(
            input_ids=torch.tensor(inputs).long(),
            attention_mask=torch.tensor(inputs > 0).long(),
            decoder_input_ids=torch.tensor(decoder_inputs).long(),
        ).logits.numpy()
    np.testing.assert_allclose(logits[valid], golden["logits"][valid], rtol=0, atol=atol)


def test_the_tokenizer_goes_out_with_it(convert, export, vocabulary):
    """And comes back: the same ids for the same text."""
    model_dir = convert("t5_v11_sharded")
    out = export(model_dir)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "README.md", "spiece.model"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert (out / "spiece.model").read_bytes() == vocabulary.read_bytes()


# ---- onwards -------------------------------------------------------------------------------------


def run_bindings(model_dir: pathlib.Path, **more) -> list[str]:
    values = {k: v for k, v in SMALL.items() if not k.startswith("T5Config")} | {
        "TEXT_FILES_PATTERN": str(model_dir.parent / "text.txt"),
        "MIXTURE_OR_TASK_NAME": "text_files_span_corruption",
        "VOCABULARY_FILE": str(model_dir / "vocabulary.model"),
        "TEXT_FILES_VALIDATION_SHARE": 0.2,
        "LOSS_NORMALIZING_FACTOR": None,
        **more,
    }
    del values["CHECKPOINT_KEEP"]
    return [f"--gin.{name}={value!r}" for name, value in values.items()]


def write_text(model_dir: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(["ba", "ca", "do", "mi", "no"], 40)) for _ in range(60)]
    (model_dir.parent / "text.txt").write_text("\n".join(lines))


def test_training_starts_from_it(convert, tmp_path):
    model_dir = convert("mt5")
    write_text(model_dir)
    flags = run_bindings(
        model_dir,
        MODEL_DIR=str(tmp_path / "run"),
        INITIAL_CHECKPOINT_PATH=str(model_dir),
        TRAIN_STEPS=2,
    )
    files = [f"--gin_file={model_dir / 'model.gin'}", "--gin_file=gin_configs/runs/finetune.gin"]
    assert main(["train", *files, *flags]) == 0
    # A fine-tuned mT5 is an mT5 still.
    description = json.loads((tmp_path / "run" / "model.json").read_text())
    assert description["converted_from"]["model_type"] == "mt5"
    assert main(["convert", str(tmp_path / "run"), "--to=hf", str(tmp_path / "out")]) == 0
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["architectures"] == ["MT5ForConditionalGeneration"]


@pytest.mark.parametrize("name", ["t5x_legacy_unscanned_v11", "t5x_orbax_scanned_v11"])
def test_training_goes_on_in_it(convert, tmp_path, name, capsys):
    """A T5X checkpoint with its optimizer: the same MODEL_DIR, the next step."""
    model_dir = shutil.copytree(convert(name), tmp_path / "m")
    write_text(model_dir)
    flags = run_bindings(model_dir, MODEL_DIR=str(model_dir), TRAIN_STEPS=7)
    files = [f"--gin_file={model_dir / 'model.gin'}", "--gin_file=gin_configs/runs/pretrain.gin"]
    assert main(["train", *files, *flags]) == 0
    assert "resuming after step 5 of 7" in capsys.readouterr().out
    lines = (model_dir / "metrics" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [6, 7]
    assert (model_dir / "checkpoints" / "7" / "optimizer").is_dir()


@pytest.mark.parametrize(
    ("bindings", "said"),
    [
        ({"TRAIN_STEPS": 5}, "TRAIN_STEPS = 5: the converted checkpoint"),
        ({"OptimizerConfig.name": "adamw"}, "; model.gin beside it has what it was made with"),
    ],
    ids=["steps that are made", "another optimizer"],
)
def test_training_in_it_as_it_cannot_go_on(convert, tmp_path, capsys, bindings, said):
    model_dir = shutil.copytree(convert("t5x_legacy_unscanned_v10"), tmp_path / "m")
    write_text(model_dir)
    files = [f"--gin_file={model_dir / 'model.gin'}", "--gin_file=gin_configs/runs/pretrain.gin"]
    flags = run_bindings(model_dir, MODEL_DIR=str(model_dir), **{"TRAIN_STEPS": 7} | bindings)
    assert main(["train", *files, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (model_dir / "config.gin").exists()


def test_training_from_what_is_not_converted(convert, shared_data, tmp_path, capsys):
    source = str(shared_data / "checkpoints/hf/t5_v11")
    model_dir = convert("t5_v11")
    write_text(model_dir)
    places = {"MODEL_DIR": str(tmp_path / "run"), "INITIAL_CHECKPOINT_PATH": source}
    files = [f"--gin_file={model_dir / 'model.gin'}", "--gin_file=gin_configs/runs/finetune.gin"]
    assert main(["train", *files, *run_bindings(model_dir, **places)]) == 2
    assert f"`python -m t5x_lite convert --from=hf {source} --to=" in capsys.readouterr().err


def test_training_in_it_needs_an_optimizer(convert, tmp_path, capsys):
    model_dir = shutil.copytree(convert("t5_v11"), tmp_path / "m")
    write_text(model_dir)
    files = [f"--gin_file={model_dir / 'model.gin'}", "--gin_file=gin_configs/runs/pretrain.gin"]
    assert main(["train", *files, *run_bindings(model_dir, MODEL_DIR=str(model_dir))]) == 2
    error = capsys.readouterr().err
    assert "has no optimizer to go on with: give it as INITIAL_CHECKPOINT_PATH" in error
    assert error.count("\n") == 1


def test_inference_and_evaluation_take_it(convert, tmp_path, capsys):
    model_dir = shutil.copytree(convert("t5_v10"), tmp_path / "m")
    (tmp_path / "in.txt").write_text("ba ca\ndo mi no\n")
    argv = [str(model_dir), f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / 'out.jsonl'}"]
    assert main(["infer", *argv, "--target_length=4"]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["inputs"] for record in records] == ["ba ca", "do mi no"]
    assert all(isinstance(record["prediction"], str) for record in records)
    assert main(["eval", str(model_dir)]) == 2
    assert "has no task of its own: give --task" in capsys.readouterr().err


def test_evaluation_by_a_tasks_metrics(convert, shared_data, tmp_path):
    model_dir = shutil.copytree(convert("t5_v10"), tmp_path / "m")
    flags = [
        "--task=glue_sst2_v002",
        f"--tfds_data_dir={shared_data / 'tfds'}",
        "--task_feature_lengths=inputs=64,targets=8",
        "--num_examples=8",
        "--mode=rank",
    ]
    assert main(["eval", str(model_dir), *flags]) == 0
    (series,) = (model_dir / "metrics").glob("glue_sst2_v002*.jsonl")
    record = json.loads(series.read_text())
    assert record["step"] == 0
    assert record["accuracy"] * 8 % 100 == 0  # of eight examples


def test_dtype_of_the_source_is_that_of_an_untrained_export(tmp_path, shared_data, vocabulary):
    """bfloat16 in, float32 here, bfloat16 out: the same bits."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    source = tmp_path / "source"
    source.mkdir()
    fixture = shared_data / "checkpoints/hf/t5_v11"
    shutil.copy(fixture / "config.json", source)
    halves = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors(fixture).items()}
    safetensors.numpy.save_file(halves, source / "model.safetensors")
    flags = [f"--to={tmp_path / 'm'}", f"--vocabulary={vocabulary}"]
    assert main(["convert", "--from=hf", str(source), *flags]) == 0
    assert main(["convert", str(tmp_path / "m"), "--to=hf", str(tmp_path / "out")]) == 0
    found = tensors(tmp_path / "out")
    assert {str(x.dtype) for x in found.values()} == {"bfloat16"}
    assert all(found[k].tobytes() == v.tobytes() for k, v in halves.items())


def test_architecture_as_a_gin_file(convert):
    """model.gin makes the same T5Config as model.json, but for what a run sets."""
    from t5x_lite import gin_utils

    for name in ("umt5", "t5_v10"):
        model_dir = convert(name)
        flags = run_bindings(model_dir, MODEL_DIR="unused")
        files = [str(model_dir / "model.gin"), "gin_configs/runs/pretrain.gin"]
        config, _ = gin_utils.load_train_config(files, [f.removeprefix("--gin.") for f in flags])
        model = saved_run.read(model_dir).model
        assert dataclasses.replace(model, dropout_rate=0.1) == dataclasses.replace(
            config.model, dropout_rate=0.1
        )
