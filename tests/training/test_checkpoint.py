"""Checkpoints: complete or absent wherever a run is killed, damage is known, and what is put back goes on to the bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.repo import Run
from safetensors.torch import load_file

from bge_accel.files.atomic import atomic_folder, check_room, move_into, remove_checkpoint
from bge_accel.files.changes import differences
from bge_accel.models.encoder import load_encoder, save_encoder
from bge_accel.processes.signals import StopSignals, interruptible
from bge_accel.training.checkpoint import (
    choose_checkpoint,
    find_checkpoints,
    load_optimizer_tensors,
    optimizer_tensors,
    random_state,
    read_state,
    remove_leftovers,
    room_for_run,
    set_random_state,
    write_state,
)
from bge_accel.training.manifest import MANIFEST, what_is_damaged, write_manifest
from bge_accel.training.saved_model import SAVED, is_complete, keep_best, note_complete, note_saved

CPU = torch.device("cpu")


def make_checkpoint(path, content="whole"):
    with atomic_folder(str(path)) as folder:
        Path(folder, "model.safetensors").write_text(content * 100)
        Path(folder, "1_Pooling").mkdir()
        Path(folder, "1_Pooling", "config.json").write_text("{}")
        Path(folder, "empty.txt").write_text("")
        write_state(folder, {"step": 3}, {"exp_avg.weight": torch.ones(3)})
        write_manifest(folder)
    return path


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# ---- folders that are complete or absent


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(f"{target}/") as folder:
        Path(folder, "a").write_text("1")
        assert not target.exists() and Path(folder).parent == tmp_path
    assert files(tmp_path) == {"out/a": b"1"}


def test_a_folder_that_was_removed_is_not_made_again(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(str(tmp_path / "removed" / "checkpoint-3")):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for names in ("ab", "bc"):
        with atomic_folder(str(tmp_path / "out")) as folder:
            for name in names:
                Path(folder, name).write_text(names)
    assert files(tmp_path) == {"out/b": b"bc", "out/c": b"bc"}


def test_a_relative_path_means_the_folder_where_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with atomic_folder("out") as folder:
        os.chdir("elsewhere")
        Path(folder, "a").write_text("1")
    assert files(tmp_path) == {"out/a": b"1"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_after_an_error_the_old_folder_stands_and_nothing_new_is_left(tmp_path, error):
    target = make_checkpoint(tmp_path / "checkpoint-3")
    before = files(tmp_path)
    with pytest.raises(error), atomic_folder(str(target)) as folder:
        Path(folder, "a").write_text("1")
        raise error
    assert files(tmp_path) == before and os.listdir(tmp_path) == ["checkpoint-3"]


def test_what_a_killed_run_left_is_not_mixed_in(tmp_path):
    (tmp_path / "out.incomplete" / "old").mkdir(parents=True)
    with atomic_folder(str(tmp_path / "out")) as folder:
        Path(folder, "a").write_text("1")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["a"]


# Kills a process at its 1st, 2nd, ... call of the operating system and tells what then lies in the folder.
KILLED = """
import json, os, shutil, sys
from bge_accel.files.atomic import atomic_folder, remove_checkpoint
from bge_accel.training.checkpoint import find_checkpoints, remove_leftovers
from bge_accel.training.manifest import what_is_damaged, write_manifest
folder, act = sys.argv[1:]
path = f"{folder}/checkpoint-3"

def save(content):
    with atomic_folder(path) as inside:
        os.makedirs(f"{inside}/training_state/deep")
        for name in ("model", "training_state/state", "training_state/deep/more"):
            with open(f"{inside}/{name}", "w") as file:
                file.write(content)
        write_manifest(inside)

def kill_at(left):
    def count(event, arguments):
        nonlocal left
        left -= event == "open" or event.startswith(("os.", "shutil."))
        if left == 0:
            os._exit(9)
    sys.addaudithook(count)

