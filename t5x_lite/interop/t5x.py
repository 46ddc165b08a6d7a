"""T5X's names and layouts of a T5: which configuration they mean, and where our tensors are.

T5X has two networks. `t5x/examples/t5` keeps layers apart: "encoder/layers_0/...", attention
kernels [d_model, heads x d_kv]. `t5x/examples/scalable_t5` scans them: "encoder/encoder/..." stacks
all layers on axis 1, attention kernels are [d_model, layers, heads, d_kv], the output ones
[heads, layers, d_kv, d_model], and every layer has a bias table of its own. With scanning switched
off it keeps layers apart, its attention kernels being [d_model, heads, d_kv].
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from t5x_lite.errors import UsageError, nearest
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config

Shape = tuple[int, ...]

# Flax's names of activations, which T5X uses. Its "gelu" is the tanh approximation, as ours.
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "linear": "linear"}

# Fields of T5X's T5Config that the shapes determine, and ours that must then agree.
_CHECKED_FIELDS = {
    "vocab_size": "vocab_size",
    "emb_dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_encoder_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
    "logits_via_embedding": "tie_embeddings",
}
# Those that are read of it; the others concern T5X alone.
GIN_FIELDS = (*_CHECKED_FIELDS, "dropout_rate", "mlp_activations")
_NUM_NAMES_SHOWN = 3


def config_from_t5x(shapes: Mapping[str, Shape], gin_values: Mapping[str, Any]) -> T5Config:
    """The architecture of a checkpoint: from its shapes what they tell, else from T5X's gin.

    What neither tells is as T5 has it: GELU if gated, else ReLU; 32 buckets up to distance 128.

    Args:
      shapes: of the parameters by T5X's names, without "target/".
      gin_values: some of `GIN_FIELDS`, which are fields of T5X's T5Config; may be empty.

    Raises:
      UsageError: the tensors are not those of an encoder-decoder T5, or disagree with each other
        or with `gin_values`.
    """
    scanned = is_scanned(shapes)

    def shape_of(name: str, rank: int | None = None) -> Shape:
        if name not in shapes:
            raise UsageError(
                f"not a T5 that is known here: there is no {name}; the tensors are {_some(shapes)}"
            )
        shape = shapes[name]
        if (rank is not None and len(shape) != rank) or math.prod(shape) < 1:
            raise UsageError(f"{name} has the shape {list(shape)}, which no T5 has")
        return shape

    def num_layers(stack: str) -> int:
        if scanned:
            return shape_of(f"{stack}/{stack}/pre_mlp_layer_norm/scale", rank=2)[1]
        shape_of(f"{stack}/layers_0/pre_mlp_layer_norm/scale")
        pattern = re.compile(rf"{stack}/layers_(\d+)/")
        # As many as there are; if their numbers are others, a name is unknown and one is missing.
        return len({match[1] for name in shapes if (match := pattern.match(name))})

    vocab_size, d_model = shape_of("token_embedder/embedding", rank=2)
    num_encoder_layers, num_decoder_layers = num_layers("encoder"), num_layers("decoder")
    layer = "encoder/encoder" if scanned else "encoder/layers_0"
    per_layer = f"{layer}/relpos_bias/rel_embedding" in shapes
    place = layer if per_layer else "encoder"
    num_heads, *_, num_buckets = shape_of(f"{place}/relpos_bias/rel_embedding", 2 + scanned)
    query = shape_of(f"{layer}/attention/query/kernel")
    width = math.prod(query) // (query[0] * (num_encoder_layers if scanned else 1))
    if width % num_heads:
        raise UsageError(
            f"{layer}/attention/query/kernel {list(query)} does not divide among the "
            f"{num_heads} heads of {place}/relpos_bias/rel_embedding"
        )
    gated = f"{layer}/mlp/wi_0/kernel" in shapes
    config = T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=shape_of(f"{layer}/mlp/{'wi_0' if gated else 'wi'}/kernel")[-1],
        d_kv=width // num_heads,
        num_heads=num_heads,
        num_encoder_layers=num_encoder_layers,
        num_decoder_layers=num_decoder_layers,
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        tie_embeddings="decoder/logits_dense/kernel" not in shapes,
        relative_attention_num_buckets=num_buckets,
        relative_bias_per_layer=per_layer,
    )
    _check_shapes(config, shapes)
    return _with_gin_values(config, gin_values)


def is_scanned(shapes: Mapping[str, Any]) -> bool:
    """Whether the names are those of T5X's scanned network."""
    return any(name.startswith(("encoder/encoder/", "decoder/decoder/")) for name in shapes)


