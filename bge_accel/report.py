"""Tables and cards that people look at, as plain text."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bge_accel.reading import shorten

if TYPE_CHECKING:
    from bge_accel.model import EmbeddingSettings


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Metrics named like `nDCG@10` as a table: a row a metric, a column a cut-off."""
    names = list(dict.fromkeys(name.partition("@")[0] for name in metrics))
    cutoffs = sorted({int(name.partition("@")[2]) for name in metrics})
    rows = [[name, *(_number(metrics.get(f"{name}@{cutoff}")) for cutoff in cutoffs)] for name in names]
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
        cells = [_number(first)]
        for name in names[1:]:
            value = metrics[name].get(metric)
            both = value is not None and first is not None
            cells.append(f"{_number(value)} ({value - first:+.4f})" if both else _number(value))  # type: ignore[operator]
        rows.append([metric, *cells])
    return text_table(rows)


def moved_into_top(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], *, top: int = 3, limit: int = 5
) -> str:
    """Queries whose first relevant passage moved into the top from below it, those that moved farthest first.

    Args:
        before, after: `evaluation.ranking_rows` of the same queries (what `--save_ranking` writes).
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def model_card(*, name: str, base: str, settings: "EmbeddingSettings", training: str, configuration: str) -> str:
    """README.md of a saved model: what it is, how to load it, how it was made.

    Args:
        base: folder or hub name of the model it was made from; a folder is not linked.
        training: what was done, to follow the base model's name in a sentence.
        configuration: as YAML.
    """
    prompt = f" The query instruction {shorten(settings.query_prefix)} is applied." if settings.query_prefix else ""
    link = "" if os.path.isdir(base) else f"base_model: {base}\n"
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, sentence-similarity]
{link}---

# {name}

A text-embedding model: {os.path.basename(base.rstrip("/"))}, {training}. {settings.pooling} pooling,
{"normalised: compare by dot product or cosine" if settings.normalize else "not normalised: compare by dot product"}.

```python
from bge_accel import EmbeddingModel

model = EmbeddingModel("path/to/this/folder")
scores = model.encode_queries(["a question"]) @ model.encode_corpus(["a passage"]).T
```

It also loads as `sentence_transformers.SentenceTransformer(folder)` (`encode_query`, `encode_document`).{prompt}

## Training configuration

```yaml
{configuration.strip()}
```
"""
