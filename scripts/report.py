"""A page about a training run: curves, configuration, and, where there are any, evaluations with their samples.

    python scripts/report.py --run tuned --metrics base.json tuned.json --output_file report.html

The page holds all it needs and opens without a network. Metrics are what scripts/evaluate_retrieval.py writes, also of
several systems; without --run the page is about them alone (evaluate_retrieval.py --report makes the same in one go).

Every flag may also stand in a YAML file: --config run.yaml (the command line wins).
"""

import importlib.util
import os
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bge_accel.config import option, parse_config, user_errors
from bge_accel.data.reading import check_training_row, read_rows
from bge_accel.data.sources import YAML
from bge_accel.files.faults import Faults
from bge_accel.files.finding import find_files
from bge_accel.files.parsing import load_json, load_yaml
from bge_accel.files.text import shorten
from bge_accel.processes.signals import interruptible


@dataclass(kw_only=True)
class Config:
    """What to report on, and where to."""

    run: str | None = option(None, "output folder of scripts/finetune.py: its train_log.jsonl and run_config.yaml")
    metrics: list[str] | None = option(None, "JSON files that scripts/evaluate_retrieval.py has written")
    output_file: str = option("report.html", "the page")
    figures_dir: str | None = option(None, "PNG of each figure (needs matplotlib)")


def read_log(folder: str) -> list[dict[str, Any]]:
    """The rows of a run's `train_log.jsonl`; ValueError where there are none, or one has no step."""
    path = os.path.join(folder, "train_log.jsonl")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not there: --run takes the --output_dir of a scripts/finetune.py")
    faults, rows = Faults(), []
    for where, _, row in read_rows(path, faults):
        if not isinstance(row.get("step"), int):
            faults.add(where, '"step" is missing: this is no training log')
        rows.append(row)
    faults.raise_if_any()
    return rows


def read_settings(folder: str) -> dict[str, Any]:
    """A run's `run_config.yaml`."""
    path = os.path.join(folder, "run_config.yaml")
    settings = load_yaml(path) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is {shorten(settings)}: it has to be `key: value` lines")
    return settings


def read_samples(settings: dict[str, Any], limit: int = 6) -> list[dict[str, Any]]:
    """The first rows of the training data, evenly from its files, as far as those are still there."""
    named = settings.get("train_data")
    paths = [path for path in named if isinstance(path, str)] if isinstance(named, list) else []
    files = find_files([path for path in paths if not path.endswith(YAML) and os.path.exists(path)], Faults())
    share = -(-limit // len(files)) if files else 0
    rows = (row for file in files[:limit] for _, _, row in islice(read_rows(file, Faults()), share))
    return [row for row in islice(rows, limit) if not check_training_row(row)]


def read_result(path: str) -> dict[str, Any]:
    """What an evaluation wrote; ValueError where it is something else."""
    from bge_accel.reports.html_report import results_page

    result = load_json(path)
    try:
        results_page({path: result})
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {shorten(str(error))}"
        raise ValueError(f"{path} is not what scripts/evaluate_retrieval.py writes ({what}): evaluate again") from None
    return result


def main(cfg: Config) -> None:
    with user_errors():
        from bge_accel.files.atomic import atomic_file
        from bge_accel.files.lock import lock_output
        from bge_accel.files.outputs import check_folder, check_output
        from bge_accel.processes.progress import say

        if cfg.run is None and not cfg.metrics:
            raise ValueError("there is nothing to report: give --run, --metrics or both")
        of_run = [os.path.join(cfg.run, name) for name in ("train_log.jsonl", "run_config.yaml")] if cfg.run else []
        inputs = [*(cfg.metrics or []), *of_run]
        check_output("--output_file", cfg.output_file, [path for path in inputs if os.path.exists(path)])
        if cfg.figures_dir is not None:
            check_folder("--figures_dir", cfg.figures_dir)
        if cfg.figures_dir is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--figures_dir needs matplotlib: pip install matplotlib, or drop the flag")
        lock_output(cfg.output_file, is_folder=False)
        results = {path: read_result(path) for path in cfg.metrics or []}

        from bge_accel.reports.html_report import results_page, training_page

        if cfg.run is not None:
            name = os.path.basename(os.path.abspath(cfg.run))
            log, settings = read_log(cfg.run), read_settings(cfg.run)
            page = training_page(name, log, settings, read_samples(settings), results)
        else:
            page = results_page(results)
    with atomic_file(cfg.output_file) as file:
        file.write(page.html())
    written = page.save_figures(cfg.figures_dir) if cfg.figures_dir is not None else []
    say("wrote " + ", ".join([cfg.output_file, *written]))


if __name__ == "__main__":
    with interruptible("nothing was written"):
        main(parse_config(Config, description=__doc__.split("\n")[0]))
