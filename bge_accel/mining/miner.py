"""Ranks the pool for rows of queries and chooses their negatives."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from bge_accel.data.reading import text_id
from bge_accel.encoding.embedding_model import EmbeddingModel
from bge_accel.encoding.reranker import Reranker
from bge_accel.encoding.store import EmbeddingStore, missing_shards, prepare_store, read_manifest
from bge_accel.encoding.storing import encode_to_store
from bge_accel.evaluation.search import search
from bge_accel.files.lock import locked
from bge_accel.mining.choice import Choice, Mined, QueryGroups, Ranking, Target, choose_negatives, rank_targets
from bge_accel.mining.pool import TextPool, text_key
from bge_accel.mining.rows import rounded
from bge_accel.models.settings import instruction_prefix
from bge_accel.processes.group import Processes, SharedCounters
from bge_accel.processes.progress import progress

TEXTS_PER_SHARD = 4096  # of the pool, encoded together, and lost by a kill


@dataclass(frozen=True, kw_only=True)
class MinerOptions:
    """How texts are encoded and searched; names as the flags of scripts/mine_hard_negatives.py."""

    query_instruction_format_for_retrieval: str
    existing_negatives: str
    batch_size: int | None
    search_batch_size: int
    query_length: int
    """Tokens that a query is cut to."""
    passage_length: int


class Miner:
    """Mines negatives for rows, some at a time.

    Args:
        pool_emb: (passages, dim) of the pool.
        index: of `build_index`, over the same.
        reranker: its scores replace those of the embeddings.
        shows_progress: of the reranker.
    """

    def __init__(
        self,
        options: MinerOptions,
        choice: Choice,
        model: EmbeddingModel,
        reranker: Reranker | None,
        pool: TextPool,
        pool_emb: Any,
        index: Any,
        *,
        shows_progress: bool,
    ) -> None:
        self.options, self.choice, self.model, self.reranker = options, choice, model, reranker
        self.pool, self.pool_emb, self.index, self.shows_progress = pool, pool_emb, index, shows_progress

    def records(self, rows: Sequence[dict[str, Any]], groups: QueryGroups, first: int) -> Iterator[dict[str, Any]]:
        """What is kept of rows until the end: a record a row, and one with what was dropped and why.

        Args:
            groups: queries that are alike, with what is known to answer them.
            first: number of the first row.
        """
        known = [groups.known_positives(first + number) for number in range(len(rows))]
        kept = [self._kept_negatives(row, of.keys) for row, of in zip(rows, known, strict=True)]
        targets = [
            Target(row["query"], row["pos"], of, [row["neg"][place] for place in places])
            for row, of, places in zip(rows, known, kept, strict=True)
        ]
        mined, dropped = self.mine(rows, targets)
        return records_of(rows, kept, mined, dropped)

    def mine(self, rows: Sequence[dict[str, Any]], targets: Sequence[Target]) -> tuple[list[Mined], Counter[str]]:
        """The negatives of each row, and why candidates were dropped."""
        q_emb, options = self._encode_queries(rows), self.options
        rankings, dropped = rank_targets(
            targets,
            self.pool,
            self.choice,
            lambda which, k: search(self.index, q_emb[which], k),
            options.search_batch_size,
        )
        if self.reranker is not None:
            rankings = rerank(self.reranker, targets, rankings, self.pool, show_progress=self.shows_progress)
        pairs = [(row, text) for row, target in enumerate(targets) for text in (*target.positives, *target.kept)]
        own = self._score(pairs, targets, q_emb)
        parts = np.split(own, np.cumsum([len(target.positives) + len(target.kept) for target in targets])[:-1])
        pos_scores = [part[: len(target.positives)].tolist() for part, target in zip(parts, targets, strict=True)]
        kept_scores = [part[len(target.positives) :].tolist() for part, target in zip(parts, targets, strict=True)]
        mined, more = choose_negatives(
            targets,
            rankings,
            pos_scores,
            kept_scores,
            self.pool,
            self.choice,
            lambda offers: self._score([(row, self.pool[index]) for row, index in offers], targets, q_emb),
        )
        return mined, dropped + more

    def _encode_queries(self, rows: Sequence[dict[str, Any]]) -> np.ndarray:
        """(rows, dim); a row's own "prompt" takes the place of the instruction."""
        texts = []
        for row in rows:
            prefix = instruction_prefix(row.get("prompt"), self.options.query_instruction_format_for_retrieval)
            texts.append((self.model.settings.query_prefix if prefix is None else prefix) + row["query"])
        length = self.options.query_length
        return np.asarray(self.model.encode(texts, batch_size=self.options.batch_size, max_length=length))

    def _score(self, pairs: Sequence[tuple[int, str]], targets: Sequence[Target], q_emb: np.ndarray) -> np.ndarray:
        """Scores (pairs,) of (row number, text) pairs by the reranker, else by the embeddings."""
        if self.reranker is not None:
            return self.reranker.score((targets[row].query, text) for row, text in pairs)
        places: dict[str, int] = {}
        emb = np.empty((len({text for _, text in pairs}), self.model.dim), dtype=np.float32)
        new = []
        for _, text in pairs:
            if text not in places:
                places[text] = len(places)
                found = self.pool.find(text)
                if found is None:
                    new.append(text)
                else:
                    emb[places[text]] = self.pool_emb[found]
        if new:
            length = self.options.passage_length
            encoded = self.model.encode_corpus(new, batch_size=self.options.batch_size, max_length=length)
            emb[[places[text] for text in new]] = np.asarray(encoded)
        return np.array([q_emb[row] @ emb[places[text]] for row, text in pairs], dtype=np.float32)

    def _kept_negatives(self, row: dict[str, Any], known_keys: np.ndarray) -> list[int]:
        """Places in "neg" of the existing negatives that stay: no known positive, not the query, none twice."""
        if self.options.existing_negatives == "replace":
            return []
        seen, kept = {text_key(row["query"]), *known_keys.tolist()}, []
        for place, text in enumerate(row.get("neg") or []):
            if (key := text_key(text)) not in seen:
                seen.add(key)
                kept.append(place)
        return kept


