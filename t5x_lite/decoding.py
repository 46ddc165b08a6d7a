"""Decoding over a function from ids to logits; knows no model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def greedy(
    next_logits: Callable[[Array, Array], Array],
    batch_size: int,
    max_length: int,
    eos_id: int = 1,
) -> Array:
    """The likeliest id at each position, given those before it.

    Args:
      next_logits: (ids [B, max_length] shifted right to begin with 0, position) -> logits [B, V]
        at that position. Ids at and after the position are 0 still.
      batch_size: rows.
      max_length: ids to produce at most.
      eos_id: ends a row. Decoding stops when every row has ended.

    Returns:
      int32 [B, max_length], 0 after the end.
    """

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        position, _, ended = carry
        return (position < max_length) & ~jnp.all(ended)

    def extend(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        position, inputs, ended = carry
        ids = jnp.argmax(next_logits(inputs[:, :-1], position), axis=-1).astype(jnp.int32)
        ids = jnp.where(ended, 0, ids)
        # `inputs` holds what was decoded one place to the right: a start, then the ids.
        inputs = jax.lax.dynamic_update_index_in_dim(inputs, ids, position + 1, axis=1)
        return position + 1, inputs, ended | (ids == eos_id)

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch_size, max_length + 1), jnp.int32),
        jnp.zeros((batch_size,), bool),
    )
    return jax.lax.while_loop(unfinished, extend, start)[1][:, 1:]
