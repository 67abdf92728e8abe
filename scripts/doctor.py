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
import random
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import finetune  # beside this file

from bge_accel.config import option, options_from, parse_config, to_yaml, user_errors
from bge_accel.data.sources import Source, find_sources, merge_small
from bge_accel.files.outputs import check_output
from bge_accel.processes.children import run_child
from bge_accel.processes.progress import say
from bge_accel.processes.signals import interruptible
from bge_accel.reports.row_checks import (
    Finding,
    Sample,
    check_held_out,
    check_instruction,
    check_lengths,
    check_rows,
    check_unknown_tokens,
    read_sample,
)
from bge_accel.training.plan import DataOptions, PlannedSource, RunPlan, check_sources, plan_run
from bge_accel.training.refused_flags import REFUSED

# Heavy packages are imported inside main().

PROBE_TOKENS = {"cpu": (2560, 7168), "cuda": (16384, 65536)}  # of a measured step, roughly; two sizes make a line
MEASURE_SECONDS = 60  # that the steps of the larger size may take, judged by those of the smaller
MAX_TEXTS = 20_000  # of a kind that are tokenised
UNUSUAL = 40  # characters a token that no text exceeds; what is cut off would be cut anyway
ONE_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
        as_text,
        check_environment,
        check_settings,
        free_memory_gb,
        sort_findings,
    )

    device = torch.device("cpu" if cfg.use_cpu or not torch.cuda.is_available() else "cuda")
    environment, findings = check_environment()
    findings += refusals("settings_refused", lambda: finetune.check(run))
    asked = cfg.mixed_precision or ("fp16" if cfg.fp16 else "bf16" if cfg.bf16 or cfg.pure_bf16 else None)
    if not (cfg.fp16 and cfg.bf16) and (warning := choose_precision(asked, device)[1]):
        findings.append(Finding("precision", "note", warning, "leave the flag out, or use --mixed_precision auto"))

    # ---- rows
    feeds: list[Feed] = []
    findings += refusals("data_refused", lambda: feeds.extend(read_feeds(cfg)))
    for feed in feeds:
        of_source = check_rows(
            feed.sample,
            group_size=feed.group_size,
            in_batch_negatives=feed.in_batch_negatives,
            need_scores=cfg.knowledge_distillation,
        )
        findings += named(of_source, feed, feeds)

    def held_out() -> None:
        from bge_accel.evaluation.in_training import read_eval_sets

        for name, data in read_eval_sets(cfg.eval_data or []).items():
            for feed in feeds:
                findings.extend(named(check_held_out(feed.sample, data.queries.texts, name), feed, feeds))

    findings += refusals("eval_data_refused", held_out)

    # ---- what the model says of the texts
    forecast: dict[str, Any] = {}
    row_tokens: list[float] = []
    facts_of_model: dict[str, Any] = {}
    feeds_with_rows = [feed for feed in feeds if feed.sample.rows]

    def look_through_model() -> None:
        model = read_model(cfg)
        facts_of_model.update(model)
        for feed in feeds_with_rows:
            found, tokens = check_texts(cfg, feed, model)
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
        measured = measure(run, cfg.measure_steps, feeds_with_rows, sound, row_tokens, device.type)
        if isinstance(measured, Finding):
            findings.append(measured)
        else:
            budget = activation_budget_gb(cfg, device, facts_of_model["num_parameters"], local_processes)
            found, cost = cost_of(cfg, plans[0], measured, budget, free_gb, row_tokens, world)
            findings += found
            forecast |= cost

    # ---- report
    findings = sort_findings(findings)
    report = as_json(findings, {**environment, "device": device.type, "processes": world}, forecast or None)
    if cfg.json == "-":
        say(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        read = sum(feed.sample.num_read for feed in feeds)
        total = forecast.get("rows")
        gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gb']:.0f} GB)" for gpu in environment["gpus"]) or "none"
        versions = " ".join(f"{name} {environment[name]}" for name in "torch transformers accelerate".split())
        facts = [
            ("model", cfg.model_name_or_path),
            ("data", f"{read:,} rows looked at" + (f" of {total:,}" if total else "")),
            ("run", f"{world} process(es) on {device.type}"),
            ("software", f"Python {environment['python']} {versions}, {environment['faiss'] or 'no FAISS'}"),
            (
                "GPUs",
                gpus
                + f"; NCCL {'yes' if environment['nccl'] else 'no'}, gloo {'yes' if environment['gloo'] else 'no'}",
            ),
        ]
        say(as_text(findings, facts, forecast_lines(forecast)))
    if cfg.json not in (None, "-"):
        with user_errors():
            try:
                with open(cfg.json, "w", encoding="utf-8") as file:
                    json.dump(report, file, indent=2, ensure_ascii=False)
            except OSError as error:
                raise ValueError(f"--json {cfg.json}: {error.strerror or error}; name another file") from None
    return 0 if report["ok"] else 1


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
    from bge_accel.models.encoder import load_encoder
    from bge_accel.models.loading import max_positions
    from bge_accel.models.settings import instruction_prefix, read_settings

    hub = {key: value for key, value in (("cache_dir", cfg.cache_dir), ("token", cfg.token)) if value is not None}
    own = read_settings(cfg.model_name_or_path, **hub)
    encoder, tokenizer, settings = load_encoder(
        cfg.model_name_or_path,
        pooling=cfg.sentence_pooling_method,
        normalize=cfg.normalize_embeddings,
        query_prefix=instruction_prefix(cfg.query_instruction_for_retrieval, cfg.query_instruction_format),
        passage_prefix=instruction_prefix(cfg.passage_instruction_for_retrieval, cfg.passage_instruction_format),
        config_name=cfg.config_name,
        tokenizer_name=cfg.tokenizer_name,
        trust_remote_code=cfg.trust_remote_code,
        longest=max(cfg.query_max_len, cfg.passage_max_len),
        gradient_checkpointing=cfg.gradient_checkpointing,
        lengths={"--query_max_len": cfg.query_max_len, "--passage_max_len": cfg.passage_max_len},
        cut_by={"query": "--query_max_len", "passage": "--passage_max_len"},
        **hub,
    )
    tokenizer.model_max_length = 10**9  # texts are tokenised whole
    return {
        "own": own,
        "settings": settings,
        "tokenizer": tokenizer,
        "num_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "longest": max_positions(encoder.config),
    }


def check_texts(cfg: Config, feed: Feed, model: dict[str, Any]) -> tuple[list[Finding], list[float]]:
    """Findings about instructions and lengths, and the tokens that each row brings to a batch."""
    from bge_accel.models.settings import instruction_prefix

    settings, own, tokenizer = model["settings"], model["own"], model["tokenizer"]
    of_source = instruction_prefix(feed.source.query_instruction_for_retrieval, cfg.query_instruction_format)
    query_prefix = settings.query_prefix if of_source is None else of_source
    of_source = instruction_prefix(feed.source.passage_instruction_for_retrieval, cfg.passage_instruction_format)
    passage_prefix = settings.passage_prefix if of_source is None else of_source
    name, sample = cfg.tokenizer_name or cfg.model_name_or_path, feed.sample
    found = check_instruction(
        sample, "query", query_prefix, own.query_prefix, name, flag="--query_instruction_for_retrieval"
    )
    found += check_instruction(
        sample, "passage", passage_prefix, own.passage_prefix, name, flag="--passage_instruction_for_retrieval"
    )

    def lengths(texts: list[tuple[int, str]], max_len: int) -> tuple[list[tuple[int, int]], list[tuple[int, float]]]:
        """Row and tokens of each text, and row and share of tokens that the tokenizer does not know."""
        if len(texts) > MAX_TEXTS:
            texts = sorted(random.Random(cfg.seed).sample(texts, MAX_TEXTS))
        ids = tokenizer([text[: max_len * UNUSUAL] for _, text in texts])["input_ids"]
        unknown = tokenizer.unk_token_id
        return [(row, len(i)) for (row, _), i in zip(texts, ids, strict=True)], [
            (row, i.count(unknown) / max(len(i) - 2, 1)) for (row, _), i in zip(texts, ids, strict=True)
        ]

    queries = [
        (index, (query_prefix if own_prefix is None else own_prefix) + row["query"])
        for index, row in enumerate(sample.rows)
        for own_prefix in [instruction_prefix(row.get("prompt"), cfg.query_instruction_format)]
    ]
    of_queries, unknown = lengths(queries, cfg.query_max_len)
    of_passages, unknown_in_passages = lengths(
        [(index, passage_prefix + text) for index, text in sample.passages()], cfg.passage_max_len
    )
    found += check_lengths(sample, "query", of_queries, cfg.query_max_len, model["longest"])
    found += check_lengths(sample, "passage", of_passages, cfg.passage_max_len, model["longest"])
    found += check_unknown_tokens(sample, unknown + unknown_in_passages)

    passages_of: dict[int, list[int]] = {}
    for row, length in of_passages:
        passages_of.setdefault(row, []).append(min(length, cfg.passage_max_len))
    tokens = [
        min(length, cfg.query_max_len) + feed.group_size * sum(passages_of[row]) / len(passages_of[row])
        for row, length in of_queries
        if row in passages_of
    ]
    return found, tokens


def measure(
    run: finetune.Config,
    steps: int,
    feeds: list[Feed],
    rows: list[dict[str, Any]],
    row_tokens: list[float],
    device: str,
) -> "list[Any] | Finding":
    """Some steps of finetune.py itself at two batch sizes, each in a process of its own: a peak never falls."""
    from bge_accel.reports.doctor import Measured

    per_row = sum(row_tokens) / len(row_tokens)
    large = max(2, min(math.ceil(PROBE_TOKENS[device][1] / per_row), len(rows)))
    sizes = sorted({max(1, math.ceil(large * PROBE_TOKENS[device][0] / PROBE_TOKENS[device][1])), large})
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="bge_accel_doctor_") as folder:
        # From everywhere in the sample; some more than a batch, for rows without negatives draw other rows' passages.
        count = min(max(2 * large, 200), len(rows))
        path = os.path.join(folder, "rows.jsonl")
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(rows[i * len(rows) // count]) + "\n" for i in range(count))
        for size in sizes:
            if measured:
                affordable = int(MEASURE_SECONDS * measured[0].tokens_per_second / (steps * per_row))
                size = max(math.ceil(1.5 * sizes[0]), min(size, affordable))
            out = os.path.join(folder, f"out-{size}")
            probe = replace(
                run,
                train_data=[path],
                output_dir=out,
                cache_path=os.path.join(folder, "cache"),
                token=None,
                train_group_size=max(feed.group_size for feed in feeds),
                use_inbatch_neg=feeds[0].in_batch_negatives,
                per_device_train_batch_size=size,
                max_steps=steps,
                gradient_accumulation_steps=1,
                negatives_cross_device=False,
                deepspeed=None,
                streaming=False,
                stopping_strategy="repeat",
                same_dataset_within_batch=False,
                mix_sources=False,
                small_threshold=0,
                drop_threshold=0,
                sampling_temperature=1.0,
                eval_data=None,
                eval_on_start=False,
                load_best_model_at_end=False,
                early_stopping_patience=None,
                save_strategy="no",
                resume_from_checkpoint=None,
                overwrite_output_dir=False,
                logging_steps=1,
                report_to=["none"],
                disable_tqdm=True,
            )
            settings = os.path.join(folder, f"{size}.yaml")
            with open(settings, "w", encoding="utf-8") as file:
                file.write(to_yaml(probe))
            environment = {key: value for key, value in os.environ.items() if key not in ONE_PROCESS}
            environment = {key: value for key, value in environment.items() if not key.startswith("ACCELERATE_USE_")}
            if run.token is not None:
                environment["HF_TOKEN"] = run.token
            command = [sys.executable, finetune.__file__, "--config", settings]
            # A process's peak starts at its parent's size (Linux, across exec), so a small one stands between.
            between = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            done = run_child([sys.executable, "-c", between, *command], env=environment, **pipes)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
                seen = (
                    f"finetune.py ends with status {done.returncode} within {steps} steps of {size} queries: {said[-1]}"
                )
                killed = "the machine may have run out of memory; " if done.returncode in (-9, 137, 247) else ""
                return Finding("run_fails", "error", seen, f"{killed}mend what it names; it is what the run would say")
            with open(os.path.join(out, "train_log.jsonl"), encoding="utf-8") as file:
                log = [json.loads(line) for line in file]
            # The first step also reads and warms up.
            tokens = [record["tokens_per_second"] / record["queries_per_second"] * size for record in log]
            warm = log[1:]
            seconds = sum(size / record["queries_per_second"] for record in warm)
            measured.append(
                Measured(
                    batch_size=size,
                    padded_tokens=max(t / (1 - record["padding"]) for t, record in zip(tokens, log, strict=True)),
                    peak_gb=max(record["memory_gb"] for record in log),
                    tokens_per_second=sum(tokens[1:]) / seconds,
                    padding=sum(record["padding"] for record in log) / len(log),
                )
            )
    return measured


def activation_budget_gb(cfg: Config, device: Any, num_parameters: int, local_processes: int) -> float:
    """GB of activations that finetune.py will keep."""
    if cfg.activation_memory_budget is not None:
        return cfg.activation_memory_budget
    from bge_accel.training.step import automatic_activation_bytes

    return automatic_activation_bytes(device, num_parameters, local_processes) / 1e9


def cost_of(
    cfg: Config,
    plan: RunPlan,
    measured: list[Any],
    budget_gb: float,
    free_gb: float,
    row_tokens: list[float],
    world: int,
) -> tuple[list[Finding], dict[str, Any]]:
    """Memory, time and the batch to take, and what is wrong with them."""
    from bge_accel.reports.doctor import fit_memory, largest_step_tokens, propose_batch

    memory, largest = fit_memory(measured, budget_gb), measured[-1]
    batch = round(plan.queries_per_batch / world)
    tokens = largest_step_tokens(row_tokens, batch, plan.num_batches) / (1 - largest.padding)
    peak = memory.peak_gb(tokens)
    per_query = sum(row_tokens) / len(row_tokens)
    per_step = plan.queries_per_step / world * per_query / largest.tokens_per_second
    per_step *= 1 if memory.is_kept(tokens) else 4 / 3
    size, why = propose_batch(
        memory,
        row_tokens,
        padding=largest.padding,
        free_gb=free_gb,
        num_examples=plan.num_steps * plan.queries_per_step if cfg.max_steps < 1 else None,
        num_rows=plan.num_rows,
        world=world,
    )
    found = []
    if peak > 0.9 * free_gb:
        seen = f"a process will take about {peak:.1f} GB, and {free_gb:.1f} GB are free"
        advice = "--gradient_checkpointing, --activation_memory_budget, --bf16, or a smaller model"
        found.append(Finding("memory", "error" if peak > free_gb else "warning", seen, advice))
    if not memory.is_kept(tokens):
        seen = (
            f"activations of {batch:,} queries take more than the {budget_gb:.1f} GB kept: the rest is computed twice"
        )
        advice = f"nothing, or about {size} queries a process for a third less time a query"
        found.append(Finding("activations_recomputed", "note", seen, advice))
    return found, {
        "peak_memory_gb": peak,
        "free_memory_gb": free_gb,
        "fixed_memory_gb": memory.fixed_gb,
        "memory_gb_per_1000_tokens": 1000 * memory.gb_per_token,
        "tokens_per_query": per_query,
        "seconds_per_step": per_step,
        "seconds_per_epoch": per_step * plan.num_steps / plan.num_epochs if plan.num_epochs else None,
        "seconds": per_step * plan.num_steps,
        "proposed_batch_size": size,
        "proposed_because": why,
        "measured": [asdict(one) for one in measured],
        "one_unsharded_process": world > 1 or cfg.deepspeed is not None,
    }


def forecast_lines(forecast: dict[str, Any]) -> list[tuple[str, str]]:
    if not forecast:
        return []
    epochs = f" ({forecast['epochs']:.2f} epochs)" if forecast["epochs"] else ""
    lines = [
        ("steps", f"{forecast['steps']:,} of {forecast['queries_per_step']:g} queries{epochs}"),
        ("negatives", f"{forecast['negatives_per_query']:,} for each query"),
    ]
    if "peak_memory_gb" not in forecast:
        return lines
    epoch = f", {duration(forecast['seconds_per_epoch'])} an epoch" if forecast["seconds_per_epoch"] else ""
    alone = "; of one process, not sharded" if forecast["one_unsharded_process"] else ""
    return [
        *lines,
        ("peak memory", f"{forecast['peak_memory_gb']:.2f} GB, {forecast['free_memory_gb']:.1f} GB are free{alone}"),
        ("time", f"{duration(forecast['seconds_per_step'])} a step{epoch}, {duration(forecast['seconds'])} in all"),
        ("batch", f"up to {forecast['proposed_batch_size']:,} queries a process: {forecast['proposed_because']}"),
    ]


def duration(seconds: float) -> str:
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (math.inf, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    raise AssertionError


if __name__ == "__main__":
    summary, *_, status = __doc__.strip().split("\n\n")
    cfg = parse_config(Config, description=f"{summary} {status}", refused=REFUSED)
    with interruptible("nothing is kept", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        found = main(cfg)
    sys.exit(found)
