"""scripts/mine_hard_negatives.py and score_with_reranker.py as a user runs them, on a tiny encoder."""

import importlib.util
import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.repo import REPO
from helpers.warm_start import Job

from bge_accel import EmbeddingModel
from bge_accel.data.rows import TrainingRows
from bge_accel.encoding.reranker import Reranker
from bge_accel.mining.pool import normalise_text

MINE, SCORE = REPO / "scripts" / "mine_hard_negatives.py", REPO / "scripts" / "score_with_reranker.py"
WORDS = "king princess story list string file value return who what how".split()
DOCUMENTED = "--range_for_sampling 2-200 --negative_number 15 --use_gpu_for_searching".split()


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows in FlagEmbedding's format, with fields of their own and scores of another time."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))

    rows = []
    for i in range(count):
        row = {"id": i, "query": f"{text()} {i % (count * 3 // 4)}?", "pos": [text(), f"{text()} {i}"]}
        row |= {"neg": [f"{text()}. {i} {j}" for j in range(rng.randint(0, 7))], "note": {"é": [1.5, None]}}
        if i % 3 == 0:
            row |= {"pos_scores": [1.0, 2.0], "neg_scores": [0.0] * len(row["neg"]), "last": True}
        rows.append(row)
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mine(tmp_path: Path, model: str, *args: object, name: str = "toy.jsonl", output: str = "mined.jsonl", **how) -> Job:
    given = () if "--input_file" in args else ("--input_file", name)
    common = ("--model_name_or_path", model, *given, "--output_file", output)
    return Job(*common, *args, cwd=tmp_path, script=MINE, **how)


def assert_same_negatives(ours: list[dict], theirs: list[dict]) -> None:
    """Rows with the same scores, and the same texts but where neighbours' scores differ by rounding alone."""
    others = []
    for one, two in zip(ours, theirs, strict=True):
        for name in ("neg_scores", "pos_scores"):
            np.testing.assert_allclose(one[name], two[name], atol=1e-5)
        others += [a != b for a, b in zip(one["neg"], two["neg"], strict=True)]
        rest = one.keys() - {"neg", "neg_scores", "pos_scores"}
        assert one.keys() == two.keys() and all(one[name] == two[name] for name in rest)
    assert np.mean(others) < 0.02 and np.std([score for row in ours for score in row["neg_scores"]]) > 1e-3


def assert_clean(rows: list[dict]) -> None:
    """No negative is a known positive of its query, the query, or another negative."""
    known: dict[str, set[str]] = {}
    for row in rows:
        known.setdefault(normalise_text(row["query"]), set()).update(map(normalise_text, row["pos"]))
    for row in rows:
        query, negatives = normalise_text(row["query"]), list(map(normalise_text, row["neg"]))
        assert len(set(negatives)) == len(negatives) and query not in negatives
        assert not known[query] & set(negatives)


