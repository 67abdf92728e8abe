"""Whether models can be merged, and what becomes of each of their tensors.

Which tensor becomes what:

- A floating-point tensor that all models have is averaged in float32 (in float64 where one of them is float64).
- The first model decides what there is. Integer and boolean tensors, and buffers that the code computes itself, are
  copied from it. So is a pooler of an encoder that others lack; embeddings come from token states.
- A tied tensor, stored by one model and left out by another: where it equals, bit for bit, another tensor of the model
  that stores it, it is that tensor.
- Any other tensor that only some models have is an error.
- What is bit for bit the same in all models stays so, whatever the weights.
"""

import filecmp
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from bge_accel.config import check_model_path
from bge_accel.files.faults import Faults
from bge_accel.files.parsing import load_json
from bge_accel.files.text import shorten
from bge_accel.models.loading import COMPUTED
from bge_accel.models.settings import differing_settings, read_modules, read_settings
from bge_accel.models.tensor_files import Layout, TensorFiles

# model_type, the transformers class that loads it, and how one of its architectures ends.
MODEL_TYPES = {
    "encoder": ("AutoModel", ()),
    "decoder": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")),
    "reranker": ("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "encoder-decoder": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration", "LMHeadModel")),
}
# What may differ in config.json: it changes neither the tensors nor what is computed from them.
_HARMLESS = {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
    "initializer_factor", "gradient_checkpointing", "problem_type", "finetuning_task", "output_past",
    "output_attentions", "output_hidden_states", "return_dict", "max_length", "task_specific_params",
    "sentence_transformers",
}  # fmt: skip
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5",
                ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf", ".tflite", ".npz")  # fmt: skip
_COMPARED = 2**20  # bytes at a time


class MergeModel(NamedTuple):
    """A model to be merged, as it lies on the disk."""

    name: str
    folder: str
    files: TensorFiles
    config: dict[str, Any]


class MergePlan(NamedTuple):
    """What the merged model holds, and where each tensor comes from."""

    tensors: dict[str, Layout]
    sources: dict[str, dict[int, str]]
    """For each tensor its name in every model; of one that is copied only {0: name}."""
    copied: set[str]
    settings_of: int = 0
    """The model whose tokenizer, pooling, prompts and other files beside the weights are taken."""


def open_models(names: Sequence[str], stack: ExitStack, **hub: Any) -> list[MergeModel]:
    """Each model's folder, tensors and configuration; `stack` closes the files."""
    models = []
    for name in names:
        folder = model_folder(name, **hub)
        config = read_json(folder, "config.json")
        if not isinstance(config, dict):
            raise ValueError(f"{name} has no config.json, so it is no model")
        files = TensorFiles(folder)
        stack.callback(files.close)
        models.append(MergeModel(name, folder, files, config))
    return models


def model_folder(name: str, **hub: Any) -> str:
    """The folder of a model; one on the hub is downloaded, without weights in other formats.

    Raises:
        ValueError: there is no such model.
    """
    if os.path.isdir(name):
        return name
    check_model_path("the model", name)
    from huggingface_hub import snapshot_download

    other = ["*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite", "onnx/*", "openvino/*", "*.pth", "*.pt"]
    try:
        folder = snapshot_download(name, ignore_patterns=[*other, "*.bin"], **hub)
        if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
            folder = snapshot_download(name, ignore_patterns=other, **hub)
        return folder
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model {name!r} is neither a folder nor to be had from the hub ({str(error).splitlines()[0]})"
        ) from error


