"""Mixing rates through seqio against those that the `t5` library gave."""

import functools
import itertools
import json

import pytest
import seqio
import tensorflow as tf

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
    tasks = {key: make_tasks(sizes) for key, sizes in golden["dataset_sizes"].items()}
    for case in golden["cases"]:
        names = tasks[case["sizes"]]
        rate = functools.partial(
            seqio.mixing_rate_num_examples,
            maximum=case["maximum"],
            temperature=case["temperature"],
            scale=case["scale"],
        )
        rates, total = _mix(names, [(registered, rate) for registered in names.values()])
        assert rates == pytest.approx(case["rates"], rel=RELATIVE_TOLERANCE)
        assert total == pytest.approx(case["total_rate"], rel=RELATIVE_TOLERANCE)
        normalised = {name: rate / total for name, rate in rates.items()}
        assert normalised == pytest.approx(case["normalised"], rel=RELATIVE_TOLERANCE)


def test_constant_rate_beside_sizes(golden, make_tasks):
    case = golden["with_constant_rate"]
    names = make_tasks(golden["dataset_sizes"][case["sizes"]])
    capped = functools.partial(seqio.mixing_rate_num_examples, maximum=case["others_maximum"])
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
    maximum = case["sub"]["rate"]["maximum"]
    capped = functools.partial(seqio.mixing_rate_num_examples, maximum=maximum)
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
