"""Greedy decoding, sampling and beam search over a function from ids to logits; knows no model.

Shapes in names: B inputs, N rows decoded for each input (samples or beams), T positions, V
vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t5x_lite.errors import UsageError, nearest

# step(cache, tokens [B, N], position, sources [B, N, T] or None) -> logits [B, N, V], cache.
# `tokens` are the ids before `position`, 0 at the first. `sources` names, for each row and each
# earlier position, the row of the same input whose cache holds it; None: each row holds its own.
Step = Callable[[Any, Array, Array, Array | None], tuple[Array, Any]]

# The score of a place that no beam has taken, as T5X has it.
NO_BEAM = -1e7

METHODS = ("greedy", "sample", "beam")
# The fields of `DecodeConfig` that belong to one method and do nothing in another.
METHOD_OF = {
    **dict.fromkeys(("num_beams", "length_penalty", "beam_rules"), "beam"),
    **dict.fromkeys(("temperature", "top_k", "top_p"), "sample"),
}
BEAM_RULES = ("t5x", "huggingface")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How ids are chosen.

    Attributes:
      method: "greedy" (the likeliest id), "sample" or "beam".
      num_beams: beams of a beam search.
      length_penalty: alpha; 0 compares plain log probabilities.
      beam_rules: "t5x": a finished beam of n ids scores log p / ((5 + n) / 6)^alpha (Wu et al.
        2016, equation 14), and the search ends when no live beam can do better. "huggingface":
        log p / n^alpha, and a row ends when it has as many finished beams as there are beams
        (`early_stopping=True`).
      temperature: sampling divides the logits by it.
      top_k: sampling keeps the k likeliest ids; 0 keeps all.
      top_p: sampling keeps the likeliest ids that together have this probability (Holtzman et al.
        2020); 1 keeps all.
      num_outputs: results for each input; for "beam" at most num_beams, for "greedy" 1.
    """

    method: str = "greedy"
    num_beams: int = 4
    length_penalty: float = 0.6
    beam_rules: str = "t5x"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_outputs: int = 1

    def __post_init__(self) -> None:
        """Raises UsageError on the first field that decoding cannot follow."""
        for field, allowed in (("method", METHODS), ("beam_rules", BEAM_RULES)):
            value = getattr(self, field)
            if value not in allowed:
                raise UsageError(
                    f"DecodeConfig.{field} = {value!r}: allowed are {', '.join(allowed)}; "
                    f"{nearest(str(value), allowed)}"
                )
        for field, least in (("num_beams", 1), ("num_outputs", 1), ("top_k", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(
                    f"DecodeConfig.{field} = {value!r}: must be an integer of at least {least}"
                )
        if not self.length_penalty >= 0:
            raise UsageError(
                f"DecodeConfig.length_penalty = {self.length_penalty!r}: must be at least 0"
            )
        if not 0 < self.temperature < float("inf"):
            raise UsageError(
                f"DecodeConfig.temperature = {self.temperature!r}: must be above 0; "
                "for the likeliest id take method 'greedy'"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"DecodeConfig.top_p = {self.top_p!r}: must be in (0, 1]")
        most = {"greedy": 1, "sample": self.num_outputs, "beam": self.num_beams}[self.method]
        if self.num_outputs > most:
            raise UsageError(
                f"DecodeConfig.num_outputs = {self.num_outputs}: {self.method} gives at most {most}"
            )

    def check(self, vocab_size: int) -> None:
        """Raises UsageError if the vocabulary has fewer ids than there are beams."""
        if self.method == "beam" and self.num_beams > vocab_size:
            raise UsageError(
                f"DecodeConfig.num_beams = {self.num_beams}: the vocabulary has {vocab_size} ids; "
                "take at most that many beams"
            )


class Decoded(NamedTuple):
    """What was decoded for each input, best first.

    Attributes:
      ids: int32 [B, num_outputs, T], 0 after the end mark.
      scores: float32 [B, num_outputs]. Greedy and sampling: the summed log probability of the ids
        before temperature and filters, end mark included. Beam: with the length penalty; under
        T5X's rules without it where no beam has ended, and -1e7 with empty ids where fewer beams
        have ended than are asked for.
    """

    ids: Array
    scores: Array


def decode(
    step: Step,
    cache: Any,
    config: DecodeConfig,
    is_real_B: Array,
    max_length: int,
    *,
    keys_B: Array | None = None,
    eos_id: int = 1,
) -> Decoded:
    """Decodes until every row has ended, or `max_length` ids.

    Args:
      step: gives the logits of the next id and extends the cache; see `Step`. N is
        `rows_per_input(config)`.
      cache: what `step` takes at first.
      config: how ids are chosen.
      is_real_B: bool; inputs that only fill up a batch are not waited for.
      max_length: T.
      keys_B: random keys, one for each input; needed for sampling, where output n of input b at
        position t draws from (keys_B[b], n, t) alone.
      eos_id: the end mark.
    """
    if config.method == "beam":
        return _beam_search(step, cache, config, is_real_B, max_length, eos_id)
    if config.method == "sample":
        assert keys_B is not None
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        keys_BxN = fold(keys_B, jnp.arange(config.num_outputs))

        def choose(logits_BxNxV: Array, position: Array) -> Array:
            keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, position)))(keys_BxN)
            draw = jax.vmap(jax.vmap(jax.random.categorical))
            return draw(keys, filter_logits(logits_BxNxV, config))

    else:

        def choose(logits_BxNxV: Array, position: Array) -> Array:
            return top_k(logits_BxNxV, 1)[1][..., 0]

    ids, scores = _one_by_one(step, cache, choose, config, is_real_B, max_length, eos_id)
    if config.num_outputs > 1:
        order = jnp.argsort(-scores, axis=1)
        ids, scores = _pick(ids, order), _pick(scores, order)
    return Decoded(ids, scores)


