"""Hugging Face's T5, MT5 and UMT5: names of tensors and configuration, both ways. No files.

Facts from transformers 4.57 and 5.23 (`models/{t5,mt5,umt5}`). The three classes share their
names; UMT5 has a table of relative-position biases in every layer. PyTorch's linear layers hold
[outputs, inputs], ours [inputs, outputs]: all matrices but the embedding are transposed.

Whether the decoder's output is multiplied by d_model^-0.5 before the output matrix:

- T5: as `scale_decoder_outputs` in config.json says; without it, unless `tie_word_embeddings` is
  false (transformers 5 writes the first, published files and transformers 4 rely on the second).
- MT5: never.
- UMT5: transformers 5 always does, and writes `tie_word_embeddings: true`; published files say
  false and mean T5X's network, which does not.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from t5x_lite.errors import UsageError, nearest
from t5x_lite.models.config import T5Config

# Tensors that repeat others: the embedding's other names in older files.
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Old T5 1.0 files carry a table that no model uses.
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

MODEL_CLASSES = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
}
# Names of the same classes in old files.
_OLD_CLASSES = ("T5WithLMHeadModel",)

# What transformers assumes where config.json is silent.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 250112,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}
_T5_DEFAULTS = {
    "vocab_size": 32128,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "feed_forward_proj": "relu",
}

# Ids that training and decoding here count on.
_FIXED_IDS = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}

# transformers' functions under our names. Its "gelu" is the exact one (erf), which T5 never had.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "silu": "silu",
    "swish": "silu",
    "linear": "linear",
}
_HF_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "silu": "silu", "linear": "linear"}

_ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
# Each layer's parts in their order: (module there, module here, its norm here).
_SUBLAYERS = {
    "encoder": (
        ("SelfAttention", "attention", "pre_attention_layer_norm"),
        ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    ),
    "decoder": (
        ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
        ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    ),
}
_INNER = "num_heads * d_kv"


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One tensor of a Hugging Face checkpoint and its place in our tree.

    Attributes:
      name: there, "encoder.block.0.layer.0.SelfAttention.q.weight".
      path: here, "encoder/layers/attention/query/kernel".
      layer: which row of the stacked parameter it is; None if it is the whole parameter.
      shape: as the file has it.
      axes: what of config.json gives each axis of `shape`: ("num_heads * d_kv", "d_model").
      is_transposed: the parameter (or its row) is the transpose of the tensor.
    """

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    is_transposed: bool


def tensors_of(config: T5Config) -> Iterator[HFTensor]:
    """Every tensor of the model, in the order in which transformers holds them."""
    sizes = {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        _INNER: config.num_heads * config.d_kv,
    }

    def tensor(name: str, path: str, layer: int | None, axes: tuple[str, ...]) -> HFTensor:
        shape = tuple(sizes[axis] for axis in axes)
        is_transposed = len(axes) == 2 and name != "shared"
        return HFTensor(f"{name}.weight", path, layer, shape, axes, is_transposed)

    yield tensor("shared", "token_embedder/embedding", None, ("vocab_size", "d_model"))
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for stack, count in counts.items():
        for layer in range(count):
            for name, path, axes in _layer_tensors(config, stack, layer):
                is_shared = path.endswith("relpos_bias/rel_embedding") and "layers" not in path
                yield tensor(name, path, None if is_shared else layer, axes)
        norm = f"{stack}/{stack}_norm/scale"
        yield tensor(f"{stack}.final_layer_norm", norm, None, ("d_model",))
    if not config.tie_embeddings:
        yield tensor("lm_head", "decoder/logits_dense/kernel", None, ("vocab_size", "d_model"))


