"""What a training run says of itself: lines on the terminal, `train_log.jsonl`, trackers."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bge_accel.files.parsing import decode_json
from bge_accel.files.text import printable, shorten
from bge_accel.processes.group import from_first
from bge_accel.training.checkpoint import saving_errors

if TYPE_CHECKING:
    from bge_accel.training.batches import Batch
    from bge_accel.training.engine import Engine, Step
    from bge_accel.training.losses import ContrastiveLoss
    from bge_accel.training.run_folder import Progress


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What is logged when; each named as the flag of scripts/finetune.py."""

    output_dir: str
    logging_steps: int
    logging_first_step: bool
    report_to: list[str]
    run_name: str | None


class TrainLog:
    """The log of a run. Figures stay on the device until a line is due.

    Args:
        sources: names, for figures of each where there are several.
    """

    def __init__(self, options: LogOptions, engine: "Engine", num_steps: int, sources: Sequence[str]) -> None:
        self.options, self.engine, self.num_steps, self.sources = options, engine, num_steps, list(sources)
        self.folder, self.path = options.output_dir, os.path.join(options.output_dir, "train_log.jsonl")
        self.has_trackers = options.report_to != ["none"]
        self.window = Window(len(self.sources), engine.device)
        self.measured: dict[int, dict[str, dict[str, float]]] = {}
        """Metrics of each data set, by the step after which they were measured."""
        self._unchecked: StepLoss | None = None

    def rewind(self, step: int | None, *, has_measured: bool) -> None:
        """Takes out what comes again; see `rewind_log`."""
        with saving_errors(step or 0, self.folder):
            self.measured = from_first(lambda: rewind_log(self.path, step, has_measured=has_measured))

    def start_trackers(self, settings: Mapping[str, Any]) -> None:
        """Tells the trackers of the run and its settings."""
        if self.has_trackers:
            names = {
                tracker: {"name": self.options.run_name} for tracker in ("wandb", "trackio") if self.options.run_name
            }
            flat = {
                key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()
            }
            self.engine.accelerator.init_trackers("bge_accel", config=flat, init_kwargs=names)

    def add(self, batch: "Batch", output: "ContrastiveLoss", step: int) -> None:
        """Takes in a batch of the step that is about to be made; ends the program where the last batch's loss is no number."""
        from bge_accel.encoding.transfer import to_host

        self.check_loss()
        self._unchecked = StepLoss(to_host(output.loss), step + 1, batch)
        self.window.add(output, batch)

    def check_loss(self) -> None:
        """Ends the program where the last batch's loss is no number; it waits for the device."""
        if self._unchecked is not None:
            self._unchecked.check()

    def is_due(self, step: int) -> bool:
        """Whether a line is due after a step."""
        return step % self.options.logging_steps == 0 or (step == 1 and self.options.logging_first_step)

    def write_step(self, progress: "Progress", made: "Step", epoch: float) -> None:
        """A line of the figures since the last one."""
        record = {
            "step": progress.step,
            "epoch": round(epoch, 4),
            **self.window.summary(self.engine.accelerator, self.sources, self.engine.flops),
            "learning_rate": made.rate,
            "grad_norm": whole(made.norm),
            "memory_gb": peak_memory_gb(self.engine.device),
            "skipped_steps": progress.skipped,
        }
        self.window = Window(len(self.sources), self.engine.device)
        self.engine.say(log_line(record, self.num_steps))
        figures = {key: value for key, value in record.items() if key not in ("step", "sources")}
        for name, of_source in record.get("sources", {}).items():
            figures |= {f"{key}/{name}": value for key, value in of_source.items()}
        self._write(record, figures)

    def write_measurement(self, step: int, metrics: dict[str, dict[str, float]], seconds: float) -> None:
        """A line of what was measured after a step."""
        self.measured[step] = metrics
        figures = {f"eval/{name}/{key}": value for name, of in metrics.items() for key, value in of.items()}
        self._write({"step": step, "eval": metrics, "eval_seconds": seconds}, figures | {"eval/seconds": seconds})

    def leave_out(self, seconds: float) -> None:
        """Rates are those of training: so much time was spent on something else."""
        self.window.start += seconds

    def finish(self) -> None:
        for tracker in self.engine.accelerator.trackers:
            tracker.finish()

    def _write(self, record: dict[str, Any], figures: dict[str, Any]) -> None:
        """One line of the log; the file is opened anew, as one that has been removed could be written all the same."""
        if self.engine.is_main:
            with saving_errors(record["step"], self.folder), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self.has_trackers:
            self.engine.accelerator.log(figures, step=record["step"])


def whole(norm: Any) -> float | None:
    """A gradient norm as a number: FSDP2 gives it in parts, DeepSpeed's stage 0 not at all."""
    return None if norm is None else float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class StepLoss(NamedTuple):
    """The loss of a step, looked at when the next has begun, so that a GPU is not waited for."""

    loss: Callable[[], np.ndarray]
    step: int
    batch: "Batch"

    def check(self) -> None:
        """Ends the program where it is no number."""
        if math.isfinite(loss := self.loss().item()):
            return
        places = ", ".join(example.rows.place(example.row) for example in self.batch.examples)
        sys.exit(
            printable(
                f"finetune.py: error: step {self.step}: the loss is {loss} on the rows {places}; lower --learning_rate, or "
                "look at these rows. Nothing was saved from this step on; earlier checkpoints are untouched"
            )
        )


