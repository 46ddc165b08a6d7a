"""Where activations lie on the devices: a model names their axes, its caller says what that means.

Without a caller's word the compiler decides, and on one device there is nothing to decide.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax import Array

# (array, its logical axes) -> the array, lying as they say.
Constrain = Callable[[Array, tuple[str | None, ...]], Array]

_constrain: ContextVar[Constrain | None] = ContextVar("constrain", default=None)


@contextlib.contextmanager
def laid_out_by(constrain: Constrain) -> Iterator[None]:
    """While a model is traced: `constrain` is applied to the activations that it names."""
    token = _constrain.set(constrain)
    try:
        yield
    finally:
        _constrain.reset(token)


def lay_out(x: Array, *axes: str | None) -> Array:
    """Names the axes of an activation: "batch", "length", "activation_embed" and so on; None for
    an axis that is never split."""
    constrain = _constrain.get()
    return x if constrain is None else constrain(x, axes)


def gather(parameter: Array, axes: tuple[str | None, ...]) -> Array:
    """A parameter as it is used: whole along "embed", which `fsdp` splits.

    Its gradient lies as the parameter does.

    Args:
      parameter: in the dtype in which it is to travel.
      axes: its logical axes.
    """
    constrain = _constrain.get()
    if constrain is None:
        return parameter
    whole = tuple(None if axis == "embed" else axis for axis in axes)

    @jax.custom_vjp
    def gathered(x: Array) -> Array:
        return constrain(x, whole)

    gathered.defvjp(lambda x: (gathered(x), None), lambda _, dx: (constrain(dx, axes),))
    return gathered(parameter)


def all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: what `gather` gives is not kept for the backward pass, where
    it would be all parameters, whole, on every device; everything else is."""
    return primitive.name != "custom_vjp_call"


def are_laid_out() -> bool:
    """Whether a caller has said where activations lie."""
    return _constrain.get() is not None
