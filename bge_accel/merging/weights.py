"""Weights for merging: from the loss of each model on a few examples, or from a search between a model and its base.

From examples as in LM-Cocktail (Xiao et al. 2023, https://arxiv.org/abs/2311.13534): the soft-max of minus
each model's loss over a temperature. One model at a time is in memory.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from bge_accel.data.reading import check_training_row, read_rows
from bge_accel.encoding.embedding_model import EmbeddingModel, default_device
from bge_accel.encoding.pipeline import encode_texts
from bge_accel.evaluation.in_training import retrieval_from_rows
from bge_accel.evaluation.retrieval import EvaluationData, evaluate_retrieval
from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files
from bge_accel.files.text import shorten
from bge_accel.merging.merge import check_output_folder, known_arguments, load_merged, merge_models, mix_models
from bge_accel.merging.plan import check_models, open_models
from bge_accel.models.loading import load_tokenizer, max_positions
from bge_accel.models.settings import read_settings
from bge_accel.processes.progress import say

OBJECTIVES = ("loss", "ndcg@10")
CONTRASTIVE_TEMPERATURE = 0.05  # LM-Cocktail's
Examples = Sequence[Mapping[str, Any]]


@known_arguments
def mix_models_with_data(
    model_names_or_paths: Sequence[str],
    model_type: str,
    example_data: Examples,
    temperature: float = 5.0,
    batch_size: int = 2,
    max_input_length: int = 2048,
    neg_number: int = 7,
    output_path: str | None = None,
    *,
    objective: str = "loss",
    seed: int = 42,
    settings_from: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    overwrite_output_dir: bool = False,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Any:
    """`mix_models` with weights from how well each model does on a few examples.

    Args:
        model_type: "encoder" or "decoder".
        example_data: for encoders rows {"query": str, "pos": [str, ...], "neg": [str, ...]}, for decoders
            {"input": str, "output": str}.
        temperature: the losses are divided by it; a lower one makes the weights differ more.
        batch_size, max_input_length, neg_number, objective, seed: see `example_losses`.
        settings_from, output_path, dtype, max_shard_size, overwrite_output_dir: see `mix_models`.

    Returns:
        The merged model, loaded. The weights are printed, and written with it.

    Raises:
        ValueError: as `mix_models`; an example is not as it has to be.
    """
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code, "cache_dir": cache_dir, "token": token}
    names = list(model_names_or_paths)
    examples = check_examples(example_data, model_type)
    if output_path is not None:
        check_output_folder(output_path, names, overwrite=overwrite_output_dir)
    losses = example_losses(
        names,
        model_type,
        examples,
        batch_size=batch_size,
        max_input_length=max_input_length,
        neg_number=neg_number,
        objective=objective,
        seed=seed,
        settings_from=settings_from,
        **hub,
    )
    weights = weights_from_losses(losses, temperature)
    for name, weight, loss in zip(names, weights, losses, strict=True):
        say(f"{weight:.4f}  {name}  (loss {loss:.4f})")
    return mix_models(
        names,
        model_type,
        weights,
        output_path,
        settings_from=settings_from,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite_output_dir=overwrite_output_dir,
        recipe={
            "weights_from": {
                "examples": len(examples),
                "objective": objective,
                "losses": losses,
                "temperature": temperature,
                "batch_size": batch_size,
                "max_input_length": max_input_length,
                "neg_number": neg_number,
                "seed": seed,
            }
        },
        **hub,
    )


def weights_from_losses(losses: Sequence[float], temperature: float) -> list[float]:
    """Soft-max of minus the losses over the temperature, in float32."""
    if not temperature > 0:
        raise ValueError(f"the temperature is {temperature}: it has to be above 0")
    return torch.softmax(-torch.tensor(losses, dtype=torch.float32) / temperature, -1).tolist()


def example_losses(
    model_names_or_paths: Sequence[str],
    model_type: str,
    examples: Examples,
    *,
    batch_size: int = 2,
    max_input_length: int = 2048,
    neg_number: int = 7,
    objective: str = "loss",
    seed: int = 42,
    settings_from: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> list[float]:
    """The loss of each model on the examples, after a check that the models can be merged.

    Args:
        batch_size: examples whose loss is taken together; the mean over the batches counts, as in LM-Cocktail. Of an
            encoder the passages of one batch are each other's negatives.
        max_input_length: in tokens; an encoder's texts are cut to what it takes.
        neg_number: negatives drawn for a query; fewer where it has fewer.
        objective: "loss" is the contrastive loss at temperature 0.05 with the model's own pooling and instructions, of
            a decoder that of the next token of the output. "ndcg@10" (encoders) ranks all passages of the examples for
            each query; its loss is 100 less the nDCG@10 in percent.
        seed: of the draw of negatives.
        settings_from: as a model that does not say how it pools is used; see `mix_models`.
    """
    hub = {"cache_dir": cache_dir, "token": token}
    if objective not in OBJECTIVES or (objective != "loss" and model_type != "encoder"):
        raise ValueError(f"the objective {objective!r} is not one of: loss; for encoders also ndcg@10")
    for name, value in (("batch_size", batch_size), ("max_input_length", max_input_length)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it has to be at least 1")
    if neg_number < 0:
        raise ValueError(f"neg_number is {neg_number}: it has to be at least 0")
    with ExitStack() as stack:
        models = open_models(model_names_or_paths, stack, **hub)
        plan = check_models(models, model_type, settings_from=settings_from)
    folders = [model.folder for model in models]
    if model_type == "decoder":
        return [
            decoder_loss(folder, examples, batch_size, max_input_length, trust_remote_code=trust_remote_code)
            for folder in folders
        ]
    losses = []
    of_merged = read_settings(folders[plan.settings_of])
    for folder in folders:
        # A model that does not say how it pools is used as the merged one will be.
        own = read_settings(folder)
        said = of_merged if own.pooling is None else own
        model = EmbeddingModel(
            folder,
            dtype="float32",
            pooling=said.pooling,
            normalize=said.normalize,
            lengths={"max_input_length": max_input_length},
            cut_by={"query": "max_input_length", "passage": "max_input_length"},
            trust_remote_code=trust_remote_code,
        )
        if objective == "loss":
            losses.append(encoder_loss(model, examples, batch_size, max_input_length, neg_number, seed))
        else:
            losses.append(100 * (1 - ndcg_at_10(model, examples_to_retrieve(examples), max_input_length)))
        del model
    return losses


# ---- examples


def read_examples(paths: Sequence[str], model_type: str) -> list[dict[str, Any]]:
    """Checked examples from files; see `check_examples`."""
    faults = Faults()
    found = [(where, row) for path in find_files(paths, faults) for where, _, row in read_rows(path, faults)]
    for where, row in found:
        _check_example(where, row, model_type, faults)
    faults.raise_if_any()
    return [row for _, row in found]


def check_examples(examples: Examples, model_type: str) -> list[dict[str, Any]]:
    """The examples as a list.

    Raises:
        ValueError: there are none, one lacks what a model of this type needs, or there is no loss for the type.
    """
    if model_type not in ("encoder", "decoder"):
        raise ValueError(f"there is no loss on examples for model_type {model_type!r}: give weights to mix_models")
    faults = Faults()
    for number, row in enumerate(examples):
        _check_example(f"example_data[{number}]", row, model_type, faults)
    faults.raise_if_any()
    if not len(examples):
        raise ValueError("example_data is empty: give at least one example")
    return [dict(row) for row in examples]


def _check_example(where: str, row: Any, model_type: str, faults: Faults) -> None:
    if not isinstance(row, Mapping):
        faults.add(where, f"{shorten(row)} is no mapping like {{...}}")
    elif model_type == "encoder":
        for what in check_training_row(dict(row)):
            faults.add(where, what)
    else:
        for name in ("input", "output"):
            if not isinstance(row.get(name), str):
                faults.add(where, f'"{name}" is {shorten(row.get(name))}: a decoder\'s example needs a string')


def examples_to_retrieve(examples: Examples) -> EvaluationData:
    """Queries, the passages of all examples as a corpus, and "pos" as judgements."""
    return retrieval_from_rows((f"example {number}", row) for number, row in enumerate(examples))


# ---- losses


def encoder_loss(
    model: EmbeddingModel, examples: Examples, batch_size: int, max_length: int, neg_number: int, seed: int
) -> float:
    """Mean over the batches of the contrastive loss at temperature 0.05 over the passages of the batch.

    The first positive and `neg_number` negatives of each query, drawn as `random.Random(seed).sample` draws them.
    """
    draw = random.Random(seed)
    queries, passages, groups = [], [], []
    for row in examples:
        negatives = row.get("neg") or []
        queries.append((row.get("prompt") or model.settings.query_prefix) + row["query"])
        group = [row["pos"][0], *draw.sample(negatives, min(neg_number, len(negatives)))]
        passages += [model.settings.passage_prefix + text for text in group]
        groups.append(len(group))
    starts = np.cumsum([0, *groups])
    if all(starts[min(at + batch_size, len(groups))] - starts[at] == 1 for at in range(0, len(groups), batch_size)):
        raise ValueError('no example has a "neg" to be compared with: give some, or a batch_size above 1')
    max_length = min(max_length, max_positions(model.encoder.backbone.config))
    q_emb, p_emb = (
        torch.from_numpy(encode_texts(model.encoder, model.tokenizer, texts, max_length=max_length))
        for texts in (queries, passages)
    )
    losses = []
    for at in range(0, len(groups), batch_size):
        stop = min(at + batch_size, len(groups))
        scores = q_emb[at:stop] @ p_emb[starts[at] : starts[stop]].T / CONTRASTIVE_TEMPERATURE
        losses.append(F.cross_entropy(scores, torch.from_numpy(starts[at:stop] - starts[at])))
    return float(torch.stack(losses).mean())


def ndcg_at_10(model: EmbeddingModel, data: EvaluationData, max_length: int | None = None) -> float:
    """nDCG@10 of exact search, with the model's own pooling and instructions."""
    found = evaluate_retrieval(
        model, data, k=10, cutoffs=[10], max_query_length=max_length, max_passage_length=max_length
    )
    return found.metrics["nDCG@10"]


