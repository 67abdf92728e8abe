"""Whatever bytes a user's file holds, a reader reads it or says in a ValueError what is wrong.

`FUZZ_EXAMPLES=100000 pytest tests/test_fuzz.py -k gzip` tries as many for one reader; by default there are few.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from backports import zstd
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from bge_accel.config import option, parse_config
from bge_accel.data.reading import check_training_row, read_rows
from bge_accel.data.rows import TrainingRows
from bge_accel.data.sources import read_sources
from bge_accel.data.streaming import RowStream
from bge_accel.encoding.store import EmbeddingStore, Manifest, ShardWriter, prepare_store
from bge_accel.evaluation.search import load_index
from bge_accel.evaluation.sets import read_corpus, read_evaluation_data, read_qrels, read_queries
from bge_accel.evaluation.trec import read_run
from bge_accel.files.faults import Faults
from bge_accel.files.parsing import load_json, read_front_matter
from bge_accel.merging.plan import MergeModel, check_models, module_folders, read_json
from bge_accel.mining.pool import read_pool_texts
from bge_accel.models.card import license_of
from bge_accel.models.settings import read_settings
from bge_accel.models.tensor_files import INDEX, SINGLE, Layout, TensorFiles, write_safetensors
from bge_accel.training.checkpoint import read_optimizer, read_run_state, set_random_state
from bge_accel.training.manifest import STATE, what_is_damaged, write_manifest
from bge_accel.training.sharding import read_deepspeed_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import report

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 200))
A_TURN = 25  # mutations that Hypothesis asks for at once: its own work for each would be most of the time
ROWS = [{"query": "q", "pos": ["a", "b"], "neg": ["c"], "pos_scores": [1, 0.5], "neg_scores": [0], "prompt": "p: "}] * 3
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
WEIGHTS = {"a.weight": Layout(torch.float32, (2, 3)), "b": Layout(torch.int64, (2,))}


def tensor_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, SINGLE)
        write_safetensors(path, WEIGHTS, [torch.zeros(6), torch.zeros(2, dtype=torch.int64)])
        return Path(path).read_bytes()


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


# ---- mutations

HUGE = [2**31, 2**63, 2**64, -1, -(2**63), 10**30, 10**400, 1e308, float("nan"), float("inf"), 0, True, None, 0.5]
NASTY = [
    "../../etc/passwd", "/etc/passwd", "..", ".", "", "a/../../b", "\0", "\ud800", "x" * 5000, "__class__", "a@10", "1_0",
]  # fmt: skip
WILD = [
    b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, b'{"format": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"\0" * 64, b"", b"null",
    b'{"a": 1, "a": 2}', b'"\\ud800"', b"[]", b"{}", b"\xef\xbb\xbf", b"[" * 300 + b"]" * 300, b"NaN", b"-" * 2000, b"? " * 500,
    b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (98 + i, 98 + i, 97 + i, 97 + i) for i in range(24)),
    b"&a [*a]", b"- &a {path: x, name: *a}", b"!!timestamp x", b"!!bool x", b"!!int ''", b"2001-99-99", b"<<: 1", b"? [a]\n: b",
    b"!!python/object/apply:os.system [id]", b'- path: "\\ud800*"', b"- {path: x, weight: .nan}",
]  # fmt: skip


def random_text(rng: Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(NASTY)
    return "".join(chr(rng.randrange(rng.choice([128, 0xD800, 0x110000]))) for _ in range(rng.randrange(9)))


def random_value(rng: Random, depth: int = 3) -> Any:
    kind = rng.randrange(6 if depth else 4)
    if kind == 0:
        return rng.choice(HUGE)
    if kind == 1:
        return (
            rng.randint(-10, 2 ** rng.randrange(1, 70))
            if rng.random() < 0.5
            else rng.gauss(0, 1) * 10 ** rng.randrange(9)
        )
    if kind <= 3:
        return random_text(rng)
    inside = [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return inside if kind == 4 else {random_text(rng): value for value in inside}


def mutated_bytes(rng: Random, valid: bytes) -> bytes:
    """A valid file with bytes changed, cut out, repeated or cut off, or no such file at all."""
    kind = rng.randrange(24)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        return rng.choice(WILD)
    raw = bytearray(valid)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(len(raw), 1))
        if kind < 8 and raw:
            raw[at] = rng.randrange(256)
        elif kind < 14:
            raw[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        elif kind < 17:
            del raw[at:]
        elif kind < 20:
            raw[at:at] = rng.choice(WILD)[:40]
        else:
            raw[at:at] = raw[at : at + 40]
    return bytes(raw)


def mutated_value(rng: Random, valid: Any) -> Any:
    """A value like JSON's with some part of it replaced, left out, doubled or deeply nested."""
    value = json.loads(json.dumps(valid))
    for _ in range(rng.randint(1, 3)):
        places = []

        def walk(inner: Any, places: list = places) -> None:
            for key in list(inner) if isinstance(inner, dict) else range(min(len(inner), 20)):
                places.append((inner, key))
                if isinstance(inner[key], dict | list):
                    walk(inner[key])

        walk(value)
        if not places:
            break
        inner, key = rng.choice(places)
        what = rng.randrange(14)
        if what < 9:
            inner[key] = random_value(rng)
        elif what < 11:
            del inner[key]
        elif what < 13 and isinstance(inner, list):
            inner.append(inner[key])
        elif what < 13:
            inner[rng.choice(NASTY)] = inner[key]
        else:
            for _ in range(150):
                inner[key] = [inner[key]]
    return value


