"""Linear layers whose weights lie as this CPU multiplies them, for as long as a window of texts is encoded.

oneDNN otherwise rearranges each weight again for every micro-batch. A GELU that follows a layer is computed with it, while
the product is in the cache.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from bge_accel.kernels import onednn
from bge_accel.kernels.in_place_gradients import is_linear
from bge_accel.kernels.onednn import cpu_has_bf16

# Below, rearranging costs more than it saves, whatever the model's size: both grow with its weights.
MIN_TOKENS = 16384

# Two threads may encode with one model: what one puts on its layers, the other would take off.
USING = threading.Lock()


def can_pack(module: Any) -> bool:
    """Whether a layer computes the same from a rearranged weight."""
    return (
        type(module) is torch.nn.Linear
        and type(module.weight) is torch.nn.Parameter  # not a part of a sharded one
        and module.weight.device.type == "cpu"
        and (module.weight.dtype == torch.float32 or (module.weight.dtype == torch.bfloat16 and cpu_has_bf16()))
        and ("forward" not in module.__dict__ or is_linear(module.__dict__["forward"]))
    )


def is_linear_and_gelu(module: Any) -> bool:
    """Whether a module, as BERT's family has it, is a linear layer `dense` and the exact GELU of what that gives."""
    return (
        type(module).__name__.endswith("Intermediate")
        and type(module).__module__.startswith("transformers.models.")
        and getattr(getattr(module, "intermediate_act_fn", None), "act", None) is torch.nn.functional.gelu
        and hasattr(module, "dense")
        and "forward" not in module.__dict__
    )


class PackedLinears:
    """The rearranged weights of a model's linear layers: a second copy of them, made when it is first used.

    Made anew for each encoding, so that it never outlives a change of the weights.
    """

    def __init__(self, backbone: torch.nn.Module) -> None:
        self.backbone = backbone
        self.weights: dict[Any, torch.Tensor] | None = None
        self.with_gelu: list[Any] = []
        self.is_available = onednn.is_available() and not torch.is_autocast_enabled("cpu")

    @contextmanager
    def used_for(self, num_tokens: int) -> Iterator[None]:
        """Within, the layers compute with the rearranged weights, if that pays for so many tokens; without gradients."""
        if not self.is_available or num_tokens < MIN_TOKENS:
            yield
            return
        with USING:
            if self.weights is None:
                layers: list[Any] = [module for module in self.backbone.modules() if can_pack(module)]
                self.weights = {layer: onednn.rearrange(layer.weight) for layer in layers}
                pairs = [module for module in self.backbone.modules() if is_linear_and_gelu(module)]
                self.with_gelu = [module for module in pairs if module.dense in self.weights]
            before = {module: module.__dict__.get("forward") for module in (*self.weights, *self.with_gelu)}
            for layer, weight in self.weights.items():
                layer.forward = partial(_linear, weight, layer.bias, "none")
            for module in self.with_gelu:
                module.forward = partial(_linear, self.weights[module.dense], module.dense.bias, "gelu")
            try:
                yield
            finally:
                for module, forward in before.items():
                    module.__dict__.pop("forward")
                    if forward is not None:
                        module.forward = forward


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, activation: str, states: torch.Tensor) -> torch.Tensor:
    return onednn.linear(states, weight, bias, activation)
