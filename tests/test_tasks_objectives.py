"""The denoising objectives against what the `t5` library gave (../shared/data/golden/README.md)."""

import functools
import json
import math
import pathlib

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.errors import UsageError
from tasks import noise, objectives, vocabularies

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "golden"
VOCAB_SIZE = 32100
FEATURES = {
    "inputs": seqio.Feature(seqio.PassThroughVocabulary(VOCAB_SIZE, eos_id=1)),
    "targets": seqio.Feature(seqio.PassThroughVocabulary(VOCAB_SIZE, eos_id=1)),
}
SEQUENCE_OBJECTIVES = ("span_corruption", "iid_denoising", "prefix_lm", "full_lm")


def _golden_cases() -> list:
    path = GOLDEN / "denoising.json"
    if not path.exists():
        return []
    return [pytest.param(c, id=c["id"]) for c in json.loads(path.read_text())["cases"]]


@pytest.fixture(scope="module")
def golden(shared_data):
    with np.load(shared_data / "golden" / "denoising.npz") as arrays:
        return dict(arrays)


def _seeds(case: dict) -> list:
    seeds = case.get("seeds")
    if seeds is None:
        return []
    pairs = seeds["pairs"] if "pairs" in seeds else [seeds["pair"]]
    return [tf.constant(pair, seeds["dtype"]) for pair in pairs]


def _documents(golden: dict, name: str) -> tf.data.Dataset:
    ragged = tf.RaggedTensor.from_row_lengths(golden[f"{name}.values"], golden[f"{name}.lengths"])
    dataset = tf.data.Dataset.from_tensor_slices({"targets": ragged})
    return dataset.map(lambda x: {"targets": tf.identity(x["targets"])})


def _mask_fn(spec: list) -> noise.NoiseMaskFn:
    return functools.partial(getattr(noise, spec[0]), **spec[1])


def _denoise_kwargs(kwargs: dict) -> dict:
    return {
        "noise_density": kwargs["noise_density"],
        "noise_mask_fn": _mask_fn(kwargs["noise_mask_fn"]),
        "inputs_fn": getattr(noise, kwargs["inputs_fn"]),
        "targets_fn": kwargs["targets_fn"] and getattr(noise, kwargs["targets_fn"]),
    }


def _run_primitive(case: dict) -> dict:
    """TensorFlow's own generators: a new release that changes them changes every stream."""
    kwargs, (seed,) = dict(case["kwargs"]), _seeds(case)
    if case["function"].endswith("stateless_split"):
        return {"seeds": tf.random.experimental.stateless_split(seed, **kwargs)}
    if case["function"].endswith("stateless_uniform"):
        return {"x": tf.random.stateless_uniform(seed=seed, **kwargs)}
    length = int(kwargs["value"].removeprefix("range(").partition(")")[0])
    return {"x": seqio.stateless_shuffle(tf.range(length), seed)}


def _run_mask(case: dict) -> dict:
    kwargs, seeds = dict(case["kwargs"]), _seeds(case)
    length, density = tf.constant(kwargs.pop("length")), kwargs.pop("noise_density")
    fn = functools.partial(getattr(noise, case["function"]), length, density)
    if batch_size := kwargs.pop("batch_size", None):
        # t5's batched form draws a pair of seeds for each row from the first pair.
        rows = tf.random.experimental.stateless_split(seeds[0], 2 * batch_size)
        masks = [fn(seeds=tf.unstack(rows)[2 * i : 2 * i + 2], **kwargs) for i in range(batch_size)]
        return {"mask": tf.stack(masks)}
    return {"mask": fn(seeds=seeds, **kwargs)}


def _run_token_function(case: dict, golden: dict) -> dict:
    fn = functools.partial(getattr(noise, case["function"]), vocab_size=VOCAB_SIZE)
    kwargs = dict(case.get("kwargs") or {})
    assert kwargs.pop("num_reserved_tokens", noise.NUM_RESERVED_IDS) == noise.NUM_RESERVED_IDS
    tokens, mask = tf.constant(golden[case["tokens"]]), tf.constant(golden[case["noise_mask"]])
    if kwargs.pop("batch_size", None):
        rows = [fn(t, m, seeds=[], **kwargs) for t, m in zip(tokens, mask, strict=True)]
        return {"tokens": tf.ragged.stack(rows).to_tensor()}
    return {"tokens": fn(tokens, mask, seeds=_seeds(case), **kwargs)}


