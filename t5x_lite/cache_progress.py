"""How far `cache` is: a bar on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from typing import Self

import rich.console
import rich.progress

from t5x_lite.progress import format_seconds

_SECONDS_BETWEEN_LINES = 10.0


class CacheProgress:
    """Files that are whole, the rate and the time left, as a context manager.

    Args:
      total: files in all.
      start: files that were there before.

    Attributes:
      seconds: how long the work took, when it is done.
    """

    def __init__(self, total: int, start: int):
        self._total, self._start, self._done = total, start, start
        self._rows = self._tokens = 0
        self._began = self._printed_at = time.monotonic()
        self.seconds = 0.0
        self._bar: rich.progress.Progress | None = None
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and start < total:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.completed}/{task.total} files"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.description}"),
                console=rich.console.Console(file=sys.stdout),
                expand=True,
            )
            self._task = self._bar.add_task("opening", total=total, completed=start)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.seconds = time.monotonic() - self._began
        if self._bar:
            self._bar.stop()

    def add_rows(self, num_rows: int, num_tokens: int) -> None:
        """Says that so many more rows and tokens are written."""
        self._rows += num_rows
        self._tokens += num_tokens
        self._show()

    def update(self, done: int) -> None:
        """Says that so many files are whole, those from before included."""
        self._done = done
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        rate = (self._done - self._start) / seconds
        left = f"  {format_seconds((self._total - self._done) / rate)} left" if rate else ""
        text = f"{self._rows:,} rows  {self._tokens / seconds:,.0f} tokens/s{left}"
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=text)
        elif now - self._printed_at >= _SECONDS_BETWEEN_LINES:
            print(f"{self._done}/{self._total} files  {text}", flush=True)
            self._printed_at = now
