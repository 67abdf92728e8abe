"""scripts/mix_models.py as a user runs it."""

import json
import runpy
import shutil

import pytest
import torch
from helpers.models import build_tiny_model
from helpers.repo import REPO
from helpers.warm_start import Job
from safetensors.torch import load_file

from bge_accel.config import parse_config
from bge_accel.encoding.embedding_model import EmbeddingModel
from bge_accel.models.encoder import load_encoder, save_encoder

SCRIPT = REPO / "scripts" / "mix_models.py"
WORDS = "embeddings.word_embeddings.weight"
ROWS = [
    {"query": "the king", "pos": ["a king story"], "neg": ["list", "file value", "why"]},
    {"query": "list of string", "pos": ["return the list"], "neg": ["princess", "what"]},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "tuned")):
        encoder, tokenizer, settings = load_encoder(build_tiny_model(folder / f"raw{seed}", seed=seed), pooling="mean")
        save_encoder(str(folder / name), encoder, tokenizer, settings)
    return [str(folder / "base"), str(folder / "tuned")]


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return "rows.jsonl"


def run(tmp_path, *args, status=0):
    return Job(*args, cwd=tmp_path, script=SCRIPT).ends(status)


def words(folder):
    return load_file(f"{folder}/model.safetensors")[WORDS]


def test_weights_that_are_given(tmp_path, models):
    said = run(tmp_path, "--model_names_or_paths", *models, "--weights", 3, 1, "--normalize", "--output_path", "out",
               "--max_shard_size", "20KB", "--dtype", "bfloat16")  # fmt: skip
    assert f"  0.7500  {models[0]}\n  0.2500  {models[1]}\nwrote out\n" in said
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()}) == 1
    assert EmbeddingModel(str(tmp_path / "out")).settings.pooling == "mean"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_from_examples(tmp_path, models, rows):
    said = run(tmp_path, "--model_names_or_paths", *models, "--example_data", rows, "--temperature", 0.05,
               "--neg_number", 2, "--output_path", "out")  # fmt: skip
    recipe = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())
    losses = recipe["weights_from"]["losses"]
    weights = [one["weight"] for one in recipe["models"]]
    assert weights == pytest.approx(torch.softmax(-torch.tensor(losses) / 0.05, -1).tolist())
    assert recipe["weights_from"]["objective"] == "loss" and f"{weights[0]:.4f}" in said
    expected = weights[0] * words(models[0]) + weights[1] * words(models[1])
    assert torch.allclose(words(tmp_path / "out"), expected, atol=1e-6)


def test_a_search_with_a_guard(tmp_path, models, rows):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": row["pos"][0]}) + "\n" for row in ROWS))
    queries = [{"query": row["query"], "positive": row["pos"]} for row in ROWS]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    said = run(tmp_path, "--model_names_or_paths", *models, "--search", "--search_steps", 2, "--dev_data", rows,
               "--guard_corpus", "corpus.jsonl", "--guard_queries", "queries.jsonl", "--max_drop", 1,
               "--output_path", "out")  # fmt: skip
    recipe = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())
    scores = recipe["search"]["scores"]
    assert [score["tuned_weight"] for score in scores] == [0, 0.5, 1]
    assert all(0 < score["dev"] <= 1 and 0 < score["guard"] <= 1 for score in scores)
    best = max(scores, key=lambda score: (score["dev"], -score["tuned_weight"]))
    assert [one["weight"] for one in recipe["models"]] == [1 - best["tuned_weight"], best["tuned_weight"]]
    assert f"chosen: {best['tuned_weight']:g} of the tuned model" in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]


def test_a_search_by_the_loss(tmp_path, models, rows):
    run(tmp_path, "--model_names_or_paths", *models, "--search", "--search_steps", 1, "--dev_data", rows, "--objective",
        "loss", "--output_path", "out")  # fmt: skip
    scores = json.loads((tmp_path / "out" / "merge_recipe.json").read_text())["search"]["scores"]
    assert all(score["dev"] < 0 and score["guard"] is None for score in scores)


def test_the_average_of_the_last_checkpoints(tmp_path, models):
    for step, model in ((5, models[0]), (10, models[0]), (20, models[1])):
        shutil.copytree(model, tmp_path / "run" / f"checkpoint-{step}")
    said = run(tmp_path, "--run_dir", "run", "--last_checkpoints", 2, "--output_path", "run/averaged")
    assert said.index("checkpoint-20") < said.index("checkpoint-10") and "checkpoint-5" not in said
    assert torch.allclose(words(tmp_path / "run" / "averaged"), (words(models[0]) + words(models[1])) / 2, atol=1e-7)


