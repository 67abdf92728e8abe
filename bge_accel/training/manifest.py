"""The size and SHA-256 of every file of a checkpoint, so that a damaged one is known."""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bge_accel.files.parsing import is_inside, load_json
from bge_accel.files.text import shorten

if TYPE_CHECKING:
    pass


STATE = "training_state"


MANIFEST = os.path.join(STATE, "manifest.json")


def write_manifest(folder: str) -> None:
    """Notes the size and SHA-256 of every file of a checkpoint; written last."""
    files = digests(folder, files_of(folder))
    with open(os.path.join(folder, MANIFEST), "w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)


def files_of(folder: str) -> list[str]:
    names = [os.path.relpath(os.path.join(root, name), folder) for root, _, files in os.walk(folder) for name in files]
    return sorted(names)


def digests(folder: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    paths = {name: os.path.join(folder, name) for name in names}
    return {name: {"bytes": os.path.getsize(path), "sha256": _sha256(path)} for name, path in paths.items()}


def what_is_damaged(folder: str, manifest: str = MANIFEST) -> str | None:
    """What is wrong with a checkpoint, or None if every file is there and holds what was written."""
    try:
        if not os.path.exists(os.path.join(folder, manifest)):
            return f"{manifest} is missing: it is no checkpoint to continue from, or its copy is incomplete"
        files = load_json(os.path.join(folder, manifest))["files"]
        for name, expected in files.items():
            if not is_inside(name):
                return f"{manifest} names {shorten(name)}, which is not inside the checkpoint"
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                return f"{name} is missing"
            if os.path.getsize(path) != expected["bytes"]:
                return f"{name} has {os.path.getsize(path):,} bytes where {expected['bytes']:,} were written"
            if _sha256(path) != expected["sha256"]:
                return f"{name} does not hold what was written (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read ({error})"
    return None


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
