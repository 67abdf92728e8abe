"""Without padding: the embeddings and gradients of the padded way, for every pooling, length and supported family."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.models import build, build_tiny_model, padded
from helpers.repo import Run
from helpers.runs import assert_same_weights, log, write_rows

from bge_accel import EmbeddingModel
from bge_accel.kernels import onednn
from bge_accel.kernels import packed as unpadded
from bge_accel.models.encoder import Encoder, load_encoder
from bge_accel.models.pooling import POOLING

LENGTHS = ([5, 1, 12, 12, 3], [7], [1], [4, 4], [20, 2])


@pytest.mark.parametrize("family", unpadded.MODEL_TYPES)
@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kernel", ["cpu", "plain"])
def test_embeddings_are_those_of_padded_texts(family, pooling, dtype, lengths, kernel):
    encoder = Encoder(build(family, dtype), pooling, normalize=False)
    batch = padded(lengths, encoder.config)
    expected = encoder(**batch)
    unpadded.use_kernel(encoder.backbone, kernel)
    packed = unpadded.pack(**batch, config=encoder.config)
    assert packed["input_ids"].shape == packed["position_ids"].shape == (1, sum(lengths))
    assert packed["longest"] == max(lengths)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(encoder(**packed), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(encoder(**batch), expected, atol=0, rtol=0)  # padded ones go as before


@pytest.fixture(params=[False, True])
def rounded(request, monkeypatch):
    """Whether numbers of tokens are rounded up on a CPU, as those of ordinary micro-batches are."""
    monkeypatch.setattr(onednn, "is_available", lambda: request.param)
    monkeypatch.setattr(onednn, "MIN_ROWS", 2)
    return request.param


def test_a_row_is_filled_up_for_the_products_of_a_cpu(rounded):
    config = build("xlm-roberta").config
    batch = padded([5, 1], config)
    config._attn_implementation = unpadded.PREFIX + "cpu"
    packed = unpadded.pack(**batch, config=config)
    assert packed["input_ids"].shape == packed["position_ids"].shape == (1, 64 if rounded else 6)
    assert packed["input_ids"][0, 6:].unique().tolist() == [config.pad_token_id] * rounded
    assert packed["starts"].tolist() == [0, 5, 6] and packed["position_ids"].max() == 6


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kernel", ["cpu", "plain"])
def test_gradients_are_those_of_padded_texts(pooling, checkpointing, kernel, rounded):
    from bge_accel.models.compiling import enable_gradient_checkpointing

    gradients = []
    for way in ("padded", kernel):
        encoder = Encoder(build("bert"), pooling, normalize=True).train()
        if checkpointing:
            enable_gradient_checkpointing(encoder.backbone)
        batch = padded([12, 5, 5, 5, 1, 12, 3], encoder.config)
        if way == kernel:
            unpadded.use_kernel(encoder.backbone, kernel)
            batch = unpadded.pack(**batch, config=encoder.config)
        (encoder(**batch) * torch.arange(32)).sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 30
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-11, rtol=0)


def test_texts_padded_on_the_left_pack_alike():
    config = build("bert").config
    right, left = (padded([4, 2, 6], config, side) for side in ("right", "left"))
    left["input_ids"][left["attention_mask"].bool()] = right["input_ids"][right["attention_mask"].bool()]
    ours, theirs = (unpadded.pack(**batch, config=config) for batch in (left, right))
    assert ours["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5]]
    assert ours["starts"].tolist() == [0, 4, 6, 12] and ours["starts"].dtype == torch.int32
    for name in ("input_ids", "position_ids", "starts"):
        assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("kernel", ["cpu", "plain"])
def test_texts_do_not_see_each_other(kernel):
    encoder = Encoder(build("bert"), "mean", normalize=False)
    unpadded.use_kernel(encoder.backbone, kernel)
    batch = padded([5, 5, 7], encoder.config)
    before = encoder(**unpadded.pack(**batch, config=encoder.config))
    batch["input_ids"][1, 2] += 1
    after = encoder(**unpadded.pack(**batch, config=encoder.config))
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])


TEXTS = [f"the king and {'the story ' * (number % 11)}{number}" for number in range(40)] + ["", "x " * 300]


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("kernel", ["cpu", "plain"])
def test_an_embedding_model_without_padding(tiny_model, pooling, kernel, monkeypatch):
    model = EmbeddingModel(tiny_model, device="cpu", pooling=pooling, attention=kernel)
    widths = []
    forward = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda **kw: widths.append(kw["input_ids"].shape) or forward(**kw))
    ours = model.encode(TEXTS)
    np.testing.assert_allclose(ours, EmbeddingModel(tiny_model, device="cpu", pooling=pooling).encode(TEXTS), atol=1e-5)
    filled = sum(width for _, width in widths) - model.counts.num_tokens
    assert {rows for rows, _ in widths} == {1} and 0 <= filled < (len(widths) * 64 if kernel == "cpu" else 1)
    np.testing.assert_allclose(model.encode("a"), model.encode(["a", "the king"])[0], atol=1e-5)
    assert model.encode([]).shape == (0, 32)


def test_a_saved_model_does_not_know_of_it(tiny_model, tmp_path):
    model = EmbeddingModel(tiny_model, device="cpu", attention="plain")
    model.encoder.backbone.save_pretrained(tmp_path)
    assert unpadded.PREFIX not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert not unpadded.is_in_use(load_encoder(tiny_model)[0].config)


def test_a_cpu_pads(tiny_model):
    for dtype in ("float32", "bfloat16"):
        assert not unpadded.is_in_use(EmbeddingModel(tiny_model, device="cpu", dtype=dtype).encoder.config)


def test_what_cannot_run_without_padding_says_so(tiny_model):
    with pytest.raises(ValueError, match="attention 'flash' is not one of torch, flash_attn, cpu, plain"):
        EmbeddingModel(tiny_model, device="cpu", attention="flash")
    decoder = build("bert", is_decoder=True)
    assert unpadded.choose_kernel(decoder) is None
    with pytest.raises(ValueError, match="it is set up as a decoder"):
        unpadded.use_kernel(decoder, "plain")
    with pytest.raises(ValueError, match="models of type electra are not supported"):
        unpadded.use_kernel(build("electra"), "plain")
    eager = build("bert")
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="it was loaded with eager attention"):
        unpadded.use_kernel(eager, "plain")
    dropping = Encoder(build("bert", attention_probs_dropout_prob=0.1), "cls", normalize=True).train()
    unpadded.use_kernel(dropping.backbone, "torch")
    with pytest.raises(ValueError, match=r"has no dropout, and the model's is 0\.1"):
        dropping(**unpadded.pack(**padded([3, 2], dropping.config), config=dropping.config))


@pytest.mark.parametrize(
    ("processes", "budget"), [(1, []), (2, ["--activation_memory_budget", 0]), (2, ["--gradient_checkpointing"])]
)
def test_training_moves_the_weights_as_with_padding(processes, budget, run_script: Run, tmp_path):
    model = build_tiny_model(tmp_path / "model", dropout=0.0)
    rows = write_rows(tmp_path / "rows.jsonl", 16)
    flags = ["--model_name_or_path", model, "--train_data", rows, "--max_steps", 2, "--train_group_size", 2]
    flags += ["--per_device_train_batch_size", 4, "--max_tokens_per_micro_batch", 150, "--negatives_cross_device"]
    flags += ["--adam_epsilon", 1e-3, "--logging_steps", 1, *budget]
    for attention in ("padded", "auto", "plain"):
        chosen = ["--attention", attention, "--output_dir", attention]
        run_script("finetune.py", *flags, *chosen, processes=processes)
    padded_log = log(tmp_path / "padded")
    for attention in ("auto", "plain"):
        assert_same_weights(tmp_path / "padded", tmp_path / attention, 1e-6)
        own_log = log(tmp_path / attention)
        assert padded_log[0]["padding"] > 0 and own_log[0]["padding"] == 0
        assert own_log[0]["loss"] == pytest.approx(padded_log[0]["loss"], abs=1e-5)


@pytest.mark.parametrize("kernel", ["cpu", "plain"])
def test_training_without_padding_drops_as_well(kernel, run_script: Run, tiny_model: str, tmp_path):
    """With the model's dropout: the same again from the same seed, another way from another."""
    rows = write_rows(tmp_path / "rows.jsonl", 16)
    flags = ["--model_name_or_path", tiny_model, "--train_data", rows, "--max_steps", 2, "--attention", kernel]
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_script("finetune.py", *flags, "--output_dir", name, "--logging_steps", 1, "--seed", seed)
        losses.append([line["loss"] for line in log(tmp_path / name)])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "kernel, device, precision, dropout, message",
    [
        ("torch", "cpu", "bf16", 0.0, "needs a GPU and half precision"),
        ("flash_attn", "cuda", "float32", 0.0, "this run computes in float32 on cuda"),
        ("torch", "cuda", "bf16", 0.1, "drops 0.1 of its attention"),
        ("flash_attn", "cuda", "bf16", 0.1, "needs the module flash_attn"),
        ("cpu", "cuda", "bf16", 0.1, "--attention cpu is for a CPU, and this run is on cuda; leave it out"),
    ],
)
def test_what_a_kernel_cannot_do_is_said_before_training(kernel, device, precision, dropout, message):
    backbone = build("bert", attention_probs_dropout_prob=dropout)
    with pytest.raises(ValueError, match=message):
        unpadded.check_kernel(kernel, torch.device(device), precision)
        unpadded.check_dropout(kernel, backbone.config)
    for kernel in ("cpu", "plain"):
        unpadded.check_kernel(kernel, torch.device("cpu"), "float32")


