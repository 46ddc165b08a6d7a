"""The report: well-formed, self-contained, escaped, and its curves where the numbers are."""

import html.parser
import json
import os
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from t5x_lite.errors import UsageError
from t5x_lite.metrics import MetricWriter
from t5x_lite.report import write_report

ATTACK = "<script>alert('x')</script>&<img src=http://evil.example/a.png>"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and keeps what the page would load and what it shows."""

    def __init__(self, text):
        super().__init__()
        self.open_tags, self.tags, self.references, self.shown = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open_tags == []
        self.text = " ".join("".join(self.shown).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [v for k, v in attributes if k in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1] not in ("style", "script"):
            self.shown.append(data + " ")


@pytest.fixture
def run(tmp_path):
    """What a small run leaves."""
    model_dir = tmp_path / "my<run>"
    writer = MetricWriter(model_dir)
    for step in range(10, 310, 10):
        loss = 3.0 + 300.0 / step
        train = {"loss": loss, "accuracy": 0.5 - 1 / step, "learning_rate": step**-0.5}
        writer.write("train", step, train | {"target_tokens_per_second": 1e5 + step})
        if step % 100 == 0:
            values = {"loss": loss + 0.5, "text_loss": loss + 1.0, "bleu": step / 10}
            writer.write("validation", step, values)
    writer.close()
    (model_dir / "metrics/baselines.json").write_text('{"unigram_loss": 6.5}')
    model = {
        "architecture": {"d_model": 64},
        "feature_lengths": {"inputs": 512, "targets": 114},
        "task": "python_docs_span_corruption",
        "num_parameters": 1234567,
    }
    (model_dir / "model.json").write_text(json.dumps(model))
    (model_dir / "config.gin").write_text(f"TRAIN_STEPS = 400\nseed = 0  # {ATTACK}\n")
    (model_dir / "inference").mkdir()
    for step in (90, 300):
        example = {
            "inputs": f"step{step} {ATTACK} the <extra_id_0> sat",
            "targets": "<extra_id_0> cat",
            "prediction": ["not", 1, "string"],
        }
        path = model_dir / f"inference/docs-{step}.jsonl"
        path.write_text(json.dumps(example) + "\n" + '{"inputs": "torn')
    return model_dir


def read_page(model_dir) -> tuple[str, Page]:
    path = write_report(model_dir)
    assert os.fspath(path) == str(model_dir / "report.html")
    text = (model_dir / "report.html").read_text()
    return text, Page(text)


def test_page_is_well_formed_and_self_contained(run):
    text, page = read_page(run)
    assert text.startswith("<!DOCTYPE html>")
    assert page.references == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_page_shows_text_as_it_is(run):
    _, page = read_page(run)
    assert page.text.count(ATTACK) == 2  # the configuration and one prediction, as text
    assert "my<run>" in page.text


def test_page_shows_the_figures_of_the_run(run):
    _, page = read_page(run)
    for shown in (
        "parameters 1,234,567",
        "steps 300 of 400",
        "train loss 4.000 nats per target token",
        "validation loss 4.500 nats per target token",
        "unigram baseline 6.500 nats per text token",
        "throughput 100,155 tokens/s",
        "python_docs_span_corruption · inputs 512, targets 114",
        "validation: 5.000 nats per text token, 1.500 below what a unigram model",
        "bleu",
        "30.00",
        '["not", 1, "string"]',
        '"d_model": 64',
    ):
        assert shown in page.text, shown
    assert "step300" in page.text
    assert "step90" not in page.text  # only the newest predictions


def parse_chart(text: str, title: str):
    """A chart's curves in data units, by the labels of its axes, and its dashed line."""
    (svg,) = re.findall(rf'<svg[^>]*aria-label="{title} against step".*?</svg>', text, re.DOTALL)
    root = ElementTree.fromstring(svg)
    y_labels, x_labels = [], []
    for element in root.findall("text"):
        label = element.text.replace("k", "e3")
        if element.get("text-anchor") == "end" and element.get("class") is None:
            y_labels.append((float(element.get("y")) - 4, float(label)))
        elif element.get("text-anchor") == "middle" and label != "step":
            x_labels.append((float(element.get("x")), float(label)))
    scales = [np.polyfit(*zip(*labels, strict=True), 1) for labels in (x_labels, y_labels)]
    curves = []
    for path in root.findall("path"):
        pixels = np.array(re.findall(r"[ML](\S+) ([^ML]+)", path.get("d")), float)
        curves.append(np.stack([np.polyval(scales[i], pixels[:, i]) for i in (0, 1)], axis=1))
    lines = [line for line in root.findall("line") if line.get("class") == "baseline"]
    levels = [float(np.polyval(scales[1], float(line.get("y1")))) for line in lines]
    return curves, levels


