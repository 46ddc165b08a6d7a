"""Evaluation by loss: means over tokens, not over batches, and the unigram baseline."""

import functools
import math

import jax
import numpy as np
import pytest

from t5x_lite import evaluate, step
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.partitioning import make_partitioning

VOCAB_SIZE = 64
TINY = T5Config(
    vocab_size=VOCAB_SIZE,
    d_model=16,
    d_ff=32,
    d_kv=4,
    num_heads=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.5,  # none of it is applied
)
TEXT_IDS = np.arange(VOCAB_SIZE) < 50
TEXT_IDS[:2] = False


def make_batch(rng: np.random.Generator, target_lengths: list[int]) -> dict[str, np.ndarray]:
    """Rows of 10 inputs and as many targets as given; a row of 0 is all padding."""
    inputs = rng.integers(2, VOCAB_SIZE, (len(target_lengths), 10), np.int32)
    targets = rng.integers(1, VOCAB_SIZE, (len(target_lengths), 7), np.int32)
    weights = (np.arange(7) < np.array(target_lengths)[:, None]).astype(np.int32)
    targets *= weights
    inputs *= (np.array(target_lengths) > 0)[:, None]
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1] * weights
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": weights,
    }


def test_loss_is_the_mean_over_all_tokens():
    """Batches of different numbers of tokens; log-probabilities from the logits in float64."""
    rng = np.random.default_rng(0)
    batches = [make_batch(rng, lengths) for lengths in ([7, 7, 7], [1, 2, 0], [5, 0, 0])]
    params = t5.init(TINY, jax.random.key(0))
    mesh = make_partitioning({"data": 1}, devices=jax.devices()[:1])
    eval_step = jax.jit(functools.partial(step.eval_step, TINY, mesh))
    found = evaluate.evaluate_loss(eval_step, params, batches, TEXT_IDS, mesh)

    apply = jax.jit(functools.partial(t5.apply, TINY))
    nats, correct, text = [], [], []
    for batch in batches:
        logits = np.asarray(apply(params, batch), np.float64)
        for row, position in np.argwhere(batch["decoder_loss_weights"] > 0):
            target = batch["decoder_target_tokens"][row, position]
            at = logits[row, position]
            nats.append(math.log(np.exp(at - at.max()).sum()) + at.max() - at[target])
            correct.append(at.argmax() == target)
            text.append(TEXT_IDS[target])
    assert found["num_tokens"] == len(nats) == 29
    assert found["num_text_tokens"] == sum(text) > 0
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["text_loss"] == pytest.approx(np.array(nats)[text].mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(correct), rel=1e-6)


def targets_batch(targets: list[list[int]]) -> dict[str, np.ndarray]:
    tokens = np.array(targets, np.int32)
    return {"decoder_target_tokens": tokens, "decoder_loss_weights": (tokens > 0).astype(np.int32)}


def test_unigram_loss_by_hand():
    """Ids 2, 3 and 4 are text, seen 5, 2 and 0 times: 6/10, 3/10 and 1/10 with one more of each."""
    counts = np.array([100, 50, 5, 2, 0, 30])
    text_ids = np.array([False, False, True, True, True, False])
    # Text in the targets: 2, 2, 3 and 4. The end mark 1, the sentinel 5 and padding do not count.
    batches = [targets_batch([[5, 2, 2, 1], [1, 0, 0, 0]]), targets_batch([[5, 3, 4, 1]])]
    expected = -(2 * math.log(0.6) + math.log(0.3) + math.log(0.1)) / 4
    found = evaluate.unigram_loss(counts, batches, text_ids)
    assert found == pytest.approx(expected, rel=1e-12)


def test_unigram_loss_of_the_training_text_is_its_entropy():
    rng = np.random.default_rng(1)
    tokens = rng.choice(np.arange(2, 10), 100_000, p=np.arange(1, 9) / 36).astype(np.int32)
    text_ids = np.arange(10) > 1
    shares = np.bincount(tokens, minlength=10)[2:] / tokens.size
    found = evaluate.unigram_loss(
        np.bincount(tokens, minlength=10),
        [targets_batch(tokens.reshape(100, -1).tolist())],
        text_ids,
    )
    assert found == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-6)


def test_unigram_loss_without_text_is_no_number():
    batch = targets_batch([[1, 0], [1, 0]])
    assert math.isnan(evaluate.unigram_loss(np.ones(4), [batch], np.arange(4) > 1))
