"""What Google calls the chips that `plan` calls v5e:16x16; used by tpu_vm.py and gke_jobset.py.

The names are Google's as published in June 2026: accelerator types and software versions in Cloud
TPU's documentation, node labels and machine types in GKE's.
"""

import argparse
import dataclasses
import math
import re

CHIPS_PER_HOST = 4  # of every slice of more than one chip, on the machine types named below

# Slices as Google Cloud's documentation of each chip lists them; t5x_lite/plan/targets.py has the
# same list, and importing it from there would bring JAX to where no more than gcloud is needed.
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of chip.

    Attributes:
      topologies: those of its slices that are not made of cubes of 4x4x4.
      max_chips: of a slice made of such cubes; 0 if there is none.
      accelerator_type: first half of the accelerator type, "v5p" of "v5p-16".
      cores_per_chip: what the second half counts: cores (2 a chip) on v4 and v5p, else chips.
      runtime_version: the software of a TPU VM that JAX is installed on.
      gke_accelerator: GKE's node label cloud.google.com/gke-tpu-accelerator.
      gke_machine_family: GKE's machine type without the number of chips, "ct5p-hightpu" of
        "ct5p-hightpu-4t".
    """

    topologies: tuple[str, ...]
    max_chips: int
    accelerator_type: str
    cores_per_chip: int
    runtime_version: str
    gke_accelerator: str
    gke_machine_family: str


GENERATIONS = {
    "v4": Generation(
        *(_BELOW_A_CUBE, 4096, "v4", 2),
        *("tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu"),
    ),
    "v5e": Generation(
        *(_PLANES, 0, "v5litepod", 1),
        *("v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu"),
    ),
    "v5p": Generation(
        *(_BELOW_A_CUBE, 6144, "v5p", 2),
        *("v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu"),
    ),
    "v6e": Generation(
        *(_PLANES, 0, "v6e", 1),
        *("v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard"),
    ),
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

    @property
    def gke_machine_type(self) -> str:
        """GKE's name of one host."""
        return f"{self.generation.gke_machine_family}-{self.chips_per_host}t"


def parse_target(text: str) -> TpuTarget:
    """Reads "v5e:16x16" or "2xv5e:16x16", as `python -m t5x_lite plan --target` does.

    Raises:
      argparse.ArgumentTypeError: no such chip, or no slice of it has this topology.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", text.strip().lower())
    chips = ", ".join(GENERATIONS)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write CHIP:TOPOLOGY, or NxCHIP:TOPOLOGY for N slices, as in v5e:16x16 or "
            f"2xv5e:16x16; the chips are {chips}"
        )
    chip, sizes = found[2], [int(size) for size in found[3].split("x")]
    if chip not in GENERATIONS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: nothing here starts a run on {chip}, although `plan` knows more chips; "
            f"the chips are {chips}"
        )
    target = TpuTarget(GENERATIONS[chip], "x".join(map(str, sizes)), int(found[1] or 1))
    if target.num_slices < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: ask for at least 1 slice")
    topologies, max_chips = target.generation.topologies, target.generation.max_chips
    of_cubes = len(sizes) == 3 and not any(size % 4 for size in sizes)
    if target.topology not in topologies and not (
        of_cubes and 0 < target.chips_per_slice <= max_chips
    ):
        cubes = f", and multiples of 4x4x4 up to {max_chips} chips" if max_chips else ""
        raise argparse.ArgumentTypeError(
            f"{text!r}: {chip} has no slice of {target.topology}; there are "
            f"{', '.join(topologies)}{cubes}"
        )
    return target
