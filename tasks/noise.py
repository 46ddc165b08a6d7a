"""Noise masks, and what becomes of the tokens under them.

Every function works on one sequence of length T: a mask is bool [T], True where a token is noise.
The random numbers are drawn by stateless ops in the order of the `t5` library's preprocessors, so
that the same seeds give the same masks and tokens as there. Objectives: "Exploring the Limits of
Transfer Learning with a Unified Text-to-Text Transformer" (arXiv:1910.10683), section 3.1.4.
"""

from collections.abc import Sequence
from typing import Protocol

import seqio
import tensorflow as tf

NUM_RESERVED_IDS = 3  # pad, eos, unk: never drawn as a random token


class NoiseMaskFn(Protocol):
    """Chooses the noise: (length, noise_density, seeds int [2, 2]) -> bool [length]."""

    def __call__(
        self, length: tf.Tensor, noise_density: float, seeds: Sequence[tf.Tensor]
    ) -> tf.Tensor: ...


class TokenNoiseFn(Protocol):
    """Applies it: (tokens [T], mask [T], vocab_size, seeds int [2, 2]) -> tokens [T' <= T]."""

    def __call__(
        self,
        tokens: tf.Tensor,
        noise_mask: tf.Tensor,
        vocab_size: int,
        seeds: Sequence[tf.Tensor],
    ) -> tf.Tensor: ...


# ---- masks ---------------------------------------------------------------------------------------


