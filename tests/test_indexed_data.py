"""Rows by index: the same batches whoever reads them, each row once in an epoch."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from small_run import flip_a_bit

from t5x_lite import cache_files, files, input_position, row_records
from t5x_lite.cache_files import CacheError, Manifest, Settings, Shard
from t5x_lite.errors import UsageError
from t5x_lite.indexed_data import IndexedBatches
from t5x_lite.partitioning import InputShare

LENGTHS = {"inputs": 4, "targets": 3}
SIZES = (700, 0, 311, 5)  # rows of the files; one has none
NUM_ROWS = sum(SIZES)
BATCH_SIZE = 24
SETTINGS = Settings(
    task="numbers",
    split="train",
    source="",
    feature_lengths=LENGTHS,
    packed=False,
    vocabularies={},
    dtype="uint16",
    num_shards=len(SIZES),
    num_passes=1,
    seed=0,
)
# How two hosts, or four of which two hold the same rows, share a batch; and odd parts of six.
SHARES = {
    1: [InputShare()],
    2: [InputShare(i, 2, (i,), 2) for i in range(2)],
    4: [InputShare(i, 4, (i,), 4) for i in range(4)],
    3: [InputShare(i, 3, (i, i + 3), 6) for i in range(3)],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of which row n has the inputs [n + 1]."""
    path = tmp_path_factory.mktemp("cache")
    directory = cache_files.directory_of(path, "numbers", "train")
    directory.mkdir(parents=True)
    shards, number = [], itertools.count(1)
    for index, size in enumerate(SIZES):
        file = cache_files.shard_path(directory, index, len(SIZES))
        writer = ArrayRecordWriter(str(file), "group_size:1,zstd:3")
        for n in itertools.islice(number, size):
            tokens = np.array([[n, 0, 0, 0]], np.int32)
            rows = {"encoder_input_tokens": tokens, "decoder_target_tokens": tokens[:, :3]}
            writer.write(row_records.encode(rows, "uint16")[0])
        writer.close()
        num_tokens = {"inputs": size, "targets": size}
        digest = files.sha256(file)
        shards.append(Shard(size, size, num_tokens, file.stat().length, digest))
    cache_files.finish(directory, Manifest(SETTINGS, tuple(shards)), None, {})
    return path


def open_rows(cache, seed=0, share=InputShare(), batch_size=BATCH_SIZE):  # noqa: B008
    directory, manifest = cache_files.open_complete(cache, "numbers", "train")
    return IndexedBatches(directory, manifest, batch_size, seed, share)


def numbers(batches, count: int) -> np.ndarray:
    """Which rows the next batches have, [count, rows]."""
    found = [batch["encoder_input_tokens"][:, 0] - 1 for batch in itertools.islice(batches, count)]
    return np.stack(found)


@pytest.mark.parametrize("num_shares", SHARES)
def test_the_order_does_not_depend_on_who_reads(cache, num_shares):
    whole = numbers(open_rows(cache), 60)
    assembled = np.full_like(whole, -1)
    for share in SHARES[num_shares]:
        assembled[:, share.rows(BATCH_SIZE)] = numbers(open_rows(cache, share=share), 60)
    np.testing.assert_array_equal(assembled, whole)


def test_every_row_once_in_an_epoch_and_the_next_in_another_order(cache):
    epochs = numbers(open_rows(cache), 3 * NUM_ROWS // BATCH_SIZE).reshape(3, NUM_ROWS)
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_ROWS))
        # Of a random permutation one row is at its place on average, and one follows its like.
        assert (epoch == np.arange(NUM_ROWS)).sum() < 10
        assert (np.diff(epoch) == 1).sum() < 10
    for one, other in itertools.combinations(epochs, 2):
        assert (one == other).sum() < 10


def test_the_rows_are_one_sequence_cut_into_batches(cache):
    one = numbers(open_rows(cache, batch_size=8), 6)
    np.testing.assert_array_equal(one.reshape(2, 24), numbers(open_rows(cache), 2))


def test_another_seed_is_another_order_in_every_epoch(cache):
    """Grain's own seeds are added to the number of the epoch."""
    count = 2 * NUM_ROWS // BATCH_SIZE + 1
    one, other = (numbers(open_rows(cache, seed), count).reshape(-1) for seed in (0, 1))
    assert (one[:NUM_ROWS] == other[:NUM_ROWS]).sum() < 10
    assert (one[NUM_ROWS : 2 * NUM_ROWS] == other[:NUM_ROWS]).sum() < 10
    np.testing.assert_array_equal(numbers(open_rows(cache, 2**70), 1).shape, (1, BATCH_SIZE))


