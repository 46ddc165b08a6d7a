"""What the verb `tasks` shows: every registered task, or real examples of one at each stage."""

import fnmatch
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from t5x_lite import data, gold_check, task_stages
from t5x_lite.data import Provider
from t5x_lite.errors import UsageError, nearest
from t5x_lite.gold_check import GoldCheck
from t5x_lite.run_config import DataConfig
from t5x_lite.task_stages import Measures
from tasks import vocabularies

_MAX_CHARACTERS = 400  # of a text that is shown
_MAX_MEMBERS = 3  # of a mixture whose records are shown
_NUM_BINS = 10
_BAR_WIDTH = 40
_INDENT = "  "


# ---- list ----------------------------------------------------------------------------------------


def list_tasks(pattern: str | None = None) -> None:
    """Prints a line for each registered task and mixture. Reads no data and no vocabulary.

    Args:
      pattern: shell wildcards over the whole name, or else a part of it; None for all.

    Raises:
      UsageError: no name matches; says which are near.
    """
    tasks, mixtures = sorted(seqio.TaskRegistry.names()), sorted(seqio.MixtureRegistry.names())
    names = [name for name in [*tasks, *mixtures] if _matches(name, pattern)]
    if not names:
        raise UsageError(
            f"no task or mixture matches {pattern!r}; {nearest(pattern or '', [*tasks, *mixtures])}"
        )
    rows = [("NAME", "KIND", "SPLITS", "FEATURES", "SOURCE")]
    for name in names:
        provider = seqio.get_mixture_or_task(name)
        is_task = isinstance(provider, seqio.Task)
        sources = [provider.source] if is_task else [task.source for task in provider.tasks]
        origin = _describe_source(provider.source) if is_task else f"{len(sources)} tasks"
        kind, features = "task" if is_task else "mixture", ", ".join(provider.output_features)
        rows.append((name, kind, _describe_splits(sources), features, origin))
    _print_columns(rows)


def _matches(name: str, pattern: str | None) -> bool:
    if pattern is None:
        return True
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern in name


def _describe_splits(sources: Sequence[Any]) -> str:
    # TFDS would be asked for splits that are not stated: slow, and an error without the data.
    stated = [source.splits if source._splits else None for source in sources]
    if None in stated:
        return "as in TFDS"
    return ", ".join(sorted({str(split) for splits in stated for split in splits or ()}))


def _describe_source(source: Any) -> str:
    description = str(source)
    if " object at 0x" in description:
        description = type(source).__name__
    limit = 80
    return description if len(description) <= limit else f"{description[: limit - 3]}..."


# ---- inspect -------------------------------------------------------------------------------------


def inspect_task(config: DataConfig, *, num_examples: int = 1000, num_shown: int = 1) -> None:
    """Prints examples of `config.split` at each stage, then what can be counted over a sample.

    That is lengths, truncation, padding and speed, and, of tasks with metrics, the metrics of the
    targets against themselves.

    The examples are the first of the split, unshuffled; nothing beyond them is read.

    Args:
      config: the task, its lengths, split and packing; `batch_size` is not used.
      num_examples: preprocessed examples that are measured.
      num_shown: examples that are shown.

    Raises:
      UsageError: the task, the split or a length is unknown, or there is no example.
    """
    for flag, value in (("num_examples", num_examples), ("num_shown", num_shown)):
        if value < 1:
            raise UsageError(f"--{flag}={value}: must be at least 1")
    data.configure(config)
    provider = data.get_provider(config.mixture_or_task_name)
    lengths = _check(config, provider)
    _print_header(config, provider, lengths)
    _print_texts(config, provider, lengths, num_shown)
    _print_ids(config, provider, lengths, num_shown)
    _print_rows(config, provider, lengths, num_shown)
    measures = task_stages.measure(config, provider, lengths, num_examples)
    _print_measures(measures, config.split, num_examples)
    for task in _members(config, provider):
        if task.predict_metric_fns:
            _print_gold(task, gold_check.check(config, task, num_examples), config.split)


def _members(config: DataConfig, provider: Provider) -> list[seqio.Task]:
    """The tasks of a mixture, or the task itself, that have the split."""
    members = [provider] if isinstance(provider, seqio.Task) else provider.tasks
    return [task for task in members if config.split in task.splits]


