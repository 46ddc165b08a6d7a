"""A run on Cloud TPU VMs: asks for a TPU, installs, starts all hosts, starts again when pre-empted.

Example, a pod slice of 256 v5e chips at the spot price (tmux keeps it when your terminal closes):

  python launch/tpu_vm.py run --name=xl --zone=us-west4-a --target=v5e:16x16 --spot \\
    train --gin_file=gin_configs/models/t5_1_1/xl.gin --gin_file=gin_configs/runs/pretrain.gin \\
    --gin.MODEL_DIR="'gs://bucket/xl'" ...
  python launch/tpu_vm.py delete --name=xl --zone=us-west4-a

  run      create, install and start; all of it again after a pre-emption, until it is done
  create   ask for the TPU (a "queued resource") and wait until it is there
  install  copy this checkout to every host, uncommitted files too (but none that .gitignore
           names), and install it there
  stop     end the command on every host; it saves a checkpoint first
  status   the state of the queued resource
  delete   give the TPU back. Only this ends the costs.

--target is `plan`'s: 2xv5e:16x16 are two slices. Needs gcloud, logged in; the key has to be in the
ssh agent (ssh-add ~/.ssh/google_compute_engine). --dry_run prints the commands and runs none.
"""

import argparse
import collections
import dataclasses
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from command_line import REPO, check_command
from tpu_target import TpuTarget, parse_target

POLL_SECONDS = 30
PATIENCE = 60  # times that gcloud may fail to tell a state, before `run` gives up

GONE = ("SUSPENDED", "PREEMPTED", "FAILED")  # states in which a TPU never comes back

USAGE_ERROR = 2  # t5x_lite's exit code for a command that cannot work: no use to try again
ALREADY_RUNNING = 75  # flock's exit code here
# So many failures in a row that no pre-emption explains, each within this time, and `run` gives up.
MAX_QUICK_FAILURES, QUICK_SECONDS = 5, 1800
LIST_FILES = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")  # to be copied
MAX_COPIED_BYTES = 100e6
MAX_FAILED_REQUESTS = 5  # requests for a TPU that end as FAILED, with never a TPU in between

# JAX needs a newer Python than the TPU VMs have. With large pages libtpu starts faster.
INSTALL = """\
set -e
mkdir -p t5x_lite && tar -xzf t5x_lite.tar.gz -C t5x_lite && cd t5x_lite
python3 -m pip install --quiet --user uv
test -x .venv/bin/python || python3 -m uv venv --quiet --seed --python=3.11 .venv
.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[tpu]"
sudo sh -c "echo always > /sys/kernel/mm/transparent_hugepage/enabled\""""

