"""Operations against closed forms, and against the compiler's own count of an unrolled program."""

import dataclasses
from typing import Any

import jax
import pytest

from t5x_lite import setup
from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import OptimizerConfig
from t5x_lite.plan.flops import matrix_product_flops, model_flops
from t5x_lite.plan.hlo import parse_module
from t5x_lite.plan.work import work_of
from t5x_lite.run_config import DataConfig, TrainConfig
from t5x_lite.step import LossConfig

MODEL = T5Config(
    vocab_size=512,
    d_model=128,
    d_ff=512,
    d_kv=32,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    scan_layers=False,
)
BATCH, INPUTS, TARGETS = 8, 64, 32


def _compile(num_microbatches: int = 1, **changes: Any) -> Any:
    config = TrainConfig(
        model_dir="unused",
        model=dataclasses.replace(MODEL, **changes),
        optimizer=OptimizerConfig(),
        loss=LossConfig(num_microbatches=num_microbatches),
        data=DataConfig("unused", {"inputs": INPUTS, "targets": TARGETS}, BATCH),
        train_steps=1,
    )
    programs = setup.make_programs(config, compile_train_step=False)
    train_step: Any = programs.train_step
    key = jax.eval_shape(lambda: jax.random.key(0))
    return train_step.lower(programs.abstract_state, setup.batch_shapes(config), key).compile()


def _bias_gradient_flops() -> int:
    """`models.layers.repeat_rows` sums the bias's gradient over the batch by a product with ones,
    which is no part of a model's operations."""
    return 2 * BATCH * MODEL.num_heads * 2 * (INPUTS**2 + TARGETS**2)


@pytest.fixture(scope="module")
def unrolled() -> Any:
    """No loops: the compiler's own count is right."""
    return _compile()


def test_unrolled_program_is_the_closed_form_and_the_compilers_count(unrolled: Any) -> None:
    work = work_of(unrolled.as_text())
    closed_form = model_flops(MODEL, BATCH, INPUTS, TARGETS)
    assert work.flops == closed_form + _bias_gradient_flops()
    analysis = unrolled.cost_analysis()
    # It also counts what is no matrix product, here 3% of all.
    assert 0.96 * analysis["flops"] < work.flops < analysis["flops"]
    assert work.bytes_accessed == pytest.approx(analysis["bytes accessed"], rel=0.01)
    assert not work.transfers


def test_loops_count_as_often_as_they_run(unrolled: Any) -> None:
    """Scanned layers in two microbatches, recomputed: what the compiler's count gets wrong."""
    looped = _compile(num_microbatches=2, scan_layers=True, remat_policy="full")
    work = work_of(looped.as_text())
    assert not work.unknown_loops
    d, width, ff = MODEL.d_model, MODEL.num_heads * MODEL.d_kv, MODEL.d_ff
    # Each layer's forward pass once more, but for its last product: nothing needs its result.
    encoder = 8 * INPUTS * d * width + 4 * INPUTS**2 * width + 4 * INPUTS * d * ff
    decoder = 8 * TARGETS * d * width + 4 * TARGETS**2 * width + 4 * TARGETS * d * ff
    cross = 4 * (TARGETS + INPUTS) * d * width + 4 * TARGETS * INPUTS * width
    again = 2 * BATCH * (encoder + decoder + cross)
    assert work.flops == work_of(unrolled.as_text()).flops + again
    assert looped.cost_analysis()["flops"] < work.flops / 2


def _flops(line: str, *parameters: str) -> int:
    lines = [f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(parameters)]
    module = parse_module("\n".join(["ENTRY %m () -> f32[] {", *lines, f"  ROOT {line}", "}"]))
    computation = module.computations["m"]
    return matrix_product_flops(computation.instructions["x"], computation)


def test_products_as_dots_and_as_convolutions() -> None:
    """The second form of each is what XLA:TPU makes of it."""
    attention = 2 * 3 * 5 * 7 * 11 * 4  # [3, 5, 7, 4] with [3, 5, 11, 4]
    assert attention == _flops(
        "%x = f32[3,5,7,11]{3,2,1,0} dot(%p0, %p1), lhs_batch_dims={0,1}, rhs_batch_dims={0,1}, "
        "lhs_contracting_dims={3}, rhs_contracting_dims={3}",
        "bf16[3,5,7,4]{3,2,1,0}",
        "bf16[3,5,11,4]{3,2,1,0}",
    )
    assert attention == _flops(
        "%x = f32[3,5,7,11]{3,2,1,0} convolution(%p0, %p1), "
        "window={size=3x5 stride=2x4 pad=0_0x0_0 lhs_dilate=3x5}, dim_labels=01bf_01oi->01bf",
        "bf16[3,5,7,4]{3,2,1,0}",
        "bf16[3,5,11,4]{3,2,1,0}",
    )
    assert _flops(
        "%x = bf16[64,384]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf",
        "bf16[64,512]{1,0:T(8,128)(2,1)S(1)}",
        "bf16[512,384]{1,0:T(8,128)(2,1)}",
    ) == 2 * 64 * 512 * 384  # fmt: skip


def test_convolution_counts_no_padding() -> None:
    """A row of 5 and a kernel of 3 with one zero on either side: 13 products meet an element."""
    assert _flops(
        "%x = f32[1,5,1]{2,1,0} convolution(%p0, %p1), window={size=3 pad=1_1}, "
        "dim_labels=b0f_0io->b0f",
        "f32[1,5,1]{2,1,0}",
        "f32[3,1,1]{2,1,0}",
    ) == 2 * 13  # fmt: skip


def test_six_operations_a_parameter_and_token() -> None:
    """The rule of thumb, for a model whose attention is short and whose vocabulary is small."""
    model = dataclasses.replace(MODEL, d_model=1024, d_ff=4096, d_kv=64, num_heads=16, vocab_size=8)
    layers = {"attention": 4 * 1024 * 1024, "mlp": 3 * 1024 * 4096}
    encoder = model.num_encoder_layers * (layers["attention"] + layers["mlp"])
    decoder = model.num_decoder_layers * (2 * layers["attention"] + layers["mlp"])
    tokens = 8
    counted = model_flops(model, 4, tokens, tokens)
    assert counted == pytest.approx(6 * 4 * tokens * (encoder + decoder), rel=0.01)
