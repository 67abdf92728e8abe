"""Interrupted runs of scripts/finetune.py end as if nothing had happened: killed, stopped, damaged, out of space."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from helpers.models import build_tiny_model
from helpers.repo import Run
from helpers.resuming import LATEST, NUM_ROWS, ON_CPU, SPY_ROWS, STEPS, Start, data, flags, launched_by, start  # noqa: F401  (fixtures)
from helpers.runs import log, weights, write_rows
from helpers.warm_start import SCRIPT, Job
from safetensors.numpy import load_file

from bge_accel.data.reading import text_id
from bge_accel.training.checkpoint import find_checkpoints
from bge_accel.training.manifest import what_is_damaged

EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
KINDS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "two processes": (2, ["--negatives_cross_device"]),
    "streaming": (2, f"--streaming --train_data streams.yaml --max_steps {STEPS} --shuffle_buffer_size 16".split()),
    "several sources": (
        1,
        f"--train_data sources.yaml --max_steps {STEPS} --gradient_accumulation_steps 2 --num_train_epochs 1".split(),
    ),
    "mixed sources": (1, f"--train_data streams.yaml --mix_sources --max_steps {STEPS}".split()),
}


def kind_of_run(kind: str, data: Path) -> tuple[int, list[str]]:
    """How many processes, and which flags."""
    processes, more = KINDS[kind]
    return processes, [str(data / part) if part.endswith(".yaml") else part for part in more]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, data: Path) -> Callable[[str], Path]:
    """The output folder of a run of this kind that nothing has disturbed; the rows it has seen lie beside it."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            folder = tmp_path_factory.mktemp("uninterrupted")
            processes, more = kind_of_run(kind, data)
            args = flags(tiny_model, data, "out", *more, processes=processes)
            env = {"SPY_ROWS": str(folder / "seen")}
            Job(*args, cwd=folder, processes=processes, through=(SPY_ROWS,), env=env).ends()
            done[kind] = folder / "out"
        return done[kind]

    return run


FIGURES = ("step", "epoch", "loss", "accuracy", "learning_rate", "grad_norm", "skipped_steps", "sources")


def assert_same_run(out: Path, expected: Path, figures: tuple[str, ...] = FIGURES) -> None:
    """The same model to the bit, and a log that has every step once, with the same figures."""
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    ours, theirs = ([{key: r.get(key) for key in figures} for r in log(folder)] for folder in (out, expected))
    assert [record["step"] for record in ours] == list(range(1, len(theirs) + 1))
    assert ours == theirs


def step_of(job: Job) -> int:
    """The last step that a job has logged."""
    steps = re.findall(r"^step (\d+)/", job.text, flags=re.MULTILINE)
    return int(steps[-1]) if steps else 0


def only(out: Path, last: int, to: Path) -> Path:
    """A copy of an output folder as it was when the checkpoint of step `last` had been written."""
    shutil.copytree(out, to, ignore=lambda folder, names: names if "checkpoint-" in Path(folder).name else [])
    for path in to.glob("checkpoint-*"):
        path.rmdir()
    for step, path in find_checkpoints(str(out)):
        if step <= last:
            shutil.copytree(path, to / Path(path).name)
    (to / "model.safetensors").unlink()
    return to


# ---- killed


def is_writing(out: Path) -> bool:
    return bool(list(out.glob("checkpoint-*.incomplete")))


def stop_while_it_writes(job: Job, out: Path, rng: random.Random) -> None:
    """Halts a job in the middle of writing a checkpoint."""
    for attempt in range(100):
        job.wait_until(lambda: is_writing(out))
        time.sleep(rng.random() * 0.03 / (attempt + 1))
        job.send(signal.SIGSTOP)
        job.wait_until(lambda: all(is_stopped(process.pid) for process in job.processes))
        if is_writing(out):
            return
        job.send(signal.SIGCONT)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def kill_again_and_again(start: Callable[[], Job], out: Path, kills: int, seed: int) -> None:
    """Kills a run at random steps, half of the times while it writes a checkpoint, then lets it end."""
    rng = random.Random(seed)
    for number, step in enumerate(sorted(rng.sample(range(3, STEPS - 12), kills))):
        job = start()
        if number % 4 == 3:  # before its first step
            job.wait_until(lambda job=job: signal_is_caught(job.processes[0].pid, signal.SIGTERM))
            time.sleep(rng.random() * 0.5)
        else:
            job.wait_until(lambda job=job, step=step: step_of(job) >= step)
        if number % 2 == 0:
            stop_while_it_writes(job, out, rng)
        else:
            time.sleep(rng.random() * 0.03)
        job.kill()
        assert number % 2 or is_writing(out)
        assert all(what_is_damaged(path) is None for _, path in find_checkpoints(str(out)))
    text = start().ends()
    assert "going on after step" in text
    assert not list(out.glob("*incomplete")) and not list(out.glob("*.removed"))


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("one process", 2),
        pytest.param("one process", 10, marks=pytest.mark.slow),
        pytest.param("two processes", 4, marks=pytest.mark.slow),
        pytest.param("streaming", 4, marks=pytest.mark.slow),
        pytest.param("several sources", 3, marks=EXHAUSTIVE),
        pytest.param("mixed sources", 3, marks=EXHAUSTIVE),
    ],
)
def test_killed_at_any_moment_it_ends_the_same(
    tmp_path: Path, data: Path, start: Start, uninterrupted: Callable[[str], Path], kind: str, kills: int
) -> None:
    processes, more = kind_of_run(kind, data)
    out = tmp_path / "out"
    kill_again_and_again(
        lambda: start("out", *more, *LATEST, "--save_total_limit", 2, processes=processes), out, kills, seed=kills
    )
    assert_same_run(out, uninterrupted(kind))


