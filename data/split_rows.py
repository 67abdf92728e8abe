"""Hold rows of your own out of training, in the formats of training and evaluation.

Rows that share a query or a positive passage, directly or through others, stay on one side, so that nothing held out has
been seen in training. The corpus is every passage of every row, so that a held-out query meets all of them.

    python data/split_rows.py --input_file my_rows.jsonl --held_out 200 --output_dir data/my_rows

Writes train.jsonl and dev.jsonl (rows as they were), corpus.jsonl and queries.jsonl (of dev.jsonl). The same rows and seed
give the same bytes.
"""

import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bge_accel.config import option, parse_config, required, user_errors
from bge_accel.data.reading import check_training_row, read_rows
from bge_accel.files.atomic import atomic_file
from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files
from bge_accel.files.outputs import check_folder, check_output
from bge_accel.mining.pool import normalise_text
from bge_accel.processes.progress import say
from bge_accel.processes.signals import interruptible

OUTPUTS = ("train.jsonl", "dev.jsonl", "corpus.jsonl", "queries.jsonl")


@dataclass(kw_only=True)
class Config:
    """What to split."""

    input_file: list[str] = required("rows of query, pos and neg: files, globs or folders")
    output_dir: str = required("where the four files are written")
    held_out: int = option(200, "so many rows at the least are kept out of training", at_least=1)
    overwrite: bool = option(False, "replace the files of an earlier split, and with them what it held out")
    seed: int = option(42, "which rows these are", at_least=0, at_most=2**32 - 1)


def main(cfg: Config) -> None:
    with user_errors():
        check_folder("--output_dir", cfg.output_dir)
        there = [name for name in OUTPUTS if os.path.lexists(os.path.join(cfg.output_dir, name))]
        if there and not cfg.overwrite:
            raise ValueError(
                f"--output_dir {cfg.output_dir} holds {', '.join(there)}: another split would hold out other rows than those "
                "that models have been trained without; name another folder, or add --overwrite"
            )
        for name in OUTPUTS:
            check_output("--output_dir", os.path.join(cfg.output_dir, name), cfg.input_file)
        rows = read_all(cfg.input_file)
        groups = connected([*map(normalise_text, (row["query"], *row["pos"]))] for row in rows)
        random.Random(cfg.seed).shuffle(groups)
        held_out = set[int]()
        for group in groups:
            if len(held_out) < cfg.held_out and len(held_out) + len(group) <= 2 * cfg.held_out:  # not one huge group
                held_out.update(group)
        if len(held_out) < cfg.held_out or len(held_out) == len(rows):
            raise ValueError(
                f"--held_out {cfg.held_out} of {len(rows):,} rows: there are too few, or too many of them are connected "
                "by a query or a positive they share"
            )

    train = [row for index, row in enumerate(rows) if index not in held_out]
    dev = [rows[index] for index in sorted(held_out)]
    passages = dict.fromkeys(text for row in rows for text in (*row["pos"], *(row.get("neg") or [])))
    queries = [{"query": row["query"], "positive": row["pos"]} for row in dev]
    contents = (train, dev, [{"content": text} for text in passages], queries)
    for name, lines in zip(OUTPUTS, contents, strict=True):
        with atomic_file(os.path.join(cfg.output_dir, name)) as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    say(f"{len(train):,} rows to train on, {len(dev):,} held out, {len(passages):,} passages; wrote {cfg.output_dir}")


def read_all(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Every row; ValueError with file and line of what is wrong."""
    faults, rows = Faults(), []
    for path in find_files(paths, faults):
        for where, _, row in read_rows(path, faults):
            wrong = check_training_row(row)
            for what in wrong:
                faults.add(where, what)
            if not wrong:
                rows.append(row)
    faults.raise_if_any()
    return rows


def connected(rows: Iterable[Sequence[str]]) -> list[list[int]]:
    """Numbers of rows, in groups that have no text in common (union by the first row that had the text)."""
    parent: list[int] = []
    first: dict[str, int] = {}

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for number, texts in enumerate(rows):
        parent.append(number)
        for text in texts:
            low, high = sorted((root(first.setdefault(text, number)), root(number)))
            parent[high] = low
    groups: dict[int, list[int]] = {}
    for number in range(len(parent)):
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())


if __name__ == "__main__":
    with interruptible():
        main(parse_config(Config, description=__doc__.split("\n")[0]))
