"""Fine-tune a text-embedding model on rows of {"query", "pos", "neg"}.

On one CPU or GPU:

    python scripts/finetune.py --model_name_or_path BAAI/bge-small-en-v1.5 --train_data train.jsonl --output_dir tuned

On several GPUs, negatives shared among them:

    accelerate launch --multi_gpu --num_processes 8 scripts/finetune.py --model_name_or_path BAAI/bge-base-en-v1.5 \\
        --train_data train.jsonl --output_dir tuned --bf16 --per_device_train_batch_size 128 --negatives_cross_device

A run that was stopped goes on where it was with the same command and --resume_from_checkpoint latest. Measured every 200
steps on rows held out, and ended with the weights that were best: --eval_data dev.jsonl --eval_steps 200
--load_best_model_at_end.

Every flag may also stand in a YAML file: --config run.yaml (the command line wins).
"""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from bge_accel.config import (
    check_model_path,
    check_rules,
    learning_settings,
    option,
    options_from,
    parse_config,
    required,
    shown_in_card,
    to_yaml,
    user_errors,
    without_secrets,
)
from bge_accel.data.sources import YAML
from bge_accel.evaluation.in_training import Best, EncodingSettings, EvaluationOptions, Evaluations, read_eval_sets
from bge_accel.models.card import inline, license_of, model_card
from bge_accel.models.pooling import POOLING
from bge_accel.processes.group import leave_processes
from bge_accel.processes.progress import progress as progress_bar
from bge_accel.processes.signals import StopSignals, interruptible
from bge_accel.training.feeds import load_feeds, open_feeds, position_of
from bge_accel.training.introduction import introduce
from bge_accel.training.log import LogOptions, TrainLog
from bge_accel.training.plan import DataOptions, RunPlan, plan_run
from bge_accel.training.refused_flags import REFUSED
from bge_accel.training.run_folder import FolderOptions, Progress, RunFolder, check_run_folder, lock_run_folder
from bge_accel.training.saved_model import BEST, LAST
from bge_accel.training.sharding import read_deepspeed_config

if TYPE_CHECKING:
    import torch

    from bge_accel.models.settings import EmbeddingSettings
    from bge_accel.training.batches import Batch
    from bge_accel.training.losses import ContrastiveLoss

# Heavy packages are imported when they are needed, after the arguments and the data have been checked.

# Rules that several flags share.
EVAL_DATA = {"eval_data": "there is nothing to measure on"}
UNKNOWN_SIZE = "nobody knows how many rows a stream has"
OF_FILES: Any = {
    "needs": {"same_dataset_within_batch": "else files are one set"},
    "excludes": {"streaming": UNKNOWN_SIZE},
}
ONE_PRECISION = dict.fromkeys(("fp16", "bf16", "pure_bf16", "mixed_precision"), "give one of them")


