"""The model that a run ends with: which step's it is, whether it is whole, and the best one so far."""

import json
import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bge_accel.files.atomic import atomic_folder, finish_move, flush
from bge_accel.files.parsing import is_inside, load_json
from bge_accel.training.manifest import MANIFEST, STATE, digests, files_of, what_is_damaged

if TYPE_CHECKING:
    pass


BEST = "best"
"""Name of the folder in a run's folder that holds the best weights so far."""


LAST = ".last"
"""Name of the folder in which the last weights are written, before they become the run's model."""


SAVED = "saved_model.json"
"""Name of the file in a saved model that says which step's it is, and what its weights have to be."""


def note_saved(folder: str, step: int) -> None:
    """Notes in a saved model which step's it is; written last."""
    names = [name for name in files_of(folder) if name != SAVED]
    is_weights = {name: ".safetensors" in name for name in names}
    content = {
        "step": step,
        "files": digests(folder, (name for name in names if is_weights[name])),
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
