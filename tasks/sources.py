"""Where documents come from, as seqio data sources that read nothing until they are used."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import seqio
import tensorflow as tf
from tensorflow_datasets.core.utils import file_utils

from t5x_lite.errors import UsageError


class DocumentsSource(seqio.DataSource):
    """Texts that fit into memory: examples {"text": string}.

    Shuffled as a whole and sharded by index, so any number of hosts can share it.
    """

    def __init__(self, splits: Iterable[str], load: Callable[[str], Sequence[str]]) -> None:
        """`load(split)` gives the documents; it is called whenever they are needed."""
        super().__init__(splits=splits)
        self._load = load

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
        documents = np.array([text.encode() for text in self._load(split)], object)
        if shuffle:
            documents = documents[np.random.default_rng(seed).permutation(len(documents))]
        if shard_info:
            documents = documents[shard_info.index :: shard_info.num_shards]
        return tf.data.Dataset.from_tensor_slices({"text": documents.tolist()})


class PreparedTfdsSource(seqio.TfdsDataSource):
    """A TFDS data set that was prepared before: it is never downloaded or generated from here.

    Using it raises UsageError if it is not on disk, with the directories that were searched and
    `how_to_prepare`, in which {data_dir} stands for the first of them.
    """

    def __init__(self, tfds_name: str, splits: Iterable[str], how_to_prepare: str) -> None:
        super().__init__(tfds_name=tfds_name, splits=splits, read_only=True)
        self._name = tfds_name
        self._how_to_prepare = how_to_prepare

    @property
    def tfds_dataset(self) -> seqio.LazyTfdsLoader:
        # A new one each time: it would remember the data directory of its first use.
        loader = seqio.LazyTfdsLoader(
            self._name, split_map={split: split for split in self._splits}, read_only=True
        )
        path = self._name.replace(":", "/")
        data_dirs = [str(d) for d in file_utils.list_data_dirs(loader.data_dir)]
        for data_dir in data_dirs:
            if tf.io.gfile.exists(f"{data_dir.rstrip('/')}/{path}/dataset_info.json"):
                return loader
        places = " and ".join(f"{data_dir.rstrip('/')}/{path}" for data_dir in data_dirs)
        how_to_prepare = self._how_to_prepare.format(data_dir=data_dirs[0])
        raise UsageError(
            f"data set {self._name} is not prepared: looked in {places} (--tfds_data_dir says "
            f"where); {how_to_prepare}"
        )

    def __str__(self) -> str:
        return f"{type(self).__name__}({self._name})"

    __repr__ = __str__
