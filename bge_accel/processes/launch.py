"""A script that becomes several processes by itself, one a GPU."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from bge_accel.files.text import printable
from bge_accel.processes.group import Processes, SharedCounters


def start_processes(wanted: int | None) -> None:
    """Becomes a torchrun of this script where several processes are wanted and this is not yet one of them.

    Args:
        wanted: how many; None is one a GPU.

    Raises:
        ValueError: another number has been started already.
    """
    if (started := os.environ.get("WORLD_SIZE")) is not None:
        if wanted is not None and int(started) != wanted:
            raise ValueError(f"--num_processes {wanted} has no effect: {started} processes have been started")
        return
    if wanted is None:
        from torch.cuda import device_count

        wanted = device_count()
    if wanted > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={wanted}"]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


def keep_own_gpu() -> None:
    """Lets each of several processes see a GPU of its own alone: what is said to use all GPUs then uses that one."""
    visible, rank = os.environ.get("CUDA_VISIBLE_DEVICES"), int(os.environ.get("LOCAL_RANK", "-1"))
    if rank >= 0 and visible != "":
        devices = visible.split(",") if visible else []
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[rank % len(devices)] if devices else str(rank)


@contextmanager
def errors_of_any(processes: Processes) -> Iterator[None]:
    """`user_errors` where any process may be the only one at fault, by the passages of its share: the first one speaks."""
    try:
        yield
    except ValueError as error:
        with suppress(RuntimeError):  # whoever holds the counter has spoken, and gone
            if SharedCounters("errors of any", processes.world > 1).add("errors", 1) == 1:
                print(printable(f"{os.path.basename(sys.argv[0])}: error: {error}"), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
