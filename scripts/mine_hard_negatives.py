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
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from bge_accel.config import (
    check_model_path,
    check_rules,
    learning_settings,
    option,
    options_from,
    parse_config,
    required,
    to_yaml,
    user_errors,
)
from bge_accel.data.rows import TrainingRows
from bge_accel.encoding.reranker import SHORTEST_PAIR
from bge_accel.encoding.store import MANIFEST
from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files
from bge_accel.files.lock import lock_output
from bge_accel.files.outputs import check_folder, check_output
from bge_accel.files.parts import open_work, part_name, read_part, what_is_kept, write_part
from bge_accel.mining.choice import Choice, QueryGroups, parse_range
from bge_accel.mining.output import WAY_OUT, NothingMinedError, OutputOptions, write_output
from bge_accel.mining.pool import TextPool, write_inputs
from bge_accel.mining.refused_flags import REFUSED
from bge_accel.models.pooling import POOLING
from bge_accel.processes.group import Processes, SharedCounters, leave_processes
from bge_accel.processes.progress import progress, say, warn
from bge_accel.processes.signals import interruptible

# Heavy packages are imported inside main(), after the arguments and the data have been checked.

ROWS_PER_CHUNK = 256  # mined together, and lost by a kill
MANY_WITHOUT = 0.3  # of the rows without a negative: the settings hardly suit the pool


@dataclass(kw_only=True)
class Config:
    """What to mine for, where, and what to take."""

    model_name_or_path: str = required(
        "folder or hub name of the embedding model", aliases=["embedder_name_or_path"], group="model"
    )
    input_file: list[str] = required(
        'files, globs or folders of rows {"query", "pos", "neg"}', group="data", affects_learning=False
    )
    output_file: str = required("where the mined rows are written, as JSON lines", affects_learning=False)
    candidate_pool: list[str] | None = option(
        None, 'files of passages {"text"}; default: all passages of the input', affects_learning=False
    )
    cache_path: str | None = option(
        None, "folder of checked rows; default: in ~/.cache/bge_accel", affects_learning=False
    )
    save_path: str | None = option(None, "store of the pool's embeddings, kept and used again", affects_learning=False)

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
        None, "how token states become one vector; default: what the model says of itself, else cls", choices=POOLING
    )
    normalize_embeddings: bool | None = option(
        None, "scale embeddings to length 1; default: what the model says of itself, else True"
    )
    use_fp16: bool | None = option(
        None, "float16 (CPU: bfloat16 where it is faster, else float32); False: float32; default: True", aliases=["fp16"],
    )  # fmt: skip
    use_bf16: bool = option(
        False, "bfloat16 instead of float16", aliases=["bf16"], excludes={"use_fp16": "give one of them"}
    )
    trust_remote_code: bool = option(False, "run code that comes with the model")
    cache_dir: str | None = option(None, "where models from the hub are kept", affects_learning=False)
    max_length: int = option(512, "tokens that a text is cut to, special tokens included", at_least=1)
    embedder_query_max_length: int | None = option(
        None, "the same for queries; default: --max_length", at_least=1, aliases=["query_max_length"]
    )
    embedder_passage_max_length: int | None = option(
        None, "the same for passages; default: --max_length", at_least=1, aliases=["passage_max_length"]
    )
    batch_size: int | None = option(None, "most texts in one forward pass; default: by tokens", at_least=1)

    range_for_sampling: str = option(
        "10-210", "A-B: the slice [A:B] of the ranking, 0 the best, after known positives are removed", group="choice"
    )
    negative_number: int = option(15, "negatives that are mined for a row", at_least=1)
    sampling: Literal["random", "top"] = option("random", "which candidates of the range are taken")
    seed: int = option(42, "of the random draw", at_least=0, at_most=2**32 - 1)
    max_score: float | None = option(None, "drop candidates that score over it", above=-math.inf)
    min_score: float | None = option(None, "drop candidates that score under it", above=-math.inf)
    absolute_margin: float | None = option(None, "drop candidates over the row's lowest positive less this", at_least=0)
    relative_margin: float | None = option(None, "the same as a share of the positive's score", at_least=0, at_most=1)
    max_positive_overlap: float = option(
        0.8, "drop candidates that share more of their word pairs with a positive; 1: none", above=0, at_most=1
    )
    existing_negatives: Literal["replace", "keep"] = option("replace", 'keep: mined ones come after "neg"')
    fill_random: bool = option(False, "fill a shortfall with random passages of the pool")
    drop_rows_without_negatives: bool = option(False, 'else they are written with "neg": []', affects_learning=False)

    search_batch_size: int = option(256, "queries that are searched for at a time", at_least=1, group="search")
    index_factory: str = option("Flat", "FAISS index string; Flat is exact")
    use_gpu_for_searching: bool = option(False, "search on the GPU; without one on the CPU")

    reranker: str | None = option(
        None, "cross-encoder whose scores replace the model's, for filters and --sampling top",
        aliases=["reranker_name_or_path"], group="reranker",
    )  # fmt: skip
    reranker_max_length: int = option(512, "tokens of a query and a passage together", at_least=SHORTEST_PAIR)
    reranker_query_max_length: int | None = option(None, "of the query; default: 3/4 of both together", at_least=1)
    reranker_batch_size: int | None = option(None, "most pairs in one forward pass; default: by tokens", at_least=1)
    reranker_normalize: bool = option(False, "the reranker's scores between 0 and 1")

    write_scores: bool = option(False, 'write "pos_scores" and "neg_scores"', group="output", affects_learning=False)
    plot: str | None = option(None, "PNG with the distribution of scores (needs matplotlib)", affects_learning=False)
    show: int = option(0, "print so many rows as they came out, like 20", at_least=0, affects_learning=False)


