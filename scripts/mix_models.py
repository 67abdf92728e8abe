"""Merge models of one architecture: a weighted average of their weights (LM-Cocktail), streamed from disk to disk.

With weights that are given:

    python scripts/mix_models.py --model_names_or_paths BAAI/bge-small-en-v1.5 ./tuned --weights 0.5 0.5 \\
        --output_path ./mixed

With weights from a few examples, by each model's loss on them:

    python scripts/mix_models.py --model_names_or_paths BAAI/bge-small-en-v1.5 ./tuned-a ./tuned-b \\
        --example_data examples.jsonl --neg_number 7 --output_path ./mixed

The best mix of a tuned model (second) with its base (first) on a development set, as long as it loses at most one
point of nDCG@10 on a general one:

    python scripts/mix_models.py --model_names_or_paths BAAI/bge-small-en-v1.5 ./tuned --search --max_drop 0.01 \\
        --dev_corpus dev/corpus.jsonl --dev_queries dev/queries.jsonl --dev_qrels dev/qrels.tsv \\
        --guard_corpus general/corpus.jsonl --guard_queries general/queries.jsonl --guard_qrels general/qrels.tsv \\
        --plot search.png --output_path ./mixed

The average of the last checkpoints of a run:

    python scripts/mix_models.py --run_dir ./tuned --last_checkpoints 5 --output_path ./averaged

Where the models' pooling, prompts or lengths differ, --settings_from says whose the merged model has; else they are those
of the first (of checkpoints, of the latest).
"""

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from bge_accel.config import check_model_path, option, parse_config, required, user_errors
from bge_accel.evaluation.set_files import files_of_beir
from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files
from bge_accel.files.lock import lock_output
from bge_accel.files.outputs import check_output
from bge_accel.files.text import printable
from bge_accel.processes.progress import say
from bge_accel.processes.signals import interruptible

# Heavy packages are imported inside main(), after the arguments have been checked.


@dataclass(kw_only=True)
class Config:
    """What to merge, and by which weights."""

    model_names_or_paths: list[str] | None = option(None, "folders or hub names; the first is the base", group="models")
    model_type: Literal["encoder", "decoder", "reranker", "encoder-decoder"] = option(
        "encoder", "what kind of models they are"
    )
    run_dir: str | None = option(None, "folder with checkpoint-STEP folders, in place of models")
    last_checkpoints: int | None = option(None, "average so many of the run's last checkpoints", at_least=1)
    settings_from: str | None = option(
        None,
        "the model whose tokenizer, pooling, prompts and length the merged one has, where they differ",
    )
    trust_remote_code: bool = option(False, "run code that comes with the models")
    cache_dir: str | None = option(None, "where models from the hub are kept")

    weights: list[float] | None = option(
        None, "one for each model; they have to sum to 1", above=-math.inf, group="given weights"
    )
    normalize: bool = option(False, "divide the weights by their sum")

    example_data: list[str] | None = option(
        None, 'files of rows {"query", "pos", "neg"}, of decoders {"input", "output"}', group="weights from examples"
    )
    temperature: float = option(
        5.0,
        "the losses are divided by it; a lower one makes the weights differ more",
        above=0,
    )

    objective: Literal["loss", "ndcg@10"] | None = option(
        None, "what a model is judged by; default: loss for examples, ndcg@10 for a search", group="examples and search"
    )
    batch_size: int = option(2, "examples whose loss is taken together", at_least=1)
    max_input_length: int = option(2048, "tokens that a text is cut to", at_least=1)
    neg_number: int = option(7, "negatives drawn for a query", at_least=0)
    seed: int = option(42, "of the draw of negatives", at_least=0, at_most=2**32 - 1)

    search: bool = option(False, "try weights along the line from the first model to the second", group="search")
    search_steps: int = option(10, "steps from base to tuned: 10 tries 0, 0.1, ..., 1", at_least=1, at_most=1000)
    max_drop: float = option(0.0, "how much the score on the guard set may fall below the base's", at_least=0)
    dev_data: list[str] | None = option(None, 'the set to be best on: files of rows {"query", "pos"}')
    dev_corpus: list[str] | None = option(None, "or its passages, as evaluate_retrieval.py takes them")
    dev_queries: list[str] | None = option(None, "its queries")
    dev_qrels: str | None = option(None, "its judgements")
    guard_data: list[str] | None = option(None, "the set not to fall on, in the same way")
    guard_corpus: list[str] | None = option(None, "its passages")
    guard_queries: list[str] | None = option(None, "its queries")
    guard_qrels: str | None = option(None, "its judgements")
    plot: str | None = option(None, "PNG with both scores along the line (needs matplotlib)")

    output_path: str = required("new folder for the merged model", group="output")
    dtype: str | None = option(None, "float32, float16 or bfloat16; default: the first model's")
    max_shard_size: str = option("50GB", "a larger model is written as several files")
    overwrite_output_dir: bool = option(False, "replace what stands at --output_path")


