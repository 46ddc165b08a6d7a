"""Hugging Face's names and configurations, as their files and transformers have them."""

import dataclasses
import json

import jax
import pytest
import safetensors.numpy

from t5x_lite.errors import UsageError
from t5x_lite.interop import hf
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config

FIXTURES = ["t5_v10", "t5_v11", "t5_v11_sharded", "mt5", "umt5"]

SMALL = T5Config(
    vocab_size=64,
    d_model=8,
    d_ff=24,
    d_kv=5,
    num_heads=3,
    num_encoder_layers=2,
    num_decoder_layers=3,
)


@pytest.fixture(params=FIXTURES)
def fixture(request, shared_data):
    """config.json and the tensors of a checkpoint."""
    directory = shared_data / "checkpoints" / "hf" / request.param
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
    return json.loads((directory / "config.json").read_text()), tensors


@pytest.mark.parametrize("activations", [("relu",), ("gelu", "linear")])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("per_layer", [True, False])
def test_the_names_are_one_to_one_with_the_tree(activations, tied, per_layer):
    config = dataclasses.replace(
        SMALL,
        mlp_activations=activations,
        tie_embeddings=tied,
        relative_bias_per_layer=per_layer,
    )
    shapes = jax.eval_shape(lambda: t5.init(config, jax.random.key(0)))
    tree = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert hf.parameter_shapes(config) == {path: leaf.shape for path, leaf in tree.items()}
    tensors = list(hf.tensors_of(config))
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    places = [(tensor.path, tensor.layer) for tensor in tensors]
    rows = [
        (path, layer)
        for path, leaf in tree.items()
        for layer in (range(leaf.shape[0]) if "/layers/" in path else [None])
    ]
    assert len(places) == len(rows) and set(places) == set(rows)


def test_the_names_and_shapes_are_those_of_the_files(fixture):
    values, tensors = fixture
    config = hf.config_from_hf(values, tensors)
    assert {t.name: t.shape for t in hf.tensors_of(config)} == {
        k: v.shape for k, v in tensors.items()
    }


# config.json of published models, less what no T5 reads.
T5_SMALL = {
    "architectures": ["T5WithLMHeadModel"],
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 8,
    "num_layers": 6,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
BYT5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 3584,
    "d_kv": 64,
    "d_model": 1472,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 4,
    "num_heads": 6,
    "num_layers": 12,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "tokenizer_class": "ByT5Tokenizer",
    "vocab_size": 384,
}
UMT5_SMALL = {
    "architectures": ["UMT5ForConditionalGeneration"],
    "d_ff": 1024,
    "d_kv": 64,
    "d_model": 512,
    "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "model_type": "umt5",
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "scalable_attention": True,
    "tie_word_embeddings": False,
    "vocab_size": 256384,
}
UNTIED = ["shared.weight", "lm_head.weight"]
TIED = ["shared.weight"]


def test_published_configurations():
    assert hf.config_from_hf(T5_SMALL, TIED) == T5Config(
        d_ff=2048,
        num_heads=8,
        num_encoder_layers=6,
        num_decoder_layers=6,
        mlp_activations=("relu",),
        tie_embeddings=True,
        dropout_rate=0.1,
    )
    assert hf.config_from_hf(BYT5_SMALL, UNTIED) == T5Config(
        vocab_size=384,
        d_model=1472,
        d_ff=3584,
        num_encoder_layers=12,
        num_decoder_layers=4,
        dropout_rate=0.1,
    )
    assert hf.config_from_hf(UMT5_SMALL, UNTIED) == T5Config(
        vocab_size=256384, relative_bias_per_layer=True, dropout_rate=0.1
    )
    # A file may leave out what is transformers' default: mT5 small.
    small = hf.config_from_hf({"model_type": "mt5"}, UNTIED)
    assert small == T5Config(vocab_size=250112, dropout_rate=0.1)


@pytest.mark.parametrize("given", [{}, {"eos_token_id": None}, {"eos_token_id": 1}])
def test_the_end_mark_may_be_left_out(given):
    assert hf.config_from_hf({"model_type": "mt5"} | given, UNTIED).vocab_size == 250112


