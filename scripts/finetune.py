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
import itertools
import json
import math
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from bge_accel.config import check_model_path, option, parse_config, required, to_yaml, user_errors
from bge_accel.data.examples import (
    Example,
    RowOrder,
    balanced_positions,
    batch_positions,
    draw_example,
    expected_tokens,
)
from bge_accel.data.rows import TrainingRows, join_known_positives
from bge_accel.data.sources import YAML, SourceSchedule, find_sources, merge_small
from bge_accel.evaluation.in_training import Best, read_eval_sets
from bge_accel.files.lock import LOCK, lock_output, locked
from bge_accel.files.outputs import check_folder
from bge_accel.files.parsing import decode_json
from bge_accel.files.text import printable, shorten
from bge_accel.models.card import inline, license_of, model_card
from bge_accel.processes.group import from_first, leave_processes
from bge_accel.processes.progress import progress
from bge_accel.processes.signals import StopSignals, interruptible
from bge_accel.training.checkpoint import REQUEUE, find_checkpoints
from bge_accel.training.manifest import STATE
from bge_accel.training.plan import PlannedSource, RunPlan, check_sources, plan_run, repeated_negatives
from bge_accel.training.refused_flags import REFUSED
from bge_accel.training.saved_model import BEST, LAST, SAVED
from bge_accel.training.sharding import read_deepspeed_config

if TYPE_CHECKING:
    from bge_accel.data.streaming import RowStream
    from bge_accel.encoding.batching import TokenBatch

# Heavy packages are imported inside main(), after the arguments and the data have been checked.


@dataclass(kw_only=True)
class Config:
    """What to learn. How to run (processes, sharding) is told to `accelerate launch`."""

    model_name_or_path: str = required("folder or hub name of the model to start from", group="model")
    output_dir: str = required("folder for the tuned model, its log and checkpoints", group="saving and logging")
    train_data: list[str] = required(
        "files, globs or folders of rows (.jsonl, .json, .parquet, .gz, .zst), or one YAML file of several sources",
        group="data",
    )

    sentence_pooling_method: Literal["cls", "mean", "last_token"] | None = option(
        None, "how token states become one vector; default: what the model says of itself, else cls", group="model"
    )
    normalize_embeddings: bool | None = option(
        None,
        "scale embeddings to length 1; default: what the model says of itself, else True",
        aliases=["normalized", "normlized"],
        group="model",
    )
    fix_position_embedding: bool = option(False, "do not train the position embeddings", group="model")
    config_name: str | None = option(None, "model configuration, if not the model's own", group="model")
    tokenizer_name: str | None = option(None, "tokenizer, if not the model's own", group="model")
    cache_dir: str | None = option(None, "where models from the hub are kept", group="model")
    token: str | None = option(None, "access token for the hub (default: what `hf auth login` stored)", group="model")
    trust_remote_code: bool = option(False, "run code that comes with the model", group="model")

    train_group_size: int = option(
        8, "passages per query: 1 positive and N - 1 negatives", at_least=1, at_most=10_000, group="data"
    )
    query_max_len: int = option(32, "tokens that a query is cut to, special tokens included", at_least=1, group="data")
    passage_max_len: int = option(
        128, "tokens that a passage is cut to, special tokens included", at_least=1, group="data"
    )
    query_instruction_for_retrieval: str | None = option(
        None, 'put before each query; "" for none; default: what the model says of itself', group="data"
    )
    query_instruction_format: str = option("{}{}", "how instruction and query are joined", group="data")
    passage_instruction_for_retrieval: str | None = option(
        None, 'put before each passage; "" for none; default: what the model says of itself', group="data"
    )
    passage_instruction_format: str = option("{}{}", "how instruction and passage are joined", group="data")
    max_example_num_per_dataset: int = option(
        100_000_000, "take a random sample of larger files", at_least=1, group="data"
    )
    shuffle_ratio: float = option(
        0.0, "chance that a long positive has its parts put in random order", at_least=0, at_most=1, group="data"
    )
    pad_to_multiple_of: int | None = option(
        None, "round padded lengths up to a multiple of this", at_least=1, at_most=4096, group="data"
    )
    dataloader_drop_last: bool = option(False, "drop the batches at the end that do not fill a step", group="data")
    cache_path: str | None = option(
        None, "folder for the checked rows, kept for the next run; default: in ~/.cache/bge_accel", group="data"
    )
    same_dataset_within_batch: bool = option(
        False, "every file is a source of its own, and each batch comes from one of them", group="several sources"
    )
    small_threshold: int = option(
        0,
        "files of fewer rows are one source for each folder (--same_dataset_within_batch)",
        at_least=0,
        group="several sources",
    )
    drop_threshold: int = option(
        0, "and dropped where together they have fewer rows than this", at_least=0, group="several sources"
    )
    mix_sources: bool = option(False, "mix the sources inside each batch", group="several sources")
    sampling_temperature: float = option(
        1.0,
        "above 1, small sources come more often: shares are sizes to the power of 1 / T",
        above=0,
        group="several sources",
    )
    streaming: bool = option(
        False, "read rows as they are needed: hub names, URLs, or files too large to keep", group="streaming"
    )
    shuffle_buffer_size: int = option(
        10_000, "rows of a stream that are shuffled together", at_least=1, group="streaming"
    )
    stopping_strategy: Literal["repeat", "first_exhausted", "all_exhausted"] = option(
        "repeat",
        "when a stream's end stops the run: never before --max_steps, at the first end, or when all have ended once",
        group="streaming",
    )

    temperature: float = option(0.02, "similarities are divided by it; 1 where not normalised", above=0, group="loss")
    use_inbatch_neg: bool = option(True, "other queries' passages are negatives too", group="loss")
    negatives_cross_device: bool = option(False, "passages of all processes are negatives", group="loss")
    mask_false_negatives: bool = option(
        True,
        "a known positive of the query never counts as its negative (FlagEmbedding lets it)",
        group="loss",
    )
    knowledge_distillation: bool = option(False, "learn from the rows' pos_scores and neg_scores too", group="loss")
    kd_loss_type: Literal["kl_div"] = option("kl_div", "how", group="loss")

    learning_rate: float = option(
        2e-5,
        "peak; about 1e-5, 2e-5, 3e-5 for large, base, small models (FlagEmbedding inherits 5e-5, too much for most)",
        above=0,
        at_most=1,
        group="optimisation",
    )
    num_train_epochs: float = option(3.0, "passes over the data", above=0, at_most=1_000_000, group="optimisation")
    max_steps: int = option(-1, "optimiser steps, instead of epochs", at_least=-1, group="optimisation")
    per_device_train_batch_size: int = option(
        32,
        "queries per process (FlagEmbedding has 8; more negatives teach more)",
        at_least=1,
        at_most=1_000_000,
        group="optimisation",
    )
    gradient_accumulation_steps: int = option(
        1, "batches per optimiser step; they share no negatives", at_least=1, at_most=1_000_000, group="optimisation"
    )
    warmup_ratio: float = option(
        0.1,
        "share of the steps in which the rate rises (FlagEmbedding: 0)",
        at_least=0,
        at_most=1,
        group="optimisation",
    )
    warmup_steps: int = option(
        0, "steps in which the rate rises; wins over --warmup_ratio", at_least=0, group="optimisation"
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = option("linear", "how the rate falls", group="optimisation")
    weight_decay: float = option(0.0, "of AdamW; not on biases and norms", at_least=0, at_most=1, group="optimisation")
    adam_beta1: float = option(0.9, "of AdamW", at_least=0, below=1, group="optimisation")
    adam_beta2: float = option(0.999, "of AdamW", at_least=0, below=1, group="optimisation")
    adam_epsilon: float = option(1e-8, "of AdamW", above=0, at_most=1, group="optimisation")
    optim: Literal["adamw_torch_fused", "adamw_torch"] = option("adamw_torch_fused", "", group="optimisation")
    max_grad_norm: float = option(
        1.0, "gradients are clipped to this norm; 0 for never", at_least=0, group="optimisation"
    )
    seed: int = option(
        42, "of data order, drawn passages and dropout", at_least=0, at_most=2**32 - 1, group="optimisation"
    )

    eval_data: list[str] | None = option(
        None,
        "one or several sets to measure retrieval on during training: a folder in BEIR's layout, or a file of rows whose "
        "queries have to find their positives among all its passages",
        group="evaluation",
    )
    eval_steps: int = option(
        500, "steps between measurements; there is one at the end too", at_least=1, group="evaluation"
    )
    eval_on_start: bool = option(False, "measure before the first step too", group="evaluation")
    metric_for_best_model: str = option(
        "nDCG@10", "decides what is best: the mean over --eval_data, or of one set as NAME/nDCG@10", group="evaluation"
    )
    load_best_model_at_end: bool = option(
        False, "end with the weights that measured best (kept in --output_dir/best until then)", group="evaluation"
    )
    early_stopping_patience: int | None = option(
        None,
        "stop after so many measurements in a row that are not better than the best",
        at_least=1,
        group="evaluation",
    )

    fp16: bool = option(
        False,
        "float16 (GPU); without a GPU bfloat16 where the CPU is fast in it, else float32",
        group="precision and memory",
    )
    bf16: bool = option(False, "bfloat16; without hardware for it float32", group="precision and memory")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] | None = option(
        None,
        "auto is bfloat16 where the hardware is fast in it, else float32; default: what `accelerate launch` was told",
        group="precision and memory",
    )
    pure_bf16: bool = option(
        False,
        "bfloat16 weights and gradients too, beside float32 weights for the optimiser: less memory than --bf16, a little less exact",
        group="precision and memory",
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations layer by layer: less memory, a third more time", group="precision and memory"
    )
    attention: Literal["auto", "padded", "torch", "flash_attn", "cpu", "plain"] = option(
        "auto",
        "padded: each text of a micro-batch is as long as the longest; or without padding: cpu (on a CPU), by torch's or "
        "flash_attn's kernel (on a GPU, in half precision), or plain (text by text, slowly, anywhere); auto: cpu where it can, "
        "else padded",
        group="precision and memory",
    )
    torch_compile: bool = option(
        False,
        "compile the encoder's layers: a minute at the start, then faster steps on many GPUs; not with FSDP or DeepSpeed",
        group="precision and memory",
    )
    max_tokens_per_micro_batch: int | None = option(
        None,
        "padded tokens in one forward pass; default: what suits the device",
        at_least=1,
        group="precision and memory",
    )
    activation_memory_budget: float | None = option(
        None,
        "GB of activations to keep for the backward pass; the rest is computed again, for up to a third more time; "
        "0 keeps none; default: most of the memory that is free",
        at_least=0,
        group="precision and memory",
    )
    deepspeed: str | None = option(
        None,
        "DeepSpeed configuration file; its optimizer and scheduler are left aside for the flags here",
        group="precision and memory",
    )
    use_cpu: bool = option(False, "leave the GPU alone", group="precision and memory")

    overwrite_output_dir: bool = option(False, "write into an output folder in use", group="saving and logging")
    save_strategy: Literal["steps", "epoch", "no"] = option("steps", "when to save", group="saving and logging")
    save_steps: int = option(500, "steps between checkpoints (checkpoint-STEP)", at_least=1, group="saving and logging")
    save_total_limit: int | None = option(None, "keep the last N checkpoints", at_least=1, group="saving and logging")
    resume_from_checkpoint: str | None = option(
        None,
        "folder of a checkpoint, or `latest`: the last whole one in --output_dir, and afresh where there is none",
        group="saving and logging",
    )
    allow_changed_data: bool = option(
        False, "go on although data, seed or batch size are not those of the checkpoint", group="saving and logging"
    )
    logging_steps: int = option(
        10, "steps between log lines (FlagEmbedding: 500)", at_least=1, group="saving and logging"
    )
    logging_first_step: bool = option(False, "log the first step too", group="saving and logging")
    report_to: list[str] = option(
        ["none"], "trackers: none, tensorboard, wandb, trackio, all", group="saving and logging"
    )
    run_name: str | None = option(None, "the run's name for the trackers", group="saving and logging")
    disable_tqdm: bool = option(False, "no progress bar", group="saving and logging")


