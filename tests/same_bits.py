"""Do two commits train, mine, merge and measure to the same bits?

    python tests/same_bits.py OLD          # against the working tree
    python tests/same_bits.py OLD NEW      # two commits
    python tests/same_bits.py OLD --only "two processes" fsdp2

Each case runs in both, side by side, and every file it leaves is compared by its SHA-256: weights, optimiser, state, rows,
metrics, cards. The timings and the memory in logs and metrics are left out. Then NEW goes on from what OLD has begun:
checkpoints, an embedding store, a cache of rows, a mining folder. Status 1 where anything differs.

It proves that a refactoring changes nothing. It needs no network and takes a few minutes on two cores.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import accelerate.commands.launch
from helpers.models import build_tiny_model
from helpers.repo import REPO
from helpers.warm_start import Job

HERE = Path(__file__).resolve().parent
OWN_LIBRARY, ON_CPU = HERE / "helpers" / "own_library.py", HERE / "helpers" / "on_cpu.py"
VOLATILE = (
    "queries_per_second tokens_per_second tflops mfu memory_gb eval_seconds seconds peak_memory_gb versions created "
    "finished date host started timings"
).split()
"""Keys of JSON files that differ from run to run."""


@dataclass
class Case:
    """A command that is run by both commits."""

    args: str
    script: str = "finetune.py"
    processes: int = 1
    env: dict[str, str] = field(default_factory=dict)
    launched_by: str | None = None
    """A file of configs/accelerate; without a GPU sharding needs `on_cpu.py`."""
    after: str | None = None
    """The case in whose folder it runs; it needs what that one leaves."""
    resumes: bool = False
    """Whether NEW goes on from OLD's first checkpoint too."""


TRAIN = (
    "--model_name_or_path MODEL --output_dir out --per_device_train_batch_size 8 --train_group_size 2 --query_max_len 16 "
    "--passage_max_len 32 --max_tokens_per_micro_batch 260 --learning_rate 1e-3 --logging_steps 1 --disable_tqdm "
    "--max_steps 8 --save_steps 3 --activation_memory_budget 1 "
)
ROWS = TRAIN + "--train_data DATA/rows.jsonl "
SOURCES = TRAIN + "--train_data DATA/sources.yaml "
STREAMS = TRAIN + "--train_data DATA/streams.yaml "
ENCODING = "--pooling_method mean --max_query_length 16 --max_passage_length 32 "
EVALUATE = f"--corpus_data DATA/beir --k 20 --output_file metrics.json {ENCODING}"


