"""Where a run lives: what it goes on from, its checkpoints, the model that it ends with."""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bge_accel.files.atomic import atomic_folder, check_room, move_into, remove_checkpoint
from bge_accel.files.changes import differences
from bge_accel.files.lock import LOCK, lock_output, locked
from bge_accel.files.outputs import check_folder
from bge_accel.processes.group import from_first
from bge_accel.training.checkpoint import (
    REQUEUE,
    choose_checkpoint,
    find_checkpoints,
    read_run_state,
    remove_leftovers,
    room_for_run,
    saving_errors,
    write_state,
)
from bge_accel.training.manifest import STATE, write_manifest
from bge_accel.training.saved_model import LAST, SAVED, is_complete, keep_best, note_complete, note_saved

if TYPE_CHECKING:
    from bge_accel.models.settings import EmbeddingSettings
    from bge_accel.training.engine import Engine

RUN_CONFIG = "run_config.yaml"
"""Name of the file in a run's folder that holds its settings."""


@dataclass
class Progress:
    """How far a run is: all that its loop changes."""

    step: int = 0
    """Steps of the optimiser that are done."""
    batches: int = 0
    """Batches that have been read."""
    skipped: int = 0
    """Steps that float16 has skipped."""
    saved_epoch: int = 0
    """The last epoch after which was saved."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to go on from."""

    path: str
    state: Mapping[str, Any]

    @property
    def progress(self) -> Progress:
        return Progress(**{name: self.state[name] for name in asdict(Progress())})

    def streams(self, rank: int, position: Mapping[str, Any]) -> list[dict] | None:
        """Where this process's streams stood; None where the run is another."""
        return None if differences(self.state["position"], position) else self.state["streams"][rank]


class RunFolder:
    """The folder of a training run.

    Args:
        position: all that the place of a row in the run depends on.
        settings: what is learnt and how.
        configuration: the run's flags, as YAML.
        save_total_limit: how many checkpoints are kept; None keeps all.
    """

    def __init__(
        self,
        path: str,
        engine: "Engine",
        *,
        position: dict[str, Any],
        settings: dict[str, Any],
        configuration: str,
        save_total_limit: int | None,
    ) -> None:
        self.path, self.engine, self.position, self.settings = path, engine, position, settings
        self.configuration, self.save_total_limit = configuration, save_total_limit
        self.this_run = {"position": position, "settings": settings}

    # ---- before the model is loaded

    def is_complete(self) -> bool:
        """Whether it holds the model that this run ends with."""
        return from_first(lambda: is_complete(self.path, self.this_run))

    def find_checkpoint(self, asked: str | None, *, num_steps: int, allow_changed_data: bool) -> Checkpoint | None:
        """The checkpoint to go on from; None where none is asked for, or there is none.

        Args:
            asked: a folder, or "latest".
            num_steps: of this run.
            allow_changed_data: whether the checkpoint of a run that sees other rows will do.

        Raises:
            ValueError: it cannot be gone on from; every process raises it.
        """
        if asked is None:
            return None
        say, engine = self.engine.say, self.engine
        path = from_first(lambda: choose_checkpoint(asked, self.path, say))
        if path is None:
            say("note: no checkpoint to go on from; this run starts afresh")
            return None
        state = read_run_state(path)
        changed = differences(state["position"], self.position)
        if changed and not allow_changed_data:
            raise ValueError(
                f"{path} was saved by another run, so its position means nothing here: "
                f"{'; '.join(changed)}. Put that back, or go on regardless with --allow_changed_data"
            )
        if state["step"] > num_steps:
            raise ValueError(
                f"{path} was saved after step {state['step']}, and this run ends after {num_steps}: name an "
                "earlier checkpoint, or have it train for longer"
            )
        if engine.is_deepspeed != os.path.isdir(os.path.join(path, STATE, "deepspeed")):
            raise ValueError(
                f"{path} was saved {'without' if engine.is_deepspeed else 'by'} DeepSpeed, and only the same can go "
                f"on from it; to start anew from its weights, --model_name_or_path {path}"
            )
        if engine.is_deepspeed and state["num_processes"] != engine.world:
            raise ValueError(f"{path} was saved by {state['num_processes']} processes: DeepSpeed goes on with as many")
        for change in [*changed, *differences(state["settings"], self.settings)]:
            say(f"note: changed since {os.path.basename(os.path.normpath(path))}: {change}")
        return Checkpoint(path, state)

    # ---- when the run begins

    def begin(
        self,
        start: Checkpoint | None,
        *,
        num_saves: int,
        keeps_best: bool,
        removes_later: bool | None,
    ) -> None:
        """Makes the folder ready to be written into.

        Args:
            num_saves: checkpoints that are still to be written.
            keeps_best: whether the best model is kept beside them.
            removes_later: checkpoints later than `start` are removed (True), are an error (False), or stay (None).

        Raises:
            ValueError: there are later checkpoints, or there is no room.
        """
        step, engine = start.progress.step if start else 0, self.engine
        engine.wait()
        found = find_checkpoints(self.path)
        later = [path for at, path in found if at > step]
        if later and removes_later is False:
            raise ValueError(
                f"--output_dir holds {os.path.basename(later[0])}, later than where this run begins; move it away, or "
                "have it removed by --overwrite_output_dir"
            )
        room = room_for_run(
            engine.model_bytes,
            engine.state_bytes,
            num_saves=num_saves,
            num_there=len(found) - len(later),
            limit=self.save_total_limit,
            keeps_best=keeps_best,
        )
        remedy = (
            "make room, name another folder, or keep fewer checkpoints: --save_total_limit 1, a larger --save_steps"
        )
        from_first(lambda: check_room(self.path, room, remedy))
        engine.wait()
        if not engine.is_main:
            return
        with saving_errors(step, self.path):
            os.makedirs(self.path, exist_ok=True)
            remove_leftovers(self.path)
            for path in later if removes_later else ():
                engine.say(f"note: {path}, of an earlier run, is removed")
                remove_checkpoint(path)
            for name in (REQUEUE,) if start else (REQUEUE, SAVED):  # begun afresh, it is not complete any more
                if os.path.exists(os.path.join(self.path, name)):
                    os.remove(os.path.join(self.path, name))
            self._write_configuration(self.path)

    def keep_best(self, step: int, start: Checkpoint) -> bool:
        """Whether the best model, of a step before the run was stopped, is still there."""
        with saving_errors(start.progress.step, self.path):
            return from_first(lambda: keep_best(step, start.path, self.path))

    def saves(self, tokenizer: Any, settings: "EmbeddingSettings", card: Callable[[int], str]) -> None:
        """What is saved beside the weights.

        Args:
            card: README.md of the model after a step.
        """
        self.tokenizer, self.model_settings, self.card = tokenizer, settings, card

    # ---- while it trains

    def save_checkpoint(self, progress: Progress, streams: list[dict], best: dict[str, Any] | None) -> None:
        """The model and the state of training as a folder `checkpoint-STEP`; all processes take part."""
        from accelerate.utils import gather_object

        engine, step = self.engine, progress.step
        with saving_errors(step, self.path):
            weights, tensors = engine.weights(), engine.optimizer_tensors()
            state = {
                **asdict(progress),
                "best": best,
                "num_processes": engine.world,
                "position": self.position,
                "settings": self.settings,
                **engine.state(),
                "streams": gather_object([streams]),
            }
            path = os.path.join(self.path, f"checkpoint-{step}")
            with atomic_folder(path) if engine.is_main else nullcontext(f"{path}.incomplete") as folder:
                engine.wait()  # the folder is there
                engine.save_deepspeed(folder)
                if engine.is_main:
                    self._write_model(folder, step, weights)
                    write_state(folder, state, tensors)
                    self._write_configuration(os.path.join(folder, STATE))
                engine.wait()
                if engine.is_main:
                    write_manifest(folder)
            if engine.is_main and self.save_total_limit is not None:
                earlier = [path for at, path in find_checkpoints(self.path) if at < step]
                for path in earlier[: max(len(earlier) - self.save_total_limit + 1, 0)]:
                    remove_checkpoint(path)
            engine.wait()

    def save_model(self, step: int, name: str) -> None:
        """The model as it is, in a folder inside the run's, complete or not at all; all processes take part."""
        with saving_errors(step, self.path):
            weights = self.engine.weights()
            if self.engine.is_main:
                with atomic_folder(os.path.join(self.path, name)) as folder:
                    self._write_model(folder, step, weights)
                    note_saved(folder, step)
            self.engine.wait()

    # ---- when it ends

    def finish(self, step: int, name: str = LAST) -> None:
        """Makes the model in a folder inside the run's the one that the run ends with."""
        with saving_errors(step, self.path):
            if self.engine.is_main:
                saved = os.path.join(self.path, name)
                note_complete(saved, self.this_run)
                move_into(saved, self.path)
            self.engine.wait()

    def note_stopped(self, step: int) -> None:
        """Leaves a mark that says: stopped by a signal, to be continued."""
        if self.engine.is_main:
            with saving_errors(step, self.path), open(os.path.join(self.path, REQUEUE), "w", encoding="utf-8") as file:
                file.write(f"stopped after step {step}\n")

    def _write_model(self, folder: str, step: int, weights: Any) -> None:
        from bge_accel.models.encoder import save_encoder

        save_encoder(
            folder,
            self.engine.encoder,
            self.tokenizer,
            self.model_settings,
            state_dict=weights,
            model_card=self.card(step),
        )

    def _write_configuration(self, folder: str) -> None:
        with open(os.path.join(folder, RUN_CONFIG), "w", encoding="utf-8") as file:
            file.write(self.configuration)


