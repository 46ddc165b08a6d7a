"""Tensors that are read a part at a time, so that a model need not fit into memory."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array of our tree that some file holds, perhaps in pieces and in another layout.

    Attributes:
      shape: of the whole, as our tree has it: [layers, d_model, heads x d_kv] of a stacked kernel.
      read: (start, stop) -> the rows [start, stop) of the leading axis, contiguous, in `dtype`;
        `read(0, 1)` gives a scalar's value as shape [].
      dtype: of what `read` gives.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class SavedOptimizer:
    """An optimizer's state that came with a checkpoint.

    Attributes:
      config: what makes an optimizer with a state of this structure.
      state: the tree of that state, `make_optimizer(config, axes).init(params)`, with a `Tensor` in
        place of each array.
    """

    config: OptimizerConfig
    state: Any


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint of another program, described and not yet read.

    Attributes:
      model: the architecture.
      params: every parameter by its path in our tree, "encoder/layers/mlp/wo/kernel".
      step: training steps made; 0 if the program does not say.
      optimizer: None if there is none, or none that maps.
      origin: what `model.json` keeps as "converted_from": JSON values under "format", "path", ...
    """

    model: T5Config
    params: Mapping[str, Tensor]
    step: int
    optimizer: SavedOptimizer | None
    origin: Mapping[str, Any]