@pytest.mark.parametrize(
    ("values", "names", "scaled"),
    [
        ({"model_type": "t5"}, TIED, True),
        ({"model_type": "t5", "tie_word_embeddings": True}, TIED, True),
        ({"model_type": "t5", "tie_word_embeddings": False}, UNTIED, False),
        ({"model_type": "t5", "tie_word_embeddings": True}, UNTIED, True),
        (
            {"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False},
            UNTIED,
            False,
        ),
        (
            {"model_type": "t5", "tie_word_embeddings": False, "scale_decoder_outputs": True},
            UNTIED,
            True,
        ),
        ({"model_type": "mt5", "tie_word_embeddings": True}, UNTIED, False),
        ({"model_type": "mt5", "tie_word_embeddings": True}, TIED, False),
        ({"model_type": "umt5"}, UNTIED, True),
        ({"model_type": "umt5", "tie_word_embeddings": True}, UNTIED, True),
        ({"model_type": "umt5", "tie_word_embeddings": False}, UNTIED, False),
    ],
)
def test_when_the_decoder_output_is_scaled(values, names, scaled):
    config = hf.config_from_hf(values, names)
    assert config.scales_decoder_output is scaled
    assert config.tie_embeddings is (names == TIED)


@pytest.mark.parametrize(
    ("values", "activations"),
    [
        ({"feed_forward_proj": "relu"}, ("relu",)),
        ({"feed_forward_proj": "gated-gelu"}, ("gelu", "linear")),
        ({"feed_forward_proj": "gated-gelu_new"}, ("gelu", "linear")),
        ({"feed_forward_proj": "gelu_new"}, ("gelu",)),
        ({"feed_forward_proj": "gated-silu"}, ("silu", "linear")),
        ({"feed_forward_proj": "gated-swish"}, ("silu", "linear")),
        ({"feed_forward_proj": "gated-relu"}, ("relu", "linear")),
        # transformers lets the two fields override the first.
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"}, ("relu", "linear")),
        ({"feed_forward_proj": "relu", "is_gated_act": True}, ("relu", "linear")),
    ],
)
def test_activations(values, activations):
    config = hf.config_from_hf({"model_type": "t5"} | values, UNTIED)
    assert config.mlp_activations == activations
    back = hf.config_to_hf(config, model_class="t5")
    assert hf.config_from_hf(back, UNTIED) == config


def test_what_we_write_agrees_with_what_transformers_wrote(fixture):
    values, tensors = fixture
    config = hf.config_from_hf(values, tensors)
    written = hf.config_to_hf(config, model_class=values["model_type"])
    assert written.pop("torch_dtype") == "float32"
    # transformers 4 needs to know what 5 no longer says; UMT5's `true` says "scaled".
    tied = written.pop("tie_word_embeddings")
    assert tied is (values["model_type"] == "umt5" or config.tie_embeddings)
    for field in ("transformers_version", "tie_word_embeddings"):
        values.pop(field)
    assert {k: values[k] for k in written} == written
    assert values.keys() - written.keys() <= {"bos_token_id"}


def test_the_class_has_to_fit_the_model():
    per_layer, one = T5Config(relative_bias_per_layer=True), T5Config()
    with pytest.raises(UsageError, match="'t5'"):
        hf.config_to_hf(per_layer, model_class="t5")
    with pytest.raises(UsageError, match="'umt5'"):
        hf.config_to_hf(one, model_class="umt5")
    with pytest.raises(UsageError, match="mlp_activations"):
        hf.config_to_hf(T5Config(mlp_activations=("gelu", "relu")), model_class="t5")


def test_transformers_reads_our_configuration_as_the_same_model():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for model_class, name in hf.MODEL_CLASSES.items():
        for tied in (False, True):
            config = dataclasses.replace(
                SMALL,
                tie_embeddings=tied,
                relative_bias_per_layer=model_class == "umt5",
            )
            values = hf.config_to_hf(config, model_class=model_class)
            theirs = getattr(transformers, name).config_class.from_dict(dict(values))
            for field, value in values.items():
                if field not in ("torch_dtype", "tie_word_embeddings", "dtype"):
                    assert getattr(theirs, field) == value, field
            with torch.device("meta"):
                model = getattr(transformers, name)(theirs)
            shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
            ours = {tensor.name: tensor.shape for tensor in hf.tensors_of(config)}
            same = {"lm_head.weight", *hf.EMBEDDING_COPIES}
            assert {k: v for k, v in shapes.items() if k not in same} == {
                k: v for k, v in ours.items() if k not in same
            }
