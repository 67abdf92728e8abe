"""Switches the kernels on for a model in training."""

from typing import Any

import torch

from bge_accel.kernels.cpu_attention import use_cpu_attention
from bge_accel.kernels.dropout import use_cpu_dropout
from bge_accel.kernels.in_place_gradients import add_gradients_in_place
from bge_accel.kernels.packed import can_run_packed, check_dropout, use_kernel


def use_kernels(backbone: Any, attention: str, device: torch.device, *, compiled: bool, in_place: bool) -> Any:
    """Has a model compute faster, with the same result to rounding.

    Args:
        attention: a kernel of `kernels.packed`, or "padded"; "auto" takes the one for CPUs where it can run.
        compiled: whether the layers will be compiled, which most kernels cannot be.
        in_place: whether gradients may be added in place: nothing averages or shards them.

    Returns:
        The model's configuration where it takes texts without padding, for `make_token_batch`; else None.

    Raises:
        ValueError: the kernel cannot run with this model's dropout.
    """
    on_cpu = device.type == "cpu" and not compiled
    if on_cpu:
        use_cpu_dropout(backbone)
        use_cpu_attention(backbone)
        if in_place:
            add_gradients_in_place(backbone)
    if attention == "auto":
        attention = "cpu" if on_cpu and can_run_packed(backbone.config) else "padded"
    if attention == "padded":
        return None
    check_dropout(attention, backbone.config)
    use_kernel(backbone, attention)
    return backbone.config