@dataclass(kw_only=True)
class Config:
    """What to learn. How to run (processes, sharding) is told to `accelerate launch`."""

    model_name_or_path: str = required(
        "folder or hub name of the model to start from", group="model", in_card="last part"
    )
    output_dir: str = required(
        "folder for the tuned model, its log and checkpoints",
        group="saving and logging",
        affects_learning=False,
        in_card="last part",
    )
    train_data: list[str] = required(
        "files, globs or folders of rows (.jsonl, .json, .parquet, .gz, .zst), or one YAML file of several sources",
        group="data",
        affects_learning=False,
        in_card="file name",
    )

    sentence_pooling_method: str | None = option(
        None,
        "how token states become one vector; default: what the model says of itself, else cls",
        choices=POOLING,
        group="model",
    )
    normalize_embeddings: bool | None = option(
        None,
        "scale embeddings to length 1; default: what the model says of itself, else True",
        aliases=["normalized", "normlized"],
    )
    fix_position_embedding: bool = option(False, "do not train the position embeddings")
    config_name: str | None = option(None, "model configuration, if not the model's own", in_card="last part")
    tokenizer_name: str | None = option(None, "tokenizer, if not the model's own", in_card="last part")
    cache_dir: str | None = option(None, "where models from the hub are kept", in_card="last part")
    token: str | None = option(
        None, "access token for the hub (default: what `hf auth login` stored)", affects_learning=False, in_card="never"
    )
    trust_remote_code: bool = option(False, "run code that comes with the model")

    train_group_size: int = option(
        8, "passages per query: 1 positive and N - 1 negatives", at_least=1, at_most=10_000, group="data"
    )
    query_max_len: int = option(32, "tokens that a query is cut to, special tokens included", at_least=1)
    passage_max_len: int = option(128, "tokens that a passage is cut to, special tokens included", at_least=1)
    query_instruction_for_retrieval: str | None = option(
        None, 'put before each query; "" for none; default: what the model says of itself'
    )
    query_instruction_format: str = option("{}{}", "how instruction and query are joined")
    passage_instruction_for_retrieval: str | None = option(
        None, 'put before each passage; "" for none; default: what the model says of itself'
    )
    passage_instruction_format: str = option("{}{}", "how instruction and passage are joined")
    max_example_num_per_dataset: int = option(
        100_000_000, "rows of a file; of a larger one a random sample is taken", at_least=1
    )
    shuffle_ratio: float = option(
        0.0, "chance that a long positive has its parts put in random order", at_least=0, at_most=1
    )
    pad_to_multiple_of: int | None = option(
        None, "round padded lengths up to a multiple of this", at_least=1, at_most=4096
    )
    dataloader_drop_last: bool = option(False, "drop the batches at the end that do not fill a step")
    cache_path: str | None = option(
        None,
        "folder for the checked rows, kept for the next run; default: in ~/.cache/bge_accel",
        affects_learning=False,
        in_card="last part",
    )
    same_dataset_within_batch: bool = option(
        False, "every file is a source of its own, and each batch comes from one of them", group="several sources"
    )
    small_threshold: int = option(0, "files of fewer rows become one source a folder", at_least=0, **OF_FILES)
    drop_threshold: int = option(
        0, "such a source is dropped where it has fewer rows than this", at_least=0, **OF_FILES
    )
    mix_sources: bool = option(False, "mix the sources inside each batch", affects_learning=False)
    sampling_temperature: float = option(
        1.0, "T: shares are sizes to the power of 1 / T, so above 1 small sources come more often", above=0
    )
    streaming: bool = option(
        False,
        "read rows as they are needed, from the hub, URLs or large files",
        group="streaming",
        needs={"max_steps": UNKNOWN_SIZE},
    )
    shuffle_buffer_size: int = option(
        10_000, "rows of a stream that are shuffled together", at_least=1, affects_learning=False
    )
    stopping_strategy: Literal["repeat", "first_exhausted", "all_exhausted"] = option(
        "repeat",
        "what ends the run before --max_steps: nothing, the end of one stream, or of all",
        needs={"streaming": "it is about streams"},
    )

    temperature: float = option(0.02, "similarities are divided by it; 1 where not normalised", above=0, group="loss")
    use_inbatch_neg: bool = option(True, "other queries' passages are negatives too")
    negatives_cross_device: bool = option(
        False,
        "passages of all processes are negatives",
        needs={"use_inbatch_neg": "without it a query meets its own group alone"},
    )
    mask_false_negatives: bool = option(
        True, "a known positive is never a negative of its query (FlagEmbedding: it may be)"
    )
    knowledge_distillation: bool = option(False, "learn from the rows' pos_scores and neg_scores too")
    kd_loss_type: Literal["kl_div"] = option("kl_div", "loss between teacher scores and scores: KL divergence")

    learning_rate: float = option(
        2e-5,
        "peak; about 1e-5, 2e-5, 3e-5 for large, base, small models (FlagEmbedding: 5e-5)",
        above=0,
        at_most=1,
        group="optimisation",
    )
    num_train_epochs: float = option(3.0, "passes over the data", above=0, at_most=1_000_000)
    max_steps: int = option(-1, "optimiser steps, instead of epochs", at_least=-1)
    per_device_train_batch_size: int = option(
        32,
        "queries per process (FlagEmbedding has 8; more negatives teach more)",
        at_least=1,
        at_most=1_000_000,
        affects_learning=False,
    )
    gradient_accumulation_steps: int = option(
        1, "batches per optimiser step; they share no negatives", at_least=1, at_most=1_000_000, affects_learning=False
    )
    warmup_ratio: float = option(
        0.1, "share of the steps in which the rate rises (FlagEmbedding: 0)", at_least=0, at_most=1
    )
    warmup_steps: int = option(0, "steps in which the rate rises; wins over --warmup_ratio", at_least=0)
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = option("linear", "how the rate falls")
    weight_decay: float = option(0.0, "of AdamW; not on biases and norms", at_least=0, at_most=1)
    adam_beta1: float = option(0.9, "of AdamW", at_least=0, below=1)
    adam_beta2: float = option(0.999, "of AdamW", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "of AdamW", above=0, at_most=1)
    optim: Literal["adamw_torch_fused", "adamw_torch"] = option("adamw_torch_fused", "AdamW, fused or not")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 for never", at_least=0)
    seed: int = option(
        42, "of data order, drawn passages and dropout", at_least=0, at_most=2**32 - 1, affects_learning=False
    )

    eval_data: list[str] | None = option(
        None,
        "sets to measure retrieval on: folders in BEIR's layout, or files of rows",
        group="evaluation",
        in_card="last part",
    )
    eval_steps: int = option(500, "steps between measurements; there is one at the end too", at_least=1)
    eval_on_start: bool = option(False, "measure before the first step too", needs=EVAL_DATA)
    metric_for_best_model: str = option(
        "nDCG@10", "decides what is best: the mean over --eval_data, or of one set as NAME/nDCG@10"
    )
    load_best_model_at_end: bool = option(False, "end with the weights that measured best", needs=EVAL_DATA)
    early_stopping_patience: int | None = option(
        None, "measurements in a row without a new best after which the run stops", at_least=1, needs=EVAL_DATA
    )

    fp16: bool = option(
        False,
        "float16; on a CPU bfloat16 where that is fast, else float32",
        group="precision and memory",
        excludes=ONE_PRECISION,
    )
    bf16: bool = option(False, "bfloat16; without hardware for it float32", excludes=ONE_PRECISION)
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] | None = option(
        None, "auto: bfloat16 where that is fast, else float32; default: as `accelerate launch` says"
    )
    pure_bf16: bool = option(
        False,
        "bfloat16 weights and gradients, float32 weights for the optimiser alone: less memory than --bf16",
        excludes=ONE_PRECISION,
    )
    gradient_checkpointing: bool = option(False, "recompute activations layer by layer: less memory, a third more time")
    attention: Literal["auto", "padded", "torch", "flash_attn", "cpu", "plain"] = option(
        "auto",
        "padded, or without padding: torch or flash_attn (GPU, half precision), cpu, plain (slow, anywhere); auto: cpu on a CPU, "
        "else padded",
    )
    torch_compile: bool = option(
        False, "compile the encoder's layers; takes a minute at the start; not with FSDP or DeepSpeed"
    )
    max_tokens_per_micro_batch: int | None = option(
        None, "padded tokens in one forward pass; default: what suits the device", at_least=1
    )
    activation_memory_budget: float | None = option(
        None,
        "GB of activations kept for the backward pass; others are computed again; default: most of what is free",
        at_least=0,
    )
    deepspeed: str | None = option(
        None, "DeepSpeed configuration file; its optimizer and scheduler are ignored", in_card="last part"
    )
    use_cpu: bool = option(False, "leave the GPU alone")

    overwrite_output_dir: bool = option(
        False, "write into an output folder in use", group="saving and logging", affects_learning=False
    )
    save_strategy: Literal["steps", "epoch", "no"] = option("steps", "when to save", affects_learning=False)
    save_steps: int = option(500, "steps between checkpoints (checkpoint-STEP)", at_least=1, affects_learning=False)
    save_total_limit: int | None = option(None, "keep the last N checkpoints", at_least=1, affects_learning=False)
    resume_from_checkpoint: str | None = option(
        None,
        "folder of a checkpoint, or `latest`: the last whole one in --output_dir, and afresh where there is none",
        affects_learning=False,
        in_card="last part",
    )
    allow_changed_data: bool = option(
        False, "go on although data, seed or batch size are not those of the checkpoint", affects_learning=False
    )
    logging_steps: int = option(10, "steps between log lines (FlagEmbedding: 500)", at_least=1, affects_learning=False)
    logging_first_step: bool = option(False, "log the first step too", affects_learning=False)
    report_to: list[str] = option(["none"], "trackers: none, tensorboard, wandb, trackio, all", affects_learning=False)
    run_name: str | None = option(None, "the run's name for the trackers", affects_learning=False)
    disable_tqdm: bool = option(False, "no progress bar", affects_learning=False)


