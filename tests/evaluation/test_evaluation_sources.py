"""Where an evaluation's parts are found: files, BEIR folders, data sets that `datasets` loads, MS MARCO by default."""

import gzip
import json

import numpy as np
import pytest

from bge_accel.evaluation.retrieval import evaluate_retrieval
from bge_accel.evaluation.set_files import Locations, is_hub_name, locate
from bge_accel.evaluation.sets import read_evaluation_data

CORPUS = [{"_id": "a", "title": "Cats", "text": "they purr"}, {"_id": "b", "title": "", "text": "dogs bark"}]
QUERIES = [{"_id": "1", "text": "purr"}, {"_id": "2", "text": "bark"}, {"_id": "3", "text": "moo"}]
QRELS = {"test": "query-id\tcorpus-id\tscore\n1\ta\t2\n2\tb\t1\n", "dev": "query-id\tcorpus-id\tscore\n3\tb\t1\n"}


def write_beir(folder, ending=""):
    pack = gzip.compress if ending else bytes
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", CORPUS), ("queries", QUERIES)):
        content = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl{ending}").write_bytes(pack(content.encode()))
    for split, content in QRELS.items():
        (folder / "qrels" / f"{split}.tsv{ending}").write_bytes(pack(content.encode()))
    return str(folder)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_beir_folder_brings_everything(tmp_path, ending):
    folder = write_beir(tmp_path / "beir", ending)
    data = read_evaluation_data([folder], None, None)
    assert data.corpus.texts == ["Cats they purr", "dogs bark"] and data.corpus.ids == ["a", "b"]
    assert data.queries.ids == ["1", "2"] and data.judgements.grade.tolist() == [2, 1]
    assert read_evaluation_data([folder], None, None, "dev").queries.ids == ["3"]


def test_other_queries_or_judgements_for_a_beir_folder(tmp_path):
    folder = write_beir(tmp_path / "beir")
    (tmp_path / "q.jsonl").write_text('{"query": "woof", "positive": ["dogs bark"]}\n')
    data = read_evaluation_data([folder], [str(tmp_path / "q.jsonl")])
    assert data.counts["corpus"] == 2 and data.queries.texts == ["woof"]  # its queries are no passages
    (tmp_path / "qrels.tsv").write_text("2\ta\t1\n")
    data = read_evaluation_data([folder], None, str(tmp_path / "qrels.tsv"))
    assert data.queries.ids == ["2"] and data.judgements.row.tolist() == [0]


def test_splits_that_are_not_there(tmp_path):
    folder = write_beir(tmp_path / "beir")
    with pytest.raises(ValueError, match=r"qrels/train.tsv: choose one of dev, test with --split"):
        locate([folder], None, None, "train")
    (tmp_path / "bare").mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / "bare" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"no judgements qrels/test.tsv: name the judgements with --qrels"):
        locate([str(tmp_path / "bare")], None, None)
    for corpus, queries, qrels in (([folder], None, "q.tsv"), (["c.jsonl"], ["q.jsonl"], None)):
        with pytest.raises(ValueError, match="--split dev has no effect"):
            locate(corpus, queries, qrels, "dev")


def test_ms_marco_is_the_default():
    default = Locations(["namespace-Pt/msmarco-corpus"], ["namespace-Pt/msmarco::dev"], None)
    assert locate(None, None, None) == default
    assert locate(None, ["namespace-Pt/msmarco"], None) == default
    assert locate(None, ["some/queries"], None, "validation").queries == ["some/queries::validation"]
    assert locate(["namespace-Pt/msmarco-corpus"], None, None) == default
    with pytest.raises(ValueError, match=r"c.jsonl is searched, but there are no queries: .*; c.jsonl is not here"):
        locate(["c.jsonl"], None, None)
    assert locate(["c.jsonl"], ["some/queries:en:test"], None).queries == ["some/queries:en:test"]


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "folder").mkdir(parents=True)
    assert is_hub_name("BeIR/scifact") and is_hub_name("BeIR/scifact:corpus:corpus")
    for name in ("here/folder", "data/corpus.jsonl", "data/*", "/data/corpus", "corpus"):
        assert not is_hub_name(name), name


