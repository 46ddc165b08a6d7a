"""`load_model` against Hugging Face's golden results, closed forms, and its own promises."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from saved_runs import TINY, make_params, make_run
from sentencepiece import sentencepiece_model_pb2

import t5x_lite
from t5x_lite import load_model
from t5x_lite.checkpoints import Checkpoints
from t5x_lite.decoding import METHOD_OF, DecodeConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.step import TrainState

HF_FIXTURES = ["t5_v10", "t5_v11", "umt5"]


def letter(i: int) -> str:
    """One character for each id; for the id of unknown characters one that is unknown."""
    return chr(0x4E00 + i) if i > 2 else {1: "", 2: "A"}[i]


def text_of(ids) -> str:
    """What the vocabulary of letters makes into `ids`, which may end with the end mark."""
    return "".join(letter(int(i)) for i in ids)


def vocabulary_of_letters(size: int) -> bytes:
    """A SentencePiece model in which a text has one id for each character, and one text alone."""
    model = sentencepiece_model_pb2.ModelProto()
    types = sentencepiece_model_pb2.ModelProto.SentencePiece
    for piece, kind in (
        ("<pad>", types.CONTROL),
        ("</s>", types.CONTROL),
        ("<unk>", types.UNKNOWN),
        *((letter(i), types.NORMAL) for i in range(3, size)),
    ):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    spec = model.trainer_spec
    spec.model_type, spec.vocab_size = spec.UNIGRAM, size
    spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = 0, 1, 2, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def write_converted(
    model_dir: pathlib.Path, config: T5Config, params: dict, lengths: dict[str, int]
) -> pathlib.Path:
    """What a conversion leaves: no task, no config.gin, step 0."""
    model_dir.mkdir()
    (model_dir / "vocabulary.model").write_bytes(vocabulary_of_letters(config.vocab_size))
    description = {
        "architecture": {"family": "t5", **config.to_dict()},
        "task": None,
        "feature_lengths": lengths,
        "vocabulary": {"class": "SentencePieceVocabulary", "size": config.vocab_size},
        "converted_from": {"format": "hf"},
    }
    (model_dir / "model.json").write_text(json.dumps(description))
    checkpoints = Checkpoints(model_dir / "checkpoints")
    checkpoints.save(0, TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, params), {}), None)
    checkpoints.close()
    return model_dir


@pytest.fixture(scope="module")
def converted(shared_data, tmp_path_factory):
    """A function: fixture's name -> its model, golden results and facts."""
    made = {}

    def make(name):
        if name not in made:
            directory = shared_data / "checkpoints" / "hf" / name
            config, params = references.load_hf(directory)
            if name == "umt5":  # as the version of transformers that made the fixture
                config = dataclasses.replace(config, scale_decoder_output=True)
            lengths = {"inputs": 12, "targets": 12}
            path = write_converted(tmp_path_factory.mktemp("m") / name, config, params, lengths)
            facts = json.loads((directory / "golden.json").read_text())
            made[name] = load_model(path), dict(np.load(directory / "golden.npz")), facts
        return made[name]

    return make


def golden_inputs(golden) -> list[np.ndarray]:
    """Without padding, with the end mark."""
    pairs = zip(golden["input_ids"], golden["attention_mask"], strict=True)
    return [ids[mask > 0] for ids, mask in pairs]


def golden_text(ids: np.ndarray) -> str:
    """The text of generated ids: without the start, up to the end mark."""
    ids = [int(i) for i in ids[1:]]
    return text_of(ids[: ids.index(1)] if 1 in ids else ids)


