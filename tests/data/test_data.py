"""Training rows: what is wrong with them is said with its place, and what is drawn from them depends on the seed alone."""

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import chain

import pytest
from backports import zstd

from bge_accel.data.examples import (
    BYTES_PER_TOKEN,
    RowOrder,
    balanced_positions,
    batch_positions,
    draw_example,
    equal_shares,
    expected_tokens,
)
from bge_accel.data.reading import check_training_row, read_rows, text_id
from bge_accel.data.rows import TrainingRows
from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files
from bge_accel.files.text import shorten

GOOD = {"query": "who", "pos": ["king"], "neg": ["queen", "jack"]}


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else lines(content))
        return str(path)

    return write


def places(rows):
    return [rows.place(index) for index in range(len(rows))]


def message_of(paths, **kwargs):
    with pytest.raises(ValueError) as error:
        TrainingRows(paths, **kwargs)
    return str(error.value)


# ---- faults

ROW_FAULTS = [
    ({"pos": ["a"]}, '"query" is missing: every row needs {"query": str, "pos": [str, ...]}'),
    ({"query": 5, "pos": ["a"]}, '"query" is 5: it has to be a string'),
    ({"query": None, "pos": ["a"]}, '"query" is null: it has to be a string'),
    ({"query": " \t", "pos": ["a"]}, '"query" is empty: remove the row or fill it in'),
    ({"query": "q"}, '"pos" is missing: every row needs at least one positive text, as a list'),
    ({"query": "q", "pos": "text"}, '"pos" is "text": it has to be a list of strings, like ["..."]'),
    ({"query": "q", "pos": None}, '"pos" is null: it has to be a list of strings'),
    (
        {"query": "q", "pos": []},
        '"pos" is empty: every row needs at least one positive text; remove the row or add one',
    ),
    ({"query": "q", "pos": ["a", 3]}, '"pos"[1] is 3: it has to be a string'),
    ({"query": "q", "pos": ["a", ["b"]]}, '"pos"[1] is ["b"]: it has to be a string'),
    ({"query": "q", "pos": [""]}, '"pos"[0] is empty: remove it or fill it in'),
    ({"query": "q", "pos": ["a"], "neg": "x"}, '"neg" is "x": it has to be a list of strings, like ["..."]'),
    ({"query": "q", "pos": ["a"], "neg": {}}, '"neg" is {}: it has to be a list of strings'),
    ({"query": "q", "pos": ["a"], "neg": ["b", None]}, '"neg"[1] is null: it has to be a string'),
    ({"query": "q", "pos": ["a"], "neg": ["\n"]}, '"neg"[0] is empty: remove it or fill it in'),
    ({"query": "q", "pos": ["b", "a"], "neg": ["c", "a"]}, '"neg" holds a text that is also in "pos": "a"; remove it'),
    ({"query": "q", "pos": ["a"], "pos_scores": [1, 2]}, '"pos_scores" is [1, 2]: it needs one number for each of 1'),
    ({"query": "q", "pos": ["a"], "pos_scores": 1}, '"pos_scores" is 1: it needs one number for each of 1 texts'),
    ({**GOOD, "neg_scores": [0.5]}, '"neg_scores" is [0.5]: it needs one number for each of 2 texts'),
    ({"query": "q", "pos": ["a"], "neg_scores": [""]}, '"neg_scores" is [""]: it needs one number for each of 0 texts'),
    ({**GOOD, "neg_scores": [1, math.nan]}, '"neg_scores" is [1, NaN]: every score has to be a finite number'),
    ({**GOOD, "pos_scores": [-math.inf]}, '"pos_scores" is [-Infinity]: every score has to be a finite number'),
    ({**GOOD, "pos_scores": ["0.5"]}, '"pos_scores" is ["0.5"]: every score has to be a finite number'),
    ({**GOOD, "pos_scores": [True]}, '"pos_scores" is [true]: every score has to be a finite number'),
    ({**GOOD, "prompt": 3}, '"prompt" is 3: it has to be a string'),
]
LINE_FAULTS = [
    (b'{"query": "q", ', "not JSON ("),
    (b"query,pos", 'not JSON (Expecting value: line 1 column 1 (char 0)): "query,pos'),
    (b"[1, 2]", "an array where an object {...} is expected: [1, 2]"),
    (b'"text"', 'a plain value where an object {...} is expected: "text"'),
    (b"7", "a plain value where an object {...} is expected: 7"),
    (b"null", "a plain value where an object {...} is expected: null"),
    (b'{"query": "\xff"}', "broken UTF-8 at byte 11 of the line"),
    (b"[" * 100_000, "not JSON (maximum recursion depth exceeded"),
    *((json.dumps(row).encode(), what) for row, what in ROW_FAULTS),
]


