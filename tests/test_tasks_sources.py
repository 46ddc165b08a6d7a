"""Records, and which TFDS data set a task reads, and what is said when it is not there."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

import tasks  # noqa: F401  registers them
from t5x_lite.errors import UsageError
from tasks import sources


@pytest.fixture(autouse=True)
def own_configuration():
    """What a test sets, it sets for itself alone."""
    yield
    sources.set_tfds_versions({})
    seqio.set_tfds_data_dir_override(None)


def _source(task: str) -> sources.PreparedTfdsSource:
    return seqio.TaskRegistry.get(task).source


def _open_sources() -> list[sources.PreparedTfdsSource]:
    found = [seqio.TaskRegistry.get(name).source for name in seqio.TaskRegistry.names()]
    return [s for s in found if isinstance(s, sources.PreparedTfdsSource) and s.data_set != "c4/en"]


def test_versions_are_those_of_the_installed_tfds(tmp_path):
    """As TFDS's own builders say, which the sources do not make."""
    data_sets = {source.data_set: source for source in _open_sources()}
    assert len(data_sets) >= 30
    for data_set, source in data_sets.items():
        assert source.name == f"{data_set}:{tfds.builder(data_set, data_dir=tmp_path).version}"


def test_versions_can_be_set():
    versions = {"glue": "1.0.0", "glue/cola": "1.0.1", "wmt14_translate/de-en": "0.0.3"}
    sources.set_tfds_versions(versions)
    names = ["glue_sst2_v002", "glue_cola_v002", "wmt14_ende_v003", "wmt14_enfr_v003"]
    assert [_source(name).name for name in names] == [
        "glue/sst2:1.0.0",
        "glue/cola:1.0.1",
        "wmt14_translate/de-en:0.0.3",
        "wmt14_translate/fr-en:1.0.0",
    ]
    sources.set_tfds_versions({})
    assert _source("glue_sst2_v002").name == "glue/sst2:2.0.0"


def test_version_in_a_tasks_name_stays():
    sources.set_tfds_versions({"c4/en": "3.0.1"})
    assert _source("c4_v220_span_corruption").name == "c4/en:2.2.0"
    assert _source("c4_v020_unsupervised").name == "c4/en:3.0.1"


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"glue/sst": "1.0.0"}, "'glue/sst' of open version; did you mean 'glue/sst2'"),
        ({"gleu": "1.0.0"}, "did you mean 'glue'"),
        ({"glue": "1.0"}, "'glue' has the version '1.0'; give one like '1.0.0'"),
        ({"glue": 2}, "'glue' has the version 2; give one like '1.0.0'"),
    ],
)
def test_versions_that_make_no_sense(versions, message):
    sources.set_tfds_versions({"super_glue": "1.0.0"})
    with pytest.raises(UsageError, match="TFDS_VERSIONS: ") as error:
        sources.set_tfds_versions(versions)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert _source("super_glue_cb_v102").version == "1.0.0"  # nothing changed


def test_another_version_is_read(shared_data, tmp_path):
    target = tmp_path / "glue" / "cola" / "1.0.0"
    shutil.copytree(shared_data / "tfds" / "glue" / "cola" / "2.0.0", target)
    target.chmod(0o755)
    info = json.loads((target / "dataset_info.json").read_text())
    info["version"] = "1.0.0"
    (target / "dataset_info.json").unlink()
    (target / "dataset_info.json").write_text(json.dumps(info))
    seqio.set_tfds_data_dir_override(str(tmp_path))
    source = _source("glue_cola_v002")
    assert not source.is_prepared()
    sources.set_tfds_versions({"glue": "1.0.0"})
    assert source.is_prepared()
    assert source.num_input_examples("validation") == 1043
    assert len(list(source.get_dataset("validation", shuffle=False))) == 1043


# ---- records -------------------------------------------------------------------------------------


def test_records_of_any_number_even_none():
    records = {"train": [{"b": f"ü {i}", "a": str(i)} for i in range(10)], "empty": []}
    source = sources.RecordsSource(records, records.get, ["a", "b"])
    for split, expected in records.items():
        dataset = source.get_dataset(split, shuffle=False)
        assert dataset.element_spec == {name: tf.TensorSpec([], tf.string) for name in "ab"}
        found = [{k: v.decode() for k, v in row.items()} for row in dataset.as_numpy_iterator()]
        assert found == expected
        assert source.num_input_examples(split) == len(expected)
    hosts = [seqio.ShardInfo(i, 4) for i in range(4)]
    shares = [len(list(source.get_dataset("train", shard_info=host))) for host in hosts]
    assert shares == [3, 3, 2, 2]
    assert not list(source.get_dataset("empty", shard_info=hosts[3]))


