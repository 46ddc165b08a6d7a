"""Mixing rates through seqio against those that the `t5` library gave."""

import itertools
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

import tasks  # noqa: F401  registers them
from t5x_lite.errors import UsageError
from tasks import mixing, vocabularies

RELATIVE_TOLERANCE = 1e-9  # as the golden file states
_unique = itertools.count()


@pytest.fixture(scope="module")
def golden(shared_data):
    return json.loads((shared_data / "golden" / "mixing.json").read_text())


@pytest.fixture
def make_tasks():
    """Registers tasks of given sizes under names of their own, and removes them again."""
    registered = []

    def make(sizes: dict) -> dict:
        prefix = f"mixing_test_{next(_unique)}_"
        for name, size in sizes.items():
            source = seqio.FunctionDataSource(
                lambda split, shuffle_files: tf.data.Dataset.range(1),
                splits=["train"],
                num_input_examples={"train": size},
            )
            feature = seqio.Feature(seqio.ByteVocabulary())
            seqio.TaskRegistry.add(
                prefix + name, source=source, output_features={"targets": feature}
            )
            registered.append(prefix + name)
        return {name: prefix + name for name in sizes}

    yield make
    for name in registered:
        seqio.TaskRegistry.remove(name)


def _mix(names: dict, rates: list) -> tuple:
    mixture = seqio.Mixture(f"mixing_test_mixture_{next(_unique)}", rates)
    found = {
        name: mixture.get_rate(seqio.TaskRegistry.get(registered))
        for name, registered in names.items()
    }
    return found, mixture.total_rate


def test_rates_by_size_cap_and_temperature(golden, make_tasks):
    assert len(golden["cases"]) >= 32
    names_of = {key: make_tasks(sizes) for key, sizes in golden["dataset_sizes"].items()}
    for case in golden["cases"]:
        names = names_of[case["sizes"]]
        rate = mixing.Proportional(case["maximum"], case["temperature"], case["scale"])
        rates, total = _mix(names, [(registered, rate) for registered in names.values()])
        assert rates == pytest.approx(case["rates"], rel=RELATIVE_TOLERANCE)
        assert total == pytest.approx(case["total_rate"], rel=RELATIVE_TOLERANCE)
        normalised = {name: rate / total for name, rate in rates.items()}
        assert normalised == pytest.approx(case["normalised"], rel=RELATIVE_TOLERANCE)


def test_constant_rate_beside_sizes(golden, make_tasks):
    case = golden["with_constant_rate"]
    names = make_tasks(golden["dataset_sizes"][case["sizes"]])
    capped = mixing.Proportional(case["others_maximum"])
    rates, total = _mix(
        names,
        [
            (
                registered,
                case["rate_unsupervised_value"] if name == case["constant_rate_task"] else capped,
            )
            for name, registered in names.items()
        ],
    )
    normalised = {name: rate / total for name, rate in rates.items()}
    assert normalised == pytest.approx(case["normalised"], rel=RELATIVE_TOLERANCE)


def test_mixture_of_mixtures(golden, make_tasks):
    case = golden["nested_mixture"]
    names = make_tasks(golden["dataset_sizes"][case["sizes"]])
    capped = mixing.Proportional(case["sub"]["rate"]["maximum"])
    sub = f"mixing_test_sub_{next(_unique)}"
    seqio.MixtureRegistry.add(sub, [(names[name], capped) for name in case["sub"]["tasks"]])
    try:
        used = {name: names[name] for name in case["rates"]}
        rates, total = _mix(
            used,
            [(sub if name == "sub" else names[name], rate) for name, rate in case["top"].items()],
        )
    finally:
        seqio.MixtureRegistry.remove(sub)
    assert rates == pytest.approx(case["rates"], rel=RELATIVE_TOLERANCE)
    assert total == pytest.approx(case["total_rate"], rel=RELATIVE_TOLERANCE)


def test_registered_mixtures(golden):
    assert len(golden["registered_mixtures"]) == 3
    for name, expected in golden["registered_mixtures"].items():
        mixture = seqio.MixtureRegistry.get(name)
        rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
        assert rates == pytest.approx(expected["rates"], rel=RELATIVE_TOLERANCE)
        assert mixture.total_rate == pytest.approx(expected["total_rate"], rel=RELATIVE_TOLERANCE)


