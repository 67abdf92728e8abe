"""From files to drawn examples: rows are read and checked (`reading`, `rows`), sources are mixed (`sources`), streamed
(`streaming`) or fetched (`remote`), and each step's examples are drawn from the seed (`examples`)."""

DOOR = {
    "examples": "balanced_positions batch_positions draw_example Example expected_tokens RowOrder Rows".split(),
    "reading": "begins_array check_json check_training_row open_binary raw_lines read_rows text_id".split(),
    "remote": "HUB_NAME".split(),
    "rows": "join_known_positives TrainingRows".split(),
    "sources": "find_sources merge_small Source source_shares SourceSchedule YAML".split(),
    "splitmix": "splitmix64".split(),
    "streaming": "RowStream".split(),
}
"""The names that other rooms and scripts may use, by module."""
