"""The `infer` verb: lines of files or examples of a task in, one JSON line for each out."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5x_lite import files, infer_output, saved_run
from t5x_lite.decoding import NO_BEAM, DecodeConfig
from t5x_lite.distributed import from_process_0, is_coordinator, tell
from t5x_lite.errors import Failure, UsageError
from t5x_lite.infer_inputs import Example, FileInputs, FileSource, Source
from t5x_lite.infer_progress import LineProgress
from t5x_lite.partitioning import make_partitioning
from t5x_lite.predict import Prediction, Predictor
from t5x_lite.saved_run import SavedRun
from tasks import vocabularies

# A window is read, sorted by length into batches, and written as a whole.
_BATCHES_PER_WINDOW = 16


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """What to infer, from which run, and where to.

    Attributes:
      model_dir: the run.
      output: the JSONL file to write.
      input: a file or a glob; or None, with a task.
      file_format: "text", "tsv" or "jsonl"; None goes by the suffix.
      field: the field, or column, with the text.
      prefix: put before each text.
      task: a task or mixture whose examples to take; or None, with an input.
      split: of the task.
      module: a module to import first, which registers the task.
      tfds_data_dir: where TFDS finds prepared data sets.
      checkpoint: "latest", "best" or a step.
      batch_size: rows decoded at a time over all devices.
      input_length: ids of an input at most, longer ones are cut; None is the run's.
      target_length: ids of an output at most; None is the run's.
      decode: how.
      seed: of sampling.
      shard: (i, n): only the i-th of n equal parts, from 0.
      score: a field whose text to score, instead of generating.
      mesh: devices along each mesh axis; None: all along "data".
    """

    model_dir: str
    output: str
    input: str | None = None
    file_format: str | None = None
    field: str | None = None
    prefix: str = ""
    task: str | None = None
    split: str = "validation"
    module: str | None = None
    tfds_data_dir: str | None = None
    checkpoint: str = "latest"
    batch_size: int | None = None
    input_length: int | None = None
    target_length: int | None = None
    decode: DecodeConfig = DecodeConfig()  # noqa: RUF009 - frozen
    seed: int = 0
    shard: tuple[int, int] | None = None
    score: str | None = None
    mesh: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        """Raises UsageError on what cannot be, alone or together."""
        if (self.input is None) == (self.task is None):
            raise UsageError("give either --input, files, or --task, a task's examples")
        if self.task is not None and (self.field or self.prefix or self.file_format):
            raise UsageError("--field, --prefix and --format belong to --input, not to --task")
        if self.task is not None and self.score not in (None, "targets"):
            raise UsageError(f"--score={self.score}: of a task only 'targets' can be scored")
        for flag, least in (
            ("batch_size", 1),
            ("input_length", 2),  # an id and the end mark
            ("target_length", 1),
            ("seed", 0),
        ):
            value = getattr(self, flag)
            if value is not None and value < least:
                raise UsageError(f"--{flag}={value}: must be at least {least}")
        if self.seed >= 2**32:
            raise UsageError(f"--seed={self.seed}: must be less than 2^32")
        if self.score is not None and self.decode != DecodeConfig():
            raise UsageError("--score generates nothing: leave out the flags of decoding")
        if self.checkpoint == "all" or "," in self.checkpoint:
            raise UsageError(f"--checkpoint={self.checkpoint}: give one: latest, best or a step")


def parse_shard(text: str) -> tuple[int, int]:
    """`"0/4"` as (0, 4); UsageError if it is no part of a whole."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"--shard={text}: give I/N with I from 0 to N - 1, like 0/4 and 3/4")
    return int(match[1]), int(match[2])


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=4,model=2"` as a mapping; UsageError if it is not of that form."""
    parts = [part.partition("=") for part in text.split(",")]
    if not all(axis and n.isdecimal() and int(n) for axis, _, n in parts):
        raise UsageError(f"--mesh={text}: give devices for each axis, like data=4,model=2")
    return {axis: int(n) for axis, _, n in parts}