def write_dataset(folder, configs):
    """A data set as the hub has them: Parquet, and a card that says which files belong to which configuration."""
    from datasets import Dataset

    folder.mkdir(parents=True)
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            Dataset.from_list(rows).to_parquet(str(folder / f"{config}-{split}.parquet"))
            lines += [f"  - split: {split}", f"    path: {config}-{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


QRELS_ROWS = [{"query-id": "1", "corpus-id": "a", "score": 2}, {"query-id": "2", "corpus-id": "b", "score": 1}]


@pytest.mark.parametrize("judged_in", ["default", "another"])
def test_a_beir_set_as_the_hub_has_it(tmp_path, monkeypatch, judged_in):
    """Read through `datasets`, from a folder in place of the hub: both are the same to it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    configs = {"corpus": {"corpus": CORPUS}, "queries": {"queries": QUERIES}}
    if judged_in == "default":
        configs["default"] = {"test": QRELS_ROWS}
    else:
        write_dataset(tmp_path / "org" / "set-qrels", {"default": {"test": QRELS_ROWS}})
    write_dataset(tmp_path / "org" / "set", configs)
    from bge_accel.evaluation.set_files import _beir_on_hub

    found = _beir_on_hub("org/set", None, None)
    qrels = "org/set:default:test" if judged_in == "default" else "org/set-qrels::test"
    assert found == Locations(["org/set:corpus:corpus"], ["org/set:queries:queries"], qrels)
    data = read_evaluation_data(*found)
    assert data.corpus.texts == ["Cats they purr", "dogs bark"] and data.queries.ids == ["1", "2"]
    assert data.judgements.grade.tolist() == [2, 1]


def test_without_a_network_one_error_says_how_to_fetch(run_script, tmp_path):
    done = run_script("evaluate_retrieval.py", "--encoder", "no-such/model", "--k", 100, status=2)
    assert "no-such/model" not in done.stderr and "Traceback" not in done.stderr
    assert "namespace-Pt/msmarco-corpus: is no file or folder here, and cannot be had from the hub" in done.stderr
    assert "hf download namespace-Pt/msmarco-corpus --repo-type dataset --local-dir msmarco-corpus" in done.stderr
    assert "hf download namespace-Pt/msmarco --repo-type dataset --local-dir msmarco" in done.stderr


# ---- against arithmetic that shares nothing with it


def test_ndcg_is_that_of_plain_numpy(real_model, tmp_path):
    """A BEIR folder of real texts with grades: the scores of sentence-transformers, and nDCG@10 as a loop over them has it."""
    import torch

    from bge_accel import EmbeddingModel

    rng = np.random.default_rng(5)
    words = "gold silver king queen fox wolf tower forest bread river night stone ship storm child witch apple".split()
    texts = [" ".join(rng.choice(words, size=rng.integers(4, 12))) for _ in range(150)]
    queries = [" ".join(rng.choice(text.split(), size=3)) for text in texts[:40]]
    grades = {
        f"q{query}": {f"d{row}": int(rng.integers(0, 4)) for row in {query, *rng.integers(0, 150, size=6).tolist()}}
        for query in range(40)
    }
    for of in grades.values():
        of[next(iter(of))] = 3
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name, rows, letter in (("corpus", texts, "d"), ("queries", queries, "q")):
        lines = [json.dumps({"_id": f"{letter}{i}", "text": text}) + "\n" for i, text in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    lines = [f"{query}\t{doc}\t{grade}\n" for query, of in grades.items() for doc, grade in of.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    data = read_evaluation_data([str(folder)], None, None)

    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(real_model, device="cpu")
    their_scores = reference.encode(queries) @ reference.encode(texts).T
    for dtype, rounding in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        model = EmbeddingModel(real_model, dtype=dtype)
        scores = model.encode_queries(queries) @ model.encode_corpus(texts).T
        np.testing.assert_allclose(scores, their_scores, atol=rounding)
        total = 0.0
        for query in range(40):  # by our scores: neighbours that rounding exchanges are not to be told from an error
            of = grades[f"q{query}"]
            ranked = [of.get(f"d{row}", 0) for row in np.argsort(-scores[query], kind="stable")[:10]]
            ideal = sorted(of.values(), reverse=True)[:10]
            dcg, best = (sum(g / np.log2(i + 2) for i, g in enumerate(row)) for row in (ranked, ideal))
            total += dcg / best
        assert 0.1 < total / 40 < 0.9
        assert evaluate_retrieval(model, data, k=10).metrics["nDCG@10"] == pytest.approx(total / 40, abs=1e-4), dtype
