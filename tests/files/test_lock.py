"""One run at a time writes to an output; whoever is dead holds nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.repo import Run
from helpers.warm_start import Job

from bge_accel.files.lock import is_empty, locked

HOLD = "from bge_accel.files.lock import locked\nwith locked({path!r}, is_folder={is_folder}): print('in', flush=True); {then}"


def hold(path: Path, is_folder: bool, then: str = "input()") -> subprocess.Popen:
    code = HOLD.format(path=str(path), is_folder=is_folder, then=then)
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "in\n"
    return other


@pytest.mark.parametrize("is_folder", [True, False])
def test_the_second_is_refused_and_told_who_is_first(tmp_path: Path, is_folder: bool) -> None:
    output = tmp_path / "new" / "output"
    with hold(output, is_folder) as other:
        expected = rf"writing into {output}: -c, process {other.pid} on {socket.gethostname()}, since 20\d\d-\d\d-\d\d "
        with pytest.raises(ValueError, match=expected), locked(str(output), is_folder=is_folder):
            pass
        if is_folder:
            assert is_empty(str(output))
        other.kill()  # its file stays, and holds nobody up
        other.wait()
    assert len(list((output if is_folder else output.parent).iterdir())) == 1
    with locked(str(output), is_folder=is_folder):
        pass
    assert not list((tmp_path / "new").rglob("*lock"))


def test_nothing_is_left_but_what_was_written(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(str(tmp_path / "a")):
        raise KeyError
    assert not (tmp_path / "a").exists()
    with locked(str(tmp_path / "a")):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]
    for is_folder in (True, False):
        output = str(tmp_path / "a" / "file" / "below")
        with pytest.raises(ValueError, match="below cannot be written to"), locked(output, is_folder=is_folder):
            pass


def test_a_child_that_outlives_its_owner_does_not_hold_it(tmp_path: Path) -> None:
    then = "import os, time; os.fork() or (print(os.getpid(), flush=True), time.sleep(60)); input()"
    with hold(tmp_path / "a", True, then) as other:
        child = int(other.stdout.readline())
        other.kill()
        other.wait()
        try:
            os.kill(child, 0)  # it is there
            with locked(str(tmp_path / "a")):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_folder_that_is_replaced_is_left_as_it_is(tmp_path: Path) -> None:
    with locked(str(tmp_path / "a")):
        os.rename(tmp_path / "a", tmp_path / "b")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / ".lock").write_text("of another")
    assert (tmp_path / "a" / ".lock").read_text() == "of another"


# ---- the scripts


@pytest.fixture
def folder(tmp_path: Path, tiny_model: str) -> Path:
    """A folder with rows, a corpus and queries."""
    rows = [{"query": f"what is {i}", "pos": [f"it is {i}"], "neg": [f"it is not {i}"]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"content": row["pos"][0]}) + "\n" for row in rows))
    queries = "".join(json.dumps({"query": row["query"], "positive": row["pos"]}) + "\n" for row in rows)
    (tmp_path / "queries.jsonl").write_text(queries)
    return tmp_path


FINETUNE = "--model_name_or_path MODEL --train_data rows.jsonl --output_dir out --use_cpu --save_strategy no"
SCRIPTS = {
    "finetune.py": (FINETUNE + " --overwrite_output_dir --max_steps 1", True),
    "mine_hard_negatives.py": ("--model_name_or_path MODEL --input_file rows.jsonl --output_file out", False),
    "score_with_reranker.py": ("--reranker MODEL --input_file rows.jsonl --output_file out", False),
    "mix_models.py": ("--model_names_or_paths MODEL MODEL --weights 0.5 0.5 --output_path out", True),
    "encode_corpus.py": ("--model_name_or_path MODEL --corpus_data corpus.jsonl --output_dir out", True),
    "evaluate_retrieval.py": (
        "--encoder MODEL --corpus_data corpus.jsonl --query_data queries.jsonl --output_file out",
        False,
    ),
    "demo.py": ("--model_name_or_path MODEL --output_dir out", True),
}


@pytest.fixture
def holder(folder: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen]:
    """Another run that writes to `out`."""
    with hold(folder / "out", request.param) as other:
        yield other
        other.kill()


@pytest.mark.parametrize(
    ("script", "holder", "processes"),
    [
        (name, is_folder, processes)
        for name, (_, is_folder) in SCRIPTS.items()
        for processes in ((1,) if name in ("mix_models.py", "demo.py") else (1, 2))
    ],
    indirect=["holder"],
)
def test_a_second_run_is_refused_before_it_writes(
    folder: Path, tiny_model: str, script: str, holder: subprocess.Popen, processes: int
) -> None:
    """Each of its processes ends, with status 2; the first speaks."""
    before = sorted(folder.rglob("*"))
    args = SCRIPTS[script][0].replace("MODEL", tiny_model).split()
    path = Path(__file__).parents[2] / "scripts" / script
    said = Job(*args, cwd=folder, script=path, processes=processes, output=folder.parent / f"{script}.out").ends(2)
    assert said.count(f"process {holder.pid} on {socket.gethostname()}") == 1 and "Traceback" not in said, said
    assert sorted(folder.rglob("*")) == before


EVALUATE = "--encoder MODEL --corpus_data corpus.jsonl --query_data queries.jsonl --output_file other "


@pytest.mark.parametrize("holder", [False], indirect=True)
@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("mix_models.py", SCRIPTS["mix_models.py"][0]),  # beside the folder, whose own lock goes when it is replaced
        ("evaluate_retrieval.py", EVALUATE + "--save_run out"),
        ("evaluate_retrieval.py", EVALUATE + "--report out"),
        ("report.py", "--metrics corpus.jsonl --output_file out"),
    ],
)
def test_every_output_has_a_lock(
    folder: Path, tiny_model: str, script: str, args: str, holder: subprocess.Popen, run_script: Run
) -> None:
    before = sorted(folder.rglob("*"))
    said = run_script(script, *args.replace("MODEL", tiny_model).split(), status=2).stderr
    assert f"process {holder.pid} on {socket.gethostname()}" in said and "Traceback" not in said, said
    assert sorted(folder.rglob("*")) == before


def test_two_trainings_in_one_folder(folder: Path, tiny_model: str, run_script: Run) -> None:
    """The second is refused, whatever its flags; killed, the first is gone on with."""
    train = [*FINETUNE.replace("MODEL", tiny_model).replace("--save_strategy no", "--save_steps 2").split()]
    first = Job(*train, "--max_steps", 200, cwd=folder, processes=2)
    first.wait_until(lambda: (folder / "out" / "checkpoint-4").exists())
    first.send(signal.SIGSTOP)
    for flags in ((), ("--overwrite_output_dir",), ("--resume_from_checkpoint", "latest")):
        said = run_script("finetune.py", *train, *flags, "--max_steps", 4, status=2).stderr
        assert f"finetune.py, process {first.processes[0].pid} on " in said, said
    first.kill()
    run_script("finetune.py", *train, "--resume_from_checkpoint", "latest", "--max_steps", 5, processes=2)
    assert (folder / "out" / "model.safetensors").exists() and not (folder / "out" / ".lock").exists()
    run_script("finetune.py", *train, "--overwrite_output_dir", "--max_steps", 1)


@pytest.mark.parametrize("left", [True, False])
def test_merging_replaces_a_folder_under_its_lock(folder: Path, tiny_model: str, run_script: Run, left: bool) -> None:
    """Also where a killed run has left a lock."""
    (folder / "out").mkdir()
    if left:
        (folder / "out" / ".lock").write_text("finetune.py, process 1 on some-node")
    args = SCRIPTS["mix_models.py"][0].replace("MODEL", tiny_model).split()
    run_script("mix_models.py", *args)
    run_script("mix_models.py", *args, "--overwrite_output_dir")
    assert (folder / "out" / "model.safetensors").exists() and not (folder / "out" / ".lock").exists()
    assert "is not empty" in run_script("mix_models.py", *args, status=2).stderr
