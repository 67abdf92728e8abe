"""Checkpoints that are complete or absent, what they hold beside the model, and the signals that ask for one.

A checkpoint is a folder `checkpoint-STEP`: a model that loads, and `training_state/` with the optimiser, the random
generators and the position. `training_state/manifest.json` has the size and SHA-256 of every file, so that a damaged
one is known. Nothing in it is pickled, save what DeepSpeed's engine writes for itself.
"""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_accel.data.reading import is_inside, load_json, printable, shorten, shown_size
from bge_accel.files.lock import unlock_outputs
from bge_accel.processes.children import kill_children

if TYPE_CHECKING:
    import torch

STATE = "training_state"
MANIFEST = os.path.join(STATE, "manifest.json")
BEST = "best"
"""Name of the folder in a run's folder that holds the best weights so far."""
LAST = ".last"
"""Name of the folder in which the last weights are written, before they become the run's model."""
SAVED = "saved_model.json"
"""Name of the file in a saved model that says which step's it is, and what its weights have to be."""
_MOVING = ".moving"
REQUEUE = "requeue"
"""Name of the file in a run's folder that says: stopped by a signal, to be continued."""


_NUMBER = int | float
_STATE: dict[str, Any] = {
    "step": int, "batches": int, "skipped": int, "saved_epoch": int, "num_processes": int,
    "position": dict, "settings": dict, "best": dict | None, "scaler": dict | None,
    "activation_bytes": _NUMBER, "bytes_per_token": _NUMBER | None, "random": list, "streams": list,
}  # fmt: skip


@contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """Yields a new folder beside `path` to write into; on leaving it is flushed and renamed to `path`.

    A folder that stood there is replaced. After an error nothing new is left. The folder above is not made: where it has
    been removed, what was written into it is gone, and that is an error (FileNotFoundError).
    """
    path = os.path.abspath(path)
    aside = f"{path}.incomplete"
    shutil.rmtree(aside, ignore_errors=True)
    os.mkdir(aside)
    try:
        yield aside
        flush_tree(aside)
        if os.path.isdir(path):
            remove_checkpoint(path)
        os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    flush(os.path.dirname(path))


def move_into(source: str, target: str) -> None:
    """Moves every entry of one folder into another above it, replacing what has the same name.

    Weights that stood there go first and the new ones come last, so that a folder that loads is whole. Killed on the
    way, it is finished by `finish_move`.
    """
    if not os.listdir(source):  # before anything is removed
        raise FileNotFoundError(errno.ENOENT, "there is nothing to move", source)
    for name in os.listdir(target):
        if name.endswith((".safetensors", ".safetensors.index.json")) or name.startswith("pytorch_model"):
            os.remove(os.path.join(target, name))
    os.rename(source, os.path.join(target, _MOVING))
    finish_move(target)


def finish_move(target: str) -> None:
    """Moves in what a killed `move_into` has left outside."""
    source = os.path.join(target, _MOVING)
    if not os.path.isdir(source):
        return
    for name in sorted(os.listdir(source), key=lambda name: (".safetensors" in name, name)):
        destination = os.path.join(target, name)
        if os.path.isdir(destination):
            shutil.rmtree(destination)
        os.replace(os.path.join(source, name), destination)
    os.rmdir(source)
    flush(target)


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


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def check_room(output_dir: str, num_bytes: int, remedy: str) -> None:
    """Raises ValueError where the disk of a folder, which need not be there yet, has no room for so many bytes more."""
    folder = os.path.abspath(output_dir)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < num_bytes:  # some disks on a network say nothing
        raise ValueError(
            f"{output_dir} will take {shown_size(num_bytes)} more, and {shown_size(disk.free)} are free on its disk; {remedy}"
        )


def flush_tree(folder: str) -> None:
    """Flushes every file and folder under `folder` to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            flush(os.path.join(root, name))
        flush(root)


def flush(path: str) -> None:
    """Flushes one file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- finding and checking


def find_checkpoints(folder: str) -> list[tuple[int, str]]:
    """(step, path) of every `checkpoint-STEP` inside a folder, the latest last."""
    found = []
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        match = re.fullmatch(r"checkpoint-(\d+)", name)
        if match and os.path.isdir(os.path.join(folder, name)):
            found.append((int(match[1]), os.path.join(folder, name)))
    return sorted(found)


