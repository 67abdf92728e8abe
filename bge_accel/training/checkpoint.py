"""Checkpoints that are complete or absent, what they hold beside the model, and the signals that ask for one.

A checkpoint is a folder `checkpoint-STEP`: a model that loads, and `training_state/` with the optimiser, the random
generators and the position. `training_state/manifest.json` has the size and SHA-256 of every file, so that a damaged
one is known. Nothing in it is pickled, save what DeepSpeed's engine writes for itself.
"""

import errno
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_accel.files.atomic import DISK_FULL, finish_move
from bge_accel.files.parsing import load_json
from bge_accel.files.text import printable, shorten
from bge_accel.training.manifest import STATE, what_is_damaged
from bge_accel.training.saved_model import BEST, LAST

if TYPE_CHECKING:
    import torch

REQUEUE = "requeue"
"""Name of the file in a run's folder that says: stopped by a signal, to be continued."""


_NUMBER = int | float
_STATE: dict[str, Any] = {
    "step": int, "batches": int, "skipped": int, "saved_epoch": int, "num_processes": int,
    "position": dict, "settings": dict, "best": dict | None, "scaler": dict | None,
    "activation_bytes": _NUMBER, "bytes_per_token": _NUMBER | None, "random": list, "streams": list,
}  # fmt: skip


@contextmanager
def saving_errors(step: int, output_dir: str) -> Iterator[None]:
    """Ends the program with one clear message where a run's folder cannot be written, or has been removed."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "(os error " not in str(error):  # so say libraries written in Rust
            raise
        failed = f"{os.path.basename(sys.argv[0])}: error: saving after step {step} failed: {error}"
        if not os.path.isdir(output_dir):
            gone = f"{failed}; {output_dir} was removed or moved away while the run wrote into it"
            raise SystemExit(printable(gone)) from None
        is_full = getattr(error, "errno", None) in DISK_FULL or f"(os error {errno.ENOSPC})" in str(error)
        remedy = "Make room" if is_full else "Mend that"
        if find_checkpoints(output_dir):
            rest = f"earlier checkpoints are untouched. {remedy}, then go on with --resume_from_checkpoint latest"
        else:
            rest = f"no checkpoint had been saved before. {remedy}, then start again"
        raise SystemExit(printable(f"{failed}; {rest}")) from None


def room_for_run(model: int, state: int, *, num_saves: int, num_there: int, limit: int | None, keeps_best: bool) -> int:
    """The most bytes by which a run's folder grows.

    Args:
        model: bytes of a saved model.
        state: bytes of the optimiser in a checkpoint.
        num_saves: checkpoints that are still to be written.
        num_there: checkpoints that are there.
        limit: how many are kept. One more is there when a new one has been written, before the oldest goes.
        keeps_best: a best model is kept beside the checkpoints, and one more while it is replaced.
    """
    most = num_there + num_saves if limit is None else min(num_there + num_saves, limit + 1)
    return max(most - num_there, min(num_saves, 1)) * (model + state) + (2 if keeps_best else 1) * model


# ---- finding and checking


def find_checkpoints(folder: str) -> list[tuple[int, str]]:
    """(step, path) of every `checkpoint-STEP` inside a folder, the latest last."""
    found = []
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        match = re.fullmatch(r"checkpoint-(\d+)", name)
        if match and os.path.isdir(os.path.join(folder, name)):
            found.append((int(match[1]), os.path.join(folder, name)))
    return sorted(found)


def remove_leftovers(folder: str) -> None:
    """Removes what a killed run left half-written or half-removed, and moves in what it left half-moved."""
    finish_move(folder)
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if re.fullmatch(rf"(checkpoint-\d+|{BEST}|{re.escape(LAST)})\.(incomplete|removed)|{re.escape(LAST)}", name):
            shutil.rmtree(os.path.join(folder, name))


def choose_checkpoint(asked: str, output_dir: str, say: Callable[[str], None]) -> str | None:
    """The checkpoint to continue from: `asked`, or the latest whole one in `output_dir` for "latest".

    Args:
        say: told of each damaged checkpoint that is passed over.

    Returns:
        None where the latest is asked for and there is none.

    Raises:
        ValueError: the one named cannot be used, or all there are are damaged.
    """
    if asked != "latest":
        damage = what_is_damaged(asked)
        if damage is not None:
            raise ValueError(f"--resume_from_checkpoint {asked}: {damage}")
        return asked
    found = find_checkpoints(output_dir)
    for _, path in reversed(found):
        damage = what_is_damaged(path)
        if damage is None:
            return path
        say(f"warning: {path} is damaged and passed over: {damage}")
    if found:
        raise ValueError(f"every checkpoint in {output_dir} is damaged; move them away to start afresh")
    return None


# ---- the state of training


def write_state(folder: str, state: Mapping[str, Any], tensors: "Mapping[str, torch.Tensor] | None") -> None:
    """Writes what training needs beside the model: numbers as JSON, the optimiser's tensors as safetensors."""
    from safetensors.torch import save_file

    os.makedirs(os.path.join(folder, STATE), exist_ok=True)
    numbers, optimizer = (os.path.join(folder, STATE, name) for name in ("state.json", "optimizer.safetensors"))
    with open(numbers, "w", encoding="utf-8") as file:
        json.dump(state, file)
    if tensors is not None:
        save_file(dict(tensors), optimizer)
        shutil.copymode(numbers, optimizer)  # it is readable by its owner alone, whatever the umask


