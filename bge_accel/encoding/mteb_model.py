"""What the `mteb` package (https://github.com/embeddings-benchmark/mteb) asks of an encoder, for `EmbeddingModel`."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bge_accel.encoding.embedding_model import EmbeddingModel


def encode_batches(model: "EmbeddingModel", batches: Any, **kwargs: Any) -> np.ndarray:
    """Embeddings (n, dim) float32 of the texts of batches {"text": [str, ...]}, in their order.

    What mteb calls queries gets the query instruction, what it calls documents the passage instruction, and any other
    text stands as it is.

    Args:
        kwargs: what mteb passes on: `prompt_type`, `batch_size`, `show_progress_bar`; the rest says nothing here.
    """
    texts = [text for batch in batches for text in batch["text"]]
    kind = str(getattr(kwargs.get("prompt_type"), "value", ""))
    one_of = {"query": model.encode_queries, "document": model.encode_corpus}.get(kind, model.encode)
    options = {"batch_size": kwargs.get("batch_size"), "show_progress": kwargs.get("show_progress_bar", False)}
    return np.asarray(one_of(texts, **options))


def model_meta(model: "EmbeddingModel") -> Any:
    """What mteb files results under: organisation/name, and a digest of the weights as the revision."""
    from mteb.models import ModelMeta

    from bge_accel.encoding.storing import weights_digest

    name = model.name.rstrip("/")
    return ModelMeta.create_empty(
        {
            "name": name if name.count("/") == 1 and not os.path.isdir(name) else f"local/{os.path.basename(name)}",
            "revision": weights_digest(model.encoder),
            "n_parameters": sum(parameter.numel() for parameter in model.encoder.parameters()),
            "max_tokens": model.max_length,
            "embed_dim": model.dim,
            "similarity_fn_name": "cosine" if model.settings.normalize else "dot",
            "use_instructions": bool(model.settings.query_prefix or model.settings.passage_prefix),
            "framework": ["PyTorch"],
        }
    )