@pytest.mark.parametrize(("line", "what"), LINE_FAULTS, ids=[shorten(what, 60) for _, what in LINE_FAULTS])
def test_a_fault_is_shown_with_file_line_and_remedy(write, line, what):
    path = write("train.jsonl", lines([GOOD]) + b"\n" + line + b"\n" + lines([GOOD]))
    message = message_of([path])
    assert message.startswith(f"1 fault in the input:\n{path}:3: {what}") and len(message.splitlines()) == 2


@pytest.mark.parametrize(("row", "what"), ROW_FAULTS, ids=[shorten(what, 60) for _, what in ROW_FAULTS])
def test_check_training_row_finds_one_fault_in_each(row, what):
    (found,) = check_training_row(row)
    assert found.startswith(what)


def test_all_faults_of_a_row_are_found():
    wrong = check_training_row({"query": "", "pos": [1, ""], "neg": "x", "pos_scores": [1], "prompt": []})
    assert [what.split(" is ")[0] for what in wrong] == [
        '"query"', '"pos"[0]', '"pos"[1]', '"pos_scores"', '"neg"', '"prompt"'
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row", [GOOD, {"query": "q", "pos": ["a", "a"]}, {**GOOD, "neg": None}, {**GOOD, "neg": [], "neg_scores": []},
            {**GOOD, "prompt": None, "pos_scores": None, "type": "other keys are free"}]
)  # fmt: skip
def test_check_training_row_passes_what_is_right(row):
    assert check_training_row(row) == []


@pytest.mark.parametrize("key", ["query", "pos", "neg"])
def test_half_a_surrogate_pair_which_no_tokenizer_takes_is_a_fault(write, key):
    path = write("a.jsonl", json.dumps({**GOOD, key: "a \ud83d" if key == "query" else ["a \ud83d"]}).encode())
    assert f"\n{path}:1: " in message_of([path])


def test_long_values_are_cut_in_messages():
    (found,) = check_training_row({"query": ["x" * 500], "pos": ["a"]})
    assert len(found) < 130 and "..." in found


def test_ten_faults_are_shown_and_all_are_counted(write):
    first = write("a.jsonl", [{"query": "q", "pos": []}] * 9 + [GOOD])
    message = message_of([first, write("b.jsonl", [{"query": "", "pos": [""]}] * 8), "nowhere.jsonl"])
    shown = message.splitlines()
    assert shown[0] == "26 faults in the input:" and shown[-1] == "... and 16 more" and len(shown) == 12
    assert shown[1].startswith("nowhere.jsonl: ") and shown[10].startswith(f"{first}:9: ")


def test_exactly_ten_faults_leave_no_more(write):
    message = message_of([write("a.jsonl", [{"query": "q", "pos": []}] * 10)])
    assert message.startswith("10 faults") and len(message.splitlines()) == 11 and "more" not in message


ROWS = [{"query": f"question {number} 检索 😀", "pos": [f"answer {number}"], "neg": ["x"]} for number in range(2000)]


