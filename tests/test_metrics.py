"""Metrics: ratios against arithmetic, files against other readers, and two kinds of file system."""

import io
import json
import math
import os
import pathlib
import posixpath
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath

from t5x_lite import metrics
from t5x_lite.errors import UsageError
from t5x_lite.metrics import MetricWriter, read_metrics, summarize


def strict_lines(data: bytes) -> list[dict]:
    """Parses JSON lines, refusing the NaN and Infinity that Python's reader lets through."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    assert data.endswith(b"\n") or not data
    return [json.loads(line, parse_constant=refuse) for line in data.splitlines()]


def tensorboard_scalars(directory: pathlib.Path) -> list[tuple[int, dict[str, float]]]:
    """(step, scalars) of each event, by TensorFlow's own reader, which checks every checksum."""
    tf = pytest.importorskip("tensorflow")
    (path,) = directory.iterdir()
    assert "tfevents" in path.name
    events = list(tf.compat.v1.train.summary_iterator(str(path)))
    assert events[0].file_version == "brain.Event:2"
    assert events[1].session_log.status == 1  # START: TensorBoard forgets what it had
    return [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events[2:]]


def without_time(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "unix_time"} for r in records]


def test_summarize_divides_sums_by_tokens():
    sums = {
        "loss_sum": np.float32(30.0),
        "z_loss_sum": np.float32(0.5),
        "num_correct": np.float32(5.0),
        "num_tokens": np.float32(20.0),
        "text_loss_sum": np.float32(24.0),
        "num_text_tokens": np.float32(16.0),
        "grad_norm": np.float32(1.25),
        "learning_rate": np.float32(0.5),
    }
    assert summarize(sums) == {
        "loss": 1.5,
        "z_loss": 0.025,
        "accuracy": 0.25,
        "text_loss": 1.5,
        "num_tokens": 20.0,
        "num_text_tokens": 16.0,
        "grad_norm": 1.25,
        "learning_rate": 0.5,
    }


def test_summarize_of_no_tokens_is_nan():
    ratios = summarize({"loss_sum": 0.0, "num_tokens": 0.0})
    assert math.isnan(ratios["loss"])
    assert set(ratios) == {"loss", "num_tokens"}