def test_restored_by_any_number_of_processes(cache):
    """Also beyond the first epoch. The position is the same on all of them."""
    count = 50
    batches = open_rows(cache)
    numbers(batches, count)
    position = batches.position()
    following = numbers(batches, 5)
    for shares in SHARES.values():
        for share in shares:
            restored = open_rows(cache, share=share)
            assert position != restored.position()
            restored.restore(position)
            assert restored.position() == position
            np.testing.assert_array_equal(
                numbers(restored, 5), following[:, share.rows(BATCH_SIZE)]
            )
    assert input_position.fits_any_processes(position)
    assert not input_position.fits_any_processes(b"PK\3\4")
    batches.restore(position)  # back, in the iterator that went on
    np.testing.assert_array_equal(numbers(batches, 5), following)


def test_what_cannot_go_on_is_refused(cache):
    directory, manifest = cache_files.open_complete(cache, "numbers", "train")
    batches = open_rows(cache)
    with pytest.raises(UsageError, match="that of a stream, not of a cache: go on without CACHE"):
        batches.restore(b"PK\3\4")
    with pytest.raises(UsageError, match="the run began with seed 7, not 0"):
        batches.restore(open_rows(cache, seed=7).position())
    with pytest.raises(UsageError, match="the run began with batch_size 8, not 24"):
        batches.restore(open_rows(cache, batch_size=8).position())
    other = open_rows(cache)
    other._order = other._order | {"first_records": [3, 2, 1, 0]}
    with pytest.raises(UsageError, match=r"first_records \[3, 2, 1, 0\], not"):
        batches.restore(other.position())  # as another version of Grain might have it
    changed = dataclasses.replace(manifest, settings=dataclasses.replace(SETTINGS, seed=1))
    other = IndexedBatches(directory, changed, BATCH_SIZE, 0)
    with pytest.raises(UsageError, match="does not hold the rows that the run began with"):
        batches.restore(other.position())
    with pytest.raises(UsageError, match=r"has 1,016 rows; BATCH_SIZE = 1017 needs at least"):
        open_rows(cache, batch_size=NUM_ROWS + 1)


def copy_of(cache, to):
    shutil.copytree(cache, to)
    return to, cache_files.directory_of(to, "numbers", "train")


def test_files_that_are_not_whole(cache, tmp_path):
    copy, directory = copy_of(cache, tmp_path / "copy")
    file = cache_files.shard_path(directory, 2, len(SIZES))
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(CacheError, match=rf"{file.name} has .* bytes instead of .* repairs it"):
        open_rows(copy)
    file.unlink()
    with pytest.raises(CacheError, match=rf"{file.name} is missing: .*t5x_lite cache numbers"):
        open_rows(copy)
    file.write_bytes(data)
    (directory / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(CacheError, match="has format 9, this version reads 1"):
        open_rows(copy)
    (directory / "manifest.json").write_text("{")
    with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
        open_rows(copy)
    (directory / "manifest.json").unlink()
    with pytest.raises(UsageError, match="is not complete; the same command"):
        open_rows(copy)


def test_no_such_cache(cache):
    with pytest.raises(UsageError, match=r"has no split 'train' of numbrs \(did you mean 'numbers"):
        cache_files.open_complete(cache, "numbrs", "train")
    with pytest.raises(UsageError, match="make it with `python -m t5x_lite cache numbers --output"):
        cache_files.open_complete(cache / "no", "numbers", "train")


def test_a_flipped_bit_is_never_trained_on(cache, tmp_path):
    """Its size is right: it is noticed when the record is read."""
    copy, directory = copy_of(cache, tmp_path / "copy")
    flip_a_bit(directory / "rows-00000-of-00004.array_record")
    with pytest.raises(CacheError, match=r"cannot be read \(Corrupted .*run again, repairs it"):
        numbers(open_rows(copy), NUM_ROWS // BATCH_SIZE + 1)


def test_reading_needs_neither_tensorflow_nor_seqio(cache):
    code = (
        "import sys; from t5x_lite import cache_files, indexed_data\n"
        f"d, m = cache_files.open_complete({str(cache)!r}, 'numbers', 'train')\n"
        "next(indexed_data.IndexedBatches(d, m, 8, 0))\n"
        "sys.exit(bool({'tensorflow', 'seqio', 'gin'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_position_is_small_and_readable(cache):
    batches = open_rows(cache)
    numbers(batches, 3)
    position = json.loads(batches.position())
    assert position["step"] == 3 and position["seed"] == 0
    assert len(batches.position()) < 300
    again = open_rows(cache)
    assert position["first_records"] == numbers(again, 1)[0, :4].tolist()