def dump(value) -> bytes:
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(4300)


# ---- readers: what is read, from a folder in which the mutated file stands


def read_training(path: str) -> None:
    faults = Faults()
    for where, _, row in read_rows(path, faults):
        for what in check_training_row(row):
            faults.add(where, what)
    faults.raise_if_any()


def read_cached(path: str) -> None:
    rows = TrainingRows([path], cache_folder=os.path.join(os.path.dirname(path), "cache"))
    rows.check_negatives()
    [rows[i] for i in range(len(rows))]


def read_streamed(path: str) -> None:
    RowStream([path], seed=0, buffer_size=4).take(5)


def read_with(function, *, is_several=False, **named):
    def read(path: str) -> None:
        faults = Faults()
        function([path] if is_several else path, faults, **named)
        faults.raise_if_any()

    return read


def read_pool(path: str) -> None:
    faults = Faults()
    list(read_pool_texts([path], faults))
    faults.raise_if_any()


def read_judged(path: str) -> None:
    folder = os.path.dirname(path)
    for name, row in (("corpus.jsonl", {"id": "p1", "text": "x"}), ("queries.jsonl", {"id": "q1", "text": "y"})):
        Path(folder, name).write_text(json.dumps(row))
    read_evaluation_data([f"{folder}/corpus.jsonl"], [f"{folder}/queries.jsonl"], path)


@dataclass(kw_only=True)
class Settings:
    """What a YAML file may set."""

    steps: int = option(1, "a number")
    rate: float | None = option(None, "a number")
    names: list[str] = option([], "texts")
    is_on: bool = option(False, "a truth value")


def read_yaml(path: str) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse_config(Settings, ["--config", path])
    except SystemExit as end:
        assert end.code == 2
        raise ValueError(said.getvalue()) from None


CARD = b"---\nlicense: other\nlicense_name: x\n---\n# A model\n"


def read_card(path: str) -> None:
    found = license_of(os.path.dirname(path))
    assert all(isinstance(value, str) for value in found.values())
    read_front_matter(path)


MANIFEST = Manifest(num_texts=3, dim=2, dtype="float32", shard_size=2, settings={"prefix": "q: "}, model="m")


def read_store(path: str) -> None:
    store = EmbeddingStore(os.path.dirname(path))
    np.asarray(store)


def write_shards(folder: str) -> None:
    prepare_store(folder, MANIFEST)
    for shard in range(MANIFEST.num_shards):
        writer = ShardWriter(folder, MANIFEST, shard)
        start, stop = MANIFEST.rows_of(shard)
        writer.add(np.zeros((stop - start, 2), dtype=np.float32))
        writer.finish()


def read_tensors(path: str) -> None:
    files = TensorFiles(os.path.dirname(path))
    try:
        for name, layout in files.tensors.items():
            files.read(name, 0, torch.empty(layout.num_bytes, dtype=torch.uint8))
    finally:
        files.close()