def infer(config: InferConfig) -> epath.Path:
    """Writes a line for each input, in their order; goes on where an earlier call has stopped.

    A call that finds the output complete does nothing. Every process of a job calls this and reads
    the inputs; process 0 writes.

    Returns:
      The output: `config.output`, or with a shard `<stem>-<i>-of-<n><suffix>` beside it.

    Raises:
      UsageError: there is no such run, checkpoint or input; the input is not what it should be,
        with its file and line; or the output belongs to other settings.
      CheckpointError: the checkpoint is damaged.
      Failure: the output cannot be written any more, or the input has changed meanwhile.
    """
    run = saved_run.read(config.model_dir)
    config.decode.check(run.model.vocab_size)
    predictor = _make_predictor(config, run)
    source = _open_source(config, run, predictor)
    total, digest = source.scan()
    i, n = config.shard or (0, 1)
    span = range(total * i // n, total * (i + 1) // n)
    path = _output_path(config)
    output = infer_output.make_output(path)
    window = _BATCHES_PER_WINDOW * predictor.batch_size
    kept = [0, 0]

    def keep() -> list[int]:
        return list(output.keep(len(span), window))

    try:
        settings, begun = from_process_0(lambda: _settings(config, run, predictor, path, digest))
        if settings["input_sha256"] != digest:
            raise UsageError("the inputs that this process reads are not those of process 0")
        if begun:
            kept = from_process_0(keep)
        if not begun or kept[0] < len(span):
            params = saved_run.load_params(run, settings["step"], predictor.partitioning)
            if not begun:
                from_process_0(lambda: infer_output.claim(path, settings))
                kept = from_process_0(keep)
            elif kept[0]:
                tell(f"goes on after {kept[0]:,} of {len(span):,} lines in {path}")
            examples = source.examples(span.start + kept[0], span.stop)
            windows = iter(lambda: list(itertools.islice(examples, window)), [])
            with LineProgress(len(span), kept[0], enabled=is_coordinator()) as bar:
                for batch in windows:
                    records = _infer(config, run, predictor, params, batch, span.start + kept[0])
                    if is_coordinator():
                        output.append([_json_line(record) for record in records])
                    kept[0] += len(records)
                    kept[1] += sum("truncated" in record for record in records)
                    bar.update(kept[0])
            if kept[0] != len(span):
                raise Failure(f"the input has changed meanwhile: it ended after {kept[0]:,} lines")
        from_process_0(output.finish)
    finally:
        output.close()
    tell(f"complete: {kept[0]:,} lines in {path}")
    if kept[1]:
        tell(
            f"longer than {predictor.input_length} tokens and cut: {kept[1]:,} of them "
            '("truncated": true); --input_length allows more'
        )
    return path


def _make_predictor(config: InferConfig, run: SavedRun) -> Predictor:
    partitioning = make_partitioning(config.mesh)
    rows = config.batch_size
    if rows is None:
        shards = partitioning.num_batch_shards
        rows = math.ceil(32 / shards) * shards
    return Predictor(
        run.model,
        partitioning,
        batch_size=rows,
        input_length=config.input_length or run.feature_lengths["inputs"],
        target_length=config.target_length or run.feature_lengths["targets"],
    )


def _infer(
    config: InferConfig,
    run: SavedRun,
    predictor: Predictor,
    params: Any,
    examples: Sequence[Example],
    first_index: int,
) -> list[dict[str, Any]]:
    """The examples' records with what the model says."""
    inputs = [example.inputs for example in examples]
    if config.score is not None:
        targets = [example.targets for example in examples if example.targets is not None]
        scores = predictor.score(params, inputs, targets)
        return [
            example.record | {"score": _json_float(score)}
            for example, score in zip(examples, scores, strict=True)
        ]
    found = predictor.generate(
        params, inputs, config.decode, seed=config.seed, first_index=first_index
    )
    return [
        example.record | _describe(prediction, run)
        for example, prediction in zip(examples, found, strict=True)
    ]


def _describe(prediction: Prediction, run: SavedRun) -> dict[str, Any]:
    texts = [
        vocabularies.decode_with_sentinels(run.vocabulary, ids.tolist()) for ids in prediction.ids
    ]
    scores = [None if score == NO_BEAM else _json_float(score) for score in prediction.scores]
    described: dict[str, Any] = {"prediction": texts[0], "score": scores[0]}
    if len(texts) > 1:
        described |= {"predictions": texts, "scores": scores}
    return described


def _json_float(value: np.float32) -> float | None:
    """The shortest decimal that is this float32; JSON has no infinity."""
    return float(str(value)) if np.isfinite(value) else None


def _json_line(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in a field that is only kept
        return json.dumps(record).encode() + b"\n"


# ---- whose output it is --------------------------------------------------------------------------


def _output_path(config: InferConfig) -> epath.Path:
    path = epath.Path(config.output)
    if config.shard is None:
        return path
    i, n = config.shard
    return path.with_name(f"{path.stem}-{i:05d}-of-{n:05d}{path.suffix}")


def _settings(
    config: InferConfig, run: SavedRun, predictor: Predictor, path: epath.Path, digest: str
) -> tuple[dict[str, Any], bool]:
    """Everything that the output depends on, and whether it was begun already.

    An output goes on with the checkpoint it was begun with, even if "latest" is another one now.
    """
    old = infer_output.read_settings(path)
    if old is not None and old.get("checkpoint") == config.checkpoint:
        step = old["step"]
    else:
        step = saved_run.checkpoint_steps(run, config.checkpoint)[-1]
    sums = run.model_dir / "checkpoints" / str(step) / "SHA256SUMS"
    model_dir = os.fspath(files.absolute(config.model_dir))
    checkpoint_digest = None
    if sums.exists():
        checkpoint_digest = hashlib.sha256(sums.read_bytes()).hexdigest()
    elif old is not None and old.get("model_dir") == model_dir:
        # A checkpoint that is gone is missed if lines are missing, and only then.
        checkpoint_digest = old.get("checkpoint_sha256")
    settings = {
        "model_dir": (old or {}).get("model_dir", model_dir),  # a run may be moved
        "checkpoint": (old or {}).get("checkpoint", config.checkpoint),
        "step": step,
        "checkpoint_sha256": checkpoint_digest,
        "input_sha256": digest,
        "field": config.field,
        "prefix": config.prefix,
        "task": config.task,
        "split": config.split if config.task else None,
        "score": config.score,
        "input_length": predictor.input_length,
        "target_length": predictor.target_length,
        "shard": "{}/{}".format(*config.shard) if config.shard else None,
        "seed": config.seed,
        **dataclasses.asdict(config.decode),
    }
    if old is not None:
        infer_output.check_settings(path, old, settings)
    return settings, old is not None


# ---- inputs --------------------------------------------------------------------------------------


def _open_source(config: InferConfig, run: SavedRun, predictor: Predictor) -> Source:
    lengths = predictor.input_length, predictor.target_length
    if config.input is None:
        from t5x_lite.infer_task import TaskSource

        return TaskSource(
            run,
            config.task or "",
            config.split,
            lengths,
            module=config.module,
            tfds_data_dir=config.tfds_data_dir,
            with_targets=config.score is not None,
        )
    inputs = FileInputs(
        config.input, file_format=config.file_format, field=config.field, target_field=config.score
    )
    _check_not_among(config, inputs.files)
    return FileSource(inputs, run.vocabulary, lengths, config.prefix)


def _check_not_among(config: InferConfig, inputs: Sequence[str]) -> None:
    """Refuses an output that is an input as well, now or when the command is run again."""
    written = [epath.Path(config.output), _output_path(config)]
    written += [infer_output.state_path(path) for path in written]
    pattern = os.path.abspath(config.input or "")
    for path in map(pathlib.PurePath, map(os.path.abspath, written)):
        matches = len(path.parts) == len(pathlib.PurePath(pattern).parts) and path.match(pattern)
        if matches or os.fspath(path) in map(os.path.abspath, inputs):
            raise UsageError(
                f"--output={config.output}: {path.name} is among the files of "
                f"--input={config.input}"
            )
