"""Greedy decoding, sampling and beam search over tables of logits, against plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import decoding
from t5x_lite.decoding import DecodeConfig
from t5x_lite.errors import UsageError

VOCAB_SIZE = 11
EOS = 4


def make_table(seed: int, batch_size: int, max_length: int, vocab_size: int = VOCAB_SIZE):
    """Logits for each input, position, sum of the ids before (modulo) and last id."""
    rng = np.random.default_rng(seed)
    shape = (batch_size, max_length, vocab_size, vocab_size, vocab_size)
    return rng.normal(scale=2.0, size=shape).astype(np.float32)


def prefix_logits(table: np.ndarray, row: int, prefix: tuple[int, ...]) -> np.ndarray:
    """The logits after `prefix`, float64."""
    last = prefix[-1] if prefix else 0
    return table[row, len(prefix), sum(prefix) % table.shape[-1], last].astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def make_step(table: np.ndarray, num_rows: int):
    """A step whose cache holds each row's ids where they were written, and never moves them."""
    batch_size, max_length, vocab_size = table.shape[:3]
    table = jnp.asarray(table)

    def step(cache, tokens, position, sources):
        if sources is None:
            sources = jnp.broadcast_to(jnp.arange(num_rows)[:, None], cache.shape)
        cache = cache.at[:, :, position].set(tokens)
        own = jnp.take_along_axis(cache, sources, axis=1).at[:, :, position].set(tokens)
        earlier = jnp.arange(max_length) <= position
        sums = jnp.sum(jnp.where(earlier, own, 0), axis=-1) % vocab_size
        return table[jnp.arange(batch_size)[:, None], position, sums, tokens], cache

    return step, jnp.full((batch_size, num_rows, max_length), 7, jnp.int32)


def run(table: np.ndarray, config: DecodeConfig, keys=None, is_real=None) -> decoding.Decoded:
    """Decodes every input of the table."""
    batch_size, max_length = table.shape[:2]
    step, cache = make_step(table, decoding.rows_per_input(config))
    is_real = np.ones(batch_size, bool) if is_real is None else np.asarray(is_real)

    @jax.jit
    def go(keys):
        return decoding.decode(step, cache, config, is_real, max_length, keys_B=keys, eos_id=EOS)

    return jax.device_get(go(keys))


def padded(ids: tuple[int, ...], length: int) -> list[int]:
    return [*ids, *[0] * (length - len(ids))]


# ---- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_greedy_equals_a_loop_over_rows_and_tokens(seed):
    table = make_table(seed, batch_size=6, max_length=9)
    found = run(table, DecodeConfig())
    assert found.ids.dtype == np.int32
    ended = 0
    for row in range(6):
        prefix: tuple[int, ...] = ()
        score = 0.0
        while len(prefix) < 9 and EOS not in prefix:
            log_p = log_softmax(prefix_logits(table, row, prefix))
            prefix += (int(log_p.argmax()),)
            score += log_p.max()
        ended += EOS in prefix
        assert found.ids[row, 0].tolist() == padded(prefix, 9)
        assert found.scores[row, 0] == pytest.approx(score, abs=1e-5)
    assert ended


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
@pytest.mark.parametrize(("ends_at", "is_real", "calls"), [
    ((2, 4), (True, True), 5), ((0, 0), (True, True), 1), ((2, 99), (True, True), 8),
    ((2, 99), (True, False), 3),
])  # fmt: skip
def test_stops_when_every_row_has_ended(method, ends_at, is_real, calls):
    """And does not wait for inputs that only fill up the batch."""
    max_length, made = 8, []
    config = DecodeConfig(method, num_beams=1)

    def step(cache, tokens, position, sources):
        jax.debug.callback(lambda p: made.append(int(p)), position)
        ids = jnp.where(position >= jnp.asarray(ends_at), EOS, 5)
        return 40.0 * jax.nn.one_hot(ids, VOCAB_SIZE)[:, None], cache

    keys = jax.random.split(jax.random.key(0), 2)
    found = decoding.decode(
        step, (), config, jnp.asarray(is_real), max_length, keys_B=keys, eos_id=EOS
    )
    jax.effects_barrier()
    assert sorted(made) == list(range(calls))
    for row, (end, real) in enumerate(zip(ends_at, is_real, strict=True)):
        if real:
            expected = [5] * min(end, max_length) + [EOS] + [0] * max_length
            np.testing.assert_array_equal(found.ids[row, 0], expected[:max_length])


