"""Hugging Face's `tokenizer.json` of a Unigram vocabulary, from and to a SentencePiece model.

Both hold pieces with scores, SentencePiece's own table of normalisation, and rules for spaces. The
tokenizers library spells the latter out as steps of a normalizer and a pre-tokenizer; its trees of
those that SentencePiece can follow are known here, others are refused.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from t5x_lite.errors import UsageError

SENTINEL = re.compile("▁?<extra_id_([0-9]+)>")

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPACE = "▁"  # what stands for a space in pieces

# protobuf makes its classes when it is imported, which type checkers cannot follow.
_ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
_Piece: Any = _ModelProto.SentencePiece


class _Spaces(NamedTuple):
    """SentencePiece's normalisation, as the steps of a tokenizer.json say it."""

    charsmap: bytes = b""
    is_prefixed: bool = False  # a word at the start of a text has a space before it
    is_squeezed: bool = False  # of a run of spaces one is kept, at the ends of a text none


# ---- reading -------------------------------------------------------------------------------------


def to_proto(values: Mapping[str, Any], special_tokens: Mapping[str, str]) -> Any:
    """The SentencePiece ModelProto of a tokenizer.json, without the tokens added after its model.

    Args:
      values: the file's.
      special_tokens: text of the tokens that are never read from text: "pad" and "eos".

    Raises:
      UsageError: it is not a Unigram, has a step that SentencePiece has not, or is broken.
    """
    try:
        model = values["model"]
        kind = model.get("type", "BPE" if "merges" in model else "Unigram")
        if kind != "Unigram":
            raise UsageError(
                f"the tokenizer is of type {kind!r}; only Unigram (SentencePiece's) can be read"
            )
        spaces = _read_spaces(values)
        proto = _ModelProto()
        _fill_pieces(proto, model, special_tokens, _contents(values))
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as e:
        if isinstance(e, UsageError):
            raise
        what = f"{e} is missing" if isinstance(e, KeyError) else " ".join(str(e).split())
        raise UsageError(f"not the tokenizer.json of a Unigram vocabulary: {what}") from e
    normalizer = proto.normalizer_spec
    normalizer.name = "user_defined" if spaces.charsmap else "identity"
    normalizer.precompiled_charsmap = spaces.charsmap
    normalizer.add_dummy_prefix = spaces.is_prefixed
    normalizer.remove_extra_whitespaces = spaces.is_squeezed
    normalizer.escape_whitespaces = True
    return proto


def _contents(values: Mapping[str, Any]) -> set[str]:
    return {entry["content"] for entry in values.get("added_tokens") or []}


def _fill_pieces(
    proto: Any, model: Mapping[str, Any], special_tokens: Mapping[str, str], added: set[str]
) -> None:
    vocab, unk_id = model["vocab"], model["unk_id"]
    if not isinstance(unk_id, int) or not 0 <= unk_id < len(vocab):
        raise UsageError(f"unk_id {unk_id!r} is none of the {len(vocab)} pieces")
    has_bytes = bool(model.get("byte_fallback"))
    ids: dict[str, int] = {}
    for i, (piece, score) in enumerate(vocab):
        kind = _Piece.NORMAL
        if i == unk_id:
            kind = _Piece.UNKNOWN
        elif piece in special_tokens.values():
            kind = _Piece.CONTROL
        elif has_bytes and _BYTE.fullmatch(piece):
            kind = _Piece.BYTE
        elif match := SENTINEL.fullmatch(piece):
            # As seqio writes them: a sentinel stands at the start of a word.
            piece, kind = f"{_SPACE}<extra_id_{int(match[1])}>", _Piece.USER_DEFINED
        elif piece in added:
            kind = _Piece.USER_DEFINED
        proto.pieces.add(piece=piece, score=float(score), type=kind)
        ids.setdefault(piece, i)
    trainer = proto.trainer_spec
    trainer.model_type = trainer.UNIGRAM
    trainer.vocab_size = len(vocab)
    trainer.byte_fallback = has_bytes
    trainer.unk_id, trainer.unk_piece = unk_id, vocab[unk_id][0]
    trainer.bos_id = -1
    trainer.pad_piece, trainer.eos_piece = special_tokens["pad"], special_tokens["eos"]
    trainer.pad_id = ids.get(trainer.pad_piece, -1)
    trainer.eos_id = ids.get(trainer.eos_piece, -1)


