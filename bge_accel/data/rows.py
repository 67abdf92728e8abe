"""Checked training rows of any number, in Arrow files that are mapped into memory and never read whole.

A data file is read and checked once. What it holds is then kept as an Arrow file in a cache, found again by the data
file's path, size, time of change and a digest of its bytes (of a large file, of a sample of them).
"""

import bisect
import glob
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_accel.data.examples import draw_other_passage
from bge_accel.data.reading import FIELDS, check_training_row, read_rows, text_id
from bge_accel.files.faults import Faults, is_broken_file
from bge_accel.files.finding import find_files
from bge_accel.files.parsing import load_json
from bge_accel.processes.progress import progress

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 3  # of the cached files; a higher one makes them anew
ROWS_PER_BATCH = 1000
# A file of up to so many bytes is digested whole (in a tenth of a second); of a larger one, so many blocks of this size.
DIGESTED_WHOLE, DIGESTED_BLOCKS, DIGESTED_BLOCK_SIZE = 2**26, 256, 2**16


def default_cache_folder() -> str:
    """Where checked rows are kept: `bge_accel/rows` in `XDG_CACHE_HOME`, else in `~/.cache`."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bge_accel", "rows")


class TrainingRows:
    """Checked training rows with the place each came from; memory does not grow with their number.

    Args:
        paths: files, globs or folders of rows `{"query", "pos", "neg"}`.
        max_rows_per_file: a larger file is cut to a random sample of this size, drawn from `seed`.
        need_scores: every row must carry `pos_scores`, negatives and their `neg_scores`.
        cache_folder: where the checked rows are kept; by default `default_cache_folder()`.

    Raises:
        ValueError: anything is wrong with any row of any file; the first ten faults with file and line.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        max_rows_per_file: int | None = None,
        seed: int = 0,
        need_scores: bool = False,
        cache_folder: str | None = None,
    ) -> None:
        faults = Faults()
        self.files: list[RowFile] = []
        self._chosen: list[np.ndarray | None] = []
        ends = [0]
        for number, path in enumerate(find_files(paths, faults)):
            file = open_rows(path, cache_folder or default_cache_folder(), faults)
            if file is None:
                continue
            if need_scores:
                for index in file.without_scores():
                    what = 'no "pos_scores" or "neg_scores": distillation needs a negative, and all scores'
                    faults.add(file.place(index), what)
            chosen = None
            if max_rows_per_file is not None and len(file) > max_rows_per_file:
                sample = random.Random(f"{seed}-{number}").sample(range(len(file)), max_rows_per_file)
                chosen = np.sort(np.array(sample, dtype=np.int64))
            self.files.append(file)
            self._chosen.append(chosen)
            ends.append(ends[-1] + (len(file) if chosen is None else len(chosen)))
        if not paths:
            faults.add("training data", "no file is named")
        faults.raise_if_any()
        self._ends = ends
        self._last: tuple[int, dict[str, Any]] = (-1, {})  # rows are asked for several times in a row

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._last[0] != index:
            file, inside = self._locate(index)
            self._last = index, file[inside]
        return self._last[1]

    def _locate(self, index: int) -> "tuple[RowFile, int]":
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index) - 1
        inside, chosen = index - self._ends[number], self._chosen[number]
        return self.files[number], inside if chosen is None else int(chosen[inside])

    def place(self, index: int) -> str:
        """Where a row came from, as `file:line`."""
        file, inside = self._locate(index)
        return file.place(inside)

    def text_bytes(self, index: int) -> tuple[int, list[int], list[int]]:
        """UTF-8 bytes of a row's query, of each positive and of each negative; the texts are not read."""
        file, inside = self._locate(index)
        return file.text_bytes(inside)

    def passages(self, index: int) -> list[str]:
        """All passages of a row."""
        row = self[index]
        return row["pos"] + (row.get("neg") or [])

    def digest(self) -> str:
        """Of all rows in their order, wherever their files lie."""
        parts = [(file.digest, None if chosen is None else chosen.tobytes()) for file, chosen in self._parts()]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _parts(self) -> "Iterator[tuple[RowFile, np.ndarray | None]]":
        return zip(self.files, self._chosen, strict=True)

    def num_negatives(self) -> np.ndarray:
        """(rows,) how many negatives each row has; no text is read."""
        counts = (
            file.num_negatives() if chosen is None else file.num_negatives()[chosen] for file, chosen in self._parts()
        )
        return np.concatenate(list(counts))

    def check_negatives(self) -> int:
        """How many rows have no negatives of their own.

        Raises:
            ValueError: for one of them the data has no passage that could serve.
        """
        without = np.flatnonzero(self.num_negatives() == 0).tolist()
        if without and len(self) < 10_000:  # with more, some passage always serves
            # The row with most positives is the hardest to serve.
            hardest = max(without, key=lambda index: len(self.known_positives(index)))
            draw_other_passage(self, hardest, self.known_positives(hardest), lambda: 0.0)
        return len(without)

    def first_with_prompt(self) -> dict[str, int]:
        """Each different "prompt" of rows, with the index of the first row that has it; no other text is read."""
        first: dict[str, int] = {}
        for index, (file, chosen) in zip(self._ends, self._parts(), strict=False):
            for chunk in file.prompts(chosen).chunks:
                if chunk.null_count < len(chunk):
                    encoded = chunk.dictionary_encode()
                    codes, places = np.unique(encoded.indices.fill_null(-1).to_numpy(), return_index=True)
                    for code, place in zip(codes.tolist(), places.tolist(), strict=True):
                        if code >= 0:
                            first.setdefault(encoded.dictionary[code].as_py(), index + place)
                index += len(chunk)
        return first

    def query_ids(self) -> np.ndarray:
        """(rows,) `text_id` of each query, int64; no text is read."""
        ids = (file.query_ids() if chosen is None else file.query_ids()[chosen] for file, chosen in self._parts())
        return np.concatenate(list(ids))

    @cached_property
    def repeated_queries(self) -> "RepeatedQueries":
        """What is known of queries that occur more than once; of these rows alone until `join_known_positives`."""
        return RepeatedQueries([self])

    def known_positives(self, index: int) -> set[str]:
        """The texts known to answer a row's query: its own positives and those of every row with the same query."""
        row = self[index]
        return {*row["pos"], *self.repeated_queries.positives_of(row["query"])}


