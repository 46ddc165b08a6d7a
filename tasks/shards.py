"""TFRecord shards in the cache directory: written once, then read by tf.data alone."""

import abc
import dataclasses
import hashlib
import os
import pathlib
import uuid
from collections.abc import Sequence

import seqio
import tensorflow as tf

from tasks import cache


@dataclasses.dataclass(frozen=True)
class Split:
    """The shards of a split and the number of examples in them."""

    shards: tuple[str, ...]
    num_examples: int


class ShardWriter:
    """Writes records to TFRecord files that appear under their names when they are complete.

    A shard is named by a digest of what it holds, so that the same input has the same shards on
    every machine, whenever it was converted.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        """The shards are `<directory>/<digest>.tfrecord`."""
        self.num_records = 0
        self.shard_bytes = 0  # of the records in the shard that is being written
        self._directory = directory
        self._content = hashlib.sha256()
        self._shards: list[str] = []
        self._writer: tf.io.TFRecordWriter | None = None
        self._temporary = ""

    def write(self, record: bytes) -> None:
        """Adds a record to the shard that is being written; if there is none, to a new one.

        Raises:
          UsageError: the cache directory cannot be written.
        """
        if self._writer is None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._temporary = str(self._directory / f"{uuid.uuid4().hex}.tmp")
                self._writer = tf.io.TFRecordWriter(self._temporary)
            except OSError as e:
                raise cache.not_writable(e) from e
        self._writer.write(record)
        self._content.update(len(record).to_bytes(8, "little"))
        self._content.update(record)
        self.num_records += 1
        self.shard_bytes += len(record)

    def end_shard(self, meaning: str = "") -> None:
        """Completes the shard that is being written, if one is.

        Args:
          meaning: what its records mean beyond their bytes; goes into the name.
        """
        if self._writer is not None:
            self._writer.close()
            self._content.update(meaning.encode())
            path = self._directory / f"{self._content.hexdigest()[:32]}.tfrecord"
            os.replace(self._temporary, path)
            self._shards.append(str(path))
            self._writer = None
            self._content = hashlib.sha256()
            self.shard_bytes = 0

    def finish(self) -> list[str]:
        """Completes the last shard; returns the paths of all, which need not differ."""
        self.end_shard()
        return self._shards

    def discard(self) -> None:
        """Removes what is unfinished, if anything is."""
        if self._writer is not None:
            self._writer.close()
            os.unlink(self._temporary)
            self._writer = None


class ShardSource(seqio.DataSource):
    """Examples from shards that are made on first use; they can be resumed and shared by hosts."""

    @abc.abstractmethod
    def prepare(self, split: str) -> Split:
        """Makes the shards of a split, as far as that is not done."""

    @abc.abstractmethod
    def read(self, files: tf.data.Dataset, split: str, shuffle: bool) -> tf.data.Dataset:
        """Paths of shards (string []) -> their examples."""

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return self.prepare(split).shards

    def num_input_examples(self, split: str) -> int:
        return self.prepare(split).num_examples

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused_kwargs: object,
    ) -> tf.data.Dataset:
        shards = self.prepare(split).shards
        files = tf.data.Dataset.from_tensor_slices(list(shards))
        if shard_info:
            files = files.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            files = files.shuffle(len(shards), seed=seed)
        return self.read(files, split, shuffle)


def interleave(
    files: tf.data.Dataset, num_files: int = 16, block_length: int = 16
) -> tf.data.Dataset:
    """Paths of shards (string []) -> their records (string []).

    Args:
      files: the paths.
      num_files: that are read at a time.
      block_length: records in a row from one of them.
    """
    return files.interleave(
        tf.data.TFRecordDataset,
        cycle_length=num_files,
        block_length=block_length,
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
