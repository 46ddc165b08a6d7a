"""From a model's text, or a target's, to what the metrics compare: T5's post-processors.

Each is called as `fn(text, example=<the example>, is_target=<whether it is the target's text>)`;
strings in the example are bytes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

_DETERMINERS = frozenset(
    {
        *("a", "an", "few", "her", "his", "each", "every", "many", "much", "my", "our", "some"),
        *("that", "the", "their", "these", "this", "those", "which", "whose", "your"),
    }
)


@dataclasses.dataclass(frozen=True)
class ClassLabel:
    """The index of the text among the classes, -1 if it is none of them, spelled exactly.

    T5's `string_label_to_class_id`. Rank classification chooses among `classes`.
    """

    classes: tuple[str, ...]

    def __call__(self, text: str, **unused: Any) -> int:
        return self.classes.index(text) if text in self.classes else -1


@dataclasses.dataclass(frozen=True)
class GroupedClassLabel:
    """{"value": class index as of `ClassLabel`}; in a target also "group": the example's `group`.

    The field is an int. T5's `multirc`, where that is `idx/question`.
    """

    classes: tuple[str, ...]
    group: str

    def __call__(
        self, text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
    ) -> dict[str, Any]:
        value = {"value": ClassLabel(self.classes)(text)}
        return value | {"group": int(_example(example)[self.group])} if is_target else value


def number(text: str, **unused: Any) -> float:
    """What Python's `float` makes of the text, "nan" and "inf" too; else -1. T5's `stsb`."""
    try:
        return float(text)
    except ValueError:
        return -1.0


def answer(
    text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> str | list[str]:
    """The text; for a target, all of the example's `answers`. T5's `qa`."""
    return _strings(_example(example)["answers"]) if is_target else text


def span_answer(
    text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> str | dict[str, Any]:
    """The text; for a target, {"answers", "context"} of the example. T5's `span_qa`."""
    if not is_target:
        return text
    example = _example(example)
    return {"answers": _strings(example["answers"]), "context": _string(example["context"])}


def record_answer(
    text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> dict[str, Any]:
    """{"value": text}; for a target, the value is all `answers`, with the query's "group".

    T5's `record`.
    """
    if not is_target:
        return {"value": text}
    example = _example(example)
    return {
        "value": _strings(example["answers"]),
        "group": (int(example["idx/passage"]), int(example["idx/query"])),
    }


def is_referent(
    text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> int:
    """1 if the text names the example's candidate (`targets_pretokenized`), 0 if not, -1 if empty.

    It does if the words of one are among the other's, without determiners and in lower case, and
    both or neither have an apostrophe. For a target, the example's `label`. T5's `wsc_simple`.
    """
    example = _example(example)
    if is_target:
        return int(example["label"])
    found, wanted = _content(text), _content(_string(example["targets_pretokenized"]))
    if not found:
        return -1
    if ("'" in found) != ("'" in wanted):
        return 0
    found_words, wanted_words = set(found.split(" ")), set(wanted.split(" "))
    return int(found_words <= wanted_words or wanted_words <= found_words)


def _content(text: str) -> str:
    return " ".join(w for w in text.strip().lower().split(" ") if w not in _DETERMINERS)


def _example(example: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if example is None:
        raise ValueError("this post-processor needs the example beside the text")
    return example


def _string(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _strings(values: Any) -> list[str]:
    return [_string(value) for value in np.asarray(values, object)]
