"""Reading corpus, queries and judgements, and measuring with an encoder that hashes words."""

import gzip
import json
import zlib

import numpy as np
import pytest
import pytrec_eval

from bge_accel.evaluation.retrieval import (
    choose_cutoffs,
    evaluate_embeddings,
    evaluate_retrieval,
    ranking_rows,
)
from bge_accel.evaluation.sets import read_corpus, read_evaluation_data, read_qrels
from bge_accel.evaluation.tables import metrics_table, moved_into_top, side_by_side_table
from bge_accel.files.faults import Faults


class HashingEncoder:
    """Counts words into 512 buckets, so that texts with common words are alike."""

    def __init__(self):
        self.calls = []

    def _encode(self, texts, batch_size=None, max_length=None, show_progress=False):
        self.calls.append((len(texts), batch_size, max_length))
        embeddings = np.zeros((len(texts), 512), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split()[:max_length]:
                embeddings[row, zlib.crc32(word.encode()) % 512] += 1
        return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)

    encode_queries = encode_corpus = _encode


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines, or a text as it stands, and returns the path."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        data = content.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write_file


ANIMALS = [{"content": "cats purr"}, {"content": "dogs bark"}, {"content": "cows moo loudly"}]


def faults_of(corpus, queries, qrels=None):
    with pytest.raises(ValueError) as caught:
        read_evaluation_data([corpus], [queries], qrels)
    return str(caught.value)


def test_positives_by_text(write):
    data = read_evaluation_data(
        [write("corpus.json", ANIMALS)],
        [
            write(
                "q.json",
                [{"query": "who does purr", "positive": ["cats purr"]}, {"query": "bark", "positive": ["dogs bark"]}],
            )
        ],
    )
    model = HashingEncoder()
    evaluation = evaluate_retrieval(
        model, data, k=2, cutoffs=[1, 2], batch_size=7, max_query_length=5, max_passage_length=9
    )
    assert evaluation.metrics["MRR@1"] == 1 and evaluation.metrics["P@2"] == 0.5
    assert evaluation.indices[:, 0].tolist() == [0, 1] and evaluation.gains.tolist() == [[1, 0], [1, 0]]
    assert model.calls == [(2, 7, 5), (3, 7, 9)]
    assert set(evaluation.seconds) == {"encode_queries", "encode_corpus", "build_index", "search"}
    assert not data.warnings
    assert data.counts == {
        "corpus": 3, "queries": 2, "judged_queries": 2, "unjudged_queries": 0, "judgements": 2, "positives": 2,
        "missing_positives": 0,
    }  # fmt: skip


def test_formats_of_the_corpus(write):
    files = [
        write("folder/a.jsonl", [{"text": "one", "_id": "x"}, {"content": "two", "id": 7}]),
        write("folder/b.json.gz", json.dumps([{"text": "three", "title": "T"}, {"text": "", "title": "only a title"}])),
    ]
    for paths in (files, [str(files[0]).rsplit("/", 1)[0]]):
        faults = Faults()
        corpus = read_corpus(paths, faults)
        faults.raise_if_any()
        assert corpus.ids == ["x", "7", "2", "3"]
        assert corpus.texts == ["one", "two", "T three", "only a title"]
        assert corpus.bodies == ["one", "two", "three", ""]


def test_an_empty_title_leaves_the_text_as_it_is(write):
    faults = Faults()
    rows = [{"text": "a", "title": ""}, {"text": "b", "title": None}, {"text": "c", "title": " "}]
    assert read_corpus([write("c.jsonl", rows)], faults).texts == ["a", "b", "c"] and not faults.count


def test_positives_are_matched_without_the_title(write):
    corpus = write("c.jsonl", [{"title": "Cats", "text": "They purr"}, {"title": "Dogs", "text": "They bark"}])
    data = read_evaluation_data([corpus], [write("q.jsonl", [{"query": "dogs", "positive": ["They bark"]}])])
    assert data.judgements.row.tolist() == [1]


