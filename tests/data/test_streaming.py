"""Streams of rows: each row once an epoch over all processes, in an order that the seed alone decides, exact on resume."""

import contextlib
import functools
import gzip
import http.server
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter

import fsspec
import pytest
from backports import zstd
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from bge_accel.data import streaming
from bge_accel.data.examples import draw_example
from bge_accel.data.remote import find_stream_files, read_items
from bge_accel.data.streaming import RowBlock, RowStream

KINDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".json")
SHAPES = [(97,), (40, 40, 40, 40), (3, 50, 1, 17, 30), (24, 25, 26, 25, 24)]


def make_rows(n, start=0):
    return [
        {"query": f"query {i}", "pos": [f"passage {i}"], "neg": [f"other {i}", "x"]} for i in range(start, start + n)
    ]


def encode(rows, name):
    if name.endswith(".json"):
        data = json.dumps(rows, indent=1).encode()
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(data) if name.endswith(".gz") else zstd.compress(data) if name.endswith(".zst") else data


def write_file(path, rows, row_group_size=16):
    if path.name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    else:
        path.write_bytes(encode(rows, path.name))
    return str(path)


@pytest.fixture
def write(tmp_path):
    """Writes files of so many rows each; all rows have a number of their own."""

    def write(sizes, kind=".jsonl", folder="rows"):
        (tmp_path / folder).mkdir(exist_ok=True)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [
            write_file(tmp_path / folder / f"part-{i}{kind}", make_rows(size, start))
            for i, (size, start) in enumerate(zip(sizes, starts, strict=True))
        ]

    return write


def read(stream, n):
    """(epoch, row's number in the data, key) of the next rows."""
    return [
        (epoch, int(block[index]["query"].removeprefix("query ")), key) for block, index, epoch, key in stream.take(n)
    ]


def read_epochs(stream, epochs):
    rows = []
    while stream.epochs_done < epochs:
        rows += read(stream, 1)
    return rows


def again(stream):
    return json.loads(json.dumps(stream.state_dict()))


# ---- every row once an epoch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_row_comes_once_an_epoch_on_one_process(write, kind, sizes, num_ranks):
    paths, total = write(sizes, kind), sum(sizes)
    shares = [
        read_epochs(RowStream(paths, seed=1, rank=rank, num_ranks=num_ranks, buffer_size=10), 3)
        for rank in range(num_ranks)
    ]
    for epoch in range(3):
        rows = [(row, key) for share in shares for number, row, key in share if number == epoch]
        assert sorted(row for row, _ in rows) == list(range(total))
        assert len({key for _, key in rows}) == total
    for share in shares:
        epochs = [epoch for epoch, _, _ in share]
        assert epochs == sorted(epochs)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_the_order_depends_on_seed_and_epoch_alone(write, sizes):
    paths = write(sizes)
    first = read_epochs(RowStream(paths, seed=1, buffer_size=10), 2)
    # How many rows are taken at once changes nothing.
    stream, same = RowStream(paths, seed=1, buffer_size=10), []
    while len(same) < len(first):
        same += read(stream, min(7, len(first) - len(same)))
    assert same == first
    half = len(first) // 2
    orders = [[row for _, row, _ in rows] for rows in (first[:half], first[half:])]
    orders.append([row for _, row, _ in read_epochs(RowStream(paths, seed=2, buffer_size=10), 1)])
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_the_kind_of_file_changes_nothing(write):
    orders = [read(RowStream(write([30, 31], kind, kind), seed=5, buffer_size=8), 150) for kind in KINDS]
    assert all(order == orders[0] for order in orders)


