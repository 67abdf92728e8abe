"""Training rows: reading, checking, ordering, and drawing one group of passages per query."""

import glob
import gzip
import hashlib
import io
import json
import math
import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

EXTENSIONS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
MAX_FAULTS_SHOWN = 10
_BOM = b"\xef\xbb\xbf"
_UNREADABLE = object()


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


def read_json_rows(path: str, faults: Faults) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yields (place, line, object) for each row of a file; what cannot be read goes to `faults` and is left out.

    A file is JSON lines, or one JSON array (then `line` counts its items). A place reads `train.jsonl:17`.
    """
    found = False
    try:
        with open_binary(path) as file:
            first = file.peek(4096)[:4096].removeprefix(_BOM).lstrip()[:1]  # type: ignore[attr-defined]
            if first == b"[":
                rows = _read_array(path, file.read(), faults)
            else:
                rows = _read_lines(path, file, faults)
            for line, value in rows:
                found = True
                where = f"{path}:{line}"
                if isinstance(value, dict):
                    yield where, line, value
                elif value is not _UNREADABLE:
                    kind = "an array" if isinstance(value, list) else "a plain value"
                    faults.add(where, f"{kind} where an object {{...}} is expected: {shorten(value)}")
    except Exception as error:
        # EOFError: a compressed file cut short; the libraries' own errors for one that is broken.
        if not isinstance(error, OSError | EOFError | zlib.error) and type(error).__name__ != "ZstdError":
            raise
        faults.add(path, f"cannot be read: {error}")
        return
    if not found:
        faults.add(path, "the file is empty; remove it from the list or fill it")


def _read_lines(path: str, file: Any, faults: Faults) -> Iterator[tuple[int, Any]]:
    for line, raw in enumerate(file, start=1):
        if line == 1:
            raw = raw.removeprefix(_BOM)
        if not raw.strip():
            continue
        yield line, _parse(f"{path}:{line}", raw, faults)


def _read_array(path: str, raw: bytes, faults: Faults) -> Iterator[tuple[int, Any]]:
    items = _parse(path, raw.removeprefix(_BOM), faults)
    yield from enumerate(items if isinstance(items, list) else [items], start=1)


def _parse(where: str, raw: bytes, faults: Faults) -> Any:
    """The JSON value in `raw`, or `_UNREADABLE` after a fault."""
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
    return _UNREADABLE


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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def text_id(text: str) -> int:
    """A signed 64-bit digest of a text, the same on every process and machine."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True
    )


class TrainingRows:
    """Checked training rows with the place each came from.

    Args:
        paths: files, globs or folders of rows `{"query", "pos", "neg"}`.
        max_rows_per_file: a larger file is cut to a random sample of this size, drawn from `seed`.
        need_scores: every row must carry `pos_scores`, negatives and their `neg_scores`.

    Raises:
        ValueError: anything is wrong with any row of any file; the first ten faults with file and line.
    """

    def __init__(
        self, paths: Sequence[str], *, max_rows_per_file: int | None = None, seed: int = 0, need_scores: bool = False
    ) -> None:
        faults = Faults()
        self.rows: list[dict[str, Any]] = []
        self.places: list[tuple[str, int]] = []
        for number, path in enumerate(find_files(paths, faults)):
            rows, places = [], []
            for where, line, row in read_json_rows(path, faults):
                for what in check_training_row(row):
                    faults.add(where, what)
                if need_scores and (row.get("pos_scores") is None or not row.get("neg_scores")):
                    faults.add(where, 'no "pos_scores" or "neg_scores": distillation needs a negative, and all scores')
                rows.append(row)
                places.append((path, line))
            if max_rows_per_file is not None and len(rows) > max_rows_per_file:
                chosen = sorted(random.Random(f"{seed}-{number}").sample(range(len(rows)), max_rows_per_file))
                rows, places = [rows[i] for i in chosen], [places[i] for i in chosen]
            self.rows += rows
            self.places += places
        if not paths:
            faults.add("training data", "no file is named")
        faults.raise_if_any()
        # Only queries that occur more than once need to know of other rows' positives.
        ids_of_query: dict[str, list[int]] = {}
        for index, row in enumerate(self.rows):
            ids_of_query.setdefault(row["query"], []).append(index)
        self._same_query = {query: rows for query, rows in ids_of_query.items() if len(rows) > 1}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def place(self, index: int) -> str:
        """Where a row came from, as `file:line`."""
        path, line = self.places[index]
        return f"{path}:{line}"

    def passages(self, index: int) -> list[str]:
        """All passages of a row."""
        return self.rows[index]["pos"] + (self.rows[index].get("neg") or [])

    def check_negatives(self) -> int:
        """How many rows have no negatives of their own.

        Raises:
            ValueError: for one of them the data has no passage that could serve.
        """
        without = [index for index, row in enumerate(self.rows) if not row.get("neg")]
        if without:
            most = max(range(len(without)), key=lambda i: len(self.known_positives(without[i])))
            # The row with most positives is the hardest to serve.
            _draw_other_passage(self, without[most], self.known_positives(without[most]), lambda: 0.0)
        return len(without)

    def known_positives(self, index: int) -> set[str]:
        """The texts known to answer a row's query: its own positives and those of every row with the same query."""
        rows = self._same_query.get(self.rows[index]["query"], (index,))
        return {text for row in rows for text in self.rows[row]["pos"]}