def check_models(
    models: Sequence[MergeModel],
    model_type: str,
    *,
    dtype: torch.dtype | None = None,
    settings_from: str | None = None,
) -> MergePlan:
    """How to merge models that fit together.

    Args:
        settings_from: the name of the model that the merged one pools and prompts as; by default the first, if it does
            so as the others.

    Raises:
        ValueError: they do not; the first ten mismatches, each with its model. Or they differ in how they embed.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}")
    faults = Faults()
    _check_configs(models, model_type, faults)
    _check_vocabularies(models, faults)
    _check_modules(models, faults)
    plan = _plan(models, model_type, dtype, faults)
    if faults.count:
        shown = "\n".join(faults.shown)
        more = f"\n... and {faults.count - len(faults.shown)} more" if faults.count > len(faults.shown) else ""
        raise ValueError(f"the models cannot be merged:\n{shown}{more}")
    return plan._replace(settings_of=_choose_settings(models, model_type, settings_from))


def _choose_settings(models: Sequence[MergeModel], model_type: str, settings_from: str | None) -> int:
    """The model whose settings the merged one takes; ValueError where the models differ and none is named."""
    names = [model.name for model in models]
    if settings_from is not None:
        same = [os.path.normpath(name) == os.path.normpath(settings_from) for name in names]
        if not any(same):
            raise ValueError(f"--settings_from {settings_from} is none of the models: {', '.join(names)}")
        return same.index(True)
    if model_type != "encoder":
        return 0
    settings = [read_settings(model.folder) for model in models]
    # Without sentence-transformers files a model says nothing: it is used as the first.
    said = [(name, own) for name, own in zip(names, settings, strict=True) if own.pooling is not None]
    differing = differing_settings(said)
    if said and settings[0].pooling is None:
        differing = f"{said[0][0]} says how it pools, and {names[0]} does not"
    if differing:
        raise ValueError(
            f"the models do not embed alike: {differing}. Name the one whose settings the merged model takes: "
            f'--settings_from {said[-1][0]}, or settings_from="{said[-1][0]}" in Python'
        )
    return 0


def _check_configs(models: Sequence[MergeModel], model_type: str, faults: Faults) -> None:
    _, endings = MODEL_TYPES[model_type]
    first = models[0]
    for model in models:
        config = model.config
        architectures = config.get("architectures") or []
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            faults.add(model.name, f'"architectures" in its config.json is {shorten(architectures)}: no list of names')
            continue
        if endings and architectures and not any(name.endswith(endings) for name in architectures):
            faults.add(model.name, f"its architecture {', '.join(architectures)} is no {model_type}")
        if model_type == "encoder-decoder" and not config.get("is_encoder_decoder"):
            faults.add(model.name, "its config.json does not say is_encoder_decoder")
        if config.get("quantization_config"):
            faults.add(model.name, "it is quantised; merge the models that it was made from")
        for key in sorted(config.keys() & first.config.keys()):
            if key in _HARMLESS or key.startswith("_") or "dropout" in key or key.endswith("_token_id"):
                continue
            if config[key] != first.config[key]:
                faults.add(
                    model.name,
                    f'"{key}" in its config.json is {shorten(config[key], 40)}; {shorten(first.config[key], 40)} '
                    f"in {first.name}",
                )


def _check_vocabularies(models: Sequence[MergeModel], faults: Faults) -> None:
    """A model without a tokenizer beside it, or with one of another kind, has none that could be compared."""
    found = [(model, name) for model in models if (name := _vocabulary_file(model.folder)) is not None]
    for model, name in found[1:]:
        first, first_name = found[0]
        paths = os.path.join(model.folder, name), os.path.join(first.folder, first_name)
        if filecmp.cmp(*paths, shallow=False):
            continue
        vocabulary, expected = map(_read_vocabulary, paths)
        if vocabulary is None or expected is None:
            if name == first_name:
                faults.add(model.name, f"another vocabulary: its {name} is not that of {first.name}")
        elif vocabulary.keys() != expected.keys():
            token = min(vocabulary.keys() ^ expected.keys())
            owner = model if token in vocabulary else first
            counts = f"{len(vocabulary):,} tokens, {len(expected):,} in {first.name}"
            faults.add(model.name, f"another vocabulary: {counts}; {shorten(token)} is only in {owner.name}")
        elif vocabulary != expected:
            token = next(token for token in expected if vocabulary[token] != expected[token])
            numbers = f"{shorten(token)} has number {vocabulary[token]}, and {expected[token]} in {first.name}"
            faults.add(model.name, f"another vocabulary: {numbers}")


def _vocabulary_file(folder: str) -> str | None:
    names = "tokenizer.json vocab.txt vocab.json tokenizer.model spiece.model sentencepiece.bpe.model".split()
    return next((name for name in names if os.path.isfile(os.path.join(folder, name))), None)


def _read_vocabulary(path: str) -> dict[str, int] | None:
    """Token to number; None where the file is not text."""
    folder, name = os.path.split(path)
    if name == "vocab.txt":
        try:
            with open(path, encoding="utf-8") as file:
                return {line.rstrip("\n"): number for number, line in enumerate(file)}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    if not name.endswith(".json"):
        return None
    content = read_json(folder, name)
    try:
        vocabulary = content if name == "vocab.json" else (content.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # Unigram: [piece, score] in order
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        added = [] if name == "vocab.json" else content.get("added_tokens") or []
        found = {**vocabulary, **{token["content"]: token["id"] for token in added}}
    except (AttributeError, LookupError, TypeError, ValueError):
        found = {}
    if not found or not all(isinstance(token, str) for token in found):
        raise ValueError(f"{path} is no vocabulary that is known here")
    return found


def _check_modules(models: Sequence[MergeModel], faults: Faults) -> None:
    """sentence-transformers modules: none with weights of its own."""
    for model in models:
        for folder in module_folders(model.folder):
            for root, _, names in os.walk(os.path.join(model.folder, folder)):
                for name in names:
                    if name.endswith(WEIGHT_FILES):
                        where = os.path.relpath(os.path.join(root, name), model.folder)
                        faults.add(model.name, f"its module {where} has weights of its own, which are not merged here")


def _plan(models: Sequence[MergeModel], model_type: str, dtype: torch.dtype | None, faults: Faults) -> MergePlan:
    first, *others = models
    plan = MergePlan({}, {}, set())

    def is_copied(name: str, layout: Layout) -> bool:
        return not layout.dtype.is_floating_point or name.rsplit(".", 1)[-1] in COMPUTED

    def may_lack(name: str, layout: Layout) -> bool:
        return is_copied(name, layout) or (model_type == "encoder" and "pooler" in name.split("."))

    shared = {name for name in first.files.tensors if all(name in model.files.tensors for model in others)}
    for name, layout in first.files.tensors.items():
        copied = is_copied(name, layout)
        plan.tensors[name] = layout if copied or dtype is None else layout._replace(dtype=dtype)
        sources = {0: name}
        for number, model in enumerate(others, start=1):
            own = model.files.tensors.get(name)
            if own is not None and own.shape != layout.shape:
                faults.add(f"{model.name}: {name}", f"its shape is {own.shape}; {layout.shape} in {first.name}")
            elif own is not None and own.dtype.is_floating_point != layout.dtype.is_floating_point:
                faults.add(f"{model.name}: {name}", f"its type is {own.dtype}; {layout.dtype} in {first.name}")
            elif own is not None:
                sources[number] = name
            elif may_lack(name, layout):
                copied = True
            elif (tied := _tied_to(first.files, name, shared)) is not None:
                sources[number] = tied
            else:
                faults.add(f"{model.name}: {name}", f"it is missing; {first.name} has it")
        plan.sources[name] = {0: name} if copied else sources
        if copied:
            plan.copied.add(name)
    for model in others:
        for name, layout in model.files.tensors.items():
            if name in first.files.tensors or may_lack(name, layout):
                continue
            if _tied_to(model.files, name, shared) is None:
                faults.add(f"{model.name}: {name}", f"{first.name} has no such tensor")
    return plan


def _tied_to(files: TensorFiles, name: str, candidates: set[str]) -> str | None:
    """The one of `candidates` that a tensor equals bit for bit, in the same model."""
    layout = files.tensors[name]
    for other in sorted(candidates):
        if other == name or files.tensors[other] != layout:
            continue
        for start in range(0, layout.num_bytes, _COMPARED):
            left, right = (torch.empty(min(_COMPARED, layout.num_bytes - start), dtype=torch.uint8) for _ in range(2))
            files.read(name, start, left)
            files.read(other, start, right)
            if not torch.equal(left, right):
                break
        else:
            return other
    return None


# ---- files beside the weights


def read_json(folder: str, name: str) -> Any:
    path = os.path.join(folder, name)
    return load_json(path) if os.path.isfile(path) else None


def module_folders(folder: str) -> list[str]:
    """Folders inside a model that belong to it."""
    modules = read_json(folder, "modules.json")
    paths = [path for _, path in read_modules(folder, [] if modules is None else modules) if path]
    return [path for path in (*paths, "additional_chat_templates") if os.path.isdir(os.path.join(folder, path))]