def write_weights(folder: str) -> None:
    Path(folder, "model-1.safetensors").write_bytes(tensor_bytes())


STATE_VALUE = {
    "step": 3, "batches": 3, "skipped": 0, "saved_epoch": 0, "num_processes": 1, "position": {"seed": 1}, "settings": {},
    "best": None, "scaler": None, "activation_bytes": 1.0, "bytes_per_token": None, "streams": [[]],
    "random": [{"torch": [1] * 5056, "cuda": None, "numpy": ["MT19937", [1] * 624, 1, 0, 0.0], "python": [3, [1] * 625, None]}],
}  # fmt: skip


def read_training_state(path: str) -> None:
    state = read_run_state(os.path.dirname(os.path.dirname(path)))
    before = np.random.get_state(), torch.get_rng_state()
    try:
        set_random_state(state["random"][0], torch.device("cpu"))
    finally:
        np.random.set_state(before[0])
        torch.set_rng_state(before[1])


def read_checkpoint_manifest(path: str) -> None:
    damage = what_is_damaged(os.path.dirname(os.path.dirname(path)))
    if damage is not None:
        raise ValueError(damage)


def write_checkpoint(folder: str) -> None:
    os.makedirs(os.path.join(folder, STATE), exist_ok=True)
    Path(folder, "model.bin").write_bytes(b"x")
    if not os.path.exists(os.path.join(folder, STATE, "manifest.json")):
        write_manifest(folder)


SHA256 = hashlib.sha256(b"x").hexdigest()


def read_stream_state(path: str) -> None:
    folder = os.path.dirname(path)
    rows = os.path.join(folder, "rows.jsonl")
    Path(rows).write_bytes(LINES)
    state = load_json(path)
    if state is not None:
        RowStream([rows], seed=0, buffer_size=2, state=state).take(2)


def stream_state() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        rows = os.path.join(folder, "rows.jsonl")
        Path(rows).write_bytes(LINES)
        stream = RowStream([rows], seed=0, buffer_size=2)
        stream.take(1)
        return stream.state_dict()


MODULES = [{"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
           for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])]  # fmt: skip


def read_modules(path: str) -> None:
    folder = os.path.dirname(path)
    pooling = os.path.join(folder, "1_Pooling")
    os.makedirs(pooling, exist_ok=True)
    Path(pooling, "config.json").write_text('{"pooling_mode_cls_token": true}')
    read_settings(folder)
    module_folders(folder)


def read_pooling(path: str) -> None:
    folder = os.path.dirname(os.path.dirname(path))
    Path(folder, "modules.json").write_text(json.dumps(MODULES))
    read_settings(folder)


def read_prompts(path: str) -> None:
    folder = os.path.dirname(path)
    Path(folder, "modules.json").write_text(json.dumps(MODULES[:1]))
    read_settings(folder)


def plan_merge(path: str) -> None:
    """The mutated config.json or tokenizer.json is the second model's."""
    folder, name = os.path.split(path)
    first = os.path.join(folder, "first")
    os.makedirs(first, exist_ok=True)
    for where in (first, folder):
        Path(where, SINGLE).write_bytes(WEIGHTS_BYTES)
    Path(first, "config.json").write_bytes(dump(CONFIG))
    Path(first, "tokenizer.json").write_bytes(dump(TOKENIZER))
    models = []
    try:
        for where in (first, folder):
            config = read_json(where, "config.json")
            if name == "tokenizer.json":
                config = CONFIG
            if not isinstance(config, dict):
                raise ValueError("no config.json")
            models.append(MergeModel(where, where, TensorFiles(where), config))
        check_models(models, "encoder")
    finally:
        for model in models:
            model.files.close()


