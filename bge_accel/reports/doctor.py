"""What a training run needs of its environment and settings, what it will cost, and a report of all findings."""

import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bge_accel.evaluation.search import FAISS_PACKAGES, installed_faiss
from bge_accel.files.text import installed_version
from bge_accel.reports.row_checks import Finding, Severity
from bge_accel.training.step import available_memory

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
# Parameters up to which a peak learning rate is usual; the last is for all larger models.
USUAL_RATES = ((5e6, 3e-4), (5e7, 3e-5), (2e8, 2e-5), (math.inf, 1e-5))
FEW_NEGATIVES = 8
FEW_STEPS = 10
STEPS_TO_LEARN = 50  # a batch above 16 is not proposed where it would leave fewer


# ---- environment


def check_environment() -> tuple[dict[str, Any], list[Finding]]:
    """What is installed and which devices there are, and what is wrong with it."""
    import torch
    import torch.distributed

    found = [*_check_versions(), *_check_faiss()]
    gpus = [
        {"name": torch.cuda.get_device_name(i), "memory_gb": torch.cuda.get_device_properties(i).total_memory / 1e9}
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    has_gloo, has_nccl = torch.distributed.is_gloo_available(), torch.distributed.is_nccl_available()
    if len(gpus) > 1 and not has_nccl:
        seen = f"{len(gpus)} GPUs, but this torch has no NCCL: several processes cannot share a run on them"
        found.append(Finding("no_nccl", "error", seen, "install PyTorch's CUDA build"))
    if not has_gloo and not gpus:
        seen = "this torch has no gloo: several processes cannot share a run on CPUs"
        found.append(Finding("no_gloo", "warning", seen, "install PyTorch's own build to use several processes"))
    if not gpus and (names := _nvidia_gpus()):
        if torch.version.cuda is None:
            seen, advice = "but torch is a build without CUDA", "install PyTorch's CUDA build"
        else:
            seen, advice = (
                "but torch cannot use it",
                "compare `nvidia-smi` with torch.version.cuda; CUDA_VISIBLE_DEVICES",
            )
        if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            found.append(Finding("gpu_unused", "warning", f"this machine has {names[0]}, {seen}", advice))
    facts = {
        "python": platform.python_version(),
        **{name: installed_version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "faiss": next((f"{name} {version}" for name, version in installed_faiss().items()), None),
        "gpus": gpus,
        "gloo": has_gloo,
        "nccl": has_nccl,
    }
    return facts, found


def _check_versions() -> list[Finding]:
    """Python and every package that the library needs, against the ranges it is installed with."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        own = importlib.metadata.metadata("bge_accel")
        needed = importlib.metadata.requires("bge_accel") or []
    except importlib.metadata.PackageNotFoundError:
        advice = "run `pip install -e .` in the project's folder"
        return [Finding("package_version", "warning", "bge_accel is not installed: its versions are not known", advice)]
    found = []
    wanted, python = own["Requires-Python"] or "", platform.python_version()
    if not SpecifierSet(wanted).contains(python, prereleases=True):
        found.append(
            Finding("python_version", "error", f"Python {python}, needed is {wanted}", "use a supported Python")
        )
    for line in needed:
        requirement = Requirement(line)
        if "extra" in str(requirement.marker or "") or requirement.name in FAISS_PACKAGES:
            continue
        version, wanted = installed_version(requirement.name), str(requirement.specifier)
        command = f'pip install "{requirement.name}{wanted}"'
        if version is None:
            found.append(Finding("package_version", "error", f"{requirement.name} is not installed", command))
        elif not requirement.specifier.contains(version, prereleases=True):
            seen = f"{requirement.name} is {version}, supported is {wanted}"
            found.append(Finding("package_version", "error", seen, command))
    return found


def _check_faiss() -> list[Finding]:
    installed = installed_faiss()
    if len(installed) > 1:
        seen = f"{' and '.join(installed)} are both installed: they bring the same files, so either may be broken"
        advice = f"pip uninstall -y {' '.join(installed)}, then install the one that is wanted"
        return [Finding("faiss_twice", "error", seen, advice)]
    if not installed:
        seen = "FAISS is not installed: mining and evaluation search with it on a CPU; training does not need it"
        return [Finding("faiss_missing", "note", seen, "pip install faiss-cpu")]
    return []


def _nvidia_gpus() -> list[str]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.splitlines() if listed.returncode == 0 else []


def free_memory_gb(device: Any) -> float:
    """What a new process could take: of the GPU, else of this machine or, where that is less, of its container."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] / 1e9
    free = available_memory()
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            free = min(free, max(0, int(limit.read()) - int(current.read())))
    except (OSError, ValueError):  # no container, or no limit
        pass
    return free / 1e9


# ---- settings


def check_settings(
    *,
    num_parameters: int,
    learning_rate: float,
    temperature: float,
    normalize: bool,
    num_steps: int,
    warmup_steps: int,
    num_rows: int | None,
    global_queries: int,
    negatives: int,
    pooling: str,
    own_pooling: str | None,
) -> list[Finding]:
    """Settings that work but seldom lead anywhere.

    Args:
        global_queries: of one batch on all processes.
        negatives: other passages that a query is compared with.
        own_pooling: what the model says of itself.
    """
    found = []

    def add(check: str, severity: Severity, seen: str, advice: str) -> None:
        found.append(Finding(check, severity, seen, advice))

    usual = next(rate for limit, rate in USUAL_RATES if num_parameters <= limit)
    ratio = learning_rate / usual
    if ratio > 5 or ratio < 1 / 20:
        add(
            "learning_rate", "error" if ratio > 30 else "warning",
            f"--learning_rate {learning_rate:g} is {_times(ratio)} what is usual for {num_parameters / 1e6:,.1f} "
            "million parameters", f"begin with {usual:g}",
        )  # fmt: skip
    if normalize and not 0.005 <= temperature <= 0.2:
        add(
            "temperature", "error" if temperature > 0.5 else "warning",
            f"--temperature {temperature:g}: similarities lie in [-1, 1], so the loss sees "
            + ("hardly any difference" if temperature > 0.2 else "nothing but the one hardest negative"),
            "take 0.01 to 0.1",
        )  # fmt: skip
    if negatives < FEW_NEGATIVES:
        add(
            "few_negatives", "warning", f"each query is compared with {negatives} other passages only",
            "raise --per_device_train_batch_size (beyond what fits, activations are recomputed) "
            "or --train_group_size; in-batch negatives cost nothing",
        )  # fmt: skip
    if num_steps < FEW_STEPS:
        add(
            "few_steps", "warning" if num_steps else "error", f"the run has {num_steps} steps only",
            "lower --per_device_train_batch_size, or raise --num_train_epochs",
        )  # fmt: skip
    if warmup_steps and warmup_steps >= num_steps:
        add(
            "warmup", "error", f"{warmup_steps} of {num_steps} steps are warmup: the learning rate is never reached",
            "lower --warmup_steps or --warmup_ratio; a tenth of the steps is usual",
        )  # fmt: skip
    elif warmup_steps > 0.4 * num_steps:
        add(
            "warmup", "warning", f"{warmup_steps} of {num_steps} steps are warmup",
            "lower --warmup_steps or --warmup_ratio; a tenth of the steps is usual",
        )  # fmt: skip
    if num_rows is not None and global_queries > num_rows:
        add(
            "batch_larger_than_data", "warning",
            f"a batch of {global_queries:,} queries holds the {num_rows:,} rows more than once",
            "lower --per_device_train_batch_size: a row's repetitions are no negatives of each other",
        )  # fmt: skip
    if own_pooling is not None and pooling != own_pooling:
        add(
            "pooling_changed", "warning", f"the run pools by {pooling}, the model was trained with {own_pooling}",
            "leave --sentence_pooling_method out, unless there is data enough to train it anew",
        )  # fmt: skip
    return found


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 1 else f"1/{1 / ratio:,.0f} of"


# ---- forecast


@dataclass(frozen=True)
class Measured:
    """Some real steps of one batch size, in a process of their own."""

    batch_size: int
    padded_tokens: float
    """Of the largest step."""
    peak_gb: float
    tokens_per_second: float
    """Real tokens, without the first step."""
    padding: float
    """Padding's share of all tokens."""


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory of one process: what is always there, and activations that grow with the tokens kept for backward.

    Weights, gradients, the optimiser's state and the process itself are `fixed_gb`. Activations stay below the budget
    over which `training.step.ActivationBudget` has them computed again.
    """

    fixed_gb: float
    gb_per_token: float
    """Of a padded token."""
    budget_gb: float
    seen: tuple[tuple[float, float], ...] = ()
    """(padded tokens, peak) that were measured; where the budget was met already, the line alone is too flat."""

    def peak_gb(self, padded_tokens: float) -> float:
        """Predicted for a step of so many padded tokens."""
        line = self.fixed_gb + min(self.gb_per_token * padded_tokens, self.budget_gb)
        return max([line, *(peak for tokens, peak in self.seen if tokens <= padded_tokens)])

    def is_kept(self, padded_tokens: float) -> bool:
        """Whether all activations stay, so that nothing is computed twice."""
        return self.gb_per_token * padded_tokens <= self.budget_gb


def fit_memory(measured: Sequence[Measured], budget_gb: float) -> MemoryModel:
    """The straight line through the measured peaks (least squares); one alone is taken as all there is."""
    seen = tuple((m.padded_tokens, m.peak_gb) for m in measured)
    peaks = np.array([m.peak_gb for m in measured])
    tokens = np.array([m.padded_tokens for m in measured])
    if len(measured) < 2 or np.ptp(tokens) == 0:
        return MemoryModel(float(peaks.max()), 0.0, budget_gb, seen)
    slope, fixed = np.polyfit(tokens, peaks, 1)
    if slope <= 0:  # nothing is kept: the peak does not depend on the batch
        return MemoryModel(float(peaks.max()), 0.0, budget_gb, seen)
    return MemoryModel(float(max(fixed, 0.0)), float(slope), budget_gb, seen)


def largest_step_tokens(row_tokens: Sequence[float] | np.ndarray, batch_size: int, num_steps: int) -> float:
    """Tokens of the largest of `num_steps` batches drawn from rows of so many tokens (expected maximum of a normal)."""
    tokens = np.asarray(row_tokens, dtype=np.float64)
    spread = tokens.std() * math.sqrt(batch_size)
    mean = tokens.mean() * batch_size
    most = mean + spread * math.sqrt(2 * math.log(max(num_steps, 2)))
    # A batch without repetition cannot hold more than the longest rows.
    longest = np.sort(tokens)[::-1][:batch_size].sum() * max(1.0, batch_size / len(tokens))
    return float(min(most, max(longest, mean)))


def propose_batch(
    memory: MemoryModel,
    row_tokens: Sequence[float] | np.ndarray,
    *,
    padding: float,
    free_gb: float,
    num_examples: float | None,
    num_rows: int | None,
    world: int,
) -> tuple[int, str]:
    """The largest power of two of queries per process that is sensible, and what speaks against a larger one.

    Args:
        num_examples: queries seen in the whole run; None where the number of steps is given instead.
        num_rows: of the data; None where nobody knows.
    """
    size, why = 1, "of data"
    while size < 65536:
        batch = 2 * size
        tokens = largest_step_tokens(row_tokens, batch, 100) / (1 - padding)
        if not memory.is_kept(tokens) or memory.peak_gb(tokens) > 0.9 * free_gb:
            return size, "a larger one would have activations computed twice, for up to a third more time"
        if batch > 16 and num_examples is not None and num_examples / (batch * world) < STEPS_TO_LEARN:
            return size, f"a larger one would leave fewer than {STEPS_TO_LEARN} steps"
        if num_rows is not None and batch * world > num_rows / 2:
            return size, "a larger one would hold more than half of the rows at once"
        size = batch
    return size, why


# ---- report


def sort_findings(findings: Sequence[Finding]) -> list[Finding]:
    """The gravest first, each check's findings together."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def as_text(findings: Sequence[Finding], facts: Sequence[tuple[str, str]], forecast: Sequence[tuple[str, str]]) -> str:
    """The report that people read: environment, what is wrong by severity, and what the run will cost."""
    lines = [_pairs(facts)]
    for severity in SEVERITIES:
        of_kind = [finding for finding in findings if finding.severity == severity]
        if of_kind:
            lines.append(f"\n{severity.upper()}S ({len(of_kind)})")
        for finding in of_kind:
            where = f"; first: {finding.where}" if finding.where else ""
            lines += [f"  {finding.check}: {finding.seen}{where}", f"      -> {finding.advice}"]
    if forecast:
        lines += ["\nFORECAST", _pairs(forecast)]
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
    lines.append(
        "\n" + ", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items())
    )
    return "\n".join(lines)


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in pairs)


def as_json(
    findings: Sequence[Finding], facts: Mapping[str, Any], forecast: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The same for programs: `{"ok", "findings", "environment", "forecast"}`."""
    return {
        "ok": not any(finding.severity == "error" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        "environment": {**facts, "executable": sys.executable},
        "forecast": forecast,
    }
