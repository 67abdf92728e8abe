"""Texts to embeddings, fast: sorted micro-batches under a token budget, tokenised while the model computes."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from bge_accel.batching import TokenBatch, default_token_budget, make_token_batch, tokenize
from bge_accel.model import Encoder, instruction_prefix, load_encoder, max_positions

T = TypeVar("T")

# Sorting reaches over this many texts at a time; more would gain nothing and hold more token ids in memory.
WINDOW = 4096


def cpu_has_bf16() -> bool:
    """Whether this CPU computes in bfloat16 itself; emulated, it is far slower than float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_dtype(fp16: bool, bf16: bool, device: torch.device | None = None) -> tuple[torch.dtype, str | None]:
    """The precision to compute in, and a warning where it is not the one asked for.

    A CPU has no fast float16: it takes bfloat16 instead where it has that, else float32.
    """
    on_gpu = (device or default_device()).type != "cpu"
    if fp16 and bf16:
        raise ValueError("--fp16 and --bf16 exclude each other; give one of them")
    if on_gpu and bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32, "this GPU has no bfloat16 arithmetic: computing in float32 instead; --fp16 is faster"
    if on_gpu or not (fp16 or bf16):
        return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32, None
    if cpu_has_bf16():
        return torch.bfloat16, "fp16 needs a GPU: computing in bfloat16 instead" if fp16 else None
    asked = "fp16 needs a GPU and" if fp16 else "this CPU has no bfloat16 arithmetic:"
    return torch.float32, f"{asked} {'this CPU has no bfloat16 either: ' if fp16 else ''}computing in float32 instead"


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(asked: str | None, device: torch.device) -> tuple[str | None, str | None]:
    """Accelerate's name of a mixed precision (None: its own default) as far as the device can.

    Args:
        asked: "auto" for bfloat16 where the hardware has it, "fp16", "bf16", or any other of Accelerate's names.

    Returns:
        The name, and a warning where it is not what was asked for.
    """
    if asked not in ("auto", "fp16", "bf16"):
        return asked, None
    dtype, warning = resolve_dtype(asked == "fp16", asked != "fp16", device)
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no")
    return name, None if asked == "auto" else warning


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


@torch.inference_mode()
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
) -> np.ndarray:
    """Embeddings (len(texts), dim), float32, of texts with `prefix` put before each.

    Args:
        max_length: longer texts are cut to this many tokens, special tokens included.
        max_tokens: padded tokens of a micro-batch; by default what suits the device.
        max_texts: texts of a micro-batch; by default bounded by `max_tokens` alone.
    """
    from tqdm import tqdm

    device = next(encoder.parameters()).device
    budget = max_tokens or default_token_budget(device)

    def windows() -> Iterator[tuple[int, TokenBatch]]:
        for start in range(0, len(texts), WINDOW):
            token_ids = tokenize(tokenizer, [prefix + text for text in texts[start : start + WINDOW]], max_length)
            yield (
                start,
                make_token_batch(
                    token_ids,
                    pad_token_id=tokenizer.pad_token_id,
                    padding_side=tokenizer.padding_side,
                    max_tokens=budget,
                    max_texts=max_texts,
                ),
            )

    dim: int = encoder.backbone.config.hidden_size  # type: ignore[union-attr,assignment]
    embeddings = np.empty((len(texts), dim), dtype=np.float32)
    with tqdm(total=len(texts), desc=description, unit="text", disable=not show_progress) as bar:
        for start, batch in prefetch(windows()):
            parts = []
            for micro_batch in batch.micro_batches:
                inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
                parts.append(encoder(**inputs).float().cpu())
                bar.update(len(parts[-1]))
            embeddings[start : start + batch.num_texts] = torch.cat(parts)[batch.restore].numpy()
    return embeddings


