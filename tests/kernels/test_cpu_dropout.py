"""Dropout on a CPU: the masks that it promises, and the outputs and gradients of the formula with these masks."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import build, padded
from helpers.repo import Run
from helpers.runs import log, write_rows

from bge_accel.encoding.batching import make_token_batch
from bge_accel.kernels import cpu_attention
from bge_accel.kernels import dropout as cpu_dropout
from bge_accel.kernels import packed as unpadded
from bge_accel.kernels.cpu_attention import use_cpu_attention
from bge_accel.kernels.dropout import KeepMask, drop, use_cpu_dropout
from bge_accel.models.compiling import enable_gradient_checkpointing
from bge_accel.models.encoder import Encoder, load_encoder, save_encoder
from bge_accel.training.step import ActivationBudget, embed_and_backward


def mask(*shape, p, seed):
    torch.manual_seed(seed)
    return KeepMask(torch.Size(shape), p).kept.float()


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.997])
def test_an_element_is_dropped_with_probability_p(p):
    drawn = torch.stack([mask(64, 331, p=p, seed=seed) for seed in range(100)])
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    # The elements spread, and the threshold that each seed draws.
    deviation = (p * (1 - p) / drawn.numel() + (1 / 256) ** 2 / 4 / 100) ** 0.5
    assert abs(1 - drawn.double().mean().item() - p) < 5 * deviation
    assert torch.equal(mask(64, 331, p=p, seed=3), drawn[3])
    if 0.01 < p < 0.9:  # else all may be kept, or dropped
        assert len({each.numpy().tobytes() for each in drawn}) == 100


def test_neighbours_are_dropped_independently_of_each_other():
    """In the row, at the distance of words, between rows and between masks."""
    first, second = (mask(512, 512, p=0.1, seed=seed) - 0.9 for seed in (3, 4))
    flat = first.flatten()
    pairs = [(flat[:-d], flat[d:]) for d in (1, 2, 3, 4, 7, 8, 64, 512)] + [(flat, second.flatten())]
    for left, right in pairs:
        correlation = (left * right).double().mean().item() / 0.09
        assert abs(correlation) < 5 / len(left) ** 0.5 + 1e-3  # the threshold that a mask shares


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_states_and_gradients_are_dropped_alike(dtype):
    states = torch.randn(50, 7, 33, dtype=dtype, generator=torch.Generator().manual_seed(0)) + 3
    states.requires_grad_()
    torch.manual_seed(5)
    dropped = drop(states, 0.3)
    dropped.backward(torch.ones_like(dropped))
    kept = dropped != 0
    assert dropped.dtype == dtype and 0.6 < kept.double().mean() < 0.8
    expected = torch.where(kept, states.detach().double() / 0.7, 0.0)
    torch.testing.assert_close(dropped.double(), expected, atol=1e-12, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6)
    torch.testing.assert_close(states.grad != 0, kept)
    torch.manual_seed(5)
    assert torch.equal(drop(states, 0.3), dropped)
    assert not torch.equal(drop(states, 0.3), dropped)


def dropping(family="bert", pooling="mean", packed=False, **config):
    """An encoder in training with this dropout, in float64."""
    encoder = Encoder(
        build(family, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, **config), pooling, normalize=True
    ).train()
    use_cpu_dropout(encoder.backbone)
    use_cpu_attention(encoder.backbone)
    if packed:
        unpadded.use_kernel(encoder.backbone, "cpu")
    return encoder


@pytest.mark.parametrize("family", unpadded.MODEL_TYPES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_model_drops_in_training_alone(family, pooling):
    encoder = dropping(family, pooling)
    batch = padded([5, 1, 12, 12, 3], encoder.config)
    torch.manual_seed(4)
    first, second = encoder(**batch), encoder(**batch)
    torch.manual_seed(4)
    assert torch.equal(encoder(**batch), first) and not torch.equal(first, second)
    assert encoder.pools_one_token == (pooling == "cls")
    torch_own = Encoder(
        build(family, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2), pooling, normalize=True
    )
    torch.testing.assert_close(encoder.eval()(**batch), torch_own.eval()(**batch), atol=0, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_dropout_of_torch_is_replaced(pooling, packed, monkeypatch):
    encoder = dropping(pooling=pooling, packed=packed)

    def refuse(*args, **kwargs):
        raise AssertionError("torch's dropout")

    calls = []
    attend = "attend_packed" if packed else "attend"
    for module, name in ((cpu_dropout, "drop"), (cpu_attention, attend)):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, own=own, name=name: (calls.append(name), own(*args))[1])
    monkeypatch.setattr(torch.nn.functional, "dropout", refuse)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    batch = padded([5, 1, 12], encoder.config)
    encoder(**(unpadded.pack(**batch, config=encoder.config) if packed else batch)).sum().backward()
    layers = encoder.config.num_hidden_layers
    assert calls.count(attend) == layers and calls.count("drop") == 1 + 2 * layers


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_is_the_same_when_activations_are_computed_again(pooling, checkpointing, packed):
    gradients = []
    texts = [[5] * length for length in (3, 9, 12, 2, 7, 7)]
    for budget in (float("inf"), 0.0):
        encoder = dropping(pooling=pooling, packed=packed)
        if checkpointing:
            enable_gradient_checkpointing(encoder.backbone)
        torch.manual_seed(9)
        batch = make_token_batch(texts, pad_token_id=0, max_tokens=20, packed_for=encoder.config if packed else None)
        assert len(batch.micro_batches) > 2
        embed_and_backward(
            encoder,
            batch,
            lambda emb: ((emb * torch.arange(32)).sum(), None),
            device=torch.device("cpu"),
            packed_for=encoder.config if packed else None,
            activations=ActivationBudget(budget),
        )
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-11, rtol=0)


def test_directions_of_the_gradient_are_differences_of_the_loss():
    """The whole model against finite differences, with the masks held."""
    encoder = dropping(pooling="cls")
    batch = padded([5, 3], encoder.config)

    def loss():
        torch.manual_seed(1)
        return (encoder(**batch) * torch.arange(32)).sum()

    parameters = [p for name, p in encoder.named_parameters() if "pooler" not in name]
    grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None)
    moved = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
        moved.append(loss().item())
    assert (moved[0] - moved[1]) / 2e-6 == pytest.approx(slope.item(), rel=1e-5)


def test_models_of_other_kinds_keep_their_attention():
    """A decoder's is causal; its other dropouts are replaced all the same."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, is_decoder=True
    )
    model = BertModel(config)
    use_cpu_dropout(model)
    use_cpu_attention(model)
    assert model.config._attn_implementation == "sdpa"
    assert "forward" in model.embeddings.dropout.__dict__


