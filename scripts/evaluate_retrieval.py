"""Measure how well embedding models retrieve, and whether two differ: MRR / nDCG / Recall / MAP / P with intervals.

Queries that list the texts of their positives, as FlagEmbedding has them (without data: MS MARCO, from the hub):

    python scripts/evaluate_retrieval.py --encoder BAAI/bge-small-en-v1.5 --fp16 --add_instruction --k 100 \\
        --corpus_data ./toy_corpus.json --query_data ./toy_query.json

A BEIR data set, judged by ids:

    python scripts/evaluate_retrieval.py --encoder BAAI/bge-small-en-v1.5 --add_instruction --fp16 \\
        --corpus_data scifact/ --max_passage_length 512 --output_file results/scifact.json --save_run results/small.run

Two models, with intervals, the queries that gained and lost most, and a page to look at; or two runs in TREC's form:

    python scripts/evaluate_retrieval.py --encoder BAAI/bge-small-en-v1.5 tuned --corpus_data scifact/ --report page.html
    python scripts/evaluate_retrieval.py --compare small.run tuned.run --qrels scifact/qrels/test.tsv

--save_embedding keeps the corpus's embeddings in the folder --save_path, --load_embedding takes them from there (from
this script or scripts/encode_corpus.py), after a check that they are of this model, these texts and these settings.

On several GPUs it starts a process for each, which encodes and searches its share; on several machines, or CPUs:
torchrun --nproc_per_node 2 scripts/evaluate_retrieval.py ...

Every flag may also stand in a YAML file: --config run.yaml (the command line wins).
"""

import importlib.util
import json
import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from bge_accel.config import check_model_path, check_rules, option, parse_config, user_errors
from bge_accel.encoding.store import MANIFEST, read_manifest
from bge_accel.evaluation.comparison import choose_metric, compare
from bge_accel.evaluation.retrieval import Evaluation, choose_cutoffs, evaluate_retrieval, evaluate_run, ranking_rows
from bge_accel.evaluation.search import can_search_on_gpu
from bge_accel.evaluation.set_files import files_of_beir
from bge_accel.evaluation.sets import EvaluationData, in_words, read_evaluation_data
from bge_accel.evaluation.systems import System, about_model, result_of, show_comparison, show_system, system_names
from bge_accel.evaluation.trec import Rankings, judged_ids, read_run, run_lines
from bge_accel.files.atomic import atomic_file
from bge_accel.files.faults import Faults
from bge_accel.files.lock import lock_output
from bge_accel.files.outputs import check_folder, check_output
from bge_accel.files.parts import what_is_kept
from bge_accel.files.text import installed_versions
from bge_accel.models.pooling import POOLING
from bge_accel.processes.group import Processes, leave_processes
from bge_accel.processes.launch import errors_of_any, keep_own_gpu, start_processes
from bge_accel.processes.progress import say, warn
from bge_accel.processes.signals import interruptible

# Heavy packages are imported inside main(), after the arguments and the data have been checked.

BGE_INSTRUCTION = "Represent this sentence for searching relevant passages: "
DEFAULT_SAVE_PATH = "embeddings"


