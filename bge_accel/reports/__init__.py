"""What people look at: figures, pages, and what the doctor says of data and machine."""

DOOR = {
    "doctor": "as_json as_text check_environment check_settings free_memory_gb sort_findings".split(),
    "forecast": "cost_of forecast_lines".split(),
    "html_report": "evaluation_page results_page training_page".split(),
    "probe": "measure".split(),
    "row_checks": "check_held_out check_rows Finding read_sample Sample".split(),
    "text_checks": "check_texts".split(),
}
"""The names that other rooms and scripts may use, by module."""
