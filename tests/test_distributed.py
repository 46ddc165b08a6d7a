"""Processes that find each other, decide as one and end together; and those that do not."""

import contextlib
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster
from small_run import start, train_argv

from t5x_lite import distributed, roll_call
from t5x_lite.__main__ import main
from t5x_lite.errors import Failure, UsageError
from t5x_lite.roll_call import Member

# What a scheduler may have told this process of, and must not tell the tests.
SCHEDULERS = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JAX_COORDINATOR")


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    for name in list(os.environ):
        if name.startswith(SCHEDULERS):
            monkeypatch.delenv(name)


def free_port() -> int:
    """Below those that the system gives to connections, of which there are many meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


# ---- the roll call -------------------------------------------------------------------------------


def meet(*members: Member, timeout: float = 10.0, address: str | None = None) -> list[str]:
    """What each of the members, all started at once, is told: "" if it may go on."""
    address = address or f"127.0.0.1:{free_port()}"
    told = [""] * len(members)

    def run(i: int) -> None:
        try:
            roll_call.meet(address, members[i], timeout=timeout, hint="Start them all")
        except (UsageError, Failure) as e:
            told[i] = f"{type(e).__name__}: {e}".replace(address, "ADDRESS")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return told


SAME = {"jax": "'1.0'", "OptimizerConfig.learning_rate": "1.0", "TrainConfig.random_seed": "0"}


def test_members_that_are_alike_meet():
    assert meet(*(Member(i, 4, SAME) for i in range(4))) == [""] * 4


def test_the_first_difference_is_told_to_all():
    other = SAME | {"OptimizerConfig.learning_rate": "0.1", "TrainConfig.random_seed": "1"}
    told = meet(Member(0, 3, SAME), Member(1, 3, SAME), Member(2, 3, other))
    problem = (
        "process 2 has OptimizerConfig.learning_rate = 0.1, process 0 1.0: start the same command, "
        "of the same installation, on every host"
    )
    assert told == [f"UsageError: {problem}"] * 3


def test_a_setting_that_one_does_not_have():
    told = meet(Member(0, 2, SAME), Member(1, 2, SAME | {"--batch_size": "4"}))
    assert "process 1 has --batch_size = 4, process 0 nothing" in told[0]


def test_those_that_came_are_told_who_did_not():
    told = meet(Member(0, 12, SAME), Member(2, 12, SAME), timeout=1.0)
    problem = (
        "2 of 12 processes came to ADDRESS within 1 s, missing: 1, 3, 4, 5, 6, 7, 8, 9 .... Start "
        "them all; --distributed_timeout=SECONDS waits longer"
    )
    assert told == [f"Failure: {problem}"] * 2


@pytest.mark.parametrize(
    ("host", "problem"),
    [("127.0.0.1", "Connection refused"), ("no-such-host.invalid", "[Nn]ame")],
)
def test_a_coordinator_that_is_not_there(host, problem):
    address = f"{host}:{free_port()}"
    with pytest.raises(Failure, match=rf"no coordinator at {address} within 1 s \(.*{problem}"):
        roll_call.meet(address, Member(1, 2, SAME), timeout=1.0, hint="Start them all")


def test_two_that_are_the_same_process():
    told = meet(Member(0, 3, SAME), Member(1, 3, SAME), Member(1, 3, SAME))
    problem = "two processes came to ADDRESS as process 1 of 3: give each its own --process_id"
    assert told[0] == f"UsageError: {problem}"
    assert problem in told[1] + told[2]


def test_another_number_of_processes():
    told = meet(Member(0, 2, SAME), Member(1, 3, SAME))
    assert set(told) == {
        "UsageError: process 1 was started with --num_processes=3, process 0 with --num_processes=2"
    }


COMES = """
import sys
from t5x_lite import roll_call
roll_call.meet(sys.argv[1], roll_call.Member(1, 3, {}), timeout=20, hint="")
"""


def test_a_process_that_was_started_again_meanwhile():
    address = f"127.0.0.1:{free_port()}"
    dead = subprocess.Popen([sys.executable, "-c", COMES, address])
    told: list[list[str]] = []
    first = threading.Thread(
        target=lambda: told.append(meet(Member(0, 3, {}), timeout=20, address=address))
    )
    first.start()
    time.sleep(1.5)
    dead.kill()
    dead.wait(10)
    # The one that comes now makes them three, of which one has died.
    last = threading.Thread(
        target=lambda: told.append(meet(Member(2, 3, {}), timeout=20, address=address))
    )
    last.start()
    time.sleep(1.0)
    told.append(meet(Member(1, 3, {}), timeout=20, address=address))
    first.join(30)
    last.join(30)
    assert told == [[""], [""], [""]]


def test_who_only_looks_at_the_port_changes_nothing():
    port = free_port()

    def look() -> None:
        for message in (b"GET / HTTP/1.1\r\n\r\n", b"", b'{"process_id": 1}\n', b"\xff\n"):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as s:
                s.sendall(message)

    threading.Timer(0.3, look).start()
    threading.Timer(0.8, look).start()
    late = threading.Timer(1.0, lambda: meet(Member(1, 2, SAME), address=f"127.0.0.1:{port}"))
    late.start()
    assert meet(Member(0, 2, SAME), address=f"127.0.0.1:{port}") == [""]
    late.join(20)


def test_something_else_has_the_port(monkeypatch):
    monkeypatch.setattr(roll_call, "_SECONDS_FOR_THE_PORT", 0.5)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        told = meet(Member(0, 2, SAME), address=f"127.0.0.1:{port}")
        assert f"cannot listen on port {port}" in told[0]
        assert "Address already in use" in told[0]

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].sendall(b"220 mail\r\n")

        threading.Thread(target=greet, daemon=True).start()
        told = meet(Member(1, 2, SAME), address=f"127.0.0.1:{port}", timeout=1.0)
        assert "what answers there is not gathering processes" in told[0]


# ---- which process is this -----------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
TPU = {
    "TPU_WORKER_HOSTNAMES": "localhost,other-1,other-2,other-3",
    "TPU_WORKER_ID": "3",
    "TPU_SKIP_MDS_QUERY": "1",
}


@pytest.fixture
def environment(monkeypatch):
    def use(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        # What JAX sees on a machine with TPU chips.
        monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda key: None)
        monkeypatch.setattr(
            cloud_tpu_cluster, "running_in_cloud_tpu_vm", "TPU_WORKER_HOSTNAMES" in variables
        )

    return use


@pytest.mark.parametrize(
    ("variables", "address", "process_id", "local", "hint"),
    [
        (SLURM, "node007:", 2, [0], "srun"),
        (OPEN_MPI, "10.96.0.1:", 3, [1], "mpirun"),
        (TPU, "localhost:8482", 3, None, "every pod of the JobSet"),
    ],
    ids=["slurm", "open_mpi", "tpu"],
)
@pytest.mark.parametrize("distributed_flag", [False, True])
def test_a_job_is_found_in_the_environment(
    environment, variables, address, process_id, local, hint, distributed_flag
):
    environment(variables)
    job = distributed.find_job(distributed.Options(distributed_flag, timeout=1.0))
    assert job is not None
    assert job.coordinator_address.startswith(address)
    assert (job.num_processes, job.process_id, job.local_device_ids) == (4, process_id, local)
    assert hint in job.hint
    assert distributed.find_job(distributed.Options(num_processes=1)) is None


@pytest.mark.parametrize(
    "variables",
    [{}, SLURM | {"SLURM_NTASKS": "1"}, TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}],
    ids=["nothing", "one task", "one host"],
)
def test_without_several_processes_it_is_one(environment, variables):
    environment(variables)
    assert distributed.find_job(distributed.Options()) is None


def test_open_mpi_5_does_not_tell_where_process_0_is(environment):
    environment({k: v for k, v in OPEN_MPI.items() if "orte" not in k})
    with pytest.raises(UsageError, match="Open MPI has started 4 processes but does not say"):
        distributed.find_job(distributed.Options())


def test_an_environment_that_is_not_complete(environment):
    environment({k: v for k, v in TPU.items() if k != "TPU_WORKER_ID"})
    with pytest.raises(UsageError, match="looks like gketpu, but which process this is cannot"):
        distributed.find_job(distributed.Options(timeout=1.0))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--distributed"], "nothing here says which processes there are"),
        (["--num_processes=2"], "--coordinator_address, --process_id not given"),
        (["--distributed", "--num_processes=2", "--process_id=0"], "go together"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "from 0 to"),
        (["--coordinator_address=here", "--num_processes=2", "--process_id=1"], "HOST:PORT"),
        (["--num_processes=0"], "go together"),
        (["--distributed_timeout=0"], "must be more than 0"),
    ],
)
def test_flags_that_cannot_be(tmp_path, capsys, flags, problem):
    assert main([*train_argv(tmp_path / "run"), *flags]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("command", [["eval", "run"], ["infer", "run", "--output=o", "--task=t"]])
def test_every_verb_that_computes_has_the_flags(capsys, command):
    assert main([*command, "--num_processes=2", "--process_id=0"]) == 2
    assert "--coordinator_address not given" in capsys.readouterr().err


def test_a_pod_command_on_one_host_alone(environment, tmp_path, capsys):
    environment(TPU | {"TPU_WORKER_ID": "0"})
    began = time.monotonic()
    assert main([*train_argv(tmp_path / "run"), "--distributed_timeout=1"]) == 1
    assert time.monotonic() - began < 60
    error = capsys.readouterr().err
    assert "1 of 4 processes came to localhost:8482 within 1 s, missing: 1, 2, 3" in error
    assert "Start the same command in every pod" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


# ---- real processes ------------------------------------------------------------------------------

JOB = """
import os, signal, sys, time
import jax
from jax.experimental import multihost_utils
from t5x_lite import distributed, run_files
from t5x_lite.checkpoints import CheckpointError
from t5x_lite.errors import Failure, UsageError

