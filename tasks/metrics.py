"""T5's metrics: `fn(targets, predictions) -> {name: value}`, times 100.

Both are lists of equal length of what the task's post-processor gives. The libraries that compute
them are loaded when a metric is, not with the tasks.
"""

import collections
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

MetricFn = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]


# ---- classes and numbers -------------------------------------------------------------------------


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """`accuracy`: the share of predictions equal to their target (scikit-learn)."""
    import sklearn.metrics

    return {"accuracy": 100 * float(sklearn.metrics.accuracy_score(targets, predictions))}


def sequence_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """`sequence_accuracy`: the share of texts equal to their target, character for character."""
    equal = [t == p for t, p in zip(targets, predictions, strict=True)]
    return {"sequence_accuracy": 100 * float(np.mean(equal))}


def matthews_corrcoef(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """`matthews_corrcoef` (scikit-learn); -1, which no class has, counts as one more class."""
    import sklearn.metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single class: the 0 says it
        value = sklearn.metrics.matthews_corrcoef(targets, predictions)
    return {"matthews_corrcoef": 100 * float(value)}


def f1_score_with_invalid(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """`f1` of class 1 (scikit-learn), where a prediction other than 0 or 1 counts as wrong.

    Raises:
      ValueError: a target is neither 0 nor 1: there is no wrong class then.
    """
    import sklearn.metrics

    true, predicted = np.asarray(targets), np.asarray(predictions)
    if not np.isin(true, (0, 1)).all():
        raise ValueError("f1 needs targets of class 0 or 1, this split has unlabelled ones")
    predicted = np.where(np.isin(predicted, (0, 1)), predicted, 1 - true)
    return {"f1": 100 * float(sklearn.metrics.f1_score(true, predicted, zero_division=0))}


def mean_multiclass_f1(num_classes: int) -> MetricFn:
    """Makes `mean_<num_classes>class_f1`: the mean of F1 over the classes (scikit-learn)."""

    def mean_f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
        import sklearn.metrics

        value = sklearn.metrics.f1_score(
            targets, predictions, labels=range(num_classes), average="macro", zero_division=0
        )
        return {f"mean_{num_classes}class_f1": 100 * float(value)}

    return mean_f1


def pearson_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """`pearson_corrcoef` (scipy); nan if either is constant or has nan or inf."""
    import scipy.stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input: the nan says it
        value = scipy.stats.pearsonr(targets, predictions)[0]
    return {"pearson_corrcoef": 100 * float(value)}


def spearman_corrcoef(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """`spearman_corrcoef` (scipy); nan if either is constant or has nan."""
    import scipy.stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input: the nan says it
        value = scipy.stats.spearmanr(targets, predictions)[0]
    return {"spearman_corrcoef": 100 * float(value)}


# ---- over groups of examples ---------------------------------------------------------------------


def all_match(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """`exact_match`: 100 if all predictions equal their targets, else 0."""
    return {"exact_match": 100 * float(np.array_equal(targets, predictions))}


def mean_group_metric(metric_fn: MetricFn) -> MetricFn:
    """Makes the mean of a metric over the groups of targets.

    Targets are {"group", "value"}, predictions {"value"}; each group counts the same.
    """

    def group_mean(
        targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        groups: dict[Hashable, list[tuple[Any, Any]]] = collections.defaultdict(list)
        for target, prediction in zip(targets, predictions, strict=True):
            groups[target["group"]].append((target["value"], prediction["value"]))
        results = [metric_fn(*zip(*pairs, strict=True)) for pairs in groups.values()]
        return {name: float(np.mean([r[name] for r in results])) for name in results[0]}

    return group_mean


def deduplicate_metric(metric_fn: MetricFn) -> MetricFn:
    """Makes a metric over the first example of each group.

    Targets are {"group", "value"}, predictions {"value"}. For data sets that repeat an example
    once for each of its right answers.
    """

    def deduplicated(
        targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        first: dict[Hashable, tuple[Any, Any]] = {}
        for target, prediction in zip(targets, predictions, strict=True):
            first.setdefault(target["group"], (target["value"], prediction["value"]))
        return metric_fn([t for t, _ in first.values()], [p for _, p in first.values()])

    return deduplicated


def multirc_f1_over_all_answers(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """`f1` of the "value" of all answers, whatever their question: MultiRC's F1a."""
    return f1_score_with_invalid([t["value"] for t in targets], [p["value"] for p in predictions])


# ---- texts ---------------------------------------------------------------------------------------


def bleu(
    targets: Sequence[str] | Sequence[Sequence[str]],
    predictions: Sequence[str],
    tokenizer: str = "intl",
) -> dict[str, float]:
    """`bleu` of the corpus (sacrebleu).

    Args:
      targets: one reference for each prediction; or several streams of references, each of them as
        long as the predictions.
      predictions: texts.
      tokenizer: sacrebleu's name of it; T5 takes "intl".
    """
    import sacrebleu

    references = [targets] if isinstance(targets[0], str) else targets
    score = sacrebleu.corpus_bleu(
        predictions,
        references,  # type: ignore[arg-type]
        smooth_method="exp",
        tokenize=tokenizer,
        use_effective_order=False,
    )
    return {"bleu": float(score.score)}


ROUGE_TYPES = ("rouge1", "rouge2", "rougeLsum")


def rouge_mean(
    targets: Sequence[str],
    predictions: Sequence[str],
    score_keys: Sequence[str] = ROUGE_TYPES,
    use_stemmer: bool = False,
) -> dict[str, float]:
    """Mean F1 of each ROUGE (rouge_score); " . " ends a sentence, as in T5."""
    scores = _rouge_scores(targets, predictions, score_keys, use_stemmer)
    return {key: 100 * float(np.mean([s[key].fmeasure for s in scores])) for key in score_keys}


def rouge(
    targets: Sequence[str],
    predictions: Sequence[str],
    score_keys: Sequence[str] = ROUGE_TYPES,
    seed: int = 0,
) -> dict[str, float]:
    """As `rouge_mean`, but the median of rouge_score's bootstrap, which is what T5 reports.

    `seed` fixes the resampling, which draws from numpy's global state; that is put back.
    """
    from rouge_score import scoring

    aggregator = scoring.BootstrapAggregator()
    for score in _rouge_scores(targets, predictions, score_keys, use_stemmer=False):
        aggregator.add_scores(score)
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        result = aggregator.aggregate()
    finally:
        np.random.set_state(state)
    return {key: 100 * float(result[key].mid.fmeasure) for key in score_keys}


def _rouge_scores(
    targets: Sequence[str], predictions: Sequence[str], score_keys: Sequence[str], use_stemmer: bool
) -> list[dict[str, Any]]:
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(rouge_types=score_keys, use_stemmer=use_stemmer)
    pairs = zip(targets, predictions, strict=True)
    return [scorer.score(t.replace(" . ", " .\n"), p.replace(" . ", " .\n")) for t, p in pairs]
