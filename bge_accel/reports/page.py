"""A page of headings, tables, figures and texts, as one HTML file that loads nothing."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bge_accel.reports.figures import COLORS, Figure, escape, legend, save_png, svg

TEXT_SHOWN = 320  # characters of a passage
DARK_COLORS = ("#7aa7ff", "#f0a35e", "#63c794", "#d68be6", "#f08080", "#9aa3b0")

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
.figures { margin: 18px 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); gap: 16px }
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
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); gap: 12px }
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
            f"<tr><td>{escape(str(name))}</td><td>{escape(_shown(value))}</td></tr>" for name, value in values.items()
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


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1].rstrip() + "…"


def _shown(value: Any) -> str:
    """A setting as it is written in JSON; YAML has dates and sets, too."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)
