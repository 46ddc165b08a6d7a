"""Tasks measured by their own metrics: what the model writes, or which class it finds likeliest.

The semantics are those of `seqio.Evaluator`, which T5 and T5X measure with: predictions and the
untokenized targets go through the task's post-processor, then through its metric functions.
"""

import functools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import seqio
from etils import epath

from t5x_lite import data, files
from t5x_lite.decoding import DecodeConfig
from t5x_lite.errors import UsageError, nearest
from t5x_lite.metrics import MetricWriter
from t5x_lite.predict import Predictor
from t5x_lite.run_config import EVAL_MODES, DataConfig
from tasks import casts

# What `evaluate.evaluate_loss` gives and a run may be judged by.
LOSS_METRICS = ("loss", "text_loss", "accuracy")

# Batches between two calls of `on_progress`; a window's rows are sorted by length.
_WINDOW_BATCHES = 16

# Targets that are measured as if they were predicted, to see which metrics there are.
_NUM_GOLD = 100

_log = logging.getLogger(__name__)


class TaskResult(NamedTuple):
    """One evaluation of one task.

    Attributes:
      task: its name.
      metrics: what its metric functions gave.
      records: for each example, in the order of the split: `inputs` and `targets` (text),
        `prediction` and its `score` (log-likelihood in nats; of a beam with the length penalty),
        `scores` of every class when ranked, `target_score` if a metric asks for it, and the
        example's own numbers and its `id`.
    """

    task: str
    metrics: dict[str, float]
    records: list[dict[str, Any]]


