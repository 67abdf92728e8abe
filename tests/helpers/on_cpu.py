"""Runs a script as `python SCRIPT ARGS` would, with what FSDP, DeepSpeed and float16 need to run on a CPU.

    accelerate launch --config_file configs/accelerate/zero2.yaml --num_processes 2 tests/helpers/on_cpu.py scripts/finetune.py ...

On a GPU none of this is wanted, so it lives here and not in the script. With CPU_LOSS_SCALE set, float16 runs with a loss
scaler that starts there.
"""

import os
import runpy
import sys

import accelerate
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs

start = accelerate.Accelerator.__init__
loss_scale = float(os.environ.get("CPU_LOSS_SCALE", "0"))


def start_on_cpu(self, *args, **kwargs):
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        kwargs["kwargs_handlers"] = [*kwargs.get("kwargs_handlers", []), InitProcessGroupKwargs(backend="gloo")]
    start(self, *args, **kwargs)
    if loss_scale:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
        self.native_amp, self.state._mixed_precision = True, "fp16"


accelerate.Accelerator.__init__ = start_on_cpu
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