def _run_dataset(case: dict, golden: dict) -> tf.data.Dataset:
    kwargs, name = dict(case.get("kwargs") or {}), case["function"]
    dataset = _documents(golden, case["docs"])
    if name == "reduce_concat_tokens":
        return objectives.reduce_concat_tokens(dataset, kwargs["batch_size"])
    if name == "split_tokens":
        return objectives.split_tokens(dataset, **kwargs)
    if name == "select_random_chunk":
        return objectives.select_random_chunk(dataset, **kwargs)
    lengths = kwargs.pop("sequence_length")
    if name in SEQUENCE_OBJECTIVES:
        return getattr(objectives, name)(dataset, lengths, FEATURES, **kwargs)
    if name == "span_corruption then seqio append_eos_after_trim":
        dataset = objectives.span_corruption(dataset, lengths, FEATURES, **kwargs)
        return seqio.preprocessors.append_eos_after_trim(dataset, FEATURES, lengths)
    if name == "span_corruption, what denoise receives":
        raw, _ = objectives.random_spans_helper(lengths["inputs"], 0.15, 3.0, 1, 1)
        if kwargs["merge_examples_to_reduce_padding"]:
            dataset = objectives.reduce_concat_tokens(dataset)
        return objectives.split_tokens(dataset, raw)
    # A chain of stages, as T5's gin files have them.
    dataset = objectives.select_random_chunk(dataset, kwargs["max_length"])
    if "reduce_concat_tokens" in name:
        dataset = objectives.reduce_concat_tokens(dataset)
    dataset = objectives.split_tokens(dataset, lengths["inputs"] - 1)
    return objectives.denoise(dataset, FEATURES, **_denoise_kwargs(kwargs["denoise"]))


def _run(case: dict, golden: dict) -> dict:
    name = case["function"]
    if "docs" in case:
        with seqio.map_seed_manager(case["map_seed_manager_initial_seed"]):
            dataset = _run_dataset(case, golden)
        examples = list(dataset.as_numpy_iterator())
        outputs = {}
        for feature in case["outputs"]:
            outputs[f"{feature}.values"] = np.concatenate([e[feature] for e in examples])
            outputs[f"{feature}.lengths"] = np.array([len(e[feature]) for e in examples])
        return outputs
    if name.startswith(("tf.random", "seqio.")):
        return _run_primitive(case)
    if name.endswith("noise_mask"):
        return _run_mask(case)
    if name == "single_example_denoise":
        return objectives.denoise_tokens(
            tf.constant(golden[case["tokens"]]),
            _seeds(case)[0],
            VOCAB_SIZE,
            **_denoise_kwargs(case["kwargs"]),
        )
    if name == "single_example_select_random_chunk":
        kwargs = dict(case["kwargs"])
        if lengths := kwargs.pop("sequence_length", None):
            kwargs["max_length"] = lengths["targets"] - 1  # room for EOS
        tokens = tf.constant(golden[case["tokens"]])
        return {"targets": objectives.random_chunk(tokens, _seeds(case)[0], **kwargs)}
    return _run_token_function(case, golden)


@pytest.mark.parametrize("case", _golden_cases())
def test_golden(case, golden):
    if case["function"] == "sentinel_id":
        replaced = noise.noise_token_to_sentinel(tf.constant([7]), tf.constant([True]), 32100, [])
        assert replaced.numpy().tolist() == [case["outputs"]["value"]]
        return
    if case["outputs"] is None:
        with pytest.raises(getattr(tf.errors, case["raises"], ValueError)):
            _run(case, golden)
        return
    outputs = _run(case, golden)
    for key, value in outputs.items():
        feature, _, part = key.partition(".")
        expected = golden[case["outputs"][feature] + (f".{part}" if part else "")]
        actual = np.asarray(value)
        np.testing.assert_array_equal(actual, expected, err_msg=key)
        if part != "lengths":
            assert actual.dtype == expected.dtype


def test_lengths_equal_golden(shared_data):
    table = json.loads((shared_data / "golden" / "denoising.json").read_text())
    rows = table["random_spans_helper"]["table"]
    assert rows
    for row in rows:
        kwargs = dict(row)
        expected = kwargs.pop("tokens_length,targets_length")
        assert list(objectives.random_spans_helper(**kwargs)) == expected, row


def test_full_lengths_of_t5():
    assert objectives.random_spans_helper(512, 0.15, 3.0, 1, 1) == (568, 114)


# ---- properties ----------------------------------------------------------------------------------

TEXT = (
    "A café owner counted 1,024 croissants — and sold none of them before noon. "
    "The rest of the day was spent on wondering why; nobody had told her that the street was "
    "closed, that the bridge had been taken down, or that “everyone” was at the fair. "
) * 12


def _corrupt(texts, vocabulary, lengths, seed) -> list[dict]:
    feature = seqio.Feature(vocabulary)
    features = {"inputs": feature, "targets": feature}
    dataset = tf.data.Dataset.from_tensor_slices({"targets": texts})
    with seqio.map_seed_manager(seed):
        dataset = seqio.preprocessors.tokenize(dataset, features, copy_pretokenized=False)
        dataset = objectives.span_corruption(dataset, lengths, features)
        dataset = seqio.preprocessors.append_eos_after_trim(dataset, features, lengths)
    return list(dataset.as_numpy_iterator())


