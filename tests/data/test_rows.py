"""Rows from the cache: read once, whatever the format and however many ask; and what is known across all of them."""

import gzip
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from backports import zstd
from pyarrow import parquet

from bge_accel.data import rows as rows_module
from bge_accel.data.examples import draw_example
from bge_accel.data.rows import TrainingRows, join_known_positives
from bge_accel.files.text import shown_name

FULL = {"query": "who 检索 😀", "pos": ["king", "a king"], "neg": ["queen"], "pos_scores": [0.25, 2.0], "neg_scores": [-1.5],
        "prompt": "ask: "}  # fmt: skip


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def numbered(count, **extra):
    return [{"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{i}"], **extra} for i in range(count)]


def test_names_of_models_as_they_are_shown(tmp_path):
    for name in ("package/model", "tuned/checkpoint-5", "tuned/merged"):
        (tmp_path / name).mkdir(parents=True)
    shown = [shown_name(str(tmp_path / name)) for name in ("package/model", "tuned/checkpoint-5", "tuned/merged")]
    assert shown == ["package/model", "tuned/checkpoint-5", "merged"] and shown_name("BAAI/x/") == "BAAI/x/"


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rows if isinstance(rows, bytes) else lines(rows))
        return str(path)

    return write


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def kept(cache):
    """The names of what lies in a cache, locks aside."""
    return sorted(name for name in os.listdir(cache) if not name.endswith(".lock"))


def message_of(paths, **kwargs):
    with pytest.raises(ValueError) as error:
        TrainingRows(paths, **kwargs)
    return str(error.value)


def python(code, *args, status=0):
    result = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout


# ---- the cache


def test_the_second_opening_parses_nothing_of_the_file(write, cache, monkeypatch):
    path = write("a.jsonl", numbered(2500))
    first, digest = list(TrainingRows([path], cache_folder=cache)), TrainingRows([path], cache_folder=cache).digest()
    monkeypatch.setattr(rows_module, "read_rows", lambda path, faults: iter([(f"{path}:1", 1, {"query": "read anew"})]))
    again = TrainingRows([path], cache_folder=cache)
    assert list(again) == first == numbered(2500) and again.digest() == digest
    shutil.rmtree(cache)
    assert '"pos" is missing' in message_of([path], cache_folder=cache)


