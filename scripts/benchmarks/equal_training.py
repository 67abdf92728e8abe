"""How good is a model after the same training by this project, by FlagEmbedding and by sentence-transformers?

    python scripts/mine_hard_negatives.py --model_name_or_path MODEL --input_file train.jsonl --output_file mined.jsonl \\
        --range_for_sampling 5-50 --negative_number 3
    python scripts/benchmarks/equal_training.py --model_name_or_path MODEL --train_data mined.jsonl \\
        --queries queries.jsonl --corpus corpus.jsonl --qrels qrels.tsv --seeds 1 2 3 4 5 6 7 8 9 10

Every tool starts from the same weights and gets the same rows, lengths, pooling, temperature, batch size, steps, learning rate,
schedule and clipping, float32, and the model's own dropout. Each draws its order of rows, its negatives and its dropout by
itself from the seed. A training is a process of its own in the tool's own environment. The tuned models are encoded by
sentence-transformers and scored by pytrec_eval, whoever tuned them.

The table has the mean over the seeds, the standard deviation, and the difference to this project's mean with its 95 % interval
(Welch's t: the seeds of different tools have nothing in common). What is there already is not run again: the same command with
more seeds adds to it.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from bge_accel.config import option, parse_config, required, user_errors
from bge_accel.files.atomic import atomic_file

TOOLS = ("bge_accel", "FlagEmbedding", "sentence-transformers")


@dataclass(kw_only=True)
class Config:
    """What to train on, and how."""

    model_name_or_path: str = required("folder of an encoder with mean pooling")
    train_data: str = required("rows with negatives (.jsonl)")
    queries: str = required('test queries: lines of {"id", "query"}')
    corpus: str = required('passages to search: lines of {"id", "content"}')
    qrels: str = required("judgements: query-id, corpus-id, score, tab separated, with a header")
    seeds: list[int] = option([1, 2, 3], "one training of each tool for each", at_least=0, at_most=2**32 - 1)
    tools: list[str] = option(list(TOOLS), "the tools to compare")
    steps: int = option(80, "optimiser steps", at_least=1)
    batch_size: int = option(16, "queries in a batch", at_least=1)
    train_group_size: int = option(2, "passages per query: 1 positive and N - 1 negatives", at_least=1)
    query_max_len: int = option(32, "tokens that a query is cut to", at_least=1)
    passage_max_len: int = option(64, "tokens that a passage is cut to", at_least=1)
    learning_rate: float = option(5e-5, "peak of a linear schedule", above=0, at_most=1)
    warmup_steps: int = option(8, "steps in which the rate rises", at_least=0)
    temperature: float = option(0.02, "similarities are divided by it", above=0)
    at_once: int = option(1, "trainings side by side, each with its share of the cores", at_least=1)
    peers_python: str = option(".venv-peers/bin/python", "Python that has the other tools (requirements.txt here)")
    output_dir: str = option("outputs/equal_training", "equal_training.json, and the logs of the trainings")


def read_lines(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def training_job(cfg: Config, tool: str, seed: int, output_dir: str, result: str) -> dict:
    """What tools.py is told of one training."""
    names = "model_name_or_path train_data batch_size train_group_size query_max_len passage_max_len temperature"
    arguments = {"max_steps": cfg.steps, "learning_rate": cfg.learning_rate, "warmup_steps": cfg.warmup_steps}
    arguments |= {"lr_scheduler_type": "linear", "weight_decay": 0.0, "max_grad_norm": 1.0, "optim": "adamw_torch"}
    return {
        **{name: getattr(cfg, name) for name in names.split()},
        **{"task": "tune", "tool": tool, "output_dir": output_dir, "result": result},
        **{"pooling": "mean", "precision": "fp32", "use_cpu": True, "mini_batch_size": None},
        "arguments": arguments | {"seed": seed, "logging_steps": 10},
    }


def sentence_transformer(folder: str, max_length: int):  # type: ignore[no-untyped-def]
    """Any tool's model, with mean pooling and normalised, in sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    encoder = Transformer(folder, max_seq_length=max_length)
    pooling = Pooling(encoder.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[encoder, pooling, Normalize()], device="cpu")


def evaluate(cfg: Config, folder: str) -> dict[str, float]:
    """nDCG@10 and the reciprocal rank of a model, by code that is none of the compared tools' training."""
    import numpy as np
    import pytrec_eval

    qrels: dict[str, dict[str, int]] = {}
    for line in Path(cfg.qrels).read_text(encoding="utf-8").splitlines()[1:]:
        query, passage, score = line.split("\t")
        qrels.setdefault(query, {})[passage] = int(score)
    corpus, queries = read_lines(cfg.corpus), [row for row in read_lines(cfg.queries) if row["id"] in qrels]
    model = sentence_transformer(folder, cfg.passage_max_len)
    p_emb = model.encode([row["content"] for row in corpus], batch_size=64)
    model.max_seq_length = cfg.query_max_len
    q_emb = model.encode([row["query"] for row in queries], batch_size=64)
    run = {}
    for row, scores in zip(queries, np.float64(q_emb) @ np.float64(p_emb).T, strict=True):
        best = np.argpartition(-scores, min(100, len(corpus) - 1))[:100]
        run[row["id"]] = {corpus[i]["id"]: float(scores[i]) for i in best}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "recip_rank"}).evaluate(run)
    return {name: mean(of[name] for of in found.values()) for name in ("ndcg_cut_10", "recip_rank")}


