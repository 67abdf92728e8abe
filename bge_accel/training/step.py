"""One training step: embed, loss on embeddings, backward.

The loss sees the embeddings of the whole batch at once; its gradient with respect to them is then pushed through the
encoder micro-batch by micro-batch, from the graphs that were kept or by computing them again (GradCache: Gao et al.
2021, https://arxiv.org/abs/2101.06983). So the batch size is a choice about learning, not about memory.
"""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch

from bge_accel.encoding.batching import TokenBatch
from bge_accel.encoding.transfer import encoder_inputs, to_device

Output = TypeVar("Output")


class ActivationBudget:
    """Decides how many micro-batches keep their graphs, from what a token's activations cost.

    Args:
        max_bytes: what activations may take; infinite keeps all, 0 recomputes all.
        bytes_per_token: of a padded token; None has it measured on the first micro-batch of the first step.
    """

    def __init__(self, max_bytes: float = float("inf"), bytes_per_token: float | None = None) -> None:
        self.max_bytes, self.bytes_per_token = max_bytes, bytes_per_token

    @property
    def is_settled(self) -> bool:
        """Whether `num_kept` can answer without a measurement."""
        return self.bytes_per_token is not None or self.max_bytes in (0, float("inf"))

    def num_kept(self, tokens: list[int]) -> int:
        """How many micro-batches, counted from the last (the shortest texts), fit the budget together.

        At least one, unless nothing is to be kept: under DDP the processes have to agree whether any is, since its
        first pass with a graph is a collective.
        """
        if self.max_bytes in (0, float("inf")):
            return len(tokens) if self.max_bytes else 0
        kept = total = 0
        for size in reversed(tokens):
            total += size
            if kept and total * (self.bytes_per_token or 0) > self.max_bytes:
                break
            kept += 1
        return kept


def available_memory() -> int:
    """Bytes that this machine has to give, without swapping."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def keep_freed_memory() -> None:
    """Has the C library keep memory that is freed, for this process to use again; where it is not glibc's, nothing is done.

    What a step frees it gives back to the system by itself, which clears it page by page when the next one asks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # from malloc.h
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)  # large ones too come from the heap


def automatic_activation_bytes(device: torch.device, num_parameters: int, local_processes: int) -> float:
    """Bytes that activations may take on this process: most of what is free, less what the optimiser will need.

    On a GPU 70 % of its free memory, on a CPU half of what the machine has to give, shared among its processes.

    Args:
        local_processes: of the run on this machine.
    """
    optimizer = 12 * num_parameters  # gradient and two moments, in float32
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0.7 * (free + unused - optimizer), 1.0)
    return max(0.5 * available_memory() / local_processes - optimizer, 1.0)


def embed_and_backward(
    encoder: torch.nn.Module,
    batch: TokenBatch,
    loss_fn: Callable[[torch.Tensor], tuple[torch.Tensor, Output]],
    *,
    device: torch.device,
    packed_for: Any = None,
    activations: ActivationBudget | None = None,
    scale_loss: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
    no_sync: Callable[[], AbstractContextManager] = nullcontext,
    backward: Callable[[torch.Tensor, torch.Tensor, bool], None] | None = None,
    last: bool = True,
) -> Output:
    """Adds the gradient of a loss on the embeddings of a batch to the encoder's parameters.

    Args:
        encoder: maps what `encoder_inputs` gives to embeddings (texts, dim); may be wrapped by DDP or sharded.
        loss_fn: from the embeddings (num_texts, dim), in the order of the texts, to (loss, anything to return).
        packed_for: configuration of an encoder that takes texts without padding (`kernels.packed.use_kernel`); None pads.
        activations: which graphs are kept; the rest is recomputed, with the same dropout. The gradient is the same.
            By default all are kept.
        scale_loss: applied before differentiating: loss scaling, division by accumulation steps.
        no_sync: context in which DDP does not average gradients.
        backward: in place of autograd's: (embeddings, their gradient, whether it is the step's last). Needs a budget
            of 0.
        last: whether this is the last batch before the optimiser steps; else nothing is averaged.
    """
    activations = activations or ActivationBudget()
    assert backward is None or activations.max_bytes == 0
    inputs = [encoder_inputs(micro_batch, device, packed_for) for micro_batch in batch.micro_batches]
    sizes = [mb["input_ids"].numel() for mb in inputs]
    ends = list(accumulate(len(mb["input_ids"]) for mb in batch.micro_batches))
    rows = [slice(start, end) for start, end in pairwise([0, *ends])]
    together: torch.Tensor | None = None

    def note(embedded: torch.Tensor, index: int) -> torch.Tensor:
        # Into one tensor at once: small ones between the freed activations would hold on to their memory.
        nonlocal together
        if together is None:
            together = embedded.new_empty((batch.num_texts, embedded.shape[1]))
        together[rows[index]] = embedded.detach()
        return embedded

    states = []
    if not activations.is_settled:
        states.append(_rng_state(device))
        with no_sync():
            first, used = _with_measured_activations(encoder, inputs[0], device)
        activations.bytes_per_token = used / sizes[0]
        note(first, 0)
        del first
    keep = activations.num_kept(sizes[len(states) :])
    recompute = len(inputs) - keep
    # One joint backward pass over all kept graphs: DDP averages each gradient once, when it is complete. Where some
    # micro-batches are computed again, the last of these carries the averaging, so nothing before it may start it.
    sync_in_joint = last and recompute == 0

    with torch.no_grad():
        for index in range(len(states), recompute):
            states.append(_rng_state(device))
            note(encoder(**inputs[index]), index)
    with nullcontext() if sync_in_joint else no_sync():
        kept = [note(encoder(**inputs[index]), index) for index in range(recompute, len(inputs))]

    assert together is not None
    restore = to_device(batch.restore, device)
    leaf = together[restore].requires_grad_()
    loss, output = loss_fn(leaf)
    scale_loss(loss).backward()
    assert leaf.grad is not None
    grad, together = together, None
    grad[restore] = leaf.grad  # undoes the order: the gradient of each micro-batch's rows
    del leaf, loss

    if kept:
        with nullcontext() if sync_in_joint else no_sync():
            torch.autograd.backward(kept, [grad[rows[index]] for index in range(recompute, len(inputs))])
        del kept
    for index in range(recompute):
        is_last = last and index == recompute - 1
        with nullcontext() if is_last else no_sync(), _replayed_rng(states[index], device):
            embedded = encoder(**inputs[index])
            if backward is None:
                embedded.backward(gradient=grad[rows[index]])
            else:
                backward(embedded, grad[rows[index]], is_last)
    return output


def _with_measured_activations(
    encoder: torch.nn.Module, inputs: dict[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, float]:
    """The embeddings and how many bytes are held for their backward pass."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        embedded = encoder(**inputs)
        return embedded, float(torch.cuda.memory_allocated(device) - before)
    # A CPU does not say what is allocated: add up what autograd saves, weights not counted.
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        embedded = encoder(**inputs)
    for parameter in encoder.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    # With gradient checkpointing, each layer's input is held without being saved by autograd.
    tokens, layers = inputs["input_ids"].numel(), sum(1 for name, _ in encoder.named_modules() if name[-1:].isdigit())
    held_inputs = tokens * embedded.shape[-1] * embedded.element_size() * layers
    return embedded, float(max(sum(storages.values()), held_inputs))


def _rng_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def _replayed_rng(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> Iterator[None]:
    """Runs a block from an earlier state of the random generators, then puts the present state back."""
    present = _rng_state(device)
    _set_rng_state(state, device)
    try:
        yield
    finally:
        _set_rng_state(present, device)