found = []
while not found or found[-1]["status"]:
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    if act != "save":
        save("old")
    child = os.fork()
    if child == 0:
        kill_at(len(found) + 1)
        remove_checkpoint(path) if act == "remove" else save("new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    checkpoints = [(step, open(f"{at}/model").read(), what_is_damaged(at)) for step, at in find_checkpoints(folder)]
    before = os.listdir(folder)
    remove_leftovers(folder)
    found.append({"status": status, "found": checkpoints, "before": before, "after": os.listdir(folder)})
print(json.dumps(found))
"""


@pytest.mark.parametrize(("act", "at_first", "at_last"), [("save", [], ["new"]), ("replace", ["old"], ["new"]),
                                                          ("remove", ["old"], [])])  # fmt: skip
def test_a_checkpoint_is_whole_or_absent_wherever_the_process_is_killed(tmp_path, act, at_first, at_last):
    result = subprocess.run([sys.executable, "-c", KILLED, tmp_path / act, act], capture_output=True, check=True)
    kills = json.loads(result.stdout)
    assert len(kills) > (10 if act == "remove" else 20)
    contents = []
    for kill in kills:
        assert all(step == 3 and damage is None for step, _, damage in kill["found"])
        assert kill["after"] == ["checkpoint-3"] * len(kill["found"])
        contents.append([content for _, content, _ in kill["found"]])
    assert contents[0] == at_first and contents[-1] == at_last and kills[-1]["before"] == kills[-1]["after"]
    assert [content for content in contents if content not in (at_first, [], at_last)] == []
    assert contents == sorted(contents, key=[at_first, [], at_last].index)  # never back
    assert any(kill["before"] != kill["after"] for kill in kills)  # some left halves


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    ours = [
        "checkpoint-3.incomplete",
        "checkpoint-12.removed",
        "best.incomplete",
        "best.removed",
        ".last",
        ".last.incomplete",
    ]
    others = [
        "checkpoint-3",
        "best",
        "last",
        "checkpoint-x.removed",
        "notes.incomplete",
        "checkpoint-3.incomplete.bak",
        "1_Pooling",
    ]
    for name in ours + others:
        (tmp_path / name / "inside").mkdir(parents=True)
    remove_leftovers(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    remove_leftovers(str(tmp_path / "nowhere"))


def test_checkpoints_are_found_in_the_order_of_steps(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-100", "checkpoint-1.incomplete", "checkpoint-", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert find_checkpoints(str(tmp_path)) == [(step, f"{tmp_path}/checkpoint-{step}") for step in (9, 10, 100)]
    assert find_checkpoints(str(tmp_path / "nowhere")) == []


def test_a_removed_checkpoint_is_gone_even_where_one_was_half_removed(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3.removed" / "half").mkdir(parents=True)
    remove_checkpoint(str(tmp_path / "checkpoint-3"))
    assert os.listdir(tmp_path) == []


OLD = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "1_Pooling/old",
       "train_log.jsonl", "config.json", "checkpoint-3/model.safetensors"]  # fmt: skip
NEW = ["best/model.safetensors", "best/config.json", "best/1_Pooling/new"]


def make_run(folder):
    """A run's folder with a finished model, and a better one to take its place."""
    for name in (*OLD, *NEW):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


MOVED = {
    "model.safetensors": "best/model.safetensors",
    "config.json": "best/config.json",
    "1_Pooling/new": "best/1_Pooling/new",
    "train_log.jsonl": "train_log.jsonl",
    "checkpoint-3/model.safetensors": "checkpoint-3/model.safetensors",
}


def contents(folder):
    return {name: content.decode() for name, content in files(folder).items()}


def test_a_saved_model_moves_in_and_leaves_no_weights_of_the_old_one(tmp_path):
    out = make_run(tmp_path / "out")
    move_into(str(out / "best"), str(out))
    assert contents(out) == MOVED and not (out / "best").exists()


def test_where_there_is_nothing_to_move_nothing_is_removed(tmp_path):
    out = make_run(tmp_path / "out")
    shutil.rmtree(out / "best")
    before = contents(out)
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            move_into(str(out / "best"), str(out))
        assert contents(out) == before
        (out / "best").mkdir(exist_ok=True)


def test_a_move_that_was_killed_anywhere_is_finished(tmp_path):
    """The old model is whole, or the new one is: in its own folder, or as soon as the move is finished."""
    kills = 0
    while True:
        out = make_run(tmp_path / f"out{kills}")
        child = os.fork()
        if child == 0:
            left = kills + 1

            def count(event, arguments):
                nonlocal left
                left -= event in ("os.remove", "os.rename", "os.rmdir")
                if left == 0:
                    os._exit(9)

            sys.addaudithook(count)
            move_into(str(out / "best"), str(out))
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        kills += 1
        remove_leftovers(str(out))
        if (out / "best").exists():
            assert contents(out / "best") == {name.removeprefix("best/"): name for name in NEW}
            move_into(str(out / "best"), str(out))
        assert contents(out) == MOVED
    assert kills > 7


def test_a_best_model_stays_known_wherever_the_note_of_its_run_is_killed(tmp_path):
    """It is rewritten before the best model moves into its run's folder; cut short, nobody would know the model again."""
    (tmp_path / "model.safetensors").write_text("best")
    note_saved(str(tmp_path), 6)
    kills, calls, noted = 0, 0, False
    while not noted:
        child = os.fork()
        if child == 0:
            left = calls + 1

            def count(frame, event, argument):
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)

            sys.setprofile(count)
            note_complete(str(tmp_path), {"settings": 1})
            os._exit(0)
        noted = os.waitpid(child, 0)[1] == 0
        kills, calls = kills + 1, calls + 5
        assert what_is_damaged(str(tmp_path), SAVED) is None
        assert json.loads((tmp_path / SAVED).read_text())["step"] == 6
    assert kills > 20 and is_complete(str(tmp_path), {"settings": 1})


