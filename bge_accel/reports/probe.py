"""A few real steps of a run, to measure what they take."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from bge_accel.processes.children import run_child
from bge_accel.reports.doctor import Measured
from bge_accel.reports.row_checks import Finding

PROBE_TOKENS = {"cpu": (2560, 7168), "cuda": (16384, 65536)}  # of a measured step, roughly; two sizes make a line
MEASURE_SECONDS = 60  # that the steps of the larger size may take, judged by those of the smaller
ONE_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What the steps leave out of a run: other processes, other sources, measuring and saving.
ALONE: dict[str, Any] = {
    "token": None,
    "gradient_accumulation_steps": 1,
    "negatives_cross_device": False,
    "deepspeed": None,
    "streaming": False,
    "stopping_strategy": "repeat",
    "same_dataset_within_batch": False,
    "mix_sources": False,
    "small_threshold": 0,
    "drop_threshold": 0,
    "sampling_temperature": 1.0,
    "eval_data": None,
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "early_stopping_patience": None,
    "save_strategy": "no",
    "resume_from_checkpoint": None,
    "overwrite_output_dir": False,
    "logging_steps": 1,
    "report_to": ["none"],
    "disable_tqdm": True,
}


def measure(
    script: str,
    settings: Mapping[str, Any],
    steps: int,
    rows: Sequence[Mapping[str, Any]],
    row_tokens: Sequence[float],
    device: str,
) -> list[Measured] | Finding:
    """Some steps of finetune.py itself at two batch sizes, each in a process of its own: a peak never falls.

    Args:
        script: its path.
        settings: of the run, by flag.
        rows: to train on.
        row_tokens: of each row of the sample, with its group.
        device: "cpu" or "cuda".
    """
    per_row = sum(row_tokens) / len(row_tokens)
    large = max(2, min(math.ceil(PROBE_TOKENS[device][1] / per_row), len(rows)))
    sizes = sorted({max(1, math.ceil(large * PROBE_TOKENS[device][0] / PROBE_TOKENS[device][1])), large})
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="bge_accel_doctor_") as folder:
        # From everywhere in the sample; some more than a batch, for rows without negatives draw other rows' passages.
        count = min(max(2 * large, 200), len(rows))
        path = os.path.join(folder, "rows.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(rows[i * len(rows) // count]) + "\n" for i in range(count))
        for size in sizes:
            if measured:
                affordable = int(MEASURE_SECONDS * measured[0].tokens_per_second / (steps * per_row))
                size = max(math.ceil(1.5 * sizes[0]), min(size, affordable))
            out = os.path.join(folder, f"out-{size}")
            probe = {
                **settings,
                **ALONE,
                "train_data": [path],
                "output_dir": out,
                "cache_path": os.path.join(folder, "cache"),
                "per_device_train_batch_size": size,
                "max_steps": steps,
            }
            file_name = os.path.join(folder, f"{size}.yaml")
            with open(file_name, "w", encoding="utf-8") as file:
                yaml.safe_dump(probe, file)
            environment = {key: value for key, value in os.environ.items() if key not in ONE_PROCESS}
            environment = {key: value for key, value in environment.items() if not key.startswith("ACCELERATE_USE_")}
            if settings["token"] is not None:
                environment["HF_TOKEN"] = settings["token"]
            command = [sys.executable, script, "--config", file_name]
            # A process's peak starts at its parent's size (Linux, across exec), so a small one stands between.
            between = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            done = run_child([sys.executable, "-c", between, *command], env=environment, **pipes)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
                seen = (
                    f"finetune.py ends with status {done.returncode} within {steps} steps of {size} queries: {said[-1]}"
                )
                killed = "the machine may have run out of memory; " if done.returncode in (-9, 137, 247) else ""
                return Finding("run_fails", "error", seen, f"{killed}mend what it names; it is what the run would say")
            with open(os.path.join(out, "train_log.jsonl"), encoding="utf-8") as file:
                log = [json.loads(line) for line in file]
            # The first step also reads and warms up.
            tokens = [record["tokens_per_second"] / record["queries_per_second"] * size for record in log]
            warm = log[1:]
            seconds = sum(size / record["queries_per_second"] for record in warm)
            measured.append(
                Measured(
                    batch_size=size,
                    padded_tokens=max(t / (1 - record["padding"]) for t, record in zip(tokens, log, strict=True)),
                    peak_gb=max(record["memory_gb"] for record in log),
                    tokens_per_second=sum(tokens[1:]) / seconds,
                    padding=sum(record["padding"] for record in log) / len(log),
                )
            )
    return measured
