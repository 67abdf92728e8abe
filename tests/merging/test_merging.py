"""Merging: to the bit where it can be, to float32 rounding else; complete or absent; every mismatch named."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import build_tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import bge_accel
from bge_accel.encoding.embedding_model import EmbeddingModel
from bge_accel.merging.merge import RECIPE, last_checkpoints, merge_models
from bge_accel.merging.weights import (
    MixScore,
    choose_mix,
    decoder_loss,
    example_losses,
    examples_to_retrieve,
    ndcg_at_10,
    plot_mixes,
    read_examples,
    search_mixes,
    weights_from_losses,
)
from bge_accel.models.encoder import load_encoder, save_encoder
from bge_accel.models.tensor_files import DTYPES, Layout, TensorFiles, parse_size, plan_shards, write_safetensors

TEXTS = ["what is a list?", "the king", "a princess and the king in a story"]
EXAMPLES = [
    {"query": "the king", "pos": ["a king story"], "neg": ["list", "file value", "why", "return the list"]},
    {"query": "list of string", "pos": ["return the list"], "neg": ["princess", "what", "the file"]},
    {"query": "value", "pos": ["value in the file"], "neg": ["why did the king"]},
]


def make(folder, tensors, config=None, **files):
    """A model folder of any tensors; what is tested is not what they mean."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **(config or {})}))
    for name, content in files.items():
        (folder / name.replace("_json", ".json")).write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def raw(tensor):
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def merged(tmp_path, models, weights, **options):
    merge_models(models, options.pop("model_type", "encoder"), weights, str(tmp_path / "out"), **options)
    return load_file(tmp_path / "out" / "model.safetensors")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two encoders of one architecture with sentence-transformers files, and what the second is of the first."""
    folder = tmp_path_factory.mktemp("pair")
    paths = []
    for seed in (0, 1):
        encoder, tokenizer, settings = load_encoder(
            build_tiny_model(folder / f"raw{seed}", seed=seed), pooling="mean", query_prefix="what: "
        )
        paths.append(str(folder / f"model{seed}"))
        save_encoder(paths[-1], encoder, tokenizer, settings)
    return paths


# ---- values


SPECIAL = {
    torch.float32: [0.0, -0.0, 1e-45, 3e-45, 1.1754944e-38, 3.4e38, float("inf"), float("-inf"), float("nan"), 0.1],
    torch.float16: [0.0, -0.0, 6e-8, 65504.0, float("inf"), float("nan"), 0.1],
    torch.bfloat16: [0.0, -0.0, 1e-40, 3.3e38, float("inf"), float("nan"), 0.1],
    torch.float64: [0.0, -0.0, 5e-324, 1e308, 0.1, float("nan")],
}


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [0.1] * 10])
def test_a_model_with_itself_comes_back_bit_for_bit(tmp_path, weights):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES.values():
        name = str(dtype)
        if dtype in SPECIAL:
            values = torch.tensor(SPECIAL[dtype], dtype=dtype)
            tensors[name] = torch.cat([torch.randn(300_001, generator=generator).to(dtype), values])
        elif dtype.is_floating_point:
            tensors[name] = torch.randn(1000, generator=generator).to(dtype)
        elif dtype not in (torch.bool, torch.complex64):
            tensors[name] = torch.randint(0, 100, (1000,), generator=generator).to(dtype)
    tensors |= {
        "bool": torch.rand(77, generator=generator) < 0.5,
        "scalar": torch.tensor(0.3),
        "empty": torch.empty(0, 4),
    }
    model = make(tmp_path / "a", tensors)
    out = merged(tmp_path, [model] * len(weights), weights)
    assert out.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert out[name].dtype == tensor.dtype and out[name].shape == tensor.shape
        assert torch.equal(raw(out[name]), raw(tensor)), name


def test_weights_one_and_zero_give_the_first(tmp_path):
    first = {"x": torch.tensor([1.5, -0.0, 1e-45])}
    second = {"x": torch.tensor([float("nan"), float("inf"), 1.0])}
    out = merged(tmp_path, [make(tmp_path / "a", first), make(tmp_path / "b", second)], [1, 0])
    assert torch.equal(raw(out["x"]), raw(first["x"]))


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [0.2, 0.5, 0.3], [1.5, -0.5], [0.2502, 0.7502]])
def test_an_average_is_the_plain_one(tmp_path, weights):
    generator = torch.Generator().manual_seed(1)
    # Longer than a slice, so that slices are put together rightly.
    models = [
        {"x": torch.randn(3, 300_007, generator=generator), "y": torch.randn(5, 7, generator=generator)}
        for _ in weights
    ]
    paths = [make(tmp_path / str(number), model) for number, model in enumerate(models)]
    out = merged(tmp_path, paths, weights)
    for name in ("x", "y"):
        plain = sum(w * model[name] for w, model in zip(weights, models, strict=True))
        assert torch.allclose(out[name], plain, rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_added_up_in_float32(tmp_path, dtype):
    generator = torch.Generator().manual_seed(2)
    models = [torch.randn(10_000, generator=generator).to(dtype) for _ in range(8)]
    large = torch.full((4,), 30_000.0).to(dtype)
    paths = [make(tmp_path / str(i), {"x": model, "large": large * (1 - i / 16)}) for i, model in enumerate(models)]
    out = merged(tmp_path, paths, [1 / 8] * 8)
    exact = torch.stack(models).double().mean(0)
    assert torch.equal(out["x"], exact.to(dtype))
    in_halves = sum((1 / 8 * model for model in models), torch.zeros(10_000, dtype=dtype))
    assert (out["x"] != in_halves).float().mean() > 0.1  # so the test can tell
    # On the way to this sum there is one beyond float16.
    merge_models(paths[:2], "encoder", [3, -2], str(tmp_path / "far"))
    second = load_file(Path(paths[1]) / "model.safetensors")["large"]
    expected = (3 * large.double() - 2 * second.double()).to(dtype)
    assert torch.equal(load_file(tmp_path / "far" / "model.safetensors")["large"], expected)


def test_what_does_not_fit_the_type_asked_for_is_an_error_that_leaves_nothing(tmp_path):
    models = [make(tmp_path / name, {"deep.weight": torch.tensor([1.0, 1e6])}) for name in "ab"]
    with pytest.raises(ValueError, match=r"deep\.weight: the value 1e\+06 is too large for torch.float16"):
        merge_models(models, "encoder", [0.5, 0.5], str(tmp_path / "out"), dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_the_first_models_type_or_the_one_asked_for(tmp_path):
    a = make(tmp_path / "a", {"x": torch.tensor([1.0, 2.0]).half(), "rotary.inv_freq": torch.tensor([1.0])},
             {"torch_dtype": "float16"})  # fmt: skip
    b = make(tmp_path / "b", {"x": torch.tensor([2.0, 2.001]), "rotary.inv_freq": torch.tensor([1.0])})
    out = merged(tmp_path, [a, b], [0.5, 0.5])
    assert torch.equal(out["x"], torch.tensor([1.5, 2.0005]).half())
    merge_models([a, b], "encoder", [0.5, 0.5], str(tmp_path / "out2"), dtype="bfloat16")
    out = load_file(tmp_path / "out2" / "model.safetensors")
    assert out["x"].dtype == torch.bfloat16 and out["rotary.inv_freq"].dtype == torch.float32
    config = json.loads((tmp_path / "out2" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    with pytest.raises(ValueError, match="dtype 'int8' is not"):
        merge_models([a, b], "encoder", [0.5, 0.5], str(tmp_path / "out3"), dtype="int8")


# ---- tensors that only some have, and other rules


def test_integers_are_the_firsts(tmp_path):
    a = make(tmp_path / "a", {"x": torch.ones(2), "ids": torch.tensor([1, 2]), "mask": torch.tensor([True])})
    b = make(tmp_path / "b", {"x": torch.zeros(2), "ids": torch.tensor([3, 4]), "mask": torch.tensor([False])})
    out = merged(tmp_path, [a, b], [0.25, 0.75])
    assert out["ids"].tolist() == [1, 2] and out["mask"].tolist() == [True] and out["x"].tolist() == [0.25, 0.25]


def test_buffers_and_poolers_that_only_some_have(tmp_path):
    x, pooler = torch.ones(2), torch.full((2,), 5.0)
    a = make(tmp_path / "a", {"x": x, "pooler.dense.weight": pooler, "embeddings.position_ids": torch.arange(3)})
    b = make(tmp_path / "b", {"x": x * 3})
    out = merged(tmp_path, [a, b], [0.5, 0.5])
    assert out["x"].tolist() == [2, 2] and torch.equal(out["pooler.dense.weight"], pooler)
    assert out["embeddings.position_ids"].tolist() == [0, 1, 2]
    shutil.rmtree(tmp_path / "out")
    assert merged(tmp_path, [b, a], [0.5, 0.5]).keys() == {"x"}
    with pytest.raises(ValueError, match=r"b: pooler\.dense\.weight: it is missing"):  # of a decoder it would count
        merge_models([a, b], "decoder", [0.5, 0.5], str(tmp_path / "other"))


def test_a_tied_tensor_that_only_some_store_is_the_one_that_it_is_tied_to(tmp_path):
    embedding = {name: torch.randn(300_000, 2) for name in "ab"}
    stored = make(tmp_path / "a", {"embed.weight": embedding["a"], "head.weight": embedding["a"].clone()})
    left_out = make(tmp_path / "b", {"embed.weight": embedding["b"]})
    out = merged(tmp_path, [stored, left_out], [0.25, 0.75], model_type="decoder")
    expected = 0.25 * embedding["a"] + 0.75 * embedding["b"]
    assert torch.allclose(out["embed.weight"], expected, atol=1e-6)
    assert torch.equal(out["head.weight"], out["embed.weight"])
    shutil.rmtree(tmp_path / "out")
    out = merged(tmp_path, [left_out, stored], [0.75, 0.25], model_type="decoder")
    assert out.keys() == {"embed.weight"} and torch.allclose(out["embed.weight"], expected, atol=1e-6)
    head = embedding["a"].clone()
    head[-1, -1] += 1
    untied = make(tmp_path / "c", {"embed.weight": embedding["a"], "head.weight": head})
    for models in ([untied, left_out], [left_out, untied]):
        with pytest.raises(ValueError, match=r"[bc]: head\.weight: .*(it is missing|no such tensor)"):
            merge_models(models, "decoder", [0.5, 0.5], str(tmp_path / "other"))


# ---- checks before the first byte


TOKENS = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "[CLS]", "id": 2}]}
X = {"encoder.x": torch.ones(2, 3)}
BERT = {"hidden_act": "gelu", "architectures": ["BertModel"]}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (({"encoder.x": torch.ones(3, 2)}, BERT), r"b: encoder\.x: its shape is \(3, 2\); \(2, 3\) in .*a"),
        (({"encoder.x": torch.ones(2, 3, dtype=torch.int64)}, BERT), r"b: encoder\.x: its type is torch.int64"),
        (
            ({"encoder.y": torch.ones(2, 3)}, BERT),
            r"b: encoder\.x: it is missing.*\n.*b: encoder\.y: .*no such",
        ),
        ((X, {**BERT, "hidden_act": "relu"}), 'b: "hidden_act" in its config.json is "relu"; "gelu" in .*a'),
        ((X, {**BERT, "model_type": "roberta"}), 'b: "model_type" in its config.json is "roberta"; "bert" in .*a'),
        ((X, {**BERT, "quantization_config": {"bits": 4}}), "b: it is quantised"),
        ((X, BERT, {"model": {"vocab": {"a": 0, "c": 1}}}), "b: another vocabulary: 2 tokens, 3 in .*; .* is only in"),
        (
            (X, BERT, {**TOKENS, "model": {"vocab": {"a": 1, "b": 0}}}),
            'b: another vocabulary: "a" has number 1, and 0 in',
        ),
    ],
)
def test_models_that_do_not_fit_are_named_before_anything_is_written(tmp_path, other, message):
    a = make(tmp_path / "a", X, BERT, tokenizer_json=TOKENS)
    tensors, config, *tokens = other
    b = make(tmp_path / "b", tensors, config, tokenizer_json=tokens[0] if tokens else TOKENS)
    with pytest.raises(ValueError, match=message):
        merge_models([a, a, b], "encoder", [0.2, 0.3, 0.5], str(tmp_path / "deep" / "out"))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"vocab.txt": "a\nb\n"}, {"vocab.txt": "b\na\n"}, '"a" has number 1, and 0 in'),
        ({"vocab.json": '{"a": 0}'}, {"vocab.json": '{"b": 0}'}, '1 tokens, 1 in .*; "a" is only in'),
        ({"spiece.model": "x"}, {"spiece.model": "y"}, "its spiece.model is not that of"),
        ({"tokenizer.json": '{"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}'}, {"vocab.txt": "b\na\n"}, '"a" has number 1'),
        ({"tokenizer.json": '{"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}'}, {"vocab.txt": "a\nb\n"}, None),
        ({"vocab.txt": "a\n"}, {}, None),
        ({"vocab.txt": "a\n"}, {"spiece.model": "x"}, None),
    ],
)  # fmt: skip
def test_vocabularies_of_every_kind(tmp_path, first, second, message):
    models = [make(tmp_path / name, X) for name in "ab"]
    for model, files in zip(models, (first, second), strict=True):
        for name, content in files.items():
            Path(model, name).write_text(content)
    if message is None:
        merge_models(models, "encoder", [0.5, 0.5], str(tmp_path / "out"))
    else:
        with pytest.raises(ValueError, match=f"b: another vocabulary: {message}"):
            merge_models(models, "encoder", [0.5, 0.5], str(tmp_path / "out"))


def test_modules_outside_the_model_are_refused(tmp_path):
    model = make(tmp_path / "deep" / "a", X, modules_json=[{"path": "../outside", "type": "x.Pooling"}])
    with pytest.raises(ValueError, match=r'modules\.json names "\.\./outside", which is not inside the model'):
        merge_models([model, model], "decoder", [0.5, 0.5], str(tmp_path / "out"))


def test_what_may_differ(tmp_path):
    a = make(
        tmp_path / "a", X, {**BERT, "transformers_version": "4.1", "hidden_dropout_prob": 0.1, "_name_or_path": "x"}
    )
    b = make(tmp_path / "b", X, {**BERT, "transformers_version": "5.2", "hidden_dropout_prob": 0.0, "new_key": 1,
                                 "architectures": ["BertForMaskedLM"], "pad_token_id": 0})  # fmt: skip
    merge_models([a, b], "encoder", [0.5, 0.5], str(tmp_path / "out"))


def test_ten_mismatches_are_shown_and_all_counted(tmp_path):
    a = make(tmp_path / "a", {str(i): torch.ones(2) for i in range(15)})
    b = make(tmp_path / "b", {str(i): torch.ones(3) for i in range(15)})
    with pytest.raises(ValueError, match=r"(?s)the models cannot be merged:\n(.*\n){10}\.\.\. and 5 more"):
        merge_models([a, b], "encoder", [0.5, 0.5], str(tmp_path / "out"))


def test_models_of_different_instructions_need_a_choice(tmp_path, tiny_model):
    base, tuned, out = (str(tmp_path / name) for name in ("base", "tuned", "out"))
    save_encoder(base, *load_encoder(tiny_model, pooling="mean"))
    encoder, tokenizer, settings = load_encoder(tiny_model, pooling="mean", query_prefix="what: ")
    save_encoder(tuned, encoder, tokenizer, dataclasses.replace(settings, max_length=64))
    message = (
        f'the models do not embed alike: query instruction none in {base}, "what: " in {tuned}; maximum length 128 in '
        f"{base}, 64 in {tuned}. Name the one whose settings the merged model takes: --settings_from {tuned}, "
        f'or settings_from="{tuned}" in Python'
    )
    merge = (
        lambda: merge_models([base, tuned], "encoder", [0.5, 0.5], out),
        lambda: bge_accel.mix_models([base, tuned], "encoder", [0.5, 0.5], out),
        lambda: bge_accel.mix_models_with_data([base, tuned], "encoder", EXAMPLES, output_path=out),
        lambda: search_mixes(base, tuned, "encoder", lambda folder: 0.0),
    )
    for function in merge:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            function()
    assert not os.path.exists(out)
    anew = {"overwrite_output_dir": True}
    for settings_from, prefix, length in ((tuned, "what: ", 64), (base, "", 128), (tuned + "/", "what: ", 64)):
        bge_accel.mix_models([base, tuned], "encoder", [0.5, 0.5], out, settings_from=settings_from, **anew)
        settings = EmbeddingModel(out).settings
        assert (settings.query_prefix, settings.max_length) == (prefix, length)
        name = os.path.basename(settings_from.rstrip("/"))
        assert f"those of {name}." in Path(out, "README.md").read_text()
        assert json.loads(Path(out, RECIPE).read_text())["settings_from"] == name
    bge_accel.mix_models_with_data([base, tuned], "encoder", EXAMPLES, output_path=out, settings_from=tuned, **anew)
    assert EmbeddingModel(out).settings.query_prefix == "what: "
    found = []
    search_mixes(base, tuned, "encoder", lambda folder: found.append(EmbeddingModel(folder).settings.query_prefix) or 0,
                 num_steps=1, settings_from=tuned)  # fmt: skip
    assert found == ["what: "] * 2
    with pytest.raises(ValueError, match=f"settings_from other is none of the models: {base}, {tuned}"):
        merge_models([base, tuned], "encoder", [0.5, 0.5], out, settings_from="other", **anew)


def test_pooling_has_to_agree_where_it_is_said(tmp_path, tiny_model):
    paths = {}
    for pooling in ("mean", "cls"):
        paths[pooling] = str(tmp_path / pooling)
        save_encoder(paths[pooling], *load_encoder(tiny_model, pooling=pooling))
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r'embed alike: pooling "mean" in .*mean, "cls" in .*cls\. Name the one'):
        merge_models([paths["mean"], paths["cls"]], "encoder", [0.5, 0.5], out)
    with pytest.raises(
        ValueError, match=rf"mean says how it pools, and {tiny_model} does not\. .*--settings_from .*/mean,"
    ):
        merge_models([tiny_model, paths["mean"]], "encoder", [0.5, 0.5], out)
    for models in ([tiny_model, paths["mean"]], [paths["cls"], paths["mean"]]):
        merge_models(models, "encoder", [0.5, 0.5], out, settings_from=paths["mean"], overwrite_output_dir=True)
        assert EmbeddingModel(out).settings.pooling == "mean"
    shutil.rmtree(out)
    merge_models([paths["mean"], tiny_model], "encoder", [0.5, 0.5], out)
    assert EmbeddingModel(out).settings.pooling == "mean"
    dense = Path(paths["mean"]) / "1_Pooling" / "model.safetensors"
    shutil.copyfile(Path(tiny_model) / "model.safetensors", dense)
    with pytest.raises(ValueError, match=r"mean: its module 1_Pooling/model.safetensors has weights of its own"):
        merge_models([paths["mean"], tiny_model], "encoder", [0.5, 0.5], out, overwrite_output_dir=True)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5], "1 weights .* for 2 models"),
        ([0.1, 0.1], "sum to 0.2, not to 1"),
        ([0.7, 0.5], "sum to 1.2, not to 1"),
        ([0.5, 0.5011], "not to 1"),
        ([0.5, 0.4989], "not to 1"),
        ([float("nan"), 1.0], "finite"),
        ([float("inf"), float("-inf")], "finite"),
    ],
)
def test_weights_that_cannot_be(tmp_path, weights, message):
    models = [make(tmp_path / name, X) for name in "ab"]
    with pytest.raises(ValueError, match=message):
        merge_models(models, "encoder", weights, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_divided_by_their_sum(tmp_path):
    models = [make(tmp_path / name, {"x": torch.full((2,), value)}) for name, value in (("a", 1.0), ("b", 5.0))]
    assert merged(tmp_path, models, [3, 1], normalize=True)["x"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="cannot be normalised"):
        merge_models(models, "encoder", [1, -1], str(tmp_path / "other"), normalize=True)


def test_where_a_merged_model_may_be_written(tmp_path):
    models = [make(tmp_path / "run" / name, X) for name in ("checkpoint-1", "checkpoint-2")]
    for output in (models[0], str(tmp_path / "run")):
        with pytest.raises(ValueError, match="is or holds "):
            merge_models(models, "encoder", [0.5, 0.5], output, overwrite_output_dir=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        merge_models(models, "encoder", [0.5, 0.5], str(tmp_path / "file"))
    out = tmp_path / "out"
    merge_models(models, "encoder", [0.5, 0.5], str(out))
    with pytest.raises(ValueError, match="is not empty"):
        merge_models(models, "encoder", [0.5, 0.5], str(out))
    (out / "stale").write_text("")
    merge_models(models, "encoder", [0.5, 0.5], str(out), overwrite_output_dir=True)
    assert not (out / "stale").exists()


def test_models_that_are_not_there(tmp_path):
    a = make(tmp_path / "a", X)
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "no"), "is not a folder"),
        (str(tmp_path / "empty"), "has no config.json"),
        ("nobody/nothing", "neither a folder nor to be had from the hub"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_models([a, name], "encoder", [0.5, 0.5], str(tmp_path / "out"))
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights: neither model\.safetensors nor pytorch_model\.bin"):
        merge_models([a, a], "encoder", [0.5, 0.5], str(tmp_path / "out"))


# ---- files


def test_damaged_files_are_named(tmp_path):
    model = make(tmp_path / "a", X)
    path = tmp_path / "a" / "model.safetensors"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "does not hold the whole tensor encoder.x"),
        (whole[:20], "no safetensors file, or it is cut short"),
        (b"", "no safetensors file"),
        (struct.pack("<Q", 2**60) + whole[8:], "no safetensors file"),
        (whole[:8] + b"[" + whole[9:], "its header is damaged"),
        (whole.replace(b'"F32"', b'"F77"'), "the tensor encoder.x is of type F77"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"model.safetensors.*{message}"):
            TensorFiles(model)


def test_sharded_in_and_out(tmp_path, tiny_model):
    from transformers import AutoModel

    whole = AutoModel.from_pretrained(tiny_model)
    for name, size in (("a", "20KB"), ("b", "30KB")):
        whole.save_pretrained(tmp_path / name, max_shard_size=size)
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 2
    model = bge_accel.mix_models(
        [str(tmp_path / "a"), str(tmp_path / "b")], "encoder", [0.5, 0.5], str(tmp_path / "out"), max_shard_size="20KB"
    )
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values()) and len(files) > 2
    for path in files:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert {name for name, shard in index["weight_map"].items() if shard == path.name} == tensors.keys()
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.state_dict().values())
    (tmp_path / "a" / index["weight_map"]["pooler.dense.bias"]).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "out")
    next((tmp_path / "a").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"is missing, which model\.safetensors\.index\.json names"):
        merge_models([str(tmp_path / "a"), tiny_model], "encoder", [0.5, 0.5], str(tmp_path / "out"))


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files_are_read_as_tensors_alone(tmp_path, sharded):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    a = make(tmp_path / "a", {"x": torch.randn(300_000, 2), "y": torch.randn(3)})
    stored = load_file(Path(a) / "model.safetensors")
    tensors = {"x": (stored["x"] * 3).T.contiguous().T, "y": stored["y"] * 3}  # x is not contiguous
    folder = tmp_path / "b"
    folder.mkdir()
    shutil.copy(Path(a) / "config.json", folder)
    if sharded:
        names = {"x": "pytorch_model-00001-of-00002.bin", "y": "pytorch_model-00002-of-00002.bin"}
        for name, file in names.items():
            torch.save({name: tensors[name]}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    files = TensorFiles(str(folder))  # read again, they are the same
    for name in "xxyy":
        read = torch.empty_like(raw(tensors[name]))
        files.read(name, 0, read)
        assert torch.equal(read, raw(tensors[name]))
    out = merged(tmp_path, [a, str(folder)], [0.5, 0.5])
    for name in "xy":
        assert torch.allclose(out[name], 2 * stored[name], atol=1e-6)
    assert not list((tmp_path / "out").glob("*.bin*"))
    torch.save({"x": Harm()}, folder / ("pytorch_model-00001-of-00002.bin" if sharded else "pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"\.bin cannot be read as tensors alone"):
        merge_models([a, str(folder)], "encoder", [0.5, 0.5], str(tmp_path / "other"))
    assert not (tmp_path / "harm").exists()


def test_written_files_are_what_the_library_reads(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.int8), "é": torch.tensor(2.5).double()}
    layouts = {name: Layout(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (order,) = plan_shards(layouts, 10**9).values()
    write_safetensors(str(tmp_path / "x"), {name: layouts[name] for name in order}, (tensors[name] for name in order))
    found = load_file(tmp_path / "x")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    length = int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")
    assert length % 8 == 0


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 1572864), ("300kb", 300_000), (77, 77)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "0", "-1GB", "1..2GB", "5XB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="the size"):
        parse_size(text)


# ---- complete or absent


# Merges, killed with SIGKILL at its n-th call of the operating system that changes something; then what is there loads
# or does not.
KILLED = """
import json, os, shutil, signal, sys
import torch
import bge_accel.merging.merge, bge_accel.models.tensor_files as tensor_files
from bge_accel.files.lock import is_empty
from bge_accel.merging.merge import merge_models
from bge_accel.models.tensor_files import TensorFiles
folder, models = sys.argv[1], sys.argv[2:]
from tqdm import tqdm; import yaml
left = 10**9

