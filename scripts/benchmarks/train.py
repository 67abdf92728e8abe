"""Seconds of a training step, beside FlagEmbedding and sentence-transformers, in one run.

    python -m venv peers && peers/bin/pip install FlagEmbedding==1.4.2 sentence-transformers==6.2.0
    python scripts/benchmarks/train.py --model_name_or_path MODEL --train_data mined.jsonl --peers_python peers/bin/python

Every tool is started as its users start it (scripts/finetune.py, FlagEmbedding's module, sentence-transformers' trainer with
MultipleNegativesRankingLoss), in turns, on the same batch: its rows are the whole data set, so each step is an epoch of
one batch, whatever the order. Same weights, without dropout; same lengths, temperature, pooling and optimiser; a learning
rate of almost 0, so that the losses of all steps and tools have to agree, which is checked. Each round has another batch.
The first step of a run is not counted.

The limit is the best rate of a plain forward and backward pass of the same model on batches of equal length, measured in
the same run; tokens are counted without padding. --min_passage_tokens N with --passage_max_len N gives passages of equal
length, where nothing can be saved on padding. A tool that is not installed is left out, which the output says.
"""

import json
import os
import platform
import random
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from bge_accel.config import option, parse_config, required, user_errors

TOOLS = {"bge_accel": "bge_accel", "FlagEmbedding": "FlagEmbedding", "sentence-transformers": "sentence_transformers"}


@dataclass(kw_only=True)
class Config:
    """What to measure."""

    model_name_or_path: str = required("folder of an encoder")
    train_data: str = required("rows with at least one positive and --train_group_size - 1 negatives each")
    peers_python: str = option(sys.executable, "Python that has the other tools")
    batch_size: int = option(16, "queries in a step")
    train_group_size: int = option(4, "passages per query")
    query_max_len: int = option(64, "tokens that a query is cut to")
    passage_max_len: int = option(256, "tokens that a passage is cut to")
    min_passage_tokens: int = option(0, "only rows whose passages all have at least so many tokens")
    temperature: float = option(0.05, "similarities are divided by it")
    precisions: list[str] = option(["fp32", "bf16"], "which to measure")
    rounds: int = option(3, "runs of each tool, each with another batch")
    steps: int = option(2, "steps of a run that are counted")
    output_file: str | None = option(None, "JSON with every figure")


# ---- one run of one tool, in a process of its own


def run_tool(tool: str, job: dict) -> None:
    """Trains, and writes the seconds and the loss of each step."""
    if tool == "bge_accel":
        bf16 = ["--bf16"] if job["precision"] == "bf16" else []
        run_script([str(Path(__file__).parents[1] / "finetune.py"), *common_flags(job), *bf16])
        lines = [json.loads(line) for line in open(Path(job["output_dir"]) / "train_log.jsonl", encoding="utf-8")]
        steps = [(job["batch_size"] / line["queries_per_second"], line["loss"]) for line in lines]
    else:
        steps = run_peer(tool, job)
    Path(job["result"]).write_text(json.dumps(steps))