# The brackets keep the pattern from matching the shell that holds it. Five minutes to save.
STOP = """\
pkill -TERM -f "[-]m t5x_lite" || exit 0
for _ in $(seq 300); do pgrep -f "[-]m t5x_lite" > /dev/null || exit 0; sleep 1; done
pkill -KILL -f "[-]m t5x_lite" || true"""


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A queued resource.

    Attributes:
      name: of the queued resource.
      location: gcloud's flags for zone and project.
      dry_run: print the commands and run none.
      nodes: the names of its TPU VMs, one for each slice.
      shape: gcloud's flags for what to ask for.
    """

    name: str
    location: list[str]
    dry_run: bool
    nodes: list[str]
    shape: list[str]

    def state(self, tries: int = 1) -> str | None:
        """ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ..., or None if there is none of this name.

        PREEMPTED, if it is ACTIVE and one of its TPU VMs is PREEMPTED. Exits when gcloud cannot
        tell, so many times in a row.
        """
        state = self._states("queued-resources", "state.state", tries).get(self.name)
        if state == "ACTIVE" and self.nodes:
            states = self._states("tpu-vm", "state", tries)
            if any(states.get(node) == "PREEMPTED" for node in self.nodes):
                return "PREEMPTED"
        return state

    def _states(self, group: str, field: str, tries: int) -> dict[str, str]:
        command = self._gcloud(group, "list", f"--format=value(name.basename(),{field})")
        if self.dry_run:
            _print(command)
            return {self.name: "ACTIVE"}
        for left in reversed(range(tries)):
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if found.returncode == 0:
                break
            if not left:
                sys.exit(found.returncode)
            time.sleep(POLL_SECONDS)
        return dict(line.split("\t", 1) for line in found.stdout.splitlines() if "\t" in line)

    def create(self) -> None:
        """Asks for the TPU; it is there when `state` is ACTIVE."""
        self._execute(self._gcloud("queued-resources", "create", self.name, *self.shape))

    def delete(self) -> None:
        """Gives the TPU back."""
        self._execute(self._gcloud("queued-resources", "delete", self.name, "--force", "--quiet"))

    def wait_until_active(self) -> None:
        """Asks for the TPU if there is none, or none any more, and waits.

        Exits when MAX_FAILED_REQUESTS have FAILED: then it is more than a shortage that passes.
        """
        shown: str | None = ""
        num_failed = 0
        while (state := self.state(PATIENCE)) != "ACTIVE":
            if state != shown:
                _say(f"{self.name} is {state or 'not there'}")
                shown = state
            if state == "FAILED":
                num_failed += 1
                self._show_why()
                if num_failed == MAX_FAILED_REQUESTS:
                    _say(f"gave up: {num_failed} requests for {self.name} failed, see above why")
                    sys.exit(1)
            if state in GONE:
                self.delete()
            if state in GONE or state is None:
                self.create()
            time.sleep(POLL_SECONDS)

    def _show_why(self) -> None:
        """Prints what gcloud knows of the state, as long as the queued resource is there."""
        command = self._gcloud("queued-resources", "describe", self.name, "--format=yaml(state)")
        subprocess.run(command, stdout=sys.stderr, check=False)

    def install(self) -> int:
        """Copies the checkout to all hosts and installs it there; the exit code."""
        check_size()
        archive = f"{tempfile.gettempdir()}/t5x_lite.tar.gz"
        pack = (
            f"set -o pipefail; cd {shlex.quote(str(REPO))} && "
            f"{shlex.join(LIST_FILES)} | tar --null --files-from=- -czf {archive}"
        )
        self._execute(["bash", "-c", pack])
        copies = [["scp", archive, f"{node}:t5x_lite.tar.gz"] for node in self.nodes]
        return self._on_all_hosts(copies) or self._ssh(INSTALL)

    def start(self, command: Sequence[str]) -> int:
        """Runs t5x_lite on all hosts; an exit code other than 0 if one host had one."""
        # gcloud repeats a command when a connection breaks; the lock keeps a second one away.
        return self._ssh(
            f"cd t5x_lite && exec flock --nonblock --conflict-exit-code {ALREADY_RUNNING} --no-fork"
            f" .lock .venv/bin/python -m t5x_lite {shlex.join(command)} --distributed"
        )

    def stop(self) -> int:
        """Ends t5x_lite on all hosts after it has saved; the exit code."""
        return self._ssh(STOP)

    def _ssh(self, script: str) -> int:
        # A connection over which nothing is said for ten minutes would be dropped.
        flags = [f"--command={script}", "--ssh-flag=-oServerAliveInterval=60"]
        return self._on_all_hosts([["ssh", node, *flags] for node in self.nodes])

    def _on_all_hosts(self, calls: list[list[str]]) -> int:
        """All slices at once, because the hosts of a run wait for each other; the exit code."""
        commands = [self._gcloud("tpu-vm", *call, "--worker=all") for call in calls]
        if self.dry_run:
            for command in commands:
                _print(command)
            return 0
        processes = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in commands]
        codes = [process.wait() for process in processes]
        return next((code for code in codes if code), 0)

    def _execute(self, command: list[str]) -> None:
        if self.dry_run:
            _print(command)
        elif code := subprocess.run(command, check=False).returncode:
            sys.exit(code)  # the command has said why

    def _gcloud(self, *arguments: str) -> list[str]:
        return ["gcloud", "compute", "tpus", *arguments, *self.location]


def main(argv: Sequence[str] | None = None) -> int:
    """Carries out one action; returns the exit code, for `run` that of the t5x_lite command."""
    args = _parse(argv)
    location = [f"--zone={args.zone}"]
    if args.project:
        location.append(f"--project={args.project}")
    tpu = Tpu(args.name, location, args.dry_run, *_nodes_and_shape(args))
    match args.action:
        case "run":
            return run(tpu, args.command)
        case "create":
            tpu.create()
            tpu.wait_until_active()
        case "install":
            return tpu.install()
        case "stop":
            return tpu.stop()
        case "status":
            print(tpu.state() or "not there")
        case "delete":
            tpu.delete()
    return 0


def _nodes_and_shape(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    target: TpuTarget | None = args.target
    if target is None:  # status and delete can do without
        return [], []
    shape = [
        f"--accelerator-type={target.accelerator_type}",
        f"--runtime-version={target.generation.runtime_version}",
    ]
    if args.spot:
        shape.append("--spot")
    if target.num_slices == 1:
        return [args.name], [*shape, f"--node-id={args.name}"]
    nodes = [f"{args.name}-{i}" for i in range(target.num_slices)]
    return nodes, [*shape, f"--node-count={target.num_slices}", f"--node-prefix={args.name}"]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--name", required=True, help="of the queued resource and of its TPU VMs")
    which.add_argument("--zone", required=True)
    which.add_argument("--project", help="by default the one that gcloud is set to")
    which.add_argument("--dry_run", action="store_true", help="print the commands, run none")
    shape = argparse.ArgumentParser(add_help=False)
    shape.add_argument("--target", type=parse_target, required=True, help="v5e:16x16 or so")
    price = argparse.ArgumentParser(add_help=False)
    price.add_argument("--spot", action="store_true", help="cheaper, may be taken away")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(target=None, spot=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    run = actions.add_parser("run", parents=[which, shape, price])
    run.add_argument("command", nargs=argparse.REMAINDER, help="train, eval or infer ...")
    actions.add_parser("create", parents=[which, shape, price])
    actions.add_parser("install", parents=[which, shape])
    actions.add_parser("stop", parents=[which, shape])
    for action in ("status", "delete"):
        parser_of_action = actions.add_parser(action, parents=[which])
        parser_of_action.add_argument(
            "--target",
            type=parse_target,
            help="with it, `status` sees that one of the TPU VMs was pre-empted",
        )
    args = parser.parse_args(argv)
    if args.action == "run":
        check_command(run, args.command, (REPO,))
    return args


def run(tpu: Tpu, command: Sequence[str]) -> int:
    """Runs `command` on the TPU until it is done, whatever happens to the TPU meanwhile."""
    if tpu.dry_run:
        return _show_run(tpu, command)
    check_size()  # before anything costs money
    tpu.state()  # exits if gcloud is not set up
    quick_failures = 0
    while True:
        tpu.wait_until_active()
        began = time.monotonic()
        # The run of an earlier launcher may still be going on there: it saves and makes way.
        code = tpu.stop() or tpu.install()
        if code == 0:
            code = tpu.start(command)
            if code in (0, USAGE_ERROR):
                break
        time.sleep(POLL_SECONDS)  # until a pre-emption shows in the state
        if tpu.state(PATIENCE) != "ACTIVE":
            _say("the TPU was taken away; asking for another one")
            quick_failures = 0
            continue
        quick = time.monotonic() - began < QUICK_SECONDS
        quick_failures = quick_failures + 1 if quick else 1
        _say(f"failure {quick_failures} of at most {MAX_QUICK_FAILURES} in a row: exit code {code}")
        if quick_failures == MAX_QUICK_FAILURES:
            break
    give_back = shlex.join(["python", "launch/tpu_vm.py", "delete", f"--name={tpu.name}"])
    _say(f"ended with exit code {code}. The TPU is still there and costs money; to give it back:")
    _say(" ".join([give_back, *tpu.location]))
    return code


def check_size() -> None:
    """Says how much `install` copies to every host; exits if that is too much to be meant."""
    found = subprocess.run(LIST_FILES, cwd=REPO, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        _say(f"{REPO}: what is copied to the hosts is what git lists; it has to be a git checkout")
        sys.exit(USAGE_ERROR)
    total, of_folder = 0, collections.Counter[str]()
    for name in filter(None, found.stdout.split("\0")):
        path = REPO / name
        size = path.lstat().st_size if path.is_symlink() or path.is_file() else 0
        total += size
        folder = str(pathlib.PurePath(name).parent)
        of_folder[name if folder == "." else folder] += size
    if total <= MAX_COPIED_BYTES:
        _say(f"{total / 1e6:.1f} MB of this checkout are copied to every host")
        return
    largest = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in of_folder.most_common(3))
    _say(
        f"{total / 1e6:.1f} MB would be copied to every host, more than "
        f"{MAX_COPIED_BYTES / 1e6:.0f}; the largest: {largest}. Move them elsewhere, or write them "
        "into .gitignore"
    )
    sys.exit(USAGE_ERROR)


def _show_run(tpu: Tpu, command: Sequence[str]) -> int:
    tpu.create()
    tpu.wait_until_active()
    tpu.stop()
    tpu.install()
    tpu.start(command)
    print("# after exit code 0 or 2 that was all; after any other:")
    tpu.state()
    print(f"# if that is {', '.join(GONE)}, first:")
    tpu.delete()
    print("# and then all of it again")
    return 0


def _print(command: list[str]) -> None:
    print(shlex.join(command))


def _say(text: str) -> None:
    print(f"tpu_vm.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        _say("stopped here; what was started on the TPU goes on there, see `stop` and `delete`")
        sys.exit(130)
