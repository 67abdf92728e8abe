"""The encoder with its pooling and normalisation: loading, saving, and what a checkpoint says of itself."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from bge_accel.config import check_model_path
from bge_accel.kernels import last_layer
from bge_accel.kernels.packed import can_run_packed, pad
from bge_accel.models.compiling import check_gradient_checkpointing, enable_gradient_checkpointing
from bge_accel.models.loading import (
    check_lengths,
    check_prefix,
    encoder_class,
    load_tokenizer,
    load_weights,
    loading,
    lower_case,
    max_positions,
    model_without_weights,
    read_config,
)
from bge_accel.models.pooling import POOLING, place_of_token, st_flags
from bge_accel.models.settings import EmbeddingSettings, read_settings
from bge_accel.models.tokenizing import TOKENIZING


class Encoder(torch.nn.Module):
    """A transformer whose forward pass returns one embedding a text."""

    def __init__(self, backbone: torch.nn.Module, pooling: str, normalize: bool) -> None:
        super().__init__()
        self.backbone, self.pooling, self.normalize = backbone, pooling, normalize
        self._pooling = POOLING[pooling]
        self.config = backbone.config  # where DeepSpeed looks for the model's width
        self._knows_tokens = self._pooling.token is not None and last_layer.prepare(backbone)

    @property
    def pools_one_token(self) -> bool:
        """Whether the last layer computes no more than the token of each text that becomes its embedding."""
        return self._knows_tokens and can_run_packed(self.config)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        is_padded: bool | None = None,
        **packed: Any,
    ) -> torch.Tensor:
        """(n, length) token ids and mask to (n, dim) embeddings, pooled and normalised in float32 or better.

        Args:
            is_padded: whether the mask leaves anything out, where that is known; else a GPU is waited for to tell.
            packed: instead of the mask, what `kernels.packed.pack` gives, after `kernels.packed.use_kernel`.
        """
        mask = attention_mask
        if mask is not None and is_padded is not None and can_run_packed(self.config):
            mask = mask.bool()[:, None, None].expand(-1, 1, mask.shape[1], -1) if is_padded else None
        inputs = {"input_ids": input_ids, "attention_mask": mask, **packed}
        if self.pools_one_token:
            assert self._pooling.token is not None
            if attention_mask is not None:
                inputs["pooled_tokens"] = place_of_token(attention_mask, self._pooling.token)
            else:
                starts = packed["starts"]
                inputs["pooled_tokens"] = starts[:-1] if self._pooling.token == 0 else starts[1:] - 1
        hidden = self.backbone(**inputs).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            if self.pools_one_token:
                pooled = hidden.flatten(0, 1)  # one of the first two dimensions is 1
            elif attention_mask is not None:
                pooled = self._pooling.padded(hidden, attention_mask)
            elif self._pooling.packed is not None:
                pooled = self._pooling.packed(hidden[0], packed["starts"])
            else:
                pooled = self._pooling.padded(*pad(hidden[0], packed["starts"]))
            if pooled.dtype in (torch.float16, torch.bfloat16):
                pooled = pooled.float()
            return F.normalize(pooled, dim=-1) if self.normalize else pooled


def load_encoder(
    model_name_or_path: str | os.PathLike[str],
    *,
    settings: EmbeddingSettings | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
    config_name: str | None = None,
    tokenizer_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    longest: int = 0,
    gradient_checkpointing: bool = False,
    lengths: Mapping[str, int | None] | None = None,
    cut_by: Mapping[str, str] | None = None,
    other_prefixes: Mapping[str, Mapping[str, str]] | None = None,
    trust_remote_code: bool = False,
    **hub: Any,
) -> tuple[Encoder, Any, EmbeddingSettings]:
    """Loads an encoder and its tokenizer from a folder or the hub.

    Args:
        pooling, normalize, query_prefix, passage_prefix: override what the checkpoint says of itself.
        longest: tokens that texts will be cut to; raises the checkpoint's own maximum length where the model can.
        gradient_checkpointing: recompute activations layer by layer in the backward pass.
        lengths: see `check_lengths`; looked at before the weights are loaded.
        cut_by: which of `lengths` cuts a "query", which a "passage": their instructions have to leave room in it.
        other_prefixes: what stands before some queries or passages in place of the model's own; for each the place of
            the first row that says so, "" where it is no row's.
        hub: `cache_dir`, `token`, `revision`.

    Returns:
        The encoder in evaluation mode, the tokenizer, and the settings with nothing left open.

    Raises:
        ValueError: the model cannot be found or is of a kind that is not supported; a length leaves nothing of a text.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per file of a model that loads in a second
    model_name_or_path = os.fspath(model_name_or_path)
    hub = {key: value for key, value in hub.items() if value is not None}
    if config_name is None:
        check_model_path("the model", model_name_or_path)
    with loading(f"the model {model_name_or_path!r}"):
        settings = settings or read_settings(model_name_or_path, **hub)
        common = {"trust_remote_code": trust_remote_code, **hub}
        config = read_config(config_name or model_name_or_path, **common)
        tokenizer = load_tokenizer(tokenizer_name or model_name_or_path, **common)
        check_lengths(tokenizer, lengths or {})
        chosen = {
            "query": settings.query_prefix if query_prefix is None else query_prefix,
            "passage": settings.passage_prefix if passage_prefix is None else passage_prefix,
        }
        for kind, name in (cut_by or {}).items():
            length = (lengths or {}).get(name) or settings.max_length or max_positions(config)
            for prefix, place in [(chosen[kind], ""), *(other_prefixes or {}).get(kind, {}).items()]:
                check_prefix(tokenizer, prefix, length, name, kind, place)
        if gradient_checkpointing and not is_deepspeed_zero3_enabled():
            check_gradient_checkpointing(
                model_without_weights(encoder_class(config.model_type), model_name_or_path, config, trust_remote_code)
            )
        backbone = load_weights(
            encoder_class(config.model_type),
            model_name_or_path,
            config=config,
            dtype=dtype,
            needs_pooler=False,
            **common,
        )
    if gradient_checkpointing:
        check_gradient_checkpointing(backbone)
        enable_gradient_checkpointing(backbone)
    settings = settings.with_overrides(
        pooling=pooling, normalize=normalize, query_prefix=query_prefix, passage_prefix=passage_prefix
    )
    positions = max_positions(config)
    if longest > positions:
        raise ValueError(f"texts of {longest} tokens are asked for; {model_name_or_path} takes {positions} at most")
    own = settings.max_length or min(positions, tokenizer.model_max_length)
    settings = replace(settings, max_length=min(max(own, longest), positions))
    # A limit stored in the tokenizer would cut texts that the settings allow.
    tokenizer.model_max_length = settings.max_length
    if settings.lower_case:
        lower_case(tokenizer)
    # Nothing trains the pooler of BERT-like models; left trainable it would stop DDP, dropped it would be lost.
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler.requires_grad_(False)
    assert settings.pooling is not None and settings.normalize is not None
    return Encoder(backbone, settings.pooling, settings.normalize).eval(), tokenizer, settings


