"""Systems that are compared: encoders and runs, what is written of them, and what is shown."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bge_accel.evaluation.comparison import Compared, differences_table, moved_text
from bge_accel.evaluation.retrieval import Evaluation, sample_rankings, score_histogram
from bge_accel.evaluation.sets import EvaluationData
from bge_accel.evaluation.tables import metrics_table, side_by_side_table
from bge_accel.files.text import shorten, shown_name
from bge_accel.processes.group import gather
from bge_accel.processes.progress import say

if TYPE_CHECKING:
    from bge_accel.encoding.embedding_model import EmbeddingModel

SAMPLES = 10  # queries that are written with what each system ranks first


class System(NamedTuple):
    """An encoder or a run, and how well it retrieves."""

    name: str
    evaluation: Evaluation
    about: dict[str, Any]


def system_names(paths: list[str]) -> list[str]:
    """The last part of each path, or the whole where that would make two alike; what is named twice is numbered."""
    short = [os.path.basename(path) if os.path.isfile(path) else shown_name(path) for path in paths]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    earlier = [names[:number].count(name) for number, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, earlier, strict=True)]


def about_model(name: str, model: "EmbeddingModel", lengths: Mapping[str, int], num_processes: int) -> dict[str, Any]:
    """How a model encoded, for what is written of it; all processes take part.

    Args:
        lengths: tokens that queries and passages were cut to.
    """
    import torch

    encoded = np.sum(gather([model.counts.num_texts, model.counts.num_truncated]), axis=0).tolist()
    settings, on_gpu = model.settings, model.device.type == "cuda"
    return {
        "encoded_texts": encoded[0],
        "truncated_texts": encoded[1],
        "model": {
            "name": name,
            "pooling": settings.pooling,
            "normalize": settings.normalize,
            "query_instruction": settings.query_prefix,
            "passage_instruction": settings.passage_prefix,
            **lengths,
            "dtype": str(next(model.encoder.parameters()).dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if on_gpu else model.device.type,
            "processes": num_processes,
        },
    }


def system_result(data: EvaluationData, system: System) -> dict[str, Any]:
    """What is written of one system."""
    evaluation = system.evaluation
    result: dict[str, Any] = {
        "metrics": evaluation.metrics,
        "seconds": {name: round(seconds, 3) for name, seconds in evaluation.seconds.items()},
        **system.about,
        "score_histogram": score_histogram(evaluation),
        "samples": sample_rankings(data, evaluation, SAMPLES),
    }
    if evaluation.index_recall is not None:
        result["index_recall"] = evaluation.index_recall
    return result


def result_of(
    data: EvaluationData,
    systems: Sequence[System],
    compared: Sequence[Compared],
    metric: str,
    common: dict[str, Any],
) -> dict[str, Any]:
    """What is written of all systems; the first is what the others are compared with.

    Args:
        compared: each of the others with the first, by the metric.
        common: what holds for all of them.
    """
    found = {system.name: system_result(data, system) for system in systems}
    if len(systems) == 1:
        result = {**found[systems[0].name], **common}
        encoded = ("encoded_texts", "truncated_texts")
        result["counts"] = common["counts"] | {name: result.pop(name) for name in encoded if name in result}
        return result
    return {
        "base": systems[0].name,
        "compare_metric": metric,
        "systems": found,
        "comparisons": {other.name: other.result() for other in compared},
        **common,
    }


def show_system(data: EvaluationData, system: System, *, heading: bool, index: str, num_samples: int) -> None:
    """Prints one system's table, and samples where asked for.

    Args:
        heading: whether its name stands above.
        index: the search that was used, as FAISS names it.
    """
    evaluation, about = system.evaluation, system.about
    if heading:
        say(f"\n== {system.name}")
    if "model" in about:
        model = about["model"]
        for texts, kind in (("queries", "query"), ("passages", "passage")):
            instruction = model[f"{kind}_instruction"]
            shown = f"with {shorten(instruction, 80)} before each" if instruction else "without an instruction"
            say(f"{texts} {shown}, cut to {model[f'max_{kind}_length']} tokens")
    if about.get("truncated_texts"):
        cut, encoded = about["truncated_texts"], about["encoded_texts"]
        say(f"{cut:,} of {encoded:,} encoded texts were longer than allowed and were cut")
    if evaluation.index_recall is not None:
        found = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.index_recall.items() if "@" in name)
        say(f"{index} against exact search: {found}")
    for sample in sample_rankings(data, evaluation, num_samples) if num_samples else []:
        say(f"query  {shorten(sample['query'], 110)}")
        for rank, passage in enumerate(sample["passages"], start=1):
            mark = "+" if passage["is_relevant"] else " "
            say(f"  {mark} {rank}  {passage['score']:.4f}  {shorten(passage['text'], 98)}")
        say("")
    documented = [f"{name}@{cutoff}" for name in ("MRR", "Recall") for cutoff in (1, 10, 100)]
    if all(name in evaluation.metrics for name in documented):  # what eval_msmarco prints, in its form
        say(str({name: round(evaluation.metrics[name], 6) for name in documented}))
    say(metrics_table(evaluation.metrics))
    if "model" in about:
        say(f"computed in {about['model']['dtype']} on {about['model']['device']}")
    if evaluation.seconds:
        say("seconds: " + ", ".join(f"{n.replace('_', ' ')} {value:.1f}" for n, value in evaluation.seconds.items()))


def show_comparison(data: EvaluationData, systems: Sequence[System], compared: Sequence[Compared], metric: str) -> None:
    """Prints how the others differ from the first system, and all side by side."""
    base, evaluations = systems[0].name, {system.name: system.evaluation for system in systems}
    for other in compared:
        say(f"\n== {other.name} against {base}, by {metric} of {len(data.queries.ids):,} queries\n\n{other.verdict}\n")
        say(moved_text(other.moved, base, other.name))
        say(f"\n{differences_table(other.differences, base, other.name)}")
    if len(systems) > 1:
        say(f"\n== All of {len(data.queries.ids):,} queries\n")
        say(side_by_side_table({name: evaluation.metrics for name, evaluation in evaluations.items()}) + "\n")
