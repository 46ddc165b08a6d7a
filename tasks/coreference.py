"""What a pronoun refers to: the Winograd tasks in T5's "simple" form (arXiv:1910.10683, 2.4).

The pronoun stands in asterisks in the input, and the target is the text that it refers to.
"""

import functools
import re
from collections.abc import Sequence

import seqio
import tensorflow as tf

from tasks import casts, metrics, postprocessors, registration, sources, vocabularies

_LABEL = "wsc:"

# Two texts of SuperGLUE's WSC whose pronoun is not at the word that the record names, or not a word
# of its own. T5 has what comes of them by hand; X is the pronoun.
_BY_HAND = {
    (
        "The boy continued to whip the pony , and eventually the pony threw him over. John laughed "
        'out quite loud. "Good for him," he said. '
    ): (
        "The boy continued to whip the pony , and eventually the pony threw him over. John laughed "
        'out quite loud. "Good for X ," he said.'
    ),
    (
        "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the "
        "magic pebble in an iron safe . Some day they might want to use it , but really for now, "
        "what more could they wish for?"
    ): (
        "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the "
        "magic pebble in an iron safe . Some day they might want to use X , but really for now, "
        "what more could they wish for?"
    ),
}


# ---- SuperGLUE's WSC and DPR ---------------------------------------------------------------------


def wsc_simple(dataset: tf.data.Dataset, task: str, correct_referent_only: bool) -> tf.data.Dataset:
    """{"text", "span1_text", "span2_text", "span2_index", "label", "idx"} -> the candidate, span 1.

    The target is the candidate whether it is right or not, so that training wants
    `correct_referent_only`, which keeps the records whose label is not 0 (-1 as well, as in T5).
    Keeps `label` and `idx`. Every X of the text that stands alone becomes the pronoun, as in T5.

    Stops if span 2 is the first word, or not the word at its index.
    """

    def to_text(example: casts.Example) -> dict[str, tf.Tensor]:
        pronoun = tf.strings.join([" *", example["span2_text"], "* "])
        blanked = _with_blank(example, task)
        # The pronoun is part of a pattern's replacement, as in T5.
        inputs = tf.strings.regex_replace(blanked, " X ", pronoun)
        return {
            "inputs": tf.strings.join([_LABEL, inputs], separator=" "),
            "targets": example["span1_text"],
            "label": example["label"],
            "idx": example["idx"],
        }

    if correct_referent_only:
        dataset = dataset.filter(lambda example: tf.cast(example["label"], tf.bool))
    return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE)


def _with_blank(example: casts.Example, task: str) -> tf.Tensor:
    """The text with X for the pronoun, string []."""
    text, pronoun = example["text"], example["span2_text"]
    words = tf.strings.split(text, sep=" ")
    index = tf.cast(example["span2_index"], tf.int32)
    inside = tf.logical_and(index > 0, index < tf.size(words))
    at_index = words[tf.where(inside, index, 0)]
    by_hand = tf.equal(text, list(_BY_HAND))
    found = tf.logical_or(tf.equal(at_index, pronoun), tf.reduce_any(by_hand))
    is_right = casts.require(
        tf.logical_and(inside, found),
        *(f"{task}: the pronoun '", pronoun, "' is not word ", tf.strings.as_string(index)),
        *(" of '", text, "', or is its first (word 0)"),
    )
    with tf.control_dependencies([is_right]):
        before = tf.strings.reduce_join(words[:index], separator=" ")
        after = tf.strings.reduce_join(words[index + 1 :], separator=" ")
        blanked = tf.strings.join([before, "X", after], separator=" ")
    return tf.gather([blanked, *_BY_HAND.values()], _first_true(by_hand))


def _first_true(conditions: tf.Tensor) -> tf.Tensor:
    """1 + the index of the first True of bool [n]; 0 if there is none."""
    return tf.argmax(tf.concat([[False], conditions], 0))


@seqio.map_over_dataset
def definite_pronoun_resolution(example: casts.Example, task: str) -> dict[str, tf.Tensor]:
    """{"sentence", "pronoun", "candidates": [n], "label"} -> the candidate that `label` names.

    The first occurrence of the pronoun is marked that has a space before it and a space, full stop
    or comma after it. Stops at a label that is no candidate.
    """
    pattern = tf.strings.join([" (", example["pronoun"], r")( |\.|,)"])
    marked = tf.strings.regex_replace(
        example["sentence"], pattern, r" *\1*\2", replace_global=False
    )
    label, candidates = example["label"], example["candidates"]
    count = tf.size(candidates, label.dtype)
    known = tf.logical_and(label >= 0, label < count)
    allowed = (" is not one of its ", tf.strings.as_string(count), " candidates, counted from 0")
    message = (f"{task}: label ", tf.strings.as_string(label), *allowed)
    with tf.control_dependencies([casts.require(known, *message)]):
        targets = candidates[tf.where(known, label, 0)]
    return {"inputs": tf.strings.join([_LABEL, marked], separator=" "), "targets": targets}


# ---- GLUE's WNLI ---------------------------------------------------------------------------------

_PRONOUNS = frozenset({"he", "she", "they", "it", "her", "his", "their", "them", "him"})
_MARKS = (".", ",", "?", "!")


