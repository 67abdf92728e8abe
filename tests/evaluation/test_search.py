"""Search against brute force in float64, with FAISS and without."""

import json
import os
import subprocess
import sys
import threading
import warnings
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.repo import REPO
from helpers.warm_start import FORKS

from bge_accel.encoding.store import EmbeddingStore, Manifest, ShardWriter, prepare_store
from bge_accel.evaluation import search as search_module
from bge_accel.evaluation.search import (
    build_index,
    check_index_factory,
    index_recall,
    load_index,
    merge_results,
    save_index,
    search,
    search_over_processes,
)


@pytest.fixture(params=["faiss", "torch"])
def backend(request, monkeypatch):
    """Runs a test with FAISS and as if it were not installed."""
    if request.param == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    return request.param


def brute_force(corpus_emb, q_emb, k):
    scores = q_emb.astype(np.float64) @ corpus_emb.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("num_queries", [1, 7, 40])
@pytest.mark.parametrize("k", [1, 10, 150])
def test_exact(backend, num_queries, k):
    rng = np.random.default_rng(k)
    corpus_emb = rng.standard_normal((1000, 48)).astype(np.float32)
    q_emb = rng.standard_normal((num_queries, 48)).astype(np.float32)
    scores, indices = search(build_index(corpus_emb), q_emb, k)
    expected_scores, expected = brute_force(corpus_emb, q_emb, k)
    assert scores.dtype == np.float32 and indices.dtype == np.int64
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
    np.testing.assert_array_equal(indices, expected)


@pytest.mark.parametrize("seed", range(30))
def test_ties_go_to_the_smaller_index(backend, seed, monkeypatch):
    """Small whole numbers: sums are exact and nearly everything ties, also across the k-th place and across blocks."""
    monkeypatch.setattr(search_module, "CORPUS_BLOCK", 64)
    monkeypatch.setattr(search_module, "QUERY_BLOCK", 16)
    rng = np.random.default_rng(seed)
    num_passages, k = int(rng.integers(1, 400)), int(rng.integers(1, 200))
    corpus_emb = rng.integers(-1, 2, size=(num_passages, 6)).astype(np.float32)
    q_emb = rng.integers(-1, 2, size=(30, 6)).astype(np.float32)
    scores, indices = search(build_index(corpus_emb), q_emb, k)
    expected_scores, expected = brute_force(corpus_emb, q_emb, k)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(indices, expected)


def test_negative_zero_ties_with_zero(backend):
    corpus_emb = np.array([[-0.0], [0.0], [-1.0], [-0.0]], dtype=np.float32)
    scores, indices = search(build_index(corpus_emb), np.array([[1], [2]], dtype=np.float32), 4)
    assert indices.tolist() == [[0, 1, 3, 2]] * 2 and scores.tolist() == [[0, 0, 0, -1], [0, 0, 0, -2]]


def test_more_than_the_corpus_holds(backend):
    corpus_emb = np.eye(3, dtype=np.float32)
    scores, indices = search(build_index(corpus_emb), np.array([[1, 3, 2]], dtype=np.float32), 10)
    assert indices.tolist() == [[1, 2, 0]] and scores.tolist() == [[3, 2, 1]]


