"""Rows as mining and scoring write them."""

from collections.abc import Sequence
from typing import Any


def new_row(
    row: dict[str, Any], negatives: list[str], scores: tuple[list[float], list[float]] | None
) -> dict[str, Any]:
    """The row with its new negatives, all else as it was; scores of others never stay."""
    new: dict[str, Any] = {}
    for name, value in row.items():
        if name not in ("neg", "pos_scores", "neg_scores"):
            new[name] = value
        if name == "neg" or (name == "pos" and "neg" not in row):
            new["neg"] = negatives
    if scores is not None:
        new["pos_scores"], new["neg_scores"] = scores
    return new


def rounded(scores: Sequence[float]) -> list[float]:
    """Scores as they are written."""
    return [round(score, 6) for score in scores]
