"""The metrics against trec_eval itself, on random rankings."""

import numpy as np
import pytest
import pytrec_eval
from helpers.rankings import as_arrays, random_case

from bge_accel.evaluation.metrics import per_query_metrics, retrieval_metrics, trec_order

CUTOFFS = [1, 2, 3, 5, 10, 30]
TREC_NAMES = {"nDCG": "ndcg_cut", "MAP": "map_cut", "Recall": "recall", "P": "P"}


def cut(run, ids, cutoff):
    return {query: {doc: run[query][doc] for doc in ids[row, :cutoff] if doc} for row, query in enumerate(run)}


@pytest.mark.parametrize("seed", range(400))
def test_agrees_with_trec_eval(seed):
    qrels, run = random_case(np.random.default_rng(seed))
    gains, judged, ids = as_arrays(qrels, run)
    ours = per_query_metrics(gains, judged, CUTOFFS)
    measures = {f"{name}.{','.join(map(str, CUTOFFS))}" for name in TREC_NAMES.values()}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures | {"num_rel"}).evaluate(run)
    for cutoff in CUTOFFS:
        for name, trec_name in TREC_NAMES.items():
            expected = [theirs[query][f"{trec_name}_{cutoff}"] for query in run]
            np.testing.assert_allclose(ours[f"{name}@{cutoff}"], expected, atol=1e-6, rtol=0)
        reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(cut(run, ids, cutoff))
        np.testing.assert_allclose(ours[f"MRR@{cutoff}"], [reciprocal[query]["recip_rank"] for query in run], atol=1e-6)
        holdable = [max(1, min(cutoff, theirs[query]["num_rel"])) for query in run]
        hits = np.array([theirs[query][f"P_{cutoff}"] for query in run]) * cutoff
        np.testing.assert_allclose(ours[f"Capped_Recall@{cutoff}"], hits / holdable, atol=1e-6)
    means = retrieval_metrics(gains, judged, CUTOFFS)
    assert means == {name: pytest.approx(values.mean()) for name, values in ours.items()}


def flag_embedding_recall(preds, labels, cutoffs):
    """Recall as FlagEmbedding's evaluation of MS MARCO computes it."""
    recalls = np.zeros(len(cutoffs))
    for pred, label in zip(preds, labels, strict=True):
        for k, cutoff in enumerate(cutoffs):
            recall = np.intersect1d(label, pred[:cutoff])
            recalls[k] += len(recall) / max(min(cutoff, len(label)), 1)
    return recalls / len(preds)


@pytest.mark.parametrize("seed", range(40))
def test_capped_recall_is_that_of_flag_embedding(seed):
    qrels, run = random_case(np.random.default_rng(seed))
    gains, judged, ids = as_arrays(qrels, run)
    labels = [[doc for doc, grade in qrels[query].items() if grade > 0] for query in run]
    preds = [[doc for doc in row if doc] for row in ids.tolist()]
    ours = retrieval_metrics(gains, judged, CUTOFFS)
    expected = flag_embedding_recall(preds, labels, CUTOFFS)
    assert [ours[f"Capped_Recall@{cutoff}"] for cutoff in CUTOFFS] == pytest.approx(expected.tolist(), abs=1e-12)


def test_by_hand():
    gains = np.array([[0, 2, 0, 1], [0, 0, 0, 0]])
    judged = np.array([[3, 2, 1], [1, 0, 0]])
    metrics = retrieval_metrics(gains, judged, [1, 2, 4])
    assert metrics["MRR@1"] == 0
    assert metrics["MRR@2"] == metrics["MRR@4"] == pytest.approx(0.5 / 2)
    assert metrics["Recall@4"] == pytest.approx(2 / 3 / 2)
    assert metrics["Capped_Recall@2"] == pytest.approx(1 / 2 / 2)
    assert metrics["P@4"] == pytest.approx(2 / 4 / 2)
    assert metrics["MAP@4"] == pytest.approx((1 / 2 + 2 / 4) / 3 / 2)
    ideal = 3 + 2 / np.log2(3) + 1 / 2
    assert metrics["nDCG@4"] == pytest.approx((2 / np.log2(3) + 1 / np.log2(5)) / ideal / 2)


def test_names_and_their_order():
    assert list(retrieval_metrics(np.ones((1, 1)), np.ones((1, 1)), [1, 5])) == [
        f"{name}@{cutoff}" for name in ("MRR", "nDCG", "Recall", "Capped_Recall", "MAP", "P") for cutoff in (1, 5)
    ]


def test_no_query_is_an_error():
    with pytest.raises(ValueError, match="no judged queries"):
        retrieval_metrics(np.zeros((0, 3)), np.zeros((0, 1)), [1])


def test_nothing_retrieved_and_nothing_relevant():
    metrics = retrieval_metrics(np.zeros((2, 0)), np.array([[1], [1]]), [1, 10])
    assert set(metrics.values()) == {0.0}
    assert set(retrieval_metrics(np.zeros((2, 4)), np.zeros((2, 0)), [1, 10]).values()) == {0.0}


def test_ties_by_id_descending_as_strings():
    scores = np.array([[1.0, 1.0, 1.0, 2.0], [0.3, 0.3 + 1e-12, 0.2, 0.1]])
    ids = np.array([["d2", "d10", "é", "a"], ["a", "b", "c", "d"]])
    ordered = np.take_along_axis(ids, trec_order(scores, ids), axis=1)
    assert ordered.tolist() == [["a", "é", "d2", "d10"], ["b", "a", "c", "d"]]
