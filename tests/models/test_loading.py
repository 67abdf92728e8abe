"""Models that are not whole: weights that are missing, damaged or named otherwise, no tokenizer."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import build_tiny_model
from helpers.repo import REPO
from helpers.warm_start import Job
from safetensors.torch import load_file, save_file

from bge_accel import mix_models
from bge_accel.encoding.batching import make_token_batch
from bge_accel.encoding.embedding_model import EmbeddingModel, FlagModel
from bge_accel.encoding.pipeline import encode_texts
from bge_accel.encoding.reranker import Reranker
from bge_accel.encoding.storing import weights_digest
from bge_accel.encoding.transfer import encoder_inputs
from bge_accel.models.encoder import load_encoder, save_encoder
from bge_accel.models.tokenizing import tokenize

TEXTS = ["what is a list?", "the king", "a princess and the king in a story"]
ROWS = [{"query": f"the king {i}", "pos": [f"a king story {i}"], "neg": [f"list {i}", f"file {i}"]} for i in range(4)]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n"


@pytest.fixture
def copy_of(tiny_model, tmp_path):
    """A copy of a model, its tensors and its configuration changed."""

    def copy(change=lambda tensors: tensors, model=tiny_model, name="copy", **config):
        folder = tmp_path / name
        shutil.copytree(model, folder)
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | config))
        return str(folder)

    return copy


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def run_all(tmp_path, model, scripts=6):
    """What each of the first scripts says of a model, in one line each, before it ends with status 2."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": row["pos"][0]}) + "\n" for row in ROWS))
    queries = [{"query": row["query"], "positive": row["pos"]} for row in ROWS]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    commands = {
        "finetune": "--model_name_or_path MODEL --train_data rows.jsonl --output_dir out --max_steps 1 --use_cpu",
        "mine_hard_negatives": "--model_name_or_path MODEL --input_file rows.jsonl --output_file mined.jsonl "
        "--range_for_sampling 1-3 --negative_number 1",
        "evaluate_retrieval": "--encoder MODEL --corpus_data corpus.jsonl --query_data queries.jsonl",
        "encode_corpus": "--model_name_or_path MODEL --corpus_data corpus.jsonl --output_dir store",
        "score_with_reranker": "--reranker_name_or_path MODEL --input_file rows.jsonl --output_file scored.jsonl",
        "mix_models": "--model_names_or_paths MODEL MODEL --weights 0.5 0.5 --output_path merged",
    }
    jobs = {}
    for name, command in list(commands.items())[:scripts]:
        args = [model if part == "MODEL" else part for part in command.split()]
        jobs[name] = Job(*args, cwd=tmp_path, script=REPO / "scripts" / f"{name}.py")
        jobs[name].wait()
    before = {
        "rows.jsonl",
        "corpus.jsonl",
        "queries.jsonl",
        Path(model).name,
        *(job.output.name for job in jobs.values()),
    }
    assert {path.name for path in tmp_path.iterdir()} - before <= {"cache"}
    said = {}
    for name, job in jobs.items():
        text = job.ends(2)
        assert "Traceback" not in text, text
        [said[name]] = [line for line in text.splitlines() if "error: " in line]
    return said


# ---- missing weights