WEIGHTS_BYTES = tensor_bytes()
CONFIG = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 4, "dropout": 0.1}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "[X]"}]}
RESULT = {
    "metrics": {"nDCG@1": 0.5, "nDCG@10": 0.6, "Recall@1": 0.1, "Recall@10": 0.2},
    "samples": [{"query": "q", "passages": [{"score": 1.0, "text": "t", "is_relevant": True}]}],
    "score_histogram": {"edges": [0.0, 0.5, 1.0], "positives": [1, 2], "negatives": [0, 1]},
    "counts": {"judged_queries": 2, "positives": 3, "corpus": 4}, "config": {"a": 1}, "versions": {"torch": "2"},
    "model": {"name": "m"},
}  # fmt: skip
ABOUT = {"num_passages": 3, "dim": 2, "index": "Flat"}
QRELS, RUN = b"query-id\tcorpus-id\tscore\nq1\tp1\t1\nq1\tp2\t0\n", b"q1 Q0 p1 1 0.5 run\nq1 Q0 p2 2 0.4 run\n"
CORPUS = [{"id": "a", "text": "x", "title": "t"}, {"id": 2, "content": "y"}]
QUERIES = [{"id": "a", "query": "x", "positive": ["y"]}]
YAML = b"steps: 3\nrate: 1e-5\nnames: [a, b]\nis_on: yes\n"
SOURCES = b"sources:\n- {path: a.jsonl, weight: 2, name: a}\n- path: [b.jsonl]\n  weight: 1\n  train_group_size: 3\n"


def read_saved_index(path: str) -> None:
    load_index(path.removesuffix(".json"), ABOUT)


def rows_of(value) -> bytes:
    rows = value if isinstance(value, list) else [value]
    return b"".join(dump(row) + b"\n" for row in rows)


