"""Turn the standard library of the running Python into a retrieval task: docstring sentence -> function source.

A query is the first sentence of a function's docstring; its positive passage is the function's source without the
docstring. Whole modules are held out for testing. Nothing is downloaded; it takes seconds.

    python data/build_code_search.py
    python data/build_code_search.py --output_dir data/code_search

Writes train.jsonl, corpus.jsonl, queries.jsonl, qrels.tsv and README.md (a data card). The same interpreter gives the
same bytes every time; another Python version has another standard library, hence other numbers.
"""

import argparse
import ast
import hashlib
import inspect
import json
import platform
import re
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from bge_accel.config import user_errors
from bge_accel.files.atomic import write_folder
from bge_accel.files.outputs import check_replaced_folder
from bge_accel.processes.progress import say
from bge_accel.processes.signals import interruptible

NUM_TEST = 600  # (query, passage) pairs to hold out, about
FILES = ("train.jsonl", "corpus.jsonl", "queries.jsonl", "qrels.tsv", "README.md")
# Third-party packages, tests (their docstrings name a case, not a behaviour) and byte code. Nothing else has to go:
# generated files (encodings, _sysconfigdata, pydoc_data) hold hardly a documented function, and ensurepip has wheels.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef

SIGNATURE = re.compile(r"[\w.]+\(.*[)\]]\.?|.*[-=]>\s.*|\S+( \S+)? :?={1,3} .*")  # also "a -> b" and "word = atom / b"
SIGNATURE_BEFORE = re.compile(r"[\w.]+\([^()]*\)(\s*->[\w ]+?)?(:| --?) (?=\w)")  # "count(x) -> int -- return ..."
NEW_BLOCK = re.compile(r"\s|[-*+] |\d+[.)] |>>>|[:@]\w+|\w+(, \w+)*( --? | ?:|\s+: )|(\W)\3{2}")  # list, fields, rule
ABBREVIATED = r"(?<!\be\.g)(?<!\bi\.e)(?<!\beg)(?<!\bie)(?<!\bvs)(?<!\bcf)(?<!\betc(?=\.\s(?-i:[a-z])))"
QUOTED_STOP = r"(?<!['\"`](?=.['\"`]))"  # as in: remove every '.' from the path
SENTENCE_END = re.compile(ABBREVIATED + r"(?<!\.\.)" + QUOTED_STOP + r"[.!?][\"')\]`]*(?=\s|$)", re.IGNORECASE)
TRIVIAL = re.compile(r"\.\.\.|return|return None|return NotImplemented|raise NotImplementedError(\(.*\))?")


class Pair(NamedTuple):
    module: str  # top-level module or package: what is held out as a whole
    passage_id: str
    query: str
    passage: str


def first_sentence(docstring: str) -> str:
    """Return the first sentence of prose in one line without its stop, past signatures and doctests; "" if none."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = paragraph.strip("\n").split("\n")
        is_call = SIGNATURE.fullmatch(lines[0]) or re.match(r"[\w.]+\([^.]*$", lines[0])
        if is_call and len(lines) > 1 and lines[1][:1].isupper():
            lines = lines[1:]  # "d(own) [count]" in the line above the description
        text = lines[0]
        for before, line in pairwise(lines):
            # A capital on a new line, though the word would have fitted above, starts a sentence: the stop is missing.
            is_early_break = re.match(r"[A-Z][a-z]+\b", line) and len(before) + len(line.split()[0]) < 60
            if NEW_BLOCK.match(line) or is_early_break:
                break
            text += " " + line
        text = " ".join(text.split())
        if end := SENTENCE_END.search(text):
            text = text[: end.end()]
        if prefix := SIGNATURE_BEFORE.match(text):
            text = text[prefix.end() :]
        if not SIGNATURE.fullmatch(text) and not text.startswith((">>>", ":", "@", "[")):
            # ":" and "e.g." lead to a list or an example, which is cut off.
            return re.sub(r"[,;:( ]*\b(e\.g|i\.e)\.:*$|[,;: ]*(?<!\.)\.$|[,;: ]+$", "", text)
    return ""


def functions(node: ast.AST, outer: str = "") -> Iterator[tuple[str, FUNCTION]]:
    """Yield (qualified name, node) of every function below `node`, in the order of the file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTION):
            yield outer + child.name, child
        if not isinstance(child, ast.expr):
            is_scope = isinstance(child, FUNCTION | ast.ClassDef)
            yield from functions(child, f"{outer}{child.name}." if is_scope else outer)


