"""Floating-point operations: of a program's matrix products, and of a model in closed form.

Matrix products alone are counted, a multiplication and an addition as two: they are what a chip's
published peak is of. Everything else runs on other units at the speed of memory.
"""

import functools
import math
import re

import numpy as np

from t5x_lite.models.config import T5Config
from t5x_lite.plan.hlo import Computation, Instruction

_DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")


def matrix_product_flops(instruction: Instruction, computation: Computation) -> int:
    """Operations of a `dot` or a `convolution`, which is what dots become on a TPU; 0 of others."""
    if instruction.opcode == "dot":
        left = computation.operands(instruction)[0].arrays[0].dims
        contracted = instruction.numbers("lhs_contracting_dims")
        products = math.prod(left[d] for d in contracted)
        return 2 * math.prod(instruction.arrays[0].dims) * products
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    return 0


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    """Products with padding, or with the holes of a dilated array, are not done and not counted."""
    labels = _DIM_LABELS.search(instruction.attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {instruction.attributes[:200]}")
    left, kernel = (operand.arrays[0].dims for operand in computation.operands(instruction)[:2])
    sizes = dict(zip(labels[2], kernel, strict=True))
    window = _WINDOW.search(instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    products = 1
    for spatial in range(len(left) - 2):
        base = left[labels[1].index(str(spatial))]
        out = instruction.arrays[0].dims[labels[3].index(str(spatial))]

        def field(name: str, default: int, spatial: int = spatial) -> int:
            return int(fields[name].split("x")[spatial]) if name in fields else default

        low = fields["pad"].split("x")[spatial].split("_")[0] if "pad" in fields else "0"
        products *= _num_valid(
            base,
            out,
            kernel=field("size", 1),
            stride=field("stride", 1),
            low=int(low),
            base_dilation=field("lhs_dilate", 1),
            window_dilation=field("rhs_dilate", 1),
        )
    batch = left[labels[1].index("b")]
    groups = int(instruction.attribute("batch_group_count") or 1)
    # The kernel's input features are already those of one feature group.
    return 2 * products * sizes["i"] * sizes["o"] * (batch // groups)


@functools.lru_cache(maxsize=4096)
def _num_valid(
    base: int,
    out: int,
    *,
    kernel: int,
    stride: int,
    low: int,
    base_dilation: int,
    window_dilation: int,
) -> int:
    """Pairs of an output place and a kernel place that meet an element of the input."""
    places = np.arange(out)[:, None] * stride - low + np.arange(kernel) * window_dilation
    inside = (places >= 0) & (places % base_dilation == 0) & (places // base_dilation < base)
    return int(inside.sum())


def model_flops(model: T5Config, batch_size: int, input_length: int, target_length: int) -> int:
    """Operations of a training step, as MFU counts them (Chowdhery et al. 2022, appendix B).

    Every matrix product of the forward pass, padding and masked pairs included, and twice as much
    for the backward pass; nothing that is computed again.

    Args:
      model: the architecture.
      batch_size: rows of the global batch.
      input_length: tokens of a row's inputs.
      target_length: tokens of its targets.
    """
    d, width = model.d_model, model.num_heads * model.d_kv
    s, t = input_length, target_length
    num_matrices = len(model.mlp_activations) + 1

    def attention(queries: int, keys: int) -> int:
        projections = 2 * d * width * (queries + keys)
        return 2 * projections + 4 * queries * keys * width

    def mlp(length: int) -> int:
        return 2 * num_matrices * length * d * model.d_ff

    encoder = model.num_encoder_layers * (attention(s, s) + mlp(s))
    decoder = model.num_decoder_layers * (attention(t, t) + attention(t, s) + mlp(t))
    logits = 2 * t * d * model.vocab_size
    return 3 * batch_size * (encoder + decoder + logits)
