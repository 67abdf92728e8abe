"""Gradients of word embeddings that are added in place: those of autograd."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import Run
from test_finetune_script import assert_same_weights, write_rows
from test_unpadded import build, padded

from bge_accel import vocabulary
from bge_accel.model import Encoder
from bge_accel.vocabulary import add_gradients_in_place


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_autograd(family, dtype, monkeypatch):
    """Over two backward passes, padding included, and with an earlier gradient kept."""
    monkeypatch.setattr(vocabulary, "MIN_ROWS", 50)
    theirs = Encoder(build(family, dtype), "mean", normalize=True).train()
    ours = copy.deepcopy(theirs)
    add_gradients_in_place(ours.backbone)
    replaced = [name for name, module in ours.named_modules() if "forward" in module.__dict__]
    assert replaced == ["backbone.embeddings.word_embeddings"]
    for encoder in (theirs, ours):
        for lengths in ([5, 1, 12], [7, 7]):
            embedded = encoder(**padded(lengths, encoder.config))
            (embedded * torch.arange(32)).sum().backward()
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
    monkeypatch.setattr(vocabulary, "MIN_ROWS", 50)
    encoder = Encoder(build("bert"), "mean", normalize=True).train()
    add_gradients_in_place(encoder.backbone)
    weight = encoder.backbone.embeddings.word_embeddings.weight
    with torch.no_grad():
        assert not encoder(**padded([5, 3], encoder.config)).requires_grad
    weight.requires_grad_(False)
    encoder(**padded([5, 3], encoder.config)).sum().backward()
    assert weight.grad is None
    assert "forward" not in encoder.backbone.embeddings.position_embeddings.__dict__


SMALL = """\
import pathlib
import bge_accel.vocabulary as vocabulary

vocabulary.MIN_ROWS = 1  # what the tiny model has is a small table
own = vocabulary._LookUp.backward
vocabulary._LookUp.backward = staticmethod(lambda *args: (pathlib.Path("called").touch(), own(*args))[1])
"""


@pytest.mark.parametrize("budget", [None, 0])
def test_training_moves_the_weights_as_with_autograd(budget, run_script: Run, tiny_model: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 16)
    flags = ["--model_name_or_path", tiny_model, "--train_data", rows, "--max_steps", 3, "--train_group_size", 2]
    flags += ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--adam_epsilon", 1e-3]
    flags += [] if budget is None else ["--activation_memory_budget", budget]
    (tmp_path / "sitecustomize.py").write_text(SMALL)
    run_script("finetune.py", *flags, "--output_dir", "autograd")
    assert not (tmp_path / "called").exists()
    run_script("finetune.py", *flags, "--output_dir", "in_place", env={"PYTHONPATH": str(tmp_path)})
    assert (tmp_path / "called").exists()
    assert_same_weights(tmp_path / "autograd", tmp_path / "in_place", 1e-7)