class EmbeddingModel:
    """A text-embedding model for inference, from a folder or the hub.

    Pooling, normalisation, instructions and maximum length are read from the model; what is given here wins. Where
    the model says nothing: CLS pooling, normalised, no instruction.

    Args:
        device: as torch names it; by default the GPU if there is one.
        dtype: torch dtype or its name; "auto" is float32 on a CPU and float16 on a GPU.
        pooling: "cls", "mean" or "last_token".
        query_instruction, passage_instruction: put before each query or passage through the format; "" means none.
        batch_size, max_length, query_max_length, passage_max_length, convert_to_numpy: for calls that do not say
            otherwise.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        pooling: str | None = None,
        normalize: bool | None = None,
        query_instruction: str | None = None,
        query_instruction_format: str = "{}{}",
        passage_instruction: str | None = None,
        passage_instruction_format: str = "{}{}",
        batch_size: int | None = None,
        max_length: int | None = None,
        query_max_length: int | None = None,
        passage_max_length: int | None = None,
        convert_to_numpy: bool = True,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        token: str | None = None,
    ) -> None:
        self.device = torch.device(device) if device is not None else default_device()
        if dtype == "auto":
            dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        self.encoder, self.tokenizer, self.settings = load_encoder(
            model_name_or_path,
            pooling=pooling,
            normalize=normalize,
            query_prefix=instruction_prefix(query_instruction, query_instruction_format),
            passage_prefix=instruction_prefix(passage_instruction, passage_instruction_format),
            dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
            trust_remote_code=trust_remote_code,
            cache_dir=cache_dir,
            token=token,
        )
        self.encoder.to(self.device)
        self.batch_size = batch_size
        assert self.settings.max_length is not None
        self.max_length = max_length or self.settings.max_length
        self.query_max_length, self.passage_max_length = query_max_length, passage_max_length
        self.convert_to_numpy = convert_to_numpy

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.encoder.backbone.config.hidden_size  # type: ignore[union-attr,return-value]

    def encode_queries(
        self,
        queries: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        show_progress: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """`encode` with the query instruction before each text."""
        max_length = max_length or self.query_max_length
        prefix = self.settings.query_prefix
        return self._encode(queries, prefix, batch_size, max_length, convert_to_numpy, show_progress, "queries")

    def encode_corpus(
        self,
        corpus: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        show_progress: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """`encode` with the passage instruction, if the model has one, before each text."""
        max_length = max_length or self.passage_max_length
        prefix = self.settings.passage_prefix
        return self._encode(corpus, prefix, batch_size, max_length, convert_to_numpy, show_progress, "passages")

    def encode(
        self,
        sentences: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        show_progress: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Embeddings of texts as they stand, without an instruction.

        Args:
            sentences: a text gives a vector (dim,), a sequence an array (n, dim), an empty one (0, dim); float32.
            batch_size: at most so many texts in one forward pass; by default a token budget alone decides.
            max_length: tokens that a text is cut to; never more than the model has positions.
            convert_to_numpy: False gives a torch tensor on the CPU.
            show_progress: a progress bar.
        """
        return self._encode(sentences, "", batch_size, max_length, convert_to_numpy, show_progress, "texts")

    def _encode(
        self,
        texts: str | Sequence[str],
        prefix: str,
        batch_size: int | None,
        max_length: int | None,
        convert_to_numpy: bool | None,
        show_progress: bool,
        description: str,
    ) -> np.ndarray | torch.Tensor:
        embeddings = encode_texts(
            self.encoder,
            self.tokenizer,
            [texts] if isinstance(texts, str) else texts,
            max_length=min(max_length or self.max_length, max_positions(self.encoder.backbone.config)),
            prefix=prefix,
            max_texts=batch_size or self.batch_size,
            show_progress=show_progress,
            description=description,
        )
        result = embeddings[0] if isinstance(texts, str) else embeddings
        wants_numpy = self.convert_to_numpy if convert_to_numpy is None else convert_to_numpy
        return result if wants_numpy else torch.from_numpy(result)


class FlagModel(EmbeddingModel):
    """`EmbeddingModel` under the names of FlagEmbedding's class of this name.

    Differs from it where it loses quality in silence: pooling and instruction are read from the model folder unless
    they are given, so a mean-pooled model is not taken for a CLS one.
    """

    def __init__(
        self,
        model_name_or_path: str,
        normalize_embeddings: bool | None = None,
        use_fp16: bool = True,
        use_bf16: bool = False,
        query_instruction_for_retrieval: str | None = None,
        query_instruction_format: str = "{}{}",
        devices: str | Sequence[str] | None = None,
        pooling_method: str | None = None,
        **kwargs: Any,
    ) -> None:
        device = (
            default_device() if devices is None else torch.device(devices if isinstance(devices, str) else devices[0])
        )
        super().__init__(
            model_name_or_path,
            device=device,
            dtype=resolve_dtype(use_fp16 and not use_bf16, use_bf16, device)[0],
            pooling=pooling_method,
            normalize=normalize_embeddings,
            query_instruction=query_instruction_for_retrieval,
            query_instruction_format=query_instruction_format,
            **kwargs,
        )
