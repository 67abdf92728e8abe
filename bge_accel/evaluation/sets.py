"""A corpus, queries and judgements, read and checked."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bge_accel.data.reading import open_binary, raw_lines
from bge_accel.evaluation.set_files import QRELS_EXTENSIONS, hub_rows, is_hub_name, locate, rows_at
from bge_accel.files.faults import Faults, is_broken_file
from bge_accel.files.text import shorten

MAX_GRADE = 10**9  # sums of gains are to stay numbers
# Names of the columns of judgements, without case, spaces, hyphens and underscores; of several in a header the first counts.
QUERY_COLUMNS = ("queryid", "qid", "topicid", "query", "topic")
CORPUS_COLUMNS = (
    "corpusid", "passageid", "documentid", "docid", "docno", "pid", "did", "corpus", "passage", "document", "doc",
)  # fmt: skip
SCORE_COLUMNS = ("score", "grade", "relevance", "rel", "label")


class Corpus(NamedTuple):
    """Passages, in the order of the files."""

    ids: list[str]
    texts: list[str]
    """What is encoded: the title, where there is one, and the text."""
    bodies: list[str]
    """The text without the title, as "positive" names it."""


class Queries(NamedTuple):
    """Queries, in the order of the files."""

    ids: list[str]
    texts: list[str]
    positives: list[list[str]]
    """Texts of passages that answer each; empty where judgements come from a file of their own."""


class Judgements(NamedTuple):
    """One entry a judged pair, each an int64 array (judgements,)."""

    query: np.ndarray
    row: np.ndarray
    """The passage's row in the corpus; -1 where the corpus does not hold it."""
    grade: np.ndarray


class EvaluationData(NamedTuple):
    """What `evaluate_retrieval` measures on."""

    corpus: Corpus
    queries: Queries
    """Those with at least one judgement; the others would only cost time."""
    judgements: Judgements
    counts: dict[str, int]
    warnings: list[str]


def read_evaluation_data(
    corpus_data: Sequence[str] | None = None,
    query_data: Sequence[str] | None = None,
    qrels: str | None = None,
    split: str | None = None,
) -> EvaluationData:
    """Reads and checks everything that an evaluation needs; see `set_files.locate` for where it is.

    With `qrels`, ids connect queries and passages, and "positive" is ignored. Without, every corpus row whose text
    equals one of a query's "positive" is relevant, duplicates included. A positive that the corpus does not hold stays
    one that cannot be found: it counts in Recall, MAP and nDCG, and is reported.

    Raises:
        ValueError: anything is wrong with any row of any file, the first ten faults with file and line; or no judgement
            connects a query with a passage of the corpus; see `locate`, too.
    """
    corpus_data, query_data, qrels = locate(corpus_data, query_data, qrels, split)
    faults = Faults()
    corpus = read_corpus(corpus_data, faults)
    queries = read_queries(query_data, faults, need_positives=qrels is None)
    grades = read_qrels(qrels, faults) if qrels is not None else {}
    faults.raise_if_any()

    counts = {"corpus": len(corpus.ids), "queries": len(queries.ids)}
    warnings = []
    if qrels is None:
        judgements, missing = _match_texts(queries, corpus)
    else:
        judgements, missing = _match_ids(queries, corpus, grades)
        known = set(queries.ids)
        unknown = [query_id for query_id in grades if query_id not in known]
        counts["unknown_queries"] = len(unknown)
        if unknown:
            warnings.append(
                f"{qrels} judges {len(unknown)} of {len(grades)} queries that are not in the query files, "
                f"for example {shorten(unknown[0])}; they are left out"
            )
    if not (judgements.row >= 0).any():
        raise ValueError(_nothing_matches(queries, corpus, grades))
    judged = np.unique(judgements.query)
    is_missing = judgements.row < 0
    counts |= {
        "judged_queries": len(judged),
        "unjudged_queries": len(queries.ids) - len(judged),
        "judgements": len(judgements.grade),
        "positives": int((judgements.grade > 0).sum()),
        "missing_positives": int((is_missing & (judgements.grade > 0)).sum()),
    }
    if missing is not None:
        warnings.append(
            f"{int(is_missing.sum())} of {len(is_missing)} judged passages are not in the corpus, for example "
            f"{shorten(missing)}; {counts['missing_positives']} of them are positives, which count as not found"
        )
    return EvaluationData(
        corpus,
        Queries(
            ids=[queries.ids[i] for i in judged],
            texts=[queries.texts[i] for i in judged],
            positives=[queries.positives[i] for i in judged],
        ),
        judgements._replace(query=np.searchsorted(judged, judgements.query)),
        counts,
        warnings,
    )


