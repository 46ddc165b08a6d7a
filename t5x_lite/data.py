"""From a seqio task to batches of numpy arrays whose position can be saved.

The only core module that imports seqio and TensorFlow, which take seconds: import it late.
"""

import dataclasses
import importlib
import io
import itertools
import os
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import seqio
import tensorflow as tf

import tasks  # noqa: F401  registers them
from t5x_lite import input_position, packing
from t5x_lite.errors import UsageError, nearest
from t5x_lite.partitioning import InputShare
from t5x_lite.run_config import DataConfig
from tasks import casts, mixing, shards, sources, text_files, vocabularies

# JAX owns the accelerators.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

Batch = dict[str, np.ndarray]
Provider: TypeAlias = seqio.Task | seqio.Mixture

# Evaluation draws the same noise at every step and in every run.
EVAL_SEED = 42

# As many as seqio shuffles where a task does not say.
_SHUFFLED_BEFORE_PACKING = 1000

# The entry of a saved position that tells whose it is.
_SHARE = "share"

_user_module: str | None = None  # for the message of a name that is not registered


def configure(config: DataConfig) -> None:
    """Lets `tasks` know the files that the configuration names, and imports the user's module.

    Raises:
      UsageError: the module cannot be imported.
    """
    if config.tfds_data_dir is not None:
        seqio.set_tfds_data_dir_override(os.path.expanduser(config.tfds_data_dir))
    sources.set_tfds_versions(config.tfds_versions or {})
    mixing.set_rates(
        mixing.Rates(
            config.mixing_maximum, config.mixing_temperature, config.mixing_unsupervised_rate
        )
    )
    file = config.vocabulary_file or vocabularies.T5_VOCABULARY_FILE
    vocabularies.set_default_file(os.path.expanduser(file))
    if config.text_files_pattern is not None:
        prefix = "text_files_"
        names = [f.name for f in dataclasses.fields(text_files.TextFiles)]
        values = {name: getattr(config, prefix + name) for name in names}
        text_files.configure(text_files.TextFiles(**values))
    import_module(config.mixture_or_task_module)


def import_module(module: str | None) -> None:
    """Imports the user's module, which registers tasks; None is none.

    Raises:
      UsageError: it cannot be imported.
    """
    global _user_module
    _user_module = module
    if module is not None:
        if module.endswith(".py"):
            dotted = module.removesuffix(".py").strip("./").replace("/", ".")
            raise UsageError(
                f"MIXTURE_OR_TASK_MODULE = {module!r} is a file; did you mean the module "
                f"{dotted!r}?"
            )
        try:
            importlib.import_module(module)
        except ImportError as e:
            raise UsageError(
                f"MIXTURE_OR_TASK_MODULE = {module!r}: {e}; give a module on PYTHONPATH"
            ) from e


def get_provider(name: str) -> Provider:
    """The task or mixture of that name.

    Raises:
      UsageError: there is none; names the nearest ones.
    """
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in known:
        hint = "; is MIXTURE_OR_TASK_MODULE (--module) missing?" if _user_module is None else ""
        raise UsageError(
            f"MIXTURE_OR_TASK_NAME = {name!r} is not registered; {nearest(name, known)} "
            f"(`python -m t5x_lite tasks list` shows all){hint}"
        )
    return seqio.get_mixture_or_task(name)