def test_lines_and_events_agree_while_the_run_goes_on(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in (10, 20, 30):
        writer.write("train", step, {"loss": np.float32(1.5) / step, "num_tokens": 7})
        # No flush: on a mounted file system a line is there when write returns.
        lines = strict_lines((tmp_path / "metrics/train.jsonl").read_bytes())
        assert lines[-1]["step"] == step
    assert lines[0]["num_tokens"] == 7
    assert abs(lines[0]["unix_time"] - time.time()) < 60
    events = tensorboard_scalars(tmp_path / "tensorboard/train")
    assert events == [
        (r["step"], {"loss": np.float32(r["loss"]), "num_tokens": 7.0}) for r in lines
    ]


def test_non_finite_values_are_null_and_come_back_as_nan(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write("train", 1, {"loss": float("nan"), "grad_norm": np.float32("inf"), "rate": 0.5})
    path = tmp_path / "metrics/train.jsonl"
    (line,) = strict_lines(path.read_bytes())
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert line["rate"] == 0.5
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"])
    ((_, scalars),) = tensorboard_scalars(tmp_path / "tensorboard/train")
    assert math.isnan(scalars["loss"])
    # And they survive being rewritten.
    resumed = MetricWriter(tmp_path)
    resumed.write("train", 2, {"loss": 1.0})
    assert strict_lines(path.read_bytes())[0] == line


def test_resuming_leaves_one_line_and_one_event_per_step(tmp_path):
    killed = MetricWriter(tmp_path)
    for step in (10, 20, 30, 40):
        killed.write("train", step, {"loss": 1.0 / step})
    killed.write("glue/cola", 20, {"mcc": 0.25})
    killed.write("glue/cola", 40, {"mcc": 0.5})
    path = tmp_path / "metrics/train.jsonl"
    with path.open("ab") as f:
        f.write(b'{"step": 50, "lo')  # kill -9 in the middle of a write

    resumed = MetricWriter(tmp_path)
    resumed.drop_after(25)
    for step in (30, 40, 50):
        resumed.write("train", step, {"loss": 2.0 / step})
    resumed.write("glue/cola", 40, {"mcc": 0.75})
    resumed.close()

    want = [(10, 0.1), (20, 0.05), (30, 2 / 30), (40, 0.05), (50, 0.04)]
    lines = without_time(strict_lines(path.read_bytes()))
    assert lines == [{"step": step, "loss": loss} for step, loss in want]
    assert tensorboard_scalars(tmp_path / "tensorboard/train") == [
        (step, {"loss": np.float32(loss)}) for step, loss in want
    ]
    cola = strict_lines((tmp_path / "metrics/glue_cola.jsonl").read_bytes())
    assert without_time(cola) == [{"step": 20, "mcc": 0.25}, {"step": 40, "mcc": 0.75}]
    assert tensorboard_scalars(tmp_path / "tensorboard/glue_cola") == [
        (20, {"mcc": 0.25}),
        (40, {"mcc": 0.75}),
    ]


def test_a_step_that_is_written_again_replaces_its_line(tmp_path):
    MetricWriter(tmp_path).write("validation", 20, {"loss": 2.0})
    writer = MetricWriter(tmp_path)
    writer.write("validation", 20, {"loss": 1.5})
    writer.write("validation", 10, {"loss": 3.0})
    lines = strict_lines((tmp_path / "metrics/validation.jsonl").read_bytes())
    assert without_time(lines) == [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 1.5}]
    events = tensorboard_scalars(tmp_path / "tensorboard/validation")
    assert events == [(10, {"loss": 3.0}), (20, {"loss": 1.5})]


def test_a_crash_while_dropping_leaves_the_old_lines(tmp_path, monkeypatch):
    writer = MetricWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write("train", step, {"loss": 1.0})
    before = (tmp_path / "metrics/train.jsonl").read_bytes()

    def crash(*_args):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            writer.drop_after(1)
    assert (tmp_path / "metrics/train.jsonl").read_bytes() == before
    MetricWriter(tmp_path).drop_after(1)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics/train.jsonl")] == [1]
    assert [step for step, _ in tensorboard_scalars(tmp_path / "tensorboard/train")] == [1]


def test_a_killed_process_costs_at_most_the_line_it_was_writing(tmp_path, repo):
    program = (
        "import sys; from t5x_lite.metrics import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1])\n"
        "for step in range(1, 10**9): writer.write('train', step, {'loss': 1.0 / step})"
    )
    path = tmp_path / "metrics/train.jsonl"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=repo)
    try:
        deadline = time.monotonic() + 60
        while not path.exists() or path.stat().st_size < 20_000:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    num_whole = path.read_bytes().count(b"\n")

    writer = MetricWriter(tmp_path)
    writer.write("train", num_whole + 1, {"loss": 0.0})
    steps = [r["step"] for r in read_metrics(path)]
    assert steps == list(range(1, num_whole + 2))
    assert [s for s, _ in tensorboard_scalars(tmp_path / "tensorboard/train")] == steps


