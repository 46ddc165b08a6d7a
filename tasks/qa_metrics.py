"""Exact match and F1 of answers, as the official evaluations of SQuAD 1.1 and TriviaQA have them.

SQuAD: arXiv:1606.05250; TriviaQA: arXiv:1705.03551.
"""

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """`em` and `f1` of words, each the best over an example's answers, times 100.

    Without case, ASCII punctuation, articles and surplus space. An answer that vanishes with them
    gives `em` 1 and `f1` 0 against an empty prediction, as in T5.

    Raises:
      ValueError: an example has no answer.
    """
    return _best_over_answers(targets, predictions, _normalize_squad)


def trivia_qa(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """As `squad`, but punctuation, curly quotes too, becomes a space.

    Raises:
      ValueError: an example has no answer.
    """
    return _best_over_answers(targets, predictions, _normalize_trivia_qa)


def span_squad(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[str]
) -> dict[str, float]:
    """`squad` for predictions `start: <word> end: <word>`, by number in the context's words.

    Targets are {"answers": strings, "context": string}. What cannot be read counts as empty.
    """
    texts = [
        _span_text(_words(target["context"]), _words(prediction))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return squad([target["answers"] for target in targets], texts)


def _words(text: str) -> list[str]:
    return re.sub(r"\W", " ", text).split()


def _span_text(context: Sequence[str], span: Sequence[str]) -> str:
    """The words of `context` from the number in span[1] to that in span[3]."""
    try:
        first, last = int(span[1]), int(span[3])
    except (IndexError, ValueError):
        return ""
    return " ".join(context[first : last + 1])


def _best_over_answers(
    targets: Sequence[Sequence[str]], predictions: Sequence[str], normalize: Callable[[str], str]
) -> dict[str, float]:
    exact, f1 = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        if not len(answers):
            raise ValueError("em and f1 need an answer for every example, this split has none")
        found = normalize(prediction)
        normalized = [normalize(answer) for answer in answers]
        exact.append(found in normalized)
        f1.append(max(_f1(answer.split(), found.split()) for answer in normalized))
    return {"em": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}


def _f1(target: Sequence[str], prediction: Sequence[str]) -> float:
    common = (collections.Counter(target) & collections.Counter(prediction)).total()
    # 2PR / (P + R) of the counts; 0 if both are empty, as in T5.
    return 2 * common / (len(target) + len(prediction)) if common else 0.0


def _normalize_squad(text: str) -> str:
    return _without_articles(text.lower().translate(dict.fromkeys(map(ord, string.punctuation))))


def _normalize_trivia_qa(text: str) -> str:
    marks = string.punctuation + "\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
    spaces = dict.fromkeys(map(ord, marks + "\N{ACUTE ACCENT}"), " ")
    return _without_articles(text.lower().translate(spaces))


def _without_articles(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
