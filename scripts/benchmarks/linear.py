"""Products of a linear layer in float32 on a CPU, forward and of the gradient: torch's (MKL) and ours (bge_accel/kernels/onednn.py).

    python scripts/benchmarks/linear.py

Tokens in one product, the sizes of the layers of a small and a base model; the rates of both in GFLOP/s, medians of
alternate runs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from bge_accel.config import option, parse_config
from bge_accel.kernels import onednn


@dataclass(kw_only=True)
class Config:
    """What to time."""

    tokens: list[int] = option([512, 2048], "rows of a product", at_least=1)
    rounds: int = option(25, "runs of each, in turns", at_least=1)


def rates(cfg: Config, tokens: int, width: int, out: int) -> list[float]:
    """Forward by torch and by ours, the gradient of the states by torch and by ours; 1e9 operations a second."""
    states, grad = torch.randn(tokens, width), torch.randn(tokens, out)
    weight, bias = torch.randn(out, width), torch.randn(out)
    ways: list[Callable[[], torch.Tensor]] = [
        lambda: torch.nn.functional.linear(states, weight, bias),
        lambda: onednn.linear(states, weight, bias),
        lambda: grad @ weight,
        lambda: onednn.linear(grad, weight.t()),
    ]
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(cfg.rounds + 1):
        for way, taken in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    return [2 * tokens * width * out / median(taken[1:]) / 1e9 for taken in seconds]


def main() -> None:
    cfg = parse_config(Config)
    if not onednn.is_available():
        raise SystemExit("error: torch has no oneDNN for this processor")
    print("| tokens | layer | forward, torch | forward, ours | gradient, torch | gradient, ours |")
    print("| --- | --- | --- | --- | --- | --- |")
    with torch.inference_mode():
        for tokens in cfg.tokens:
            for width, out in ((384, 384), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768)):
                figures = " | ".join(f"{rate:.0f}" for rate in rates(cfg, tokens, width, out))
                print(f"| {tokens:,} | {width} x {out} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
