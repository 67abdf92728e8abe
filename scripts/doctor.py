"""Say what is wrong with a training run before it starts, and what it will cost: the flags of scripts/finetune.py.

    python scripts/doctor.py --model_name_or_path BAAI/bge-small-en-v1.5 --train_data train.jsonl --output_dir tuned
    python scripts/doctor.py --config run.yaml --num_processes 8 --json report.json

It checks the environment, the settings and a sample of the rows, and runs a few steps of finetune.py in a folder of
their own, from which it foretells memory and time and proposes a batch size. Nothing of the run itself is written.

Exit status: 0 where nothing is worse than a warning, 1 where there are errors, 2 for a mistake in the flags.
"""

import json
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import finetune  # beside this file

from bge_accel.config import option, options_from, parse_config, user_errors
from bge_accel.data.sources import Source, find_sources, merge_small
from bge_accel.files.outputs import check_output
from bge_accel.processes.progress import say
from bge_accel.processes.signals import interruptible
from bge_accel.reports.row_checks import (
    Finding,
    Sample,
    check_held_out,
    check_rows,
    read_sample,
)
from bge_accel.training.plan import DataOptions, PlannedSource, RunPlan, check_sources, plan_run
from bge_accel.training.refused_flags import REFUSED

# Heavy packages are imported inside main().


@dataclass(kw_only=True)
class Config(finetune.Config):
    """A run of scripts/finetune.py, and how closely it is looked at."""

    json: str | None = option(None, "write the report to this file as JSON too; - prints that alone", group="doctor")
    sample_rows: int = option(10_000, "rows that are looked at, drawn from all files", at_least=1)
    measure_steps: int = option(
        3, "real steps at each of two batch sizes, to foretell memory and time; 0 for none, else at least 2", at_least=0,
    )  # fmt: skip
    num_processes: int | None = option(
        None,
        "that the run will have; default: as `accelerate launch` started this, else 1",
        at_least=1,
        at_most=1_000_000,
    )


@dataclass(kw_only=True)
class Feed(PlannedSource):
    """One source with its settings and a sample of its rows."""

    sample: Sample


