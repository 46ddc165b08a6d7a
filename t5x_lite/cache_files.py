"""What the `cache` verb leaves on disk, and what it notes while it works.

    <cache>/<task>/<split>/
        rows-00003-of-00016.array_record    records of `row_records`, each compressed by itself
        rows-00003-of-00016.json            while the cache is incomplete: that this one is whole
        vocabulary.model                    of the targets, if that is a SentencePiece model
        manifest.json                       written last: a cache without it is not complete

The files follow from the settings alone, not from how many processes wrote them or how often they
were interrupted.
"""

import dataclasses
import functools
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from t5x_lite import files
from t5x_lite.errors import Failure, UsageError, nearest

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.model"
_FORMAT = 1


class CacheError(Failure):
    """A cache that is damaged, or that could not be written."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the content of a cache follows from.

    Attributes:
      task: the name of the task.
      split: of the task.
      source: what the task reads, by its version or a digest of its content; may be empty.
      feature_lengths: tokens of each feature in a row.
      packed: whether a row holds several examples.
      vocabularies: of each feature: its class, number of ids and digest.
      dtype: "uint16" or "uint32", of the ids in the records.
      num_shards: files; each is made of its part of the source.
      num_passes: how often the source is gone through, each time with other noise.
      seed: fixes the noise and what is packed with what.
    """

    task: str
    split: str
    source: str
    feature_lengths: Mapping[str, int]
    packed: bool
    vocabularies: Mapping[str, Mapping[str, Any]]
    dtype: str
    num_shards: int
    num_passes: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of rows, when it is whole.

    Attributes:
      num_rows: records in it.
      num_examples: examples in these.
      num_tokens: ids that are no padding, of each feature.
      num_bytes: size of the file.
      sha256: its digest.
    """

    num_rows: int
    num_examples: int
    num_tokens: Mapping[str, int]
    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A complete cache: its settings, and its files in order."""

    settings: Settings
    shards: tuple[Shard, ...]

    @property
    def num_rows(self) -> int:
        """Records in all files."""
        return sum(shard.num_rows for shard in self.shards)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the content: 64 hexadecimal digits."""
        return hashlib.sha256(_to_json(dataclasses.asdict(self))).hexdigest()


# ---- names ---------------------------------------------------------------------------------------


def directory_of(cache: epath.PathLike, task: str, split: str) -> epath.Path:
    """Where a cache has the rows of one split of a task."""
    return epath.Path(cache) / task / split


def shard_path(directory: epath.Path, index: int, num_shards: int) -> epath.Path:
    """The file of shard `index`."""
    return directory / f"rows-{index:05}-of-{num_shards:05}.array_record"


def _note_path(directory: epath.Path, index: int, num_shards: int) -> epath.Path:
    path = shard_path(directory, index, num_shards)
    return path.with_name(path.name.removesuffix("array_record") + "json")


# ---- while it is written -------------------------------------------------------------------------


def write_note(directory: epath.Path, settings: Settings, index: int, shard: Shard) -> None:
    """Says that the file of a shard is whole."""
    note = {"settings": dataclasses.asdict(settings), "shard": dataclasses.asdict(shard)}
    files.write_atomically(_note_path(directory, index, settings.num_shards), _to_json(note))


def read_note(directory: epath.Path, settings: Settings, index: int) -> Shard | None:
    """The shard, if its file is whole; None if it is to be written.

    Raises:
      UsageError: it was written with other settings.
    """
    path = _note_path(directory, index, settings.num_shards)
    if not path.exists():
        return None
    note = _from_json(path)
    check_same(directory, Settings(**note["settings"]), settings)
    shard = Shard(**note["shard"])
    file = shard_path(directory, index, settings.num_shards)
    return shard if file.exists() and file.stat().length == shard.num_bytes else None


def check_begun_with(directory: epath.Path, settings: Settings) -> None:
    """Raises UsageError if an incomplete cache was begun with other settings."""
    for path in sorted(directory.glob("rows-*.json"))[:1]:
        check_same(directory, Settings(**_from_json(path)["settings"]), settings)


def check_same(directory: epath.Path, old: Settings, new: Settings) -> None:
    """Raises UsageError, naming what differs, unless a cache has these settings."""
    changed = differences(old, new)
    if changed:
        raise UsageError(
            f"{directory} holds rows with other settings: {'; '.join(changed)}. Give another "
            "--output_dir, or remove it"
        )


def differences(old: Settings, new: Settings, names: Sequence[str] | None = None) -> list[str]:
    """What differs: "seed: 0 -> 1". Of `names` alone, if given."""
    before, after = (json.loads(_to_json(dataclasses.asdict(s))) for s in (old, new))
    found: list[str] = []
    for name in before if names is None else names:
        if before[name] == after[name]:
            continue
        if name == "vocabularies":
            found += _vocabulary_differences(before[name], after[name])
        elif name == "source" and _is_digest(before[name]) and _is_digest(after[name]):
            found.append("the source's files have changed since it was made")
        else:
            found.append(f"{name}: {_short(before[name])} -> {_short(after[name])}")
    return found


def _vocabulary_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One for all features, if they are alike in that."""
    found = {}
    for feature in sorted(old | new):
        before, after = old.get(feature), new.get(feature)
        if before == after:
            continue
        words = [_vocabulary(value) for value in (before, after)]
        if words[0] == words[1]:  # they differ in something that is rarely of interest
            words = [_short(value) for value in (before, after)]
        found[feature] = " -> ".join(words)
    if set(found) == set(old) == set(new) and len(set(found.values())) == 1:
        return [f"vocabulary: {next(iter(found.values()))}"]
    return [f"vocabulary of {feature}: {words}" for feature, words in found.items()]


