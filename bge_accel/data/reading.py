"""Files of rows: finding them, reading every format, and saying what is wrong with them, by file and line.

Whatever a file holds, it is read or refused: memory stays bounded, and nothing else than a ValueError comes of it.
"""

import gzip
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from bge_accel.files.faults import BrokenFileError, Faults, is_broken_file
from bge_accel.files.finding import find_files
from bge_accel.files.parsing import BOM, UNREADABLE, parse_json
from bge_accel.files.text import shorten

FIELDS = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt")  # of a training row
# Unpacked bytes: what a few kilobytes of a .gz can become must not fill the memory.
LONGEST_LINE = 2**28
LARGEST_ARRAY = 2**31


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
            for value in parquet_rows(batch):
                line += 1
                yield line, value


def parquet_rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of an Arrow batch; `BrokenFileError` where one holds what is no text, no date or the like."""
    try:
        return batch.to_pylist()
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BrokenFileError(f"a value cannot be read ({error})") from None


def _read_json(path: str, faults: Faults) -> Iterator[tuple[int, Any]]:
    with open_binary(path) as file:
        if begins_array(file):
            yield from read_array(path, file, faults)
        else:
            for line, raw in raw_lines(file):
                yield line, parse_json(f"{path}:{line}", raw, faults)


def begins_array(file: io.BufferedIOBase) -> bool:
    """Whether a file that was just opened holds one JSON array and not lines."""
    return file.peek(4096)[:4096].removeprefix(BOM).lstrip()[:1] == b"["  # type: ignore[attr-defined]


def raw_lines(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its number; `BrokenFileError` where one has no end."""
    for line, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
        if len(raw) == LONGEST_LINE:
            raise BrokenFileError(f"line {line} is longer than {LONGEST_LINE >> 20} MB, so it is no row")
        if line == 1:
            raw = raw.removeprefix(BOM)
        if raw.strip():
            yield line, raw


def read_array(path: str, file: io.BufferedIOBase, faults: Faults) -> Iterator[tuple[int, Any]]:
    """Each item of a file that is one JSON array, counted from 1."""
    raw = bytearray()
    while part := file.read(2**20):
        raw += part
        if len(raw) > LARGEST_ARRAY:
            raise BrokenFileError(f"one JSON array of more than {LARGEST_ARRAY >> 20} MB; write one row a line instead")
    items = parse_json(path, bytes(raw.removeprefix(BOM)), faults)
    yield from enumerate(items if isinstance(items, list) else [items], start=1)


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
        if texts is None and key == "neg":
            texts = []
        if key == "pos" and "pos" not in row:
            wrong.append('"pos" is missing: every row needs at least one positive text, as a list')
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


def check_json(paths: Sequence[str], faults: Faults) -> None:
    """Finds values of Parquet files that JSON lines, in which rows are written, cannot hold."""
    for path in find_files(paths, faults):
        for where, _, row in read_rows(path, faults) if path.endswith(".parquet") else ():
            try:
                json.dumps(row)
            except TypeError as error:
                faults.add(where, f"the row cannot be written as JSON ({error}); drop that column")