@pytest.mark.parametrize(
    ("num_saves", "num_there", "limit", "keeps_best", "expected"),
    [
        (0, 0, None, False, 10),  # the model at the end
        (3, 0, None, False, 3 * 30 + 10),
        (3, 2, None, True, 3 * 30 + 20),
        (3, 0, 2, False, 3 * 30 + 10),  # the third is whole before the first goes
        (9, 0, 2, False, 3 * 30 + 10),
        (9, 2, 2, False, 30 + 10),
        (9, 5, 2, False, 30 + 10),  # what is over the limit goes after the first
        (0, 5, 2, False, 10),
    ],
)
def test_how_much_room_a_run_takes(num_saves, num_there, limit, keeps_best, expected):
    how = {"num_saves": num_saves, "num_there": num_there, "limit": limit, "keeps_best": keeps_best}
    assert room_for_run(10, 20, **how) == expected


def test_a_disk_that_is_too_small_is_told(tmp_path):
    folder = str(tmp_path / "not" / "there" / "yet")
    check_room(folder, 1000, "make room")
    free = shutil.disk_usage(tmp_path).free
    told = rf"^{folder} will take [\d,.]+ GB more, and [\d,.]+ [GMk]B are free on its disk; make room$"
    with pytest.raises(ValueError, match=told):
        check_room(folder, free + 10**9, "make room")


# ---- the best model of a run


def save_model(folder, step, weights="weights"):
    with atomic_folder(str(folder)) as inside:
        Path(inside, "model.safetensors").write_text(weights)
        Path(inside, "1_Pooling").mkdir()
        for name in ("config.json", "1_Pooling/config.json"):
            Path(inside, name).write_text(f"{step}")
        note_saved(inside, step)
    return folder


def finish(run, step):
    """A run that has ended with the model of a step."""
    move_into(str(save_model(run / ".last", step)), str(run))


