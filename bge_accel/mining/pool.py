"""Candidate passages: how texts are compared, and a pool of distinct ones in files that are mapped into memory.

Texts are compared in a normalised form: NFKC, white space collapsed, case folded. A key is a 64-bit digest of it, so
that whole rankings are compared as arrays of integers.
"""

import os
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import overload

import numpy as np

from bge_accel.data.reading import check_json, read_rows, text_id
from bge_accel.data.rows import TrainingRows
from bge_accel.encoding.store import digest_texts
from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files
from bge_accel.files.text import shorten

# A word, or one character of a script that puts no space between words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff]|[^\W_]+")


def normalise_text(text: str) -> str:
    """The form in which two texts are compared: NFKC, white space collapsed, case folded."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def text_key(text: str) -> int:
    """A signed 64-bit digest of `normalise_text(text)`; texts that are the same for our purpose have the same."""
    return text_id(normalise_text(text))


def text_keys(texts: Iterable[str]) -> np.ndarray:
    """`text_key` of each, int64."""
    return np.array([text_key(text) for text in texts], dtype=np.int64)


@lru_cache(maxsize=1024)
def word_pairs(text: str) -> frozenset[str]:
    """All pairs of neighbouring words of a normalised text, punctuation left out; a single word stands for itself.

    A character of a script without spaces is a word. Broder 1997, "On the resemblance and containment of documents":
    unlike single words, pairs tell "the king slew the wolf" from "the wolf slew the king".
    """
    words = WORD.findall(normalise_text(text))
    return frozenset(words if len(words) == 1 else map(" ".join, pairwise(words)))


def overlap(first: str, second: str) -> float:
    """Resemblance of two texts, 0 to 1: word pairs in common over all word pairs of both."""
    a, b = word_pairs(first), word_pairs(second)
    common = len(a & b)
    return common / (len(a) + len(b) - common) if a and b else 0.0


def sketch(text: str) -> np.ndarray:
    """The number of word pairs of a text, and 512 bits of which each pair sets one: (9,) uint64.

    A bit that only one of two texts sets stands for at least one pair that the other does not have, which bounds their
    overlap from above. Sketches can be compared within one process only.
    """
    pairs = word_pairs(text)
    bits = 0
    for pair in pairs:
        bits |= 1 << (hash(pair) & 511)
    return np.frombuffer(len(pairs).to_bytes(8, "little") + bits.to_bytes(64, "little"), dtype="<u8")


class KnownPositives:
    """Texts that are known to answer a query."""

    def __init__(self, texts: Iterable[str]) -> None:
        by_key = {text_key(text): text for text in texts}
        self.keys = np.array(list(by_key), dtype=np.int64)
        """(texts,) `text_key` of each."""
        self.texts = list(by_key.values())
        self._sketches = np.stack([sketch(text) for text in self.texts])

    def resembling(self, texts: Sequence[str], sketches: np.ndarray, limit: float) -> np.ndarray:
        """Which texts (n,) have an `overlap` with one of the positives that is above `limit`.

        Args:
            sketches: (n, 9) of the texts; they rule nearly all out.
        """
        found = np.zeros(len(texts), dtype=bool)
        if limit >= 1:
            return found
        sizes, bits = sketches[:, 0].astype(np.int64), sketches[:, 1:]
        for positive, own in zip(self.texts, self._sketches, strict=True):
            size = int(own[0])
            common = np.minimum(
                sizes - np.bitwise_count(bits & ~own[1:]).sum(axis=1, dtype=np.int64),
                size - np.bitwise_count(own[1:] & ~bits).sum(axis=1, dtype=np.int64),
            )
            for i in np.flatnonzero(~found & (common > limit * (sizes + size - common))).tolist():
                found[i] = overlap(texts[i], positive) > limit
        return found


class TextPool(Sequence[str]):
    """Distinct texts in a folder, mapped into memory: of the process's own, 16 bytes a text.

    73 more are taken for each text that was compared with a positive.

    Args:
        folder: what `write_pool` left.
    """

    def __init__(self, folder: str) -> None:
        self._bytes = np.memmap(os.path.join(folder, "texts"), mode="r")
        self._ends = np.load(os.path.join(folder, "ends.npy"), mmap_mode="r")
        ids = np.load(os.path.join(folder, "ids.npy"), mmap_mode="r")
        self.keys = np.load(os.path.join(folder, "keys.npy"), mmap_mode="r")
        """(texts,) `text_key` of each."""
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]
        self._sketches = np.zeros((len(self), 9), dtype=np.uint64)  # takes memory only where it is written
        self._has_sketch = np.zeros(len(self), dtype=bool)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._bytes[self._ends[index] : self._ends[index + 1]].tobytes().decode()

    def find(self, text: str) -> int | None:
        """The index of exactly this text, None where the pool does not hold it."""
        place = int(np.searchsorted(self._sorted, text_id(text)))
        if place < len(self) and self._sorted[place] == text_id(text):
            return int(self._order[place])
        return None

    def sketches(self, indices: np.ndarray) -> np.ndarray:
        """(n, 9) `sketch` of each text, made when it is first asked for."""
        for index in indices[~self._has_sketch[indices]].tolist():
            self._sketches[index], self._has_sketch[index] = sketch(self[index]), True
        return self._sketches[indices]

    def digest(self) -> str:
        """Of all texts in their order, as `encoding.store.digest_texts` gives it."""
        return digest_texts(self)[1]


def write_pool(folder: str, texts: Callable[[], Iterator[str]]) -> None:
    """Writes the distinct texts, in the order of their first occurrence, for `TextPool`.

    Args:
        texts: called twice; both times it has to give the same.
    """
    os.makedirs(folder, exist_ok=True)
    ids = np.frombuffer(array("q", (text_id(text) for text in texts())), dtype=np.int64)
    distinct, first = np.unique(ids, return_index=True)
    del distinct
    is_first = np.zeros(len(ids), dtype=bool)
    is_first[first] = True
    ends, keys = array("q", [0]), array("q")
    with open(os.path.join(folder, "texts"), "wb") as file:
        for wanted, text in zip(is_first, texts(), strict=True):
            if wanted:
                ends.append(ends[-1] + file.write(text.encode()))
                keys.append(text_key(text))
    np.save(os.path.join(folder, "ids.npy"), ids[is_first])
    np.save(os.path.join(folder, "ends.npy"), np.frombuffer(ends, dtype=np.int64))
    np.save(os.path.join(folder, "keys.npy"), np.frombuffer(keys, dtype=np.int64))


def read_pool_texts(paths: Sequence[str], faults: Faults) -> Iterator[str]:
    """Texts of candidate rows `{"text"}` or `{"content"}`; a title beside it is left out, as in "pos" and "neg"."""
    for path in find_files(paths, faults):
        for where, _, row in read_rows(path, faults):
            given = [name for name in ("text", "content") if row.get(name) is not None]
            text = row[given[0]] if given else None
            if len(given) != 1:
                what = '"text" is missing: every candidate is a row {"text": str}' if not given else "keep one of them"
                faults.add(where, what if not given else f'the row has "text" and "content": {what}')
            elif not isinstance(text, str):
                faults.add(where, f'"{given[0]}" is {shorten(text)}: it has to be a string')
            elif not text.strip():
                faults.add(where, f'"{given[0]}" is empty: remove the row or fill it in')
            else:
                yield text


def write_inputs(paths: Sequence[str], pool_paths: Sequence[str] | None, rows: TrainingRows, work: str) -> None:
    """Writes the pool and the key of each row's query, which every process maps into memory.

    Args:
        paths: of the rows, which are written again and so have to be JSON.
        pool_paths: of the pool; None takes all passages of the rows.
        work: folder of the mining.
    """
    faults = Faults()
    check_json(paths, faults)
    for _ in read_pool_texts(pool_paths or [], faults):  # to see that all is well
        pass
    faults.raise_if_any()

    def texts() -> Iterator[str]:
        if pool_paths is not None:
            yield from read_pool_texts(pool_paths, Faults())
        else:
            for i in range(len(rows)):
                yield from rows.passages(i)

    write_pool(os.path.join(work, "pool"), texts)
    keys = array("q", (text_key(rows[i]["query"]) for i in range(len(rows))))
    np.save(os.path.join(work, "query_keys.npy"), np.frombuffer(keys, dtype=np.int64))
