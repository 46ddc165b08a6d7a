"""The verb `vocab`: a vocabulary from a task's own text, in T5's layout."""

import re

import pytest
import sentencepiece
import seqio
import tensorflow as tf

from t5x_lite import vocab
from t5x_lite.errors import UsageError
from t5x_lite.run_config import DataConfig
from tasks import python_docs, registration, sources, vocabularies

LENGTHS = {"inputs": 64, "targets": 32}


def _documents(split):
    return [text for text in python_docs.documents(split) if "class" in text][:40]


def _pairs(split, shuffle_files, seed=None):
    del shuffle_files, seed
    questions = [f"Which colour has the {thing}?" for thing in ("sky", "grass", "snow")]
    pairs = {"inputs": questions, "targets": ["blue", "green", "white"]}
    return tf.data.Dataset.from_tensor_slices(pairs).repeat(20)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Documents for the default vocabulary, which is missing, and pairs without validation."""
    source = sources.RecordsSource(
        ["train", "validation"], lambda split: [{"text": t} for t in _documents(split)], ["text"]
    )
    names = registration.register_objectives("test_vocab", source, vocabularies.DEFAULT)
    feature = seqio.Feature(vocabularies.DEFAULT)
    seqio.TaskRegistry.add(
        "test_vocab_pairs",
        source=seqio.FunctionDataSource(_pairs, splits=["train"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
    )
    yield
    for name in [*names, "test_vocab_pairs"]:
        seqio.TaskRegistry.remove(name)


@pytest.fixture(autouse=True)
def missing_default(tmp_path):
    """The vocabulary that the tasks have does not exist yet, which must not matter."""
    before = vocabularies.DEFAULT.file
    yield str(tmp_path / "absent.model")
    vocabularies.set_default_file(before)


def _train(name, output, missing_default, **options) -> None:
    config = DataConfig(name, LENGTHS, batch_size=1, vocabulary_file=missing_default)
    vocab.train_vocabulary(config, str(output), **{"vocab_size": 1000} | options)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "new" / "trained.model"


def test_vocabulary_of_a_tasks_text(output, missing_default, capsys):
    _train("test_vocab_span_corruption", output, missing_default)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(output))
    assert len(pieces) == 900
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id()) == (0, 1, 2, -1)
    assert "▁class" in [pieces.IdToPiece(i) for i in range(900)]
    # As T5's is read: 100 sentinels after the pieces.
    as_t5 = seqio.SentencePieceVocabulary(str(output), extra_ids=100)
    assert as_t5.vocab_size == 1000
    assert as_t5.encode("<extra_id_0> <extra_id_99>") == [999, 900]

    out = capsys.readouterr().out
    texts = _documents("validation")
    num_tokens = sum(len(pieces.encode(text)) for text in texts)
    num_words = sum(len(text.split()) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert f"{len(texts)} texts of split 'validation' ({num_bytes:,} bytes)" in out
    assert f"{num_tokens / num_words:.3f} tokens per word" in out
    assert f"{num_tokens / num_bytes:.3f} tokens per byte" in out
    assert "900 - 999: sentinels" in out
    assert f"--gin.VOCABULARY_FILE=\"'{output}'\" --gin.T5Config.vocab_size=1024" in out
    for i, piece in re.findall(r"^ +(\d+)  (\S+)$", out, re.MULTILINE):
        assert pieces.IdToPiece(int(i)) == piece


def test_same_text_same_file(output, missing_default, tmp_path):
    for path in (output, tmp_path / "again.model"):
        _train("test_vocab_prefix_lm", path, missing_default, vocab_size=500)
    assert output.read_bytes() == (tmp_path / "again.model").read_bytes()


def test_inputs_and_targets_of_a_supervised_task(output, missing_default, capsys):
    _train("test_vocab_pairs", output, missing_default, vocab_size=128)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(output))
    for word in ("colour", "blue", "green", "white"):
        assert pieces.unk_id() not in pieces.encode(word)
    out = capsys.readouterr().out
    assert "on 120 texts" in out
    assert "On 120 texts of split 'train'" in out  # there is no validation


def test_max_examples(output, missing_default, capsys):
    _train("test_vocab_full_lm", output, missing_default, vocab_size=300, max_examples=7)
    assert "on 7 texts" in capsys.readouterr().out


def test_another_number_of_sentinels_is_in_the_file(output, missing_default):
    _train("test_vocab_full_lm", output, missing_default, num_sentinels=300)
    vocabulary = vocabularies.load(str(output))
    assert vocabulary.vocab_size == 1000
    assert vocabularies.num_sentinels(vocabulary) == 300
    ids = vocabulary.encode("The <extra_id_0> class <extra_id_299>")
    assert [i for i in ids if i >= 700] == [999, 700]
    assert vocabulary.decode(ids) == "The <extra_id_0> class <extra_id_299>"


def test_byte_fallback_and_bpe(output, missing_default):
    options = {"byte_fallback": True, "model_type": "bpe"}
    _train("test_vocab_full_lm", output, missing_default, **options)
    vocabulary = vocabularies.load(str(output))
    text = "漢字 ☃"
    assert vocabulary.unk_id not in vocabulary.encode(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_task_with_its_own_vocabulary_is_told(output, missing_default, capsys):
    _train("python_docs_full_lm", output, missing_default, vocab_size=400, max_examples=40)
    out = capsys.readouterr().out
    assert "python_docs_full_lm itself keeps the vocabulary that it has for targets" in out


def test_existing_file_is_kept(output, missing_default):
    output.parent.mkdir()
    output.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"trained\.model exists already"):
        _train("test_vocab_full_lm", output, missing_default)
    assert output.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_vocab", {}, "'test_vocab' is not registered"),
        ("test_vocab_pairs", {"vocab_size": 32000}, r"31900.*enough for 1\d\d at most"),
        ("test_vocab_full_lm", {"vocab_size": 100}, "no room for text"),
        ("test_vocab_full_lm", {"num_sentinels": 0}, "num_sentinels=0"),
        ("test_vocab_full_lm", {"max_examples": 0}, "max_examples=0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(output, missing_default, name, options, message):
    with pytest.raises(UsageError, match=message) as error:
        _train(name, output, missing_default, **options)
    assert "\n" not in str(error.value)
    assert not output.exists()


def test_output_that_cannot_be_written(tmp_path, missing_default):
    """Seen before the training: this text would not do for the size."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        _train("test_vocab_pairs", tmp_path / "file" / "x.model", missing_default)
