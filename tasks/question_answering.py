"""Answers from a context: SQuAD 1.1 and TriviaQA under T5's names.

In both, ASCII punctuation gets a space on either side and runs of space become one, in the context,
the question and the answers.
"""

import functools

import seqio
import tensorflow as tf

from tasks import (
    casts,
    objectives,
    postprocessors,
    qa_metrics,
    registration,
    sources,
    vocabularies,
)


def _pad_punctuation(text: tf.Tensor) -> tf.Tensor:
    return _squeeze(tf.strings.regex_replace(text, "([[:punct:]])", r" \1 "))


def _squeeze(text: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_replace(text, r"\s+", " ")


def _join(*parts: str | tf.Tensor) -> tf.Tensor:
    return _squeeze(tf.strings.join(parts, separator=" "))


# ---- SQuAD ---------------------------------------------------------------------------------------


@seqio.map_over_dataset
def squad(example: casts.Example, include_context: bool = True) -> dict[str, tf.Tensor]:
    """{"id", "context", "question", "answers": {"text": [n]}} -> the first answer.

    Keeps `id`, and `context`, `question` and `answers` [n] as they are in the text.
    """
    answers = _pad_punctuation(example["answers"]["text"])
    question, context = _pad_punctuation(example["question"]), _pad_punctuation(example["context"])
    if include_context:
        inputs = _join("question:", question, "context:", context)
    else:
        inputs = _join("squad trivia question:", question)
    return {
        "inputs": inputs,
        "targets": answers[0],
        "id": example["id"],
        "context": context,
        "question": question,
        "answers": answers,
    }


def squad_span(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """As `squad`, with targets `start: <word> end: <word>`; what has no such span is left out.

    Words are counted from 0 between single spaces, so that a run of spaces has empty words in it,
    and the context's last place for the answer is not tried: both as in T5.
    """

    def to_span(example: casts.Example) -> dict[str, tf.Tensor]:
        return {**example, "targets": _span(example["context"], example["targets"])}

    dataset = squad(dataset).map(to_span, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.filter(lambda example: tf.strings.length(example["targets"]) > 0)


def _span(context: tf.Tensor, answer: tf.Tensor) -> tf.Tensor:
    """The first place of the answer's words in the context's, string []; empty if there is none."""
    context_words, answer_words = _words(context), _words(answer)
    length = tf.size(answer_words)
    starts = tf.range(tf.maximum(tf.size(context_words) - length, 0))
    windows = tf.gather(context_words, starts[:, None] + tf.range(length)[None])
    places = tf.where(tf.reduce_all(windows == answer_words, axis=1))[:1, 0]  # int64 [0 or 1]
    first, last = places, places + tf.cast(length, tf.int64) - 1
    as_string = tf.strings.as_string
    spans = tf.strings.join(["start: ", as_string(first), " end: ", as_string(last)])
    return tf.strings.reduce_join(spans)


def _words(text: tf.Tensor) -> tf.Tensor:
    return tf.strings.split(tf.strings.regex_replace(text, r"\W", " "), sep=" ")


# ---- TriviaQA ------------------------------------------------------------------------------------


def trivia_qa(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """TFDS's `trivia_qa/rc` -> an example for each context and each answer that occurs in it."""

    def to_text(example: casts.Example) -> dict[str, tf.Tensor]:
        contexts = tf.concat(
            [
                example["entity_pages"]["wiki_context"],
                example["search_results"]["search_context"],
            ],
            axis=0,
        )
        contexts = _pad_punctuation(contexts)  # [C]
        answers = _pad_punctuation(example["answer"]["normalized_aliases"])  # [A]
        lower = tf.strings.lower(contexts)
        patterns = tf.strings.join([".*", tf.strings.lower(answers), ".*"])  # as in T5, unquoted
        occurs_AxC = tf.map_fn(
            lambda pattern: tf.strings.regex_full_match(lower, pattern),
            patterns,
            fn_output_signature=tf.TensorSpec([None], tf.bool),
        )
        found = tf.where(tf.transpose(occurs_AxC))  # (context, answer), in this order
        inputs = _join("question:", _pad_punctuation(example["question"]), "context:", contexts)
        return {
            "inputs": tf.gather(inputs, found[:, 0]),
            "targets": tf.gather(answers, found[:, 1]),
        }

    return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE).unbatch()


def truncate_around_answer(
    dataset: tf.data.Dataset,
    sequence_length: objectives.Lengths | None,
) -> tf.data.Dataset:
    """Ids {"inputs", "targets"} -> the same, inputs cut to a random window that has the targets.

    The window leaves room for EOS (T5's does not, and may lose the answer's last token). Inputs
    that are too long and do not have the targets in them are left out.
    """
    if sequence_length is None:
        return dataset
    room = sequence_length["inputs"] - 1

    @seqio.map_over_dataset(num_seeds=1)
    def cut(example: casts.Example, seed: tf.Tensor) -> dict[str, tf.Tensor]:
        inputs, targets = example["inputs"], example["targets"]
        size, length = tf.size(inputs), tf.size(targets)
        starts = tf.range(tf.maximum(size - length + 1, 0))
        windows = tf.gather(inputs, starts[:, None] + tf.range(length)[None])
        places = tf.cast(tf.where(tf.reduce_all(windows == targets, axis=1))[:, 0], tf.int32)
        first = tf.concat([places, [0]], 0)[0]
        lowest = tf.maximum(0, first + length - room)
        highest = tf.maximum(tf.minimum(first, size - room), lowest)
        start = tf.random.stateless_uniform([], seed, lowest, highest + 1, tf.int32)
        kept = inputs[start : start + tf.where(tf.size(places) > 0, room, 0)]
        return {**example, "inputs": tf.cond(size > room, lambda: kept, lambda: inputs)}

    return cut(dataset).filter(lambda example: tf.size(example["inputs"]) > 0)


# ---- registration --------------------------------------------------------------------------------


def register() -> None:
    """Registers `squad_v010_allanswers`, its forms without context and by span, `trivia_qa_v010`.

    `trivia_qa_v010` has no metrics, as in T5.
    """
    answer = (qa_metrics.squad, postprocessors.answer)
    for name, cast, (metric_fn, postprocess_fn) in (
        ("squad_v010_allanswers", squad, answer),
        ("squad_v010_context_free", functools.partial(squad, include_context=False), answer),
        (
            "squad_v010_allanswers_span",
            squad_span,
            (qa_metrics.span_squad, postprocessors.span_answer),
        ),
    ):
        registration.register_supervised(
            name,
            sources.PreparedTfdsSource("squad/v1.1", ["train", "validation"]),
            vocabularies.DEFAULT,
            [cast],
            [metric_fn],
            postprocess_fn,
        )
    registration.register_supervised(
        "trivia_qa_v010",
        sources.PreparedTfdsSource("trivia_qa/rc", ["train", "validation", "test"]),
        vocabularies.DEFAULT,
        [trivia_qa],
        [],
        token_preprocessors=[truncate_around_answer],
    )
