"""What the metrics of a task say of answers that need no model."""

import collections
import itertools
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
    if eval_task.has_classes:
        answer = collections.Counter(targets).most_common(1)[0][0]
        name, answers = f"always {answer!r}", [answer] * len(eval_task.inputs)
    else:
        num_words = round(statistics.median(len(text.split()) for text in targets))
        name = f"the first {num_words} words of the input"
        answers = first_words(eval_task.inputs, num_words)
    return Baseline(name, eval_task.measure(answers, None))


def first_words(inputs: Sequence[str], num_words: int) -> list[str]:
    """The first words of each text, after those that begin all of them ("summarize:")."""
    words = [text.split() for text in inputs]
    by_place = zip(*words, strict=False) if len(words) > 1 else ()
    start = sum(1 for _ in itertools.takewhile(lambda at_one: len(set(at_one)) == 1, by_place))
    return [" ".join(w[start : start + num_words]) for w in words]