# ---- Hugging Face --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HF_FIXTURES)
def test_generates_what_hugging_face_does(converted, name):
    model, golden, facts = converted(name)
    texts = [text_of(ids) for ids in golden_inputs(golden)]
    for text, ids in zip(texts, golden_inputs(golden), strict=True):
        assert model.tokenize(text) == ids.tolist()
    assert model.generate(texts) == [golden_text(ids) for ids in golden["greedy_ids"]]
    answers, scores = model.generate(
        texts,
        method="beam",
        num_beams=4,
        num_outputs=4,
        length_penalty=0.6,
        beam_rules="huggingface",
        return_scores=True,
    )
    assert answers == [[golden_text(ids) for ids in row] for row in golden["beam_ids_lp0.6"]]
    assert scores.dtype == np.float32
    tolerance = 3 * facts["float32_vs_float64_beam_scores_max_abs"]
    np.testing.assert_allclose(scores, golden["beam_scores_lp0.6"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", HF_FIXTURES)
def test_encodes_what_hugging_face_does(converted, name):
    model, golden, _ = converted(name)
    inputs = golden_inputs(golden)
    found = model.encode([text_of(ids) for ids in inputs])
    assert len(found) == len(inputs)
    expected = golden["encoder_last_hidden_state"]
    for row, ids in enumerate(inputs):
        assert found[row].shape == (len(ids), model.config.d_model)
        assert found[row].dtype == np.float32
        np.testing.assert_allclose(found[row], expected[row, : len(ids)], rtol=0, atol=1e-5)


# ---- closed forms --------------------------------------------------------------------------------


_apply = functools.partial(jax.jit, static_argnums=0)(t5.apply)


def log_likelihood(model, inputs: list[int], targets: list[int], length: int = 12) -> float:
    """Of one row alone, padded to `length`; in float64 from the logits on."""
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": [0, *targets[:-1]]}
    batch = {
        name: np.pad(ids, (0, length - len(ids)))[None].astype(np.int32)
        for name, ids in batch.items()
    }
    logits = np.asarray(_apply(model.config, model.params, batch), np.float64)[0, : len(targets)]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_p[np.arange(len(targets)), targets].sum()


def test_scores_are_sums_of_log_probabilities(converted):
    model, _, _ = converted("t5_v11")
    pairs = [
        ([8, 52, 183, 162, 80, 3, 253, 85, 120, 82, 185, 1], [236, 218, 218, 218, 1]),
        ([87, 13, 1], [9, 2, 9, 250, 251, 252, 253, 254, 255, 3, 4, 1]),  # with an unknown letter
        ([87, 13, 1], [1]),
        ([1], [40, 41, 1]),
    ]
    found = model.score([text_of(i) for i, _ in pairs], (text_of(t) for _, t in pairs))
    assert (found.shape, found.dtype) == ((4,), np.float32)
    np.testing.assert_allclose(found, [log_likelihood(model, *p) for p in pairs], rtol=1e-5)


def test_greedy_and_samples_score_as_their_texts(converted):
    """A text of letters has the ids that were generated, if they ended."""
    model, golden, _ = converted("t5_v11")
    texts = [text_of(golden_inputs(golden)[0])]  # whose greedy answer ends
    answers, scores = model.generate(texts, return_scores=True)
    np.testing.assert_allclose(scores, model.score(texts, answers), rtol=1e-5)
    how = {"method": "sample", "num_outputs": 3, "temperature": 0.5}
    samples, scores = model.generate(texts, seed=3, return_scores=True, **how)
    assert scores.shape == (1, 3) and (np.diff(scores) <= 0).all()
    assert model.generate(texts, seed=3, **how) == samples != model.generate(texts, seed=4, **how)
    for text, row, row_scores in zip(texts, samples, scores, strict=True):
        for sample, score in zip(row, row_scores, strict=True):
            if len(sample) < 11 and "A" not in sample:
                [expected] = model.score([text], [sample])
                assert score == pytest.approx(expected, rel=1e-5)


def test_results_do_not_depend_on_the_batch(converted):
    """40 texts: two batches, sorted by length; one text: a batch of one."""
    model, _, _ = converted("t5_v10")
    rng = np.random.default_rng(0)
    texts = [text_of(rng.integers(3, 256, n)) for n in rng.integers(0, 8, 40)]
    answers, scores = model.generate(texts, max_length=4, return_scores=True)
    likelihoods = model.score(texts, texts[::-1])
    encoded = model.encode(texts)
    assert [len(x) for x in encoded] == [len(text) + 1 for text in texts]
    for i in (0, 39):
        alone, score = model.generate([texts[i]], max_length=4, return_scores=True)
        assert alone == [answers[i]]
        np.testing.assert_allclose(score, scores[i : i + 1], rtol=1e-5)
        [likelihood] = model.score([texts[i]], [texts[-1 - i]])
        assert likelihood == pytest.approx(likelihoods[i], rel=1e-5)
        np.testing.assert_allclose(model.encode([texts[i]])[0], encoded[i], rtol=0, atol=1e-5)


def test_two_devices(converted, repo):
    """A batch of one text is made up to the number of devices."""
    model, golden, _ = converted("t5_v10")
    texts = [text_of(golden_inputs(golden)[0])]
    code = (
        "import json, sys\n"
        "from t5x_lite import load_model\n"
        "path, texts = json.loads(sys.argv[1])\n"
        "model = load_model(path)\n"
        "print(json.dumps([model.generate(texts), model.encode(texts)[0].tolist()]))\n"
    )
    command = [sys.executable, "-c", code, json.dumps([model.model_dir, texts])]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    result = subprocess.run(
        command, check=True, env=environment, timeout=200, cwd=repo, stdout=subprocess.PIPE
    )
    answers, encoded = json.loads(result.stdout)
    assert answers == model.generate(texts)
    np.testing.assert_allclose(encoded, model.encode(texts)[0], rtol=0, atol=1e-5)


# ---- a run, and what it says ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", (2, 1000))


def test_checkpoints_of_a_run(run_dir):
    (run_dir / "best.json").write_text(json.dumps({"step": 2}))
    for which, step in ("latest", 1000), ("best", 2), (2, 2), (np.int64(1000), 1000), ("2", 2):
        model = load_model(run_dir, checkpoint=which)
        assert model.step == step
        expected = make_params(step)
        assert jax.tree.structure(model.params) == jax.tree.structure(expected)
        for found, saved in zip(
            jax.tree.leaves(model.params), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(found), np.asarray(saved))
    assert model.config == TINY
    model = load_model(str(run_dir))
    assert model.num_parameters == t5.num_parameters(TINY)
    assert repr(model) == (
        f"LoadedModel(T5, 1 + 1 layers, d_model 16, {t5.num_parameters(TINY):,} parameters; "
        f"step 1,000 of '{run_dir}')"
    )


def test_text_and_sentinels(run_dir):
    model = load_model(run_dir)
    text = "A list, and <extra_id_0> a file <extra_id_99>"
    ids = model.tokenize(text)
    assert ids == [*model.vocabulary.encode(text), 1]
    assert model.detokenize([*ids, 0, 0]) == text
    assert len(model.tokenize("word " * 500)) > 500  # input_length is 32
    assert len(model.encode([text])[0]) == len(ids)


def test_parameters_may_be_changed(run_dir):
    """And the lengths; nothing of an earlier call is kept but programs."""
    model = load_model(run_dir)
    before = model.score(["a list"], ["a name"])
    model.params = make_params(2)
    expected = load_model(run_dir, 2).score(["a list"], ["a name"])
    assert model.score(["a list"], ["a name"]) == expected != before
    model.params = jax.tree.map(lambda x: np.asarray(x, np.float64), make_params(2))
    assert model.score(["a list"], ["a name"]) == expected


def test_parameters_of_another_model_cannot_be_set(run_dir):
    model = load_model(run_dir)
    own = model.params
    deeper = t5.init(dataclasses.replace(TINY, num_encoder_layers=2), jax.random.key(0))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), own)
    embedding = f"float32{[TINY.vocab_size, TINY.d_model]}"
    for params, message in (
        (deeper, r"params: encoder/layers/\S+ is float32\[2, .*\], this model's is float32\[1, "),
        ({**own, "more": np.zeros(3)}, r"params: more is float32\[3\], not of this model"),
        (half, r"params: \S+ is bfloat16\[.*\], this model's is float32\["),
        (
            {name: part for name, part in own.items() if name != "token_embedder"},
            f"params: token_embedder/embedding is missing, this model's is {re.escape(embedding)}",
        ),
        (None, "params: .* is missing"),
    ):
        with pytest.raises(UsageError, match=f"^{message}"):
            model.params = params
    assert model.params is own


