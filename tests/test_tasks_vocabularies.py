"""Vocabularies: lazy, checked, and trained as T5 has them."""

import pathlib
from pydoc_data.topics import topics

import numpy as np
import pytest
import sentencepiece
import seqio

from t5x_lite.errors import UsageError
from tasks import vocabularies

TEXTS = [text for _, text in sorted(topics.items())][:20]


@pytest.fixture
def default_file():
    """Sets the default vocabulary for one test."""
    before = vocabularies.DEFAULT.file
    yield vocabularies.set_default_file
    vocabularies.set_default_file(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("vocabulary") / "trained.model"
    path.write_bytes(vocabularies.train_sentencepiece(TEXTS, vocab_size=400))
    return str(path)


def test_default_is_t5s_name():
    assert vocabularies.DEFAULT.file == (
        "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
    )


def test_t5_vocabulary(shared_data, default_file):
    file = str(shared_data / "vocabs" / "t5_sentencepiece_32000.model")
    default_file(file)
    lazy, plain = vocabularies.DEFAULT, seqio.SentencePieceVocabulary(file, extra_ids=100)
    assert lazy.vocab_size == 32100
    assert (lazy.pad_id, lazy.eos_id, lazy.unk_id, lazy.extra_ids) == (0, 1, 2, 100)
    text = "An <extra_id_0> of <extra_id_17> text."
    ids = plain.encode(text)
    assert lazy.encode(text) == ids
    assert lazy.encode_tf(text).numpy().tolist() == ids
    assert lazy.decode(ids) == plain.decode(ids) == text
    assert lazy.decode_tf(np.array(ids, np.int32)).numpy().decode() == text
    assert lazy == plain
    assert [vocabularies.sentinel_id(lazy, i) for i in (0, 17, 99)] == [32099, 32082, 32000]
    assert ids[1] == 32099


def test_setting_the_file_reads_nothing(default_file, tmp_path):
    default_file(str(tmp_path / "absent.model"))
    assert vocabularies.DEFAULT == vocabularies.DEFAULT


def test_bytes_are_byt5s(default_file):
    """259 ids, the last of which are sentinels only where spans were taken out."""
    default_file("bytes")
    vocabulary = vocabularies.DEFAULT
    text = "ÿ € 漢字 \U0010ffff"
    ids = vocabulary.encode(text)
    assert ids == [3 + byte for byte in text.encode()]
    assert vocabulary.decode(ids) == vocabularies.decode_with_sentinels(vocabulary, ids) == text
    assert vocabulary.vocab_size == 259
    # As in the example of transformers' ByT5 page.
    assert [vocabularies.sentinel_id(vocabulary, i) for i in (0, 1, 99)] == [258, 257, 159]
    assert vocabularies.num_sentinels(vocabulary) == 100


def test_byte_sentinels_that_no_text_has(default_file):
    default_file("bytes")
    vocabulary = vocabularies.DEFAULT
    in_text = {3 + byte for i in (*range(0xD800), *range(0xE000, 0x110000)) for byte in _utf8(i)}
    mask = vocabularies.text_token_mask(vocabulary)
    assert mask[list(in_text)].all()
    # 0xC0 and 0xC1 are not in UTF-8 either, but are sentinels 62 and 63.
    assert set(np.flatnonzero(~mask)) == set(range(259)) - in_text - {2, 3 + 0xC0, 3 + 0xC1}
    one, two = vocabulary.encode("one"), vocabulary.encode("two")
    ids = [*one, 258, *two, 248, *one, 1, 0]
    shown = vocabularies.decode_with_sentinels(vocabulary, ids)
    assert shown == "one <extra_id_0> two <extra_id_10> one"


def _utf8(code_point: int) -> bytes:
    return chr(code_point).encode()


def test_bytes_of_a_task_with_sentinels_of_its_own():
    vocabulary = seqio.ByteVocabulary(extra_ids=100)
    assert vocabularies.sentinel_id(vocabulary, 0) == 358
    assert np.flatnonzero(~vocabularies.text_token_mask(vocabulary)).tolist() == [
        *(0, 1),
        *range(259, 359),
    ]


def test_a_runs_own_copy_is_complete(tmp_path, trained):
    """A model that knows no sentinels keeps a vocabulary without them."""
    for folder, size in ((tmp_path / "run", 300), (tmp_path / "elsewhere", 400)):
        folder.mkdir()
        (folder / "vocabulary.model").write_bytes(pathlib.Path(trained).read_bytes())
        if size == 300:
            (folder / "model.json").write_text("{}")
        assert vocabularies.load(str(folder / "vocabulary.model")).vocab_size == size


def test_training_places_ids_and_sentinels_as_t5(trained):
    pieces = sentencepiece.SentencePieceProcessor(model_file=trained)
    assert len(pieces) == 300  # and 100 sentinels that are added on reading, as T5 does
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id()) == (0, 1, 2, -1)
    vocabulary = vocabularies.load(trained)
    assert vocabulary.vocab_size == 400
    for i in (0, 1, 99):
        (sentinel,) = vocabulary.encode(f"<extra_id_{i}>")
        assert sentinel == vocabularies.sentinel_id(vocabulary, i) == 399 - i
        assert vocabulary.decode([sentinel]) == f"<extra_id_{i}>"
    assert vocabulary.decode(vocabulary.encode("The class statement")) == "The class statement"
    with pytest.raises(IndexError):
        vocabularies.sentinel_id(vocabulary, 100)