class Window:
    """What happened since the last log line, on this process. Its sums stay on the device until they are asked for."""

    def __init__(self, num_sources: int, device: Any) -> None:
        import torch

        self.start = time.perf_counter()
        self.sums = torch.zeros(4, device=device)
        """Loss, accuracy, similarity of the positives, of the hardest negatives."""
        self.of_sources = torch.zeros(num_sources, 3, device=device)
        """Queries, sum of their losses, and how many have their positive first."""
        self.counts = np.zeros(6)
        """Batches, masked scores, queries, tokens, padding, pairs of tokens."""

    def add(self, output: "ContrastiveLoss", batch: "Batch") -> None:
        import torch

        from bge_accel.encoding.transfer import to_device

        tokens, num_queries = batch.tokens, len(batch.examples)
        if len(self.of_sources) > 1:
            sources = to_device(torch.tensor(batch.sources), self.sums.device)
            found = output.query_losses, output.query_correct
            figures = torch.stack([torch.ones_like(found[0]), *found], dim=1).float()
            self.of_sources.index_add_(0, sources, figures)
        means = output.loss, output.accuracy, output.positive_similarity, output.hardest_negative_similarity
        self.sums += torch.stack([figure.detach() for figure in means]).nan_to_num(0)  # a query may meet no negative
        counts = 1, output.num_masked, num_queries, tokens.num_tokens, tokens.num_padding, tokens.num_token_pairs
        self.counts += counts

    def summary(self, accelerator: Any, names: list[str], work: tuple[float, float]) -> dict[str, Any]:
        """Means and rates over all processes; where there are several sources, also of each that occurred.

        Args:
            work: `flops_per_token` of the model.
        """
        import torch

        from bge_accel.models.flops import peak_flops

        counts = torch.tensor(self.counts, dtype=torch.float32, device=accelerator.device)
        local = torch.cat([counts, self.sums, self.of_sources.flatten()])
        values = accelerator.reduce(local, reduction="sum").tolist()
        batches, masked, queries, tokens, padding, pairs, loss, accuracy, positive, negative = values[:10]
        of_sources = {
            name: {"loss": total / count, "accuracy": correct / count, "queries": count}
            for name, (count, total, correct) in zip(names, np.reshape(values[10:], (-1, 3)).tolist(), strict=True)
            if count
        }
        seconds = time.perf_counter() - self.start
        # The backward pass takes twice what the forward pass does.
        flops = 3 * (work[0] * tokens + work[1] * pairs) / seconds / accelerator.num_processes
        peak = peak_flops(accelerator.device)
        return {
            "loss": loss / batches,
            "accuracy": accuracy / batches,
            "positive_similarity": positive / batches,
            "hardest_negative_similarity": negative / batches,
            "masked_per_query": masked / queries,
            "queries_per_second": queries / seconds,
            "tokens_per_second": tokens / seconds,
            "padding": padding / (tokens + padding),
            "tflops": flops / 1e12,
            **({"mfu": flops / peak} if peak else {}),
            **({"sources": of_sources} if len(names) > 1 else {}),
        }


def log_line(record: dict[str, Any], num_steps: int) -> str:
    return (
        f"step {record['step']}/{num_steps}  loss {record['loss']:.4f}  accuracy {record['accuracy']:.3f}  "
        f"lr {record['learning_rate']:.2e}  grad norm {record['grad_norm'] or math.nan:.2f}  "
        f"{record['queries_per_second']:.1f} queries/s  {record['tokens_per_second']:,.0f} tokens/s  "
        f"padding {record['padding']:.1%}  {record['tflops']:.2f} TFLOP/s"
        + (f" (MFU {record['mfu']:.0%})" if "mfu" in record else "")
        + f"  masked {record['masked_per_query']:.2f}/query  "
        f"memory {record['memory_gb']:.1f} GB"
        + (f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else "")
        + "".join(
            f"\n    {name}: loss {figures['loss']:.4f}  accuracy {figures['accuracy']:.3f}"
            for name, figures in record.get("sources", {}).items()
        )
    )


def peak_memory_gb(device: Any) -> float:
    """The most memory held so far: of the GPU, else of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def rewind_log(path: str, step: int | None, *, has_measured: bool) -> dict[int, dict[str, dict[str, float]]]:
    """Takes out of a training log what comes again after a step; the metrics that stay, by step and data set.

    Args:
        step: None where a run begins, of which nothing stays.
        has_measured: whether what was measured at the step itself does not come again.

    Raises:
        ValueError: a line is none of a log.
    """
    kept, measured = list[bytes](), dict[int, Any]()
    if step is not None and os.path.exists(path):
        with open(path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # the last one may be cut
                    row = log_row(path, line)
                    if row["step"] < step or (row["step"] == step and (has_measured or "eval" not in row)):
                        kept.append(line)
                        measured |= {row["step"]: row["eval"]} if "eval" in row else {}
    with open(f"{path}.part", "wb") as file:
        file.writelines(kept)
    os.replace(f"{path}.part", path)
    return measured


def log_row(path: str, line: bytes) -> dict[str, Any]:
    """One line of the training log; ValueError where it is none."""
    try:
        row = decode_json(line)
        if isinstance(row["step"], int):
            return row
    except (ValueError, LookupError, TypeError):
        pass
    raise ValueError(f"{path}: {shorten(line)} is no line of a log; move the file away to resume")
