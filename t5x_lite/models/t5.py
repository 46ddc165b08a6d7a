"""T5: `init` and pure functions of (configuration, parameters, batch).

Parameters are one nested dict of float32 arrays with T5X's names; the layers of a stack are
stacked on a leading axis, `params["encoder"]["layers"]["attention"]["query"]["kernel"]` being
[num_layers, d_model, num_heads * d_kv]. The flax.nnx modules live only inside these functions.

A batch is a dict of int32 arrays [B, L] with the names of seqio's encoder-decoder features:
`encoder_input_tokens`, `decoder_input_tokens`, and for packed examples `encoder_segment_ids` and
`decoder_segment_ids` (0 where padded). Positions are not needed: distances within a packed
segment are those of the row.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from t5x_lite.models import activations
from t5x_lite.models.activations import gather, lay_out
from t5x_lite.models.config import T5Config
from t5x_lite.models.layers import (
    MLP,
    Attention,
    Dense,
    RelativePositionBias,
    RMSNorm,
    dropout,
    fold,
)

Params = dict[str, Any]
Batch = Mapping[str, Array]

# Dropout keys are folded by stack and then by layer, so that scanned and unrolled layers, and any
# number of them, draw the same masks.
_ENCODER_KEY, _DECODER_KEY = 0, 1
_EMBEDDING_KEY, _OUTPUT_KEY, _LAYERS_KEY = 0, 1, 2


class Embedding(nnx.Module):
    """The token embedding, shared by encoder and decoder; standard normal."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.d_model)
        self.embedding = nnx.Param(
            jax.random.normal(rngs.params(), shape, jnp.float32), axes=("vocab", "embed")
        )
        self.dtype = jnp.dtype(config.dtype)

    def __call__(self, tokens_BxL: Array) -> Array:
        # Where "embed" is split, each device looks up its columns for the ids of all devices that
        # share a table; then they exchange what was found, which is less than the table.
        tokens_BxL = lay_out(tokens_BxL, "lookup_batch", "length")
        found_BxLxD = self.embedding[...][tokens_BxL].astype(self.dtype)
        return _residual(lay_out(found_BxLxD, "lookup_batch", "length", "embed"))


