"""Gin in T5X's dialect: files, later ones win, then `--gin.NAME=VALUE`; errors in one line."""

import dataclasses
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import gin
from etils import epath

from t5x_lite.decoding import DecodeConfig
from t5x_lite.errors import UsageError, nearest
from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import OptimizerConfig
from t5x_lite.run_config import DataConfig, EvalConfig, TrainConfig
from t5x_lite.step import LossConfig

_REQUIRED = "%gin.REQUIRED"
_MACRO = "gin.macro"

# `gin_configs/` is found from any working directory.
_CHECKOUT = pathlib.Path(__file__).resolve().parent.parent

_CONFIGURABLES = {
    cls.__name__: gin.external_configurable(cls, module="t5x_lite")
    for cls in (
        T5Config,
        OptimizerConfig,
        LossConfig,
        DataConfig,
        DecodeConfig,
        EvalConfig,
        TrainConfig,
    )
}
# Gin's own readers know no object store, and look for includes in Python packages, where they fall
# over any directory that is called as the file's.
gin.config._FILE_READERS[:] = [
    (lambda path: epath.Path(path).open(), lambda path: epath.Path(path).is_file())
]


def load_train_config(
    files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str] = ()
) -> tuple[TrainConfig, str]:
    """Reads gin files and bindings and makes the run's configuration of them.

    Args:
      files: gin files; a later one may override what an earlier one has set.
      bindings: "NAME = VALUE" lines, which win over the files.
      search_paths: directories in which relative files are looked for, after the current one.

    Returns:
      The configuration, and the operative gin text that makes it again.

    Raises:
      UsageError: a file is missing or wrong, a binding matches nothing, a required macro is
        missing or given back, or a value is not allowed.
    """
    gin.clear_config()
    search_paths = [*search_paths, str(_CHECKOUT)]
    gin.config._LOCATION_PREFIXES[:] = ["", *search_paths]
    given_in: dict[str, str] = {}
    mentioned: set[str] = set()
    for file in files:
        mentioned |= _parse_file(file, search_paths)
        _check_nothing_is_taken_back(file, given_in)
    for binding in bindings:
        _parse_binding(binding)
    _check_macros(given_in, mentioned)
    config = _make(TrainConfig)
    _check_types(config)
    return config, gin.operative_config_str()


def _parse_file(file: str, search_paths: Sequence[str]) -> set[str]:
    """Parses a file and returns the macros that it, or a file it includes, mentions as %NAME."""
    path = _find(file, search_paths)
    text = path.read_text()
    for included in re.findall(r"^include\s+['\"](.+)['\"]", text, re.MULTILINE):
        text += _find(included, search_paths, f" (included by {file})").read_text()
    try:
        gin.parse_config_file(os.fspath(path))
    except (ValueError, SyntaxError, ImportError, OSError) as e:
        raise UsageError(f"{file}: {_first_lines(e)}") from e
    return set(re.findall(r"%([A-Za-z_]\w*)", text))


def _find(file: str, search_paths: Sequence[str], included_by: str = "") -> epath.Path:
    """Where a file is, looked for as gin does."""
    for folder in ("", *search_paths):
        path = epath.Path(folder) / file
        if path.is_file():
            return path
    known = [str(p.relative_to(_CHECKOUT)) for p in (_CHECKOUT / "gin_configs").rglob("*.gin")]
    raise UsageError(f"gin file {file!r}{included_by} is not there; {nearest(file, known)}")


def _parse_binding(binding: str) -> None:
    try:
        gin.parse_config(binding)
    except (ValueError, SyntaxError, ImportError) as e:
        name, _, value = (part.strip() for part in binding.partition("="))
        if isinstance(e, SyntaxError) or "malformed node" in str(e):
            message = f"--gin.{name}={value} is no Python value"
            if value and value[0] not in "'\"([{":
                message += f"; a string needs quotes of its own: --gin.{name}=\"'{value}'\""
            raise UsageError(message) from e
        raise UsageError(f"--gin.{name}={value}: {_first_lines(e)}") from e


