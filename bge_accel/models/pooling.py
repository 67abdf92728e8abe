"""How the token states of a text become one vector: one table, which flags, loading, saving, cards and packed texts read.

Names are FlagEmbedding's. To add a way is to add an entry.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

# torch is imported where it is used: flags read the table before any heavy package is loaded.


class Pooling(NamedTuple):
    """One way of pooling."""

    padded: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
    """From hidden states (n, length, dim) and their mask (n, length), padded on either side, to (n, dim)."""
    st_name: str
    """What sentence-transformers calls it, as `pooling_mode`."""
    st_flag: str
    """The same in its older way, as a flag that is true."""
    packed: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None" = None
    """From hidden states (tokens, dim) of texts one after another and their ends (n + 1,), the first 0, to (n, dim). None
    has them padded first."""
    snippet: str | None = None
    """From `hidden` and `mask`, padded on the right, in a line of torch for the card; None leaves this out of the card."""
    token: int | None = None
    """0 or -1 where it is the state of the first or the last token, so that the last layer need not compute others."""


def place_of_token(attention_mask: "torch.Tensor", token: int) -> "torch.Tensor":
    """Places (n,) of the first (0) or the last (-1) token of each text, padded on either side."""
    if token == 0:
        return attention_mask.argmax(1)
    import torch

    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * positions).argmax(1)


def _one_token(token: int) -> "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]":
    def pool(hidden: "torch.Tensor", attention_mask: "torch.Tensor") -> "torch.Tensor":
        import torch

        return hidden[torch.arange(len(hidden), device=hidden.device), place_of_token(attention_mask, token)]

    return pool


def _mean(hidden: "torch.Tensor", attention_mask: "torch.Tensor") -> "torch.Tensor":
    import torch

    weights = attention_mask.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    summed = torch.einsum("nld,nl->nd", hidden.to(weights.dtype), weights)
    return summed / weights.sum(1, keepdim=True).clamp(min=1)


def _max(hidden: "torch.Tensor", attention_mask: "torch.Tensor") -> "torch.Tensor":
    return hidden.masked_fill(attention_mask[..., None] == 0, float("-inf")).amax(1)


def _reduced(how: str) -> "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]":
    def pool(hidden: "torch.Tensor", starts: "torch.Tensor") -> "torch.Tensor":
        import torch

        if hidden.device.type == "cpu":  # whose rows are filled up
            hidden = hidden[: int(starts[-1].numpy())]
        precise = hidden if hidden.dtype == torch.float64 else hidden.float()
        # Not index_add, whose sums on a GPU differ from run to run.
        return torch.segment_reduce(precise, how, lengths=starts.diff().long(), unsafe=True)

    return pool


POOLING = {
    "cls": Pooling(
        _one_token(0),
        st_name="cls",
        st_flag="pooling_mode_cls_token",
        packed=lambda hidden, starts: hidden[starts[:-1]],
        snippet="hidden[:, 0]",
        token=0,
    ),
    "mean": Pooling(
        _mean,
        st_name="mean",
        st_flag="pooling_mode_mean_tokens",
        packed=_reduced("mean"),
        snippet="(hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)",
    ),
    "last_token": Pooling(
        _one_token(-1),
        st_name="lasttoken",
        st_flag="pooling_mode_lasttoken",
        packed=lambda hidden, starts: hidden[starts[1:] - 1],
        snippet="hidden[torch.arange(len(hidden)), mask.sum(1) - 1]",
        token=-1,
    ),
    "max": Pooling(
        _max,
        st_name="max",
        st_flag="pooling_mode_max_tokens",
        packed=_reduced("max"),
        snippet="hidden.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(1)",
    ),
}
_ALWAYS_SAVED = (
    "cls",
    "mean",
    "last_token",
)  # sentence-transformers takes a flag that is not there for False, save one


def pooling_of_st(mode: object) -> str | None:
    """Our name of what sentence-transformers calls a way of pooling; None where there is none here."""
    return next((name for name, way in POOLING.items() if mode in (way.st_name, way.st_flag)), None)


def st_flags(pooling: str) -> dict[str, bool]:
    """What sentence-transformers is told of a way of pooling."""
    return {way.st_flag: name == pooling for name, way in POOLING.items() if name == pooling or name in _ALWAYS_SAVED}
