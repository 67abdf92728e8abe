"""Texts to embeddings in order: tokenised ahead, sorted by length, in micro-batches, halved where memory is short."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from bge_accel.encoding.batching import TokenBatch, default_token_budget, make_token_batch
from bge_accel.encoding.transfer import encoder_inputs, to_device, to_host
from bge_accel.kernels import packed as unpadded
from bge_accel.kernels.packed_linear import PackedLinears
from bge_accel.models.encoder import Encoder
from bge_accel.models.tokenizing import TOKENIZING, check_tokens, tokenize
from bge_accel.processes.progress import progress

T = TypeVar("T")


# Sorting reaches over this many texts at a time; more would gain nothing and hold more token ids in memory.
WINDOW = 4096


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yields from `items`, computing the next `depth` in a background thread meanwhile.

    An error in `items` is raised where its item would have come.
    """
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        queue = [pool.submit(next, iterator, end) for _ in range(depth)]
        try:
            while (item := queue.pop(0).result()) is not end:
                queue.append(pool.submit(next, iterator, end))
                yield item  # type: ignore[misc]
        finally:
            for future in queue:
                future.cancel()


@dataclass
class EncodingCounts:
    """What has been encoded; a caller hands one over and reads it when it likes."""

    num_texts: int = 0
    num_tokens: int = 0
    """Special tokens included, padding not."""
    num_truncated: int = 0
    """Texts that were cut to the maximum length."""
    max_tokens: int | None = None
    """What a micro-batch was cut down to after the memory had been too small for a larger one."""


def encode_texts(
    encoder: Encoder,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int,
    prefix: str = "",
    max_tokens: int | None = None,
    max_texts: int | None = None,
    show_progress: bool = False,
    description: str = "encoding",
    counts: EncodingCounts | None = None,
) -> np.ndarray:
    """Embeddings (len(texts), dim), float32, of texts with `prefix` put before each.

    Args:
        max_length: longer texts are cut to this many tokens, special tokens included.
        max_tokens: padded tokens of a micro-batch; by default what suits the device. Where the memory is too small it is
            halved, with a warning, until it fits.
        max_texts: texts of a micro-batch; by default bounded by `max_tokens` alone.
        counts: added to.
    """
    dim: int = encoder.backbone.config.hidden_size  # type: ignore[union-attr,assignment]
    embeddings = np.empty((len(texts), dim), dtype=np.float32)
    with progress(len(texts), description, "text", shown=show_progress) as bar:
        encoded = encode_windows(
            encoder,
            tokenizer,
            ((start, texts[start : start + WINDOW]) for start in range(0, len(texts), WINDOW)),
            max_length=max_length,
            prefix=prefix,
            max_tokens=max_tokens,
            max_texts=max_texts,
            counts=counts,
            on_texts=bar.update,
        )
        for start, window in encoded:
            embeddings[start : start + len(window)] = window
    return embeddings


def encode_windows(
    encoder: Encoder,
    tokenizer: Any,
    windows: Iterable[tuple[T, Sequence[str]]],
    *,
    max_length: int,
    prefix: str = "",
    max_tokens: int | None = None,
    max_texts: int | None = None,
    counts: EncodingCounts | None = None,
    on_texts: Callable[[int], Any] = lambda num_texts: None,
    depth: int = 2,
) -> Iterator[tuple[T, np.ndarray]]:
    """For each (key, texts) the key and the texts' embeddings (texts, dim), float32; the next are tokenised meanwhile.

    Texts are sorted by length inside their window. Memory is bounded by `depth` + 2 windows, whatever their number. From
    a GPU a window's embeddings are moved, and given out, while it computes the next window.

    Args:
        on_texts: called with the number of texts of each micro-batch that has been handed to the device.
        depth: windows taken ahead.
    """
    counts = EncodingCounts() if counts is None else counts
    device = next(encoder.parameters()).device
    budget = max_tokens or default_token_budget(device)
    config: Any = encoder.backbone.config
    is_unpadded = unpadded.is_in_use(config)
    packed = PackedLinears(encoder.backbone)

    def tokenized() -> Iterator[tuple[T, TokenBatch, int]]:
        for key, texts in windows:
            token_ids, num_truncated = tokenize_and_count(tokenizer, [prefix + text for text in texts], max_length)
            batch = make_token_batch(
                token_ids,
                pad_token_id=tokenizer.pad_token_id,
                max_tokens=min(budget, counts.max_tokens or budget),
                max_texts=max_texts,
                packed_for=config if is_unpadded else None,
            )
            yield key, batch, num_truncated

    waiting: tuple[T, Callable[[], np.ndarray]] | None = None
    for key, batch, num_truncated in prefetch(tokenized(), depth):
        parts: list[torch.Tensor] = []
        left = batch.micro_batches[::-1]
        while left:
            micro_batch = left.pop()
            rows, width = micro_batch["input_ids"].shape
            size = int(micro_batch["attention_mask"].sum()) if is_unpadded else rows * width
            if rows > 1 and size > (counts.max_tokens or size):
                left += [{name: tensor[part] for name, tensor in micro_batch.items()} for part in _halves(rows)]
                continue
            error = None
            try:
                with torch.inference_mode(), packed.used_for(batch.num_tokens):
                    inputs = encoder_inputs(micro_batch, device, config if is_unpadded else None)
                    parts.append(encoder(**inputs).float())
            except (RuntimeError, MemoryError) as raised:
                if rows == 1 or not is_out_of_memory(raised):
                    raise
                error = str(raised).strip().split("\n")[0]
            if error is not None:  # outside `except`, whose traceback would keep the tensors alive
                counts.max_tokens = max(size // 2, 1)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                warnings.warn(
                    f"out of memory with {size:,} tokens in a micro-batch: at most {counts.max_tokens:,} from "
                    f"here on ({error})",
                    RuntimeWarning,
                    stacklevel=2,
                )
                left.append(micro_batch)
                continue
            on_texts(rows)
        counts.num_texts += batch.num_texts
        counts.num_tokens += batch.num_tokens
        counts.num_truncated += num_truncated
        # Moved at the end of a window and not after each micro-batch, for which a GPU would have to stop.
        leaving = to_host(torch.cat(parts)[to_device(batch.restore, device)])
        if waiting is not None:
            yield waiting[0], waiting[1]()
        waiting = key, leaving
        if not _is_late(device):
            yield key, leaving()
            waiting = None
    if waiting is not None:
        yield waiting[0], waiting[1]()


def _is_late(device: torch.device) -> bool:
    """Whether what a device computes comes after the call that asks for it."""
    return device.type == "cuda"


def _halves(rows: int) -> tuple[slice, slice]:
    """The two halves of a micro-batch, the second first: they are taken from the end."""
    return slice(rows // 2, None), slice(rows // 2)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's or the computer's memory is too small, and nothing else."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def tokenize_and_count(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], int]:
    """Token ids of each text with special tokens, cut to `max_length`, and how many texts were cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not texts:
        return tokenize(tokenizer, texts, max_length), 0
    with TOKENIZING:
        tokenize(tokenizer, texts[:1], max_length)  # sets the tokenizer's own way of cutting
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=True)
    token_ids = [encoding.ids for encoding in encodings]
    check_tokens(token_ids, texts)
    full = (encoding for encoding, ids in zip(encodings, token_ids, strict=True) if len(ids) >= max_length)
    return token_ids, sum(bool(encoding.overflowing) for encoding in full)
