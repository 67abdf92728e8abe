"""Weighted averages of models' weights, read and written as a stream.

Averaging a fine-tuned model with its base gives back what fine-tuning made it forget (LM-Cocktail, Xiao et al. 2023,
https://arxiv.org/abs/2311.13534); the average of several runs or checkpoints is often better than each (Model soups,
Wortsman et al. 2022, https://arxiv.org/abs/2203.05482).
"""

import difflib
import errno
import functools
import inspect
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

import torch

from bge_accel.encoding.pipeline import prefetch
from bge_accel.files.atomic import DISK_FULL, atomic_folder
from bge_accel.files.lock import is_empty, locked
from bge_accel.files.outputs import check_folder
from bge_accel.files.text import shown_name, shown_size
from bge_accel.merging.plan import (
    MODEL_TYPES,
    WEIGHT_FILES,
    MergeModel,
    MergePlan,
    check_models,
    model_folder,
    module_folders,
    open_models,
    read_json,
)
from bge_accel.models.loading import encoder_class, load_weights
from bge_accel.models.precision import floating_dtype
from bge_accel.models.tensor_files import (
    INDEX,
    Layout,
    TensorFiles,
    parse_size,
    plan_shards,
    write_index,
    write_safetensors,
)
from bge_accel.processes.progress import progress
from bge_accel.training.checkpoint import find_checkpoints
from bge_accel.training.saved_model import SAVED

P = ParamSpec("P")
R = TypeVar("R")

RECIPE = "merge_recipe.json"
"""Name of the file in a merged model that says what it was made of."""
TOLERANCE = 1e-3  # how far from 1 the sum of the weights may be
_SLICE = 2**18  # elements that are averaged at a time
_READ_AHEAD = 2  # slices
# Of a run, not of a model.
_NOT_COPIED = ("README.md", "run_config.yaml", "train_log.jsonl", "trainer_state.json", SAVED, RECIPE)


def known_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Has a function name the nearest right argument beside one that it does not have (TypeError)."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"
                raise TypeError(f"{function.__name__}() has no argument {name!r}{hint}")
        return function(*args, **kwargs)

    return call