class RowOrder:
    """The endless sequence of rows: one shuffle per epoch, laid end to end.

    A position's row is a pure function of (seed, position), so a run can continue at any step at no cost.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.seed = num_rows, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, row) at a position counted from the start of training."""
        epoch, index = divmod(position, self.num_rows)
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch, self._permutation = epoch, rng.permutation(self.num_rows)
        return epoch, int(self._permutation[index])


def batch_positions(batch: int, per_process: int, num_processes: int, process: int, total: int | None) -> range:
    """Positions of one process's share of a global batch.

    Args:
        batch: index of the global batch, counted from the start of training.
        total: the run's number of positions, at which its last batch is cut short (rounded up so that every process
            has equally many); None for full batches only.
    """
    start = batch * per_process * num_processes
    if total is not None:
        per_process = min(per_process, math.ceil((total - start) / num_processes))
    return range(start + process * per_process, start + (process + 1) * per_process)


class Example(NamedTuple):
    """One query with its group of passages, the drawn positive first."""

    row: int
    query: str
    passages: list[str]
    passage_ids: list[int]
    """`text_id` of each passage as it stands in the data."""
    known_ids: list[int]
    """`text_id` of every passage known to be a positive of this query."""
    teacher_scores: list[float] | None


def draw_example(
    rows: TrainingRows,
    row: int,
    epoch: int,
    *,
    seed: int,
    group_size: int,
    query_prefix: Callable[[str | None], str] = lambda prompt: "",
    passage_prefix: str = "",
    shuffle_ratio: float = 0.0,
    teacher_scores: bool = False,
) -> Example:
    """Draws one positive and `group_size - 1` negatives; the draw depends on (seed, epoch, row) alone.

    Every negative is used before any repeats. A row without negatives gets passages of other rows, never one that is
    known to answer its query.

    Args:
        query_prefix: from the row's own `prompt` (None if it has none) to the text put before the query.
        shuffle_ratio: chance that the three parts of a positive longer than 100 characters are put in random order.

    Raises:
        ValueError: no negative can be found for a row.
    """
    # Only random() is promised to give the same numbers in every version of Python.
    rng = random.Random(f"{seed}-{epoch}-{row}").random
    data = rows[row]
    known = rows.known_positives(row)
    positives, negatives = data["pos"], data.get("neg") or []
    drawn = int(rng() * len(positives))
    passages, scores = [positives[drawn]], []
    if teacher_scores:
        scores.append(data["pos_scores"][drawn])
    while len(passages) < group_size:
        if not negatives:
            passages.append(_draw_other_passage(rows, row, known, rng))
            continue
        order = _shuffled(len(negatives), rng)[: group_size - len(passages)]
        passages += [negatives[i] for i in order]
        if teacher_scores:
            scores += [data["neg_scores"][i] for i in order]
    passage_ids = [text_id(text) for text in passages]
    if shuffle_ratio > 0 and len(passages[0]) > 100 and rng() < shuffle_ratio:
        size = len(passages[0]) // 3 + 1
        parts = [passages[0][i : i + size] for i in range(0, len(passages[0]), size)]
        passages[0] = " ".join(parts[i] for i in _shuffled(len(parts), rng))
    return Example(
        row=row,
        query=query_prefix(data.get("prompt")) + data["query"],
        passages=[passage_prefix + text for text in passages],
        passage_ids=passage_ids,
        known_ids=sorted(text_id(text) for text in known),
        teacher_scores=scores if teacher_scores else None,
    )


def _shuffled(n: int, rng: Callable[[], float]) -> list[int]:
    items = list(range(n))
    for i in range(n - 1, 0, -1):
        j = int(rng() * (i + 1))
        items[i], items[j] = items[j], items[i]
    return items


def _draw_other_passage(rows: TrainingRows, row: int, known: set[str], rng: Callable[[], float]) -> str:
    for _ in range(100):
        texts = rows.passages(int(rng() * len(rows)))
        text = texts[int(rng() * len(texts))]
        if text not in known:
            return text
    for index in range(len(rows)):  # nearly all passages are known positives
        for text in rows.passages(index):
            if text not in known:
                return text
    raise ValueError(
        f"{rows.place(row)}: the row has no negatives, and every other passage of the data is one of its positives; "
        "add negatives or use --train_group_size 1"
    )