@pytest.mark.parametrize(
    ("change", "config", "lacking"),
    [
        (without("layer.1.output.dense.bias"), {}, "encoder.layer.1.output.dense.bias, which its configuration"),
        (without("word_embeddings"), {}, "embeddings.word_embeddings.weight, which"),
        (
            dict,
            {"num_hidden_layers": 4},
            "encoder.layer.2.attention.output.LayerNorm.bias, encoder.layer.2.attention.output.LayerNorm.weight, "
            "encoder.layer.2.attention.output.dense.bias and 29 more tensors, which",
        ),
        (
            lambda tensors: {f"other.{name}": tensor for name, tensor in tensors.items()},
            {},
            "embeddings.LayerNorm.bias, embeddings.LayerNorm.weight, embeddings.position_embeddings.weight and 34 more "
            "tensors, which its configuration asks for; they hold other.embeddings.LayerNorm.bias, ",
        ),
    ],
    ids=["a bias", "embeddings", "four layers over two", "names"],
)
def test_missing_weights_are_never_made_up(copy_of, change, config, lacking, capsys):
    folder = copy_of(change, **config)
    for load in (load_encoder, EmbeddingModel, lambda model: mix_models([model, model], "encoder", [0.5, 0.5])):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{folder}: its files lack {lacking}')}"):
            load(folder)
    assert "LOAD REPORT" not in capsys.readouterr().err


def test_weights_of_another_shape_are_named(copy_of):
    folder = copy_of(intermediate_size=48)
    with pytest.raises(
        ValueError, match=r"the shape of encoder.layer.0.intermediate.dense.bias is \(64,\) in its files"
    ):
        load_encoder(folder)


def test_a_missing_pooler_is_left_out(copy_of, tiny_model, tmp_path):
    folder = copy_of(without("pooler"))
    encoder, tokenizer, settings = load_encoder(folder)
    assert encoder.backbone.pooler is None
    assert weights_digest(encoder) == weights_digest(load_encoder(folder)[0])
    save_encoder(str(tmp_path / "saved"), encoder, tokenizer, settings)
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == load_file(f"{folder}/model.safetensors").keys()
    np.testing.assert_array_equal(EmbeddingModel(folder).encode(TEXTS), EmbeddingModel(tiny_model).encode(TEXTS))


def test_a_reranker_needs_its_pooler_and_its_head(copy_of, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    model = build_tiny_model(tmp_path / "reranker")
    BertForSequenceClassification(BertConfig.from_pretrained(model, num_labels=1)).save_pretrained(model)
    for part in ("pooler.dense.bias", "classifier.weight"):
        folder = copy_of(without(part), model=model, name=part)
        with pytest.raises(ValueError, match=rf"its files lack [\w.]*{part}, which .* it is no reranker; name a cross"):
            Reranker(folder)
        with pytest.raises(ValueError, match=f"its files lack .*{part}"):
            mix_models([folder, folder], "reranker", [0.5, 0.5])


def test_tied_weights_are_not_missing(tiny_model, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=170, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "decoder")
    assert "lm_head.weight" not in load_file(tmp_path / "decoder" / "model.safetensors")
    decoder = mix_models([str(tmp_path / "decoder")] * 2, "decoder", [0.5, 0.5])
    assert torch.equal(decoder.lm_head.weight, decoder.transformer.wte.weight)


def test_every_script_refuses_missing_weights_in_one_line(copy_of, tmp_path):
    folder = copy_of(num_hidden_layers=4)
    for name, line in run_all(tmp_path, folder).items():
        lacking = r"(bert\.)?encoder.layer.2.attention.output.LayerNorm.bias"
        assert re.match(rf"{name}.py: error: (the model: )?{re.escape(folder)}: its files lack {lacking}, ", line), line


# ---- weights under other names


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "0.auto_model.", "module.bert."])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_names_of_ddp_and_torch_compile_are_taken_off(copy_of, tiny_model, tmp_path, wrapper, ending, capsys):
    folder = copy_of(lambda tensors: {wrapper + name: tensor for name, tensor in tensors.items()})
    if ending == ".bin":
        torch.save(load_file(f"{folder}/model.safetensors"), f"{folder}/pytorch_model.bin")
        Path(folder, "model.safetensors").unlink()
    encoder, tokenizer, settings = load_encoder(folder)
    taken_off = wrapper.removesuffix("bert.")
    assert f'"{taken_off}" stands before the name of every tensor and is taken off' in capsys.readouterr().err
    original, _, _ = load_encoder(tiny_model)
    assert weights_digest(encoder) == weights_digest(original)
    save_encoder(str(tmp_path / "saved"), encoder, tokenizer, settings)
    mix_models([tiny_model, folder], "encoder", [0.5, 0.5], str(tmp_path / "mixed")) if "bert" not in wrapper else None
    for saved in ("saved", "mixed")[: 1 + ("bert" not in wrapper)]:
        names = load_file(tmp_path / saved / "model.safetensors").keys()
        assert {name.removeprefix("bert.") for name in names} == original.backbone.state_dict().keys()


