"""scripts/finetune.py run as a user runs it, on a tiny encoder."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.models import build_tiny_model
from helpers.repo import REPO, Run
from helpers.runs import WORDS, assert_same_weights, log, weights, write_rows
from helpers.warm_start import Job

from bge_accel import EmbeddingModel


def test_flagembeddings_documented_command_trains(tmp_path: Path, tiny_model: str, run_script: Run) -> None:
    """The command line of FlagEmbedding's guide after the entry point is replaced, started by torchrun."""
    data = write_rows(tmp_path / "toy_finetune_data.jsonl", 10)
    result = run_script(
        "finetune.py",
        *("--output_dir", tmp_path / "out", "--model_name_or_path", tiny_model, "--train_data", data),
        *"--learning_rate 1e-3 --fp16 --num_train_epochs 2 --per_device_train_batch_size 1 --dataloader_drop_last True "
        "--normlized True --temperature 0.02 --query_max_len 64 --passage_max_len 256 --train_group_size 2 "
        "--negatives_cross_device --logging_steps 10 --save_steps 1000".replace("256", "128").split(),
        *("--query_instruction_for_retrieval", ""),
        env={"WORLD_SIZE": "1"},
    )
    assert "20 steps" in result.stdout
    assert "fp16 needs a GPU" in result.stderr + result.stdout
    assert "--negatives_cross_device has no effect on one process" in result.stdout + result.stderr
    assert "each query meets 1 negatives" in result.stdout + result.stderr
    records = log(tmp_path / "out")
    assert [record["step"] for record in records] == [10, 20]
    assert all(
        np.abs(weights(tmp_path / "out")[k] - v).max() > 0 for k, v in weights(tiny_model).items() if "layer" in k
    )
    wanted = {"loss", "learning_rate", "grad_norm", "queries_per_second", "tokens_per_second", "padding", "memory_gb"}
    assert wanted <= records[0].keys()
    assert EmbeddingModel(str(tmp_path / "out")).settings.pooling == "cls"