@pytest.mark.parametrize("size", [97, 256, 1280, 32128])
@pytest.mark.parametrize("k", [1, 8])
def test_top_k_equals_a_stable_sort(size, k):
    """With many equal values, of which the first are taken."""
    rng = np.random.default_rng(size)
    x = rng.integers(0, 50, (2, 3, size)).astype(np.float32)
    x[0] = rng.normal(size=(3, size))
    values, ids = jax.jit(decoding.top_k, static_argnums=1)(x, k)
    expected = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=-1))


# ---- sampling ------------------------------------------------------------------------------------


def filter_by_sorting(logits: np.ndarray, config: DecodeConfig) -> np.ndarray:
    """Hugging Face's processors in float64: temperature, top-k, top-p; False for what they cut."""
    logits = logits.astype(np.float64) / config.temperature
    order = np.argsort(-logits, kind="stable")
    if config.top_k:
        order = order[: config.top_k]
    p = np.exp(logits[order] - logits.max())
    p /= p.sum()
    before = np.cumsum(p) - p  # an id goes if those before it have top_p already
    kept = np.zeros(logits.size, bool)
    kept[order[(before < config.top_p) | (config.top_p == 1)]] = True
    return kept


@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 50, 2000])
@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
def test_filters_equal_sorting(temperature, top_k, top_p):
    config = DecodeConfig("sample", temperature=temperature, top_k=top_k, top_p=top_p)
    logits = np.random.default_rng(0).normal(scale=3, size=(3, 2, 1000)).astype(np.float32)
    found = np.asarray(decoding.filter_logits(jnp.asarray(logits), config))
    for index in np.ndindex(3, 2):
        kept = filter_by_sorting(logits[index], config)
        np.testing.assert_array_equal(np.isfinite(found[index]), kept)
        np.testing.assert_allclose(found[index][kept], logits[index][kept] / temperature, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig("sample", num_outputs=20_000),
        DecodeConfig("sample", num_outputs=20_000, temperature=0.5, top_k=6, top_p=0.8),
    ],
)
def test_draws_have_the_filtered_probabilities(config):
    """Shares of 20,000 draws within five standard deviations, and none of what was cut."""
    table = make_table(5, batch_size=2, max_length=1) / 2
    found = run(table, config, jax.random.split(jax.random.key(0), 2))
    for row in range(2):
        logits = prefix_logits(table, row, ()) / config.temperature
        kept = filter_by_sorting(prefix_logits(table, row, ()), config)
        p = np.where(kept, np.exp(logits), 0)
        p /= p.sum()
        shares = np.bincount(found.ids[row, :, 0], minlength=VOCAB_SIZE) / 20_000
        assert (np.abs(shares - p) <= 5 * np.sqrt(p * (1 - p) / 20_000)).all()


def test_samples_score_by_the_model_best_first_and_depend_on_their_key_alone():
    config = DecodeConfig("sample", num_outputs=5, temperature=2.0, top_k=9)
    table = make_table(6, batch_size=4, max_length=7)
    keys = jax.random.split(jax.random.key(1), 4)
    found = run(table, config, keys)
    assert len({tuple(ids) for ids in found.ids.reshape(-1, 7).tolist()}) > 10
    for row in range(4):
        assert (np.diff(found.scores[row]) <= 0).all()
        for ids, score in zip(found.ids[row].tolist(), found.scores[row], strict=True):
            end = ids.index(EOS) + 1 if EOS in ids else 7
            assert not any(ids[end:])
            total = sum(
                log_softmax(prefix_logits(table, row, tuple(ids[:i])))[ids[i]] for i in range(end)
            )
            assert score == pytest.approx(total, abs=1e-5)
    order = np.array([2, 0, 3])
    other = run(table[order], config, keys[order])
    np.testing.assert_array_equal(other.ids, found.ids[order])


# ---- beam search ---------------------------------------------------------------------------------


def penalty(rules: str, length: int, alpha: float) -> float:
    return (length if rules == "huggingface" else (5 + length) / 6) ** alpha


