"""Scores of (query, passage) pairs by a cross-encoder."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from bge_accel.config import check_model_path
from bge_accel.processes.progress import progress

PAIRS_AT_ONCE = 4096  # sorted by length together
SHORTEST_PAIR = 16  # tokens: the special ones, and some of the query and of the passage


class Reranker:
    """A cross-encoder that scores (query, passage) pairs, from a folder or the hub.

    Args:
        max_length: tokens of a pair, special tokens included; the passage is cut. Never more than the model takes.
        query_max_length: tokens that a query is cut to; by default three quarters of `max_length`.
        batch_size: at most so many pairs in one forward pass; by default a token budget alone decides.
        normalize: scores between 0 and 1, by the logistic function.

    Raises:
        ValueError: the model cannot be found, or it is no cross-encoder with one score a pair; a length leaves nothing of
            a pair.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        device: Any = None,
        dtype: Any = None,
        max_length: int = 512,
        query_max_length: int | None = None,
        batch_size: int | None = None,
        normalize: bool = False,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        if max_length < SHORTEST_PAIR:
            raise ValueError(f"max_length is {max_length}: a pair needs at least {SHORTEST_PAIR} tokens")
        if query_max_length is not None and query_max_length < 1:
            raise ValueError(f"query_max_length is {query_max_length}: it has to be at least 1")

        import torch
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        from bge_accel.models.loading import load_tokenizer, load_weights, loading, max_positions, read_config
        from bge_accel.models.precision import default_device

        check_model_path("the reranker", model_name_or_path)
        logging.disable_progress_bar()
        common: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        common |= {"cache_dir": cache_dir} if cache_dir is not None else {}
        self.device = torch.device(device) if device is not None else default_device()
        with loading(f"the reranker {model_name_or_path!r}"):
            config = read_config(model_name_or_path, **common)
            self.tokenizer = load_tokenizer(model_name_or_path, **common)
            model = load_weights(
                AutoModelForSequenceClassification,
                model_name_or_path,
                config=config,
                otherwise="it is no reranker; name a cross-encoder, like BAAI/bge-reranker-base",
                dtype=dtype or torch.float32,
                **common,
            )
        if model.config.num_labels != 1:
            raise ValueError(
                f"{model_name_or_path} gives {model.config.num_labels} numbers for a pair: a reranker has to give one"
            )
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id  # by which decoders find the last token of a pair
        self.model = model.to(self.device)
        self.max_length = min(max_length, max_positions(model.config))
        self.query_max_length = min(query_max_length or self.max_length * 3 // 4, self.max_length - 8)
        self.batch_size, self.normalize = batch_size, normalize
        self.tokenizer.model_max_length = self.max_length

    def score(
        self, pairs: Iterable[tuple[str, str]], *, total: int | None = None, show_progress: bool = False
    ) -> np.ndarray:
        """Scores (pairs,) float32 of (query, passage) pairs, in micro-batches by length under a token budget.

        Args:
            pairs: read 4,096 at a time, so that no more are in memory.
            total: how many there are, for the progress bar.

        Raises:
            ValueError: a score is not finite.
        """
        iterator, scores = iter(pairs), [np.empty(0, dtype=np.float32)]
        with progress(total, "scoring", "pair", shown=show_progress, leave=False) as bar:
            while window := list(islice(iterator, PAIRS_AT_ONCE)):
                scores.append(self._score_window(window))
                bar.update(len(window))
        whole = np.concatenate(scores)
        if not np.isfinite(whole).all():
            raise ValueError("the reranker gives scores that are not finite: it overflows in this precision")
        return whole

    def _score_window(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        import torch

        from bge_accel.encoding.batching import default_token_budget, plan_micro_batches

        scores = np.empty(len(pairs), dtype=np.float32)
        inputs = self._tokenize(pairs)
        lengths = [len(ids) for ids in inputs["input_ids"]]
        for rows in plan_micro_batches(lengths, default_token_budget(self.device), max_texts=self.batch_size):
            batch = self.tokenizer.pad(
                {name: [values[row] for row in rows] for name, values in inputs.items()}, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(**batch.to(self.device)).logits.float()
            scores[rows] = (logits.sigmoid() if self.normalize else logits)[:, 0].cpu().numpy()
        return scores

    def _tokenize(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        from bge_accel.models.tokenizing import TOKENIZING

        queries = {query: query for query, _ in pairs}
        with TOKENIZING:
            encoded = self.tokenizer(
                list(queries), add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        for query, offsets in zip(queries, encoded["offset_mapping"], strict=True):
            if len(offsets) > self.query_max_length:
                queries[query] = query[: offsets[self.query_max_length - 1][1]]
        with TOKENIZING:
            return dict(
                self.tokenizer(
                    [queries[query] for query, _ in pairs],
                    [passage for _, passage in pairs],
                    truncation="only_second",
                    max_length=self.max_length,
                    padding=False,
                )
            )
