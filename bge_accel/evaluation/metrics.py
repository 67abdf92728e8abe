"""Retrieval metrics, from the judged grades of ranked passages; they agree with trec_eval."""

import os
from collections.abc import Sequence

import numpy as np


def per_query_metrics(gains: np.ndarray, judged: np.ndarray, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """MRR, nDCG, Recall, Capped_Recall, MAP and P of every query at every cut-off, under names like `nDCG@10`.

    As in trec_eval, a passage is relevant if its grade is at least 1, nDCG's gain is the grade itself, negative grades
    gain nothing, and a query whose judgements name nothing relevant scores 0. `Capped_Recall@k` divides the hits by
    min(k, positives): the share of what k places can hold (BEIR's R_cap).

    Args:
        gains: (queries, k) judged grade of each retrieved passage in rank order; 0 for unjudged and for padding.
        judged: (queries, most positives) all positive grades of each query, descending, padded with 0.
        cutoffs: may exceed k, what is not retrieved is not relevant.

    Returns:
        Arrays (queries,), float64.
    """
    assert len(gains) == len(judged) and all(cutoff >= 1 for cutoff in cutoffs)
    gains = np.maximum(gains, 0).astype(np.float64)
    judged = np.maximum(judged, 0).astype(np.float64)
    relevant = gains > 0
    num_positives = (judged > 0).sum(axis=1)
    ranks = np.arange(1, max(gains.shape[1], judged.shape[1]) + 1)
    discounts = 1 / np.log2(ranks + 1)
    # Precision at every rank that holds something relevant, 0 elsewhere.
    precision = relevant * relevant.cumsum(axis=1) / ranks[: gains.shape[1]]

    columns = []
    for cutoff in cutoffs:
        top = relevant[:, :cutoff]
        hits = top.sum(axis=1)
        dcg = gains[:, :cutoff] @ discounts[: top.shape[1]]
        ideal = judged[:, :cutoff]
        ideal_dcg = ideal @ discounts[: ideal.shape[1]]
        columns.append(
            {
                "MRR": (top / ranks[: top.shape[1]]).max(axis=1, initial=0),
                "nDCG": dcg / np.where(ideal_dcg > 0, ideal_dcg, 1),
                "Recall": hits / np.maximum(num_positives, 1),
                "Capped_Recall": hits / np.maximum(np.minimum(num_positives, cutoff), 1),
                "MAP": precision[:, :cutoff].sum(axis=1) / np.maximum(num_positives, 1),
                "P": hits / cutoff,
            }
        )
    names = columns[0] if columns else {}
    return {f"{name}@{cutoff}": column[name] for name in names for cutoff, column in zip(cutoffs, columns, strict=True)}


def retrieval_metrics(gains: np.ndarray, judged: np.ndarray, cutoffs: Sequence[int]) -> dict[str, float]:
    """Means of `per_query_metrics` over the queries given.

    A query without any judgement says nothing about the ranking: leave its row out.

    Raises:
        ValueError: there is no query.
    """
    if len(gains) == 0:
        raise ValueError("no judged queries: there is nothing to measure")
    return {name: float(values.mean()) for name, values in per_query_metrics(gains, judged, cutoffs).items()}


def trec_order(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The order in which trec_eval reads a ranking: by score descending, equal scores by id descending, as strings.

    Args:
        scores: (queries, k); compared in float32, as trec_eval does.
        ids: (queries, k) strings, or numbers that sort as the id strings do.

    Returns:
        (queries, k) column numbers, for `np.take_along_axis`.
    """
    _, id_ranks = np.unique(ids, return_inverse=True)
    return np.lexsort((-id_ranks.reshape(scores.shape), -scores.astype(np.float32)), axis=-1)


def metric_folder() -> str:
    """The folder for `evaluate.load`, whatever the working directory: these metrics as an `evaluate.Metric`."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "retrieval_metric")
