"""Training rows by index, from a cache: their order is a function of the seed and the step alone.

Row r of batch s is record `order[s * batch_size + r]`, where `order` goes through all records once
in each epoch, shuffled anew (Grain's index shuffle, which needs no memory). So a batch is the same
whoever reads which of its rows, and the position is the step.
"""

import sys
from collections.abc import Iterable, Sequence

import grain
import numpy as np
from etils import epath
from grain.sources import ArrayRecordDataSource

from t5x_lite import cache_files, input_position, row_records
from t5x_lite.cache_files import CacheError, Manifest
from t5x_lite.errors import UsageError
from t5x_lite.partitioning import InputShare

Batch = dict[str, np.ndarray]

# Grain shuffles indices of 32 bits.
_MAX_RECORDS = 1 << 32
# Batches that are read ahead, by as many threads; each reads the files of a batch side by side.
_BATCHES_AHEAD = 4


class IndexedBatches:
    """An endless iterator of this process's rows of the batches 0, 1, 2, ... of a cache.

    Each batch is a dict of int32 [batch_size / shares, length] arrays, see
    `packing.model_features`.
    """

    def __init__(
        self,
        directory: epath.Path,
        manifest: Manifest,
        batch_size: int,
        seed: int,
        share: InputShare = InputShare(),  # noqa: B008 - frozen
    ):
        """Opens no file yet.

        Args:
          directory: of the cache, from `cache_files.open_complete`.
          manifest: from there, too.
          batch_size: rows of the global batch.
          seed: fixes the order.
          share: what of each batch to read.

        Raises:
          UsageError: the cache has fewer rows than one batch, or more than can be shuffled.
        """
        num_rows = manifest.num_rows
        if not batch_size <= num_rows < _MAX_RECORDS:
            raise UsageError(
                f"{directory} has {num_rows:,} rows; BATCH_SIZE = {batch_size} needs at least as "
                f"many, and at most {_MAX_RECORDS - 1:,} can be shuffled"
            )
        batches = _Batches(directory, manifest, batch_size, seed, share)
        self._step = 0
        # What the order follows from. Another version of Grain may shuffle otherwise: the first
        # records show it.
        self._order = {
            "batch_size": batch_size,
            "seed": seed,
            "fingerprint": manifest.fingerprint,
            "first_records": batches.order(range(4)),
        }
        self._directory = directory
        read = grain.ReadOptions(num_threads=_BATCHES_AHEAD, prefetch_buffer_size=_BATCHES_AHEAD)
        self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(read))

    def __iter__(self) -> "IndexedBatches":
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          CacheError: a file is missing or damaged.
        """
        batch = next(self._iterator)
        self._step += 1
        return batch

    def position(self) -> bytes:
        """How many batches were read, and of what; the same on every process."""
        return input_position.indexed(self._order | {"step": self._step})

    def restore(self, position: bytes) -> None:
        """Goes to where `position` was taken, by whatever number of processes; reads nothing.

        Raises:
          UsageError: it was taken in other rows or in another order.
        """
        found = input_position.read_indexed(position)
        if found is None:
            raise UsageError(
                "the checkpoint's input position is that of a stream, not of a cache: go on "
                "without CACHE_DIR, or use another MODEL_DIR"
            )
        changed = [name for name, value in self._order.items() if found[name] != value]
        if "fingerprint" in changed:
            raise UsageError(
                f"{self._directory} does not hold the rows that the run began with: put back the "
                f"cache with the fingerprint {found['fingerprint'][:16]}..., or use another "
                "MODEL_DIR"
            )
        if changed:
            name = changed[0]
            raise UsageError(
                f"the run began with {name} {found[name]}, not {self._order[name]}: the order of "
                "its rows follows from that"
            )
        self._step = found["step"]
        self._iterator.set_state({"next_index": found["step"]})


class _Batches:
    """This process's rows of every batch, by the batch's number: a data source for Grain."""

    def __init__(
        self,
        directory: epath.Path,
        manifest: Manifest,
        batch_size: int,
        seed: int,
        share: InputShare,
    ):
        settings, num_rows = manifest.settings, manifest.num_rows
        self._settings = settings
        self._directory = directory
        self._batch_size = batch_size
        self._rows = share.rows(batch_size)
        # With their numbers of records no file needs to be opened before it is read.
        paths = [
            f"{cache_files.shard_path(directory, i, settings.num_shards)}[0:{shard.num_rows}]"
            for i, shard in enumerate(manifest.shards)
            if shard.num_rows
        ]
        self._records = ArrayRecordDataSource(paths)
        # Grain adds the epoch to the seed: neighbouring seeds would have each other's epochs.
        spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._order = grain.MapDataset.range(num_rows).shuffle(seed=spread).repeat()

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, step: int) -> Batch:
        return self._read(self.order((int(step) * self._batch_size + self._rows).tolist()))

    def order(self, places: Iterable[int]) -> list[int]:
        """The numbers of the records at these places of the sequence."""
        return [self._order[place] for place in places]

    def _read(self, records: Sequence[int]) -> Batch:
        settings = self._settings
        try:
            return row_records.decode(
                self._records.__getitems__(records),
                settings.feature_lengths,
                packed=settings.packed,
                dtype=settings.dtype,
            )
        except (RuntimeError, ValueError) as e:
            problem = " ".join(str(e).split())
            raise CacheError(
                f"a record of {self._directory} cannot be read ({problem}); the `cache` command "
                "that made it, run again, repairs it"
            ) from e
