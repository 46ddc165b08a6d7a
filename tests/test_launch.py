"""launch/ on one machine and under Slurm, its container, and the page about all of it."""

import json
import re
import shlex
import signal
import subprocess
import sys
import threading

import pytest
from launchers import answers, calls, done, refusal, shown, stand_ins
from small_run import metric_lines, steps, train_argv

from t5x_lite import gin_utils

__all__ = ["stand_ins"]  # a fixture

# Stands in for t5x_lite: shows what it got, then does what its second argument says.
PROGRAM = """
import json, os, signal, sys, time
names = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES")
print(json.dumps([sys.argv[1:], {n: os.environ[n] for n in names if n in os.environ}]))
print("two", file=sys.stderr)
what, process = sys.argv[2], sys.argv[-1].removeprefix("--process_id=")

def save(number, frame):
    print("saved")
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
print("ready")
if what == "fail_in_1" and process == "1":
    sys.exit(3)
if what == "die_in_1" and process == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what != "end":
    time.sleep(60)
"""

# ---- local.py ------------------------------------------------------------------------------------


def test_local_dry_run():
    lines = shown(
        *("local.py", "--num_processes=2", "--cpu_devices=4", "--dry_run"),
        *("train", "--gin_file=gs://a b.gin", "--x"),
    )
    for i, line in enumerate(lines):
        address = re.search(r"--coordinator_address=(127\.0\.0\.1:\d+)", lines[0])[1]
        assert line == (
            f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 {sys.executable} -m t5x_lite train "
            f"'--gin_file=gs://a b.gin' --x --coordinator_address={address} --num_processes=2 "
            f"--process_id={i}"
        )
    lines = shown("local.py", "--num_processes=3", "--gpus", "--dry_run", "train")
    assert [line.split()[:2] for line in lines] == [
        ["JAX_PLATFORMS=cuda", f"CUDA_VISIBLE_DEVICES={i}"] for i in range(3)
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--num_processes=2", "--cpu_devices=1"), "say what to run"),
        (("--num_processes=2", "train"), "--cpu_devices --gpus is required"),
        (("--num_processes=0", "--gpus", "train"), "at least 1"),
        (("--num_processes=1", "--gpus", "trian"), "'trian' is no verb of t5x_lite that is run h"),
        (("--num_processes=1", "--gpus", "plan"), "it is one of train, eval, infer"),
        (("--num_processes=1", "--gpus", "eval", "--dry_run"), "put it before 'eval'"),
        (("--num_processes=1", "--gpus", "train", "--gin_file=no.gin"), "no.gin: no such file in"),
        (("--num_processes=1", "--gpus", "train", "--gin_file", "/no.gin"), "/no.gin: no such"),
    ],
)
def test_local_refuses(arguments, expected):
    assert expected in refusal("local.py", *arguments)


def start_local(repo, tmp_path, what: str) -> subprocess.Popen[str]:
    """Two processes of PROGRAM behind local.py."""
    (tmp_path / "t5x_lite").mkdir()
    (tmp_path / "t5x_lite" / "__main__.py").write_text(PROGRAM)
    launcher = repo / "launch" / "local.py"
    return subprocess.Popen(
        [sys.executable, launcher, "--num_processes=2", "--cpu_devices=3", "train", what],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_local_starts_all_and_marks_their_lines(repo, tmp_path):
    out, error = (process := start_local(repo, tmp_path, "end")).communicate(timeout=30)
    assert process.returncode == 0
    assert sorted(error.splitlines()) == ["[0] two", "[1] two"]
    for i in range(2):
        first, second = [line for line in out.splitlines() if line.startswith(f"[{i}] ")]
        argv, environment = json.loads(first[4:])
        assert argv[:2] == ["train", "end"] and argv[3:] == [
            "--num_processes=2",
            f"--process_id={i}",
        ]
        assert environment == {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3"}
        assert second == f"[{i}] ready"


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("fail_in_1", 3, "process 1 ended with exit code 3; ending the others"),
        ("die_in_1", 128 + signal.SIGKILL, "process 1 was killed by signal 9; ending the others"),
    ],
)
def test_local_ends_all_when_one_fails(repo, tmp_path, what, code, said):
    out, error = (process := start_local(repo, tmp_path, what)).communicate(timeout=30)
    assert process.returncode == code
    assert f"local.py: {said}\n" in error
    # The other one was told, unless that was before it could listen.
    assert "[0] saved" in out or "[0] ready" not in out
    assert "[1] saved" not in out


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_local_hands_signals_on(repo, tmp_path, number):
    process = start_local(repo, tmp_path, "wait")
    assert process.stdout is not None
    seen = ""
    while seen.count("ready") < 2:
        seen += process.stdout.readline()
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 143
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]
    assert "local.py" not in error


def test_local_finds_gin_files_where_t5x_lite_does(tmp_path):
    """In the current directory, in the search paths, in the checkout, and where an absolute is."""
    (tmp_path / "sub").mkdir()
    for name in ("a.gin", "sub/b.gin"):
        (tmp_path / name).write_text("")
    files = ("a.gin", "b.gin", "gin_configs/runs/pretrain.gin", tmp_path / "a.gin", "gs://b/c.gin")
    flags = [f"--gin_file={file}" for file in files]
    shown(
        *("local.py", "--num_processes=1", "--gpus", "--dry_run", "train"),
        *("--gin_search_paths=no,sub", *flags),
        cwd=tmp_path,
    )