def test_training_is_deterministic(trained):
    with open(trained, "rb") as f:
        assert f.read() == vocabularies.train_sentencepiece(iter(TEXTS), vocab_size=400)


def test_sentinels_inside_the_model_are_not_added_again(tmp_path, trained):
    """mT5's model has its 100 extra ids among its pieces."""
    from sentencepiece import sentencepiece_model_pb2

    with open(trained, "rb") as f:
        model = sentencepiece_model_pb2.ModelProto.FromString(f.read())
    for i in reversed(range(100)):
        model.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=4)  # user defined
    path = tmp_path / "with_sentinels.model"
    path.write_bytes(model.SerializeToString())
    vocabulary = vocabularies.load(str(path))
    assert vocabulary.vocab_size == 400
    assert vocabularies.num_sentinels(vocabulary) == 100
    assert vocabulary.encode("<extra_id_0>") == [vocabularies.sentinel_id(vocabulary, 0)]
    assert vocabularies.text_token_mask(vocabulary).sum() == 298


def test_text_token_mask(trained):
    vocabulary = vocabularies.load(trained)
    mask = vocabularies.text_token_mask(vocabulary)
    assert mask.shape == (400,) and mask.dtype == bool
    assert np.flatnonzero(~mask).tolist() == [0, 1, *range(300, 400)]
    assert mask[vocabulary.encode(" ".join(TEXTS))].all()


def test_decode_with_sentinels(trained):
    vocabulary = vocabularies.load(trained)
    text = "The name <extra_id_0> of the <extra_id_1> was bound"
    ids = [*vocabulary.encode(text), 1, 0, 0]
    assert vocabularies.decode_with_sentinels(vocabulary, ids) == text
    # An embedding has more rows than the vocabulary ids; a model that says one says nothing.
    beyond = [vocabulary.vocab_size, *ids[:-3], vocabulary.vocab_size + 27]
    assert vocabularies.decode_with_sentinels(vocabulary, beyond) == text


# ---- bad input -----------------------------------------------------------------------------------


def _one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_file_is_reported_when_used(default_file, tmp_path):
    path = str(tmp_path / "absent.model")
    default_file(path)
    with pytest.raises(UsageError) as error:
        _ = vocabularies.DEFAULT.vocab_size
    message = _one_line(error)
    assert "VOCABULARY_FILE" in message and path in message and "does not exist" in message


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "broken.model"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a SentencePiece model") as error:
        vocabularies.load(str(path))
    assert str(path) in _one_line(error)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({}, "pad id -1"),
        ({"pad_id": 0, "eos_id": -1, "bos_id": -1, "unk_id": 1}, "eos id -1"),
        ({"pad_id": 0, "eos_id": 2, "bos_id": 1, "unk_id": 3}, "its end mark is id 2; T5's is 1"),
    ],
)
def test_model_with_other_special_ids(tmp_path, ids, message):
    path = tmp_path / "other.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(path.with_suffix("")),
        vocab_size=300,
        minloglevel=2,
        **ids,
    )
    with pytest.raises(UsageError, match=message) as error:
        vocabularies.load(str(path))
    _one_line(error)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 1000, "not enough text"),
        (["hello world"], 5000, r"4900 pieces and 100 sentinels.*enough for 1\d\d at most"),
        (TEXTS, 103, "no room for text"),
    ],
)
def test_training_that_cannot_be_done(texts, vocab_size, message):
    with pytest.raises(UsageError, match=message) as error:
        vocabularies.train_sentencepiece(texts, vocab_size=vocab_size)
    _one_line(error)
