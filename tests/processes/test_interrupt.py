"""Ctrl-C in every long script: the first one ends it in order, the second one at once; children end with their parents."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.repo import REPO
from helpers.warm_start import Job

from bge_accel.encoding.store import EmbeddingStore

WORDS = "king queen forest river castle gold apple wolf bread stone night song mother snow ring ship door star".split()
GOES_ON = "what is done is kept in {}, the same command goes on from there"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = random.Random(0)
    rows = []
    for i in range(6000):
        query, pos, neg = (f"{' '.join(rng.choices(WORDS, k=6))} {kind}{i}" for kind in "qpn")
        rows.append({"query": query, "pos": [pos], "neg": [neg]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for row in rows for text in (row["query"], *row["pos"], *row["neg"]))
    )
    queries = [{"query": row["query"], "positive": row["pos"]} for row in rows[:50]]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (tmp_path / "tmp").mkdir()
    return tmp_path


def start(folder: Path, script: str, *args: object, processes: int = 1) -> Job:
    path = REPO / "scripts" / script
    return Job(*args, cwd=folder, script=path, processes=processes, env={"TMPDIR": str(folder / "tmp")})


def interrupted(job: Job, expected: str) -> None:
    """One line says what is kept, and nothing else is said of it."""
    job.send(signal.SIGINT)
    said = job.ends(130)
    assert said.count("stopped by Ctrl-C") == 1 and f"stopped by Ctrl-C; {expected}\n" in said, said
    assert "Traceback" not in said and "Error" not in said and "Exception" not in said, said


def removed(job: Job, work: Path) -> None:
    """Where its work folder is no folder any more a script ends with one line."""
    work.rename(work.with_suffix(".elsewhere"))
    work.touch()
    said = job.ends(1)
    assert said.count("error: [Errno ") == 1 and "Traceback" not in said, said
    assert said.endswith("; nothing is kept, the same command starts again\n"), said


@pytest.mark.parametrize("processes", [1, 2])
def test_mining(folder: Path, tiny_model: str, processes: int) -> None:
    args = ("--model_name_or_path", tiny_model, "--input_file", "rows.jsonl", "--output_file", "mined.jsonl")
    job = start(folder, "mine_hard_negatives.py", *args, processes=processes)
    job.wait_until(lambda: (folder / "mined.jsonl.mining" / "part-0000001").exists())
    interrupted(job, GOES_ON.format("mined.jsonl.mining"))
    assert not (folder / "mined.jsonl").exists()
    said = start(folder, "mine_hard_negatives.py", *args, processes=processes).ends()
    assert "going on from an interrupted run" in said and (folder / "mined.jsonl").exists()
    assert not list(folder.glob("*.mining")) and not list(folder.glob(".*lock"))
    if processes == 1:  # of several, the first that fails would end the others by torchrun alone
        job = start(folder, "mine_hard_negatives.py", *args)
        job.wait_until(lambda: (folder / "mined.jsonl.mining" / "part-0000001").exists())
        removed(job, folder / "mined.jsonl.mining")


def test_scoring(folder: Path, tiny_model: str) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=64, max_position_embeddings=128, num_labels=1)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "reranker")
    tokenizer.save_pretrained(folder / "reranker")
    args = ("--reranker", "reranker", "--input_file", "rows.jsonl", "--output_file", "scored.jsonl")
    args += ("--max_length", 128)
    job = start(folder, "score_with_reranker.py", *args)
    job.wait_until(lambda: (folder / "scored.jsonl.scoring" / "part-0000001").exists())
    interrupted(job, GOES_ON.format("scored.jsonl.scoring"))
    assert "going on from an interrupted run" in start(folder, "score_with_reranker.py", *args).ends()
    job = start(folder, "score_with_reranker.py", *args)
    job.wait_until(lambda: (folder / "scored.jsonl.scoring" / "part-0000001").exists())
    removed(job, folder / "scored.jsonl.scoring")


@pytest.mark.parametrize("processes", [1, 2])
def test_encoding(folder: Path, tiny_model: str, processes: int) -> None:
    args = ("--model_name_or_path", tiny_model, "--corpus_data", "corpus.jsonl", "--output_dir", "store")
    args += ("--shard_size", 256)
    job = start(folder, "encode_corpus.py", *args, processes=processes)
    job.wait_until(lambda: (folder / "store" / "shard-00001.npy").exists())
    interrupted(job, GOES_ON.format("store"))
    assert "are in store already" in start(folder, "encode_corpus.py", *args, processes=processes).ends()
    assert len(EmbeddingStore(str(folder / "store"))) == 18000


def test_evaluation(folder: Path, tiny_model: str) -> None:
    args = ("--encoder", tiny_model, "--corpus_data", "corpus.jsonl", "--query_data", "queries.jsonl")
    job = start(folder, "evaluate_retrieval.py", *args)
    job.wait_until(lambda: "judged queries" in job.text)
    interrupted(job, "nothing is kept, the same command starts again")
    args += ("--save_embedding", "--save_path", "store")
    job = start(folder, "evaluate_retrieval.py", *args)
    job.wait_until(lambda: (folder / "store" / "shard-00000.npy").exists())
    interrupted(job, GOES_ON.format("store"))
    assert not (folder / "metrics.json").exists()
    start(folder, "evaluate_retrieval.py", *args).ends()
    assert (folder / "metrics.json").exists()


def test_merging(folder: Path, tiny_model: str) -> None:
    """In the middle of a search, of which nothing is left."""
    args = ("--model_names_or_paths", tiny_model, tiny_model, "--search", "--dev_corpus", "corpus.jsonl")
    job = start(folder, "mix_models.py", *args, "--dev_queries", "queries.jsonl", "--output_path", "mixed")
    job.wait_until(lambda: "0.000" in job.text)
    interrupted(job, "nothing is kept, the same command starts again")
    assert not (folder / "mixed").exists() and not list((folder / "tmp").iterdir())


# ---- children


def processes_that_name(text: str) -> list[str]:
    """Command lines of the running processes in which a text stands."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if text in line and state != "Z":
                found.append(line)
    return found


