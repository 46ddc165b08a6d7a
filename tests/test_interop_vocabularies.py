"""Vocabularies of Hugging Face directories: from their files to ours, and back."""

import json

import pytest
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabulary_files import (
    HARD_TEXTS,
    TEXTS,
    USER_DEFINED,
    ModelProto,
    as_seqio,
    make_folder,
    make_processor,
    stock_json,
    train,
)

from t5x_lite.errors import UsageError
from t5x_lite.interop import vocabularies


@pytest.fixture(scope="module")
def trained() -> bytes:
    return train()


@pytest.fixture(scope="module")
def trained_with_bytes() -> bytes:
    return train(byte_fallback=True)


@pytest.fixture(scope="module")
def t5_file(shared_data) -> str:
    return str(shared_data / "vocabs" / "t5_sentencepiece_32000.model")


# ---- reading a SentencePiece model ---------------------------------------------------------------


def test_t5s_file_is_as_seqio_has_it(t5_file, tmp_path):
    with_sentinels = seqio.SentencePieceVocabulary(t5_file, extra_ids=100)
    with open(t5_file, "rb") as f:
        folder = make_folder(tmp_path, {"spiece.model": f.read()})
    for found in (vocabularies.read_vocabulary(t5_file), vocabularies.read_tokenizer(folder)):
        assert found.model == with_sentinels.sp_model
        assert (found.num_pieces, found.num_sentinels, found.size) == (32000, 100, 32100)
        assert found.description == {
            "class": "SentencePieceVocabulary",
            "size": 32100,
            "sentencepiece_model_file": found.file,
            "extra_ids": 100,
        }
    without = seqio.SentencePieceVocabulary(t5_file, extra_ids=0)
    assert vocabularies.check_size(found, 32000).model == without.sp_model


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.model", "tokenizer.model"])
@pytest.mark.parametrize("num_sentinels", [None, 0, 17])
def test_extra_ids(trained, tmp_path, name, num_sentinels):
    config = {} if num_sentinels is None else {"extra_ids": num_sentinels}
    folder = make_folder(tmp_path, {name: trained, "tokenizer_config.json": config})
    found = vocabularies.read_tokenizer(folder)
    expected = 100 if num_sentinels is None else num_sentinels
    assert found.model == as_seqio(trained, expected)
    assert (found.num_pieces, found.num_sentinels, found.extra_ids) == (500, expected, expected)


def test_mt5s_sentinels_are_in_the_file(trained, tmp_path):
    model = as_seqio(trained, 100)
    (tmp_path / "mt5.model").write_bytes(model)
    folder = make_folder(
        tmp_path, {"spiece.model": model, "tokenizer_config.json": {"extra_ids": 0}}
    )
    for found in (
        vocabularies.read_vocabulary(str(tmp_path / "mt5.model")),
        vocabularies.read_tokenizer(folder),
    ):
        assert found.model == model
        assert (found.num_pieces, found.num_sentinels, found.extra_ids) == (500, 100, 0)


def test_tokens_that_someone_added(trained, tmp_path):
    """After the sentinels, in whichever file the version of transformers keeps them."""
    sentinels = {500 + 99 - i: f"<extra_id_{i}>" for i in range(100)}
    decoder = {str(i): {"content": token} for i, token in (sentinels | {600: "<sep>"}).items()}
    for files in (
        {"added_tokens.json": {"<sep>": 600}},
        {"tokenizer_config.json": {"added_tokens_decoder": decoder}},
    ):
        folder = make_folder(tmp_path / next(iter(files)), {"spiece.model": trained} | files)
        found = vocabularies.read_tokenizer(folder)
        assert (found.size, found.num_sentinels) == (601, 0)  # none at the end
        pieces = make_processor(found.model)
        assert pieces.Encode("a <extra_id_0> b<sep>")[-1] == 600
        assert pieces.IdToPiece(599) == "▁<extra_id_0>"