@pytest.mark.parametrize("same_folder", [True, False])
@pytest.mark.parametrize("place", ["best", "checkpoint", "finished"])
def test_the_best_model_is_found_where_the_run_has_it(tmp_path, place, same_folder):
    run = tmp_path / "run"
    run.mkdir()
    make_checkpoint(run / "checkpoint-5")
    out = run if same_folder else tmp_path / "out"
    out.mkdir(exist_ok=True)
    if place == "best":
        save_model(run / "best", 3)
    elif place == "checkpoint":
        make_checkpoint(run / "checkpoint-3")
    else:
        finish(run, 3)
    if place != "best":
        save_model(out / "best", 4)  # of a branch that was left
    before = files(run)
    assert keep_best(3, str(run / "checkpoint-5"), str(out))
    assert json.loads((out / "best" / "saved_model.json").read_text())["step"] == 3
    assert {"1_Pooling/config.json", "model.safetensors"} <= set(files(out / "best"))
    assert not any("training_state" in name for name in files(out / "best"))
    after = files(run)
    assert all(after[name] == content for name, content in before.items() if not name.startswith("best/"))
    assert keep_best(3, str(tmp_path / "nowhere" / "checkpoint-5"), str(out))


def test_what_is_of_another_step_or_damaged_is_not_the_best_model(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    make_checkpoint(run / "checkpoint-5")
    save_model(run / "best", 4)
    finish(run, 5)
    make_checkpoint(run / "checkpoint-3")
    damage(run, 3)
    before = files(run)
    assert not keep_best(3, str(run / "checkpoint-5"), str(run))
    assert not keep_best(3, str(run / "checkpoint-5"), str(tmp_path / "out"))
    assert files(run) == before and not (tmp_path / "out").exists()
    for broken in ("model.safetensors", "config.json"):
        save_model(run / "best", 3)
        assert keep_best(3, str(run / "checkpoint-5"), str(run))
        (run / "best" / broken).unlink()
        assert not keep_best(3, str(run / "checkpoint-5"), str(run))
    for content in ("", "[]", '{"step": 3}', '{"step": 3, "files": {}, "others": []}', '{"step": 3, "files": {}}'):
        (run / "best" / "saved_model.json").write_text(content)
        assert not keep_best(3, str(run / "checkpoint-5"), str(run))


# ---- damage


def test_a_whole_checkpoint_is_not_damaged_and_may_hold_more(tmp_path):
    path = make_checkpoint(tmp_path / "checkpoint-3")
    assert what_is_damaged(str(path)) is None
    (path / "notes.txt").write_text("mine")
    (path / "training_state" / "more").mkdir()
    assert what_is_damaged(str(path)) is None
    shutil.copytree(path, tmp_path / "copy")
    assert what_is_damaged(str(tmp_path / "copy")) is None


ALL_FILES = ["model.safetensors", "1_Pooling/config.json", "empty.txt", "training_state/state.json",
             "training_state/optimizer.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", ALL_FILES)
def test_every_file_is_watched_for_every_kind_of_damage(tmp_path, name):
    path = make_checkpoint(tmp_path / "checkpoint-3")
    file, whole = path / name, (path / name).read_bytes()
    if whole:
        for at in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert what_is_damaged(str(path)) == f"{name} does not hold what was written (its SHA-256 differs)"
        file.write_bytes(whole[:-1])
        shorter = f"{name} has {len(whole) - 1:,} bytes where {len(whole):,} were written"
        assert what_is_damaged(str(path)) == shorter
    file.write_bytes(whole + b"0")
    assert what_is_damaged(str(path)) == f"{name} has {len(whole) + 1:,} bytes where {len(whole):,} were written"
    file.unlink()
    assert what_is_damaged(str(path)) == f"{name} is missing"
    file.mkdir()
    assert what_is_damaged(str(path)) == f"{name} is missing"
    file.rmdir()
    file.write_bytes(whole)
    assert what_is_damaged(str(path)) is None


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"3", b"{}", b'{"files": []}', b"\xff\xfe",
                                     b'{"files": {"model.safetensors": {}}}', b'{"files": {"model.safetensors": 3}}',
                                     "half"])  # fmt: skip
def test_a_manifest_that_cannot_be_read_is_damage(tmp_path, content):
    path = make_checkpoint(tmp_path / "checkpoint-3")
    whole = (path / MANIFEST).read_bytes()
    (path / MANIFEST).write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert what_is_damaged(str(path)).startswith(f"{MANIFEST} cannot be read (")


