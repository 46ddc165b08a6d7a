"""Which checkpoint is the best by a named metric, and whether a better one is still waited for.

Both are read off the metric files each time, so a run that was interrupted has nothing to restore.
"""

import json
import math
from collections.abc import Collection
from typing import NamedTuple

from etils import epath

from t5x_lite import files
from t5x_lite.metrics import read_metrics
from t5x_lite.run_config import TrainConfig

FILE_NAME = "best.json"


class Best(NamedTuple):
    """The best evaluation of a run so far; of equal ones the first.

    Attributes:
      step: the step that was evaluated.
      value: what the metric was.
      num_since: how many evaluations came after it.
    """

    step: int
    value: float
    num_since: int


def find(
    model_dir: epath.PathLike, config: TrainConfig, steps: Collection[int] | None = None
) -> Best | None:
    """The best evaluation that the run's metric files show.

    Args:
      model_dir: the run.
      config: says which metric, and whether its largest value is the best.
      steps: look at these steps alone; None for all.

    Returns:
      None if the run has no such metric, or no finite value of it yet.
    """
    if config.best_metric is None:
        return None
    series, _, metric = config.best_metric.partition("/")
    path = epath.Path(model_dir) / "metrics" / f"{series}.jsonl"
    records = read_metrics(path) if path.exists() else []
    best = None
    for record in records:
        value = record.get(metric, math.nan)
        if steps is not None and record["step"] not in steps:
            continue
        if math.isfinite(value) and (best is None or _is_better(value, best.value, config)):
            best = Best(int(record["step"]), value, 0)
        elif best is not None:
            best = best._replace(num_since=best.num_since + 1)
    return best


def is_exhausted(model_dir: epath.PathLike, config: TrainConfig) -> bool:
    """True if EARLY_STOPPING_PATIENCE evaluations in a row were no better than the best."""
    best = find(model_dir, config)
    patience = config.early_stopping_patience
    return patience is not None and best is not None and best.num_since >= patience


def write(model_dir: epath.PathLike, config: TrainConfig, best: Best) -> None:
    """Names the best checkpoint in MODEL_DIR/best.json."""
    content = {
        "step": best.step,
        "metric": config.best_metric,
        "value": best.value,
        "mode": "max" if config.larger_is_better else "min",
    }
    path = epath.Path(model_dir) / FILE_NAME
    files.write_atomically(path, (json.dumps(content) + "\n").encode())


def _is_better(value: float, best: float, config: TrainConfig) -> bool:
    return value > best if config.larger_is_better else value < best