def decoder_loss(
    folder: str, examples: Examples, batch_size: int, max_length: int, *, trust_remote_code: bool = False
) -> float:
    """Mean over the batches of the mean loss of the tokens of "output" and the end, after "input" and a space.

    Raises:
        ValueError: `max_length` cuts off the whole output of an example.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    device = default_device()
    model = load_merged(folder, "decoder", trust_remote_code=trust_remote_code).to(device)
    losses = []
    for batch in _decoder_batches(tokenizer, examples, batch_size, max_length):
        with torch.inference_mode():
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            losses.append(model(**inputs).loss.float().cpu())
    return float(torch.stack(losses).mean())


def _decoder_batches(
    tokenizer: Any, examples: Examples, batch_size: int, max_length: int
) -> Iterator[dict[str, torch.Tensor]]:
    rows = []
    for number, row in enumerate(examples):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*tokenizer.encode(row["input"] + " " + row["output"]), *end][:max_length]
        prompt = len(tokenizer.encode(row["input"]))
        if prompt >= len(ids):
            raise ValueError(
                f"example {number}: its input has {prompt} tokens, so that nothing of its output is left within "
                f"max_input_length {max_length}; raise that or drop the example"
            )
        rows.append((ids, prompt))
    for at in range(0, len(rows), batch_size):
        batch = rows[at : at + batch_size]
        shape = (len(batch), max(len(ids) for ids, _ in batch))
        # What stands at padding does not matter: attention and loss leave it out.
        tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
        attention = torch.zeros(shape, dtype=torch.int64)
        for line, (ids, prompt) in enumerate(batch):
            tokens[line, : len(ids)] = torch.tensor(ids)
            labels[line, prompt : len(ids)] = torch.tensor(ids[prompt:])
            attention[line, : len(ids)] = 1
        yield {"input_ids": tokens, "attention_mask": attention, "labels": labels}


# ---- search


class MixScore(NamedTuple):
    """How one mix of base and tuned model does; higher is better."""

    tuned_weight: float
    dev: float
    guard: float | None


def search_mixes(
    base: str,
    tuned: str,
    model_type: str,
    dev_score: Callable[[str], float],
    guard_score: Callable[[str], float] | None = None,
    *,
    num_steps: int = 10,
    on_score: Callable[[MixScore], Any] = lambda score: None,
    settings_from: str | None = None,
    **hub: Any,
) -> list[MixScore]:
    """Scores of the mixes along the line from base to tuned model, at `num_steps` + 1 weights from 0 to 1.

    Args:
        dev_score, guard_score: from the folder of a model to its score on each set. The mixes are written into a
            temporary folder, one at a time.
        on_score: called with each score as it is known.
        settings_from: see `mix_models`.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: it has to be at least 1")
    scores = []
    with tempfile.TemporaryDirectory(prefix="bge_accel_search_") as folder:
        mixed = os.path.join(folder, "mixed")
        for step in range(num_steps + 1):
            weight = step / num_steps
            merge_models([base, tuned], model_type, [1 - weight, weight], mixed, settings_from=settings_from, **hub)
            scores.append(MixScore(weight, dev_score(mixed), guard_score(mixed) if guard_score else None))
            shutil.rmtree(mixed)
            on_score(scores[-1])
    return scores


