"""scripts/doctor.py: faults planted one by one in real files, and memory foretold beside memory measured."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.repo import REPO, Run
from safetensors.numpy import load_file

from bge_accel.config import parse_config
from bge_accel.reports.doctor import Measured, fit_memory, largest_step_tokens, propose_batch
from bge_accel.reports.row_checks import read_sample

sys.path.insert(0, str(REPO / "scripts"))
import doctor  # what `python scripts/doctor.py` runs

WORDS = "king queen forest river castle gold apple wolf bread stone night song mother snow ring ship door star".split()
Rows = list[dict[str, Any]]


def sound_rows(count: int = 80, num_neg: int = 3) -> Rows:
    rng = random.Random(0)

    def phrase(size: int) -> str:
        return " ".join(rng.choices(WORDS, k=size))

    return [
        {
            "query": f"{phrase(2)} {i}",
            "pos": [f"{phrase(4)} p{i}"],
            "neg": [f"{phrase(4)} n{i} {j}" for j in range(num_neg)],
        }
        for i in range(count)
    ]


Diagnose = Callable[..., dict[str, Any]]


@pytest.fixture
def diagnose(tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture) -> Diagnose:
    """The report on rows and flags; by default those of a run without a fault."""

    def run(rows: Rows | None = None, *, raw: str = "", **flags: Any) -> dict[str, Any]:
        data = tmp_path / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows or sound_rows()) + raw, encoding="utf-8")
        settings = {
            "model_name_or_path": tiny_model,
            "train_data": [str(data)],
            "output_dir": str(tmp_path / "out"),
            "train_group_size": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-4,
            "json": str(tmp_path / "report.json"),
            "measure_steps": 0,
        } | flags
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        status = doctor.main(parse_config(doctor.Config, ["--config", str(tmp_path / "run.yaml")]))
        report = json.loads((tmp_path / "report.json").read_text())
        assert status == (0 if report["ok"] else 1)
        assert not (tmp_path / "out").exists(), "the doctor leaves the run's own folder alone"
        text = capsys.readouterr().out
        for finding in report["findings"]:
            assert f"{finding['check']}: " in text and finding["advice"] in text
        return report

    return run


def alarms(report: dict[str, Any]) -> dict[str, dict]:
    return {found["check"]: found for found in report["findings"] if found["severity"] != "note"}


def the_only(report: dict[str, Any], check: str, severity: str, line: int | None = None) -> dict:
    """The finding asked for, which has to be the only alarm."""
    found = alarms(report)
    assert list(found) == [check], found
    assert found[check]["severity"] == severity
    if line is not None:
        assert found[check]["where"].endswith(f"train.jsonl:{line}")
    return found[check]


def test_a_sound_run_raises_no_alarm(diagnose: Diagnose) -> None:
    report = diagnose()
    assert report["ok"] and report["findings"] == []
    assert report["forecast"]["steps"] == 30 and report["forecast"]["negatives_per_query"] == 31
    assert report["environment"]["gloo"] and report["environment"]["torch"]


# ---- faults in the rows


def test_positive_among_negatives(diagnose: Diagnose) -> None:
    rows = sound_rows()
    rows[6]["neg"][1] = rows[6]["pos"][0]
    assert the_only(diagnose(rows), "positive_among_negatives", "error", 7)["count"] == 1


def test_positive_among_negatives_but_for_case_or_in_another_row(diagnose: Diagnose) -> None:
    rows = sound_rows()
    rows[4]["neg"][0] = f"  {rows[4]['pos'][0].upper()}"
    rows[30]["query"], rows[30]["neg"][0] = rows[31]["query"], rows[31]["pos"][0]
    assert the_only(diagnose(rows), "near_positive_among_negatives", "warning", 5)["count"] == 2


def test_broken_rows_do_not_hide_the_other_faults(diagnose: Diagnose) -> None:
    rows = sound_rows()
    rows[6]["neg"][1] = rows[6]["pos"][0]
    report = diagnose(rows, raw='{"query": "no positives", "pos": []}\n{"query": \n')
    assert alarms(report).keys() == {"broken_rows", "positive_among_negatives"}
    assert alarms(report)["broken_rows"]["where"].endswith("train.jsonl:81")
    assert alarms(report)["broken_rows"]["count"] == 2 and not report["ok"]


def test_files_that_cannot_be_read(diagnose: Diagnose, tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in sound_rows()).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    files = [str(tmp_path / name) for name in ("train.jsonl", "cut.jsonl.gz", "empty.jsonl")]
    found = alarms(diagnose(train_data=files))
    assert found["broken_rows"]["count"] == 2 and "empty.jsonl" in found["broken_rows"]["where"]


def test_scores_of_another_length(diagnose: Diagnose) -> None:
    rows = sound_rows()
    rows[2]["pos_scores"], rows[2]["neg_scores"] = [1.0], [0.5]
    the_only(diagnose(rows), "scores_length", "error", 3)


def test_distillation_without_scores(diagnose: Diagnose) -> None:
    assert the_only(diagnose(knowledge_distillation=True), "scores_missing", "error", 1)["share"] == 1


def test_duplicate_rows(diagnose: Diagnose) -> None:
    rows = sound_rows()
    assert the_only(diagnose(rows + rows[10:15]), "duplicate_rows", "warning", 81)["count"] == 5


def test_duplicate_queries(diagnose: Diagnose) -> None:
    rows = sound_rows()
    for row in rows[40:60]:
        row["query"] = rows[0]["query"]
    assert the_only(diagnose(rows), "duplicate_queries", "warning", 41)["count"] == 20


def test_one_passage_that_answers_everything(diagnose: Diagnose) -> None:
    rows = sound_rows()
    for row in rows[:50]:
        row["pos"] = ["the king is in the castle"]
    the_only(diagnose(rows), "duplicate_passages", "warning", 1)


def test_two_questions_a_passage_are_no_alarm(diagnose: Diagnose) -> None:
    rows = sound_rows()
    for one, other in zip(rows[0:40:2], rows[1:40:2], strict=True):
        one["pos"] = other["pos"]
    report = diagnose(rows)
    assert not alarms(report) and "duplicate_passages" in {found["check"] for found in report["findings"]}


def test_repeated_negatives(diagnose: Diagnose) -> None:
    rows = sound_rows()
    for row in rows[5:10]:
        row["neg"][1] = row["neg"][0]
    the_only(diagnose(rows), "repeated_negatives", "warning", 6)


def test_query_equal_to_its_positive(diagnose: Diagnose) -> None:
    rows = sound_rows()
    for row in rows[:3]:
        row["pos"] = [row["query"].title()]
    the_only(diagnose(rows), "query_is_own_positive", "error", 1)


def test_query_that_is_another_rows_passage(diagnose: Diagnose) -> None:
    rows = sound_rows()
    for i in range(4):
        rows[i]["query"] = rows[i + 20]["pos"][0]
    the_only(diagnose(rows), "query_is_passage", "warning", 1)


def test_fewer_negatives_than_the_group_wants(diagnose: Diagnose) -> None:
    found = the_only(diagnose(train_group_size=8), "negatives_repeated", "warning", 1)
    assert found["advice"].startswith("--train_group_size 4")


def test_rows_without_negatives(diagnose: Diagnose) -> None:
    the_only(diagnose(sound_rows(num_neg=0)), "no_negatives", "warning", 1)


def test_negatives_that_are_not_used(diagnose: Diagnose) -> None:
    the_only(diagnose(train_group_size=1, per_device_train_batch_size=16), "negatives_unused", "warning", 1)


def test_no_negatives_and_in_batch_negatives_off(diagnose: Diagnose) -> None:
    report = diagnose(sound_rows(num_neg=0), use_inbatch_neg=False, train_group_size=10)
    assert not report["ok"]
    the_only(report, "only_random_negatives", "error", 1)


def test_texts_that_are_cut(diagnose: Diagnose) -> None:
    rows = sound_rows()
    for row in rows[:40]:
        row["query"] += " king" * 40
    for row in rows:
        row["pos"][0] += " princess" * 60
        row["neg"] = [text + " princess" * 60 for text in row["neg"]]
    report = diagnose(rows, query_max_len=32, passage_max_len=48)
    found = alarms(report)
    assert found.keys() == {"query_truncated", "passage_truncated"}
    assert found["query_truncated"]["share"] == 0.5 and found["passage_truncated"]["share"] == 1
    longest = int(found["passage_truncated"]["advice"].split()[1])
    assert "passage_truncated" not in alarms(diagnose(rows, passage_max_len=longest))


def test_unknown_tokens(diagnose: Diagnose) -> None:
    rows = sound_rows()
    for row in rows[:40]:
        row["query"] = "Где находится замок " + row["query"].split()[-1]
    the_only(diagnose(rows), "unknown_tokens", "error", 1)


# ---- instructions


def test_doubled_instruction(diagnose: Diagnose) -> None:
    rows = sound_rows()
    for row in rows[3:]:
        row["query"] = f"Find it: {row['query']}"
    the_only(diagnose(rows, query_instruction_for_retrieval="Find it: "), "instruction_doubled", "error", 4)


def test_instruction_written_into_the_rows(diagnose: Diagnose) -> None:
    rows = sound_rows()
    for row in rows:
        row["query"] = f"Find it: {row['query']}"
    assert "'Find it:'" in the_only(diagnose(rows), "instruction_in_rows", "warning")["seen"]


def copy_model(source: str, target: Path, query: str | None = None, pooling: str = "mean") -> str:
    """A model that says how it pools and what its query instruction is."""
    from bge_accel.models.encoder import load_encoder, save_encoder

    encoder, tokenizer, settings = load_encoder(source, pooling=pooling, query_prefix=query)
    save_encoder(str(target), encoder, tokenizer, settings)
    return str(target)


def test_the_models_own_instruction_left_out(diagnose: Diagnose, tiny_model: str, tmp_path: Path) -> None:
    model = copy_model(tiny_model, tmp_path / "with_prompt", query="Look for: ")
    report = diagnose(model_name_or_path=model, query_instruction_for_retrieval="")
    assert "'Look for: '" in the_only(report, "instruction_missing", "warning")["seen"]
    assert not alarms(diagnose(model_name_or_path=model))


def test_a_model_whose_name_tells_its_instruction(diagnose: Diagnose, tiny_model: str, tmp_path: Path) -> None:
    report = diagnose(model_name_or_path=copy_model(tiny_model, tmp_path / "multilingual-e5-small"))
    missing = [found["seen"] for found in report["findings"] if found["check"] == "instruction_missing"]
    assert len(missing) == 2 and "'query: '" in missing[0] and "'passage: '" in missing[1]


# ---- faults in the settings


def test_temperature(diagnose: Diagnose) -> None:
    the_only(diagnose(temperature=0.001), "temperature", "warning")
    the_only(diagnose(temperature=1.0), "temperature", "error")


def test_learning_rate(diagnose: Diagnose) -> None:
    the_only(diagnose(learning_rate=0.1), "learning_rate", "error")
    the_only(diagnose(learning_rate=1e-6), "learning_rate", "warning")


def test_few_negatives(diagnose: Diagnose) -> None:
    report = diagnose(sound_rows(num_neg=1), per_device_train_batch_size=2, train_group_size=2)
    assert "3 other passages" in the_only(report, "few_negatives", "warning")["seen"]
    assert not alarms(diagnose(sound_rows(num_neg=1), per_device_train_batch_size=8, train_group_size=2))


def test_warmup_and_few_steps(diagnose: Diagnose) -> None:
    the_only(diagnose(warmup_steps=100), "warmup", "error")
    the_only(diagnose(warmup_steps=20), "warmup", "warning")
    the_only(diagnose(max_steps=5), "few_steps", "warning")


def test_batch_larger_than_the_data(diagnose: Diagnose) -> None:
    report = diagnose(per_device_train_batch_size=50, num_processes=2, max_steps=50)
    the_only(report, "batch_larger_than_data", "warning")


def test_pooling_other_than_the_models(diagnose: Diagnose, tiny_model: str, tmp_path: Path) -> None:
    model = copy_model(tiny_model, tmp_path / "mean")
    the_only(diagnose(model_name_or_path=model, sentence_pooling_method="cls"), "pooling_changed", "warning")


def test_what_finetune_refuses(diagnose: Diagnose) -> None:
    found = the_only(diagnose(load_best_model_at_end=True), "settings_refused", "error")
    assert "--load_best_model_at_end needs --eval_data" in found["seen"]
    assert "takes 128 at most" in the_only(diagnose(passage_max_len=512), "model_refused", "error")["seen"]
    assert "no such file" in the_only(diagnose(train_data=["nowhere.jsonl"]), "data_refused", "error")["seen"]


def test_a_model_without_a_tokenizer_is_no_foreign_language(
    diagnose: Diagnose, tiny_model: str, tmp_path: Path
) -> None:
    model = Path(copy_model(tiny_model, tmp_path / "without"))
    for path in model.glob("*token*"):
        path.unlink()
    assert "tokenizer" in the_only(diagnose(model_name_or_path=str(model)), "model_refused", "error")["seen"]


def test_evaluation_queries_in_the_training_rows(diagnose: Diagnose, tmp_path: Path) -> None:
    held_out = tmp_path / "dev.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in sound_rows()[:5]))
    report = diagnose(eval_data=[str(held_out)])
    assert the_only(report, "evaluation_leak", "error", 1)["count"] == 5


# ---- the environment


def plant_package(folder: Path, name: str, version: str) -> None:
    """What a package manager leaves of an installed package."""
    inside = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    inside.mkdir(parents=True)
    (inside / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_two_faiss_packages(diagnose: Diagnose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_package(tmp_path / "site", "faiss-gpu", "1.12.0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "faiss-cpu and faiss-gpu" in the_only(diagnose(), "faiss_twice", "error")["seen"]


def test_a_version_that_is_not_supported(diagnose: Diagnose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_package(tmp_path / "site", "datasets", "4.0.0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "datasets is 4.0.0" in the_only(diagnose(), "package_version", "error")["seen"]


# ---- sampling, sources, streams


def test_a_sample_is_spread_over_files_and_counts_all_rows(tmp_path: Path) -> None:
    rows = sound_rows(1000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows[:30]))
    sample = read_sample([str(tmp_path)], 130)
    assert sample.num_rows == 1030 and len(sample.rows) == 130
    lines = [int(place.rpartition(":")[2]) for place in sample.places if "a.jsonl" in place]
    assert len(lines) == 100 and lines == sorted(lines) and 400 < np.mean(lines) < 600
    assert all(sample.rows[i] == rows[int(p.rpartition(":")[2]) - 1] for i, p in enumerate(sample.places))
    assert read_sample([str(tmp_path)], 130).places == sample.places


def test_findings_name_their_source(diagnose: Diagnose, tmp_path: Path) -> None:
    for name, num_neg in (("first", 3), ("second", 0)):
        lines = "".join(json.dumps(row) + "\n" for row in sound_rows(num_neg=num_neg))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "train_group_size": 4} for name in ("first", "second")]
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(sources))
    found = the_only(diagnose(train_data=[str(tmp_path / "sources.yaml")]), "no_negatives", "warning")
    assert found["seen"].startswith("source 'second': 80 of 80 rows") and "second.jsonl:1" in found["where"]


def test_a_stream_of_local_files(diagnose: Diagnose) -> None:
    report = diagnose(streaming=True, max_steps=40)
    assert not report["findings"] and report["forecast"]["rows"] is None and report["forecast"]["steps"] == 40


# ---- the whole program


def test_the_command_line_of_finetune_is_taken(tmp_path: Path, tiny_model: str, run_script: Run) -> None:
    """A few real steps are measured; the run's own folder is not made; faults set the exit status."""
    rows = sound_rows()
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        *("--model_name_or_path", tiny_model, "--train_data", data, "--output_dir", "out"),
        *"--train_group_size 4 --per_device_train_batch_size 8 --learning_rate 3e-4 --bf16".split(),
    ]
    report = json.loads(run_script("doctor.py", *flags, "--json", "-").stdout)
    assert report["ok"], report["findings"]
    forecast = report["forecast"]
    assert forecast["steps"] == 30 and len(forecast["measured"]) == 2
    assert 0.2 < forecast["peak_memory_gb"] < 2 and forecast["seconds_per_step"] > 0
    assert forecast["proposed_batch_size"] == 16, "240 queries in all are few for 50 steps"
    rows[6]["neg"][1] = rows[6]["pos"][0]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_script("doctor.py", *flags, "--measure_steps", 0, status=1)
    assert "ERRORS (1)\n  positive_among_negatives: 1 of 80 rows" in result.stdout and "train.jsonl:7" in result.stdout
    assert not (tmp_path / "out").exists()
    result = run_script("doctor.py", *flags, "--measure_steps", 1, status=2)
    assert "--measure_steps" in result.stderr
    result = run_script("doctor.py", "--help")
    assert "Exit status: 0 where nothing is worse than a warning" in " ".join(result.stdout.split())


