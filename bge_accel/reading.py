"""Files of rows: finding them, reading every format, and saying what is wrong with them, by file and line."""

import glob
import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
FIELDS = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt")  # of a training row
MAX_FAULTS_SHOWN = 10
BOM = b"\xef\xbb\xbf"
UNREADABLE = object()
BROKEN_FILE = ("ZstdError", "ArrowInvalid")  # of libraries that are imported where they are needed


class Faults:
    """Collects what is wrong with the input; the first ten are shown, all are counted."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, where: str, what: str) -> None:
        self.count += 1
        if len(self.shown) < MAX_FAULTS_SHOWN:
            self.shown.append(f"{where}: {what}")

    def raise_if_any(self) -> None:
        """Raises ValueError with the first faults, one a line."""
        if self.count:
            more = f"\n... and {self.count - len(self.shown)} more" if self.count > len(self.shown) else ""
            faults = "fault" if self.count == 1 else "faults"
            raise ValueError(f"{self.count} {faults} in the input:\n" + "\n".join(self.shown) + more)


def shorten(value: Any, limit: int = 80) -> str:
    """A value as an error message shows it: JSON where possible, cut to `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


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
        elif matches := sorted(glob.glob(path)):
            files += find_files(matches, faults)
        else:
            faults.add(path, "no such file or folder")
    return files


def open_binary(path: str) -> io.BufferedIOBase:
    """Opens a plain, `.gz` or `.zst` file for reading bytes."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.endswith(".zst"):
        try:
            from backports import zstd
        except ImportError:
            raise ValueError(f"{path}: reading .zst needs `pip install backports.zstd`") from None
        return zstd.open(path, "rb")  # type: ignore[return-value]
    return open(path, "rb")


def is_broken_file(error: Exception) -> bool:
    """Whether an error says that a file cannot be read, or is not what its name says."""
    # EOFError: a compressed file cut short; the libraries' own errors for one that is broken.
    return isinstance(error, OSError | EOFError | zlib.error) or type(error).__name__ in BROKEN_FILE


def read_rows(path: str, faults: Faults) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yields (place, line, object) for each row of a file; what cannot be read goes to `faults` and is left out.

    A file is JSON lines, one JSON array or Parquet (then `line` counts its items). A place reads `train.jsonl:17`.
    """
    found = False
    try:
        for line, value in _read_parquet(path) if path.endswith(".parquet") else _read_json(path, faults):
            found = True
            where = f"{path}:{line}"
            if isinstance(value, dict):
                yield where, line, value
            elif value is not UNREADABLE:
                kind = "an array" if isinstance(value, list) else "a plain value"
                faults.add(where, f"{kind} where an object {{...}} is expected: {shorten(value)}")
    except Exception as error:
        if not is_broken_file(error):
            raise
        faults.add(path, f"cannot be read: {error}")
        return
    if not found:
        faults.add(path, "the file is empty; remove it from the list or fill it")


def _read_parquet(path: str) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs `pip install pyarrow`") from None
    line = 0
    with ParquetFile(path, memory_map=True) as file:
        for batch in file.iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                line += 1
                yield line, value


def _read_json(path: str, faults: Faults) -> Iterator[tuple[int, Any]]:
    with open_binary(path) as file:
        if begins_array(file):
            yield from _read_array(path, file.read(), faults)
        else:
            for line, raw in raw_lines(file):
                yield line, parse_json(f"{path}:{line}", raw, faults)


def begins_array(file: io.BufferedIOBase) -> bool:
    """Whether a file that was just opened holds one JSON array and not lines."""
    return file.peek(4096)[:4096].removeprefix(BOM).lstrip()[:1] == b"["  # type: ignore[attr-defined]


def raw_lines(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its number."""
    for line, raw in enumerate(file, start=1):
        if line == 1:
            raw = raw.removeprefix(BOM)
        if raw.strip():
            yield line, raw


def _read_array(path: str, raw: bytes, faults: Faults) -> Iterator[tuple[int, Any]]:
    items = parse_json(path, raw.removeprefix(BOM), faults)
    yield from enumerate(items if isinstance(items, list) else [items], start=1)


def parse_json(where: str, raw: bytes, faults: Faults) -> Any:
    """The JSON value in `raw`, or `UNREADABLE` after a fault."""
    try:
        text = raw.decode("utf-8")
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeDecodeError as error:
        faults.add(where, f"broken UTF-8 at byte {error.start} of the line: {raw[max(0, error.start - 20) :][:40]!r}")
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1].encode("unicode_escape").decode()
        faults.add(where, f"{half} is half of a character (a lone surrogate); remove it or write the whole character")
    except (json.JSONDecodeError, RecursionError) as error:
        faults.add(where, f"not JSON ({error}): {shorten(raw[:80].decode('utf-8', 'replace'))}")
    return UNREADABLE


def check_training_row(row: dict[str, Any]) -> list[str]:
    """What is wrong with one training row, each with its remedy; an empty list where nothing is."""
    wrong = []
    query = row.get("query")
    if "query" not in row:
        wrong.append('"query" is missing: every row needs {"query": str, "pos": [str, ...]}')
    elif not isinstance(query, str):
        wrong.append(f'"query" is {shorten(query)}: it has to be a string')
    elif not query.strip():
        wrong.append('"query" is empty: remove the row or fill it in')
    for key in ("pos", "neg"):
        texts = row.get(key)
        if key == "pos" and "pos" not in row:
            wrong.append('"pos" is missing: every row needs at least one positive text, as a list')
        elif texts is None and key == "neg":
            continue
        elif not isinstance(texts, list):
            wrong.append(f'"{key}" is {shorten(texts)}: it has to be a list of strings, like ["..."]')
        elif key == "pos" and not texts:
            wrong.append('"pos" is empty: every row needs at least one positive text; remove the row or add one')
        else:
            for index, text in enumerate(texts):
                if not isinstance(text, str):
                    wrong.append(f'"{key}"[{index}] is {shorten(text)}: it has to be a string')
                elif not text.strip():
                    wrong.append(f'"{key}"[{index}] is empty: remove it or fill it in')
        scores = row.get(f"{key}_scores")
        if scores is not None and isinstance(texts, list):
            if not isinstance(scores, list) or len(scores) != len(texts):
                wrong.append(f'"{key}_scores" is {shorten(scores)}: it needs one number for each of {len(texts)} texts')
            elif not all(_is_number(score) for score in scores):
                wrong.append(f'"{key}_scores" is {shorten(scores)}: every score has to be a finite number')
    if row.get("prompt") is not None and not isinstance(row["prompt"], str):
        wrong.append(f'"prompt" is {shorten(row["prompt"])}: it has to be a string')
    if not wrong:
        for text in set(row["pos"]).intersection(row.get("neg") or ()):
            wrong.append(f'"neg" holds a text that is also in "pos": {shorten(text)}; remove it from one of them')
    return wrong


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def text_id(text: str) -> int:
    """A signed 64-bit digest of a text, the same on every process and machine."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True
    )
