"""Text for people: one line of anything, sizes, names, tables. Nothing in it can steer a terminal."""

import difflib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


# What a terminal or a page may take for a command: C0 but tab and line feed, DEL and C1, marks and overrides of direction;
# and halves of characters, which a name of a file may hold and no stream takes.
_CONTROLS = [*range(9), *range(11, 32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F)]


_CONTROLS += [*range(0x2066, 0x206A), *range(0xD800, 0xE000)]


_ESCAPED = {code: f"\\u{code:04x}" for code in _CONTROLS}


def printable(text: str) -> str:
    """A text for people, in which control characters are written out, as in `\\u001b`; JSON stays the same JSON."""
    return text.translate(_ESCAPED)


def shorten(value: Any, limit: int = 80) -> str:
    """A value as an error message shows it: JSON where possible, printable, cut to `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__}"
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def near_path(path: str) -> str | None:
    """A file or folder of a similar name that stands where this one does not."""
    folder, name = os.path.split(os.path.normpath(path))
    try:
        near = difflib.get_close_matches(name, os.listdir(folder or "."), n=1, cutoff=0.75)
    except (OSError, ValueError):
        return None
    return os.path.join(folder, near[0]) if near else None


def shown_size(num_bytes: float) -> str:
    """Bytes as people read them: 512 bytes, 1.5 MB, 12.0 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,.0f} bytes"


def shown_name(path: str) -> str:
    """The last part of a model's path, or the last two where that says too little; a name on the hub as it is."""
    is_path = os.path.isdir(path) or path.startswith((".", os.sep)) or path.rstrip("/").count("/") > 1
    if not is_path:
        return path
    parts = os.path.abspath(path).split(os.sep)
    return "/".join(parts[-2:] if parts[-1] == "model" or parts[-1].startswith("checkpoint-") else parts[-1:])


def shown_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def installed_versions() -> dict[str, str | None]:
    """What the figures were made with; None for a package that is not installed."""
    packages = ("bge_accel", "torch", "transformers", "tokenizers", "numpy", "faiss-cpu", "faiss-gpu")
    return {"python": platform.python_version(), **{name: installed_version(name) for name in packages}}
