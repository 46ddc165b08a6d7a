"""Real tokens a second of fine-tuning on SST-2 and CoLA, packed against unpacked, T5 1.1.

    python benchmarks/finetune_packing.py --tfds_data_dir=DIR --vocabulary_file=FILE

Both sides take steps on batches of the same shape, so that a batch has equally many tokens, padding
included; packed rows hold several examples where unpacked ones hold one. Real tokens are those that
are not padding, of inputs and targets. Batches are made beforehand (data_pipeline.py measures
that); the two sides take turns, so that a noisy neighbour slows both.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from t5x_lite import data, gin_utils, setup
from t5x_lite.run_config import TrainConfig

TASKS = ("glue_sst2_v002", "glue_cola_v002")
NUM_WARM_UP_STEPS = 2


class Side(NamedTuple):
    """One way to fill the rows.

    Attributes:
      num_examples: per step, a mean over the batches.
      num_tokens: real tokens per step, a mean over the batches.
      fill: the share of the rows' positions that hold real tokens.
      step: takes one training step and waits for it.
    """

    num_examples: float
    num_tokens: float
    fill: float
    step: Callable[[], None]


def make_config(size: str, task: str, pack: bool, arguments: argparse.Namespace) -> TrainConfig:
    """The published model under the fine-tuning recipe, from T5's initialisers."""
    lengths = {"inputs": arguments.inputs_length, "targets": arguments.targets_length}
    bindings = [
        f"MIXTURE_OR_TASK_NAME = {task!r}",
        f"TASK_FEATURE_LENGTHS = {lengths!r}",
        f"BATCH_SIZE = {arguments.batch_size}",
        f"DataConfig.pack = {pack}",
        f"DataConfig.tfds_data_dir = {arguments.tfds_data_dir!r}",
        f"VOCABULARY_FILE = {arguments.vocabulary_file!r}",
        "INITIAL_CHECKPOINT_PATH = None",
        "TRAIN_STEPS = 1",
        "MODEL_DIR = 'unused'",
    ]
    files = [f"gin_configs/models/t5_1_1/{size}.gin", "gin_configs/runs/finetune.gin"]
    return gin_utils.load_train_config(files, bindings)[0]


def make_side(config: TrainConfig, num_batches: int) -> Side:
    """Compiles the step and draws its batches, which are then used in turn."""
    data.configure(config.data)
    provider = data.check(config.data, config.model.vocab_size)
    stream = data.train_batches(config.data, provider, config.random_seed)
    batches = list(itertools.islice(stream, num_batches))
    tokens = ("encoder_input_tokens", "decoder_target_tokens")
    num_real = [sum(int(np.count_nonzero(batch[name])) for name in tokens) for batch in batches]
    num_positions = sum(batches[0][name].size for name in tokens)
    # An example's first decoder input is 0, and so is padding: only the former has a weight.
    num_examples = [
        int(np.sum((batch["decoder_input_tokens"] == 0) & (batch["decoder_loss_weights"] > 0)))
        for batch in batches
    ]
    programs = setup.make_programs(config)
    rows = itertools.cycle([programs.partitioning.shard_batch(batch) for batch in batches])
    key = jax.random.key(0)
    state = programs.init(key)

    def step() -> None:
        nonlocal state
        state, _ = programs.train_step(state, next(rows), key)
        jax.block_until_ready(state)

    mean_real = statistics.mean(num_real)
    return Side(statistics.mean(num_examples), mean_real, mean_real / num_positions, step)


def measure(sides: dict[str, Side], num_steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each side, by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(NUM_WARM_UP_STEPS + num_steps):
        for name, side in sides.items():
            start = time.perf_counter()
            side.step()
            if number >= NUM_WARM_UP_STEPS:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Prints two lines for each size and task, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--tfds_data_dir", help="where TFDS finds prepared data sets")
    parser.add_argument("--vocabulary_file", help="a SentencePiece model; T5's by default")
    parser.add_argument("--batch_size", type=int, default=32, help="rows, packed or not")
    parser.add_argument("--inputs_length", type=int, default=128)
    parser.add_argument("--targets_length", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    for size, task in itertools.product(arguments.sizes, arguments.tasks):
        sides = {
            name: make_side(make_config(size, task, name == "packed", arguments), arguments.steps)
            for name in ("packed", "unpacked")
        }
        seconds = measure(sides, arguments.steps)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, side in sides.items():
            print(
                f"{size:6} {task:15} {name:9} {side.num_tokens / medians[name]:8,.0f} real tokens/s"
                f"  {side.num_examples / medians[name]:6.1f} examples/s  {medians[name]:.2f} s/step"
                f"  {side.num_examples:.0f} examples and {100 * side.fill:.0f}% real tokens a step",
                flush=True,
            )
        rates = [side.num_tokens / medians[name] for name, side in sides.items()]
        print(f"{size:6} {task:15} packed / unpacked {rates[0] / rates[1]:.2f}")


if __name__ == "__main__":
    main()
