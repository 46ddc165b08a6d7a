"""Architectures as frozen dataclasses: plain values that serialise to JSON and hash for jit."""

import dataclasses
from typing import Any

from t5x_lite.errors import UsageError, nearest

ACTIVATIONS = ("gelu", "relu", "silu", "linear")
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The T5 family: 1.0 (ReLU, tied embeddings) and 1.1 (gated GELU, separate output matrix).

    Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer", section 2.1; 1.1 as released with mT5 and Shazeer 2020, "GLU Variants".

    Attributes:
      vocab_size: rows of the embedding; at least the vocabulary's size. T5 pads 32,100 to 32,128.
      d_model: width of the residual stream.
      d_ff: width of the feed-forward layer.
      d_kv: width of one attention head; num_heads * d_kv need not equal d_model.
      num_heads: attention heads.
      num_encoder_layers: layers of the encoder.
      num_decoder_layers: layers of the decoder.
      mlp_activations: one activation, or two for a gated layer: ("gelu", "linear").
      tie_embeddings: use the embedding as output matrix.
      scale_decoder_output: multiply the decoder's output by d_model^-0.5 before the output matrix;
        None: with tied embeddings alone, as T5 does.
      dropout_rate: share of units dropped in training.
      dtype: dtype of the computation. Parameters, norms and softmax are always float32.
      relative_attention_num_buckets: buckets of the relative position bias.
      relative_attention_max_distance: distance from which on all positions share a bucket.
      relative_bias_per_layer: a bias table in every layer, as UMT5 and T5X's scanned network have,
        instead of one for the stack.
      layer_norm_epsilon: added to the mean square before its root.
      scan_layers: one compiled layer in a loop (small programs, short compilation) or all layers
        written out (faster on CPU). The results agree to rounding.
      remat_policy: what the backward pass finds in memory: "none" keeps every activation,
        "dots" the outputs of matrix products with parameters, "full" only the layers' inputs.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_ff: int = 1024
    d_kv: int = 64
    num_heads: int = 6
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    tie_embeddings: bool = False
    scale_decoder_output: bool | None = None
    dropout_rate: float = 0.0
    dtype: str = "float32"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_bias_per_layer: bool = False
    layer_norm_epsilon: float = 1e-6
    scan_layers: bool = True
    remat_policy: str = "none"

    def __post_init__(self) -> None:
        """Raises UsageError on the first field whose value no model can have."""
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in (
            "vocab_size", "d_model", "d_ff", "d_kv", "num_heads",
            "num_encoder_layers", "num_decoder_layers",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"T5Config.{name} = {value!r}: must be an integer of at least 1")
        if not 0 <= self.dropout_rate < 1:
            raise UsageError(f"T5Config.dropout_rate = {self.dropout_rate!r}: must be in [0, 1)")
        if not 1 <= len(self.mlp_activations) <= 2:
            raise UsageError(
                f"T5Config.mlp_activations = {self.mlp_activations!r}: "
                "give one activation, or two for a gated layer"
            )
        for activation in self.mlp_activations:
            _check_choice("mlp_activations", activation, ACTIVATIONS)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("remat_policy", self.remat_policy, REMAT_POLICIES)
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets < 4 or buckets % 4 or distance <= buckets // 2:
            raise UsageError(
                f"T5Config.relative_attention_num_buckets = {buckets!r}, _max_distance = "
                f"{distance!r}: buckets must be a multiple of 4, and the distance more than half "
                "of them"
            )

    @property
    def scales_decoder_output(self) -> bool:
        """Whether logits are those of a decoder's output scaled by d_model^-0.5."""
        if self.scale_decoder_output is None:
            return self.tie_embeddings
        return self.scale_decoder_output

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "T5Config":
        """Raises UsageError if a key is no field of the configuration."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UsageError(f"model.json: unknown field {key!r}; {nearest(key, known)}")
        return cls(**values)


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"T5Config.{field} = {value!r}: allowed are {', '.join(allowed)}")