def common_flags(job: dict) -> list[str]:
    """What scripts/finetune.py and FlagEmbedding both take."""
    names = (
        "model_name_or_path train_data output_dir train_group_size query_max_len passage_max_len temperature".split()
    )
    flags = {name: job[name] for name in names} | {
        "per_device_train_batch_size": job["batch_size"],
        "max_steps": job["steps"] + 1,
        "learning_rate": 1e-12,
        "sentence_pooling_method": "mean",
        "normalize_embeddings": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def run_script(argv: list[str]) -> None:
    sys.argv = argv
    sys.path[0] = os.path.dirname(argv[0])
    runpy.run_path(argv[0], run_name="__main__")


def run_peer(tool: str, job: dict) -> list[tuple[float, float]]:
    """Seconds and loss of each step, by a clock among the trainer's callbacks."""
    import transformers.trainer
    from transformers import TrainerCallback

    times, losses = [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            times.append(time.perf_counter())

        def on_log(self, args: object, state: object, control: object, logs: dict, **kwargs: object) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
    is_bf16 = job["precision"] == "bf16"
    if tool == "FlagEmbedding":
        sys.argv = ["base", *common_flags(job), "--use_cpu", str(job["use_cpu"]), "--bf16", str(is_bf16)]
        runpy.run_module("FlagEmbedding.finetune.embedder.encoder_only.base", run_name="__main__")
    else:
        from datasets import Dataset
        from sentence_transformers import (
            SentenceTransformer,
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )
        from sentence_transformers.losses import MultipleNegativesRankingLoss

        rows = [json.loads(line) for line in open(job["train_data"], encoding="utf-8")]
        columns = {"anchor": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]}
        columns |= {f"negative_{i}": [row["neg"][i] for row in rows] for i in range(job["train_group_size"] - 1)}
        model = SentenceTransformer(job["model_name_or_path"], device="cpu" if job["use_cpu"] else None)
        model.max_seq_length = job["passage_max_len"]
        arguments = SentenceTransformerTrainingArguments(
            output_dir=job["output_dir"],
            per_device_train_batch_size=job["batch_size"],
            max_steps=job["steps"] + 1,
            learning_rate=1e-12,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=job["use_cpu"],
            bf16=is_bf16,
        )
        SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
            loss=MultipleNegativesRankingLoss(model, scale=1 / job["temperature"]),
        ).train()
    return [(end - start, loss) for start, end, loss in zip(times, times[1:], losses, strict=False)]


# ---- all runs


def write_batches(cfg: Config, folder: Path) -> list[Path]:
    """For each round a file with the rows of its batch, with one positive and as many negatives as are trained on."""
    from bge_accel.rows import TrainingRows

    rows = TrainingRows([cfg.train_data])
    wanted = cfg.train_group_size - 1
    passes = tokens_at_least(cfg)
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    usable = (
        row
        for row in map(rows.__getitem__, order)
        if len(row.get("neg") or []) >= wanted and passes([row["pos"][0], *row["neg"][:wanted]])
    )
    paths = []
    for number in range(cfg.rounds):
        batch = [row for _, row in zip(range(cfg.batch_size), usable, strict=False)]
        if len(batch) < cfg.batch_size:
            raise ValueError(f"{cfg.train_data} has too few rows with {wanted} negatives for {cfg.rounds} batches")
        paths.append(folder / f"batch-{number}.jsonl")
        with open(paths[-1], "w", encoding="utf-8") as file:
            for row in batch:
                new = {"query": row["query"], "pos": row["pos"][:1], "neg": list(row["neg"][:wanted])}
                file.write(json.dumps(new) + "\n")
    return paths


def tokens_at_least(cfg: Config):
    """A test of whether all texts have --min_passage_tokens."""
    if not cfg.min_passage_tokens:
        return lambda texts: True
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cfg.model_name_or_path)
    return lambda texts: all(len(ids) >= cfg.min_passage_tokens for ids in tokenizer(list(texts))["input_ids"])


def count_tokens(cfg: Config, path: Path) -> int:
    """Tokens of a batch, padding not counted."""
    from transformers import AutoTokenizer

    from bge_accel.batching import tokenize

    tokenizer = AutoTokenizer.from_pretrained(cfg.model_name_or_path)
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    ids = tokenize(tokenizer, [row["query"] for row in rows], cfg.query_max_len)
    ids += tokenize(tokenizer, [text for row in rows for text in (*row["pos"], *row["neg"])], cfg.passage_max_len)
    return sum(map(len, ids))


def model_without_dropout(cfg: Config, folder: Path) -> str:
    """A copy of the model whose losses are the same in every step."""
    import shutil

    target = folder / "model"
    shutil.copytree(cfg.model_name_or_path, target)
    config = json.loads((target / "config.json").read_text())
    config |= {name: 0.0 for name in config if name.endswith(("dropout_prob", "dropout"))}
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def forward_backward_rate(model_path: str, precision: str, use_cpu: bool) -> float:
    """Tokens a second of forward and backward passes over equal lengths: the best of several shapes and tries."""
    import torch
    from transformers import AutoModel

    device = torch.device("cpu" if use_cpu else "cuda")
    model = AutoModel.from_pretrained(model_path, add_pooling_layer=False).train().to(device)
    best = 0.0
    for rows, width in ((32, 64), (16, 128), (64, 128), (256, 128))[: 2 if use_cpu else 4]:
        ids = torch.randint(1000, 2000, (rows, width), device=device)
        for _ in range(4):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            hidden.float().sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, rows * width / (time.perf_counter() - start))
    return best


