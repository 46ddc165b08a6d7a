"""JSON files that hold an object, as configurations do."""

import json
from typing import Any

from etils import epath

from t5x_lite.errors import UsageError


def read_object(path: epath.Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      path: the file.
      optional: an empty object if it is not there.

    Raises:
      UsageError: it holds something else.
      OSError: it cannot be read.
    """
    if optional and not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must be a JSON object, not a {type(values).__name__}")
    return values