class RepeatedQueries:
    """The rows of all sources whose query other rows have too, found by its `text_id`.

    Only these need to know of other rows' positives; 16 bytes are held for each.
    """

    def __init__(self, sources: Sequence[TrainingRows]) -> None:
        self._sources = sources
        self._starts = np.cumsum([0, *(len(rows) for rows in sources)])
        ids = np.concatenate([rows.query_ids() for rows in sources])
        order = np.argsort(ids, kind="stable")
        same = ids[order[1:]] == ids[order[:-1]]
        self._rows = order[np.concatenate([[False], same]) | np.concatenate([same, [False]])]
        self._ids = ids[self._rows]
        self.positives_of = lru_cache(maxsize=4096)(self._positives_of)

    def _positives_of(self, query: str) -> frozenset[str]:
        """Positives of all rows with this query; none where it occurs once."""
        first, end = (np.searchsorted(self._ids, text_id(query), side) for side in ("left", "right"))
        same = map(self._row, self._rows[first:end].tolist())
        return frozenset(text for row in same if row["query"] == query for text in row["pos"])

    def _row(self, index: int) -> dict[str, Any]:
        source = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._sources[source][index - int(self._starts[source])]


def join_known_positives(sources: Sequence[TrainingRows]) -> None:
    """Lets every source know the positives that any of them has for its queries."""
    joined = RepeatedQueries(sources)
    for rows in sources:
        rows.repeated_queries = joined


