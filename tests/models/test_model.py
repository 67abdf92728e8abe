"""Pooling against loops; what a checkpoint says of itself; one saved folder, the same embeddings from three libraries."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bge_accel.encoding.embedding_model import EmbeddingModel
from bge_accel.encoding.pipeline import encode_texts
from bge_accel.models.encoder import Encoder, load_encoder, save_encoder
from bge_accel.models.pooling import POOLING
from bge_accel.models.settings import EmbeddingSettings, instruction_prefix, read_settings

TEXTS = [
    "what is a list?",
    "a",
    "",
    "the princess, the king and the story of who did it",
    "的是 不了",
    "value " * 300,
    "A B?",
]


def write_st_files(folder, *, pooling="mean", normalize=True, extra_modules=(), transformer=None, st_config=None):
    """sentence-transformers files beside a model; `pooling` is a mode or the whole content of 1_Pooling/config.json."""
    kinds = ["Transformer", "Pooling", *extra_modules] + ["Normalize"] * normalize
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    if isinstance(pooling, str):
        pooling = {"pooling_mode": pooling, "embedding_dimension": 32}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": transformer,
        "config_sentence_transformers.json": st_config,
    }
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


@pytest.fixture
def copy_of(tiny_model, tmp_path):
    """A copy of the tiny model with sentence-transformers files."""

    def copy(**files):
        for path in Path(tiny_model).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return write_st_files(tmp_path, **files)

    return copy


def by_hand(folder, texts, pooling, normalize):
    """Embeddings from transformers alone, text by text, without padding."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    embeddings = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, truncation=True, return_tensors="pt")).last_hidden_state[0]
        ways = {"cls": hidden[0], "mean": hidden.mean(0), "last_token": hidden[-1], "max": hidden.max(0).values}
        vector = ways[pooling]
        embeddings.append(vector / vector.square().sum().sqrt() if normalize else vector)
    return torch.stack(embeddings).numpy()


def assert_same(ours, theirs):
    assert ours.shape == theirs.shape
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() > 0.99999 and np.abs(ours - theirs).max() < 1e-5


# ---- pooling


