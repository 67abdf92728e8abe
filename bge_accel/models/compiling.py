"""Gradient checkpointing, and compiling an encoder's layers."""

import importlib.util
import os
import shutil
from typing import Any

import torch

MOST_PROGRAMS = 16  # of `compile_layers`


def check_gradient_checkpointing(backbone: Any) -> None:
    """Raises ValueError where the code of a model cannot recompute its activations."""
    if not getattr(backbone, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"--gradient_checkpointing: the code of {type(backbone).__name__} has none; leave it out: what does not fit "
            "--activation_memory_budget is recomputed anyway"
        )


def enable_gradient_checkpointing(backbone: Any) -> None:
    """Has a transformer recompute its activations layer by layer in the backward pass."""
    backbone.config.use_cache = False
    # transformers 5.20 renamed it.
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_layers(backbone: Any, device: torch.device) -> None:
    """Has torch.compile make one program of what the layers of a transformer have in common, for texts of any length.

    A handful is made in all, each at its first use: with and without gradients, with and without padding, for several
    texts and for one. What stands around the layers runs as before.

    Args:
        device: where they will run.

    Raises:
        ValueError: there is no compiler for what torch.compile writes.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and importlib.util.find_spec("triton") is None:
        raise ValueError("--torch_compile needs the package triton on a GPU, and it is not installed; drop the flag")
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if not on_gpu and not any(map(shutil.which, compilers)):
        raise ValueError(
            f"--torch_compile needs a C++ compiler, and there is no {' or '.join(compilers)}; drop the flag"
        )
    # After so many torch.compile gives up, with a warning, and runs the layer as it is.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_PROGRAMS)
    for layers in backbone.modules():
        if isinstance(layers, torch.nn.ModuleList):
            for layer in layers:
                layer.compile(dynamic=True)
