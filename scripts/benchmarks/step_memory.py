"""Time and peak memory of one training step as the batch grows, with every activation recomputed.

    python scripts/benchmarks/step_memory.py --model_name_or_path MODEL --batches 32 128 512 2048 4096

Each batch is N queries and N passages of --length tokens. Every size runs in its own process, so that its peak is its
own; the last column is the cost of a query relative to the cheapest size.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

from bge_accel.config import option, parse_config, required


@dataclass(kw_only=True)
class Config:
    """What to measure."""

    model_name_or_path: str = required("folder or hub name of the encoder")
    batches: list[int] = option([32, 128, 512, 2048, 4096], "queries in a step", at_least=1)
    length: int = option(64, "tokens of each text", at_least=1)
    budget_gb: float = option(0.0, "activations to keep, in GB; 0 recomputes all", at_least=0)
    single: int | None = option(None, "measure this size alone and print JSON", at_least=1)


def measure(cfg: Config, size: int) -> dict:
    import torch

    from bge_accel.encoding.batching import default_token_budget, make_token_batch
    from bge_accel.models.encoder import load_encoder
    from bge_accel.training.losses import contrastive_loss
    from bge_accel.training.step import ActivationBudget, embed_and_backward

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, tokenizer, _ = load_encoder(cfg.model_name_or_path)
    encoder.to(device).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, tokenizer.vocab_size, (2 * size, cfg.length), generator=generator).tolist()

    def step(texts: list[list[int]]) -> None:
        count = len(texts) // 2
        batch = make_token_batch(texts, pad_token_id=0, max_tokens=default_token_budget(device))
        embed_and_backward(
            encoder,
            batch,
            lambda emb: (contrastive_loss(emb[:count], emb[count:], temperature=0.02, group_size=1).loss, None),
            device=device,
            activations=ActivationBudget(cfg.budget_gb * 1e9),
        )
        encoder.zero_grad(set_to_none=False)
        if device.type == "cuda":
            torch.cuda.synchronize()

    step(ids[:64])  # warm up
    start = time.perf_counter()
    step(ids)
    seconds = time.perf_counter() - start
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {"batch": size, "seconds": seconds, "peak_gb": peak / 1e9, "ms_per_query": 1000 * seconds / size}


def main(cfg: Config) -> None:
    if cfg.single is not None:
        print(json.dumps(measure(cfg, cfg.single)))
        return
    rows = []
    print(f"{'batch':>6}  {'seconds':>8}  {'peak GB':>8}  {'ms/query':>8}", flush=True)
    for size in cfg.batches:
        flags = {key: value for key, value in asdict(cfg).items() if key not in ("batches", "single")}
        command = [f"--{key}={value}" for key, value in flags.items()]
        output = subprocess.run(
            [sys.executable, __file__, *command, "--single", str(size)], check=True, capture_output=True, text=True
        )
        rows.append(json.loads(output.stdout.splitlines()[-1]))
        row = rows[-1]
        print(
            f"{row['batch']:>6}  {row['seconds']:>8.2f}  {row['peak_gb']:>8.2f}  {row['ms_per_query']:>8.1f}",
            flush=True,
        )
    cheapest = min(row["ms_per_query"] for row in rows)
    dearest = max(row["ms_per_query"] for row in rows)
    print(
        f"dearest query / cheapest query: {dearest / cheapest:.2f}; highest peak {max(r['peak_gb'] for r in rows):.2f} GB"
    )


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