def test_newer_documented_flags_config_file_and_checkpoints(tmp_path: Path, tiny_model: str, run_script: Run) -> None:
    """The newer guide's flags from YAML; distillation, instruction, mean pooling, checkpoints that load."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(folder / name, 20, pos_scores=[1.0, 2.0], neg_scores=[0.0, 0.5, -1.0], seed=len(name))
    run = {
        "model_name_or_path": tiny_model,
        "train_data": [str(folder)],
        "cache_path": str(tmp_path / "cache"),
        "train_group_size": 6,
        "query_max_len": 32,
        "passage_max_len": 64,
        "pad_to_multiple_of": 8,
        "query_instruction_for_retrieval": "Find it: ",
        "knowledge_distillation": True,
        "kd_loss_type": "kl_div",
        "learning_rate": "1e-3",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "gradient_checkpointing": True,
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "sentence_pooling_method": "mean",
        "normalize_embeddings": True,
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": 2,
        "use_mrl": False,
        "dataloader_num_workers": 0,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    run_script("finetune.py", "--config", "run.yaml", "--output_dir", "out", "--max_steps", 7)
    out = tmp_path / "out"
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2, "the checked rows are not kept where --cache_path says"
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert not list(out.glob("*incomplete*"))
    for path in (out, out / "checkpoint-4", out / "checkpoint-6"):
        model = EmbeddingModel(str(path))
        assert model.settings.pooling == "mean" and model.settings.query_prefix == "Find it: "
    assert any(np.abs(weights(out / "checkpoint-4")[k] - weights(out)[k]).max() > 0 for k in weights(out))
    resolved = yaml.safe_load((out / "run_config.yaml").read_text())
    assert resolved["max_steps"] == 7 and resolved["learning_rate"] == 1e-3
    assert resolved["train_group_size"] == 6

    # The resolved configuration repeats the run to the bit.
    run_script("finetune.py", "--config", "out/run_config.yaml", "--output_dir", "again")
    assert_same_weights(out, tmp_path / "again", 0.0)


@pytest.fixture(scope="module")
def steady_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny encoder without dropout, so that runs which share the work differently can be compared."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "steady", dropout=0.0)


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path, steady_model: str, run_script: Run) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 30)
    common = [
        *("--model_name_or_path", steady_model, "--train_data", data, "--negatives_cross_device", "--logging_steps", 1),
        *("--learning_rate", 1e-3, "--train_group_size", 3, "--num_train_epochs", 1, "--adam_epsilon", 0.01),
    ]
    one = run_script("finetune.py", *common, "--output_dir", "one", "--per_device_train_batch_size", 8)
    two = run_script("finetune.py", *common, "--output_dir", "two", "--per_device_train_batch_size", 4, processes=2)
    for result in (one, two):
        assert "each query meets 23 negatives" in result.stdout
    assert "2 process(es) x 4" in two.stdout
    # 30 rows: three full batches and one of six, each query with the passages of the whole batch.
    for ours, theirs in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "hardest_negative_similarity"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    assert len(log(tmp_path / "one")) == 4
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-6)


@pytest.mark.parametrize("more", [[], ["--mix_sources"]])
def test_processes_get_as_many_tokens(tmp_path: Path, tiny_model: str, more: list[str]) -> None:
    rng = random.Random(5)
    for name, longest in (("short", 10), ("long", 60)):
        with open(tmp_path / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for i in range(48):
                texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) + f" {name} {i} {j}" for j in range(3)]
                file.write(json.dumps({"query": f"{name} {i}", "pos": texts[:1], "neg": texts[1:]}) + "\n")
    sources = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in ("short", "long")]
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(sources))
    args = [
        *("--model_name_or_path", tiny_model, "--train_data", tmp_path / "sources.yaml", *more),
        *("--output_dir", "out", "--per_device_train_batch_size", 8, "--train_group_size", 3, "--max_steps", 6),
    ]
    spy = REPO / "tests" / "helpers" / "spy_texts.py"
    Job(*args, cwd=tmp_path, through=(spy,), processes=2, env={"SPY_TEXTS": str(tmp_path / "texts")}).ends()
    seen = [[json.loads(line) for line in open(tmp_path / f"texts-{rank}.jsonl")] for rank in (0, 1)]
    for step in range(6):
        queries, passages = ([of_rank[2 * step + part] for of_rank in seen] for part in (0, 1))
        assert [len(texts) for texts in queries] == [8, 8] and not set(queries[0]) & set(queries[1])
        size = [sum(len(text.encode()) for text in texts) for texts in passages]
        # Of 16 rows at random the halves differ by a third and more.
        assert max(size) / min(size) < 1.1
    assert len({query for texts in seen[0][:12:2] + seen[1][:12:2] for query in texts}) > 80, "no row came twice early"


def test_accumulated_batches_equal_one_batch_without_in_batch_negatives(
    tmp_path: Path, steady_model: str, run_script: Run
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 24)
    common = [
        *("--model_name_or_path", steady_model, "--train_data", data, "--use_inbatch_neg", "False"),
        *("--learning_rate", 1e-3, "--train_group_size", 3, "--num_train_epochs", 1, "--logging_steps", 1),
        *("--adam_epsilon", 0.01),
    ]
    run_script("finetune.py", *common, "--output_dir", "one", "--per_device_train_batch_size", 8)
    result = run_script(
        *("finetune.py", *common, "--output_dir", "two", "--per_device_train_batch_size", 4),
        *("--gradient_accumulation_steps", 2, "--max_tokens_per_micro_batch", 100),
    )
    assert "each query meets 2 negatives" in result.stdout
    assert [r["step"] for r in log(tmp_path / "two")] == [1, 2, 3]
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-6)


def test_not_normalised_no_negatives_and_prompts_of_rows(tmp_path: Path, tiny_model: str, run_script: Run) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 24, num_neg=0, prompt="Own prompt: ")
    result = run_script(
        *("finetune.py", "--model_name_or_path", tiny_model, "--train_data", data, "--output_dir", "out"),
        *("--normalize_embeddings", "False", "--train_group_size", 4, "--max_steps", 2, "--logging_first_step"),
        *("--fix_position_embedding", "--sentence_pooling_method", "last_token", "--save_strategy", "epoch"),
    )
    assert "the temperature is 1 (not 0.02)" in result.stdout + result.stderr
    assert result.stdout.count("rows have no negatives") == 1
    out = tmp_path / "out"
    positions = "embeddings.position_embeddings.weight"
    np.testing.assert_array_equal(weights(out)[positions], weights(tiny_model)[positions])
    settings = EmbeddingModel(str(out)).settings
    assert settings.normalize is False and settings.pooling == "last_token"
    assert [r["step"] for r in log(out)] == [1, 2]


def test_non_finite_loss_stops_with_step_and_rows(tmp_path: Path, tiny_model: str, run_script: Run) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 12)
    result = run_script(
        *("finetune.py", "--model_name_or_path", tiny_model, "--train_data", data, "--output_dir", "out"),
        *("--temperature", 1e-40, "--per_device_train_batch_size", 4, "--warmup_ratio", 0),
        status=1,
    )
    assert "error: step 1: the loss is nan on the rows" in result.stderr and "rows.jsonl:" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


def test_bad_input_is_reported_before_anything_is_loaded_or_written(
    tmp_path: Path, tiny_model: str, run_script: Run
) -> None:
    rows = [
        b"not json",
        b'["a list"]',
        b'{"pos": ["p"]}',
        b'{"query": 5, "pos": ["p"]}',
        b'{"query": "q", "pos": "p"}',
        b'{"query": "q", "pos": []}',
        b'{"query": "q", "pos": ["p"], "neg": [3]}',
        b'{"query": "q", "pos": ["p"], "neg": ["p"]}',
        b'{"query": " ", "pos": ["p"]}',
        b'{"query": "q\xff", "pos": ["p"]}',
        b'{"query": "q", "pos": ["p", ""]}',
    ]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join([json.dumps(GOOD).encode(), *rows]))
    result = run_script(
        *("finetune.py", "--model_name_or_path", tiny_model, "--train_data", "bad.jsonl", "--output_dir", "out"),
        status=2,
    )
    assert "11 faults in the input" in result.stderr and "... and 1 more" in result.stderr
    for line in range(2, 12):
        assert f"bad.jsonl:{line}: " in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_data", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--output_dir", "used"], "--output_dir used is in use"),
        (["--model_name_or_path", "./no_model"], "--model_name_or_path ./no_model is not a folder"),
        (["--learning_rate", "fast"], "'fast' is not a number"),
        (["--per_device_train_batch_size", "0"], "it has to be between 1 and 1000000"),
        (["--fp16", "--bf16"], "exclude each other"),
        (["--fsdp", "full_shard"], "--fsdp is not available: say so to `accelerate launch`"),
        (["--lr_scheduler_type", "steep"], "'steep' is not one of linear"),
        (["--warmup_ratio", "5"], "it has to be between 0 and 1"),
        (["--use_inbatch_neg", "False", "--train_group_size", "1"], "leaves nothing to learn from"),
        (["--lr", "1"], "unknown argument --lr"),
        (["--knowledge_distillation"], 'no "pos_scores" or "neg_scores"'),
    ],
)
def test_wrong_settings_are_refused_in_one_line(
    tmp_path: Path, tiny_model: str, run_script: Run, flags: list[str], message: str
) -> None:
    write_rows(tmp_path / "rows.jsonl", 3)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    args = {"--model_name_or_path": tiny_model, "--train_data": "rows.jsonl", "--output_dir": "out"}
    given = [part for item in args.items() if item[0] not in flags for part in item]
    result = run_script("finetune.py", *given, *flags, status=2, timeout=20)
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists() and os.listdir(tmp_path / "used") == ["file"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0.7"], "take 0.01 to 0.1"),
        (["--dataloader_drop_last", "True"], "do not fill one step of 32 queries"),
        (["--query_max_len", "1000"], "takes 128 at most"),
    ],
)
def test_settings_that_need_the_model_are_refused_before_a_file_is_written(
    tmp_path: Path, tiny_model: str, run_script: Run, flags: list[str], message: str
) -> None:
    write_rows(tmp_path / "rows.jsonl", 3)
    result = run_script(
        *(
            "finetune.py",
            "--model_name_or_path",
            tiny_model,
            "--train_data",
            "rows.jsonl",
            "--output_dir",
            "out",
            *flags,
        ),
        status=2,
    )
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