def _vocabulary(description: dict[str, Any] | None) -> str:
    """ "SentencePiece 9fee7303 (180 ids)"."""
    if description is None:
        return "none"
    kinds = {"ByteVocabulary": "bytes", "SentencePieceVocabulary": "SentencePiece"}
    kind = kinds.get(description["class"], description["class"])
    digest = f" {description['sha256'][:8]}" if description["sha256"] else ""
    return f"{kind}{digest} ({description['size']} ids)"


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def finish(
    directory: epath.Path,
    manifest: Manifest,
    vocabulary: bytes | None,
    versions: Mapping[str, str],
) -> None:
    """Makes a cache complete: every shard has been written.

    Args:
      directory: of the cache.
      manifest: of all its shards.
      vocabulary: the SentencePiece model of the targets; None for bytes.
      versions: of the libraries that made it, for people.
    """
    if vocabulary is not None:
        files.write_atomically(directory / VOCABULARY, vocabulary)
    content = {"format": _FORMAT, **dataclasses.asdict(manifest), "versions": dict(versions)}
    text = json.dumps(content, indent=2) + "\n"
    files.write_atomically(directory / MANIFEST, text.encode())
    for index in range(manifest.settings.num_shards):
        _note_path(directory, index, manifest.settings.num_shards).unlink(missing_ok=True)


# ---- when it is complete -------------------------------------------------------------------------


def read_manifest(directory: epath.Path) -> Manifest | None:
    """The manifest; None if there is none.

    Raises:
      CacheError: it cannot be read.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    content = _from_json(path)
    if content.get("format") != _FORMAT:
        raise CacheError(
            f"{path} has format {content.get('format')!r}, this version reads {_FORMAT}: cache "
            "the task again"
        )
    shards = tuple(Shard(**shard) for shard in content["shards"])
    return Manifest(Settings(**content["settings"]), shards)


def open_complete(
    cache: epath.PathLike, task: str, split: str, flags: Sequence[str] = ()
) -> tuple[epath.Path, Manifest]:
    """The directory and the manifest of a complete cache, whose files have their sizes.

    What is in the files is checked as it is read: each record has a checksum of its own.

    Args:
      cache: the directory of caches.
      task: the name of the task.
      split: of the task.
      flags: of the command that would make it, for the message that there is none.

    Raises:
      UsageError: there is no such cache.
      CacheError: a file is missing, or has another size.
    """
    directory = directory_of(cache, task, split)
    words = ["python", "-m", "t5x_lite", "cache", task, f"--output_dir={cache}", *flags]
    manifest = read_manifest(directory)
    if manifest is None:
        if directory.exists():
            raise UsageError(
                f"CACHE_DIR = {str(cache)!r}: {directory} is not complete; the same command that "
                "began it goes on with it"
            )
        root = epath.Path(cache)
        if meant := _too_deep(root, task, split):
            raise UsageError(
                f"CACHE_DIR = {str(cache)!r} has the rows of one task; did you mean CACHE_DIR = "
                f"{meant!r}?"
            )
        known = [
            path.parent.parent.name
            for path in (root.glob(f"*/{split}/{MANIFEST}") if root.exists() else ())
        ]
        hint = f" ({nearest(task, known)})" if known else ""
        raise UsageError(
            f"CACHE_DIR = {str(cache)!r} has no split {split!r} of {task}{hint}; make it with "
            f"`{shlex.join(words)}`"
        )

    def problem(index: int) -> str | None:
        path = shard_path(directory, index, manifest.settings.num_shards)
        if not path.exists():
            return f"{path} is missing"
        found, expected = path.stat().length, manifest.shards[index].num_bytes
        return None if found == expected else f"{path} has {found:,} bytes instead of {expected:,}"

    with ThreadPoolExecutor(16) as pool:
        problems = [p for p in pool.map(problem, range(len(manifest.shards))) if p]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        words += _flags_of(manifest.settings)
        raise CacheError(
            f"{problems[0]}{more}: the command that made it, `{shlex.join(words)}`, repairs it"
        )
    return directory, manifest


def _too_deep(root: epath.Path, task: str, split: str) -> str | None:
    """The directory of caches, if `root` is that of a task or a split in it."""
    if root.name == task:
        meant = root.parent
    elif root.name == split and root.parent.name == task:
        meant = root.parent.parent
    else:
        return None
    return str(meant) if (directory_of(meant, task, split) / MANIFEST).exists() else None


def _flags_of(settings: Settings) -> list[str]:
    """What a run does not know of the command that made its cache."""
    numbers = {"num_passes": settings.num_passes, "seed": settings.seed}
    defaults = {"num_passes": 1, "seed": 0}
    given = {name: v for name, v in numbers.items() if v != defaults[name]}
    return [f"--{name}={v}" for name, v in (given | {"num_shards": settings.num_shards}).items()]


def _to_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _from_json(path: epath.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except ValueError as e:
        raise CacheError(f"{path} is damaged: {e}; remove it") from e
