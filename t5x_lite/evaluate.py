"""Evaluation by loss, and the unigram baseline."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from t5x_lite import metrics
from t5x_lite.partitioning import Partitioning

Batch = Mapping[str, np.ndarray]


def evaluate_loss(
    eval_step: Callable[..., dict[str, jax.Array]],
    params: Any,
    batches: Iterable[Batch],
    text_ids_V: np.ndarray,
    partitioning: Partitioning,
) -> dict[str, float]:
    """Mean losses over all tokens of the batches.

    Args:
      eval_step: the jitted `step.eval_step`, its static arguments bound.
      params: the parameters.
      batches: this host's rows of each batch.
      text_ids_V: bool, the ids that are text.
      partitioning: where the batches go.

    Returns:
      `loss`, `text_loss` (over text tokens alone) in nats per token, `accuracy`, and the counts
      `num_tokens`, `num_text_tokens`.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        sums = eval_step(params, partitioning.shard_batch(batch), text_ids_V)
        for name, value in jax.device_get(sums).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return metrics.summarize(totals)


def unigram_loss(
    train_counts_V: np.ndarray, batches: Iterable[Batch], text_ids_V: np.ndarray
) -> float:
    """What a model that knows only the frequency of each token would lose.

    Frequencies are those of the training split's text tokens, each counted once more than it was
    seen, so that none is impossible.

    Args:
      train_counts_V: int, occurrences of each id in the training split.
      batches: those that the model is evaluated on.
      text_ids_V: bool, the ids that are text; other tokens count on neither side.

    Returns:
      Nats per text token of the targets.
    """
    smoothed = np.where(text_ids_V, train_counts_V + 1.0, 0.0)
    with np.errstate(divide="ignore"):
        nats_V = -np.log(smoothed / smoothed.sum())
    total, count = 0.0, 0
    for batch in batches:
        targets = batch["decoder_target_tokens"]
        tokens = targets[(batch["decoder_loss_weights"] > 0) & text_ids_V[targets]]
        total += nats_V[tokens].sum()
        count += tokens.size
    return float(total / count) if count else float("nan")
