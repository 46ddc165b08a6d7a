"""t5x_lite: a text-to-text training stack in JAX and Flax.

For a notebook or a script: `from t5x_lite import load_model`.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5x_lite.loaded_model import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    # When it is asked for: every room of the package runs this file, and most do without seqio.
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from t5x_lite.setup import without_native_notes

    with without_native_notes():
        from t5x_lite.loaded_model import load_model

    return load_model