def test_bytes(tmp_path):
    assert vocabularies.read_tokenizer(tmp_path) is None
    in_config = make_folder(
        tmp_path / "a", {"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}}
    )
    in_model = make_folder(tmp_path / "b", {"config.json": {"tokenizer_class": "ByT5Tokenizer"}})
    for found in (
        vocabularies.read_vocabulary("bytes"),
        vocabularies.read_tokenizer(in_config),
        vocabularies.read_tokenizer(in_model),
    ):
        assert (found.model, found.num_pieces, found.num_sentinels) == (None, 259, 0)
        assert found.description == {"class": "ByteVocabulary", "size": 259}


# ---- reading tokenizer.json alone ----------------------------------------------------------------


def test_t5s_tokenizer_json_is_t5s_vocabulary(t5_file, tmp_path):
    original = vocabularies.read_vocabulary(t5_file)
    with open(t5_file, "rb") as f:
        folder = make_folder(tmp_path, {"tokenizer.json": stock_json(f.read())})
    found = vocabularies.read_tokenizer(folder)
    assert (found.num_pieces, found.num_sentinels) == (32000, 100)
    assert vocabularies.same_vocabulary(found.model, original.model)
    ours, t5 = make_processor(found.model), make_processor(original.model)
    assert [ours.GetScore(i) for i in range(32100)] == [t5.GetScore(i) for i in range(32100)]
    for text in [*HARD_TEXTS, *TEXTS]:
        assert ours.Encode(text) == t5.Encode(text)
        assert ours.Decode(ours.Encode(text)) == t5.Decode(t5.Encode(text))


@pytest.fixture(scope="module")
def rebuilt(trained_with_bytes, tmp_path_factory):
    values = stock_json(trained_with_bytes)
    values["model"]["byte_fallback"] = True
    folder = make_folder(tmp_path_factory.mktemp("rebuilt"), {"tokenizer.json": values})
    return make_processor(vocabularies.read_tokenizer(folder).model)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_any_text_has_the_same_ids(trained_with_bytes, rebuilt, text):
    original = make_processor(as_seqio(trained_with_bytes, 100))
    ids = original.Encode(text)
    assert rebuilt.Encode(text) == ids
    assert rebuilt.Decode(ids) == original.Decode(ids)


def _replace(regex: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}


@pytest.mark.parametrize("kind", ["newer", "older", "sentinels added", "short decimals"])
def test_other_forms_of_the_same(trained, tmp_path, kind):
    values = stock_json(trained)
    metaspace = values["pre_tokenizer"]["pretokenizers"][1]
    if kind == "newer":  # transformers 4.40 and after, of tokenizers without a class of their own
        strip = {"type": "Strip", "strip_left": False, "strip_right": True}
        steps = [values["normalizer"], strip, _replace(" {2,}", "▁")]
        values["normalizer"] = {"type": "Sequence", "normalizers": steps}
        values["pre_tokenizer"] = metaspace
    elif kind == "older":
        del metaspace["prepend_scheme"], metaspace["split"]
        metaspace |= {"add_prefix_space": True, "str_rep": "▁"}
        del values["model"]["byte_fallback"]
    elif kind == "sentinels added":  # beside the model, not among its pieces
        del values["model"]["vocab"][500:]
    else:  # the shortest that names the float32
        for entry in values["model"]["vocab"]:
            entry[1] = float(f"{entry[1]:.9g}")
    found = vocabularies.read_tokenizer(make_folder(tmp_path, {"tokenizer.json": values}))
    assert vocabularies.same_vocabulary(found.model, as_seqio(trained, 100))


def test_names_of_special_tokens(trained, tmp_path):
    values = stock_json(trained)
    for i, name in enumerate(("[PAD]", "[EOS]", "[UNK]")):
        values["model"]["vocab"][i][0] = values["added_tokens"][i]["content"] = name
    special = {"pad_token": {"content": "[PAD]", "lstrip": False}, "eos_token": "[EOS]"}
    files = {"tokenizer.json": values, "special_tokens_map.json": special}
    model = vocabularies.read_tokenizer(make_folder(tmp_path, files)).model
    pieces = make_processor(model)
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) == (0, 1, 2)
    assert pieces.Encode("漢")[-1] == 2


# ---- the rule of sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [32000, 32100, 32128, 48150])
def test_sizes_that_fit(t5_file, rows):
    vocabulary = vocabularies.read_vocabulary(t5_file)
    fitted = vocabularies.check_size(vocabulary, rows)
    assert fitted.size == (32000 if rows == 32000 else 32100)
    assert (fitted is vocabulary) == (rows != 32000)
    assert make_processor(fitted.model).GetPieceSize() == fitted.size


@pytest.mark.parametrize("rows", [31999, 32001, 32099, 259])
def test_sizes_that_do_not(t5_file, rows):
    with pytest.raises(UsageError) as error:
        vocabularies.check_size(vocabularies.read_vocabulary(t5_file), rows)
    message = str(error.value)
    assert "\n" not in message
    for number in ("32000 pieces", "100 sentinels", f"{rows} rows"):
        assert number in message


