"""The step on paper: what has to hold whatever the rates, and that the guide shows what the script prints."""

import runpy
from itertools import pairwise
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
paper = runpy.run_path(str(REPO / "scripts" / "benchmarks" / "scaling.py"))
Config, step_cost, table = paper["Config"], paper["step_cost"], paper["table"]


def test_one_gpu_sends_nothing() -> None:
    step = step_cost(Config(), 1)
    assert step.gather == step.gradients == step.gathered_megabytes == 0 and step.efficiency > 0.99


def test_more_gpus_never_help_one_step() -> None:
    steps = [step_cost(Config(), gpus) for gpus in (1, 2, 8, 16, 64, 512)]
    assert all(a.total <= b.total and a.efficiency >= b.efficiency for a, b in pairwise(steps))
    assert len({step.encoder for step in steps}) == 1


def test_bytes_by_hand() -> None:
    """64 GPUs x 128 x 8 passages of 768 float32 numbers, less the own ones; 109 million gradients, twice around."""
    step = step_cost(Config(latency=0), 64)
    assert step.gathered_megabytes == pytest.approx(63 * 128 * 8 * 768 * 4 / 1e6)
    assert step.gather == pytest.approx(2e3 * 63 * 128 * 8 * 768 * 4 / 40e9)
    assert step.gradients == pytest.approx(1e3 * 2 * 63 / 64 * 109e6 * 4 / 40e9)


@pytest.mark.parametrize("config", [Config(), Config(model="large", queries=32)])
def test_the_guide_shows_what_is_printed(config: object) -> None:
    assert table(config) in (REPO / "docs" / "scaling.md").read_text(encoding="utf-8")
