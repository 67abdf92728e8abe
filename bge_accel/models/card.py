"""Tables and cards that people look at, as plain text."""

import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bge_accel.files.parsing import read_front_matter
from bge_accel.files.text import installed_version, printable, shown_name, shown_number
from bge_accel.models.pooling import POOLING

if TYPE_CHECKING:
    from bge_accel.models.settings import EmbeddingSettings


SHOWN_SCORES = ("nDCG@10", "MRR@10", "Recall@10", "Recall@100")  # of a card; a log has all


def model_card(
    *,
    name: str,
    base: str,
    settings: "EmbeddingSettings",
    data: str,
    training: str,
    configuration: str,
    license: Mapping[str, str] | None = None,
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> str:
    """README.md of a saved model: what it is, how to load it, how it was made, what it scored.

    Args:
        base: folder or hub name of the model it was made from; a folder is not linked.
        data: what it was trained on, as a sentence.
        training: what was done, to follow the base model's name in a sentence.
        configuration: as YAML.
        license: of the base, as `license_of` gives it.
        scores: when it was measured (`before`, `after`) -> data set -> metrics.
    """
    is_folder = os.path.isdir(base)
    shown_base = inline(shown_name(base))
    link = shown_base if is_folder else f"[{shown_base}](https://huggingface.co/{base})"
    header = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "sentence-similarity"],
        **({} if is_folder else {"base_model": base}),
        **(license or {}),
    }
    return f"""{front_matter(header)}
# {inline(name)}

A text-embedding model: {link}, {training}. {settings.pooling} pooling,
{"normalised: compare by dot product or cosine" if settings.normalize else "not normalised: compare by dot product"}.
{_instructions(settings)}

{usage(settings)}

## Training

{data}
{_score_section(scores or {})}
{fenced(configuration, "yaml")}

{versions("bge_accel", "torch", "transformers", "accelerate")}
"""


def inline(text: str) -> str:
    """A name in one line of Markdown, none of whose characters mean anything."""
    return re.sub(r"([\\`*<>\[\]#|]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(printable(text).split()))


def front_matter(fields: Mapping[str, Any]) -> str:
    """The block at the head of a card that the hub reads."""
    import yaml

    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=1000)}---\n"


def fenced(text: str, language: str) -> str:
    """A code block, whatever backticks the text has."""
    text = printable(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def versions(*packages: str) -> str:
    """`Made with torch 2.13.0, ...`: of the packages that are installed."""
    from bge_accel import __version__

    found = {name: __version__ if name == "bge_accel" else installed_version(name) for name in packages}
    return f"Made with {', '.join(f'{package} {number}' for package, number in found.items() if number)}."


def license_of(model: str, **hub: Any) -> dict[str, str]:
    """What a model's own card says of its licence, as the card of a model made from it has to say it.

    Args:
        model: folder or hub name.
        hub: `cache_dir`, `token`.

    Returns:
        `license` and, where there are, `license_name` and `license_link`; empty where it says nothing that can be read.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = os.path.join(model, "README.md") if os.path.isdir(model) else hf_hub_download(model, "README.md", **hub)
        said = read_front_matter(path)
    except (OSError, ValueError):  # no card, no network, or no front matter
        return {}
    found = {key: said.get(key) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in found.items() if isinstance(value, str) and value} if found["license"] else {}


def _instructions(settings: "EmbeddingSettings") -> str:
    said = [
        f"each {kind} gets {printable(json.dumps(prefix, ensure_ascii=False))} put before it"
        for kind, prefix in (("query", settings.query_prefix), ("passage", settings.passage_prefix))
        if prefix
    ]
    text = " and ".join(said) or "neither queries nor passages get an instruction"
    return text[0].upper() + text[1:] + "."


def _score_section(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    if not scores:
        return ""
    rows = ["| data set | metric | " + " | ".join(scores) + " |", "| :-- | :--" + " | --:" * len(scores) + " |"]
    for name, metrics in next(iter(scores.values())).items():
        for metric in (metric for metric in SHOWN_SCORES if metric in metrics):
            cells = " | ".join(shown_number(of[name].get(metric)) for of in scores.values())
            rows.append(f"| {inline(name)} | {metric} | {cells} |")
    return "\nRetrieval measured by the run itself:\n\n" + "\n".join(rows) + "\n"


def usage(settings: "EmbeddingSettings") -> str:
    """Four ways to load the model, as far as its pooling is known; each gives the same `q_emb` and `p_emb`."""
    example = 'queries, passages = ["a question"], ["a passage", "another, longer passage"]'
    normalised = "torch.nn.functional.normalize(pooled, dim=-1)" if settings.normalize else "pooled"
    pooled = POOLING[settings.pooling or "cls"].snippet
    ways = {
        "bge_accel": f"""
from bge_accel import EmbeddingModel

model = EmbeddingModel("path/to/this/folder")
{example}
q_emb, p_emb = model.encode_queries(queries), model.encode_corpus(passages)
scores = q_emb @ p_emb.T
""",
        "sentence-transformers": f"""
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
{example}
q_emb, p_emb = model.encode_query(queries), model.encode_document(passages)
scores = q_emb @ p_emb.T
""",
        "transformers": f"""
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", padding_side="right")
model = AutoModel.from_pretrained("path/to/this/folder").eval()


def embed(texts):
    batch = tokenizer(texts, padding=True, truncation=True, max_length={settings.max_length}, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"]
    pooled = {pooled}
    return {normalised}


{example}
q_emb = embed([{json.dumps(settings.query_prefix, ensure_ascii=False)} + text for text in queries])
p_emb = embed([{json.dumps(settings.passage_prefix, ensure_ascii=False)} + text for text in passages])
scores = q_emb @ p_emb.T
""",
        "LangChain": f"""
from langchain_huggingface import HuggingFaceEmbeddings

model = HuggingFaceEmbeddings(
    model_name="path/to/this/folder",
    encode_kwargs={{"prompt_name": "document"}},
    query_encode_kwargs={{"prompt_name": "query"}},
)
{example}
q_emb, p_emb = [model.embed_query(query) for query in queries], model.embed_documents(passages)
""",
    }
    if pooled is None:  # one that a changed script has added
        del ways["transformers"]
    return "\n\n".join(["## Usage", *(f"{name}:\n\n{fenced(code, 'python')}" for name, code in ways.items())])
