"""What Google calls the chips that `plan` calls v5e:16x16; used by tpu_vm.py and gke_jobset.py.

The names are Google's as published in June 2026: accelerator types and software versions in Cloud
TPU's documentation, node labels and machine types in GKE's.
"""

import argparse
import dataclasses
import math
import re

CHIPS_PER_HOST = 4  # of every slice of more than one chip, on the machine types named below


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of chip.

    Attributes:
      num_dimensions: of a topology, 4x4 or 4x4x4.
      accelerator_type: first half of the accelerator type, "v5p" of "v5p-16".
      cores_per_chip: what the second half counts: cores (2 a chip) on v4 and v5p, else chips.
      runtime_version: the software of a TPU VM that JAX is installed on.
      gke_accelerator: GKE's node label cloud.google.com/gke-tpu-accelerator.
      gke_machine_type: of a host with CHIPS_PER_HOST chips.
    """

    num_dimensions: int
    accelerator_type: str
    cores_per_chip: int
    runtime_version: str
    gke_accelerator: str
    gke_machine_type: str


GENERATIONS = {
    "v4": Generation(3, "v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-4t"),
    "v5e": Generation(
        2, "v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"
    ),
    "v5p": Generation(3, "v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-4t"),
    "v6e": Generation(2, "v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-4t"),
}


@dataclasses.dataclass(frozen=True)
class TpuTarget:
    """`num_slices` slices, each of the chips of `topology`: "2xv5e:16x16" is two of 256 chips."""

    generation: Generation
    topology: str
    num_slices: int

    @property
    def chips_per_slice(self) -> int:
        return math.prod(int(size) for size in self.topology.split("x"))

    @property
    def hosts_per_slice(self) -> int:
        return max(1, self.chips_per_slice // CHIPS_PER_HOST)

    @property
    def chips_per_host(self) -> int:
        return self.chips_per_slice // self.hosts_per_slice

    @property
    def accelerator_type(self) -> str:
        """Cloud TPU's name of one slice; it says the size, and Cloud TPU chooses a v5p's shape."""
        size = self.chips_per_slice * self.generation.cores_per_chip
        return f"{self.generation.accelerator_type}-{size}"


def parse_target(text: str) -> TpuTarget:
    """Reads "v5e:16x16" or "2xv5e:16x16", as `python -m t5x_lite plan --target` does.

    Raises:
      argparse.ArgumentTypeError: no such chip, or a topology that cannot be one of its slices.
    """
    found = re.fullmatch(r"(?:(\d+)x)?(\w+):(\d+(?:x\d+)*)", text)
    if not found or found[2] not in GENERATIONS:
        chips = ", ".join(GENERATIONS)
        raise argparse.ArgumentTypeError(
            f"{text!r}: write CHIP:TOPOLOGY, or NxCHIP:TOPOLOGY for N slices, as in v5e:16x16 or "
            f"2xv5e:16x16; the chips are {chips}"
        )
    target = TpuTarget(GENERATIONS[found[2]], found[3], int(found[1] or 1))
    example = "x".join("4" * target.generation.num_dimensions)
    if target.topology.count("x") != target.generation.num_dimensions - 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a topology of {found[2]} is like {example}")
    if target.num_slices < 1 or target.chips_per_slice not in (1, *range(4, 2**16, 4)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: a slice has 1 chip or hosts of {CHIPS_PER_HOST}, as {example} has"
        )
    return target
