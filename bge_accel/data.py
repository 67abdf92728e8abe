"""The order of training rows, and one group of passages drawn for each query: both pure functions of the position."""

import math
import random
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from bge_accel.reading import text_id


class Rows(Protocol):
    """What can be drawn from: `rows.TrainingRows`, or a block of a stream."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict: ...
    def place(self, index: int) -> str: ...
    def passages(self, index: int) -> list[str]: ...
    def known_positives(self, index: int) -> set[str]: ...


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

    rows: Rows
    row: int
    query: str
    passages: list[str]
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
    # Only random() is promised to give the same numbers in every version of Python.
    rng = random.Random(f"{seed}-{epoch}-{row if key is None else key}").random
    data = rows[row]
    known = rows.known_positives(row)
    positives, negatives = data["pos"], data.get("neg") or []
    drawn = int(rng() * len(positives))
    passages, scores = [positives[drawn]], []
    if teacher_scores:
        scores.append(data["pos_scores"][drawn])
    while len(passages) < group_size:
        if not negatives:
            passages.append(draw_other_passage(rows, row, known, rng))
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
        rows=rows,
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
