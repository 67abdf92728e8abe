"""From a checkpoint to an encoder and back: settings, weights, tokenizer, pooling, precision, the card of a saved model."""

DOOR = {
    "card": "fenced front_matter inline license_of model_card usage versions".split(),
    "compiling": "compile_layers".split(),
    "encoder": "Encoder load_encoder save_encoder".split(),
    "flops": "flops_per_token matmul_rate peak_flops".split(),
    "loading": "check_lengths check_prefix COMPUTED encoder_class load_tokenizer load_weights loading max_positions read_config".split(),
    "pooling": "POOLING".split(),
    "precision": "choose_precision cpu_is_faster_in_bf16 default_device floating_dtype own_device resolve_dtype".split(),
    "settings": "differing_settings EmbeddingSettings instruction_prefix read_modules read_settings".split(),
    "tensor_files": "INDEX Layout parse_size plan_shards TensorFiles write_index write_safetensors".split(),
    "tokenizing": "check_tokens tokenize TOKENIZING".split(),
}
"""The names that other rooms and scripts may use, by module."""
