"""What a saved input position says of itself: who may go on from it."""

import json
from typing import Any

# The field that tells a position of index-based rows from that of a stream, which is no JSON.
_KIND = {"input": "indexed"}


def indexed(fields: dict[str, Any]) -> bytes:
    """The position of rows that are read by index, the same on every process."""
    return json.dumps(_KIND | fields).encode()


def read_indexed(position: bytes) -> dict[str, Any] | None:
    """The fields of such a position; None if it is another's."""
    if not position.startswith(b"{"):
        return None
    fields = json.loads(position)
    return fields if fields.items() >= _KIND.items() else None


def fits_any_processes(position: bytes) -> bool:
    """Whether it can be taken over by any number of processes, each of which then reads its share.

    If not, only as many processes as saved it, each with its own position, can go on.
    """
    return read_indexed(position) is not None


def other_share(saved: str, found: str) -> str:
    """The error of a stream that is to go on where another share of it stood.

    Args:
      saved: the share that the position is of, "0 of 2".
      found: the share of this process.
    """
    return (
        f"the input position that was saved is of share {saved} of the examples, this process "
        f"reads share {found}, and a stream cannot be divided otherwise: start as many processes "
        "as saved it with the same MESH; a run on a cache (`python -m t5x_lite cache` and "
        "CACHE_DIR) goes on with any number"
    )
