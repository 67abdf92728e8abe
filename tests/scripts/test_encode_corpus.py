"""scripts/encode_corpus.py: real runs that are killed, continued and shared, and what their stores are worth."""

import gzip
import hashlib
import json
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.models import build_tiny_model
from helpers.repo import REPO
from helpers.warm_start import Job

from bge_accel import EmbeddingModel
from bge_accel.encoding.store import EmbeddingStore, ShardWriter, digest_texts, prepare_store, read_manifest
from bge_accel.models.encoder import load_encoder, save_encoder

SCRIPT = REPO / "scripts" / "encode_corpus.py"
NUM_TEXTS = 6000
TEXTS = [f"{'value ' * (number * 7 % 23)}string {number}" for number in range(NUM_TEXTS)]
# The instruction is two tokens, [CLS] and [SEP] two more, and every digit of the number one.
NUM_LONG = sum(number * 7 % 23 + 5 + len(str(number)) > 20 for number in range(NUM_TEXTS))


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """The tiny model with instructions, and a corpus."""
    path = tmp_path_factory.mktemp("encode")
    encoder, tokenizer, settings = load_encoder(tiny_model, query_prefix="who did ", passage_prefix="story: ")
    save_encoder(str(path / "model"), encoder, tokenizer, settings)
    with open(path / "corpus.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": f"p{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return EmbeddingModel(str(folder / "model"), device="cpu")


def start(folder, output_dir, *args, processes=1, cwd=None, corpus="corpus.jsonl", model="model", precision="fp32"):
    return Job(
        *("--model_name_or_path", folder / model, "--corpus_data", folder / corpus, "--output_dir", output_dir),
        *("--precision", precision, *args),
        cwd=cwd or output_dir.parent,
        script=SCRIPT,
        processes=processes,
    )


def test_bfloat16_where_the_processor_has_none(folder, model, tmp_path):
    """A processor of 2015, as oneDNN plays it: it emulates, and the rows are nearly those of float32."""
    flags = ("--model_name_or_path", folder / "model", "--corpus_data", folder / "corpus.jsonl", "--precision", "bf16")
    env = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    said = Job(*flags, "--output_dir", "store", "--max_length", 20, cwd=tmp_path, script=SCRIPT, env=env).ends()
    assert "this CPU has to emulate bfloat16" in said
    rows = EmbeddingStore(str(tmp_path / "store"))[:50]
    assert (rows * model.encode_corpus(TEXTS[:50], max_length=20)).sum(1).min() > 0.99


def digests(store):
    """What a folder holds, file by file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(store).iterdir())
        if path.name != ".lock"
    }


def shards(store):
    return list(store.glob("shard-*.npy"))


SMALL = ("--max_length", 20, "--shard_size", 64)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """The store of one run that nothing disturbed."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    said = start(folder, store, *SMALL).ends()
    assert "6,000 texts" in said and f"{NUM_LONG:,} texts were longer than 20 tokens and were cut" in said
    assert "tokens/s" in said and len(shards(store)) == 94
    return store


def test_the_store_holds_what_the_model_gives(folder, model, undisturbed):
    store = model.open_corpus(str(undisturbed), TEXTS, max_length=20)
    expected = model.encode_corpus(TEXTS, max_length=20)
    assert store.shape == (NUM_TEXTS, 32) and np.abs(store[:] - expected).max() < 1e-6
    assert read_manifest(str(undisturbed)).settings["prefix"] == "story: "


def test_in_float32_with_whole_windows_to_the_bit(folder, model, tmp_path):
    """A window sorts 4,096 texts, so a shard of so many is cut into the same micro-batches."""
    start(folder, tmp_path / "store").ends()
    store = model.open_corpus(str(tmp_path / "store"), TEXTS)
    assert [len(store.shard(0)), len(store.shard(1))] == [4096, NUM_TEXTS - 4096]
    np.testing.assert_array_equal(store[:], model.encode_corpus(TEXTS))
    saved = model.save_corpus(str(tmp_path / "saved"), TEXTS)
    np.testing.assert_array_equal(saved[:], store[:])
    assert digests(tmp_path / "saved").keys() == digests(tmp_path / "store").keys()


@pytest.mark.parametrize("processes", [(1, 2), (2, 1)])
def test_killed_and_resumed_gives_identical_bytes(folder, undisturbed, tmp_path, processes):
    """Killed twice at arbitrary points; shards that were there are not written again."""
    store, kept = tmp_path / "store", {}
    for count in (5, 40):
        job = start(folder, store, *SMALL, processes=processes[0])
        job.wait_until(lambda count=count: len(shards(store)) >= count)
        job.kill()
        now = {path.name: path.stat().st_mtime_ns for path in shards(store)}
        assert count <= len(now) < 90 and kept.items() <= now.items()
        kept = now
    with pytest.raises(ValueError, match="is not complete"):
        EmbeddingStore(str(store))
    said = start(folder, store, *SMALL, processes=processes[1]).ends()
    assert "are in" in said and "already" in said
    assert digests(store) == digests(undisturbed)
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in shards(store)}.items()


