"""Predictor against Hugging Face and T5X, and what it does with rows of any number and length."""

import functools
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from t5x_lite import decoding, predict
from t5x_lite.decoding import DecodeConfig
from t5x_lite.errors import UsageError
from t5x_lite.models import cached, t5
from t5x_lite.models.config import T5Config
from t5x_lite.partitioning import make_partitioning
from t5x_lite.predict import Predictor

TINY = T5Config(
    vocab_size=61,
    d_model=16,
    d_ff=32,
    d_kv=4,
    num_heads=4,
    num_encoder_layers=1,
    num_decoder_layers=2,
)


@functools.cache
def tiny_params():
    """Parameters whose rows end after some ids, each after another number of them."""
    params = jax.jit(t5.init, static_argnums=0)(TINY, jax.random.key(1))
    kernel = params["decoder"]["logits_dense"]["kernel"]
    params["decoder"]["logits_dense"]["kernel"] = kernel.at[:, 1].mul(2.0) * 2.0
    return params


def tiny_params_on_host():
    """The same as numpy arrays, which any process may place on its devices."""
    return jax.tree.map(np.asarray, tiny_params())


def make_predictor(config: T5Config = TINY, **changes) -> Predictor:
    mesh = make_partitioning({"data": 1}, devices=jax.devices()[:1])
    sizes = {"batch_size": 4, "input_length": 30, "target_length": 10} | changes
    return Predictor(config, mesh, **sizes)


def make_rows(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, TINY.vocab_size, n, dtype=np.int32) for n in lengths]


# ---- Hugging Face --------------------------------------------------------------------------------

HF_FIXTURES = ["t5_v10", "t5_v11", "t5_v11_sharded", "mt5", "umt5"]


def load_hf(shared_data, name):
    """Configuration, parameters, unpadded inputs and golden results of a fixture."""
    directory = shared_data / "checkpoints" / "hf" / name
    config, params = references.load_hf(directory)
    golden = dict(np.load(directory / "golden.npz"))
    inputs = [
        ids[mask > 0]
        for ids, mask in zip(golden["input_ids"], golden["attention_mask"], strict=True)
    ]
    if name == "umt5":  # that version scales the decoder's output; these are without it
        golden |= np.load(directory / "golden_unscaled.npz")
    return config, params, inputs, golden


def after_end(ids: np.ndarray) -> np.ndarray:
    """True at the places behind the first end mark."""
    ends = ids == 1
    return np.cumsum(ends, axis=-1) - ends > 0


@pytest.mark.parametrize("name", HF_FIXTURES)
def test_equal_to_hugging_face(shared_data, name):
    """Greedy ids and their log likelihood; four beams with two length penalties, their scores."""
    config, params, inputs, golden = load_hf(shared_data, name)
    facts = json.loads((shared_data / "checkpoints" / "hf" / name / "golden.json").read_text())
    tolerance = 3 * facts["float32_vs_float64_beam_scores_max_abs"]
    length = golden["greedy_ids"].shape[1] - 1  # without the start
    predictor = make_predictor(config, batch_size=3, input_length=12, target_length=length)
    greedy = predictor.generate(params, inputs)
    np.testing.assert_array_equal([p.ids[0] for p in greedy], golden["greedy_ids"][:, 1:])
    beams = {}
    for length_penalty in (1.0, 0.6):
        decode = DecodeConfig("beam", 4, length_penalty, "huggingface", num_outputs=4)
        beams[length_penalty] = found = predictor.generate(params, inputs, decode)
        expected = golden[f"beam_ids_lp{length_penalty}"][..., 1:]
        expected = np.where(after_end(expected), 0, expected)
        np.testing.assert_array_equal([p.ids for p in found], expected)
        scores = golden[f"beam_scores_lp{length_penalty}"]
        np.testing.assert_allclose([p.scores for p in found], scores, rtol=0, atol=tolerance)

    # Greedy's scores and beams' undivided ones are what scoring gives without decoding.
    for predictions, divided in ((greedy, False), (beams[1.0], True)):
        targets = [p.ids[0][~after_end(p.ids[0])] for p in predictions]
        scores = predictor.score(params, inputs, targets)
        scores /= [len(t) if divided else 1 for t in targets]
        np.testing.assert_allclose(scores, [p.scores[0] for p in predictions], rtol=1e-5)


