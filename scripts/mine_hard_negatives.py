"""Mine hard negatives: rank a pool of passages for each training row's query, and choose "neg" from the ranking.

FlagEmbedding's documented line, with the entry point replaced:

    python scripts/mine_hard_negatives.py --model_name_or_path BAAI/bge-base-en-v1.5 \\
        --input_file toy_finetune_data.jsonl --output_file toy_finetune_data_minedHN.jsonl \\
        --range_for_sampling 2-200 --negative_number 15 --use_gpu_for_searching

From a corpus, without what scores over 95 % of the positive, with the scores written and twenty rows shown:

    python scripts/mine_hard_negatives.py --model_name_or_path BAAI/bge-base-en-v1.5 --input_file train.jsonl \\
        --output_file mined.jsonl --candidate_pool corpus.jsonl --range_for_sampling 0-100 --negative_number 7 \\
        --relative_margin 0.05 --write_scores --show 20

On several GPUs: torchrun --nproc_per_node 8 scripts/mine_hard_negatives.py ...

A run that was killed goes on with the same command: what it has done is kept in OUTPUT_FILE.mining until the end.
"""

import importlib.util
import json
import math
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass
from typing import Any, Literal

import numpy as np

from bge_accel.config import Refusal, check_model_path, option, parse_config, to_yaml, user_errors
from bge_accel.data.reading import check_json, read_rows, text_id
from bge_accel.data.rows import TrainingRows
from bge_accel.encoding.reranker import SHORTEST_PAIR
from bge_accel.encoding.store import MANIFEST, EmbeddingStore, missing_shards, prepare_store, read_manifest
from bge_accel.files.atomic import atomic_file
from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files
from bge_accel.files.lock import lock_output, locked
from bge_accel.files.outputs import check_folder, check_output
from bge_accel.files.parts import open_work, read_part, read_parts, what_is_kept, write_part
from bge_accel.files.text import shorten
from bge_accel.mining.choice import (
    DROPS,
    Choice,
    Mined,
    QueryGroups,
    Ranking,
    Target,
    choose_negatives,
    parse_range,
    rank_targets,
)
from bge_accel.mining.histogram import plot_histogram, text_histogram
from bge_accel.mining.pool import TextPool, read_pool_texts, text_key, write_pool
from bge_accel.mining.rows import new_row, rounded
from bge_accel.models.pooling import POOLING
from bge_accel.processes.group import Processes, SharedCounters, leave_processes
from bge_accel.processes.progress import progress, say, warn
from bge_accel.processes.signals import interruptible

# Heavy packages are imported inside main(), after the arguments and the data have been checked.

ROWS_PER_CHUNK = 256  # mined together, and lost by a kill
TEXTS_PER_SHARD = 4096  # of the pool, encoded together, and lost by a kill
ROWS_IN_HISTOGRAM = 200_000
MANY_WITHOUT = 0.3  # of the rows without a negative: the settings hardly suit the pool
_ICL = Refusal("in-context examples belong to decoders; only encoders are used here", ("{}{}", "None"))
REFUSED = {
    "devices": Refusal("choose by CUDA_VISIBLE_DEVICES; for several start with torchrun or `accelerate launch`", ("None",)),
    "embedder_model_class": Refusal(
        "only encoders are used here; of bge-m3 its dense vectors", ("encoder-only-base", "encoder-only-m3", "None")
    ),
    "examples_for_task": _ICL,
    "examples_instruction_format": _ICL,
}  # fmt: skip


