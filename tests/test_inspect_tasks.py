"""`tasks list` and `tasks inspect`: what they print is what the examples are."""

import re

import numpy as np
import pytest
import seqio
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from t5x_lite import data, inspect_tasks, run_config, task_stages
from t5x_lite.errors import UsageError
from t5x_lite.run_config import DataConfig
from tasks import registration, sources, text_files, vocabularies

BYTES = seqio.ByteVocabulary(extra_ids=100)
# Bytes of inputs and of targets; with EOS one more.
LENGTHS = [(3, 1), (4, 1), (9, 3), (20, 1), (1, 7)]


def _pairs(split, shuffle_files, seed=None):
    del shuffle_files, seed
    dataset = tf.data.Dataset.from_tensor_slices(
        {
            "question": ["q" * length for length, _ in LENGTHS],
            "answer": ["a" * length for _, length in LENGTHS],
            "nested": {"index": list(range(len(LENGTHS)))},
        }
    )
    return dataset.take(0) if split == "empty" else dataset


@seqio.map_over_dataset
def _cast(example):
    question = tf.strings.regex_replace(example["question"], "^q", "?")
    return {"inputs": question, "targets": example["answer"]}


WORDS = ("no", "yes", "no", "no", "perhaps")


def _answers(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({"inputs": ["?"] * 5, "targets": list(WORDS)})


def _answer(text, example=None, is_target=False):
    return text


_answer.classes = ("yes", "no", "perhaps")


def _capitals(text, example=None, is_target=False):
    """Broken: expects what the model is not trained to write."""
    return text.capitalize() if is_target else text


def _number(text, example=None, is_target=False):
    return int(text)


def _share_equal(targets, predictions):
    return {"equal": 100 * np.mean([t == p for t, p in zip(targets, predictions, strict=True)])}


def _mean_score(targets, scores):
    raise AssertionError("there is no model")


@seqio.map_over_dataset
def _line(line):
    return {"inputs": "? " + line, "targets": line}


def _documents(split):
    return [f"Document {i} of {split} tells of the number {i * i}." for i in range(40)]


class UnreadableVocabulary(vocabularies.LazyVocabulary):
    def resolve(self):
        raise AssertionError("the vocabulary was read")


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Tasks of our own: supervised, with both ways to end in EOS, and self-supervised."""
    feature = seqio.Feature(BYTES, add_eos=True)
    names = []
    endings = {
        "test_pairs": seqio.preprocessors.append_eos_after_trim,
        "test_pairs_eos_first": seqio.preprocessors.append_eos,
    }
    for name, ending in endings.items():
        names.append(name)
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(_pairs, splits=["train", "empty"]),
            preprocessors=[_cast, seqio.preprocessors.tokenize, ending],
            output_features={"inputs": feature, "targets": feature},
        )
    for postprocess in (_answer, _capitals, _number):
        names.append(f"test{postprocess.__name__}")
        seqio.TaskRegistry.add(
            names[-1],
            source=seqio.FunctionDataSource(_answers, splits=["train"]),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
            output_features={"inputs": feature, "targets": feature},
            postprocess_fn=postprocess,
            metric_fns=[_share_equal, _mean_score],
        )
    source = sources.RecordsSource(
        ["train", "validation"], lambda split: [{"text": t} for t in _documents(split)], ["text"]
    )
    names += registration.register_objectives("test_documents", source, BYTES)
    seqio.MixtureRegistry.add(
        "test_mixture", [("test_documents_prefix_lm", 3), ("test_documents_span_corruption", 1)]
    )
    yield
    seqio.MixtureRegistry.remove("test_mixture")
    for name in names:
        seqio.TaskRegistry.remove(name)


@pytest.fixture(autouse=True)
def configuration():
    """What a test sets, it sets for itself alone."""
    vocabulary_file = vocabularies.DEFAULT.file
    yield
    vocabularies.set_default_file(vocabulary_file)
    seqio.set_tfds_data_dir_override(None)
    text_files._configured = None


def _config(name="test_pairs", lengths=None, **options) -> DataConfig:
    return DataConfig(name, lengths or {"inputs": 10, "targets": 4}, batch_size=1, **options)


def _measure(config, num_examples=100) -> task_stages.Measures:
    provider = data.get_provider(config.mixture_or_task_name)
    return task_stages.measure(config, provider, config.task_feature_lengths, num_examples)


# ---- list ----------------------------------------------------------------------------------------


def test_list_has_a_line_for_every_name(capsys):
    inspect_tasks.list_tasks()
    lines = capsys.readouterr().out.splitlines()[1:]
    listed = {line.split()[0]: line for line in lines}
    assert len(listed) == len(lines)
    assert set(listed) == {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    # C4 is listed though no data set is there.
    assert listed["c4_v220_full_lm"].split()[1:5] == ["task", "train,", "validation", "targets"]
    assert "c4/en:2.2.0" in listed["c4_v220_full_lm"]
    assert listed["test_mixture"].split()[1] == "mixture"
    assert listed["test_mixture"].endswith("2 tasks")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("pairs", ["test_pairs", "test_pairs_eos_first"]),
        ("test_pairs*", ["test_pairs", "test_pairs_eos_first"]),
        ("*pairs", ["test_pairs"]),
        ("c4_v[23]10_span_corruption", ["c4_v310_span_corruption"]),
    ],
)
def test_list_with_a_pattern(capsys, pattern, expected):
    inspect_tasks.list_tasks(pattern)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == expected


def test_list_without_a_match_names_the_nearest():
    with pytest.raises(UsageError, match=r"'test_pears'.*'test_pairs'"):
        inspect_tasks.list_tasks("test_pears")


def test_splits_that_only_tfds_knows_are_not_asked_for(capsys):
    feature = {"targets": seqio.Feature(BYTES)}
    source = seqio.TfdsDataSource("no_such_data_set:1.0.0")
    seqio.TaskRegistry.add("test_tfds", source=source, output_features=feature)
    try:
        inspect_tasks.list_tasks("test_tfds")
    finally:
        seqio.TaskRegistry.remove("test_tfds")
    assert "as in TFDS" in capsys.readouterr().out


# ---- measures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_pairs", "test_pairs_eos_first"])
def test_lengths_truncation_and_padding(name):
    """Known by construction, and the same whether EOS is added before or after trimming."""
    measures = _measure(_config(name))
    inputs, targets = measures.features["inputs"], measures.features["targets"]
    assert inputs.untrimmed.tolist() == [4, 5, 10, 21, 2]
    assert inputs.trimmed.tolist() == [4, 5, 10, 10, 2]
    assert (inputs.num_truncated, inputs.num_lost) == (1, 11)
    assert inputs.padding == pytest.approx(1 - 31 / 50)
    assert targets.untrimmed.tolist() == [2, 2, 4, 2, 8]
    assert (targets.num_truncated, targets.num_lost) == (1, 4)
    assert targets.padding == pytest.approx(1 - 14 / 20)
    assert measures.num_examples == 5
    assert measures.num_tokens == 31 + 14


def test_packing():
    """Examples 1 and 2 fit into a row of (10, 4), the others fill one each."""
    measures = _measure(_config())
    assert measures.num_packed_rows == 4
    assert measures.features["inputs"].packed_padding == pytest.approx(1 - 31 / 40)
    assert measures.features["targets"].packed_padding == pytest.approx(1 - 14 / 16)


def test_sample_is_bounded():
    measures = _measure(_config(), num_examples=2)
    assert measures.features["inputs"].untrimmed.tolist() == [4, 5]
    assert measures.num_examples == 2
    assert measures.num_packed_rows == 1


def test_lengths_of_a_mixture_equal_those_of_its_dataset():
    lengths = {"inputs": 40, "targets": 20}
    config = _config("test_mixture", lengths)
    measures = _measure(config, num_examples=30)
    mixture = seqio.get_mixture_or_task("test_mixture")
    dataset = mixture.get_dataset(
        sequence_length=lengths, shuffle=False, seed=task_stages.SEED, num_epochs=1
    ).take(30)
    for name in lengths:
        expected = [len(example[name]) for example in dataset.as_numpy_iterator()]
        assert measures.features[name].trimmed.tolist() == expected
    targets = measures.features["targets"]
    assert targets.num_truncated > 0  # prefix_lm does not look at the length of targets
    assert (np.minimum(targets.untrimmed, 20) == targets.trimmed).all()


def test_unknown_tokens(shared_data):
    """T5's vocabulary has no `<`: every `<unk>` of the C4 stand-in holds one unknown id."""
    file = str(shared_data / "vocabs" / "t5_sentencepiece_32000.model")
    tfds = str(shared_data / "tfds")
    name, lengths = "c4_v310_full_lm", {"targets": 64}
    config = _config(name, lengths, vocabulary_file=file, tfds_data_dir=tfds)
    data.configure(config)
    dataset = seqio.get_mixture_or_task(name).get_dataset(lengths, shuffle=False).take(20)
    expected = sum(np.count_nonzero(e["targets"] == 2) for e in dataset.as_numpy_iterator())
    assert expected > 0
    assert _measure(config, num_examples=20).features["targets"].num_unknown == expected


# ---- stages --------------------------------------------------------------------------------------


def test_text_stage_is_what_the_tokenizer_gets_and_needs_no_vocabulary():
    task = seqio.get_mixture_or_task("test_pairs")
    unread = seqio.Feature(UnreadableVocabulary())
    task = task.replace(output_features=dict.fromkeys(task.output_features, unread))
    dataset, fields = task_stages.text_stage(task, "train", {"inputs": 10, "targets": 4})
    assert sorted(fields) == ["inputs", "targets"]
    first = next(dataset.as_numpy_iterator())
    assert (first["inputs"], first["targets"]) == (b"?qq", b"a")

    for objective in registration.OBJECTIVES:
        task = seqio.get_mixture_or_task(f"test_documents_{objective}")
        dataset, fields = task_stages.text_stage(task, "validation", {})
        texts = [example[fields[0]].decode() for example in dataset.as_numpy_iterator()]
        assert (fields, texts) == (["targets"], _documents("validation"))


def test_task_without_text():
    def ids(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensors({"targets": [1]})

    source = seqio.FunctionDataSource(ids, splits=["train"])
    task = seqio.Task("ids", source, {"targets": seqio.Feature(BYTES)})
    with pytest.raises(UsageError, match="ids has no text"):
        task_stages.text_stage(task, "train", {})


def test_decode_shows_every_end_mark_and_sentinel():
    ids = np.array([*BYTES.encode("one"), 1, *BYTES.encode("two"), 358, *BYTES.encode("x"), 1, 0])
    assert inspect_tasks.decode(BYTES, ids) == "one </s> two <extra_id_0> x </s>"
    assert inspect_tasks.decode(BYTES, np.array(BYTES.encode("no end"))) == "no end"


# ---- inspect -------------------------------------------------------------------------------------


def test_inspect_a_supervised_task(capsys):
    inspect_tasks.inspect_task(_config(), num_shown=3)
    out = capsys.readouterr().out
    for expected in (
        r"stages +_cast -> tokenize -> append_eos_after_trim\n",
        r"vocabulary +359 ids, of which the last 100 are sentinels",
        r"Raw: record 3\n  question +qqqqqqqqq\n  answer +aaa\n  nested/index +2\n",
        r"Text: example 1, before the tokenizer\n  inputs +\?qq\n  targets +a\n",
        r"example 1 after all stages\n  inputs +4 ids +66 116 116 1\n  targets +2 ids +100 1\n",
        r"Decoded back: example 3\n  inputs +\?qqqqqqqq </s>\n  targets +aaa </s>\n",
        # Row 1 packs examples 1 and 2: 9 of 10 and 4 of 4 positions.
        r"encoder_segment_ids +int32 \[10\] +9 not 0 +1 1 1 1 2 2 2 2 2 0\n",
        r"decoder_target_tokens +int32 \[4\] +4 not 0 +100 1 100 1\n",
        r"the 5 \(all\) examples of 'train'",
        r"inputs +10 +2 +5 +8.4 +21 +0.00%\n",
        r"inputs +1 +20.00% +11 +26.19% +38.0% +22.5%\n",
        r"one by one +5 +1.00 +[\d,]+ +[\d,]+\n",
        r"packed +4 +1.25 +[\d,]+ +[\d,]+\n",
    ):
        assert re.search(expected, out), f"{expected} not in\n{out}"


def test_inspect_span_corruption_shows_sentinels(capsys):
    config = _config("test_documents_span_corruption", {"inputs": 64, "targets": 20})
    inspect_tasks.inspect_task(config, num_examples=10)
    out = capsys.readouterr().out
    assert "Document 0 of train tells of the number 0." in out
    decoded = out.split("Decoded back: example 1\n")[1].split("\n\n")[0]
    inputs, targets = " ".join(decoded.split()).removeprefix("inputs ").split(" targets ")
    # Put back where its sentinel stands, each span restores the documents.
    for i, span in enumerate(re.split(" ?<extra_id_[0-9]+> ", targets.removesuffix(" </s>"))[1:]):
        assert f"<extra_id_{i}>" in inputs
        inputs = inputs.replace(f"<extra_id_{i}>", span)
    documents = "".join(_documents("train"))
    assert documents.replace(" ", "").startswith(inputs.removesuffix("</s>").replace(" ", ""))
    assert "first 10 examples of 'train'" in out
    assert "Text: example" not in out  # the text is the record's, which was shown


def test_inspect_targets_only(capsys):
    inspect_tasks.inspect_task(_config("test_documents_full_lm", {"inputs": 9, "targets": 30}))
    out = capsys.readouterr().out
    assert "an encoder-decoder needs inputs" in out
    assert "encoder_input_tokens" not in out


def test_inspect_a_mixture(capsys):
    config = _config("test_mixture", {"inputs": 64, "targets": 40}, split="validation")
    inspect_tasks.inspect_task(config, num_examples=20)
    out = capsys.readouterr().out
    assert re.search(r"test_documents_prefix_lm +75\.0%\n", out)
    assert re.search(r"test_documents_span_corruption +25\.0%\n", out)
    assert "Raw: record 1 of test_documents_prefix_lm\n  text  Document 0 of validation" in out
    assert "first 20 examples of 'validation'" in out


def test_inspect_unpacked(capsys):
    inspect_tasks.inspect_task(_config(pack=False))
    out = capsys.readouterr().out
    assert "row 1, not packed" in out
    assert "segment_ids" not in out


# ---- gold against gold ---------------------------------------------------------------------------


def test_gold_against_gold(capsys):
    """A target of 7 letters is cut to 3 and EOS; the other four come back."""
    inspect_tasks.inspect_task(_config("test_answer"))
    out = capsys.readouterr().out.split("Gold against gold: ")[1]
    for expected in (
        r"^test_answer, 5 targets of 'train' as if predicted\n  equal  80\n",
        r"the first: 'no', after the post-processor: no\n",
        r"3 different targets, 3 different values",
        r"classes \(to answer 'no' every time is right for 60.00%\)\n",
        r"    yes +1 +20.00%\n    no +3 +60.00%\n    perhaps +1 +20.00%\n",
        r"1 of 5 targets do not come back .* the first: 'perhaps' comes back as 'per'\n$",
    ):
        assert re.search(expected, out), f"{expected} not in\n{out}"
    assert "WRONG" not in out


def test_gold_against_gold_shows_a_broken_post_processor(capsys):
    config = _config("test_capitals", {"inputs": 10, "targets": 20})
    inspect_tasks.inspect_task(config)
    out = capsys.readouterr().out.split("Gold against gold: ")[1]
    assert re.search(r"\n  equal  0\n", out)
    assert "the first: 'no', after the post-processor: No; predicted: no\n" in out
    assert "come back" not in out


def test_gold_against_gold_with_a_target_outside_the_classes(capsys, monkeypatch):
    monkeypatch.setattr(_answer, "classes", ("yes", "no"))
    inspect_tasks.inspect_task(_config("test_answer", {"inputs": 10, "targets": 20}))
    out = capsys.readouterr().out
    assert "WRONG: 1 of 5 targets are none of the classes; the first: 'perhaps'\n" in out


def test_gold_against_gold_with_a_post_processor_that_fails():
    with pytest.raises(UsageError, match=r"test_number: .* ValueError: invalid literal .*'no'$"):
        inspect_tasks.inspect_task(_config("test_number"))


def test_gold_against_gold_of_each_member(capsys):
    """Those without metrics are left out."""
    seqio.MixtureRegistry.add("test_mixed", ["test_answer", "test_capitals", "test_pairs"], 1.0)
    try:
        inspect_tasks.inspect_task(_config("test_mixed"))
    finally:
        seqio.MixtureRegistry.remove("test_mixed")
    checked = re.findall(r"Gold against gold: (\w+),", capsys.readouterr().out)
    assert checked == ["test_answer", "test_capitals"]


# ---- details -------------------------------------------------------------------------------------


def test_source_of_lines(tmp_path, capsys):
    """Its records are no dictionaries."""
    (tmp_path / "lines.txt").write_text("one line\n")
    seqio.TaskRegistry.add(
        "test_lines",
        source=seqio.TextLineDataSource({"train": str(tmp_path / "lines.txt")}),
        preprocessors=[_line, seqio.preprocessors.tokenize],
        output_features={n: seqio.Feature(BYTES, add_eos=False) for n in ("inputs", "targets")},
    )
    try:
        inspect_tasks.inspect_task(_config("test_lines"))
    finally:
        seqio.TaskRegistry.remove("test_lines")
    out = capsys.readouterr().out
    assert "Raw: record 1\n  line  one line\n" in out
    assert re.search(r"Text: example 1, .*\n  inputs +\? one line\n  targets +one line\n", out)


@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=50),
    limit=st.integers(1, 600),
)
def test_histogram(lengths, limit):
    """Bins cover all lengths once; none reaches over the limit from below."""
    remaining = sorted(lengths)
    previous = 0
    for line in inspect_tasks.histogram(np.array(lengths), limit):
        low, high, count, over = re.fullmatch(
            r" *(\d+)(?: - +(\d+))? +(\d+)(?: +#+)?(  over \d+: cut)?", line
        ).groups()
        low, high, count = int(low), int(high or low), int(count)
        assert previous < low <= high
        assert not low <= limit < high
        assert bool(over) == (low > limit and count > 0)
        assert [low <= length <= high for length in remaining[:count]] == [True] * count
        remaining, previous = remaining[count:], high
    assert not remaining


def test_parse_feature_lengths():
    parse = run_config.parse_feature_lengths
    assert parse("inputs=512, targets=114") == {"inputs": 512, "targets": 114}
    for text in ("", "512", "inputs=", "inputs=512,", "inputs=-1", "inputs:512"):
        with pytest.raises(UsageError, match="like inputs=512,targets=114"):
            parse(text)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (_config("test_pair"), {}, "'test_pair' is not registered; did you mean 'test_pairs'"),
        (_config(split="test"), {}, "test: test_pairs has empty, train"),
        (_config(split="empty"), {}, "'empty' gives no example"),
        (_config(lengths={"inputs": 9}), {}, "no length for 'targets', a feature of test_pairs"),
        (_config(), {"num_examples": 0}, "num_examples=0: must be at least 1"),
        (_config("text_files_full_lm", vocabulary_file="bytes"), {}, "TEXT_FILES_PATTERN"),
    ],
)
def test_bad_input_is_one_line(config, options, message):
    with pytest.raises(UsageError, match=message) as error:
        inspect_tasks.inspect_task(config, **options)
    assert "\n" not in str(error.value)
