"""Hardware that a run can be compiled for without having it."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from t5x_lite import setup
from t5x_lite.errors import UsageError, nearest
from t5x_lite.partitioning import Partitioning
from t5x_lite.run_config import TrainConfig

# Slices as Google Cloud's documentation of each chip lists them. libtpu would also compile for
# shapes that nobody can order.
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_CUBES = ("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")


@dataclasses.dataclass(frozen=True)
class _Tpu:
    """What slices of a chip there are.

    Attributes:
      shapes: those that are listed.
      max_chips: of a slice put together from cubes of 4x4x4; 0 if only the listed ones exist.
      devices_per_chip: what JAX sees of a chip.
    """

    shapes: tuple[str, ...]
    max_chips: int = 0
    devices_per_chip: int = 1


_TPUS = {
    "v4": _Tpu(_BELOW_A_CUBE + _CUBES, max_chips=4096),
    "v5e": _Tpu(_PLANES),
    "v5p": _Tpu((*_BELOW_A_CUBE, *_CUBES, "16x16x24"), max_chips=6144),
    "v6e": _Tpu(_PLANES),
    "tpu7x": _Tpu(_BELOW_A_CUBE + _CUBES, max_chips=9216, devices_per_chip=2),
}

# GPUs that one host connects by NVLink, as in NVIDIA's DGX and HGX systems.
GPUS_PER_HOST = {"a100": 8, "h100": 8, "h200": 8}

KINDS = (*_TPUS, *GPUS_PER_HOST)

_TARGET = re.compile(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)")
_NOTATION = "write 'v5e:16x16', '2xv5e:16x16' for two slices, or 'h100:64'"


@dataclasses.dataclass(frozen=True)
class _Virtual:
    """A virtual device with what a mesh is laid out by."""

    id: int
    device: Any
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips of one kind, wired in one way; `parse_target` makes it.

    Attributes:
      name: as it was asked for, "v5e:16x16", "2xv5e:16x16", "h100:64".
      kind: one of KINDS.
      topology: chips along each dimension of one slice; (number,) of one host for GPUs.
      num_slices: slices, between which the data-center network runs; for GPUs the hosts.
      devices_per_chip: what JAX sees of one chip: 2 on tpu7x, else 1 (v4 too, whose two cores then
        run as one, which is how JAX finds it on a real v4).
      chips_per_host: chips that share a host.
    """

    name: str
    kind: str
    topology: tuple[int, ...]
    num_slices: int
    devices_per_chip: int
    chips_per_host: int

    @property
    def is_gpu(self) -> bool:
        """Whether it is partitioned over virtual CPU devices instead of compiled for the chip."""
        return self.kind in GPUS_PER_HOST

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return self.num_slices * math.prod(self.topology)

    @property
    def num_devices(self) -> int:
        """JAX devices of all slices."""
        return self.num_chips * self.devices_per_chip

    def slice_of(self, device: Any) -> int:
        """The number of the slice (GPUs: the host) of one of `devices`."""
        if self.is_gpu:
            return device.id // math.prod(self.topology)
        return getattr(device, "slice_index", None) or 0

    def devices(self) -> list[Any]:
        """The JAX devices, slice by slice; `prepare` comes first.

        Raises:
          UsageError: libtpu is not installed or refuses the topology, or JAX was started with too
            few devices.
        """
        if self.is_gpu:
            return self._virtual_devices()
        if importlib.util.find_spec("libtpu") is None:
            raise UsageError(
                f"{self.name}: libtpu, which compiles for it, is not installed; "
                "pip install 't5x-lite[plan]'"
            )
        shape = "x".join(map(str, self.topology))
        options: dict[str, Any] = {}
        if self.num_slices > 1:
            options["num_slices"] = self.num_slices
        if self.kind == "v4":
            options["chip_config_name"] = "megacore"
        if self.chips_per_host != 4:
            options["chips_per_host_bounds"] = (*self.topology, 1)
        try:
            # What libtpu writes to stderr is about the TPU that is not there.
            with captured_stderr():
                topology = topologies.get_topology_desc(f"{self.kind}:{shape}", "tpu", **options)
        except jax.errors.JaxRuntimeError as e:
            raise UsageError(f"{self.name}: libtpu does not know it: {e}") from e
        return sorted(topology.devices, key=self.slice_of)

    def partitioning_of(self, config: TrainConfig) -> Partitioning:
        """The run's mesh over `devices`, laid over slices (GPUs: hosts) as a real one would be.

        Raises:
          UsageError: as `setup.partitioning_of` and `devices`.
        """
        devices = self.devices()
        if not self.is_gpu:
            return setup.partitioning_of(config, devices)
        # JAX counts a GPU's host as its slice, and virtual devices have none.
        in_hosts = [_Virtual(d.id, d, self.slice_of(d), d.process_index) for d in devices]
        partitioning = setup.partitioning_of(config, in_hosts)
        mesh = partitioning.mesh
        grid = np.vectorize(lambda virtual: virtual.device, otypes=[object])(mesh.devices)
        mesh = Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
        return dataclasses.replace(partitioning, mesh=mesh)

    def _virtual_devices(self) -> list[Any]:
        devices = jax.devices("cpu")
        if len(devices) < self.num_devices:
            raise UsageError(
                f"{self.name}: JAX was started with {len(devices)} virtual CPU devices instead of "
                f"{self.num_devices}; plan it in a process of its own"
            )
        return devices[: self.num_devices]