# ---- what is missing -----------------------------------------------------------------------------


def test_one_missing_data_set(tmp_path):
    seqio.set_tfds_data_dir_override(str(tmp_path))
    task = seqio.TaskRegistry.get("imdb_reviews_v100")
    message = (
        "data set imdb_reviews/plain_text:1.0.0 is not prepared: looked in "
        f"{tmp_path}/imdb_reviews/plain_text/1.0.0 (--tfds_data_dir says where); prepare with: "
    )
    with pytest.raises(UsageError) as error:
        task.get_dataset({"inputs": 8, "targets": 8})
    assert str(error.value).startswith(message)
    with pytest.raises(UsageError) as error:
        sources.check_prepared(task.name, [task])
    assert str(error.value).startswith(message)


def test_every_missing_member_of_a_mixture_is_listed(shared_data):
    seqio.set_tfds_data_dir_override(str(shared_data / "tfds"))
    mixture = seqio.MixtureRegistry.get("glue_v002_proportional")
    absent = ["ax", "mnli", "mnli_matched", "mnli_mismatched", "mrpc", "qnli", "qqp", "rte", "stsb"]
    names = [f"glue/{name}:2.0.0" for name in absent]
    assert sorted(source.name for source in sources.missing(mixture.tasks)) == names
    with pytest.raises(UsageError) as error:
        sources.check_prepared(mixture.name, mixture.tasks)
    message = str(error.value)
    data_dir = shared_data / "tfds"
    listed = ", ".join(names)
    expected = f"glue_v002_proportional: 9 data sets are not prepared: {listed}; looked in "
    assert message.startswith(f"{expected}{data_dir} (--tfds_data_dir says where); prepare with: ")
    assert "\n" not in message


@pytest.mark.parametrize("num_missing", [1, 2])
def test_command_that_prepares(tmp_path, num_missing):
    """The command of the message, run as it is but for TFDS's work."""
    (tmp_path / "tensorflow_datasets.py").write_text(
        """
class builder:
    def __init__(self, name, data_dir):
        self.given = name, data_dir
    def download_and_prepare(self):
        print(*self.given)
"""
    )
    seqio.set_tfds_data_dir_override(str(tmp_path / "data"))
    tasks_of = [seqio.TaskRegistry.get(name) for name in ("glue_sst2_v002", "glue_cola_v002")]
    with pytest.raises(UsageError) as error:
        sources.check_prepared("both", tasks_of[:num_missing])
    _, _, command = str(error.value).partition("prepare with: python ")
    command = command.replace("NAME NAME...", "glue/cola:2.0.0 glue/sst2:2.0.0")
    process = subprocess.run(
        [sys.executable, *shlex.split(command)],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    data_dir = tmp_path / "data"
    expected = ["glue/cola:2.0.0", "glue/sst2:2.0.0"][-num_missing:]
    assert process.stdout.splitlines() == [f"{name} {data_dir}" for name in expected]


def test_a_missing_data_set_of_two_tasks_is_listed_once(tmp_path):
    seqio.set_tfds_data_dir_override(str(tmp_path))
    mixture = seqio.MixtureRegistry.get("super_glue_v102_proportional")
    names = [source.name for source in sources.missing(mixture.tasks)]
    assert len(names) == len(set(names)) == 11
    assert names.count("super_glue/wsc.fixed:1.0.2") == 1


def test_hints_of_data_sets_that_are_built_in_other_ways(tmp_path):
    seqio.set_tfds_data_dir_override(str(tmp_path))
    sources.set_tfds_versions({"c4/en": "3.0.1"})
    names = ["c4_v020_unsupervised", "glue_rte_v002", "glue_sst2_v002"]
    with pytest.raises(UsageError) as error:
        sources.check_prepared("mine", map(seqio.TaskRegistry.get, names))
    assert "mine: 3 data sets are not prepared: c4/en:3.0.1, glue/rte:2.0.0" in str(error.value)
    assert "prepare with: python -c" in str(error.value)
    assert f"gs://allennlp-tensorflow-datasets/c4/en/3.0.1 {tmp_path}/c4/en/" in str(error.value)


def test_nothing_missing(shared_data):
    seqio.set_tfds_data_dir_override(str(shared_data / "tfds"))
    ready = [seqio.TaskRegistry.get(name) for name in ("glue_cola_v002", "glue_sst2_v002")]
    assert sources.missing(ready) == []
    sources.check_prepared("both", ready)
