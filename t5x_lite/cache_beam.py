"""Apache Beam that writes the files of a cache, on a cluster or on this machine.

Beam cannot be installed beside what trains (docs/cache.md says how to make an environment for it).
"""

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from etils import epath

from t5x_lite import cache_files
from t5x_lite.cache_files import CacheError, Shard
from t5x_lite.errors import UsageError

if TYPE_CHECKING:
    from t5x_lite.cache import Job


def written(job: "Job", indices: Sequence[int], options: str) -> Iterator[tuple[int, Shard]]:
    """Writes files of a cache; gives them when the pipeline has ended.

    Args:
      job: the cache, in a directory that every worker can write.
      indices: which files.
      options: of the pipeline, as on a command line: "--runner=DirectRunner".

    Raises:
      UsageError: Beam is not installed, or does not know an option.
      CacheError: a file is missing although the pipeline has ended.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as e:
        raise UsageError(
            f"--beam_options={options}: Apache Beam is not installed ({e}); docs/cache.md says how "
            "to make an environment with it"
        ) from e
    # Files are few and take long: without the reshuffle one worker would make all of them.
    with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        numbers = pipeline | "Files" >> beam.Create(list(indices)) | beam.Reshuffle()
        _ = numbers | "Write" >> beam.Map(_write, job)
    for index in indices:
        shard = cache_files.read_note(epath.Path(job.directory), job.settings, index)
        if shard is None:
            raise CacheError(
                f"the pipeline has ended, but file {index} is not in {job.directory}: is that a "
                "directory that all of its workers share?"
            )
        yield index, shard


def _write(index: int, job: "Job") -> None:
    """Runs in a worker of the pipeline."""
    from t5x_lite import cache, data

    data.configure(job.config)
    cache.write_shard(job, index)
