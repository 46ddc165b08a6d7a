"""Supervised tasks on their way to batches: what is missing or wrong is told in one line."""

import dataclasses

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite import data
from t5x_lite.errors import UsageError
from t5x_lite.run_config import DataConfig
from tasks import casts, vocabularies

LENGTHS = {"inputs": 32, "targets": 8}
CLASSES = ("no", "yes")


def register(name, labels):
    """A task over these labels, training and validation alike."""

    def source(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices({"label": tf.constant(labels, tf.int32)})

    @seqio.map_over_dataset
    def cast(example):
        number = tf.strings.as_string(example["label"])
        return {"inputs": number, "targets": casts.class_text(example["label"], CLASSES, name)}

    feature = seqio.Feature(vocabularies.DEFAULT, add_eos=True, dtype=tf.int32)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, splits=["train", "validation"]),
        preprocessors=[cast, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=[],
    )


def config_of(name, **changes):
    config = DataConfig(name, LENGTHS, 2, vocabulary_file="bytes", pack=False, **changes)
    data.configure(config)
    return config


def test_a_label_that_is_no_class_is_one_line_wherever_it_is_met():
    register("labels_to_7", [0, 1, -1, 1, 0, 7])
    config = config_of("labels_to_7")
    provider = data.check(config, 512)
    line = "labels_to_7: label 7 is not 0 'no', 1 'yes', or -1 (unlabelled)"
    with pytest.raises(UsageError) as error:
        data.eval_examples(config, provider, None)
    assert str(error.value) == line
    with pytest.raises(UsageError) as error:
        list(data.EvalBatches(config, provider, None))
    assert str(error.value) == line
    batches = data.train_batches(config, provider, seed=0)  # its probe is of the first rows
    with pytest.raises(UsageError) as error:
        for _ in range(6):
            next(batches)
    assert str(error.value) == line


def test_a_mixtures_loss_is_over_what_it_trains_on():
    """A member of rate 0 is there for its metrics."""
    register("labels_a", [0] * 5)
    register("labels_b", [1] * 4)
    seqio.MixtureRegistry.add("labels_ab", [("labels_a", 0.0), ("labels_b", 3.0)])
    config = config_of("labels_ab")
    found = data.eval_examples(config, data.check(config, 512), None)
    assert [chr(e["inputs"][0] - 3) for e in found] == ["1"] * 4  # a byte's id is 3 more


def test_a_mixture_names_every_member_that_is_not_prepared(shared_data):
    config = config_of("glue_v002_proportional", tfds_data_dir=str(shared_data / "tfds"))
    with pytest.raises(UsageError) as error:
        data.check(config, 512)
    message = str(error.value)
    assert "\n" not in message
    absent = ("ax", "mnli", "mnli_matched", "mnli_mismatched", "mrpc", "qnli", "qqp", "rte", "stsb")
    for name in absent:
        assert f"glue/{name}:2.0.0" in message
    for name in ("cola", "sst2"):
        assert f"glue/{name}:" not in message


def test_versions_from_the_configuration(shared_data):
    name, data_dir = "glue_sst2_v002", str(shared_data / "tfds")
    config = config_of(name, tfds_data_dir=data_dir, tfds_versions={"glue": "1.0.0"})
    with pytest.raises(UsageError, match=r"glue/sst2:1\.0\.0 is not prepared"):
        data.check(config, 512)
    config = dataclasses.replace(config, tfds_versions={"glue/sst2": "2.0.0"})
    data.configure(config)
    assert data.check(config, 512).name == name
    with pytest.raises(UsageError, match=r"TFDS_VERSIONS.*did you mean 'glue'"):
        data.configure(dataclasses.replace(config, tfds_versions={"gleu": "2.0.0"}))


def test_sst2_packed_holds_every_token_once(shared_data):
    """Rows of several examples hold the same ids as one example a row."""
    name, data_dir = "glue_sst2_v002", str(shared_data / "tfds")
    config = config_of(name, tfds_data_dir=data_dir, eval_split="validation")
    config = dataclasses.replace(config, task_feature_lengths={"inputs": 512, "targets": 64})
    provider = data.check(config, 512)

    def ids(pack):
        batches = data.EvalBatches(dataclasses.replace(config, pack=pack), provider, None)
        rows = [row for batch in batches for row in batch["encoder_input_tokens"]]
        return np.bincount(np.concatenate(rows), minlength=512)[1:], len(rows)

    (packed, few), (unpacked, many) = ids(True), ids(False)
    np.testing.assert_array_equal(packed, unpacked)
    assert few < many / 3
