"""One self-contained HTML page of a run: its curves, its predictions and its configuration."""

import dataclasses
import importlib.resources
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe
from etils import epath

from t5x_lite import files
from t5x_lite.errors import UsageError
from t5x_lite.metrics import read_metrics

NUM_EXAMPLES = 10

# What is drawn first, in this order, and in which unit; then whatever else the evaluations measure.
_CHARTS = {
    "loss": ("Loss", "nats per target token"),
    "text_loss": ("Text loss", "nats per text token, sentinels and end marks left out"),
    "accuracy": ("Accuracy", "share of target tokens"),
    "learning_rate": ("Learning rate", "per update"),
    "grad_norm": ("Gradient norm", ""),
    "target_tokens_per_second": ("Throughput", "target tokens per second"),
}
_FROM_ZERO = ("Learning rate", "Throughput")
_NOT_CHARTED = re.compile(r"step|unix_time|seconds.*|num_.*|z_loss|param_norm|.*_per_second")

Records = Sequence[Mapping[str, float]]


def write_report(model_dir: epath.PathLike) -> epath.Path:
    """Writes `report.html` into the MODEL_DIR of a run, finished or still training.

    The page refers to nothing outside itself. What the run has not left yet is a sentence there.

    Returns:
      The path of the page.

    Raises:
      UsageError: `model_dir` is not a run's, or one of its files cannot be read as what it is.
    """
    model_dir = epath.Path(model_dir)
    if not model_dir.is_dir():
        raise UsageError(f"MODEL_DIR {os.fspath(model_dir)!r} is not a directory")
    if not any((model_dir / name).exists() for name in ("config.gin", "model.json", "metrics")):
        raise UsageError(
            f"MODEL_DIR {os.fspath(model_dir)!r} is not a run: it has neither config.gin, nor"
            " model.json, nor metrics/"
        )
    path = model_dir / "report.html"
    files.write_atomically(path, _render(model_dir).encode())
    return path


def _render(model_dir: epath.Path) -> str:
    model = _read_json(model_dir / "model.json")
    config = model_dir / "config.gin"
    config_text = config.read_text() if config.exists() else ""
    baselines = _read_json(model_dir / "metrics" / "baselines.json")
    unigram_loss = baselines.get("unigram_loss")
    series = _read_series(model_dir / "metrics")
    evals = {name: records for name, records in series.items() if name != "train"}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _format_number, "sentinels": _mark_sentinels}
    source = importlib.resources.files("t5x_lite").joinpath("report.html.j2").read_text("utf-8")
    return environment.from_string(source).render(
        name=model_dir.name or os.fspath(model_dir),
        task=model.get("task"),
        lengths=model.get("feature_lengths", {}),
        facts=_facts(model, config_text, series, unigram_loss),
        verdicts=[*_verdicts(evals, unigram_loss), *_task_verdicts(evals, baselines)],
        charts=_make_charts(series, baselines),
        evals={name: _last_values(records) for name, records in evals.items()},
        examples=_read_examples(model_dir / "inference"),
        model=json.dumps(model, indent=2, ensure_ascii=False) if model else "",
        config=config_text,
    )


