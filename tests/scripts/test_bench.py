"""`make bench` and its guard."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

REPO = Path(__file__).resolve().parents[2]
BENCH = REPO / "scripts" / "benchmarks" / "bench.py"


def bench(*args: object, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, BENCH, *map(str, args)], capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def write(path: Path, ratios: dict[str, float]) -> Path:
    tools = {tool: {"ratio": ratio} for tool, ratio in ratios.items()}
    path.write_text(json.dumps({"comparisons": [{"name": "train,fp32,demo", "tools": tools}]}))
    return path


def test_check_names_what_fell(tmp_path: Path) -> None:
    before = write(tmp_path / "before.json", {"bge_accel": 1.0, "FlagEmbedding": 3.0, "sentence-transformers": 3.0})
    now = write(tmp_path / "now.json", {"bge_accel": 1.0, "FlagEmbedding": 2.4, "sentence-transformers": 2.6})
    done = bench("--check", before, "--results", now, status=1)
    assert "train,fp32,demo, FlagEmbedding: 3.00 -> 2.40" in done.stderr and "sentence-transformers" not in done.stderr
    assert "none fell" in bench("--check", now, "--results", before).stdout


def test_other_tools_have_to_be_there(tmp_path: Path) -> None:
    done = bench("--peers_python", tmp_path / "python", "--output_dir", tmp_path, status=2)
    assert "make bench" in done.stderr and not list(tmp_path.iterdir())


def ratio_of_least_memory(large: dict) -> float:
    """sentence-transformers' seconds to those of the line with the least memory: the median of the rounds."""
    least = min(large["tools"].values(), key=lambda own: own["megabytes"])
    pairs = zip(large["tools"]["sentence-transformers"]["samples"], least["samples"], strict=True)
    return median(theirs / ours for theirs, ours in pairs)


def test_the_committed_tables_are_made_of_the_committed_figures() -> None:
    """And the README's table is the summary of these."""
    sys.path.insert(0, str(REPO / "scripts" / "benchmarks"))
    from bench import as_markdown, summary_table

    intel, content = (json.loads((REPO / "docs" / f"benchmarks{of}.json").read_text()) for of in ("_intel", ""))
    assert (REPO / "docs" / "benchmarks_intel.md").read_text() == as_markdown(intel)
    assert (REPO / "docs" / "benchmarks.md").read_text() == as_markdown(content)
    quoted = {known["name"]: known["tools"] for known in intel["comparisons"]}["train,fp32,cls long"]
    ratios = [quoted[tool]["ratio"] for tool in ("FlagEmbedding", "sentence-transformers")]
    known = {found["name"]: found for found in content["comparisons"]}
    ratios.append(ratio_of_least_memory(known["large batch"]))
    for readme in ("README.md", "README.zh-CN.md"):
        assert all(f"{ratio:.2f}" in (REPO / readme).read_text() for ratio in ratios)
    assert "\n".join(summary_table(content)) in (REPO / "README.md").read_text()
    chinese = (REPO / "README.zh-CN.md").read_text()
    for line in summary_table(content)[2:]:
        assert line.split("|", 2)[2] in chinese, line


@pytest.mark.slow
@pytest.mark.exhaustive
def test_measures_and_writes(tmp_path: Path) -> None:
    """Two comparisons for real; sentence-transformers is in this environment, FlagEmbedding is left out."""
    args = ["--peers_python", sys.executable, "--rounds", 1, "--only", "loss", "first", "--output_dir", tmp_path]
    assert "FlagEmbedding is not installed" in bench(*args).stderr
    content = json.loads((tmp_path / "benchmarks.json").read_text())
    loss, first = content["comparisons"]
    assert set(first["tools"]) == {"bge_accel", "sentence-transformers"} and loss["agree"]
    assert all(len(tool["samples"]) == 1 and tool["seconds"] > 0 for tool in first["tools"].values())
    # The plain loss holds the matrix of scores and its gradient: 0.5 GB each.
    assert loss["tools"]["plain torch"]["megabytes"] > loss["tools"]["bge_accel"]["megabytes"] + 500
    assert 0 < loss["tools"]["bge_accel"]["share"] < 1.5
    assert (tmp_path / "benchmarks.md").read_text().count("\n| bge_accel | ") == 2
    again = ["--peers_python", sys.executable, "--rounds", 1, "--only", "merge", "--output_dir", tmp_path]
    bench(*again)  # adds to what is there
    names = [found["name"] for found in json.loads((tmp_path / "benchmarks.json").read_text())["comparisons"]]
    assert names == ["loss", "merge", "first step"]
