"""Attention for training on a CPU, where torch's fused one knows no dropout and is slow in half precision.

With dropout, torch falls back to matrices of all scores in memory. Here attention goes over a few heads at a time, whose scores
stay in the cache; none are kept, the backward pass computes them again, with the bytes that were drawn. In half precision
torch's backward pass takes up to ten times as long as in float32, so texts of ordinary length are attended in float32.
"""

from collections.abc import Callable
from itertools import groupby, pairwise
from operator import methodcaller
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from bge_accel.kernels.dropout import KeepMask

NAME = "bge_accel_cpu_attention"  # among transformers' attention functions
# Scores that a thread works on at a time: half of a server core's own cache.
CHUNK_BYTES = 512 * 1024
# Tokens of a text up to which half precision is attended in float32; above, torch's own kernel is as fast.
MOST_FLOAT32_TOKENS = 256


def use_cpu_attention(backbone: Any) -> None:
    """Has a model of BERT's family attend with what is here on a CPU; elsewhere, and if of another kind, it does as before."""
    from bge_accel.kernels.packed import can_run_packed

    if can_run_packed(backbone.config):
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
    """Attention on a CPU of padded texts; with dropout it is computed in float32 or better.

    Args:
        query: (n, heads, queries, head_dim).
        key, value: (n, heads, length, head_dim).
        attention_mask: (n, 1, queries or 1, length), true for tokens; the same for all queries of a text.
        dropout: of the probabilities, 0 <= dropout < 1.
        scaling: of the scores; default: 1 / sqrt(head_dim).

    Returns:
        (n, heads, queries, head_dim), of the queries' type.
    """
    if not 0 < dropout < 1 and not _is_float32_faster(query, key.shape[2]):
        return F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    bias = None
    if attention_mask is not None:
        is_token = attention_mask[:, :, :1]
        bias = torch.zeros(is_token.shape, dtype=_precise(query.dtype)).masked_fill_(~is_token, float("-inf"))
    n, heads, num_queries, _ = query.shape
    whole = Block(slice(n), slice(n), None, slice(None))
    scores = n * heads * num_queries * key.shape[2]
    attended: torch.Tensor = _Attend.apply(query, key, value, [whole], bias, scores, dropout, scaling)
    return attended


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_starts: torch.Tensor,
    k_starts: torch.Tensor,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention on a CPU of texts that lie in one row, each within itself: without padding, and without copies of them.

    Args:
        query, key, value: (tokens, heads, head_dim); what stands behind the last text's end belongs to none, and gets zeros.
        q_starts, k_starts: (texts + 1,) int, where each text begins and the last ends, for queries and for keys.
        dropout: as in `attend`.

    Returns:
        (tokens, heads, head_dim), of the queries' type.
    """
    blocks, num_scores = split_into_blocks(q_starts.tolist(), k_starts.tolist(), query.shape[1])
    attended: torch.Tensor = _Attend.apply(query, key, value, blocks, None, num_scores, dropout, None)
    return attended


class Block(NamedTuple):
    """Texts of equal length that lie side by side."""

    queries: slice
    keys: slice
    num_texts: int | None
    """None: they have a dimension of their own already, and heads come before tokens."""
    scores: slice
    """Which of the scores of all blocks are theirs."""

    def of(self, tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        """(num_texts, heads, length, head_dim) of a tensor, without a copy."""
        if self.num_texts is None:
            return tensor
        length, (_, heads, head_dim) = (rows.stop - rows.start) // self.num_texts, tensor.shape
        token, head, value = tensor.stride()
        first = tensor.storage_offset() + rows.start * token
        return tensor.as_strided((self.num_texts, heads, length, head_dim), (length * token, head, token, value), first)


def split_into_blocks(q_starts: list[int], k_starts: list[int], heads: int) -> tuple[list[Block], int]:
    """Packed texts as blocks, and the number of scores of all."""
    sizes = [
        (q_end - q, k_end - k) for (q, q_end), (k, k_end) in zip(pairwise(q_starts), pairwise(k_starts), strict=True)
    ]
    blocks: list[Block] = []
    first = scores = 0
    for (queries, keys), same in groupby(sizes):
        num_texts = len(list(same))
        last, more = first + num_texts, num_texts * heads * queries * keys
        blocks.append(
            Block(
                slice(q_starts[first], q_starts[last]),
                slice(k_starts[first], k_starts[last]),
                num_texts,
                slice(scores, scores + more),
            )
        )
        first, scores = last, scores + more
    return blocks, scores


class _Attend(torch.autograd.Function):
    """Attention block by block; states and output are kept, nothing of the size of the scores but dropout's bytes."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: list[Block],
        bias: torch.Tensor | None,
        num_scores: int,
        dropout: float,
        scaling: float | None,
    ) -> torch.Tensor:
        kept = KeepMask(torch.Size((num_scores,)), dropout).kept if 0 < dropout < 1 else None
        to_precise = _to_precise(query, max(block.of(key, block.keys).shape[2] for block in blocks), dropout)
        q_all, k_all, v_all = map(to_precise, (query, key, value))
        attended = torch.empty_like(q_all)
        log_sums = []
        for block in blocks:
            q, k, v = block.of(q_all, block.queries), block.of(k_all, block.keys), block.of(v_all, block.keys)
            if kept is None:
                own, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q, k, v, attn_mask=bias, scale=scaling
                )
                log_sums.append(sums)
            else:
                own = _attend_and_drop(q, k, v, bias, kept[block.scores], 1 / (1 - dropout), scaling)
            block.of(attended, block.queries).copy_(own)
        attended[blocks[-1].queries.stop :] = 0
        attended = attended.to(query.dtype)
        ctx.save_for_backward(query, key, value, *([attended, *log_sums] if kept is None else []))
        ctx.settings = blocks, bias, kept, dropout, scaling, to_precise
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        blocks, bias, kept, dropout, scaling, to_precise = ctx.settings
        query, key, value, *of_fused = ctx.saved_tensors
        q_all, k_all, v_all, g_all = map(to_precise, (query, key, value, grad))
        out_all = to_precise(of_fused[0]) if kept is None else None
        gradients = [torch.empty_like(tensor) for tensor in (q_all, k_all, v_all)]
        for number, block in enumerate(blocks):
            q, k, v = block.of(q_all, block.queries), block.of(k_all, block.keys), block.of(v_all, block.keys)
            g = block.of(g_all, block.queries)
            if kept is None:
                out, log_sums = block.of(out_all, block.queries), of_fused[1 + number]
                own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    g, q, k, v, out, log_sums, 0.0, False, attn_mask=bias, scale=scaling
                )
            else:
                own = _drop_backward(g, q, k, v, bias, kept[block.scores], 1 / (1 - dropout), scaling)
            for whole, rows, part in zip(gradients, (block.queries, block.keys, block.keys), own, strict=True):
                block.of(whole, rows).copy_(part)
        last = blocks[-1]
        for whole, rows in zip(gradients, (last.queries, last.keys, last.keys), strict=True):
            whole[rows.stop :] = 0
        return *(gradient.to(query.dtype) for gradient in gradients), None, None, None, None, None