def check(cfg: Config) -> None:
    """Raises ValueError for settings that cannot work, before anything is loaded or written."""
    check_rules(cfg)
    if cfg.small_threshold and cfg.train_data[0].endswith(YAML):
        raise ValueError(
            "--small_threshold puts files together; the sources of a YAML file stay as it names them: drop it"
        )
    if cfg.torch_compile and cfg.attention == "plain":
        raise ValueError("--attention plain goes text by text, which --torch_compile cannot compile; drop one of them")
    if cfg.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs `pip install deepspeed`")
    if not cfg.use_inbatch_neg and cfg.train_group_size == 1:
        raise ValueError("--use_inbatch_neg False with --train_group_size 1 leaves nothing to learn from; raise one")
    if cfg.knowledge_distillation and cfg.train_group_size == 1:
        raise ValueError("--knowledge_distillation compares the passages of a group; raise --train_group_size above 1")
    for tracker in cfg.report_to:
        if tracker not in ("none", "all", "tensorboard", "wandb", "trackio"):
            raise ValueError(f"--report_to {tracker} is not one of none, tensorboard, wandb, trackio, all")
        if tracker not in ("none", "all") and importlib.util.find_spec(tracker) is None:
            raise ValueError(f"--report_to {tracker} needs `pip install {tracker}`")
    check_model_path("--model_name_or_path", cfg.model_name_or_path)
    check_run_folder(options_from(FolderOptions, cfg))