@dataclass(kw_only=True)
class Config:
    """What to mine for, where, and what to take."""

    model_name_or_path: str = option(
        MISSING, "folder or hub name of the embedding model", aliases=["embedder_name_or_path"], group="model"
    )
    input_file: list[str] = option(MISSING, 'files, globs or folders of rows {"query", "pos", "neg"}', group="data")
    output_file: str = option(MISSING, "where the rows with mined negatives are written, as JSON lines")
    candidate_pool: list[str] | None = option(
        None, 'files, globs or folders of passages {"text"}; default: every "pos" and "neg" of the input'
    )
    cache_path: str | None = option(None, "where checked rows are kept; default: ~/.cache/bge_accel/rows")
    save_path: str | None = option(
        None, "keep the pool's embeddings in this store, or take them from it where they are the same"
    )

    query_instruction_for_retrieval: str | None = option(
        None, 'put before each query; "" for none; default: what the model says of itself', group="model"
    )
    query_instruction_format_for_retrieval: str = option(
        "{}{}", "how instruction and query are put together", aliases=["query_instruction_format"]
    )
    passage_instruction_for_retrieval: str | None = option(
        None, 'put before each passage; "" for none; default: what the model says of itself'
    )
    pooling_method: str | None = option(
        None,
        "how token states become one vector; default: what the model says of itself, else cls",
        choices=POOLING,
    )
    normalize_embeddings: bool | None = option(
        None, "scale embeddings to length 1; default: what the model says of itself, else True"
    )
    use_fp16: bool | None = option(
        None, "float16 (CPU: bfloat16 where it is faster, else float32); False: float32; default: True", aliases=["fp16"],
    )  # fmt: skip
    use_bf16: bool = option(False, "bfloat16 instead of float16", aliases=["bf16"])
    trust_remote_code: bool = option(False, "run code that comes with the model")
    cache_dir: str | None = option(None, "where models from the hub are kept")
    max_length: int = option(512, "tokens that a text is cut to, special tokens included", at_least=1)
    embedder_query_max_length: int | None = option(
        None, "the same for queries; default: --max_length", at_least=1, aliases=["query_max_length"]
    )
    embedder_passage_max_length: int | None = option(
        None, "the same for passages; default: --max_length", at_least=1, aliases=["passage_max_length"]
    )
    batch_size: int | None = option(
        None,
        "at most so many texts in one forward pass; default: a token budget alone decides",
        at_least=1,
    )

    range_for_sampling: str = option(
        "10-210", "A-B: the slice [A:B] of the ranking, 0 the best, after known positives are removed", group="choice"
    )
    negative_number: int = option(15, "negatives that are mined for a row", at_least=1)
    sampling: Literal["random", "top"] = option("random", "which candidates of the range are taken")
    seed: int = option(42, "of the random draw", at_least=0, at_most=2**32 - 1)
    max_score: float | None = option(None, "drop candidates that score over it", above=-math.inf)
    min_score: float | None = option(None, "drop candidates that score under it", above=-math.inf)
    absolute_margin: float | None = option(
        None, "drop candidates that score over the row's lowest positive less this", at_least=0
    )
    relative_margin: float | None = option(
        None,
        "the same, less this share of the positive's score: 0.05 drops what is over 95 % of it",
        at_least=0,
        at_most=1,
    )
    max_positive_overlap: float = option(
        0.8,
        "drop candidates that share more than this part of their word pairs with a positive; 1: none",
        above=0,
        at_most=1,
    )
    existing_negatives: Literal["replace", "keep"] = option(
        "replace", 'what becomes of "neg" in the input: keep puts the mined ones behind'
    )
    fill_random: bool = option(False, "fill a shortfall with random passages of the pool")
    drop_rows_without_negatives: bool = option(False, 'else they are written with "neg": []')

    search_batch_size: int = option(256, "queries that are searched for at a time", at_least=1, group="search")
    index_factory: str = option("Flat", "FAISS index string; Flat is exact")
    use_gpu_for_searching: bool = option(False, "search on the GPU; without one on the CPU")

    reranker: str | None = option(
        None, "cross-encoder whose scores replace the model's, for filters and --sampling top",
        aliases=["reranker_name_or_path"], group="reranker",
    )  # fmt: skip
    reranker_max_length: int = option(512, "tokens of a query and a passage together", at_least=SHORTEST_PAIR)
    reranker_query_max_length: int | None = option(
        None, "tokens that a query is cut to; default: 3/4 of --reranker_max_length", at_least=1
    )
    reranker_batch_size: int | None = option(
        None,
        "at most so many pairs in one forward pass; default: a token budget alone decides",
        at_least=1,
    )
    reranker_normalize: bool = option(False, "the reranker's scores between 0 and 1")

    write_scores: bool = option(False, 'write "pos_scores" and "neg_scores"', group="output")
    plot: str | None = option(None, "PNG with the distribution of scores (needs matplotlib)")
    show: int = option(0, "print so many rows as they came out, like 20", at_least=0)