def rows_per_input(config: DecodeConfig) -> int:
    """N, the rows that are decoded for each input."""
    return config.num_beams if config.method == "beam" else config.num_outputs


def _one_by_one(
    step: Step,
    cache: Any,
    choose: Callable[[Array, Array], Array],
    config: DecodeConfig,
    is_real_B: Array,
    max_length: int,
    eos_id: int,
) -> tuple[Array, Array]:
    """Extends every row by the id that `choose(logits, position)` takes."""

    def is_unfinished(carry: tuple) -> Array:
        position, *_, ended_BxN, _ = carry
        return (position < max_length) & ~jnp.all(ended_BxN)

    def extend(carry: tuple) -> tuple:
        position, tokens_BxN, ids_BxNxT, log_p_BxN, ended_BxN, cache = carry
        logits_BxNxV, cache = step(cache, tokens_BxN, position, None)
        tokens_BxN = jnp.where(ended_BxN, 0, choose(logits_BxNxV, position)).astype(jnp.int32)
        picked = jnp.take_along_axis(logits_BxNxV, tokens_BxN[..., None], axis=-1)[..., 0]
        log_p = picked - jax.nn.logsumexp(logits_BxNxV, axis=-1)
        return (
            position + 1,
            tokens_BxN,
            jax.lax.dynamic_update_index_in_dim(ids_BxNxT, tokens_BxN, position, axis=2),
            log_p_BxN + jnp.where(ended_BxN, 0, log_p),
            ended_BxN | (tokens_BxN == eos_id),
            cache,
        )

    shape = (is_real_B.shape[0], config.num_outputs)
    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros((*shape, max_length), jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.broadcast_to(~is_real_B[:, None], shape),
        cache,
    )
    _, _, ids, log_p, _, _ = jax.lax.while_loop(is_unfinished, extend, start)
    return ids, log_p


