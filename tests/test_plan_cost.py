"""What follows from a program's numbers, against figures that others have published."""

import dataclasses
import json

import pytest

from t5x_lite.errors import UsageError
from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import OptimizerConfig
from t5x_lite.plan import cost
from t5x_lite.plan.chips import GIB, Figure, chip_of
from t5x_lite.plan.program import Collective, DoesNotFit, Flops, Memory, Program
from t5x_lite.plan.targets import parse_target
from t5x_lite.run_config import DataConfig, TrainConfig
from t5x_lite.step import LossConfig

CONFIG = TrainConfig(
    "plan",
    T5Config(),
    OptimizerConfig(),
    LossConfig(num_microbatches=2),
    DataConfig("plan", {"inputs": 512, "targets": 114}, batch_size=2048),
    train_steps=1000,
    mesh={"data": 2, "fsdp": 8},
)
MEMORY = Memory(
    parameters=2 * GIB,
    optimizer=GIB,
    batch=GIB // 8,
    padding=0,
    temporaries=4 * GIB,
    program=0,
    peak=7 * GIB + GIB // 8,
)


def collective(kind="all-reduce", group_size=16, slices=1, link_bytes=10**9) -> Collective:
    return Collective(
        kind, ("data",), group_size, slices, 1, 1, link_bytes, link_bytes, link_bytes, ""
    )


def program(**changes) -> Program:
    values = {
        "target": "v5e:4x4",
        "compiled_by": "nobody",
        "num_devices": 16,
        "mesh": {"data": 2, "fsdp": 8, "model": 1},
        "lower_seconds": 1.0,
        "compile_seconds": 2.0,
        "host_bytes": GIB,
        "memory": MEMORY,
        "flops": Flops(model=10**15, program=2 * 10**15, per_device=125 * 10**12),
        "bytes_accessed": 10**11,
        "collectives": (collective(),),
        "warnings": (),
    }
    return Program(**(values | changes))


# ---- the bound -----------------------------------------------------------------------------------


def test_the_bound_is_the_largest_of_its_terms():
    target, chip = parse_target("v5e:4x4"), chip_of("v5e")
    least = cost.bound(program(), target, chip)
    assert least.compute == pytest.approx(125e12 / 197e12)
    assert least.memory == pytest.approx(1e11 / 819e9)
    assert least.links == pytest.approx(1e9 / (2 * 50e9))  # a corner of 4x4 has two links
    assert least.dcn == 0
    assert (least.seconds, least.limited_by) == (least.compute, "compute")
    slow = dataclasses.replace(chip, link_bandwidth=Figure(1e6, "given"))
    assert cost.bound(program(), target, slow).limited_by == "links"


def test_a_device_is_half_a_chip_where_a_chip_has_two():
    target, chip = parse_target("tpu7x:2x2x1"), chip_of("tpu7x")
    least = cost.bound(program(), target, chip)
    assert least.compute == pytest.approx(125e12 / (2307e12 / 2))
    assert least.memory == pytest.approx(1e11 / (7380e9 / 2))
    fit = cost.fit(MEMORY, CONFIG, target, chip)
    assert fit.usable_bytes == pytest.approx(94.75 * GIB)


def test_gpus_read_and_write_their_state_at_least():
    """What XLA:CPU moves says nothing of a GPU's memory."""
    least = cost.bound(program(), parse_target("h100:8"), chip_of("h100"))
    assert least.memory == pytest.approx((2 * 3 * GIB + GIB / 8) / 3350e9)


@pytest.mark.parametrize(("slices", "size"), [(2, 2), (2, 16), (4, 16), (4, 4), (8, 256)])
@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter"])
def test_what_crosses_between_slices(kind, slices, size):
    """Against the steps of the hierarchical algorithm, one by one, for an array of one byte."""
    inside = size // slices
    within = (inside - 1) / inside  # a reduce-scatter or an all-gather among those of a slice
    across = (slices - 1) / slices / inside  # the same among slices, of a share of the array
    rounds = 2 if kind == "all-reduce" else 1
    sent = rounds * (within + across)
    assert sent == pytest.approx(rounds * (size - 1) / size)  # no more than in one ring
    share = cost.dcn_share(collective(kind, size, slices))
    assert share * sent == pytest.approx(rounds * across)


def test_the_network_between_slices_is_a_term_of_its_own():
    target, chip = parse_target("2xv5e:4x4"), chip_of("v5e")
    crossing = collective(group_size=32, slices=2, link_bytes=31 * 10**9)
    least = cost.bound(program(collectives=(crossing, collective())), target, chip)
    assert least.dcn == pytest.approx(1e9 / chip.dcn_bandwidth.value)
    assert least.links == pytest.approx(31e9 / (2 * 50e9))
    assert cost.dcn_share(collective(slices=1)) == 0


def test_groups_over_two_of_four_slices():
    """Eight devices on two slices: an all-gather of 8 bytes sends 7. Each device first has the byte
    of its counterpart (1 over the network), then those of the three others of its slice (6)."""
    target, chip = parse_target("4xv5e:4x4"), chip_of("v5e")
    crossing = collective("all-gather", 8, slices=2, link_bytes=7 * 10**9)
    least = cost.bound(program(collectives=(crossing,)), target, chip)
    assert least.dcn == pytest.approx(1e9 / chip.dcn_bandwidth.value)
    assert least.links == pytest.approx(6e9 / (2 * 50e9))


# ---- what a run costs ----------------------------------------------------------------------------


def test_t5_11b_as_patterson_and_others_measured_it():
    """Patterson et al. 2021, table 4: 512 TPU v3 for 20 days, 310 W each, PUE 1.12, 0.545 kg/kWh:
    85.7 MWh and 46.7 t of CO2e; 45.6 of a peak of 123 TFLOP/s for 4.05e22 operations in all."""
    steps, days = 1_000_000, 20
    config = dataclasses.replace(CONFIG, train_steps=steps)
    target = parse_target("v4:8x8x8")
    chip = dataclasses.replace(
        chip_of("v4"), watts=Figure(310, "given"), peak_flops=Figure(123e12, "given")
    )
    flops = Flops(model=int(4.05e22 / steps), program=0, per_device=0)
    seconds = days * 86400 / steps
    rates = cost.Rates(pue=1.12, co2_kg_per_kwh=0.545)
    run = cost.run_cost(seconds, program(flops=flops), target, chip, rates, config)
    assert run.hours == pytest.approx(480)
    assert run.chip_hours == pytest.approx(480 * 512)
    assert run.kwh / 1000 == pytest.approx(85.7, rel=0.01)
    assert run.co2_kg / 1000 == pytest.approx(46.7, rel=0.01)
    assert run.mfu == pytest.approx(45.6 / 123, rel=0.01)
    assert run.dollars == pytest.approx(480 * 512 * 3.22)
    assert run.target_tokens_per_second == pytest.approx(2048 * 114 / seconds)
    assert run.tokens_per_second == pytest.approx(2048 * (512 + 114) / seconds)


def test_no_price_no_dollars():
    target, chip = parse_target("a100:8"), chip_of("a100")
    run = cost.run_cost(1.0, program(), target, chip, cost.Rates(), CONFIG)
    assert run.dollars is None and run.kwh > 0


def test_a_plan_of_it_all():
    target, chip = parse_target("v5e:4x4"), chip_of("v5e")
    plan = cost.make_plan(program(), CONFIG, target, chip, cost.Rates(efficiency=0.25))
    assert plan.estimate.hours == pytest.approx(4 * plan.at_bound.hours)
    assert plan.at_bound.seconds_per_step == plan.bound.seconds
    values = plan.to_dict()
    assert json.loads(json.dumps(values))["bound"] == values["bound"]
    assert values["bound"]["seconds"] == plan.bound.seconds
    assert values["program"]["memory"]["peak"] == MEMORY.peak
    assert values["fits"] is True


@pytest.mark.parametrize("given", [{"efficiency": 0}, {"efficiency": 1.1}, {"pue": 0.9}])
def test_rates_that_cannot_be(given):
    with pytest.raises(UsageError, match=f"--{next(iter(given))}="):
        cost.Rates(**given)


# ---- whether it fits -----------------------------------------------------------------------------


def test_it_fits():
    fit = cost.fit(MEMORY, CONFIG, parse_target("v5e:4x4"), chip_of("v5e"))
    assert fit.fits and fit.sentence == "fits: 7.12 GiB of 15.8 GiB"
    assert fit.usable_bytes == 15.75 * GIB


@pytest.mark.parametrize(
    ("memory", "config", "expected"),
    [
        (
            dataclasses.replace(MEMORY, temporaries=30 * GIB, peak=33 * GIB),
            CONFIG,
            (
                "does not fit: 33.0 GiB of 15.8 GiB; temporaries (activations, gradients, "
                "workspace) dominate (30.0 GiB): more microbatches than NUM_MICROBATCHES = 2; "
                "T5Config.remat_policy = 'full'; fsdp or model in MESH instead of data; or more "
                "chips"
            ),
        ),
        (
            dataclasses.replace(MEMORY, parameters=20 * GIB, peak=26 * GIB),
            CONFIG,
            (
                "does not fit: 26.0 GiB of 15.8 GiB; parameters dominate (20.0 GiB): fsdp or model "
                "in MESH instead of data; or more chips"
            ),
        ),
        (
            dataclasses.replace(MEMORY, optimizer=20 * GIB, peak=26 * GIB),
            dataclasses.replace(CONFIG, mesh={"fsdp": 16}),
            (
                "does not fit: 26.0 GiB of 15.8 GiB; the optimizer's state dominates (20.0 GiB): "
                "more chips"
            ),
        ),
    ],
    ids=["temporaries", "parameters", "optimizer"],
)
def test_it_does_not_fit(memory, config, expected):
    fit = cost.fit(memory, config, parse_target("v5e:4x4"), chip_of("v5e"))
    assert not fit.fits and fit.sentence == expected


def test_what_the_compiler_refuses():
    """It knows what is available; where it does not say what is needed, its words stand alone."""
    target, chip = parse_target("v5e:4x4"), chip_of("v5e")
    memory = dataclasses.replace(MEMORY, temporaries=12 * GIB, peak=15 * GIB + GIB // 8)
    error = DoesNotFit("too much of it", memory, 15 * GIB, 1.0)
    fit = cost.fit(memory, CONFIG, target, chip, refused=error)
    assert not fit.fits and fit.usable_bytes == 15 * GIB
    assert fit.sentence.startswith("does not fit: 15.1 GiB of 15.0 GiB; temporaries")
    memory = dataclasses.replace(MEMORY, temporaries=0, peak=3 * GIB)
    error = DoesNotFit("too much of it", memory, 0, 1.0)
    fit = cost.fit(memory, CONFIG, target, chip, refused=error)
    assert not fit.fits
    assert fit.sentence.startswith(
        "does not fit: the compiler refuses: too much of it: more microbatches than"
    )