def remove_checkpoint(path: str) -> None:
    """Removes a checkpoint; stopped half-way, it leaves nothing that looks like one."""
    aside = f"{path}.removed"
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    shutil.rmtree(aside)


def remove_leftovers(folder: str) -> None:
    """Removes what a killed run left half-written or half-removed, and moves in what it left half-moved."""
    finish_move(folder)
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if re.fullmatch(rf"(checkpoint-\d+|{BEST}|{re.escape(LAST)})\.(incomplete|removed)|{re.escape(LAST)}", name):
            shutil.rmtree(os.path.join(folder, name))


def write_manifest(folder: str) -> None:
    """Notes the size and SHA-256 of every file of a checkpoint; written last."""
    files = _digests(folder, _files(folder))
    with open(os.path.join(folder, MANIFEST), "w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)


def _files(folder: str) -> list[str]:
    names = [os.path.relpath(os.path.join(root, name), folder) for root, _, files in os.walk(folder) for name in files]
    return sorted(names)


def _digests(folder: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    paths = {name: os.path.join(folder, name) for name in names}
    return {name: {"bytes": os.path.getsize(path), "sha256": _sha256(path)} for name, path in paths.items()}


def what_is_damaged(folder: str, manifest: str = MANIFEST) -> str | None:
    """What is wrong with a checkpoint, or None if every file is there and holds what was written."""
    try:
        if not os.path.exists(os.path.join(folder, manifest)):
            return f"{manifest} is missing: it is no checkpoint to continue from, or its copy is incomplete"
        files = load_json(os.path.join(folder, manifest))["files"]
        for name, expected in files.items():
            if not is_inside(name):
                return f"{manifest} names {shorten(name)}, which is not inside the checkpoint"
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                return f"{name} is missing"
            if os.path.getsize(path) != expected["bytes"]:
                return f"{name} has {os.path.getsize(path):,} bytes where {expected['bytes']:,} were written"
            if _sha256(path) != expected["sha256"]:
                return f"{name} does not hold what was written (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read ({error})"
    return None


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


# ---- saved models


def note_saved(folder: str, step: int) -> None:
    """Notes in a saved model which step's it is; written last."""
    names = [name for name in _files(folder) if name != SAVED]
    is_weights = {name: ".safetensors" in name for name in names}
    content = {
        "step": step,
        "files": _digests(folder, (name for name in names if is_weights[name])),
        "others": [name for name in names if not is_weights[name]],
    }
    with open(os.path.join(folder, SAVED), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def note_complete(folder: str, run: Mapping[str, Any]) -> None:
    """Notes in a saved model that it is the end of a run, and of which."""
    path = os.path.join(folder, SAVED)
    content, aside = {**load_json(path), "run": run}, f"{path}.incomplete"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    flush(aside)
    os.replace(aside, path)  # without this file nobody knows the model: a kill has to leave the old one or the new


def is_complete(output_dir: str, run: Mapping[str, Any]) -> bool:
    """Whether a folder holds the model that a run ends with, whole."""
    finish_move(output_dir)
    if what_is_damaged(output_dir, SAVED) is not None:
        return False
    return load_json(os.path.join(output_dir, SAVED)).get("run") == json.loads(json.dumps(run))


def keep_best(step: int, checkpoint: str, output_dir: str) -> bool:
    """Sees to it that `BEST` in a run's folder holds the model of a step; whether it does.

    Where it is not there it is copied from the run of the checkpoint: its best model, its checkpoint of that step, or the
    model that it ended with.
    """
    run, target = os.path.dirname(os.path.abspath(checkpoint)), os.path.join(output_dir, BEST)
    if _files_of_model(target, step):
        return True
    for source in (os.path.join(run, BEST), os.path.join(run, f"checkpoint-{step}"), run):
        if names := _files_of_model(source, step):
            with atomic_folder(target) as folder:
                for name in names:
                    os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
                    shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
                note_saved(folder, step)
            return True
    return False


def _files_of_model(folder: str, step: int) -> list[str]:
    """Names of the files of the model of a step; none where the folder does not hold it whole."""
    if what_is_damaged(folder) is None:  # a checkpoint, whose name says its step
        files = load_json(os.path.join(folder, MANIFEST))["files"]
        return [name for name in files if not name.startswith(f"{STATE}/")]
    if what_is_damaged(folder, SAVED) is not None:
        return []
    saved = load_json(os.path.join(folder, SAVED))
    others = saved.get("others")
    is_whole = isinstance(others, list) and all(
        isinstance(name, str) and is_inside(name) and os.path.isfile(os.path.join(folder, name)) for name in others
    )
    return [*saved["files"], *others] if is_whole and saved["files"] and saved.get("step") == step else []


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


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two nested mappings differ, each as `name: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            found += differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if old == new else [f"{name}: {old} -> {new}"]


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


# ---- signals

SAME_PRESS_SECONDS = 0.5
"""A terminal and a launcher may both pass one Ctrl-C on, within milliseconds; nobody means two by two as fast as this."""


class StopSignals:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C, so that the loop can save and stop; a second one ends the process at once.

    SLURM sends SIGTERM and SIGUSR1 before it preempts a job or its time is over; preempting, it sends one signal twice
    within milliseconds, so either of them within `repeat_seconds` of the first is taken for the same. Ctrl-C (SIGINT) is
    somebody's wish: a second one counts after `SAME_PRESS_SECONDS`. So does SIGTERM after it, which is what torchrun makes of
    a second Ctrl-C. Where SIGINT is ignored, as in a script's background, it stays so.
    """

    def __init__(self, repeat_seconds: float = 3.0) -> None:
        self.number = 0
        self.repeat_seconds, self._at = repeat_seconds, 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    @property
    def received(self) -> str | None:
        """Name of the first signal."""
        return signal.Signals(self.number).name if self.number else None

    def _note(self, number: int, frame: Any) -> None:
        if not self.number:
            self.number, self._at = number, time.monotonic()
            if number == signal.SIGINT:
                _tell("finishing the step, then saving; Ctrl-C again stops at once")
            return
        of_person = signal.SIGINT in (number, self.number)
        if time.monotonic() - self._at > (SAME_PRESS_SECONDS if of_person else self.repeat_seconds):
            os._exit(128 + number)


@contextmanager
def interruptible(
    kept: str | Callable[[], str] = "", signals: Sequence[signal.Signals] = (signal.SIGINT,)
) -> Iterator[None]:
    """Ends the program with one line and status 130 where Ctrl-C was pressed, cleaning up; a second one ends it at once.

    So it ends, with status 1, where a file cannot be read or written (a full disk, a folder that was removed), and where
    another process of the run has so ended.

    Args:
        kept: what the line says besides, such as how to go on.
        signals: those that are taken so; the status of another one is 128 and its number.
    """
    pressed: list[float] = []
    first = signal.SIGINT

    def interrupt(number: int, frame: Any) -> None:
        nonlocal first
        pressed.append(time.monotonic())
        if len(pressed) == 1:
            first = signal.Signals(number)
            raise KeyboardInterrupt
        if pressed[-1] - pressed[0] > SAME_PRESS_SECONDS:
            kill_children()
            os._exit(128 + number)

    taken = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
        for number in taken:  # all is done: an interpreter that ends could only answer with a traceback
            signal.signal(number, signal.SIG_DFL)
    except BaseException as error:
        # Whatever comes of it: FAISS and gloo, interrupted or left by another process, raise errors of their own.
        # As gloo says it, where the other process has said why.
        is_left = isinstance(error, RuntimeError) and re.search("Connection (closed|reset) by peer", str(error))
        if not pressed and not is_left and not isinstance(error, OSError):
            raise
        if pressed:
            status, said = 128 + first, f"stopped by {'Ctrl-C' if first == signal.SIGINT else first.name}"
            what = kept if isinstance(kept, str) else kept()
        elif is_left:
            status, said, what = 1, "error: another process of this run has ended", ""
        else:
            status, said = 1, f"error: {error}"
            what = "" if isinstance(kept, str) else kept()  # nobody has looked how far it had come
        _tell(f"{said}{f'; {what}' if what else ''}", by_all=not pressed)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # gloo's threads would abort an interpreter that ends
            sys.stdout.flush()
            unlock_outputs()
            os._exit(status)
        raise SystemExit(status) from None


def _tell(text: str, *, by_all: bool = False) -> None:
    """One line on stderr, of the first process of a machine or of all; written at once, as a signal's handler has to."""
    if by_all or os.environ.get("LOCAL_RANK", "0") == "0":
        line = f"\n{os.path.basename(sys.argv[0])}: {printable(text)}\n"  # below what the terminal shows of the key, or a bar
        with suppress(OSError):
            os.write(2, line.encode(errors="replace"))
