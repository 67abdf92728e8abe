"""What SECURITY.md promises."""

import ast
import json
import os
import pickle
import re
import shutil
import signal
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import pytest

from bge_accel.config import option, parse_config
from bge_accel.data.reading import read_rows
from bge_accel.data.sources import read_sources
from bge_accel.encoding.store import Manifest, prepare_store, read_manifest
from bge_accel.evaluation.sets import read_qrels
from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files
from bge_accel.files.parsing import load_yaml
from bge_accel.files.text import printable, shorten
from bge_accel.merging.plan import module_folders
from bge_accel.models.tensor_files import BIN, INDEX, SINGLE, TensorFiles
from bge_accel.training.manifest import MANIFEST, STATE, what_is_damaged

REPO = Path(__file__).resolve().parent.parent
SOURCES = sorted([*REPO.glob("bge_accel/**/*.py"), *REPO.glob("scripts/*.py")])


class Runs:
    """Leaves a file where it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_runs_no_code(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / BIN).write_bytes(pickle.dumps({"weight": Runs(tmp_path / "ran")}))
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read as tensors alone"):
        TensorFiles(str(folder))
    assert not (tmp_path / "ran").exists()


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def unsafe_calls(source: str) -> list[str]:
    """Calls by which a file could run code."""
    found = []
    for name, call in calls(ast.parse(source)):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if (
            re.fullmatch(r"(c?[pP]ickle|dill|joblib|cloudpickle|marshal|shelve)\.(load|loads|open|Unpickler)", name)
            or name in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load", "yaml.load", "yaml.load_all")
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name.endswith(".load") and given.get("allow_pickle", "False") != "False")
            or given.get("shell", "False") != "False"
        ):
            found.append(f"{call.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_file_can_run_code(path):
    assert unsafe_calls(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line", ["torch.load(p)", "pickle.load(f)", "np.load(p, allow_pickle=True)", "yaml.load(f)", "eval(s)"]
)
def test_what_could_run_code_is_found(line):
    assert unsafe_calls(line)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_models_own_code_runs_only_where_it_is_asked_for(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) in (
                "trust_remote_code",
                "cfg.trust_remote_code",
                "options.trust_remote_code",
            ), node.value.lineno
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "trust_remote_code":
            assert node.value is None or ast.unparse(node.value).startswith("option(False,")
        if isinstance(node, ast.arguments):
            for argument, default in zip(node.kwonlyargs, node.kw_defaults, strict=True):
                if argument.arg == "trust_remote_code":
                    assert default is not None and ast.unparse(default) == "False"


def test_only_deepspeed_reads_its_own_state():
    engines = [
        path.name
        for path in SOURCES
        for name, _ in calls(ast.parse(path.read_text()))
        if name.endswith("deepspeed.load_checkpoint")
    ]
    assert engines == ["engine.py"]


# ---- names in files do not leave their folder


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "a/b.safetensors", 3, ["x"]])
def test_an_index_names_files_of_its_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="which is not a file of this folder"):
        TensorFiles(str(tmp_path))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ""])
def test_a_checkpoint_names_files_of_its_folder(tmp_path, name):
    (tmp_path / "x").write_text("secret")
    folder = tmp_path / "checkpoint-1"
    (folder / STATE).mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps({"files": {name: {"bytes": 6, "sha256": "?"}}}))
    assert "which is not inside the checkpoint" in str(what_is_damaged(str(folder)))


@pytest.mark.parametrize("path", ["../1_Pooling", "/etc", "a/../../b", 3])
def test_modules_lie_inside_the_model(tmp_path, path):
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": path}]))
    with pytest.raises(ValueError, match="which is not inside the model"):
        module_folders(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [{"num_texts": 10**18, "shard_size": 1}, {"dim": -1}, {"shards": [{"file": "../x", "count": 3}]}, {"dtype": []}],
)
def test_a_store_has_the_shards_of_its_numbers(tmp_path, change):
    prepare_store(str(tmp_path), Manifest(num_texts=3, dim=2, dtype="float32", shard_size=3))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=r"manifest.json cannot be read: .*encode afresh"):
        read_manifest(str(tmp_path))


# ---- small files that would become large


def test_a_yaml_bomb_is_refused(tmp_path):
    lines = ["a: &a [x, x, x, x]"] + [
        f"{c}: &{c} [*{b}, *{b}, *{b}, *{b}]" for b, c in zip("abcdefghijkl", "bcdefghijklm", strict=True)
    ]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    for read in (load_yaml, read_sources):
        with pytest.raises(ValueError, match=r"bomb.yaml is not readable YAML: with its aliases"):
            read(str(path))
    path.write_text("a: &a [x]\nb: *a")
    assert load_yaml(str(path)) == {"a": ["x"], "b": ["x"]}


def test_deep_yaml_is_refused(tmp_path):
    (tmp_path / "deep.yaml").write_text("[" * 2**19)
    with pytest.raises(ValueError, match=r"deep.yaml is not readable YAML: nested more than 100 deep"):
        load_yaml(str(tmp_path / "deep.yaml"))


def test_a_line_of_separators_is_no_judgement(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\x1d")
    faults = Faults()
    assert read_qrels(str(tmp_path / "a.tsv"), faults) == {} and faults.count == 1


def test_lines_and_arrays_have_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("bge_accel.data.reading.LONGEST_LINE", 1000)
    monkeypatch.setattr("bge_accel.data.reading.LARGEST_ARRAY", 1000)
    for name, raw, what in (
        ("a.jsonl", b"x" * 5000, "longer than"),
        ("a.json", b"[" + b" " * 2**21, "one JSON array of"),
    ):
        (tmp_path / name).write_bytes(raw)
        faults = Faults()
        assert list(read_rows(str(tmp_path / name), faults)) == [] and what in faults.shown[0]


@pytest.mark.parametrize(
    "raw", [b'{"a":' * 3000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}"]
)
def test_deep_and_huge_values_are_faults_with_a_line(tmp_path, raw):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + raw)
    faults = Faults()
    assert len(list(read_rows(str(tmp_path / "a.jsonl"), faults))) == 1
    assert faults.shown[0].startswith(f"{tmp_path}/a.jsonl:2: ")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    faults = Faults()
    signal.alarm(20)
    assert find_files([str(tmp_path / "pipe.json")], faults) == [] and "neither a file" in faults.shown[0]
    with pytest.raises(ValueError, match="it is no file"):
        load_yaml(str(tmp_path / "pipe.json"))
    signal.alarm(0)


def test_a_header_is_not_believed(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="its header is damaged"):
        TensorFiles(str(tmp_path))


# ---- tokens


@dataclass(kw_only=True)
class Config:
    """A script's settings."""

    token: str | None = option(None, "access token")
    name: str = option("", "something else")


