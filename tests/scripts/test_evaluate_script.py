"""scripts/evaluate_retrieval.py as a user runs it."""

import ast
import json

import pytest
import torch
from helpers.repo import REPO
from helpers.warm_start import Job

from bge_accel.evaluation.tables import moved_into_top
from bge_accel.models.encoder import load_encoder, save_encoder

SCRIPT = "evaluate_retrieval.py"
CORPUS = [
    {"content": "a king and a princess in a story"},
    {"content": "return the list of string"},
    {"content": "what file is the value in"},
]
QUERIES = [
    {"query": "the story of a king", "positive": ["a king and a princess in a story"]},
    {"query": "return list", "positive": ["return the list of string", "not in the corpus"]},
]


@pytest.fixture
def toy(tmp_path):
    """FlagEmbedding's toy files, under their names, in the folder that scripts run in."""
    for name, rows in [("toy_corpus.json", CORPUS), ("toy_query.json", QUERIES)]:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--corpus_data", "./toy_corpus.json", "--query_data", "./toy_query.json"]


def test_the_documented_line_of_flagembedding(run_script, tiny_model, toy, tmp_path):
    long = ("--max_query_length", 128)  # the tiny tokenizer cuts the instruction into letters
    done = run_script(SCRIPT, "--encoder", tiny_model, "--fp16", "--add_instruction", "--k", 100, *long, *toy)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert ["fp16 needs a GPU" in line for line in warnings] == [False] + [True] * (not torch.cuda.is_available())
    assert "1 of 3 judged passages are not in the corpus" in warnings[0]
    assert "2 judged queries of 2, 3 passages, 3 positives (1 not in the corpus)" in done.stdout
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["metrics"]["Recall@100"] == pytest.approx(0.75)
    assert set(result) == {
        "metrics", "counts", "seconds", "model", "config", "versions", "samples", "score_histogram",
    }  # fmt: skip
    documented = ast.literal_eval(next(line for line in done.stdout.splitlines() if line.startswith("{'MRR@1'")))
    assert list(documented) == ["MRR@1", "MRR@10", "MRR@100", "Recall@1", "Recall@10", "Recall@100"]
    assert documented == pytest.approx({name: result["metrics"][name] for name in documented}, abs=1e-6)
    assert result["counts"]["missing_positives"] == 1
    assert result["model"]["query_instruction"] == "Represent this sentence for searching relevant passages: "
    assert result["config"]["k"] == 100 and result["config"]["encoder"] == [tiny_model]
    assert result["versions"]["torch"] and all(seconds >= 0 for seconds in result["seconds"].values())
    header, *rows = done.stdout.splitlines()[-10:-3]
    assert header.split() == ["@1", "@3", "@5", "@10", "@100"]
    assert [line.split()[0] for line in rows] == ["MRR", "nDCG", "Recall", "Capped_Recall", "MAP", "P"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "toy_corpus.json", "toy_query.json"]