def test_two_processes_share_the_shards(folder, undisturbed, tmp_path):
    said = start(folder, tmp_path / "store", *SMALL, processes=2).ends()
    assert digests(tmp_path / "store") == digests(undisturbed)
    (line,) = [line for line in said.splitlines() if line.startswith("texts of each process: ")]
    shares = [int(part.split(" in ")[0].replace(",", "")) for part in line.split(": ")[1].split(", ") if " in " in part]
    assert said.count("6,000 texts") == 2 and f"{NUM_LONG:,} texts were longer" in said  # together, told once
    assert len(shares) == 2 and min(shares) > 0, line


def test_a_slow_process_takes_less(folder, undisturbed, tmp_path):
    """No fixed split: while one process is stopped, the other does the rest."""
    store = tmp_path / "store"
    job = start(folder, store, *SMALL, processes=2)
    job.wait_until(lambda: len(shards(store)) >= 3)
    job.send(signal.SIGSTOP, ranks=(1,))
    job.wait_until(lambda: len(shards(store)) >= 91)  # all but what the stopped one has taken
    job.send(signal.SIGCONT, ranks=(1,))
    job.ends()
    assert digests(store) == digests(undisturbed)


def test_complete_already(folder, undisturbed):
    before = digests(undisturbed)
    said = start(folder, undisturbed, *SMALL).ends()
    assert "6,000 texts are in" in said and "encoded 0 texts" in said and digests(undisturbed) == before


# ---- refusals


@pytest.fixture(scope="module")
def other(folder, tmp_path_factory):
    """One changed input for every kind of difference: (changed arguments of `start`, what the refusal says)."""
    build_tiny_model(folder / "weights", seed=1)
    encoder, tokenizer, settings = load_encoder(str(folder / "model"))
    last = next(parameter for name, parameter in encoder.named_parameters() if "layer.1.output.dense.bias" in name)
    last.data[-1] += 1e-6  # a single number of a single tensor
    save_encoder(str(folder / "one_number"), encoder, tokenizer, settings)
    encoder, tokenizer, settings = load_encoder(str(folder / "model"))
    from tokenizers.normalizers import BertNormalizer

    tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)
    save_encoder(str(folder / "tokenizer"), encoder, tokenizer, settings)
    for name, texts in [("one_text", [*TEXTS[:-1], "another"]), ("order", TEXTS[::-1]), ("fewer", TEXTS[:-1])]:
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return {
        "weights": ({"model": "weights"}, "the model's weights"),
        "one number of the weights": ({"model": "one_number"}, "the model's weights"),
        "tokenizer": ({"model": "tokenizer"}, "the tokenizer (digest)"),
        "one text": ({"corpus": "one_text.jsonl"}, "the texts (digest)"),
        "order": ({"corpus": "order.jsonl"}, "the texts (digest)"),
        "fewer texts": ({"corpus": "fewer.jsonl"}, "the number of texts: 6000 in the store, 5999 here"),
        "max_length": ({"args": ("--max_length", 19)}, "the maximum length in tokens: 20 in the store, 19 here"),
        "instruction": ({"args": ("--passage_instruction_for_retrieval", "x: ")}, 'text: "story: " in the store, "x: "'),
        "kind": ({"args": ("--kind", "query")}, 'text: "story: " in the store, "who did " here'),
        "pooling": ({"args": ("--pooling_method", "mean")}, 'pooling: "cls" in the store, "mean" here'),
        "normalisation": ({"args": ("--normalize_embeddings", "False")}, "normalisation: true in the store, false here"),
        "precision": ({"precision": "bf16"}, 'computed in: "float32" in the store, "bfloat16" here'),
        "dtype": ({"args": ("--dtype", "float16")}, 'stored in: "float32" in the store, "float16" here'),
    }  # fmt: skip


DIFFERENCES = (
    "weights/one number of the weights/tokenizer/one text/order/fewer texts/max_length/instruction/kind/pooling/"
    "normalisation/precision/dtype"
).split("/")


def test_every_difference_is_tried(other):
    assert list(other) == DIFFERENCES


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_store_of_something_else_is_refused_and_left_alone(folder, undisturbed, other, tmp_path, what):
    changed, expected = other[what]
    before = digests(undisturbed)
    said = start(
        folder, undisturbed, *SMALL, *changed.get("args", ()), cwd=tmp_path, **{k: v for k, v in changed.items() if k != "args"}
    ).ends(2)  # fmt: skip
    assert expected in said and "Traceback" not in said and "remove this one to encode afresh" in said
    assert digests(undisturbed) == before


# ---- inputs, precisions, memory