@pytest.mark.parametrize("given", [["--token", "hf_secret"], ["--token=hf_secret"]])
def test_a_token_does_not_stay_on_the_command_line(monkeypatch, given):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *given, "--name", "x"])
    cfg = parse_config(Config)
    assert (cfg.token, cfg.name) == ("hf_secret", "x")
    assert "hf_secret" not in " ".join(sys.argv) and sys.argv[-2:] == ["--name", "x"]
    assert "***" in " ".join(sys.argv)


def test_what_starts_itself_again_takes_no_token():
    """A command line that is run again would have lost its token."""
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        if "*sys.argv" in source:
            assert not re.search(r"^    token: ", source, re.MULTILINE), path


def test_no_token_is_written(tiny_model, tmp_path, run_script):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"query": f"q {i}", "pos": [f"a {i}"], "neg": [f"b {i}"]}) + "\n" for i in range(4))
    )
    done = run_script(
        "finetune.py", "--model_name_or_path", tiny_model, "--train_data", rows, "--output_dir", tmp_path / "out",
        "--max_steps", 1, "--per_device_train_batch_size", 2, "--train_group_size", 2, "--save_steps", 1,
        "--token", "hf_verysecret", "--cache_path", tmp_path / "cache",
    )  # fmt: skip
    assert "hf_verysecret" not in done.stdout + done.stderr
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.name == "run_config.yaml" for path in written) and any(path.name == "README.md" for path in written)
    assert [path for path in written if b"hf_verysecret" in path.read_bytes()] == []


# ---- control characters

CONTROLS = "\x1b[2J\x07\x7f\x9b31m\u202e\u2066\u200f"


def controls_in(text: str) -> list[str]:
    return [
        character
        for character in text
        if (unicodedata.category(character) == "Cc" and character not in "\n\t")
        or unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        or character in "\u061c\u200e\u200f"
    ]


