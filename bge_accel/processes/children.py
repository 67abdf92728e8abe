"""Programs that a script runs, and that end with it."""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_groups = set[int]()


def run_child(command: Sequence[str], *, ends_by: int = signal.SIGKILL, **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run`, but where this is interrupted, the program and all that it has started are ended and waited for.

    Args:
        ends_by: the signal that they are sent; by SIGTERM they may end in order. They get none from the terminal.
        options: of `subprocess.Popen`.
    """
    child = subprocess.Popen(command, process_group=0, **options)
    _groups.add(child.pid)
    try:
        output, errors = child.communicate()
    except BaseException:
        _send(child.pid, ends_by)
        child.communicate()  # with pipes, until the last of them has gone
        raise
    finally:
        _groups.discard(child.pid)
    return subprocess.CompletedProcess(command, child.returncode, output, errors)


def kill_children() -> None:
    """Kills what runs now, at once."""
    for group in _groups:
        _send(group, signal.SIGKILL)


def _send(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
