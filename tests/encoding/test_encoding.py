"""Encoding: batches, windows and order change nothing; instructions, lengths and precision are what was asked for."""

import itertools
import shutil
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_accel import EmbeddingModel, FlagModel
from bge_accel.encoding import embedding_model, pipeline, storing
from bge_accel.encoding.pipeline import EncodingCounts, encode_texts, is_out_of_memory, prefetch, tokenize_and_count
from bge_accel.encoding.storing import tokenizer_digest, weights_digest
from bge_accel.models.encoder import load_encoder, save_encoder
from bge_accel.models.tokenizing import tokenize
from bge_accel.processes import progress

TEXTS = [
    "what is a list?",
    "a",
    "",
    "the princess, the king and the story",
    "的是 不了",
    "😀 café",
    "\n\t ",
    "x " * 300,
]
TEXTS += [f"{'value ' * (number % 7)}string {number}" for number in range(22)]


def set_window(monkeypatch, size):
    """So many texts are sorted by length together."""
    for module in (embedding_model, pipeline, storing):
        monkeypatch.setattr(module, "WINDOW", size)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """The tiny model, mean-pooled, with instructions for queries and passages."""
    path = str(tmp_path_factory.mktemp("encoding") / "model")
    encoder, tokenizer, settings = load_encoder(
        tiny_model, pooling="mean", query_prefix="who did ", passage_prefix="story: "
    )
    save_encoder(path, encoder, tokenizer, settings)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return EmbeddingModel(folder, device="cpu")


@pytest.fixture(scope="module")
def one_by_one(model):
    return np.stack([model.encode(text) for text in TEXTS])


def close(ours, theirs):
    return ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-5


# ---- what is no text


@pytest.mark.parametrize(
    ("texts", "kind", "told"),
    [
        ([1], TypeError, r"text 0 \(counted from 0\) is 1 \(int\): every text has to be a string"),
        (["a", None], TypeError, r"text 1 .* is null \(NoneType\)"),
        (["a", ["b", "c"]], TypeError, r'text 1 .* is \["b", "c"\] \(list\)'),
        (["a", float("nan")], TypeError, r"text 1 .* is NaN \(float\)"),
        (None, TypeError, r"one string or a sequence of strings, not null \(NoneType\)"),
        (b"ab", TypeError, r"one string or a sequence of strings, not b'ab' \(bytes\)"),
        ({"a": 1}, TypeError, r"one string or a sequence of strings, not .* \(dict\)"),
        ({"a"}, TypeError, r"one string or a sequence of strings, not \{'a'\} \(set\)"),
        (["a", "b\ud800"], ValueError, r"text 1 .* holds half of a character"),
    ],
    ids=str,
)
def test_what_is_no_text_is_told_by_its_number(model, tmp_path, texts, kind, told):
    def save(texts):
        return model.save_corpus(str(tmp_path / "store"), texts)

    for encode in (model.encode, model.encode_queries, model.encode_corpus, save):
        with pytest.raises(kind, match=told):
            encode(texts)
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match="batch_size is -1: it has to be at least 1"):
        model.encode(["a"], batch_size=-1)


def test_a_text_without_tokens_is_told(tiny_model):
    """A tokenizer that adds none of its own; beside another text nothing would have been embedded in silence."""
    from tokenizers.processors import ByteLevel

    bare = EmbeddingModel(tiny_model, device="cpu", pooling="mean")
    bare.tokenizer.backend_tokenizer.post_processor = ByteLevel()
    assert bare.encode(["a", "b"]).shape == (2, 32)
    for texts, empty in (("", '""'), (["", "a"], '""'), (["a", " \n"], r'" \\n"')):
        with pytest.raises(ValueError, match=f"the text {empty} has no tokens, .*: there is nothing to embed"):
            bare.encode(texts)
    assert bare.encode_corpus([]).shape == (0, 32)


# ---- shapes and order


