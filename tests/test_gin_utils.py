"""Gin files and bindings: which one wins, what is refused in one line, and what can be repeated."""

import pytest

from t5x_lite import gin_utils
from t5x_lite.errors import UsageError

MODEL = "gin_configs/models/t5_1_1/tiny.gin"
RUN = "gin_configs/runs/pretrain.gin"
DOCS = "gin_configs/runs/python_docs.gin"
REQUIRED = (
    "MIXTURE_OR_TASK_NAME = 'some_task'",
    "TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 8}",
    "TRAIN_STEPS = 3",
    "MODEL_DIR = 'runs/x'",
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """`gin_configs/` is found from any working directory; here a test's own files are."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*bindings: str, files=(MODEL, RUN)):
    return gin_utils.load_train_config(files, [*REQUIRED, *bindings])[0]


def refused(files, bindings) -> str:
    with pytest.raises(UsageError) as e:
        gin_utils.load_train_config(files, bindings)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- which one wins ------------------------------------------------------------------------------


def test_macros_reach_the_configuration():
    config = load("DROPOUT_RATE = 0.25", "MESH = {'data': 4}", "PROFILE_STEPS = (2, 3)")
    assert config.data.mixture_or_task_name == "some_task"
    assert config.data.task_feature_lengths == {"inputs": 16, "targets": 8}
    assert config.data.batch_size == 128
    assert (config.train_steps, config.model_dir) == (3, "runs/x")
    assert config.model.dropout_rate == 0.25
    assert config.mesh == {"data": 4}
    assert config.profile_steps == (2, 3)


def test_later_file_wins_and_bindings_win_over_files(elsewhere):
    (elsewhere / "a.gin").write_text("BATCH_SIZE = 10\nT5Config.d_ff = 100\n")
    (elsewhere / "b.gin").write_text("BATCH_SIZE = 20\n")
    assert load(files=(MODEL, RUN, "a.gin", "b.gin")).data.batch_size == 20
    assert load(files=(MODEL, RUN, "b.gin", "a.gin")).data.batch_size == 10
    config = load("BATCH_SIZE = 30", files=(MODEL, RUN, "a.gin", "b.gin"))
    assert config.data.batch_size == 30
    assert config.model.d_ff == 100


def test_later_binding_wins():
    assert load("BATCH_SIZE = 30", "BATCH_SIZE = 40").data.batch_size == 40


def test_parameter_may_be_bound_past_its_macro():
    assert load("T5Config.dropout_rate = 0.1").model.dropout_rate == 0.1


def test_model_and_run_file_in_either_order():
    """They set nothing twice."""
    assert load(files=(MODEL, RUN)) == load(files=(RUN, MODEL))


def test_one_call_leaves_nothing_to_the_next():
    load("BATCH_SIZE = 7")
    assert load().data.batch_size == 128


def test_search_path_is_tried_after_the_working_directory(elsewhere):
    (elsewhere / "here.gin").write_text(f"include '{RUN}'\nBATCH_SIZE = 1\n")
    folder = elsewhere / "folder"
    folder.mkdir()
    (folder / "here.gin").write_text("BATCH_SIZE = 2\n")
    (folder / "there.gin").write_text(f"include '{RUN}'\nBATCH_SIZE = 3\n")
    for file, batch_size in (("here.gin", 1), ("there.gin", 3)):
        config, _ = gin_utils.load_train_config([MODEL, file], REQUIRED, [str(folder)])
        assert config.data.batch_size == batch_size


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        # The name matches nothing.
        ("TRAIN_STEP = 5", "TRAIN_STEP matches nothing; did you mean 'TRAIN_STEPS'"),
        ("T5Config.dmodel = 5", "'dmodel'; did you mean 'd_model'"),
        ("T5Conf.d_model = 5", "'T5Conf'; did you mean 'T5Config'"),
        ("gin.macro.name = 5", "doesn't have a parameter named 'name'"),
        ("BATCH_SIZE = %BATCH", "BATCH must be given: add --gin.BATCH=..."),
        ("TrainConfig.data = @Data()", "No configurable matching reference '@Data()'"),
        # The value is no value.
        ("MODEL_DIR = runs/x", "--gin.MODEL_DIR=\"'runs/x'\""),
        ("MODEL_DIR = runs", "--gin.MODEL_DIR=\"'runs'\""),
        ("MESH = {'data' 4}", "--gin.MESH={'data' 4} is no Python value"),
        ("BATCH_SIZE = ", "--gin.BATCH_SIZE= is no Python value"),
        # The value is not allowed.
        ("BATCH_SIZE = 0", "BATCH_SIZE = 0: must be an integer of at least 1"),
        ("BATCH_SIZE = 'a'", "BATCH_SIZE = 'a': must be"),
        ("TRAIN_STEPS = 2.5", "TRAIN_STEPS = 2.5: must be an integer"),
        ("TASK_FEATURE_LENGTHS = {'inputs': 0}", "TASK_FEATURE_LENGTHS['inputs'] = 0"),
        ("T5Config.dtype = 'float16'", "T5Config.dtype = 'float16': allowed are float32, bfloat16"),
        ("OptimizerConfig.name = 'adafacto'", "did you mean 'adafactor'"),
        ("MODEL_DIR = ''", "MODEL_DIR = '': give a directory"),
        ("MESH = (4, 2)", "MESH = (4, 2): give devices for each axis"),
        ("MESH = {'data': -1}", "MESH = {'data': -1}: give devices for each axis"),
        ("PROFILE_STEPS = 5", "PROFILE_STEPS = 5: give the first and the last step"),
        # The value has another type than its field; gin itself does not care.
        ("NUM_MICROBATCHES = 1.5", "LossConfig.num_microbatches = 1.5: must be int"),
        ("MIXTURE_OR_TASK_NAME = None", "DataConfig.mixture_or_task_name = None: must be str"),
        ("VOCABULARY_FILE = 5", "DataConfig.vocabulary_file = 5: must be str or None"),
        ("DataConfig.pack = 'no'", "DataConfig.pack = 'no': must be bool"),
        ("TrainConfig.model = 3", "TrainConfig.model = 3: must be T5Config"),
        ("Z_LOSS = 'a'", "a value bound for LossConfig has the wrong type"),
    ],
)
def test_bindings_that_are_refused(binding, expected):
    assert expected in refused([MODEL, RUN], [*REQUIRED, binding])


def test_errors_in_a_file_name_it(elsewhere):
    for text, expected in (
        ("T5Config.dmodel = 5\n", "'dmodel'; did you mean 'd_model'"),
        ("\nMODEL_DIR = runs/x\n", "line 2"),
        ("TRAIN_STEP = 5\n", "TRAIN_STEP (in mine.gin) matches nothing"),
    ):
        (elsewhere / "mine.gin").write_text(text)
        message = refused([MODEL, RUN, "mine.gin"], REQUIRED)
        assert "mine.gin" in message
        assert expected in message


def test_missing_file_names_the_nearest():
    message = refused(["gin_configs/models/t5_1_1/tini.gin", RUN], REQUIRED)
    assert "'gin_configs/models/t5_1_1/tini.gin' is not there" in message
    assert f"did you mean '{MODEL}'" in message


def test_missing_include_names_both_files(elsewhere):
    (elsewhere / "mine.gin").write_text("include 'gin_configs/runs/pretrian.gin'\n")
    message = refused([MODEL, "mine.gin"], REQUIRED)
    assert "'gin_configs/runs/pretrian.gin' (included by mine.gin) is not there" in message
    assert f"did you mean '{RUN}'" in message
    (elsewhere / "outer.gin").write_text("include 'mine.gin'\n")
    assert "pretrian.gin" in refused([MODEL, "outer.gin"], REQUIRED)


def test_missing_macros_are_all_named():
    message = refused([MODEL, RUN], REQUIRED[:2])
    assert message.startswith("MODEL_DIR, TRAIN_STEPS must be given")
    assert "--gin.MODEL_DIR=... --gin.TRAIN_STEPS=..." in message


def test_file_that_takes_a_required_macro_back_is_refused(elsewhere):
    """Both files and the macro are named, and the order that works."""
    message = refused([MODEL, DOCS, RUN], [])
    assert f"{RUN} sets MIXTURE_OR_TASK_NAME back to %gin.REQUIRED, which {DOCS} had" in message
    assert f"put --gin_file={RUN} before --gin_file={DOCS}" in message
    gin_utils.load_train_config([MODEL, RUN, DOCS], [])

    (elsewhere / "mine.gin").write_text("TRAIN_STEPS = 5\n")
    message = refused(["mine.gin", MODEL, RUN], REQUIRED)
    assert "TRAIN_STEPS" in message and "mine.gin" in message and RUN in message


@pytest.mark.parametrize(
    ("files", "bindings", "expected"),
    [
        ([MODEL], [], "TrainConfig.model_dir"),
        ([MODEL], ["TrainConfig.data = @DataConfig()"], "DataConfig.batch_size"),
    ],
)
def test_without_a_run_file(files, bindings, expected):
    message = refused(files, bindings)
    assert message.startswith("no gin file binds ")
    assert expected in message and "--gin_file=gin_configs/runs/pretrain.gin" in message


# ---- repeating a run -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bindings",
    [
        [],
        ["MESH = {'data': 4, 'model': 2}", "PROFILE_STEPS = (5, 7)", "CHECKPOINT_KEEP = 3"],
        ["MODEL_DIR = 'it\\'s \"quoted\" \\\\ 100%DONE # no comment'"],
        [f"MODEL_DIR = '{'a long name with blanks ' * 10}'"],
        [f"TASK_FEATURE_LENGTHS = {{'inputs': 16, 'targets': 8, '{'long' * 30}': 7}}"],
        ["OptimizerConfig.learning_rate = 1e-30", "LOSS_NORMALIZING_FACTOR = 233472"],
        ["LOSS_NORMALIZING_FACTOR = None", "T5Config.mlp_activations = ('relu',)"],
    ],
)
def test_saved_text_makes_the_same_configuration(elsewhere, bindings):
    config, text = gin_utils.load_train_config([MODEL, RUN], [*REQUIRED, *bindings])
    (elsewhere / "config.gin").write_text(text)
    assert gin_utils.read_saved(elsewhere / "config.gin") == config
    # Nothing is left to defaults, which another version may change.
    for field in ("OptimizerConfig.decay_rate", "DataConfig.pack", "T5Config.remat_policy"):
        assert f"\n{field} = " in text


# ---- flags ---------------------------------------------------------------------------------------


def test_gin_flags_are_taken_out_of_the_arguments():
    argv = ["--gin_file=a.gin", "--gin.X='a=b'", "--dry_run", "--gin.A.b={'c': 1}"]
    bindings, rest = gin_utils.split_gin_flags(argv)
    assert bindings == ["X = 'a=b'", "A.b = {'c': 1}"]
    assert rest == ["--gin_file=a.gin", "--dry_run"]


@pytest.mark.parametrize("argument", ["--gin.X", "--gin.=3", "--gin."])
def test_gin_flag_without_name_or_value(argument):
    with pytest.raises(UsageError, match="write --gin"):
        gin_utils.split_gin_flags([argument])
