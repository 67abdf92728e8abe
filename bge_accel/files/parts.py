"""A long job's work so far: parts that are kept until the end, each with its checksum."""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bge_accel.files.atomic import atomic_file
from bge_accel.files.changes import differences
from bge_accel.files.parsing import load_json


def open_work(
    work: str, fingerprint: dict[str, Any], say: Callable[[str], None], *, removes: tuple[str, ...] = ("part-",)
) -> None:
    """Keeps what a run with the same inputs and settings has left in a folder; removes what another one has.

    What a note that cannot be read says is of another run, too.

    Args:
        say: told which of the two it is.
        removes: beginnings of the names of files and folders that belong to one run.
    """
    os.makedirs(work, exist_ok=True)
    path = os.path.join(work, "fingerprint.json")
    fingerprint = json.loads(json.dumps(fingerprint))
    if os.path.exists(path):
        try:
            old = load_json(path)
        except ValueError as error:
            old = str(error)
        if old == fingerprint:
            parts = [name for name in os.listdir(work) if name.startswith("part-") and "." not in name]
            done = sum(read_part(os.path.join(work, name)) is not None for name in parts)
            say(f"going on from an interrupted run: {done} of its chunks of rows are done")
            return
        changes = "; ".join(differences(old, fingerprint)) if isinstance(old, dict) else old
        say(f"starting afresh, {work} is of another run: {changes}")
    for name in os.listdir(work):
        if name.startswith(removes) or name == "fingerprint.json":
            stale = os.path.join(work, name)
            shutil.rmtree(stale) if os.path.isdir(stale) else os.remove(stale)
    with atomic_file(path) as file:
        json.dump(fingerprint, file)


def part_name(work: str, number: int) -> str:
    """Where what was found for one chunk of rows is kept."""
    return os.path.join(work, f"part-{number:07d}")


def write_part(path: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Keeps what was found for one chunk of rows: a JSON line each, and a last one with the checksum of these."""
    content = "".join(json.dumps(record) + "\n" for record in records)
    with atomic_file(path) as file:
        file.write(f"{content}{zlib.crc32(content.encode())}\n")


def read_part(path: str) -> list[dict[str, Any]] | None:
    """The records that `write_part` has written; None where they are not there, or not whole any more."""
    try:
        with open(path, "rb") as file:
            *lines, checksum = file.read().splitlines(keepends=True)
    except (FileNotFoundError, ValueError):  # not there, empty
        return None
    if checksum != b"%d\n" % zlib.crc32(b"".join(lines)):
        return None
    return [json.loads(line) for line in lines]


def read_parts(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The records of all parts, one part at a time; ValueError where one was damaged after it had been written."""
    for path in paths:
        records = read_part(path)
        if records is None:
            raise ValueError(f"{path} is not there or damaged; the same command makes it again")
        yield from records


def what_is_kept(*places: str) -> str:
    """For the last line of a run that was stopped: where its work is kept, if there is some, and how to go on.

    Args:
        places: files that are there when something is kept in their folders.
    """
    folders = [os.path.dirname(place) for place in places if os.path.exists(place)]
    if not folders:
        return "nothing is kept, the same command starts again"
    return f"what is done is kept in {' and '.join(folders)}, the same command goes on from there"
