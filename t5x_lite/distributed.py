"""Several processes of one job: how they find each other, decide as one, and end together.

One host is one process here, unless a scheduler starts more. Everything in it works without
`jax.distributed` too, where there is one process.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax._src import cloud_tpu_init, clusters, distributed
from jax.experimental import multihost_utils

from t5x_lite import roll_call
from t5x_lite.errors import Failure, UsageError

# A process that says nothing for so long is taken for dead, and JAX ends the others.
HEARTBEAT_TIMEOUT_SECONDS = 30

# They have all met when JAX begins.
_INITIALIZATION_TIMEOUT_SECONDS = 60
# Process 0 holds what the others talk through, so it leaves last.
_SECONDS_TO_LEAVE_FIRST = 1.0
# Where the end of the job is told, a good one or a bad one.
_END = "t5x_lite/end"
_LONGEST_PROBLEM = 500
_A_MONTH_IN_MS = 30 * 24 * 3600 * 1000

_PACKAGES = ("t5x_lite", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says about the processes of the job.

    Attributes:
      distributed: there are several, and the environment says which.
      coordinator_address: HOST:PORT of process 0.
      num_processes: how many; 1 alone is one process, whatever the environment says.
      process_id: which one this is.
      timeout: seconds to wait for the others.
    """

    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: float = 45.0

    def __post_init__(self) -> None:
        """Raises UsageError on numbers that cannot be, alone or together."""
        given = {
            "--coordinator_address": self.coordinator_address,
            "--num_processes": self.num_processes,
            "--process_id": self.process_id,
        }
        missing = [flag for flag, value in given.items() if value is None]
        alone = self.num_processes == 1 and len(missing) == 2
        if missing and len(missing) < len(given) and not alone:
            raise UsageError(
                f"{', '.join(missing)} not given: --coordinator_address, --num_processes and "
                "--process_id go together"
            )
        if self.distributed and len(missing) < len(given):
            raise UsageError(
                "--distributed takes everything from the environment: leave out "
                f"{', '.join(flag for flag, value in given.items() if value is not None)}"
            )
        if self.num_processes is not None and self.num_processes < 1:
            raise UsageError(f"--num_processes={self.num_processes}: must be at least 1")
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 0):
            raise UsageError(
                f"--process_id={self.process_id}: must be from 0 to --num_processes - 1, "
                f"{(self.num_processes or 1) - 1}"
            )
        if self.coordinator_address is not None:
            roll_call.split_address(self.coordinator_address)
        if self.timeout <= 0:
            raise UsageError(f"--distributed_timeout={self.timeout:g}: must be more than 0")