@pytest.mark.parametrize("method", POOLING)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pool_equals_loops_and_ignores_padding(method, side, dtype):
    lengths, width = [5, 1, 3, 4], 5
    hidden = torch.randn(4, width, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.zeros(4, width, dtype=torch.int64)
    expected = []
    for row, length in enumerate(lengths):
        real = slice(width - length, width) if side == "left" else slice(length)
        mask[row, real] = 1
        tokens = hidden[row, real].double()
        of_text = {
            "cls": tokens[0],
            "mean": sum(tokens) / length,
            "last_token": tokens[-1],
            "max": tokens.max(0).values,
        }
        expected.append(of_text[method])
    pooled = POOLING[method].padded(hidden, mask)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6  # the mean of bfloat16 states is taken in float32
    torch.testing.assert_close(pooled.double(), torch.stack(expected), rtol=0, atol=tolerance)
    hidden[mask == 0] = 99
    assert torch.equal(POOLING[method].padded(hidden, mask), pooled)


def test_forward_normalises_in_float32(tiny_model):
    inputs = {"input_ids": torch.tensor([[2, 9, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    for method in POOLING:
        encoder, _, _ = load_encoder(tiny_model, dtype=torch.bfloat16, pooling=method)
        emb = encoder(**inputs)
        assert emb.dtype == torch.float32 and emb.norm().item() == pytest.approx(1, abs=1e-6)
        plain = Encoder(encoder.backbone, method, normalize=False)(**inputs)
        assert plain.dtype == torch.float32 and plain.norm() > 2
        torch.testing.assert_close(plain / plain.norm(), emb)


# ---- instructions


@pytest.mark.parametrize(
    ("arguments", "prefix"),
    [
        ([None], None),
        ([None, "no braces"], None),
        ([""], ""),
        (["ask: "], "ask: "),
        (["ask", "{}: {}"], "ask: "),
        (["rank it", "Instruct: {}\\nQuery: {}"], "Instruct: rank it\nQuery: "),
        (["rank it", "Instruct: {}\nQuery: {}"], "Instruct: rank it\nQuery: "),
        (["of {braces} {}", "<{0}>{1}"], "<of {braces} {}>"),
        (["x", "{{}}{}{}"], "{}x"),
        (["检索：", "{}{}"], "检索："),
    ],
)
def test_instruction_prefix(arguments, prefix):
    assert instruction_prefix(*arguments) == prefix


@pytest.mark.parametrize(
    "format", ["{}", "{}{}{}", "no braces", "{", "{name}{}", "{1}{0}", "{}{} ", "{}{}?", "{1} {0}{1}", "{}{0}"]
)
def test_a_format_that_is_no_prefix_is_refused(format):
    with pytest.raises(ValueError, match=f"instruction format {re.escape(repr(format))} "):
        instruction_prefix("ask", format)


# ---- what a checkpoint says of itself


def old_style(*modes, **more):
    names = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
    return {"word_embedding_dimension": 32, **{f"pooling_mode_{name}": name in modes for name in names}, **more}


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (old_style("cls_token"), "cls"),
        (old_style("mean_tokens"), "mean"),
        (old_style("lasttoken", include_prompt=True), "last_token"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last_token"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_of_both_config_styles(tmp_path, pooling, expected, normalize):
    settings = read_settings(write_st_files(tmp_path, pooling=pooling, normalize=normalize))
    assert settings == EmbeddingSettings(pooling=expected, normalize=normalize)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"pooling": old_style("weightedmean_tokens")},
            "pooling ['pooling_mode_weightedmean_tokens'] is not supported",
        ),
        ({"pooling": old_style("cls_token", "mean_tokens")}, "is not supported"),
        ({"pooling": old_style()}, "pooling [] is not supported; here it is one of cls, mean, last_token"),
        ({"pooling": "weightedmean"}, "pooling ['weightedmean'] is not supported"),
        ({"pooling": {"pooling_mode": ["mean", "max"]}}, "pooling ['mean', 'max'] is not supported"),
        ({"pooling": old_style("mean_tokens", include_prompt=False)}, "include_prompt: false"),
        ({"extra_modules": ["Dense"]}, "module sentence_transformers.models.Dense is not supported"),
    ],
)
def test_what_this_project_does_not_compute_is_refused(tmp_path, files, message):
    folder = write_st_files(tmp_path, **files)
    with pytest.raises(ValueError, match=f"^{re.escape(folder)}: .*{re.escape(message)}"):
        read_settings(folder)


def test_a_folder_without_st_files_says_nothing(tiny_model):
    assert read_settings(tiny_model) == EmbeddingSettings()


def test_broken_json_is_named(tmp_path):
    write_st_files(tmp_path, transformer={})
    for name in ("sentence_bert_config.json", "modules.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=f"{name} cannot be read: not JSON"):
            read_settings(str(tmp_path))


@pytest.mark.parametrize(
    ("st_config", "query", "passage", "others"),
    [
        ({"prompts": {"query": "q: ", "document": "d: "}}, "q: ", "d: ", {}),
        ({"prompts": {"query": "q: ", "passage": "p: "}}, "q: ", "p: ", {}),
        ({"prompts": {"query": "q: "}, "default_prompt_name": None}, "q: ", "", {}),
        ({"prompts": {"document": "d: ", "passage": "p: "}}, "", "d: ", {"passage": "p: "}),
        ({"prompts": {"query": "q: ", "document": "", "sts": "s: "}}, "q: ", "", {"sts": "s: "}),
        ({"prompts": {"s2p": "s: "}, "default_prompt_name": "s2p"}, "s: ", "s: ", {"s2p": "s: "}),
        ({"prompts": {}}, "", "", {}),
        ({"prompts": None}, "", "", {}),
        ({}, "", "", {}),
    ],
)
def test_prompts(tmp_path, st_config, query, passage, others):
    settings = read_settings(write_st_files(tmp_path, st_config=st_config))
    assert (settings.query_prefix, settings.passage_prefix, settings.other_prompts) == (query, passage, others)


def test_a_default_prompt_for_queries_is_not_put_before_passages(tmp_path):
    """sentence-transformers' encode_document takes no prompt here, either."""
    st_config = {"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "query"}
    settings = read_settings(write_st_files(tmp_path, st_config=st_config))
    assert (settings.query_prefix, settings.passage_prefix) == ("q: ", "")


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_folder_that_sentence_transformers_saved(tiny_model, tmp_path, pooling, normalize):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    modules = [Transformer(tiny_model, max_seq_length=50), Pooling(32, pooling), *[Normalize()] * normalize]
    theirs = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "ask: ", "document": "read: "})
    theirs.save_pretrained(str(tmp_path))
    ours = EmbeddingModel(str(tmp_path), device="cpu")
    assert ours.settings == EmbeddingSettings(
        pooling.replace("lasttoken", "last_token"), normalize, "ask: ", "read: ", max_length=50
    )
    assert_same(ours.encode_queries(TEXTS), theirs.encode_query(TEXTS))
    assert_same(ours.encode_corpus(TEXTS), theirs.encode_document(TEXTS))


# ---- loading


def test_where_the_checkpoint_is_silent_cls_and_normalised(tiny_model):
    encoder, tokenizer, settings = load_encoder(tiny_model)
    assert settings == EmbeddingSettings("cls", True, "", "", max_length=128)
    assert (encoder.pooling, encoder.normalize, encoder.training) == ("cls", True, False)
    assert tokenizer.model_max_length == 128
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_what_is_given_wins_over_what_the_checkpoint_says(copy_of):
    folder = copy_of(pooling="mean", normalize=True, st_config={"prompts": {"query": "q: ", "document": "d: "}})
    assert load_encoder(folder)[2] == EmbeddingSettings("mean", True, "q: ", "d: ", max_length=128)
    encoder, _, settings = load_encoder(
        folder, pooling="last_token", normalize=False, query_prefix="", passage_prefix="x"
    )
    assert settings == EmbeddingSettings("last_token", False, "", "x", max_length=128)
    assert (encoder.pooling, encoder.normalize) == ("last_token", False)
    assert load_encoder(folder, settings=EmbeddingSettings("cls"))[2].pooling == "cls"
    with pytest.raises(ValueError, match="pooling 'median' is not one of cls, mean, last_token, max"):
        load_encoder(folder, pooling="median")


@pytest.mark.parametrize(
    ("own", "longest", "expected"),
    [(None, 0, 128), (64, 0, 64), (64, 32, 64), (64, 100, 100), (64, 128, 128), (512, 0, 128), (512, 128, 128)],
)
def test_maximum_length(copy_of, own, longest, expected):
    folder = copy_of(transformer=own and {"max_seq_length": own})
    _, tokenizer, settings = load_encoder(folder, longest=longest)
    assert settings.max_length == tokenizer.model_max_length == expected


def test_texts_longer_than_the_models_positions_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"^texts of 129 tokens are asked for; .* takes 128 at most"):
        load_encoder(tiny_model, longest=129)


def test_a_roberta_has_two_positions_less(tiny_model, tmp_path):
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    config = RobertaConfig(vocab_size=170, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                           max_position_embeddings=40)  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    assert load_encoder(str(tmp_path), longest=38)[2].max_length == 38
    with pytest.raises(ValueError, match="takes 38 at most"):
        load_encoder(str(tmp_path), longest=39)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot load the model 'nobody/nothing'"):
        load_encoder("nobody/nothing")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_encoder(str(tmp_path))


def test_config_and_tokenizer_may_come_from_elsewhere(tiny_model, copy_of):
    folder = copy_of()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (Path(folder) / name).unlink()
    with pytest.raises(ValueError, match=re.escape(folder)):
        load_encoder(folder)
    _, tokenizer, settings = load_encoder(folder, config_name=tiny_model, tokenizer_name=tiny_model)
    assert settings.pooling == "mean" and tokenizer("a")["input_ids"][0] == tokenizer.cls_token_id


def test_only_the_pooler_is_frozen(tiny_model):
    encoder, _, _ = load_encoder(tiny_model)
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.pooler.dense.weight", "backbone.pooler.dense.bias"}


# ---- saving


def same_from_everywhere(folder, pooling, normalize, query_prefix, passage_prefix, texts=TEXTS):
    from sentence_transformers import SentenceTransformer

    ours = EmbeddingModel(folder, device="cpu")
    st = SentenceTransformer(folder, device="cpu")
    assert st.similarity_fn_name == ("cosine" if normalize else "dot")
    prefixes = (query_prefix, passage_prefix, "")
    expected = by_hand(folder, [prefix + text for prefix in prefixes for text in texts], pooling, normalize)
    assert np.allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5) == normalize
    for ours_say, st_says, expected_part in zip(
        (ours.encode_queries, ours.encode_corpus, ours.encode),
        (st.encode_query, st.encode_document, st.encode),
        np.split(expected, 3),
        strict=True,
    ):
        assert_same(ours_say(texts), expected_part)
        assert_same(st_says(texts), expected_part)
    return ours


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("prefixes", [("", ""), ("find what answers: ", "text:\n")], ids=["plain", "instructed"])
def test_three_libraries_embed_alike(tiny_model, tmp_path, pooling, normalize, prefixes):
    encoder, tokenizer, settings = load_encoder(
        tiny_model, pooling=pooling, normalize=normalize, query_prefix=prefixes[0], passage_prefix=prefixes[1]
    )
    folder = str(tmp_path / "saved")
    save_encoder(folder, encoder, tokenizer, settings, model_card="# card")
    ours = same_from_everywhere(folder, pooling, normalize, *prefixes)
    assert ours.settings == settings
    assert_same(ours.encode(TEXTS), encode_texts(encoder, tokenizer, TEXTS, max_length=128))  # as before saving
    queries, plain = ours.encode_queries(TEXTS), ours.encode(TEXTS)
    assert (np.abs(queries - plain).max() > 1e-3) == bool(prefixes[0])
    files = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
    assert files == {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json",
        "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json", "README.md",
    }  # fmt: skip
    assert (tmp_path / "saved" / "README.md").read_text() == "# card"
    # Other programs cut where this file says, which is not to be where texts were last cut.
    encode_texts(encoder, tokenizer, TEXTS, max_length=7)
    save_encoder(folder, encoder, tokenizer, settings)
    assert Tokenizer.from_file(f"{folder}/tokenizer.json").truncation is None