def test_queries_titles_and_compressed_files(folder, model, tmp_path):
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"query": text, "positive": []}) + "\n" for text in TEXTS[:50])
    start(tmp_path, tmp_path / "queries", "--kind", "query", corpus="q.jsonl.gz", model=folder / "model").ends()
    queries = model.open_corpus(str(tmp_path / "queries"), TEXTS[:50], kind="query")
    np.testing.assert_array_equal(queries[:], model.encode_queries(TEXTS[:50]))
    with pytest.raises(ValueError, match='text: "who did " in the store, "story: " here'):
        model.open_corpus(str(tmp_path / "queries"), TEXTS[:50])

    (tmp_path / "c.json").write_text(json.dumps([{"title": "a king", "text": text} for text in TEXTS[:9]]))
    start(tmp_path, tmp_path / "titles", "--dtype", "float16", corpus="c.json", model=folder / "model").ends()
    titled = [f"a king {text}" for text in TEXTS[:9]]
    store = model.open_corpus(str(tmp_path / "titles"), titled)
    assert store.dtype == np.float16
    np.testing.assert_array_equal(store[:], model.encode_corpus(titled).astype(np.float16))


@pytest.mark.parametrize(
    ("rows", "args", "expected"),
    [
        ('{"text": "a"}\n{"text": ""}\n{"txt": "b"}\n', (), ["2 faults", 'c.jsonl:2: "text" is empty', "c.jsonl:3:"]),
        ('{"text": "a"}\n', ("--kind", "query", "--max_length", "0"), ["--max_length is 0"]),
        ('{"text": "a"}\n', ("--query_instruction_for_retrieval", "x"), ["has no effect with --kind passage"]),
        ('{"text": "a"}\n', ("--output_dir", "c.jsonl"), ["--output_dir c.jsonl is a file; name a folder"]),
        ('{"text": "a"}\n', ("--output_dir", "."), ["is not empty and holds no embedding store"]),
        ('{"text": "a"}\n', ("--precision", "fp16"), ["fp16 needs a GPU"]),
        ('{"text": "a"}\n', ("--model_name_or_path", "./no"), ["--model_name_or_path ./no is not a folder"]),
    ],
)
def test_mistakes(folder, tmp_path, rows, args, expected):
    (tmp_path / "c.jsonl").write_text(rows)
    said = start(tmp_path, tmp_path / "store", *args, corpus="c.jsonl", model=folder / "model").ends(2)
    assert all(part in said for part in expected) and "Traceback" not in said and not shards(tmp_path)


def test_another_run_in_the_same_folder_is_refused(folder, tmp_path):
    store = tmp_path / "store"
    first = start(folder, store, *SMALL)
    first.wait_until(lambda: len(shards(store)) >= 1)
    first.send(signal.SIGSTOP)
    assert "another run is writing into" in start(folder, store, *SMALL).ends(2)
    first.send(signal.SIGCONT)
    first.ends()
    EmbeddingStore(str(store))


def peak_of(job):
    """Most anonymous memory of a job's process, in MB."""
    most = 0

    def watch():
        nonlocal most
        while job.is_alive:
            try:
                status = Path(f"/proc/{job.processes[0].pid}/status").read_text()
            except OSError:
                return
            most = max([most, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    job.ends()
    thread.join()
    return most / 1024


def test_memory_does_not_grow_with_the_corpus(folder, model, tmp_path):
    """Of 100,000 texts all shards but the last are there: every text is read twice, and none is kept."""
    peaks = {}
    for count in (1000, 100_000):
        texts = [f"{number} {'story ' * 100}" for number in range(count)]
        (tmp_path / "c.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
        wanted = model.describe_store(*digest_texts(texts), max_length=16, shard_size=200)
        store = tmp_path / str(count)
        for shard in prepare_store(str(store), wanted)[1][:-1]:
            writer = ShardWriter(str(store), wanted, shard)
            writer.add(np.ones((200, 32), dtype=np.float32))
            writer.finish()
        size = sum(map(len, texts)) / 2**20
        del texts
        job = start(tmp_path, store, "--max_length", 16, corpus="c.jsonl", model=folder / "model")
        peaks[count] = peak_of(job)
        assert "encoded 200 texts" in job.text
    assert size > 50 and peaks[100_000] - peaks[1000] < 20, peaks


@pytest.mark.slow
@pytest.mark.exhaustive
def test_memory_of_encoding_does_not_grow_with_the_corpus(folder, tmp_path):
    peaks = {}
    for count in (10_000, 200_000):
        (tmp_path / "c.jsonl").write_text(
            "".join(f'{{"text": "{number} {"story " * 20}"}}\n' for number in range(count))
        )
        peaks[count] = peak_of(
            start(tmp_path, tmp_path / str(count), "--max_length", 8, corpus="c.jsonl", model=folder / "model")
        )
        assert len(EmbeddingStore(str(tmp_path / str(count)))) == count
    assert peaks[200_000] - peaks[10_000] < 25, peaks  # the texts are 27 MB, with their objects 38


@pytest.mark.slow
def test_as_a_user_starts_it(folder, undisturbed, run_script, tmp_path):
    """By torchrun, in two processes."""
    args = ["--model_name_or_path", folder / "model", "--corpus_data", folder / "corpus.jsonl", "--precision", "fp32"]
    done = run_script("encode_corpus.py", *args, "--output_dir", "store", *SMALL, processes=2, cold=True)
    assert "wrote store: 6,000 x 32 float32" in done.stdout and "texts of each process" in done.stdout
    assert digests(tmp_path / "store") == digests(undisturbed)
