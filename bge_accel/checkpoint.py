"""Folders that are complete or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """Yields a new folder beside `path` to write into; on leaving it is flushed and renamed to `path`.

    A folder that stood there is replaced. After an error nothing new is left.
    """
    path = os.path.abspath(path)
    aside = f"{path}.incomplete"
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    try:
        yield aside
        flush_tree(aside)
        if os.path.isdir(path):
            shutil.rmtree(path)
        os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    flush(os.path.dirname(path))


def move_into(source: str, target: str) -> None:
    """Moves every entry of one folder into another on the same disk, replacing what has the same name.

    Weights that stood there go first and the new ones come last, so that a folder that loads is whole.
    """
    for name in os.listdir(target):
        if name.endswith((".safetensors", ".safetensors.index.json")) or name.startswith("pytorch_model"):
            os.remove(os.path.join(target, name))
    for name in sorted(os.listdir(source), key=lambda name: (".safetensors" in name, name)):
        destination = os.path.join(target, name)
        if os.path.isdir(destination):
            shutil.rmtree(destination)
        os.replace(os.path.join(source, name), destination)
    os.rmdir(source)
    flush(target)


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