def _to_precise(query: torch.Tensor, longest: int, dropout: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What changes states to the type that attention is computed in."""
    if 0 < dropout < 1 or _is_float32_faster(query, longest):
        return methodcaller("to", _precise(query.dtype))
    return lambda states: states


def _is_float32_faster(query: torch.Tensor, longest: int) -> bool:
    return query.dtype in (torch.bfloat16, torch.float16) and longest <= MOST_FLOAT32_TOKENS


# ---- one block: with P = softmax(scaling Q K' + bias), a mask M of zeros and ones, and D = M * P: O = factor D V


def _attend_and_drop(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    kept: torch.Tensor,
    factor: float,
    scaling: float | None,
) -> torch.Tensor:
    q, k, v = _flat(query), _flat(key), _flat(value)
    scaling, bias, kept = _settings(query, key, bias, kept, scaling)
    attended = torch.empty_like(q)
    scores, mask = _buffers(q, k, 2)
    for part in _parts(q, scores):
        size = part.stop - part.start
        probabilities = _probabilities(q[part], k[part], bias, part, scaling, scores[:size])
        probabilities.mul_(mask[:size].copy_(kept[part]))
        _multiply(probabilities, v[part], factor, attended[part])
    return attended.view(query.shape)


def _drop_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    kept: torch.Tensor,
    factor: float,
    scaling: float | None,
) -> tuple[torch.Tensor, ...]:
    q, k, v, g = _flat(query), _flat(key), _flat(value), _flat(grad)
    scaling, bias, kept = _settings(query, key, bias, kept, scaling)
    q_grad, k_grad, v_grad = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scores, mask, changes = _buffers(q, k, 3)
    for part in _parts(q, scores):
        size = part.stop - part.start
        probabilities = _probabilities(q[part], k[part], bias, part, scaling, scores[:size])
        dropped = mask[:size].copy_(kept[part])
        change = _multiply(g[part], v[part].transpose(1, 2), factor, changes[:size]).mul_(dropped)
        dropped.mul_(probabilities)
        _multiply(dropped.transpose(1, 2), g[part], factor, v_grad[part])
        torch.ops.aten._softmax_backward_data.out(change, probabilities, -1, change.dtype, grad_input=change)
        _multiply(change, k[part], scaling, q_grad[part])
        _multiply(change.transpose(1, 2), q[part], scaling, k_grad[part])
    return q_grad.view(query.shape), k_grad.view(key.shape), v_grad.view(value.shape)


def _settings(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor, scaling: float | None
) -> tuple[float, torch.Tensor | None, torch.Tensor]:
    """The scaling, and bias and mask for each head of each text."""
    n, heads, num_queries, head_dim = query.shape
    if bias is not None:
        bias = bias.expand(-1, heads, 1, -1).flatten(0, 1)
    return head_dim**-0.5 if scaling is None else scaling, bias, kept.view(n * heads, num_queries, key.shape[2])


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """(n, heads, length, head_dim), laid out in any way, to (n * heads, length, head_dim)."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).flatten(0, 1)


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
