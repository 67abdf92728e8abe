"""Seconds and memory of exact search: blocks of a store on disk beside FAISS's own search of its Flat index in memory.

    python scripts/benchmarks/search.py --passages 1000000 --queries 10000 --dim 384 --k 100

Random unit vectors; the same queries are searched both ways, in turns: the seconds are the best of --rounds, the ratio
is the median of the rounds' ratios. The memory is the most by which what the process cannot give back has grown (mapped
files not counted), without the queries. The last column is the share of this machine's rate for large float32 matrix
products, measured in the same run.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bge_accel.config import option, parse_config
from bge_accel.encoding.store import EmbeddingStore, Manifest, ShardWriter, prepare_store
from bge_accel.evaluation.search import build_index, search


@dataclass(kw_only=True)
class Config:
    """What to measure."""

    passages: int = option(200_000, "vectors in the corpus", at_least=1)
    queries: int = option(1000, "vectors to search for", at_least=1)
    dim: int = option(384, "numbers in a vector", at_least=1)
    k: int = option(100, "passages found for each query", at_least=1)
    dtype: Literal["float16", "float32"] = option("float32", "of the store")
    rounds: int = option(3, "times that each is measured; the best counts", at_least=1)
    skip_faiss: bool = option(False, "measure the block search alone, where the corpus does not fit the memory")
    folder: str | None = option(None, "where the store is written; default: a temporary folder")


def anonymous_memory() -> float:
    """MB that this process holds and cannot give back."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))


def measured(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, seconds, and MB by which the memory had grown at most."""
    before, most, is_over = anonymous_memory(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_over.wait(0.01):
            most = max(most, anonymous_memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    is_over.set()
    thread.join()
    return result, seconds, most


def write_store(cfg: Config, folder: str) -> EmbeddingStore:
    rng = np.random.default_rng(0)
    manifest = Manifest(cfg.passages, cfg.dim, cfg.dtype, 65536, {"seed": 0})
    for shard in prepare_store(folder, manifest)[1]:
        start, stop = manifest.rows_of(shard)
        writer = ShardWriter(folder, manifest, shard)
        vectors = rng.standard_normal((stop - start, cfg.dim), dtype=np.float32)
        writer.add(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        writer.finish()
    return EmbeddingStore(folder)


def faiss_index(vectors: np.ndarray) -> Any:
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def main(cfg: Config) -> None:
    import torch

    from bge_accel.models.flops import matmul_rate

    with tempfile.TemporaryDirectory() as temporary:
        store = write_store(cfg, os.path.join(cfg.folder or temporary, "store"))
        rng = np.random.default_rng(1)
        q_emb = rng.standard_normal((cfg.queries, cfg.dim), dtype=np.float32)
        q_emb /= np.linalg.norm(q_emb, axis=1, keepdims=True)
        search(build_index(store[:1000].copy()), q_emb[:10], 10)  # imports
        print(f"{cfg.passages:,} x {cfg.dim} {cfg.dtype}, {cfg.queries:,} queries, k {cfg.k}", flush=True)

        ways: dict[str, Callable[[], Any]] = {"blocks of the store": lambda: search(build_index(store), q_emb, cfg.k)}
        index: Any = None
        if not cfg.skip_faiss:
            index, seconds, memory = measured(lambda: faiss_index(np.asarray(store, dtype=np.float32)))
            print(f"building FAISS Flat: {seconds:.2f} s, {memory:,.0f} MB", flush=True)
            ways["FAISS Flat in memory"] = lambda: index.search(q_emb, cfg.k)
        best: dict[str, tuple[float, float]] = {}
        ratios: list[float] = []
        found: dict[str, np.ndarray] = {}
        rates = []
        for _ in range(cfg.rounds):
            times = []
            for name, work in ways.items():
                (_, found[name]), seconds, memory = measured(work)
                least, most = best.get(name, (seconds, memory))
                best[name] = min(least, seconds), max(most, memory)
                times.append(seconds)
            ratios.append(times[-1] / times[0])
            rates.append(matmul_rate(torch.float32, torch.device("cpu")))
        work_done = 2 * cfg.passages * cfg.queries * cfg.dim
        for name, (seconds, memory) in best.items():
            share = work_done / seconds / max(rates)
            print(f"{name:22}{seconds:8.2f} s {memory:8,.0f} MB {share:6.0%} of {max(rates) / 1e9:,.0f} GFLOP/s")
        if index is not None:
            ours, theirs = found["blocks of the store"], found["FAISS Flat in memory"]
            same = np.mean([len(np.intersect1d(a, b)) / cfg.k for a, b in zip(ours, theirs, strict=True)])
            print(f"FAISS's seconds / ours: {np.median(ratios):.2f}; the same passages: {same:.4%}")


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