def test_too_long_texts_are_cut_and_told(converted):
    model, _, _ = converted("t5_v11")
    long, short = text_of(range(3, 40)), text_of(range(3, 9))
    with pytest.warns(UserWarning, match=r"^2 of 3 inputs cut to 12 tokens; set model\.input_leng"):
        found = model.encode([long, short, long])
    assert [len(x) for x in found] == [12, 7, 12]
    np.testing.assert_allclose(found[0], model.encode([long[:11]])[0], rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match=r"^1 of 1 targets cut to 12") as caught:
        model.score([short], [long])
    assert caught[0].filename == __file__
    try:
        model.input_length = 38
        model.target_length = 38
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(model.encode([long])[0]) == 38
            [found] = model.score([long], [long])
        ids = [*range(3, 40), 1]
        assert found == pytest.approx(log_likelihood(model, ids, ids, 38), rel=1e-5)
    finally:
        model.input_length = model.target_length = 12


def test_nothing_in_nothing_out(run_dir):
    model = load_model(run_dir)
    assert model.generate([]) == [] and model.encode(()) == []
    answers, scores = model.generate([], method="beam", num_outputs=2, return_scores=True)
    assert answers == [] and scores.shape == (0, 2)
    assert model.score([], []).shape == (0,)


def test_beams_that_did_not_end(converted):
    model, golden, _ = converted("t5_v11")
    [answers], [scores] = model.generate(
        [text_of(golden_inputs(golden)[0])],
        method="beam",
        num_outputs=4,
        max_length=2,
        return_scores=True,
    )
    ended = scores > -np.inf
    assert ended.tolist() == [True, False, False, False]
    assert answers[1:] == ["", "", ""]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.generate("one text"), TypeError, r"a list of texts, not one: give \['one te"),
        (lambda m: m.encode(["a", None]), TypeError, "input 1 is NoneType, not a string"),
        (lambda m: m.score(["a"], [float("nan")]), TypeError, "target 0 is float"),
        (lambda m: m.score(["a"], ["b", "c"]), ValueError, "1 inputs and 2 targets"),
        (lambda m: m.tokenize(7), TypeError, "takes one text, a string, not int"),
        (lambda m: m.tokenize(["a"]), TypeError, "takes one text, a string, not list"),
        (lambda m: m.tokenize("\ud800"), UsageError, "half of a surrogate pair"),
        (lambda m: setattr(m, "inputs_length", 9), AttributeError, "no attribute 'inputs_length'"),
        (lambda m: m.encode(["a", "\ud800"]), UsageError, "input 1 has half of a surrogate pair"),
        (lambda m: m.generate(["a"], num_beam=2), TypeError, "'num_beam'; did you mean 'num_beams"),
        (lambda m: m.generate(["a"], method="beem"), UsageError, "did you mean 'beam'"),
        (lambda m: m.generate(["a"], max_len=9), TypeError, "'max_len'; did you mean 'max_length"),
        (lambda m: m.generate(["a"], num_outputs=2), UsageError, "greedy gives at most 1"),
        (
            lambda m: m.generate(["a"], num_beams=4, num_outputs=4),
            UsageError,
            "^num_beams has no effect on greedy decoding: add method='beam'$",
        ),
        (lambda m: m.generate(["a"], beam_rules="t5x"), UsageError, "beam_rules has no effect"),
        (
            lambda m: m.generate(["a"], method="beam", temperature=0.5),
            UsageError,
            "^temperature has no effect on beam decoding: add method='sample'$",
        ),
        (
            lambda m: m.generate(["a"], max_new_tokens=9),
            TypeError,
            "^no argument 'max_new_tokens'; here it is max_length=N$",
        ),
        (lambda m: m.generate(["a"], do_sample=True), TypeError, "here it is method='sample'$"),
        (lambda m: m.generate(["a"], num_return_sequences=2), TypeError, "is num_outputs=N$"),
        (lambda m: m.generate(["a"], max_length=0), UsageError, "max_length = 0: must be at lea"),
        (lambda m: m.generate(["a"], seed=-1), UsageError, "seed = -1: must be from 0"),
    ],
)
def test_what_a_model_cannot_do(run_dir, call, error, message):
    with pytest.raises(error, match=message) as e:
        call(load_model(run_dir))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": 7}, "no step 7 under .*; there: 2, 1000"),
        ({"checkpoint": -1}, "^checkpoint = -1: give 'latest', 'best' or a step$"),
        ({"checkpoint": "lastest"}, "^checkpoint = 'lastest': give 'latest', 'best' or a step$"),
        ({"checkpoint": "all"}, "^checkpoint = 'all': give"),
        ({"checkpoint": "2,1000"}, "^checkpoint = '2,1000': give"),
        ({"checkpoint": [1000]}, r"^checkpoint = \[1000\]: give"),
        ({"checkpoint": None}, "^checkpoint = None: give"),
        ({"checkpoint": True}, "^checkpoint = True: give"),
        ({"checkpoint": 2.0}, r"^checkpoint = 2\.0: give"),
        ({"mesh": {"modal": 1}}, "no axis 'modal'; did you mean 'model'"),
        ({"mesh": "model=2"}, "^mesh = 'model=2': give devices along each axis, such as {'fsdp': "),
        ({"mesh": {"model": "2"}}, "^mesh = {'model': '2'}: give devices"),
        ({"mesh": {"data": -1, "model": -1}}, "^mesh = .*: give devices"),
    ],
)
def test_what_cannot_be_loaded(run_dir, options, message):
    with pytest.raises(UsageError, match=message) as e:
        load_model(run_dir, **options)
    assert "\n" not in str(e.value)


