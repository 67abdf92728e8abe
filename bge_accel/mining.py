"""Choosing negatives from ranked candidates: what is never taken, which part of the ranking, which scores, which draw.

Texts are compared in a normalised form: NFKC, white space collapsed, case folded. A key is a 64-bit digest of it, so
that whole rankings are compared as arrays of integers.
"""

import hashlib
import json
import os
import re
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from itertools import islice, pairwise
from typing import IO, Any, NamedTuple, overload

import numpy as np

from bge_accel.checkpoint import differences, flush
from bge_accel.data import Rows
from bge_accel.reading import Faults, find_files, read_rows, shorten, text_id

# A word, or one character of a script that puts no space between words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff]|[^\W_]+")
DROPS = (
    "known_positive",
    "query",
    "near_duplicate",
    "duplicate",
    "existing_negative",
    "before_range",
    "max_score",
    "min_score",
    "absolute_margin",
    "relative_margin",
    "not_drawn",
)
"""Why a candidate is not taken, in the order in which it is asked."""


class Choice(NamedTuple):
    """How negatives are chosen from a ranking."""

    start: int = 10
    end: int = 210
    """The slice [start:end] of what is left of the ranking, 0 the best."""
    number: int = 15
    sampling: str = "random"
    """ "random" or "top"."""
    seed: int = 42
    max_score: float | None = None
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_positive_overlap: float = 0.8
    """Share of word pairs in common with a known positive, above which a candidate is a near-duplicate; 1 for none."""
    fill_random: bool = False


class Target(NamedTuple):
    """What the choice has to know of a row."""

    query: str
    positives: list[str]
    """The row's own."""
    known: "KnownPositives"
    """The row's own and those of every row with the same query."""
    kept: list[str]
    """Existing negatives that stay, none of them a known positive, the query or a repetition."""

    def draw_seed(self, seed: int) -> int:
        """A number that depends on the run's seed and the row's text alone."""
        return text_id(json.dumps([seed, self.query, self.positives]))


class Ranking(NamedTuple):
    """The candidates of one row, best first."""

    indices: np.ndarray
    """(candidates,) of the pool, int64."""
    scores: np.ndarray
    """(candidates,) float32."""


class Mined(NamedTuple):
    """The negatives chosen for one row."""

    indices: list[int]
    """Of the pool; the best first, those of the random filling last."""
    scores: list[float]
    pos_scores: list[float]
    kept_scores: list[float]
    num_filled: int


# ---- comparing texts


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


class QueryGroups:
    """The rows that ask the same question, and the positives known of it."""

    def __init__(self, rows: Rows, query_keys: np.ndarray) -> None:
        self._rows, self._keys = rows, query_keys
        self._order = np.argsort(query_keys, kind="stable")
        self._sorted = query_keys[self._order]
        self._known = lru_cache(maxsize=1024)(self._collect)

    def _collect(self, key: int) -> KnownPositives:
        first, last = np.searchsorted(self._sorted, [key]), np.searchsorted(self._sorted, [key], side="right")
        same = self._order[int(first[0]) : int(last[0])]
        return KnownPositives(text for row in same.tolist() for text in self._rows[row]["pos"])

    def known_positives(self, row: int) -> KnownPositives:
        """Positives of every row whose normalised query is this row's."""
        return self._known(int(self._keys[row]))


