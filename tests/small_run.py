"""A run that takes seconds, through the command line, and what tests look at afterwards."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

REPO = pathlib.Path(__file__).resolve().parent.parent

SMALL = {
    "T5Config.d_model": 32,
    "T5Config.d_ff": 64,
    "T5Config.d_kv": 8,
    "T5Config.num_heads": 4,
    "T5Config.num_encoder_layers": 1,
    "T5Config.num_decoder_layers": 1,
    "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 16},
    "BATCH_SIZE": 4,
    "DROPOUT_RATE": 0.1,
    "TRAIN_STEPS": 6,
    "LOG_PERIOD": 1,
    "EVAL_PERIOD": 3,
    "EVAL_STEPS": 2,
    "CHECKPOINT_PERIOD": 2,
    "CHECKPOINT_KEEP": None,
    "NUM_SAMPLE_PREDICTIONS": 2,
}


def train_argv(model_dir: pathlib.Path, bindings: dict[str, Any] | None = None) -> list[str]:
    """The arguments of `python -m t5x_lite`; `bindings` win over SMALL."""
    values = SMALL | {"MODEL_DIR": str(model_dir)} | (bindings or {})
    return [
        "train",
        "--gin_file=gin_configs/models/t5_1_1/tiny.gin",
        "--gin_file=gin_configs/runs/python_docs.gin",
        *(f"--gin.{name}={value!r}" for name, value in values.items()),
    ]


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    """A Python process with pipes, that runs `command`: `-m t5x_lite ...` or `-c CODE ...`."""
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=REPO,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def metric_lines(model_dir: pathlib.Path, name: str) -> list[dict[str, float]]:
    """The lines of a series without what depends on the clock."""
    lines = (model_dir / "metrics" / f"{name}.jsonl").read_text().splitlines()
    timings = ("seconds_per_step", "target_tokens_per_second", "unix_time")
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in lines]


def steps(model_dir: pathlib.Path) -> list[int]:
    """The checkpoints that are there."""
    names = [path.name for path in (model_dir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def arrays(model_dir: pathlib.Path, step: int, part: str) -> dict[str, tuple[str, bytes]]:
    """Name, dtype and bytes of every array of a checkpoint, as Orbax alone reads them."""
    tree = ocp.load_checkpointables(model_dir / "checkpoints" / str(step), {part: None})[part]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (str(x.dtype), x.tobytes()) for path, x in leaves}


def assert_same_state(one: pathlib.Path, other: pathlib.Path, step: int) -> None:
    """Parameters and optimizer state are equal, bit for bit."""
    for part in ("params", "optimizer"):
        expected = arrays(one, step, part)
        assert expected
        assert arrays(other, step, part) == expected


def content(directory: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and content of every file below `directory`."""
    return {
        str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def flip_a_bit(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest_file(directory: pathlib.Path) -> pathlib.Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
