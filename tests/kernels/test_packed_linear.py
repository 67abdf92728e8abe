"""Rearranged weights: the same embeddings, never stale, nothing left on the model."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from helpers.models import build

from bge_accel import EmbeddingModel
from bge_accel.encoding import pipeline
from bge_accel.kernels import packed_linear
from bge_accel.kernels.in_place_gradients import add_gradients_in_place, is_linear
from bge_accel.kernels.onednn import cpu_has_bf16
from bge_accel.kernels.packed_linear import PackedLinears

TEXTS = [f"the king and {'the story ' * (number % 11)}{number}" for number in range(40)]


@pytest.fixture
def packing(monkeypatch):
    """As if it always paid; counts the layers computed so. Skips where this machine does not do it."""
    if not PackedLinears(torch.nn.Linear(2, 2)).is_available:
        pytest.skip("this torch or CPU has no rearranged weights")
    seen, linear = [], packed_linear._linear
    monkeypatch.setattr(packed_linear, "MIN_TOKENS", 0)
    monkeypatch.setattr(packed_linear, "_linear", lambda *inputs: seen.append(inputs[2]) or linear(*inputs))
    return seen


def plain_embeddings(model, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(packed_linear, "MIN_TOKENS", 10**9)
        return model.encode(TEXTS)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2), ("float64", 0)])
def test_embeddings_are_the_same(tiny_model, packing, dtype, tolerance, monkeypatch):
    model = EmbeddingModel(tiny_model, device="cpu", dtype=dtype)
    expected = plain_embeddings(model, monkeypatch)
    assert not packing
    ours = model.encode(TEXTS)
    np.testing.assert_allclose(ours, expected, atol=tolerance, rtol=0)
    assert np.min((ours * expected).sum(1)) > 0.9999
    packs = dtype == "float32" or (dtype == "bfloat16" and cpu_has_bf16())
    assert len(packing) % 13 == 0 and bool(packing) == packs  # two layers of six, and the pooler
    assert packing.count("gelu") * 13 == len(packing) * 2


@pytest.mark.parametrize(("activation", "together"), [("gelu", True), ("gelu_new", False), ("relu", False)])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_gelu_is_computed_with_its_layer(family, activation, together, packing):
    backbone = build(family, torch.float32, hidden_act=activation)
    ids = torch.arange(5, 29).view(2, 12)
    packed = PackedLinears(backbone)
    with torch.no_grad():
        expected = backbone(ids).last_hidden_state
        with packed.used_for(1):
            found = backbone(ids).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert ("gelu" in packing) == together and not any("forward" in module.__dict__ for module in backbone.modules())


def test_weights_changed_between_calls_are_seen(tiny_model, packing, monkeypatch):
    model = EmbeddingModel(tiny_model, device="cpu")
    before = model.encode(TEXTS)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1.1)
    after = model.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, plain_embeddings(model, monkeypatch), atol=1e-6)


def test_nothing_is_left_on_the_model(tiny_model, packing):
    model = EmbeddingModel(tiny_model, device="cpu")
    windows = pipeline.encode_windows(model.encoder, model.tokenizer, [(0, TEXTS), (1, TEXTS)], max_length=64)
    next(windows)  # between windows a caller may train
    linears = [module for module in model.encoder.modules() if isinstance(module, torch.nn.Linear)]
    assert packing and len(linears) > 10 and not any("forward" in linear.__dict__ for linear in linears)
    model.encoder.train()(torch.tensor([[2, 5, 3]]), torch.ones(1, 3))[:, :7].sum().backward()
    assert model.encoder.backbone.encoder.layer[0].output.dense.weight.grad.abs().max() > 0
    windows.close()


def test_threads_may_encode_with_one_model(packing):
    """The first to use the layers leaves them before the second, which otherwise would find its own taken off."""
    backbone, ids = build("bert", torch.float32), torch.arange(5, 29).view(2, 12)
    is_inside, first_has_left = Event(), Event()

    def second():
        with torch.no_grad(), PackedLinears(backbone).used_for(1):
            is_inside.set()
            first_has_left.wait()
            return backbone(ids).last_hidden_state

    with torch.no_grad():
        expected = backbone(ids).last_hidden_state
    with ThreadPoolExecutor(1) as pool:
        with PackedLinears(backbone).used_for(1):
            found = pool.submit(second)
            is_inside.wait(0.2)
        first_has_left.set()
        torch.testing.assert_close(found.result(), expected, atol=1e-5, rtol=0)
    assert packing and not any("forward" in module.__dict__ for module in backbone.modules())


def test_few_tokens_are_not_worth_it(tiny_model, packing, monkeypatch):
    model = EmbeddingModel(tiny_model, device="cpu")
    monkeypatch.setattr(packed_linear, "MIN_TOKENS", 100)
    model.encode("the king")
    assert not packing
    model.encode(TEXTS)
    assert packing


def test_under_autocast_the_layers_stay_as_they_are(tiny_model, packing):
    model = EmbeddingModel(tiny_model, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        model.encode(TEXTS)
    assert not packing


def test_a_model_in_training_is_encoded_so_too(tiny_model, packing):
    """Its layers have another forward pass, and have it again."""
    model = EmbeddingModel(tiny_model, device="cpu")
    add_gradients_in_place(model.encoder.backbone)
    model.encode(TEXTS)
    assert packing
    linears = [module for module in model.encoder.modules() if isinstance(module, torch.nn.Linear)]
    assert all(is_linear(linear.__dict__["forward"]) for linear in linears)
