"""Many texts into micro-batches by length under a token budget, for training and encoding alike.

Padding is what costs: texts are sorted by length and cut where little is padded; the order is undone on the embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bge_accel.kernels.packed import num_packed


@dataclass
class TokenBatch:
    """Micro-batches of token ids that together hold `num_texts` texts, longest first."""

    micro_batches: list[dict[str, torch.Tensor]]
    """Each `input_ids` and `attention_mask` of shape (texts, width), int64."""
    restore: torch.Tensor
    """(num_texts,): rows of the concatenated micro-batches in the order of the texts given."""
    num_tokens: int
    """Real tokens, padding not counted."""
    num_padding: int
    num_token_pairs: int
    """Sum of the squares of the texts' lengths: what attention's work goes by."""

    @property
    def num_texts(self) -> int:
        """How many texts the micro-batches hold together."""
        return len(self.restore)


def default_token_budget(
    device: torch.device, model_config: Any = None, *, bytes_per_value: int = 4, checkpointing: bool = False
) -> int:
    """Padded tokens in a micro-batch: what keeps the device busy and no more.

    On a CPU the activations of about 2,048 tokens still fit its cache. 8,192 fill a GPU; in training a large model gets
    fewer, so that one micro-batch's activations take at most an eighth of the card. It depends on the card and the model
    alone, never on what memory is free, so that the same run cuts its batches alike every time.

    Args:
        model_config: of the model in training (`hidden_size`, `num_hidden_layers`); None where no graph is kept.
        bytes_per_value: of its activations, 2 or 4.
        checkpointing: of gradients: one state a layer is kept.
    """
    if device.type == "cpu":
        return 2048
    if model_config is None or device.type != "cuda":
        return 8192
    card_bytes = torch.cuda.get_device_properties(device).total_memory
    return tokens_that_fit(card_bytes / 8, model_config, bytes_per_value=bytes_per_value, checkpointing=checkpointing)


def tokens_that_fit(num_bytes: float, model_config: Any, *, bytes_per_value: int, checkpointing: bool) -> int:
    """Padded tokens whose activations take `num_bytes`, between 512 and 8,192; arguments as in `default_token_budget`.

    17 values of the hidden size a token and layer: Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198), eq. 1,
    without the attention matrix, which fused attention never stores.
    """
    hidden, layers = model_config.hidden_size, model_config.num_hidden_layers
    bytes_per_token = bytes_per_value * hidden * (layers + 17 if checkpointing else 17 * layers)
    return int(min(8192, max(512, num_bytes / bytes_per_token // 256 * 256)))


def plan_micro_batches(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    max_texts: int | None = None,
    overhead_tokens: int = 96,
    pad_to_multiple_of: int = 1,
    packed: bool = False,
) -> list[np.ndarray]:
    """Cuts texts, sorted by length, into micro-batches at the least cost.

    The cost of a micro-batch is its padded size plus `overhead_tokens` (the fixed price of one more pass through the
    network, counted in tokens); the cuts that minimise the sum are found by dynamic programming. No micro-batch is
    larger than `max_tokens` padded tokens, save one that holds a single longer text.

    Args:
        packed: the texts will lie side by side, without padding: a micro-batch's size is that of its real tokens.

    Returns:
        Indices into `lengths` of each micro-batch, longest texts first. They depend on nothing but the arguments.
    """
    num_texts = len(lengths)
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    widths = np.asarray(lengths, dtype=np.int64)[order]
    if packed:
        before = np.concatenate([[0], np.cumsum(widths)])
        most = np.searchsorted(before, before[:-1] + max_tokens, "right") - 1 - np.arange(num_texts)
    else:
        widths = -(-widths // pad_to_multiple_of) * pad_to_multiple_of
        most = max_tokens // np.maximum(widths, 1)
    most = np.clip(most, 1, max_texts)
    cost = np.full(num_texts + 1, np.iinfo(np.int64).max, dtype=np.int64)
    cost[0] = 0
    start_of = np.zeros(num_texts + 1, dtype=np.int64)
    for start in range(num_texts):
        sizes = np.arange(1, min(most[start], num_texts - start) + 1)
        slots = before[start + sizes] - before[start] if packed else widths[start] * sizes
        reached = cost[start] + slots + overhead_tokens
        ends = slice(start + 1, start + 1 + len(sizes))
        better = reached < cost[ends]
        cost[ends][better] = reached[better]
        start_of[ends][better] = start
    cuts, end = [], num_texts
    while end > 0:
        cuts.append(order[start_of[end] : end])
        end = int(start_of[end])
    return cuts[::-1]


def make_token_batch(
    token_ids: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    max_tokens: int,
    max_texts: int | None = None,
    overhead_tokens: int = 96,
    pad_to_multiple_of: int | None = None,
    packed_for: Any = None,
) -> TokenBatch:
    """Pads token ids into the micro-batches of `plan_micro_batches`, on the right, where no text's place depends on others.

    Args:
        packed_for: configuration of a model for which `kernels.packed.pack` will take the padding off again.
    """
    multiple = pad_to_multiple_of or 1
    lengths = [len(ids) for ids in token_ids]
    plan = plan_micro_batches(
        lengths,
        max_tokens,
        max_texts=max_texts,
        overhead_tokens=overhead_tokens,
        pad_to_multiple_of=multiple,
        packed=packed_for is not None,
    )
    micro_batches, num_slots = [], 0
    for texts in plan:
        width = -(-max(lengths[i] for i in texts) // multiple) * multiple
        input_ids = np.full((len(texts), width), pad_token_id, dtype=np.int64)
        attention_mask = np.zeros((len(texts), width), dtype=np.int64)
        for row, i in enumerate(texts):
            input_ids[row, : lengths[i]] = token_ids[i]
            attention_mask[row, : lengths[i]] = 1
        of_texts = sum(lengths[i] for i in texts)
        num_slots += input_ids.size if packed_for is None else num_packed(of_texts, packed_for)
        micro_batches.append(
            {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
        )
    restore = np.empty(len(lengths), dtype=np.int64)
    if plan:
        restore[np.concatenate(plan)] = np.arange(len(lengths))
    num_tokens = sum(lengths)
    pairs = sum(length * length for length in lengths)
    return TokenBatch(micro_batches, torch.from_numpy(restore), num_tokens, num_slots - num_tokens, pairs)


def split_micro_batches(batch: TokenBatch, count: int) -> TokenBatch:
    """The same batch in at least `count` micro-batches, the ones with most texts halved until there are so many.

    Where every forward pass is a collective (FSDP, ZeRO-3), processes that make different numbers of them would hang.
    """
    assert count <= max(batch.num_texts, 1)
    micro_batches = list(batch.micro_batches)
    while len(micro_batches) < count:
        index = max(range(len(micro_batches)), key=lambda i: len(micro_batches[i]["input_ids"]))
        whole = micro_batches[index]
        half = len(whole["input_ids"]) // 2
        micro_batches[index : index + 1] = [
            {name: tensor[:half] for name, tensor in whole.items()},
            {name: tensor[half:] for name, tensor in whole.items()},
        ]
    return replace(batch, micro_batches=micro_batches)
