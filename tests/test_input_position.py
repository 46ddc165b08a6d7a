"""Who may go on from a saved position."""

import pytest
import tensorflow as tf

from t5x_lite import input_position
from t5x_lite.data import TrainBatches
from t5x_lite.errors import UsageError
from t5x_lite.partitioning import InputShare


def stream(share: InputShare) -> TrainBatches:
    numbers = tf.data.Dataset.range(20).shuffle(20, seed=1).map(lambda n: {"n": n})
    return TrainBatches(numbers, share)


def test_a_stream_goes_on_in_its_own_share_alone():
    share = InputShare(1, 2, (1,), 2)
    batches = stream(share)
    first = [int(next(batches)["n"]) for _ in range(5)]
    position = batches.position()
    rest = [int(batch["n"]) for batch in batches]
    assert sorted(first + rest) == list(range(20))
    again = stream(share)
    again.restore(position)
    assert [int(batch["n"]) for batch in again] == rest
    for other in (InputShare(), InputShare(0, 2, (0,), 2), InputShare(1, 4, (1,), 4)):
        named = rf"is of share 1 of 2 .* reads share {other.index} of {other.count}, .* CACHE_DIR"
        with pytest.raises(UsageError, match=named):
            stream(other).restore(position)
    assert not input_position.fits_any_processes(position)


def test_a_position_in_a_cache_is_not_one_in_a_stream():
    position = input_position.indexed({"step": 7})
    assert input_position.read_indexed(position) == {"input": "indexed", "step": 7}
    assert input_position.fits_any_processes(position)
    with pytest.raises(UsageError, match="that of a cache: give the run its CACHE_DIR"):
        stream(InputShare()).restore(position)