def _first_lines(error: Exception) -> str:
    """Gin's message without its stack of places, and with the nearest known name."""
    lines = str(error).splitlines()
    message = lines[0].rstrip(".")
    place = next((line.strip() for line in lines[1:] if " line " in line), None)
    if match := re.search(r"No configurable matching '([^']+)'", message):
        message += f"; {nearest(match[1].split('.')[-1], _CONFIGURABLES)}"
    elif match := re.search(r"'([^']+)' doesn't have a parameter named '(.+)'", message):
        cls = _CONFIGURABLES.get(match[1].split(".")[-1])
        message += f"; {nearest(match[2], cls.__dataclass_fields__)}" if cls else ""
    return f"{message} ({place})" if place and "bindings string" not in place else message


def _macros() -> dict[str, Any]:
    return {
        scope: parameters["value"]
        for (scope, selector), parameters in gin.config._CONFIG.items()
        if selector == _MACRO
    }


def _check_nothing_is_taken_back(file: str, given_in: dict[str, str]) -> None:
    """Refuses a file that sets back to "required" what an earlier file gave; notes who gave what.

    T5X's users meet this when the run file comes before the model file.
    """
    for name, value in _macros().items():
        if repr(value) != _REQUIRED:
            given_in.setdefault(name, file)
        elif name in given_in:
            raise UsageError(
                f"{file} sets {name} back to %gin.REQUIRED, which {given_in[name]} had given: put "
                f"--gin_file={file} before --gin_file={given_in[name]}"
            )


def _check_macros(given_in: dict[str, str], mentioned: set[str]) -> None:
    """Refuses macros that no file mentions (a typing error, most likely) or that are missing still.

    A macro that a file mentions may be out of use: --gin.T5Config.dropout_rate=0.1 replaces
    %DROPOUT_RATE.
    """
    macros = _macros()
    references = gin.config.iterate_references(gin.config._CONFIG)
    used = {"/".join(r.scopes) for r in references if r.configurable.selector == _MACRO}
    for name in macros:
        if name not in used | mentioned:
            where = f" (in {given_in[name]})" if name in given_in else ""
            raise UsageError(f"{name}{where} matches nothing; {nearest(name, used | mentioned)}")
    missing = sorted(name for name in used & set(macros) if repr(macros[name]) == _REQUIRED)
    missing += sorted(used - set(macros) - {"gin.REQUIRED"})
    if missing:
        given = " ".join(f"--gin.{name}=..." for name in missing)
        raise UsageError(f"{', '.join(missing)} must be given: add {given}")


def _make(cls: type) -> Any:
    name = cls.__name__
    try:
        return _CONFIGURABLES[name]()
    except UsageError as e:
        raise UsageError(str(e).splitlines()[0]) from e
    except TypeError as e:
        message = str(e).splitlines()[0]
        name = next(iter(re.findall(r"In call to configurable '(\w+)'", str(e))), name)
        if " missing " not in message:
            raise UsageError(f"a value bound for {name} has the wrong type: {message}") from e
        missing = [f"{name}.{field}" for field in re.findall(r"'(\w+)'", message)]
        raise UsageError(
            f"no gin file binds {', '.join(missing)}: add a run file, "
            "--gin_file=gin_configs/runs/pretrain.gin"
        ) from e


def _check_types(config: Any) -> None:
    """Refuses a value that is not what its field is declared as: gin passes on anything."""
    cls = type(config)
    for name, hint in typing.get_type_hints(cls).items():
        value = getattr(config, name)
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        allowed = [typing.get_origin(option) or option for option in options]
        if float in allowed:
            allowed.append(int)
        if not isinstance(value, tuple(allowed)):
            expected = " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
            raise UsageError(f"{cls.__name__}.{name} = {value!r}: must be {expected}")
        if dataclasses.is_dataclass(value):
            _check_types(value)


def split_gin_flags(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """Takes `--gin.NAME=VALUE` out of the arguments: (bindings "NAME = VALUE", the other ones)."""
    bindings, rest = [], []
    for argument in argv:
        if not argument.startswith("--gin."):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix("--gin.").partition("=")
        if not equals or not name:
            raise UsageError(f"{argument}: write --gin.NAME=VALUE")
        bindings.append(f"{name} = {value}")
    return bindings, rest


def read_saved(path: epath.PathLike) -> TrainConfig:
    """The configuration that a run has left in its `config.gin`."""
    return load_train_config([os.fspath(path)], [])[0]
