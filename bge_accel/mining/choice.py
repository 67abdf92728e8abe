"""Choosing negatives from ranked candidates: what is never taken, which part of the ranking, which scores, which draw."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from bge_accel.data.examples import Rows
from bge_accel.data.reading import text_id
from bge_accel.data.splitmix import splitmix64
from bge_accel.mining.pool import KnownPositives, TextPool, text_key, text_keys

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
    known: KnownPositives
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
    """Pseudo-random numbers (n,) uint64, each a function of one integer and the seed alone."""
    seeded = numbers.astype(np.int64).view(np.uint64) ^ np.uint64(draw_seed & 0xFFFFFFFFFFFFFFFF)
    return splitmix64(splitmix64(seeded))


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