def test_files_come_in_another_order_each_epoch(write):
    paths = write([5] * 6)
    stream = RowStream(paths, seed=0, buffer_size=1)
    orders = []
    for _ in range(4):
        rows = [row for _, row, _ in read(stream, 30)]
        orders.append(tuple(dict.fromkeys(row // 5 for row in rows)))
        assert rows == [5 * file + i for file in orders[-1] for i in range(5)]  # a buffer of one shuffles nothing else
    assert len(set(orders)) == 4


def test_rows_are_shuffled_over_the_whole_buffer(write):
    rows = [row for _, row, _ in read(RowStream(write([1000]), seed=0, buffer_size=1000), 1000)]
    assert sum(abs(row - place) for place, row in enumerate(rows)) / 1000 == pytest.approx(1000 / 3, rel=0.1)


# ---- which files a process reads


def files_read(monkeypatch, paths, rank, num_ranks, n):
    opened = []
    monkeypatch.setattr(streaming, "read_items", lambda path, after=0: opened.append(path) or read_items(path, after))
    read(RowStream(paths, seed=3, rank=rank, num_ranks=num_ranks, buffer_size=4), n)
    return set(opened)


def test_a_process_reads_only_its_files_where_shares_are_equal(write, monkeypatch):
    paths = write([30, 30, 30, 30])
    shares = [files_read(monkeypatch, paths, rank, 2, 120) for rank in range(2)]
    assert [len(share) for share in shares] == [2, 2] and shares[0] | shares[1] == set(paths)


@pytest.mark.parametrize("sizes", [(30, 90, 30, 30), (30, 30, 30), (90,)], ids=str)
def test_files_are_read_by_all_where_shares_would_be_unequal(write, monkeypatch, sizes):
    paths = write(sizes)
    rows_of = math.ceil(sum(sizes) / 2)
    for rank in range(2):
        assert files_read(monkeypatch, paths, rank, 2, rows_of) == set(paths)


def test_shares_of_unequal_files_differ_by_a_row_at_most(write):
    paths = write([3, 50, 1, 17, 30])
    shares = [len(read_epochs(RowStream(paths, seed=1, rank=r, num_ranks=4, buffer_size=5), 1)) for r in range(4)]
    assert sorted(shares) == [25, 25, 25, 26]


# ---- resume


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("sizes", [(57,), (20, 20, 20, 20), (3, 31, 1, 16)], ids=str)
def test_resume_at_any_point_goes_on_exactly(write, kind, num_ranks, sizes):
    paths, rng = write(sizes, kind), random.Random(0)
    for rank in range(num_ranks):
        kwargs = {"seed": 9, "rank": rank, "num_ranks": num_ranks, "buffer_size": 8}
        stream, whole, states = RowStream(paths, **kwargs), [], []
        length = 3 * sum(sizes) // num_ranks
        for _ in range(length):
            states.append(again(stream))
            whole += read(stream, 1)
        for at in rng.sample(range(length), 12):
            resumed = RowStream(paths, **kwargs, state=states[at])
            assert again(resumed) == states[at]
            assert read(resumed, length - at) == whole[at:]
            assert resumed.epochs_done == stream.epochs_done


@pytest.mark.parametrize("buffer_size", [1, 2, 7, 8, 16, 24, 1000])
def test_resume_is_exact_where_blocks_and_epochs_meet(write, buffer_size):
    paths = write([16, 8])
    stream, whole, states = RowStream(paths, seed=2, buffer_size=buffer_size), [], []
    for _ in range(75):
        states.append((again(stream), stream.epochs_done))
        whole += read(stream, 1)
    assert [done for _, done in states] == [at // 24 for at in range(75)]
    for at, (state, _) in enumerate(states):
        assert read(RowStream(paths, seed=2, buffer_size=buffer_size, state=state), 75 - at) == whole[at:]


def test_resumed_again_and_again(write):
    paths = write([11, 29, 7])
    kwargs = {"seed": 4, "rank": 1, "num_ranks": 2, "buffer_size": 6}
    whole, state, parts, rng = read(RowStream(paths, **kwargs), 100), None, [], random.Random(1)
    while len(parts) < 100:
        stream = RowStream(paths, **kwargs, state=state)
        parts += read(stream, min(rng.randint(0, 9), 100 - len(parts)))
        state = again(stream)
    assert parts == whole


def test_resume_reads_one_file_up_to_the_point_and_no_more_than_a_block_and_a_half(write, monkeypatch):
    paths = write([500] * 4)
    stream = RowStream(paths, seed=6, buffer_size=20)
    read(stream, 2000 + 1350)  # in the third file of the second epoch
    state, counts = again(stream), Counter()

    def counted(path, after=0):
        for line, value in read_items(path, after):
            counts[path] += 1
            yield line, value

    monkeypatch.setattr(streaming, "read_items", counted)
    RowStream(paths, seed=6, buffer_size=20, state=state)
    assert state["position"] == [2, 340, 1340] and state["taken"] == 10
    assert len(counts) == 1 and counts.total() == 20 + 10 + 1
    assert len(json.dumps(state)) < 400


def test_lines_before_the_point_are_not_parsed(write, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encode(make_rows(40), path.name))
    stream = RowStream([str(path)], seed=0, buffer_size=5)
    read(stream, 20)
    state = again(stream)
    path.write_bytes(path.read_bytes().replace(b'"query 3"', b"'query 3'"))
    resumed = RowStream([str(path)], seed=0, buffer_size=5, state=state)
    assert read(resumed, 20) == read(stream, 20)
    with pytest.raises(ValueError, match=r"rows\.jsonl:4: not JSON"):
        read(resumed, 1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 2}, "has seed 1 instead of 2"),
        ({"rank": 1}, "has rank 0 instead of 1"),
        ({"num_ranks": 3}, "has num_ranks 2 instead of 3"),
        ({"buffer_size": 9}, "has buffer_size 8 instead of 9"),
    ],
)
def test_a_state_of_another_stream_is_refused(write, change, what):
    paths, kwargs = write([30]), {"seed": 1, "rank": 0, "num_ranks": 2, "buffer_size": 8}
    state = again(RowStream(paths, **kwargs))
    with pytest.raises(ValueError, match=f"the stream of the checkpoint {what}; resume with the same, or start a new"):
        RowStream(paths, **{**kwargs, **change}, state=state)


def test_a_state_of_other_files_is_refused_and_of_moved_ones_not(write):
    state = again(RowStream(write([30, 20]), seed=1))
    for sizes in ([30], [30, 21], [20, 30]):
        with pytest.raises(ValueError, match="the stream of the checkpoint has other files"):
            RowStream(write(sizes, folder=str(sizes)), seed=1, state=state)
    RowStream(write([30, 20], folder="moved"), seed=1, state=state)


# ---- blocks


def test_a_block_is_what_examples_are_drawn_from():
    rows = [
        {"query": "a", "pos": ["1"], "neg": ["9"]},
        {"query": "b", "pos": ["2", "3"]},
        {"query": "a", "pos": ["4"]},
    ]
    block = RowBlock(rows, ["f:1", "f:2", "g:1"], [7, 8, 9])
    assert len(block) == 3 and block[1] is rows[1] and block.place(2) == "g:1" and block.numbers == [7, 8, 9]
    assert block.passages(0) == ["1", "9"] and block.passages(1) == ["2", "3"]
    assert block.known_positives(0) == block.known_positives(2) == {"1", "4"} and block.known_positives(1) == {"2", "3"}
    example = draw_example(block, 2, 0, seed=0, group_size=4, key=9)
    assert example.passages[0] == "4" and set(example.passages[1:]) <= {"2", "3", "9"}


def test_negatives_are_found_at_the_end_of_an_epoch_too(tmp_path):
    rows = [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(41)]
    path = write_file(tmp_path / "rows.jsonl", rows)
    stream = RowStream([path], seed=0, buffer_size=10)
    sizes = []
    for block, index, epoch, key in stream.take(82):
        assert len(draw_example(block, index, epoch, seed=0, group_size=3, key=key).passages) == 3
        sizes.append(len(block))
    assert set(sizes) == {10, 11} and Counter(sizes)[11] == 22  # no block of one row


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_absent_and_null_are_the_same_and_other_columns_are_dropped(tmp_path, kind):
    rows = [
        {"query": "a", "pos": ["1"], "neg": None, "pos_scores": None, "neg_scores": None, "prompt": None, "id": 5},
        {"query": "b", "pos": ["2"], "neg": ["3"], "pos_scores": [1.5], "neg_scores": [0.5], "prompt": "P: "},
    ]
    path = write_file(tmp_path / f"rows{kind}", rows)
    block = RowStream([path], seed=0).take(1)[0][0]
    assert block.rows == [{"query": "a", "pos": ["1"]}, rows[1]]


def test_rows_of_different_fields_and_types_are_read_as_they_are(tmp_path):
    """What the JSON reader of `datasets` refuses or changes: it takes the first rows' fields and types for all."""
    rows = [
        {"query": "2024-01-01", "pos": ["2024-01-01 10:00:00"], "neg": []},
        {"query": "b", "pos": ["2"], "pos_scores": [1]},
        {"query": "c", "pos": ["3"], "neg": ["4"], "pos_scores": [0.5], "neg_scores": [-1], "prompt": "P"},
    ]
    paths = [write_file(tmp_path / f"{i}.jsonl", rows[i : i + 1]) for i in range(3)]
    read_rows = [block[index] for block, index, _, _ in RowStream(paths, seed=0).take(3)]
    assert sorted(read_rows, key=lambda row: row["query"]) == rows


def test_a_row_is_placed_by_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"query": "a", "pos": ["1"]}\n\n  \n{"query": "b", "pos": ["2"]}')
    write_file(tmp_path / "b.parquet", make_rows(2))
    block = RowStream([str(tmp_path)], seed=0).take(1)[0][0]
    assert sorted(block.places) == [
        f"{tmp_path}/{place}" for place in ("a.jsonl:1", "a.jsonl:4", "b.parquet:1", "b.parquet:2")
    ]


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_only_a_block_and_a_half_is_in_memory(tmp_path, kind):
    rows = [{"query": f"q{i}", "pos": [f"{i:05}" * 200]} for i in range(12_000)]  # 12 MB
    path = write_file(tmp_path / f"rows{kind}", rows, row_group_size=500)
    del rows
    stream = RowStream([path], seed=0, buffer_size=200)
    read = functools.partial(stream.take, 1)
    tracemalloc.start()
    for _ in range(6000):
        read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