WAY_OUT = (
    "begin --range_for_sampling lower, loosen the limits of scores and --max_positive_overlap, give more passages by "
    "--candidate_pool, or add --fill_random"
)
LENGTHS = ("max_length", "embedder_query_max_length", "embedder_passage_max_length")
SAMPLE_LENGTH = 400  # characters of a text that --show prints
NOT_IN_FINGERPRINT = ("output_file", "cache_path", "cache_dir", "plot", "show", "drop_rows_without_negatives",
                      "write_scores", "input_file", "candidate_pool", "save_path")  # fmt: skip


def check(cfg: Config) -> Choice:
    """The choice that the settings ask for; raises ValueError for what cannot work, before anything is read."""
    if cfg.min_score is not None and cfg.max_score is not None and cfg.min_score > cfg.max_score:
        raise ValueError(f"--min_score {cfg.min_score} is above --max_score {cfg.max_score}: nothing would be left")
    if cfg.use_fp16 and cfg.use_bf16:
        raise ValueError("--use_fp16 and --use_bf16 exclude each other; give one of them")
    try:
        start, end = parse_range(cfg.range_for_sampling)
    except ValueError as error:
        raise ValueError(f"--range_for_sampling: {error}") from None
    if end - start < cfg.negative_number and not cfg.fill_random:
        warn(f"--range_for_sampling {cfg.range_for_sampling} holds fewer than --negative_number {cfg.negative_number}")
    check_model_path("--model_name_or_path", cfg.model_name_or_path)
    if cfg.reranker is not None:
        check_model_path("--reranker", cfg.reranker)
    elif cfg.reranker_normalize:
        warn("--reranker_normalize has no effect without --reranker")
    faults = Faults()
    inputs = [*cfg.input_file, *(cfg.candidate_pool or [])]
    find_files(inputs, faults)
    faults.raise_if_any()
    for name in ("output_file", "plot"):
        if getattr(cfg, name) is not None:
            check_output(f"--{name}", getattr(cfg, name), inputs)
    if cfg.save_path is not None:
        check_folder("--save_path", cfg.save_path)
        check_output("--save_path", os.path.join(cfg.save_path, MANIFEST), inputs)
    if cfg.output_file.endswith((".gz", ".zst", ".parquet")):
        raise ValueError(f"--output_file {cfg.output_file}: it is written as plain JSON lines; name it .jsonl")
    if cfg.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib, or drop the flag")
    return Choice(
        start=start,
        end=end,
        number=cfg.negative_number,
        **{name: getattr(cfg, name) for name in Choice._fields if name not in ("start", "end", "number")},
    )


