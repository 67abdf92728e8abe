"""The gradient of the word embeddings, added where it falls.

A vocabulary has tens of thousands of rows and a micro-batch hundreds of different words. Autograd still makes a gradient
of all rows for each micro-batch and adds it to the others, which moves more memory than anything else in a step.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Smaller tables (positions, types) cost nothing.
MIN_ROWS = 10_000


def add_gradients_in_place(backbone: Any) -> None:
    """Has large embedding layers of a model add to their weight's `grad` themselves, in the same backward pass.

    For a model in one process, on a CPU: whatever averages or shards gradients waits for those of autograd.
    """
    for module in backbone.modules():
        if (
            type(module) is torch.nn.Embedding
            and module.num_embeddings >= MIN_ROWS
            and module.max_norm is None
            and not module.scale_grad_by_freq
            and not module.sparse
        ):
            module.forward = partial(_look_up_rows, module)  # type: ignore[method-assign]


def _look_up_rows(module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """In place of an Embedding's own forward pass."""
    weight = module.weight
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return F.embedding(ids, weight)
    rows: torch.Tensor = _LookUp.apply(weight, ids, module.padding_idx)
    return rows


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        ctx.weight, ctx.ids, ctx.padding_idx = weight, ids, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        weight, ids, grad = ctx.weight, ctx.ids.flatten(), grad.flatten(0, -2)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if ctx.padding_idx is not None:  # has no gradient
            is_word = ids != ctx.padding_idx
            ids, grad = ids[is_word], grad[is_word]
        weight.grad.index_add_(0, ids, grad.to(weight.dtype))
        return None, None, None
