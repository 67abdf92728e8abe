"""Flags of FlagEmbedding's fine-tuning and of transformers.TrainingArguments that `finetune.py` does not take.

Each has one line that says what to do instead. A value that asks for what happens anyway is let pass, so that command
lines written for those tools run.
"""

from bge_accel.config import Refusal

_EVALUATE = Refusal(
    "retrieval is measured on --eval_data every --eval_steps; drop the flag", ("no", "steps", "False", "0")
)
_HUB = Refusal("upload the output folder with `hf upload` when the run is done", ("False", "every_save"))
_LAUNCH = "say so to `accelerate launch` (or in its YAML): it decides how to run"
_PREPARE = Refusal("batches are prepared in a background thread; drop the flag", ("0", "False", "True"))
_DECODER = Refusal("only encoders are trained here; decoders with LoRA are not", ("False",))
_TRACKER = Refusal("set it by the tracker's own environment variables")
_KERNELS = Refusal("kernels are torch's own; drop the flag, or try --torch_compile", ("False",))
_M3 = Refusal(
    "only dense embeddings are trained here, not bge-m3's sparse and multi-vector heads", ("False", "0", "-1")
)
_DEBUG = Refusal("it has no meaning in this loop; drop the flag", ("", "False"))
_LOGGING = Refusal(
    "the main process logs every --logging_steps; drop the flag", ("steps", "passive", "warning", "True")
)
_ALWAYS_FLAT = Refusal("memory is bounded by micro-batches anyway (--max_tokens_per_micro_batch)", ("False", "-1", "0"))

