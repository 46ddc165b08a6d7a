"""Published peaks, prices and power of the chips that a run can be planned for.

Each figure says where it was read, in 2026, or that it is an assumption; the command line can
replace every one. Bandwidths count one direction: a data sheet's "bidirectional" one is twice that.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from t5x_lite.errors import UsageError, nearest

GIB = 2**30


class Figure(NamedTuple):
    """A number and where it comes from."""

    value: float
    source: str


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      kind: as a target has it: "v5e", "h100".
      peak_flops: bfloat16 operations a second, without sparsity.
      hbm_bytes: memory.
      reserved_bytes: of it, what a program cannot have.
      hbm_bandwidth: bytes a second from and to memory.
      link_bandwidth: bytes a second over one link to a neighbour; on GPUs over all NVLinks.
      dcn_bandwidth: bytes a second to other slices, on GPUs to other hosts.
      watts: average power with the chip's share of its host.
      price: dollars an hour on demand; None where no list price was found.
    """

    kind: str
    peak_flops: Figure
    hbm_bytes: Figure
    reserved_bytes: Figure
    hbm_bandwidth: Figure
    link_bandwidth: Figure
    dcn_bandwidth: Figure
    watts: Figure
    price: Figure | None

    @property
    def usable_bytes(self) -> float:
        """What a program can have of the memory."""
        return self.hbm_bytes.value - self.reserved_bytes.value


class Flag(NamedTuple):
    """How a figure of a chip is given: its name, the size of its unit, and the unit in words."""

    name: str
    unit: float
    words: str


FLAGS = {
    "peak_flops": Flag("peak_tflops", 1e12, "TFLOP/s in bfloat16"),
    "hbm_bytes": Flag("hbm_gib", GIB, "GiB of memory"),
    "reserved_bytes": Flag("reserved_gib", GIB, "GiB of it that a program cannot have"),
    "hbm_bandwidth": Flag("hbm_gb_per_s", 1e9, "GB/s from and to memory"),
    "link_bandwidth": Flag("link_gb_per_s", 1e9, "GB/s over a link, one way"),
    "dcn_bandwidth": Flag("dcn_gb_per_s", 1e9, "GB/s to other slices or hosts, one way"),
    "watts": Flag("watts_per_chip", 1.0, "W on average with its share of the host"),
    "price": Flag("price_per_chip_hour", 1.0, "dollars an hour"),
}


def num_links(topology: tuple[int, ...]) -> int:
    """Links of the worst-placed chip of a slice.

    Two in each dimension that closes to a ring, one in each line. Of three dimensions all are rings
    where all sizes are multiples of 4 (v4, v5p), of two those of 16 (v5e, v6e): Google's pages of
    these TPUs; Austin et al. 2025, "How to Scale Your Model", part 2.

    Args:
      topology: chips along each dimension; (number,) for GPUs, which have one link to a switch.
    """
    if len(topology) == 3:
        rings = [all(size % 4 == 0 for size in topology)] * 3
    else:
        rings = [size == 16 for size in topology] if len(topology) == 2 else [False]
    links = [1 + ring for size, ring in zip(topology, rings, strict=True) if size > 1]
    return max(sum(links), 1)


def _page(kind: str, value: float) -> Figure:
    return Figure(value, f"Google Cloud documentation, 'TPU {kind}'")


def _libtpu(reserved_gib: float) -> Figure:
    return Figure(reserved_gib * GIB, "libtpu 0.0.42 refuses programs that need it")


def _google_price(dollars: float) -> Figure:
    return Figure(dollars, "Google Cloud on demand, US regions (SkyPilot's catalogue)")


def _sheet(kind: str, value: float, note: str = "") -> Figure:
    return Figure(value, f"NVIDIA's data sheet, {kind} SXM{note}")


# TPU v3 with memory, network, fans and host: 310 W on average while T5 11B was trained (Patterson
# et al. 2021, table 4), of which 220 W are the chip's (Google Cloud documentation, 'TPU v3').
_ASSUMED_WATTS = Figure(
    310, "assumed, none is published: TPU v3 and host, training T5 11B (Patterson et al. 2021)"
)
_GPU_RESERVE = "assumed: 5% (XLA_PYTHON_CLIENT_MEM_FRACTION=0.95; JAX by itself takes 75%)"
_GPU_NETWORK = "NVIDIA's DGX user guide: a network adapter a GPU"

