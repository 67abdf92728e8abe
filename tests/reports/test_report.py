"""Pages and figures: what is in them, and that a real browser shows them without an error."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from bge_accel.reports.figures import Histogram, Intervals, Line, LineChart, nice_ticks, svg, thinned, tick_labels

SCRIPT = "report.py"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        (0.31, 0.58, ["0.3", "0.4", "0.5", "0.6"]),
        (1, 120, ["0", "50", "100", "150"]),
        (-0.02, 0.11, ["-0.05", "0.00", "0.05", "0.10", "0.15"]),
        (0, 25000, ["0", "10,000", "20,000", "30,000"]),
        (0.5, 0.5, ["0.4", "0.6", "0.8", "1.0"]),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, expected):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert tick_labels(ticks) == expected


def test_long_lines_are_thinned_and_keep_their_mean():
    line = thinned(Line("loss", list(range(5000)), [float(i % 7) for i in range(5000)]))
    assert len(line.x) <= 600 and sum(line.y) / len(line.y) == pytest.approx(3, abs=0.05)


class Collector(HTMLParser):
    """Checks that tags are balanced, and collects the texts of elements."""

    void = ("meta", "link", "br", "line", "circle", "polyline", "polygon")

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parse(html):
    collector = Collector()
    collector.feed(html)
    assert not collector.open
    return collector


def test_figures_stand_where_their_numbers_are():
    drawn = parse(svg(LineChart("t", "step", "learning rate", [Line("lr", [0, 50, 100], [0, 5e-5, 0])])))
    (path,) = [attrs["points"] for tag, attrs in drawn.tags if tag == "polyline"]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in path.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 == y2 > y1
    assert "learning rate (× 10⁻⁵)" in drawn.texts and "step" in drawn.texts
    logs = parse(svg(LineChart("t", "k", "m", [Line("a", [1, 10, 100], [0, 0.5, 1])], log_x=True)))
    (path,) = [attrs["points"] for tag, attrs in logs.tags if tag == "polyline"]
    x0, x1, x2 = (float(point.split(",")[0]) for point in path.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    bars = parse(svg(Histogram("t", "score", [0, 1, 2], [("a", [1, 3]), ("b", [0, 0])])))
    assert "% of each group" in bars.texts and sum(tag == "polygon" for tag, _ in bars.tags) == 2
    rows = [("up", 0.1, 0.05, 0.15), ("down", -0.1, -0.2, -0.05), ("even", 0.0, -0.1, 0.1)]
    intervals = parse(svg(Intervals("t", "difference", rows)))
    assert [attrs["class"] for tag, attrs in intervals.tags if tag == "circle"] == ["dot c2", "dot c4", "dot c5"]


def histogram(*shares):
    return {"edges": [0, 0.5, 1.0], "positives": list(shares), "negatives": [90, 10]}


def system(shift):
    samples = [
        {"id": "q", "query": "<b>who</b> & why", "passages": [{"text": "x" * 900, "score": 0.5, "is_relevant": True}]}
    ]
    metrics = {f"{name}@{k}": k / 200 + shift for name in ("MRR", "nDCG", "Recall") for k in (1, 10, 100)}
    return {"metrics": metrics, "samples": samples, "score_histogram": histogram(3, 9), "seconds": {}}


@pytest.fixture
def files(tmp_path):
    """A training run's folder, an evaluation and a comparison."""
    run = tmp_path / "tuned"
    run.mkdir()
    rows = []
    for step in range(1, 31):
        row = {
            "step": step, "epoch": step / 30, "loss": 2 / step, "accuracy": 1 - 1 / (step + 1),
            "positive_similarity": 0.5, "hardest_negative_similarity": 0.3, "learning_rate": 1e-5 * (31 - step),
            "grad_norm": math.nan if step == 3 else 4.0, "tokens_per_second": 900.0, "memory_gb": 1.5,
            "sources": {"nq": {"loss": 1.0, "accuracy": 0.5, "queries": 4}},
        }  # fmt: skip
        rows.append(row)
        if step % 10 == 0:
            measured = {"nDCG@1": 0.1, "nDCG@10": step / 100, "Recall@100": step / 50, "P@10": 0.1}
            measured["Capped_Recall@10"] = 0.5
            rows.append({"step": step, "eval": {"dev": measured}, "eval_seconds": 1.5})
    (run / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.jsonl").write_text('{"query": "a training query", "pos": ["its passage"], "neg": ["another"]}\n')
    config = {"model_name_or_path": "BAAI/bge-small-en-v1.5", "train_data": ["rows.jsonl"], "learning_rate": 3e-4}
    (run / "run_config.yaml").write_text(json.dumps(config))
    common = {"counts": {"judged_queries": 9, "positives": 12, "corpus": 100}, "config": {"k": 100}, "versions": {}}
    one = {**system(0.1), "model": {"name": "org/one"}, **common}
    difference = {"base": 0.1, "other": 0.2, "low": 0.05, "high": 0.15, "p_value": 0.001,
                  "better": 5, "worse": 2, "equal": 2, "difference": 0.1}  # fmt: skip
    moved = {"id": "q7", "query": "gained query", "positive": "the passage", "base": 0.0, "other": 1.0,
             "base_rank": None, "base_first": "wrong one", "base_first_is_relevant": False,
             "other_rank": 1, "other_first": "the passage", "other_first_is_relevant": True}  # fmt: skip
    two = {
        "base": "base", "compare_metric": "nDCG@10", "systems": {"base": system(0), "tuned": system(0.1)},
        "comparisons": {"tuned": {"verdict": "nDCG@10: tuned is better", "gained": [moved], "lost": [],
                                  "metrics": {name: difference for name in system(0)["metrics"]}}},
        **common,
    }  # fmt: skip
    for name, result in (("one", one), ("two", two)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return tmp_path


def test_settings_that_json_has_not_are_shown(run_script, files):
    (files / "tuned" / "run_config.yaml").write_text("began: 2026-01-02\n1: 2\n")
    run_script(SCRIPT, "--run", "tuned")
    html = (files / "report.html").read_text()
    assert "<td>began</td><td>&quot;2026-01-02&quot;</td>" in html and "<td>1</td><td>2</td>" in html


def test_the_page_of_a_training_run(run_script, files):
    run_script(SCRIPT, "--run", "tuned", "--metrics", "one.json", "two.json")
    html = (files / "report.html").read_text()
    page = parse(html)
    titles = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert titles[:6] == ["Loss", "In-batch accuracy", "Similarity", "Learning rate", "Gradient norm", "Throughput"]
    for title in ("Loss by source", "Metrics: eval/dev", "nDCG by cut-off", "Scores: org/one", "Scores: tuned"):
        assert title in titles
    assert sum(title.startswith("Metrics") for title in titles) == 1 and "Capped" not in " ".join(titles)
    text = " ".join(page.texts)
    for shown in (
        "fine-tuned from BAAI/bge-small-en-v1.5", "a training query", "nDCG@10", "Recall@100", "gained query", "0.0003",
        "<b>who</b> & why", "one.json", "positives (12)", "not found → 1",
    ):  # fmt: skip
        assert shown in text, shown
    assert "x" * 400 not in text
    assert not re.search(r'(?:src|href)="(?!data:)', html) and "@import" not in html and "url(" not in html


def test_pages_of_evaluations_and_figures_as_png(run_script, files):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = run_script(SCRIPT, "--metrics", "two.json", "--output_file", "p.html", "--figures_dir", "png")
    assert "tuned against base" in (files / "p.html").read_text()
    names = sorted(path.name for path in (files / "png").iterdir())
    assert len(names) == 4 and names[0] == "01_difference_to_base_95_intervals.png" and names[0] in done.stdout
    assert all((files / "png" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in names)


def test_mistakes(run_script, files):
    (files / "other.json").write_text('{"metrics": {}}')
    for args, expected in [
        ([], "there is nothing to report"),
        (["--run", "nowhere"], "nowhere/train_log.jsonl is not there: --run takes the --output_dir"),
        (["--metrics", "other.json"], "other.json is not what scripts/evaluate_retrieval.py writes"),
        (["--metrics", "two.json", "--output_file", "two.json"], "--output_file two.json is an input"),
    ]:
        done = run_script(SCRIPT, *args, status=2)
        assert expected in done.stderr and "Traceback" not in done.stderr


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(path, profile):
    """What the page is made of when a browser has loaded it, and what it says on its console."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", "--enable-logging=stderr", "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_it_without_an_error(run_script, files, tmp_path):
    run_script(SCRIPT, "--run", "tuned", "--metrics", "one.json", "two.json")
    path = files / "report.html"
    dom, said = browse(path, tmp_path / "profile")
    assert not said
    assert dom.count("<svg") == path.read_text().count("<svg") and dom.count("<polyline") >= 10
    assert "gained query" in dom and "nDCG@10: tuned is better" in dom
    # What it would say of a page that is wrong, so that its silence means something.
    path.write_text("<!doctype html><script>undefined_function()</script>")
    assert "undefined_function is not defined" in browse(path, tmp_path / "profile")[1][0]
