"""Forward, backward and the optimiser's step under any backend: one process, DDP, FSDP2, DeepSpeed, float16, pure bfloat16."""

import math
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DeepSpeedPlugin, DistributedType, gather_object, set_seed
from tqdm import tqdm
from transformers import get_scheduler

from bge_accel.encoding.batching import TokenBatch, split_micro_batches
from bge_accel.files.text import printable
from bge_accel.kernels.packed import check_kernel
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


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to compute, and how to step; each named as the flag of scripts/finetune.py."""

    use_cpu: bool
    fp16: bool
    bf16: bool
    pure_bf16: bool
    mixed_precision: str | None
    torch_compile: bool
    attention: str
    activation_memory_budget: float | None
    per_device_train_batch_size: int
    max_grad_norm: float
    learning_rate: float
    lr_scheduler_type: str
    warmup_ratio: float
    warmup_steps: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    optim: str
    seed: int
    report_to: list[str]
    output_dir: str


class Engine:
    """The processes of a run and, once `prepare` has been called, its model, optimiser and schedule.

    Args:
        deepspeed: DeepSpeed's configuration, where it was given by a flag.

    Raises:
        ValueError: the device, or the way the run is sharded, cannot do what was asked for.
        RuntimeError: accelerate does not run what was asked for.
    """

    def __init__(self, options: EngineOptions, deepspeed: dict[str, Any] | None = None) -> None:
        self.options = options
        self.on_cpu = options.use_cpu or not torch.cuda.is_available()
        if deepspeed is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        asked = {name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true"}
        if options.torch_compile and asked:
            raise ValueError("--torch_compile is for one process or DDP, not for FSDP or DeepSpeed; drop the flag")
        half = "fp16" if options.fp16 else "bf16" if options.bf16 or options.pure_bf16 else None
        precision, warning = choose_precision(
            options.mixed_precision or half or os.environ.get("ACCELERATE_MIXED_PRECISION"),
            torch.device("cpu" if self.on_cpu else "cuda"),
        )
        # FSDP and DeepSpeed keep float32 weights beside the bfloat16 ones by themselves; elsewhere a copy of the model does.
        self.pure_bf16 = options.pure_bf16 and precision == "bf16" and not asked
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
            log_with=[tracker for tracker in options.report_to if tracker != "none"] or None,  # type: ignore[arg-type]
            project_dir=options.output_dir,
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
        if options.attention not in ("auto", "padded"):
            check_kernel(options.attention, self.device, self.computes_in)
        if warning:
            self.say(f"note: {warning}")

    def say(self, text: str) -> None:
        """A line on the terminal, of the first process alone; it does not tear the progress bar."""
        if self.is_main:
            tqdm.write(printable(text))

    def prepare(self, encoder: Encoder, num_steps: int) -> None:
        """Takes over a model, with AdamW and a schedule of so many steps.

        Raises:
            ValueError: the layers cannot be compiled.
        """
        options = self.options
        self.encoder, self.flops = encoder, flops_per_token(encoder)
        optimizer = make_adamw(encoder, options)
        warmup = options.warmup_steps or math.ceil(options.warmup_ratio * num_steps)
        self.scheduler: Any = get_scheduler(options.lr_scheduler_type, optimizer, warmup, num_steps)
        if self.device.type == "cpu" and options.activation_memory_budget != 0:  # where little is kept, memory counts
            keep_freed_memory()
        # Under ZeRO-3 a parameter keeps its true size aside. DeepSpeed keeps float32 weights beside Adam's two moments.
        trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        self.model_bytes, trained_bytes = (
            sum(getattr(p, "ds_numel", p.numel()) * p.itemsize for p in of) for of in (encoder.parameters(), trained)
        )
        self.state_bytes = (3 if self.is_deepspeed else 2) * trained_bytes
        if self.is_deepspeed:
            configure_deepspeed(
                self.accelerator,
                per_device_batch_size=options.per_device_train_batch_size,
                max_grad_norm=options.max_grad_norm,
            )
        self.half = Bf16Copy(encoder.to(self.device)) if self.pure_bf16 else None
        computing: Any = encoder if self.half is None else self.half.model
        if options.torch_compile:
            compile_layers(computing.backbone, self.device)
        self.model, self.optimizer = self.accelerator.prepare(computing, optimizer)
        self.deepspeed = self.accelerator.deepspeed_engine_wrapped.engine if self.is_deepspeed else None  # type: ignore[union-attr]
        if self.is_sharded:  # weights are gathered in each pass; what is kept is up to FSDP and DeepSpeed
            self.activations = ActivationBudget(0)
        elif options.activation_memory_budget is not None:
            self.activations = ActivationBudget(options.activation_memory_budget * 1e9)
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
            norm = self.accelerator.clip_grad_norm_(weights.parameters(), self.options.max_grad_norm or math.inf)
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

    def restore(self, checkpoint: str, state: Mapping[str, Any]) -> None:
        """Goes on as the run that saved a checkpoint would have.

        Args:
            state: of the checkpoint: its step, its settings, its number of processes, and what `state` gave.

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
            set_seed((self.options.seed + step + self.rank) % 2**32)
            return
        # As many graphs are kept as before: the order in which gradients are summed decides their last bits.
        if self.options.activation_memory_budget == state["settings"].get("activation_memory_budget"):
            self.activations.bytes_per_token = state["bytes_per_token"]
            if self.on_cpu:
                self.activations.max_bytes = state["activation_bytes"]
        set_random_state(state["random"][self.rank], self.device)


def compiling_asked_for() -> bool:
    """Whether `accelerate launch --dynamo_backend` was given; taken back, as it would compile the model for each shape."""
    asked = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"
    if asked:
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"
    return asked


def make_adamw(encoder: torch.nn.Module, options: EngineOptions) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained; biases and norms do not decay."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter is a flat part of itself and keeps its true shape aside.
    decayed = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=options.optim == "adamw_torch_fused",
    )
