"""Seconds from process start to the end of the first step: tiny T5 1.1, the embedded default task.

    python benchmarks/startup.py --runs=3

Cold is with an empty directory for compiled programs, warm with the one that the cold run filled.
The task's vocabulary is there already in both.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time


def one_start(cache: str) -> float:
    """Starts a run of one step in a process of its own; returns seconds to the end of the step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "t5x_lite", "train",
            "--gin_file=gin_configs/models/t5_1_1/tiny.gin",
            "--gin_file=gin_configs/runs/python_docs.gin",
            "--gin.TRAIN_STEPS=1", f"--gin.MODEL_DIR='{folder}/run'",
        ]  # fmt: skip
        start = time.time()
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
        )
        line = json.loads(pathlib.Path(folder, "run/metrics/train.jsonl").read_text())
        return line["unix_time"] - start


def main() -> None:
    """Alternates cold and warm starts and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as cache:
            for values in seconds.values():
                values.append(one_start(cache))
    for kind, values in seconds.items():
        rounded = ", ".join(f"{value:.1f}" for value in sorted(values))
        print(f"{kind}: median {statistics.median(values):.1f} s of {rounded}")


if __name__ == "__main__":
    main()