def test_every_copy_of_a_positive_is_relevant_and_missing_ones_count(write):
    corpus = write("c.jsonl", [{"text": "cats purr"}, {"text": "dogs bark"}, {"text": "cats purr"}])
    queries = [
        {"query": "cats purr", "positive": ["cats purr", "cats purr", "elsewhere"]},
        {"query": "not judged", "positive": []},
        {"query": "bark", "positive": ["dogs bark"]},
    ]
    data = read_evaluation_data([corpus], [write("q.jsonl", queries)])
    assert data.queries.ids == ["0", "2"]
    assert data.counts["unjudged_queries"] == 1 and data.counts["queries"] == 3
    assert data.counts["positives"] == 4 and data.counts["missing_positives"] == 1
    assert data.warnings == [
        '1 of 4 judged passages are not in the corpus, for example "elsewhere"; 1 of them are positives, which count as not found'
    ]
    evaluation = evaluate_retrieval(HashingEncoder(), data, k=3)
    assert evaluation.metrics["Recall@3"] == pytest.approx((2 / 3 + 1) / 2)
    assert evaluation.gains[0].tolist() == [1, 1, 0]
    assert evaluation.indices[0].tolist() == [2, 0, 1]  # a tie, read as trec_eval does: the larger id first


BEIR = "query-id\tcorpus-id\tscore\nq1\tc a\t2\nq1\tcb\t-1\nq2\tcb\t1\n"
TREC = "q1 0 ca 2\nq1 0 cb -1\n\nq2 Q0 cb 1\n"


@pytest.mark.parametrize(
    ("name", "content", "spaced"),
    [
        ("test.tsv", BEIR, True),
        ("test.tsv", BEIR.split("\n", 1)[1], True),
        ("test.tsv", "\ufeff" + BEIR.replace("\n", "\r\n"), True),
        ("test.tsv.gz", BEIR, True),
        ("test.tsv", "corpus-id\tquery-id\tscore\nc a\tq1\t2\ncb\tq1\t-1\ncb\tq2\t1\n", True),
        (
            "test.tsv",
            "Score\tquery_id\tnote\tDoc ID\tquery\n2\tq1\t\tc a\twho\n-1\tq1\tx\tcb\twho\n1\tq2\tx\tcb\t?\n",
            True,
        ),
        ("qrels.txt", "qid iter docno rel\n" + TREC, False),
        ("qrels.txt", "docno iter rel qid\nca 0 2 q1\ncb 0 -1 q1\ncb Q0 1 q2\n", False),
        ("qrels.txt", TREC, False),
        ("qrels.tsv", TREC.replace(" ", "\t").replace("2\n", "2.0\n"), False),
    ],
)
def test_forms_of_judgements(write, name, content, spaced):
    faults = Faults()
    assert read_qrels(write(name, content), faults) == {
        "q1": {"c a" if spaced else "ca": 2, "cb": -1},
        "q2": {"cb": 1},
    }
    faults.raise_if_any()


CORPUS_IDS = [{"_id": "a", "text": "cats purr"}, {"_id": "b", "text": "dogs bark"}]
QUERY_IDS = [{"_id": "q1", "text": "purr"}, {"_id": "q2", "text": "bark"}, {"_id": "q3", "text": "moo"}]


