"""launch/ on Cloud TPU and GKE: dry runs against the expected command lines, the loop of tpu_vm.py
against a program that only looks like gcloud, the manifest field by field."""

import argparse
import itertools
import shlex
import shutil
import signal
import subprocess
import sys
import uuid

import pytest
import yaml
from launchers import REPO, answers, calls, done, launch, refusal, shown, stand_ins

from t5x_lite.errors import UsageError
from t5x_lite.plan.targets import parse_target as plan_target

__all__ = ["launch", "stand_ins"]  # fixtures


# ---- shell ---------------------------------------------------------------------------------------


def test_shell_parses(repo, launch):
    tpu_vm = launch("tpu_vm")
    scripts = [(repo / "launch" / "slurm.sbatch").read_text(), tpu_vm.INSTALL, tpu_vm.STOP]
    for script in scripts:
        checked = done("bash", "-n", input=script)
        assert (checked.returncode, checked.stderr) == (0, "")


# ---- tpu_vm.py -----------------------------------------------------------------------------------

PLACE = ("--name=xl", "--zone=us-west4-a")


@pytest.mark.parametrize(
    ("target", "accelerator_type", "runtime_version"),
    [
        ("v5e:16x16", "v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p:8x8x8", "v5p-1024", "v2-alpha-tpuv5"),
        ("v6e:4x4", "v6e-16", "v2-alpha-tpuv6e"),
        ("v4:4x4x4", "v4-128", "tpu-ubuntu2204-base"),
    ],
)
def test_tpu_create(target, accelerator_type, runtime_version):
    lines = shown("tpu_vm.py", "create", *PLACE, f"--target={target}", "--dry_run")
    assert lines[0] == (
        f"gcloud compute tpus queued-resources create xl --accelerator-type={accelerator_type} "
        f"--runtime-version={runtime_version} --node-id=xl --zone=us-west4-a"
    )


def test_tpu_dry_run_of_several_slices():
    lines = shown(
        *("tpu_vm.py", "run", *PLACE, "--project=mine", "--target=2xv5e:16x16", "--spot"),
        *("--dry_run", "train", "--gin.MODEL_DIR='gs://b/xl'"),
    )
    assert lines[0] == (
        "gcloud compute tpus queued-resources create xl --accelerator-type=v5litepod-256 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --node-count=2 --node-prefix=xl "
        "--zone=us-west4-a --project=mine"
    )
    copies = [line for line in lines if " scp " in line]
    assert copies == [
        f"gcloud compute tpus tpu-vm scp /tmp/t5x_lite.tar.gz xl-{i}:t5x_lite.tar.gz --worker=all "
        "--zone=us-west4-a --project=mine"
        for i in range(2)
    ]
    starts = [shlex.split(line) for line in lines if "t5x_lite train" in line]
    for i, words in enumerate(starts):
        assert words[:7] == [*["gcloud", "compute", "tpus", "tpu-vm", "ssh"], f"xl-{i}", words[6]]
        command = words[6].removeprefix("--command=")
        assert shlex.split(command)[-6:] == [
            *(".venv/bin/python", "-m", "t5x_lite", "train"),
            *("--gin.MODEL_DIR='gs://b/xl'", "--distributed"),
        ]
        assert "--worker=all" in words
    assert len(starts) == 2
    assert (
        "gcloud compute tpus queued-resources delete xl --force --quiet --zone=us-west4-a "
        "--project=mine"
    ) in lines


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("v5:16x16", "the chips are v4, v5e, v5p, v6e"),
        ("v5e", "write CHIP:TOPOLOGY"),
        ("tpu7x:4x4x4", "nothing here starts a run on tpu7x, although `plan` knows more chips"),
        ("v5e:4x4x4", "v5e has no slice of 4x4x4; there are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16,"),
        ("v5p:16x16", "there are 2x2x1, 2x2x2, 2x2x4, 2x4x4, and multiples of 4x4x4 up to 6144"),
        ("v5e:3x4", "v5e has no slice of 3x4"),
        ("v4:1x1x1", "v4 has no slice of 1x1x1"),
        ("0xv5e:4x4", "at least 1 slice"),
    ],
)
def test_tpu_target_refused(target, expected):
    assert expected in refusal("tpu_vm.py", "create", *PLACE, f"--target={target}")


