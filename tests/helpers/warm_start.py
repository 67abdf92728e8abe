"""Starts scripts in new processes that have the heavy packages imported already, in one second instead of eight.

What runs is what `python SCRIPT ARGS` would run: a real process of its own, which can be sent signals and be killed.
"""

import atexit
import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from helpers.repo import REPO
from tqdm import tqdm

SCRIPT = REPO / "scripts" / "finetune.py"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    "pytest pandas pyarrow.compute torch torch.distributed accelerate deepspeed safetensors.torch transformers "
    "transformers.optimization transformers.trainer_utils transformers.convert_slow_tokenizer "
    "transformers.models.auto.tokenization_auto transformers.models.bert.modeling_bert".split()
)


def _become(argv: list[str], cwd: str, env: dict[str, str], output: str, errors: str) -> None:
    os.chdir(cwd)
    os.environ.update(env)
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    tqdm.set_lock(threading.RLock())  # its own is shared among processes, and one that is killed would leave it behind
    tempfile.tempdir = None  # where the environment says, now
    sys.argv = argv
    sys.path[0] = os.path.dirname(argv[0])
    faulthandler.dump_traceback_later(100)  # what it does when it does not end
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


class Job:
    """One run of a script in one or more processes, which find one another as under torchrun."""

    def __init__(
        self,
        *args: object,
        cwd: Path,
        script: Path = SCRIPT,
        through: tuple[Path, ...] = (),
        processes: int = 1,
        env: dict[str, str] | None = None,
        output: Path | None = None,
        errors: Path | None = None,
    ) -> None:
        """Starts it.

        `through`: scripts that run the script, each given what follows it as its arguments. `output`: the file for what it
        writes; `errors`: for its standard error, if not the same.
        """
        Job.count += 1
        self.output = output or cwd / f"job-{Job.count}.out"
        argv = [str(part) for part in (*through, script, *args)]
        common = dict(env or {})
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
            common |= {"LOCAL_WORLD_SIZE": str(processes)}
        self.processes, written = [], (self.output, errors or self.output)
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            process = FORKS.Process(target=_become, args=(argv, str(cwd), common | own, *map(str, written)))
            process.start()
            self.processes.append(process)
        running.append(self)

    count = 0

    @property
    def text(self) -> str:
        """All that was written to the standard output and error so far."""
        return self.output.read_text() if self.output.exists() else ""

    @property
    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        """Returns as soon as a condition holds; an error if the processes end before."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.is_alive and time.monotonic() < end, f"it never came to that:\n{self.text[-5000:]}"
            time.sleep(0.001)

    def send(self, number: int, ranks: tuple[int, ...] | None = None) -> None:
        """Sends a signal to some of the processes, by default to all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        """Kills all processes at once; an error if one has ended before."""
        assert all(process.is_alive() for process in self.processes), f"ended before the kill:\n{self.text[-5000:]}"
        self.send(signal.SIGKILL)
        assert self.wait() == [-signal.SIGKILL] * len(self.processes)

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit status of every process."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
            assert process.exitcode is not None, f"still running:\n{self.text[-5000:]}"
        return [process.exitcode for process in self.processes]

    def ends(self, status: int = 0, timeout: float = 120) -> str:
        """What it wrote, once it has ended; an error unless every process ends with this status."""
        found = self.wait(timeout)
        assert found == [status] * len(found), f"exit {found}\n{self.text[-6000:]}"
        return self.text


running: list[Job] = []


def end_all() -> None:
    """Kills what is left of every job."""
    while running:
        job = running.pop()
        for process in job.processes:
            if process.is_alive():
                process.kill()
            process.join()
