"""What the metrics of a task say of answers that need no model."""

import collections
import os
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from t5x_lite import data
from t5x_lite.run_config import DataConfig
from t5x_lite.task_evaluation import EvalTask

# Enough to know the most frequent target and the usual length of one.
_TRAIN_EXAMPLES = 5_000


class Baseline(NamedTuple):
    """Answers without a model, and how good they are.

    Attributes:
      name: what they are, in words.
      metrics: those of the task.
    """

    name: str
    metrics: dict[str, float]


def measure(config: DataConfig, eval_task: EvalTask) -> Baseline | None:
    """The most frequent target for a task of classes, else the first words of each input.

    Args:
      config: names the training split, on whose first 5,000 targets the answer is settled.
      eval_task: what is to be answered.

    Returns:
      None if the task has no such split, or is measured by likelihoods.
    """
    task = eval_task.task
    if config.split not in task.splits or eval_task.needs_scores:
        return None
    targets = data.target_texts(config, task, config.split, _TRAIN_EXAMPLES)
    if getattr(task._postprocess_fn, "classes", None):
        answer = collections.Counter(targets).most_common(1)[0][0]
        name, answers = f"always {answer!r}", [answer] * len(eval_task.inputs)
    else:
        num_words = round(statistics.median(len(text.split()) for text in targets))
        name = f"the first {num_words} words of the input"
        answers = first_words(eval_task.inputs, num_words)
    return Baseline(name, eval_task.measure(answers, None))


def first_words(inputs: Sequence[str], num_words: int) -> list[str]:
    """The first words of each text, after the words with which all of them begin ("summarize: ")."""
    prefix = os.path.commonprefix(list(inputs)) if len(inputs) > 1 else ""
    start = prefix.rfind(" ") + 1
    return [" ".join(text[start:].split()[:num_words]) for text in inputs]
