"""A corpus into an embedding store, which knows the weights and the tokenizer that made it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from bge_accel.encoding.pipeline import WINDOW, EncodingCounts, encode_windows
from bge_accel.encoding.store import (
    Manifest,
    ShardWriter,
)

if TYPE_CHECKING:
    from bge_accel.encoding.embedding_model import EmbeddingModel


def encode_to_store(
    model: "EmbeddingModel",
    folder: str,
    manifest: Manifest,
    shards: Iterable[int],
    read: Callable[[int, int], Sequence[str]],
    *,
    max_tokens: int | None = None,
    max_texts: int | None = None,
    counts: EncodingCounts | None = None,
    on_texts: Callable[[int], Any] = lambda num_texts: None,
) -> None:
    """Encodes texts into shards of a store; a shard is flushed to disk while the next is computed.

    Args:
        manifest: from `prepare_store`.
        shards: numbers of the shards to write, taken one by one, so that several processes can share them.
        read: the texts from one number to another; asked for in the order of `shards`, at most `WINDOW` at a time.
    """

    def windows() -> Iterator[tuple[tuple[int, bool], Sequence[str]]]:
        for shard in shards:
            first, stop = manifest.rows_of(shard)
            for start in range(first, stop, WINDOW):
                end = min(start + WINDOW, stop)
                yield (shard, end == stop), read(start, end)

    settings = manifest.settings
    encoded = encode_windows(
        model.encoder,
        model.tokenizer,
        windows(),
        max_length=settings["max_length"],
        prefix=settings["prefix"],
        max_tokens=max_tokens,
        max_texts=max_texts,
        counts=counts,
        on_texts=on_texts,
        depth=1,  # a shard taken early is one that no other process can take
    )
    writer: ShardWriter | None = None
    finishing: Future | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            for (shard, is_last), embeddings in encoded:
                writer = writer or ShardWriter(folder, manifest, shard)
                writer.add(embeddings)
                if is_last:
                    if finishing is not None:
                        finishing.result()
                    finishing, writer = pool.submit(writer.finish), None
            if finishing is not None:
                finishing.result()
        finally:
            encoded.close()  # type: ignore[attr-defined]
            if writer is not None:
                writer.abandon()


def weights_digest(module: torch.nn.Module) -> str:
    """Digest of all tensors of a model, with their names; half a second a gigabyte and core."""

    def one(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    with ThreadPoolExecutor(max_workers=4) as pool:
        parts = pool.map(one, sorted(module.state_dict().items()))
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's rules and vocabulary; how it was last told to cut and pad does not matter."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = {
            key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")
        }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
