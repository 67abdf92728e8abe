"""Memory of training on many rows, and what it costs to resume late in a run.

    python scripts/benchmarks/data_memory.py --model_name_or_path MODEL --folder EMPTY_FOLDER --rows 10000000

Writes so many short rows into --folder, trains a few steps on them with scripts/finetune.py twice (the first time every
row is checked, the second time the checked copy is found), and prints the seconds and the most anonymous memory that the
process held: what it cannot give back, mapped files not counted. Then it goes on from a checkpoint at step 10 and from
the same one set forward to step 100,000, and prints the seconds of both: a position is a function of the step alone, so
nothing between is read.
"""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from bge_accel.config import option, parse_config, required
from bge_accel.training.checkpoint import read_state
from bge_accel.training.manifest import STATE, write_manifest

FINETUNE = os.path.join(os.path.dirname(__file__), "..", "finetune.py")


@dataclass(kw_only=True)
class Config:
    """What to measure."""

    model_name_or_path: str = required("folder or hub name of a small encoder")
    folder: str = required("empty folder for rows, checked copy and output; some 300 bytes a row")
    rows: int = option(10_000_000, "rows to write", at_least=1)
    late_step: int = option(100_000, "the step to resume at, beside step 10", at_least=1)


def write_rows(path: str, count: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            negatives = f'["no, {i + 1} is another value", "value {i} was not found"]'
            file.write(f'{{"query": "what is value {i}?", "pos": ["value {i} is here"], "neg": {negatives}}}\n')


def watched(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Seconds of a command and the most anonymous memory it held, in GB."""
    start, most = time.perf_counter(), 0
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()))
    reader.start()
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status") as status:
                line = next((line for line in status if line.startswith("RssAnon")), None)
            most = max(most, int(line.split()[1]) * 1024 if line else 0)
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        raise SystemExit("".join(output[-20:]))
    return time.perf_counter() - start, most / 1e9


def main(cfg: Config) -> None:
    os.makedirs(cfg.folder, exist_ok=True)
    data, out = os.path.join(cfg.folder, "rows.jsonl"), os.path.join(cfg.folder, "out")
    if not os.path.exists(data):
        write_rows(data, cfg.rows)
    print(f"{cfg.rows:,} rows, {os.path.getsize(data) / 1e9:.2f} GB", flush=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def train(steps: int, *flags: str) -> tuple[float, float]:
        command = [
            *(sys.executable, FINETUNE, "--model_name_or_path", cfg.model_name_or_path, "--train_data", data),
            *("--output_dir", out, "--cache_path", os.path.join(cfg.folder, "cache"), "--max_steps", steps),
            *(
                "--per_device_train_batch_size",
                4,
                "--train_group_size",
                2,
                "--save_steps",
                10,
                "--disable_tqdm",
                *flags,
            ),
        ]
        return watched([str(part) for part in command], env)

    for what in ("first training, every row checked", "second training, checked copy found"):
        seconds, memory = train(20, "--overwrite_output_dir")
        print(f"{what}: {seconds:.1f} s, {memory:.2f} GB of anonymous memory at most", flush=True)
    checkpoint = os.path.join(out, "checkpoint-10")
    for step in (10, cfg.late_step, 10, cfg.late_step):
        state = read_state(checkpoint)
        state |= {"step": step, "batches": step}
        with open(os.path.join(checkpoint, STATE, "state.json"), "w", encoding="utf-8") as file:
            json.dump(state, file)
        os.remove(os.path.join(checkpoint, STATE, "manifest.json"))
        write_manifest(checkpoint)
        seconds, memory = train(step + 2, "--resume_from_checkpoint", checkpoint, "--overwrite_output_dir")
        print(f"two steps from step {step:,} on: {seconds:.1f} s, {memory:.2f} GB", flush=True)


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
