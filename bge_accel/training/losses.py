"""The contrastive loss as a pure function of embeddings.

InfoNCE (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, eq. 4) with the passages of the whole batch as
negatives, as in DPR (Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906, section 3).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

Pairs = tuple[torch.Tensor, torch.Tensor]


class ContrastiveLoss(NamedTuple):
    """A loss with its gradient, and figures for the log without."""

    loss: torch.Tensor
    accuracy: torch.Tensor
    """Share of queries whose positive scores highest of all that it is compared with."""
    positive_similarity: torch.Tensor
    hardest_negative_similarity: torch.Tensor
    """Means over the queries of the similarity (dot product, before the temperature)."""
    query_losses: torch.Tensor
    query_correct: torch.Tensor
    """(queries,) each query's own part of the loss, and whether its positive scores highest."""
    num_masked: int = 0
    """Scores that were left out."""


def contrastive_loss(
    q_emb: torch.Tensor,
    p_emb: torch.Tensor,
    *,
    temperature: float,
    group_size: int,
    first_query: int = 0,
    in_batch_negatives: bool = True,
    masked: Pairs | None = None,
    teacher_scores: torch.Tensor | None = None,
    max_scores: int | None = None,
) -> ContrastiveLoss:
    """Mean cross-entropy of each query's positive among the passages, in float32 or better.

    Args:
        q_emb: (queries, dim), the queries of this process.
        p_emb: (passages, dim), the groups of all queries of all processes one after another, positive first in each.
        temperature: similarities are divided by it.
        group_size: passages per query.
        first_query: index of this process's first query in the global batch; the positive of local query i is passage
            (first_query + i) * group_size.
        in_batch_negatives: False compares each query with its own group alone.
        masked: (rows, columns), int64, of the scores to leave out: known positives that are not the target.
        teacher_scores: (queries, group_size); adds the cross-entropy between the soft-max of these and that of the
            query's scores over its own group (knowledge distillation, FlagEmbedding's `kl_div`).
        max_scores: a matrix of more scores is never held whole but computed in tiles of so many, and again in backward;
            the result is the same up to rounding. Default: 2^24 on a GPU; 2^20 on a CPU, whose cache holds them.

    Returns:
        The loss and its figures.
    """
    num_masked = 0 if masked is None else len(masked[0])
    if max_scores is None:
        max_scores = 2**20 if q_emb.device.type == "cpu" else 2**24
    dtype = torch.float64 if q_emb.dtype == torch.float64 else torch.float32
    q_emb, p_emb = q_emb.to(dtype), p_emb.to(dtype)
    num_queries, num_passages = q_emb.shape[0], p_emb.shape[0]
    with torch.autocast(q_emb.device.type, enabled=False):
        rows = torch.arange(num_queries, device=q_emb.device)
        own = (first_query + rows)[:, None] * group_size + torch.arange(group_size, device=q_emb.device)
        group = q_emb[:, :0]  # similarities of each query with its own group, where they are wanted
        if teacher_scores is not None or not in_batch_negatives:
            group = torch.einsum("qd,qgd->qg", q_emb, p_emb[own])
        if not in_batch_negatives:
            if masked is not None:  # columns count within the group
                row, column = masked[0], masked[1] - own[masked[0], 0]
                inside = (column >= 0) & (column < group_size)
                masked = row[inside], column[inside]
            nll, positive, hardest = _plain_nll(group, torch.zeros_like(rows), temperature, masked)
        elif num_queries * num_passages <= max_scores:
            nll, positive, hardest = _plain_nll(q_emb @ p_emb.T, own[:, 0], temperature, masked)
        else:
            tiles = _Tiles(num_queries, num_passages, masked, max_scores, first_query, group_size)
            nll, positive, hardest = _TiledNLL.apply(q_emb, p_emb, temperature, tiles)
        if teacher_scores is not None:
            teacher = teacher_scores.to(dtype).softmax(-1)
            nll = nll - ((group / temperature).log_softmax(-1) * teacher).sum(-1)
        loss = nll.mean()
        with torch.no_grad():
            met = hardest.isfinite()  # a query may meet no negative at all
            hardest_mean = hardest.where(met, 0).sum() / met.sum()
            correct = positive > hardest
    accuracy = correct.to(dtype).mean()
    return ContrastiveLoss(loss, accuracy, positive.mean(), hardest_mean, nll.detach(), correct, num_masked)


