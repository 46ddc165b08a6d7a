"""What a training run has left, read from MODEL_DIR alone, for evaluation and inference.

No task has to be registered and no gin file is read.
"""

import dataclasses
import functools
import json
import logging
import os
from typing import TYPE_CHECKING, Any

import jax
import sentencepiece
from etils import epath

from t5x_lite import best
from t5x_lite.checkpoints import CheckpointError, restore_params
from t5x_lite.errors import UsageError, nearest
from t5x_lite.integrity import find_damage, is_committed, scan
from t5x_lite.interop import recognise
from t5x_lite.interop.vocabularies import BYTES, same_vocabulary
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.partitioning import Partitioning
from t5x_lite.run_files import MODEL_FILE, VOCABULARY_FILE

if TYPE_CHECKING:
    import seqio

_WHICH = ("latest", "best", "all")
_BYTES_WITHOUT_SENTINELS = 259  # and pad, eos and unk

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run, finished or still training.

    Attributes:
      model_dir: what the run had as MODEL_DIR.
      model: the architecture.
      task: the task or mixture that it was trained on; None for a converted checkpoint.
      feature_lengths: tokens of each feature, {"inputs": 512, "targets": 114}.
      num_ids: of its vocabulary.
      has_bytes: whether that is bytes, and not a SentencePiece model.
      converted_from: the checkpoint of another program that it, or what it was initialised from,
        was made of, as `convert` wrote it; empty if there is none.
    """

    model_dir: epath.Path
    model: T5Config
    task: str | None
    feature_lengths: dict[str, int]
    num_ids: int
    has_bytes: bool
    converted_from: dict[str, Any]

    @functools.cached_property
    def vocabulary(self) -> "seqio.Vocabulary":
        """Of inputs and targets; its sentinels are pieces of the model file itself."""
        import seqio  # seconds of TensorFlow, which who moves parameters can do without

        if self.has_bytes:
            return seqio.ByteVocabulary(extra_ids=self.num_ids - _BYTES_WITHOUT_SENTINELS)
        return seqio.SentencePieceVocabulary(vocabulary_file(self), extra_ids=0)


def read(model_dir: epath.PathLike) -> SavedRun:
    """Reads `model.json` and the vocabulary; parameters are left for `load_params`.

    Raises:
      UsageError: `model_dir` is not a run's, or one of the two cannot be read as what it is.
    """
    given = f"MODEL_DIR {os.fspath(model_dir)!r}"
    hint = functools.partial(recognise.hint, os.fspath(model_dir))
    if recognise.is_address(os.fspath(model_dir)):
        raise UsageError(f"{given} is not a directory{hint()}")
    model_dir = epath.Path(model_dir)
    if not model_dir.is_dir():
        raise UsageError(f"{given} is not a directory{hint()}")
    path = model_dir / MODEL_FILE
    if not path.is_file():
        raise UsageError(f"{given} is not a run: it has no {MODEL_FILE}{hint()}")
    try:
        description = json.loads(path.read_text())
        architecture = dict(description["architecture"])
        task, lengths = description["task"], dict(description["feature_lengths"])
        vocabulary = dict(description["vocabulary"])
        family = architecture.pop("family")
        origin = dict(description.get("converted_from") or {})
    except (ValueError, TypeError, KeyError) as e:
        what = f"{e} is missing" if isinstance(e, KeyError) else str(e)
        raise UsageError(f"{path} is not what a run has written: {what}") from e
    if family != "t5":
        raise UsageError(f"{path}: architecture {family!r}; known: 't5'")
    model = T5Config.from_dict(architecture)
    _check_vocabulary(model_dir, vocabulary)
    if vocabulary["size"] > model.vocab_size:
        raise UsageError(
            f"{path}: the vocabulary has {vocabulary['size']} ids, the model {model.vocab_size} "
            "rows of embedding"
        )
    has_bytes = vocabulary["class"] == "ByteVocabulary"
    return SavedRun(model_dir, model, task, lengths, vocabulary["size"], has_bytes, origin)


def _check_vocabulary(model_dir: epath.Path, description: dict[str, Any]) -> None:
    """Raises UsageError unless the vocabulary that `model.json` describes is there."""
    kind, size = description.get("class"), description.get("size")
    if not isinstance(size, int):
        raise UsageError(f"{model_dir / MODEL_FILE}: vocabulary has no size")
    if kind == "ByteVocabulary":
        # 259, or 359 of runs from before sentinels were bytes.
        if size < _BYTES_WITHOUT_SENTINELS:
            raise UsageError(
                f"{model_dir / MODEL_FILE}: a vocabulary of bytes has at least "
                f"{_BYTES_WITHOUT_SENTINELS} ids, not {size}"
            )
        return
    path = model_dir / VOCABULARY_FILE
    if kind != "SentencePieceVocabulary":
        raise UsageError(
            f"the run's vocabulary is a {kind}, which MODEL_DIR {os.fspath(model_dir)!r} does not "
            "hold; only SentencePiece models and bytes are kept"
        )
    if not path.is_file():
        raise UsageError(f"{path} is missing: the ids of the run mean nothing without it")
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        found = len(pieces) if pieces.LoadFromSerializedProto(path.read_bytes()) else 0
    except RuntimeError as e:
        raise UsageError(f"{path} is not a SentencePiece model") from e
    if found != size:
        raise UsageError(
            f"{path} has {found} ids, but {MODEL_FILE} says {size}: it is another run's"
        )


def checkpoint_steps(run: SavedRun, which: str) -> list[int]:
    """The steps that `which` names, ascending.

    Args:
      run: from `read`.
      which: "latest" (the newest whose parameters are intact, with a warning for each newer one),
        "best" (by the run's BEST_METRIC), "all", or steps like "1000,2000".

    Raises:
      UsageError: there is no such step; says which there are.
      CheckpointError: there are steps, but none is intact.
    """
    directory = run.model_dir / "checkpoints"
    steps = [step for step in scan(directory).steps if is_committed(directory / str(step))]
    if not steps:
        raise UsageError(f"no checkpoint under {directory}")
    if which == "all":
        return steps
    if which == "latest":
        return [_newest_intact(directory, steps)]
    if which == "best":
        wanted = [_best_step(run.model_dir)]
    else:
        parts = [part.strip() for part in which.split(",")]
        if not all(part.isdecimal() for part in parts):
            word = next(part for part in parts if not part.isdecimal())
            raise UsageError(
                f"--checkpoint={which}: give a step, or steps like 1000,2000, or one of "
                f"{', '.join(_WHICH)}; {nearest(word, _WHICH)}"
            )
        wanted = sorted({int(part) for part in parts})
    for step in wanted:
        if step not in steps:
            there = ", ".join(map(str, steps))
            raise UsageError(
                f"--checkpoint={which}: no step {step} under {directory}; there: {there}"
            )
    return wanted


def _newest_intact(directory: epath.Path, steps: list[int]) -> int:
    problems = []
    for step in reversed(steps):
        problem = find_damage(directory / str(step), "params/")
        if problem is None:
            return step
        problems.append(f"step {step}: {problem}")
        _log.warning("checkpoint skipped under %s: %s", directory, problems[-1])
    raise CheckpointError(f"no checkpoint under {directory} is intact: {'; '.join(problems)}")


def _best_step(model_dir: epath.Path) -> int:
    path = model_dir / best.FILE_NAME
    if not path.is_file():
        raise UsageError(
            f"--checkpoint=best: {path} is not there; a run trained with BEST_METRIC writes it "
            "at its first evaluation"
        )
    try:
        return int(json.loads(path.read_text())["step"])
    except (ValueError, TypeError, KeyError) as e:
        raise UsageError(f"{path} is not what a run has written: it names no step") from e


def load_params(run: SavedRun, step: int, partitioning: Partitioning) -> Any:
    """The parameters of a checkpoint, placed on the devices.

    Returns:
      A nested dict of float32 arrays.

    Raises:
      UsageError: the step is not there, its parameters differ from the architecture in names or
        shapes, or they do not divide over the mesh.
      CheckpointError: the step is damaged.
    """
    axes = t5.logical_axes(run.model)
    shapes = jax.eval_shape(lambda key: t5.init(run.model, key), jax.random.key(0))
    partitioning.check_divisible(shapes, axes)
    abstract = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        partitioning.shardings(axes),
    )
    return restore_params(run.model_dir / "checkpoints" / str(step), abstract).state


def is_untouched(run: SavedRun, step: int) -> bool:
    """Whether a checkpoint is as `convert` has made it: no training has come to it."""
    position = run.model_dir / "checkpoints" / str(step) / "input_position"
    return run.converted_from.get("step") == step and not position.exists()


def vocabulary_file(run: SavedRun) -> str:
    """What VOCABULARY_FILE is to be for tasks without a vocabulary of their own."""
    return BYTES if run.has_bytes else os.fspath(run.model_dir / VOCABULARY_FILE)


def check_same_vocabulary(run: SavedRun, provider: "seqio.Task | seqio.Mixture") -> None:
    """Raises UsageError for a task whose ids mean something else than the run's."""
    import seqio

    from t5x_lite import data

    for task in provider.tasks if isinstance(provider, seqio.Mixture) else [provider]:
        own = data.target_vocabulary(task)
        if own.vocab_size == run.vocabulary.vocab_size:
            content = data.vocabulary_content(task)
            if same_vocabulary(content, getattr(run.vocabulary, "sp_model", None)):
                continue
        raise UsageError(
            f"{task.name} has a vocabulary of its own, which is not that of the run "
            f"({vocabulary_file(run)}): its ids mean something else to the model"
        )
