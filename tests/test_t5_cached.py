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
    "as T5 1.0": dataclasses.replace(BASE, mlp_activations=("relu",), tie_embeddings=True),
    "written out": dataclasses.replace(BASE, scan_layers=False, num_decoder_layers=3),
    "bias in each layer": dataclasses.replace(BASE, relative_bias_per_layer=True),
    "one wide head": dataclasses.replace(BASE, num_heads=1, d_kv=31, remat_policy="full"),
}

init = jax.jit(t5.init, static_argnums=0)
encode = jax.jit(t5.encode, static_argnums=0)
decode = jax.jit(t5.decode, static_argnums=0)


def make_steps(config, num_rows, max_length, params, encoded, inputs):
    """An empty cache, and (cache, tokens, position, sources) -> logits, cache under jit."""
    step, cache = cached.start(config, params, encoded, inputs, num_rows, max_length)

    @jax.jit
    def with_logits(*given):
        hidden, cache = step(*given)
        return hidden @ t5.output_kernel(config, params), cache

    return cache, with_logits


def random_inputs(rng: np.random.Generator, batch_size: int, length: int) -> np.ndarray:
    """Ids with padding at the end, one row of it full."""
    inputs = rng.integers(2, BASE.vocab_size, (batch_size, length), dtype=np.int32)
    lengths = rng.integers(1, length + 1, batch_size)
    lengths[0] = length
    return inputs * (np.arange(length) < lengths[:, None])


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
    encoded = encode(config, params, inputs)
    kernel = t5.output_kernel(config, params)
    cache, step = make_steps(config, num_rows, max_length, params, encoded, inputs)

    tokens = np.zeros((batch_size, num_rows, max_length + 1), np.int32)
    sources = np.zeros((batch_size, num_rows, max_length), np.int32)
    for at in range(max_length):
        logits, cache = step(cache, tokens[:, :, at], at, sources)
        flat = tokens[:, :, : at + 1].reshape(batch_size * num_rows, at + 1)
        repeated = (np.repeat(x, num_rows, axis=0) for x in (encoded, inputs))
        hidden = decode(config, params, *repeated, np.pad(flat, ((0, 0), (0, max_length - at - 1))))
        expected = np.asarray(hidden @ kernel)[:, at].reshape(logits.shape)
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
    encoded = encode(BASE, params, inputs)
    tokens = rng.integers(0, BASE.vocab_size, (batch_size, num_rows, max_length), dtype=np.int32)
    repeated = (np.repeat(x, num_rows, axis=0) for x in (encoded, inputs))
    hidden = decode(BASE, params, *repeated, tokens.reshape(-1, max_length))
    expected = np.asarray(hidden @ t5.output_kernel(BASE, params))
    expected = expected.reshape(batch_size, num_rows, max_length, -1)
    cache, step = make_steps(BASE, num_rows, max_length, params, encoded, inputs)
    for at in range(max_length):
        logits, cache = step(cache, tokens[:, :, at], at, None)
        np.testing.assert_allclose(logits, expected[:, :, at], rtol=0, atol=1e-5)


def test_bfloat16_keeps_its_cache_in_bfloat16():
    config = dataclasses.replace(BASE, dtype="bfloat16")
    params = init(config, jax.random.key(3))
    inputs = random_inputs(np.random.default_rng(3), 2, 5)
    encoded = encode(config, params, inputs)
    step, cache = cached.start(config, params, encoded, inputs, 2, 4)
    hidden, cache = step(cache, np.full((2, 2), 7, np.int32), np.int32(0), None)
    assert hidden.dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(cache)} == {"bfloat16"}
    whole = decode(config, params, encoded, inputs, np.full((2, 1), 7, np.int32))
    found, expected = (np.asarray(x[:, 0], np.float32) for x in (hidden, whole))
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.1)