@dataclass(kw_only=True)
class Config:
    """What to measure, and on what."""

    encoder: list[str] | None = option(
        None, "folders or hub names of embedding models; several are compared with the first", group="model"
    )
    compare: list[str] | None = option(
        None, "runs in TREC's form: one is measured, several are compared with the first; encoders join them",
        group="data",
    )  # fmt: skip
    corpus_data: list[str] | None = option(
        None, "passages: files, folders or hub names; a folder in BEIR's layout has all three; default: MS MARCO's"
    )
    query_data: list[str] | None = option(
        None, 'queries: with "positive": [text, ...], or "id" and --qrels; default: MS MARCO\'s'
    )

    add_instruction: bool = option(
        False, f"put BGE's English instruction {BGE_INSTRUCTION!r} before each query", group="model",
        excludes={"query_instruction_for_retrieval": "both say what stands before a query"},
    )  # fmt: skip
    query_instruction_for_retrieval: str | None = option(
        None, 'put before each query; "" for none; default: what the model says of itself'
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
    trust_remote_code: bool = option(False, "run code that comes with the model")
    cache_dir: str | None = option(None, "where models from the hub are kept")
    qrels: str | None = option(
        None, "judgements: lines `query-id corpus-id score` (BEIR) or `query-id 0 corpus-id grade` (TREC)", group="data"
    )
    split: str | None = option(
        None, "of judgements in BEIR's layout (default: test), or of queries on the hub (default: dev)"
    )

    k: int = option(100, "passages retrieved for each query", at_least=1, group="search")
    cutoffs: list[int] | None = option(None, "ranks to measure at; default: 1 3 5 10 100 up to k, and k", at_least=1)
    index_factory: str = option("Flat", "FAISS index string; Flat is exact")
    num_processes: int | None = option(
        None, "that share the work on this machine; default: one a GPU", at_least=1, at_most=1024
    )
    max_query_length: int = option(
        32, "tokens that a query is cut to, special tokens included", at_least=1, group="encoding"
    )
    max_passage_length: int = option(128, "tokens that a passage is cut to, special tokens included", at_least=1)
    batch_size: int = option(256, "at most so many texts in one forward pass", at_least=1)
    fp16: bool = option(False, "float16 (GPU); without a GPU bfloat16, else float32")
    bf16: bool = option(False, "bfloat16; else float32", excludes={"fp16": "give one of them"})
    save_embedding: bool = option(False, "keep the corpus's embeddings in --save_path")
    load_embedding: bool = option(False, "take the corpus's embeddings from --save_path")
    save_path: list[str] | None = option(None, f"stores, one for each encoder; default: {DEFAULT_SAVE_PATH}")

    compare_metric: str | None = option(
        None, "by which queries gain and lose in a comparison; default: nDCG@10, or at the largest cut-off below",
        group="output",
    )  # fmt: skip
    output_file: str = option("metrics.json", "where metrics, counts and settings are written")
    save_run: list[str] | None = option(None, "rankings in TREC's form, a file for each encoder")
    save_ranking: str | None = option(None, "JSON lines: the top 10 of each query (one encoder)")
    report: str | None = option(None, "an HTML page with tables, figures and samples")
    figures_dir: str | None = option(None, "PNG of each of its figures (needs matplotlib)")
    show: int = option(0, "print the top 3 of so many queries", at_least=0)


def check(cfg: Config) -> None:
    """Raises ValueError for settings that cannot work, before anything is read."""
    check_rules(cfg)
    encoders, runs = cfg.encoder or [], cfg.compare or []
    if not encoders and not runs:
        raise ValueError("there is nothing to measure: name models with --encoder, or runs with --compare")
    choose_metric(cfg.compare_metric, choose_cutoffs(cfg.k, cfg.cutoffs))
    if cfg.compare_metric is not None and len(encoders) + len(runs) < 2:
        raise ValueError(f"--compare_metric {cfg.compare_metric} has no effect on one system alone; drop it")
    if not encoders and cfg.corpus_data is None and cfg.query_data is None and cfg.qrels is None:
        raise ValueError("runs are measured against judgements: give --qrels, or --corpus_data and --query_data")
    stores = save_paths(cfg)
    if cfg.save_path is not None and not stores:
        raise ValueError(f"--save_path {cfg.save_path[0]} has no effect without --save_embedding or --load_embedding")
    for name, given in (("save_path", stores), ("save_run", cfg.save_run)):
        if given and (len(given) != len(encoders) or len(set(given)) != len(given)):
            raise ValueError(f"--{name} is {' '.join(given)}: name one for each of {len(encoders)} encoders")
    for path in stores if cfg.load_embedding else ():
        read_manifest(path)
    for encoder in encoders:
        check_model_path("--encoder", encoder)
    if cfg.figures_dir is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--figures_dir needs matplotlib: pip install matplotlib, or drop the flag")
    if cfg.save_ranking is not None and len(encoders) + len(runs) > 1:
        raise ValueError("--save_ranking is of one system; of several, --save_run keeps the rankings")
    inputs = files_of_beir([*(cfg.corpus_data or []), *(cfg.query_data or [])])
    inputs = [*inputs, *([cfg.qrels] if cfg.qrels else []), *runs]
    for folder in stores:
        check_folder("--save_path", folder)
        check_output("--save_path", os.path.join(folder, MANIFEST), inputs)
    if cfg.figures_dir is not None:
        check_folder("--figures_dir", cfg.figures_dir)
    outputs: dict[str, str] = {}
    for name, path in output_files(cfg):
        check_output(f"--{name}", path, inputs)
        if (other := outputs.setdefault(os.path.abspath(path), name)) != name:
            raise ValueError(f"--{name} and --{other} are both {path}; name two files")


def output_files(cfg: Config) -> list[tuple[str, str]]:
    """Flag and path of each file that is written."""
    given = {name: getattr(cfg, name) for name in ("output_file", "save_ranking", "report", "save_run")}
    return [
        (name, path) for name, value in given.items() for path in ([value] if isinstance(value, str) else value or [])
    ]


def lock_outputs(cfg: Config) -> None:
    """Keeps other runs from all files that are written."""
    for _, path in output_files(cfg):
        lock_output(path, is_folder=False)


def save_paths(cfg: Config) -> list[str]:
    """Folder of each encoder's embedding store; none where there are none."""
    return (cfg.save_path or [DEFAULT_SAVE_PATH]) if cfg.save_embedding or cfg.load_embedding else []


def main(cfg: Config) -> None:
    # ---- check and read everything before a model is loaded
    with user_errors():
        check(cfg)
        if cfg.encoder:
            start_processes(cfg.num_processes)
        keep_own_gpu()
        processes = Processes()
        processes.on_first(lambda: lock_outputs(cfg))
        runs, data = read_inputs(cfg)
    for warning in data.warnings:
        warn(warning)
    processes.say(in_words(data.counts))
    with user_errors():
        if (differing := encoders_differ(cfg)) != "":
            warn(
                f'the models do not embed alike: {differing}. --query_instruction_for_retrieval ("" for none), '
                "--passage_instruction_for_retrieval, --pooling_method and --normalize_embeddings set it for all of them"
            )

    # ---- measure
    paths, encoders = cfg.compare or [], cfg.encoder or []
    names, systems = system_names([*paths, *encoders]), []
    with errors_of_any(processes):
        for path, name in zip(paths, names, strict=False):
            evaluation = evaluate_run(runs[path], data, k=cfg.k, cutoffs=cfg.cutoffs, name=path)
            absent = sum(query not in runs[path] for query in data.queries.ids)
            if absent:
                warn(f"{path} has no ranking for {absent:,} of {len(data.queries.ids):,} judged queries: they score 0")
            systems.append(System(name, evaluation, {"run": path, "queries_without_ranking": absent}))
        for number, name in enumerate(names[len(paths) :]):
            evaluation, about = evaluate_encoder(cfg, number, data, processes)
            systems.append(System(name, evaluation, about))

    # ---- report
    if processes.rank == 0:
        with user_errors():
            report(cfg, data, systems)
    processes.wait()


def encoders_differ(cfg: Config) -> str:
    """What the encoders do not embed alike by, as far as no flag sets it for all of them; "" where they do."""
    if len(cfg.encoder or []) < 2:
        return ""
    from bge_accel.models.settings import differing_settings, read_settings

    hub = {"cache_dir": cfg.cache_dir} if cfg.cache_dir is not None else {}
    longest = max(cfg.max_query_length, cfg.max_passage_length)
    settings = []
    for name in cfg.encoder or []:
        own = read_settings(name, **hub)
        used = own.with_overrides(**overrides(cfg))
        settings.append((name, replace(used, max_length=min(own.max_length or longest, longest), other_prompts={})))
    return differing_settings(settings)


def overrides(cfg: Config) -> dict[str, Any]:
    """What flags set for all encoders; None is left to each."""
    return {
        "pooling": cfg.pooling_method,
        "normalize": cfg.normalize_embeddings,
        "query_prefix": BGE_INSTRUCTION if cfg.add_instruction else cfg.query_instruction_for_retrieval,
        "passage_prefix": cfg.passage_instruction_for_retrieval,
    }


def read_inputs(cfg: Config) -> tuple[dict[str, Rankings], EvaluationData]:
    """The runs, and what to measure them and the encoders on; ValueError for what is wrong with any line."""
    faults = Faults()
    runs = {path: read_run(path, faults) for path in cfg.compare or []}
    faults.raise_if_any()
    if cfg.qrels is not None and not cfg.encoder and cfg.corpus_data is None and cfg.query_data is None:
        if cfg.split is not None:
            raise ValueError(f"--split {cfg.split} has no effect with --qrels {cfg.qrels}; drop one of them")
        return runs, judged_ids(cfg.qrels, runs.values())
    return runs, read_evaluation_data(cfg.corpus_data, cfg.query_data, cfg.qrels, cfg.split)


def evaluate_encoder(
    cfg: Config, number: int, data: EvaluationData, processes: Processes
) -> tuple[Evaluation, dict[str, Any]]:
    """Loads one of the encoders and measures it; the metrics, and how they were made."""

    from bge_accel.encoding.embedding_model import EmbeddingModel
    from bge_accel.models.precision import resolve_dtype

    assert cfg.encoder is not None
    of_all = overrides(cfg)
    dtype, precision_warning = resolve_dtype(cfg.fp16, cfg.bf16)
    if precision_warning and number == 0:
        warn(precision_warning)
    model = EmbeddingModel(
        cfg.encoder[number],
        dtype=dtype,
        pooling=of_all["pooling"],
        normalize=of_all["normalize"],
        query_instruction=of_all["query_prefix"],
        passage_instruction=of_all["passage_prefix"],
        lengths={f"--{name}": getattr(cfg, name) for name in ("max_query_length", "max_passage_length")},
        cut_by={"query": "--max_query_length", "passage": "--max_passage_length"},
        trust_remote_code=cfg.trust_remote_code,
        cache_dir=cfg.cache_dir,
    )
    lengths = {name: min(getattr(cfg, name), model.max_length) for name in ("max_query_length", "max_passage_length")}
    for name, length in lengths.items():
        if length < getattr(cfg, name):
            warn(f"--{name} is {getattr(cfg, name)}, but the model takes {length} tokens: texts are cut there")
    stores = save_paths(cfg)
    evaluation = evaluate_retrieval(
        model,
        data,
        k=cfg.k,
        cutoffs=cfg.cutoffs,
        index_factory=cfg.index_factory,
        use_gpu=can_search_on_gpu(cfg.index_factory),
        batch_size=cfg.batch_size,
        save_path=stores[number] if stores else None,
        load_embedding=cfg.load_embedding,
        show_progress=True,
        shared=processes.world > 1,
        **lengths,
    )
    return evaluation, about_model(cfg.encoder[number], model, lengths, processes.world)


def report(cfg: Config, data: EvaluationData, systems: list[System]) -> None:
    """Prints and writes what was found."""
    metric = choose_metric(cfg.compare_metric, choose_cutoffs(cfg.k, cfg.cutoffs))
    common = {"counts": data.counts, "config": asdict(cfg), "versions": installed_versions()}
    compared = compare(data, {system.name: system.evaluation for system in systems}, metric)
    result = result_of(data, systems, compared, metric, common)
    texts = {cfg.output_file: json.dumps(result, indent=2, ensure_ascii=False) + "\n"}
    for path, system in zip(cfg.save_run or [], systems[len(cfg.compare or []) :], strict=False):
        texts[path] = "".join(run_lines(data, system.evaluation, system.name))
    if cfg.save_ranking is not None:
        rows = ranking_rows(data, systems[0].evaluation)
        texts[cfg.save_ranking] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    figures: list[str] = []
    if cfg.report is not None or cfg.figures_dir is not None:
        from bge_accel.reports.html_report import evaluation_page

        page = evaluation_page(result)
        if cfg.report is not None:
            texts[cfg.report] = page.html()
    for path, text in texts.items():
        with atomic_file(path) as file:
            file.write(text)
    if cfg.figures_dir is not None:
        figures = page.save_figures(cfg.figures_dir)
    for system in systems:
        show_system(data, system, heading=len(systems) > 1, index=cfg.index_factory, num_samples=cfg.show)
    show_comparison(data, systems, compared, metric)
    say(f"wrote {', '.join([*texts, *figures])}")


if __name__ == "__main__":
    cfg = parse_config(Config, description=__doc__.split("\n")[0])
    with interruptible(lambda: what_is_kept(*(f"{path}/manifest.json" for path in save_paths(cfg)))):
        main(cfg)
    leave_processes()