class Job(NamedTuple):
    """The processes, and which one this is.

    Attributes:
      coordinator_address: HOST:PORT of process 0.
      num_processes: how many.
      process_id: this one's number.
      local_device_ids: the host's accelerators that are this process's; None for all.
      hint: how such a job is started, for errors.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: Sequence[int] | None
    hint: str


@contextlib.contextmanager
def joined(
    options: Options, settings: Mapping[str, Any], *, heeds_preemption: bool = False
) -> Iterator[None]:
    """All processes of the job begin the block together, and end it together.

    An error in one process ends all of them, with its message on each and its exit code. In a job
    of several processes an error does not leave the block: the process ends there.

    Args:
      options: the command line's.
      settings: name -> value; what must be the same in every process.
      heeds_preemption: the block asks `AgreedStop`; otherwise SIGTERM ends the process.

    Raises:
      UsageError: the processes were not started alike, or cannot be told apart.
      Failure: some did not come.
    """
    job = find_job(options)
    if job is None:
        yield
        return
    compared = {package: _version(package) for package in _PACKAGES} | dict(settings)
    me = roll_call.Member(
        job.process_id,
        job.num_processes,
        {name: repr(value) for name, value in compared.items()},
    )
    roll_call.meet(job.coordinator_address, me, timeout=options.timeout, hint=job.hint)
    jax.config.update("jax_enable_preemption_service", heeds_preemption)
    jax.distributed.initialize(
        job.coordinator_address,
        job.num_processes,
        job.process_id,
        local_device_ids=job.local_device_ids,
        cluster_detection_method="deactivate",  # it is done
        initialization_timeout=_INITIALIZATION_TIMEOUT_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
    )
    watcher = threading.Thread(target=_end_with_the_others, name="end of the job", daemon=True)
    watcher.start()
    try:
        _check_devices()
        yield
        # Until process 0 has written the last file an error of it can still be told.
        wait_for_all("the end")
    except BaseException as error:  # noqa: BLE001 - the process ends here
        _end_job(error)
    if job.process_id == 0:
        _client().key_value_set(_END, "")
    watcher.join()
    jax.distributed.shutdown()


# ---- which process is this -----------------------------------------------------------------------


def find_job(options: Options) -> Job | None:
    """The job that the flags tell of, or else the environment; None for a process of its own.

    Without `--distributed` the environment counts where it says that there are several processes,
    and asking it costs nothing: Open MPI, Slurm, and the hosts of a TPU, on GKE or Cloud TPU VMs.
    Kubernetes without TPUs is asked, through its API, with `--distributed` alone.

    Raises:
      UsageError: `--distributed` finds nothing, or the environment is not complete.
    """
    if options.coordinator_address is not None:
        assert options.num_processes is not None and options.process_id is not None
        return Job(
            options.coordinator_address,
            options.num_processes,
            options.process_id,
            None,
            "Start the same command on every host, with --process_id from 0 to "
            f"{options.num_processes - 1}",
        )
    if options.num_processes == 1:
        return None
    environments: dict[type[clusters.ClusterEnv], str] = {
        clusters.OmpiCluster: "Start the command with mpirun",
        clusters.SlurmCluster: "Start the command with srun, which starts it on every node",
        clusters.GkeTpuCluster: "Start the same command in every pod of the JobSet, at once",
        clusters.GceTpuCluster: (
            "Start the same command on every host of the TPU: gcloud compute tpus tpu-vm ssh NAME "
            "--worker=all --command=..."
        ),
    }
    if options.distributed:
        environments[clusters.K8sCluster] = "Start the same command in every pod of the job"
    for environment, hint in environments.items():
        try:
            if environment.is_env_present():
                return _job_of(environment, hint, options)
        except UsageError:
            raise
        except Exception as e:  # whatever an HTTP or Kubernetes client has
            raise UsageError(
                f"this looks like {environment.name or 'Kubernetes'}, but which process this is "
                f"cannot be found out: {_one_line(e)}; give --coordinator_address, --num_processes "
                "and --process_id, or --num_processes=1 for one process"
            ) from e
    _check_not_lost()
    if options.distributed:
        raise UsageError(
            "--distributed: nothing here says which processes there are (known: Cloud TPU, GKE, "
            "Slurm, Open MPI); give --coordinator_address, --num_processes and --process_id"
        )
    return None


def _job_of(environment: Any, hint: str, options: Options) -> Job | None:
    count = environment.get_process_count()
    if count == 1 and not options.distributed:
        return None
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or environment.get_coordinator_address(
        timeout_secs=options.timeout,
        override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
    )
    # As JAX does it: where a scheduler starts a process for each GPU, each takes its own.
    on_tpu = cloud_tpu_init.running_in_cloud_tpu_vm
    local_id = None if on_tpu else environment.get_local_process_id()
    return Job(
        address,
        count,
        environment.get_process_id(),
        None if local_id is None else [local_id],
        f"{hint}, or --num_processes=1 for one process alone",
    )


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None  # run from its source


def _check_not_lost() -> None:
    """Open MPI 5 no longer tells where its first process is: several would train one by one."""
    count = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if count != "1":
        raise UsageError(
            f"Open MPI has started {count} processes but does not say where the first is: give "
            f"--coordinator_address=HOST:PORT --num_processes={count} "
            "--process_id=$OMPI_COMM_WORLD_RANK"
        )


def _check_devices() -> None:
    """Raises UsageError unless all processes have as many devices. The first look at any."""
    counts = [0] * jax.process_count()
    for device in jax.devices():
        counts[device.process_index] += 1
    for process, count in enumerate(counts):
        if count != counts[0]:
            raise UsageError(
                f"process {process} has {count} devices, process 0 {counts[0]}: a mesh needs as "
                "many on every host"
            )


# ---- the end -------------------------------------------------------------------------------------


def _client() -> Any:
    # JAX has no public name for it; Orbax goes the same way.
    return distributed.global_state.client


def _end_with_the_others() -> None:
    """In a thread: ends this process as soon as another one tells of an error."""
    while True:
        try:
            told = _client().blocking_key_value_get(_END, _A_MONTH_IN_MS)
        except jax.errors.JaxRuntimeError as e:
            if "DEADLINE_EXCEEDED" in str(e):
                continue
            return  # without the coordinator; JAX ends the process
        if told:
            _leave(json.loads(told))
        return


def _end_job(error: BaseException) -> NoReturn:
    """Tells the error here and to the other processes, and ends this one."""
    with _leaving:  # the thread that watches for the end hears of it as well
        _leave(_agree_on_end(error))


def _agree_on_end(error: BaseException) -> dict[str, Any]:
    """What has ended the job: this error, told to all, or the one that was told before."""
    client = _client()
    end = {"process": jax.process_index(), "exit_code": getattr(error, "exit_code", 1)}
    if isinstance(error, KeyboardInterrupt):
        end |= {"problem": "stopped", "exit_code": 130}
    elif isinstance(error, UsageError):
        end |= {"problem": _one_line(error), "exit_code": 2}
    elif isinstance(error, Failure):
        end["problem"] = _one_line(error)
    else:
        end["problem"] = f"{type(error).__name__}: {_one_line(error)}"[:_LONGEST_PROBLEM]
    try:
        client.key_value_set(_END, json.dumps(end))
    except jax.errors.JaxRuntimeError:
        # Another one was first. What has happened here may come of that.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            end = json.loads(client.key_value_try_get(_END))
    if end["process"] == jax.process_index() and not isinstance(
        error, UsageError | Failure | KeyboardInterrupt
    ):
        traceback.print_exception(error)
    return end


_leaving = threading.RLock()


def _leave(end: dict[str, Any]) -> NoReturn:
    """Ends this process as it stands: JAX's own way out waits for the others."""
    with _leaving:
        by = "" if end["process"] == jax.process_index() else f"process {end['process']} ended: "
        sys.stdout.flush()
        print(f"t5x_lite: {by}{end['problem']}", file=sys.stderr, flush=True)
        if jax.process_index() == 0:
            time.sleep(_SECONDS_TO_LEAVE_FIRST)
        os._exit(end["exit_code"])