LENGTHS = ("max_length", "embedder_query_max_length", "embedder_passage_max_length")


def check(cfg: Config) -> Choice:
    """The choice that the settings ask for; raises ValueError for what cannot work, before anything is read."""
    check_rules(cfg)
    if cfg.min_score is not None and cfg.max_score is not None and cfg.min_score > cfg.max_score:
        raise ValueError(f"--min_score {cfg.min_score} is above --max_score {cfg.max_score}: nothing would be left")
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
        processes.on_first(lambda: write_inputs(cfg.input_file, cfg.candidate_pool, rows, work))
    pool = TextPool(os.path.join(work, "pool"))
    groups = QueryGroups(rows, np.load(os.path.join(work, "query_keys.npy"), mmap_mode="r"))
    processes.say(f"{len(rows):,} rows, {len(pool):,} different passages in the pool")

    from bge_accel.encoding.embedding_model import EmbeddingModel
    from bge_accel.encoding.storing import tokenizer_digest, weights_digest
    from bge_accel.evaluation.search import build_index, check_index_factory
    from bge_accel.mining.miner import Miner, MinerOptions, embed_pool
    from bge_accel.models.loading import check_prefix
    from bge_accel.models.precision import own_device, resolve_dtype
    from bge_accel.models.settings import instruction_prefix

    # ---- models
    try:
        with user_errors():
            if choice.start >= len(pool) and not choice.fill_random:
                raise ValueError(
                    f"--range_for_sampling {cfg.range_for_sampling} begins behind the {len(pool):,} passages of the pool: no row "
                    "would get a negative; begin lower, or give more passages by --candidate_pool"
                )
            device = own_device(processes.world)
            dtype, warning = resolve_dtype(cfg.use_fp16 is not False and not cfg.use_bf16, cfg.use_bf16, device)
            if warning and (cfg.use_fp16 or cfg.use_bf16) and processes.rank == 0:
                warn(warning)
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
                trust_remote_code=cfg.trust_remote_code,
                cache_dir=cfg.cache_dir,
            )
            check_index_factory(cfg.index_factory, model.dim)
            query_length = min(cfg.embedder_query_max_length or cfg.max_length, model.max_length)
            for prompt, row in rows.first_with_prompt().items():
                prefix = str(instruction_prefix(prompt, cfg.query_instruction_format_for_retrieval))
                flag = "--max_length" if cfg.embedder_query_max_length is None else "--embedder_query_max_length"
                check_prefix(model.tokenizer, prefix, query_length, flag, "query", rows.place(row))
            processes.say(f"computing in {str(dtype).removeprefix('torch.')} on {device.type}")
            reranker = load_reranker(cfg, device, dtype) if cfg.reranker is not None else None
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
        **learning_settings(cfg),
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

    # ---- mine, chunk by chunk
    miner = Miner(
        options_from(MinerOptions, cfg, query_length=query_length, passage_length=passage_length),
        choice,
        model,
        reranker,
        pool,
        pool_emb,
        index,
        shows_progress=processes.rank == 0,
    )
    starts = range(0, len(rows), ROWS_PER_CHUNK)
    parts = [part_name(work, number) for number in range(len(starts))]
    pending = [number for number, part in enumerate(parts) if read_part(part) is None]
    processes.wait()  # all have seen what is missing before one writes
    counters = SharedCounters("chunks", processes.world > 1)
    with user_errors(), progress(len(pending), "mining", "chunk", shown=processes.rank == 0) as bar:
        for number in counters.share(pending):
            start = starts[number]
            chunk = [rows[i] for i in range(start, min(start + ROWS_PER_CHUNK, len(rows)))]
            write_part(parts[number], miner.records(chunk, groups, start))
            bar.update(counters.add("mined", 1) - bar.n)
    processes.wait()
    with user_errors():
        processes.on_first(partial(finish, cfg, pool, len(rows), work, parts))


def load_reranker(cfg: Config, device: Any, dtype: Any) -> Any:
    assert cfg.reranker is not None
    from bge_accel.encoding.reranker import Reranker

    return Reranker(
        cfg.reranker,
        device=device,
        dtype=dtype,
        max_length=cfg.reranker_max_length,
        query_max_length=cfg.reranker_query_max_length,
        batch_size=cfg.reranker_batch_size,
        normalize=cfg.reranker_normalize,
        trust_remote_code=cfg.trust_remote_code,
        cache_dir=cfg.cache_dir,
    )


def finish(cfg: Config, pool: TextPool, num_rows: int, work: str, parts: Sequence[str]) -> None:
    """Writes the rows, and says what was done."""
    try:
        summary, num_without = write_output(options_from(OutputOptions, cfg), pool, num_rows, parts, to_yaml(cfg))
    except NothingMinedError:  # the same command would find the same
        shutil.rmtree(work)
        raise
    say(summary)
    if num_without >= MANY_WITHOUT * num_rows:
        warn(f"{num_without:,} of {num_rows:,} rows have no negatives; {WAY_OUT}")
    shutil.rmtree(work)


if __name__ == "__main__":
    cfg = parse_config(Config, description=__doc__.split("\n")[0], refused=REFUSED)
    with interruptible(
        lambda: what_is_kept(
            f"{cfg.output_file}.mining/fingerprint.json", *([f"{cfg.save_path}/manifest.json"] if cfg.save_path else [])
        )
    ):
        main(cfg)
    leave_processes()
