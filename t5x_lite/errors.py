"""The one exception that means "the person who started this can fix it"."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input: one line that says what was given, where, and what is allowed.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


class Failure(RuntimeError):
    """A run that could not go on; the command line prints the message alone.

    Attributes:
      exit_code: what the process ends with.
    """

    exit_code = 1


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence naming the known names closest to `name`, or all of them if there are few."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.4)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    if len(known) <= 12:
        return "known: " + ", ".join(repr(k) for k in known)
    return f"{len(known)} names are known, none close to it"
