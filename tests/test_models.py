"""The model against Hugging Face, T5X, closed forms and its own invariants."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from t5x_lite.errors import UsageError
from t5x_lite.models import layers, t5
from t5x_lite.models.config import T5Config

TINY = T5Config(
    vocab_size=97,
    d_model=24,
    d_ff=40,
    d_kv=6,
    num_heads=3,
    num_encoder_layers=2,
    num_decoder_layers=3,
    dropout_rate=0.2,
)


INIT = jax.jit(t5.init, static_argnums=0)
APPLY = jax.jit(t5.apply, static_argnums=0)


def random_batch(seed: int, rows: int = 2, inputs: int = 11, targets: int = 7) -> dict:
    """Token ids without padding."""
    rng = np.random.default_rng(seed)
    return {
        "encoder_input_tokens": rng.integers(2, 97, (rows, inputs), dtype=np.int32),
        "decoder_input_tokens": rng.integers(2, 97, (rows, targets), dtype=np.int32),
    }


def relative_l2(a, b) -> float:
    """The distance of two trees as a share of the second's norm."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("name", ["t5_v10", "t5_v11"])
def test_logits_equal_hugging_face(shared_data, name, scan_layers):
    directory = shared_data / "checkpoints" / "hf" / name
    config, params = references.load_hf(directory)
    config = dataclasses.replace(config, scan_layers=scan_layers)
    golden = np.load(directory / "golden.npz")
    batch = {
        "encoder_input_tokens": golden["input_ids"],
        "decoder_input_tokens": golden["decoder_input_ids"],
    }
    assert np.array_equal(golden["attention_mask"], golden["input_ids"] > 0)
    logits = APPLY(config, params, batch)
    facts = json.loads((directory / "golden.json").read_text())
    tolerance = 3 * facts["float32_vs_float64_logits_max_abs"]
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=tolerance)


T5X_FIXTURES = [
    "t5x_legacy_unscanned_v10",
    "t5x_legacy_unscanned_v11",
    "t5x_legacy_scanned_v11",
    "t5x_orbax_unscanned_v11",
    "t5x_orbax_scanned_v11",
]


@pytest.mark.parametrize("name", T5X_FIXTURES)
def test_logits_equal_t5x(shared_data, name):
    directory = shared_data / "checkpoints" / "t5x" / name
    config, params = references.load_t5x(directory)
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(lambda: t5.init(config, jax.random.key(0)))
    )
    golden = np.load(directory / "golden.npz")
    logits = APPLY(config, params, {k: golden[k] for k in golden if "tokens" in k})
    valid = golden["valid"]
    assert valid.any()
    np.testing.assert_allclose(logits[valid], golden["logits"][valid], rtol=0, atol=1e-5)


def test_far_relative_positions_equal_t5x(shared_data):
    directory = shared_data / "checkpoints" / "t5x" / "t5x_legacy_unscanned_v11"
    config, params = references.load_t5x(directory)
    golden = np.load(directory / "golden_long.npz")
    logits = APPLY(config, params, {k: golden[k] for k in golden if "tokens" in k})
    found = np.asarray(logits)[:, golden["positions"]]
    np.testing.assert_allclose(found, golden["logits_at_positions"], rtol=0, atol=1e-5)


T5_1_0 = T5Config(mlp_activations=("relu",), tie_embeddings=True)
PUBLISHED = {
    # d_model, d_ff, d_kv, heads, layers, parameters: Raffel et al. 2020, section 3.7, and the
    # released 1.1 checkpoints; counted at vocabulary 32,128.
    ("1.0", "small"): (512, 2048, 64, 8, 6, 60_506_624),
    ("1.0", "base"): (768, 3072, 64, 12, 12, 222_903_552),
    ("1.0", "large"): (1024, 4096, 64, 16, 24, 737_668_096),
    ("1.0", "xl"): (1024, 16384, 128, 32, 24, 2_851_598_336),
    ("1.0", "xxl"): (1024, 65536, 128, 128, 24, 11_307_321_344),
    ("1.1", "small"): (512, 1024, 64, 6, 8, 76_961_152),
    ("1.1", "base"): (768, 2048, 64, 12, 12, 247_577_856),
    ("1.1", "large"): (1024, 2816, 64, 16, 24, 783_150_080),
    ("1.1", "xl"): (2048, 5120, 64, 32, 24, 2_849_757_184),
    ("1.1", "xxl"): (4096, 10240, 64, 64, 24, 11_135_332_352),
}


@pytest.mark.parametrize(("version", "size"), PUBLISHED)
def test_parameter_counts(version, size):
    d_model, d_ff, d_kv, num_heads, num_layers, count = PUBLISHED[version, size]
    config = dataclasses.replace(
        T5_1_0 if version == "1.0" else T5Config(),
        d_model=d_model,
        d_ff=d_ff,
        d_kv=d_kv,
        num_heads=num_heads,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
    )
    assert t5.num_parameters(config) == count


