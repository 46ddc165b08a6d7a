"""The `convert` verb: other programs' checkpoints into a MODEL_DIR, and a MODEL_DIR out.

Nothing of either is seen before all of it is there.
"""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from t5x_lite import checkpoints, files, run_files, saved_run
from t5x_lite.errors import Failure, UsageError
from t5x_lite.interop import (
    hf_read,
    hf_write,
    model_card,
    new_directory,
    recognise,
    step_io,
    t5x_read,
    vocabularies,
)
from t5x_lite.interop.tensors import Source, Tensor
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import OptimizerConfig

# T5's in pre-training. Other lengths are given where the model is used: `infer --input_length`.
FEATURE_LENGTHS = {"inputs": 512, "targets": 114}

# Fields of T5Config that a run sets, as its gin files do.
_THE_RUNS_OWN = ("dropout_rate", "dtype", "scan_layers", "remat_policy")

# Of the embedding of mT5 in every size, and of no other model: T5X's do not say what they are.
_MT5_ROWS = 250_112

_READERS = {"hf": hf_read.open_hf, "t5x": t5x_read.open_t5x}


def import_checkpoint(
    format: str, path: str, model_dir: str, *, vocabulary: str | None = None
) -> None:
    """Makes a MODEL_DIR of another program's checkpoint, for `train`, `eval` and `infer`.

    Args:
      format: "hf" or "t5x".
      path: the checkpoint's directory.
      model_dir: must not exist, or be an empty directory.
      vocabulary: a SentencePiece model, a directory with a tokenizer, or "bytes"; None is the one
        that lies in `path`.

    Raises:
      UsageError: the checkpoint is not what it should be, there is no vocabulary, or it does not
        fit the model. Nothing is left in `model_dir`.
      Failure: it cannot be written.
    """
    new_directory.check(model_dir)
    if recognise.is_address(path):
        raise UsageError(f"no directory {path!r}{recognise.hint(path)}")
    source = _READERS[format](path)
    words = _vocabulary(format, path, vocabulary)
    words = vocabularies.check_size(words, source.model.vocab_size)
    _check_tree(source)
    parts = _checkpointables(source)
    num_bytes = sum(tensor.num_bytes for part in parts.values() for tensor in part.values())
    with new_directory.appearing(model_dir, num_bytes, run_files.MODEL_FILE) as staging:
        files.write_atomically(staging / run_files.MODEL_GIN, _model_gin(source, model_dir))
        if words.model is not None:
            files.write_atomically(staging / run_files.VOCABULARY_FILE, words.model)
        step_io.write_step(staging / "checkpoints" / str(source.step), parts)
        num_parameters = t5.num_parameters(source.model)
        description = {
            "architecture": {"family": "t5", **source.model.to_dict()},
            "num_parameters": num_parameters,
            "task": None,
            "feature_lengths": FEATURE_LENGTHS,
            "vocabulary": words.description,
            "converted_from": {"step": source.step, **source.origin},
        }
        text = json.dumps(description, indent=2) + "\n"
        files.write_atomically(staging / run_files.MODEL_FILE, text.encode())
    file = "bytes" if words.model is None else f"{model_dir}/{run_files.VOCABULARY_FILE}"
    _print_imported(source, num_parameters, model_dir, file)


def export_checkpoint(
    model_dir: str,
    directory: str,
    *,
    checkpoint: str = "latest",
    max_shard_bytes: int,
    dtype: str | None = None,
) -> None:
    """Writes a checkpoint of a run as `T5ForConditionalGeneration.from_pretrained` reads it.

    Args:
      model_dir: a run's MODEL_DIR, or that of a conversion.
      directory: must not exist, or be empty.
      checkpoint: "latest", "best" or a step.
      max_shard_bytes: of each file of weights.
      dtype: "float32", "bfloat16" or "float16"; None is the one that the model was converted from
        if it was not trained since, else float32.

    Raises:
      UsageError: there is no such run or checkpoint.
      CheckpointError: the checkpoint is damaged.
      Failure: it cannot be written. Nothing is left in `directory`.
    """
    if not files.is_local(directory):
        raise UsageError(
            f"{directory!r} is not on a local disk: convert to one, and copy from there"
        )
    new_directory.check(directory)
    run = saved_run.read(model_dir)
    if checkpoint == "all" or "," in checkpoint:
        raise UsageError(f"--checkpoint={checkpoint}: give one: latest, best or a step")
    (step,) = saved_run.checkpoint_steps(run, checkpoint)
    step_dir = run.model_dir / "checkpoints" / str(step)
    if checkpoint != "latest":  # which is the newest that is intact
        checkpoints.require_intact(step_dir, "params/")
    shapes = jax.eval_shape(lambda key: t5.init(run.model, key), jax.random.key(0))
    model_class = _model_class(run.model, run.converted_from)
    if dtype is None:
        dtype = _default_dtype(run, step, model_class)
    path = run.model_dir / run_files.VOCABULARY_FILE
    words = path.read_bytes() if path.exists() else None
    card = model_card.read_card(run.model_dir, step, is_untouched=saved_run.is_untouched(run, step))
    try:
        hf_write.write_hf(
            directory,
            run.model,
            step_io.read_params(step_dir, shapes),
            model_class=model_class,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            tokenizer_files=vocabularies.tokenizer_files(words, run.model.vocab_size),
            card=card,
        )
    except (OSError, ValueError, Failure) as e:
        if step_dir.exists():
            raise
        raise Failure(
            f"step {step} of {model_dir} has gone while it was read: a run trains there"
        ) from e
    print(f"step {step} of {model_dir} is in {directory}: {model_class}, {dtype}")


