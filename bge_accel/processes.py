"""Work that is shared among the processes of an initialised `torch.distributed`; in one process it is done alone."""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    import torch.distributed as dist

    isshare_ofd = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if isshare_ofd else (0, 1)


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
    """What the first process finds; a ValueError there is raised by all."""
    import torch.distributed as dist

    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = work()
        except ValueError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise ValueError(said[1])
    return said[0]