def test_nothing_of_it_is_saved(tiny_model: str, tmp_path: Path):
    encoder, tokenizer, settings = load_encoder(tiny_model)
    use_cpu_dropout(encoder.backbone)
    use_cpu_attention(encoder.backbone)
    copied = copy.deepcopy(encoder)
    assert copied.config._attn_implementation == cpu_attention.NAME
    save_encoder(str(tmp_path / "saved"), encoder, tokenizer, settings)
    assert cpu_attention.NAME not in (tmp_path / "saved" / "config.json").read_text()
    again, _, _ = load_encoder(str(tmp_path / "saved"))
    assert again.config._attn_implementation == "sdpa"


def with_dropout(tiny_model: str, folder: Path) -> Path:
    """The tiny model, dropping as BERT does."""
    import shutil

    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_training_drops_the_same_again_from_the_same_seed(run_script: Run, tiny_model: str, tmp_path: Path):
    model = with_dropout(tiny_model, tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", 16)
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_script(
            "finetune.py",
            *("--model_name_or_path", model, "--train_data", rows, "--output_dir", name, "--max_steps", 3),
            *("--per_device_train_batch_size", 2, "--train_group_size", 2, "--logging_steps", 1, "--seed", seed),
            processes=2,
        )
        losses.append([line["loss"] for line in log(tmp_path / name)])
    assert losses[0] == losses[1] != losses[2]
    assert np.isfinite(losses).all()
