"""Vocabularies that are read when they are first needed, and the training of new ones.

Ids are T5's: pad 0, eos 1, unk 2, then the pieces, then the sentinels `<extra_id_N>` counted down
from the end, so that `<extra_id_0>` is the last id.

Bytes are ByT5's 259 ids, pad, eos, unk and the 256 bytes, without sentinels of their own: span
corruption takes the last 100 byte ids, 258 and down (arXiv:2105.13626, section 3). Such an id is a
sentinel in denoised examples only; in any other text it is a byte. Only the first eleven can be
told apart wherever they stand, since no UTF-8 text has a byte of 0xF5 or above: these are shown as
`<extra_id_N>` and not counted as text. ByT5's own spans, of 20 bytes on average, need nine in 1024
inputs.
"""

import abc
import functools
import io
import itertools
import os
import re
import threading
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import seqio
import tensorflow as tf

from t5x_lite.errors import UsageError

T5_VOCABULARY_FILE = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
BYTES = "bytes"
NUM_SENTINELS = 100

_MODEL_DIR_FILES = ("vocabulary.model", "model.json")
_FIRST_ID_OF_NO_TEXT = 3 + 0xF5  # among bytes
_SENTINEL_PIECE = re.compile("▁?<extra_id_([0-9]+)>")


# ---- vocabularies that tasks refer to ------------------------------------------------------------


class LazyVocabulary(seqio.Vocabulary):
    """A vocabulary that tasks can be registered with before it is read, or even made.

    Everything is passed on to `resolve()`, which raises UsageError if the vocabulary cannot be had.
    """

    def __init__(self) -> None:
        super().__init__()

    @abc.abstractmethod
    def resolve(self) -> seqio.Vocabulary:
        """The vocabulary itself; the same object every time unless the configuration changes."""

    @property
    def bos_id(self) -> int | None:
        return self.resolve().bos_id

    @property
    def eos_id(self) -> int | None:
        return self.resolve().eos_id

    @property
    def pad_id(self) -> int:
        return self.resolve().pad_id

    @property
    def unk_id(self) -> int | None:
        return self.resolve().unk_id

    @property
    def extra_ids(self) -> int:
        return self.resolve().extra_ids

    @property
    def vocab_size(self) -> int:
        return self.resolve().vocab_size

    @property
    def _base_vocab_size(self) -> int:
        return self.resolve()._base_vocab_size

    def _encode(self, s: str) -> Sequence[int]:
        return self.resolve().encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.resolve().decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        return self.resolve().encode_tf(s)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return self.resolve().decode_tf(ids)

    def __eq__(self, other: object) -> bool:
        # Mixtures compare the vocabularies of their tasks; nothing is read for one and the same.
        if self is other:
            return True
        if isinstance(other, LazyVocabulary):
            other = other.resolve()
        return self.resolve() == other

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return str(self.resolve())