def read_state(folder: str) -> dict[str, Any]:
    """The numbers that `write_state` wrote; ValueError where they are not there, or no JSON object."""
    path = os.path.join(folder, STATE, "state.json")
    state = load_json(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} is {shorten(state)}: it is no state of a training")
    return state


def read_run_state(folder: str) -> dict[str, Any]:
    """The state of a run of scripts/finetune.py; ValueError where it is anything else."""
    path, state = os.path.join(folder, STATE, "state.json"), read_state(folder)
    for name, kind in _STATE.items():
        value = state.get(name)
        if name not in state or not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f'{path}: "{name}" is {shorten(value)}: it is no state of a training')
        if isinstance(value, int) and not 0 <= value < 2**63:
            raise ValueError(f'{path}: "{name}" is {shorten(value)}: it has to be a count')
    if len(state["random"]) != state["num_processes"] or len(state["streams"]) != state["num_processes"]:
        raise ValueError(f'{path}: "random" and "streams" have to hold one entry for each process')
    return state


def read_optimizer(folder: str) -> "dict[str, torch.Tensor]":
    """The optimiser's tensors that `write_state` wrote; there are none before the first step.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = os.path.join(folder, STATE, "optimizer.safetensors")
    try:
        return load_file(path) if os.path.exists(path) else {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def optimizer_tensors(encoder: "torch.nn.Module", optimizer: Any) -> "dict[str, torch.Tensor]":
    """AdamW's state as whole tensors on the CPU, `exp_avg.PARAMETER` and so on; under FSDP all processes take part."""
    tensors = {}
    for name, parameter in _trained(encoder, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            tensors[f"{key}.{name}"] = whole.detach().cpu().contiguous()
    return tensors


def load_optimizer_tensors(
    encoder: "torch.nn.Module", optimizer: Any, tensors: "Mapping[str, torch.Tensor]", rates: list[float]
) -> None:
    """Puts back what `optimizer_tensors` gave, sharded as the parameters now are, and the groups' learning rates.

    Raises:
        ValueError: a tensor is missing or does not fit its parameter.
    """
    state: dict[int, dict[str, Any]] = {}
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        by_parameter.setdefault(name, {})[kind] = tensor
    trained = _trained(encoder, optimizer)
    unknown = sorted(set(by_parameter) - set(trained))
    if unknown:
        raise ValueError(f"the checkpoint's optimiser knows a parameter that is not trained now: {unknown[0]}")
    kinds = {kind for by_kind in by_parameter.values() for kind in by_kind}
    for name, by_kind in by_parameter.items():
        if kinds != set(by_kind):
            raise ValueError(f"the checkpoint lacks the optimiser's {sorted(kinds - set(by_kind))[0]} of {name}")
    names = {parameter: name for name, parameter in trained.items()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(ordered):
        name = names[parameter]
        for kind, tensor in by_parameter.get(name, {}).items():  # a parameter without a gradient yet has no state
            if tensor.ndim and tensor.shape != parameter.shape:
                shapes = f"{tuple(tensor.shape)} and {tuple(parameter.shape)}"
                raise ValueError(f"the checkpoint's {kind} of {name} does not fit the model: {shapes}")
            if tensor.ndim and hasattr(parameter, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
            state.setdefault(index, {})[kind] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _trained(encoder: "torch.nn.Module", optimizer: Any) -> "dict[str, torch.nn.Parameter]":
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in encoder.named_parameters() if parameter in known}
    return {name.replace("_checkpoint_wrapped_module.", ""): parameter for name, parameter in named.items()}


def random_state(device: "torch.device") -> "dict[str, Any]":
    """The states of this process's random generators: torch's (CPU and device), NumPy's and Python's."""
    import torch

    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, internal, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None,
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, internal, next_gauss],
    }


def set_random_state(state: Mapping[str, Any], device: "torch.device") -> None:
    """Puts back what `random_state` gave; the device's is left alone where that had none.

    Raises:
        ValueError: it is not what `random_state` gives.
    """
    import torch

    try:
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        if device.type == "cuda" and state["cuda"] is not None:
            torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)
        np.random.set_state(tuple(state["numpy"]))
        version, internal, next_gauss = state["python"]
        random.setstate((version, tuple(internal), next_gauss))
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"the checkpoint's random generators are damaged ({error})") from None