class EvalTask:
    """The examples of one task, read once and kept.

    Attributes:
      task: the seqio task.
      series: the name of its metrics and predictions: that of the task, with that of the split if
        it is not the one that the run evaluates on.
      examples: all fields of each example, as numpy.
      inputs: text of each example.
      target_texts: text of each example.
      targets: what the post-processor makes of them.
    """

    def __init__(
        self,
        config: DataConfig,
        task: seqio.Task,
        split: str,
        num_examples: int | None = None,
    ):
        """Reads the first `num_examples` examples of the split, or all of them.

        Raises:
          UsageError: there are none, or a metric function takes other arguments than `targets` and
            `predictions` or `scores`.
        """
        self.task = task
        name = task.name if split == config.eval_split else f"{task.name}_{split}"
        self.series = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        self.examples = data.eval_examples(config, task, num_examples, split)
        if not self.examples:
            raise UsageError(f"{task.name}: the split {split!r} has no example")
        self._predict_fns, self._score_fns = _metric_functions(task)
        self._vocabulary = data.target_vocabulary(task)
        self._target_length = config.task_feature_lengths["targets"]
        inputs = task.output_features["inputs"].vocabulary
        self.inputs = [data.text(example, "inputs", inputs) for example in self.examples]
        self.target_texts = [data.text(e, "targets", self._vocabulary) for e in self.examples]
        self.targets = self._postprocess(self.target_texts, is_target=True)

    @property
    def needs_predictions(self) -> bool:
        """False for a task that is measured by the likelihood of its targets alone."""
        return bool(self._predict_fns) or not self._score_fns

    @property
    def has_classes(self) -> bool:
        """Whether the post-processor names the possible answers."""
        return bool(_classes(self.task))

    @property
    def needs_scores(self) -> bool:
        """True if a metric function asks for the likelihood of the targets."""
        return bool(self._score_fns)

    @functools.cached_property
    def metric_names(self) -> list[str]:
        """The metrics that it gives, found by measuring targets as if they were predicted.

        Raises:
          UsageError: they cannot be computed.
        """
        texts = self.target_texts[:_NUM_GOLD]
        gold = self._postprocess(texts, is_target=False)
        with np.errstate(all="ignore"):
            scores = np.zeros(len(gold), np.float32)
            return list(self._measure(self.targets[:_NUM_GOLD], gold, scores))

    def decode(self, ids: np.ndarray) -> str:
        """The text of predicted ids, up to the end mark."""
        return self._vocabulary.decode([int(i) for i in ids])

    def options(self) -> dict[str, np.ndarray]:
        """The task's classes and the int32 ids of each, for ranking.

        Raises:
          UsageError: its post-processor names no classes, or two have the same ids, or one is
            longer than the targets may be.
        """
        feature = self.task.output_features["targets"]
        end = [feature.vocabulary.eos_id] if feature.add_eos else []
        options: dict[str, np.ndarray] = {}
        for name in rank_classes(self.task):
            ids = [*feature.vocabulary.encode(name), *end]
            if len(ids) > self._target_length:
                raise UsageError(
                    f"{self.task.name}: the class {name!r} has {len(ids)} ids, "
                    f"TASK_FEATURE_LENGTHS['targets'] = {self._target_length}"
                )
            for other, other_ids in options.items():
                if list(other_ids) == ids:
                    raise UsageError(
                        f"{self.task.name}: the vocabulary gives the classes {other!r} and "
                        f"{name!r} the same ids; no model can tell them apart"
                    )
            options[name] = np.array(ids, np.int32)
        return options

    def measure(
        self, predictions: Sequence[str] | None, target_scores: np.ndarray | None
    ) -> dict[str, float]:
        """The task's metrics.

        Args:
          predictions: predicted text of each example; None only if no metric needs it.
          target_scores: float [n], log-likelihoods of the targets; None only if none needs it.

        Raises:
          UsageError: a metric is no number, or two functions give the same one.
        """
        values = None if predictions is None else self._postprocess(predictions, is_target=False)
        return self._measure(self.targets, values, target_scores)

    def _measure(self, targets: Any, predictions: Any, target_scores: Any) -> dict[str, float]:
        metrics: dict[str, float] = {}
        calls = [(fn, predictions) for fn in self._predict_fns]
        calls += [(fn, target_scores) for fn in self._score_fns]
        for fn, argument in calls:
            try:
                found = fn(targets, argument)
            except Exception as e:  # the user's own code, or a split that cannot be measured
                raise UsageError(
                    f"{self.task.name}: the metric {getattr(fn, '__name__', fn)} cannot be "
                    f"computed: {type(e).__name__}: {' '.join(str(e).split())}"
                ) from e
            for name, value in found.items():
                if name in metrics:
                    raise UsageError(f"{self.task.name}: two metric functions give {name!r}")
                number = _number(self.task.name, name, value)
                if number is not None:
                    metrics[name] = number
        return metrics

    def _postprocess(self, texts: Sequence[str], *, is_target: bool) -> list[Any]:
        return [
            self.task.postprocess_fn(text, example=example, is_target=is_target)
            for text, example in zip(texts, self.examples, strict=False)
        ]


def members(provider: data.Provider, split: str) -> list[seqio.Task]:
    """The tasks of a mixture, or the task itself, that have the split and metrics.

    If only some do, a line of the log says which are left out and why.
    """
    kept, left_out = [], []
    for task in provider.tasks if isinstance(provider, seqio.Mixture) else [provider]:
        if not any(_metric_functions(task)):
            left_out.append(f"{task.name} (no metrics)")
        elif split not in task.splits:
            left_out.append(f"{task.name} (no split {split!r})")
        else:
            kept.append(task)
    if kept and left_out:
        _log.warning("not measured by metrics: %s", ", ".join(left_out))
    return kept


def open_tasks(
    config: DataConfig,
    provider: data.Provider,
    split: str,
    num_examples: int | None,
    mode: str,
) -> list[EvalTask]:
    """Reads the examples of all `members`, and looks whether they can be evaluated in this mode.

    In a mixture, members without classes are left to be generated under "rank" too; a line of the
    log says which.

    Raises:
      UsageError: as `EvalTask` and `EvalTask.options`; or nothing is there to be ranked.
    """
    parts = members(provider, split)
    if mode == "rank" and parts:
        without = [task for task in parts if not _classes(task)]
        if len(without) == len(parts):
            rank_classes(without[0])  # raises, before anything is read
        if without:
            names = ", ".join(task.name for task in without)
            _log.warning("without classes to rank, generated instead: %s", names)
    opened = [EvalTask(config, task, split, num_examples) for task in parts]
    for eval_task in opened:
        _ = eval_task.metric_names  # what cannot be measured is seen before anything is decoded
        if set(eval_task.target_texts) == {casts.UNLABELLED}:
            _log.warning(
                "%s: the split %r has no labels: its metrics mean nothing",
                eval_task.task.name,
                split,
            )
    if mode == "rank":
        for eval_task in opened:
            if eval_task.has_classes:
                eval_task.options()
    return opened