class LogitsDense(Dense):
    """The separate output matrix of T5 1.1."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        shape, stddev = (config.d_model, config.vocab_size), config.d_model**-0.5
        super().__init__(config, shape, ("embed", "vocab"), stddev, rngs=rngs, truncated=True)


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.pre_attention_layer_norm = RMSNorm(config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        if config.relative_bias_per_layer:
            self.relpos_bias = RelativePositionBias(config, True, rngs=rngs)
        self.pre_mlp_layer_norm = RMSNorm(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.dropout_rate = config.dropout_rate

    def __call__(self, x_BxLxD: Array, mask: Array, bias: Array | None, key: Array | None) -> Array:
        drop = functools.partial(dropout, rate=self.dropout_rate, shared_axes=(-2,))
        x = x_BxLxD
        if bias is None:
            bias = self.relpos_bias(x.shape[1], x.shape[1])
        y = self.pre_attention_layer_norm(x)
        x = _residual(x + drop(self.attention(y, y, mask, bias, fold(key, 0)), fold(key, 1)))
        y = self.pre_mlp_layer_norm(x)
        return _residual(x + drop(self.mlp(y, fold(key, 2)), fold(key, 3)))


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention to the encoder, and feed-forward."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.pre_self_attention_layer_norm = RMSNorm(config, rngs=rngs)
        self.self_attention = Attention(config, rngs=rngs)
        if config.relative_bias_per_layer:
            self.relpos_bias = RelativePositionBias(config, False, rngs=rngs)
        self.pre_cross_attention_layer_norm = RMSNorm(config, rngs=rngs)
        self.encoder_decoder_attention = Attention(config, rngs=rngs)
        self.pre_mlp_layer_norm = RMSNorm(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x_BxLxD: Array,
        encoded_BxSxD: Array,
        mask: Array,
        cross_mask: Array,
        bias: Array | None,
        key: Array | None,
    ) -> Array:
        drop = functools.partial(dropout, rate=self.dropout_rate, shared_axes=(-2,))
        x = x_BxLxD
        if bias is None:
            bias = self.relpos_bias(x.shape[1], x.shape[1])
        y = self.pre_self_attention_layer_norm(x)
        y = self.self_attention(y, y, mask, bias, fold(key, 0))
        x = _residual(x + drop(y, fold(key, 1)))
        y = self.pre_cross_attention_layer_norm(x)
        y = self.encoder_decoder_attention(y, encoded_BxSxD, cross_mask, None, fold(key, 2))
        x = _residual(x + drop(y, fold(key, 3)))
        y = self.pre_mlp_layer_norm(x)
        return _residual(x + drop(self.mlp(y, fold(key, 4)), fold(key, 5)))


def module_parts(config: T5Config) -> dict[str, Any]:
    """How to make each part of the tree that is no stack of layers: (class, *arguments)."""
    parts: dict[str, Any] = {
        "token_embedder": (Embedding, config),
        "encoder": {
            "encoder_norm": (RMSNorm, config),
        },
        "decoder": {
            "decoder_norm": (RMSNorm, config),
        },
    }
    if not config.relative_bias_per_layer:
        parts["encoder"]["relpos_bias"] = (RelativePositionBias, config, True)
        parts["decoder"]["relpos_bias"] = (RelativePositionBias, config, False)
    if not config.tie_embeddings:
        parts["decoder"]["logits_dense"] = (LogitsDense, config)
    return parts


_STACKS = {"encoder": EncoderLayer, "decoder": DecoderLayer}


def _num_layers(config: T5Config) -> dict[str, int]:
    return {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}


def init(config: T5Config, key: Array) -> Params:
    """Draws the parameters with T5's initialisers.

    Under `jax.jit` with output shardings, or `jax.eval_shape`, nothing is ever whole on one
    device.

    Args:
      config: the architecture.
      key: a random key.

    Returns:
      The parameters: nested dict of float32 arrays.
    """
    num_parts = 0

    def draw(part: tuple, count: int | None = None) -> Params:
        nonlocal num_parts
        part_key = jax.random.fold_in(key, num_parts)
        num_parts += 1

        def one(part_key: Array) -> Params:
            module = part[0](*part[1:], rngs=nnx.Rngs(params=part_key))
            return nnx.to_pure_dict(nnx.state(module, nnx.Param))

        if count is None:
            return one(part_key)
        return jax.vmap(one)(jax.random.split(part_key, count))

    params = jax.tree.map(draw, module_parts(config), is_leaf=_is_tuple)
    for stack, count in _num_layers(config).items():
        params[stack]["layers"] = draw((_STACKS[stack], config), count)
    return params


@functools.cache
def logical_axes(config: T5Config) -> Params:
    """The tree of `init`, each leaf the names of the parameter's logical axes.

    Names: "layers" (the stack), "vocab", "embed" (d_model), "heads" (heads x d_kv, or heads in the
    bias table), "mlp" (d_ff), "relpos_buckets". `partitioning` maps them to mesh axes.
    """

    def axes(part: tuple) -> Params:
        _, abstract = _skeleton(part)
        is_param = lambda leaf: isinstance(leaf, nnx.Param)
        names = jax.tree.map(lambda p: p.get_metadata()["axes"], abstract, is_leaf=is_param)
        return nnx.to_pure_dict(names)

    tree = jax.tree.map(axes, module_parts(config), is_leaf=_is_tuple)
    for stack, layer in _STACKS.items():
        tree[stack]["layers"] = jax.tree.map(
            lambda names: ("layers", *names), axes((layer, config)), is_leaf=_is_tuple
        )
    return tree


def num_parameters(config: T5Config) -> int:
    """The exact number of parameters, from shapes alone."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@functools.cache
def _skeleton(part: tuple) -> tuple[Any, Any]:
    """The static half of a module, which `nnx.merge` joins with parameters, and their shapes."""
    return nnx.split(nnx.eval_shape(lambda: part[0](*part[1:], rngs=nnx.Rngs(params=0))))


