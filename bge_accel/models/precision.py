"""Which device and which precision to compute in, from what was asked for and what the hardware does well."""

import os
import platform
from itertools import islice

import torch

from bge_accel.kernels.onednn import cpu_has_bf16


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def own_device(num_processes: int) -> torch.device:
    """The same for one of several processes: each has a GPU of its own, which it takes from here on."""
    device = default_device()
    if device.type == "cuda" and num_processes > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


def cpu_is_faster_in_bf16() -> bool:
    """Whether this CPU multiplies matrices faster in bfloat16 than in float32, by its kind.

    Several times as fast with tile registers (AMX), about twice with AMD's AVX-512 and ARM's matrix instructions; but
    half as fast with Intel's AVX-512 alone (81 against 160 GFLOP/s on one core of an Emerald Rapids without AMX). Not
    measured, since a busy machine would decide otherwise from run to run.
    """
    if not cpu_has_bf16():
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    return torch.cpu._is_amx_tile_supported() or _is_amd()


def _is_amd() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return any(line.startswith("vendor_id") and "AMD" in line for line in islice(file, 8))
    except OSError:  # not Linux
        return "AMD" in platform.processor()


def floating_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point type of torch by itself or by its name; ValueError where it is none."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not float32, float16, bfloat16 or another floating-point type of torch")
    return found


def resolve_dtype(fp16: bool, bf16: bool, device: torch.device | None = None) -> tuple[torch.dtype, str | None]:
    """The precision to compute in, and a warning where it is not the one asked for.

    A CPU has no fast float16: it takes bfloat16 instead where that is fast, else float32.
    """
    on_gpu = (device or default_device()).type != "cpu"
    if fp16 and bf16:
        raise ValueError("--fp16 and --bf16 exclude each other; give one of them")
    if on_gpu and bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32, "this GPU has no bfloat16 arithmetic: computing in float32 instead; --fp16 is faster"
    if on_gpu or not (fp16 or bf16):
        return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32, None
    if bf16 and cpu_has_bf16():
        slow = None if cpu_is_faster_in_bf16() else "bfloat16 is slower than float32 on this CPU: leave out --bf16"
        return torch.bfloat16, slow
    if bf16:
        return torch.float32, "this CPU has no bfloat16 arithmetic: computing in float32 instead"
    if cpu_is_faster_in_bf16():
        return torch.bfloat16, "fp16 needs a GPU: computing in bfloat16 instead"
    return torch.float32, "fp16 needs a GPU and bfloat16 is not faster on this CPU: computing in float32 instead"


def choose_precision(asked: str | None, device: torch.device) -> tuple[str | None, str | None]:
    """Accelerate's name of a mixed precision (None: its own default) as far as the device can.

    Args:
        asked: "auto" for bfloat16 where the hardware is good at it, "fp16", "bf16", or any other of Accelerate's names.

    Returns:
        The name, and a warning where it is not what was asked for.
    """
    if asked not in ("auto", "fp16", "bf16"):
        return asked, None
    if asked == "auto" and device.type == "cpu":
        return "bf16" if cpu_is_faster_in_bf16() else "no", None
    dtype, warning = resolve_dtype(asked == "fp16", asked != "fp16", device)
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no")
    return name, None if asked == "auto" else warning
