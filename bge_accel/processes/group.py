"""Long jobs of several processes that rewrite files of rows: sharing, what is kept until the end, output whole or absent."""

import gc
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, Any, TypeVar

from bge_accel.data.reading import Faults, find_files, load_json, name_that_finds, printable, read_rows
from bge_accel.training.checkpoint import atomic_folder, differences, flush

T = TypeVar("T")
LOG_SECONDS = 60  # between two lines of progress where there is no terminal


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


def progress(total: int | None, what: str, unit: str, *, shown: bool = True, **options: Any) -> Any:
    """A bar on a terminal and in a notebook; in the log of a job a line a minute, so nothing of what takes less.

    Args:
        options: of tqdm.
    """
    from tqdm import tqdm

    options = {"total": total, "desc": what, "unit": unit, "disable": not shown, **options}
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        of_total, to_go = (" of {total_fmt}", ", {remaining} to go") if total is not None else ("", "")
        options |= {
            "bar_format": f"{{desc}}: {{n_fmt}}{of_total} {unit}s, {{elapsed}} gone{to_go}, {{rate_fmt}}",
            "mininterval": LOG_SECONDS,
            "maxinterval": 2 * LOG_SECONDS,
            "delay": LOG_SECONDS,
            "leave": False,
            "file": _Lines(),
        }
    return tqdm(**options)


class _Lines:
    """Where tqdm writes a bar over the last one, writes lines to stderr."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            print(printable(text), file=sys.stderr, flush=True)

    def flush(self) -> None: ...


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


def is_text(name: str) -> bool:
    """Whether a name of a file is UTF-8; others hold halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def check_folder(flag: str, path: str) -> None:
    """Raises ValueError where a folder cannot be made, or nothing can be written into it."""
    if not path:
        raise ValueError(f"{flag} is empty; name a folder")
    if not is_text(path):  # tokenizers and safetensors cannot write there, which would be seen at the end
        raise ValueError(f"{flag} {path} is not UTF-8; name another folder")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ValueError(f"{flag} {path} is a file; name a folder")
    nearest = os.path.abspath(path)
    while not os.path.exists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: {nearest} cannot be written to; name another folder")


def check_replaced_folder(flag: str, path: str, names: Collection[str]) -> None:
    """Raises ValueError unless a folder is not there, is empty, or holds exactly the files that are written anew."""
    check_folder(flag, path)
    there = set(os.listdir(path)) if os.path.isdir(path) else set()
    if there and there != set(names):
        found = ", ".join(sorted(there - set(names))[:5]) or "only a part of this data"
        raise ValueError(f"{flag} {path} would be replaced, but it holds {found}; name another folder")


def write_folder(path: str, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files; a reader finds whole ones, of the old folder or of the new."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_folder(path) as folder:
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)


def check_output(flag: str, path: str, inputs: Sequence[str]) -> None:
    """Raises ValueError where a file cannot be written, would be written over an input, or be read as one by the next run.

    Args:
        inputs: files, globs and folders of data; those that are not here are passed over.
    """
    if not path or os.path.isdir(path):
        raise ValueError(f"{flag} {path!r} is not the name of a file")
    check_folder(f"{flag} {path}: its folder", os.path.dirname(os.path.abspath(path)))
    if os.path.exists(path) and any(os.path.samefile(path, name) for name in find_files(inputs, Faults())):
        raise ValueError(f"{flag} {path} is an input; name another file")
    if (name := name_that_finds(path, inputs)) is not None:
        raise ValueError(f"{flag} {path}: the next run would read it as data, from {name}; write it elsewhere")


def check_json(paths: Sequence[str], faults: Faults) -> None:
    """Finds values of Parquet files that JSON lines, in which rows are written, cannot hold."""
    for path in find_files(paths, faults):
        for where, _, row in read_rows(path, faults) if path.endswith(".parquet") else ():
            try:
                json.dumps(row)
            except TypeError as error:
                faults.add(where, f"the row cannot be written as JSON ({error}); drop that column")


