"""Every file in gin_configs/ makes a run, of the published size, without an array allocated."""

import math
import pathlib
import re

import jax
import pytest

from t5x_lite import gin_utils, optimizers, setup
from t5x_lite.errors import UsageError

REPO = pathlib.Path(__file__).resolve().parent.parent
MODELS = sorted(p.relative_to(REPO).as_posix() for p in REPO.glob("gin_configs/models/**/*.gin"))
RUNS = {
    "gin_configs/runs/pretrain.gin": [
        "MIXTURE_OR_TASK_NAME = 'c4_v220_span_corruption'",
        "TASK_FEATURE_LENGTHS = {'inputs': 512, 'targets': 114}",
        "TRAIN_STEPS = 524288",
        "MODEL_DIR = 'runs/x'",
    ],
    "gin_configs/runs/finetune.gin": [
        "INITIAL_CHECKPOINT_PATH = 'runs/x'",
        "MIXTURE_OR_TASK_NAME = 'glue_v002_proportional'",
        "TASK_FEATURE_LENGTHS = {'inputs': 512, 'targets': 84}",
        "TRAIN_STEPS = 262144",
        "MODEL_DIR = 'runs/y'",
    ],
    "gin_configs/runs/python_docs.gin": [],
    "gin_configs/runs/python_docs_finetune.gin": [],
    "gin_configs/runs/sst2.gin": [],
}
PUBLISHED = {
    "t5_1_0/small": 60_506_624,
    "t5_1_0/base": 222_903_552,
    "t5_1_0/large": 737_668_096,
    "t5_1_0/xl": 2_851_598_336,
    "t5_1_0/xxl": 11_307_321_344,
    "t5_1_1/small": 76_961_152,
    "t5_1_1/base": 247_577_856,
    "t5_1_1/large": 783_150_080,
    "t5_1_1/xl": 2_849_757_184,
    "t5_1_1/xxl": 11_135_332_352,
}


def make(model: str, run: str, *bindings: str):
    config, _ = gin_utils.load_train_config([model, run], [*RUNS[run], *bindings])
    before = jax.live_arrays()  # held, so that none of another test's goes meanwhile
    programs = setup.make_programs(config, compile_train_step=False)
    assert len(jax.live_arrays()) == len(before)
    return config, programs.abstract_state


def num_elements(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_every_run_file_is_tested():
    assert {p.relative_to(REPO).as_posix() for p in REPO.glob("gin_configs/runs/*.gin")} == set(
        RUNS
    )
    files = {p.relative_to(REPO).as_posix() for p in REPO.rglob("gin_configs/**/*.gin")}
    assert files == {*MODELS, *RUNS}
    assert {f"gin_configs/models/{name}.gin" for name in PUBLISHED} <= set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_model(model):
    config, state = make(model, "gin_configs/runs/pretrain.gin")
    name = model.removeprefix("gin_configs/models/").removesuffix(".gin")
    if name in PUBLISHED:
        assert num_elements(state.params) == PUBLISHED[name]
        heading = (REPO / model).read_text().splitlines()[0]
        assert f" {PUBLISHED[name]:,} parameters" in heading
    assert config.model.vocab_size == 32128
    assert config.model.tie_embeddings == name.startswith("t5_1_0/")
    assert len(config.model.mlp_activations) == (1 if name.startswith("t5_1_0/") else 2)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} == {"float32"}
    # Adafactor's factored statistics are small beside the parameters.
    assert 0 < num_elements(state.opt_state) < 0.02 * num_elements(state.params)


@pytest.mark.parametrize("run", [run for run, bindings in RUNS.items() if not bindings])
@pytest.mark.parametrize("model", [model for model in MODELS if model.endswith("/tiny.gin")])
def test_run_file_that_needs_nothing_more(model, run):
    """As its own heading says, and with room for the ids of its vocabulary."""
    config, state = make(model, run)
    vocab_size = 4096 if "python_docs" in run else 32128
    assert state.params["token_embedder"]["embedding"].shape[0] == vocab_size
    assert config.train_steps > 0


def test_finetuning_is_t5s():
    """Raffel et al. 2020, section 3.1.2 (the rate) and 3.1.1 (dropout)."""
    config, _ = make("gin_configs/models/t5_1_1/base.gin", "gin_configs/runs/finetune.gin")
    rate = optimizers.make_schedule(config.optimizer)
    assert [float(rate(step)) for step in (0, 1000, 262144)] == [pytest.approx(1e-3)] * 3
    assert config.model.dropout_rate == 0.1


def test_finetuning_needs_a_checkpoint():
    run = "gin_configs/runs/finetune.gin"
    bindings = [b for b in RUNS[run] if not b.startswith("INITIAL")]
    with pytest.raises(UsageError, match="INITIAL_CHECKPOINT_PATH must be given"):
        gin_utils.load_train_config(["gin_configs/models/t5_1_1/base.gin", run], bindings)


def test_adamw_holds_two_moments_of_every_parameter():
    model, run = "gin_configs/models/t5_1_1/xxl.gin", "gin_configs/runs/pretrain.gin"
    _, state = make(model, run, "OptimizerConfig.name = 'adamw'")
    num_moments = num_elements([leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim])
    assert num_moments == 2 * PUBLISHED["t5_1_1/xxl"]


@pytest.mark.parametrize("file", [*MODELS, *RUNS])
def test_includes_are_one_level_deep(file):
    """So that a reader opens two files at most."""
    for included in re.findall(r"^include '(.+)'", (REPO / file).read_text(), re.MULTILINE):
        assert "include '" not in (REPO / included).read_text()