def test_initialisers_have_the_published_deviations():
    config = dataclasses.replace(TINY, d_model=256, d_ff=512, d_kv=64, num_heads=8, vocab_size=999)
    params = INIT(config, jax.random.key(1))
    attention = params["encoder"]["layers"]["attention"]
    deviations = {
        "query": (attention["query"]["kernel"], (256 * 64) ** -0.5),
        "key": (attention["key"]["kernel"], 256**-0.5),
        "value": (attention["value"]["kernel"], 256**-0.5),
        "out": (attention["out"]["kernel"], (64 * 8) ** -0.5),
        "wi_0": (params["decoder"]["layers"]["mlp"]["wi_0"]["kernel"], 256**-0.5),
        "wo": (params["decoder"]["layers"]["mlp"]["wo"]["kernel"], 512**-0.5),
        "embedding": (params["token_embedder"]["embedding"], 1.0),
        "logits": (params["decoder"]["logits_dense"]["kernel"], 256**-0.5),
    }
    for name, (value, expected) in deviations.items():
        # The sample deviation of n normals is within 4 / sqrt(2 n) of the true one.
        assert abs(np.std(value) / expected - 1) < 4 / (2 * value.size) ** 0.5, name
        assert abs(np.mean(value)) < 4 * expected / value.size**0.5, name
    limit = (3.0 / ((8 + 32) / 2)) ** 0.5
    bias = params["decoder"]["relpos_bias"]["rel_embedding"]
    assert 0.9 * limit < np.abs(bias).max() <= limit
    first, second = attention["query"]["kernel"]
    assert abs(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]) < 0.02
    truncated = params["decoder"]["layers"]["mlp"]["wi_0"]["kernel"] / 256**-0.5
    assert np.abs(truncated).max() <= 2 / 0.87962566 + 1e-5


def loss(config, params, batch, key):
    """The cross entropy of the next decoder input."""
    log_p = jax.nn.log_softmax(t5.apply(config, params, batch, key)[:, :-1])
    return -jnp.take_along_axis(log_p, batch["decoder_input_tokens"][:, 1:, None], -1).mean()


@functools.cache
def loss_and_gradient(dropout=True, **changes):
    """At fixed parameters, batch and key, under a changed configuration."""
    config = dataclasses.replace(TINY, **changes)
    params = INIT(TINY, jax.random.key(0))
    key = jax.random.key(5) if dropout else None
    gradient = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    return gradient(config, params, random_batch(0), key)


@pytest.mark.parametrize("remat_policy", ["none", "dots", "full"])
def test_scanned_equals_unrolled_with_dropout(remat_policy):
    unrolled = loss_and_gradient(scan_layers=False)
    scanned = loss_and_gradient(remat_policy=remat_policy)
    assert relative_l2(scanned[0], unrolled[0]) < 1e-6
    assert relative_l2(scanned[1], unrolled[1]) < 1e-6


def test_dropout_changes_the_loss():
    with_dropout, without = loss_and_gradient(), loss_and_gradient(dropout=False)
    assert relative_l2(without[0], with_dropout[0]) > 1e-3