def test_without_a_manifest_it_is_no_checkpoint(tmp_path):
    path = make_checkpoint(tmp_path / "checkpoint-3")
    (path / MANIFEST).unlink()
    for folder in (path, tmp_path / "nowhere"):
        assert what_is_damaged(str(folder)).startswith(f"{MANIFEST} is missing: ")
    (path / MANIFEST).mkdir()
    assert what_is_damaged(str(path)).startswith(f"{MANIFEST} cannot be read (")


@pytest.fixture
def run(tmp_path):
    """A folder of three checkpoints, and what was said while one was chosen."""
    for step in (2, 10, 9):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    return str(tmp_path), []


def damage(folder, *steps):
    for step in steps:
        Path(folder, f"checkpoint-{step}", "model.safetensors").write_text("broken")


def test_the_latest_checkpoint_is_chosen(run):
    folder, said = run
    (Path(folder) / "checkpoint-11.incomplete").mkdir()
    assert choose_checkpoint("latest", folder, said.append) == f"{folder}/checkpoint-10" and said == []


def test_damaged_ones_are_passed_over_and_named(run):
    folder, said = run
    damage(folder, 10, 9)
    assert choose_checkpoint("latest", folder, said.append) == f"{folder}/checkpoint-2"
    assert said == [
        f"warning: {folder}/checkpoint-{step} is damaged and passed over: "
        "model.safetensors has 6 bytes where 500 were written"
        for step in (10, 9)
    ]


def test_where_all_are_damaged_nothing_is_started_afresh(run):
    folder, said = run
    damage(folder, 10, 9, 2)
    with pytest.raises(ValueError, match=f"^every checkpoint in {folder} is damaged; move them away to start afresh$"):
        choose_checkpoint("latest", folder, said.append)
    assert len(said) == 3


def test_where_there_is_none_there_is_none(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert choose_checkpoint("latest", str(folder), lambda text: pytest.fail(text)) is None


def test_the_one_named_is_taken_or_refused(run):
    folder, said = run
    assert choose_checkpoint(f"{folder}/checkpoint-2", "elsewhere", said.append) == f"{folder}/checkpoint-2"
    damage(folder, 2)
    with pytest.raises(ValueError, match=re.escape(f"--resume_from_checkpoint {folder}/checkpoint-2: model.safetens")):
        choose_checkpoint(f"{folder}/checkpoint-2", folder, said.append)
    with pytest.raises(ValueError, match=re.escape(f"--resume_from_checkpoint {folder}: {MANIFEST} is missing")):
        choose_checkpoint(folder, folder, said.append)
    assert said == []


# ---- the state of training


def test_numbers_are_read_as_they_were_written(tmp_path):
    state = {"step": 3, "float": 0.1 + 0.2, "tiny": 5e-324, "large": 2**70, "text": "检索 \ud83d", "none": None,
             "nested": {"list": [1, [2.5, True]]}}  # fmt: skip
    write_state(str(tmp_path), state, None)
    assert read_state(str(tmp_path)) == state
    assert os.listdir(tmp_path / "training_state") == ["state.json"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({}, {}, []),
        ({"a": 1, "b": {"c": [1, 2]}}, {"b": {"c": [1, 2]}, "a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 -> 2"]),
        ({"a": 1, "b": 2}, {"b": 2, "c": 3}, ["a: 1 -> None", "c: None -> 3"]),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, ["a.b.d: 2 -> 3"]),
        ({"a": {"b": 1}}, {"a": 5}, ["a: {'b': 1} -> 5"]),
        ({"a": 0.1}, {"a": 0.1 + 1e-16}, ["a: 0.1 -> 0.1000000000000001"]),
        ({"a": [1, 2]}, {"a": [2, 1]}, ["a: [1, 2] -> [2, 1]"]),
        ({"x": 1, "a": 1}, {"a": 2, "x": 2, "b": 3}, ["x: 1 -> 2", "a: 1 -> 2", "b: None -> 3"]),
    ],
)
def test_differences_are_named_by_their_place(old, new, expected):
    assert differences(old, new) == expected