def _layer_tensors(
    config: T5Config, stack: str, layer: int
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(name there without ".weight", path here, axes there) of one layer."""
    for index, (module, here, norm) in enumerate(_SUBLAYERS[stack]):
        prefix = f"{stack}.block.{layer}.layer.{index}"
        path = f"{stack}/layers/{here}"
        if here == "mlp":
            gated = len(config.mlp_activations) > 1
            for name in ("wi_0", "wi_1") if gated else ("wi",):
                yield f"{prefix}.{module}.{name}", f"{path}/{name}/kernel", ("d_ff", "d_model")
            yield f"{prefix}.{module}.wo", f"{path}/wo/kernel", ("d_model", "d_ff")
        else:
            for name, ours in _ATTENTION.items():
                axes = ("d_model", _INNER) if name == "o" else (_INNER, "d_model")
                yield f"{prefix}.{module}.{name}", f"{path}/{ours}/kernel", axes
        if module == "SelfAttention" and (config.relative_bias_per_layer or layer == 0):
            place = f"{stack}/layers" if config.relative_bias_per_layer else stack
            bias = f"{prefix}.{module}.relative_attention_bias"
            axes = ("relative_attention_num_buckets", "num_heads")
            yield bias, f"{place}/relpos_bias/rel_embedding", axes
        yield f"{prefix}.layer_norm", f"{stack}/layers/{norm}/scale", ("d_model",)


def parameter_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of our tree by its path, stacks with their leading axis."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors_of(config):
        shape = tensor.shape[::-1] if tensor.is_transposed else tensor.shape
        if tensor.layer is not None:
            shape = (tensor.layer + 1, *shape)
        shapes[tensor.path] = shape
    return shapes


def config_from_hf(
    values: Mapping[str, Any], tensor_names: Collection[str], *, where: str = "config.json"
) -> T5Config:
    """Our configuration of a Hugging Face model.

    Args:
      values: what config.json holds.
      tensor_names: the names of the checkpoint's tensors, which tell whether the embedding is the
        output matrix: transformers 5 writes `tie_word_embeddings: true` in either case.
      where: the file's name for messages.

    Raises:
      UsageError: on an architecture, activation or value that no model here has.
    """
    model_type = _check_architecture(values, where)
    defaults = _DEFAULTS | (_T5_DEFAULTS if model_type == "t5" else {})

    def value(name: str) -> Any:
        return defaults[name] if values.get(name) is None else values[name]

    def count(name: str) -> int:
        number = value(name)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UsageError(f"{where}: {name} = {number!r}: must be an integer of at least 1")
        return number

    def number(name: str) -> float:
        number = value(name)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UsageError(f"{where}: {name} = {number!r}: must be a number")
        return float(number)

    num_layers = count("num_layers")
    symmetric = values.get("num_decoder_layers") is None
    tied = "lm_head.weight" not in tensor_names
    if tied and values.get("tie_word_embeddings") is False:
        raise UsageError(
            f"{where} says tie_word_embeddings = false, but the tensor 'lm_head.weight' is missing"
        )
    scaled = _reads_as_scaled(model_type, values)
    try:
        return T5Config(
            vocab_size=count("vocab_size"),
            d_model=count("d_model"),
            d_ff=count("d_ff"),
            d_kv=count("d_kv"),
            num_heads=count("num_heads"),
            num_encoder_layers=num_layers,
            num_decoder_layers=num_layers if symmetric else count("num_decoder_layers"),
            mlp_activations=_activations_from_hf(values, value("feed_forward_proj"), where),
            tie_embeddings=tied,
            scale_decoder_output=None if scaled == tied else scaled,
            dropout_rate=number("dropout_rate"),
            relative_attention_num_buckets=count("relative_attention_num_buckets"),
            relative_attention_max_distance=count("relative_attention_max_distance"),
            relative_bias_per_layer=model_type == "umt5",
            layer_norm_epsilon=number("layer_norm_epsilon"),
        )
    except UsageError as error:
        text = str(error)
        raise UsageError(text if text.startswith(where) else f"{where}: {text}") from None


def _check_architecture(values: Mapping[str, Any], where: str) -> str:
    """The model_type, one of `MODEL_CLASSES`; raises UsageError on what is not one of them."""
    model_type = values.get("model_type")
    if model_type not in MODEL_CLASSES:
        raise UsageError(
            f"{where}: unknown architecture {model_type!r} (model_type); "
            f"known: {', '.join(MODEL_CLASSES)}"
        )
    architectures = values.get("architectures") or []
    known = (*MODEL_CLASSES.values(), *_OLD_CLASSES)
    for architecture in architectures if isinstance(architectures, list) else [architectures]:
        if architecture not in known:
            encoder = " (an encoder without a decoder)" if "Encoder" in str(architecture) else ""
            raise UsageError(
                f"{where}: unknown architecture {architecture!r}{encoder}; "
                f"known: {', '.join(MODEL_CLASSES.values())}"
            )
    if values.get("is_encoder_decoder") is False:
        raise UsageError(f"{where}: is_encoder_decoder = false: must be an encoder with a decoder")
    for name, fixed in _FIXED_IDS.items():
        if values.get(name) not in (None, fixed):
            raise UsageError(f"{where}: {name} = {values[name]!r}: must be {fixed}, as T5 has it")
    return model_type


def _reads_as_scaled(model_type: str, values: Mapping[str, Any]) -> bool:
    """Whether the file means a decoder's output that is scaled; see the module's docstring."""
    says_untied = values.get("tie_word_embeddings") is False
    if model_type == "mt5":
        return False
    if model_type == "t5" and values.get("scale_decoder_outputs") is not None:
        return bool(values["scale_decoder_outputs"])
    return not says_untied


def _activations_from_hf(values: Mapping[str, Any], proj: Any, where: str) -> tuple[str, ...]:
    """The activations of the feed-forward layer, ("gelu", "linear") for "gated-gelu"."""
    prefix, _, name = proj.rpartition("-") if isinstance(proj, str) else ("?", "", proj)
    if prefix not in ("", "gated"):
        raise UsageError(
            f"{where}: feed_forward_proj = {proj!r}: must be an activation, or 'gated-' and one"
        )
    name = "gelu_new" if proj == "gated-gelu" else name
    # transformers lets these two override what `feed_forward_proj` says.
    name = values.get("dense_act_fn") or name
    gated = values.get("is_gated_act")
    gated = prefix == "gated" if gated is None else bool(gated)
    if name == "gelu":
        raise UsageError(
            f"{where}: unknown activation 'gelu' (the exact one, by the error function); "
            "known: " + ", ".join(repr(known) for known in _ACTIVATIONS)
        )
    if name not in _ACTIVATIONS:
        raise UsageError(
            f"{where}: unknown activation {name!r}; {nearest(str(name), _ACTIVATIONS)}"
        )
    activation = _ACTIVATIONS[name]
    return (activation, "linear") if gated else (activation,)


def transformers_scales(config: T5Config, model_class: str) -> bool:
    """Whether transformers 5 multiplies this model's decoder output by d_model^-0.5.

    Where that is not `config.scales_decoder_output`, a writer has to fold the difference into
    `lm_head.weight`.
    """
    return {"t5": config.scales_decoder_output, "mt5": False, "umt5": True}[model_class]


def config_to_hf(
    config: T5Config, *, model_class: str, dtype: str = "float32", eos_token_id: int = 1
) -> dict[str, Any]:
    """What config.json holds for this model, understood by transformers 4 and 5.

    Args:
      config: the architecture.
      model_class: "t5", "mt5" or "umt5"; "umt5" exactly if each layer has a bias table.
      dtype: of the tensors in the file.
      eos_token_id: the id that ends a text.

    Raises:
      UsageError: if the class has no such model.
    """
    if config.relative_bias_per_layer != (model_class == "umt5"):
        raise UsageError(
            f"relative_bias_per_layer = {config.relative_bias_per_layer} is no {model_class!r} "
            "model of Hugging Face's: 'umt5' has a bias table in every layer, 't5' and 'mt5' one"
        )
    proj = _feed_forward_proj(config.mlp_activations)
    gated = proj.startswith("gated-")
    values = {
        "architectures": [MODEL_CLASSES[model_class]],
        "classifier_dropout": 0.0,
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "decoder_start_token_id": 0,
        "dense_act_fn": _HF_ACTIVATIONS[config.mlp_activations[0]],
        "dropout_rate": config.dropout_rate,
        "dtype": dtype,
        "eos_token_id": eos_token_id,
        "feed_forward_proj": proj,
        "initializer_factor": 1.0,
        "is_decoder": False,
        "is_encoder_decoder": True,
        "is_gated_act": gated,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "model_type": model_class,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        # transformers 4 goes by it, and 5 sets it anyway. For UMT5 it also says which scaling the
        # tensors were written for.
        "tie_word_embeddings": model_class == "umt5" or config.tie_embeddings,
        "torch_dtype": dtype,  # before transformers 4.56
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if model_class == "t5":
        values["scale_decoder_outputs"] = config.scales_decoder_output
    return dict(sorted(values.items()))


def _feed_forward_proj(activations: tuple[str, ...]) -> str:
    """Hugging Face's name of a feed-forward layer; the inverse of `_activations_from_hf`."""
    if len(activations) == 1:
        return _HF_ACTIVATIONS[activations[0]]
    if activations[1] != "linear":
        raise UsageError(
            f"mlp_activations = {activations!r}: Hugging Face has gated layers only of the form "
            "(activation, 'linear')"
        )
    # The one name that transformers reads as the tanh approximation, by history.
    return "gated-gelu" if activations[0] == "gelu" else f"gated-{activations[0]}"
