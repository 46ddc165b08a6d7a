"""T5's self-supervised objectives over datasets of token ids.

Each takes a dataset of {"targets": int32 [T]} (one document, or one segment, per example) and the
`sequence_length` and `output_features` that seqio hands to a task's preprocessors. Randomness comes
from seqio's `map_seed_manager` through stateless ops only: a seed fixes the stream, which equals
that of the `t5` library for the same seed, and `tf.train.Checkpoint` can save the iterator.
"""

import functools
import math
from collections.abc import Mapping

import seqio
import tensorflow as tf
from absl import logging

from t5x_lite.errors import UsageError
from tasks import noise, vocabularies

Features = Mapping[str, seqio.Feature]
Lengths = Mapping[str, int]

MAX_DOCUMENT_LENGTH = 65536  # tokens; of a longer document one random chunk is used
NUM_DOCUMENTS_JOINED = 128


# ---- objectives ----------------------------------------------------------------------------------


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Lengths,
    output_features: Features,
    mean_noise_span_length: float = 3.0,
    noise_density: float = 0.15,
    merge_examples_to_reduce_padding: bool = True,
) -> tf.data.Dataset:
    """T5's final pre-training objective (arXiv:1910.10683, section 3.3.4).

    Documents are joined and cut so that with EOS the inputs are exactly full: 512 inputs take 568
    tokens and give 114 targets. Each span of noise becomes a sentinel in the inputs; the targets
    are the sentinels, each followed by its span.

    Raises:
      UsageError: a length is missing, or the targets do not hold the noise that goes with inputs.
    """
    inputs_length = feature_length(sequence_length, "inputs")
    targets_length = feature_length(sequence_length, "targets")
    raw_length, full_targets_length = random_spans_helper(
        inputs_length=inputs_length,
        noise_density=noise_density,
        mean_noise_span_length=mean_noise_span_length,
        extra_tokens_per_span_inputs=1,
        extra_tokens_per_span_targets=1,
    )
    if targets_length < full_targets_length:
        raise UsageError(
            f"TASK_FEATURE_LENGTHS has 'targets': {targets_length}, but span corruption of "
            f"{inputs_length} inputs needs at least {full_targets_length}"
        )
    num_spans = round(raw_length * noise_density / mean_noise_span_length)
    num_sentinels = vocabularies.num_sentinels(output_features["targets"].vocabulary)
    if num_spans > num_sentinels:
        logging.warning(
            "Span corruption of %d inputs uses %d sentinels, the vocabulary has %d: as in T5, the "
            "ordinary pieces before them are used as well.",
            inputs_length,
            num_spans,
            num_sentinels,
        )
    dataset = select_random_chunk(dataset, max_length=MAX_DOCUMENT_LENGTH)
    if merge_examples_to_reduce_padding:
        dataset = reduce_concat_tokens(dataset)
    dataset = split_tokens(dataset, max_tokens_per_segment=raw_length)
    return denoise(
        dataset,
        output_features,
        noise_density=noise_density,
        noise_mask_fn=functools.partial(
            noise.random_spans_noise_mask, mean_noise_span_length=mean_noise_span_length
        ),
        inputs_fn=noise.noise_span_to_unique_sentinel,
        targets_fn=noise.nonnoise_span_to_unique_sentinel,
    )