def test_every_field_of_decoding_belongs_to_a_method_or_to_all():
    """A field that `generate` does not know would be a KeyError in a notebook."""
    fields = {field.name for field in dataclasses.fields(DecodeConfig)}
    assert fields == {"method", "num_outputs", *METHOD_OF}


def test_other_directories(shared_data, tmp_path):
    """A checkpoint of another program is named with the command that converts it."""
    foreign = shared_data / "checkpoints"
    for path, kind in (
        (foreign / "hf" / "t5_v11_sharded", "hf"),
        (foreign / "t5x" / "t5x_legacy_scanned_v11" / "checkpoint_5", "t5x"),
        (foreign / "t5x" / "t5x_orbax_unscanned_v11" / "checkpoint_5", "t5x"),
    ):
        with pytest.raises(UsageError) as e:
            load_model(path)
        assert f"python -m t5x_lite convert --from={kind} {path} --to=MODEL_DIR" in str(e.value)
    with pytest.raises(UsageError, match=r"is not a run: it has no model\.json"):
        load_model(tmp_path)
    with pytest.raises(UsageError, match="is not a directory"):
        load_model(tmp_path / "nothing")
    with pytest.raises(TypeError, match=r"^model_dir is NoneType; give a directory's path$"):
        load_model(None)
    with pytest.raises(UsageError, match="hf download google/flan-t5-base --local-dir DIR"):
        load_model("google/flan-t5-base")


