"""Embeddings on disk: shards that are mapped into memory, a manifest of what they are, complete or absent.

A store is a folder with `manifest.json` and `shard-00000.npy`, `shard-00001.npy`, ... of `shard_size` rows each (the
last of what remains). A shard is written beside, flushed and renamed, so one that is there is whole, and a run that was
killed goes on with those that are missing. Every shard is a plain NumPy file, `numpy.load(path, mmap_mode="r")`, with a
checksum behind its numbers.
"""

import glob
import hashlib
import io
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bge_accel.files.atomic import flush
from bge_accel.files.parsing import load_json
from bge_accel.files.text import shorten

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = ("float16", "float32")
INCOMPLETE = ".incomplete"
ROWS_AT_ONCE = 8192
_ENCODE_AGAIN = "remove this file and run what wrote the store again, it encodes what is missing"

# What settings are called in a refusal; those not named here go by their own name.
_WORDS = {
    "weights": "the model's weights (digest)",
    "tokenizer": "the tokenizer (digest)",
    "precision": "the precision computed in",
    "prefix": "the instruction before each text",
    "max_length": "the maximum length in tokens",
    "normalize": "normalisation",
    "texts": "the texts (digest)",
    "num_texts": "the number of texts",
    "dim": "the dimension",
    "dtype": "the precision stored in",
}


