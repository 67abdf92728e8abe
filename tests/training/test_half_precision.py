"""--pure_bf16: a bfloat16 copy computes, float32 weights learn."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.repo import Run
from helpers.runs import log, weights, write_rows

from bge_accel.kernels.onednn import cpu_has_bf16
from bge_accel.models.encoder import load_encoder
from bge_accel.training.half_precision import Bf16Copy

needs_bf16 = pytest.mark.skipif(
    not cpu_has_bf16(), reason="this CPU has no bfloat16 arithmetic: the flag means float32"
)


def test_the_gradient_is_that_of_float32_up_to_rounding(real_model: str) -> None:
    """Over the whole model, summed over two passes; the cosine of float32 and bfloat16 gradients is near 1."""
    encoder = load_encoder(real_model, pooling="mean", normalize=True)[0].eval()
    half = Bf16Copy(encoder)
    torch.manual_seed(0)
    ids = torch.randint(1000, 2000, (2, 8, 12))
    mask = torch.ones_like(ids[0])

    def backward(model: torch.nn.Module) -> None:
        for part in ids:
            emb = model(part, mask)
            F.cross_entropy(emb[:4] @ emb[4:].T / 0.05, torch.arange(4)).backward()
            if model is half.model:
                half.move_gradients()

    backward(encoder)
    exact = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    backward(half.model)
    moved = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert moved.keys() == exact.keys() and all(p.grad is None for p in half.model.parameters())
    assert all(grad.dtype == torch.float32 for grad in moved.values())
    flat = [torch.cat([grad.flatten() for grad in of.values()]) for of in (exact, moved)]
    assert F.cosine_similarity(*flat, dim=0) > 0.995
    assert 0.98 < flat[1].norm() / flat[0].norm() < 1.02


def test_steps_too_small_for_bfloat16_add_up() -> None:
    """A thousand steps of 1e-5 on a weight of 1, where bfloat16 knows 0.996 and 1 and nothing between."""
    master = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(master.weight)
    half = Bf16Copy(master)
    optimizer = torch.optim.SGD(master.parameters(), lr=1e-5)
    for _ in range(1000):
        half.model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        half.move_gradients()
        optimizer.step()
        optimizer.zero_grad()
        half.take_weights()
    assert master.weight.item() == pytest.approx(0.99, abs=1e-4)
    assert half.model.weight.item() == pytest.approx(0.99, abs=4e-3) != 1


def test_what_is_not_trained_has_no_gradient() -> None:
    master = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    master[0].weight.requires_grad_(False)
    half = Bf16Copy(master)
    half.model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    half.move_gradients()
    assert master[0].weight.grad is None and master[1].weight.grad is not None


@needs_bf16
def test_runs_of_one_and_of_two_processes_end_near_the_float32_one(
    real_model: str, tmp_path: Path, run_script: Run
) -> None:
    """With accumulation, micro-batches computed again, and on two processes the averaging of bfloat16 gradients."""
    write_rows(tmp_path / "rows.jsonl", 64)
    model = tmp_path / "model"  # without dropout, which two processes would draw otherwise than one
    model.mkdir()
    for file in Path(real_model).iterdir():
        (model / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(
        json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    common = ["--model_name_or_path", model, "--train_data", "rows.jsonl", "--max_steps", 3, "--logging_steps", 1]
    common += ["--gradient_accumulation_steps", 2, "--negatives_cross_device", "--adam_epsilon", 1e-3]
    common += ["--query_max_len", 16, "--passage_max_len", 32, "--learning_rate", 1e-3, "--train_group_size", 2]
    common += ["--max_tokens_per_micro_batch", 260, "--activation_memory_budget", 0.02]
    batch = "--per_device_train_batch_size"
    run_script("finetune.py", *common, batch, 8, "--output_dir", "exact")
    exact, before = weights(tmp_path / "exact"), weights(model)
    for processes in (1, 2):
        flags = [*common, batch, 8 // processes, "--pure_bf16", "--output_dir", f"half-{processes}"]
        done = run_script("finetune.py", *flags, processes=processes)
        assert "pure bf16 on cpu" in done.stdout + done.stderr
        half = weights(tmp_path / f"half-{processes}")
        assert {tensor.dtype.name for tensor in half.values()} == {"float32"}
        moved, expected = (
            torch.cat([torch.from_numpy(of[name] - before[name]).flatten() for name in exact if "pooler" not in name])
            for of in (half, exact)
        )
        assert F.cosine_similarity(moved, expected, dim=0) > 0.99
        losses = [[line["loss"] for line in log(tmp_path / out)] for out in ("exact", f"half-{processes}")]
        assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=1e-3)


@needs_bf16
def test_a_resumed_run_ends_with_the_same_weights(tiny_model: str, tmp_path: Path, run_script: Run) -> None:
    write_rows(tmp_path / "rows.jsonl", 64)
    common = ["--model_name_or_path", tiny_model, "--train_data", "rows.jsonl", "--pure_bf16", "--learning_rate", 1e-3]
    common += ["--per_device_train_batch_size", 8, "--query_max_len", 16, "--passage_max_len", 32, "--save_steps", 4]
    run_script("finetune.py", *common, "--output_dir", "whole", "--max_steps", 8)
    common += ["--output_dir", "again", "--max_steps", 8]
    run_script("finetune.py", *common, "--resume_from_checkpoint", "whole/checkpoint-4")
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert whole.keys() == again.keys() and all((whole[name] == again[name]).all() for name in whole)


def test_two_precisions_at_once_are_refused(tiny_model: str, tmp_path: Path, run_script: Run) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "a", "pos": ["b"]}))
    args = ["--model_name_or_path", tiny_model, "--train_data", "rows.jsonl", "--output_dir", "out"]
    done = run_script("finetune.py", *args, "--bf16", "--pure_bf16", status=2)
    assert "exclude each other" in done.stderr
