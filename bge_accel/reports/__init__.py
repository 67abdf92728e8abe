"""What people look at: figures, pages, and what the doctor says of data and machine."""

DOOR = {
    "doctor": "as_json as_text check_environment check_settings fit_memory free_memory_gb largest_step_tokens Measured propose_batch sort_findings".split(),
    "html_report": "evaluation_page results_page training_page".split(),
    "row_checks": "check_held_out check_instruction check_lengths check_rows check_unknown_tokens Finding read_sample Sample".split(),
}
"""The names that other rooms and scripts may use, by module."""
