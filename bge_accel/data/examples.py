"""The order of training rows, and one group of passages drawn for each query: both pure functions of the position."""

import heapq
import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from bge_accel.data.reading import text_id


class Rows(Protocol):
    """What can be drawn from: `rows.TrainingRows`, or a block of a stream."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict: ...
    def place(self, index: int) -> str: ...
    def passages(self, index: int) -> list[str]: ...
    def known_positives(self, index: int) -> set[str]: ...


# Processes that divide their rows among themselves by tokens: so many, or as many as have so many rows together. More would
# balance better, but each looks at the rows of all of them.
PROCESSES_IN_GROUP, ROWS_IN_GROUP = 8, 1024
BYTES_PER_TOKEN = 4  # in UTF-8, which says as much of Chinese as of English


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


def balanced_positions(
    batch: int, per_process: int, num_processes: int, process: int, total: int | None, cost: Callable[[int], int]
) -> Sequence[int]:
    """As `batch_positions`, with shares that cost nearly the same, so that no process waits long for another.

    Together the shares are the same positions. Processes divide theirs in groups, so that on hundreds of GPUs none looks
    at all rows.

    Args:
        cost: of a position; all processes have to find the same.
    """
    if num_processes == 1:
        return batch_positions(batch, per_process, num_processes, process, total)
    size = max(PROCESSES_IN_GROUP, ROWS_IN_GROUP // per_process)
    first = process // size * size
    group = range(first, min(first + size, num_processes))
    shares = [batch_positions(batch, per_process, num_processes, other, total) for other in group]
    positions = range(shares[0].start, shares[-1].stop)
    own = equal_shares([cost(position) for position in positions], len(group))[process - first]
    return [positions[place] for place in own]


def equal_shares(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Divides items into shares of as many items and nearly equal cost: the dearest first, each to the least laden share.

    Graham 1969, https://doi.org/10.1137/0117039, with shares that are full when they have their number of items.

    Returns:
        Indices into `costs`, ascending in each share. `num_shares` has to divide their number.
    """
    size, rest = divmod(len(costs), num_shares)
    assert rest == 0
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    laden = [(0, number) for number in range(num_shares)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        total, number = heapq.heappop(laden)
        shares[number].append(item)
        if len(shares[number]) < size:
            heapq.heappush(laden, (total + costs[item], number))
    return [sorted(share) for share in shares]


class Example(NamedTuple):
    """One query with its group of passages, the drawn positive first."""

    rows: Rows
    row: int
    query: str
    passages: list[str]
    query_id: int
    """`text_id` of the query as it stands in the data."""
    passage_ids: list[int]
    """`text_id` of each passage as it stands in the data."""
    known_ids: list[int]
    """`text_id` of every passage known to be a positive of this query."""
    teacher_scores: list[float] | None


def draw_example(
    rows: Rows,
    row: int,
    epoch: int,
    *,
    seed: int,
    group_size: int,
    key: int | None = None,
    query_prefix: Callable[[str | None], str] = lambda prompt: "",
    passage_prefix: str = "",
    shuffle_ratio: float = 0.0,
    teacher_scores: bool = False,
) -> Example:
    """Draws one positive and `group_size - 1` negatives; the draw depends on (seed, epoch, row) alone.

    Every negative is used before any repeats. A row without negatives gets passages of other rows, never one that is
    known to answer its query.

    Args:
        key: stands for the row in the draw; by default its index. Rows of a stream have a number of their own.
        query_prefix: from the row's own `prompt` (None if it has none) to the text put before the query.
        shuffle_ratio: chance that the three parts of a positive longer than 100 characters are put in random order.

    Raises:
        ValueError: no negative can be found for a row.
    """
    rng = _random(seed, epoch, row if key is None else key)
    data = rows[row]
    known = rows.known_positives(row)
    positives, negatives = data["pos"], data.get("neg") or []
    positive, drawn = _draw(rng, len(positives), len(negatives), group_size)
    passages = [positives[positive], *(negatives[i] for i in drawn)]
    scores = [data["pos_scores"][positive], *(data["neg_scores"][i] for i in drawn)] if teacher_scores else None
    while len(passages) < group_size:
        passages.append(draw_other_passage(rows, row, known, rng))
    passage_ids = [text_id(text) for text in passages]
    if shuffle_ratio > 0 and len(passages[0]) > 100 and rng() < shuffle_ratio:
        size = len(passages[0]) // 3 + 1
        parts = [passages[0][i : i + size] for i in range(0, len(passages[0]), size)]
        passages[0] = " ".join(parts[i] for i in _shuffled(len(parts), rng))
    return Example(
        rows=rows,
        row=row,
        query=query_prefix(data.get("prompt")) + data["query"],
        passages=[passage_prefix + text for text in passages],
        query_id=text_id(data["query"]),
        passage_ids=passage_ids,
        known_ids=sorted(text_id(text) for text in known),
        teacher_scores=scores,
    )


def expected_tokens(
    text_bytes: tuple[int, list[int], list[int]],
    row: int,
    epoch: int,
    *,
    seed: int,
    group_size: int,
    query_max_len: int,
    passage_max_len: int,
) -> int:
    """About how many tokens `draw_example` will find for a row, from the lengths of its texts alone.

    Args:
        text_bytes: of the query, the positives and the negatives (`TrainingRows.text_bytes`). Where there are none of
            these, other rows' passages are drawn and taken to be of half the greatest length.
    """
    query, positives, negatives = text_bytes
    positive, drawn = _draw(_random(seed, epoch, row), len(positives), len(negatives), group_size)
    passages = [positives[positive], *(negatives[i] for i in drawn)]
    others = (group_size - len(passages)) * passage_max_len // 2
    tokens = [min(length // BYTES_PER_TOKEN, passage_max_len) for length in passages]
    return min(query // BYTES_PER_TOKEN, query_max_len) + sum(tokens) + others


def _random(seed: int, epoch: int, row: int) -> Callable[[], float]:
    # Only random() is promised to give the same numbers in every version of Python.
    return random.Random(f"{seed}-{epoch}-{row}").random


def _draw(rng: Callable[[], float], num_positives: int, num_negatives: int, group_size: int) -> tuple[int, list[int]]:
    """Which of a row's positives and which of its negatives make its group; no negatives where it has none."""
    positive = int(rng() * num_positives)
    drawn: list[int] = []
    while num_negatives and len(drawn) < group_size - 1:
        drawn += _shuffled(num_negatives, rng)[: group_size - 1 - len(drawn)]
    return positive, drawn


def _shuffled(n: int, rng: Callable[[], float]) -> list[int]:
    items = list(range(n))
    for i in range(n - 1, 0, -1):
        j = int(rng() * (i + 1))
        items[i], items[j] = items[j], items[i]
    return items


def draw_other_passage(rows: Rows, row: int, known: set[str], rng: Callable[[], float]) -> str:
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
