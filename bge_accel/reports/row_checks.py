"""What in a sample of training rows would ruin a run: each finding with its place and what to do about it."""

import itertools
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bge_accel.data.reading import begins_array, check_training_row, open_binary, raw_lines, read_rows
from bge_accel.files.faults import Faults, is_broken_file
from bge_accel.files.finding import find_files
from bge_accel.files.parsing import UNREADABLE, parse_json
from bge_accel.mining.pool import normalise_text
from bge_accel.training.plan import FEW_SHORT, repeated_negatives

Severity = Literal["error", "warning", "note"]

MIN_QUERIES_FOR_SHARES = 20  # of fewer, a share says nothing
OFTEN_MASKED = 0.02  # of the pairs of rows share a positive
REPEATED = 0.01  # from this share on, repetition is more than an accident
MOSTLY_CUT = {"query": 0.2, "passage": 0.6}  # a passage's beginning often says what it is about, a query's does not


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `check` is its stable name, `seen` what was found, `advice` what to do."""

    check: str
    severity: Severity
    seen: str
    advice: str
    where: str | None = None
    """The first place, as `file:line`."""
    count: int | None = None
    share: float | None = None


@dataclass
class Sample:
    """Sound rows with their places, and what is wrong with the others."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    """Place and message of each."""
    num_read: int = 0
    num_rows: int | None = 0
    """That the run takes of all of the files; None where nobody knows."""
    file_sizes: list[int] = field(default_factory=list)
    """Rows of each file that was read."""

    def passages(self) -> Iterable[tuple[int, str]]:
        """Each passage with the number of its row."""
        for index, row in enumerate(self.rows):
            for text in row["pos"] + (row.get("neg") or []):
                yield index, text

    def add(self, where: str, row: Any) -> None:
        """Takes a row in, or what is wrong with it."""
        self.num_read += 1
        wrong = check_training_row(row) if isinstance(row, dict) else ["not an object {...}"]
        self.faults += [(where, what) for what in wrong]
        # A positive among the negatives is refused by the training, but says nothing against the other checks.
        if all(_is_positive_among_negatives(what) for what in wrong):
            self.rows.append(row)
            self.places.append(where)


def _is_positive_among_negatives(fault: str) -> bool:
    return fault.startswith('"neg" holds a text that is also in "pos"')


def read_sample(paths: Sequence[str], limit: int, *, seed: int = 0, max_rows_per_file: int | None = None) -> Sample:
    """Up to `limit` rows of the files, drawn at random from each in equal parts, in the order of the files.

    Args:
        max_rows_per_file: that the run takes, and `num_rows` counts.

    Raises:
        ValueError: a path leads nowhere.
    """
    faults = Faults()
    files = find_files(paths, faults)
    faults.raise_if_any()
    sample, left = Sample(), limit
    sizes = {path: os.path.getsize(path) for path in files}
    # Smallest first: what they leave of their part goes to the larger ones.
    for number, path in enumerate(sorted(files, key=lambda path: sizes[path])):
        taken = _sample_file(path, max(1, left // (len(files) - number)), random.Random(f"{seed}-{path}"), sample)
        left -= taken
    sample.num_rows = sum(min(count, max_rows_per_file or count) for count in sample.file_sizes)
    return sample


def _sample_file(path: str, limit: int, rng: random.Random, sample: Sample) -> int:
    """Adds a file's rows to the sample; lines that are not chosen are counted, not parsed."""
    faults = Faults()
    chosen: list[tuple[int, Any]] = []  # line and row, or the raw line
    count = 0
    try:
        is_lines = not path.endswith(".parquet") and not _is_array(path)
        for line, item in _raw_lines(path) if is_lines else ((line, row) for _, line, row in read_rows(path, faults)):
            count += 1
            if len(chosen) < limit:
                chosen.append((line, item))
            elif (place := int(rng.random() * count)) < limit:  # reservoir: every row has the same chance
                chosen[place] = line, item
        if is_lines and not count:
            faults.add(path, "the file is empty; remove it from the list or fill it")
    except Exception as error:
        if not is_broken_file(error):
            raise
        faults.add(path, f"cannot be read: {error}")
    for line, item in sorted(chosen, key=lambda pair: pair[0]):
        where, of_line = f"{path}:{line}", Faults()
        value = parse_json(where, item, of_line) if is_lines else item
        if value is UNREADABLE:
            sample.num_read += 1
            sample.faults.append((where, of_line.shown[0].removeprefix(f"{where}: ")))
        else:
            sample.add(where, value)
    for shown in faults.shown:
        where, _, what = shown.partition(": ")
        sample.faults.append((where, what))
    sample.file_sizes.append(count)
    return len(chosen)


def _is_array(path: str) -> bool:
    with open_binary(path) as file:
        return begins_array(file)


