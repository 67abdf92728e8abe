"""What a training run is made of: losses, the step, embeddings gathered over processes, sharding, the plan of a run, checkpoints
and saved models."""

DOOR = {
    "batches": "Batch Batches".split(),
    "checkpoint": "find_checkpoints read_state".split(),
    "engine": "compiling_asked_for Engine EngineOptions".split(),
    "feeds": "load_feeds open_feeds position_of".split(),
    "gather": "gather largest".split(),
    "introduction": "introduce".split(),
    "log": "LogOptions TrainLog".split(),
    "losses": "contrastive_loss ContrastiveLoss".split(),
    "manifest": "STATE write_manifest".split(),
    "model": "load_model ModelOptions".split(),
    "negatives": "gather_passages known_positives".split(),
    "plan": "check_sources DataOptions FEW_SHORT plan_run PlannedSource repeated_negatives RunPlan".split(),
    "refused_flags": "REFUSED".split(),
    "run_folder": "check_run_folder Checkpoint FolderOptions lock_run_folder Progress RunFolder".split(),
    "saved_model": "BEST LAST SAVED".split(),
    "sharding": "read_deepspeed_config".split(),
    "step": "ActivationBudget automatic_activation_bytes available_memory embed_and_backward".split(),
}
"""The names that other rooms and scripts may use, by module."""