def check(config: DataConfig, model_vocab_size: int) -> Provider:
    """The configuration's task, after a look at whether lengths and ids fit it.

    Raises:
      UsageError: the task is unknown, is not text to text, a feature has no length or a length
        has no feature, there is no such split or cache, or the vocabulary has more ids than the
        model.
    """
    provider = get_provider(config.mixture_or_task_name)
    name, features, lengths = provider.name, provider.output_features, config.task_feature_lengths
    if set(features) != {"inputs", "targets"}:
        raise UsageError(
            f"{name} has the features {', '.join(sorted(features))}; an encoder-decoder needs "
            "inputs and targets"
        )
    for feature in features:
        if feature not in lengths:
            raise UsageError(
                f"TASK_FEATURE_LENGTHS = {dict(lengths)!r} has no length for {feature!r}, a "
                f"feature of {name}"
            )
    for feature in lengths:
        if feature not in features:
            raise UsageError(
                f"TASK_FEATURE_LENGTHS: {name} has no feature {feature!r}; "
                f"{nearest(feature, features)}"
            )
    for macro, split in (("split", config.split), ("eval_split", config.eval_split)):
        if provider.splits and split not in provider.splits:
            raise UsageError(
                f"DataConfig.{macro} = {split!r}: {name} has {', '.join(sorted(provider.splits))}"
            )
    members = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
    for task in members:
        if config.use_cached_tasks and task.supports_caching and not task.cache_dir:
            raise UsageError(
                f"USE_CACHED_TASKS = True: {task.name} is not cached in any of seqio's cache "
                f"directories {list(seqio.get_global_cache_dirs())}; set it to False"
            )
    for feature in features.values():
        size = feature.vocabulary.vocab_size
        if size > model_vocab_size:
            raise UsageError(
                f"the vocabulary of {name} has {size} ids, the model T5Config.vocab_size = "
                f"{model_vocab_size}: raise it to at least {size}"
            )
    if not config.use_cached_tasks:
        sources.check_prepared(name, members)
    return provider


def target_vocabulary(provider: Provider) -> seqio.Vocabulary:
    """The vocabulary of the targets."""
    return provider.output_features["targets"].vocabulary


def text_ids(provider: Provider, model_vocab_size: int) -> np.ndarray:
    """Bool [model_vocab_size]: True for ids that are text, neither sentinel, end mark nor pad."""
    mask = vocabularies.text_token_mask(target_vocabulary(provider))
    return np.pad(mask, (0, model_vocab_size - len(mask)))


# ---- training ------------------------------------------------------------------------------------


class TrainBatches:
    """An endless iterator of this process's rows, whose position can be saved and restored.

    Each batch is a dict of int32 [batch_size / shares, length] arrays named as
    `seqio.EncDecFeatureConverter` names them.
    """

    def __init__(
        self,
        dataset: tf.data.Dataset,
        share: InputShare = InputShare(),  # noqa: B008 - frozen
    ):
        """`dataset` is of the batches of this share."""
        self._share = f"{share.index} of {share.count}"
        self._iterator = iter(dataset)
        self._checkpoint = tf.train.Checkpoint(iterator=self._iterator)

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        with bad_records():
            return {name: tensor.numpy() for name, tensor in next(self._iterator).items()}

    def position(self) -> bytes:
        """Where the stream stands, shuffle buffers included.

        Raises:
          UsageError: something in the task's pipeline cannot be saved.
        """
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._checkpoint.write(f"{folder}/position")
            except tf.errors.OpError as e:
                reason = re.sub(r"\{\{.*?\}\} | \[Op:.*", "", str(e).splitlines()[0])
                raise UsageError(
                    "the task's pipeline cannot be saved, so a run on it could not be resumed: "
                    f"{reason} (py_function, a generator, or a random op without a seed)"
                ) from e
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
                for path in sorted(pathlib.Path(folder).iterdir()):
                    # A file time of its own would make equal positions differ.
                    archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes())
                archive.writestr(zipfile.ZipInfo(_SHARE), self._share)
        return packed.getvalue()

    def restore(self, position: bytes) -> None:
        """Goes to where `position` was taken, in this or another process.

        Raises:
          UsageError: it was taken in another share of the batches, or in a cache.
        """
        if input_position.read_indexed(position) is not None:
            raise UsageError(
                "the checkpoint's input position is that of a cache: give the run its CACHE_DIR, "
                "or another MODEL_DIR"
            )
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(io.BytesIO(position)) as archive:
                saved = archive.read(_SHARE).decode()
                if saved != self._share:
                    raise UsageError(input_position.other_share(saved, self._share))
                archive.extractall(folder)
            self._checkpoint.read(f"{folder}/position").assert_consumed()


