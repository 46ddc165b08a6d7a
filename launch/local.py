"""Several processes of one run on this machine: over virtual CPU devices, or one process per GPU.

Example, two processes with two virtual CPU devices each, as on two hosts of a small pod:

  .venv/bin/python launch/local.py --num_processes=2 --cpu_devices=2 \\
    train --gin_file=gin_configs/models/t5_1_1/tiny.gin --gin_file=gin_configs/runs/python_docs.gin

The verb (train, eval, infer) and all that follows it are t5x_lite's; the launcher's own arguments
come first. Every line is printed behind the number of its process. SIGTERM and Ctrl-C go to all
processes, which save and leave together. When one process fails the others are ended, and its exit
code is the launcher's (128 + n if signal n killed it).
"""

import argparse
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from command_line import REPO, check_command

# The other processes of a failed one cannot finish a step or a checkpoint without it: they get
# SIGTERM at once, and SIGKILL this many seconds after the failure.
GRACE_SECONDS = 60


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the processes and waits for them; returns the exit code of the first that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_processes", type=int, required=True)
    device = parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--cpu_devices", type=int, help="virtual CPU devices of each process")
    device.add_argument("--gpus", action="store_true", help="one GPU for each process")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="train, eval or infer ...")
    args = parser.parse_args(argv)
    check_command(parser, args.command, (pathlib.Path.cwd(), REPO))
    if args.num_processes < 1 or (args.cpu_devices is not None and args.cpu_devices < 1):
        parser.error("--num_processes and --cpu_devices are at least 1")

    address = f"127.0.0.1:{_free_port()}"
    commands, environments = [], []
    for i in range(args.num_processes):
        rendezvous = [
            f"--coordinator_address={address}",
            f"--num_processes={args.num_processes}",
            f"--process_id={i}",
        ]
        commands.append([sys.executable, "-m", "t5x_lite", *args.command, *rendezvous])
        if args.gpus:
            # Without it JAX would go on on the CPU where it finds no GPU.
            environments.append({"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": str(i)})
        else:
            environments.append(
                {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.cpu_devices)}
            )
    if args.dry_run:
        for command, environment in zip(commands, environments, strict=True):
            settings = [f"{name}={value}" for name, value in environment.items()]
            print(*settings, shlex.join(command))
        return 0
    return _run(commands, environments)


def _run(commands: list[list[str]], environments: list[dict[str, str]]) -> int:
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []  # signals, of which processes started later have to know too

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        _signal_all(processes, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    for command, environment in zip(commands, environments, strict=True):
        # A session of its own: Ctrl-C in a terminal would otherwise arrive twice.
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        processes.append(process)
        if received:
            process.send_signal(received[-1])
    copiers = [
        threading.Thread(target=_copy, args=(source, sink, i))
        for i, process in enumerate(processes)
        for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for copier in copiers:
        copier.start()
    code = _wait(processes, received)
    for copier in copiers:
        copier.join()
    return code


def _wait(processes: list[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Returns when all have ended: the exit code of the first failure, 0 if there is none."""
    first_failure, deadline = 0, float("inf")
    while None in (codes := [process.poll() for process in processes]):
        failed = [(i, code) for i, code in enumerate(codes) if code]
        if failed and not first_failure:
            i, first_failure = failed[0]
            deadline = time.monotonic() + GRACE_SECONDS
            if not received:  # else they know already, and a second signal may mean "at once"
                others = "; ending the others" if None in codes else ""
                # One write, as in _copy.
                sys.stderr.write(f"local.py: process {i} {_ended(first_failure)}{others}\n")
                _signal_all(processes, signal.SIGTERM)
        if time.monotonic() > deadline:
            _signal_all(processes, signal.SIGKILL)
        time.sleep(0.1)
    code = first_failure or next((code for code in codes if code), 0)
    return code if code >= 0 else 128 - code


def _ended(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _signal_all(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is not None:
            continue
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)  # what it has started holds its pipes open
        else:
            process.send_signal(number)


def _copy(source: IO[bytes], sink: IO[str], process_id: int) -> None:
    for line in source:
        # One write a line: lines of several processes may take turns, but never mix.
        sink.write(f"[{process_id}] {line.decode(errors='replace').rstrip()}\n")
        sink.flush()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
