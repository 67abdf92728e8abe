"""Runs a script as `python SCRIPT ARGS` would and counts the tensor operations for which a GPU would be waited for.

They are those whose result Python or the shape of another tensor depends on; what is moved to the host as a whole, which
on a CPU is no operation, is not seen. The number goes to $SPY_WAITS.
"""

import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten.equal", "repeat_interleave")


class Count(TorchDispatchMode):
    """While it is active, counts them."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += any(name in str(func) for name in WAITS)
        return func(*args, **(kwargs or {}))


sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
with Count() as count, suppress(SystemExit):  # with which a script ends
    runpy.run_path(sys.argv[0], run_name="__main__")
Path(os.environ["SPY_WAITS"]).write_text(str(count.number))
