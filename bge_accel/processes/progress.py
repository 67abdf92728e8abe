"""What a run prints while it works."""

import os
import sys
from typing import Any

from bge_accel.files.text import printable

LOG_SECONDS = 60  # between two lines of progress where there is no terminal


def progress(total: int | None, what: str, unit: str, *, shown: bool = True, **options: Any) -> Any:
    """A bar on a terminal and in a notebook; in the log of a job a line a minute, so nothing of what takes less.

    Args:
        options: of tqdm.
    """
    from tqdm import tqdm

    options = {"total": total, "desc": what, "unit": unit, "disable": not shown, **options}
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        of_total, to_go = (" of {total_fmt}", ", {remaining} to go") if total is not None else ("", "")
        options |= {
            "bar_format": f"{{desc}}: {{n_fmt}}{of_total} {unit}s, {{elapsed}} gone{to_go}, {{rate_fmt}}",
            "mininterval": LOG_SECONDS,
            "maxinterval": 2 * LOG_SECONDS,
            "delay": LOG_SECONDS,
            "leave": False,
            "file": _Lines(),
        }
    return tqdm(**options)


class _Lines:
    """Where tqdm writes a bar over the last one, writes lines to stderr."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            print(printable(text), file=sys.stderr, flush=True)

    def flush(self) -> None: ...


def say(text: str) -> None:
    """Prints what may hold names and texts of others: no control character reaches the terminal."""
    print(printable(text), flush=True)


def warn(text: str) -> None:
    """Prints a warning on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(f"warning: {text}"), file=sys.stderr, flush=True)