def _raw_lines(path: str) -> Iterable[tuple[int, bytes]]:
    with open_binary(path) as file:
        yield from raw_lines(file)


def check_rows(
    sample: Sample, *, group_size: int, in_batch_negatives: bool, need_scores: bool = False
) -> list[Finding]:
    """All that can be said of the rows without a model.

    Args:
        group_size: passages per query, one of them positive.
        in_batch_negatives: whether other queries' passages are negatives too.
        need_scores: whether the run learns from a teacher's scores.
    """
    lacking = [i for i, row in enumerate(sample.rows) if not (row.get("pos_scores") and row.get("neg_scores"))]
    return [
        *_broken(sample),
        *_positives_among_negatives(sample),
        *_repetition(sample),
        *_queries_that_are_passages(sample),
        *_negatives(sample, group_size, in_batch_negatives),
        *finding(
            "scores_missing", "error", sample, lacking if need_scores else [],
            "lack the pos_scores or neg_scores that --knowledge_distillation learns from",
            "write them with scripts/score_with_reranker.py; finetune.py refuses rows without",
        ),
    ]  # fmt: skip


def finding(
    check: str, severity: Severity, sample: Sample, indices: Sequence[int], what: str, advice: str
) -> list[Finding]:
    """A finding about some rows of the sample; none where `indices` is empty."""
    if not indices:
        return []
    share = len(indices) / max(len(sample.rows), 1)
    seen = f"{len(indices):,} of {len(sample.rows):,} rows ({'under 0.1%' if share < 0.001 else f'{share:.1%}'}) {what}"
    return [Finding(check, severity, seen, advice, sample.places[indices[0]], len(indices), share)]


def _broken(sample: Sample) -> list[Finding]:
    found = []
    faults = [fault for fault in sample.faults if not _is_positive_among_negatives(fault[1])]
    scores = [fault for fault in faults if "_scores" in fault[1]]
    others = [fault for fault in faults if "_scores" not in fault[1]]
    for check, of_kind, advice in (
        ("broken_rows", others, "mend or remove them: finetune.py refuses the file"),
        ("scores_length", scores, "one finite number for each text, or leave the scores out: finetune.py refuses them"),
    ):
        if of_kind:
            seen = f"{len(of_kind):,} faults in {sample.num_read:,} rows; the first: {of_kind[0][1]}"
            found.append(Finding(check, "error", seen, advice, of_kind[0][0], len(of_kind)))
    return found


def _positives_among_negatives(sample: Sample) -> list[Finding]:
    positives: dict[str, set[str]] = {}
    for row in sample.rows:
        positives.setdefault(normalise_text(row["query"]), set()).update(map(normalise_text, row["pos"]))
    exact, near = [], []
    for index, row in enumerate(sample.rows):
        negatives = row.get("neg") or []
        if set(row["pos"]).intersection(negatives):
            exact.append(index)
        elif positives[normalise_text(row["query"])].intersection(map(normalise_text, negatives)):
            near.append(index)
    advice = 'take these texts out of "neg", or mine again with scripts/mine_hard_negatives.py, which never takes one'
    return [
        *finding(
            "positive_among_negatives", "error", sample, exact, 'have one text in both "pos" and "neg"',
            f"{advice}; finetune.py refuses them",
        ),
        *finding(
            "near_positive_among_negatives", "warning", sample, near,
            'have a "neg" that, but for case and spaces, is a positive of this row or of another row with its query',
            advice,
        ),
    ]  # fmt: skip


def _repetition(sample: Sample) -> list[Finding]:
    rows_of: dict[str, list[int]] = {}
    for index, row in enumerate(sample.rows):
        rows_of.setdefault(row["query"], []).append(index)
    again = [indices for indices in rows_of.values() if len(indices) > 1]
    duplicates, queries = [], []
    for indices in again:
        seen: set[tuple[str, ...]] = set()
        for index in indices:
            key = tuple(sorted(sample.rows[index]["pos"]))
            if key in seen:
                duplicates.append(index)
            elif seen:
                queries.append(index)
            seen.add(key)
    of_positive = Counter(text for row in sample.rows for text in set(row["pos"]))
    shared = [i for i, row in enumerate(sample.rows) if all(of_positive[text] > 1 for text in row["pos"])]
    # Repeated rows share their positives too; they have a finding of their own.
    known = {index for indices in again for index in indices}
    shared = [index for index in shared if index not in known]
    twice = [
        i
        for i, row in enumerate(sample.rows)
        if len(set(map(normalise_text, row.get("neg") or []))) < len(row.get("neg") or [])
    ]

    total = len(sample.rows)
    masked = sum(count * (count - 1) for count in of_positive.values()) / max(total * (total - 1), 1)

    def grave(indices: list[int], share: float = REPEATED) -> Severity:
        return "warning" if len(indices) > share * len(sample.rows) else "note"

    return [
        *finding(
            "duplicate_rows", grave(duplicates), sample, sorted(duplicates), "repeat query and positives of another",
            "remove the repetitions; where they are meant as a weight, give the source a weight instead",
        ),
        *finding(
            "duplicate_queries", grave(queries, 0.05), sample, sorted(queries),
            "have the query of another row, with other positives",
            'put the positives of a query into one row\'s "pos": what one row has as negative may answer the other',
        ),
        *finding(
            "duplicate_passages", "warning" if masked > OFTEN_MASKED else "note", sample, shared,
            "have only positives that other queries have too",
            "in one batch such passages are masked: harmless while `masked` in the log is small; drop texts that answer "
            "everything",
        ),
        *finding(
            "repeated_negatives", grave(twice), sample, twice, 'have the same text several times in "neg"',
            "remove the repetitions: each counts as one more negative",
        ),
    ]  # fmt: skip


