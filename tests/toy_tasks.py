"""Tasks of a few sentences, registered when this module is imported, for tests of evaluation."""

import dataclasses

import numpy as np
import seqio
import tensorflow as tf

from tasks import vocabularies

WORDS = {"good": 1, "fine": 1, "great": 1, "bad": 0, "poor": 0, "awful": 0}
THINGS = ("film", "plot", "cast", "score", "ending of this long story", "idea", "end", "set", "cut")
SIZES = {"train": 48, "validation": 7, "test": 3, "empty": 0}


@dataclasses.dataclass(frozen=True)
class ClassLabel:
    """The index of a class; -1 for any other text."""

    classes: tuple[str, ...]

    def __call__(self, text, example=None, is_target=False):
        return self.classes.index(text) if text in self.classes else -1


def rows(split: str) -> list[tuple[str, int]]:
    """(sentence, 0 or 1), no two alike in a split."""
    pairs = [(f"the {t} is {w}", label) for t in THINGS for w, label in WORDS.items()]
    order = np.random.default_rng(0).permutation(len(pairs))
    first = {"train": 0, "validation": 0, "test": 7, "empty": 0}[split]
    return [pairs[i] for i in order[first : first + SIZES[split]]]


def _source(splits):
    def dataset(split, shuffle_files=False, seed=None):
        found = rows(split)
        return tf.data.Dataset.from_tensor_slices(
            {
                "sentence": tf.constant([s for s, _ in found], tf.string),
                "label": tf.constant([label for _, label in found], tf.int32),
                "idx": tf.range(len(found)),
            }
        )

    return seqio.FunctionDataSource(dataset, splits=splits)


@seqio.map_over_dataset
def _sentiment(example):
    label = tf.gather(tf.constant(["negative", "positive"]), example["label"])
    inputs = tf.strings.join(["sentiment: ", example["sentence"]])
    return {"inputs": inputs, "targets": label, "idx": example["idx"]}


@seqio.map_over_dataset
def _last_word(example):
    words = tf.strings.split(example["sentence"])
    inputs = tf.strings.join(["last word: ", example["sentence"]])
    return {"inputs": inputs, "targets": words[-1], "words": words, "idx": example["idx"]}


def accuracy(targets, predictions):
    """Percent."""
    return {"accuracy": 100 * float(np.mean(np.equal(targets, predictions)))}


def count(targets, predictions):
    """How many examples came to be measured."""
    return {"count": len(predictions)}


def is_in_sentence(targets, predictions):
    """Of two fields, as a seqio Scalar."""
    found = [word in words for word, words in predictions]
    same = [t == word for t, (word, _) in zip(targets, predictions, strict=True)]
    return {
        "in_sentence": seqio.metrics.Scalar(np.float32(np.mean(found))),
        "same": seqio.metrics.Scalar(np.mean(same)),
        "notes": seqio.metrics.Text("not a number"),
    }


def likelihood(targets, scores):
    """Mean log-likelihood, and that of the first example."""
    assert isinstance(scores, np.ndarray)
    return {"log_likelihood": scores.mean(), "first": scores[0]}


def with_words(text, example, is_target):
    """Targets become a word, predictions a pair: the two need not be alike."""
    if is_target:
        return text.upper()
    return text.upper(), [word.decode().upper() for word in example["words"]]


def _add(
    name, preprocessor, vocabulary=vocabularies.DEFAULT, splits=("train", "validation"), **how
):
    feature = seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)
    seqio.TaskRegistry.add(
        name,
        source=_source(splits),
        preprocessors=[preprocessor, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
        **how,
    )


CLASSES = ("negative", "positive")
LABEL = ClassLabel(CLASSES)
_add(
    "toy_sentiment",
    _sentiment,
    splits=tuple(SIZES),
    postprocess_fn=LABEL,
    metric_fns=[accuracy, count],
)
_add(
    "toy_last_word",
    _last_word,
    postprocess_fn=with_words,
    metric_fns=[is_in_sentence, likelihood, count],
)
_add("toy_unmeasured", _last_word)
_add(
    "toy_bytes",
    _sentiment,
    vocabulary=seqio.ByteVocabulary(),
    postprocess_fn=LABEL,
    metric_fns=[accuracy, count],
)
seqio.MixtureRegistry.add(
    "toy_mixture", ["toy_sentiment", "toy_last_word", "toy_unmeasured"], default_rate=1.0
)


def vocabulary_model() -> bytes:
    """A SentencePiece model of the sentences, for VOCABULARY_FILE."""
    texts = [f"{s} sentiment: last word: negative positive" for s, _ in rows("train")]
    return vocabularies.train_sentencepiece(texts, vocab_size=140, character_coverage=1.0)