def cases() -> dict[str, Case]:
    """All cases by name."""
    return {
        "one process": Case(ROWS, resumes=True),
        "two processes": Case(ROWS + "--negatives_cross_device", processes=2, resumes=True),
        "epochs": Case(ROWS + "--max_steps -1 --num_train_epochs 1.5 --save_strategy epoch --warmup_steps 3"),
        "accumulation": Case(ROWS + "--gradient_accumulation_steps 3", resumes=True),
        "several sources": Case(SOURCES + "--sampling_temperature 2", resumes=True),
        "several sources, two processes": Case(SOURCES, processes=2),
        "mixed sources": Case(STREAMS + "--mix_sources", resumes=True),
        "mixed sources, two processes": Case(STREAMS + "--mix_sources --negatives_cross_device", processes=2),
        "a source a file": Case(TRAIN + "--train_data DATA/a.jsonl DATA/b.jsonl --same_dataset_within_batch"),
        "streaming": Case(STREAMS + "--streaming --shuffle_buffer_size 16", resumes=True),
        "streaming, two processes": Case(
            STREAMS + "--streaming --shuffle_buffer_size 16 --negatives_cross_device", processes=2, resumes=True
        ),
        "distillation": Case(TRAIN + "--train_data DATA/scored.jsonl --knowledge_distillation"),
        "no negatives in the batch": Case(ROWS + "--use_inbatch_neg False"),
        "no masks": Case(ROWS + "--mask_false_negatives False"),
        "instructions": Case(
            ROWS + "--query_instruction_for_retrieval is: --passage_instruction_for_retrieval a: --shuffle_ratio 0.5 "
            "--fix_position_embedding"
        ),
        "mean": Case(ROWS + "--sentence_pooling_method mean"),
        "last token": Case(ROWS + "--sentence_pooling_method last_token --normalize_embeddings False"),
        "no dropout": Case(ROWS.replace("MODEL", "STEADY")),
        "bf16": Case(ROWS + "--bf16", resumes=True),
        "pure bf16": Case(ROWS + "--pure_bf16", resumes=True),
        "pure bf16, two processes": Case(ROWS + "--pure_bf16 --negatives_cross_device", processes=2),
        "float16": Case(ROWS, env={"CPU_LOSS_SCALE": "65536"}),
        "padded": Case(ROWS + "--attention padded --pad_to_multiple_of 8"),
        "plain": Case(ROWS + "--attention plain"),
        "cpu": Case(ROWS + "--attention cpu"),
        "gradient checkpointing": Case(ROWS + "--gradient_checkpointing"),
        "budget 0": Case(ROWS + "--activation_memory_budget 0"),
        "part of the budget": Case(ROWS + "--activation_memory_budget 0.0015", resumes=True),
        "schedule and optimiser": Case(
            ROWS
            + "--lr_scheduler_type cosine --weight_decay 0.1 --adam_beta1 0.8 --adam_beta2 0.99 --adam_epsilon 1e-6 "
            "--max_grad_norm 0.1 --optim adamw_torch"
        ),
        "evaluation": Case(
            ROWS + "--eval_data DATA/beir DATA/dev.jsonl --eval_steps 2 --eval_on_start --load_best_model_at_end",
            resumes=True,
        ),
        "evaluation, two processes": Case(
            ROWS + "--eval_data DATA/beir --eval_steps 2 --early_stopping_patience 2 --load_best_model_at_end",
            processes=2,
        ),
        "fsdp2": Case(ROWS + "--negatives_cross_device", processes=2, launched_by="fsdp2", resumes=True),
        "zero2": Case(ROWS + "--negatives_cross_device", processes=2, launched_by="zero2", resumes=True),
        "mining": Case(MINE, "mine_hard_negatives.py"),
        "mining, two processes": Case(MINE, "mine_hard_negatives.py", processes=2),
        "mining by score": Case(
            MINE
            + "--sampling top --relative_margin 0.05 --max_score 0.99 --existing_negatives keep --reranker RERANKER "
            "--candidate_pool DATA/pool.jsonl --save_path store",
            "mine_hard_negatives.py",
        ),
        "scoring": Case(
            "--reranker RERANKER --input_file DATA/rows.jsonl --output_file scored.jsonl", "score_with_reranker.py"
        ),
        "encoding": Case(ENCODE, "encode_corpus.py"),
        "encoding, two processes": Case(ENCODE, "encode_corpus.py", processes=2),
        "measuring": Case(f"--encoder MODEL STEADY --save_run a.txt b.txt {EVALUATE}", "evaluate_retrieval.py"),
        "measuring, two processes": Case(
            f"--encoder MODEL --save_embedding --save_path store --num_processes 2 {EVALUATE}", "evaluate_retrieval.py"
        ),
        "merging": Case("--model_names_or_paths MODEL STEADY --weights 0.3 0.7 --output_path merged", "mix_models.py"),
        "merging by examples": Case(
            "--model_names_or_paths MODEL STEADY --example_data DATA/dev.jsonl --output_path merged --max_input_length 32",
            "mix_models.py",
        ),
        "merging by search": Case(
            "--model_names_or_paths MODEL STEADY --search --search_steps 3 --dev_data DATA/dev.jsonl --output_path merged "
            "--max_input_length 32",
            "mix_models.py",
        ),
        "merging checkpoints": Case(
            "--run_dir out --last_checkpoints 2 --output_path merged", "mix_models.py", after="one process"
        ),
    }


MINE = (
    "--model_name_or_path MODEL --input_file DATA/rows.jsonl --output_file mined.jsonl --range_for_sampling 2-40 "
    "--negative_number 5 --pooling_method mean --search_batch_size 7 "
)
ENCODE = "--model_name_or_path MODEL --corpus_data DATA/pool.jsonl --output_dir store --max_length 32 --shard_size 20 "


@cache
def launched_by(config: str) -> dict[str, str]:
    """What `accelerate launch` tells its processes of one of the repository's configurations."""
    launch, file = accelerate.commands.launch.__file__, REPO / "configs" / "accelerate" / f"{config}.yaml"
    command = [sys.executable, launch, "--config_file", file, "--num_processes", "1", "--mixed_precision", "no"]
    told = subprocess.run([*command, "--no_python", "env"], capture_output=True, text=True, check=True).stdout
    pairs = (line.partition("=") for line in told.splitlines())
    return {name: value for name, _, value in pairs if name.startswith(("ACCELERATE_", "FSDP_"))}


