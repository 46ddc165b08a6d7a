"""GLUE (arXiv:1804.07461) under T5's names: `glue_sst2_v002` and so on.

T5's wording: the benchmark's name, then every field under its name, in the order of the names. The
test splits have no labels.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import seqio
import tensorflow as tf

from tasks import casts, metrics, postprocessors, registration, sources, vocabularies

SPLITS = ("train", "validation", "test")
ENTAILMENT = ("entailment", "not_entailment")
_MNLI_CLASSES = ("entailment", "neutral", "contradiction")
_MNLI_FIELDS = ("hypothesis", "premise")
_SENTENCES = ("sentence1", "sentence2")
_F1_AND_ACCURACY = (metrics.f1_score_with_invalid, metrics.accuracy)


class Classification(NamedTuple):
    """A task that puts a name on some fields of a record.

    Attributes:
      fields: of the record, in the order of the input.
      classes: names by label.
      metric_fns: over class indices.
      benchmark: what the input begins with; empty for the task's own name.
      splits: those that the data set has.
    """

    fields: Sequence[str]
    classes: tuple[str, ...]
    metric_fns: Sequence[metrics.MetricFn] = (metrics.accuracy,)
    benchmark: str = ""
    splits: Sequence[str] = SPLITS


TASKS = {
    "cola": Classification(
        ("sentence",), ("unacceptable", "acceptable"), (metrics.matthews_corrcoef,)
    ),
    "sst2": Classification(("sentence",), ("negative", "positive")),
    "mrpc": Classification(_SENTENCES, ("not_equivalent", "equivalent"), _F1_AND_ACCURACY),
    "qqp": Classification(
        ("question1", "question2"), ("not_duplicate", "duplicate"), _F1_AND_ACCURACY
    ),
    "mnli": Classification(
        _MNLI_FIELDS,
        _MNLI_CLASSES,
        splits=(
            *("train", "validation_matched", "validation_mismatched"),
            *("test_matched", "test_mismatched"),
        ),
    ),
    "mnli_matched": Classification(
        _MNLI_FIELDS, _MNLI_CLASSES, benchmark="mnli", splits=("validation", "test")
    ),
    "mnli_mismatched": Classification(
        _MNLI_FIELDS, _MNLI_CLASSES, benchmark="mnli", splits=("validation", "test")
    ),
    "qnli": Classification(("question", "sentence"), ENTAILMENT),
    "rte": Classification(_SENTENCES, ENTAILMENT),
    "wnli": Classification(_SENTENCES, ("not_entailment", "entailment")),
    # The diagnostics have no labels, and are cast as the task whose model they test.
    "ax": Classification(
        _MNLI_FIELDS, _MNLI_CLASSES, metric_fns=(), benchmark="mnli", splits=("test",)
    ),
}


@seqio.map_over_dataset
def classification(
    example: casts.Example, task: str, benchmark: str, fields: Sequence[str], classes: Sequence[str]
) -> dict[str, tf.Tensor]:
    """{*fields, "label": int, "idx"} -> {"inputs", "targets", "idx"}.

    Stops at a label that is no class; -1 becomes `<unk>`.
    """
    return {
        "inputs": casts.join_fields(example, benchmark, fields),
        "targets": casts.class_text(example["label"], classes, task),
        "idx": example["idx"],
    }


@seqio.map_over_dataset
def stsb(example: casts.Example) -> dict[str, tf.Tensor]:
    """{"sentence1", "sentence2", "label": float32, "idx"} -> {"inputs", "targets", "idx"}.

    The score is rounded to the nearest fifth, "3.4"; label * 5 half to even, as in T5.
    """
    return {
        "inputs": casts.join_fields(example, "stsb", _SENTENCES),
        "targets": tf.strings.as_string(tf.round(example["label"] * 5) / 5, precision=1),
        "idx": example["idx"],
    }


def register_classification(name: str, data_set: str, task: Classification) -> None:
    """Registers a task over a prepared TFDS data set."""
    cast = functools.partial(
        classification,
        task=name,
        benchmark=task.benchmark or data_set.partition("/")[2],
        fields=task.fields,
        classes=task.classes,
    )
    registration.register_supervised(
        name,
        sources.PreparedTfdsSource(data_set, task.splits),
        vocabularies.DEFAULT,
        [cast],
        task.metric_fns,
        postprocessors.ClassLabel(task.classes),
    )


def register() -> None:
    """Registers `glue_<name>_v002` for GLUE's tasks, and its diagnostics `ax`."""
    for name, task in TASKS.items():
        register_classification(f"glue_{name}_v002", f"glue/{name}", task)
    registration.register_supervised(
        "glue_stsb_v002",
        sources.PreparedTfdsSource("glue/stsb", SPLITS),
        vocabularies.DEFAULT,
        [stsb],
        [metrics.pearson_corrcoef, metrics.spearman_corrcoef],
        postprocessors.number,
    )
