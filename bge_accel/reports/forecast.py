"""What a run will take, foretold from a few measured steps."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bge_accel.reports.doctor import Measured, fit_memory, largest_step_tokens, propose_batch
from bge_accel.reports.row_checks import Finding
from bge_accel.training.plan import RunPlan


def cost_of(
    plan: RunPlan,
    measured: Sequence[Measured],
    budget_gb: float,
    free_gb: float,
    row_tokens: Sequence[float],
    world: int,
    shards: bool,
) -> tuple[list[Finding], dict[str, Any]]:
    """Memory, time and the batch to take, and what is wrong with them.

    Args:
        budget_gb: of activations that are kept.
        free_gb: memory that a process has.
        row_tokens: of each row of the sample, with its group.
        world: processes of the run.
        shards: whether the model will be sharded, which was not measured.
    """
    memory, largest = fit_memory(measured, budget_gb), measured[-1]
    batch = round(plan.queries_per_batch / world)
    tokens = largest_step_tokens(row_tokens, batch, plan.num_batches) / (1 - largest.padding)
    peak = memory.peak_gb(tokens)
    per_query = sum(row_tokens) / len(row_tokens)
    per_step = plan.queries_per_step / world * per_query / largest.tokens_per_second
    per_step *= 1 if memory.is_kept(tokens) else 4 / 3
    size, why = propose_batch(
        memory,
        row_tokens,
        padding=largest.padding,
        free_gb=free_gb,
        num_examples=plan.num_steps * plan.queries_per_step if not plan.is_open else None,
        num_rows=plan.num_rows,
        world=world,
    )
    found = []
    if peak > 0.9 * free_gb:
        seen = f"a process will take about {peak:.1f} GB, and {free_gb:.1f} GB are free"
        advice = "--gradient_checkpointing, --activation_memory_budget, --bf16, or a smaller model"
        found.append(Finding("memory", "error" if peak > free_gb else "warning", seen, advice))
    if not memory.is_kept(tokens):
        seen = (
            f"activations of {batch:,} queries take more than the {budget_gb:.1f} GB kept: the rest is computed twice"
        )
        advice = f"nothing, or about {size} queries a process for a third less time a query"
        found.append(Finding("activations_recomputed", "note", seen, advice))
    return found, {
        "peak_memory_gb": peak,
        "free_memory_gb": free_gb,
        "fixed_memory_gb": memory.fixed_gb,
        "memory_gb_per_1000_tokens": 1000 * memory.gb_per_token,
        "tokens_per_query": per_query,
        "seconds_per_step": per_step,
        "seconds_per_epoch": per_step * plan.num_steps / plan.num_epochs if plan.num_epochs else None,
        "seconds": per_step * plan.num_steps,
        "proposed_batch_size": size,
        "proposed_because": why,
        "measured": [asdict(one) for one in measured],
        "one_unsharded_process": world > 1 or shards,
    }


def forecast_lines(forecast: dict[str, Any]) -> list[tuple[str, str]]:
    if not forecast:
        return []
    epochs = f" ({forecast['epochs']:.2f} epochs)" if forecast["epochs"] else ""
    lines = [
        ("steps", f"{forecast['steps']:,} of {forecast['queries_per_step']:g} queries{epochs}"),
        ("negatives", f"{forecast['negatives_per_query']:,} for each query"),
    ]
    if "peak_memory_gb" not in forecast:
        return lines
    epoch = f", {duration(forecast['seconds_per_epoch'])} an epoch" if forecast["seconds_per_epoch"] else ""
    alone = "; of one process, not sharded" if forecast["one_unsharded_process"] else ""
    return [
        *lines,
        ("peak memory", f"{forecast['peak_memory_gb']:.2f} GB, {forecast['free_memory_gb']:.1f} GB are free{alone}"),
        ("time", f"{duration(forecast['seconds_per_step'])} a step{epoch}, {duration(forecast['seconds'])} in all"),
        ("batch", f"up to {forecast['proposed_batch_size']:,} queries a process: {forecast['proposed_because']}"),
    ]


def duration(seconds: float) -> str:
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (math.inf, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    raise AssertionError