# ---- damaged files


@pytest.mark.parametrize("damage", ["cut short", "longer", "overlap", "pointer", "pickled", "pointer in .bin"])
def test_damaged_weights_are_named_with_their_file(copy_of, damage):
    folder = Path(copy_of())
    path = folder / "model.safetensors"
    expected = "does not hold the whole tensor pooler.dense.weight"
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage in ("longer", "overlap"):
        content = path.read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:length])
        names = [f"encoder.layer.{layer}.output.dense.weight" for layer in (0, 1)]
        if damage == "overlap":
            header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
        encoded = json.dumps(header).encode()
        more = b"x" * (damage == "longer")
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[length:] + more)
        expected = "is damaged: its header leaves bytes out, or gives some to two tensors"
    elif damage == "pickled":
        model = load_encoder(str(folder))[0].backbone
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(model, path)
        expected = "cannot be read as tensors alone"
    else:
        if damage == "pointer in .bin":
            path.unlink()
            path = folder / "pytorch_model.bin"
        path.write_text(POINTER)
        expected = "is a pointer of Git LFS, not the file itself: `git lfs pull` fetches it"
    for load in (load_encoder, Reranker, lambda model: mix_models([model, model], "encoder", [0.5, 0.5])):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {expected}')}"):
            load(str(folder))


@pytest.mark.slow
def test_every_script_names_damaged_weights_in_one_line(copy_of, tmp_path):
    folder = Path(copy_of())
    (folder / "model.safetensors").write_text(POINTER)
    for name, line in run_all(tmp_path, str(folder)).items():
        assert line.startswith(f"{name}.py: error: {folder}/model.safetensors is a pointer of Git LFS"), line


# ---- configurations


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            {"hidden_size": "big"},
            "StrictDataclassFieldValidationError: Validation error for field 'hidden_size': TypeE",
        ),
        ({"hidden_act": "zelu"}, "KeyError: 'zelu'"),
    ],
)
def test_a_configuration_of_which_no_model_can_be_made_is_refused_before_the_weights_are_read(copy_of, config, why):
    folder = copy_of(**config)
    Path(folder, "model.safetensors").write_text(POINTER)
    for load in (load_encoder, Reranker):
        with pytest.raises(ValueError, match=f"^{re.escape(folder)}: no model can be made from its config.json .{why}"):
            load(folder)


def test_a_package_that_a_model_needs_is_named(copy_of):
    folder = copy_of(quantization_config={"quant_method": "gptq", "bits": 4})
    for load in (load_encoder, Reranker):
        with pytest.raises(ValueError, match=f"^cannot load the (model|reranker) '{re.escape(folder)}': .*GPTQ"):
            load(folder)


def test_a_model_without_layers_embeds(copy_of):
    """What its files hold more is said."""
    model = EmbeddingModel(copy_of(num_hidden_layers=0))
    assert np.isfinite(model.encode_queries(TEXTS)).all()


# ---- tokenizers


