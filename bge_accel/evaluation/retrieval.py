"""How well a model, or the run of any system, retrieves passages for judged queries."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from bge_accel.encoding.store import EmbeddingStore, StorePart, digest_texts, prepare_store
from bge_accel.evaluation.metrics import per_query_metrics, trec_order
from bge_accel.evaluation.search import build_index, check_index_factory, index_recall, search, search_over_processes
from bge_accel.evaluation.sets import EvaluationData, Judgements
from bge_accel.files.lock import locked
from bge_accel.files.text import shorten
from bge_accel.processes.group import from_first, gather, rank_and_world, share_of

DEFAULT_CUTOFFS = (1, 3, 5, 10, 100)
TEXT_KEPT = 500  # characters of a text in samples


class Evaluation(NamedTuple):
    """Metrics and the rankings that they come from, in trec_eval's order; k is at most the size of the corpus."""

    metrics: dict[str, float]
    scores: np.ndarray
    """(queries, k) float32."""
    indices: np.ndarray
    """(queries, k) rows of the corpus; -1 where an approximate index found fewer."""
    gains: np.ndarray
    """(queries, k) grade of each passage, 0 where it is not judged."""
    per_query: dict[str, np.ndarray]
    """Each metric of every query (queries,); `metrics` are their means."""
    positive_scores: np.ndarray
    """(positives in the corpus,) similarity of each to its query, found or not; of a run those that it lists."""
    seconds: dict[str, float]
    index_recall: dict[str, float] | None = None
    """What an approximate index finds of the exact result, from `index_recall`; None for an exact one."""


def choose_cutoffs(k: int, cutoffs: Sequence[int] | None = None) -> list[int]:
    """The cut-offs to measure at: those given, by default 1, 3, 5, 10 and 100 as far as k allows, and k.

    Raises:
        ValueError: k or a cut-off is below 1, or a cut-off is above k.
    """
    if k < 1:
        raise ValueError(f"k is {k}: it has to be at least 1")
    if cutoffs is None:
        return sorted({cutoff for cutoff in DEFAULT_CUTOFFS if cutoff <= k} | {k})
    for cutoff in cutoffs:
        if not 1 <= cutoff <= k:
            raise ValueError(f"cut-off {cutoff} is not between 1 and k, which is {k}: raise k or drop the cut-off")
    return sorted(set(cutoffs))


def evaluate_retrieval(
    model: Any,
    data: EvaluationData,
    *,
    k: int = 100,
    cutoffs: Sequence[int] | None = None,
    index_factory: str = "Flat",
    use_gpu: bool = False,
    batch_size: int | None = None,
    max_query_length: int | None = None,
    max_passage_length: int | None = None,
    save_path: str | None = None,
    load_embedding: bool = False,
    show_progress: bool = False,
    shared: bool = False,
) -> Evaluation:
    """Encodes queries and corpus with `model`, searches, and measures.

    Args:
        model: `EmbeddingModel`, or anything with its `encode_queries` and `encode_corpus`.
        k: passages retrieved for each query.
        cutoffs: see `choose_cutoffs`.
        index_factory: FAISS index string, see `build_index`. In several processes each has an index of its own part.
        use_gpu: search on a GPU ("Flat"), or on all that FAISS sees, see `build_index`.
        max_query_length, max_passage_length: in tokens; by default the model's own.
        save_path: folder of an embedding store that the corpus is encoded into (needs an `EmbeddingModel`).
        load_embedding: take the corpus from the store at `save_path`, and encode nothing of it.
        shared: every process of an initialised `torch.distributed` calls this with the same data; each encodes and
            searches its share, and each gets the whole result. How many texts a process encodes differs, so this is not
            for models that are themselves spread over processes.

    Raises:
        ValueError: see `choose_cutoffs`, `build_index`, `search`; the store holds something else, or is not complete.
    """
    choose_cutoffs(k, cutoffs)
    rank, world = rank_and_world() if shared else (0, 1)
    first, stop = share_of(len(data.corpus.texts), rank, world)
    common = {"batch_size": batch_size, "show_progress": show_progress and rank == 0}
    started = time.perf_counter()
    own_queries = data.queries.texts[slice(*share_of(len(data.queries.texts), rank, world))]
    q_emb = model.encode_queries(own_queries, max_length=max_query_length, **common)
    if world > 1:
        q_emb = np.concatenate(gather(q_emb))
    queries_done = time.perf_counter()
    check_index_factory(index_factory, q_emb.shape[1])  # before the hours that a corpus can take
    if save_path is None:
        corpus_emb = model.encode_corpus(data.corpus.texts[first:stop], max_length=max_passage_length, **common)
    else:
        if load_embedding:
            corpus_emb = model.open_corpus(save_path, data.corpus.texts, max_length=max_passage_length)
        elif world == 1:
            corpus_emb = model.save_corpus(save_path, data.corpus.texts, max_length=max_passage_length, **common)
        else:
            corpus_emb = _save_together(model, save_path, data.corpus.texts, max_passage_length, batch_size)
        if world > 1:
            corpus_emb = StorePart(corpus_emb, first, stop)
    if world > 1:
        gather(None)  # a process that is done first does not count its waiting as search
    corpus_done = time.perf_counter()
    evaluation = evaluate_embeddings(
        q_emb,
        corpus_emb,
        data,
        k=k,
        cutoffs=cutoffs,
        index_factory=index_factory,
        use_gpu=use_gpu,
        first_row=first if world > 1 else None,
    )
    encoding = {"encode_queries": queries_done - started, "encode_corpus": corpus_done - queries_done}
    return evaluation._replace(seconds=encoding | evaluation.seconds)