def source_without_docstrings(node: FUNCTION, source_lines: list[bytes]) -> str:
    """Return the dedented source of a function: decorators and comments included, docstrings (inner ones too) not."""
    first = min(part.lineno for part in (node, *node.decorator_list))
    margin = source_lines[node.lineno - 1][: node.col_offset]
    lines = source_lines[first - 1 : node.end_lineno]  # bytes, because ast counts columns in UTF-8 bytes
    owners = (inner for inner in ast.walk(node) if isinstance(inner, FUNCTION | ast.ClassDef))
    documented = [owner for owner in owners if ast.get_docstring(owner, clean=False) is not None]
    for owner in sorted(documented, key=lambda owner: owner.body[0].lineno, reverse=True):
        docstring = owner.body[0]
        start, end = docstring.lineno - first, docstring.end_lineno - first + 1
        rest = lines[start][: docstring.col_offset] + (b"pass" if len(owner.body) == 1 else b"")
        rest += lines[end - 1][docstring.end_col_offset :].lstrip(b" ;")
        while not rest.strip() and end < len(lines) and not lines[end].strip():
            end += 1  # the blank lines that set the docstring off
        lines[start:end] = [rest] if rest.strip() else []
    return "\n".join(line.removeprefix(margin).decode().rstrip() for line in lines)


def read_library(root: Path) -> tuple[list[Pair], Counter[str]]:
    """Return the distinct pairs under `root` in the order of path and line, and counts of what was left out."""
    pairs: dict[tuple[str, str], Pair] = {}
    ids: set[str] = set()
    left_out: Counter[str] = Counter()
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    for path in sorted((path for path in paths if not SKIPPED_FOLDERS & set(path.parts)), key=Path.as_posix):
        try:
            with tokenize.open(root / path) as file:  # in the encoding that the file declares
                source = file.read()
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            left_out["files that do not parse"] += 1
            continue
        source_lines = source.encode().split(b"\n")
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for name, node in functions(tree):
            docstring = ast.get_docstring(node)
            if docstring is None:
                continue
            body = [statement for statement in node.body[1:] if not isinstance(statement, ast.Pass)]
            query, passage = first_sentence(docstring), source_without_docstrings(node, source_lines)
            if not body or (len(body) == 1 and TRIVIAL.fullmatch(ast.unparse(body[0]))):
                left_out["stubs and abstract methods"] += 1
            elif sum(re.search("[A-Za-z]", word) is not None for word in query.split()) < 3:
                left_out["without a sentence of three words"] += 1
            elif query in passage:
                left_out["with the query inside the passage"] += 1
            elif (query, passage) in pairs:
                left_out["repeated pairs"] += 1
            else:
                passage_id = f"{module}:{name}" + (f":{node.lineno}" if f"{module}:{name}" in ids else "")
                ids.add(passage_id)
                pairs[query, passage] = Pair(module.split(".")[0], passage_id, query, passage)
    return list(pairs.values()), left_out


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Return (train, test): modules are held out in the order of a hash of their names, but none that overshoots much.

    A pair whose query (in any letter case) or passage also occurs in the test leaves training.
    """
    sizes = Counter(pair.module for pair in pairs)
    held_out: list[str] = []
    for module in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        num_test = sum(sizes[name] for name in held_out)
        if num_test < NUM_TEST and num_test + sizes[module] <= NUM_TEST + 50:
            held_out.append(module)
    test = [pair for pair in pairs if pair.module in held_out]
    seen = {pair.query.casefold() for pair in test} | {pair.passage for pair in test}
    rest = (pair for pair in pairs if pair.module not in held_out)
    return [pair for pair in rest if pair.query.casefold() not in seen and pair.passage not in seen], test


def by_query(pairs: list[Pair]) -> dict[str, list[str]]:
    """Return query -> its passages, both in the order of `pairs`."""
    rows: dict[str, list[str]] = {}
    for pair in pairs:
        rows.setdefault(pair.query, []).append(pair.passage)
    return rows


def build_files(pairs: list[Pair], train: list[Pair], test: list[Pair]) -> dict[str, bytes]:
    """Return name -> content of the data files."""

    def json_lines(rows: list[dict]) -> bytes:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

    kept = {*train, *test}
    ids: dict[str, str] = {}  # passage -> id: the corpus, in the order of the library
    for pair in pairs:
        if pair in kept:
            ids.setdefault(pair.passage, pair.passage_id)
    queries = [{"id": f"q{i}", "query": q, "positive": p} for i, (q, p) in enumerate(by_query(test).items(), 1)]
    judgements = "".join(f"{row['id']}\t{ids[text]}\t1\n" for row in queries for text in row["positive"])
    return {
        "train.jsonl": json_lines([{"query": query, "pos": pos, "neg": []} for query, pos in by_query(train).items()]),
        "corpus.jsonl": json_lines([{"id": passage_id, "content": passage} for passage, passage_id in ids.items()]),
        "queries.jsonl": json_lines(queries),
        "qrels.tsv": ("query-id\tcorpus-id\tscore\n" + judgements).encode(),
    }


def data_card(files: dict[str, bytes], train: list[Pair], test: list[Pair]) -> str:
    """Return the README of the data set."""

    def quantiles(texts: set[str]) -> str:
        lengths = sorted(len(text.split()) for text in texts)
        return " | ".join(str(lengths[int(q * (len(lengths) - 1))]) for q in (0, 0.25, 0.5, 0.75, 0.95, 1))

    passages = {pair.passage for pair in train + test}
    hashes = "\n".join(f"| `{name}` | `{hashlib.sha256(data).hexdigest()}` |" for name, data in files.items())
    modules = ", ".join(f"`{name}`" for name in sorted({pair.module for pair in test}))
    return f"""# Code search in the Python standard library