# ---- faults


def message_of(paths, **kwargs):
    with pytest.raises(ValueError) as error:
        RowStream([str(path) for path in paths], **{"seed": 0, **kwargs})
    return str(error.value)


def test_faulty_rows_are_shown_before_anything_is_taken(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"query": "a", "pos": ["1"]}\n{"query": "", "pos": "x"}\n[1]\n{"query": \n{"query": "\\ud800", "pos": ["1"]}\n'
    )
    assert message_of([path]).splitlines() == [
        "5 faults in the input:",
        f'{path}:2: "query" is empty: remove the row or fill it in',
        f'{path}:2: "pos" is "x": it has to be a list of strings, like ["..."]',
        f"{path}:3: expected an object {{...}}, found [1]",
        f'{path}:4: not JSON (Expecting value: line 2 column 1 (char 11)): "{{\\"query\\": \\n"',
        f"{path}:5: \\ud800 is half of a character (a lone surrogate); remove it or write the whole character",
    ]


def test_a_later_faulty_row_stops_the_stream_where_its_block_begins(tmp_path):
    rows = make_rows(50)
    rows[44] = {"query": "q"}
    path = write_file(tmp_path / "rows.parquet", rows)
    stream = RowStream([path], seed=0, buffer_size=10)
    read(stream, 30)
    with pytest.raises(ValueError, match=re.escape(f'{path}:45: "pos" is null')):
        read(stream, 1)