def test_three_libraries_embed_alike_on_a_real_model(real_model, tmp_path):
    encoder, tokenizer, settings = load_encoder(real_model, query_prefix="Represent this question: ")
    assert (settings.pooling, settings.normalize, settings.max_length) == ("mean", True, 256)
    save_encoder(str(tmp_path), encoder, tokenizer, settings)
    texts = ["What is a list in Python?", "", "Ein Haus — café, 检索 😀", "word " * 400]
    same_from_everywhere(str(tmp_path), "mean", True, "Represent this question: ", "", texts)


def test_folders_that_git_and_hubs_drop_are_not_needed(tiny_model, tmp_path):
    encoder, tokenizer, settings = load_encoder(tiny_model, pooling="mean")
    save_encoder(str(tmp_path), encoder, tokenizer, settings)
    for path in tmp_path.iterdir():
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    same_from_everywhere(str(tmp_path), "mean", True, "", "")


def test_saving_twice_gives_the_same_folder(copy_of, tmp_path):
    st_config = {"prompts": {"query": "q: ", "passage": "p: ", "sts": "s: "}, "default_prompt_name": "sts"}
    folder = copy_of(pooling=old_style("lasttoken"), transformer={"max_seq_length": 60, "do_lower_case": True},
                     st_config=st_config)  # fmt: skip
    encoder, tokenizer, settings = load_encoder(folder, longest=70)
    assert settings == EmbeddingSettings("last_token", True, "q: ", "p: ", 70, True, {"sts": "s: "})
    contents = []
    for number in (1, 2):
        folder = str(tmp_path / f"saved{number}")
        save_encoder(folder, encoder, tokenizer, settings)
        assert read_settings(folder) == settings
        encoder, tokenizer, again = load_encoder(folder)
        assert again == settings
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        contents.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert contents[0] == contents[1]


