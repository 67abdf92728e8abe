"""Attention on a CPU: with dropout the formula with the masks drawn, in half precision what float32 gives."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import build, padded

from bge_accel.kernels import cpu_attention
from bge_accel.kernels.cpu_attention import attend, attend_packed, split_into_blocks, use_cpu_attention
from bge_accel.kernels.dropout import KeepMask
from bge_accel.models.encoder import Encoder


def plain(query, key, value, attention_mask, dropout, scaling):
    """The formula, with the mask that torch's generator gives."""
    scores = (query @ key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    flat = scores.flatten(0, 1)
    keep = KeepMask(flat.shape, dropout).kept.view(scores.shape)
    return (scores.softmax(-1) * keep / (1 - dropout)) @ value


def assert_same_with_gradients(ours, expected, tensors, generator):
    """What was computed of these tensors, and its gradients, in float64."""
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    found, others = (torch.autograd.grad((output * weights).sum(), tensors) for output in (ours, expected))
    for gradient, other in zip(found, others, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", ["one head", "some", "all"])
@pytest.mark.parametrize("num_queries", [1, 9])
@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_with_dropout_it_is_the_formula(chunk, num_queries, is_padded, scaling, monkeypatch):
    """Outputs and gradients, from tensors laid out as a model has them; the masks whatever fits the cache."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(5, length, 3, 4, dtype=torch.float64, generator=generator).transpose(1, 2).requires_grad_()
        for length in (num_queries, 9, 9)
    )
    is_token = None
    if is_padded:
        lengths = torch.tensor([9, 9, 4, 1, 7])
        is_token = (torch.arange(9) < lengths[:, None])[:, None, None].expand(-1, 1, num_queries, -1)
    heads = {"one head": 1, "some": 4, "all": 15}[chunk]
    monkeypatch.setattr(cpu_attention, "CHUNK_BYTES", -(-heads * num_queries * 9 * 8 // torch.get_num_threads()))
    torch.manual_seed(11)
    ours = attend(query, key, value, is_token, 0.2, scaling)
    torch.manual_seed(11)
    expected = plain(query, key, value, is_token, 0.2, 0.5 if scaling is None else scaling)
    assert_same_with_gradients(ours, expected, (query, key, value), generator)


@pytest.mark.parametrize("chunk", ["one head", "all"])
@pytest.mark.parametrize("one_query", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("lengths", [[9, 9, 4, 1, 7, 7], [3], [1, 1, 1], [2, 5, 2]])
def test_texts_in_one_row_are_attended_each_by_itself(lengths, dropout, one_query, chunk, monkeypatch):
    """Outputs and gradients, against the formula for one text after another with its part of the bytes drawn."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q_starts = torch.arange(len(starts)) if one_query else starts
    rows = torch.randn(3, 5, sum(lengths), 4, dtype=torch.float64, generator=generator)  # three heads of five
    query, key, value = (states.transpose(0, 1)[:, 1:4].requires_grad_() for states in rows)
    query = query[: q_starts[-1]]
    heads = {"one head": 1, "all": 100}[chunk]
    monkeypatch.setattr(cpu_attention, "CHUNK_BYTES", heads * 64)
    torch.manual_seed(11)
    ours = attend_packed(query, key, value, q_starts, starts, dropout)
    sizes = [3 * (1 if one_query else length) * length for length in lengths]
    torch.manual_seed(11)
    kept = KeepMask(torch.Size((sum(sizes),)), dropout).kept if dropout else torch.ones(sum(sizes))
    parts = []
    texts = (query.split(q_starts.diff().tolist()), key.split(lengths), value.split(lengths), kept.split(sizes))
    for q, k, v, own in zip(*texts, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) / 2
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1) * own.view(scores.shape) / (1 - dropout), v))
    expected = torch.cat(parts)
    assert_same_with_gradients(ours, expected, (query, key, value), generator)


def test_neighbours_of_equal_length_are_attended_together():
    blocks, scores = split_into_blocks([0, 5, 10, 12, 17], [0, 5, 10, 12, 17], 3)
    assert [(block.queries, block.num_texts) for block in blocks] == [
        (slice(0, 10), 2),
        (slice(10, 12), 1),
        (slice(12, 17), 1),
    ]
    assert scores == blocks[-1].scores.stop == 3 * (25 + 25 + 4 + 25)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("longest", [20, 300])  # attended in float32, and as torch does
