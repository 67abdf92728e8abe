"""One run at a time in an output folder, or onto an output file.

The lock is `flock` on a small file, `.lock` in a folder or `.NAME.lock` beside a file, which says who has it. The
operating system lets go of it when its owner ends, however that is; a file that a killed run has left holds up nobody.
"""

import atexit
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime

from bge_accel.files.text import printable

LOCK = ".lock"
"""The lock of a folder; a folder that holds nothing else is empty."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # some network file systems, by how they are mounted
_held: dict[str, int] = {}  # by `lock_output`: the file, and the process
_until_the_end = ExitStack()
_handles = set[int]()
atexit.register(_until_the_end.close)


def _close_in_child() -> None:
    """What is forked and outlives its parent would go on holding the lock."""
    for handle in _handles:
        os.close(handle)
    _handles.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(path: str, *, is_folder: bool = True) -> Iterator[None]:
    """Keeps other runs from writing to an output that may not be there yet; a folder is made.

    Does nothing where this process has it already by `lock_output`.

    Raises:
        ValueError: another run, which is named, is writing there; or nothing can be written there.
    """
    lock, kind = _lock_of(path, is_folder), "folder" if is_folder or os.path.isdir(path) else "file"
    if _held.get(lock) == os.getpid():
        yield
        return
    owner, folder = os.getpid(), os.path.dirname(lock)
    new = list(_missing(folder))
    try:
        handle, other = _take(lock)
    except OSError as error:
        raise ValueError(f"{path} cannot be written to ({error.strerror}); name another {kind}") from None
    if handle is None:
        raise ValueError(f"another run is writing into {path}: {other}; wait for it, stop it, or name another {kind}")
    try:
        yield
    finally:
        if os.getpid() == owner:  # and not what it has forked
            with suppress(OSError):
                if _is_at(lock, handle):
                    os.remove(lock)
            _handles.discard(handle)
            os.close(handle)
            with suppress(OSError):  # something has been written there
                for made in new:
                    os.rmdir(made)


def _missing(folder: str) -> Iterator[str]:
    """A folder and those above it that are not there, itself first."""
    while not os.path.isdir(folder):
        yield folder
        folder = os.path.dirname(folder)


def lock_output(path: str, *, is_folder: bool = True) -> None:
    """`locked` until this process ends. Of a run's processes the first takes it (`processes.group.from_first`)."""
    _until_the_end.enter_context(locked(path, is_folder=is_folder))
    _held[_lock_of(path, is_folder)] = os.getpid()


def unlock_outputs() -> None:
    """What happens at the end of a process by itself, for one that ends by `os._exit`."""
    _until_the_end.close()


def is_empty(folder: str) -> bool:
    """Whether a folder holds nothing, or a lock alone."""
    return all(name == LOCK for name in os.listdir(folder))


def _lock_of(path: str, is_folder: bool) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(path), LOCK) if is_folder else os.path.join(folder, f".{name}.lock")


def _take(lock: str) -> tuple[int | None, str]:
    """The open file of the lock, or None and who has it."""
    while True:
        os.makedirs(os.path.dirname(lock), exist_ok=True)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another run has let go of it, and its empty folder is gone
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                folder = os.path.dirname(lock)
                note = f"note: the disk of {folder} knows no locks: nothing keeps another run out"
                print(printable(note), file=sys.stderr)
                break
            other = os.pread(handle, 500, 0).decode("utf-8", "replace")
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return None, other or "it has just begun"
        if _is_at(lock, handle):
            break
        os.close(handle)  # its owner has removed it between the two calls
    _handles.add(handle)
    with suppress(PermissionError):
        os.fchmod(handle, 0o666)  # left by a kill, it is not to keep other users out
    program, since = os.path.basename(sys.argv[0]) or "python", datetime.now(UTC)
    said = f"{program}, process {os.getpid()} on {socket.gethostname()}, since {since:%Y-%m-%d %H:%M:%S} UTC"
    with suppress(OSError):  # a full disk is found out by what is to be written
        os.ftruncate(handle, 0)
        os.pwrite(handle, said.encode("utf-8", "replace"), 0)
        os.fsync(handle)
    return handle, ""


def _is_at(lock: str, handle: int) -> bool:
    """Whether a path still leads to the open file."""
    try:
        there, here = os.stat(lock), os.fstat(handle)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