# Flags that mean something only in some ways of finding the weights.
_JUDGED = ("example_data", "search")
ONLY_WITH = {
    **dict.fromkeys(("weights", "normalize"), ("weights",)),
    **dict.fromkeys(("example_data", "temperature"), ("example_data",)),
    **dict.fromkeys(("objective", "batch_size", "max_input_length", "neg_number", "seed"), _JUDGED),
    **dict.fromkeys(("run_dir", "last_checkpoints"), ("last_checkpoints",)),
    **dict.fromkeys(
        "search_steps max_drop dev_data dev_corpus dev_queries dev_qrels guard_data guard_corpus guard_queries "
        "guard_qrels plot".split(),
        ("search",),
    ),
}


def check(cfg: Config) -> str:
    """The way to find the weights; raises ValueError for settings that cannot work, before anything is read."""
    ways = [name for name in ("weights", "example_data", "search", "last_checkpoints") if getattr(cfg, name)]
    if len(ways) != 1:
        given = f"; given are {' and '.join(f'--{way}' for way in ways)}" if ways else ""
        raise ValueError(f"give one of --weights, --example_data, --search, --last_checkpoints{given}")
    way = ways[0]
    for field in fields(cfg):
        if field.name in ONLY_WITH and way not in ONLY_WITH[field.name] and getattr(cfg, field.name) != field.default:
            raise ValueError(
                f"--{field.name} has no effect without {' or '.join(f'--{name}' for name in ONLY_WITH[field.name])}"
            )
    if way == "last_checkpoints":
        if cfg.run_dir is None or cfg.model_names_or_paths:
            raise ValueError("--last_checkpoints takes the models from --run_dir, and no --model_names_or_paths")
    elif not cfg.model_names_or_paths or len(cfg.model_names_or_paths) < 2:
        raise ValueError("--model_names_or_paths needs two models or more")
    for name in cfg.model_names_or_paths or []:
        check_model_path("--model_names_or_paths", name)
    if way == "search":
        check_search(cfg)
    return way


def data_of(cfg: Config) -> list[str]:
    """The files, globs and folders of examples, corpora, queries and judgements that are read."""
    sets = [cfg.example_data, cfg.dev_data, cfg.dev_corpus, cfg.dev_queries, cfg.guard_data, cfg.guard_corpus]
    named = [name for names in (*sets, cfg.guard_queries) for name in names or []]
    return [*files_of_beir(named), *filter(None, (cfg.dev_qrels, cfg.guard_qrels))]


def check_search(cfg: Config) -> None:
    if len(cfg.model_names_or_paths or []) != 2:
        raise ValueError("--search goes from a base to a tuned model: --model_names_or_paths needs these two")
    for kind in ("dev", "guard"):
        data, corpus, queries, qrels = (
            getattr(cfg, f"{kind}_{name}") for name in ("data", "corpus", "queries", "qrels")
        )
        if data and (corpus or queries or qrels):
            raise ValueError(f"--{kind}_data and --{kind}_corpus both give the {kind} set; keep one")
        if not data and bool(corpus) != bool(queries):
            raise ValueError(f"--{kind}_corpus and --{kind}_queries belong together")
        if qrels and not corpus:
            raise ValueError(f"--{kind}_qrels has no effect without --{kind}_corpus and --{kind}_queries")
        if kind == "dev" and not (data or corpus):
            raise ValueError("--search needs a set to be best on: --dev_data, or --dev_corpus and --dev_queries")
        if corpus and cfg.objective == "loss":
            raise ValueError(f"--objective loss needs rows: --{kind}_data in place of --{kind}_corpus")
    if not (cfg.guard_data or cfg.guard_corpus) and cfg.max_drop:
        raise ValueError("--max_drop has no effect without --guard_data or --guard_corpus")
    if cfg.model_type not in ("encoder", "decoder") or (cfg.model_type == "decoder" and cfg.objective != "loss"):
        raise ValueError("--search takes encoders, and decoders with --objective loss")
    if cfg.plot is not None:
        check_output("--plot", cfg.plot, data_of(cfg))
    if cfg.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib, or drop the flag")


def main(cfg: Config) -> None:
    with user_errors():
        way = check(cfg)

    from bge_accel.merging.merge import (
        check_complete,
        check_output_folder,
        check_weights,
        last_checkpoints,
        merge_models,
    )

    try:
        with user_errors():
            # ---- models and weights
            models = cfg.model_names_or_paths or last_checkpoints(str(cfg.run_dir), cfg.last_checkpoints or 0)
            files = find_files(data_of(cfg), Faults())
            check_output_folder(cfg.output_path, [*models, *files], overwrite=cfg.overwrite_output_dir)
            check_output("--output_path", os.path.join(cfg.output_path, "config.json"), data_of(cfg))
            check_complete(models[0], cfg.model_type, trust_remote_code=cfg.trust_remote_code, cache_dir=cfg.cache_dir)
            lock_output(cfg.output_path, is_folder=False)  # beside the folder, which is replaced with its own lock
            lock_output(cfg.output_path)
            recipe: dict[str, Any] = {}
            if way == "weights":
                weights = check_weights(cfg.weights or [], len(models), normalize=cfg.normalize)
            elif way == "last_checkpoints":
                weights = [1 / len(models)] * len(models)
            elif way == "example_data":
                weights, recipe = weigh_by_examples(cfg, models)
            else:
                weights, recipe = search_weights(cfg, models)

            # ---- merge
            merge_models(
                models,
                cfg.model_type,
                weights,
                cfg.output_path,
                settings_from=cfg.settings_from,
                dtype=cfg.dtype,
                max_shard_size=cfg.max_shard_size,
                overwrite_output_dir=cfg.overwrite_output_dir,
                recipe=recipe,
                cache_dir=cfg.cache_dir,
            )
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise SystemExit(printable(f"mix_models.py: error: {where}{error.strerror or error}")) from None
    for model, weight in zip(models, weights, strict=True):
        say(f"{weight:8.4f}  {model}")
    say(f"wrote {cfg.output_path}")


