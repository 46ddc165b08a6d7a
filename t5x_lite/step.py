"""The training and evaluation steps: pure functions from arrays to arrays, to be jitted by callers.

The train step in one breath: cut the batch into microbatches, add up the gradients of the summed
loss, divide once by the whole batch's normaliser, let the optimizer turn them into an update.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from t5x_lite import losses
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.partitioning import Partitioning

Batch = Mapping[str, Array]

REAL_TARGET_TOKENS = "NUM_REAL_TARGET_TOKENS"


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: nested dict of float32 arrays.
      opt_state: the optimizer's state.
    """

    step: Array
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Attributes:
      z_loss: coefficient of log(Z)^2; T5 uses 1e-4.
      label_smoothing: probability mass moved from the target to all other ids.
      normalizing_factor: what the summed loss is divided by before differentiation:
        "NUM_REAL_TARGET_TOKENS" (the batch's target tokens without padding), a number, or None for
        the plain sum, which is T5X's default. Adafactor's updates hardly depend on it; clipping
        and AdamW's epsilon do.
      num_microbatches: pieces into which the batch is cut to save memory.
    """

    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    normalizing_factor: float | str | None = REAL_TARGET_TOKENS
    num_microbatches: int = 1

    def __post_init__(self) -> None:
        """Raises UsageError on the first field whose value makes no sense."""
        if self.z_loss < 0:
            raise UsageError(f"LossConfig.z_loss = {self.z_loss!r}: must be at least 0")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(
                f"LossConfig.label_smoothing = {self.label_smoothing!r}: must be in [0, 1)"
            )
        if self.num_microbatches < 1:
            raise UsageError(
                f"LossConfig.num_microbatches = {self.num_microbatches!r}: must be at least 1"
            )
        factor = self.normalizing_factor
        if factor is None or factor == REAL_TARGET_TOKENS:
            return
        if isinstance(factor, str) or not factor > 0:
            raise UsageError(
                f"LOSS_NORMALIZING_FACTOR = {factor!r}: allowed are {REAL_TARGET_TOKENS!r}, a "
                "positive number, and None for the plain sum"
            )


def init_state(model: T5Config, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """A fresh state at step 0; jit it with output shardings, or eval_shape it."""
    params = t5.init(model, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    model: T5Config,
    loss_config: LossConfig,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    partitioning: Partitioning,
    state: TrainState,
    batch: Batch,
    key: Array,
) -> tuple[TrainState, dict[str, Array]]:
    """One update. The first five arguments are static: bind them before jitting.

    Args:
      model: the architecture.
      loss_config: what is minimised.
      optimizer: from `optimizers.make_optimizer`.
      learning_rate: its schedule, for the log.
      partitioning: where activations and gradients lie.
      state: will be donated.
      batch: int32 arrays [B, L] with seqio's names for encoder-decoder features.
      key: the run's random key; dropout uses it folded with the step and the microbatch.

    Returns:
      The next state, and float32 scalars: `loss_sum` (nats, without z-loss), `z_loss_sum`,
      `num_correct`, `num_tokens`, `grad_norm` (before clipping) and `learning_rate`.
    """
    key = jax.random.fold_in(key, state.step)

    def summed_loss(params: Any, rows: Batch, key: Array) -> tuple[Array, losses.LossSums]:
        dropout_key = key if model.dropout_rate else None
        with partitioning.of_activations():
            hidden = t5.hidden_states(model, params, rows, dropout_key)
            return losses.cross_entropy(
                hidden,
                t5.output_kernel(model, params),
                rows["decoder_target_tokens"],
                rows["decoder_loss_weights"],
                z_loss=loss_config.z_loss,
                label_smoothing=loss_config.label_smoothing,
                chunks=num_chunks(model, partitioning, rows["decoder_target_tokens"]),
            )

    param_shardings = partitioning.shardings(t5.logical_axes(model))

    def gradient(params: Any, rows: Batch, key: Array) -> tuple[Any, losses.LossSums]:
        grads, sums = jax.grad(summed_loss, has_aux=True)(params, rows, key)
        # Said aloud, or the compiler may add up whole gradients on every device.
        return jax.lax.with_sharding_constraint(grads, param_shardings), sums

    if loss_config.num_microbatches == 1:
        grads, sums = gradient(state.params, batch, key)
    else:
        grads, sums = _accumulate(gradient, state.params, batch, key, loss_config.num_microbatches)
    factor = loss_config.normalizing_factor
    if factor is not None:
        # A batch without any target gives no gradient rather than 0 / 0.
        divisor = jnp.maximum(sums.num_tokens, 1.0) if isinstance(factor, str) else factor
        grads = jax.tree.map(lambda g: g / divisor, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    scalars = {
        "loss_sum": sums.loss,
        "z_loss_sum": sums.z_loss,
        "num_correct": sums.num_correct,
        "num_tokens": sums.num_tokens,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state), scalars


def num_chunks(model: T5Config, partitioning: Partitioning, targets_BxL: Array) -> int:
    """Pieces of the length such that a piece's logits are small on a device."""
    batch_size, length = targets_BxL.shape
    rows_per_device = -(-batch_size // partitioning.num_batch_shards)
    vocab_per_device = -(-model.vocab_size // partitioning.num_parts("activation_vocab"))
    return losses.num_chunks(length, rows_per_device, vocab_per_device)


def _accumulate(
    gradient: Callable[..., Any], params: Any, batch: Batch, key: Array, count: int
) -> tuple[Any, Any]:
    """Sums of gradients and of losses over `count` microbatches, one after the other.

    Row r goes to microbatch r modulo count: each device keeps the rows that it has.
    """

    def cut(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)

    def add(total: tuple, rows_and_index: tuple) -> tuple[tuple, None]:
        rows, index = rows_and_index
        more = gradient(params, rows, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, more), None

    zeros = (jax.tree.map(jnp.zeros_like, params), losses.LossSums(*jnp.zeros(4)))
    rows = {name: cut(array) for name, array in batch.items()}
    return jax.lax.scan(add, zeros, (rows, jnp.arange(count)))[0]


def eval_step(
    model: T5Config, partitioning: Partitioning, params: Any, batch: Batch, text_ids_V: Array
) -> dict[str, Array]:
    """Sums over one batch, without dropout. The first two arguments are static.

    Args:
      model: the architecture.
      partitioning: where activations lie.
      params: the parameters.
      batch: as for `train_step`.
      text_ids_V: bool, True for ids that are text: neither sentinel, end mark nor padding.

    Returns:
      float32 scalars `loss_sum` (nats), `num_correct`, `num_tokens`, and the same over text
      tokens alone: `text_loss_sum`, `num_text_tokens`.
    """
    targets = batch["decoder_target_tokens"]
    with partitioning.of_activations():
        log_likelihood, correct = losses.token_log_likelihood(
            t5.hidden_states(model, params, batch),
            t5.output_kernel(model, params),
            targets,
            chunks=num_chunks(model, partitioning, targets),
        )
    weights = batch["decoder_loss_weights"].astype(jnp.float32)
    text = weights * text_ids_V[targets]
    return {
        "loss_sum": -jnp.sum(log_likelihood * weights),
        "num_correct": jnp.sum(correct * weights),
        "num_tokens": jnp.sum(weights),
        "text_loss_sum": -jnp.sum(log_likelihood * text),
        "num_text_tokens": jnp.sum(text),
    }