def _check(config: DataConfig, provider: Provider) -> dict[str, int]:
    """The lengths of the task's features, without those of features that it does not have."""
    if config.split not in provider.splits:
        splits = ", ".join(sorted(map(str, provider.splits)))
        raise UsageError(f"--split={config.split}: {provider.name} has {splits}")
    given = config.task_feature_lengths
    for feature in provider.output_features:
        if feature not in given:
            raise UsageError(
                f"--task_feature_lengths has no length for {feature!r}, a feature of "
                f"{provider.name}; given {dict(given)}"
            )
    return {feature: given[feature] for feature in provider.output_features}


# ---- examples at each stage ----------------------------------------------------------------------


def _print_header(config: DataConfig, provider: Provider, lengths: Mapping[str, int]) -> None:
    is_task = isinstance(provider, seqio.Task)
    rows = []
    if is_task:
        names = [
            task_stages.preprocessor_name(preprocessor)
            for preprocessor in provider.preprocessors
            if not isinstance(preprocessor, seqio.CacheDatasetPlaceholder)
        ]
        rows.append(("source", _describe_source(provider.source)))
        rows.append(("stages", " -> ".join(names)))
    rows.append(("splits", ", ".join(sorted(map(str, provider.splits)))))
    described = {n: _describe_vocabulary(f.vocabulary) for n, f in provider.output_features.items()}
    if len(set(described.values())) == 1:
        rows.append(("vocabulary", next(iter(described.values()))))
    else:
        rows += [(f"vocabulary of {name}", text) for name, text in described.items()]
    rows.append(("lengths", ", ".join(f"{name} {length}" for name, length in lengths.items())))
    print(f"{provider.name} ({'task' if is_task else 'mixture'}), split {config.split!r}")
    _print_columns(rows)
    if not is_task:
        total = sum(provider.get_rate(task) for task in provider.tasks)
        _print_heading("Members, with their share of the examples")
        shares = [(task.name, f"{provider.get_rate(task) / total:.1%}") for task in provider.tasks]
        _print_columns(shares)


def _describe_vocabulary(vocabulary: seqio.Vocabulary) -> str:
    if isinstance(vocabulary, vocabularies.LazyVocabulary):
        vocabulary = vocabulary.resolve()
    name = type(vocabulary).__name__
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        name = str(vocabulary.sentencepiece_model_file)
    num_sentinels = vocabularies.num_sentinels(vocabulary)
    # ByT5's are the last bytes.
    also = "" if vocabulary.extra_ids or name != "ByteVocabulary" else "also "
    sentinels = f", of which the last {num_sentinels} are {also}sentinels" if num_sentinels else ""
    return f"{vocabulary.vocab_size:,} ids{sentinels} ({name})"


def _print_texts(
    config: DataConfig, provider: Provider, lengths: Mapping[str, int], num_shown: int
) -> None:
    """Records of the source, and the text that the tokenizer gets where that is another."""
    members = _members(config, provider)
    for task in members[:_MAX_MEMBERS]:
        of_task = "" if task is provider else f" of {task.name}"
        source = task.source.get_dataset(split=config.split, shuffle=False)
        records = [dict(_flatten(record)) for record in _first(source, num_shown)]
        for number, record in enumerate(records, 1):
            _print_heading(f"Raw: record {number}{of_task}")
            _print_fields(record)
        try:
            dataset, fields = task_stages.text_stage(task, config.split, lengths)
        except UsageError:
            continue  # ids from the start
        for number, example in enumerate(_first(dataset, num_shown), 1):
            texts = {name: example[name] for name in fields}
            if not all(_occurs(text, records) for text in texts.values()):
                _print_heading(f"Text: example {number}{of_task}, before the tokenizer")
                _print_fields(texts)
    if len(members) > _MAX_MEMBERS:
        print(f"\n({len(members) - _MAX_MEMBERS} more members)")


def _occurs(text: bytes, records: Sequence[Mapping[str, Any]]) -> bool:
    return any(isinstance(v, bytes) and v == text for record in records for v in record.values())


