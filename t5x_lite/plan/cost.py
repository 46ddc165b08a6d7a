"""From a compiled step and a chip's peaks: whether it fits, a bound on its time, what a run costs.

The bound is the largest of four times: a step's operations at the chip's peak, its bytes from and
to memory, its bytes over the links to neighbours, and those over the data-center network. It
supposes that the four overlap perfectly and that each runs at its published peak, so a real step
takes longer; by how much is one stated number, `Rates.efficiency`.

Energy and emissions as in Patterson et al. 2021, "Carbon Emissions and Large Neural Network
Training", section 2.5: hours x chips x average power x PUE, times the grid's CO2e for a kWh.
"""

import dataclasses
from typing import Any

from t5x_lite.errors import UsageError
from t5x_lite.plan.chips import Chip, num_links
from t5x_lite.plan.program import Collective, DoesNotFit, Memory, Program
from t5x_lite.plan.targets import Target
from t5x_lite.plan.units import binary_bytes
from t5x_lite.run_config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Rates:
    """What is assumed besides the chip's figures.

    Attributes:
      efficiency: of the speed at the bound, what a real run reaches.
      pue: energy of the whole data center for one unit of the computers'.
      co2_kg_per_kwh: emissions of the grid.
    """

    efficiency: float = 0.5
    pue: float = 1.10
    co2_kg_per_kwh: float = 0.429

    def __post_init__(self) -> None:
        """Raises UsageError on a value that is not possible."""
        if not 0 < self.efficiency <= 1:
            raise UsageError(f"--efficiency={self.efficiency:g}: must be above 0, and 1 at most")
        if self.pue < 1:
            raise UsageError(f"--pue={self.pue:g}: must be at least 1")
        if self.co2_kg_per_kwh < 0:
            raise UsageError(f"--co2_kg_per_kwh={self.co2_kg_per_kwh:g}: must be 0 or more")


