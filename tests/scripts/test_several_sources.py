"""Several sources in one run: their shares, their own settings, and streams that end."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers.models import build_tiny_model
from helpers.repo import REPO
from helpers.warm_start import Job

SPY = REPO / "tests" / "helpers" / "spy_texts.py"
SIZES = {"apple": 40, "bread": 20, "cedar": 9}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three files, each text of which begins with the file's name."""
    for name, count in SIZES.items():
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for i in range(count):
                row = {
                    "query": f"{name} {i}",
                    "pos": [f"{name} {i} is here"],
                    "neg": [f"{name} {i} not {j}" for j in "ab"],
                }
                file.write(json.dumps(row) + "\n")
    return tmp_path


def start(folder: Path, model: str, *flags: object, processes: int = 1) -> Job:
    return Job(
        *("--model_name_or_path", model, "--output_dir", "out", "--train_group_size", 2, "--save_strategy", "no"),
        *("--per_device_train_batch_size", 4, "--logging_steps", 10, "--disable_tqdm", *flags),
        cwd=folder,
        through=(SPY,),
        processes=processes,
        env={"SPY_TEXTS": str(folder / "texts")},
    )


def run(folder: Path, model: str, *flags: object, status: int = 0, processes: int = 1) -> str:
    return start(folder, model, *flags, processes=processes).ends(status)


def batches(folder: Path, rank: int = 0) -> list[tuple[list[str], list[str]]]:
    """(queries, passages) of each batch that was prepared."""
    texts = [json.loads(line) for line in open(folder / f"texts-{rank}.jsonl")]
    return list(zip(texts[::2], texts[1::2], strict=True))


def source_of(text: str) -> str:
    return next(name for name in SIZES if name in text)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in open(folder / "out" / "train_log.jsonl")]


def write_sources(folder: Path, sources: list[dict]) -> str:
    (folder / "sources.yaml").write_text(yaml.safe_dump(sources))
    return "sources.yaml"


def test_every_source_has_its_share_and_its_own_settings(rows: Path, tiny_model: str) -> None:
    sources = [
        {"path": "apple.jsonl", "weight": 3, "query_instruction_for_retrieval": "Fruit: "},
        {"path": "bread.jsonl", "weight": 2, "train_group_size": 3, "use_inbatch_neg": False},
        {"path": "cedar.jsonl", "weight": 1, "per_device_train_batch_size": 6, "name": "trees",
         "query_instruction_for_retrieval": "", "passage_instruction_for_retrieval": "Wood: "},
    ]  # fmt: skip
    flags = ("--query_instruction_for_retrieval", "Find: ", "--query_max_len", 16)
    output = run(rows, tiny_model, "--train_data", write_sources(rows, sources), "--max_steps", 60, *flags)
    seen = batches(rows)[:60]
    counts = Counter(source_of(queries[0]) for queries, _ in seen)
    assert {name: round(count / 10) for name, count in counts.items()} == {"apple": 3, "bread": 2, "cedar": 1}
    expected = {"apple": ("Fruit: ", "", 4, 2), "bread": ("Find: ", "", 4, 3), "cedar": ("", "Wood: ", 6, 2)}
    for queries, passages in seen:
        name = source_of(queries[0])
        query_prefix, passage_prefix, size, group = expected[name]
        assert len(queries) == size and len(passages) == size * group
        assert all(query.startswith(f"{query_prefix}{name}") for query in queries), queries
        assert all(passage.startswith(f"{passage_prefix}{name}") for passage in passages), passages
    assert not any("None" in text for pair in seen for texts in pair for text in texts)
    assert "50.0% apple" in output and "33.3% bread" in output and "each meets 2 negatives" in output
    of_sources = [record["sources"] for record in records(rows)]
    assert sum(of_sources[i]["apple"]["queries"] for i in range(6)) == 4 * counts["apple"]
    assert set(of_sources[0]["trees"]) == {"loss", "accuracy", "queries"} and "trees: loss" in output


