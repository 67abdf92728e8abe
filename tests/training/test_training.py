"""The step gives the gradient of the plain computation, whatever is kept, recomputed or spread over processes."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.repo import REPO
from helpers.warm_start import Job

from bge_accel.encoding.batching import make_token_batch
from bge_accel.models.encoder import Encoder, load_encoder
from bge_accel.models.pooling import POOLING
from bge_accel.training.losses import contrastive_loss
from bge_accel.training.step import ActivationBudget, automatic_activation_bytes, embed_and_backward

BUDGETS = {
    "all": ActivationBudget,
    "none": lambda: ActivationBudget(0),
    "some": lambda: ActivationBudget(60, bytes_per_token=1),
    "measured": lambda: ActivationBudget(500_000),
}
TEXTS = [[2, *range(5, 5 + length), 3] for length in (3, 30, 9, 9, 1, 17, 5, 24, 40, 2)]


def step_gradient(encoder: Encoder, keep: str) -> torch.Tensor:
    tokens = make_token_batch(TEXTS, pad_token_id=0, max_tokens=70, overhead_tokens=8)
    assert len(tokens.micro_batches) > 2

    def loss_fn(emb: torch.Tensor) -> tuple[torch.Tensor, None]:
        return contrastive_loss(emb[:5], emb[5:], temperature=0.1, group_size=1).loss, None

    encoder.zero_grad()
    embed_and_backward(encoder, tokens, loss_fn, device=torch.device("cpu"), activations=BUDGETS[keep]())
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


def plain_gradient(encoder: Encoder) -> torch.Tensor:
    emb = torch.cat([encoder(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)) for ids in TEXTS])
    scores = emb[:5] @ emb[5:].T / 0.1
    encoder.zero_grad()
    torch.nn.functional.cross_entropy(scores, torch.arange(5)).backward()
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("keep", list(BUDGETS))
def test_gradient_equals_plain_autograd_in_float64(tiny_model: str, pooling: str, keep: str) -> None:
    encoder, _, _ = load_encoder(tiny_model, pooling=pooling, dtype=torch.float64)  # eval mode: no dropout
    expected = plain_gradient(encoder)
    assert (step_gradient(encoder, keep) - expected).norm() < 1e-10 * expected.norm()


KEEPING = """
import resource, sys, torch
if sys.argv[1] == "keep":
    from bge_accel.training.step import keep_freed_memory
    keep_freed_memory()
for count in range(21):
    if count == 1:  # the first time every page is new
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del [torch.ones(1_000_000) for _ in range(40)][:]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_is_kept():
    """The system is not asked for it again: it would clear every page of 160 MB, twenty times."""
    faults = {}
    for way in ("keep", "as it is"):
        command = [sys.executable, "-c", KEEPING, way]
        faults[way] = int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPO).stdout)
    assert faults["keep"] * 10 < faults["as it is"]


def test_recomputation_replays_dropout(tiny_model: str) -> None:
    encoder, _, _ = load_encoder(tiny_model, dtype=torch.float64)
    encoder.train()
    gradients = []
    for keep in BUDGETS:
        torch.manual_seed(7)
        gradients.append(step_gradient(encoder, keep))
        following = torch.rand(1)  # the generator goes on as if nothing had been replayed
        gradients[-1] = torch.cat([gradients[-1], following.double()])
    torch.manual_seed(8)
    other = step_gradient(encoder, "all")
    assert (gradients[0][:-1] - other).norm() > 1e-3 * other.norm(), "dropout is off"
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=1e-12)


def test_scaled_loss_scales_the_gradient_and_passes_add_up(tiny_model: str) -> None:
    encoder, _, _ = load_encoder(tiny_model, dtype=torch.float64)
    once = step_gradient(encoder, "all").clone()
    tokens = make_token_batch(TEXTS, pad_token_id=0, max_tokens=70)
    encoder.zero_grad()
    for keep in ("all", "none"):
        embed_and_backward(
            encoder,
            tokens,
            lambda emb: (contrastive_loss(emb[:5], emb[5:], temperature=0.1, group_size=1).loss, None),
            device=torch.device("cpu"),
            activations=BUDGETS[keep](),
            scale_loss=lambda loss: loss * 2,
        )
    summed = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    torch.testing.assert_close(summed, 4 * once, rtol=1e-10, atol=1e-12)


ZERO = ["zero1", "zero2", "zero3"]
LONG = [
    pytest.param(mode, marks=(pytest.mark.slow, pytest.mark.exhaustive))
    for mode in (*(f"{mode}-checkpointing" for mode in ZERO), "zero1-bf16", "zero3-bf16")
]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", *ZERO, *LONG])
def test_two_processes_give_the_gradient_of_one_with_the_whole_batch(
    tiny_model: str, tmp_path: Path, mode: str
) -> None:
    # Checked by changing the code: with first_query left at 0 the losses differ, with the gather cut from the graph the
    # gradients do, and one sync too many (no_sync left out of the recomputation, or of the joint backward pass) hangs.
    if mode.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    script = REPO / "tests" / "helpers" / "distributed_step.py"
    how = {"cwd": tmp_path, "script": script, "processes": 2, "env": {"DS_ACCELERATOR": "cpu"}}
    Job(tiny_model, mode, tmp_path / "saved", **how).ends(timeout=300)


def test_budget_measures_and_keeps_as_many_graphs_as_it_allows(tiny_model: str) -> None:
    encoder, _, _ = load_encoder(tiny_model)
    budget = ActivationBudget(1_000_000)
    assert not budget.is_settled and ActivationBudget().is_settled and ActivationBudget(0).is_settled
    tokens = make_token_batch(TEXTS, pad_token_id=0, max_tokens=70)
    embed_and_backward(encoder, tokens, lambda emb: (emb.sum(), None), device=torch.device("cpu"), activations=budget)
    # Dimension 32: some twenty vectors of it are saved for each token and layer, two of the second, and no weights.
    assert 32 * 4 * 12 < budget.bytes_per_token < 2 * 32 * 4 * 60
    budget.bytes_per_token = 10_000.0
    assert budget.num_kept([60, 50, 30, 20]) == 3
    assert budget.num_kept([60, 101]) == 1, "at least one is kept"
    assert ActivationBudget(0, bytes_per_token=1).num_kept([1, 1]) == 0
    assert 0 < automatic_activation_bytes(torch.device("cpu"), 1000, 1) < 1e13
