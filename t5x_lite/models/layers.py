"""The layers of T5, as flax.nnx modules that hold float32 parameters and compute in `dtype`.

Shapes in names: B batch, L query or sequence length, S key length, D d_model, H heads, K d_kv,
F d_ff. Every parameter carries the names of its logical axes as `axes` metadata.
"""

import functools
import math
import operator
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from t5x_lite.models.activations import gather, lay_out
from t5x_lite.models.config import T5Config

# Large enough to vanish in a softmax, small enough that a row of nothing else stays finite.
MASKED = -1e10

_ACTIVATIONS = {
    # T5 1.1 uses the tanh approximation of GELU.
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


def dropout(
    x: Array, key: Array | None, rate: float, *, shared_axes: tuple[int, ...] = ()
) -> Array:
    """Zeroes a share `rate` of `x` and scales the rest by 1 / (1 - rate).

    Args:
      x: any shape.
      key: random key; None switches dropout off.
      rate: probability of a unit to be dropped.
      shared_axes: axes along which one mask is shared, as T5 does along the length.
    """
    if key is None or rate == 0.0:
        return x
    shape = list(x.shape)
    for axis in shared_axes:
        shape[axis] = 1
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return x * (keep.astype(x.dtype) / jnp.asarray(1.0 - rate, x.dtype))


def fold(key: Array | None, index: int | Array) -> Array | None:
    """`jax.random.fold_in` that lets "no dropout" through."""
    return None if key is None else jax.random.fold_in(key, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat_rows(x: Array, batch_size: int) -> Array:
    """[1, ...] -> [batch_size, ...], whose gradient is a product with ones.

    The sum over the batch that JAX would derive took XLA 70 ms on two CPU cores for the bias of
    8 x 6 x 512 x 512 attention logits; this product takes 2 ms.
    """
    return jnp.broadcast_to(x, (batch_size, *x.shape[1:]))


def _repeat_rows_forward(x: Array, batch_size: int) -> tuple[Array, None]:
    return repeat_rows(x, batch_size), None


def _repeat_rows_backward(batch_size: int, _: None, gradient: Array) -> tuple[Array]:
    ones = jnp.ones((1, batch_size), gradient.dtype)
    return (jnp.tensordot(ones, gradient, axes=1),)


repeat_rows.defvjp(_repeat_rows_forward, _repeat_rows_backward)


class RMSNorm(nnx.Module):
    """T5's layer norm: no mean, no bias; statistics in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((config.d_model,), jnp.float32), axes=("embed",))
        self.epsilon = config.layer_norm_epsilon
        self.dtype = jnp.dtype(config.dtype)

    def __call__(self, x_BxLxD: Array) -> Array:
        x = x_BxLxD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        y = (x * jax.lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)
        return y * gather(self.scale[...].astype(self.dtype), ("embed",))


class Dense(nnx.Module):
    """A matrix product without bias, `[..., in] -> [..., out]`."""

    def __init__(
        self,
        config: T5Config,
        shape: tuple[int, int],
        axes: tuple[str, str],
        stddev: float,
        *,
        rngs: nnx.Rngs,
        truncated: bool = False,
    ):
        if truncated:
            # A normal cut at two standard deviations, widened to keep the stated deviation.
            stddev = stddev / 0.87962566103423978
            draw = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
        else:
            draw = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(draw * stddev, axes=axes)
        self.axes = axes
        self.dtype = jnp.dtype(config.dtype)

    def __call__(self, x: Array) -> Array:
        return x @ gather(self.kernel[...].astype(self.dtype), self.axes)


class Attention(nnx.Module):
    """Multi-head attention without scaling by d_kv^-0.5: T5 folds it into the initialiser."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.num_heads, self.d_kv = config.num_heads, config.d_kv
        self.dropout_rate = config.dropout_rate
        width = self.num_heads * self.d_kv
        inwards, outwards = (config.d_model, width), (width, config.d_model)
        fan_in = config.d_model**-0.5
        axes = ("embed", "heads")
        self.query = Dense(config, inwards, axes, fan_in * self.d_kv**-0.5, rngs=rngs)
        self.key = Dense(config, inwards, axes, fan_in, rngs=rngs)
        self.value = Dense(config, inwards, axes, fan_in, rngs=rngs)
        self.out = Dense(config, outwards, ("heads", "embed"), width**-0.5, rngs=rngs)

    def __call__(
        self,
        x_BxLxD: Array,
        memory_BxSxD: Array,
        mask_Bx1xLxS: Array,
        bias_1xHxLxS: Array | None,
        dropout_key: Array | None,
    ) -> Array:
        """Attends from `x` to `memory`.

        Args:
          x_BxLxD: what asks.
          memory_BxSxD: what is attended to; `x` itself for self-attention.
          mask_Bx1xLxS: True where a query may see a key.
          bias_1xHxLxS: float32, added to the attention logits.
          dropout_key: for dropout of attention weights, one mask for all queries; or None.

        Returns:
          [B, L, D].
        """
        heads = (self.num_heads, self.d_kv)

        def split(x_BxLxW: Array) -> Array:
            x_BxLxHxK = x_BxLxW.reshape(*x_BxLxW.shape[:2], *heads)
            return lay_out(x_BxLxHxK, "batch", "length", "activation_heads", None)

        query_BxLxHxK = split(self.query(x_BxLxD))
        key_BxSxHxK = split(self.key(memory_BxSxD))
        value_BxSxHxK = split(self.value(memory_BxSxD))
        logits_BxHxLxS = jnp.einsum(
            "blhk,bshk->bhls", query_BxLxHxK, key_BxSxHxK, preferred_element_type=jnp.float32
        )
        if bias_1xHxLxS is not None:
            logits_BxHxLxS += repeat_rows(bias_1xHxLxS, logits_BxHxLxS.shape[0])
        logits_BxHxLxS = jnp.where(mask_Bx1xLxS, logits_BxHxLxS, MASKED)
        weights_BxHxLxS = jax.nn.softmax(logits_BxHxLxS).astype(x_BxLxD.dtype)
        weights_BxHxLxS = dropout(
            weights_BxHxLxS, dropout_key, self.dropout_rate, shared_axes=(-2,)
        )
        y_BxLxHxK = jnp.einsum("bhls,bshk->blhk", weights_BxHxLxS, value_BxSxHxK)
        return self.out(y_BxLxHxK.reshape(*x_BxLxD.shape[:2], -1))


class MLP(nnx.Module):
    """The feed-forward layer; gated if the configuration names two activations."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.activations = config.mlp_activations
        self.dropout_rate = config.dropout_rate
        shape, axes, stddev = (config.d_model, config.d_ff), ("embed", "mlp"), config.d_model**-0.5
        for name in self._names():
            setattr(self, name, Dense(config, shape, axes, stddev, rngs=rngs, truncated=True))
        self.wo = Dense(
            config, shape[::-1], axes[::-1], config.d_ff**-0.5, rngs=rngs, truncated=True
        )

    def _names(self) -> list[str]:
        gated = len(self.activations) > 1
        return [f"wi_{i}" if gated else "wi" for i in range(len(self.activations))]

    def __call__(self, x_BxLxD: Array, dropout_key: Array | None) -> Array:
        hidden_BxLxF = reduce(
            operator.mul,
            (
                _ACTIVATIONS[activation](getattr(self, name)(x_BxLxD))
                for name, activation in zip(self._names(), self.activations, strict=True)
            ),
        )
        hidden_BxLxF = lay_out(hidden_BxLxF, "batch", "length", "activation_mlp")
        return self.wo(dropout(hidden_BxLxF, dropout_key, self.dropout_rate, shared_axes=(-2,)))


class RelativePositionBias(nnx.Module):
    """One scalar a head for each bucket of key position minus query position.

    One table serves all layers of a stack (Raffel et al. 2020, section 2.1).
    """

    def __init__(self, config: T5Config, bidirectional: bool, *, rngs: nnx.Rngs):
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.bidirectional = bidirectional
        shape = (config.num_heads, self.num_buckets)
        bound = math.sqrt(3.0 / ((shape[0] + shape[1]) / 2))  # variance 1 / mean fan, uniform
        self.rel_embedding = nnx.Param(
            jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound),
            axes=("heads", "relpos_buckets"),
        )

    def __call__(self, query_length: int, key_length: int) -> Array:
        """Returns the bias, float32 [1, H, query_length, key_length]."""
        # The bias depends on the distance alone: one value a distance, then rows shifted by one
        # against each other. With a row of `period` distances repeated, cutting the sequence into
        # rows that are one shorter shifts them; the gradient is a plain sum over rows, where a
        # gather's would be a scatter of query_length x key_length values.
        period = query_length + key_length
        distance = np.arange(period)
        distance[key_length:] -= period
        by_distance = self.by_distance(distance)
        num_heads = by_distance.shape[0]
        rows = jnp.broadcast_to(by_distance[:, None], (num_heads, query_length, period))
        shifted = rows.reshape(num_heads, -1)[:, : query_length * (period - 1)]
        shifted = shifted.reshape(num_heads, query_length, period - 1)
        return shifted[None, :, :, :key_length]

    def by_distance(self, distance: np.ndarray) -> Array:
        """The bias at each distance of `distance`, int [n]: float32 [H, n]."""
        bucket = relative_position_bucket(
            distance,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return self.rel_embedding[...][:, bucket]


def relative_position_bucket(
    relative_position: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """T5's buckets: exact for small distances, logarithmic up to `max_distance`, then one.

    Args:
      relative_position: int array, key position minus query position.
      bidirectional: half of the buckets for keys after the query; else those share bucket 0.
      num_buckets: number of buckets.
      max_distance: distance at and beyond which the last bucket is used.

    Returns:
      int32 array of the same shape, in [0, num_buckets). Equal to T5X's and Hugging Face's.
    """
    offset = np.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        offset = (relative_position > 0) * num_buckets
        distance = np.abs(relative_position)
    else:
        distance = np.maximum(-relative_position, 0)
    num_exact = num_buckets // 2
    # float32 like the reference: the edges between buckets depend on the rounding.
    ratio = np.maximum(distance, 1).astype(np.float32) / num_exact
    logarithmic = num_exact + (
        np.log(ratio + np.finfo(np.float32).eps)
        / np.log(max_distance / num_exact)
        * (num_buckets - num_exact)
    ).astype(np.int32)
    bucket = np.where(distance < num_exact, distance, np.minimum(logarithmic, num_buckets - 1))
    return (offset + bucket).astype(np.int32)