@dataclass(kw_only=True)
class Feed(PlannedSource):
    """One source of rows, with what the run does to it."""

    rows: TrainingRows | None
    """None for a stream, which is opened later."""
    stream: "RowStream | None" = None
    query_prefix: str = ""
    passage_prefix: str = ""
    order: RowOrder | None = None


class Batch(NamedTuple):
    """One process's share of a global batch, ready for the encoder."""

    examples: list[Example]
    sources: list[int]
    """For each example the number of its source."""
    feed: Feed
    """The source, or one of the mixed sources, which agree in what the loss needs to know."""
    tokens: "TokenBatch"
    """All queries, then all passages."""
    streams: list[dict]
    """Where each stream stands after this batch."""
    passes: list[int]
    """How often each stream has been read to its end, this batch included."""


def check(cfg: Config) -> None:
    """Raises ValueError for settings that cannot work, before anything is loaded or written."""
    for name in ("eval_on_start", "load_best_model_at_end", "early_stopping_patience"):
        if getattr(cfg, name) and not cfg.eval_data:
            raise ValueError(f"--{name} needs --eval_data: there is nothing to measure on")
    if cfg.streaming and cfg.max_steps < 1:
        raise ValueError("--streaming needs --max_steps: nobody knows how many rows a stream has")
    if not cfg.streaming and cfg.stopping_strategy != "repeat":
        raise ValueError(f"--stopping_strategy {cfg.stopping_strategy} is about streams; add --streaming or drop it")
    if (cfg.small_threshold or cfg.drop_threshold) and not cfg.same_dataset_within_batch:
        raise ValueError(
            "--small_threshold and --drop_threshold need --same_dataset_within_batch, else files are one set"
        )
    if cfg.small_threshold and cfg.train_data[0].endswith(YAML):
        raise ValueError(
            "--small_threshold puts files together; the sources of a YAML file stay as it names them: drop it"
        )
    if cfg.streaming and (cfg.small_threshold or cfg.drop_threshold):
        raise ValueError(
            "--small_threshold and --drop_threshold need to know how many rows there are: drop --streaming"
        )
    if cfg.fp16 + cfg.bf16 + cfg.pure_bf16 + (cfg.mixed_precision is not None) > 1:
        raise ValueError("--fp16, --bf16, --pure_bf16 and --mixed_precision exclude each other; give one of them")
    if cfg.torch_compile and cfg.attention == "plain":
        raise ValueError("--attention plain goes text by text, which --torch_compile cannot compile; drop one of them")
    if cfg.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs `pip install deepspeed`")
    if not cfg.use_inbatch_neg and cfg.negatives_cross_device:
        raise ValueError("--negatives_cross_device needs in-batch negatives, which --use_inbatch_neg False turns off")
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
    check_output_dir(cfg)
    asked = cfg.resume_from_checkpoint
    if asked not in (None, "latest"):
        if not os.path.isdir(asked):
            or_latest = ", or `latest`" if find_checkpoints(cfg.output_dir) else ""
            raise ValueError(f"--resume_from_checkpoint {asked} is not a folder; name one{or_latest}")
        if not os.path.isdir(os.path.join(asked, "training_state")):
            raise ValueError(
                f"--resume_from_checkpoint {asked} holds no training state; to start from its weights, name it by "
                "--model_name_or_path"
            )


def check_output_dir(cfg: Config) -> None:
    """Raises ValueError where the folder cannot be written to, or holds what is not to be touched."""
    check_folder("--output_dir", cfg.output_dir)
    inside = [name for name in os.listdir(cfg.output_dir) if name != LOCK] if os.path.isdir(cfg.output_dir) else []
    goes_on = cfg.resume_from_checkpoint is not None and (
        "run_config.yaml" in inside or find_checkpoints(cfg.output_dir)
    )
    if inside and not goes_on and not cfg.overwrite_output_dir:
        if os.environ.get("RANK", "0") == "0":
            with locked(cfg.output_dir):  # or it names the run that is at work there
                pass
        goes_on = find_checkpoints(cfg.output_dir)
        raise ValueError(
            f"--output_dir {cfg.output_dir} is in use; name another folder, or add --overwrite_output_dir"
            + (", or, to go on with its run, --resume_from_checkpoint latest" if goes_on else "")
        )