def are_gone(text: str) -> bool:
    """Whether no such process is left, a killed one given the time that it takes to end."""
    for _ in range(100):
        if not processes_that_name(text):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_doctor_takes_its_child_and_its_folder_along(folder: Path, tiny_model: str, number: int) -> None:
    args = ("--model_name_or_path", tiny_model, "--train_data", "rows.jsonl", "--output_dir", "out", "--use_cpu")
    job = start(folder, "doctor.py", *args)
    child = str(folder / "tmp" / "bge_accel_doctor_")
    job.wait_until(lambda: any("finetune.py" in line for line in processes_that_name(child)))
    job.send(number)
    said = job.ends(128 + number)
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert f"stopped by {name}; nothing is kept\n" in said and "Traceback" not in said, said
    assert are_gone(child) and not list((folder / "tmp").glob("bge_accel_doctor_*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demonstration_ends_with_what_it_runs(folder: Path, number: int) -> None:
    job = start(folder, "demo.py", "--output_dir", folder / "demo")
    child = str(folder / "demo")
    job.wait_until(lambda: any("build_code_search.py" in line for line in processes_that_name(child)))
    job.send(number)
    said = job.ends(128 + number)
    assert f"what is done is in {folder / 'demo'}, the same command starts again\n" in said, said
    assert "Traceback" not in said and are_gone(child), said


CLINGS = """
import signal, subprocess, sys, time
from bge_accel.processes.signals import interruptible
from bge_accel.processes.children import run_child
with interruptible("nothing"):
    try:
        run_child([sys.executable, "-c", "import time; print('runs', flush=True); time.sleep(1000)", "{name}"], ends_by=0)
    finally:
        time.sleep(1000)
"""


def test_a_second_one_ends_it_at_once_with_its_child(tmp_path: Path) -> None:
    name = f"child-of-{os.getpid()}"
    code = CLINGS.format(name=name)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "runs\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # the launcher's, of the same press
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert not processes_that_name(name)


def test_one_after_the_end_brings_no_traceback() -> None:
    """All is done, and the interpreter is about to end."""
    code = "import os, signal\nfrom bge_accel.processes.signals import interruptible\nwith interruptible():\n    print('done', flush=True)"
    code += "\nos.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "done\n", "")