def main(cfg: Config) -> int:
    if os.environ.get("RANK", "0") != "0":
        return 0
    with user_errors():
        if cfg.measure_steps == 1:
            raise ValueError("--measure_steps is 1: the first step is unlike the others, so take 0 or at least 2")
        if cfg.json not in (None, "-"):
            check_output("--json", str(cfg.json), cfg.train_data)
    run = run_of(cfg)
    world = cfg.num_processes or int(os.environ.get("WORLD_SIZE", "1"))

    import torch

    from bge_accel.models.precision import choose_precision
    from bge_accel.reports.doctor import (
        as_json,
        check_environment,
        check_settings,
        free_memory_gb,
        sort_findings,
    )
    from bge_accel.reports.forecast import cost_of
    from bge_accel.reports.probe import measure
    from bge_accel.reports.text_checks import check_texts
    from bge_accel.training.step import automatic_activation_bytes

    device = torch.device("cpu" if cfg.use_cpu or not torch.cuda.is_available() else "cuda")
    environment, findings = check_environment()
    findings += refusals("settings_refused", lambda: finetune.check(run))
    asked = cfg.mixed_precision or ("fp16" if cfg.fp16 else "bf16" if cfg.bf16 or cfg.pure_bf16 else None)
    if not (cfg.fp16 and cfg.bf16) and (warning := choose_precision(asked, device)[1]):
        findings.append(Finding("precision", "note", warning, "leave the flag out, or use --mixed_precision auto"))

    # ---- rows
    feeds: list[Feed] = []
    findings += refusals("data_refused", lambda: feeds.extend(read_feeds(cfg)))
    findings += look_at_rows(cfg, feeds)

    # ---- what the model says of the texts
    forecast: dict[str, Any] = {}
    row_tokens: list[float] = []
    facts_of_model: dict[str, Any] = {}
    feeds_with_rows = [feed for feed in feeds if feed.sample.rows]

    def look_through_model() -> None:
        model, options = read_model(cfg), options_from(DataOptions, cfg)
        name = cfg.tokenizer_name or cfg.model_name_or_path
        facts_of_model.update(model)
        for feed in feeds_with_rows:
            found, tokens = check_texts(feed.sample, feed, options, name, model)
            findings.extend(named(found, feed, feeds))
            row_tokens.extend(tokens)

    findings += refusals("model_refused", look_through_model)

    # ---- settings
    plans: list[RunPlan] = []
    if feeds_with_rows and (cfg.max_steps > 0 or not cfg.streaming):
        findings += refusals(
            "settings_refused", lambda: plans.append(plan_run(feeds_with_rows, options_from(DataOptions, cfg), world))
        )
    for plan in plans:
        forecast |= {
            "rows": plan.num_rows,
            "steps": plan.num_steps,
            "queries_per_step": plan.queries_per_step,
            "epochs": plan.num_epochs,
            "negatives_per_query": min(plan.negatives),
        }
    for plan in plans if facts_of_model else ():
        findings += check_settings(
            num_parameters=facts_of_model["num_parameters"],
            learning_rate=cfg.learning_rate,
            temperature=cfg.temperature,
            normalize=facts_of_model["settings"].normalize,
            num_steps=plan.num_steps,
            warmup_steps=cfg.warmup_steps or math.ceil(cfg.warmup_ratio * plan.num_steps),
            num_rows=plan.num_rows,
            global_queries=max(feed.batch_size for feed in feeds_with_rows) * world,
            negatives=min(plan.negatives),
            pooling=facts_of_model["settings"].pooling,
            own_pooling=facts_of_model["own"].pooling,
        )

    # ---- a few real steps; broken rows are left out of them
    sound = [
        row
        for feed in feeds_with_rows
        for row in feed.sample.rows
        if not set(row["pos"]).intersection(row.get("neg") or [])
    ]
    if cfg.measure_steps and row_tokens and sound and plans:
        # As many as `accelerate launch` has started here; else all that the run will have.
        local_processes = cfg.num_processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free_gb = free_memory_gb(device) / (local_processes if device.type == "cpu" else 1)  # shared by all
        print("measuring a few steps of finetune.py ...", file=sys.stderr, flush=True)
        largest = max(feed.group_size for feed in feeds_with_rows), feeds_with_rows[0].in_batch_negatives
        settings = asdict(run) | {"train_group_size": largest[0], "use_inbatch_neg": largest[1]}
        measured = measure(finetune.__file__, settings, cfg.measure_steps, sound, row_tokens, device.type)
        if isinstance(measured, Finding):
            findings.append(measured)
        else:
            budget = cfg.activation_memory_budget
            if budget is None:
                budget = automatic_activation_bytes(device, facts_of_model["num_parameters"], local_processes) / 1e9
            found, cost = cost_of(plans[0], measured, budget, free_gb, row_tokens, world, cfg.deepspeed is not None)
            findings += found
            forecast |= cost

    report = as_json(
        sort_findings(findings), {**environment, "device": device.type, "processes": world}, forecast or None
    )
    show(cfg, report, sort_findings(findings), environment, forecast, sum(feed.sample.num_read for feed in feeds))
    return 0 if report["ok"] else 1


