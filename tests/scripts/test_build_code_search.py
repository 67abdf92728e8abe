"""The builder of the demonstration data, run as a user runs it on this interpreter's standard library."""

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "build_code_search.py"
FILES = {"train.jsonl", "corpus.jsonl", "queries.jsonl", "qrels.tsv", "README.md"}


def start(output_dir, hash_seed):
    command = [sys.executable, str(SCRIPT), "--output_dir", str(output_dir)]
    env = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two results of the script, with different seeds of Python's own hash; the second replaces an earlier result."""
    first, second = tmp_path_factory.mktemp("first") / "data", tmp_path_factory.mktemp("second") / "deep" / "data"
    second.mkdir(parents=True)
    for name in FILES:
        (second / name).write_text("stale")
    for process in [start(first, 1), start(second, 2)]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert len(out.splitlines()) == 5, out
    return first, second


@pytest.fixture(scope="module")
def data(folders):
    def rows(name):
        return [json.loads(line) for line in (folders[0] / name).read_text(encoding="utf-8").split("\n")[:-1]]

    return rows("train.jsonl"), rows("corpus.jsonl"), rows("queries.jsonl")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("build_code_search", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_runs_give_the_same_bytes_and_leave_nothing_else(folders):
    first, second = folders
    assert {path.name for path in first.iterdir()} == FILES
    assert {path.name for path in second.iterdir()} == FILES
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for folder in folders:
        assert [path.name for path in folder.parent.iterdir()] == ["data"], "temporary folders are gone"


def test_counts_are_sensible(data):
    train, corpus, queries = data
    assert 3500 < len(train) < 8000
    assert 4000 < len(corpus) < 9000
    assert 550 <= sum(len(row["positive"]) for row in queries) <= 650
    assert any(len(row["pos"]) > 1 for row in train)
    assert any(len(row["positive"]) > 1 for row in queries)


def test_rows_have_the_projects_fields(data):
    train, corpus, queries = data
    assert all(set(row) == {"query", "pos", "neg"} and row["neg"] == [] for row in train)
    assert all(set(row) == {"id", "content"} for row in corpus)
    assert all(set(row) == {"id", "query", "positive"} for row in queries)
    for query, positives in [(r["query"], r["pos"]) for r in train] + [(r["query"], r["positive"]) for r in queries]:
        assert query == " ".join(query.split()) and len(query.split()) >= 3
        assert positives and len(set(positives)) == len(positives)
        assert all(query not in passage for passage in positives)


def test_no_query_and_no_passage_in_both_splits(data):
    train, _, queries = data
    assert not {row["query"].casefold() for row in train} & {row["query"].casefold() for row in queries}
    assert not {text for row in train for text in row["pos"]} & {text for row in queries for text in row["positive"]}
    assert len({row["query"] for row in train}) == len(train)
    assert len({row["query"] for row in queries}) == len(queries)


def test_held_out_modules_are_whole(data):
    train, corpus, queries = data
    test_passages = {text for row in queries for text in row["positive"]}
    train_passages = {text for row in train for text in row["pos"]}
    modules = {True: set(), False: set()}
    for row in corpus:
        modules[row["content"] in test_passages].add(row["id"].split(":")[0].split(".")[0])
    assert not modules[True] & modules[False]
    assert train_passages | test_passages == {row["content"] for row in corpus}


def test_judgements_by_id_equal_the_positives_by_text(folders, data):
    _, corpus, queries = data
    texts = {row["id"]: row["content"] for row in corpus}
    assert len(texts) == len(corpus) and len(set(texts.values())) == len(corpus)
    header, *lines = (folders[0] / "qrels.tsv").read_text(encoding="utf-8").splitlines()
    assert header == "query-id\tcorpus-id\tscore"
    judged = {row["id"]: [] for row in queries}
    assert len(judged) == len(queries)
    for line in lines:
        query_id, passage_id, score = line.split("\t")
        assert score == "1"
        judged[query_id].append(texts[passage_id])
    assert judged == {row["id"]: row["positive"] for row in queries}


def test_passages_are_functions_without_docstrings(data):
    scopes = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for row in data[1]:
        tree = ast.parse(row["content"])
        assert len(tree.body) == 1 and isinstance(tree.body[0], scopes), row["id"]
        for node in ast.walk(tree):
            assert not isinstance(node, scopes) or ast.get_docstring(node) is None, row["id"]
    assert any("# " in row["content"] for row in data[1]), "comments stay"
    assert any(row["content"].startswith("@") for row in data[1]), "decorators stay"


def test_data_card_names_version_counts_and_checksums(folders, data):
    card = (folders[0] / "README.md").read_text(encoding="utf-8")
    assert ".".join(map(str, sys.version_info[:3])) in card
    for name in FILES - {"README.md"}:
        assert hashlib.sha256((folders[0] / name).read_bytes()).hexdigest() in card
    assert all(f"| {len(rows)} |" in card for rows in data)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Emit a record.\n\n    Format the record and send it.\n    ", "Emit a record"),
        (
            "Return a list of the lines in the string, breaking at\n    line boundaries.  Keep the ends.",
            "Return a list of the lines in the string, breaking at line boundaries",
        ),
        (
            "Replace %xx escapes, e.g. by their single-character equivalent. By default utf-8.",
            "Replace %xx escapes, e.g. by their single-character equivalent",
        ),
        (
            "Returns a date string as specified by RFC 2822, e.g.:\n\n    Fri, 09",
            "Returns a date string as specified by RFC 2822",
        ),
        (
            "execvpe(file, args, env)\n\nExecute the executable file with\nargument list args.",
            "Execute the executable file with argument list args",
        ),
        (
            "strxfrm(string) -> string.\n    Returns a string that behaves for cmp locale-aware.",
            "Returns a string that behaves for cmp locale-aware",
        ),
        ("S.count(value) -> integer -- return number of occurrences of value", "return number of occurrences of value"),
        ("clear(): Explicitly release parsing objects", "Explicitly release parsing objects"),
        (
            "d(own) [count]\n        Move the current frame count (default one) levels down.",
            "Move the current frame count (default one) levels down",
        ),
        (
            ">>> read_stringnl(f)\n'abcd'\n\nEmbedded escapes are undone in the result.",
            "Embedded escapes are undone in the result",
        ),
        (
            "word = atom / quoted-string\n\nEither atom or quoted-string may start with CFWS.",
            "Either atom or quoted-string may start with CFWS",
        ),
        (
            "Clear the cache for all loggers in loggerDict\nCalled when level changes are made",
            "Clear the cache for all loggers in loggerDict",
        ),
        ("Process an XOVER command\n- start: start of range\n- end: end of range", "Process an XOVER command"),
        (
            "Given a URL path, remove extra '/'s and '.' path elements.\n",
            "Given a URL path, remove extra '/'s and '.' path elements",
        ),
        ("Guess which files, links etc. are meant. Slow.", "Guess which files, links etc. are meant"),
        ("Guess files, links etc. Slow.", "Guess files, links etc"),
        ("divmod(a, b)", ""),
    ],
)
def test_first_sentence(script, docstring, sentence):
    assert script.first_sentence(docstring) == sentence