def _merge(example: dict, vocabulary) -> list[int]:
    """Puts the spans of the targets where their sentinels stand in the inputs."""
    # 512 inputs have 28 spans; TEXT has none of the last 28 bytes, which are sentinels of bytes.
    first_sentinel = vocabulary.vocab_size - (vocabulary.extra_ids or 28)
    inputs, targets = example["inputs"].tolist(), example["targets"].tolist()
    assert inputs.pop() == targets.pop() == vocabulary.eos_id
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token >= first_sentinel:
            assert token not in spans
            spans[token] = []
            sentinel = token
        else:
            spans[sentinel].append(token)
    merged = []
    for token in inputs:
        merged += spans.pop(token) if token >= first_sentinel else [token]
    # The targets end in one more sentinel only if ordinary text comes last, which it never does.
    assert not any(spans.values())
    return merged


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("inputs_length", [16, 61, 128, 512])
@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_span_corruption_decoded_and_merged_gives_the_text(shared_data, kind, inputs_length, seed):
    if kind == "bytes":
        vocabulary = vocabularies.load("bytes")
    else:
        model = shared_data / "vocabs" / "t5_sentencepiece_32000.model"
        vocabulary = seqio.SentencePieceVocabulary(str(model), extra_ids=100)
    raw, targets_length = objectives.random_spans_helper(inputs_length, 0.15, 3.0, 1, 1)
    lengths = {"inputs": inputs_length, "targets": targets_length}
    text = TEXT.strip()
    examples = _corrupt([text], vocabulary, lengths, seed)
    merged = [token for example in examples for token in _merge(example, vocabulary)]
    assert vocabulary.decode(merged) == text
    assert merged == list(vocabulary.encode(text))
    assert len(examples) == math.ceil(len(merged) / raw)
    for example in examples[:-1]:
        assert (len(example["inputs"]), len(example["targets"])) == (inputs_length, targets_length)


def test_bytes_have_the_sentinels_of_byt5():
    """258, 257 and so on down, in order (arXiv:2105.13626, section 3)."""
    lengths = {"inputs": 64, "targets": 32}
    for example in _corrupt(
        [TEXT.encode("ascii", "ignore")], vocabularies.load("bytes"), lengths, 3
    ):
        sentinels = [i for i in example["inputs"] if i > 3 + 127]
        assert sentinels == list(range(258, 258 - len(sentinels), -1)) and sentinels
        assert [i for i in example["targets"] if i > 3 + 127][: len(sentinels)] == sentinels


def test_noise_share_and_span_length():
    """15% of the tokens in spans of mean length 3, to the rounding of one sequence."""
    for seed in range(20):
        mask = noise.random_spans_noise_mask(
            tf.constant(568), 0.15, [tf.constant([seed, 1]), tf.constant([seed, 2])]
        ).numpy()
        num_spans = np.count_nonzero(np.diff(mask.astype(int)) == 1)
        assert (mask.sum(), num_spans) == (round(568 * 0.15), round(568 * 0.15 / 3))


def test_seed_fixes_the_stream():
    vocabulary = vocabularies.load("bytes")
    lengths = {"inputs": 128, "targets": 64}

    def stream(seed):
        return [e["inputs"].tolist() for e in _corrupt([TEXT], vocabulary, lengths, seed)]

    assert stream(7) == stream(7)
    assert stream(7) != stream(8)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEQUENCE_OBJECTIVES)
@pytest.mark.parametrize("length", [None, 0, -3])
def test_missing_or_zero_length(name, length):
    feature = "targets" if name == "full_lm" else "inputs"
    lengths = {"inputs": 512, "targets": 114} | {feature: length}
    dataset = tf.data.Dataset.from_tensor_slices({"targets": [[5, 6, 7]]})
    with pytest.raises(UsageError, match=f"length of '{feature}'") as error:
        getattr(objectives, name)(dataset, lengths, FEATURES)
    assert "\n" not in str(error.value)


def test_targets_too_short():
    dataset = tf.data.Dataset.from_tensor_slices({"targets": [[5, 6, 7]]})
    with pytest.raises(UsageError, match=r"'targets': 113.*512 inputs needs at least 114"):
        objectives.span_corruption(dataset, {"inputs": 512, "targets": 113}, FEATURES)


def test_documents_of_one_known_length_are_joined_too():
    dataset = tf.data.Dataset.from_tensor_slices({"targets": [[5, 6, 0], [7, 8, 9], [4, 0, 0]]})
    joined = objectives.reduce_concat_tokens(dataset, num_documents=2)
    assert [e["targets"].tolist() for e in joined.as_numpy_iterator()] == [[5, 6, 7, 8, 9], [4]]
