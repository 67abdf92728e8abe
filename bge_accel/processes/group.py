"""Long jobs of several processes that rewrite files of rows: sharing, what is kept until the end, output whole or absent."""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from bge_accel.processes.progress import say

T = TypeVar("T")


class Processes:
    """The processes that `torchrun` or `accelerate launch` has started; they share no more than files and barriers."""

    def __init__(self) -> None:
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), 0
        if self.world > 1:
            import torch.distributed as dist

            # Gloo on GPUs, too: nothing is sent but a message now and then, after hours of work perhaps.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
            self.rank = dist.get_rank()

    def say(self, text: str) -> None:
        """Prints on the first process alone."""
        if self.rank == 0:
            say(text)

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def on_first(self, work: Callable[[], None]) -> None:
        """Does it on the first process while the others wait; what is wrong is raised by all."""
        from_first(work)


def leave_processes() -> None:
    """Ends what connects this process to others: the last line of a script, when `main` holds nothing any more.

    Gloo's threads want the interpreter to drop what the last message left, and abort a process whose interpreter is
    already ending (pytorch/pytorch#190489). They are joined when the last reference to the group goes. That must not be
    a wrapped model's, in a cycle that only the collector frees: it would wait for them with the interpreter locked.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "torch" in sys.modules:
        import torch.distributed as dist

        gc.collect()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    import torch.distributed as dist

    is_connected = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if is_connected else (0, 1)


def share_of(total: int, rank: int, world: int) -> tuple[int, int]:
    """First and end of the consecutive part of `total` things that one process takes."""
    return total * rank // world, total * (rank + 1) // world


def gather(value: T) -> list[T]:
    """What every process has, in their order."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def from_first(work: Callable[[], T]) -> T:
    """What the first process finds; a ValueError or an OSError there is raised by all."""
    rank, world = rank_and_world()
    said: list[Any] = [None, None]
    if rank == 0:
        try:
            said[0] = work()
        except ValueError as error:
            said[1] = ValueError(str(error))
        except OSError as error:
            if world == 1:
                raise
            said[1] = OSError(str(error))
    if world > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise said[1]
    return said[0]


class SharedCounters:
    """Numbers that all processes add to; in one process plain ones.

    Args:
        job: a name of the job, so that two of them in one program do not count together.
        is_shared: whether there are several processes, connected by `torch.distributed`.
    """

    def __init__(self, job: str, is_shared: bool) -> None:
        self._job, self._values = job, dict[str, int]()
        self._store: Any = None
        if is_shared:
            from torch.distributed import distributed_c10d

            self._store = distributed_c10d._get_default_store()

    def add(self, name: str, amount: int) -> int:
        """Adds to a number, which begins at 0, and returns the sum."""
        if self._store is not None:
            return self._store.add(f"{self._job}/{name}", amount)
        self._values[name] = self._values.get(name, 0) + amount
        return self._values[name]

    def share(self, items: Sequence[T]) -> Iterator[T]:
        """The next item that no process has taken yet, until there is none: a slow process holds up nothing."""
        while (turn := self.add("taken", 1)) <= len(items):
            yield items[turn - 1]