PLAIN = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


@contextmanager
def launched(*command: object, cwd: Path) -> Iterator[subprocess.Popen]:
    """A command in a group of its own, which is killed with all it has started in the end; its output goes to `output`."""
    with (
        open(cwd / "output", "w") as output,
        subprocess.Popen(
            list(map(str, command)), cwd=cwd, stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            yield process
        finally:
            kill(process)


def children_of(pid: int) -> list[int]:
    """What a process has started and not yet waited for; torchrun gives each a session of its own."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in file.read_text().split()] if file.exists() else []


def kill(process: subprocess.Popen) -> None:
    """Kills a command that was launched, and its children."""
    for group in (process.pid, *children_of(process.pid)):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, output: Path, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None and time.monotonic() < end, output.read_text()[-5000:]
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_and_resumed_as_a_user_does_it(tmp_path: Path, tiny_model: str, data: Path, run_script: Run) -> None:
    """torchrun and all it started are killed long before the end, and the same command is given again."""
    more = ("--negatives_cross_device", "--num_train_epochs", 20, "--save_steps", 20)
    expected = tmp_path / "expected"
    Job(*flags(tiny_model, data, expected, *more, processes=2), cwd=tmp_path, processes=2).ends()
    args, out = flags(tiny_model, data, "out", *more, *LATEST, processes=2), tmp_path / "out"
    with launched(*TORCHRUN, SCRIPT, *args, cwd=tmp_path) as run:
        wait_until(lambda: bool(find_checkpoints(str(out))), run, tmp_path / "output")
        kill(run)
    result = run_script("finetune.py", *args, processes=2, cold=True)
    assert "going on after step" in result.stdout
    assert_same_run(out, expected)


# ---- the rows that are seen


def rows_seen(prefix: Path, data: Path, processes: int) -> list[list[int]]:
    """The rows of each global batch, the first process's, then the next one's."""
    row_of = {}
    for number, line in enumerate((data / "rows.jsonl").read_text().splitlines()):
        row_of |= {text_id(text): number for text in json.loads(line)["pos"]}
    files = [Path(f"{prefix}-{rank}.jsonl").read_text().splitlines() for rank in range(processes)]
    return [[row_of[ids[0]] for line in batch for ids in json.loads(line)] for batch in zip(*files, strict=True)]


def test_stopped_three_times_every_row_comes_once_an_epoch_in_the_same_order(
    tmp_path: Path, data: Path, start: Start, uninterrupted: Callable[[str], Path]
) -> None:
    batches_seen = rows_seen(uninterrupted("one process").parent / "seen", data, 1)
    whole = list(itertools.chain(*batches_seen))
    assert len(whole) == 2 * NUM_ROWS
    for epoch in (whole[:NUM_ROWS], whole[NUM_ROWS:]):
        assert sorted(epoch) == list(range(NUM_ROWS))
    assert whole[:NUM_ROWS] != whole[NUM_ROWS:]
    env = {"SPY_ROWS": str(tmp_path / "seen")}
    at = 0
    for batches in (7, 15, 1):  # launchers may repeat a signal, which is then still one
        how = {"through": (SPY_ROWS,), "env": {**env, "STOP_AFTER": str(batches), "STOP_AGAIN": "0.05"}}
        text = start("out", *LATEST, "--save_steps", 1000, **how).ends()
        at += batches
        assert f"checkpoint-{at} is saved" in text
    start("out", *LATEST, "--save_steps", 1000, through=(SPY_ROWS,), env=env).ends()
    assert rows_seen(tmp_path / "seen", data, 1) == batches_seen
    assert_same_run(tmp_path / "out", uninterrupted("one process"))


def test_two_processes_see_the_same_rows_in_each_step(data: Path, uninterrupted: Callable[[str], Path]) -> None:
    one, two = (uninterrupted(kind).parent / "seen" for kind in ("one process", "two processes"))
    # Which process has which of them goes by their lengths.
    assert list(map(sorted, rows_seen(two, data, 2))) == list(map(sorted, rows_seen(one, data, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param((4,), marks=pytest.mark.exhaustive), (1, 2, 4, 1)], ids=str)
def test_the_rows_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, data: Path, start: Start, uninterrupted: Callable[[str], Path], processes: tuple[int, ...]
) -> None:
    """Four processes; and a run that is stopped and resumed by another number of processes each time."""
    seen = []
    for turn, count in enumerate(processes):
        env = {"SPY_ROWS": str(tmp_path / f"seen{turn}")}
        if turn < len(processes) - 1:
            env |= {"STOP_AFTER": "9", "STOP_RANK": "0"}
        start("out", *LATEST, "--save_steps", 1000, processes=count, through=(SPY_ROWS,), env=env).ends()
        seen += rows_seen(tmp_path / f"seen{turn}", data, count)
    expected = rows_seen(uninterrupted("one process").parent / "seen", data, 1)
    assert list(map(sorted, seen)) == list(map(sorted, expected))


# ---- stopped by signals


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 0), ("SIGUSR1", 0), ("SIGINT", 130)])
def test_a_signal_saves_and_leaves_a_mark_until_the_run_goes_on(
    tmp_path: Path, start: Start, uninterrupted: Callable[[str], Path], name: str, status: int
) -> None:
    """Ctrl-C is told from the others by the status, so that nothing that was to follow the run is begun."""
    out = tmp_path / "out"
    job = start("out", "--save_steps", 1000)
    job.wait_until(lambda: step_of(job) >= 5)
    job.send(signal.Signals[name])
    text = job.ends(status)
    assert "Traceback" not in text and ("Ctrl-C again stops at once" in text) == (name == "SIGINT")
    [(step, path)] = find_checkpoints(str(out))
    assert step == log(out)[-1]["step"] < STEPS
    assert what_is_damaged(path) is None
    assert f"stopped by {name}: checkpoint-{step} is saved; go on with --resume_from_checkpoint latest" in text
    assert (out / "requeue").read_text() == f"stopped after step {step}\n"
    assert not (out / "model.safetensors").exists()
    text = start("out", "--save_steps", 1000, *LATEST).ends()
    assert f"going on after step {step} of" in text
    assert not (out / "requeue").exists()
    assert_same_run(out, uninterrupted("one process"))


@pytest.mark.parametrize(("name", "status"), [("SIGUSR1", 0), ("SIGINT", 130)])
def test_a_signal_to_one_process_stops_all_at_the_same_step(
    tmp_path: Path, start: Start, uninterrupted: Callable[[str], Path], name: str, status: int
) -> None:
    out, more = tmp_path / "out", ("--negatives_cross_device", "--save_steps", 1000)
    env = {"SPY_ROWS": str(tmp_path / "seen"), "STOP_AFTER": "6", "STOP_RANK": "1", "STOP_SIGNAL": name}
    text = start("out", *more, processes=2, through=(SPY_ROWS,), env=env).ends(status)
    assert "stopped by a signal to another process: checkpoint-6 is saved" in text
    assert [len((tmp_path / f"seen-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)] == [6, 6]
    assert (out / "requeue").exists()
    start("out", *more, *LATEST, processes=2).ends()
    assert not (out / "requeue").exists()
    assert_same_run(out, uninterrupted("two processes"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_torchrun_and_its_processes(tmp_path: Path, tiny_model: str, data: Path) -> None:
    """Torchrun passes the first on as SIGINT and makes SIGTERM of the second; here while the processes sleep."""
    out, output = tmp_path / "out", tmp_path / "output"
    args = flags(tiny_model, data, "out", "--save_steps", 2, processes=2)
    env = ("env", "STOP_AFTER=5", "STOP_RANK=0", "STOP_SIGNAL=SIGCONT", "STOP_AGAIN=25")
    with launched(*env, *TORCHRUN, SPY_ROWS, SCRIPT, *args, cwd=tmp_path) as run:
        wait_until(lambda: len(find_checkpoints(str(out))) == 2, run, output)
        workers = children_of(run.pid)
        time.sleep(1)
        for _ in range(2):
            os.kill(run.pid, signal.SIGINT)
            time.sleep(1)
        pressed = time.monotonic()
        assert run.wait(60) != 0 and time.monotonic() - pressed < 15
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "Ctrl-C again stops at once" in output.read_text()
    assert [step for step, _ in find_checkpoints(str(out))] == [2, 4] and not (out / "requeue").exists()


def test_a_signal_while_the_model_loads_is_not_lost(tmp_path: Path, start: Start) -> None:
    job = start("out", "--save_steps", 1000)
    time.sleep(0.02)
    job.wait_until(lambda: signal_is_caught(job.processes[0].pid, signal.SIGTERM))
    job.send(signal.SIGTERM)
    assert "checkpoint-1 is saved" in job.ends(0)


def signal_is_caught(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE)
    return bool(caught) and bool(int(caught[1], 16) >> (number - 1) & 1)


def test_a_second_signal_ends_it_at_once(tmp_path: Path, start: Start, uninterrupted: Callable[[str], Path]) -> None:
    """What was saved before is still there to go on from."""
    out = tmp_path / "out"
    env = {"STOP_AFTER": "9", "STOP_AGAIN": "3.3"}
    text = start("out", through=(SPY_ROWS,), env=env).ends(128 + signal.SIGTERM)
    assert "stopped by" not in text and not (out / "requeue").exists()
    assert [step for step, _ in find_checkpoints(str(out))] == [2, 4, 6, 8]
    start("out", *LATEST).ends()
    assert_same_run(out, uninterrupted("one process"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_as_a_user_sends_them(
    tmp_path: Path, tiny_model: str, data: Path, number: signal.Signals, status: int
) -> None:
    """To `python scripts/finetune.py`; then to torchrun, which passes them on to its processes.

    Torchrun's status is its own.
    """
    out, file, more = tmp_path / "out", tmp_path / "out" / "train_log.jsonl", (*LATEST, "--save_steps", 1000)
    for launch, processes, statuses in ((PLAIN, 1, [status]), (TORCHRUN, 2, [0, 1])):
        before = len(log(out)) if out.exists() else 0
        args = flags(tiny_model, data, "out", *more, processes=processes)
        with launched(*launch, SCRIPT, *args, cwd=tmp_path) as run:
            wait_until(lambda before=before: file.exists() and len(log(out)) > before, run, tmp_path / "output")
            os.killpg(run.pid, number)
            assert run.wait(60) in statuses
        assert "is saved; go on with --resume_from_checkpoint latest" in (tmp_path / "output").read_text()
        assert (out / "requeue").exists()
    assert len(find_checkpoints(str(out))) == 2


@pytest.mark.slow
def test_a_killed_process_takes_the_others_down_and_is_named(tmp_path: Path, tiny_model: str, data: Path) -> None:
    args = flags(tiny_model, data, "out", "--max_steps", 100_000, "--save_steps", 100_000, processes=2)
    with launched(*TORCHRUN, SCRIPT, *args, cwd=tmp_path) as run:
        wait_until((tmp_path / "out" / "train_log.jsonl").exists, run, tmp_path / "output")
        workers = children_of(run.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        killed = time.monotonic()
        assert run.wait(60) != 0
    print(f"the other process was gone after {time.monotonic() - killed:.1f} s")
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    text = (tmp_path / "output").read_text()
    assert f"Signal 9 (SIGKILL) received by PID {workers[1]}" in text
    assert re.search(r"rank\s*: 1 \(local_rank: 1\)", text)


# ---- damaged checkpoints


def damage(path: Path, how: str) -> str:
    """Damages a checkpoint; what is said of it."""
    manifest = path / "training_state" / "manifest.json"
    if how.startswith("flip "):
        file = path / how.removeprefix("flip ")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return f"{how.removeprefix('flip ')} does not hold what was written"
    if how == "cut":
        file = path / "model.safetensors"
        os.truncate(file, file.stat().st_size - 1)
        return "bytes where"
    if how == "remove":
        (path / "training_state" / "state.json").unlink()
        return "training_state/state.json is missing"
    if how == "no manifest":
        manifest.unlink()
        return "training_state/manifest.json is missing"
    manifest.write_text(manifest.read_text()[:-20])
    return "training_state/manifest.json cannot be read"


DAMAGES = ["flip training_state/optimizer.safetensors", "flip tokenizer.json", "cut", "remove", "no manifest", "half"]


def test_damaged_checkpoints_are_named_and_passed_over(
    tmp_path: Path, start: Start, uninterrupted: Callable[[str], Path]
) -> None:
    """The latest seven of eight, each damaged in another way; then all."""
    out = only(uninterrupted("one process"), 2 + 2 * len(DAMAGES), tmp_path / "out")
    expected = []
    for (step, path), how in zip(find_checkpoints(str(out))[1:], DAMAGES, strict=True):
        expected.append((f"warning: out/checkpoint-{step} is damaged and passed over: ", damage(Path(path), how)))
    copy = shutil.copytree(out, tmp_path / "all_damaged")
    text = start("out", *LATEST).ends()
    said = [line for line in text.splitlines() if line.startswith("warning: out/checkpoint-")]
    assert len(said) == len(expected) == len(DAMAGES)
    for line, (start_of_line, what) in zip(said, reversed(expected), strict=True):
        assert line.startswith(start_of_line) and what in line
    assert "going on after step 2 of out/checkpoint-2" in text
    assert_same_run(out, uninterrupted("one process"))
    assert all(what_is_damaged(path) is None for _, path in find_checkpoints(str(out)))

    damage(copy / "checkpoint-2", DAMAGES[0])
    text = start("all_damaged", *LATEST).ends(2)
    assert "every checkpoint in all_damaged is damaged; move them away to start afresh" in text
    assert "Traceback" not in text and not (copy / "model.safetensors").exists()
    text = start("all_damaged", "--resume_from_checkpoint", "all_damaged/checkpoint-2").ends(2)
    assert "--resume_from_checkpoint all_damaged/checkpoint-2: training_state/optimizer.safetensors does not" in text


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_log_is_named_and_left_as_it_is(tmp_path: Path, start: Start, processes: int) -> None:
    """Bytes that are no UTF-8, and a folder in its place; a new run does not look at it."""
    out, more = tmp_path / "out", ("--max_steps", 2, "--save_steps", 1)
    start("out", *more, processes=processes).ends()
    damaged = b'{"step": 1, "run": "\xe9"}\n' + (out / "train_log.jsonl").read_bytes()
    (out / "train_log.jsonl").write_bytes(damaged)
    text = start("out", *more, "--max_steps", 3, *LATEST, processes=processes).ends(2)
    assert "error: out/train_log.jsonl: " in text and "is no line of a log; move the file away to resume" in text
    assert "Traceback" not in text and (out / "train_log.jsonl").read_bytes() == damaged
    start("out", *more, "--overwrite_output_dir", processes=processes).ends()
    assert [record["step"] for record in log(out)] == [1, 2]
    if processes == 1:
        (out / "train_log.jsonl").unlink()
        (out / "train_log.jsonl").mkdir()
        text = start("out", *more, "--max_steps", 3, *LATEST).ends(1)
        assert "out/train_log.jsonl'; earlier checkpoints are untouched. Mend that" in text and "Traceback" not in text


# ---- what has changed since


def test_a_run_that_would_see_other_rows_is_refused(
    tmp_path: Path, data: Path, start: Start, uninterrupted: Callable[[str], Path]
) -> None:
    out = only(uninterrupted("one process"), 24, tmp_path / "out")
    for name, count, seed in (("fewer", NUM_ROWS - 1, 0), ("others", NUM_ROWS, 9)):
        write_rows(tmp_path / f"{name}.jsonl", count, seed=seed)
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    for change, message in (
        (("--train_data", "fewer.jsonl"), r"sources.all.rows: \w+ -> \w+\. Put"),
        (("--train_data", "others.jsonl"), r"sources.all.rows: \w+ -> \w+\. Put"),
        (("--seed", 7), "seed: 42 -> 7"),
        (("--per_device_train_batch_size", 4), "sources.all.global_batch_size: 8 -> 4"),
        (("--gradient_accumulation_steps", 2), "gradient_accumulation_steps: 1 -> 2"),
    ):
        text = start("out", *LATEST, *change).ends(2)
        assert re.search(f"error: out/checkpoint-24 was saved by another run, .*{message}", text), text[-2000:]
        assert text.endswith("or go on regardless with --allow_changed_data\n") and "Traceback" not in text
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before
    text = start("out", *LATEST, "--seed", 7, "--train_data", "fewer.jsonl", "--allow_changed_data").ends()
    assert "note: changed since checkpoint-24: seed: 42 -> 7" in text
    assert "note: changed since checkpoint-24: sources.all.rows: " in text
    assert [record["step"] for record in log(out)] == list(range(1, STEPS + 1))


def test_the_largest_seed_works_with_any_number_of_processes_and_resumes(tmp_path: Path, start: Start) -> None:
    start("out", "--seed", 2**32 - 1, "--max_steps", 3, processes=2).ends(0)
    start("out", "--seed", 2**32 - 1, "--max_steps", 4, *LATEST).ends(0)
    assert [record["step"] for record in log(tmp_path / "out")] == [1, 2, 3, 4]


def test_other_settings_may_change_and_are_named(
    tmp_path: Path, tiny_model: str, start: Start, uninterrupted: Callable[[str], Path]
) -> None:
    """Rate, model and number of processes; the rate is then that of the present flags. Every step is logged once."""
    only(uninterrupted("one process"), 24, tmp_path / "out")
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    more = ("--learning_rate", 2e-3, "--negatives_cross_device", "--logging_steps", 3)
    text = start("out", *LATEST, *more, processes=2, model=str(moved)).ends()
    notes = re.findall("^note: changed since checkpoint-24: (.*)$", text, flags=re.MULTILINE)
    assert sorted(notes) == [
        "learning_rate: 0.001 -> 0.002",
        f"model_name_or_path: {tiny_model} -> {moved}",
        "negatives_cross_device: False -> True",
    ]
    rates = {record["step"]: record["learning_rate"] for record in log(tmp_path / "out")}
    assert len(rates) == len(log(tmp_path / "out")) and list(rates) == [*range(1, 25), 27, 30, 32]
    for record in log(uninterrupted("one process")):
        factor = 1 if record["step"] <= 24 else 2
        assert rates.get(record["step"], factor * record["learning_rate"]) == factor * record["learning_rate"]


# ---- where a run begins


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each file was written, and what it holds."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["one process", pytest.param("two processes", marks=pytest.mark.slow)])
def test_a_complete_run_is_left_as_it_is(
    tmp_path: Path, data: Path, start: Start, uninterrupted: Callable[[str], Path], kind: str
) -> None:
    """Also where it was killed while its model moved in; but not where it is damaged, or another run is asked for."""
    processes, more = kind_of_run(kind, data)
    out = tmp_path / "out"
    shutil.copytree(uninterrupted(kind), out)
    for step, path in find_checkpoints(str(out)):
        if step != 24:
            shutil.rmtree(path)
    before = everything(out)
    text = start("out", *more, *LATEST, processes=processes).ends()
    assert text.count("already complete: out holds the model that this run ends with") == 1
    assert everything(out) == before
    if processes > 1:
        return

    (out / ".moving").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (out / name).rename(out / ".moving" / name)
    assert "already complete" in start("out", *more, *LATEST).ends()
    assert everything(out) == before
    (out / "model.safetensors").write_bytes(b"damaged")
    text = start("out", *more, *LATEST).ends()
    assert "already complete" not in text and "going on after step 24" in text
    assert_same_run(out, uninterrupted(kind))
    text = start("out", *more, *LATEST, "--learning_rate", 2e-3).ends()
    assert "already complete" not in text and "going on after step 30" in text


@pytest.mark.parametrize("shorter", [("--max_steps", 5), ("--num_train_epochs", 0.1)])
def test_a_checkpoint_behind_the_end_of_the_run_is_refused(tmp_path: Path, start: Start, shorter: tuple) -> None:
    """It trained on without an end."""
    start("out", "--max_steps", 8, "--save_steps", 3).ends()
    before = everything(tmp_path / "out")
    asked = ("--max_steps", -1, *shorter) if shorter[0] != "--max_steps" else shorter
    text = start("out", *asked, "--resume_from_checkpoint", "latest").ends(2)
    assert "out/checkpoint-6 was saved after step 6, and this run ends after " in text.splitlines()[-1], text
    assert everything(tmp_path / "out") == before


def test_latest_starts_afresh_where_there_is_no_checkpoint(
    tmp_path: Path, start: Start, uninterrupted: Callable[[str], Path]
) -> None:
    """Also where an earlier run has got no further than its log."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("run_config.yaml", "train_log.jsonl"):
        shutil.copy(uninterrupted("one process") / name, out)
    for folder in ("new", "out"):
        text = start(folder, *LATEST, "--max_steps", 3, "--num_train_epochs", 2).ends()
        assert "note: no checkpoint to go on from; this run starts afresh" in text
        assert [record["step"] for record in log(tmp_path / folder)] == [1, 2, 3]
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "new" / "model.safetensors").read_bytes()


def test_a_checkpoint_is_named_that_is_none(tmp_path: Path, tiny_model: str, start: Start) -> None:
    text = start("out", "--resume_from_checkpoint", tiny_model).ends(2)
    assert f"{tiny_model} holds no training state; to start from its weights, name it by --model_name_or_path" in text
    text = start("out", "--resume_from_checkpoint", "nowhere").ends(2)
    assert "--resume_from_checkpoint nowhere is not a folder; name one\n" in text
    assert not (tmp_path / "out").exists()


def test_later_checkpoints_are_removed_only_when_told_so(
    tmp_path: Path, start: Start, uninterrupted: Callable[[str], Path]
) -> None:
    """And a checkpoint of another folder can be gone on from; only the last ones are kept."""
    out = only(uninterrupted("one process"), 28, tmp_path / "out")
    (out / "checkpoint-6.incomplete").mkdir()
    (out / "checkpoint-4.removed").mkdir()
    args = ("--resume_from_checkpoint", "out/checkpoint-24/", "--save_total_limit", 3)
    text = start("out", *args).ends(2)
    assert "--output_dir holds checkpoint-26, later than where this run begins" in text
    assert len(find_checkpoints(str(out))) == 14 and not (out / "model.safetensors").exists()
    start("elsewhere", *args).ends()
    assert [step for step, _ in find_checkpoints(str(tmp_path / "elsewhere"))] == [26, 28, 30]
    model = (uninterrupted("one process") / "model.safetensors").read_bytes()
    assert (tmp_path / "elsewhere" / "model.safetensors").read_bytes() == model
    text = start("out", *args, "--overwrite_output_dir", "--learning_rate", 1e-3).ends()
    assert "note: out/checkpoint-26, of an earlier run, is removed" in text
    assert_same_run(out, uninterrupted("one process"))
    beside = {path.name for path in uninterrupted("one process").iterdir() if not path.name.startswith("checkpoint-")}
    kept = {"checkpoint-26", "checkpoint-28", "checkpoint-30"}
    assert {path.name for path in out.iterdir()} == beside | kept


def test_nothing_in_a_checkpoint_is_pickled(uninterrupted: Callable[[str], Path]) -> None:
    for kind in ("one process", "two processes"):
        state = uninterrupted(kind) / "checkpoint-2" / "training_state"
        names = {"state.json", "manifest.json", "run_config.yaml", "optimizer.safetensors"}
        assert {str(path.relative_to(state)) for path in state.rglob("*")} == names
        for name in ("state.json", "manifest.json"):
            json.loads((state / name).read_text())
        assert load_file(state / "optimizer.safetensors")  # safetensors reads nothing else


# ---- a disk that is full, or cannot be written to


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of so many bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, size: int = 64 * 2**20) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def size_on_disk(folder: Path, page: int = 4096) -> int:
    """Bytes that a folder takes on a small disk."""
    return sum(-(-path.stat().st_size // page) * page for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_ones(
    tmp_path: Path, start: Start, uninterrupted: Callable[[str], Path]
) -> None:
    """Wherever in the third checkpoint the disk is full: its weights, its tokenizer or its optimiser.

    There was room enough when the run began.
    """
    env = {"STOP_AFTER": "1", "STOP_SIGNAL": "SIGSTOP"}
    checkpoint = uninterrupted("one process") / "checkpoint-2"
    one = size_on_disk(checkpoint)
    first = [size_on_disk_of(checkpoint, names) for names in (["model.safetensors"], ["model.safetensors", "*.json"])]
    assert 0 < first[0] < first[1] < one
    for number, part in enumerate((first[0] // 2, first[0] + 3 * 4096, first[1] + 8 * 4096)):
        with small_disk(tmp_path / f"disk{number}", 64 * 2**20) as disk:
            job = start(f"{disk}/out", through=(SPY_ROWS,), env=env)
            job.wait_until(lambda job=job: is_stopped(job.processes[0].pid))
            resize(disk, 2 * one + 2 * 4096 + part)
            job.send(signal.SIGCONT)
            text = job.ends(1)
            assert re.search(
                r"^finetune.py: error: saving after step 6 failed: .*No space left on device.*; earlier checkpoints are "
                "untouched. Make room, then go on with --resume_from_checkpoint latest$",
                text,
                flags=re.MULTILINE,
            ), text[-3000:]
            assert "Traceback" not in text
            found = find_checkpoints(str(disk / "out"))
            assert [step for step, _ in found] == [2, 4]
            assert [what_is_damaged(path) for _, path in found] == [None, None]
            assert sorted(p.name for p in (disk / "out").iterdir()) == [
                "checkpoint-2", "checkpoint-4", "run_config.yaml", "train_log.jsonl",
            ]  # fmt: skip
            if number == 0:
                resize(disk)
                assert "going on after step 4" in start(f"{disk}/out", *LATEST).ends()
                assert_same_run(disk / "out", uninterrupted("one process"))


def size_on_disk_of(folder: Path, patterns: list[str]) -> int:
    return sum(-(-p.stat().st_size // 4096) * 4096 for pattern in patterns for p in folder.glob(pattern))


def test_a_disk_too_small_for_the_run_is_told_before_anything_is_written(
    tmp_path: Path, start: Start, uninterrupted: Callable[[str], Path]
) -> None:
    """Too small for its fifteen checkpoints, but not for two and the model."""
    one = size_on_disk(uninterrupted("one process") / "checkpoint-2")
    with small_disk(tmp_path / "disk", 4 * one) as disk:
        text = start(f"{disk}/out").ends(2)
        assert re.search(
            rf"^finetune.py: error: {disk}/out will take \d+\.\d MB more, and \d\.\d MB are free on its disk; make room, name "
            "another folder, or keep fewer checkpoints: --save_total_limit 1, a larger --save_steps$",
            text,
            flags=re.MULTILINE,
        ), text[-3000:]
        assert list(disk.iterdir()) == []
        start(f"{disk}/out", "--save_total_limit", 1).ends()
        assert [step for step, _ in find_checkpoints(str(disk / "out"))] == [30]


def test_latest_is_not_offered_where_there_is_no_checkpoint(tmp_path: Path, start: Start) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    text = start("out").ends(2)
    assert "--output_dir out is in use; name another folder, or add --overwrite_output_dir\n" in text
    (tmp_path / "out" / "checkpoint-2").mkdir()
    text = start("out").ends(2)
    assert "or add --overwrite_output_dir, or, to go on with its run, --resume_from_checkpoint latest\n" in text


def test_a_log_that_does_not_fit_is_said_so(tmp_path: Path, start: Start, uninterrupted: Callable[[str], Path]) -> None:
    with small_disk(tmp_path / "disk", 8 * 2**20) as disk:
        job = start(f"{disk}/out", "--save_steps", 8)
        job.wait_until(lambda: step_of(job) >= 9)
        for _ in range(2):  # to the last byte
            try:
                with open(disk / "filled", "ab", buffering=0) as file:
                    file.write(bytes(16 * 2**20))
            except OSError:
                break
        text = job.ends(1)
        assert "No space left on device" in text and "Traceback" not in text
        (disk / "filled").unlink()
        start(f"{disk}/out", "--save_steps", 8, *LATEST).ends()
        assert_same_run(disk / "out", uninterrupted("one process"))


@pytest.mark.parametrize(
    ("written", "step", "more", "processes"),
    [
        ("a line of the log", 3, (), 1),
        ("a checkpoint", 4, ("--logging_steps", 100, "--save_steps", 4), 1),
        ("a checkpoint", 4, ("--logging_steps", 100, "--save_steps", 4), 2),
        ("a measurement", 4, ("--logging_steps", 100, "--eval_data", "dev.jsonl", "--eval_steps", 4), 1),
        ("the model", 6, ("--logging_steps", 100), 1),
    ],
)
def test_an_output_folder_that_is_removed_is_an_error_at_the_next_thing_written(
    tmp_path: Path, start: Start, written: str, step: int, more: tuple[object, ...], processes: int
) -> None:
    write_rows(tmp_path / "dev.jsonl", 10, seed=7)
    env = {"STOP_AFTER": "3", "STOP_SIGNAL": "SIGSTOP"}
    asked = ("--max_steps", 6, "--save_steps", 100, *more)
    job = start("out", *asked, processes=processes, through=(SPY_ROWS,), env=env)
    job.wait_until(lambda: all(is_stopped(process.pid) for process in job.processes))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    job.send(signal.SIGCONT)
    text = job.ends(1)
    assert f"finetune.py: error: saving after step {step} failed: " in text
    assert "; out was removed or moved away while the run wrote into it\n" in text
    assert "Traceback" not in text and "latest" not in text and not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_refused_before_the_model_is_looked_at(
    tmp_path: Path, start: Start
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("not JSON")
    (tmp_path / "file").touch(0o777)
    text = start("file/out", model=str(model)).ends(2)
    assert re.search("error: --output_dir file/out: .*file cannot be written to; name another folder", text)
    with small_disk(tmp_path / "disk", 2**20) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        text = start(f"{disk}/out", model=str(model)).ends(2)
        assert f"error: --output_dir {disk}/out: {disk} cannot be written to; name another folder" in text


# ---- loss scaling and sharding


@pytest.mark.parametrize("optim", ["adamw_torch", pytest.param("adamw_torch_fused", marks=EXHAUSTIVE)])
def test_the_loss_scale_is_gone_on_with(tmp_path: Path, start: Start, optim: str) -> None:
    """It overflows until it is low enough; the run is stopped before its first step, and later."""
    more = ("--optim", optim, "--max_steps", 8, "--num_train_epochs", 1)
    how = {"through": (SPY_ROWS, ON_CPU), "env": {"CPU_LOSS_SCALE": str(2.0**26)}}
    start("whole", *more, **how).ends()
    for batches in (6, 7):
        start("out", *more, *LATEST, **{**how, "env": {**how["env"], "STOP_AFTER": str(batches)}}).ends()
    start("out", *more, *LATEST, **how).ends()
    # The means of the first line do not have the batches before the stops.
    assert_same_run(
        tmp_path / "out", tmp_path / "whole", ("step", "epoch", "learning_rate", "grad_norm", "skipped_steps")
    )
    assert log(tmp_path / "out")[0]["skipped_steps"] >= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", ["fsdp2", *(pytest.param(mode, marks=pytest.mark.exhaustive) for mode in ("zero1", "zero2", "zero3"))]
)
def test_sharded_training_goes_on_the_same(tmp_path: Path, data: Path, start: Start, config: str) -> None:
    if config != "fsdp2":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    env = {**launched_by(config, tmp_path), "DS_ACCELERATOR": "cpu"}
    assert "ACCELERATE_USE_FSDP" in env or "ACCELERATE_USE_DEEPSPEED" in env
    more = ("--max_steps", 6, "--save_steps", 3, "--negatives_cross_device")
    how = {"processes": 2, "through": (ON_CPU,), "env": env}
    start("whole", *more, **how).ends(timeout=400)  # DeepSpeed may have to compile something first
    state = tmp_path / "whole" / "checkpoint-3" / "training_state"
    (tmp_path / "out").mkdir()
    shutil.copytree(state.parent, tmp_path / "out" / "checkpoint-3")
    assert "going on after step 3" in start("out", *more, *LATEST, **how).ends()
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    pickled = [path for path in state.rglob("*") if path.suffix not in (".json", ".yaml", ".safetensors")]
    if config == "fsdp2":
        assert pickled == []
    else:
        assert (state / "deepspeed").is_dir() and not (state / "optimizer.safetensors").exists()
        text = start("plain", *more, "--resume_from_checkpoint", state.parent, processes=2).ends(2)
        assert "was saved by DeepSpeed" in text


@pytest.mark.slow
def test_one_process_goes_on_from_a_sharded_checkpoint(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, start: Start
) -> None:
    """And the other way round: FSDP2's checkpoints are those of any other run. Without dropout, which is drawn on each."""
    model = build_tiny_model(tmp_path_factory.mktemp("models") / "steady", dropout=0.0)
    more = ("--max_steps", 6, "--save_steps", 3, "--negatives_cross_device", "--adam_epsilon", 0.01)
    sharded = {"processes": 2, "through": (ON_CPU,), "env": launched_by("fsdp2", tmp_path)}
    plain: dict[str, object] = {"processes": 1}
    start("sharded", *more, model=model, **sharded).ends()
    start("plain", *more, model=model, **plain).ends()
    for source, target, how in (("sharded", "plain_again", plain), ("plain", "sharded_again", sharded)):
        args = ("--resume_from_checkpoint", f"{source}/checkpoint-3")
        assert "going on after step 3" in start(target, *more, *args, model=model, **how).ends()
    theirs = weights(tmp_path / "plain")
    for folder in ("sharded", "plain_again", "sharded_again"):
        ours = weights(tmp_path / folder)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6, rtol=0, err_msg=f"{folder} {name}")
