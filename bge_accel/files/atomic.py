"""Files and folders that appear under their names when they are complete, or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from bge_accel.files.text import shown_size

if TYPE_CHECKING:
    pass


_MOVING = ".moving"


@contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """Yields a new folder beside `path` to write into; on leaving it is flushed and renamed to `path`.

    A folder that stood there is replaced. After an error nothing new is left. The folder above is not made: where it has
    been removed, what was written into it is gone, and that is an error (FileNotFoundError).
    """
    path = os.path.abspath(path)
    aside = f"{path}.incomplete"
    shutil.rmtree(aside, ignore_errors=True)
    os.mkdir(aside)
    try:
        yield aside
        flush_tree(aside)
        if os.path.isdir(path):
            remove_checkpoint(path)
        os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    flush(os.path.dirname(path))


def move_into(source: str, target: str) -> None:
    """Moves every entry of one folder into another above it, replacing what has the same name.

    Weights that stood there go first and the new ones come last, so that a folder that loads is whole. Killed on the
    way, it is finished by `finish_move`.
    """
    if not os.listdir(source):  # before anything is removed
        raise FileNotFoundError(errno.ENOENT, "there is nothing to move", source)
    for name in os.listdir(target):
        if name.endswith((".safetensors", ".safetensors.index.json")) or name.startswith("pytorch_model"):
            os.remove(os.path.join(target, name))
    os.rename(source, os.path.join(target, _MOVING))
    finish_move(target)


def finish_move(target: str) -> None:
    """Moves in what a killed `move_into` has left outside."""
    source = os.path.join(target, _MOVING)
    if not os.path.isdir(source):
        return
    for name in sorted(os.listdir(source), key=lambda name: (".safetensors" in name, name)):
        destination = os.path.join(target, name)
        if os.path.isdir(destination):
            shutil.rmtree(destination)
        os.replace(os.path.join(source, name), destination)
    os.rmdir(source)
    flush(target)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_room(output_dir: str, num_bytes: int, remedy: str) -> None:
    """Raises ValueError where the disk of a folder, which need not be there yet, has no room for so many bytes more."""
    folder = os.path.abspath(output_dir)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < num_bytes:  # some disks on a network say nothing
        raise ValueError(
            f"{output_dir} will take {shown_size(num_bytes)} more, and {shown_size(disk.free)} are free on its disk; {remedy}"
        )


def flush_tree(folder: str) -> None:
    """Flushes every file and folder under `folder` to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            flush(os.path.join(root, name))
        flush(root)


def flush(path: str) -> None:
    """Flushes one file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_checkpoint(path: str) -> None:
    """Removes a checkpoint; stopped half-way, it leaves nothing that looks like one."""
    aside = f"{path}.removed"
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    shutil.rmtree(aside)


def write_folder(path: str, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files; a reader finds whole ones, of the old folder or of the new."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_folder(path) as folder:
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)


@contextmanager
def atomic_file(path: str) -> Iterator[IO[str]]:
    """Yields a text file that appears under its name when it is complete, or not at all."""
    aside = f"{path}.incomplete"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        # A name of a file that is no UTF-8 is written as JSON writes it.
        with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        flush(aside)
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)
