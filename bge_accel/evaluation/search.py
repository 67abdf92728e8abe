"""Nearest neighbours by inner product: exact in blocks by PyTorch, approximate or on GPUs by FAISS.

Embeddings are an array, a mapped file or an `EmbeddingStore`; the last two are searched exactly where they lie, a block
at a time, so that memory does not grow with the corpus.
"""

import json
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from bge_accel.encoding.store import EmbeddingStore
from bge_accel.files.parsing import load_json
from bge_accel.files.text import first_line, installed_version, shorten
from bge_accel.processes.group import gather

# Vectors handled at a time: bounds the memory for converting and for the blocks of the score matrix.
ADD_BLOCK, CORPUS_BLOCK, QUERY_BLOCK = 65536, 8192, 1024
GPU_CORPUS_BLOCK, GPU_QUERY_BLOCK = 65536, 4096  # a gigabyte of scores
GROUP = 32  # scores that are compared by their largest alone
MAX_TRAINING_VECTORS = 1_000_000
FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-gpu-cu11", "faiss-gpu-cu12")


def build_index(corpus_emb: Any, index_factory: str = "Flat", *, use_gpu: bool = False) -> Any:
    """An index of `corpus_emb` (n, dim) for `search`; "Flat" is exact.

    With "Flat" the index is `corpus_emb` itself, not a copy of it, and FAISS is not needed. Any other FAISS index string
    ("HNSW32", "IVF1024,Flat", "IVF4096,PQ64", ...) searches approximately. What has to be trained is trained on the
    embeddings themselves, at most a million of them, drawn always alike. An IVF index visits the square root of its
    number of lists.

    Args:
        corpus_emb: array, `numpy.memmap` or `EmbeddingStore`; not to be changed while the index is in use.
        use_gpu: FAISS on all GPUs, each with a part of the corpus in float16; for "Flat" without a FAISS that knows
            GPUs, or from a file, PyTorch on the first one, in float32.

    Raises:
        ValueError: there are no embeddings or one is not finite; FAISS does not take the string, or not for so few
            vectors or this dimension; FAISS is not installed and the string is not "Flat"; two packages of FAISS are
            installed; a GPU is asked for and none can be used.
    """
    if corpus_emb.ndim != 2 or not len(corpus_emb):
        raise ValueError(f"an index needs embeddings (n, dim) with n at least 1, not {corpus_emb.shape}")
    faiss = _import_faiss(index_factory)
    on_gpu = use_gpu and _faiss_uses_gpu(faiss, index_factory)
    in_place = index_factory == "Flat" and (
        not on_gpu or isinstance(corpus_emb, np.memmap | EmbeddingStore)  # which may be larger than what GPUs hold
    )
    if in_place and isinstance(corpus_emb, EmbeddingStore):
        return corpus_emb  # only what is finite was written, and reading finds damage
    blocks = _float32_blocks(corpus_emb, ADD_BLOCK, "passage")
    if in_place:
        for _ in blocks:  # only to see that all are finite
            pass
        return corpus_emb
    assert faiss is not None
    index = _empty_index(faiss, corpus_emb.shape[1], index_factory)
    try:
        if not index.is_trained:
            index.train(_training_sample(corpus_emb))
        if on_gpu:
            index = _to_all_gpus(faiss, index)
        for block in blocks:
            index.add(block)
    except RuntimeError as error:
        raise _index_error(index_factory, error) from error
    ivf = faiss.try_extract_index_ivf(index) if not on_gpu else None
    if ivf is not None:  # FAISS visits a single list unless told otherwise, and finds little
        ivf.nprobe = max(1, round(math.sqrt(ivf.nlist)))
    return index


def _faiss_uses_gpu(faiss: ModuleType | None, index_factory: str) -> bool:
    """Whether FAISS is to search on GPUs; False where PyTorch has to."""
    import torch

    if faiss is not None and hasattr(faiss, "index_cpu_to_all_gpus") and faiss.get_num_gpus() > 0:
        return True
    if not torch.cuda.is_available():
        raise ValueError("there is no GPU to search on: drop --use_gpu_for_searching")
    if index_factory != "Flat":
        raise ValueError(
            f"the index {index_factory!r} on a GPU needs a FAISS that knows GPUs: pip uninstall faiss-cpu, then "
            "pip install -r requirements-gpu.txt"
        )
    return False


def _to_all_gpus(faiss: ModuleType, index: Any) -> Any:
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = max(1, round(math.sqrt(ivf.nlist)))
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.useFloat16 = True, True
    return faiss.index_cpu_to_all_gpus(index, options)


def check_index_factory(index_factory: str, dim: int) -> None:
    """Raises `build_index`'s ValueError for an index string that cannot be built, before there is a corpus."""
    faiss = _import_faiss(index_factory)
    if faiss is not None:
        _empty_index(faiss, dim, index_factory)