def count(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(lambda event, _: count() if event == "open" or event.startswith(("os.", "shutil.")) else None)
write_all = tensor_files._write_all

def write(file, view):
    count()
    write_all(file, view[: len(view) // 2])
    count()
    write_all(file, view[len(view) // 2 :])

tensor_files._write_all = write
found = []
while not found or found[-1]["status"]:
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    child = os.fork()
    if child == 0:
        left = len(found) + 1
        merge_models(models, "encoder", [0.5, 0.5], folder + "/out", max_shard_size="2MB")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    loads = {}
    for name in os.listdir(folder):
        if os.path.isdir(f"{folder}/{name}") and is_empty(f"{folder}/{name}"):
            continue  # made for the lock, which holds nobody up
        try:
            config = os.path.isfile(f"{folder}/{name}/config.json")
            files = TensorFiles(f"{folder}/{name}")
            tensors = {}
            for key, layout in files.tensors.items():
                tensors[key] = torch.empty(layout.num_bytes, dtype=torch.uint8)
                files.read(key, 0, tensors[key])
            values = {key: value.view(torch.float32).sum().item() for key, value in tensors.items()}
            values["others"] = sorted(file for file in os.listdir(f"{folder}/{name}") if "safetensors" not in file)
            loads[name] = values if config else None
        except ValueError:
            loads[name] = None
    found.append({"status": status, "loads": loads})
print(json.dumps(found))
"""


def test_a_merge_killed_at_any_moment_leaves_nothing_that_loads(tmp_path):
    size = 400_000
    models = []
    for name, value in (("a", 1.0), ("b", 3.0)):
        models.append(make(tmp_path / name, {key: torch.full((size,), value) for key in "xyz"}))
        Path(models[-1], "vocab.txt").write_text("a\n")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "work"), *models], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    whole = dict.fromkeys("xyz", 2.0 * size) | {"others": ["README.md", "config.json", RECIPE, "vocab.txt"]}
    assert len(found) > 30 and all(one["status"] == signal.SIGKILL for one in found[:-1])
    for one in found:
        for name, values in one["loads"].items():
            # Beside its place it may be whole, waiting to be renamed; half of it loads nowhere.
            assert values in (None, whole), (name, one)
            assert name != "out" or values == whole
    assert found[-1]["loads"] == {"out": whole}
    assert sum(not any(one["loads"].values()) for one in found) > 25  # so the test can tell


FULL = """
import resource, sys
from bge_accel.merging.merge import merge_models
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
merge_models(sys.argv[3:], "encoder", [0.5, 0.5], sys.argv[2])
"""


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    models = [make(tmp_path / name, {"x": torch.ones(1000, 1000)}) for name in "ab"]
    done = subprocess.run(
        [sys.executable, "-c", FULL, "2000000", str(tmp_path / "out"), *models],
        capture_output=True,
        text=True,
        timeout=120,
    )
    message = r"the disk is full (File too large): " + str(tmp_path / "out") + " needs 4.0 MB, "
    assert done.returncode == 1 and message in done.stderr and "nothing was left behind" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    # Known before the first byte.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="the disk is full"):
        merge_models(models, "encoder", [0.5, 0.5], str(tmp_path / "deep" / "out"))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


PEAK = """
import json, sys
from bge_accel.merging.merge import merge_models
for out, models in json.loads(sys.argv[1]).items():
    merge_models(models, "encoder", [1 / len(models)] * len(models), out)
    print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_depends_on_neither_the_size_nor_the_number_of_models(tmp_path):
    merges = {}
    for number, size, kind in ((2, 1_000_000, "small"), (5, 16_000_000, "large"), (5, 16_000_000, "bin")):
        paths = merges[str(tmp_path / f"out-{kind}")] = []
        for model in range(number):
            tensors = {"x": torch.full((size,), float(model))}
            paths.append(make(tmp_path / f"{kind}-{model}", {} if kind == "bin" else tensors))
            if kind == "bin":
                os.remove(f"{paths[-1]}/model.safetensors")
                torch.save(tensors, f"{paths[-1]}/pytorch_model.bin")
    done = subprocess.run([sys.executable, "-c", PEAK, json.dumps(merges)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    small, large, of_bin = map(int, done.stdout.split())
    assert large - small < 20 and of_bin - small < 20 and of_bin < 600  # MB; one of the larger models has 64


# ---- kinds of models


def build(kind, folder, tiny_model, seed):
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    size = len(tokenizer)
    small = {"num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    if kind == "reranker":
        model = BertForSequenceClassification(BertConfig(vocab_size=size, num_labels=1, **small))
    elif kind == "decoder":  # its head is tied to the embeddings
        model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64,
                                           bos_token_id=2, eos_token_id=3))  # fmt: skip
        tokenizer.eos_token = "[SEP]"
    else:
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=size, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model.state_dict()


@pytest.mark.parametrize("kind", ["decoder", "reranker", "encoder-decoder"])
def test_every_kind_of_model_merges_and_loads(tmp_path, tiny_model, kind):
    (a, first), (b, second) = (build(kind, tmp_path / name, tiny_model, seed) for seed, name in enumerate("ab"))
    for mix in (bge_accel.mix_models, bge_accel.mix_models_by_layers):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        model = mix([a, b], kind, [0.25, 0.75], str(tmp_path / "out"))
        found = model.state_dict()
        assert found.keys() == first.keys() and not model.training
        for name, tensor in found.items():
            assert torch.allclose(tensor, 0.25 * first[name] + 0.75 * second[name], atol=1e-6), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == AutoTokenizer.from_pretrained(a).get_vocab()


@pytest.mark.parametrize("kind", ["decoder", "reranker", "encoder-decoder"])
def test_a_model_of_another_kind_is_refused(tmp_path, tiny_model, kind):
    with pytest.raises(ValueError, match=r"architecture BertModel is no"):
        merge_models([tiny_model, tiny_model], kind, [0.5, 0.5], str(tmp_path / "out"))
    with pytest.raises(ValueError, match="model_type 'embedder' is not one of encoder, decoder"):
        merge_models([tiny_model, tiny_model], "embedder", [0.5, 0.5], str(tmp_path / "out"))


def test_a_merged_encoder_loads_in_three_libraries_with_the_same_embeddings(tmp_path, pair, monkeypatch):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    monkeypatch.chdir(tmp_path)
    model = bge_accel.mix_models(
        model_names_or_paths=pair, model_type="encoder", weights=[0.5, 0.5], output_path="./mixed_model_1"
    )
    ours = EmbeddingModel("./mixed_model_1")
    assert ours.settings.query_prefix == "what: " and ours.settings.pooling == "mean"
    theirs = SentenceTransformer("./mixed_model_1", device="cpu")
    assert np.allclose(ours.encode_queries(TEXTS), theirs.encode_query(TEXTS), atol=1e-6)
    again = AutoModel.from_pretrained("./mixed_model_1")
    ids = ours.tokenizer(TEXTS, padding=True, return_tensors="pt")
    ids = {name: ids[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        assert torch.equal(again.eval()(**ids).last_hidden_state, model(**ids).last_hidden_state)
        pooled = ours.encoder(**ids)
    assert np.allclose(pooled, ours.encode(TEXTS), atol=1e-6)
    # It is neither of the two.
    assert not np.allclose(ours.encode(TEXTS), EmbeddingModel(pair[0]).encode(TEXTS), atol=1e-3)


def test_what_else_is_in_the_folder(tmp_path, pair):
    first = tmp_path / "first"
    shutil.copytree(pair[0], first)
    for name in ("training_state/optimizer.safetensors", "onnx/model.onnx", "checkpoint-5/config.json", "pytorch_model.bin",
                 "run_config.yaml", "train_log.jsonl", ".git/config", "custom.py", "additional_chat_templates/x.jinja"):  # fmt: skip
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_text("old")
    (first / "README.md").write_text("old")
    merge_models([str(first), pair[1]], "encoder", [0.3, 0.7], str(tmp_path / "out"), recipe={"why": "because"})
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    copied = {str(path.relative_to(pair[0])) for path in Path(pair[0]).rglob("*") if path.is_file()}
    assert found == copied | {"README.md", RECIPE, "custom.py", "additional_chat_templates/x.jinja"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| first | 0.3 |" in card and "| model1 | 0.7 |" in card and "why: because" in card
    assert str(tmp_path) not in card and card.startswith("---\nlibrary_name: sentence-transformers\n")
    recipe = json.loads((tmp_path / "out" / RECIPE).read_text())
    assert [model["weight"] for model in recipe["models"]] == [0.3, 0.7] and recipe["why"] == "because"


def test_without_an_output_path_nothing_is_kept(tmp_path, pair, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = bge_accel.mix_models(pair, "encoder", [0.5, 0.5])
    assert os.listdir(tmp_path) == []
    expected = [load_file(f"{path}/model.safetensors")["embeddings.word_embeddings.weight"] for path in pair]
    found = model.embeddings.word_embeddings.weight.detach()
    assert torch.allclose(found, (expected[0] + expected[1]) / 2, atol=1e-7)


def test_an_unknown_argument_names_the_nearest(pair):
    with pytest.raises(
        TypeError, match=r"mix_models_with_data\(\) has no argument 'example_ata'; did you mean 'example_data'"
    ):
        bge_accel.mix_models_with_data(model_names_or_paths=pair, model_type="encoder", example_ata=EXAMPLES)
    with pytest.raises(TypeError, match="has no argument 'weight'; did you mean 'weights'"):
        bge_accel.mix_models(pair, "encoder", weight=[0.5, 0.5])


def test_import_stays_light():
    code = "import bge_accel, sys; assert 'mix_models' in bge_accel.__all__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_the_last_checkpoints_of_a_run(tmp_path):
    for step in (5, 10, 100):
        make(tmp_path / "run" / f"checkpoint-{step}", {"x": torch.full((2,), float(step))})
    assert [os.path.basename(path) for path in last_checkpoints(str(tmp_path / "run"), 2)] == [
        "checkpoint-100",
        "checkpoint-10",
    ]
    assert merged(tmp_path, last_checkpoints(str(tmp_path / "run"), 2), [0.5, 0.5])["x"].tolist() == [55, 55]
    with pytest.raises(ValueError, match=r"the last 4 checkpoints are asked for, and .*run holds 3"):
        last_checkpoints(str(tmp_path / "run"), 4)


# ---- weights from examples


def plain_loss(path, examples, batch_size, neg_number, seed, pooling):
    """The contrastive loss one text at a time."""
    encoder, tokenizer, _ = load_encoder(path, pooling=pooling)

    def embed(text):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.inference_mode():
            return encoder(ids["input_ids"], ids["attention_mask"])[0]

    draw, losses = random.Random(seed), []
    for at in range(0, len(examples), batch_size):
        batch = examples[at : at + batch_size]
        groups = [[row["pos"][0], *draw.sample(row["neg"], min(neg_number, len(row["neg"])))] for row in batch]
        passages = torch.stack([embed(text) for group in groups for text in group])
        start, found = 0, []
        for row, group in zip(batch, groups, strict=True):
            scores = embed("what: " + row["query"]) @ passages.T / 0.05
            found.append(scores.logsumexp(0) - scores[start])
            start += len(group)
        losses.append(torch.stack(found).mean())
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize(("batch_size", "neg_number"), [(2, 7), (2, 1), (1, 2), (8, 0)])
def test_the_loss_of_an_encoder(pair, batch_size, neg_number):
    losses = example_losses(pair, "encoder", EXAMPLES, batch_size=batch_size, neg_number=neg_number, seed=3)
    for path, loss in zip(pair, losses, strict=True):
        assert loss == pytest.approx(plain_loss(path, EXAMPLES, batch_size, neg_number, 3, "mean"), abs=2e-5)
        assert loss != pytest.approx(plain_loss(path, EXAMPLES, batch_size, neg_number, 3, "cls"), abs=1e-3)


def test_a_model_that_does_not_say_how_it_pools_is_judged_as_the_first(pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "silent")
    (tmp_path / "silent" / "modules.json").unlink()
    examples = [{**row, "prompt": "what: "} for row in EXAMPLES]
    losses = example_losses([pair[0], str(tmp_path / "silent")], "encoder", examples)
    assert losses[0] == losses[1]


def test_weights_are_the_soft_max_of_minus_the_losses():
    expected = np.exp([-1 / 5, -2 / 5, -4 / 5]) / np.exp([-1 / 5, -2 / 5, -4 / 5]).sum()
    assert weights_from_losses([1, 2, 4], 5.0) == pytest.approx(expected, abs=1e-7)
    with pytest.raises(ValueError, match="temperature is 0"):
        weights_from_losses([1, 2], 0)


def test_mixing_with_data_as_its_guide_has_it(tmp_path, pair, capsys):
    a, b = pair
    merge_models(pair, "encoder", [0.5, 0.5], str(tmp_path / "c"))
    models = [a, b, str(tmp_path / "c")]
    losses = example_losses(models, "encoder", EXAMPLES, max_input_length=512, neg_number=2)
    weights = weights_from_losses(losses, 0.01)
    assert max(weights) - min(weights) > 0.01
    out = tmp_path / "out"
    for output in (None, str(out)):
        model = bge_accel.mix_models_with_data(
            model_names_or_paths=models, model_type="encoder", example_data=EXAMPLES, temperature=0.01,
            max_input_length=512, neg_number=2, **({"output_path": output} if output else {}),
        )  # fmt: skip
        tensors = [load_file(f"{path}/model.safetensors")["embeddings.word_embeddings.weight"] for path in models]
        expected = sum(w * tensor for w, tensor in zip(weights, tensors, strict=True))
        assert torch.allclose(model.embeddings.word_embeddings.weight.detach(), expected, atol=1e-6)
    assert f"{weights[0]:.4f}  {a}" in capsys.readouterr().out
    recipe = json.loads((out / RECIPE).read_text())
    assert [one["weight"] for one in recipe["models"]] == pytest.approx(weights)
    assert recipe["weights_from"]["losses"] == pytest.approx(losses) and recipe["weights_from"]["examples"] == 3


def test_the_loss_of_a_decoder(tmp_path, tiny_model):
    path, _ = build("decoder", tmp_path / "a", tiny_model, 0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = GPT2LMHeadModel.from_pretrained(path).eval()
    examples = [{"input": "the king", "output": "a story"}, {"input": "list", "output": "of string in the file"},
                {"input": "why", "output": "value"}]  # fmt: skip
    losses = []
    for at in (0, 2):
        found = []
        for row in examples[at : at + 2]:
            ids = [*tokenizer.encode(row["input"] + " " + row["output"]), tokenizer.eos_token_id]
            start = len(tokenizer.encode(row["input"]))
            with torch.inference_mode():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found += [-log_probs[place - 1, ids[place]] for place in range(start, len(ids))]
        losses.append(torch.stack(found).mean())
    assert decoder_loss(path, examples, 2, 2048) == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    with pytest.raises(
        ValueError, match="example 0: its input has 4 tokens, so that nothing of its output is left within"
    ):
        decoder_loss(path, examples, 2, 3)
    # And through the public function.
    other, _ = build("decoder", tmp_path / "b", tiny_model, 1)
    mixed = bge_accel.mix_models_with_data([path, other], "decoder", examples, temperature=0.1)
    assert mixed.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 4)


def test_examples_that_cannot_be(pair, tmp_path):
    for examples, message in (
        ([], "example_data is empty"),
        ([{"query": "a", "pos": []}], r'example_data\[0\]: "pos" is empty'),
        (["text"], r'example_data\[0\]: "text" is no mapping'),
        ([{"query": "a", "pos": ["b"]}], 'no example has a "neg" to be compared with'),
    ):
        with pytest.raises(ValueError, match=message):
            bge_accel.mix_models_with_data(pair, "encoder", examples)
    with pytest.raises(ValueError, match=r'example_data\[0\]: "output" is null: a decoder'):
        bge_accel.mix_models_with_data(pair, "decoder", [{"input": "a"}])
    with pytest.raises(ValueError, match="there is no loss on examples for model_type 'reranker'"):
        bge_accel.mix_models_with_data(pair, "reranker", EXAMPLES)
    with pytest.raises(ValueError, match="the objective 'ndcg' is not one of"):
        bge_accel.mix_models_with_data(pair, "encoder", EXAMPLES, objective="ndcg")
    (tmp_path / "x.jsonl").write_text('{"query": "a", "pos": ["b"]}\n{"query": "a"}\n')
    with pytest.raises(ValueError, match=r'x\.jsonl:2: "pos" is missing'):
        read_examples([str(tmp_path / "x.jsonl")], "encoder")


def test_models_are_checked_before_any_loss(tmp_path, pair):
    odd = make(tmp_path / "odd", X)
    with pytest.raises(ValueError, match="the models cannot be merged"):
        bge_accel.mix_models_with_data([pair[0], odd], "encoder", EXAMPLES)


def test_ndcg_of_examples(pair):
    data = examples_to_retrieve([*EXAMPLES, {"query": "value", "pos": ["why"]}])
    assert data.queries.texts == ["the king", "list of string", "value"]
    assert len(set(data.corpus.texts)) == len(data.corpus.texts)
    # "return the list" is a negative of one query and the positive of another: once in the corpus.
    assert len(data.corpus.texts) == 10 and len(data.judgements.grade) == 4
    with pytest.raises(ValueError, match='example 0: "prompt" is not known to evaluation'):
        examples_to_retrieve([{**EXAMPLES[0], "prompt": "find: "}])

    class Perfect:
        def encode_queries(self, texts, **_):
            return np.array(
                [[text == "the king", text == "list of string", text == "value"] for text in texts], np.float32
            )

        def encode_corpus(self, texts, **_):
            answers = [{"a king story"}, {"return the list"}, {"value in the file", "why"}]
            return np.array([[text in answer for answer in answers] for text in texts], np.float32)

    assert ndcg_at_10(Perfect(), data) == 1
    losses = example_losses(pair, "encoder", EXAMPLES, objective="ndcg@10")
    model = EmbeddingModel(pair[0])
    assert losses[0] == pytest.approx(100 * (1 - ndcg_at_10(model, examples_to_retrieve(EXAMPLES))))


# ---- search


def test_the_best_mix_within_the_guard():
    dev = [0.1, 0.3, 0.5, 0.7, 0.7]
    guard = [0.9, 0.89, 0.88, 0.85, 0.95]
    scores = [MixScore(i / 4, d, g) for i, (d, g) in enumerate(zip(dev, guard, strict=True))]
    assert choose_mix(scores[:4], 0.0).tuned_weight == 0
    assert choose_mix(scores[:4], 0.01).tuned_weight == 0.25
    assert choose_mix(scores[:4], 0.021).tuned_weight == 0.5
    assert choose_mix(scores, 0.0).tuned_weight == 1
    assert (
        choose_mix([score._replace(guard=None) for score in scores], 0.0).tuned_weight == 0.75
    )  # of equals the nearer


def test_a_search_tries_the_line_from_base_to_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    base, tuned = (make(tmp_path / name, {"x": torch.full((2,), value)}) for name, value in (("a", 0.0), ("b", 1.0)))
    seen = []

    def value(folder):
        return load_file(f"{folder}/model.safetensors")["x"][0].item()

    scores = search_mixes(
        base, tuned, "encoder", value, lambda folder: 1 - value(folder) ** 2, num_steps=4, on_score=seen.append
    )
    assert seen == scores and [score.dev for score in scores] == [0, 0.25, 0.5, 0.75, 1]
    assert [score.guard for score in scores] == pytest.approx([1, 0.9375, 0.75, 0.4375, 0])
    assert choose_mix(scores, 0.3).tuned_weight == 0.5
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]  # the mixes are gone


def test_the_plot_of_a_search(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    scores = [MixScore(0.0, 0.1, 0.9), MixScore(1.0, 0.5, 0.7)]
    plot_mixes(str(tmp_path / "x.png"), scores, scores[0], 0.1)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# ---- beside LM_Cocktail


def test_against_lm_cocktail(tmp_path, real_model):
    theirs = pytest.importorskip("LM_Cocktail", reason="the LM_Cocktail package is not installed")
    paths = []
    for number in (0, 1):  # CLS pooling, which it takes every encoder for
        encoder, tokenizer, settings = load_encoder(real_model, pooling="cls")
        torch.manual_seed(0)
        for parameter in encoder.parameters():
            parameter.data.add_(torch.randn_like(parameter) * parameter.data.std().nan_to_num(0) * 0.05 * number)
        paths.append(str(tmp_path / str(number)))
        save_encoder(paths[-1], encoder, tokenizer, settings)
    ours = bge_accel.mix_models(paths, "encoder", [0.3, 0.7], str(tmp_path / "ours")).state_dict()
    expected = theirs.mix_models(paths, "encoder", [0.3, 0.7]).state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (ours[name] - tensor).abs().max() <= 1e-6, name
    random.seed(42)
    options = {"temperature": 0.2, "max_input_length": 512, "neg_number": 2}
    examples = [row for row in EXAMPLES if len(row["neg"]) > 1]
    expected = theirs.mix_models_with_data(paths, "encoder", examples, **options).state_dict()
    ours = bge_accel.mix_models_with_data(paths, "encoder", examples, seed=42, **options).state_dict()
    for name, tensor in expected.items():
        assert (ours[name] - tensor).abs().max() <= 1e-6, name


def test_a_decoder_against_lm_cocktail(tmp_path, tiny_model):
    theirs = pytest.importorskip("LM_Cocktail", reason="the LM_Cocktail package is not installed")
    paths = [build("decoder", tmp_path / str(seed), tiny_model, seed)[0] for seed in (0, 1)]
    examples = [{"input": "the king", "output": "a story"}, {"input": "list", "output": "of string in the file"},
                {"input": "why", "output": "value"}]  # fmt: skip
    options = {"temperature": 0.01, "max_input_length": 64}
    expected = theirs.mix_models_with_data(paths, "decoder", examples, **options).state_dict()
    ours = bge_accel.mix_models_with_data(paths, "decoder", examples, **options).state_dict()
    for name, tensor in expected.items():
        assert (ours[name] - tensor).abs().max() <= 1e-6, name
