"""Vocabularies and tokenizer files as other programs make them."""

import base64
import io
import itertools
import json
import re
from pydoc_data.topics import topics

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

ModelProto = sentencepiece_model_pb2.ModelProto
USER_DEFINED = ModelProto.SentencePiece.USER_DEFINED
# "-----" has several divisions of one score: which is taken hangs on the rounding of a library.
TEXTS = [re.sub(r"([-*])\1+", r"\1", text) for _, text in sorted(topics.items())][:20]
# What spaces, Unicode and marks of its own do to a tokenizer, each one once.
HARD_TEXTS = [
    *("", " ", "a", "  two  spaces ", "tab\tand\nline\r\nends", "no\u00a0break\u3000wide"),
    *(
        "ﬁne ½ Å Ⅷ ﷺ",
        "cafe\u0301 café",
        "\u1112\u1161\u11ab\u1100\u116e\u11a8 한국",
        "漢字 かな🙂🇩🇪",
    ),
    *("\x00\x1f\x7f\u200b\ufeff", "<0x0 <unk", "Việt Nam đường phố", "ẋ̣ q̣̇"),
    *(
        "Thank you <extra_id_0> me to your party <extra_id_1> week.",
        "<extra_id_99>ly <extra_id_7>.",
    ),
]


def train(**options) -> bytes:
    model = io.BytesIO()
    options = {"vocab_size": 500, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain.from_iterable(map(str.splitlines, TEXTS)),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


def make_processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def as_seqio(model: bytes, num_sentinels: int) -> bytes:
    """What `seqio.SentencePieceVocabulary` does with a file and its extra_ids."""
    proto = ModelProto.FromString(model)
    for i in reversed(range(num_sentinels)):
        proto.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=USER_DEFINED)
    return proto.SerializeToString()


def stock_json(model: bytes, num_sentinels: int = 100) -> dict:
    """The tokenizer.json that transformers 4 and 5 save of a T5 tokenizer."""
    proto = ModelProto.FromString(model)
    names = [f"<extra_id_{i}>" for i in reversed(range(num_sentinels))]
    vocab = [[p.piece, p.score] for p in proto.pieces] + [[name, 0.0] for name in names]
    charsmap = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ids = [0, 1, 2, *range(len(vocab) - num_sentinels, len(vocab))]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": vocab[i][0], **options, "special": True} for i in ids
        ],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace],
        },
        "post_processor": None,
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False},
    }


def make_folder(path, files: dict):
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        (path / name).write_bytes(content)
    return path
