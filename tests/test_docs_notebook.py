"""docs/notebook.md runs as it is written, and prints what it shows."""

import ast
import contextlib
import io
import re

import numpy as np
import pytest
from test_docs import commands, gin_files_are_there

from t5x_lite.__main__ import main

_DECIMALS = re.compile(r" *-?\d+\.\d+")


def cells(page: str) -> list[tuple[str, str | None]]:
    """(code, what the page shows as its output or None) of each Python block."""
    return re.findall(r"```python\n(.*?)```\n(?:\n```\n(.*?)```)?", page, re.DOTALL)


def run_cell(code: str, names: dict) -> str:
    """What a notebook shows: all that is printed, and the value of a last expression."""
    *body, last = ast.parse(code).body
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if not isinstance(last, ast.Expr):
            body.append(last)
        exec(compile(ast.Module(body, []), "cell", "exec"), names)  # noqa: S102 - our own page
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            if value is not None:
                print(repr(value))
    return printed.getvalue()


def without_decimals(text: str) -> str:
    """Every number with a decimal point as `#`: training has its own rounding on each machine."""
    return _DECIMALS.sub(" #", text)


@pytest.fixture
def page(repo):
    return (repo / "docs" / "notebook.md").read_text()


def test_notebook(page, repo, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    [train] = commands(page)
    assert gin_files_are_there(repo, train)
    assert main(train) == 0, capfd.readouterr().err
    names: dict = {}
    found = cells(page)
    assert len(found) == page.count("```python") > 8
    for code, shown in found:
        printed = run_cell(code, names)
        print(printed)
        assert without_decimals(printed) == without_decimals(shown), code
    # What the page says of the figures.
    shares = np.exp(names["model"].score([names["texts"][2]] * 3, names["kinds"]))
    assert 0.95 < shares.sum() < 1
    np.testing.assert_allclose(np.exp(names["scores"][2])[:2], shares[[1, 2]], rtol=1e-4)
