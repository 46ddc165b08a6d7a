"""`plan` from the command line."""

import json
import shlex

import pytest
from small_run import SMALL, start

from t5x_lite.__main__ import main
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config

# No MODEL_DIR and no task: nothing is read and nothing written.
ARGV = [
    "plan",
    "--gin_file=gin_configs/models/t5_1_1/tiny.gin",
    "--gin_file=gin_configs/runs/pretrain.gin",
    "--gin.T5Config.vocab_size=512",
    "--gin.T5Config.scan_layers=True",
    *(f"--gin.{name}={SMALL[name]!r}" for name in SMALL if name.startswith("T5Config.")),
    f"--gin.TASK_FEATURE_LENGTHS={SMALL['TASK_FEATURE_LENGTHS']!r}",
    "--gin.TRAIN_STEPS=3600",
    "--gin.BATCH_SIZE=16",
]
NUM_PARAMETERS = t5.num_parameters(
    T5Config(
        vocab_size=512,
        **{name.split(".")[1]: value for name, value in SMALL.items() if name.startswith("T5")},
    )
)


def run(*flags: str) -> str:
    """What a process of its own prints; it must succeed."""
    process = start("-m", "t5x_lite", *ARGV, *flags)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "compiling " in error  # before minutes without a word
    return out


def test_gpus(tmp_path):
    """Four virtual devices in place of the GPUs, and everything said of them."""
    out = run(
        "--target=h100:4",
        "--gin.MESH={'fsdp': 2, 'model': 2}",
        "--price_per_chip_hour=2",
        "--watts_per_chip=500",
        "--pue=1.2",
        "--co2_kg_per_kwh=0.1",
        "--efficiency=0.25",
        f"--json={tmp_path}/plan.json",
    )
    values = json.loads((tmp_path / "plan.json").read_text())
    program, estimate = values["program"], values["estimate"]

    assert program["mesh"] == {"data": 1, "fsdp": 2, "model": 2}
    assert "as many virtual devices" in program["compiled_by"]
    # All but the norms' scales and the relative positions lie on one device in four.
    assert program["memory"]["parameters"] == pytest.approx(NUM_PARAMETERS, rel=0.05)
    assert {tuple(c["mesh_axes"]) for c in program["collectives"] if c["count"]} >= {
        ("fsdp",),
        ("model",),
    }
    assert values["fits"] and values["fit"]["usable_bytes"] == 76 * 2**30
    assert estimate["seconds_per_step"] == pytest.approx(4 * values["bound"]["seconds"])
    # 3600 steps: as many hours as a step has seconds, on four chips.
    assert estimate["chip_hours"] == pytest.approx(4 * estimate["seconds_per_step"])
    assert estimate["dollars"] == pytest.approx(2 * estimate["chip_hours"])
    assert estimate["kwh"] == pytest.approx(0.5 * 1.2 * estimate["chip_hours"])
    assert estimate["co2_kg"] == pytest.approx(0.1 * estimate["kwh"])
    given = {a["flag"] for a in values["assumptions"] if a["source"] == "given"}
    assert given == {
        "--price_per_chip_hour",
        "--watts_per_chip",
        "--pue",
        "--co2_kg_per_kwh",
        "--efficiency",
    }
    peak = "the peak is bfloat16's: operations take at least twice as long"  # DTYPE is float32
    for words in ("fsdp 2 x model 2", "virtual devices", "fits: ", "all-reduce", "hours", peak):
        assert words in out
    assert all(a["flag"] in out for a in values["assumptions"])


def test_a_search_for_a_tpu(tmp_path):
    """libtpu's compiler decides; the flags that are printed at the end give the best plan again."""
    pytest.importorskip("libtpu")
    file = f"--json={tmp_path}/plan.json"
    out = run("--target=v5e:2x4", "--search", "--max_compiles=2", file)
    values = json.loads((tmp_path / "plan.json").read_text())
    tried = values["search"]["tried"]
    assert len(tried) == 2 and all(t["fits"] for t in tried)
    assert values["search"]["num_candidates"] > 20
    assert values["program"]["compiled_by"].startswith("libtpu")
    assert tried[0]["mesh"] == values["program"]["mesh"]
    assert tried[0]["bound"]["seconds"] <= tried[1]["bound"]["seconds"] * 1.01

    flags = shlex.split(out.splitlines()[-1].partition("the best that fits: ")[2])
    run("--target=v5e:2x4", *flags, file)
    again = json.loads((tmp_path / "plan.json").read_text())
    for name in ("gin", "bound", "fit", "estimate"):
        assert again[name] == values[name]


def test_a_run_that_a_tpu_has_no_room_for(tmp_path):
    """The compiler refuses; that is an answer, not a failure."""
    pytest.importorskip("libtpu")
    out = run("--target=v5e:2x2", "--gin.BATCH_SIZE=4194304", f"--json={tmp_path}/plan.json")
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["fits"] is False and values["program"] is None
    assert values["memory"]["temporaries"] > 16 * 2**30
    assert "does not fit: " in out and "more microbatches" in out
    assert values["fit"]["sentence"] in " ".join(out.split())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "--target is missing: a slice like v5e:4x4, 2xv5e:16x16, or GPUs like h100:8"),
        (["--target=h100:1", "--max_compiles=3"], "--max_compiles=3 has no effect on a single"),
        (["--target=v5e:3x3"], "v5e has no slice of 3x3; known: "),
        (["--target=h100:1", "--gin.MESH={'fsdp': 2}"], "is 2 devices, but there are 1"),
        (["--target=h100:1", "--json=no/such/plan.json"], "--json=no/such/plan.json: cannot be"),
        (["--target=h100:1", "--pue=0.5"], "--pue=0.5: must be at least 1"),
        (["--target=h100:1", "--search", "--max_compiles=0"], "--max_compiles=0: must be"),
        (["--target=h100:1", "--gin.TRAIN_STEPS=%gin.REQUIRED"], "TRAIN_STEPS must be given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_are_wrong(capfd, flags, expected):
    assert main([*ARGV, *flags]) == 2
    error = capfd.readouterr().err
    assert expected in error
    assert error.startswith("t5x_lite: ") and error.count("\n") == 1
    assert "\\" not in error


def test_without_gin_files(capfd):
    assert main(["plan", "--target=h100:1"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("t5x_lite: give --gin_file, for example --gin_file=gin_configs/")
    assert error.count("\n") == 1 and "\\" not in error
