"""Dropout for training on a CPU, where torch's own takes more time than the network that it is applied to.

torch draws a CPU's masks far more slowly than it applies them. Here they come from numpy's SFC64, a byte an element. As with
torch's, an element is dropped with probability p, the others are divided by 1 - p (Srivastava et al. 2014,
https://jmlr.org/papers/v15/srivastava14a.html), and torch's generator decides.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable


def use_cpu_dropout(backbone: Any) -> None:
    """Has a model's dropouts of states, on a CPU in training, be those of here; elsewhere they are torch's as before."""
    for module in backbone.modules():
        if type(module) is torch.nn.Dropout and 0 < module.p < 1:
            module.forward = partial(_drop_states, module)  # type: ignore[method-assign]


class KeepMask:
    """Which elements of a tensor a dropout keeps; the same ones when torch's generator is set back.

    A byte is drawn for each, and compared with a whole number: one of the two next to 256 p, drawn such that an element is
    dropped with probability `p` exactly.
    """

    def __init__(self, shape: torch.Size, p: float) -> None:
        seed = int(torch.empty((), dtype=torch.int64).random_().numpy())
        generator = np.random.Generator(np.random.SFC64(seed))
        below, rest = divmod(256 * p, 1)
        threshold = int(below) + int(generator.random() < rest)  # 256 is more than a byte holds
        count = shape.numel()
        drawn = generator.integers(0, 2**64, -(-count // 8), dtype=np.uint64).view(np.uint8)[:count]
        kept = np.greater_equal(drawn, threshold, out=drawn.view(np.bool_)).view(np.uint8)
        self.kept = torch.from_numpy(kept).view(shape)
        """1 for what stays and 0 for what is dropped, uint8."""


def drop(states: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout of a tensor on a CPU, 0 < p < 1."""
    dropped: torch.Tensor = _Drop.apply(states, KeepMask(states.shape, p), 1 / (1 - p))
    return dropped


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, keep: KeepMask, factor: float) -> torch.Tensor:
        ctx.settings = keep, factor
        return torch.empty(states.shape, dtype=states.dtype).copy_(keep.kept).mul_(states).mul_(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return _Drop.forward(ctx, grad, *ctx.settings), None, None


def _drop_states(module: torch.nn.Dropout, states: torch.Tensor) -> torch.Tensor:
    """In place of a Dropout's own forward pass."""
    if module.training and states.device.type == "cpu":
        return drop(states, module.p)
    return torch.nn.Dropout.forward(module, states)
