"""The last layer for one token a text: the embeddings and gradients of the whole layer, for every family and padding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.models import build, build_tiny_model, padded

from bge_accel import EmbeddingModel
from bge_accel.kernels import last_layer
from bge_accel.kernels import packed as unpadded
from bge_accel.models.compiling import enable_gradient_checkpointing
from bge_accel.models.encoder import Encoder, load_encoder
from bge_accel.models.pooling import POOLING

LENGTHS = ([5, 1, 12, 12, 3], [7], [1], [4, 4])


def whole(encoder, batch, normalize=False):
    """As any model gives it: all states of all layers, and then one of them."""
    pooled = POOLING[encoder.pooling].padded(encoder.backbone(**batch).last_hidden_state, batch["attention_mask"])
    return F.normalize(pooled, dim=-1) if normalize else pooled


@pytest.mark.parametrize("family", unpadded.MODEL_TYPES)
@pytest.mark.parametrize("pooling", ["cls", "last_token"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_embeddings_are_those_of_the_whole_layer(family, pooling, side, lengths):
    encoder = Encoder(build(family), pooling, normalize=False)
    batch = padded(lengths, encoder.config, side)
    seen = []
    encoder.backbone.encoder.layer[-1].register_forward_hook(lambda *call: seen.append(call[-1].shape))
    assert encoder.pools_one_token
    ours, expected = encoder(**batch), whole(encoder, batch)
    assert seen == [(len(lengths), 1, 32), (len(lengths), max(lengths), 32)]
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("pooling", ["cls", "last_token"])
@pytest.mark.parametrize("way", ["padded", "checkpointing", "packed", "packed, checkpointing"])
def test_gradients_are_those_of_the_whole_layer(pooling, way):
    gradients = []
    for is_ours in (True, False):
        encoder = Encoder(build("bert"), pooling, normalize=True).train()
        batch = padded([5, 1, 12, 3], encoder.config)
        if is_ours and "checkpointing" in way:
            enable_gradient_checkpointing(encoder.backbone)
        if is_ours and "packed" in way:
            unpadded.use_kernel(encoder.backbone, "plain")
            batch = unpadded.pack(**batch, config=encoder.config)
        embedded = encoder(**batch) if is_ours else whole(encoder, batch, normalize=True)
        (embedded * torch.arange(32)).sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 30
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-11, rtol=0)


def test_dropout_falls_on_it_as_well():
    """With the same seed the same, with another seed other embeddings; in evaluation none."""
    encoder = Encoder(build("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2), "cls", True).train()
    batch = padded([5, 6], encoder.config)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(encoder(**batch))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])
    assert torch.equal(encoder.eval()(**batch), encoder(**batch))


@pytest.mark.parametrize("change", ["mean", "eager", "decoder", "electra"])
def test_other_models_compute_the_whole_layer(change):
    backbone = build("electra" if change == "electra" else "bert", is_decoder=change == "decoder")
    if change == "eager":
        backbone.set_attn_implementation("eager")
    encoder = Encoder(backbone, "mean" if change == "mean" else "cls", normalize=False)
    batch = padded([5, 1, 12], encoder.config)
    assert not encoder.pools_one_token
    torch.testing.assert_close(encoder(**batch), whole(encoder, batch), atol=0, rtol=0)


def test_attention_may_be_changed_later():
    encoder = Encoder(build("bert"), "cls", normalize=False)
    batch = padded([5, 1, 12], encoder.config)
    before = encoder(**batch)
    encoder.backbone.set_attn_implementation("eager")
    assert not encoder.pools_one_token
    torch.testing.assert_close(encoder(**batch), before, atol=1e-12, rtol=0)


def test_a_copy_is_independent():
    """Of the layer that it was copied from, too."""
    encoder = Encoder(build("bert"), "cls", normalize=False)
    batch = padded([5, 1, 12], encoder.config)
    other = copy.deepcopy(encoder)
    before = other(**batch)
    with torch.no_grad():
        for parameter in encoder.backbone.encoder.layer[-1].parameters():
            parameter.zero_()
    assert torch.equal(other(**batch), before) and not torch.allclose(encoder(**batch), before)


def test_a_saved_model_does_not_know_of_it(tmp_path):
    model = EmbeddingModel(build_tiny_model(tmp_path / "tiny"), device="cpu", dtype="float32")
    model.encoder.backbone.save_pretrained(tmp_path / "saved")
    again = load_encoder(str(tmp_path / "saved"), tokenizer_name=str(tmp_path / "tiny"))[0]
    assert again.pools_one_token and again.backbone.state_dict().keys() == model.encoder.backbone.state_dict().keys()


def test_what_is_left_out():
    backbone = build("bert")
    names = {module: name for name, module in backbone.named_modules()}
    assert {names[module] for module in last_layer.linears_once_a_text(backbone)} == {
        f"encoder.layer.1.{name}"
        for name in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    }
