"""Draws docs/demo.png from the table of the demonstration in README.md, so that picture and figures cannot differ.

python docs/demo_figure.py
"""

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent


def read_table(markdown: str) -> dict[str, dict[str, list[float]]]:
    """nDCG@10 of `base`, `tuned` and `merged`, one value for each seed, of each task in the README's table."""
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]
    first = next(number for number, cells in enumerate(rows) if cells[1:2] == ["base"])
    model, columns = "", []
    for name in rows[first][1:]:
        model = name.split(",")[0] if not name.startswith("seed") else model
        columns.append(model)
    found: dict[str, dict[str, list[float]]] = {}
    task = rows[first][0]
    for cells in rows[first + 2 :]:
        if len(cells) != len(columns) + 1:
            break
        if not any(cells[1:]):
            task = cells[0]
        elif cells[0] == "nDCG@10":
            found[task] = {name: [] for name in dict.fromkeys(columns)}
            for name, value in zip(columns, cells[1:], strict=True):
                found[task][name].append(float(re.sub(r"[^0-9.]", "", value)))
    return found


def draw(tasks: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"base": "#6b7280", "tuned": "#2563c9", "merged": "#23875c"}
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(7.2, 2.6), layout="constrained")
    for axis, (task, models) in zip(axes, tasks.items(), strict=True):
        for place, (name, values) in enumerate(models.items()):
            mean = sum(values) / len(values)
            axis.barh(place, mean, height=0.62, color=colors[name], alpha=0.35)
            axis.plot(values, [place] * len(values), "o", color=colors[name], markersize=5)
            axis.annotate(f"{mean:.3f}", (max(values), place), (7, 0), textcoords="offset points", va="center")
        axis.set_yticks(range(len(models)), models)
        axis.invert_yaxis()
        axis.set_xlim(0, 0.8)
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("nDCG@10 (dots: seeds)", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    # What it shows stands in the file too, so that a picture of an older table can be told.
    figure.savefig(path, dpi=150, metadata={"Software": None, "Description": json.dumps(tasks)})


if __name__ == "__main__":
    draw(read_table((DOCS.parent / "README.md").read_text(encoding="utf-8")), DOCS / "demo.png")
