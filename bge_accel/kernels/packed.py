"""Encoders without padding: the tokens of all texts in one row, and attention that keeps the texts apart.

Everything from the embeddings to the pooling then computes real tokens alone. Only attention has to know where a text
ends, so transformers' registries get an attention function that does; the model's own code runs unchanged. The kernel
is torch's (`torch.nn.attention.varlen`) or that of the package flash_attn, both on GPUs and in half precision, or on a CPU
that of `cpu_attention`; "plain" attends text by text with torch's ordinary attention, anywhere and in any precision. All are
differentiable.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bge_accel.kernels import cpu_attention, onednn

# What computes attention over packed texts: query, key and value (tokens, heads, head_dim), for queries and for keys where
# each text begins and the last ends, (texts + 1,) int32 on their device, for both the most tokens of a text, and the dropout
# of the probabilities; returns (tokens, heads, head_dim). Queries may be fewer than keys.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, float], torch.Tensor]

# Absolute positions, and keyword arguments that reach the attention function.
MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert")
PREFIX = "bge_accel_unpadded_"


def attend_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_starts: torch.Tensor,
    k_starts: torch.Tensor,
    q_longest: int,
    k_longest: int,
    dropout: float,
) -> torch.Tensor:
    """torch's kernel for texts of different lengths: on a GPU, float16 or bfloat16, without dropout."""
    if dropout:
        raise ValueError(f"torch's attention without padding has no dropout, and the model's is {dropout}")
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(query, key, value, q_starts, k_starts, q_longest, k_longest)
    assert isinstance(attended, torch.Tensor)
    return attended


def attend_flash_attn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *places: Any) -> torch.Tensor:
    """The kernel of the package flash_attn: on a GPU, float16 or bfloat16."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func(query, key, value, *places)


def attend_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_starts: torch.Tensor,
    k_starts: torch.Tensor,
    q_longest: int,
    k_longest: int,
    dropout: float,
) -> torch.Tensor:
    """Ours: on a CPU, in any precision."""
    return cpu_attention.attend_packed(query, key, value, q_starts, k_starts, dropout)


def attend_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_starts: torch.Tensor,
    k_starts: torch.Tensor,
    q_longest: int,
    k_longest: int,
    dropout: float,
) -> torch.Tensor:
    """Text by text with torch's ordinary attention; the meaning of the others, not their speed."""
    q_lengths, k_lengths = q_starts.diff().tolist(), k_starts.diff().tolist()
    texts = zip(query.split(q_lengths), key.split(k_lengths), value.split(k_lengths), strict=True)
    attended = [
        F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), dropout_p=dropout)
        for q, k, v in texts
    ]
    return torch.cat([text.transpose(0, 1) for text in attended])


KERNELS: dict[str, Kernel] = {
    "torch": attend_torch,
    "flash_attn": attend_flash_attn,
    "cpu": attend_cpu,
    "plain": attend_plain,
}


def choose_kernel(backbone: Any) -> str | None:
    """The kernel that is fast for a model where it lies and in its precision; None where padding has to do."""
    parameter = next(backbone.parameters())
    if parameter.device.type != "cuda" or parameter.dtype not in (torch.float16, torch.bfloat16):
        return None
    if torch.version.hip or torch.cuda.get_device_capability(parameter.device) < (8, 0):
        return None
    config = backbone.config
    head_dim = config.hidden_size // max(getattr(config, "num_attention_heads", 1), 1)
    if not can_run_packed(config) or head_dim % 8 or head_dim > 256:
        return None
    if importlib.util.find_spec("torch.nn.attention.varlen") and torch.backends.cuda.is_flash_attention_available():
        return "torch"
    return "flash_attn" if importlib.util.find_spec("flash_attn") else None


def can_run_packed(config: Any) -> bool:
    """Whether a model of this configuration takes texts without padding."""
    return why_not_packed(config) is None


def why_not_packed(config: Any) -> str | None:
    """Why a model of this configuration, with the attention that it uses now, cannot run without padding; None if it can."""
    if config.model_type not in MODEL_TYPES:
        return f"models of type {config.model_type} are not supported ({', '.join(MODEL_TYPES)} are)"
    if getattr(config, "is_decoder", False):
        return "it is set up as a decoder"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        return "its positions are relative"
    return None if attends_as_sdpa(config) else f"it was loaded with {config._attn_implementation} attention"


def attends_as_sdpa(config: Any) -> bool:
    """Whether attention is torch's or one of ours, which take padded texts and masks as torch's does."""
    return config._attn_implementation in ("sdpa", cpu_attention.NAME) or is_in_use(config)