class RowFile:
    """The rows of one data file, from its cached copy."""

    def __init__(self, path: str, arrow: str, digest: str) -> None:
        import pyarrow as pa

        self.path, self.digest = path, digest
        table = pa.ipc.open_stream(pa.memory_map(arrow)).read_all()
        self._batches: list[pa.RecordBatch] = table.to_batches()
        self._num_rows = table.num_rows
        self._places: dict[int, tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]] = {}

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, inside = divmod(index, ROWS_PER_BATCH)
        row = self._batches[batch].slice(inside, 1)
        fields = {name: row.column(name)[0].as_py() for name in FIELDS}
        return {name: value for name, value in fields.items() if value is not None}

    def text_bytes(self, index: int) -> tuple[int, list[int], list[int]]:
        """UTF-8 bytes of a row's query, of each positive and of each negative; the texts are not read."""
        number, inside = divmod(index, ROWS_PER_BATCH)
        if number not in self._places:
            batch = self._batches[number]
            lists = [batch.column(name) for name in ("pos", "neg")]
            places = [(column.offsets.to_numpy(), _text_ends(column.values)) for column in lists]
            self._places[number] = _text_ends(batch.column("query")), places
        queries, lists_of = self._places[number]
        bounds = [ends[starts[inside] : starts[inside + 1] + 1].tolist() for starts, ends in lists_of]
        positives, negatives = ([end - start for start, end in pairwise(places)] for places in bounds)
        return int(queries[inside + 1] - queries[inside]), positives, negatives

    def _column(self, name: str) -> "pa.ChunkedArray":
        import pyarrow as pa

        return pa.chunked_array([batch.column(name) for batch in self._batches])

    def place(self, index: int) -> str:
        """Where a row came from, as `file:line`."""
        batch, inside = divmod(index, ROWS_PER_BATCH)
        return f"{self.path}:{self._batches[batch].column('line')[inside]}"

    def query_ids(self) -> np.ndarray:
        """(rows,) `text_id` of each query, int64."""
        return self._column("query_id").to_numpy()

    def num_negatives(self) -> np.ndarray:
        """(rows,) how many negatives each row has."""
        return self._count("neg")

    def prompts(self, chosen: np.ndarray | None) -> "pa.ChunkedArray":
        """The "prompt" of each row, or of the chosen ones; null where there is none."""
        column = self._column("prompt")
        return column if chosen is None else column.take(chosen)

    def without_scores(self) -> list[int]:
        """Indices of the rows that lack a teacher's scores of positives or negatives."""
        lacking = (self._count("pos_scores") == 0) | (self._count("neg_scores") == 0)
        return np.flatnonzero(lacking).tolist()

    def _count(self, name: str) -> np.ndarray:
        import pyarrow.compute as pc

        return pc.fill_null(pc.list_value_length(self._column(name)), 0).to_numpy()


def _text_ends(texts: "pa.LargeStringArray") -> np.ndarray:
    """(texts + 1,) where in their bytes each text begins and the last ends: a view of the mapped file."""
    if not len(texts):  # may have no buffer at all
        return np.zeros(1, dtype=np.int64)
    return np.frombuffer(texts.buffers()[1], dtype=np.int64, count=len(texts) + 1)