def test_judgements_by_id(write):
    qrels = write("test.tsv", "q1\ta\t1\nq2\tb\t1\nq2\tgone\t2\nq2\tgone too\t0\nq9\ta\t1\n")
    # "positive" is there too, and would be wrong: the judgements win.
    queries = [{**row, "positive": "nothing"} for row in QUERY_IDS]
    data = read_evaluation_data([write("c.jsonl", CORPUS_IDS)], [write("q.jsonl", queries)], qrels)
    assert data.queries.ids == ["q1", "q2"]
    assert data.counts == {
        "corpus": 2, "queries": 3, "unknown_queries": 1, "judged_queries": 2, "unjudged_queries": 1, "judgements": 4,
        "positives": 3, "missing_positives": 1,
    }  # fmt: skip
    unknown, missing = data.warnings
    assert "1 of 3 queries that are not in the query files" in unknown and '"q9"' in unknown
    assert "2 of 4 judged passages are not in the corpus" in missing and '"gone"' in missing
    metrics = evaluate_retrieval(HashingEncoder(), data, k=1).metrics
    assert metrics["MRR@1"] == 1 and metrics["Recall@1"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics["nDCG@1"] == pytest.approx((1 + 1 / 2) / 2)


def test_nothing_matches_by_text(write):
    message = faults_of(write("c.jsonl", ANIMALS), write("q.jsonl", [{"query": "q", "positive": ["Cats purr."]}]))
    assert '"Cats purr."' in message and '"cats purr"' in message and "--qrels" in message
    assert 'every "positive" is empty' in faults_of(
        write("c.jsonl", ANIMALS), write("q.jsonl", [{"query": "q", "positive": []}])
    )


@pytest.mark.parametrize("line", ["q1\tz\t1\n", "z\ta\t1\n"])
def test_nothing_matches_by_id(write, line):
    message = faults_of(write("c.jsonl", CORPUS_IDS), write("q.jsonl", QUERY_IDS), write("test.tsv", line))
    assert "no judgement connects" in message and '"z"' in message and '"q1"' in message and '"a"' in message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, '"content" or "text" is missing'),
        ({"content": None}, '"content" or "text" is missing'),
        ({"content": "a", "text": "b"}, "the row has content and text: keep one"),
        ({"text": 5}, '"text" is 5: it has to be a string'),
        ({"text": " "}, '"text" is empty'),
        ({"text": "", "title": ""}, '"text" is empty'),
        ({"text": "a", "title": 3}, '"title" is 3: it has to be a string'),
        ({"text": "a", "id": True}, "the id is true"),
        ({"text": "a", "id": ""}, 'the id is ""'),
        ({"text": "a", "id": 1.5}, "the id is 1.5"),
        *(
            ({"text": "a", "id": odd}, f"the id {json.dumps(odd)} has a tab")
            for odd in ("a\tb", "a\nb", "a\rb", " a", "a ", " ")
        ),
        ({"text": "a", "_id": "first"}, 'the id "first" has occurred before'),
    ],
)
def test_faults_in_the_corpus(write, row, expected):
    corpus = write("c.jsonl", [{"text": "fine", "id": "first"}, row])
    message = faults_of(corpus, write("q.jsonl", [{"query": "q", "positive": ["fine"]}]))
    assert message.startswith("1 fault in the input:\n") and f"{corpus}:2: {expected}" in message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"positive": ["a"]}, '"query" or "text" is missing'),
        ({"query": "", "positive": ["a"]}, '"query" is empty'),
        ({"query": "a"}, '"positive" is missing: list the texts that answer the query, or give --qrels'),
        ({"query": "a", "positive": "b"}, '"positive" is "b": it has to be a list'),
        ({"query": "a", "positive": [""]}, '"positive" holds ""'),
        ({"query": "a", "positive": [3]}, '"positive" holds 3'),
        ({"query": "a", "positive": ["b"], "id": "0"}, 'the id "0" has occurred before'),
        ({"query": "a", "positive": ["b"], "id": "q\t1"}, r'the id "q\t1" has a tab'),
    ],
)
def test_faults_in_the_queries(write, row, expected):
    queries = write("q.jsonl", [{"query": "fine", "positive": ["cats purr"]}, row])
    assert f"{queries}:2: {expected}" in faults_of(write("c.jsonl", ANIMALS), queries)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("q1\ta\t1\nq1\ta\t2\n", ":2: query q1 and passage a were judged 1 before, and 2 here"),
        ("q1\ta\t1\nq1\tb\n", ":2: "),
        ("q1\ta\thigh\n", ':1: the score is "high": it has to be a whole number'),
        ("q1\ta\t0.5\n", ':1: the score is "0.5"'),
        ("query-id\tcorpus-id\tscore\n", ": the file holds no judgements"),
        ("query-id\tanswer\tscore\nq1\ta\t1\n", ':1: the header "query-id answer score" has no corpus-id'),
        ("corpus-id\tquery-id\na\tq1\n", ':1: the header "corpus-id query-id" has no score'),
        ("query-id\tcorpus-id\tscore\nq1\t0\ta\t1\n", ':2: "q1\\t0\\ta\\t1\\n": expected as many fields as the header'),
        ("", ": the file holds no judgements"),
    ],
)
def test_faults_in_the_judgements(write, content, expected):
    qrels = write("test.tsv", content)
    assert qrels + expected in faults_of(write("c.jsonl", CORPUS_IDS), write("q.jsonl", QUERY_IDS), qrels)


