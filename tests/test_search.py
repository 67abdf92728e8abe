"""Search against brute force in float64, with FAISS and without."""

import subprocess
import sys

import numpy as np
import pytest

from bge_accel import search as search_module
from bge_accel.search import build_index, check_index_factory, search


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
from bge_accel.search import _search_torch, build_index, search
emb = np.random.default_rng(0).standard_normal((2000, 32)).astype(np.float32)
for _ in range(3):
    faiss_indices, torch_indices = search(build_index(emb), emb, 5)[1], _search_torch(emb, emb, 5)[1]
    assert (faiss_indices == torch_indices).all()
print("alike")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout == "alike\n", done.stderr
