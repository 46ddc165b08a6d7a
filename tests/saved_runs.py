"""Runs as they look after training, made in a moment: parameters are T5's initial ones."""

import json
import pathlib
from typing import Any

import jax
from etils import epath

from t5x_lite import data, infer, run_files, setup
from t5x_lite.checkpoints import Checkpoints
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import OptimizerConfig
from t5x_lite.run_config import DataConfig, TrainConfig
from t5x_lite.step import LossConfig, TrainState

TASK = "python_docs_span_corruption"
TINY = T5Config(
    vocab_size=4096,
    d_model=16,
    d_ff=32,
    d_kv=8,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    scan_layers=False,
)
LENGTHS = {"inputs": 32, "targets": 8}


def make_params(seed: int, model: T5Config = TINY) -> Any:
    return t5.init(model, jax.random.key(seed))


def save_step(model_dir: pathlib.Path, step: int, model: T5Config = TINY) -> None:
    """A checkpoint whose parameters are those of `make_params(step)`."""
    checkpoints = Checkpoints(model_dir / "checkpoints")
    checkpoints.save(step, TrainState(jax.numpy.int32(step), make_params(step, model), {}), None)
    checkpoints.close()


def make_run(
    model_dir: pathlib.Path,
    steps: tuple[int, ...],
    *,
    task: str = TASK,
    model: T5Config = TINY,
    **data_options: str,
) -> pathlib.Path:
    """What `train` writes before its first step, as it writes it, and checkpoints."""
    data_config = DataConfig(task, LENGTHS, batch_size=4, **data_options)  # type: ignore[arg-type]
    data.configure(data_config)
    config = TrainConfig(
        str(model_dir), model, OptimizerConfig(), LossConfig(), data_config, train_steps=9
    )
    provider = data.get_provider(task)
    opened = setup.Input(provider, None, None, [], None)  # type: ignore[arg-type]
    run_files.write(epath.Path(model_dir), config, "", opened)
    for step in steps:
        save_step(model_dir, step, model)
    return model_dir


def infer_lines(run_dir: pathlib.Path, output: epath.PathLike, **options: Any) -> list[dict]:
    """The records that `infer` writes."""
    options = {"batch_size": 4} | options
    path = infer.infer(infer.InferConfig(str(run_dir), str(output), **options))
    return [json.loads(line) for line in path.read_bytes().splitlines()]
