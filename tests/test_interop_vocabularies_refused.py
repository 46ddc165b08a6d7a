"""Vocabularies that are refused, each with one line."""

import pytest
from vocabulary_files import make_folder, stock_json, train

from t5x_lite.errors import UsageError
from t5x_lite.interop import vocabularies


@pytest.fixture(scope="module")
def trained() -> bytes:
    return train()


def _refusal(function, *arguments) -> str:
    with pytest.raises(UsageError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("spiece.model", b"", "spiece.model is not a SentencePiece model"),
        ("spiece.model", b"not a model", "spiece.model is not a SentencePiece model"),
        ("tokenizer.json", b"{", "tokenizer.json is no valid JSON"),
        ("tokenizer.json", b"\xff", "tokenizer.json is no valid JSON"),
        ("tokenizer.json", [], "must be a JSON object, not a list"),
        ("tokenizer.json", {"version": "1.0"}, "'model' is missing"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, "type 'BPE'; only Unigram"),
        ("tokenizer.json", {"model": {"type": "WordPiece"}}, "type 'WordPiece'; only Unigram"),
        ("tokenizer.json", {"model": {"merges": []}}, "type 'BPE'; only Unigram"),
        ("vocab.txt", b"[PAD]\n", "vocab.txt is of a WordPiece tokenizer"),
        ("merges.txt", b"a b\n", "merges.txt is of a BPE tokenizer"),
    ],
)
def test_directories_that_cannot_be_read(tmp_path, name, content, expected):
    folder = make_folder(tmp_path, {name: content})
    message = _refusal(vocabularies.read_tokenizer, folder)
    assert expected in message and str(folder / name) in message


def _set(path: str, value):
    """A change of one value of a tokenizer.json: "model/vocab/7/0" names a place in it."""

    def change(values):
        *parents, last = (int(p) if p.isdecimal() else p for p in path.split("/"))
        for parent in parents:
            values = values[parent]
        values[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_set("model/unk_id", None), "unk_id None is none of the 600 pieces"),
        (_set("model/unk_id", 600), "unk_id 600"),
        (_set("model/vocab/7", ["x"]), "not the tokenizer.json of a Unigram vocabulary"),
        (_set("model/vocab/7/1", "high"), "could not convert string to float"),
        (_set("model/vocab/7/0", "."), "already defined"),
        (_set("model/vocab/0/0", "[PAD]"), "pad id -1"),
        (
            _set("normalizer", {"type": "Lowercase"}),
            "normalizer has the step {'type': 'Lowercase'}",
        ),
        (_set("normalizer/precompiled_charsmap", "%"), "not the tokenizer.json of a Unigram"),
        (
            _set("normalizer/precompiled_charsmap", "Z2FyYmFnZQ=="),
            "not a usable SentencePiece model",
        ),
        (
            _set("pre_tokenizer", {"type": "Digits"}),
            "pre-tokenizer has the step {'type': 'Digits'}",
        ),
        (_set("added_tokens/0", {"id": 0}), "added tokens of the tokenizer cannot be read"),
        (_set("added_tokens/0/id", 700), "'<pad>' has id 700, but the ids before it end at 599"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tokenizer_json_that_is_broken(trained, tmp_path, change, expected):
    values = stock_json(trained)
    assert "." in [piece for piece, _ in values["model"]["vocab"]]
    change(values)
    folder = make_folder(tmp_path, {"tokenizer.json": values})
    message = _refusal(vocabularies.read_tokenizer, folder)
    assert expected in message and str(folder) in message


@pytest.mark.parametrize("extra_ids", [-1, "100", True, None])
def test_extra_ids_that_are_no_number(trained, tmp_path, extra_ids):
    files = {"spiece.model": trained, "tokenizer_config.json": {"extra_ids": extra_ids}}
    message = _refusal(vocabularies.read_tokenizer, make_folder(tmp_path, files))
    assert f"extra_ids {extra_ids!r}" in message


def test_an_added_token_where_sentinels_belong(trained, tmp_path):
    folder = make_folder(tmp_path, {"spiece.model": trained, "added_tokens.json": {"<sep>": 500}})
    message = _refusal(vocabularies.read_tokenizer, folder)
    assert "'<sep>' has id 500, where 100 sentinels follow the pieces" in message
    make_folder(tmp_path, {"tokenizer_config.json": {"extra_ids": 0}})
    assert vocabularies.read_tokenizer(folder).size == 501


def test_files_that_are_no_vocabulary(tmp_path):
    absent = str(tmp_path / "absent.model")
    assert "does not exist" in _refusal(vocabularies.read_vocabulary, absent)
    assert "'bytes'" in _refusal(vocabularies.read_vocabulary, absent)
    directory = _refusal(vocabularies.read_vocabulary, str(tmp_path))
    assert "cannot be read" in directory and str(tmp_path) in directory


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2}, "pad id -1"),
        ({"eos_id": -1, "unk_id": 1}, "eos id -1"),
        ({"bos_id": 1, "eos_id": 2, "unk_id": 3}, "its end mark is id 2; T5's is 1"),
    ],
)
def test_special_ids_that_are_not_t5s(tmp_path, ids, expected):
    """Decoding ends at id 1, and padding is 0."""
    folder = make_folder(tmp_path, {"spiece.model": train(**ids)})
    file = str(folder / "spiece.model")
    for message in (
        _refusal(vocabularies.read_vocabulary, file),
        _refusal(vocabularies.read_tokenizer, folder),
    ):
        assert file in message and expected in message


def test_tokenizer_json_with_another_end_mark(trained, tmp_path):
    values = stock_json(trained)
    special = {"eos_token": values["model"]["vocab"][5][0]}
    folder = make_folder(tmp_path, {"tokenizer.json": values, "tokenizer_config.json": special})
    assert "its end mark is id 5; T5's is 1" in _refusal(vocabularies.read_tokenizer, folder)