def check_kernel(kernel: str, device: torch.device, precision: str) -> None:
    """Whether a kernel can train there.

    Args:
        precision: what is computed in: "float32", "bf16", "fp16", "pure bf16".

    Raises:
        ValueError: it cannot, and why.
    """
    if kernel == "plain":
        return
    if kernel == "cpu":
        if device.type != "cpu":
            raise ValueError(f"--attention cpu is for a CPU, and this run is on {device.type}; leave it out")
        return
    if device.type != "cuda" or precision == "float32":
        raise ValueError(
            f"--attention {kernel} needs a GPU and half precision (--bf16), and this run computes in {precision} on "
            f"{device.type}; leave it out"
        )
    module = "torch.nn.attention.varlen" if kernel == "torch" else kernel
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"--attention {kernel} needs the module {module}, which is not installed")


def check_dropout(kernel: str, config: Any) -> None:
    """Raises ValueError where a kernel cannot drop what a model of this configuration drops in training."""
    dropout = getattr(config, "attention_probs_dropout_prob", 0.0)
    if kernel == "torch" and dropout:
        raise ValueError(
            f"--attention torch has no dropout, and the model drops {dropout:g} of its attention in training; take "
            "--attention flash_attn, or --config_name with a copy of the model's configuration in which "
            "attention_probs_dropout_prob is 0"
        )


def is_in_use(config: Any) -> bool:
    """Whether the model of this configuration has been given a kernel by `use_kernel`."""
    return str(getattr(config, "_attn_implementation", None)).startswith(PREFIX)


def use_kernel(backbone: Any, kernel: str) -> None:
    """Has a model take packed texts as well; padded ones go as before.

    Raises:
        ValueError: there is no such kernel, or the model cannot run without padding.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention {kernel!r} is not one of {', '.join(KERNELS)}")
    reason = why_not_packed(backbone.config)
    if reason is not None:
        raise ValueError(f"this model cannot run without padding: {reason}")
    cpu_attention.set_attention(backbone, PREFIX + kernel, _attention)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    starts: torch.Tensor | None = None,
    longest: int = 0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: (1, heads, tokens, head_dim) to (1, tokens, heads, head_dim)."""
    if starts is None:
        return cpu_attention.attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    assert scaling is None or abs(scaling * query.shape[-1] ** 0.5 - 1) < 1e-6
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return attend(module.config, query, key, value, starts, longest, dropout), None


def attend(
    config: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    dropout: float,
    *,
    one_query: bool = False,
) -> torch.Tensor:
    """(1, tokens, heads, head_dim) of packed texts to the same of the queries, by the model's kernel.

    Args:
        one_query: each text has a single query, in place of one for every token.
    """
    kernel = KERNELS[config._attn_implementation.removeprefix(PREFIX)]
    q_starts, q_longest = starts, longest
    if one_query:
        q_starts, q_longest = torch.arange(len(starts), dtype=starts.dtype, device=starts.device), 1
    return kernel(query[0], key[0], value[0], q_starts, starts, q_longest, longest, dropout)[None]


def pack(input_ids: torch.Tensor, attention_mask: torch.Tensor, config: Any) -> dict[str, Any]:
    """Padded texts as `Encoder.forward` takes them packed; on a CPU, where it makes no GPU wait.

    Args:
        input_ids, attention_mask: (n, width), padded on either side.
        config: of the model, whose positions may begin after the padding index.

    Returns:
        `input_ids` and `position_ids` (1, `num_packed`), `starts` (n + 1,) int32: where each text begins and the last ends,
        and `longest`: the tokens of the longest text.
    """
    is_token = attention_mask.bool()
    first = 0 if config.model_type == "bert" else config.pad_token_id + 1
    starts = torch.zeros(len(input_ids) + 1, dtype=torch.int32)
    starts[1:] = is_token.sum(1).cumsum(0)
    ids, positions = input_ids[is_token], (is_token.long().cumsum(1) - 1 + first)[is_token]
    more = num_packed(len(ids), config) - len(ids)
    return {
        "input_ids": F.pad(ids, (0, more), value=config.pad_token_id or 0)[None],
        "position_ids": F.pad(positions, (0, more), value=first)[None],
        "starts": starts,
        "longest": int(starts.diff().max().numpy()),
    }


def num_packed(num_tokens: int, config: Any) -> int:
    """How many tokens of a model with a kernel stand in the row for so many of texts; the rest, at its end, is of none."""
    return onednn.round_up(num_tokens) if config._attn_implementation == PREFIX + "cpu" else num_tokens


def pad(hidden: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (tokens, dim) of packed texts as (n, length, dim), padded on the right, and their mask (n, length)."""
    lengths = starts.diff().tolist()
    states = torch.nn.utils.rnn.pad_sequence(hidden[: sum(lengths)].split(lengths), batch_first=True)
    return states, (torch.arange(states.shape[1], device=starts.device) < starts.diff()[:, None]).long()
