"""Cards of tuned and merged models: their own snippets run and agree, and the hub can read their head."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.repo import Run
from helpers.runs import log, write_rows
from huggingface_hub import ModelCard

from bge_accel import mix_models
from bge_accel.models.card import license_of, model_card
from bge_accel.models.pooling import POOLING
from bge_accel.models.settings import EmbeddingSettings

INSTRUCTION = 'Find "it":\n\\ 的 '
WAYS = ["bge_accel", "sentence-transformers", "transformers", "LangChain"]


def snippets(card: str) -> dict[str, str]:
    found = re.finditer(r"^(\S+):\n\n(`{3,})python\n(.*?)\n\2$", card, re.MULTILINE | re.DOTALL)
    return {block[1]: block[3] for block in found}


def embeddings(code: str, folder: Path) -> list[np.ndarray]:
    """What a card's snippet computes for its queries and passages."""
    names: dict = {}
    exec(code.replace('"path/to/this/folder"', repr(str(folder))), names)
    return [np.asarray(names["q_emb"]), np.asarray(names["p_emb"])]


def assert_snippets_agree(folder: Path, ways: Sequence[str] = WAYS[:3]) -> None:
    found = snippets((folder / "README.md").read_text(encoding="utf-8"))
    assert list(found) == WAYS
    first, *others = (embeddings(found[way], folder) for way in ways)
    assert first[0].shape[0] == 1 and first[1].shape[0] == 2
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            np.testing.assert_allclose(theirs, ours, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def licensed(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a card of its own."""
    folder = tmp_path_factory.mktemp("base") / "odd _name_ `x`"
    folder.mkdir()
    for path in Path(tiny_model).iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: 'my: licence'\n---\n# Base\n")
    return folder


@pytest.mark.parametrize("pooling", POOLING)
def test_snippets_of_a_tuned_model_run_and_agree(tmp_path: Path, licensed: Path, run_script: Run, pooling: str) -> None:
    data, held_out = write_rows(tmp_path / "rows.jsonl", 16), write_rows(tmp_path / "dev.jsonl", 12, seed=1)
    out = tmp_path / 'tuned: "#1"'
    run_script(
        *("finetune.py", "--model_name_or_path", licensed, "--train_data", data, "--output_dir", out),
        *("--max_steps", 2, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3, "--eval_data", held_out),
        *("--eval_on_start", "--sentence_pooling_method", pooling, "--normalize_embeddings", pooling != "mean"),
        *("--query_instruction_for_retrieval", INSTRUCTION, "--passage_instruction_for_retrieval", "passage: "),
    )
    assert_snippets_agree(out)
    text = (out / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.license == "other" and card.data.license_name == "my: licence"
    head = card.data.to_dict()
    assert "base_model" not in head and head["library_name"] == "sentence-transformers"
    assert str(tmp_path) not in text and str(licensed.parent) not in text
    assert "16 rows of query and passages from rows.jsonl" in text
    measured = {row["step"]: row["eval"]["dev"] for row in log(out) if "eval" in row}
    assert f"| dev | nDCG@10 | {measured[0]['nDCG@10']:.4f} | {measured[2]['nDCG@10']:.4f} |" in text
    for package in ("bge_accel", "torch", "transformers", "accelerate"):
        assert re.search(rf"^Made with .*{package} \d", text, re.MULTILINE)
    configuration = re.search(r"```yaml\n(.*?)\n```", text, re.DOTALL)
    assert configuration and yaml.safe_load(configuration[1])["query_instruction_for_retrieval"] == INSTRUCTION


def test_card_of_a_merged_model(tmp_path: Path, licensed: Path, run_script: Run) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 16)
    run_script(
        *("finetune.py", "--model_name_or_path", licensed, "--train_data", data, "--output_dir", "tuned"),
        *("--max_steps", 2, "--per_device_train_batch_size", 4, "--query_instruction_for_retrieval", INSTRUCTION),
    )
    assert "measured by the run" not in (tmp_path / "tuned" / "README.md").read_text(), "a score that nobody measured"
    tuned = tmp_path / "tuned"
    mix_models([str(tuned), str(tuned)], "encoder", [0.5, 0.5], str(tmp_path / "mer: ged"))
    assert_snippets_agree(tmp_path / "mer: ged")
    card = ModelCard.load(tmp_path / "mer: ged" / "README.md")
    assert card.data.license == "other" and card.data.tags == ["merge", "encoder"]
    mix_models([str(tuned), str(licensed)], "encoder", [0.5, 0.5], str(tmp_path / "known"))
    (tuned / "README.md").write_text("---\nlicense: mit\n---\n")
    mix_models([str(tuned), str(licensed)], "encoder", [0.5, 0.5], str(tmp_path / "differ"))
    assert ModelCard.load(tmp_path / "known" / "README.md").data.license == "other"
    assert ModelCard.load(tmp_path / "differ" / "README.md").data.license is None


@pytest.mark.parametrize("pooling", POOLING)
def test_langchain_snippet_agrees(tmp_path: Path, licensed: Path, run_script: Run, pooling: str) -> None:
    pytest.importorskip("langchain_huggingface", reason="needs `pip install langchain-huggingface`")
    data = write_rows(tmp_path / "rows.jsonl", 16)
    run_script(
        *("finetune.py", "--model_name_or_path", licensed, "--train_data", data, "--output_dir", "tuned"),
        *("--max_steps", 2, "--per_device_train_batch_size", 4, "--query_instruction_for_retrieval", INSTRUCTION),
        *("--passage_instruction_for_retrieval", "passage: "),
        *("--sentence_pooling_method", pooling, "--normalize_embeddings", pooling != "mean"),
    )
    mix_models([str(tmp_path / "tuned")] * 2, "encoder", [0.5, 0.5], str(tmp_path / "mer: ged"))
    for folder in ("tuned", "mer: ged"):
        assert_snippets_agree(tmp_path / folder, ["bge_accel", "LangChain"])


@pytest.mark.parametrize("name", ["null", "- a: b", "# `x` ```", "*a*|[b](c)", "的 é\n---\nx: y", "'\""])
def test_odd_names_stay_names(name: str) -> None:
    text = model_card(
        name=name,
        base="BAAI/bge-small-en-v1.5",
        settings=EmbeddingSettings("cls", True, name, name, 64),
        data="Data.",
        training="fine-tuned",
        configuration=yaml.safe_dump({"name": f"```\n{name}\n````\n"}),
        license={"license": "mit"},
    )
    data = ModelCard(text).data
    assert data.base_model == "BAAI/bge-small-en-v1.5" and data.license == "mit"
    assert "](https://huggingface.co/BAAI/bge-small-en-v1.5)" in text
    for code in snippets(text).values():
        compile(code, "snippet", "exec")
    assert list(snippets(text)) == WAYS


@pytest.mark.parametrize(
    "card",
    [
        None,
        "no head",
        "---\nlicense: [a, b]\n---\n",
        "---\na: b: c\n---\n",
        "---\n- a\n---\n",
        f"---\nlicense: {'[' * 9999}\n---\n",
    ],
    ids=lambda card: str(card)[:20],
)
def test_a_licence_is_never_invented(tmp_path: Path, card: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) == {}
    assert license_of("nobody/not-there") == {}