def write_data(folder: Path) -> dict[str, Path]:
    """The models and rows of all cases; what stands for them in the commands."""
    folder.mkdir(parents=True)
    from transformers import BertConfig, BertForSequenceClassification

    build_tiny_model(folder / "model")
    build_tiny_model(folder / "steady", dropout=0.0, seed=1)
    build_tiny_model(folder / "reranker")
    config = BertConfig.from_pretrained(folder / "reranker", num_labels=1, initializer_range=0.5)
    BertForSequenceClassification(config).save_pretrained(folder / "reranker")
    rows = make_rows(64)
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "dev.jsonl", make_rows(30, seed=9))
    for seed, (name, count) in enumerate({"a": 20, "b": 90}.items(), start=1):
        write_lines(folder / f"{name}.jsonl", make_rows(count, seed=seed))
    scores = {"pos_scores": [2.0, 1.5], "neg_scores": [0.5, 0.1, -1.0]}
    write_lines(folder / "scored.jsonl", [row | scores for row in rows])
    sources = [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in "ab"]
    (folder / "streams.yaml").write_text(json.dumps(sources))
    sources[0] |= {"per_device_train_batch_size": 4, "query_instruction_for_retrieval": "Find: "}
    sources[1] |= {"train_group_size": 3, "use_inbatch_neg": False}
    (folder / "sources.yaml").write_text(json.dumps(sources))
    texts = list(dict.fromkeys(text for row in rows for text in row["pos"] + row["neg"]))
    write_lines(folder / "pool.jsonl", [{"text": text} for text in texts])
    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True)
    write_lines(beir / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)])
    write_lines(beir / "queries.jsonl", [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows)])
    judged = [f"q{i}\td{texts.index(row['pos'][0])}\t1\n" for i, row in enumerate(rows)]
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    models = {name.upper(): folder / name for name in ("model", "steady", "reranker")}
    return {"DATA": folder, **models}


WORDS = "king princess story list string file value return who what how".split()


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of two positives and three negatives, which share some of their words."""
    rng = random.Random(seed)

    def text(longest: int = 20) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, longest)))

    rows = []
    for i in range(count):
        about = text(4)
        positives = [f"it was {about} {i} {j} {text()}" for j in range(2)]
        rows.append(
            {"query": f"who saw {about} {i}?", "pos": positives, "neg": [f"{text(12)} {i} {j}" for j in range(3)]}
        )
    return rows


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- running


def arguments(case: Case, names: dict[str, Path]) -> list[str]:
    """The arguments of a command; words in capitals stand for folders of the data."""
    return [
        re.sub(r"\b[A-Z]{4,}\b", lambda found: str(names.get(found[0], found[0])), part) for part in case.args.split()
    ]


@dataclass
class Tree:
    """A commit that is checked out."""

    code: Path
    work: Path
    names: dict[str, Path]

    def start(self, name: str, case: Case, *more: str, folder: Path | None = None) -> Job:
        """Starts a case in its folder."""
        folder = folder or self.folder(name, case)
        folder.mkdir(parents=True, exist_ok=True)
        env = {"XDG_CACHE_HOME": str(self.work / "cache"), "DS_ACCELERATOR": "cpu", **case.env}
        env |= launched_by(case.launched_by) if case.launched_by else {}
        script = self.code / "scripts" / case.script
        return Job(
            *arguments(case, self.names), *more, cwd=folder, script=script, through=(OWN_LIBRARY, ON_CPU), processes=case.processes, env=env,
            output=self.work / f"{name}.out",
        )  # fmt: skip

    def folder(self, name: str, case: Case) -> Path:
        return self.work / (case.after or name)


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The folder of a commit; "." is the working tree."""
    if commit == ".":
        yield REPO
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        subprocess.run(["git", "-C", REPO, "worktree", "add", "-q", "--detach", path, commit], check=True)
        try:
            yield path
        finally:
            subprocess.run(["git", "-C", REPO, "worktree", "remove", "--force", path], check=True)


# ---- comparing


def without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_volatile(item) for key, item in value.items() if key not in VOLATILE}
    return [without_volatile(item) for item in value] if isinstance(value, list) else value


