"""Texts to embeddings, fast: sorted micro-batches under a token budget, tokenised while the model computes."""

import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from bge_accel.encoding.pipeline import WINDOW, EncodingCounts, encode_texts
from bge_accel.encoding.store import (
    EmbeddingStore,
    Manifest,
    choose_shard_size,
    digest_texts,
    prepare_store,
)
from bge_accel.encoding.storing import encode_to_store, tokenizer_digest, weights_digest
from bge_accel.files.lock import locked
from bge_accel.files.text import shorten
from bge_accel.kernels import packed as unpadded
from bge_accel.models.encoder import load_encoder
from bge_accel.models.loading import check_lengths, check_prefix, max_positions
from bge_accel.models.precision import default_device, floating_dtype, resolve_dtype
from bge_accel.models.settings import instruction_prefix
from bge_accel.processes.progress import progress


def line_for_all_gpus() -> str | None:
    """What one process that runs where there are several GPUs should tell its user; else None."""
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None
    command = f"accelerate launch --multi_gpu --num_processes {num_gpus} "
    if os.path.basename(sys.argv[0]) == "encode_corpus.py":
        return f"{num_gpus} GPUs are here and one is used; on all: {command}{shlex.join(sys.argv)}"
    return (
        f"{num_gpus} GPUs are here and one is used; a corpus is encoded on all of them, into a store, by: "
        f"{command}scripts/encode_corpus.py --model_name_or_path MODEL --corpus_data FILE --output_dir STORE"
    )


