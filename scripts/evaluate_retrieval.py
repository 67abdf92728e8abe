"""Measure how well an embedding model retrieves: encode queries and corpus, search, MRR / nDCG / Recall / MAP / P.

Queries that list the texts of their positives, as FlagEmbedding has them:

    python scripts/evaluate_retrieval.py --encoder BAAI/bge-small-en-v1.5 --add_instruction --k 100 \\
        --corpus_data ./toy_corpus.json --query_data ./toy_query.json

A BEIR data set, judged by ids:

    python scripts/evaluate_retrieval.py --encoder BAAI/bge-small-en-v1.5 --add_instruction --fp16 \\
        --corpus_data scifact/corpus.jsonl --query_data scifact/queries.jsonl --qrels scifact/qrels/test.tsv \\
        --max_passage_length 512 --output_file results/scifact.json

--save_embedding keeps the corpus's embeddings in the folder --save_path, --load_embedding takes them from there (from
this script or scripts/encode_corpus.py), after a check that they are of this model, these texts and these settings.

Every flag may also stand in a YAML file: --config run.yaml (the command line wins).
"""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from bge_accel.config import check_model_path, option, parse_config, required, user_errors
from bge_accel.evaluation import (
    Evaluation,
    EvaluationData,
    choose_cutoffs,
    evaluate_retrieval,
    ranking_rows,
    read_evaluation_data,
)
from bge_accel.reading import shorten
from bge_accel.report import metrics_table
from bge_accel.store import read_manifest

# Heavy packages are imported inside main(), after the arguments and the data have been checked.

BGE_INSTRUCTION = "Represent this sentence for searching relevant passages: "
DEFAULT_SAVE_PATH = "embeddings"


@dataclass(kw_only=True)
class Config:
    """What to measure, and on what."""

    encoder: str = required("folder or hub name of the embedding model", group="model")
    corpus_data: list[str] = required(
        'files, globs or folders of passages {"content" or "text"}, optional "id", "title"', group="data"
    )
    query_data: list[str] = required(
        'files, globs or folders of queries {"query" or "text"} with "positive": [text, ...], or "id" and --qrels',
        group="data",
    )

    add_instruction: bool = option(
        False, f"put BGE's English instruction {BGE_INSTRUCTION!r} before each query", group="model"
    )
    query_instruction_for_retrieval: str | None = option(
        None, 'put before each query; "" for none; default: what the model says of itself', group="model"
    )
    passage_instruction_for_retrieval: str | None = option(
        None, 'put before each passage; "" for none; default: what the model says of itself', group="model"
    )
    pooling_method: Literal["cls", "mean", "last_token"] | None = option(
        None, "how token states become one vector; default: what the model says of itself, else cls", group="model"
    )
    normalize_embeddings: bool | None = option(
        None, "scale embeddings to length 1; default: what the model says of itself, else True", group="model"
    )
    trust_remote_code: bool = option(False, "run code that comes with the model", group="model")
    cache_dir: str | None = option(None, "where models from the hub are kept", group="model")

    qrels: str | None = option(
        None, "judgements: lines `query-id corpus-id score` (BEIR) or `query-id 0 corpus-id grade` (TREC)", group="data"
    )

    k: int = option(100, "passages retrieved for each query", group="search")
    cutoffs: list[int] | None = option(
        None, "ranks to measure at; default: 1 3 5 10 100 up to k, and k", group="search"
    )
    index_factory: str = option("Flat", "FAISS index string; Flat is exact", group="search")

    max_query_length: int = option(32, "tokens that a query is cut to, special tokens included", group="encoding")
    max_passage_length: int = option(128, "tokens that a passage is cut to, special tokens included", group="encoding")
    batch_size: int = option(256, "at most so many texts in one forward pass", group="encoding")
    fp16: bool = option(False, "float16 (GPU); without a GPU bfloat16, else float32", group="encoding")
    bf16: bool = option(False, "bfloat16; without hardware for it float32", group="encoding")

    save_embedding: bool = option(
        False, "keep the corpus's embeddings in --save_path; one begun there and stopped goes on", group="encoding"
    )
    load_embedding: bool = option(
        False, "take the corpus's embeddings from --save_path, if they are of this model and corpus", group="encoding"
    )
    save_path: str | None = option(
        None, f"folder of the embedding store; default: {DEFAULT_SAVE_PATH}", group="encoding"
    )

    output_file: str = option("metrics.json", "where metrics, counts and settings are written", group="output")
    save_ranking: str | None = option(None, "JSON lines: the top 10 of each query", group="output")
    show: int = option(0, "print the top 3 of so many queries", group="output")


def check(cfg: Config) -> None:
    """Raises ValueError for settings that cannot work, before anything is read."""
    for name in ("max_query_length", "max_passage_length", "batch_size"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name} is {getattr(cfg, name)}: it has to be at least 1")
    if cfg.show < 0:
        raise ValueError(f"--show is {cfg.show}: it has to be at least 0")
    choose_cutoffs(cfg.k, cfg.cutoffs)
    if cfg.add_instruction and cfg.query_instruction_for_retrieval is not None:
        raise ValueError("--add_instruction and --query_instruction_for_retrieval both say what to put before a query")
    if cfg.fp16 and cfg.bf16:
        raise ValueError("--fp16 and --bf16 exclude each other; give one of them")
    if cfg.save_path is not None and not (cfg.save_embedding or cfg.load_embedding):
        raise ValueError(f"--save_path {cfg.save_path} has no effect without --save_embedding or --load_embedding")
    if cfg.load_embedding:
        read_manifest(cfg.save_path or DEFAULT_SAVE_PATH)
    check_model_path("--encoder", cfg.encoder)
    inputs = [*cfg.corpus_data, *cfg.query_data, *([cfg.qrels] if cfg.qrels else [])]
    for name in ("output_file", "save_ranking"):
        path = getattr(cfg, name)
        if path is not None and (not path or os.path.isdir(path)):
            raise ValueError(f"--{name} {path!r} is not the name of a file")
        if path is not None:
            folder = os.path.dirname(os.path.abspath(path))
            while not os.path.exists(folder):
                folder = os.path.dirname(folder)
            if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
                raise ValueError(f"--{name} {path}: its folder cannot be made in {folder}, which is no writable folder")
        if path is not None and any(
            os.path.exists(path) and os.path.exists(p) and os.path.samefile(path, p) for p in inputs
        ):
            raise ValueError(f"--{name} {path} is an input; name another file")
    if cfg.save_ranking is not None and os.path.abspath(cfg.save_ranking) == os.path.abspath(cfg.output_file):
        raise ValueError(f"--save_ranking and --output_file are both {cfg.output_file}; name two files")


