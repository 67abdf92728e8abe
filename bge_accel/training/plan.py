"""The plan of a training run, pure arithmetic: what each source's settings are, how many steps there are, what a query meets.

`scripts/finetune.py` does what the plan says, and `scripts/doctor.py` foretells it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from bge_accel.data.sources import Source, source_shares

FEW_SHORT = 0.05  # of the rows may lack negatives for the group size that is proposed


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How rows are read, mixed, drawn and cut; each named as the flag of scripts/finetune.py."""

    train_data: list[str]
    same_dataset_within_batch: bool
    small_threshold: int
    drop_threshold: int
    max_example_num_per_dataset: int
    cache_path: str | None
    streaming: bool
    shuffle_buffer_size: int
    mix_sources: bool
    sampling_temperature: float
    seed: int
    num_train_epochs: float
    max_steps: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    dataloader_drop_last: bool
    train_group_size: int
    use_inbatch_neg: bool
    negatives_cross_device: bool
    knowledge_distillation: bool
    query_max_len: int
    passage_max_len: int
    query_instruction_format: str
    passage_instruction_format: str
    shuffle_ratio: float
    pad_to_multiple_of: int | None


@dataclass(kw_only=True)
class PlannedSource:
    """One source with its settings, its own or the run's."""

    source: Source
    num_rows: int | None
    """None for a stream."""
    epochs: float
    group_size: int
    batch_size: int
    """Queries on each process."""
    in_batch_negatives: bool

    @classmethod
    def of(cls, source: Source, options: DataOptions, **more: Any) -> Self:
        """The source with the run's settings where it has none of its own."""
        in_batch = source.use_inbatch_neg
        return cls(
            source=source,
            epochs=source.epochs or options.num_train_epochs,
            group_size=source.train_group_size or options.train_group_size,
            batch_size=source.per_device_train_batch_size or options.per_device_train_batch_size,
            in_batch_negatives=options.use_inbatch_neg if in_batch is None else in_batch,
            **more,
        )


