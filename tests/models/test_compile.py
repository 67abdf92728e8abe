"""torch.compile of the encoder's layers: the same gradients, few programs, and the script's --torch_compile."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import build_tiny_model
from helpers.repo import Run
from helpers.runs import assert_same_weights, log, write_rows

from bge_accel.encoding.batching import make_token_batch
from bge_accel.models.compiling import MOST_PROGRAMS, compile_layers
from bge_accel.models.encoder import load_encoder
from bge_accel.training.losses import contrastive_loss
from bge_accel.training.step import ActivationBudget, embed_and_backward

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler here"
)


@pytest.fixture(scope="module")
def steady_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "steady", dropout=0.0)


def batch_of(seed: int, count: int = 12) -> object:
    rng = random.Random(seed)
    texts = [[2, *(rng.randint(5, 60) for _ in range(rng.randint(1, 60))), 3] for _ in range(count)]
    return make_token_batch(texts, pad_token_id=0, max_tokens=rng.choice([80, 160, 320]))


def gradients(encoder: torch.nn.Module, batch: object, budget: float = float("inf")) -> list[torch.Tensor]:
    encoder.zero_grad()
    torch.manual_seed(7)
    embed_and_backward(
        encoder,
        batch,  # type: ignore[arg-type]
        lambda emb: (contrastive_loss(emb[:4], emb[4:], temperature=0.05, group_size=2).loss, None),
        device=torch.device("cpu"),
        activations=ActivationBudget(budget),
    )
    return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


@pytest.mark.slow
def test_gradients_are_the_same_and_programs_few(steady_model: str) -> None:
    from torch._dynamo.utils import counters

    # CLS pooling has a last layer of its own.
    plain, _, _ = load_encoder(steady_model, pooling="cls", dtype=torch.float64)
    compiled, _, _ = load_encoder(steady_model, pooling="cls", dtype=torch.float64)
    torch._dynamo.reset()
    counters.clear()
    compile_layers(compiled.backbone, torch.device("cpu"))
    for seed in range(12):
        batch, budget = batch_of(seed), 0 if seed % 4 == 0 else float("inf")
        expected, found = gradients(plain.train(), batch, budget), gradients(compiled.train(), batch, budget)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
    assert 0 < counters["stats"]["unique_graphs"] <= MOST_PROGRAMS and not counters["graph_break"]
    assert not counters["recompile_limit"], "torch.compile never gave up"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_is_computed_again_drops_the_same(tiny_model: str) -> None:
    encoder, _, _ = load_encoder(tiny_model)
    torch._dynamo.reset()
    compile_layers(encoder.backbone, torch.device("cpu"))
    batch = make_token_batch([[2, *range(5, 5 + count % 3), 3] for count in range(12)], pad_token_id=0, max_tokens=999)
    assert len(batch.micro_batches) == 1
    kept, again = (gradients(encoder.train(), batch, budget) for budget in (float("inf"), 0))
    for ours, theirs in zip(again, kept, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    with torch.compiler.set_stance("force_eager"):
        without_dropout = gradients(encoder.eval(), batch)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(kept, without_dropout, strict=True))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_train_as_without(tmp_path: Path, steady_model: str, run_script: Run) -> None:
    data, held_out = write_rows(tmp_path / "rows.jsonl", 24), write_rows(tmp_path / "dev.jsonl", 8, seed=1)
    common = [
        *("--model_name_or_path", steady_model, "--train_data", data, "--eval_data", held_out, "--eval_steps", 1),
        *("--learning_rate", 1e-3, "--train_group_size", 3, "--max_steps", 3, "--logging_steps", 1),
        *("--adam_epsilon", 0.01, "--per_device_train_batch_size", 4, "--negatives_cross_device"),
    ]
    run_script("finetune.py", *common, "--output_dir", "plain", processes=2)
    run_script("finetune.py", *common, "--output_dir", "compiled", "--torch_compile", processes=2)
    assert_same_weights(tmp_path / "plain", tmp_path / "compiled", 1e-5)
    logs = [[line["loss"] for line in log(tmp_path / run) if "loss" in line] for run in ("plain", "compiled")]
    assert len(logs[0]) == 3 and logs[1] == pytest.approx(logs[0], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        (
            ["--torch_compile"],
            {"CXX": "no-compiler"},
            "needs a C++ compiler, and there is no no-compiler; drop the flag",
        ),
        # What `accelerate launch --dynamo_backend inductor` sets.
        ([], {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "CXX": "no-compiler"}, "--torch_compile needs a C++ compiler"),
        (["--torch_compile"], {"ACCELERATE_USE_FSDP": "true"}, "not for FSDP or DeepSpeed; drop the flag"),
        (["--torch_compile", "--attention", "plain"], {}, "--attention plain goes text by text"),
    ],
)
def test_what_cannot_be_compiled_is_said_before_a_file_is_written(
    tmp_path: Path, tiny_model: str, run_script: Run, flags: list[str], env: dict[str, str], message: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 8)
    result = run_script(
        *("finetune.py", "--model_name_or_path", tiny_model, "--train_data", data, "--output_dir", "out"),
        *flags,
        status=2,
        env=env,
    )
    assert message in result.stderr and not (tmp_path / "out").exists()
