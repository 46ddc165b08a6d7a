"""Optimizers and learning-rate schedules: Adafactor as T5 uses it, AdamW, and their logical axes.

Everything here is a pair of pure functions (`optax.GradientTransformation`) over plain nested
dicts. Beside the parameters goes a tree of the same structure whose leaves are tuples of logical
axis names, `("layers", "embed", "mlp")`. A parameter whose first axis is "layers" is a stack: each
slice along that axis is treated as a parameter of its own.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite.errors import UsageError, nearest

PyTree = Any
Axes = tuple[str, ...]

OPTIMIZERS = ("adafactor", "adamw")
SCHEDULES = ("inverse_sqrt", "constant", "linear", "cosine")
FACTORINGS = ("both_sides", "t5x_scanned")
LAYERS = "layers"
EMBED = "embed"

_T5_WARMUP_STEPS = 10_000
# Added to squared gradients, and the smallest parameter scale: epsilon 1 and 2 of the paper.
_EPSILON1 = 1e-30
_EPSILON2 = 1e-3


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer and which schedule. The defaults are T5's pre-training.

    Attributes:
      name: 'adafactor' or 'adamw'.
      schedule: 'inverse_sqrt', 'constant', 'linear' or 'cosine' (see `make_schedule`).
      learning_rate: the rate the schedule scales. Adafactor's is relative to each parameter's
        root mean square; AdamW's is absolute. T5 pre-trains with 1.0 under inverse_sqrt (0.01 for
        the first 10,000 steps) and fine-tunes with a constant 0.001.
      warmup_steps: length of the warm-up; None is 10,000 for inverse_sqrt and 0 for the others.
      total_steps: the step at which linear and cosine reach `final_learning_rate`.
      final_learning_rate: where linear and cosine end.
      weight_decay: for AdamW multiplied by the learning rate and applied to the leaves called
        "kernel" (Loshchilov and Hutter 2019). For Adafactor, as in T5X, the plain fraction by
        which every parameter shrinks at each step, whatever the rate.
      clip_global_norm: gradients are scaled down to this L2 norm over all parameters; None: never.
      b1, b2, eps: AdamW's decay rates and denominator term.
      decay_rate: Adafactor's second moments decay by 1 - (step + 1) ** -decay_rate.
      clipping_threshold: Adafactor scales updates down to this root mean square.
      min_dim_size_to_factor: Adafactor factors a matrix if both sides are at least this long.
      factoring: which of Adafactor's second moments are factored. 'both_sides': every matrix with
        two sides of min_dim_size_to_factor, as T5X does with layers that are not scanned.
        't5x_scanned': within a stack of layers every matrix with a side "embed" (d_model), however
        small, and none else; outside of stacks as before. That is what T5X's
        `standard_logical_factor_rules` make of its scanned network (t5x/adafactor.py), so
        a state from such a checkpoint continues as it would there.

    Raises:
      UsageError: a name is unknown or a number out of range.
    """

    name: str = "adafactor"
    schedule: str = "inverse_sqrt"
    learning_rate: float = 1.0
    warmup_steps: int | None = None
    total_steps: int | None = None
    final_learning_rate: float = 0.0
    weight_decay: float = 0.0
    clip_global_norm: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    decay_rate: float = 0.8
    clipping_threshold: float = 1.0
    min_dim_size_to_factor: int = 128
    factoring: str = "both_sides"

    def __post_init__(self) -> None:
        choices = {"name": OPTIMIZERS, "schedule": SCHEDULES, "factoring": FACTORINGS}
        for choice, known in choices.items():
            value = getattr(self, choice)
            if value not in known:
                raise UsageError(
                    f"OptimizerConfig.{choice} = {value!r} is unknown; {nearest(str(value), known)}"
                )
        for field in dataclasses.fields(self):
            if field.name in choices:
                continue
            value, optional = getattr(self, field.name), field.default is None
            is_number = isinstance(value, int | float) and math.isfinite(value)
            allowed = "a finite number or None" if optional else "a finite number"
            self._check(field.name, is_number or (optional and value is None), allowed)
        self._check("learning_rate", self.learning_rate > 0, "greater than 0")
        self._check("final_learning_rate", self.final_learning_rate >= 0, "0 or more")
        self._check("weight_decay", 0 <= self.weight_decay < 1, "from 0 to below 1")
        self._check(
            "clip_global_norm",
            self.clip_global_norm is None or self.clip_global_norm > 0,
            "None or greater than 0",
        )
        self._check("b1", 0 <= self.b1 < 1, "from 0 to below 1")
        self._check("b2", 0 <= self.b2 < 1, "from 0 to below 1")
        self._check("eps", self.eps > 0, "greater than 0")
        self._check("decay_rate", self.decay_rate > 0, "greater than 0")
        self._check("clipping_threshold", self.clipping_threshold > 0, "greater than 0")
        self._check("min_dim_size_to_factor", self.min_dim_size_to_factor > 0, "1 or more")
        lowest = 1 if self.schedule == "inverse_sqrt" else 0
        self._check(
            "warmup_steps",
            self.warmup_steps is None or self.warmup_steps >= lowest,
            f"{lowest} or more with schedule {self.schedule!r}",
        )
        if self.schedule in ("linear", "cosine"):
            warmup_steps = self.warmup_steps or 0
            self._check(
                "total_steps",
                self.total_steps is not None and self.total_steps > warmup_steps,
                f"more than warmup_steps ({warmup_steps}) with schedule {self.schedule!r}: "
                "the step at which the rate has decayed, usually TRAIN_STEPS",
            )

    def _check(self, field: str, holds: bool, allowed: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise UsageError(f"OptimizerConfig.{field} = {value!r} must be {allowed}")


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the optimizer step before the update, from 0.

    - inverse_sqrt: learning_rate / sqrt(max(step, warmup_steps)), level during the warm-up
      (Raffel et al. 2020, section 3.1.2; T5X's "constant * rsqrt_decay").
    - The others rise linearly from 0 at step 0 to learning_rate at step warmup_steps, then
      constant stays, linear and cosine (half a period, Loshchilov and Hutter 2017, section 3)
      fall to final_learning_rate at step total_steps and stay there.

    Returns:
      A function from an integer, or an integer array of shape [], to an f32 array of shape [].
    """
    peak, final = config.learning_rate, config.final_learning_rate
    if config.schedule == "inverse_sqrt":
        level_until = _T5_WARMUP_STEPS if config.warmup_steps is None else config.warmup_steps

        def inverse_sqrt(step: jax.typing.ArrayLike) -> jax.Array:
            step = jnp.maximum(jnp.asarray(step, jnp.float32), level_until)
            return peak / jnp.sqrt(step)

        return inverse_sqrt

    warmup_steps = config.warmup_steps or 0
    decay_steps = (config.total_steps or 0) - warmup_steps

    def warmup_then_decay(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = peak * step / max(warmup_steps, 1)
        if config.schedule == "constant":
            falling = jnp.full_like(step, peak)
        else:
            fraction = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
            if config.schedule == "cosine":
                fraction = 0.5 * (1.0 - jnp.cos(math.pi * fraction))
            falling = peak + (final - peak) * fraction
        return jnp.where(step < warmup_steps, rising, falling)

    return warmup_then_decay


def make_optimizer(config: OptimizerConfig, logical_axes: PyTree) -> optax.GradientTransformation:
    """The optimizer of `config`, for parameters with the given logical axes.

    Args:
      config: which optimizer, schedule, decay and clipping.
      logical_axes: the parameters' tree with a tuple of axis names in place of each array.
    """
    learning_rate = make_schedule(config)
    if config.name == "adafactor":
        optimizer = adafactor(
            learning_rate,
            layer_axes=logical_axes,
            decay_rate=config.decay_rate,
            clipping_threshold=config.clipping_threshold,
            min_dim_size_to_factor=config.min_dim_size_to_factor,
            weight_decay=config.weight_decay,
            factoring=config.factoring,
        )
    else:
        optimizer = optax.adamw(
            learning_rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=weight_decay_mask(logical_axes),
        )
    if config.clip_global_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_global_norm), optimizer)


def weight_decay_mask(logical_axes: PyTree) -> PyTree:
    """True for matrices ("kernel"), False for norm scales, embeddings and position biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _name(path[-1]) == "kernel", logical_axes, is_leaf=_is_axes
    )


class AdafactorState(NamedTuple):
    """Adafactor's statistics, all f32; each tree has the parameters' structure.

    A factored parameter [*batch, rows, columns] has `v_row` [*batch, rows] and `v_col`
    [*batch, columns]; any other has `v` of its own shape. The slots not in use hold a scalar zero,
    so an array's rank tells whether it is used. T5X names the two factors by size rather than by
    place: its `v_row` belongs to the shorter side.
    """

    count: jax.Array  # type: ignore[assignment]  # int32 scalar: the number of updates made
    v_row: PyTree
    v_col: PyTree
    v: PyTree


def adafactor(
    learning_rate: optax.Schedule,
    *,
    layer_axes: PyTree,
    decay_rate: float = 0.8,
    clipping_threshold: float = 1.0,
    min_dim_size_to_factor: int = 128,
    weight_decay: float = 0.0,
    factoring: str = "both_sides",
) -> optax.GradientTransformation:
    """Adafactor without momentum, one layer at a time (Shazeer and Stern 2018, algorithm 4).

    It does what T5X's Adafactor does: second moments factored into rows and columns, updates
    clipped by their root mean square and scaled by the parameter's (at least 1e-3). For a stack of
    layers each of these is taken within a layer.

    Args:
      learning_rate: relative rate as a function of the number of updates made before this one.
      layer_axes: the parameters' tree with a tuple of logical axis names in place of each array;
        one that begins with "layers" marks a stack.
      decay_rate: second moments decay by 1 - (step + 1) ** -decay_rate.
      clipping_threshold: the largest root mean square of an update before scaling.
      min_dim_size_to_factor: a layer's second moments are factored over its last two axes if both
        are at least this long.
      weight_decay: the fraction of each parameter taken away at each step.
      factoring: 'both_sides' or 't5x_scanned', see `OptimizerConfig`.

    Returns:
      A transformation whose updates are f32 and whose state is `AdafactorState`. Its `init` raises
      ValueError if an array's rank differs from the number of its axis names.
    """
    axes_structure: Any
    axes_leaves, axes_structure = jax.tree.flatten(layer_axes, is_leaf=_is_axes)

    def init(params: PyTree) -> AdafactorState:
        slots = [
            _init_slots(path, param.shape, axes, min_dim_size_to_factor, factoring)
            for (path, param), axes in zip(
                jax.tree_util.tree_leaves_with_path(params), axes_leaves, strict=True
            )
        ]
        trees = (axes_structure.unflatten(column) for column in zip(*slots, strict=True))
        return AdafactorState(jnp.zeros((), jnp.int32), *trees)

    def update(
        grads: PyTree, state: AdafactorState, params: PyTree | None = None
    ) -> tuple[PyTree, AdafactorState]:
        if params is None:
            raise ValueError("adafactor scales its updates by the parameters: pass them to update")
        rate = learning_rate(state.count)
        # The weight of the new gradient, (step + 1) ** -decay_rate: at the first step, 1.
        mix = (state.count.astype(jnp.float32) + 1.0) ** -decay_rate

        def update_leaf(
            axes: Axes, grad: jax.Array, param: jax.Array, *old_slots: jax.Array
        ) -> tuple[jax.Array, ...]:
            grad, param = grad.astype(jnp.float32), param.astype(jnp.float32)
            within_layer = tuple(range(_is_stacked(axes), grad.ndim))
            step, *slots = _normalize(grad, mix, *old_slots)
            step_rms = _rms(step, within_layer)
            param_scale = jnp.maximum(_rms(param, within_layer), _EPSILON2)
            scale = rate * param_scale / jnp.maximum(1.0, step_rms / clipping_threshold)
            return -scale * step - weight_decay * param, *slots

        leaves = [
            axes_structure.flatten_up_to(tree)
            for tree in (grads, params, state.v_row, state.v_col, state.v)
        ]
        columns = zip(*map(update_leaf, axes_leaves, *leaves), strict=True)
        updates, *slots = (axes_structure.unflatten(column) for column in columns)
        return updates, AdafactorState(optax.safe_increment(state.count), *slots)

    return optax.GradientTransformation(init, update)


def _init_slots(
    path: tuple[Any, ...],
    shape: tuple[int, ...],
    axes: Axes,
    min_dim_size_to_factor: int,
    factoring: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v_row, v_col and v of one parameter: zeros, and scalars where not in use."""
    if len(shape) != len(axes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(f"{name} has shape {shape} but logical axes {axes}")
    layer_shape = shape[_is_stacked(axes) :]
    is_factored = len(layer_shape) >= 2 and min(layer_shape[-2:]) >= min_dim_size_to_factor
    if factoring == "t5x_scanned" and _is_stacked(axes):
        is_factored = len(layer_shape) >= 2 and EMBED in axes[-2:]
    shapes: tuple[tuple[int, ...], ...] = ((), (), shape)
    if is_factored:
        shapes = (shape[:-1], shape[:-2] + shape[-1:], ())
    v_row, v_col, v = (jnp.zeros(s, jnp.float32) for s in shapes)
    return v_row, v_col, v


def _normalize(
    grad: jax.Array, mix: jax.Array, v_row: jax.Array, v_col: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradient over the root of its second moment, and v_row, v_col and v with it mixed in."""
    grad_squared = jnp.square(grad) + _EPSILON1
    if v_row.ndim == 0:  # not factored
        v = (1.0 - mix) * v + mix * grad_squared
        return grad * jax.lax.rsqrt(v), v_row, v_col, v
    v_row = (1.0 - mix) * v_row + mix * jnp.mean(grad_squared, axis=-1)
    v_col = (1.0 - mix) * v_col + mix * jnp.mean(grad_squared, axis=-2)
    row_factor = jax.lax.rsqrt(v_row / jnp.mean(v_row, axis=-1, keepdims=True))
    col_factor = jax.lax.rsqrt(v_col)
    return grad * row_factor[..., :, None] * col_factor[..., None, :], v_row, v_col, v


def optimizer_state_axes(state: PyTree, logical_axes: PyTree) -> PyTree:
    """Logical axes of every array of a state made by an optimizer of this module.

    A state array belongs to the parameter whose path ends its own, and the field before that path
    says how its axes follow from the parameter's: `v_row` lacks the last, `v_col` the second last,
    `v`, `mu` and `nu` have them all. Scalars (counts, slots not in use) have none.

    Args:
      state: an optimizer state of arrays or `jax.ShapeDtypeStruct`.
      logical_axes: the parameters' tree with a tuple of axis names in place of each array.

    Returns:
      The tree of `state` with a tuple of axis names in place of each array.

    Raises:
      ValueError: an array belongs to no parameter, or its rank does not fit.
    """
    axes_of = {
        tuple(_name(key) for key in path): axes
        for path, axes in jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=_is_axes)
    }

    def leaf_axes(path: tuple[Any, ...], leaf: Any) -> Axes:
        if leaf.ndim == 0:
            return ()
        # Parameters are nested dicts, so the last attribute on the path is the state's own field.
        last = max(
            (i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)),
            default=-1,
        )
        field = _name(path[last]) if last >= 0 else None
        axes = axes_of.get(tuple(_name(key) for key in path[last + 1 :]))
        if axes is not None and field == "v_row":
            axes = axes[:-1]
        elif axes is not None and field == "v_col":
            axes = axes[:-2] + axes[-1:]
        elif field not in ("v", "mu", "nu"):
            axes = None
        if axes is None or len(axes) != leaf.ndim:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"no logical axes for optimizer state {name} of shape {leaf.shape}")
        return axes

    return jax.tree_util.tree_map_with_path(leaf_axes, state)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


def _is_stacked(axes: Axes) -> bool:
    return axes[:1] == (LAYERS,)


def _name(key: Any) -> str:
    """The name in one entry of a key path: a dict's key or an attribute."""
    return str(getattr(key, "key", getattr(key, "name", key)))


def _rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))
