"""What a model card tells, and what it leaves out."""

import dataclasses
import json
import pathlib
import re

import gin
import pytest

from t5x_lite.errors import UsageError
from t5x_lite.interop import model_card
from t5x_lite.interop.model_card import ModelCard, read_card
from t5x_lite.models.config import T5Config

CONFIG = """
# Macros:
# ==============================================================================
BATCH_SIZE = 128
INITIAL_CHECKPOINT_PATH = '{initial}'
TRAIN_STEPS = 2000

# Parameters for DataConfig:
# ==============================================================================
DataConfig.batch_size = %BATCH_SIZE
DataConfig.split = 'train'
DataConfig.text_files_pattern = None
DataConfig.tfds_versions = {{'glue': '1.0.0'}}

# Parameters for OptimizerConfig:
# ==============================================================================
OptimizerConfig.name = 'adafactor'
OptimizerConfig.total_steps = %TRAIN_STEPS

# Parameters for TrainConfig:
# ==============================================================================
TrainConfig.initial_checkpoint_path = %INITIAL_CHECKPOINT_PATH
TrainConfig.model = @T5Config()
TrainConfig.train_steps = %TRAIN_STEPS
"""
VOCABULARY = {"class": "SentencePieceVocabulary", "size": 32100, "extra_ids": 100}


def write_run(directory: pathlib.Path, task: str | None, initial: str | None, **model) -> None:
    (directory / "metrics").mkdir(parents=True)
    if initial:
        (directory / "config.gin").write_text(CONFIG.format(initial=initial))
    description = {
        "architecture": {"family": "t5"},
        "num_parameters": 77_000_000,
        "task": task,
        "feature_lengths": {"inputs": 512, "targets": 114},
        "vocabulary": VOCABULARY,
    }
    (directory / "model.json").write_text(json.dumps(description | model))


def write_lines(path: pathlib.Path, *records: dict) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path):
    """A run that began with another, which began with a conversion."""
    converted = {"format": "hf", "path": "downloads/t5-v1_1-small", "dtype": "float32"}
    write_run(tmp_path / "start", None, None, converted_from=converted)
    start, c4 = str(tmp_path / "start"), str(tmp_path / "c4" / "checkpoints" / "2000")
    write_run(tmp_path / "c4", "c4_v220_span_corruption", start, converted_from=converted)
    write_run(tmp_path / "cola", "glue_cola_v002", c4, converted_from=converted)
    metrics = tmp_path / "cola" / "metrics"
    write_lines(
        metrics / "glue_cola_v002.jsonl",
        {"step": 500, "matthews": 41.25, "num_examples": 1043, "unix_time": 1.5},
        {"step": 1000, "matthews": 43.5, "num_examples": 1043, "unix_time": 2.5},
        {"step": 1500, "matthews": 42.75, "num_examples": 1043, "unix_time": 3.5},
    )
    write_lines(metrics / "train.jsonl", {"step": 900, "loss": 0.123456, "learning_rate": 0.01})
    best = {"step": 1000, "metric": "glue_cola_v002/matthews", "value": 43.5, "mode": "max"}
    (tmp_path / "cola" / "best.json").write_text(json.dumps(best))
    return tmp_path / "cola"


def render(card: ModelCard, **changes) -> str:
    options = {
        "config": T5Config(),
        "model_class": "t5",
        "dtype": "float32",
        "has_tokenizer": True,
        "output_scale": 1.0,
    } | changes
    return model_card.render(card, **options)  # type: ignore[arg-type]


def test_card_says_what_was_trained_on_what(run):
    card = read_card(run, 1000)
    text = render(card)
    head, body = text.removeprefix("---\n").split("\n---\n")
    assert head.splitlines() == ["library_name: transformers", "tags:", "- t5", "- t5x_lite"]
    lines = body.splitlines()
    for line in (
        "# cola",
        "Trained on `glue_cola_v002` (a seqio task or mixture) to step 1,000.",
        "| tokens of `inputs` | 512 |",
        "| split | `train` |",
        '| TFDS versions | `{"glue": "1.0.0"}` |',
        "| steps planned | `2000` |",
        "| batch size | `128` |",
        "| optimizer | `adafactor` |",
        "| `glue_cola_v002` | matthews | 43.5 | 1,000 |",
        "| `train` | loss | 0.1235 | 900 |",
        "from transformers import AutoTokenizer, T5ForConditionalGeneration",
        'model = T5ForConditionalGeneration.from_pretrained("PATH")',
        "outputs = model.generate(**inputs, max_new_tokens=114)",
        "The vocabulary has 32,100 ids and the embedding 32,128 rows.",
        "OptimizerConfig.total_steps = %TRAIN_STEPS",
    ):
        assert line in lines, line
    assert "text files" not in body and "learning_rate |" not in body and "42.75" not in body
    c4, start = (line for line in lines if re.match(r"\d\. ", line))
    assert c4.endswith("`, trained on `c4_v220_span_corruption` (2,000 steps planned)")
    assert "start`, converted from Hugging Face's checkpoint `t5-v1_1-small`" in start
    assert body.count("t5-v1_1-small") == 1
    best = "The best step of the run by `glue_cola_v002/matthews` was 1,000, with 43.5."
    assert best in body
    assert "license" not in head and "language" not in head


