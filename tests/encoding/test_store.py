"""The embedding store: what is read is what was written, complete or absent, and never something else's."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from bge_accel.encoding.store import (
    EmbeddingStore,
    Manifest,
    ShardWriter,
    StorePart,
    choose_shard_size,
    differences,
    digest_texts,
    missing_shards,
    prepare_store,
    read_manifest,
    shard_name,
)
from bge_accel.evaluation.search import build_index, search
from bge_accel.files.lock import locked

SETTINGS = {
    "weights": "aa", "tokenizer": "bb", "precision": "float32", "pooling": "cls", "normalize": True,
    "prefix": "query: ", "max_length": 64, "texts": "cc",
}  # fmt: skip
WANTED = Manifest(num_texts=25, dim=3, dtype="float32", shard_size=10, settings=SETTINGS, model="some/model")


def numbers(manifest, seed=0):
    return np.random.default_rng(seed).standard_normal((manifest.num_texts, manifest.dim)).astype(np.float32)


def write(folder, manifest, rows, shards=None):
    """Writes shards, each in two parts."""
    found, missing = prepare_store(str(folder), manifest)
    for shard in missing if shards is None else shards:
        start, stop = found.rows_of(shard)
        writer = ShardWriter(str(folder), found, shard)
        writer.add(rows[start : min(start + 3, stop)])
        writer.add(rows[start + 3 : stop])
        writer.finish()
    return str(folder)


@pytest.fixture
def rows():
    return numbers(WANTED)


@pytest.fixture
def store(tmp_path, rows):
    return EmbeddingStore(write(tmp_path / "store", WANTED, rows))


# ---- reading


@pytest.mark.parametrize(("first", "stop"), [(0, 25), (3, 9), (8, 22), (20, 25), (7, 7)])
def test_a_part_reads_like_a_slice_of_an_array(store, rows, first, stop):
    part, expected = StorePart(store, first, stop), rows[first:stop]
    assert len(part) == stop - first and part.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(part), expected)
    np.testing.assert_array_equal(np.concatenate([block for _, block in part.blocks(4)] or [expected]), expected)
    for which in (
        slice(2, 5),
        slice(-3, None),
        slice(None, None, 2),
        slice(None, None, -1),
        slice(4, 2),
        [],
        [-1, 0, 1],
    ):
        if len(part) or isinstance(which, slice) or not which:
            np.testing.assert_array_equal(part[which], expected[which if which != [] else slice(0, 0)])
    is_wanted = expected[:, 0] > 0
    np.testing.assert_array_equal(part[is_wanted], expected[is_wanted])
    for which in (len(part), [len(part)], [-len(part) - 1], np.ones(len(part) + 1, dtype=bool)):
        with pytest.raises(IndexError):
            part[which]
    if len(part):
        np.testing.assert_array_equal(part[-1], expected[-1])
        scores, found = search(build_index(part), expected[:1], 2)
        assert found[0, 0] == np.argmax(expected @ expected[0]) and len(scores[0]) == 2


@pytest.mark.parametrize(
    "which",
    [
        slice(None), slice(0, 10), slice(3, 7), slice(8, 22), slice(20, None), slice(-4, -1), slice(5, 5), slice(9, 3),
        slice(None, None, 3), slice(None, None, -1), slice(30, 40), slice(0, 100), 0, 9, 10, 24, -1, -25,
        [3], [24, 0, 10, 9, 9, -1], [], np.arange(25) % 4 == 0, np.array([7, 21]), np.int32(12),
    ],
    ids=str,
)  # fmt: skip
def test_reads_like_an_array(store, rows, which):
    expected = rows[np.asarray(which, dtype=np.int64) if isinstance(which, list) else which]
    found = store[which]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32 and found.shape == expected.shape


def test_shapes_and_the_whole(store, rows):
    assert (len(store), store.shape, store.ndim, store.dtype) == (25, (25, 3), 2, np.dtype(np.float32))
    np.testing.assert_array_equal(np.asarray(store), rows)
    assert np.asarray(store, dtype=np.float16).dtype == np.float16


@pytest.mark.parametrize("which", [25, -26, [0, 25], [-26], np.ones(24, dtype=bool), np.zeros((2, 2), dtype=int)])
def test_rows_that_are_not_there(store, which):
    with pytest.raises(IndexError):
        store[which]


def test_slices_of_a_shard_and_blocks_are_views_of_the_file(store, rows):
    assert np.shares_memory(store[12:15], store.shard(1)) and not store[12:15].flags.writeable
    assert not np.shares_memory(store[8:12], store.shard(0))
    blocks = list(store.blocks(4))
    assert [(first, len(block)) for first, block in blocks] == [
        (0, 4), (4, 4), (8, 2), (10, 4), (14, 4), (18, 2), (20, 4), (24, 1),
    ]  # fmt: skip
    assert all(np.shares_memory(block, store.shard(first // 10)) for first, block in blocks)
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), rows)


def test_every_shard_is_a_plain_numpy_file(store, rows):
    for shard, (start, stop) in enumerate([(0, 10), (10, 20), (20, 25)]):
        np.testing.assert_array_equal(np.load(os.path.join(store.folder, shard_name(shard))), rows[start:stop])
    content = json.loads(open(os.path.join(store.folder, "manifest.json"), encoding="utf-8").read())
    assert [shard["count"] for shard in content["shards"]] == [10, 10, 5] and content["settings"] == SETTINGS
    assert read_manifest(store.folder) == WANTED


def test_float16_rounds_to_the_nearest(tmp_path, rows):
    store = EmbeddingStore(write(tmp_path / "half", replace(WANTED, dtype="float16"), rows))
    assert (
        store.dtype == np.float16
        and os.path.getsize(os.path.join(store.folder, shard_name(0))) == 128 + 10 * 3 * 2 + 16
    )
    np.testing.assert_array_equal(store[:], rows.astype(np.float16))
    assert np.abs(store[:].astype(np.float32) - rows).max() <= 2**-11 * np.abs(rows).max()


def test_one_text_and_shards_of_one(tmp_path):
    for size in (1, 5):
        manifest = replace(WANTED, num_texts=1, shard_size=size)
        one = EmbeddingStore(write(tmp_path / str(size), manifest, numbers(manifest)))
        np.testing.assert_array_equal(one[:], numbers(manifest))
    manifest = replace(WANTED, shard_size=1)
    np.testing.assert_array_equal(
        EmbeddingStore(write(tmp_path / "s", manifest, numbers(manifest)))[3:9], numbers(manifest)[3:9]
    )


# ---- complete or absent


def test_a_shard_is_not_seen_before_it_is_finished(tmp_path, rows):
    folder = write(tmp_path / "store", WANTED, rows, shards=[0])
    writer = ShardWriter(folder, WANTED, 1)
    writer.add(rows[10:20])
    assert missing_shards(folder, WANTED) == [1, 2]
    with pytest.raises(
        ValueError, match=r"not complete: 2 of 3 shards .*shard-00001.npy is missing.*goes on from there"
    ):
        EmbeddingStore(folder)
    writer.finish()
    assert missing_shards(folder, WANTED) == [2]
    unfinished = ShardWriter(folder, WANTED, 2)
    unfinished.abandon()
    assert sorted(os.listdir(folder)) == ["manifest.json", "shard-00000.npy", "shard-00001.npy"]


def test_what_a_killed_run_left_is_removed_and_the_rest_kept(tmp_path, rows):
    folder = write(tmp_path / "store", WANTED, rows, shards=[0, 2])
    before = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
    killed = subprocess.run(
        [sys.executable, "-c", f"""
