"""What stands on the page of a training run, an evaluation or a comparison."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bge_accel.evaluation.comparison import Difference, difference_cells
from bge_accel.files.text import shown_name
from bge_accel.reports.figures import Figure, Histogram, Intervals, Line, LineChart
from bge_accel.reports.page import Page

METRIC = re.compile(r"(?:(.*?)[/_])?((?:Capped_)?[A-Za-z]+)@(\d+)")
IN_CHARTS = ("nDCG", "MRR", "MAP", "Recall")  # P@10 of queries with one positive is a tenth at most


def evaluation_page(result: Mapping[str, Any]) -> Page:
    """The page of what `scripts/evaluate_retrieval.py` writes: one system, or several compared with the first."""
    systems = _systems(result)
    counts = result["counts"]
    about = f"{counts['judged_queries']:,} judged queries, {counts['positives']:,} positives"
    if "corpus" in counts:
        about += f", {counts['corpus']:,} passages"
    base, *others = systems
    page = Page(f"{', '.join(others)} against {base}" if others else base, about)
    _add_result(page, result)
    page.settings("Configuration", result["config"])
    page.settings("Versions", result["versions"])
    return page


def results_page(results: Mapping[str, Mapping[str, Any]]) -> Page:
    """The page of several evaluations, {name: what evaluate_retrieval.py wrote}."""
    if len(results) == 1:
        return evaluation_page(next(iter(results.values())))
    page = Page("Evaluations", ", ".join(results))
    for name, result in results.items():
        page.heading(os.path.basename(name))
        _add_result(page, result)
    return page


def training_page(
    name: str,
    log: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    results: Mapping[str, Mapping[str, Any]],
) -> Page:
    """The page of a training run.

    Args:
        log: rows of `train_log.jsonl`.
        config: of `run_config.yaml`.
        samples: some of the training rows.
        results: {name: what evaluate_retrieval.py wrote}, to be shown below.
    """
    curves = _curves(log)
    trained = [row for row in log if "loss" in row]
    last = trained[-1] if trained else {}
    start = shown_name(str(config.get("model_name_or_path", "a model")))
    page = Page(name, f"fine-tuned from {start}")
    tiles = [(f"{last['step']:,}", "steps")] if last else []
    tiles += [(f"{last[key]:{form}}", what) for key, form, what in (
        ("epoch", ".2f", "epochs"), ("loss", ".4f", "last loss"), ("accuracy", ".1%", "last in-batch accuracy"),
        ("memory_gb", ".1f", "GB of memory at most"),
    ) if key in last]  # fmt: skip
    page.tiles(tiles)
    page.heading("Training")
    page.draw(_training_figures(curves))
    if metrics := _metric_figures(curves):
        page.heading("Evaluation during training")
        page.draw(metrics)
    for of, result in results.items():
        page.heading(os.path.basename(of))
        _add_result(page, result)
    if samples:
        page.heading("Training rows")
        page.cards(
            [
                (
                    row["query"],
                    f"{len(row['pos'])} positive, {len(row.get('neg') or [])} negative",
                    [("positive", row["pos"][0], True)]
                    + [("negative", text, False) for text in (row.get("neg") or [])[:2]],
                )
                for row in samples
            ]
        )
    page.heading("Settings")
    page.settings("Configuration", config)
    return page


def _systems(result: Mapping[str, Any]) -> Mapping[str, Any]:
    if "systems" in result:
        return result["systems"]
    model = result.get("model", {}).get("name") or result.get("run") or "evaluation"
    return {shown_name(str(model)): result}


def _add_result(page: Page, result: Mapping[str, Any]) -> None:
    systems, comparisons = _systems(result), result.get("comparisons", {})
    for comparison in comparisons.values():
        page.text(comparison["verdict"], "lead")
    for name in comparisons:
        if len(comparisons) > 1:
            page.heading(f"{name} against {result['base']}")
        _add_comparison(page, result, name)
    if not comparisons:
        for system in systems.values():
            names = list(dict.fromkeys(metric.partition("@")[0] for metric in system["metrics"]))
            cutoffs = sorted({int(metric.partition("@")[2]) for metric in system["metrics"]})
            rows = [[of, *(f"{system['metrics'][f'{of}@{cutoff}']:.4f}" for cutoff in cutoffs)] for of in names]
            page.table(["", *(f"@{cutoff}" for cutoff in cutoffs)], rows)
        page.draw(_cutoff_figures(systems))
    if histograms := _score_figures(systems):
        page.heading("Scores of positives, and of what else was retrieved")
        page.draw(histograms)
    for name, system in systems.items():
        page.heading(f"Samples: {name}")
        page.cards([_sample_card(sample) for sample in system["samples"]])


def _add_comparison(page: Page, result: Mapping[str, Any], name: str) -> None:
    base, metric, comparison = result["base"], result["compare_metric"], result["comparisons"][name]
    differences = {
        of: Difference(**{field: values[field] for field in Difference._fields})
        for of, values in comparison["metrics"].items()
    }
    chosen = differences[metric]
    page.tiles(
        [
            (f"{chosen.base:.4f}", f"{metric} of {base}"),
            (f"{chosen.other:.4f}", f"{metric} of {name}"),
            (f"{chosen.mean:+.4f}", f"difference, {chosen.low:+.4f} to {chosen.high:+.4f}"),
            (f"{chosen.better:,} / {chosen.worse:,} / {chosen.equal:,}", "queries better / worse / equal"),
        ]
    )
    shown = _main_metrics(list(differences), metric)
    intervals = [(of, differences[of].mean, differences[of].low, differences[of].high) for of in shown]
    curves = _cutoff_figures({of: result["systems"][of] for of in (base, name)})[:1]
    page.draw([Intervals(f"Difference to {base}, 95 % intervals", f"{name} − {base}", intervals), *curves])
    head = ["", base, name, "difference", "95 % interval", "p", "queries better", "worse", "equal"]
    rows = {
        of: [of, f"{found.base:.4f}", f"{found.other:.4f}", *difference_cells(found)]
        for of, found in differences.items()
    }
    page.table(head, [rows[of] for of in shown], signed=3)
    page.table(head, list(rows.values()), signed=3, folded="All metrics")
    for what in ("gained", "lost"):
        page.heading(f"Queries that {what} most by {metric}: {len(comparison[what])} shown", 3)
        page.cards([_moved_card(row, base, name) for row in comparison[what]])


def _sample_card(sample: Mapping[str, Any]) -> tuple[str, str, list[tuple[str, str, bool]]]:
    texts = [
        (f"{rank}: {passage['score']:.4f}", passage["text"], passage["is_relevant"])
        for rank, passage in enumerate(sample["passages"], start=1)
    ]
    return sample["query"], "", texts


def _moved_card(row: Mapping[str, Any], base: str, other: str) -> tuple[str, str, list[tuple[str, str, bool]]]:
    rank = f"first relevant passage: {row['base_rank'] or 'not found'} → {row['other_rank'] or 'not found'}"
    texts = [
        (f"first of {system}", row[f"{name}_first"] or "nothing", row[f"{name}_first_is_relevant"])
        for name, system in (("base", base), ("other", other))
    ]
    if row["positive"] and not (row["base_first_is_relevant"] or row["other_first_is_relevant"]):
        texts.append(("relevant", row["positive"], True))
    return row["query"], f"{row['base']:.4f} → {row['other']:.4f}; {rank}", texts


def _main_metrics(names: Sequence[str], chosen: str) -> list[str]:
    """The chosen cut-off of every metric, and Recall at the largest."""
    cutoff = chosen.partition("@")[2]
    largest = max(int(name.partition("@")[2]) for name in names)
    return [name for name in names if name.partition("@")[2] == cutoff or name == f"Recall@{largest}"]


def _cutoff_figures(systems: Mapping[str, Any]) -> list[Figure]:
    """nDCG and Recall over the cut-offs."""
    figures: list[Figure] = []
    for metric in ("nDCG", "Recall"):
        lines = []
        for name, system in systems.items():
            at = sorted((int(key.partition("@")[2]), value) for key, value in system["metrics"].items()
                        if key.partition("@")[0] == metric)  # fmt: skip
            lines.append(Line(name, [cutoff for cutoff, _ in at], [value for _, value in at]))
        if lines and len(lines[0].x) > 1:
            figures.append(LineChart(f"{metric} by cut-off", "passages looked at", f"{metric}@k", lines, log_x=True))
    return figures


def _score_figures(systems: Mapping[str, Any]) -> list[Figure]:
    """The distributions of scores of each system that has any of positives."""
    figures: list[Figure] = []
    for name, system in systems.items():
        found = system["score_histogram"]
        counts = [
            (f"{what} ({sum(found[key]):,})", found[key])
            for what, key in (("positives", "positives"), ("others retrieved", "negatives"))
        ]
        if sum(found["positives"]):
            figures.append(Histogram(f"Scores: {name}", "similarity", found["edges"], counts))
    return figures


def _curves(log: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    """Every number of a training log over the steps; those of inner objects under names like `sources/a/loss`."""
    curves: dict[str, Line] = {}

    def walk(prefix: str, value: Any, step: float) -> None:
        if isinstance(value, Mapping):
            for name, inside in value.items():
                walk(f"{prefix}/{name}" if prefix else str(name), inside, step)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            line = curves.setdefault(prefix, Line(prefix, [], []))
            line.x.append(step)  # type: ignore[attr-defined]
            line.y.append(value)  # type: ignore[attr-defined]

    for row in log:
        walk("", {name: value for name, value in row.items() if name != "step"}, row["step"])
    return curves


def _training_figures(curves: Mapping[str, Line]) -> list[Figure]:
    """Of the curves that every training has, those that are there."""
    wanted = [
        ("Loss", "loss", {"loss": "loss"}),
        ("In-batch accuracy", "share of queries", {"accuracy": "accuracy"}),
        (
            "Similarity",
            "cosine",
            {"positive_similarity": "positives", "hardest_negative_similarity": "hardest negatives"},
        ),
        ("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
        ("Gradient norm", "norm", {"grad_norm": "gradient norm"}),
        ("Throughput", "tokens a second", {"tokens_per_second": "tokens"}),
    ]
    figures: list[Figure] = []
    for title, unit, names in wanted:
        lines = [curves[name]._replace(label=label) for name, label in names.items() if name in curves]
        if lines:
            figures.append(LineChart(title, "step", unit, lines))
    for what in ("loss", "accuracy"):
        lines = [
            line._replace(label=name.split("/", 1)[1].rsplit("/", 1)[0])
            for name, line in curves.items()
            if name.startswith("sources/") and name.endswith(f"/{what}")
        ]
        if lines:
            figures.append(LineChart(f"{what.capitalize()} by source", "step", what, lines))
    return figures


def _metric_figures(curves: Mapping[str, Line]) -> list[Figure]:
    """One chart for each data set: its metrics at 10 (or the largest cut-off) over the steps."""
    groups: dict[str, dict[str, dict[int, Line]]] = {}
    for name, line in curves.items():
        if (match := METRIC.fullmatch(name)) and match[2] in IN_CHARTS:
            of, metric, cutoff = match[1] or "", match[2], int(match[3])
            groups.setdefault(of, {}).setdefault(metric, {})[cutoff] = line
    figures: list[Figure] = []
    for of, metrics in groups.items():
        lines = []
        for metric, lines_at in metrics.items():
            cutoff = 10 if 10 in lines_at else max(lines_at)
            lines.append(lines_at[cutoff]._replace(label=f"{metric}@{cutoff}"))
        figures.append(LineChart(f"Metrics{f': {of}' if of else ''}", "step", "metric", lines))
    return figures