def train_batches(
    config: DataConfig,
    provider: Provider,
    seed: int,
    share: InputShare = InputShare(),  # noqa: B008
) -> TrainBatches:
    """Shuffled batches of `config.split`, epoch after epoch; the seed fixes their order.

    Args:
      config: lengths, batch size, packing.
      provider: from `check`.
      seed: fixes the stream together with the number of shares.
      share: what of each batch to read.

    Raises:
      UsageError: one pass over the split does not fill one batch, or the pipeline cannot be saved.
    """
    rows = config.batch_size // share.count
    shard_info = seqio.ShardInfo(share.index, share.count) if share.count > 1 else None
    options: dict[str, Any] = {"shard_info": shard_info, "seed": seed}
    once = _dataset(config, provider, config.split, shuffle=False, num_epochs=1, **options)
    # A pipeline that cannot be saved is refused now rather than at the first save. Before it runs,
    # the shuffled one does not show it: a shuffle has no input to save until then.
    probe = TrainBatches(once)
    probe.position()
    found = sum(1 for _ in itertools.islice(probe, rows))
    probe.position()
    if found < rows:
        raise UsageError(
            f"{provider.name}: one pass over {config.split!r} gives {found} rows of "
            f"{dict(config.task_feature_lengths)}, fewer than the {rows} of one batch; lower "
            "BATCH_SIZE"
        )
    dataset = _dataset(config, provider, config.split, shuffle=True, num_epochs=None, **options)
    return TrainBatches(dataset.batch(rows, drop_remainder=True).prefetch(2), share)


# ---- for the cache -------------------------------------------------------------------------------


def rows_of_part(
    config: DataConfig, task: seqio.Task, seed: int, index: int, num_parts: int
) -> Iterator[Batch]:
    """One pass over a part of `config.split`, up to 64 rows at a time.

    Examples are shuffled a little before they are packed, as the stream's are.

    Args:
      config: lengths, packing.
      task: from `check`.
      seed: of the objective's noise and of that shuffle.
      index: which part.
      num_parts: parts in all.
    """
    part = seqio.ShardInfo(index, num_parts) if num_parts > 1 else None
    dataset = _examples(
        config, task, config.split, shuffle=False, seed=seed, num_epochs=1, shard_info=part
    )
    dataset = _rows(dataset.shuffle(_SHUFFLED_BEFORE_PACKING, seed=seed), config)
    with bad_records():
        yield from dataset.batch(64).prefetch(2).as_numpy_iterator()


# ---- evaluation ----------------------------------------------------------------------------------


class EvalBatches:
    """The batches of one pass over a split, the same each time; the last one padded with zeros.

    Every process goes through all of the split and keeps its rows of each batch.
    """

    def __init__(
        self,
        config: DataConfig,
        provider: Provider,
        max_batches: int | None,
        share: InputShare = InputShare(),  # noqa: B008 - frozen
        padded_size: int | None = None,
    ):
        """`padded_size` rows make a batch, of which `config.batch_size` (the default) are real."""
        dataset = _dataset(
            config, provider, config.eval_split, shuffle=False, seed=EVAL_SEED, num_epochs=1
        )
        dataset = dataset.batch(config.batch_size)
        if max_batches is not None:
            dataset = dataset.take(max_batches)
        self._dataset = dataset.prefetch(2)
        self._padded_size = padded_size or config.batch_size
        self._rows = share.rows(self._padded_size)

    def __iter__(self) -> Iterator[Batch]:
        with bad_records():
            for batch in self._dataset.as_numpy_iterator():
                yield {name: self._pad(array)[self._rows] for name, array in batch.items()}

    def _pad(self, array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, self._padded_size - len(array)), (0, 0)))


def examples(
    config: DataConfig, provider: Provider, split: str, num_examples: int | None, seed: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """Examples as the task gives them, one at a time: int32 `inputs` [<= length], `targets`."""
    dataset = _examples(config, provider, split, shuffle=False, seed=seed, num_epochs=1)
    if num_examples is not None:
        dataset = dataset.take(num_examples)
    with bad_records():
        yield from dataset.as_numpy_iterator()


@contextmanager
def bad_records() -> Iterator[None]:
    """Makes one line of TensorFlow's many where a record is one that its task cannot have."""
    try:
        yield
    except tf.errors.InvalidArgumentError as e:
        line = casts.problem(e)
        if line is None:
            raise
        raise UsageError(line) from e


def eval_examples(
    config: DataConfig, provider: Provider, num_examples: int | None, split: str | None = None
) -> list[Mapping[str, np.ndarray]]:
    """The first examples of the evaluation split, or another, with the noise of every evaluation.

    Those of a task have all their fields, those of a mixture its features alone.
    """
    split = config.eval_split if split is None else split
    return list(examples(config, provider, split, num_examples, EVAL_SEED))


def target_texts(config: DataConfig, task: seqio.Task, split: str, num_examples: int) -> list[str]:
    """The targets of the first examples of a task's split, as text."""
    found = examples(config, task, split, num_examples, EVAL_SEED)
    return [text(example, "targets", target_vocabulary(task)) for example in found]


def text(example: Mapping[str, Any], feature: str, vocabulary: seqio.Vocabulary) -> str:
    """A feature of an example before it became ids, or what its ids say."""
    found = example.get(f"{feature}_pretokenized")
    if found is None:
        return vocabulary.decode([int(i) for i in example[feature]])
    return found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)


