"""Gradients of word embeddings and linear layers, added where they are kept, in the same backward pass.

Autograd makes a tensor of each micro-batch's gradient and adds it to the others. Of word embeddings that is a tensor of all
rows, of which a micro-batch has hundreds, and moves more memory than anything else in a step. Of linear layers it is one
more pass over all weights for each micro-batch; and where autocast computes in bfloat16, it casts all weights and all
gradients for each, where here the weights are cast once a step.
"""

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from bge_accel.kernels import onednn

# Smaller tables (positions, types) cost nothing.
MIN_ROWS = 10_000
_num_steps = 0


def add_gradients_in_place(backbone: Any) -> None:
    """Has the linear layers and large embedding layers of a model add to the `grad` of their weights themselves.

    For a model in one process, on a CPU: whatever averages or shards gradients waits for those of autograd.
    """
    _count_steps()
    for module in backbone.modules():
        if (
            type(module) is torch.nn.Embedding
            and module.num_embeddings >= MIN_ROWS
            and module.max_norm is None
            and not module.scale_grad_by_freq
            and not module.sparse
        ):
            module.forward = partial(_look_up_rows, module)  # type: ignore[method-assign]
        elif type(module) is torch.nn.Linear and "forward" not in module.__dict__:
            module.forward = partial(_multiply, module)  # type: ignore[method-assign]


def is_linear(forward: Any) -> bool:
    """Whether a function is what a linear layer here has for its forward pass."""
    return isinstance(forward, partial) and forward.func is _multiply


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
        ids, grad = ctx.ids.flatten(), grad.flatten(0, -2)
        if ctx.padding_idx is not None:  # has no gradient
            is_word = ids != ctx.padding_idx
            ids, grad = ids[is_word], grad[is_word]
        _gradient_of(ctx.weight).index_add_(0, ids, grad.to(ctx.weight.dtype))
        return None, None, None


def _multiply(module: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """In place of a Linear's own forward pass."""
    parameters: list[torch.Tensor] = [module.weight] if module.bias is None else [module.weight, module.bias]
    in_place = all(parameter.requires_grad for parameter in parameters)
    if not (in_place and torch.is_grad_enabled() and states.device.type == "cpu"):
        return F.linear(states, module.weight, module.bias)
    computing = parameters
    if torch.is_autocast_enabled("cpu"):
        computing = _cast(module, parameters, torch.get_autocast_dtype("cpu"))
        states = states.to(computing[0].dtype)
    product: torch.Tensor = _Multiply.apply(states, parameters, computing, module.weight)
    return product


def _cast(module: torch.nn.Linear, parameters: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The parameters in autocast's type, the same tensors until they change."""
    state = [dtype, _num_steps, *((parameter._version, parameter.data_ptr()) for parameter in parameters)]
    known: tuple[list[Any], list[torch.Tensor]] | None = module.__dict__.get("_cast_parameters")
    if known is None or known[0] != state:
        known = module.__dict__["_cast_parameters"] = state, [parameter.detach().to(dtype) for parameter in parameters]
    return known[1]


@cache  # once
def _count_steps() -> None:
    """Has every optimiser's steps counted: a fused one does not count as a change of a parameter's version."""

    def count(*args: Any) -> None:
        global _num_steps
        _num_steps += 1

    register_optimizer_step_post_hook(count)


class _Multiply(torch.autograd.Function):
    """The weight is an argument of its own so that the product needs a gradient where the states need none."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        parameters: list[torch.Tensor],
        computing: list[torch.Tensor],
        weight: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(states)
        ctx.parameters, ctx.weight = parameters, computing[0]
        with torch.autocast("cpu", enabled=False):
            weight, bias = computing[0], computing[1] if len(computing) > 1 else None
            if onednn.takes(states):
                return onednn.linear(states, weight, bias)
            return F.linear(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (states,) = ctx.saved_tensors
        weight, *bias = ctx.parameters
        rows, own = grad.flatten(0, -2), states.flatten(0, -2)
        with torch.autocast("cpu", enabled=False):
            if weight.dtype == rows.dtype:
                _gradient_of(weight).addmm_(rows.t(), own)
            else:
                _gradient_of(weight).add_(rows.t() @ own)
            for parameter in bias:
                _gradient_of(parameter).add_(rows.sum(0, dtype=parameter.dtype))
            return (_back(grad, ctx.weight) if ctx.needs_input_grad[0] else None), None, None, None


def _back(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of what was multiplied."""
    if onednn.takes(grad):
        return onednn.linear(grad, weight.t())
    return grad @ weight


def _gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """What gradients are added to."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
