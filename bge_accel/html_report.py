"""One HTML page per training run and per evaluation or comparison; it holds all it needs and loads nothing."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bge_accel.comparison import Difference, difference_cells
from bge_accel.figures import COLORS, Figure, Histogram, Intervals, Line, LineChart, legend, save_png, svg

TEXT_SHOWN = 320  # characters of a passage
DARK_COLORS = ("#7aa7ff", "#f0a35e", "#63c794", "#d68be6", "#f08080", "#9aa3b0")
METRIC = re.compile(r"(?:(.*)[/_])?([A-Za-z]+(?:_Recall)?)@(\d+)$")

_STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #ffffff; --ink: #1d2127; --muted: #626a75; --rule: #e3e4e8;
  --good: #1c7a50; --bad: #b13333; %(light)s }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --card: #1c1f25; --ink: #e6e8ec; --muted: #9aa3b0;
  --rule: #31353d; --good: #63c794; --bad: #f08080; %(dark)s } }
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif }
main { max-width: 1160px; margin: 0 auto; padding: 40px 28px 72px }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 6px }
h2 { font-size: 19px; margin: 44px 0 14px; letter-spacing: -.005em }
h3 { font-size: 15px; margin: 26px 0 10px }
p { margin: 0 0 10px; max-width: 92ch } .muted { color: var(--muted) }
.lead { font-size: 17px; margin-top: 14px }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 22px 0 0 }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 18px; min-width: 132px }
.tile b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums } .tile span { color: var(--muted); font-size: 13px }
.figures { margin: 18px 0; display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px 8px }
figcaption { font-weight: 600; display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; margin-bottom: 6px }
.key { font-weight: 400; font-size: 13px; color: var(--muted) } .key i { display: inline-block; width: 11px; height: 11px;
  border-radius: 3px; margin-right: 6px; vertical-align: -1px }
svg { display: block; width: 100%%; height: auto; font: 12px system-ui, "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums }
svg .grid { stroke: var(--rule) } svg .axis { stroke: var(--muted); stroke-opacity: .7 }
svg text { fill: var(--muted) } svg .row { fill: var(--ink) }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round } svg .bar { stroke-width: 2.5; stroke-linecap: round }
svg .area { fill-opacity: .3; stroke-width: 1.5 }
%(series)s
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 10px }
table { border-collapse: collapse; width: 100%%; font-variant-numeric: tabular-nums }
th, td { padding: 7px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule) }
tr:last-child td { border-bottom: 0 } th { font-size: 13px; color: var(--muted); font-weight: 500 }
th:first-child, td:first-child { text-align: left } td.up { color: var(--good) } td.down { color: var(--bad) }
table.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere } table.settings td:first-child { width: 280px; color: var(--muted) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 12px }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 18px; overflow-wrap: anywhere }
.card .query { font-weight: 600 } .card .rank { color: var(--muted); font-size: 13px; margin: 2px 0 8px }
.card dl { margin: 0; font-size: 14px } .card dt { color: var(--muted); font-size: 13px; margin-top: 8px }
.card dd { margin: 0 } .relevant::before { content: "\\2713\\00a0"; color: var(--good); font-weight: 700 }
details { margin-top: 14px } summary { cursor: pointer; font-weight: 600; margin-bottom: 10px }
@media print { .figures, .cards { grid-template-columns: 1fr 1fr } figure, .card { break-inside: avoid } }
"""