def test_tpu_targets_are_those_of_plan(launch):
    """Topologies of all dimensions, and odd ways to write: both take it, alike, or neither does."""
    parse, chips = launch("tpu_target").parse_target, launch("tpu_target").GENERATIONS
    sizes = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    topologies = [
        "x".join(map(str, shape)) for n in (1, 2, 3) for shape in itertools.product(sizes, repeat=n)
    ]
    texts = [f"{chip}:{topology}" for chip in chips for topology in topologies]
    texts += ["V5E:2x4", "2xv6e:16x16", "2XV5P:4x4x4", " v4:2x2x1 ", "v5e:04x4", "0xv5e:4x4"]
    texts += ["", "v5e", "v5e:", "v5e:4,4", "v5:4x4", "v5e:-4x4", "x2v5e:4x4", "2x2xv5e:4x4"]
    texts += ["v5p:16x16x24", "v5p:16x20x20", "v4:4x4x256", "v4:4x4x260"]
    taken = set()
    for text in texts:
        try:
            planned = plan_target(text)
        except UsageError:
            with pytest.raises(argparse.ArgumentTypeError):
                parse(text)
            continue
        target = parse(text)
        assert target.generation is chips[planned.kind]
        assert target.topology == "x".join(map(str, planned.topology))
        assert target.num_slices == planned.num_slices
        taken.add(text)
    assert {"V5E:2x4", "v5e:16x16", "v4:4x4x256", "v5p:8x4x12"} <= taken
    refused = ("v5e:3x4", "v5e:16x32", "v5p:2x2x3", "v5p:4x4x6", "v4:1x1x1", "v4:4x4x260")
    assert taken.isdisjoint(refused)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ((), "say what to run"),
        (("trian",), "did you mean 'train'?"),
        (("train", "--dry_run"), "--dry_run is the launcher's: put it before 'train'"),
        (("train", "--gin_file=gs://b/a.gin", "--gin_file=pod.gin"), "=pod.gin: no such file in"),
        (("train", f"--gin_file={REPO}/pod.gin"), "give --gin_file=pod.gin"),
    ],
)
def test_tpu_run_refuses_before_it_asks_for_a_tpu(stand_ins, tmp_path, command, expected):
    """Wherever the launcher is started: the gin files have to be in what is copied."""
    (tmp_path / "pod.gin").write_text("")
    words = ("tpu_vm.py", "run", *PLACE, "--target=v5e:4x4", *command)
    assert expected in refusal(*words, cwd=tmp_path)
    assert not calls(stand_ins)


def test_tpu_status_and_delete_take_the_line_of_the_others():
    for action in ("status", "delete"):
        words = ("tpu_vm.py", action, *PLACE, "--target=v5e:4x4", "--dry_run")
        assert f"queued-resources {'list' if action == 'status' else action}" in shown(*words)[0]


