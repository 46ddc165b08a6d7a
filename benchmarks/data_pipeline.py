"""Real tokens per second of the training input, without a model behind it.

    python benchmarks/data_pipeline.py --tfds_data_dir=DIR --vocabulary_file=FILE
    python benchmarks/data_pipeline.py --task=python_docs_span_corruption

`per 2 CPU s` divides by the processor time spent rather than by the clock, so that a noisy
neighbour matters less: it is the rate of two cores that do nothing else.
"""

import argparse
import time

import numpy as np

from t5x_lite import data
from t5x_lite.run_config import DataConfig


def measure(batches: data.TrainBatches, seconds: float) -> dict[str, float]:
    """Draws batches for `seconds`, after three that fill the buffers."""
    for _ in range(3):
        next(batches)
    num_tokens = num_batches = 0
    start, start_cpu = time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < seconds:
        batch = next(batches)
        num_batches += 1
        for name in ("encoder_input_tokens", "decoder_target_tokens"):
            num_tokens += np.count_nonzero(batch[name])
    cpu = time.process_time() - start_cpu
    return {
        "batches per second": num_batches / elapsed,
        "million tokens per second": num_tokens / elapsed / 1e6,
        "million tokens per 2 CPU s": 2 * num_tokens / cpu / 1e6,
    }


def main() -> None:
    """Prints a line for packed and one for unpacked batches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="c4_v310_span_corruption")
    parser.add_argument("--tfds_data_dir")
    parser.add_argument("--vocabulary_file")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    for pack in (True, False):
        config = DataConfig(
            mixture_or_task_name=arguments.task,
            task_feature_lengths={"inputs": 512, "targets": 114},
            batch_size=arguments.batch_size,
            pack=pack,
            vocabulary_file=arguments.vocabulary_file,
            tfds_data_dir=arguments.tfds_data_dir,
        )
        data.configure(config)
        batches = data.train_batches(config, data.check(config, 1 << 31), seed=0)
        found = measure(batches, arguments.seconds)
        print("packed  " if pack else "unpacked", end="")
        print("".join(f"  {name} {value:.2f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
