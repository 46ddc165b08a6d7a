"""Training goes on from a T5X checkpoint as T5X's own does.

The figures below were computed once by T5X itself: its source of 2026-04-21 (commit cc342d4) with
jax 0.10.2, flax 0.12.8, optax 0.2.8, orbax-checkpoint 0.12.8, clu 0.0.12, seqio 0.0.20 on Python
3.11, one CPU device, float32. Two packages that T5X imports and this run never calls (airio and
jestimator, which its setup.py takes from git) were empty modules. It was T5X's own code throughout:
`utils.create_checkpoint_manager_and_restore` (mode 'specific', dtype None, `use_orbax` for the
Orbax ones) restored `checkpoint_5` into `models.EncoderDecoderModel` over
`examples.t5.network.Transformer` or `examples.scalable_t5.network.Transformer` (scan_layers,
param_scan_axis 1), and five steps were made with the partitioned train step of `trainer.Trainer`:
dropout 0, z_loss 1e-4, label_smoothing 0, loss_normalizing_factor None, num_microbatches None,
`adafactor.Adafactor(decay_rate=0.8, step_offset=0,
logical_factor_rules=standard_logical_factor_rules())`, learning rate
`create_learning_rate_scheduler("constant * rsqrt_decay", base_learning_rate=0.02,
warmup_steps=7)`, batches as `batch_of_step` makes them.

`losses` are the sums "cross_ent_loss" of its metrics, `z_losses` its "z_loss". `moved` is what a
parameter's change over the five steps comes to, `statistics` Adafactor's afterwards, both brought
into our layout by hand and each told by two figures (see `fingerprint`).
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from t5x_lite import gin_utils, setup
from t5x_lite.__main__ import main
from t5x_lite.checkpoints import Checkpoints

FIRST_STEP, NUM_STEPS = 5, 5
LEARNING_RATES = (0.02 / 7**0.5, 0.02 / 7**0.5, 0.02 / 7**0.5, 0.02 / 8**0.5, 0.02 / 9**0.5)


@dataclasses.dataclass(frozen=True)
class Run:
    """What T5X gave for one checkpoint."""

    losses: tuple[float, ...]
    z_losses: tuple[float, ...]
    moved: dict[str, tuple[float, float]]
    statistics: dict[str, tuple[float, float]]


T5X = {
    "t5x_legacy_unscanned_v11": Run(
        losses=(204.455933, 189.84906, 191.550308, 186.233185, 179.992645),
        z_losses=(0.121018559, 0.118000843, 0.117850386, 0.117040582, 0.11719884),
        moved={
            "token_embedder/embedding": (3.0523044, -0.299886138),
            "encoder/layers/attention/query/kernel": (0.0223850457, 0.00110729549),
            "decoder/layers/encoder_decoder_attention/out/kernel": (0.188474863, -0.0230143275),
            "decoder/layers/mlp/wo/kernel": (0.187128918, 0.0887774347),
            "decoder/layers/pre_mlp_layer_norm/scale": (0.192068423, 0.255440088),
            "encoder/relpos_bias/rel_embedding": (0.0219142847, 0.0111922956),
            "decoder/logits_dense/kernel": (0.338984212, -0.0856524206),
        },
        statistics={
            "v_row/token_embedder/embedding": (0.738274263, 0.113567273),
            "v_col/token_embedder/embedding": (0.246091434, 0.00220949093),
            "v/encoder/layers/attention/query/kernel": (2993.49174, 24.1569454),
            "v/decoder/layers/encoder_decoder_attention/out/kernel": (582.230685, 3.51835244),
            "v_row/decoder/layers/mlp/wo/kernel": (16.6384142, -0.164388824),
            "v_col/decoder/layers/mlp/wo/kernel": (15.6596841, -0.0136768113),
            "v/decoder/layers/pre_mlp_layer_norm/scale": (31.717981, 0.512006536),
            "v/encoder/relpos_bias/rel_embedding": (1.78947597, 0.104357884),
            "v_row/decoder/logits_dense/kernel": (18.3149413, 0.608577099),
            "v_col/decoder/logits_dense/kernel": (54.9448206, 3.13453055),
        },
    ),
    "t5x_orbax_unscanned_v11": Run(
        losses=(191.790726, 185.129364, 192.765274, 185.668198, 183.153046),
        z_losses=(0.119924188, 0.120439336, 0.120804071, 0.118280284, 0.117364459),
        moved={
            "token_embedder/embedding": (1.6618646, 2.04726597),
            "encoder/layers/attention/query/kernel": (0.0304250224, 0.00644630659),
            "decoder/layers/encoder_decoder_attention/out/kernel": (0.130228433, -0.194898979),
            "decoder/layers/mlp/wo/kernel": (0.133635399, 0.0178421642),
            "decoder/layers/pre_mlp_layer_norm/scale": (0.125202836, -0.146815142),
            "encoder/relpos_bias/rel_embedding": (0.0231172077, 0.0134632036),
            "decoder/logits_dense/kernel": (0.345229925, -0.211737382),
        },
        statistics={
            "v/token_embedder/embedding": (110.854605, -1.14867729),
            "v/encoder/layers/attention/query/kernel": (3123.9765, -22.753284),
            "v/decoder/layers/encoder_decoder_attention/out/kernel": (1057.5174, 10.2385295),
            "v/decoder/layers/mlp/wo/kernel": (1530.46339, 8.90875022),
            "v/decoder/layers/pre_mlp_layer_norm/scale": (41.9056489, 2.59187693),
            "v/encoder/relpos_bias/rel_embedding": (3.93131867, 0.0488956615),
            "v/decoder/logits_dense/kernel": (2377.86241, 28.6060815),
        },
    ),
    "t5x_legacy_scanned_v11": Run(
        losses=(193.922745, 191.40889, 180.038437, 193.21312, 187.124298),
        z_losses=(0.121461987, 0.121502548, 0.121432886, 0.120229572, 0.119931385),
        moved={
            "token_embedder/embedding": (1.7081377, -2.11488243),
            "encoder/layers/attention/query/kernel": (0.029817218, -0.00459105196),
            "decoder/layers/encoder_decoder_attention/out/kernel": (0.128903729, 0.216662074),
            "decoder/layers/mlp/wo/kernel": (0.120233784, -0.0345042099),
            "decoder/layers/pre_mlp_layer_norm/scale": (0.10515187, -0.0685921606),
            "encoder/layers/relpos_bias/rel_embedding": (0.0350576348, 0.0365300076),
            "decoder/logits_dense/kernel": (0.362313006, -0.0416006404),
        },
        statistics={
            "v/token_embedder/embedding": (113.670447, 2.38445247),
            "v_row/encoder/layers/attention/query/kernel": (62.5362458, 2.15585305),
            "v_col/encoder/layers/attention/query/kernel": (75.0434915, 1.79765984),
            "v_col/decoder/layers/encoder_decoder_attention/out/kernel": (
                26.0382721,
                -0.0606604178,
            ),
            "v_row/decoder/layers/encoder_decoder_attention/out/kernel": (31.2459254, -0.234487667),
            "v_col/decoder/layers/mlp/wo/kernel": (20.0771958, -0.531510438),
            "v_row/decoder/layers/mlp/wo/kernel": (44.1698298, 0.569236947),
            "v/decoder/layers/pre_mlp_layer_norm/scale": (46.7775398, 0.212219669),
            "v/encoder/layers/relpos_bias/rel_embedding": (3.9887949, 0.311199137),
            "v/decoder/logits_dense/kernel": (2455.20401, -37.9364688),
        },
    ),
    "t5x_orbax_scanned_v11": Run(
        losses=(182.531281, 189.056931, 188.822693, 182.35965, 176.75943),
        z_losses=(0.12117067, 0.122641146, 0.121221252, 0.119503558, 0.12022204),
        moved={
            "token_embedder/embedding": (1.85382997, -0.348241487),
            "encoder/layers/attention/query/kernel": (0.0278881081, 0.0290269746),
            "decoder/layers/encoder_decoder_attention/out/kernel": (0.106409969, 0.0177820144),
            "decoder/layers/mlp/wo/kernel": (0.112510825, 0.113384439),
            "decoder/layers/pre_mlp_layer_norm/scale": (0.105952568, 0.107542569),
            "encoder/layers/relpos_bias/rel_embedding": (0.0360743678, 0.0134510357),
            "decoder/logits_dense/kernel": (0.346367252, 0.069406243),
        },
        statistics={
            "v/token_embedder/embedding": (121.546049, -0.417484057),
            "v_row/encoder/layers/attention/query/kernel": (104.756991, 1.53435486),
            "v_col/encoder/layers/attention/query/kernel": (65.4731194, -1.99655574),
            "v_col/decoder/layers/encoder_decoder_attention/out/kernel": (
                23.7157426,
                -0.0669736355,
            ),
            "v_row/decoder/layers/encoder_decoder_attention/out/kernel": (14.8223388, -1.00346764),
            "v_col/decoder/layers/mlp/wo/kernel": (17.0593994, 0.350693538),
            "v_row/decoder/layers/mlp/wo/kernel": (25.5890997, 0.926674857),
            "v/decoder/layers/pre_mlp_layer_norm/scale": (29.2952195, 0.672296814),
            "v/encoder/layers/relpos_bias/rel_embedding": (3.52072576, 0.206452016),
            "v/decoder/logits_dense/kernel": (2891.16471, -103.636662),
        },
    ),
    "t5x_legacy_unscanned_v10": Run(
        losses=(184.461731, 176.808914, 173.432495, 187.062149, 179.515427),
        z_losses=(0.117774755, 0.119793221, 0.118099503, 0.11742615, 0.118366905),
        moved={
            "token_embedder/embedding": (2.3220411, 2.12916271),
            "encoder/layers/attention/query/kernel": (0.027356452, -0.0188618464),
            "decoder/layers/encoder_decoder_attention/out/kernel": (0.130823658, -0.0900525906),
            "decoder/layers/mlp/wo/kernel": (0.133567682, 0.030727139),
            "decoder/layers/pre_mlp_layer_norm/scale": (0.136633136, -0.126318136),
            "encoder/relpos_bias/rel_embedding": (0.0203641171, 0.0181577633),
        },
        statistics={
            "v/token_embedder/embedding": (114.17218, -0.610320457),
            "v/encoder/layers/attention/query/kernel": (1158.90639, 0.706277135),
            "v/decoder/layers/encoder_decoder_attention/out/kernel": (742.557122, 3.57351468),
            "v/decoder/layers/mlp/wo/kernel": (1797.73665, 10.1918816),
            "v/decoder/layers/pre_mlp_layer_norm/scale": (14.3045863, 1.18120107),
            "v/encoder/relpos_bias/rel_embedding": (1.49059664, 0.290842056),
        },
    ),
}


def batch_of_step(index, vocab_size):
    """Four rows of random tokens, most of them padded, that end with 1 as T5's do."""
    rng = np.random.default_rng(1000 + index)
    inputs = rng.integers(2, vocab_size, (4, 16), dtype=np.int32)
    targets = rng.integers(2, vocab_size, (4, 10), dtype=np.int32)
    for row, (num_inputs, num_targets) in enumerate(((16, 10), (11, 7), (5, 10), (16, 3))):
        inputs[row, num_inputs - 1], targets[row, num_targets - 1] = 1, 1
        inputs[row, num_inputs:], targets[row, num_targets:] = 0, 0
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