def test_the_precision_is_the_fast_one_of_the_machine(folder, one_by_one, monkeypatch):
    """And with bfloat16 the arrays are float32 all the same, and nearly the same."""
    monkeypatch.setattr("bge_accel.models.precision.cpu_has_bf16", lambda: True)
    for is_fast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr("bge_accel.models.precision.cpu_is_faster_in_bf16", lambda is_fast=is_fast: is_fast)
        chosen = EmbeddingModel(folder, device="cpu")
        flag = FlagModel(folder, devices="cpu")
        assert next(chosen.encoder.parameters()).dtype == next(flag.encoder.parameters()).dtype == dtype
        emb = chosen.encode(TEXTS)
        assert emb.dtype == np.float32 and (emb * one_by_one).sum(1).min() > 0.99


def test_a_text_gives_a_vector_and_a_list_an_array(model):
    assert model.dim == 32
    vector, one, none = model.encode("a"), model.encode(["a"]), model.encode([])
    assert (vector.shape, one.shape, none.shape) == ((32,), (1, 32), (0, 32))
    assert {array.dtype for array in (vector, one, none)} == {np.dtype(np.float32)}
    assert np.array_equal(vector, one[0]) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert model.encode_queries([]).shape == model.encode_corpus([]).shape == (0, 32)
    assert model.encode_queries("a").shape == model.encode_corpus("a").shape == (32,)


def test_texts_embed_apart(one_by_one):
    different = np.delete(one_by_one, TEXTS.index("\n\t "), axis=0)  # the same tokens as the empty text
    distances = np.linalg.norm(different[:, None] - different[None], axis=2)
    assert np.isfinite(one_by_one).all() and distances[~np.eye(len(different), dtype=bool)].min() > 1e-3


@pytest.mark.parametrize("batch_size", [None, 1, 2, 7, 1000])
def test_order_and_batches_change_nothing(model, one_by_one, batch_size):
    assert close(model.encode(TEXTS, batch_size=batch_size), one_by_one)
    assert close(model.encode(tuple(reversed(TEXTS)), batch_size=batch_size), one_by_one[::-1])


@pytest.mark.parametrize("window", [1, 7, 30, 31])
def test_windows_change_nothing(model, one_by_one, window, monkeypatch):
    set_window(monkeypatch, window)
    assert close(model.encode(TEXTS), one_by_one)


def test_windows_that_come_late_are_all_there_and_in_order(model, one_by_one, monkeypatch):
    """As from a GPU: a window is given out when the next has been computed."""
    monkeypatch.setattr(pipeline, "_is_late", lambda device: True)
    for num_windows in range(4):
        computed, windows = [], [(number, TEXTS[number : number + 5]) for number in range(num_windows)]
        found = pipeline.encode_windows(
            model.encoder, model.tokenizer, windows, max_length=128, on_texts=computed.append
        )
        for number, (key, window) in enumerate(found):
            assert key == number and close(window, one_by_one[number : number + 5])
            assert sum(computed) == 5 * min(number + 2, num_windows)
        assert sum(computed) == 5 * num_windows


