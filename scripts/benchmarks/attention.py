"""Attention in training on a CPU: torch's own in float32 and in bfloat16, and ours (bge_accel/kernels/cpu_attention.py).

    python scripts/benchmarks/attention.py
    python scripts/benchmarks/attention.py --num_heads 12 --head_dim 64 --lengths 32 512

Milliseconds of a forward and a backward pass over so many tokens in texts of each length: the least of the repetitions, in which
all take turns. A dropout of 0.1 is that of BERT's models as they are shipped.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bge_accel.config import option, parse_config
from bge_accel.kernels.cpu_attention import attend


@dataclass(kw_only=True)
class Config:
    """Shapes; by default those of all-MiniLM-L6-v2."""

    num_heads: int = option(12, "heads of a layer", at_least=1)
    head_dim: int = option(32, "numbers of a head", at_least=1)
    lengths: list[int] = option([16, 32, 64, 128, 256, 512], "tokens of a text", at_least=1)
    num_tokens: int = option(2048, "tokens of a micro-batch", at_least=1)
    repetitions: int = option(7, "measurements of each", at_least=1)


def milliseconds(cfg: Config, length: int, dtype: torch.dtype, dropout: float, ours: bool) -> float:
    """Of one forward and backward pass, from tensors laid out as a model has them."""
    shape = (max(cfg.num_tokens // length, 1), length, cfg.num_heads, cfg.head_dim)
    tensors = [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    start = time.perf_counter()
    if ours:
        attended = attend(*tensors, None, dropout)
    else:
        attended = F.scaled_dot_product_attention(*tensors, dropout_p=dropout)
    torch.autograd.grad(attended, tensors, torch.ones_like(attended))
    return 1e3 * (time.perf_counter() - start)


def main(cfg: Config) -> None:
    print("| tokens | float32, torch | bfloat16, torch | bfloat16, ours | dropout, torch | dropout, ours |")
    print("| --- | --- | --- | --- | --- | --- |")
    float32, bfloat16 = torch.float32, torch.bfloat16
    kinds = (
        (float32, 0.0, False),
        (bfloat16, 0.0, False),
        (bfloat16, 0.0, True),
        (float32, 0.1, False),
        (float32, 0.1, True),
    )
    for length in cfg.lengths:
        times = [[milliseconds(cfg, length, *kind) for kind in kinds] for _ in range(cfg.repetitions)]
        print(f"| {length} | {' | '.join(f'{min(each):.1f}' for each in zip(*times, strict=True))} |", flush=True)


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