def fingerprint(size, x):
    """`size` of an array, and its sum weighted by the cosines of 0, 1, 2, ..., which tells places.

    In the layout of our tree, in float64.
    """
    x = np.asarray(x, np.float64)
    return float(size(x)), float(x.ravel() @ np.cos(np.arange(x.size)))


def by_name(tree) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def convert(directory, place):
    """MODEL_DIR of the checkpoint, as the command makes it."""
    argv = ["--from=t5x", str(directory), f"--to={place / 'm'}", "--vocabulary=bytes"]
    assert main(["convert", *argv]) == 0
    return place / "m"


def continue_training(model_dir, mesh_shape):
    """Five steps from a checkpoint on: scalars of each, what the parameters moved, the state.

    With the programs and the state that `train` has from `model.gin` and the MODEL_DIR.
    """
    files = [str(model_dir / "model.gin"), "gin_configs/runs/pretrain.gin"]
    bindings = {
        "MODEL_DIR": str(model_dir),
        "MIXTURE_OR_TASK_NAME": "unused",
        "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 10},
        "TRAIN_STEPS": FIRST_STEP + NUM_STEPS,
        "BATCH_SIZE": 4,
        "MESH": mesh_shape,
        "LOSS_NORMALIZING_FACTOR": None,
        "OptimizerConfig.learning_rate": 0.02,
        "OptimizerConfig.warmup_steps": 7,
    }
    lines = [f"{name} = {value!r}" for name, value in bindings.items()]
    config, _ = gin_utils.load_train_config(files, lines)
    programs = setup.make_programs(config, compile_train_step=False)
    restored = Checkpoints(model_dir / "checkpoints").restore_latest(programs.abstract_state)
    assert restored.step == FIRST_STEP
    state = restored.state
    first_params = jax.tree.map(np.asarray, state.params)
    scalars_of_steps = []
    for i in range(FIRST_STEP, FIRST_STEP + NUM_STEPS):
        batch = programs.partitioning.shard_batch(batch_of_step(i, config.model.vocab_size))
        state, scalars = programs.train_step(state, batch, jax.random.key(0))
        scalars_of_steps.append({name: float(x) for name, x in scalars.items()})
    moved = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), state.params, first_params)
    return scalars_of_steps, by_name(moved), state


