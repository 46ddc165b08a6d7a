"""Progress: what is printed to a file, and what a terminal shows."""

import io
import os
import re
import time

import pytest

from t5x_lite.progress import Progress, format_seconds


def read_terminal(descriptor: int) -> str:
    """Everything that was shown, once the other side is closed."""
    shown = b""
    try:
        while data := os.read(descriptor, 1 << 16):
            shown += data
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(descriptor)
    return shown.decode()


VALUES = {
    "loss": 5.12345,
    "learning_rate": 0.01,
    "target_tokens_per_second": 12345.4,
    "accuracy": 0.5,
}


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_plain_lines(clock):
    stream = io.StringIO()
    with Progress(2000, stream=stream) as progress:
        for step in range(1, 201):
            # The first step compiles for an hour, every other takes half a second.
            clock[0] += 3600 if step == 1 else 0.5
            progress.update(step)
        progress.log(200, VALUES)
        progress.message("validation [step 200]")
        progress.log(2000, {"loss": float("nan")})
    # 1800 steps at 0.5 s are left.
    assert stream.getvalue() == (
        "step 200/2000  loss 5.123  rate 1.0e-02  12,345 tokens/s  15m00s left\n"
        "validation [step 200]\n"
        "step 2000/2000  loss nan\n"
    )


def test_time_left_of_a_resumed_run_counts_its_own_steps_only(clock):
    stream = io.StringIO()
    with Progress(1000, start_step=900, stream=stream) as progress:
        progress.log(901, {})
        clock[0] += 9
        progress.log(910, {})
    assert stream.getvalue() == "step 901/1000\nstep 910/1000  1m30s left\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (45, "45s"),
        (59.6, "1m00s"),
        (92, "1m32s"),
        (3599.7, "1h00m"),
        (2 * 3600 + 5 * 60, "2h05m"),
        (24 * 3600 - 20, "1d00h"),
        (3 * 86400 + 4 * 3600, "3d04h"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("columns", ["100", "60"])
def test_bar_on_a_terminal(monkeypatch, columns):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", columns)
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as stream, Progress(2000, start_step=100, stream=stream) as bar:
        bar.update(101)
        bar.log(200, VALUES)
        bar.message("validation [bold]loss[/bold] 4.5")
        bar.update(300)
    shown = read_terminal(ours)
    assert "\x1b[?25h" in shown  # the cursor is back
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "validation [bold]loss[/bold] 4.5" in text  # as it is: nothing of it is markup
    last = text.rstrip().splitlines()[-1]
    assert len(last) <= int(columns)
    assert "300/2,000" in last
    assert "loss 5.123  rate 1.0e-02  12,345 tokens/s" in last
    if columns == "100":
        assert last.rstrip().endswith(" left")


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as stream, Progress(10, stream=stream) as progress:
        progress.log(5, {"loss": 1.0})
    assert read_terminal(ours) == "step 5/10  loss 1.000\r\n"
