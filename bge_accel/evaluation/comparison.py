"""Whether two systems differ on the same queries, by how much, and on which."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bge_accel.evaluation.retrieval import TEXT_KEPT, Evaluation
from bge_accel.evaluation.sets import EvaluationData
from bge_accel.files.text import shorten, text_table

BLOCK = 1 << 22  # numbers drawn at a time


class Difference(NamedTuple):
    """One metric of two systems on the same queries."""

    base: float
    other: float
    """Means over the queries."""
    low: float
    high: float
    """Confidence interval of other - base."""
    p_value: float
    """How often chance alone makes a difference at least as large."""
    better: int
    worse: int
    equal: int
    """Queries on which other scores above, below and as base does."""

    @property
    def mean(self) -> float:
        """other - base."""
        return self.other - self.base


def paired_differences(
    base: Mapping[str, np.ndarray],
    other: Mapping[str, np.ndarray],
    *,
    num_samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Compares every metric that both have.

    The interval is the percentile interval of the paired bootstrap over queries (Efron and Tibshirani 1993, chapter 13;
    Sakai 2006 for retrieval). The p-value is that of Fisher's randomisation test, two-sided: under the null hypothesis
    the sign of each query's difference is a coin's (Smucker, Allan and Carterette 2007); with one added to both counts,
    so that it is never 0 (Phipson and Smyth 2010). Neither corrects for looking at several metrics or systems.

    Args:
        base, other: {metric: (queries,)}, the queries in the same order.
        num_samples: resamplings for the interval, and as many for the test.
        seed: the same seed gives the same figures.
    """
    names = [name for name in base if name in other]
    diffs = np.stack([np.asarray(other[name], np.float64) - base[name] for name in names], axis=1)  # (queries, metrics)
    num_queries = len(diffs)
    observed = diffs.mean(axis=0)
    rng = np.random.default_rng(seed)
    means = np.empty((num_samples, len(names)))
    as_large = np.zeros(len(names), dtype=np.int64)
    # Sums in another order differ in the last digits, and must not make a tie a smaller difference.
    limit = np.abs(observed) - 1e-12
    block = max(1, BLOCK // num_queries)
    for start in range(0, num_samples, block):
        size = min(block, num_samples - start)
        drawn = rng.integers(num_queries, size=(size, num_queries)) + np.arange(size)[:, None] * num_queries
        times = np.bincount(drawn.ravel(), minlength=size * num_queries).reshape(size, num_queries)
        means[start : start + size] = times.astype(np.float64) @ diffs / num_queries
        signs = 1.0 - 2.0 * rng.integers(2, size=(size, num_queries))
        as_large += (np.abs(signs @ diffs / num_queries) >= limit).sum(axis=0)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return {
        name: Difference(
            float(np.mean(base[name])),
            float(np.mean(other[name])),
            float(low[column]),
            float(high[column]),
            float((as_large[column] + 1) / (num_samples + 1)),
            int((diffs[:, column] > 0).sum()),
            int((diffs[:, column] < 0).sum()),
            int((diffs[:, column] == 0).sum()),
        )
        for column, name in enumerate(names)
    }


def choose_metric(asked: str | None, cutoffs: Sequence[int]) -> str:
    """The metric by which queries are said to gain and lose: the one asked for, else nDCG at 10 or the nearest below.

    Raises:
        ValueError: it is not measured.
    """
    names = [
        f"{name}@{cutoff}" for name in ("MRR", "nDCG", "Recall", "Capped_Recall", "MAP", "P") for cutoff in cutoffs
    ]
    if asked is None:
        return f"nDCG@{max((cutoff for cutoff in cutoffs if cutoff <= 10), default=min(cutoffs))}"
    for name in names:
        if name.lower() == asked.lower():
            return name
    raise ValueError(f"--compare_metric {asked} is not measured; choose one of {', '.join(names)}")


def most_moved(
    data: EvaluationData, base: Evaluation, other: Evaluation, metric: str, limit: int = 10
) -> dict[str, list[dict[str, Any]]]:
    """The queries that "gained" and "lost" most by `metric` from base to other, at most `limit` each.

    Each is a row with "query", "id", "base" and "other" (its metric), "positive" (a relevant text, None where the corpus
    has none), and of either system "base_rank" (of the first relevant passage, None if not found), "base_first" (the text
    it ranks first) and "base_first_is_relevant"; of passages `TEXT_KEPT` characters.
    """
    change = other.per_query[metric] - base.per_query[metric]
    order = np.argsort(-change, kind="stable")
    moved = {
        "gained": [int(query) for query in order[:limit] if change[query] > 0],
        "lost": [int(query) for query in order[::-1][:limit] if change[query] < 0],
    }
    return {
        name: [_moved_row(data, base, other, metric, query) for query in queries] for name, queries in moved.items()
    }


def _moved_row(data: EvaluationData, base: Evaluation, other: Evaluation, metric: str, query: int) -> dict[str, Any]:
    judgements = data.judgements
    own = (judgements.query == query) & (judgements.grade > 0) & (judgements.row >= 0)
    positives = judgements.row[own][np.argsort(-judgements.grade[own], kind="stable")]
    row: dict[str, Any] = {
        "id": data.queries.ids[query],
        "query": data.queries.texts[query],
        "positive": data.corpus.texts[positives[0]][:TEXT_KEPT] if len(positives) else None,
    }
    for name, system in (("base", base), ("other", other)):
        relevant = np.flatnonzero(system.gains[query] > 0)
        first = system.indices[query, 0] if system.indices.shape[1] else -1
        row |= {
            name: float(system.per_query[metric][query]),
            f"{name}_rank": int(relevant[0]) + 1 if len(relevant) else None,
            f"{name}_first": data.corpus.texts[first][:TEXT_KEPT] if first >= 0 else None,
            f"{name}_first_is_relevant": bool(len(relevant) and relevant[0] == 0),
        }
    return row


class Compared(NamedTuple):
    """One system against the base."""

    name: str
    differences: dict[str, Difference]
    moved: dict[str, list[dict[str, Any]]]
    """From `most_moved`."""
    verdict: str

    def result(self) -> dict[str, Any]:
        """What is written of it, as JSON can hold it."""
        metrics = {name: {**found._asdict(), "difference": found.mean} for name, found in self.differences.items()}
        return {"verdict": self.verdict, "metrics": metrics, **self.moved}


def compare(data: EvaluationData, systems: Mapping[str, Evaluation], metric: str) -> list[Compared]:
    """Each of the other systems, {name: evaluation}, against the first; `metric` says which queries gain and lose."""
    (base_name, base), *others = systems.items()
    compared = []
    for name, other in others:
        differences = paired_differences(base.per_query, other.per_query)
        said = verdict(differences[metric], metric, base_name, name)
        compared.append(Compared(name, differences, most_moved(data, base, other, metric), said))
    return compared


def differences_table(differences: Mapping[str, Difference], base: str, other: str, confidence: float = 0.95) -> str:
    """One row a metric: both means, the difference with its interval, the p-value, and the queries better and worse."""
    rows = [["", base, other, "difference", f"{100 * confidence:g} % interval", "p", "better", "worse", "equal"]]
    for name, found in differences.items():
        rows.append([name, f"{found.base:.4f}", f"{found.other:.4f}", *difference_cells(found)])
    return text_table(rows)


def difference_cells(found: Difference) -> list[str]:
    """Difference, interval, p-value, better, worse, equal, as people read them."""
    return [
        f"{found.mean:+.4f}",
        f"{found.low:+.4f} to {found.high:+.4f}",
        f"{found.p_value:.4f}",
        f"{found.better:,}",
        f"{found.worse:,}",
        f"{found.equal:,}",
    ]


def verdict(found: Difference, metric: str, base: str, other: str, confidence: float = 0.95) -> str:
    """One sentence on whether the difference is more than chance."""
    if not found.better and not found.worse:
        return f"{metric}: {other} and {base} score the same on every query: no difference."
    interval = f"{found.mean:+.4f} ({100 * confidence:g} % interval {found.low:+.4f} to {found.high:+.4f}, p = {found.p_value:.4f})"
    if found.p_value < 1 - confidence and (found.low > 0 or found.high < 0):
        return f"{metric}: {other} is {'better' if found.mean > 0 else 'worse'} than {base} by {interval}."
    return f"{metric}: {other} differs from {base} by {interval}: that can be chance."


def moved_text(moved: Mapping[str, Sequence[Mapping[str, Any]]], base: str, other: str) -> str:
    """What `most_moved` found, for a terminal; a + marks what is relevant."""
    lines = []
    for what, rows in moved.items():
        lines.append(f"{what} most: {len(rows)}" if rows else f"no query {what}")
        for row in rows:
            lines += ["", f"query     {shorten(row['query'], 110)}  {row['base']:.4f} -> {row['other']:.4f}"]
            lines.append(f"rank      {row['base_rank'] or 'not found'} -> {row['other_rank'] or 'not found'}")
            for name, system in (("base", base), ("other", other)):
                mark = "+" if row[f"{name}_first_is_relevant"] else " "
                lines.append(f"{mark} {shorten(row[f'{name}_first'], 110)}  ({system})")
            if not (row["base_first_is_relevant"] or row["other_first_is_relevant"]):
                lines.append(f"+ {shorten(row['positive'], 110)}")
        lines.append("")
    return "\n".join(lines).rstrip()