def test_judgement_file_rankings_and_samples(run_script, tiny_model, tmp_path):
    corpus = [{"_id": f"c{i}", "text": row["content"], "title": "a title"} for i, row in enumerate(CORPUS)]
    queries = [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(QUERIES)] + [{"_id": "q9", "text": "who"}]
    for name, rows in [("corpus.jsonl", corpus), ("queries.jsonl", queries)]:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tc0\t2\nq1\tc1\t1\n")
    args = [
        "--encoder", tiny_model, "--corpus_data", "corpus.jsonl", "--query_data", "queries.jsonl", "--qrels", "test.tsv",
        "--k", 2, "--cutoffs", 1, 2, "--output_file", "deep/er/scores.json", "--save_ranking", "deep/ranking.jsonl",
        "--show", 10**12, "--max_passage_length", 4000, "--pooling_method", "mean", "--query_instruction_for_retrieval", "",
    ]  # fmt: skip
    done = run_script(SCRIPT, *args)
    result = json.loads((tmp_path / "deep/er/scores.json").read_text())
    assert list(result["metrics"])[:2] == ["MRR@1", "MRR@2"] and result["model"]["pooling"] == "mean"
    assert result["counts"]["unjudged_queries"] == 1
    assert "--max_passage_length is 4000, but the model takes 128 tokens" in done.stderr
    assert done.stdout.count("query  ") == 2 and "a title return the list" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "deep/ranking.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["q0", "q1"] and all(len(row["ranked_ids"]) == 2 for row in rows)
    reciprocal = [1 / row["first_positive"] if row["first_positive"] else 0 for row in rows]
    assert result["metrics"]["MRR@2"] == pytest.approx(sum(reciprocal) / 2)
    assert moved_into_top(rows, rows).startswith("Moved into the top 3: 0 of 2 queries")

    again = run_script(SCRIPT, *args)
    assert json.loads((tmp_path / "deep/er/scores.json").read_text())["metrics"] == result["metrics"], again.stdout


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--add_instruction", "--query_instruction_for_retrieval", "x"], "--add_instruction and --query_instruction"),
        (["--k", "10", "--cutoffs", "20"], "cut-off 20 is not between 1 and k, which is 10"),
        (["--output_file", "."], "--output_file '.' is not the name of a file"),
        (["--output_file", "toy_query.json/metrics.json"], "toy_query.json is a file; name a folder"),
        (["--output_file", "toy_query.json"], "--output_file toy_query.json is an input"),
        (["--save_ranking", "metrics.json"], "--save_ranking and --output_file are both metrics.json"),
        (["--encoder", "./nowhere"], "--encoder ./nowhere is not a folder"),
        (["--fp16", "--bf16"], "exclude each other"),
        (["--load_embedding"], "embeddings is no embedding store, it has no manifest.json"),
        (["--load_embedding", "--save_path", "x"], "x is no embedding store"),
        (
            ["--save_path", "x.memmap"],
            "--save_path x.memmap has no effect without --save_embedding or --load_embedding",
        ),
        (["--pooling_method", "median"], "'median' is not one of cls, mean, last_token"),
        (["--qrels", "none.tsv"], "none.tsv: cannot be read"),
        (["--split", "dev"], "--split dev has no effect"),
        (["--compare_metric", "nDCG@7"], "--compare_metric nDCG@7 is not measured; choose one of MRR@1"),
        (["--save_run", "a", "b"], "--save_run is a b: name one for each of 1 encoders"),
        (["--save_run", "metrics.json"], "--save_run and --output_file are both metrics.json"),
        (["--compare", "toy_query.json"], "toy_query.json:1: "),
        (["--query_data", "toy_corpus.json"], 'toy_corpus.json:1: "query" or "text" is missing'),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(run_script, toy, args, expected):
    given = {"--encoder": "no-such/model", **dict(zip(toy[::2], toy[1::2], strict=True))}
    defaults = [part for item in given.items() if item[0] not in args for part in item]
    done = run_script(SCRIPT, *defaults, *args, status=2)
    assert expected in done.stderr and "Traceback" not in done.stderr and "no-such/model" not in done.stderr


def test_mistakes_that_need_the_model(run_script, tiny_model, toy):
    done = run_script(SCRIPT, "--encoder", "no-such/model", *toy, status=2)
    assert "no-such/model" in done.stderr and "Traceback" not in done.stderr
    done = run_script(SCRIPT, "--encoder", tiny_model, *toy, "--index_factory", "Flatt", status=2)
    assert "FAISS cannot build the index 'Flatt'" in done.stderr and "Traceback" not in done.stderr


def measured(path):
    result = json.loads(path.read_text())
    return result["metrics"], result["counts"]["encoded_texts"]


