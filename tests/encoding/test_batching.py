"""Micro-batches: every text once, within the budget, at the least cost, and back in order."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.models import build

from bge_accel.encoding.batching import (
    default_token_budget,
    make_token_batch,
    plan_micro_batches,
    split_micro_batches,
    tokens_that_fit,
)
from bge_accel.encoding.pipeline import tokenize_and_count
from bge_accel.kernels import onednn
from bge_accel.kernels import packed as unpadded
from bge_accel.models.tokenizing import tokenize


def cost_of(groups, overhead, multiple=1):
    """Padded tokens of each group and the fixed price of each, counted without the code under test."""
    return sum(len(group) * (-(-max(group) // multiple) * multiple) + overhead for group in groups)


def fits(group, max_tokens, max_texts, multiple=1):
    padded = len(group) * (-(-max(group) // multiple) * multiple)
    return len(group) == 1 or (padded <= max_tokens and len(group) <= (max_texts or len(group)))


def random_case(seed, most=9):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, int(rng.choice([4, 20, 200])), size=int(rng.integers(1, most + 1))).tolist()
    limits = {
        "max_tokens": int(rng.choice([1, 8, 40, 150, 10_000])),
        "max_texts": [None, 1, 2, 5][rng.integers(4)],
        "overhead_tokens": int(rng.choice([0, 1, 10, 96, 1000])),
        "pad_to_multiple_of": int(rng.choice([1, 8])),
    }
    return lengths, limits


@pytest.mark.parametrize("seed", range(60))
def test_the_plan_is_the_cheapest_of_all_cuts(seed):
    lengths, limits = random_case(seed)
    max_tokens, max_texts, overhead, multiple = limits.values()
    plan = plan_micro_batches(lengths, **limits)
    groups = [[lengths[i] for i in group] for group in plan]
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    assert sum(groups, []) == sorted(lengths, reverse=True)  # noqa: RUF017
    assert all(fits(group, max_tokens, max_texts, multiple) for group in groups)
    ordered, least = sorted(lengths, reverse=True), None
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [len(lengths)]
        candidate = [ordered[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        if all(fits(group, max_tokens, max_texts, multiple) for group in candidate):
            least = min(cost_of(candidate, overhead, multiple), least or 10**9)
    assert cost_of(groups, overhead, multiple) == least


@pytest.mark.parametrize("seed", range(20))
def test_a_large_plan_is_cheaper_than_filling_each_batch(seed):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(4, 1, size=1500).astype(int) + 1, 512).tolist()
    plan = plan_micro_batches(lengths, 2048, overhead_tokens=96)
    groups = [[lengths[i] for i in group] for group in plan]
    greedy, current = [], []
    for length in sorted(lengths, reverse=True):
        if current and not fits([*current, length], 2048, None):
            greedy.append(current)
            current = []
        current.append(length)
    greedy.append(current)
    assert sorted(np.concatenate(plan).tolist()) == list(range(1500))
    assert all(fits(group, 2048, None) for group in groups)
    assert cost_of(groups, 96) < cost_of(greedy, 96)


@pytest.mark.parametrize("seed", range(50))
def test_packed_texts_take_as_few_batches_as_they_can(seed):
    """Whatever their lengths, which cost nothing: the fewest cuts of the sorted texts, none larger than allowed."""
    lengths, limits = random_case(seed, most=40)
    max_tokens, max_texts = limits["max_tokens"], limits["max_texts"]
    plan = plan_micro_batches(lengths, **limits | {"overhead_tokens": 5}, packed=True)
    groups = [[lengths[i] for i in group] for group in plan]
    assert sum(groups, []) == sorted(lengths, reverse=True)  # noqa: RUF017
    assert all(len(group) == 1 or sum(group) <= max_tokens for group in groups)
    assert all(len(group) <= (max_texts or len(group)) for group in groups)
    fewest, filled = 1, []
    for length in sorted(lengths, reverse=True):  # filling one after another is best
        if filled and (sum(filled) + length > max_tokens or len(filled) == max_texts):
            fewest, filled = fewest + 1, []
        filled.append(length)
    assert len(groups) == fewest


@pytest.mark.parametrize("kernel, most, padding", [("plain", 150, 0), ("cpu", 10, 0), ("cpu", 150, 128 - 110)])
def test_a_packed_batch_has_hardly_any_padding(kernel, most, padding, monkeypatch):
    """None, or on a CPU what rounds the number of tokens up, and of small numbers none either."""
    monkeypatch.setattr(onednn, "is_available", lambda: True)
    monkeypatch.setattr(onednn, "MIN_ROWS", 11)
    model = build("bert")
    unpadded.use_kernel(model, kernel)
    texts = [[1] * n for n in (3, 50, 7, 50)] if most > 10 else [[1] * 5] * 4
    batch = make_token_batch(texts, pad_token_id=0, max_tokens=most, packed_for=model.config, pad_to_multiple_of=8)
    assert len(batch.micro_batches) == (1 if most > 10 else 2)
    packed = [unpadded.pack(**micro_batch, config=model.config) for micro_batch in batch.micro_batches]
    assert sum(each["input_ids"].numel() for each in packed) == batch.num_tokens + batch.num_padding
    assert batch.num_padding == padding


def test_a_text_longer_than_the_budget_stands_alone():
    plan = plan_micro_batches([50, 3, 200, 3], 100, overhead_tokens=1000)
    assert [group.tolist() for group in plan] == [[2], [0], [1, 3]]
    assert [len(group) for group in plan_micro_batches([200] * 3, 100)] == [1, 1, 1]


def test_the_overhead_decides_between_padding_and_batches():
    lengths = [100] * 4 + [10] * 4
    assert [len(group) for group in plan_micro_batches(lengths, 10_000, overhead_tokens=359)] == [4, 4]
    assert [len(group) for group in plan_micro_batches(lengths, 10_000, overhead_tokens=361)] == [8]


def test_the_plan_is_deterministic_and_keeps_the_order_of_equal_lengths():
    lengths = [7, 3, 7, 3, 7, 9]
    plans = [plan_micro_batches(given, 10**6) for given in (lengths, tuple(lengths), np.array(lengths), lengths)]
    assert [np.concatenate(plan).tolist() for plan in plans] == [[5, 0, 2, 4, 1, 3]] * 4


def test_nothing_gives_no_batch():
    assert plan_micro_batches([], 100) == []
    batch = make_token_batch([], pad_token_id=0, max_tokens=100)
    assert (batch.micro_batches, batch.num_texts, batch.num_tokens, batch.num_padding) == ([], 0, 0, 0)
    assert batch.restore.shape == (0,) and batch.restore.dtype == torch.int64


@pytest.mark.parametrize("multiple", [None, 1, 8])
@pytest.mark.parametrize("max_texts", [None, 3])
def test_token_batches_hold_every_token_and_the_way_back(multiple, max_texts):
    rng = np.random.default_rng(0)
    token_ids = [
        rng.integers(5, 1000, size=n).tolist() for n in rng.permutation([1, 1, 2, 3, 3, 9, 16, 17, 30, 64, 90])
    ]
    batch = make_token_batch(
        token_ids,
        pad_token_id=3,
        max_tokens=80,
        max_texts=max_texts,
        overhead_tokens=20,
        pad_to_multiple_of=multiple,
    )
    texts, slots = [], 0
    for micro_batch in batch.micro_batches:
        ids, mask = micro_batch["input_ids"], micro_batch["attention_mask"]
        num_texts, width = ids.shape
        assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape
        assert width % (multiple or 1) == 0 and width - int(mask.sum(1).max()) < (multiple or 1)
        assert num_texts == 1 or (ids.numel() <= 80 and num_texts <= (max_texts or num_texts))
        assert (ids[mask == 0] == 3).all()
        assert (mask.diff(dim=1) <= 0).all() and mask[:, 0].all()  # padding on the right alone
        texts += [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        slots += ids.numel()
    assert [texts[i] for i in batch.restore] == token_ids and len(batch.micro_batches) > 2
    assert batch.num_texts == 11 and batch.num_tokens == 236 and batch.num_padding == slots - 236


def test_longest_texts_come_first():
    batch = make_token_batch([[1] * n for n in (3, 50, 7, 90)], pad_token_id=0, max_tokens=100, overhead_tokens=0)
    widths = [micro_batch["input_ids"].shape[1] for micro_batch in batch.micro_batches]
    assert widths == sorted(widths, reverse=True) and widths[0] == 90


def test_tokenize_cuts_with_special_tokens_included(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["", "a", "a b c d e f g h", "的是"]
    cut = tokenize(tokenizer, texts, 5)
    assert cut == [tokenizer(text, truncation=True, max_length=5)["input_ids"] for text in texts]
    assert [len(ids) for ids in cut] == [2, 3, 5, 4]
    assert all(ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id for ids in cut)
    assert tokenize(tokenizer, [], 5) == [] and tokenize(tokenizer, ("a",), 5) == [cut[1]]


def test_threads_that_share_a_tokenizer_cut_each_to_its_own_length(tiny_model, eager_threads):
    """As training's next batch and its evaluation do."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["a story of a king " * 40] * 8

    def longest(max_length):
        cut = [tokenize(tokenizer, texts, max_length) for _ in range(60)]
        cut += [tokenize_and_count(tokenizer, texts, max_length)[0] for _ in range(60)]
        return {len(ids) for of_one_call in cut for ids in of_one_call}

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(longest, (16, 32, 128))) == [{16}, {32}, {128}]


