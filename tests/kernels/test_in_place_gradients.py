"""Gradients that are added in place: those of autograd."""

import copy
from pathlib import Path

import pytest
import torch
from helpers.models import build, padded
from helpers.runs import assert_same_weights, write_rows
from helpers.warm_start import Job

from bge_accel.kernels import in_place_gradients, onednn
from bge_accel.kernels.in_place_gradients import add_gradients_in_place
from bge_accel.models.encoder import Encoder


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
@pytest.mark.parametrize(
    "dtype, has_onednn", [(torch.float64, True), (torch.float32, onednn.is_available()), (torch.float32, False)]
)
def test_gradients_are_those_of_autograd(family, dtype, has_onednn, monkeypatch):
    """Over two backward passes, padding included, and with an earlier gradient kept."""
    monkeypatch.setattr(onednn, "is_available", lambda: has_onednn)
    monkeypatch.setattr(onednn, "MIN_ROWS", 4)
    monkeypatch.setattr(onednn, "ROWS_MULTIPLE", 3)
    products = []
    own_linear = onednn.linear
    monkeypatch.setattr(
        onednn, "linear", lambda states, *rest: products.append(states.shape) or own_linear(states, *rest)
    )
    monkeypatch.setattr(in_place_gradients, "MIN_ROWS", 50)
    theirs = Encoder(build(family, dtype), "mean", normalize=True).train()
    ours = copy.deepcopy(theirs)
    add_gradients_in_place(ours.backbone)
    replaced = {name for name, module in ours.named_modules() if "forward" in module.__dict__}
    linears = {name for name, module in ours.named_modules() if type(module) is torch.nn.Linear}
    assert len(linears) > 10 and replaced == linears | {"backbone.embeddings.word_embeddings"}
    for encoder in (theirs, ours):
        for lengths in ([5, 1, 12], [7, 7]):  # 36 rows and 14
            embedded = encoder(**padded(lengths, encoder.config))
            (embedded * torch.arange(32)).sum().backward()
    used = has_onednn and dtype == torch.float32
    assert {shape[:-1].numel() for shape in products} == ({36} if used else set())
    assert len(products) == (2 * 12 if used else 0)  # forward and backward, six in each of two layers
    word_embeddings = ours.backbone.embeddings.word_embeddings
    assert word_embeddings.weight.grad[word_embeddings.padding_idx].abs().max() == 0
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            assert expected[name].grad is None
            continue
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=tolerance, rtol=0)


def test_frozen_weights_and_evaluation_get_none(monkeypatch):
    monkeypatch.setattr(in_place_gradients, "MIN_ROWS", 50)
    encoder = Encoder(build("bert"), "mean", normalize=True).train()
    add_gradients_in_place(encoder.backbone)
    weight = encoder.backbone.embeddings.word_embeddings.weight
    dense = encoder.backbone.encoder.layer[0].output.dense
    with torch.no_grad():
        assert not encoder(**padded([5, 3], encoder.config)).requires_grad
    weight.requires_grad_(False)
    dense.weight.requires_grad_(False)
    encoder(**padded([5, 3], encoder.config)).sum().backward()
    assert weight.grad is None and dense.weight.grad is None and dense.bias.grad is not None
    assert "forward" not in encoder.backbone.embeddings.position_embeddings.__dict__


def test_the_first_layer_is_trained_without_one_below():
    """Nothing that goes into it needs a gradient; no bias, and one row."""
    linear = torch.nn.Linear(3, 2, bias=False)
    expected = copy.deepcopy(linear)
    add_gradients_in_place(torch.nn.Sequential(linear))
    states = torch.randn(3)
    for layer in (linear, expected):
        (layer(states[None])[0] @ torch.tensor([1.0, 2.0])).backward()
    torch.testing.assert_close(linear.weight.grad, expected.weight.grad)


@pytest.mark.parametrize("fused", [False, True])
def test_under_autocast_over_steps(fused):
    """The cast weights follow the optimiser and a loaded state, and the gradients are kept in float32."""
    theirs = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 8))
    ours = copy.deepcopy(theirs)
    add_gradients_in_place(ours)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 40, 24, generator=generator)
    runs = []
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
        outputs = []
        for step in range(4):
            if step == 3:
                model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})
            for micro_batch in states:
                with torch.autocast("cpu", torch.bfloat16):
                    output = model(micro_batch)
                assert output.dtype == torch.bfloat16
                outputs.append(output.detach())
                (output.float() ** 2).mean().backward()
            optimizer.step()
            runs.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
            optimizer.zero_grad()
        runs.append(outputs)
    (*their_grads, their_outputs), (*our_grads, our_outputs) = runs[:5], runs[5:]
    assert not torch.equal(our_outputs[0], our_outputs[2]) and not torch.equal(our_outputs[4], our_outputs[6])
    torch.testing.assert_close(our_outputs, their_outputs, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(our_grads, their_grads, atol=5e-3, rtol=2e-2)
    assert all(grad.dtype == torch.float32 for grads in our_grads for grad in grads.values())


def test_a_cast_weight_is_made_once_a_step():
    linear = torch.nn.Linear(4, 4)
    add_gradients_in_place(torch.nn.Sequential(linear))
    optimizer = torch.optim.AdamW(linear.parameters(), fused=True)
    made = []
    for _ in range(2):
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                linear(torch.randn(2, 4)).sum().backward()
            made.append(linear.__dict__["_cast_parameters"][1][0])
        optimizer.step()
    assert made[0] is made[1] is made[2] and made[3] is made[4] is made[5] and made[2] is not made[3]
    assert not torch.equal(made[2], made[3])


AUTOGRAD = """\
import pathlib, runpy, sys
import bge_accel.kernels.in_place_gradients as in_place_gradients

in_place_gradients.add_gradients_in_place = lambda backbone: pathlib.Path("left_to_autograd").touch()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = """\
import pathlib, runpy, sys
import bge_accel.kernels.in_place_gradients as in_place_gradients

in_place_gradients.MIN_ROWS = 1  # what the tiny model has is a small table
own = in_place_gradients._LookUp.backward
in_place_gradients._LookUp.backward = staticmethod(lambda *args: (pathlib.Path("called").touch(), own(*args))[1])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("budget", [None, 0])
def test_training_moves_the_weights_as_with_autograd(budget, tiny_model: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 16)
    flags = ["--model_name_or_path", tiny_model, "--train_data", rows, "--max_steps", 3, "--train_group_size", 2]
    flags += ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--adam_epsilon", 1e-3]
    flags += [] if budget is None else ["--activation_memory_budget", budget]
    for output_dir, start in (("autograd", AUTOGRAD), ("in_place", SMALL)):
        (tmp_path / "start.py").write_text(start)
        Job(*flags, "--output_dir", output_dir, cwd=tmp_path, through=(tmp_path / "start.py",)).ends()
        assert (tmp_path / "called").exists() == (output_dir == "in_place")
        assert (tmp_path / "left_to_autograd").exists()
    assert_same_weights(tmp_path / "autograd", tmp_path / "in_place", 1e-7)
