"""What can be planned for, and what is said of the rest."""

import os
import subprocess
import sys

import pytest

from t5x_lite.errors import UsageError
from t5x_lite.plan.targets import KINDS, parse_target


@pytest.mark.parametrize(
    ("text", "kind", "chips", "devices", "slices", "chips_per_host"),
    [
        ("v5e:16x16", "v5e", 256, 256, 1, 4),
        ("V5E:2x4", "v5e", 8, 8, 1, 8),
        ("2Xv5p:4X4X4", "v5p", 128, 128, 2, 4),
        ("v6e:1x1", "v6e", 1, 1, 1, 1),
        ("2xv5e:16x16", "v5e", 512, 512, 2, 4),
        ("v4:4x4x4", "v4", 64, 64, 1, 4),
        ("v5p:16x16x16", "v5p", 4096, 4096, 1, 4),
        ("v5p:4x4x12", "v5p", 192, 192, 1, 4),
        ("tpu7x:2x2x1", "tpu7x", 4, 8, 1, 4),
        ("h100:64", "h100", 64, 64, 8, 8),
        ("a100:2", "a100", 2, 2, 1, 2),
    ],
)
def test_targets(
    text: str, kind: str, chips: int, devices: int, slices: int, chips_per_host: int
) -> None:
    target = parse_target(text)
    assert (target.name, target.kind) == (text, kind)
    assert (target.num_chips, target.num_devices) == (chips, devices)
    assert (target.num_slices, target.chips_per_host) == (slices, chips_per_host)
    assert target.is_gpu == (kind in ("a100", "h100", "h200"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5e", "write 'v5e:16x16'"),
        ("", "write 'v5e:16x16'"),
        ("v5e:4by4", "write 'v5e:16x16'"),
        ("v9:4x4", "unknown chip 'v9'; did you mean 'v4'"),
        ("v5litepod:4x4", "unknown chip 'v5litepod'"),
        ("v5e:3x3", "v5e has no slice of 3x3; known: 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5e:32x32", "several slices: 2xv5e:16x16"),
        ("v4:4x4", "known: 2x2x1, 2x2x2"),
        ("v5p:32x32x32", "other multiples of 4x4x4 up to 6144 chips"),
        ("v5e:0x4", "at least 1"),
        ("0xv5e:4x4", "at least 1"),
        ("h100:12", "hosts have 8 GPUs"),
        ("h100:4x4", "give a number of GPUs, like 'h100:64'"),
        ("2xh100:8", "give a number of GPUs, like 'h100:64'"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_target(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_every_kind_has_peaks() -> None:
    from t5x_lite.plan.chips import CHIPS

    assert set(KINDS) == set(CHIPS)


def _run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-c", "from t5x_lite.plan.targets import *\n" + code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_gpus_are_virtual_devices_by_host() -> None:
    done = _run(
        "t = parse_target('h100:16'); prepare(t)\n"
        "print([t.slice_of(d) for d in t.devices()])\n"
        "parse_target('h100:32').devices()\n"
    )
    assert done.stdout.strip() == str([0] * 8 + [1] * 8)
    assert "with 16 virtual CPU devices instead of 32" in done.stderr


def test_dcn_mesh_lays_an_axis_over_gpu_hosts() -> None:
    """Of 4 x 2 over two hosts either axis goes from one to the other; `model` cannot by itself."""
    done = _run(
        "import sys\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "t = parse_target('h100:16'); prepare(t)\n"
        "from test_plan_program import CONFIG\n"
        "def hosts(**changes):\n"
        "    p = t.partitioning_of(dataclasses.replace(CONFIG, **changes))\n"
        "    print(np.vectorize(t.slice_of)(p.mesh.devices)[..., 0].tolist())\n"
        "hosts(mesh={'data': 4, 'fsdp': 2, 'model': 2})\n"
        "hosts(mesh={'data': 4, 'fsdp': 2, 'model': 2}, dcn_mesh={'fsdp': 2})\n"
        "hosts(mesh={'model': 16})\n"
    )
    by_data = [[0, 0], [0, 0], [1, 1], [1, 1]]
    by_fsdp = [[0, 1]] * 4
    assert done.stdout.split("\n")[:2] == [str(by_data), str(by_fsdp)], done.stderr
    assert "does not divide over 2 slices" in done.stderr


def test_tpu_topologies() -> None:
    pytest.importorskip("libtpu")
    done = _run(
        "for n in ('v5e:16x16', 'v5e:1x1', 'v6e:2x4', 'v4:2x2x1', 'v5p:4x4x4', 'tpu7x:2x2x1',"
        " '2xv5e:4x4'):\n"
        "    t = parse_target(n); prepare(t); d = t.devices()\n"
        "    assert len(d) == t.num_devices, n\n"
        "    assert len({t.slice_of(x) for x in d}) == t.num_slices, n\n"
        "    assert len({x.process_index for x in d}) == t.num_chips // t.chips_per_host, n\n"
        "print(jax.default_backend())\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cpu"
    assert done.stderr == ""  # libtpu's complaints about the TPU that is not there


def test_without_libtpu_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 't5x-lite\[plan\]'"):
        parse_target("v5e:2x2").devices()
