"""Tokens a second of decoding on this machine: T5 1.1 small, f32, random weights.

    python benchmarks/decoding.py                      ours
    python benchmarks/decoding.py --peer=transformers  ours and Hugging Face's generate in turn

Inputs of 64 ids, and 32 new ones for each: the end mark is made unlikely in the weights. The peer
needs the optional extra `bench`; it has the same weights, and how many of its rows are ours to the
last id is printed. The first call of each, with all compilation, is timed apart. The two systems
take turns, so that a noisy neighbour slows both; figures are medians over `--repeats` turns.
Set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 as the Makefile does, and on a machine that is not quiet
OMP_WAIT_POLICY=passive, without which the peer's threads wait in busy loops and it loses tenfold.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from t5x_lite import gin_utils
from t5x_lite.decoding import DecodeConfig
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.partitioning import make_partitioning
from t5x_lite.predict import Predictor

INPUTS, NEW, END_MARK = 64, 32, 1
DECODING = {
    "greedy": DecodeConfig(),
    "beam 4": DecodeConfig("beam", num_beams=4, length_penalty=1.0, beam_rules="huggingface"),
}
Decode = Callable[[], np.ndarray]


def make_config(size: str, extra: list[str]) -> T5Config:
    """The published model under the pre-training configuration."""
    bindings = [
        "MIXTURE_OR_TASK_NAME = 'c4_v220_span_corruption'",
        f"TASK_FEATURE_LENGTHS = {{'inputs': {INPUTS}, 'targets': {NEW}}}",
        "TRAIN_STEPS = 1",
        "MODEL_DIR = 'unused'",
        *extra,
    ]
    files = [f"gin_configs/models/t5_1_1/{size}.gin", "gin_configs/runs/pretrain.gin"]
    return gin_utils.load_train_config(files, bindings)[0].model


def make_params(config: T5Config) -> Any:
    """Random parameters that never end: the end mark's logit is 0, far below the largest."""
    params = jax.tree.map(np.array, jax.jit(t5.init, static_argnums=0)(config, jax.random.key(0)))
    params["decoder"]["logits_dense"]["kernel"][:, END_MARK] = 0
    return params


def make_ours(config: T5Config, params: Any, inputs: np.ndarray, decode: DecodeConfig) -> Decode:
    """A function that decodes all inputs: int [rows, NEW]."""
    one_device = make_partitioning({"data": 1}, devices=jax.devices()[:1])
    predictor = Predictor(
        config, one_device, batch_size=len(inputs), input_length=INPUTS, target_length=NEW
    )
    placed = jax.device_put(params, one_device.replicated)
    return lambda: np.stack([p.ids[0] for p in predictor.generate(placed, list(inputs), decode)])


@functools.cache
def load_transformers(config: T5Config) -> Any:
    """The same model in Hugging Face transformers."""
    import torch
    import transformers

    peer = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_ff=config.d_ff,
            d_kv=config.d_kv,
            num_heads=config.num_heads,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    ).eval()
    # This version ties the output matrix to the embedding whatever its configuration says.
    peer.lm_head.weight = torch.nn.Parameter(torch.empty_like(peer.lm_head.weight))
    weights = {}
    params = make_params(config)
    weights["shared.weight"] = params["token_embedder"]["embedding"]
    weights["lm_head.weight"] = params["decoder"]["logits_dense"]["kernel"].T
    sublayers = {
        "encoder": [("SelfAttention", "attention", "attention")],
        "decoder": [
            ("SelfAttention", "self_attention", "self_attention"),
            ("EncDecAttention", "encoder_decoder_attention", "cross_attention"),
        ],
    }
    for stack, attentions in sublayers.items():
        tree, layers = params[stack], params[stack]["layers"]
        weights[f"{stack}.embed_tokens.weight"] = weights["shared.weight"]
        weights[f"{stack}.final_layer_norm.weight"] = tree[f"{stack}_norm"]["scale"]
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights[table] = tree["relpos_bias"]["rel_embedding"].T
        for i in range(len(layers["mlp"]["wo"]["kernel"])):
            for j, (theirs, ours, norm) in enumerate(attentions):
                place = f"{stack}.block.{i}.layer.{j}"
                weights[f"{place}.layer_norm.weight"] = layers[f"pre_{norm}_layer_norm"]["scale"][i]
                for name in ("query", "key", "value", "out"):
                    kernel = layers[ours][name]["kernel"][i].T
                    weights[f"{place}.{theirs}.{'o' if name == 'out' else name[0]}.weight"] = kernel
            place = f"{stack}.block.{i}.layer.{len(attentions)}"
            weights[f"{place}.layer_norm.weight"] = layers["pre_mlp_layer_norm"]["scale"][i]
            for name in ("wi_0", "wi_1", "wo"):
                kernel = layers["mlp"][name]["kernel"][i].T
                weights[f"{place}.DenseReluDense.{name}.weight"] = kernel
    peer.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return peer


