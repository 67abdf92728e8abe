"""Moving tensors between a GPU and the host so that neither waits for what the other is doing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bge_accel.kernels.packed import pack


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. A GPU copies it when it comes to it, and the call returns at once."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def encoder_inputs(
    micro_batch: dict[str, torch.Tensor], device: torch.device, packed_for: Any = None
) -> dict[str, Any]:
    """What an encoder takes of a micro-batch, on its device.

    Args:
        packed_for: configuration of a model that takes texts without padding, see `kernels.packed.pack`. None gives
            `input_ids`, `attention_mask` and whether there is any padding: here a look, there a wait.
    """
    if packed_for is not None:
        packed = pack(**micro_batch, config=packed_for)
        return {name: to_device(x, device) if isinstance(x, torch.Tensor) else x for name, x in packed.items()}
    is_padded = not micro_batch["attention_mask"].cpu().numpy().all()
    return {name: to_device(tensor, device) for name, tensor in micro_batch.items()} | {"is_padded": is_padded}


def to_host(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Begins to move a tensor to the host; the function that it returns waits until it is there."""
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        moved = tensor.cpu().numpy()
        return lambda: moved
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    is_there = torch.cuda.Event()
    is_there.record(torch.cuda.current_stream(tensor.device))

    def wait() -> np.ndarray:
        is_there.synchronize()
        return pinned.numpy()

    return wait
