"""What a run sees at each batch: a function of (seed, batch index) alone, whoever asks and when."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from bge_accel.data.examples import Example, balanced_positions, batch_positions, draw_example, expected_tokens
from bge_accel.data.sources import SourceSchedule
from bge_accel.encoding.batching import TokenBatch, make_token_batch
from bge_accel.encoding.pipeline import prefetch
from bge_accel.encoding.transfer import to_device
from bge_accel.models.loading import check_prefix
from bge_accel.models.settings import instruction_prefix
from bge_accel.models.tokenizing import tokenize
from bge_accel.training.feeds import Feed
from bge_accel.training.plan import DataOptions, RunPlan


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One process's share of a global batch, ready for the encoder."""

    index: int
    examples: list[Example]
    sources: list[int]
    """For each example the number of its source."""
    feed: Feed
    """The source, or one of the mixed sources, which agree in what the loss needs to know."""
    tokens: TokenBatch
    """All queries, then all passages."""
    streams: list[dict]
    """Where each stream stands after this batch."""
    passes: list[int]
    """How often each stream has been read to its end, this batch included."""

    @property
    def passage_ids(self) -> np.ndarray:
        """(queries * group size,) int64: `text_id` of each passage."""
        return np.array([i for example in self.examples for i in example.passage_ids], dtype=np.int64)

    def teacher_scores(self, device: torch.device) -> torch.Tensor:
        """(queries, group size) float32."""
        scores = np.array([example.teacher_scores for example in self.examples], dtype=np.float32)
        return to_device(torch.from_numpy(scores), device)


class Batches:
    """The batches of one process, prepared in a background thread.

    Args:
        feeds: with their rows in order, or their streams open.
        max_tokens: of a micro-batch.
        packed_for: configuration of a model that takes texts without padding; None pads.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        plan: RunPlan,
        options: DataOptions,
        tokenizer: Any,
        *,
        rank: int,
        num_processes: int,
        max_tokens: int,
        packed_for: Any,
    ) -> None:
        self.feeds, self.plan, self.options, self.tokenizer = feeds, plan, options, tokenizer
        self.rank, self.num_processes, self.max_tokens, self.packed_for = rank, num_processes, max_tokens, packed_for
        self.schedule = SourceSchedule(plan.shares, options.seed)

    def starting_at(self, first: int) -> Iterator[Batch]:
        """From a batch on; ValueError for a row of a stream, which is checked as it is read."""
        indices = itertools.count(first) if self.plan.is_open else range(first, self.plan.num_batches)
        return prefetch(map(self.make, indices))

    def make(self, index: int) -> Batch:
        """One batch. Streams give their next rows, whatever the index."""
        options = self.options
        number, turn = (0, index) if options.mix_sources else self.schedule[index]
        lead = self.feeds[number]
        drawn = [self._draw(number, place) for place in self._places(number, turn)]
        examples = [example for _, example in drawn]
        token_ids = tokenize(self.tokenizer, [example.query for example in examples], options.query_max_len)
        passages = [text for example in examples for text in example.passages]
        token_ids += tokenize(self.tokenizer, passages, options.passage_max_len)
        tokens = make_token_batch(
            token_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            max_tokens=self.max_tokens,
            pad_to_multiple_of=options.pad_to_multiple_of,
            packed_for=self.packed_for,
        )
        streams = [feed.stream for feed in self.feeds if feed.stream is not None]
        return Batch(
            index=index,
            examples=examples,
            sources=[source for source, _ in drawn],
            feed=lead,
            tokens=tokens,
            streams=[stream.state_dict() for stream in streams],
            passes=[stream.epochs_done for stream in streams],
        )

    def _places(self, source: int, turn: int) -> Sequence[int]:
        """This process's places in a source, or in all of them where they are mixed."""
        lead = self.feeds[source]
        where = (turn, lead.batch_size, self.num_processes, self.rank, self.plan.end_of_data)
        return batch_positions(*where) if lead.rows is None else balanced_positions(*where, self._cost_in(source))

    def _draw(self, source: int, place: int) -> tuple[int, Example]:
        """The example at a place, and the number of its source."""
        options = self.options
        if options.mix_sources:
            source, place = self.schedule[place]
        feed = self.feeds[source]
        if feed.stream is not None:
            rows: Any
            rows, row, epoch, key = feed.stream.take(1)[0]
            if prompt := rows[row].get("prompt"):
                prefix, length = self._query_prefix(feed, prompt), options.query_max_len
                check_prefix(self.tokenizer, prefix, length, "--query_max_len", "query", rows.place(row))
        else:
            assert feed.rows is not None and feed.order is not None
            rows, (epoch, row) = feed.rows, feed.order[place]
            key = row
        return source, draw_example(
            rows,
            row,
            epoch,
            key=key,
            seed=options.seed,
            group_size=feed.group_size,
            query_prefix=partial(self._query_prefix, feed),
            passage_prefix=feed.passage_prefix,
            shuffle_ratio=options.shuffle_ratio,
            teacher_scores=options.knowledge_distillation,
        )

    def _query_prefix(self, feed: Feed, prompt: str | None) -> str:
        own = instruction_prefix(prompt, self.options.query_instruction_format)
        return feed.query_prefix if own is None else own

    def _cost_in(self, source: int) -> Callable[[int], int]:
        """About how many tokens stand at a place of a source, or in all of them where they are mixed."""
        options = self.options

        def cost(place: int) -> int:
            number, place = self.schedule[place] if options.mix_sources else (source, place)
            feed = self.feeds[number]
            assert feed.rows is not None and feed.order is not None
            epoch, row = feed.order[place]
            return expected_tokens(
                feed.rows.text_bytes(row),
                row,
                epoch,
                seed=options.seed,
                group_size=feed.group_size,
                query_max_len=options.query_max_len,
                passage_max_len=options.passage_max_len,
            )

        return cost
