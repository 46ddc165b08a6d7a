"""Seconds of one training step on this machine: T5 1.1 small, f32, Adafactor, 8 x (512, 114).

    python benchmarks/train_step.py                      ours
    python benchmarks/train_step.py --peer=transformers  ours and Hugging Face in turn, with ratios

The peer needs the optional extra `bench`. Each figure is a median over `--steps` steps, after one
that compiles; the two systems take turns, so that a noisy neighbour slows both.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from t5x_lite import gin_utils, setup
from t5x_lite.run_config import TrainConfig

INPUTS, TARGETS = 512, 114


def make_config(size: str, batch_size: int, extra: list[str]) -> TrainConfig:
    """The published model under the pre-training configuration."""
    bindings = [
        "MIXTURE_OR_TASK_NAME = 'c4_v220_span_corruption'",
        f"TASK_FEATURE_LENGTHS = {{'inputs': {INPUTS}, 'targets': {TARGETS}}}",
        "TRAIN_STEPS = 1",
        "MODEL_DIR = 'unused'",
        f"BATCH_SIZE = {batch_size}",
        *extra,
    ]
    files = [f"gin_configs/models/t5_1_1/{size}.gin", "gin_configs/runs/pretrain.gin"]
    return gin_utils.load_train_config(files, bindings)[0]


def random_batch(batch_size: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Full rows of random ids."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, vocab_size - 200, (batch_size, INPUTS), dtype=np.int32)
    targets = rng.integers(2, vocab_size - 200, (batch_size, TARGETS), dtype=np.int32)
    positions = {n: np.tile(np.arange(n, dtype=np.int32), (batch_size, 1)) for n in (512, 114)}
    return {
        "encoder_input_tokens": inputs,
        "encoder_segment_ids": np.ones_like(inputs),
        "encoder_positions": positions[INPUTS],
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": np.ones_like(targets),
        "decoder_segment_ids": np.ones_like(targets),
        "decoder_positions": positions[TARGETS],
    }


def make_ours(config: TrainConfig) -> Callable[[], None]:
    """A function that makes one of our steps and waits for it."""
    programs = setup.make_programs(config)
    batch = random_batch(config.data.batch_size, config.model.vocab_size)
    rows = programs.partitioning.shard_batch(batch)
    key = jax.random.key(0)
    state = programs.init(key)

    def one() -> None:
        nonlocal state
        state, scalars = programs.train_step(state, rows, key)
        jax.block_until_ready(scalars)

    return one


def make_transformers(config: TrainConfig) -> Callable[[], None]:
    """The same model and batch in Hugging Face transformers with its Adafactor."""
    import torch
    import transformers

    model_config = config.model
    peer = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=model_config.vocab_size,
            d_model=model_config.d_model,
            d_ff=model_config.d_ff,
            d_kv=model_config.d_kv,
            num_heads=model_config.num_heads,
            num_layers=model_config.num_encoder_layers,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=model_config.dropout_rate,
            decoder_start_token_id=0,
        )
    )
    optimizer = transformers.Adafactor(peer.parameters())
    batch = random_batch(config.data.batch_size, model_config.vocab_size)
    inputs = torch.tensor(batch["encoder_input_tokens"], dtype=torch.long)
    labels = torch.tensor(batch["decoder_target_tokens"], dtype=torch.long)

    def one() -> None:
        optimizer.zero_grad()
        peer(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()

    return one


def main() -> None:
    """Times the systems in turn and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peer", choices=["transformers"])
    parser.add_argument("--gin", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    extra = [binding.replace("=", " = ", 1) for binding in arguments.gin]
    config = make_config(arguments.size, arguments.batch_size, extra)
    start = time.perf_counter()
    systems = {"t5x_lite": make_ours(config)}
    print(f"compiled in {time.perf_counter() - start:.1f} s")
    if arguments.peer:
        systems[arguments.peer] = make_transformers(config)
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for step in range(arguments.steps + 1):
        for name, one in systems.items():
            wall, cpu = time.perf_counter(), time.process_time()
            one()
            if step:
                seconds[name].append(time.perf_counter() - wall)
            print(
                f"{step or 'warm-up':>8}  {name:14} "
                f"{time.perf_counter() - wall:7.2f} s  cpu {time.process_time() - cpu:7.2f} s"
            )
    for name, values in seconds.items():
        print(f"{name:14} median {statistics.median(values):.2f} s of {sorted(values)}")
    if arguments.peer:
        pairs = zip(seconds["t5x_lite"], seconds[arguments.peer], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"t5x_lite / {arguments.peer}: median ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