def test_given_weights_are_saved_in_place_of_the_encoders(tiny_model, tmp_path):
    from safetensors.torch import load_file

    encoder, tokenizer, settings = load_encoder(tiny_model)
    original = load_file(Path(tiny_model) / "model.safetensors")
    save_encoder(str(tmp_path / "own"), encoder, tokenizer, settings)
    own = load_file(tmp_path / "own" / "model.safetensors")
    assert own.keys() == original.keys() and all(torch.equal(own[name], original[name]) for name in own)
    given = {name: tensor + 1 for name, tensor in encoder.state_dict().items()}
    save_encoder(str(tmp_path / "given"), encoder, tokenizer, settings, state_dict=given)
    saved = load_file(tmp_path / "given" / "model.safetensors")
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name] + 1) for name in saved)


def test_a_tokenizer_that_has_to_lower_case(copy_of, tmp_path):
    from tokenizers import Tokenizer

    folder = copy_of(pooling="mean", transformer={"do_lower_case": True})
    path = Path(folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(content))
    assert Tokenizer.from_file(str(path)).encode("KING").tokens == ["[CLS]", "[UNK]", "[SEP]"]
    encoder, tokenizer, settings = load_encoder(folder)
    saved = str(tmp_path / "saved")
    save_encoder(saved, encoder, tokenizer, settings)
    upper = [text.upper() for text in TEXTS]
    for model in (EmbeddingModel(folder, device="cpu"), same_from_everywhere(saved, "mean", True, "", "", upper)):
        assert model.settings.lower_case
        assert_same(model.encode(upper), by_hand(folder, [text.lower() for text in TEXTS], "mean", True))


def test_a_hub_model_that_cannot_be_looked_up_is_never_taken_for_a_silent_one():
    """Offline and not in the cache: its pooling is unknown, so CLS would be a guess."""
    with pytest.raises(ValueError, match="which says how it pools, is not in the local cache"):
        read_settings("org/model")
