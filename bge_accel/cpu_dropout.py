"""Dropout for training on a CPU, where torch's own takes more time than the network that it is applied to.

torch draws a CPU's masks far more slowly than it applies them, and its fused attention knows no dropout there: it falls
back to matrices of all scores in memory. Here masks come from numpy's SFC64, a byte an element, and attention
goes over a few heads at a time, whose scores stay in the cache. Of scores none are kept: the backward pass computes them
again, with the bytes that were drawn. As with torch's, an element is dropped with probability p, the others are
divided by 1 - p (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html), and torch's generator decides.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

NAME = "bge_accel_cpu_dropout"  # among transformers' attention functions
# Scores that a thread works on at a time: half of a server core's own cache.
CHUNK_BYTES = 512 * 1024


def use_cpu_dropout(backbone: Any) -> None:
    """Has a model of BERT's family, on a CPU in training, drop with what is here; elsewhere it computes as before."""
    from bge_accel.unpadded import why_not

    for module in backbone.modules():
        if type(module) is torch.nn.Dropout and 0 < module.p < 1:
            module.forward = partial(_drop_states, module)  # type: ignore[method-assign]
    if why_not(backbone.config) is None:
        set_attention(backbone, NAME, attention)


def set_attention(backbone: Any, name: str, function: Callable[..., Any]) -> None:
    """Has a model attend by a function of ours, under a name of its own, with the masks that torch's attention gets."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    backbone.set_attn_implementation(name)


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


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None = None,
) -> torch.Tensor:
    """Attention with dropout of its probabilities, on a CPU; computed in float32 or better.

    Args:
        query: (n, heads, queries, head_dim).
        key, value: (n, heads, length, head_dim).
        attention_mask: (n, 1, queries or 1, length), true for tokens; the same for all queries of a text.
        dropout: 0 < dropout < 1.
        scaling: of the scores; default: 1 / sqrt(head_dim).

    Returns:
        (n, heads, queries, head_dim), of the queries' type.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias = None
    if attention_mask is not None:
        is_token = attention_mask[:, :, :1].expand(-1, query.shape[1], 1, -1).flatten(0, 1)
        bias = torch.zeros(is_token.shape, dtype=_precise(query.dtype)).masked_fill_(~is_token, float("-inf"))
    n, heads, num_queries = query.shape[:3]
    keep = KeepMask(torch.Size((n * heads, num_queries, key.shape[2])), dropout)
    attended: torch.Tensor = _Attend.apply(query, key, value, bias, keep, 1 / (1 - dropout), scaling)
    return attended


class _Attend(torch.autograd.Function):
    """With P = softmax(scaling Q K' + bias), a mask M of zeros and ones, and D = M * P: O = factor D V."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        keep: KeepMask,
        factor: float,
        scaling: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = bias, keep, factor, scaling
        q, k, v = _flat(query), _flat(key), _flat(value)
        attended = torch.empty_like(q)
        scores, mask = _buffers(q, k, 2)
        for part in _parts(q, scores):
            size = part.stop - part.start
            probabilities = _probabilities(q[part], k[part], bias, part, scaling, scores[:size])
            probabilities.mul_(mask[:size].copy_(keep.kept[part]))
            _multiply(probabilities, v[part], factor, attended[part])
        return attended.view(query.shape).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, key, value = ctx.saved_tensors
        bias, keep, factor, scaling = ctx.settings
        q, k, v, g = _flat(query), _flat(key), _flat(value), _flat(grad)
        q_grad, k_grad, v_grad = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        scores, mask, changes = _buffers(q, k, 3)
        for part in _parts(q, scores):
            size = part.stop - part.start
            probabilities = _probabilities(q[part], k[part], bias, part, scaling, scores[:size])
            dropped = mask[:size].copy_(keep.kept[part])
            change = _multiply(g[part], v[part].transpose(1, 2), factor, changes[:size]).mul_(dropped)
            dropped.mul_(probabilities)
            _multiply(dropped.transpose(1, 2), g[part], factor, v_grad[part])
            torch.ops.aten._softmax_backward_data.out(change, probabilities, -1, change.dtype, grad_input=change)
            _multiply(change, k[part], scaling, q_grad[part])
            _multiply(change.transpose(1, 2), q[part], scaling, k_grad[part])
        return _unflat(q_grad, query), _unflat(k_grad, key), _unflat(v_grad, value), None, None, None, None


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """(n, heads, length, head_dim), laid out in any way, to (n * heads, length, head_dim)."""
    return torch.empty(tensor.shape, dtype=_precise(tensor.dtype)).copy_(tensor).flatten(0, 1)


def _unflat(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The opposite, laid out as the linear layers have it: tokens before heads."""
    n, heads, length, head_dim = like.shape
    return torch.empty(n, length, heads, head_dim, dtype=like.dtype).transpose(1, 2).copy_(flat.view(like.shape))


def _multiply(left: torch.Tensor, right: torch.Tensor, factor: float, product: torch.Tensor) -> torch.Tensor:
    """factor left right, written into `product`, whose values are not read."""
    return product.baddbmm_(left, right, beta=0, alpha=factor)


def _buffers(q: torch.Tensor, k: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Room for the scores of a few heads, `count` times."""
    bytes_a_head = q.shape[1] * k.shape[1] * q.element_size()
    heads = min(max(CHUNK_BYTES * torch.get_num_threads() // bytes_a_head, 1), len(q))
    return [torch.empty(heads, q.shape[1], k.shape[1], dtype=q.dtype) for _ in range(count)]


def _parts(q: torch.Tensor, buffer: torch.Tensor) -> list[slice]:
    """All heads of all texts, as many at a time as a buffer takes."""
    return [slice(start, min(start + len(buffer), len(q))) for start in range(0, len(q), len(buffer))]


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, part: slice, scaling: float, scores: torch.Tensor
) -> torch.Tensor:
    """Before dropout, written into `scores`."""
    if bias is None:
        _multiply(q, k.transpose(1, 2), scaling, scores)
    else:
        torch.baddbmm(bias[part], q, k.transpose(1, 2), alpha=scaling, out=scores)
    return torch.softmax(scores, -1, out=scores)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for padded texts: (n, heads, length, head_dim) to (n, length, heads, head_dim)."""
    if not 0 < dropout < 1 or query.device.type != "cpu":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return attend(query, key, value, attention_mask, dropout, scaling).transpose(1, 2), None