def check(name, scalars, moved, statistics):
    """Compares fingerprints with T5X's."""
    expected = T5X[name]
    column = lambda key: [s[key] for s in scalars]
    np.testing.assert_allclose(column("loss_sum"), expected.losses, rtol=1e-5)
    np.testing.assert_allclose(column("z_loss_sum"), expected.z_losses, rtol=1e-5)
    np.testing.assert_allclose(column("learning_rate"), LEARNING_RATES, rtol=1e-6)
    assert column("num_tokens") == [30] * NUM_STEPS
    for found, wanted in ((moved, expected.moved), (statistics, expected.statistics)):
        assert found.keys() == wanted.keys()
        for key, (size, places) in wanted.items():
            assert found[key][0] == pytest.approx(size, rel=1e-5), key
            # Of a sum of both signs the rounding goes by its terms.
            assert found[key][1] == pytest.approx(places, abs=1e-5 * size), key


def fingerprints(name, model_dir, mesh_shape):
    """The arguments of `check`, plain JSON values."""
    scalars, moved, state = continue_training(model_dir, mesh_shape)
    statistics = by_name(state.opt_state)
    assert int(state.step) == int(state.opt_state.count) == FIRST_STEP + NUM_STEPS
    # Every statistic in use of these parameters, and no other.
    used = [
        key for key, x in statistics.items() if x.ndim and key.partition("/")[2] in T5X[name].moved
    ]
    return (
        scalars,
        {key: fingerprint(np.linalg.norm, moved[key]) for key in T5X[name].moved},
        {key: fingerprint(np.sum, statistics[key]) for key in used},
    )


@pytest.mark.parametrize("name", T5X)
def test_next_steps_equal_those_of_t5x(shared_data, tmp_path, name):
    model_dir = convert(shared_data / "checkpoints" / "t5x" / name, tmp_path)
    check(name, *fingerprints(name, model_dir, {"data": 1}))


ON_EIGHT_DEVICES = """
import json, pathlib, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, "tests")
import test_t5x_next_steps as test

model_dir = pathlib.Path(sys.argv[2])
print(json.dumps(test.fingerprints(sys.argv[1], model_dir, {"data": 4, "model": 2})))
"""


def test_scanned_state_continues_on_eight_devices(shared_data, repo, tmp_path):
    """Data 4 x model 2: the factors of a scanned layer lie as what they belong to."""
    name = "t5x_legacy_scanned_v11"
    model_dir = convert(shared_data / "checkpoints" / "t5x" / name, tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, name, model_dir],
        cwd=repo,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    check(name, *json.loads(result.stdout))