def evaluate_embeddings(
    q_emb: np.ndarray,
    corpus_emb: Any,
    data: EvaluationData,
    *,
    k: int = 100,
    cutoffs: Sequence[int] | None = None,
    index_factory: str = "Flat",
    use_gpu: bool = False,
    first_row: int | None = None,
) -> Evaluation:
    """`evaluate_retrieval` on embeddings of `data.queries.texts` and `data.corpus.texts`, both (n, dim).

    Args:
        corpus_emb: an array, a mapped file or an `EmbeddingStore`.
        first_row: where every process holds a part of the corpus, the number of this part's first passage.
    """
    cutoffs = choose_cutoffs(k, cutoffs)
    is_whole = first_row is None
    if len(q_emb) != len(data.queries.texts) or (is_whole and len(corpus_emb) != len(data.corpus.texts)):
        raise ValueError(
            f"{len(q_emb)} query and {len(corpus_emb)} passage embeddings do not belong to "
            f"{len(data.queries.texts)} queries and {len(data.corpus.texts)} passages"
        )
    started = time.perf_counter()
    index = None
    if use_gpu and index_factory == "Flat":  # by PyTorch, which is exact: FAISS rounds to float16 on GPUs
        index = corpus_emb if len(corpus_emb) else None
    elif is_whole or len(corpus_emb):
        index = build_index(corpus_emb, index_factory, use_gpu=use_gpu)
    built = time.perf_counter()
    if first_row is None:
        scores, indices = search(index, q_emb, k)
    else:
        scores, indices = search_over_processes(index, q_emb, k, first_row)
    searched = time.perf_counter()

    retrieved, inverse = np.unique(indices, return_inverse=True)
    by_id = sorted(range(len(retrieved)), key=lambda i: data.corpus.ids[retrieved[i]] if retrieved[i] >= 0 else "")
    id_ranks = np.empty(len(retrieved), dtype=np.int64)
    id_ranks[by_id] = np.arange(len(retrieved))
    order = trec_order(scores, id_ranks[inverse].reshape(indices.shape))
    scores, indices = np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)

    positive_scores = _positive_scores(q_emb, corpus_emb, data.judgements, first_row or 0)
    if not is_whole:
        positive_scores = np.concatenate(gather(positive_scores))
    evaluation = _measure(scores, indices, data, cutoffs, positive_scores)
    seconds = {"build_index": built - started, "search": searched - built}
    recall = None
    if index_factory != "Flat":
        began = time.perf_counter()
        if first_row is None:
            recall = index_recall(index, corpus_emb, q_emb, cutoffs)
        else:
            recall = _recall_over_processes(index, corpus_emb, q_emb, cutoffs, first_row)
        seconds["index_recall"] = time.perf_counter() - began
    return evaluation._replace(seconds=seconds, index_recall=recall)