def test_without_weights_each_row_comes_once_an_epoch(rows: Path, tiny_model: str) -> None:
    sources = [{"path": "apple.jsonl"}, {"path": "bread.jsonl", "epochs": 2}]
    run(rows, tiny_model, "--train_data", write_sources(rows, sources), "--num_train_epochs", 1)
    counts = Counter(query for queries, _ in batches(rows) for query in queries)
    assert len(batches(rows)) == 20 and len(counts) == 60
    assert all(count == (1 if "apple" in query else 2) for query, count in counts.items())


def test_mixed_batches_hold_rows_of_all_sources(rows: Path, tiny_model: str) -> None:
    sources = [
        {"path": "apple.jsonl", "query_instruction_for_retrieval": "Fruit: "},
        {"path": "bread.jsonl"},
    ]
    run(rows, tiny_model, "--train_data", write_sources(rows, sources), "--mix_sources", "--num_train_epochs", 1)
    seen = batches(rows)
    assert sum(len({source_of(query) for query in queries}) == 2 for queries, _ in seen) > 0.7 * len(seen)
    counts = Counter(query for queries, _ in seen for query in queries)
    assert len(counts) >= 58 and sum(counts.values()) == 60
    assert all(query.startswith("Fruit: ") == ("apple" in query) for query in counts)
    figures = records(rows)[-1]
    mean = sum(source["loss"] * source["queries"] for source in figures["sources"].values()) / sum(
        source["queries"] for source in figures["sources"].values()
    )
    assert figures["loss"] == pytest.approx(mean, rel=1e-4)


def test_two_processes_draw_the_same_source_for_each_batch(rows: Path, tiny_model: str) -> None:
    sources = [{"path": f"{name}.jsonl"} for name in SIZES]
    data = write_sources(rows, sources)
    flags = ("--train_data", data, "--max_steps", 12, "--negatives_cross_device", "--per_device_train_batch_size", 2)
    run(rows, tiny_model, *flags, processes=2)
    both = list(zip(batches(rows, 0)[:12], batches(rows, 1)[:12], strict=True))
    for (first, _), (second, _) in both:
        assert len({source_of(query) for query in first + second}) == 1
        assert len(set(first + second)) == 4


def test_every_file_as_a_source_of_its_own(rows: Path, tiny_model: str) -> None:
    """FlagEmbedding's folder of files, with its thresholds, and no instruction (which it would take for "None")."""
    for name, count in (("tiny1", 3), ("tiny2", 4)):
        with open(rows / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"query": f"apple {name} {i}", "pos": ["apple x"]}) + "\n" for i in range(count))
    folder = rows / "my_no_in_batch_neg_data"
    folder.mkdir()
    for path in rows.glob("*.jsonl"):
        path.rename(folder / path.name)
    flags = ("--same_dataset_within_batch", True, "--small_threshold", 10, "--drop_threshold", 10, "--max_steps", 10)
    output = run(rows, tiny_model, "--train_data", folder, *flags)
    assert "16 rows" in output and "small files: 16 rows" in output  # cedar's 9, 3 and 4 together
    assert "--use_inbatch_neg False" in output
    for queries, passages in batches(rows):
        assert not any("None" in text for text in queries + passages)
    output = run(rows, tiny_model, "--train_data", folder, *flags[:-4], "--drop_threshold", 17, "--max_steps", 2,
                 "--overwrite_output_dir")  # fmt: skip
    assert "60 rows" in output and "note: 16 rows of small files are left out" in output


