"""A task's metrics when its own targets are taken for predictions: anything below perfect is lost
in the vocabulary, in the length, or in the post-processor, and no model can win it back.
"""

import collections
import dataclasses
from typing import Any

import seqio

from t5x_lite.errors import UsageError
from t5x_lite.run_config import DataConfig
from t5x_lite.task_evaluation import EvalTask, rank_classes


@dataclasses.dataclass(frozen=True)
class GoldCheck:
    """What gold against gold shows.

    Attributes:
      num_examples: how many were looked at.
      metrics: of the targets, encoded, cut to their length and decoded again, against themselves.
      changed: (target, what came back) of the examples whose text did not survive that.
      num_texts: different targets.
      num_values: different values that the post-processor made of them.
      first: (target, its value as a target, its value as a prediction) of the first example.
      classes: examples of each class that the post-processor names; empty if it names none.
      outside: targets that are none of these classes.
    """

    num_examples: int
    metrics: dict[str, float]
    changed: list[tuple[str, str]]
    num_texts: int
    num_values: int
    first: tuple[str, Any, Any]
    classes: dict[str, int]
    outside: list[str]


def check(config: DataConfig, task: seqio.Task, num_examples: int) -> GoldCheck:
    """Measures the first examples of `config.split` of a task with metrics of its predictions.

    Raises:
      UsageError: there is no example, or the post-processor or a metric function fails on them.
    """
    measured = task.replace(metric_fns=task.predict_metric_fns)  # likelihoods need a model
    try:
        read = EvalTask(config, measured, config.split, num_examples)
        returned = [read.decode(example["targets"]) for example in read.examples]
        values = [
            task.postprocess_fn(text, example=example, is_target=False)
            for text, example in zip(returned, read.examples, strict=True)
        ]
        metrics = read.measure(returned, None)
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(
            f"{task.name}: its post-processor or a metric fails on its own targets: "
            f"{type(e).__name__}: {' '.join(str(e).split())}"
        ) from e
    texts = read.target_texts
    counts = collections.Counter(texts)
    classes = rank_classes(task) if read.has_classes else ()
    return GoldCheck(
        num_examples=len(texts),
        metrics=metrics,
        changed=[pair for pair in zip(texts, returned, strict=True) if pair[0] != pair[1]],
        num_texts=len(counts),
        num_values=len({repr(value) for value in read.targets}),
        first=(texts[0], read.targets[0], values[0]),
        classes={name: counts[name] for name in classes},
        outside=[text for text in texts if classes and text not in classes],
    )
