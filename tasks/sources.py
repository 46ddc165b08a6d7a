"""Where documents come from, as seqio data sources that read nothing until they are used."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import file_utils

from t5x_lite.errors import UsageError, nearest


class RecordsSource(seqio.DataSource):
    """Records of strings that fit into memory: examples {field: string}.

    Shuffled as a whole and sharded by index, so any number of hosts can share it.
    """

    def __init__(
        self,
        splits: Iterable[str],
        load: Callable[[str], Sequence[Mapping[str, str]]],
        fields: Sequence[str],
    ) -> None:
        """`load(split)` gives the records; it is called whenever they are needed.

        Args:
          splits: their names.
          load: split -> records, each with all of the fields.
          fields: those that the examples have, also where a split has no record.
        """
        super().__init__(splits=splits)
        self._load = load
        self._fields = tuple(fields)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return [split]

    def num_input_examples(self, split: str) -> int:
        return len(self._load(split))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused_kwargs: object,
    ) -> tf.data.Dataset:
        records = self._load(split)
        order = np.arange(len(records))
        if shuffle:
            order = np.random.default_rng(seed).permutation(len(records))
        if shard_info:
            order = order[shard_info.index :: shard_info.num_shards]
        columns = {
            field: tf.constant([records[i][field] for i in order.tolist()], tf.string)
            for field in self._fields
        }
        return tf.data.Dataset.from_tensor_slices(columns)


# ---- TFDS ----------------------------------------------------------------------------------------


class PreparedTfdsSource(seqio.TfdsDataSource):
    """A TFDS data set that was prepared before: it is never downloaded or generated from here.

    Using it raises UsageError if it is not on disk, with the directories that were searched and
    how to prepare it.
    """

    def __init__(
        self,
        data_set: str,
        splits: Iterable[str],
        how_to_prepare: Callable[[str], str] | None = None,
    ) -> None:
        """Nothing is looked up before it is used.

        Args:
          data_set: "name" or "name/config"; with ":version", that one for good, else what
            `set_tfds_versions` says, else the newest that the installed TFDS knows.
          splits: those that the data set has.
          how_to_prepare: version -> a hint, in which {data_dir} stands for the first directory;
            None is the command that builds it.
        """
        super().__init__(splits=splits, read_only=True)
        self.data_set, _, self._pinned = data_set.partition(":")
        self.how_to_prepare = how_to_prepare

    @property
    def has_pinned_version(self) -> bool:
        """Whether the version is part of what was registered."""
        return bool(self._pinned)

    @property
    def version(self) -> str:
        """Of the data set, as "2.0.0"."""
        builder = self.data_set.partition("/")[0]
        return (
            self._pinned
            or _versions.get(self.data_set)
            or _versions.get(builder)
            or _newest_version(self.data_set)
        )

    @property
    def name(self) -> str:
        """What TFDS calls it, as "glue/sst2:2.0.0"."""
        return f"{self.data_set}:{self.version}"

    def places(self) -> list[str]:
        """The directories of this version in TFDS's data directories, whether there or not."""
        data_dirs = file_utils.list_data_dirs(self._loader().data_dir)
        return [f"{str(d).rstrip('/')}/{self.name.replace(':', '/')}" for d in data_dirs]

    def is_prepared(self) -> bool:
        """Whether it is on disk."""
        return any(tf.io.gfile.exists(f"{place}/dataset_info.json") for place in self.places())

    @property
    def tfds_dataset(self) -> seqio.LazyTfdsLoader:
        if not self.is_prepared():
            raise UsageError(
                f"data set {self.name} is not prepared: looked in {' and '.join(self.places())} "
                f"(--tfds_data_dir says where); {_how_to_prepare([self])}"
            )
        return self._loader()

    def _loader(self) -> seqio.LazyTfdsLoader:
        # A new one each time: it would remember the data directory of its first use.
        return seqio.LazyTfdsLoader(
            self.name, split_map={split: split for split in self._splits}, read_only=True
        )

    def __str__(self) -> str:
        version = f":{self._pinned}" if self._pinned else ""
        return f"{type(self).__name__}({self.data_set}{version})"

    __repr__ = __str__


