"""Evaluation during training: what is measured, that it changes nothing, and what is done with it."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.models import build_tiny_model
from helpers.resuming import LATEST, ON_CPU, SPY_ROWS, Start, data, launched_by, start  # noqa: F401  (fixtures)
from helpers.runs import write_rows

from bge_accel.evaluation.in_training import DEPTH, Best, data_of_rows, encode_together, read_eval_sets
from bge_accel.evaluation.metrics import retrieval_metrics
from bge_accel.evaluation.retrieval import choose_cutoffs
from bge_accel.training.checkpoint import find_checkpoints


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def measured(out: Path) -> list[dict]:
    """The log's lines of evaluations, without their cost."""
    return [{"step": r["step"], "eval": r["eval"]} for r in read_log(out) if "eval" in r]


def test_rows_as_something_to_measure_on(tmp_path: Path) -> None:
    """Equal queries are one, equal passages are one, and every positive of a query is judged."""
    path = write(
        tmp_path / "dev.jsonl",
        [
            {"query": "a", "pos": ["one", "two"], "neg": ["three"]},
            {"query": "b", "pos": ["three"]},
            {"query": "a", "pos": ["four", "one"], "neg": ["five"]},
        ],
    )
    found = data_of_rows(path)
    assert found.queries.texts == ["a", "b"] and found.corpus.texts == ["one", "two", "three", "four", "five"]
    assert list(zip(found.judgements.query.tolist(), found.judgements.row.tolist(), strict=True)) == [
        (0, 0), (0, 1), (0, 3), (1, 2),
    ]  # fmt: skip
    assert found.counts["positives"] == 4 and set(found.judgements.grade.tolist()) == {1}
    write(tmp_path / "dev.jsonl", [{"query": "a", "pos": ["one"], "prompt": "Find: "}])
    with pytest.raises(ValueError, match=r'dev.jsonl:1: "prompt" is not known to evaluation'):
        data_of_rows(path)


def test_names_of_data_sets(tmp_path: Path) -> None:
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "dev.jsonl", [{"query": "a", "pos": ["one"]}]))
    paths.append(write(tmp_path / "other.jsonl", [{"query": "a", "pos": ["one"]}]))
    assert list(read_eval_sets(paths)) == ["dev-1", "dev-2", "other"]


def test_the_best_so_far() -> None:
    best = Best("ndcg@10", ["a", "b"])
    assert best.metric == "nDCG@10"
    values = [0.2, 0.5, 0.4, 0.5, 0.6]
    found = [best.update(10 * i, {"a": {"nDCG@10": v}, "b": {"nDCG@10": 0.0}}) for i, v in enumerate(values)]
    assert found == [True, True, False, False, True], "only what is better is best"
    assert (best.value, best.step, best.waited) == (0.3, 40, 0)
    again = Best("b/mrr@1", ["a", "b"])
    again.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert (again.value, again.step, again.last_step) == (0.3, 40, 40)
    assert not again.update(50, {"a": {"MRR@1": 1.0}, "b": {"MRR@1": 0.1}}) and again.waited == 1
    for wrong, told in (
        ("ndcg", "is not one of MRR@1"),
        ("nDCG@7", "is not one of"),
        ("c/MRR@1", "has no 'c', but a, b"),
    ):
        with pytest.raises(ValueError, match=told):
            Best(wrong, ["a", "b"])


def test_encodes_as_the_model_does_afterwards(tiny_model: str) -> None:
    import torch

    from bge_accel import EmbeddingModel

    model = EmbeddingModel(tiny_model, device="cpu", dtype="float32")
    texts = [f"the king of story {'a ' * (i % 17)}{i}" for i in range(60)]
    state = torch.get_rng_state()
    with torch.no_grad():
        found = encode_together(
            model.encoder, model.tokenizer, texts, "find: ", 24, device=torch.device("cpu"), max_tokens=300
        )
    expected = model.encode([f"find: {text}" for text in texts], max_length=24)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


ROUNDING = 2e-6  # of a score, between two ways to cut texts into batches


def assert_measured(found: dict[str, float], folder: Path, path: str | Path) -> None:
    """A saved model gives these metrics of a file's rows, wherever rounding puts the positives among their neighbours."""
    from bge_accel import EmbeddingModel

    model, data = EmbeddingModel(str(folder), device="cpu", dtype="float32"), data_of_rows(str(path))
    q_emb = model.encode_queries(data.queries.texts, max_length=16)
    scores = q_emb @ model.encode_corpus(data.corpus.texts, max_length=32).T
    assert scores.std() > 1e3 * ROUNDING, "a model that does not tell its texts apart could be given any metrics"
    grades = np.zeros_like(scores)
    grades[data.judgements.query, data.judgements.row] = 1
    bounds = []
    for moved in (-ROUNDING, ROUNDING):
        order = np.argsort(-(scores + moved * grades), axis=1, kind="stable")[:, :DEPTH]
        gains, judged = np.take_along_axis(grades, order, axis=1), -np.sort(-grades, axis=1)
        bounds.append(retrieval_metrics(gains, judged, choose_cutoffs(DEPTH)))
    for metric, value in found.items():
        low, high = (of[metric] for of in bounds)
        assert low - 1e-9 <= value <= high + 1e-9, metric