def evaluate_run(
    rankings: Mapping[str, Mapping[str, float]],
    data: EvaluationData,
    *,
    k: int = 100,
    cutoffs: Sequence[int] | None = None,
    name: str = "the run",
) -> Evaluation:
    """Measures what any system has retrieved.

    Read as trec_eval reads it: by score in float32, equal scores by passage id descending; ranks are not looked at. A
    judged query without a ranking scores 0, as with trec_eval's -c.

    Args:
        rankings: {query id: {passage id: score}}, from `trec.read_run`; what is beyond k is not looked at.
        name: of the run, for errors.

    Raises:
        ValueError: a passage is not in the corpus, or no judged query has a ranking; see `choose_cutoffs`, too.
    """
    cutoffs = choose_cutoffs(k, cutoffs)
    rows = {passage: row for row, passage in enumerate(data.corpus.ids)}
    found = [rankings.get(query, {}) for query in data.queries.ids]
    if not any(found):
        raise ValueError(
            f"{name} ranks none of the judged queries: it has, for example, {shorten(next(iter(rankings), None))}, and "
            f"the judgements {shorten(data.queries.ids[0])}"
        )
    width = min(k, max(map(len, found)))
    scores = np.full((len(found), width), -np.inf, dtype=np.float32)
    indices = np.full((len(found), width), -1, dtype=np.int64)
    for query, ranking in enumerate(found):
        passages = sorted(ranking, reverse=True)
        values = np.array([ranking[passage] for passage in passages], dtype=np.float32)
        for rank, place in enumerate(np.argsort(-values, kind="stable")[:width]):
            row = rows.get(passages[place])
            if row is None:
                raise ValueError(
                    f"{name}: passage {shorten(passages[place])} of query {shorten(data.queries.ids[query])} is not in "
                    f"the corpus, which has, for example, {shorten(data.corpus.ids[0])}; give the corpus that was "
                    "searched, or the judgements alone"
                )
            scores[query, rank], indices[query, rank] = values[place], row
    return _measure(scores, indices, data, cutoffs, None)


def _measure(
    scores: np.ndarray,
    indices: np.ndarray,
    data: EvaluationData,
    cutoffs: Sequence[int],
    positive_scores: np.ndarray | None,
) -> Evaluation:
    """Metrics of rankings (queries, k) in trec_eval's order."""
    gains = _gains(indices, data.judgements, len(data.corpus.ids))
    judged = _positive_grades(data.judgements, len(indices))
    if positive_scores is None:
        positive_scores = scores[gains > 0]
    per_query = per_query_metrics(gains, judged, cutoffs)
    metrics = {name: float(values.mean()) for name, values in per_query.items()}
    return Evaluation(metrics, scores, indices, gains, per_query, positive_scores, seconds={})


def _positive_scores(q_emb: np.ndarray, corpus_emb: Any, judgements: Judgements, first: int) -> np.ndarray:
    """Inner products (pairs,) of queries with those of their positives that `corpus_emb` holds."""
    own = (judgements.grade > 0) & (judgements.row >= first) & (judgements.row < first + len(corpus_emb))
    queries, rows = judgements.query[own], judgements.row[own] - first
    scores = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), 4096):
        part = slice(start, start + 4096)
        scores[part] = np.einsum("ij,ij->i", q_emb[queries[part]], np.asarray(corpus_emb[rows[part]], np.float32))
    return scores


def ranking_rows(data: EvaluationData, evaluation: Evaluation, depth: int = 10) -> Iterator[dict[str, Any]]:
    """One JSON object a query: what stands on top, and where the first relevant passage stands.

    "first_positive" is its rank counted from 1, None where none of the k retrieved is relevant; "first_text" is the
    text of the passage ranked first.
    """
    for query, (query_id, text) in enumerate(zip(data.queries.ids, data.queries.texts, strict=True)):
        found = evaluation.indices[query][evaluation.indices[query] >= 0]
        relevant = np.flatnonzero(evaluation.gains[query] > 0)
        yield {
            "id": query_id,
            "query": text,
            "ranked_ids": [data.corpus.ids[row] for row in found[:depth]],
            "scores": [float(score) for score in evaluation.scores[query, : len(found)][:depth]],
            "first_positive": int(relevant[0]) + 1 if len(relevant) else None,
            "first_text": data.corpus.texts[found[0]] if len(found) else None,
        }


def _gains(indices: np.ndarray, judgements: Judgements, num_passages: int) -> np.ndarray:
    """Grade (queries, k) of each retrieved passage."""
    in_corpus = judgements.row >= 0
    keys = judgements.query[in_corpus] * num_passages + judgements.row[in_corpus]
    order = np.argsort(keys)
    keys, grades = keys[order], judgements.grade[in_corpus][order]
    wanted = np.arange(len(indices))[:, None] * num_passages + indices
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((keys[places] == wanted) & (indices >= 0), grades[places], 0)


