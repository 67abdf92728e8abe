"""What a transformer computes, and what a machine can: the two sides of model FLOPs utilisation (MFU)."""

import time
from typing import Any

import torch

from bge_accel.kernels import last_layer
from bge_accel.models.encoder import Encoder

# Dense tensor-core rates in bfloat16 or float16, 1e12 operations a second, from NVIDIA's and AMD's data sheets. The first
# name that occurs in the card's own counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
    "MI300X": 1307,
    "MI250": 362,
}


def flops_per_token(encoder: Encoder) -> tuple[float, float]:
    """(a, b): the forward pass over a text of n tokens takes about a n + b n^2 floating-point operations.

    Matrix products alone, a multiplication and an addition each: 2 for every weight of a linear layer and token, and
    4 x layers x hidden size for every pair of tokens (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, section
    2.1, with bidirectional attention). What the last layer computes for one token a text alone is left out. The backward
    pass takes twice as many.
    """
    config: Any = encoder.config
    once = last_layer.linears_once_a_text(encoder.backbone) if encoder.pools_one_token else []
    weights = sum(
        getattr(module.weight, "ds_numel", module.weight.numel())  # under ZeRO-3 a part is here
        for name, module in encoder.backbone.named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in name and module not in once
    )
    heads = getattr(config, "num_attention_heads", 1)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2.0 * weights, 4.0 * (config.num_hidden_layers - bool(once)) * width


def peak_flops(device: torch.device) -> float | None:
    """What a GPU computes in half precision at most, a second; None where it is not known, as for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for known, tera in PEAK_TFLOPS.items() if known in name), None)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large product on this machine, the best of five."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