def test_curves_are_where_their_axes_say(run):
    text, _ = read_page(run)
    train, validation = parse_chart(text, "Loss")[0]
    steps = np.arange(10, 310, 10)
    # Pixels are rounded to a tenth: about 0.06 of a step and 0.02 nats here.
    np.testing.assert_allclose(train[:, 0], steps, atol=0.1)
    np.testing.assert_allclose(train[:, 1], 3 + 300 / steps, atol=0.03)
    np.testing.assert_allclose(validation, [(100, 6.5), (200, 5.0), (300, 4.5)], atol=0.1)
    curves, levels = parse_chart(text, "Text loss")
    np.testing.assert_allclose(curves[0], [(100, 7.0), (200, 5.5), (300, 5.0)], atol=0.1)
    np.testing.assert_allclose(levels, [6.5], atol=0.01)
    (throughput,), _ = parse_chart(text, "Throughput")
    np.testing.assert_allclose(throughput[:, 1], 1e5 + steps, atol=60)


def test_a_value_that_is_not_finite_is_a_gap(tmp_path):
    writer = MetricWriter(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.0), (3, float("nan")), (4, 2.5), (5, 2.25)):
        writer.write("train", step, {"loss": loss, "grad_norm": float("nan")})
    text, _ = read_page(tmp_path)
    (path,) = re.findall(r'<path class="curve c0" d="([^"]*)"', text)
    assert re.sub(r"[^ML]", "", path) == "MLML"
    assert "Gradient norm" not in text


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.gin", "TRAIN_STEPS = 10\n"), ("model.json", "{}"), ("metrics/train.jsonl", "")],
)
def test_what_is_missing_is_said(tmp_path, name, content):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    _, page = read_page(tmp_path)
    assert "No metrics have been logged yet." in page.text
    assert "No evaluation has been run yet." in page.text
    assert "No predictions have been written to inference/ yet." in page.text
    if name != "config.gin":
        assert "There is no config.gin here." in page.text
    assert "There is no model.json here" in page.text


@pytest.mark.parametrize("values", [[0.0], [2.5], [0.0, 0.0], [-1.0, -1.0], [1e-9, 3e6]])
def test_any_range_can_be_drawn(tmp_path, values):
    writer = MetricWriter(tmp_path)
    for step, value in enumerate(values):
        writer.write("test", step, {"score": value})
    text, _ = read_page(tmp_path)
    (svg,) = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert "nan" not in svg
    circles = ElementTree.fromstring(svg).findall("circle")
    assert len(circles) == len(values)
    assert all(0 <= float(c.get("cy")) <= 260 and 0 <= float(c.get("cx")) <= 560 for c in circles)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a run: it has neither config.gin"),
        ({"model.json": "{"}, r"model\.json is not JSON"),
        ({"model.json": "[]"}, r"model\.json holds no JSON object but a list"),
        ({"model.json": "{}", "inference/a-1.jsonl": "1\n"}, r"a-1\.jsonl:1 is not a JSON object"),
    ],
)
def test_bad_input_is_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_no_such_directory(tmp_path):
    with pytest.raises(UsageError, match=r"'.*/nowhere' is not a directory"):
        write_report(tmp_path / "nowhere")


def test_a_task_is_shown_beside_answers_without_a_model(run):
    """Its accuracy, in percent, has an axis apart from the share of tokens."""
    writer = MetricWriter(run)
    writer.write("my_task", 100, {"num_examples": 7, "accuracy": 30.0})
    writer.write("my_task", 200, {"num_examples": 7, "accuracy": 71.25})
    baseline = {"name": "always 'yes'", "metrics": {"accuracy": 52.5}}
    (run / "metrics/baselines.json").write_text(
        json.dumps({"unigram_loss": 6.5, "tasks": {"my_task": baseline}})
    )
    text = Page(write_report(run).read_text()).text
    assert "my_task: accuracy 71.2; always 'yes' gives 52.5." in text
    assert "accuracy my_task" in text
    assert "always 'yes' 52.5" in text
    assert "my_task, step 200: 71.25" in text
