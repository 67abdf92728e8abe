"""Forward, backward and the optimiser's step under any backend: one process, DDP, FSDP2, DeepSpeed, float16, pure bfloat16."""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DeepSpeedPlugin, DistributedType, gather_object, set_seed
from tqdm import tqdm

from bge_accel.encoding.batching import TokenBatch, split_micro_batches
from bge_accel.files.text import printable
from bge_accel.models.compiling import compile_layers
from bge_accel.models.encoder import Encoder
from bge_accel.models.flops import flops_per_token
from bge_accel.models.precision import choose_precision
from bge_accel.training.checkpoint import (
    load_optimizer_tensors,
    optimizer_tensors,
    random_state,
    read_optimizer,
    set_random_state,
)
from bge_accel.training.gather import largest
from bge_accel.training.half_precision import Bf16Copy
from bge_accel.training.losses import ContrastiveLoss
from bge_accel.training.manifest import STATE
from bge_accel.training.sharding import configure_deepspeed, deepspeed_backward, whole_state_dict
from bge_accel.training.step import ActivationBudget, automatic_activation_bytes, embed_and_backward, keep_freed_memory


class Step(NamedTuple):
    """What an optimiser's step has done."""

    rate: float
    """The learning rate with which it was made."""
    norm: Any
    """Of the gradient, before clipping, as the backend gives it: to read it may wait for the device."""
    is_skipped: bool
    """float16 overflowed: no weight has moved, and the loss scale is lower now."""