def unfinished_zst(rows):
    """What a writer leaves behind that flushed whole rows and died: without its last bytes no end, but no broken row."""
    compressor = zstd.ZstdCompressor()
    parts = [rows[start : start + 100] for start in range(0, len(rows), 100)]
    return b"".join(compressor.compress(lines(part), zstd.ZstdCompressor.FLUSH_BLOCK) for part in parts)[:-1]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b"", "the file is empty; remove it from the list or fill it"),
        ("a.jsonl", b"\n  \n", "the file is empty"),
        ("a.json", b"[]", "the file is empty"),
        ("a.jsonl.gz", gzip.compress(b""), "the file is empty"),
        ("a.csv", lines([GOOD]), "unknown kind of file: its name has to end in .jsonl, .json"),
        ("a.jsonl.gz", lines([GOOD]), "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-20], "cannot be read: Compressed file ended before"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), 0)[:-8] + b"\0" * 8, "cannot be read: CRC check failed"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:10] + b"\xff" * 40, "cannot be read: "),
        ("a.jsonl.zst", lines([GOOD]), "cannot be read: "),
        ("a.jsonl.zst", unfinished_zst(ROWS), "cannot be read: "),
        ("a.json", b'[{"query": "q", "pos": ["a"]}', "not JSON ("),
        ("folder.jsonl/a.txt", b"", "no file in this folder ends in .jsonl, .json"),
    ],
    ids=["empty", "blank", "array", "gz-empty", "csv", "gz-plain", "gz-cut", "gz-crc", "gz-corrupt", "zst-plain",
         "zst-cut", "array-cut", "folder"],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(write, name, content, what):
    path = os.path.dirname(write(name, content)) if "/" in name else write(name, content)
    message = message_of([path])
    assert message.startswith("1 fault in the input:\n") and f"\n{path}: {what}" in message


def test_a_missing_file_is_named(tmp_path):
    for path in (f"{tmp_path}/no.jsonl", f"{tmp_path}/*.jsonl"):
        assert message_of([path]) == f"1 fault in the input:\n{path}: no such file or folder"


def test_an_item_of_an_array_is_named_by_its_number(write):
    path = write("a.json", json.dumps([GOOD, {"query": "q", "pos": []}, 3], indent=1).encode())
    message = message_of([path])
    assert f'{path}:2: "pos" is empty' in message and f"{path}:3: a plain value" in message


def test_null_in_an_array_is_a_fault(write):
    path = write("a.json", json.dumps([GOOD, None]).encode())
    assert f"{path}:2: a plain value where an object" in message_of([path])


def test_all_faulty_files_are_reported_at_once(write):
    message = message_of([write("a.jsonl", b""), "nowhere", write("b.jsonl", [{"query": "q"}])])
    assert message.startswith("3 faults") and "a.jsonl: " in message and "b.jsonl:1: " in message


# ---- reading


def formats(rows):
    plain, array = lines(rows), json.dumps(rows, ensure_ascii=False).encode()
    half = lines(rows[:1000])
    rest = plain[len(half) :]
    return {
        "plain.jsonl": plain,
        "lines.json": plain,
        "array.json": array,
        "array.jsonl": array,
        "indented.json": b"\n " + json.dumps(rows, indent=2).encode() + b"\n",
        "a.jsonl.gz": gzip.compress(plain),
        "a.json.gz": gzip.compress(array),
        "members.jsonl.gz": gzip.compress(half) + gzip.compress(rest),
        "a.jsonl.zst": zstd.compress(plain),
        "a.json.zst": zstd.compress(array),
        "frames.jsonl.zst": zstd.compress(half) + zstd.compress(rest),
        "bom.jsonl": b"\xef\xbb\xbf" + plain,
        "bom.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + plain),
        "bom_array.json": b"\xef\xbb\xbf" + array,
        "no_newline.jsonl": plain.rstrip(b"\n"),
        "windows.jsonl": plain.replace(b"\n", b"\r\n"),
    }