def test_the_documented_line_of_flagembedding(tmp_path, tiny_model):
    rows = make_rows(10)
    write(tmp_path / "toy.jsonl", rows)
    text = mine(tmp_path, tiny_model, *DOCUMENTED, "--show", 10**12).ends()
    mined = read(tmp_path / "mined.jsonl")
    assert_clean(mined)
    for old, new in zip(rows, mined, strict=True):
        assert len(new["neg"]) == 15 and "pos_scores" not in new and "neg_scores" not in new
        assert list(new) == [name for name in old if not name.endswith("_scores")]
        assert all(new[name] == old[name] for name in new if name != "neg")
    pool = {text for row in rows for text in row["pos"] + row["neg"]}
    assert {text for row in mined for text in row["neg"]} <= pool
    assert f"10 rows, {len(pool)} different passages" in text and "no GPU: searching on the CPU" in text
    assert text.count("\nquery ") == 10 and "negatives: mean" in text and "candidates dropped" in text
    names = ["mined.jsonl", "mined.jsonl.config.yaml", "toy.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("job-")) == names
    assert len(TrainingRows([str(tmp_path / "mined.jsonl")])) == 10, "it can be trained on"

    # The same command, or its YAML, gives the same bytes; another seed does not.
    before = (tmp_path / "mined.jsonl").read_bytes()
    Job("--config", "mined.jsonl.config.yaml", cwd=tmp_path, script=MINE).ends()
    assert (tmp_path / "mined.jsonl").read_bytes() == before
    mine(tmp_path, tiny_model, *DOCUMENTED, "--seed", 1).ends()
    assert (tmp_path / "mined.jsonl").read_bytes() != before


def test_newer_names_scores_top_and_margins(tmp_path, tiny_model):
    rows = make_rows(60)
    rows[3]["prompt"] = "a prompt of its own: "
    write(tmp_path / "toy.jsonl", rows)
    corpus = sorted({text for row in rows for text in row["pos"] + row["neg"]})
    write(tmp_path / "corpus.jsonl", [{"text": text, "title": "no part of it"} for text in corpus[::2]])
    args = (
        "--embedder_query_max_length 64 --embedder_passage_max_length 128 --normalize_embeddings True --use_fp16 False "
    )
    args += "--pooling_method mean --search_batch_size 7 --batch_size 16 --embedder_model_class encoder-only-base "
    args += (
        "--candidate_pool corpus.jsonl --range_for_sampling 0-500 --negative_number 4 --sampling top --write_scores "
    )
    args += "--relative_margin 0.01"
    Job("--embedder_name_or_path", tiny_model, "--input_file", "toy.jsonl", "--output_file", "deep/er/out.jsonl",
        "--query_instruction_for_retrieval", "find: ", *args.split(), cwd=tmp_path, script=MINE).ends()  # fmt: skip
    mined = read(tmp_path / "deep/er/out.jsonl")
    assert_clean(mined)
    model = EmbeddingModel(tiny_model, query_instruction="find: ", pooling="mean", normalize=True)
    q_emb = model.encode_queries([row["query"] for row in rows], max_length=64).astype(np.float64)
    q_emb[3] = model.encode(rows[3]["prompt"] + rows[3]["query"], max_length=64)
    p_emb = model.encode_corpus(corpus[::2]).astype(np.float64)
    short = 0
    for i, row in enumerate(mined):
        pos_scores = model.encode_corpus(row["pos"]).astype(np.float64) @ q_emb[i]
        np.testing.assert_allclose(row["pos_scores"], pos_scores, atol=2e-6)
        scores = p_emb @ q_emb[i]
        by_text = dict(zip(corpus[::2], scores, strict=True))
        np.testing.assert_allclose(row["neg_scores"], [by_text[text] for text in row["neg"]], atol=2e-6)
        assert row["neg_scores"] == sorted(row["neg_scores"], reverse=True)
        limit = min(pos_scores) * (1 - 0.01)
        assert max(row["neg_scores"], default=-1) <= limit + 2e-6
        short += len(row["neg"]) < 4
        if row["neg"]:  # top: what scores higher is too high, or a known positive
            better = [text for text, score in by_text.items() if row["neg_scores"][0] + 1e-5 < score < limit - 1e-5]
            same = [text for other in rows if other["query"] == row["query"] for text in other["pos"]]
            assert set(better) <= set(same)
    assert 0 < short < 60


def test_keep_fill_and_rows_without_negatives(tmp_path, tiny_model):
    rows = make_rows(6)
    del rows[0]["pos_scores"], rows[0]["neg_scores"]
    rows[0]["neg"] = [rows[0]["pos"][0].upper(), "kept one", "KEPT  one", rows[0]["query"].title(), "kept two"]
    write(tmp_path / "toy.jsonl", rows)
    write(tmp_path / "pool.jsonl", [{"text": text} for text in ("a", "b", "c", "B", "kept two", rows[1]["pos"][1])])
    args = ("--candidate_pool", "pool.jsonl", "--range_for_sampling", "0-2", "--negative_number", 4)
    text = mine(tmp_path, tiny_model, *args, "--existing_negatives", "keep", "--write_scores").ends()
    mined = read(tmp_path / "mined.jsonl")
    assert_clean(mined)
    assert mined[0]["neg"][:2] == ["kept one", "kept two"] and len(mined[0]["neg"]) == 4
    assert "6 rows got fewer than 4" in text and "3 existing removed" in text
    assert "warning: --range_for_sampling 0-2 holds fewer" in text
    for old, new in zip(rows[1:], mined[1:], strict=True):
        assert new["neg"][: len(old["neg"])] == old["neg"] and len(new["neg_scores"]) == len(new["neg"])
        assert list(new)[-2:] == ["pos_scores", "neg_scores"]

    mine(tmp_path, tiny_model, *args, "--fill_random").ends()
    mined = read(tmp_path / "mined.jsonl")
    assert_clean(mined)
    assert [len(row["neg"]) for row in mined] == [4, 4, 4, 4, 4, 4]


def test_rows_without_negatives_are_said_last_and_a_run_without_any_is_an_error(tmp_path, tiny_model):
    """Five passages that answer all queries but the last; a sixth that nobody answers with."""
    texts = [f"king {i} story" for i in range(6)]
    queries = [{"query": f"who {i}", "pos": texts if i < 5 else texts[:2]} for i in range(6)]
    write(tmp_path / "toy.jsonl", queries)
    args = ("--range_for_sampling", "0-2", "--negative_number", 2)
    text = mine(tmp_path, tiny_model, *args).ends()
    assert 'have no negatives and are written with "neg": []: toy.jsonl:1, toy.jsonl:2' in text
    assert text.splitlines()[-1].startswith("warning: 5 of 6 rows have no negatives; begin --range_for_sampling lower")
    assert [len(row["neg"]) for row in read(tmp_path / "mined.jsonl")] == [0] * 5 + [2]
    text = mine(tmp_path, tiny_model, *args, "--drop_rows_without_negatives").ends()
    assert "6 rows, 1 written" in text and len(read(tmp_path / "mined.jsonl")) == 1

    write(tmp_path / "one.jsonl", [queries[0], *queries[5:] * 4])  # a fifth of the rows
    text = mine(tmp_path, tiny_model, *args, name="one.jsonl").ends()
    assert "1 rows have no negatives" in text and "warning" not in text

    before = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("job-"))
    for flags, expected in (
        (("--max_score", -1), "no row got a negative (candidates dropped: "),
        (("--range_for_sampling", "100-200"), "--range_for_sampling 100-200 begins behind the 6 passages of the pool"),
    ):
        text = mine(tmp_path, tiny_model, *args, *flags, output="none.jsonl", processes=2).ends(2)
        assert f"error: {expected}" in text and "Traceback" not in text
        assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("job-")) == before


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, tiny_model):
    write(tmp_path / "toy.jsonl", make_rows(1200))
    args = ("--range_for_sampling", "2-60", "--negative_number", 5, "--write_scores")
    whole = mine(tmp_path, tiny_model, *args, output="whole.jsonl").ends()
    job = mine(tmp_path, tiny_model, *args)
    work = tmp_path / "mined.jsonl.mining"
    job.wait_until((work / "part-0000001").exists)
    job.kill()
    assert not (tmp_path / "mined.jsonl").exists() and not (work / "part-0000004").exists()
    first = (work / "part-0000000").stat().st_mtime_ns
    shard = work / "embeddings" / "shard-00000.npy"
    emb = shard.stat().st_mtime_ns
    job = mine(tmp_path, tiny_model, *args)
    job.wait_until((work / "part-0000003").exists)
    assert (work / "part-0000000").stat().st_mtime_ns == first and shard.stat().st_mtime_ns == emb
    text = job.ends()
    assert "going on from an interrupted run: " in text and not work.exists()
    assert (tmp_path / "mined.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    strip = [line for line in whole.splitlines() if not line.startswith("wrote")]
    assert all(line in text for line in strip), "the summary is that of the whole run"
    assert_clean(read(tmp_path / "mined.jsonl"))

    # Two processes give the same, save what ties decide; they share the work.
    text = mine(tmp_path, tiny_model, *args, output="two.jsonl", processes=2).ends()
    assert text.count("1,200 rows, 1,200 written") == 1
    assert_same_negatives(read(tmp_path / "whole.jsonl"), read(tmp_path / "two.jsonl"))


def test_another_runs_leftovers_are_not_used(tmp_path, tiny_model):
    write(tmp_path / "toy.jsonl", make_rows(600))
    args = ("--range_for_sampling", "0-60", "--negative_number", 5)
    job = mine(tmp_path, tiny_model, *args)
    job.wait_until((tmp_path / "mined.jsonl.mining" / "part-0000000").exists)
    job.send(signal.SIGTERM)
    job.wait()
    text = mine(tmp_path, tiny_model, *args, "--seed", 5).ends()
    assert "starting afresh, mined.jsonl.mining is of another run: seed: 42 -> 5" in text
    mine(tmp_path, tiny_model, *args, "--seed", 5, output="other.jsonl").ends()
    assert (tmp_path / "mined.jsonl").read_bytes() == (tmp_path / "other.jsonl").read_bytes()


@pytest.mark.parametrize("damaged", ["part-0000000", "fingerprint.json"])
def test_damaged_leftovers_are_not_used(tmp_path, tiny_model, damaged):
    write(tmp_path / "toy.jsonl", make_rows(600))
    args = ("--range_for_sampling", "0-60", "--negative_number", 5)
    mine(tmp_path, tiny_model, *args, output="whole.jsonl").ends()
    job = mine(tmp_path, tiny_model, *args)
    job.wait_until((tmp_path / "mined.jsonl.mining" / "part-0000001").exists)
    job.kill()
    path = tmp_path / "mined.jsonl.mining" / damaged
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))  # whole lines, and fewer of them
    text = mine(tmp_path, tiny_model, *args).ends()
    assert ("going on from an interrupted run: 1 of" if damaged.startswith("part") else "starting afresh") in text
    assert (tmp_path / "mined.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("changed", ["a part", "the input"])
def test_what_goes_wrong_at_the_end_loses_no_work(tmp_path, tiny_model, changed):
    toy = write(tmp_path / "toy.jsonl", make_rows(1200))
    args = ("--range_for_sampling", "0-60", "--negative_number", 5)
    mine(tmp_path, tiny_model, *args, output="whole.jsonl").ends()
    job = mine(tmp_path, tiny_model, *args)
    work = tmp_path / "mined.jsonl.mining"
    job.wait_until((work / "part-0000000").exists)
    before = toy.read_bytes()
    if changed == "a part":
        (work / "part-0000000").write_text("")
    else:
        toy.write_bytes(before.replace(b"king", b"duke"))
    text = job.ends(2)
    expected = "part-0000000 is not there or damaged" if changed == "a part" else "the input has changed"
    assert expected in text and "Traceback" not in text and not (tmp_path / "mined.jsonl").exists()
    toy.write_bytes(before)
    text = mine(tmp_path, tiny_model, *args).ends()
    assert f"going on from an interrupted run: {4 if changed == 'a part' else 5} of its chunks" in text
    assert (tmp_path / "mined.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_pools_embeddings_are_kept_and_taken(tmp_path, tiny_model):
    """Also those of encode_corpus.py; those of other texts are refused."""
    write(tmp_path / "toy.jsonl", make_rows(40))
    write(tmp_path / "pool.jsonl", [{"text": f"{word} {other}"} for word in WORDS for other in WORDS])
    args = ("--candidate_pool", "pool.jsonl", "--range_for_sampling", "0-20", "--negative_number", 5, "--write_scores")
    encode = REPO / "scripts" / "encode_corpus.py"
    flags = ("--corpus_data", "pool.jsonl", "--output_dir", "store", "--max_length", 128)
    Job("--model_name_or_path", tiny_model, *flags, cwd=tmp_path, script=encode).ends()
    shard = tmp_path / "store" / "shard-00000.npy"
    written = shard.stat().st_mtime_ns
    mine(tmp_path, tiny_model, *args, "--save_path", "store").ends()
    mine(tmp_path, tiny_model, *args, output="own.jsonl").ends()
    assert shard.stat().st_mtime_ns == written
    assert (tmp_path / "mined.jsonl").read_bytes() == (tmp_path / "own.jsonl").read_bytes()
    mine(tmp_path, tiny_model, *args, "--save_path", "new", output="new.jsonl").ends()
    assert np.array_equal(np.load(tmp_path / "new" / "shard-00000.npy"), np.load(shard))
    text = mine(tmp_path, tiny_model, *args[2:], "--save_path", "store", output="other.jsonl").ends(2)
    assert "the embedding store store was made from something else" in text and "the texts (digest)" in text


def test_the_order_of_rows_changes_no_draw(tmp_path, tiny_model):
    rows = make_rows(40)
    write(tmp_path / "toy.jsonl", rows)
    write(tmp_path / "reversed.jsonl", rows[::-1])
    write(tmp_path / "pool.jsonl", [{"text": text} for row in rows for text in row["pos"] + row["neg"]])
    args = (
        "--candidate_pool",
        "pool.jsonl",
        "--range_for_sampling",
        "2-80",
        "--negative_number",
        5,
        "--use_fp16",
        "False",
        "--write_scores",
    )
    mine(tmp_path, tiny_model, *args).ends()
    mine(tmp_path, tiny_model, *args, name="reversed.jsonl", output="other.jsonl").ends()
    assert_same_negatives(read(tmp_path / "mined.jsonl"), read(tmp_path / "other.jsonl")[::-1])


def test_a_cross_encoder_rescores(tmp_path, tiny_model, tiny_reranker):
    write(tmp_path / "toy.jsonl", make_rows(12))
    args = ("--range_for_sampling", "0-20", "--negative_number", 3, "--sampling", "top", "--use_fp16", "False")
    args += ("--write_scores", "--reranker", tiny_reranker, "--reranker_max_length", 96, "--absolute_margin", 0.1)
    mine(tmp_path, tiny_model, *args, "--fill_random").ends()
    mined = read(tmp_path / "mined.jsonl")
    assert_clean(mined)
    reranker = Reranker(tiny_reranker, max_length=96)
    for row in mined:
        for side in ("pos", "neg"):
            expected = reranker.score([(row["query"], text) for text in row[side]])
            np.testing.assert_allclose(row[f"{side}_scores"], expected, atol=1e-4)
        assert all(score <= min(row["pos_scores"]) - 0.1 + 1e-4 for score in row["neg_scores"])
    assert sum(len(row["neg"]) for row in mined) > 12

    # The scorer alone writes the same scores, and goes on after a kill.
    Job("--reranker_name_or_path", tiny_reranker, "--input_file", "mined.jsonl", "--output_file", "scored.jsonl",
        "--use_fp16", "False", "--reranker_max_length", 96, cwd=tmp_path, script=SCORE).ends()  # fmt: skip
    for one, two in zip(mined, read(tmp_path / "scored.jsonl"), strict=True):
        for side in ("pos_scores", "neg_scores"):
            np.testing.assert_allclose(one.pop(side), two.pop(side), atol=1e-4)
        assert one == two


def test_scoring_killed_and_resumed(tmp_path, tiny_reranker):
    write(tmp_path / "toy.jsonl", make_rows(800))
    args = ("--reranker", tiny_reranker, "--input_file", "toy.jsonl", "--query_instruction_for_rerank", "q: ")
    Job(*args, "--output_file", "whole.jsonl", cwd=tmp_path, script=SCORE).ends()
    job = Job(*args, "--output_file", "scored.jsonl", cwd=tmp_path, script=SCORE)
    part = tmp_path / "scored.jsonl.scoring" / "part-0000001"
    job.wait_until(part.exists)
    job.kill()
    part.write_bytes(b"".join(part.read_bytes().splitlines(keepends=True)[:-1]))  # damaged: it is made again
    text = Job(*args, "--output_file", "scored.jsonl", cwd=tmp_path, script=SCORE, processes=2).ends()
    assert "going on from an interrupted run: 1 of" in text
    assert (tmp_path / "scored.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(TrainingRows([str(tmp_path / "scored.jsonl")])) == 800


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--range_for_sampling", "5"], "--range_for_sampling: the range '5' is not of the form A-B"),
        (["--range_for_sampling", "9-9"], "the range 9-9 is empty"),
        (["--negative_number", "0"], "--negative_number is 0"),
        (["--relative_margin", "-1"], "--relative_margin is -1:"),
        (["--max_positive_overlap", "0"], "--max_positive_overlap is 0:"),
        (["--min_score", "1", "--max_score", "0"], "nothing would be left"),
        (["--sampling", "best"], "'best' is not one of random, top"),
        (["--existing_negatives", "drop"], "'drop' is not one of replace, keep"),
        (["--output_file", "toy.jsonl"], "--output_file toy.jsonl is an input"),
        (["--output_file", "."], "--output_file '.' is not the name of a file"),
        (["--output_file", "out.jsonl.gz"], "it is written as plain JSON lines"),
        (["--input_file", "none.jsonl"], "none.jsonl: no such file or folder"),
        (["--input_file", "broken.jsonl"], 'broken.jsonl:2: "pos" is empty'),
        (["--candidate_pool", "toy.jsonl"], 'toy.jsonl:1: "text" is missing: every candidate is a row {"text": str}'),
        (["--devices", "cuda:0"], "--devices is not available: choose by CUDA_VISIBLE_DEVICES"),
        (["--examples_for_task", "x"], "in-context examples belong to decoders"),
        (["--reranker", "./nowhere"], "--reranker ./nowhere is not a folder"),
        (["--use_fp16", "--use_bf16"], "exclude each other"),
        (["--plot", "x.png"], "--plot needs matplotlib: pip install matplotlib"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(tmp_path, args, expected):
    if "--plot" in args and importlib.util.find_spec("matplotlib"):
        pytest.skip("matplotlib is installed")
    write(tmp_path / "toy.jsonl", make_rows(3))
    write(tmp_path / "broken.jsonl", [{"query": "a", "pos": ["b"]}, {"query": "a", "pos": []}])
    text = mine(tmp_path, "no-such/model", *args).ends(2)
    assert expected in text and "Traceback" not in text and "no-such/model" not in text
    names = ["broken.jsonl", "toy.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("job-")) == names


def test_parquet_that_json_cannot_hold(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from datetime import UTC, datetime

    from pyarrow.parquet import write_table

    rows = [{"query": "a", "pos": ["b"], "when": None}, {"query": "a", "pos": ["b"], "when": datetime.now(UTC)}]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "toy.parquet")
    text = mine(tmp_path, "no-such/model", name="toy.parquet").ends(2)
    assert "toy.parquet:2: the row cannot be written as JSON" in text and not (tmp_path / "mined.jsonl.mining").exists()


def test_mistakes_that_need_the_models(tmp_path, tiny_model):
    write(tmp_path / "toy.jsonl", make_rows(3))
    for args, expected in [
        (("--model_name_or_path", "no-such/model"), "no-such/model"),
        (("--index_factory", "Flatt"), "FAISS cannot build the index 'Flatt'"),
        (("--reranker", tiny_model), "it is no reranker; name a cross-encoder"),
        (("--query_instruction_for_retrieval", "x", "--query_instruction_format_for_retrieval", "{}"), "format '{}'"),
    ]:
        text = mine(tmp_path, tiny_model, *args).ends(2)
        assert expected in text and "Traceback" not in text
        assert not (tmp_path / "mined.jsonl.mining").exists() and not (tmp_path / "mined.jsonl").exists()
    text = mine(tmp_path, tiny_model, "--candidate_pool", "toy.jsonl", processes=2).wait()
    assert text == [2, 2]


def test_help_names_every_flag(run_script):
    done = run_script("mine_hard_negatives.py", "--help", cold=True)
    for flag in ("--embedder_name_or_path", "--relative_margin", "--existing_negatives", "--fill_random", "--plot"):
        assert flag in done.stdout
    assert "--devices" not in done.stdout
    assert "--reranker_name_or_path" in run_script("score_with_reranker.py", "--help").stdout


@pytest.mark.slow
def test_flagembeddings_own_toy_file(tmp_path, tiny_model):
    path = REPO.parent / "shared/datasets/flagembedding_examples/toy_finetune_data.jsonl"
    if not path.exists():
        pytest.skip("FlagEmbedding's examples are not here")
    mine(tmp_path, tiny_model, *DOCUMENTED, name=str(path)).ends()
    assert_clean(read(tmp_path / "mined.jsonl"))


@pytest.mark.slow
def test_torchrun_starts_two(tmp_path, tiny_model, run_script):
    write(tmp_path / "toy.jsonl", make_rows(1100))
    args = ("--model_name_or_path", tiny_model, "--input_file", "toy.jsonl", "--range_for_sampling", "0-50")
    run_script("mine_hard_negatives.py", *args, "--output_file", "one.jsonl")
    run_script("mine_hard_negatives.py", *args, "--output_file", "two.jsonl", processes=2, cold=True)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