RATE_SOURCES = {
    "efficiency": "assumed: T5 11B reached 37% of TPU v3's peak (Patterson et al. 2021, table 4), "
    "a language model 60% of TPU v4's (Jouppi et al. 2023)",
    "pue": "Google's data centers (Patterson et al. 2021, table 4: 1.09 to 1.12)",
    "co2_kg_per_kwh": "average of the US grid (Patterson et al. 2021, section 2.4)",
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that one step takes at the least, by what it waits for.

    Attributes:
      compute: operations.
      memory: bytes from and to memory.
      links: bytes between chips of a slice; GPUs of a host.
      dcn: bytes between slices; hosts.
    """

    compute: float
    memory: float
    links: float
    dcn: float

    @property
    def seconds(self) -> float:
        """The largest of them."""
        return max(dataclasses.astuple(self))

    @property
    def limited_by(self) -> str:
        """The name of the largest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def bound(program: Program, target: Target, chip: Chip) -> Bound:
    """The least time of a step of `program` on `target`.

    Collectives count what the ring algorithms send, which no algorithm undercuts; they may use all
    links of the worst-placed chip at once. Of a group over s slices, (s - 1) / (n - 1) of those
    bytes cross between slices: each slice first combines what it has.

    Of programs that were not compiled for the chip (GPUs) the traffic to memory is not known; state
    and batch are read once and the state written once.
    """
    devices = target.devices_per_chip
    memory_bytes = program.bytes_accessed
    if target.is_gpu:
        memory = program.memory
        memory_bytes = 2 * (memory.parameters + memory.optimizer) + memory.batch
    crossing = [dcn_share(c) * c.link_bytes for c in program.collectives]
    within = sum(c.link_bytes for c in program.collectives) - sum(crossing)
    links = chip.link_bandwidth.value * num_links(target.topology)
    return Bound(
        compute=devices * program.flops.per_device / chip.peak_flops.value,
        memory=devices * memory_bytes / chip.hbm_bandwidth.value,
        links=devices * within / links,
        dcn=devices * sum(crossing) / chip.dcn_bandwidth.value,
    )


def dcn_share(collective: Collective) -> float:
    """Of the bytes that a device sends, the part that goes to other slices at the least."""
    n, s = collective.group_size, collective.num_slices
    if s < 2:
        return 0.0
    if collective.kind == "collective-permute":
        return 1.0
    if collective.kind == "all-to-all":
        return (n - n / s) / (n - 1)
    return (s - 1) / (n - 1)


@dataclasses.dataclass(frozen=True)
class RunCost:
    """What a whole run takes at a given time for a step.

    Attributes:
      seconds_per_step: that time.
      target_tokens_per_second: positions of the decoder, padding included.
      tokens_per_second: those of the encoder as well.
      mfu: model FLOPs (without recomputation) a second, of the chips' peak.
      hours: of the run.
      chip_hours: on all chips.
      dollars: for them; None without a price.
      kwh: with the data center's overhead.
      co2_kg: CO2-equivalent.
    """

    seconds_per_step: float
    target_tokens_per_second: float
    tokens_per_second: float
    mfu: float
    hours: float
    chip_hours: float
    dollars: float | None
    kwh: float
    co2_kg: float


def run_cost(
    seconds_per_step: float,
    program: Program,
    target: Target,
    chip: Chip,
    rates: Rates,
    config: TrainConfig,
) -> RunCost:
    """The run's TRAIN_STEPS at `seconds_per_step`."""
    lengths, rows = config.data.task_feature_lengths, config.data.batch_size
    hours = config.train_steps * seconds_per_step / 3600
    chip_hours = hours * target.num_chips
    kwh = chip_hours * chip.watts.value / 1000 * rates.pue
    peak = target.num_chips * chip.peak_flops.value
    return RunCost(
        seconds_per_step,
        target_tokens_per_second=rows * lengths["targets"] / seconds_per_step,
        tokens_per_second=rows * sum(lengths.values()) / seconds_per_step,
        mfu=program.flops.model / (peak * seconds_per_step),
        hours=hours,
        chip_hours=chip_hours,
        dollars=None if chip.price is None else chip_hours * chip.price.value,
        kwh=kwh,
        co2_kg=kwh * rates.co2_kg_per_kwh,
    )


# ---- memory --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fit:
    """Whether a step has room on a chip.

    Attributes:
      fits: it has.
      needed_bytes: on a device, at its peak.
      usable_bytes: what a device offers a program.
      sentence: both in words; if it does not fit, what dominates and what to change.
    """

    fits: bool
    needed_bytes: int
    usable_bytes: int
    sentence: str


def fit(
    memory: Memory,
    config: TrainConfig,
    target: Target,
    chip: Chip,
    *,
    refused: DoesNotFit | None = None,
) -> Fit:
    """Compares what a step needs with what a device has.

    Args:
      memory: the step's.
      config: the run, for what could be changed.
      target: where.
      chip: its figures.
      refused: what the compiler said if it has found already that it does not fit. It knows
        better than the chip's figures what is available.
    """
    usable = int(chip.usable_bytes / target.devices_per_chip)
    if refused is not None:
        usable = refused.available or usable
    sizes = f"{binary_bytes(memory.peak)} of {binary_bytes(usable)}"
    if memory.peak <= usable:
        if refused is None:
            return Fit(True, memory.peak, usable, f"fits: {sizes}")
        # It did not say how much: the temporaries, which alone are unknown then, fill the rest.
        memory = dataclasses.replace(memory, temporaries=usable - memory.peak)
        advice = _advice(memory, config, target)
        sentence = f"does not fit: the compiler refuses: {refused}: {advice}"
        return Fit(False, memory.peak, usable, sentence)
    parts = {
        "parameters": memory.parameters,
        "the optimizer's state": memory.optimizer,
        "the batch": memory.batch,
        "temporaries (activations, gradients, workspace)": memory.temporaries,
    }
    name, largest = max(parts.items(), key=lambda item: item[1])
    verb = "dominates" if name in ("the batch", "the optimizer's state") else "dominate"
    advice = _advice(memory, config, target)
    sentence = f"does not fit: {sizes}; {name} {verb} ({binary_bytes(largest)}): {advice}"
    return Fit(False, memory.peak, usable, sentence)


def _advice(memory: Memory, config: TrainConfig, target: Target) -> str:
    """What would take memory away, the cheapest first."""
    mesh = config.mesh or {"data": target.num_devices}
    rows = config.data.batch_size // (mesh.get("data", 1) * mesh.get("fsdp", 1))
    state = memory.parameters + memory.optimizer
    choices = []
    if memory.temporaries > state:
        if config.loss.num_microbatches < rows:
            count = config.loss.num_microbatches
            choices.append(f"more microbatches than NUM_MICROBATCHES = {count}")
        if config.model.remat_policy != "full":
            choices.append("T5Config.remat_policy = 'full'")
    if mesh.get("data", 1) > 1:
        choices.append("fsdp or model in MESH instead of data")
    elif memory.temporaries > state and mesh.get("fsdp", 1) > 1:
        choices.append("more of model in MESH instead of fsdp")
    choices.append("more chips")
    return "; ".join(choices[:-1]) + ("; or " if len(choices) > 1 else "") + choices[-1]


# ---- all of it -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is said of one program on one target.

    Attributes:
      program: what was compiled.
      fit: whether it has room.
      bound: the least time of a step.
      at_bound: the run at that time.
      estimate: the run at the efficiency that is assumed.
    """

    program: Program
    fit: Fit
    bound: Bound
    at_bound: RunCost
    estimate: RunCost

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        times = dataclasses.asdict(self.bound)
        return {
            "fits": self.fit.fits,
            "fit": dataclasses.asdict(self.fit),
            "program": self.program.to_dict(),
            "bound": times | {"seconds": self.bound.seconds, "limited_by": self.bound.limited_by},
            "at_bound": dataclasses.asdict(self.at_bound),
            "estimate": dataclasses.asdict(self.estimate),
        }


def make_plan(
    program: Program, config: TrainConfig, target: Target, chip: Chip, rates: Rates
) -> Plan:
    """Everything that follows from a compiled step."""
    least = bound(program, target, chip)
    costs = [
        run_cost(seconds, program, target, chip, rates, config)
        for seconds in (least.seconds, least.seconds / rates.efficiency)
    ]
    return Plan(program, fit(program.memory, config, target, chip), least, *costs)
