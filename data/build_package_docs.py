"""Turn the descriptions of installed packages into a general retrieval task: section title -> section text.

A query is the title of a section in a package's long description (its README on PyPI), its positive passage the prose
below it. It has nothing to do with code search, so it shows what a model that was tuned for that has forgotten. Nothing
is downloaded; the same packages give the same bytes every time.

    python data/build_package_docs.py --output_dir data/package_docs

Writes corpus.jsonl, queries.jsonl and qrels.tsv.
"""

import argparse
import json
import re
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path

from bge_accel.config import user_errors
from bge_accel.files.atomic import write_folder
from bge_accel.files.outputs import check_replaced_folder
from bge_accel.processes.progress import say
from bge_accel.processes.signals import interruptible

FILES = ("corpus.jsonl", "queries.jsonl", "qrels.tsv")
MIN_WORDS, MAX_WORDS = 25, 200  # of a passage; longer ones are cut

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r"^#{1,5}[ \t]+(.+?)[ \t#]*$|^(\S.{2,80})\n([=\-~^])\3{3,}[ \t]*$", re.MULTILINE)
MARKUP = (
    (re.compile(r"`([^`<]+?)\s*<[^`>]+>`_+"), r"\1"),  # links of reStructuredText
    (re.compile(r"<!--.*?-->|<[^>\n]+>", re.DOTALL), " "),
    (re.compile(r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])"), " "),  # images
    (re.compile(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])"), r"\1"),  # links
    (re.compile(r"https?://\S+"), " "),
    (
        re.compile(r"^\s*(\.\. .*|:\w[\w -]*:.*|\|.*\||[-*_=~^#|: ]{4,})$", re.MULTILINE),
        " ",
    ),  # directives, tables, rules
    (re.compile(r"[*`]+|__+"), ""),
    (re.compile(r"[|>#]+"), " "),
)


def prose(text: str) -> str:
    """Return a text in one line without code blocks, images, tables, links' targets and marks of emphasis."""
    text = FENCE.sub(" ", text)
    text = "\n".join(line for line in text.split("\n") if not line.startswith(("    ", "\t", ">>> ", "$ ")))
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def sections(description: str) -> list[tuple[str, str]]:
    """Return (title, text) of every section of a description in Markdown or reStructuredText, in its order."""
    # A comment in a code block is no title.
    text = FENCE.sub(lambda block: block[0].replace("\n#", "\n #"), description)
    found = list(TITLE.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [
        (prose(match[1] or match[2]), prose(text[match.end() : end])) for match, end in zip(found, ends, strict=False)
    ]


def read_packages() -> list[tuple[str, str, str]]:
    """Return (package, title, text) of sections of prose whose title belongs to one section alone, sorted."""
    descriptions: dict[str, str] = {}
    for package in distributions():
        if package.name == "bge_accel":  # its description changes with every version of this project
            continue
        body = package.metadata.get_payload() or package.metadata.get("Description") or ""  # type: ignore[attr-defined]
        descriptions.setdefault(package.name.lower(), body if isinstance(body, str) else "")
    rows = [(name, *section) for name, text in sorted(descriptions.items()) for section in sections(text)]
    titles = Counter(title.casefold() for _, title, _ in rows)
    kept: dict[str, tuple[str, str, str]] = {}
    for name, title, text in rows:
        words = text.split()
        spoken = sum(re.fullmatch(r"[A-Za-z]+[.,;:!?]?", word) is not None for word in words)
        is_prose = len(words) >= MIN_WORDS and spoken >= 0.7 * len(words)
        says_something = sum(len(word) > 2 for word in re.findall(r"[A-Za-z]+", title)) >= 2
        if is_prose and says_something and titles[title.casefold()] == 1:
            passage = " ".join(words[:MAX_WORDS])
            kept.setdefault(passage, (name, title, passage))
    return list(kept.values())


def main(output_dir: str) -> None:
    with user_errors():
        check_replaced_folder("--output_dir", output_dir, FILES)
    rows = read_packages()
    if len(rows) < 20:
        raise SystemExit(f"only {len(rows)} sections of prose in the installed packages: too few for a task")
    ids = [f"{name}/{number}" for number, (name, _, _) in enumerate(rows)]
    files = {
        "corpus.jsonl": [{"id": i, "content": text} for i, (_, _, text) in zip(ids, rows, strict=True)],
        "queries.jsonl": [
            {"id": f"q{n}", "query": title, "positive": [text]} for n, (_, title, text) in enumerate(rows)
        ],
    }
    judgements = "".join(f"q{number}\t{passage_id}\t1\n" for number, passage_id in enumerate(ids))
    written = {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects).encode()
        for name, objects in files.items()
    }
    write_folder(output_dir, {**written, "qrels.tsv": ("query-id\tcorpus-id\tscore\n" + judgements).encode()})
    say(f"{output_dir}: {len(rows)} sections of {len({name for name, _, _ in rows})} packages")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_dir = Path(__file__).resolve().parent / "package_docs"
    parser.add_argument("--output_dir", default=str(default_dir), help="folder to write (%(default)s)")
    with interruptible():
        main(parser.parse_args().output_dir)