def test_card_of_a_conversion(run):
    card = read_card(run.parent / "start", 0)
    text = render(card, model_class="mt5", has_tokenizer=False)
    assert "Converted by t5x_lite and not trained by it." in text
    assert "The weights were converted from Hugging Face's checkpoint `t5-v1_1-small`." in text
    assert "MT5ForConditionalGeneration" in text and "AutoTokenizer" not in text
    assert "There is no tokenizer here." in text
    assert "No evaluation is recorded." in text
    assert "## Configuration" not in text


def test_card_survives_strange_text(run):
    """Names cannot leave their place in the Markdown."""
    card = dataclasses.replace(
        read_card(run, 1000), data={"text files": "a|b`c\n# d"}, config="X = '````'"
    )
    lines = render(card).splitlines()
    assert r"| text files | `` a\|b`c # d `` |" in lines
    assert lines[-3:] == ["`````python", "X = '````'", "`````"]


def test_card_of_a_converted_step_in_a_run_that_went_on(tmp_path):
    """That step is no work of the run's."""
    origin = {"format": "t5x", "path": "/data/t5x/checkpoint_500", "step": 500}
    write_run(tmp_path / "run", "my_task", None, converted_from=origin)
    line = "T5X's checkpoint `t5x/checkpoint_500`, step 500."
    text = render(read_card(tmp_path / "run", 500, is_untouched=True))
    assert f"not trained by it.\n\nThe weights were converted from {line}" in text
    assert "my_task" not in text and "## Configuration" not in text and "/data" not in text
    text = render(read_card(tmp_path / "run", 700))
    trained = "Trained on `my_task` (a seqio task or mixture) from step 500 to step 700."
    assert f"{trained}\n\nIt goes back to {line}" in text
    assert "initial parameters" not in text
    # From another directory's parameters a run begins with its own step 0.
    write_run(tmp_path / "other", "my_task", str(tmp_path / "run"), converted_from=origin)
    assert "(a seqio task or mixture) to step 700." in render(read_card(tmp_path / "other", 700))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/hub/models--google--t5-v1_1-small/snapshots/abc123", "google/t5-v1_1-small"),
        ("hub/models--t5-small/snapshots/abc123/", "t5-small"),
        ("models/snapshots/abc123", "abc123"),
        ("gs://bucket/t5_small/checkpoint_5", "t5_small/checkpoint_5"),
        ("/data/sst2/checkpoint-500", "sst2/checkpoint-500"),
        ("checkpoint_5", "checkpoint_5"),
        ("/checkpoint_5", "checkpoint_5"),
        ("/data/t5-small", "t5-small"),
    ],
)
def test_name_of_what_was_converted(tmp_path, path, name):
    write_run(tmp_path / "run", None, None, converted_from={"format": "hf", "path": path})
    text = render(read_card(tmp_path / "run", 0))
    assert f"converted from Hugging Face's checkpoint `{name}`." in text


def test_card_of_bytes(tmp_path):
    """AutoTokenizer refuses ByT5's tokenizer for UMT5, whose class a scanned model has."""
    vocabulary = {"class": "ByteVocabulary", "size": 259}
    write_run(tmp_path / "run", "my_task", None, vocabulary=vocabulary)
    text = render(read_card(tmp_path / "run", 3), model_class="umt5")
    assert 'tokenizer = ByT5Tokenizer.from_pretrained("PATH")' in text
    assert "258, 257" in text and "AutoTokenizer" not in text


def test_card_of_a_start_that_is_gone(tmp_path):
    write_run(tmp_path / "run", "my_task", "runs/gone")
    card = read_card(tmp_path / "run", 3)
    assert card.lineage == ("`runs/gone`, of which nothing more is known here",)


def test_damaged_json_is_named(run):
    (run / "best.json").write_text("{")
    with pytest.raises(UsageError, match=r"best\.json is no valid JSON"):
        read_card(run, 1000)


def test_configuration_is_read_as_gin_writes_it():
    @gin.configurable(module="card_test")
    def settings(text=None, lengths=None, rate=None, other=None):
        return text, lengths, rate, other

    values = {
        "text": "a word # and = more " * 20,
        "lengths": {f"feature_{i}": i for i in range(30)},
        "rate": 1e-06,
        "other": (True, None, "it's"),
    }
    try:
        gin.parse_config([f"RATE = {values['rate']!r}", "settings.rate = %RATE"])
        for name in ("text", "lengths", "other"):
            gin.bind_parameter(f"settings.{name}", values[name])
        settings()
        text = gin.operative_config_str()
    finally:
        gin.clear_config()
    parsed = model_card.parse_config(text)
    assert max(map(len, text.splitlines())) < 120, "gin no longer breaks lines"
    assert {name: parsed[f"settings.{name}"] for name in values} == values
