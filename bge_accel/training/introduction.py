"""What a run says before it begins: what it is going to do, and what may not be as the user thinks."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from bge_accel.files.text import shorten
from bge_accel.training.feeds import Feed, too_few_negatives
from bge_accel.training.plan import DataOptions, RunPlan

if TYPE_CHECKING:
    from bge_accel.models.settings import EmbeddingSettings
    from bge_accel.training.engine import Engine


def introduce(
    engine: "Engine",
    options: DataOptions,
    plan: RunPlan,
    feeds: Sequence[Feed],
    settings: "EmbeddingSettings",
    *,
    temperature: float,
    measured: Mapping[str, tuple[int, int]],
    goes_on: str | None,
    num_dropped: int,
) -> None:
    """Says it all, on the first process.

    Args:
        measured: queries and passages of each set that is measured.
        goes_on: where from, in words.
        num_dropped: rows of small files that are left out.
    """
    say, world = engine.say, engine.world
    amount = "rows from streams" if options.streaming else f"{plan.num_rows or 0:,} rows"
    epochs = f" ({plan.num_epochs:.2f} epochs)" if plan.num_epochs is not None else ""
    say(
        f"{amount}, {plan.num_steps:,} steps{epochs}, global batch {plan.queries_per_step:g} queries ({world} process(es) x "
        f"{plan.queries_per_batch / world:g} x {options.gradient_accumulation_steps} accumulated); each query meets "
        f"{plan.met(0)}; {settings.pooling} pooling, {'' if settings.normalize else 'not '}normalised, temperature "
        f"{temperature:g}; {engine.computes_in} on {engine.device.type}; query instruction {shorten(settings.query_prefix)}"
    )
    for name, (queries, passages) in measured.items():
        say(f"  measured on {name}: {queries:,} queries among {passages:,} passages")
    for number, (feed, share) in enumerate(zip(feeds if len(feeds) > 1 else (), plan.shares.tolist(), strict=False)):
        say(
            f"  {share:.1%} {feed.source.name}: {f'{len(feed.rows):,} rows' if feed.rows else 'a stream'}, {feed.batch_size} "
            f"queries a process, each meets {plan.met(number)}; query instruction {shorten(feed.query_prefix)}"
        )
    if goes_on is not None:
        say(f"going on after {goes_on}")
    for note in _notes(engine, options, feeds, num_dropped):
        say(f"note: {note}")


def _notes(engine: "Engine", options: DataOptions, feeds: Sequence[Feed], num_dropped: int) -> Iterator[str]:
    if options.negatives_cross_device and engine.world == 1:
        yield "--negatives_cross_device has no effect on one process"
    if options.streaming and options.cache_path is not None:
        yield "--cache_path has no effect on streams: nothing of them is kept"
    if num_dropped:
        yield f"{num_dropped:,} rows of small files are left out (--drop_threshold {options.drop_threshold})"
    if options.streaming and options.max_example_num_per_dataset < 100_000_000:
        yield "--max_example_num_per_dataset has no effect on streams"
    if num_bare := sum(feed.num_bare for feed in feeds):
        yield f"{num_bare:,} rows have no negatives; theirs are drawn from other rows' passages"
    for feed in feeds:
        if feed.rows and (note := too_few_negatives(feed.rows, feed.group_size)):
            yield f"{f'{feed.source.name}: ' if len(feeds) > 1 else ''}{note}"
    if options.use_inbatch_neg and any("no_in_batch_neg" in os.path.abspath(path) for path in options.train_data):
        yield "a folder's name turns nothing off here: for data without in-batch negatives, --use_inbatch_neg False"
    if engine.is_sharded and engine.options.activation_memory_budget is not None:
        yield "--activation_memory_budget has no effect under FSDP and DeepSpeed: all activations are recomputed"
    if engine.is_deepspeed:
        yield "optimiser, schedule, accumulation, clipping and batch size come from the flags, not DeepSpeed's file"
