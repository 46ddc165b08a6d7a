"""Vocabularies of other people's checkpoints, and the rule of their sizes.

Three sizes meet in a T5 model. P pieces: T5's SentencePiece model has 32,000. E sentinels
`<extra_id_N>`, counted down to the end: T5 adds 100 after its pieces, so there are 32,100 ids; mT5
and UMT5 have theirs among the pieces of the file. V rows of the embedding: rounded up so that they
divide over accelerators, 32,128. The rule is P + E <= V: the rows from P + E on are padding, which
no text uses and no target names (12 of mT5's 250,112, 125 of ByT5's 384). V = P is a model without
sentinels: none are added. Everything else is another model's vocabulary and is refused, since its
ids would mean something else: too few rows for the pieces (V < P), for the sentinels that go with
them (P < V < P + E), or more than padding explains (V > 1.5 (P + E) and more than 1,024 beyond).
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from typing import Any

import sentencepiece
from etils import epath
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2

from t5x_lite.errors import UsageError
from t5x_lite.interop import tokenizer_json
from t5x_lite.interop.json_files import read_object

BYTES = "bytes"
NUM_BYTE_IDS = 3 + 256  # pad, eos, unk, then the bytes
NUM_SENTINELS = 100  # T5's

# Rows that are more than both are no padding. ByT5's 384 / 259 = 1.48 is the largest ratio of the
# published models; a small vocabulary may be padded by as much as is usual for accelerators.
_MAX_ROWS_PER_ID = 1.5
_MAX_PADDING = 1024

_MODEL_FILES = ("spiece.model", "sentencepiece.model", "tokenizer.model")
_UNREADABLE_FILES = {"vocab.txt": "WordPiece", "merges.txt": "BPE"}
_BYTES_CLASS = "ByT5Tokenizer"
_NUM_HF_BYTE_SENTINELS = 125  # rounds 259 up to the 384 rows of ByT5

# protobuf makes its classes when it is imported, which type checkers cannot follow.
_ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class ForeignVocabulary:
    """A vocabulary as MODEL_DIR keeps it.

    Attributes:
      model: the serialised SentencePiece model (`vocabulary.model`) with its sentinels as pieces;
        None for bytes.
      num_pieces: ids before the sentinels: P.
      num_sentinels: sentinels at the end: E.
      file: where it was read.
      extra_ids: how many of the sentinels the file lacked.
    """

    model: bytes | None
    num_pieces: int
    num_sentinels: int
    file: str
    extra_ids: int

    @property
    def size(self) -> int:
        """How many ids there are: P + E."""
        return self.num_pieces + self.num_sentinels

    @property
    def description(self) -> dict[str, Any]:
        """What `model.json` says about it."""
        if self.model is None:
            return {"class": "ByteVocabulary", "size": self.size}
        return {
            "class": "SentencePieceVocabulary",
            "size": self.size,
            "sentencepiece_model_file": self.file,
            "extra_ids": self.extra_ids,
        }


# ---- reading -------------------------------------------------------------------------------------


def read_vocabulary(file: str) -> ForeignVocabulary:
    """What `--vocabulary=` names: a SentencePiece model file, or "bytes" (ByT5's).

    100 sentinels are added to a model that has none, as T5 does.

    Raises:
      UsageError: the file cannot be read, is no SentencePiece model, or its pad is not 0 or its eos
        not 1.
    """
    if file == BYTES:
        return _bytes(BYTES)
    proto = _read_proto(epath.Path(os.path.expanduser(file)))
    return _with_tokens(proto, {}, NUM_SENTINELS, file)


def read_tokenizer(directory: os.PathLike | str) -> ForeignVocabulary | None:
    """The vocabulary of a Hugging Face directory; None if it has none.

    Read from `spiece.model` if it is there, else from `tokenizer.json` alone. Sentinels and other
    added tokens come from the tokenizer's files; where these name none, `extra_ids` says how many
    sentinels follow the pieces, 100 by default.

    Raises:
      UsageError: it is of another type than SentencePiece's Unigram or bytes, or a file is broken.
    """
    folder = epath.Path(directory)
    config = read_object(folder / "tokenizer_config.json", optional=True)
    model_config = read_object(folder / "config.json", optional=True)
    if _BYTES_CLASS in (config.get("tokenizer_class"), model_config.get("tokenizer_class")):
        return _bytes(str(folder))
    special = read_object(folder / "special_tokens_map.json", optional=True) | config
    json_path = folder / "tokenizer.json"
    json_values = read_object(json_path, optional=True)
    added = _added_tokens(folder, config, json_values)
    for name in _MODEL_FILES:
        path = folder / name
        if path.is_file():
            extra_ids = _extra_ids(config, NUM_SENTINELS, folder)
            return _with_tokens(_read_proto(path), added, extra_ids, str(path))
    if json_values:
        try:
            proto = tokenizer_json.to_proto(json_values, _special_tokens(special))
        except UsageError as e:
            raise UsageError(f"{json_path}: {e}") from e
        return _with_tokens(proto, added, _extra_ids(config, 0, folder), str(json_path))
    for name, kind in _UNREADABLE_FILES.items():
        if (folder / name).is_file():
            raise UsageError(
                f"{folder / name} is of a {kind} tokenizer; only SentencePiece's Unigram "
                "(spiece.model or tokenizer.json) and ByT5's bytes can be read"
            )
    return None


def _bytes(file: str) -> ForeignVocabulary:
    return ForeignVocabulary(None, NUM_BYTE_IDS, 0, file, 0)


def _read_proto(path: epath.Path) -> Any:
    try:
        content = path.read_bytes()
    except OSError as e:
        reason = "it does not exist" if isinstance(e, FileNotFoundError) else e.strerror or e
        raise UsageError(
            f"the vocabulary {os.fspath(path)!r} cannot be read: {reason}; give a SentencePiece "
            f"model, or {BYTES!r}"
        ) from e
    try:
        proto = _ModelProto.FromString(content)
    except DecodeError as e:
        raise UsageError(f"{os.fspath(path)} is not a SentencePiece model") from e
    if not proto.pieces:
        raise UsageError(f"{os.fspath(path)} is not a SentencePiece model")
    return proto


def _extra_ids(config: Mapping[str, Any], default: int, folder: epath.Path) -> int:
    found = config.get("extra_ids", default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise UsageError(
            f"{folder / 'tokenizer_config.json'}: extra_ids {found!r} is not a number of sentinels"
        )
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """{"pad": "<pad>", "eos": ...}, with T5's names where the files do not say."""
    tokens = {"pad": "<pad>", "eos": "</s>"}
    for role in ("pad", "eos", "bos"):
        token = config.get(f"{role}_token")
        if isinstance(token, dict):  # an added token with its options
            token = token.get("content")
        if isinstance(token, str):
            tokens[role] = token
    return tokens


def _added_tokens(
    folder: epath.Path, config: Mapping[str, Any], json_values: Mapping[str, Any]
) -> dict[int, str]:
    """Tokens by id that were added to the pieces, from wherever the versions keep them."""
    tokens: dict[int, str] = {}
    try:
        for token, i in read_object(folder / "added_tokens.json", optional=True).items():
            tokens[int(i)] = str(token)
        for entry in json_values.get("added_tokens") or []:
            tokens[int(entry["id"])] = str(entry["content"])
        for i, entry in (config.get("added_tokens_decoder") or {}).items():
            tokens[int(i)] = str(entry["content"])
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UsageError(
            f"{folder}: the added tokens of the tokenizer cannot be read: {e!r}"
        ) from e
    return tokens


def _with_tokens(
    proto: Any, added: Mapping[int, str], extra_ids: int, file: str
) -> ForeignVocabulary:
    """The vocabulary of `proto` with the tokens added that it lacks, checked."""
    num_in_file = len(proto.pieces)
    tokens = {i: token for i, token in added.items() if i >= num_in_file}
    known = itertools.chain((p.piece for p in proto.pieces), tokens.values())
    if not any(map(tokenizer_json.SENTINEL.fullmatch, known)):
        last = num_in_file + extra_ids - 1
        sentinels = {last - i: f"<extra_id_{i}>" for i in range(extra_ids)}
        if clash := tokens.keys() & sentinels.keys():
            raise UsageError(
                f"{file}: the added token {tokens[min(clash)]!r} has id {min(clash)}, where "
                f"{extra_ids} sentinels follow the pieces; extra_ids in tokenizer_config.json says "
                "how many there are"
            )
        tokens |= sentinels
    for i in sorted(tokens):
        if i != len(proto.pieces):
            raise UsageError(
                f"{file}: the added token {tokens[i]!r} has id {i}, but the ids before it end at "
                f"{len(proto.pieces) - 1}"
            )
        sentinel = tokenizer_json.SENTINEL.fullmatch(tokens[i])
        # As seqio writes them: a sentinel stands at the start of a word.
        piece = f"▁<extra_id_{int(sentinel[1])}>" if sentinel else tokens[i]
        proto.pieces.add(piece=piece, score=0.0, type=_ModelProto.SentencePiece.USER_DEFINED)
    return _checked(proto, file, num_in_file)


def _checked(proto: Any, file: str, num_in_file: int) -> ForeignVocabulary:
    """A vocabulary that SentencePiece itself takes."""
    content = proto.SerializeToString()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as e:
        # "Internal: ...model_interface.cc(N) [condition] Explanation."
        reason = " ".join(str(e).rpartition("] ")[2].split()) or "SentencePiece refuses it"
        raise UsageError(f"{file} is not a usable SentencePiece model: {reason}") from e
    if processor.pad_id() != 0 or processor.eos_id() < 0:
        raise UsageError(
            f"{file} has pad id {processor.pad_id()} and eos id {processor.eos_id()}; pad must be "
            "0 and there must be an eos"
        )
    if processor.eos_id() != 1:
        raise UsageError(f"{file}: its end mark is id {processor.eos_id()}; T5's is 1")
    size = len(proto.pieces)
    num_sentinels = _num_sentinels(proto)
    num_pieces = size - num_sentinels
    extra_ids = max(0, size - max(num_in_file, num_pieces))
    return ForeignVocabulary(content, num_pieces, num_sentinels, file, extra_ids)


def _num_sentinels(proto: Any) -> int:
    """How many pieces at the end are sentinels."""
    from_last = (p.piece for p in reversed(proto.pieces))
    return sum(1 for _ in itertools.takewhile(tokenizer_json.SENTINEL.fullmatch, from_last))


# ---- checking ------------------------------------------------------------------------------------


def check_size(vocabulary: ForeignVocabulary, rows: int) -> ForeignVocabulary:
    """The vocabulary as a model with `rows` rows of embedding has it (this module's rule).

    Returns:
      The same one, or one without sentinels where there are as many rows as pieces.

    Raises:
      UsageError: the vocabulary does not belong to that model.
    """
    pieces, sentinels = vocabulary.num_pieces, vocabulary.num_sentinels
    size = vocabulary.size
    if rows > _MAX_ROWS_PER_ID * size and rows - size > _MAX_PADDING:
        raise UsageError(
            f"{vocabulary.file} has {size} ids, but the model's embedding has {rows} rows, too "
            "many to be padding; it is that of a larger vocabulary"
        )
    if size <= rows:
        return vocabulary
    if rows == pieces and vocabulary.model is not None:
        proto = _ModelProto.FromString(vocabulary.model)
        del proto.pieces[pieces:]
        return _checked(proto, vocabulary.file, pieces)
    bare = f", or exactly {pieces} without sentinels" if sentinels else ""
    raise UsageError(
        f"{vocabulary.file} has {pieces} pieces and {sentinels} sentinels, but the model's "
        f"embedding has {rows} rows; it is that of another vocabulary: this one needs "
        f"{size} rows or more{bare}"
    )


def same_vocabulary(a: bytes | None, b: bytes | None) -> bool:
    """Whether two serialised SentencePiece models (None: bytes) give the same ids for every text.

    Pieces, scores, types, normalisation, the algorithm and byte fallback count; how the model was
    trained does not, which a tokenizer.json does not keep.
    """
    if a == b:
        return True
    if a is None or b is None:
        return False
    try:
        return _meaning(_ModelProto.FromString(a)) == _meaning(_ModelProto.FromString(b))
    except DecodeError:  # one that is no model is no other's equal
        return False


def _meaning(proto: Any) -> tuple[Any, ...]:
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    return (
        [(p.piece, p.score, p.type) for p in proto.pieces],
        normalizer.precompiled_charsmap,
        normalizer.add_dummy_prefix,
        normalizer.remove_extra_whitespaces,
        normalizer.escape_whitespaces,
        trainer.model_type,
        trainer.byte_fallback,
        trainer.treat_whitespace_as_suffix,
    )


# ---- writing -------------------------------------------------------------------------------------


def tokenizer_files(model: bytes | None, rows: int) -> dict[str, bytes]:
    """The files, by name, from which `AutoTokenizer` gives our ids with the end mark.

    The tokenizer is of the class that follows `tokenizer.json` to the letter: transformers' own
    T5Tokenizer puts a space after every sentinel and knows no byte fallback. `spiece.model`, for
    programs that read SentencePiece, is without the sentinels that T5's tokenizers add themselves.

    Args:
      model: `vocabulary.model` of a MODEL_DIR; None for bytes.
      rows: of the model's embedding.

    Raises:
      UsageError: the vocabulary is of another algorithm than Unigram, or has more ids than rows.
    """
    if model is None:
        return _byte_tokenizer_files(rows)
    proto = _ModelProto.FromString(model)
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
        raise UsageError(f"the vocabulary is a {kind} model; Hugging Face's T5 has Unigram ones")
    if len(proto.pieces) > rows:
        raise UsageError(f"the vocabulary has {len(proto.pieces)} ids, the model {rows} rows")
    values = tokenizer_json.from_proto(proto)
    num_sentinels = _num_sentinels(proto)
    bare = _ModelProto.FromString(model)
    del bare.pieces[len(proto.pieces) - num_sentinels :]
    again = _with_tokens(_ModelProto.FromString(bare.SerializeToString()), {}, num_sentinels, "")
    if again.model != model:  # sentinels of another kind than T5's: they stay in the file
        bare, num_sentinels = proto, 0
    special = _special_tokens_map(proto, num_sentinels)
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_ids": num_sentinels,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    return {
        "spiece.model": bare.SerializeToString(),
        "tokenizer.json": json.dumps(values, ensure_ascii=False).encode(),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }


def _byte_tokenizer_files(rows: int) -> dict[str, bytes]:
    # Hugging Face's sentinels are ids of their own after the bytes, which ByT5 was not trained on.
    extra_ids = min(_NUM_HF_BYTE_SENTINELS, rows - NUM_BYTE_IDS)
    special = _special_tokens_map(None, extra_ids)
    config = {**special, "tokenizer_class": _BYTES_CLASS, "extra_ids": extra_ids}
    return {"tokenizer_config.json": _json(config), "special_tokens_map.json": _json(special)}


def _special_tokens_map(proto: Any, num_sentinels: int) -> dict[str, Any]:
    spec = proto.trainer_spec if proto else _ModelProto().trainer_spec
    return {
        "eos_token": spec.eos_piece,
        "pad_token": spec.pad_piece,
        "unk_token": spec.unk_piece,
        "additional_special_tokens": [f"<extra_id_{i}>" for i in range(num_sentinels)],
    }


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
