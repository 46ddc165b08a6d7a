"""Small readers of other programs' checkpoints, for the tests alone."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from t5x_lite.models.config import T5Config


def config_from_json(path: pathlib.Path) -> T5Config:
    """The fixtures' `config.json`, T5X's plain one or Hugging Face's, as ours."""
    values = json.loads(path.read_text())
    if "activations" in values:
        activations = tuple(values["activations"])
    else:
        gated = values["is_gated_act"]
        activations = ("gelu", "linear") if gated else (values["dense_act_fn"],)
    return T5Config(
        vocab_size=values["vocab_size"],
        d_model=values["d_model"],
        d_ff=values["d_ff"],
        d_kv=values["d_kv"],
        num_heads=values["num_heads"],
        num_encoder_layers=values["num_layers"],
        num_decoder_layers=values["num_decoder_layers"],
        mlp_activations=activations,
        tie_embeddings=values["tie_word_embeddings"],
        relative_attention_num_buckets=values["relative_attention_num_buckets"],
        relative_attention_max_distance=values["relative_attention_max_distance"],
        relative_bias_per_layer=values.get("scanned") or values.get("model_type") == "umt5",
    )


def nest(flat: Mapping[str, np.ndarray]) -> dict:
    """{"a/b": x} as {"a": {"b": x}}, with `layers_<i>` stacked into `layers`."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    tree: dict = {}

    def put(path: str, value: np.ndarray) -> None:
        node = tree
        *parents, name = path.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value

    for path, value in flat.items():
        match = re.fullmatch(r"(.*/)layers_(\d+)(/.*)", path)
        if match:
            stacks.setdefault(f"{match[1]}layers{match[3]}", {})[int(match[2])] = value
        else:
            put(path, value)
    for path, layers in stacks.items():
        put(path, np.stack([layers[i] for i in range(len(layers))]))
    return tree


def params_from_hf(directory: pathlib.Path) -> dict:
    """Parameters of T5ForConditionalGeneration and its kin, saved as one file or several."""
    attention = {"q": "query", "k": "key", "v": "value", "o": "out"}
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
    bias_per_layer = sum("relative_attention_bias" in name for name in tensors) > 2
    flat = {}
    for name, value in tensors.items():
        name = name.removesuffix(".weight")
        if name == "shared":
            flat["token_embedder/embedding"] = value
        elif name == "lm_head":
            flat["decoder/logits_dense/kernel"] = value.T
        elif name.endswith("relative_attention_bias"):
            stack, _, block, *_ = name.split(".")
            place = f"{stack}/layers_{block}" if bias_per_layer else stack
            flat[f"{place}/relpos_bias/rel_embedding"] = value.T
        elif name.endswith("final_layer_norm"):
            stack = name.split(".")[0]
            flat[f"{stack}/{stack}_norm/scale"] = value
        else:
            stack, _, block, _, sublayer, *rest = name.split(".")
            prefix = f"{stack}/layers_{block}/"
            norms = {
                "encoder": ["pre_attention_layer_norm", "pre_mlp_layer_norm"],
                "decoder": [
                    "pre_self_attention_layer_norm",
                    "pre_cross_attention_layer_norm",
                    "pre_mlp_layer_norm",
                ],
            }[stack]
            if rest == ["layer_norm"]:
                flat[f"{prefix}{norms[int(sublayer)]}/scale"] = value
            elif rest[0] == "DenseReluDense":
                flat[f"{prefix}mlp/{rest[1]}/kernel"] = value.T
            else:
                kind = {"SelfAttention": "self_attention"}.get(rest[0], "encoder_decoder_attention")
                if stack == "encoder":
                    kind = "attention"
                flat[f"{prefix}{kind}/{attention[rest[1]]}/kernel"] = value.T
    return nest(flat)


def load_hf(directory: pathlib.Path) -> tuple[T5Config, dict]:
    """Configuration and parameters of a Hugging Face fixture; its tensors tell what is tied."""
    params = params_from_hf(directory)
    config = config_from_json(directory / "config.json")
    tied = "logits_dense" not in params["decoder"]
    return dataclasses.replace(config, tie_embeddings=tied), params


def load_t5x(directory: pathlib.Path) -> tuple[T5Config, dict]:
    """Configuration and parameters of a T5X fixture."""
    reader = params_from_t5x_orbax if "orbax" in directory.name else params_from_t5x_legacy
    scanned = "_scanned" in directory.name
    params = reader(directory / "checkpoint_5", scanned=scanned)
    return config_from_json(directory / "config.json"), params


def read_zarr(directory: pathlib.Path) -> np.ndarray:
    """One array of a legacy T5X checkpoint."""
    import tensorstore

    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(directory)}}
    return tensorstore.open(spec, open=True).result().read().result()


def params_from_t5x_legacy(directory: pathlib.Path, *, scanned: bool) -> dict:
    """Parameters of a legacy T5X checkpoint (`.../checkpoint_<step>`)."""
    flat = {}
    for path in directory.glob("target.*"):
        name = path.name.removeprefix("target.").replace(".", "/")
        flat[name] = read_zarr(path)
    return from_t5x_scanned(flat) if scanned else nest(flat)


def params_from_t5x_orbax(directory: pathlib.Path, *, scanned: bool) -> dict:
    """Parameters of an Orbax checkpoint written by T5X's training script."""
    import orbax.checkpoint as ocp

    tree = ocp.PyTreeCheckpointer().restore(directory / "state")["target"]
    flat: dict[str, np.ndarray] = {}

    def walk(prefix: str, node: Mapping | np.ndarray) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(f"{prefix}/{key}" if prefix else key, value)
        else:
            flat[prefix] = np.asarray(node)

    walk("", tree)
    return from_t5x_scanned(flat) if scanned else nest(flat)


def from_t5x_scanned(flat: Mapping[str, np.ndarray]) -> dict:
    """T5X's scanned layout: layers on axis 1, heads kept apart, a bias table a layer."""
    out = {}
    for path, value in flat.items():
        parts = path.split("/")
        if parts[0] in ("encoder", "decoder") and parts[1] in ("encoder", "decoder"):
            value = np.moveaxis(value, 1, 0)
            leaf = "/".join(parts[2:])
            if leaf.endswith("out/kernel"):
                value = value.reshape(value.shape[0], -1, value.shape[-1])
            elif value.ndim == 4:
                value = value.reshape(*value.shape[:2], -1)
            path = f"{parts[0]}/layers/{leaf}"
        out[path] = value
    return nest(out)