def test_a_run_that_fails_is_told(diagnose: Diagnose, tiny_model: str, tmp_path: Path) -> None:
    """Weights that are not numbers: nothing shows before the first step."""
    from safetensors.numpy import save_file

    model = Path(copy_model(tiny_model, tmp_path / "broken"))
    tensors = load_file(model / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][:] = np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = the_only(diagnose(model_name_or_path=str(model), measure_steps=2), "run_fails", "error")
    assert "the loss is nan" in found["seen"]


# ---- forecast


def test_memory_is_a_line_up_to_the_budget() -> None:
    steps = [Measured(size, size * 100.0, 1.5 + size * 0.02, 1000.0, 0.0) for size in (16, 48)]
    memory = fit_memory(steps, budget_gb=4.0)
    assert memory.peak_gb(10_000) == pytest.approx(3.5) and memory.is_kept(10_000)
    assert memory.peak_gb(1_000_000) == pytest.approx(5.5) and not memory.is_kept(1_000_000)
    # A budget met while measuring: no larger batch takes less than what was seen.
    assert fit_memory(steps, budget_gb=0.1).peak_gb(1_000_000) == pytest.approx(2.46)
    flat = [Measured(size, size * 100.0, 1.5, 1000.0, 0.0) for size in (16, 48)]
    assert fit_memory(flat, budget_gb=0.0).peak_gb(1e6) == pytest.approx(1.5)


