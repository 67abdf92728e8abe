"""Losses of the same 50 steps in every precision and under every kind of sharding, beside float32.

    python scripts/benchmarks/compare_launches.py --model_name_or_path MODEL --train_data train.jsonl

Every case is `accelerate launch --config_file configs/accelerate/CASE.yaml scripts/finetune.py` on the same rows, seed
and global batch. It needs a GPU; more than one where sharding shall do anything. On a machine without, `--cases cpu
cpu_checkpointing` shows that the comparison itself works.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from bge_accel.config import option, parse_config, required, user_errors

CONFIGS = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "accelerate")
FINETUNE = os.path.join(os.path.dirname(__file__), "..", "finetune.py")

# Launch configuration and flags of each case; the first that is run is what the others are compared with.
CASES: dict[str, tuple[str, list[str]]] = {
    "float32": ("multi_gpu_bf16", ["--mixed_precision", "no"]),
    "fp16": ("multi_gpu_fp16", []),
    "bf16": ("multi_gpu_bf16", []),
    "float32_checkpointing": ("multi_gpu_bf16", ["--mixed_precision", "no", "--gradient_checkpointing"]),
    "fsdp2": ("fsdp2", []),
    "fsdp2_checkpointing": ("fsdp2_checkpointing", []),
    "zero1": ("zero1", []),
    "zero2": ("zero2", []),
    "zero2_offload": ("zero2_offload", []),
    "zero3": ("zero3", []),
    "cpu": ("cpu", []),
    "cpu_checkpointing": ("cpu", ["--gradient_checkpointing"]),
}


@dataclass(kw_only=True)
class Config:
    """What to compare."""

    model_name_or_path: str = required("folder or hub name of the encoder")
    train_data: list[str] = required("rows to train on")
    num_processes: int = option(1, "GPUs", at_least=1)
    steps: int = option(50, "optimiser steps", at_least=1)
    global_batch_size: int = option(64, "queries in a step, over all processes", at_least=1)
    cases: list[str] = option([name for name in CASES if not name.startswith("cpu")], f"any of {', '.join(CASES)}")


def run(cfg: Config, case: str, folder: str) -> list[float] | str:
    """The loss of each step, or the last line of what went wrong."""
    config, flags = CASES[case]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", os.path.join(CONFIGS, f"{config}.yaml"), "--num_processes", cfg.num_processes),
        *(FINETUNE, "--model_name_or_path", cfg.model_name_or_path, "--train_data", *cfg.train_data),
        *("--output_dir", folder, "--max_steps", cfg.steps, "--logging_steps", 1, "--save_strategy", "no"),
        *("--per_device_train_batch_size", cfg.global_batch_size // cfg.num_processes, "--negatives_cross_device"),
        *("--train_group_size", 2, *flags),
    ]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "Error" in line]
        return (lines or result.stderr.splitlines() or ["no message"])[0].strip()
    with open(os.path.join(folder, "train_log.jsonl"), encoding="utf-8") as file:
        return [json.loads(line)["loss"] for line in file]


def main(cfg: Config) -> None:
    with user_errors():
        unknown = [case for case in cfg.cases if case not in CASES]
        if unknown:
            raise ValueError(f"--cases {unknown[0]} is not one of {', '.join(CASES)}")
        if cfg.global_batch_size % cfg.num_processes:
            raise ValueError(f"--global_batch_size {cfg.global_batch_size} does not divide by {cfg.num_processes}")
    import torch

    cases = list(cfg.cases)
    if not torch.cuda.is_available():
        print("no GPU here: all but the cpu cases are skipped", flush=True)
        cases = [case for case in cases if case.startswith("cpu")]
    print(
        f"| case | loss, first {cfg.steps // 5} steps | loss, last {cfg.steps // 5} | largest difference of a step to the first |"
    )
    print("| --- | --- | --- | --- |")
    reference = None
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            losses = run(cfg, case, os.path.join(folder, "out"))
        if isinstance(losses, str):
            print(f"| {case} | failed: {losses} | | |", flush=True)
            continue
        reference = reference or losses
        tenth = max(cfg.steps // 5, 1)
        difference = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        print(f"| {case} | {first:.4f} | {last:.4f} | {difference:.4f} |", flush=True)


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