def test_remat_full_keeps_less_than_none():
    batch = random_batch(0, rows=4, inputs=64, targets=64)

    def temporaries(policy):
        config = dataclasses.replace(TINY, remat_policy=policy, num_encoder_layers=8)
        shapes = jax.eval_shape(lambda: t5.init(config, jax.random.key(0)))
        step = jax.jit(jax.grad(lambda p: loss(config, p, batch, None)))
        return step.lower(shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.6 * temporaries("none")


def test_decoder_is_causal_and_encoder_is_not():
    params = INIT(TINY, jax.random.key(0))
    batch = random_batch(1)

    def with_embeddings(name):
        """Which tokens of `name` a position's logits depend on, by their embeddings' gradients."""
        tokens = batch[name]
        # Distinct ids, so that a row of the embedding stands for one position.
        ids = np.arange(10, 10 + tokens.size, dtype=np.int32).reshape(tokens.shape)
        changed = {k: (ids if k == name else np.full_like(v, 3)) for k, v in batch.items()}

        def logit(embedding, position):
            p = {**params, "token_embedder": {"embedding": embedding}}
            return t5.apply(TINY, p, changed)[0, position].sum()

        gradient = jax.jit(jax.grad(logit))

        def influence(position):
            grads = gradient(params["token_embedder"]["embedding"], position)
            return np.abs(np.asarray(grads))[ids[0]].sum(-1) > 0

        return influence

    decoder = with_embeddings("decoder_input_tokens")
    encoder = with_embeddings("encoder_input_tokens")
    for position in range(7):
        assert decoder(position).tolist() == [i <= position for i in range(7)]
        assert encoder(position).all()


def test_packed_segments_are_blind_to_each_other():
    params = INIT(TINY, jax.random.key(0))
    one, two = random_batch(2, 1, 5, 4), random_batch(3, 1, 6, 3)
    packed = {k: np.concatenate([one[k], two[k]], axis=1) for k in one}
    pad = {k: np.pad(v, ((0, 0), (0, 2))) for k, v in packed.items()}
    pad["encoder_segment_ids"] = np.array([[1] * 5 + [2] * 6 + [0] * 2], np.int32)
    pad["decoder_segment_ids"] = np.array([[1] * 4 + [2] * 3 + [0] * 2], np.int32)
    together = APPLY(TINY, params, pad)
    apart = [APPLY(TINY, params, batch) for batch in (one, two)]
    np.testing.assert_allclose(together[:, :4], apart[0], atol=2e-5)
    np.testing.assert_allclose(together[:, 4:7], apart[1], atol=2e-5)

    # And exactly: no gradient reaches an embedding that only the other segment uses.
    ids = np.arange(10, 23, dtype=np.int32)[None]
    pad["encoder_input_tokens"] = ids
    pad["decoder_input_tokens"] = np.full((1, 9), 3, np.int32)

    def logit(embedding):
        p = {**params, "token_embedder": {"embedding": embedding}}
        return t5.apply(TINY, p, pad)[0, :4].sum()

    grads = jax.jit(jax.grad(logit))(params["token_embedder"]["embedding"])
    seen = np.abs(np.asarray(grads))[ids[0]].sum(-1) > 0
    assert seen.tolist() == [True] * 5 + [False] * 8


def test_padding_changes_no_logit():
    params = INIT(TINY, jax.random.key(0))
    batch = random_batch(4)
    padded = {k: np.pad(v, ((0, 0), (0, 5))) for k, v in batch.items()}
    expected = APPLY(TINY, params, batch)
    np.testing.assert_allclose(APPLY(TINY, params, padded)[:, :7], expected, atol=2e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 64), (8, 20)])
def test_relative_position_buckets(bidirectional, num_buckets, max_distance):
    """Against the definition, in float64 and one position at a time."""

    def bucket(distance: int) -> int:
        half = num_buckets // 2 if bidirectional else num_buckets
        start = half if bidirectional and distance > 0 else 0
        n = abs(distance) if bidirectional else max(-distance, 0)
        exact = half // 2
        if n < exact:
            return start + n
        share = np.log(n / exact) / np.log(max_distance / exact)
        # A hair above, so that exact powers do not fall on either side by rounding.
        return start + min(half - 1, exact + int(share * (half - exact) + 1e-6))

    distances = np.arange(-3000, 3001)
    found = layers.relative_position_bucket(
        distances,
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    assert found.tolist() == [bucket(int(d)) for d in distances]


def test_dropout_masks_are_shared_along_the_stated_axis():
    x = jnp.ones((4, 50, 30))
    y = np.asarray(layers.dropout(x, jax.random.key(0), 0.25, shared_axes=(-2,)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(4 / 3)}
    assert (y == y[:, :1]).all()
    assert not (y == y[:1]).all()
    alone = np.asarray(layers.dropout(x, jax.random.key(0), 0.25))
    assert 0.2 < (alone == 0).mean() < 0.3
    assert not (alone == alone[:, :1]).all()
    assert layers.dropout(x, None, 0.25) is x


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params = t5.init(config, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    batch = random_batch(6)
    assert t5.hidden_states(config, params, batch).dtype == jnp.bfloat16
    full, half = APPLY(TINY, params, batch), APPLY(config, params, batch)
    assert half.dtype == jnp.float32
    assert 1e-4 < relative_l2(half, full) < 0.05
    program = jax.make_jaxpr(lambda p: t5.hidden_states(config, p, batch))(params)
    exps = re.findall(r"(\w+)\[[\d,]+\] = exp ", str(program))
    assert exps, "no softmax found"
    assert set(re.findall(r":(\w+)\[[\d,]+\] = exp ", str(program))) == {"f32"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 0),
        ("num_heads", 2.5),
        ("dropout_rate", 1.0),
        ("mlp_activations", ("gelu", "tanh")),
        ("mlp_activations", ()),
        ("dtype", "float16"),
        ("remat_policy", "all"),
        ("relative_attention_num_buckets", 30),
    ],
)
def test_impossible_configurations_name_the_field(field, value):
    with pytest.raises(UsageError, match=field):
        dataclasses.replace(TINY, **{field: value})


def test_config_survives_json():
    assert T5Config.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    with pytest.raises(UsageError, match="d_model"):
        T5Config.from_dict({"d_modle": 3})