def _print_ids(
    config: DataConfig, provider: Provider, lengths: Mapping[str, int], num_shown: int
) -> None:
    dataset = task_stages.preprocessed(config, provider, lengths)
    for number, example in enumerate(_first(dataset, num_shown), 1):
        _print_heading(f"Ids: example {number} after all stages")
        rows = [(name, f"{len(example[name])} ids", _show_ids(example[name])) for name in lengths]
        _print_columns(rows)
        _print_heading(f"Decoded back: example {number}")
        vocabulary = {name: provider.output_features[name].vocabulary for name in lengths}
        _print_fields({name: decode(vocabulary[name], example[name]) for name in lengths})


def decode(vocabulary: seqio.Vocabulary, ids: np.ndarray) -> str:
    """Text with sentinels as `<extra_id_N>` and each end mark as `</s>`."""
    *documents, rest = np.split(ids, np.flatnonzero(ids == vocabulary.eos_id) + 1)
    parts = [f"{data.decode(vocabulary, document)} </s>".lstrip() for document in documents]
    return " ".join([*parts, data.decode(vocabulary, rest)]).rstrip()


def _print_rows(
    config: DataConfig, provider: Provider, lengths: Mapping[str, int], num_shown: int
) -> None:
    dataset = task_stages.rows(
        task_stages.preprocessed(config, provider, lengths), lengths, pack=config.pack
    )
    if dataset is None:
        _print_heading("As the model sees it")
        print(f"{_INDENT}A model takes inputs and targets, or targets alone: not this task.")
        return
    packed = "packed" if config.pack else "not packed"
    for number, row in enumerate(_first(dataset, num_shown), 1):
        _print_heading(f"As the model sees it: row {number}, {packed}")
        _print_columns(
            [
                (name, f"{a.dtype} {list(a.shape)}", f"{np.count_nonzero(a)} not 0", _show_ids(a))
                for name, a in sorted(row.items())
            ]
        )
    if "inputs" not in lengths:
        print(
            f"{_INDENT}This task has targets only, for a decoder; an encoder-decoder needs inputs "
            "as well and cannot be trained on it."
        )


# ---- the sample ----------------------------------------------------------------------------------


def _print_measures(measures: Measures, split: str, num_wanted: int) -> None:
    found = f"{measures.num_examples:,}"
    which = f"first {found}" if measures.num_examples == num_wanted else f"{found} (all)"
    _print_heading(f"Lengths in tokens: the {which} examples of {split!r}")
    rows: list[Sequence[str]] = [("", "limit", "min", "median", "mean", "max", "unknown")]
    for name, feature in measures.features.items():
        lengths = feature.untrimmed
        numbers = (feature.limit, lengths.min(), np.median(lengths), lengths.mean(), lengths.max())
        formatted = [f"{n:,.1f}".removesuffix(".0") for n in numbers]
        rows.append((name, *formatted, _share(feature.num_unknown, feature.trimmed.sum())))
    _print_columns(rows, right=True)
    for name, feature in measures.features.items():
        print(f"\n{_INDENT}{name}")
        for line in histogram(feature.untrimmed, feature.limit):
            print(f"{_INDENT}{line}")

    _print_heading("Truncated and padded")
    rows = [("", "examples cut", "", "tokens lost", "", "padding", "packed")]
    for name, feature in measures.features.items():
        cut, lost, packed = feature.num_truncated, feature.num_lost, feature.packed_padding
        shares = _share(cut, measures.num_examples), _share(lost, feature.untrimmed.sum())
        padding = f"{feature.padding:.1%}", "-" if packed is None else f"{packed:.1%}"
        rows.append((name, f"{cut:,}", shares[0], f"{lost:,}", shares[1], *padding))
    _print_columns(rows, right=True)

    _print_heading(
        "Speed of reading and preprocessing (one pass over these examples, start included)"
    )
    rows = [("", "rows", "examples/row", "examples/s", "tokens/s")]
    ways = [("one by one", measures.num_examples, measures.seconds)]
    if measures.num_packed_rows:
        ways.append(("packed", measures.num_packed_rows, measures.packed_seconds))
    for way, num_rows, seconds in ways:
        per_row = f"{measures.num_examples / num_rows:.2f}"
        speeds = [f"{n / seconds:,.0f}" for n in (measures.num_examples, measures.num_tokens)]
        rows.append((way, f"{num_rows:,}", per_row, *speeds))
    _print_columns(rows, right=True)


