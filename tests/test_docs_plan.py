"""The command of docs/plan.md runs, on a smaller model, and the page shows what it prints."""

import json
import re
import shlex

import pytest
from small_run import SMALL, start


def test_plan(repo, tmp_path):
    pytest.importorskip("libtpu")
    page = (repo / "docs" / "plan.md").read_text()
    (command,) = re.findall(r"```sh\n(python -m t5x_lite .*?)```", page, re.DOTALL)
    argv = shlex.split(command.replace("\\\n", " "))[1:]
    smaller = [f"--gin.{k}={v!r}" for k, v in SMALL.items() if k.startswith(("T5Config.", "TASK"))]
    smaller += ["--gin.T5Config.vocab_size=512", "--gin.BATCH_SIZE=32", "--gin.NUM_MICROBATCHES=2"]
    process = start(*argv, *smaller, f"--json={tmp_path}/plan.json")
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error

    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["target"] == "v5e:4x4" and values["fits"]
    section = page.partition("\n## JSON")[2].partition("\n## ")[0]
    # `search` is there with --search alone.
    assert set(re.findall(r"`(\w+)`", section)) == {*values, "search"}

    example = page.partition("<!-- example -->")[2].partition("<!-- end -->")[0]
    titles = r"^(program(?= *$)|memory of a chip|work of a step|collectives|least time|the run)"
    shown = re.findall(titles, out, re.MULTILINE)
    assert len(shown) == 6
    assert re.findall(titles, example, re.MULTILINE) == shown