@pytest.fixture
def tpu(launch, stand_ins, tmp_path, monkeypatch):
    """A Tpu of tpu_vm.py in front of the gcloud that stands in, and a checkout to be copied."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    subprocess.run(["git", "init", "--quiet", checkout], check=True)
    for name in (".gitignore", "my_task.py", "runs"):
        (checkout / name).write_text("runs\n")
    tpu_vm = launch("tpu_vm")
    monkeypatch.setattr(tpu_vm, "POLL_SECONDS", 0)
    monkeypatch.setattr(tpu_vm, "REPO", checkout)
    return tpu_vm.Tpu("xl", ["--zone=z"], dry_run=False, nodes=["xl"], shape=["--spot"])


def test_tpu_run_refuses_to_copy_data(launch, tpu, stand_ins, tmp_path, capfd):
    """More than 100 MB, unless git ignores it; before anything is asked for."""
    for name, size in (("my_data/rows", 60), ("my_data/more", 39), ("big", 2), ("runs", 500)):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size * 1_000_000)
    with pytest.raises(SystemExit) as exit:
        launch("tpu_vm").run(tpu, ["train"])
    assert exit.value.code == 2 and not calls(stand_ins)
    expected = "101.0 MB would be copied to every host, more than 100; the largest: my_data 99.0 MB"
    assert f"{expected}, big 2.0 MB" in capfd.readouterr().err
    (tmp_path / "checkout" / "big").unlink()
    assert tpu.install() == 0
    assert "tpu_vm.py: 99.0 MB of this checkout are copied" in capfd.readouterr().err


def told(stand_ins) -> list[str]:
    """What the loop did, in short."""
    kinds = {
        "queued-resources create": "create",
        "queued-resources delete": "delete",
        "tpu-vm scp": "copy",
        "pkill": "stop",
        "pip install": "install",
        "t5x_lite train": "train",
    }
    found = [" ".join(call) for call in calls(stand_ins)]
    return [short for call in found for part, short in kinds.items() if part in call]


WHOLE = ["stop", "copy", "install", "train"]


def test_tpu_run_starts_again_after_a_preemption(launch, tpu, stand_ins, tmp_path, capfd):
    """Not there; there; taken away during the run; SUSPENDED; there again."""
    states = [
        "",
        "",
        "xl\tPROVISIONING",
        "xl\tACTIVE",
        "xl\tSUSPENDED",
        "xl\tSUSPENDED",
        "xl\tACTIVE",
    ]
    answers(
        stand_ins,
        {
            "queued-resources list": "\n".join(f"0 {state}" for state in states),
            "tpu-vm list": "0 xl\tREADY",
            "t5x_lite train": "255 connection lost\n0 done",
        },
    )
    assert launch("tpu_vm").run(tpu, ["train", "--x"]) == 0
    assert told(stand_ins) == ["create", *WHOLE, "delete", "create", *WHOLE]
    said = capfd.readouterr().err
    assert "xl is not there" in said and "xl is PROVISIONING" in said
    assert "taken away" in said and "delete --name=xl --zone=z" in said
    packed = done("tar", "-tzf", tmp_path / "t5x_lite.tar.gz")
    assert sorted(packed.stdout.split()) == [".gitignore", "my_task.py"]


def test_tpu_run_sees_that_a_node_was_preempted(launch, tpu, stand_ins):
    answers(
        stand_ins,
        {
            "queued-resources list": "0 xl\tACTIVE",
            "tpu-vm list": "0 xl\tPREEMPTED\n0 xl\tPREEMPTED\n0 xl\tREADY",
            "t5x_lite train": "0 done",
        },
    )
    assert launch("tpu_vm").run(tpu, ["train"]) == 0
    assert told(stand_ins) == ["delete", "create", *WHOLE]


def test_tpu_run_stops_at_a_usage_error(launch, tpu, stand_ins):
    answers(stand_ins, {"queued-resources list": "0 xl\tACTIVE", "t5x_lite train": "2 no such"})
    assert launch("tpu_vm").run(tpu, ["train"]) == 2
    assert told(stand_ins) == WHOLE


def test_tpu_run_gives_up_when_it_fails_and_fails(launch, tpu, stand_ins):
    answers(stand_ins, {"queued-resources list": "0 xl\tACTIVE", "t5x_lite train": "134 aborted"})
    assert launch("tpu_vm").run(tpu, ["train"]) == 134
    assert told(stand_ins) == WHOLE * 5


def test_tpu_run_bears_with_gcloud_but_not_at_the_start(launch, tpu, stand_ins):
    states = ["0 xl\tACTIVE", "1 no network", "1 no network", "0 xl\tACTIVE"]
    answers(stand_ins, {"queued-resources list": "\n".join(states), "t5x_lite train": "0 done"})
    assert launch("tpu_vm").run(tpu, ["train"]) == 0
    assert told(stand_ins) == WHOLE
    answers(stand_ins, {"queued-resources list": "1 not logged in"})
    with pytest.raises(SystemExit) as exit:
        launch("tpu_vm").run(tpu, ["train"])
    assert exit.value.code == 1
    assert told(stand_ins) == WHOLE  # and nothing more


def test_tpu_run_ends_when_the_tpu_is_refused(launch, tpu, stand_ins):
    answers(stand_ins, {"queued-resources list": "0 ", "queued-resources create": "7 no quota"})
    with pytest.raises(SystemExit) as exit:
        launch("tpu_vm").run(tpu, ["train"])
    assert exit.value.code == 7
    assert told(stand_ins) == ["create"]


def test_tpu_run_gives_up_when_requests_fail_and_fail(launch, tpu, stand_ins, capfd):
    answers(
        stand_ins,
        {
            "queued-resources list": "0 xl\tFAILED",
            "queued-resources describe xl --format=yaml(state)": "0 no quota for v9 in z",
        },
    )
    with pytest.raises(SystemExit) as exit:
        launch("tpu_vm").run(tpu, ["train"])
    assert exit.value.code == 1
    assert told(stand_ins) == ["delete", "create"] * 4
    said = capfd.readouterr().err
    assert said.count("no quota for v9 in z") == 5 and "gave up: 5 requests" in said


def test_tpu_run_bears_with_requests_that_fail_now_and_then(launch, tpu, stand_ins):
    """Four FAILED before a TPU is there, and after it is taken away four more."""
    states = ["ACTIVE", *["FAILED"] * 4, "ACTIVE", *["FAILED"] * 5, "ACTIVE"]
    answers(
        stand_ins,
        {
            "queued-resources list": "\n".join(f"0 xl\t{state}" for state in states),
            "tpu-vm list": "0 xl\tREADY",
            "t5x_lite train": "255 connection lost\n0 done",
        },
    )
    assert launch("tpu_vm").run(tpu, ["train"]) == 0
    again = ["delete", "create"] * 4
    assert told(stand_ins) == [*again, *WHOLE, *again, *WHOLE]


@pytest.mark.skipif(not shutil.which("pkill"), reason="no pkill here")
def test_tpu_stop_ends_the_command_and_nothing_else(launch):
    mark = f"launch_test_{uuid.uuid4().hex}"
    script = launch("tpu_vm").STOP.replace("m t5x_lite", f"m {mark}")
    assert script.count(mark) == 3
    assert done("bash", "-c", script).returncode == 0  # nothing is there
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "-m", mark])
    waiter = subprocess.Popen(["bash", "-c", script])
    try:
        # A child that nobody has waited for still counts as a process.
        assert sleeper.wait(timeout=20) == -signal.SIGTERM
        assert waiter.wait(timeout=20) == 0
    finally:
        sleeper.kill()
        waiter.kill()


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock here")
def test_tpu_start_passes_arguments_on_and_starts_one(tmp_path):
    """The command that a host gets, run by its shell: quoting, exit code, and the lock."""
    arguments = ["train", "--gin.MODEL_DIR='gs://b/x y'", '--gin.A="$HOME"', "a;b"]
    line = shown("tpu_vm.py", "run", *PLACE, "--target=v5e:4x4", "--dry_run", *arguments)
    words = next(shlex.split(text) for text in line if "t5x_lite train" in text)
    command = words[6].removeprefix("--command=")
    python = tmp_path / "t5x_lite" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"; read -r; exit 9\n')
    python.chmod(0o755)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen(["bash", "-c", command], **pipes) as first:
        got = [first.stdout.readline().rstrip("\n") for _ in range(7)]
        assert got == ["-m", "t5x_lite", *arguments, "--distributed"]
        second = done("bash", "-c", command, cwd=tmp_path, stdin=subprocess.DEVNULL)
        assert second.returncode == 75
        first.communicate("\n", timeout=20)
    assert first.returncode == 9


# ---- gke_jobset.py -------------------------------------------------------------------------------

GKE = ("--name=xl", "--target=v5e:4x4", "--image=example.com/t5x_lite:1", "--queue=q")


def manifest(target: str, *command: str) -> dict:
    lines = shown(
        *("gke_jobset.py", "--name=xl", "--image=example.com/t5x_lite:1"),
        *(f"--target={target}", "--queue=multislice-queue", *command),
    )
    return yaml.safe_load("\n".join(lines))


def test_gke_manifest():
    found = manifest("2xv5e:16x16", "train", "--gin.MODEL_DIR='gs://b/x: y'")
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"] == {
        "name": "xl",
        "labels": {"kueue.x-k8s.io/queue-name": "multislice-queue"},
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    }
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 50
    (slices,) = found["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (64, 64)
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy demands it
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    (container,) = pod["containers"]
    assert container["image"] == "example.com/t5x_lite:1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["command"] == [
        *("python", "-m", "t5x_lite", "train", "--distributed", "--distributed_timeout=600"),
        "--gin.MODEL_DIR='gs://b/x: y'",
    ]


def test_gke_usage_errors_are_not_tried_again():
    """t5x_lite's exit code 2 fails the pod's Job for a reason that fails the JobSet."""
    found = manifest("v5e:4x4", "train")
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["podFailurePolicy"]["rules"] == [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
        }
    ]
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


@pytest.mark.parametrize(
    ("target", "accelerator", "hosts", "chips"),
    [
        ("v5p:4x4x4", "tpu-v5p-slice", 16, 4),
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v6e:16x16", "tpu-v6e-slice", 64, 4),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),
        ("v5e:2x4", "tpu-v5-lite-podslice", 2, 4),
    ],
)
def test_gke_hosts_of_a_slice(target, accelerator, hosts, chips):
    (slices,) = manifest(target, "train")["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (1, hosts, hosts)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_gke_dollars_are_the_programs_own():
    """Kubernetes expands $(NAME) in a command, and reads $$ as $."""
    found = manifest("v5e:4x4", "train", "--gin.A='$(HOME) $1'")
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    command = job["template"]["spec"]["containers"][0]["command"]
    assert command[-1] == "--gin.A='$$(HOME) $$1'"


@pytest.mark.parametrize(
    ("target", "machine_type", "nodes", "topology"),
    [
        ("v5p:4x4x4", "ct5p-hightpu-4t", 16, " --tpu-topology=4x4x4"),
        ("v4:2x2x1", "ct4p-hightpu-4t", 1, ""),
        ("v5e:1x1", "ct5lp-hightpu-1t", 1, ""),
        ("v5e:2x4", "ct5lp-hightpu-4t", 2, " --tpu-topology=2x4"),
        ("v6e:1x1", "ct6e-standard-1t", 1, ""),
        ("v6e:16x16", "ct6e-standard-4t", 64, " --tpu-topology=16x16"),
    ],
)
def test_gke_node_pools(target, machine_type, nodes, topology):
    lines = shown("gke_jobset.py", "--name=xl", f"--target=2x{target}", "--node_pools")
    assert lines == [
        f"gcloud container node-pools create xl-{i} --cluster=CLUSTER --location=REGION "
        f"--node-locations=ZONE --machine-type={machine_type} --num-nodes={nodes}"
        f"{topology}"
        for i in range(2)
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--name=XL", "--target=v5e:4x4"), "small letters"),
        (("--name=xl", "--target=v5e:4x4", "train"), "give --image, --queue"),
        ((*GKE, "plan"), "'plan' is no verb of t5x_lite that is run here"),
        ((*GKE, "train", "--gin_file=pod.gin"), "--gin_file=pod.gin: no such file in"),
    ],
)
def test_gke_refuses(arguments, expected):
    assert expected in refusal("gke_jobset.py", *arguments)


def test_gke_dry_run_changes_nothing():
    lines = [shown("gke_jobset.py", *GKE, *flags, "train") for flags in ((), ("--dry_run",))]
    assert lines[0] == lines[1]


def test_kueue_admits_what_the_page_asks_for(repo):
    """The example of kueue.yaml fits the example of gke_jobset.py: queue, nodes and chips."""
    found = yaml.safe_load_all((repo / "launch" / "kueue.yaml").read_text())
    flavor, cluster_queue, local_queue = found
    run = manifest("2xv5e:16x16", "train")
    assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local_queue["metadata"]["name"]
    assert local_queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    slices = run["spec"]["replicatedJobs"][0]
    pod = slices["template"]["spec"]["template"]["spec"]
    assert flavor["spec"]["nodeLabels"] == pod["nodeSelector"]
    (group,) = cluster_queue["spec"]["resourceGroups"]
    (offered,) = group["flavors"]
    assert offered["name"] == flavor["metadata"]["name"]
    assert offered["resources"] == [{"name": "google.com/tpu", "nominalQuota": 2 * 16 * 16}]
