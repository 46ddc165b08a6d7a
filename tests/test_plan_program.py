"""The train step of a small run, compiled for GPUs that are virtual devices and, with libtpu, for
TPUs."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import pytest

from t5x_lite.errors import UsageError
from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import OptimizerConfig
from t5x_lite.plan import program
from t5x_lite.plan.flops import model_flops
from t5x_lite.plan.targets import parse_target
from t5x_lite.run_config import DataConfig, TrainConfig
from t5x_lite.step import LossConfig

MODEL = T5Config(
    vocab_size=256,
    d_model=64,
    d_ff=128,
    d_kv=16,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    relative_bias_per_layer=True,
    dtype="bfloat16",
    remat_policy="full",
)
BATCH, INPUTS, TARGETS = 16, 32, 16
CONFIG = TrainConfig(
    model_dir="unused",
    model=MODEL,
    optimizer=OptimizerConfig(),
    loss=LossConfig(num_microbatches=2),
    data=DataConfig("unused", {"inputs": INPUTS, "targets": TARGETS}, BATCH),
    train_steps=1,
)


def _compile(target: str, mesh: dict[str, int]) -> dict[str, Any]:
    """`compile_step` in a process of its own, whose devices are the target's."""
    code = (
        "import dataclasses, json\n"
        "from t5x_lite.plan import program, targets\n"
        f"target = targets.parse_target({target!r})\n"
        "targets.prepare(target)\n"
        "from tests.test_plan_program import CONFIG\n"
        f"config = dataclasses.replace(CONFIG, mesh={mesh!r})\n"
        "print(json.dumps(program.compile_step(config, target).to_dict()))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _num_parameters() -> int:
    """Vocabulary twice, the layers' matrices, their bias tables, and norms."""
    d, width, heads = MODEL.d_model, MODEL.num_heads * MODEL.d_kv, MODEL.num_heads
    attention, mlp, bias = 4 * d * width, 3 * d * MODEL.d_ff, heads * 32
    encoder, decoder = attention + mlp + bias + 2 * d, 2 * attention + mlp + bias + 3 * d
    return 2 * MODEL.vocab_size * d + 2 * (encoder + decoder) + 2 * d


def _recomputed_flops() -> int:
    """A layer's forward pass without its last product."""
    d, width, ff = MODEL.d_model, MODEL.num_heads * MODEL.d_kv, MODEL.d_ff
    encoder = 8 * INPUTS * d * width + 4 * INPUTS**2 * width + 4 * INPUTS * d * ff
    decoder = 8 * TARGETS * d * width + 4 * TARGETS**2 * width + 4 * TARGETS * d * ff
    cross = 4 * (TARGETS + INPUTS) * d * width + 4 * TARGETS * INPUTS * width
    return 2 * BATCH * (encoder + decoder + cross)


def _check(found: dict[str, Any], num_devices: int) -> None:
    """What holds for parameters split over all devices."""
    assert found["num_devices"] == num_devices
    memory = found["memory"]
    # Norms and bias tables are split over one axis alone.
    assert 4 * _num_parameters() / num_devices <= memory["parameters"]
    assert memory["parameters"] < 1.2 * 4 * _num_parameters() / num_devices
    # Inputs have 3 arrays, targets 5: ids, ids shifted, weights, segments, positions.
    rows = BATCH // (num_devices // 2)
    assert memory["batch"] == 4 * rows * (3 * INPUTS + 5 * TARGETS)
    # Adafactor keeps a row and a column of the stacked matrices, and all of the others.
    assert 0 < memory["optimizer"] < 1.1 * memory["parameters"]
    parts = sum(value for name, value in memory.items() if name != "peak")
    assert parts == memory["peak"]
    assert memory["temporaries"] > 0
    flops = found["flops"]
    assert flops["model"] == model_flops(MODEL, BATCH, INPUTS, TARGETS)
    assert flops["program"] == num_devices * flops["per_device"]
    bias_gradient = 2 * BATCH * MODEL.num_heads * 2 * (INPUTS**2 + TARGETS**2)
    extra = flops["program"] - flops["model"] - _recomputed_flops()
    assert extra in (0, bias_gradient)  # XLA:TPU makes a sum of that product with ones
    assert found["warnings"] == []
    assert found["host_bytes"] > 1e8
    kinds = {(c["kind"], tuple(c["mesh_axes"])) for c in found["collectives"]}
    assert ("all-reduce", ("model",)) in kinds
    for collective in found["collectives"]:
        assert collective["count"] >= collective["instructions"]
        assert collective["group_size"] > 1


def test_gpus_as_virtual_devices() -> None:
    found = _compile("h100:16", {"data": 2, "fsdp": 4, "model": 2})
    assert found["compiled_by"].startswith("XLA:CPU")
    memory, flops = found["memory"], found["flops"]
    # Parameters lie over fsdp and model; data repeats them.
    assert 4 * _num_parameters() / 8 <= memory["parameters"] < 1.2 * 4 * _num_parameters() / 8
    assert flops["program"] > flops["model"]
    by_axes = {tuple(c["mesh_axes"]): c["crosses_slices"] for c in found["collectives"]}
    # A host has eight GPUs: `data` goes from one to the other, fsdp and model stay inside.
    assert by_axes["model",] is False
    assert by_axes["fsdp",] is False
    assert all(crosses for axes, crosses in by_axes.items() if "data" in axes)
    kinds = {c["kind"] for c in found["collectives"]}
    assert {"all-gather", "reduce-scatter", "all-reduce"} <= kinds


def test_tpus() -> None:
    pytest.importorskip("libtpu")
    found = _compile("v5e:2x4", {"fsdp": 4, "model": 2})
    assert found["compiled_by"].startswith("libtpu ")
    assert found["mesh"] == {"data": 1, "fsdp": 4, "model": 2}
    _check(found, 8)
    assert not any(c["crosses_slices"] for c in found["collectives"])


# The first was seen with libtpu 0.0.42; the second is what its users report of others.
EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(21.50G) exceeds available HBM (15.75G)."
)
LATE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 17.25G of 15.75G hbm. Exceeded hbm capacity by 1.50G.\n\nTotal hbm usage >= 17.51G"
)


@pytest.mark.parametrize(("message", "gib"), [(EARLY, 21.5), (LATE, 17.25)])
def test_what_the_compiler_refuses_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, message: str, gib: float
) -> None:
    def refuse(*unused: Any) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(program, "_compile", refuse)
    monkeypatch.setattr(program, "work_of", None)
    config = dataclasses.replace(CONFIG, mesh=None)
    with pytest.raises(program.DoesNotFit) as refused:
        program.compile_step(config, parse_target("h100:1"))
    error = refused.value
    assert "\n" not in str(error)
    assert "h100:1: the train step does not fit" in str(error)
    assert error.available == int(15.75 * 2**30)
    assert error.memory.parameters == 4 * _num_parameters()
    known = error.memory.parameters + error.memory.optimizer + error.memory.batch
    whole = error.memory.peak if "Used" in message else error.memory.peak - known
    assert whole == gib * 2**30


def test_mesh_of_another_size_is_refused() -> None:
    config = dataclasses.replace(CONFIG, mesh={"fsdp": 4})
    with pytest.raises(UsageError, match=r"MESH = .* is 4 devices, but there are 1"):
        program.compile_step(config, parse_target("h100:1"))