def test_a_stored_corpus_gives_the_same_result(real_model, tmp_path):
    """Saved, loaded, and made by encode_corpus.py: the metrics of encoding everything anew."""
    rows = [{"content": f"{'king ' * (i % 9)}story {i}"} for i in range(200)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    queries = [{"query": f"what is story {i}", "positive": [rows[i]["content"]]} for i in range(0, 200, 2)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))

    def evaluate(name, *args, corpus="c.jsonl", status=0):
        return Job(
            *("--encoder", real_model, "--corpus_data", corpus, "--query_data", "q.jsonl", "--k", 50, *args),
            *("--output_file", name, "--save_ranking", f"{name}.ranking"),
            cwd=tmp_path,
            script=REPO / "scripts" / SCRIPT,
        ).ends(status)

    evaluate("plain")
    metrics, num_encoded = measured(tmp_path / "plain")
    assert num_encoded == 300 and 0 < metrics["MRR@10"] < 1
    evaluate("saved", "--save_embedding")
    assert measured(tmp_path / "saved") == (metrics, 300)
    evaluate("loaded", "--load_embedding")
    assert measured(tmp_path / "loaded") == (metrics, 100)  # the queries alone
    evaluate("again", "--save_embedding", "--load_embedding", "--save_path", "embeddings")
    assert measured(tmp_path / "again") == (metrics, 100)
    ranked = {
        name: [json.loads(line)["ranked_ids"] for line in open(tmp_path / f"{name}.ranking")]
        for name in ("plain", "loaded")
    }
    assert ranked["loaded"] == ranked["plain"]

    Job(
        *("--model_name_or_path", real_model, "--corpus_data", "c.jsonl", "--output_dir", "store", "--max_length", 128),
        *("--precision", "fp32", "--batch_size", 256),
        cwd=tmp_path,
        script=REPO / "scripts" / "encode_corpus.py",
    ).ends()
    evaluate("from_store", "--load_embedding", "--save_path", "store")
    assert measured(tmp_path / "from_store") == (metrics, 100)

    said = evaluate("hnsw", "--load_embedding", "--index_factory", "HNSW8")
    result = json.loads((tmp_path / "hnsw").read_text())
    assert "HNSW8 against exact search: recall@1 " in said and 0 < result["index_recall"]["recall@10"] <= 1

    (tmp_path / "c2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:-1], {"content": "another"}]))
    said = evaluate("no", "--load_embedding", "--max_passage_length", 16, corpus="c2.jsonl", status=2)
    assert "the maximum length in tokens: 128 in the store, 16 here" in said and "the texts (digest)" in said
    assert not (tmp_path / "no").exists()


def test_a_damaged_store_is_not_measured(tiny_model, tmp_path):
    """One byte of 38,400."""
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"content": f"story {i}"}) + "\n" for i in range(300)))
    (tmp_path / "q.jsonl").write_text('{"query": "what is story 7", "positive": ["story 7"]}\n')
    args = ("--encoder", tiny_model, "--corpus_data", "c.jsonl", "--query_data", "q.jsonl", "--save_path", "store")
    Job(*args, "--save_embedding", cwd=tmp_path, script=REPO / "scripts" / SCRIPT).ends()
    with open(tmp_path / "store" / "shard-00000.npy", "r+b") as file:
        file.seek(20_000)
        byte = file.read(1)[0]
        file.seek(20_000)
        file.write(bytes([byte ^ 64]))
    (tmp_path / "metrics.json").unlink()
    said = Job(*args, "--load_embedding", cwd=tmp_path, script=REPO / "scripts" / SCRIPT).ends(2)
    assert "shard-00000.npy is damaged" in said and "Traceback" not in said and "nDCG" not in said
    assert not (tmp_path / "metrics.json").exists()


def test_finds_what_it_should(run_script, real_model, toy, tmp_path):
    """With a trained encoder every query finds its passage, and the saved folder's own pooling is used."""
    run_script(SCRIPT, "--encoder", real_model, *toy, "--output_file", "m.json")
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["metrics"]["MRR@1"] == 1 and result["model"]["pooling"] == "mean"


def test_models_of_different_instructions_are_told_apart(run_script, tiny_model, toy, tmp_path):
    base, tuned = str(tmp_path / "base"), str(tmp_path / "tuned")
    save_encoder(base, *load_encoder(tiny_model, pooling="mean"))
    save_encoder(tuned, *load_encoder(tiny_model, pooling="mean", query_prefix="who: "))
    args = ("--encoder", base, tuned, *toy, "--k", 3)
    done = run_script(SCRIPT, *args)
    assert (
        f'warning: the models do not embed alike: query instruction none in {base}, "who: " in {tuned}. '
        '--query_instruction_for_retrieval ("" for none), --passage_instruction_for_retrieval, '
    ) in done.stderr
    without = "queries without an instruction, cut to 32 tokens\npassages without an instruction, cut to 128 tokens\n"
    assert f"== base\n{without}" in done.stdout
    assert '== tuned\nqueries with "who: " before each, cut to 32 tokens\n' in done.stdout
    done = run_script(SCRIPT, *args, "--query_instruction_for_retrieval", "")
    assert "do not embed alike" not in done.stderr and f"== tuned\n{without}" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())["systems"]
    assert metrics["base"]["metrics"] == metrics["tuned"]["metrics"]
    assert metrics["tuned"]["model"]["max_query_length"] == 32
