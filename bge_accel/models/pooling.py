"""How the token states of a text become one vector."""

import torch

POOLING_METHODS = ("cls", "mean", "last_token")


# Our names are FlagEmbedding's; these are sentence-transformers'.
POOLING_TO_ST = {"cls": "cls", "mean": "mean", "last_token": "lasttoken"}


POOLING_FROM_ST = {
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last_token",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last_token",
}


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor, method: str) -> torch.Tensor:
    """Hidden states (n, length, dim) to one vector a text (n, dim), padding on either side ignored."""
    if method == "mean":
        weights = attention_mask.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        summed = torch.einsum("nld,nl->nd", hidden.to(weights.dtype), weights)
        return summed / weights.sum(1, keepdim=True).clamp(min=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), pooled_tokens(attention_mask, method)]


def pooled_tokens(attention_mask: torch.Tensor, method: str) -> torch.Tensor:
    """Places (n,) of the first or the last token of each text, padded on either side."""
    if method == "cls":
        return attention_mask.argmax(1)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * positions).argmax(1)