def test_a_gpu_gets_larger_batches_than_a_cpu():
    assert 0 < default_token_budget(torch.device("cpu")) < default_token_budget(torch.device("cuda"))


def test_a_large_model_gets_smaller_micro_batches():
    from transformers import BertConfig

    small = BertConfig(hidden_size=384, num_hidden_layers=12)
    large = BertConfig(hidden_size=4096, num_hidden_layers=32)
    assert tokens_that_fit(10e9, small, bytes_per_value=4, checkpointing=False) == 8192
    fitting = tokens_that_fit(10e9, large, bytes_per_value=2, checkpointing=False)
    assert fitting % 256 == 0 and 0.8 * 10e9 < fitting * 34 * 4096 * 32 < 10e9
    assert tokens_that_fit(10e9, large, bytes_per_value=2, checkpointing=True) == 8192
    assert tokens_that_fit(1e8, large, bytes_per_value=4, checkpointing=False) == 512


def test_splitting_reaches_the_count_and_keeps_every_text_in_its_place() -> None:
    token_ids = [[i + 5] * (1 + i % 7) for i in range(23)]
    batch = make_token_batch(token_ids, pad_token_id=0, max_tokens=40, overhead_tokens=10)
    for count in (1, len(batch.micro_batches) + 1, 11, 23):
        split = split_micro_batches(batch, count)
        assert len(split.micro_batches) == max(count, len(batch.micro_batches))
        rows = [row[mask.bool()] for mb in split.micro_batches for row, mask in zip(*mb.values(), strict=True)]
        restored = [rows[i].tolist() for i in split.restore]
        assert restored == token_ids and split.num_tokens == batch.num_tokens