CHIPS = {
    "v4": Chip(
        "v4",
        peak_flops=_page("v4", 275e12),
        hbm_bytes=_page("v4", 32 * GIB),
        reserved_bytes=_libtpu(32 - 30.75),
        hbm_bandwidth=_page("v4", 1200e9),
        link_bandwidth=Figure(50e9, "Jouppi et al. 2023, 'TPU v4'"),
        dcn_bandwidth=Figure(25e9 / 4, "Austin et al. 2025, part 2: 25 GB/s for a host's 4 chips"),
        watts=Figure(
            170 + 310 - 220,
            "Google Cloud documentation, 'TPU v4': 170 W on average, and 90 W for the host as of a "
            "TPU v3 (Patterson et al. 2021)",
        ),
        price=_google_price(3.22),
    ),
    "v5e": Chip(
        "v5e",
        peak_flops=_page("v5e", 197e12),
        hbm_bytes=_page("v5e", 16 * GIB),
        reserved_bytes=_libtpu(16 - 15.75),
        hbm_bandwidth=_page("v5e", 819e9),
        link_bandwidth=_page("v5e", 400e9 / 2 / 4),
        dcn_bandwidth=_page("v5e", 6.4e12 / 8 / 256),
        watts=_ASSUMED_WATTS,
        price=_google_price(1.20),
    ),
    "v5p": Chip(
        "v5p",
        peak_flops=_page("v5p", 459e12),
        hbm_bytes=_page("v5p", 96 * GIB),
        reserved_bytes=_libtpu(96 - 95.74),
        hbm_bandwidth=_page("v5p", 2765e9),
        link_bandwidth=_page("v5p", 1200e9 / 2 / 6),
        dcn_bandwidth=_page("v5p", 50e9 / 8),
        watts=_ASSUMED_WATTS,
        price=_google_price(4.20),
    ),
    "v6e": Chip(
        "v6e",
        peak_flops=_page("v6e", 918e12),
        hbm_bytes=_page("v6e", 32 * GIB),
        reserved_bytes=_libtpu(32 - 31.25),
        hbm_bandwidth=_page("v6e", 1638e9),
        link_bandwidth=_page("v6e", 800e9 / 2 / 4),
        dcn_bandwidth=_page("v6e", 4 * 200e9 / 8 / 8),
        watts=_ASSUMED_WATTS,
        price=_google_price(2.70),
    ),
    "tpu7x": Chip(
        "tpu7x",
        peak_flops=_page("7x", 2307e12),
        hbm_bytes=_page("7x", 192 * GIB),
        reserved_bytes=_libtpu(192 - 2 * 94.75),
        hbm_bandwidth=_page("7x", 7380e9),
        link_bandwidth=_page("7x", 1200e9 / 2 / 6),
        dcn_bandwidth=_page("7x", 100e9 / 8),
        watts=_ASSUMED_WATTS,
        price=None,
    ),
    "a100": Chip(
        "a100",
        peak_flops=_sheet("A100", 312e12),
        hbm_bytes=_sheet("A100", 80 * GIB, " of 80 GB"),
        reserved_bytes=Figure(4 * GIB, _GPU_RESERVE),
        hbm_bandwidth=_sheet("A100", 2039e9),
        link_bandwidth=_sheet("A100", 600e9 / 2),
        dcn_bandwidth=Figure(200e9 / 8, _GPU_NETWORK),
        watts=_sheet("A100", 400, ": its limit, without the host"),
        price=None,
    ),
    "h100": Chip(
        "h100",
        peak_flops=_sheet("H100", 989e12),
        hbm_bytes=_sheet("H100", 80 * GIB),
        reserved_bytes=Figure(4 * GIB, _GPU_RESERVE),
        hbm_bandwidth=_sheet("H100", 3350e9),
        link_bandwidth=_sheet("H100", 900e9 / 2),
        dcn_bandwidth=Figure(400e9 / 8, _GPU_NETWORK),
        watts=_sheet("H100", 700, ": its limit, without the host"),
        price=Figure(31.92 / 8, "Lambda on demand, 8 GPUs (SkyPilot's catalogue)"),
    ),
    "h200": Chip(
        "h200",
        peak_flops=_sheet("H200", 989e12),
        hbm_bytes=_sheet("H200", 141 * GIB),
        reserved_bytes=Figure(7 * GIB, _GPU_RESERVE),
        hbm_bandwidth=_sheet("H200", 4800e9),
        link_bandwidth=_sheet("H200", 900e9 / 2),
        dcn_bandwidth=Figure(400e9 / 8, _GPU_NETWORK),
        watts=_sheet("H200", 700, ": its limit, without the host"),
        price=None,
    ),
}


def chip_of(kind: str, given: Mapping[str, float] | None = None) -> Chip:
    """The chip of a target, with the figures that were given in place of its own.

    Args:
      kind: `Target.kind`.
      given: values of `FLAGS`, in the flags' units.

    Raises:
      UsageError: nothing is known of the chip, or a value is not possible.
    """
    if kind not in CHIPS:
        raise UsageError(f"no peaks are known of {kind!r}; {nearest(kind, CHIPS)}")
    figures: dict[str, Any] = {}
    for name, value in (given or {}).items():
        may_be_zero = name in ("reserved_bytes", "watts", "price")
        if value < 0 or (value == 0 and not may_be_zero):
            least = "0 or more" if may_be_zero else "above 0"
            raise UsageError(f"--{FLAGS[name].name}={value:g}: must be {least}")
        figures[name] = Figure(value * FLAGS[name].unit, "given")
    return dataclasses.replace(CHIPS[kind], **figures)
