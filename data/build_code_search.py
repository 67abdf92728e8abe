"""Turn the standard library of the running Python into a retrieval task: docstring sentence -> function source.

A query is the first sentence of a function's docstring; its positive passage is the function's source without the
docstring. Whole modules are held out for testing. Nothing is downloaded; it takes seconds.

    python data/build_code_search.py --output_dir data/code_search
    python data/build_code_search.py --output_dir /tmp/code_search --num_test 300

Writes train.jsonl, corpus.jsonl, queries.jsonl, qrels.tsv and README.md (a data card). The same interpreter gives the
same bytes every time; another Python version has another standard library, hence other numbers.
"""

import argparse
import ast
import hashlib
import inspect
import json
import os
import platform
import re
import shutil
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

# Third-party packages, tests (their docstrings name a case, not a behaviour) and byte code. Nothing else has to go:
# generated files (encodings, _sysconfigdata, pydoc_data) hold no documented functions, and ensurepip bundles wheels.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
FILES = ("train.jsonl", "corpus.jsonl", "queries.jsonl", "qrels.tsv", "README.md")
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef

SIGNATURE = re.compile(r"[\w.]+\(.*[)\]]\.?|.*[-=]>\s.*|\S+( \S+)? :?={1,3} .*")  # also "a -> b" and "word = atom / b"
SIGNATURE_AND_TEXT = re.compile(r"[\w.]+\([^()]*\)(\s*->[\w ]+?)?(:| --?) (?=\w)")  # "count(x) -> int -- return ..."
NEW_BLOCK = re.compile(r"\s|[-*+] |\d+[.)] |>>>|[:@]\w+|\w+(, \w+)*( --? | ?:|\s+: )|(\W)\3{2}")  # list, fields, rule
SENTENCE_END = re.compile(r"[.!?][\"')\]`]*(?=\s+[^a-z\s]|$)")  # a small letter follows "etc." and the like
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|eg|ie|vs|cf|approx|resp|incl)\.$", re.IGNORECASE)


class Pair(NamedTuple):
    module: str  # top-level module or package: what is held out as a whole
    passage_id: str
    query: str
    passage: str


def first_sentence(docstring: str) -> str:
    """Return the first sentence of prose in one line, past signatures, lists and doctests; "" if there is none."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = paragraph.strip("\n").split("\n")
        is_call = SIGNATURE.fullmatch(lines[0]) or re.match(r"[\w.]+\([^.]*$", lines[0])
        if is_call and len(lines) > 1 and lines[1][:1].isupper():
            lines = lines[1:]  # "d(own) [count]" in the line above the description
        text = lines[0]
        for before, line in zip(lines, lines[1:], strict=False):
            # A capital on a new line, though the word would have fitted above, starts a sentence: the stop is missing.
            is_early_break = re.match(r"[A-Z][a-z]+\b", line) and len(before) + len(line.split()[0]) < 60
            if NEW_BLOCK.match(line) or is_early_break:
                break
            text += " " + line
        text = " ".join(text.split())
        ends = (text[: match.end()] for match in SENTENCE_END.finditer(text))
        text = next((end for end in ends if not ABBREVIATION.search(end)), text)
        text = SIGNATURE_AND_TEXT.sub("", text, count=1) if SIGNATURE_AND_TEXT.match(text) else text
        if not SIGNATURE.fullmatch(text) and not text.startswith((">>>", ":", "@")):
            return text.rstrip(": ")
    return ""


def leading_strings(node: ast.AST) -> list[ast.stmt]:
    """Return the docstring statement of a function or class with any bare strings after it; [] for another node."""

    def is_string(statement: ast.stmt) -> bool:
        value = statement.value if isinstance(statement, ast.Expr) else None
        return isinstance(value, ast.Constant) and isinstance(value.value, str)

    return list(takewhile(is_string, node.body)) if isinstance(node, FUNCTION | ast.ClassDef) else []


def is_trivial(node: FUNCTION) -> bool:
    """Say whether the body without its docstring teaches nothing: a stub, an overload, an abstract method."""
    body = [statement for statement in node.body[len(leading_strings(node)) :] if not isinstance(statement, ast.Pass)]
    code = "\n".join(ast.unparse(statement) for statement in body)
    trivial = r"(|\.\.\.|return|return None|return NotImplemented|raise NotImplementedError(\([^\n]*\))?)"
    return re.fullmatch(trivial, code) is not None


def source_without_docstrings(node: FUNCTION, source_lines: list[bytes]) -> str:
    """Return the dedented source of a function: decorators and comments included, docstrings (inner ones too) not."""
    first = min(part.lineno for part in (node, *node.decorator_list))
    lines = source_lines[first - 1 : node.end_lineno]  # bytes, because ast counts columns in UTF-8 bytes
    strings = [(string, owner) for owner in ast.walk(node) for string in leading_strings(owner)]
    for string, owner in sorted(strings, key=lambda pair: (pair[0].lineno, pair[0].col_offset), reverse=True):
        start, end = string.lineno - first, string.end_lineno - first + 1
        before, after = lines[start][: string.col_offset], lines[end - 1][string.end_col_offset :].lstrip(b" ;")
        rest = before + (b"pass" if owner.body == [string] else b"") + after
        while not rest.strip() and end < len(lines) and not lines[end].strip():
            end += 1  # the blank lines that set the docstring off
        lines[start:end] = [rest.rstrip()] if rest.strip() else []
    margin = b" " * node.col_offset
    return "\n".join(line.removeprefix(margin).decode().rstrip() for line in lines)


def functions(node: ast.AST, outer: str = "") -> Iterator[tuple[str, FUNCTION]]:
    """Yield (qualified name, node) of every function below `node`, in the order of the file."""
    for child in ast.iter_child_nodes(node):
        name = outer + child.name if isinstance(child, FUNCTION | ast.ClassDef) else ""
        if isinstance(child, FUNCTION):
            yield name, child
        yield from functions(child, name + "." if name else outer)


def read_library(root: Path) -> tuple[list[Pair], Counter[str]]:
    """Return the distinct pairs under `root` in the order of path and line, and what was left out and why."""
    pairs: dict[tuple[str, str], Pair] = {}
    ids: set[str] = set()
    num_dropped: Counter[str] = Counter()
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    for path in sorted((path for path in paths if not SKIPPED_FOLDERS & set(path.parts)), key=Path.as_posix):
        try:
            with tokenize.open(root / path) as file:  # in the encoding that the file declares
                source = file.read()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # lib2to3 and others carry files that are broken on purpose
            num_dropped["files that do not parse"] += 1
            continue
        source_lines = source.encode().split(b"\n")
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for name, node in functions(tree):
            docstring = ast.get_docstring(node)
            if docstring is None:
                continue
            query, passage = first_sentence(docstring), source_without_docstrings(node, source_lines)
            if is_trivial(node):
                num_dropped["trivial bodies"] += 1
            elif len(re.findall(r"[A-Za-z]\w*", query)) < 3:
                num_dropped["no sentence of three words"] += 1
            elif query in passage:
                num_dropped["query inside its passage"] += 1
            elif (query, passage) in pairs:
                num_dropped["repeated pairs"] += 1
            else:
                passage_id = f"{module}:{name}"
                passage_id += f":{node.lineno}" if passage_id in ids else ""
                ids.add(passage_id)
                pairs[query, passage] = Pair(module.split(".")[0], passage_id, query, passage)
    return list(pairs.values()), num_dropped
