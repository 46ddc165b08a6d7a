"""How a source of documents becomes one seqio task per objective."""

from typing import Any

import seqio
import tensorflow as tf

from tasks import objectives

# Every objective needs "inputs" and "targets" except `full_lm`, which has targets only.
OBJECTIVES = {
    "span_corruption": objectives.span_corruption,
    "prefix_lm": objectives.prefix_lm,
    "iid_denoising": objectives.iid_denoising,
    "full_lm": objectives.full_lm,
}


def register_objectives(
    name: str, source: seqio.DataSource, vocabulary: seqio.Vocabulary
) -> list[str]:
    """Registers `<name>_span_corruption` and so on over a source of {"text": string}.

    Ids are int32; inputs and targets end in EOS (in `full_lm`, each document does). The stages
    stand where T5 has them, and so have T5's seeds. Returns the names of the tasks.
    """
    feature = seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)
    names = []
    for objective, preprocessor in OBJECTIVES.items():
        preprocessors = [
            text_to_targets,
            tokenize,
            seqio.CacheDatasetPlaceholder(),
            preprocessor,
            seqio.preprocessors.append_eos_after_trim,
        ]
        features = {"inputs": feature, "targets": feature}
        if objective == "full_lm":
            preprocessors.pop()  # EOS is in its place already
            del features["inputs"]
        names.append(f"{name}_{objective}")
        seqio.TaskRegistry.add(
            names[-1],
            source=source,
            preprocessors=[_without_autograph(stage) for stage in preprocessors],
            output_features=features,
            metric_fns=[],
        )
    return names


def _without_autograph(stage: Any) -> Any:
    """No stage has Python control flow over tensors, and AutoGraph takes seconds to find out."""
    if isinstance(stage, seqio.CacheDatasetPlaceholder):
        return stage
    return tf.autograph.experimental.do_not_convert(stage)


@seqio.map_over_dataset
def text_to_targets(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """{"text", ...} -> {"targets"}."""
    return {"targets": example["text"]}


def tokenize(dataset: tf.data.Dataset, output_features: objectives.Features) -> tf.data.Dataset:
    """{"targets": string} -> {"targets": int32 [T]}, without EOS."""
    # Read here: an error inside a traced function would lose its one line.
    _ = output_features["targets"].vocabulary.vocab_size
    return seqio.preprocessors.tokenize(dataset, output_features, copy_pretokenized=False)
