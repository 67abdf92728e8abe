"""What each setting of a training moves: one is changed at a time, on the demonstration's data.

    python scripts/benchmarks/sweep.py
    python scripts/benchmarks/sweep.py --only temperature --model_name_or_path BAAI/bge-small-en-v1.5

Every run tunes the model with scripts/finetune.py, measures it on held-out functions with scripts/evaluate_retrieval.py
and stays in --output_dir, where a sweep that was stopped goes on. The table compares each with the first run, query by
query; "by chance" are two runs that differ from it in their seed alone. All runs see as many queries, save those that
say otherwise. About three minutes a run on two cores.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from bench import packaged_model  # beside this file

from bge_accel.config import check_model_path, option, parse_config, user_errors

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
FINETUNE, MINE, EVALUATE = (
    os.path.join(ROOT, "scripts", f"{name}.py") for name in ("finetune", "mine_hard_negatives", "evaluate_retrieval")
)
INSTRUCTION = "Represent this sentence for searching relevant passages: "

# Flags of the first run; the others change them. A group larger than 1 takes mined negatives.
FIRST = {
    "per_device_train_batch_size": 64,
    "max_steps": 50,
    "temperature": 0.04,
    "learning_rate": 1e-4,
    "train_group_size": 1,
    "passage_max_len": 64,
    "seed": 42,
}
RUNS: dict[str, dict[str, object]] = {
    "first": {},
    "by chance, seed 1": {"seed": 1},
    "by chance, seed 2": {"seed": 2},
    "temperature 0.01": {"temperature": 0.01},
    "temperature 0.02": {"temperature": 0.02},
    "temperature 0.1": {"temperature": 0.1},
    "batch 16, 200 steps": {"per_device_train_batch_size": 16, "max_steps": 200},
    "batch 256, 13 steps": {"per_device_train_batch_size": 256, "max_steps": 13},
    "learning rate 1e-5": {"learning_rate": 1e-5},
    "learning rate 3e-5": {"learning_rate": 3e-5},
    "learning rate 3e-4": {"learning_rate": 3e-4},
    "steps 25": {"max_steps": 25},
    "group 2, places 5-50": {"train_group_size": 2},
    "instruction": {"query_instruction_for_retrieval": INSTRUCTION},
    "length 128": {"passage_max_len": 128},
}


@dataclass(kw_only=True)
class Config:
    """Which runs, from what model."""

    model_name_or_path: str | None = option(None, "encoder to start from; default: the packaged all-MiniLM-L6-v2")
    output_dir: str = option("outputs/sweep", "data, models, rankings, sweep.json")
    only: list[str] = option([], "runs whose name begins so, and the first; default: all")
    threads: int | None = option(None, "of each command; default: torch's own choice", at_least=1)


def run(cfg: Config, script: str, *arguments: object) -> None:
    """One of the project's scripts; ends the program where it fails."""
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(cfg.threads)} if cfg.threads else {})
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")


def main(cfg: Config) -> None:
    def out(*parts: str) -> str:
        return os.path.join(cfg.output_dir, *parts)

    with user_errors():
        model = cfg.model_name_or_path or packaged_model()
        check_model_path("--model_name_or_path", model)
        chosen = [name for name in RUNS if name == "first" or not cfg.only or name.startswith(tuple(cfg.only))]
        if cfg.only and chosen == ["first"] and not "first".startswith(tuple(cfg.only)):
            raise ValueError(f"--only {' '.join(cfg.only)}: no run begins so; there are {', '.join(RUNS)}")

    # ---- data, and negatives that are hard for the model
    train, mined = out("data", "train.jsonl"), out("mined.jsonl")
    if not os.path.exists(train):
        run(cfg, os.path.join(ROOT, "data", "build_code_search.py"), "--output_dir", out("data"))
    if not os.path.exists(mined) and any("train_group_size" in RUNS[name] for name in chosen):
        run(
            cfg, MINE, "--model_name_or_path", model, "--input_file", train, "--output_file", mined,
            *("--range_for_sampling", "5-50", "--negative_number", 3, "--max_length", FIRST["passage_max_len"]),
        )  # fmt: skip
    task = ("--corpus_data", out("data", "corpus.jsonl"), "--query_data", out("data", "queries.jsonl"))
    task += ("--qrels", out("data", "qrels.tsv"))

    # ---- the model as it is, and every run
    def measure(encoder: str, name: str, flags: dict) -> None:
        """Writes its rankings, once."""
        if not os.path.exists(path := out("rankings", name)):
            print(name, flush=True)
            run(
                cfg, EVALUATE, "--encoder", encoder, *task, "--max_passage_length", flags["passage_max_len"],
                *("--output_file", out("rankings", f"{name}.json"), "--save_run", path),
            )  # fmt: skip

    measure(model, "not tuned", FIRST)
    for name in chosen:
        flags = FIRST | RUNS[name]
        data = mined if flags["train_group_size"] != 1 else train
        words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        if not os.path.exists(out("rankings", name)):
            run(
                cfg, FINETUNE, "--model_name_or_path", model, "--train_data", data, "--output_dir", out(name), *words,
                *("--save_strategy", "no", "--overwrite_output_dir"),
            )  # fmt: skip
        measure(out(name), name, flags)

    # ---- the table
    runs = [out("rankings", name) for name in (*chosen, "not tuned")]
    run(cfg, EVALUATE, "--compare", *runs, *task, "--output_file", out("sweep.json"))
    with open(out("sweep.json")) as file:
        found = json.load(file)
    print("\n| run | nDCG@10 | against the first | 95 % interval |\n| --- | --- | --- | --- |")
    for name in ("first", *found["comparisons"]):
        score = found["systems"][name]["metrics"]["nDCG@10"]
        against = found["comparisons"].get(name, {}).get("metrics", {}).get("nDCG@10")
        cells = f"{against['difference']:+.4f} | {against['low']:+.4f} to {against['high']:+.4f}" if against else " | "
        print(f"| {name} | {score:.4f} | {cells} |")


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
