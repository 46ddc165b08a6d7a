"""Several processes on this machine that write the files of a cache.

It loads no TensorFlow: a worker does, and keeps quiet about it, before it gets its first file.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, TypeAlias

from t5x_lite import setup
from t5x_lite.cache_files import CacheError, Shard
from t5x_lite.run_config import DataConfig

if TYPE_CHECKING:
    from t5x_lite.cache import Job

# Called with the numbers of rows and of tokens that were written since the last call.
Report: TypeAlias = Callable[[int, int], None]

_SECONDS_BETWEEN_REPORTS = 0.5


def written(
    job: "Job", indices: Sequence[int], num_processes: int, report: Report
) -> Iterator[tuple[int, Shard]]:
    """Writes files of a cache; gives each, in whatever order, when it is whole.

    Args:
      job: the cache.
      indices: which files.
      num_processes: workers.
      report: called in a thread.

    Raises:
      UsageError: as `cache.write_shard`.
      CacheError: a worker died.
    """
    spawn = multiprocessing.get_context("spawn")
    rows, tokens, stop = spawn.Value("q"), spawn.Value("q"), spawn.Event()
    start = (job.config, rows, tokens, stop)
    pool = ProcessPoolExecutor(num_processes, spawn, _start_worker, start)
    reporter = _Reporter(rows, tokens, report)
    try:
        futures = {pool.submit(_write, job, index): index for index in indices}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as e:
        raise CacheError(
            f"one of {num_processes} processes died, most likely for want of memory; give fewer "
            "as --num_processes: the command goes on with the files that were not whole"
        ) from e
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        reporter.close()


class _Reporter:
    """A thread that passes on what the workers have counted."""

    def __init__(self, rows: Any, tokens: Any, report: Report):
        self._counters = (rows, tokens)
        self._report = report
        self._seen = (0, 0)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(_SECONDS_BETWEEN_REPORTS):
            self._pass_on()

    def _pass_on(self) -> None:
        rows, tokens = (counter.value for counter in self._counters)
        self._report(rows - self._seen[0], tokens - self._seen[1])
        self._seen = (rows, tokens)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._pass_on()


# ---- in a worker ---------------------------------------------------------------------------------

_shared: tuple[Any, Any, Any] | None = None  # what is counted, and whether to stop


def _start_worker(config: DataConfig, rows: Any, tokens: Any, stop: Any) -> None:
    """Runs once in every worker."""
    global _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command's own process answers it
    # A worker whose command was killed would wait for its next file for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with setup.without_native_notes():
        from t5x_lite import data
    _shared = (rows, tokens, stop)
    data.configure(config)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write(job: "Job", index: int) -> Shard:
    from t5x_lite import cache

    assert _shared is not None
    rows, tokens, stop = _shared

    def report(num_rows: int, num_tokens: int) -> None:
        if stop.is_set():
            raise CacheError("stopped")
        for counter, number in ((rows, num_rows), (tokens, num_tokens)):
            with counter.get_lock():
                counter.value += number

    return cache.write_shard(job, index, report)