def _read_json(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as e:
        raise UsageError(f"{os.fspath(path)} is not JSON: {e}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{os.fspath(path)} holds no JSON object but a {type(content).__name__}")
    return content


def _read_series(directory: epath.Path) -> dict[str, Records]:
    """Records by name, `train` first; a series without a line is left out."""
    paths = directory.glob("*.jsonl") if directory.exists() else ()
    series = {path.name.removesuffix(".jsonl"): read_metrics(path) for path in paths}
    names = sorted(series, key=lambda name: (name != "train", name))
    return {name: series[name] for name in names if series[name]}


def _facts(
    model: Mapping[str, Any],
    config: str,
    series: Mapping[str, Records],
    unigram_loss: float | None,
) -> list[tuple[str, str, str]]:
    """(label, value, remark) of each figure in the page's header."""
    facts = []
    if "num_parameters" in model:
        facts.append(("parameters", f"{model['num_parameters']:,}", ""))
    train = series.get("train", ())
    if train:
        total = re.search(r"^TRAIN_STEPS\s*=\s*(\d+)\s*$", config, re.MULTILINE)
        of_total = f"of {int(total[1]):,}" if total else ""
        facts.append(("steps", f"{train[-1]['step']:,}", of_total))
    for name, records in series.items():
        losses = [r["loss"] for r in records if "loss" in r]
        if losses:
            facts.append((f"{name} loss", _format_number(losses[-1]), "nats per target token"))
    if unigram_loss is not None:
        facts.append(("unigram baseline", _format_number(unigram_loss), "nats per text token"))
    speeds = [r["target_tokens_per_second"] for r in train if "target_tokens_per_second" in r]
    if speeds:
        facts.append(("throughput", f"{statistics.median(speeds):,.0f}", "tokens/s, median"))
    return facts


def _verdicts(evals: Mapping[str, Records], unigram_loss: float | None) -> list[str]:
    """A sentence on each evaluation that can be compared with the unigram model."""
    if unigram_loss is None:
        return []
    verdicts = []
    for name, records in evals.items():
        losses = [r["text_loss"] for r in records if "text_loss" in r]
        if losses and math.isfinite(losses[-1]):
            gap = unigram_loss - losses[-1]
            side = "below" if gap > 0 else "above"
            verdicts.append(
                f"{name}: {losses[-1]:.3f} nats per text token, {abs(gap):.3f} {side} what a"
                f" unigram model of the training text gives ({unigram_loss:.3f})."
            )
    return verdicts


def _task_verdicts(evals: Mapping[str, Records], baselines: Mapping[str, Any]) -> list[str]:
    """A sentence on each metric of a task that can be compared with answers without a model."""
    return [
        f"{name}: {metric} {evals[name][-1][metric]:.1f}; {baseline['name']} gives {value:.1f}."
        for name, baseline in baselines.get("tasks", {}).items()
        for metric, value in baseline["metrics"].items()
        if name in evals and metric in evals[name][-1]
    ]


def _last_values(records: Records) -> dict[str, float]:
    return {k: v for k, v in records[-1].items() if k != "unix_time"}


def _read_examples(directory: epath.Path) -> list[dict[str, Any]]:
    """The first examples of each task's newest `<task>-<step>.jsonl`."""
    newest: dict[str, tuple[int, epath.Path]] = {}
    for path in directory.glob("*.jsonl") if directory.exists() else ():
        match = re.fullmatch(r"(.+)-(\d+)\.jsonl", path.name)
        if match:
            task, step = match[1], int(match[2])
            newest[task] = max(newest.get(task, (-1, path)), (step, path), key=lambda n: n[0])
    groups = []
    for task, (step, path) in sorted(newest.items()):
        examples = []
        # Such a file can be large: only its head is read.
        with path.open("rb") as f:
            for number, line in zip(range(1, NUM_EXAMPLES + 1), f, strict=False):
                try:
                    example = json.loads(line)
                    fields = [_as_text(example.get(k)) for k in ("inputs", "targets", "prediction")]
                except (ValueError, AttributeError):
                    if not line.endswith(b"\n"):
                        break  # torn by a killed process
                    raise UsageError(f"{os.fspath(path)}:{number} is not a JSON object") from None
                examples.append(fields)
        groups.append({"task": task, "step": step, "file": path.name, "examples": examples})
    return groups


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _mark_sentinels(text: str) -> markupsafe.Markup:
    """Escapes `text` and sets T5's sentinels apart from its words."""
    escaped = str(markupsafe.escape(text))
    marked = re.sub(r"&lt;extra_id_(\d+)&gt;", r"<b>&lt;\1&gt;</b>", escaped)
    return markupsafe.Markup(marked)


def _format_number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:#.4g}" if abs(value) < 1000 else f"{value:,.0f}"


# Charts. Sizes are in the units of the SVG's view box.
_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 10, 34
_NUM_COLOURS = 6
_MAX_DOTS = 60


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A linear axis: data from `low` to `high` on pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, label) of round values, at most seven."""
        step = _round_step((self.high - self.low) / 6)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(self.place(i * step), _tick_label(i * step)) for i in range(first, last + 1)]


def _make_axis(values: Iterable[float], start: float, stop: float, pad: float) -> _Axis:
    """An axis over the finite values, and `pad` of their range beyond on either side."""
    values = list(values)
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    margin = pad * (high - low)
    # A quantity that is never negative gets no axis that is.
    padded_low = low - margin if low < 0 else max(low - margin, 0)
    return _Axis(padded_low, high + margin, start, stop)


def _round_step(at_least: float) -> float:
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= at_least * (1 - 1e-9))


def _tick_label(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.6g}{suffix}"
    return f"{round(value, 12):.6g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2g}"


class _Chart(NamedTuple):
    """What one chart shows: curves of (step, value) by series, and a level to compare with."""

    title: str
    unit: str
    curves: dict[str, list[tuple[float, float]]]
    level: tuple[str, float] | None = None


def _choose_charts(series: Mapping[str, Records], baselines: Mapping[str, Any]) -> list[_Chart]:
    """Losses and what goes with them share charts; each metric of a task has one of its own."""
    tasks = {name for name, records in series.items() if "num_examples" in records[-1]}
    shared = {name: records for name, records in series.items() if name not in tasks}

    def curves(names: Iterable[str], key: str) -> dict[str, list[tuple[float, float]]]:
        return {n: [(r["step"], r[key]) for r in series[n] if key in r] for n in names}

    evaluated = _metrics_of(records for name, records in shared.items() if name != "train")
    charts = []
    for key in [*_CHARTS, *(k for k in evaluated if k not in _CHARTS)]:
        title, unit = _CHARTS.get(key, (key, ""))
        loss = baselines.get("unigram_loss") if key == "text_loss" else None
        level = None if loss is None else (f"unigram {loss:.2f}", loss)
        charts.append(_Chart(title, unit, curves(shared, key), level))
    for name in sorted(tasks):
        baseline = baselines.get("tasks", {}).get(name, {"metrics": {}})
        for key in _metrics_of([series[name]]):
            value = baseline["metrics"].get(key)
            level = None if value is None else (f"{baseline['name']} {value:.1f}", value)
            charts.append(_Chart(key, name, curves([name], key), level))
    return charts


def _metrics_of(series: Iterable[Records]) -> list[str]:
    measured = {key for records in series for record in records for key in record}
    return sorted(key for key in measured if not _NOT_CHARTED.fullmatch(key))


def _make_charts(
    series: Mapping[str, Records], baselines: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What the template draws: each chart that has a finite value."""
    last_step = max((records[-1]["step"] for records in series.values()), default=0)
    x = _Axis(0, max(last_step, 1), _LEFT, _WIDTH - _RIGHT)
    charts = []
    for chart in _choose_charts(series, baselines):
        finite = [v for points in chart.curves.values() for _, v in points if math.isfinite(v)]
        if not finite:
            continue
        values = [*finite, *([chart.level[1]] if chart.level else [])]
        values += [0] if chart.title in _FROM_ZERO else []
        y = _make_axis(values, _HEIGHT - _BOTTOM, _TOP, pad=0.05)
        charts.append(
            {
                "title": chart.title,
                "unit": chart.unit,
                "width": _WIDTH,
                "height": _HEIGHT,
                "left": _LEFT,
                "right": _WIDTH - _RIGHT,
                "bottom": _HEIGHT - _BOTTOM,
                "x_ticks": x.ticks(),
                "y_ticks": y.ticks(),
                "baseline": (y.place(chart.level[1]), chart.level[0]) if chart.level else None,
                # A name has one colour on the whole page.
                "curves": [
                    _make_curve(name, index % _NUM_COLOURS, chart.curves[name], x, y)
                    for index, name in enumerate(series)
                    if chart.curves.get(name)
                ],
            }
        )
    return charts


def _make_curve(
    name: str, colour: int, points: Sequence[tuple[float, float]], x: _Axis, y: _Axis
) -> dict[str, Any]:
    """An SVG path with a gap at each value that is not finite, and dots if there are few."""
    path, pen_down, dots = [], False, []
    for step, value in points:
        if not math.isfinite(value):
            pen_down = False
            continue
        at = (x.place(step), y.place(value))
        path.append(f"{'L' if pen_down else 'M'}{at[0]:g} {at[1]:g}")
        pen_down = True
        dots.append((*at, f"{name}, step {step:,}: {_format_number(value)}"))
    return {
        "name": name,
        "colour": colour,
        "path": "".join(path),
        "dots": dots if len(dots) <= _MAX_DOTS else [],
    }
