"""data/split_rows.py: what is held out has nothing in common with what is trained on."""

import json
import random
import subprocess
import sys
from pathlib import Path

from helpers.repo import REPO, Run


def split(*args: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "data" / "split_rows.py"), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_nothing_is_on_both_sides(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"query": f"Q {rng.randrange(150)}", "pos": [f"p{rng.randrange(300)}"], "neg": ["n"]} for _ in range(200)]
    rows[3]["query"], rows[7]["query"] = "Same  query", "same query"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = split("--input_file", "rows.jsonl", "--held_out", 20, "--output_dir", "out", cwd=tmp_path)
    train, dev = lines(tmp_path / "out/train.jsonl"), lines(tmp_path / "out/dev.jsonl")
    assert sorted(map(json.dumps, train + dev)) == sorted(map(json.dumps, rows)) and len(dev) >= 20 and train
    assert f"{len(train)} rows to train on, {len(dev)} held out" in done.stdout
    texts = [
        {" ".join(t.lower().split()) for row in side for t in (row["query"], *row["pos"])} for side in (train, dev)
    ]
    assert not texts[0] & texts[1]
    assert {row["content"] for row in lines(tmp_path / "out/corpus.jsonl")} == {"n", *(row["pos"][0] for row in rows)}
    queries = lines(tmp_path / "out/queries.jsonl")
    assert [(q["query"], q["positive"]) for q in queries] == [(row["query"], row["pos"]) for row in dev]
    split("--input_file", "rows.jsonl", "--held_out", 20, "--output_dir", "deep/again", cwd=tmp_path)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "deep" / "again" / path.name).read_bytes()


def test_what_it_writes_is_evaluated(tmp_path: Path, tiny_model: str, run_script: Run) -> None:
    """And rows for training are, as they stand."""
    rows = [{"query": f"question {i}", "pos": [f"answer {i}"]} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split("--input_file", "rows.jsonl", "--held_out", 10, "--output_dir", "out", cwd=tmp_path)
    found = []
    for queries in ("out/queries.jsonl", "out/dev.jsonl"):
        run_script(
            *("evaluate_retrieval.py", "--encoder", tiny_model, "--corpus_data", "out/corpus.jsonl"),
            *("--query_data", queries, "--output_file", "metrics.json"),
        )
        found.append(json.loads((tmp_path / "metrics.json").read_text()))
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["counts"]["judged_queries"] == 10 and found[0]["counts"]["corpus"] == 30


def test_what_cannot_be_split_is_said(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"query": "a", "pos": ["x"]}\n{"query": "b", "pos": ["x"]}\n')
    done = split("--input_file", "rows.jsonl", "--output_dir", "out", cwd=tmp_path, status=2)
    assert "--held_out 200 of 2 rows: there are too few" in done.stderr and not (tmp_path / "out").exists()
    (tmp_path / "bad.jsonl").write_text('{"query": "a"}\n')
    done = split("--input_file", "bad.jsonl", "--output_dir", "out", cwd=tmp_path, status=2)
    assert 'bad.jsonl:1: "pos" is missing' in done.stderr
    assert (
        "did you mean bad.jsonl?"
        in split("--input_file", "bda.jsonl", "--output_dir", "out", cwd=tmp_path, status=2).stderr
    )


def test_a_split_is_overwritten_only_when_told_so(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"query": "q{i}", "pos": ["p{i}"]}}\n' for i in range(40)))
    args = ("--input_file", "rows.jsonl", "--held_out", 10, "--output_dir", "out", "--seed")
    split(*args, 1, cwd=tmp_path)
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "corpus.jsonl").unlink()
    said = split(*args, 2, cwd=tmp_path, status=2).stderr
    assert "--output_dir out holds train.jsonl, dev.jsonl, queries.jsonl:" in said and "--overwrite" in said
    assert (tmp_path / "out" / "dev.jsonl").read_bytes() == first["dev.jsonl"]
    split(*args, 2, "--overwrite", cwd=tmp_path)
    assert (tmp_path / "out" / "dev.jsonl").read_bytes() != first["dev.jsonl"]
    args = ("--input_file", "out/train.jsonl", "--held_out", 5, "--output_dir", "out", "--overwrite")
    assert "out/train.jsonl is an input" in split(*args, cwd=tmp_path, status=2).stderr