def _model_class(model: T5Config, origin: Mapping[str, Any]) -> str:
    """Which of transformers' classes the model is."""
    if model.relative_bias_per_layer:
        return "umt5"
    is_mt5 = origin.get("model_type") == "mt5" or model.vocab_size == _MT5_ROWS
    return "mt5" if is_mt5 else "t5"


def _default_dtype(run: saved_run.SavedRun, step: int, model_class: str) -> str:
    """What holds every parameter as it is: its source's, if nothing has changed them since."""
    found = run.converted_from.get("dtype")
    scaled = hf_write.output_scale(run.model, model_class) != 1
    if scaled or not saved_run.is_untouched(run, step) or found not in hf_write.DTYPES:
        return "float32"
    return found


def _vocabulary(format: str, path: str, given: str | None) -> vocabularies.ForeignVocabulary:
    """The source's own, or the one that is given: a file, a directory with a tokenizer, bytes."""
    place = path if given is None else given
    if given is not None and not (given != vocabularies.BYTES and epath.Path(given).is_dir()):
        return vocabularies.read_vocabulary(given)
    found = vocabularies.read_tokenizer(place)
    if found is not None:
        return found
    if format == "t5x" and given is None:
        what = f"{path!r} is T5X's, which keeps no vocabulary"
    else:
        what = f"{place!r} has no tokenizer (spiece.model or tokenizer.json)"
    raise UsageError(
        f"{what}: give --vocabulary=FILE, a SentencePiece model, or --vocabulary=bytes"
    )


def _check_tree(source: Source) -> None:
    """Raises UsageError unless the tensors are those of the architecture."""
    shapes = jax.eval_shape(lambda key: t5.init(source.model, key), jax.random.key(0))
    wanted = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    for path in sorted(wanted.keys() | source.params.keys()):
        expected = wanted.get(path, "nothing")
        found = source.params[path].shape if path in source.params else "nothing"
        if found != expected:
            raise UsageError(
                f"{source.origin['path']}: {path} is {found}, where its configuration has "
                f"{expected}"
            )


def _checkpointables(source: Source) -> dict[str, Mapping[str, Tensor]]:
    parts: dict[str, Mapping[str, Tensor]] = {"params": source.params}
    if source.optimizer is not None:
        leaves = jax.tree_util.tree_leaves_with_path({"opt_state": source.optimizer.state})
        parts["optimizer"] = {
            "step": Tensor(
                (), lambda start, stop: np.array(source.step, np.int32), np.dtype(np.int32)
            ),
            **{jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves},
        }
    return parts


def _model_gin(source: Source, model_dir: str) -> bytes:
    """The architecture, and what continues its optimizer, as a gin file for `train`."""
    lines = [f"# The architecture of {source.origin['path']!r}, as converted to {model_dir!r}.", ""]
    for field in dataclasses.fields(source.model):
        if field.name not in _THE_RUNS_OWN:
            lines.append(f"T5Config.{field.name} = {getattr(source.model, field.name)!r}")
    if source.optimizer is not None:
        config, default = source.optimizer.config, OptimizerConfig()
        for field in dataclasses.fields(config):
            if (value := getattr(config, field.name)) != getattr(default, field.name):
                lines.append(f"OptimizerConfig.{field.name} = {value!r}")
    return "\n".join([*lines, ""]).encode()


def _print_imported(
    source: Source, num_parameters: int, model_dir: str, vocabulary_file: str
) -> None:
    print(f"{num_parameters:,} parameters of {source.origin['path']} are in {model_dir}")
    if source.optimizer is not None:
        print(
            f"with its optimizer: `train` with {_gin_flag('MODEL_DIR', model_dir)} goes on from "
            f"step {source.step}"
        )
    elif "optimizer" in source.origin:
        print(f"without its optimizer: {source.origin['optimizer']}")
    flags = [
        f"--gin_file={model_dir}/{run_files.MODEL_GIN}",
        "--gin_file=gin_configs/runs/finetune.gin",
    ]
    bindings = {"INITIAL_CHECKPOINT_PATH": model_dir, "VOCABULARY_FILE": vocabulary_file}
    command = [*map(shlex.quote, flags), *(_gin_flag(*binding) for binding in bindings.items())]
    print("to fine-tune it, with a task, its lengths, steps and another MODEL_DIR:")
    print(f"  python -m t5x_lite train {' '.join(command)}")


def _gin_flag(name: str, value: str) -> str:
    """As the pages write it, if a shell takes it so."""
    if shlex.quote(value) == value:
        return f"--gin.{name}=\"'{value}'\""
    return shlex.quote(f"--gin.{name}={value!r}")
