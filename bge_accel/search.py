"""Nearest neighbours by inner product: FAISS, or PyTorch where FAISS is not installed."""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

# Vectors handled at a time: bounds the memory for converting and for the blocks of the score matrix.
ADD_BLOCK, CORPUS_BLOCK, QUERY_BLOCK = 65536, 8192, 256
MAX_TRAINING_VECTORS = 1_000_000


def build_index(corpus_emb: np.ndarray, index_factory: str = "Flat") -> Any:
    """An index of `corpus_emb` (n, dim) for `search`; "Flat" is exact.

    Any other FAISS index string ("HNSW32", "IVF1024,Flat", "IVF4096,PQ64", ...) searches approximately. What has to be
    trained is trained on the embeddings themselves, at most a million of them, drawn always alike. An IVF index visits
    the square root of its number of lists. Without FAISS there is "Flat" alone; the index then is `corpus_emb` itself.

    Raises:
        ValueError: there are no embeddings or one is not finite; FAISS does not take the string, or not for so few
            vectors or this dimension; FAISS is not installed and the string is not "Flat".
    """
    if corpus_emb.ndim != 2 or not len(corpus_emb):
        raise ValueError(f"an index needs embeddings (n, dim) with n at least 1, not {corpus_emb.shape}")
    faiss = _import_faiss(index_factory)
    blocks = _float32_blocks(corpus_emb, ADD_BLOCK, "passage")
    if faiss is None:
        for _ in blocks:  # only to see that all are finite
            pass
        return corpus_emb
    index = _empty_index(faiss, corpus_emb.shape[1], index_factory)
    try:
        if not index.is_trained:
            index.train(_training_sample(corpus_emb))
        for block in blocks:
            index.add(block)
    except RuntimeError as error:
        raise _index_error(index_factory, error) from error
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:  # FAISS visits a single list unless told otherwise, and finds little
        ivf.nprobe = max(1, round(math.sqrt(ivf.nlist)))
    return index


def check_index_factory(index_factory: str, dim: int) -> None:
    """Raises `build_index`'s ValueError for an index string that cannot be built, before there is a corpus."""
    faiss = _import_faiss(index_factory)
    if faiss is not None:
        _empty_index(faiss, dim, index_factory)


def search(index: Any, q_emb: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k passages of `index` with the largest inner product with each query.

    Sorted by score descending, equal scores by index ascending. With "Flat" that also decides which of equally scored
    passages are among the k, so duplicates in the corpus never make the answer a matter of chance.

    Args:
        index: from `build_index`.
        q_emb: (queries, dim).

    Returns:
        Scores (queries, k) float32 and indices (queries, k) int64. A corpus of fewer than k passages gives as many
        columns as it has passages. Where an approximate index finds fewer than k, the rest has index -1, score -inf.

    Raises:
        ValueError: k is not positive, the dimensions differ, or a query embedding is not finite.
    """
    is_faiss = not isinstance(index, np.ndarray)
    num_passages, dim = (index.ntotal, index.d) if is_faiss else index.shape
    if k < 1:
        raise ValueError(f"k is {k}: it has to be at least 1")
    if q_emb.ndim != 2 or q_emb.shape[1] != dim:
        raise ValueError(f"the index holds vectors of {dim} numbers, the queries are {q_emb.shape}")
    k = min(k, num_passages)
    if not len(q_emb):
        return np.empty((0, k), dtype=np.float32), np.empty((0, k), dtype=np.int64)
    q_emb = np.concatenate(list(_float32_blocks(q_emb, ADD_BLOCK, "query")))
    return _search_faiss(index, q_emb, k) if is_faiss else _search_torch(index, q_emb, k)


def _search_faiss(index: Any, q_emb: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import faiss

    is_flat = isinstance(index, faiss.IndexFlat)
    # One passage more shows whether a tie runs across the k-th place, where FAISS keeps either passage.
    scores, indices = index.search(q_emb, min(k + 1, index.ntotal) if is_flat else k)
    scores[indices < 0] = -np.inf
    order = np.lexsort((indices, -scores), axis=-1)
    scores, indices = np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)
    if scores.shape[1] > k:
        tied = scores[:, k - 1] == scores[:, k]
        scores, indices = scores[:, :k].copy(), indices[:, :k].copy()
        if tied.any():
            vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
            scores[tied], indices[tied] = _search_torch(vectors, q_emb[tied], k)
    return scores, indices


def _search_torch(corpus_emb: np.ndarray, q_emb: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search in blocks; holds the result and one block of the score matrix.

    `topk` keeps any of equal values. So each score is made one integer with its passage's number: the upper half sorts
    as the score does, the lower half counts the passages down.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_passages = len(corpus_emb)
    queries = torch.from_numpy(q_emb).to(device).split(QUERY_BLOCK)
    best = [torch.empty((len(rows), 0), dtype=torch.int64, device=device) for rows in queries]
    start = 0
    for array in _float32_blocks(corpus_emb, CORPUS_BLOCK, "passage"):
        block = torch.from_numpy(array).to(device)
        countdown = num_passages - 1 - torch.arange(start, start + len(block), device=device)
        for part, rows in enumerate(queries):
            scores = rows @ block.T + 0.0  # turns -0.0, whose bits differ, into 0.0
            keys = (_sortable(scores.view(torch.int32)).long() << 32) | countdown
            keys = torch.cat([best[part], keys], dim=1)
            best[part] = keys.topk(min(k, keys.shape[1]), dim=1).values
        start += len(block)
    keys = torch.cat(best)
    indices = num_passages - 1 - (keys & 0xFFFFFFFF)
    return _sortable((keys >> 32).int()).view(torch.float32).cpu().numpy(), indices.cpu().numpy()


def _sortable(bits: Any) -> Any:
    """Bits of float32 numbers, as int32, to integers that sort as the numbers do; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float32_blocks(embeddings: np.ndarray, size: int, what: str) -> Iterator[np.ndarray]:
    """Consecutive rows as contiguous float32; raises ValueError at a number that is not finite."""
    for start in range(0, len(embeddings), size):
        block = np.ascontiguousarray(embeddings[start : start + size], dtype=np.float32)
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"the embedding of {what} {start + int(finite.argmin())} (counted from 0) is not finite: the model "
                "overflows in this precision, or its weights are damaged"
            )
        yield block


def _training_sample(corpus_emb: np.ndarray) -> np.ndarray:
    if len(corpus_emb) > MAX_TRAINING_VECTORS:
        chosen = np.random.default_rng(0).choice(len(corpus_emb), MAX_TRAINING_VECTORS, replace=False)
        corpus_emb = corpus_emb[np.sort(chosen)]
    return np.ascontiguousarray(corpus_emb, dtype=np.float32)


def _import_faiss(index_factory: str) -> ModuleType | None:
    try:
        import faiss
    except ImportError:
        if index_factory == "Flat":
            return None
        raise ValueError(
            f"the index {index_factory!r} needs FAISS: pip install faiss-cpu (without it there is 'Flat' alone)"
        ) from None
    return faiss


def _empty_index(faiss: ModuleType, dim: int, index_factory: str) -> Any:
    try:
        return faiss.index_factory(dim, index_factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise _index_error(index_factory, error) from error


def _index_error(index_factory: str, error: RuntimeError) -> ValueError:
    # "Error in <C++ signature> at <file>:<line>: <what a user can read>"
    message = str(error).rsplit(".cpp:", 1)[-1].partition(": ")[2] or str(error)
    return ValueError(f"FAISS cannot build the index {index_factory!r} on these embeddings: {message}")
