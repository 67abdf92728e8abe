"""data/build_package_docs.py: sections of prose from descriptions, and the folder as evaluation reads it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from helpers.repo import REPO

from bge_accel.evaluation.sets import read_evaluation_data

SCRIPT = REPO / "data" / "build_package_docs.py"
spec = importlib.util.spec_from_file_location("build_package_docs", SCRIPT)
assert spec is not None and spec.loader is not None
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)

MARKDOWN = """# A title
[![badge](https://x.org/a.svg)](https://x.org) Some *prose* with a [link](https://y.org) and `code`.

| a | table |
| --- | --- |

```python
# no title
print()
```
## Another one ##
More.
"""
RST = """Old titles
==========
See `the manual <https://z.org>`_, please.

.. code:: python

    skipped()

Second
------
End.
"""


def test_sections_are_prose() -> None:
    assert builder.sections(MARKDOWN) == [
        ("A title", "Some prose with a link and code."),
        ("Another one", "More."),
    ]
    assert builder.sections(RST) == [("Old titles", "See the manual, please."), ("Second", "End.")]
    assert builder.sections("no title at all") == []


def test_the_folder_is_a_task_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        subprocess.run([sys.executable, SCRIPT, "--output_dir", tmp_path / name], check=True, capture_output=True)
    for file in ("corpus.jsonl", "queries.jsonl", "qrels.tsv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    folder = tmp_path / "one"
    files = [[str(folder / name)] for name in ("corpus.jsonl", "queries.jsonl")]
    data = read_evaluation_data(*files, str(folder / "qrels.tsv"))
    assert len(data.queries.texts) >= 100 and data.warnings == []
    assert read_evaluation_data(*files).counts["positives"] == data.counts["positives"], "by text as by id"
    rows = [json.loads(line) for line in open(folder / "corpus.jsonl")]
    assert not any(row["id"].startswith("bge_accel/") for row in rows)
    assert all(25 <= len(row["content"].split()) <= 200 for row in rows)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """Such as somebody's own task, of the same names."""
    for name in ("corpus.jsonl", "queries.jsonl", "train.jsonl"):
        (tmp_path / name).write_text("mine")
    done = subprocess.run([sys.executable, SCRIPT, "--output_dir", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "would be replaced, but it holds train.jsonl" in done.stderr
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"} and len(list(tmp_path.iterdir())) == 3
