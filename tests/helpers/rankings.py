"""Random judgements and runs, with all that makes metrics differ."""

import numpy as np

from bge_accel.evaluation.metrics import trec_order


def random_case(rng):
    """Judgements and a run in pytrec_eval's form: ties, negative grades, unjudged passages, short rankings."""
    num_passages = int(rng.integers(1, 40))
    ids = [f"d{number}" for number in rng.permutation(200)[:num_passages]]
    lowest, highest = [(0, 0), (0, 1), (-2, 3), (-2, 0), (1, 4)][rng.integers(5)]
    qrels, run = {}, {}
    for query in range(int(rng.integers(1, 6))):
        judged = rng.choice([*ids, "absent1", "absent2"], size=int(rng.integers(1, num_passages + 3)), replace=False)
        grades = rng.integers(lowest, highest + 1, size=len(judged))
        grades[0] = max(grades[0], 0)  # trec_eval writes beyond its memory where every grade is negative
        qrels[f"q{query}"] = {str(doc): int(grade) for doc, grade in zip(judged, grades, strict=True)}
        retrieved = rng.permutation(ids)[: int(rng.integers(1, num_passages + 1))]
        scores = rng.integers(0, rng.integers(1, 12), size=len(retrieved)) / 7 + 0.5
        scores += rng.choice([0, 1e-10], size=len(scores))  # a difference that float32 does not have
        run[f"q{query}"] = {str(doc): float(score) for doc, score in zip(retrieved, scores, strict=True)}
    return qrels, run


def as_arrays(qrels, run):
    """Gains (queries, k) in trec_eval's order and judged grades, by way of padded arrays."""
    k = max(map(len, run.values()))
    positives = [sorted((grade for grade in qrels[query].values() if grade > 0), reverse=True) for query in run]
    judged = np.zeros((len(run), max(map(len, positives))), dtype=np.int64)
    scores, ids = np.full((len(run), k), -np.inf), np.full((len(run), k), "", dtype=object)
    gains = np.zeros((len(run), k), dtype=np.int64)
    for row, (query, ranking) in enumerate(run.items()):
        judged[row, : len(positives[row])] = positives[row]
        scores[row, : len(ranking)] = list(ranking.values())
        ids[row, : len(ranking)] = list(ranking)
        gains[row, : len(ranking)] = [qrels[query].get(doc, 0) for doc in ranking]
    order = trec_order(scores, ids)
    return np.take_along_axis(gains, order, axis=1), judged, np.take_along_axis(ids, order, axis=1)