def test_score_equals_hugging_faces_logits(shared_data):
    config, params, inputs, golden = load_hf(shared_data, "t5_v11")
    logits = golden["logits"].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    # The decoder was given these ids shifted right; its logits score the ids themselves.
    targets = golden["decoder_input_ids"][:, 1:]
    lengths = [6, 3, 0]
    expected = [log_p[row, np.arange(n), targets[row, :n]].sum() for row, n in enumerate(lengths)]
    given = [targets[row, :n] for row, n in enumerate(lengths)]
    found = make_predictor(config).score(params, inputs, given)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


# ---- T5X -----------------------------------------------------------------------------------------

# Each with one of the two length penalties.
T5X_FIXTURES = {
    "t5x_legacy_unscanned_v10": 0.6,
    "t5x_legacy_unscanned_v11": 1.0,
    "t5x_legacy_scanned_v11": 1.0,
    "t5x_orbax_unscanned_v11": 0.6,
    "t5x_orbax_scanned_v11": 0.6,
}


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def decode_with_end(config, params, inputs, max_length, decode, eos_id):
    """The fixtures end with another id than 1."""
    num_rows = decoding.rows_per_input(decode)
    encoded = t5.encode(config, params, inputs)
    model_step, cache = cached.start(config, params, encoded, inputs, num_rows, max_length)

    def step(*state):
        hidden, cache = model_step(*state)
        return hidden @ t5.output_kernel(config, params), cache

    is_real = jnp.ones(len(inputs), bool)
    return decoding.decode(step, cache, decode, is_real, max_length, eos_id=eos_id)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # of Orbax's older API
@pytest.mark.parametrize(("name", "alpha"), list(T5X_FIXTURES.items()))
def test_equal_to_t5x(shared_data, name, alpha):
    """Four beams and a single one, and the score of given targets."""
    directory = shared_data / "checkpoints" / "t5x" / name
    config, params = references.load_t5x(directory)
    golden = np.load(directory / "golden_decode.npz")
    inputs, eos_id = golden["encoder_input_tokens"], int(golden["eos_id"])
    decode = DecodeConfig("beam", 4, alpha, num_outputs=4)
    found = decode_with_end(config, params, inputs, 12, decode, eos_id)
    # There the best beam is the last.
    scores = golden[f"beam_scores_alpha{alpha}"][:, ::-1]
    np.testing.assert_allclose(found.scores, scores, rtol=0, atol=2e-5)
    real = scores > -1e6
    expected = golden[f"beam_ids_alpha{alpha}"][:, ::-1]
    np.testing.assert_array_equal(np.asarray(found.ids)[real], expected[real])
    one = decode_with_end(config, params, inputs, 12, DecodeConfig("beam", 1), eos_id)
    np.testing.assert_array_equal(one.ids[:, 0], golden["beam1_ids"])
    np.testing.assert_allclose(one.scores[:, 0], golden["beam1_scores"], rtol=0, atol=2e-5)

    batch = np.load(directory / "golden.npz")
    lengths = golden["decoder_loss_weights"].sum(axis=1)
    targets = [t[:n] for t, n in zip(batch["decoder_target_tokens"], lengths, strict=True)]
    assert np.array_equal(batch["encoder_input_tokens"], inputs)
    unpadded = [ids[ids > 0] for ids in inputs]
    scores = make_predictor(config).score(params, unpadded, targets)
    np.testing.assert_allclose(scores, golden["score_batch"], rtol=0, atol=5e-5)


# ---- rows of any number and length ---------------------------------------------------------------

DECODINGS = [
    DecodeConfig(),
    DecodeConfig("beam", num_outputs=2),
    DecodeConfig("sample", num_outputs=3, top_k=20),
]