def draw():
    """What each generator gives next; odd numbers of normal ones leave half a pair behind."""
    return (
        torch.rand(3).tolist(), torch.randn(3).tolist(), torch.randperm(5).tolist(), np.random.randn(3).tolist(),
        np.random.rand(2).tolist(), random.random(), random.gauss(0, 1), random.sample(range(99), 3),
    )  # fmt: skip


@pytest.mark.parametrize("drawn_before", [0, 1, 2, 700])
def test_random_generators_go_on_where_they_stood(drawn_before):
    torch.manual_seed(drawn_before)
    np.random.seed(drawn_before)
    random.seed(drawn_before)
    for _ in range(drawn_before):
        draw()
    state = json.loads(json.dumps(random_state(CPU)))
    expected = [draw() for _ in range(3)]
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert draw() != expected[0]
    set_random_state(state, CPU)
    assert [draw() for _ in range(3)] == expected
    assert state["cuda"] is None


def train(encoder, optimizer, steps):
    """Steps that depend on all that a checkpoint has to put back: weights, moments, dropout and drawn tokens."""
    encoder.train()
    for _ in range(steps):
        input_ids = torch.randint(5, 60, (12, 9))
        embeddings = encoder(input_ids, torch.ones_like(input_ids))
        loss = torch.nn.functional.cross_entropy(embeddings[:6] @ embeddings[6:].T / 0.05, torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_optimizer(encoder, fused, rate=1e-3):
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, fused=fused)


def fresh(folder, *, fused=False, frozen="", rate=1e-3):
    encoder = load_encoder(folder)[0]
    for name, parameter in encoder.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    return encoder, make_optimizer(encoder, fused, rate)


def saved(folder, tiny_model, encoder, optimizer):
    _, tokenizer, settings = load_encoder(tiny_model)
    with atomic_folder(str(folder)) as inside:
        save_encoder(inside, encoder, tokenizer, settings)
        write_state(inside, {"random": random_state(CPU)}, optimizer_tensors(encoder, optimizer))
        write_manifest(inside)
    return str(folder)


def stored(folder):
    return load_file(f"{folder}/training_state/optimizer.safetensors")