def test_errors_are_one_line_and_leave_nothing(tmp_path, models):
    said = run(tmp_path, "--model_names_or_paths", *models, "--weights", 0.1, 0.1, "--output_path", "out", status=2)
    assert said.startswith("mix_models.py: error: the weights 0.1, 0.1 sum to 0.2, not to 1") and said.count("\n") == 1
    (tmp_path / "rows.jsonl").write_text('{"query": "a"}\n')
    said = run(
        tmp_path, "--model_names_or_paths", *models, "--example_data", "rows.jsonl", "--output_path", "out", status=2
    )
    assert 'rows.jsonl:1: "pos" is missing' in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model_names_or_paths", "a/b", "c/d"], "give one of --weights, --example_data, --search, --last_checkpoints"),
        (["--model_names_or_paths", "a/b", "c/d", "--weights", "1", "0", "--search"], "given are --weights and --search"),
        (["--model_names_or_paths", "a/b", "--weights", "1"], "needs two models or more"),
        (["--model_names_or_paths", "./no", "c/d", "--weights", "1", "0"], "./no is not a folder"),
        (["--model_names_or_paths", "a/b", "c/d", "--weights", "1", "0", "--seed", "7"],
         "--seed has no effect without --example_data or --search"),
        (["--model_names_or_paths", "a/b", "c/d", "--weights", "1", "0", "--plot", "x"], "--plot has no effect without"),
        (["--last_checkpoints", "3"], "takes the models from --run_dir"),
        (["--model_names_or_paths", "a/b", "c/d", "e/f", "--search", "--dev_data", "x"], "needs these two"),
        (["--model_names_or_paths", "a/b", "c/d", "--search"], "needs a set to be best on"),
        (["--model_names_or_paths", "a/b", "c/d", "--search", "--dev_corpus", "x"], "belong together"),
        (["--model_names_or_paths", "a/b", "c/d", "--search", "--dev_data", "x", "--max_drop", "0.1"],
         "--max_drop has no effect without --guard_data"),
        (["--model_names_or_paths", "a/b", "c/d", "--search", "--dev_data", "x", "--guard_qrels", "y"],
         "--guard_qrels has no effect"),
        (["--model_names_or_paths", "a/b", "c/d", "--search", "--dev_corpus", "x", "--dev_queries", "y", "--objective",
          "loss"], "--objective loss needs rows"),
        (["--model_names_or_paths", "a/b", "c/d", "--search", "--dev_data", "x", "--model_type", "reranker"],
         "takes encoders, and decoders with --objective loss"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(args, message):
    script = runpy.run_path(str(SCRIPT))
    cfg = parse_config(script["Config"], [*args, "--output_path", "out"])
    with pytest.raises(ValueError, match=message):
        script["check"](cfg)


def test_a_plot_asks_for_matplotlib_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    script = runpy.run_path(str(SCRIPT))
    args = ["--model_names_or_paths", "a/b", "c/d", "--search", "--dev_data", "x", "--plot", "y.png"]
    with pytest.raises(ValueError, match="--plot needs matplotlib: pip install matplotlib"):
        script["check"](parse_config(script["Config"], [*args, "--output_path", "out"]))


@pytest.mark.parametrize("way", ["--weights 0.5 0.5", "--example_data rows.jsonl", "--search --dev_data rows.jsonl"])
def test_an_instruction_is_not_lost(tmp_path, models, rows, way):
    base, tuned = models[0], str(tmp_path / "tuned")
    save_encoder(tuned, *load_encoder(models[1], query_prefix="ask: "))
    common = ("--model_names_or_paths", base, tuned, *way.split(), "--output_path", "out")
    said = run(tmp_path, *common, status=2)
    [line] = [line for line in said.splitlines() if "error: " in line]
    assert line.startswith(
        f'mix_models.py: error: the models do not embed alike: query instruction none in {base}, "ask'
    )
    assert "Traceback" not in said and not (tmp_path / "out").exists()
    run(tmp_path, *common, "--settings_from", tuned)
    assert EmbeddingModel(str(tmp_path / "out")).settings.query_prefix == "ask: "
