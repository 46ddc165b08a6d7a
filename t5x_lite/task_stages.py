"""The stages between a task's source and the model, and what they do to lengths.

What the verbs `tasks inspect` and `vocab` stand on; nothing is printed here.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import seqio

from t5x_lite import packing
from t5x_lite.data import Provider, bad_records
from t5x_lite.errors import UsageError
from t5x_lite.run_config import DataConfig

SEED = 0

Dataset = Any  # tf.data.Dataset; TensorFlow by name is not needed here
Lengths = Mapping[str, int]


# ---- stages --------------------------------------------------------------------------------------


def text_stage(
    task: seqio.Task, split: str, lengths: Lengths, *, shuffle: bool = False
) -> tuple[Dataset, list[str]]:
    """The last stage of a task at which its features are text, and the names of the text fields.

    Those are the `inputs` and `targets` that the tokenizer gets, or the source's "text" if the
    features never are strings. The task's vocabulary is not touched (bytes stand in for it), so
    one that does not exist yet can be trained from the result.

    Raises:
      UsageError: the task has no text.
    """
    features = dict.fromkeys(task.output_features, seqio.Feature(seqio.ByteVocabulary()))
    dataset = task.source.get_dataset(split=split, shuffle=shuffle, seed=SEED)
    found = dataset, _text_fields(dataset, features) or _text_fields(dataset, ["text"])
    were_text = bool(_text_fields(dataset, features))
    with seqio.utils.map_seed_manager(SEED):
        for preprocessor in task.preprocessors:
            if isinstance(preprocessor, seqio.CacheDatasetPlaceholder):
                continue
            apply = seqio.utils.add_kwargs_to_transform(
                preprocessor, sequence_length=dict(lengths), output_features=features
            )
            dataset = apply(dataset)
            fields = _text_fields(dataset, features)
            if fields:
                found, were_text = (dataset, fields), True
            elif were_text:
                break  # this was the tokenizer
    if not found[1]:
        raise UsageError(
            f"{task.name} has no text: its source has no field 'text', and "
            f"{' and '.join(features)} are not text at any stage"
        )
    return found


def _text_fields(dataset: Dataset, names: Iterable[str]) -> list[str]:
    spec = dataset.element_spec
    if not isinstance(spec, Mapping):  # the lines of a file
        return []
    return [name for name in names if name in spec and spec[name].dtype == "string"]


def preprocessed(
    config: DataConfig, provider: Provider, lengths: Lengths, *, trim: bool = True
) -> Dataset:
    """The examples of `config.split` once, in their own order, after all stages.

    Without `trim` they are as long as they would be if nothing were cut to the lengths at the end:
    before or after the end marks are added, as the task has it.
    """
    if not trim:
        provider = _without_trimming(provider)
    return provider.get_dataset(
        sequence_length=dict(lengths),
        split=config.split,
        use_cached=config.use_cached_tasks,
        shuffle=False,
        seed=SEED,
        num_epochs=1,
        trim_output_features=trim,
        try_in_mem_cache=False,  # a part of the split is read
    )


def _without_trimming(provider: Provider) -> Provider:
    """A task or mixture, unregistered, that adds its end marks without making room for them."""
    if isinstance(provider, seqio.Mixture):
        members = [(_without_trimming(task), provider.get_rate(task)) for task in provider.tasks]
        return seqio.Mixture(provider.name, members, sample_fn=provider._sample_fn)
    preprocessors = [
        seqio.preprocessors.append_eos
        if preprocessor_name(preprocessor) == "append_eos_after_trim"
        else preprocessor
        for preprocessor in provider.preprocessors
    ]
    return provider.replace(preprocessors=preprocessors, metric_fns=[], metric_objs=[])


def preprocessor_name(preprocessor: Any) -> str:
    """The name of the function, or of the class of an object that is called."""
    while isinstance(preprocessor, functools.partial):
        preprocessor = preprocessor.func
    return getattr(preprocessor, "__name__", type(preprocessor).__name__)


def rows(examples: Dataset, lengths: Lengths, *, pack: bool) -> Dataset | None:
    """The examples as an encoder-decoder gets them, or a decoder if there are targets only.

    None if no model takes these features.
    """
    if set(lengths) == {"inputs", "targets"}:
        return packing.model_features(examples, lengths, pack=pack)
    if set(lengths) == {"targets"}:
        examples = examples.map(lambda example: {name: example[name] for name in lengths})
        converter = seqio.LMFeatureConverter(pack=pack)
        return converter(examples, task_feature_lengths=dict(lengths))
    return None


# ---- a sample, measured --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FeatureMeasures:
    """What a sample shows of one feature.

    Attributes:
      limit: its length in TASK_FEATURE_LENGTHS.
      untrimmed: int [num_examples], tokens with the end mark as if there were no limit.
      trimmed: int [num_examples], tokens with the end mark that training gets.
      num_unknown: tokens, of the trimmed ones, that have the vocabulary's unknown id.
      packed_padding: share of the positions of packed rows that hold nothing; None if no model
        takes the task's features.
    """

    limit: int
    untrimmed: np.ndarray
    trimmed: np.ndarray
    num_unknown: int
    packed_padding: float | None

    @property
    def num_truncated(self) -> int:
        """Examples that lost tokens."""
        return int((self.untrimmed > self.trimmed).sum())

    @property
    def num_lost(self) -> int:
        """Tokens that were cut off."""
        return int(self.untrimmed.sum() - self.trimmed.sum())

    @property
    def padding(self) -> float:
        """Share of the positions that hold nothing with one example in a row."""
        return 1 - float(self.trimmed.sum()) / (len(self.trimmed) * self.limit)


@dataclasses.dataclass(frozen=True)
class Measures:
    """What a sample shows.

    Attributes:
      features: by name.
      num_examples: how many were there; fewer than asked for if the split has no more.
      num_tokens: of all features after trimming, end marks and sentinels included.
      seconds: for reading and preprocessing them all, one pass.
      num_packed_rows: rows they fill when packed; 0 if no model takes the task's features.
      packed_seconds: as `seconds`, with packing.
    """

    features: Mapping[str, FeatureMeasures]
    num_examples: int
    num_tokens: int
    seconds: float
    num_packed_rows: int
    packed_seconds: float


def measure(
    config: DataConfig, provider: Provider, lengths: Lengths, num_examples: int
) -> Measures:
    """Goes through the first examples of `config.split`: without trimming, with it, and packed.

    Only cuts to the lengths at the end of the stages are trimming; what a task leaves out before
    (a random chunk of a very long document) is its own affair.

    Raises:
      UsageError: there is no example.
    """
    whole = preprocessed(config, provider, lengths, trim=False).take(num_examples)
    dataset = preprocessed(config, provider, lengths).take(num_examples)
    untrimmed, _ = _count(whole, provider, lengths)
    start = time.perf_counter()
    trimmed, num_unknown = _count(dataset, provider, lengths)
    seconds = time.perf_counter() - start
    num_found = len(trimmed[next(iter(lengths))])
    if not num_found:
        raise UsageError(
            f"{provider.name}: split {config.split!r} gives no example with lengths {dict(lengths)}"
        )

    num_rows, num_empty, packed_seconds = 0, dict.fromkeys(lengths, 0), 0.0
    packed = rows(dataset, lengths, pack=True)
    if packed is not None:
        start = time.perf_counter()
        for row in packed.as_numpy_iterator():
            num_rows += 1
            for name in lengths:
                segments = "encoder_segment_ids" if name == "inputs" else "decoder_segment_ids"
                num_empty[name] += int((row[segments] == 0).sum())
        packed_seconds = time.perf_counter() - start
    features = {
        name: FeatureMeasures(
            limit=limit,
            untrimmed=untrimmed[name],
            trimmed=trimmed[name],
            num_unknown=num_unknown[name],
            packed_padding=num_empty[name] / (num_rows * limit) if num_rows else None,
        )
        for name, limit in lengths.items()
    }
    num_tokens = sum(int(found.sum()) for found in trimmed.values())
    return Measures(features, num_found, num_tokens, seconds, num_rows, packed_seconds)


@bad_records()
def _count(
    dataset: Dataset, provider: Provider, lengths: Lengths
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """By feature: the length of each example, int [num_examples], and how many unknown ids."""
    unk_ids = {name: provider.output_features[name].vocabulary.unk_id for name in lengths}
    found: dict[str, list[int]] = {name: [] for name in lengths}
    num_unknown = dict.fromkeys(lengths, 0)
    for example in dataset.as_numpy_iterator():
        for name in lengths:
            found[name].append(len(example[name]))
            num_unknown[name] += int((example[name] == unk_ids[name]).sum())
    return {name: np.array(values, int) for name, values in found.items()}, num_unknown