@pytest.fixture
def dev(tmp_path: Path) -> str:
    write_rows(tmp_path / "dev.jsonl", 30, seed=7)
    return str(tmp_path / "dev.jsonl")


STEPS = ("--max_steps", 12, "--save_steps", 4)


def test_a_measured_run_ends_at_the_same_weights(tmp_path: Path, start: Start, dev: str) -> None:
    """To the bit, also where it is resumed between measurements, and the log has each of them once."""
    start("plain", *STEPS).ends()
    more = (*STEPS, "--eval_data", dev, "--eval_steps", 3, "--eval_on_start")
    text = start("measured", *more).ends()
    theirs = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert (tmp_path / "measured" / "model.safetensors").read_bytes() == theirs
    assert [record["step"] for record in measured(tmp_path / "measured")] == [0, 3, 6, 9, 12]
    assert text.count("nDCG@10: dev 0.") == 5 and "(best so far)" in text
    losses = [[r["loss"] for r in read_log(tmp_path / name) if "loss" in r] for name in ("plain", "measured")]
    assert losses[0] == losses[1]

    out = tmp_path / "out"
    job = start("out", *more)
    job.wait_until((out / "checkpoint-8").exists)
    job.kill()
    assert "going on after step 8" in start("out", *more, *LATEST).ends()
    assert (out / "model.safetensors").read_bytes() == theirs
    assert measured(out) == measured(tmp_path / "measured")


def test_two_processes_measure_as_the_saved_model(tmp_path: Path, start: Start, dev: str) -> None:
    """What is measured at the end is what the saved folder gives, with an instruction and a second set."""
    write_rows(tmp_path / "odd.jsonl", 7, seed=3)
    more = (
        "--eval_data",
        dev,
        tmp_path / "odd.jsonl",
        "--eval_steps",
        4,
        "--query_instruction_for_retrieval",
        "Find: ",
    )
    start("two", *STEPS, *more, "--negatives_cross_device", processes=2).ends()
    record = measured(tmp_path / "two")[-1]
    assert record["step"] == 12 and list(record["eval"]) == ["dev", "odd"]
    for name, metrics in record["eval"].items():
        assert_measured(metrics, tmp_path / "two", tmp_path / f"{name}.jsonl")


def test_ends_with_the_best_and_stops_early(tmp_path: Path, start: Start, dev: str) -> None:
    """A rate that ruins the model: the first measurement stays the best, and the run stops two later."""
    more = ("--eval_data", dev, "--eval_steps", 2, "--eval_on_start", "--metric_for_best_model", "mrr@10")
    ruin = ("--learning_rate", 0.5, "--lr_scheduler_type", "constant", "--max_grad_norm", 0, "--max_steps", 40)
    text = start("out", *ruin, *more, "--load_best_model_at_end", "--early_stopping_patience", 2).ends()
    out = tmp_path / "out"
    values = {record["step"]: record["eval"]["dev"]["MRR@10"] for record in measured(out)}
    best = max(values, key=lambda step: (values[step], -step))
    assert list(values)[-1] == best + 4 < 40
    assert "stopping early: 2 measurements in a row" in text
    assert f"the best MRR@10 was {values[best]:.4f}, after step {best}" in text
    assert not (out / "best").exists()
    assert_measured({"MRR@10": values[best]}, out, dev)


# The mean of all tokens tells these texts apart, and a rate of 0.5 ruins that.
BEST = ("--sentence_pooling_method", "mean", "--eval_on_start", "--load_best_model_at_end")
RUIN = ("--learning_rate", 0.5, "--lr_scheduler_type", "constant", "--eval_steps", 3)