def read_corpus(paths: Sequence[str], faults: Faults) -> Corpus:
    """Reads rows `{"content" or "text"}`, with optional "id" (or "_id") and "title".

    A title that is not empty is put before the text with one space between, as BEIR does. A row without an id gets its
    number, counted from 0 over all files.
    """
    corpus = Corpus([], [], [])
    seen: set[str] = set()
    for where, row, text, body in corpus_rows(paths, faults):
        corpus.ids.append(_id(row, len(corpus.ids), seen, where, faults))
        corpus.texts.append(text)
        corpus.bodies.append(body)
    return corpus


def corpus_rows(paths: Sequence[str], faults: Faults) -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """Yields (place, row, text with its title, text) of each passage, holding one at a time; ids are not looked at."""
    for where, row in rows_at(paths, "corpus", faults):
        title = row.get("title")
        if title is not None and not isinstance(title, str):
            faults.add(where, f'"title" is {shorten(title)}: it has to be a string')
            title = None
        title = title if title and title.strip() else ""
        body = _text(row, ("content", "text"), where, faults, may_be_empty=bool(title))
        yield where, row, f"{title} {body}" if title and body.strip() else title or body, body


def read_queries(paths: Sequence[str], faults: Faults, *, need_positives: bool) -> Queries:
    """Reads rows `{"query" or "text"}`, with optional "id" (or "_id") and "positive" (or "pos"): [text, ...].

    A row without an id gets its number, counted from 0 over all files. An empty list of positives makes an unjudged
    query.
    """
    queries = Queries([], [], [])
    seen: set[str] = set()
    for where, row, query in query_rows(paths, faults):
        queries.texts.append(query)
        queries.ids.append(_id(row, len(queries.ids), seen, where, faults))
        name = "pos" if "pos" in row and "positive" not in row else "positive"
        positives = row.get(name) if need_positives else []
        if positives is None:
            faults.add(where, '"positive" is missing: list the texts that answer the query, or give --qrels')
        elif not isinstance(positives, list):
            faults.add(where, f'"{name}" is {shorten(positives)}: it has to be a list of strings, like ["..."]')
        elif wrong := [text for text in positives if not isinstance(text, str) or not text.strip()]:
            faults.add(where, f'"{name}" holds {shorten(wrong[0])}: every item has to be a text')
        else:
            queries.positives.append(positives)
    return queries