def installed(python: str, module: str) -> str | None:
    """A package's version, None where it is not there."""
    code = f"import importlib.metadata as m; print(m.version({module!r}))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def versions() -> dict[str, str | None]:
    """Of what decides the figures."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("bge_accel", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main(cfg: Config) -> None:
    import torch

    use_cpu = not torch.cuda.is_available()
    found = versions()
    tools = {"bge_accel": sys.executable}
    for name in list(TOOLS)[1:]:
        found[name] = installed(cfg.peers_python, name)
        if found[name] is None:
            print(f"{name} is not installed for {cfg.peers_python}: left out", flush=True)
        else:
            tools[name] = cfg.peers_python
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch, user_errors():
        folder = Path(scratch)
        model = model_without_dropout(cfg, folder)
        batches = write_batches(cfg, folder)
        for precision in cfg.precisions:
            rates = []
            for number, batch in enumerate(batches):
                rates.append(forward_backward_rate(model, precision, use_cpu))
                num_tokens = count_tokens(cfg, batch)
                for tool, python in tools.items():
                    job = {
                        **vars(cfg),
                        "model_name_or_path": model,
                        "train_data": str(batch),
                        "output_dir": str(folder / f"{tool}-{precision}-{number}"),
                        "result": str(folder / "result.json"),
                        "precision": precision,
                        "use_cpu": use_cpu,
                    }
                    command = [python, __file__, "--tool", tool, json.dumps(job)]
                    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}  # for the flags of this file
                    done = subprocess.run(command, capture_output=True, text=True, env=env)
                    if done.returncode:
                        raise SystemExit(f"{tool} failed:\n{done.stderr[-3000:]}")
                    for seconds, loss in json.loads(Path(job["result"]).read_text())[1:]:
                        result = {
                            "precision": precision,
                            "round": number,
                            "tool": tool,
                            "seconds": seconds,
                            "loss": loss,
                        }
                        results.append(result | {"tokens": num_tokens})
            report(results, precision, max(rates), list(tools))
    if cfg.output_file is not None:
        machine = platform.processor() or platform.machine()
        device = torch.cuda.get_device_name() if not use_cpu else f"{os.cpu_count()} cores, {machine}"
        content = {"config": vars(cfg), "versions": found, "device": device, "steps": results}
        Path(cfg.output_file).write_text(json.dumps(content, indent=1) + "\n")


def report(results: list[dict], precision: str, limit: float, tools: list[str]) -> None:
    """One table a precision; complains where the losses of the tools differ."""
    steps = [result for result in results if result["precision"] == precision]
    print(f"\n{precision}; plain forward and backward pass on equal lengths: {limit:,.0f} tokens/s\n")
    print("| tool | seconds a step (min .. max) | real tokens/s | of the limit | times ours | loss |")
    print("| --- | --- | --- | --- | --- | --- |")
    rounds = sorted({step["round"] for step in steps})
    of_round = {
        (tool, number): median(s["seconds"] for s in steps if s["tool"] == tool and s["round"] == number)
        for tool in tools
        for number in rounds
    }
    for tool in tools:
        own = [step for step in steps if step["tool"] == tool]
        seconds = sorted(step["seconds"] for step in own)
        rate = median(step["tokens"] / step["seconds"] for step in own)
        ratio = median(of_round[tool, number] / of_round["bge_accel", number] for number in rounds)
        loss = sum(step["loss"] for step in own) / len(own)
        print(
            f"| {tool} | {median(seconds):.2f} ({seconds[0]:.2f} .. {seconds[-1]:.2f}) | {rate:,.0f} | {rate / limit:.0%} | "
            f"{ratio:.2f} | {loss:.4f} |"
        )
    tolerance = 1e-3 if precision == "fp32" else 3e-2
    for number in rounds:
        losses = {step["tool"]: step["loss"] for step in steps if step["round"] == number}
        if max(losses.values()) - min(losses.values()) > tolerance * max(losses.values()):
            print(f"the losses of round {number} do not agree: {losses}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--tool"]:
        run_tool(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main(parse_config(Config, description=__doc__.split("\n")[0]))
