"""The model card of an exported run: what was trained on what, as far as MODEL_DIR tells."""

import ast
import dataclasses
import importlib.resources
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from etils import epath

from t5x_lite.interop.hf import MODEL_CLASSES
from t5x_lite.interop.json_files import read_object
from t5x_lite.metrics import read_metrics
from t5x_lite.models.config import T5Config

# Settings of config.gin that say what was trained on what; those that are None are left out.
_DATA = {
    "DataConfig.split": "split",
    "DataConfig.tfds_versions": "TFDS versions",
    "DataConfig.text_files_pattern": "text files",
    "DataConfig.use_cached_tasks": "from seqio's cache",
}
_TRAINING = {
    "TrainConfig.train_steps": "steps planned",
    "DataConfig.batch_size": "batch size",
    "DataConfig.pack": "packed",
    "OptimizerConfig.name": "optimizer",
    "OptimizerConfig.learning_rate": "learning rate",
    "OptimizerConfig.schedule": "schedule",
    "OptimizerConfig.warmup_steps": "warm-up steps",
    "T5Config.dropout_rate": "dropout",
    "LossConfig.z_loss": "z-loss",
    "LossConfig.label_smoothing": "label smoothing",
    "T5Config.dtype": "dtype of the computation",
    "TrainConfig.random_seed": "seed",
}
_INITIAL = "TrainConfig.initial_checkpoint_path"
_NOT_QUALITY = re.compile(r"step|unix_time|seconds.*|num_.*|z_loss|.*_norm|learning_rate|.*_per_.*")
_MAX_ANCESTORS = 8


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure of an evaluation."""

    evaluation: str
    name: str
    value: float
    step: int


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is known of how a model came to be.

    Attributes:
      name: what the model is called.
      step: training steps made.
      num_parameters: exact.
      task: the task or mixture that it was trained on; None if it was converted, not trained.
      feature_lengths: tokens of each feature.
      vocabulary: as in model.json: {"class", "size", ...}.
      data: label and value of what was read.
      training: label and value of how it was trained.
      lineage: a sentence on each model that it was started from, the nearest first.
      converted_from: as in model.json: {"format", "path", ...} of what it, or what it was trained
        from, was converted from; None if there is nothing.
      best: the best.json of the run; None if it has none.
      metrics: of the newest evaluations up to `step`.
      config: the text of config.gin; empty if there is none.
    """

    name: str
    step: int
    num_parameters: int
    task: str | None = None
    feature_lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    vocabulary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lineage: tuple[str, ...] = ()
    converted_from: Mapping[str, Any] | None = None
    best: Mapping[str, Any] | None = None
    metrics: tuple[Metric, ...] = ()
    config: str = ""


def read_card(model_dir: epath.PathLike, step: int, *, is_untouched: bool = False) -> ModelCard:
    """Reads model.json, config.gin, best.json and the metrics of a run or of a conversion.

    Args:
      model_dir: MODEL_DIR.
      step: the checkpoint that is exported.
      is_untouched: it is as `convert` made it, whatever was trained in `model_dir` since.

    Raises:
      UsageError: a file is not what a run has written.
    """
    model_dir = epath.Path(model_dir)
    model = read_object(model_dir / "model.json", optional=True)
    config = _read_text(model_dir / "config.gin")
    settings = parse_config(config)
    if is_untouched:
        model, config, settings = model | {"task": None}, "", {}
    return ModelCard(
        name=model_dir.resolve().name if "://" not in os.fspath(model_dir) else model_dir.name,
        step=step,
        num_parameters=model.get("num_parameters", 0),
        task=model.get("task"),
        feature_lengths=model.get("feature_lengths", {}),
        vocabulary=model.get("vocabulary", {}),
        data=_select(settings, _DATA),
        training=_select(settings, _TRAINING),
        lineage=_read_lineage(settings.get(_INITIAL)),
        converted_from=model.get("converted_from"),
        best=None if is_untouched else read_object(model_dir / "best.json", optional=True) or None,
        metrics=_read_last_metrics(model_dir / "metrics", step),
        config=config,
    )


def parse_config(text: str) -> dict[str, Any]:
    """The bindings of an operative configuration, macros resolved.

    Only what a run itself writes is understood, not gin's language: values are Python literals
    or names of macros; anything else stays text.
    """
    raw: dict[str, str] = {}
    name = None
    for line in text.splitlines():
        if match := re.fullmatch(r"([A-Za-z_][\w./]*)\s*=\s*(.*)", line):
            name, raw[match[1]] = match[1], match[2].removesuffix("\\")
        elif not line.strip() or line.startswith("#"):
            name = None
        elif name:
            raw[name] += "\n" + line.removesuffix("\\")

    def value(text: str, depth: int = 0) -> Any:
        text = text.strip()
        macro = text.removeprefix("%")
        if macro != text and macro in raw and depth < len(raw):
            return value(raw[macro], depth + 1)
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    return {name: value(text) for name, text in raw.items()}


