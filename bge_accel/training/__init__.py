"""What a training run is made of: losses, the step, embeddings gathered over processes, sharding, the plan of a run, checkpoints
and saved models."""

DOOR = {
    "checkpoint": "choose_checkpoint find_checkpoints load_optimizer_tensors optimizer_tensors random_state read_optimizer read_run_state read_state remove_leftovers REQUEUE room_for_run saving_errors set_random_state write_state".split(),
    "gather": "gather gather_uneven gather_with_grad largest".split(),
    "half_precision": "Bf16Copy".split(),
    "losses": "contrastive_loss known_positive_pairs known_to_any".split(),
    "manifest": "STATE write_manifest".split(),
    "plan": "check_sources FEW_SHORT plan_run PlannedSource repeated_negatives RunPlan".split(),
    "refused_flags": "REFUSED".split(),
    "saved_model": "BEST is_complete keep_best LAST note_complete note_saved SAVED".split(),
    "sharding": "configure_deepspeed deepspeed_backward read_deepspeed_config whole_state_dict".split(),
    "step": "ActivationBudget automatic_activation_bytes available_memory embed_and_backward keep_freed_memory".split(),
}
"""The names that other rooms and scripts may use, by module."""