def main(cfg: Config) -> None:
    # ---- check and read everything before a model is loaded
    with user_errors():
        check(cfg)
        data = read_evaluation_data(cfg.corpus_data, cfg.query_data, cfg.qrels)
    for warning in data.warnings:
        warn(warning)
    counts = data.counts
    print(
        f"{counts['judged_queries']:,} judged queries of {counts['queries']:,}, {counts['corpus']:,} passages, "
        f"{counts['positives']:,} positives ({counts['missing_positives']:,} not in the corpus)",
        flush=True,
    )

    import torch

    from bge_accel.encoding import EmbeddingModel
    from bge_accel.precision import resolve_dtype

    # ---- model
    with user_errors():
        dtype, precision_warning = resolve_dtype(cfg.fp16, cfg.bf16)
        if precision_warning:
            warn(precision_warning)
        model = EmbeddingModel(
            cfg.encoder,
            dtype=dtype,
            pooling=cfg.pooling_method,
            normalize=cfg.normalize_embeddings,
            query_instruction=BGE_INSTRUCTION if cfg.add_instruction else cfg.query_instruction_for_retrieval,
            passage_instruction=cfg.passage_instruction_for_retrieval,
            trust_remote_code=cfg.trust_remote_code,
            cache_dir=cfg.cache_dir,
        )
    lengths = {name: min(getattr(cfg, name), model.max_length) for name in ("max_query_length", "max_passage_length")}
    for name, length in lengths.items():
        if length < getattr(cfg, name):
            warn(f"--{name} is {getattr(cfg, name)}, but the model takes {length} tokens: texts are cut there")

    # ---- encode, search, measure
    with user_errors():
        evaluation = evaluate_retrieval(
            model,
            data,
            k=cfg.k,
            cutoffs=cfg.cutoffs,
            index_factory=cfg.index_factory,
            batch_size=cfg.batch_size,
            save_path=(cfg.save_path or DEFAULT_SAVE_PATH) if cfg.save_embedding or cfg.load_embedding else None,
            load_embedding=cfg.load_embedding,
            show_progress=sys.stderr.isatty(),
            **lengths,
        )

    # ---- report
    settings, encoded = model.settings, model.counts
    if encoded.num_truncated:
        print(f"{encoded.num_truncated:,} of {encoded.num_texts:,} encoded texts were longer than allowed and were cut")
    result = {
        "metrics": evaluation.metrics,
        "counts": counts | {"encoded_texts": encoded.num_texts, "truncated_texts": encoded.num_truncated},
        "seconds": {name: round(seconds, 3) for name, seconds in evaluation.seconds.items()},
        "model": {
            "pooling": settings.pooling,
            "normalize": settings.normalize,
            "query_instruction": settings.query_prefix,
            "passage_instruction": settings.passage_prefix,
            "dtype": str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type,
        },
        "config": asdict(cfg),
        "versions": versions(),
    }
    if evaluation.index_recall is not None:
        result["index_recall"] = evaluation.index_recall
        found = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.index_recall.items() if "@" in name)
        print(f"{cfg.index_factory} against exact search: {found}")
    write_atomically(cfg.output_file, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if cfg.save_ranking is not None:
        rows = ranking_rows(data, evaluation)
        write_atomically(cfg.save_ranking, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if cfg.show:
        print(sample_rankings(data, evaluation, cfg.show))
    print(metrics_table(evaluation.metrics))
    seconds = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in evaluation.seconds.items())
    print(f"seconds: {seconds}\nwrote {cfg.output_file}{f' and {cfg.save_ranking}' if cfg.save_ranking else ''}")


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def sample_rankings(data: EvaluationData, evaluation: Evaluation, num_queries: int) -> str:
    """The first three passages of queries spread evenly over the data; a + marks the relevant ones."""
    total = len(data.queries.texts)
    lines = []
    for query in sorted({i * total // num_queries for i in range(num_queries)}):
        lines.append(f"query  {shorten(data.queries.texts[query], 110)}")
        for rank, row in enumerate(evaluation.indices[query, :3]):
            if row >= 0:
                mark = "+" if evaluation.gains[query, rank] > 0 else " "
                text = shorten(data.corpus.texts[row], 98)
                lines.append(f"  {mark} {rank + 1}  {evaluation.scores[query, rank]:.4f}  {text}")
        lines.append("")
    return "\n".join(lines)


def versions() -> dict[str, str | None]:
    """What the figures were made with; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("bge_accel", "torch", "transformers", "tokenizers", "numpy", "faiss-cpu", "faiss-gpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_atomically(path: str, text: str) -> None:
    """Writes a file that is complete or, after a crash, not there."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    aside = f"{path}.{os.getpid()}.incomplete"
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(aside, path)


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0]))
