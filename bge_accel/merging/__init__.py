"""From several checkpoints to one (LM-Cocktail): the plan, the stream of tensors, weights found from data."""

DOOR = {
    "merge": "check_complete check_output_folder check_weights last_checkpoints merge_models mix_models mix_models_by_layers".split(),
    "weights": "check_examples choose_mix example_losses examples_to_retrieve mix_models_with_data MixScore ndcg_at_10 plot_mixes read_examples search_mixes weights_from_losses".split(),
}
"""The names that other rooms and scripts may use, by module."""
