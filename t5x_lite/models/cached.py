"""T5's decoder one position at a time, with the keys and values of earlier positions kept.

Shapes in names: B inputs, N rows decoded for each input (beams or samples), T positions, S input
length, D d_model, H heads, K d_kv.

The N rows of an input share what its encoder gave: its keys and values are there once, and the
rows are so many queries. Nor are a row's own keys and values ever moved: when a beam search
continues a row from another, a table says which row holds each position (`sources`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.models.layers import MASKED, Attention

Params = dict[str, Any]


class Cache(NamedTuple):
    """Keys and values of the decoder's self-attention.

    Attributes:
      keys: for each layer [B, H, T * N, K]; row n at position t is number t * N + n.
      values: the same.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


Step = Callable[[Cache, Array, Array, Array | None], tuple[Array, Cache]]


def start(
    config: T5Config,
    params: Params,
    encoded_BxSxD: Array,
    encoder_tokens_BxS: Array,
    num_rows: int,
    max_length: int,
) -> tuple[Step, Cache]:
    """Readies the decoder for a batch of encoded inputs.

    The layers are written out whatever `config.scan_layers` says: a loop over them would copy each
    layer's parameters out of the stack for every position, where now that is done once.

    Args:
      config: the architecture.
      params: as `t5.init` gives them.
      encoded_BxSxD: the encoder's output.
      encoder_tokens_BxS: int32 ids that were encoded, 0 where padded.
      num_rows: N.
      max_length: T, the most positions to decode.

    Returns:
      An empty cache, and step(cache, tokens, position, sources) -> (hidden, cache) with
        tokens: int32 [B, N], the id before the position of each row; 0 at the first.
        position: int32 scalar, from 0; the cache holds those before it.
        sources: int32 [B, N, T], the row (of the same input) that holds the keys and values
          of each position before this one for row n; None if every row holds its own.
        hidden: [B, N, D] in the computation's dtype, ready for a product with
          `t5.output_kernel`.
    """
    batch_size, count = encoded_BxSxD.shape[0], config.num_decoder_layers
    parts, decoder = t5.module_parts(config), params["decoder"]
    embedder = (parts["token_embedder"], params["token_embedder"])
    norm = (parts["decoder"]["decoder_norm"], decoder["decoder_norm"])
    skeleton = (t5.DecoderLayer, config)
    layers = [jax.tree.map(lambda x, i=i: x[i], decoder["layers"]) for i in range(count)]
    cross_mask_Bx1x1xS = (encoder_tokens_BxS > 0)[:, None, None, :]

    cross = []
    for layer_params in layers:
        attention = t5.merge(skeleton, layer_params).encoder_decoder_attention
        cross.append(
            (
                _heads(attention, attention.key(encoded_BxSxD)),
                _heads(attention, attention.value(encoded_BxSxD)),
            )
        )
    tables = _bias_tables(config, decoder, layers, max_length)

    def step(
        cache: Cache, tokens_BxN: Array, position: Array, sources_BxNxT: Array | None
    ) -> tuple[Array, Cache]:
        mask_Bx1xNxM = _visible(position, batch_size, num_rows, max_length, sources_BxNxT)
        x = t5.merge(*embedder)(tokens_BxN)
        keys, values = [], []
        for index, layer_params in enumerate(layers):
            layer = t5.merge(skeleton, layer_params)
            window_HxT = jax.lax.dynamic_slice_in_dim(
                tables[index], max_length - 1 - position, max_length, axis=1
            )
            bias_1xHx1xM = jnp.repeat(window_HxT, num_rows, axis=1)[None, :, None]
            y, attention = layer.pre_self_attention_layer_norm(x), layer.self_attention
            at = (0, 0, position * num_rows, 0)
            new = _heads(attention, attention.key(y)), _heads(attention, attention.value(y))
            keys.append(jax.lax.dynamic_update_slice(cache.keys[index], new[0], at))
            values.append(jax.lax.dynamic_update_slice(cache.values[index], new[1], at))
            x += _attend(attention, y, keys[-1], values[-1], mask_Bx1xNxM, bias_1xHx1xM)
            y = layer.pre_cross_attention_layer_norm(x)
            x += _attend(layer.encoder_decoder_attention, y, *cross[index], cross_mask_Bx1x1xS, 0.0)
            x += layer.mlp(layer.pre_mlp_layer_norm(x), None)
        return t5.merge(*norm)(x), Cache(tuple(keys), tuple(values))

    shape = (batch_size, config.num_heads, max_length * num_rows, config.d_kv)
    empty = tuple(jnp.zeros(shape, config.dtype) for _ in layers)
    return step, Cache(empty, empty)


def _bias_tables(
    config: T5Config, decoder: Params, layers: list[Params], max_length: int
) -> list[Array]:
    """For each layer [H, 2 T - 1], the bias by key position minus query position.

    A window of it serves each query.
    """
    distances = np.arange(-max_length + 1, max_length)
    if config.relative_bias_per_layer:
        modules = [t5.merge((t5.DecoderLayer, config), layer).relpos_bias for layer in layers]
        return [module.by_distance(distances) for module in modules]
    part = t5.module_parts(config)["decoder"]["relpos_bias"]
    shared = t5.merge(part, decoder["relpos_bias"]).by_distance(distances)
    return [shared] * len(layers)


def _heads(attention: Attention, x_BxLxW: Array) -> Array:
    """[B, L, H * K] -> [B, H, L, K]."""
    x = x_BxLxW.reshape(*x_BxLxW.shape[:2], attention.num_heads, attention.d_kv)
    return jnp.moveaxis(x, 1, 2)


def _attend(
    attention: Attention,
    x_BxNxD: Array,
    key_BxHxMxK: Array,
    value_BxHxMxK: Array,
    mask: Array,
    bias: Array | float,
) -> Array:
    query_BxHxNxK = _heads(attention, attention.query(x_BxNxD))
    logits_BxHxNxM = jnp.einsum(
        "bhnk,bhmk->bhnm", query_BxHxNxK, key_BxHxMxK, preferred_element_type=jnp.float32
    )
    logits_BxHxNxM = jnp.where(mask, logits_BxHxNxM + bias, MASKED)
    weights = jax.nn.softmax(logits_BxHxNxM).astype(x_BxNxD.dtype)
    y_BxHxNxK = jnp.einsum("bhnm,bhmk->bhnk", weights, value_BxHxMxK)
    return attention.out(jnp.moveaxis(y_BxHxNxK, 1, 2).reshape(*x_BxNxD.shape[:2], -1))


def _visible(
    position: Array, batch_size: int, num_rows: int, length: int, sources_BxNxT: Array | None
) -> Array:
    """Bool [B or 1, 1, N, T * N]: what each row sees of all rows' positions."""
    rows = jnp.arange(num_rows)
    if sources_BxNxT is None:
        sources_BxNxT = jnp.broadcast_to(rows[None, :, None], (1, num_rows, length))
    own_NxN = rows[:, None] == rows
    times = jnp.arange(length)[:, None]
    mask_BxNxTxN = (sources_BxNxT[..., None] == rows) & (times < position)
    mask_BxNxTxN |= own_NxN[:, None, :] & (times == position)
    return mask_BxNxTxN.reshape(-1, 1, num_rows, length * num_rows)