def test_no_queries(backend):
    scores, indices = search(build_index(np.eye(3, dtype=np.float32)), np.empty((0, 3), dtype=np.float32), 2)
    assert scores.shape == indices.shape == (0, 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_and_strides(backend, dtype):
    rng = np.random.default_rng(0)
    corpus_emb = rng.integers(-8, 8, size=(100, 32)).astype(dtype)[::2, ::2]
    q_emb = rng.integers(-8, 8, size=(32, 5)).astype(dtype)[::2].T
    np.testing.assert_array_equal(search(build_index(corpus_emb), q_emb, 9)[1], brute_force(corpus_emb, q_emb, 9)[1])


def test_mistakes(backend):
    corpus_emb = np.eye(4, dtype=np.float32)
    index = build_index(corpus_emb)
    with pytest.raises(ValueError, match="k is 0"):
        search(index, corpus_emb, 0)
    with pytest.raises(ValueError, match=r"vectors of 4 numbers, the queries are \(2, 3\)"):
        search(index, np.ones((2, 3), dtype=np.float32), 1)
    with pytest.raises(ValueError, match=r"not \(0, 4\)"):
        build_index(corpus_emb[:0])
    corpus_emb[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"embedding of passage 2 .* not finite"):
        build_index(corpus_emb)
    with pytest.raises(ValueError, match=r"embedding of query 2 .* not finite"):
        search(index, corpus_emb, 1)


def test_without_faiss_other_indexes_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    check_index_factory("Flat", 8)
    for refuse in (lambda: check_index_factory("HNSW32", 8), lambda: build_index(np.eye(8), "HNSW32")):
        with pytest.raises(ValueError, match="'HNSW32' needs FAISS: pip install faiss-cpu"):
            refuse()


def unit_vectors(num, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((num, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("index_factory", ["IVF16,Flat", "HNSW16", "SQ8", "PCA12,Flat"])
def test_approximate_indexes(index_factory):
    pytest.importorskip("faiss")
    corpus_emb, q_emb = unit_vectors(3000), unit_vectors(50, seed=1)
    scores, indices = search(build_index(corpus_emb, index_factory), q_emb, 10)
    again = search(build_index(corpus_emb, index_factory), q_emb, 10)
    expected = brute_force(corpus_emb, q_emb, 10)[1]
    found = np.mean([len(set(ours) & set(true)) / 10 for ours, true in zip(indices, expected, strict=True)])
    assert found > 0.3
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_array_equal(indices, again[1])


def test_an_inverted_file_visits_more_than_one_list():
    faiss = pytest.importorskip("faiss")
    index = build_index(unit_vectors(3000), "PCA8,IVF64,Flat")
    assert faiss.extract_index_ivf(index).nprobe == 8


def test_fewer_found_than_asked_for():
    pytest.importorskip("faiss")
    index = build_index(unit_vectors(400), "IVF16,Flat")
    scores, indices = search(index, unit_vectors(5, seed=1), 300)
    assert (indices == -1).any() and np.isneginf(scores[indices == -1]).all()
    assert np.isfinite(scores[indices >= 0]).all() and (indices[:, 0] >= 0).all()


def test_training_uses_a_sample(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(search_module, "MAX_TRAINING_VECTORS", 50)
    with pytest.raises(ValueError, match=r"training points \(50\)"):
        build_index(unit_vectors(3000), "IVF64,Flat")


@pytest.mark.parametrize(
    ("index_factory", "message"),
    [
        ("Flatt", "could not parse index string Flatt"),
        ("", "could not parse"),
        ("PQ7", "should be a multiple"),
        ("LSH", "METRIC_L2"),
        ("IVF500,Flat", r"training points \(100\)"),
        ("IDMap,Flat", "add_with_ids"),
    ],
)
def test_index_strings_that_faiss_does_not_take(index_factory, message):
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match=rf"'{index_factory}'.*{message}") as caught:
        build_index(unit_vectors(100), index_factory)
    assert "/project" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_index_string_is_found_without_a_corpus():
    pytest.importorskip("faiss")
    check_index_factory("IVF500,Flat", 16)
    with pytest.raises(ValueError, match="'Flatt'"):
        check_index_factory("Flatt", 16)


@pytest.mark.parametrize("imports", ["import torch, faiss", "import faiss, torch"])
def test_faiss_and_torch_in_one_process(imports):
    """Both bring an OpenMP; in either order both have to compute, and alike."""
    pytest.importorskip("faiss")
    script = f"""
{imports}
import numpy as np
from bge_accel.evaluation.search import build_index, search
emb = np.random.default_rng(0).standard_normal((2000, 32)).astype(np.float32)
index = faiss.IndexFlatIP(32)
index.add(emb)
for _ in range(3):
    faiss_indices, torch_indices = index.search(emb, 5)[1], search(build_index(emb), emb, 5)[1]
    assert (faiss_indices == torch_indices).all()
print("alike")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout == "alike\n", done.stderr


# ---- stores and mapped files


def on_disk(kind, folder, embeddings, shard_size=100):
    """The embeddings as an `EmbeddingStore` or a mapped file."""
    if kind == "memmap":
        np.save(folder / "emb.npy", embeddings)
        return np.load(folder / "emb.npy", mmap_mode="r")
    manifest = Manifest(*embeddings.shape, str(embeddings.dtype), shard_size)
    for shard in prepare_store(str(folder / "store"), manifest)[1]:
        writer = ShardWriter(str(folder / "store"), manifest, shard)
        writer.add(embeddings[slice(*manifest.rows_of(shard))])
        writer.finish()
    return EmbeddingStore(str(folder / "store"))


@pytest.mark.parametrize("kind", ["store", "memmap"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 30, 2000])
def test_exact_on_disk(backend, kind, dtype, k, tmp_path, monkeypatch):
    """Blocks, shards and k of all sizes; also more than the corpus holds."""
    monkeypatch.setattr(search_module, "CORPUS_BLOCK", 128)
    monkeypatch.setattr(search_module, "QUERY_BLOCK", 16)
    rng = np.random.default_rng(k)
    corpus_emb = rng.standard_normal((1050, 24)).astype(dtype)
    q_emb = rng.standard_normal((37, 24)).astype(np.float32)
    index = build_index(on_disk(kind, tmp_path, corpus_emb))
    assert isinstance(index, EmbeddingStore if kind == "store" else np.memmap)  # nothing was copied
    scores, indices = search(index, q_emb, k)
    expected_scores, expected = brute_force(corpus_emb, q_emb, k)
    assert indices.shape == (37, min(k, 1050)) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
    np.testing.assert_array_equal(indices, expected)


@pytest.mark.parametrize("seed", range(10))
def test_ties_on_disk_go_to_the_smaller_index(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "CORPUS_BLOCK", 64)
    monkeypatch.setattr(search_module, "QUERY_BLOCK", 16)
    rng = np.random.default_rng(seed)
    num_passages, k = int(rng.integers(1, 600)), int(rng.integers(1, 100))
    corpus_emb = rng.integers(-1, 2, size=(num_passages, 6)).astype(np.float16)
    q_emb = rng.integers(-1, 2, size=(30, 6)).astype(np.float32)
    scores, indices = search(build_index(on_disk("store", tmp_path, corpus_emb, 50)), q_emb, k)
    expected_scores, expected = brute_force(corpus_emb, q_emb, k)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(indices, expected)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_scores_that_rise_through_the_corpus(order, tmp_path, monkeypatch):
    """Every block brings better passages than all before it, or none does."""
    monkeypatch.setattr(search_module, "CORPUS_BLOCK", 64)
    rng = np.random.default_rng(0)
    lengths = np.linspace(1, 50, 1000) if order == "rising" else np.linspace(50, 1, 1000)
    corpus_emb = (np.abs(rng.standard_normal((1000, 8))) * lengths[:, None]).astype(np.float32)
    q_emb = np.abs(rng.standard_normal((20, 8))).astype(np.float32)
    found = search(build_index(on_disk("store", tmp_path, corpus_emb)), q_emb, 25)[1]
    np.testing.assert_array_equal(found, brute_force(corpus_emb, q_emb, 25)[1])


def test_a_mapped_file_is_read_without_a_copy_and_without_a_warning(tmp_path):
    corpus_emb = on_disk("memmap", tmp_path, unit_vectors(300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = search_module._tensor(corpus_emb[100:200])
    assert tensor.data_ptr() == corpus_emb.ctypes.data + 100 * 16 * 4
    np.testing.assert_array_equal(tensor.numpy(), corpus_emb[100:200])
    assert search_module._tensor(corpus_emb[:, :5]).is_contiguous()


@pytest.mark.parametrize("width", [64, 100, 640])
def test_the_places_of_large_scores(width):
    scores = torch.from_numpy(np.random.default_rng(width).standard_normal((30, width)).astype(np.float32))
    last = torch.linspace(-4, 4, 30)
    size = 32 if width % 32 == 0 else 1
    row, column, found = search_module._places(scores, scores.view(30, -1, size).amax(dim=2), last)
    expected = np.nonzero(scores.numpy() > last.numpy()[:, None])
    np.testing.assert_array_equal(row, expected[0])
    np.testing.assert_array_equal(found, scores[row, column])
    assert sorted(zip(row.tolist(), column.tolist(), strict=True)) == list(
        zip(*map(np.ndarray.tolist, expected), strict=True)
    )


def test_a_damaged_mapped_file_is_found(tmp_path):
    corpus_emb = np.ones((300, 4), dtype=np.float32)
    corpus_emb[250, 2] = np.inf
    with pytest.raises(ValueError, match="embedding of passage 250"):
        build_index(on_disk("memmap", tmp_path, corpus_emb))


def anonymous_memory():
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))


def growth_of(work):
    """Result of `work()`, and by how many MB the anonymous memory had grown at most while it ran."""
    before, most, is_over = anonymous_memory(), 0.0, threading.Event()

    def watch():
        nonlocal most
        while not is_over.wait(0.002):
            most = max(most, anonymous_memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = work()
    finally:
        is_over.set()
        thread.join()
    return result, most


def test_memory_of_a_search_on_disk(tmp_path):
    """The corpus takes 98 MB in float32, its scores 77."""
    corpus_emb = np.random.default_rng(0).standard_normal((200_000, 128), dtype=np.float32).astype(np.float16)
    store, q_emb = on_disk("store", tmp_path, corpus_emb, 30_000), corpus_emb[:100].astype(np.float32)
    search(build_index(store[:10_000].copy()), q_emb, 10)  # imports, and what torch sets aside once
    (_, indices), grown = growth_of(lambda: search(build_index(store), q_emb, 50))
    assert (indices[:, 0] == np.arange(100)).all() and grown < 50, grown


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_million_passages(tmp_path):
    """Under 300 MB beyond the mapped files, which hold 1,024."""
    rng = np.random.default_rng(0)
    manifest = Manifest(1_000_000, 256, "float32", 50_000)
    for shard in prepare_store(str(tmp_path / "store"), manifest)[1]:
        writer = ShardWriter(str(tmp_path / "store"), manifest, shard)
        writer.add(rng.standard_normal((50_000, 256), dtype=np.float32))
        writer.finish()
    store = EmbeddingStore(str(tmp_path / "store"))
    chosen = np.arange(0, 1_000_000, 400)
    q_emb = store[chosen]
    (_, indices), grown = growth_of(lambda: search(build_index(store), q_emb, 100))
    assert (indices[:, 0] == chosen).all() and grown < 300, grown


# ---- parts, saved indexes, recall


@pytest.mark.parametrize("k", [1, 20, 500])
def test_parts_merge_to_the_whole(k):
    rng = np.random.default_rng(k)
    corpus_emb = rng.integers(-1, 2, size=(300, 5)).astype(np.float32)  # ties across the parts
    q_emb = rng.integers(-1, 2, size=(15, 5)).astype(np.float32)
    cuts = [0, 120, 123, 300]
    parts = [search(build_index(corpus_emb[a:b]), q_emb, k) for a, b in pairwise(cuts)]
    scores, indices = merge_results(parts, cuts[:-1], k)
    whole = search(build_index(corpus_emb), q_emb, k)
    np.testing.assert_array_equal(scores, whole[0])
    np.testing.assert_array_equal(indices, whole[1])


def test_what_was_not_found_merges_last():
    parts = [(np.array([[0.5, -np.inf]]), np.array([[3, -1]])), (np.array([[0.9, 0.1]]), np.array([[1, 0]]))]
    scores, indices = merge_results(parts, [0, 100], 4)
    assert indices.tolist() == [[101, 3, 100, -1]] and scores.tolist() == [[0.9, 0.5, 0.1, -np.inf]]


def search_a_part(rank, meet):
    """What one of three processes does; exits with 0 if it finds what one with the whole finds."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=3)
    emb = np.random.default_rng(0).integers(-1, 2, size=(400, 6)).astype(np.float32)
    start, stop = [(0, 150), (150, 400), (400, 400)][rank]
    ours = search_over_processes(build_index(emb[start:stop]) if stop > start else None, emb[:50], 30, start)
    whole = search(build_index(emb), emb[:50], 30)
    dist.barrier()
    np.testing.assert_array_equal(ours[0], whole[0])
    np.testing.assert_array_equal(ours[1], whole[1])


def test_a_corpus_spread_over_processes(tmp_path):
    """Two processes with a part each, and a third that holds nothing, all get what one with the whole finds."""
    processes = [FORKS.Process(target=search_a_part, args=(rank, str(tmp_path / "meet"))) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 3


@pytest.mark.parametrize("index_factory", ["IVF16,Flat", "HNSW16"])
def test_a_saved_index_answers_alike(index_factory, tmp_path):
    pytest.importorskip("faiss")
    corpus_emb, q_emb = unit_vectors(2000), unit_vectors(20, seed=1)
    index, about = build_index(corpus_emb, index_factory), {"index_factory": index_factory, "texts": "aa"}
    path = str(tmp_path / "deep" / "index")
    save_index(index, path, about)
    for ours, theirs in zip(search(load_index(path, about), q_emb, 10), search(index, q_emb, 10), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sorted(os.listdir(tmp_path / "deep")) == ["index", "index.json"]
    with pytest.raises(ValueError, match='texts: "aa" in the index, "bb" here'):
        load_index(path, about | {"texts": "bb"})
    whole = bytearray(Path(path).read_bytes())
    whole[-100] ^= 1
    Path(path).write_bytes(whole)
    with pytest.raises(ValueError, match="does not have the checksum that was written"):
        load_index(path, about)


def test_indexes_that_cannot_be_saved_or_loaded(tmp_path):
    pytest.importorskip("faiss")
    store = on_disk("store", tmp_path, unit_vectors(300))
    with pytest.raises(ValueError, match="there is no index to save"):
        save_index(build_index(store), str(tmp_path / "index"), {})
    with pytest.raises(ValueError, match="cannot be read"):
        load_index(str(tmp_path / "index"), {})
    save_index(build_index(store, "HNSW8"), str(tmp_path / "index"), {})
    save_index(build_index(unit_vectors(10), "HNSW8"), str(tmp_path / "other"), {})
    os.replace(tmp_path / "other", tmp_path / "index")  # the index of one with the description of another
    with pytest.raises(ValueError, match=r"not have the checksum that was written: it is damaged, or .*anew"):
        load_index(str(tmp_path / "index"), {})
    about = json.loads((tmp_path / "index.json").read_text())
    del about["crc32"]  # as an older version wrote it
    (tmp_path / "index.json").write_text(json.dumps(about))
    with pytest.warns(UserWarning, match="no checksum"), pytest.raises(ValueError, match="built from something else"):
        load_index(str(tmp_path / "index"), {})
    with open(tmp_path / "index", "r+b") as file:
        file.truncate(100)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="cannot be read"):
        load_index(str(tmp_path / "index"), {})


@pytest.mark.parametrize("kind", ["array", "store"])
def test_recall_of_an_approximate_index(kind, tmp_path):
    pytest.importorskip("faiss")
    corpus_emb, q_emb = unit_vectors(3000), unit_vectors(60, seed=1)
    corpus = corpus_emb if kind == "array" else on_disk("store", tmp_path, corpus_emb, 700)
    assert index_recall(build_index(corpus), corpus, q_emb) == {
        "recall@1": 1, "recall@10": 1, "recall@100": 1, "queries": 60,
    }  # fmt: skip
    index = build_index(corpus, "IVF64,Flat")
    found, exact = search(index, q_emb, 10)[1], brute_force(corpus_emb, q_emb, 10)[1]
    expected = np.mean([len(set(ours) & set(true)) / 10 for ours, true in zip(found, exact, strict=True)])
    recall = index_recall(index, corpus, q_emb, [10])
    assert recall["recall@10"] == pytest.approx(expected) and 0.2 < expected < 0.95
    assert index_recall(index, corpus, q_emb, [10], max_queries=7)["queries"] == 7


def test_tied_passages_count_as_found():
    """Whichever copies of the same text an index finds: this one has the last of them first."""
    faiss = pytest.importorskip("faiss")
    corpus_emb = np.repeat(unit_vectors(20), 30, axis=0)
    index = faiss.IndexIDMap(faiss.IndexFlatIP(16))
    index.add_with_ids(corpus_emb[::-1].copy(), np.arange(600)[::-1].copy())
    assert (search(index, unit_vectors(20), 10)[1][0] >= 20).all()
    assert index_recall(index, corpus_emb, unit_vectors(20), [10])["recall@10"] == 1


# ---- packages


def test_two_packages_of_faiss_are_an_error(tmp_path, monkeypatch):
    installed = [name for name in search_module.FAISS_PACKAGES if any(distributions(name=name))]
    assert len(installed) <= 1
    search_module.check_faiss_packages()
    for name in ("faiss-cpu", "faiss-gpu"):
        if name not in installed:
            folder = tmp_path / f"{name.replace('-', '_')}-1.15.1.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.15.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ValueError, match="remove faiss-cpu: pip uninstall -y faiss-cpu faiss-gpu, then pip install faiss-gpu"
    ):
        build_index(np.eye(3, dtype=np.float32))


def test_the_requirements_for_gpus_differ_in_faiss_alone():
    def lines(name):
        with open(REPO / name, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip() and not line.startswith("#")]

    assert [line.replace("faiss-gpu", "faiss-cpu") for line in lines("requirements-gpu.txt")] == lines(
        "requirements.txt"
    )


def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="there is no GPU to search on: drop --use_gpu_for_searching"):
        build_index(np.eye(3, dtype=np.float32), use_gpu=True)