def load_feeds(cfg: Config) -> tuple[list[Feed], int]:
    """The sources of rows with their settings, every row checked, and how many rows of small files were dropped.

    Streams are opened later.

    Raises:
        ValueError: something is wrong with a source or any row, or settings of sources exclude each other.
    """
    sources = find_sources(cfg.train_data, one_per_file=cfg.same_dataset_within_batch)

    def read(paths: list[str]) -> TrainingRows:
        return TrainingRows(
            paths,
            max_rows_per_file=cfg.max_example_num_per_dataset,
            seed=cfg.seed,
            need_scores=cfg.knowledge_distillation,
            cache_folder=cfg.cache_path,
        )

    rows: list[TrainingRows | None] = [None] * len(sources)
    dropped = 0
    if not cfg.streaming:
        if len(sources) > 1:  # the faults of all of them together
            read([path for source in sources for path in source.path])
        checked = [read(source.path) for source in sources]
        if cfg.small_threshold:
            sizes = [len(rows_of_source) for rows_of_source in checked]
            sources, dropped = merge_small(sources, sizes, cfg.small_threshold, cfg.drop_threshold)
            checked = [read(source.path) for source in sources]
        join_known_positives(checked)
        rows = list(checked)
    feeds = [
        Feed.of(
            source, rows=of_source, num_rows=None if of_source is None else len(of_source), **settings_of_sources(cfg)
        )
        for source, of_source in zip(sources, rows, strict=True)
    ]
    check_feeds(cfg, feeds)
    return feeds, dropped


def settings_of_sources(cfg: Config) -> dict[str, Any]:
    """What holds for sources that say nothing else."""
    return {
        "epochs": cfg.num_train_epochs,
        "group_size": cfg.train_group_size,
        "batch_size": cfg.per_device_train_batch_size,
        "in_batch_negatives": cfg.use_inbatch_neg,
    }


def other_prefixes(cfg: Config, feeds: Sequence[Feed]) -> dict[str, dict[str, str]]:
    """What sources and rows put before queries and passages in place of the run's instructions, and which row does."""
    from bge_accel.models.settings import instruction_prefix

    found: dict[str, dict[str, str]] = {}
    for kind, format in (("query", cfg.query_instruction_format), ("passage", cfg.passage_instruction_format)):
        own = [instruction_prefix(getattr(feed.source, f"{kind}_instruction_for_retrieval"), format) for feed in feeds]
        found[kind] = {prefix: "" for prefix in own if prefix is not None}
    for feed in feeds:
        for prompt, row in feed.rows.first_with_prompt().items() if feed.rows else ():
            found["query"].setdefault(
                str(instruction_prefix(prompt, cfg.query_instruction_format)), feed.rows.place(row)
            )
    return found


def check_feeds(cfg: Config, sources: Sequence[PlannedSource]) -> None:
    """Raises ValueError where settings of sources exclude each other, or those of the run."""
    check_sources(
        sources,
        mixed=cfg.mix_sources,
        streamed=cfg.streaming,
        distils=cfg.knowledge_distillation,
        sampling_temperature=cfg.sampling_temperature,
    )


def plan_of(cfg: Config, sources: Sequence[PlannedSource], num_processes: int) -> RunPlan:
    """How much of what comes in the run; the doctor asks it too."""
    return plan_run(
        sources,
        num_processes=num_processes,
        max_steps=cfg.max_steps,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        drop_last=cfg.dataloader_drop_last,
        mixed=cfg.mix_sources,
        sampling_temperature=cfg.sampling_temperature,
        negatives_cross_device=cfg.negatives_cross_device,
    )


