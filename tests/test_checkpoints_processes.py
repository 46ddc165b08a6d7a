"""What needs processes of its own: kill -9, other meshes, several hosts."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoints import ABSTRACT, State, abstract_of, assert_bit_equal, names_in

from t5x_lite.checkpoints import Checkpoints, restore_params
from t5x_lite.errors import UsageError


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