def open_rows(path: str, cache_folder: str, faults: Faults) -> RowFile | None:
    """The rows of one file, checked now or at an earlier reading; None, and `faults`, where something is wrong.

    Several processes may ask for the same file: one reads it, the others wait and open what it left.

    Raises:
        ValueError: the cache cannot be written.
    """
    from filelock import FileLock

    try:
        state = file_state(path)
    except OSError as error:
        faults.add(path, f"cannot be read: {error}")
        return None
    # Copies of earlier states of the same file are of no use any more: they share the first part of the name.
    stem = os.path.join(cache_folder, _hash(os.path.realpath(path)))
    name = f"{stem}-{_hash(f'{FORMAT} {state}')}"
    try:
        os.makedirs(cache_folder, exist_ok=True)
        with FileLock(f"{stem}.lock"):
            if not (os.path.exists(f"{name}.json") and os.path.exists(f"{name}.arrow")):
                if not _write_cache(path, name, faults):
                    return None
                for file in glob.glob(f"{glob.escape(stem)}-*"):
                    if not file.startswith(name):
                        os.remove(file)
    except OSError as error:
        raise ValueError(
            f"checked rows cannot be kept in {cache_folder}: {error.strerror or error}; name a folder with space for a "
            "copy of the data by --cache_path"
        ) from None
    try:
        note = load_json(f"{name}.json")
        if note["copy"] != file_digest(f"{name}.arrow"):
            raise ValueError("it is not what was written")
        return RowFile(path, f"{name}.arrow", note["digest"])
    except Exception as error:
        if not (is_broken_file(error) or isinstance(error, ValueError | LookupError | TypeError)):
            raise
        raise ValueError(f"{name}.arrow, the checked copy of {path}, is damaged ({error}); remove it") from None


def file_state(path: str) -> tuple[int, int, str]:
    """Size, time of change and a digest of a file: an editor or a copy may keep size and time."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, file_digest(path)


def file_digest(path: str) -> str:
    """Digest of a file's size and all its bytes, or of a large one's head, its tail and blocks between.

    What is changed in a large file between the blocks alone is not seen.
    """
    size = os.path.getsize(path)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    starts: Sequence[int] = range(0, size, DIGESTED_BLOCK_SIZE)
    if size > DIGESTED_WHOLE:
        starts = [starts[i * (len(starts) - 1) // (DIGESTED_BLOCKS - 1)] for i in range(DIGESTED_BLOCKS)]
    with open(path, "rb", buffering=0) as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(DIGESTED_BLOCK_SIZE))
    return digest.hexdigest()


def _hash(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=8).hexdigest()


def _write_cache(path: str, name: str, faults: Faults) -> bool:
    """Checks every row of a file and writes them beside a note that says the copy is whole; False after a fault."""
    import pyarrow as pa

    texts, numbers = pa.list_(pa.large_string()), pa.list_(pa.float64())
    fields = [pa.large_string(), texts, texts, numbers, numbers, pa.string()]
    schema = pa.schema([*zip(FIELDS, fields, strict=True), ("line", pa.int64()), ("query_id", pa.int64())])
    digest, before, count = hashlib.blake2b(digest_size=16), faults.count, 0
    columns: dict[str, list] = {name: [] for name in schema.names}
    aside = f"{name}.part"  # one process writes it at a time; what a killed one left is written over, or stale
    try:
        with open(aside, "wb") as file, pa.ipc.new_stream(file, schema) as writer:

            def flush() -> None:
                arrays = [pa.array(columns[field.name], field.type) for field in schema]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
                for column in columns.values():
                    column.clear()

            rows = read_rows(path, faults)
            shown = f"checking {os.path.basename(path)}"
            for where, line, row in progress(None, shown, "row", iterable=rows, delay=2, unit_scale=True, leave=False):
                for what in check_training_row(row):
                    faults.add(where, what)
                if faults.count > before:
                    continue
                for field in ("pos_scores", "neg_scores"):  # JSON's whole numbers may be of any size
                    row[field] = [float(score) for score in row[field]] if row.get(field) is not None else None
                values = [row.get(field) for field in FIELDS]
                digest.update(json.dumps(values).encode())
                for column, value in zip(columns.values(), [*values, line, text_id(row["query"])], strict=True):
                    column.append(value)
                count += 1
                if count % ROWS_PER_BATCH == 0:
                    flush()
            if columns["line"]:
                flush()
        if faults.count > before:
            return False
        about = {
            "path": os.path.realpath(path),
            "rows": count,
            "digest": digest.hexdigest(),
            "copy": file_digest(aside),
        }
        os.replace(aside, f"{name}.arrow")
        with open(aside, "w", encoding="utf-8") as note:
            json.dump(about, note)
        os.replace(aside, f"{name}.json")
        return True
    finally:
        if os.path.exists(aside):
            os.remove(aside)