@pytest.mark.parametrize("decode", DECODINGS, ids=lambda d: d.method)
def test_a_row_depends_on_nothing_beside_it(decode):
    """Every row alone, in another order, another batch size, after other rows: the same result."""
    inputs = make_rows([3, 30, 1, 8, 27, 7, 0, 2])
    together = make_predictor().generate(tiny_params(), inputs, decode, seed=5, first_index=2)
    assert len(together) == len(inputs)
    lengths = set()
    for prediction in together:
        assert prediction.ids.shape == (decode.num_outputs, 10)
        assert prediction.ids.dtype == np.int32
        assert prediction.scores.shape == (decode.num_outputs,)
        assert prediction.scores.dtype == np.float32
        lengths |= {int((ids > 0).sum()) for ids in prediction.ids}
    assert len(lengths) > 2
    one = make_predictor(batch_size=1)
    for i, ids in enumerate(inputs[:5]):
        (alone,) = one.generate(tiny_params(), [ids], decode, seed=5, first_index=2 + i)
        np.testing.assert_array_equal(alone.ids, together[i].ids)
        np.testing.assert_allclose(alone.scores, together[i].scores, rtol=1e-5)


def test_samples_differ_by_row_output_and_seed():
    inputs = make_rows([6]) * 2
    decode = DecodeConfig("sample", num_outputs=2, temperature=2.0)
    generate = functools.partial(make_predictor().generate, tiny_params(), inputs, decode)
    first, second = generate(seed=0), generate(seed=1)
    drawn = {tuple(ids) for p in (*first, *second) for ids in p.ids.tolist()}
    assert len(drawn) == 8