def test_several_gpus_name_the_command_that_uses_them(folder, monkeypatch):
    assert embedding_model.line_for_all_gpus() is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("sys.argv", ["scripts/encode_corpus.py", "--output_dir", "a b"])
    launch = "accelerate launch --multi_gpu --num_processes 4 scripts/encode_corpus.py"
    assert embedding_model.line_for_all_gpus().endswith(f"{launch} --output_dir 'a b'")
    monkeypatch.setattr("sys.argv", ["mine.py", "--x"])
    with pytest.warns(UserWarning, match=f"4 GPUs are here and one is used.*{launch} --model_name_or_path MODEL"):
        EmbeddingModel(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EmbeddingModel(folder, device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert embedding_model.line_for_all_gpus() is None


@pytest.fixture
def shapes(model):
    """Fills with (texts, width) of each forward pass."""
    seen = []
    handle = model.encoder.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    yield seen
    handle.remove()


@pytest.mark.parametrize("max_tokens", [1, 64, 10_000])
@pytest.mark.parametrize("max_texts", [None, 3])
def test_the_budget_bounds_each_pass_and_changes_nothing(model, one_by_one, shapes, max_tokens, max_texts):
    ours = encode_texts(
        model.encoder, model.tokenizer, TEXTS, max_length=128, max_tokens=max_tokens, max_texts=max_texts
    )
    assert close(ours, one_by_one) and sum(num for num, _ in shapes) == len(TEXTS)
    assert all(num == 1 or (num * width <= max_tokens and num <= (max_texts or num)) for num, width in shapes)


def test_batch_size_bounds_each_pass(model, shapes):
    model.encode_queries(TEXTS, batch_size=4)
    assert max(num for num, _ in shapes) == 4
    shapes.clear()
    model.encode_queries(TEXTS)
    assert max(num for num, _ in shapes) > 4


def test_batches_change_nothing_for_the_last_token(folder, one_by_one):
    last = EmbeddingModel(folder, device="cpu", pooling="last_token")
    alone = np.stack([last.encode(text) for text in TEXTS])
    assert close(last.encode(TEXTS), alone) and not close(alone, one_by_one)


def test_encoding_is_silent_unless_asked(model, capfd, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    model.encode(TEXTS)
    assert capfd.readouterr() == ("", "")
    model.encode_queries(TEXTS, show_progress=True)
    assert "queries" in (err := capfd.readouterr().err) and "30 of 30 texts" in err


def test_embeddings_carry_no_graph_and_dropout_is_off(model):
    tensor = model.encode(["a b"], convert_to_numpy=False)
    assert not tensor.requires_grad and not model.encoder.training
    assert np.array_equal(model.encode(["a b"]), tensor.numpy())


def test_torch_output(folder, model):
    for ours in (
        model.encode(TEXTS, convert_to_numpy=False),
        EmbeddingModel(folder, device="cpu", convert_to_numpy=False).encode(TEXTS),
    ):
        assert isinstance(ours, torch.Tensor) and ours.dtype == torch.float32 and ours.device.type == "cpu"
        assert close(ours.numpy(), model.encode(TEXTS))
    assert model.encode("a", convert_to_numpy=False).shape == (32,)
    assert model.encode([], convert_to_numpy=False).shape == (0, 32)


# ---- instructions


def test_the_folders_instructions_are_applied(model):
    assert close(model.encode_queries(TEXTS), model.encode(["who did " + text for text in TEXTS]))
    assert close(model.encode_corpus(TEXTS), model.encode(["story: " + text for text in TEXTS]))
    assert close(model.encode_queries("a")[None], model.encode(["who did a"]))
    assert not close(model.encode_queries(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize(
    ("arguments", "query_prefix", "passage_prefix"),
    [
        ({"query_instruction": ""}, "", "story: "),
        ({"passage_instruction": ""}, "who did ", ""),
        ({"query_instruction": "find: "}, "find: ", "story: "),
        ({"query_instruction": "find", "query_instruction_format": "{}:\\n{}"}, "find:\n", "story: "),
        ({"passage_instruction": "read", "passage_instruction_format": "<{}>{}"}, "who did ", "<read>"),
    ],
)
def test_instructions_given_win_over_the_folders(folder, model, arguments, query_prefix, passage_prefix):
    given = EmbeddingModel(folder, device="cpu", **arguments)
    assert close(given.encode_queries(TEXTS), model.encode([query_prefix + text for text in TEXTS]))
    assert close(given.encode_corpus(TEXTS), model.encode([passage_prefix + text for text in TEXTS]))
    assert close(given.encode(TEXTS), model.encode(TEXTS))


# ---- lengths and precision


def test_max_length_cuts(folder, model):
    assert model.max_length == 128
    text, words = "what is the list of the king", "what is the list".split()
    for length in (3, 4, 6):  # with [CLS] and [SEP]
        expected = model.encode(" ".join(words[: length - 2]))
        assert close(model.encode(text, max_length=length), expected)
        assert close(EmbeddingModel(folder, device="cpu", max_length=length).encode(text), expected)
    shorter = EmbeddingModel(folder, device="cpu", max_length=4)
    assert close(shorter.encode(text, max_length=6), model.encode("what is the list"))
    assert close(model.encode("a " * 126), model.encode("a " * 500)) and not close(
        model.encode("a"), model.encode("a a")
    )


def test_max_length_counts_the_instruction(model):
    assert close(model.encode_queries("king princess", max_length=5), model.encode("who did king"))


def test_a_max_length_above_the_models_positions_is_cut_to_them(folder, model):
    longer = EmbeddingModel(folder, device="cpu", max_length=500)
    for ours in (longer.encode(TEXTS), model.encode(TEXTS, max_length=129), longer.encode(TEXTS, max_length=10**6)):
        assert close(ours, model.encode(TEXTS, max_length=128))


def test_pooling_and_normalisation_given_win_over_the_folders(folder, model, tiny_model):
    plain = EmbeddingModel(folder, device="cpu", normalize=False).encode(TEXTS)
    norms = np.linalg.norm(plain, axis=1, keepdims=True)
    assert norms.min() > 1.5 and close(plain / norms, model.encode(TEXTS))
    cls = EmbeddingModel(folder, device="cpu", pooling="cls").encode(TEXTS)
    assert close(cls, EmbeddingModel(tiny_model, device="cpu").encode(TEXTS)) and not close(cls, model.encode(TEXTS))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float64", "auto"])
def test_dtype_is_that_of_the_weights_and_embeddings_are_float32(folder, model, dtype):
    other = EmbeddingModel(folder, device="cpu", dtype=dtype)
    expected = {"auto": torch.float32, "float64": torch.float64}.get(dtype, torch.bfloat16)
    assert {parameter.dtype for parameter in other.encoder.parameters()} == {expected}
    ours = other.encode(TEXTS)
    assert ours.dtype == np.float32 and (ours * model.encode(TEXTS)).sum(1).min() > 0.995


def test_flag_model_takes_flag_embeddings_arguments(folder, model):
    """In FlagEmbedding's order: normalize_embeddings, use_fp16, use_bf16, instruction, its format, devices, pooling_method."""
    flag = FlagModel(folder, False, False, False, "find", "{}: {}", "cpu", "cls")
    ours = EmbeddingModel(
        folder,
        device="cpu",
        normalize=False,
        pooling="cls",
        query_instruction="find",
        query_instruction_format="{}: {}",
    )
    assert close(flag.encode_queries(TEXTS), ours.encode_queries(TEXTS))
    assert close(flag.encode_corpus(TEXTS), ours.encode_corpus(TEXTS))
    silent = FlagModel(folder, use_fp16=False, devices="cpu", max_length=64)
    assert silent.max_length == 64 and silent.settings == model.settings
    assert close(silent.encode_queries(TEXTS[:5], batch_size=2), model.encode_queries(TEXTS[:5]))


# ---- memory, counts, stores


@pytest.fixture
def small_memory(model):
    """The CPU's allocator fails, as it does where there is too little, on micro-batches above 200 tokens."""
    seen = []

    def allocate(module, args, kwargs):
        size = kwargs["input_ids"].numel()
        if size > 200:
            torch.empty(2**50)
        seen.append(size)

    handle = model.encoder.register_forward_pre_hook(allocate, with_kwargs=True)
    yield seen
    handle.remove()


def test_out_of_memory_halves_the_budget_and_goes_on(model, one_by_one, small_memory, monkeypatch):
    set_window(monkeypatch, 100)
    counts, many = EncodingCounts(), TEXTS * 10
    with pytest.warns(RuntimeWarning, match=r"out of memory with [\d,]+ tokens in a micro-batch: at most") as warned:
        ours = encode_texts(model.encoder, model.tokenizer, many, max_length=128, counts=counts)
    assert close(ours, np.tile(one_by_one, (10, 1))) and max(small_memory) <= 200
    assert 100 <= counts.max_tokens <= 200 and len(warned) <= 4  # halved until it fits, and kept for all that follows
    assert counts.num_texts == len(many)


def test_other_errors_are_not_taken_for_a_small_memory(model, small_memory, monkeypatch):
    monkeypatch.setattr(torch, "empty", None)
    with pytest.raises(TypeError, match="not callable"):
        model.encode(TEXTS)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied")) and not is_out_of_memory(KeyError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    handle = model.encoder.register_forward_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    try:
        with pytest.raises(RuntimeError, match="inconsistent tensor size"):
            model.encode("a")
    finally:
        handle.remove()


def test_a_single_text_that_does_not_fit_is_an_error(model, small_memory, monkeypatch):
    handle = model.encoder.register_forward_pre_hook(lambda *_: torch.empty(2**50) and None)
    try:
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
            model.encode("a")
    finally:
        handle.remove()


def test_texts_that_are_cut_are_counted(folder):
    model = EmbeddingModel(folder, device="cpu")
    model.encode(["king " * number for number in range(20)], max_length=10)  # 8 words and two special tokens
    assert (model.counts.num_texts, model.counts.num_truncated) == (20, 11)
    assert model.counts.num_tokens == sum(min(number + 2, 10) for number in range(20))
    model.encode_queries(["king " * 6, "king " * 7], max_length=10)  # the instruction takes two
    assert (model.counts.num_texts, model.counts.num_truncated) == (22, 12)


@pytest.mark.parametrize("max_length", [3, 8, 128])
def test_tokens_are_those_of_the_tokenizer(model, real_model, max_length):
    real = load_encoder(real_model)[1]
    for tokenizer in (model.tokenizer, real):
        ours, num_truncated = tokenize_and_count(tokenizer, TEXTS, max_length)
        assert ours == tokenize(tokenizer, TEXTS, max_length)
        assert num_truncated == sum(len(ids) > max_length for ids in tokenize(tokenizer, TEXTS, 10_000))
    assert tokenize_and_count(real, [], 8) == ([], 0)


def test_a_saved_corpus_is_what_encoding_gives_and_is_not_encoded_again(folder, tmp_path, monkeypatch):
    set_window(monkeypatch, 8)
    model = EmbeddingModel(folder, device="cpu", passage_max_length=20)
    store = model.save_corpus(str(tmp_path / "s"), TEXTS, batch_size=3, shard_size=16)
    np.testing.assert_array_equal(store[:], model.encode_corpus(TEXTS, batch_size=3))
    encoded = model.counts.num_texts
    np.testing.assert_array_equal(model.save_corpus(str(tmp_path / "s"), TEXTS)[:], store[:])
    np.testing.assert_array_equal(model.open_corpus(str(tmp_path / "s"), iter(TEXTS))[:], store[:])
    assert model.counts.num_texts == encoded
    queries = model.save_corpus(str(tmp_path / "q"), TEXTS, kind="query", dtype="float16")
    np.testing.assert_array_equal(queries[:], model.encode_queries(TEXTS).astype(np.float16))
    with pytest.raises(ValueError, match="the maximum length in tokens: 20 in the store, 21 here"):
        model.open_corpus(str(tmp_path / "s"), TEXTS, max_length=21)
    with pytest.raises(ValueError, match="no texts"):
        model.save_corpus(str(tmp_path / "none"), [])


def test_an_error_while_encoding_leaves_whole_shards_alone(model, tmp_path):
    rows = []

    def fail(module, args, kwargs):
        rows.append(len(kwargs["input_ids"]))
        if sum(rows) > 20:
            raise KeyError("third")

    handle = model.encoder.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(KeyError, match="third"):
        model.save_corpus(str(tmp_path / "s"), TEXTS, shard_size=10, batch_size=10)
    handle.remove()
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == ["manifest.json", "shard-00000.npy", "shard-00001.npy"]
    assert len(model.save_corpus(str(tmp_path / "s"), TEXTS, batch_size=10)) == len(TEXTS)


def test_digests_are_of_all_weights_and_of_nothing_else(folder, model):
    again = EmbeddingModel(folder, device="cpu")
    assert weights_digest(again.encoder) == weights_digest(model.encoder)
    model.encode(TEXTS, max_length=7)  # sets the tokenizer's way of cutting
    assert tokenizer_digest(again.tokenizer) == tokenizer_digest(model.tokenizer)
    seen = {weights_digest(again.encoder)}
    for parameter in again.encoder.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        seen.add(weights_digest(again.encoder))
    assert len(seen) == 1 + len(list(again.encoder.parameters()))


# ---- prefetch


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("num_items", [0, 1, 2, 20])
def test_prefetch_keeps_order_and_every_item(num_items, depth):
    items = [None, 0, "", False, *range(20)][:num_items]
    assert list(prefetch(items, depth)) == list(prefetch(iter(items), depth)) == items


def test_prefetch_computes_ahead_in_another_thread():
    second = threading.Event()

    def items():
        yield threading.get_ident()
        second.set()
        yield threading.get_ident()

    ahead = prefetch(items())
    assert next(ahead) != threading.get_ident()
    assert second.wait(10)  # computed while nobody has asked for it


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_error_comes_where_its_item_would_have(at):
    def items():
        yield from range(at)
        raise KeyError("row 7")

    seen = []
    with pytest.raises(KeyError, match="row 7"):
        for item in prefetch(items()):
            seen.append(item)
    assert seen == list(range(at))


@pytest.mark.parametrize("how", ["close", "break", "error"])
def test_prefetch_stops_early_and_leaves_no_thread(how):
    produced, threads = [], threading.active_count()

    def endless():
        for number in itertools.count():
            produced.append(number)
            yield number

    ahead = prefetch(endless(), depth=2)
    assert [next(ahead), next(ahead)] == [0, 1]
    if how == "close":
        ahead.close()
    elif how == "break":
        for _ in ahead:
            break
        del ahead
    else:
        with pytest.raises(ZeroDivisionError):
            for _ in ahead:
                1 / 0  # noqa: B018
        del ahead
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads and len(produced) <= 6
    count = len(produced)
    time.sleep(0.05)
    assert len(produced) == count


def test_what_was_planned_ahead_is_dropped_on_stopping():
    produced = []

    def slow():
        for number in range(50):
            time.sleep(0.02)
            produced.append(number)
            yield number

    ahead = prefetch(slow(), depth=50)
    assert next(ahead) == 0
    ahead.close()
    assert len(produced) < 25


def test_nothing_is_computed_before_the_first_item_is_asked_for():
    produced = []
    prefetch(produced.append(number) or number for number in range(3))
    time.sleep(0.05)
    assert produced == []


def test_lengths_that_leave_special_tokens_alone_are_refused(tiny_model: str, tmp_path: Path) -> None:
    """By the argument's name, and before weights are loaded where the constructor is told."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights")
    for name in ("max_length", "query_max_length", "passage_max_length"):
        for kind in (EmbeddingModel, FlagModel):
            with pytest.raises(ValueError, match=f"^{name} is 2: .* 2 special tokens .* at least 3$"):
                kind(str(folder), **{name: 2})
    model = EmbeddingModel(tiny_model, device="cpu", max_length=3)
    assert not close(model.encode("king"), model.encode("list"))
    for call in (model.encode, model.encode_queries, model.encode_corpus):
        for length in (0, 1, 2):
            with pytest.raises(ValueError, match=f"^max_length is {length}: "):
                call(["king"], max_length=length)


def test_a_model_may_be_named_by_a_path(tiny_model: str) -> None:
    np.testing.assert_array_equal(
        EmbeddingModel(Path(tiny_model)).encode(TEXTS), EmbeddingModel(tiny_model).encode(TEXTS)
    )


def test_a_precision_that_torch_does_not_know_is_refused(tiny_model: str) -> None:
    for dtype in "foo", "nn", "int8":
        with pytest.raises(ValueError, match=f"dtype '{dtype}' is not float32"):
            EmbeddingModel(tiny_model, dtype=dtype)
