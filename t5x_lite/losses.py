"""Cross entropy from hidden states, computed in chunks along the length.

At T5's vocabulary the logits of a batch are its largest array by far. Here they exist for one
chunk at a time, and training computes a chunk's gradient right where its logits are, so that the
backward pass needs neither the logits again nor a second product to recompute them.

Shapes in names: B batch, L length, D d_model, V vocabulary, C chunks.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from t5x_lite.models.activations import lay_out

# The float32 logits of a chunk take at most this many bytes on a device.
CHUNK_BYTES = 256 * 2**20


class LossSums(NamedTuple):
    """Sums over the tokens of a batch, float32 scalars.

    Attributes:
      loss: cross entropy in nats, label smoothing included, z-loss not.
      z_loss: z_loss * log(Z)^2.
      num_correct: tokens whose likeliest id is the target.
      num_tokens: the sum of the weights.
    """

    loss: Array
    z_loss: Array
    num_correct: Array
    num_tokens: Array


def num_chunks(length: int, rows_per_device: int, vocab_size: int) -> int:
    """The smallest divisor of `length` whose chunks of logits keep within CHUNK_BYTES."""
    needed = 4 * rows_per_device * length * vocab_size / CHUNK_BYTES
    divisors = (d for d in range(1, length + 1) if length % d == 0)
    return next((d for d in divisors if d >= needed), length)


def cross_entropy(
    hidden_BxLxD: Array,
    kernel_DxV: Array,
    targets_BxL: Array,
    weights_BxL: Array,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunks: int = 1,
) -> tuple[Array, LossSums]:
    """Summed cross entropy of `hidden @ kernel`, computed in float32.

    The z-loss (Mesh TensorFlow; Raffel et al. 2020 use 1e-4) keeps log(Z) near zero. With label
    smoothing s the target distribution is 1 - s on the target and s / (V - 1) elsewhere, and its
    own entropy is subtracted, so that a perfect prediction costs 0; both as T5X has them.

    Args:
      hidden_BxLxD: the decoder's output, any float dtype.
      kernel_DxV: float32 output matrix.
      targets_BxL: int32 ids.
      weights_BxL: weight of each token, 0 for padding.
      z_loss: coefficient.
      label_smoothing: s.
      chunks: number of pieces into which the length is cut; must divide it.

    Returns:
      The scalar to be differentiated, loss + z_loss, and the sums, which carry no gradient.
    """
    objective = functools.partial(_chunk, z_loss=z_loss, label_smoothing=label_smoothing)
    arrays = (hidden_BxLxD, targets_BxL, weights_BxL.astype(jnp.float32))
    return _summed(objective, chunks, kernel_DxV, arrays)


def token_log_likelihood(
    hidden_BxLxD: Array, kernel_DxV: Array, targets_BxL: Array, *, chunks: int = 1
) -> tuple[Array, Array]:
    """Log likelihood of each target, and whether it is the likeliest id.

    Args:
      hidden_BxLxD: the decoder's output, any float dtype.
      kernel_DxV: float32 output matrix.
      targets_BxL: int32 ids.
      chunks: number of pieces into which the length is cut; must divide it.

    Returns:
      float32 [B, L] in nats, and bool [B, L].
    """

    def one(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = chunk
        logits = _logits(hidden.astype(jnp.float32), kernel_DxV)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return _pick(logits, targets) - log_z, jnp.argmax(logits, axis=-1) == targets

    def whole(x_CxBxL: Array) -> Array:
        return jnp.moveaxis(x_CxBxL, 0, 1).reshape(targets_BxL.shape)

    pieces = tuple(_cut(x, chunks) for x in (hidden_BxLxD, targets_BxL))
    log_likelihood, correct = jax.lax.map(one, pieces)
    return whole(log_likelihood), whole(correct)


def _logits(hidden_BxLxD: Array, kernel_DxV: Array) -> Array:
    return lay_out(hidden_BxLxD @ kernel_DxV, "batch", "length", "activation_vocab")


def _pick(logits_BxLxV: Array, targets_BxL: Array) -> Array:
    return jnp.take_along_axis(logits_BxLxV, targets_BxL[..., None], axis=-1)[..., 0]


def _cut(x_BxL: Array, chunks: int) -> Array:
    """[B, L, ...] -> [C, B, L / C, ...]: every chunk keeps all rows, each on its device."""
    batch_size, length, *rest = x_BxL.shape
    return jnp.moveaxis(x_BxL.reshape(batch_size, chunks, length // chunks, *rest), 1, 0)


def _chunk(
    hidden: Array,
    kernel: Array,
    targets: Array,
    weights: Array,
    *,
    z_loss: float,
    label_smoothing: float,
    with_gradient: bool,
) -> Any:
    """One chunk's sums, and with them, if asked for, the gradient of loss + z_loss with respect to
    its hidden states and to the kernel."""
    hidden32 = hidden.astype(jnp.float32)
    logits = _logits(hidden32, kernel)
    vocab_size = kernel.shape[-1]
    maximum = jnp.max(logits, axis=-1, keepdims=True)
    exps = jnp.exp(logits - maximum)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    log_z = (jnp.log(total) + maximum)[..., 0]
    picked = _pick(logits, targets)
    loss = log_z - picked
    off = label_smoothing / (vocab_size - 1)
    on = 1.0 - label_smoothing
    if label_smoothing:
        entropy = -(on * math.log(on) + label_smoothing * math.log(off + 1e-20))
        # sum_v p_v (log Z - logit_v) = log Z - (on - off) logit_target - off sum_v logit_v
        loss = log_z - (on - off) * picked - off * jnp.sum(logits, axis=-1) - entropy
    z_term = z_loss * jnp.square(log_z)
    # No logit is larger. Equal to argmax but for ties, without a second walk over the logits.
    correct = picked >= maximum[..., 0]
    sums = LossSums(
        loss=jnp.sum(loss * weights),
        z_loss=jnp.sum(z_term * weights),
        num_correct=jnp.sum(correct * weights),
        num_tokens=jnp.sum(weights),
    )
    if not with_gradient:
        return sums
    slope = (weights * (1.0 + 2.0 * z_loss * log_z))[..., None] / total
    hot = jax.nn.one_hot(targets, vocab_size, dtype=jnp.float32)
    d_logits = exps * slope - weights[..., None] * ((on - off) * hot + off)
    d_hidden = (d_logits @ kernel.T).astype(hidden.dtype)
    d_kernel = lay_out(jnp.einsum("bld,blv->dv", hidden32, d_logits), "embed", "vocab")
    return sums, (d_hidden, d_kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    objective: Callable[..., Any], chunks: int, kernel: Array, arrays: tuple
) -> tuple[Array, LossSums]:
    hidden, targets, weights = arrays
    if chunks == 1:
        sums = objective(hidden, kernel, targets, weights, with_gradient=False)
        return sums.loss + sums.z_loss, sums

    def add(sums: LossSums, chunk: tuple) -> tuple[LossSums, None]:
        more = objective(chunk[0], kernel, *chunk[1:], with_gradient=False)
        return jax.tree.map(jnp.add, sums, more), None

    zeros = LossSums(*jnp.zeros(4))
    sums, _ = jax.lax.scan(add, zeros, tuple(_cut(x, chunks) for x in arrays))
    return sums.loss + sums.z_loss, sums


def _summed_forward(
    objective: Callable[..., Any], chunks: int, kernel: Array, arrays: tuple
) -> tuple[tuple[Array, LossSums], tuple[Array, Array]]:
    hidden, targets, weights = arrays
    if chunks == 1:
        sums, gradients = objective(hidden, kernel, targets, weights, with_gradient=True)
        return (sums.loss + sums.z_loss, sums), gradients

    def add(carry: tuple, chunk: tuple) -> tuple[tuple, Array]:
        sums, d_kernel = carry
        more, (d_hidden, more_d_kernel) = objective(
            chunk[0], kernel, *chunk[1:], with_gradient=True
        )
        return (jax.tree.map(jnp.add, sums, more), d_kernel + more_d_kernel), d_hidden

    start = (LossSums(*jnp.zeros(4)), jnp.zeros_like(kernel))
    (sums, d_kernel), d_hidden = jax.lax.scan(add, start, tuple(_cut(x, chunks) for x in arrays))
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    return (sums.loss + sums.z_loss, sums), (d_hidden, d_kernel)


def _summed_backward(
    objective: Callable[..., Any], chunks: int, gradients: tuple, cotangent: tuple
) -> tuple[Array, tuple]:
    d_hidden, d_kernel = gradients
    scale = cotangent[0]
    return scale * d_kernel, (d_hidden * scale.astype(d_hidden.dtype), None, None)


_summed.defvjp(_summed_forward, _summed_backward)
