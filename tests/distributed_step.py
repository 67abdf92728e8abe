"""Run by torchrun from test_training.py: the step on several processes against one process with the whole batch.

Prints nothing and exits 0 where every gradient agrees, else fails with the case and the difference.
"""

import itertools
import math
import sys

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs

from bge_accel.batching import make_token_batch
from bge_accel.distributed import gather, gather_with_grad
from bge_accel.losses import contrastive_loss, known_positive_pairs
from bge_accel.model import load_encoder
from bge_accel.training import ActivationBudget, embed_and_backward

QUERIES, GROUP = 3, 2  # on each process


def make_texts(world: int) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
    """Token ids of all queries and passages of the global batch, and the passages' ids with planted duplicates."""
    rng = np.random.default_rng(0)
    queries = [[2, *rng.integers(5, 60, rng.integers(2, 9)), 3] for _ in range(QUERIES * world)]
    passages = [[2, *rng.integers(5, 60, rng.integers(2, 30)), 3] for _ in range(QUERIES * world * GROUP)]
    ids = np.arange(len(passages))
    ids[-1] = ids[0]  # the last negative of the last process is the first query's positive
    ids[3] = ids[2 * GROUP]
    return queries, passages, ids


def gradient(
    encoder, queries, passages, all_ids, known, *, cross: bool, keep, wrapped=None, accelerator=None, mask=True
):
    world = accelerator.num_processes if accelerator else 1
    tokens = make_token_batch(queries + passages, pad_token_id=0, max_tokens=64, overhead_tokens=8)
    assert len(tokens.micro_batches) > 2
    first = accelerator.process_index * len(queries) if accelerator and cross else 0

    def loss_fn(emb):
        q_emb, p_emb = emb[: len(queries)], emb[len(queries) :]
        ids = torch.from_numpy(all_ids)
        if accelerator and cross:
            p_emb, ids = gather_with_grad(p_emb), gather(ids)
        pairs = known_positive_pairs(known, ids.numpy(), group_size=GROUP, first_query=first)
        masked = (torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])) if mask else None
        out = contrastive_loss(q_emb, p_emb, temperature=0.1, group_size=GROUP, first_query=first, masked=masked)
        return out.loss, out.loss.detach()

    encoder.zero_grad()
    model = wrapped if wrapped is not None else encoder
    no_sync = {"no_sync": lambda: accelerator.no_sync(model)} if accelerator else {}
    budget = ActivationBudget(keep, bytes_per_token=1)
    loss = embed_and_backward(model, tokens, loss_fn, device=torch.device("cpu"), activations=budget, **no_sync)
    if accelerator:
        loss = accelerator.reduce(loss.clone(), "sum") / world
    grads = [p.grad.flatten() for p in encoder.parameters() if p.requires_grad and p.grad is not None]
    return torch.cat(grads), loss


def main(model_path: str) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    rank, world = accelerator.process_index, accelerator.num_processes
    assert world == 2 and dist.get_world_size() == 2
    queries, passages, ids = make_texts(world)
    all_known = [[int(ids[i * GROUP])] for i in range(len(queries))]
    all_known[1] = [int(ids[GROUP]), int(ids[-3])]  # a positive that was not drawn
    q, p = slice(rank * QUERIES, (rank + 1) * QUERIES), slice(rank * QUERIES * GROUP, (rank + 1) * QUERIES * GROUP)

    for dtype, checkpointing in itertools.product((torch.float64, torch.float32), (False, True)):
        encoder, _, _ = load_encoder(model_path, pooling="mean", dtype=dtype)
        if checkpointing:
            encoder.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        for module in encoder.modules():  # dropout cannot be the same on one process and on two
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        encoder.backbone.config.attention_probs_dropout_prob = 0.0
        encoder.train()
        expected, expected_loss = gradient(encoder, queries, passages, ids, all_known, cross=True, keep=math.inf)
        unmasked, _ = gradient(encoder, queries, passages, ids, all_known, cross=True, keep=math.inf, mask=False)
        assert (expected - unmasked).norm() > 1e-3 * expected.norm(), "the planted positives change nothing"
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        wrapped = accelerator.prepare(encoder)
        assert type(wrapped).__name__ == "DistributedDataParallel"
        for keep in (math.inf, 0, 100):
            found, loss = gradient(
                encoder, queries[q], passages[p], ids[p], all_known[q],
                cross=True, keep=keep, wrapped=wrapped, accelerator=accelerator,
            )  # fmt: skip
            case = f"{dtype}, checkpointing {checkpointing}, kept tokens {keep}"
            difference = float((found - expected).norm() / expected.norm())
            assert difference < tolerance, f"{case}: gradients differ by {difference:.1e} of their norm"
            assert abs(float(loss - expected_loss)) < tolerance, f"{case}: losses differ"

    # Shapes that differ are an error on every process, not a hang.
    try:
        gather_with_grad(torch.zeros(2 + rank, 4))
    except ValueError as error:
        assert "rank 0: 2 x 4" in str(error) and "rank 1: 3 x 4" in str(error), error
    else:
        raise AssertionError("unequal shapes went through")


if __name__ == "__main__":
    main(sys.argv[1])
