"""Whether an output can be written where a flag says, asked before the work begins."""

import os
from collections.abc import Collection, Sequence

from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files, name_that_finds


def is_text(name: str) -> bool:
    """Whether a name of a file is UTF-8; others hold halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def check_folder(flag: str, path: str) -> None:
    """Raises ValueError where a folder cannot be made, or nothing can be written into it."""
    if not path:
        raise ValueError(f"{flag} is empty; name a folder")
    if not is_text(path):  # tokenizers and safetensors cannot write there, which would be seen at the end
        raise ValueError(f"{flag} {path} is not UTF-8; name another folder")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ValueError(f"{flag} {path} is a file; name a folder")
    nearest = os.path.abspath(path)
    while not os.path.exists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: {nearest} cannot be written to; name another folder")


def check_replaced_folder(flag: str, path: str, names: Collection[str]) -> None:
    """Raises ValueError unless a folder is not there, is empty, or holds exactly the files that are written anew."""
    check_folder(flag, path)
    there = set(os.listdir(path)) if os.path.isdir(path) else set()
    if there and there != set(names):
        found = ", ".join(sorted(there - set(names))[:5]) or "only a part of this data"
        raise ValueError(f"{flag} {path} would be replaced, but it holds {found}; name another folder")


def check_output(flag: str, path: str, inputs: Sequence[str]) -> None:
    """Raises ValueError where a file cannot be written, would be written over an input, or be read as one by the next run.

    Args:
        inputs: files, globs and folders of data; those that are not here are passed over.
    """
    if not path or os.path.isdir(path):
        raise ValueError(f"{flag} {path!r} is not the name of a file")
    check_folder(f"{flag} {path}: its folder", os.path.dirname(os.path.abspath(path)))
    if os.path.exists(path) and any(os.path.samefile(path, name) for name in find_files(inputs, Faults())):
        raise ValueError(f"{flag} {path} is an input; name another file")
    if (name := name_that_finds(path, inputs)) is not None:
        raise ValueError(f"{flag} {path}: the next run would read it as data, from {name}; write it elsewhere")