def test_local_stops_a_run_of_two_processes(repo, tmp_path):
    """The real `train`: one signal to the launcher, and both processes save the same step."""
    bindings = {"TRAIN_STEPS": 100_000, "EVAL_PERIOD": 100_000, "CHECKPOINT_PERIOD": 100_000}
    command = [
        *(sys.executable, "launch/local.py", "--num_processes=2", "--cpu_devices=2"),
        *train_argv(tmp_path / "run", bindings),
    ]
    with subprocess.Popen(command, cwd=repo, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        kill = threading.Timer(180, process.kill)
        kill.start()
        for line in process.stdout:
            if line.startswith("[0] step 1/"):
                process.send_signal(signal.SIGTERM)
        kill.cancel()
    assert process.returncode == 143
    (saved,) = steps(tmp_path / "run")
    assert [line["step"] for line in metric_lines(tmp_path / "run", "train")][-1] == saved


# ---- slurm.sbatch --------------------------------------------------------------------------------


def test_slurm_dry_run(repo):
    script = repo / "launch" / "slurm.sbatch"
    found = done("bash", script, "--dry_run", "train", "--gin.A='b c'")
    assert found.returncode == 0
    assert shlex.split(found.stdout) == [
        *("srun", "--gpu-bind=none", "--label", ".venv/bin/python", "-m", "t5x_lite"),
        *("train", "--gin.A='b c'", "--distributed"),
    ]


def test_slurm_options(repo):
    """A process for each GPU; a warning before the end; queued again and not written over."""
    text = (repo / "launch" / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@120"
    assert "requeue" in options and options["open-mode"] == "append"


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (0, "RUNNING", False),
        (143, "RUNNING", True),
        (143, "CANCELLED", False),
        (2, "RUNNING", False),
    ],
)
def test_slurm_queues_what_was_stopped_again(repo, stand_ins, monkeypatch, code, state, requeued):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    answers(stand_ins, {"srun": f"{code} ", "squeue": f"0 {state}"})
    assert done("bash", repo / "launch" / "slurm.sbatch", "train").returncode == code
    assert (["scontrol", "requeue", "17"] in calls(stand_ins)) == requeued


# ---- the container -------------------------------------------------------------------------------


def test_container_file(repo):
    text = (repo / "launch" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    steps = [line.split(maxsplit=1) for line in lines]
    assert {name for name, _ in steps} <= {
        *("FROM", "ARG", "RUN", "USER", "WORKDIR", "ENV", "COPY", "ENTRYPOINT")
    }
    assert steps[0][0] == "FROM" and "http" not in "".join(lines)
    assert json.loads(steps[-1][1]) == ["python", "-m", "t5x_lite"]
    assert ["ARG", "RUN_AS=1000"] in steps and steps[-2] == ["USER", "${RUN_AS}"]
    copied = [word for name, rest in steps if name == "COPY" for word in rest.split()[1:-1]]
    assert copied and all((repo / source).exists() for source in copied)
    assert "-c constraints.txt" in text
    ignored = (repo / "launch" / "Dockerfile.dockerignore").read_text().split()
    by_git = (repo / ".gitignore").read_text().split()
    assert {".git", *(line.strip("/") for line in by_git if line.startswith("/"))} <= set(ignored)


@pytest.mark.parametrize(("extra", "expected"), [("", "."), ("tpu", ".[tpu]"), ("cuda", ".[cuda]")])
def test_container_extra(repo, extra, expected):
    """The argument of `pip install -e`, as the container's shell reads it."""
    text = (repo / "launch" / "Dockerfile").read_text()
    argument = re.search(r'-e ("\S+")', text)[1]
    said = done("sh", "-c", f"echo {argument}", env={"EXTRA": extra})
    assert said.stdout == f"{expected}\n"


# ---- docs/pods.md --------------------------------------------------------------------------------


@pytest.fixture
def page(repo) -> str:
    return (repo / "docs" / "pods.md").read_text()


def test_commands_of_the_page(repo, page):
    """Every launcher takes the arguments that the page gives it, and the gin files are there."""
    text = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    tried = set()
    for line in text.splitlines():
        words = shlex.split(line.partition(" | ")[0])
        scripts = [i for i, word in enumerate(words) if re.fullmatch(r"launch/\w+\.\w+", word)]
        assert all((repo / words[i]).is_file() for i in scripts)
        files = [word.partition("=")[2] for word in words if word.startswith("--gin_file=")]
        assert all(file == "pod.gin" or (repo / file).is_file() for file in files)
        if not scripts or words[0] in ("docker", "kubectl"):
            continue
        script, arguments = repo / words[scripts[0]], words[scripts[0] + 1 :]
        if script.name == "tpu_vm.py":
            arguments.insert(1, "--dry_run")
        else:
            arguments.insert(0, "--dry_run")
        arguments = [
            word if word != "--gin_file=pod.gin" else "--gin_file=gin_configs/runs/pretrain.gin"
            for word in arguments
        ]
        program = "bash" if script.suffix == ".sbatch" else sys.executable
        found = done(program, script, *arguments)
        assert found.returncode == 0 and found.stdout, found.stderr
        tried.add(script.name)
    assert tried == {"local.py", "tpu_vm.py", "gke_jobset.py", "slurm.sbatch"}


def test_the_run_of_the_page(repo, page, tmp_path, monkeypatch):
    """pod.gin is complete, its mesh is the slice of the page, and it reads what `cache` writes."""
    (text,) = re.findall(r"```gin\n(.*?)```", page, re.DOTALL)
    (tmp_path / "pod.gin").write_text(text)
    monkeypatch.chdir(repo)
    config, _ = gin_utils.load_train_config([str(tmp_path / "pod.gin")], [])
    assert config.mesh == {"fsdp": 16 * 16}
    assert config.data.batch_size % 256 == 0 and config.model.d_model % 256 == 0
    command = re.search(r"t5x_lite cache (.*?)\n```", page, re.DOTALL)[1]
    assert config.data.mixture_or_task_name == command.split()[0]
    assert f"--output_dir={config.data.cache_dir} " in command
