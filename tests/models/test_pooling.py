"""Each way of pooling: the same for padded and packed texts, and what sentence-transformers makes of it."""

import pytest
import torch

from bge_accel.models.pooling import POOLING, pooling_of_st, st_flags

LENGTHS = (3, 1, 7, 4)


def states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the same texts: padded states and their mask, packed states and where each text starts."""
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    torch.manual_seed(0)
    packed = torch.randn(sum(LENGTHS), 5, dtype=torch.float64)
    padded = torch.full((len(LENGTHS), max(LENGTHS), 5), 9.0, dtype=torch.float64)  # padding is never looked at
    mask = torch.zeros(padded.shape[:2], dtype=torch.int64)
    for text, length in enumerate(LENGTHS):
        padded[text, :length], mask[text, :length] = packed[starts[text] : starts[text + 1]], 1
    return padded, mask, packed, starts


@pytest.mark.parametrize("name", POOLING)
def test_packed_texts_are_pooled_as_padded_ones_with_the_same_gradient(name: str) -> None:
    padded, mask, packed, starts = states()
    way = POOLING[name]
    assert way.packed is not None
    filled = torch.cat([packed, packed.new_full((6, 5), 9.0)])  # on a CPU a row is filled up
    of_padded, of_packed = padded.requires_grad_(), filled.requires_grad_()
    expected, found = way.padded(of_padded, mask), way.packed(of_packed, starts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert of_padded.grad is not None and of_packed.grad is not None
    torch.testing.assert_close(of_packed.grad[: len(packed)], of_padded.grad[mask.bool()], rtol=0, atol=1e-14)
    assert not of_packed.grad[len(packed) :].any()


@pytest.mark.parametrize("name", POOLING)
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    padded, mask, _, _ = states()
    left = torch.stack([states.roll(-int(of.sum()), 0) for states, of in zip(padded, mask, strict=True)])
    expected = POOLING[name].padded(padded, mask)
    torch.testing.assert_close(POOLING[name].padded(left, mask.flip(1)), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", POOLING)
def test_sentence_transformers_pools_the_same(name: str) -> None:
    models = pytest.importorskip("sentence_transformers.models", reason="sentence-transformers is not installed")
    padded, mask, _, _ = states()
    theirs = models.Pooling(word_embedding_dimension=5, **st_flags(name))
    found = theirs({"token_embeddings": padded, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(found, POOLING[name].padded(padded, mask), rtol=0, atol=1e-12)
    assert [pooling_of_st(mode) for mode in (POOLING[name].st_name, POOLING[name].st_flag)] == [name, name]


def test_what_is_not_known_is_none_of_ours() -> None:
    assert [pooling_of_st(mode) for mode in ("weightedmean", None, ["cls"], 3)] == [None] * 4
