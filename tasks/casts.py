"""What the casts of records to text have in common.

A cast runs in tf.data, on string ops alone. Where it finds a record that its task cannot have, it
stops with one line, which `problem` gets out of TensorFlow's error.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import tensorflow as tf

Example = Mapping[str, tf.Tensor]

UNLABELLED = "<unk>"  # the text of label -1, as in T5

_MARK = "bad record: "


def problem(error: tf.errors.OpError) -> str | None:
    """The line of a cast that stopped, without TensorFlow's words around it; None if none did."""
    found = re.search(rf"{_MARK}(.*)", error.message)
    if not found:
        return None
    # An assertion shows its text in brackets and escaped, what Python raised is as it was.
    line = found[1]
    if re.search(rf"assertion failed: \[{_MARK}", error.message):
        as_bytes = line.removesuffix("]").encode().decode("unicode_escape").encode("latin-1")
        line = as_bytes.decode("utf-8", "replace")
    return " ".join(line.splitlines())


def require(condition: tf.Tensor, *message: str | tf.Tensor) -> tf.Operation:
    """An op that stops with `message`, joined, unless `condition`; tensors are strings []."""
    return tf.debugging.Assert(condition, [tf.strings.join([_MARK, *message])])


def bad_record(message: str) -> ValueError:
    """For casts that are Python functions: what `require` would stop with."""
    return ValueError(_MARK + message)


def class_text(label: tf.Tensor, classes: Sequence[str], task: str) -> tf.Tensor:
    """The name of class `label` (int []) as string []; `<unk>` for -1, as in T5.

    Stops with task, label and classes if it is another number.
    """
    known = tf.logical_and(label >= -1, label < len(classes))
    allowed = "".join(f"{i} {name!r}, " for i, name in enumerate(classes)) + "or -1 (unlabelled)"
    found = tf.strings.as_string(label)
    with tf.control_dependencies([require(known, f"{task}: label ", found, f" is not {allowed}")]):
        return tf.gather([UNLABELLED, *classes], tf.where(known, label, -1) + 1)


def join_fields(example: Example, prefix: str, fields: Iterable[str]) -> tf.Tensor:
    """`prefix a: <text of a> b: <text of b>`, string []; spaces stay as they are in the text."""
    parts = [prefix]
    for field in fields:
        parts += [f"{field}:", example[field]]
    return tf.strings.join(parts, separator=" ")
