"""The signals that ask a run to stop: the first one saves, a second one stops at once."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from bge_accel.files.lock import unlock_outputs
from bge_accel.files.text import printable
from bge_accel.processes.children import kill_children

if TYPE_CHECKING:
    pass


SAME_PRESS_SECONDS = 0.5
"""A terminal and a launcher may both pass one Ctrl-C on, within milliseconds; nobody means two by two as fast as this."""


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C, so that the loop can save and stop; a second one ends the process at once.

    SLURM sends SIGTERM and SIGUSR1 before it preempts a job or its time is over; preempting, it sends one signal twice
    within milliseconds, so either of them within `repeat_seconds` of the first is taken for the same. Ctrl-C (SIGINT) is
    somebody's wish: a second one counts after `SAME_PRESS_SECONDS`. So does SIGTERM after it, which is what torchrun makes of
    a second Ctrl-C. Where SIGINT is ignored, as in a script's background, it stays so.
    """

    def __init__(self, repeat_seconds: float = 3.0) -> None:
        self.number = 0
        self.repeat_seconds, self._at = repeat_seconds, 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    @property
    def received(self) -> str | None:
        """Name of the first signal."""
        return signal.Signals(self.number).name if self.number else None

    def _note(self, number: int, frame: Any) -> None:
        if not self.number:
            self.number, self._at = number, time.monotonic()
            if number == signal.SIGINT:
                _tell("finishing the step, then saving; Ctrl-C again stops at once")
            return
        of_person = signal.SIGINT in (number, self.number)
        if time.monotonic() - self._at > (SAME_PRESS_SECONDS if of_person else self.repeat_seconds):
            os._exit(128 + number)


@contextmanager
def interruptible(
    kept: str | Callable[[], str] = "", signals: Sequence[signal.Signals] = (signal.SIGINT,)
) -> Iterator[None]:
    """Ends the program with one line and status 130 where Ctrl-C was pressed, cleaning up; a second one ends it at once.

    So it ends, with status 1, where a file cannot be read or written (a full disk, a folder that was removed), and where
    another process of the run has so ended.

    Args:
        kept: what the line says besides, such as how to go on.
        signals: those that are taken so; the status of another one is 128 and its number.
    """
    pressed: list[float] = []
    first = signal.SIGINT

    def interrupt(number: int, frame: Any) -> None:
        nonlocal first
        pressed.append(time.monotonic())
        if len(pressed) == 1:
            first = signal.Signals(number)
            raise KeyboardInterrupt
        if pressed[-1] - pressed[0] > SAME_PRESS_SECONDS:
            kill_children()
            os._exit(128 + number)

    taken = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
        for number in taken:  # all is done: an interpreter that ends could only answer with a traceback
            signal.signal(number, signal.SIG_DFL)
    except BaseException as error:
        # Whatever comes of it: FAISS and gloo, interrupted or left by another process, raise errors of their own.
        # As gloo says it, where the other process has said why.
        is_left = isinstance(error, RuntimeError) and re.search("Connection (closed|reset) by peer", str(error))
        if not pressed and not is_left and not isinstance(error, OSError):
            raise
        if pressed:
            status, said = 128 + first, f"stopped by {'Ctrl-C' if first == signal.SIGINT else first.name}"
            what = kept if isinstance(kept, str) else kept()
        elif is_left:
            status, said, what = 1, "error: another process of this run has ended", ""
        else:
            status, said = 1, f"error: {error}"
            what = "" if isinstance(kept, str) else kept()  # nobody has looked how far it had come
        _tell(f"{said}{f'; {what}' if what else ''}", by_all=not pressed)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # gloo's threads would abort an interpreter that ends
            sys.stdout.flush()
            unlock_outputs()
            os._exit(status)
        raise SystemExit(status) from None


def _tell(text: str, *, by_all: bool = False) -> None:
    """One line on stderr, of the first process of a machine or of all; written at once, as a signal's handler has to."""
    if by_all or os.environ.get("LOCAL_RANK", "0") == "0":
        line = f"\n{os.path.basename(sys.argv[0])}: {printable(text)}\n"  # below what the terminal shows of the key, or a bar
        with suppress(OSError):
            os.write(2, line.encode(errors="replace"))