@functools.cache
def our_shapes(config: T5Config) -> dict[str, Shape]:
    """Every parameter of our tree by path: "encoder/layers/mlp/wo/kernel" -> its shape."""
    tree = jax.eval_shape(lambda: t5.init(config, jax.random.key(0)))
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of our tree as "encoder/layers/mlp/wo/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def t5x_names(path: str, shape: Shape, scanned: bool) -> list[str]:
    """T5X's names of one of our parameters: as many as layers if it keeps layers apart, else one.

    Args:
      path: "encoder/layers/mlp/wo/kernel".
      shape: of our parameter.
      scanned: whether T5X stacks layers.
    """
    stack, _, rest = path.partition("/layers/")
    if not rest:
        return [path]
    if scanned:
        return [f"{stack}/{stack}/{rest}"]
    return [f"{stack}/layers_{i}/{rest}" for i in range(shape[0])]


def _with_gin_values(config: T5Config, values: Mapping[str, Any]) -> T5Config:
    for theirs, ours in _CHECKED_FIELDS.items():
        if theirs in values and values[theirs] != getattr(config, ours):
            raise UsageError(
                f"config.gin says T5Config.{theirs} = {values[theirs]!r}, but by the shapes of the "
                f"tensors it is {getattr(config, ours)!r}"
            )
    changes: dict[str, Any] = {}
    if "dropout_rate" in values:
        rate = values["dropout_rate"]
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise UsageError(f"config.gin: T5Config.dropout_rate = {rate!r}: must be a number")
        changes["dropout_rate"] = rate
    if "mlp_activations" in values:
        changes["mlp_activations"] = _activations(
            values["mlp_activations"], len(config.mlp_activations)
        )
    return dataclasses.replace(config, **changes)


def _activations(given: Any, count: int) -> tuple[str, ...]:
    """Our names of `count` of T5X's activations."""
    binding = f"config.gin: T5Config.mlp_activations = {given!r}"
    if not isinstance(given, tuple | list):
        raise UsageError(f"{binding}: must be a tuple of names, ('relu',) or ('gelu', 'linear')")
    for name in given:
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise UsageError(f"{binding}: {name!r} is unknown; {nearest(str(name), _ACTIVATIONS)}")
    if len(given) != count:
        raise UsageError(f"{binding}, but the tensors are those of {count}")
    return tuple(_ACTIVATIONS[name] for name in given)


def _check_shapes(config: T5Config, shapes: Mapping[str, Shape]) -> None:
    """Raises UsageError on the first tensor that is unknown, absent or of another shape."""
    scanned = is_scanned(shapes)
    expected: dict[str, set[Shape]] = {}
    for path, shape in our_shapes(config).items():
        for name in t5x_names(path, shape, scanned):
            expected[name] = set(_stored_shapes(path, shape, config, scanned))
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise UsageError(f"not a T5 that is known here: it has {_some(unknown)}")
    if missing := sorted(expected.keys() - shapes.keys()):
        raise UsageError(f"the checkpoint has no {_some(missing)}")
    for name, allowed in expected.items():
        if shapes[name] not in allowed:
            raise UsageError(
                f"{name} has the shape {list(shapes[name])}, but by the other tensors it is "
                f"{' or '.join(str(list(shape)) for shape in sorted(allowed))}"
            )


def _stored_shapes(path: str, shape: Shape, config: T5Config, scanned: bool) -> Iterator[Shape]:
    """How T5X may have one of our parameters, one layer of it if it keeps layers apart."""
    if "/layers/" not in path:
        yield shape
        return
    num_layers, *layer = shape
    if "attention/" in path:
        heads = (config.num_heads, config.d_kv)
        is_out = path.endswith("/out/kernel")
        apart = (*heads, config.d_model) if is_out else (config.d_model, *heads)
        yield (apart[0], num_layers, *apart[1:]) if scanned else apart
        if scanned:
            return
    yield (layer[0], num_layers, *layer[1:]) if scanned else tuple(layer)


def _some(names: Mapping[str, Any] | list[str]) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    text = ", ".join(names[:_NUM_NAMES_SHOWN])
    more = len(names) - _NUM_NAMES_SHOWN
    return f"{text} and {more} more" if more > 0 else text