def test_a_directory_of_t5x_with_a_config_json_is_t5xs(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoint_100").mkdir()
    with pytest.raises(UsageError, match=r"convert --from=t5x \S+ --to=MODEL_DIR"):
        load_model(tmp_path)


def test_a_checkpoint_in_place_of_its_run(run_dir):
    with pytest.raises(UsageError) as e:
        load_model(run_dir / "checkpoints" / "1000")
    assert f"give '{run_dir}', and 1000 as the checkpoint" in str(e.value)


def test_only_warnings_on_stderr(run_dir, repo):
    """In a plain interpreter, whose environment says nothing of TensorFlow."""
    code = "import sys\nfrom t5x_lite import load_model\nprint(load_model(sys.argv[1]).step)\n"
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    result = subprocess.run(
        [sys.executable, "-c", code, run_dir],
        check=True,
        cwd=repo,
        env=inherited,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (result.stdout, result.stderr) == ("1000\n", "")


def test_import_of_the_package_loads_nothing(repo):
    code = (
        "import sys, t5x_lite\n"
        "heavy = {'jax', 'flax', 'numpy', 'seqio', 'tensorflow'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=repo)
    with pytest.raises(AttributeError, match="'t5x_lite' has no attribute 'load_modell'"):
        t5x_lite.load_modell  # noqa: B018
    assert t5x_lite.load_model is load_model
