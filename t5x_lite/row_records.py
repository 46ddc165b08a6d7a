"""A row of a batch as one record of a file, and back: numpy alone.

A record is a flat array of little-endian unsigned integers, of 16 bits (`uint16`) or of 32:

    N                       examples in the row; 1 if rows are not packed
    N lengths               of the inputs of each example
    N lengths               of the targets of each
    the inputs' ids         one example after the other
    the targets' ids

without padding, of which everything else that the model sees follows: positions, segments, the
decoder's inputs, weights.
"""

from collections.abc import Mapping, Sequence

import numpy as np

# Where each feature goes, in the order of the record.
_SIDES = {"inputs": "encoder", "targets": "decoder"}
_TOKENS = {"inputs": "encoder_input_tokens", "targets": "decoder_target_tokens"}


def dtype_for(vocab_size: int, lengths: Mapping[str, int]) -> str:
    """The smallest type that holds every id and every length: "uint16" or "uint32"."""
    largest = max(vocab_size, *lengths.values())
    return "uint16" if largest < 1 << 16 else "uint32"


def encode(batch: Mapping[str, np.ndarray], dtype: str) -> list[bytes]:
    """A record for each row of a batch.

    Args:
      batch: int32 [R, length] arrays as `packing.model_features` makes them.
      dtype: from `dtype_for`.
    """
    little = np.dtype(dtype).newbyteorder("<")
    records = []
    for row in range(len(batch[_TOKENS["inputs"]])):
        lengths: list[np.ndarray] = []
        ids: list[np.ndarray] = []
        for feature, side in _SIDES.items():
            tokens = batch[_TOKENS[feature]][row]
            segments = batch.get(f"{side}_segment_ids")
            if segments is None:
                used = np.trim_zeros(tokens, "b")
                lengths.append(np.array([len(used)]))
            else:
                used = tokens[segments[row] > 0]
                lengths.append(np.bincount(segments[row])[1:])
            ids.append(used)
        record = np.concatenate([[len(lengths[0])], *lengths, *ids])
        records.append(record.astype(little).tobytes())
    return records


def decode(
    records: Sequence[bytes], lengths: Mapping[str, int], *, packed: bool, dtype: str
) -> dict[str, np.ndarray]:
    """The rows of records, bit for bit those that were encoded.

    Args:
      records: R of them.
      lengths: tokens of each feature in a row.
      packed: whether rows have segments and positions.
      dtype: from `dtype_for`.

    Returns:
      int32 [R, length] arrays, see `packing.model_features`.

    Raises:
      ValueError: a record does not have the form that the arguments say.
    """
    little = np.dtype(dtype).newbyteorder("<")
    tokens = {name: np.zeros((len(records), lengths[name]), np.int32) for name in _SIDES}
    starts = {name: np.zeros((len(records), lengths[name]), bool) for name in _SIDES}
    for row, record in enumerate(records):
        values = np.frombuffer(record, little)
        num_examples = int(values[0])
        sizes = values[1 : 1 + 2 * num_examples].reshape(2, num_examples).astype(np.int64)
        at = 1 + 2 * num_examples
        for name, of_examples in zip(_SIDES, sizes, strict=True):
            ends = np.cumsum(of_examples)
            tokens[name][row, : ends[-1]] = values[at : at + ends[-1]]
            starts[name][row, ends[:-1]] = True
            at += int(ends[-1])
        if at != len(values):
            raise ValueError(f"a record of {len(values)} numbers says that it has {at}")
    return _features(tokens, starts, packed)


def _features(
    tokens: Mapping[str, np.ndarray], starts: Mapping[str, np.ndarray], packed: bool
) -> dict[str, np.ndarray]:
    """What the model sees, of ids [R, L] and of where every example but the first begins."""
    targets = tokens["targets"]
    shifted = np.zeros_like(targets)
    shifted[:, 1:] = targets[:, :-1]
    if packed:
        shifted[starts["targets"]] = 0
        shifted[targets == 0] = 0
    features = {
        "encoder_input_tokens": tokens["inputs"],
        "decoder_target_tokens": targets,
        "decoder_input_tokens": shifted,
        "decoder_loss_weights": (targets != 0).astype(np.int32),
    }
    if packed:
        for name, side in _SIDES.items():
            is_token = tokens[name] != 0
            places = np.arange(tokens[name].shape[1], dtype=np.int32)
            first = np.maximum.accumulate(np.where(starts[name], places, 0), axis=1)
            segments = 1 + np.cumsum(starts[name], axis=1, dtype=np.int32)
            features[f"{side}_segment_ids"] = np.where(is_token, segments, 0)
            features[f"{side}_positions"] = np.where(is_token, places - first, 0)
    return {name: array.astype(np.int32, copy=False) for name, array in features.items()}
