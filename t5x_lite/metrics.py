"""Metrics: sums on device become ratios on the host, then JSON lines and TensorBoard event files.

The JSON lines are the record; an event file is a rendering of them. So there is one thing to repair
when a run resumes, and whatever process opens a series leaves exactly one event file that agrees
with its lines.
"""

import itertools
import json
import math
import numbers
import os
import re
import socket
import struct
import time
from collections.abc import Iterable, Mapping

from etils import epath
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from t5x_lite import files
from t5x_lite.errors import UsageError

_RATIOS = {
    "loss": ("loss_sum", "num_tokens"),
    "z_loss": ("z_loss_sum", "num_tokens"),
    "accuracy": ("num_correct", "num_tokens"),
    "text_loss": ("text_loss_sum", "num_text_tokens"),
}

# Keys of a line that are not metrics, so TensorBoard has them as step and wall time instead.
_STEP, _UNIX_TIME = "step", "unix_time"

# An object store takes no append: an upload rewrites the whole object, so not every line is one.
_UPLOAD_PERIOD_SECONDS = 30.0

_event_file_number = itertools.count()


def summarize(sums: Mapping[str, float]) -> dict[str, float]:
    """Turns sums over tokens, added up over steps, microbatches and hosts, into ratios.

    Args:
      sums: scalars. `loss_sum` (nats, without z-loss), `z_loss_sum` and `num_correct` are divided
        by `num_tokens` (real target tokens); `text_loss_sum` by `num_text_tokens` (those that are
        neither sentinels nor end marks). Any other scalar passes through.

    Returns:
      `loss`, `z_loss`, `text_loss` in nats per token and `accuracy` in [0, 1], each if its sum is
      given; then the other scalars, token counts included. A ratio over no tokens is NaN.
    """
    ratios = {
        name: float(sums[numerator]) / count if (count := float(sums[denominator])) else math.nan
        for name, (numerator, denominator) in _RATIOS.items()
        if numerator in sums
    }
    numerators = {numerator for numerator, _ in _RATIOS.values()}
    return ratios | {k: float(v) for k, v in sums.items() if k not in numerators}


def read_metrics(path: epath.PathLike) -> list[dict[str, float]]:
    """Reads the lines of one `metrics/<name>.jsonl`.

    Returns:
      One dict per logged step, in the file's order; null reads as NaN. A last line that was torn by
      a killed process is left out.

    Raises:
      UsageError: a line other than the last is not a JSON object with a `step`.
    """
    lines = epath.Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record[_STEP], int):
                raise TypeError
            record = {k: math.nan if v is None else v + 0 for k, v in record.items()}
        except (ValueError, TypeError, KeyError):
            # No newline after it: the process was killed while it wrote this line.
            if number == len(lines):
                break
            raise UsageError(
                f"{os.fspath(path)}:{number} is not a metrics line (a JSON object with a whole"
                f" 'step' and numbers): {line[:60]!r}; remove that line"
            ) from None
        records.append(record)
    return records