class _DefaultVocabulary(LazyVocabulary):
    """What VOCABULARY_FILE names, for every task that has no vocabulary of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.file = T5_VOCABULARY_FILE

    def resolve(self) -> seqio.Vocabulary:
        return load(self.file)


DEFAULT = _DefaultVocabulary()


def set_default_file(path: str) -> None:
    """Sets what the `DEFAULT` vocabulary is: a SentencePiece model file, or "bytes" (as ByT5)."""
    DEFAULT.file = path


# Read and checked once: seqio reloads nothing either. A lock, because tf.data traces in threads.
_load_lock = threading.Lock()


def load(file: str) -> seqio.Vocabulary:
    """The vocabulary in a SentencePiece model file with 100 sentinels after its pieces, or "bytes".

    Sentinels are not added to a model that has them already (as mT5's), nor to a run's own
    `vocabulary.model`, which lies in MODEL_DIR beside `model.json` and is complete.

    Raises:
      UsageError: the file cannot be read, is no SentencePiece model, or its pad is not 0 or its eos
        not 1.
    """
    with _load_lock:
        return _load(file)


@functools.cache
def _load(file: str) -> seqio.Vocabulary:
    if file == BYTES:
        return seqio.ByteVocabulary(extra_ids=0)
    try:
        with tf.io.gfile.GFile(file, "rb") as f:
            content = f.read()
    except tf.errors.OpError as e:
        reason = "it does not exist" if isinstance(e, tf.errors.NotFoundError) else e.message
        raise UsageError(
            f"VOCABULARY_FILE {file!r} cannot be read: {reason.splitlines()[0]}; give a "
            f"SentencePiece model, or {BYTES!r}"
        ) from e
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        if not content or not pieces.LoadFromSerializedProto(content):
            raise RuntimeError("empty")
    except RuntimeError as e:
        raise UsageError(f"VOCABULARY_FILE {file!r} is not a SentencePiece model") from e
    if pieces.pad_id() != 0 or pieces.eos_id() < 0:
        raise UsageError(
            f"VOCABULARY_FILE {file!r} has pad id {pieces.pad_id()} and eos id {pieces.eos_id()}; "
            "pad must be 0 and there must be an eos (`python -m t5x_lite vocab` makes such a model)"
        )
    if pieces.eos_id() != 1:
        raise UsageError(
            f"VOCABULARY_FILE {file!r}: its end mark is id {pieces.eos_id()}; T5's is 1"
        )
    has_sentinels = _SENTINEL_PIECE.fullmatch(pieces.IdToPiece(len(pieces) - 1))
    is_complete = bool(has_sentinels) or _is_of_run(file)
    return seqio.SentencePieceVocabulary(file, extra_ids=0 if is_complete else NUM_SENTINELS)


def _is_of_run(file: str) -> bool:
    folder, name = os.path.split(file)
    own_name, beside = _MODEL_DIR_FILES
    return name == own_name and tf.io.gfile.exists(os.path.join(folder, beside))


# ---- sentinels -----------------------------------------------------------------------------------


def sentinel_id(vocabulary: seqio.Vocabulary, i: int) -> int:
    """The id of `<extra_id_i>`: counted down from the end, as span corruption uses them.

    Raises:
      IndexError: there is no such sentinel.
    """
    if not 0 <= i < num_sentinels(vocabulary):
        raise IndexError(f"sentinel {i} of {num_sentinels(vocabulary)}")
    return vocabulary.vocab_size - 1 - i


def num_sentinels(vocabulary: seqio.Vocabulary) -> int:
    """How many ids at the end of the vocabulary span corruption may use as sentinels."""
    if isinstance(vocabulary, LazyVocabulary):
        vocabulary = vocabulary.resolve()
    if _is_plain_bytes(vocabulary):
        return NUM_SENTINELS
    if vocabulary.extra_ids or not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return vocabulary.extra_ids
    return _num_sentinel_pieces(vocabulary.tokenizer)


@functools.cache
def _num_sentinel_pieces(pieces: sentencepiece.SentencePieceProcessor) -> int:
    from_last = (pieces.IdToPiece(i) for i in range(pieces.GetPieceSize() - 1, -1, -1))
    return sum(1 for _ in itertools.takewhile(_SENTINEL_PIECE.fullmatch, from_last))


def _first_id_of_no_text(vocabulary: seqio.Vocabulary) -> int:
    """The ids from here on are sentinels wherever they stand."""
    if isinstance(vocabulary, LazyVocabulary):
        vocabulary = vocabulary.resolve()
    if _is_plain_bytes(vocabulary):
        return _FIRST_ID_OF_NO_TEXT
    return vocabulary.vocab_size - num_sentinels(vocabulary)


def _is_plain_bytes(vocabulary: seqio.Vocabulary) -> bool:
    return isinstance(vocabulary, seqio.ByteVocabulary) and not vocabulary.extra_ids


def text_token_mask(vocabulary: seqio.Vocabulary) -> np.ndarray:
    """bool [vocab_size], True for ids of ordinary text: neither pad, eos nor a sentinel.

    Of bytes all are text that UTF-8 text may have, although span corruption uses some as sentinels.
    """
    mask = np.ones(vocabulary.vocab_size, bool)
    mask[[i for i in (vocabulary.pad_id, vocabulary.eos_id) if i is not None]] = False
    mask[_first_id_of_no_text(vocabulary) :] = False
    return mask


def decode_with_sentinels(vocabulary: seqio.Vocabulary, ids: Iterable[int]) -> str:
    """Text with ` <extra_id_N> ` where sentinels stand (which bytes would else leave out).

    Padding is dropped, and so are ids that the vocabulary does not have; an eos ends the text. Of
    bytes, only what no text has is a sentinel.
    """
    first_sentinel = _first_id_of_no_text(vocabulary)
    parts: list[str] = []
    text_ids: list[int] = []

    def flush() -> None:
        if text_ids:
            parts.append(vocabulary.decode(text_ids).strip(" "))
            text_ids.clear()

    for i in map(int, ids):
        if i == vocabulary.eos_id:
            break
        if i >= vocabulary.vocab_size:  # a row of the embedding that only pads it
            continue
        if i >= first_sentinel:
            flush()
            parts.append(f"<extra_id_{vocabulary.vocab_size - 1 - i}>")
        elif i != vocabulary.pad_id:
            text_ids.append(i)
    flush()
    return " ".join(parts)


# ---- training ------------------------------------------------------------------------------------


def train_sentencepiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    num_sentinels: int = NUM_SENTINELS,
    model_type: str = "unigram",
    character_coverage: float = 0.9995,
    byte_fallback: bool = False,
) -> bytes:
    """Trains a SentencePiece model and returns its serialised form.

    `vocab_size` counts everything, the sentinels too, which are not in the model: `load` (and
    seqio, and T5) adds them after its pieces. A text is divided at its line ends. The same texts
    and settings give the same model: one thread.

    Raises:
      UsageError: there is no text, or not enough of it for that many pieces.
    """
    num_pieces = vocab_size - num_sentinels
    if num_pieces < 4:
        raise UsageError(
            f"a vocabulary of {vocab_size} with {num_sentinels} sentinels, pad, eos and unk has no "
            "room for text"
        )
    model = io.BytesIO()
    sentences = (line for text in texts for line in text.splitlines() if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type=model_type,
            vocab_size=num_pieces,
            character_coverage=character_coverage,
            byte_fallback=byte_fallback,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            max_sentence_length=1 << 16,  # bytes; a longer line is left out
            minloglevel=2,
        )
    except RuntimeError as e:
        # "Internal: ...trainer_interface.cc(N) [condition] Explanation."
        reason = str(e).rpartition("] ")[2].strip() or "there is not enough text"
        if match := re.search(r"value <= (\d+)", reason):
            reason = f"the text has enough for {int(match[1]) + num_sentinels} at most"
        raise UsageError(
            f"no vocabulary of {vocab_size} ({num_pieces} pieces and {num_sentinels} sentinels) "
            f"can be trained: {reason}"
        ) from e
    return model.getvalue()