def every_sequence(table: np.ndarray, row: int) -> dict[tuple[int, ...], float]:
    """All sequences that end, or are of full length, with their log probabilities."""
    max_length, vocab_size = table.shape[1], table.shape[-1]
    out: dict[tuple[int, ...], float] = {}
    live = {(): 0.0}
    for _ in range(max_length):
        longer = {}
        for (prefix, score), token in itertools.product(live.items(), range(vocab_size)):
            log_p = log_softmax(prefix_logits(table, row, prefix))[token]
            (out if token == EOS else longer)[(*prefix, token)] = score + log_p
        live = longer
    return out | live


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("rules", ["t5x", "huggingface"])
def test_search_as_wide_as_the_space_finds_the_best(rules, alpha):
    """By enumeration; T5X's rules return only what has ended, as long as anything has."""
    table = make_table(7, batch_size=3, max_length=3, vocab_size=5)
    config = DecodeConfig("beam", 128, alpha, rules, num_outputs=5)
    found = run(table, config)
    for row in range(3):
        scored = {
            ids: log_p / penalty(rules, len(ids), alpha)
            for ids, log_p in every_sequence(table, row).items()
            if ids[-1] == EOS or rules == "huggingface"
        }
        best = sorted(scored, key=scored.__getitem__, reverse=True)[:5]
        assert found.ids[row].tolist() == [padded(ids, 3) for ids in best]
        np.testing.assert_allclose(found.scores[row], [scored[ids] for ids in best], atol=1e-5)


def beam_by_hand(
    table: np.ndarray, row: int, config: DecodeConfig
) -> list[tuple[float, tuple[int, ...]]]:
    """Lists of (score, ids), one input at a time, by the rules as they are told in DecodeConfig."""
    max_length, n = table.shape[1], config.num_beams
    huggingface = config.beam_rules == "huggingface"
    live, finished = [(0.0, ())], []
    for length in range(1, max_length + 1):
        candidates = []
        for score, ids in live:
            log_p = log_softmax(prefix_logits(table, row, ids))
            candidates += [(score + log_p[token], (*ids, token)) for token in range(len(log_p))]
        candidates = sorted(candidates, reverse=True)[: 2 * n]
        ending = candidates[:n] if huggingface else candidates
        done = [c for c in ending if c[1][-1] == EOS or (huggingface and length == max_length)]
        live = [c for c in candidates if c[1][-1] != EOS][:n]
        scored = [
            (s / penalty(config.beam_rules, length, config.length_penalty), i) for s, i in done
        ]
        finished = sorted(finished + scored, reverse=True)[:n]
        if len(finished) == n:
            bound = live[0][0] / penalty("t5x", max_length + 1, config.length_penalty)
            if huggingface or finished[-1][0] > bound:
                break
    return finished or live


@pytest.mark.parametrize("rules", ["t5x", "huggingface"])
@pytest.mark.parametrize(("num_beams", "alpha", "seed"), [(1, 0.6, 0), (2, 1.0, 1), (4, 0.6, 2)])
def test_beam_search_equals_lists_of_beams(rules, num_beams, alpha, seed):
    table = make_table(seed, batch_size=5, max_length=8)
    table[:3, ..., EOS] += 2  # some rows end soon, others late or never
    table[4, ..., EOS] -= 30
    config = DecodeConfig("beam", num_beams, alpha, rules, num_outputs=num_beams)
    found = run(table, config)
    lengths = set()
    for row in range(5):
        expected = beam_by_hand(table, row, config)
        for slot, (score, ids) in enumerate(expected):
            assert found.ids[row, slot].tolist() == padded(ids, 8)
            assert found.scores[row, slot] == pytest.approx(score, abs=2e-5)
            lengths.add(len(ids))
        # Under T5X's rules fewer may have ended than there are beams.
        assert (found.scores[row, len(expected) :] == -1e7).all()
        assert not found.ids[row, len(expected) :].any()
    assert len(lengths) > 2
    fewer = run(table, DecodeConfig("beam", num_beams, alpha, rules))
    np.testing.assert_array_equal(fewer.ids, found.ids[:, :1])


# ---- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "beams"}, "method = 'beams'.*'beam'"),
        ({"beam_rules": "hf"}, "beam_rules = 'hf'.*t5x, huggingface"),
        ({"num_beams": 0}, "num_beams = 0"),
        ({"num_beams": 2.0}, "num_beams = 2.0"),
        ({"length_penalty": -1.0}, "length_penalty = -1.0"),
        ({"temperature": 0.0}, "temperature = 0.0.*'greedy'"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"num_outputs": 2}, "num_outputs = 2: greedy gives at most 1"),
        ({"method": "beam", "num_outputs": 5}, "num_outputs = 5: beam gives at most 4"),
    ],
)
def test_what_decoding_cannot_follow_names_the_field(values, message):
    with pytest.raises(UsageError, match=message) as e:
        DecodeConfig(**values)
    assert "\n" not in str(e.value)


def test_more_beams_than_ids():
    with pytest.raises(UsageError, match="num_beams = 12: the vocabulary has 11 ids"):
        DecodeConfig("beam", num_beams=12).check(11)
    DecodeConfig("beam", num_beams=11).check(11)
    DecodeConfig("greedy", num_beams=12).check(11)
