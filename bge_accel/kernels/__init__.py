"""Optional speed. Each module replaces a part of a model by a faster one with the same result to rounding."""

DOOR = {
    "cpu_attention": "attend".split(),
    "last_layer": "".split(),
    "onednn": "cpu_has_bf16".split(),
    "packed": "can_run_packed check_kernel num_packed pack pad".split(),
    "packed_linear": "PackedLinears".split(),
    "switch": "use_kernels".split(),
}
"""The names that other rooms and scripts may use, by module."""
