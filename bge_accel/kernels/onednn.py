"""oneDNN's product of a linear layer, on x86 CPUs.

torch takes MKL's in float32, which first writes the bias into the result, and on AMD's processors is a tenth slower
(scripts/benchmarks/linear.py). For each number of rows oneDNN makes a program, and keeps a thousand of them, of about half a
megabyte each: so the rows that it is given are few different numbers.
"""

import platform
from functools import cache

import torch

MIN_ROWS = 512
ROWS_MULTIPLE = 64


@cache
def is_available() -> bool:
    """Whether torch was built with it, for a processor that it was tried on."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def round_up(rows: int) -> int:
    """How many rows to compute in place of so many, for `takes` to hold; fewer than `MIN_ROWS` are left as they are."""
    return -(-rows // ROWS_MULTIPLE) * ROWS_MULTIPLE if rows >= MIN_ROWS and is_available() else rows


def takes(states: torch.Tensor) -> bool:
    """Whether the products of these states (..., dim) in training are for oneDNN."""
    rows = states.numel() // states.shape[-1]
    return states.dtype == torch.float32 and rows >= MIN_ROWS and rows % ROWS_MULTIPLE == 0 and is_available()


def linear(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    """(..., in) and a weight (out, in) to (..., out), in float32 or bfloat16; without gradients.

    Args:
        weight: as it is, a transposed one, or rearranged.
        activation: "none", or "gelu", of the product with its bias.
    """
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, activation, [], "none")
    return product


def rearrange(weight: torch.Tensor) -> torch.Tensor:
    """The weight as this CPU multiplies it."""
    rearranged: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return rearranged


def cpu_has_bf16() -> bool:
    """Whether this CPU computes in bfloat16 itself; emulated, it is far slower than float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