# ---- all trainings


def run_one(cfg: Config, tool: str, seed: int) -> dict:
    """Trains and scores in processes of their own; tool "none" scores the model as it is."""
    logs = Path(cfg.output_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // cfg.at_once)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(dir=cfg.output_dir) as folder, open(logs / f"{tool}-{seed}.log", "w") as log:

        def start(command: list[str]) -> None:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            if done.returncode:
                raise SystemExit(f"{tool}, seed {seed}: failed; see {log.name}")

        model = cfg.model_name_or_path
        if tool != "none":
            model = f"{folder}/model"
            python = sys.executable if tool == "bge_accel" else cfg.peers_python
            job = json.dumps(training_job(cfg, tool, seed, model, f"{folder}/training.json"))
            start([python, str(Path(__file__).with_name("tools.py")), job])
        start([sys.executable, __file__, "--score", json.dumps(asdict(cfg)), model, f"{folder}/result.json"])
        return {"tool": tool, "seed": seed, **json.loads(Path(f"{folder}/result.json").read_text())}


def summary(results: list[dict], metric: str = "ndcg_cut_10") -> str:
    """A Markdown table of the tools: mean, spread, and the difference to ours with its 95 % interval."""
    from scipy.stats import t

    lines = ["| | seeds | nDCG@10 | standard deviation | difference to bge_accel | 95 % interval |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    values = {tool: [row[metric] for row in results if row["tool"] == tool] for tool in ("none", *TOOLS)}
    ours = values["bge_accel"]
    for tool, theirs in values.items():
        name = "before training" if tool == "none" else tool
        if len(theirs) < 2:
            lines += [f"| {name} | {len(theirs)} | {theirs[0]:.4f} | | | |"] if theirs else []
            continue
        difference = interval = ""
        if tool != "bge_accel" and len(ours) > 1:
            parts = [stdev(of) ** 2 / len(of) for of in (ours, theirs)]
            error = math.sqrt(sum(parts))
            freedom = sum(parts) ** 2 / sum(
                part**2 / (len(of) - 1) for part, of in zip(parts, (ours, theirs), strict=True)
            )
            center, half = mean(theirs) - mean(ours), t.ppf(0.975, freedom) * error
            difference, interval = f"{center:+.4f}", f"{center - half:+.4f} .. {center + half:+.4f}"
        lines.append(
            f"| {name} | {len(theirs)} | {mean(theirs):.4f} | {stdev(theirs):.4f} | {difference} | {interval} |"
        )
    return "\n".join(lines)


def main(cfg: Config) -> None:
    with user_errors():
        for path in (cfg.train_data, cfg.queries, cfg.corpus, cfg.qrels):
            if not os.path.isfile(path):
                raise ValueError(f"{path} is not a file")
        if unknown := set(cfg.tools) - set(TOOLS):
            raise ValueError(f"--tools {sorted(unknown)[0]} is not one of {', '.join(TOOLS)}")
        if set(cfg.tools) != {"bge_accel"} and shutil.which(cfg.peers_python) is None:
            raise ValueError(f"--peers_python {cfg.peers_python} is no Python; `make peers` makes one")
    path = Path(cfg.output_dir) / "equal_training.json"
    settings = {name: value for name, value in asdict(cfg).items() if name not in ("seeds", "tools", "at_once")}
    content = json.loads(path.read_text()) if path.exists() else {"settings": settings, "results": []}
    with user_errors():
        if content["settings"] != settings:
            raise ValueError(f"{path} is of other settings; name another --output_dir")
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    done = {(row["tool"], row["seed"]) for row in content["results"]}
    wanted = [("none", 0), *((tool, seed) for seed in cfg.seeds for tool in cfg.tools)]
    with ThreadPoolExecutor(cfg.at_once) as pool:
        for result in pool.map(lambda job: run_one(cfg, *job), [job for job in wanted if job not in done]):
            content["results"].append(result)
            print(f"{result['tool']}, seed {result['seed']}: nDCG@10 {result['ndcg_cut_10']:.4f}", flush=True)
            with atomic_file(str(path)) as file:
                json.dump(content, file, indent=1)
    print(summary(content["results"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--score"]:
        Path(sys.argv[4]).write_text(json.dumps(evaluate(Config(**json.loads(sys.argv[2])), sys.argv[3])))
    else:
        main(parse_config(Config, description=__doc__.split("\n")[0]))
