"""Evaluation of a run while it trains: losses, and what its tasks' metrics say of its answers."""

import itertools
from collections.abc import Callable
from typing import Any

from etils import epath

from t5x_lite import evaluate, setup
from t5x_lite.distributed import from_process_0, is_coordinator
from t5x_lite.metrics import MetricWriter, read_metrics
from t5x_lite.run_config import TrainConfig, eval_name


class _StoppedError(Exception):
    """The run is to stop; an evaluation that is under way is abandoned."""


class Evaluator:
    """Evaluates the run's validation split, the same examples each time.

    Every process of the job calls every method, and process 0 writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: setup.Input,
        programs: setup.Programs,
        writer: MetricWriter,
        is_stopped: Callable[[], bool],
    ):
        """Computes nothing yet.

        Args:
          config: the run.
          data: its examples.
          programs: its compiled steps.
          writer: takes the metrics.
          is_stopped: asked now and then; True abandons an evaluation.
        """
        self._config = config
        self._data = data
        self._programs = programs
        self._writer = writer
        self._is_stopped = is_stopped
        self.predictor = setup.make_predictor(config, programs.partitioning)

    def has_evaluated(self, step: int) -> bool:
        """True if the evaluation of this step was written to its end."""
        name = eval_name(self._config)
        path = epath.Path(self._config.model_dir) / "metrics" / f"{name}.jsonl"
        return from_process_0(
            lambda: path.exists() and any(record["step"] == step for record in read_metrics(path))
        )

    def evaluate(self, step: int, params: Any) -> list[str]:
        """Measures, and writes metrics and predictions.

        Returns:
          Lines that tell the outcome; none if the run was stopped meanwhile, and then nothing is
          written.
        """
        from t5x_lite import task_evaluation

        try:
            loss = evaluate.evaluate_loss(
                self._programs.eval_step,
                params,
                self._until_stopped(),
                self._data.text_ids_V,
                self._programs.partitioning,
            )
            results = [
                task_evaluation.evaluate(
                    task,
                    self.predictor,
                    params,
                    self._config.evaluation.mode,
                    self._config.evaluation.decode,
                    on_progress=self._check_stopped,
                )
                for task in self._data.eval_tasks
            ]
            self._check_stopped()
        except _StoppedError:
            return []
        lines = []
        for task, result in zip(self._data.eval_tasks, results, strict=True):
            if is_coordinator():
                task_evaluation.write(self._config.model_dir, self._writer, task, step, result)
            figures = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
            lines.append(f"step {step}  {task.series}  {figures}")
        name = eval_name(self._config)
        self._writer.write(name, step, loss)  # last: `has_evaluated` looks for it
        self._writer.flush()
        figures = f"text {loss['text_loss']:.4f}  accuracy {loss['accuracy']:.4f}"
        return [f"step {step}  {name} loss {loss['loss']:.4f}  {figures}", *lines]

    def _until_stopped(self) -> Any:
        return itertools.takewhile(lambda _: not self._is_stopped(), self._data.evaluation)

    def _check_stopped(self, _: int = 0) -> None:
        if self._is_stopped():
            raise _StoppedError
