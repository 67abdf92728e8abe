"""Sources of rows: what a YAML file of them may say, and that each comes as often as its share, evenly, at any place."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from bge_accel.data.sources import Source, SourceSchedule, find_sources, merge_small, read_sources, source_shares

ROW = json.dumps({"query": "q", "pos": ["p"]}) + "\n"


@pytest.fixture
def write(tmp_path):
    def write(name, content=ROW):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return str(path)

    return write


def named(sources):
    return {source.name: source.path for source in sources}


# ---- finding


def test_paths_are_one_source_together():
    assert find_sources(["a.jsonl", "folder", "*.gz"]) == [Source(name="all", path=["a.jsonl", "folder", "*.gz"])]


def test_every_file_is_a_source_named_by_its_place_below_the_common_folder(write, tmp_path):
    paths = [write(name) for name in ("d/a.jsonl", "d/sub/a.jsonl.gz", "d/sub/b.v2.json", "d/c.parquet")]
    found = find_sources([paths[0], f"{tmp_path}/d/sub", paths[3]], one_per_file=True)
    assert named(found) == {"a": paths[:1], "sub/a": paths[1:2], "sub/b.v2": paths[2:3], "c": paths[3:]}
    assert named(find_sources(paths[:1], one_per_file=True)) == {"a": paths[:1]}
    assert list(named(find_sources([f"{tmp_path}/d/sub/*"], one_per_file=True))) == ["a", "b.v2"]


def test_relative_paths_are_named_alike_and_kept_as_given(write, tmp_path, monkeypatch):
    paths = [write("d/a.jsonl"), write("e/b.jsonl")]
    monkeypatch.chdir(tmp_path / "d")
    assert named(find_sources(["a.jsonl", "../e/b.jsonl"], one_per_file=True)) == {
        "d/a": ["a.jsonl"],
        "e/b": ["../e/b.jsonl"],
    }
    assert list(named(find_sources(["a.jsonl", paths[1]], one_per_file=True))) == ["d/a", "e/b"]


def test_files_that_differ_in_their_ending_alone_have_names_of_their_own(write):
    paths = [write(name) for name in ("a.jsonl", "a.json", "b.jsonl")]
    assert named(find_sources(paths, one_per_file=True)) == {"a.jsonl": paths[:1], "a.json": paths[1:2], "b": paths[2:]}


@pytest.mark.parametrize(
    ("paths", "what"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        ([], "training data: no file is named"),
        (["d", "d/a.jsonl"], "d/a.jsonl: named 2 times, but every file is a source of its own; name it once"),
    ],
)
def test_files_that_cannot_each_be_a_source_are_named(write, tmp_path, monkeypatch, paths, what):
    write("d/a.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        find_sources(paths, one_per_file=True)
    message = str(error.value)
    assert message.startswith("1 fault in the input:\n") and message.endswith(what)


@pytest.mark.parametrize("paths", [["s.yaml", "a.jsonl"], ["a.jsonl", "s.yml"], ["s.yaml", "s.yaml"]])
def test_a_file_of_sources_stands_alone(paths):
    with pytest.raises(ValueError, match=r"^s.ya?ml: a file of sources stands alone; name the other data inside it$"):
        find_sources(paths)


# ---- YAML


EVERYTHING = """
- name: questions
  path: [a.jsonl, more/*.jsonl]
  weight: 2
  query_instruction_for_retrieval: "Represent this: "
  passage_instruction_for_retrieval: ""
  train_group_size: 4
  use_inbatch_neg: false
  per_device_train_batch_size: 16
- path: folder/pairs.jsonl.gz
  weight: 0.5
  epochs:
"""


@pytest.mark.parametrize("under", ["", "sources:"])
@pytest.mark.parametrize("one_per_file", [False, True])
def test_every_key_of_a_source_is_read(write, under, one_per_file):
    path = write("s.yaml", under + EVERYTHING)
    assert find_sources([path], one_per_file=one_per_file) == [
        Source(
            name="questions",
            path=["a.jsonl", "more/*.jsonl"],
            weight=2,
            query_instruction_for_retrieval="Represent this: ",
            passage_instruction_for_retrieval="",
            train_group_size=4,
            use_inbatch_neg=False,
            per_device_train_batch_size=16,
        ),
        Source(name="pairs", path=["folder/pairs.jsonl.gz"], weight=0.5),
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [("a.jsonl", "a"), ("d/e/", "e"), ("d/*.jsonl.zst", "*"), ("org/data", "data"), ("https://host/x.parquet", "x"),
     ("v1.2", "v1.2"), ("/", "/")],
)  # fmt: skip
def test_a_source_without_a_name_is_called_like_its_first_path(write, path, name):
    assert named(read_sources(write("s.yaml", f"- path: {path}\n"))) == {name: [path]}
    assert named(read_sources(write("s.yaml", f"- path: ['{path}', other]\n"))) == {name: [path, "other"]}


TOP = "expected a list of sources, each with at least `path: ...`, found "
KEYS = "is not one of name, path, weight, epochs, query_instruction_for_retrieval, passage_instruction_for_retrieval, "
PATH = ": name a file, glob or folder of rows, or a list of them"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", f": {TOP}null"),
        ("[]", f": {TOP}[]"),
        ("sources: []", f": {TOP}[]"),
        ("sources:", f": {TOP}null"),
        ("path: a", f': {TOP}{{"path": "a"}}'),
        ("sources: [{path: a}]\nseed: 1", f": {TOP}{{"),
        ("a.jsonl", f': {TOP}"a.jsonl"'),
        ("- [", " is not readable YAML: "),
        ("- path: a\n  path", " is not readable YAML: "),
        ("- path: \x01", " is not readable YAML: "),
    ],
)
def test_a_file_that_is_no_list_of_sources_is_named(write, content, what):
    path = write("s.yaml", content)
    with pytest.raises(ValueError) as error:
        find_sources([path])
    assert str(error.value).startswith(f"{path}{what}")


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("a.jsonl", ' is "a.jsonl": expected a mapping with at least `path: ...`'),
        ("", " is null: expected a mapping with at least `path: ...`"),
        ("{}", f": `path` is null{PATH}"),
        ("{path: }", f": `path` is null{PATH}"),
        ("{path: ''}", f': `path` is [""]{PATH}'),
        ("{path: []}", f": `path` is []{PATH}"),
        ("{path: 5}", f": `path` is 5{PATH}"),
        ("{path: [a, 5]}", f': `path` is ["a", 5]{PATH}'),
        ("{path: [[a]]}", f': `path` is [["a"]]{PATH}'),
        ("{path: {a: b}}", f': `path` is {{"a": "b"}}{PATH}'),
        ("{path: a, wieght: 2}", f": 'wieght' {KEYS}"),
        ("{path: a, 3: 2}", f": 3 {KEYS}"),
        ("{path: a, ~: 2}", f": None {KEYS}"),
        *(
            (f"{{path: a, {key}: {value}}}", f": `{key}` is {shown}: it has to be a number above 0")
            for key in ("weight", "epochs")
            for value, shown in {"0": "0", "-1": "-1", ".nan": "NaN", ".inf": "Infinity", "'2'": '"2"', "true": "true",
                                 "[1]": "[1]"}.items()
        ),
        *(
            (f"{{path: a, {key}: {value}}}", f": `{key}` is {shown}: it has to be a whole number between 1 and {most}")
            for key, most in (("train_group_size", 10_000), ("per_device_train_batch_size", 1_000_000))
            for value, shown in {"0": "0", "-2": "-2", "2.0": "2.0", "'2'": '"2"', "true": "true",
                                 "1000001": "1000001"}.items()
        ),
        *(
            (f"{{path: a, {key}: {value}}}", f": `{key}` is {value}: it has to be a string")
            for key in ("name", "query_instruction_for_retrieval", "passage_instruction_for_retrieval")
            for value in ("7", "true", "[]")
        ),
        ("{path: a, use_inbatch_neg: 'no'}", ': `use_inbatch_neg` is "no": true or false'),
        ("{path: a, use_inbatch_neg: 0}", ": `use_inbatch_neg` is 0: true or false"),
    ],
)  # fmt: skip
def test_a_fault_names_the_file_the_source_the_key_and_the_remedy(write, entry, what):
    path = write("s.yml", f"- path: fine\n- {entry}\n")
    with pytest.raises(ValueError) as error:
        find_sources([path])
    message = str(error.value)
    assert message.startswith(f"{path}: source 2{what}") and "\n" not in message


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("- path: x/a.jsonl\n- path: y/a.jsonl", "two sources are called 'a'; give each a `name` of its own"),
        ("- {path: a, weight: 1}\n- path: b", "source 'b' has no weight; give all sources one, or none"),
        ("- path: b\n- {path: a, weight: 1}", "source 'b' has no weight; give all sources one, or none"),
        (
            "- {path: a, weight: 1}\n- {path: b, weight: 1, epochs: 2}",
            "source 'b' has a weight and epochs; they say the same thing twice, leave one out",
        ),
    ],
)
def test_sources_that_exclude_each_other_are_named(write, content, what):
    path = write("s.yaml", content)
    with pytest.raises(ValueError) as error:
        read_sources(path)
    assert str(error.value) == f"{path}: {what}"


def test_a_yaml_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/no.yaml cannot be read: No such file or directory")):
        find_sources([f"{tmp_path}/no.yaml"])
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/folder.yaml cannot be read: Is a directory")):
        find_sources([f"{tmp_path}/folder.yaml"])
    (tmp_path / "bytes.yaml").write_bytes(b"- path: \xff")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/bytes.yaml is not readable YAML: ")):
        find_sources([f"{tmp_path}/bytes.yaml"])
    (tmp_path / "twice.yaml").write_text("- path: a.jsonl\n  weight: 1\n  weight: 2\n")
    with pytest.raises(ValueError, match="weight is given twice, in lines 2 and 3; keep one"):
        find_sources([f"{tmp_path}/twice.yaml"])


def test_a_yaml_runs_no_code(write):
    path = write("s.yaml", "- path: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="is not readable YAML: could not determine a constructor"):
        read_sources(path)


# ---- small files


def of_files(*names):
    return [Source(name=name, path=[f"/data/{name}.jsonl"]) for name in names]


def test_small_files_become_one_source_for_each_folder():
    sources = of_files("big", "s1", "x/s2", "x/big", "s3", "x/s4")
    left, dropped = merge_small(sources, [100, 3, 9, 10, 4, 1], small=10, drop=0)
    assert named(left) == {
        "big": ["/data/big.jsonl"],
        "x/big": ["/data/x/big.jsonl"],  # of exactly as many rows as the threshold
        "small files": ["/data/s1.jsonl", "/data/s3.jsonl"],
        "x/small files": ["/data/x/s2.jsonl", "/data/x/s4.jsonl"],
    }
    assert dropped == 0 and left[:2] == [sources[0], sources[3]]


@pytest.mark.parametrize(("drop", "expected", "dropped"), [(7, {"small files", "x/small files"}, 0),
                                                          (8, {"x/small files"}, 7)])  # fmt: skip
def test_small_files_that_are_few_together_are_dropped(drop, expected, dropped):
    sources = of_files("s1", "x/s2", "s3", "x/s4")
    left, count = merge_small(sources, [3, 9, 4, 1], small=10, drop=drop)
    assert set(named(left)) == expected and count == dropped


def test_where_all_files_are_dropped_nothing_is_left_to_train_on():
    with pytest.raises(ValueError, match="all 17 rows lie in small files and are dropped; lower --drop_threshold"):
        merge_small(of_files("s1", "x/s2", "s3", "x/s4"), [3, 9, 4, 1], small=10, drop=11)


def test_nothing_is_small_below_a_threshold_of_zero():
    sources = of_files("a", "b")
    assert merge_small(sources, [1, 2], small=0, drop=100) == (sources, 0)


# ---- shares


def test_shares_are_amounts():
    shares = source_shares(of_files("a", "b", "c"), [600, 300, 100])
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], rtol=1e-15)
    assert shares.dtype == np.float64 and source_shares(of_files("a"), [7]).tolist() == [1.0]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5, 0.5])
def test_temperature_is_the_root_of_the_amounts(temperature):
    amounts = [1e6, 1e4, 10.0]
    powers = [amount ** (1 / temperature) for amount in amounts]
    expected = [power / sum(powers) for power in powers]
    np.testing.assert_allclose(source_shares(of_files("a", "b", "c"), amounts, temperature), expected, rtol=1e-12)


def test_a_high_temperature_makes_all_alike():
    np.testing.assert_allclose(source_shares(of_files("a", "b"), [1e9, 1], 1e9), [0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("amounts", [[60, 40], [0.6, 0.4]])
def test_a_temperature_near_zero_takes_the_largest_alone(amounts):
    assert source_shares(of_files("a", "b"), amounts, 1e-30).tolist() == [1, 0]


def test_weights_win_over_amounts():
    sources = [Source(name="a", path=["a"], weight=3), Source(name="b", path=["b"], weight=0.5)]
    np.testing.assert_allclose(source_shares(sources, [1, 1e9]), [6 / 7, 1 / 7], rtol=1e-15)


# ---- the schedule

CASES = {
    "one": [1.0],
    "equal": [0.5, 0.5],
    "two": [0.7, 0.3],
    "three": [5, 3, 2],
    "awkward": [1 / 3, math.pi, math.e, 0.01],
    "unequal": [1 - 1e-6, 1e-6],
    "extremely": [1e9, 1.0, 1e-9, 1e5],
    "many": [1.0] * 200,
    "many unequal": [1.1**number for number in range(200)],
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Shares, and the first ten thousand items of their schedule, one after another."""
    shares = np.array(CASES[request.param]) / np.sum(CASES[request.param])
    schedule = SourceSchedule(CASES[request.param], seed=42)
    return shares, np.array([schedule[index] for index in range(10_000)])


def test_after_any_number_of_items_each_source_came_as_often_as_its_share(case):
    shares, items = case
    counts = np.cumsum(items[:, :1] == np.arange(len(shares)), axis=0)
    errors = np.abs(counts - np.arange(1, 10_001)[:, None] * shares)
    assert errors.max() <= max(1, len(shares) - 1)
    assert errors.max() <= 8  # in truth far closer than that, and of ten thousand well below 1 %


def test_items_of_each_source_are_counted_one_by_one(case):
    shares, items = case
    for source in range(len(shares)):
        own = items[items[:, 0] == source, 1]
        assert own.tolist() == list(range(len(own)))


def test_any_place_can_be_looked_up_on_its_own(case):
    shares, items = case
    schedule = SourceSchedule(shares, seed=42)
    rng = np.random.default_rng(0)
    for index in [9999, 0, *rng.integers(0, 10_000, 60).tolist(), 1023, 1024, 1025]:
        assert schedule[index] == tuple(items[index])
        assert SourceSchedule(shares, seed=42)[index] == tuple(items[index])


def test_a_run_may_go_on_anywhere(case):
    shares, items = case
    for start in (1, 777, 1022, 5000):
        schedule = SourceSchedule(shares, seed=42)
        assert [schedule[start + offset] for offset in range(1500)] == [tuple(x) for x in items[start : start + 1500]]


def test_sources_are_evenly_spread(case):
    """Without a long run of others: between two items of a source lie at most about two rounds."""
    shares, items = case
    for source, share in enumerate(shares):
        places = np.flatnonzero(items[:, 0] == source)
        gaps = np.diff(places, prepend=-1)
        assert len(gaps) == 0 or gaps.max() < 2 / share + 2 * len(shares)


def test_two_equal_sources_never_come_four_times_in_a_row_and_do_not_just_alternate():
    schedule = SourceSchedule([1, 1], seed=7)
    text = "".join(str(schedule[index][0]) for index in range(5000))
    assert "0000" not in text and "1111" not in text
    pairs = Counter(text[index : index + 2] for index in range(4999))
    assert min(pairs.values()) > 500


@pytest.mark.parametrize("index", [10**6, 5 * 10**6 + 17, 10**9, 10**12])
@pytest.mark.parametrize("name", ["two", "three", "awkward", "unequal", "many unequal"])
def test_far_places_keep_the_shares_and_join_without_a_seam(name, index):
    shares = np.array(CASES[name]) / np.sum(CASES[name])
    schedule = SourceSchedule(CASES[name], seed=1)
    items = [schedule[index + offset] for offset in range(2100)]
    expected = {}
    for offset, (source, count) in enumerate(items):
        assert count == expected.setdefault(source, count)
        assert abs(count - (index + offset) * shares[source]) < len(shares) + 1
        expected[source] = count + 1
    assert [SourceSchedule(CASES[name], seed=1)[index + offset] for offset in (0, 2099)] == [items[0], items[2099]]


def test_a_rare_source_comes_at_last():
    schedule = SourceSchedule([1 - 1e-6, 1e-6], seed=0)
    low, high = 0, 10**6 + 2  # by then it has come once, at the latest
    assert schedule[high] == (0, high - 1)
    while high - low > 1:  # items of the other source before: as many as the index until it comes
        middle = (low + high) // 2
        source, count = schedule[middle]
        low, high = (low, middle) if source == 1 or count < middle else (middle, high)
    assert schedule[high if schedule[high][0] == 1 else low] == (1, 0)


def sequence(shares, seed, count=4096):
    schedule = SourceSchedule(shares, seed)
    return np.array([schedule[index][0] for index in range(count)])


@pytest.mark.parametrize("shares", [[0.5, 0.5], [1, 1, 1, 1], [0.6, 0.4]])
def test_seeds_give_orders_that_have_nothing_to_do_with_each_other(shares):
    """Neither the same nor the same with the sources' parts exchanged: a source's places agree as often as by chance."""
    normalised = np.array(shares) / np.sum(shares)
    orders = [sequence(shares, seed) for seed in (0, 1, 2, 3, 42, 2**32 - 1)]
    for number, first in enumerate(orders):
        for second in orders[:number]:
            for a, share in enumerate(normalised):
                for b, other in enumerate(normalised):
                    together = np.mean((first == a) & (second == b))
                    assert abs(together - share * other) < 0.04


def test_the_order_is_the_same_in_every_version():
    """A checkpoint's position means nothing where it is not."""
    assert "".join(map(str, sequence([5, 3, 2], 42, 40))) == "2010100021021002100120110010022100100102"
    assert SourceSchedule([5, 3, 2], 42)[10**9] == (0, 500_000_000)


def test_scale_of_the_shares_means_nothing():
    assert np.array_equal(sequence([4, 4, 8], 3), sequence([0.25, 0.25, 0.5], 3))