def missing(tasks: Iterable[seqio.Task]) -> list[PreparedTfdsSource]:
    """The data sets that these tasks read and that are not prepared, each once."""
    found: dict[str, PreparedTfdsSource] = {}
    for task in tasks:
        if isinstance(task.source, PreparedTfdsSource):
            found.setdefault(task.source.name, task.source)
    return [found[name] for name in sorted(found) if not found[name].is_prepared()]


def check_prepared(name: str, tasks: Iterable[seqio.Task]) -> None:
    """Looks for everything that a task or mixture reads.

    Raises:
      UsageError: data sets are missing; names all of them, and how to prepare them.
    """
    absent = missing(tasks)
    if len(absent) == 1:
        _ = absent[0].tfds_dataset  # raises
    if absent:
        roots = [p.removesuffix(_path_of(absent[0])) for p in absent[0].places()]
        raise UsageError(
            f"{name}: {len(absent)} data sets are not prepared: "
            f"{', '.join(source.name for source in absent)}; looked in {' and '.join(roots)} "
            f"(--tfds_data_dir says where); {_how_to_prepare(absent)}"
        )


def _path_of(source: PreparedTfdsSource) -> str:
    return "/" + source.name.replace(":", "/")


def _how_to_prepare(absent: Sequence[PreparedTfdsSource]) -> str:
    """One command for all that TFDS builds by itself, and the hints of the others.

    Not `tfds build`: that needs Apache Beam, which cannot be installed beside seqio.
    """
    built = [source.name for source in absent if source.how_to_prepare is None]
    hints = [s.how_to_prepare(s.version) for s in absent if s.how_to_prepare is not None]
    if built:
        code = (
            "import sys, tensorflow_datasets as t; "
            "[t.builder(n, data_dir='{data_dir}').download_and_prepare() for n in sys.argv[1:]]"
        )
        names = built[0] if len(built) == 1 else "NAME NAME..."
        hints.insert(0, f'prepare with: python -c "{code}" {names}')
    data_dir = absent[0].places()[0].removesuffix(_path_of(absent[0]))
    return "; ".join(hints).replace("{data_dir}", data_dir)


_versions: dict[str, str] = {}  # by data set, or by its name without the configuration


def set_tfds_versions(versions: Mapping[str, str]) -> None:
    """Sets the versions of data sets, by "name/config" or by "name" for all of its configurations.

    Those of an earlier call are forgotten. A version that is part of a task's name stays.

    Raises:
      UsageError: no registered task reads such a data set, or it is not "N.N.N".
    """
    known = set()
    for task_name in seqio.TaskRegistry.names():
        source = seqio.TaskRegistry.get(task_name).source
        if isinstance(source, PreparedTfdsSource) and not source.has_pinned_version:
            known |= {source.data_set, source.data_set.partition("/")[0]}
    for data_set, version in versions.items():
        if data_set not in known:
            raise UsageError(
                f"TFDS_VERSIONS: no task reads a data set {data_set!r} of open version; "
                f"{nearest(data_set, known)}"
            )
        if not re.fullmatch(r"\d+\.\d+\.\d+", str(version)):
            raise UsageError(
                f"TFDS_VERSIONS: {data_set!r} has the version {version!r}; give one like '1.0.0'"
            )
    _versions.clear()
    _versions.update(versions)


@functools.cache
def _newest_version(data_set: str) -> str:
    """The version that the installed TFDS generates; its builder is looked up, not made."""
    builder, _, config = data_set.partition("/")
    builder_class = tfds.builder_cls(builder)
    version = builder_class.builder_configs[config].version if config else None
    return str(version or builder_class.VERSION)