def test_the_proposed_batch_is_limited_by_memory_steps_and_data() -> None:
    memory = fit_memory([Measured(size, size * 100.0, 1.5 + size * 0.02, 1000.0, 0.0) for size in (16, 48)], 4.0)
    common: dict[str, Any] = {"row_tokens": [100] * 1000, "padding": 0.0, "free_gb": 20.0, "world": 1}
    assert propose_batch(memory, **common, num_examples=10**6, num_rows=10**6)[0] == 128
    assert propose_batch(memory, **common, num_examples=3200, num_rows=10**6)[0] == 64
    size, why = propose_batch(memory, **common, num_examples=None, num_rows=100)
    assert size == 32 and "half of the rows" in why


def test_the_largest_batch_of_a_run_is_foretold() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, 5000)
    largest = max(tokens[rng.permutation(5000)[:64]].sum() for _ in range(100))
    assert largest_step_tokens(tokens, 64, 100) == pytest.approx(largest, rel=0.05)
    assert largest_step_tokens([50] * 10, 8, 100) == 400


# ---- the demonstration


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training rows that scripts/demo.py builds from this Python's standard library."""
    folder = tmp_path_factory.mktemp("demo") / "data"
    subprocess.run([sys.executable, REPO / "data" / "build_code_search.py", "--output_dir", folder], check=True)
    return folder / "train.jsonl"