# ---- deciding as one -----------------------------------------------------------------------------


def is_coordinator() -> bool:
    """Whether this is process 0, which alone writes what is not a checkpoint's."""
    return jax.process_index() == 0


def tell(text: str) -> None:
    """Prints on process 0."""
    if is_coordinator():
        print(text, flush=True)


def from_process_0(compute: Callable[[], Any]) -> Any:
    """What `compute` returns or raises on process 0, on every process.

    The value goes through JSON, and through the coordinator rather than through the devices, which
    would compile a program for each length of it. Process 0 does not wait for the others. An
    exception is raised on these as the UsageError or Failure that it is; any other one as Failure.
    """
    if jax.process_count() == 1:
        return compute()
    key = f"t5x_lite/from_process_0/{next(_num_asked)}"
    if is_coordinator():
        try:
            value = compute()
        except Exception as e:
            problem = {"error": _one_line(e), "class": type(e).__name__}
            _client().key_value_set(key, json.dumps(problem))
            raise
        _client().key_value_set(key, json.dumps({"value": value}))
        return value
    answer = json.loads(_client().blocking_key_value_get(key, _A_MONTH_IN_MS))
    if "error" in answer:
        known: dict[str, type[Exception]] = {c.__name__: c for c in Failure.__subclasses__()}
        known["UsageError"] = UsageError
        raise known.get(answer["class"], Failure)(answer["error"])
    return answer["value"]


_num_asked = itertools.count()


def wait_for_all(where: str) -> None:
    """Returns when every process has come to this point of the program."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def processes_where(condition: bool) -> list[int]:
    """The numbers of the processes that give True, on every process."""
    if jax.process_count() == 1:
        return [0] if condition else []
    found = multihost_utils.process_allgather(np.asarray([condition]))
    return [int(i) for i in np.flatnonzero(found)]


class AgreedStop:
    """Whether to stop, for SIGTERM to any process; the same answer in all of them.

    Every process asks equally often. JAX carries the signal to all and has them agree on an answer
    that none has had yet, at no cost as long as there is no signal; its own handler is the one
    that sees SIGTERM.
    """

    def __init__(self) -> None:
        self._num_asked = 0
        self._is_set = False

    def is_set(self) -> bool:
        """True from the agreed moment on."""
        if not self._is_set:
            self._num_asked += 1
            self._is_set = multihost_utils.reached_preemption_sync_point(self._num_asked)
        return self._is_set


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