def check_sources(sources: Sequence[PlannedSource], options: DataOptions) -> None:
    """Raises ValueError where settings of sources exclude each other, or those of the run."""
    for planned in sources:
        name = planned.source.name
        if not planned.in_batch_negatives and planned.group_size == 1:
            raise ValueError(f"source {name!r}: a group of 1 without in-batch negatives leaves nothing to learn from")
        if options.knowledge_distillation and planned.group_size == 1:
            raise ValueError(
                f"source {name!r}: --knowledge_distillation compares the passages of a group; 1 is too few"
            )
        if options.streaming and planned.source.epochs is not None:
            raise ValueError(
                f"source {name!r}: nobody knows how long an epoch of a stream is; give the sources weights"
            )
        for setting in ("group_size", "batch_size", "in_batch_negatives") if options.mix_sources else ():
            values = getattr(sources[0], setting), getattr(planned, setting)
            if values[0] != values[1]:
                raise ValueError(
                    f"source {name!r}: --mix_sources puts all sources into one batch, but their {setting} differ: "
                    f"{values[0]} and {values[1]}"
                )
        if options.sampling_temperature != 1 and (planned.source.weight or planned.source.epochs):
            raise ValueError("--sampling_temperature and a source's weight or epochs exclude each other; leave one out")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How much of what comes in a run."""

    num_rows: int | None
    """Of all sources; None where one is a stream."""
    shares: np.ndarray
    """(sources,) of the batches; of the rows where sources are mixed."""
    queries_per_batch: float
    """On all processes; the mean where sources differ."""
    gradient_accumulation_steps: int
    num_batches: int
    end_of_data: int | None
    """Queries after which the last batch is cut short; None for full batches only."""
    is_open: bool
    """Whether more batches may come: the run ends after so many steps, and float16 may skip some."""
    negatives: list[int]
    """Of each source: how many other passages a query is compared with, as far as the rows give different ones."""
    negatives_of_full_batch: list[int]
    """The same with rows without end."""

    @property
    def num_steps(self) -> int:
        """Steps of the optimiser."""
        return math.ceil(self.num_batches / self.gradient_accumulation_steps)

    @property
    def queries_per_step(self) -> float:
        """On all processes."""
        return self.queries_per_batch * self.gradient_accumulation_steps

    @property
    def num_epochs(self) -> float | None:
        """Passes over all rows; None where nobody knows how many rows there are."""
        return None if self.num_rows is None else self.num_batches * self.queries_per_batch / self.num_rows

    def place_in_step(self, batch: int) -> tuple[int, bool]:
        """How many batches the step of a batch has (the last step may have fewer), and whether it is the last of them."""
        place = batch % self.gradient_accumulation_steps
        size = self.gradient_accumulation_steps
        if not self.is_open:
            size = min(size, self.num_batches - (batch - place))
        return size, place == size - 1

    def is_end(self, step: int, num_batches: int) -> bool:
        """Whether the run ends after so many steps and batches."""
        return step == self.num_steps or (not self.is_open and num_batches == self.num_batches)

    def epochs_after(self, num_batches: int, passes: Sequence[int]) -> float:
        """Passes over all rows.

        Args:
            passes: of each stream, where nobody knows how many rows there are: the most counts.
        """
        return max(passes) if self.num_rows is None else num_batches * self.queries_per_batch / self.num_rows

    def met(self, source: int) -> str:
        """How many negatives a query of a source meets, in words."""
        least, most = self.negatives[source], self.negatives_of_full_batch[source]
        return f"{least:,} negatives" + (
            "" if least == most else f" (of the {most:,} of such a batch: the rows give no more)"
        )


def plan_run(sources: Sequence[PlannedSource], options: DataOptions, num_processes: int) -> RunPlan:
    """The plan of a run.

    Raises:
        ValueError: the rows do not fill one step, and what does not fill one is dropped.
    """
    mixed, max_steps, drop_last = options.mix_sources, options.max_steps, options.dataloader_drop_last
    accumulated = options.gradient_accumulation_steps
    sizes = [planned.num_rows for planned in sources]
    known = [size for size in sizes if size is not None]
    num_rows = sum(known) if len(known) == len(sizes) else None
    amounts = [
        1.0 if size is None else planned.epochs * size / (1 if mixed else planned.batch_size)
        for planned, size in zip(sources, sizes, strict=True)
    ]
    shares = source_shares([planned.source for planned in sources], amounts, options.sampling_temperature)
    sized = zip(shares.tolist(), sources, strict=True)
    per_batch = num_processes * sum(share * planned.batch_size for share, planned in sized)
    total = math.ceil(sum(planned.epochs * (size or 0) for planned, size in zip(sources, sizes, strict=True)))
    if max_steps > 0:
        num_batches = max_steps * accumulated
    elif drop_last:
        per_step = per_batch * accumulated
        num_batches = math.floor(total / per_step) * accumulated
    else:
        num_batches = math.ceil(total / per_batch)
    if num_batches == 0:
        raise ValueError(
            f"{num_rows} rows x {sources[0].epochs:g} epochs do not fill one step of {per_batch:g} queries x "
            f"{accumulated}; lower --per_device_train_batch_size or leave out --dataloader_drop_last"
        )
    end_of_data = total if max_steps < 1 and not drop_last and (mixed or len(sources) == 1) else None

    def negatives(planned: PlannedSource, most_queries: float) -> int:
        if not planned.in_batch_negatives:
            return planned.group_size - 1
        queries = planned.batch_size * (num_processes if options.negatives_cross_device else 1)
        return int(min(queries, most_queries)) * planned.group_size - 1

    limits = [(num_rows if mixed else size) or math.inf for size in sizes]
    return RunPlan(
        num_rows=num_rows,
        shares=shares,
        queries_per_batch=per_batch,
        gradient_accumulation_steps=accumulated,
        num_batches=num_batches,
        end_of_data=end_of_data,
        is_open=max_steps > 0,
        negatives=[
            negatives(planned, min(limit, end_of_data or math.inf))
            for planned, limit in zip(sources, limits, strict=True)
        ],
        negatives_of_full_batch=[negatives(planned, math.inf) for planned in sources],
    )


def repeated_negatives(num_negatives: np.ndarray, group_size: int) -> tuple[np.ndarray, int]:
    """Which rows have negatives, but too few for a group, so that they repeat in it; and the group that nearly all can fill.

    Args:
        num_negatives: (rows,) of each row.

    Returns:
        Indices of these rows, and the largest group size that all but a twentieth of the rows with negatives fill.
    """
    some = num_negatives[num_negatives > 0]
    fills = int(np.quantile(some, FEW_SHORT, method="lower")) + 1 if len(some) else 1
    return np.flatnonzero((num_negatives > 0) & (num_negatives < group_size - 1)), min(fills, group_size)
