"""Translation (WMT), summaries (CNN/DailyMail) and film reviews (IMDb) under their T5 names."""

import functools

import seqio
import tensorflow as tf

from tasks import casts, metrics, postprocessors, registration, sources, vocabularies

_SPLITS = ("train", "validation", "test")
_LANGUAGES = {"de": "German", "en": "English", "fr": "French", "ro": "Romanian"}
_SENTIMENTS = ("negative", "positive")

# Task -> (data set, target language); all from English.
TRANSLATIONS = {
    "wmt14_ende_v003": ("wmt14_translate/de-en", "de"),
    "wmt14_enfr_v003": ("wmt14_translate/fr-en", "fr"),
    "wmt15_enfr_v003": ("wmt15_translate/fr-en", "fr"),
    "wmt16_enro_v003": ("wmt16_translate/ro-en", "ro"),
    "wmt19_ende_v003": ("wmt19_translate/de-en", "de"),
    "wmt_t2t_ende_v003": ("wmt_t2t_translate/de-en", "de"),
}


@seqio.map_over_dataset
def translate(example: casts.Example, source: str, target: str) -> dict[str, tf.Tensor]:
    """{source: text, target: text} by language code -> "translate English to German: ..."."""
    prefix = f"translate {_LANGUAGES[source]} to {_LANGUAGES[target]}: "
    return {
        "inputs": tf.strings.join([prefix, example[source]]),
        "targets": example[target],
    }


@seqio.map_over_dataset
def summarize(example: casts.Example) -> dict[str, tf.Tensor]:
    """{"article", "highlights"} -> "summarize: ..." and the highlights."""
    return {
        "inputs": tf.strings.join(["summarize:", example["article"]], separator=" "),
        "targets": example["highlights"],
    }


@seqio.map_over_dataset
def review_sentiment(example: casts.Example, task: str) -> dict[str, tf.Tensor]:
    """{"text", "label"} -> "sentiment: ..." and the class; -1 becomes `<unk>`.

    Stops at a label that is no class.
    """
    return {
        "inputs": tf.strings.join(["sentiment:", example["text"]], separator=" "),
        "targets": casts.class_text(example["label"], _SENTIMENTS, task),
    }


def register() -> None:
    """Registers `wmt*_v003`, `cnn_dailymail_v002` and `imdb_reviews_v100`.

    The last is not in the T5 library but in its sequel WT5 (arXiv:2004.14546), whose name and
    wording it has; IMDb has no validation split.
    """
    for name, (data_set, language) in TRANSLATIONS.items():
        has_test = not data_set.startswith("wmt19")
        registration.register_supervised(
            name,
            sources.PreparedTfdsSource(data_set, _SPLITS if has_test else _SPLITS[:2]),
            vocabularies.DEFAULT,
            [functools.partial(translate, source="en", target=language)],
            [metrics.bleu],
        )
    registration.register_supervised(
        "cnn_dailymail_v002",
        sources.PreparedTfdsSource("cnn_dailymail", _SPLITS),
        vocabularies.DEFAULT,
        [summarize],
        [metrics.rouge],
    )
    registration.register_supervised(
        "imdb_reviews_v100",
        sources.PreparedTfdsSource("imdb_reviews/plain_text", ["train", "test"]),
        vocabularies.DEFAULT,
        [functools.partial(review_sentiment, task="imdb_reviews_v100")],
        [metrics.accuracy],
        postprocessors.ClassLabel(_SENTIMENTS),
    )