def test_what_is_printed_holds_no_control_character():
    every = "".join(chr(code) for code in range(0x3000))
    assert controls_in(every) and not controls_in(printable(every) + shorten(every, 10**6))
    assert (
        printable("tab\tline\nকি است 是的 👩\u200d👩 می\u200cخواهم")
        == "tab\tline\nকি است 是的 👩\u200d👩 می\u200cخواهم"
    )
    assert json.loads(printable(json.dumps({"a": CONTROLS}, ensure_ascii=False))) == {"a": CONTROLS}
    printable("a\udc9b").encode()  # a name that is no UTF-8


@pytest.mark.parametrize("path", [*SOURCES, *REPO.glob("data/*.py")], ids=lambda path: path.name)
def test_nothing_is_printed_but_what_is_printable(path):
    """Nor does a message with somebody's words end the program."""
    for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
        if name in ("print", "tqdm.write", "SystemExit") and call.args:
            said = call.args[0]
            numbers = all(ast.unparse(node) in ("status", "len(rows)") for node in parts_of(said))
            is_text = isinstance(said, ast.JoinedStr) or name != "SystemExit"
            is_safe = ast.unparse(said).startswith("printable(") or (
                numbers and isinstance(said, ast.JoinedStr | ast.Constant)
            )
            assert is_safe or not is_text, f"{path.name}:{call.lineno}: {ast.unparse(call)}"


def parts_of(said: ast.AST) -> list[ast.AST]:
    """What is put into a text."""
    return [node.value for node in ast.walk(said) if isinstance(node, ast.FormattedValue)]


@pytest.mark.parametrize("name", [f"a{CONTROLS}b", os.fsdecode(b"a\x9b31m\xffb")], ids=["controls", "no_utf8"])
def test_names_and_texts_reach_no_terminal_with_their_control_characters(tmp_path, tiny_model, run_script, name):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copytree(tiny_model, folder / "model")
    row = {"query": f"what is {CONTROLS}", "pos": [f"it is {CONTROLS}"], "neg": [f"it is not {CONTROLS}"]}
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(row | {"query": f"{row['query']} {i}"}) + "\n" for i in range(20))
    )
    (folder / "bad.jsonl").write_text(json.dumps({"query": [CONTROLS], "pos": "x"}) + "\n")
    corpus = "".join(json.dumps({"id": f"{CONTROLS}{i}", "text": f"it is {i} {CONTROLS}"}) + "\n" for i in range(20))
    (folder / "corpus.jsonl").write_text(corpus)
    queries = [{"query": f"what is {i} {CONTROLS}", "positive": [f"it is {i} {CONTROLS}"]} for i in range(20)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    rows, is_utf8 = folder / "rows.jsonl", CONTROLS in name
    model, out = (
        (folder / "model", folder) if is_utf8 else (tiny_model, tmp_path)
    )  # what is written in Rust opens no other
    mine = ("mine_hard_negatives.py", "--model_name_or_path", model, "--show", 2, "--range_for_sampling", "0-20")
    tune = ("finetune.py", "--model_name_or_path", model, "--max_steps", 1, "--use_cpu", "--train_data", rows)
    evaluate = ("evaluate_retrieval.py", "--encoder", model, tiny_model, "--show", 2, "--report", "page.html")
    done = [
        run_script(*mine, "--input_file", folder / "bad.jsonl", "--output_file", "mined.jsonl", status=2),
        run_script(*mine, "--input_file", rows, "--output_file", out / "mined.jsonl"),
        run_script(*tune, "--output_dir", out / "tuned", "--query_instruction_for_retrieval", f"find {CONTROLS}"),
        run_script(*tune, "--output_dir", out / "tuned", status=2),
        run_script(*tune, "--output_dir", folder / "rows.jsonl", status=2),
        run_script(*tune, f"--{CONTROLS}", status=2),
        run_script(*evaluate, "--corpus_data", folder / "corpus.jsonl", "--query_data", folder / "queries.jsonl"),
    ]
    for one in done:
        assert not controls_in(one.stdout) and not controls_in(one.stderr), one.stdout + one.stderr
    for path in (out / "tuned" / "README.md", tmp_path / "page.html"):
        text = path.read_text(encoding="utf-8")
        assert not controls_in(text) and "\\u" in text