def test_source_keeps_code_and_comments_without_docstrings(script):
    source = (
        "class A:\n"
        "    @property  # naïve\n"
        "    def f(self):\n"
        '        """Doc of f.\n'
        "\n"
        '        More."""\n'
        "\n"
        "        # why\n"
        '        def g(): "Doc of g"; return "é"\n'
        "        class B(Exception):\n"
        '            """Doc of B."""\n'
        "        return g() + 'x'\n"
    )
    (name, node), inner = script.functions(ast.parse(source))
    assert (name, inner[0]) == ("A.f", "A.f.g")
    assert script.source_without_docstrings(node, source.encode().split(b"\n")) == (
        "@property  # naïve\n"
        "def f(self):\n"
        "    # why\n"
        '    def g(): return "é"\n'
        "    class B(Exception):\n"
        "        pass\n"
        "    return g() + 'x'"
    )


def test_pairs_that_teach_nothing_are_left_out(script, tmp_path):
    (tmp_path / "m.py").write_text(
        'def stub():\n    """Do one good thing."""\n    raise NotImplementedError("later")\n'
        'def empty():\n    """Do two good things."""\n'
        'def short(x):\n    """Add one."""\n    return x + 1\n'
        'def inside(x):\n    """Do three good things."""\n    print("Do three good things")\n'
        'def kept(x):\n    """Do four good things."""\n    return x * 4\n'
        'def kept(x):\n    """Do four good things."""\n    return x * 4\n'
        'def kept(x):\n    """Do four good things."""\n    return x << 2\n'
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('def f(x):\n    """Do five good things."""\n    return x * 5\n')
    pairs, left_out = script.read_library(tmp_path)
    assert pairs == [
        ("m", "m:kept", "Do four good things", "def kept(x):\n    return x * 4"),
        ("m", "m:kept:18", "Do four good things", "def kept(x):\n    return x << 2"),
    ]
    assert sorted(left_out.values()) == [1, 1, 1, 1, 2]
    assert script.by_query(pairs) == {"Do four good things": [pair.passage for pair in pairs]}


def test_training_loses_what_the_test_has(script, monkeypatch):
    monkeypatch.setattr(script, "NUM_TEST", 1)
    modules = sorted("abcdef", key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out, other = modules[:2]
    test = [script.Pair(held_out, "1", "Close the file", "def close(): ...")]
    rest = [
        script.Pair(other, "2", "close the file", "def shut(): ..."),
        script.Pair(other, "3", "Close it now", "def close(): ..."),
        script.Pair(other, "4", "Open the file", "def open(): ..."),
    ]
    assert script.split(rest + test) == (rest[2:], test)


@pytest.mark.parametrize("names", [["notes.txt"], ["README.md"], [*sorted(FILES), "model.bin"]])
def test_a_folder_with_other_files_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    process = start(tmp_path, 0)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"error: --output_dir {tmp_path} would be replaced" in err and "Traceback" not in err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "mine")


def test_help_names_the_files():
    result = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "--output_dir" in result.stdout and "qrels.tsv" in result.stdout