def _queries_that_are_passages(sample: Sample) -> list[Finding]:
    passages = {normalise_text(text) for _, text in sample.passages()}
    own, others = [], []
    for index, row in enumerate(sample.rows):
        query = normalise_text(row["query"])
        if query in map(normalise_text, row["pos"]):
            own.append(index)
        elif query in passages:
            others.append(index)
    advice = "the model learns to find the same text again; remove the rows, or look at how they were made"
    return [
        *finding("query_is_own_positive", "error" if len(own) > REPEATED * len(sample.rows) else "warning", sample, own,
                 "have the query itself as a positive", advice),
        *finding("query_is_passage", "warning" if len(others) > REPEATED * len(sample.rows) else "note", sample, others,
                 "have a query that is a passage of some row", advice),
    ]  # fmt: skip


def _negatives(sample: Sample, group_size: int, in_batch_negatives: bool) -> list[Finding]:
    if group_size == 1:
        unused = [i for i, row in enumerate(sample.rows) if row.get("neg")]
        return finding(
            "negatives_unused", "warning", sample, unused, "have negatives, which --train_group_size 1 leaves unused",
            "raise --train_group_size to 2 or more",
        )  # fmt: skip
    wanted = group_size - 1
    none = [i for i, row in enumerate(sample.rows) if not row.get("neg")]
    few, fills = repeated_negatives(np.array([len(row.get("neg") or []) for row in sample.rows]), group_size)
    found = []
    if in_batch_negatives:
        found += finding(
            "no_negatives", "warning" if len(none) > REPEATED * len(sample.rows) else "note", sample, none,
            f"have no negatives: {wanted} passages of other rows are drawn for each",
            "mine negatives with scripts/mine_hard_negatives.py, or save the time by --train_group_size 1 and a larger "
            "batch",
        )  # fmt: skip
    else:
        found += finding(
            "only_random_negatives", "error", sample, none,
            f"have no negatives while in-batch negatives are off: all they meet is {wanted} random passages",
            "mine negatives with scripts/mine_hard_negatives.py, or leave out --use_inbatch_neg False",
        )  # fmt: skip
    found += finding(
        "negatives_repeated", "warning" if len(few) > FEW_SHORT * len(sample.rows) else "note", sample, few.tolist(),
        f"have fewer than the {wanted} negatives that --train_group_size {group_size} asks for: they are repeated",
        f"--train_group_size {fills}, or mine more" if fills < group_size else "mine more for these rows",
    )  # fmt: skip
    return found


def check_instruction(
    sample: Sample, kind: Literal["query", "passage"], prefix: str, own: str, model: str, *, flag: str
) -> list[Finding]:
    """Instructions that are missing or stand twice.

    Args:
        prefix: what the run puts before each text.
        own: what the model says of itself.
        model: its name, which tells what it was trained with where it does not say so.
        flag: that sets the instruction.
    """
    texts = [(i, row["query"]) for i, row in enumerate(sample.rows)] if kind == "query" else list(sample.passages())

    def with_prefix(start: str | None) -> list[int]:
        found = []
        for index, text in texts:
            wanted = sample.rows[index].get("prompt") or start if kind == "query" else start
            if wanted and wanted.strip() and text.startswith(wanted.strip()):
                found.append(index)
        return sorted(set(found))

    doubled = with_prefix(prefix)
    found = finding(
        "instruction_doubled", "error" if len(doubled) > REPEATED * len(sample.rows) else "warning", sample, doubled,
        f"have a {kind} that already starts with the instruction {prefix or 'of the row'!r}, so it stands twice",
        f'take it out of the rows, or set {flag} ""',
    )  # fmt: skip
    in_rows = _common_start([text for _, text in texts])
    if in_rows and not doubled:
        what = f"nearly every {kind} starts with {in_rows!r}"
        found.append(
            Finding(
                "instruction_in_rows", "warning", what,
                f"if it is an instruction, take it out of the rows and give it by {flag}: the saved model then puts it "
                "before what it is asked, and its own is not added to it", sample.places[0],
            )
        )  # fmt: skip
    if not prefix and not doubled and not in_rows:
        wanted = own or _trained_with(model, kind)
        if wanted and len(with_prefix(wanted)) < len(sample.rows) / 2:
            said = "says of itself" if own else "was, by its name, trained with"
            found.append(
                Finding(
                    "instruction_missing", "warning",
                    f"no {kind} instruction, but the model {said} {wanted!r}", f"set {flag} {wanted!r}",
                )
            )  # fmt: skip
    elif own and prefix != own and not doubled:
        found.append(
            Finding(
                "instruction_changed", "note", f"the {kind} instruction is {prefix!r}, the model's own is {own!r}",
                f"leave {flag} out to keep the model's own; a new one has to be learnt first",
            )
        )  # fmt: skip
    return found


