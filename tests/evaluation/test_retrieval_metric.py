"""The metrics as an `evaluate.Metric`, loaded from the folder without a network."""

import numpy as np
import pytest
import pytrec_eval
from helpers.rankings import as_arrays, random_case

from bge_accel.evaluation.metrics import metric_folder, retrieval_metrics

evaluate = pytest.importorskip("evaluate", reason="the evaluate package is not installed")


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(metric_folder(), cache_dir=str(tmp_path_factory.mktemp("metrics")))


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_library_and_trec_eval(metric, seed):
    qrels, run = random_case(np.random.default_rng(seed))
    gains, judged, ids = as_arrays(qrels, run)
    found = metric.compute(
        predictions=[[doc for doc in row if doc] for row in ids.tolist()],
        references=[[{"id": doc, "grade": grade} for doc, grade in qrels[query].items()] for query in run],
        cutoffs=[1, 10],
    )
    assert found == pytest.approx(retrieval_metrics(gains, judged, [1, 10]))
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    assert found["nDCG@10"] == pytest.approx(np.mean([of["ndcg_cut_10"] for of in theirs.values()]), abs=1e-6)


def test_in_batches_and_its_default_cutoffs(metric):
    metric.add_batch(predictions=[["a", "b"]], references=[[{"id": "b", "grade": 1}]])
    metric.add(prediction=["c"], reference=[{"id": "c", "grade": 2}, {"id": "a", "grade": 0}])
    found = metric.compute()
    assert found["MRR@10"] == 0.75 and found["Recall@100"] == 1 and found["P@1"] == 0.5
    assert {name.partition("@")[2] for name in found} == {"1", "10", "100"}


def test_mistakes(metric):
    with pytest.raises(ValueError, match=r"predictions\[0\] names a passage twice"):
        metric.compute(predictions=[["a", "a"]], references=[[{"id": "a", "grade": 1}]])