@dataclass(frozen=True)
class Manifest:
    """What a store holds, in which shards, and from what it was made."""

    num_texts: int
    dim: int
    dtype: str
    """float16 or float32."""
    shard_size: int
    """Rows of every shard but the last."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All that decides the values: digests of weights, tokenizer and texts, instruction, pooling, ..."""
    model: str = ""
    """The model's name, for people; what counts is the digest of its weights."""

    @property
    def num_shards(self) -> int:
        """How many files there are."""
        return -(-self.num_texts // self.shard_size)

    def rows_of(self, shard: int) -> tuple[int, int]:
        """First row of a shard and the one after its last."""
        start = shard * self.shard_size
        return start, min(start + self.shard_size, self.num_texts)

    def header_of(self, shard: int) -> bytes:
        """What a shard's file begins with."""
        start, stop = self.rows_of(shard)
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(np.dtype(self.dtype).newbyteorder("<"))
        header = {"descr": descr, "fortran_order": False, "shape": (stop - start, self.dim)}
        np.lib.format.write_array_header_1_0(buffer, header)
        return buffer.getvalue()

    def shards(self) -> list[dict[str, Any]]:
        """Name and number of rows of each file."""
        bounds = map(self.rows_of, range(self.num_shards))
        return [{"file": shard_name(shard), "count": stop - start} for shard, (start, stop) in enumerate(bounds)]

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        content = {
            "format": FORMAT,
            "num_texts": self.num_texts,
            "dim": self.dim,
            "dtype": self.dtype,
            "shard_size": self.shard_size,
            "model": self.model,
            "settings": dict(self.settings),
            "shards": self.shards(),
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def checksum(crc: int) -> bytes:
    """What a shard's file ends with: the CRC-32 of all before it. Stores of older versions have none."""
    return b"\ncrc32 %08x\n" % crc


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:05d}.npy"


def choose_shard_size(num_texts: int, window: int, processes: int = 1) -> int:
    """Rows of a shard: enough shards that little is lost by a kill, not so many that they burden the disk.

    A multiple of `window`, which keeps the values those of encoding in one go, unless several processes share so few
    texts that they would wait for one another at the end.
    """
    size = window * max(1, min(16, num_texts // (64 * window)))
    if processes > 1:
        size = min(size, max(256, num_texts // (16 * processes) // 256 * 256))
    return size


def digest_texts(texts: Iterable[str]) -> tuple[int, str]:
    """Number and digest of texts, in their order; they are read once and not kept."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
        count += 1
    return count, digest.hexdigest()


def read_manifest(folder: str) -> Manifest:
    """What a store says of itself.

    Raises:
        ValueError: the folder is no store, or one of another version.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        raise ValueError(
            f"{folder} is no embedding store, it has no {MANIFEST}; write one with scripts/encode_corpus.py"
        )
    try:
        content = load_json(path)
        if isinstance(content, dict) and "format" in content and content["format"] != FORMAT:
            raise ValueError(f"{path} is of format {shorten(content['format'])}, this version reads {FORMAT}")
        wrong = _what_is_wrong_with(content)
        if wrong is not None:
            raise ValueError(f"{path} cannot be read: {wrong}")
    except ValueError as error:
        raise ValueError(f"{error}; remove the folder and encode afresh") from None
    return Manifest(**{name: content[name] for name in Manifest.__dataclass_fields__})


def _what_is_wrong_with(content: Any) -> str | None:
    """Why something is not what `Manifest.to_json` writes, or None."""
    if not isinstance(content, dict):
        return f"it is {shorten(content)}"
    for name in ("num_texts", "dim", "shard_size"):
        value = content.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
            return f'"{name}" is {shorten(value)}, which is no count'
    for name, kind in (("format", int), ("dtype", str), ("settings", dict), ("model", str), ("shards", list)):
        if not isinstance(content.get(name), kind):
            return f'"{name}" is {shorten(content.get(name))}'
    if content["dtype"] not in DTYPES:
        return f'"dtype" is {shorten(content["dtype"])}, not one of {", ".join(DTYPES)}'
    manifest = Manifest(**{name: content[name] for name in Manifest.__dataclass_fields__})
    # Their number first: a manifest of a few bytes may speak of more shards than there are bytes in the world.
    if len(content["shards"]) != manifest.num_shards or content["shards"] != manifest.shards():
        return '"shards" are not those of its numbers'
    return None


def differences(wanted: Manifest, found: Manifest, *, ignore: Iterable[str] = ()) -> list[str]:
    """One line for each thing in which a store is not what is wanted; an empty list where it can be used."""
    ours = {"num_texts": wanted.num_texts, "dim": wanted.dim, "dtype": wanted.dtype, **wanted.settings}
    theirs = {"num_texts": found.num_texts, "dim": found.dim, "dtype": found.dtype, **found.settings}
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name) and name not in set(ignore)]
    if "precision" in names and "weights" in names:  # the same weights have other bytes in another precision
        names.remove("weights")
    return [
        f"{_WORDS.get(name, name)}: {_shown(theirs.get(name))} in the store, {_shown(ours.get(name))} here"
        for name in names
    ]


def check_same(folder: str, wanted: Manifest, found: Manifest, *, ignore: Iterable[str] = ()) -> None:
    """Raises ValueError, naming all that differs, where a store was made from something else than what is wanted."""
    lines = differences(wanted, found, ignore=ignore)
    if lines:
        made_with = f" It was made with {found.model}." if found.model and found.model != wanted.model else ""
        raise ValueError(
            f"the embedding store {folder} was made from something else:\n  "
            + "\n  ".join(lines)
            + f"\nName another folder or remove this one to encode afresh, or ask for what it holds.{made_with}"
        )


def prepare_store(folder: str, wanted: Manifest) -> tuple[Manifest, list[int]]:
    """Begins a store, or goes on with one that is not complete; one process calls it, under `files.lock.locked`.

    Returns:
        The store's manifest, whose shards may have another size than wanted, and the numbers of missing shards.

    Raises:
        ValueError: a store of something else, or anything but a store, stands there.
    """
    assert wanted.num_texts > 0 and wanted.dtype in DTYPES
    path = os.path.join(folder, MANIFEST)
    if os.path.exists(path):
        found = read_manifest(folder)
        check_same(folder, wanted, found)
        remove_leftovers(folder)
        return found, missing_shards(folder, found)
    os.makedirs(folder, exist_ok=True)
    remove_leftovers(folder)
    others = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if others:
        raise ValueError(f"{folder} is not empty and holds no embedding store ({others[0]}, ...); name another folder")
    aside = f"{path}.{os.getpid()}{INCOMPLETE}"
    with open(aside, "w", encoding="utf-8") as file:
        file.write(wanted.to_json())
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    flush(folder)
    return wanted, list(range(wanted.num_shards))


def missing_shards(folder: str, manifest: Manifest) -> list[int]:
    """Numbers of shards that are not there, or are not what was written."""
    return [shard for shard in range(manifest.num_shards) if what_is_wrong(folder, manifest, shard) is not None]


def what_is_wrong(folder: str, manifest: Manifest, shard: int) -> str | None:
    """Why a shard cannot be used, or None; tells by its size and header, without reading the rows."""
    path = os.path.join(folder, shard_name(shard))
    start, stop = manifest.rows_of(shard)
    header = manifest.header_of(shard)
    expected = len(header) + (stop - start) * manifest.dim * np.dtype(manifest.dtype).itemsize
    if not os.path.isfile(path):
        return "is missing"
    if os.path.getsize(path) not in (expected, expected + len(checksum(0))):
        return f"has {os.path.getsize(path):,} bytes where {expected:,} were written"
    with open(path, "rb") as file:
        return None if file.read(len(header)) == header else "does not begin as it was written"


def remove_leftovers(folder: str) -> None:
    """Removes what a killed run left half-written."""
    for path in glob.glob(os.path.join(glob.escape(folder), f"*{INCOMPLETE}")):
        os.remove(path)


class ShardWriter:
    """Writes one shard part by part; nothing is seen of it before `finish`.

    Raises:
        ValueError: a value is not finite in the precision that is stored.
    """

    def __init__(self, folder: str, manifest: Manifest, shard: int) -> None:
        self.path = os.path.join(folder, shard_name(shard))
        self.aside = f"{self.path}.{os.getpid()}{INCOMPLETE}"
        self.manifest = manifest
        self.next_row, self.stop = manifest.rows_of(shard)
        self.file, self.crc = open(self.aside, "wb"), 0
        self._write(manifest.header_of(shard))

    def add(self, embeddings: np.ndarray) -> None:
        """Appends rows (n, dim)."""
        assert embeddings.ndim == 2 and embeddings.shape[1] == self.manifest.dim
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(embeddings, dtype=np.dtype(self.manifest.dtype).newbyteorder("<"))
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            row = int(finite.argmin())
            number = self.next_row + row
            if np.isfinite(embeddings[row]).all():
                raise ValueError(
                    f"the embedding of text {number} (counted from 0) is too large for float16: store float32"
                )
            raise ValueError(
                f"the embedding of text {number} (counted from 0) is not finite: the model overflows in this "
                "precision (try float32), or its weights are damaged"
            )
        self._write(rows.data)
        self.next_row += len(rows)

    def _write(self, content: bytes | memoryview) -> None:
        self.crc = zlib.crc32(content, self.crc)
        self.file.write(content)

    def finish(self) -> None:
        """Flushes to disk and gives the shard its name."""
        assert self.next_row == self.stop, f"{self.stop - self.next_row} rows are missing"
        self.file.write(checksum(self.crc))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.aside, self.path)
        flush(os.path.dirname(self.path))

    def abandon(self) -> None:
        """Removes what has been written."""
        self.file.close()
        if os.path.exists(self.aside):
            os.remove(self.aside)


class EmbeddingStore:
    """A complete store, read like an array (n, dim): rows come from the mapped files, which are never held whole.

    Before a shard's first row is given out, the shard is read once and compared with its checksum. Where there is none, in
    stores of older versions, all its numbers have to be finite, and a warning says that no more was looked at. A slice
    inside one shard is a view of the file; one that crosses shards, or a choice of rows, is a copy.

    Args:
        wanted: what the store has to be made of; not compared where it is None.
        ignore: names of settings in which it may differ.

    Raises:
        ValueError: the folder is no store, was made from something else, or is not complete; on reading, a shard is damaged.
    """

    ndim = 2

    def __init__(self, folder: str, wanted: Manifest | None = None, *, ignore: Iterable[str] = ()) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        if wanted is not None:
            check_same(folder, wanted, self.manifest, ignore=ignore)
        missing = missing_shards(folder, self.manifest)
        if missing:
            first = f"{shard_name(missing[0])} {what_is_wrong(folder, self.manifest, missing[0])}"
            raise ValueError(
                f"the embedding store {folder} is not complete: {len(missing)} of {self.manifest.num_shards} shards "
                f"are to be written ({first}); run what wrote it again, it goes on from there"
            )
        self.shape = (self.manifest.num_texts, self.manifest.dim)
        self.dtype = np.dtype(self.manifest.dtype)
        self._shards: dict[int, np.ndarray] = {}
        self._was_noted = False

    def __len__(self) -> int:
        return self.shape[0]

    def shard(self, number: int) -> np.ndarray:
        """The rows of one file, mapped (rows, dim)."""
        if number not in self._shards:
            start, stop = self.manifest.rows_of(number)
            path, header = os.path.join(self.folder, shard_name(number)), self.manifest.header_of(number)
            rows = np.memmap(
                path,
                dtype=self.dtype.newbyteorder("<"),
                mode="r",
                offset=len(header),
                shape=(stop - start, self.shape[1]),
            )
            with open(path, "rb") as file:
                file.seek(len(header) + rows.nbytes)
                written = file.read()
            if written and written != checksum(zlib.crc32(rows.data, zlib.crc32(header))):
                raise ValueError(f"{path} is damaged: it does not have the checksum that was written; {_ENCODE_AGAIN}")
            if not written:
                self._check_finite(rows, path, start)
            self._shards[number] = rows
        return self._shards[number]

    def _check_finite(self, rows: np.ndarray, path: str, first: int) -> None:
        """What can be seen of a shard without a checksum."""
        if not self._was_noted:
            self._was_noted = True
            warnings.warn(
                f"the embedding store {self.folder} has no checksums, it is of an older version: damage is seen only where "
                "numbers are not finite; encode afresh to have them",
                stacklevel=4,
            )
        for start in range(0, len(rows), ROWS_AT_ONCE):
            finite = np.isfinite(rows[start : start + ROWS_AT_ONCE]).all(axis=1)
            if not finite.all():
                number = first + start + int(finite.argmin())
                raise ValueError(
                    f"{path} is damaged: the embedding of text {number} (counted from 0) is not finite; {_ENCODE_AGAIN}"
                )

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of at most `size` rows each, all in order; views of the files."""
        for number in range(self.manifest.num_shards):
            first, _ = self.manifest.rows_of(number)
            rows = self.shard(number)
            for start in range(0, len(rows), size):
                yield first + start, rows[start : start + size]

    def __getitem__(self, which: Any) -> np.ndarray:
        """Rows by number, slice, or an array of numbers or of truth values."""
        size = self.manifest.shard_size
        if isinstance(which, slice):
            start, stop, step = which.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            if stop <= start:
                return np.empty((0, self.shape[1]), dtype=self.dtype)
            parts = []
            for number in range(start // size, (stop - 1) // size + 1):
                first = number * size
                parts.append(self.shard(number)[max(start - first, 0) : stop - first])
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        if isinstance(which, int | np.integer):
            row = int(which) + (len(self) if which < 0 else 0)
            if not 0 <= row < len(self):
                raise IndexError(f"row {which} of a store of {len(self)} rows")
            return self.shard(row // size)[row % size]
        rows = np.asarray(which)
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                raise IndexError(f"truth values {rows.shape} for a store of {len(self)} rows")
            rows = np.flatnonzero(rows)
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1:
            raise IndexError(f"rows are chosen by one number, a slice or a list, not by an array {rows.shape}")
        rows = np.where(rows < 0, rows + len(self), rows)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a store of {len(self)} rows")
        chosen = np.empty((len(rows), self.shape[1]), dtype=self.dtype)
        order = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows[order], np.arange(1, self.manifest.num_shards) * size)
        for number, places in enumerate(np.split(order, cuts)):
            if len(places):
                chosen[places] = self.shard(number)[rows[places] - number * size]
        return chosen

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows in memory: `numpy.asarray(store)`."""
        if copy is False:
            raise ValueError("the whole of a store cannot be had without a copy; take slices")
        return np.asarray(self[np.arange(len(self))], dtype=dtype)


class StorePart(EmbeddingStore):
    """Rows `first` to `stop` of a store, read like an array where they lie; what one of several processes searches."""

    def __init__(self, store: EmbeddingStore, first: int, stop: int) -> None:
        assert 0 <= first <= stop <= len(store)
        self.store, self.first = store, first
        self.folder, self.manifest, self.dtype = store.folder, store.manifest, store.dtype
        self.shape = (stop - first, store.shape[1])

    def shard(self, number: int) -> np.ndarray:
        """The whole of one file, which may begin before this part and end after it."""
        return self.store.shard(number)

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, counted in this part, and rows) of at most `size` rows each; views of the files where possible."""
        for start in range(0, len(self), size):
            yield start, self[start : start + size]

    def __getitem__(self, which: Any) -> np.ndarray:
        """Rows by number, slice, or an array of numbers or of truth values, counted in this part."""
        if isinstance(which, slice):
            start, stop, step = which.indices(len(self))
            return (
                self.store[np.arange(start, stop, step) + self.first]
                if step != 1
                else self.store[start + self.first : max(start, stop) + self.first]
            )
        rows = np.asarray(which)
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                raise IndexError(f"truth values {rows.shape} for {len(self)} rows of a store")
            rows = np.flatnonzero(rows)
        rows = np.where(rows < 0, rows + len(self), rows).astype(np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)} rows of a store")
        return self.store[int(rows) + self.first if rows.ndim == 0 else rows + self.first]


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