@pytest.mark.parametrize(
    ("sources", "flags", "message"),
    [
        ([{"path": "apple.jsonl"}, {"path": "bread.jsonl", "train_group_size": 5}], ["--mix_sources"], "group_size"),
        ([{"path": "apple.jsonl", "weight": 1}], ["--sampling_temperature", 2], "--sampling_temperature"),
        ([{"path": "apple.jsonl", "use_inbatch_neg": False, "train_group_size": 1}], [], "nothing to learn from"),
        ([{"path": "apple.jsonl", "epochs": 2}], ["--streaming"], "an epoch of a stream"),
        ([{"path": "nowhere.jsonl"}, {"path": "apple.jsonl"}], [], "nowhere.jsonl: no such file"),
    ],
)
def test_sources_that_cannot_be(rows: Path, tiny_model: str, sources: list, flags: list, message: str) -> None:
    data = write_sources(rows, sources)
    assert message in run(rows, tiny_model, "--train_data", data, "--max_steps", 3, *flags, status=2)
    assert not (rows / "out").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_fault_that_a_stream_meets_while_it_trains_is_one_line(rows: Path, tiny_model: str, processes: int) -> None:
    path = rows / "apple.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines * 3, "not JSON", *lines]) + "\n")
    flags = ("--streaming", "--max_steps", 200, "--shuffle_buffer_size", 4, "--logging_steps", 1, "--save_steps", 1)
    job = start(rows, tiny_model, "--train_data", path, *flags, "--save_strategy", "steps", processes=processes)
    found, output = job.wait(), job.text
    assert found in ([2], [1, 2], [2, 1])  # the other one has been left
    assert "Traceback" not in output and f"apple.jsonl:{3 * len(lines) + 1}: not JSON" in output
    assert list((rows / "out").glob("checkpoint-*"))  # what was saved before stays


@pytest.mark.parametrize(
    ("strategy", "steps"),
    # Each of two processes has 20 rows of apple and 10 of bread, 4 a batch, batches of both by turns.
    [("first_exhausted", range(3, 6)), ("all_exhausted", range(8, 12)), ("repeat", range(25, 26))],
)
def test_processes_stop_together_where_a_stream_ends(rows: Path, tiny_model: str, strategy: str, steps: range) -> None:
    sources = [{"path": "apple.jsonl", "weight": 1}, {"path": "bread.jsonl", "weight": 1}]
    flags = ("--streaming", "--max_steps", 25, "--stopping_strategy", strategy, "--logging_steps", 1)
    output = run(rows, tiny_model, "--train_data", write_sources(rows, sources), *flags, processes=2)
    assert len(records(rows)) in steps
    assert ("the streams end after" in output) == (strategy != "repeat")
    assert (rows / "out" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def steady_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without dropout: a batch has the same loss in any order."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "steady", dropout=0.0)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_one_file_knows_of_a_query_holds_in_all(tmp_path: Path, steady_model: str, processes: int) -> None:
    """The same rows as one file, as two that are mixed, and as a stream of several blocks: every query occurs in both."""
    rows = [
        [{"query": f"query {i}", "pos": [f"{name} {i} is here"], "neg": [f"not {name} {i}"]} for i in range(8)]
        for name in ("apple", "bread")
    ]
    for name, of_file in zip(("both", "apple", "bread"), [rows[0] + rows[1], *rows], strict=True):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_file))
    sources = write_sources(tmp_path, [{"path": "apple.jsonl"}, {"path": "bread.jsonl"}])
    seen = []
    for data in (["both.jsonl"], [sources, "--mix_sources"], ["apple.jsonl", "bread.jsonl", "--streaming"]):
        flags = ("--per_device_train_batch_size", 16 // processes, "--max_steps", 1, "--logging_steps", 1)
        more = ("--negatives_cross_device", "--shuffle_buffer_size", 3, "--overwrite_output_dir")
        run(tmp_path, steady_model, "--train_data", *data, *flags, *more, processes=processes)
        (figures,) = records(tmp_path)
        seen.append([figures["masked_per_query"], figures["loss"]])
    assert seen[0][0] == 1
    assert seen[1] == pytest.approx(seen[0], rel=1e-5) and seen[2] == pytest.approx(seen[0], rel=1e-5)
