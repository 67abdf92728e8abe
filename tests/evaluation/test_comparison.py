"""Paired comparisons: intervals, p-values, and the queries that gained and lost."""

import itertools
import json

import numpy as np
import pytest
from helpers.repo import REPO
from helpers.warm_start import Job

from bge_accel.evaluation.comparison import choose_metric, paired_differences, verdict

SCRIPT = REPO / "scripts" / "evaluate_retrieval.py"


def test_a_system_against_itself():
    scores = {"nDCG@10": np.random.default_rng(0).random(50)}
    found = paired_differences(scores, scores)["nDCG@10"]
    assert (found.mean, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert (found.better, found.worse, found.equal) == (0, 0, 50)
    assert "no difference" in verdict(found, "nDCG@10", "a", "a")


def test_interval_and_p_value_of_known_distributions():
    """Against the exact values: all resamplings of 5 queries, and all signs."""
    base, other = np.zeros(5), np.array([0.5, 0.25, 0.125, -0.25, 0.75])
    found = paired_differences({"m": base}, {"m": other}, num_samples=40_000)["m"]
    resampled = np.array([np.mean(drawn) for drawn in itertools.product(other, repeat=5)])
    assert found.low == pytest.approx(np.quantile(resampled, 0.025), abs=0.02)
    assert found.high == pytest.approx(np.quantile(resampled, 0.975), abs=0.02)
    signed = np.array([np.mean(other * signs) for signs in itertools.product([-1, 1], repeat=5)])
    assert found.p_value == pytest.approx(np.mean(np.abs(signed) >= abs(other.mean()) - 1e-12), abs=0.01)
    assert (found.better, found.worse, found.equal) == (4, 1, 0)


def test_chance_is_called_a_difference_as_often_as_promised():
    """Of 400 pairs of systems that are alike, 5 % are called different, and 5 % of the intervals miss the truth."""
    rng = np.random.default_rng(3)
    called = missed = 0
    for _ in range(400):
        base = {"m": rng.integers(0, 2, 80).astype(float)}
        other = {"m": rng.integers(0, 2, 80).astype(float)}
        found = paired_differences(base, other, num_samples=400)["m"]
        called += found.p_value <= 0.05
        missed += not found.low <= 0 <= found.high
    assert 6 <= called <= 34 and 6 <= missed <= 40


def test_the_same_seed_gives_the_same():
    rng = np.random.default_rng(0)
    base, other = ({"a": rng.random(200), "b": rng.random(200)} for _ in range(2))
    found = paired_differences(base, other, num_samples=500)
    assert paired_differences(base, other, num_samples=500) == found
    assert paired_differences(base, other, num_samples=500, seed=1) != found
    swapped = paired_differences(other, base, num_samples=500)
    assert swapped["a"].mean == -found["a"].mean and swapped["a"].better == found["a"].worse


def test_choice_of_the_metric():
    assert choose_metric(None, [1, 5, 10, 100]) == "nDCG@10" and choose_metric(None, [1, 5]) == "nDCG@5"
    assert choose_metric(None, [20, 100]) == "nDCG@20" and choose_metric("mrr@5", [1, 5]) == "MRR@5"
    with pytest.raises(ValueError, match="is not measured; choose one of"):
        choose_metric("nDCG@7", [5])


@pytest.fixture
def runs(tmp_path):
    """12 queries, one relevant passage each; b finds those of 0 to 3 that a misses, and loses those of 4 and 5."""
    (tmp_path / "qrels.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(12)))
    for name, first in (("a", range(4, 9)), ("b", (0, 1, 2, 3, 6, 7, 8))):
        lines = []
        for i in range(12):
            docs = [f"d{i}", "x"] if i in first else ["x", "y"]
            lines += [f"q{i} Q0 {doc} {rank} {1 - rank / 10} {name}\n" for rank, doc in enumerate(docs)]
        (tmp_path / f"{name}.run").write_text("".join(lines))
    return tmp_path


def evaluate(folder, *args, status=0):
    return Job(*args, cwd=folder, script=SCRIPT).ends(status)


def test_two_runs(runs):
    said = evaluate(runs, "--compare", "a.run", "b.run", "--qrels", "qrels.tsv", "--k", 10)
    result = json.loads((runs / "metrics.json").read_text())
    assert result["base"] == "a.run" and result["compare_metric"] == "nDCG@10"
    assert result["systems"]["a.run"]["metrics"]["MRR@10"] == pytest.approx(5 / 12)
    compared = result["comparisons"]["b.run"]
    found = compared["metrics"]["nDCG@10"]
    assert found["difference"] == pytest.approx(2 / 12) and found["low"] < 0 < found["high"] and found["p_value"] > 0.3
    assert (found["better"], found["worse"], found["equal"]) == (4, 2, 6)
    assert [row["id"] for row in compared["gained"]] == ["q0", "q1", "q2", "q3"]
    assert {row["id"] for row in compared["lost"]} == {"q4", "q5"}
    assert compared["gained"][0]["base_first"] == "x" and compared["gained"][0]["other_first"] == "d0"
    assert compared["gained"][0]["base_rank"] is None and compared["gained"][0]["other_rank"] == 1
    assert "that can be chance" in said and "gained most: 4" in said and "95 % interval" in said
    evaluate(runs, "--compare", "a.run", "b.run", "--qrels", "qrels.tsv", "--k", 10, "--output_file", "2.json")
    assert json.loads((runs / "2.json").read_text())["comparisons"] == result["comparisons"]


def test_a_run_against_itself(runs):
    said = evaluate(runs, "--compare", "a.run", "a.run", "--qrels", "qrels.tsv", "--k", 10)
    (found,) = json.loads((runs / "metrics.json").read_text())["comparisons"].values()
    assert not found["gained"] and not found["lost"]
    for metric in found["metrics"].values():
        assert (metric["low"], metric["high"], metric["p_value"], metric["equal"]) == (0, 0, 1, 12)
    assert "nDCG@10: a.run (2) and a.run score the same on every query: no difference" in said


def test_one_run_and_queries_that_it_does_not_rank(runs):
    lines = (runs / "a.run").read_text().splitlines(keepends=True)
    (runs / "a.run").write_text("".join(line for line in lines if not line.startswith("q4 ")))
    said = evaluate(runs, "--compare", "a.run", "--qrels", "qrels.tsv", "--k", 10)
    result = json.loads((runs / "metrics.json").read_text())
    assert result["metrics"]["MRR@10"] == pytest.approx(4 / 12) and result["queries_without_ranking"] == 1
    assert "a.run has no ranking for 1 of 12 judged queries" in said


def test_encoders_and_a_run_with_their_passages(tmp_path, tiny_model, real_model):
    """Texts are shown, saved runs score as the encoders did, and a model does not differ from itself."""
    texts = [f"the {animal} eats {food}" for animal in ("fox", "cow", "owl") for food in ("grass", "mice", "grapes")]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [{"query": f"who eats {text.split()[-1]}, a {text.split()[1]}", "positive": [text]} for text in texts]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--corpus_data", "c.jsonl", "--query_data", "q.jsonl", "--k", 5]
    evaluate(
        tmp_path, "--encoder", tiny_model, real_model, *data, "--save_run", "tiny.run", "real.run",
        "--save_embedding", "--save_path", "emb-tiny", "emb-real", "--report", "page.html",
    )  # fmt: skip
    first = json.loads((tmp_path / "metrics.json").read_text())
    tiny, real = first["systems"]
    found = first["comparisons"][real]
    assert first["systems"][real]["metrics"]["MRR@1"] == 1 and found["metrics"]["MRR@5"]["difference"] > 0.05
    assert found["gained"][0]["other_first"] in texts and found["gained"][0]["query"].startswith("who eats")
    assert found["gained"][0]["query"] in (tmp_path / "page.html").read_text()

    said = evaluate(
        tmp_path, "--compare", "real.run", "tiny.run", "--encoder", real_model, *data, "--load_embedding",
        "--save_path", "emb-real", "--output_file", "again.json",
    )  # fmt: skip
    again = json.loads((tmp_path / "again.json").read_text())
    assert list(again["systems"]) == ["real.run", "tiny.run", real]
    for run, encoder in (("real.run", real), ("tiny.run", tiny)):
        assert again["systems"][run]["metrics"] == first["systems"][encoder]["metrics"]
    itself = again["comparisons"][real]["metrics"]["nDCG@5"]
    assert (itself["low"], itself["high"], itself["p_value"], itself["equal"]) == (0, 0, 1, 9)
    assert "score the same on every query: no difference" in said


def test_mistakes(runs):
    for args, expected in [
        ([], "there is nothing to measure: name models with --encoder, or runs with --compare"),
        (["--compare", "a.run", "b.run"], "give --qrels, or --corpus_data and --query_data"),
        (["--compare", "none.run", "--qrels", "qrels.tsv"], "none.run: cannot be read"),
        (["--compare", "a.run", "b.run", "--qrels", "qrels.tsv", "--save_ranking", "r"], "--save_ranking is of one"),
        (["--compare", "a.run", "--qrels", "qrels.tsv", "--split", "dev"], "--split dev has no effect"),
        (["--compare", "a.run", "--qrels", "qrels.tsv", "--compare_metric", "mrr@10"], "no effect on one system"),
        (["--compare", "a.run", "--qrels", "qrels.tsv", "--save_run", "r"], "name one for each of 0 encoders"),
    ]:
        said = evaluate(runs, *args, status=2)
        assert expected in said and "Traceback" not in said