# name: (file, bytes of a valid one, value to mutate or None, from value to bytes, reader, what stands beside it)
READERS = {
    "jsonl": ("a.jsonl", LINES, ROWS, rows_of, read_training, None),
    "json": ("a.json", dump(ROWS), ROWS, dump, read_training, None),
    "gzip": ("a.jsonl.gz", gzip.compress(LINES), ROWS, lambda v: gzip.compress(rows_of(v), 1), read_training, None),
    "zstd": ("a.jsonl.zst", zstd.compress(LINES), ROWS, lambda v: zstd.compress(rows_of(v)), read_training, None),
    "parquet": ("a.parquet", parquet_bytes(), None, None, read_training, None),
    "cached": ("a.jsonl", LINES, ROWS, rows_of, read_cached, None),
    "stream": ("a.jsonl", LINES, ROWS, rows_of, read_streamed, None),
    "stream_gzip": ("a.json.gz", gzip.compress(dump(ROWS)), ROWS, lambda v: gzip.compress(dump(v), 1), read_streamed, None),
    "stream_parquet": ("a.parquet", parquet_bytes(), None, None, read_streamed, None),
    "stream_state": ("s.json", dump(stream_state()), stream_state(), dump, read_stream_state, None),
    "pool": ("a.jsonl", rows_of(CORPUS), CORPUS, rows_of, read_pool, None),
    "corpus": ("a.jsonl", rows_of(CORPUS), CORPUS, rows_of, read_with(read_corpus, is_several=True), None),
    "queries": ("a.jsonl", rows_of(QUERIES), QUERIES, rows_of, read_with(read_queries, is_several=True, need_positives=True), None),
    "qrels": ("a.tsv", QRELS, None, None, read_with(read_qrels), None),
    "qrels_gzip": ("a.tsv.gz", gzip.compress(QRELS), None, None, read_with(read_qrels), None),
    "judged": ("a.tsv", QRELS, None, None, read_judged, None),
    "run": ("a.run", RUN, None, None, read_with(read_run), None),
    "run_zstd": ("a.run.zst", zstd.compress(RUN), None, None, read_with(read_run), None),
    "yaml": ("run.yaml", YAML, {"steps": 3, "rate": 1e-5, "names": ["a"], "is_on": True}, dump, read_yaml, None),
    "card": ("README.md", CARD, {"license": "other", "license_link": "x"}, lambda v: b"---\n" + dump(v) + b"\n---\n", read_card, None),
    "sources": ("s.yaml", SOURCES, [{"path": "a", "weight": 2}, {"path": ["b"], "weight": 1}], dump, read_sources, None),
    "store": ("manifest.json", MANIFEST.to_json().encode(), json.loads(MANIFEST.to_json()), dump, read_store, write_shards),
    "index": ("x.json", dump(ABOUT), ABOUT, dump, read_saved_index, None),
    "safetensors": (SINGLE, WEIGHTS_BYTES, None, None, read_tensors, None),
    "header": (SINGLE, WEIGHTS_BYTES, json.loads(WEIGHTS_BYTES[8 : 8 + int.from_bytes(WEIGHTS_BYTES[:8], "little")]),
               lambda v: len(dump(v)).to_bytes(8, "little") + dump(v) + bytes(40), read_tensors, None),
    "shards": (INDEX, b"{}", {"metadata": {}, "weight_map": dict.fromkeys(WEIGHTS, "model-1.safetensors")}, dump,
               read_tensors, write_weights),
    "checkpoint": (f"{STATE}/manifest.json", b'{"files": {}}', {"files": {"model.bin": {"bytes": 1, "sha256": SHA256}}}, dump,
                   read_checkpoint_manifest, write_checkpoint),
    "state": (f"{STATE}/state.json", dump(STATE_VALUE), STATE_VALUE, dump, read_training_state, None),
    "optimizer": (f"{STATE}/optimizer.safetensors", WEIGHTS_BYTES, None, None,
                  lambda path: read_optimizer(os.path.dirname(os.path.dirname(path))), None),
    "modules": ("modules.json", dump(MODULES), MODULES, dump, read_modules, None),
    "pooling": ("1_Pooling/config.json", b"{}", {"pooling_mode_cls_token": True, "include_prompt": True}, dump, read_pooling, None),
    "prompts": ("config_sentence_transformers.json", b"{}", {"prompts": {"query": "q"}, "default_prompt_name": "query"}, dump,
                read_prompts, None),
    "merge_config": ("config.json", dump(CONFIG), CONFIG, dump, plan_merge, None),
    "merge_tokenizer": ("tokenizer.json", dump(TOKENIZER), TOKENIZER, dump, plan_merge, None),
    "result": ("r.json", dump(RESULT), RESULT, dump, report.read_result, None),
    "train_log": ("train_log.jsonl", rows_of({"step": 1, "loss": 0.5}), [{"step": 1, "loss": 0.5}], rows_of,
                  lambda path: report.read_log(os.path.dirname(path)), None),
    "run_config": ("run_config.yaml", YAML, {"train_data": ["a.jsonl"]}, dump,
                   lambda path: report.read_samples(report.read_settings(os.path.dirname(path))), None),
    "deepspeed": ("ds.json", b"{}", {"zero_optimization": {"stage": 3}}, dump, read_deepspeed_config, None),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_it_is_read_or_refused(name: str) -> None:
    file, valid, value, encode, read, beside = READERS[name]

    def mutated(rng: Random) -> bytes:
        kind = rng.randrange(3) if value is not None else 0
        raw = encode(mutated_value(rng, value)) if kind else valid
        return raw if kind == 1 else mutated_bytes(rng, raw)

    fast = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        inside = os.path.join(folder, "inside")
        path = os.path.join(inside, file)
        os.makedirs(os.path.dirname(path))
        if beside is not None:
            beside(inside)

        @settings(
            max_examples=max(EXAMPLES // A_TURN, 1), database=None, deadline=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )  # fmt: skip
        @given(st.randoms(use_true_random=True))
        def run(rng: Random) -> None:
            for _ in range(A_TURN):
                raw = mutated(rng)
                Path(path).write_bytes(raw)
                try:
                    read(path)
                except ValueError as error:
                    assert str(error).strip(), f"an error without a word at {raw!r}"
                    assert type(error) is ValueError or type(error).__name__ == "BrokenFileError", (
                        f"{error!r} at {raw!r}"
                    )
                    named = inside in str(error) or os.path.basename(file) in str(error) or name in UNNAMED
                    assert named, f"{str(error)[:300]} at {raw!r}"
                except Exception:
                    note(f"at {raw!r}")
                    raise
                finally:
                    shutil.rmtree(os.path.join(inside, "cache"), ignore_errors=True)

        run()
        assert os.listdir(folder) == ["inside"], "something was written outside"


# The caller names the checkpoint; judgements that meet no text are nobody's file's fault alone.
UNNAMED = ("checkpoint", "state", "stream_state", "judged")
