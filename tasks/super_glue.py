"""SuperGLUE (arXiv:1905.00537) under T5's names: `super_glue_boolq_v102` and so on.

Cast as GLUE, but for multirc, record and wsc; wsc is in `tasks.coreference`.
"""

import functools

import seqio
import tensorflow as tf

from tasks import (
    casts,
    metrics,
    postprocessors,
    qa_metrics,
    registration,
    sources,
    vocabularies,
)
from tasks.glue import ENTAILMENT, SPLITS, Classification, classification, register_classification

_FALSE_TRUE = ("False", "True")
_ENTAILMENT_FIELDS = ("hypothesis", "premise")

TASKS = {
    "boolq": Classification(("passage", "question"), _FALSE_TRUE),
    "cb": Classification(
        _ENTAILMENT_FIELDS,
        ("entailment", "contradiction", "neutral"),
        (metrics.mean_multiclass_f1(3), metrics.accuracy),
    ),
    "copa": Classification(("choice1", "choice2", "premise", "question"), ("choice1", "choice2")),
    "rte": Classification(_ENTAILMENT_FIELDS, ENTAILMENT),
    # Where the word stands is left out, as in T5.
    "wic": Classification(("sentence1", "sentence2", "word"), _FALSE_TRUE),
    # A diagnostic, cast as the task whose model it tests.
    "axg": Classification(
        _ENTAILMENT_FIELDS, ENTAILMENT, metric_fns=(), benchmark="rte", splits=("test",)
    ),
}


@seqio.map_over_dataset
def multirc(example: casts.Example, task: str) -> dict[str, tf.Tensor]:
    """{"question", "answer", "paragraph", "label", "idx": {...}} -> text without HTML markup.

    `idx/paragraph`, `idx/question` and `idx/answer` are kept. Stops as `classification` does.
    """
    inputs = casts.join_fields(example, "multirc", ("question", "answer", "paragraph"))
    inputs = tf.strings.regex_replace(inputs, "<br>", " ")
    inputs = tf.strings.regex_replace(inputs, "</?b>", "")
    idx = {f"idx/{part}": example["idx"][part] for part in ("paragraph", "question", "answer")}
    targets = casts.class_text(example["label"], _FALSE_TRUE, task)
    return {"inputs": inputs, "targets": targets, **idx}


def record(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """{"query", "entities", "passage", "answers", "idx"} -> an example for each of the answers.

    A record without answers gives one, with the target `<unk>`. Each has all `answers` as well,
    `idx/passage` and `idx/query`.
    """

    def to_text(example: casts.Example) -> dict[str, tf.Tensor]:
        # The highlights become sentences of the passage; one may end in a mark of its own.
        passage = tf.strings.regex_replace(
            example["passage"], r"""([.?!"'])\n@highlight\n""", r"\1 "
        )
        passage = tf.strings.regex_replace(passage, r"\n@highlight\n", ". ")
        entities = tf.strings.reduce_join(example["entities"], separator=", ")
        fields = {"query": example["query"], "entities": entities, "passage": passage}
        answers = example["answers"]
        return {
            "inputs": casts.join_fields(fields, "record", fields),
            "targets": tf.cond(
                tf.size(answers) > 0, lambda: answers, lambda: tf.constant([casts.UNLABELLED])
            ),
            "answers": answers,
            "idx/passage": example["idx"]["passage"],
            "idx/query": example["idx"]["query"],
        }

    def one_for_each(example: casts.Example) -> tf.data.Dataset:
        targets = tf.data.Dataset.from_tensor_slices(example["targets"])
        return targets.map(lambda target: {**example, "targets": target})

    return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE).flat_map(one_for_each)


def register() -> None:
    """Registers `super_glue_<name>_v102` for SuperGLUE's tasks, but wsc, and its diagnostics."""
    for name, task in TASKS.items():
        register_classification(f"super_glue_{name}_v102", f"super_glue/{name}", task)
    # Unlike GLUE's rte, the fields of axb get the names of SuperGLUE's.
    names = {"premise": "sentence1", "hypothesis": "sentence2", "label": "label", "idx": "idx"}
    registration.register_supervised(
        "super_glue_axb_v102",
        sources.PreparedTfdsSource("super_glue/axb", ["test"]),
        vocabularies.DEFAULT,
        [
            functools.partial(seqio.preprocessors.rekey, key_map=names),
            functools.partial(
                classification,
                task="super_glue_axb_v102",
                benchmark="rte",
                fields=_ENTAILMENT_FIELDS,
                classes=ENTAILMENT,
            ),
        ],
        [],
        postprocessors.ClassLabel(ENTAILMENT),
    )
    registration.register_supervised(
        "super_glue_multirc_v102",
        sources.PreparedTfdsSource("super_glue/multirc", SPLITS),
        vocabularies.DEFAULT,
        [functools.partial(multirc, task="super_glue_multirc_v102")],
        [metrics.multirc_f1_over_all_answers, metrics.mean_group_metric(metrics.all_match)],
        postprocessors.GroupedClassLabel(_FALSE_TRUE, "idx/question"),
    )
    registration.register_supervised(
        "super_glue_record_v102",
        sources.PreparedTfdsSource("super_glue/record", SPLITS),
        vocabularies.DEFAULT,
        [record],
        [metrics.deduplicate_metric(qa_metrics.squad)],
        postprocessors.record_answer,
    )