def demo_flags(model: str, data: Path, batch: int, group: int = 1) -> list[str]:
    """As scripts/demo.py starts finetune.py."""
    return [
        *("--model_name_or_path", model, "--train_data", str(data), "--output_dir", f"tuned-{batch}", "--seed", "42"),
        *f"--train_group_size {group} --max_steps 50 --per_device_train_batch_size {batch} --learning_rate 1e-4".split(),
        *"--temperature 0.04 --passage_max_len 64 --save_strategy no --overwrite_output_dir".split(),
    ]


def test_no_alarm_on_the_demonstration(demo_data: Path, real_model: str, run_script: Run) -> None:
    flags = demo_flags(real_model, demo_data, 64)
    report = json.loads(run_script("doctor.py", *flags, "--measure_steps", 0, "--json", "-").stdout)
    assert report["ok"] and not alarms(report), report["findings"]
    assert report["forecast"]["steps"] == 50 and report["forecast"]["negatives_per_query"] == 63


@pytest.mark.slow
@pytest.mark.exhaustive
def test_no_alarm_on_the_demonstrations_mined_negatives(
    demo_data: Path, real_model: str, run_script: Run, tmp_path: Path
) -> None:
    rows, mined = tmp_path / "rows.jsonl", tmp_path / "mined.jsonl"
    rows.write_text("".join(demo_data.read_text(encoding="utf-8").splitlines(keepends=True)[::2]), encoding="utf-8")
    run_script(
        "mine_hard_negatives.py",
        *("--model_name_or_path", real_model, "--input_file", rows, "--output_file", mined),
        *("--range_for_sampling", "5-50", "--negative_number", 3, "--max_length", 16),
        timeout=1200,
    )
    flags = demo_flags(real_model, mined, 64, group=2)
    report = json.loads(run_script("doctor.py", *flags, "--measure_steps", 0, "--json", "-").stdout)
    assert report["ok"] and not alarms(report), report["findings"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_foretold_memory_is_within_a_fifth_of_what_a_run_takes(
    demo_data: Path, real_model: str, tmp_path: Path
) -> None:
    """Two batch sizes on a CPU, both foretold from measurements at other sizes."""
    environment = {**os.environ, "PYTHONPATH": ""}

    def run(script: str, *arguments: str) -> str:
        # A process's peak starts at its parent's size, which is that of the tests: a small one stands between.
        between = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
        command = [sys.executable, "-c", between, sys.executable, str(REPO / "scripts" / script), *arguments]
        return subprocess.run(
            command, check=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, timeout=1200
        ).stdout

    ratios = {}
    for batch in (16, 64):
        flags = demo_flags(real_model, demo_data, batch)
        flags[flags.index("--max_steps") + 1] = "2"
        foretold = json.loads(run("doctor.py", *flags, "--measure_steps", "2", "--json", "-"))["forecast"][
            "peak_memory_gb"
        ]
        run("finetune.py", *flags, "--logging_steps", "1")
        log = [json.loads(line) for line in open(tmp_path / f"tuned-{batch}" / "train_log.jsonl")]
        ratios[batch] = foretold / log[-1]["memory_gb"]
        print(f"batch {batch}: foretold {foretold:.2f} GB, took {log[-1]['memory_gb']:.2f} GB")
    assert all(0.8 < ratio < 1.2 for ratio in ratios.values()), ratios