def test_scores_are_in_the_order_of_the_rows_and_blind_to_padding():
    """Against the whole logits, one row at a time."""
    inputs = make_rows([30, 1, 8, 7, 17, 2])
    targets = make_rows([1, 10, 0, 4, 9, 3], seed=1)
    found = make_predictor(batch_size=2).score(tiny_params(), inputs, targets)
    apply = jax.jit(t5.apply, static_argnums=0)
    for ids, target, score in zip(inputs, targets, found, strict=True):
        batch = {
            "encoder_input_tokens": np.pad(ids, (0, 33 - len(ids)))[None],
            "decoder_input_tokens": np.pad(target, (1, 11 - len(target)))[None],
        }
        logits = np.asarray(apply(TINY, tiny_params(), batch), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = log_p[np.arange(target.size), target].sum()
        assert score == pytest.approx(expected, abs=1e-4)


def test_samples_score_what_scoring_gives():
    inputs = make_rows([5, 2, 7])
    decode = DecodeConfig("sample", num_outputs=2, temperature=1.5, top_p=0.9)
    predictor = make_predictor()
    for ids, p in zip(inputs, predictor.generate(tiny_params(), inputs, decode), strict=True):
        targets = [row[~after_end(row)] for row in p.ids]
        expected = predictor.score(tiny_params(), [ids, ids], targets)
        np.testing.assert_allclose(p.scores, expected, rtol=0, atol=1e-4)


def test_one_program_for_each_shape(monkeypatch):
    """Lengths 1 to 30 in five buckets; a second pass compiles nothing."""
    traced = []
    encode = t5.encode

    def counted(config, params, tokens, *rest):
        traced.append(tokens.shape)
        return encode(config, params, tokens, *rest)

    monkeypatch.setattr(predict.t5, "encode", counted)
    predictor = make_predictor(batch_size=2, target_length=3)
    inputs = make_rows(list(range(1, 31)))
    predictor.generate(tiny_params(), inputs)
    assert sorted(traced) == [(2, 8), (2, 12), (2, 16), (2, 24), (2, 30)]
    predictor.generate(tiny_params(), inputs[::-1])
    make_predictor(batch_size=2, target_length=3).generate(tiny_params(), inputs[:5])
    assert len(traced) == 5


def test_no_rows_and_rows_that_are_too_long():
    predictor = make_predictor()
    assert predictor.generate(tiny_params(), []) == []
    assert predictor.score(tiny_params(), [], []).shape == (0,)
    with pytest.raises(ValueError, match="input 1 has 31 ids, more than 30"):
        predictor.generate(tiny_params(), make_rows([3, 31]))
    with pytest.raises(ValueError, match="target 0 has 11 ids, more than 10"):
        predictor.score(tiny_params(), make_rows([3]), make_rows([11]))
    with pytest.raises(ValueError, match="1 inputs and 2 targets"):
        predictor.score(tiny_params(), make_rows([3]), make_rows([3, 3]))
    with pytest.raises(UsageError, match="num_beams = 62: the vocabulary has 61 ids"):
        predictor.generate(tiny_params(), make_rows([3]), DecodeConfig("beam", num_beams=62))


# ---- several devices -----------------------------------------------------------------------------

MESHED = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
sys.path.insert(0, "tests")
import test_predict
from t5x_lite.partitioning import make_partitioning
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.predict import Predictor

out = {}
inputs = test_predict.make_rows([3, 6, 1, 8, 7, 4, 2])
targets = test_predict.make_rows([3, 8, 1, 4, 7, 6, 2], seed=1)
config = test_predict.TINY_EVEN
for shape, devices in (({"data": 1}, 1), ({"data": 4, "model": 2}, 8)):
    mesh = make_partitioning(shape, devices=jax.devices()[:devices])
    shardings = mesh.shardings(t5.logical_axes(config))
    params = jax.jit(t5.init, static_argnums=0, out_shardings=shardings)(config, jax.random.key(1))
    predictor = Predictor(config, mesh, batch_size=4, input_length=30, target_length=10)
    found = {"score": predictor.score(params, inputs, targets).tolist()}
    for decode in test_predict.DECODINGS:
        predictions = predictor.generate(params, inputs, decode)
        found[decode.method] = [p.ids.tolist() for p in predictions]
        found[decode.method + " scores"] = [p.scores.tolist() for p in predictions]
    out[devices] = found
try:
    Predictor(config, mesh, batch_size=6, input_length=30, target_length=10)
except UsageError as e:
    out["error"] = str(e)
print(json.dumps(out))
"""
TINY_EVEN = T5Config(**TINY.to_dict() | {"vocab_size": 256 * 3})


TWO_PROCESSES = """
import json, sys
import jax
rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
sys.path.insert(0, "tests")
import test_predict
from t5x_lite.partitioning import make_partitioning
from t5x_lite.predict import Predictor

mesh = make_partitioning()
params = jax.device_put(test_predict.tiny_params_on_host(), mesh.replicated)
predictor = Predictor(test_predict.TINY, mesh, batch_size=4, input_length=30, target_length=10)
inputs = test_predict.make_rows([3, 6, 1, 8, 7])
found = predictor.generate(params, inputs)
scores = predictor.score(params, inputs, inputs)
print(json.dumps([[p.ids.tolist() for p in found], scores.tolist()]))
"""


def test_every_process_gets_every_result(repo):
    """Two processes with a device each, the same rows in both, against this process alone."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(port)],
            cwd=repo,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    inputs = make_rows([3, 6, 1, 8, 7])
    expected = make_predictor().generate(tiny_params(), inputs)
    scores = make_predictor().score(tiny_params(), inputs, inputs)
    for process in processes:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        found = json.loads(stdout.splitlines()[-1])
        assert found[0] == [p.ids.tolist() for p in expected]
        np.testing.assert_allclose(found[1], scores, rtol=1e-5)


def test_eight_devices_equal_one(repo):
    """Data 4 x model 2, in a process that has 8 virtual devices."""
    result = subprocess.run(
        [sys.executable, "-c", MESHED],
        cwd=repo,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout)
    for name, expected in out["1"].items():
        if name.endswith(("score", "scores")):
            np.testing.assert_allclose(out["8"][name], expected, rtol=1e-5)
        else:
            assert out["8"][name] == expected, name
    assert "batch_size = 6: must be a multiple of the 4 parts" in out["error"]
