"""Texts to token ids, by one thread at a time."""

import threading
from collections.abc import Sequence
from typing import Any

from bge_accel.files.text import shorten

# Tokenised together: whole texts are, whatever they are cut to, and more of them would only take memory.
TEXTS_AT_ONCE = 256


# A fast tokenizer keeps inside itself how it is to cut: whoever sets that and relies on it holds this meanwhile.
TOKENIZING = threading.RLock()


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of each text with special tokens, cut to `max_length`, in whichever threads it is called.

    Raises:
        ValueError: a text has no token.
    """
    token_ids: list[list[int]] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        with TOKENIZING:
            token_ids += tokenizer(
                list(texts[start : start + TEXTS_AT_ONCE]),
                truncation=True,
                max_length=max_length,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
    check_tokens(token_ids, texts)
    return token_ids


def check_tokens(token_ids: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
    """Raises ValueError for a text of which no token is left, as of "" where the tokenizer adds none of its own."""
    if not all(token_ids):
        empty = next(text for ids, text in zip(token_ids, texts, strict=True) if not ids)
        raise ValueError(
            f"the text {shorten(empty)} has no tokens, and the model's tokenizer adds none of its own: there is nothing to "
            "embed; leave it out"
        )