def test_texts_in_one_row_in_half_precision(longest, dropout):
    starts = torch.tensor([0, longest, longest + 7, 2 * longest + 7], dtype=torch.int32)
    exact = [torch.randn(2 * longest + 7, 2, 8, dtype=torch.float64) for _ in range(3)]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in exact]
        torch.manual_seed(3)
        attended = attend_packed(*tensors, starts, starts, dropout)
        attended.backward(torch.ones_like(attended))
        assert attended.dtype == dtype == tensors[0].grad.dtype
        found.append([attended.detach(), *(tensor.grad for tensor in tensors)])
    for ours, expected in zip(*found, strict=True):
        assert (ours.double() - expected).norm() < 0.02 * expected.norm()


def test_with_dropout_it_is_computed_in_float32():
    query, key, value = (torch.randn(2, 3, 9, 4).bfloat16().requires_grad_() for _ in range(3))
    torch.manual_seed(2)
    ours = attend(query, key, value, None, 0.2)
    torch.manual_seed(2)
    precise = attend(query.float(), key.float(), value.float(), None, 0.2)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, precise.bfloat16())
    ours.sum().backward()
    assert query.grad.dtype == torch.bfloat16 and key.grad.abs().sum() > 0 and value.grad.abs().sum() > 0


def test_the_mean_of_many_draws_is_attention_without_dropout():
    query, key, value = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    torch.manual_seed(0)
    many = attend(*(tensor.expand(20_000, -1, -1, -1) for tensor in (query, key, value)), None, 0.3)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    deviation = many.std(0) / 20_000**0.5 + 1 / 256  # the threshold that all share
    assert ((many.mean(0) - exact[0]).abs() < 5 * deviation).all()


def attended_in_half(length, num_queries, is_padded):
    """Query, key and value laid out as a model has them, in bfloat16; mask; what they are weighed with."""
    generator = torch.Generator().manual_seed(length)
    query, key, value, weights = (
        torch.randn(3, n, 2, 8, generator=generator).bfloat16().transpose(1, 2)
        for n in (num_queries, length, length, num_queries)
    )
    is_token = None
    if is_padded:
        lengths = torch.tensor([length, 1, length // 2 + 1])
        is_token = (torch.arange(length) < lengths[:, None])[:, None, None].expand(-1, 1, num_queries, -1)
    return [tensor.requires_grad_() for tensor in (query, key, value)], is_token, weights


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("num_queries", [1, None])
@pytest.mark.parametrize("length", [1, 7, 256])
def test_half_precision_is_attended_in_float32(length, num_queries, is_padded, autocast):
    """Outputs are float32's, rounded once; gradients too, but that the output they start from is the rounded one."""
    tensors, is_token, weights = attended_in_half(length, num_queries or length, is_padded)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = attend(*tensors, is_token, scaling=0.3)
    precise = [tensor.detach().float().requires_grad_() for tensor in tensors]
    expected = F.scaled_dot_product_attention(*precise, is_token, scale=0.3)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected.bfloat16(), atol=0, rtol=2**-7)  # one unit of the last place
    found = torch.autograd.grad(ours, tensors, weights)
    for gradient, other in zip(found, torch.autograd.grad(expected, precise, weights.float()), strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), other, atol=2e-2 * other.abs().max().item(), rtol=2e-2)


def test_float32_and_long_texts_are_left_to_torch():
    for length, dtype in ((9, torch.float32), (9, torch.float64), (300, torch.bfloat16)):
        tensors = [torch.randn(1, 2, length, 8).to(dtype) for _ in range(3)]
        expected = F.scaled_dot_product_attention(*tensors, scale=0.25)
        assert torch.equal(attend(*tensors, None, scaling=0.25), expected)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_and_gradients_of_a_model_in_half_precision(pooling):
    """Closer to float64's than with torch's own attention in bfloat16, or as close."""
    exact = Encoder(build("bert"), pooling, normalize=True)
    batch = padded([5, 1, 12, 12, 3], exact.config)
    weights = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = exact(**batch)
    (expected * weights).sum().backward()
    errors = {}
    for name in ("torch", "ours"):
        encoder = Encoder(build("bert").bfloat16(), pooling, normalize=True)
        if name == "ours":
            use_cpu_attention(encoder.backbone)
        embedded = encoder(**batch)
        (embedded * weights).sum().backward()
        pairs = [(embedded, expected)] + [
            (own.grad, other.grad)
            for own, other in zip(encoder.parameters(), exact.parameters(), strict=True)
            if other.grad is not None
        ]
        errors[name] = torch.stack([(own.double() - other).norm() / other.norm() for own, other in pairs])
    assert errors["ours"][0] < 0.02 and errors["ours"].median() < min(0.05, 1.2 * errors["torch"].median())
