"""What a run is, left in MODEL_DIR before its first step: config.gin, model.json, vocabulary.model.

`saved_run` reads it back.
"""

import json
import os
import pathlib
import tempfile
import time
from typing import Any

import jax
from etils import epath

from t5x_lite import files, setup
from t5x_lite.distributed import from_process_0, is_coordinator, processes_where
from t5x_lite.errors import UsageError
from t5x_lite.interop.vocabularies import same_vocabulary
from t5x_lite.models import t5
from t5x_lite.run_config import TrainConfig

# A copy of the SentencePiece model: the run can be read without the original.
VOCABULARY_FILE = "vocabulary.model"
MODEL_FILE = "model.json"
# The architecture of a converted checkpoint as a gin file.
MODEL_GIN = "model.gin"

_SECONDS_TO_APPEAR = 5.0


def check_writable(model_dir: str) -> None:
    """Raises UsageError if MODEL_DIR cannot be written or made; writes nothing."""
    if not files.is_local(model_dir):
        return
    path = pathlib.Path(model_dir).absolute()
    while not path.exists():
        path = path.parent
    problem = None
    if not path.is_dir():
        problem = f"{path} is not a directory"
    elif not os.access(path, os.W_OK | os.X_OK):
        problem = f"no permission to write in {path}"
    if problem:
        raise UsageError(f"MODEL_DIR = {model_dir!r} cannot be written: {problem}")


def check_shared(model_dir: str) -> None:
    """Looks whether MODEL_DIR is one directory for all processes; makes it if it is not there.

    Raises:
      UsageError: some process does not see in it what process 0 has written.
    """
    if jax.process_count() == 1 or not files.is_local(model_dir):
        return
    directory = pathlib.Path(model_dir)
    name = from_process_0(lambda: _write_probe(directory))
    blind = processes_where(not _appears(directory / name))
    if is_coordinator():
        (directory / name).unlink(missing_ok=True)
    if blind:
        raise UsageError(
            f"MODEL_DIR = {model_dir!r} is another directory on process "
            f"{', '.join(map(str, blind))} than on process 0: give one on a shared file system, or "
            "in an object store like gs://"
        )


def _write_probe(directory: pathlib.Path) -> str:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix=".shared-", dir=directory)
        os.close(handle)
    except OSError as e:
        raise UsageError(f"MODEL_DIR = {str(directory)!r} cannot be written: {e.strerror}") from e
    return os.path.basename(path)


def _appears(path: pathlib.Path) -> bool:
    """NFS may remember for some seconds that a file was not there; listing asks again."""
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while True:
        try:
            if path.name in os.listdir(path.parent):
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def check_same_text(model_dir: epath.Path, config: TrainConfig, data: setup.Input) -> None:
    """Refuses to go on with other ids or other text than the run began with.

    The gin bindings name files; what is in them can change under the same name.
    """
    from t5x_lite.data import source_shards, vocabulary_content

    path = model_dir / VOCABULARY_FILE
    content = vocabulary_content(data.provider)
    if path.exists() and not same_vocabulary(path.read_bytes(), content):
        raise UsageError(
            f"the vocabulary of {data.provider.name} is no longer the one this run began with, "
            f"which is kept in {path}: its ids mean something else"
        )
    saved = _read_description(model_dir).get("source_shards")
    if saved is not None and saved != source_shards(data.provider, config.data.split):
        raise UsageError(
            f"the text files or tables of {data.provider.name} are no longer those that "
            f"{str(model_dir)!r} began with: put them back, or use another MODEL_DIR"
        )


def check_initial_vocabulary(path: str, data: setup.Input) -> None:
    """Refuses to start from parameters that were trained with other ids than this run's.

    Args:
      path: INITIAL_CHECKPOINT_PATH: a MODEL_DIR, its checkpoints, or one of them.
      data: the run's.
    """
    from t5x_lite.data import vocabulary_content

    folder = run_of(path)
    if folder is not None:
        saved = folder / VOCABULARY_FILE
        content = saved.read_bytes() if saved.exists() else None
        if not same_vocabulary(content, vocabulary_content(data.provider)):
            raise UsageError(
                f"INITIAL_CHECKPOINT_PATH = {path!r} was trained with another vocabulary than that "
                f"of {data.provider.name}: its ids mean something else; give VOCABULARY_FILE = "
                f"{str(saved) if content else 'bytes'!r}, or another task"
            )


def run_of(path: str) -> epath.Path | None:
    """The MODEL_DIR of a checkpoint that is named by it, its checkpoints or one of them."""
    start = epath.Path(path)
    folders = (start, start.parent, start.parent.parent)
    return next((folder for folder in folders if (folder / MODEL_FILE).exists()), None)


def converted_step(model_dir: epath.Path) -> int | None:
    """The step of the checkpoint that `convert` put into MODEL_DIR; None if it did not."""
    return (_read_description(model_dir).get("converted_from") or {}).get("step")


def _read_description(folder: epath.Path | None) -> dict[str, Any]:
    """What `model.json` says; empty if there is none."""
    if folder is None or not (folder / MODEL_FILE).exists():
        return {}
    return json.loads((folder / MODEL_FILE).read_text())


def _origin(model_dir: epath.Path, initial: str | None) -> dict[str, Any] | None:
    """The foreign checkpoint that the run goes back to, by its beginning in MODEL_DIR or by
    INITIAL_CHECKPOINT_PATH."""
    for folder in (model_dir, run_of(initial) if initial else None):
        if origin := _read_description(folder).get("converted_from"):
            return origin
    return None


def write(model_dir: epath.Path, config: TrainConfig, config_text: str, data: setup.Input) -> None:
    """Writes config.gin and model.json, before anything else of a run; process 0 does.

    Every process calls it, and goes on when they are there.
    """
    from_process_0(lambda: _write(model_dir, config, config_text, data))


def _write(model_dir: epath.Path, config: TrainConfig, config_text: str, data: setup.Input) -> None:
    from t5x_lite.data import source_shards, vocabulary_content, vocabulary_description

    description = {
        "architecture": {"family": "t5", **config.model.to_dict()},
        "num_parameters": t5.num_parameters(config.model),
        "task": config.data.mixture_or_task_name,
        "feature_lengths": dict(config.data.task_feature_lengths),
        "vocabulary": vocabulary_description(data.provider),
        "source_shards": source_shards(data.provider, config.data.split),
        "converted_from": _origin(model_dir, config.initial_checkpoint_path),
    }
    content = vocabulary_content(data.provider)
    try:
        if content is not None:
            files.write_atomically(model_dir / VOCABULARY_FILE, content)
        files.write_atomically(model_dir / "config.gin", config_text.encode())
        text = json.dumps(description, indent=2) + "\n"
        files.write_atomically(model_dir / MODEL_FILE, text.encode())
    except OSError as e:
        raise UsageError(f"MODEL_DIR = {str(model_dir)!r} cannot be written: {e.strerror}") from e