class Page:
    """A page that grows from top to bottom; its figures can be had as PNG, too."""

    def __init__(self, title: str, subtitle: str) -> None:
        self.title, self.figures = title, []  # type: ignore[var-annotated]
        self.parts = [f'<h1>{escape(title)}</h1><p class="muted">{escape(subtitle)}</p>']

    def heading(self, text: str, level: int = 2) -> None:
        """A heading of a part."""
        self.parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str, kind: str = "") -> None:
        """A paragraph."""
        self.parts.append(f'<p class="{kind}">{escape(text)}</p>')

    def tiles(self, tiles: Sequence[tuple[str, str]]) -> None:
        """(value, what it is) of what is to be seen first."""
        inside = "".join(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(of)}</span></div>' for value, of in tiles
        )
        self.parts.append(f'<div class="tiles">{inside}</div>')

    def draw(self, figures: Sequence[Figure]) -> None:
        """Figures side by side."""
        drawn = []
        for figure in figures:
            self.figures.append(figure)
            keys = "".join(
                f'<span class="key"><i class="k{number % len(COLORS)}"></i>{escape(label)}</span>'
                for number, label in enumerate(legend(figure))
            )
            drawn.append(f"<figure><figcaption>{escape(figure.title)}{keys}</figcaption>{svg(figure)}</figure>")
        if drawn:
            self.parts.append(f'<div class="figures">{"".join(drawn)}</div>')

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], *, signed: int | None = None, folded: str = ""
    ) -> None:
        """A table of figures; cells of the column `signed` are coloured by their sign. `folded`: a title to open it by."""
        lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
        for row in rows:
            cells = []
            for column, cell in enumerate(row):
                kind = {"+": "up", "-": "down"}.get(cell[:1], "") if column == signed else ""
                cells.append(f'<td class="{kind}">{escape(cell)}</td>' if kind else f"<td>{escape(cell)}</td>")
            lines.append("<tr>" + "".join(cells) + "</tr>")
        table = f'<div class="scroll"><table>{"".join(lines)}</table></div>'
        self.parts.append(f"<details><summary>{escape(folded)}</summary>{table}</details>" if folded else table)

    def settings(self, title: str, values: Mapping[str, Any]) -> None:
        """Names and values, folded away."""
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}</td></tr>"
            for name, value in values.items()
        )
        self.parts.append(
            f"<details><summary>{escape(title)}</summary>"
            f'<div class="scroll"><table class="settings">{rows}</table></div></details>'
        )

    def cards(self, cards: Sequence[tuple[str, str, Sequence[tuple[str, str, bool]]]]) -> None:
        """(query, a line about it, [(what a text is, the text, whether it is relevant), ...])."""
        drawn = []
        for query, about, texts in cards:
            inside = "".join(
                f"<dt>{escape(what)}</dt><dd{' class=relevant' if is_relevant else ''}>{escape(_cut(text))}</dd>"
                for what, text, is_relevant in texts
            )
            rank = f'<div class="rank">{escape(about)}</div>' if about else ""
            drawn.append(
                f'<div class="card"><div class="query">{escape(_cut(query))}</div>{rank}<dl>{inside}</dl></div>'
            )
        self.parts.append(f'<div class="cards">{"".join(drawn)}</div>')

    def html(self) -> str:
        """The whole page."""
        colors = [" ".join(f"--c{i}: {color};" for i, color in enumerate(of)) for of in (COLORS, DARK_COLORS)]
        series = "\n".join(
            f"svg .c{i} {{ stroke: var(--c{i}) }} svg .dot.c{i}, svg .area.c{i}, .key .k{i} {{ fill: var(--c{i}); "
            f"background: var(--c{i}) }}"
            for i in range(len(COLORS))
        )
        style = _STYLE % {"light": colors[0], "dark": colors[1], "series": series}
        # An empty icon: a browser would ask for one.
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        )
        return (
            f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(self.title)}</title><style>{style}</style>'
            f"</head>\n<body><main>\n" + "\n".join(self.parts) + "\n</main></body></html>\n"
        )

    def save_figures(self, folder: str) -> list[str]:
        """Writes each figure as a PNG, named by its title; the paths."""
        os.makedirs(folder, exist_ok=True)
        paths = []
        for number, figure in enumerate(self.figures, start=1):
            name = re.sub(r"[^a-z0-9]+", "_", figure.title.lower()).strip("_")
            paths.append(os.path.join(folder, f"{number:02d}_{name}.png"))
            save_png(figure, paths[-1])
        return paths


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
    start = os.path.basename(str(config.get("model_name_or_path", "a model")).rstrip("/"))
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
    return {os.path.basename(str(model).rstrip("/")): result}


