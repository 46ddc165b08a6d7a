"""What a training run is, as frozen dataclasses; gin fills them, anything else may.

Nothing here imports TensorFlow or seqio, so that the command line can check its arguments, and
the step can compile, while those load.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite.decoding import DecodeConfig
from t5x_lite.errors import UsageError
from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import OptimizerConfig
from t5x_lite.step import LossConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples, and in which shape.

    Attributes:
      mixture_or_task_name: a seqio task or mixture (`python -m t5x_lite tasks list`).
      task_feature_lengths: tokens of each feature, {"inputs": 512, "targets": 114}.
      batch_size: rows of the global batch.
      pack: put several examples in a row where they fit.
      split: what is trained on.
      eval_split: what is evaluated on.
      mixture_or_task_module: a module to import first, which registers tasks; or None.
      use_cached_tasks: read the examples that seqio's cache job prepared.
      cache_dir: train on the rows that the `cache` verb wrote there, in an order that is a function
        of the seed and the step alone.
      vocabulary_file: a SentencePiece model or "bytes", for tasks without a vocabulary of their
        own; None is T5's.
      tfds_data_dir: where TFDS looks for prepared data sets; None is its own default.
      mixing_maximum: the size above which a task is drawn no more often, in `all_mix` and
        `all_proportional`; None is no limit (Raffel et al. 2020, section 3.5.2).
      mixing_temperature: evens out their rates: sizes to the power of 1 / temperature.
      mixing_unsupervised_rate: the rate of C4 in `all_mix`.
      tfds_versions: versions to read instead of TFDS's current ones, {"glue": "1.0.0"}.
      text_files_pattern: files for the tasks called `text_files_*`: text, JSON lines, or gzip of
        either.
      text_files_field: the field of a JSON line that holds the text; None for plain text.
      text_files_validation_pattern: files to validate on; None splits off a share instead.
      text_files_validation_share: the share of documents kept for validation.
      text_files_skip_corrupt_lines: go on after counting them instead of stopping.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    batch_size: int
    pack: bool = True
    split: str = "train"
    eval_split: str = "validation"
    mixture_or_task_module: str | None = None
    use_cached_tasks: bool = False
    cache_dir: str | None = None
    vocabulary_file: str | None = None
    tfds_data_dir: str | None = None
    tfds_versions: Mapping[str, str] | None = None
    mixing_maximum: float | None = 1e6
    mixing_temperature: float = 1.0
    mixing_unsupervised_rate: float = 1e6
    text_files_pattern: str | None = None
    text_files_field: str | None = None
    text_files_validation_pattern: str | None = None
    text_files_validation_share: float = 0.01
    text_files_skip_corrupt_lines: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError on a length or a batch size that is no positive integer."""
        lengths = self.task_feature_lengths
        if not isinstance(lengths, Mapping) or not lengths:
            raise UsageError(
                f"TASK_FEATURE_LENGTHS = {lengths!r}: give tokens for each feature, like "
                "{'inputs': 512, 'targets': 114}"
            )
        for feature, length in lengths.items():
            if not _is_count(length):
                raise UsageError(
                    f"TASK_FEATURE_LENGTHS[{feature!r}] = {length!r}: must be an integer of at "
                    "least 1"
                )
        if not _is_count(self.batch_size):
            raise UsageError(f"BATCH_SIZE = {self.batch_size!r}: must be an integer of at least 1")


def parse_feature_lengths(text: str) -> dict[str, int]:
    """`"inputs=512,targets=114"` as a mapping.

    Raises:
      UsageError: it is not of that form.
    """
    lengths = {}
    for part in text.split(","):
        feature, _, length = (piece.strip() for piece in part.partition("="))
        if not feature or not length.isdecimal():
            raise UsageError(
                f"--task_feature_lengths={text}: give tokens for each feature, like "
                "inputs=512,targets=114"
            )
        lengths[feature] = int(length)
    return lengths