@pytest.mark.parametrize("place", [0, 0.37, 0.99999])
@pytest.mark.parametrize("is_large", [False, True])
def test_an_edit_that_keeps_size_and_time_is_seen(write, cache, monkeypatch, is_large, place):
    """Anywhere in a small file; in a large one at its ends, and where a good part of it is changed."""
    if is_large:
        monkeypatch.setattr(rows_module, "DIGESTED_WHOLE", 2**16)
        monkeypatch.setattr(rows_module, "DIGESTED_BLOCKS", 8)
        monkeypatch.setattr(rows_module, "DIGESTED_BLOCK_SIZE", 2**10)
    count = 4000
    path = write("a.jsonl", numbered(count))
    TrainingRows([path], cache_folder=cache)
    status, rows, first = os.stat(path), numbered(count), int(place * count)
    for row in rows[first : first + (count // 4 if is_large else 1)]:
        row["pos"] = [row["pos"][0].upper()]
    write("a.jsonl", rows)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(path).st_size == status.st_size
    assert list(TrainingRows([path], cache_folder=cache)) == rows and len(kept(cache)) == 2


def test_a_copy_that_an_earlier_version_kept_is_made_anew(write, cache):
    """By path, size and time alone, as until now."""
    path = write("a.jsonl", numbered(3))
    TrainingRows([path], cache_folder=cache)
    status, stem = os.stat(path), kept(cache)[0].partition("-")[0]
    for name in kept(cache):
        os.remove(f"{cache}/{name}")
    old = f"{stem}-{rows_module._hash(f'1 {status.st_size} {status.st_mtime_ns}')}"
    for ending in ("arrow", "json"):
        Path(f"{cache}/{old}.{ending}").write_bytes(b"of another form")
    assert list(TrainingRows([path], cache_folder=cache)) == numbered(3)
    assert len(kept(cache)) == 2 and not any(name.startswith(old) for name in kept(cache))


def test_a_changed_file_is_read_anew_and_the_stale_copy_goes(write, cache):
    path, other = write("a.jsonl", numbered(3)), write("b.jsonl", numbered(4))
    TrainingRows([path, other], cache_folder=cache)
    before = kept(cache)
    assert [name.rpartition(".")[2] for name in before] == ["arrow", "json"] * 2
    old = TrainingRows([path], cache_folder=cache)
    status = os.stat(path)
    changed = [{**row, "query": row["query"].upper()} for row in numbered(3)]  # no byte more or less
    write("a.jsonl", changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert list(TrainingRows([path], cache_folder=cache)) == changed
    after = kept(cache)
    assert len(after) == 4 and len(set(before) & set(after)) == 2  # the other file's copy stays
    assert list(TrainingRows([other], cache_folder=cache)) == numbered(4)
    assert list(old) == numbered(3)  # whoever has the old copy open keeps it


def test_a_file_of_another_size_is_another_file_whatever_its_time(write, cache):
    path = write("a.jsonl", numbered(3))
    TrainingRows([path], cache_folder=cache)
    status = os.stat(path)
    write("a.jsonl", numbered(4))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(TrainingRows([path], cache_folder=cache)) == 4 and len(kept(cache)) == 2


def test_one_file_by_any_name_is_kept_once_and_placed_as_named(write, cache, monkeypatch, tmp_path):
    path = write("data/a.jsonl", numbered(3))
    os.symlink("data/a.jsonl", tmp_path / "link.jsonl")
    monkeypatch.chdir(tmp_path / "data")
    for name in (path, "a.jsonl", "../link.jsonl"):
        rows = TrainingRows([name], cache_folder=cache)
        assert list(rows) == numbered(3) and rows.place(2) == f"{name}:3"
    assert len(kept(cache)) == 2


def test_a_path_that_is_no_text_can_be_kept(tmp_path, cache):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    try:
        Path(path).write_bytes(lines(numbered(2)))
    except OSError:
        pytest.skip("this file system has no such names")
    assert [len(TrainingRows([path], cache_folder=cache)) for _ in range(2)] == [2, 2]


def test_a_copy_in_which_a_byte_changed_is_refused(write, cache):
    path = write("a.jsonl", numbered(3))
    rows = list(TrainingRows([path], cache_folder=cache))
    arrow = Path(cache, next(name for name in kept(cache) if name.endswith(".arrow")))
    raw, text = bytearray(arrow.read_bytes()), rows[1]["query"].encode()
    raw[raw.index(text)] ^= 1
    arrow.write_bytes(raw)
    with pytest.raises(ValueError, match=r"\.arrow, the checked copy of .*a\.jsonl, is damaged"):
        TrainingRows([path], cache_folder=cache)


@pytest.mark.parametrize("lost", [".json", ".arrow", ".part"])
def test_a_copy_that_a_killed_process_left_half_done_is_made_anew(write, cache, lost):
    path = write("a.jsonl", numbered(3))
    TrainingRows([path], cache_folder=cache)
    stem = os.path.splitext(kept(cache)[0])[0]
    if lost == ".part":
        for name in kept(cache):
            os.remove(f"{cache}/{name}")
        Path(f"{cache}/{stem}.part").write_bytes(b"half")
    else:
        os.remove(f"{cache}/{stem}{lost}")
    assert [list(TrainingRows([path], cache_folder=cache)) for _ in range(2)] == [numbered(3)] * 2
    assert kept(cache) == [f"{stem}.arrow", f"{stem}.json"]


KILLED = """
import os, sys
from bge_accel.data import rows
def killed(path, faults):
    yield from rows_of(path, faults)
    os._exit(9)
rows_of, rows.read_rows = rows.read_rows, killed
rows.TrainingRows([sys.argv[1]], cache_folder=sys.argv[2])
"""


def test_a_process_killed_at_the_end_of_a_file_leaves_no_copy_and_no_lock(write, cache):
    path = write("a.jsonl", numbered(3000))
    python(KILLED, path, cache, status=9)
    assert [name for name in kept(cache) if name.endswith(".json")] == []
    assert len(TrainingRows([path], cache_folder=cache)) == 3000 and len(kept(cache)) == 2


RACE = """
import os, sys, time
import filelock, pyarrow.compute, tqdm
from bge_accel.data import rows
path, cache, folder, me, other = sys.argv[1:]
def noted(*args):
    open(f"{folder}/reads-{me}", "w").close()
    time.sleep(0.5)  # time enough for the other to come
    return read(*args)
read, rows.read_rows = rows.read_rows, noted
open(f"{folder}/ready-{me}", "w").close()
while not os.path.exists(f"{folder}/ready-{other}"):
    time.sleep(0.001)
opened = rows.TrainingRows([path], cache_folder=cache)
print(len(opened), opened.digest(), opened[2999])
"""


def test_two_processes_that_open_a_file_at_once_read_it_once(write, cache, tmp_path):
    path = write("a.jsonl", numbered(3000))
    started = [
        subprocess.Popen([sys.executable, "-c", RACE, path, cache, tmp_path, me, other], stdout=subprocess.PIPE)
        for me, other in (("1", "2"), ("2", "1"))
    ]
    outputs = {process.communicate(timeout=60)[0].decode() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert outputs == {f"3000 {TrainingRows([path], cache_folder=cache).digest()} {numbered(3000)[2999]}\n"}
    assert len([name for name in os.listdir(tmp_path) if name.startswith("reads-")]) == 1
    assert [name.rpartition(".")[2] for name in kept(cache)] == ["arrow", "json"]


def test_a_faulty_file_leaves_no_copy_and_its_faults_come_again(write, cache):
    good, bad = write("good.jsonl", numbered(2)), write("bad.jsonl", [*numbered(1500), {"query": "q", "pos": []}])
    first = message_of([good, bad], cache_folder=cache)
    assert first == message_of([good, bad], cache_folder=cache) and f'\n{bad}:1501: "pos" is empty' in first
    assert len(kept(cache)) == 2  # of the good one
    write("bad.jsonl", numbered(1500))
    assert len(TrainingRows([good, bad], cache_folder=cache)) == 1502 and len(kept(cache)) == 4


def test_a_file_that_became_faulty_is_not_taken_from_its_old_copy(write, cache):
    path = write("a.jsonl", numbered(2))
    TrainingRows([path], cache_folder=cache)
    write("a.jsonl", [*numbered(2), {"query": "q"}])
    assert '"pos" is missing' in message_of([path], cache_folder=cache)


def test_a_cache_that_cannot_be_made_is_one_line_that_names_the_flag(write, tmp_path):
    path = write("a.jsonl", numbered(2))
    for folder in (f"{path}/below/a/file", "/proc/nothing/of/the/kind"):
        message = message_of([path], cache_folder=folder)
        assert message.startswith(f"checked rows cannot be kept in {folder}: ") and message.endswith("by --cache_path")
        assert "\n" not in message


TOO_FULL = """
import resource, sys
from bge_accel.data.rows import TrainingRows, join_known_positives
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # as a full disk: writing on fails
print(len(TrainingRows([sys.argv[1]], cache_folder=sys.argv[3])))
try:
    TrainingRows([sys.argv[2]], cache_folder=sys.argv[3])
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("count", [1500, 6000])  # too large at the end, and long before
def test_a_cache_that_is_full_is_one_line_and_leaves_nothing_behind(write, cache, count):
    small = write("small.jsonl", numbered(10))
    large = write("large.jsonl", [{"query": f"q{i}", "pos": ["x" * (250_000 // count + 10)]} for i in range(count)])
    shown = python(TOO_FULL, small, large, cache).splitlines()
    assert shown[0] == "10" and len(shown) == 2
    assert shown[1].startswith(f"checked rows cannot be kept in {cache}: File too large; name a folder with space")
    assert shown[1].endswith("--cache_path") and len(kept(cache)) == 2
    assert len(TrainingRows([large], cache_folder=cache)) == count


def test_both_files_of_a_copy_are_as_readable_as_any_new_file(write, cache):
    TrainingRows([write("a.jsonl", numbered(2))], cache_folder=cache)
    modes = {stat.S_IMODE(os.stat(f"{cache}/{name}").st_mode) for name in kept(cache)}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_without_a_folder_the_users_cache_is_used(write, tmp_path, monkeypatch):
    path = write("a.jsonl", numbered(2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    TrainingRows([path])
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    TrainingRows([path])
    for folder in ("xdg/bge_accel/rows", "home/.cache/bge_accel/rows"):
        assert len(kept(tmp_path / folder)) == 2


MEMORY = """
import re, sys
from bge_accel.data.rows import TrainingRows, join_known_positives
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
small, large, cache = sys.argv[1:]
len(TrainingRows([small], cache_folder=cache))  # what the libraries themselves take
start = held()
rows = TrainingRows([large], cache_folder=cache)
print(len(rows), [rows[i]["query"] for i in (0, 20_000, 39_999)], round(held() - start, 1), sep="|")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is told by Linux")
def test_rows_are_not_held_in_memory(write, cache):
    """25 MB of rows, which as Python objects would take more: neither at the first opening nor at the second."""
    small = write("small.jsonl", numbered(2000))
    with open(large := f"{os.path.dirname(small)}/large.jsonl", "w") as file:
        for i in range(40_000):
            row = {"query": f"q{i}", "pos": [f"{i:06}" * 50], "neg": [f"{i:05}x" * 50]}
            file.write(json.dumps(row) + "\n")
    assert os.path.getsize(large) > 25e6
    for limit in (15, 4):  # MB; the first opening leaves some of what it had to hold for a moment
        count, queries, held = python(MEMORY, small, large, cache).split("|")
        assert (count, queries) == ("40000", "['q0', 'q20000', 'q39999']") and float(held) < limit


# ---- formats

MIXED = [
    FULL,
    {"query": "no negatives", "pos": ["a"]},
    {"query": "none", "pos": ["a"], "neg": None, "prompt": None, "pos_scores": None},
    {"query": "empty", "pos": ["a"], "neg": [], "neg_scores": [], "prompt": ""},
    {"query": "other keys", "pos": ["b", "b"], "neg": ["c"] * 3, "pos_scores": [1, 2], "type": "free"},
] * 220
EXPECTED = [{key: value for key, value in row.items() if value is not None and key != "type"} for row in MIXED]


def test_each_prompt_and_the_first_row_that_has_it(write, cache):
    prompts = [None] * 1500 + ["a", "", None, "b", "a"] * 200 + [None] * 1000 + ["c"]
    first = write("first.jsonl", [{"query": "q", "pos": ["p"], "prompt": prompt} for prompt in prompts])
    second = write("second.jsonl", [*numbered(3), *numbered(2, prompt="d"), *numbered(1, prompt="b")])
    rows = TrainingRows([first, second], cache_folder=cache)
    expected = {"a": 1500, "": 1501, "b": 1503, "c": 3500, "d": 3504}
    assert rows.first_with_prompt() == expected and rows.place(1503) == f"{first}:1504"
    some = TrainingRows([first, second], cache_folder=cache, max_rows_per_file=900)
    found = some.first_with_prompt()
    prompts_of = [some[index].get("prompt") for index in range(len(some))]
    assert found == {prompt: prompts_of.index(prompt) for prompt in prompts_of if prompt is not None}
    assert TrainingRows([write("none.jsonl", numbered(3))], cache_folder=cache).first_with_prompt() == {}


@pytest.fixture(scope="module")
def every_format(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    plain, array = lines(MIXED), json.dumps(MIXED).encode()
    contents = {"a.jsonl": plain, "lines.json": plain, "array.json": array, "a.jsonl.gz": gzip.compress(plain),
                "a.json.gz": gzip.compress(array), "a.jsonl.zst": zstd.compress(plain),
                "a.json.zst": zstd.compress(array)}  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    parquet.write_table(pa.Table.from_pylist(MIXED), folder / "a.parquet", row_group_size=300)
    return folder


NAMES = ["a.jsonl", "lines.json", "array.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.json.zst", "a.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_rows_places_and_digest(every_format, name):
    reference = TrainingRows([str(every_format / "a.jsonl")])
    for _ in range(2):  # read, and from the cache
        rows = TrainingRows([str(every_format / name)])
        assert list(rows) == EXPECTED and rows.digest() == reference.digest()
        assert [rows.place(i) for i in (0, 999, 1000, 1099)] == [
            f"{every_format / name}:{line}" for line in (1, 1000, 1001, 1100)
        ]
    assert all(type(score) is float for row in (rows[0], rows[4]) for score in row["pos_scores"])


@pytest.mark.parametrize("score", [0, 2**53 + 1, -(10**30), 1e308, -0.0, 5e-324])
def test_scores_of_any_size_are_kept(write, score):
    row = {"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [score], "neg_scores": [1]}
    assert TrainingRows([write("a.jsonl", [row])], need_scores=True)[0]["pos_scores"] == [float(score)]


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2000])
def test_any_number_of_rows(write, count):
    rows = TrainingRows([write("a.jsonl", numbered(count))])
    assert len(rows) == count and list(rows) == numbered(count)
    for index in (-1, count):
        with pytest.raises(IndexError):
            rows[index]


# ---- places and samples


def sampled(write, *, seed=3, limit=40):
    """Two large files and a small one, cut to 40 rows each, with the rows that were chosen as they stand in the files."""
    data = {"a": numbered(1100), "b": [{"query": f"b{i}", "pos": ["x"]} for i in range(7)], "c": numbered(90)}
    paths = [write(f"{name}.jsonl", b"\n\n" + lines(rows)) for name, rows in data.items()]  # rows begin at line 3
    return TrainingRows(paths, max_rows_per_file=limit, seed=seed), dict(zip(paths, data.values(), strict=True))


def test_a_place_leads_to_the_row_in_samples_of_several_files(write):
    rows, data = sampled(write)
    assert len(rows) == 40 + 7 + 40
    found = [rows.place(index).rpartition(":") for index in range(len(rows))]
    assert [data[path][int(line) - 3] for path, _, line in found] == list(rows)
    assert [path for path, _, _ in found] == [path for path, count in zip(data, (40, 7, 40), strict=True) for _ in range(count)]  # fmt: skip


def test_places_and_rows_in_any_order(write):
    rows, _ = sampled(write)
    expected = [(row, rows.place(index)) for index, row in enumerate(rows)]
    for index in random.Random(0).choices(range(len(rows)), k=300):
        assert (rows[index], rows.place(index)) == expected[index]


def test_faults_outside_the_sample_are_faults_too(write):
    path = write("a.jsonl", [*numbered(500), {"query": "q"}])
    assert f"{path}:501: " in message_of([path], max_rows_per_file=1)


# ---- digest


def digest(*paths, **kwargs):
    return TrainingRows(list(paths), **kwargs).digest()


def test_the_digest_is_of_the_rows_not_of_where_they_lie(write):
    rows = [FULL, *numbered(2000)]
    reference = digest(write("here/a.jsonl", rows))
    assert reference == digest(write("there/b.json", json.dumps(rows).encode()))
    assert reference == digest(write("c.jsonl", b"\n" + lines(rows).replace(b"\n", b"\n\n")))
    shuffled_keys = [dict(reversed(row.items())) | {"other": 1} for row in rows]
    assert reference == digest(write("d.jsonl", shuffled_keys))


def test_the_digest_changes_with_every_field_and_with_the_order(write):
    changes = [
        {}, {"query": "x"}, {"pos": ["king", "x"]}, {"pos": ["a king", "king"]}, {"neg": ["x"]}, {"prompt": "x"},
        {"prompt": None}, {"pos_scores": [0.25, 2.5]}, {"neg_scores": [1.5]}, {"pos_scores": None},
        {"pos": ["king", "a king", "queen"], "neg": None, "pos_scores": None, "neg_scores": None},
    ]  # fmt: skip
    contents = [[*numbered(1001), {**FULL, **change}] for change in changes]
    contents += [contents[0][::-1], contents[0][1:], contents[0] + contents[0][:1]]
    digests = [digest(write(f"{number}.jsonl", rows)) for number, rows in enumerate(contents)]
    assert len(set(digests)) == len(contents)


def test_the_digest_changes_with_the_files_and_the_sample(write):
    a, b, same = write("a.jsonl", numbered(50)), write("b.jsonl", numbered(60)), write("same/a.jsonl", numbered(50))
    assert digest(a, b) == digest(same, b)
    different = [
        digest(a), digest(a, b), digest(b, a), digest(a, a), digest(a, max_rows_per_file=20),
        digest(a, max_rows_per_file=20, seed=1), digest(a, max_rows_per_file=21),
        digest(a, b, max_rows_per_file=55),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert digest(a, max_rows_per_file=20, seed=1) == digest(same, max_rows_per_file=20, seed=1)
    assert digest(a, max_rows_per_file=50, seed=1) == digest(a)  # nothing is cut


# ---- what is known of a query


def random_files(write, rng):
    """Rows of a few queries and passages, so that both meet again within files and across them."""

    def row():
        query = f"often {rng.randrange(30)}" if rng.random() < 0.5 else f"once {rng.random()}"
        pos = [f"p{rng.randrange(12)}" for _ in range(rng.randint(1, 3))]
        neg = [f"n{rng.randrange(5)}" for _ in range(rng.randint(0, 2))]
        return {"query": query, "pos": pos, **({"neg": neg} if rng.random() < 0.7 else {})}

    sizes = [rng.choice([1, 3, 20, 1005]) for _ in range(rng.randint(1, 4))]
    return [write(f"{number}.jsonl", [row() for _ in range(size)]) for number, size in enumerate(sizes)]


def plainly_known(rows):
    known = {}
    for row in rows:
        known.setdefault(row["query"], set()).update(row["pos"])
    return [known[row["query"]] for row in rows]


@pytest.mark.parametrize("limit", [None, 15])
@pytest.mark.parametrize("seed", range(4))
def test_known_positives_are_those_of_all_rows_with_the_query(write, seed, limit):
    rng = random.Random(seed)
    rows = TrainingRows(random_files(write, rng), max_rows_per_file=limit, seed=seed)
    expected = plainly_known(list(rows))
    for index in rng.sample(range(len(rows)), k=min(len(rows), 200)):
        assert rows.known_positives(index) == expected[index]


@pytest.mark.parametrize("limit", [None, 15])
@pytest.mark.parametrize("seed", range(4))
def test_sources_know_each_others_positives_as_if_they_were_one(write, seed, limit):
    rng = random.Random(seed)
    sources = [TrainingRows([path], max_rows_per_file=limit, seed=seed) for path in random_files(write, rng)]
    join_known_positives(sources)
    expected = iter(plainly_known([row for rows in sources for row in rows]))
    for rows in sources:
        assert [rows.known_positives(index) for index in range(len(rows))] == [next(expected) for _ in rows]


def test_a_negative_drawn_for_a_row_answers_its_query_in_no_source(write):
    """All passages but one are known positives, some of them by the other source alone."""
    here = [{"query": "q", "pos": ["p0"]}, {"query": "other", "pos": ["p1", "p2", "free"]}]
    paths = write("a.jsonl", here), write("b.jsonl", [{"query": "q", "pos": ["p1", "p2"]}])
    rows, other = (TrainingRows([path]) for path in paths)
    join_known_positives([rows, other])
    drawn = {draw_example(rows, 0, epoch, seed=0, group_size=2).passages[1] for epoch in range(30)}
    assert drawn == {"free"}
    with pytest.raises(ValueError, match=re.escape(f"{paths[1]}:1: the row has no negatives")):
        other.check_negatives()


def test_queries_whose_ids_collide_are_told_apart(write, cache, monkeypatch):
    monkeypatch.setattr(rows_module, "text_id", lambda text: len(text) % 2)
    rows = TrainingRows([write("a.jsonl", [*numbered(30), *numbered(20), *numbered(12)])], cache_folder=cache)
    assert [rows.known_positives(index) for index in range(len(rows))] == plainly_known(list(rows))


def test_passages_are_positives_then_negatives(write):
    rows = TrainingRows(
        [write("a.jsonl", [FULL, {"query": "q", "pos": ["a"]}, {"query": "q", "pos": ["b"], "neg": []}])]
    )
    assert [rows.passages(index) for index in range(3)] == [["king", "a king", "queen"], ["a"], ["b"]]


# ---- rows without negatives


@pytest.mark.parametrize("limit", [None, 15, 500])
@pytest.mark.parametrize("seed", range(4))
def test_rows_without_negatives_are_counted(write, seed, limit):
    paths = [*random_files(write, random.Random(seed)), write("more.jsonl", numbered(600))]
    rows = TrainingRows(paths, max_rows_per_file=limit, seed=seed)
    assert rows.check_negatives() == sum(not row.get("neg") for row in rows)


def test_where_no_negative_can_be_found_the_row_is_named(write):
    path = write("a.jsonl", [*numbered(1), {"query": "q", "pos": ["p0", "n0"]}, {"query": "q", "pos": ["q0"], "neg": []}])  # fmt: skip
    rows = TrainingRows([path])
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: the row has no negatives")):
        rows.check_negatives()
    with pytest.raises(ValueError, match="the row has no negatives"):
        draw_example(rows, 2, 0, seed=0, group_size=2)


def test_negatives_have_to_be_in_the_sample(write):
    data = [{"query": f"q{i}", "pos": ["same"]} for i in range(300)]
    path = write("a.jsonl", [*data, {"query": "other", "pos": ["different"]}])
    assert TrainingRows([path]).check_negatives() == 301
    samples = [TrainingRows([path], max_rows_per_file=5, seed=seed) for seed in range(10)]
    for rows in samples:
        if "other" in [row["query"] for row in rows]:
            assert rows.check_negatives() == 5
        else:
            with pytest.raises(ValueError, match="the row has no negatives"):
                rows.check_negatives()
    assert len({rows.digest() for rows in samples}) == 10


@pytest.mark.parametrize("seed", range(8))
def test_what_passes_the_check_can_be_drawn(write, seed):
    """Tiny data, in which it is a near thing."""
    rng = random.Random(seed)
    for number in range(12):
        data = [
            {
                "query": rng.choice("xy"),
                "pos": rng.sample("abc", rng.randint(1, 2)),
                "neg": ["d"] * (rng.random() < 0.2),
            }
            for _ in range(rng.randint(1, 4))
        ]
        rows = TrainingRows([write(f"{number}.jsonl", data)])
        lacking = [index for index, row in enumerate(data) if not row["neg"]]
        texts = {text for row in data for text in row["pos"] + row["neg"]}
        if all(texts - rows.known_positives(index) for index in lacking):
            assert rows.check_negatives() == len(lacking)
            for index in lacking:
                (drawn,) = draw_example(rows, index, 0, seed=0, group_size=2).passages[1:]
                assert drawn in texts - rows.known_positives(index)
        else:
            with pytest.raises(ValueError, match=re.escape(f"{number}.jsonl:")):
                rows.check_negatives()