def _classes(task: seqio.Task) -> tuple[str, ...]:
    return tuple(getattr(task._postprocess_fn, "classes", None) or ())


def rank_classes(task: seqio.Task) -> tuple[str, ...]:
    """The classes among which a model is to choose, as text.

    Raises:
      UsageError: the task names none.
    """
    classes = _classes(task)
    if not classes:
        raise UsageError(
            f"{task.name} has no classes to rank: its postprocess_fn needs an attribute `classes` "
            "(tasks.postprocessors.ClassLabel has one), or use the mode 'generate'"
        )
    return classes


def check_metric(name: str, eval_tasks: Sequence[EvalTask], loss_series: str) -> None:
    """Looks whether an evaluation will give the metric `name`, "<series>/<metric>".

    Args:
      name: BEST_METRIC.
      eval_tasks: what is evaluated beside the loss.
      loss_series: the series of the loss.

    Raises:
      UsageError: it will not; names the nearest ones.
    """
    series, _, metric = name.partition("/")
    by_series = {eval_task.series: eval_task for eval_task in eval_tasks}
    if series == loss_series:
        metrics = list(LOSS_METRICS)
    elif series in by_series:
        metrics = by_series[series].metric_names
    else:
        raise UsageError(
            f"BEST_METRIC = {name!r}: the run measures no series {series!r}; "
            f"{nearest(series, [loss_series, *by_series])}"
        )
    if metric not in metrics:
        raise UsageError(
            f"BEST_METRIC = {name!r}: {series} has no metric {metric!r}; {nearest(metric, metrics)}"
        )


# ---- the evaluation ------------------------------------------------------------------------------


