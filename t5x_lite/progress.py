"""What a person sees of a running loop: a live bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self, TextIO

import rich.console
import rich.progress


class Progress:
    """Progress of a loop over steps, as a context manager.

    On a terminal one bar is kept at the bottom: step, loss, rate, tokens/s and time left. Elsewhere
    (a file, a pipe, a cluster's log) `log` prints one line and nothing else moves.

    Args:
      total_steps: the step at which the loop ends.
      start_step: the step it starts from; more than 0 in a resumed run.
      stream: where to write; standard output by default.
    """

    def __init__(self, total_steps: int, start_step: int = 0, *, stream: TextIO | None = None):
        self._total_steps = total_steps
        self._step = start_step
        self._stream = sys.stdout if stream is None else stream
        # The first step compiles, so the clock for the time left starts at the end of it.
        self._first: tuple[int, float] | None = None
        self._bar: rich.progress.Progress | None = None
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.completed:,}/{task.total:,}"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.description}"),
                console=rich.console.Console(file=self._stream),
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task("compiling", total=total_steps, completed=start_step)
        self._values = ""

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int) -> None:
        """Says that `step` steps are done. Call it after every step; it is cheap."""
        self._step = step
        if self._first is None:
            self._first = (step, time.monotonic())
        if self._bar:
            left = self._time_left()
            text = "  ".join(part for part in (self._values, left) if part)
            self._bar.update(self._task, completed=step, description=text or "running")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values of a logged step.

        Args:
          step: number of steps done.
          values: as in `metrics/train.jsonl`; `loss`, `learning_rate` and
            `target_tokens_per_second` are shown, each if it is there.
        """
        self._values = _describe(values)
        self.update(step)
        if not self._bar:
            parts = (f"step {step}/{self._total_steps}", self._values, self._time_left())
            print("  ".join(part for part in parts if part), file=self._stream, flush=True)

    def message(self, text: str) -> None:
        """Prints `text` as it is, on lines of its own (above the bar)."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _time_left(self) -> str:
        """From the mean rate since the first step, so evaluations and saves are counted in."""
        if self._first is None or self._step >= self._total_steps:
            return ""
        first_step, first_time = self._first
        if self._step <= first_step:
            return ""
        seconds_per_step = (time.monotonic() - first_time) / (self._step - first_step)
        return format_seconds(seconds_per_step * (self._total_steps - self._step)) + " left"


def format_seconds(seconds: float) -> str:
    """A duration for people, in its two largest units: `45s`, `1m32s`, `2h05m`, `3d04h`."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def _describe(values: Mapping[str, float]) -> str:
    parts = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.3f}")
    if "learning_rate" in values:
        parts.append(f"rate {values['learning_rate']:.1e}")
    if "target_tokens_per_second" in values:
        parts.append(f"{values['target_tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)
