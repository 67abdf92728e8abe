"""The sources of a run: their rows, checked, and what the run puts before their texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bge_accel.data.examples import RowOrder
from bge_accel.data.rows import TrainingRows, join_known_positives
from bge_accel.data.sources import find_sources, merge_small
from bge_accel.training.plan import DataOptions, PlannedSource, RunPlan, check_sources, repeated_negatives

if TYPE_CHECKING:
    from bge_accel.data.streaming import RowStream
    from bge_accel.models.settings import EmbeddingSettings


@dataclass(kw_only=True)
class Feed(PlannedSource):
    """One source of rows, with what the run does to it."""

    rows: TrainingRows | None
    """None for a stream, which is opened later."""
    stream: "RowStream | None" = None
    query_prefix: str = ""
    passage_prefix: str = ""
    order: RowOrder | None = None
    num_bare: int = 0
    """Rows without negatives of their own, where a group needs some."""

    def set_prefixes(self, settings: "EmbeddingSettings", options: DataOptions) -> None:
        """Takes the source's own instructions, or the model's."""
        from bge_accel.models.settings import instruction_prefix

        own = instruction_prefix(self.source.query_instruction_for_retrieval, options.query_instruction_format)
        self.query_prefix = settings.query_prefix if own is None else own
        own = instruction_prefix(self.source.passage_instruction_for_retrieval, options.passage_instruction_format)
        self.passage_prefix = settings.passage_prefix if own is None else own


def load_feeds(options: DataOptions) -> tuple[list[Feed], int]:
    """The sources of rows, every row checked, and how many rows of small files were dropped. Streams are opened later.

    Raises:
        ValueError: something is wrong with a source or any row, or settings of sources exclude each other.
    """
    sources = find_sources(options.train_data, one_per_file=options.same_dataset_within_batch)

    def read(paths: list[str]) -> TrainingRows:
        return TrainingRows(
            paths,
            max_rows_per_file=options.max_example_num_per_dataset,
            seed=options.seed,
            need_scores=options.knowledge_distillation,
            cache_folder=options.cache_path,
        )

    num_dropped = 0
    if options.streaming:
        feeds = [Feed.of(source, options, rows=None, num_rows=None) for source in sources]
    else:
        if len(sources) > 1:  # the faults of all of them together
            read([path for source in sources for path in source.path])
        rows = [read(source.path) for source in sources]
        if options.small_threshold:
            limits = options.small_threshold, options.drop_threshold
            sources, num_dropped = merge_small(sources, [len(of) for of in rows], *limits)
            rows = [read(source.path) for source in sources]
        join_known_positives(rows)
        feeds = [Feed.of(source, options, rows=of, num_rows=len(of)) for source, of in zip(sources, rows, strict=True)]
    check_sources(feeds, options)
    for feed in feeds:
        if feed.rows is not None and feed.group_size > 1:
            feed.num_bare = feed.rows.check_negatives()
    return feeds, num_dropped


def position_of(feeds: Sequence[Feed], plan: RunPlan, options: DataOptions, num_processes: int) -> dict[str, Any]:
    """All that the place of a row in the run depends on, for a checkpoint."""
    position: dict[str, Any] = {
        "seed": options.seed,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "mix_sources": options.mix_sources,
        "sources": {
            feed.source.name: {
                "rows": feed.rows.digest() if feed.rows else feed.source.path,
                "share": share,
                "global_batch_size": feed.batch_size * num_processes,
            }
            for feed, share in zip(feeds, plan.shares.tolist(), strict=True)
        },
    }
    if options.streaming:  # streams are divided among the processes
        position |= {"num_processes": num_processes, "shuffle_buffer_size": options.shuffle_buffer_size}
    return position


def open_feeds(
    feeds: Sequence[Feed], options: DataOptions, rank: int, num_processes: int, states: Sequence[dict] | None
) -> None:
    """Puts local rows into their order, and opens streams where they stood.

    Args:
        states: of each stream (`Batch.streams`); None begins them.

    Raises:
        ValueError: a stream cannot be read.
    """
    for number, feed in enumerate(feeds):
        if feed.rows is not None:
            feed.order = RowOrder(len(feed.rows), options.seed)
            continue
        from bge_accel.data.streaming import RowStream

        feed.stream = RowStream(
            feed.source.path,
            seed=options.seed,
            rank=rank,
            num_ranks=num_processes,
            buffer_size=options.shuffle_buffer_size,
            need_scores=options.knowledge_distillation,
            state=states[number] if states else None,
        )


def other_prefixes(feeds: Sequence[Feed], query_format: str, passage_format: str) -> dict[str, dict[str, str]]:
    """What sources and rows put before queries and passages in place of the run's instructions, and which row does."""
    from bge_accel.models.settings import instruction_prefix

    found: dict[str, dict[str, str]] = {}
    for kind, format in (("query", query_format), ("passage", passage_format)):
        own = [instruction_prefix(getattr(feed.source, f"{kind}_instruction_for_retrieval"), format) for feed in feeds]
        found[kind] = {prefix: "" for prefix in own if prefix is not None}
    for feed in feeds:
        if feed.rows is not None:
            for prompt, row in feed.rows.first_with_prompt().items():
                found["query"].setdefault(str(instruction_prefix(prompt, query_format)), feed.rows.place(row))
    return found


def too_few_negatives(rows: TrainingRows, group_size: int) -> str | None:
    """What is said of rows whose negatives repeat within a group, and which group size would not have it."""
    few, fills = repeated_negatives(rows.num_negatives(), group_size)
    if not len(few):
        return None
    way_out = f"; take --train_group_size {fills}, or mine more" if fills < group_size else ""
    return (
        f"{len(few):,} of {len(rows):,} rows have fewer negatives than the {group_size - 1} of --train_group_size "
        f"{group_size}, so these repeat within a group{way_out}"
    )