def test_missing_columns_of_parquet_are_named(tmp_path):
    path = write_file(tmp_path / "rows.parquet", [{"text": "x"}] * 2)
    assert f'{path}:2: "query" is missing' in message_of([path])


def test_scores_are_asked_for(tmp_path):
    path = write_file(tmp_path / "rows.jsonl", make_rows(1))
    assert f'{path}:1: no "pos_scores" or "neg_scores"' in message_of([path], need_scores=True)


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".parquet", ".json"])
def test_a_broken_file_is_named(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    write_file(path, make_rows(50))
    path.write_bytes(path.read_bytes()[:-20])
    assert str(path) in message_of([path])


@pytest.mark.parametrize("sizes", [(2,), (1, 0, 1, 1)], ids=str)
def test_a_process_without_a_row_is_an_error(write, sizes):
    paths = write(sizes)
    read(RowStream(paths, seed=0, rank=1, num_ranks=4), 5)
    message = message_of(paths, rank=3, num_ranks=4)
    assert "process 4 of 4 is left without a row; use fewer processes or more rows" in message


def test_an_empty_file_among_others_is_passed_over(write):
    paths = write([4, 0, 5])
    assert sorted(row for _, row, _ in read(RowStream(paths, seed=0), 9)) == list(range(9))
    assert "process 1 of 1 is left without a row" in message_of(paths[1:2])


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("no/such/file.jsonl", "no such file or folder"),
        ("./rows", "no such file or folder"),
        ("data/train.jsonl", "no such file or folder"),
        ("rows", "no such file or folder"),
        ("~/rows", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("nothing/*", "no such file or folder"),
        ("https://host/rows", "unknown kind of file: the URL has to end in .jsonl"),
        ("https://host/rows.csv?x=.jsonl", "unknown kind of file"),
    ],
)
def test_a_mistyped_path_is_found_without_a_network(path, what):
    assert message_of([path]).startswith(f"1 fault in the input:\n{path}: {what}")


