"""Files of rows: finding them, reading every format, and saying what is wrong with them, by file and line.

Whatever a file holds, it is read or refused: memory stays bounded, and nothing else than a ValueError comes of it.
"""

import difflib
import glob
import gzip
import hashlib
import importlib.metadata
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
FIELDS = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt")  # of a training row
MAX_FAULTS_SHOWN = 10
BOM = b"\xef\xbb\xbf"
UNREADABLE = object()
BROKEN_FILE = ("ZstdError", "ArrowException")  # of libraries that are imported where they are needed
# Unpacked bytes: what a few kilobytes of a .gz can become must not fill the memory.
LONGEST_LINE = 2**28
LARGEST_ARRAY = 2**31
LARGEST_JSON = 2**27
LARGEST_YAML = 2**20
MOST_YAML_NODES = 100_000  # every alias counted as what it stands for
DEEPEST = 100  # what is nested deeper, Python may read and then not be able to write or compare


class BrokenFileError(ValueError):
    """A file that is not what its name says."""


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


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
        elif os.path.lexists(path):
            faults.add(path, "is neither a file nor a folder, or a link that leads nowhere")
        elif matches := [] if "\0" in path else sorted(glob.glob(path)):
            files += find_files(matches, faults)
        else:
            near = near_path(path)
            faults.add(path, "no such file or folder" + (f"; did you mean {near}?" if near else ""))
    return files


def name_that_finds(path: str, names: Sequence[str]) -> str | None:
    """Which of `names` is a folder or glob by which `find_files` reads a file that is to be written to `path`."""
    if not path.endswith(EXTENSIONS):
        return None
    folder = PurePath(os.path.realpath(os.path.dirname(os.path.abspath(path))))
    for name in names:
        if os.path.isdir(name):
            finds = PurePath(os.path.realpath(name)) == folder
        elif not name or os.path.lexists(name) or "\0" in name:
            finds = False
        else:  # a glob finds files, and folders with files
            pattern = os.path.realpath(name)
            finds = folder.match(pattern) or (folder / os.path.basename(path)).match(pattern)
        if finds:
            return name
    return None


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
    known = isinstance(error, OSError | EOFError | zlib.error | UnicodeDecodeError | BrokenFileError)
    return known or any(kind.__name__ in BROKEN_FILE for kind in type(error).__mro__)


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


def parse_json(where: str, raw: bytes, faults: Faults) -> Any:
    """The JSON value in `raw`, or `UNREADABLE` after a fault."""
    try:
        return decode_json(raw)
    except ValueError as error:
        faults.add(where, str(error))
        return UNREADABLE


def decode_json(raw: bytes, *, is_text: bool = True) -> Any:
    """The JSON value in `raw`; ValueError says what is wrong with it.

    Args:
        is_text: whether strings have to be text; names of files need not be.
    """
    try:
        text = raw.decode("utf-8")
        value = json.loads(text)
        if is_text and ("\\ud" in text or "\\uD" in text):  # half a surrogate pair is JSON, but no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        found = raw[max(0, error.start - 20) :][:40]
        raise ValueError(f"broken UTF-8 at byte {error.start} of the line: {found!r}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1].encode("unicode_escape").decode()
        what = f"{half} is half of a character (a lone surrogate); remove it or write the whole character"
        raise ValueError(what) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise ValueError(f"not JSON ({error}): {shorten(raw[:80].decode('utf-8', 'replace'))}") from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise ValueError(f"nested more than {DEEPEST} deep: {shorten(text[:80])}")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        inside = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inside if isinstance(item, dict | list | tuple)]
    return bool(level)


def load_json(path: str) -> Any:
    """The value of a JSON file that is small: a manifest, an index, a configuration.

    Raises:
        ValueError: with the file, where it is not there, is too large, or is no JSON.
    """
    raw = _read_small(path, LARGEST_JSON)
    try:
        return decode_json(raw, is_text=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {str(error).replace(' of the line', '')}") from None


def load_yaml(path: str) -> Any:
    """The value of a YAML file; text, numbers, lists and mappings alone, and no alias that multiplies them.

    Raises:
        ValueError: with the file, and the line as far as YAML says it.
    """
    return _decode_yaml(path, _read_small(path, LARGEST_YAML))


def read_front_matter(path: str) -> dict[str, Any]:
    """The YAML between two lines of `---` at the head of a Markdown file; empty where there is none.

    Raises:
        ValueError, OSError: where it cannot be read.
    """
    with open(path, "rb") as file:
        head = re.match(rb"---\r?\n(.*?)^---[ \t\r]*$", file.read(LARGEST_YAML), re.DOTALL | re.MULTILINE)
    value = _decode_yaml(path, head[1]) if head else None
    return value if isinstance(value, dict) else {}


def _decode_yaml(path: str, raw: bytes) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > DEEPEST:  # PyYAML takes a time quadratic in the depth
                raise ValueError(f"nested more than {DEEPEST} deep")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    line, name = key.start_mark.line + 1, (key.tag, key.value)
                    if name in lines:  # PyYAML would take the last
                        raise ValueError(f"{key.value} is given twice, in lines {lines[name]} and {line}; keep one")
                    lines[name] = line
            return node

    try:
        loader = Loader(raw.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_nodes(node, {}) > MOST_YAML_NODES:
            raise ValueError(f"with its aliases written out it has more than {MOST_YAML_NODES:,} values")
        value = loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"{path} is not readable YAML: nested too deeply") from None
    # AttributeError and others: a tag (!!timestamp, !!bool) before what is none.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    return value


def _num_nodes(node: Any, known: dict[int, float]) -> float:
    """How many values a YAML node stands for; infinitely many where it is inside itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        if isinstance(node.value, str):
            node.value.encode("utf-8")  # no lone surrogates
            inside = []
        else:
            inside = [item for entry in node.value for item in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_num_nodes(item, known) for item in inside)
    return known[id(node)]


def is_inside(name: Any) -> bool:
    """Whether a name that stands in a file leads to something below that file's folder."""
    return isinstance(name, str) and name != "" and not os.path.isabs(name) and ".." not in name.split("/")


def _read_small(path: str, limit: int) -> bytes:
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # a pipe would be waited for
            raise BrokenFileError(f"{path} cannot be read: it is no file")
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise BrokenFileError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(raw) > limit:
        raise BrokenFileError(f"{path} cannot be read: it is larger than {limit >> 20} MB")
    return raw


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