def iid_denoising(
    dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
    """T5's baseline objective: 15% of the tokens, chosen one by one, runs joined into one sentinel
    (arXiv:1910.10683, section 3.1.4)."""
    dataset = select_random_chunk(dataset, max_length=MAX_DOCUMENT_LENGTH)
    dataset = reduce_concat_tokens(dataset)
    dataset = split_tokens(
        dataset, max_tokens_per_segment=_room_before_eos(sequence_length, output_features)
    )
    return denoise(
        dataset,
        output_features,
        noise_density=0.15,
        noise_mask_fn=noise.iid_noise_mask,
        inputs_fn=noise.noise_span_to_unique_sentinel,
        targets_fn=noise.nonnoise_span_to_unique_sentinel,
    )


def prefix_lm(
    dataset: tf.data.Dataset,
    sequence_length: Lengths,
    output_features: Features,
    noise_density: float = 0.5,
) -> tf.data.Dataset:
    """Prefix language modelling: a segment of one document, cut in two at random
    (arXiv:1910.10683, section 3.3.1)."""
    dataset = select_random_chunk(dataset, max_length=MAX_DOCUMENT_LENGTH)
    dataset = split_tokens(
        dataset, max_tokens_per_segment=_room_before_eos(sequence_length, output_features)
    )
    return denoise(
        dataset,
        output_features,
        noise_density=noise_density,
        noise_mask_fn=noise.random_prefix_noise_mask,
        inputs_fn=noise.drop_nonnoise_tokens,
        targets_fn=noise.drop_noise_tokens,
    )


def full_lm(
    dataset: tf.data.Dataset, sequence_length: Lengths, output_features: Features
) -> tf.data.Dataset:
    """Language modelling: targets only, documents joined with an EOS after each, then cut."""
    dataset = select_random_chunk(dataset, max_length=MAX_DOCUMENT_LENGTH)
    dataset = seqio.preprocessors.append_eos(dataset, output_features)
    dataset = reduce_concat_tokens(dataset)
    return split_tokens(dataset, max_tokens_per_segment=feature_length(sequence_length, "targets"))


# ---- lengths -------------------------------------------------------------------------------------


def feature_length(sequence_length: Lengths | None, feature: str) -> int:
    """The positive length of `feature`.

    Raises:
      UsageError: it is missing or not positive.
    """
    length = (sequence_length or {}).get(feature)
    if length is None or length <= 0:
        found = "is missing" if length is None else f"is {length}"
        raise UsageError(
            f"TASK_FEATURE_LENGTHS: the length of {feature!r} {found}; this task needs a positive "
            "one, for example {'inputs': 512, 'targets': 114}"
        )
    return length


def _room_before_eos(sequence_length: Lengths, output_features: Features) -> int:
    """How many tokens fit into the inputs beside the EOS that is added later."""
    length = feature_length(sequence_length, "inputs") - int(output_features["inputs"].add_eos)
    if length < 1:
        raise UsageError("TASK_FEATURE_LENGTHS: the length of 'inputs' is 1, which EOS alone fills")
    return length


def random_spans_helper(
    inputs_length: int,
    noise_density: float,
    mean_noise_span_length: float,
    extra_tokens_per_span_inputs: int,
    extra_tokens_per_span_targets: int,
) -> tuple[int, int]:
    """How many raw tokens to corrupt so that inputs of `inputs_length` come out full.

    EOS is counted in both lengths. Returns (raw tokens, length of the targets). As in T5, a noise
    density of 0.5 gives targets no longer than the inputs.
    """

    def lengths(raw_length: int) -> tuple[int, int]:
        num_noise = round(raw_length * noise_density)
        num_spans = round(num_noise / mean_noise_span_length)
        return (
            raw_length - num_noise + num_spans * extra_tokens_per_span_inputs + 1,
            num_noise + num_spans * extra_tokens_per_span_targets + 1,
        )

    raw_length = inputs_length - 1
    while lengths(raw_length + 1)[0] <= inputs_length:
        raw_length += 1
    full_inputs_length, targets_length = lengths(raw_length)
    if noise_density == 0.5 and targets_length > full_inputs_length:
        return raw_length - 1, targets_length - 1
    return raw_length, targets_length


# ---- stages --------------------------------------------------------------------------------------


def select_random_chunk(
    dataset: tf.data.Dataset,
    max_length: int,
    min_length: int | None = None,
    uniform_random_start: bool = False,
) -> tf.data.Dataset:
    """One random chunk of each document, all of it if it is short; drops empty documents."""

    @seqio.map_over_dataset(num_seeds=1)
    def chunk(example: Mapping[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = random_chunk(
            example["targets"], seed, max_length, min_length, uniform_random_start
        )
        return {"targets": tokens}

    return chunk(dataset.filter(_has_tokens))


def random_chunk(
    tokens: tf.Tensor,
    seed: tf.Tensor,
    max_length: int,
    min_length: int | None = None,
    uniform_random_start: bool = False,
) -> tf.Tensor:
    """A chunk of `tokens` [T] of at most `max_length` tokens.

    The sequence is divided into chunks of `max_length` (or of a random length from `min_length` up)
    and one of them is taken; with `uniform_random_start` it may start anywhere, before the first
    token too, so that each token is equally likely.
    """
    length_seed, start_seed = tf.unstack(tf.random.experimental.stateless_split(seed))
    num_tokens = tf.size(tokens)
    if min_length is None:
        length = tf.constant(max_length)
    else:
        length = tf.random.stateless_uniform(
            [], seed=length_seed, minval=min_length, maxval=max_length, dtype=tf.int32
        )
    if uniform_random_start:
        start = tf.random.stateless_uniform(
            [], seed=start_seed, minval=1 - length, maxval=num_tokens, dtype=tf.int32
        )
    else:
        num_chunks = -(-num_tokens // length)
        start = length * tf.random.stateless_uniform(
            [], seed=start_seed, maxval=num_chunks, dtype=tf.int32
        )
    return tokens[tf.maximum(start, 0) : tf.minimum(start + length, num_tokens)]


def reduce_concat_tokens(
    dataset: tf.data.Dataset, num_documents: int = NUM_DOCUMENTS_JOINED
) -> tf.data.Dataset:
    """Joins `num_documents` at a time into one example. An id 0 is padding, and left out."""

    def join(example: Mapping[str, tf.Tensor | tf.RaggedTensor]) -> dict[str, tf.Tensor]:
        tokens = example["targets"]
        if isinstance(tokens, tf.RaggedTensor):  # not so if all lengths are known to be equal
            tokens = tokens.flat_values
        tokens = tf.reshape(tokens, [-1])
        return {"targets": tf.boolean_mask(tokens, tokens != 0)}

    return (
        dataset.map(lambda example: {"targets": example["targets"]})
        .ragged_batch(num_documents)
        .map(join, num_parallel_calls=tf.data.AUTOTUNE)
    )


def split_tokens(
    dataset: tf.data.Dataset,
    max_tokens_per_segment: int,
    min_tokens_per_segment: int | None = None,
) -> tf.data.Dataset:
    """Cuts each example into segments of `max_tokens_per_segment`; only its last may be shorter.

    With `min_tokens_per_segment` the length is drawn per example, log-uniformly between the two.
    """

    @seqio.map_over_dataset(num_seeds=1)
    def cut(example: Mapping[str, tf.Tensor], seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        tokens = example["targets"]
        if min_tokens_per_segment is None:
            length = tf.constant(max_tokens_per_segment)
        else:
            log_length = tf.random.stateless_uniform(
                [],
                seed=seed,
                minval=math.log(min_tokens_per_segment),
                maxval=math.log(max_tokens_per_segment),
            )
            length = tf.cast(tf.exp(log_length), tf.int32)
        num_tokens = tf.size(tokens)
        num_segments = -(-num_tokens // length)
        padded = tf.pad(tokens, [[0, num_segments * length - num_tokens]])
        real_lengths = tf.minimum(length, num_tokens - length * tf.range(num_segments))
        return tf.reshape(padded, [num_segments, length]), real_lengths

    return (
        cut(dataset.filter(_has_tokens))
        .unbatch()
        .map(
            lambda segment, length: {"targets": segment[:length]},
            num_parallel_calls=tf.data.AUTOTUNE,
        )
    )


def denoise(
    dataset: tf.data.Dataset,
    output_features: Features,
    noise_density: float,
    noise_mask_fn: noise.NoiseMaskFn,
    inputs_fn: noise.TokenNoiseFn,
    targets_fn: noise.TokenNoiseFn | None,
) -> tf.data.Dataset:
    """{"targets": tokens} -> {"inputs", "targets"}, see `denoise_tokens`."""
    vocab_size = output_features["targets"].vocabulary.vocab_size

    @seqio.map_over_dataset(num_seeds=1)
    def corrupt(example: Mapping[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = example["targets"]
        return denoise_tokens(
            tokens, seed, vocab_size, noise_density, noise_mask_fn, inputs_fn, targets_fn
        )

    return corrupt(dataset)


def denoise_tokens(
    tokens: tf.Tensor,
    seed: tf.Tensor,
    vocab_size: int,
    noise_density: float,
    noise_mask_fn: noise.NoiseMaskFn,
    inputs_fn: noise.TokenNoiseFn,
    targets_fn: noise.TokenNoiseFn | None,
) -> dict[str, tf.Tensor]:
    """Draws a mask for `tokens` [T] and makes inputs and targets of them under it.

    Without `targets_fn` the targets are the tokens themselves. `seed` is int [2], of either width
    (which give different numbers).
    """
    seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 6))
    noise_mask = noise_mask_fn(tf.size(tokens), noise_density, seeds=seeds[:2])
    inputs = inputs_fn(tokens, noise_mask, vocab_size, seeds=seeds[2:4])
    if targets_fn is not None:
        tokens = targets_fn(tokens, noise_mask, vocab_size, seeds=seeds[4:])
    return {"inputs": inputs, "targets": tokens}


def _has_tokens(example: Mapping[str, tf.Tensor]) -> tf.Tensor:
    return tf.size(example["targets"]) > 0