EVAL_MODES = ("generate", "rank")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How tasks with metrics are evaluated; the loss is measured on every task.

    Attributes:
      mode: "generate" compares what the model writes; "rank" takes, of a task's classes, the one
        that the model finds likeliest, so that every answer is one.
      decode: how it writes.
      num_examples: the first examples of each task's split; None for all.
      batch_size: rows decoded at a time; None is that of the training.
    """

    mode: str = "generate"
    decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)
    num_examples: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Raises UsageError on a mode or a count that is none."""
        if self.mode not in EVAL_MODES:
            raise UsageError(f"EVAL_MODE = {self.mode!r}: allowed are {', '.join(EVAL_MODES)}")
        for macro, value in (
            ("EVAL_NUM_EXAMPLES", self.num_examples),
            ("EVAL_BATCH_SIZE", self.batch_size),
        ):
            if value is not None and not _is_count(value):
                raise UsageError(f"{macro} = {value!r}: must be None or an integer of at least 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      model_dir: where everything that the run leaves goes; a local path or an object store's.
      model: the architecture.
      optimizer: the optimizer and its schedule.
      loss: what is minimised.
      data: the examples.
      train_steps: the step at which the run is complete.
      random_seed: fixes initialisation, dropout and the order of examples.
      evaluation: how tasks with metrics are evaluated.
      eval_period: steps between evaluations; 0 for none before the end.
      eval_steps: batches of which the loss is measured; None for the whole split.
      best_metric: the checkpoint where this is best is kept, and named in best.json:
        "validation/loss", "glue_sst2_v002/accuracy"; None keeps none.
      best_metric_mode: "max" or "min"; None: "min" if its name ends in "loss", else "max".
      early_stopping_patience: evaluations in a row that are no better than the best one before,
        after which the run is complete; None for never.
      checkpoint_period: steps between checkpoints; the last step is always saved.
      checkpoint_keep: how many of the newest checkpoints stay; None for all.
      checkpoint_keep_every: steps divisible by this stay for ever.
      log_period: steps between lines of metrics.
      initial_checkpoint_path: a run or a checkpoint whose parameters to start from.
      num_sample_predictions: validation examples to fill in at the end.
      profile_steps: (first, last) step to record for the profiler; None for none.
      mesh: devices along each mesh axis, {"fsdp": 4, "model": 2}; None: all along "data".
      dcn_mesh: TPU slices along each mesh axis, {"data": 2}; None: along the first they divide.
      sharding_rules: changes to `partitioning.LOGICAL_TO_MESH`, {"activation_embed": "model"}.
    """

    model_dir: str
    model: T5Config
    optimizer: OptimizerConfig
    loss: LossConfig
    data: DataConfig
    train_steps: int
    random_seed: int = 0
    evaluation: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    eval_period: int = 1000
    eval_steps: int | None = 20
    best_metric: str | None = None
    best_metric_mode: str | None = None
    early_stopping_patience: int | None = None
    checkpoint_period: int = 1000
    checkpoint_keep: int | None = None
    checkpoint_keep_every: int | None = None
    log_period: int = 100
    initial_checkpoint_path: str | None = None
    num_sample_predictions: int = 4
    profile_steps: tuple[int, int] | None = None
    mesh: Mapping[str, int] | None = None
    dcn_mesh: Mapping[str, int] | None = None
    sharding_rules: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises UsageError on a count that is none."""
        if not isinstance(self.model_dir, str) or not self.model_dir:
            raise UsageError(f"MODEL_DIR = {self.model_dir!r}: give a directory")
        if self.model_dir.startswith("~"):
            raise UsageError(f"MODEL_DIR = {self.model_dir!r}: write the home directory out")
        for macro, value, least in (
            ("TRAIN_STEPS", self.train_steps, 1),
            ("RANDOM_SEED", self.random_seed, 0),
            ("EVAL_PERIOD", self.eval_period, 0),
            ("EVAL_STEPS", self.eval_steps, 1),
            ("EARLY_STOPPING_PATIENCE", self.early_stopping_patience, 1),
            ("CHECKPOINT_PERIOD", self.checkpoint_period, 1),
            ("CHECKPOINT_KEEP", self.checkpoint_keep, 1),
            ("CHECKPOINT_KEEP_EVERY", self.checkpoint_keep_every, 1),
            ("LOG_PERIOD", self.log_period, 1),
            ("NUM_SAMPLE_PREDICTIONS", self.num_sample_predictions, 0),
        ):
            if not (value is None and macro in _OPTIONAL) and not _is_count(value, least):
                raise UsageError(f"{macro} = {value!r}: must be an integer of at least {least}")
        self._check_best_metric()
        self._check_mesh()
        steps = self.profile_steps
        if steps is not None and not (
            isinstance(steps, Sequence)
            and len(steps) == 2
            and all(_is_count(s) for s in steps)
            and steps[0] <= steps[1]
        ):
            raise UsageError(
                f"PROFILE_STEPS = {steps!r}: give the first and the last step, like (10, 12)"
            )

    def _check_mesh(self) -> None:
        for macro, shape, what in (
            ("MESH", self.mesh, "devices"),
            ("DCN_MESH", self.dcn_mesh, "slices"),
        ):
            if shape is not None and not (
                isinstance(shape, Mapping) and all(_is_count(n) for n in shape.values())
            ):
                raise UsageError(
                    f"{macro} = {shape!r}: give {what} for each axis, like "
                    "{'fsdp': 4, 'model': 2}"
                )
        if not isinstance(self.sharding_rules, Mapping | None):
            raise UsageError(
                f"SHARDING_RULES = {self.sharding_rules!r}: give mesh axes for logical axes, like "
                "{'activation_embed': 'model'}"
            )

    def _check_best_metric(self) -> None:
        if self.best_metric is not None and not all(self.best_metric.partition("/")):
            raise UsageError(
                f"BEST_METRIC = {self.best_metric!r}: give a series and a metric, like "
                "'validation/loss' or 'glue_sst2_v002/accuracy'"
            )
        if self.best_metric_mode not in (None, "max", "min"):
            raise UsageError(
                f"BEST_METRIC_MODE = {self.best_metric_mode!r}: allowed are 'max', 'min' and None"
            )
        if self.early_stopping_patience is not None and self.eval_period == 0:
            raise UsageError(
                f"EARLY_STOPPING_PATIENCE = {self.early_stopping_patience}: EVAL_PERIOD = 0 "
                "evaluates at the end alone; set it to the steps between evaluations"
            )
        if self.early_stopping_patience is not None and self.best_metric is None:
            raise UsageError(
                f"EARLY_STOPPING_PATIENCE = {self.early_stopping_patience}: needs a BEST_METRIC to "
                "watch, like 'validation/loss'"
            )

    @property
    def larger_is_better(self) -> bool:
        """Whether the best value of `best_metric` is the largest."""
        if self.best_metric_mode is None:
            return not (self.best_metric or "").endswith("loss")
        return self.best_metric_mode == "max"

    def check_batch_divides(self, num_data_shards: int) -> None:
        """Raises UsageError unless each device gets the same number of rows in each microbatch."""
        pieces = num_data_shards * self.loss.num_microbatches
        if self.data.batch_size % pieces:
            raise UsageError(
                f"BATCH_SIZE = {self.data.batch_size} does not divide into {num_data_shards} "
                f"parts (data x fsdp of MESH) x {self.loss.num_microbatches} microbatches; use a "
                f"multiple of {pieces}"
            )


_OPTIONAL = {
    "EVAL_STEPS",
    "EARLY_STOPPING_PATIENCE",
    "CHECKPOINT_KEEP",
    "CHECKPOINT_KEEP_EVERY",
}

# What may differ between two starts of one run: how long it goes and what it writes, never what it
# computes. The mesh and the places may change since parameters and examples do not depend on them.
MAY_CHANGE = frozenset(
    {
        "TrainConfig.model_dir",
        "TrainConfig.train_steps",
        "TrainConfig.eval_period",
        "TrainConfig.eval_steps",
        "TrainConfig.best_metric",
        "TrainConfig.best_metric_mode",
        "TrainConfig.early_stopping_patience",
        "EvalConfig.mode",
        "EvalConfig.num_examples",
        "EvalConfig.batch_size",
        "TrainConfig.checkpoint_period",
        "TrainConfig.checkpoint_keep",
        "TrainConfig.checkpoint_keep_every",
        "TrainConfig.log_period",
        "TrainConfig.num_sample_predictions",
        "TrainConfig.profile_steps",
        "TrainConfig.mesh",
        "TrainConfig.dcn_mesh",
        "TrainConfig.sharding_rules",
        "DataConfig.tfds_data_dir",
        "DataConfig.cache_dir",
    }
)


def eval_name(config: TrainConfig) -> str:
    """The evaluation's series of metrics; "train" is that of the training itself."""
    split = config.data.eval_split
    return "train_split" if split == "train" else split


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """What a resumed run must not change but does: "OptimizerConfig.learning_rate: 1.0 -> 0.1"."""
    before, after = flatten(old), flatten(new)
    return [
        f"{name}: {before[name]!r} -> {after[name]!r}"
        for name in before
        if not _may_change(name) and before[name] != after[name]
    ]


def check_same_run(saved: TrainConfig, config: TrainConfig) -> None:
    """Refuses to go on with a run under another configuration.

    Raises:
      UsageError: naming the bindings that differ.
    """
    changed = differences(saved, config)
    if changed:
        raise UsageError(
            f"MODEL_DIR = {config.model_dir!r} holds a run with another configuration: "
            f"{'; '.join(changed)}. Use another MODEL_DIR, or the run's own bindings (only "
            "TRAIN_STEPS, periods, evaluation, logging, MESH and --tfds_data_dir may change)"
        )


def _may_change(name: str) -> bool:
    return name in MAY_CHANGE or name.startswith("DecodeConfig.")


def flatten(config: Any) -> dict[str, Any]:
    """Every field of a configuration and of those in it: {"TrainConfig.train_steps": 1000}."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value)
        else:
            flat[f"{type(config).__name__}.{field.name}"] = value
    return flat


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