address, me, what, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]

def check(compute, kind, text):
    try:
        compute()
    except kind as e:
        assert text in str(e), e
    else:
        raise AssertionError(text)

def fail(error):
    raise error

with distributed.joined(distributed.Options(False, address, 2, me, 20.0), {"x": 1}):
    if what == "agree":
        assert (jax.process_count(), len(jax.devices())) == (2, 4)
        assert distributed.from_process_0(lambda: [me, "a" * 100_000]) == [0, "a" * 100_000]
        assert distributed.processes_where(me == 1) == [1]
        for error in (UsageError("bad"), CheckpointError("worse"), Failure("no")):
            check(lambda: distributed.from_process_0(lambda: fail(error)), type(error), str(error))
        check(lambda: distributed.from_process_0(lambda: fail(OSError("disk"))),
              OSError if me == 0 else Failure, "disk")
        run_files.check_shared(folder + "/shared")
        run_files._SECONDS_TO_APPEAR = 0.5
        check(lambda: run_files.check_shared(f"{folder}/{me}"), UsageError,
              "is another directory on process 1 than on process 0")
        distributed.tell("told once")
    if what == "usage error" and me == 1:
        raise UsageError("this cannot be")
    if what == "killed" and me == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "devices":
        raise AssertionError("never here")
    if what != "agree":
        multihost_utils.sync_global_devices("the other one does not come here")
