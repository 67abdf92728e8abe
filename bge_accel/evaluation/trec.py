"""Runs in TREC's form: lines `query-id Q0 passage-id rank score name`, which trec_eval and its kin read, too."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from bge_accel.data.reading import open_binary, raw_lines
from bge_accel.evaluation.retrieval import Evaluation
from bge_accel.evaluation.sets import Corpus, EvaluationData, Judgements, Queries, read_qrels
from bge_accel.files.faults import Faults, is_broken_file
from bge_accel.files.text import shorten

Rankings = dict[str, dict[str, float]]
"""{query id: {passage id: score}}"""


def read_run(path: str, faults: Faults) -> Rankings:
    """Reads a run from a plain, `.gz` or `.zst` file; fields are separated by tabs where there is one, else by spaces.

    What is wrong with any line goes to `faults`. Ranks are not looked at: trec_eval orders by score.
    """
    rankings: Rankings = {}
    try:
        with open_binary(path) as file:
            for number, raw in raw_lines(file):
                _add_line(rankings, raw.decode("utf-8").rstrip("\r\n"), f"{path}:{number}", faults)
    except Exception as error:
        if not is_broken_file(error):
            raise
        faults.add(path, f"cannot be read: {error}")
        return rankings
    if not rankings and not faults.count:
        faults.add(path, "the file holds no rankings")
    return rankings


def _add_line(rankings: Rankings, line: str, where: str, faults: Faults) -> None:
    fields = line.split("\t") if "\t" in line else line.split()
    if len(fields) != 6:
        faults.add(where, f"{shorten(line)}: expected six fields, query-id Q0 passage-id rank score name")
        return
    query, passage = fields[0].strip(), fields[2].strip()
    try:
        score = float(fields[4])
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        faults.add(where, f"the score is {shorten(fields[4])}: it has to be a number")
    elif passage in (ranking := rankings.setdefault(query, {})):
        faults.add(where, f"passage {shorten(passage)} stands in the ranking of query {shorten(query)} before")
    else:
        ranking[passage] = score


def run_lines(data: EvaluationData, evaluation: Evaluation, name: str) -> Iterator[str]:
    """The lines of an evaluation's rankings; scores are written so that the same float32 is read back.

    Fields are separated by spaces, or by tabs where an id holds a space (which other programs may not read).
    """
    ids = (*data.queries.ids, *(data.corpus.ids[row] for row in np.unique(evaluation.indices[evaluation.indices >= 0])))
    separator = "\t" if any(len(text.split()) != 1 for text in ids) else " "
    name = "_".join(name.split()) or "run"
    for query, rows, scores in zip(data.queries.ids, evaluation.indices, evaluation.scores, strict=True):
        for rank, (row, score) in enumerate(zip(rows, scores, strict=True), start=1):
            if row >= 0:
                yield separator.join((query, "Q0", data.corpus.ids[row], str(rank), str(score), name)) + "\n"


def judged_ids(qrels: str, runs: Iterable[Mapping[str, Mapping[str, Any]]]) -> EvaluationData:
    """What is needed to score runs where there are judgements and no texts: ids stand for the texts.

    Raises:
        ValueError: see `sets.read_qrels`; no judged query is ranked by any run.
    """
    faults = Faults()
    grades = read_qrels(qrels, faults)
    faults.raise_if_any()
    ranked = {passage for run in runs for ranking in run.values() for passage in ranking}
    passages = sorted(ranked.union(*grades.values()))
    rows = {passage: row for row, passage in enumerate(passages)}
    pairs = [(query, rows[passage], grade) for query, of in enumerate(grades.values()) for passage, grade in of.items()]
    judgements = Judgements(*np.array(pairs, dtype=np.int64).reshape(-1, 3).T)
    counts = {
        "judged_queries": len(grades),
        "judgements": len(pairs),
        "positives": int((judgements.grade > 0).sum()),
    }
    queries = Queries(list(grades), list(grades), [[] for _ in grades])
    return EvaluationData(Corpus(passages, passages, passages), queries, judgements, counts, [])
