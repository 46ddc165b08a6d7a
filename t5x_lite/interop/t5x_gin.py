"""What a gin file of T5X binds the fields of its `T5Config` to, read without gin.

T5X leaves a `config.gin` beside its checkpoints; people put their own there, too. Only literals and
macros of literals are understood: no function is called and no other file opened.
"""

import ast
import io
import re
import tokenize
from collections.abc import Collection, Iterator
from typing import Any

from t5x_lite.errors import UsageError

_MACRO = re.compile(r"%([\w./]+)")
_MAX_VALUE_CHARS = 1000
_LEFT_OPEN = object()
# What no tensor tells, so that it must be read if it is there.
_ONLY_HERE = "mlp_activations"
_LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def read_gin(text: str, wanted: Collection[str]) -> dict[str, Any]:
    """The wanted fields of T5X's `T5Config` as far as the text binds them to plain values.

    Both ways of writing them are read, `network.T5Config.num_heads = 6` and blocks below
    `network.T5Config:`. A field that is left to a function, `@vocab_size()`, or to whoever runs
    the file, `%gin.REQUIRED`, is left out; `mlp_activations`, which no tensor tells, must not be.

    Raises:
      UsageError: a wanted field has a value that is not understood, or two.
    """
    macros: dict[str, str] = {}
    fields: dict[str, dict[str, str]] = {}
    includes = ""
    for name, value in _bindings(text):
        scope, _, selector = name.rpartition("/")
        *owners, field = selector.split(".")
        if name == "include":
            includes = value
        elif not owners:
            macros[name] = value
        elif owners[-1] == "T5Config" and field in wanted:
            fields.setdefault(field, {})[scope] = value
    if includes and _ONLY_HERE in wanted and _ONLY_HERE not in fields:
        raise UsageError(
            f"it includes {includes:.80}, which is not read, and leaves out T5Config.{_ONLY_HERE}: "
            "add that"
        )
    values = {}
    for field, by_scope in fields.items():
        found = [_read_value(field, value, macros) for value in by_scope.values()]
        if any(value != found[0] for value in found):
            raise UsageError(
                f"T5Config.{field} has several values, each for its scope "
                f"({', '.join(map(repr, by_scope))}); keep that of this model"
            )
        if found[0] is not _LEFT_OPEN:
            values[field] = found[0]
    return values


def _read_value(field: str, value: str, macros: dict[str, str]) -> Any:
    whole = value
    for _ in macros:
        if len(whole) > _MAX_VALUE_CHARS:
            break
        whole = _MACRO.sub(lambda match: macros.get(match[1], match[0]), whole)
    if field != _ONLY_HERE and (whole.startswith("@") or whole == "%gin.REQUIRED"):
        return _LEFT_OPEN
    try:
        return ast.literal_eval(whole[: _MAX_VALUE_CHARS + 1])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        meaning = "" if whole == value else f", that is {whole:.80},"
        raise UsageError(
            f"T5Config.{field} = {value:.80}{meaning} cannot be read: give its value there"
        ) from None


def _bindings(text: str) -> Iterator[tuple[str, str]]:
    """(name, value) of every binding, "scope/module.T5Config.field"; ("include", file) of includes.

    A value is its tokens without what is between them.
    """
    header = ""
    for line, is_indented in _logical_lines(text):
        header = header if is_indented else ""
        if line[-1] == ":":
            header = "".join(line[:-1]) + "."
        elif line[0] == "include":
            yield "include", "".join(line[1:])
        elif "=" in line:
            at = line.index("=")
            yield header + "".join(line[:at]), "".join(line[at + 1 :])


def _logical_lines(text: str) -> Iterator[tuple[list[str], bool]]:
    """The tokens of each statement, and whether it is indented.

    gin is written in Python's tokens: comments, brackets and backslashes work as there.
    """
    line: list[str] = []
    depth = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
            if token.type == tokenize.NEWLINE and line:
                yield line, depth > 0
                line = []
            elif token.type not in _LAYOUT and not token.string.isspace():
                line.append(token.string)
    except (tokenize.TokenError, SyntaxError) as error:
        raise UsageError(f"no gin file: {error.args[0]}") from None