print("left", flush=True)
"""


def run_job(what: str, folder: pathlib.Path, devices: tuple[int, int] = (2, 2)) -> list[list]:
    """(exit code, stdout, stderr) of both processes."""
    address = f"127.0.0.1:{free_port()}"
    processes = [
        start(
            *("-c", JOB, address, str(i), what, str(folder)),
            JAX_PLATFORMS="cpu",
            JAX_NUM_CPU_DEVICES=str(devices[i]),
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [[p.returncode, *output] for p, output in zip(processes, outputs, strict=True)]


def test_two_processes_decide_as_one(tmp_path):
    for i, (code, out, error) in enumerate(run_job("agree", tmp_path)):
        assert code == 0, error
        assert ("told once" in out) == (i == 0)
        assert out.endswith("left\n")
    assert list((tmp_path / "shared").iterdir()) == []


def test_an_error_on_one_process_ends_both(tmp_path):
    (code_0, out_0, error_0), (code_1, out_1, error_1) = run_job("usage error", tmp_path)
    assert (code_0, code_1) == (2, 2)
    assert error_1 == "t5x_lite: this cannot be\n"
    # Its own collective may fail first; then that is told, and which process ended is not known.
    assert "t5x_lite: process 1 ended: this cannot be\n" in error_0
    assert "left" not in out_0 + out_1


def test_a_killed_process_does_not_leave_the_other_waiting(tmp_path):
    (code_0, _, _), (code_1, out, _) = run_job("killed", tmp_path)
    assert code_0 == -signal.SIGKILL
    assert code_1 not in (0, None)
    assert "left" not in out


def test_processes_with_other_numbers_of_devices(tmp_path):
    for code, _, error in run_job("devices", tmp_path, devices=(2, 1)):
        assert code == 2
        assert "process 1 has 1 devices, process 0 2" in error


def test_one_process_is_no_job():
    """Everything here has its answer without `jax.distributed`."""
    with distributed.joined(distributed.Options(), {}):
        assert distributed.from_process_0(lambda: {"a": 1}) == {"a": 1}
        assert distributed.processes_where(True) == [0]
        assert distributed.is_coordinator()
    assert not jax.distributed.is_initialized()