def digest(path: Path) -> str:
    """SHA-256 of a file; of JSON, of all but what differs from run to run."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        content = b"\n".join(json.dumps(without_volatile(json.loads(line)), sort_keys=True).encode() for line in lines)
    return hashlib.sha256(content).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Of every file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "job.out")
    }


def compare(old: Path, new: Path) -> list[str]:
    """What differs between two folders, a line a file."""
    ours, theirs = digests(new), digests(old)
    differ = [f"{name} differs" for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]
    return sorted([*differ, *(f"{name} is in one alone" for name in ours.keys() ^ theirs.keys())])


# ---- NEW goes on with what OLD has begun


def resumed(name: str, case: Case, old: Tree, new: Tree) -> list[str]:
    """From OLD's checkpoint, NEW ends with the same weights, checkpoints and log."""
    source, target = old.folder(name, case), new.work / f"{name} resumed"
    shutil.copytree(source, target)
    out = target / "out"
    for path in out.glob("checkpoint-*"):
        if path.name != "checkpoint-3":
            shutil.rmtree(path)
    for gone in ("model.safetensors", "saved_model.json"):
        (out / gone).unlink(missing_ok=True)
    text = new.start(f"{name} resumed", case, "--resume_from_checkpoint", "latest", folder=target).ends(timeout=400)
    if "going on after step" not in text:
        return [f"it did not go on: {text[-300:]}"]
    kept = lambda folder: {  # noqa: E731
        name: sha for name, sha in digests(folder).items()
        if name.endswith("model.safetensors") or "optimizer" in name or name.endswith("train_log.jsonl")
    }  # fmt: skip
    ours, theirs = kept(out), kept(source / "out")
    return [f"{name} differs after resuming" for name in theirs if ours.get(name) != theirs[name]]


def killed(case: Case, name: str, old: Tree, new: Tree, begun: str) -> list[str]:
    """OLD is killed once it has written a file that matches `begun`; NEW ends as OLD's whole run has."""
    folder = new.work / f"{name} killed"
    job = old.start(f"{name} killed", case, folder=folder)
    job.wait_until(lambda: bool(list(folder.glob(begun))))
    job.kill()
    (part,) = list(folder.glob(begun))[:1]
    before = part.stat().st_mtime_ns
    kept = folder.glob(begun)
    new.start(f"{name} killed", case, folder=folder).ends()
    problems = compare(old.folder(name, case), folder)
    still = {path: path.stat().st_mtime_ns for path in kept if path.exists()}
    if still and still.get(part, before) != before:
        problems.append(f"{part.name} was written again")
    return problems


def cached(case: Case, old: Tree, new: Tree) -> list[str]:
    """NEW trains from the rows that OLD has cached, and writes none of them again."""
    cache, folder = old.work / "cache", new.work / "rows cached"
    stamps = lambda: {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}  # noqa: E731
    before = stamps()
    new.start("rows cached", replace(case, env={"XDG_CACHE_HOME": str(cache)}), folder=folder).ends()
    problems = compare(old.folder("one process", case) / "out", folder / "out")
    return problems if before and stamps() == before else [*problems, "the cache was written again"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default=".")
    parser.add_argument("--only", nargs="*", help="cases whose names contain one of these")
    parser.add_argument("--keep", help="a folder that keeps all that is written")
    given = parser.parse_args()
    wanted: Callable[[str], bool] = lambda name: not given.only or any(part in name for part in given.only)  # noqa: E731
    os.environ["GIT_OPTIONAL_LOCKS"] = "0"
    bad = 0
    with (
        checked_out(given.old) as old_code,
        checked_out(given.new) as new_code,
        tempfile.TemporaryDirectory() as temporary,
    ):
        work = Path(given.keep or temporary).resolve()
        names = write_data(work / "data")
        old, new = Tree(old_code, work / "old", names), Tree(new_code, work / "new", names)

        def report(name: str, problems: list[str]) -> None:
            nonlocal bad
            bad += bool(problems)
            print(f"{'DIFFERS' if problems else 'same   '}  {name}", *problems[:12], sep="\n         ", flush=True)

        for tree in (old, new):
            tree.work.mkdir()
        everything = cases()
        for name, case in everything.items():
            if not wanted(name):
                continue
            if case.launched_by == "zero2" and importlib.util.find_spec("deepspeed") is None:
                print(f"skipped  {name}: DeepSpeed is not installed")
                continue
            jobs = [tree.start(name, case) for tree in (old, new)]
            texts = [job.ends(timeout=400) for job in jobs]
            del texts
            report(name, compare(old.folder(name, case), new.folder(name, case)))
        for name, case in everything.items():
            if case.resumes and wanted(name):
                report(f"{name}: OLD's checkpoint", resumed(name, case, old, new))
        if wanted("one process"):
            report("one process: OLD's cache of rows", cached(everything["one process"], old, new))
        for name, begun in (("mining", "mined.jsonl.mining/part-*"), ("encoding", "store/*shard*")):
            if wanted(name):
                report(f"{name}: what OLD has begun", killed(everything[name], name, old, new, begun))
    print(f"{bad} differ" if bad else "the same to the bit")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
