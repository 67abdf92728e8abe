"""Runs that are stopped and gone on with."""

from collections.abc import Callable
from pathlib import Path

import accelerate.commands.launch
import pytest
import yaml
from helpers.repo import REPO
from helpers.runs import write_rows
from helpers.warm_start import Job

SPY_ROWS, ON_CPU = REPO / "tests" / "helpers" / "spy_rows.py", REPO / "tests" / "helpers" / "on_cpu.py"


NUM_ROWS, GLOBAL_BATCH, STEPS = 128, 8, 32  # two epochs


LATEST = ("--resume_from_checkpoint", "latest")


Start = Callable[..., Job]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.jsonl, and sources.yaml of three files that differ in size and settings."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "rows.jsonl", NUM_ROWS)
    sizes = {"small": 20, "middle": 50, "large": 90}
    for seed, (name, size) in enumerate(sizes.items(), start=1):
        write_rows(folder / f"{name}.jsonl", size, seed=seed)
    sources = [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in sizes]
    (folder / "streams.yaml").write_text(yaml.safe_dump(sources))
    sources[0] |= {"per_device_train_batch_size": 4, "query_instruction_for_retrieval": "Find: "}
    sources[1] |= {"train_group_size": 3, "use_inbatch_neg": False}
    (folder / "sources.yaml").write_text(yaml.safe_dump(sources))
    return folder


def flags(model: str, data: Path, out: Path | str, *more: object, processes: int = 1) -> list[str]:
    """Two epochs of short texts; of each batch's two or three micro-batches one is kept, the others computed again."""
    given = {
        "--model_name_or_path": model,
        "--train_data": data / "rows.jsonl",
        "--output_dir": out,
        "--num_train_epochs": 2,
        "--per_device_train_batch_size": GLOBAL_BATCH // processes,
        "--train_group_size": 2,
        "--query_max_len": 16,
        "--passage_max_len": 32,
        "--max_tokens_per_micro_batch": 260,
        "--activation_memory_budget": 0.0015,
        "--learning_rate": 1e-3,
        "--save_steps": 2,
        "--logging_steps": 1,
    }
    overridden = {str(part) for part in more}
    kept = [part for item in given.items() if item[0] not in overridden for part in item]
    return [*map(str, kept), "--disable_tqdm", *map(str, more)]


@pytest.fixture
def start(tmp_path: Path, tiny_model: str, data: Path) -> Start:
    """Starts a run into an output folder, given by its name, with more flags."""

    def start(out: str, *more: object, processes: int = 1, model: str = tiny_model, **how: object) -> Job:
        args = flags(model, data, out, *more, processes=processes)
        return Job(*args, cwd=tmp_path, processes=processes, **how)

    return start


def launched_by(config: str, folder: Path) -> dict[str, str]:
    """What `accelerate launch` tells its processes of one of the repository's configurations."""
    path = REPO / "configs" / "accelerate" / f"{config}.yaml"
    job = Job(
        *("--config_file", path, "--num_processes", 1, "--mixed_precision", "no", "--no_python", "env"),
        cwd=folder,
        script=Path(accelerate.commands.launch.__file__),
    )
    told = (line.partition("=") for line in job.ends().splitlines())
    return {name: value for name, _, value in told if name.startswith(("ACCELERATE_", "FSDP_"))}
