"""The best evaluation, against a walk over all of them."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import pytest

from t5x_lite import best, gin_utils
from t5x_lite.errors import UsageError


@pytest.fixture(scope="module")
def config(repo):
    files = ["gin_configs/models/t5_1_1/tiny.gin", "gin_configs/runs/python_docs.gin"]
    return gin_utils.load_train_config(files, [])[0]


def write_series(model_dir, name, values):
    path = model_dir / "metrics" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"step": 10 * (i + 1)} | ({} if v == "absent" else {"accuracy": v}))
        for i, v in enumerate(values)
    ]
    path.write_text("".join(line + "\n" for line in lines))


values = st.lists(
    st.sampled_from([None, "absent"]) | st.integers(0, 4).map(float), min_size=0, max_size=12
)


@hypothesis.given(values, st.sampled_from(["max", "min"]))
@hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_first_of_the_best_values(tmp_path, config, values, mode):
    config = dataclasses.replace(
        config, best_metric="some_task/accuracy", best_metric_mode=mode, early_stopping_patience=3
    )
    write_series(tmp_path, "some_task", values)
    found = best.find(tmp_path, config)
    finite = [v for v in values if isinstance(v, float)]
    if not finite:
        assert found is None
        assert not best.is_exhausted(tmp_path, config)
        return
    value = max(finite) if mode == "max" else min(finite)
    index = values.index(value)
    since = len(values) - 1 - index
    assert found == (10 * (index + 1), value, since)
    assert best.is_exhausted(tmp_path, config) == (since >= 3)


def test_only_steps_that_are_asked_for(tmp_path, config):
    config = dataclasses.replace(config, best_metric="t/accuracy")
    write_series(tmp_path, "t", [1.0, 5.0, 3.0, 2.0])
    assert best.find(tmp_path, config).step == 20
    assert best.find(tmp_path, config, [10, 30, 40])[:2] == (30, 3.0)
    assert best.find(tmp_path, config, []) is None


def test_without_patience_nothing_is_ever_exhausted(tmp_path, config):
    config = dataclasses.replace(config, best_metric="t/accuracy")
    write_series(tmp_path, "t", [5.0, *[1.0] * 50])
    assert not best.is_exhausted(tmp_path, config)


@pytest.mark.parametrize(
    ("name", "mode", "larger"),
    [
        ("validation/loss", None, False),
        ("validation/text_loss", None, False),
        ("glue_sst2_v002/accuracy", None, True),
        ("my_task/edit_distance", "min", False),
        ("validation/loss", "max", True),
    ],
)
def test_which_way_is_better(config, name, mode, larger):
    config = dataclasses.replace(config, best_metric=name, best_metric_mode=mode)
    assert config.larger_is_better == larger


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_metric": "accuracy"}, "give a series and a metric"),
        ({"best_metric": "a/b", "best_metric_mode": "best"}, "BEST_METRIC_MODE = 'best'"),
        ({"early_stopping_patience": 3}, "needs a BEST_METRIC"),
        (
            {"best_metric": "a/b", "early_stopping_patience": 3, "eval_period": 0},
            "EVAL_PERIOD = 0",
        ),
        ({"best_metric": "a/b", "early_stopping_patience": 0}, "EARLY_STOPPING_PATIENCE = 0"),
    ],
)
def test_what_makes_no_sense_is_refused(config, changes, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(config, **changes)


def test_best_json(tmp_path, config):
    config = dataclasses.replace(config, best_metric="t/accuracy")
    best.write(tmp_path, config, best.Best(20, 5.0, 1))
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 20,
        "metric": "t/accuracy",
        "value": 5.0,
        "mode": "max",
    }
