"""The rows that mining writes, and what it says of them."""

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bge_accel.data.reading import read_rows, text_id
from bge_accel.files.atomic import atomic_file
from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files
from bge_accel.files.parts import read_parts
from bge_accel.files.text import shorten
from bge_accel.mining.choice import DROPS
from bge_accel.mining.histogram import plot_histogram, text_histogram
from bge_accel.mining.pool import TextPool
from bge_accel.mining.rows import new_row

ROWS_IN_HISTOGRAM = 200_000
SAMPLE_LENGTH = 400  # characters of a text that --show prints
WAY_OUT = (
    "begin --range_for_sampling lower, loosen the limits of scores and --max_positive_overlap, give more passages by "
    "--candidate_pool, or add --fill_random"
)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written; each named as the flag of scripts/mine_hard_negatives.py."""

    input_file: list[str]
    output_file: str
    negative_number: int
    drop_rows_without_negatives: bool
    write_scores: bool
    plot: str | None
    show: int


class NothingMinedError(ValueError):
    """No row got a negative."""


def write_output(
    options: OutputOptions, pool: TextPool, num_rows: int, parts: Sequence[str], configuration: str
) -> tuple[str, int]:
    """Reads the input again, line by line, and puts the negatives in.

    Args:
        parts: files of what was mined, in the order of the rows.
        configuration: the settings, as YAML; it is written beside the rows.

    Returns:
        The summary, and how many rows have no negatives.

    Raises:
        NothingMinedError: no row got a negative; nothing is written.
        ValueError: the input has changed, or a part is damaged; nothing is written.
    """
    num_shown = min(options.show, num_rows)
    shown = {i * num_rows // num_shown for i in range(num_shown)}
    stride = -(-num_rows // ROWS_IN_HISTOGRAM)
    counts, dropped = Counter[str](), Counter[str]()
    pos_scores, neg_scores = array("f"), array("f")
    without, samples = [], []

    def records() -> Iterator[dict[str, Any]]:
        for record in read_parts(parts):
            if "dropped" in record:
                dropped.update(record["dropped"])
            else:
                yield record

    faults = Faults()
    items = (item for path in find_files(options.input_file, faults) for item in read_rows(path, faults))
    with atomic_file(options.output_file) as file:
        for number, record in enumerate(records()):
            where, _, row = next(items, ("", 0, {}))
            if not row or text_id(row["query"]) != record["query_id"]:
                raise ValueError(
                    f"{where or options.input_file[-1]}: the input has changed since it was checked; run again"
                )
            negatives = [row["neg"][place] for place in record["kept"]] + [pool[index] for index in record["mined"]]
            scores = record["kept_scores"] + record["scores"]
            counts["mined"] += len(record["mined"]) - record["filled"]
            counts["filled"] += record["filled"]
            counts["kept"] += len(record["kept"])
            counts["removed"] += record["removed"]
            counts["short"] += len(record["mined"]) < options.negative_number
            if number % stride == 0:
                pos_scores.extend(record["pos_scores"])
                neg_scores.extend(scores)
            if number in shown:
                samples.append(sample(row["query"], list(zip(row["pos"], record["pos_scores"], strict=True)),
                                      list(zip(negatives, scores, strict=True))))  # fmt: skip
            if not negatives:
                without.append(where)
                if options.drop_rows_without_negatives:
                    continue
            new = new_row(row, negatives, (record["pos_scores"], scores) if options.write_scores else None)
            file.write(json.dumps(new, ensure_ascii=False) + "\n")
        if not counts["mined"] + counts["filled"]:
            why = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in dropped.most_common(3))
            raise NothingMinedError(
                f"no row got a negative (candidates dropped: {why or 'none'}), nothing is written; {WAY_OUT}"
            )
    with atomic_file(f"{options.output_file}.config.yaml") as file:
        file.write(configuration)
    scores_found = np.array(pos_scores), np.array(neg_scores)
    text = summarize(options, num_rows, len(pool), counts, dropped, without)
    text += "\n\n" + text_histogram(*scores_found)
    if stride > 1:
        text += f"\n(scores of every {stride}th row)"
    if options.plot is not None:
        os.makedirs(os.path.dirname(os.path.abspath(options.plot)), exist_ok=True)
        plot_histogram(f"{options.plot}.incomplete", *scores_found)
        os.replace(f"{options.plot}.incomplete", options.plot)
    outputs = [options.output_file, f"{options.output_file}.config.yaml", *([options.plot] if options.plot else [])]
    return "\n\n".join([*samples, text, f"wrote {', '.join(outputs)}"]), len(without)


def summarize(
    options: OutputOptions,
    num_rows: int,
    num_texts: int,
    counts: Counter[str],
    dropped: Counter[str],
    without: Sequence[str],
) -> str:
    """What was mined, and what was dropped and why."""
    written = num_rows - (len(without) if options.drop_rows_without_negatives else 0)
    lines = [
        f"{num_rows:,} rows, {written:,} written; {num_texts:,} passages in the pool",
        f"{counts['mined']:,} negatives mined ({counts['mined'] / num_rows:.1f} a row), "
        f"{counts['filled']:,} filled in at random, {counts['kept']:,} kept, {counts['removed']:,} existing removed",
        f"{counts['short']:,} rows got fewer than {options.negative_number}",
    ]
    if without:
        what = "left out" if options.drop_rows_without_negatives else 'written with "neg": []'
        more = ", ..." if len(without) > 10 else ""
        lines.append(f"{len(without):,} rows have no negatives and are {what}: {', '.join(without[:10])}{more}")
    names = {name: name.replace("_", " ") for name in DROPS}
    width = max(map(len, names.values()))
    lines += ["", "candidates dropped"]
    lines += [f"  {names[name]:<{width}}  {dropped[name]:>12,}" for name in DROPS]
    return "\n".join(lines)


def sample(query: str, positives: list[tuple[str, float]], negatives: list[tuple[str, float]]) -> str:
    """One row as people read it: the first three positives and negatives with their scores, long enough to judge."""
    lines = [f"query          {shorten(' '.join(query.split()), SAMPLE_LENGTH)}"]
    for mark, texts in (("+", positives), ("-", negatives)):
        lines += [
            f"  {mark} {score:>9.4f}  {shorten(' '.join(text.split()), SAMPLE_LENGTH)}" for text, score in texts[:3]
        ]
        if len(texts) > 3:
            lines.append(f"  {mark}            ... and {len(texts) - 3} more")
    return "\n".join(lines)