def show(
    cfg: Config,
    report: dict[str, Any],
    findings: list[Finding],
    environment: dict[str, Any],
    forecast: dict[str, Any],
    num_read: int,
) -> None:
    """Prints the report, and writes it where that is asked for."""
    from bge_accel.reports.doctor import as_text
    from bge_accel.reports.forecast import forecast_lines

    if cfg.json == "-":
        say(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        total, machine = forecast.get("rows"), report["environment"]
        gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gb']:.0f} GB)" for gpu in environment["gpus"]) or "none"
        versions = " ".join(f"{name} {environment[name]}" for name in "torch transformers accelerate".split())
        backends = ", ".join(f"{name} {'yes' if environment[name.lower()] else 'no'}" for name in ("NCCL", "gloo"))
        facts = [
            ("model", cfg.model_name_or_path),
            ("data", f"{num_read:,} rows looked at" + (f" of {total:,}" if total else "")),
            ("run", f"{machine['processes']} process(es) on {machine['device']}"),
            ("software", f"Python {environment['python']} {versions}, {environment['faiss'] or 'no FAISS'}"),
            ("GPUs", f"{gpus}; {backends}"),
        ]
        say(as_text(findings, facts, forecast_lines(forecast)))
    if cfg.json not in (None, "-"):
        with user_errors():
            try:
                with open(cfg.json, "w", encoding="utf-8") as file:
                    json.dump(report, file, indent=2, ensure_ascii=False)
            except OSError as error:
                raise ValueError(f"--json {cfg.json}: {error.strerror or error}; name another file") from None


def look_at_rows(cfg: Config, feeds: list[Feed]) -> list[Finding]:
    """What is wrong with rows, alone and beside those that are held out."""
    from bge_accel.evaluation.in_training import read_eval_sets

    findings = []
    for feed in feeds:
        of_source = check_rows(
            feed.sample,
            group_size=feed.group_size,
            in_batch_negatives=feed.in_batch_negatives,
            need_scores=cfg.knowledge_distillation,
        )
        findings += named(of_source, feed, feeds)
    held_out: dict[str, Any] = {}
    findings += refusals("eval_data_refused", lambda: held_out.update(read_eval_sets(cfg.eval_data or [])))
    for name, data in held_out.items():
        for feed in feeds:
            findings += named(check_held_out(feed.sample, data.queries.texts, name), feed, feeds)
    return findings


def run_of(cfg: Config) -> finetune.Config:
    """The run's own settings."""
    return finetune.Config(**{field.name: getattr(cfg, field.name) for field in fields(finetune.Config)})


def refusals(check: str, action: Any) -> list[Finding]:
    """Does something that finetune.py does too, and makes a finding of what it would refuse."""
    try:
        action()
    except ValueError as error:
        lines = str(error).splitlines()
        return [Finding(check, "error", "finetune.py refuses it: " + "\n      ".join(lines), "as it says")]
    return []


def named(findings: list[Finding], feed: Feed, feeds: list[Feed]) -> list[Finding]:
    """The findings with the name of their source, where there are several."""
    if len(feeds) < 2:
        return findings
    return [replace(finding, seen=f"source {feed.source.name!r}: {finding.seen}") for finding in findings]


def read_feeds(cfg: Config) -> list[Feed]:
    """The sources with a sample of their rows."""
    options = options_from(DataOptions, cfg)
    sources = find_sources(cfg.train_data, one_per_file=cfg.same_dataset_within_batch)
    limit = max(1, cfg.sample_rows // len(sources))
    samples = [sample_of(cfg, source, limit) for source in sources]
    if cfg.small_threshold:
        sizes = [sample.num_rows or 0 for sample in samples]
        sources, _ = merge_small(sources, sizes, cfg.small_threshold, cfg.drop_threshold)
        samples = [sample_of(cfg, source, limit) for source in sources]
    feeds = [
        Feed.of(source, options, sample=sample, num_rows=None if cfg.streaming else sample.num_rows)
        for source, sample in zip(sources, samples, strict=True)
    ]  # fmt: skip
    check_sources(feeds, options)
    return feeds


def sample_of(cfg: Config, source: Source, limit: int) -> Sample:
    """Rows of the files, or of the beginning of a stream that is not on this machine."""
    if not cfg.streaming or all(os.path.exists(path) for path in source.path):
        return read_sample(source.path, limit, seed=cfg.seed, max_rows_per_file=cfg.max_example_num_per_dataset)
    from bge_accel.data.streaming import RowStream

    stream, sample = RowStream(source.path, seed=cfg.seed, buffer_size=min(limit, cfg.shuffle_buffer_size)), Sample()
    while stream.epochs_done == 0 and sample.num_read < limit:
        [(block, index, _, _)] = stream.take(1)
        sample.add(block.place(index), block[index])
    sample.num_rows = None
    return sample


def read_model(cfg: Config) -> dict[str, Any]:
    """What the run's model says of itself, its tokenizer and its size."""
    from bge_accel.models.loading import max_positions
    from bge_accel.models.settings import read_settings
    from bge_accel.training.model import ModelOptions, load_model

    hub = {key: value for key, value in (("cache_dir", cfg.cache_dir), ("token", cfg.token)) if value is not None}
    own = read_settings(cfg.model_name_or_path, **hub)
    encoder, tokenizer, settings = load_model(options_from(ModelOptions, cfg), feeds=[])
    tokenizer.model_max_length = 10**9  # texts are tokenised whole
    return {
        "own": own,
        "settings": settings,
        "tokenizer": tokenizer,
        "num_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "longest": max_positions(encoder.config),
    }


if __name__ == "__main__":
    summary, *_, status = __doc__.strip().split("\n\n")
    cfg = parse_config(Config, description=f"{summary} {status}", refused=REFUSED)
    with interruptible("nothing is kept", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        found = main(cfg)
    sys.exit(found)
