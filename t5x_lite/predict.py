"""Decodes, scores and encodes any number of rows in batches of few shapes."""

import bisect
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t5x_lite import decoding, losses
from t5x_lite.decoding import DecodeConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import cached, t5
from t5x_lite.models.config import T5Config
from t5x_lite.partitioning import Partitioning
from t5x_lite.step import num_chunks

_SMALLEST_BUCKET = 8


class Prediction(NamedTuple):
    """What was decoded for one input.

    Attributes:
      ids: int32 [num_outputs, target_length], 0 after the end mark; best first.
      scores: float32 [num_outputs]. Greedy and sampling: the summed log probability of the ids
        under the model, end mark included, in nats. Beam: with the length penalty.
    """

    ids: np.ndarray
    scores: np.ndarray


class Predictor:
    """Decodes, scores and encodes rows of any number in batches, one compiled program a shape.

    Rows are sorted by length, cut into batches of `batch_size` and padded to the next length of a
    short ladder. Results come in the order of the inputs; beyond rounding none depends on the rows
    beside it. Every process of a job calls with the same rows and gets every result.
    """

    def __init__(
        self,
        config: T5Config,
        partitioning: Partitioning,
        *,
        batch_size: int,
        input_length: int,
        target_length: int,
    ):
        """Compiles nothing yet.

        Args:
          config: the architecture.
          partitioning: the devices, and what lies where on them.
          batch_size: rows of a batch over all devices.
          input_length: most ids of an input.
          target_length: most ids of a target, and those decoded at most.

        Raises:
          UsageError: `batch_size` does not divide over the devices that split the rows.
        """
        shards = partitioning.num_batch_shards
        if batch_size < 1 or batch_size % shards:
            raise UsageError(
                f"batch_size = {batch_size}: must be a multiple of the {shards} parts into which "
                "data x fsdp of the mesh split a batch"
            )
        self.config, self.partitioning, self.batch_size = config, partitioning, batch_size
        self.input_length, self.target_length = input_length, target_length

    def generate(
        self,
        params: Any,
        inputs: Sequence[np.ndarray],
        decode: DecodeConfig = DecodeConfig(),  # noqa: B008 - frozen
        *,
        seed: int = 0,
        first_index: int = 0,
    ) -> list[Prediction]:
        """Decodes each input.

        Args:
          params: as `t5.init` gives them, placed on the devices.
          inputs: int ids of each row, at most `input_length`.
          decode: how.
          seed: for sampling; from 0 to 2^32 - 1.
          first_index: number of the first row; row i draws from (seed, first_index + i) alone.

        Raises:
          ValueError: an input is too long.
          UsageError: more beams than ids in the vocabulary.
        """
        decode.check(self.config.vocab_size)
        _check_lengths("input", inputs, self.input_length)
        results: dict[int, Prediction] = {}
        for rows in self._batches([len(ids) for ids in inputs]):
            batch = {
                "tokens": self._padded([inputs[i] for i in rows], self.input_length),
                "indices": np.full((self.batch_size, 1), -1, np.int32),
            }
            batch["indices"][: len(rows), 0] = np.asarray(rows) + first_index
            placed = self._place(batch)
            out = _generate(
                self.config,
                self.partitioning,
                self.target_length,
                decode,
                params,
                placed,
                np.uint32(seed),
            )
            ids_BxNxT, scores_BxN = jax.device_get(out)
            for slot, row in enumerate(rows):
                results[row] = Prediction(ids_BxNxT[slot], scores_BxN[slot])
        return [results[i] for i in range(len(inputs))]

    def score(
        self, params: Any, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Log likelihood of each target given its input.

        Args:
          params: as `t5.init` gives them, placed on the devices.
          inputs: int ids of each row, at most `input_length`.
          targets: as many, at most `target_length` ids; an end mark counts if it is there.

        Returns:
          float32 [len(inputs)], in nats, summed over all ids of the target.

        Raises:
          ValueError: a row is too long, or there are not as many targets as inputs.
        """
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs and {len(targets)} targets")
        _check_lengths("input", inputs, self.input_length)
        _check_lengths("target", targets, self.target_length)
        scores = np.zeros(len(inputs), np.float32)
        for rows in self._batches([(len(i), len(t)) for i, t in zip(inputs, targets, strict=True)]):
            batch = {
                "tokens": self._padded([inputs[i] for i in rows], self.input_length),
                "targets": self._padded([targets[i] for i in rows], self.target_length),
                "lengths": np.zeros((self.batch_size, 1), np.int32),
            }
            batch["lengths"][: len(rows), 0] = [len(targets[i]) for i in rows]
            found = _score(self.config, self.partitioning, params, self._place(batch))
            scores[rows] = jax.device_get(found)[: len(rows)]
        return scores

    def encode(self, params: Any, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The encoder's output for each input.

        Args:
          params: as `t5.init` gives them, placed on the devices.
          inputs: int ids of each row, at most `input_length`.

        Returns:
          float32 [len(ids), d_model] for each.

        Raises:
          ValueError: an input is too long.
        """
        _check_lengths("input", inputs, self.input_length)
        results: dict[int, np.ndarray] = {}
        for rows in self._batches([len(ids) for ids in inputs]):
            batch = {"tokens": self._padded([inputs[i] for i in rows], self.input_length)}
            found = _encode(self.config, self.partitioning, params, self._place(batch))
            encoded_BxLxD = jax.device_get(found)
            for slot, row in enumerate(rows):
                results[row] = encoded_BxLxD[slot, : len(inputs[row])].copy()
        return [results[i] for i in range(len(inputs))]

    def _batches(self, sizes: Sequence[Any]) -> Iterator[list[int]]:
        order = sorted(range(len(sizes)), key=lambda i: sizes[i])
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _padded(self, rows: Sequence[np.ndarray], most: int) -> np.ndarray:
        ladder = _ladder(most)
        length = ladder[bisect.bisect_left(ladder, max(map(len, rows)))]
        padded = np.zeros((self.batch_size, length), np.int32)
        for slot, ids in zip(padded, rows, strict=False):
            slot[: len(ids)] = ids
        return padded

    def _place(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        # Every process has all rows, so that each device takes its own.
        sharding = self.partitioning.batch
        return {
            name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
            for name, x in batch.items()
        }


@functools.cache
def _ladder(most: int) -> list[int]:
    """The lengths to which rows are padded: powers of two and 1.5 times these, up to `most`."""
    steps = (n for i in range(most.bit_length()) for n in (2**i, 3 * 2**i // 2))
    return [*sorted({n for n in steps if _SMALLEST_BUCKET <= n < most}), most]


def _check_lengths(what: str, rows: Sequence[np.ndarray], most: int) -> None:
    for i, ids in enumerate(rows):
        if len(ids) > most:
            raise ValueError(f"{what} {i} has {len(ids)} ids, more than {most}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    config: T5Config,
    partitioning: Partitioning,
    target_length: int,
    decode: DecodeConfig,
    params: Any,
    batch: dict[str, Array],
    seed: np.uint32,
) -> decoding.Decoded:
    tokens, indices_B = batch["tokens"], batch["indices"][:, 0]
    with partitioning.of_activations():
        encoded = t5.encode(config, params, tokens)
    kernel = t5.output_kernel(config, params)
    num_rows = decoding.rows_per_input(decode)
    model_step, cache = cached.start(config, params, encoded, tokens, num_rows, target_length)

    def step(
        cache: cached.Cache, tokens_BxN: Array, position: Array, sources: Array | None
    ) -> tuple[Array, cached.Cache]:
        hidden, cache = model_step(cache, tokens_BxN, position, sources)
        return hidden.astype(jnp.float32) @ kernel, cache

    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices_B)
    decoded = decoding.decode(step, cache, decode, indices_B >= 0, target_length, keys_B=keys_B)
    return jax.lax.with_sharding_constraint(decoded, partitioning.replicated)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    config: T5Config, partitioning: Partitioning, params: Any, batch: dict[str, Array]
) -> Array:
    targets, lengths = batch["targets"], batch["lengths"]
    length = targets.shape[1]
    model_batch = {
        "encoder_input_tokens": batch["tokens"],
        "decoder_input_tokens": jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }
    chunks = num_chunks(config, partitioning, targets)
    kernel = t5.output_kernel(config, params)
    with partitioning.of_activations():
        hidden = t5.hidden_states(config, params, model_batch)
        log_p, _ = losses.token_log_likelihood(hidden, kernel, targets, chunks=chunks)
    scores = jnp.sum(jnp.where(jnp.arange(length) < lengths, log_p, 0), axis=1)
    return jax.lax.with_sharding_constraint(scores, partitioning.replicated)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(
    config: T5Config, partitioning: Partitioning, params: Any, batch: dict[str, Array]
) -> Array:
    with partitioning.of_activations():
        encoded = t5.encode(config, params, batch["tokens"]).astype(jnp.float32)
    return jax.lax.with_sharding_constraint(encoded, partitioning.replicated)
