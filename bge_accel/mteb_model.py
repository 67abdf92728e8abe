"""A model for the `mteb` package (https://github.com/embeddings-benchmark/mteb):

import mteb
from bge_accel.mteb_model import MTEBModel

mteb.evaluate(MTEBModel("tuned"), mteb.get_tasks(["NFCorpus"]))
"""

import os
from typing import Any

import numpy as np
import torch

from bge_accel.encoding import EmbeddingModel


class MTEBModel(EmbeddingModel):
    """`EmbeddingModel`, with what mteb's `EncoderProtocol` asks of an encoder; mteb itself is needed for its metadata alone.

    What mteb calls queries gets the query instruction, what it calls documents the passage instruction, and any other text
    stands as it is.
    """

    def encode(self, sentences: Any, *args: Any, task_metadata: Any = None, **kwargs: Any) -> Any:
        """`EmbeddingModel.encode`; or, as mteb calls it, with batches {"text": [str, ...]} and a `prompt_type`.

        Returns:
            (n, dim) float32; in the order of the batches.
        """
        if task_metadata is None:
            return super().encode(sentences, *args, **kwargs)
        texts = [text for batch in sentences for text in batch["text"]]
        kind = str(getattr(kwargs.get("prompt_type"), "value", ""))
        one_of = {"query": self.encode_queries, "document": self.encode_corpus}.get(kind, super().encode)
        return one_of(texts, batch_size=kwargs.get("batch_size"), show_progress=kwargs.get("show_progress_bar", False))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products (n1, n2) of every embedding of the one with every one of the other."""
        return _matrix(embeddings1) @ _matrix(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products (n,) of embeddings in pairs."""
        return (_matrix(embeddings1) * _matrix(embeddings2)).sum(dim=1)

    @property
    def mteb_model_meta(self) -> Any:
        """What mteb files results under: organisation/name, and a digest of the weights as the revision."""
        from mteb.models import ModelMeta

        from bge_accel.encoding import weights_digest

        name = self.name.rstrip("/")
        return ModelMeta.create_empty(
            {
                "name": name if name.count("/") == 1 and not os.path.isdir(name) else f"local/{os.path.basename(name)}",
                "revision": weights_digest(self.encoder),
                "n_parameters": sum(parameter.numel() for parameter in self.encoder.parameters()),
                "max_tokens": self.max_length,
                "embed_dim": self.dim,
                "similarity_fn_name": "cosine" if self.settings.normalize else "dot",
                "use_instructions": bool(self.settings.query_prefix or self.settings.passage_prefix),
                "framework": ["PyTorch"],
            }
        )


def _matrix(embeddings: Any) -> torch.Tensor:
    tensor = torch.as_tensor(np.asarray(embeddings) if not isinstance(embeddings, torch.Tensor) else embeddings)
    return tensor.float().reshape(-1, tensor.shape[-1])