def main(cfg: Config) -> int:
    """Trains; the status to end with, which is 130 after Ctrl-C."""
    # ---- check everything that can be checked before a model is loaded or a file written
    with user_errors():
        check(cfg)
        feeds, dropped = load_feeds(cfg)
        rows_without_negatives = sum(feed.rows.check_negatives() for feed in feeds if feed.rows and feed.group_size > 1)
        deepspeed_config = read_deepspeed_config(cfg.deepspeed) if cfg.deepspeed else None
        eval_sets = read_eval_sets(cfg.eval_data or [])
        best = Best(cfg.metric_for_best_model, list(eval_sets)) if eval_sets else None

    stop = StopSignals()

    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import DeepSpeedPlugin, DistributedType, broadcast_object_list, gather_object, set_seed
    from tqdm import tqdm
    from transformers import get_scheduler

    from bge_accel.encoding.batching import default_token_budget, make_token_batch, split_micro_batches
    from bge_accel.encoding.pipeline import prefetch
    from bge_accel.encoding.transfer import to_device, to_host
    from bge_accel.evaluation.in_training import EncodingSettings, evaluate_in_training
    from bge_accel.files.atomic import atomic_folder, check_room, move_into, remove_checkpoint
    from bge_accel.files.changes import differences
    from bge_accel.kernels.cpu_attention import use_cpu_attention
    from bge_accel.kernels.dropout import use_cpu_dropout
    from bge_accel.kernels.in_place_gradients import add_gradients_in_place
    from bge_accel.kernels.packed import check_dropout, check_kernel, use_kernel, why_not
    from bge_accel.models.compiling import compile_layers
    from bge_accel.models.encoder import load_encoder, save_encoder
    from bge_accel.models.flops import flops_per_token
    from bge_accel.models.loading import check_prefix
    from bge_accel.models.precision import choose_precision
    from bge_accel.models.settings import instruction_prefix
    from bge_accel.models.tokenizing import tokenize
    from bge_accel.training.checkpoint import (
        choose_checkpoint,
        load_optimizer_tensors,
        optimizer_tensors,
        random_state,
        read_optimizer,
        read_run_state,
        remove_leftovers,
        room_for_run,
        saving_errors,
        set_random_state,
        write_state,
    )
    from bge_accel.training.gather import gather, gather_uneven, gather_with_grad, largest
    from bge_accel.training.half_precision import Bf16Copy
    from bge_accel.training.losses import contrastive_loss, known_positive_pairs, known_to_any
    from bge_accel.training.manifest import write_manifest
    from bge_accel.training.saved_model import is_complete, keep_best, note_complete, note_saved
    from bge_accel.training.sharding import configure_deepspeed, deepspeed_backward, whole_state_dict
    from bge_accel.training.step import (
        ActivationBudget,
        automatic_activation_bytes,
        embed_and_backward,
        keep_freed_memory,
    )

    # ---- accelerator
    on_cpu = cfg.use_cpu or not torch.cuda.is_available()
    if deepspeed_config is not None:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    asked = {name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true"}
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        # `accelerate launch --dynamo_backend` would have the whole model compiled, for each shape of its inputs.
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"
        cfg.torch_compile = True
    if cfg.torch_compile and asked:
        with user_errors():
            raise ValueError("--torch_compile is for one process or DDP, not for FSDP or DeepSpeed; drop the flag")
    asked_precision = cfg.mixed_precision or ("fp16" if cfg.fp16 else "bf16" if cfg.bf16 or cfg.pure_bf16 else None)
    precision, warning = choose_precision(
        asked_precision or os.environ.get("ACCELERATE_MIXED_PRECISION"), torch.device("cpu" if on_cpu else "cuda")
    )
    # FSDP and DeepSpeed keep float32 weights beside the bfloat16 ones by themselves; elsewhere a copy of the model does.
    pure_bf16 = cfg.pure_bf16 and precision == "bf16" and not asked
    if pure_bf16:
        precision = "no"  # nothing is to be cast
    # Buffers are constant; and as processes may differ in how many forward passes they make, sending them would hang.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*is deprecated")
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # accelerate sets it well
    accelerator = Accelerator(
        mixed_precision=precision,
        # Without it two CPU processes would run side by side, unconnected.
        cpu=True if on_cpu and not asked else None,  # type: ignore[arg-type]
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config) if deepspeed_config is not None else None,
        log_with=[tracker for tracker in cfg.report_to if tracker != "none"] or None,
        project_dir=cfg.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    if int(os.environ.get("WORLD_SIZE", "1")) != world:
        raise RuntimeError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate runs {world} process(es)")
    if asked and accelerator.distributed_type.value not in asked:
        raise RuntimeError(f"{asked.pop()} was asked for, but accelerate runs {accelerator.distributed_type.value}")
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    is_sharded = is_deepspeed or accelerator.distributed_type == DistributedType.FSDP
    is_main = accelerator.is_main_process

    computes_in = "pure bf16" if pure_bf16 else accelerator.mixed_precision.replace("no", "float32")

    if cfg.attention not in ("auto", "padded"):
        with user_errors():
            check_kernel(cfg.attention, device, computes_in)

    def say(text: str) -> None:
        if is_main:
            tqdm.write(printable(text))

    if warning:
        say(f"note: {warning}")
    set_seed((cfg.seed + rank) % 2**32)  # NumPy takes no more

    with user_errors():
        plan = plan_of(cfg, feeds, world)
    num_rows, num_steps, num_batches = plan.num_rows or 0, plan.num_steps, plan.num_batches

    # ---- no other run may write into the folder from here to the end; one may have, while the rows were read
    def begin() -> None:
        lock_output(cfg.output_dir)
        check_output_dir(cfg)

    with user_errors():
        from_first(begin)

    # ---- where to go on
    # All that the place of a row in the run depends on.
    position = {
        "seed": cfg.seed,
        "gradient_accumulation_steps": cfg.gradient_accumulation_steps,
        "mix_sources": cfg.mix_sources,
        "sources": {
            feed.source.name: {
                "rows": feed.rows.digest() if feed.rows else feed.source.path,
                "share": share,
                "global_batch_size": feed.batch_size * world,
            }
            for feed, share in zip(feeds, plan.shares.tolist(), strict=True)
        },
    }
    if cfg.streaming:
        position |= {"num_processes": world, "shuffle_buffer_size": cfg.shuffle_buffer_size}
    this_run = {"position": position, "settings": settings_of(cfg)}
    if cfg.resume_from_checkpoint == "latest" and from_first(lambda: is_complete(cfg.output_dir, this_run)):
        say(f"already complete: {cfg.output_dir} holds the model that this run ends with")
        return 0
    resumed: dict[str, Any] | None = None
    checkpoint = ""
    if cfg.resume_from_checkpoint is not None:
        with user_errors():
            choice: list[Any] = [None, None]
            if is_main:
                try:
                    choice[0] = choose_checkpoint(cfg.resume_from_checkpoint, cfg.output_dir, say)
                except ValueError as error:
                    choice[1] = str(error)
            broadcast_object_list(choice)
            if choice[1] is not None:
                raise ValueError(choice[1])
            if choice[0] is not None:
                checkpoint = choice[0]
                resumed = read_run_state(checkpoint)
                changed = differences(resumed["position"], position)
                if changed and not cfg.allow_changed_data:
                    raise ValueError(
                        f"{checkpoint} was saved by another run, so its position means nothing here: "
                        f"{'; '.join(changed)}. Put that back, or go on regardless with --allow_changed_data"
                    )
                if resumed["step"] > num_steps:
                    raise ValueError(
                        f"{checkpoint} was saved after step {resumed['step']}, and this run ends after {num_steps}: name an "
                        "earlier checkpoint, or have it train for longer"
                    )
                if is_deepspeed != os.path.isdir(os.path.join(checkpoint, STATE, "deepspeed")):
                    raise ValueError(
                        f"{checkpoint} was saved {'without' if is_deepspeed else 'by'} DeepSpeed, and only the same can go "
                        f"on from it; to start anew from its weights, --model_name_or_path {checkpoint}"
                    )
                if is_deepspeed and resumed["num_processes"] != world:
                    raise ValueError(
                        f"{checkpoint} was saved by {resumed['num_processes']} processes: DeepSpeed goes on with as many"
                    )
                for change in [*changed, *differences(resumed["settings"], settings_of(cfg))]:
                    say(f"note: changed since {os.path.basename(os.path.normpath(checkpoint))}: {change}")
        if resumed is None:
            say("note: no checkpoint to go on from; this run starts afresh")

    # ---- streams; what local rows there are is known already
    if cfg.streaming:
        from bge_accel.data.streaming import RowStream

        states = None
        if resumed is not None and not differences(resumed["position"], position):
            states = resumed["streams"][rank]
        with user_errors():
            for number, feed in enumerate(feeds):
                feed.stream = RowStream(
                    feed.source.path,
                    seed=cfg.seed,
                    rank=rank,
                    num_ranks=world,
                    buffer_size=cfg.shuffle_buffer_size,
                    need_scores=cfg.knowledge_distillation,
                    state=states[number] if states else None,
                )

    # ---- tokenizer and model
    with user_errors():
        query_prefix = instruction_prefix(cfg.query_instruction_for_retrieval, cfg.query_instruction_format)
        passage_prefix = instruction_prefix(cfg.passage_instruction_for_retrieval, cfg.passage_instruction_format)
        encoder, tokenizer, settings = load_encoder(
            checkpoint or cfg.model_name_or_path,
            pooling=cfg.sentence_pooling_method,
            normalize=cfg.normalize_embeddings,
            query_prefix=query_prefix,
            passage_prefix=passage_prefix,
            config_name=None if checkpoint else cfg.config_name,
            tokenizer_name=None if checkpoint else cfg.tokenizer_name,
            trust_remote_code=cfg.trust_remote_code,
            longest=max(cfg.query_max_len, cfg.passage_max_len),
            gradient_checkpointing=cfg.gradient_checkpointing,
            lengths={"--query_max_len": cfg.query_max_len, "--passage_max_len": cfg.passage_max_len},
            cut_by={"query": "--query_max_len", "passage": "--passage_max_len"},
            other_prefixes=other_prefixes(cfg, feeds),
            cache_dir=cfg.cache_dir,
            token=cfg.token,
        )
        temperature = cfg.temperature
        if settings.normalize and temperature > 0.5:
            raise ValueError(
                f"--temperature is {temperature}: similarities of normalised embeddings lie in [-1, 1], so above 0.5 "
                "hardly anything is learnt; take 0.01 to 0.1, or --normalize_embeddings False"
            )
    if not settings.normalize and temperature != 1.0:
        say(f"note: embeddings are not normalised, so the temperature is 1 (not {temperature})")
        temperature = 1.0
    if cfg.fix_position_embedding:
        for name, parameter in encoder.named_parameters():
            if "position_embeddings" in name:
                parameter.requires_grad_(False)
    if device.type == "cpu" and cfg.activation_memory_budget != 0:  # where little is kept, it is memory that counts
        keep_freed_memory()
    if device.type == "cpu" and not cfg.torch_compile:  # which cannot look into these
        use_cpu_dropout(encoder.backbone)
        use_cpu_attention(encoder.backbone)
        if world == 1 and not is_sharded and not pure_bf16:
            add_gradients_in_place(encoder.backbone)
    kernel = cfg.attention
    if kernel == "auto":
        on_cpu_alone = device.type == "cpu" and not cfg.torch_compile
        kernel = "cpu" if on_cpu_alone and why_not(encoder.config) is None else "padded"
    is_packed = kernel != "padded"
    if is_packed:
        with user_errors():
            check_dropout(kernel, encoder.config)
            use_kernel(encoder.backbone, kernel)
    encoder.train()

    for feed in feeds:
        own = instruction_prefix(feed.source.query_instruction_for_retrieval, cfg.query_instruction_format)
        feed.query_prefix = settings.query_prefix if own is None else own
        own = instruction_prefix(feed.source.passage_instruction_for_retrieval, cfg.passage_instruction_format)
        feed.passage_prefix = settings.passage_prefix if own is None else own
        if feed.rows:
            feed.order = RowOrder(len(feed.rows), cfg.seed)

    # ---- batches: a pure function of (seed, batch index), prepared in a background thread
    schedule = SourceSchedule(plan.shares, cfg.seed)
    max_tokens = cfg.max_tokens_per_micro_batch or default_token_budget(
        device,
        encoder.config,
        bytes_per_value=4 if computes_in == "float32" else 2,
        checkpointing=cfg.gradient_checkpointing,
    )

    def query_prefix(feed: Feed, prompt: str | None) -> str:
        own = instruction_prefix(prompt, cfg.query_instruction_format)
        return feed.query_prefix if own is None else own

    def cost_in(source: int) -> Callable[[int], int]:
        """About how many tokens stand at a place of a source, or in all of them where they are mixed."""

        def cost(place: int) -> int:
            number, place = schedule[place] if cfg.mix_sources else (source, place)
            feed = feeds[number]
            assert feed.rows is not None and feed.order is not None
            epoch, row = feed.order[place]
            return expected_tokens(
                feed.rows.text_bytes(row),
                row,
                epoch,
                seed=cfg.seed,
                group_size=feed.group_size,
                query_max_len=cfg.query_max_len,
                passage_max_len=cfg.passage_max_len,
            )

        return cost

    def batches(first: int) -> Iterator[Batch]:
        for index in itertools.count(first) if cfg.max_steps > 0 else range(first, num_batches):
            source, turn = (0, index) if cfg.mix_sources else schedule[index]
            lead = feeds[source]
            examples, sources = [], []
            where = (turn, lead.batch_size, world, rank, plan.end_of_data)
            for place in batch_positions(*where) if cfg.streaming else balanced_positions(*where, cost_in(source)):
                if cfg.mix_sources:
                    source, place = schedule[place]
                feed = feeds[source]
                if feed.stream is not None:
                    rows, row, epoch, key = feed.stream.take(1)[0]
                    if prompt := rows[row].get("prompt"):
                        prefix = query_prefix(feed, prompt)
                        check_prefix(tokenizer, prefix, cfg.query_max_len, "--query_max_len", "query", rows.place(row))
                else:
                    assert feed.rows is not None and feed.order is not None
                    rows, (epoch, row) = feed.rows, feed.order[place]
                    key = row
                examples.append(
                    draw_example(
                        rows,
                        row,
                        epoch,
                        key=key,
                        seed=cfg.seed,
                        group_size=feed.group_size,
                        query_prefix=partial(query_prefix, feed),
                        passage_prefix=feed.passage_prefix,
                        shuffle_ratio=cfg.shuffle_ratio,
                        teacher_scores=cfg.knowledge_distillation,
                    )
                )
                sources.append(source)
            token_ids = tokenize(tokenizer, [example.query for example in examples], cfg.query_max_len)
            passages = [text for example in examples for text in example.passages]
            token_ids += tokenize(tokenizer, passages, cfg.passage_max_len)
            tokens = make_token_batch(
                token_ids,
                pad_token_id=tokenizer.pad_token_id,
                max_tokens=max_tokens,
                pad_to_multiple_of=cfg.pad_to_multiple_of,
                packed_for=encoder.config if is_packed else None,
            )
            streams = [feed.stream for feed in feeds if feed.stream is not None]
            yield Batch(
                examples,
                sources,
                lead,
                tokens,
                [stream.state_dict() for stream in streams],
                [stream.epochs_done for stream in streams],
            )

    # ---- optimiser and schedule; the schedule counts optimiser steps, whatever the number of processes
    trained = [p for p in encoder.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter is a flat part of itself and keeps its true shape aside.
    decayed = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    optimizer: Any = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_epsilon,
        fused=cfg.optim == "adamw_torch_fused",
    )
    with user_errors():
        warmup = cfg.warmup_steps or math.ceil(cfg.warmup_ratio * num_steps)
        scheduler = get_scheduler(cfg.lr_scheduler_type, optimizer, warmup, num_steps)

    work = flops_per_token(encoder)

    # Under ZeRO-3 a parameter keeps its true size aside. DeepSpeed keeps float32 weights beside Adam's two moments.
    model_bytes, trained_bytes = (
        sum(getattr(p, "ds_numel", p.numel()) * p.itemsize for p in of) for of in (encoder.parameters(), trained)
    )
    state_bytes = (3 if is_deepspeed else 2) * trained_bytes

    # ---- hand both to accelerate
    if is_deepspeed:
        configure_deepspeed(
            accelerator, per_device_batch_size=cfg.per_device_train_batch_size, max_grad_norm=cfg.max_grad_norm
        )
    half = Bf16Copy(encoder.to(device)) if pure_bf16 else None
    computing = encoder if half is None else half.model
    if cfg.torch_compile:
        with user_errors():
            compile_layers(computing.backbone, device)
    model, optimizer = accelerator.prepare(computing, optimizer)
    engine = accelerator.deepspeed_engine_wrapped.engine if is_deepspeed else None
    if is_sharded:  # weights are gathered in each pass; what is kept is up to FSDP and DeepSpeed
        activations = ActivationBudget(0)
    elif cfg.activation_memory_budget is not None:
        activations = ActivationBudget(cfg.activation_memory_budget * 1e9)
    else:
        num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        activations = ActivationBudget(automatic_activation_bytes(device, num_parameters, local_processes))

    # ---- go on where the checkpoint stood
    step, skipped, saved_epoch, first_batch = 0, 0, 0, 0
    if resumed is not None:
        step, skipped, saved_epoch = resumed["step"], resumed["skipped"], resumed["saved_epoch"]
        first_batch = resumed["batches"]
        # The rate is a function of the step alone, by the present flags.
        rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict(
            {**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        )
        if engine is not None:
            engine.load_checkpoint(os.path.join(checkpoint, STATE), tag="deepspeed")
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        else:
            with user_errors():
                load_optimizer_tensors(encoder, optimizer, read_optimizer(checkpoint), rates)
        if best is not None and resumed["best"] is not None:
            best.load_state_dict(resumed["best"])
        if accelerator.scaler is not None and resumed["scaler"] is not None:
            accelerator.scaler.load_state_dict(resumed["scaler"])
        # As many graphs are kept as before: the order in which gradients are summed decides their last bits.
        if resumed["num_processes"] == world and cfg.activation_memory_budget == resumed["settings"].get(
            "activation_memory_budget"
        ):
            activations.bytes_per_token = resumed["bytes_per_token"]
            activations.max_bytes = resumed["activation_bytes"] if on_cpu else activations.max_bytes
        if resumed["num_processes"] == world:
            with user_errors():
                set_random_state(resumed["random"][rank], device)
        else:
            set_seed((cfg.seed + step + rank) % 2**32)

    # ---- from here on files are written
    accelerator.wait_for_everyone()
    with user_errors():
        later = [path for at, path in find_checkpoints(cfg.output_dir) if at > step]
        if later and cfg.resume_from_checkpoint != "latest" and not cfg.overwrite_output_dir:
            raise ValueError(
                f"--output_dir holds {os.path.basename(later[0])}, later than where this run begins; move it away, or "
                "have it removed by --overwrite_output_dir"
            )
        there = [path for at, path in find_checkpoints(cfg.output_dir) if at <= step]
        room = room_for_run(
            model_bytes,
            state_bytes,
            num_saves=saves_left(cfg, step, num_steps, plan.num_epochs or 0, saved_epoch),
            num_there=len(there),
            limit=cfg.save_total_limit,
            keeps_best=cfg.load_best_model_at_end,
        )
        remedy = (
            "make room, name another folder, or keep fewer checkpoints: --save_total_limit 1, a larger --save_steps"
        )
        from_first(lambda: check_room(cfg.output_dir, room, remedy))
    accelerator.wait_for_everyone()
    if is_main:
        with saving_errors(step, cfg.output_dir):
            os.makedirs(cfg.output_dir, exist_ok=True)
            remove_leftovers(cfg.output_dir)
            for path in later if cfg.resume_from_checkpoint != "latest" else ():
                say(f"note: {path}, of an earlier run, is removed")
                remove_checkpoint(path)
            for name in (
                (REQUEUE, SAVED) if resumed is None else (REQUEUE,)
            ):  # begun afresh, it is not complete any more
                if os.path.exists(os.path.join(cfg.output_dir, name)):
                    os.remove(os.path.join(cfg.output_dir, name))
            with open(os.path.join(cfg.output_dir, "run_config.yaml"), "w", encoding="utf-8") as file:
                file.write(to_yaml(without_secrets(cfg)))
    if best is not None and best.value is not None and cfg.load_best_model_at_end:
        kept = best.value, best.step
        with saving_errors(step, cfg.output_dir):
            is_kept = from_first(lambda: keep_best(kept[1], checkpoint, cfg.output_dir))
        if not is_kept:
            best.forget()
            say(
                f"warning: the best {best.metric} so far was {kept[0]:.4f}, but the weights of step {kept[1]} are not there "
                "any more; what is best is decided among the measurements from here on"
            )
    trackers = cfg.report_to != ["none"]
    if trackers:
        names = {tracker: {"name": cfg.run_name} for tracker in ("wandb", "trackio") if cfg.run_name}
        flat = {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in asdict(without_secrets(cfg)).items()
        }
        accelerator.init_trackers("bge_accel", config=flat, init_kwargs=names)
    log_path, license = os.path.join(cfg.output_dir, "train_log.jsonl"), dict[str, str]()
    if is_main:
        license = license_of(cfg.model_name_or_path, cache_dir=cfg.cache_dir, token=cfg.token)
    with user_errors(), saving_errors(step, cfg.output_dir):
        has_measured = best is None or best.last_step == step
        measured = from_first(lambda: rewind_log(log_path, resumed and resumed["step"], has_measured=has_measured))

    amount = "rows from streams" if cfg.streaming else f"{num_rows:,} rows"
    epochs = f" ({plan.num_epochs:.2f} epochs)" if plan.num_epochs is not None else ""
    say(
        f"{amount}, {num_steps:,} steps{epochs}, global batch {plan.queries_per_step:g} queries "
        f"({world} process(es) x {plan.queries_per_batch / world:g} x {cfg.gradient_accumulation_steps} accumulated); each query meets "
        f"{plan.met(0)}; {settings.pooling} pooling, "
        f"{'' if settings.normalize else 'not '}normalised, temperature {temperature:g}; "
        f"{computes_in} on {device.type}; query "
        f"instruction {shorten(settings.query_prefix)}"
    )
    for name, held_out in eval_sets.items():
        say(f"  measured on {name}: {len(held_out.queries.ids):,} queries among {len(held_out.corpus.ids):,} passages")
    for number, (feed, share) in enumerate(zip(feeds if len(feeds) > 1 else (), plan.shares.tolist(), strict=False)):
        say(
            f"  {share:.1%} {feed.source.name}: {f'{len(feed.rows):,} rows' if feed.rows else 'a stream'}, {feed.batch_size} "
            f"queries a process, each meets {plan.met(number)}; query instruction "
            f"{shorten(feed.query_prefix)}"
        )
    if resumed is not None:
        say(f"going on after step {step:,} of {checkpoint}")
    if cfg.negatives_cross_device and world == 1:
        say("note: --negatives_cross_device has no effect on one process")
    if cfg.streaming and cfg.cache_path is not None:
        say("note: --cache_path has no effect on streams: nothing of them is kept")
    if dropped:
        say(f"note: {dropped:,} rows of small files are left out (--drop_threshold {cfg.drop_threshold})")
    if cfg.streaming and cfg.max_example_num_per_dataset < 100_000_000:
        say("note: --max_example_num_per_dataset has no effect on streams")
    if rows_without_negatives:
        say(f"note: {rows_without_negatives:,} rows have no negatives; theirs are drawn from other rows' passages")
    for feed in feeds:
        if feed.rows and (note := too_few_negatives(feed.rows, feed.group_size)):
            say(f"note: {f'{feed.source.name}: ' if len(feeds) > 1 else ''}{note}")
    if cfg.use_inbatch_neg and any("no_in_batch_neg" in os.path.abspath(path) for path in cfg.train_data):
        say(
            "note: a folder's name turns nothing off here: for data without in-batch negatives, --use_inbatch_neg False"
        )
    if is_sharded and cfg.activation_memory_budget is not None:
        say("note: --activation_memory_budget has no effect under FSDP and DeepSpeed: all activations are recomputed")
    if is_deepspeed:
        say(
            "note: optimiser, schedule, accumulation, clipping and batch size come from the flags, not DeepSpeed's file"
        )

    def log(record: dict[str, Any]) -> None:
        """One line of the log; the file is opened anew, as one that has been removed could be written all the same."""
        if is_main:
            with saving_errors(record["step"], cfg.output_dir), open(log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def save_checkpoint(step: int, num_batches: int, streams: list[dict]) -> None:
        """The model and the state of training as a folder `checkpoint-STEP`; all processes take part."""
        weights = whole_state_dict(accelerator, model) if is_sharded else None
        tensors = optimizer_tensors(encoder, optimizer) if not is_deepspeed and (is_main or is_sharded) else None
        state = {
            "step": step,
            "batches": num_batches,
            "skipped": skipped,
            "saved_epoch": saved_epoch,
            "best": best.state_dict() if best is not None else None,
            "num_processes": world,
            "position": position,
            "settings": settings_of(cfg),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "activation_bytes": activations.max_bytes,
            "bytes_per_token": activations.bytes_per_token,
            "random": gather_object([random_state(device)]),
            "streams": gather_object([streams]),
        }
        path = os.path.join(cfg.output_dir, f"checkpoint-{step}")
        with atomic_folder(path) if is_main else nullcontext(f"{path}.incomplete") as folder:
            accelerator.wait_for_everyone()  # the folder is there
            if engine is not None:
                engine.save_checkpoint(os.path.join(folder, STATE), tag="deepspeed")
            if is_main:
                save_encoder(
                    folder,
                    encoder,
                    tokenizer,
                    settings,
                    state_dict=weights,
                    model_card=card_of(cfg, settings, num_rows, step, license, measured),
                )
                write_state(folder, state, tensors)
                with open(os.path.join(folder, STATE, "run_config.yaml"), "w", encoding="utf-8") as file:
                    file.write(to_yaml(without_secrets(cfg)))
            accelerator.wait_for_everyone()
            if is_main:
                write_manifest(folder)
        if is_main and cfg.save_total_limit is not None:
            earlier = [path for at, path in find_checkpoints(cfg.output_dir) if at < step]
            for path in earlier[: max(len(earlier) - cfg.save_total_limit + 1, 0)]:
                remove_checkpoint(path)
        accelerator.wait_for_everyone()

    def save_model(step: int, name: str) -> None:
        """The model as it is, in a folder inside the run's, complete or not at all."""
        weights = whole_state_dict(accelerator, model) if is_sharded else None
        if is_main:
            with atomic_folder(os.path.join(cfg.output_dir, name)) as folder:
                save_encoder(
                    folder,
                    encoder,
                    tokenizer,
                    settings,
                    state_dict=weights,
                    model_card=card_of(cfg, settings, num_rows, step, license, measured),
                )
                note_saved(folder, step)
        accelerator.wait_for_everyone()

    encoding = EncodingSettings(
        settings.query_prefix, settings.passage_prefix, cfg.query_max_len, cfg.passage_max_len, max_tokens
    )

    def measure(step: int) -> bool:
        """Retrieval on each of `eval_data` by all processes, into the log; the best weights so far are kept.

        Returns whether the run's patience is at its end.
        """
        assert best is not None
        started = time.perf_counter()
        # Compiled, the layers would be compiled anew for what encoding does to them.
        with torch.compiler.set_stance("force_eager") if cfg.torch_compile else nullcontext():
            metrics = {
                name: evaluate_in_training(model, tokenizer, data, encoding, device=device)
                for name, data in eval_sets.items()
            }
        seconds = time.perf_counter() - started
        measured[step] = metrics
        is_best = best.update(step, metrics)
        shown = "  ".join(f"{name} {values[best.metric]:.4f}" for name, values in metrics.items())
        say(f"step {step}/{num_steps}  {best.metric}: {shown}{'  (best so far)' if is_best else ''}  {seconds:.1f} s")
        log({"step": step, "eval": metrics, "eval_seconds": seconds})
        if trackers:
            figures = {f"eval/{name}/{key}": value for name, of in metrics.items() for key, value in of.items()}
            accelerator.log(figures | {"eval/seconds": seconds}, step=step)
        if is_best and cfg.load_best_model_at_end:
            with saving_errors(step, cfg.output_dir):
                save_model(step, BEST)
        window.start += time.perf_counter() - started  # rates are those of training
        if cfg.early_stopping_patience is None or best.waited < cfg.early_stopping_patience or step == num_steps:
            return False
        say(f"stopping early: {best.waited} measurements in a row were not better than that of step {best.step}")
        return True

    def batches_read() -> Iterator[Batch]:
        with user_errors(by_all=True):  # a stream is checked as it is read
            yield from prefetch(batches(first_batch))

    # ---- the loop
    bar = progress(num_steps, "training", "step", shown=is_main and not cfg.disable_tqdm, initial=step)
    window, stopped, unchecked = Window(len(feeds), device), 0, None
    is_end = step == num_steps
    # A run that was stopped at a step with a measurement has saved at once.
    if best is not None and best.last_step != step and (step % cfg.eval_steps == 0 if step else cfg.eval_on_start):
        is_end |= measure(step)
    for index, batch in enumerate(() if is_end else batches_read(), start=first_batch):
        if cfg.stopping_strategy != "repeat":
            first = cfg.stopping_strategy == "first_exhausted"
            ended = int((max if first else min)(batch.passes) > 0)
            if largest(ended, device) if first else -largest(-ended, device):
                say(f"the streams end after {step:,} steps (--stopping_strategy {cfg.stopping_strategy})")
                break
        feed, num_queries, tokens = batch.feed, len(batch.examples), batch.tokens
        if is_sharded:
            tokens = split_micro_batches(tokens, largest(len(tokens.micro_batches), device))
        in_step = index % cfg.gradient_accumulation_steps
        accumulated = cfg.gradient_accumulation_steps
        if cfg.max_steps < 1:
            accumulated = min(accumulated, num_batches - (index - in_step))
        last = in_step == accumulated - 1

        def loss_fn(
            emb: torch.Tensor, batch: Batch = batch, feed: Feed = feed, num_queries: int = num_queries
        ) -> tuple[Any, Any]:
            q_emb, p_emb = emb[:num_queries], emb[num_queries:]
            passage_ids = np.array([i for example in batch.examples for i in example.passage_ids], dtype=np.int64)
            first_query, across = 0, cfg.negatives_cross_device and feed.in_batch_negatives
            if across:
                p_emb, first_query = gather_with_grad(p_emb), rank * num_queries
                if world > 1 and cfg.mask_false_negatives:
                    passage_ids = gather(torch.from_numpy(passage_ids).to(device)).cpu().numpy()
            masked = None
            if cfg.mask_false_negatives:
                known_ids = [example.known_ids for example in batch.examples]
                if cfg.streaming:  # each of its rows knows of its own block alone
                    query_ids = [example.query_id for example in batch.examples]
                    known = torch.tensor([(q, i) for q, ids in zip(query_ids, known_ids, strict=True) for i in ids])
                    known = gather_uneven(known.to(device)).cpu() if across else known
                    known_ids = known_to_any(query_ids, known.numpy())
                pairs = known_positive_pairs(
                    known_ids,
                    passage_ids,
                    group_size=feed.group_size,
                    first_query=first_query,
                )
                if not feed.in_batch_negatives:  # other groups' passages are not met anyway
                    own = pairs[1] // feed.group_size == pairs[0]
                    pairs = pairs[0][own], pairs[1][own]
                masked = to_device(torch.from_numpy(pairs[0]), device), to_device(torch.from_numpy(pairs[1]), device)
            teacher = None
            if cfg.knowledge_distillation:
                scores = np.array([example.teacher_scores for example in batch.examples], dtype=np.float32)
                teacher = to_device(torch.from_numpy(scores), device)
            output = contrastive_loss(
                q_emb,
                p_emb,
                temperature=temperature,
                group_size=feed.group_size,
                first_query=first_query,
                in_batch_negatives=feed.in_batch_negatives,
                masked=masked,
                teacher_scores=teacher,
            )
            return output.loss, (output, 0 if masked is None else len(masked[0]))

        def scale_loss(loss: torch.Tensor, accumulated: int = accumulated) -> torch.Tensor:
            loss = loss / accumulated
            return accelerator.scaler.scale(loss) if accelerator.scaler is not None else loss

        output, num_masked = embed_and_backward(
            model,
            tokens,
            loss_fn,
            device=device,
            packed_for=encoder.config if is_packed else None,
            activations=activations,
            scale_loss=scale_loss,
            no_sync=nullcontext if is_sharded else lambda: accelerator.no_sync(model),
            backward=deepspeed_backward(engine) if is_deepspeed else None,
            last=last,
        )
        if unchecked is not None:
            unchecked.check()
        unchecked = StepLoss(to_host(output.loss), step + 1, batch)
        window.add(output, num_masked, batch)
        if half is not None and (last or world == 1):  # before, other processes' parts are still missing
            half.move_gradients()
        if not last:
            continue

        rate, scaler = scheduler.get_last_lr()[0], accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 1.0
        if engine is not None:  # clips, steps and forgets the gradients in one
            engine.step()
            norm = engine.get_global_grad_norm()
        else:
            weights = model if half is None else encoder
            norm = accelerator.clip_grad_norm_(weights.parameters(), cfg.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            if half is not None:
                half.take_weights()
        # A fused optimiser is called even where it skips, so accelerate's own flag is blind to it.
        skips = (
            scaler.get_scale() < scale if scaler is not None else engine is not None and not engine.was_step_applied()
        )
        if not skips:
            scheduler.step()
            step += 1
            bar.update()
        else:  # float16 overflowed; the loss scale is lowered, and neither the step nor the schedule moves
            skipped += 1
        is_end = step == num_steps or (cfg.max_steps < 1 and index == num_batches - 1)
        stopped = 0 if is_end else largest(stop.number, device)
        if skips and not is_end and not stopped:
            continue
        epoch = max(batch.passes) if cfg.streaming else (index + 1) * plan.queries_per_batch / num_rows
        epoch_done = int(epoch)
        logged = step % cfg.logging_steps == 0 or (step == 1 and cfg.logging_first_step)
        measured_now = best is not None and not skips and step % cfg.eval_steps == 0 and not stopped
        due = (cfg.save_strategy == "steps" and step % cfg.save_steps == 0) or (
            cfg.save_strategy == "epoch" and epoch_done > saved_epoch
        )
        if logged or measured_now or due or is_end or stopped:
            unchecked.check()
        if (logged and not skips) or is_end:
            record = {
                "step": step,
                "epoch": round(epoch, 4),
                **window.summary(accelerator, [feed.source.name for feed in feeds], work),
                "learning_rate": rate,
                "grad_norm": whole(norm),
                "memory_gb": peak_memory_gb(device),
                "skipped_steps": skipped,
            }
            window = Window(len(feeds), device)
            say(log_line(record, num_steps))
            log(record)
            if trackers:
                figures = {key: value for key, value in record.items() if key not in ("step", "sources")}
                for name, of_source in record.get("sources", {}).items():
                    figures |= {f"{key}/{name}": value for key, value in of_source.items()}
                accelerator.log(figures, step=step)
        if measured_now:
            is_end |= measure(step)
        if (due and not is_end) or stopped:
            saved_epoch = epoch_done
            with saving_errors(step, cfg.output_dir):
                save_checkpoint(step, index + 1, batch.streams)
        if is_end or stopped:
            break
    bar.close()
    if unchecked is not None:
        unchecked.check()
    if best is not None and not stopped and best.last_step != step:
        measure(step)

    # ---- save
    if stopped:
        if is_main:
            marker = os.path.join(cfg.output_dir, REQUEUE)
            with saving_errors(step, cfg.output_dir), open(marker, "w", encoding="utf-8") as file:
                file.write(f"stopped after step {step}\n")
        why = stop.received or "a signal to another process"
        say(f"stopped by {why}: checkpoint-{step} is saved; go on with --resume_from_checkpoint latest")
    else:
        with saving_errors(step, cfg.output_dir):
            if best is not None and cfg.load_best_model_at_end:
                say(f"the best {best.metric} was {best.value:.4f}, after step {best.step}")
            else:
                save_model(step, LAST)
            if is_main:
                saved = os.path.join(cfg.output_dir, BEST if cfg.load_best_model_at_end else LAST)
                note_complete(saved, this_run)
                move_into(saved, cfg.output_dir)
            accelerator.wait_for_everyone()
        say(f"saved {cfg.output_dir}")
    for tracker in accelerator.trackers:
        tracker.finish()
    return 128 + stopped if stopped == signal.SIGINT else 0


def saves_left(cfg: Config, step: int, num_steps: int, epochs: float, saved_epoch: int) -> int:
    """How many checkpoints are still to be written after a step; of streams saved by epochs, at least as many."""
    if cfg.save_strategy == "no":
        return 0
    if cfg.save_strategy == "epoch":
        return max(math.ceil(epochs) - 1 - saved_epoch, 0)
    return max((num_steps - 1) // cfg.save_steps - step // cfg.save_steps, 0)


def settings_of(cfg: Config) -> dict[str, Any]:
    """What is learnt and how: the settings whose change since a checkpoint is worth a word."""
    left_out = (
        "train_data output_dir cache_path token overwrite_output_dir resume_from_checkpoint allow_changed_data seed "
        "per_device_train_batch_size gradient_accumulation_steps mix_sources shuffle_buffer_size save_steps "
        "save_strategy save_total_limit logging_steps logging_first_step report_to run_name disable_tqdm"
    ).split()
    return {key: value for key, value in asdict(cfg).items() if key not in left_out}


def too_few_negatives(rows: TrainingRows, group_size: int) -> str | None:
    """What is said of rows whose negatives repeat within a group, and which group size would not have it."""
    few, fills = repeated_negatives(rows.num_negatives(), group_size)
    if not len(few):
        return None
    way_out = f"; take --train_group_size {fills}, or mine more" if fills < group_size else ""
    return (
        f"{len(few):,} of {len(rows):,} rows have fewer negatives than the {group_size - 1} of --train_group_size "
        f"{group_size}, so these repeat within a group{way_out}"
    )


def whole(norm: Any) -> float | None:
    """A gradient norm as a number: FSDP2 gives it in parts, DeepSpeed's stage 0 not at all."""
    return None if norm is None else float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class StepLoss(NamedTuple):
    """The loss of a step, looked at when the next has begun, so that a GPU is not waited for."""

    loss: Callable[[], np.ndarray]
    step: int
    batch: Batch

    def check(self) -> None:
        """Ends the program where it is no number."""
        if math.isfinite(loss := self.loss().item()):
            return
        places = ", ".join(example.rows.place(example.row) for example in self.batch.examples)
        sys.exit(
            printable(
                f"finetune.py: error: step {self.step}: the loss is {loss} on the rows {places}; lower --learning_rate, or "
                "look at these rows. Nothing was saved from this step on; earlier checkpoints are untouched"
            )
        )


class Window:
    """What happened since the last log line, on this process. Its sums stay on the device until they are asked for."""

    def __init__(self, num_sources: int, device: Any) -> None:
        import torch

        self.start = time.perf_counter()
        self.sums = torch.zeros(4, device=device)
        """Loss, accuracy, similarity of the positives, of the hardest negatives."""
        self.of_sources = torch.zeros(num_sources, 3, device=device)
        """Queries, sum of their losses, and how many have their positive first."""
        self.counts = np.zeros(6)
        """Batches, masked scores, queries, tokens, padding, pairs of tokens."""

    def add(self, output: Any, num_masked: int, batch: Batch) -> None:
        import torch

        from bge_accel.encoding.transfer import to_device

        tokens, num_queries = batch.tokens, len(batch.examples)
        if len(self.of_sources) > 1:
            sources = to_device(torch.tensor(batch.sources), self.sums.device)
            found = output.query_losses, output.query_correct
            figures = torch.stack([torch.ones_like(found[0]), *found], dim=1).float()
            self.of_sources.index_add_(0, sources, figures)
        figures = output.loss, output.accuracy, output.positive_similarity, output.hardest_negative_similarity
        self.sums += torch.stack([figure.detach() for figure in figures]).nan_to_num(0)  # a query may meet no negative
        counts = 1, num_masked, num_queries, tokens.num_tokens, tokens.num_padding, tokens.num_token_pairs
        self.counts += counts

    def summary(self, accelerator: Any, names: list[str], work: tuple[float, float]) -> dict[str, Any]:
        """Means and rates over all processes; where there are several sources, also of each that occurred.

        Args:
            work: `flops_per_token` of the model.
        """
        import torch

        from bge_accel.models.flops import peak_flops

        counts = torch.tensor(self.counts, dtype=torch.float32, device=accelerator.device)
        local = torch.cat([counts, self.sums, self.of_sources.flatten()])
        values = accelerator.reduce(local, reduction="sum").tolist()
        batches, masked, queries, tokens, padding, pairs, loss, accuracy, positive, negative = values[:10]
        of_sources = {
            name: {"loss": total / count, "accuracy": correct / count, "queries": count}
            for name, (count, total, correct) in zip(names, np.reshape(values[10:], (-1, 3)).tolist(), strict=True)
            if count
        }
        seconds = time.perf_counter() - self.start
        # The backward pass takes twice what the forward pass does.
        flops = 3 * (work[0] * tokens + work[1] * pairs) / seconds / accelerator.num_processes
        peak = peak_flops(accelerator.device)
        return {
            "loss": loss / batches,
            "accuracy": accuracy / batches,
            "positive_similarity": positive / batches,
            "hardest_negative_similarity": negative / batches,
            "masked_per_query": masked / queries,
            "queries_per_second": queries / seconds,
            "tokens_per_second": tokens / seconds,
            "padding": padding / (tokens + padding),
            "tflops": flops / 1e12,
            **({"mfu": flops / peak} if peak else {}),
            **({"sources": of_sources} if len(names) > 1 else {}),
        }


def log_line(record: dict[str, Any], num_steps: int) -> str:
    return (
        f"step {record['step']}/{num_steps}  loss {record['loss']:.4f}  accuracy {record['accuracy']:.3f}  "
        f"lr {record['learning_rate']:.2e}  grad norm {record['grad_norm'] or math.nan:.2f}  "
        f"{record['queries_per_second']:.1f} queries/s  {record['tokens_per_second']:,.0f} tokens/s  "
        f"padding {record['padding']:.1%}  {record['tflops']:.2f} TFLOP/s"
        + (f" (MFU {record['mfu']:.0%})" if "mfu" in record else "")
        + f"  masked {record['masked_per_query']:.2f}/query  "
        f"memory {record['memory_gb']:.1f} GB"
        + (f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else "")
        + "".join(
            f"\n    {name}: loss {figures['loss']:.4f}  accuracy {figures['accuracy']:.3f}"
            for name, figures in record.get("sources", {}).items()
        )
    )


def peak_memory_gb(device: Any) -> float:
    """The most memory held so far: of the GPU, else of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def rewind_log(path: str, step: int | None, *, has_measured: bool) -> dict[int, dict[str, dict[str, float]]]:
    """Takes out of a training log what comes again after a step; the metrics that stay, by step and data set.

    Args:
        step: None where a run begins, of which nothing stays.
        has_measured: whether what was measured at the step itself does not come again.

    Raises:
        ValueError: a line is none of a log.
    """
    kept, measured = list[bytes](), dict[int, Any]()
    if step is not None and os.path.exists(path):
        with open(path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # the last one may be cut
                    row = log_row(path, line)
                    if row["step"] < step or (row["step"] == step and (has_measured or "eval" not in row)):
                        kept.append(line)
                        measured |= {row["step"]: row["eval"]} if "eval" in row else {}
    with open(f"{path}.part", "wb") as file:
        file.writelines(kept)
    os.replace(f"{path}.part", path)
    return measured


def log_row(path: str, line: bytes) -> dict[str, Any]:
    """One line of the training log; ValueError where it is none."""
    try:
        row = decode_json(line)
        if isinstance(row["step"], int):
            return row
    except (ValueError, LookupError, TypeError):
        pass
    raise ValueError(f"{path}: {shorten(line)} is no line of a log; move the file away to resume")


def without_secrets(cfg: Config) -> Config:
    return Config(**{**asdict(cfg), "token": None})


def card_of(
    cfg: Config,
    settings: Any,
    num_rows: int,
    step: int,
    license: dict[str, str],
    measured: dict[int, dict[str, dict[str, float]]],
) -> str:
    """README.md of the saved model. Folders are nobody else's business: their last parts say enough.

    Args:
        measured: metrics of each data set at the steps where they were measured.
    """

    def last_part(value: Any) -> Any:
        if isinstance(value, list):
            return [last_part(item) for item in value]
        return os.path.basename(os.path.normpath(value)) if isinstance(value, str) and os.path.isabs(value) else value

    shown = without_secrets(cfg)
    for name in (
        "model_name_or_path", "output_dir", "config_name", "tokenizer_name", "cache_dir", "cache_path", "eval_data",
        "deepspeed", "resume_from_checkpoint",
    ):  # fmt: skip
        setattr(shown, name, last_part(getattr(shown, name)))
    shown.train_data = [os.path.basename(os.path.normpath(path)) for path in shown.train_data]
    rows = "streamed rows" if cfg.streaming else f"{num_rows:,} rows"
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