def main(cfg: Config) -> None:
    # ---- check and read everything before a model is loaded
    processes = Processes()
    work = f"{cfg.output_file}.mining"
    with user_errors():
        choice = check(cfg)
        processes.on_first(lambda: lock_output(cfg.output_file, is_folder=False))
        rows = TrainingRows(cfg.input_file, cache_folder=cfg.cache_path)
        processes.on_first(lambda: write_inputs(cfg, rows, work))
    pool = TextPool(os.path.join(work, "pool"))
    groups = QueryGroups(rows, np.load(os.path.join(work, "query_keys.npy"), mmap_mode="r"))
    processes.say(f"{len(rows):,} rows, {len(pool):,} different passages in the pool")

    import torch

    from bge_accel.encoding.embedding_model import EmbeddingModel
    from bge_accel.encoding.reranker import Reranker
    from bge_accel.encoding.storing import tokenizer_digest, weights_digest
    from bge_accel.evaluation.search import build_index, check_index_factory, search
    from bge_accel.models.loading import check_prefix
    from bge_accel.models.precision import default_device, resolve_dtype
    from bge_accel.models.settings import instruction_prefix

    # ---- models
    try:
        with user_errors():
            if choice.start >= len(pool) and not choice.fill_random:
                raise ValueError(
                    f"--range_for_sampling {cfg.range_for_sampling} begins behind the {len(pool):,} passages of the pool: no row "
                    "would get a negative; begin lower, or give more passages by --candidate_pool"
                )
            device = default_device()
            if device.type == "cuda" and processes.world > 1:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
                torch.cuda.set_device(device)
            dtype, warning = resolve_dtype(cfg.use_fp16 is not False and not cfg.use_bf16, cfg.use_bf16, device)
            if warning and (cfg.use_fp16 or cfg.use_bf16) and processes.rank == 0:
                warn(warning)
            hub: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code, "cache_dir": cfg.cache_dir}
            model = EmbeddingModel(
                cfg.model_name_or_path,
                device=device,
                dtype=dtype,
                pooling=cfg.pooling_method,
                normalize=cfg.normalize_embeddings,
                query_instruction=cfg.query_instruction_for_retrieval,
                query_instruction_format=cfg.query_instruction_format_for_retrieval,
                passage_instruction=cfg.passage_instruction_for_retrieval,
                lengths={f"--{name}": getattr(cfg, name) for name in LENGTHS},
                cut_by={
                    kind: "--max_length" if getattr(cfg, name) is None else f"--{name}"
                    for kind, name in zip(("query", "passage"), LENGTHS[1:], strict=True)
                },
                **hub,
            )
            check_index_factory(cfg.index_factory, model.dim)
            query_length = min(cfg.embedder_query_max_length or cfg.max_length, model.max_length)
            for prompt, row in rows.first_with_prompt().items():
                prefix = str(instruction_prefix(prompt, cfg.query_instruction_format_for_retrieval))
                flag = "--max_length" if cfg.embedder_query_max_length is None else "--embedder_query_max_length"
                check_prefix(model.tokenizer, prefix, query_length, flag, "query", rows.place(row))
            processes.say(f"computing in {str(dtype).removeprefix('torch.')} on {device.type}")
            reranker = None
            if cfg.reranker is not None:
                reranker = Reranker(
                    cfg.reranker,
                    device=device,
                    dtype=dtype,
                    max_length=cfg.reranker_max_length,
                    query_max_length=cfg.reranker_query_max_length,
                    batch_size=cfg.reranker_batch_size,
                    normalize=cfg.reranker_normalize,
                    **hub,
                )
    except SystemExit:
        if processes.rank == 0 and not os.path.exists(os.path.join(work, "fingerprint.json")):
            shutil.rmtree(work)
        raise
    passage_length = min(cfg.embedder_passage_max_length or cfg.max_length, model.max_length)

    # ---- go on from what a killed run has left, if it was the same
    fingerprint = {
        "rows": rows.digest(),
        "pool": pool.digest(),
        "model": weights_digest(model.encoder),
        "tokenizer": tokenizer_digest(model.tokenizer),
        "encoding": asdict(model.settings),
        "reranker": weights_digest(reranker.model) if reranker else None,
        "dtype": str(dtype),
        "device": device.type,
        **{name: value for name, value in asdict(cfg).items() if name not in NOT_IN_FINGERPRINT},
    }
    processes.on_first(lambda: open_work(work, fingerprint, processes.say, removes=("part-", "embeddings")))

    # ---- encode the pool
    with user_errors():
        folder = cfg.save_path or os.path.join(work, "embeddings")
        pool_emb = embed_pool(model, pool, folder, processes, passage_length, cfg.batch_size)
        on_gpu = cfg.use_gpu_for_searching and device.type == "cuda"
        if cfg.use_gpu_for_searching and not on_gpu:
            processes.say("no GPU: searching on the CPU")
        index = build_index(pool_emb, cfg.index_factory, use_gpu=on_gpu)

    def encode_queries(chunk: Sequence[dict[str, Any]]) -> np.ndarray:
        """(rows, dim); a row's own "prompt" takes the place of the instruction."""
        texts = []
        for row in chunk:
            prefix = instruction_prefix(row.get("prompt"), cfg.query_instruction_format_for_retrieval)
            texts.append((model.settings.query_prefix if prefix is None else prefix) + row["query"])
        return np.asarray(model.encode(texts, batch_size=cfg.batch_size, max_length=query_length))

    def mine(chunk: Sequence[dict[str, Any]], targets: Sequence[Target]) -> tuple[list[Mined], Counter[str]]:
        q_emb = encode_queries(chunk)

        def score(pairs: Sequence[tuple[int, str]]) -> np.ndarray:
            """Scores (pairs,) of (row number, text) pairs by the reranker, else by the embeddings."""
            if reranker is not None:
                return reranker.score((targets[row].query, text) for row, text in pairs)
            places: dict[str, int] = {}
            emb = np.empty((len({text for _, text in pairs}), model.dim), dtype=np.float32)
            new = []
            for _, text in pairs:
                if text not in places:
                    places[text] = len(places)
                    found = pool.find(text)
                    if found is None:
                        new.append(text)
                    else:
                        emb[places[text]] = pool_emb[found]
            if new:
                encoded = model.encode_corpus(new, batch_size=cfg.batch_size, max_length=passage_length)
                emb[[places[text] for text in new]] = np.asarray(encoded)
            return np.array([q_emb[row] @ emb[places[text]] for row, text in pairs], dtype=np.float32)

        rankings, dropped = rank_targets(
            targets, pool, choice, lambda which, k: search(index, q_emb[which], k), cfg.search_batch_size
        )
        if reranker is not None:
            rankings = rerank(reranker, targets, rankings, pool, show_progress=processes.rank == 0)
        own = score([(row, text) for row, target in enumerate(targets) for text in (*target.positives, *target.kept)])
        parts = np.split(own, np.cumsum([len(target.positives) + len(target.kept) for target in targets])[:-1])
        pos_scores = [part[: len(target.positives)].tolist() for part, target in zip(parts, targets, strict=True)]
        kept_scores = [part[len(target.positives) :].tolist() for part, target in zip(parts, targets, strict=True)]
        mined, more = choose_negatives(
            targets, rankings, pos_scores, kept_scores, pool, choice,
            lambda offers: score([(row, pool[index]) for row, index in offers]),
        )  # fmt: skip
        return mined, dropped + more

    # ---- mine, chunk by chunk
    starts = range(0, len(rows), ROWS_PER_CHUNK)
    pending = [number for number in range(len(starts)) if read_part(part_name(work, number)) is None]
    processes.wait()  # all have seen what is missing before one writes
    counters = SharedCounters("chunks", processes.world > 1)
    with user_errors(), progress(len(pending), "mining", "chunk", shown=processes.rank == 0) as bar:
        for number in counters.share(pending):
            start = starts[number]
            chunk = [rows[i] for i in range(start, min(start + ROWS_PER_CHUNK, len(rows)))]
            kept = [kept_negatives(cfg, row, groups.known_positives(start + i).keys) for i, row in enumerate(chunk)]
            targets = [
                Target(row["query"], row["pos"], groups.known_positives(start + i), [row["neg"][n] for n in kept[i]])
                for i, row in enumerate(chunk)
            ]
            mined, dropped = mine(chunk, targets)
            write_part(part_name(work, number), records_of(chunk, kept, mined, dropped))
            bar.update(counters.add("mined", 1) - bar.n)
    processes.wait()

    # ---- write the rows and say what was done
    def finish() -> None:
        try:
            summary, num_without = write_output(
                cfg, pool, work, [part_name(work, number) for number in range(len(starts))]
            )
        except NothingMinedError:  # the same command would find the same
            shutil.rmtree(work)
            raise
        say(summary)
        if num_without >= MANY_WITHOUT * len(rows):
            warn(f"{num_without:,} of {len(rows):,} rows have no negatives; {WAY_OUT}")
        shutil.rmtree(work)

    with user_errors():
        processes.on_first(finish)