def _plain_nll(
    similarities: torch.Tensor, target: torch.Tensor, temperature: float, masked: Pairs | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Negative log-likelihood, positive and hardest negative similarity of each query, from the whole matrix."""
    minus_infinity = similarities.new_full((), -torch.inf)
    if masked is not None:
        similarities = similarities.index_put(masked, minus_infinity)
    nll = F.cross_entropy(similarities / temperature, target, reduction="none")
    rows = torch.arange(len(target), device=target.device)
    with torch.no_grad():
        positive = similarities[rows, target]
        hardest = similarities.detach().index_put((rows, target), minus_infinity).amax(1)
    return nll, positive, hardest


class _TiledNLL(torch.autograd.Function):
    """`_plain_nll` of `q_emb @ p_emb.T` without that matrix: tiles with a running log-sum-exp, computed again in
    backward (as in FlashAttention, Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 1)."""

    @staticmethod
    def forward(
        ctx: Any,
        q_emb: torch.Tensor,
        p_emb: torch.Tensor,
        temperature: float,
        tiles: "_Tiles",
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        lse = q_emb.new_full((len(q_emb),), -torch.inf)
        positive, hardest = torch.empty_like(lse), lse.clone()
        for rows, columns, pairs in tiles:
            scores = q_emb[rows] @ p_emb[columns].T
            if pairs is not None:
                scores[pairs] = -torch.inf
            inside, at = tiles.targets(rows, columns, q_emb.device)
            positive[rows][inside] = scores[inside, at]
            lse[rows] = torch.logaddexp(lse[rows], (scores / temperature).logsumexp(1))
            scores[inside, at] = -torch.inf
            hardest[rows] = torch.maximum(hardest[rows], scores.amax(1))
        ctx.save_for_backward(q_emb, p_emb, lse)
        ctx.temperature, ctx.tiles = temperature, tiles
        ctx.mark_non_differentiable(positive, hardest)
        return lse - positive / temperature, positive, hardest

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q_emb, p_emb, lse = ctx.saved_tensors
        weight = grads[0] / ctx.temperature
        q_grad, p_grad = torch.zeros_like(q_emb), torch.zeros_like(p_emb)
        with torch.autocast(q_emb.device.type, enabled=False):
            for rows, columns, pairs in ctx.tiles:
                scores = q_emb[rows] @ p_emb[columns].T
                if pairs is not None:
                    scores[pairs] = -torch.inf
                # Gradient of the scores: soft-max minus one at the target, times the incoming gradient.
                scores.div_(ctx.temperature).sub_(lse[rows, None]).exp_()
                scores[ctx.tiles.targets(rows, columns, scores.device)] -= 1
                scores.mul_(weight[rows, None])
                q_grad[rows].addmm_(scores, p_emb[columns])
                p_grad[columns].addmm_(scores.T, q_emb[rows])
        return q_grad, p_grad, None, None


class _Tiles:
    """Row and column slices that cover the scores, each with the masked pairs inside it (counted from its corner)."""

    def __init__(
        self,
        num_rows: int,
        num_columns: int,
        masked: Pairs | None,
        max_scores: int,
        first_query: int,
        group_size: int,
    ) -> None:
        self.first_query, self.group_size = first_query, group_size
        width = max(1, min(num_columns, math.isqrt(max_scores) * 2))
        height = max(1, min(num_rows, max_scores // width))
        self.slices = [
            (slice(row, min(row + height, num_rows)), slice(column, min(column + width, num_columns)))
            for row in range(0, num_rows, height)
            for column in range(0, num_columns, width)
        ]
        self.masked: Pairs | None = None
        if masked is not None and len(masked[0]):
            row, column = masked
            tile = row // height * -(-num_columns // width) + column // width
            order = tile.argsort()
            self.masked = row[order] % height, column[order] % width
            edges = torch.arange(len(self.slices) + 1, device=tile.device)
            self.starts = torch.searchsorted(tile[order], edges).tolist()

    def targets(self, rows: slice, columns: slice, device: torch.device) -> Pairs:
        """(rows, columns) within a tile of the targets that lie in it; reckoned here, so that no GPU is asked."""
        group, first = self.group_size, self.first_query
        start = max(rows.start, -(-columns.start // group) - first)
        stop = max(start, min(rows.stop, -(-columns.stop // group) - first))
        inside = torch.arange(start, stop, device=device)
        return inside - rows.start, (inside + first) * group - columns.start

    def __iter__(self) -> Iterator[tuple[slice, slice, Pairs | None]]:
        for index, (rows, columns) in enumerate(self.slices):
            pairs = None
            if self.masked is not None:
                inside = slice(self.starts[index], self.starts[index + 1])
                pairs = self.masked[0][inside], self.masked[1][inside]
            yield rows, columns, pairs


def known_to_any(query_ids: Sequence[int], pairs: np.ndarray) -> list[list[int]]:
    """For each query the ids of all passages that any row of the batch knows to answer it.

    Args:
        query_ids: of the local queries (`data.reading.text_id`).
        pairs: (n, 2) ids of a query and of one of its known positives, of all rows of the global batch.
    """
    known: dict[int, set[int]] = {query: set() for query in query_ids}
    for query, passage in pairs.tolist():
        if query in known:
            known[query].add(passage)
    return [sorted(known[query]) for query in query_ids]


def known_positive_pairs(
    known_ids: Sequence[Sequence[int]], passage_ids: np.ndarray, *, group_size: int, first_query: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Where the scores of a batch meet a known positive that is not the target.

    Args:
        known_ids: for each local query the ids (`data.reading.text_id`) of all its known positives.
        passage_ids: (passages,) ids of the passages of the global batch.
        group_size, first_query: as in `contrastive_loss`.

    Returns:
        (rows, columns) of the scores that must not count as negatives, int64.
    """
    columns_of: dict[int, list[int]] = {}
    for column, passage_id in enumerate(passage_ids.tolist()):
        columns_of.setdefault(passage_id, []).append(column)
    rows, columns = [], []
    for row, ids in enumerate(known_ids):
        target = (first_query + row) * group_size
        for known in ids:
            for column in columns_of.get(known, ()):
                if column != target:
                    rows.append(row)
                    columns.append(column)
    return np.asarray(rows, dtype=np.int64), np.asarray(columns, dtype=np.int64)
