"""One training step: embed, loss on embeddings, backward.

The loss sees the embeddings of the whole batch at once; its gradient with respect to them is then pushed through the
encoder micro-batch by micro-batch, from the graphs that were kept or by computing them again (GradCache: Gao et al.
2021, https://arxiv.org/abs/2101.06983). So the batch size is a choice about learning, not about memory.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

from bge_accel.batching import TokenBatch

Output = TypeVar("Output")


def embed_and_backward(
    encoder: torch.nn.Module,
    batch: TokenBatch,
    loss_fn: Callable[[torch.Tensor], tuple[torch.Tensor, Output]],
    *,
    device: torch.device,
    max_kept_tokens: int | None = None,
    scale_loss: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    last: bool = True,
) -> Output:
    """Adds the gradient of a loss on the embeddings of a batch to the encoder's parameters.

    Args:
        encoder: maps `input_ids` and `attention_mask` to embeddings (texts, dim); may be wrapped by DDP.
        loss_fn: from the embeddings (num_texts, dim), in the order of the texts, to (loss, anything to return).
        max_kept_tokens: activations are kept for as many (padded) tokens, counted in whole micro-batches; the rest
            is recomputed, with the same dropout. None keeps all, 0 none. The gradient is the same.
        scale_loss: applied before differentiating: loss scaling, division by accumulation steps.
        no_sync: context in which DDP does not average gradients.
        last: whether this is the last backward pass before the optimiser steps; else nothing is averaged.
    """
    inputs = [{name: tensor.to(device, non_blocking=True) for name, tensor in mb.items()} for mb in batch.micro_batches]
    keep = _kept_from_the_end([mb["input_ids"].numel() for mb in inputs], max_kept_tokens)
    recompute = len(inputs) - keep
    # One joint backward pass over all kept graphs: DDP averages each gradient once, when it is complete. Where some
    # micro-batches are computed again, the last of these carries the averaging, so nothing before it may start it.
    sync_in_joint = last and recompute == 0

    embeddings, states = [], []
    with torch.no_grad():
        for micro_batch in inputs[:recompute]:
            states.append(_rng_state(device))
            embeddings.append(encoder(**micro_batch))
    with nullcontext() if sync_in_joint else no_sync():
        kept = [encoder(**micro_batch) for micro_batch in inputs[recompute:]]

    together = torch.cat([*embeddings, *(emb.detach() for emb in kept)])
    del embeddings
    restore = batch.restore.to(device)
    leaf = together.float() if together.dtype in (torch.float16, torch.bfloat16) else together
    leaf = leaf[restore].requires_grad_()
    loss, output = loss_fn(leaf)
    scale_loss(loss).backward()
    assert leaf.grad is not None
    # Undo the order: the gradient of each micro-batch's rows.
    grad = torch.empty_like(together)
    grad[restore] = leaf.grad.to(together.dtype)
    grads = list(grad.split([len(mb["input_ids"]) for mb in inputs]))

    if kept:
        with nullcontext() if sync_in_joint else no_sync():
            torch.autograd.backward(kept, grads[recompute:])
        del kept
    for index in range(recompute):
        sync = last and index == recompute - 1
        with nullcontext() if sync else no_sync(), _replayed_rng(states[index], device):
            encoder(**inputs[index]).backward(gradient=grads[index])
    return output


def _kept_from_the_end(tokens: list[int], max_kept: int | None) -> int:
    """How many micro-batches, counted from the last (the shortest texts), fit `max_kept` tokens together."""
    if max_kept is None:
        return len(tokens)
    kept = total = 0
    for size in reversed(tokens):
        total += size
        if total > max_kept:
            break
        kept += 1
    return kept


def _rng_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def _replayed_rng(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> Iterator[None]:
    """Runs a block from an earlier state of the random generators, then puts the present state back."""
    present = _rng_state(device)
    _set_rng_state(state, device)
    try:
        yield
    finally:
        _set_rng_state(present, device)