def parse_target(text: str) -> Target:
    """Reads "v5e:16x16", "2xv5e:16x16" (two slices) or "h100:64".

    Raises:
      UsageError: no such chip or shape, with those that are known.
    """
    match = _TARGET.fullmatch(text.strip().lower())
    if match is None:
        raise UsageError(f"--target={text}: {_NOTATION}")
    num_slices, kind = int(match[1] or 1), match[2]
    topology = tuple(int(n) for n in match[3].split("x"))
    if kind not in KINDS:
        raise UsageError(f"--target={text}: unknown chip {kind!r}; {nearest(kind, KINDS)}")
    if min(num_slices, *topology) < 1:
        raise UsageError(f"--target={text}: counts must be at least 1")
    if kind in GPUS_PER_HOST:
        return _gpus(text, kind, topology, num_slices)
    tpu, shape = _TPUS[kind], "x".join(map(str, topology))
    cubes = len(topology) == 3 and not any(n % 4 for n in topology)
    if shape not in tpu.shapes and not (cubes and math.prod(topology) <= tpu.max_chips):
        multiples = (
            f", and other multiples of 4x4x4 up to {tpu.max_chips} chips" if tpu.max_chips else ""
        )
        raise UsageError(
            f"--target={text}: {kind} has no slice of {shape}; known: {', '.join(tpu.shapes)}"
            f"{multiples}; several slices: 2x{kind}:{tpu.shapes[-1]}"
        )
    # A slice within one host may use all of it; others are made of hosts with four chips each.
    chips = math.prod(topology)
    chips_per_host = chips if kind in ("v5e", "v6e") and chips <= 8 else 4
    return Target(text, kind, topology, num_slices, tpu.devices_per_chip, chips_per_host)


def _gpus(text: str, kind: str, topology: tuple[int, ...], num_slices: int) -> Target:
    per_host = GPUS_PER_HOST[kind]
    if len(topology) != 1 or num_slices != 1:
        raise UsageError(f"--target={text}: give a number of GPUs, like '{kind}:64'")
    (count,) = topology
    if count > per_host and count % per_host:
        raise UsageError(
            f"--target={text}: hosts have {per_host} GPUs; give at most {per_host} or a multiple"
        )
    hosts = max(count // per_host, 1)
    return Target(text, kind, (count // hosts,), hosts, 1, count // hosts)


def prepare(target: Target) -> None:
    """Makes this process one that compiles and never touches an accelerator.

    To be called before anything asks JAX for its devices: they become those of the CPU (for GPUs as
    many as the target has), and libtpu asks no metadata server.

    Raises:
      UsageError: JAX has already started on an accelerator, or with too few devices.
    """
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")
    jax.config.update("jax_platforms", "cpu")
    # What was compiled for a chip cannot be read back without one.
    jax.config.update("jax_enable_compilation_cache", False)
    if target.is_gpu:
        # Too late if JAX has started; then `devices` says so if there are too few.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", target.num_devices)
    if jax.default_backend() != "cpu":
        raise UsageError(
            f"{target.name}: JAX has already started on {jax.default_backend()}; plan it in a "
            "process of its own"
        )


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Keeps what anything in this process writes to stderr meanwhile; the lines, at the end.

    The last words of a compiler that ends the whole process stay in a file `t5x_lite-stderr-*` in
    the directory for temporary files: only an orderly end deletes it.
    """
    lines: list[str] = []
    sys.stderr.flush()
    with tempfile.NamedTemporaryFile(prefix="t5x_lite-stderr-") as written:
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            lines += written.read().decode(errors="replace").splitlines()