FAMILIES = {
    "bert": {},
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64},
    "electra": {"embedding_size": 16},
    "roberta": {},
    "xlm-roberta": {},
    "deberta-v2": {},
    "albert": {"embedding_size": 16},
    "mpnet": {},
    "modernbert": {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "llama": {},
    "qwen3": {"head_dim": 8, "num_key_value_heads": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
}


def build(family, folder, tokenizer=None):
    """A model of a family with random weights, of one layer and dimension 32."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    torch.manual_seed(0)
    shape = {
        "vocab_size": 170,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    own = FAMILIES[family]
    has_own_names = "n_layers" in own or "n_layer" in own or "d_kv" in own
    shape = {"vocab_size": 170} if has_own_names else shape
    AutoModel.from_config(AutoConfig.for_model(family, **shape, **own)).save_pretrained(folder)
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_a_tokenizer_is_refused_before_the_weights_are_read(tmp_path, family):
    folder = build(family, tmp_path / "model")
    Path(folder, "model.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=f"^{re.escape(folder)} has no complete tokenizer: "):
        load_encoder(folder)


def test_a_tokenizer_that_is_damaged_or_lacks_its_vocabulary_is_refused(copy_of, tiny_model):
    folder = copy_of()
    path = Path(folder, "tokenizer.json")
    path.write_text(path.read_text()[:-100])
    with pytest.raises(ValueError, match=f"^{re.escape(folder)} has no complete tokenizer: it cannot be loaded"):
        load_encoder(folder)
    path.unlink()
    with pytest.raises(ValueError, match="no complete tokenizer"):  # tokenizer_config.json alone is left
        Reranker(folder)
    load_encoder(folder, tokenizer_name=tiny_model)


def test_every_script_refuses_a_folder_without_a_tokenizer(copy_of, tmp_path):
    folder = copy_of()
    for path in Path(folder).glob("tokenizer*"):
        path.unlink()
    for name, line in run_all(tmp_path, folder, scripts=5).items():
        assert line.startswith(
            f"{name}.py: error: {folder} has no complete tokenizer: it knows special tokens alone"
        ), line


# ---- families


def sentence_transformers_embeds(folder, texts):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu").encode(texts)


@pytest.fixture
def without_padding(tiny_model, tmp_path):
    """A Llama, whose tokenizer ends texts and does not pad."""
    from transformers import AutoTokenizer

    folder = build("llama", tmp_path / "llama", tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    return folder


def test_where_no_token_pads_the_end_of_text_does(without_padding, tmp_path, capsys):
    encoder, tokenizer, settings = load_encoder(without_padding, pooling="last_token")
    note = f"{without_padding}: its tokenizer has no padding token; the one that ends a text, [SEP], is taken"
    assert capsys.readouterr().err == f"warning: {note}\n" and tokenizer.pad_token == "[SEP]"
    together = encode_texts(encoder, tokenizer, TEXTS, max_length=32)
    alone = [encode_texts(encoder, tokenizer, [text], max_length=32)[0] for text in TEXTS]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    saved = str(tmp_path / "saved")
    save_encoder(saved, encoder, tokenizer, settings)
    np.testing.assert_allclose(EmbeddingModel(saved).encode(TEXTS), together, atol=1e-6)
    assert capsys.readouterr().err == ""  # it pads from here on
    np.testing.assert_allclose(sentence_transformers_embeds(saved, TEXTS), together, atol=1e-5)
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(without_padding)
    with pytest.raises(ValueError, match="neither a padding token nor one that ends a text"):
        load_encoder(without_padding)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_encoder_of_t5_embeds_as_sentence_transformers(tiny_model, tmp_path, normalize):
    from transformers import AutoConfig, T5EncoderModel

    folder, saved, mixed = build("t5", tmp_path / "whole", tiny_model), str(tmp_path / "saved"), str(tmp_path / "mixed")
    encoder, tokenizer, settings = load_encoder(folder, pooling="mean", normalize=normalize)
    assert type(encoder.backbone) is T5EncoderModel
    save_encoder(saved, encoder, tokenizer, settings)
    assert AutoConfig.from_pretrained(saved).architectures == ["T5EncoderModel"]
    assert not any(name.startswith("decoder") for name in load_file(f"{saved}/model.safetensors"))
    ours, model = encode_texts(encoder, tokenizer, TEXTS, max_length=32), EmbeddingModel(saved)
    np.testing.assert_allclose(model.encode(TEXTS), ours, atol=1e-6)
    np.testing.assert_allclose(sentence_transformers_embeds(saved, TEXTS), ours, atol=1e-5)
    assert model.dim == 32 and type(mix_models([saved, saved], "encoder", [0.5, 0.5], mixed)) is T5EncoderModel
    np.testing.assert_allclose(EmbeddingModel(mixed).encode(TEXTS), ours, atol=1e-6)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_tuned_model_of_another_family_embeds_as_sentence_transformers(
    tiny_model, without_padding, tmp_path, run_script, family
):
    model = without_padding if family == "llama" else build(family, tmp_path / family, tiny_model)
    pooling = "last_token" if family == "llama" else "mean"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run_script("finetune.py", "--model_name_or_path", model, "--train_data", "rows.jsonl", "--output_dir", "tuned",
               "--max_steps", 2, "--per_device_train_batch_size", 4, "--train_group_size", 2, "--use_cpu",
               "--query_max_len", 32, "--passage_max_len", 32, "--learning_rate", 1e-2,
               "--sentence_pooling_method", pooling)  # fmt: skip
    tuned = EmbeddingModel(str(tmp_path / "tuned")).encode(TEXTS)
    np.testing.assert_allclose(sentence_transformers_embeds(str(tmp_path / "tuned"), TEXTS), tuned, atol=1e-5)
    assert np.abs(tuned - EmbeddingModel(model, pooling=pooling).encode(TEXTS)).max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "bert", "distilbert", "roberta", "qwen3"])
def test_a_text_is_embedded_as_when_it_is_alone(tiny_model, tmp_path, family):
    """Whatever side the tokenizer pads on: positions that are learnt count from the left."""
    from transformers import AutoTokenizer

    folder, saved = build(family, tmp_path / family, tiny_model), str(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder, padding_side="left").save_pretrained(folder)
    encoder, tokenizer, settings = load_encoder(folder, pooling="mean")
    texts = [*TEXTS, "the king is in a story " * 8]
    alone = np.concatenate([encode_texts(encoder, tokenizer, [text], max_length=64) for text in texts])
    np.testing.assert_allclose(encode_texts(encoder, tokenizer, texts, max_length=64), alone, atol=1e-5)
    batch = make_token_batch(tokenize(tokenizer, texts, 64), pad_token_id=0, max_tokens=10**6, overhead_tokens=999)
    [micro_batch] = batch.micro_batches  # as in training
    with torch.no_grad():
        together = encoder(**encoder_inputs(micro_batch, torch.device("cpu")))[batch.restore]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    save_encoder(saved, encoder, tokenizer, settings)
    np.testing.assert_allclose(sentence_transformers_embeds(saved, texts), alone, atol=1e-5)


@pytest.mark.parametrize("family", ["albert", "mpnet"])
def test_gradient_checkpointing_that_a_class_has_not_is_refused_before_the_weights_are_read(
    tiny_model, tmp_path, family
):
    folder = build(family, tmp_path / family, tiny_model)
    load_encoder(folder)
    Path(folder, "model.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=rf"(?i)^--gradient_checkpointing: the code of {family}model has none"):
        load_encoder(folder, gradient_checkpointing=True)
    encoder, _, _ = load_encoder(tiny_model, gradient_checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in encoder.backbone.modules())


@pytest.mark.parametrize("name", ["no/such/x", "./missing", "nobody/nothing"])
def test_a_model_that_is_nowhere_is_one_error(name):
    for load in (FlagModel, EmbeddingModel, Reranker):
        with pytest.raises(ValueError, match=re.escape(name)) as found:
            load(name)
        assert "\n" not in str(found.value) and not found.value.__cause__
        assert found.value.__context__ is None or found.value.__suppress_context__