REFUSED: dict[str, Refusal] = {
    # FlagEmbedding 1.4
    "sub_batch_size": Refusal("--max_tokens_per_micro_batch bounds memory, without changing the loss", ("-1", "None")),
    "use_mrl": Refusal("Matryoshka training is not offered; drop the flag", ("False",)),
    "mrl_dims": Refusal("Matryoshka training is not offered; drop the flag"),
    "use_fast_tokenizer": Refusal("every tokenizer of transformers 5 is a fast one; drop the flag", ("True",)),
    "colbert_dim": _M3,
    "unified_finetuning": _M3,
    "use_self_distill": _M3,
    "fix_encoder": _M3,
    "self_distill_start_step": _M3,
    **{
        name: _DECODER
        for name in (
            "peft_model_path use_lora lora_rank lora_alpha lora_dropout target_modules use_flash_attn "
            "use_slow_tokenizer additional_special_tokens save_merged_lora_model only_merge_lora_model raw_peft "
            "from_peft modules_to_save save_lora_embeddings load_merged_lora_model example_query_max_len "
            "example_passage_max_len retrieval_use_examples icl_suffix_str"
        ).split()
    },
    # transformers.TrainingArguments, versions 4 and 5: launching and precision
    "fsdp": Refusal(_LAUNCH + ": `accelerate launch --use_fsdp`", ("",)),
    "fsdp_config": Refusal(_LAUNCH + ": `accelerate launch --use_fsdp`"),
    "fsdp_min_num_params": Refusal(_LAUNCH + ": `accelerate launch --use_fsdp`", ("0",)),
    "fsdp_transformer_layer_cls_to_wrap": Refusal(_LAUNCH + ": `accelerate launch --use_fsdp`"),
    "accelerator_config": Refusal(_LAUNCH),
    "parallelism_config": Refusal(_LAUNCH),
    "tpu_num_cores": Refusal(_LAUNCH),
    "tpu_metrics_debug": Refusal(_LAUNCH, ("False",)),
    "ddp_backend": Refusal(_LAUNCH),
    "local_rank": Refusal("start with `torchrun` or `accelerate launch`, which say so in the environment", ("-1",)),
    "no_cuda": Refusal("--use_cpu", ("False",)),
    "use_mps_device": Refusal("the device is found by itself; drop the flag", ("False",)),
    "half_precision_backend": Refusal("precision comes from --bf16, --fp16 or accelerate's YAML", ("auto",)),
    "fp16_backend": Refusal("precision comes from --bf16, --fp16 or accelerate's YAML", ("auto",)),
    "fp16_opt_level": Refusal("Apex is not used; --fp16 alone is enough", ("O1",)),
    "ddp_find_unused_parameters": Refusal("every trained parameter is used; drop the flag", ("False",)),
    "ddp_bucket_cap_mb": Refusal("torch's own bucket size is used; drop the flag"),
    "ddp_broadcast_buffers": Refusal("buffers are constant and not broadcast; drop the flag", ("False",)),
    "ddp_static_graph": Refusal("the graph changes with the batch; drop the flag", ("False",)),
    "ddp_timeout": Refusal("torch's own time-out is used; drop the flag", ("1800",)),
    "torch_compile_backend": Refusal("--torch_compile takes torch's own; drop the flag", ("inductor",)),
    "torch_compile_mode": Refusal("--torch_compile takes torch's own; drop the flag", ("default",)),
    "torchdynamo": Refusal("--torch_compile", ("inductor",)),
    "jit_mode_eval": _KERNELS,
    "use_ipex": _KERNELS,
    "use_liger_kernel": _KERNELS,
    "liger_kernel_config": _KERNELS,
    "tf32": Refusal("set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, or train in --bf16", ("False",)),
    # evaluation, checkpoints, hub
    **{
        name: _EVALUATE
        for name in (
            "do_eval do_predict eval_strategy evaluation_strategy eval_delay per_device_eval_batch_size "
            "per_gpu_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object "
            "eval_accumulation_steps include_for_metrics include_inputs_for_metrics batch_eval_metrics "
            "bf16_full_eval fp16_full_eval"
        ).split()
    },
    "greater_is_better": Refusal("all metrics here are better the larger they are; drop the flag", ("True",)),
    "do_train": Refusal("this script trains; drop the flag", ("True",)),
    "ignore_data_skip": Refusal("going on costs no time here, nothing is skipped; drop the flag", ("False",)),
    "restore_callback_states_from_checkpoint": Refusal("there are no callbacks; drop the flag", ("False",)),
    "save_only_model": Refusal("a checkpoint is there to go on from; --save_total_limit bounds their number", ("False",)),
    "save_on_each_node": Refusal("the main process saves; copy the folder where you need it", ("False",)),
    "save_safetensors": Refusal("models are saved as safetensors only; drop the flag", ("True",)),
    "enable_jit_checkpoint": Refusal("use --save_steps", ("False",)),
    **{
        name: _HUB
        for name in (
            "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
            "push_to_hub_model_id push_to_hub_organization push_to_hub_token"
        ).split()
    },
    # data and batches
    "dataloader_num_workers": _PREPARE,
    "dataloader_pin_memory": _PREPARE,
    "dataloader_persistent_workers": _PREPARE,
    "dataloader_prefetch_factor": _PREPARE,
    "dataloader_multiprocessing_context": _PREPARE,
    "dataloader_in_order": _PREPARE,
    "remove_unused_columns": Refusal("unused keys of a row are ignored; drop the flag", ("True", "False")),
    "label_names": _DEBUG,
    "train_sampling_strategy": Refusal("rows are shuffled, then sorted by length inside each batch", ("random",)),
    "group_by_length": Refusal("texts are always grouped by length inside each batch; drop the flag"),
    "length_column_name": Refusal("lengths are counted in tokens; drop the flag", ("length",)),
    "auto_find_batch_size": _ALWAYS_FLAT,
    "torch_empty_cache_steps": _ALWAYS_FLAT,
    "per_gpu_train_batch_size": Refusal("--per_device_train_batch_size"),
    "split_batches": Refusal("--per_device_train_batch_size is what each process takes", ("False",)),
    "dispatch_batches": Refusal("every process reads its own rows; drop the flag", ("False",)),
    # optimiser and loss
    "optim_args": Refusal("--adam_beta1, --adam_beta2 and --adam_epsilon"),
    "optim_target_modules": Refusal("all parameters take the same optimiser; drop the flag"),
    "adafactor": Refusal("AdamW is the optimiser; drop the flag", ("False",)),
    "lr_scheduler_kwargs": Refusal("choose a --lr_scheduler_type that needs no arguments"),
    "average_tokens_across_devices": Refusal("the loss is a mean over queries, not tokens; drop the flag", ("True", "False")),
    "label_smoothing_factor": Refusal("the contrastive loss takes no label smoothing; use a higher --temperature", ("0.0", "0")),
    "neftune_noise_alpha": Refusal("noise on embeddings is not offered; drop the flag"),
    "activation_checkpointing": Refusal("--gradient_checkpointing", ("False",)),
    "activation_checkpointing_kwargs": Refusal("--gradient_checkpointing chooses its arguments itself"),
    "gradient_checkpointing_kwargs": Refusal("--gradient_checkpointing chooses its arguments itself"),
    "use_cache": Refusal("encoders keep no cache; drop the flag", ("False",)),
    "full_determinism": Refusal("runs on a CPU are deterministic; on a GPU set CUBLAS_WORKSPACE_CONFIG=:4096:8", ("False",)),
    "data_seed": Refusal("--seed orders the data, too"),
    # logging
    "logging_dir": Refusal("logs go to --output_dir"),
    "logging_strategy": _LOGGING,
    "log_on_each_node": _LOGGING,
    "log_level": _LOGGING,
    "log_level_replica": _LOGGING,
    "logging_nan_inf_filter": Refusal("a non-finite loss stops the run", ("False",)),
    "include_num_input_tokens_seen": Refusal("the log always has tokens/s", ("no", "False")),
    "include_tokens_per_second": Refusal("the log always has tokens/s; drop the flag", ("True", "False")),
    "skip_memory_metrics": Refusal("the log always has the peak memory; drop the flag", ("True", "False")),
    "project": _TRACKER,
    "trackio_space_id": _TRACKER,
    "trackio_bucket_id": _TRACKER,
    "trackio_static_space_id": _TRACKER,
    "debug": _DEBUG,
    "past_index": Refusal("it has no meaning for encoders; drop the flag", ("-1",)),
    "mp_parameters": _DEBUG,
    "ray_scope": _DEBUG,
    "sharded_ddp": _DEBUG,
}  # fmt: skip