class MetricWriter:
    """Writes scalars per step under a MODEL_DIR: `metrics/<name>.jsonl`, `tensorboard/<name>/`.

    A file has one line per step, in order of steps: `{"step": …, "<metric>": …, "unix_time": …}`,
    non-finite values as null (TensorBoard: NaN). On a mounted file system each line is there when
    `write` returns. On an object store, where whole objects are rewritten, it is there after
    `flush`; call that before a checkpoint is saved, or a resumed run can lack lines.

    A series has one writer at a time: on a cluster, that of process 0 is enabled.
    """

    def __init__(self, model_dir: epath.PathLike, *, enabled: bool = True):
        """Nothing is read or written before the first call, and never unless `enabled`."""
        self._model_dir = epath.Path(model_dir)
        self._enabled = enabled
        self._series: dict[str, _Series] = {}
        self._names: dict[str, str] = {}

    def write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Adds the line of `step`; the line of a step that was logged before is replaced.

        Args:
          name: `train` or an evaluation's name; what cannot be in a file name becomes `_`.
          step: number of updates done.
          values: real scalars (Python, numpy or jax).

        Raises:
          UsageError: another name of this run has the same file name.
        """
        if not self._enabled:
            return
        record: dict[str, float] = {_STEP: int(step)}
        record |= {key: _number(value) for key, value in values.items()}
        record[_UNIX_TIME] = round(time.time(), 3)
        file_name = re.sub(r"[^A-Za-z0-9._-]|^\.", "_", name) or "_"
        other = self._names.setdefault(file_name, name)
        if other != name:
            raise UsageError(
                f"the metrics of {name!r} and of {other!r} would both be written to"
                f" metrics/{file_name}.jsonl; rename one"
            )
        self._open(file_name).write(record)

    def drop_after(self, step: int) -> None:
        """Drops every line and event later than `step`, in all of the run's series.

        For a run that resumes from the checkpoint of `step`. Each file is replaced as a whole: a
        crash in the middle leaves it as it was or as it should be.
        """
        directory = self._model_dir / "metrics"
        if self._enabled and directory.exists():
            for path in sorted(directory.glob("*.jsonl")):
                self._open(path.name.removesuffix(".jsonl")).drop_after(step)

    def flush(self) -> None:
        """Makes every line visible to other readers."""
        for series in self._series.values():
            series.flush()

    def close(self) -> None:
        """Flushes. The writer holds no file open."""
        self.flush()

    def _open(self, file_name: str) -> "_Series":
        if file_name not in self._series:
            self._series[file_name] = _Series(
                self._model_dir / "metrics" / f"{file_name}.jsonl",
                self._model_dir / "tensorboard" / file_name,
            )
        return self._series[file_name]


class _Series:
    """The lines of one name, in memory and on disk, and their one event file."""

    def __init__(self, path: epath.Path, event_dir: epath.Path):
        self._path = path
        self._event_dir = event_dir
        self._appends = files.is_local(path)
        self._uploaded_at = -math.inf
        self._dirty = False
        self._records = read_metrics(path) if path.exists() else []
        self._rewrite()

    def write(self, record: dict[str, float]) -> None:
        if self._records and record[_STEP] <= self._records[-1][_STEP]:
            kept = [r for r in self._records if r[_STEP] != record[_STEP]]
            self._records = sorted([*kept, record], key=lambda r: r[_STEP])
            self._rewrite()
            return
        self._records.append(record)
        if self._appends:
            # Opened each time: one write call per line, and nothing held that could go stale.
            for path, data in ((self._path, _line(record)), (self._event_file, _event(record))):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as f:
                    f.write(data)
            return
        self._dirty = True
        if time.monotonic() - self._uploaded_at >= _UPLOAD_PERIOD_SECONDS:
            self.flush()

    def drop_after(self, step: int) -> None:
        kept = [r for r in self._records if r[_STEP] <= step]
        if len(kept) < len(self._records):
            self._records = kept
            self._rewrite()

    def flush(self) -> None:
        if self._dirty:
            files.write_atomically(self._path, b"".join(map(_line, self._records)))
            files.write_atomically(self._event_file, _events(self._records))
            self._dirty = False
            self._uploaded_at = time.monotonic()

    def _rewrite(self) -> None:
        """Writes all lines, and one event file in place of those there are.

        The new event file has a new name, which sorts last, because a TensorBoard that is reading
        the old one would stay at its offset there.
        """
        old = list(self._event_dir.glob("*tfevents*")) if self._event_dir.exists() else []
        self._event_file = self._event_dir / (
            f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
            f".{next(_event_file_number)}"
        )
        self._dirty = True
        self.flush()
        for path in old:
            path.unlink(missing_ok=True)


def _number(value: float) -> float:
    if isinstance(value, numbers.Integral):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else math.nan


def _line(record: Mapping[str, float]) -> bytes:
    finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def _event(record: Mapping[str, float]) -> bytes:
    event = event_pb2.Event(step=record[_STEP], wall_time=record.get(_UNIX_TIME, 0.0))
    for tag, value in record.items():
        if tag not in (_STEP, _UNIX_TIME):
            event.summary.value.add(tag=tag, simple_value=value)
    return _frame(event.SerializeToString())


def _events(records: Iterable[Mapping[str, float]]) -> bytes:
    """A whole event file: its version, a session start, and the records.

    A TensorBoard that is already showing this series forgets at a session start what it has of that
    step and later, so that the lines of an older file are not drawn a second time.
    """
    now = time.time()
    version = event_pb2.Event(wall_time=now, file_version="brain.Event:2")
    start = event_pb2.Event(
        wall_time=now, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    )
    header = _frame(version.SerializeToString()) + _frame(start.SerializeToString())
    return header + b"".join(map(_event, records))


def _frame(data: bytes) -> bytes:
    """One TFRecord: length, its checksum, data, its checksum."""
    length = struct.pack("<Q", len(data))
    return b"".join(
        (
            length,
            struct.pack("<I", masked_crc32c(length)),
            data,
            struct.pack("<I", masked_crc32c(data)),
        )
    )