def weigh_by_examples(cfg: Config, models: list[str]) -> tuple[list[float], dict[str, Any]]:
    """Weights by each model's loss on the examples, and what the recipe says of them."""
    from bge_accel.merging.weights import check_examples, example_losses, read_examples, weights_from_losses

    examples = read_examples(cfg.example_data or [], cfg.model_type)
    check_examples(examples, cfg.model_type)
    losses = example_losses(
        models,
        cfg.model_type,
        examples,
        objective=cfg.objective or "loss",
        settings_from=cfg.settings_from,
        **example_settings(cfg),
    )
    about = ("objective", "temperature", "batch_size", "max_input_length", "neg_number", "seed")
    return weights_from_losses(losses, cfg.temperature), {
        "weights_from": {
            "examples": len(examples),
            "losses": losses,
            **{name: getattr(cfg, name) for name in about},
            "objective": cfg.objective or "loss",
        }
    }


def search_weights(cfg: Config, models: list[str]) -> tuple[list[float], dict[str, Any]]:
    """Weights of the best mix of two models, and what the recipe says of the search."""
    from bge_accel.merging.weights import MixScore, choose_mix, plot_mixes, search_mixes

    dev, guard = scorer(cfg, "dev"), scorer(cfg, "guard")
    assert dev is not None
    say(f"{'tuned':>6}  {'dev':>8}  {'guard':>8}")

    def show(score: MixScore) -> None:
        guarded = "-" if score.guard is None else f"{score.guard:.4f}"
        say(f"{score.tuned_weight:>6.3f}  {score.dev:>8.4f}  {guarded:>8}")

    base, tuned = models
    scores = search_mixes(
        base,
        tuned,
        cfg.model_type,
        dev,
        guard,
        num_steps=cfg.search_steps,
        on_score=show,
        settings_from=cfg.settings_from,
        cache_dir=cfg.cache_dir,
    )
    chosen = choose_mix(scores, cfg.max_drop)
    say(f"chosen: {chosen.tuned_weight:g} of the tuned model")
    if cfg.plot is not None:
        os.makedirs(os.path.dirname(os.path.abspath(cfg.plot)), exist_ok=True)
        plot_mixes(f"{cfg.plot}.incomplete", scores, chosen, cfg.max_drop)
        os.replace(f"{cfg.plot}.incomplete", cfg.plot)
    return [1 - chosen.tuned_weight, chosen.tuned_weight], {
        "search": {
            "objective": cfg.objective or "ndcg@10",
            "max_drop": cfg.max_drop if guard else None,
            "scores": [score._asdict() for score in scores],
        }
    }


def scorer(cfg: Config, kind: Literal["dev", "guard"]) -> Callable[[str], float] | None:
    """From a model's folder to its score on the dev or the guard set, higher is better; None where there is no set."""
    from bge_accel.encoding.embedding_model import EmbeddingModel
    from bge_accel.evaluation.sets import read_evaluation_data
    from bge_accel.merging.weights import (
        check_examples,
        example_losses,
        examples_to_retrieve,
        ndcg_at_10,
        read_examples,
    )

    files, corpus, queries, qrels = (getattr(cfg, f"{kind}_{name}") for name in ("data", "corpus", "queries", "qrels"))
    if not files and not corpus:
        return None
    examples = check_examples(read_examples(files, cfg.model_type), cfg.model_type) if files else []
    if cfg.objective == "loss":
        return lambda folder: -example_losses([folder], cfg.model_type, examples, **example_settings(cfg))[0]
    data = examples_to_retrieve(examples) if files else read_evaluation_data(corpus, queries, qrels)

    def ndcg(folder: str) -> float:
        lengths = {"--max_input_length": cfg.max_input_length}
        model = EmbeddingModel(folder, dtype="float32", lengths=lengths, trust_remote_code=cfg.trust_remote_code)
        return ndcg_at_10(model, data, cfg.max_input_length)

    return ndcg


def example_settings(cfg: Config) -> dict[str, Any]:
    names = ("batch_size", "max_input_length", "neg_number", "seed", "trust_remote_code", "cache_dir")
    return {name: getattr(cfg, name) for name in names}


if __name__ == "__main__":
    cfg = parse_config(Config, description=__doc__.split("\n")[0])
    with interruptible("nothing is kept, the same command starts again"):
        main(cfg)
