"""docs/fork.md: a copied script runs from another folder, unchanged and with each of the document's changes."""

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.repo import REPO
from helpers.runs import log, weights, write_rows
from helpers.warm_start import Job
from safetensors.numpy import load_file

FORK = REPO / "docs" / "fork.md"
DIFFS = re.findall(r"^## (.+?)\n.*?^```diff\n(.*?)^```", FORK.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
BY_NAME = dict(DIFFS)


def copy_script(folder: Path, diff: str = "") -> Path:
    """finetune.py in a folder of its own, with the diff applied without any line out of place."""
    folder.mkdir()
    path = folder / "my_finetune.py"
    shutil.copy(REPO / "scripts" / "finetune.py", path)
    if diff:
        if not shutil.which("patch"):
            pytest.skip("the program patch is not installed")
        command = ["patch", "--fuzz=0", "--no-backup-if-mismatch", str(path)]
        result = subprocess.run(command, input=diff, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return path


def train(script: Path, model: str, data: Path, *arguments: object, cold: bool = False) -> Path:
    """Two steps from the script's own folder; returns where the model was saved."""
    out = script.parent / "out"
    flags = [
        *("--model_name_or_path", model, "--train_data", data, "--output_dir", out),
        *("--max_steps", 2, "--per_device_train_batch_size", 4, "--train_group_size", 1, "--logging_steps", 1),
        *("--learning_rate", 1e-3, "--save_steps", 1, *arguments),
    ]
    if cold:
        command = [sys.executable, script.name, *map(str, flags)]
        result = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    else:
        Job(*flags, cwd=script.parent, script=script).ends()
    assert [record["step"] for record in log(out)] == [1, 2]
    return out


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 12)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, rows: Path) -> Path:
    return train(copy_script(tmp_path_factory.mktemp("elsewhere") / "copy"), tiny_model, rows, cold=True)


def test_the_document_has_four_small_changes() -> None:
    assert list(BY_NAME) == ["Another loss", "Another pooling", "Another source of data", "Another kind of negative"]
    for diff in BY_NAME.values():
        assert 1 < len(re.findall(r"^[+-](?![+-])", diff, re.MULTILINE)) < 15


def test_a_copy_runs_from_another_folder_unchanged(unchanged: Path, tiny_model: str) -> None:
    before, after = weights(tiny_model), weights(unchanged)
    assert any(np.abs(after[name] - before[name]).max() > 1e-5 for name in before)


def test_another_loss(tmp_path: Path, tiny_model: str, rows: Path, unchanged: Path) -> None:
    out = train(copy_script(tmp_path / "fork", BY_NAME["Another loss"]), tiny_model, rows)
    ours, theirs = log(out)[0], log(unchanged)[0]
    assert ours["accuracy"] == theirs["accuracy"] and abs(ours["loss"] - theirs["loss"]) > 1e-3
    assert np.isfinite(ours["grad_norm"]) and ours["grad_norm"] > 0


def test_another_pooling(tmp_path: Path, tiny_model: str, rows: Path, unchanged: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    from bge_accel import EmbeddingModel

    script = copy_script(tmp_path / "fork", BY_NAME["Another pooling"])
    out = train(script, tiny_model, rows, "--sentence_pooling_method", "weightedmean")
    assert abs(log(out)[0]["loss"] - log(unchanged)[0]["loss"]) > 1e-3
    config = json.loads((out / "1_Pooling" / "config.json").read_text())
    chosen = [name for name, value in config.items() if name.startswith("pooling_mode") and value]
    assert chosen == ["pooling_mode_weightedmean_tokens"]
    texts = ["who saw the king", "a story of wolf and snow and the river"]
    tokens = AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(out)(**tokens).last_hidden_state
    pooled = []
    for states, length in zip(hidden, tokens["attention_mask"].sum(1), strict=True):
        weights = torch.arange(1, int(length) + 1)[:, None] / sum(range(1, int(length) + 1))
        pooled.append((states[:length] * weights).sum(0))
    expected = torch.nn.functional.normalize(torch.stack(pooled), dim=-1).numpy()
    np.testing.assert_allclose(SentenceTransformer(str(out)).encode(texts), expected, atol=1e-5)
    with pytest.raises(ValueError, match="is not supported"):
        EmbeddingModel(str(out))


def test_another_kind_of_negative(tmp_path: Path, tiny_model: str, rows: Path, unchanged: Path) -> None:
    out = train(copy_script(tmp_path / "fork", BY_NAME["Another kind of negative"]), tiny_model, rows)
    ours, theirs = log(out), log(unchanged)
    assert ours[0]["loss"] == theirs[0]["loss"]  # nothing is remembered yet
    assert ours[1]["loss"] > theirs[1]["loss"] + 0.1 and ours[1]["masked_per_query"] >= theirs[1]["masked_per_query"]


def test_another_source_of_data(tmp_path: Path, tiny_model: str) -> None:
    database = tmp_path / "pairs.sqlite"
    pairs = [(f"who saw the king {i}?", f"They saw the king {i} — “twice”\n") for i in range(9)]
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE pairs (query TEXT, passage TEXT)")
        connection.executemany("INSERT INTO pairs VALUES (?, ?)", pairs)
    train(copy_script(tmp_path / "fork", BY_NAME["Another source of data"]), tiny_model, database)
    written = [json.loads(line) for line in open(f"{database}.jsonl", encoding="utf-8")]
    assert written == [{"query": query, "pos": [passage]} for query, passage in pairs]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_changed_copy_is_killed_and_goes_on_and_runs_on_two_processes(
    name: str, tmp_path: Path, tiny_model: str, rows: Path
) -> None:
    script = copy_script(tmp_path / "fork", BY_NAME[name])
    more = ("--sentence_pooling_method", "weightedmean") if name == "Another pooling" else ()
    flags = [
        *("--model_name_or_path", tiny_model, "--train_data", rows, "--max_steps", 6, "--train_group_size", 1),
        *("--per_device_train_batch_size", 4, "--logging_steps", 1, "--learning_rate", 1e-3, "--save_steps", 2, *more),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Job(*flags, "--output_dir", whole, cwd=tmp_path, script=script).ends()
    job = Job(*flags, "--output_dir", killed, cwd=tmp_path, script=script)
    job.wait_until((killed / "checkpoint-2" / "training_state" / "manifest.json").exists)
    job.kill()
    Job(*flags, "--output_dir", killed, "--resume_from_checkpoint", "latest", cwd=tmp_path, script=script).ends()
    assert [record["step"] for record in log(killed)] == [1, 2, 3, 4, 5, 6]
    if name != "Another kind of negative":  # whose queue begins anew
        ours, theirs = load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors")
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    Job(
        *flags, "--output_dir", tmp_path / "two", "--negatives_cross_device", cwd=tmp_path, script=script, processes=2
    ).ends()
    assert [record["step"] for record in log(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]
