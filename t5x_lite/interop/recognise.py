"""What lies at a path where a model was looked for, and what a person can do with it."""

import re

from etils import epath

from t5x_lite.errors import nearest

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_ADDRESS = re.compile(r"https?://huggingface\.co/([\w.-]+/[\w.-]+).*")
_ADDRESS = re.compile(r"\w+://")
_STORES = ("gs://", "s3://", "az://", "file://")
_T5X_STEP = re.compile(r"checkpoint_\d+")
_PROGRAMS = {"hf": "Hugging Face", "t5x": "T5X"}
# Files that people have and that nothing here reads.
_UNREADABLE = {
    "adapter_config.json": "an adapter: merge it into its model first",
    "flax_model.msgpack": "transformers' Flax format, which is not read",
    "tf_model.h5": "transformers' TensorFlow format, which is not read",
}


def is_address(path: str) -> bool:
    """Whether it names a place on a network that no file system here can open."""
    return bool(_ADDRESS.match(path)) and not path.startswith(_STORES)


def kind_of(directory: epath.Path) -> str | None:
    """One of "model_dir" (what `train` and `convert` leave), "hf", "t5x"; None for all else."""
    if (directory / "model.json").is_file():
        return "model_dir"
    if _is_t5x(directory) or any(_T5X_STEP.fullmatch(child.name) for child in directory.iterdir()):
        return "t5x"
    return "hf" if (directory / "config.json").is_file() else None


def hint(path: str) -> str:
    """What a path is and what to do with it: the end of a message that something else was wanted.

    It begins with "; ", and is empty if nothing can be said.
    """
    if is_address(path):
        match = _HUB_ADDRESS.fullmatch(path)
        return f"; it is an address, not a directory: {_download(match[1] if match else 'NAME')}"
    place = epath.Path(path)
    if not place.exists():
        return _hint_missing(path, place)
    if not place.is_dir():
        return f"; it is a file: give the directory it is in, {str(place.parent)!r}"
    kind = kind_of(place)
    if kind == "model_dir":
        return "; it is a MODEL_DIR already"
    if kind is not None:
        command = f"python -m t5x_lite convert --from={kind} {path} --to=MODEL_DIR"
        return f"; it is a checkpoint of {_PROGRAMS[kind]}: `{command}` makes a MODEL_DIR of it"
    if found := unreadable(place):
        return found
    if (place.parent.parent / "model.json").is_file() and place.name.isdigit():
        return f"; give {str(place.parent.parent)!r}, and {place.name} as the checkpoint"
    inside = sorted(str(child) for child in place.iterdir() if child.is_dir() and kind_of(child))
    return f"; did you mean {inside[0]!r}?" if inside else ""


def unreadable(directory: epath.Path) -> str:
    """As `hint`, of a file of weights that people take for one that is read."""
    names = (name for name in _UNREADABLE if (directory / name).is_file())
    return next((f"; {name} is {_UNREADABLE[name]}" for name in names), "")


def _hint_missing(path: str, place: epath.Path) -> str:
    hints = ""
    if place.parent.is_dir():
        names = [child.name for child in place.parent.iterdir() if child.is_dir()]
        if "did you mean" in (found := nearest(place.name, names)):
            hints += f"; {found}"
    if _HUB_NAME.fullmatch(path):
        hints += f"; if it is a name of the Hugging Face hub: {_download(path)}"
    return hints


def _download(name: str) -> str:
    return f"`hf download {name} --local-dir DIR` first, and give DIR"


def _is_t5x(directory: epath.Path) -> bool:
    """Whether it is one step of T5X's, in either layout."""
    orbax = any((d / "_METADATA").is_file() for d in (directory / "state", directory))
    return orbax or ((directory / "checkpoint").is_file())
