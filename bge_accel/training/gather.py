"""Gathering embeddings from all processes with exact gradients, and agreeing on numbers."""

from typing import Any

import torch
import torch.distributed as dist

# torch 2.13 renamed these.
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _all_gather(local: torch.Tensor) -> torch.Tensor:
    gathered = local.new_empty((dist.get_world_size() * local.shape[0], *local.shape[1:]))
    _all_gather_into(gathered, local.contiguous())
    return gathered


class _Gather(torch.autograd.Function):
    """All-gather forward, reduce-scatter (sum) backward: each embedding crosses the network once each way."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        return _all_gather(local)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (grad,) = grads
        local = grad.new_empty((grad.shape[0] // dist.get_world_size(), *grad.shape[1:]))
        _reduce_scatter_into(local, grad.contiguous())
        return local


def is_distributed() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_with_grad(local: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks: (n, ...) -> (world size * n, ...).

    The gradient of a row is the sum of what all processes' losses say of it. With each process's loss a mean over its
    own queries and gradients averaged over processes (DDP), this is the gradient of the mean over the global batch.

    Raises:
        ValueError: the processes' shapes differ; every one of them raises, naming rank and shape.
    """
    if not is_distributed():
        return local
    check_equal_shapes(local)
    return _Gather.apply(local)


def gather(local: torch.Tensor) -> torch.Tensor:
    """The same for tensors without a gradient, of shapes that are known to be equal."""
    return _all_gather(local.detach()) if is_distributed() else local.detach()


def gather_uneven(local: torch.Tensor) -> torch.Tensor:
    """The same where the processes have different numbers of rows (n, ...)."""
    if not is_distributed():
        return local
    counts = _all_gather(torch.tensor([len(local)], device=local.device)).tolist()
    padded = local.new_zeros((max(counts), *local.shape[1:]))
    padded[: len(local)] = local
    parts = _all_gather(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def check_equal_shapes(local: torch.Tensor) -> None:
    """Raises ValueError on every process when the processes' shapes differ (the collective would hang or crash)."""
    shape = torch.tensor([local.shape[0], local[:1].numel()], device=local.device)
    shapes = _all_gather(shape).view(-1, 2)
    if (shapes != shapes[0]).any():
        listed = ", ".join(f"rank {rank}: {rows} x {size}" for rank, (rows, size) in enumerate(shapes.tolist()))
        raise ValueError(
            f"the processes hold tensors of different shapes ({listed}); every process needs equal batches"
        )


def largest(value: int, device: torch.device) -> int:
    """The largest of the processes' values, known to all of them."""
    if not is_distributed():
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
