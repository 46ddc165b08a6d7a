"""Examples of a task's split as inputs of `infer`."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from t5x_lite import data, saved_run
from t5x_lite.errors import UsageError, nearest
from t5x_lite.infer_inputs import Example, encode, own_fields
from t5x_lite.run_config import DataConfig
from t5x_lite.saved_run import SavedRun


class TaskSource:
    """Examples as the task makes them, with the run's vocabulary."""

    def __init__(
        self,
        run: SavedRun,
        task: str,
        split: str,
        lengths: tuple[int, int],
        *,
        module: str | None = None,
        tfds_data_dir: str | None = None,
        with_targets: bool = False,
    ):
        """Opens the split.

        Args:
          run: whose vocabulary it is to be.
          task: a task or mixture.
          split: of it.
          lengths: ids of inputs and of targets at most.
          module: a module to import first.
          tfds_data_dir: where TFDS finds prepared data sets.
          with_targets: give the ids of the targets, to score them.

        Raises:
          UsageError: the task, its split or its data is not there, or its vocabulary is not the
            run's.
        """
        self._data = DataConfig(
            task,
            {"inputs": lengths[0], "targets": lengths[1]},
            batch_size=1,
            split=split,
            eval_split=split,
            mixture_or_task_module=module,
            vocabulary_file=saved_run.vocabulary_file(run),
            tfds_data_dir=tfds_data_dir,
        )
        data.configure(self._data)
        self._provider = data.get_provider(task)
        splits = self._provider.splits
        if splits and split not in splits:
            raise UsageError(f"--split={split}: {task} has no such split; {nearest(split, splits)}")
        data.check(self._data, run.model.vocab_size)
        saved_run.check_same_vocabulary(run, self._provider)
        self._vocabulary, self._split, self._with_targets = run.vocabulary, split, with_targets

    def scan(self) -> tuple[int, str]:
        digest = hashlib.sha256()
        count = 0
        for example in self._examples():
            count += 1
            for feature in ("inputs", "targets"):
                digest.update(np.asarray(example[feature], np.int32).tobytes() + b"\n")
        if not count:
            raise UsageError(f"--task={self._provider.name}: the split {self._split!r} is empty")
        return count, digest.hexdigest()

    def examples(self, start: int, stop: int) -> Iterator[Example]:
        vocabulary, lengths = self._vocabulary, self._data.task_feature_lengths
        for example in itertools.islice(self._examples(), start, stop):
            text = data.text(example, "inputs", vocabulary)
            fields = {"targets": data.text(example, "targets", vocabulary)}
            fields |= _other_fields(example)
            record = own_fields(fields, text) | {"inputs": text}
            for feature, flag in (("inputs", "truncated"), ("targets", "targets_truncated")):
                # The task cuts in silence, which shows in what the whole text would have been.
                full = len(example[feature]) == lengths[feature]
                wanted = feature == "inputs" or self._with_targets
                if full and wanted and f"{feature}_pretokenized" in example:
                    whole = data.text(example, feature, vocabulary)
                    if encode(vocabulary, [whole], lengths[feature])[0][1]:
                        record[flag] = True
            targets = np.asarray(example["targets"], np.int32) if self._with_targets else None
            yield Example(record, np.asarray(example["inputs"], np.int32), targets)

    def _examples(self) -> Iterator[Mapping[str, np.ndarray]]:
        return data.examples(self._data, self._provider, self._split, None, data.EVAL_SEED)


def _other_fields(example: Mapping[str, Any]) -> dict[str, Any]:
    """What is neither a feature nor its text, as JSON has it."""
    known = {f"{f}{suffix}" for f in ("inputs", "targets") for suffix in ("", "_pretokenized")}
    return {name: _plain(value) for name, value in example.items() if name not in known}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return value