Given the first sentence of a function's docstring, find the function. A passage is the source of a function or method
with its decorators and comments, without docstrings. Source: the standard library of
{platform.python_implementation()} {platform.python_version()}. Command:

    python data/build_code_search.py --output_dir data/code_search

| | rows | (query, passage) pairs |
| :-- | --: | --: |
| `train.jsonl` | {len(by_query(train))} | {len(train)} |
| `queries.jsonl` (test) | {len(by_query(test))} | {len(test)} |
| `corpus.jsonl` | {len(passages)} | |

| length in words | least | 25% | median | 75% | 95% | most |
| :-- | --: | --: | --: | --: | --: | --: |
| queries | {quantiles({pair.query for pair in train + test})} |
| passages | {quantiles(passages)} |

A query with several passages is one row with several positives. Training rows have no negatives (`"neg": []`). The
judgements of the test stand twice: as texts in `queries.jsonl` (`"positive"`) and as ids in `qrels.tsv`.

Split: whole top-level modules are held out for the test, in the order of the SHA-256 of their names: {modules}.
No query and no passage of the test occurs in training: a training pair with either of them was dropped. The corpus
holds the passages of training and test, so a test query is searched among all of them.

| file | SHA-256 |
| :-- | :-- |
{hashes}

Licence: the texts are part of CPython, copyright Python Software Foundation and others, under the PSF License Version 2
(<https://docs.python.org/3/license.html>).
"""


def main(output_dir: str) -> None:
    with user_errors():
        check_replaced_folder("--output_dir", output_dir, FILES)
    pairs, left_out = read_library(Path(sysconfig.get_paths()["stdlib"]))
    train, test = split(pairs)
    files = build_files(pairs, train, test)
    files["README.md"] = data_card(files, train, test).encode()
    write_folder(output_dir, files)
    num_overlapping = len(pairs) - len(train) - len(test)
    say(f"{output_dir}: {len(pairs)} distinct (query, passage) pairs of Python {platform.python_version()}")
    say("left out: " + ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())))
    say(f"train: {len(by_query(train))} rows, {len(train)} pairs; {num_overlapping} dropped as the test has them")
    say(f"test: {len(by_query(test))} queries, {len(test)} pairs of {len({pair.module for pair in test})} modules")
    say(f"corpus: {len({pair.passage for pair in train + test})} passages")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_dir = Path(__file__).resolve().parent / "code_search"
    parser.add_argument(
        "--output_dir",
        default=str(default_dir),
        help="folder to write; replaced if it holds an earlier result, refused if it holds anything else (%(default)s)",
    )
    with interruptible("nothing was written"):
        main(parser.parse_args().output_dir)
