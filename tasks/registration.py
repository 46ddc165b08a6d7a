"""How a source becomes seqio tasks: documents one per objective, records of a task one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import seqio
import tensorflow as tf

from tasks import metrics, objectives

Preprocessor = Callable[..., tf.data.Dataset]

# Every objective needs "inputs" and "targets" except `full_lm`, which has targets only.
OBJECTIVES = {
    "span_corruption": objectives.span_corruption,
    "prefix_lm": objectives.prefix_lm,
    "iid_denoising": objectives.iid_denoising,
    "full_lm": objectives.full_lm,
}


def register_objective(
    name: str, source: seqio.DataSource, vocabulary: seqio.Vocabulary, objective: str
) -> None:
    """Registers one objective of `OBJECTIVES` as a task over a source of {"text": string}.

    Ids are int32; inputs and targets end in EOS (in `full_lm`, each document does). The stages
    stand where T5 has them, and so have T5's seeds.
    """
    preprocessors = [
        text_to_targets,
        tokenize,
        seqio.CacheDatasetPlaceholder(),
        OBJECTIVES[objective],
        seqio.preprocessors.append_eos_after_trim,
    ]
    features = _features(vocabulary)
    if objective == "full_lm":
        preprocessors.pop()  # EOS is in its place already
        del features["inputs"]
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[_without_autograph(stage) for stage in preprocessors],
        output_features=features,
        metric_fns=[],
    )


def register_objectives(
    name: str, source: seqio.DataSource, vocabulary: seqio.Vocabulary
) -> list[str]:
    """Registers `<name>_span_corruption` and so on; returns the names of the tasks."""
    names = {objective: f"{name}_{objective}" for objective in OBJECTIVES}
    for objective, task in names.items():
        register_objective(task, source, vocabulary, objective)
    return list(names.values())


def register_supervised(
    name: str,
    source: seqio.DataSource,
    vocabulary: seqio.Vocabulary,
    casts: Sequence[Preprocessor],
    metric_fns: Sequence[metrics.MetricFn],
    postprocess_fn: Callable[..., Any] | None = None,
    token_preprocessors: Sequence[Preprocessor] = (),
) -> None:
    """Registers a task whose records `casts` make into text.

    Ids are int32, cut to the feature's length with EOS at their end, as in T5's tasks. The text
    stays beside them as `inputs_pretokenized` and `targets_pretokenized`, and so does every other
    field that the casts keep, for the post-processing.

    Args:
      name: of the task.
      source: of the records.
      vocabulary: of both features.
      casts: dataset of records -> dataset of {"inputs": string [], "targets": string [], ...}, one
        after the other.
      metric_fns: (targets, predictions) -> {name: value}, both post-processed.
      postprocess_fn: (text, example=..., is_target=...) -> what the metrics take; None leaves it
        text.
      token_preprocessors: dataset of ids without EOS -> the same, after the place of caching.
    """
    stages = [
        *casts,
        functools.partial(tokenize, copy_pretokenized=True),
        seqio.CacheDatasetPlaceholder(),
        *token_preprocessors,
        seqio.preprocessors.append_eos_after_trim,
    ]
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[_without_autograph(stage) for stage in stages],
        output_features=_features(vocabulary),
        postprocess_fn=postprocess_fn,
        metric_fns=list(metric_fns),
    )


def _features(vocabulary: seqio.Vocabulary) -> dict[str, seqio.Feature]:
    feature = seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)
    return {"inputs": feature, "targets": feature}


def _without_autograph(stage: Any) -> Any:
    """No stage has Python control flow over tensors, and AutoGraph takes seconds to find out."""
    if isinstance(stage, seqio.CacheDatasetPlaceholder):
        return stage
    if isinstance(stage, functools.partial):
        return functools.partial(_without_autograph(stage.func), *stage.args, **stage.keywords)
    return tf.autograph.experimental.do_not_convert(stage)


@seqio.map_over_dataset
def text_to_targets(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """{"text", ...} -> {"targets"}."""
    return {"targets": example["text"]}


def tokenize(
    dataset: tf.data.Dataset,
    output_features: objectives.Features,
    copy_pretokenized: bool = False,
) -> tf.data.Dataset:
    """Strings of the features -> int32 [T], without EOS; the rest stays as it is."""
    # Read here: an error inside a traced function would lose its one line.
    _ = output_features["targets"].vocabulary.vocab_size
    return seqio.preprocessors.tokenize(
        dataset, output_features, copy_pretokenized=copy_pretokenized
    )
