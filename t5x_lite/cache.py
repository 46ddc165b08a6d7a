"""The verb `cache`: a task's rows, made once, for training that reads them by index.

Part i of n of the source becomes file i of n, whoever makes it; see `cache_files` for what is left
on disk. A killed command goes on with the files that were not whole.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import os
import pathlib
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import seqio
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from t5x_lite import cache_beam, cache_files, cache_workers, data, files, row_records
from t5x_lite.cache_files import CacheError, Manifest, Settings, Shard
from t5x_lite.cache_progress import CacheProgress
from t5x_lite.cache_workers import Report
from t5x_lite.errors import UsageError
from t5x_lite.interop.vocabularies import same_vocabulary
from t5x_lite.run_config import DataConfig
from tasks import shards, sources, vocabularies

# One record is read at a time, in any order. zstd takes a quarter off 16-bit ids.
_WRITER_OPTIONS = "group_size:1,zstd:3"
# A source that is in memory is divided into so many parts, another into no more than so many.
_NUM_SHARDS_OF_MEMORY, _MAX_SHARDS = 4, 1024
# What a run must have as the cache has it; how many files and passes that has is no matter.
_OF_A_RUN = ("task", "split", "source", "feature_lengths", "packed", "vocabularies")


@dataclasses.dataclass(frozen=True)
class Job:
    """A cache that is to be made, for every process that makes a part of it.

    Attributes:
      config: the task, its split, lengths and whether rows are packed.
      directory: where the files go.
      settings: what they follow from.
    """

    config: DataConfig
    directory: str
    settings: Settings


def cache_task(
    config: DataConfig,
    output_dir: str,
    *,
    num_passes: int = 1,
    seed: int = 0,
    num_processes: int | None = None,
    num_shards: int | None = None,
    beam_options: str | None = None,
) -> Manifest:
    """Makes the cache of a task's split, or the parts that are missing or damaged, and prints it.

    Args:
      config: the task, its split, lengths and whether rows are packed.
      output_dir: a directory for caches, local or of an object store.
      num_passes: how often the source is gone through, each time with other noise.
      seed: fixes the noise.
      num_processes: on this machine; None is half of its cores. The files are the same with any.
      num_shards: files; None follows from the source.
      beam_options: of a pipeline of Apache Beam that makes the files; None is these processes.

    Raises:
      UsageError: there is no such task or split, it is a mixture, it has a vocabulary of its own
        and one was given, it gives no row, or the directory cannot be written or holds another
        cache.
      CacheError: a process died.
    """
    job = make_job(config, output_dir, num_passes=num_passes, seed=seed, num_shards=num_shards)
    settings, directory = job.settings, epath.Path(job.directory)
    if num_processes is None:
        num_processes = max(1, (os.cpu_count() or 1) // 2)
    _check_count("--num_processes", num_processes)
    with _locked(directory):
        manifest = cache_files.read_manifest(directory)
        if manifest is not None:
            cache_files.check_same(directory, manifest.settings, settings)
            print("It is complete; looking whether every file is as it was written", flush=True)
            found = {
                i: s for i, s in enumerate(manifest.shards) if _is_intact(directory, i, job, s)
            }
        else:
            cache_files.check_begun_with(directory, settings)
            noted = ((i, cache_files.read_note(directory, job.settings, i)) for i in _indices(job))
            found = {i: shard for i, shard in noted if shard is not None}
        missing = [i for i in _indices(job) if i not in found]
        if found and missing:
            print(f"{len(found)} of {settings.num_shards} files are there already", flush=True)
        with CacheProgress(settings.num_shards, len(found)) as progress:
            if beam_options is None:
                written = _written(job, missing, num_processes, progress.add_rows)
            else:
                written = cache_beam.written(job, missing, beam_options)
            for index, shard in written:
                found[index] = shard
                progress.update(len(found))
        whole = [found[i] for i in _indices(job)]
        made = manifest if manifest is not None and not missing else finish(job, whole)
    if manifest is not None and made.fingerprint != manifest.fingerprint:
        print(
            "What was made anew differs from what it was, by another source or another version of "
            "a library: a run that began with the cache cannot go on with it"
        )
    _print_summary(job, made, progress.seconds if missing else 0.0, found, missing)
    return made


def make_job(
    config: DataConfig, output_dir: str, *, num_passes: int, seed: int, num_shards: int | None
) -> Job:
    """What is to be made, after a look at whether it can; see `cache_task`."""
    _check_count("--num_passes", num_passes)
    if seed < 0:
        raise UsageError(f"--seed={seed}: must be at least 0")
    data.configure(config)
    task = data.get_provider(config.mixture_or_task_name)
    if isinstance(task, seqio.Mixture):
        members = ", ".join(t.name for t in task.tasks[:3])
        raise UsageError(
            f"{task.name} is a mixture: rows that hold the examples of one task cannot be mixed at "
            f"its rates; cache one task ({members}...), or train on it without a cache"
        )
    if config.split not in task.splits:
        splits = ", ".join(sorted(map(str, task.splits)))
        raise UsageError(f"--split={config.split}: {task.name} has {splits}")
    if config.vocabulary_file is not None and not _has_default_vocabulary(task):
        raise UsageError(
            f"--vocabulary_file has no effect on {task.name}, which has its own vocabulary"
        )
    data.check(dataclasses.replace(config, eval_split=config.split), model_vocab_size=1 << 31)
    if num_shards is None:
        num_shards = _num_shards(task, config.split)
    _check_count("--num_shards", num_shards)
    if num_shards > 99_999:
        raise UsageError(f"--num_shards={num_shards}: at most 99999")
    settings = _settings(config, task, num_shards=num_shards, num_passes=num_passes, seed=seed)
    # `configure` expands what a shell leaves after "=".
    directory = cache_files.directory_of(os.path.expanduser(output_dir), task.name, config.split)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _not_writable(directory, e) from e
    return Job(config, os.fspath(directory), settings)


def _has_default_vocabulary(task: seqio.Task) -> bool:
    return any(f.vocabulary is vocabularies.DEFAULT for f in task.output_features.values())


def _check_count(flag: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{flag}={value}: must be at least 1")


def _num_shards(task: seqio.Task, split: str) -> int:
    """Files that follow from the source alone, so that every machine makes the same."""
    if task.source.supports_arbitrary_sharding:
        return _NUM_SHARDS_OF_MEMORY
    return min(len(task.source.list_shards(split)), _MAX_SHARDS)


def _settings(config: DataConfig, task: seqio.Task, **of_cache: Any) -> Settings:
    vocabularies = {feature: _describe(task, feature) for feature in task.output_features}
    size = max(v["size"] for v in vocabularies.values())
    return Settings(
        task=task.name,
        split=config.split,
        source=_source(task, config.split),
        feature_lengths=dict(config.task_feature_lengths),
        packed=config.pack,
        vocabularies=vocabularies,
        dtype=row_records.dtype_for(size, config.task_feature_lengths),
        **of_cache,
    )


def _describe(task: seqio.Task, feature: str) -> dict[str, Any]:
    description = data.vocabulary_description(task, feature)
    description.pop("sentencepiece_model_file", None)  # where it is kept here
    content = data.vocabulary_content(task, feature)
    digest = None if content is None else hashlib.sha256(content).hexdigest()
    return description | {"sha256": digest}


def _source(task: seqio.Task, split: str) -> str:
    if isinstance(task.source, sources.PreparedTfdsSource):
        return task.source.name
    if isinstance(task.source, shards.ShardSource):  # their names are digests
        names = data.source_shards(task, split)
        return hashlib.sha256("\n".join(names).encode()).hexdigest()
    return ""


# ---- one file ------------------------------------------------------------------------------------


def write_shard(job: Job, index: int, report: Report = lambda rows, tokens: None) -> Shard:
    """Makes file `index` of a cache, in this process, and notes that it is whole.

    Args:
      job: from `make_job`; `data.configure` has been called with its configuration here.
      index: which file.
      report: called with the numbers of rows and tokens written since the last call.

    Raises:
      UsageError: an example cannot be read, or the directory cannot be written.
      CacheError: writing failed on the way, on a full disk for example.
    """
    directory, settings = epath.Path(job.directory), job.settings
    path = cache_files.shard_path(directory, index, settings.num_shards)
    task = data.get_provider(settings.task)
    counts = {"rows": 0, "examples": 0, "inputs": 0, "targets": 0}
    with _new_file(path) as temporary:
        writer = ArrayRecordWriter(temporary, _WRITER_OPTIONS)
        for number in range(settings.num_passes):
            # Files that had the same seed would have the same noise in their n-th examples.
            key = (settings.seed, number, index)
            seed = int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)
            for batch in data.rows_of_part(job.config, task, seed, index, settings.num_shards):
                with _failing_as(path):
                    for record in row_records.encode(batch, settings.dtype):
                        writer.write(record)
                added = _count(batch)
                report(added["rows"], added["inputs"] + added["targets"])
                counts = {name: counts[name] + added[name] for name in counts}
        with _failing_as(path):
            writer.close()
        num_bytes, digest = os.path.getsize(temporary), files.sha256(epath.Path(temporary))
    tokens = {name: counts[name] for name in ("inputs", "targets")}
    shard = Shard(counts["rows"], counts["examples"], tokens, num_bytes, digest)
    cache_files.write_note(directory, settings, index, shard)
    return shard


def _count(batch: data.Batch) -> dict[str, int]:
    inputs, targets = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    segments = batch.get("decoder_segment_ids")
    return {
        "rows": len(inputs),
        "examples": len(inputs) if segments is None else int(segments.max(axis=1).sum()),
        "inputs": int(np.count_nonzero(inputs)),
        "targets": int(np.count_nonzero(targets)),
    }


@contextlib.contextmanager
def _failing_as(path: epath.Path) -> Iterator[None]:
    """Makes a line of what ArrayRecord says."""
    try:
        yield
    except RuntimeError as e:
        raise CacheError(
            f"writing {path} failed: {' '.join(str(e).split())}; the files that are whole stay, "
            "the same command goes on"
        ) from e


@contextlib.contextmanager
def _new_file(path: epath.Path) -> Iterator[str]:
    """The name of a local file that becomes `path` when it is whole."""
    try:
        if files.is_local(path):
            temporary = f"{os.fspath(path)}.tmp"
            try:
                yield temporary
                with open(temporary, "rb") as f:
                    os.fsync(f.fileno())
                os.replace(temporary, path)
            finally:
                pathlib.Path(temporary).unlink(missing_ok=True)
        else:
            with tempfile.TemporaryDirectory() as folder:
                temporary = os.path.join(folder, path.name)
                yield temporary
                with open(temporary, "rb") as f, path.open("wb") as target:
                    shutil.copyfileobj(f, target, 1 << 22)
    except OSError as e:
        raise _not_writable(path, e) from e


def _not_writable(path: epath.PathLike, error: OSError) -> UsageError:
    return UsageError(f"{os.fspath(path)} cannot be written: {error.strerror or error}")


# ---- all files -----------------------------------------------------------------------------------


def _indices(job: Job) -> range:
    return range(job.settings.num_shards)


def _written(
    job: Job, missing: list[int], num_processes: int, report: Report
) -> Iterable[tuple[int, Shard]]:
    """Writes the files that are missing; gives each when it is whole."""
    num_processes = min(num_processes, len(missing))
    if num_processes > 1:
        return cache_workers.written(job, missing, num_processes, report)
    return ((index, write_shard(job, index, report)) for index in missing)


@contextlib.contextmanager
def _locked(directory: epath.Path) -> Iterator[None]:
    """Keeps a second command out of a local directory."""
    if not files.is_local(directory):
        yield
        return
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UsageError(f"{directory}: another process is writing it") from e
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(lock)


def _is_intact(directory: epath.Path, index: int, job: Job, shard: Shard) -> bool:
    path = cache_files.shard_path(directory, index, job.settings.num_shards)
    if path.exists() and files.sha256(path) == shard.sha256:
        return True
    print(f"{path} is {'damaged' if path.exists() else 'missing'}: it is made anew", flush=True)
    return False


def finish(job: Job, made: Iterable[Shard]) -> Manifest:
    """Makes the cache complete: all its files are whole.

    Raises:
      UsageError: there is no row in them.
    """
    manifest = Manifest(job.settings, tuple(made))
    if manifest.num_rows == 0:
        raise UsageError(
            f"{job.settings.task}: one pass over {job.settings.split!r} gives no row of "
            f"{dict(job.settings.feature_lengths)}"
        )
    task = data.get_provider(job.settings.task)
    names = ("t5x-lite", "seqio", "tensorflow", "tensorflow-text", "sentencepiece")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    content = data.vocabulary_content(task)
    cache_files.finish(epath.Path(job.directory), manifest, content, versions)
    return manifest


def _print_summary(
    job: Job, manifest: Manifest, seconds: float, found: dict[int, Shard], missing: list[int]
) -> None:
    lengths = manifest.settings.feature_lengths
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    tokens = {n: sum(shard.num_tokens[n] for shard in manifest.shards) for n in lengths}
    fill = ", ".join(f"{n} {tokens[n] / manifest.num_rows / lengths[n]:.1%}" for n in lengths)
    total = sum(tokens.values())
    print(
        f"{job.directory}: {manifest.num_rows:,} rows in {len(manifest.shards)} files, "
        f"{num_bytes:,} bytes, {total:,} tokens ({num_bytes / total:.2f} bytes each); "
        f"rows are full to: {fill}"
    )
    if missing:
        written = sum(sum(found[i].num_tokens.values()) for i in missing)
        print(f"{written / seconds:,.0f} tokens/s")
    cache_dir = os.fspath(epath.Path(job.directory).parent.parent)
    value = repr(cache_dir)
    value = f'"{value}"' if shlex.quote(cache_dir) == cache_dir else shlex.quote(value)
    not_packed = "" if job.config.pack else " --gin.DataConfig.pack=False"
    print(f"train with --gin.CACHE_DIR={value}{not_packed}")


# ---- a run on it ---------------------------------------------------------------------------------


def open_for_run(config: DataConfig, provider: data.Provider) -> tuple[epath.Path, Manifest]:
    """The cache in `config.cache_dir` that holds the rows of a run, and where it is.

    Args:
      config: the run's.
      provider: its task, from `data.check`.

    Raises:
      UsageError: there is no such cache, or it holds other rows; names what differs.
      CacheError: a file of it is missing or cut off.
    """
    assert config.cache_dir is not None
    if isinstance(provider, seqio.Mixture):
        raise UsageError(
            f"CACHE_DIR = {config.cache_dir!r}: {provider.name} is a mixture, and caches are of "
            "one task; set CACHE_DIR = None"
        )
    cache_dir = os.path.expanduser(config.cache_dir)
    flags = _flags_of_run(config, provider)
    try:
        directory, manifest = cache_files.open_complete(
            cache_dir, provider.name, config.split, flags
        )
    except (UsageError, CacheError):
        raise
    except Exception as e:
        # Every client of an object store has exceptions of its own.
        if files.is_local(cache_dir) and not isinstance(e, OSError):
            raise
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        raise UsageError(f"CACHE_DIR = {config.cache_dir!r} cannot be read: {reason}") from e
    cached = manifest.settings
    own = _settings(config, provider, num_shards=0, num_passes=0, seed=0)
    saved = directory / cache_files.VOCABULARY
    content = data.vocabulary_content(provider)
    if saved.exists() and same_vocabulary(saved.read_bytes(), content):
        # The same ids, whatever else the file says; of the inputs too if it is theirs.
        targets = own.vocabularies["targets"]
        same = {
            n: cached.vocabularies["targets"] for n, v in own.vocabularies.items() if v == targets
        }
        own = dataclasses.replace(own, vocabularies={**own.vocabularies, **same})
    changed = cache_files.differences(cached, own, _OF_A_RUN)
    if changed:
        raise UsageError(
            f"CACHE_DIR = {config.cache_dir!r} does not have what the run asks for (cache -> run): "
            f"{'; '.join(changed)}. Cache the task with the run's settings into another directory, "
            "or set CACHE_DIR = None"
        )
    return directory, manifest


def _flags_of_run(config: DataConfig, task: seqio.Task) -> list[str]:
    """Flags of the command that makes the cache of a run, where they are not the defaults."""
    lengths = ",".join(f"{name}={n}" for name, n in config.task_feature_lengths.items())
    vocabulary_file = config.vocabulary_file if _has_default_vocabulary(task) else None
    # As the fields are called, the verb's flags are, but for the module.
    own = dataclasses.replace(config, vocabulary_file=vocabulary_file)
    fields = {f.name: f.default for f in dataclasses.fields(DataConfig)}
    names = ["split", "vocabulary_file", "mixture_or_task_module", "tfds_data_dir"]
    names += [name for name in fields if name.startswith("text_files_")]
    found = [f"--task_feature_lengths={lengths}"]
    for name in names:
        value = getattr(own, name)
        if value == fields[name]:
            continue
        flag = "module" if name == "mixture_or_task_module" else name
        found.append(f"--{flag}" if value is True else f"--{flag}={value}")
    return found if config.pack else [*found, "--no_pack"]