# ---- the pool


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
        """Of all texts in their order."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self._ends, self._bytes):
            for start in range(0, len(part), 1 << 24):
                digest.update(np.ascontiguousarray(part[start : start + (1 << 24)]).tobytes())
        return digest.hexdigest()


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


# ---- the choice


def parse_range(text: str) -> tuple[int, int]:
    """The two numbers of "A-B", the slice [A:B] of a ranking.

    Raises:
        ValueError: it is not of this form, or the slice is empty.
    """
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
    if match is None:
        raise ValueError(f"the range {text!r} is not of the form A-B, like 2-200")
    start, end = int(match[1]), int(match[2])
    if start >= end:
        raise ValueError(f"the range {text} is empty: the second number has to be larger than the first")
    return start, end


def clean_ranking(
    ranking: Ranking, target: Target, pool: TextPool, choice: Choice
) -> tuple[np.ndarray, Counter[str], bool]:
    """Places in the ranking of candidates that may be negatives, the first `choice.end` of them.

    Removed are known positives, the query, texts that resemble a known positive, repetitions of a better candidate,
    and existing negatives that stay.

    Returns:
        Places, ascending; how many were dropped before the last place, and why; and whether these are all that a
        longer ranking would give.
    """
    keys = pool.keys[ranking.indices]
    _, first = np.unique(keys, return_index=True)
    repeated = np.ones(len(keys), dtype=bool)
    repeated[first] = False
    reasons = {
        "known_positive": np.isin(keys, target.known.keys),
        "query": keys == text_key(target.query),
        "duplicate": repeated,
        "existing_negative": np.isin(keys, text_keys(target.kept)),
    }
    why = np.full(len(keys), "", dtype=object)
    for reason, applies in reversed(reasons.items()):
        why[applies] = reason
    places = np.flatnonzero(why == "")
    if choice.max_positive_overlap < 1:
        indices = ranking.indices[places]
        texts = _Lazy(pool, indices)
        near = target.known.resembling(texts, pool.sketches(indices), choice.max_positive_overlap)
        why[places[near]] = "near_duplicate"
        places = places[~near]
    is_whole = len(places) >= choice.end
    places = places[: choice.end]
    seen = int(places[-1]) + 1 if is_whole else len(keys)
    return places, Counter(reason for reason in why[:seen].tolist() if reason), is_whole


class _Lazy(Sequence[str]):
    """Texts of the pool that are read only when they are looked at."""

    def __init__(self, pool: TextPool, indices: np.ndarray) -> None:
        self._pool, self._indices = pool, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Any:
        return self._pool[int(self._indices[place])]


def too_high(scores: np.ndarray, pos_scores: Sequence[float], choice: Choice) -> dict[str, np.ndarray]:
    """Which scores (n,) are too high for a negative, for each filter that is set.

    Margins are taken against the row's lowest positive: training may draw any of them. `relative_margin` 0.05 drops
    what scores over 95 % of it (NV-Retriever, https://arxiv.org/abs/2407.15831, TopK-PercPos). Where the positive's
    score is negative, 5 % of its size below it: a margin never lets a candidate above the positive pass.
    """
    values, lowest = scores.astype(np.float64), min(pos_scores)
    limits = {
        "max_score": choice.max_score,
        "absolute_margin": None if choice.absolute_margin is None else lowest - choice.absolute_margin,
        "relative_margin": None if choice.relative_margin is None else lowest - choice.relative_margin * abs(lowest),
    }
    return {name: values > limit for name, limit in limits.items() if limit is not None}


def score_filters(scores: np.ndarray, pos_scores: Sequence[float], choice: Choice) -> tuple[np.ndarray, Counter[str]]:
    """Which candidates (n,) pass all score filters, and how many each filter drops of what the ones before it left."""
    tests = too_high(scores, pos_scores, choice)
    if choice.min_score is not None:
        tests["min_score"] = scores.astype(np.float64) < choice.min_score
    passed, dropped = np.ones(len(scores), dtype=bool), Counter[str]()
    for name in DROPS:
        if name in tests:
            dropped[name] = int((passed & tests[name]).sum())
            passed &= ~tests[name]
    return passed, +dropped


def mix(numbers: np.ndarray, draw_seed: int) -> np.ndarray:
    """Pseudo-random numbers (n,) uint64, each a function of one integer and the seed alone, the same everywhere.

    splitmix64's (Steele et al. 2014, https://doi.org/10.1145/2714064.2660195), twice.
    """
    with np.errstate(over="ignore"):
        z = numbers.astype(np.int64).view(np.uint64) ^ np.uint64(draw_seed & 0xFFFFFFFFFFFFFFFF)
        for _ in range(2):
            z = z + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return z


def draw(keys: np.ndarray, scores: np.ndarray, choice: Choice, draw_seed: int) -> np.ndarray:
    """Places of the `choice.number` candidates that are taken, the highest score first.

    A random draw takes those with the smallest of random numbers that depend on the candidate's text and the seed
    alone. So one candidate more or less, or two that change places, leave the draw of the others as it was.
    """
    by_score = np.argsort(-scores, kind="stable")
    if choice.sampling == "top" or len(keys) <= choice.number:
        return by_score[: choice.number]
    taken = np.zeros(len(keys), dtype=bool)
    taken[np.argsort(mix(keys, draw_seed), kind="stable")[: choice.number]] = True
    return by_score[taken[by_score]]


def random_texts(target: Target, pool: TextPool, choice: Choice, taken: Iterable[int]) -> Iterator[int]:
    """Indices of pool texts in a random order: never a known positive or like one, the query, or a text twice.

    In a large pool the search ends after 10,000 draws: then nearly all of the pool is excluded.
    """
    seen = {text_key(target.query), *target.known.keys.tolist(), *(text_key(text) for text in target.kept)}
    seen.update(int(pool.keys[index]) for index in taken)
    seed = target.draw_seed(choice.seed)
    if len(pool) <= 10_000:
        order = np.argsort(mix(np.asarray(pool.keys), ~seed), kind="stable")
    else:
        order = (mix(np.arange(10_000), ~seed) % np.uint64(len(pool))).astype(np.int64)
    for index in order.tolist():
        key = int(pool.keys[index])
        if key in seen:
            continue
        seen.add(key)
        one = np.array([index])
        if not target.known.resembling([pool[index]], pool.sketches(one), choice.max_positive_overlap)[0]:
            yield index


# ---- one chunk of rows

Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
Score = Callable[[Sequence[tuple[int, int]]], np.ndarray]


def rank_targets(
    targets: Sequence[Target], pool: TextPool, choice: Choice, search: Search, batch_size: int
) -> tuple[list[Ranking], Counter[str]]:
    """The slice [start:end] of each row's ranking without what may not be a negative.

    The search goes deeper where too much was removed, so the slice is that of the whole ranking.

    Args:
        search: (row numbers, k) to scores and indices, both (rows, k), best first; -1 where none is left.
        batch_size: rows that are searched for at a time: bounds the memory.

    Returns:
        One ranking a row, and how many candidates were dropped, and why.
    """
    rankings: list[Ranking] = []
    dropped: Counter[str] = Counter()
    for start in range(0, len(targets), batch_size):
        batch = targets[start : start + batch_size]
        found: dict[int, Ranking] = {}
        pending = np.arange(len(batch))
        most = max(len(target.known.keys) + len(target.kept) for target in batch)
        k = min(choice.end + most + 16, len(pool))
        while len(pending):
            scores, indices = search(start + pending, k)
            deeper = []
            for number, row_scores, row_indices in zip(pending.tolist(), scores, indices, strict=True):
                ranking = Ranking(row_indices[row_indices >= 0], row_scores[row_indices >= 0])
                places, drops, is_whole = clean_ranking(ranking, batch[number], pool, choice)
                if not is_whole and k < len(pool) and len(ranking.indices) == k:
                    deeper.append(number)
                    continue
                dropped += drops
                dropped["before_range"] += min(choice.start, len(places))
                places = places[choice.start :]
                found[number] = Ranking(ranking.indices[places], ranking.scores[places])
            pending, k = np.array(deeper, dtype=np.int64), min(2 * k, len(pool))
        rankings += [found[number] for number in range(len(batch))]
    return rankings, dropped


def choose_negatives(
    targets: Sequence[Target],
    rankings: Sequence[Ranking],
    pos_scores: Sequence[Sequence[float]],
    kept_scores: Sequence[Sequence[float]],
    pool: TextPool,
    choice: Choice,
    score: Score,
) -> tuple[list[Mined], Counter[str]]:
    """Filters each row's candidates by their scores, draws, and fills what is missing where that is asked for.

    Args:
        pos_scores: of each row's own positives.
        kept_scores: of each row's existing negatives that stay; passed on.
        score: pairs (row number, index of the pool) to scores (n,), for texts of the random filling.

    Returns:
        One choice a row, and how many candidates were dropped, and why.
    """
    dropped: Counter[str] = Counter()
    chosen: list[tuple[list[int], list[float]]] = []
    for target, ranking, positive in zip(targets, rankings, pos_scores, strict=True):
        passed, drops = score_filters(ranking.scores, positive, choice)
        indices, scores = ranking.indices[passed], ranking.scores[passed]
        places = draw(pool.keys[indices], scores, choice, target.draw_seed(choice.seed))
        dropped += drops
        dropped["not_drawn"] += len(indices) - len(places)
        chosen.append((indices[places].tolist(), scores[places].astype(np.float64).tolist()))
    num_mined = [len(indices) for indices, _ in chosen]
    if choice.fill_random:
        _fill(targets, chosen, pos_scores, pool, choice, score)
    mined = [
        Mined(indices, scores, list(positive), list(kept), len(indices) - number)
        for (indices, scores), positive, kept, number in zip(chosen, pos_scores, kept_scores, num_mined, strict=True)
    ]
    return mined, +dropped


def _fill(
    targets: Sequence[Target],
    chosen: Sequence[tuple[list[int], list[float]]],
    pos_scores: Sequence[Sequence[float]],
    pool: TextPool,
    choice: Choice,
    score: Score,
) -> None:
    """Random texts for rows that have fewer than `choice.number`; scores that are too high for a negative are refused."""
    lacking = [row for row, (indices, _) in enumerate(chosen) if len(indices) < choice.number]
    sources = {row: random_texts(targets[row], pool, choice, chosen[row][0]) for row in lacking}
    while sources:
        offers: list[tuple[int, int]] = []
        for row, source in list(sources.items()):
            wanted = choice.number - len(chosen[row][0])
            offered = [(row, index) for index in islice(source, wanted)]
            if not offered:
                del sources[row]
            offers += offered
        if not offers:
            return
        for (row, index), value in zip(offers, score(offers), strict=True):
            tests = too_high(np.array([value]), pos_scores[row], choice)
            if not any(test[0] for test in tests.values()):
                chosen[row][0].append(index)
                chosen[row][1].append(float(value))


# ---- a cross-encoder's scores

PAIRS_AT_ONCE = 4096  # sorted by length together


class Reranker:
    """A cross-encoder that scores (query, passage) pairs, from a folder or the hub.

    Args:
        max_length: tokens of a pair, special tokens included; the passage is cut. Never more than the model takes.
        query_max_length: tokens that a query is cut to; by default three quarters of `max_length`.
        batch_size: at most so many pairs in one forward pass; by default a token budget alone decides.
        normalize: scores between 0 and 1, by the logistic function.

    Raises:
        ValueError: the model cannot be found, or it is no cross-encoder with one score a pair.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        device: Any = None,
        dtype: Any = None,
        max_length: int = 512,
        query_max_length: int | None = None,
        batch_size: int | None = None,
        normalize: bool = False,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        from bge_accel.encoding import default_device
        from bge_accel.model import max_positions

        logging.disable_progress_bar()
        common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        common |= {"cache_dir": cache_dir} if cache_dir is not None else {}
        self.device = torch.device(device) if device is not None else default_device()
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # what it would warn of is an error below
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **common)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                model_name_or_path, dtype=dtype or torch.float32, output_loading_info=True, **common
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot load the reranker {model_name_or_path!r}: it is neither a complete model folder nor to be had "
                f"from the hub ({str(error).splitlines()[0]})"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        if info["missing_keys"]:
            raise ValueError(
                f"{model_name_or_path} is no reranker: it lacks the weights {', '.join(sorted(info['missing_keys'])[:3])}; "
                "name a cross-encoder, like BAAI/bge-reranker-base"
            )
        if model.config.num_labels != 1:
            raise ValueError(
                f"{model_name_or_path} gives {model.config.num_labels} numbers for a pair: a reranker has to give one"
            )
        self.model = model.eval().to(self.device)
        self.max_length = min(max_length, max_positions(model.config))
        self.query_max_length = min(query_max_length or self.max_length * 3 // 4, self.max_length - 8)
        self.batch_size, self.normalize = batch_size, normalize
        self.tokenizer.model_max_length = self.max_length

    def score(
        self, pairs: Iterable[tuple[str, str]], *, total: int | None = None, progress: bool = False
    ) -> np.ndarray:
        """Scores (pairs,) float32 of (query, passage) pairs, in micro-batches by length under a token budget.

        Args:
            pairs: read 4,096 at a time, so that no more are in memory.
            total: how many there are, for the progress bar.

        Raises:
            ValueError: a score is not finite.
        """
        from tqdm import tqdm

        iterator, scores = iter(pairs), [np.empty(0, dtype=np.float32)]
        with tqdm(total=total, desc="scoring", unit="pair", disable=not progress, leave=False) as bar:
            while window := list(islice(iterator, PAIRS_AT_ONCE)):
                scores.append(self._score_window(window))
                bar.update(len(window))
        whole = np.concatenate(scores)
        if not np.isfinite(whole).all():
            raise ValueError("the reranker gives scores that are not finite: it overflows in this precision")
        return whole

    def _score_window(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        import torch

        from bge_accel.batching import default_token_budget, plan_micro_batches

        scores = np.empty(len(pairs), dtype=np.float32)
        inputs = self._tokenize(pairs)
        lengths = [len(ids) for ids in inputs["input_ids"]]
        for rows in plan_micro_batches(lengths, default_token_budget(self.device), max_texts=self.batch_size):
            batch = self.tokenizer.pad(
                {name: [values[row] for row in rows] for name, values in inputs.items()}, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(**batch.to(self.device)).logits.float()
            scores[rows] = (logits.sigmoid() if self.normalize else logits)[:, 0].cpu().numpy()
        return scores

    def _tokenize(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        queries = {query: query for query, _ in pairs}
        encoded = self.tokenizer(list(queries), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for query, offsets in zip(queries, encoded["offset_mapping"], strict=True):
            if len(offsets) > self.query_max_length:
                queries[query] = query[: offsets[self.query_max_length - 1][1]]
        return dict(
            self.tokenizer(
                [queries[query] for query, _ in pairs],
                [passage for _, passage in pairs],
                truncation="only_second",
                max_length=self.max_length,
                padding=False,
            )
        )


# ---- long jobs of several processes


class Processes:
    """The processes that `torchrun` or `accelerate launch` has started; they share no more than files and barriers."""

    def __init__(self) -> None:
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), 0
        if self.world > 1:
            import torch.distributed as dist

            # Gloo on GPUs, too: nothing is sent but a message now and then, after hours of work perhaps.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
            self.rank = dist.get_rank()

    @property
    def shows_bars(self) -> bool:
        """Whether this process shows progress bars."""
        return self.rank == 0 and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Prints on the first process alone."""
        if self.rank == 0:
            print(text, flush=True)

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def on_first(self, work: Callable[[], None]) -> None:
        """Does it on the first process while the others wait; what is wrong is raised by all."""
        said: list[str | None] = [None]
        if self.rank == 0:
            try:
                work()
            except ValueError as error:
                said = [str(error)]
        if self.world > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(said, src=0)
        if said[0] is not None:
            raise ValueError(said[0])


def check_output(flag: str, path: str, inputs: Sequence[str]) -> None:
    """Raises ValueError where a file cannot be written, or would be written over an input."""
    if not path or os.path.isdir(path):
        raise ValueError(f"{flag} {path!r} is not the name of a file")
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"{flag} {path}: its folder cannot be made in {folder}, which is no writable folder")
    if os.path.exists(path) and any(os.path.samefile(path, name) for name in inputs):
        raise ValueError(f"{flag} {path} is an input; name another file")


def check_json(paths: Sequence[str], faults: Faults) -> None:
    """Finds values of Parquet files that JSON lines, in which rows are written, cannot hold."""
    for path in find_files(paths, faults):
        for where, _, row in read_rows(path, faults) if path.endswith(".parquet") else ():
            try:
                json.dumps(row)
            except TypeError as error:
                faults.add(where, f"the row cannot be written as JSON ({error}); drop that column")


@contextmanager
def atomic_file(path: str) -> Iterator[IO[str]]:
    """Yields a text file that appears under its name when it is complete, or not at all."""
    aside = f"{path}.incomplete"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with open(aside, "w", encoding="utf-8") as file:
            yield file
        flush(aside)
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def open_work(
    work: str, fingerprint: dict[str, Any], say: Callable[[str], None], *, removes: tuple[str, ...] = ("part-",)
) -> None:
    """Keeps what a run with the same inputs and settings has left in a folder; removes what another one has.

    Args:
        say: told which of the two it is.
        removes: beginnings of the names of files that belong to one run.
    """
    os.makedirs(work, exist_ok=True)
    path = os.path.join(work, "fingerprint.json")
    fingerprint = json.loads(json.dumps(fingerprint))
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            old = json.load(file)
        if old == fingerprint:
            done = sum(name.startswith("part-") and "." not in name for name in os.listdir(work))
            say(f"going on from an interrupted run: {done} of its chunks of rows are done")
            return
        changes = "; ".join(differences(old, fingerprint))
        say(f"starting afresh, {work} is of another run: {changes}")
    for name in os.listdir(work):
        if name.startswith(removes) or name == "fingerprint.json":
            os.remove(os.path.join(work, name))
    with atomic_file(path) as file:
        json.dump(fingerprint, file)


def new_row(
    row: dict[str, Any], negatives: list[str], scores: tuple[list[float], list[float]] | None
) -> dict[str, Any]:
    """The row with its new negatives, all else as it was; scores of others never stay."""
    new: dict[str, Any] = {}
    for name, value in row.items():
        if name not in ("neg", "pos_scores", "neg_scores"):
            new[name] = value
        if name == "neg" or (name == "pos" and "neg" not in row):
            new["neg"] = negatives
    if scores is not None:
        new["pos_scores"], new["neg_scores"] = scores
    return new


def rounded(scores: Sequence[float]) -> list[float]:
    """Scores as they are written."""
    return [round(score, 6) for score in scores]


def warn(text: str) -> None:
    """Prints a warning on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)


# ---- what is shown


def text_histogram(pos_scores: np.ndarray, neg_scores: np.ndarray, *, num_bins: int = 16, width: int = 28) -> str:
    """Two histograms side by side, of positives' and negatives' scores over the same bins."""
    edges = score_bins(pos_scores, neg_scores, num_bins)
    counts = [np.histogram(scores, edges)[0] for scores in (pos_scores, neg_scores)]
    decimals = max(0, 1 - int(np.floor(np.log10(edges[1] - edges[0]))))
    shown = [f"{edge:.{decimals}f}" for edge in edges]
    wide = max(map(len, shown))
    lines = [f"{'score':>{2 * wide + 4}}  {'positives':<{width + 9}}  negatives"]
    for number, row in enumerate(zip(*counts, strict=True)):
        bars = [
            f"{'#' * int(np.ceil(width * count / max(1, column.max()))):<{width}} {count:>8,}"
            for count, column in zip(row, counts, strict=True)
        ]
        lines.append(f"{shown[number]:>{wide}} .. {shown[number + 1]:>{wide}}  {bars[0]}  {bars[1]}")
    for name, scores in (("positives", pos_scores), ("negatives", neg_scores)):
        if len(scores):
            low, middle, high = np.quantile(scores, [0.05, 0.5, 0.95])
            lines.append(f"{name}: mean {scores.mean():.4f}, 5 % {low:.4f}, median {middle:.4f}, 95 % {high:.4f}")
    return "\n".join(lines)


def score_bins(pos_scores: np.ndarray, neg_scores: np.ndarray, num_bins: int) -> np.ndarray:
    """Edges (num_bins + 1,) of equal bins that hold all scores."""
    both = np.concatenate([pos_scores, neg_scores])
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
    return np.linspace(low, high if high > low else low + 1e-3, num_bins + 1)


def plot_histogram(path: str, pos_scores: np.ndarray, neg_scores: np.ndarray) -> None:
    """Writes the two histograms as a PNG; matplotlib has to be installed."""
    from matplotlib.figure import Figure

    edges = score_bins(pos_scores, neg_scores, 50)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for scores, label in ((pos_scores, "positives"), (neg_scores, "negatives")):
        if len(scores):
            weights = np.full(len(scores), 1 / len(scores))
            axes.hist(scores, edges, weights=weights, alpha=0.6, label=f"{label} ({len(scores):,})")
    axes.set_xlabel("score")
    axes.set_ylabel("share")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
