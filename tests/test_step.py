"""The train step against T5X's own trajectory, and against itself cut, padded and sharded."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from t5x_lite import optimizers, step
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.partitioning import make_partitioning

ONE_DEVICE = make_partitioning({"data": 1}, devices=jax.devices()[:1])
TINY = T5Config(
    vocab_size=64,
    d_model=16,
    d_ff=32,
    d_kv=4,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.1,
)


def make_step(model, optimizer_config, loss_config=None, partitioning=ONE_DEVICE):
    """The jitted step and its optimizer."""
    optimizer = optimizers.make_optimizer(optimizer_config, t5.logical_axes(model))
    schedule = optimizers.make_schedule(optimizer_config)
    loss_config = loss_config or step.LossConfig()
    bound = functools.partial(
        step.train_step, model, loss_config, optimizer, schedule, partitioning
    )
    return jax.jit(bound), optimizer


@functools.cache
def init_state(model, optimizer_config):
    """A fresh state from a fixed key."""
    optimizer = optimizers.make_optimizer(optimizer_config, t5.logical_axes(model))
    return jax.jit(functools.partial(step.init_state, model, optimizer))(jax.random.key(0))


def relative_l2(a, b) -> float:
    """The distance of two trees as a share of the second's norm."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def flatten(params) -> dict:
    """Parameters under T5X's unscanned names."""
    flat = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "/layers/" in name:
            for i, layer in enumerate(np.asarray(value)):
                flat[name.replace("/layers/", f"/layers_{i}/")] = layer
        else:
            flat[name] = np.asarray(value)
    return flat


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("packing", ["packed", "unpacked"])
@pytest.mark.parametrize(
    ("schedule", "base", "warmup"),
    [("base1_warmup10000", 1.0, 10000), ("base0.03_warmup10", 0.03, 10)],
)
def test_twenty_steps_equal_t5x(shared_data, schedule, base, warmup, packing, scan_layers):
    directory = shared_data / "checkpoints" / "t5x" / "t5x_training_trajectory"
    facts = json.loads((directory / "trajectory.json").read_text())
    shape = facts["hyperparameters"]["config"]
    model = T5Config(
        vocab_size=shape["vocab_size"],
        d_model=shape["d_model"],
        d_ff=shape["d_ff"],
        d_kv=shape["d_kv"],
        num_heads=shape["num_heads"],
        num_encoder_layers=shape["num_layers"],
        num_decoder_layers=shape["num_decoder_layers"],
        scan_layers=scan_layers,
    )
    run = facts["runs"][f"{packing}_{schedule}"]
    optimizer_config = optimizers.OptimizerConfig(learning_rate=base, warmup_steps=warmup)
    # T5X differentiates the plain sum.
    loss_config = step.LossConfig(z_loss=1e-4, normalizing_factor=None)
    train_step, optimizer = make_step(model, optimizer_config, loss_config)
    params = jax.tree.map(
        jnp.asarray, references.nest(dict(np.load(directory / "initial_params.npz")))
    )
    state = step.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    batches = dict(np.load(directory / f"batches_{packing}.npz"))
    for i in range(20):
        batch = {name: array[i] for name, array in batches.items()}
        state, scalars = train_step(state, batch, jax.random.key(0))
        # T5X reports the sum with its z-loss.
        total = scalars["loss_sum"] + scalars["z_loss_sum"]
        np.testing.assert_allclose(total, run["loss_sum"][i], rtol=1e-5)
        np.testing.assert_allclose(scalars["z_loss_sum"], run["z_loss_sum"][i], rtol=1e-4)
        np.testing.assert_allclose(scalars["learning_rate"], run["learning_rate"][i], rtol=1e-6)
        np.testing.assert_allclose(scalars["grad_norm"], run["grad_global_norm"][i], rtol=1e-4)
        assert scalars["num_tokens"] == run["num_target_tokens"][i]
        accuracy = scalars["num_correct"] / scalars["num_tokens"]
        np.testing.assert_allclose(accuracy, run["accuracy"][i], rtol=1e-6)
    found = flatten(state.params)
    if schedule == "base0.03_warmup10":
        expected = np.load(directory / f"final_params_{packing}_{schedule}.npz")
        assert sorted(expected) == sorted(found)
        for name in expected:
            assert relative_l2(found[name], expected[name]) < 1e-5, name
    else:
        scales = np.load(directory / f"final_norm_scales_{packing}_{schedule}.npz")
        assert len(scales.files) > 5
        for name in scales:
            assert relative_l2(found[name], scales[name]) < 1e-5, name
        for name, sums in run["final_param_checksums"].items():
            value = found[name].astype(np.float64)
            np.testing.assert_allclose(np.abs(value).sum(), sums["abs_sum"], rtol=1e-5)
            # A sum of cancelling terms is as exact as its terms are.
            np.testing.assert_allclose(value.sum(), sums["sum"], atol=1e-5 * sums["abs_sum"])