@contextmanager
def atomic_file(path: str) -> Iterator[IO[str]]:
    """Yields a text file that appears under its name when it is complete, or not at all."""
    aside = f"{path}.incomplete"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        # A name of a file that is no UTF-8 is written as JSON writes it.
        with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        flush(aside)
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def open_work(
    work: str, fingerprint: dict[str, Any], say: Callable[[str], None], *, removes: tuple[str, ...] = ("part-",)
) -> None:
    """Keeps what a run with the same inputs and settings has left in a folder; removes what another one has.

    What a note that cannot be read says is of another run, too.

    Args:
        say: told which of the two it is.
        removes: beginnings of the names of files and folders that belong to one run.
    """
    os.makedirs(work, exist_ok=True)
    path = os.path.join(work, "fingerprint.json")
    fingerprint = json.loads(json.dumps(fingerprint))
    if os.path.exists(path):
        try:
            old = load_json(path)
        except ValueError as error:
            old = str(error)
        if old == fingerprint:
            parts = [name for name in os.listdir(work) if name.startswith("part-") and "." not in name]
            done = sum(read_part(os.path.join(work, name)) is not None for name in parts)
            say(f"going on from an interrupted run: {done} of its chunks of rows are done")
            return
        changes = "; ".join(differences(old, fingerprint)) if isinstance(old, dict) else old
        say(f"starting afresh, {work} is of another run: {changes}")
    for name in os.listdir(work):
        if name.startswith(removes) or name == "fingerprint.json":
            stale = os.path.join(work, name)
            shutil.rmtree(stale) if os.path.isdir(stale) else os.remove(stale)
    with atomic_file(path) as file:
        json.dump(fingerprint, file)


def write_part(path: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Keeps what was found for one chunk of rows: a JSON line each, and a last one with the checksum of these."""
    content = "".join(json.dumps(record) + "\n" for record in records)
    with atomic_file(path) as file:
        file.write(f"{content}{zlib.crc32(content.encode())}\n")


def read_part(path: str) -> list[dict[str, Any]] | None:
    """The records that `write_part` has written; None where they are not there, or not whole any more."""
    try:
        with open(path, "rb") as file:
            *lines, checksum = file.read().splitlines(keepends=True)
    except (FileNotFoundError, ValueError):  # not there, empty
        return None
    if checksum != b"%d\n" % zlib.crc32(b"".join(lines)):
        return None
    return [json.loads(line) for line in lines]


def read_parts(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The records of all parts, one part at a time; ValueError where one was damaged after it had been written."""
    for path in paths:
        records = read_part(path)
        if records is None:
            raise ValueError(f"{path} is not there or damaged; the same command makes it again")
        yield from records


def what_is_kept(*places: str) -> str:
    """For the last line of a run that was stopped: where its work is kept, if there is some, and how to go on.

    Args:
        places: files that are there when something is kept in their folders.
    """
    folders = [os.path.dirname(place) for place in places if os.path.exists(place)]
    if not folders:
        return "nothing is kept, the same command starts again"
    return f"what is done is kept in {' and '.join(folders)}, the same command goes on from there"


def new_row(
    row: dict[str, Any], negatives: list[str], scores: tuple[list[float], list[float]] | None
) -> dict[str, Any]:
    """The row with its new negatives, all else as it was; scores of others never stay."""
    new: dict[str, Any] = {}
    for name, value in row.items():
        if name not in ("neg", "pos_scores", "neg_scores"):
            new[name] = value
        if name == "neg" or (name == "pos" and "neg" not in row):
            new["neg"] = negatives
    if scores is not None:
        new["pos_scores"], new["neg_scores"] = scores
    return new


def rounded(scores: Sequence[float]) -> list[float]:
    """Scores as they are written."""
    return [round(score, 6) for score in scores]


def say(text: str) -> None:
    """Prints what may hold names and texts of others: no control character reaches the terminal."""
    print(printable(text), flush=True)


def warn(text: str) -> None:
    """Prints a warning on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(f"warning: {text}"), file=sys.stderr, flush=True)