def loss_of(
    cfg: Config, batch: "Batch", q_emb: "torch.Tensor", p_emb: "torch.Tensor", temperature: float
) -> "ContrastiveLoss":
    """What is learnt: each query has to find its positive among the passages it meets.

    Args:
        q_emb: (queries, dim), of this process.
        p_emb: (queries * group size, dim), the positive of each query first in its group.

    Returns:
        `.loss` is learnt from; the other figures are for the log.
    """
    from bge_accel.training.losses import contrastive_loss
    from bge_accel.training.negatives import gather_passages, known_positives

    feed = batch.feed
    across = cfg.negatives_cross_device and feed.in_batch_negatives
    passages = gather_passages(p_emb, batch, across=across, need_ids=cfg.mask_false_negatives)
    return contrastive_loss(
        q_emb,
        passages.emb,
        temperature=temperature,
        group_size=feed.group_size,
        first_query=passages.first_query,
        in_batch_negatives=feed.in_batch_negatives,
        masked=known_positives(passages, batch) if cfg.mask_false_negatives else None,
        teacher_scores=batch.teacher_scores(q_emb.device) if cfg.knowledge_distillation else None,
    )


def main(cfg: Config) -> int:
    """Trains; the status to end with, which is 130 after Ctrl-C."""
    # ---- check everything that can be checked before a model is loaded or a file written
    with user_errors():
        check(cfg)
        data = options_from(DataOptions, cfg)
        feeds, num_dropped = load_feeds(data)
        deepspeed_config = read_deepspeed_config(cfg.deepspeed) if cfg.deepspeed else None
        eval_sets = read_eval_sets(cfg.eval_data or [])
        best = Best(cfg.metric_for_best_model, list(eval_sets)) if eval_sets else None
    stop = StopSignals()

    # ---- the processes of the run, how many steps there are, and where to go on
    from accelerate.utils import set_seed

    from bge_accel.encoding.batching import default_token_budget
    from bge_accel.kernels.switch import use_kernels
    from bge_accel.training.batches import Batches
    from bge_accel.training.engine import Engine, EngineOptions, compiling_asked_for
    from bge_accel.training.gather import largest
    from bge_accel.training.model import ModelOptions, load_model

    with user_errors():
        cfg.torch_compile |= compiling_asked_for()
        engine = Engine(options_from(EngineOptions, cfg), deepspeed_config)
        say, rank, world = engine.say, engine.rank, engine.world
        # torch's generator is drawn from by weights that a model lacks, and then by the dropout of each batch.
        set_seed((cfg.seed + rank) % 2**32)  # NumPy takes no more
        plan = plan_run(feeds, data, world)
        files = options_from(FolderOptions, cfg)
        lock_run_folder(files)
        folder = RunFolder(
            files,
            engine,
            plan,
            position=position_of(feeds, plan, data, world),
            settings=learning_settings(cfg),
            configuration=to_yaml(without_secrets(cfg)),
        )
        if folder.is_complete():
            say(f"already complete: {cfg.output_dir} holds the model that this run ends with")
            return 0
        start = folder.find_checkpoint()
        progress = start.progress if start else Progress()
        open_feeds(feeds, data, rank, world, start.streams(rank, folder.position) if start else None)

        # ---- tokenizer and model
        model_options = options_from(ModelOptions, cfg)
        encoder, tokenizer, settings = load_model(model_options, feeds, start.path if start else None)
        temperature = cfg.temperature
        if settings.normalize and temperature > 0.5:
            raise ValueError(
                f"--temperature is {temperature}: similarities of normalised embeddings lie in [-1, 1], so above 0.5 "
                "hardly anything is learnt; take 0.01 to 0.1, or --normalize_embeddings False"
            )
        if not settings.normalize and temperature != 1.0:
            say(f"note: embeddings are not normalised, so the temperature is 1 (not {temperature})")
            temperature = 1.0
        packed_for = use_kernels(
            encoder.backbone,
            cfg.attention,
            engine.device,
            compiled=cfg.torch_compile,
            in_place=world == 1 and not engine.is_sharded and not engine.pure_bf16,
        )
    encoder.train()

    # ---- batches: a function of the seed and the batch's number, prepared in the background
    max_tokens = cfg.max_tokens_per_micro_batch or default_token_budget(
        engine.device,
        encoder.config,
        bytes_per_value=4 if engine.computes_in == "float32" else 2,
        checkpointing=cfg.gradient_checkpointing,
    )
    for feed in feeds:
        feed.set_prefixes(settings, data)
    batches = Batches(
        feeds, plan, data, tokenizer, rank=rank, num_processes=world, max_tokens=max_tokens, packed_for=packed_for
    )

    # ---- optimiser and schedule; from here on files are written
    with user_errors():
        engine.prepare(encoder, plan.num_steps)
        if start:
            engine.restore(start.path, start.state)
        folder.begin(start)
    log = TrainLog(options_from(LogOptions, cfg), engine, plan.num_steps, [feed.source.name for feed in feeds])
    evaluations = Evaluations(
        options_from(EvaluationOptions, cfg),
        best,
        eval_sets,
        engine,
        log,
        folder,
        tokenizer=tokenizer,
        encoding=EncodingSettings(
            settings.query_prefix, settings.passage_prefix, cfg.query_max_len, cfg.passage_max_len, max_tokens
        ),
    )
    if start:
        evaluations.restore(start)
    log.start_trackers(asdict(without_secrets(cfg)))
    license = license_of(cfg.model_name_or_path, cache_dir=cfg.cache_dir, token=cfg.token) if engine.is_main else {}
    folder.saves(tokenizer, settings, partial(card_of, cfg, settings, plan, license, log))
    with user_errors():
        log.rewind(progress.step if start else None, has_measured=evaluations.has_measured(progress.step))
    introduce(
        engine,
        data,
        plan,
        feeds,
        settings,
        temperature=temperature,
        measured=evaluations.sizes,
        goes_on=f"step {progress.step:,} of {start.path}" if start else None,
        num_dropped=num_dropped,
    )

    # ---- the loop
    bar = progress_bar(
        plan.num_steps, "training", "step", shown=engine.is_main and not cfg.disable_tqdm, initial=progress.step
    )
    stopped, is_end = 0, progress.step == plan.num_steps
    if evaluations.is_due(progress.step):
        is_end |= evaluations.measure(progress.step)
    for batch in () if is_end else checked(batches.starting_at(progress.batches)):
        if cfg.stopping_strategy != "repeat" and streams_end(batch, cfg.stopping_strategy, engine.device):
            say(f"the streams end after {progress.step:,} steps (--stopping_strategy {cfg.stopping_strategy})")
            break
        accumulated, is_last = plan.place_in_step(batch.index)
        output = engine.backward(
            batch.tokens,
            partial(loss_of, cfg, batch, temperature=temperature),
            num_queries=len(batch.examples),
            accumulated=accumulated,
            is_last=is_last,
            packed_for=packed_for,
        )
        log.add(batch, output, progress.step)
        progress.batches = batch.index + 1
        if not is_last:
            continue

        made = engine.step()
        if made.is_skipped:  # float16 overflowed; the loss scale is lowered, and neither step nor schedule moves
            progress.skipped += 1
        else:
            progress.step += 1
            bar.update()
        step, epoch = progress.step, plan.epochs_after(progress.batches, batch.passes)
        is_end = plan.is_end(step, progress.batches)
        stopped = 0 if is_end else largest(stop.number, engine.device)
        if made.is_skipped and not is_end and not stopped:
            continue
        logs = is_end or (not made.is_skipped and log.is_due(step))
        measures = not made.is_skipped and not stopped and evaluations.is_due(step)
        saves = bool(stopped) or (not is_end and folder.is_due(progress, int(epoch)))
        if logs or measures or saves:
            log.check_loss()
        if logs:
            log.write_step(progress, made, epoch)
        if measures:
            is_end |= evaluations.measure(step)
        if saves and (stopped or not is_end):
            progress.saved_epoch = int(epoch)
            folder.save_checkpoint(progress, batch.streams, evaluations.state())
        if is_end or stopped:
            break
    bar.close()
    log.check_loss()
    if not stopped and not evaluations.has_measured(progress.step):
        evaluations.measure(progress.step)

    # ---- save
    if stopped:
        folder.note_stopped(progress.step)
        why = stop.received or "a signal to another process"
        say(f"stopped by {why}: checkpoint-{progress.step} is saved; go on with --resume_from_checkpoint latest")
    else:
        if evaluations.keeps_best and best is not None:
            say(f"the best {best.metric} was {best.value:.4f}, after step {best.step}")
        else:
            folder.save_model(progress.step, LAST)
        folder.finish(progress.step, BEST if evaluations.keeps_best else LAST)
        say(f"saved {cfg.output_dir}")
    log.finish()
    return 128 + stopped if stopped == signal.SIGINT else 0


