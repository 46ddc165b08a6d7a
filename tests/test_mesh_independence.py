"""A run's results do not depend on its mesh: 20 steps with dropout and packing on each."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

MESHES = {
    "one": {"data": 1},
    "2x2": {"fsdp": 2, "model": 2},
    "4x1": {"data": 4},
    "fsdp 4": {"fsdp": 4},
    "1x4": {"model": 4},
    "eight": {"data": 2, "fsdp": 2, "model": 2},
}

# Trains on every mesh from the same parameters, saves on the largest and restores on all.
SCRIPT = """
import json, math, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from t5x_lite import setup
from t5x_lite.checkpoints import Checkpoints
from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import OptimizerConfig
from t5x_lite.partitioning import make_partitioning
from t5x_lite.run_config import DataConfig, TrainConfig
from t5x_lite.step import LossConfig

meshes, optimizer, remat_policy, folder = json.loads(sys.argv[1]), *sys.argv[2:]
model = T5Config(
    vocab_size=64, d_model=16, d_ff=32, d_kv=4, num_heads=4, num_encoder_layers=2,
    num_decoder_layers=2, dropout_rate=0.1, remat_policy=remat_policy,
)
optimizer = OptimizerConfig(
    optimizer, schedule="constant", learning_rate=0.01, min_dim_size_to_factor=8,
    clip_global_norm=1.0,
)
data = DataConfig("unused", {"inputs": 24, "targets": 12}, batch_size=16)


def packed(rng, length, side):
    # Two examples in a row, then padding.
    ids = rng.integers(2, 64, (16, length), dtype=np.int32)
    first, second = rng.integers(2, length // 2, (2, 16))
    place = np.arange(length)
    segments = np.where(place < first[:, None], 1, 2) * (place < (first + second)[:, None])
    positions = np.where(segments == 2, place - first[:, None], place)
    segments, positions = (x.astype(np.int32) for x in (segments, positions * (segments > 0)))
    return ids * (segments > 0), {f"{side}_segment_ids": segments, f"{side}_positions": positions}


def batch_of(step):
    rng = np.random.default_rng(step)
    inputs, encoder = packed(rng, 24, "encoder")
    targets, decoder = packed(rng, 12, "decoder")
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1] * (decoder["decoder_positions"] > 0)
    return {
        "encoder_input_tokens": inputs, "decoder_target_tokens": targets,
        "decoder_input_tokens": shifted, "decoder_loss_weights": (targets > 0).astype(np.int32),
        **encoder, **decoder,
    }


def host(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


found, programs, first = {}, {}, None
for name, shape in meshes.items():
    loss = LossConfig(num_microbatches=2)
    config = TrainConfig("unused", model, optimizer, loss, data, 20, mesh=shape)
    devices = jax.devices()[: math.prod(shape.values())]
    programs[name] = setup.make_programs(config, setup.partitioning_of(config, devices))
    if name in ("one", "eight"):
        state = programs[name].init(jax.random.key(0))
        first = first or host(state)
        for a, b in zip(host(state), first, strict=True):
            np.testing.assert_array_equal(a, b)
    else:  # to compile it takes a while
        places = [x.sharding for x in jax.tree.leaves(programs[name].abstract_state)]
        leaves = jax.tree.map(jax.device_put, first, places)
        state = jax.tree.unflatten(jax.tree.structure(programs[name].abstract_state), leaves)
    found[name] = []
    for step in range(20):
        rows = programs[name].partitioning.shard_batch(batch_of(step))
        state, scalars = programs[name].train_step(state, rows, jax.random.key(7))
        found[name].append(float(scalars["loss_sum"] / scalars["num_tokens"]))

# `state` is that of the last mesh, the largest one.
checkpoints = Checkpoints(folder)
checkpoints.save(20, state, None)
checkpoints.wait()
saved = host(state)
for name, program in programs.items():
    restored = checkpoints.restore(20, program.abstract_state).state
    for a, b, wanted in zip(
        jax.tree.leaves(restored), saved, jax.tree.leaves(program.abstract_state), strict=True
    ):
        assert a.sharding == wanted.sharding
        np.testing.assert_array_equal(a, b)
checkpoints.close()
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("optimizer", "remat_policy", "meshes"),
    [("adafactor", "full", list(MESHES)), ("adamw", "none", ["one", "eight"])],
)
def test_losses_and_checkpoints_do_not_depend_on_the_mesh(
    optimizer, remat_policy, meshes, tmp_path
):
    """The state begins the same bit for bit, goes on within rounding, and is restored bit for bit
    on each mesh from the largest."""
    shapes = json.dumps({name: MESHES[name] for name in meshes})
    arguments = [shapes, optimizer, remat_policy, str(tmp_path / "checkpoints")]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found) == meshes
    for name, losses in found.items():
        assert len(losses) == 20
        np.testing.assert_allclose(losses, found["one"], rtol=1e-5, err_msg=name)
    assert found["one"][-1] < found["one"][0]