def query_rows(paths: Sequence[str], faults: Faults) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields (place, row, text) of each query, holding one at a time; ids and positives are not looked at."""
    for where, row in rows_at(paths, "queries", faults):
        yield where, row, _text(row, ("query", "text"), where, faults)


def read_qrels(path: str, faults: Faults) -> dict[str, dict[str, int]]:
    """Reads judgements, `{query id: {corpus id: grade}}`, from a plain, `.gz` or `.zst` file, or the hub.

    Lines are `query-id  corpus-id  score` (BEIR) or `query-id  0  corpus-id  grade` (TREC), or in whatever order a header
    on the first line says; separated by tabs, or by spaces where there is no tab. A grade of 1 or more is relevant.
    """
    grades: dict[str, dict[str, int]] = {}
    for where, query_id, corpus_id, grade_text in _judged_pairs(path, faults):
        try:
            grade = int(grade_text.removesuffix(".0"))
            if abs(grade) > MAX_GRADE:
                raise ValueError
        except ValueError:
            faults.add(where, f"the score is {shorten(grade_text)}: it has to be a whole number, not beyond a billion")
            continue
        known = grades.setdefault(query_id, {}).setdefault(corpus_id, grade)
        if known != grade:
            faults.add(where, f"query {query_id} and passage {corpus_id} were judged {known} before, and {grade} here")
    if not grades and not faults.count:
        faults.add(path, "the file holds no judgements")
    return grades


def _judged_pairs(path: str, faults: Faults) -> Iterator[tuple[str, str, str, str]]:
    """Yields (place, query id, corpus id, score as it stands) of each judgement."""
    if is_hub_name(path, QRELS_EXTENSIONS):
        for where, row in hub_rows(path, faults):
            if missing := [name for name in ("query-id", "corpus-id", "score") if row.get(name) is None]:
                faults.add(where, f'"{missing[0]}" is missing: judgements are rows of query-id, corpus-id, score')
            else:
                yield where, str(row["query-id"]), str(row["corpus-id"]), str(row["score"])
        return
    try:
        with open_binary(path) as file:
            decoded = ((number, raw.decode("utf-8")) for number, raw in raw_lines(file))
            lines = [(number, line) for number, line in decoded if line.strip()]
    except Exception as error:
        if not is_broken_file(error):
            raise
        faults.add(path, f"cannot be read: {error}")
        return
    header: list[int] | None = None
    width: tuple[int, ...] = (3, 4)
    for position, (number, line) in enumerate(lines):
        where = f"{path}:{number}"
        fields = [field.strip() for field in (line.split("\t") if "\t" in line else line.split())]
        if position == 0 and _is_header(fields):
            header, width = _columns(fields, where, faults), (len(fields),)
            if header is None:
                return
        elif len(fields) not in width:
            expected = (
                "query-id, corpus-id, score, separated by tabs" if header is None else "as many fields as the header"
            )
            faults.add(where, f"{shorten(line)}: expected {expected}")
        else:
            query, corpus, score = header or (0, -2, -1)
            yield where, fields[query], fields[corpus], fields[score]


def _is_header(fields: Sequence[str]) -> bool:
    """Whether the first line of judgements names the columns: it ends as a header does, or two of them are known names."""
    names = list(map(_column_name, fields))
    known = [not set(of).isdisjoint(names) for of in (QUERY_COLUMNS, CORPUS_COLUMNS, SCORE_COLUMNS)]
    return names[-1] in SCORE_COLUMNS or sum(known) >= 2


def _columns(fields: Sequence[str], where: str, faults: Faults) -> list[int] | None:
    """Places of query id, corpus id and score among the names of a header; None after a fault."""
    names, places = list(map(_column_name, fields)), []
    for shown, known in (("query-id", QUERY_COLUMNS), ("corpus-id", CORPUS_COLUMNS), ("score", SCORE_COLUMNS)):
        found = next((name for name in known if name in names), None)
        if found is None:
            faults.add(
                where,
                f"the header {shorten(' '.join(fields))} has no {shown}; name the columns query-id, corpus-id, score",
            )
            return None
        places.append(names.index(found))
    return places


def _column_name(field: str) -> str:
    return "".join(character for character in field.lower() if character.isalnum())


def _match_texts(queries: Queries, corpus: Corpus) -> tuple[Judgements, str | None]:
    """Judgements from "positive", and one positive that the corpus does not hold."""
    wanted = {text for positives in queries.positives for text in positives}
    rows: dict[str, list[int]] = {}
    for row, body in enumerate(corpus.bodies):
        if body in wanted:
            rows.setdefault(body, []).append(row)
    pairs = [
        (query, row, 1)
        for query, positives in enumerate(queries.positives)
        for text in dict.fromkeys(positives)
        for row in rows.get(text, (-1,))
    ]
    missing = next((text for positives in queries.positives for text in positives if text not in rows), None)
    return _judgements(pairs), missing


def _match_ids(queries: Queries, corpus: Corpus, grades: dict[str, dict[str, int]]) -> tuple[Judgements, str | None]:
    """Judgements of the known queries from a judgement file, and one passage id that the corpus does not hold."""
    rows = {corpus_id: row for row, corpus_id in enumerate(corpus.ids)}
    judged = [(query, grades[query_id]) for query, query_id in enumerate(queries.ids) if query_id in grades]
    pairs = [(query, rows.get(corpus_id, -1), grade) for query, of in judged for corpus_id, grade in of.items()]
    missing = next((corpus_id for _, of in judged for corpus_id in of if corpus_id not in rows), None)
    return _judgements(pairs), missing


def _judgements(pairs: list[tuple[int, int, int]]) -> Judgements:
    return Judgements(*np.array(pairs, dtype=np.int64).reshape(-1, 3).T)


def _nothing_matches(queries: Queries, corpus: Corpus, grades: dict[str, dict[str, int]]) -> str:
    if not grades:
        positive = next((text for positives in queries.positives for text in positives), None)
        if positive is None:
            return 'every "positive" is empty: there is nothing to find; fill them in or give judgements with --qrels'
        return (
            'no "positive" of any query is in the corpus; they have to be equal to the letter:\n'
            f"  a positive:    {shorten(positive)}\n  a corpus text: {shorten(corpus.bodies[0])}\n"
            "Give the corpus that the positives come from, or ids in both files and judgements with --qrels."
        )
    query_id = next(iter(grades))
    return (
        "no judgement connects a query with a passage of the corpus:\n"
        f"  query ids:   {shorten(query_id)} in the judgements, {shorten(queries.ids[0])} in the query files\n"
        f"  passage ids: {shorten(next(iter(grades[query_id])))} in the judgements, "
        f"{shorten(corpus.ids[0])} in the corpus\n"
        'Ids are read from "id" or "_id" (a row without one gets its number, from 0); make them agree.'
    )


def _text(row: dict[str, Any], names: Sequence[str], where: str, faults: Faults, *, may_be_empty: bool = False) -> str:
    """The one text that a row holds under any of `names`; "" after a fault."""
    given = [name for name in names if row.get(name) is not None]
    if len(given) != 1:
        either = " or ".join(f'"{name}"' for name in names)
        faults.add(where, f"{either} is missing" if not given else f"the row has {' and '.join(given)}: keep one")
        return ""
    text = row[given[0]]
    if not isinstance(text, str):
        faults.add(where, f'"{given[0]}" is {shorten(text)}: it has to be a string')
        return ""
    if not text.strip() and not may_be_empty:
        faults.add(where, f'"{given[0]}" is empty: remove the row or fill it in')
    return text


def _id(row: dict[str, Any], number: int, seen: set[str], where: str, faults: Faults) -> str:
    """A row's id as a string, entered into `seen`."""
    value = next((row[name] for name in ("id", "_id") if row.get(name) is not None), number)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        faults.add(where, f"the id is {shorten(value)}: it has to be a string or a whole number")
        return ""
    value = str(value)
    if value != value.strip() or any(character in value for character in "\t\n\r"):
        # Judgements and runs are lines whose fields are parted by tabs and read without the blanks around them.
        faults.add(where, f"the id {shorten(value)} has a tab, a line break or a blank at an end: remove it")
    if value in seen:
        faults.add(where, f"the id {shorten(value)} has occurred before: every row needs an id of its own")
    seen.add(value)
    return value


def in_words(counts: Mapping[str, int]) -> str:
    """The counts of an `EvaluationData`, in a line."""
    of_queries = f" of {counts['queries']:,}" if "queries" in counts else ""
    passages = f"{counts['corpus']:,} passages, " if "corpus" in counts else ""
    missing = f" ({counts['missing_positives']:,} not in the corpus)" if "missing_positives" in counts else ""
    return (
        f"{counts['judged_queries']:,} judged queries{of_queries}, {passages}{counts['positives']:,} positives{missing}"
    )