def test_no_path_at_all():
    assert "no file is named" in message_of([])


def test_local_files_are_checked_without_heavy_imports(tmp_path):
    write_file(tmp_path / "rows.jsonl", make_rows(3))
    code = (
        "import sys; from bge_accel.data.streaming import RowStream\n"
        f"RowStream([{str(tmp_path)!r}], seed=0).take(5)\n"
        "try: RowStream(['nothing.jsonl', 'owner/name'], seed=0)\n"
        "except ValueError as error: assert 'nothing.jsonl: no such file' in str(error)\n"
        "else: assert False\n"
        "assert not {'datasets', 'torch', 'pyarrow', 'fsspec'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- from elsewhere


class FlakyFile(MemoryFile):
    def read(self, *args):
        FlakySystem.reads += 1
        if FlakySystem.reads % 3 == 0:
            raise TimeoutError("lost")
        return super().read(*args)


class FlakySystem(MemoryFileSystem):
    """Every third read fails."""

    protocol = "flaky"
    reads = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky:/"))

    def _open(self, path, mode="rb", **kwargs):
        data = super()._open(path, mode, **kwargs).getvalue()
        return FlakyFile(self, path, data)


@pytest.fixture
def remote():
    """Writes files for URLs memory://rows/NAME."""
    system = fsspec.filesystem("memory")
    system.store.clear()

    def write(name, rows):
        data = encode(rows, name)
        system.pipe(f"/rows/{name}", data)
        return f"memory://rows/{name}"

    yield write
    system.store.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_urls_give_the_same_rows_as_files(write, kind):
    paths = write([30, 31], kind)
    system = fsspec.filesystem("memory")
    for path in paths:
        system.put(path, f"/same/{os.path.basename(path)}")
    kwargs = {"seed": 5, "buffer_size": 8}
    local, remote = RowStream(paths, **kwargs), RowStream([f"memory://same/*{kind}"], **kwargs)
    assert read(remote, 77) == read(local, 77)
    state = again(remote)
    assert state == again(local)
    assert read(RowStream([f"memory://same/*{kind}"], **kwargs, state=state), 50) == read(local, 50)
    assert remote.take(1)[0][0].place(0).startswith("memory://")


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet"])
def test_lost_connections_are_made_again(write, monkeypatch, kind):
    from datasets import config

    monkeypatch.setattr(config, "STREAMING_READ_RETRY_INTERVAL", 0)
    fsspec.register_implementation("flaky", FlakySystem, clobber=True)
    paths = write([40], kind)
    MemoryFileSystem().put(paths[0], f"/lost/rows{kind}")
    FlakySystem.reads = 0
    assert read(RowStream([f"flaky://lost/rows{kind}"], seed=5, buffer_size=8), 100) == read(
        RowStream(paths, seed=5, buffer_size=8), 100
    )
    assert FlakySystem.reads > 3


def test_faults_of_urls(remote):
    good, bad = remote("good.jsonl", make_rows(3)), remote("bad.jsonl", [{"query": "q"}])
    assert f'{bad}:1: "pos" is missing' in message_of([good, bad])
    assert "memory://rows/none.jsonl: cannot be opened (FileNotFoundError): /rows/none.jsonl" in message_of(
        [good, "memory://rows/none.jsonl"]
    )
    assert "memory://none/*.jsonl: cannot be opened (FileNotFoundError): no file there has such a name" in message_of(
        ["memory://none/*.jsonl"]
    )
    assert "nonsense://a/b.jsonl: cannot be opened (ValueError): Protocol not known" in message_of(
        ["nonsense://a/b.jsonl"]
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Lets owner/name stand for a folder, as the hub's files have names of their commit."""
    import datasets

    real, asked = datasets.load_dataset_builder, []

    def load(name, config=None, *, revision=None):
        asked.append((name, config, revision))
        return real(str(tmp_path / f"repo@{revision or 'a' * 40}"), config)

    monkeypatch.setattr(datasets, "load_dataset_builder", load)

    def add(commit, files, card=""):
        folder = tmp_path / f"repo@{commit}"
        for name, rows in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(folder / name, rows)
        (folder / "README.md").write_text(f"---\n{card}\n---\n")

    add.asked = asked
    return add


def test_hub_datasets_are_named_with_configuration_and_split(hub):
    card = (
        "configs:\n- {config_name: one, default: true, data_files: [{split: train, path: one/train*}, {split: test, path: one/test*}]}\n"
        "- {config_name: two, data_files: two/*}"
    )
    files = {"one/train-0.parquet": 2, "one/train-1.parquet": 3, "one/test.parquet": 4, "two/x.parquet": 5}
    hub("a" * 40, {name: make_rows(n) for name, n in files.items()}, card)
    for path, names in {
        "owner/name": ["train-0", "train-1"],
        "owner/name:one": ["train-0", "train-1"],
        "owner/name:one:test": ["test"],
        "owner/name::test": ["test"],
        "owner/name:two": ["x"],
    }.items():
        found, sizes, revisions = find_stream_files([path], {})
        assert [os.path.basename(file) for file in found] == [f"{name}.parquet" for name in names]
        assert sizes == [os.path.getsize(file) for file in found] and revisions == {"owner/name": "a" * 40}
    assert len(read_epochs(RowStream(["owner/name:two:train"], seed=0), 1)) == 5
    assert "owner/name:one:dev: is no file or folder here, and cannot be had from the hub (ValueError): it has no files of a split 'dev', only of train, test" in (
        message_of(["owner/name:one:dev"])
    )  # fmt: skip
    assert "Available: ['one', 'two']" in message_of(["owner/name:three"])


def test_a_resumed_stream_stays_at_the_commit_of_the_hub(hub):
    hub("a" * 40, {"rows.jsonl": make_rows(30)})
    stream = RowStream(["owner/name"], seed=0, buffer_size=7)
    read(stream, 40)
    state = again(stream)
    assert state["revisions"] == {"owner/name": "a" * 40}
    resumed = RowStream(["owner/name"], seed=0, buffer_size=7, state=state)
    assert hub.asked == [("owner/name", None, None), ("owner/name", None, "a" * 40)]
    assert read(resumed, 40) == read(stream, 40)


def test_a_hub_that_cannot_be_reached_is_said():
    message = message_of(["owner/no-such-name"])
    assert message.startswith("1 fault in the input:\nowner/no-such-name: is no file or folder here, and cannot be had")


class PlainHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def copyfile(self, *args):
        with contextlib.suppress(ConnectionError):
            super().copyfile(*args)


class RangeHandler(PlainHandler):
    """Serves parts of files, as every real server of data does."""

    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if not asked or not os.path.isfile(path):
            return super().do_GET()
        with open(path, "rb") as file:
            data = file.read()
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])