import os, signal, numpy as np
from bge_accel.encoding.store import *
writer = ShardWriter({folder!r}, read_manifest({folder!r}), 1)
writer.add(np.ones((7, 3), dtype=np.float32)); writer.file.flush()
os.kill(os.getpid(), signal.SIGKILL)"""],
        check=False,
    )  # fmt: skip
    assert killed.returncode == -9 and len(os.listdir(folder)) == 4
    assert prepare_store(folder, WANTED) == (WANTED, [1])
    assert {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)} == before
    np.testing.assert_array_equal(EmbeddingStore(write(folder, WANTED, rows))[:], rows)


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "gone"])
def test_a_damaged_shard_is_written_again(tmp_path, rows, damage):
    folder = write(tmp_path / "store", WANTED, rows)
    path = os.path.join(folder, shard_name(1))
    whole = open(path, "rb").read()
    if damage == "gone":
        os.remove(path)
    else:
        with open(path, "wb") as file:
            file.write({"cut": whole[:-1], "longer": whole + b"\0", "header": b"\0" + whole[1:]}[damage])
    with pytest.raises(ValueError, match="1 of 3 shards"):
        EmbeddingStore(folder)
    assert prepare_store(folder, WANTED)[1] == [1]
    write(folder, WANTED, rows)
    assert open(path, "rb").read() == whole


def overwrite(folder, shard, place, content):
    with open(os.path.join(folder, shard_name(shard)), "r+b") as file:
        file.seek(place)
        file.write(content)


def without_checksums(folder):
    """The same store as an older version wrote it."""
    for name in os.listdir(folder):
        if name.startswith("shard-"):
            path = os.path.join(folder, name)
            os.truncate(path, os.path.getsize(path) - 16)


READERS = {
    "a slice": lambda store: store[11:13],
    "one row": lambda store: store[19],
    "some rows": lambda store: store[[0, 12]],
    "all": np.asarray,
    "blocks": lambda store: list(store.blocks(4)),
    "a part": lambda store: StorePart(store, 5, 12)[:],
    "a search": lambda store: search(build_index(store), numbers(WANTED)[:2], 3),
}


@pytest.mark.parametrize("read", READERS.values(), ids=list(READERS))
@pytest.mark.parametrize("damage", ["a bit", "nan", "inf", "the checksum"])
def test_damaged_numbers_are_not_used(tmp_path, rows, damage, read):
    """Found before a row of the shard is given out; the other shards are read. Removed, it alone is written again."""
    folder = write(tmp_path / "store", WANTED, rows)
    place = 128 + 5 * 12
    number = rows[15, :1].tobytes()
    overwrite(folder, 1, *{
        "a bit": (place, bytes([number[0] ^ 1]) + number[1:]),
        "nan": (place, np.float32("nan").tobytes()),
        "inf": (place, np.float32("inf").tobytes()),
        "the checksum": (128 + 10 * 12 + 8, b"?"),
    }[damage])  # fmt: skip
    store = EmbeddingStore(folder)
    np.testing.assert_array_equal(store[20:], rows[20:])
    with pytest.raises(ValueError, match=r"shard-00001.npy is damaged: .* remove this file and run .* again"):
        read(store)
    os.remove(os.path.join(folder, shard_name(1)))
    write(folder, WANTED, rows)
    np.testing.assert_array_equal(EmbeddingStore(folder)[:], rows)


def test_a_store_of_an_older_version_is_read_with_a_note(tmp_path, rows):
    folder = write(tmp_path / "store", WANTED, rows)
    without_checksums(folder)
    assert missing_shards(folder, WANTED) == []
    with pytest.warns(UserWarning, match="has no checksums, it is of an older version") as noted:
        np.testing.assert_array_equal(EmbeddingStore(folder)[:], rows)
    assert len(noted) == 1
    overwrite(folder, 1, 128 + 5 * 12, np.float32("nan").tobytes())
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"embedding of text 15 \(counted from 0\) is not fin"),
    ):
        EmbeddingStore(folder)[10:12]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, rows, value):
    folder = str(tmp_path / "store")
    prepare_store(folder, WANTED)
    writer = ShardWriter(folder, WANTED, 1)
    writer.add(rows[10:13])
    broken = rows[13:20].copy()
    broken[2, 1] = value
    with pytest.raises(ValueError, match=r"embedding of text 15 .* is not finite"):
        writer.add(broken)


def test_values_too_large_for_float16_are_refused(tmp_path):
    manifest = replace(WANTED, dtype="float16")
    prepare_store(str(tmp_path / "store"), manifest)
    with pytest.raises(ValueError, match=r"text 1 .* too large for float16: store float32"):
        ShardWriter(str(tmp_path / "store"), manifest, 0).add(np.array([[1, 2, 3], [1, 70000, 3]], dtype=np.float32))


# ---- refusals


CHANGES = {
    "weights": ("ab", "the model's weights"),
    "tokenizer": ("ab", "the tokenizer"),
    "pooling": ("mean", 'pooling: "cls" in the store, "mean" here'),
    "normalize": (False, "normalisation: true in the store, false here"),
    "prefix": ("", 'the instruction before each text: "query: " in the store, "" here'),
    "max_length": (32, "the maximum length in tokens: 64 in the store, 32 here"),
    "texts": ("cd", "the texts"),
    "precision": ("bfloat16", 'the precision computed in: "float32" in the store, "bfloat16" here'),
    "num_texts": (24, "the number of texts: 25 in the store, 24 here"),
    "dim": (4, "the dimension: 3 in the store, 4 here"),
    "dtype": ("float16", 'the precision stored in: "float32" in the store, "float16" here'),
}


def changed(*names):
    top = {name: CHANGES[name][0] for name in names if name not in SETTINGS}
    return replace(WANTED, settings=SETTINGS | {name: CHANGES[name][0] for name in names if name in SETTINGS}, **top)


@pytest.mark.parametrize("name", CHANGES)
def test_another_store_is_refused_with_what_differs(store, name):
    assert set(CHANGES) == {*SETTINGS, "num_texts", "dim", "dtype"}
    for use in (
        lambda: EmbeddingStore(store.folder, changed(name)),
        lambda: prepare_store(store.folder, changed(name)),
    ):
        with pytest.raises(ValueError) as caught:
            use()
        assert CHANGES[name][1] in str(caught.value) and store.folder in str(caught.value)
        assert str(caught.value).count("in the store") == 1 and "remove this one to encode afresh" in str(caught.value)
    assert EmbeddingStore(store.folder, changed(name), ignore=[name]).shape == (25, 3)


def test_all_that_differs_is_named(store):
    lines = differences(changed("prefix", "texts", "dim"), WANTED)
    assert len(lines) == 3
    # In another precision the same weights have another digest, which would mislead.
    assert [line.split(":")[0] for line in differences(changed("precision", "weights"), WANTED)] == [
        "the precision computed in"
    ]
    with pytest.raises(ValueError, match="It was made with some/model"):
        EmbeddingStore(store.folder, replace(changed("weights"), model="other/model"))
    EmbeddingStore(store.folder, replace(WANTED, model="moved", shard_size=7))


def test_folders_that_are_no_store(tmp_path):
    with pytest.raises(ValueError, match=r"is no embedding store, it has no manifest.json"):
        EmbeddingStore(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no embedding store \(notes.txt"):
        prepare_store(str(tmp_path), WANTED)
    with pytest.raises(ValueError, match="cannot be written to"), locked(str(tmp_path / "notes.txt")):
        pass
    for content in ("{", "[]", '{"format": 1}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=r"manifest.json cannot be read"):
            EmbeddingStore(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match="is of format 7"):
        EmbeddingStore(str(tmp_path))


# ---- digests and sizes


def test_the_digest_tells_texts_apart():
    lists = [[], [""], ["", ""], ["ab"], ["a", "b"], ["b", "a"], ["ab", ""], ["a\0", "b"], ["é"], ["\ud800"]]
    digests = [digest_texts(iter(texts)) for texts in lists]
    assert [count for count, _ in digests] == [len(texts) for texts in lists]
    assert len({digest for _, digest in digests}) == len(lists)
    assert digest_texts(["a", "b"]) == digest_texts(text for text in ("a", "b"))


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("num_texts", [1, 1000, 100_000, 1_000_000, 100_000_000])
def test_shards_are_many_enough_and_not_too_many(num_texts, processes):
    size = choose_shard_size(num_texts, 4096, processes)
    num_shards = -(-num_texts // size)
    assert num_shards <= 2000 and (processes > 1 or size % 4096 == 0)
    assert num_shards >= 8 * processes or size <= 256 or (processes == 1 and size == 4096)
