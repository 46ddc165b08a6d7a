"""How far `infer` is: a bar on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from typing import Self

import rich.console
import rich.progress

from t5x_lite.progress import format_seconds

_SECONDS_BETWEEN_LINES = 10.0


class LineProgress:
    """Lines done, the rate and the time left, as a context manager.

    Args:
      total: lines in all.
      start: lines that were there before.
      enabled: False shows nothing.
    """

    def __init__(self, total: int, start: int, *, enabled: bool = True):
        self._total, self._start, self._enabled = total, start, enabled
        self._began = self._printed_at = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        if enabled and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.completed:,}/{task.total:,} lines"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.description}"),
                console=rich.console.Console(file=sys.stdout),
                expand=True,
            )
            self._task = self._bar.add_task("compiling", total=total, completed=start)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Says that so many lines are written, those from before included."""
        if not self._enabled:
            return
        now = time.monotonic()
        rate = (done - self._start) / max(now - self._began, 1e-9)
        left = format_seconds((self._total - done) / rate) if rate else "?"
        text = f"{rate:,.1f} lines/s  {left} left"
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif now - self._printed_at >= _SECONDS_BETWEEN_LINES:
            print(f"{done:,}/{self._total:,} lines  {text}", flush=True)
            self._printed_at = now
