"""What tests of launch/ run: the launchers themselves, and programs that stand in for others."""

import importlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent

# Stands in for gcloud, srun, squeue and scontrol: writes down how it was called, and answers with
# the next line of the file that is called like a part of its command line.
STAND_IN = r"""#!/bin/bash
here=${0%/*} name=${0##*/}
{ printf '%s\x1f' "$name" "$@"; printf '\x1e'; } >> "$here/calls"
for file in "$here"/*.answers; do
  part=${file##*/}
  if [[ "$name $*" == *"${part%.answers}"* ]]; then
    mapfile -t lines < "$file"
    if ((${#lines[@]} > 1)); then printf '%s\n' "${lines[@]:1}" > "$file"; fi
    echo "${lines[0]#* }"
    exit "${lines[0]%% *}"
  fi
done
"""


def done(*command: str | pathlib.Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command that has ended by itself, with its output."""
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=30, **options
    )


def shown(script: str, *arguments: str, **options: Any) -> list[str]:
    """The lines that a launcher prints."""
    found = done(sys.executable, REPO / "launch" / script, *arguments, **options)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def refusal(script: str, *arguments: str, **options: Any) -> str:
    """The last line of what a launcher says against its arguments."""
    found = done(sys.executable, REPO / "launch" / script, *arguments, **options)
    assert found.returncode == 2 and not found.stdout
    return found.stderr.splitlines()[-1]


@pytest.fixture
def launch(monkeypatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of launch/, as its scripts do."""
    monkeypatch.syspath_prepend(REPO / "launch")
    yield importlib.import_module
    for name in ("tpu_vm", "tpu_target", "gke_jobset", "command_line"):
        sys.modules.pop(name, None)


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> pathlib.Path:
    """A directory of commands that stand in for real ones, first in PATH."""
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("gcloud", "srun", "squeue", "scontrol"):
        (path / name).write_text(STAND_IN)
        (path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    return path


def calls(stand_ins: pathlib.Path) -> list[list[str]]:
    """How the stand-ins were called, in turn."""
    file = stand_ins / "calls"
    found = file.read_text().split("\x1e")[:-1] if file.exists() else []
    return [call.split("\x1f")[:-1] for call in found]


def answers(stand_ins: pathlib.Path, lines: dict[str, str]) -> None:
    """To every call with the key in it: exit code and text, line after line, the last for ever."""
    for part, text in lines.items():
        (stand_ins / f"{part}.answers").write_text(text)