def _add_result(page: Page, result: Mapping[str, Any]) -> None:
    systems = _systems(result)
    base = result.get("base", next(iter(systems)))
    for comparison in result.get("comparisons", {}).values():
        page.text(comparison["verdict"], "lead")
    for name, comparison in result.get("comparisons", {}).items():
        if len(result["comparisons"]) > 1:
            page.heading(f"{name} against {base}")
        differences = {
            metric: Difference(**{field: values[field] for field in Difference._fields})
            for metric, values in comparison["metrics"].items()
        }
        chosen = differences[result["compare_metric"]]
        page.tiles(
            [
                (f"{chosen.base:.4f}", f"{result['compare_metric']} of {base}"),
                (f"{chosen.other:.4f}", f"{result['compare_metric']} of {name}"),
                (f"{chosen.mean:+.4f}", f"difference, {chosen.low:+.4f} to {chosen.high:+.4f}"),
                (f"{chosen.better:,} / {chosen.worse:,} / {chosen.equal:,}", "queries better / worse / equal"),
            ]
        )
        shown = _main_metrics(list(differences), result["compare_metric"])
        page.draw(
            [
                Intervals(
                    f"Difference to {base}, 95 % intervals",
                    f"{name} − {base}",
                    [(metric, differences[metric].mean, *differences[metric][2:4]) for metric in shown],
                ),
                *_cutoff_figures({of: systems[of] for of in (base, name)})[:1],
            ]
        )
        head = ["", base, name, "difference", "95 % interval", "p", "queries better", "worse", "equal"]
        cells = {
            metric: [metric, f"{found.base:.4f}", f"{found.other:.4f}", *difference_cells(found)]
            for metric, found in differences.items()
        }
        page.table(head, [cells[metric] for metric in shown], signed=3)
        page.table(head, list(cells.values()), signed=3, folded="All metrics")
        for what in ("gained", "lost"):
            page.heading(f"Queries that {what} most by {result['compare_metric']}: {len(comparison[what])} shown", 3)
            page.cards([_moved_card(row, base, name) for row in comparison[what]])
    if not result.get("comparisons"):
        for system in systems.values():
            names = list(dict.fromkeys(metric.partition("@")[0] for metric in system["metrics"]))
            cutoffs = sorted({int(metric.partition("@")[2]) for metric in system["metrics"]})
            rows = [[of, *(f"{system['metrics'][f'{of}@{cutoff}']:.4f}" for cutoff in cutoffs)] for of in names]
            page.table(["", *(f"@{cutoff}" for cutoff in cutoffs)], rows)
        page.heading("Figures")
        page.draw(_cutoff_figures(systems))
    histograms = [
        Histogram(
            f"Scores: {name}",
            "similarity",
            of["score_histogram"]["edges"],
            [(f"{kind} ({sum(of['score_histogram'][key]):,})", of["score_histogram"][key])
             for kind, key in (("positives", "positives"), ("others retrieved", "negatives"))],
        )
        for name, of in systems.items() if sum(of["score_histogram"]["positives"])
    ]  # fmt: skip
    if histograms:
        page.heading("Scores of positives, and of what else was retrieved")
        page.draw(histograms)
    for name, system in systems.items():
        page.heading(f"Samples: {name}")
        page.cards(
            [
                (
                    sample["query"],
                    "",
                    [
                        (f"{rank}: {passage['score']:.4f}", passage["text"], passage["is_relevant"])
                        for rank, passage in enumerate(sample["passages"], start=1)
                    ],
                )
                for sample in system["samples"]
            ]
        )


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
        if match := METRIC.fullmatch(name):
            of, metric, cutoff = match[1] or "", match[2], int(match[3])
            groups.setdefault(of, {}).setdefault(metric, {})[cutoff] = line
    figures: list[Figure] = []
    for of, metrics in groups.items():
        lines = []
        for metric, lines_at in metrics.items():
            cutoff = 10 if 10 in lines_at else max(lines_at)
            lines.append(lines_at[cutoff]._replace(label=f"{metric}@{cutoff}"))
        figures.append(LineChart(f"Metrics{f': {of}' if of else ''}", "step", "metric", lines[: len(COLORS)]))
    return figures


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1].rstrip() + "…"
