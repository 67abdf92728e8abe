"""The contrastive loss as a pure function of embeddings.

InfoNCE (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, eq. 4) with the passages of the whole batch as
negatives, as in DPR (Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906, section 3).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class ContrastiveLoss(NamedTuple):
    """A loss with its gradient, and figures for the log without."""

    loss: torch.Tensor
    accuracy: torch.Tensor
    """Share of queries whose positive scores highest of all that it is compared with."""
    positive_similarity: torch.Tensor
    hardest_negative_similarity: torch.Tensor
    """Means over the queries of the similarity (dot product, before the temperature)."""


def contrastive_loss(
    q_emb: torch.Tensor,
    p_emb: torch.Tensor,
    *,
    temperature: float,
    group_size: int,
    first_query: int = 0,
    in_batch_negatives: bool = True,
    masked: tuple[torch.Tensor, torch.Tensor] | None = None,
    teacher_scores: torch.Tensor | None = None,
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

    Returns:
        The loss and its figures; all scalars.
    """
    dtype = torch.float64 if q_emb.dtype == torch.float64 else torch.float32
    q_emb, p_emb = q_emb.to(dtype), p_emb.to(dtype)
    num_queries = q_emb.shape[0]
    with torch.autocast(q_emb.device.type, enabled=False):
        rows = torch.arange(num_queries, device=q_emb.device)
        own = (first_query + rows)[:, None] * group_size + torch.arange(group_size, device=q_emb.device)
        if in_batch_negatives:
            similarities = q_emb @ p_emb.T
            target = own[:, 0]
        else:
            similarities = torch.einsum("qd,qgd->qg", q_emb, p_emb[own])
            target = torch.zeros_like(rows)
        scores = similarities / temperature
        group_scores = scores.gather(1, own) if in_batch_negatives else scores
        if masked is not None:
            row, column = masked
            if not in_batch_negatives:  # columns count within the group
                column = column - own[row, 0]
                inside = (column >= 0) & (column < group_size)
                row, column = row[inside], column[inside]
            scores = scores.index_put((row, column), scores.new_tensor(-torch.inf))
        loss = F.cross_entropy(scores, target)
        if teacher_scores is not None:
            teacher = teacher_scores.to(dtype).softmax(-1)
            loss = loss - (group_scores.log_softmax(-1) * teacher).sum(-1).mean()
        with torch.no_grad():
            positive = similarities[rows, target]
            negatives = scores.detach().index_put((rows, target), scores.new_tensor(-torch.inf))
            if negatives.shape[1] > 1:
                hardest = negatives.amax(1) * temperature
            else:
                hardest = torch.full_like(positive, -torch.inf)
            met = hardest.isfinite()  # a query may meet no negative at all
            hardest_mean = hardest[met].mean() if met.any() else hardest.new_tensor(float("nan"))
            accuracy = (positive > hardest).to(dtype).mean()
    return ContrastiveLoss(loss, accuracy, positive.mean(), hardest_mean)


def known_positive_pairs(
    known_ids: Sequence[Sequence[int]], passage_ids: np.ndarray, *, group_size: int, first_query: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Where the scores of a batch meet a known positive that is not the target.

    Args:
        known_ids: for each local query the ids (`data.text_id`) of all its known positives.
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