class Engine:
    """The processes of a run and, once `prepare` has been called, its model, optimiser and schedule.

    Args:
        precision: "fp16", "bf16", "no" or "auto"; None is what `accelerate launch` was told.
        pure_bf16: bfloat16 weights and gradients, beside float32 weights for the optimiser.
        deepspeed: DeepSpeed's configuration.
        trackers: as accelerate names them; they write into `folder`.

    Raises:
        RuntimeError: accelerate does not run what was asked for.
    """

    def __init__(
        self,
        *,
        use_cpu: bool,
        precision: str | None,
        pure_bf16: bool,
        deepspeed: dict[str, Any] | None,
        trackers: Sequence[str],
        folder: str,
    ) -> None:
        self.on_cpu = use_cpu or not torch.cuda.is_available()
        if deepspeed is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        asked = sharding_asked_for()
        precision, self.warning = choose_precision(
            precision or os.environ.get("ACCELERATE_MIXED_PRECISION"), torch.device("cpu" if self.on_cpu else "cuda")
        )
        # FSDP and DeepSpeed keep float32 weights beside the bfloat16 ones by themselves; elsewhere a copy of the model does.
        self.pure_bf16 = pure_bf16 and precision == "bf16" and not asked
        if self.pure_bf16:
            precision = "no"  # nothing is to be cast
        # Buffers are constant; and as processes may differ in how many forward passes they make, sending them would hang.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*is deprecated")
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # accelerate sets it well
        self.accelerator = Accelerator(
            mixed_precision=precision,
            # Without it two CPU processes would run side by side, unconnected.
            cpu=True if self.on_cpu and not asked else None,  # type: ignore[arg-type]
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed) if deepspeed is not None else None,
            log_with=list(trackers) or None,  # type: ignore[arg-type]
            project_dir=folder,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.world, self.is_main = self.accelerator.num_processes, self.accelerator.is_main_process
        runs = self.accelerator.distributed_type
        if int(os.environ.get("WORLD_SIZE", "1")) != self.world:
            raise RuntimeError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate runs {self.world} process(es)"
            )
        if asked and runs.value not in asked:
            raise RuntimeError(f"{asked.pop()} was asked for, but accelerate runs {runs.value}")
        self.is_deepspeed = runs == DistributedType.DEEPSPEED
        self.is_sharded = self.is_deepspeed or runs == DistributedType.FSDP
        self.computes_in = "pure bf16" if self.pure_bf16 else self.accelerator.mixed_precision.replace("no", "float32")
        self.wait = self.accelerator.wait_for_everyone

    def say(self, text: str) -> None:
        """A line on the terminal, of the first process alone; it does not tear the progress bar."""
        if self.is_main:
            tqdm.write(printable(text))

    def prepare(
        self,
        encoder: Encoder,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        *,
        max_grad_norm: float,
        per_device_batch_size: int,
        activation_memory_budget: float | None,
        compiled: bool,
    ) -> None:
        """Takes over model, optimiser and schedule.

        Args:
            max_grad_norm: 0 never clips.
            activation_memory_budget: GB of activations to keep for the backward pass; None is most of what is free.

        Raises:
            ValueError: the layers cannot be compiled.
        """
        self.encoder, self.scheduler, self.max_grad_norm = encoder, scheduler, max_grad_norm
        self.flops = flops_per_token(encoder)
        if self.device.type == "cpu" and activation_memory_budget != 0:  # where little is kept, memory counts
            keep_freed_memory()
        # Under ZeRO-3 a parameter keeps its true size aside. DeepSpeed keeps float32 weights beside Adam's two moments.
        trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        self.model_bytes, trained_bytes = (
            sum(getattr(p, "ds_numel", p.numel()) * p.itemsize for p in of) for of in (encoder.parameters(), trained)
        )
        self.state_bytes = (3 if self.is_deepspeed else 2) * trained_bytes
        if self.is_deepspeed:
            configure_deepspeed(
                self.accelerator, per_device_batch_size=per_device_batch_size, max_grad_norm=max_grad_norm
            )
        self.half = Bf16Copy(encoder.to(self.device)) if self.pure_bf16 else None
        computing: Any = encoder if self.half is None else self.half.model
        if compiled:
            compile_layers(computing.backbone, self.device)
        self.model, self.optimizer = self.accelerator.prepare(computing, optimizer)
        self.deepspeed = self.accelerator.deepspeed_engine_wrapped.engine if self.is_deepspeed else None  # type: ignore[union-attr]
        if self.is_sharded:  # weights are gathered in each pass; what is kept is up to FSDP and DeepSpeed
            self.activations = ActivationBudget(0)
        elif activation_memory_budget is not None:
            self.activations = ActivationBudget(activation_memory_budget * 1e9)
        else:
            num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
            local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self.activations = ActivationBudget(
                automatic_activation_bytes(self.device, num_parameters, local_processes)
            )

    def backward(
        self,
        tokens: TokenBatch,
        loss_of: Callable[[torch.Tensor, torch.Tensor], ContrastiveLoss],
        *,
        num_queries: int,
        accumulated: int,
        is_last: bool,
        packed_for: Any,
    ) -> ContrastiveLoss:
        """Adds the gradient of a batch's loss; what the loss function gave.

        Args:
            tokens: of the queries, then of the passages.
            loss_of: from the embeddings of queries (num_queries, dim) and passages (num_passages, dim) of this process.
            num_queries: how many of the texts are queries.
            accumulated: batches of this step; the loss is divided by it.
            is_last: whether the step follows: else nothing is averaged over processes.
            packed_for: see `embed_and_backward`.
        """
        if self.is_sharded:  # every forward pass is a collective
            tokens = split_micro_batches(tokens, largest(len(tokens.micro_batches), self.device))
        scaler = self.accelerator.scaler

        def loss_fn(emb: torch.Tensor) -> tuple[torch.Tensor, ContrastiveLoss]:
            output = loss_of(emb[:num_queries], emb[num_queries:])
            return output.loss, output

        def scale_loss(loss: torch.Tensor) -> torch.Tensor:
            return scaler.scale(loss / accumulated) if scaler is not None else loss / accumulated

        no_sync: Callable[[], AbstractContextManager] = nullcontext
        output = embed_and_backward(
            self.model,
            tokens,
            loss_fn,
            device=self.device,
            packed_for=packed_for,
            activations=self.activations,
            scale_loss=scale_loss,
            no_sync=no_sync if self.is_sharded else partial(self.accelerator.no_sync, self.model),
            backward=deepspeed_backward(self.deepspeed) if self.is_deepspeed else None,
            last=is_last,
        )
        if self.half is not None and (is_last or self.world == 1):  # before, other processes' parts are still missing
            self.half.move_gradients()
        return output

    def step(self) -> Step:
        """Clips the gradient, moves the weights, forgets the gradient, and goes on in the schedule."""
        rate, scaler = self.scheduler.get_last_lr()[0], self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 1.0
        if self.deepspeed is not None:  # clips, steps and forgets the gradients in one
            self.deepspeed.step()
            norm = self.deepspeed.get_global_grad_norm()
        else:
            weights = self.model if self.half is None else self.encoder
            norm = self.accelerator.clip_grad_norm_(weights.parameters(), self.max_grad_norm or math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.half is not None:
                self.half.take_weights()
        # A fused optimiser is called even where it skips, so accelerate's own flag is blind to it.
        is_skipped = (
            scaler.get_scale() < scale
            if scaler is not None
            else self.deepspeed is not None and not self.deepspeed.was_step_applied()
        )
        if not is_skipped:
            self.scheduler.step()
        return Step(rate, norm, is_skipped)

    # ---- what a checkpoint keeps

    def weights(self) -> dict[str, torch.Tensor] | None:
        """The whole weights where they are sharded (all processes take part); None where the encoder has them."""
        return whole_state_dict(self.accelerator, self.model) if self.is_sharded else None

    def optimizer_tensors(self) -> dict[str, torch.Tensor] | None:
        """AdamW's state; None where DeepSpeed keeps it, and where another process writes it."""
        wanted = not self.is_deepspeed and (self.is_main or self.is_sharded)
        return optimizer_tensors(self.encoder, self.optimizer) if wanted else None

    def state(self) -> dict[str, Any]:
        """Numbers of all processes, as JSON; all of them take part."""
        scaler = self.accelerator.scaler
        return {
            "scaler": scaler.state_dict() if scaler is not None else None,
            "activation_bytes": self.activations.max_bytes,
            "bytes_per_token": self.activations.bytes_per_token,
            "random": gather_object([random_state(self.device)]),
        }

    def save_deepspeed(self, folder: str) -> None:
        """DeepSpeed's own files of a checkpoint; all processes take part."""
        if self.deepspeed is not None:
            self.deepspeed.save_checkpoint(os.path.join(folder, STATE), tag="deepspeed")

    def restore(
        self, checkpoint: str, state: Mapping[str, Any], *, activation_memory_budget: float | None, seed: int
    ) -> None:
        """Goes on as the run that saved a checkpoint would have.

        Args:
            state: of the checkpoint: its step, its settings, and what `state` gave.
            activation_memory_budget: of this run.
            seed: for the random generators where the number of processes is another.

        Raises:
            ValueError: the checkpoint does not fit the model, or is damaged.
        """
        step, scaler = state["step"], self.accelerator.scaler
        # The rate is a function of the step alone, by the present flags.
        schedule = self.scheduler
        rates = [base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict(
            {**schedule.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        )
        if self.deepspeed is not None:
            self.deepspeed.load_checkpoint(os.path.join(checkpoint, STATE), tag="deepspeed")
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        else:
            load_optimizer_tensors(self.encoder, self.optimizer, read_optimizer(checkpoint), rates)
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
        if state["num_processes"] != self.world:
            set_seed((seed + step + self.rank) % 2**32)
            return
        # As many graphs are kept as before: the order in which gradients are summed decides their last bits.
        if activation_memory_budget == state["settings"].get("activation_memory_budget"):
            self.activations.bytes_per_token = state["bytes_per_token"]
            if self.on_cpu:
                self.activations.max_bytes = state["activation_bytes"]
        set_random_state(state["random"][self.rank], self.device)


def sharding_asked_for() -> set[str]:
    """ "FSDP" or "DEEPSPEED" where `accelerate launch` was told to use it."""
    return {name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true"}


def compiling_asked_for() -> bool:
    """Whether `accelerate launch --dynamo_backend` was given; taken back, as it would compile the model for each shape."""
    asked = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"
    if asked:
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"
    return asked


def make_adamw(
    encoder: torch.nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    fused: bool,
) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained; biases and norms do not decay."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter is a flat part of itself and keeps its true shape aside.
    decayed = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)