def test_faults_of_all_files_come_together(write, tmp_path):
    message = faults_of(
        write("c.jsonl", [{"text": ""}] * 12), write("q.jsonl", [{"query": 1}]), str(tmp_path / "none.tsv")
    )
    assert message.startswith("14 faults in the input:\n") and message.endswith("\n... and 4 more")
    assert message.count("c.jsonl:") == 10


def test_cutoffs():
    assert choose_cutoffs(100) == [1, 3, 5, 10, 100]
    assert choose_cutoffs(50) == [1, 3, 5, 10, 50]
    assert choose_cutoffs(1) == [1]
    assert choose_cutoffs(1000) == [1, 3, 5, 10, 100, 1000]
    assert choose_cutoffs(20, [20, 5, 5]) == [5, 20]
    for k, cutoffs, message in [(0, None, "k is 0"), (10, [0], "cut-off 0"), (10, [11], "cut-off 11 .* raise k")]:
        with pytest.raises(ValueError, match=message):
            choose_cutoffs(k, cutoffs)


def test_a_wrong_index_string_is_told_before_the_corpus_is_encoded(write):
    pytest.importorskip("faiss")
    data = read_evaluation_data(
        [write("c.jsonl", ANIMALS)], [write("q.jsonl", [{"query": "cats", "positive": ["cats purr"]}])]
    )
    model = HashingEncoder()
    with pytest.raises(ValueError, match="'Flatt'"):
        evaluate_retrieval(model, data, k=1, index_factory="Flatt")
    assert len(model.calls) == 1


def test_embeddings_of_other_texts_are_refused(write):
    data = read_evaluation_data(
        [write("c.jsonl", ANIMALS)], [write("q.jsonl", [{"query": "cats", "positive": ["cats purr"]}])]
    )
    with pytest.raises(ValueError, match="1 query and 2 passage embeddings do not belong to 1 queries and 3 passages"):
        evaluate_embeddings(np.ones((1, 4), dtype=np.float32), np.ones((2, 4), dtype=np.float32), data)


@pytest.mark.parametrize("seed", range(60))
def test_the_whole_way_agrees_with_trec_eval(write, seed):
    """Random words, so that many scores tie; grades below 0, unjudged queries, k above and below the corpus."""
    rng = np.random.default_rng(seed)
    words = ["ant", "bee", "cat", "dog", "elk"]

    def texts(prefix, num):
        return [{"id": f"{prefix}{i}", "text": " ".join(rng.choice(words, 3))} for i in rng.permutation(200)[:num]]

    corpus, queries = texts("c", int(rng.integers(1, 60))), texts("q", int(rng.integers(1, 12)))
    qrels = {}
    for query in queries[: max(1, len(queries) - 2)]:
        judged = rng.choice([row["id"] for row in corpus], int(rng.integers(1, len(corpus) + 1)), replace=False)
        grades = rng.integers(-1, 4, size=len(judged))
        grades[0] = max(grades[0], 0)  # see test_metrics
        qrels[query["id"]] = {str(doc): int(grade) for doc, grade in zip(judged, grades, strict=True)}
    lines = [f"{query}\t{doc}\t{grade}\n" for query, of in qrels.items() for doc, grade in of.items()]
    data = read_evaluation_data(
        [write("c.jsonl", corpus)], [write("q.jsonl", queries)], write("qrels.tsv", "".join(lines))
    )
    assert data.counts["unjudged_queries"] == len(queries) - len(qrels)
    evaluation = evaluate_retrieval(HashingEncoder(), data, k=20, cutoffs=[1, 5, 20])
    run = {
        query: {data.corpus.ids[row]: float(score) for row, score in zip(rows, scores, strict=True)}
        for query, rows, scores in zip(data.queries.ids, evaluation.indices, evaluation.scores, strict=True)
    }
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.1,5,20", "map_cut.1,5,20", "recall.1,5,20", "recip_rank"})
    expected = theirs.evaluate(run)
    assert expected.keys() == qrels.keys()
    means = {name: np.mean([of[name] for of in expected.values()]) for name in next(iter(expected.values()))}
    for cutoff in (1, 5, 20):
        for ours, name in [("nDCG", "ndcg_cut"), ("MAP", "map_cut"), ("Recall", "recall")]:
            assert evaluation.metrics[f"{ours}@{cutoff}"] == pytest.approx(means[f"{name}_{cutoff}"], abs=1e-6)
    assert evaluation.metrics["MRR@20"] == pytest.approx(means["recip_rank"], abs=1e-6)


