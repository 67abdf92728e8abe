"""Training rows read as they are needed, never all in memory; exact on resume."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bge_accel.data.reading import FIELDS, check_training_row
from bge_accel.data.remote import file_name, find_stream_files, read_items
from bge_accel.files.faults import Faults
from bge_accel.files.parsing import UNREADABLE, parse_json
from bge_accel.files.text import shorten


class RowBlock:
    """Rows of a stream that are in memory together."""

    def __init__(self, rows: list[dict[str, Any]], places: list[str], numbers: list[int]) -> None:
        self.rows, self.places = rows, places
        self.numbers = numbers
        """No two rows of an epoch have the same, on whatever process they are."""
        rows_of_query: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            rows_of_query.setdefault(row["query"], []).append(index)
        self._same_query = {query: same for query, same in rows_of_query.items() if len(same) > 1}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def place(self, index: int) -> str:
        """Where a row came from, as `file:line`."""
        return self.places[index]

    def passages(self, index: int) -> list[str]:
        """All passages of a row."""
        return self.rows[index]["pos"] + (self.rows[index].get("neg") or [])

    def known_positives(self, index: int) -> set[str]:
        """The texts known to answer a row's query: its own positives and those of the block's rows with this query."""
        same = self._same_query.get(self.rows[index]["query"], (index,))
        return {text for row in same for text in self.rows[row]["pos"]}


class Position(NamedTuple):
    """How far an epoch has been read."""

    file: int = 0
    """Its number in the epoch's order."""
    line: int = 0
    """The last that was read of the file."""
    seen: int = 0
    """Rows passed so far, other processes' included where a file is shared."""


class _Item(NamedTuple):
    """One row as it was read, later as it was parsed and checked."""

    value: Any
    place: str
    number: int
    position: Position
    """After this row."""


def _is_state(state: Any) -> bool:
    """Whether it is what `RowStream.state_dict` returns."""
    if (
        not isinstance(state, Mapping)
        or not {"epoch", "block", "taken", "position", "stream", "revisions"} <= state.keys()
    ):
        return False
    position, stream, revisions = state["position"], state["stream"], state["revisions"]
    return (
        isinstance(position, list)
        and len(position) == len(Position._fields)
        and all(type(n) is int and 0 <= n < 2**63 for n in (state["epoch"], state["block"], state["taken"], *position))
        and isinstance(stream, Mapping)
        and {"seed", "rank", "num_ranks", "buffer_size", "files"} <= stream.keys()
        and isinstance(revisions, Mapping)
        and all(isinstance(commit, str) for commit in revisions.values())
    )


