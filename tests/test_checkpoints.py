import hashlib
import json
import logging
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_lite.checkpoints import CheckpointError, Checkpoints, restore_params
from t5x_lite.errors import UsageError


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


def make_state(value: float = 0.0) -> State:
    """Small, but with what real ones have: bf16, int32, a masked optimizer, special floats."""
    rng = np.random.default_rng(0)
    params = {
        "decoder": {
            "kernel": jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32) + value,
            "scale": jnp.asarray(rng.normal(size=(6,)), jnp.bfloat16),
        },
        "embedding": jnp.array([[-0.0, np.inf], [np.nan, 1e-45]], jnp.float32),
    }
    mask = {"decoder": {"kernel": True, "scale": False}, "embedding": True}
    optimizer = optax.chain(
        optax.masked(optax.adamw(0.1), mask), optax.scale_by_schedule(lambda count: 0.1)
    )
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(value, x.dtype), optimizer.init(params))
    return State(jnp.int32(value), params, opt_state)


def abstract_of(tree: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


ABSTRACT = abstract_of(make_state())


def as_bytes(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_bit_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert as_bytes(actual) == as_bytes(expected)


def save_steps(directory: pathlib.Path, *steps: int, **options: Any) -> None:
    checkpoints = Checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(step, make_state(step), f"input {step}".encode())
    checkpoints.close()


def files_under(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def names_in(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip_a_bit(path: pathlib.Path) -> bytes:
    """Returns what was there before. A file of no bytes gets one."""
    before = path.read_bytes()
    after = bytearray(before or b"\0")
    after[len(before) // 2] ^= 1
    path.write_bytes(bytes(after))
    return before


def snapshot(directory: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in files_under(directory)}


def test_restored_state_is_bit_equal(tmp_path):
    state = make_state(3)
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.restore_latest(ABSTRACT) is None
    checkpoints.save(3, state, b"\x00position\xff")
    checkpoints.wait()

    restored = Checkpoints(tmp_path / "run").restore_latest(ABSTRACT)

    assert (restored.step, restored.input_state, restored.skipped) == (3, b"\x00position\xff", ())
    assert type(restored.state) is State
    assert_bit_equal(restored.state, expected)
    assert checkpoints.steps() == [3]
    checkpoints.save(4, state, None)
    assert checkpoints.restore(4, ABSTRACT).input_state is None
    assert checkpoints.restore(3, ABSTRACT).input_state == b"\x00position\xff"


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
    state = State(jnp.int32(0), {"w": jnp.arange(2_000_000, dtype=jnp.float32)}, ())
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 4):
        expected = np.array(state.params["w"], copy=True)
        checkpoints.save(step, state, None)
        state = jax.block_until_ready(overwrite(state))
        restored = checkpoints.restore(step, abstract_of(state))
        np.testing.assert_array_equal(restored.state.params["w"], expected)
        state = jax.tree.map(lambda x, s=step: x + s, state)


def test_digests_are_those_of_sha256sum(tmp_path):
    save_steps(tmp_path, 1)
    step_dir = tmp_path / "1"
    listed = (step_dir / "SHA256SUMS").read_text().splitlines()[:-1]
    on_disk = [str(p.relative_to(step_dir)) for p in files_under(step_dir)]
    assert sorted(line.split("  ", 1)[1] for line in listed) == sorted(
        name for name in on_disk if name != "SHA256SUMS"
    )
    for line in listed:
        digest, name = line.split("  ", 1)
        assert digest == hashlib.sha256((step_dir / name).read_bytes()).hexdigest()
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=step_dir, check=True)


def _truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip_a_bit, _truncate, pathlib.Path.unlink])
def test_harm_to_any_file_is_noticed(tmp_path, caplog, harm):
    save_steps(tmp_path, 1, 2)
    checkpoints = Checkpoints(tmp_path)
    files = files_under(tmp_path / "2")
    assert {"SHA256SUMS", "_METADATA", "manifest.ocdbt", "process_0_of_1"} <= {
        path.name for path in files
    }
    for path in files:
        before = path.read_bytes()
        if harm is _truncate and not before:
            continue
        harm(path)
        harmed = snapshot(tmp_path)
        caplog.clear()
        restored = checkpoints.restore_latest(ABSTRACT)
        name = str(path.relative_to(tmp_path / "2"))
        assert restored.step == 1, name
        assert_bit_equal(restored.state, make_state(1))
        assert restored.input_state == b"input 1"
        assert len(restored.skipped) == len(caplog.messages) == 1
        for line in (*restored.skipped, *caplog.messages):
            assert "step 2: " in line
            assert name in line
        with pytest.raises(CheckpointError, match="2 is damaged: .*" + path.name):
            checkpoints.restore(2, ABSTRACT)
        assert snapshot(tmp_path) == harmed
        path.write_bytes(before)
    assert checkpoints.restore_latest(ABSTRACT).step == 2


def test_missing_parts_and_empty_steps_are_passed_over(tmp_path, caplog):
    save_steps(tmp_path, 1, 2, 3)
    shutil.rmtree(tmp_path / "2" / "input_position")
    shutil.rmtree(tmp_path / "3" / "optimizer")
    (tmp_path / "40").mkdir()
    (tmp_path / "50.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "60.incomplete").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "70").write_text("a file, not a step")
    before = snapshot(tmp_path)

    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore_latest(ABSTRACT)

    assert restored.step == 1
    assert [line.partition(":")[0] for line in restored.skipped] == [
        "step 60", "step 50", "step 40", "step 3", "step 2",
    ]  # fmt: skip
    assert "empty" in restored.skipped[2]
    assert len(caplog.messages) == 5
    assert checkpoints.steps() == [1, 2, 3]
    assert snapshot(tmp_path) == before


def test_no_intact_step_is_an_error_that_names_all(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        flip_a_bit(tmp_path / str(step) / "SHA256SUMS")
    with pytest.raises(CheckpointError, match=r"step 2: .*SHA256SUMS.*step 1: ") as caught:
        Checkpoints(tmp_path).restore_latest(ABSTRACT)
    assert "\n" not in str(caught.value)


def test_only_an_interrupted_first_save_is_nothing_to_resume(tmp_path, caplog):
    (tmp_path / "10.incomplete.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path).restore_latest(ABSTRACT) is None
    assert "step 10: its save was interrupted" in caplog.text


def test_restoring_a_step_that_is_not_there_names_those_that_are(tmp_path):
    save_steps(tmp_path, 10, 20)
    with pytest.raises(UsageError, match="30; steps that are there: 10, 20"):
        Checkpoints(tmp_path).restore(30, ABSTRACT)


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [
        (None, None, [1, 2, 3, 4, 5, 6, 7]),
        (None, 3, [1, 2, 3, 4, 5, 6, 7]),
        (1, None, [7]),
        (3, None, [5, 6, 7]),
        (2, 3, [3, 6, 7]),
        (1, 2, [2, 4, 6, 7]),
    ],
)
def test_retention(tmp_path, keep, keep_every, kept):
    save_steps(tmp_path, *range(1, 8), keep=keep, keep_every=keep_every)
    assert names_in(tmp_path) == [str(step) for step in kept]


def test_retention_rejects_numbers_below_one(tmp_path):
    with pytest.raises(UsageError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_retention_counts_and_deletes_intact_steps_only(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, 5, 6)
    flip_a_bit(tmp_path / "2" / "params" / "_METADATA")
    flip_a_bit(tmp_path / "5" / "SHA256SUMS")
    flip_a_bit(tmp_path / "6" / "input_position" / "process_0_of_1")
    (tmp_path / "100").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=2)

    assert checkpoints.restore_latest(ABSTRACT).step == 4
    assert names_in(tmp_path) == ["1", "100", "2", "3", "4", "5", "6"]  # nothing saved, none gone
    checkpoints.save(7, make_state(7), b"")
    checkpoints.wait()
    assert names_in(tmp_path) == ["100", "2", "4", "5", "6", "7"]
    checkpoints.save(8, make_state(8), b"")
    checkpoints.wait()
    assert names_in(tmp_path) == ["100", "2", "5", "6", "7", "8"]


def test_retention_deletes_nothing_while_the_newer_save_is_uncommitted(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)

    def fail(directory):
        assert names_in(tmp_path) == ["1", "2.incomplete"]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t5x_lite.checkpoints.write_digests", fail)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, make_state(2), b"")
    with pytest.raises(CheckpointError, match="saving checkpoint .*2 failed: .*No space left"):
        checkpoints.wait()
    monkeypatch.undo()
    restored = checkpoints.restore_latest(ABSTRACT)
    assert restored.step == 1
    assert restored.skipped == ("step 2: its save was interrupted (2.incomplete)",)
    checkpoints.save(2, make_state(2), b"")
    checkpoints.wait()
    assert names_in(tmp_path) == ["2"]


def test_an_interrupted_deletion_is_finished_by_the_next_retention(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr("etils.epath.gpath.PosixGPath.rmtree", lambda path: 1 / 0)
        checkpoints = Checkpoints(tmp_path, keep=2)
        checkpoints.save(4, make_state(4), b"")
        with pytest.raises(CheckpointError):
            checkpoints.wait()
    assert (tmp_path / "2").exists()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert 2 not in checkpoints.steps()
    with pytest.raises(CheckpointError, match="deletion was interrupted"):
        checkpoints.restore(2, ABSTRACT)
    checkpoints.save(5, make_state(5), b"")
    checkpoints.wait()
    assert names_in(tmp_path) == ["4", "5"]


def test_saving_a_step_again_changes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), b"first")
    checkpoints.save(1, make_state(2), b"second")  # while the first is being written
    checkpoints.wait()
    checkpoints.save(1, make_state(2), b"third")
    checkpoints.close()
    Checkpoints(tmp_path).save(1, make_state(2), b"by another process")
    assert names_in(tmp_path) == ["1"]
    restored = Checkpoints(tmp_path).restore(1, ABSTRACT)
    assert restored.input_state == b"first"
    assert_bit_equal(restored.state, make_state(1))


def test_damaged_step_is_set_aside_when_saved_again(tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    for k in (1, 2):
        flip_a_bit(tmp_path / "2" / "optimizer" / "_METADATA")
        damaged = {path.relative_to(tmp_path / "2"): data for path, data in
                   snapshot(tmp_path / "2").items()}  # fmt: skip
        checkpoints = Checkpoints(tmp_path, keep=1)
        assert checkpoints.restore_latest(ABSTRACT).step == 1 if k == 1 else True
        checkpoints.save(2, make_state(2), b"again")
        checkpoints.wait()
        aside = tmp_path / f"2.damaged-{k}"
        assert {p.relative_to(aside): d for p, d in snapshot(aside).items()} == damaged
        assert f"set aside as 2.damaged-{k}" in caplog.text
    restored = Checkpoints(tmp_path).restore_latest(ABSTRACT)
    assert (restored.step, restored.input_state, restored.skipped) == (2, b"again", ())
    assert names_in(tmp_path) == ["2", "2.damaged-1", "2.damaged-2"]


def test_a_directory_that_cannot_be_made_is_noticed_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="saving checkpoint .*1 failed: .*Not a directory"):
        Checkpoints(tmp_path / "file" / "run").save(1, make_state(), None)


@pytest.mark.parametrize("method", ["wait", "close", "save", "restore_latest"])
def test_a_save_that_fails_in_the_background_is_raised_once(tmp_path, monkeypatch, method):
    def fail(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t5x_lite.checkpoints.write_digests", fail)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), None)
    arguments = {"save": (2, make_state(), None), "restore_latest": (ABSTRACT,)}.get(method, ())
    with pytest.raises(CheckpointError, match="saving checkpoint .*1 failed: .*No space left"):
        getattr(checkpoints, method)(*arguments)
    checkpoints.close()
    assert checkpoints.steps() == []


def _with_params(params: Any) -> State:
    return ABSTRACT._replace(params=params)


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=ABSTRACT.params["embedding"].sharding)


def test_a_state_of_another_shape_is_refused_by_name(tmp_path):
    save_steps(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    decoder = ABSTRACT.params["decoder"]
    wider = _with_params({"decoder": decoder, "embedding": _array((2, 3))})
    renamed = _with_params({"decoder": decoder, "embeddings": _array((2, 2))})
    halved = _with_params({"decoder": decoder, "embedding": _array((2, 2), jnp.bfloat16)})
    other_optimizer = ABSTRACT._replace(opt_state=abstract_of(optax.sgd(0.1, 0.9).init(
        make_state().params)))  # fmt: skip
    for abstract, message in (
        (wider, r"params 'embedding' has shape \(2, 2\), expected \(2, 3\)"),
        (renamed, r"params 'embeddings' is not in the checkpoint \(did you mean 'embedding'"),
        (halved, r"params 'embedding' is float32, expected bfloat16"),
        (other_optimizer, r"optimizer 'opt_state/0/trace/decoder/kernel' is not in the check"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            checkpoints.restore_latest(abstract)
        assert "\n" not in str(caught.value)
    assert checkpoints.restore_latest(ABSTRACT).step == 1


def test_restore_params_alone(tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    save_steps(directory, 1, 2, 3)
    params = abstract_of(make_state().params)
    for path, step in (
        (tmp_path / "run", 3),
        (directory, 3),
        (directory / "2", 2),
        (str(directory / "1") + "/", 1),
    ):
        restored = restore_params(path, params)
        assert restored.step == step
        assert_bit_equal(restored.state, make_state(step).params)

    shutil.rmtree(directory / "3" / "optimizer")  # not needed, so no damage here
    assert restore_params(tmp_path / "run", params).step == 3
    before = flip_a_bit(directory / "3" / "params" / "manifest.ocdbt")
    restored = restore_params(tmp_path / "run", params)
    assert restored.step == 2
    assert "step 3: params/manifest.ocdbt" in restored.skipped[0]
    with pytest.raises(CheckpointError, match=r"params/manifest\.ocdbt"):
        restore_params(directory / "3", params)
    (directory / "3" / "params" / "manifest.ocdbt").write_bytes(before)

    half = jax.tree.map(lambda x: _array(x.shape, jnp.bfloat16), params)
    cast = restore_params(directory / "2", half).state["decoder"]["kernel"]
    expected = np.asarray(make_state(2).params["decoder"]["kernel"]).astype(jnp.bfloat16)
    assert np.asarray(cast).tobytes() == expected.tobytes()


def test_restore_params_says_what_is_missing(tmp_path):
    params = abstract_of(make_state().params)
    with pytest.raises(UsageError, match="no checkpoint under"):
        restore_params(tmp_path, params)
    save_steps(tmp_path, 5)
    with pytest.raises(UsageError, match="7; steps that are there: 5"):
        restore_params(tmp_path / "7", params)
    with pytest.raises(UsageError, match="params 'embedding' is in the checkpoint only"):
        restore_params(tmp_path, {"decoder": params["decoder"]})


def run_python(
    code: str, *arguments: Any, num_devices: int = 1, wait: bool = True
) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "PYTHONPATH": str(pathlib.Path(__file__).resolve().parent.parent),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if wait:
        process.log = process.communicate(timeout=120)[0]  # type: ignore[attr-defined]
    return process


SHARDED = """
import sys
from typing import NamedTuple, Any
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from t5x_lite.checkpoints import Checkpoints

class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any

mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))
rng = np.random.default_rng(1)
state = State(
    put(jnp.int32(5)),
    {"w": put(rng.normal(size=(8, 4)).astype(np.float32), "data", "model"),
     "b": put(rng.normal(size=(4,)).astype(jnp.bfloat16), "model")},
    {"m": put(rng.normal(size=(8, 4)).astype(np.float32), ("data", "model"))},
)
checkpoints = Checkpoints(sys.argv[1])
if sys.argv[2] == "save":
    checkpoints.save(5, state, b"position")
    checkpoints.wait()
else:
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = checkpoints.restore_latest(abstract).state
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert x.sharding == y.sharding and np.asarray(x).tobytes() == np.asarray(y).tobytes()
"""


def test_eight_devices_to_one_and_back(tmp_path):
    process = run_python(SHARDED, tmp_path / "eight", "save", num_devices=8)
    assert process.returncode == 0, process.log
    rng = np.random.default_rng(1)
    w = rng.normal(size=(8, 4)).astype(np.float32)
    b = rng.normal(size=(4,)).astype(jnp.bfloat16)
    m = rng.normal(size=(8, 4)).astype(np.float32)
    expected = State(np.int32(5), {"w": w, "b": b}, {"m": m})
    assert len(jax.devices()) == 1

    restored = Checkpoints(tmp_path / "eight").restore_latest(abstract_of(expected))

    assert_bit_equal(restored.state, expected)
    assert restored.input_state == b"position"
    checkpoints = Checkpoints(tmp_path / "one")
    checkpoints.save(5, jax.tree.map(jnp.asarray, expected), b"position")
    checkpoints.wait()
    process = run_python(SHARDED, tmp_path / "one", "restore", num_devices=8)
    assert process.returncode == 0, process.log


KILLED = """
import os, signal, sys, threading
from typing import NamedTuple, Any
import jax, jax.numpy as jnp
import orbax.checkpoint._src.path.atomicity as atomicity
import t5x_lite.checkpoints as module

class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any

def die(*unused):
    os.kill(os.getpid(), signal.SIGKILL)

directory, last, moment = sys.argv[1], int(sys.argv[2]), sys.argv[3]
checkpoints = module.Checkpoints(directory)
for step in range(last - 1, last + 1):
    value = jnp.full((1 << 20,), step, jnp.float32)
    if step == last:
        checkpoints.wait()
        if moment == "in Orbax's commit":
            atomicity.async_path.rename = die
        elif moment == "before the digests":
            module.write_digests = die
        elif moment == "before the rename":
            module.os.rename = die
        else:
            threading.Timer(float(moment), die).start()
    checkpoints.save(step, State(jnp.int32(step), {"w": value}, {"m": value + 1}), b"%d" % step)
checkpoints.wait()
print("saved", flush=True)
threading.Event().wait(30)
"""


@pytest.mark.parametrize(
    "moments",
    [
        ["in Orbax's commit", "before the digests", "before the rename"],
        ["0.0", "0.01", "0.03", "0.06"],
    ],
    ids=["exact", "timed"],
)
def test_kill_9_during_a_save(tmp_path, moments):
    template = jax.ShapeDtypeStruct(
        (1 << 20,), jnp.float32, sharding=ABSTRACT.params["embedding"].sharding
    )
    abstract = State(ABSTRACT.step, {"w": template}, {"m": template})
    for i, moment in enumerate(moments):
        last = 10 * (i + 1)  # steps last - 1, whole, and last, killed
        process = run_python(KILLED, tmp_path, last, moment)
        assert process.returncode == -signal.SIGKILL, process.log
        checkpoints = Checkpoints(tmp_path)
        restored = checkpoints.restore_latest(abstract)
        if moments[0] == "0.0":
            assert restored.step == last or "saved" not in process.log
            assert restored.step in (last - 1, last)
        else:
            assert restored.step == last - 1
            assert f"step {last}: its save was interrupted" in restored.skipped[0]
        assert restored.input_state == b"%d" % restored.step
        assert float(restored.state.params["w"].min()) == restored.step
        assert float(restored.state.params["w"].max()) == restored.step
        state = jax.tree.map(lambda x, step=last: jnp.full_like(x, step), restored.state)
        checkpoints.save(last, state, b"again")
        checkpoints.wait()
        assert checkpoints.restore_latest(abstract).step == last
    assert all(name.isdigit() for name in names_in(tmp_path))


TWO_PROCESSES = """
import sys
port, rank, directory, flip = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
import jax
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
import numpy as np
from typing import NamedTuple, Any
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from t5x_lite.checkpoints import Checkpoints, CheckpointError

class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any

mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
def put(x, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
state = State(put(np.int32(1)), {"w": put(np.arange(8.0, dtype=np.float32), "data")}, ())
abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
checkpoints = Checkpoints(directory, keep=2)
for step in (1, 2, 3):
    checkpoints.save(step, state, b"process %d" % rank)
checkpoints.wait()
assert checkpoints.steps() == [2, 3]
if rank == 0:
    with open(f"{directory}/3/{flip}", "r+b") as f:
        f.write(b"?")
restored = checkpoints.restore_latest(abstract)
assert restored.step == 2 and flip in restored.skipped[0], restored
assert restored.input_state == b"process %d" % rank
for x, y in zip(restored.state.params["w"].addressable_shards,
                state.params["w"].addressable_shards, strict=True):
    np.testing.assert_array_equal(x.data, y.data)
try:
    checkpoints.restore(3, abstract)
except CheckpointError as error:
    assert flip in str(error)
else:
    raise AssertionError("restored a damaged step")
checkpoints.close()
"""


def test_two_processes_agree(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flip = "input_position/process_1_of_2"
    processes = [
        run_python(TWO_PROCESSES, port, rank, tmp_path, flip, wait=False) for rank in (0, 1)
    ]
    for process in processes:
        log = process.communicate(timeout=120)[0]
        assert process.returncode == 0, log
    one = State(np.int32(1), {"w": np.zeros(8, np.float32)}, ())
    with pytest.raises(UsageError, match="input positions of 2 processes"):
        Checkpoints(tmp_path).restore(2, abstract_of(one))
    restored = restore_params(tmp_path, abstract_of(one.params))
    np.testing.assert_array_equal(restored.state["w"], np.arange(8.0, dtype=np.float32))