def save_encoder(
    folder: str,
    encoder: Encoder,
    tokenizer: Any,
    settings: EmbeddingSettings,
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    model_card: str | None = None,
) -> None:
    """Writes a folder that transformers, sentence-transformers and `EmbeddingModel` load alike.

    Args:
        state_dict: the weights of `encoder` where it does not hold them itself (sharded training).
        model_card: text of README.md.
    """
    os.makedirs(folder, exist_ok=True)
    backbone: Any = encoder.backbone
    if state_dict is None:
        backbone.save_pretrained(folder)
    else:  # transformers would look at the model's own tensors too, which are parts
        from huggingface_hub import save_torch_state_dict

        save_torch_state_dict({key.removeprefix("backbone."): value for key, value in state_dict.items()}, folder)
        backbone.config.architectures = [type(backbone).__name__.removeprefix("FSDP")]
        backbone.config.save_pretrained(folder)
    # safetensors makes its files readable by their owner alone; they are to be as open as the others.
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            shutil.copymode(os.path.join(folder, "config.json"), os.path.join(folder, name))
    with TOKENIZING:
        tokenizer("")  # without cutting: else the length that some texts were last cut to is saved with it
        tokenizer.save_pretrained(folder)
    assert settings.pooling is not None
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * bool(
        settings.normalize
    )
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for idx, (path, kind) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": backbone.config.hidden_size,
            **st_flags(settings.pooling),
            "include_prompt": True,
        },
        "sentence_bert_config.json": {"max_seq_length": settings.max_length, "do_lower_case": settings.lower_case},
        "config_sentence_transformers.json": {
            "prompts": {"query": settings.query_prefix, "document": settings.passage_prefix, **settings.other_prompts},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
        },
    }
    for name, content in files.items():
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
    if settings.normalize:
        os.makedirs(os.path.join(folder, "2_Normalize"), exist_ok=True)
    if model_card is not None:
        with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
            file.write(model_card)