def _common_start(texts: list[str]) -> str | None:
    """What nearly all texts start with, if that looks like more than a habit of language."""
    if len(texts) < MIN_QUERIES_FOR_SHARES:
        return None
    ordered = sorted(texts)
    skip = len(ordered) // 40  # between the 2.5th and the 97.5th percentile in alphabetical order
    pairs = zip(ordered[skip], ordered[-1 - skip], strict=False)
    start = "".join(first for first, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    start = start[: max(start.rfind(end) for end in " :：") + 1].strip()
    return start if len(start.split()) >= 3 or start.endswith((":", "：")) else None


def _trained_with(model: str, kind: str) -> str | None:
    """The instruction of models that do not carry it in their folder, by their name."""
    name = os.path.basename(os.path.normpath(model)).lower()
    words = name.replace("_", "-").split("-")
    if "e5" in words and "instruct" not in words and "mistral" not in words:
        return f"{kind}: "
    if kind == "query" and name.startswith("bge-") and {"small", "base", "large"}.intersection(words):
        if "en" in words:
            return "Represent this sentence for searching relevant passages: "
        if "zh" in words:
            return "为这个句子生成表示以用于检索相关文章："
    return None


def check_lengths(
    sample: Sample,
    kind: Literal["query", "passage"],
    lengths: Sequence[tuple[int, int]],
    max_length: int,
    longest: int,
) -> list[Finding]:
    """Whether many texts are cut.

    Args:
        lengths: (row, tokens before cutting) of the texts.
        longest: tokens that the model takes at most.
    """
    cut = [row for row, length in lengths if length > max_length]
    share = len(cut) / max(len(lengths), 1)
    if share < 0.1:
        return []
    enough = sorted(length for _, length in lengths)[int(0.9 * (len(lengths) - 1))]
    name = f"--{kind}_max_len"
    plural = "queries" if kind == "query" else "passages"
    if max_length >= longest:
        advice = f"the model takes no more than {longest}: split long texts, or take a model with more positions"
    else:
        advice = f"{name} {min(enough, longest)} leaves 9 of 10 whole; it costs time and memory"
        advice += "" if enough <= longest else f" (the model takes {longest} at most: split longer texts)"
    return [
        Finding(
            f"{kind}_truncated",
            "warning" if share > MOSTLY_CUT[kind] else "note",
            f"{len(cut):,} of {len(lengths):,} {plural} ({share:.0%}) are longer than {name} {max_length} and are cut",
            advice,
            sample.places[cut[0]],
            len(cut),
            share,
        )
    ]


def check_unknown_tokens(sample: Sample, shares: Sequence[tuple[int, float]]) -> list[Finding]:
    """Whether the model's vocabulary fits the texts; `shares` has (row, unknown tokens / tokens) of each text."""
    unreadable = sorted({row for row, share in shares if share > 0.3})
    return finding(
        "unknown_tokens",
        "error" if len(unreadable) > 0.2 * len(sample.rows) else "warning",
        sample,
        unreadable if len(unreadable) > REPEATED * len(sample.rows) else [],
        "have a text of which the tokenizer does not know a third or more",
        "take a model for the language of the data, and look at the encoding of the file",
    )


def check_held_out(sample: Sample, queries: Sequence[str], name: str) -> list[Finding]:
    """Whether the evaluation's queries are trained on."""
    held_out = set(map(normalise_text, queries))
    both = [i for i, row in enumerate(sample.rows) if normalise_text(row["query"]) in held_out]
    return finding(
        "evaluation_leak", "error" if len(both) > REPEATED * len(held_out) else "warning", sample, both,
        f"have a query of the evaluation set {name}", "take them out of the training data: what they measure is memory",
    )  # fmt: skip
