"""Optional speed. Each module replaces a part of a model by a faster one with the same result to rounding."""

DOOR = {
    "cpu_attention": "attend use_cpu_attention".split(),
    "dropout": "use_cpu_dropout".split(),
    "in_place_gradients": "add_gradients_in_place".split(),
    "last_layer": "".split(),
    "onednn": "cpu_has_bf16".split(),
    "packed": "check_dropout check_kernel num_packed pack PACKED_POOLING_METHODS pad pool_packed use_kernel why_not".split(),
    "packed_linear": "PackedLinears".split(),
}
"""The names that other rooms and scripts may use, by module."""