def evaluate(
    eval_task: EvalTask,
    predictor: Predictor,
    params: Any,
    mode: str = "generate",
    decode: DecodeConfig | None = None,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> TaskResult:
    """Predicts every example once, and measures.

    Every process of a job calls it, with the same examples, and gets the same result.

    Args:
      eval_task: the examples.
      predictor: decodes and scores.
      params: the parameters.
      mode: "generate" decodes; "rank" takes the class whose text is likeliest, the first of equal
        ones; a task without classes is decoded.
      decode: how "generate" decodes; greedy by default. Of several outputs the first counts.
      on_progress: called now and then with the number of examples done; may raise to stop.

    Raises:
      UsageError: as `EvalTask.options`.
    """
    if mode not in EVAL_MODES:
        raise ValueError(f"mode {mode!r}")
    ranks = mode == "rank" and eval_task.needs_predictions and eval_task.has_classes
    options = eval_task.options() if ranks else {}
    records: list[dict[str, Any]] = []
    target_scores: list[float] = []
    size = max(1, _WINDOW_BATCHES * predictor.batch_size // max(1, len(options)))
    for window in _windows(len(eval_task.examples), size):
        examples = eval_task.examples[window]
        inputs = [example["inputs"] for example in examples]
        rows: list[dict[str, Any]] = [{} for _ in examples]
        if options:
            rows = _rank(predictor, params, inputs, options)
        elif eval_task.needs_predictions:
            predictions = predictor.generate(
                params, inputs, decode or DecodeConfig(), first_index=window.start
            )
            rows = [
                {"prediction": eval_task.decode(p.ids[0]), "score": _finite(p.scores[0])}
                for p in predictions
            ]
        if eval_task.needs_scores:
            scores = predictor.score(params, inputs, [e["targets"] for e in examples])
            target_scores += [float(score) for score in scores]
            for row, score in zip(rows, scores, strict=True):
                row["target_score"] = _finite(score)
        records += rows
        if on_progress is not None:
            on_progress(len(records))
    texts = [row["prediction"] for row in records] if eval_task.needs_predictions else None
    metrics = eval_task.measure(
        texts, np.array(target_scores, np.float32) if eval_task.needs_scores else None
    )
    described = zip(
        eval_task.examples, eval_task.inputs, eval_task.target_texts, records, strict=True
    )
    return TaskResult(
        eval_task.task.name,
        metrics,
        [
            {**_own_fields(example), "inputs": inputs, "targets": targets, **row}
            for example, inputs, targets, row in described
        ],
    )


def write(
    model_dir: epath.PathLike,
    writer: MetricWriter,
    eval_task: EvalTask,
    step: int,
    result: TaskResult,
) -> None:
    """Writes a result: a line of `metrics/<series>.jsonl` and `inference/<series>-<step>.jsonl`.

    Those of an earlier evaluation of the step are replaced. Only one process of a job may call it.
    """
    values = {"num_examples": len(result.records)} | result.metrics
    path = epath.Path(os.fspath(model_dir)) / "inference" / f"{eval_task.series}-{step}.jsonl"
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in result.records)
    files.write_atomically(path, lines.encode())
    writer.write(eval_task.series, step, values)


def _windows(num_examples: int, size: int) -> Iterator[slice]:
    for start in range(0, num_examples, size):
        yield slice(start, min(start + size, num_examples))


def _rank(
    predictor: Predictor,
    params: Any,
    inputs: Sequence[np.ndarray],
    options: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    rows = [(ids, option) for ids in inputs for option in options.values()]
    scores = predictor.score(params, [ids for ids, _ in rows], [option for _, option in rows])
    names = list(options)
    found = []
    for scores_C in np.asarray(scores).reshape(len(inputs), len(names)):
        best = int(scores_C.argmax())
        by_class = {name: _finite(score) for name, score in zip(names, scores_C, strict=True)}
        found.append(
            {"prediction": names[best], "score": by_class[names[best]], "scores": by_class}
        )
    return found


# ---- what tasks and metric functions give --------------------------------------------------------


def _metric_functions(task: seqio.Task) -> tuple[list[Callable], list[Callable]]:
    """Functions of (targets, predictions) and of (targets, scores).

    Others, and metric objects, are told and left out.
    """
    try:
        with_aux = task.predict_with_aux_metric_fns
    except ValueError as e:
        raise UsageError(f"{task.name}: {' '.join(str(e).split())}") from e
    left_out = [getattr(fn, "__name__", str(fn)) for fn in with_aux]
    num_functions = len(task.metric_fns)
    left_out += [
        type(m).__name__ for m in task.metric_objs[: len(task.metric_objs) - num_functions]
    ]
    if left_out:
        _tell_once(
            f"{task.name}: {', '.join(left_out)} left out: a metric is a function of (targets, "
            "predictions) or of (targets, scores)"
        )
    return list(task.predict_metric_fns), list(task.score_metric_fns)


@functools.cache
def _tell_once(line: str) -> None:
    """In every evaluation the same would be said."""
    _log.warning("%s", line)


def _number(task: str, name: str, value: Any) -> float | None:
    """A metric's value; None, with a line of the log, for a picture or a text."""
    if isinstance(value, seqio.metrics.Scalar):
        value = value.value
    if isinstance(value, seqio.metrics.MetricValue):
        _tell_once(f"{task}: metric {name!r} is a {type(value).__name__}, left out")
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as e:
        raise UsageError(
            f"{task}: metric {name!r} is {value!r}; it must be a number or a seqio.metrics.Scalar"
        ) from e


def _own_fields(example: Mapping[str, Any]) -> dict[str, Any]:
    """The example's id and numbers, by which its line can be found in the data set."""
    fields: dict[str, Any] = {}
    for name, value in example.items():
        if name in ("inputs", "targets"):
            continue
        array = np.asarray(value)
        if isinstance(value, bytes):
            if name == "id":
                fields[name] = value.decode("utf-8", "replace")
        elif array.dtype.kind in "iub" or (array.dtype.kind == "f" and np.isfinite(array).all()):
            fields[name] = array.tolist()
    return fields


def _finite(value: Any) -> float | None:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else None