def histogram(lengths: np.ndarray, limit: int) -> list[str]:
    """Lines of text: range of lengths, number of examples, bar. A bin ends where the limit is."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // _NUM_BINS)
    offset = (limit + 1 - low) % width if low <= limit < high else 0
    starts = range(low - (width - offset) % width, high + 1, width)
    counts = [int(((lengths >= start) & (lengths < start + width)).sum()) for start in starts]
    digits = len(f"{starts[-1] + width - 1:,}")
    lines = []
    for start, count in zip(starts, counts, strict=True):
        label = f"{max(start, low):>{digits},}"
        label += f" - {min(start + width - 1, high):>{digits},}" if width > 1 else ""
        bar = "#" * max(round(_BAR_WIDTH * count / max(counts)), int(count > 0))
        over = f"  over {limit:,}: cut" if count and start > limit else ""
        lines.append(f"{label}  {count:>{len(f'{max(counts):,}')},}  {bar}{over}".rstrip())
    return lines


# ---- gold against gold ---------------------------------------------------------------------------


def _print_gold(task: seqio.Task, found: GoldCheck, split: str) -> None:
    total = found.num_examples
    _print_heading(
        f"Gold against gold: {task.name}, {total:,} targets of {split!r} as if predicted"
    )
    _print_columns([(name, f"{value:g}") for name, value in found.metrics.items()])
    text, *values = (_show(value) for value in found.first)
    made = values[0] if values[0] == values[1] else f"{values[0]}; predicted: {values[1]}"
    print(f"{_INDENT}the first: {text!r}, after the post-processor: {made}")
    print(
        f"{_INDENT}{found.num_texts:,} different targets, {found.num_values:,} different values "
        "after the post-processor"
    )
    if found.classes:
        majority = max(found.classes, key=lambda name: found.classes[name])
        share = _share(found.classes[majority], total)
        print(f"{_INDENT}classes (to answer {majority!r} every time is right for {share})")
        _print_columns(
            [
                (f"{_INDENT}{name}", f"{count:,}", _share(count, total))
                for name, count in found.classes.items()
            ]
        )
    if found.outside:
        print(
            f"{_INDENT}WRONG: {len(found.outside):,} of {total:,} targets are none of the classes; "
            f"the first: {_show(found.outside[0])!r}"
        )
    if found.changed:
        before, after = (_show(part) for part in found.changed[0])
        print(
            f"{_INDENT}{len(found.changed):,} of {total:,} targets do not come back through the "
            f"vocabulary and the length; the first: {before!r} comes back as {after!r}"
        )


# ---- printing ------------------------------------------------------------------------------------


def _first(dataset: Any, count: int) -> list[Mapping[str, Any]]:
    with data.bad_records():
        return list(dataset.take(count).as_numpy_iterator())


def _flatten(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(record, Mapping):
        record = {"line": record}
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "-"


def _show_ids(ids: np.ndarray) -> str:
    return (
        " ".join(map(str, ids))
        if len(ids) <= 16
        else (f"{' '.join(map(str, ids[:12]))} ... {' '.join(map(str, ids[-4:]))}")
    )


def _show(value: Any) -> str:
    """A value of a record on one line: text as it is, but for line ends and what is too long."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if not isinstance(value, str):
        value = np.array2string(value, threshold=20) if isinstance(value, np.ndarray) else value
        value = " ".join(str(value).split())
    left_out = len(value) - _MAX_CHARACTERS
    if left_out > 0:
        value = f"{value[:_MAX_CHARACTERS]} ... ({left_out:,} more characters)"
    return value.replace("\n", "\\n").replace("\t", "\\t")


def _print_heading(title: str) -> None:
    print(f"\n{title}")


def _print_fields(fields: Mapping[str, Any]) -> None:
    """Each value after its name, wrapped."""
    columns = min(shutil.get_terminal_size((100, 0)).columns, 120)
    indent = len(_INDENT) + max(map(len, fields), default=0) + 2
    for name, value in fields.items():
        first = f"{_INDENT}{name}".ljust(indent)
        text = textwrap.fill(
            _show(value),
            max(columns, indent + 20),
            initial_indent=first,
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
        print(text or first.rstrip())


def _print_columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> None:
    """A table; with `right`, the columns after the first are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if right and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print((_INDENT + "  ".join(cells)).rstrip())