# ---- what is kept until the end


def write_inputs(cfg: Config, rows: TrainingRows, work: str) -> None:
    """The pool and the key of each row's query, mapped into memory by every process."""
    pool_paths, faults = cfg.candidate_pool, Faults()
    check_json(cfg.input_file, faults)
    for _ in read_pool_texts(pool_paths or [], faults):  # to see that all is well
        pass
    faults.raise_if_any()

    def texts() -> Iterator[str]:
        if pool_paths is not None:
            yield from read_pool_texts(pool_paths, Faults())
        else:
            for i in range(len(rows)):
                yield from rows.passages(i)

    write_pool(os.path.join(work, "pool"), texts)
    keys = array("q", (text_key(rows[i]["query"]) for i in range(len(rows))))
    np.save(os.path.join(work, "query_keys.npy"), np.frombuffer(keys, dtype=np.int64))


def embed_pool(
    model: Any, pool: TextPool, folder: str, processes: Processes, max_length: int, batch_size: int | None
) -> EmbeddingStore:
    """The store of the pool's embeddings, in which what is missing is encoded; the processes share its shards.

    A shard is encoded alike by any process, so the embeddings do not depend on how many there are.
    """
    from bge_accel.encoding.storing import encode_to_store

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


def kept_negatives(cfg: Config, row: dict[str, Any], known_keys: np.ndarray) -> list[int]:
    """Places in "neg" of the existing negatives that stay: no known positive, not the query, none twice."""
    if cfg.existing_negatives == "replace":
        return []
    seen, kept = {text_key(row["query"]), *known_keys.tolist()}, []
    for place, text in enumerate(row.get("neg") or []):
        if (key := text_key(text)) not in seen:
            seen.add(key)
            kept.append(place)
    return kept


