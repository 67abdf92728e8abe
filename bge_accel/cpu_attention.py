"""Attention for training on a CPU, where torch's fused one knows no dropout and is slow in half precision.

With dropout, torch falls back to matrices of all scores in memory. Here attention goes over a few heads at a time, whose scores
stay in the cache; none are kept, the backward pass computes them again, with the bytes that were drawn. In half precision
torch's backward pass takes up to ten times as long as in float32, so texts of ordinary length are attended in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from bge_accel.cpu_dropout import KeepMask

NAME = "bge_accel_cpu_attention"  # among transformers' attention functions
# Scores that a thread works on at a time: half of a server core's own cache.
CHUNK_BYTES = 512 * 1024
# Tokens of a text up to which half precision is attended in float32; above, torch's own kernel is as fast.
MOST_FLOAT32_TOKENS = 256


def use_cpu_attention(backbone: Any) -> None:
    """Has a model of BERT's family attend with what is here on a CPU; elsewhere, and if of another kind, it does as before."""
    from bge_accel.unpadded import why_not

    if why_not(backbone.config) is None:
        set_attention(backbone, NAME, attention)


def set_attention(backbone: Any, name: str, function: Callable[..., Any]) -> None:
    """Has a model attend by a function of ours, under a name of its own, with the masks that torch's attention gets."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    backbone.set_attn_implementation(name)


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
    if query.device.type != "cpu":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return attend(query, key, value, attention_mask, dropout, scaling).transpose(1, 2), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> torch.Tensor:
    """Attention on a CPU; with dropout it is computed in float32 or better.

    Args:
        query: (n, heads, queries, head_dim).
        key, value: (n, heads, length, head_dim).
        attention_mask: (n, 1, queries or 1, length), true for tokens; the same for all queries of a text.
        dropout: of the probabilities, 0 <= dropout < 1.
        scaling: of the scores; default: 1 / sqrt(head_dim).

    Returns:
        (n, heads, queries, head_dim), of the queries' type.
    """
    in_float32 = query.dtype in (torch.bfloat16, torch.float16) and key.shape[2] <= MOST_FLOAT32_TOKENS
    if not 0 < dropout < 1 and not in_float32:
        return F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    bias = None
    if attention_mask is not None:
        is_token = attention_mask[:, :, :1]
        bias = torch.zeros(is_token.shape, dtype=_precise(query.dtype)).masked_fill_(~is_token, float("-inf"))
    attended: torch.Tensor
    if 0 < dropout < 1:
        n, heads, num_queries, head_dim = query.shape
        scaling = head_dim**-0.5 if scaling is None else scaling
        bias = None if bias is None else bias.expand(-1, heads, 1, -1).flatten(0, 1)
        keep = KeepMask(torch.Size((n * heads, num_queries, key.shape[2])), dropout)
        attended = _AttendAndDrop.apply(query, key, value, bias, keep, 1 / (1 - dropout), scaling)
    else:
        attended = _AttendInFloat32.apply(query, key, value, bias, scaling)
    return attended


class _AttendInFloat32(torch.autograd.Function):
    """torch's fused attention of half-precision tensors, computed in float32; what is kept is in half precision."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor:
        attended, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.float(), key.float(), value.float(), attn_mask=bias, scale=scaling
        )
        attended = attended.to(query.dtype)
        ctx.save_for_backward(query, key, value, attended, log_sums)
        ctx.settings = {"attn_mask": bias, "scale": scaling}
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        *tensors, log_sums = ctx.saved_tensors
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), *(tensor.float() for tensor in tensors), log_sums, 0.0, False, **ctx.settings
        )
        return *(gradient.to(grad.dtype) for gradient in gradients), None, None


class _AttendAndDrop(torch.autograd.Function):
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