@seqio.map_over_dataset
def wnli_simple(example: casts.Example, task: str) -> dict[str, tf.Tensor]:
    """{"sentence1", "sentence2", "label", "idx"} -> the candidate that sentence 2 puts in.

    Keeps `premise`, `hypothesis`, `label` and `idx`. For evaluation: the target is the candidate
    whether it is right or not, and the step runs in Python, so that its position cannot be saved.

    Stops if no pronoun of sentence 1 has a candidate in sentence 2.
    """

    def to_text(premise: bytes, hypothesis: bytes) -> tuple[bytes, bytes]:
        try:
            marked, referent = find_referent(premise.decode(), hypothesis.decode())
        except ValueError as e:
            raise casts.bad_record(f"{task}: {e}") from e
        return f"{_LABEL} {marked}".encode(), referent.encode()

    inputs, targets = tf.numpy_function(
        to_text, [example["sentence1"], example["sentence2"]], [tf.string, tf.string]
    )
    return {
        "inputs": tf.ensure_shape(inputs, []),
        "targets": tf.ensure_shape(targets, []),
        "premise": example["sentence1"],
        "hypothesis": example["sentence2"],
        "label": example["label"],
        "idx": example["idx"],
    }


def find_referent(premise: str, hypothesis: str) -> tuple[str, str]:
    """The premise with its pronoun in asterisks, and what the hypothesis has in its place.

    The pronoun is the one with the most words around it that the hypothesis has too. What stands
    between these in the hypothesis is the candidate. T5's rules, made for WNLI's own texts.

    Raises:
      ValueError: the premise has no pronoun, or the hypothesis no candidate.
    """
    premise_words, hypothesis_words = _plain_words(premise), _plain_words(hypothesis)
    positions = [i for i, word in enumerate(premise_words) if word in _PRONOUNS]
    if not positions:
        raise ValueError(f"no pronoun in {premise!r}")
    matches = [(*_candidate(premise_words, hypothesis_words, i), i) for i in positions]
    _, candidate, position = max(matches, key=lambda match: match[0])
    return _mark_word(premise, position), _as_written(candidate, hypothesis)


def _plain_words(sentence: str) -> list[str]:
    """Its words in lower case, each without a mark at its end."""
    words = (re.sub(r"[.,?!]$", "", word) for word in sentence.strip().lower().split(" "))
    return [word for word in words if word]


def _candidate(premise: list[str], hypothesis: list[str], position: int) -> tuple[int, str]:
    """(number of words around the pronoun that the hypothesis has, the words between them)."""
    before, after = premise[:position], premise[position + 1 :]
    num_before = _num_shared(before[::-1], hypothesis[::-1])
    num_after = _num_shared(after, hypothesis)
    if not num_before + num_after:
        return 0, ""
    shared_before, shared_after = before[len(before) - num_before :], after[:num_after]
    text = " ".join(hypothesis)
    for pattern in (
        [*shared_before, "(.+)", *shared_after],
        ["^(.+)", *shared_after],
        [*shared_before, "(.+)$"],
    ):
        if found := re.search(" ".join(pattern), text):  # words as patterns, as in T5
            return num_before + num_after, found[1]
    return num_before + num_after, ""


def _num_shared(words: Sequence[str], others: Sequence[str]) -> int:
    """How many of the first words occur, joined, in the others, joined."""
    text = " ".join(others)
    for n in range(len(words)):
        if " ".join(words[: n + 1]) not in text:
            return n
    return len(words)


def _mark_word(sentence: str, position: int) -> str:
    words = sentence.split(" ")
    word = words[position]
    words[position] = f"*{word[:-1]}* {word[-1]}" if word.endswith(_MARKS) else f"*{word}*"
    return " ".join(words)


def _as_written(candidate: str, hypothesis: str) -> str:
    """The candidate as the hypothesis spells it, from its last article on, not possessive."""
    words = candidate.split(" ")
    start = max((words.index(a) for a in ("a", "an", "the") if a in words), default=0)
    pattern = " ".join(f"{re.escape(word)}[.,?!]?" for word in words[start:])
    found = re.search(pattern, hypothesis, re.IGNORECASE)
    if not found:
        raise ValueError(f"no candidate for the pronoun in {hypothesis!r}")
    text = found[0][:-1] if found[0].endswith(_MARKS) else found[0]
    return text[:-1] if text.endswith("'") else text.removesuffix("'s")


# ---- registration --------------------------------------------------------------------------------


def register() -> None:
    """Registers `super_glue_wsc_v102_simple_train`, `..._eval` and the tasks like them."""
    for part, splits in (("train", ["train"]), ("eval", ["validation", "test"])):
        name = f"super_glue_wsc_v102_simple_{part}"
        is_train = part == "train"
        registration.register_supervised(
            name,
            sources.PreparedTfdsSource("super_glue/wsc.fixed", splits),
            vocabularies.DEFAULT,
            [functools.partial(wsc_simple, task=name, correct_referent_only=is_train)],
            [] if is_train else [metrics.accuracy],
            None if is_train else postprocessors.is_referent,
        )
    registration.register_supervised(
        "glue_wnli_v002_simple_eval",
        sources.PreparedTfdsSource("glue/wnli", ["validation", "test"]),
        vocabularies.DEFAULT,
        [functools.partial(wnli_simple, task="glue_wnli_v002_simple_eval")],
        [metrics.accuracy],
        postprocessors.is_referent,
    )
    registration.register_supervised(
        "dpr_v001_simple",
        sources.PreparedTfdsSource("definite_pronoun_resolution", ["train", "test"]),
        vocabularies.DEFAULT,
        [functools.partial(definite_pronoun_resolution, task="dpr_v001_simple")],
        [metrics.accuracy],
    )
