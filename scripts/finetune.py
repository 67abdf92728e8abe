"""Fine-tune a text-embedding model on rows of {"query", "pos", "neg"}.

On one CPU or GPU:

    python scripts/finetune.py --model_name_or_path BAAI/bge-small-en-v1.5 --train_data train.jsonl --output_dir tuned

On several GPUs, negatives shared among them:

    accelerate launch --multi_gpu --num_processes 8 scripts/finetune.py --model_name_or_path BAAI/bge-base-en-v1.5 \\
        --train_data train.jsonl --output_dir tuned --bf16 --per_device_train_batch_size 128 --negatives_cross_device

Every flag may also stand in a YAML file: --config run.yaml (the command line wins).
"""

import importlib.util
import itertools
import json
import math
import os
import resource
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bge_accel.config import check_model_path, option, parse_config, required, to_yaml, user_errors
from bge_accel.data import Example, RowOrder, TrainingRows, batch_positions, draw_example, shorten
from bge_accel.refused_flags import REFUSED
from bge_accel.sharding import read_deepspeed_config

if TYPE_CHECKING:
    from bge_accel.batching import TokenBatch

# Heavy packages are imported inside main(), after the arguments and the data have been checked.


@dataclass(kw_only=True)
class Config:
    """What to learn. How to run (processes, sharding) is told to `accelerate launch`."""

    model_name_or_path: str = required("folder or hub name of the model to start from", group="model")
    output_dir: str = required("folder for the tuned model, its log and checkpoints", group="saving and logging")
    train_data: list[str] = required("files, globs or folders of rows (.jsonl, .json, .gz, .zst)", group="data")

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

    train_group_size: int = option(8, "passages per query: 1 positive and N - 1 negatives", group="data")
    query_max_len: int = option(32, "tokens that a query is cut to, special tokens included", group="data")
    passage_max_len: int = option(128, "tokens that a passage is cut to, special tokens included", group="data")
    query_instruction_for_retrieval: str | None = option(
        None, 'put before each query; "" for none; default: what the model says of itself', group="data"
    )
    query_instruction_format: str = option("{}{}", "how instruction and query are joined", group="data")
    passage_instruction_for_retrieval: str | None = option(
        None, 'put before each passage; "" for none; default: what the model says of itself', group="data"
    )
    passage_instruction_format: str = option("{}{}", "how instruction and passage are joined", group="data")
    max_example_num_per_dataset: int = option(100_000_000, "take a random sample of larger files", group="data")
    shuffle_ratio: float = option(0.0, "chance that a long positive has its parts put in random order", group="data")
    pad_to_multiple_of: int | None = option(None, "round padded lengths up to a multiple of this", group="data")
    dataloader_drop_last: bool = option(False, "drop the batches at the end that do not fill a step", group="data")
    cache_path: str | None = option(None, "accepted for FlagEmbedding's sake; nothing is cached", group="data")

    temperature: float = option(0.02, "similarities are divided by it; 1 where not normalised", group="loss")
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
        group="optimisation",
    )
    num_train_epochs: float = option(3.0, "passes over the data", group="optimisation")
    max_steps: int = option(-1, "optimiser steps, instead of epochs", group="optimisation")
    per_device_train_batch_size: int = option(
        32, "queries per process (FlagEmbedding has 8; more negatives teach more)", group="optimisation"
    )
    gradient_accumulation_steps: int = option(
        1, "batches per optimiser step; they share no negatives", group="optimisation"
    )
    warmup_ratio: float = option(
        0.1, "share of the steps in which the rate rises (FlagEmbedding: 0)", group="optimisation"
    )
    warmup_steps: int = option(0, "steps in which the rate rises; wins over --warmup_ratio", group="optimisation")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = option("linear", "how the rate falls", group="optimisation")
    weight_decay: float = option(0.0, "of AdamW; not on biases and norms", group="optimisation")
    adam_beta1: float = option(0.9, "of AdamW", group="optimisation")
    adam_beta2: float = option(0.999, "of AdamW", group="optimisation")
    adam_epsilon: float = option(1e-8, "of AdamW", group="optimisation")
    optim: Literal["adamw_torch_fused", "adamw_torch"] = option("adamw_torch_fused", "", group="optimisation")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 for never", group="optimisation")
    seed: int = option(42, "of data order, drawn passages and dropout", group="optimisation")

    fp16: bool = option(False, "float16 (GPU); without a GPU bfloat16, else float32", group="precision and memory")
    bf16: bool = option(False, "bfloat16; without hardware for it float32", group="precision and memory")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] | None = option(
        None,
        "auto is bfloat16 where the hardware has it, else float32; default: what `accelerate launch` was told",
        group="precision and memory",
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations layer by layer: less memory, a third more time", group="precision and memory"
    )
    max_tokens_per_micro_batch: int | None = option(
        None, "padded tokens in one forward pass; default: what suits the device", group="precision and memory"
    )
    activation_memory_budget: float | None = option(
        None,
        "GB of activations to keep for the backward pass; the rest is computed again, for up to a third more time; "
        "0 keeps none; default: most of the memory that is free",
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
    save_steps: int = option(500, "steps between checkpoints (checkpoint-STEP)", group="saving and logging")
    save_total_limit: int | None = option(None, "keep the last N checkpoints", group="saving and logging")
    logging_steps: int = option(10, "steps between log lines (FlagEmbedding: 500)", group="saving and logging")
    logging_first_step: bool = option(False, "log the first step too", group="saving and logging")
    report_to: list[str] = option(
        ["none"], "trackers: none, tensorboard, wandb, trackio, all", group="saving and logging"
    )
    run_name: str | None = option(None, "the run's name for the trackers", group="saving and logging")
    disable_tqdm: bool = option(False, "no progress bar", group="saving and logging")


class Batch(NamedTuple):
    """One process's share of a global batch, ready for the encoder."""

    examples: list[Example]
    tokens: "TokenBatch"
    """All queries, then all passages."""


def check(cfg: Config) -> None:
    """Raises ValueError for settings that cannot work, before anything is loaded or written."""
    for name in (
        "train_group_size", "query_max_len", "passage_max_len", "per_device_train_batch_size", "save_steps",
        "gradient_accumulation_steps", "logging_steps", "max_example_num_per_dataset",
    ):  # fmt: skip
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name} is {getattr(cfg, name)}: it has to be at least 1")
    for name in ("learning_rate", "temperature"):
        if not getattr(cfg, name) > 0:
            raise ValueError(f"--{name} is {getattr(cfg, name)}: it has to be above 0")
    for name in ("max_tokens_per_micro_batch", "pad_to_multiple_of", "save_total_limit"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise ValueError(f"--{name} is {getattr(cfg, name)}: it has to be at least 1, or left out")
    if cfg.max_steps < 1 and not cfg.num_train_epochs > 0:
        raise ValueError(f"--num_train_epochs is {cfg.num_train_epochs}: it has to be above 0")
    if cfg.fp16 + cfg.bf16 + (cfg.mixed_precision is not None) > 1:
        raise ValueError("--fp16, --bf16 and --mixed_precision exclude each other; give one of them")
    if cfg.activation_memory_budget is not None and cfg.activation_memory_budget < 0:
        raise ValueError(f"--activation_memory_budget is {cfg.activation_memory_budget}: it has to be 0 or more")
    if cfg.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs `pip install deepspeed`")
    if not cfg.use_inbatch_neg and cfg.negatives_cross_device:
        raise ValueError("--negatives_cross_device needs in-batch negatives, which --use_inbatch_neg False turns off")
    if not cfg.use_inbatch_neg and cfg.train_group_size == 1:
        raise ValueError("--use_inbatch_neg False with --train_group_size 1 leaves nothing to learn from; raise one")
    if cfg.knowledge_distillation and cfg.train_group_size == 1:
        raise ValueError("--knowledge_distillation compares the passages of a group; raise --train_group_size above 1")
    if not 0 <= cfg.warmup_ratio <= 1:
        raise ValueError(f"--warmup_ratio is {cfg.warmup_ratio}: it has to be between 0 and 1")
    if cfg.warmup_steps < 0:
        raise ValueError(f"--warmup_steps is {cfg.warmup_steps}: it has to be 0 or more")
    if not 0 <= cfg.seed < 2**32:
        raise ValueError(f"--seed is {cfg.seed}: it has to be between 0 and 2**32 - 1")
    for tracker in cfg.report_to:
        if tracker not in ("none", "all", "tensorboard", "wandb", "trackio"):
            raise ValueError(f"--report_to {tracker} is not one of none, tensorboard, wandb, trackio, all")
        if tracker not in ("none", "all") and importlib.util.find_spec(tracker) is None:
            raise ValueError(f"--report_to {tracker} needs `pip install {tracker}`")
    check_model_path("--model_name_or_path", cfg.model_name_or_path)
    if os.path.exists(cfg.output_dir) and not os.path.isdir(cfg.output_dir):
        raise ValueError(f"--output_dir {cfg.output_dir} is a file; name a folder")
    if os.path.isdir(cfg.output_dir) and os.listdir(cfg.output_dir) and not cfg.overwrite_output_dir:
        raise ValueError(f"--output_dir {cfg.output_dir} is in use; name another folder or add --overwrite_output_dir")


def main(cfg: Config) -> None:
    # ---- check everything that can be checked before a model is loaded or a file written
    with user_errors():
        check(cfg)
        rows = TrainingRows(
            cfg.train_data,
            max_rows_per_file=cfg.max_example_num_per_dataset,
            seed=cfg.seed,
            need_scores=cfg.knowledge_distillation,
        )
        rows_without_negatives = rows.check_negatives() if cfg.train_group_size > 1 else 0
        deepspeed_config = read_deepspeed_config(cfg.deepspeed) if cfg.deepspeed else None

    import numpy as np
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import DeepSpeedPlugin, DistributedType, set_seed
    from tqdm import tqdm
    from transformers import get_scheduler

    from bge_accel.batching import default_token_budget, make_token_batch, split_micro_batches, tokenize
    from bge_accel.checkpoint import atomic_folder, flush_tree, move_into
    from bge_accel.distributed import gather, gather_with_grad, largest
    from bge_accel.encoding import prefetch
    from bge_accel.losses import contrastive_loss, known_positive_pairs
    from bge_accel.model import enable_gradient_checkpointing, instruction_prefix, load_encoder, save_encoder
    from bge_accel.sharding import configure_deepspeed, deepspeed_backward, whole_state_dict
    from bge_accel.training import ActivationBudget, automatic_activation_bytes, embed_and_backward

    # ---- accelerator
    on_cpu = cfg.use_cpu or not torch.cuda.is_available()
    if deepspeed_config is not None:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    asked = {name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true"}
    precision = choose_precision(cfg, torch.device("cpu" if on_cpu else "cuda"))
    # Buffers are constant; and as processes may differ in how many forward passes they make, sending them would hang.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*is deprecated")
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # accelerate sets it well
    accelerator = Accelerator(
        mixed_precision=precision.name,
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

    def say(text: str) -> None:
        if is_main:
            tqdm.write(text)

    if precision.warning:
        say(f"note: {precision.warning}")
    set_seed(cfg.seed, device_specific=True)

    # ---- tokenizer and model
    with user_errors():
        query_prefix = instruction_prefix(cfg.query_instruction_for_retrieval, cfg.query_instruction_format)
        passage_prefix = instruction_prefix(cfg.passage_instruction_for_retrieval, cfg.passage_instruction_format)
        encoder, tokenizer, settings = load_encoder(
            cfg.model_name_or_path,
            pooling=cfg.sentence_pooling_method,
            normalize=cfg.normalize_embeddings,
            query_prefix=query_prefix,
            passage_prefix=passage_prefix,
            config_name=cfg.config_name,
            tokenizer_name=cfg.tokenizer_name,
            trust_remote_code=cfg.trust_remote_code,
            longest=max(cfg.query_max_len, cfg.passage_max_len),
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
    if cfg.gradient_checkpointing:
        enable_gradient_checkpointing(encoder.backbone)
    encoder.train()

    # ---- batches: a pure function of (seed, batch index), prepared in a background thread
    per_batch = cfg.per_device_train_batch_size * world
    total_rows = math.ceil(cfg.num_train_epochs * len(rows))
    if cfg.max_steps > 0:  # the loop goes on until so many steps are taken
        num_batches = cfg.max_steps * cfg.gradient_accumulation_steps
    elif cfg.dataloader_drop_last:
        num_batches = total_rows // (per_batch * cfg.gradient_accumulation_steps) * cfg.gradient_accumulation_steps
    else:
        num_batches = math.ceil(total_rows / per_batch)
    with user_errors():
        if num_batches == 0:
            raise ValueError(
                f"{len(rows)} rows x {cfg.num_train_epochs:g} epochs do not fill one step of {per_batch} queries x "
                f"{cfg.gradient_accumulation_steps}; lower --per_device_train_batch_size or leave out "
                "--dataloader_drop_last"
            )
    num_steps = math.ceil(num_batches / cfg.gradient_accumulation_steps)
    end_of_data = None if cfg.max_steps > 0 or cfg.dataloader_drop_last else total_rows

    def row_query_prefix(prompt: str | None) -> str:
        own = instruction_prefix(prompt, cfg.query_instruction_format)
        return settings.query_prefix if own is None else own

    def batches() -> Iterator[Batch]:
        order = RowOrder(len(rows), cfg.seed)
        for index in itertools.count() if cfg.max_steps > 0 else range(num_batches):
            examples = []
            for position in batch_positions(index, cfg.per_device_train_batch_size, world, rank, end_of_data):
                epoch, row = order[position]
                examples.append(
                    draw_example(
                        rows,
                        row,
                        epoch,
                        seed=cfg.seed,
                        group_size=cfg.train_group_size,
                        query_prefix=row_query_prefix,
                        passage_prefix=settings.passage_prefix,
                        shuffle_ratio=cfg.shuffle_ratio,
                        teacher_scores=cfg.knowledge_distillation,
                    )
                )
            token_ids = tokenize(tokenizer, [example.query for example in examples], cfg.query_max_len)
            passages = [text for example in examples for text in example.passages]
            token_ids += tokenize(tokenizer, passages, cfg.passage_max_len)
            tokens = make_token_batch(
                token_ids,
                pad_token_id=tokenizer.pad_token_id,
                padding_side=tokenizer.padding_side,
                max_tokens=cfg.max_tokens_per_micro_batch or default_token_budget(device),
                pad_to_multiple_of=cfg.pad_to_multiple_of,
            )
            yield Batch(examples, tokens)

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

    # ---- hand both to accelerate
    if is_deepspeed:
        configure_deepspeed(
            accelerator, per_device_batch_size=cfg.per_device_train_batch_size, max_grad_norm=cfg.max_grad_norm
        )
    model, optimizer = accelerator.prepare(encoder, optimizer)
    engine = accelerator.deepspeed_engine_wrapped.engine if is_deepspeed else None
    if is_sharded:  # weights are gathered in each pass; what is kept is up to FSDP and DeepSpeed
        activations = ActivationBudget(0)
    elif cfg.activation_memory_budget is not None:
        activations = ActivationBudget(cfg.activation_memory_budget * 1e9)
    else:
        num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
        activations = ActivationBudget(automatic_activation_bytes(device, num_parameters))

    # ---- from here on files are written
    accelerator.wait_for_everyone()
    if is_main:
        os.makedirs(cfg.output_dir, exist_ok=True)
        with open(os.path.join(cfg.output_dir, "run_config.yaml"), "w", encoding="utf-8") as file:
            file.write(to_yaml(without_secrets(cfg)))
    trackers = cfg.report_to != ["none"]
    if trackers:
        names = {tracker: {"name": cfg.run_name} for tracker in ("wandb", "trackio") if cfg.run_name}
        flat = {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in asdict(without_secrets(cfg)).items()
        }
        accelerator.init_trackers("bge_accel", config=flat, init_kwargs=names)
    log_file = open(os.path.join(cfg.output_dir, "train_log.jsonl"), "w", encoding="utf-8") if is_main else None

    shared = world if cfg.negatives_cross_device else 1
    met = (
        cfg.per_device_train_batch_size * shared * cfg.train_group_size - 1
        if cfg.use_inbatch_neg
        else (cfg.train_group_size - 1)
    )
    say(
        f"{len(rows):,} rows, {num_steps:,} steps ({num_batches * per_batch / len(rows):.2f} epochs), global batch "
        f"{per_batch * cfg.gradient_accumulation_steps} queries ({world} process(es) x "
        f"{cfg.per_device_train_batch_size} x {cfg.gradient_accumulation_steps} accumulated); each query meets {met} "
        f"negatives; {settings.pooling} pooling, {'' if settings.normalize else 'not '}normalised, temperature "
        f"{temperature:g}; {accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'float32'} on "
        f"{device.type}; query instruction {shorten(settings.query_prefix)}"
    )
    if cfg.negatives_cross_device and world == 1:
        say("note: --negatives_cross_device has no effect on one process")
    if cfg.cache_path is not None:
        say("note: --cache_path has no effect: rows are read directly, no cache is written")
    if rows_without_negatives:
        say(f"note: {rows_without_negatives:,} rows have no negatives; theirs are drawn from other rows' passages")
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

    checkpoints: list[str] = []

    def save(step: int, is_end: bool = False) -> None:
        """The model as a folder `checkpoint-STEP`, or at the end in `output_dir` itself."""
        weights = whole_state_dict(accelerator, model) if is_sharded else None
        if is_main:
            card = model_card(cfg, settings, len(rows), step)
            if not is_end:
                with atomic_folder(os.path.join(cfg.output_dir, f"checkpoint-{step}")) as folder:
                    save_encoder(folder, encoder, tokenizer, settings, state_dict=weights, model_card=card)
                checkpoints.append(os.path.join(cfg.output_dir, f"checkpoint-{step}"))
                if cfg.save_total_limit is not None and len(checkpoints) > cfg.save_total_limit:
                    shutil.rmtree(checkpoints.pop(0))
            else:
                aside = os.path.join(cfg.output_dir, ".incomplete")
                shutil.rmtree(aside, ignore_errors=True)
                save_encoder(aside, encoder, tokenizer, settings, state_dict=weights, model_card=card)
                flush_tree(aside)
                move_into(aside, cfg.output_dir)
        accelerator.wait_for_everyone()

    # ---- the loop
    bar = tqdm(total=num_steps, desc="training", unit="step", disable=cfg.disable_tqdm or not is_main)
    step, skipped, saved_epoch, window = 0, 0, 0, Window()
    for index, batch in enumerate(prefetch(batches())):
        num_queries, tokens = len(batch.examples), batch.tokens
        if is_sharded:
            tokens = split_micro_batches(tokens, largest(len(tokens.micro_batches), device))
        in_step = index % cfg.gradient_accumulation_steps
        accumulated = cfg.gradient_accumulation_steps
        if cfg.max_steps < 1:
            accumulated = min(accumulated, num_batches - (index - in_step))
        last = in_step == accumulated - 1

        def loss_fn(emb: torch.Tensor, batch: Batch = batch, num_queries: int = num_queries) -> tuple[Any, Any]:
            q_emb, p_emb = emb[:num_queries], emb[num_queries:]
            passage_ids = torch.tensor([i for example in batch.examples for i in example.passage_ids], device=device)
            first_query = 0
            if cfg.negatives_cross_device:
                p_emb, passage_ids = gather_with_grad(p_emb), gather(passage_ids)
                first_query = rank * num_queries
            masked = None
            if cfg.mask_false_negatives:
                pairs = known_positive_pairs(
                    [example.known_ids for example in batch.examples],
                    passage_ids.cpu().numpy(),
                    group_size=cfg.train_group_size,
                    first_query=first_query,
                )
                masked = torch.from_numpy(pairs[0]).to(device), torch.from_numpy(pairs[1]).to(device)
            teacher = None
            if cfg.knowledge_distillation:
                teacher = torch.tensor(
                    np.array([example.teacher_scores for example in batch.examples], dtype=np.float32), device=device
                )
            output = contrastive_loss(
                q_emb,
                p_emb,
                temperature=temperature,
                group_size=cfg.train_group_size,
                first_query=first_query,
                in_batch_negatives=cfg.use_inbatch_neg,
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
            activations=activations,
            scale_loss=scale_loss,
            no_sync=nullcontext if is_sharded else lambda: accelerator.no_sync(model),
            backward=deepspeed_backward(engine) if is_deepspeed else None,
            last=last,
        )
        if not math.isfinite(output.loss.item()):
            places = ", ".join(rows.place(example.row) for example in batch.examples)
            raise RuntimeError(
                f"step {step + 1}: the loss is {output.loss.item()} on the rows {places}; lower --learning_rate, or "
                "look at these rows"
            )
        window.add(output, num_masked, num_queries, batch.tokens)
        if not last:
            continue

        rate, scaler = scheduler.get_last_lr()[0], accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 1.0
        if engine is not None:  # clips, steps and forgets the gradients in one
            engine.step()
            norm = engine.get_global_grad_norm()
        else:
            norm = accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
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
        if skips and not is_end:
            continue
        if step % cfg.logging_steps == 0 or is_end or (step == 1 and cfg.logging_first_step):
            record = {
                "step": step,
                "epoch": round((index + 1) * per_batch / len(rows), 4),
                **window.summary(accelerator),
                "learning_rate": rate,
                "grad_norm": whole(norm),
                "memory_gb": peak_memory_gb(device),
                "skipped_steps": skipped,
            }
            window = Window()
            say(log_line(record, num_steps))
            if log_file is not None:
                log_file.write(json.dumps(record) + "\n")
                log_file.flush()
            if trackers:
                accelerator.log({key: value for key, value in record.items() if key != "step"}, step=step)
        epoch_done = (index + 1) * per_batch // len(rows)
        due = (cfg.save_strategy == "steps" and step % cfg.save_steps == 0) or (
            cfg.save_strategy == "epoch" and epoch_done > saved_epoch
        )
        if due and not is_end:
            save(step)
            saved_epoch = epoch_done
        if is_end:
            break
    bar.close()

    # ---- save
    save(step, is_end=True)
    if log_file is not None:
        log_file.close()
    say(f"saved {cfg.output_dir}")
    accelerator.end_training()


class Precision(NamedTuple):
    """Accelerate's name of it (None: what `accelerate launch` was told), and a warning where it is not as asked."""

    name: str | None
    warning: str | None


def choose_precision(cfg: Config, device: Any) -> Precision:
    """What the flags ask for, else what `accelerate launch` was told, as far as the device can."""
    from bge_accel.encoding import resolve_dtype

    asked = cfg.mixed_precision or ("fp16" if cfg.fp16 else "bf16" if cfg.bf16 else None)
    asked = asked or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if asked not in ("auto", "fp16", "bf16"):
        return Precision(asked, None)
    dtype, warning = resolve_dtype(asked == "fp16", asked != "fp16", device)
    name = {"torch.float16": "fp16", "torch.bfloat16": "bf16"}.get(str(dtype), "no")
    return Precision(name, None if asked == "auto" else warning)


def whole(norm: Any) -> float | None:
    """A gradient norm as a number: FSDP2 gives it in parts, DeepSpeed's stage 0 not at all."""
    return None if norm is None else float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class Window:
    """What happened since the last log line, on this process."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.sums = dict.fromkeys(("batches", "loss", "accuracy", "positive", "negative", "masked"), 0.0)
        self.counts = dict.fromkeys(("queries", "tokens", "padding"), 0)

    def add(self, output: Any, num_masked: int, num_queries: int, tokens: "TokenBatch") -> None:
        figures = output.loss, output.accuracy, output.positive_similarity, output.hardest_negative_similarity
        values = [1, *(figure.item() for figure in figures), num_masked]
        for name, value in zip(self.sums, values, strict=True):
            self.sums[name] += 0.0 if math.isnan(value) else value  # no query may have met a negative
        for name, count in zip(self.counts, (num_queries, tokens.num_tokens, tokens.num_padding), strict=True):
            self.counts[name] += count

    def summary(self, accelerator: Any) -> dict[str, float]:
        """Means and rates over all processes."""
        import torch

        values = torch.tensor([*self.sums.values(), *self.counts.values()], dtype=torch.float32)
        values = accelerator.reduce(values.to(accelerator.device), reduction="sum").tolist()
        batches, loss, accuracy, positive, negative, masked, queries, tokens, padding = values
        seconds = time.perf_counter() - self.start
        return {
            "loss": loss / batches,
            "accuracy": accuracy / batches,
            "positive_similarity": positive / batches,
            "hardest_negative_similarity": negative / batches,
            "masked_per_query": masked / queries,
            "queries_per_second": queries / seconds,
            "tokens_per_second": tokens / seconds,
            "padding": padding / (tokens + padding),
        }


def log_line(record: dict[str, Any], num_steps: int) -> str:
    return (
        f"step {record['step']}/{num_steps}  loss {record['loss']:.4f}  accuracy {record['accuracy']:.3f}  "
        f"lr {record['learning_rate']:.2e}  grad norm {record['grad_norm'] or math.nan:.2f}  "
        f"{record['queries_per_second']:.1f} queries/s  {record['tokens_per_second']:,.0f} tokens/s  "
        f"padding {record['padding']:.1%}  masked {record['masked_per_query']:.2f}/query  "
        f"memory {record['memory_gb']:.1f} GB"
        + (f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else "")
    )


def peak_memory_gb(device: Any) -> float:
    """The most memory held so far: of the GPU, else of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def without_secrets(cfg: Config) -> Config:
    return Config(**{**asdict(cfg), "token": None})


def model_card(cfg: Config, settings: Any, num_rows: int, step: int) -> str:
    """README.md of the saved model: what it is, how to load it, how it was trained."""
    prompt = f" The query instruction {shorten(settings.query_prefix)} is applied." if settings.query_prefix else ""
    # Folders are nobody else's business: their last parts say enough.
    shown = without_secrets(cfg)
    shown.model_name_or_path, shown.output_dir = (
        os.path.basename(os.path.normpath(p)) if os.path.isabs(p) else p
        for p in (shown.model_name_or_path, shown.output_dir)
    )
    shown.train_data = [os.path.basename(os.path.normpath(path)) for path in shown.train_data]
    base = "" if os.path.isdir(cfg.model_name_or_path) else f"base_model: {cfg.model_name_or_path}\n"
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, sentence-similarity]
{base}---

# {os.path.basename(os.path.abspath(cfg.output_dir))}

A text-embedding model: {os.path.basename(cfg.model_name_or_path.rstrip("/"))}, fine-tuned for {step:,} steps on
{num_rows:,} rows of query and passages. {settings.pooling} pooling,
{"normalised: compare by dot product or cosine" if settings.normalize else "not normalised: compare by dot product"}.

```python
from bge_accel import EmbeddingModel

model = EmbeddingModel("path/to/this/folder")
scores = model.encode_queries(["a question"]) @ model.encode_corpus(["a passage"]).T
```

It also loads as `sentence_transformers.SentenceTransformer(folder)` (`encode_query`, `encode_document`).{prompt}

## Training configuration

```yaml
{to_yaml(shown).strip()}
```
"""


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__.split("\n")[0], refused=REFUSED))