def test_states_are_padded_again():
    hidden, starts = torch.arange(14.0).view(7, 2), torch.tensor([0, 2, 3, 7], dtype=torch.int32)
    states, mask = unpadded.pad(hidden, starts)
    assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]] and states.shape == (3, 4, 2)
    assert torch.equal(states[mask.bool()], hidden) and not states[~mask.bool()].any()


ON_A_GPU = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from helpers.models import build, padded
from bge_accel.kernels import packed as unpadded
from bge_accel.models.encoder import Encoder
for dtype in (torch.float16, torch.bfloat16):
    for pooling in ("cls", "mean", "last_token"):
        found = {}
        for kernel in ("plain", unpadded.choose_kernel(build("bert", dtype).cuda())):
            encoder = Encoder(build("bert", dtype).cuda(), pooling, normalize=True).train()
            unpadded.use_kernel(encoder.backbone, kernel)
            packed = unpadded.pack(**padded([5, 1, 33, 12], encoder.config), config=encoder.config)
            packed = {name: value.cuda() if name != "longest" else value for name, value in packed.items()}
            embeddings = encoder(**packed)
            embeddings[:, :7].sum().backward()
            found[kernel] = embeddings.detach(), encoder.backbone.embeddings.word_embeddings.weight.grad.float()
        assert len(found) == 2
        for ours, theirs in zip(*found.values()):
            assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
print("alike")
"""


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no GPU, on which alone the real kernel runs")
def test_the_real_kernel_attends_as_the_plain_one_does():
    """In a process of its own: in this one, tests see no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", ON_A_GPU, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "alike\n", done.stderr
