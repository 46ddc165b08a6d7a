"""`infer` interrupted and run again, in several processes, and into an object store."""

import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from saved_runs import infer_lines, make_run, save_step
from small_run import content
from test_metrics import object_store  # noqa: F401  a fixture

from t5x_lite import infer, infer_output
from t5x_lite.decoding import DecodeConfig
from t5x_lite.errors import Failure, UsageError

WORDS = ["the", "function", "returns", "a", "list", "of", "values", "in", "order", "names"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", (4,))


# ---- going on ------------------------------------------------------------------------------------

RESUMABLE = {"decode": DecodeConfig("sample", temperature=0.7), "seed": 5, "batch_size": 2}

KILLED = """
import os, random, signal, sys
from t5x_lite import infer, infer_output
from t5x_lite.decoding import DecodeConfig

append = infer_output._LocalOutput.append
windows, cut = int(sys.argv[4]), float(sys.argv[5])

def append_or_die(self, lines):
    global windows
    if windows == 0:  # in the middle of a write
        data = b"".join(lines)
        self._file.write(data[: int(len(data) * cut)])
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    windows -= 1
    append(self, lines)

infer_output._LocalOutput.append = append_or_die
decode = DecodeConfig("sample", temperature=0.7)
infer.infer(infer.InferConfig(
    sys.argv[1], sys.argv[2], input=sys.argv[3], decode=decode, seed=5, batch_size=2))
"""


@pytest.fixture(scope="module")
def whole(run_dir, tmp_path_factory):
    """A folder with `in.txt`, and the output of a call that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=rng.randrange(8))) for _ in range(150)]
    (folder / "in.txt").write_text("\n".join(lines) + "\n")
    infer_lines(run_dir, folder / "out.jsonl", input=str(folder / "in.txt"), **RESUMABLE)
    return folder


def test_kill_9_in_the_middle_of_a_line(run_dir, whole, tmp_path, repo):
    """Twice, at random places; then the same bytes as without."""
    output = tmp_path / "out.jsonl"
    rng = random.Random(2)
    for windows in (0, 2):
        cut = rng.random()
        command = [sys.executable, "-c", KILLED, str(run_dir), str(output)]
        command += [str(whole / "in.txt"), str(windows), str(cut)]
        killed = subprocess.run(command, check=False, cwd=repo, capture_output=True, timeout=120)
        assert killed.returncode == -9, killed.stderr.decode()[-2000:]
        assert len(output.read_bytes()) < len((whole / "out.jsonl").read_bytes()), cut
    infer_lines(run_dir, output, input=str(whole / "in.txt"), **RESUMABLE)
    assert output.read_bytes() == (whole / "out.jsonl").read_bytes(), cut


def test_whatever_is_left_it_goes_on_to_the_same_bytes(run_dir, whole, tmp_path):
    """Also with zeros at the end, which a power cut can leave, and another batch size."""
    complete = (whole / "out.jsonl").read_bytes()
    rng = random.Random(1)
    cuts = [0, 1, len(complete) - 1, *(rng.randrange(len(complete)) for _ in range(5))]
    for i, cut in enumerate(cuts):
        shutil.copy(whole / "out.jsonl.state.json", tmp_path / "out.jsonl.state.json")
        zeros = b"\0" * 100 if i % 2 else b""
        (tmp_path / "out.jsonl").write_bytes(complete[:cut] + zeros)
        infer_lines(run_dir, tmp_path / "out.jsonl", input=str(whole / "in.txt"), **RESUMABLE)
        assert (tmp_path / "out.jsonl").read_bytes() == complete, cut
    (tmp_path / "out.jsonl").write_bytes(complete[: len(complete) // 2])
    other = RESUMABLE | {"batch_size": 3}
    records = infer_lines(run_dir, tmp_path / "out.jsonl", input=str(whole / "in.txt"), **other)
    texts = [json.loads(line)["prediction"] for line in complete.splitlines()]
    assert [r["prediction"] for r in records] == texts


def test_a_complete_output_is_left_as_it_is(run_dir, whole, capsys, monkeypatch):
    before = content(whole)
    monkeypatch.setattr(infer.saved_run, "load_params", None)
    infer_lines(run_dir, whole / "out.jsonl", input=str(whole / "in.txt"), **RESUMABLE)
    assert content(whole) == before
    assert f"complete: 150 lines in {whole}/out.jsonl" in capsys.readouterr().out


def test_it_goes_on_with_the_checkpoint_it_began_with(run_dir, whole, tmp_path):
    """The run has trained on meanwhile."""
    copy = shutil.copytree(run_dir, tmp_path / "run")
    for name in ("out.jsonl", "out.jsonl.state.json"):
        shutil.copy(whole / name, tmp_path / name)
    complete = (whole / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").write_bytes(complete[: len(complete) // 2])
    save_step(copy, 6)
    given = {"input": str(whole / "in.txt"), **RESUMABLE}
    infer_lines(copy, tmp_path / "out.jsonl", **given)
    assert (tmp_path / "out.jsonl").read_bytes() == complete
    with pytest.raises(UsageError, match="begun with other settings: step 4 -> 6"):
        infer_lines(copy, tmp_path / "out.jsonl", checkpoint="6", **given)
    # Complete, a run's own output does not need the checkpoint any more.
    infer_lines(copy, tmp_path / "own.jsonl", checkpoint="4", **given)
    assert (tmp_path / "own.jsonl").read_bytes() == complete
    shutil.rmtree(copy / "checkpoints" / "4")
    infer_lines(copy, tmp_path / "own.jsonl", checkpoint="4", **given)


def test_another_runs_output_is_never_taken_for_its_own(run_dir, whole, tmp_path):
    """Not even by a run that never had the step with which it was begun."""
    other = shutil.copytree(run_dir, tmp_path / "other")
    copy = shutil.copytree(whole, tmp_path / "out")
    step = json.loads((copy / "out.jsonl.state.json").read_text())["step"]
    shutil.rmtree(other / "checkpoints" / str(step))
    before = content(copy)
    with pytest.raises(UsageError, match="other settings: checkpoint_sha256"):
        infer_lines(other, copy / "out.jsonl", input=str(whole / "in.txt"), **RESUMABLE)
    assert content(copy) == before


def test_of_two_that_begin_together_one_gets_the_output(tmp_path):
    infer_output.claim(tmp_path / "out.jsonl", {"seed": 1})
    with pytest.raises(UsageError, match="another process is writing it"):
        infer_output.claim(tmp_path / "out.jsonl", {"seed": 2})
    assert infer_output.read_settings(tmp_path / "out.jsonl") == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.state.json"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seed": 6}, "other settings: seed 5 -> 6; give another file"),
        ({"decode": DecodeConfig()}, "method 'sample' -> 'greedy'; temperature 0.7 -> 1.0"),
        ({"target_length": 4}, "target_length 8 -> 4"),
        ({"prefix": "a: "}, "prefix '' -> 'a: '"),
        ({"input": "{tmp}/other.txt"}, "input_sha256"),
    ],
    ids=str,
)
def test_other_settings_are_refused(run_dir, whole, tmp_path, options, expected):
    (tmp_path / "other.txt").write_text("another text\n")
    options = {
        k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v
        for k, v in options.items()
    }
    before = content(whole)
    with pytest.raises(UsageError) as error:
        infer_lines(
            run_dir, whole / "out.jsonl", **{"input": str(whole / "in.txt"), **RESUMABLE, **options}
        )
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert content(whole) == before


def test_somebody_elses_file_is_not_touched(run_dir, tmp_path):
    (tmp_path / "in.txt").write_text("a line\n")
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"it exists, and no out\.jsonl.state.json says"):
        infer_lines(run_dir, tmp_path / "out.jsonl", input=str(tmp_path / "in.txt"))
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_two_processes_at_one_file(run_dir, whole):
    before = content(whole)
    with (whole / "out.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process is writing it"):
            infer_lines(run_dir, whole / "out.jsonl", input=str(whole / "in.txt"), **RESUMABLE)
    assert content(whole) == before


def test_a_full_disk_is_one_line():
    full = infer_output._LocalOutput("/dev/full")
    with open("/dev/full", "ab", buffering=0) as f:
        full._file = f
        with pytest.raises(Failure, match="No space left on device; what is written stays"):
            full.append([b"{}\n"])


# ---- an object store -----------------------------------------------------------------------------


def test_an_object_store_gets_parts_and_then_the_whole(
    run_dir,
    whole,
    object_store,  # noqa: F811
    monkeypatch,
):
    store, key = object_store, "gs://bucket/out.jsonl"
    store.objects["gs://bucket/in.txt"] = (whole / "in.txt").read_bytes()
    monkeypatch.setattr(infer_output, "_SECONDS_BETWEEN_PARTS", -1.0)
    append = infer_output._ObjectOutput.append
    left = [2]

    def killed(self, lines):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, lines)

    monkeypatch.setattr(infer_output._ObjectOutput, "append", killed)
    given = {"input": "gs://bucket/i*.txt", **RESUMABLE}
    with pytest.raises(KeyboardInterrupt):
        infer_lines(run_dir, key, **given)
    assert sorted(store.objects) == [
        "gs://bucket/in.txt",
        f"{key}.parts/000000000000",
        f"{key}.parts/000000000032",
        f"{key}.state.json",
    ]
    left[0] = 99
    for _ in range(2):
        infer_lines(run_dir, key, **given)
        assert store.objects[key] == (whole / "out.jsonl").read_bytes()
        assert sorted(store.objects) == ["gs://bucket/in.txt", key, f"{key}.state.json"]


# ---- several processes --------------------------------------------------------------------------

TWO_PROCESSES = """
import sys
import jax
rank = int(sys.argv[1])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, rank)
from t5x_lite import infer
infer.infer(infer.InferConfig(
    sys.argv[3], sys.argv[4], input=sys.argv[5], batch_size=4))
"""


def test_two_processes_write_what_one_does(run_dir, tmp_path, repo):
    """Each decodes its rows of every batch; one of them writes."""
    (tmp_path / "in.txt").write_text("".join(f"a list of {word}\n" for word in WORDS))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command, inputs = [sys.executable, "-c", TWO_PROCESSES], str(tmp_path / "in.txt")
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(run_dir), str(tmp_path / "two.jsonl"), inputs],
            cwd=repo,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    logs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs[0][1][-2000:] + logs[1][1]
    assert "complete: 10 lines" in logs[0][0] and "complete" not in logs[1][0]
    one = infer_lines(run_dir, tmp_path / "one.jsonl", input=str(tmp_path / "in.txt"))
    two = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [r["prediction"] for r in two] == [r["prediction"] for r in one]
    scores = [[r["score"] for r in records] for records in (one, two)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