def _read_spaces(values: Mapping[str, Any]) -> _Spaces:
    spaces = _Spaces()
    for step in _steps(values.get("normalizer"), "normalizers"):
        spaces = _after_normalizer(spaces, step)
    for step in _steps(values.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "WhitespaceSplit":
            spaces = spaces._replace(is_squeezed=True)
        elif step["type"] == "Metaspace" and step.get("replacement", _SPACE) == _SPACE:
            scheme = step.get("prepend_scheme", "always")
            is_prefixed = scheme != "never" and step.get("add_prefix_space", True)
            spaces = spaces._replace(is_prefixed=is_prefixed)
        else:
            raise _unknown("pre-tokenizer", step)
    return spaces


def _steps(tree: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    if tree is None:
        return []
    if tree["type"] != "Sequence":
        return [tree]
    return [step for member in tree[members] for step in _steps(member, members)]


def _after_normalizer(spaces: _Spaces, step: Mapping[str, Any]) -> _Spaces:
    kind = step["type"]
    if kind == "NFC" and spaces == _Spaces():  # of ours, see `_normalizer`
        return spaces
    if kind == "Precompiled" and spaces == _Spaces():  # SentencePiece applies it first
        charsmap = base64.b64decode(step["precompiled_charsmap"] or "", validate=True)
        return spaces._replace(charsmap=charsmap)
    if kind == "Prepend" and step["prepend"] == _SPACE:
        return spaces._replace(is_prefixed=True)
    if kind == "Strip":
        return spaces._replace(is_squeezed=True)
    if kind == "Replace":
        pattern, content = step["pattern"], step["content"]
        if pattern == {"String": " "} and content == _SPACE:
            return spaces
        squeezes = pattern == {"Regex": " {2,}"} and content in (" ", _SPACE)
        strips = pattern.get("Regex") in (r" +\z", " +$") and content == ""
        if squeezes or strips:
            return spaces._replace(is_squeezed=True)
    raise _unknown("normalizer", step)


def _unknown(part: str, step: Mapping[str, Any]) -> UsageError:
    described = str(dict(step))
    if len(described) > 100:
        described = repr(step["type"])
    return UsageError(f"the {part} has the step {described}, which SentencePiece cannot follow")


# ---- writing -------------------------------------------------------------------------------------


def from_proto(proto: Any) -> dict[str, Any]:
    """The tokenizer.json that gives SentencePiece's ids, with the end mark.

    The ids differ, as the libraries do, in text that spells out a special token ("</s>", or a
    sentinel inside a word: SentencePiece reads the former as text and finds sentinels at the start
    of words only) or, with byte fallback, a byte ("<0x0A>"); that has accents stacked up on a
    letter, or "▁" itself; and in runs as of "-------", whose divisions have all the same score. A
    vocabulary with another treatment of spaces than SentencePiece's default also differs where a
    text begins with a space.
    """
    eos = proto.trainer_spec.eos_piece
    pieces = [(token_text(p.piece), p) for p in proto.pieces]
    ids = {text: i for i, (text, _) in enumerate(pieces)}
    is_normal = (_Piece.NORMAL, _Piece.UNUSED, _Piece.BYTE)
    added = [
        _added_token(i, text, is_special=p.type != _Piece.USER_DEFINED or text != p.piece)
        for i, (text, p) in enumerate(pieces)
        if p.type not in is_normal
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(proto.normalizer_spec),
        # A word after a sentinel in the middle of a text has a space of its own, or none.
        "pre_tokenizer": _metaspace(proto.normalizer_spec),
        "post_processor": _append(eos, ids[eos]),
        "decoder": _decoder(proto),
        "model": {
            "type": "Unigram",
            "unk_id": next(i for i, (_, p) in enumerate(pieces) if p.type == _Piece.UNKNOWN),
            "vocab": [[text, p.score] for text, p in pieces],
            "byte_fallback": proto.trainer_spec.byte_fallback,
        },
    }


def token_text(piece: str) -> str:
    """The piece as Hugging Face writes it: a sentinel without the mark of a word's start."""
    return piece.removeprefix(_SPACE) if SENTINEL.fullmatch(piece) else piece


def _added_token(i: int, text: str, *, is_special: bool) -> dict[str, Any]:
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **options, "special": is_special}


def _normalizer(spec: Any) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        # The tokenizers library looks up single characters and letters with one accent. What
        # SentencePiece composes of more, Korean syllables for one, has to be composed before.
        if _composes(spec):
            steps.append({"type": "NFC"})
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        for pattern, content in ((r" +\z", ""), (" {2,}", " ")):
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _composes(spec: Any) -> bool:
    normalizer = sentencepiece.SentencePieceNormalizer(
        model_proto=_ModelProto(normalizer_spec=spec).SerializeToString()
    )
    return "\ud55c" in normalizer.Normalize("\u1112\u1161\u11ab")


def _metaspace(spec: Any) -> dict[str, Any]:
    scheme = "first" if spec.add_dummy_prefix else "never"
    return {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": scheme,
        "split": True,
    }


def _decoder(proto: Any) -> dict[str, Any]:
    metaspace = _metaspace(proto.normalizer_spec)
    if not proto.trainer_spec.byte_fallback:
        return metaspace
    return {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]}


def _append(token: str, i: int) -> dict[str, Any]:
    end = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, end, second, end],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }
