"""The layouts that are tried: all that divide, each judged the same way every time."""

import dataclasses
import math
import shlex

import pytest
from test_plan_cost import MEMORY, program

from t5x_lite import gin_utils
from t5x_lite.errors import UsageError
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import OptimizerConfig
from t5x_lite.plan import cost, search, show
from t5x_lite.plan.chips import GIB, chip_of
from t5x_lite.plan.program import Flops
from t5x_lite.plan.targets import parse_target
from t5x_lite.run_config import DataConfig, TrainConfig
from t5x_lite.step import LossConfig

# Six heads and 48 rows: much of what 16 devices offer does not divide.
CONFIG = TrainConfig(
    "plan",
    T5Config(vocab_size=512, d_model=64, d_ff=96, d_kv=8, num_heads=6),
    OptimizerConfig(),
    LossConfig(),
    DataConfig("plan", {"inputs": 32, "targets": 16}, batch_size=48),
    train_steps=10,
)
TARGET, CHIP = parse_target("v5e:4x4"), chip_of("v5e")


@pytest.mark.parametrize("num_devices", [1, 12, 16, 4096])
def test_every_mesh_once(num_devices):
    meshes = list(search.meshes(num_devices))
    assert all(math.prod(mesh.values()) == num_devices for mesh in meshes)
    assert len({tuple(mesh.values()) for mesh in meshes}) == len(meshes)
    # For each prime factor p^k there are (k + 1)(k + 2) / 2 ways to give it to three axes.
    ways = {1: 1, 12: 6 * 3, 16: 15, 4096: 91}
    assert len(meshes) == ways[num_devices]


def test_candidates_divide_and_the_other_meshes_do_not():
    candidates, refused = search.enumerate_candidates(CONFIG, TARGET, CHIP)
    model = CONFIG.model

    def divides(mesh: dict[str, int]) -> bool:
        return (
            48 % (mesh["data"] * mesh["fsdp"]) == 0
            and model.d_model % mesh["fsdp"] == 0
            and all(n % mesh["model"] == 0 for n in (model.vocab_size, model.d_ff, 6))
        )

    expected = {tuple(m.items()) for m in search.meshes(16) if divides(m)}
    assert {tuple(c.mesh.items()) for c in candidates} == expected
    assert {tuple(mesh.items()) for mesh, _ in refused} == {
        tuple(m.items()) for m in search.meshes(16) if not divides(m)
    }
    assert all(reason for _, reason in refused)
    for c in candidates:
        assert 48 % (c.mesh["data"] * c.mesh["fsdp"] * c.num_microbatches) == 0
    layouts = [(tuple(c.mesh.items()), c.num_microbatches, c.remat_policy) for c in candidates]
    assert len(set(layouts)) == len(layouts)
    # 48 rows over 16 or 8 devices: 3 or 6 for each, 2 or 4 divisors; three policies.
    for mesh in expected:
        rows = 48 // (dict(mesh)["data"] * dict(mesh)["fsdp"])
        counts = [c.num_microbatches for c in candidates if tuple(c.mesh.items()) == mesh]
        assert sorted(set(counts)) == [n for n in range(1, rows + 1) if rows % n == 0]
        assert len(counts) == 3 * len(set(counts))


def test_rules_decide_what_divides():
    """With d_model on no axis, fsdp may be what does not divide it."""
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, d_model=65), sharding_rules={"embed": None}
    )
    candidates, _ = search.enumerate_candidates(config, TARGET, CHIP)
    assert max(c.mesh["fsdp"] for c in candidates) == 16
    without = dataclasses.replace(config, sharding_rules=None)
    candidates, _ = search.enumerate_candidates(without, TARGET, CHIP)
    assert {c.mesh["fsdp"] for c in candidates} == {1}


def test_slices_lie_along_the_batch():
    target = parse_target("2xv5e:2x4")
    candidates, refused = search.enumerate_candidates(CONFIG, target, CHIP)
    assert all((c.mesh["data"] * c.mesh["fsdp"]) % 2 == 0 for c in candidates)
    assert any("2 slices" in reason for _, reason in refused)


def test_parameters_are_part_of_what_is_expected():
    """Fully sharded, a device holds a share of them, of AdamW's moments, and of the gradient."""
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig("adamw"))
    candidates, _ = search.enumerate_candidates(config, TARGET, CHIP)
    replicated, sharded = (
        next(c for c in candidates if c.mesh[axis] == 16) for axis in ("data", "fsdp")
    )
    num_bytes = 4 * t5.num_parameters(CONFIG.model)
    assert replicated.memory_bytes > 4 * num_bytes
    saved = replicated.memory_bytes - sharded.memory_bytes
    # All but the norms' scales and the tables of relative positions.
    assert saved == pytest.approx(4 * num_bytes * 15 / 16, rel=0.05)


# ---- the search ----------------------------------------------------------------------------------


def make_plan(config: TrainConfig, peak: float, link_bytes: int = 10**6):
    """What a compiler that needs `peak` GiB would have said."""
    memory = dataclasses.replace(MEMORY, peak=int(peak * GIB))
    collectives = tuple(
        dataclasses.replace(c, link_bytes=link_bytes) for c in program().collectives
    )
    compiled = program(memory=memory, collectives=collectives)
    return cost.make_plan(compiled, config, TARGET, CHIP, cost.Rates())


def test_what_fits_comes_first_and_then_what_talks_least():
    asked: list[dict[str, int]] = []

    def plan(config: TrainConfig):
        asked.append(dict(config.mesh))
        if config.mesh["model"] > 1:
            raise UsageError("not today")
        fits = config.mesh["data"] > 1
        return make_plan(config, 1.0 if fits else 15.76, link_bytes=10**6 * config.mesh["data"])

    found = search.search(CONFIG, TARGET, CHIP, plan, max_compiles=50)
    assert len(found.tried) == len(asked) <= 50
    assert found.best is found.tried[0]
    assert [t.fits for t in found.tried] == sorted((t.fits for t in found.tried), reverse=True)
    assert found.best.candidate.mesh == {"data": 2, "fsdp": 8, "model": 1}
    assert found.tried[-1].refusal == "not today"
    values = found.to_dict()
    assert len(values["tried"]) == len(found.tried)
    assert values["tried"][0]["fits"] is True
    assert all(entry["reason"] for entry in values["refused"])


def test_it_climbs_to_the_best():
    """Whatever the estimates say, if better layouts lie side by side."""
    goal = {"data": 1, "fsdp": 2, "model": 2}
    target = parse_target("v5e:2x2")

    def distance(config: TrainConfig) -> float:
        off = sum(abs(math.log2(config.mesh[axis] / goal[axis])) for axis in goal) / 2
        return off + abs(math.log2(config.loss.num_microbatches / 8))

    def plan(config: TrainConfig):
        return make_plan(config, 1.0, link_bytes=int(10**12 * (1 + distance(config))))

    # Powers of two, between which every step is one to a neighbour.
    model = dataclasses.replace(CONFIG.model, num_heads=8)
    data = dataclasses.replace(CONFIG.data, batch_size=64)
    config = dataclasses.replace(CONFIG, model=model, data=data)
    found = search.search(config, target, CHIP, plan, max_compiles=30)
    assert found.num_candidates > 90
    assert found.best is not None
    assert found.best.candidate.mesh == goal and found.best.candidate.num_microbatches == 8


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_microbatches": 6}, True),
        ({"num_microbatches": 9}, True),
        ({"num_microbatches": 12}, False),
        ({"num_microbatches": 3}, False),
        ({"remat_policy": "none"}, True),
        ({"remat_policy": "none", "num_microbatches": 6}, False),
        ({"mesh": {"data": 1, "fsdp": 8, "model": 2}}, True),
        ({"mesh": {"data": 4, "fsdp": 4, "model": 1}}, True),
        ({"mesh": {"data": 1, "fsdp": 16, "model": 1}}, False),
        ({"mesh": {"data": 8, "fsdp": 1, "model": 2}}, False),
        ({"mesh": {"data": 1, "fsdp": 8, "model": 2}, "remat_policy": "none"}, False),
    ],
)
def test_neighbours(changes, expected):
    mesh = {"data": 2, "fsdp": 4, "model": 2}
    layout = search.Candidate(mesh, 3, "full", 0.0, 0.0, 0.0)
    other = dataclasses.replace(layout, **changes)
    same = changes == {"num_microbatches": 3}
    assert layout.is_next_to(other) is (expected and not same)
    assert other.is_next_to(layout) is (expected and not same)


def test_the_same_again():
    layouts = []
    for _ in range(2):
        asked: list[TrainConfig] = []

        def plan(config: TrainConfig, asked=asked):
            asked.append(config)
            return make_plan(config, 1.0)

        search.search(CONFIG, TARGET, CHIP, plan, max_compiles=6)
        layouts.append([show.gin_bindings(config) for config in asked])
    assert len(layouts[0]) == 6
    assert layouts[0] == layouts[1]


def test_what_is_too_large_corrects_what_is_expected():
    """All programs need so many times the estimate: one of each policy is found too large."""
    estimates: list[float] = []
    candidates, _ = search.enumerate_candidates(CONFIG, TARGET, CHIP)
    usable = CHIP.usable_bytes
    middle = sorted(c.memory_bytes for c in candidates)[len(candidates) // 2]
    factor = usable / middle  # so that half of them do not fit
    sizes = {(str(c.mesh), c.num_microbatches, c.remat_policy): c.memory_bytes for c in candidates}

    def plan(config: TrainConfig):
        layout = (str(config.mesh), config.loss.num_microbatches, config.model.remat_policy)
        estimates.append(sizes[layout])
        return make_plan(config, factor * sizes[layout] / GIB)

    found = search.search(CONFIG, TARGET, CHIP, plan, max_compiles=1000)
    too_large = [e for e in estimates if e * factor > usable]
    assert len(too_large) <= 3
    assert found.best is not None
    assert len(estimates) - len(too_large) >= len(candidates) // 2


def test_something_is_compiled_even_if_nothing_is_expected_to_fit():
    chip = chip_of("v5e", {"hbm_bytes": 1e-4, "reserved_bytes": 0})
    asked: list[TrainConfig] = []

    def plan(config: TrainConfig):
        asked.append(config)
        return make_plan(config, 99.0)

    found = search.search(CONFIG, TARGET, chip, plan, max_compiles=5)
    assert len(asked) == 5 and found.best is None
    assert found.num_too_large == found.num_candidates


def test_a_policy_that_is_too_large_says_nothing_of_the_others():
    """With "full" all is well, though all that was thought to be smaller and faster is not."""
    candidates, _ = search.enumerate_candidates(CONFIG, TARGET, CHIP)

    def plan(config: TrainConfig):
        return make_plan(config, 1.0 if config.model.remat_policy == "full" else 1e6)

    found = search.search(CONFIG, TARGET, CHIP, plan, max_compiles=len(candidates))
    assert found.best is not None and found.best.candidate.remat_policy == "full"
    assert sum(t.fits for t in found.tried) == len(candidates) / 3


def test_while_nothing_fits_it_goes_on_with_the_smallest():
    """Only one layout fits, and every estimate is too high for it."""
    chip = chip_of("v5e", {"hbm_bytes": 1e-4, "reserved_bytes": 0})
    candidates, _ = search.enumerate_candidates(CONFIG, TARGET, chip)
    wanted = sorted(candidates, key=lambda c: c.memory_bytes)[4]

    def plan(config: TrainConfig):
        fits = wanted.apply(config) == config
        made = make_plan(config, 1e-6 if fits else 99.0)
        small = cost.fit(made.program.memory, config, TARGET, chip)
        return dataclasses.replace(made, fit=small)

    found = search.search(CONFIG, TARGET, chip, plan, max_compiles=len(candidates))
    assert found.best is not None and found.best.candidate == wanted


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sharding_rules": {"embedd": None}}, "SHARDING_RULES has no axis 'embedd'"),
        ({"sharding_rules": {"embed": "fdsp"}}, "MESH has no axis 'fdsp'"),
        ({"dcn_mesh": {"data": 4}}, "4 slices, but 2xv5e:2x4 has 2"),
        ({"dcn_mesh": {"date": 2}}, "DCN_MESH has no axis 'date'"),
    ],
)
def test_what_is_wrong_for_every_mesh_is_said_once(changes, expected):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UsageError, match=expected):
        search.enumerate_candidates(config, parse_target("2xv5e:2x4"), CHIP)


def test_slices_lie_where_dcn_mesh_says():
    config = dataclasses.replace(CONFIG, dcn_mesh={"fsdp": 2})
    candidates, refused = search.enumerate_candidates(config, parse_target("2xv5e:2x4"), CHIP)
    assert candidates and all(c.mesh["fsdp"] % 2 == 0 for c in candidates)
    assert any("DCN_MESH: fsdp 1" in reason for _, reason in refused)


def test_activations_divide_as_in_training():
    """The vocabulary's too, which `model` splits even where it does not split the parameters."""
    model = dataclasses.replace(CONFIG.model, vocab_size=511)
    config = dataclasses.replace(CONFIG, sharding_rules={"vocab": None}, model=model)
    candidates, _ = search.enumerate_candidates(config, TARGET, CHIP)
    assert {c.mesh["model"] for c in candidates} == {1}


def test_no_mesh_divides():
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, batch_size=1))
    with pytest.raises(UsageError, match=r"no mesh of v5e:4x4 divides this run; .*BATCH_SIZE = 1"):
        search.search(config, TARGET, CHIP, lambda c: make_plan(c, 1.0), max_compiles=1)


# ---- what is printed of it -----------------------------------------------------------------------


def test_warnings_are_printed_in_a_line_each(capsys):
    compiled = program(warnings=("the trip count of x is unknown", "long\nand " + "longer " * 99))
    plan = cost.make_plan(compiled, CONFIG, TARGET, CHIP, cost.Rates())
    show.print_plan(plan, CONFIG, TARGET, CHIP, cost.Rates())
    out = capsys.readouterr().out
    assert "\nwarning: the trip count of x is unknown\nwarning: long and longer" in out
    assert "longer ..." in " ".join(out.split())


def printed_program(capsys, config: TrainConfig, target=TARGET, **changes) -> str:
    plan = cost.make_plan(program(**changes), config, target, chip_of(target.kind), cost.Rates())
    show.print_plan(plan, config, target, chip_of(target.kind), cost.Rates())
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "mesh", "dcn_mesh", "expected"),
    [
        ("2xv5e:4x4", {"data": 2, "fsdp": 16}, None, "across slices data 2 batch"),
        ("2xv5e:4x4", {"data": 1, "fsdp": 32}, None, "across slices fsdp 2 batch"),
        ("4xv5e:4x4", {"data": 2, "fsdp": 32}, None, "across slices data 2 x fsdp 2 batch"),
        ("2xv5e:4x4", {"data": 2, "fsdp": 16}, {"fsdp": 2}, "across slices fsdp 2 batch"),
        ("h100:16", {"data": 2, "fsdp": 8}, None, "across hosts data 2 batch"),
        ("v5e:4x4", {"data": 2, "fsdp": 8}, None, "mesh data 2 x fsdp 8 batch"),
    ],
)
def test_what_lies_across_slices_is_said(capsys, name, mesh, dcn_mesh, expected):
    config = dataclasses.replace(CONFIG, dcn_mesh=dcn_mesh)
    assert expected in printed_program(capsys, config, parse_target(name), mesh=mesh)


def test_float32_is_said_not_to_have_the_peak(capsys):
    words = "computed in float32 the peak is bfloat16's: TPUs round what they multiply"
    assert words in printed_program(capsys, CONFIG)
    model = dataclasses.replace(CONFIG.model, dtype="bfloat16")
    config = dataclasses.replace(CONFIG, model=model)
    assert "the peak is" not in printed_program(capsys, config)


def test_what_costs_next_to_nothing_has_digits(capsys):
    """A step of a second at the bound; a run of ten steps on one chip is 10 / 3600 hours."""
    flops = Flops(model=10**12, program=10**12, per_device=int(CHIP.peak_flops.value))
    target = parse_target("v5e:1x1")
    out = printed_program(capsys, CONFIG, target, flops=flops, collectives=())
    assert " v5e:1x1: 1 chip compiled by" in out
    assert " hours 0.00278 0.00556 " in out
    assert " dollars 0.00333 0.00667 " in out


def test_flags_of_the_best_layout_make_it_again():
    layout = search.Candidate({"data": 2, "fsdp": 4, "model": 2}, 3, "dots", 0.0, 0.0, 0.0)
    flags = shlex.split(show.gin_flags(layout.apply(CONFIG)))
    bindings, rest = gin_utils.split_gin_flags(flags)
    assert not rest
    files = ["gin_configs/models/t5_1_1/tiny.gin", "gin_configs/runs/python_docs.gin"]
    config, _ = gin_utils.load_train_config(files, bindings)
    assert config.mesh == layout.mesh
    assert config.loss.num_microbatches == 3
    assert config.model.remat_policy == "dots"
