"""The cached decoder against the whole one, position by position."""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_lite.models import cached, t5
from t5x_lite.models.config import T5Config

BASE = T5Config(
    vocab_size=61,
    d_model=24,
    d_ff=40,
    d_kv=6,
    num_heads=3,
    num_encoder_layers=1,
    num_decoder_layers=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    dropout_rate=0.3,  # none of it is applied
)
CONFIGS = {
    "as T5 1.1": BASE,
    "as T5 1.0, written out": dataclasses.replace(
        BASE, mlp_activations=("relu",), tie_embeddings=True, scan_layers=False
    ),
    "bias in each layer": dataclasses.replace(BASE, relative_bias_per_layer=True),
    "one wide head": dataclasses.replace(BASE, num_heads=1, d_kv=31, remat_policy="full"),
}

init = jax.jit(t5.init, static_argnums=0)
apply = jax.jit(t5.apply, static_argnums=0)


def make_steps(config, num_rows, max_length, params, inputs):
    """An empty cache, and (cache, tokens, position, sources) -> logits, cache."""

    def start():
        encoded = t5.encode(config, params, inputs)
        return cached.start(config, params, encoded, inputs, num_rows, max_length)

    @jax.jit
    def step(*given):
        hidden, cache = start()[0](*given)
        return hidden.astype("float32") @ t5.output_kernel(config, params), cache

    empty = jax.eval_shape(lambda: start()[1])
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), empty), step


def random_inputs(rng: np.random.Generator, batch_size: int, length: int) -> np.ndarray:
    """Ids with padding at the end, one row of it full."""
    inputs = rng.integers(2, BASE.vocab_size, (batch_size, length), dtype=np.int32)
    lengths = rng.integers(1, length + 1, batch_size)
    lengths[0] = length
    return inputs * (np.arange(length) < lengths[:, None])


def whole_batch(inputs: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every input as often as it has rows of ids."""
    repeated = np.repeat(inputs, len(tokens) // len(inputs), axis=0)
    return {"encoder_input_tokens": repeated, "decoder_input_tokens": tokens}


@pytest.mark.parametrize(("seed", "name"), list(enumerate(CONFIGS)))
def test_rows_continue_from_one_another(seed, name):
    """Every row's logits are those of the whole decoder on the ids it has, wherever they lie.

    At each position each row continues a random row of the same input, as beams do.
    """
    config = CONFIGS[name]
    rng = np.random.default_rng(seed)
    batch_size, num_rows, max_length = 3, 4, 9
    params = init(config, jax.random.key(seed))
    inputs = random_inputs(rng, batch_size, 10)
    cache, step = make_steps(config, num_rows, max_length, params, inputs)

    tokens = np.zeros((batch_size, num_rows, max_length + 1), np.int32)
    sources = np.zeros((batch_size, num_rows, max_length), np.int32)
    for at in range(max_length):
        logits, cache = step(cache, tokens[:, :, at], at, sources)
        flat = (tokens[:, :, :-1] * (np.arange(max_length) <= at)).reshape(-1, max_length)
        expected = np.asarray(apply(config, params, whole_batch(inputs, flat)))[:, at]
        expected = expected.reshape(logits.shape)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)

        parents = rng.integers(0, num_rows, (batch_size, num_rows))
        tokens = np.take_along_axis(tokens, parents[..., None], axis=1)
        sources = np.take_along_axis(sources, parents[..., None], axis=1)
        sources[:, :, at] = parents
        tokens[:, :, at + 1] = rng.integers(0, config.vocab_size, (batch_size, num_rows))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_without_sources_each_row_keeps_its_own(num_rows):
    rng = np.random.default_rng(2)
    batch_size, max_length = 4, 30  # beyond the largest distance
    params = init(BASE, jax.random.key(2))
    inputs = random_inputs(rng, batch_size, 7)
    tokens = rng.integers(0, BASE.vocab_size, (batch_size, num_rows, max_length), dtype=np.int32)
    expected = apply(BASE, params, whole_batch(inputs, tokens.reshape(-1, max_length)))
    expected = expected.reshape(batch_size, num_rows, max_length, -1)
    cache, step = make_steps(BASE, num_rows, max_length, params, inputs)
    for at in range(max_length):
        logits, cache = step(cache, tokens[:, :, at], at, None)
        np.testing.assert_allclose(logits, expected[:, :, at], rtol=0, atol=1e-5)


def test_bfloat16_keeps_its_cache_in_bfloat16():
    config = dataclasses.replace(BASE, dtype="bfloat16")
    params = init(BASE, jax.random.key(3))
    inputs = random_inputs(np.random.default_rng(3), 2, 5)
    cache, step = make_steps(config, 2, 4, params, inputs)
    logits, cache = step(cache, np.full((2, 2), 7, np.int32), 0, None)
    assert {x.dtype.name for x in jax.tree.leaves(cache)} == {"bfloat16"}
    expected = apply(config, params, whole_batch(inputs, np.full((2, 1), 7, np.int32)))
    full = apply(BASE, params, whole_batch(inputs, np.full((2, 1), 7, np.int32)))
    # As near to the whole decoder as that is to float32.
    error = np.abs(np.asarray(expected - full)).max()
    assert 0 < error < 0.1
    np.testing.assert_allclose(logits[:, 0], expected[:, 0], rtol=0, atol=error)
