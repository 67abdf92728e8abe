"""The model that a run trains: loaded from the hub, a folder or the run's checkpoint, with its rows' instructions checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bge_accel.models.encoder import Encoder, load_encoder
from bge_accel.models.settings import EmbeddingSettings, instruction_prefix
from bge_accel.training.feeds import Feed, other_prefixes


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and what it does to texts; each named as the flag of scripts/finetune.py."""

    model_name_or_path: str
    config_name: str | None
    tokenizer_name: str | None
    cache_dir: str | None
    token: str | None
    trust_remote_code: bool
    sentence_pooling_method: str | None
    normalize_embeddings: bool | None
    fix_position_embedding: bool
    gradient_checkpointing: bool
    query_max_len: int
    passage_max_len: int
    query_instruction_for_retrieval: str | None
    query_instruction_format: str
    passage_instruction_for_retrieval: str | None
    passage_instruction_format: str


def load_model(
    options: ModelOptions, feeds: Sequence[Feed], checkpoint: str | None = None
) -> tuple[Encoder, Any, EmbeddingSettings]:
    """The encoder, its tokenizer, and what it says of itself, less what the options say otherwise.

    Args:
        feeds: whose own instructions have to leave room for their texts.
        checkpoint: to go on from; it has its own configuration and tokenizer.

    Raises:
        ValueError: see `load_encoder`.
    """
    formats = options.query_instruction_format, options.passage_instruction_format
    encoder, tokenizer, settings = load_encoder(
        checkpoint or options.model_name_or_path,
        pooling=options.sentence_pooling_method,
        normalize=options.normalize_embeddings,
        query_prefix=instruction_prefix(options.query_instruction_for_retrieval, formats[0]),
        passage_prefix=instruction_prefix(options.passage_instruction_for_retrieval, formats[1]),
        config_name=None if checkpoint else options.config_name,
        tokenizer_name=None if checkpoint else options.tokenizer_name,
        trust_remote_code=options.trust_remote_code,
        longest=max(options.query_max_len, options.passage_max_len),
        gradient_checkpointing=options.gradient_checkpointing,
        lengths={"--query_max_len": options.query_max_len, "--passage_max_len": options.passage_max_len},
        cut_by={"query": "--query_max_len", "passage": "--passage_max_len"},
        other_prefixes=other_prefixes(feeds, *formats),
        cache_dir=options.cache_dir,
        token=options.token,
    )
    if options.fix_position_embedding:
        for name, parameter in encoder.named_parameters():
            if "position_embeddings" in name:
                parameter.requires_grad_(False)
    return encoder, tokenizer, settings
