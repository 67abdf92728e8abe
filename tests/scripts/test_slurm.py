"""scripts/slurm on a real SLURM: a controller and two nodes on this machine, in a folder that is removed afterwards."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from helpers.repo import REPO
from helpers.runs import write_rows

DAEMONS = ("munged", "slurmctld", "slurmd")
SEARCH_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
MISSING = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=SEARCH_PATH) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),  # one cluster
    pytest.mark.skipif(bool(MISSING), reason="SLURM is not installed: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start SLURM's daemons"),
]

# proctrack/pgid signals the processes that SLURM started and not their children, as proctrack/cgroup does on clusters.
# With a short cred_expire a requeued job starts again after seconds, not after two minutes.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/controller
SlurmctldPidFile={folder}/controller/pid
SlurmctldLogFile={folder}/controller/log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n/pid
SlurmdLogFile={folder}/%n/log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=test Nodes=n1,n2 Default=YES
"""


class Slurm:
    """A cluster of the nodes n1 and n2; all it leaves behind is `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "PATH": SEARCH_PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}
        folder.chmod(0o755)  # munge wants a way to its socket
        for name in ("munge", "controller", "n1", "n2"):
            (folder / name).mkdir()
        (folder / "munge" / "key").write_bytes(os.urandom(64))
        (folder / "munge" / "key").chmod(0o600)
        host = socket.gethostname().split(".")[0]
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=free_ports(3)))

    def start(self) -> None:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        paths = [f"--{flag}={self.folder}/munge/{name}" for flag, name in files.items()]
        self.start_daemon("munge", "munged", "--foreground", "--force", *paths)
        self.wait("munge", lambda: (self.folder / "munge" / "socket").exists(), seconds=10)
        self.start_daemon("controller", "slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)

    def start_daemon(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "a") as output:
            self.daemons[name] = subprocess.Popen(
                command, env=self.env, cwd=self.folder / name, stdout=output, stderr=output, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        self.start_daemon(node, "slurmd", "-D", "-N", node)
        self.wait(f"{node} to be idle", lambda: self.call("sinfo", "-hn", node, "-o%T") == "idle", seconds=30)

    def kill_node(self, node: str) -> None:
        """Ends all processes of a node at once, as when its power fails."""
        # The daemon and each step's manager work in the folder of their log, in sessions of their own.
        managers = [pid for pid in processes() if link(f"/proc/{pid}/cwd") == str(self.folder / node)]
        sessions = {session_of(pid) for pid in managers}
        for pid in processes():
            if session_of(pid) in sessions:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.daemons.pop(node).wait()

    def stop(self) -> None:
        for name in ("n1", "n2"):
            if name in self.daemons:
                self.kill_node(name)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *command: str, **kwargs: Path) -> str:
        """What a command of SLURM prints; empty where it fails, as all of them do while the controller starts."""
        return subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=60, **kwargs
        ).stdout.strip()

    def wait(self, what: str, done: Callable[[], object], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                logs = [f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*/log"))]
                pytest.fail(f"waited {seconds} s for {what}\n" + "\n".join(logs))
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:  # the process has ended
        return None


def environment(pid: int) -> set[str]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_text().split("\0"))
    except OSError:
        return set()


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Slurm(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


class Job:
    """A job that was submitted from `folder`; on leaving it is cancelled."""

    def __init__(self, slurm: Slurm, folder: Path, sbatch_file: str, options: list[str], flags: list[object]) -> None:
        self.slurm, self.folder = slurm, folder
        folder.mkdir(parents=True, exist_ok=True)
        site = {
            "REPO": str(REPO),
            "VENV": sys.prefix,
            "ACCELERATE_CONFIG": str(REPO / "configs" / "accelerate" / "cpu_2_processes.yaml"),
            "MASTER_ADDR": "127.0.0.1",  # the nodes here have no names that a resolver knows
        }
        self.env = {**slurm.env, **site}
        command = ["sbatch", "--parsable", "--gres=none", "--cpus-per-task=1", *options]
        result = subprocess.run(
            [*command, str(REPO / "scripts" / "slurm" / sbatch_file), *map(str, flags)],
            cwd=folder, env=self.env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        self.id = result.stdout.strip()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.slurm.call("scancel", self.id)
        self.slurm.wait("the job to be gone", lambda: not self.slurm.call("squeue", "-h", f"-j{self.id}"))

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.slurm.call("scontrol", "show", "job", self.id))
        return found[1] if found else ""

    def log(self, rank: int | None = None) -> str:
        """What the job wrote, or one of its processes."""
        found = sorted(self.folder.glob(f"*-{self.id}.log" if rank is None else f"logs/*-{self.id}-{rank}.log"))
        return found[0].read_text() if found else ""

    def wait(self, what: str, done: Callable[[], object], seconds: float = 300) -> None:
        """Waits until `done()`; a job that ends before fails the test."""
        end = time.monotonic() + seconds
        while not done():
            state = self.field("JobState")
            ended = state not in ("PENDING", "RUNNING", "COMPLETING") and not done()
            if ended or time.monotonic() > end:
                pytest.fail(
                    f"job {self.id} is {state}; waited for {what}\n{self.log()}\n"
                    + "\n".join(f"rank {rank}: {self.log(rank)[-3000:]}" for rank in (0, 1))
                )
            time.sleep(0.1)

    def wait_for_end(self, state: str = "COMPLETED", seconds: float = 300) -> None:
        self.wait(f"it to be {state}", lambda: self.field("JobState") == state, seconds)


Finetune = Callable[..., Job]


@pytest.fixture(scope="module")
def finetune(slurm: Slurm, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Finetune:
    """Submits a training run of two processes into FOLDER/out; on two nodes, or as told."""
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 32)
    run = rows.with_name("run.yaml")
    run.write_text(
        f"model_name_or_path: {tiny_model}\ntrain_data: [{rows}]\noutput_dir: out\nmax_steps: 120\nsave_steps: 20\n"
        "per_device_train_batch_size: 2\ntrain_group_size: 2\nnegatives_cross_device: true\n"
    )

    def submit(folder: Path, sbatch_file: str = "finetune_multi_node.sbatch", tasks_per_node: int = 1) -> Job:
        return Job(slurm, folder, sbatch_file, [f"--ntasks-per-node={tasks_per_node}"], ["--config", run])

    return submit


@pytest.fixture(scope="module")
def undisturbed(finetune: Finetune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with finetune(folder) as job:
        job.wait_for_end()
        assert "(2 process(es) x 2" in job.log(0)
        assert job.field("Restarts") == "0"
    return folder / "out"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_training_on_two_nodes_and_evaluation(slurm: Slurm, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "king"}\n{"text": "queen"}\n')
    (tmp_path / "queries.jsonl").write_text('{"query": "who is the king?", "positive": ["king"]}\n')
    flags = ["--encoder", undisturbed, "--corpus_data", "corpus.jsonl", "--query_data", "queries.jsonl", "--k", 2]
    with Job(slurm, tmp_path, "evaluate.sbatch", [], flags) as job:
        job.wait_for_end()
        assert "MRR" in job.log()
    assert (tmp_path / "metrics.json").exists()

    write_rows(tmp_path / "train.jsonl", 12)
    flags = ["--model_name_or_path", undisturbed, "--input_file", "train.jsonl", "--output_file", "mined.jsonl"]
    with Job(
        slurm, tmp_path, "mine.sbatch", [], [*flags, "--range_for_sampling", "0-10", "--negative_number", 3]
    ) as job:
        job.wait_for_end()
    assert len((tmp_path / "mined.jsonl").read_text().splitlines()) == 12


def test_a_job_that_is_warned_and_then_requeued_ends_with_the_same_weights(
    slurm: Slurm, finetune: Finetune, undisturbed: Path, tmp_path: Path
) -> None:
    with finetune(tmp_path) as job:
        job.wait("a checkpoint", (tmp_path / "out" / "checkpoint-20").exists)
        # What --signal=USR1 does before the time limit: the processes of the step get it, the batch script does not.
        slurm.call("scancel", "--signal=USR1", job.id)
        job.wait("the saved step", lambda: "back into the queue" in job.log())
        saved = re.search(r"stopped by .*: checkpoint-(\d+) is saved", job.log(0))
        assert saved is not None and (tmp_path / "out" / f"checkpoint-{saved[1]}").exists()
        job.wait("the second start", lambda: f"going on after step {saved[1]} " in job.log(0))
        assert job.field("Restarts") == "1"
        assert not (tmp_path / "out" / "requeue").exists()

        job.wait("a checkpoint of the second start", (tmp_path / "out" / "checkpoint-60").exists)
        slurm.call("scontrol", "requeue", job.id)
        job.wait("the third start", lambda: job.log(0).count("going on after step") == 2)
        job.wait_for_end()
        assert job.field("Restarts") == "2"
    assert weights(tmp_path / "out") == weights(undisturbed)
    assert not (tmp_path / "out" / "requeue").exists()


def test_a_dead_node_puts_the_job_back_into_the_queue(
    slurm: Slurm, finetune: Finetune, undisturbed: Path, tmp_path: Path
) -> None:
    with finetune(tmp_path) as job:
        job.wait("a checkpoint", (tmp_path / "out" / "checkpoint-20").exists)
        slurm.kill_node("n2")
        # SLURM would notice by itself after SlurmdTimeout, five minutes.
        slurm.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=dead")
        job.wait("the node's death in the log", lambda: "node failure" in job.log().lower(), seconds=60)
        job.wait("the queue", lambda: job.field("JobState") == "PENDING", seconds=60)
        slurm.start_node("n2")
        job.wait("the second start", lambda: "going on after step" in job.log(0))
        job.wait_for_end()
        assert job.field("Restarts") == "1"
    assert weights(tmp_path / "out") == weights(undisturbed)


def test_a_killed_process_ends_the_job_at_once(finetune: Finetune, tmp_path: Path) -> None:
    """On one node, where both processes share its memory."""
    with finetune(tmp_path, "finetune_single_node.sbatch", tasks_per_node=2) as job:
        job.wait("a checkpoint", (tmp_path / "out" / "checkpoint-20").exists)
        found = {pid: environment(pid) for pid in processes() if link(f"/proc/{pid}/cwd") == str(tmp_path)}
        second = next(pid for pid, variables in found.items() if "RANK=1" in variables)
        assert {"LOCAL_RANK=1", "LOCAL_WORLD_SIZE=2", "WORLD_SIZE=2"} <= found[second]
        os.kill(second, signal.SIGKILL)
        job.wait_for_end("FAILED", seconds=60)
        assert "task 1: Killed" in job.log()
        assert "finetune.py failed with status" in job.log()
        assert job.field("Restarts") == "0" and job.field("ExitCode") != "0:0"


def test_wrong_flags_end_the_job_in_one_line(slurm: Slurm, tmp_path: Path) -> None:
    flags = ["--output_dri", "out"]
    with Job(slurm, tmp_path, "finetune_single_node.sbatch", ["--ntasks-per-node=2"], flags) as job:
        job.wait_for_end("FAILED", seconds=60)
        assert job.log().startswith("finetune.py: error: unknown argument --output_dri; did you mean --output_dir?")
