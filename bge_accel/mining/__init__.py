"""From rankings to hard negatives: the pool of candidates, what is chosen of it, and the rows that are written."""

DOOR = {
    "choice": "Choice parse_range QueryGroups".split(),
    "histogram": "text_histogram".split(),
    "miner": "embed_pool Miner MinerOptions".split(),
    "output": "NothingMinedError OutputOptions WAY_OUT write_output".split(),
    "pool": "normalise_text TextPool write_inputs".split(),
    "refused_flags": "REFUSED".split(),
    "rows": "new_row rounded".split(),
}
"""The names that other rooms and scripts may use, by module."""
