"""Tasks over a user's own files: text (a document per line), JSONL, or gzip of either.

The files are read once before training: every line is checked, the validation documents are set
apart, and the texts are kept as TFRecord shards in the cache directory, per input file, so that
what is unchanged is not read again. Training reads the shards with tf.data alone, whose iterator
can be saved and which hosts can share by shard.
"""

import dataclasses
import functools
from collections.abc import Callable

import tensorflow as tf

from t5x_lite.errors import UsageError
from tasks import conversion, registration, shards, vocabularies


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Which files, and how they are read.

    Attributes:
      pattern: a glob (`**` for any depth), local or of an object store. Gzip is recognised by
        content.
      field: the field of a JSONL line that holds the text; None for plain text.
      validation_pattern: files whose documents are the validation split. Without it, the share
        below is taken from the others.
      validation_share: share of the documents set apart, chosen by a hash of their text: the same
        ones wherever they stand, and equal texts on the same side.
      skip_corrupt_lines: count and leave out lines that cannot be read, instead of stopping.
    """

    pattern: str
    field: str | None = None
    validation_pattern: str | None = None
    validation_share: float = 0.01
    skip_corrupt_lines: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise UsageError(
                f"TEXT_FILES_VALIDATION_SHARE is {self.validation_share}; it must be at least 0 "
                "and less than 1"
            )


@functools.cache
def prepare(files: TextFiles) -> dict[str, shards.Split]:
    """Checks and converts the files, as far as that is not done: "train" and "validation".

    Raises:
      UsageError: a pattern matches no file, a line is corrupt and `skip_corrupt_lines` is False,
        or no document is left.
    """
    separate = files.validation_pattern is not None
    share = 0.0 if separate else files.validation_share
    inputs = [(file, share) for file in _matches("TEXT_FILES_PATTERN", files.pattern)]
    if files.validation_pattern is not None:
        matched = _matches("TEXT_FILES_VALIDATION_PATTERN", files.validation_pattern)
        both = sorted(set(matched) & {file for file, _ in inputs})
        if both:
            raise UsageError(
                f"{both[0]} matches TEXT_FILES_PATTERN {files.pattern!r} and "
                f"TEXT_FILES_VALIDATION_PATTERN {files.validation_pattern!r}; it can only be in one"
            )
        inputs += [(file, 1.0) for file in matched]
    splits = conversion.convert(inputs, files.field, files.skip_corrupt_lines)
    if not splits["train"].num_examples:
        raise UsageError(f"TEXT_FILES_PATTERN {files.pattern!r}: no text to train on")
    return splits


def _matches(macro: str, pattern: str) -> list[str]:
    matched = conversion.match_files(pattern)
    if not matched:
        raise UsageError(f"{macro} {pattern!r} matches no file")
    return matched


class TextFilesSource(shards.ShardSource):
    """Examples {"text": string}; `get_files` is asked whenever the data is used."""

    def __init__(self, get_files: Callable[[], TextFiles]) -> None:
        super().__init__(splits=["train", "validation"])
        self._get_files = get_files

    def prepare(self, split: str) -> shards.Split:
        files = self._get_files()
        found = prepare(files)[split]
        if not found.num_examples:
            raise UsageError(
                f"TEXT_FILES_PATTERN {files.pattern!r}: no document fell into the {split} split; "
                "raise TEXT_FILES_VALIDATION_SHARE or set TEXT_FILES_VALIDATION_PATTERN"
            )
        return found

    def read(self, files: tf.data.Dataset, split: str, shuffle: bool) -> tf.data.Dataset:
        texts = shards.interleave(files)
        return texts.map(lambda text: {"text": text}, num_parallel_calls=tf.data.AUTOTUNE)


# ---- registration --------------------------------------------------------------------------------

_configured: TextFiles | None = None


def configure(files: TextFiles) -> None:
    """Sets what the `text_files_*` tasks read."""
    global _configured
    _configured = files


def _get_configured() -> TextFiles:
    if _configured is None:
        raise UsageError(
            "the text_files tasks need TEXT_FILES_PATTERN, for example "
            "--gin.TEXT_FILES_PATTERN=\"'texts/*.txt.gz'\" (for JSONL also TEXT_FILES_FIELD)"
        )
    return _configured


def register_configured() -> None:
    """Registers `text_files_span_corruption` and its siblings, over what `configure` sets later."""
    registration.register_objectives(
        "text_files", TextFilesSource(_get_configured), vocabularies.DEFAULT
    )
