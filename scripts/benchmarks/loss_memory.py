"""Peak memory and time of the contrastive loss with its gradient where the score matrix would not fit.

python scripts/benchmarks/loss_memory.py --queries 32768 --passages 65536 --dim 384
"""

import resource
import time
from dataclasses import dataclass

from bge_accel.config import option, parse_config


@dataclass(kw_only=True)
class Config:
    """The size of the loss."""

    queries: int = option(32768, "rows of the score matrix", at_least=1)
    passages: int = option(65536, "columns; a multiple of the queries", at_least=1)
    dim: int = option(384, "length of an embedding", at_least=1)


def main(cfg: Config) -> None:
    import torch
    import torch.nn.functional as F

    from bge_accel.training.losses import contrastive_loss

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q_emb = F.normalize(torch.randn(cfg.queries, cfg.dim, device=device), dim=-1).requires_grad_()
    p_emb = F.normalize(torch.randn(cfg.passages, cfg.dim, device=device), dim=-1).requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    output = contrastive_loss(q_emb, p_emb, temperature=0.02, group_size=cfg.passages // cfg.queries)
    output.loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        before, peak = 0, torch.cuda.max_memory_allocated()
    flops = 8 * cfg.queries * cfg.passages * cfg.dim  # once forward; again, and two products, backward
    print(
        f"{cfg.queries:,} x {cfg.passages:,} x {cfg.dim}: loss {output.loss.item():.4f}, {seconds:.1f} s "
        f"({flops / seconds / 1e9:,.0f} GFLOP/s), peak {peak / 1e9:.2f} GB in all ({(peak - before) / 1e9:.2f} GB for "
        f"the loss; the matrix alone would take {4 * cfg.queries * cfg.passages / 1e9:.1f} GB)"
    )


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