def part_name(work: str, number: int) -> str:
    """Where the negatives of one chunk of rows are kept."""
    return os.path.join(work, f"part-{number:07d}")


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


# ---- the output


class NothingMinedError(ValueError):
    """No row got a negative."""


def write_output(cfg: Config, pool: TextPool, work: str, parts: Sequence[str]) -> tuple[str, int]:
    """Reads the input again, line by line, and puts the negatives in.

    Returns:
        The summary, and how many rows have no negatives.

    Raises:
        NothingMinedError: no row got a negative; nothing is written.
        ValueError: the input has changed, or a part is damaged; nothing is written.
    """
    num_rows = len(np.load(os.path.join(work, "query_keys.npy"), mmap_mode="r"))
    num_shown = min(cfg.show, num_rows)
    shown = {i * num_rows // num_shown for i in range(num_shown)}
    stride = -(-num_rows // ROWS_IN_HISTOGRAM)
    counts, dropped = Counter[str](), Counter[str]()
    pos_scores, neg_scores = array("f"), array("f")
    without, samples = [], []

    def records() -> Iterator[dict[str, Any]]:
        for record in read_parts(parts):
            if "dropped" in record:
                dropped.update(record["dropped"])
            else:
                yield record

    faults = Faults()
    items = (item for path in find_files(cfg.input_file, faults) for item in read_rows(path, faults))
    with atomic_file(cfg.output_file) as file:
        for number, record in enumerate(records()):
            where, _, row = next(items, ("", 0, {}))
            if not row or text_id(row["query"]) != record["query_id"]:
                raise ValueError(
                    f"{where or cfg.input_file[-1]}: the input has changed since it was checked; run again"
                )
            negatives = [row["neg"][place] for place in record["kept"]] + [pool[index] for index in record["mined"]]
            scores = record["kept_scores"] + record["scores"]
            counts["mined"] += len(record["mined"]) - record["filled"]
            counts["filled"] += record["filled"]
            counts["kept"] += len(record["kept"])
            counts["removed"] += record["removed"]
            counts["short"] += len(record["mined"]) < cfg.negative_number
            if number % stride == 0:
                pos_scores.extend(record["pos_scores"])
                neg_scores.extend(scores)
            if number in shown:
                samples.append(sample(row["query"], list(zip(row["pos"], record["pos_scores"], strict=True)),
                                      list(zip(negatives, scores, strict=True))))  # fmt: skip
            if not negatives:
                without.append(where)
                if cfg.drop_rows_without_negatives:
                    continue
            new = new_row(row, negatives, (record["pos_scores"], scores) if cfg.write_scores else None)
            file.write(json.dumps(new, ensure_ascii=False) + "\n")
        if not counts["mined"] + counts["filled"]:
            why = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in dropped.most_common(3))
            raise NothingMinedError(
                f"no row got a negative (candidates dropped: {why or 'none'}), nothing is written; {WAY_OUT}"
            )
    with atomic_file(f"{cfg.output_file}.config.yaml") as file:
        file.write(to_yaml(cfg))
    scores_found = np.array(pos_scores), np.array(neg_scores)
    text = summarize(cfg, num_rows, len(pool), counts, dropped, without)
    text += "\n\n" + text_histogram(*scores_found)
    if stride > 1:
        text += f"\n(scores of every {stride}th row)"
    if cfg.plot is not None:
        os.makedirs(os.path.dirname(os.path.abspath(cfg.plot)), exist_ok=True)
        plot_histogram(f"{cfg.plot}.incomplete", *scores_found)
        os.replace(f"{cfg.plot}.incomplete", cfg.plot)
    outputs = [cfg.output_file, f"{cfg.output_file}.config.yaml", *([cfg.plot] if cfg.plot else [])]
    return "\n\n".join([*samples, text, f"wrote {', '.join(outputs)}"]), len(without)


def summarize(
    cfg: Config, num_rows: int, num_texts: int, counts: Counter[str], dropped: Counter[str], without: Sequence[str]
) -> str:
    """What was mined, and what was dropped and why."""
    written = num_rows - (len(without) if cfg.drop_rows_without_negatives else 0)
    lines = [
        f"{num_rows:,} rows, {written:,} written; {num_texts:,} passages in the pool",
        f"{counts['mined']:,} negatives mined ({counts['mined'] / num_rows:.1f} a row), "
        f"{counts['filled']:,} filled in at random, {counts['kept']:,} kept, {counts['removed']:,} existing removed",
        f"{counts['short']:,} rows got fewer than {cfg.negative_number}",
    ]
    if without:
        what = "left out" if cfg.drop_rows_without_negatives else 'written with "neg": []'
        more = ", ..." if len(without) > 10 else ""
        lines.append(f"{len(without):,} rows have no negatives and are {what}: {', '.join(without[:10])}{more}")
    names = {name: name.replace("_", " ") for name in DROPS}
    width = max(map(len, names.values()))
    lines += ["", "candidates dropped"]
    lines += [f"  {names[name]:<{width}}  {dropped[name]:>12,}" for name in DROPS]
    return "\n".join(lines)


def sample(query: str, positives: list[tuple[str, float]], negatives: list[tuple[str, float]]) -> str:
    """One row as people read it: the first three positives and negatives with their scores, long enough to judge."""
    lines = [f"query          {shorten(' '.join(query.split()), SAMPLE_LENGTH)}"]
    for mark, texts in (("+", positives), ("-", negatives)):
        lines += [
            f"  {mark} {score:>9.4f}  {shorten(' '.join(text.split()), SAMPLE_LENGTH)}" for text, score in texts[:3]
        ]
        if len(texts) > 3:
            lines.append(f"  {mark}            ... and {len(texts) - 3} more")
    return "\n".join(lines)


if __name__ == "__main__":
    cfg = parse_config(Config, description=__doc__.split("\n")[0], refused=REFUSED)
    with interruptible(
        lambda: what_is_kept(
            f"{cfg.output_file}.mining/fingerprint.json", *([f"{cfg.save_path}/manifest.json"] if cfg.save_path else [])
        )
    ):
        main(cfg)
    leave_processes()
