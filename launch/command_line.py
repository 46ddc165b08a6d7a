"""What the launchers look at in a command of t5x_lite before they start it anywhere."""

import argparse
import difflib
import itertools
import pathlib
from collections.abc import Sequence

REPO = pathlib.Path(__file__).resolve().parent.parent
VERBS = ("train", "eval", "infer")


def check_command(
    parser: argparse.ArgumentParser, command: Sequence[str], directories: Sequence[pathlib.Path]
) -> None:
    """Exits through `parser.error` if the command cannot work.

    Args:
      parser: of the launcher.
      command: a verb of t5x_lite and its arguments.
      directories: where relative gin files are when the command runs; an absolute one may lie on a
        file system that is not here, and is passed on.
    """
    if not command:
        parser.error("say what to run: a verb of t5x_lite (train, eval, infer) and its arguments")
    verb = command[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"it is one of {', '.join(VERBS)}"
        parser.error(f"{verb!r} is no verb of t5x_lite that is run here; {meant}")
    if "--dry_run" in command:
        parser.error(f"--dry_run is the launcher's: put it before {verb!r}")
    paths = _values(command, "--gin_search_paths")
    folders = [pathlib.Path(path) for text in paths for path in text.split(",") if path]
    for file in _values(command, "--gin_file"):
        if "://" in file:
            continue
        if pathlib.Path(file).is_absolute():
            _check_absolute(parser, pathlib.Path(file), directories)
        elif not any(
            (directory / folder / file).is_file()
            for directory in directories
            for folder in (pathlib.Path(), *folders)
        ):
            places = " or ".join(map(str, dict.fromkeys(directories)))
            parser.error(f"--gin_file={file}: no such file in {places}")


def _check_absolute(
    parser: argparse.ArgumentParser, file: pathlib.Path, directories: Sequence[pathlib.Path]
) -> None:
    if pathlib.Path.cwd() in directories:  # it runs on this machine
        if not file.is_file():
            parser.error(f"--gin_file={file}: no such file")
    elif file.is_relative_to(REPO):
        relative = file.relative_to(REPO)
        parser.error(
            f"--gin_file={file}: the checkout is elsewhere when it runs there; give "
            f"--gin_file={relative}"
        )


def _values(command: Sequence[str], flag: str) -> list[str]:
    """What is given as FLAG=VALUE, or as FLAG VALUE."""
    found = [word.partition("=")[2] for word in command if word.startswith(f"{flag}=")]
    return [*found, *(value for word, value in itertools.pairwise(command) if word == flag)]
