"""Every launch configuration runs the same script, on the CPU where it can, and is what the installed Accelerate reads."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.repo import REPO, Run
from helpers.runs import log, write_rows

CONFIGS = sorted((REPO / "configs" / "accelerate").glob("*.yaml"))
# Of the same launcher and kind as another.
MORE = ("gpu", "multi_gpu_bf16", "multi_gpu_fp16", "zero1", "zero2", "zero2_offload", "fsdp2_checkpointing")
MARKED = [pytest.param(path, marks=[pytest.mark.exhaustive] * (path.stem in MORE)) for path in CONFIGS]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)


def finetune(tmp_path: Path, model: str, *launch: str, **env: str) -> subprocess.CompletedProcess:
    """scripts/finetune.py behind tests/helpers/on_cpu.py, started by `launch`; two steps."""
    data = write_rows(tmp_path / "rows.jsonl", 16)
    command = [
        *(*launch, REPO / "tests" / "helpers" / "on_cpu.py", REPO / "scripts" / "finetune.py"),
        *("--model_name_or_path", model, "--train_data", data, "--output_dir", tmp_path / "out"),
        *("--max_steps", 2, "--per_device_train_batch_size", 4, "--train_group_size", 2, "--logging_steps", 1),
    ]
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **env},
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("config", MARKED, ids=lambda path: path.stem)
def test_configuration_launches_and_shards_as_it_says(tmp_path: Path, tiny_model: str, config: Path) -> None:
    content = yaml.safe_load(config.read_text())
    kind = content["distributed_type"]
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    processes = 1 if kind == "NO" else 2
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--num_processes", str(processes)]
    if config.stem == "gpu":
        launch += ["--cpu"]
    if "multi_node" in config.stem:
        launch += ["--num_machines", "1"]
    result = finetune(tmp_path, tiny_model, *launch)
    assert result.returncode == 0, result.stderr[-5000:]
    assert f"({processes} process(es) x 4" in result.stdout
    assert [record["step"] for record in log(tmp_path / "out")] == [1, 2]
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration_has_only_fields_that_accelerate_knows(config: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    content = yaml.safe_load(config.read_text())
    known = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert set(content) <= known
    flags = {action.dest for action in launch_command_parser()._actions}
    nested = [key for section in ("fsdp_config", "deepspeed_config") for key in content.get(section, {})]
    assert {key for key in nested if key not in flags} == set()
    ClusterConfig.from_yaml_file(str(config))


def test_two_processes_by_the_cpu_configuration(tmp_path: Path, tiny_model: str) -> None:
    config = REPO / "configs" / "accelerate" / "cpu_2_processes.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    result = finetune(tmp_path, tiny_model, *launch)
    assert result.returncode == 0 and "(2 process(es) x 4" in result.stdout, result.stderr[-5000:]


FLAGEMBEDDING_DS = {
    "zero_optimization": {"stage": 0},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 12},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "total_num_steps": "auto"}},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 100,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


AUTO_BUCKETS = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    "zero",
    [
        pytest.param({"stage": 0}, marks=pytest.mark.exhaustive),
        pytest.param({"stage": 1}, marks=pytest.mark.exhaustive),
        {"stage": 3, **AUTO_BUCKETS},
    ],
    ids=lambda zero: str(zero["stage"]),
)
def test_deepspeed_files_as_others_have_them_work(tmp_path: Path, tiny_model: str, zero: dict, run_script: Run) -> None:
    """The fields of FlagEmbedding's ds_stage0.json and ds_stage1.json, and of transformers' for stage 3 (sizes "auto")."""
    (tmp_path / "ds.json").write_text(json.dumps({**FLAGEMBEDDING_DS, "zero_optimization": zero}))
    data = write_rows(tmp_path / "rows.jsonl", 16)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(REPO / "tests" / "helpers" / "on_cpu.py", REPO / "scripts" / "finetune.py", "--deepspeed", "ds.json"),
        *("--model_name_or_path", tiny_model, "--train_data", data, "--output_dir", "out", "--max_steps", 2),
        *("--logging_steps", 1, "--train_group_size", 2, "--per_device_train_batch_size", 4, "--max_grad_norm", 0.5),
    ]
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-5000:]
    assert [record["step"] for record in log(tmp_path / "out")] == [1, 2]


def test_float16_overflow_moves_neither_the_step_nor_the_schedule(tmp_path: Path, tiny_model: str) -> None:
    """Sixteen batches under a loss scale that is far too high at first: some are skipped, the rest follow the schedule."""
    data = write_rows(tmp_path / "rows.jsonl", 64)
    command = [
        *(sys.executable, REPO / "tests" / "helpers" / "on_cpu.py", REPO / "scripts" / "finetune.py"),
        *("--model_name_or_path", tiny_model, "--train_data", data, "--output_dir", tmp_path / "out"),
        *("--max_steps", 16, "--per_device_train_batch_size", 4, "--train_group_size", 2, "--logging_steps", 1),
        *("--learning_rate", 1e-4, "--warmup_steps", 2, "--activation_memory_budget", 0.0002),
    ]
    env = {**os.environ, "CPU_LOSS_SCALE": str(2.0**24)}
    result = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-5000:]
    records = log(tmp_path / "out")
    assert 2 <= records[-1]["skipped_steps"] <= 14
    assert [record["step"] for record in records] == list(range(1, 17))
    for step, record in enumerate(records):  # linear: two steps up, fourteen down
        expected = 1e-4 * (step / 2 if step < 2 else (16 - step) / 14)
        assert record["learning_rate"] == pytest.approx(expected)
        assert 0 < record["grad_norm"] < 1e4, "the gradient was not unscaled"


def test_a_wrong_world_size_is_an_error(tmp_path: Path, tiny_model: str, run_script: Run) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    env = {"WORLD_SIZE": "2"}  # says two, but nothing else of a launch is there
    args = ("--model_name_or_path", tiny_model, "--train_data", data, "--output_dir", "out")
    result = run_script("finetune.py", *args, status=2, env=env, timeout=120)
    assert "WORLD_SIZE" in result.stderr or "MASTER_ADDR" in result.stderr  # ours, or accelerate's own
    assert not (tmp_path / "out").exists()