def filter_logits(logits_BxNxV: Array, config: DecodeConfig) -> Array:
    """Temperature, top-k and top-p in this order, as Hugging Face has them.

    Ids of exactly the same probability as the last one kept are kept too.

    Returns:
      The logits over the temperature; -inf for ids that may not be drawn.
    """
    logits = logits_BxNxV / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        p = jax.nn.softmax(logits)
        least = _threshold(p, jnp.ones_like(p), config.top_k)
        logits = jnp.where(p >= least, logits, -jnp.inf)
    if config.top_p < 1:
        p = jax.nn.softmax(logits)
        logits = jnp.where(p >= _threshold(p, p, config.top_p), logits, -jnp.inf)
    return logits


def _threshold(values: Array, weights: Array, target: float) -> Array:
    """The largest t with sum(weights where values >= t) >= target, along the last axis (kept).

    Floats that are not negative compare as the integers of their bits do: 31 halvings find t
    exactly, where sorting 32,000 values takes ten times as long.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)

    def halve(i: Array, found: Array) -> Array:
        candidate = found | (1 << (30 - i))
        total = jnp.sum(jnp.where(bits >= candidate, weights, 0), axis=-1, keepdims=True)
        return jnp.where(total >= target, candidate, found)

    found = jax.lax.fori_loop(0, 31, halve, jnp.zeros_like(bits[..., :1]))
    return jax.lax.bitcast_convert_type(found, values.dtype)


_BLOCK = 128


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """`jax.lax.top_k` along the last axis, in two stages where that is faster.

    The k largest lie in the k blocks with the largest maxima, in the first of them where maxima
    are equal; so the result is the same, ties included.
    """
    size = x.shape[-1]
    if size % _BLOCK or size // _BLOCK <= k:
        return jax.lax.top_k(x, k)
    blocks = x.reshape(*x.shape[:-1], -1, _BLOCK)
    _, best = jax.lax.top_k(jnp.max(blocks, axis=-1), k)
    best = jnp.sort(best, axis=-1)  # so that of equal values the first comes first
    candidates = jnp.take_along_axis(blocks, best[..., None], axis=-2)
    values, at = jax.lax.top_k(candidates.reshape(*x.shape[:-1], -1), k)
    block = jnp.take_along_axis(best, at // _BLOCK, axis=-1)
    return values, block * _BLOCK + at % _BLOCK


class _Beams(NamedTuple):
    """The state of a beam search; beams of an input are in order, best first."""

    position: Array
    cache: Any
    tokens: Array  # int32 [B, N], the last id of each live beam
    ids: Array  # int32 [B, N, T]
    log_p: Array  # float32 [B, N]
    sources: Array  # int32 [B, N, T], see Step
    finished_ids: Array  # int32 [B, N, T]
    finished_scores: Array  # float32 [B, N], NO_BEAM where there is none
    is_done: Array  # bool [B]


def _beam_search(
    step: Step,
    cache: Any,
    config: DecodeConfig,
    is_real_B: Array,
    max_length: int,
    eos_id: int,
) -> Decoded:
    huggingface = config.beam_rules == "huggingface"
    num_beams = config.num_beams

    def penalty(length: Array | int) -> Array:
        base = length if huggingface else (5.0 + length) / 6.0
        return jnp.asarray(base, jnp.float32) ** config.length_penalty

    def extend(beams: _Beams) -> _Beams:
        position, length = beams.position, beams.position + 1
        logits_BxNxV, cache = step(beams.cache, beams.tokens, position, beams.sources)
        # Twice as many as there are beams: if half of them end, the others are left to go on.
        log_p_BxC, beam_BxC, id_BxC = _candidates(logits_BxNxV, beams.log_p, 2 * num_beams)
        ids_BxCxT = _pick(beams.ids, beam_BxC)
        ids_BxCxT = jax.lax.dynamic_update_index_in_dim(ids_BxCxT, id_BxC, position, axis=2)

        is_end = id_BxC == eos_id
        log_p_BxN, live = jax.lax.top_k(jnp.where(is_end, NO_BEAM, log_p_BxC), num_beams)
        beam_BxN = _pick(beam_BxC, live)
        sources = _pick(beams.sources, beam_BxN)
        sources = jax.lax.dynamic_update_index_in_dim(sources, beam_BxN, position, axis=2)

        if huggingface:
            # At the last position all have ended; candidates beyond the beams only go on.
            is_end |= length == max_length
            is_end &= (jnp.arange(2 * num_beams) < num_beams) & ~beams.is_done[:, None]
        scores_BxC = jnp.where(is_end, log_p_BxC / penalty(length), NO_BEAM)
        scores_BxF = jnp.concatenate([beams.finished_scores, scores_BxC], axis=1)
        finished_scores, best = jax.lax.top_k(scores_BxF, num_beams)
        finished_ids = _pick(jnp.concatenate([beams.finished_ids, ids_BxCxT], axis=1), best)

        worst = finished_scores[:, -1]
        is_done = worst > NO_BEAM
        if not huggingface:
            # T5X counts its start id in the longest length.
            is_done &= worst > log_p_BxN[:, 0] / penalty(max_length + 1)
        return _Beams(
            position=length,
            cache=cache,
            tokens=_pick(id_BxC, live),
            ids=_pick(ids_BxCxT, live),
            log_p=log_p_BxN,
            sources=sources,
            finished_ids=finished_ids,
            finished_scores=finished_scores,
            is_done=is_done | beams.is_done,
        )

    shape = (is_real_B.shape[0], num_beams)
    no_ids = jnp.zeros((*shape, max_length), jnp.int32)
    start = _Beams(
        position=jnp.zeros((), jnp.int32),
        cache=cache,
        tokens=jnp.zeros(shape, jnp.int32),
        ids=no_ids,
        # One beam to begin with, or all would go on with the same ids.
        log_p=jnp.broadcast_to(jnp.where(jnp.arange(num_beams) == 0, 0.0, NO_BEAM), shape),
        sources=no_ids,
        finished_ids=no_ids,
        finished_scores=jnp.full(shape, NO_BEAM),
        is_done=~is_real_B,
    )
    end = jax.lax.while_loop(
        lambda beams: (beams.position < max_length) & ~jnp.all(beams.is_done), extend, start
    )
    any_finished = end.finished_scores[:, :1] > NO_BEAM
    ids = jnp.where(any_finished[..., None], end.finished_ids, end.ids)
    scores = jnp.where(any_finished, end.finished_scores, end.log_p)
    ids = jnp.where(scores[..., None] > NO_BEAM, ids, 0)
    return Decoded(ids[:, : config.num_outputs], scores[:, : config.num_outputs])


def _candidates(logits_BxNxV: Array, log_p_BxN: Array, count: int) -> tuple[Array, Array, Array]:
    """The likeliest continuations of all beams: log probability, beam and id, each [B, count]."""
    vocab_size = logits_BxNxV.shape[-1]
    each = min(count, vocab_size)
    values_BxNxE, ids_BxNxE = top_k(logits_BxNxV, each)
    log_z_BxN = jax.nn.logsumexp(logits_BxNxV, axis=-1)
    values_BxNxE += (log_p_BxN - log_z_BxN)[..., None]
    batch_size = values_BxNxE.shape[0]
    values, at = jax.lax.top_k(values_BxNxE.reshape(batch_size, -1), count)
    ids = jnp.take_along_axis(ids_BxNxE.reshape(batch_size, -1), at, axis=1)
    return values, at // each, ids


def _pick(x_BxN: Array, index_BxM: Array) -> Array:
    """Chooses along the second axis: [B, N, ...] -> [B, M, ...]."""
    index = index_BxM.reshape(*index_BxM.shape, *(1,) * (x_BxN.ndim - 2))
    return jnp.take_along_axis(x_BxN, index, axis=1)