@pytest.mark.parametrize("name", formats(ROWS))
def test_every_format_gives_the_same_rows_and_places(write, name):
    path = write(name, formats(ROWS)[name])
    rows = TrainingRows([path])
    assert list(rows) == ROWS
    assert [rows.place(index) for index in (0, 1, 1999)] == [f"{path}:1", f"{path}:2", f"{path}:2000"]


def test_blank_lines_are_skipped_but_counted(write):
    path = write("a.jsonl", b"\n" + lines(ROWS[:1]) + b"  \n\n" + lines(ROWS[1:2]))
    rows = TrainingRows([path])
    assert list(rows) == ROWS[:2] and [rows.place(0), rows.place(1)] == [f"{path}:2", f"{path}:5"]


def test_rows_are_read_one_at_a_time(write):
    faults = Faults()
    reader = read_rows(write("a.jsonl", lines(ROWS[:3]) + b"broken"), faults)
    assert [next(reader)[1:] for _ in range(3)] == [(number + 1, ROWS[number]) for number in range(3)]
    assert faults.count == 0 and list(reader) == [] and faults.count == 1


def test_folders_and_globs_are_read_in_the_order_of_names(write, tmp_path):
    for number, name in enumerate(["d/b.jsonl", "d/a.json", "d/c.jsonl.gz", "d/sub/z.jsonl", "d/README.md", "e.jsonl"]):
        content = lines(ROWS[number : number + 1])
        write(name, gzip.compress(content) if name.endswith("gz") else content)
    folder = str(tmp_path / "d")
    assert list(TrainingRows([folder])) == [ROWS[1], ROWS[0], ROWS[2]]
    assert list(TrainingRows([f"{folder}/*.jsonl", str(tmp_path / "e.jsonl")])) == [ROWS[0], ROWS[5]]
    assert list(TrainingRows([f"{tmp_path}/[de]*"])) == [ROWS[1], ROWS[0], ROWS[2], ROWS[5]]
    faults = Faults()
    assert find_files([str(tmp_path / "e.jsonl"), folder], faults)[0].endswith("e.jsonl") and not faults.count


def test_rows_as_flag_embedding_has_them(write):
    toy = [
        {"query": "Five women walk along a beach", "pos": ["Some women are on a beach"], "neg": ["A man"] * 3,
         "pos_scores": [0.9], "neg_scores": [0.1, -2, 3e-4], "prompt": "Represent this sentence: ", "type": "normal",
         "pos_id": [1], "neg_id": [2, 3, 4]},
        {"query": "A woman", "pos": ["She", "A lady"], "neg": [], "type": "symmetric_class"},
    ]  # fmt: skip
    used = {"query", "pos", "neg", "pos_scores", "neg_scores", "prompt"}  # other keys are left aside
    kept = [{key: value for key, value in row.items() if key in used} for row in toy]
    assert list(TrainingRows([write("toy.jsonl", toy)])) == kept


@pytest.mark.parametrize(
    ("row", "passes"),
    [
        (GOOD, False),
        ({**GOOD, "pos_scores": [1]}, False),
        ({**GOOD, "neg_scores": [1, 2]}, False),
        ({**GOOD, "pos_scores": [1], "neg_scores": None}, False),
        ({**GOOD, "pos_scores": [1], "neg_scores": [1, 2]}, True),
        ({"query": "q", "pos": ["a"], "pos_scores": [1]}, False),
    ],
)
def test_scores_are_demanded_for_distillation(write, row, passes):
    path = write("a.jsonl", [row])
    if passes:
        assert len(TrainingRows([path], need_scores=True)) == 1
    else:
        what = 'no "pos_scores" or "neg_scores": distillation needs a negative, and all scores'
        assert f"\n{path}:1: {what}" in message_of([path], need_scores=True)


# ---- the sample of a large file


