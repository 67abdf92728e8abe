"""Which passages a query is compared with: those of all processes, less its known positives."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from bge_accel.encoding.transfer import to_device
from bge_accel.processes.group import rank_and_world
from bge_accel.training.gather import gather, gather_uneven, gather_with_grad
from bge_accel.training.losses import Pairs, known_positive_pairs, known_to_any

if TYPE_CHECKING:
    from bge_accel.training.batches import Batch


class Passages(NamedTuple):
    """The passages that the queries of this process are compared with."""

    emb: torch.Tensor
    """(passages, dim), the groups of all queries one after another, the positive first in each."""
    ids: np.ndarray
    """(passages,) `text_id` of each."""
    first_query: int
    """Of this process's queries, in the order of the groups."""
    is_global: bool
    """Whether other processes' passages are among them."""


def gather_passages(p_emb: torch.Tensor, batch: "Batch", *, across: bool, need_ids: bool) -> Passages:
    """The passages of this process, or of all of them with exact gradients.

    Args:
        p_emb: (queries * group size, dim), of this process.
        across: whether the passages of all processes are compared; all have to say the same.
        need_ids: whether `ids` are those of all of them too, which is a second collective.
    """
    ids, (rank, world) = batch.passage_ids, rank_and_world()
    if not across:
        return Passages(p_emb, ids, 0, False)
    p_emb = gather_with_grad(p_emb)
    if world > 1 and need_ids:
        ids = gather(torch.from_numpy(ids).to(p_emb.device)).cpu().numpy()
    return Passages(p_emb, ids, rank * len(batch.examples), True)


def known_positives(passages: Passages, batch: "Batch") -> Pairs:
    """(rows, columns) of the scores to leave out: what is known to answer a query is never its negative."""
    feed, device = batch.feed, passages.emb.device
    known_ids = [example.known_ids for example in batch.examples]
    if feed.stream is not None:  # each of its rows knows of its own block alone
        query_ids = [example.query_id for example in batch.examples]
        known = torch.tensor([(q, i) for q, ids in zip(query_ids, known_ids, strict=True) for i in ids])
        known = gather_uneven(known.to(device)).cpu() if passages.is_global else known
        known_ids = known_to_any(query_ids, known.numpy())
    pairs = known_positive_pairs(known_ids, passages.ids, group_size=feed.group_size, first_query=passages.first_query)
    if not feed.in_batch_negatives:  # other groups' passages are not met anyway
        own = pairs[1] // feed.group_size == pairs[0]
        pairs = pairs[0][own], pairs[1][own]
    return to_device(torch.from_numpy(pairs[0]), device), to_device(torch.from_numpy(pairs[1]), device)