def checked(batches: Iterator["Batch"]) -> Iterator["Batch"]:
    """Rows of a stream are checked as they are read: a fault there is the user's."""
    with user_errors(by_all=True):
        yield from batches


def streams_end(batch: "Batch", strategy: str, device: "torch.device") -> bool:
    """Whether the first stream, or the last, has ended on any process (`first_exhausted`), or on all."""
    from bge_accel.training.gather import largest

    if strategy == "first_exhausted":
        return largest(int(max(batch.passes) > 0), device) > 0
    return -largest(-int(min(batch.passes) > 0), device) > 0


def card_of(
    cfg: Config, settings: "EmbeddingSettings", plan: RunPlan, license: dict[str, str], log: TrainLog, step: int
) -> str:
    """README.md of the model after a step."""
    shown = shown_in_card(cfg)
    rows, measured = "streamed rows" if cfg.streaming else f"{plan.num_rows or 0:,} rows", log.measured
    steps = {"before": 0, f"after {step:,} steps": step} if step else {"before": 0}
    return model_card(
        name=os.path.basename(os.path.abspath(cfg.output_dir)),
        base=cfg.model_name_or_path,
        settings=settings,
        data=f"Data: {rows} of query and passages from {', '.join(map(inline, shown.train_data))}.",
        training=f"fine-tuned for {step:,} steps",
        configuration=to_yaml(shown),
        license=license,
        scores={when: measured[at] for when, at in steps.items() if at in measured} if step in measured else None,
    )


if __name__ == "__main__":
    with interruptible("nothing was begun"):
        status = main(parse_config(Config, description=__doc__.split("\n")[0], refused=REFUSED))
    leave_processes()
    sys.exit(status)