@pytest.mark.parametrize("line", [b"{'step': 1}", b'{"loss": 1}', b"[1]", b'{"step": 1, "a": "b"}'])
def test_a_corrupt_line_is_named(tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(UsageError, match=r"train\.jsonl:2 is not a metrics line") as error:
        read_metrics(path)
    assert "\n" not in str(error.value)


def test_two_names_that_share_a_file_are_refused(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write("a/b", 1, {"loss": 1.0})
    with pytest.raises(UsageError, match="'a:b' and of 'a/b' would both"):
        writer.write("a:b", 1, {"loss": 1.0})
    writer.write("../../etc/x", 1, {"loss": 1.0})
    assert not (tmp_path.parent / "etc").exists()


class ObjectStore(backend.Backend):
    """Objects by key, put whole when closed. No append, no rename, no directory but a prefix."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.num_puts = 0

    def open(self, path, mode):
        if mode == "rb":
            if path not in self.objects:
                raise FileNotFoundError(path)
            return io.BytesIO(self.objects[path])
        if mode != "wb":
            raise NotImplementedError(f"open mode {mode!r}")
        store = self

        class Put(io.BytesIO):
            def close(self):
                if not self.closed:
                    store.objects[path] = self.getvalue()
                    store.num_puts += 1
                super().close()

        return Put()

    def _below(self, path):
        return [key for key in self.objects if key.startswith(path.rstrip("/") + "/")]

    def exists(self, path):
        return path in self.objects or self.isdir(path)

    def isdir(self, path):
        return bool(self._below(path))

    def glob(self, path):
        directory, pattern = posixpath.split(path)
        keys = [pathlib.PurePosixPath(key) for key in self._below(directory)]
        return [
            f"{directory}/{key.name}"
            for key in keys
            if posixpath.basename(posixpath.dirname(key)) == posixpath.basename(directory)
            and key.match(pattern)
        ]

    def remove(self, path):
        if path not in self.objects:
            raise FileNotFoundError(path)
        del self.objects[path]

    def makedirs(self, path, *, exist_ok=False, mode=None):
        """A prefix needs no making."""

    mkdir = makedirs

    def _refuse(self, *_args, **_kwargs):
        raise NotImplementedError("not in an object store")

    listdir = walk = rmtree = rename = replace = copy = stat = _refuse


@pytest.fixture
def object_store(monkeypatch):
    store = ObjectStore()
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    return store


def test_writer_on_a_file_system_without_append_and_rename(object_store, tmp_path):
    model_dir = epath.Path("gs://bucket/run")
    with pytest.raises(NotImplementedError):
        (model_dir / "x").open("ab")
    with pytest.raises(NotImplementedError):
        (model_dir / "x").rename(model_dir / "y")

    writer = MetricWriter(model_dir)
    for step in range(1, 101):
        writer.write("train", step, {"loss": 1.0 / step})
        writer.write("validation", step, {"loss": 2.0 / step})
    writer.flush()
    # Whole objects are rewritten, so they are not rewritten for every line.
    assert object_store.num_puts <= 12
    killed = MetricWriter(model_dir)
    killed.write("train", 101, {"loss": 0.0})

    resumed = MetricWriter(model_dir)
    resumed.drop_after(60)
    resumed.write("train", 61, {"loss": 9.0})
    resumed.close()

    def steps(name):
        return [r["step"] for r in strict_lines(object_store.objects[name])]

    assert steps("gs://bucket/run/metrics/train.jsonl") == list(range(1, 62))
    assert steps("gs://bucket/run/metrics/validation.jsonl") == list(range(1, 61))
    assert len(object_store.objects) == 4  # two series, and one event file for each
    assert read_metrics(model_dir / "metrics/train.jsonl")[-1]["loss"] == 9.0
    (event_key,) = object_store._below("gs://bucket/run/tensorboard/train")
    (tmp_path / posixpath.basename(event_key)).write_bytes(object_store.objects[event_key])
    events = tensorboard_scalars(tmp_path)
    assert [step for step, _ in events] == list(range(1, 62))
    assert events[-1][1] == {"loss": 9.0}


def test_an_object_store_is_written_again_after_a_while(object_store, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    writer = MetricWriter("gs://bucket/run")
    key = "gs://bucket/run/metrics/train.jsonl"
    writer.write("train", 1, {"loss": 1.0})
    now[0] += 29
    writer.write("train", 2, {"loss": 1.0})
    assert len(strict_lines(object_store.objects[key])) < 2
    now[0] += 2
    writer.write("train", 3, {"loss": 1.0})
    assert len(strict_lines(object_store.objects[key])) == 3
