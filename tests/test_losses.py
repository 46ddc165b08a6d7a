"""Losses against the textbook formula in float64, and memory against the promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import losses


def draw(seed=0, rows=3, length=8, width=5, vocab=11):
    """Hidden states, kernel, targets and uneven weights."""
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(rows, length, width)).astype(np.float32),
        rng.normal(size=(width, vocab)).astype(np.float32),
        rng.integers(0, vocab, (rows, length)).astype(np.int32),
        (rng.random((rows, length)) < 0.7).astype(np.float32),
    )


def textbook(hidden, kernel, targets, weights, z_loss, smoothing):
    """Cross entropy with a smoothed target distribution, minus that distribution's entropy."""
    logits = hidden.astype(np.float64) @ kernel.astype(np.float64)
    vocab = logits.shape[-1]
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    q = np.full_like(logits, smoothing / (vocab - 1))
    np.put_along_axis(q, targets[..., None], 1 - smoothing, axis=-1)
    entropy = -(q * np.log(np.where(q > 0, q, 1))).sum(-1)
    loss = -(q * log_p).sum(-1) - entropy
    correct = logits.argmax(-1) == targets
    return [(x * weights).sum() for x in (loss, z_loss * log_z**2, correct, np.ones_like(weights))]


@pytest.mark.parametrize("chunks", [1, 2, 8])
@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (1e-2, 0.0), (1e-2, 0.1)])
def test_cross_entropy_is_the_textbooks(chunks, z_loss, smoothing):
    arrays = draw()
    total, sums = losses.cross_entropy(
        *arrays, z_loss=z_loss, label_smoothing=smoothing, chunks=chunks
    )
    expected = textbook(*arrays, z_loss, smoothing)
    np.testing.assert_allclose(sums, expected, rtol=2e-6)
    np.testing.assert_allclose(total, expected[0] + expected[1], rtol=2e-6)


@pytest.mark.parametrize("chunks", [1, 4])
def test_gradient_is_that_of_the_formula(chunks):
    """The hand-written backward pass against finite differences of the textbook in float64."""
    hidden, kernel, targets, weights = draw(1)
    options = {"z_loss": 1e-2, "label_smoothing": 0.1}

    def scaled(hidden, kernel):
        loss, _ = losses.cross_entropy(hidden, kernel, targets, weights, chunks=chunks, **options)
        return 3.0 * loss

    d_hidden, d_kernel = jax.jit(jax.grad(scaled, argnums=(0, 1)))(hidden, kernel)

    def value(hidden, kernel):
        loss, z_term, *_ = textbook(hidden, kernel, targets, weights, 1e-2, 0.1)
        return 3.0 * (loss + z_term)

    for array, gradient, which in ((hidden, d_hidden, 0), (kernel, d_kernel, 1)):
        numeric = np.zeros(array.shape)
        for index in np.ndindex(*array.shape):
            ends = []
            for delta in (1e-5, -1e-5):
                moved = [hidden.astype(np.float64), kernel.astype(np.float64)]
                moved[which][index] += delta
                ends.append(value(*moved))
            numeric[index] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(gradient, numeric, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunks", [1, 2])
def test_token_log_likelihood(chunks):
    hidden, kernel, targets, _ = draw(2)
    found, correct = losses.token_log_likelihood(hidden, kernel, targets, chunks=chunks)
    logits = hidden.astype(np.float64) @ kernel
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
    assert (np.asarray(correct) == (logits.argmax(-1) == targets)).all()


def test_large_logits_stay_finite():
    hidden = jnp.full((1, 1, 1), 1e4, jnp.float32)
    kernel = jnp.asarray([[1.0, -1.0]], jnp.float32)
    ones = jnp.ones((1, 1))
    total, _ = losses.cross_entropy(hidden, kernel, jnp.ones((1, 1), int), ones)
    assert total == 2e4


def test_chunks_bound_the_logits_in_memory():
    rows, length, width, vocab = 4, 16, 8, 4096

    def temporaries(chunks):
        def loss(hidden, kernel):
            targets = jnp.zeros((rows, length), jnp.int32)
            return losses.cross_entropy(
                hidden, kernel, targets, jnp.ones((rows, length)), chunks=chunks
            )[0]

        shapes = [
            jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, length, width), (width, vocab))
        ]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits_bytes = 4 * rows * length * vocab
    assert temporaries(1) > logits_bytes
    assert temporaries(16) < logits_bytes / 2


def test_number_of_chunks_divides_the_length_and_keeps_the_bound():
    for length, rows, vocab in [(114, 8, 32128), (114, 512, 32128), (113, 512, 250112), (7, 1, 9)]:
        chunks = losses.num_chunks(length, rows, vocab)
        assert length % chunks == 0
        fits = 4 * rows * (length // chunks) * vocab <= losses.CHUNK_BYTES
        assert fits or chunks == length
    assert losses.num_chunks(114, 8, 32128) == 1