def _positive_grades(judgements: Judgements, num_queries: int) -> np.ndarray:
    """Positive grades (queries, most positives) of each query, descending, padded with 0."""
    positive = judgements.grade > 0
    query, grade = judgements.query[positive], judgements.grade[positive]
    order = np.lexsort((-grade, query))
    query, grade = query[order], grade[order]
    counts = np.bincount(query, minlength=num_queries)
    judged = np.zeros((num_queries, counts.max(initial=0)), dtype=np.int64)
    judged[query, np.arange(len(query)) - (counts.cumsum() - counts)[query]] = grade
    return judged


def score_histogram(evaluation: Evaluation, num_bins: int = 40) -> dict[str, list[float]]:
    """Scores of the positives, and of the passages retrieved that are not, as counts.

    Returns:
        "edges" (num_bins + 1,), from the lowest to the highest score, "positives" and "negatives" (num_bins,) counts.
    """
    negatives = evaluation.scores[(evaluation.gains <= 0) & (evaluation.indices >= 0)]
    both = np.concatenate([evaluation.positive_scores, negatives]).astype(np.float64)
    low, high = (both.min(), both.max()) if len(both) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, num_bins + 1)
    counts = {
        name: np.histogram(scores, edges)[0].tolist()
        for name, scores in (("positives", evaluation.positive_scores), ("negatives", negatives))
    }
    return {"edges": [round(edge, 6) for edge in edges.tolist()], **counts}


def sample_rankings(
    data: EvaluationData, evaluation: Evaluation, num_queries: int, depth: int = 3
) -> list[dict[str, Any]]:
    """The first passages of queries that are spread evenly over the data.

    Each is {"id", "query", "passages": [{"text", "score", "is_relevant"}, ...]}, of a text `TEXT_KEPT` characters.
    """
    total = len(data.queries.texts)
    num_queries = min(num_queries, total)
    return [
        {
            "id": data.queries.ids[query],
            "query": data.queries.texts[query],
            "passages": [
                {
                    "text": data.corpus.texts[row][:TEXT_KEPT],
                    "score": round(float(evaluation.scores[query, rank]), 6),
                    "is_relevant": bool(evaluation.gains[query, rank] > 0),
                }
                for rank, row in enumerate(evaluation.indices[query, :depth])
                if row >= 0
            ],
        }
        for query in (i * total // num_queries for i in range(num_queries))
    ]


# ---- several processes


def _save_together(
    model: Any, folder: str, texts: Sequence[str], max_length: int | None, batch_size: int | None
) -> EmbeddingStore:
    """`EmbeddingModel.save_corpus` by all processes, each taking every so-manyeth of the missing shards."""
    from bge_accel.encoding.storing import encode_to_store

    rank, world = rank_and_world()
    alone = ExitStack()  # until the end no other run may write into the folder

    def begin() -> Any:
        wanted = model.describe_store(*digest_texts(texts), max_length=max_length, processes=world)
        alone.enter_context(locked(folder))
        return prepare_store(folder, wanted)

    with alone:
        manifest, missing = from_first(begin)
        encode_to_store(
            model,
            folder,
            manifest,
            missing[rank::world],
            lambda start, stop: texts[start:stop],
            max_texts=batch_size,
            counts=model.counts,
        )
        gather(None)
    return EmbeddingStore(folder)


def _recall_over_processes(
    index: Any, corpus_emb: Any, q_emb: np.ndarray, cutoffs: Sequence[int], first: int, *, max_queries: int = 1000
) -> dict[str, float]:
    """`index_recall` where every process holds a part of the corpus and an index of it."""
    chosen = q_emb[np.unique(np.linspace(0, len(q_emb) - 1, min(max_queries, len(q_emb))).astype(np.int64))]
    found = search_over_processes(index, chosen, max(cutoffs), first)[1]
    exact = search_over_processes(corpus_emb if len(corpus_emb) else None, chosen, max(cutoffs), first)[0]
    own = np.full(found.shape, -np.inf, dtype=np.float32)
    query, rank = np.nonzero((found >= first) & (found < first + len(corpus_emb)))
    rows = np.asarray(corpus_emb[found[query, rank] - first], dtype=np.float32)
    own[query, rank] = np.einsum("ij,ij->i", chosen[query], rows)
    true = np.max(gather(own), axis=0)
    recall = {}
    for cutoff in sorted({min(cutoff, exact.shape[1]) for cutoff in cutoffs}):
        last = exact[:, cutoff - 1 : cutoff]
        is_found = true[:, :cutoff] >= last - 1e-6 * np.maximum(1, np.abs(last))
        recall[f"recall@{cutoff}"] = float(is_found.sum() / (cutoff * len(chosen)))
    return recall | {"queries": len(chosen)}
