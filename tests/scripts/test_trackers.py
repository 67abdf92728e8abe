"""--report_to: what trackers show is what the log holds."""

from pathlib import Path

import pytest
from helpers.repo import Run
from helpers.runs import log, write_rows

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)


def train(run_script: Run, model: str, *more: object) -> None:
    run_script(
        "finetune.py",
        *("--model_name_or_path", model, "--train_data", "rows.jsonl", "--output_dir", "out", "--logging_steps", 2),
        *("--per_device_train_batch_size", 4, "--query_max_len", 16, "--passage_max_len", 32, "--save_steps", 4, *more),
    )


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Each curve's value by step, of all event files of a run; of a step that was taken again, the later one."""
    events = event_accumulator.EventAccumulator(str(folder / "bge_accel")).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_log_and_goes_on_where_a_run_is_resumed(
    tiny_model: str, tmp_path: Path, run_script: Run
) -> None:
    write_rows(tmp_path / "rows.jsonl", 32)
    given = ["--report_to", "tensorboard", "--eval_data", "rows.jsonl", "--eval_steps", 2, "--eval_on_start"]
    train(run_script, tiny_model, *given, "--max_steps", 6)  # leaves checkpoint-4
    train(run_script, tiny_model, *given, "--max_steps", 8, "--resume_from_checkpoint", "latest")
    found = curves(tmp_path / "out")
    lines = log(tmp_path / "out")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps][-2:] == [6, 8]
    for name in ("loss", "learning_rate", "tokens_per_second", "grad_norm"):
        assert found[name] == pytest.approx({line["step"]: line[name] for line in steps}, rel=1e-5), name
    measured = [line for line in lines if "eval" in line]
    (data_set,) = measured[0]["eval"]
    expected = {line["step"]: line["eval"][data_set]["nDCG@10"] for line in measured}
    assert found[f"eval/{data_set}/nDCG@10"] == pytest.approx(expected, rel=1e-5)
    assert measured[0]["step"] == 0 and measured[-1]["step"] == 8


def test_there_is_a_log_and_no_tracker_by_default(tiny_model: str, tmp_path: Path, run_script: Run) -> None:
    write_rows(tmp_path / "rows.jsonl", 8)
    train(run_script, tiny_model, "--max_steps", 2)
    assert log(tmp_path / "out") and not (tmp_path / "out" / "bge_accel").exists()
    assert not list(tmp_path.rglob("*tfevents*"))


def test_a_tracker_that_does_not_exist_is_refused(tiny_model: str, tmp_path: Path, run_script: Run) -> None:
    write_rows(tmp_path / "rows.jsonl", 8)
    args = ["--model_name_or_path", tiny_model, "--train_data", "rows.jsonl", "--output_dir", "out"]
    done = run_script("finetune.py", *args, "--report_to", "paper", status=2)
    assert "--report_to paper is not one of none, tensorboard, wandb, trackio, all" in done.stderr
    assert not (tmp_path / "out").exists()
