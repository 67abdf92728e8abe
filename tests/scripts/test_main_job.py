"""The demonstration as `make demo` runs it, on the real encoder, with less training."""

import json
from pathlib import Path

import pytest
from helpers.repo import Run


@pytest.mark.slow
def test_the_demonstration_improves_the_real_encoder(tmp_path: Path, real_model: str, run_script: Run) -> None:
    result = run_script(
        *("demo.py", "--output_dir", "demo", "--max_steps", 12, "--batch_size", 32, "--max_length", 16),
        timeout=900,
        cold=True,
    )
    for name in ("MRR@10", "nDCG@10", "Recall@10", "Recall@100"):
        assert any(line.startswith(name) for line in result.stdout.splitlines())
    assert result.stdout.count("\nquery   ") == 3 and "Moved into the top 3" in result.stdout
    base, tuned, merged = (
        json.loads((tmp_path / "demo" / f"{name}-code-search.json").read_text())["metrics"]["nDCG@10"]
        for name in ("base", "tuned", "merged")
    )
    assert tuned > base + 0.005 and merged > base
    assert ["base", "tuned", "merged"] in [line.split() for line in result.stdout.splitlines()]
    assert "negatives mined" in result.stdout and (tmp_path / "demo" / "report.html").exists()
    assert not (tmp_path / "metrics.json").exists()


def test_a_wrong_model_is_refused_at_once(tmp_path: Path, run_script: Run) -> None:
    result = run_script(
        "demo.py", "--model_name_or_path", "./nowhere", "--output_dir", "demo", status=2, timeout=20, cold=True
    )
    assert "./nowhere is not a folder" in result.stderr and not (tmp_path / "demo").exists()