def step_saved(folder: Path) -> int:
    return json.loads((folder / "saved_model.json").read_text())["step"]


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_stopped_at_a_measurement_it_is_made_when_the_run_goes_on(tmp_path: Path, start: Start, dev: str) -> None:
    """A signal is answered by saving at once. The measurement then comes once, and early stopping counts it."""
    more = (*BEST, *RUIN, "--eval_data", dev, "--save_steps", 1000, "--max_steps", 20, "--early_stopping_patience", 2)
    start("whole", *more).ends()
    assert [record["step"] for record in measured(tmp_path / "whole")] == [0, 3, 6]
    for batches, number, status in (
        (3, "SIGTERM", 0),
        (2, "SIGKILL", -9),
        (3, "SIGTERM", 0),
    ):  # the second loses its work
        env = {"STOP_AFTER": str(batches), "STOP_SIGNAL": number}
        start("out", *more, *LATEST, through=(SPY_ROWS,), env=env).ends(status)
    assert [step for step, _ in find_checkpoints(str(tmp_path / "out"))] == [3, 6]
    assert "stopping early: 2 measurements in a row" in start("out", *more, *LATEST).ends()
    assert measured(tmp_path / "out") == measured(tmp_path / "whole")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_finished_run_is_extended_and_keeps_its_best(tmp_path: Path, start: Start, dev: str, processes: int) -> None:
    """In its folder, and in another: the first measurement stays the best, and its weights the final ones."""
    more = (*BEST, *RUIN, "--eval_data", dev, "--save_steps", 2, "--negatives_cross_device")
    start("out", *more, "--max_steps", 6, "--early_stopping_patience", 9, processes=processes).ends()
    out, other = tmp_path / "out", tmp_path / "other"
    best = weights_of(out)
    assert step_saved(out) == 0 and not (out / "best").exists()
    text = start(
        "other", *more, "--max_steps", 8, "--resume_from_checkpoint", "out/checkpoint-4", processes=processes
    ).ends()
    assert "after step 0" in text and "warning" not in text
    for folder in (out, other):
        name = folder.name
        text = start(name, *more, "--max_steps", 9, *LATEST, processes=processes).ends()
        assert "after step 0" in text and "warning" not in text
        assert weights_of(folder) == best and step_saved(folder) == 0
        assert not [path.name for path in folder.iterdir() if path.name.startswith((".", "best"))]


def test_the_best_of_a_branch_that_was_left_is_not_taken_for_another(tmp_path: Path, start: Start, dev: str) -> None:
    """A run gets better after its last checkpoint and is killed; gone on with, it gets worse."""
    out, more = tmp_path / "out", (*BEST, "--train_data", dev, "--eval_data", dev)
    env = {"STOP_AFTER": "18", "STOP_SIGNAL": "SIGKILL"}
    learn = ("--learning_rate", 3e-3, "--eval_steps", 5, "--save_steps", 12, "--max_steps", 60)
    assert start("out", *more, *learn, through=(SPY_ROWS,), env=env).wait() == [-9]
    left, newest = step_saved(out / "best"), 12
    assert left == 15 and [step for step, _ in find_checkpoints(str(out))] == [newest]
    text = start("out", *more, *RUIN, "--eval_steps", 7, "--save_steps", 1, "--max_steps", 18, *LATEST).ends()
    assert "are not there any more; what is best is decided among the measurements from here on" in text
    values = {r["step"]: r["eval"]["dev"]["nDCG@10"] for r in measured(out) if r["step"] > newest}
    best = max(values, key=lambda step: (values[step], -step))
    assert f"the best nDCG@10 was {values[best]:.4f}, after step {best}" in text
    assert step_saved(out) == best and best != left
    if (out / f"checkpoint-{best}").exists():  # there is none of the last step
        assert weights_of(out) == weights_of(out / f"checkpoint-{best}")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--eval_on_start"], "--eval_on_start needs --eval_data"),
        (["--eval_data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--eval_data", "dev.jsonl", "--metric_for_best_model", "accuracy"], "accuracy is not one of MRR@1"),
        (["--eval_data", "dev.jsonl", "--eval_steps", "0"], "--eval_steps is 0"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    tmp_path: Path,
    start: Start,
    dev: str,
    flags: list[str],
    told: str,
) -> None:
    assert told in start("out", *flags, model="org/never-loaded").ends(2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", ["fsdp2", *(pytest.param(mode, marks=pytest.mark.exhaustive) for mode in ("zero1", "zero3"))]
)
def test_sharded_training_is_measured(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    start: Start,
    dev: str,
    config: str,
) -> None:
    """As much as one process measures of the same run, without dropout; an odd set gives unequal shares."""
    if config != "fsdp2":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    model = build_tiny_model(tmp_path_factory.mktemp("models") / "steady", dropout=0.0)
    write_rows(tmp_path / "odd.jsonl", 7, seed=3)
    more = ("--max_steps", 6, "--save_steps", 100, "--negatives_cross_device", "--adam_epsilon", 0.01)
    more = (*more, "--eval_data", dev, tmp_path / "odd.jsonl", "--eval_steps", 3, "--load_best_model_at_end")
    # A random model's states of the first token are the same but for rounding, whatever the text: all ranks would be ties.
    more = (*more, "--sentence_pooling_method", "mean")
    env = {**launched_by(config, tmp_path), "DS_ACCELERATOR": "cpu"}
    start("sharded", *more, model=model, processes=2, through=(ON_CPU,), env=env).ends(timeout=400)
    start("plain", *more, model=model).ends()
    ours, theirs = measured(tmp_path / "sharded"), measured(tmp_path / "plain")
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [3, 6]
    for one, other in zip(ours, theirs, strict=True):
        for name in ("dev", "odd"):  # rounding may make two passages change places
            assert one["eval"][name]["nDCG@100"] == pytest.approx(other["eval"][name]["nDCG@100"], abs=0.01)
    assert (tmp_path / "sharded" / "model.safetensors").exists() and not (tmp_path / "sharded" / "best").exists()