def test_sizes_of_bytes():
    vocabulary = vocabularies.read_vocabulary("bytes")
    for rows in (259, 359, 384):
        assert vocabularies.check_size(vocabulary, rows) is vocabulary
    with pytest.raises(UsageError, match="258 rows"):
        vocabularies.check_size(vocabulary, 258)


def test_padding_of_a_small_vocabulary(trained):
    """To a multiple of 1,024 whatever its size, although 500 ids make not half of that."""
    vocabulary = vocabularies.ForeignVocabulary(trained, 500, 0, "small.model", 0)
    for rows in (512, 1024, 1500, 1524):
        assert vocabularies.check_size(vocabulary, rows) is vocabulary


@pytest.mark.parametrize(
    ("file", "rows", "expected"),
    [
        ("bytes", 32128, "bytes has 259 ids, but the model's embedding has 32128 rows"),
        ("t5", 250112, "has 32100 ids, but the model's embedding has 250112 rows"),
        ("t5", 48151, "has 32100 ids, but the model's embedding has 48151 rows"),
    ],
)
def test_vocabularies_far_too_small(t5_file, file, rows, expected):
    """Of another model: of 32,128 rows bytes would use 259."""
    vocabulary = vocabularies.read_vocabulary(t5_file if file == "t5" else file)
    with pytest.raises(UsageError) as error:
        vocabularies.check_size(vocabulary, rows)
    assert expected in str(error.value) and "\n" not in str(error.value)


# ---- comparing -----------------------------------------------------------------------------------


def test_same_vocabulary(trained):
    def changed(change) -> bytes:
        proto = ModelProto.FromString(trained)
        change(proto)
        return proto.SerializeToString()

    def rescored(proto):
        proto.pieces[400].score -= 1e-4

    for change in (
        rescored,
        lambda proto: setattr(proto.pieces[400], "piece", "▁another"),
        lambda proto: setattr(proto.pieces[400], "type", USER_DEFINED),
        lambda proto: proto.pieces.pop(),
        lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b""),
        lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", False),
        lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", False),
        lambda proto: setattr(proto.trainer_spec, "byte_fallback", True),
        lambda proto: setattr(proto.trainer_spec, "model_type", 2),
    ):
        assert not vocabularies.same_vocabulary(trained, changed(change))
    assert vocabularies.same_vocabulary(
        trained, changed(lambda proto: proto.trainer_spec.input.append("elsewhere.txt"))
    )
    assert vocabularies.same_vocabulary(None, None)
    assert not vocabularies.same_vocabulary(trained, None)
    assert not vocabularies.same_vocabulary(None, trained)


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_sentinels", [0, 100, 300])
def test_written_files_are_read_again(trained, tmp_path, num_sentinels):
    model = as_seqio(trained, num_sentinels)
    files = vocabularies.tokenizer_files(model, 896)
    assert files["spiece.model"] == ModelProto.FromString(trained).SerializeToString()
    assert json.loads(files["tokenizer_config.json"])["extra_ids"] == num_sentinels
    assert vocabularies.read_tokenizer(make_folder(tmp_path, files)).model == model
    alone = make_folder(tmp_path / "json", {"tokenizer.json": files["tokenizer.json"]})
    assert vocabularies.same_vocabulary(vocabularies.read_tokenizer(alone).model, model)


