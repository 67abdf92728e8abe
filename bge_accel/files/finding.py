"""Which files of data a path, a folder or a pattern stands for."""

import glob
import os
from collections.abc import Sequence
from pathlib import PurePath

from bge_accel.files.faults import Faults
from bge_accel.files.text import near_path

EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")


def find_files(paths: Sequence[str], faults: Faults) -> list[str]:
    """Files named by `paths`: files, globs, and folders (every readable file directly inside, sorted by name)."""
    files: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            inside = sorted(entry.path for entry in os.scandir(path) if entry.name.endswith(EXTENSIONS))
            if not inside:
                faults.add(path, f"no file in this folder ends in {', '.join(EXTENSIONS)}")
            files += inside
        elif os.path.isfile(path):
            if not path.endswith(EXTENSIONS):
                faults.add(path, f"unknown kind of file: its name has to end in {', '.join(EXTENSIONS)}")
            files.append(path)
        elif os.path.lexists(path):
            faults.add(path, "is neither a file nor a folder, or a link that leads nowhere")
        elif matches := [] if "\0" in path else sorted(glob.glob(path)):
            files += find_files(matches, faults)
        else:
            near = near_path(path)
            faults.add(path, "no such file or folder" + (f"; did you mean {near}?" if near else ""))
    return files


def name_that_finds(path: str, names: Sequence[str]) -> str | None:
    """Which of `names` is a folder or glob by which `find_files` reads a file that is to be written to `path`."""
    if not path.endswith(EXTENSIONS):
        return None
    folder = PurePath(os.path.realpath(os.path.dirname(os.path.abspath(path))))
    for name in names:
        if os.path.isdir(name):
            finds = PurePath(os.path.realpath(name)) == folder
        elif not name or os.path.lexists(name) or "\0" in name:
            finds = False
        else:  # a glob finds files, and folders with files
            pattern = os.path.realpath(name)
            finds = folder.match(pattern) or (folder / os.path.basename(path)).match(pattern)
        if finds:
            return name
    return None
