"""The plan of a run, which the doctor foretells and the training keeps to."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.repo import REPO, Run
from helpers.script_files import load_script

from bge_accel.config import options_from
from bge_accel.data.sources import Source
from bge_accel.training.plan import DataOptions, PlannedSource, RunPlan, plan_run, repeated_negatives

FINETUNE = load_script(REPO / "scripts" / "finetune.py")


def plan(*sizes: int | None, num_processes: int = 1, **changes) -> RunPlan:
    run = FINETUNE.Config(
        model_name_or_path="", output_dir="", train_data=[], num_train_epochs=2, per_device_train_batch_size=10,
        train_group_size=4, use_inbatch_neg=True,
    )  # fmt: skip
    options = replace(options_from(DataOptions, run), **changes)
    sources = [
        PlannedSource.of(Source(name=str(number), path=[]), options, num_rows=size) for number, size in enumerate(sizes)
    ]
    return plan_run(sources, options, num_processes)


def test_no_more_negatives_are_promised_than_the_rows_give() -> None:
    assert (
        plan(60, per_device_train_batch_size=500, train_group_size=1).met(0)
        == "59 negatives (of the 499 of such a batch: the rows give no more)"
    )
    assert plan(600, per_device_train_batch_size=500, train_group_size=1).met(0) == "499 negatives"
    assert plan(60, 1000, per_device_train_batch_size=500, train_group_size=2).negatives == [119, 999]
    assert plan(60, 1000, per_device_train_batch_size=500, train_group_size=2, mix_sources=True).negatives == [999, 999]
    assert plan(60, per_device_train_batch_size=40, train_group_size=1, num_processes=4).negatives == [39]
    assert plan(
        60, per_device_train_batch_size=40, train_group_size=1, num_processes=4, negatives_cross_device=True
    ).negatives == [59]
    assert plan(60, per_device_train_batch_size=500, use_inbatch_neg=False).negatives == [3]
    assert plan(None, per_device_train_batch_size=500, max_steps=9).negatives == [1999], (
        "nobody knows what a stream gives"
    )


def test_rows_that_do_not_fill_a_step_are_refused() -> None:
    assert plan(25, per_device_train_batch_size=60).num_steps == 1
    with pytest.raises(ValueError, match="25 rows x 2 epochs do not fill one step of 60 queries x 1"):
        plan(25, per_device_train_batch_size=60, dataloader_drop_last=True)


def test_the_group_that_nearly_all_rows_fill() -> None:
    def of(counts: list[int], group_size: int) -> tuple[list[int], int]:
        few, fills = repeated_negatives(np.array(counts), group_size)
        return few.tolist(), fills

    assert of([3] * 5, 4) == ([], 4)
    assert of([3] * 5, 16) == ([0, 1, 2, 3, 4], 4)
    assert of([1] + [7] * 99, 8) == ([0], 8), "one short row is no reason for a smaller group"
    assert of([0, 3, 0], 8) == ([1], 4), "rows without negatives are given other rows' passages"
    assert of([0, 0], 8) == ([], 1)


ROWS = {"apple": 40, "bread": 23, "cedar": 9, "date": 6}


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        (["--max_example_num_per_dataset", 15, "--num_train_epochs", 2], 1),
        (["--negatives_cross_device", "--gradient_accumulation_steps", 3, "--num_train_epochs", 1.5], 2),
        (["--mix_sources", "--num_train_epochs", 1, "--train_group_size", 6], 1),
        (["--same_dataset_within_batch", "--small_threshold", 10, "--max_example_num_per_dataset", 21], 1),
        (["--dataloader_drop_last", "True", "--gradient_accumulation_steps", 2, "--num_train_epochs", 2], 1),
        (["--per_device_train_batch_size", 100, "--max_steps", 2], 1),
    ],
)  # fmt: skip
def test_the_doctor_plans_the_run_that_the_trainer_makes(
    tmp_path: Path, tiny_model: str, run_script: Run, flags: list[object], processes: int
) -> None:
    for name, count in ROWS.items():
        rows = [
            {"query": f"{name} {i}", "pos": [f"{name} {i} is"], "neg": [f"not {name} {i} {j}" for j in range(3)]}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": ["apple.jsonl", "cedar.jsonl"]}, {"path": "bread.jsonl", "epochs": 2}, {"path": "date.jsonl"}]
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(sources))
    data = ["sources.yaml"] if "--mix_sources" in flags else [f"{name}.jsonl" for name in ROWS]
    command = [
        "--model_name_or_path",
        tiny_model,
        "--output_dir",
        "out",
        "--disable_tqdm",
        *flags,
        "--train_data",
        *data,
    ]
    for name, usual in (("--per_device_train_batch_size", 8), ("--train_group_size", 4)):
        command += [name, usual] if name not in flags else []
    run_script("doctor.py", *command, "--json", "report.json", "--measure_steps", 0, "--num_processes", processes)
    forecast = json.loads((tmp_path / "report.json").read_text())["forecast"]
    train = ("--logging_steps", 1, "--save_strategy", "no")
    said = run_script("finetune.py", *command, *train, processes=processes).stdout
    found = re.search(r"([\d,]+) rows, ([\d,]+) steps \(([\d.]+) epochs\), global batch ([\d.]+) queries", said)
    assert found, said
    assert [forecast["rows"], forecast["steps"]] == [int(found[1]), int(found[2])]
    assert found[3] == f"{forecast['epochs']:.2f}" and found[4] == f"{forecast['queries_per_step']:g}"
    assert forecast["negatives_per_query"] == min(map(int, re.findall(r"meets (\d+) negatives", said)))
    log = [json.loads(line) for line in open(tmp_path / "out" / "train_log.jsonl")]
    assert len(log) == forecast["steps"]
    assert log[-1]["epoch"] == pytest.approx(forecast["epochs"], abs=1e-4)
    if "--train_group_size" in flags:
        assert said.count("so these repeat within a group; take --train_group_size 4, or mine more") == len(sources)
    else:
        assert "repeat within a group" not in said