class EmbeddingModel:
    """A text-embedding model for inference, from a folder or the hub.

    Pooling, normalisation, instructions and maximum length are read from the model; what is given here wins. Where
    the model says nothing: CLS pooling, normalised, no instruction.

    Args:
        device: as torch names it; by default the GPU if there is one.
        dtype: torch dtype or its name; "auto" is float16 on a GPU, and on a CPU bfloat16 where that is faster (AMX, AMD's
            AVX-512, ARM), else float32. The embeddings are float32 arrays with either.
        pooling: a name of `models.pooling.POOLING`.
        attention: "padded", or without padding by one of `kernels.packed.KERNELS`; "auto" is the fast one that the device,
            the precision and the model allow, else "padded".
        query_instruction, passage_instruction: put before each query or passage through the format; "" means none.
        batch_size, max_length, query_max_length, passage_max_length, convert_to_numpy: for calls that do not say
            otherwise.
        lengths: tokens that calls will cut texts to, checked before the weights are loaded; see `models.loading.check_lengths`.
        cut_by: which of them cuts a "query", which a "passage", see `models.encoder.load_encoder`.

    Raises:
        ValueError: see `models.encoder.load_encoder`.

    `counts` holds how many texts and tokens have been encoded, and how many texts were too long and cut.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        pooling: str | None = None,
        normalize: bool | None = None,
        attention: str = "auto",
        query_instruction: str | None = None,
        query_instruction_format: str = "{}{}",
        passage_instruction: str | None = None,
        passage_instruction_format: str = "{}{}",
        batch_size: int | None = None,
        max_length: int | None = None,
        query_max_length: int | None = None,
        passage_max_length: int | None = None,
        convert_to_numpy: bool = True,
        lengths: Mapping[str, int | None] | None = None,
        cut_by: Mapping[str, str] | None = None,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        token: str | None = None,
    ) -> None:
        self.device = torch.device(device) if device is not None else default_device()
        if device is None and (line := line_for_all_gpus()) is not None:
            warnings.warn(line, stacklevel=2)
        if dtype == "auto":
            dtype, _ = resolve_dtype(fp16=True, bf16=False, device=self.device)
        own_lengths = {
            "max_length": max_length,
            "query_max_length": query_max_length,
            "passage_max_length": passage_max_length,
        }
        self.encoder, self.tokenizer, self.settings = load_encoder(
            model_name_or_path,
            pooling=pooling,
            normalize=normalize,
            query_prefix=instruction_prefix(query_instruction, query_instruction_format),
            passage_prefix=instruction_prefix(passage_instruction, passage_instruction_format),
            dtype=floating_dtype(dtype),
            lengths={**own_lengths, **(lengths or {})},
            cut_by=cut_by,
            trust_remote_code=trust_remote_code,
            cache_dir=cache_dir,
            token=token,
        )
        self.encoder.to(self.device)
        kernel = unpadded.choose_kernel(self.encoder.backbone) if attention == "auto" else attention
        if kernel is not None and kernel != "padded":
            unpadded.use_kernel(self.encoder.backbone, kernel)
        self.name, self.counts = os.fspath(model_name_or_path), EncodingCounts()
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
        max_length = self.query_max_length if max_length is None else max_length
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
        max_length = self.passage_max_length if max_length is None else max_length
        prefix = self.settings.passage_prefix
        return self._encode(corpus, prefix, batch_size, max_length, convert_to_numpy, show_progress, "passages")

    def encode(
        self,
        sentences: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        show_progress: bool = False,
        **mteb: Any,
    ) -> np.ndarray | torch.Tensor:
        """Embeddings of texts as they stand, without an instruction.

        Args:
            sentences: a text gives a vector (dim,), a sequence an array (n, dim), an empty one (0, dim); float32.
            batch_size: at most so many texts in one forward pass; by default a token budget alone decides.
            max_length: tokens that a text is cut to; never more than the model has positions, and more than its special
                tokens.
            convert_to_numpy: False gives a torch tensor on the CPU.
            show_progress: a progress bar.
            mteb: what the mteb package calls its encoders with, see `mteb_model.encode_batches`.

        Raises:
            TypeError, ValueError: see `as_texts`; a number is below 1, or a text has no token.
        """
        if "task_metadata" in mteb:
            from bge_accel.encoding.mteb_model import encode_batches

            return encode_batches(self, sentences, batch_size=batch_size, **mteb)
        if mteb:
            raise TypeError(f"encode() got an unexpected keyword argument {next(iter(mteb))!r}")
        return self._encode(sentences, "", batch_size, max_length, convert_to_numpy, show_progress, "texts")

    def describe_store(
        self,
        num_texts: int,
        texts: str,
        *,
        kind: Literal["passage", "query"] = "passage",
        max_length: int | None = None,
        dtype: str = "float32",
        processes: int = 1,
        shard_size: int | None = None,
    ) -> Manifest:
        """The manifest of a store of this model's embeddings of such texts.

        Args:
            texts: their digest, from `digest_texts`.
            kind: with the instruction of passages or that of queries.
            dtype: stored in float16 or float32.
            processes: that are going to write it together.
        """
        own_length = self.query_max_length if kind == "query" else self.passage_max_length
        settings = {
            "weights": weights_digest(self.encoder),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "precision": str(next(self.encoder.parameters()).dtype).removeprefix("torch."),
            "pooling": self.settings.pooling,
            "normalize": self.settings.normalize,
            "prefix": self.settings.query_prefix if kind == "query" else self.settings.passage_prefix,
            "max_length": self._length(own_length if max_length is None else max_length),
            "texts": texts,
        }
        shard_size = shard_size or choose_shard_size(num_texts, WINDOW, processes)
        return Manifest(num_texts, self.dim, dtype, shard_size, settings, self.name)

    def save_corpus(
        self,
        folder: str,
        corpus: Sequence[str],
        *,
        kind: Literal["passage", "query"] = "passage",
        batch_size: int | None = None,
        max_length: int | None = None,
        dtype: str = "float32",
        shard_size: int | None = None,
        show_progress: bool = False,
    ) -> EmbeddingStore:
        """Encodes texts into a store, or what is missing of one that was begun, and opens it.

        In float32 the rows are those that `encode_corpus` (or, with kind "query", `encode_queries`) gives. For a corpus
        that does not fit the memory, or several processes, there is `scripts/encode_corpus.py`.

        Raises:
            ValueError: the folder holds a store of something else, or anything but a store; no texts.
        """
        corpus = as_texts(corpus)
        if not len(corpus):
            raise ValueError("there are no texts to encode into a store")
        digest = digest_texts(corpus)
        wanted = self.describe_store(*digest, kind=kind, max_length=max_length, dtype=dtype, shard_size=shard_size)
        with locked(folder):
            manifest, missing = prepare_store(folder, wanted)
            num_missing = sum(stop - start for start, stop in map(manifest.rows_of, missing))
            with progress(num_missing, f"{kind} store", "text", shown=show_progress) as bar:
                encode_to_store(
                    self,
                    folder,
                    manifest,
                    missing,
                    lambda start, stop: corpus[start:stop],
                    max_texts=_at_least_one(batch_size or self.batch_size),
                    counts=self.counts,
                    on_texts=bar.update,
                )
        return EmbeddingStore(folder)

    def open_corpus(
        self,
        folder: str,
        corpus: Iterable[str],
        *,
        kind: Literal["passage", "query"] = "passage",
        max_length: int | None = None,
    ) -> EmbeddingStore:
        """A store that holds this model's embeddings of these texts, stored in whichever precision.

        Raises:
            ValueError: it holds others, naming all that differs, or is not complete.
        """
        wanted = self.describe_store(*digest_texts(corpus), kind=kind, max_length=max_length)
        return EmbeddingStore(folder, wanted, ignore=("dtype",))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products (n1, n2) of every embedding of the one with every one of the other; mteb asks for it."""
        return as_matrix(embeddings1) @ as_matrix(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products (n,) of embeddings in pairs; mteb asks for it."""
        return (as_matrix(embeddings1) * as_matrix(embeddings2)).sum(dim=1)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb files results under; mteb has to be installed."""
        from bge_accel.encoding.mteb_model import model_meta

        return model_meta(self)

    def _length(self, max_length: int | None) -> int:
        check_lengths(self.tokenizer, {"max_length": max_length})
        return min(max_length or self.max_length, max_positions(self.encoder.backbone.config))

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
        length = self._length(max_length)
        check_prefix(self.tokenizer, prefix, length, "max_length", "text")
        embeddings = encode_texts(
            self.encoder,
            self.tokenizer,
            as_texts(texts),
            max_length=length,
            prefix=prefix,
            max_texts=_at_least_one(batch_size or self.batch_size),
            show_progress=show_progress,
            description=description,
            counts=self.counts,
        )
        result = embeddings[0] if isinstance(texts, str) else embeddings
        wants_numpy = self.convert_to_numpy if convert_to_numpy is None else convert_to_numpy
        return result if wants_numpy else torch.from_numpy(result)


def as_texts(texts: str | Sequence[str]) -> Sequence[str]:
    """Texts to encode; one text is a sequence of one.

    Raises:
        TypeError: it is no text and no sequence, or one of the sequence is no text.
        ValueError: a text holds half of a character (a lone surrogate).
    """
    if isinstance(texts, str):
        texts = [texts]
    if not hasattr(texts, "__len__") or not hasattr(texts, "__getitem__") or isinstance(texts, Mapping | bytes):
        raise TypeError(f"texts are one string or a sequence of strings, not {shorten(texts)} ({type(texts).__name__})")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"text {number} (counted from 0) is {shorten(text)} ({type(text).__name__}): every text has to be a string"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f"text {number} (counted from 0) holds half of a character (a lone surrogate): {shorten(text)}"
            ) from None
    return texts


def _at_least_one(batch_size: int | None) -> int | None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it has to be at least 1")
    return batch_size


def as_matrix(embeddings: Any) -> torch.Tensor:
    """A vector or an array of embeddings as a tensor (n, dim) float32."""
    tensor = embeddings if isinstance(embeddings, torch.Tensor) else torch.as_tensor(np.asarray(embeddings))
    return tensor.float().reshape(-1, tensor.shape[-1])


class FlagModel(EmbeddingModel):
    """`EmbeddingModel` under the names of FlagEmbedding's class of this name.

    Differs from it where it loses quality in silence: pooling and instruction are read from the model folder unless
    they are given, so a mean-pooled model is not taken for a CLS one.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
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