def token_counts(
    config: DataConfig, provider: Provider, vocab_size: int, num_examples: int
) -> np.ndarray:
    """How often each id occurs in the first examples of the training split, int64 [vocab_size]."""
    counts = np.zeros(vocab_size, np.int64)
    for example in examples(config, provider, config.split, num_examples, EVAL_SEED):
        for feature in ("inputs", "targets"):
            counts += np.bincount(example[feature], minlength=vocab_size)
    return counts


def decode(vocabulary: seqio.Vocabulary, ids: np.ndarray) -> str:
    """Text, with `<extra_id_N>` where sentinels stand, up to the end mark."""
    return vocabularies.decode_with_sentinels(vocabulary, ids)


def _dataset(config: DataConfig, provider: Provider, split: str, **options: Any) -> tf.data.Dataset:
    """Rows as the model sees them."""
    return _rows(_examples(config, provider, split, **options), config)


def _rows(dataset: tf.data.Dataset, config: DataConfig) -> tf.data.Dataset:
    dataset = packing.model_features(dataset, config.task_feature_lengths, pack=config.pack)
    fused = tf.data.Options()
    fused.experimental_optimization.map_fusion = True  # a tenth faster, the same examples
    return dataset.with_options(fused)


def _examples(
    config: DataConfig, provider: Provider, split: str, *, num_epochs: int | None, **options: Any
) -> tf.data.Dataset:
    """Examples as the task gives them; `options` are those of `seqio.Task.get_dataset`.

    One pass over a mixture gives every example of each of its tasks, where seqio would end with the
    first task to be exhausted.
    """
    options |= {
        "sequence_length": dict(config.task_feature_lengths),
        "split": split,
        "use_cached": config.use_cached_tasks,
        "num_epochs": num_epochs,
    }
    if isinstance(provider, seqio.Task) or num_epochs != 1:
        return provider.get_dataset(**options)
    # What T5 mixes in at rate 0 is there to be evaluated by its metrics.
    parts = [t for t in provider.tasks if split in t.splits and provider.get_rate(t) > 0]
    names = list(provider.output_features)
    return tf.data.Dataset.sample_from_datasets(
        [task.get_dataset(**options).map(lambda e: {n: e[n] for n in names}) for task in parts],
        weights=[provider.get_rate(task) for task in parts],
        seed=options["seed"],
        stop_on_empty_dataset=False,
    )


def vocabulary_content(provider: Provider, feature: str = "targets") -> bytes | None:
    """The serialised SentencePiece model of a feature; None for bytes."""
    vocabulary = _resolved_vocabulary(provider, feature)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return vocabulary.sp_model
    return None


def source_shards(provider: Provider, split: str) -> list[str]:
    """Names, made of what was in them, of the shards that text files and tables are read from."""
    members = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
    return [
        pathlib.PurePath(shard).name
        for task in members
        if isinstance(task.source, shards.ShardSource)
        for shard in task.source.list_shards(split)
    ]


def _resolved_vocabulary(provider: Provider, feature: str = "targets") -> seqio.Vocabulary:
    vocabulary = provider.output_features[feature].vocabulary
    if isinstance(vocabulary, vocabularies.LazyVocabulary):
        return vocabulary.resolve()
    return vocabulary


def vocabulary_description(provider: Provider, feature: str = "targets") -> dict[str, Any]:
    """What `model.json` says about the vocabulary of a feature."""
    vocabulary = _resolved_vocabulary(provider, feature)
    description = {"class": type(vocabulary).__name__, "size": vocabulary.vocab_size}
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        description["sentencepiece_model_file"] = str(vocabulary.sentencepiece_model_file)
        description["extra_ids"] = vocabulary.extra_ids
    return description