def check_run_folder(path: str, *, resumes: bool, overwrites: bool) -> None:
    """Raises ValueError where a run's folder cannot be written to, or holds what is not to be touched."""
    check_folder("--output_dir", path)
    inside = [name for name in os.listdir(path) if name != LOCK] if os.path.isdir(path) else []
    goes_on = resumes and (RUN_CONFIG in inside or find_checkpoints(path))
    if not inside or goes_on or overwrites:
        return
    if os.environ.get("RANK", "0") == "0":
        with locked(path):  # or it names the run that is at work there
            pass
    way_out = ", or, to go on with its run, --resume_from_checkpoint latest" if find_checkpoints(path) else ""
    raise ValueError(f"--output_dir {path} is in use; name another folder, or add --overwrite_output_dir{way_out}")


def lock_run_folder(path: str, *, resumes: bool, overwrites: bool) -> None:
    """No other run may write into the folder from here to the end; one may have, while the rows were read."""

    def lock() -> None:
        lock_output(path)
        check_run_folder(path, resumes=resumes, overwrites=overwrites)

    from_first(lock)


def check_checkpoint(asked: str | None, folder: str) -> None:
    """Raises ValueError where what is to be gone on from is no checkpoint; "latest" is looked for in the run's folder."""
    if asked in (None, "latest"):
        return
    if not os.path.isdir(asked):
        or_latest = ", or `latest`" if find_checkpoints(folder) else ""
        raise ValueError(f"--resume_from_checkpoint {asked} is not a folder; name one{or_latest}")
    if not os.path.isdir(os.path.join(asked, STATE)):
        raise ValueError(
            f"--resume_from_checkpoint {asked} holds no training state; to start from its weights, name it by "
            "--model_name_or_path"
        )