def test_a_large_file_is_cut_to_a_sample_in_order(write):
    large, small = write("large.jsonl", ROWS), write("small.jsonl", ROWS[:5])
    rows = TrainingRows([large, small], max_rows_per_file=50, seed=3)
    assert list(rows)[50:] == ROWS[:5] and len(rows) == 55
    chosen = [int(place.rpartition(":")[2]) for place in places(rows)[:50]]
    assert chosen == sorted(set(chosen)) and list(rows)[:50] == [ROWS[line - 1] for line in chosen]
    assert min(chosen) < 400 and max(chosen) > 1600  # from all over the file
    assert places(rows) == places(TrainingRows([large, small], max_rows_per_file=50, seed=3))
    assert places(rows) != places(TrainingRows([large, small], max_rows_per_file=50, seed=4))


def test_the_sample_depends_on_the_data_not_on_the_folder(write, tmp_path, monkeypatch):
    here, there = write("here/a.jsonl", ROWS), write("there/a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path / "here")
    samples = [list(TrainingRows([path], max_rows_per_file=50, seed=3)) for path in (here, there, "a.jsonl")]
    assert samples[0] == samples[1] == samples[2]


# ---- order


@pytest.mark.parametrize("num_rows", [1, 2, 7, 100])
def test_each_row_comes_once_an_epoch(num_rows):
    order = RowOrder(num_rows, seed=5)
    seen = [order[position] for position in range(3 * num_rows)]
    assert [epoch for epoch, _ in seen] == [position // num_rows for position in range(3 * num_rows)]
    for epoch in range(3):
        assert sorted(row for e, row in seen if e == epoch) == list(range(num_rows))


def test_a_position_depends_on_seed_and_position_alone():
    sequential = [RowOrder(13, seed=5)[position] for position in range(130)]
    order = RowOrder(13, seed=5)
    for position in [129, 0, 64, *range(0, 130, 7), *range(129, -1, -1)]:
        assert order[position] == sequential[position]


def test_the_order_differs_between_epochs_and_seeds():
    orders = {
        tuple(RowOrder(50, seed)[epoch * 50 + i][1] for i in range(50)) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16 and tuple(range(50)) not in orders


@pytest.mark.parametrize("total", [1, 3, 8, 21, 24, 25])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_global_batch_is_the_same_for_every_number_of_processes(world, total):
    per_process = 8 // world
    seen = []
    for batch in range(math.ceil(total / 8)):
        shares = [list(batch_positions(batch, per_process, world, rank, total)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1  # equally many on every process
        left = total - batch * 8
        assert len(shares[0]) == (per_process if left >= 8 else math.ceil(left / world))
        together = list(chain(*shares))
        assert together == list(range(batch * 8, batch * 8 + len(shares[0]) * world))
        seen += together
    assert seen == list(range(len(seen))) and total <= len(seen) < total + world
    full = [position for rank in range(world) for position in batch_positions(3, per_process, world, rank, None)]
    assert full == list(range(24, 32))


# ---- shares of as many tokens


@pytest.mark.parametrize("seed", range(20))
def test_shares_have_as_many_items_and_nearly_equal_costs(seed):
    rng = random.Random(seed)
    num_shares, size = rng.randint(1, 12), rng.randint(1, 40)
    costs = [int(rng.lognormvariate(4, 1)) for _ in range(num_shares * size)]
    shares = equal_shares(costs, num_shares)
    assert sorted(chain(*shares)) == list(range(len(costs)))
    assert all(share == sorted(share) and len(share) == size for share in shares)
    laden = [sum(costs[item] for item in share) for share in shares]
    # The last item that a share got came when it was the least laden of those with room.
    assert max(laden) - min(laden) <= max(costs)
    if size >= 16:
        in_order = [sum(costs[i * size : (i + 1) * size]) for i in range(num_shares)]
        assert max(laden) - min(laden) <= (max(in_order) - min(in_order)) / 4


@pytest.mark.parametrize("costs", [[], [7], [3, 3, 3, 3], [0, 0, 9, 0]])
def test_shares_of_few_or_equal_items(costs):
    for num_shares in (count for count in (1, 2, 4) if len(costs) % count == 0):
        assert sorted(chain(*equal_shares(costs, num_shares))) == list(range(len(costs)))


@pytest.mark.parametrize("total", [None, 60, 85, 90])
@pytest.mark.parametrize(("world", "per_process"), [(1, 8), (2, 4), (3, 5), (11, 2), (20, 400)])
def test_balanced_shares_are_together_the_same_global_batch(world, per_process, total):
    looked_at = set()

    def cost(position):
        looked_at.add(position)
        return random.Random(position).randint(1, 1000)

    batch = 0 if total is None else total // (world * per_process)
    if total is not None and total <= batch * world * per_process:
        batch -= 1
    together, plain = [], []
    for rank in range(world):
        looked_at.clear()
        share = list(balanced_positions(batch, per_process, world, rank, total, cost))
        assert share == sorted(share)
        together += share
        plain.append(list(batch_positions(batch, per_process, world, rank, total)))
        assert len(share) == len(plain[-1])
        assert len(looked_at) <= max(8 * per_process, 1024)
    assert sorted(together) == list(chain(*plain))


def test_groups_of_processes_keep_to_their_own_rows():
    shares = [balanced_positions(0, 400, 20, rank, None, lambda position: position % 97) for rank in range(20)]
    for first, end in ((0, 8), (8, 16), (16, 20)):
        assert sorted(chain(*shares[first:end])) == list(range(first * 400, end * 400))


def test_lengths_of_texts_are_those_of_the_texts(write):
    texts = ["", "a", "é" * 3, "检索", "😀", "word " * 50]
    rng = random.Random(1)
    data = [
        {
            "query": f"q{i}" + rng.choice(texts),
            "pos": [f"p{i}" + rng.choice(texts) for _ in range(rng.randint(1, 3))],
            **({} if i % 5 == 0 else {"neg": [f"n{i}" + rng.choice(texts) for _ in range(rng.randint(0, 4))]}),
        }
        for i in range(2100)
    ]
    without = [{"query": row["query"], "pos": row["pos"]} for row in data[:3]]
    paths = [write("a.jsonl", data), write("b.jsonl", without)]
    for rows in (TrainingRows(paths), TrainingRows(paths, max_rows_per_file=900, seed=2)):
        for index in [*random.Random(2).sample(range(len(rows)), 500), 0, len(rows) - 1]:
            row = rows[index]
            query, positives, negatives = rows.text_bytes(index)
            assert query == len(row["query"].encode())
            assert positives == [len(text.encode()) for text in row["pos"]]
            assert negatives == [len(text.encode()) for text in row.get("neg") or []]
        with pytest.raises(IndexError):
            rows.text_bytes(len(rows))


@pytest.mark.parametrize("group_size", [1, 2, 4, 9])
def test_expected_tokens_are_those_of_the_texts_that_are_drawn(write, group_size):
    rng = random.Random(3)
    data = [
        {"query": "q" * rng.randint(1, 99), "pos": ["p" * rng.randint(1, 300) for _ in range(3)],
         "neg": ["n" * rng.randint(1, 300) for _ in range(5)]}
        for _ in range(40)
    ]  # fmt: skip
    rows = TrainingRows([write("a.jsonl", [*data, {"query": "none", "pos": ["p" * 40]}])])
    settings = {"seed": 4, "group_size": group_size}
    for row in range(40):
        for epoch in (0, 1):
            example = draw_example(rows, row, epoch, **settings)
            expected = min(len(example.query) // BYTES_PER_TOKEN, 16)
            expected += sum(min(len(text) // BYTES_PER_TOKEN, 50) for text in example.passages)
            lengths = rows.text_bytes(row)
            assert expected_tokens(lengths, row, epoch, **settings, query_max_len=16, passage_max_len=50) == expected
    lengths = rows.text_bytes(40)
    found = expected_tokens(lengths, 40, 0, **settings, query_max_len=16, passage_max_len=50)
    assert found == 1 + 10 + 25 * (group_size - 1), "other rows' passages are taken to be of half the length"


# ---- drawing


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Fifty rows: two positives and four negatives each, a score that names its text, every third with a prompt."""
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    data = [
        {"query": f"q{i}", "pos": [f"p{i}.{j}" for j in range(2)], "neg": [f"n{i}.{j}" for j in range(4)],
         "pos_scores": [float(f"{i}.{j}") for j in range(2)], "neg_scores": [-float(f"{i}.{j}") for j in range(4)],
         "prompt": f"ask {i}: " if i % 3 == 0 else None}
        for i in range(50)
    ]  # fmt: skip
    path.write_bytes(lines(data))
    return TrainingRows([str(path)])


def test_a_draw_depends_on_seed_epoch_and_row_alone(rows):
    def draw(seed=1, epoch=0):
        return [draw_example(rows, row, epoch, seed=seed, group_size=4) for row in range(50)]

    first = draw()
    assert [draw_example(rows, row, 0, seed=1, group_size=4) for row in reversed(range(50))] == first[::-1]
    assert draw(seed=2) != first and draw(epoch=1) != first
    drawn = {tuple(text.partition(".")[2] for text in example.passages) for example in first}
    assert len(drawn) > 10  # not the same places in every row


@pytest.mark.parametrize("group_size", [1, 2, 4, 5, 6, 9, 12])
def test_every_negative_is_used_before_any_repeats(rows, group_size):
    positives = Counter()
    for epoch in range(20):
        example = draw_example(rows, 7, epoch, seed=0, group_size=group_size)
        positives[example.passages[0]] += 1
        counts = [example.passages[1:].count(f"n7.{j}") for j in range(4)]
        assert sum(counts) == group_size - 1 and max(counts) - min(counts) <= 1
    assert set(positives) == {"p7.0", "p7.1"}


def test_every_negative_gets_its_turn_over_the_epochs(rows):
    drawn = Counter(draw_example(rows, 7, epoch, seed=0, group_size=2).passages[1] for epoch in range(400))
    assert len(drawn) == 4 and min(drawn.values()) > 60  # 100 each, give or take


def test_an_example_carries_ids_of_texts_as_they_stand_in_the_data(rows):
    example = draw_example(rows, 7, 0, seed=0, group_size=3, query_prefix=lambda _: "ask ", passage_prefix="read ")
    assert example.row == 7 and example.query == "ask q7" and example.teacher_scores is None
    assert all(text.startswith("read ") for text in example.passages)
    assert example.passage_ids == [text_id(text.removeprefix("read ")) for text in example.passages]
    assert sorted(example.known_ids) == sorted([text_id("p7.0"), text_id("p7.1")])


def test_a_row_brings_its_own_prompt(rows):
    def query(row, prefix):
        return draw_example(rows, row, 0, seed=0, group_size=1, query_prefix=prefix).query

    assert query(3, lambda prompt: prompt or "default ") == "ask 3: q3"
    assert query(4, lambda prompt: "default " if prompt is None else prompt) == "default q4"
    assert draw_example(rows, 3, 0, seed=0, group_size=1).query == "q3"


@pytest.mark.parametrize("group_size", [1, 3, 5, 11])
def test_teacher_scores_stand_beside_their_texts(rows, group_size):
    for row in range(50):
        example = draw_example(rows, row, 1, seed=9, group_size=group_size, passage_prefix="p: ", teacher_scores=True)
        expected = [float(text[4:]) * (1 if text[3] == "p" else -1) for text in example.passages]
        assert example.teacher_scores == expected


@pytest.fixture
def few(write):
    """Rows 0 and 1 ask the same and have no negatives; row 2 has one."""
    data = [
        {"query": "same", "pos": ["a", "b"]},
        {"query": "same", "pos": ["b", "c"], "neg": []},
        {"query": "other", "pos": ["d", "a"], "neg": ["e", "c"]},
    ]
    return TrainingRows([write("few.jsonl", data)])


def test_known_positives_are_those_of_every_row_with_the_query(few):
    assert [few.known_positives(row) for row in range(3)] == [{"a", "b", "c"}, {"a", "b", "c"}, {"d", "a"}]
    assert sorted(draw_example(few, 1, 0, seed=0, group_size=1).known_ids) == sorted(map(text_id, "abc"))


def test_without_negatives_other_rows_passages_serve_but_no_known_positive(few):
    for row, own in [(0, "ab"), (1, "bc")]:
        drawn = [draw_example(few, row, epoch, seed=0, group_size=4).passages for epoch in range(60)]
        assert {passages[0] for passages in drawn} == set(own)
        assert {text for passages in drawn for text in passages[1:]} == {"d", "e"}  # positives and negatives of others
        assert drawn == [draw_example(few, row, epoch, seed=0, group_size=4).passages for epoch in range(60)]


@pytest.mark.parametrize(
    "data", [[{"query": "q", "pos": ["a"]}], [{"query": "q", "pos": ["a"]}, {"query": "q", "pos": ["b"]}],
             [{"query": "q", "pos": ["a", "b"]}, {"query": "r", "pos": ["b"], "neg": ["a"]}]]
)  # fmt: skip
def test_a_row_for_which_no_negative_exists_is_named(write, data):
    path = write("a.jsonl", data)
    rows = TrainingRows([path])
    assert draw_example(rows, 0, 0, seed=0, group_size=1).passages[0] in "ab"
    with pytest.raises(ValueError, match=f"^{re.escape(path)}:1: the row has no negatives.*--train_group_size 1"):
        draw_example(rows, 0, 0, seed=0, group_size=2)


LONG = " ".join(f"word{number}" for number in range(40))


def test_shuffling_reorders_the_thirds_of_long_positives_alone(write):
    short = "s " * 50
    data = [{"query": LONG, "pos": [LONG], "neg": [LONG + " x"]}, {"query": "q", "pos": [short], "neg": ["n"]}]
    rows = TrainingRows([write("a.jsonl", data)])
    seen = set()
    for epoch in range(60):
        example = draw_example(rows, 0, epoch, seed=0, group_size=2, shuffle_ratio=1.0, passage_prefix="p: ")
        seen.add(text := example.passages[0].removeprefix("p: "))
        assert sorted(text.replace(" ", "")) == sorted(LONG.replace(" ", ""))
        assert example.passages[1] == f"p: {LONG} x" and example.query == LONG
        assert example.passage_ids[0] == text_id(LONG)
        assert draw_example(rows, 1, epoch, seed=0, group_size=2, shuffle_ratio=1.0).passages == [short, "n"]
    assert len(seen) == 6  # every order of three parts
    unshuffled = [
        draw_example(rows, 0, e, seed=0, group_size=1, shuffle_ratio=0.5).passages[0] == LONG for e in range(400)
    ]
    assert 150 < sum(unshuffled) < 250


def test_text_ids_tell_texts_apart():
    texts = ["", "a", "A", "a ", "é", "e\u0301", "检索", "😀", "\ud800", *(str(number) for number in range(1000))]
    ids = [text_id(text) for text in texts]
    assert len(set(ids)) == len(texts) and all(-(2**63) <= value < 2**63 for value in ids)
    assert min(ids) < 0 < max(ids)


def test_ids_and_draws_are_the_same_in_every_process(rows):
    path = rows.files[0].path
    code = f"""
from bge_accel.data.examples import draw_example
from bge_accel.data.reading import text_id
from bge_accel.data.rows import TrainingRows
rows = TrainingRows([{path!r}], max_rows_per_file=20, seed=1)
print([text_id(text) for text in ("", "a", "\\u68c0\\u7d22")], [rows.place(i) for i in range(20)])
for row in range(20):
    e = draw_example(rows, row, 2, seed=1, group_size=6)
    print(e.query, e.passages, e.passage_ids, sorted(e.known_ids))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1 and str(text_id("检索")) in outputs.pop()