def merge(part: tuple, params: Params) -> Any:
    """The module of a part, `(class, *arguments)`, with its parameters."""
    return nnx.merge(_skeleton(part)[0], params)


def _residual(x_BxLxD: Array) -> Array:
    return lay_out(x_BxLxD, "batch", "length", "activation_embed")


def _is_tuple(x: Any) -> bool:
    return isinstance(x, tuple)


_REMAT = {
    "none": activations.all_but_gathered,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _apply_layers(
    config: T5Config,
    stack: str,
    layers: Params,
    x: Array,
    key: Array | None,
    *context: Array | None,
) -> Array:
    """Runs `x` through the stacked layers; `context` follows it into each of them."""

    def body(x, layer_params, index, *context):
        layer = merge((_STACKS[stack], config), layer_params)
        return layer(x, *context, fold(key, index))

    if config.remat_policy != "none" or activations.are_laid_out():
        # In a scan nothing can undo the recomputation, which the barriers are against otherwise.
        body = jax.checkpoint(
            body, policy=_REMAT[config.remat_policy], prevent_cse=not config.scan_layers
        )
    count = _num_layers(config)[stack]
    if config.scan_layers:

        def scanned(x, layer):
            return body(x, *layer, *context), None

        return jax.lax.scan(scanned, x, (layers, jnp.arange(count)))[0]
    # `split` and not indexing: the gradient is then one concatenation.
    leaves, structure = jax.tree.flatten(layers)
    parts = [[jnp.squeeze(s, 0) for s in jax.lax.split(leaf, (1,) * count)] for leaf in leaves]
    for index, layer_leaves in enumerate(zip(*parts, strict=True)):
        x = body(x, jax.tree.unflatten(structure, layer_leaves), index, *context)
    return x


def encode(
    config: T5Config,
    params: Params,
    tokens_BxS: Array,
    segment_ids_BxS: Array | None = None,
    dropout_key: Array | None = None,
) -> Array:
    """Runs the encoder.

    Args:
      config: the architecture.
      params: as `init` gives them.
      tokens_BxS: int32 ids, 0 where padded.
      segment_ids_BxS: for packed rows the number of each token's example, from 1; 0 where padded.
        None: a row is one example, and ids above 0 belong to it.
      dropout_key: None for no dropout.

    Returns:
      [B, S, d_model] in the computation's dtype.
    """
    key = fold(dropout_key, _ENCODER_KEY)
    parts = module_parts(config)
    segments = _encoder_segments(tokens_BxS, segment_ids_BxS)
    mask = _same_segment(segments, segments)
    length = tokens_BxS.shape[1]
    bias = _stack_bias(parts["encoder"], params["encoder"], length)
    x = merge(parts["token_embedder"], params["token_embedder"])(tokens_BxS)
    x = dropout(x, fold(key, _EMBEDDING_KEY), config.dropout_rate, shared_axes=(-2,))
    layers_key = fold(key, _LAYERS_KEY)
    x = _apply_layers(config, "encoder", params["encoder"]["layers"], x, layers_key, mask, bias)
    x = merge(parts["encoder"]["encoder_norm"], params["encoder"]["encoder_norm"])(x)
    # Here alone T5X draws a mask for each position.
    return dropout(x, fold(key, _OUTPUT_KEY), config.dropout_rate)


def decode(
    config: T5Config,
    params: Params,
    encoded_BxSxD: Array,
    encoder_tokens_BxS: Array,
    decoder_tokens_BxL: Array,
    encoder_segment_ids_BxS: Array | None = None,
    decoder_segment_ids_BxL: Array | None = None,
    dropout_key: Array | None = None,
) -> Array:
    """Runs the decoder up to its final norm.

    Args:
      config: the architecture.
      params: as `init` gives them.
      encoded_BxSxD: the encoder's output.
      encoder_tokens_BxS: int32 ids that were encoded; tell padding where there are no segments.
      decoder_tokens_BxL: int32 ids, shifted right to begin with 0.
      encoder_segment_ids_BxS: as for `encode`.
      decoder_segment_ids_BxL: the same for the decoder. None: a row is one example; its padding
        comes last, where causality hides it.
      dropout_key: None for no dropout.

    Returns:
      [B, L, d_model], ready for a product with `output_kernel`.
    """
    key = fold(dropout_key, _DECODER_KEY)
    parts = module_parts(config)
    batch_size, length = decoder_tokens_BxL.shape
    encoder_segments = _encoder_segments(encoder_tokens_BxS, encoder_segment_ids_BxS)
    segments = decoder_segment_ids_BxL
    if segments is None:
        segments = jnp.ones((batch_size, length), jnp.int32)
    causal_LxL = jnp.tril(jnp.ones((length, length), bool))
    mask = _same_segment(segments, segments) & causal_LxL
    cross_mask = _same_segment(segments, encoder_segments)
    bias = _stack_bias(parts["decoder"], params["decoder"], length)
    x = merge(parts["token_embedder"], params["token_embedder"])(decoder_tokens_BxL)
    x = dropout(x, fold(key, _EMBEDDING_KEY), config.dropout_rate, shared_axes=(-2,))
    layers, layers_key = params["decoder"]["layers"], fold(key, _LAYERS_KEY)
    context = (encoded_BxSxD, mask, cross_mask, bias)
    x = _apply_layers(config, "decoder", layers, x, layers_key, *context)
    x = merge(parts["decoder"]["decoder_norm"], params["decoder"]["decoder_norm"])(x)
    return dropout(x, fold(key, _OUTPUT_KEY), config.dropout_rate, shared_axes=(-2,))


def output_kernel(config: T5Config, params: Params) -> Array:
    """The matrix from hidden states to logits, float32 [d_model, vocab_size].

    A decoder's output that is to be scaled by d_model^-0.5 is so here: the product is the same.
    """
    if config.tie_embeddings:
        kernel = gather(params["token_embedder"]["embedding"], ("vocab", "embed")).T
    else:
        kernel = gather(params["decoder"]["logits_dense"]["kernel"], ("embed", "vocab"))
    return kernel * config.d_model**-0.5 if config.scales_decoder_output else kernel


def hidden_states(
    config: T5Config, params: Params, batch: Batch, dropout_key: Array | None = None
) -> Array:
    """The decoder's output for a teacher-forced batch, [B, L, d_model]; see `decode`."""
    inputs = batch["encoder_input_tokens"]
    segments = batch.get("encoder_segment_ids")
    encoded = encode(config, params, inputs, segments, dropout_key)
    return decode(
        config,
        params,
        encoded,
        inputs,
        batch["decoder_input_tokens"],
        segments,
        batch.get("decoder_segment_ids"),
        dropout_key,
    )


def apply(
    config: T5Config, params: Params, batch: Batch, dropout_key: Array | None = None
) -> Array:
    """The logits for a teacher-forced batch, float32 [B, L, vocab_size].

    For training use `hidden_states` and `losses`, which never hold all logits at once.
    """
    hidden = hidden_states(config, params, batch, dropout_key).astype(jnp.float32)
    return hidden @ output_kernel(config, params)


def _stack_bias(parts: Params, params: Params, length: int) -> Array | None:
    """The bias [1, H, L, L] that all layers of the stack share; None if each has its own."""
    if "relpos_bias" not in parts:
        return None
    return merge(parts["relpos_bias"], params["relpos_bias"])(length, length)


def _encoder_segments(tokens: Array, segment_ids: Array | None) -> Array:
    return (tokens > 0).astype(jnp.int32) if segment_ids is None else segment_ids


def _same_segment(query_segments_BxL: Array, key_segments_BxS: Array) -> Array:
    """Bool [B, 1, L, S]: query and key belong to the same example, and the key is no padding."""
    queries, keys = query_segments_BxL[:, None, :, None], key_segments_BxS[:, None, None, :]
    return (queries == keys) & (keys > 0)