@pytest.mark.parametrize("frozen", ["", "position_embeddings"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_goes_on_to_the_bit(tmp_path, tiny_model, fused, frozen):
    torch.manual_seed(1)
    encoder, optimizer = fresh(tiny_model, fused=fused, frozen=frozen)
    train(encoder, optimizer, 4)
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 2e-3, 3e-3  # as a schedule would
    folder = saved(tmp_path / "checkpoint-4", tiny_model, encoder, optimizer)
    assert what_is_damaged(folder) is None
    train(encoder, optimizer, 3)

    torch.manual_seed(2)
    again, other = fresh(folder, fused=fused, frozen=frozen, rate=0.5)
    load_optimizer_tensors(again, other, stored(folder), [2e-3, 3e-3])
    set_random_state(read_state(folder)["random"], CPU)
    train(again, other, 3)

    for (name, parameter), expected in zip(again.named_parameters(), encoder.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    ours, theirs = optimizer_tensors(encoder, optimizer), optimizer_tensors(again, other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [group["weight_decay"] for group in other.param_groups] == [0.1, 0.0]
    assert [group["fused"] for group in other.param_groups] == [fused] * 2
    assert not any("pooler" in key or (frozen and frozen in key) for key in ours)
    assert {key.partition(".")[0] for key in ours} == {"step", "exp_avg", "exp_avg_sq"}


def test_what_is_saved_follows_the_umask(tmp_path, tiny_model):
    encoder, optimizer = fresh(tiny_model)
    train(encoder, optimizer, 1)
    before = os.umask(0o027)
    try:
        folder = Path(saved(tmp_path / "checkpoint-1", tiny_model, encoder, optimizer))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_dir()} == {0o750}


def test_each_thing_that_is_put_back_matters(tmp_path, tiny_model):
    """The comparison above would see a moment, a rate or a generator that is left out."""
    torch.manual_seed(1)
    encoder, optimizer = fresh(tiny_model)
    train(encoder, optimizer, 4)
    folder = saved(tmp_path / "checkpoint-4", tiny_model, encoder, optimizer)
    results = []
    for left_out in ("", "exp_avg.", "exp_avg_sq.", "step.", "rate", "random"):
        again, other = fresh(folder)
        zeroed = {
            k: torch.zeros_like(v) if left_out and k.startswith(left_out) else v for k, v in stored(folder).items()
        }
        load_optimizer_tensors(again, other, zeroed, [2e-3 if left_out == "rate" else 1e-3] * 2)
        torch.manual_seed(3)
        if left_out != "random":
            set_random_state(read_state(folder)["random"], CPU)
        train(again, other, 1)
        results.append(torch.cat([parameter.detach().flatten() for parameter in again.parameters()]))
    assert all(not torch.equal(a, b) for number, a in enumerate(results) for b in results[:number])


def test_before_the_first_step_there_is_nothing_to_put_back(tiny_model):
    encoder, optimizer = fresh(tiny_model)
    assert optimizer_tensors(encoder, optimizer) == {}
    load_optimizer_tensors(encoder, optimizer, {}, [0.25, 0.5])
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5] and not optimizer.state
    train(encoder, optimizer, 1)


@pytest.fixture
def trained(tiny_model):
    encoder, optimizer = fresh(tiny_model)
    train(encoder, optimizer, 1)
    return {key: tensor.clone() for key, tensor in optimizer_tensors(encoder, optimizer).items()}


LAYER = "backbone.encoder.layer.1.output.dense.weight"


def refused(tiny_model, tensors, what, frozen=""):
    encoder, optimizer = fresh(tiny_model, frozen=frozen)
    with pytest.raises(ValueError) as error:
        load_optimizer_tensors(encoder, optimizer, tensors, [0.25, 0.5])
    assert what in str(error.value) and not optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq", "step"])
def test_a_missing_tensor_is_named(tiny_model, trained, kind):
    del trained[f"{kind}.{LAYER}"]
    refused(tiny_model, trained, f"lacks the optimiser's {kind} of {LAYER}")


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_a_tensor_of_another_shape_is_named(tiny_model, trained, kind):
    trained[f"{kind}.{LAYER}"] = torch.zeros(3, 64)
    refused(tiny_model, trained, f"{kind} of {LAYER} does not fit the model: (3, 64) and (32, 64)")


def test_other_parameters_are_named(tiny_model, trained):
    what = "a parameter that is not trained now: "
    refused(tiny_model, {**trained, "exp_avg.head.weight": torch.zeros(2)}, f"{what}head.weight")
    name = "backbone.embeddings.position_embeddings.weight"
    refused(tiny_model, trained, f"{what}{name}", frozen="position_embeddings")


def test_a_parameter_that_never_had_a_gradient_has_no_state(tiny_model, trained):
    without = {key: tensor for key, tensor in trained.items() if not key.endswith(LAYER)}
    encoder, optimizer = fresh(tiny_model)
    load_optimizer_tensors(encoder, optimizer, without, [group["lr"] for group in optimizer.param_groups])
    assert set(optimizer_tensors(encoder, optimizer)) == set(without)


# ---- nothing is pickled


def test_a_checkpoint_of_the_script_holds_no_pickle(tmp_path: Path, tiny_model: str, run_script: Run) -> None:
    rows = [{"query": f"who is {i}", "pos": [f"king {i}"], "neg": [f"no {i}"]} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_script(
        "finetune.py",
        *("--model_name_or_path", tiny_model, "--train_data", "train.jsonl", "--output_dir", "out", "--max_steps", 2),
        *("--train_group_size", 2, "--per_device_train_batch_size", 4, "--save_steps", 1),
    )
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert what_is_damaged(str(checkpoint)) is None
    readers = {".json": json.loads, ".yaml": yaml.safe_load, ".safetensors": lambda content: content}
    seen = set()
    for path in (checkpoint / "training_state").rglob("*"):
        content = path.read_bytes()
        assert readers[path.suffix](content)
        assert not zipfile.is_zipfile(path) and not content.startswith(b"\x80")  # torch's archives, bare pickles
        seen.add(path.name)
    assert seen == {"state.json", "manifest.json", "optimizer.safetensors", "run_config.yaml"}
    assert set(stored(checkpoint)) >= {f"{kind}.{LAYER}" for kind in ("exp_avg", "exp_avg_sq", "step")}
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert set(listed) == set(files(checkpoint)) - {MANIFEST}
    modes = {str(path): path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert set(modes.values()) == {0o666 & ~umask}, modes
    other = [name for name in files(tmp_path / "out") if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle"))]
    assert other == []


# ---- signals

WAITING = """
import sys, time
from bge_accel.processes.signals import StopSignals
stop = StopSignals(repeat_seconds=float(sys.argv[1]))
print(stop.received, flush=True)
try:
    while stop.received is None:
        time.sleep(0.01)
    print(stop.received, flush=True)
    time.sleep(60)
finally:
    print("cleaned up", flush=True)
"""
LAUNCHED, PRESSED = [signal.SIGTERM, signal.SIGUSR1], signal.SIGINT


@pytest.mark.parametrize(
    ("first", "second", "repeat_seconds"),
    [
        *((first, second, 0.5) for first in LAUNCHED for second in LAUNCHED),
        # Half a second after it a Ctrl-C is another one, and torchrun makes SIGTERM of a second one.
        *((PRESSED, second, 60) for second in (PRESSED, signal.SIGTERM)),
        *((first, PRESSED, 60) for first in LAUNCHED),
    ],
)
def test_the_first_signal_is_noted_and_the_second_ends_at_once(first, second, repeat_seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(repeat_seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "None\n"
        process.send_signal(first)
        assert process.stdout.readline() == f"{first.name}\n"
        for _ in range(3):  # SLURM repeats itself, and a terminal and a launcher pass the same on
            process.send_signal(first)
        time.sleep(0.6)
        assert process.poll() is None
        process.send_signal(second)
        rest, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + second and rest == ""
    expected = "\n-c: finishing the step, then saving; Ctrl-C again stops at once\n"
    assert told == (expected if first == PRESSED else "")


def test_a_launcher_may_pass_the_same_on_for_seconds():
    process = subprocess.Popen([sys.executable, "-c", WAITING, "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "None\n"
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            process.send_signal(number)
            time.sleep(0.6)
        assert process.poll() is None and process.stdout.readline() == "SIGTERM\n"
    finally:
        process.kill()


def test_ctrl_c_that_is_ignored_stays_ignored():
    """As in the background of a shell's script."""
    before = {number: signal.getsignal(number) for number in (*LAUNCHED, PRESSED)}
    try:
        signal.signal(PRESSED, signal.SIG_IGN)
        stop = StopSignals()
        with interruptible():
            os.kill(os.getpid(), PRESSED)
        assert signal.getsignal(PRESSED) is signal.SIG_IGN and stop.received is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


CLEANING_UP = """
import time
from bge_accel.processes.signals import interruptible
with interruptible("all is kept"):
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("cleaning up", flush=True)
        time.sleep(1)
        print("cleaned up", flush=True)
"""


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_ends_a_script_with_one_line(again):
    process = subprocess.Popen(
        [sys.executable, "-c", CLEANING_UP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "working\n"
        process.send_signal(PRESSED)
        assert process.stdout.readline() == "cleaning up\n"
        process.send_signal(PRESSED)  # passed on by a launcher
        if again:
            time.sleep(0.6)
            process.send_signal(PRESSED)
        rest, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert (rest, told) == (("", "") if again else ("cleaned up\n", "\n-c: stopped by Ctrl-C; all is kept\n"))