def render(
    card: ModelCard,
    *,
    config: T5Config,
    model_class: str,
    dtype: str,
    has_tokenizer: bool,
    output_scale: float,
) -> str:
    """README.md, in Markdown with the YAML head that the Hugging Face hub reads.

    Args:
      card: the run.
      config: the architecture.
      model_class: "t5", "mt5" or "umt5".
      dtype: of the tensors.
      has_tokenizer: whether tokenizer files are beside it.
      output_scale: what the output matrix was multiplied by.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "cell": lambda value: _code(value).replace("|", r"\|"),
        "code": _code,
        "number": _format_number,
        "origin": _describe_origin,
    }
    environment.filters |= filters
    has_bytes = card.vocabulary.get("class") == "ByteVocabulary"
    first_step = (card.converted_from or {}).get("step") or 0
    if card.lineage:  # it took the parameters from there, and began with step 0
        first_step = 0
    deeper = config.num_decoder_layers > config.num_encoder_layers
    source = importlib.resources.files("t5x_lite.interop").joinpath("model_card.md.j2")
    return environment.from_string(source.read_text("utf-8")).render(
        card=card,
        began=f"from step {_format_number(first_step)} " if first_step else "",
        settings={**card.data, **card.training},
        config=config,
        model_class=model_class,
        class_name=MODEL_CLASSES[model_class],
        dtype=dtype,
        has_tokenizer=has_tokenizer,
        has_bytes=has_bytes,
        # AutoTokenizer refuses a tokenizer that is not of the tokenizers library for UMT5.
        tokenizer_class="ByT5Tokenizer" if has_bytes else "AutoTokenizer",
        output_scale=output_scale,
        # Its cache has as many layers as the encoder (seen in 4.57 and 5.23).
        generate_options=", use_cache=False" if deeper else "",
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", card.config)), default=0)),
    )


def _select(settings: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    found = {label: settings.get(name) for name, label in labels.items()}
    return {label: value for label, value in found.items() if value is not None}


def _read_text(path: epath.Path) -> str:
    return path.read_text() if path.exists() else ""


def _read_last_metrics(directory: epath.Path, step: int) -> tuple[Metric, ...]:
    """Of each series the last line up to `step`, without what is no measure of quality."""
    metrics = []
    for path in sorted(directory.glob("*.jsonl")) if directory.exists() else ():
        records = [record for record in read_metrics(path) if record["step"] <= step]
        for name, value in (records[-1] if records else {}).items():
            if not _NOT_QUALITY.fullmatch(name):
                series = path.name.removesuffix(".jsonl")
                metrics.append(Metric(series, name, value, int(records[-1]["step"])))
    return tuple(metrics)


def _read_lineage(initial: str | None) -> tuple[str, ...]:
    """A sentence on each model that a run was started from, as long as their files are there."""
    lineage: list[str] = []
    while initial and len(lineage) < _MAX_ANCESTORS:
        start = epath.Path(initial)
        folders = [p for p in (start, start.parent, start.parent.parent) if p.name]
        found = next((p for p in folders if (p / "model.json").exists()), None)
        if found is None:
            lineage.append(f"{_code(initial)}, of which nothing more is known here")
            break
        model = read_object(found / "model.json", optional=True)
        settings = parse_config(_read_text(found / "config.gin"))
        lineage.append(_describe_ancestor(initial, model, settings))
        initial = settings.get(_INITIAL)
    return tuple(lineage)


def _describe_ancestor(path: str, model: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if (origin := model.get("converted_from")) and model.get("task") is None:
        return f"{_code(path)}, converted from {_describe_origin(origin)}"
    sentence = f"{_code(path)}, trained on {_code(model.get('task'))}"
    if steps := settings.get("TrainConfig.train_steps"):
        sentence += f" ({_format_number(steps)} steps planned)"
    return sentence


def _describe_origin(origin: Mapping[str, Any]) -> str:
    """Where the weights come from, without the directories of the machine that converted them."""
    program = {"hf": "Hugging Face's", "t5x": "T5X's"}.get(origin.get("format", ""), "a")
    name = _checkpoint_name(pathlib.PurePath(str(origin.get("path", ""))))
    step = f", step {_format_number(origin['step'])}" if origin.get("step") else ""
    return f"{program} checkpoint {_code(name)}{step}"


def _checkpoint_name(path: pathlib.PurePath) -> str:
    folder = path.parent
    # The cache of huggingface_hub: models--google--flan-t5-base/snapshots/<commit>.
    if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
        return folder.parent.name.removeprefix("models--").replace("--", "/")
    if re.fullmatch(r"checkpoint[_-]\d+", path.name) and folder.name not in ("", ".."):
        return f"{folder.name}/{path.name}"
    return path.name


def _code(value: Any) -> str:
    """The value as code in Markdown, whatever characters it has."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    if "`" in text:
        return f"`` {text} ``"
    return f"`{text}`"


def _format_number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else "not finite"