def embed_pool(
    model: Any, pool: TextPool, folder: str, processes: Processes, max_length: int, batch_size: int | None
) -> EmbeddingStore:
    """The store of the pool's embeddings, in which what is missing is encoded; the processes share its shards.

    A shard is encoded alike by any process, so the embeddings do not depend on how many there are.
    """

    with ExitStack() as alone:

        def begin() -> None:
            alone.enter_context(locked(folder))
            texts = len(pool), pool.digest()
            prepare_store(folder, model.describe_store(*texts, max_length=max_length, shard_size=TEXTS_PER_SHARD))

        processes.on_first(begin)
        manifest = read_manifest(folder)
        missing = missing_shards(folder, manifest)
        processes.wait()  # all have seen what is missing before one writes
        counters = SharedCounters("pool", processes.world > 1)
        total = sum(stop - start for start, stop in map(manifest.rows_of, missing))
        with progress(total, "encoding the pool", "text", shown=processes.rank == 0) as bar:
            encode_to_store(
                model,
                folder,
                manifest,
                counters.share(missing),
                lambda start, stop: pool[start:stop],
                max_texts=batch_size,
                on_texts=lambda count: bar.update(counters.add("encoded", count) - bar.n),
            )
        processes.wait()
    return EmbeddingStore(folder)


def rerank(
    reranker: Any, targets: Sequence[Target], rankings: Sequence[Ranking], pool: TextPool, *, show_progress: bool
) -> list[Ranking]:
    """The same candidates with the cross-encoder's scores; pairs of all rows are scored together."""
    pairs = (
        (target.query, pool[index])
        for target, ranking in zip(targets, rankings, strict=True)
        for index in ranking.indices.tolist()
    )
    ends = np.cumsum([len(ranking.indices) for ranking in rankings])
    scores = reranker.score(pairs, total=int(ends[-1]), show_progress=show_progress)
    parts = np.split(scores, ends[:-1])
    return [Ranking(ranking.indices, part) for ranking, part in zip(rankings, parts, strict=True)]


def records_of(
    chunk: Sequence[dict], kept: Sequence[list[int]], mined: Sequence[Mined], dropped: Counter[str]
) -> Iterator[dict[str, Any]]:
    """What is kept of a chunk: a record a row, and one with what was dropped and why."""
    for row, places, found in zip(chunk, kept, mined, strict=True):
        yield {
            "query_id": text_id(row["query"]),
            "kept": places,
            "kept_scores": rounded(found.kept_scores),
            "mined": found.indices,
            "scores": rounded(found.scores),
            "pos_scores": rounded(found.pos_scores),
            "filled": found.num_filled,
            "removed": len(row.get("neg") or []) - len(places),
        }
    yield {"dropped": dropped}