def random_batch(seed, rows=8, lengths=(12, 9)):
    """Rows of different lengths, padded with 0."""
    rng = np.random.default_rng(seed)

    def tokens(length):
        ids = rng.integers(2, 64, (rows, length), dtype=np.int32)
        real = rng.integers(2, length + 1, (rows, 1))
        return np.where(np.arange(length) < real, ids, 0).astype(np.int32)

    targets = tokens(lengths[1])
    return {
        "encoder_input_tokens": tokens(lengths[0]),
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
def test_accumulation_equals_the_whole_batch(num_microbatches):
    """Microbatches have unequal numbers of tokens; AdamW, since Adafactor forgives a scale."""
    model = dataclasses.replace(TINY, dropout_rate=0.0)
    config = optimizers.OptimizerConfig(
        name="adamw", schedule="constant", learning_rate=1e-3, clip_global_norm=0.5
    )
    whole, _ = make_step(model, config)
    cut, _ = make_step(model, config, step.LossConfig(num_microbatches=num_microbatches))
    start = init_state(model, config)
    batch, key = random_batch(0), jax.random.key(1)
    per_row = (batch["decoder_target_tokens"] > 0).sum(1)
    per_microbatch = [per_row[i::num_microbatches].sum() for i in range(num_microbatches)]
    assert len(set(per_microbatch)) > 1
    (one, one_sums), (two, two_sums) = whole(start, batch, key), cut(start, batch, key)
    moved = relative_l2(one.params, start.params)
    assert relative_l2(two.params, one.params) < 1e-3 * moved
    for name in one_sums:
        np.testing.assert_allclose(two_sums[name], one_sums[name], rtol=2e-6)


def test_padding_changes_no_loss_and_no_update():
    model = dataclasses.replace(TINY, dropout_rate=0.0)
    config = optimizers.OptimizerConfig(learning_rate=0.1)
    train_step, _ = make_step(model, config)
    start = init_state(model, config)
    batch = random_batch(1)
    wider = {name: np.pad(array, ((0, 0), (0, 5))) for name, array in batch.items()}
    key = jax.random.key(1)
    (one, one_sums), (two, two_sums) = train_step(start, batch, key), train_step(start, wider, key)
    np.testing.assert_allclose(two_sums["loss_sum"], one_sums["loss_sum"], rtol=1e-6)
    assert two_sums["num_tokens"] == one_sums["num_tokens"]
    assert relative_l2(two.params, one.params) < 1e-6


def test_dropout_follows_the_key_and_the_step():
    train_step, _ = make_step(TINY, optimizers.OptimizerConfig())
    state = init_state(TINY, optimizers.OptimizerConfig())
    batch = random_batch(2)

    def loss(state, seed):
        return float(train_step(state, batch, jax.random.key(seed))[1]["loss_sum"])

    later = state._replace(step=state.step + 1)
    assert loss(state, 0) == loss(state, 0)
    assert len({loss(state, 0), loss(state, 1), loss(later, 0)}) == 3


def test_normalizing_factor_divides_the_gradient():
    model = dataclasses.replace(TINY, dropout_rate=0.0)
    batch, key = random_batch(3), jax.random.key(0)
    norms = {}
    for factor in (None, 10.0, step.REAL_TARGET_TOKENS):
        loss_config = step.LossConfig(normalizing_factor=factor)
        train_step, _ = make_step(model, optimizers.OptimizerConfig(), loss_config)
        state = init_state(model, optimizers.OptimizerConfig())
        norms[factor] = float(train_step(state, batch, key)[1]["grad_norm"])
    tokens = (batch["decoder_target_tokens"] > 0).sum()
    np.testing.assert_allclose(norms[10.0], norms[None] / 10, rtol=1e-5)
    np.testing.assert_allclose(norms[step.REAL_TARGET_TOKENS], norms[None] / tokens, rtol=1e-5)
    with pytest.raises(UsageError, match="LOSS_NORMALIZING_FACTOR"):
        step.LossConfig(normalizing_factor="AVERAGE")


def test_eval_step_splits_text_from_the_rest():
    model = dataclasses.replace(TINY, dropout_rate=0.0)
    params = init_state(model, optimizers.OptimizerConfig()).params
    batch = random_batch(4)
    text_ids = np.arange(64) < 50
    sums = jax.jit(functools.partial(step.eval_step, model, ONE_DEVICE))(params, batch, text_ids)
    logits = np.asarray(t5.apply(model, params, batch), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = batch["decoder_target_tokens"]
    loss = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    real = targets > 0
    text = real & (targets < 50)
    np.testing.assert_allclose(sums["loss_sum"], loss[real].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["text_loss_sum"], loss[text].sum(), rtol=1e-5)
    assert (sums["num_tokens"], sums["num_text_tokens"]) == (real.sum(), text.sum())
    assert sums["num_correct"] == (logits.argmax(-1) == targets)[real].sum()


MESHED = """
import functools, json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
sys.path.insert(0, "tests")
import test_step
from t5x_lite import optimizers, step
from t5x_lite.models import t5
from t5x_lite.partitioning import make_partitioning

losses = {}
for shape, devices in (({"data": 1}, 1), ({"data": 4, "model": 2}, 8)):
    partitioning = make_partitioning(shape, devices=jax.devices()[:devices])
    config = optimizers.OptimizerConfig(learning_rate=0.1, min_dim_size_to_factor=16)
    axes = t5.logical_axes(test_step.TINY)
    optimizer = optimizers.make_optimizer(config, axes)
    init = functools.partial(step.init_state, test_step.TINY, optimizer)
    abstract = jax.eval_shape(init, jax.random.key(0))
    state_axes = step.TrainState(
        (), axes, optimizers.optimizer_state_axes(abstract.opt_state, axes)
    )
    shardings = partitioning.shardings(state_axes)
    partitioning.check_divisible(abstract, state_axes)
    whole = partitioning.replicated
    train_step = jax.jit(
        functools.partial(
            step.train_step,
            test_step.TINY,
            step.LossConfig(),
            optimizer,
            optimizers.make_schedule(config),
            partitioning,
        ),
        in_shardings=(shardings, partitioning.batch, whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    run = []
    for i in range(10):
        batch = partitioning.shard_batch(test_step.random_batch(i))
        state, scalars = train_step(state, batch, jax.random.key(7))
        run.append(float(scalars["loss_sum"] / scalars["num_tokens"]))
    losses[devices] = run
kernel = state.params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
rows = state.opt_state.v_row["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
columns = state.opt_state.v_col["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
losses["shard_shapes"] = [
    x.addressable_shards[0].data.shape for x in (kernel, rows, columns)
]
print(json.dumps(losses))
"""


def test_eight_devices_equal_one(repo):
    """Data 4 x model 2 with dropout on, in a process that has 8 virtual devices."""
    result = subprocess.run(
        [sys.executable, "-c", MESHED],
        cwd=repo,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    np.testing.assert_allclose(found["8"], found["1"], rtol=1e-5)
    assert found["1"][-1] < found["1"][0]
    # [layers, embed, mlp]: mlp is split in two, and so is the factor that keeps it.
    assert found["shard_shapes"] == [[2, 16, 16], [2, 16], [2, 16]]


def test_clipping_is_by_the_norm_before_it():
    gradient = {"a": jnp.array([3.0, 4.0])}
    clipped, _ = optax.clip_by_global_norm(1.0).update(gradient, optax.EmptyState())
    np.testing.assert_allclose(clipped["a"], [0.6, 0.8], rtol=1e-6)
