"""What FSDP2 and DeepSpeed need beyond Accelerate for a step of many forward and backward passes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bge_accel.files.parsing import load_json

if TYPE_CHECKING:
    import torch


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """A DeepSpeed configuration file without its optimiser and schedule, which the script has itself.

    Raises:
        ValueError: the file cannot be read or is no JSON object.
    """
    try:
        config = load_json(path)
    except ValueError as error:
        raise ValueError(f"--deepspeed {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed {path}: expected an object {{...}}")
    config.pop("optimizer", None)
    config.pop("scheduler", None)
    return config


def configure_deepspeed(accelerator: Any, *, per_device_batch_size: int, max_grad_norm: float) -> None:
    """Settles, before `accelerator.prepare`, what DeepSpeed would otherwise take from a loader or guess.

    Its own accumulation stays 1: the step says itself which backward pass is the last.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = per_device_batch_size
    config["gradient_accumulation_steps"] = 1
    config["train_batch_size"] = per_device_batch_size * accelerator.num_processes
    config["gradient_clipping"] = max_grad_norm  # absent, it would be 1.0
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    if config.get("zero_optimization", {}).get("stage") == 3:  # else the run would end without a model
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def whole_state_dict(accelerator: Any, model: Any) -> "dict[str, torch.Tensor]":
    """The weights in float32 on the CPU, whole, of a model that FSDP or DeepSpeed shards; all processes take part.

    DeepSpeed's own state dict has the half-precision copies; the float32 master weights are put in their place.
    """
    weights = accelerator.get_state_dict(model)
    if accelerator.distributed_type.value == "DEEPSPEED":
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in accelerator.unwrap_model(model).named_parameters():
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if master is not None and name in (weights or ()):
                weights[name] = master.detach().view(weights[name].shape)
    return {name: t.float().cpu() if t.is_floating_point() else t.cpu() for name, t in (weights or {}).items()}


def deepspeed_backward(engine: Any) -> "Callable[[torch.Tensor, torch.Tensor, bool], None]":
    """The `backward` of `embed_and_backward`: the engine averages and steps at the last pass only."""

    def backward(emb: "torch.Tensor", grad: "torch.Tensor", is_last: bool) -> None:
        engine.set_gradient_accumulation_boundary(is_last)
        engine.backward((emb * grad).sum())  # its gradient with respect to the embeddings is `grad`

    return backward
