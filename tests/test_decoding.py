"""Greedy decoding against a plain loop and against Hugging Face's `generate`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from t5x_lite import decoding, evaluate

VOCAB_SIZE = 11


def greedy_by_hand(table: np.ndarray, batch_size: int, max_length: int, eos_id: int) -> np.ndarray:
    """One row and one token at a time."""
    decoded = np.zeros((batch_size, max_length), np.int32)
    for row in range(batch_size):
        prefix = [0]
        for position in range(max_length):
            logits = table[row, position, sum(prefix) % VOCAB_SIZE, prefix[-1]]
            token = int(np.argmax(logits))
            decoded[row, position] = token
            if token == eos_id:
                break
            prefix.append(token)
    return decoded


@pytest.mark.parametrize("eos_id", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_equals_a_loop_over_rows_and_tokens(seed, eos_id):
    """The logits depend on row, position, last id and the sum of all ids before."""
    batch_size, max_length = 6, 9
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(batch_size, max_length, VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE))
    table = table.astype(np.float32)
    expected = greedy_by_hand(table, batch_size, max_length, eos_id)
    assert (expected == eos_id).any()

    def next_logits(inputs, position):
        last = inputs[:, position]
        sums = jnp.sum(inputs, axis=1) % VOCAB_SIZE  # ids from the position on are 0 still
        return jnp.asarray(table)[jnp.arange(batch_size), position, sums, last]

    decode = jax.jit(lambda: decoding.greedy(next_logits, batch_size, max_length, eos_id))
    found = decode()
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
    for row in np.asarray(found):
        ends = np.flatnonzero(row == eos_id)
        assert not ends.size or not row[ends[0] + 1 :].any()


@pytest.mark.parametrize(("ends_at", "calls"), [((2, 4), 5), ((0, 0), 1), ((2, 99), 8)])
def test_stops_when_every_row_has_ended(ends_at, calls):
    max_length, made = 8, []

    def next_logits(inputs, position):
        jax.debug.callback(lambda p: made.append(int(p)), position)
        return jax.nn.one_hot(jnp.where(position >= jnp.asarray(ends_at), 1, 5), VOCAB_SIZE)

    found = np.asarray(decoding.greedy(next_logits, 2, max_length))
    jax.effects_barrier()
    assert sorted(made) == list(range(calls))
    for row, end in zip(found, ends_at, strict=True):
        expected = [5] * min(end, max_length) + [1] + [0] * max_length
        np.testing.assert_array_equal(row, expected[:max_length])


@pytest.mark.parametrize(
    ("name", "config"), [("t5_v10", "config.json"), ("t5_v11", "config_released_style.json")]
)
def test_predictions_equal_hugging_faces_greedy_ids(shared_data, name, config):
    directory = shared_data / "checkpoints" / "hf" / name
    golden = np.load(directory / "golden.npz")
    inputs = [
        ids[mask > 0]
        for ids, mask in zip(golden["input_ids"], golden["attention_mask"], strict=True)
    ]
    found = evaluate.predict(
        references.config_from_json(directory / config),
        references.params_from_hf(directory),
        inputs,
        input_length=golden["input_ids"].shape[1] + 3,  # more padding changes nothing
        max_length=golden["greedy_ids"].shape[1] - 1,
    )
    np.testing.assert_array_equal(found, golden["greedy_ids"][:, 1:])  # without the start
