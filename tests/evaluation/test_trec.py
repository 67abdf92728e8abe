"""Runs in TREC's form: written, read, and measured as trec_eval measures them."""

import gzip

import numpy as np
import pytest
import pytrec_eval
from helpers.rankings import random_case

from bge_accel.evaluation.retrieval import evaluate_embeddings, evaluate_run
from bge_accel.evaluation.sets import read_evaluation_data
from bge_accel.evaluation.trec import judged_ids, read_run, run_lines
from bge_accel.files.faults import Faults


def read(path):
    faults = Faults()
    run = read_run(str(path), faults)
    faults.raise_if_any()
    return run


def write_qrels(path, qrels):
    path.write_text("".join(f"{q} 0 {doc} {grade}\n" for q, of in qrels.items() for doc, grade in of.items()))
    return str(path)


@pytest.mark.parametrize("seed", range(60))
def test_any_run_is_scored_as_trec_eval_does(tmp_path, seed):
    """Ties, grades, judged queries without a ranking (which score 0, as with -c), unjudged queries, short rankings."""
    rng = np.random.default_rng(seed)
    qrels, run = random_case(rng)
    qrels["unranked"] = {"d1": 1}
    run["unjudged"] = {"d1": 1.0}
    lines = [
        f"{query} Q0 {doc} {rank} {score!r} a\n"  # the ranks are wrong, and not looked at
        for query, ranking in run.items()
        for rank, (doc, score) in enumerate(ranking.items())
    ]
    (tmp_path / "a.run").write_text("".join(rng.permutation(lines)))
    found = read(tmp_path / "a.run")
    assert found == run
    evaluation = evaluate_run(
        found, judged_ids(write_qrels(tmp_path / "qrels", qrels), [found]), cutoffs=[1, 5, 10, 100]
    )
    names = {"ndcg_cut": "nDCG", "map_cut": "MAP", "recall": "Recall", "P": "P"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {f"{name}.1,5,10,100" for name in names} | {"recip_rank"})
    scores = theirs.evaluate(run)
    assert "unranked" not in scores and len(evaluation.per_query["P@1"]) == len(qrels)
    for name, ours in names.items():
        for cutoff in (1, 5, 10, 100):
            expected = sum(of[f"{name}_{cutoff}"] for of in scores.values()) / len(qrels)
            assert evaluation.metrics[f"{ours}@{cutoff}"] == pytest.approx(expected, abs=1e-6)
    expected = sum(of["recip_rank"] for of in scores.values()) / len(qrels)
    assert evaluation.metrics["MRR@100"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("letter", ["d", "d with spaces "])
def test_what_is_written_is_measured_alike(tmp_path, letter):
    rng = np.random.default_rng(1)
    (tmp_path / "c.jsonl").write_text("".join(f'{{"id": "{letter}{i}", "text": "text {i}"}}\n' for i in range(50)))
    (tmp_path / "q.jsonl").write_text("".join(f'{{"id": "q{i}", "text": "query {i}"}}\n' for i in range(9)))
    (tmp_path / "qrels.tsv").write_text("".join(f"q{i}\t{letter}{i * j}\t1\n" for i in range(9) for j in (1, 5)))
    data = read_evaluation_data([str(tmp_path / "c.jsonl")], [str(tmp_path / "q.jsonl")], str(tmp_path / "qrels.tsv"))
    corpus_emb = rng.integers(-2, 3, (50, 4)).astype(np.float32) / 3  # with ties
    evaluation = evaluate_embeddings(rng.integers(-2, 3, (9, 4)).astype(np.float32), corpus_emb, data, k=20)
    content = "".join(run_lines(data, evaluation, "a name"))
    (tmp_path / "a.run.gz").write_bytes(gzip.compress(content.encode()))
    assert content.splitlines()[0].split("\t" if " " in letter else " ")[5] == "a_name"
    again = evaluate_run(read(tmp_path / "a.run.gz"), data, k=20)
    np.testing.assert_array_equal(again.scores, evaluation.scores)
    np.testing.assert_array_equal(again.indices, evaluation.indices)
    assert again.metrics == evaluation.metrics
    by_ids = evaluate_run(
        read(tmp_path / "a.run.gz"), judged_ids(str(tmp_path / "qrels.tsv"), [read(tmp_path / "a.run.gz")]), k=20
    )
    assert by_ids.metrics == evaluation.metrics


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("q Q0 d 1 0.5\n", ':1: "q Q0 d 1 0.5": expected six fields'),
        ("q Q0 d 1 0.5 a\nq Q0 e 2 high a\n", ':2: the score is "high": it has to be a number'),
        ("q Q0 d 1 nan a\n", ':1: the score is "nan": it has to be a number'),
        ("q Q0 d 1 0.5 a\nq Q0 d 2 0.4 a\n", ':2: passage "d" stands in the ranking of query "q" before'),
        ("\n", ": the file holds no rankings"),
    ],
)
def test_faults(tmp_path, content, expected):
    (tmp_path / "a.run").write_text(content)
    with pytest.raises(ValueError, match="fault") as caught:
        read(tmp_path / "a.run")
    assert f"{tmp_path / 'a.run'}{expected}" in str(caught.value)


def test_a_run_of_another_corpus_or_other_queries(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n')
    (tmp_path / "q.jsonl").write_text('{"query": "q", "positive": ["one"]}\n')
    data = read_evaluation_data([str(tmp_path / "c.jsonl")], [str(tmp_path / "q.jsonl")])
    assert evaluate_run({"0": {"b": 2.0, "a": 1.0}}, data, k=5).metrics["MRR@5"] == 0.5
    with pytest.raises(ValueError, match=r'x.run: passage "z" of query "0" is not in the corpus, which has.* "a"'):
        evaluate_run({"0": {"z": 1.0}}, data, k=5, name="x.run")
    with pytest.raises(ValueError, match=r'x.run ranks none of the judged queries: it has, for example, "q1", .* "0"'):
        evaluate_run({"q1": {"a": 1.0}}, data, k=5, name="x.run")