def make_transformers(
    config: T5Config, params: Any, inputs: np.ndarray, decode: DecodeConfig
) -> Decode:
    """The same in Hugging Face transformers."""
    import torch

    peer = load_transformers(config)
    ids = torch.tensor(inputs, dtype=torch.long)
    settings = {}
    if decode.method == "beam":
        settings = {
            "num_beams": decode.num_beams,
            "length_penalty": decode.length_penalty,
            "early_stopping": True,
        }

    def one() -> np.ndarray:
        with torch.inference_mode():
            out = peer.generate(ids, max_new_tokens=NEW, do_sample=False, **settings)
        return out[:, 1:].numpy()

    return one


def measure(systems: dict[str, Decode], repeats: int, num_tokens: int) -> None:
    """Runs the systems in turn and prints what they took."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    cpu: dict[str, list[float]] = {name: [] for name in systems}
    found, first = {}, {}
    for repeat in range(repeats + 1):
        for name, one in systems.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            found[name] = one()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
            else:
                first[name] = time.perf_counter() - start
    for name, values in seconds.items():
        rate = num_tokens / statistics.median(values)
        low, high = num_tokens / max(values), num_tokens / min(values)
        print(
            f"  {name:13} {rate:7.1f} tokens/s ({low:.1f} to {high:.1f}), "
            f"{statistics.median(cpu[name]):6.2f} CPU s, first call {first[name]:.1f} s"
        )
    if len(systems) > 1:
        (ours, peer), (a, b) = seconds.values(), found.values()
        ratios = [p / o for o, p in zip(ours, peer, strict=True)]
        equal = np.mean((a == b).all(axis=1))
        print(
            f"  ratio {statistics.median(ratios):.2f} of {min(ratios):.2f} to {max(ratios):.2f}; "
            f"{equal:.0%} of the rows are equal to the last id"
        )


def main() -> None:
    """Times the systems in turn and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--methods", nargs="+", default=list(DECODING), choices=list(DECODING))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", choices=["transformers"])
    parser.add_argument("--gin", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    config = make_config(arguments.size, [b.replace("=", " = ", 1) for b in arguments.gin])
    params = make_params(config)
    rng = np.random.default_rng(0)
    for method in arguments.methods:
        for batch_size in arguments.batch_sizes:
            inputs = rng.integers(2, 32000, (batch_size, INPUTS), dtype=np.int32)
            given = (config, params, inputs, DECODING[method])
            systems = {"t5x_lite": make_ours(*given)}
            if arguments.peer:
                systems[arguments.peer] = make_transformers(*given)
            load = " ".join(f"{x:.1f}" for x in os.getloadavg())
            print(f"{method}, batch {batch_size}; load before {load}", flush=True)
            measure(systems, arguments.repeats, batch_size * NEW)


if __name__ == "__main__":
    main()
