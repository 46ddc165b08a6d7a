"""From examples of ids to the rows an encoder-decoder sees, several examples to a row.

Rows have the names and values of `seqio.EncDecFeatureConverter`. Pure TensorFlow ops in a
`Dataset.scan`: the position of the stream can be saved, row under construction included.
"""

from collections.abc import Mapping

import tensorflow as tf

Example = Mapping[str, tf.Tensor]
Lengths = Mapping[str, int]

# Where each of a task's features goes: {"inputs": "encoder", "targets": "decoder"}.
_SIDE = {"inputs": "encoder", "targets": "decoder"}


# AutoGraph takes a second to find that there is no Python control flow over tensors here.
@tf.autograph.experimental.do_not_convert
def model_features(dataset: tf.data.Dataset, lengths: Lengths, *, pack: bool) -> tf.data.Dataset:
    """Rows of int32 [length] features, padded with 0.

    Args:
      dataset: examples {"inputs": ids [any], "targets": ids [any]}, trimmed to their
        lengths if they are not.
      lengths: tokens of each feature in a row.
      pack: put consecutive examples into one row for as long as all their features fit.

    Returns:
      `encoder_input_tokens`, `decoder_target_tokens`, `decoder_input_tokens` (targets one place to
      the right within their example, beginning with 0), `decoder_loss_weights` (1 where there is a
      target), and if packed `*_segment_ids` (from 1, 0 where padded) and `*_positions`. Packed, an
      id 0 within an example is left out, since 0 is padding, and so is an example that has no
      inputs or no targets left: the segments of encoder and decoder always agree.
    """

    def pad(example: Example) -> Example:
        ids = {n: tf.cast(example[n][:length], tf.int32) for n, length in lengths.items()}
        return {n: tf.pad(ids[n], [[0, length - tf.size(ids[n])]]) for n, length in lengths.items()}

    if not pack:
        padded = dataset.map(pad, num_parallel_calls=tf.data.AUTOTUNE)
        return padded.map(_convert, num_parallel_calls=tf.data.AUTOTUNE)
    return pack_examples(dataset, lengths).map(_convert, num_parallel_calls=tf.data.AUTOTUNE)


def pack_examples(dataset: tf.data.Dataset, lengths: Lengths) -> tf.data.Dataset:
    """Joins consecutive examples greedily: a row is closed by the first example that does not fit.

    Args:
      dataset: examples of int32 [<= length] features.
      lengths: tokens of each feature in a row.

    Returns:
      Rows {name, `<name>_segment_ids`, `<name>_positions`: int32 [length]} for each feature.
    """

    def clean(example: Example) -> Example:
        ids = {n: tf.cast(example[n][:length], tf.int32) for n, length in lengths.items()}
        return {name: tf.boolean_mask(ids[name], ids[name] != 0) for name in lengths}

    def is_complete(example: Example) -> tf.Tensor:
        return tf.reduce_all([tf.size(example[name]) > 0 for name in lengths])

    empty_row = {
        f"{name}{suffix}": tf.zeros([length], tf.int32)
        for name, length in lengths.items()
        for suffix in ("", "_segment_ids", "_positions")
    }
    nothing = {
        "row": empty_row,
        "used": {name: tf.constant(0) for name in lengths},
        "num_examples": tf.constant(0),
    }

    def append(state: dict, example: Example) -> tuple[dict, dict]:
        """The row with the example, or a new row with it; and the row if that closed it."""
        sizes = {name: tf.size(example[name]) for name in lengths}
        fits = tf.reduce_all(
            [state["used"][name] + sizes[name] <= length for name, length in lengths.items()]
            + [sizes[name] > 0 for name in lengths]  # the end of the stream fits nowhere
        )
        keep = tf.cast(fits, tf.int32)
        number = state["num_examples"] * keep + 1
        row, used = {}, {}
        for name, length in lengths.items():
            start = state["used"][name] * keep
            size = sizes[name]
            for suffix, values in (
                ("", example[name]),
                ("_segment_ids", tf.fill([size], number)),
                ("_positions", tf.range(size)),
            ):
                added = tf.pad(values, [[start, length - start - size]])
                row[name + suffix] = tf.ensure_shape(
                    state["row"][name + suffix] * keep + added, [length]
                )
            used[name] = start + size
        closed = {"row": state["row"], "is_closed": (keep == 0) & (state["num_examples"] > 0)}
        return {"row": row, "used": used, "num_examples": number}, closed

    end = tf.data.Dataset.from_tensors({name: tf.zeros([0], tf.int32) for name in lengths})
    examples = dataset.map(clean, num_parallel_calls=tf.data.AUTOTUNE).filter(is_complete)
    rows = examples.concatenate(end).scan(nothing, append)
    return rows.filter(lambda row: row["is_closed"]).map(lambda row: row["row"])


def _convert(row: Example) -> Example:
    """The names that the model knows, and the decoder's inputs."""
    targets = row["targets"]
    shifted = tf.pad(targets[:-1], [[1, 0]])
    packed = "targets_positions" in row
    if packed:
        shifted *= tf.cast(row["targets_positions"] > 0, tf.int32)
    features = {
        "encoder_input_tokens": row["inputs"],
        "decoder_target_tokens": targets,
        "decoder_input_tokens": shifted,
        "decoder_loss_weights": tf.cast(targets != 0, tf.int32),
    }
    if packed:
        for name, side in _SIDE.items():
            for suffix in ("_segment_ids", "_positions"):
                features[side + suffix] = row[name + suffix]
    return features