def choose_mix(scores: Sequence[MixScore], max_drop: float = 0.0) -> MixScore:
    """The best on the dev set of those that lose at most `max_drop` of the base's score on the guard set.

    Of equals the one nearest to the base. The base itself (the first) loses nothing, so there always is one.
    """
    least = -np.inf if scores[0].guard is None else scores[0].guard - max_drop - 1e-9  # 0.9 - 0.89 is over 0.01
    allowed = [score for score in scores if score.guard is None or score.guard >= least]
    return max(allowed, key=lambda score: (score.dev, -score.tuned_weight))


def plot_mixes(path: str, scores: Sequence[MixScore], chosen: MixScore, max_drop: float) -> None:
    """Writes both scores along the line from base to tuned as a PNG; matplotlib has to be installed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    weights = [score.tuned_weight for score in scores]
    axes.plot(weights, [score.dev for score in scores], marker="o", label="dev set")
    if scores[0].guard is not None:
        axes.plot(weights, [score.guard for score in scores], marker="s", label="guard set")
        axes.axhline(
            scores[0].guard - max_drop, linestyle=":", color="tab:orange", label="least allowed on the guard set"
        )
    axes.axvline(chosen.tuned_weight, linestyle="--", color="gray", label=f"chosen: {chosen.tuned_weight:g}")
    axes.set_xlabel("weight of the tuned model")
    axes.set_ylabel("score")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