def test_an_approximate_index_that_finds_too_few(write):
    """The places left over are no passages: in particular not the last of the corpus."""
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    corpus_emb, q_emb = rng.standard_normal((400, 8), np.float32), rng.standard_normal((20, 8), np.float32)
    corpus = [{"text": f"passage {number}"} for number in range(400)]
    queries = [{"query": "q", "positive": ["passage 399"]} for _ in range(20)]
    data = read_evaluation_data([write("c.jsonl", corpus)], [write("q.jsonl", queries)])
    evaluation = evaluate_embeddings(q_emb, corpus_emb, data, k=350, index_factory="IVF16,Flat")
    assert (evaluation.indices == -1).any()
    np.testing.assert_array_equal(evaluation.gains > 0, evaluation.indices == 399)
    for row, indices in zip(ranking_rows(data, evaluation, depth=350), evaluation.indices, strict=True):
        assert len(row["ranked_ids"]) == len(row["scores"]) == (indices >= 0).sum()


def test_ranking_rows(write):
    queries = [{"query": "purr", "positive": ["cats purr"]}, {"query": "dogs bark", "positive": ["cows moo loudly"]}]
    data = read_evaluation_data([write("c.jsonl", ANIMALS)], [write("q.jsonl", queries)])
    first, second = ranking_rows(data, evaluate_retrieval(HashingEncoder(), data, k=2), depth=1)
    assert first == {
        "id": "0",
        "query": "purr",
        "ranked_ids": ["0"],
        "scores": [pytest.approx(0.5**0.5)],
        "first_positive": 1,
        "first_text": "cats purr",
    }
    assert second["first_positive"] in (2, None) and second["first_text"] == "dogs bark"
    json.dumps([first, second])


def row(query, first_positive, first_text):
    return {"id": query, "query": f"text of {query}", "first_positive": first_positive, "first_text": first_text}


def test_moved_into_top():
    before = [row("a", 9, "x"), row("b", None, "y"), row("c", 2, "z"), row("d", 3, "w"), row("e", 4, "v")]
    after = [row("e", 4, "v"), row("a", 1, "A"), row("b", 3, "B"), row("c", 1, "C"), row("d", None, "D")]
    text = moved_into_top(before, after)
    assert text.splitlines() == [
        "Moved into the top 3: 2 of 5 queries; out of it: 1",
        "",
        'query   "text of b"',
        "rank    not found -> 3",
        'before  "y"',
        'after   "B"',
        "",
        'query   "text of a"',
        "rank    9 -> 1",
        'before  "x"',
        'after   "A"',
    ]
    assert '"text of a"' not in moved_into_top(before, after, limit=1)
    with pytest.raises(ValueError, match="not of the same queries"):
        moved_into_top(before, after[1:])


def test_tables():
    base = {"MRR@1": 0.25, "MRR@10": 0.5, "Recall@10": 1.0}
    assert metrics_table(base).splitlines() == [
        "            @1     @10",
        "MRR     0.2500  0.5000",
        "Recall       -  1.0000",
    ]
    tuned, merged = {"MRR@1": 0.5, "MRR@10": 0.4}, {"MRR@1": 0.25}
    assert side_by_side_table({"base": base, "tuned": tuned, "merged": merged}).splitlines() == [
        "             base             tuned            merged",
        "MRR@1      0.2500  0.5000 (+0.2500)  0.2500 (+0.0000)",
        "MRR@10     0.5000  0.4000 (-0.1000)                 -",
        "Recall@10  1.0000                 -                 -",
    ]