@pytest.fixture
def serve(tmp_path):
    servers = []

    def serve(handler=RangeHandler):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_over_http(tmp_path, serve, kind):
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
    # More than one request: what does not compress, in a file above fsspec's 5 MB
    noise = random.Random(0)
    rows = [{"query": f"query {i}", "pos": [noise.randbytes(3000).hex()]} for i in range(2000)]
    path, url = write_file(tmp_path / f"rows{kind}", rows, row_group_size=500), f"{serve()}/rows{kind}"
    kwargs = {"seed": 1, "buffer_size": 300}
    remote, local = RowStream([url], **kwargs), RowStream([path], **kwargs)
    assert read(remote, 2500) == read(local, 2500)
    assert again(remote)["stream"] == again(local)["stream"]
    assert read(RowStream([url + "?download=true"], **kwargs, state=again(remote)), 50) == read(local, 50)


def test_http_faults(tmp_path, serve):
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
    url = serve()
    assert f"{url}/none.jsonl: cannot be opened (FileNotFoundError): 404" in message_of([f"{url}/none.jsonl"])
    assert "Cannot connect to host 127.0.0.1:9" in message_of(["http://127.0.0.1:9/rows.jsonl"])
    noise = random.Random(0)
    rows = [{"query": f"query {i}", "pos": [noise.randbytes(3000).hex()]} for i in range(2000)]
    write_file(tmp_path / "rows.jsonl", rows)
    plain = f"{serve(PlainHandler)}/rows.jsonl"
    assert f"{plain}: cannot be read: The HTTP server doesn't appear to support range requests" in message_of([plain])