def search(index: Any, q_emb: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k passages of `index` with the largest inner product with each query.

    Sorted by score descending, equal scores by index ascending. With "Flat" that also decides which of equally scored
    passages are among the k, so duplicates in the corpus never make the answer a matter of chance. An exact search of
    a store or a mapped file holds one block of it, one of the score matrix, and the result.

    Args:
        index: from `build_index` or `load_index`.
        q_emb: (queries, dim).

    Returns:
        Scores (queries, k) float32 and indices (queries, k) int64. A corpus of fewer than k passages gives as many
        columns as it has passages. Where an approximate index finds fewer than k, the rest has index -1, score -inf.

    Raises:
        ValueError: k is not positive, the dimensions differ, or a query embedding is not finite.
    """
    is_faiss = not isinstance(index, np.ndarray | EmbeddingStore)
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


def merge_results(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], first_rows: Sequence[int], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the whole from `search` over consecutive parts of a corpus, as `search` over the whole gives them.

    Args:
        parts: scores and indices (queries, any number) of each part, of k passages or all that the part has.
        first_rows: number that the first passage of each part has in the whole.
    """
    scores = np.concatenate([part[0] for part in parts], axis=1)
    indices = np.concatenate(
        [np.where(part[1] >= 0, part[1] + first, -1) for part, first in zip(parts, first_rows, strict=True)], axis=1
    )
    # What was not found, with index -1, comes last.
    order = np.lexsort((np.where(indices < 0, np.iinfo(np.int64).max, indices), -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)


def search_over_processes(index: Any, q_emb: np.ndarray, k: int, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """`search` in a corpus of which every process holds a part; each gets the k best of the whole.

    Args:
        index: of this process's part; None where it holds nothing.
        q_emb: all queries, the same on every process.
        first_row: number that the first passage of this part has in the whole.
    """
    ours = None if index is None else search(index, q_emb, k)
    parts = gather((ours, first_row))
    held = [(part, first) for part, first in parts if part is not None]
    if not held:
        raise ValueError("no process holds a part of the corpus")
    return merge_results([part for part, _ in held], [first for _, first in held], k)


def index_recall(
    index: Any, corpus_emb: Any, q_emb: np.ndarray, cutoffs: Sequence[int] = (1, 10, 100), *, max_queries: int = 1000
) -> dict[str, float]:
    """How much of what exact search finds an approximate index finds: {"recall@10": 0.98, ...} and "queries".

    The mean share of the exact first passages among the index's, over at most `max_queries` of the queries, evenly
    spread. A passage that scores as much as the exact last one counts as found, whichever of the tied it is.
    """
    cutoffs = sorted({min(cutoff, len(corpus_emb)) for cutoff in cutoffs})
    chosen = q_emb[np.unique(np.linspace(0, len(q_emb) - 1, min(max_queries, len(q_emb))).astype(np.int64))]
    chosen = np.ascontiguousarray(chosen, dtype=np.float32)
    _, found = search(index, chosen, cutoffs[-1])
    exact_scores, exact = _search_torch(corpus_emb, chosen, cutoffs[-1])
    recall = {}
    for cutoff in cutoffs:
        hits = 0
        for query in range(len(chosen)):
            ours = found[query, :cutoff][found[query, :cutoff] >= 0]
            known = np.isin(ours, exact[query, :cutoff])
            others = np.asarray(corpus_emb[ours[~known]], dtype=np.float32) @ chosen[query]
            last = float(exact_scores[query, cutoff - 1])
            hits += int(known.sum()) + int((others >= last - 1e-6 * max(1.0, abs(last))).sum())
        recall[f"recall@{cutoff}"] = hits / (cutoff * len(chosen))
    return recall | {"queries": len(chosen)}


def save_index(index: Any, path: str, about: dict[str, Any]) -> None:
    """Writes a FAISS index to a file that is complete or absent, and beside it, in `path`.json, what it is of.

    Args:
        about: whatever says of what embeddings the index is and how it was built; `load_index` compares it.

    Raises:
        ValueError: there is nothing to save: an exact search of an array, a mapped file or a store needs no index.
    """
    if isinstance(index, np.ndarray | EmbeddingStore):
        raise ValueError("an exact search reads the embeddings themselves: there is no index to save")
    import faiss

    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    aside = f"{path}.{os.getpid()}.incomplete"
    if os.path.exists(f"{path}.json"):  # never the new index with the old description
        os.remove(f"{path}.json")
    if hasattr(faiss, "index_gpu_to_cpu") and not isinstance(index, faiss.IndexFlat) and "Gpu" in type(index).__name__:
        index = faiss.index_gpu_to_cpu(index)
    faiss.write_index(index, aside)
    os.replace(aside, path)
    with open(aside, "w", encoding="utf-8") as file:
        content = {"num_passages": index.ntotal, "dim": index.d, "crc32": _crc32_of_file(path), **about}
        json.dump(content, file, indent=1, ensure_ascii=False)
    os.replace(aside, f"{path}.json")


def load_index(path: str, about: dict[str, Any]) -> Any:
    """An index that `save_index` wrote.

    Raises:
        ValueError: it is not there, not complete, damaged, or was built from something else, naming what differs.
    """
    faiss = _import_faiss("saved")
    assert faiss is not None
    try:
        found = load_json(f"{path}.json")
        if not isinstance(found, dict):
            raise ValueError(f"{path}.json is {shorten(found)}")
    except ValueError as error:
        raise ValueError(f"the index {path} cannot be read ({error}): build it anew") from None
    wanted = json.loads(json.dumps(about))
    lines = [
        f"{name}: {json.dumps(found.get(name))} in the index, {json.dumps(value)} here"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    other = f"the index {path} was built from something else: build it anew\n  " + "\n  ".join(lines)
    if lines:
        raise ValueError(other)
    try:
        if "crc32" not in found:
            warnings.warn(
                f"the index {path} has no checksum, it is of an older version: damage may not be seen", stacklevel=2
            )
        elif found["crc32"] != _crc32_of_file(path):
            raise ValueError("it does not have the checksum that was written: it is damaged, or another one")
        index = faiss.read_index(path)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"the index {path} cannot be read ({first_line(error)}): build it anew") from None
    if (index.ntotal, index.d) != (found.get("num_passages"), found.get("dim")):
        raise ValueError(other)
    return index


def _crc32_of_file(path: str) -> str:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _search_faiss(index: Any, q_emb: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores, indices = index.search(q_emb, k)
    scores[indices < 0] = -np.inf
    order = np.lexsort((indices, -scores), axis=-1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)


def _search_torch(corpus_emb: Any, q_emb: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search in blocks, on the GPU if there is one.

    Holds the result, one block of the corpus and one of the score matrix.

    `topk` keeps any of equal values. So each score is made one integer with its passage's number: the upper half sorts
    as the score does, the lower half counts the passages down. Making and sorting these is what costs beside the
    product itself, so it is done for few: those that score at least as much as the k-th of the first block's largest of
    each group or, once a query has k passages, more than the last of them (a later passage of the same score has the
    larger number and loses).
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    corpus_block, query_block = (GPU_CORPUS_BLOCK, GPU_QUERY_BLOCK) if on_gpu else (CORPUS_BLOCK, QUERY_BLOCK)
    num_passages = len(corpus_emb)
    queries = torch.from_numpy(q_emb).to(device).split(query_block)
    best = [torch.empty((len(rows), 0), dtype=torch.int64, device=device) for rows in queries]
    buffer = torch.empty(len(queries[0]) * min(corpus_block, num_passages), device=device)
    for start in range(0, num_passages, corpus_block):
        block = _tensor(corpus_emb[start : start + corpus_block]).to(device).float()
        countdown = num_passages - 1 - torch.arange(start, start + len(block), device=device)
        for part, rows in enumerate(queries):
            scores = buffer[: len(rows) * len(block)].view(len(rows), len(block))
            torch.mm(rows, block.T, out=scores)
            size = GROUP if len(block) % GROUP == 0 else 1
            largest = scores.view(len(rows), -1, size).amax(dim=2)
            if best[part].shape[1] == k:
                last = _sortable((best[part][:, -1] >> 32).int()).view(torch.float32)
            elif k <= largest.shape[1]:  # k scores are at least as large as the k-th of these
                last = largest.topk(k, dim=1).values[:, -1].nextafter(scores.new_tensor(-torch.inf))
            else:
                last = scores.new_full((len(rows),), -torch.inf)
            row, column, found_scores = _places(scores, largest, last)
            if len(row):
                found = _keys(found_scores, countdown[column])
                num_found = torch.bincount(row, minlength=len(rows))
                rank = torch.arange(len(row), device=device) - (num_found.cumsum(0) - num_found)[row]
                keys = found.new_full((len(rows), int(num_found.max())), torch.iinfo(torch.int64).min)
                keys[row, rank] = found
                keys = torch.cat([best[part], keys], dim=1)
                best[part] = keys.topk(min(k, keys.shape[1]), dim=1).values
    keys = torch.cat(best)
    indices = num_passages - 1 - (keys & 0xFFFFFFFF)
    return _sortable((keys >> 32).int()).view(torch.float32).cpu().numpy(), indices.cpu().numpy()


def _tensor(rows: np.ndarray) -> Any:
    """Rows as a tensor, not copied where they are contiguous; read only, as a mapped file is."""
    import torch

    rows = np.ascontiguousarray(rows)
    if not rows.flags.writeable:  # torch would warn that it cannot tell a tensor not to be written to
        address, _ = rows.__array_interface__["data"]
        owner = SimpleNamespace(rows=rows, __array_interface__={**rows.__array_interface__, "data": (address, False)})
        rows = np.asarray(owner)
    return torch.from_numpy(rows)


def _places(scores: Any, largest: Any, last: Any) -> tuple[Any, Any, Any]:
    """Row and column of the scores (n, m) that are larger than their row's `last` (n,), row by row, and these scores.

    Most groups of scores hold none, which their `largest` (n, groups) shows.
    """
    count, size = largest.shape[1], scores.shape[1] // largest.shape[1]
    group = _true_places((largest > last[:, None]).view(-1))
    row, first = _divided(group, count)
    chosen = scores.view(-1, size).index_select(0, group)
    place = _true_places((chosen > last.index_select(0, row)[:, None]).view(-1))
    which, within = _divided(place, size)
    column = first.index_select(0, which) * size + within
    return row.index_select(0, which), column, chosen.view(-1).index_select(0, place)


def _divided(numbers: Any, size: int) -> tuple[Any, Any]:
    """Quotients and remainders, faster by a power of two."""
    if size & (size - 1):
        return numbers // size, numbers % size
    return numbers >> (size.bit_length() - 1), numbers & (size - 1)


def _keys(scores: Any, countdown: Any) -> Any:
    """Scores (float32) and what counts the passages down as integers that sort by score, then by passage."""
    import torch

    scores = scores + 0.0  # turns -0.0, whose bits differ, into 0.0
    return (_sortable(scores.view(torch.int32)).long() << 32) | countdown


def _true_places(flags: Any) -> Any:
    """Where a vector is true, ascending; NumPy finds the few many times as fast as torch on a CPU."""
    import torch

    return torch.from_numpy(np.flatnonzero(flags.numpy())) if flags.device.type == "cpu" else flags.nonzero()[:, 0]


def _sortable(bits: Any) -> Any:
    """Bits of float32 numbers, as int32, to integers that sort as the numbers do; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float32_blocks(embeddings: Any, size: int, what: str) -> Iterator[np.ndarray]:
    """Consecutive rows as contiguous float32 copies or views; raises ValueError at a number that is not finite."""
    for start in range(0, len(embeddings), size):
        block = np.ascontiguousarray(embeddings[start : start + size], dtype=np.float32)
        if not block.flags.writeable:  # a view of a mapped file, which torch would warn of
            block = block.copy()
        with np.errstate(all="ignore"):
            total = block.sum()
        # Finite only if all are; where it overflows, each is looked at.
        if not np.isfinite(total) and not (finite := np.isfinite(block).all(axis=1)).all():
            raise ValueError(
                f"the embedding of {what} {start + int(finite.argmin())} (counted from 0) is not finite: the model "
                "overflows in this precision, or its weights are damaged"
            )
        yield block


def _training_sample(corpus_emb: Any) -> np.ndarray:
    if len(corpus_emb) > MAX_TRAINING_VECTORS:
        chosen = np.random.default_rng(0).choice(len(corpus_emb), MAX_TRAINING_VECTORS, replace=False)
        corpus_emb = corpus_emb[np.sort(chosen)]
    return np.ascontiguousarray(corpus_emb, dtype=np.float32)


def installed_faiss() -> dict[str, str]:
    """The packages of FAISS that are installed, with their versions."""
    return {name: version for name in FAISS_PACKAGES if (version := installed_version(name))}


def check_faiss_packages() -> None:
    """Raises ValueError where two packages of FAISS are installed: they overwrite each other's files."""
    installed = list(installed_faiss())
    if len(installed) > 1:
        raise ValueError(
            f"{' and '.join(installed)} are installed together and have overwritten each other's files; remove "
            f"{' and '.join(installed[:-1])}: pip uninstall -y {' '.join(installed)}, then pip install {installed[-1]}"
        )


def _import_faiss(index_factory: str) -> ModuleType | None:
    try:
        import faiss
    except ImportError:
        if index_factory == "Flat":
            return None
        raise ValueError(
            f"the index {index_factory!r} needs FAISS: pip install faiss-cpu (without it there is 'Flat' alone)"
        ) from None
    check_faiss_packages()
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


def can_search_on_gpu(index_factory: str) -> bool:
    """Whether there is a GPU, and for an approximate index a FAISS that knows GPUs."""
    import torch

    if not torch.cuda.is_available() or index_factory == "Flat":
        return torch.cuda.is_available()
    import faiss

    return hasattr(faiss, "index_cpu_to_all_gpus")
