"""Where activations lie on the devices: a model names their axes, its caller says what that means.

Without a caller's word the compiler decides, and on one device there is nothing to decide.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

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
