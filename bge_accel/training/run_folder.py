"""Where a run lives: what it goes on from, its checkpoints, the model that it ends with."""

import math
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
from bge_accel.training.plan import RunPlan
from bge_accel.training.saved_model import SAVED, is_complete, keep_best, note_complete, note_saved

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
        streams = self.state["streams"]
        return None if differences(self.state["position"], position) or rank >= len(streams) else streams[rank]


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """What is saved when, and what is gone on from; each named as the flag of scripts/finetune.py."""

    output_dir: str
    overwrite_output_dir: bool
    resume_from_checkpoint: str | None
    allow_changed_data: bool
    save_strategy: str
    save_steps: int
    save_total_limit: int | None
    load_best_model_at_end: bool


class RunFolder:
    """The folder of a training run.

    Args:
        plan: of the run.
        position: all that the place of a row in the run depends on.
        settings: what is learnt and how.
        configuration: the run's flags, as YAML.
    """

    def __init__(
        self,
        options: FolderOptions,
        engine: "Engine",
        plan: RunPlan,
        *,
        position: dict[str, Any],
        settings: dict[str, Any],
        configuration: str,
    ) -> None:
        self.options, self.path, self.engine, self.plan = options, options.output_dir, engine, plan
        self.position, self.settings, self.configuration = position, settings, configuration
        self.this_run = {"position": position, "settings": settings}

    # ---- before the model is loaded

    def is_complete(self) -> bool:
        """Whether it holds the model that this run ends with, and the latest is to be gone on from."""
        return self.options.resume_from_checkpoint == "latest" and from_first(
            lambda: is_complete(self.path, self.this_run)
        )

    def find_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from; None where none is asked for, or there is none.

        Raises:
            ValueError: it cannot be gone on from; every process raises it.
        """
        asked, say, engine = self.options.resume_from_checkpoint, self.engine.say, self.engine
        if asked is None:
            return None
        path = from_first(lambda: choose_checkpoint(asked, self.path, say))
        if path is None:
            say("note: no checkpoint to go on from; this run starts afresh")
            return None
        state = read_run_state(path)
        changed = differences(state["position"], self.position)
        if changed and not self.options.allow_changed_data:
            raise ValueError(
                f"{path} was saved by another run, so its position means nothing here: "
                f"{'; '.join(changed)}. Put that back, or go on regardless with --allow_changed_data"
            )
        if state["step"] > self.plan.num_steps:
            raise ValueError(
                f"{path} was saved after step {state['step']}, and this run ends after {self.plan.num_steps}: name an "
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

    def begin(self, start: Checkpoint | None) -> None:
        """Makes the folder ready to be written into.

        Raises:
            ValueError: there are checkpoints later than `start`, or there is no room.
        """
        step, engine = start.progress.step if start else 0, self.engine
        engine.wait()
        found = find_checkpoints(self.path)
        later = [path for at, path in found if at > step]
        goes_on, removes_later = self.options.resume_from_checkpoint == "latest", self.options.overwrite_output_dir
        if later and not goes_on and not removes_later:
            raise ValueError(
                f"--output_dir holds {os.path.basename(later[0])}, later than where this run begins; move it away, or "
                "have it removed by --overwrite_output_dir"
            )
        room = room_for_run(
            engine.model_bytes,
            engine.state_bytes,
            num_saves=self.saves_left(start.progress if start else Progress()),
            num_there=len(found) - len(later),
            limit=self.options.save_total_limit,
            keeps_best=self.options.load_best_model_at_end,
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
            for path in () if goes_on else later:
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

    def saves_left(self, progress: Progress) -> int:
        """How many checkpoints are still to be written; of streams saved by epochs, at least as many."""
        if self.options.save_strategy == "no":
            return 0
        if self.options.save_strategy == "epoch":
            return max(math.ceil(self.plan.num_epochs or 0) - 1 - progress.saved_epoch, 0)
        every = self.options.save_steps
        return max((self.plan.num_steps - 1) // every - progress.step // every, 0)

    def is_due(self, progress: Progress, epoch: int) -> bool:
        """Whether it is time for a checkpoint, when so many epochs are done."""
        if self.options.save_strategy == "epoch":
            return epoch > progress.saved_epoch
        return self.options.save_strategy == "steps" and progress.step % self.options.save_steps == 0

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
            if engine.is_main and self.options.save_total_limit is not None:
                earlier = [path for at, path in find_checkpoints(self.path) if at < step]
                for path in earlier[: max(len(earlier) - self.options.save_total_limit + 1, 0)]:
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

    def finish(self, step: int, name: str) -> None:
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


def check_run_folder(options: FolderOptions) -> None:
    """Raises ValueError where the folder cannot be written to, or holds what is not to be touched.

    So too where what is to be gone on from is no checkpoint; "latest" is looked for later.
    """
    path, asked = options.output_dir, options.resume_from_checkpoint
    check_folder("--output_dir", path)
    checkpoints = find_checkpoints(path)
    inside = [name for name in os.listdir(path) if name != LOCK] if os.path.isdir(path) else []
    goes_on = asked is not None and (RUN_CONFIG in inside or checkpoints)
    if inside and not goes_on and not options.overwrite_output_dir:
        if os.environ.get("RANK", "0") == "0":
            with locked(path):  # or it names the run that is at work there
                pass
        way_out = ", or, to go on with its run, --resume_from_checkpoint latest" if checkpoints else ""
        raise ValueError(f"--output_dir {path} is in use; name another folder, or add --overwrite_output_dir{way_out}")
    if asked in (None, "latest"):
        return
    if not os.path.isdir(asked):
        or_latest = ", or `latest`" if checkpoints else ""
        raise ValueError(f"--resume_from_checkpoint {asked} is not a folder; name one{or_latest}")
    if not os.path.isdir(os.path.join(asked, STATE)):
        raise ValueError(
            f"--resume_from_checkpoint {asked} holds no training state; to start from its weights, name it by "
            "--model_name_or_path"
        )


def lock_run_folder(options: FolderOptions) -> None:
    """No other run may write into the folder from here to the end; one may have, while the rows were read."""

    def lock() -> None:
        lock_output(options.output_dir)
        check_run_folder(options)

    from_first(lock)