class RowStream:
    """One process's share of the rows, shuffled block by block, epoch after epoch without end.

    The files come in another order each epoch. Where they make up shares of equal size (within a tenth), each process
    reads only its own ones, the same in every epoch; else all read all of them and take every n-th row. Given the same
    paths, seed, processes and buffer, the rows are always the same.

    Args:
        paths: files, globs and folders as everywhere; URLs of files (also with *); names of datasets on the hub:
            owner/name, owner/name:config, owner/name:config:split (by default the split "train").
        buffer_size: rows that are shuffled together; up to 1.5 times as many are in memory.
        need_scores: every row must carry `pos_scores`, negatives and their `neg_scores`.
        state: what `state_dict` returned; the stream goes on there. It reads again the file up to that point at most.

    Raises:
        ValueError: something is wrong with the paths, the first block's rows, or the state. The rows that follow are
            checked as they are read, so `take` raises it too.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        buffer_size: int = 10_000,
        need_scores: bool = False,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if state is not None and not _is_state(state):
            raise ValueError(
                f"{', '.join(paths)}: the checkpoint's position in the stream is damaged: {shorten(state)}"
            )
        self._paths, self._seed, self._rank, self._num_ranks = paths, seed, rank, num_ranks
        self._buffer_size, self._need_scores = buffer_size, need_scores
        files, sizes, self._revisions = find_stream_files(paths, state["revisions"] if state else {})
        digest = hashlib.blake2b(repr([(file_name(f), s) for f, s in zip(files, sizes, strict=True)]).encode())
        self._identity: dict[str, Any] = {
            "seed": seed, "rank": rank, "num_ranks": num_ranks, "buffer_size": buffer_size,
            "files": digest.hexdigest()[:32],
        }  # fmt: skip
        for key, value in self._identity.items():
            if state and state["stream"][key] != value:
                what = "has other files" if key == "files" else f"has {key} {state['stream'][key]} instead of {value}"
                raise ValueError(
                    f"{', '.join(paths)}: the stream of the checkpoint {what}; resume with the same, or start a new run"
                )
        shares = [sum(size or 0 for size in sizes[r::num_ranks]) for r in range(num_ranks)]
        # Shares of unequal size would show some rows more often than others; unknown and compressed sizes say little.
        same_kind = len({os.path.splitext(file_name(file))[1] for file in files}) == 1
        self._own_files = same_kind and None not in sizes and 0 < max(shares) <= 1.1 * min(shares)
        self._files = files[rank::num_ranks] if self._own_files else files

        self._epoch, self._block_number, self._start = 0, 0, Position()
        if state:
            self._epoch, self._block_number, self._start = state["epoch"], state["block"], Position(*state["position"])
        self._taken = state["taken"] if state else 0
        self._reader: Iterator[_Item] | None = None
        self._ahead: list[_Item] = []
        self._block: RowBlock | None = None
        if self._taken >= len(self._load()):
            raise ValueError(f"{', '.join(paths)}: fewer rows than at the time of the checkpoint; start a new run")

    @property
    def epochs_done(self) -> int:
        """How often this process's share has been read to its end."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands between two calls of `take`; small, and JSON."""
        return {
            "epoch": self._epoch,
            "block": self._block_number,
            "position": list(self._start),
            "taken": self._taken,
            "stream": self._identity,
            "revisions": self._revisions,
        }

    def take(self, n: int) -> list[tuple[RowBlock, int, int, int]]:
        """The next `n` rows: (block, index in it, epoch, number of the row among all of the epoch)."""
        taken = []
        for _ in range(n):
            block = self._block or self._load()
            index = self._order[self._taken]
            taken.append((block, index, self._epoch, block.numbers[index]))
            self._taken += 1
            if self._taken == len(block):
                self._block, self._taken = None, 0
                self._epoch, self._block_number, self._start = self._next
        return taken

    def _load(self) -> RowBlock:
        """Reads the block that begins at `self._start`.

        Half a block is read ahead: if no more rows are left they go into this block, for the last one of an epoch
        could otherwise be too small to find negatives in.
        """
        if self._reader is None:
            self._reader = self._read(self._epoch, self._start)
        limit = self._buffer_size + self._buffer_size // 2 + 1
        faults = Faults()
        items = itertools.islice(self._reader, limit - len(self._ahead))
        rows = self._ahead + [item._replace(value=self._check(item, faults)) for item in items]
        faults.raise_if_any()
        if not rows:
            raise ValueError(
                f"{', '.join(self._paths)}: process {self._rank + 1} of {self._num_ranks} is left without a row; use "
                "fewer processes or more rows"
            )
        if len(rows) < limit:
            self._ahead, self._reader = [], None
            self._next = self._epoch + 1, 0, Position()
        else:
            rows, self._ahead = rows[: self._buffer_size], rows[self._buffer_size :]
            self._next = self._epoch, self._block_number + 1, rows[-1].position
        self._block = RowBlock([row.value for row in rows], [row.place for row in rows], [row.number for row in rows])
        self._order = self._permutation(self._epoch, len(rows), [0, 0, self._block_number, self._rank])
        return self._block

    def _read(self, epoch: int, start: Position) -> Iterator[_Item]:
        """This process's rows of an epoch from a position on."""
        order = self._permutation(epoch, len(self._files), [0, 1, 0, 0])
        after, seen = start.line, start.seen
        for place in range(start.file, len(order)):
            path = self._files[order[place]]
            for line, value in read_items(path, after):
                number = seen * self._num_ranks + self._rank if self._own_files else seen
                seen += 1
                if number % self._num_ranks == self._rank:
                    yield _Item(value, f"{path}:{line}", number, Position(place, line, seen))
            after = 0

    def _permutation(self, epoch: int, n: int, counter: list[int]) -> list[int]:
        bits = np.random.Philox(key=[self._seed, epoch], counter=counter)
        return np.random.Generator(bits).permutation(n).tolist()

    def _check(self, item: _Item, faults: Faults) -> dict[str, Any]:
        """The row's fields that are there (Parquet has null for those that are not)."""
        value = parse_json(item.place, item.value, faults) if isinstance(item.value, bytes) else item.value
        if value is UNREADABLE:
            return {}
        if not isinstance(value, dict):
            faults.add(item.place, f"expected an object {{...}}, found {shorten(value)}")
            return {}
        for what in check_training_row(value):
            faults.add(item.place, what)
        if self._need_scores and not (value.get("pos_scores") and value.get("neg_scores")):
            faults.add(item.place, 'no "pos_scores" or "neg_scores": distillation needs a negative, and all scores')
        return {name: value[name] for name in FIELDS if value.get(name) is not None}
