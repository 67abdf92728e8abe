"""bge_accel: fine-tune and evaluate BGE-style text-embedding models."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use, so that `--help` and light imports stay fast.
_HOMES = {
    "EmbeddingModel": "encoding.embedding_model",
    "FlagModel": "encoding.embedding_model",
    "mix_models": "merging.merge",
    "mix_models_by_layers": "merging.merge",
    "mix_models_with_data": "merging.weights",
}
__all__ = [
    "EmbeddingModel",
    "FlagModel",
    "__version__",
    "mix_models",
    "mix_models_by_layers",
    "mix_models_with_data",
]

if TYPE_CHECKING:
    from bge_accel.encoding.embedding_model import EmbeddingModel, FlagModel
    from bge_accel.merging.merge import mix_models, mix_models_by_layers
    from bge_accel.merging.weights import mix_models_with_data


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"bge_accel.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