def iid_noise_mask(
    length: tf.Tensor, noise_density: float, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Each token is noise with probability `noise_density`, independently."""
    return tf.random.stateless_uniform([length], seed=seeds[0]) < noise_density


def regular_noise_mask(
    length: tf.Tensor,
    noise_density: float,
    seeds: Sequence[tf.Tensor],
    min_span_length: int = 1,
    max_span_length: int = 5,
) -> tf.Tensor:
    """Spans of one random length, evenly spaced from a random offset."""
    span_length = tf.random.stateless_uniform(
        [], seed=seeds[0], minval=min_span_length, maxval=max_span_length + 1, dtype=tf.int32
    )
    period = tf.cast(tf.round(tf.cast(span_length, tf.float32) / noise_density), tf.int32)
    offset = tf.random.stateless_uniform([], seed=seeds[1], maxval=period, dtype=tf.int32)
    return (tf.range(length) + offset) % period < span_length


def random_prefix_noise_mask(
    length: tf.Tensor, noise_density: float, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """A prefix of random length is True; with density 0.5 the length is uniform in [1, length).

    A lower density moves the shortest prefix up, to (1 - 2 * density) of the sequence.

    Raises:
      ValueError: the density is above 0.5, for which no such distribution exists.
    """
    if noise_density > 0.5:
        raise ValueError(f"noise_density of a random prefix is at most 0.5, given {noise_density}")
    longest = length - 1
    shortest = tf.cast(tf.round((1 - 2 * noise_density) * tf.cast(longest, tf.float32)), tf.int32)
    shortest = tf.minimum(tf.maximum(shortest, 1), longest)
    prefix_length = tf.random.stateless_uniform(
        [], seed=seeds[0], minval=shortest, maxval=longest + 1, dtype=tf.int32
    )
    return tf.range(length) < prefix_length


def random_spans_noise_mask(
    length: tf.Tensor,
    noise_density: float,
    seeds: Sequence[tf.Tensor],
    mean_noise_span_length: float = 3.0,
    random_roll: bool = False,
) -> tf.Tensor:
    """Ordinary and noise spans in turn, ordinary first; their number is fixed, lengths are random.

    There are round(length * noise_density) noise tokens in round(that / mean_noise_span_length)
    spans, at least one of each; all such masks are equally likely. `random_roll` rotates the mask
    by a random offset.

    Raises:
      tf.errors.InvalidArgumentError: there are more spans than tokens of one kind to fill them.
    """
    if noise_density == 0.0:
        return tf.zeros([length], tf.bool)
    padded_length = tf.maximum(length, 2)
    num_noise = tf.cast(tf.round(tf.cast(padded_length, tf.float32) * noise_density), tf.int32)
    num_noise = tf.clip_by_value(num_noise, 1, padded_length - 1)
    num_spans = tf.cast(tf.round(tf.cast(num_noise, tf.float32) / mean_noise_span_length), tf.int32)
    num_spans = tf.maximum(num_spans, 1)

    noise_ends = _random_span_ends(num_noise, num_spans, seeds[0])
    ordinary_ends = _random_span_ends(padded_length - num_noise, num_spans, seeds[1])
    # Noise span k follows ordinary span k, so both counts up to its ends add up to its position.
    starts = ordinary_ends + tf.pad(noise_ends[:-1], [[1, 0]])
    ends = ordinary_ends + noise_ends
    steps = tf.tensor_scatter_nd_add(
        tf.zeros([padded_length + 1], tf.int32),
        tf.concat([starts, ends], axis=0)[:, tf.newaxis],
        tf.concat([tf.ones_like(starts), -tf.ones_like(ends)], axis=0),
    )
    mask = tf.cumsum(steps)[:length] > 0
    if random_roll:
        roll_seed = (seeds[0][0] + seeds[1][1], seeds[0][1] - seeds[1][0])
        offset = tf.random.stateless_uniform(
            [1], seed=roll_seed, minval=0, maxval=padded_length, dtype=tf.int32
        )
        mask = tf.roll(mask, shift=offset[0], axis=0)
    return mask


def _random_span_ends(num_tokens: tf.Tensor, num_spans: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Cuts `num_tokens` into `num_spans` non-empty spans: int32 [num_spans], the end of each."""
    # A shuffled row of num_spans - 1 ones and else zeros, without gathering: its entry j is one
    # if the j-th smallest key belongs to one of the first num_spans - 1 places.
    order = tf.argsort(tf.random.stateless_uniform([num_tokens - 1], seed=seed))
    cuts = tf.where(order < num_spans - 1)[:, 0] + 1
    ends = tf.concat([tf.cast(cuts, tf.int32), [num_tokens]], axis=0)
    return tf.reshape(ends, [num_spans])  # fails if there are fewer tokens than spans


# ---- tokens under a mask -------------------------------------------------------------------------


def noise_token_to_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocab_size: int, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Replaces every noise token by the first sentinel, the last id of the vocabulary."""
    del seeds
    return tf.where(noise_mask, tf.cast(vocab_size - 1, tokens.dtype), tokens)


def noise_span_to_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocab_size: int, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Replaces every span of noise by the first sentinel."""
    tokens = noise_token_to_sentinel(tokens, noise_mask, vocab_size, seeds)
    return tf.boolean_mask(tokens, ~(noise_mask & _previous(noise_mask)))


def nonnoise_span_to_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocab_size: int, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Replaces every span of ordinary tokens by the first sentinel."""
    return noise_span_to_sentinel(tokens, ~noise_mask, vocab_size, seeds)


def noise_span_to_unique_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocab_size: int, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Replaces span k of noise by sentinel k, which is id vocab_size - 1 - k.

    As in T5 nothing stops k at the number of sentinels: beyond it, ordinary pieces are used.
    """
    del seeds
    continues = noise_mask & _previous(noise_mask)
    begins = noise_mask & ~continues
    sentinels = vocab_size - tf.cumsum(tf.cast(begins, tokens.dtype))
    return tf.boolean_mask(tf.where(begins, sentinels, tokens), ~continues)


def nonnoise_span_to_unique_sentinel(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocab_size: int, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Replaces span k of ordinary tokens by sentinel k."""
    return noise_span_to_unique_sentinel(tokens, ~noise_mask, vocab_size, seeds)


def drop_noise_tokens(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocab_size: int, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Keeps the ordinary tokens only."""
    del vocab_size, seeds
    return tf.boolean_mask(tokens, ~noise_mask)


def drop_nonnoise_tokens(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocab_size: int, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Keeps the noise tokens only."""
    del vocab_size, seeds
    return tf.boolean_mask(tokens, noise_mask)


def permute_noise_tokens(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocab_size: int, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Shuffles the noise tokens among their places."""
    del vocab_size
    shuffled = seqio.stateless_shuffle(tf.boolean_mask(tokens, noise_mask), seeds[0])
    return tf.tensor_scatter_nd_update(tokens, tf.where(noise_mask), shuffled)


def noise_token_to_gathered_token(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocab_size: int, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Replaces every noise token by a random token of the same sequence."""
    del vocab_size
    places = tf.random.stateless_uniform(
        tf.shape(tokens), seed=seeds[0], maxval=tf.size(tokens), dtype=tf.int32
    )
    return tf.where(noise_mask, tf.gather(tokens, places), tokens)


def noise_token_to_random_token(
    tokens: tf.Tensor, noise_mask: tf.Tensor, vocab_size: int, seeds: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Replaces every noise token by a random id, the reserved ones left out."""
    random_tokens = tf.random.stateless_uniform(
        tf.shape(tokens),
        seed=seeds[0],
        minval=NUM_RESERVED_IDS,
        maxval=vocab_size,
        dtype=tokens.dtype,
    )
    return tf.where(noise_mask, random_tokens, tokens)


def noise_token_to_random_token_or_sentinel(
    tokens: tf.Tensor,
    noise_mask: tf.Tensor,
    vocab_size: int,
    seeds: Sequence[tf.Tensor],
    random_prob: float = 0.1,
) -> tf.Tensor:
    """Replaces every noise token by a random id with `random_prob`, else by the first sentinel."""
    use_random = tf.random.stateless_uniform(tf.shape(tokens), seed=seeds[0]) < random_prob
    return tf.where(
        use_random,
        noise_token_to_random_token(tokens, noise_mask, vocab_size, seeds[1:]),
        noise_token_to_sentinel(tokens, noise_mask, vocab_size, seeds),
    )


def _previous(mask: tf.Tensor) -> tf.Tensor:
    """The mask of the token before, False for the first: bool [T] -> bool [T]."""
    return tf.pad(mask[:-1], [[1, 0]])
