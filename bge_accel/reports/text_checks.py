"""What the doctor says of instructions, of lengths, and of texts that a tokenizer does not know."""

import random
from collections.abc import Mapping
from typing import Any

from bge_accel.models.settings import instruction_prefix
from bge_accel.reports.row_checks import Finding, Sample, check_instruction, check_lengths, check_unknown_tokens
from bge_accel.training.plan import DataOptions, PlannedSource

MAX_TEXTS = 20_000  # of a kind that are tokenised
UNUSUAL = 40  # characters a token that no text exceeds; what is cut off would be cut anyway


def check_texts(
    sample: Sample, planned: PlannedSource, options: DataOptions, name: str, model: Mapping[str, Any]
) -> tuple[list[Finding], list[float]]:
    """Findings about instructions and lengths, and the tokens that each row brings to a batch.

    Args:
        name: of the tokenizer.
        model: its tokenizer, its settings as they are used ("settings") and as it has them ("own"), and its "longest" text.
    """
    settings, own, tokenizer = model["settings"], model["own"], model["tokenizer"]
    of_source = instruction_prefix(planned.source.query_instruction_for_retrieval, options.query_instruction_format)
    query_prefix = settings.query_prefix if of_source is None else of_source
    of_source = instruction_prefix(planned.source.passage_instruction_for_retrieval, options.passage_instruction_format)
    passage_prefix = settings.passage_prefix if of_source is None else of_source
    found = check_instruction(
        sample, "query", query_prefix, own.query_prefix, name, flag="--query_instruction_for_retrieval"
    )
    found += check_instruction(
        sample, "passage", passage_prefix, own.passage_prefix, name, flag="--passage_instruction_for_retrieval"
    )

    def lengths(texts: list[tuple[int, str]], max_len: int) -> tuple[list[tuple[int, int]], list[tuple[int, float]]]:
        """Row and tokens of each text, and row and share of tokens that the tokenizer does not know."""
        if len(texts) > MAX_TEXTS:
            texts = sorted(random.Random(options.seed).sample(texts, MAX_TEXTS))
        ids = tokenizer([text[: max_len * UNUSUAL] for _, text in texts])["input_ids"]
        unknown = tokenizer.unk_token_id
        return [(row, len(i)) for (row, _), i in zip(texts, ids, strict=True)], [
            (row, i.count(unknown) / max(len(i) - 2, 1)) for (row, _), i in zip(texts, ids, strict=True)
        ]

    queries = [
        (index, (query_prefix if own_prefix is None else own_prefix) + row["query"])
        for index, row in enumerate(sample.rows)
        for own_prefix in [instruction_prefix(row.get("prompt"), options.query_instruction_format)]
    ]
    of_queries, unknown = lengths(queries, options.query_max_len)
    of_passages, unknown_in_passages = lengths(
        [(index, passage_prefix + text) for index, text in sample.passages()], options.passage_max_len
    )
    found += check_lengths(sample, "query", of_queries, options.query_max_len, model["longest"])
    found += check_lengths(sample, "passage", of_passages, options.passage_max_len, model["longest"])
    found += check_unknown_tokens(sample, unknown + unknown_in_passages)

    passages_of: dict[int, list[int]] = {}
    for row, length in of_passages:
        passages_of.setdefault(row, []).append(min(length, options.passage_max_len))
    tokens = [
        min(length, options.query_max_len) + planned.group_size * sum(passages_of[row]) / len(passages_of[row])
        for row, length in of_queries
        if row in passages_of
    ]
    return found, tokens