# ---- the multi-task mixtures ---------------------------------------------------------------------


@pytest.fixture
def own_rates():
    """What a test sets, it sets for itself alone."""
    yield
    mixing.set_rates(mixing.Rates())


def _registered_rates(name: str) -> dict[str, float]:
    mixture = seqio.MixtureRegistry.get(name)
    return {task.name: mixture.get_rate(task) for task in mixture.tasks}


def test_multi_task_mixtures_have_all_of_glue_and_super_glue_and_c4():
    glue, super_glue = (
        set(_registered_rates(f"{name}_proportional")) for name in ("glue_v002", "super_glue_v102")
    )
    others = {"cnn_dailymail_v002", "squad_v010_allanswers", "wmt_t2t_ende_v003"}
    others |= {"wmt15_enfr_v003", "wmt16_enro_v003", "c4_v020_unsupervised"}
    assert set(_registered_rates("all_mix")) == glue | super_glue | others
    assert set(_registered_rates("all_proportional")) == glue | super_glue | others


def test_rates_of_all_mix():
    """As T5's: the benchmarks by size, RTE's two copies half each, large tasks at the limit."""
    rates = _registered_rates("all_mix")
    assert rates["glue_mnli_v002"] == 392_702
    assert rates["glue_rte_v002"] == rates["super_glue_rte_v102"] == 2_490 / 2
    assert rates["wmt15_enfr_v003"] == rates["wmt_t2t_ende_v003"] == 1e6
    assert rates["wmt16_enro_v003"] == 610_320
    assert rates["c4_v020_unsupervised"] == 1e6
    assert rates["glue_ax_v002"] == rates["super_glue_wsc_v102_simple_eval"] == 0


def test_rates_can_be_set(own_rates):
    mixing.set_rates(mixing.Rates(maximum=2**19, temperature=2.0, unsupervised=710_000))
    rates, by_size = _registered_rates("all_mix"), _registered_rates("all_proportional")
    assert rates.pop("c4_v020_unsupervised") == 710_000
    assert by_size.pop("c4_v020_unsupervised") == 2**9.5
    assert rates == by_size
    assert rates["wmt15_enfr_v003"] == 2**9.5
    assert rates["glue_rte_v002"] == 1245**0.5
    assert rates["glue_ax_v002"] == 0


def test_alpha_of_mt5(make_tasks):
    """Probabilities proportional to size to the power of 0.3."""
    sizes = {"en": 2_733_000, "sw": 1_000, "yo": 46}
    names = make_tasks(sizes)
    rate = mixing.Proportional(temperature=1 / 0.3)
    rates, total = _mix(names, [(registered, rate) for registered in names.values()])
    powers = np.array(list(sizes.values())) ** 0.3
    assert [rates[name] / total for name in sizes] == pytest.approx(powers / powers.sum())


@pytest.mark.parametrize("value", [{"temperature": 0}, {"maximum": -1}, {"unsupervised": 0}])
def test_rates_that_make_no_sense(value):
    with pytest.raises(UsageError, match="must be above 0"):
        mixing.Rates(**value)


def test_tasks_of_the_real_data_are_drawn_by_their_rates(shared_data):
    """SST-2 and CoLA, the members of GLUE's mixture that are there, through seqio."""
    seqio.set_tfds_data_dir_override(str(shared_data / "tfds"))
    vocabularies.set_default_file(str(shared_data / "vocabs" / "t5_sentencepiece_32000.model"))
    rate = mixing.Proportional(maximum=20_000)
    mixture = seqio.Mixture(
        "mixing_test_glue", ["glue_sst2_v002", "glue_cola_v002"], default_rate=rate
    )
    dataset = mixture.get_dataset({"inputs": 64, "targets": 8}, seed=1, copy_pretokenized=True)
    drawn = [e["inputs_pretokenized"] for e in dataset.take(2000).as_numpy_iterator()]
    share = np.mean([text.startswith(b"sst2") for text in drawn])
    expected = 20_000 / 28_551
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5
