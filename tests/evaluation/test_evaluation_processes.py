"""Several processes measure what one does."""

import json

import numpy as np
import pytest
from helpers.models import build_tiny_model
from helpers.repo import REPO
from helpers.warm_start import Job

from bge_accel.encoding.store import EmbeddingStore
from bge_accel.evaluation.retrieval import _recall_over_processes
from bge_accel.evaluation.search import index_recall

SCRIPT = REPO / "scripts" / "evaluate_retrieval.py"
WORDS = "the a of to in and is what who how did why king princess story return list string file value".split()


@pytest.fixture
def beir(tmp_path):
    """A set in BEIR's layout, of 101 passages, no two alike, and 23 queries with grades."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    texts = [" ".join(WORDS[(i * step) % len(WORDS)] for step in range(1, 4 + i % 5)) + f" {i}" for i in range(101)]
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": f"{texts[i * 4]} {WORDS[i % 7]}"} for i in range(23)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore\n"]
    lines += [f"q{i}\td{i * 4 + extra}\t{2 - extra}\n" for i in range(23) for extra in range(2)]
    (folder / "qrels" / "test.tsv").write_text("".join(lines))
    return folder


def evaluate(tmp_path, model, name, *args, processes=1, status=0):
    said = Job(
        *("--encoder", model, "--corpus_data", "beir", "--k", 40, "--output_file", f"{name}.json"),
        *("--save_run", f"{name}.run", *args),
        cwd=tmp_path,
        script=SCRIPT,
        processes=processes,
    ).ends(status)
    if status:
        return said
    result = json.loads((tmp_path / f"{name}.json").read_text())
    lines = [line.split() for line in (tmp_path / f"{name}.run").read_text().splitlines()]
    return result, {(query, passage): float(score) for query, _, passage, _, score, _ in lines}


def assert_same(found, expected):
    """The same metrics and counts, and the same scores of the same passages but where they all but tie at the end."""
    (result, scores), (expected_result, expected_scores) = found, expected
    assert result["metrics"] == pytest.approx(expected_result["metrics"], abs=1e-5)
    assert result["counts"] == expected_result["counts"]
    for pair in scores.keys() & expected_scores.keys():
        assert scores[pair] == pytest.approx(expected_scores[pair], abs=1e-5)
    assert len(scores) == len(expected_scores) and len(scores.keys() - expected_scores.keys()) <= 3
    ours, theirs = result["score_histogram"], expected_result["score_histogram"]
    assert ours["edges"] == pytest.approx(theirs["edges"], abs=1e-5)
    assert [sum(of["positives"]) for of in (ours, theirs)] == [46, 46]


@pytest.mark.parametrize("processes", [2, 4])
def test_same_as_one_process(tmp_path, real_model, beir, processes):
    alone = evaluate(tmp_path, real_model, "alone")
    assert 0.1 < alone[0]["metrics"]["nDCG@10"] < 1
    assert_same(evaluate(tmp_path, real_model, "together", processes=processes), alone)
    together = json.loads((tmp_path / "together.json").read_text())
    assert together["model"]["processes"] == processes and together["counts"]["encoded_texts"] == 124


def test_they_share_a_store(tmp_path, real_model, beir):
    alone = evaluate(tmp_path, real_model, "alone", "--save_embedding", "--save_path", "store-1")
    saved = evaluate(tmp_path, real_model, "saved", "--save_embedding", "--save_path", "store-2", processes=2)
    assert_same(saved, alone)
    assert len(EmbeddingStore(str(tmp_path / "store-2"))) == 101
    for store, processes in (("store-1", 2), ("store-2", 1)):
        loaded = evaluate(tmp_path, real_model, "loaded", "--load_embedding", "--save_path", store, processes=processes)
        assert loaded[0]["counts"]["encoded_texts"] == 23
        loaded[0]["counts"] = alone[0]["counts"]
        assert_same(loaded, alone)
    said = evaluate(
        tmp_path, real_model, "no", "--save_embedding", "--save_path", "store-2", "--max_passage_length", 7,
        processes=2, status=2,
    )  # fmt: skip
    assert said.count("the maximum length in tokens: 128 in the store, 7 here") == 1


def test_an_approximate_index_of_each_part(tmp_path, real_model, beir):
    pytest.importorskip("faiss")
    result, _ = evaluate(tmp_path, real_model, "hnsw", "--index_factory", "HNSW8", processes=2)
    assert 0.5 < result["index_recall"]["recall@10"] <= 1 and result["index_recall"]["queries"] == 23
    halves, _ = evaluate(tmp_path, real_model, "sq", "--index_factory", "SQfp16", processes=2)
    assert halves["index_recall"]["recall@10"] > 0.95


def test_its_recall_is_that_of_one_process():
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    corpus_emb, q_emb = rng.standard_normal((500, 16), np.float32), rng.standard_normal((30, 16), np.float32)
    corpus_emb[250:] = corpus_emb[:250]  # every passage twice: of the tied, either counts
    index = faiss.index_factory(16, "HNSW4", faiss.METRIC_INNER_PRODUCT)
    index.add(corpus_emb)
    expected = index_recall(index, corpus_emb, q_emb, [1, 10, 100])
    assert _recall_over_processes(index, corpus_emb, q_emb, [1, 10, 100], 0) == pytest.approx(expected)
    assert 0.2 < expected["recall@100"] < 1


def test_a_fault_in_one_share_is_told(tmp_path, beir):
    """A model that overflows on one passage, which only the second process meets."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = build_tiny_model(tmp_path / "model")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("#")] = torch.nan
    model.save_pretrained(folder)
    with open(beir / "corpus.jsonl", "a") as file:
        file.write('{"_id": "bad", "text": "# story"}\n')
    args = ["--encoder", folder, "--corpus_data", "beir", "--k", 5, "--output_file", "no.json"]
    job = Job(*args, cwd=tmp_path, script=SCRIPT, processes=2)
    job.wait_until(lambda: not all(process.is_alive() for process in job.processes))
    # The other may tell of the lost connection before it is ended, as torchrun ends it.
    assert job.text.count("(counted from 0) is not finite") == 1
    assert job.processes[1].exitcode == 2 and not (tmp_path / "no.json").exists()


def test_one_command_starts_them(run_script, tmp_path, tiny_model, beir):
    """More processes than passages, started by the script itself."""
    (beir / "corpus.jsonl").write_text('{"_id": "d0", "text": "king"}\n')
    alone, _ = evaluate(tmp_path, tiny_model, "alone")
    args = ["--encoder", tiny_model, "--corpus_data", "beir", "--k", 40, "--num_processes", 2]
    done = run_script("evaluate_retrieval.py", *args, cold=True)
    together = json.loads((tmp_path / "metrics.json").read_text())
    assert together["model"]["processes"] == 2 and done.stdout.count("judged queries") == 1
    assert together["metrics"] == pytest.approx(alone["metrics"], abs=1e-5)
