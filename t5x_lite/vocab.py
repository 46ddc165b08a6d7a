"""The verb `vocab`: trains a SentencePiece vocabulary from any task's text."""

import os
from collections.abc import Iterator

import seqio
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from t5x_lite import data, files, task_stages
from t5x_lite.data import Provider
from t5x_lite.errors import UsageError
from t5x_lite.run_config import DataConfig
from tasks import vocabularies

_MAX_EVAL_EXAMPLES = 1000
_NUM_SAMPLES = 12
# What the rows of an embedding table are best a multiple of, to be divided among devices.
_MULTIPLE = 128


def train_vocabulary(
    config: DataConfig,
    output: str,
    *,
    vocab_size: int = 32_000,
    num_sentinels: int = vocabularies.NUM_SENTINELS,
    model_type: str = "unigram",
    byte_fallback: bool = False,
    max_examples: int = 50_000,
) -> None:
    """Trains on the text of `config.split`, writes the model, and prints how it does.

    The text is what the task gives its tokenizer. How many tokens a word and a byte take is
    measured on `config.eval_split`, or where there is none on the training text.

    Args:
      config: the task and its splits; lengths and `batch_size` matter only to a preprocessor that
        asks for lengths before the tokenizer.
      output: the SentencePiece model file to write, local or of an object store.
      vocab_size: all ids: pieces, pad, eos, unk and sentinels.
      num_sentinels: ids at the end for `<extra_id_N>`. 100, as T5's, are added whenever the file
        is read; any other number is written into the file, as mT5's is.
      model_type: "unigram" or "bpe".
      byte_fallback: spell characters that have no piece as bytes, instead of unk.
      max_examples: read at most so many; the trainer keeps all of the text in memory.

    Raises:
      UsageError: `output` exists or cannot be written, the task has no text, or not enough of it.
    """
    if num_sentinels < 1 or max_examples < 1:
        raise UsageError(
            f"--num_sentinels={num_sentinels} --max_examples={max_examples}: must be at least 1"
        )
    path = epath.Path(output)
    if path.exists():
        raise UsageError(f"--output={output} exists already; give another name, or remove it")
    data.configure(config)
    provider = data.get_provider(config.mixture_or_task_name)
    if config.split not in provider.splits:
        splits = ", ".join(sorted(map(str, provider.splits)))
        raise UsageError(f"--split={config.split}: {provider.name} has {splits}")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before the minutes that training takes
    except OSError as e:
        raise _not_writable(output, e) from e

    texts = _Texts(config, provider, config.split, max_examples)
    print(f"Reading up to {max_examples:,} examples of {provider.name}, split {config.split!r}")
    model = vocabularies.train_sentencepiece(
        texts,
        vocab_size=vocab_size,
        num_sentinels=num_sentinels,
        model_type=model_type,
        byte_fallback=byte_fallback,
    )
    if num_sentinels != vocabularies.NUM_SENTINELS:
        model = _with_sentinels(model, num_sentinels)
    try:
        files.write_atomically(path, model)
    except OSError as e:
        raise _not_writable(output, e) from e
    vocabulary = vocabularies.load(output)
    print(f"Trained a {model_type} model on {texts.num_texts:,} texts, {texts.num_bytes:,} bytes")
    _print_pieces(vocabulary, output)
    split = config.eval_split if config.eval_split in provider.splits else config.split
    _print_fit(vocabulary, _Texts(config, provider, split, _MAX_EVAL_EXAMPLES), split)
    _print_usage(vocabulary, output, provider)


def _not_writable(output: str, e: OSError) -> UsageError:
    return UsageError(f"--output={output} cannot be written: {e.strerror or e}")


class _Texts:
    """The texts of a split, counted while they are read; blank ones are left out."""

    def __init__(self, config: DataConfig, provider: Provider, split: str, max_examples: int):
        members = [provider] if isinstance(provider, seqio.Task) else provider.tasks
        members = [task for task in members if split in task.splits]
        lengths = config.task_feature_lengths
        # Sources are opened here: an error while the trainer reads would lose its one line.
        self._stages = [
            task_stages.text_stage(task, split, lengths, shuffle=True) for task in members
        ]
        self._max_examples = -(-max_examples // len(members))
        self.num_texts = 0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for dataset, fields in self._stages:
            with data.bad_records():
                for example in dataset.take(self._max_examples).as_numpy_iterator():
                    for field in fields:
                        if example[field].strip():
                            self.num_texts += 1
                            self.num_bytes += len(example[field])
                            yield example[field].decode(errors="replace")


def _with_sentinels(model: bytes, num_sentinels: int) -> bytes:
    """The model with `<extra_id_N>` among its pieces, counted down to 0 at the end."""
    model_proto = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
    proto = model_proto.FromString(model)
    for i in reversed(range(num_sentinels)):
        user_defined = model_proto.SentencePiece.USER_DEFINED
        proto.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=user_defined)
    return proto.SerializeToString()


# ---- what came of it -----------------------------------------------------------------------------


def _print_pieces(vocabulary: seqio.SentencePieceVocabulary, output: str) -> None:
    size, num_sentinels = vocabulary.vocab_size, vocabularies.num_sentinels(vocabulary)
    num_pieces = size - num_sentinels
    print(f"\n{output}: {size:,} ids")
    print(f"  {vocabulary.pad_id}, {vocabulary.eos_id}, {vocabulary.unk_id}: pad, eos, unk")
    print(f"  3 - {num_pieces - 1}: pieces, such as")
    step = max((num_pieces - 3) // _NUM_SAMPLES, 1)
    for i in range(3, num_pieces, step):
        print(f"    {i:>6}  {vocabulary.tokenizer.IdToPiece(i)}")
    last = num_sentinels - 1
    print(f"  {num_pieces} - {size - 1}: sentinels, <extra_id_{last}> up to <extra_id_0>")


def _print_fit(vocabulary: seqio.SentencePieceVocabulary, texts: _Texts, split: str) -> None:
    num_words = num_tokens = num_unknown = 0
    for text in texts:
        ids = vocabulary.encode(text)
        num_words += len(text.split())
        num_tokens += len(ids)
        num_unknown += ids.count(vocabulary.unk_id)
    if not num_tokens:
        return
    print(f"\nOn {texts.num_texts:,} texts of split {split!r} ({texts.num_bytes:,} bytes)")
    print(f"  {num_tokens / num_words:.3f} tokens per word")
    print(
        f"  {num_tokens / texts.num_bytes:.3f} tokens per byte "
        f"({texts.num_bytes / num_tokens:.2f} bytes per token)"
    )
    print(f"  {num_unknown / num_tokens:.4%} of the tokens unknown")


def _print_usage(vocabulary: seqio.Vocabulary, output: str, provider: Provider) -> None:
    file = output if "://" in output else os.path.abspath(output)
    rows = -(-vocabulary.vocab_size // _MULTIPLE) * _MULTIPLE
    print("\nTo train with it")
    print(f"  --gin.VOCABULARY_FILE=\"'{file}'\" --gin.T5Config.vocab_size={rows}")
    own = [
        name
        for name, feature in provider.output_features.items()
        if feature.vocabulary is not vocabularies.DEFAULT
    ]
    if own:
        print(f"  ({provider.name} itself keeps the vocabulary that it has for {', '.join(own)})")
