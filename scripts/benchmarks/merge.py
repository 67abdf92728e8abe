"""Time and memory of merging 2, 4 and 8 models, beside copying as many bytes, LM_Cocktail and mergekit, in one run.

    python scripts/benchmarks/merge.py
    python scripts/benchmarks/merge.py --num_models 2 4 8 --gigabytes 1.3 --work_dir /scratch

Writes encoders of the shape of BERT-large with random weights, and removes them. Each measurement is a process of its
own, so that its peak memory (VmHWM: everything resident) is its own. "move" reads all models' bytes and writes as many
as one model has, flushed: what no merge can do without. "copy" copies every model, so it writes as many bytes as it
reads. In turns; the best of --rounds counts. Both other tools run in their Python API; one that is not installed is
left out, which the output says.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bge_accel.config import option, parse_config

BLOCK = 2**22
TOOLS = {"bge_accel": None, "move": None, "copy": None, "LM_Cocktail": "LM_Cocktail", "mergekit": "mergekit"}


@dataclass(kw_only=True)
class Config:
    """What to measure."""

    num_models: list[int] = option([2, 4, 8], "models that are merged", at_least=2)
    gigabytes: float = option(1.3, "size of each model", above=0)
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the models")
    rounds: int = option(2, "times that each is measured; the best counts", at_least=1)
    work_dir: str | None = option(None, "where the models are written; default: the system's temporary folder")
    measure: str | None = option(None, "used by the script itself: one measurement, in a process of its own")


def write_models(cfg: Config, folder: str) -> list[str]:
    """Encoders whose tensors have the shapes of BERT's, as many layers as the size asks for, and random values."""
    import torch
    from transformers import BertConfig, BertModel

    from bge_accel.models.tensor_files import Layout, write_safetensors

    dtype = getattr(torch, cfg.dtype)
    config = BertConfig(vocab_size=30522, hidden_size=1024, num_attention_heads=16, intermediate_size=4096)

    def layouts(num_layers: int) -> dict[str, Layout]:
        config.num_hidden_layers = num_layers
        with torch.device("meta"):
            model = BertModel(config)
        return {name: Layout(dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}

    def size(num_layers: int) -> int:
        return sum(layout.num_bytes for layout in layouts(num_layers).values())

    per_layer = size(2) - size(1)
    tensors = layouts(max(1, round((cfg.gigabytes * 1e9 - size(1)) / per_layer) + 1))
    paths = []
    for number in range(max(cfg.num_models)):
        paths.append(os.path.join(folder, f"model-{number}"))
        os.makedirs(paths[-1])
        generator = torch.Generator().manual_seed(number)

        def chunks(generator: torch.Generator = generator) -> Iterator[torch.Tensor]:
            for layout in tensors.values():
                yield torch.randn(layout.shape, generator=generator).mul_(0.02).to(dtype)

        write_safetensors(os.path.join(paths[-1], "model.safetensors"), tensors, chunks())
        config.architectures = ["BertModel"]
        config.save_pretrained(paths[-1])
    return paths


def move(models: list[str], output: str, *, writes_all: bool) -> None:
    """Reads every model's bytes and writes those of the first, or of all, flushed to disk."""
    os.makedirs(output)
    block = memoryview(bytearray(BLOCK))
    for number, model in enumerate(models):
        with (
            open(os.path.join(model, "model.safetensors"), "rb", buffering=0) as source,
            open(os.path.join(output, str(number)), "wb", buffering=0) as target,
        ):
            while count := source.readinto(block):
                if writes_all or not number:
                    target.write(block[:count])
            os.fsync(target.fileno())


def measure(tool: str, models: list[str], output: str) -> dict[str, float]:
    """Seconds of one merge after its imports, and the most memory that this process has held."""
    weights = [1 / len(models)] * len(models)
    if tool == "bge_accel":
        from bge_accel.merging.merge import merge_models
    elif tool == "LM_Cocktail":
        import LM_Cocktail
    elif tool == "mergekit":
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge
    start = time.perf_counter()
    if tool == "bge_accel":
        merge_models(models, "encoder", weights, output)
    elif tool == "LM_Cocktail":
        LM_Cocktail.mix_models(model_names_or_paths=models, model_type="encoder", weights=weights, output_path=output)
    elif tool == "mergekit":
        parts = [
            {"model": model, "parameters": {"weight": weight}} for model, weight in zip(models, weights, strict=True)
        ]
        run_merge(
            MergeConfiguration.model_validate({"merge_method": "linear", "models": parts}),
            output,
            options=MergeOptions(lazy_unpickle=True, copy_tokenizer=False),
        )
    else:
        move(models, output, writes_all=tool == "copy")
    seconds = time.perf_counter() - start
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return {"seconds": seconds, "megabytes": peak * 1024 / 1e6}


def available_gigabytes() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024 / 1e9


def main(cfg: Config) -> None:
    if cfg.measure is not None:
        print(json.dumps(measure(**json.loads(cfg.measure))))
        return
    tools = [tool for tool, package in TOOLS.items() if package is None or importlib.util.find_spec(package)]
    for tool in TOOLS.keys() - set(tools):
        print(f"{tool} is not installed and left out", file=sys.stderr)
    folder = tempfile.mkdtemp(prefix="merge_benchmark_", dir=cfg.work_dir)
    try:
        models = write_models(cfg, folder)
        size = os.path.getsize(os.path.join(models[0], "model.safetensors")) / 1e9
        print(f"models of {size:.2f} GB, {cfg.dtype}; best of {cfg.rounds}", flush=True)
        print(f"{'models':>6}  {'tool':<12} {'seconds':>8} {'peak MB':>8} {'x move':>7} {'x copy':>7}")
        for number in cfg.num_models:
            best: dict[str, dict[str, float]] = {}
            for _ in range(cfg.rounds):
                for tool in tools:
                    if tool == "LM_Cocktail" and (needed := (number + 1) * size) > available_gigabytes() / 2:
                        print(f"{tool} would hold {needed:.0f} GB, more than half of what is free", file=sys.stderr)
                        continue
                    output = os.path.join(folder, "output")
                    task = json.dumps({"tool": tool, "models": models[:number], "output": output})
                    done = subprocess.run(
                        [sys.executable, os.path.abspath(__file__), "--measure", task], capture_output=True, text=True
                    )
                    shutil.rmtree(output, ignore_errors=True)
                    if done.returncode:
                        print(f"{tool} failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                        continue
                    found = json.loads(done.stdout.splitlines()[-1])
                    best[tool] = min(best.get(tool, found), found, key=lambda one: one["seconds"])
            for tool, found in best.items():
                ratios = " ".join(f"{found['seconds'] / best[name]['seconds']:7.2f}" for name in ("move", "copy"))
                print(
                    f"{number:>6}  {tool:<12} {found['seconds']:8.2f} {found['megabytes']:8,.0f} {ratios}", flush=True
                )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
