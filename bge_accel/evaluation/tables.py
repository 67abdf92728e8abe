"""Tables of metrics, as plain text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bge_accel.files.text import shorten, shown_number, text_table

if TYPE_CHECKING:
    pass


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Metrics named like `nDCG@10` as a table: a row a metric, a column a cut-off."""
    names = list(dict.fromkeys(name.partition("@")[0] for name in metrics))
    cutoffs = sorted({int(name.partition("@")[2]) for name in metrics})
    rows = [[name, *(shown_number(metrics.get(f"{name}@{cutoff}")) for cutoff in cutoffs)] for name in names]
    return text_table([["", *(f"@{cutoff}" for cutoff in cutoffs)], *rows])


def side_by_side_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Evaluations side by side: a row a metric that any has, a column each, with the difference to the first.

    Args:
        metrics: of each evaluation under its name.
    """
    names = list(metrics)
    rows = [["", *names]]
    for metric in dict.fromkeys(metric for of_one in metrics.values() for metric in of_one):
        first = metrics[names[0]].get(metric)
        cells = [shown_number(first)]
        for name in names[1:]:
            value = metrics[name].get(metric)
            both = value is not None and first is not None
            cells.append(f"{shown_number(value)} ({value - first:+.4f})" if both else shown_number(value))  # type: ignore[operator]
        rows.append([metric, *cells])
    return text_table(rows)


def moved_into_top(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], *, top: int = 3, limit: int = 5
) -> str:
    """Queries whose first relevant passage moved into the top from below it, those that moved farthest first.

    Args:
        before, after: `retrieval.ranking_rows` of the same queries (what `--save_ranking` writes).
        limit: so many are shown in full; the rest is counted.

    Raises:
        ValueError: the two do not hold the same queries.
    """
    earlier = {row["id"]: row for row in before}
    if earlier.keys() != {row["id"] for row in after}:
        raise ValueError("the two rankings are not of the same queries: evaluate both models on the same data")
    # A passage that was not retrieved at all came from farthest away.
    start = {query: row["first_positive"] or float("inf") for query, row in earlier.items()}
    moved = [row for row in after if row["first_positive"] and row["first_positive"] <= top < start[row["id"]]]
    moved.sort(key=lambda row: (-start[row["id"]], row["first_positive"]))
    lost = sum(start[row["id"]] <= top < (row["first_positive"] or float("inf")) for row in after)
    lines = [f"Moved into the top {top}: {len(moved)} of {len(earlier)} queries; out of it: {lost}"]
    for row in moved[:limit]:
        old = earlier[row["id"]]
        lines += [
            "",
            f"query   {shorten(row['query'], 110)}",
            f"rank    {old['first_positive'] or 'not found'} -> {row['first_positive']}",
            f"before  {shorten(old['first_text'], 110)}",
            f"after   {shorten(row['first_text'], 110)}",
        ]
    return "\n".join(lines)