@known_arguments
def mix_models(
    model_names_or_paths: Sequence[str],
    model_type: str,
    weights: Sequence[float],
    output_path: str | None = None,
    *,
    normalize: bool = False,
    settings_from: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    overwrite_output_dir: bool = False,
    recipe: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Any:
    """The weighted average of models of one architecture, under LM-Cocktail's name and arguments.

    Args:
        model_names_or_paths: folders or hub names; the configuration is the first's.
        model_type: "encoder", "decoder", "reranker" or "encoder-decoder".
        weights: one a model, summing to 1 (within 0.001) unless `normalize`.
        output_path: a new folder for the merged model; by default it is not kept.
        normalize: divide the weights by their sum.
        settings_from: the one of the models whose tokenizer, pooling, prompts and length the merged one has; by default
            the first, where they do not differ.
        dtype: of the floating-point tensors, by torch's name; by default each has the first model's.
        max_shard_size: a larger model is written as several files.
        overwrite_output_dir: replace what stands at `output_path`.
        recipe: added to what the model card and `merge_recipe.json` say, such as how the weights were found.

    Returns:
        The merged model, loaded by the `transformers` class of its type, in evaluation mode.

    Raises:
        ValueError: the models do not fit together, naming each mismatch and the model it is in; they differ in how they
            embed and `settings_from` names none; bad weights.
        OSError: the disk is full. Nothing is left behind after an error.
    """
    loading = {"trust_remote_code": trust_remote_code}
    writing: dict[str, Any] = {"normalize": normalize, "dtype": dtype, "max_shard_size": max_shard_size}
    writing |= {"settings_from": settings_from}
    writing |= {"overwrite_output_dir": overwrite_output_dir, "recipe": recipe}
    writing |= {"cache_dir": cache_dir, "token": token}
    for name in model_names_or_paths[:1]:  # what it has the others have
        check_complete(name, model_type, cache_dir=cache_dir, token=token, **loading)
    if output_path is not None:
        merge_models(model_names_or_paths, model_type, weights, output_path, **writing)
        return load_merged(output_path, model_type, **loading)
    with tempfile.TemporaryDirectory(prefix="bge_accel_merge_") as folder:
        merged = os.path.join(folder, "merged")
        merge_models(model_names_or_paths, model_type, weights, merged, **writing)
        return load_merged(merged, model_type, **loading)


mix_models_by_layers = mix_models
"""`mix_models`, which is a stream whatever the models' sizes."""


def load_merged(folder: str, model_type: str, **options: Any) -> Any:
    """A model from a folder, by the `transformers` class of its type, in its own precision and evaluation mode."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loader = getattr(transformers, MODEL_TYPES[model_type][0])
    if model_type == "encoder":
        loader = encoder_class(read_json(folder, "config.json").get("model_type", ""))
    return load_weights(loader, folder, needs_pooler=model_type != "encoder", dtype="auto", **options)


def check_complete(name: str, model_type: str, *, trust_remote_code: bool = False, **hub: Any) -> None:
    """Whether a model has all tensors that its configuration asks for, by their names alone.

    Raises:
        ValueError: it has not; whatever is merged with it would lack them, too.
    """
    from transformers import CONFIG_MAPPING

    folder = model_folder(name, **hub)
    config = read_json(folder, "config.json")
    if model_type not in MODEL_TYPES or not isinstance(config, dict) or config.get("model_type") not in CONFIG_MAPPING:
        return
    if trust_remote_code or not config.get("auto_map"):
        load_merged(folder, model_type, device_map="meta", trust_remote_code=trust_remote_code)


def last_checkpoints(run_dir: str, number: int) -> list[str]:
    """The last `number` folders `checkpoint-STEP` of a run, the latest first.

    Raises:
        ValueError: there are not so many.
    """
    found = [path for _, path in find_checkpoints(run_dir)]
    if number < 1 or len(found) < number:
        raise ValueError(f"the last {number} checkpoints are asked for, and {run_dir} holds {len(found)}")
    return found[::-1][:number]


def merge_models(
    model_names_or_paths: Sequence[str],
    model_type: str,
    weights: Sequence[float],
    output_path: str,
    *,
    normalize: bool = False,
    settings_from: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    overwrite_output_dir: bool = False,
    recipe: Mapping[str, Any] | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> None:
    """`mix_models` without loading the result: memory is bounded by a few slices, whatever the models."""
    weights = check_weights(weights, len(model_names_or_paths), normalize=normalize)
    out_dtype = None if dtype is None else floating_dtype(dtype)
    shard_size = parse_size(max_shard_size)
    check_output_folder(output_path, model_names_or_paths, overwrite=overwrite_output_dir)
    with ExitStack() as stack:
        stack.enter_context(
            locked(output_path, is_folder=False)
        )  # beside the folder, which is replaced with its own lock
        stack.enter_context(locked(output_path))
        models = open_models(model_names_or_paths, stack, cache_dir=cache_dir, token=token)
        plan = check_models(models, model_type, dtype=out_dtype, settings_from=settings_from)
        settings_of = models[plan.settings_of]
        shards = plan_shards(plan.tensors, shard_size)
        recipe = {
            "method": "weighted average",
            "models": [
                {"name": shown_name(model.name), "weight": weight}
                for model, weight in zip(models, weights, strict=True)
            ],
            "dtype": str(dtype).removeprefix("torch.") if dtype is not None else "as the first model's",
            "settings_from": shown_name(settings_of.name),
            **(recipe or {}),
        }
        total = sum(layout.num_bytes for layout in plan.tensors.values())
        total += sum(os.path.getsize(os.path.join(models[0].folder, name)) for name in _other_files(models[0].folder))
        parent = _existing_parent(output_path)
        try:
            if shutil.disk_usage(parent).free < total:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with atomic_folder(output_path) as folder:
                _write_weights(folder, models, weights, plan, shards)
                _copy_other_files(settings_of.folder, folder)
                _write_card(folder, os.path.basename(os.path.abspath(output_path)), models, model_type, recipe)
                # Last: without it nothing loads, so that whatever loads is whole.
                _write_config(folder, models[0].config, out_dtype)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            free = shutil.disk_usage(parent).free
            raise OSError(
                error.errno,
                f"the disk is full ({error.strerror}): {output_path} needs {shown_size(total)}, {shown_size(free)} are free "
                "there; nothing was left behind",
            ) from None


# ---- checks, before anything is written


def check_weights(weights: Sequence[float], num_models: int, *, normalize: bool = False) -> list[float]:
    """One finite weight a model, divided by their sum where `normalize`; else they have to sum to 1.

    Raises:
        ValueError: they are not.
    """
    weights = [float(weight) for weight in weights]
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != num_models or not weights:
        raise ValueError(f"{len(weights)} weights ({shown}) for {num_models} models: give one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"the weights {shown} have to be finite numbers")
    total = math.fsum(weights)
    if normalize:
        if abs(total) < 1e-6:
            raise ValueError(f"the weights {shown} sum to {total:g} and cannot be normalised")
        return [weight / total for weight in weights]
    if abs(total - 1) > TOLERANCE:
        raise ValueError(
            f"the weights {shown} sum to {total:g}, not to 1; change them, or give --normalize (normalize=True)"
        )
    return weights


def check_output_folder(output_path: str, inputs: Sequence[str], *, overwrite: bool) -> None:
    """Raises ValueError where a merged model cannot be written to a folder, or would replace what is needed."""
    check_folder("the output", output_path)
    target = os.path.realpath(output_path)
    for name in inputs:
        if os.path.exists(name) and os.path.commonpath([target, os.path.realpath(name)]) == target:
            raise ValueError(f"the output {output_path} is or holds {name}, which is read; name another folder")
    if os.path.isdir(target) and not is_empty(target) and not overwrite:
        raise ValueError(f"the output {output_path} is not empty; name another folder, or give --overwrite_output_dir")
    check_folder("the folder of the output", os.path.dirname(target))  # it is written beside, and renamed


def _existing_parent(path: str) -> str:
    """The nearest folder above a path that is there."""
    parent = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    return parent


# ---- the stream


def _write_weights(
    folder: str,
    models: Sequence[MergeModel],
    weights: Sequence[float],
    plan: MergePlan,
    shards: Mapping[str, Sequence[str]],
) -> None:
    files = [model.files for model in models]
    # (model, its name of the tensor, weight) of what each tensor is the sum of.
    parts = {
        name: [(0, name, 1.0)]
        if name in plan.copied
        else [(number, own, weights[number]) for number, own in sources.items() if weights[number]]
        for name, sources in plan.sources.items()
    }
    total = sum(files[i].tensors[own].num_bytes for of in parts.values() for i, own, _ in of)
    with (
        _one_thread(),
        progress(total, "merging", "B", unit_scale=True, delay=1, leave=False) as bar,
    ):
        for name, tensors in shards.items():
            layouts = {tensor: plan.tensors[tensor] for tensor in tensors}
            with closing(_averages(files, layouts, parts, bar.update)) as averages:
                write_safetensors(os.path.join(folder, name), layouts, averages)
    if len(shards) > 1:
        write_index(os.path.join(folder, INDEX), plan.tensors, shards)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Has torch compute in one thread: disk and memory set the pace, and more threads would only wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _averages(
    files: Sequence[TensorFiles],
    tensors: Mapping[str, Layout],
    parts: Mapping[str, Sequence[tuple[int, str, float]]],
    on_bytes: Callable[[int], Any],
) -> Generator[torch.Tensor, None, None]:
    """Yields the weighted averages slice by slice, tensor after tensor; each is overwritten by the next."""
    widest = _SLICE * 8
    # The slice in hand, the one before it, and those read ahead.
    raw = [torch.empty(widest, dtype=torch.uint8) for _ in range(_READ_AHEAD + 2)]
    summed, widened, narrowed = (torch.empty(widest, dtype=torch.uint8) for _ in range(3))

    def slices(num_elements: int) -> list[tuple[int, int]]:
        return [(start, min(_SLICE, num_elements - start)) for start in range(0, num_elements, _SLICE)]

    def read() -> Iterator[torch.Tensor]:
        turn = 0
        for name, layout in tensors.items():
            for start, count in slices(layout.numel):
                for model, own, _ in parts[name]:
                    width = files[model].tensors[own].dtype.itemsize
                    buffer = raw[turn % len(raw)][: count * width]
                    files[model].read(own, start * width, buffer)
                    turn += 1
                    yield buffer

    with closing(prefetch(read(), _READ_AHEAD)) as arriving:  # type: ignore[type-var]
        for name, layout in tensors.items():
            dtypes = [files[model].tensors[own].dtype for model, own, _ in parts[name]]
            wide = torch.float64 if torch.float64 in dtypes else torch.float32
            # Equal slices stay as they are, bit for bit, where the weights sum to 1 as well as decimals can.
            keeps_equal = len(set(dtypes)) == 1 and abs(math.fsum(weight for *_, weight in parts[name]) - 1) < 1e-6
            is_copy = keeps_equal and len(dtypes) == 1
            for _, count in slices(layout.numel):
                total = summed[: count * wide.itemsize].view(wide)
                all_equal = keeps_equal
                previous: torch.Tensor | None = None
                for dtype, (*_, weight) in zip(dtypes, parts[name], strict=True):
                    current = next(arriving)
                    on_bytes(len(current))
                    all_equal = all_equal and (previous is None or _same_bytes(previous, current))
                    if not is_copy:
                        average_into(total, current.view(dtype), weight, widened, is_first=previous is None)
                    previous = current
                assert previous is not None
                result = previous.view(dtypes[-1]) if all_equal else total
                yield _narrow(result, narrowed[: count * layout.dtype.itemsize].view(layout.dtype), name)


def average_into(
    total: torch.Tensor, values: torch.Tensor, weight: float, buffer: torch.Tensor, *, is_first: bool
) -> None:
    """Adds `weight * values` to `total` (n,), both in the precision of `total`; the first of a sum replaces it.

    Args:
        buffer: uint8, room for n values in that precision.
    """
    if values.dtype != total.dtype and not is_first:
        values = buffer[: total.numel() * total.dtype.itemsize].view(total.dtype).copy_(values)
    if is_first:
        total.copy_(values)
        total.mul_(weight)
    else:
        total.add_(values, alpha=weight)


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    # Where slices differ, the first few bytes nearly always do.
    return torch.equal(left[:256], right[:256]) and torch.equal(left, right)


def _narrow(values: torch.Tensor, out: torch.Tensor, name: str) -> torch.Tensor:
    """`values` in the type of `out`, which is used only where they differ."""
    if values.dtype == out.dtype:
        return values
    out.copy_(values)
    if out.dtype != torch.bfloat16 and not out.float().isfinite().all() and values.isfinite().all():
        largest = float(values.abs().max())
        raise ValueError(f"{name}: the value {largest:g} is too large for {out.dtype}; ask for another dtype")
    return out


# ---- everything but the weights


def _other_files(source: str) -> list[str]:
    """Names of a model's files that are copied: all but its weights, its configuration and what is of a run."""
    names = [entry.name for entry in os.scandir(source) if entry.is_file()]
    names = [
        name
        for name in names
        if not name.startswith(".") and name not in (*_NOT_COPIED, "config.json") and not name.endswith(WEIGHT_FILES)
    ]
    for module in module_folders(source):
        for root, _, files in os.walk(os.path.join(source, module)):
            names += [os.path.relpath(os.path.join(root, name), source) for name in files]
    return sorted(names)


def _copy_other_files(source: str, target: str) -> None:
    for name in _other_files(source):
        os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    for module in module_folders(source):  # one without a file, as normalising is
        os.makedirs(os.path.join(target, module), exist_ok=True)


def _write_config(folder: str, config: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    config = dict(config)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    _write_text(os.path.join(folder, "config.json"), json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _write_card(
    folder: str, name: str, models: Sequence[MergeModel], model_type: str, recipe: Mapping[str, Any]
) -> None:
    import yaml

    from bge_accel.models.card import fenced, front_matter, inline, license_of, usage, versions
    from bge_accel.models.settings import read_settings

    _write_text(os.path.join(folder, RECIPE), json.dumps(recipe, indent=2, ensure_ascii=False) + "\n")
    embeds = model_type == "encoder" and os.path.isfile(os.path.join(folder, "modules.json"))
    how_to_use = ""
    if embeds:
        with suppress(ValueError):  # modules that this library does not know, which merging copies all the same
            how_to_use = f"{usage(read_settings(folder))}\n\n"
    on_hub = [model.name for model in models if not os.path.isdir(model.name)]
    licenses = [license_of(model.folder) for model in models]
    header = {
        "library_name": "sentence-transformers" if embeds else "transformers",
        "tags": ["merge", model_type],
        **({"base_model": on_hub} if on_hub else {}),
        # Models under different licences leave it to people to say what holds for their average.
        **(licenses[0] if all(license == licenses[0] for license in licenses) else {}),
    }
    rest = {key: value for key, value in recipe.items() if key != "models"}
    rows = "\n".join(f"| {inline(model['name'])} | {model['weight']:.6g} |" for model in recipe["models"])
    _write_text(
        os.path.join(folder, "README.md"),
        f"""{front_matter(header)}
# {inline(name)}

A weighted average of {len(models)} models' weights. Tokenizer, pooling, prompts and whatever else the folder holds are
those of {inline(recipe["settings_from"])}.

| model | weight |
| :-- | --: |
{rows}

{how_to_use}## Recipe

{fenced(yaml.safe_dump(rest, sort_keys=False, allow_unicode=True), "yaml")}

{versions("bge_accel", "torch", "transformers")}
""",
    )


def _write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