def test_what_is_written(trained_with_bytes):
    model = as_seqio(trained_with_bytes, 100)
    files = vocabularies.tokenizer_files(model, 600)
    assert sorted(files) == [
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads(files["tokenizer_config.json"])
    assert (config["pad_token"], config["eos_token"], config["unk_token"]) == (
        *("<pad>", "</s>", "<unk>"),
    )
    assert config["additional_special_tokens"] == [f"<extra_id_{i}>" for i in range(100)]
    values = json.loads(files["tokenizer.json"])
    assert {entry["id"]: entry["content"] for entry in values["added_tokens"]} == {
        0: "<pad>",
        1: "</s>",
        2: "<unk>",
        **{599 - i: f"<extra_id_{i}>" for i in range(100)},
    }
    assert all(entry["special"] for entry in values["added_tokens"])
    assert values["model"]["byte_fallback"] and values["model"]["unk_id"] == 2
    # Scores as SentencePiece has them, float32, to the last bit.
    pieces = make_processor(model)
    for i, (piece, score) in enumerate(values["model"]["vocab"]):
        assert piece == pieces.IdToPiece(i).replace("▁<extra", "<extra")
        assert score == pieces.GetScore(i)
    assert values["post_processor"]["single"] == [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ]


def test_sentinels_of_another_kind_stay_in_the_file(trained, tmp_path):
    """T5's tokenizers could not add these themselves."""
    proto = ModelProto.FromString(trained)
    for i in reversed(range(5)):
        proto.pieces.add(piece=f"<extra_id_{i}>", score=-1.0, type=USER_DEFINED)
    model = proto.SerializeToString()
    files = vocabularies.tokenizer_files(model, 512)
    assert files["spiece.model"] == model
    assert json.loads(files["tokenizer_config.json"])["extra_ids"] == 0
    assert vocabularies.read_tokenizer(make_folder(tmp_path, files)).model == model


def test_bytes_written(tmp_path):
    files = vocabularies.tokenizer_files(None, 384)
    assert sorted(files) == ["special_tokens_map.json", "tokenizer_config.json"]
    config = json.loads(files["tokenizer_config.json"])
    assert (config["tokenizer_class"], config["extra_ids"]) == ("ByT5Tokenizer", 125)
    found = vocabularies.read_tokenizer(make_folder(tmp_path, files))
    assert found.description == {"class": "ByteVocabulary", "size": 259}
    narrow = vocabularies.tokenizer_files(None, 259)
    assert json.loads(narrow["tokenizer_config.json"])["additional_special_tokens"] == []


def test_what_cannot_be_written(trained):
    with pytest.raises(UsageError, match="600 ids, the model 512 rows"):
        vocabularies.tokenizer_files(as_seqio(trained, 100), 512)
    with pytest.raises(UsageError, match="BPE model"):
        vocabularies.tokenizer_files(train(model_type="bpe"), 512)


# ---- against the libraries themselves, where they are installed ----------------------------------


def test_the_tokenizers_library_gives_our_ids(trained, trained_with_bytes, t5_file):
    tokenizers = pytest.importorskip("tokenizers")
    with open(t5_file, "rb") as f:
        t5 = f.read()
    for model in (t5, trained, trained_with_bytes):
        model = as_seqio(model, 100)
        files = vocabularies.tokenizer_files(model, 32128)
        theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        ours = make_processor(model)
        for text in [*HARD_TEXTS, *TEXTS]:
            ids = ours.Encode(text)
            assert theirs.encode(text).ids == [*ids, 1], text
            if 2 not in ids and "<extra" not in text:  # an unknown is "<unk>" there, " ⁇ " here
                assert theirs.decode(ids) == ours.Decode(ids)


def test_what_the_tokenizers_library_saves_is_read(trained, trained_with_bytes, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for model, has_bytes in ((trained, False), (trained_with_bytes, True)):
        values = stock_json(model)
        values["model"]["byte_fallback"] = has_bytes
        theirs = tokenizers.Tokenizer.from_str(json.dumps(values))
        theirs.save(str(tmp_path / "tokenizer.json"))
        ours = make_processor(vocabularies.read_tokenizer(tmp_path).model)
        for text in [*HARD_TEXTS[:-1], *TEXTS]:
            # Text with spans of accents apart, which SentencePiece composes and they do not.
            if "\u1112" not in text and "q̣̇" not in text:
                assert ours.Encode(text) == theirs.encode(text).ids, text


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_auto_tokenizer_gives_our_ids(trained_with_bytes, tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    model = as_seqio(trained_with_bytes, 100)
    files = vocabularies.tokenizer_files(model, 640)
    folder = make_folder(tmp_path, files | {"config.json": {"model_type": model_type}})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), make_processor(model)
    for text in [*HARD_TEXTS, *TEXTS]:
        assert theirs(text)["input_ids"] == [*ours.Encode(text), 1], text
    assert theirs.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [599, 500]
    assert theirs.decode([5, 599, 6, 1], skip_special_tokens=True) == ours.Decode([5, 6])
    assert sorted(theirs("text")) == ["attention_mask", "input_ids"]


def test_auto_tokenizer_gives_our_bytes(tmp_path):
    transformers = pytest.importorskip("transformers")
    files = vocabularies.tokenizer_files(None, 384) | {"config.json": {"model_type": "t5"}}
    theirs = transformers.AutoTokenizer.from_pretrained(make_folder(tmp_path, files))
    for text in ("", "aé 漢字", "\x00 two  spaces\n"):
        assert theirs(text)["input_ids"] == [*seqio.ByteVocabulary().encode(text), 1]
    assert len(theirs) == 384
